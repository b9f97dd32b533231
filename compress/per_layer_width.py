"""Stage 1 where layers may differ: KV groups are kept where they score most, whichever layer that is."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.basis import channel_basis, fit_readers, pca_basis, stream_statistics
from compress.calibrate import CalibrationBatch, CrossMoment, calibration_kl, observe
from compress.halves import Half, assemble
from compress.heads import KeptHeads
from compress.importance import gate_scores
from compress.rebuild import rebuild
from compress.repair import refit_columns
from compress.shares import share_heads
from compress.stage import StageReport
from compress.width import narrowed, outputs_replaced
from models.families import Shape, non_embedding_parameters
from models.losses import ValidTokens
from models.per_layer import LayerShape, PerLayerShape
from models.per_layer_model import per_layer_config
from models.trie import Trie


def share_attention(
    teacher: PreTrainedModel,
    shape: Shape,
    batches: Sequence[CalibrationBatch],
    trie: Trie,
    *,
    seed: int,
    least: int = 0,
) -> tuple[PreTrainedModel, StageReport]:
    """Return the teacher with the shape's hidden size, and in all its layers together the shape's heads.

    o_proj is refitted, and the stream narrowed by the better of two bases, as in `compress.width`.

    Args:
        shape: its heads are those of a layer on average; MLP and layers stay.
        seed: of the labels drawn for the gate scores.
        least: KV groups that every layer keeps.
    """
    full = Shape.of(teacher.config)
    valid = ValidTokens(trie, teacher.device)
    scores, reference = gate_scores(teacher, batches, valid, seed=seed)
    heads = share_heads(scores.heads, full, shape, least=least)
    outputs = _masked_outputs(teacher, batches, heads)
    tensors = {name: tensor.detach() for name, tensor in teacher.state_dict().items()}
    tensors |= {f"model.layers.{n}.self_attn.o_proj.weight": output for n, output in enumerate(outputs)}
    layer = LayerShape(full.num_heads, full.num_kv_heads, full.intermediate_size)
    whole = PerLayerShape(shape.hidden_size, full.head_dim, (layer,) * full.num_layers)
    choices: dict[str, float | str] = {}
    if shape.hidden_size == full.hidden_size:
        model = rebuild(per_layer_config(teacher.config, whole), tensors)
    else:
        with outputs_replaced(teacher, outputs):
            statistics = stream_statistics(teacher, batches)
            bases = {
                "pca": pca_basis(statistics, shape.hidden_size),
                "channels": channel_basis(scores.channels, shape.hidden_size),
            }
            readers = fit_readers(teacher, batches, trie, bases)
        candidates, kls = {}, {}
        for name, basis in bases.items():
            config = per_layer_config(teacher.config, whole)
            candidates[name] = narrowed(teacher.config, config, tensors, basis, readers[name])
            kls[name] = calibration_kl(candidates[name], batches, valid, reference)
        chosen = min(kls, key=lambda name: kls[name])
        choices = {**{f"hidden_{name}_kl": kl for name, kl in kls.items()}, "hidden": chosen}
        model = candidates[chosen]
    model.generation_config = teacher.generation_config
    pruned = _without_heads(model, heads)
    grouped = scores.heads.unflatten(-1, (full.num_kv_heads, full.heads_per_group)).sum(-1)
    return pruned, StageReport(
        name="width",
        parameters=non_embedding_parameters(pruned.config),
        calibration_kl=calibration_kl(pruned, batches, valid, reference),
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


def _masked_outputs(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], heads: KeptHeads
) -> list[Tensor]:
    """Return every layer's o_proj weight, refitted to the kept heads and zero for the others."""
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    moments = {
        projection: CrossMoment(heads.query_columns(n))
        for n, projection in enumerate(projections)
        if len(heads.groups[n])
    }
    observe(model, batches, moments)
    outputs = []
    for n, projection in enumerate(projections):
        weight, columns = projection.weight.detach(), heads.query_columns(n)
        masked = torch.zeros_like(weight)
        if projection in moments:
            masked[:, columns] = refit_columns(weight, moments[projection].mean, columns)
        outputs.append(masked)
    return outputs


def _without_heads(model: PreTrainedModel, heads: KeptHeads) -> PreTrainedModel:
    """Return the model with only the kept heads; layers that keep none lose their attention."""
    tensors = dict(model.state_dict())
    kept = []
    for n, groups in enumerate(heads.groups):
        kept += [Half(n, "attention")] if len(groups) else []
        kept.append(Half(n, "mlp"))
        attention = f"model.layers.{n}.self_attn."
        for name, rows in (
            ("q_proj", heads.query_columns(n)),
            ("k_proj", heads.key_columns(n)),
            ("v_proj", heads.key_columns(n)),
        ):
            for tensor in (f"{attention}{name}.weight", f"{attention}{name}.bias"):
                if tensor in tensors:
                    tensors[tensor] = tensors[tensor][rows]
        output = f"{attention}o_proj.weight"
        tensors[output] = tensors[output][:, heads.query_columns(n)]
    return assemble(model, tensors, kept)
