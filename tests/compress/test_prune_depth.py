"""Stage 3: layers that do nothing go first, layer 0 never."""

from dataclasses import replace

import pytest
import torch

from compress.calibrate import calibration_kl, reference_scores
from compress.prune import prune_depth
from compress.stage import StageReport
from models.families import Shape
from models.losses import ValidTokens


def logits(model, rows):
    with torch.no_grad():
        return torch.cat([model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits for b in rows])


def with_silent_layers(model, silent):
    with torch.no_grad():
        for n in silent:
            for output in (model.model.layers[n].self_attn.o_proj, model.model.layers[n].mlp.down_proj):
                output.weight.zero_()
                if output.bias is not None:
                    output.bias.zero_()
    return model


@pytest.mark.parametrize("family", ["llama-bias", "qwen2", "qwen3"])
def test_silent_layers_go_first_and_cost_nothing(
    family, family_config, random_model, calibration_rows, catalogue_trie
):
    model = with_silent_layers(random_model(family_config(family)), (1, 2))
    shape = replace(Shape.of(model.config), num_layers=2)
    pruned, report = prune_depth(model, shape, calibration_rows, catalogue_trie)
    assert sorted(report.dropped_layers) == [1, 2]
    assert report.kept["layers"] == [[0, 3]]
    assert report.calibration_kl == pytest.approx(0, abs=1e-6)
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 2
    torch.testing.assert_close(logits(pruned, calibration_rows), logits(model, calibration_rows))


def test_layer_0_stays_even_if_it_does_nothing(family_config, random_model, calibration_rows, catalogue_trie):
    model = with_silent_layers(random_model(family_config("mistral")), (0,))
    shape = replace(Shape.of(model.config), num_layers=1)
    _, report = prune_depth(model, shape, calibration_rows, catalogue_trie)
    assert report.kept["layers"] == [[0]]


def test_every_round_drops_the_layer_missed_least(
    family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config("llama-tied"))
    model.generation_config.eos_token_id = [7, 8]
    shape = replace(Shape.of(model.config), num_layers=2)
    pruned, report = prune_depth(model, shape, calibration_rows, catalogue_trie)
    first, second = report.importances["layers"]
    assert first[0] == second[0] == second[report.dropped_layers[0]] == -1
    for kls, dropped in zip((first, second), report.dropped_layers, strict=True):
        assert kls[dropped] == min(kl for kl in kls if kl >= 0)
    valid = ValidTokens(catalogue_trie)
    reference = reference_scores(model, calibration_rows, valid)

    def kl_of(kept):
        layers = torch.nn.ModuleList([model.model.layers[n] for n in kept])
        whole, model.model.layers = model.model.layers, layers
        kl = calibration_kl(model, calibration_rows, valid, reference)
        model.model.layers = whole
        return kl

    # Trying every layer in every round finds the same.
    assert report.dropped_layers[0] == min((1, 2, 3), key=lambda n: kl_of([m for m in range(4) if m != n]))
    left = [n for n in range(4) if n != report.dropped_layers[0]]
    assert report.dropped_layers[1] == min(left[1:], key=lambda n: kl_of([m for m in left if m != n]))
    assert report.calibration_kl == pytest.approx(
        calibration_kl(pruned, calibration_rows, valid, reference), rel=1e-5
    )
    assert pruned.generation_config.eos_token_id == [7, 8]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3"])
def test_trials_that_begin_at_a_known_state_find_what_whole_runs_find(
    family, family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config(family, num_hidden_layers=11))
    # As in compression: two windows packed into each row.
    packed = replace(calibration_rows[0], position_ids=torch.arange(40).remainder(20).expand(6, 40))
    rows = [packed, *calibration_rows]
    runs = 0

    def count(_module, _inputs):
        nonlocal runs
        runs += 1

    handles = [layer.register_forward_pre_hook(count) for layer in model.model.layers]
    _, report = prune_depth(model, replace(Shape.of(model.config), num_layers=3), rows, catalogue_trie)
    for handle in handles:
        handle.remove()
    valid = ValidTokens(catalogue_trie)
    reference = reference_scores(model, rows, valid)
    whole, left, whole_runs = model.model.layers, list(range(11)), 11
    for tried, dropped in zip(report.importances["layers"], report.dropped_layers, strict=True):
        for layer in (n for n in range(11) if tried[n] >= 0):
            model.model.layers = torch.nn.ModuleList([whole[n] for n in left if n != layer])
            kl = calibration_kl(model, rows, valid, reference)
            assert tried[layer] == pytest.approx(kl, rel=1e-5)
            whole_runs += len(left) - 1
        left.remove(dropped)
    model.model.layers = whole
    assert runs < 0.8 * whole_runs * len(rows)


def test_the_report_is_json(family_config, random_model, calibration_rows, catalogue_trie):
    import json

    model = random_model(family_config("llama-tied"))
    shape = replace(Shape.of(model.config), num_layers=3)
    _, report = prune_depth(model, shape, calibration_rows, catalogue_trie)
    assert isinstance(report, StageReport)
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert told["dropped_layers"] == list(report.dropped_layers)
    assert told["name"] == "depth"
