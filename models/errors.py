"""Errors a user can cause or meet, and how a console command reports them."""

import sys
from collections.abc import Callable


class LeanRecError(Exception):
    """A failure the user can act on: names the input, what is wrong and what to do. Exit code 1."""


class UsageError(LeanRecError):
    """The command was asked for something it cannot do. Exit code 2."""


def run_command(main: Callable[[], int | None]) -> int:
    """Return the exit code of `main`, with expected failures told in one line on stderr."""
    try:
        return main() or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LeanRecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
