"""The JSON of the service. Requests are strict: no coercion, no unknown keys, everything bounded."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic.config import JsonDict

MAX_HISTORY = 10_000
MAX_CANDIDATES = 100_000
MAX_K = 100
MAX_FILTERS = 32
MAX_FILTER_VALUES = 1000
MAX_CATALOG_ITEMS = 2_000_000

ItemId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Title = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


AttributeKind = Literal["text", "integer", "number", "boolean", "texts"]
Number = Annotated[int, Field(ge=-(2**63), lt=2**63)] | Annotated[float, Field(allow_inf_nan=False)]


class AttributeRange(BaseModel):
    """A range of an attribute's values, both ends included."""

    model_config = ConfigDict(strict=True, extra="forbid")

    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _some_range(self) -> "AttributeRange":
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        return self


AttributeValues = Annotated[
    list[Annotated[str, StringConstraints(max_length=1024)] | bool | Number],
    Field(min_length=1, max_length=MAX_FILTER_VALUES, fail_fast=True),
]


def _condition_kind(value: object) -> str:
    return "values" if isinstance(value, list) else "range"


# Told apart by their JSON type, so that an error speaks of the one that was meant.
AttributeCondition = Annotated[
    Annotated[AttributeValues, Tag("values")] | Annotated[AttributeRange, Tag("range")],
    Discriminator(_condition_kind),
]


def _one_of(given: str, other: str) -> JsonDict:
    """Return the JSON schema of a request with one of two fields."""
    return {
        "required": [given],
        "properties": {given: {"type": "array"}, other: {"type": "null"}},
    }


class RecommendRequest(BaseModel):
    """A history and what is wanted after it."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        cache_strings="keys",  # the cache of values made long lists of ids three times slower to read
        json_schema_extra={
            "examples": [{"history": ["50", "181"], "k": 10}],
            "oneOf": [_one_of("history", "history_titles"), _one_of("history_titles", "history")],
        },
    )

    history: list[ItemId] | None = Field(
        None,
        max_length=MAX_HISTORY,
        fail_fast=True,
        description="Item ids, oldest first. The newest that fit the prompt are read. "
        "Unknown ones are skipped and told in `unknown_items`; if none is known, the answer is the cold "
        "start: the most popular items.",
    )
    history_titles: list[Title] | None = Field(
        None, max_length=MAX_HISTORY, fail_fast=True, description="Titles in place of ids, oldest first."
    )
    k: int = Field(10, ge=1, le=MAX_K, description="How many items are wanted.")
    exclude_history: bool = Field(True, description="Leave out the items of the history.")
    exclude: list[ItemId] = Field(
        default_factory=list,
        max_length=MAX_HISTORY,
        fail_fast=True,
        description="Further item ids to leave out.",
    )
    candidates: list[ItemId] | None = Field(
        None,
        min_length=1,
        max_length=MAX_CANDIDATES,
        fail_fast=True,
        description="The only item ids that may be recommended; unknown ones are told in `unknown_items`.",
    )
    filters: dict[Annotated[str, StringConstraints(max_length=256)], AttributeCondition] | None = Field(
        None,
        max_length=MAX_FILTERS,
        description="Conditions on attributes of the catalogue, all of which an item must meet: a list of "
        "values, one of which it must have, or a range of numbers, as "
        '`{"category": ["A", "B"], "year": {"min": 1990, "max": 1999}}`. GET /model tells the attributes.',
    )
    user_id: str | None = Field(
        None, max_length=256, description="Accepted for the caller's own use; not read."
    )

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: object) -> object:
        if isinstance(given, dict) and len(given) > 2 * len(cls.model_fields):
            raise ValueError(f"has {len(given)} fields; the schema knows {len(cls.model_fields)}")
        return given

    @model_validator(mode="after")
    def _one_history(self) -> "RecommendRequest":
        if (self.history is None) == (self.history_titles is None):
            raise ValueError("give exactly one of history and history_titles; an empty list is a cold start")
        return self


class RecommendedItem(BaseModel):
    """One item of the answer."""

    rank: int
    item_id: str
    title: str
    score: float = Field(
        description="Natural logarithm of the title's probability, renormalised over the catalogue; in a "
        "cold start, of the item's share of the training interactions (one added to every count)."
    )
    probability: float = Field(
        description="That this item comes next: exp(score), shared equally among the items of one title. "
        "Over the catalogue it adds up to 1, whatever was left out."
    )


class StageTimings(BaseModel):
    """Milliseconds. Prefill and search are those of the whole batch the request was answered in."""

    queue: float
    prefill: float
    search: float
    total: float


class RecommendResponse(BaseModel):
    """The best items, best first."""

    items: list[RecommendedItem]
    exact: bool = Field(description="Whether this is provably the top k under the score.")
    cold_start: bool = Field(description="Whether no history item was known: the most popular items.")
    unknown_items: list[str] = Field(
        description="What the request's history and candidates name and the catalogue lacks."
    )
    model: str
    catalog_version: str
    timings_ms: StageTimings


class Parameters(BaseModel):
    total: int
    embedding: int = Field(description="Embedding and language-model head.")
    non_embedding: int


class ModelShape(BaseModel):
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


class ModelSummary(BaseModel):
    """What a caller needs to know of what is served."""

    name: str
    max_history: int
    catalog_version: str
    attributes: dict[str, AttributeKind] = Field(
        description="What `filters` may name: the catalogue's attributes and their types; `texts` is a list "
        "of texts, any of which may match."
    )


class ModelInfo(ModelSummary):
    """What is served, with its details: told to the administrator, and to all where no secret is set."""

    architecture: str
    shape: ModelShape
    parameters: Parameters
    weights_bytes: int = Field(description="All parameters in the precision they are served in.")
    kv_cache_bytes: int = Field(description="Reserved for the KV cache.")
    dtype: str
    engine: Literal["worker", "pooling", "transformers"]
    vllm: str | None
    leanrec: str


class CatalogItem(BaseModel):
    item_id: str
    title: str
    popularity: int


class CatalogPage(BaseModel):
    """Part of the catalogue, most popular first."""

    catalog_version: str
    total: int = Field(description="Items that match, all of them where nothing is searched for.")
    items: list[CatalogItem]


class CatalogRow(BaseModel):
    """One item of a new catalogue. Every further key is an attribute."""

    model_config = ConfigDict(strict=True, extra="allow", cache_strings="keys")
    __pydantic_extra__: dict[str, str | bool | Number | list[str] | None]

    item_id: ItemId
    title: Title
    popularity: int = Field(0, ge=0, le=2**53)


class CatalogSummary(BaseModel):
    """The catalogue that is served from now on."""

    catalog_version: str
    items: int
    distinct_titles: int


class Health(BaseModel):
    status: Literal["live", "ready"]


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[dict[str, str]] | None = Field(None, description="What is wrong, field by field (422).")
