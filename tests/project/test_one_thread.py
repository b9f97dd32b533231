"""Benchmarks that compute in their own process do so with one thread."""

import os
import subprocess
import sys

CODE = """
import os, sys
loaded_with = os.environ["OMP_NUM_THREADS"]  # what a library reads that is imported at the top
from benchmarks.serving.one_thread import one_thread
one_thread()
print(loaded_with, *sys.argv[1:])
"""


def test_a_command_starts_anew_with_one_thread_and_its_arguments():
    several = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", CODE, "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=several)
    assert done.stdout.split() == ["1", "--rounds", "3"]
