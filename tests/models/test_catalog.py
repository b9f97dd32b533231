"""The catalogue: what it refuses, what it keeps."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from models.catalog import make_catalog, read_catalog, write_catalog
from models.errors import LeanRecError
from models.prompt import PromptConfig, Prompter

ATTRIBUTES = {
    "category": pa.chunked_array([["film", None, "book"]]).dictionary_encode(),
    "year": pa.chunked_array([pa.array([1995, 2001, None], pa.int16())]),
    "price": pa.chunked_array([pa.array([1.5, None, 0.25], pa.float32())]),
    "in_stock": pa.chunked_array([[True, False, None]]),
    "genres": pa.chunked_array([[["war", "drama"], [], None]]),
    "unknown": pa.chunked_array([pa.nulls(3)]),
}


def test_attributes_survive_a_file(tmp_path: Path) -> None:
    catalog = make_catalog(["a", "b", "c"], ["One", "Two", "Three"], None, "here", ATTRIBUTES)
    write_catalog(tmp_path / "catalog.parquet", catalog)
    read = read_catalog(tmp_path / "catalog.parquet")
    types = {name: str(column.type).replace("element", "item") for name, column in read.attributes.items()}
    assert types == {
        "category": "string",
        "year": "int64",
        "price": "double",
        "in_stock": "bool",
        "genres": "list<item: string>",
        "unknown": "string",
    }
    for name, column in ATTRIBUTES.items():
        assert read.attributes[name].to_pylist() == column.to_pylist()


def test_an_attribute_of_no_use_is_named(tmp_path: Path) -> None:
    path = tmp_path / "catalog.parquet"
    when = pa.array(np.array(["2020-01-01"], "datetime64[s]"))
    pq.write_table(pa.table({"item_id": ["a"], "title": ["One"], "released": when}), path)
    with pytest.raises(LeanRecError, match=r"released is of type timestamp"):
        read_catalog(path)
    huge = pa.chunked_array([pa.array([2**63], pa.uint64())])
    with pytest.raises(LeanRecError, match="huge cannot be read as int64"):
        make_catalog(["a"], ["One"], None, "here", {"huge": huge})


def test_titles_that_tokenise_to_nothing_are_named() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "\n": 1, "Alien": 2, "the": 3}))
    words.pre_tokenizer = Split(Regex(r"\n|\w+"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    known = Prompter(tokenizer, PromptConfig(), ["the Alien", "Alien"])
    assert list(known.title_tokens) == [[3, 2, 1], [2, 1]]
    unknown = Prompter(tokenizer, PromptConfig(), ["Alien", "★ ★", "¡!"])
    with pytest.raises(
        LeanRecError, match=r"2 titles have no tokens in this tokenizer \(first: '★ ★', '¡!'\)"
    ):
        _ = unknown.title_tokens
