"""Stage 2: silent neurons go first, and down_proj learns to do without the others."""

from dataclasses import replace

import pytest
import torch

from compress.calibrate import calibration_kl, reference_scores
from compress.prune import prune_mlp
from models.families import Shape, non_embedding_parameters
from models.losses import ValidTokens


def logits(model, rows):
    with torch.no_grad():
        return torch.cat([model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits for b in rows])


def test_keeping_every_neuron_returns_the_same_logits(
    family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config("llama-bias"))
    same, report = prune_mlp(model, Shape.of(model.config), calibration_rows, catalogue_trie)
    assert torch.equal(logits(same, calibration_rows), logits(model, calibration_rows))
    assert report.parameters == non_embedding_parameters(model.config)


@pytest.mark.parametrize("family", ["llama-bias", "qwen3"])
def test_silent_neurons_go_first_and_cost_nothing(
    family, family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config(family))
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight[:, n % 2 :: 2] = 0
    shape = replace(Shape.of(model.config), intermediate_size=96)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned, report = prune_mlp(model, shape, calibration_rows, catalogue_trie)
    assert pruned.config.intermediate_size == 96
    assert report.kept["neurons"][0] == list(range(1, 192, 2))
    assert report.kept["neurons"][1] == list(range(0, 192, 2))
    torch.testing.assert_close(
        logits(pruned, calibration_rows), logits(model, calibration_rows), rtol=1e-4, atol=1e-4
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    quantiles = report.importances["neurons"]
    assert [len(layer) for layer in quantiles] == [101] * 4
    assert all(layer == sorted(layer) for layer in quantiles)


def test_repair_beats_plain_columns(family_config, random_model, calibration_rows, catalogue_trie):
    model = random_model(family_config("llama-untied"))
    valid = ValidTokens(catalogue_trie)
    shape = replace(Shape.of(model.config), intermediate_size=64)
    pruned, report = prune_mlp(model, shape, calibration_rows, catalogue_trie)
    reference = reference_scores(model, calibration_rows, valid)
    assert report.calibration_kl == calibration_kl(pruned, calibration_rows, valid, reference)
    with torch.no_grad():
        for n, layer in enumerate(pruned.model.layers):
            kept = report.kept["neurons"][n]
            layer.mlp.down_proj.weight.copy_(model.model.layers[n].mlp.down_proj.weight[:, kept])
    assert report.calibration_kl < 0.9 * calibration_kl(pruned, calibration_rows, valid, reference)
