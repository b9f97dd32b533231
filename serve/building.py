"""A new catalogue made ready while another is served.

The trie of a large one is built in a process of its own, at low priority: in this one it would hold the
interpreter, and with it every request.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from os import EX_IOERR
from pathlib import Path
from tempfile import TemporaryDirectory

from models.catalog import Catalog, read_catalog, write_catalog
from models.checkpoint import Recommender, read_recommender
from models.errors import LeanRecError, UsageError, run_command
from models.index import INDEX, load_index, save_index
from models.prompt import Prompter
from models.trie import Trie
from serve.shelf import Shelf

APART = 50_000
"""Items from which on to build takes longer than to start a process."""
NICE = 5
_CATALOG = "catalog.parquet"
_builds: "set[subprocess.Popen[str]]" = set()
"""That run in this process's name"""


def make_shelf(recommender: Recommender, catalog: Catalog, max_length: int) -> Shelf:
    """Return another catalogue for a recommender, with all that requests will need.

    Raises:
        LeanRecError: its titles cannot make a trie, or are too long for the model.
        OSError: there is no room for temporary files.
    """
    if len(catalog) < APART:
        shelf = Shelf.with_catalog(recommender, catalog)
    else:
        trie = _build_apart(recommender.directory, catalog)
        titles = catalog.titles
        prompter = Prompter(recommender.tokenizer, recommender.prompt, titles, lambda: trie.title_tokens)
        shelf = Shelf(catalog, prompter, trie)
    shelf.fill()
    if 2 * shelf.deepest > max_length:
        raise LeanRecError(
            f"catalogue: a title takes {shelf.deepest} tokens; with --max-model-len {max_length} "
            "there is no room for a history before it"
        )
    return shelf


def end_builds() -> None:
    """Kill what is being built: nobody waits for it any more."""
    for build in list(_builds):
        build.kill()


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    with subprocess.Popen(
        command,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as build:
        _builds.add(build)
        try:
            _, errors = build.communicate()
        finally:
            _builds.discard(build)
    return subprocess.CompletedProcess(command, build.returncode, "", errors)


def _build_apart(directory: Path, catalog: Catalog) -> Trie:
    with TemporaryDirectory(prefix="leanrec-catalog-") as folder:
        write_catalog(Path(folder) / _CATALOG, replace(catalog, attributes={}))
        done = _run([sys.executable, "-P", "-m", "serve.building", str(directory), folder])
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            if done.returncode == EX_IOERR:
                raise OSError(errno.EIO, last)
            raise LeanRecError(last.removeprefix("error: "))
        return load_index(Path(folder) / INDEX, folder)  # the mapping outlives the file


def main(argv: list[str] | None = None) -> int:
    """Build the index of the catalogue in a folder."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2:
        raise UsageError("usage: python -m serve.building RECOMMENDER_DIRECTORY FOLDER")
    os.nice(NICE)
    directory, folder = map(Path, arguments)
    recommender = replace(read_recommender(directory), catalog=read_catalog(folder / _CATALOG))
    try:
        save_index(folder / INDEX, str(folder), recommender.trie)
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        return EX_IOERR
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
