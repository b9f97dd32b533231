"""The three stages: a cut, then restoration; each a finished step or still to do."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from compress.at_once import rows_at_once
from compress.calibrate import CalibrationBatch
from compress.job import Run
from compress.measure import Yardstick
from compress.per_layer import prune_per_layer
from compress.plan import Plan, shape_after
from compress.prune import prune_depth, prune_mlp, prune_width
from compress.rebuild import random_model
from compress.report import stage_names
from compress.restore import RestoreSettings, restore
from compress.rows import RestorationRows, calibration_batches, make_rows
from compress.stage import StageReport
from compress.teacher import TeacherStates, cache_teacher, open_states
from compress.work import (
    check_step_model,
    finished,
    load_step_model,
    open_array,
    remove_trainer_files,
    save_step,
    sharing,
    write_array,
)
from models.checkpoint import load_model
from models.families import Shape
from models.precision import fast_products
from models.streams import StreamConfig

CALIBRATION_BATCH_ROWS = 8
FULL_PATHS = "full-paths.npy"
"""the full model's `Yardstick.paths`"""
EVALUATIONS = 5
"""of a stage with most of the tokens"""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the stages work with."""

    run: Run
    work: Path
    shared: Path
    processes: PartialState
    teacher: PreTrainedModel
    head: torch.Tensor
    """the teacher's, fp32 `[vocabulary, hidden]`"""
    rows: RestorationRows
    states: TeacherStates
    batches: list[CalibrationBatch]
    yardstick: Yardstick


def step_names(plan: Plan) -> tuple[str, ...]:
    """Return the step that ends each stage; its cut has the same name with `-cut`."""
    return tuple(f"{number}-{name}" for number, name in enumerate(plan.stage_names, 1))


def run_stages(run: Run, work: Path, processes: PartialState) -> None:
    """Do what is not finished of: the full model's NLL, then cut and restoration of each stage.

    The main process cuts; all processes read with the teacher and restore.
    """
    shared = run.shared or work
    teacher = load_model(run.full, torch.float32, run.device)
    if run.trimmed:
        teacher = run.trimmed.slice(teacher)
    rows = make_rows(
        run.data.train,
        run.teacher,
        # Whole windows, even where the full model was trained on pieces: served contexts are whole.
        StreamConfig(keep_share=run.recipe.keep_titles),
        tokens=run.tokens,
        epochs=run.recipe.drawings,
        seed=run.seed,
    )
    with sharing(run.shared) if processes.is_main_process else contextlib.nullcontext():
        begun = time.monotonic()
        with fast_products(run.device):
            cache_teacher(
                teacher,
                rows,
                shared / "teacher",
                process=processes.process_index,
                processes=processes.num_processes,
            )
        processes.wait_for_everyone()
        if processes.is_main_process and finished(shared, "read") is None:
            save_step(shared, "read", {"seconds": time.monotonic() - begun})
    validation = run.data.valid.sample(run.recipe.validation_users, run.seed)
    bench = Bench(
        run=run,
        work=work,
        shared=shared,
        processes=processes,
        teacher=teacher,
        head=teacher.get_output_embeddings().weight.detach().clone(),
        rows=rows,
        states=open_states(rows, shared / "teacher"),
        batches=calibration_batches(
            rows,
            run.recipe.calibration_rows,
            rows_at_once(
                Shape.of(teacher.config),
                rows=CALIBRATION_BATCH_ROWS,
                row_tokens=rows.row_tokens,
                device=run.device,
            ),
            run.device,
        ),
        yardstick=Yardstick(run.teacher, validation),
    )
    with sharing(run.shared) if processes.is_main_process else contextlib.nullcontext():
        _step(
            bench,
            "full",
            "full model: NLL of validation users",
            lambda: ({"metrics": {"nll": _validated_full(bench)}}, None),
            shared,
        )
    for stage, name in enumerate(step_names(run.plan)):
        if finished(work, name) is None:
            _cut(bench, stage, name)
            _restore(bench, stage, name)


def _validated_full(bench: Bench) -> float:
    """Return the full model's NLL, having kept what it says on the way to each next item."""
    nll, paths = bench.yardstick.paths(bench.teacher)
    write_array(bench.shared / FULL_PATHS, paths)
    return nll


