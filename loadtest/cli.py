"""The `loadtest` command."""

import sys

from loadtest.arguments import parse
from models.errors import run_command


def main(argv: list[str] | None = None) -> int:
    """Run the load test and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["compare"]:
        return _compare(words[1:])
    if words[:1] == ["worker"]:
        from loadtest.worker import parse_worker, work

        return work(parse_worker(words[1:]))
    arguments = parse(argv)
    # After parsing, so that --help comes at once.
    from loadtest.comparison import compare_deployments

    return compare_deployments(arguments)


def _compare(words: list[str]) -> int:
    from loadtest.saved_runs import compare_saved, parse_compare

    print(compare_saved(*parse_compare(words)), end="")
    return 0


def run() -> None:
    """Console entry point."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    run()
