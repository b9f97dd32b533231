"""What this machine multiplies fastest, read from the kernel's words about it."""

from pathlib import Path

import pytest
import torch

from models import precision
from models.checkpoint import read_recommender
from models.precision import prefers_bf16, served_dtype
from models.vllm_model import engine_choices
from serve.plan import plan_memory
from tests.tiny import make_tiny_recommender


@pytest.fixture(params=[True, False], ids=["bf16 products", "none"])
def has_bf16(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    facts = tmp_path / "cpuinfo"
    more = " avx512_bf16 amx_bf16" if request.param else " avx512_bf16_not"
    facts.write_text(
        f"processor\t: 0\nmodel name\t: avx512_bf16\nflags\t\t: fpu avx2{more}\n\nprocessor\t: 1\n"
    )
    monkeypatch.setattr(precision, "CPU_FACTS", facts)
    return bool(request.param)


def test_it_is_what_pytorch_found() -> None:
    assert prefers_bf16("cpu") == bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


@pytest.mark.vllm
def test_a_model_is_served_in_what_the_cpu_multiplies(has_bf16: bool, tmp_path: Path) -> None:
    make_tiny_recommender(tmp_path / "model")
    recommender = read_recommender(tmp_path / "model")
    wanted, other = ("bfloat16", "float32") if has_bf16 else ("float32", "bfloat16")
    assert prefers_bf16("cpu") == has_bf16
    assert served_dtype("cpu") == engine_choices(recommender)["dtype"] == wanted
    assert served_dtype("cuda") == "bfloat16"
    plan = plan_memory(recommender.directory, [])
    assert plan == plan_memory(recommender.directory, ["--dtype", wanted])
    assert plan != plan_memory(recommender.directory, ["--dtype", other])
