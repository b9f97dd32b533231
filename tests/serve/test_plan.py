"""`serve --plan`: sums of what the files say, nothing imported, and true of a service that runs."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from models.catalog import make_catalog, read_catalog, write_catalog
from models.checkpoint import Recommender
from models.errors import LeanRecError, UsageError
from models.families import Shape
from models.index import INDEX
from serve.plan import ITEM_BYTES, plan_memory


@pytest.fixture
def directory(recommender: Recommender, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recommender.directory, tmp_path / "copy"))


def test_weights_and_cache_are_what_the_shape_gives(recommender: Recommender) -> None:
    cache = ["--kv-cache-memory-bytes", "1000000"]
    half, full = (
        plan_memory(recommender.directory, [*cache, "--dtype", dtype, "--max-num-seqs", "4"])
        for dtype in ("bfloat16", "float32")
    )
    parameters = (recommender.directory / "model.safetensors").stat().st_size / 4
    assert full.weights - half.weights == pytest.approx(2 * parameters, rel=0.02)
    shape = Shape.of(recommender.config)
    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    assert full.kv_cache == half.kv_cache == 1_000_000
    assert full.kv_tokens == 1_000_000 // (32 * token) * 32
    assert half.kv_tokens == pytest.approx(2 * full.kv_tokens, abs=32)
    assert full.items == len(recommender.catalog)
    assert full.total == sum(
        (full.weights, full.kv_cache, full.index, full.catalog, full.engine, full.libraries)
    )


def test_histories_are_counted_in_whole_blocks(recommender: Recommender) -> None:
    lengths = recommender.prompter.title_tokens.lengths
    longest = recommender.prompt.max_history * lengths.mean()
    plan = plan_memory(recommender.directory, ["--block-size", "64"])
    assert plan.history_tokens % 64 == 0
    assert 0 <= plan.history_tokens - longest < 64 + recommender.prompt.max_history
    short = plan_memory(recommender.directory, ["--block-size", "8", "--max-model-len", "9"])
    assert short.history_tokens == 16


def test_an_index_that_is_not_there_is_guessed(directory: Path) -> None:
    there = plan_memory(directory, [])
    assert there.has_index
    assert there.index == (directory / INDEX).stat().st_size
    (directory / INDEX).write_bytes(b"not an index")
    guessed = plan_memory(directory, [])
    assert not guessed.has_index
    assert "not built yet" in guessed.as_text()
    assert 0.2 * there.index < guessed.index < 5 * there.index


def test_another_catalogue(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.parquet"
    write_catalog(file, make_catalog([str(n) for n in range(5000)], ["Same title"] * 5000, None, "test"))
    plan = plan_memory(directory, [], file)
    assert plan.items == 5000
    assert plan.catalog == 5000 * ITEM_BYTES
    column = pa.chunked_array([[f"publisher {n}" for n in range(5000)]])
    write_catalog(file, replace(read_catalog(file), attributes={"publisher": column}))
    assert plan_memory(directory, [], file).catalog == 5000 * ITEM_BYTES + column.nbytes


def test_replicas_share_what_is_mapped(directory: Path) -> None:
    def last_row(replicas: int) -> str:
        return plan_memory(directory, [], replicas=replicas).as_text().splitlines()[-1]

    plan = plan_memory(directory, [])
    assert last_row(1).startswith("sum")
    each = plan.total - plan.index - plan.libraries
    assert last_row(3).startswith("3 replicas")
    assert f"{(3 * each + plan.index + plan.libraries) / 1e6:,.1f} MB" in last_row(3)


def test_it_imports_nothing_heavy(recommender: Recommender) -> None:
    code = (
        f"import sys, serve.cli\n"
        f"code = serve.cli.main(['--model', {str(recommender.directory)!r}, '--plan'])\n"
        "print(code, [n for n in ('torch', 'vllm', 'transformers', 'fastapi') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *table, last = done.stdout.splitlines()
    assert last == "0 []"
    assert [line.split("  ")[0] for line in table] == [
        "weights",
        "KV cache",
        "catalogue index",
        "catalogue",
        "engine",
        "libraries",
        "sum",
    ]


def test_what_cannot_be_read_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--kv-cache-memory-bytes"):
        plan_memory(directory, ["--kv-cache-memory-bytes", "much"])
    with pytest.raises(LeanRecError, match="no such directory"):
        plan_memory(tmp_path / "none", [])
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text("{}")
    with pytest.raises(LeanRecError, match=r"config\.json"):
        plan_memory(directory, [])
    (directory / "config.json").write_text(config)
    shutil.copy(directory / "recommender.json", directory / "catalog.parquet")
    with pytest.raises(LeanRecError, match=r"catalog\.parquet"):
        plan_memory(directory, [])


@pytest.mark.slow
@pytest.mark.vllm
def test_it_is_true(recommender: Recommender) -> None:
    """Resident memory of a process that has the engine and the catalogue ready."""
    arguments = ["--kv-cache-memory-bytes", str(200 * 2**20)]
    code = (
        "import sys, os, psutil, pathlib, serve.app\n"
        "from serve.loading import load_in_vllm\n"
        "from serve.shelf import Shelf\n"
        f"loaded = load_in_vllm(pathlib.Path({str(recommender.directory)!r}), {arguments!r})\n"
        "Shelf.of(loaded.recommender).fill()\n"
        "print(psutil.Process().memory_info().rss, flush=True)\n"
        "os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    resident = int(done.stdout.splitlines()[-1])
    assert plan_memory(recommender.directory, arguments).total == pytest.approx(resident, rel=0.15)
