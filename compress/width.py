"""Stage 1: attention heads and the width of the residual stream."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from compress.basis import Readers, channel_basis, fit_readers, pca_basis, stream_statistics
from compress.calibrate import (
    CalibrationBatch,
    CrossMoment,
    calibration_kl,
    observe,
)
from compress.heads import KeptHeads, choose_heads
from compress.method import Method
from compress.rebuild import EMBEDDING, rebuild
from compress.repair import refit_columns
from compress.stage import StageReport
from models.families import Shape, Traits, non_embedding_parameters, resized_config
from models.losses import ValidTokens
from models.trie import Trie


def prune_width(
    teacher: PreTrainedModel,
    shape: Shape,
    batches: Sequence[CalibrationBatch],
    trie: Trie,
    *,
    seed: int,
    method: Method = Method(),  # noqa: B008 - frozen
) -> tuple[PreTrainedModel, StageReport]:
    """Return the teacher with the shape's heads and hidden size; MLP and layers stay.

    KV groups and query heads with the smallest scores go and o_proj is refitted; then the stream is
    narrowed both to principal components and to the channels with the largest scores, and the model with
    the smaller calibration KL is returned.

    Args:
        seed: of the labels drawn for the gate scores.
        method: what scores the units, which ways to narrow are tried, and whether what stays is refitted.
    """
    full = Shape.of(teacher.config)
    valid = ValidTokens(trie, teacher.device)
    scores, reference = method.score(teacher, batches, valid, seed=seed)
    heads = choose_heads(scores.heads, full, shape)
    outputs = _outputs(teacher, batches, heads, repair=method.repair)
    tensors = _sliced_heads(teacher, heads, outputs)
    config = resized_config(teacher.config, shape)
    choices: dict[str, float | str] = {}
    if shape.hidden_size == full.hidden_size:
        model = rebuild(config, tensors)
        kl = calibration_kl(model, batches, valid, reference)
    else:
        with outputs_replaced(teacher, _masked(teacher, heads, outputs)):
            statistics = stream_statistics(teacher, batches)
            bases = {}
            if "pca" in method.hidden:
                bases["pca"] = pca_basis(statistics, shape.hidden_size)
            if "channels" in method.hidden:
                bases["channels"] = channel_basis(scores.channels, shape.hidden_size)
            readers = fit_readers(teacher, batches, trie, bases, refit=method.repair)
        model, kl = None, float("inf")
        for name, basis in bases.items():
            candidate = narrowed(teacher.config, config, tensors, basis, readers[name])
            candidate_kl = calibration_kl(candidate, batches, valid, reference)
            choices[f"hidden_{name}_kl"] = candidate_kl
            if candidate_kl < kl:
                model, kl = candidate, candidate_kl
                choices["hidden"] = name
        assert model is not None
    model.generation_config = copy.deepcopy(teacher.generation_config)
    grouped = scores.heads.unflatten(-1, (full.num_kv_heads, full.heads_per_group)).sum(-1)
    return model, StageReport(
        name="width",
        parameters=non_embedding_parameters(model.config),
        calibration_kl=kl,
        importances={
            "query_heads": scores.heads.tolist(),
            "kv_groups": grouped.tolist(),
            "channels": [scores.channels.tolist()],
        },
        kept={
            "query_heads": [kept.tolist() for kept in heads.query_heads],
            "kv_groups": [kept.tolist() for kept in heads.groups],
        },
        choices=choices,
    )


def _outputs(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], heads: KeptHeads, *, repair: bool
) -> list[Tensor]:
    """Return every layer's o_proj weight over the kept heads, `[hidden, kept heads * head_dim]`."""
    layers = model.model.layers
    if not repair:
        weights = [layer.self_attn.o_proj.weight.detach() for layer in layers]
        return [weight[:, heads.query_columns(n)] for n, weight in enumerate(weights)]
    moments = [CrossMoment(heads.query_columns(n)) for n in range(len(layers))]
    observe(
        model,
        batches,
        {layer.self_attn.o_proj: moment for layer, moment in zip(layers, moments, strict=True)},
    )
    return [
        refit_columns(layer.self_attn.o_proj.weight.detach(), moment.mean, heads.query_columns(n))
        for n, (layer, moment) in enumerate(zip(layers, moments, strict=True))
    ]


