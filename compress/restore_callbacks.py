"""What happens beside the steps of a restoration, as callbacks of transformers' Trainer."""

from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from compress.shrink_perturb import shrink_and_perturb
from compress.work import digests
from models.atomic import write_json

COMPLETE = "complete"
"""Marks a Trainer checkpoint that was written to its end, and holds its files' digests."""


class ShrinkAndPerturb(TrainerCallback):
    """Rewrites the weights before the first step, after the state right after the cut was evaluated."""

    def __init__(self, student: PreTrainedModel, *, keep: float, seed: int) -> None:
        self._student, self._keep, self._seed = student, keep, seed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 0:
            shrink_and_perturb(self._student, keep=self._keep, seed=self._seed)


class ProgressBar(TrainerCallback):
    """A progress bar with time left, loss and validation."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._notes: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="restore", unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self._bar is not None and logs:
            names = {"kl_valid": "kl", "eval_nll": "nll"}
            self._notes |= {short: f"{logs[name]:.3f}" for name, short in names.items() if name in logs}
            self._bar.set_postfix(self._notes)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class MarkComplete(TrainerCallback):
    """Marks each checkpoint once all of it is written; a kill while saving leaves one without the mark."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(directory / COMPLETE, digests(directory))
