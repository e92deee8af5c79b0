"""Stage 1: train a detector from labelled pictures to a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m2f2cli.checkpoints import io
from m2f2cli.data.readers.ddvqa import FLAWS, REGIONS
from m2f2cli.files import json_bytes
from m2f2cli.options.train_detector import INCIDENTAL, TrainDetectorOptions
from m2f2cli.runtime import process_count, seed_everything
from m2f2cli.training.build import build_detector
from m2f2cli.training.callbacks import (
    Advance,
    Averaging,
    Housekeeping,
    Notify,
    Reporter,
    epoch_records,
)
from m2f2cli.training.domain import fit_domain
from m2f2cli.training.objective import Objective, moving_groups
from m2f2cli.training.picture_store import PictureStore
from m2f2cli.training.pictures import MeasuringPictures, TrainingPictures
from m2f2cli.training.settings import picture_settings, trainer_arguments
from m2f2cli.training.sources import read_sources
from m2f2cli.training.states import (
    PROCESSES,
    claim_output,
    forget_states,
    last_state,
    library_versions,
    same_options,
    state_folder,
)
from m2f2cli.training.trainer import DetectorTrainer

STAGE = "train-detector"


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
    """
    return prepare(options, notify=notify).run(advance=advance)


@dataclass
class Training:
    """A run that is ready to start: everything read, built and checked.

    Attributes:
        options: Everything about the run.
        trainer: Holds model, pictures and settings.
        steps: Optimiser steps in all.
        record: What goes into ``stage.json`` beside the figures.
        notify: Called with lines for people.
        domain: The domain check to store with the detector.
    """

    options: TrainDetectorOptions
    trainer: DetectorTrainer | None
    steps: int
    record: dict[str, Any]
    notify: Notify
    domain: dict[str, Any] | None = None

    def run(self, *, advance: Advance | None = None) -> Path:
        """Train, or go on training, and write the checkpoint folder."""
        run = self.options.run
        if self.trainer is None:
            self.notify(f"'{run.output}' is finished already; nothing to resume.")
            return run.output
        trainer = self.trainer
        state = last_state(state_folder(run.output)) if run.resume else None
        if state is not None:
            self.notify(f"Going on after step {state.name[11:]} of {self.steps}.")
        trainer.add_callback(Reporter(advance or (lambda *_: None), self.notify))
        trainer.train_from(state)
        if trainer.is_world_process_zero():
            self._write()
        trainer.accelerator.wait_for_everyone()
        return run.output

    def _write(self) -> None:
        trainer = self.trainer
        assert trainer is not None
        run, folder = self.options.run, state_folder(self.options.run.output)
        best = trainer.state.best_global_step
        trainer._load_from_checkpoint(str(folder / f"checkpoint-{best}"))
        detector = trainer.model.detector
        kind = getattr(torch, run.save_dtype)
        config = detector.config.to_dict() | {
            "architectures": ["Detector"],
            "dtype": run.save_dtype,
            "domain": self.domain,
        }
        epochs = epoch_records(trainer.state)
        chosen = next(record for record in epochs if record["step"] == best)
        stage = self.record | {"metrics": {"selected": chosen, "epochs": epochs}}
        if epochs[-1]["epoch"] < self.options.optimizer.epochs:
            stage["metrics"]["stopped_after"] = epochs[-1]["epoch"]
            self.notify(
                f"Stopped after epoch {epochs[-1]['epoch']}: no better "
                f"{self.options.optimizer.select} for "
                f"{self.options.optimizer.early_stopping_patience} epochs."
            )
        processor = io.preprocessor_config(
            detector.config.image_size, detector.config.image_mean, detector.config.image_std
        )
        io.write_checkpoint(
            run.output,
            config=json.loads(json.dumps(config)),
            tensors={
                name: tensor.to(kind) if tensor.is_floating_point() else tensor
                for name, tensor in trainer.model.result().items()
            },
            stage=stage,
            extra_files={"preprocessor_config.json": json_bytes(processor)},
            overwrite=run.overwrite,
        )
        forget_states(run.output)
        self.notify(
            f"Kept epoch {chosen['epoch']}: AUC {chosen['auc']:.4f}, AP {chosen['ap']:.4f}, "
            f"validation loss {chosen['validation_loss']:.4f}."
        )


def prepare(options: TrainDetectorOptions, *, notify: Notify | None = None) -> Training:
    """Read the data, build the model and check everything a run needs, training nothing yet.

    Args:
        options: Everything about the run.
        notify: Called with lines for people.

    Raises:
        As ``train_detector``.
    """
    notify = notify or (lambda _: None)
    run = options.run
    if run.resume and (run.output / "stage.json").exists():
        same_options(
            io.read_stage(run.output).get("options", {}), options, INCIDENTAL, where=run.output
        )
        return Training(options, None, 0, {}, notify)
    claim_output(options, INCIDENTAL)
    arguments = trainer_arguments(options, state_folder(run.output))
    left_out: list[str] = []
    train, held = read_sources(options.data, seed=run.seed, tell=left_out.append)
    skip = options.data.unreadable == "skip"
    stores = [
        PictureStore(part, options.data.cache, skip=skip, tell=notify) for part in (train, held)
    ]
    left_out += [name for part in stores for name in part.skipped]
    for name in left_out:
        notify(f"left out, missing or unreadable: {name}")
    seed_everything(run.seed)
    detector = build_detector(options.model, options.data.crop_margin)
    kinds = tuple(train.kinds()) if options.objective.kind_weight else ()
    settings = picture_settings(options, detector, train, kinds)
    objective = Objective(detector, options, kinds=len(kinds), judgements=len(REGIONS) + len(FLAWS))
    pictures = TrainingPictures(stores[0], settings)
    measured = MeasuringPictures(stores[1], settings)
    trainer = DetectorTrainer(
        objective,
        arguments,
        options=options.optimizer,
        pictures=pictures,
        measured=measured,
        mixup=options.objective.mixup,
    )
    per_epoch = trainer.steps_per_epoch
    arguments.logging_steps = min(10, per_epoch)
    trainer.add_callback(Averaging(objective))
    trainer.add_callback(
        Housekeeping(trainer.sampler, save_steps=run.save_steps, steps_per_epoch=per_epoch)
    )
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
                ("train", train, stores[0], pictures),
                ("validation", held, stores[1], measured),
            )
        }
        | {"unreadable": left_out},
        "trained_values": moving_groups(objective),
        PROCESSES: process_count(),
        "versions": library_versions(),
    }
    notify(_summary(record))
    steps = per_epoch * options.optimizer.epochs
    domain = fit_domain(
        *stores, size=detector.config.image_size, quantile=options.data.domain_quantile
    )
    return Training(options, trainer, steps, record, notify, domain)


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
