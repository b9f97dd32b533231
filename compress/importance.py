"""How much each head, channel and neuron matters to the titles a model would generate.

A unit u has a gate 1 on its output a_u. With labels y drawn from the model's own valid-token
distribution, s_u = 1/2 E[(sum_t <a_u,t, d log p(y|x) / d a_u,t>)^2] is the second-order estimate of the
KL that closing the gate causes (the Fisher information of the gate; the first-order term is zero).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch, hooked, title_scores
from models.losses import ValidLogProbs, ValidTokens


@dataclass(frozen=True)
class Importance:
    """Gate scores in nats per calibration row, float64."""

    heads: Tensor
    """`[layers, heads]`"""
    neurons: Tensor
    """`[layers, intermediate]`"""
    channels: Tensor
    """`[hidden]`: of the residual stream, as every norm's reader sees it"""


def gate_scores(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], valid: ValidTokens, *, seed: int
) -> tuple[Importance, list[ValidLogProbs]]:
    """Return the scores of all units from one forward and one backward per batch, and the model's answers.

    Rows are independent, so one backward gives every row its own gradient. The answers are those of
    `compress.calibrate.reference_scores`.
    """
    layers = model.model.layers
    num_layers, head_dim = len(layers), layers[0].self_attn.head_dim
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(model.model.norm)
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[Tensor]] = {"heads": [], "neurons": [], "norms": []}

    def inputs_into(kind: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen[kind].append(inputs[0])

    def output_into(kind: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, _inputs, output: seen[kind].append(output)

    handles = [layer.self_attn.o_proj.register_forward_pre_hook(inputs_into("heads")) for layer in layers]
    handles += [layer.mlp.down_proj.register_forward_pre_hook(inputs_into("neurons")) for layer in layers]
    handles += [norm.register_forward_hook(output_into("norms")) for norm in norms]
    # The graph starts at the embeddings, so weights need no gradient and get none.
    handles.append(
        model.model.embed_tokens.register_forward_hook(
            lambda _module, _inputs, output: output.detach().requires_grad_()
        )
    )
    heads: Tensor | float = 0.0
    neurons: Tensor | float = 0.0
    channels: Tensor | float = 0.0
    rows = 0
    answers: list[ValidLogProbs] = []
    with hooked(handles), torch.enable_grad():
        for batch in batches:
            for captured in seen.values():
                captured.clear()
            scored = title_scores(model, batch, valid)
            answers.append(scored.detached())
            drawn = draw_children(scored, batch.node_ids[batch.node_ids >= 0], valid, generator)
            units = [*seen["heads"], *seen["neurons"], *seen["norms"]]
            gradients = torch.autograd.grad(drawn.sum(), units)
            # Sum over time of <a, gradient>, per row and unit.
            pairs = zip(units, gradients, strict=True)
            slopes = [(unit.detach().float() * grad.float()).sum(1) for unit, grad in pairs]
            by_head = torch.stack(slopes[:num_layers]).unflatten(-1, (-1, head_dim)).sum(-1)
            by_neuron = torch.stack(slopes[num_layers : 2 * num_layers])
            by_channel = torch.stack(slopes[2 * num_layers :]).sum(0)
            heads = heads + by_head.double().square().sum(1)
            neurons = neurons + by_neuron.double().square().sum(1)
            channels = channels + by_channel.double().square().sum(0)
            rows += len(batch.input_ids)
    seen.clear()
    assert isinstance(heads, Tensor)
    assert isinstance(neurons, Tensor)
    assert isinstance(channels, Tensor)
    return Importance(heads / (2 * rows), neurons / (2 * rows), channels / (2 * rows)), answers


def draw_children(
    scored: ValidLogProbs, nodes: Tensor, valid: ValidTokens, generator: torch.Generator
) -> Tensor:
    """Return the log-probabilities of one child per position, drawn by them (Gumbel-max)."""
    root = (scored.root.detach() + _gumbel(scored.root, generator)).argmax(1, keepdim=True)
    inner_nodes = nodes[nodes != 0]
    counts = valid.offsets[inner_nodes + 1] - valid.offsets[inner_nodes]
    owners = torch.arange(len(counts), device=nodes.device).repeat_interleave(counts)
    noisy = scored.inner.detach() + _gumbel(scored.inner, generator)
    best = noisy.new_full((len(counts),), -torch.inf).scatter_reduce(0, owners, noisy, "amax")
    return torch.cat([scored.root.gather(1, root)[:, 0], scored.inner[noisy == best[owners]]])


def _gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return -(-uniform.clamp_min(1e-300).log()).log().to(like.device)