def _heading(run: Run, stage: int) -> str:
    names = stage_names(run.plan)
    return f"stage {stage + 1} of {len(names)}, {names[stage]}"


def _cut(bench: Bench, stage: int, name: str) -> None:
    run = bench.run

    def make() -> tuple[dict[str, Any], PreTrainedModel]:
        told: list[StageReport] = []
        if stage == 0:
            model = bench.teacher
        else:
            model = load_step_model(bench.work, step_names(run.plan)[stage - 1]).to(run.device)
        cuts = run.stages[stage].cuts
        for cut in cuts:
            before = Shape.of(model.config)
            shape = shape_after(cut, before, run.plan.stages[stage])
            if shape != before or run.layout == "per-layer":
                model, report = _pruned(bench, cut, model, shape)
                told.append(report)
        if not cuts:
            model = random_model(model.config, run.plan.stages[stage], run.seed).to(run.device)
        return {"surgery": [report.to_json() for report in told]}, model

    _step(bench, f"{name}-cut", f"{_heading(run, stage)}: cut", make)


def _pruned(
    bench: Bench, cut: str, model: PreTrainedModel, shape: Shape
) -> tuple[PreTrainedModel, StageReport]:
    recipe, batches, trie, seed = bench.run.recipe, bench.batches, bench.run.teacher.trie, bench.run.seed
    if bench.run.layout == "per-layer":
        return prune_per_layer(cut, model, bench.run.plan, batches, trie, seed=seed)
    if cut == "width":
        return prune_width(model, shape, batches, trie, seed=seed, method=recipe.method)
    if cut == "mlp":
        return prune_mlp(model, shape, batches, trie, seed=seed, method=recipe.method)
    return prune_depth(model, shape, batches, trie, by=recipe.layers_by)


def _restore(bench: Bench, stage: int, name: str) -> None:
    run = bench.run
    begun = time.monotonic()
    set_seed(run.seed)
    trainer_files = bench.work / f"{name}.trainer"
    check_step_model(bench.work, f"{name}-cut")
    full_paths = open_array(bench.shared / FULL_PATHS, bench.shared / "full")
    result = restore(
        bench.work / f"{name}-cut",
        teacher_head=bench.head,
        states=bench.states,
        rows=bench.rows,
        trie=run.teacher.trie,
        validate=lambda model: bench.yardstick.validation(model, full_paths),
        directory=trainer_files,
        settings=RestoreSettings(
            tokens=round(run.tokens * run.stages[stage].share),
            learning_rate=run.stages[stage].rate(run.plan.stages[stage].num_layers),
            keep=run.stages[stage].keep,
            batch_rows=max(1, run.recipe.batch_tokens // bench.rows.row_tokens),
            # What a stage of a few steps leaves is cut again: one evaluation says whether it helped.
            evaluations=EVALUATIONS if run.stages[stage].share > 0.5 else 1,
            seed=run.seed + stage,
            device=run.device,
            weights=run.recipe.weights_for(run.full.training),
            optimizer=run.recipe.optimizer_for(run.stages[stage]),
        ),
    )

    def make() -> tuple[dict[str, Any], PreTrainedModel]:
        return {**asdict(result.course), "seconds": time.monotonic() - begun}, result.model

    _step(bench, name, f"{_heading(run, stage)}: restored", make)
    if bench.processes.is_main_process:
        remove_trainer_files(trainer_files)


def _step(
    bench: Bench,
    name: str,
    heading: str,
    make: Callable[[], tuple[dict[str, Any], PreTrainedModel | None]],
    place: Path | None = None,
) -> None:
    """Let the main process do a step unless it is finished; the others wait for it."""
    place = place or bench.work
    if bench.processes.is_main_process and finished(place, name) is None:
        print(heading, file=sys.stderr, flush=True)
        set_seed(bench.run.seed)
        begun = time.monotonic()
        with fast_products(bench.run.device):
            facts, model = make()
        save_step(place, name, {"seconds": time.monotonic() - begun, **facts}, model)
    bench.processes.wait_for_everyone()
