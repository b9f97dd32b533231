"""A recommender directory is written whole, reads back, and says what is wrong when damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.atomic import new_directory, write_text
from models.checkpoint import load_model, read_recommender, write_recommender
from models.errors import LeanRecError
from tests.tiny import FAMILIES, make_tiny_recommender


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "full"
    make_tiny_recommender(directory, num_layers=1)
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_back_equal(tmp_path: Path, family: str) -> None:
    make_tiny_recommender(tmp_path / "full", family, num_layers=2)
    recommender = read_recommender(tmp_path / "full")
    model = load_model(recommender)
    ids = torch.tensor([[1, 5, 9, 30]])
    write_recommender(
        tmp_path / "again",
        model=model,
        tokenizer=recommender.tokenizer,
        catalog=recommender.catalog,
        prompt=recommender.prompt,
        training=recommender.training,
    )
    again = load_model(read_recommender(tmp_path / "again"))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert "_name_or_path" not in config


def test_a_directory_in_use_is_not_overwritten(copy: Path) -> None:
    before = sorted(copy.iterdir())
    with pytest.raises(LeanRecError, match="already exists"), new_directory(copy):
        pass
    assert sorted(copy.iterdir()) == before


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), new_directory(tmp_path / "out") as directory:
        write_text(directory / "half", "written")
        raise RuntimeError("in the middle")
    assert list(tmp_path.iterdir()) == []


def damage(directory: Path, what: str) -> None:
    weights, description = directory / "model.safetensors", directory / "recommender.json"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "not safetensors":
        weights.write_bytes(b"PK\x03\x04 a pickle in a zip" * 20)
    elif what == "pickle":
        weights.rename(directory / "pytorch_model.bin")
    elif what == "nan":
        tensors = load_file(weights)
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
    elif what == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif what == "catalogue":
        path = directory / "catalog.parquet"
        path.write_bytes(path.read_bytes() + b"x")
    elif what == "no tokenizer":
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer_config.json").unlink()
    elif what == "config":
        (directory / "config.json").write_text("{")
    elif what == "description":
        description.write_text("{")
    elif what == "deep description":
        description.write_text("[" * 100_000)
    elif what == "format":
        description.write_text(description.read_text().replace('"format": 1', '"format": 9'))
    elif what == "prompt":
        described = json.loads(description.read_text())
        described["prompt"]["max_history"] = "many"
        description.write_text(json.dumps(described))
    elif what == "path":
        described = json.loads(description.read_text())
        described["catalog"]["file"] = "../../etc/passwd"
        description.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "the copy is incomplete"),
        ("not safetensors", "not a safetensors file"),
        ("pickle", "is a pickle and is not read"),
        ("nan", r"model\.norm\.weight holds values that are not finite"),
        ("missing tensor", r"model\.norm\.weight is missing"),
        ("catalogue", "does not match the checksum"),
        ("no tokenizer", "has no tokenizer"),
        ("config", r"config\.json: cannot be read"),
        ("description", "not valid JSON"),
        ("deep description", "not valid JSON"),
        ("format", "format is 9; this version reads 1"),
        ("prompt", "max_history must be of type int"),
        ("path", "passwd: no such catalogue"),
    ],
)
def test_damage_is_named(copy: Path, what: str, message: str) -> None:
    damage(copy, what)
    with pytest.raises(LeanRecError, match=message):
        load_model(read_recommender(copy))


def test_a_plain_folder_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(LeanRecError, match=r"has no recommender\.json"):
        read_recommender(tmp_path)
    with pytest.raises(LeanRecError, match="no such directory"):
        read_recommender(tmp_path / "absent")
