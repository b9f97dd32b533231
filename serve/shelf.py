"""One version of the catalogue with all that is derived from it; a swap replaces it whole."""

import io
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.catalog import Catalog, read_parquet_catalog
from models.search import SearchRequest
from serve.apart import Apart
from serve.filters import Filters
from serve.json_rows import parquet_of
from serve.schemas import MAX_CATALOG_ITEMS, CatalogItem, CatalogPage

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
        _ = self.version, self.trie.deepest, self.popular, self.log_share
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
        return SearchRequest(prompt=self.prompter.encode(self.popular[:1].tolist())[-self.trie.deepest :])

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


def parse_catalog(body: bytes, media_type: str, apart: Apart) -> Catalog:
    """Return the catalogue in a request's body: JSON rows, or Parquet.

    Raises:
        LeanRecError: neither, or content that is not a catalogue.
        OSError: there is no room for a process that reads it.
        ServiceProblem: 503, the service ends.
    """
    if media_type == "application/json":
        body = parquet_of(body, apart)
    return read_parquet_catalog(io.BytesIO(body), "catalogue", MAX_CATALOG_ITEMS)
