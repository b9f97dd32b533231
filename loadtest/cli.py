"""The `loadtest` command."""

import sys

from loadtest.arguments import parse
from models.errors import run_command


def main(argv: list[str] | None = None) -> int:
    """Run the load test and return the exit code."""
    arguments = parse(argv)
    # After parsing, so that --help comes at once.
    from loadtest.comparison import compare_deployments

    return compare_deployments(arguments)


def run() -> None:
    """Console entry point."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    run()