def _masked(model: PreTrainedModel, heads: KeptHeads, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the o_proj weights at their full width, zero for the heads that go."""
    masked = []
    for n, output in enumerate(outputs):
        weight = torch.zeros_like(model.model.layers[n].self_attn.o_proj.weight.data)
        weight[:, heads.query_columns(n)] = output
        masked.append(weight)
    return masked


@contextmanager
def outputs_replaced(model: PreTrainedModel, outputs: Sequence[Tensor]) -> Iterator[None]:
    """Let the model answer with other o_proj weights, of the same width, one a layer."""
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    originals = [projection.weight.data for projection in projections]
    try:
        for projection, output in zip(projections, outputs, strict=True):
            projection.weight.data = output
        yield
    finally:
        for projection, original in zip(projections, originals, strict=True):
            projection.weight.data = original


def _sliced_heads(model: PreTrainedModel, heads: KeptHeads, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the model's tensors with only the kept heads."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for n, output in enumerate(outputs):
        prefix = f"model.layers.{n}.self_attn."
        for name, rows in (
            ("q_proj", heads.query_columns(n)),
            ("k_proj", heads.key_columns(n)),
            ("v_proj", heads.key_columns(n)),
        ):
            for kind in ("weight", "bias"):
                if f"{prefix}{name}.{kind}" in tensors:
                    tensors[f"{prefix}{name}.{kind}"] = tensors[f"{prefix}{name}.{kind}"][rows]
        tensors[f"{prefix}o_proj.weight"] = output
    return tensors


def narrowed(
    original: PretrainedConfig,
    config: PretrainedConfig,
    tensors: dict[str, Tensor],
    basis: Tensor,
    readers: Readers,
) -> PreTrainedModel:
    """Return a model whose stream is written in the basis.

    Args:
        original: of the model the tensors come from.
        config: of the result; its `rms_norm_eps` is rewritten.
        tensors: of the model, heads already cut.
        basis: Q, float64 `[hidden, kept]`.
    """
    ratio = basis.shape[0] / basis.shape[1]
    config.rms_norm_eps = original.rms_norm_eps * ratio
    traits = Traits.of(original)
    # These norms share rms_norm_eps; scaling what goes into them makes the larger eps exact.
    query_key_scale = ratio**0.5 if traits.query_key_norm else 1.0
    level = basis.new_full((basis.shape[1],), ratio**0.5)
    result = dict(tensors)

    def keep(name: str, tensor: Tensor) -> None:
        result[name] = tensor.to(tensors[EMBEDDING].dtype)

    def write(name: str) -> None:
        """Let an output, weight and bias, land in the basis."""
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in result:
                keep(part, basis.T @ result[part].double())

    def read(name: str, norm: str, reader_basis: Tensor, scale: float = 1.0) -> None:
        """Let an input come from the basis, the norm's weight folded in."""
        folded = result[f"{name}.weight"].double() * tensors[f"{norm}.weight"] * scale
        keep(f"{name}.weight", folded @ reader_basis)

    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        before_attention, before_mlp = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
        for name, scale in (("q_proj", query_key_scale), ("k_proj", query_key_scale), ("v_proj", 1.0)):
            read(f"{layer}.self_attn.{name}", before_attention, readers.bases[2 * n], scale)
        for name in ("gate_proj", "up_proj"):
            read(f"{layer}.mlp.{name}", before_mlp, readers.bases[2 * n + 1])
        write(f"{layer}.self_attn.o_proj")
        write(f"{layer}.mlp.down_proj")
        keep(f"{before_attention}.weight", level)
        keep(f"{before_mlp}.weight", level)
    if traits.tied:
        keep("model.norm.weight", readers.final_weight * level)
    else:
        read("lm_head", "model.norm", readers.bases[-1])
        keep("model.norm.weight", level)
    keep(EMBEDDING, result[EMBEDDING].double() @ basis)
    return rebuild(config, result)
