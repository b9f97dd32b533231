"""The command: its arguments, its plan, and what it says to bad input; a refusal leaves nothing behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import inputs
from compress.cli import main
from models.checkpoint import read_recommender
from models.data import load_data
from models.errors import run_command
from tests.tiny import make_tiny_recommender, write_tiny_data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli") / "full"
    make_tiny_recommender(directory)
    return directory


@pytest.fixture
def full(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "full"))


def run(capsys, *arguments):
    """Return exit code, stdout and stderr of the command, as the console script runs it."""
    try:
        code = run_command(lambda: main([str(argument) for argument in arguments]))
    except SystemExit as exit_:  # argparse
        code = exit_.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_help_is_instant_and_says_what_a_target_is():
    script = (
        "import sys; from compress.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules), 'help must not wait for torch'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5%, 0.05, or a count such as 20M" in " ".join(done.stdout.split())


def test_plan_prints_shapes_counts_and_cost_and_writes_nothing(capsys, full, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(capsys, "--target", "20%", "--model", full, "--out", tmp_path / "out", "--plan")
    assert code == 0
    assert "3 depth" in out
    assert "cost: the full model reads" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_data_in_another_order_is_numbered_as_the_model_is(made, tmp_path):
    catalog = read_recommender(made).catalog
    data = load_data(str(made.parent / "tiny-data"))
    other = Path(shutil.copytree(made.parent / "tiny-data", tmp_path / "data"))
    items = pq.read_table(other / "items.parquet")
    pq.write_table(items.take(list(range(len(items)))[::-1]), other / "items.parquet")
    shuffled = load_data(str(other))
    assert shuffled.catalog.item_ids != catalog.item_ids
    found, wanted = inputs.aligned(shuffled, catalog), inputs.aligned(data, catalog)
    for ours, theirs in zip(
        (found.train, found.valid.histories, found.test.histories),
        (wanted.train, wanted.valid.histories, wanted.test.histories),
        strict=True,
    ):
        assert ours.items.tolist() == theirs.items.tolist()
    assert found.test.targets.tolist() == wanted.test.targets.tolist()
    assert found.valid.targets.tolist() == wanted.valid.targets.tolist()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--target", "abc"), 2, "not a size"),
        (("--target", "5%", "--layout", "per-layer", "--recipe", "random"), 2, "goes with --recipe leanrec"),
        (("--target", "5%", "--out", "/proc"), 1, "--out /proc: is a mounted volume"),
    ],
)
def test_what_will_not_do_is_told_before_the_demonstration_model_is_trained(
    *, capsys, tmp_path, monkeypatch, arguments, code, said
):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(capsys, *arguments)
    assert (found, said in err) == (code, True), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("0%", "keeps nothing"),
        ("150%", "removes nothing"),
        ("abc", "not a size"),
        ("0.001%", "the smallest this model can reach is"),
        ("20M", "removes nothing"),
    ],
)
def test_targets_that_cannot_be_met_are_usage_errors(capsys, full, tmp_path, target, said):
    code, out, err = run(capsys, "--target", target, "--model", full, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "5%", "--restore-tokens", "0"], "--restore-tokens 0"),
        (["--target", "5%", "--seed", "-1"], "--seed -1"),
        (["--target", "5%", "--recipe", "magic"], "invalid choice"),
        (["--target", "5%", "--model", "no/such/place"], "not a hub id"),
        (["--target", "5%", "--data", "no-such-data"], "no-such-data"),
        ([], "--target"),
    ],
)
def test_arguments_that_make_no_sense_are_usage_errors(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_out_of_reach_is_an_error_that_names_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = run(capsys, "--target", "5%", "--model", "nobody/nothing")
    assert code == 1
    assert "--model nobody/nothing: no such directory, and fetching it from the hub failed" in err


def another_family(full):
    config = json.loads((full / "config.json").read_text())
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (full / "config.json").write_text(json.dumps(config))


def truncated(full):
    weights = (full / "model.safetensors").read_bytes()
    (full / "model.safetensors").write_bytes(weights[:-1000])


def pickled(full):
    (full / "model.safetensors").unlink()
    (full / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def not_safetensors(full):
    (full / "model.safetensors").write_bytes(b"PK\x03\x04" * 100)


def other_catalogue(full):
    described = json.loads((full / "recommender.json").read_text())
    described["catalog"]["sha256"] = "0" * 64
    (full / "recommender.json").write_text(json.dumps(described))


def with_nan(full):
    tensors = load_file(full / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, full / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(full):
    for path in full.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (another_family, "GPT2LMHeadModel is not supported"),
        (truncated, "incomplete or damaged"),
        (pickled, "is a pickle and is not read"),
        (not_safetensors, "not a safetensors file"),
        (other_catalogue, "does not match the checksum"),
        (with_nan, "not finite"),
        (without_tokenizer, "has no tokenizer"),
    ],
)
def test_a_damaged_model_is_refused_before_any_work(capsys, full, tmp_path, damage, said):
    damage(full)
    code, _, err = run(
        capsys, "--target", "30%", "--model", full, "--out", tmp_path / "out", "--device", "cpu"
    )
    assert code == 1
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_data_with_other_items_than_the_catalogue_is_refused(capsys, full, tmp_path):
    data = write_tiny_data(tmp_path / "more", items=90)
    code, _, err = run(capsys, "--target", "30%", "--model", full, "--data", data, "--plan")
    assert code == 1
    assert "10 of its items are not in the model's catalogue" in err


def test_an_output_that_cannot_be_written_is_an_error(capsys, full, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = run(capsys, "--target", "30%", "--model", full, "--out", tmp_path / "file" / "out")
    assert code == 1
    assert "--out" in err
    assert "cannot be written" in err


@pytest.mark.parametrize(
    ("target", "name"),
    [("5%", "pruned-5"), ("0.05", "pruned-5"), ("2.5%", "pruned-2.5"), ("20M", "pruned-20M")],
)
def test_the_default_output_is_named_after_data_and_target(target, name):
    assert inputs.default_out(None, target) == Path("runs/ml-100k") / name
    assert inputs.default_out("some/where/games", target) == Path("runs/games") / name
