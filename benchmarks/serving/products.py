"""What the layers' matrix products take by the number of rows, and what rides on them: no model, no search.

    OMP_NUM_THREADS=1 python -m benchmarks.serving.products

For the shape that the race serves. Weights of all layers take turns, so they come from beyond the core's own
cache, as in a forward; forms take turns too, so that all meet the same machine. Prints rows and keeps them in
`benchmarks/serving/products.json`.
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
from benchmarks.serving.floor import RATE_TOKENS, matrix_shapes, read_rates, weight_bytes
from loadtest.machine import describe_versions, processors
from models.atomic import write_json
from models.checkpoint import read_recommender

ROWS = (4, 16, 32, 64, 128, 256, 512, 608)
TURNS = 60
linear = torch.ops.mkldnn._linear_pointwise.default
linear_with = torch.ops.mkldnn._linear_pointwise.binary


@dataclass(frozen=True)
class _Layer:
    """One layer's packed matrices."""

    qkv: torch.Tensor
    output: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def main() -> None:
    """Measure, print and keep."""
    torch.set_num_threads(1)
    config = read_recommender(trained_recommender("ml-100k", "ml-100k")).config
    found = measure(config)
    write_json(Path("benchmarks/serving/products.json"), found)
    print(json.dumps(found, indent=1))


@torch.inference_mode()
def measure(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return a row for each number of rows: milliseconds of a forward's products, by form."""
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
            "post_operations": float(
                np.median(np.array(seconds[rows, "post-operations"]) / np.array(seconds[rows, "passes"]))
            ),
            "read_milliseconds": 1e3 * weight_bytes(config) / float(np.median(reads)),
            "weight_bytes": weight_bytes(config),
            "hardware": f"{processors()}, 1 compute thread",
            "versions": describe_versions(),
        }
        for rows in ROWS
    ]


def forms(
    layers: Sequence[_Layer], rows: int, config: PreTrainedConfig
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a forward's products, without attention and norms, by what rides on them; each returns its last.

    `alone` has neither activation nor sums; `passes` is what `models.vllm_products` runs, `post-operations`
    leaves the gate and the residual to oneDNN as well.
    """
    hidden = torch.randn(rows, config.hidden_size, dtype=torch.bfloat16)
    inner = torch.randn(rows, config.intermediate_size, dtype=torch.bfloat16)
    attended = torch.randn(rows, matrix_shapes(config)[1][0], dtype=torch.bfloat16)

    def alone() -> torch.Tensor:
        for layer in layers:
            _plain(hidden, layer.qkv)
            _plain(attended, layer.output)
            _plain(hidden, layer.gate)
            _plain(hidden, layer.up)
            last = _plain(inner, layer.down)
        return last

    def passes() -> torch.Tensor:
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

    return {"alone": alone, "passes": passes, "post-operations": post_operations}


def _layer(config: PreTrainedConfig) -> _Layer:
    (hidden, joined), (attended, _), _, (inner, _) = matrix_shapes(config)
    return _Layer(
        qkv=_packed(joined, hidden),
        output=_packed(hidden, attended),
        gate=_packed(inner, hidden),
        up=_packed(inner, hidden),
        down=_packed(hidden, inner),
    )


def _packed(outputs: int, inputs: int) -> torch.Tensor:
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16) / inputs**0.5
    return torch.ops.mkldnn._reorder_linear_weight(weight, RATE_TOKENS)


def _plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear(hidden, weight, None, "none", [], "")


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
