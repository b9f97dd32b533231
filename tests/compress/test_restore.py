"""Distillation: the loss, which positions it sees, the teacher's cache, and a restoration that resumes."""

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaModel

from compress import distill
from compress.at_once import CPU_NUMBERS
from compress.distill import LossWeights, chunked_vocabulary_kl, distillation_loss
from compress.measure import Validation
from compress.muon import MuonWithAdamW
from compress.restore import SHORT_RUN_STEPS, RestoreSettings, restore, training_steps
from compress.rows import RestorationRows, collate, make_rows
from compress.shrink_perturb import shrink_and_perturb
from compress.teacher import TeacherStates, cache_teacher, open_states
from models.checkpoint import Recommender, load_model, read_recommender
from models.errors import LeanRecError
from models.losses import ValidTokens, vocabulary_cross_entropy, vocabulary_kl
from models.streams import StreamConfig
from tests.tiny import make_tiny_recommender, tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "full"
    data = make_tiny_recommender(directory)
    return read_recommender(directory), data


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_model(tiny[0])


@pytest.fixture(scope="module")
def rows(tiny):
    recommender, data = tiny
    return make_rows(data.train, recommender, StreamConfig(row_tokens=128), tokens=3000, epochs=2, seed=0)


@pytest.fixture(scope="module")
def states(teacher, rows, tmp_path_factory):
    directory = tmp_path_factory.mktemp("states")
    cache_teacher(teacher, rows, directory)
    return open_states(rows, directory)


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """The directory of a small student."""
    directory = tmp_path_factory.mktemp("student")
    vocabulary = tiny[0].config.vocab_size
    shape = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    tiny_model("llama", vocabulary, **shape, seed=5).save_pretrained(directory)
    return directory


class Bench(NamedTuple):
    recommender: Recommender
    teacher: torch.nn.Module
    rows: RestorationRows
    states: TeacherStates
    start: Path


@pytest.fixture(scope="module")
def bench(tiny, teacher, rows, states, start):
    return Bench(tiny[0], teacher, rows, states, start)


class Pair(NamedTuple):
    hidden: torch.Tensor
    head: torch.Tensor


BOTH = LossWeights(valid=0.5, vocabulary=0.5)


def loss_of(student, teacher, batch, bench, weights=BOTH):
    return distillation_loss(
        *student,
        *teacher,
        nodes=batch["nodes"],
        next_ids=batch["next_ids"],
        valid_tokens=ValidTokens(bench.recommender.trie),
        weights=weights,
    )


def head_of(model):
    return model.get_output_embeddings().weight.detach()


def final_hidden(model, batch):
    output = model.base_model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    return output.flatten(0, 1)[batch["positions"]]


def test_teacher_as_student_loses_nothing_and_a_shift_by_one_shows(bench):
    batch = collate([bench.rows[i] for i in range(4)])
    cached = torch.cat([torch.from_numpy(bench.states.row(i).copy()) for i in range(4)])
    head = head_of(bench.teacher)
    student = Pair(final_hidden(bench.teacher, batch).detach(), head)
    same = loss_of(student, Pair(cached, head), batch, bench)
    assert float(same.valid) < 1e-5
    assert float(same.vocabulary) < 1e-5
    for shift in (1, -1):
        shifted = loss_of(student, Pair(cached.roll(shift, 0), head), batch, bench)
        assert float(shifted.valid) > 0.05
        assert float(shifted.vocabulary) > 0.05


def test_every_title_token_is_seen_at_the_position_that_predicts_it(tiny, teacher, rows, states):
    """Against the naive way: the prefix alone through the model, the trie walked token by token."""
    trie = tiny[0].trie
    head = teacher.get_output_embeddings().weight.detach()
    batch = collate([rows[0]])
    ids, places = rows[0]["input_ids"].tolist(), rows[0]["position_ids"].tolist()
    cached = torch.from_numpy(states.row(0).copy()).float()
    starts = [p for p, place in enumerate(places) if place == 0 and ids[p] == tiny[0].tokenizer.bos_token_id]
    assert len(starts) > 1, "the row holds several windows, so that leaks between them would show"
    seen = set(batch["positions"].tolist())
    leaf_starts = []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        window = ids[start:stop]
        while window and window[-1] == tiny[0].tokenizer.pad_token_id:
            window.pop()
        assert {start + at for at in range(len(window) - 1)} <= seen, "first title token included"
        leaf_starts.append(start)
        title = []
        for at in range(len(window) - 1):
            position = start + at
            index = batch["positions"].tolist().index(position)
            with torch.inference_mode():
                naive = teacher(torch.tensor([window[: at + 1]])).logits[0, -1]
            assert torch.allclose(naive, cached[index] @ head.T, atol=0.05)
            node = int(batch["nodes"][index])
            following = [t for t in tiny[0].prompter.title_tokens if t[: len(title)] == title]
            choices = {t[len(title)] for t in following}
            if len(choices) > 1:
                assert trie.path(node).tolist() == title
                assert set(trie.children(node)[0].tolist()) == choices
            else:
                assert node == -1
            title = [*title, window[at + 1]]
            if title in tiny[0].prompter.title_tokens:
                title = []
    assert seen == {p for p in seen if p >= leaf_starts[0]}
    padding = [p for p, token in enumerate(ids) if token == tiny[0].tokenizer.pad_token_id]
    assert not seen & set(padding)


