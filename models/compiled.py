"""Fused decoder layers for long training runs."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from models.per_layer import MODEL_TYPE as PER_LAYER

LONG_CPU_RUN = 2_000_000_000
"""Numbers in the hidden states of all its tokens after all layers: what is fused grows with them. Compiling
takes 10 to 20 s of a small model, and saves 28 s a billion of them on two cores (`benchmarks.compiled`)."""
LONG_CUDA_RUN = 1000
"""Steps: there a step's many small kernels cost the same however much each does."""
LONGEST_ROW = 512
"""Tokens of a row whose attention is written out: it keeps a score for each pair of them."""


def compile_layers(
    model: PreTrainedModel, *, steps: int, step_rows: int, row_tokens: int, device: str
) -> bool:
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
        tokens = steps * step_rows * row_tokens
        is_long = tokens * len(layers) * model.config.hidden_size >= LONG_CPU_RUN
    else:
        is_long = steps >= LONG_CUDA_RUN
    if not is_long or not compiler or model.config.model_type == PER_LAYER:
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
