"""The three stages: a cut, then restoration; each a finished step or still to do."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from compress import inputs
from compress.calibrate import CalibrationBatch
from compress.job import Run
from compress.measure import Yardstick
from compress.per_layer import prune_per_layer
from compress.prune import prune_depth, prune_mlp, prune_width
from compress.restore import RestoreSettings, restore
from compress.rows import RestorationRows, calibration_batches, make_rows
from compress.stage import StageReport
from compress.teacher import TeacherStates, cache_teacher, open_states
from compress.work import finished, load_step_model, remove_trainer_files, save_step
from models.checkpoint import load_model
from models.streams import StreamConfig

STAGES = ("width", "mlp", "depth")
HEADINGS = {
    "full": "full model: quality on validation users",
    "1-width-cut": "stage 1 of 3, heads and hidden width: cut",
    "1-width": "stage 1 of 3, heads and hidden width: restored; quality on validation users",
    "2-mlp-cut": "stage 2 of 3, MLP width: cut",
    "2-mlp": "stage 2 of 3, MLP width: restored; quality on validation users",
    "3-depth-cut": "stage 3 of 3, layers: cut",
    "3-depth": "stage 3 of 3, layers: restored; quality on validation users",
}
CALIBRATION_BATCH_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the stages work with."""

    run: Run
    work: Path
    processes: PartialState
    teacher: PreTrainedModel
    head: torch.Tensor
    """the teacher's, fp32 `[vocabulary, hidden]`"""
    rows: RestorationRows
    states: TeacherStates
    batches: list[CalibrationBatch]
    yardstick: Yardstick


def step_names() -> tuple[str, ...]:
    """Return the step that ends each stage; its cut has the same name with `-cut`."""
    return tuple(f"{number}-{stage}" for number, stage in enumerate(STAGES, 1))


def run_stages(run: Run, work: Path, processes: PartialState) -> None:
    """Do what is not finished of: the full model's measures, then cut and restoration of each stage.

    The main process cuts and measures; all processes read with the teacher and restore.
    """
    teacher = load_model(run.full, torch.float32, run.device)
    if run.trimmed:
        teacher = run.trimmed.slice(teacher)
    rows = make_rows(
        run.data.train,
        run.teacher,
        StreamConfig(),
        tokens=round(run.tokens * max(run.recipe.stage_shares)),
        epochs=run.recipe.drawings,
        seed=run.seed,
    )
    begun = time.monotonic()
    cache_teacher(
        teacher,
        rows,
        work / "teacher",
        process=processes.process_index,
        processes=processes.num_processes,
    )
    processes.wait_for_everyone()
    if processes.is_main_process and finished(work, "read") is None:
        save_step(work, "read", {"seconds": time.monotonic() - begun})
    validation = inputs.some_examples(run.data.valid, run.recipe.validation_users, run.seed)
    bench = Bench(
        run=run,
        work=work,
        processes=processes,
        teacher=teacher,
        head=teacher.get_output_embeddings().weight.detach().clone(),
        rows=rows,
        states=open_states(rows, work / "teacher"),
        batches=calibration_batches(rows, run.recipe.calibration_rows, CALIBRATION_BATCH_ROWS, run.device),
        yardstick=Yardstick(run.teacher, validation),
    )
    _step(bench, "full", lambda: ({"metrics": bench.yardstick.measure(teacher)}, None))
    for stage, name in enumerate(step_names()):
        if finished(work, name) is None:
            _cut(bench, stage, name)
            _restore(bench, stage, name)


def _cut(bench: Bench, stage: int, name: str) -> None:
    def make() -> tuple[dict[str, Any], PreTrainedModel]:
        shape, trie = bench.run.plan.stages[stage], bench.run.teacher.trie
        model: PreTrainedModel
        told: StageReport
        before = bench.teacher
        if stage:
            before = load_step_model(bench.work, step_names()[stage - 1]).to(bench.run.device)
        if bench.run.layout == "per-layer":
            model, told = prune_per_layer(
                STAGES[stage], before, bench.run.plan, bench.batches, trie, seed=bench.run.seed
            )
        elif stage == 0:
            model, told = prune_width(before, shape, bench.batches, trie, seed=bench.run.seed)
        elif stage == 1:
            model, told = prune_mlp(before, shape, bench.batches, trie, seed=bench.run.seed)
        else:
            model, told = prune_depth(before, shape, bench.batches, trie)
        return {"metrics": bench.yardstick.measure(model), "surgery": told.to_json()}, model

    _step(bench, f"{name}-cut", make)


def _restore(bench: Bench, stage: int, name: str) -> None:
    run = bench.run
    begun = time.monotonic()
    set_seed(run.seed)
    trainer_files = bench.work / f"{name}.trainer"
    result = restore(
        bench.work / f"{name}-cut",
        teacher_head=bench.head,
        states=bench.states,
        rows=bench.rows,
        trie=run.teacher.trie,
        validate=bench.yardstick.nll,
        directory=trainer_files,
        settings=RestoreSettings(
            tokens=round(run.tokens * run.recipe.stage_shares[stage]),
            learning_rate=run.recipe.learning_rates[stage],
            batch_rows=max(1, run.recipe.batch_tokens // bench.rows.row_tokens),
            seed=run.seed + stage,
            device=run.device,
            weights=run.recipe.weights_for(run.full.training),
        ),
    )

    def make() -> tuple[dict[str, Any], PreTrainedModel]:
        metrics = bench.yardstick.measure(result.model.to(run.device))
        return {
            **asdict(result.course),
            "metrics": metrics,
            "seconds": time.monotonic() - begun,
        }, result.model

    _step(bench, name, make)
    if bench.processes.is_main_process:
        remove_trainer_files(trainer_files)


def _step(bench: Bench, name: str, make: Callable[[], tuple[dict[str, Any], PreTrainedModel | None]]) -> None:
    """Let the main process do a step unless it is finished; the others wait for it."""
    if bench.processes.is_main_process and finished(bench.work, name) is None:
        print(HEADINGS[name], file=sys.stderr, flush=True)
        set_seed(bench.run.seed)
        begun = time.monotonic()
        facts, model = make()
        save_step(bench.work, name, {"seconds": time.monotonic() - begun, **facts}, model)
    bench.processes.wait_for_everyone()
