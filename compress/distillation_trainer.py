"""Distillation as transformers' Trainer runs it: its loss, what it logs, and when it stops."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from compress.distill import LossWeights, distillation_loss
from compress.measure import Validation
from compress.muon import MuonWithAdamW
from compress.recipe import Optimizer
from compress.restore_callbacks import MarkComplete, ProgressBar
from compress.rows import collate
from models.compiled import as_written
from models.errors import LeanRecError
from models.losses import ValidTokens
from models.trainer import final_hidden

DIVERGED = 1.5
"""times the NLL right after the cut, or of a guess among all titles: a model beyond it has come apart"""


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the distillation and whose evaluation is a given function of the model."""

    def __init__(
        self,
        *,
        teacher_head: torch.Tensor,
        valid_tokens: ValidTokens,
        weights: LossWeights,
        validate: Callable[[PreTrainedModel], Validation],
        start: Path,
        guess: float,
        optimizer: Optimizer,
        **arguments: Any,
    ) -> None:
        super().__init__(data_collator=collate, **arguments)
        self._optimizer = optimizer
        self._teacher_head = teacher_head.to(self.args.device)
        self._valid_tokens, self._weights = valid_tokens, weights
        self._validate = validate
        self._start, self._guess = start, guess
        self._sums = torch.zeros(3, device=self.args.device)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressBar())
        self.add_callback(MarkComplete())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer; of AdamW, Trainer's."""
        if self.optimizer is None and self._optimizer == "muon":  # type: ignore[has-type]
            self.optimizer = MuonWithAdamW(
                self.model,
                rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                products=torch.bfloat16 if self.args.bf16 else torch.float32,
            )
        return super().create_optimizer(model)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        """Return the distillation loss of a batch."""
        hidden = final_hidden(model, inputs)[inputs["positions"]]
        head = self.accelerator.unwrap_model(model).get_output_embeddings().weight
        loss = distillation_loss(
            hidden,
            head,
            inputs["teacher_hidden"],
            self._teacher_head,
            nodes=inputs["nodes"],
            next_ids=inputs["next_ids"],
            valid_tokens=self._valid_tokens,
            weights=self._weights,
        )
        self._sums += torch.stack([loss.valid, loss.vocabulary, torch.ones_like(loss.valid)])
        return loss.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the two KLs since the last entry; stop a run whose loss is not finite."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self._stop("the loss is not finite")
            valid, vocabulary, count = self._sums.tolist()
            self._sums.zero_()
            logs = {**logs, "kl_valid": valid / count, "kl_vocabulary": vocabulary / count}
        super().log(logs, start_time)

    def _stop(self, reason: str) -> NoReturn:
        """Raise LeanRecError with where the best state is: a checkpoint that stays in the work directory."""
        best, metric = self.state.best_model_checkpoint, str(self.args.metric_for_best_model).upper()
        kept = (
            f"{best} (validation {metric} {self.state.best_metric:.4f})"
            if best
            else f"{self._start}, as it was before"
        )
        raise LeanRecError(
            f"restoration: diverged at step {self.state.global_step}: {reason}. The best state is kept in "
            f"{kept}. Try another --seed or fewer --restore-tokens; if it happens at once, look for extreme "
            "values in the full model"
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return `eval_nll` and `eval_kl` of the model as it is; stop a run that has come apart."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with as_written():
            found = self._validate(model)
        nll = found.nll
        first = next((entry["eval_nll"] for entry in self.state.log_history if "eval_nll" in entry), nll)
        if not nll <= DIVERGED * max(first, self._guess):
            self._stop(f"the validation NLL is {nll:.3g}, {first:.3g} at the start")
        metrics = {"eval_nll": nll, "eval_kl": found.kl}
        model.train(training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics
