"""What a restoration learns from depends on what the full model was taught."""

import pytest
import torch

from benchmarks.quality.ablations import ABLATIONS
from compress import cli
from compress.distill import LossWeights, distillation_loss
from compress.recipe import RECIPES, Recipe
from models.losses import ValidTokens
from models.trie import build_trie


def test_a_model_trained_on_valid_tokens_teaches_only_those() -> None:
    recipe = Recipe()
    assert recipe.weights_for({"settings": {"loss": "valid"}}) == LossWeights(valid=1.0, vocabulary=0.0)
    both = LossWeights(valid=0.5, vocabulary=0.5)
    assert recipe.weights_for({"settings": {"loss": "vocabulary"}}) == both
    assert recipe.weights_for({"data": "mine"}) == both  # trained elsewhere
    own = Recipe(weights=LossWeights(targets=1.0))
    assert own.weights_for({"settings": {"loss": "valid"}}) == LossWeights(targets=1.0)


def test_a_term_without_weight_has_no_part_in_the_loss() -> None:
    torch.manual_seed(0)
    trie = build_trie([[1, 3], [1, 4], [2, 3]], torch.zeros(3).numpy(), ["a", "b", "c"])
    head, hidden = torch.randn(6, 8), torch.randn(4, 8)
    nodes = torch.tensor([0, 1, -1, 0])
    # Tokens 0 and 5 begin no title: a teacher that differs from the student only there.
    teacher_head = head.clone()
    teacher_head[[0, 5]] += 3.0

    def loss(weights: LossWeights) -> float:
        parts = distillation_loss(
            *(hidden, head, hidden, teacher_head),
            nodes=nodes,
            next_ids=torch.tensor([1, 3, 3, 2]),
            valid_tokens=ValidTokens(trie),
            weights=weights,
        )
        return float(parts.total)

    assert loss(LossWeights(valid=1.0, vocabulary=0.0)) == pytest.approx(0.0, abs=1e-6)
    assert loss(LossWeights(valid=0.5, vocabulary=0.5)) > 0.1


def test_the_rate_that_mends_falls_with_the_depth() -> None:
    width, mlp, depth = Recipe().stages
    assert [width.rate(layers) for layers in (2, 6, 12, 30)] == pytest.approx([1e-3, 1e-3, 5e-4, 2e-4])
    assert mlp.rate(30) == width.rate(30)
    assert depth.rate(30) == depth.rate(6), "weights that are made anew are trained, not mended"
    assert {stage.rate(30) for stage in RECIPES["prunerec"].stages} == {3e-4}, "as published"


def test_muon_moves_what_is_learnt_anew_and_nothing_of_the_published_method():
    def of(name):
        return [RECIPES[name].optimizer_for(stage) for stage in RECIPES[name].stages]

    assert of("leanrec") == ["adamw", "adamw", "muon"]
    assert of("random") == of("random-targets") == of("one-stage") == ["muon"]
    assert of("prunerec") == ["adamw"] * 3


def test_each_of_a_plans_cuts_gets_its_stage_and_all_tokens_are_spent():
    width, mlp, halving, depth = ("width",), ("mlp",), ("halving",), ("depth",)
    recipe = ABLATIONS["halving"]
    shallow = recipe.stages_for((width, mlp, depth))
    assert [stage.cuts for stage in shallow] == [width, mlp, depth]
    assert [stage.share for stage in shallow] == pytest.approx([0.05, 0.05, 0.9])
    deep = recipe.stages_for((width, mlp, halving, halving, depth))
    assert [stage.cuts for stage in deep] == [width, mlp, halving, halving, depth]
    assert sum(stage.share for stage in deep) == pytest.approx(1.0)


def test_the_command_offers_every_recipe() -> None:
    assert sorted(cli.RECIPES) == sorted(RECIPES)
    assert cli.parser().get_default("recipe") == "leanrec"


def test_a_large_model_of_few_titles_gets_a_token_for_each_parameter() -> None:
    assert Recipe().default_tokens(1000, parameters=500) == 4000
    assert Recipe().default_tokens(1000, parameters=9000) == 9000
