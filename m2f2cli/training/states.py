"""Saved states of a run: whose they are, which one to go on from, and a Trainer that keeps them.

They lie in ``OUTPUT.training`` beside the output until that is written. A state counts once its
mark is there. Every random draw of a run is seeded by its step, so none is saved.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer

from m2f2cli import environment
from m2f2cli.checkpoints.io import write_tensor_file
from m2f2cli.errors import CheckpointError, ConfigError, UsageError
from m2f2cli.files import atomic_write, json_bytes, refuse_existing
from m2f2cli.options.fields import OptionGroups
from m2f2cli.runtime import first_process, process_count
from m2f2cli.training.epochs import BatchSampler

WEIGHTS = "model.safetensors"
PROCESSES = "processes"
_COMPLETE = "complete"
_OPTIONS = "options.json"
_PACKAGES = ("m2f2cli", "torch", "transformers", "timm", "accelerate", "numpy", "pillow")


class StatefulTrainer(Trainer):
    """A Trainer whose batches come from ``sampler`` and whose states appear whole or not at all.

    Attributes:
        sampler: Which training items come in which batch of this process.
    """

    model: Any
    sampler: BatchSampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's batches; accelerate would repeat items to make processes even."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    def kept_states(self) -> set[int]:
        """The steps whose states stay when one is saved."""
        return {self.state.global_step}

    def tensors_to_save(self) -> dict[str, torch.Tensor]:
        """What of the model belongs to a state."""
        found: dict[str, torch.Tensor] = self.model.state_dict()
        return found

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what ``tensors_to_save`` gave."""
        self.model.load_state_dict(tensors)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a state; it counts once its mark is there, and only then do older ones go."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"The state cannot be saved in '{self.args.output_dir}': {error}.",
                "Free some space and give the same command with --resume.",
            ) from error
        if self.args.should_save:
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            _sync(folder)
            (folder / _COMPLETE).touch()
            _sync(folder)
            keep = self.kept_states()
            for other in folder.parent.glob("checkpoint-*"):
                if int(other.name.rpartition("-")[2]) not in keep:
                    shutil.rmtree(other)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing to save: every draw is seeded by step, epoch and position."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: t.detach().cpu().contiguous() for k, t in self.tensors_to_save().items()}
        write_tensor_file(folder / WEIGHTS, tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.restore(load_file(Path(resume_from_checkpoint, WEIGHTS)))


def _sync(folder: Path) -> None:
    """Bring a folder's files and names to the disk."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def state_folder(output: Path) -> Path:
    """Where a run keeps its saved states and curves: beside the output, until that is written."""
    return output.with_name(f"{output.name}.training")


def last_state(folder: Path) -> Path | None:
    """The newest complete saved state under a folder; incomplete ones are removed.

    Args:
        folder: Where a run keeps its states; it need not exist.
    """
    states = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    for state in states:
        if not (state / _COMPLETE).exists():
            shutil.rmtree(state, ignore_errors=True)
    return next((state for state in reversed(states) if state.exists()), None)


def forget_states(output: Path) -> None:
    """Remove a finished run's states; what else lies in their folder, such as curves, stays."""
    folder = state_folder(output)
    for leftover in (*folder.glob("checkpoint-*"), folder / _OPTIONS):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def check_output(options: Any, incidental: Collection[str]) -> None:
    """Refuse what stands at the output, or beside it, if the run may not go there.

    Args:
        options: An ``OptionGroups`` whose group ``run`` has output, overwrite and resume.
        incidental: Options that may differ on resuming.

    Raises:
        CheckpointError: The output exists and is not to be replaced.
        UsageError: An unfinished run is saved there.
        ConfigError: The run there was begun with other options.
    """
    run = options.run
    refuse_existing(run.output, run.overwrite)
    folder = state_folder(run.output)
    if run.overwrite or not first_process() or last_state(folder) is None:
        return
    if not run.resume:
        raise UsageError(
            f"An unfinished training of '{run.output}' is saved in '{folder}'.",
            "Add --resume to go on, or --overwrite to begin anew.",
        )
    begun = json.loads((folder / _OPTIONS).read_text(encoding="utf-8"))
    same_options(begun, options, incidental, where=folder)
    if begun.get(PROCESSES, 1) != process_count():
        raise ConfigError(
            f"This run has {process_count()} processes, but '{folder}' was begun with "
            f"{begun.get(PROCESSES, 1)}.",
            "Resume with as many, or begin anew with --overwrite.",
        )


def claim_output(options: Any, incidental: Collection[str]) -> None:
    """Check the output, clear what is to be overwritten, and note which options its states are of.

    Args and errors are those of ``check_output``.
    """
    check_output(options, incidental)
    folder = state_folder(options.run.output)
    if first_process():
        if options.run.overwrite and folder.exists():
            shutil.rmtree(folder)
        noting = options.to_flat() | {PROCESSES: process_count()}
        atomic_write(folder / _OPTIONS, json_bytes(noting))


def same_options(
    noted: Mapping[str, Any], options: OptionGroups, incidental: Collection[str], *, where: Path
) -> None:
    """Refuse to go on with other options than a run was begun with.

    Raises:
        ConfigError: Naming the first that differs.
    """
    wanted, noted = options.to_flat(), options.recorded(noted)
    for name in (wanted.keys() | noted.keys()) - {PROCESSES}:
        if name not in incidental and noted.get(name) != wanted.get(name):
            raise ConfigError(
                f"--{name} is {wanted.get(name)!r}, but '{where}' was begun with "
                f"{noted.get(name)!r}.",
                "Resume with the same options, or begin anew with --overwrite.",
            )


def library_versions(*more: str) -> dict[str, str]:
    """The versions of what a training's result may depend on."""
    return {
        **environment.library_versions(*_PACKAGES, *more),
        "cuda": torch.version.cuda or "none",
    }
