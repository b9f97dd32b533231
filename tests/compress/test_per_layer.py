"""Layers that differ: units are kept where they score most, the budget is met, silent halves go first."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.calibrate import calibration_kl, reference_scores
from compress.halves import Half, assemble, halves_of, only_halves, weight_of
from compress.importance import gate_scores
from compress.per_layer import prune_per_layer
from compress.per_layer_depth import drop_halves
from compress.per_layer_mlp import fitting_widths
from compress.plan import make_plan
from compress.shares import share, share_heads, share_width
from compress.unit_scores import unit_scores
from compress.verify import read_weights
from models.errors import LeanRecError
from models.families import Shape, Traits, config_parameters, count_parameters
from models.losses import ValidTokens
from models.per_layer import LayerShape, PerLayerShape
from models.per_layer_model import per_layer_config

FAMILIES = ("llama-untied", "llama-bias", "qwen2", "qwen3")


def logits(model, rows):
    with torch.no_grad():
        return torch.cat([model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits for b in rows])


def as_per_layer(model):
    """The same model under LeanRec's own class."""
    full = Shape.of(model.config)
    layer = LayerShape(full.num_heads, full.num_kv_heads, full.intermediate_size)
    shape = PerLayerShape(full.hidden_size, full.head_dim, (layer,) * full.num_layers)
    return assemble(model, model.state_dict(), halves_of(shape))


@pytest.fixture(scope="module")
def pruned(family_config, random_model, calibration_rows, catalogue_trie, tmp_path_factory):
    """Return for each family the plan, the models and reports of the cuts, and where the last was saved."""
    results = {}
    for family in FAMILIES:
        model = random_model(family_config(family))
        plan = make_plan(model.config, "10%")
        models, reports = [], []
        for cut in ("width", "mlp", "depth"):
            model, report = prune_per_layer(cut, model, plan, calibration_rows, catalogue_trie, seed=0)
            models.append(model)
            reports.append(report)
        directory = tmp_path_factory.mktemp(family)
        model.save_pretrained(directory)
        results[family] = plan, models, reports, directory
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_the_uniform_plans(family, pruned):
    plan, (width, mlp, final), reports, directory = pruned[family]
    counts = read_weights(directory).counts
    assert counts == config_parameters(final.config)
    assert 0.99 * plan.budget < counts.non_embedding <= plan.budget
    assert counts.total == sum(parameter.numel() for parameter in final.parameters())
    assert [report.parameters for report in reports] == [
        config_parameters(model.config).non_embedding for model in (width, mlp, final)
    ]
    shapes = [PerLayerShape.of(model.config.to_dict()) for model in (width, mlp, final)]
    assert {shape.hidden_size for shape in shapes} == {plan.final.hidden_size}
    assert shapes[0].kv_heads == plan.full.num_layers * plan.final.num_kv_heads
    for shape in shapes:
        assert all(layer.num_heads or layer.intermediate_size for layer in shape.layers)
        for layer in shape.layers:
            assert layer.num_heads == layer.num_kv_heads * plan.final.heads_per_group
    uniform = count_parameters(replace(plan.final, num_layers=plan.full.num_layers), plan.traits)
    most = max(uniform.non_embedding, plan.budget)
    assert 0.99 * most < reports[1].parameters <= most


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reloads_it_with_equal_logits(family, pruned, calibration_rows):
    _, models, _, directory = pruned[family]
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(reloaded, calibration_rows), logits(models[-1], calibration_rows))


def test_layers_come_out_different(pruned):
    for _, (width, mlp, _), _, _ in pruned.values():
        assert len({layer.num_kv_heads for layer in shape_of(width).layers}) > 1
        assert len({layer.intermediate_size for layer in shape_of(mlp).layers}) > 1
    assert any(
        not layer.num_heads for _, models, _, _ in pruned.values() for layer in shape_of(models[-1]).layers
    )


