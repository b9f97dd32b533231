"""Restoration: the pruned model learns from the unpruned one, with transformers' Trainer."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerState, TrainingArguments

from compress.at_once import rows_at_once
from compress.distill import LossWeights
from compress.distillation_trainer import DistillationTrainer
from compress.measure import Validation
from compress.recipe import Optimizer
from compress.restore_callbacks import COMPLETE, ShrinkAndPerturb
from compress.rows import RestorationRows
from compress.teacher import TeacherStates
from compress.work import check_digests, damaged
from models.compiled import compile_layers
from models.families import Shape
from models.losses import ValidTokens
from models.precision import prefers_bf16
from models.trie import Trie

SHORT_RUN_STEPS = 100
"""A shorter run mends the pruned weights as they are, by AdamW: it has no time to make more of them, nor for
Muon's momentum."""


@dataclass(frozen=True, kw_only=True)
class RestoreSettings:
    """How one stage is restored."""

    tokens: int
    """to train on; rounded up to whole steps"""
    learning_rate: float
    keep: float = 1.0
    """of the pruned weights where training begins: `compress.shrink_perturb`"""
    batch_rows: int = 16
    warmup_share: float = 0.05
    evaluations: int
    seed: int = 0
    device: str = "cpu"
    weights: LossWeights = field(default_factory=lambda: LossWeights(valid=0.5, vocabulary=0.5))
    optimizer: Optimizer = "muon"
    """of runs that are not short"""


@dataclass(frozen=True)
class Course:
    """How a restoration went."""

    steps: int
    tokens: int
    best: int
    """the evaluation, an index of `curve`, of the state that was kept"""
    curve: list[dict[str, float]]
    """by evaluation, the first right after the cut: `tokens`, and `nll` and `kl` of `Validation`"""
    losses: list[dict[str, float]]
    """by log entry: `tokens`, `loss`, `kl_valid`, `kl_vocabulary`"""


@dataclass(frozen=True)
class Restored:
    """A model at its best validation, and the way there."""

    model: PreTrainedModel
    course: Course


def restore(
    start: Path,
    *,
    teacher_head: torch.Tensor,
    states: TeacherStates,
    rows: RestorationRows,
    trie: Trie,
    validate: Callable[[PreTrainedModel], Validation],
    directory: Path,
    settings: RestoreSettings,
) -> Restored:
    """Return the model stored in `start` after distillation, at its best validation: `start` itself counts.

    Checkpoints go to `directory`; called again after a kill, it goes on from the last whole one and gives
    the same weights.

    Args:
        teacher_head: the unpruned model's head `[vocabulary, teacher hidden]`, fp32.
        validate: what validation users say of a model. The KL decides, or the NLL where the loss has nothing
            of the full model.

    Raises:
        LeanRecError: it diverges; says where the best state is.
    """
    checkpoint = _last_checkpoint(directory)
    chosen_by = "kl" if settings.weights.has_teacher else "nll"
    student = _load(start)
    arguments = _arguments(rows, directory, settings, chosen_by=chosen_by, resumed=checkpoint is not None)
    _divide_steps(arguments, Shape.of(student.config), settings, rows.row_tokens)
    dataset = _RowsWithTeacher(rows, states)
    compile_layers(
        student,
        steps=arguments.max_steps,
        step_rows=arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
        row_tokens=rows.row_tokens,
        device=settings.device,
    )
    is_short = arguments.max_steps < SHORT_RUN_STEPS
    trainer = DistillationTrainer(
        model=student,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset,  # Trainer wants one; `evaluate` does not read it
        teacher_head=teacher_head,
        valid_tokens=ValidTokens(trie, arguments.device),
        weights=settings.weights,
        validate=validate,
        start=start,
        guess=math.log(trie.num_leaves),
        optimizer="adamw" if is_short else settings.optimizer,
    )
    if settings.keep < 1 and not is_short:
        trainer.add_callback(ShrinkAndPerturb(student, keep=settings.keep, seed=settings.seed))
    state = _state_of(checkpoint) if checkpoint else None
    if state is None or state.global_step < arguments.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.state
    tokens_a_step = settings.batch_rows * rows.mean_tokens
    curve = _entries(state.log_history, ("eval_nll", "eval_kl"), tokens_a_step)
    best_step = state.best_global_step or 0
    if curve[0][chosen_by] <= min(entry[chosen_by] for entry in curve[1:]):
        best_step = 0
    evaluated = [entry["step"] for entry in state.log_history if "eval_nll" in entry]
    course = Course(
        steps=state.global_step,
        tokens=round(state.global_step * tokens_a_step),
        best=evaluated.index(best_step),
        curve=curve,
        losses=_entries(state.log_history, ("loss", "kl_valid", "kl_vocabulary"), tokens_a_step),
    )
    if best_step == 0:
        return Restored(_load(start), course)
    best = directory / f"checkpoint-{best_step}"
    check_digests(best, _written(best / COMPLETE))
    return Restored(_load(best), course)


def training_steps(rows: RestorationRows, settings: RestoreSettings) -> tuple[int, int]:
    """Return the steps of a restoration and how many pass between evaluations; the last is evaluated."""
    wanted = max(1, math.ceil(settings.tokens / (settings.batch_rows * rows.mean_tokens)))
    every = max(1, math.ceil(wanted / settings.evaluations))
    return every * math.ceil(wanted / every), every


def _arguments(
    rows: RestorationRows, directory: Path, settings: RestoreSettings, *, chosen_by: str, resumed: bool
) -> TrainingArguments:
    steps, every = training_steps(rows, settings)
    cuda = settings.device == "cuda"
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(steps * settings.warmup_share)),
        weight_decay=0.01,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=prefers_bf16(settings.device),
        use_cpu=not cuda,
        logging_steps=max(1, every // 5),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_on_start=not resumed,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=chosen_by,
        greater_is_better=False,
        seed=settings.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        label_names=[],
        report_to="none",
        disable_tqdm=True,
    )
    # Trainer would spread one process over all GPUs with DataParallel, which splits batches by rows.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _divide_steps(
    arguments: TrainingArguments, shape: Shape, settings: RestoreSettings, row_tokens: int
) -> None:
    """Set what a process takes at once. A step's rows are the same, however they are divided."""
    mine = max(1, settings.batch_rows // arguments.world_size)
    at_once = rows_at_once(shape, rows=mine, row_tokens=row_tokens, device=settings.device)
    arguments.per_device_train_batch_size = at_once
    arguments.gradient_accumulation_steps = mine // at_once


class _RowsWithTeacher(Dataset):
    """Rows with the teacher's states of their title positions."""

    def __init__(self, rows: RestorationRows, states: TeacherStates) -> None:
        self.rows, self.states = rows, states

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "teacher_hidden": torch.from_numpy(self.states.row(index).copy())}


def _load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )


def _last_checkpoint(directory: Path) -> Path | None:
    whole = [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}")]
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if last is not None:
        check_digests(last, _written(last / COMPLETE))
    return last


def _written(mark: Path) -> dict[str, str]:
    try:
        return dict(json.loads(mark.read_text(encoding="utf-8")))
    except ValueError as error:
        raise damaged(mark, mark.parent) from error


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _entries(
    history: Sequence[dict[str, float]], names: Sequence[str], tokens_a_step: float
) -> list[dict[str, float]]:
    return [
        {"tokens": round(entry["step"] * tokens_a_step)}
        | {name.removeprefix("eval_"): round(float(entry[name]), 5) for name in names}
        for entry in history
        if names[0] in entry
    ]
