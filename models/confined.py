"""A recommender directory is all there is: no file in it may lead to one outside."""

import json
from pathlib import Path

from models.errors import LeanRecError

READ_BY_TRANSFORMERS = (
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "spm_file",
    "fast_tokenizer_files",
)
"""Keys of tokenizer_config.json. Others, as special_tokens_map_file, only tell where it was made."""


def inside(directory: Path, name: object, named_in: Path) -> Path:
    """Return a file of the directory, named in another of its files.

    Raises:
        LeanRecError: the name is not that of a file beside the other: it may lead anywhere.
    """
    plain = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..")
    if not plain or Path(str(name)).name != name:
        raise LeanRecError(
            f"{named_in}: names {str(name)[:100]!r}, which is not the name of a file beside it; "
            "everything a recommender consists of is in its directory"
        )
    return directory / str(name)


def check_references(directory: Path) -> None:
    """Check that what transformers reads names no file outside the directory.

    Raises:
        LeanRecError: it does, or it is an adapter for a model elsewhere.
    """
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        raise LeanRecError(f"{adapter}: adapters are not read; merge it into the model and save that")
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LeanRecError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise LeanRecError(f"{path}: holds no JSON object")
    for key in READ_BY_TRANSFORMERS:
        named = settings.get(key)
        for name in named if isinstance(named, list) else [named]:
            if name is not None:
                inside(directory, name, path)