def shape_of(model):
    return PerLayerShape.of(model.config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_own_class_computes_what_the_family_does(family, family_config, random_model, calibration_rows):
    model = random_model(family_config(family))
    torch.testing.assert_close(logits(as_per_layer(model), calibration_rows), logits(model, calibration_rows))


@pytest.mark.parametrize("family", ["llama-bias", "qwen2", "qwen3"])
def test_everything_kept_changes_nothing(
    family, family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config(family))
    plan = make_plan(model.config, "50%")
    plan = replace(plan, budget=plan.full_count, stages=(plan.full,) * 3)
    same = model
    for cut in ("width", "mlp", "depth"):
        same, report = prune_per_layer(cut, same, plan, calibration_rows, catalogue_trie, seed=0)
        assert report.calibration_kl == pytest.approx(0, abs=1e-6)
    assert config_parameters(same.config).non_embedding == plan.full_count
    torch.testing.assert_close(
        logits(same, calibration_rows), logits(model, calibration_rows), rtol=1e-3, atol=1e-3
    )


def test_silent_halves_go_first_and_cost_nothing(
    family_config, random_model, calibration_rows, catalogue_trie
):
    model = random_model(family_config("llama-tied"))
    silent = {Half(0, "attention"), Half(1, "mlp"), Half(2, "attention"), Half(3, "mlp")}
    with torch.no_grad():
        for half in silent:
            layer = model.model.layers[half.layer]
            (layer.self_attn.o_proj if half.kind == "attention" else layer.mlp.down_proj).weight.zero_()
    same = as_per_layer(model)
    shape = shape_of(same)
    left = [half for half in halves_of(shape) if half not in silent]
    budget = config_parameters(assemble(same, same.state_dict(), left).config).non_embedding
    pruned, report = drop_halves(same, budget, calibration_rows, catalogue_trie, seed=0)
    assert report.kept == {"attention": [[1, 3]], "mlp": [[0, 2]]}
    assert report.calibration_kl == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(logits(pruned, calibration_rows), logits(model, calibration_rows))
    # MLP of 0; attention of 1 with the MLP of 2; attention of 3: three layers do what four did.
    heads = shape.layers[0].num_heads, shape.layers[0].num_kv_heads
    width = shape.layers[0].intermediate_size
    assert shape_of(pruned).layers == (
        LayerShape(0, 0, width),
        LayerShape(*heads, width),
        LayerShape(*heads, 0),
    )
    assert len(same.model.layers) == 4
    assert all(layer.self_attn is not None and layer.mlp is not None for layer in same.model.layers)


def test_every_round_drops_the_half_that_costs_least_for_its_size(
    family_config, random_model, calibration_rows, catalogue_trie
):
    model = as_per_layer(random_model(family_config("mistral")))
    shape, traits = shape_of(model), Traits.of(model.config)
    valid = ValidTokens(catalogue_trie, model.device)
    reference = reference_scores(model, calibration_rows, valid)
    halves = halves_of(shape)
    price, kls = {}, []
    for half in halves:
        with only_halves(model, [other for other in halves if other != half]):
            kl = calibration_kl(model, calibration_rows, valid, reference)
        lost = (
            count_parameters(shape, traits).non_embedding
            - config_parameters(
                assemble(model, model.state_dict(), [other for other in halves if other != half]).config
            ).non_embedding
        )
        kls.append(kl)
        price[half] = kl / lost
    cheapest = min(price, key=price.get)
    count = count_parameters(shape, traits).non_embedding
    _, report = drop_halves(model, count * 85 // 100, calibration_rows, catalogue_trie, seed=0)
    gone = set(halves) - {Half(n, kind) for kind in ("attention", "mlp") for n in report.kept[kind][0]}
    assert cheapest in gone
    assert report.importances["halves"][0] == pytest.approx(kls)


@pytest.mark.slow
def test_trials_of_halves_that_begin_at_a_known_state_find_what_whole_runs_find(
    family_config, random_model, calibration_rows, catalogue_trie
):
    model = as_per_layer(random_model(family_config("qwen3", num_hidden_layers=10)))
    valid = ValidTokens(catalogue_trie, model.device)
    reference = reference_scores(model, calibration_rows, valid)
    shape, traits = shape_of(model), Traits.of(model.config)
    halves = halves_of(shape)
    weight = {half: weight_of(half, shape, traits) for half in halves}
    count = count_parameters(shape, traits).non_embedding
    _, report = drop_halves(model, count // 2, calibration_rows, catalogue_trie, seed=0)
    rounds = report.importances["halves"]
    assert len(rounds) > 6
    left, kl = list(halves), 0.0
    for table in rounds:
        tried = {half: found for half, found in zip(halves, table, strict=True) if found >= 0}
        for half, found in tried.items():
            with only_halves(model, [other for other in left if other != half]):
                assert found == pytest.approx(
                    calibration_kl(model, calibration_rows, valid, reference), rel=1e-5
                )
        price = {half: max(found - kl, 0.0) / weight[half] for half, found in tried.items()}
        gone = min(price, key=lambda half: (price[half], -weight[half]))
        left.remove(gone)
        kl = tried[gone]


def test_unit_scores_are_the_gate_scores(family_config, random_model, calibration_rows, catalogue_trie):
    model = random_model(family_config("qwen3"))
    valid = ValidTokens(catalogue_trie, model.device)
    expected, answers = gate_scores(model, calibration_rows, valid, seed=3)
    outputs = [layer.mlp.down_proj for layer in model.model.layers]
    found, same = unit_scores(model, outputs, calibration_rows, valid, seed=3)
    torch.testing.assert_close(torch.stack(found), expected.neurons)
    reference = reference_scores(model, calibration_rows, valid)
    for scored, again, plain in zip(answers, same, reference, strict=True):
        assert not scored.root.requires_grad
        for name in ("root", "inner"):
            torch.testing.assert_close(getattr(scored, name), getattr(plain, name))
            torch.testing.assert_close(getattr(again, name), getattr(plain, name))


def test_units_are_kept_where_they_score_most():
    assert share([torch.tensor([9.0, 1.0]), torch.tensor([8.0, 7.0])], 3) == [1, 2]
    assert share([torch.tensor([9.0, 8.0]), torch.tensor([2.0, 1.0])], 2) == [2, 0]
    assert share([torch.tensor([9.0, 8.0]), torch.tensor([2.0, 1.0])], 2, least=1) == [1, 1]
    scores = [torch.tensor([1.0, 9.0, 9.0, 1.0]), torch.tensor([6.0, 6.0, 2.0, 2.0])]
    assert share_width(scores, 4, 2) == [2, 2]
    assert share_width(scores, 7, 2) == [2, 4]


def test_a_group_is_worth_its_best_heads():
    # Two groups of two heads; one head of each kept group stays, two groups in all of the two layers.
    full = Shape(2, 64, 4, 2, 32, 64)
    kept = replace(full, num_heads=1, num_kv_heads=1)
    scores = torch.tensor([[5.0, 0.0, 3.0, 3.0], [1.0, 1.0, 0.0, 4.0]])
    heads = share_heads(scores, full, kept, least=0)
    assert [groups.tolist() for groups in heads.groups] == [[0], [1]]
    assert [chosen.tolist() for chosen in heads.query_heads] == [[0], [3]]
    heads = share_heads(scores + torch.tensor([[9.0], [0.0]]), full, kept, least=0)
    assert [chosen.tolist() for chosen in heads.query_heads] == [[0, 2], []]


def test_widths_that_cannot_meet_the_budget_are_told():
    shape = PerLayerShape(64, 32, (LayerShape(2, 1, 2), LayerShape(2, 1, 2)))
    traits = Traits("leanrec", 96, True, False, False, False, False)
    scores = {n: torch.rand(2, dtype=torch.float64) for n in range(2)}
    most = count_parameters(shape, traits).non_embedding
    assert fitting_widths(shape, traits, scores, most) == {0: 2, 1: 2}
    with pytest.raises(LeanRecError, match=r"per-layer.*slightly larger target"):
        fitting_widths(shape, traits, scores, 1000)


def test_the_config_says_each_layers_shape(family_config):
    shape = PerLayerShape(64, 32, (LayerShape(0, 0, 16), LayerShape(4, 2, 0), LayerShape(3, 3, 48)))
    config = per_layer_config(family_config("llama-tied"), shape)
    assert PerLayerShape.of(config.to_dict()) == shape
    assert [layer.skip for layer in config.per_layer_config] == [["attention"], ["mlp"], []]
