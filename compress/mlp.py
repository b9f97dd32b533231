"""Stage 2: the width of the MLPs."""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from compress.calibrate import (
    CalibrationBatch,
    CrossMoment,
    calibration_kl,
    observe,
)
from compress.method import Method
from compress.rebuild import rebuild
from compress.repair import refit_columns
from compress.stage import StageReport
from models.families import Shape, non_embedding_parameters, resized_config
from models.losses import ValidTokens
from models.trie import Trie

PERCENTILES = 101


def prune_mlp(
    model: PreTrainedModel,
    shape: Shape,
    batches: Sequence[CalibrationBatch],
    trie: Trie,
    *,
    seed: int = 0,
    method: Method = Method(),  # noqa: B008 - frozen
) -> tuple[PreTrainedModel, StageReport]:
    """Return the model with the shape's MLP width: the neurons with the largest scores, in every layer.

    down_proj is refitted to what all neurons wrote.

    Args:
        seed: of the labels drawn for the gate scores.
        method: what scores the neurons, and whether what stays is refitted.
    """
    valid = ValidTokens(trie, model.device)
    scores, reference = method.score_neurons(model, shape, batches, valid, seed=seed)
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = order[:, : shape.intermediate_size].sort(dim=1).values
    moments = [CrossMoment(neurons) for neurons in kept]
    layers = model.model.layers
    if method.repair:
        seen = zip(layers, moments, strict=True)
        observe(model, batches, {layer.mlp.down_proj: moment for layer, moment in seen})
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for n, (neurons, moment) in enumerate(zip(kept, moments, strict=True)):
        mlp = f"model.layers.{n}.mlp."
        for name in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
            if mlp + name in tensors:
                tensors[mlp + name] = tensors[mlp + name][neurons]
        down = mlp + "down_proj.weight"
        if method.repair:
            tensors[down] = refit_columns(tensors[down], moment.mean, neurons)
        else:
            tensors[down] = tensors[down][:, neurons]
    pruned = rebuild(resized_config(model.config, shape), tensors)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    quantiles = torch.linspace(0, 1, PERCENTILES, dtype=scores.dtype, device=scores.device)
    return pruned, StageReport(
        name="mlp",
        parameters=non_embedding_parameters(pruned.config),
        calibration_kl=calibration_kl(pruned, batches, valid, reference),
        importances={"neurons": scores.quantile(quantiles, dim=1).T.tolist()},
        kept={"neurons": kept.tolist()},
    )
