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

from compress.calibrate import CalibrationBatch, hooked, last_hidden, valid_log_probs, valid_tokens
from models.trie import Trie


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
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], trie: Trie, *, seed: int
) -> Importance:
    """Return the scores of all units from one forward and one backward per batch.

    Rows are independent, so one backward gives every row its own gradient.
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
    with hooked(handles), torch.enable_grad():
        for batch in batches:
            for captured in seen.values():
                captured.clear()
            valid = valid_tokens(batch.node_ids, trie)
            log_probs = valid_log_probs(model, last_hidden(model, batch), valid)
            drawn = _sample(log_probs.detach(), valid.owners, len(valid.positions), generator)
            units = [*seen["heads"], *seen["neurons"], *seen["norms"]]
            gradients = torch.autograd.grad(log_probs[drawn].sum(), units)
            # Sum over time of <a, gradient>, per row and unit.
            slopes = [(unit.detach() * grad).sum(1) for unit, grad in zip(units, gradients, strict=True)]
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
    return Importance(heads / (2 * rows), neurons / (2 * rows), channels / (2 * rows))


def _sample(log_probs: Tensor, owners: Tensor, positions: int, generator: torch.Generator) -> Tensor:
    """Return the index of one pair per position, drawn by its probability (Gumbel-max)."""
    uniform = torch.rand(len(log_probs), generator=generator, dtype=torch.float64).to(log_probs.device)
    noisy = log_probs.double() - (-uniform.clamp_min(1e-300).log()).log()
    best = noisy.new_full((positions,), -torch.inf).scatter_reduce(0, owners, noisy, "amax")
    return (noisy == best[owners]).nonzero().squeeze(1)
