"""`--layout per-layer`: the same cuts within the same budget, but each layer keeps what it needs.

A cut takes its totals from the uniform plan: the hidden size, the KV groups and query heads of all layers
together, the parameters after the MLPs were narrowed, and the budget.
"""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch
from compress.per_layer_depth import drop_halves
from compress.per_layer_mlp import share_neurons
from compress.per_layer_width import share_attention
from compress.plan import Plan
from compress.stage import StageReport
from models.families import count_parameters
from models.trie import Trie


def prune_per_layer(
    cut: str,
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[CalibrationBatch],
    trie: Trie,
    *,
    seed: int,
) -> tuple[PreTrainedModel, StageReport]:
    """Return the model after one cut, and what was done.

    Args:
        cut: `width`, `mlp` or `depth`, in this order.
        model: the full model for `width`, then what the cut before gave.
        plan: of the uniform layout.
        seed: of the labels drawn for gate scores.

    Raises:
        LeanRecError: the budget cannot be met so closely.
    """
    full, final = plan.full, plan.final
    if cut == "width":
        narrow = replace(
            full, hidden_size=final.hidden_size, num_heads=final.num_heads, num_kv_heads=final.num_kv_heads
        )
        # An attention that goes takes its norm with it: later cuts must have room to make up for that.
        later = (final.num_layers, final.intermediate_size) != (full.num_layers, full.intermediate_size)
        return share_attention(model, narrow, batches, trie, seed=seed, least=0 if later else 1)
    if cut == "mlp":
        uniform = count_parameters(replace(final, num_layers=full.num_layers), plan.traits)
        return share_neurons(model, max(uniform.non_embedding, plan.budget), batches, trie, seed=seed)
    return drop_halves(model, plan.budget, batches, trie, seed=seed)
