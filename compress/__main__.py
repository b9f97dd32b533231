"""`python -m compress` and `accelerate launch -m compress`."""

from compress.cli import run

run()
