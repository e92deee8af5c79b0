"""The training loop of all stages: optimizer steps, figures, saved states, curves, device.

A run killed at any step goes on from its last saved state and ends bit by bit as it would have:
every random draw is seeded by step, epoch and position, so a state holds weights, optimizer,
schedule and figures only. Any number of processes trains what one would on the same step's items.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import numpy as np
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import enable_full_determinism, get_scheduler

from m2f2cli.checkpoints.io import write_tensor_file
from m2f2cli.compat import forget_accelerator
from m2f2cli.environment import library_versions
from m2f2cli.errors import CheckpointError, ConfigError, InputError, MissingExtraError
from m2f2cli.options.train_detector import RunOptions
from m2f2cli.options.train_explainer import StageRunOptions
from m2f2cli.runtime import keep_freed_memory, pick_device, process_count
from m2f2cli.training.sampler import BatchSampler
from m2f2cli.training.states import (
    PROCESSES,
    claim_output,
    complete_state,
    forget_states,
    last_state,
    state_folder,
)

Advance = Callable[[int, str], None]
Notify = Callable[[str], None]
Batch = dict[str, torch.Tensor]

WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.pt"
_PROGRESS = "progress.json"
# What reading a saved state raises whose files are cut, changed or gone.
_DAMAGED = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
    *(UnpicklingError, SafetensorError),
)
_LOG_STEPS = 10
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


class Trainer(ABC):
    """Trains a model and writes the result; what differs between stages is left to them.

    Args:
        model: What trains, on the CPU or on its device.
        dataset: Training items by ``epoch * len(dataset) + position``.
        options: The whole options of the command.
        accelerator: Device, precision, processes, DeepSpeed.
        record: What goes into ``stage.json`` beside the figures.
        notify: Called with messages for the user.

    Attributes:
        steps: Optimizer steps in all.
        steps_per_epoch: Optimizer steps an epoch.
        step: Steps done.
        history: What was logged: training loss and learning rate, or ``eval_`` figures, with
            ``step`` and ``epoch``.
        best: Step and value of the best epoch, where one is selected.
    """

    collate: Callable[[Sequence[Any]], Batch]  # makes a batch of items; set by the stage
    eval_steps = 0  # between measurements within an epoch; 0 for none
    measures = True

    def __init__(
        self,
        model: nn.Module,
        *,
        dataset: Any,
        options: Any,
        accelerator: Accelerator,
        record: dict[str, Any],
        notify: Notify,
    ) -> None:
        self.model: Any = model
        self.wrapped: Any = model  # as DistributedDataParallel or DeepSpeed wraps it
        self.options = options
        self.optim = options.optimizer
        self.dataset = dataset
        self.accelerator = accelerator
        self.record = record
        self.notify = notify
        self.deepspeed = accelerator.state.deepspeed_plugin is not None
        self.sampler = BatchSampler(
            len(dataset),
            self.optim.batch_size,
            self.optim.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
            together=getattr(dataset, "together", 1),
        )
        self.steps_per_epoch = self.sampler.steps
        self.steps = self.steps_per_epoch * self.optim.epochs
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: tuple[int, float] | None = None
        self.optimizer: Any = self.build_optimizer()
        self.scheduler: Any = self.build_scheduler()
        self._loss = torch.zeros((), device=accelerator.device)
        self._logged = 0
        self._latest: dict[str, float] = {}  # of the history, the last of each figure

    @abstractmethod
    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, over every trained parameter exactly once."""

    @abstractmethod
    def loss(self, batch: Batch, total: Any) -> torch.Tensor:
        """What a batch adds to the loss of its step; ``total`` is what ``step_total`` gave.

        Their sum, averaged over the processes, is the mean over the step's items.
        """

    def step_total(self, batches: Sequence[Batch]) -> Any:
        """What ``loss`` needs to know of a whole step: here, the batches of this process."""
        return len(batches)

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Figures on what is held out, equal in every process; see the stage."""

    @abstractmethod
    def describe(self, figures: Mapping[str, float]) -> str:
        """The figures in words."""

    @abstractmethod
    def write(self) -> None:
        """Write the output; called in every process when training is over."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What of the model belongs to a saved state; called in every process."""
        found: dict[str, torch.Tensor] = self.model.state_dict()
        return found

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what ``tensors`` gave."""
        self.model.load_state_dict(tensors)

    def begin(self) -> None:  # noqa: B027 - most stages have nothing to do
        """Called before the first step, not in a resumed run."""

    def after_step(self) -> None:  # noqa: B027 - most stages have nothing to do
        """Called after each optimizer step."""

    def after_epoch(self, figures: Mapping[str, float]) -> None:  # noqa: B027 - as above
        """Called with the figures of each epoch."""

    def stopped(self) -> bool:
        """Whether training ends before its last epoch."""
        return False

    def build_scheduler(self) -> Any:
        """The learning rate over time; see ``--schedule``."""
        return get_scheduler(
            {"constant": "constant_with_warmup"}.get(self.optim.schedule, self.optim.schedule),
            self.optimizer,
            num_warmup_steps=math.ceil(self.steps * self.optim.warmup_ratio),
            num_training_steps=self.steps,
        )

    def run(self, *, advance: Advance | None = None) -> Path:
        """Train, or go on training, and write the output folder.

        ``advance`` is called after each step with the steps done and text to show beside a
        progress bar; first with the steps that a resumed run has behind it.

        Raises:
            InputError: A picture cannot be read any more.
            CheckpointError: A state or the output cannot be written.
            M2F2Error: The training has diverged.
        """
        with claim_output(self.options):
            return self._train(advance or (lambda *_: None))

    def _train(self, advance: Advance) -> Path:
        run = self.options.run
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        saved = last_state(state_folder(run.output)) if run.resume else None
        if saved is not None:
            self._load(saved)
            self.notify(f"Going on after step {self.step} of {self.steps}.")
        else:
            self.begin()
        if run.report_to == "wandb":
            project = os.environ.get("WANDB_PROJECT", "m2f2")
            self.accelerator.init_trackers(project, config=self.options.to_flat())
        else:
            self.accelerator.init_trackers("runs")
        advance(self.step, "")
        try:
            while self.step < self.steps and not self.stopped():
                self._train_epoch(advance)
        except InputError as error:  # a worker's has its whole traceback for a message
            message = error.message.rpartition(f"{InputError.__name__}: ")[2].strip()
            hint = "Repair the file and give the same command with --resume."
            raise InputError(message, error.status, hint) from error
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.write()
        if self.accelerator.is_main_process:
            forget_states(run.output)
        self.accelerator.wait_for_everyone()
        return Path(run.output)

    @cached_property
    def loader(self) -> DataLoader[Any]:
        """This process's batches; one loader for all epochs, so that its workers stay."""
        workers = self.options.data.workers
        return DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            collate_fn=self.collate,
            num_workers=workers,
            pin_memory=self.accelerator.device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def _train_epoch(self, advance: Advance) -> None:
        """Train to the end of an epoch, from its first step or from where a resumed run stands."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        self.sampler.start(epoch, first)
        batches = iter(self.loader)
        for step in range(first, self.steps_per_epoch):
            count = len(self.sampler.batches(step))
            self._train_step([self.to_device(next(batches)) for _ in range(count)])
            save_steps = self.options.run.save_steps
            ended = step + 1 == self.steps_per_epoch
            save = ended or (save_steps and self.step % save_steps == 0)
            measure = ended or (self.eval_steps and self.step % self.eval_steps == 0)
            if save or measure or self.step % min(_LOG_STEPS, self.steps_per_epoch) == 0:
                self._log_loss()
            if measure and self.measures:
                figures = self._measure()
                if ended:
                    self.after_epoch(figures)
            if save:
                self._save()
            words = {"loss": self._latest.get("loss"), "AUC": self._latest.get("eval_auc")}
            advance(1, "  ".join(f"{name} {x:.3f}" for name, x in words.items() if x is not None))

    def _train_step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over this process's batches of it."""
        seed = (self.options.run.seed, self.accelerator.process_index, self.step)
        torch.manual_seed(hash(seed))  # what dropout draws depends on nothing before the step
        self.wrapped.train()
        total = self.step_total(batches)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            if self.deepspeed:
                loss = self.loss(batch, total)
                self.wrapped.set_gradient_accumulation_boundary(is_boundary=last)
                self.wrapped.backward(loss, scale_wrt_gas=False)
            else:  # gradients are averaged over the processes with the last batch
                with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                    loss = self.loss(batch, total)
                    self.accelerator.backward(loss)
            self._loss += loss.detach()
        if self.deepspeed:
            self.wrapped.step()
            self._norm = self.wrapped.get_global_grad_norm()
        else:
            limit = self.optim.max_grad_norm or math.inf
            self._norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.after_step()
        self._rate = self.scheduler.optimizer.param_groups[0]["lr"]
        skipped = not self.deepspeed and self.accelerator.optimizer_step_was_skipped
        if not skipped and not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.step += 1

    def to_device(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """A batch on the device; under DeepSpeed, which has no autocast, in the model's type."""
        moved = send_to_device(dict(batch), self.accelerator.device)
        if self.deepspeed:
            dtype = self.wrapped.get_data_types()[0]
            moved = {k: t.to(dtype) if t.is_floating_point() else t for k, t in moved.items()}
        return moved

    def share(self, items: Sequence[Any]) -> Iterator[list[tuple[Any, bool]]]:
        """This process's share of held-out items, in batches; and which of them count.

        Every process gets as many: process p has items p, p + processes, …; the last ones are
        repeats, which do not count, where the items do not divide evenly.
        """
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        places = range(process, -(-len(items) // processes) * processes, processes)
        mine = [(items[place % len(items)], place < len(items)) for place in places]
        for begin in range(0, len(mine), self.optim.batch_size):
            yield mine[begin : begin + self.optim.batch_size]

    def _log_loss(self) -> None:
        """Note the mean loss of the steps since the last time."""
        steps, self._logged = self.step - self._logged, self.step
        total = float(self.accelerator.gather(self._loss).mean())
        self._loss.zero_()
        values = {"loss": total / steps, "learning_rate": self._rate}
        self._log(values, {"grad_norm": float(self._norm or 0.0)}, curve="train")

    def _measure(self) -> dict[str, float]:
        """Measure, log the figures and report them."""
        self.wrapped.eval()
        figures = self.evaluate()
        self._log({f"eval_{name}": value for name, value in figures.items()}, {}, curve="eval")
        ended, inside = divmod(self.step, self.steps_per_epoch)
        place = f"step {self.step}" if inside else f"epoch {ended}/{self.optim.epochs}"
        self.notify(f"{place}: loss {self._latest['loss']:.4f}, {self.describe(figures)}")
        return figures

    def _log(self, values: dict[str, float], drawn: dict[str, float], *, curve: str) -> None:
        """Note figures in the history; they and ``drawn`` become points of curves."""
        self.history.append(values | {"step": self.step, "epoch": self.step / self.steps_per_epoch})
        self._latest |= values
        named = {f"{curve}/{k.removeprefix('eval_')}": x for k, x in (values | drawn).items()}
        self.accelerator.log(named, step=self.step)

    def _save(self) -> None:
        """Save a state; it counts once its mark is there, and only then do older ones go."""
        folder = state_folder(self.options.run.output) / f"checkpoint-{self.step}"
        try:
            if self.deepspeed:
                self.wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=True)
            if self.accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                state = {"scheduler": self.scheduler.state_dict()}
                if not self.deepspeed:
                    write_tensor_file(folder / WEIGHTS, self.tensors())
                    state["optimizer"] = self.optimizer.state_dict()
                if self.accelerator.scaler is not None:
                    state["scaler"] = self.accelerator.scaler.state_dict()
                torch.save(state, folder / _OPTIMIZER)
                progress = {"step": self.step, "best": self.best, "history": self.history}
                (folder / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"The state cannot be saved in '{folder.parent}': {error}.",
                "Free some space and give the same command with --resume.",
            ) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            complete_state(folder, keep={self.step, self.best[0]} if self.best else {self.step})

    def _load(self, folder: Path) -> None:
        """Stand where a saved state was.

        Raises:
            CheckpointError: It is damaged.
        """
        try:
            self._stand_at(folder)
        except _DAMAGED as error:
            raise CheckpointError(
                f"The saved state '{folder}' is damaged: {type(error).__name__}.",
                "Remove it to go on from an earlier one, or begin again with --overwrite.",
            ) from error

    def _stand_at(self, folder: Path) -> None:
        progress = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        self.step = self._logged = progress["step"]
        self.history = progress["history"]
        self._latest = {key: value for entry in self.history for key, value in entry.items()}
        self.best = tuple(progress["best"]) if progress["best"] else None
        state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        if self.deepspeed:
            self.wrapped.load_checkpoint(str(folder), load_module_strict=False)
        else:
            self.restore(load_file(folder / WEIGHTS))
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def epoch_records(self) -> list[dict[str, float]]:
        """The run so far, one record an epoch: mean training loss, learning rate, figures."""
        records = []
        for epoch in range(1, self.step // self.steps_per_epoch + 1):
            begin, end = (epoch - 1) * self.steps_per_epoch, epoch * self.steps_per_epoch
            logged = [e for e in self.history if "loss" in e and begin < e["step"] <= end]
            lengths = np.diff([begin, *(entry["step"] for entry in logged)])
            record: dict[str, float] = {
                "epoch": epoch,
                "step": end,
                "learning_rate": logged[-1]["learning_rate"],
                "loss": float(np.dot([e["loss"] for e in logged], lengths) / (end - begin)),
            }
            for entry in self.history:
                if entry["step"] == end and "eval_loss" in entry:
                    record |= eval_figures(entry)
            records.append(record)
        return records


class Finished:
    """A run whose output is there already: no steps are left, and running it gives the folder."""

    steps = 0

    def __init__(self, output: Path, notify: Notify) -> None:
        self.output = output
        self.notify = notify

    def run(self, *, advance: Advance | None = None) -> Path:
        """Say so, and give the folder."""
        self.notify(f"'{self.output}' is finished already; nothing to resume.")
        return self.output


def eval_figures(entry: Mapping[str, float]) -> dict[str, float]:
    """The figures of an entry of the history, as records name them."""
    return {
        "validation_loss" if name == "eval_loss" else name.removeprefix("eval_"): value
        for name, value in entry.items()
        if name.startswith("eval_")
    }


def run_record(
    stage: str,
    options: Any,
    *packages: str,
    parent: str | None,
    data: dict[str, Any],
    trained_values: Any,
) -> dict[str, Any]:
    """What ``stage.json`` says of a run beside its figures; versions also of ``packages``."""
    return {
        "stage": stage,
        "parent": parent,
        "options": options.to_flat(),
        "data": data,
        "trained_values": trained_values,
        PROCESSES: process_count(),
        "versions": library_versions()
        | library_versions(*packages)
        | {"cuda": torch.version.cuda or "none"},
    }


def pick_precision(precision: str, device_name: str) -> str:
    """The arithmetic: ``float32``, ``bfloat16`` or ``float16``; ``auto`` depends on the device.

    Raises:
        ConfigError: It does not go with the device.
        UsageError: There is no such device.
    """
    device = pick_device(device_name)
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    if precision == "float16" and device.type != "cuda":
        raise ConfigError(
            f"--precision float16 needs a CUDA device, not {device.type}.",
            "Use --precision bfloat16 or float32.",
        )
    return precision


def pick_tracker(report_to: str) -> str | None:
    """What writes curves: ``tensorboard``, ``wandb`` or nothing.

    Raises:
        ConfigError: W&B is asked for and not installed.
        MissingExtraError: TensorBoard is asked for and not installed.
    """
    if report_to == "wandb" and find_spec("wandb") is None:
        raise ConfigError(
            "--report-to wandb needs the package 'wandb', which is not installed.",
            "pip install wandb",
        )
    board = find_spec("tensorboard") is not None
    if report_to == "tensorboard" and not board:
        raise MissingExtraError("tensorboard", "train", "--report-to tensorboard")
    if report_to == "auto":
        return "tensorboard" if board else None
    return None if report_to == "none" else report_to


def make_accelerator(
    run: RunOptions | StageRunOptions, precision: str, deepspeed: dict[str, Any] | None = None
) -> Accelerator:
    """The Accelerator of a run; a second one in a process may differ from the first.

    ``precision`` is as ``pick_precision`` gives it, ``deepspeed`` as ``fill_deepspeed`` does.
    """
    device = pick_device(run.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if run.deterministic:
        enable_full_determinism(run.seed)
    forget_accelerator()
    PartialState(cpu=device.type == "cpu")  # the processes: under DeepSpeed not asked for a CPU
    return Accelerator(
        cpu=device.type == "cpu" and deepspeed is None,
        mixed_precision=_PRECISIONS[precision],
        log_with=pick_tracker(run.report_to),
        project_dir=state_folder(run.output),
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed) if deepspeed else None,
    )
