"""Gate scores of the inputs of any modules, for models whose layers differ (see `compress.importance`)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch, hooked, title_scores
from compress.importance import draw_children
from models.losses import ValidLogProbs, ValidTokens


def unit_scores(
    model: PreTrainedModel,
    modules: Sequence[nn.Linear],
    batches: Sequence[CalibrationBatch],
    valid: ValidTokens,
    *,
    seed: int,
) -> tuple[list[Tensor], list[ValidLogProbs]]:
    """Return for each module the scores of its inputs' columns, float64 `[width]`, nats per calibration row;
    and the model's answers, as `compress.calibrate.reference_scores`.

    Args:
        modules: in the order in which the model runs them.
        seed: of the labels drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: list[Tensor] = []

    def see() -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.append(inputs[0])

    handles = [module.register_forward_pre_hook(see()) for module in modules]
    # The graph starts at the embeddings, so weights need no gradient and get none.
    handles.append(
        model.model.embed_tokens.register_forward_hook(
            lambda _module, _inputs, output: output.detach().requires_grad_()
        )
    )
    totals = [torch.zeros(module.in_features, dtype=torch.float64, device=model.device) for module in modules]
    rows = 0
    answers: list[ValidLogProbs] = []
    with hooked(handles), torch.enable_grad():
        for batch in batches:
            seen.clear()
            scored = title_scores(model, batch, valid)
            answers.append(scored.detached())
            drawn = draw_children(scored, batch.node_ids[batch.node_ids >= 0], valid, generator)
            for n, gradient in enumerate(torch.autograd.grad(drawn.sum(), seen)):
                slopes = (seen[n].detach().float() * gradient.float()).sum(1)
                totals[n] += slopes.double().square().sum(0)
            rows += len(batch.input_ids)
    return [total / (2 * rows) for total in totals], answers
