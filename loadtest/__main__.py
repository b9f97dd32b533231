"""`python -m loadtest`."""

from loadtest.cli import run

run()