def test_first_title_token_has_a_gradient_and_forced_tokens_none(bench):
    batch = collate([bench.rows[0]])
    hidden = torch.randn(len(batch["positions"]), 128, requires_grad=True)
    head = head_of(bench.teacher)
    cached = torch.from_numpy(bench.states.row(0).copy())
    only_valid = LossWeights(valid=1.0, vocabulary=0.0)
    loss_of(Pair(hidden, head), Pair(cached, head), batch, bench, only_valid).total.backward()
    norms = hidden.grad.norm(dim=1)
    first = bench.rows[0]["position_ids"][batch["positions"]] == 0
    assert first.any()
    assert (norms[first] > 0).all()
    assert (norms[batch["nodes"] < 0] == 0).all()


def test_chunked_kl_has_the_value_and_gradients_of_the_plain_one(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(distill, "CHUNK_ELEMENTS", 50 * 7)
    hidden = torch.randn(23, 16, requires_grad=True)
    head = torch.randn(50, 16, requires_grad=True)
    teacher_hidden, teacher_head = torch.randn(23, 24), torch.randn(50, 24)
    plain = vocabulary_kl(teacher_hidden @ teacher_head.T, hidden @ head.T)
    wanted = torch.autograd.grad(3 * plain, (hidden, head))
    ours = chunked_vocabulary_kl(hidden, head, teacher_hidden, teacher_head)
    got = torch.autograd.grad(3 * ours, (hidden, head))
    assert torch.allclose(plain, ours, rtol=1e-5)
    for a, b in zip(wanted, got, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_logits_over_the_vocabulary_do_not_round_where_products_do():
    torch.manual_seed(0)
    hidden, head = torch.randn(23, 16), torch.randn(50, 16)
    teacher_hidden, teacher_head = hidden + 1e-3 * torch.randn(23, 16), head
    next_ids = torch.randint(50, (23,))
    plain = vocabulary_kl(teacher_hidden @ teacher_head.T, hidden @ head.T)
    missed = vocabulary_cross_entropy(hidden, head, next_ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(
            chunked_vocabulary_kl(hidden, head, teacher_hidden, teacher_head), plain, rtol=0.02
        )
        assert torch.allclose(
            distill.chunked_vocabulary_cross_entropy(hidden, head, next_ids), missed, rtol=1e-5
        )


def test_a_killed_cache_is_finished_with_the_same_bytes(teacher, rows, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cache_teacher(teacher, rows, whole)
    cache_teacher(teacher, rows, cut, process=1, processes=2)
    assert len(list(cut.iterdir())) < len(list(whole.iterdir()))
    cache_teacher(teacher, rows, cut)
    for path in whole.iterdir():
        assert path.read_bytes() == (cut / path.name).read_bytes()


def test_teacher_states_beyond_fp16_are_refused(tiny, rows, tmp_path):
    model = load_model(tiny[0])
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    with pytest.raises(LeanRecError, match="fp16"):
        cache_teacher(model, rows, tmp_path)


SETTINGS = RestoreSettings(tokens=9000, learning_rate=3e-3, batch_rows=4, evaluations=5, seed=3)


def run_restore(bench, directory, validate, settings=SETTINGS, *, start=None):
    return restore(
        start or bench.start,
        teacher_head=bench.teacher.get_output_embeddings().weight.detach().clone(),
        states=bench.states,
        rows=bench.rows,
        trie=bench.recommender.trie,
        validate=validate,
        directory=directory,
        settings=settings,
    )


def same(found):
    """A validation of which NLL and KL say the same."""
    return Validation(nll=found, kl=found)


def mean_kl(model, bench):
    """Distance from the teacher over valid tokens on all rows."""
    with torch.inference_mode():
        batch = collate([bench.rows[i] for i in range(len(bench.rows))])
        cached = torch.cat([torch.from_numpy(bench.states.row(i).copy()) for i in range(len(bench.rows))])
        hidden = final_hidden(model, batch)
        loss = loss_of(Pair(hidden, head_of(model)), Pair(cached, head_of(bench.teacher)), batch, bench)
    return float(loss.valid)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [CPU_NUMBERS, 1], ids=["whole", "in parts"])
def test_restoration_comes_closer_and_resumes_to_the_same_bytes(bench, tmp_path, monkeypatch, numbers):
    monkeypatch.setattr("compress.at_once.CPU_NUMBERS", numbers)
    calls = []

    def validate(model):
        calls.append(1)
        return same(mean_kl(model, bench))

    whole = run_restore(bench, tmp_path / "whole", validate)
    evaluations = len(whole.course.curve)
    assert len(calls) == evaluations
    first, last = whole.course.curve[0], whole.course.curve[-1]
    assert first["tokens"] == 0, "the state right after the cut is on the curve"
    assert last["kl"] < 0.8 * first["kl"]
    assert mean_kl(whole.model, bench) == pytest.approx(last["kl"], abs=1e-4)
    assert whole.course.losses[-1]["kl_valid"] < whole.course.losses[0]["kl_valid"]
    steps, every = training_steps(bench.rows, SETTINGS)
    assert whole.course.steps == steps
    assert steps % every == 0

    calls.clear()

    def killed(model):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(model)

    with pytest.raises(KeyboardInterrupt):
        run_restore(bench, tmp_path / "cut", killed)
    half = tmp_path / "cut" / f"checkpoint-{3 * every}"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")  # killed while saving
    resumed = run_restore(bench, tmp_path / "cut", validate)
    assert len(calls) == evaluations, "it went on from the third, it did not start anew"
    assert resumed.course.curve == whole.course.curve
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name

    # Finished, but its step was not saved yet: nothing is trained again.
    again = run_restore(bench, tmp_path / "cut", validate)
    assert len(calls) == evaluations
    assert torch.equal(head_of(again.model), head_of(whole.model))


def test_a_step_in_parts_is_the_step_and_no_part_is_larger_than_fits(bench, tmp_path, monkeypatch):
    seen, curves = [], []
    forward = LlamaModel.forward

    def watched(model, *args, **kwargs):
        if model.training:
            seen.append(len(kwargs["input_ids"]))
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    steps, _ = training_steps(bench.rows, SETTINGS)
    for name, numbers in (("whole", CPU_NUMBERS), ("parts", 1)):
        seen.clear()
        monkeypatch.setattr("compress.at_once.CPU_NUMBERS", numbers)
        result = run_restore(bench, tmp_path / name, lambda model: same(mean_kl(model, bench)))
        assert result.course.steps == steps
        assert max(seen) == (SETTINGS.batch_rows if name == "whole" else 1)
        curves.append([entry["kl"] for entry in result.course.curve])
    # A part's mean is over its own titles, so a row with few of them counts a little more.
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


LOSSES = {"teacher": SETTINGS.weights, "targets": LossWeights(targets=1.0)}


@pytest.mark.parametrize(
    ("loss", "kl", "best"),
    [
        ("teacher", [0.9, 0.5, 0.1, 0.2, 0.3, 0.4], 2),
        ("teacher", [0.1, 0.5, 0.3, 0.2, 0.3, 0.4], 0),
        ("targets", [0.9, 0.5, 0.1, 0.2, 0.3, 0.4], 4),
    ],
)
def test_the_state_nearest_the_full_model_is_kept_or_the_likeliest_where_the_loss_has_no_teacher(
    bench, tmp_path, loss, kl, best
):
    nll = [5.0, 4.9, 4.8, 4.7, 4.6, 4.8]
    given = iter(zip(nll, kl, strict=True))
    settings = dataclasses.replace(SETTINGS, weights=LOSSES[loss])
    result = run_restore(bench, tmp_path, lambda model: Validation(*next(given)), settings)
    assert [(entry["nll"], entry["kl"]) for entry in result.course.curve] == list(zip(nll, kl, strict=True))
    _, every = training_steps(bench.rows, SETTINGS)
    assert result.course.best == best
    kept = AutoModelForCausalLM.from_pretrained(
        tmp_path / f"checkpoint-{best * every}" if best else bench.start
    )
    assert torch.equal(head_of(result.model), head_of(kept))


@pytest.mark.slow
def test_a_long_restoration_starts_from_shrunken_weights_and_still_counts_the_cut(
    bench, tmp_path, monkeypatch
):
    monkeypatch.setattr("compress.restore.SHORT_RUN_STEPS", 1)
    seen = []

    def validate(model):
        seen.append(model.model.layers[0].mlp.down_proj.weight.detach().std().item())
        return same(mean_kl(model, bench))

    settings = dataclasses.replace(SETTINGS, keep=0.5, learning_rate=1e-9)
    made = run_restore(bench, tmp_path / "whole", validate, settings)
    start = AutoModelForCausalLM.from_pretrained(bench.start)
    assert made.course.curve[0]["kl"] == pytest.approx(mean_kl(start, bench), abs=1e-4)
    assert seen[0] == pytest.approx(start.model.layers[0].mlp.down_proj.weight.std().item())
    expected = copy.deepcopy(start)
    shrink_and_perturb(expected, keep=0.5, seed=settings.seed)
    assert seen[1] == pytest.approx(expected.model.layers[0].mlp.down_proj.weight.std().item(), rel=1e-4)

    # Killed before its first checkpoint or after it: the weights are rewritten once.
    settings = dataclasses.replace(SETTINGS, keep=0.5)
    whole = run_restore(bench, tmp_path / "b", validate, settings)
    for dies in (2, 3):
        left = iter(range(dies))

        def killed(model, left=left):
            next(left)
            return validate(model)

        with pytest.raises(StopIteration):
            run_restore(bench, tmp_path / "c", killed, settings)
    resumed = run_restore(bench, tmp_path / "c", validate, settings)
    assert resumed.course.curve == whole.course.curve
    assert torch.equal(head_of(resumed.model), head_of(whole.model))


@pytest.mark.slow
@pytest.mark.parametrize("case", [(1, "muon", 1), (1, "adamw", 0), (1000, "muon", 0)])
def test_muon_is_for_restorations_that_are_not_short(bench, tmp_path, monkeypatch, case):
    short, asked, made = case
    monkeypatch.setattr("compress.restore.SHORT_RUN_STEPS", short)
    given = []

    def muon(model, **options):
        given.append(options)
        return MuonWithAdamW(model, **options)

    monkeypatch.setattr("compress.distillation_trainer.MuonWithAdamW", muon)
    settings = dataclasses.replace(SETTINGS, tokens=600, evaluations=1, optimizer=asked)
    run_restore(bench, tmp_path, lambda model: same(1.0), settings)
    assert len(given) == made
    assert [options["rate"] for options in given] == [SETTINGS.learning_rate] * made


@pytest.mark.slow
def test_a_short_restoration_mends_the_weights_as_they_are(bench, tmp_path):
    steps, _ = training_steps(bench.rows, SETTINGS)
    assert steps < SHORT_RUN_STEPS
    halved = dataclasses.replace(SETTINGS, keep=0.5)
    kept = run_restore(bench, tmp_path / "a", lambda model: same(1.0), halved)
    plain = run_restore(bench, tmp_path / "b", lambda model: same(1.0), SETTINGS)
    assert kept.course == plain.course


def test_a_loss_that_is_not_finite_stops_with_an_error(bench, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bench.start)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "broken")
    short = dataclasses.replace(SETTINGS, tokens=100)
    with pytest.raises(LeanRecError, match=r"diverged at step \d+: the loss is not finite.*broken, as"):
        run_restore(bench, tmp_path / "work", lambda model: same(1.0), short, start=tmp_path / "broken")


def test_a_restoration_that_comes_apart_stops_and_says_where_its_best_state_is(bench, tmp_path):
    values = iter([4.0, 3.5, 3.6, 6.9])
    with pytest.raises(LeanRecError, match=r"the validation NLL is 6.9, 4 at the start") as told:
        run_restore(bench, tmp_path / "work", lambda model: same(next(values)))
    _, every = training_steps(bench.rows, SETTINGS)
    best = tmp_path / "work" / f"checkpoint-{every}"
    assert f"{best} (validation KL 3.5000)" in str(told.value)
    AutoModelForCausalLM.from_pretrained(best)
