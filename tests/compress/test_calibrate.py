"""Statistics and gate scores against direct computation."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.calibrate import (
    HISTORY_WEIGHT,
    CalibrationBatch,
    CrossMoment,
    calibration_kl,
    observe,
    reference_scores,
    title_scores,
)
from compress.importance import gate_scores
from models.losses import ValidTokens


def test_weights_tell_titles_history_and_padding_apart():
    title = torch.tensor([[False, True, True, False]])
    ids = torch.zeros(1, 4, dtype=torch.long)
    batch = CalibrationBatch(ids, torch.tensor([[1, 1, 1, 0]]), ids, title)
    assert batch.weights().tolist() == [[pytest.approx(HISTORY_WEIGHT), 1.0, 1.0, 0.0]]
    # Two windows of two tokens, then padding, as packed rows have it.
    title = torch.tensor([[True, False, False, True, False, False]])
    positions = torch.tensor([[0, 1, 0, 1, 0, 0]])
    ids = torch.zeros(1, 6, dtype=torch.long)
    weights = CalibrationBatch(ids, None, ids, title, positions).weights()[0].tolist()
    assert weights == pytest.approx([1.0, HISTORY_WEIGHT, HISTORY_WEIGHT, 1.0, 0.0, 0.0])


def test_moments_equal_the_direct_sum(family_config, random_model, calibration_rows):
    model = random_model(family_config("llama-tied"))
    kept = torch.tensor([3, 40, 100])
    moment, seen = CrossMoment(kept), []
    layer = model.model.layers[2].self_attn.o_proj
    observe(model, calibration_rows, {layer: moment})
    handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in calibration_rows:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    inputs = torch.cat([x.reshape(-1, 128) for x in seen]).double()
    weights = torch.cat([batch.weights().flatten() for batch in calibration_rows]).double()
    direct = torch.einsum("nw,nk,n->wk", inputs, inputs[:, kept], weights) / weights.sum()
    torch.testing.assert_close(moment.mean, direct, rtol=1e-4, atol=1e-6)
    assert not layer._forward_pre_hooks


def test_calibration_kl_is_over_valid_tokens_per_title(
    family_config, random_model, calibration_rows, catalogue_trie
):
    valid = ValidTokens(catalogue_trie)
    teacher, other = (random_model(family_config("llama-untied"), seed) for seed in (0, 1))
    reference = reference_scores(teacher, calibration_rows, valid)
    assert calibration_kl(teacher, calibration_rows, valid, reference) == pytest.approx(0, abs=1e-6)
    total, titles = 0.0, 0
    for batch in calibration_rows:
        with torch.no_grad():
            p, q = (
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
                for model in (teacher, other)
            )
        for row, column in (batch.node_ids >= 0).nonzero().tolist():
            node = int(batch.node_ids[row, column])
            tokens = torch.from_numpy(catalogue_trie.children(node)[0]).long()
            p_log = p[row, column, tokens].log_softmax(-1)
            q_log = q[row, column, tokens].log_softmax(-1)
            total += float((p_log.exp() * (p_log - q_log)).sum())
            titles += node == 0
    assert titles > 20
    kl = calibration_kl(other, calibration_rows, valid, reference)
    assert kl == pytest.approx(total / titles, rel=1e-4)


def gated_kl(model, batch, valid, module, columns):
    """Return the KL per row that closing a gate causes, by closing it."""
    expected = reference_scores(model, [batch], valid)

    def close(_module, inputs):
        closed = inputs[0].clone()
        closed[..., columns] *= 1 - STEP
        return (closed,)

    handle = module.register_forward_pre_hook(close)
    kl = calibration_kl(model, [batch], valid, expected) * len(expected[0].root)
    handle.remove()
    return kl / len(batch.input_ids) / STEP**2


STEP = 0.03


def test_gate_scores_estimate_the_kl_of_closing_a_gate(
    family_config, random_model, calibration_rows, catalogue_trie
):
    """Averaged over drawn labels, the scores are the curvature of the KL in each gate."""
    config = family_config("llama-untied", num_hidden_layers=2, hidden_size=64)
    model = random_model(config).double()
    valid, batch = ValidTokens(catalogue_trie), calibration_rows[0]
    draws = [gate_scores(model, [batch], valid, seed=seed)[0] for seed in range(40)]
    heads = torch.stack([draw.heads for draw in draws]).mean(0)
    direct = torch.tensor(
        [
            [
                gated_kl(model, batch, valid, layer.self_attn.o_proj, slice(32 * head, 32 * head + 32))
                for head in range(4)
            ]
            for layer in model.model.layers
        ]
    )
    ratio = heads / direct
    assert 0.9 < float(ratio.mean()) < 1.1
    assert ((ratio > 0.6) & (ratio < 1.6)).all()
    assert np.corrcoef(heads.flatten(), direct.flatten())[0, 1] > 0.9
    neurons = torch.stack([draw.neurons for draw in draws]).mean(0)
    top = int(neurons[1].argmax())
    assert float(neurons[1, top]) == pytest.approx(
        gated_kl(model, batch, valid, model.model.layers[1].mlp.down_proj, [top]), rel=0.6
    )


def test_scores_depend_on_the_seed_alone(family_config, random_model, calibration_rows, catalogue_trie):
    model, valid = random_model(family_config("qwen3")), ValidTokens(catalogue_trie)
    first, again, other = (
        gate_scores(model, calibration_rows, valid, seed=seed)[0].neurons for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(parameter.grad is None for parameter in model.parameters())
    hooks = itertools.chain.from_iterable((m._forward_hooks, m._forward_pre_hooks) for m in model.modules())
    assert not any(hooks)


def test_rows_are_scored_apart(family_config, random_model, calibration_rows, catalogue_trie):
    """Twice the same rows in one batch, or in two, give what each row gives by itself."""
    model, valid = random_model(family_config("llama-tied")), ValidTokens(catalogue_trie)
    batch = calibration_rows[0]
    halves = [
        replace(
            batch,
            input_ids=batch.input_ids[part],
            node_ids=batch.node_ids[part],
            title_mask=batch.title_mask[part],
        )
        for part in (slice(0, 3), slice(3, 6))
    ]
    with torch.no_grad():
        whole = title_scores(model, batch, valid).root
        apart = torch.cat([title_scores(model, half, valid).root for half in halves])
    torch.testing.assert_close(whole, apart, rtol=1e-4, atol=1e-5)
