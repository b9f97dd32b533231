"""A new catalogue made ready while another is served."""

import os
import sys
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
from serve.apart import NICE, Apart
from serve.shelf import Shelf

MANY_ITEMS = 50_000
"""from which on to build a trie takes longer than to start a process for it"""
_CATALOG = "catalog.parquet"


def make_shelf(recommender: Recommender, catalog: Catalog, max_length: int, apart: Apart) -> Shelf:
    """Return another catalogue for a recommender, with all that requests will need.

    Raises:
        LeanRecError: its titles cannot make a trie, or are too long for the model.
        OSError: there is no room for temporary files.
        ServiceProblem: 503, the service ends.
    """
    if len(catalog) < MANY_ITEMS:
        shelf = Shelf.with_catalog(recommender, catalog)
    else:
        trie = _build_apart(recommender.directory, catalog, apart)
        titles = catalog.titles
        prompter = Prompter(recommender.tokenizer, recommender.prompt, titles, lambda: trie.title_tokens)
        shelf = Shelf(catalog, prompter, trie)
    shelf.fill()
    if 2 * shelf.trie.deepest > max_length:
        raise LeanRecError(
            f"catalogue: a title takes {shelf.trie.deepest} tokens; with --max-model-len {max_length} "
            "there is no room for a history before it"
        )
    return shelf


def _build_apart(directory: Path, catalog: Catalog, apart: Apart) -> Trie:
    with TemporaryDirectory(prefix="leanrec-catalog-") as folder:
        write_catalog(Path(folder) / _CATALOG, replace(catalog, attributes={}))
        apart.run("serve.building", str(directory), folder)
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
