"""Stage 2 where layers may differ: neurons are kept where they score most, whichever layer that is."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch, CrossMoment, calibration_kl, observe
from compress.halves import assemble, halves_of
from compress.repair import refit_columns
from compress.shares import STEPS, best, share_width
from compress.stage import StageReport
from compress.unit_scores import unit_scores
from models.errors import LeanRecError
from models.families import Traits, count_parameters, non_embedding_parameters
from models.losses import ValidTokens
from models.per_layer import LayerShape, PerLayerShape
from models.trie import Trie

PERCENTILES = 101


def share_neurons(
    model: PreTrainedModel,
    most: int,
    batches: Sequence[CalibrationBatch],
    trie: Trie,
    *,
    seed: int,
    every_layer: bool = False,
) -> tuple[PreTrainedModel, StageReport]:
    """Return the model with at most `most` non-embedding parameters, and at most 1 % fewer.

    down_proj is refitted to what all neurons wrote. Widths are multiples of 16 where there is room.

    Args:
        model: of LeanRec's own class.
        seed: of the labels drawn for the gate scores.
        every_layer: No layer with an MLP is to lose it.

    Raises:
        LeanRecError: no widths give such a number.
    """
    layers = {n: layer for n, layer in enumerate(model.model.layers) if layer.mlp is not None}
    shape = PerLayerShape.of(model.config.to_dict())
    valid = ValidTokens(trie, model.device)
    outputs = [layer.mlp.down_proj for layer in layers.values()]
    scores, reference = unit_scores(model, outputs, batches, valid, seed=seed)
    found = fitting_widths(
        shape, Traits.of(model.config), dict(zip(layers, scores, strict=True)), most, every_layer
    )
    kept = {n: best(score, found[n]) for n, score in zip(layers, scores, strict=True)}
    moments = {n: CrossMoment(neurons) for n, neurons in kept.items() if len(neurons)}
    observe(model, batches, {layers[n].mlp.down_proj: moment for n, moment in moments.items()})
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for n, moment in moments.items():
        mlp, neurons = f"model.layers.{n}.mlp.", kept[n]
        for name in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
            if mlp + name in tensors:
                tensors[mlp + name] = tensors[mlp + name][neurons]
        down = mlp + "down_proj.weight"
        tensors[down] = refit_columns(tensors[down], moment.mean, neurons)
    halves = [half for half in halves_of(shape) if half.kind == "attention" or half.layer in moments]
    pruned = assemble(model, tensors, halves)
    return pruned, StageReport(
        name="mlp",
        parameters=non_embedding_parameters(pruned.config),
        calibration_kl=calibration_kl(pruned, batches, valid, reference),
        importances={"neurons": [_percentiles(score) for score in scores]},
        kept={"neurons": [neurons.tolist() for neurons in kept.values()]},
    )


def fitting_widths(
    shape: PerLayerShape, traits: Traits, scores: dict[int, Tensor], most: int, every_layer: bool = False
) -> dict[int, int]:
    """Return each MLP's width, the best neurons of all, that gives `most` parameters or up to 1 % less.

    Args:
        scores: of the neurons of each layer with an MLP.
        every_layer: No width may be 0.

    Raises:
        LeanRecError: there are no such widths.
    """

    def count(widths: dict[int, int]) -> int:
        changed = [
            LayerShape(layer.num_heads, layer.num_kv_heads, widths.get(n, 0))
            for n, layer in enumerate(shape.layers)
        ]
        resized = PerLayerShape(shape.hidden_size, shape.head_dim, tuple(changed))
        return count_parameters(resized, traits).non_embedding

    per_neuron = count(dict.fromkeys(scores, 2)) - count(dict.fromkeys(scores, 1))
    per_neuron //= len(scores)
    for step in STEPS:
        left = dict(scores)
        while left:
            # Each MLP that goes takes its norm with it, which leaves room for more neurons elsewhere.
            fixed = count(dict.fromkeys(left, 1)) - len(left) * per_neuron
            total = (most - fixed) // per_neuron
            shares = share_width(list(left.values()), total, step, least=int(every_layer))
            widths = dict(zip(left, shares, strict=True))
            if all(shares):
                if most * 99 < 100 * count(widths) <= most * 100:
                    return dict.fromkeys(scores, 0) | widths
                break
            left = {n: score for n, score in left.items() if widths[n]}
    raise LeanRecError(
        f"--layout per-layer: no MLP widths leave between {most * 99 // 100 + 1:,} and {most:,} "
        "non-embedding parameters; try a slightly larger target, or --layout uniform"
    )


def _percentiles(scores: Tensor) -> list[float]:
    quantiles = torch.linspace(0, 1, PERCENTILES, dtype=scores.dtype, device=scores.device)
    return scores.quantile(quantiles).tolist()
