"""Saved states of a run: whose they are, which one to go on from, which of them stay.

They lie in ``OUTPUT.training`` beside the output until that is written. A state counts once its
mark is there. ``options`` are those of a training command: their group ``run`` has ``output``,
``overwrite``, ``resume``, and ``incidental``, the options that may differ on resuming.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints import io
from m2f2cli.errors import ConfigError, UsageError
from m2f2cli.files import (
    atomic_write,
    json_bytes,
    locked,
    refuse_existing,
    sync_folder,
    write_error,
)
from m2f2cli.runtime import first_process, process_count

PROCESSES = "processes"
_COMPLETE = "complete"
_OPTIONS = "options.json"
_FORMAT = "state-format"
_VERSION = 2


def state_folder(output: Path) -> Path:
    """Where a run keeps its saved states and curves: beside the output, until that is written."""
    return output.with_name(f"{output.name}.training")


def complete_state(folder: Path, *, keep: Collection[int]) -> None:
    """Bring a saved state to the disk, mark it complete, and remove the others but ``keep``."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
    (folder / _COMPLETE).touch()
    sync_folder(folder)
    for other in folder.parent.glob("checkpoint-*"):
        if int(other.name.rpartition("-")[2]) not in keep:
            shutil.rmtree(other)


def last_state(folder: Path) -> Path | None:
    """The newest complete saved state under a folder, if any; incomplete ones are removed."""
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


def finished(options: Any) -> bool:
    """Whether the run that is to be resumed has written its output already.

    Raises:
        ConfigError: It was begun with other options.
    """
    run = options.run
    if not (run.resume and (run.output / "stage.json").exists()):
        return False
    _same_options(io.read_stage(run.output).get("options", {}), options, where=run.output)
    return True


def check_output(options: Any) -> None:
    """Refuse what stands at the output, or beside it, if the run may not go there.

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
    if begun.pop(_FORMAT, 1) != _VERSION:
        raise ConfigError(
            f"The unfinished training in '{folder}' was saved by another version of m2f2.",
            "Finish it with that version, or begin anew with --overwrite.",
        )
    processes = begun.pop(PROCESSES, 1)
    _same_options(begun, options, where=folder)
    if processes != process_count():
        raise ConfigError(
            f"This run has {process_count()} processes, but '{folder}' was begun with {processes}.",
            "Resume with as many, or begin anew with --overwrite.",
        )


@contextmanager
def claim_output(options: Any) -> Iterator[None]:
    """Check the output, clear what is to be overwritten, and keep other runs from it meanwhile.

    The folder of the states notes which options they are of.

    Raises:
        M2F2Error: Another run is training it; or as ``check_output``.
    """
    check_output(options)
    if not first_process():
        yield
        return
    folder = state_folder(options.run.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with locked(folder, "training into"):
        if options.run.overwrite:
            for old in folder.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        noted = options.to_flat() | {PROCESSES: process_count(), _FORMAT: _VERSION}
        atomic_write(folder / _OPTIONS, json_bytes(noted))
        yield


def _same_options(noted: Mapping[str, Any], options: Any, *, where: Path) -> None:
    """Refuse to go on with other options than a run was begun with, naming the first."""
    wanted, noted = options.to_flat(), options.recorded(noted)
    for name in wanted.keys() | noted.keys():
        if name not in options.run.incidental and noted.get(name) != wanted.get(name):
            hint = "Resume with the same options, or begin anew with --overwrite."
            if name == "epochs" and (where / "stage.json").exists():
                hint = f"It is finished; to train on: --model '{where}' and another --output."
            raise ConfigError(
                f"--{name} is {wanted.get(name)!r}, but '{where}' was begun with "
                f"{noted.get(name)!r}.",
                hint,
            )
