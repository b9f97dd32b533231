"""Every recipe ends at the planned shape; controls keep what they say of the full model, and no more."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from benchmarks.quality.ablations import ABLATIONS
from compress.job import Job
from compress.pipeline import prepare
from compress.recipe import RECIPES
from compress.restore import Course, Restored
from compress.stages import run_stages, step_names
from compress.work import finished, load_step_model, sharing
from models.families import Shape, count_parameters
from tests.tiny import make_tiny_recommender


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipes") / "full"
    make_tiny_recommender(directory)
    return directory


def prepared(full, recipe, shared=None, target="30%"):
    job = Job(target=target, restore_tokens=600, recipe=recipe, device="cpu", shared=shared)
    run = prepare(job, full, "cpu")
    small = replace(run.recipe, batch_tokens=512, calibration_rows=4, validation_users=10)
    return replace(run, recipe=small)


def untrained(start, **_):
    model = AutoModelForCausalLM.from_pretrained(start)
    return Restored(model, Course(steps=1, tokens=1, best=0, curve=[], losses=[]))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"leanrec"}))
def test_a_recipe_ends_at_the_planned_shape(full, recipe, tmp_path):
    run = prepared(full, recipe)
    run_stages(run, tmp_path, PartialState(cpu=True))
    names = step_names(run.plan)
    assert len(names) == len(RECIPES[recipe].stages)
    model = load_step_model(tmp_path, names[-1])
    assert Shape.of(model.config) == run.plan.final
    kept = count_parameters(run.plan.final, run.plan.traits).non_embedding
    assert 0.99 * run.plan.budget < kept <= run.plan.budget
    cuts = [told["name"] for name in names for told in finished(tmp_path, f"{name}-cut")["surgery"]]
    assert sorted(cuts) == sorted(set(cuts)), "each dimension is cut once"
    assert ("random" in recipe) == (cuts == [])


@pytest.mark.slow
def test_stages_are_restored_at_the_rate_of_their_depth(full, tmp_path, monkeypatch):
    run = prepared(full, "leanrec")
    stages = tuple(replace(stage, learning_rate=6.0 * number) for number, stage in enumerate(run.stages, 1))
    run = replace(run, stages=stages)
    rates, optimizers = [], []

    def restored(start, *, settings, **_):
        rates.append(settings.learning_rate)
        optimizers.append(settings.optimizer)
        return untrained(start)

    monkeypatch.setattr("compress.stages.restore", restored)
    monkeypatch.setattr("compress.recipe.SHALLOW", 1)
    run_stages(run, tmp_path, PartialState(cpu=True))
    layers = run.plan.full.num_layers
    assert layers > 1
    assert rates == pytest.approx([6.0 / layers, 12.0 / layers, 18.0])
    assert optimizers == ["adamw", "adamw", "muon"], "Muon where weights are learnt anew"


@pytest.mark.slow
def test_a_deep_model_loses_half_its_layers_first(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.plan.SHALLOW", 1)
    make_tiny_recommender(tmp_path / "deep", num_layers=8)
    monkeypatch.setitem(RECIPES, "halving", ABLATIONS["halving"])
    run = prepared(tmp_path / "deep", "halving", target="10%")
    assert [shape.num_layers for shape in run.plan.stages] == [8, 8, 4, 3]
    run_stages(run, tmp_path, PartialState(cpu=True))
    names = step_names(run.plan)
    assert names[2:] == ("3-halving", "4-depth")
    assert load_step_model(tmp_path, "3-halving").config.num_hidden_layers == 4
    assert Shape.of(load_step_model(tmp_path, "4-depth").config) == run.plan.final
    dropped = [finished(tmp_path, f"{name}-cut")["surgery"][0]["dropped_layers"] for name in names[2:]]
    assert [len(layers) for layers in dropped] == [4, 1]


def test_the_shapes_of_the_one_sided_recipes(full):
    everything = prepared(full, "leanrec").plan
    depth, width = prepared(full, "depth-only").plan, prepared(full, "width-only").plan
    assert depth.final.hidden_size == everything.full.hidden_size
    assert depth.final.num_layers < everything.full.num_layers
    assert width.final.num_layers == everything.full.num_layers
    assert width.final.hidden_size < everything.full.hidden_size
    assert prepared(full, "random").plan.final == prepared(full, "one-stage").plan.final == everything.final


@pytest.mark.slow
def test_random_weights_come_from_the_seed_and_not_from_the_full_model(full, tmp_path):
    def start(seed, at):
        run = replace(prepared(full, "random"), seed=seed)
        run_stages(run, tmp_path / at, PartialState(cpu=True))
        return load_step_model(tmp_path / at, "1-random-cut").state_dict()

    first, again, other = start(0, "a"), start(0, "b"), start(1, "c")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.slow
def test_runs_that_differ_in_the_recipe_share_what_the_full_model_said(full, tmp_path):
    shared = tmp_path / "shared"
    run_stages(prepared(full, "one-stage", shared), tmp_path / "one", PartialState(cpu=True))
    written = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
    assert finished(shared, "full")
    run_stages(prepared(full, "random", shared), tmp_path / "other", PartialState(cpu=True))
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == written
    assert not (tmp_path / "other" / "teacher").exists()


def test_what_is_shared_is_made_by_one_run_while_another_waits(tmp_path):
    """As two runs side by side on one GPU do."""
    order = []

    def second():
        with sharing(tmp_path / "shared"):
            order.append("second")

    with sharing(tmp_path / "shared"):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    with sharing(None):
        pass


def test_a_full_model_that_learnt_from_pieces_reads_whole_histories(full, tmp_path, monkeypatch):
    run = prepared(full, "random")
    learnt = replace(run.full, training={**run.full.training, "piece_titles": 3.0})
    run = replace(run, tokens=10**6, full=learnt, recipe=replace(run.recipe, drawings=1))

    monkeypatch.setattr("compress.stages.restore", untrained)
    run_stages(run, tmp_path, PartialState(cpu=True))
    read = sum(len(np.load(path)) for path in (tmp_path / "teacher").glob("*.npy"))
    titles = run.teacher.prompter.title_tokens
    # Pieces begin with the title that the one before ended in, so they would be read twice.
    assert read == sum(len(titles[item]) for item in run.data.train.items.tolist())
