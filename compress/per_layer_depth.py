"""Stage 3 where layers may differ: attentions and MLPs go one by one, and the last MLPs give up the rest."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch, calibration_kl, reference_scores
from compress.halves import Half, assemble, halves_of, only_halves, weight_of
from compress.layer_states import LayerStates, States
from compress.lazy_greedy import cheapest
from compress.per_layer_mlp import share_neurons
from compress.stage import StageReport
from models.families import Traits, non_embedding_parameters
from models.losses import ValidTokens
from models.per_layer import PerLayerShape
from models.trie import Trie

NOT_TRIED = -1.0


def drop_halves(
    model: PreTrainedModel,
    budget: int,
    batches: Sequence[CalibrationBatch],
    trie: Trie,
    *,
    seed: int,
) -> tuple[PreTrainedModel, StageReport]:
    """Return the model with at most `budget` non-embedding parameters, and at most 1 % fewer.

    Again and again the half goes whose removal adds least to the KL to the model given, for each of its
    parameters. Once every half weighs more than what is left to remove, MLPs are narrowed instead. One
    attention and one MLP stay in any case.

    Args:
        model: of LeanRec's own class.
        seed: of the labels drawn where MLPs are narrowed.

    Raises:
        LeanRecError: the budget cannot be met so closely.
    """
    valid = ValidTokens(trie, model.device)
    layers = list(range(len(model.model.layers)))
    states = LayerStates(model, batches)
    with states.trying(0, layers) as (entering, seen):
        reference = reference_scores(model, entering, valid)
    states.settle(0, seen)
    shape, traits = PerLayerShape.of(model.config.to_dict()), Traits.of(model.config)
    kept = halves_of(shape)
    every = list(kept)
    weight = {half: weight_of(half, shape, traits) for half in kept}
    prices = dict.fromkeys(kept, 0.0)
    kls: dict[Half, float] = {}
    rounds: list[list[float]] = []
    kl, count = 0.0, non_embedding_parameters(model.config)

    def removable() -> list[Half]:
        last = {kind for kind in ("attention", "mlp") if sum(half.kind == kind for half in kept) == 1}
        return [h for h in kept if h.kind not in last and 100 * (count - weight[h]) > 99 * budget]

    def without(half: Half) -> tuple[float, States]:
        others = [other for other in kept if other != half]
        with only_halves(model, others), states.trying(half.layer, layers) as (entering, seen):
            kls[half] = calibration_kl(model, entering, valid, reference)
        return max(kls[half] - kl, 0.0) / weight[half], seen

    while count > budget and (candidates := removable()):
        gone, seen, tried = cheapest(candidates, prices, lambda half: -weight[half], without)
        prices |= tried
        states.settle(gone.layer, seen)
        kl = kls[gone]
        count -= weight[gone]
        kept.remove(gone)
        rounds.append([kls[half] if half in tried else NOT_TRIED for half in every])
    pruned = assemble(model, model.state_dict(), kept)
    narrowed = {}
    if count > budget:
        pruned, told = share_neurons(pruned, budget, batches, trie, seed=seed, every_layer=True)
        narrowed = told.kept
    return pruned, StageReport(
        name="depth",
        parameters=non_embedding_parameters(pruned.config),
        calibration_kl=calibration_kl(pruned, batches, valid, reference),
        importances={"halves": rounds},
        kept={
            "attention": [[half.layer for half in kept if half.kind == "attention"]],
            "mlp": [[half.layer for half in kept if half.kind == "mlp"]],
            **narrowed,
        },
        dropped_layers=tuple(n for n in range(shape.num_layers) if not any(half.layer == n for half in kept)),
    )
