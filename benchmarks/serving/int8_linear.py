"""CPU time of a model's matrix products in bf16 and in int8, by the kernels that serve: no model, no search.

    OMP_NUM_THREADS=1 python -m benchmarks.serving.int8_linear

Prints one JSON row for each shape, number of tokens in a forward, and kernel. Kernels take turns call by
call, so that all meet the same machine. A figure is the median of all turns; `best` is the least, which is
nearest to a machine that nobody else uses. On a CPU with AMX vLLM's own int8 kernel serves, and the MLP runs
in one (`models.vllm_one_expert`): its rows are the MLP alone, its ratio is to bf16's MLP in one.
"""

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from models.vllm_one_expert import BLOCK, FloatExpert, Int8Expert, Int8Matrix, has_tiles

TURNS = 60
FORWARD_TOKENS = (300, 600)
SHAPES = {
    # hidden, layers, heads, KV heads, head size, MLP
    "smollm2-135m": (576, 30, 9, 3, 64, 1536),
    "pruned": (256, 8, 4, 2, 64, 600),
}


def matrices(shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Return the products of one layer as vLLM joins them, name to (inputs, outputs)."""
    hidden, _, heads, kv_heads, head_dim, mlp = shape
    return {
        "qkv": (hidden, (heads + 2 * kv_heads) * head_dim),
        "o": (heads * head_dim, hidden),
        "gate_up": (hidden, 2 * mlp),
        "down": (mlp, hidden),
    }


def products(inputs: int, outputs: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """Return the same product in each precision; int8 rounds its input too, as it does when serving."""
    import torch
    from vllm import _custom_ops as ops

    from compress.quantize import quantize_weight

    torch.manual_seed(0)
    hidden = torch.randn(tokens, inputs, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16) / inputs**0.5
    rounded, scale = quantize_weight(weight)
    adjustment = rounded.sum(1, dtype=torch.float32)[None] * scale.T
    in_bf16 = ops.create_onednn_mm(weight.t(), 32)
    in_int8 = ops.create_onednn_scaled_mm(rounded.t(), scale, torch.bfloat16, True, False, 32)

    def int8() -> Any:
        activations, activation_scales, _ = ops.onednn_scaled_int8_quant(hidden)
        result = torch.empty(tokens, outputs, dtype=torch.bfloat16)
        return ops.onednn_scaled_mm(in_int8, activations, result, activation_scales, None, adjustment, None)

    calls = {
        "bf16": lambda: ops.onednn_mm(in_bf16, hidden, None),
        "int8": int8,
        "int8: rounding of activations": lambda: ops.onednn_scaled_int8_quant(hidden),
    }
    if has_tiles() and inputs % BLOCK == 0 and outputs % BLOCK == 0:
        packed = torch.ops._C.convert_weight_packed(rounded)
        with_rounding = torch.ops._C.int8_scaled_mm_with_quant.default
        calls["int8, vLLM's for AMX"] = lambda: with_rounding(
            hidden, packed, scale.flatten(), None, torch.bfloat16, True
        )
    return calls


def mlps(hidden: int, inner: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """Return the whole MLP in each precision, where one kernel runs it."""
    import torch

    from compress.quantize import quantize_weight

    torch.manual_seed(0)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    matrices = [torch.randn(shape, dtype=torch.bfloat16) / shape[1] ** 0.5 for shape in shapes]
    rows = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    in_bf16 = FloatExpert.of(matrices, tokens)
    in_int8 = Int8Expert.of([Int8Matrix(*quantize_weight(matrix)) for matrix in matrices])
    if in_bf16 is None or in_int8 is None:
        return {}
    return {"MLP in one: bf16": lambda: in_bf16(rows), "MLP in one: int8": lambda: in_int8(rows)}


def cpu_seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Return the median and the least CPU time of each call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TURNS + 3):
        for name, call in calls.items():
            begun = time.process_time()
            call()
            if turn >= 3:  # kernels are generated in the first calls
                times[name].append(time.process_time() - begun)
    return {name: (statistics.median(taken), min(taken)) for name, taken in times.items()}


def rows() -> Iterator[dict[str, Any]]:
    """Measure; yield a row as soon as it is there."""
    import torch

    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        for tokens in FORWARD_TOKENS:
            totals: dict[str, tuple[float, float]] = {}
            flops: Counter[str] = Counter()
            groups = [(products(*widths, tokens), math.prod(widths)) for widths in matrices(shape).values()]
            groups.append((mlps(shape[0], shape[-1], tokens), 3 * shape[0] * shape[-1]))
            for calls, weights in groups:
                for what, (median, best) in cpu_seconds(calls).items():
                    before = totals.get(what, (0.0, 0.0))
                    totals[what] = before[0] + median, before[1] + best
                    flops[what] += 2 * tokens * weights
            for what, (median, best) in totals.items():
                if not what.startswith("MLP") and flops[what] < flops["bf16"]:
                    continue  # a kernel that does not take every matrix
                in_bf16 = totals["MLP in one: bf16" if what.startswith("MLP") else "bf16"]
                yield {
                    "shape": name,
                    "forward_tokens": tokens,
                    "what": what,
                    "cpu_seconds_per_token": shape[1] * median / tokens,
                    "best": shape[1] * best / tokens,
                    "gflop_per_second": flops[what] / median / 1e9 if "rounding" not in what else None,
                    "ratio_to_bf16": in_bf16[0] / median,
                    "ratio_to_bf16_best": in_bf16[1] / best,
                }


def main() -> int:
    """Print the rows."""
    from models.vllm_model import prepare_environment

    prepare_environment()
    for row in rows():
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
