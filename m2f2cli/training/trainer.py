"""The Hugging Face Trainer, taught this project's groups, figures and saved states.

The loop, mixed precision, accumulation, clipping, processes and reports are the Trainer's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import numpy as np
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import EvalPrediction

from m2f2cli.errors import InputError, M2F2Error
from m2f2cli.metrics import average_precision, roc_auc
from m2f2cli.options.train_detector import OptimizerOptions
from m2f2cli.training.epochs import BatchSampler, Steps
from m2f2cli.training.objective import Objective
from m2f2cli.training.pictures import Batcher, MeasuringPictures, TrainingPictures
from m2f2cli.training.stages import optimiser_groups
from m2f2cli.training.states import StatefulTrainer

_BETTER_IS_LARGER = {"auc": True, "ap": True, "loss": False}


def measure(prediction: EvalPrediction) -> dict[str, float]:
    """Validation figures of (N, 2) logits: ``auc``, ``ap``, ``accuracy`` at 0.5, ``ce`` in nats.

    Raises:
        M2F2Error: The training has diverged.
    """
    logits = np.asarray(prediction.predictions, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise M2F2Error(
            "The training has diverged: the detector's answers are no longer finite numbers.",
            "Lower --learning-rate or set --max-grad-norm 1, and begin anew with --overwrite.",
        )
    labels = np.asarray(prediction.label_ids)
    margin = logits[:, 1] - logits[:, 0]
    return {
        "auc": roc_auc(labels, margin),
        "ap": average_precision(labels, margin),
        "accuracy": float(((margin > 0) == labels).mean()),
        "ce": float(np.logaddexp(0.0, np.where(labels == 1, -margin, margin)).mean()),
    }


class DetectorTrainer(StatefulTrainer):
    """A Trainer for ``Objective``.

    Args:
        objective: What is trained.
        arguments: The Trainer's settings.
        options: Learning rates, schedule, selection, early stop.
        pictures: What to train on.
        measured: What to measure on after each epoch.
        mixup: Alpha of mixup.

    Attributes:
        sampler: Which training items come in which batch of this process.
    """

    model: Objective
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        objective: Objective,
        arguments: TrainingArguments,
        *,
        options: OptimizerOptions,
        pictures: TrainingPictures,
        measured: MeasuringPictures,
        mixup: float,
    ) -> None:
        self.options = options
        steps = Steps(
            len(pictures),
            options.batch_size,
            options.gradient_accumulation_steps,
            arguments.world_size,
        )
        self.sampler = BatchSampler(steps, arguments.process_index)
        super().__init__(
            model=objective,
            args=arguments,
            data_collator=Batcher(mixup, arguments.seed, steps),
            train_dataset=pictures,
            eval_dataset=measured,
            compute_metrics=measure,
        )
        self.remove_callback(PrinterCallback)

    def train_from(self, saved: Path | None) -> None:
        """Train from the start or from a saved state, unless that has stopped early.

        Raises:
            InputError: A picture cannot be read any more.
        """
        if saved is not None:
            self.state = TrainerState.load_from_json(str(saved / TRAINER_STATE_NAME))
            if self.gave_up(self.state):
                return
        try:
            self.train(resume_from_checkpoint=str(saved) if saved is not None else None)
        except InputError as error:  # a worker's has its whole traceback for a message
            message = error.message.rpartition(f"{InputError.__name__}: ")[2].strip()
            hint = "Mend the file and give the same command with --resume."
            raise InputError(message, error.status, hint) from error

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch."""
        return len(self.sampler.steps)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build Adam or AdamW over the stage's groups; every trainable parameter exactly once."""
        if self.optimizer is None:
            named = self.model.named_weights()
            groups = optimiser_groups(named, self.model.detector.backbone, self.options)
            covered = sum(len(group["params"]) for group in groups)
            trainable = sum(p.requires_grad for p in self.model.parameters())
            if covered != trainable:
                raise LookupError(f"{covered} of {trainable} trainable parameters are in a group.")
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.options.optimizer]
            # Names stay out: they would be saved with the state and compared by torch.
            plain = [{k: v for k, v in group.items() if k != "names"} for group in groups]
            self.optimizer = kind(plain, betas=(0.9, self.options.beta2))
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The published plateau rule on the validation loss; otherwise the Trainer's own."""
        if self.options.schedule != "plateau":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = ReduceLROnPlateau(
                optimizer or self.optimizer,
                mode="min",
                factor=self.options.plateau_factor,
                patience=self.options.plateau_patience,
                cooldown=self.options.plateau_cooldown,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if self.args.world_size > 1:  # each process has its own BatchNorm statistics; one is saved
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
        if isinstance(self.lr_scheduler, ReduceLROnPlateau) and not skip_scheduler:
            self.lr_scheduler.step(metrics["eval_ce"])
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        select = self.options.select
        if select == "last":
            better = True
            value = float(self.state.global_step)
        else:
            value = metrics["eval_ce" if select == "loss" else f"eval_{select}"]
            best = self.state.best_metric
            larger = _BETTER_IS_LARGER[select]
            better = best is None or (value > best if larger else value < best)
        if better:
            self.state.best_metric = value
            self.state.best_global_step = self.state.global_step
        if self.gave_up(self.state):
            self.control.should_training_stop = True
        return better

    def gave_up(self, state: TrainerState) -> bool:
        """Whether the selected figure has not got better for ``early_stopping_patience`` epochs."""
        waited = (state.global_step - (state.best_global_step or 0)) // self.steps_per_epoch
        return 0 < self.options.early_stopping_patience <= waited

    def kept_states(self) -> set[int]:
        """The last saved state and the best."""
        return {self.state.global_step, self.state.best_global_step}
