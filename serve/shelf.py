"""One version of the catalogue with all that is derived from it; a swap replaces it whole."""

import io
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from models.catalog import Catalog, make_catalog, read_parquet_catalog
from models.errors import LeanRecError
from models.search import SearchRequest
from serve.filters import Filters
from serve.schemas import MAX_CATALOG_ITEMS, CatalogItem, CatalogPage, CatalogRow

if TYPE_CHECKING:
    from models.checkpoint import Recommender
    from models.prompt import Prompter
    from models.trie import Trie


@dataclass(frozen=True)
class Shelf:
    """A catalogue ready to be recommended from."""

    catalog: Catalog
    prompter: "Prompter"
    trie: "Trie"

    @staticmethod
    def of(recommender: "Recommender") -> "Shelf":
        """Return the recommender's own catalogue."""
        return Shelf(recommender.catalog, recommender.prompter, recommender.trie)

    @staticmethod
    def with_catalog(recommender: "Recommender", catalog: Catalog) -> "Shelf":
        """Return another catalogue for the same model.

        Raises:
            LeanRecError: its titles cannot make a trie.
        """
        return Shelf.of(replace(recommender, catalog=catalog))

    def fill(self) -> None:
        """Derive now what requests will need, so that none of them waits for it."""
        _ = self.version, self.deepest, self.popular, self.log_share
        _ = self.catalog.row_of, self.catalog.row_of_title, self.prompter.title_tokens
        _ = self.filters, self.trie.leaf_of_item, self.probe
        pa.default_memory_pool().release_unused()  # a large table's columns on their way to other forms

    @property
    def version(self) -> str:
        """Hash of ids, titles, popularity and attributes, 12 hexadecimal digits."""
        return self.catalog.version

    @cached_property
    def filters(self) -> Filters:
        """What requests may filter by."""
        return Filters(self.catalog)

    @cached_property
    def deepest(self) -> int:
        """Most tokens a search appends to a prompt."""
        return int(self.trie.depth.max())

    @cached_property
    def popular(self) -> np.ndarray:
        """Catalogue rows, most popular first, then by item id: int64 `[items]`."""
        return np.argsort(self.trie.item_order, kind="stable")

    @cached_property
    def log_share(self) -> np.ndarray:
        """Log share of the training interactions, one added to every count: float64 `[items]`."""
        counts = self.catalog.popularity.astype(np.float64) + 1.0
        return np.log(counts / counts.sum())

    @cached_property
    def probe(self) -> SearchRequest:
        """The service's own request: what follows the most popular item, or the end of a long title, as a
        prompt as long as the deepest search finds room."""
        return SearchRequest(prompt=self.prompter.encode(self.popular[:1].tolist())[-self.deepest :])

    def page(self, search: str, offset: int, limit: int) -> CatalogPage:
        """Return the items whose title holds `search`, most popular first."""
        rows = self.popular
        if search:
            found = pc.match_substring(_folded(self.catalog.titles.array), search.casefold())
            rows = rows[found.to_numpy(zero_copy_only=False)[rows]]
        items = [
            CatalogItem(
                item_id=self.catalog.item_ids[row],
                title=self.catalog.titles[row],
                popularity=int(self.catalog.popularity[row]),
            )
            for row in rows[offset : offset + limit].tolist()
        ]
        return CatalogPage(catalog_version=self.version, total=len(rows), items=items)


def _folded(titles: pa.LargeStringArray) -> pa.LargeStringArray:
    """Return the titles case-folded; not kept, as it takes a tenth of a second for a million."""
    others = pc.invert(pc.string_is_ascii(titles))
    folded = [title.casefold() for title in titles.filter(others).to_pylist()]
    return pc.replace_with_mask(pc.ascii_lower(titles), others, pa.array(folded, pa.large_string()))


def parse_catalog(body: bytes, media_type: str) -> Catalog:
    """Return the catalogue in a request's body: JSON rows, or Parquet.

    Raises:
        LeanRecError: neither, or content that is not a catalogue.
    """
    if media_type == "application/json":
        try:
            rows = TypeAdapter(list[CatalogRow]).validate_json(body, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise LeanRecError(f"catalogue: {where + ': ' if where else ''}{first['msg']}") from error
        _check_size(len(rows))
        counts = np.array([row.popularity for row in rows], np.int64)
        item_ids, titles = [row.item_id for row in rows], [row.title for row in rows]
        return make_catalog(item_ids, titles, counts, "catalogue", _attributes(rows))
    return read_parquet_catalog(io.BytesIO(body), "catalogue", MAX_CATALOG_ITEMS)


def _attributes(rows: list[CatalogRow]) -> dict[str, pa.ChunkedArray]:
    """Return what rows of JSON hold besides, as columns; a row may leave out what it does not know."""
    names = dict.fromkeys(name for row in rows for name in row.model_extra or {})
    columns = {}
    for name in names:
        try:
            columns[name] = pa.chunked_array([pa.array([(row.model_extra or {}).get(name) for row in rows])])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise LeanRecError(
                f"catalogue: the attribute {name} mixes types ({str(error).splitlines()[0]})"
            ) from error
    return columns


def _check_size(items: int) -> None:
    if items > MAX_CATALOG_ITEMS:
        raise LeanRecError(f"catalogue: {items} items; the service takes {MAX_CATALOG_ITEMS}")
