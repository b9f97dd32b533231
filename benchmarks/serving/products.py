"""What the layers' matrix products take by the number of rows, and by whom they are run: no model, no search.

    OMP_NUM_THREADS=1 python -m benchmarks.serving.products

For the shape that the race serves, in the precision of this machine. Weights of all layers take turns, so
they come from beyond the core's own cache, as in a forward; forms take turns too, so that all meet the same
machine. Prints rows and keeps them in `benchmarks/serving/products.json`, beside those of other machines.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from benchmarks.serving.checkpoints import trained_recommender
from benchmarks.serving.floor import RATE_TOKENS, layer_bytes, matrix_shapes, read_rates
from benchmarks.serving.kept import keep_rows
from benchmarks.serving.one_thread import hardware
from loadtest.machine import describe_versions
from models.checkpoint import read_recommender
from models.precision import served_dtype
from models.vllm_model import import_vllm
from models.vllm_products import FloatProducts

ROWS = (4, 16, 32, 64, 128, 256, 512, 608)
TURNS = 60
linear = torch.ops.mkldnn._linear_pointwise.default
linear_with = torch.ops.mkldnn._linear_pointwise.binary


@dataclass(frozen=True)
class _Layer:
    """One layer's matrices, packed for PyTorch's products, and as they are served."""

    qkv: torch.Tensor
    output: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    served: FloatProducts


def main() -> None:
    """Measure, print and keep."""
    torch.set_num_threads(1)
    config = read_recommender(trained_recommender("ml-100k", "ml-100k")).config
    found = measure(config)
    keep_rows(Path("benchmarks/serving/products.json"), found, ("hardware",))
    print(json.dumps(found, indent=1))


@torch.inference_mode()
def measure(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return a row for each number of rows: milliseconds of a forward's products, by form."""
    import_vllm()
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    layers = [_layer(config) for _ in range(config.num_hidden_layers)]
    joined = sum(np.prod(shape) for shape in matrix_shapes(config)) * len(layers)
    seconds: dict[tuple[int, str], list[float]] = {}
    reads: list[float] = []
    work = {rows: forms(layers, rows, config) for rows in ROWS}
    for turn in range(TURNS + 1):
        for rows, of_rows in work.items():
            for name, form in of_rows.items():
                taken = _seconds(form)
                if turn:  # the first generates kernels
                    seconds.setdefault((rows, name), []).append(taken)
        reads += read_rates(config)
    full = np.array(seconds[RATE_TOKENS, "alone"])
    return [
        {
            "rows": rows,
            "layers": len(layers),
            "turns": TURNS,
            "milliseconds": {name: 1e3 * float(np.median(seconds[rows, name])) for name in work[rows]},
            "gflops": 2e-9 * joined * rows / float(np.median(seconds[rows, "alone"])),
            "of_full_rate": float(np.median(full * rows / RATE_TOKENS / np.array(seconds[rows, "alone"]))),
            "of_pytorch": {
                name: float(np.median(np.array(seconds[rows, name]) / np.array(seconds[rows, "pytorch"])))
                for name in ("post-operations", "served")
            },
            "read_milliseconds": 1e3 * layer_bytes(config) / float(np.median(reads)),
            "weight_bytes": layer_bytes(config),
            "hardware": hardware(),
            "versions": describe_versions(),
        }
        for rows in ROWS
    ]


def forms(
    layers: Sequence[_Layer], rows: int, config: PreTrainedConfig
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a forward's products, without attention and norms, by who runs them; each returns its last.

    `alone` has neither activation nor sums; in `pytorch` the activation rides on its product,
    `post-operations` leaves the gate and the residual to oneDNN as well; `served` is `models.vllm_products`,
    and passes for the sums, which the service adds with the norms.
    """
    dtype = getattr(torch, served_dtype("cpu"))
    hidden = torch.randn(rows, config.hidden_size, dtype=dtype)
    inner = torch.randn(rows, config.intermediate_size, dtype=dtype)
    attended = torch.randn(rows, matrix_shapes(config)[1][0], dtype=dtype)

    def alone() -> torch.Tensor:
        for layer in layers:
            _plain(hidden, layer.qkv)
            _plain(attended, layer.output)
            _plain(hidden, layer.gate)
            _plain(hidden, layer.up)
            last = _plain(inner, layer.down)
        return last

    def pytorch() -> torch.Tensor:
        residual = hidden.clone()
        for layer in layers:
            _plain(hidden, layer.qkv)
            residual.add_(_plain(attended, layer.output))
            gated = linear(hidden, layer.gate, None, "swish", [], "").mul_(_plain(hidden, layer.up))
            residual.add_(_plain(gated, layer.down))
        return residual

    def post_operations() -> torch.Tensor:
        residual = hidden
        for layer in layers:
            _plain(hidden, layer.qkv)
            residual = linear_with(attended, residual, layer.output, None, "add")
            gate = linear(hidden, layer.gate, None, "swish", [], "")
            residual = linear_with(
                linear_with(hidden, gate, layer.up, None, "mul"), residual, layer.down, None, "add"
            )
        return residual

    def served() -> torch.Tensor:
        residual = hidden.clone()
        for layer in layers:
            layer.served.qkv(hidden)
            residual.add_(layer.served.output(attended))
            residual.add_(layer.served.mlp(hidden))
        return residual

    return {"alone": alone, "pytorch": pytorch, "post-operations": post_operations, "served": served}


def _layer(config: PreTrainedConfig) -> _Layer:
    (hidden, joined), (attended, _), _, (inner, _) = matrix_shapes(config)
    dtype = getattr(torch, served_dtype("cpu"))
    shapes = {
        "self_attn.q_proj": (attended, hidden),
        "self_attn.k_proj": ((joined - attended) // 2, hidden),
        "self_attn.v_proj": ((joined - attended) // 2, hidden),
        "self_attn.o_proj": (hidden, attended),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    weights = {
        f"model.layers.0.{name}.weight": torch.randn(shape, dtype=dtype) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }

    def packed(*names: str) -> torch.Tensor:
        joined_weights = torch.cat([weights[f"model.layers.0.{name}.weight"] for name in names])
        return torch.ops.mkldnn._reorder_linear_weight(joined_weights, RATE_TOKENS)

    return _Layer(
        qkv=packed("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=packed("self_attn.o_proj"),
        gate=packed("mlp.gate_proj"),
        up=packed("mlp.up_proj"),
        down=packed("mlp.down_proj"),
        served=FloatProducts(0, weights.get, dtype, max(ROWS)),
    )


def _plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear(hidden, weight, None, "none", [], "")


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
