"""Stage 1: train a detector from labelled pictures to a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import ReduceLROnPlateau

from m2f2cli.checkpoints import io
from m2f2cli.data.readers.ddvqa import FLAWS, REGIONS
from m2f2cli.environment import library_versions
from m2f2cli.errors import M2F2Error
from m2f2cli.files import json_bytes
from m2f2cli.metrics import average_precision, roc_auc
from m2f2cli.options.train_detector import INCIDENTAL, OptimizerOptions, TrainDetectorOptions
from m2f2cli.runtime import process_count, seed_everything
from m2f2cli.training.accelerator import make_accelerator, pick_precision, pick_tracker
from m2f2cli.training.build import build_detector
from m2f2cli.training.domain import fit_domain
from m2f2cli.training.objective import Objective, moving_groups
from m2f2cli.training.picture_store import PictureStore
from m2f2cli.training.pictures import Batcher, MeasuringPictures, TrainingPictures
from m2f2cli.training.settings import picture_settings
from m2f2cli.training.sources import read_sources
from m2f2cli.training.stages import optimiser_groups
from m2f2cli.training.states import PROCESSES, check_output, finished, state_folder
from m2f2cli.training.trainer import (
    WEIGHTS,
    Advance,
    Batch,
    Finished,
    Notify,
    Trainer,
    epoch_records,
    shares,
)

STAGE = "train-detector"
_BETTER_IS_LARGER = {"auc": True, "ap": True, "loss": False, "last": True}


def train_detector(
    options: TrainDetectorOptions, *, advance: Advance | None = None, notify: Notify | None = None
) -> Path:
    """Train a detector and write it as a checkpoint folder.

    Args:
        options: Everything about the run.
        advance: Called after each step with the steps done and words for beside a progress bar.
        notify: Called with lines for people.

    Returns:
        The folder, holding the epoch that did best on the held-out pictures.

    Raises:
        ConfigError: Options do not go together, or not with those of the state to resume.
        InputError: The data is missing, unreadable, lacks a class or cannot be split.
        CheckpointError: A starting weight does not fit, or the output exists.
        M2F2Error: The training has diverged.
    """
    return prepare(options, notify=notify).run(advance=advance)


def prepare(
    options: TrainDetectorOptions, *, notify: Notify | None = None
) -> DetectorTrainer | Finished:
    """Read the data, build the model and check everything a run needs, training nothing yet.

    Args and errors are those of ``train_detector``.
    """
    notify = notify or (lambda _: None)
    run, data = options.run, options.data
    if finished(options, INCIDENTAL):
        return Finished(run.output, notify)
    check_output(options, INCIDENTAL)
    precision = pick_precision(run.precision, run.device)
    pick_tracker(run.report_to)
    left_out: list[str] = []
    parts = read_sources(data, seed=run.seed, tell=left_out.append)
    skip = data.unreadable == "skip"
    train, held = [PictureStore(part, data.cache, skip=skip, tell=notify) for part in parts]
    left_out += [name for part in (train, held) for name in part.skipped]
    for name in left_out:
        notify(f"left out, missing or unreadable: {name}")
    seed_everything(run.seed)
    detector = build_detector(options.model, data.crop_margin)
    kinds = tuple(parts[0].kinds()) if options.objective.kind_weight else ()
    settings = picture_settings(options, detector, parts[0], kinds)
    objective = Objective(detector, options, kinds=len(kinds), judgements=len(REGIONS) + len(FLAWS))
    pictures, measured = TrainingPictures(train, settings), MeasuringPictures(held, settings)
    record = {
        "stage": STAGE,
        "parent": detector.fingerprint,
        "options": options.to_flat(),
        "data": {
            part: {
                "fingerprint": read.fingerprint(),
                **store.samples.counts(),
                "videos": sum(sample.clip is not None for sample in store.samples.samples),
                "items": len(items),
            }
            for part, read, store, items in (
                ("train", parts[0], train, pictures),
                ("validation", parts[1], held, measured),
            )
        }
        | {"unreadable": left_out},
        "trained_values": moving_groups(objective),
        PROCESSES: process_count(),
        "versions": library_versions() | {"cuda": torch.version.cuda or "none"},
    }
    notify(_summary(record))
    domain = fit_domain(train, held, size=detector.config.image_size, quantile=data.domain_quantile)
    accelerator = make_accelerator(run, state_folder(run.output), precision=precision)
    return DetectorTrainer(
        objective, pictures, measured, domain, options=options, accelerator=accelerator,
        record=record, notify=notify,
    )  # fmt: skip


class DetectorTrainer(Trainer):
    """Trains an ``Objective`` and writes the detector of its best epoch.

    Args:
        objective: What is trained.
        pictures: What to train on.
        measured: What to measure on after each epoch.
        domain: The domain check to store with the detector.
        **shared: What else ``Trainer`` takes.
    """

    incidental = INCIDENTAL

    def __init__(
        self,
        objective: Objective,
        pictures: TrainingPictures,
        measured: MeasuringPictures,
        domain: dict[str, Any] | None,
        **shared: Any,
    ) -> None:
        self.measured = measured
        self.domain = domain
        super().__init__(objective, dataset=pictures, **shared)
        options = self.options
        self.collate = Batcher(options.objective.mixup, options.run.seed, self.sampler.steps)

    @property
    def optim(self) -> OptimizerOptions:
        """The options that say how the weights move."""
        found: OptimizerOptions = self.options.optimizer
        return found

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Adam or AdamW over the stage's groups; every trainable parameter exactly once."""
        named, backbone = self.model.named_weights(), self.model.detector.backbone
        groups = optimiser_groups(named, backbone, self.options.optimizer)
        covered = sum(len(group["params"]) for group in groups)
        trainable = sum(p.requires_grad for p in self.model.parameters())
        if covered != trainable:
            raise LookupError(f"{covered} of {trainable} trainable parameters are in a group.")
        # Names stay out: they would be saved with the state and compared by torch.
        plain = [{k: v for k, v in group.items() if k != "names"} for group in groups]
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[
            self.options.optimizer.optimizer
        ]
        return kind(plain, betas=(0.9, self.options.optimizer.beta2))

    def build_scheduler(self) -> Any:
        """The published plateau rule on the validation loss, or as in the base."""
        steps = self.options.optimizer
        if steps.schedule != "plateau":
            return super().build_scheduler()
        return ReduceLROnPlateau(
            self.optimizer,
            mode="min",
            factor=steps.plateau_factor,
            patience=steps.plateau_patience,
            cooldown=steps.plateau_cooldown,
        )

    def loss(self, batch: Batch, total: int) -> torch.Tensor:
        """The objective's loss; a batch of fewer items than its step's mean counts less."""
        loss: torch.Tensor = self.wrapped(**batch)["loss"]
        return loss / total

    def after_step(self) -> None:
        """Take the new weights into the running average, where there is one."""
        if self.model.average is not None:
            self.model.average.update(self.model.detector)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure on the held-out pictures, in all processes together.

        Returns:
            ``loss`` in nats a picture, ``auc``, ``ap``, and ``accuracy`` at 0.5.

        Raises:
            M2F2Error: The training has diverged.
        """
        count = self.accelerator.num_processes
        if count > 1:  # each process has its own BatchNorm statistics; one is saved
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        logits = torch.cat(list(self._logits()))
        labels = self.measured.labels()
        gathered = self.accelerator.gather(logits).double().cpu().numpy()
        # Process p has items p, p + processes, ...; repeats stand at the end.
        in_order = gathered.reshape(count, -1, 2).swapaxes(0, 1).reshape(-1, 2)[: len(labels)]
        return measure(in_order, labels)

    def _logits(self) -> Iterator[torch.Tensor]:
        """Logits (B, 2) of this process's held-out pictures, batch by batch."""
        mine = shares(
            range(len(self.measured)),
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        size = self.options.optimizer.batch_size
        batches = [[i for i, _ in mine[b : b + size]] for b in range(0, len(mine), size)]
        loader = torch.utils.data.DataLoader(
            self.measured,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.options.data.workers,
        )
        for batch in loader:
            yield self.model(**self.to_device(batch))["logits"]

    def after_epoch(self, figures: Mapping[str, float]) -> None:
        """Cut the learning rate on a plateau, and note whether the epoch is the best."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(figures["loss"])
        select = self.options.optimizer.select
        value = float(self.step) if select == "last" else figures[select]
        larger = _BETTER_IS_LARGER[select]
        if self.best is None or (value > self.best[1] if larger else value < self.best[1]):
            self.best = (self.step, value)

    def stopped(self) -> bool:
        """Whether the selected figure has not got better for ``early_stopping_patience`` epochs."""
        waited = (self.step - (self.best[0] if self.best else 0)) // self.steps_per_epoch
        return 0 < self.options.optimizer.early_stopping_patience <= waited

    def kept_states(self) -> set[int]:
        """The last saved state and the best."""
        return {self.step, self.best[0]} if self.best else {self.step}

    def describe(self, figures: Mapping[str, float]) -> str:
        """The figures in words."""
        return (
            f"validation loss {figures['loss']:.4f}, "
            f"AUC {figures['auc']:.4f}, AP {figures['ap']:.4f}"
        )

    def write(self) -> None:
        """Write the detector of the best epoch."""
        if not self.accelerator.is_main_process:
            return
        run, steps = self.options.run, self.options.optimizer
        assert self.best is not None
        best = self.best[0]
        self.restore(load_file(state_folder(run.output) / f"checkpoint-{best}" / WEIGHTS))
        config = self.model.detector.config
        written = config.to_dict() | {
            "architectures": ["Detector"],
            "dtype": run.save_dtype,
            "domain": self.domain,
        }
        epochs = epoch_records(self.history, self.steps_per_epoch)
        chosen = next(record for record in epochs if record["step"] == best)
        metrics: dict[str, Any] = {"selected": chosen, "epochs": epochs}
        if epochs[-1]["epoch"] < steps.epochs:
            metrics["stopped_after"] = epochs[-1]["epoch"]
            self.notify(
                f"Stopped after epoch {epochs[-1]['epoch']}: no better "
                f"{steps.select} for {steps.early_stopping_patience} epochs."
            )
        processor = io.preprocessor_config(config.image_size, config.image_mean, config.image_std)
        kind = getattr(torch, run.save_dtype)
        io.write_checkpoint(
            run.output,
            config=json.loads(json.dumps(written)),
            tensors={
                name: tensor.to(kind) if tensor.is_floating_point() else tensor
                for name, tensor in self.model.result().items()
            },
            stage=self.record | {"metrics": metrics},
            extra_files={"preprocessor_config.json": json_bytes(processor)},
            overwrite=run.overwrite,
        )
        self.notify(
            f"Kept epoch {chosen['epoch']}: AUC {chosen['auc']:.4f}, AP {chosen['ap']:.4f}, "
            f"validation loss {chosen['validation_loss']:.4f}."
        )


def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Validation figures of logits (N, 2): ``loss`` in nats, ``auc``, ``ap``, ``accuracy`` at 0.5.

    Raises:
        M2F2Error: The training has diverged.
    """
    if not np.isfinite(logits).all():
        raise M2F2Error(
            "The training has diverged: the detector's answers are no longer finite numbers.",
            "Lower --learning-rate or set --max-grad-norm 1, and begin anew with --overwrite.",
        )
    margin = logits[:, 1] - logits[:, 0]
    return {
        "loss": float(np.logaddexp(0.0, np.where(labels == 1, -margin, margin)).mean()),
        "auc": roc_auc(labels, margin),
        "ap": average_precision(labels, margin),
        "accuracy": float(((margin > 0) == labels).mean()),
    }


def _summary(record: Mapping[str, Any]) -> str:
    parts = []
    for word in ("train", "validation"):
        counts = {k: n for k, n in record["data"][word].items() if isinstance(n, int)}
        people, videos, items = (counts.pop(key) for key in ("identities", "videos", "items"))
        total = sum(counts.values())
        nouns = [f"{total - videos} pictures"] if total > videos else []
        nouns += [f"{videos} videos"] if videos else []
        each = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        often = f", {items} an epoch" if items != total else ""
        parts.append(f"{word}: {' and '.join(nouns)} of {people} identities ({each}){often}")
    values = ", ".join(f"{group} {n:,}" for group, n in record["trained_values"].items())
    return "\n".join((*parts, f"trains: {values}"))
