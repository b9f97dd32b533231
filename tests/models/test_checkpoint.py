"""A recommender directory is written whole, reads back, and says what is wrong when damaged."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
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


def test_a_generation_config_that_transformers_would_not_write_is_reduced(copy: Path, tmp_path: Path) -> None:
    described = {
        "temperature": 0.6,
        "top_p": 0.9,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": -1,
    }
    write_text(copy / "generation_config.json", json.dumps(described))
    model = load_model(read_recommender(copy))
    model.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [2, 3]
    assert not {"temperature", "top_p", "pad_token_id"} & set(kept)


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
    def write() -> None:
        with new_directory(tmp_path / "out") as directory:
            write_text(directory / "half", "written")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write()
    assert list(tmp_path.iterdir()) == []


def cut_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip" * 20)


def only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def nan_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def tensor_left_out(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def other_catalogue(directory: Path) -> None:
    path = directory / "catalog.parquet"
    path.write_bytes(path.read_bytes() + b"x")


def no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()


def description(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "recommender.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(content) and None


def shards(name: object) -> Callable[[Path], None]:
    return text("model.safetensors.index.json", json.dumps({"weight_map": {"a": name}}))


def tokenizer_setting(key: str, value: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "the copy is incomplete"),
        (not_safetensors, "not a safetensors file"),
        (only_a_pickle, "is a pickle and is not read"),
        (nan_weight, r"model\.norm\.weight holds values that are not finite"),
        (tensor_left_out, r"model\.norm\.weight is missing"),
        (other_catalogue, "does not match the checksum"),
        (no_tokenizer, "has no tokenizer"),
        (text("config.json", "{"), r"config\.json: cannot be read"),
        (text("recommender.json", "{"), "not valid JSON"),
        (text("recommender.json", "[" * 100_000), "not valid JSON"),
        (description(format=9), "format is 9; this version reads 1"),
        (description(prompt={"max_history": "many"}), "max_history must be of type int"),
        (description(catalog={"file": "../../etc/passwd", "sha256": ""}), "not the name of a file beside it"),
        (description(catalog={"file": "..", "sha256": ""}), "not the name of a file beside it"),
        (description(catalog={"file": ".", "sha256": ""}), "not the name of a file beside it"),
        (description(catalog={"file": "", "sha256": ""}), "not the name of a file beside it"),
        (description(catalog={"file": "/etc/passwd", "sha256": ""}), "not the name of a file beside it"),
        (description(catalog={"file": ["x"], "sha256": ""}), "not the name of a file beside it"),
        (description(catalog={"file": "a\x00b", "sha256": ""}), "not the name of a file beside it"),
        (shards("../model.safetensors"), "not the name of a file beside it"),
        (shards("/etc/hostname"), "not the name of a file beside it"),
        (shards("model.safetensors/../model.safetensors"), "not the name of a file beside it"),
        (shards(5), "not a valid safetensors index|not the name of a file"),
        (text("model.safetensors.index.json", "[" * 100_000), "not a valid safetensors index"),
        (tokenizer_setting("vocab_file", "../vocab.json"), "not the name of a file beside it"),
        (tokenizer_setting("tokenizer_file", "/etc/hostname"), "not the name of a file beside it"),
        (tokenizer_setting("fast_tokenizer_files", ["../tokenizer.1.json"]), "not the name of a file"),
        (text("tokenizer_config.json", "[" * 100_000), "not valid JSON"),
        (text("adapter_config.json", '{"base_model_name_or_path": "/x"}'), "adapters are not read"),
    ],
)
def test_damage_is_named(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(LeanRecError, match=message):
        load_model(read_recommender(copy))


def test_where_a_tokenizer_was_made_does_not_matter(copy: Path) -> None:
    tokenizer_setting("special_tokens_map_file", "/home/x/special_tokens_map.json")(copy)
    assert len(read_recommender(copy).catalog) > 0


def test_a_pickle_runs_nothing(copy: Path, tmp_path: Path) -> None:
    """Under the names that others load pickles by, beside sound weights and in their place."""
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    names = ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt")
    for name in names:
        (copy / name).write_bytes(payload)
    load_model(read_recommender(copy))
    (copy / "model.safetensors").write_bytes(payload * 50)
    with pytest.raises(LeanRecError, match="not a safetensors file"):
        read_recommender(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(LeanRecError, match="is a pickle and is not read"):
        read_recommender(copy)
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload)
    assert (tmp_path / "ran").exists()  # it would have


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_others_may_read_what_the_umask_lets_them(made: Path) -> None:
    # A container's user reads a model that another user wrote.
    umask = os.umask(0o022)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o666 & ~umask}
    assert made.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_plain_folder_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(LeanRecError, match=r"has no recommender\.json"):
        read_recommender(tmp_path)
    with pytest.raises(LeanRecError, match="no such directory"):
        read_recommender(tmp_path / "absent")
