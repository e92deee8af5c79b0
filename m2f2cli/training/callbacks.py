"""What happens around the Trainer's steps: epochs, running average, saved states, reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from m2f2cli.training.epochs import BatchSampler
from m2f2cli.training.objective import Objective

Advance = Callable[[int, str], None]
Notify = Callable[[str], None]


class Housekeeping(TrainerCallback):
    """Tells the sampler its epoch, seeds steps, measures and saves states within epochs.

    Args:
        sampler: Of the training batches.
        save_steps: Steps between saved states within an epoch; 0 for none.
        steps_per_epoch: Optimiser steps an epoch.
        eval_steps: Steps between measurements within an epoch; 0 for none.
    """

    def __init__(
        self,
        sampler: BatchSampler,
        *,
        save_steps: int,
        steps_per_epoch: int,
        eval_steps: int = 0,
    ) -> None:
        self.sampler = sampler
        self.save_steps = save_steps
        self.steps_per_epoch = steps_per_epoch
        self.eval_steps = eval_steps

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set the epoch whose pictures come next; also right when resumed inside one."""
        self.sampler.epoch = state.global_step // self.steps_per_epoch

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Seed torch by the step's number: what dropout draws hangs on nothing before it."""
        torch.manual_seed(hash((args.seed, args.process_index, state.global_step)))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log the loss before the epoch is measured."""
        control.should_log = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for figures and a saved state, in this order; an epoch's last step has them anyway.

        The loss is logged before, or a resumed run would know nothing of it.
        """
        if state.global_step % self.steps_per_epoch == 0:
            return
        if self.eval_steps and state.global_step % self.eval_steps == 0:
            control.should_log = control.should_evaluate = True
        if self.save_steps and state.global_step % self.save_steps == 0:
            control.should_log = control.should_save = True


class Averaging(TrainerCallback):
    """Keeps the running average of the weights, where there is one.

    Args:
        objective: What trains.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the new weights into the running average."""
        if self.objective.average is not None:
            self.objective.average.update(self.objective.detector)


class Reporter(TrainerCallback):
    """Moves a progress bar and says one line an epoch.

    Args:
        advance: Called with steps done and the words beside the bar.
        notify: Called with a line for people.
    """

    def __init__(self, advance: Advance, notify: Notify) -> None:
        self.advance = advance
        self.notify = notify
        self.loss = float("nan")
        self.auc = float("nan")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Skip what a resumed run has behind it."""
        self.advance(state.global_step, "")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar by one step."""
        words = [f"loss {self.loss:.3f}"] if self.loss == self.loss else []
        words += [f"AUC {self.auc:.3f}"] if self.auc == self.auc else []
        self.advance(1, "  ".join(words))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Remember the loss; say the validation figures."""
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        self.auc = logs.get("eval_auc", self.auc)
        if figures := self.figures(logs):
            last = round(args.num_train_epochs)
            ended, inside = divmod(state.global_step, state.max_steps // last)
            place = f"step {state.global_step}" if inside else f"epoch {ended}/{last}"
            self.notify(f"{place}: loss {self.loss:.4f}, {figures}")

    def figures(self, logs: Mapping[str, float]) -> str:
        """The validation figures in words; empty where none were measured."""
        if "eval_auc" not in logs:
            return ""
        return (
            f"validation loss {logs['eval_ce']:.4f}, "
            f"AUC {logs['eval_auc']:.4f}, AP {logs['eval_ap']:.4f}"
        )


def epoch_records(state: TrainerState) -> list[dict[str, float]]:
    """The run so far, one record an epoch: training loss, learning rate, validation figures."""
    records: list[dict[str, float]] = []
    losses: list[float] = []
    steps: list[int] = [0]
    rate = 0.0
    for entry in state.log_history:
        if "loss" in entry:
            losses.append(entry["loss"])
            steps.append(entry["step"])
            rate = entry["learning_rate"]
        elif "eval_auc" in entry:
            each = np.diff(steps)
            records.append(
                {
                    "epoch": round(entry["epoch"]),
                    "step": entry["step"],
                    "learning_rate": rate,
                    "loss": float(np.dot(losses, each) / each.sum()) if losses else 0.0,
                    "validation_loss": entry["eval_ce"],
                    "auc": entry["eval_auc"],
                    "ap": entry["eval_ap"],
                    "accuracy": entry["eval_accuracy"],
                }
            )
            losses, steps = [], [entry["step"]]
    return records
