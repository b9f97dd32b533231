"""The scores of the published method (arXiv 2507.07064), with labels and logits aligned.

Its public code reads labels without the shift, heads at a padding position, and layers by the perplexity of
unrelated text. Here every score is taken at title positions, and layers by the perplexity of titles. Units
go by plain slicing; nothing is refitted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch, hooked, last_hidden, title_scores
from compress.importance import Importance
from models.losses import ValidTokens, vocabulary_cross_entropy, vocabulary_kl

PROMPTS = 10
MASKED = 1e-4
"""what a masked head's queries are multiplied with"""
BELOW, OWN = 0.7, 0.3
"""shares of the layer below and of the layer itself in a head's score"""


def width_scores(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], valid: ValidTokens
) -> Importance:
    """Return the scores of heads and hidden channels; neurons are scored in their own stage."""
    layers = model.model.layers
    return Importance(
        heads=_head_scores(model, _prompts(batches)),
        neurons=torch.zeros(len(layers), model.config.intermediate_size, dtype=torch.float64),
        channels=_channel_scores(model, _sample(batches), valid),
    )


@torch.no_grad()
def neuron_scores(model: PreTrainedModel, batches: Sequence[CalibrationBatch], *, kept: int) -> Tensor:
    """Return how often each neuron is among a token's `kept` largest raw `up_proj` outputs of one sample.

    float64 `[layers, intermediate]`.
    """
    layers = model.model.layers
    counts = torch.zeros(len(layers), model.config.intermediate_size, dtype=torch.float64)
    handles = []
    for number, layer in enumerate(layers):

        def count(_module: object, _inputs: object, output: Tensor, number: int = number) -> None:
            best = output.flatten(0, 1).topk(kept, dim=-1).indices
            counts[number] += torch.bincount(best.flatten().cpu(), minlength=counts.shape[1])

        handles.append(layer.mlp.up_proj.register_forward_hook(count))
    with hooked(handles):
        last_hidden(model, _sample(batches))
    return counts.to(model.device)


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Sequence[CalibrationBatch]) -> float:
    """Return the perplexity of the calibration titles."""
    total, tokens = 0.0, 0
    for batch in batches:
        predicting = batch.title_mask[:, :-1]
        hidden = last_hidden(model, batch)[:, :-1][predicting]
        expected = batch.input_ids[:, 1:][predicting]
        total += len(expected) * float(vocabulary_cross_entropy(hidden, model.lm_head.weight, expected))
        tokens += len(expected)
    return float(torch.tensor(total / max(tokens, 1)).exp())


@torch.no_grad()
def _head_scores(model: PreTrainedModel, prompts: Sequence[CalibrationBatch]) -> Tensor:
    """Return KL(base || masked) where the next title begins, each head masked alone, `[layers, heads]`."""
    layers = model.model.layers
    heads = model.config.num_attention_heads

    def answers() -> Tensor:
        found = [last_hidden(model, prompt)[0, -1] @ model.lm_head.weight.T for prompt in prompts]
        return torch.stack(found).float()

    base = answers()
    scores = torch.zeros(len(layers), heads, dtype=torch.float64)
    for number, layer in enumerate(layers):
        for head in range(heads):

            def mask(_module: object, _inputs: object, output: Tensor, head: int = head) -> Tensor:
                by_head = output.clone().view(*output.shape[:2], heads, -1)
                by_head[:, :, head] *= MASKED
                return by_head.view(output.shape)

            # Qwen3 would make the queries as large as before in its norm.
            queries = getattr(layer.self_attn, "q_norm", layer.self_attn.q_proj)
            with hooked([queries.register_forward_hook(mask)]):
                scores[number, head] = float(vocabulary_kl(base, answers()))
    smooth = scores.clone()
    for number in range(1, len(layers)):
        smooth[number] = BELOW * smooth[number - 1] + OWN * scores[number]
    return smooth.to(model.device)


def _channel_scores(model: PreTrainedModel, sample: CalibrationBatch, valid: ValidTokens) -> Tensor:
    """Return the size of gradient times value of each channel of the last hidden state, `[hidden]`."""
    kept: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    with hooked([model.model.norm.register_forward_hook(keep)]), torch.enable_grad():
        scored = title_scores(model, sample, valid)
        nodes = sample.node_ids[sample.node_ids >= 0]
        following = sample.input_ids.roll(-1, dims=1)[sample.node_ids >= 0]
        loss = -valid.chosen(scored, nodes, following).mean()
        gradient = torch.autograd.grad(loss, kept[0])[0]
    return (gradient * kept[0].detach()).flatten(0, 1).norm(dim=0).double()


def _sample(batches: Sequence[CalibrationBatch]) -> CalibrationBatch:
    """Return the first row alone."""
    first = batches[0]
    return CalibrationBatch(
        input_ids=first.input_ids[:1],
        attention_mask=None if first.attention_mask is None else first.attention_mask[:1],
        node_ids=first.node_ids[:1],
        title_mask=first.title_mask[:1],
        position_ids=None if first.position_ids is None else first.position_ids[:1],
    )


def _prompts(batches: Sequence[CalibrationBatch]) -> list[CalibrationBatch]:
    """Return the starts of the first rows, each up to where the last title of its first window begins."""
    found: list[CalibrationBatch] = []
    for batch in batches:
        for row in range(len(batch.input_ids)):
            end = batch.input_ids.shape[1]
            if batch.position_ids is not None:
                begins = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
                end = begins[1] if len(begins) > 1 else end
            at = (batch.node_ids[row, :end] == 0).nonzero().flatten().tolist()
            if at and len(found) < PROMPTS:
                part = slice(0, at[-1] + 1)
                found.append(
                    CalibrationBatch(
                        input_ids=batch.input_ids[row : row + 1, part],
                        attention_mask=None,
                        node_ids=batch.node_ids[row : row + 1, part],
                        title_mask=batch.title_mask[row : row + 1, part],
                    )
                )
    return found
