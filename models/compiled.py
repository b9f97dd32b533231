"""Fused decoder layers for long training runs."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from models.per_layer import MODEL_TYPE as PER_LAYER

LONG_RUN_STEPS = {"cpu": 3000, "cuda": 1000}
"""Compiling takes 10 to 15 s, and saves a tenth of a second a step of a model of ten million parameters."""
SMALL_MODEL = 10_000_000
"""Non-embedding parameters. On a CPU what a step saves grows with them, so fewer steps make a run long: of
SmolLM2-135M's, a step of 8,192 tokens saves nine seconds."""
LONGEST_ROW = 512
"""Tokens of a row whose attention is written out: it keeps a score for each pair of them."""


def compile_layers(model: PreTrainedModel, *, steps: int, row_tokens: int, device: str) -> bool:
    """Compile the decoder layers in place where that pays, and return whether it did.

    PyTorch's kernels leave half of a training step of a small model to element-wise operations, which
    Inductor fuses; on a CPU its flash attention's backward pass is slower than plain products over rows of a
    few hundred tokens, so for those attention is written out. Parameters, their names and the saved files
    stay as they are. Short runs, layers of unlike shapes and machines without a C compiler keep the layers as
    they are.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    layers = model.get_decoder().layers
    if device == "cpu":
        steps = steps * max(SMALL_MODEL, sum(weight.numel() for weight in layers.parameters())) // SMALL_MODEL
    if steps < LONG_RUN_STEPS[device] or not compiler or model.config.model_type == PER_LAYER:
        return False
    torch.compiler.reset()  # the shapes of an earlier model count against how many are compiled
    if device == "cpu" and row_tokens <= LONGEST_ROW:
        model.set_attn_implementation("eager")
    for layer in layers:
        layer.compile(dynamic=False)
    return True


@contextmanager
def as_written() -> Iterator[None]:
    """Run compiled layers as they were written: calls of ever new shapes would compile them anew."""
    with torch.compiler.set_stance("force_eager"):
        yield
