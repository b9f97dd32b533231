"""API keys and the administrator's token, as files or the environment give them. No message holds one."""

import os
from pathlib import Path

from models.errors import LeanRecError

KEYS_VARIABLE = "LEANREC_API_KEY"
TOKEN_VARIABLE = "LEANREC_ADMIN_TOKEN"
MAX_KEYS = 256
"""Every request is compared with all of them."""


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys, one a line, from the file or the environment; none where neither is given.

    Raises:
        LeanRecError: unreadable, empty, too many, or a key that no header can carry. No message holds a key.
    """
    if path is None:
        if KEYS_VARIABLE not in os.environ:
            return ()
        return _checked_keys(os.environ[KEYS_VARIABLE], KEYS_VARIABLE)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        # The name is not told again: it may be a key.
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise LeanRecError(
            f"--api-key FILE: cannot be read ({reason}); give a file that holds keys, one a line, "
            f"or put them into {KEYS_VARIABLE}"
        ) from None
    return _checked_keys(text, f"--api-key {path}")


def _checked_keys(text: str, source: str) -> tuple[str, ...]:
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines, start=1):
        if not (line.isascii() and line.isprintable()) or " " in line:
            raise LeanRecError(
                f"{source}: line {number} is not a key: use letters, digits and signs of ASCII"
            )
    keys = list(dict.fromkeys(filter(None, lines)))
    if not keys:
        raise LeanRecError(
            f"{source}: is empty; put one key on each line, or leave it out to let everybody in"
        )
    if len(keys) > MAX_KEYS:
        raise LeanRecError(f"{source}: holds {len(keys)} keys; the service takes {MAX_KEYS}")
    return tuple(keys)


def read_token(path: Path | None) -> str | None:
    """Return the administrator's token from the file or the environment, or None.

    Raises:
        LeanRecError: the file cannot be read or is empty.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LeanRecError(f"--admin-token-file {path}: cannot be read ({error})") from error
    if not token:
        raise LeanRecError(f"--admin-token-file {path}: is empty")
    return token
