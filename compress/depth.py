"""Stage 3: the number of layers."""

import copy
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch, calibration_kl, reference_scores
from compress.layer_states import LayerStates, States
from compress.lazy_greedy import cheapest
from compress.prunerec import perplexity
from compress.rebuild import rebuild
from compress.stage import StageReport
from models.families import Shape, non_embedding_parameters, resized_config
from models.losses import ValidTokens
from models.trie import Trie

NOT_TRIED = -1.0


def prune_depth(
    model: PreTrainedModel,
    shape: Shape,
    batches: Sequence[CalibrationBatch],
    trie: Trie,
    *,
    by: Literal["kl", "perplexity"] = "kl",
) -> tuple[PreTrainedModel, StageReport]:
    """Return the model with the shape's number of layers.

    Again and again the layer goes whose removal leaves the smallest KL to the model given (or the smallest
    perplexity of the calibration titles). Layer 0 always stays: it turns tokens into what all others read.
    """
    valid = ValidTokens(trie, model.device)
    kept = list(range(model.config.num_hidden_layers))
    states = LayerStates(model, batches)
    with states.trying(0, kept) as (entering, seen):
        reference = reference_scores(model, entering, valid)
    states.settle(0, seen)

    def without(layer: int) -> tuple[float, States]:
        with states.trying(layer, [other for other in kept if other != layer]) as (entering, seen):
            if by == "perplexity":
                return perplexity(model, entering), seen
            return calibration_kl(model, entering, valid, reference), seen

    dropped: list[int] = []
    rounds: list[list[float]] = []
    bounds = dict.fromkeys(kept[1:], 0.0)
    while len(kept) > shape.num_layers:
        gone, seen, tried = cheapest(bounds, bounds, lambda layer: -layer, without)
        states.settle(gone, seen)
        bounds |= tried
        del bounds[gone]
        kept.remove(gone)
        dropped.append(gone)
        rounds.append([tried.get(layer, NOT_TRIED) for layer in range(model.config.num_hidden_layers)])
    tensors = {}
    for name, tensor in model.state_dict().items():
        pieces = name.split(".")
        if pieces[1] != "layers":
            tensors[name] = tensor
        elif int(pieces[2]) in kept:
            pieces[2] = str(kept.index(int(pieces[2])))
            tensors[".".join(pieces)] = tensor
    pruned = rebuild(resized_config(model.config, shape), tensors)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned, StageReport(
        name="depth",
        parameters=non_embedding_parameters(pruned.config),
        calibration_kl=calibration_kl(pruned, batches, valid, reference),
        importances={"layers": rounds},
        kept={"layers": [kept]},
        choices={} if by == "kl" else {"layers_by": by},
        dropped_layers=tuple(dropped),
    )
