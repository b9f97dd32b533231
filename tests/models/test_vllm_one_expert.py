"""An MLP as a mixture of one expert: what its formula gives, and no trace of the rows beside a row."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from compress.quantize import quantize_weight
from models import vllm_one_expert
from models.vllm_model import import_vllm
from models.vllm_one_expert import FloatExpert, Int8Expert, Int8Matrix
from models.vllm_products import Int8Products

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX"),
]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    import_vllm()
    from vllm.platforms import current_platform

    current_platform.import_kernels()


def matrices(hidden: int, inner: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    gate, up = (torch.randn(inner, hidden) / hidden**0.5 for _ in range(2))
    return [matrix.bfloat16() for matrix in (gate, up, torch.randn(hidden, inner) / inner**0.5)]


def formula(hidden: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    hidden, gate, up, down = (tensor.float() for tensor in (hidden, gate, up, down))
    return (F.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


# 600 is no multiple of the kernels' blocks.
@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (256, 600), (448, 1280)])
def test_it_is_the_mlp(hidden: int, inner: int) -> None:
    made = matrices(hidden, inner)
    expert = FloatExpert.of(made, 600)
    assert expert is not None
    for rows in (1, 7, 40, 600):
        inputs = torch.randn(rows, hidden).bfloat16()
        assert error(expert(inputs), formula(inputs, *made)) < 5e-3


@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (256, 528)])
def test_int8_is_the_mlp_of_the_rounded_matrices(hidden: int, inner: int) -> None:
    rounded = [Int8Matrix(*quantize_weight(matrix)) for matrix in matrices(hidden, inner)]
    expert = Int8Expert.of(rounded)
    assert expert is not None
    whole = [matrix.weight.float() * matrix.scale.float() for matrix in rounded]
    inputs = torch.randn(600, hidden).bfloat16()
    outputs = expert(inputs)
    # Activations rounded to 8 bits make two hundredths.
    assert error(outputs, formula(inputs, *whole)) < 0.03
    for rows in (1, 7, 40):
        assert torch.equal(expert(inputs[:rows]), outputs[:rows])


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    expert = FloatExpert.of(matrices(448, 1280), 600)
    assert expert is not None
    inputs = torch.randn(600, 448).bfloat16()
    outputs = expert(inputs)
    for begin, end in ((0, 1), (599, 600), (17, 50), (100, 431)):
        assert torch.equal(expert(inputs[begin:end]), outputs[begin:end])


def test_another_order_of_summation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = FloatExpert.__call__

    def in_parts(expert: FloatExpert, hidden: torch.Tensor) -> torch.Tensor:
        """Large products summed over half of the inner units, then the other half."""
        if len(hidden) <= 64:
            return real(expert, hidden)
        first, second = expert.down.clone(), expert.down.clone()
        half = expert.down.shape[-1] // 2
        first[..., half:], second[..., :half] = 0, 0
        parts = (FloatExpert(expert.gate_up, down) for down in (first, second))
        return sum(real(part, hidden).float() for part in parts).bfloat16()  # type: ignore[union-attr]

    vllm_one_expert._is_steady.cache_clear()
    assert vllm_one_expert._is_steady(128, 256, 128)
    vllm_one_expert._is_steady.cache_clear()
    monkeypatch.setattr(FloatExpert, "__call__", in_parts)
    assert FloatExpert.of(matrices(128, 256), 128) is None
    vllm_one_expert._is_steady.cache_clear()


@pytest.mark.parametrize(
    ("symmetric", "static", "scales", "is_in_one"),
    [(True, False, 96, True), (False, False, 96, False), (True, True, 96, False), (True, False, 1, False)],
)
def test_int8_that_rounds_otherwise_stays_with_vllm(
    symmetric: bool, static: bool, scales: int, is_in_one: bool
) -> None:
    scheme = SimpleNamespace(input_symmetric=symmetric, is_static_input_scheme=static)
    linear = SimpleNamespace(scheme=scheme)
    tensors = {}
    for name, matrix in zip(("gate", "up", "down"), matrices(96, 96), strict=True):
        weight, scale = quantize_weight(matrix)
        tensors |= {f"model.layers.7.mlp.{name}_proj.weight": weight}
        tensors |= {f"model.layers.7.mlp.{name}_proj.weight_scale": scale[:scales]}
    layer = SimpleNamespace(mlp=SimpleNamespace(gate_up_proj=linear, down_proj=linear))
    assert (Int8Products(layer, 7, tensors.get)._expert is not None) == is_in_one


def test_what_no_kernel_takes_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FloatExpert.of([matrix.float() for matrix in matrices(64, 96)], 8) is None
    assert FloatExpert.of(matrices(72, 96), 8) is None
    monkeypatch.setattr(vllm_one_expert, "has_tiles", lambda: False)
    assert FloatExpert.of(matrices(64, 96), 8) is None
    assert Int8Expert.of([Int8Matrix(*quantize_weight(matrix)) for matrix in matrices(64, 96)]) is None
