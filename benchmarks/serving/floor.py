"""The floor: the multiplications a request cannot do without, at the rate this core multiplies.

Beside it what that leaves out: each forward reads the weights once, from beyond the cache of the core.
"""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from models.precision import served_dtype

RATE_TOKENS = 512
REPEATS, PASSES = 4, 4


def matrix_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Return inputs and outputs of one layer's matrices."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    inner = config.intermediate_size
    return [
        (hidden, (heads + 2 * config.num_key_value_heads) * size),
        (heads * size, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    ]


def request_flops(config: PreTrainedConfig, prompt_tokens: float, tokens: float) -> float:
    """Return the floating point operations of a request: every token through every matrix, and attention.

    The head over a node's children is left out; so are norms, rotation and activation.

    Args:
        prompt_tokens: Tokens of the prompt; each attends to those before it.
        tokens: Tokens run in all, those of the search included.
    """
    layers = config.num_hidden_layers
    matrices = 2 * sum(inputs * outputs for inputs, outputs in matrix_shapes(config)) * layers
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_pair = 4 * config.num_attention_heads * size * layers
    pairs = prompt_tokens**2 / 2 + (tokens - prompt_tokens) * prompt_tokens
    return matrices * tokens + per_pair * pairs


def matrix_rates(config: PreTrainedConfig) -> list[float]:
    """Return one thread's rate over the layer's own matrices, in the precision of serving, FLOP per CPU
    second, in several tries."""
    torch.set_num_threads(1)
    dtype = getattr(torch, served_dtype("cpu"))
    work = []
    for inputs, outputs in matrix_shapes(config):
        weight = torch.ops.mkldnn._reorder_linear_weight(
            torch.randn(outputs, inputs, dtype=dtype), RATE_TOKENS
        )
        work.append((torch.randn(RATE_TOKENS, inputs, dtype=dtype), weight))
    flops = 2 * RATE_TOKENS * sum(inputs * outputs for inputs, outputs in matrix_shapes(config))
    _multiply(work)
    rates = []
    for _ in range(REPEATS):
        begun = time.process_time()
        for _ in range(PASSES):
            _multiply(work)
        rates.append(PASSES * flops / (time.process_time() - begun))
    return rates


def _multiply(work: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for hidden, weight in work:
        torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")


def layer_bytes(config: PreTrainedConfig) -> int:
    """Return the bytes of all layers' matrices in the precision of serving: what a forward reads."""
    size = getattr(torch, served_dtype("cpu")).itemsize
    return (
        size * sum(inputs * outputs for inputs, outputs in matrix_shapes(config)) * config.num_hidden_layers
    )


def read_rates(config: PreTrainedConfig) -> list[float]:
    """Return at what rate one thread reads as much as the layers have, bytes a CPU second, several times."""
    torch.set_num_threads(1)
    weights = torch.ones(layer_bytes(config) // 8, dtype=torch.int64)
    weights.sum()
    rates = []
    for _ in range(REPEATS):
        begun = time.process_time()
        weights.sum()
        rates.append(8 * len(weights) / (time.process_time() - begun))
    return rates
