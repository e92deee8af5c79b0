"""A calibrated checkpoint: what a calibration learnt, stored where ``detect`` reads it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from m2f2cli import __version__
from m2f2cli.checkpoints import store
from m2f2cli.errors import CheckpointError, InputError, UsageError
from m2f2cli.evaluation.calibration import TARGET_FPR, Calibration, fit
from m2f2cli.evaluation.scored import ScoredSet
from m2f2cli.files import MARK, refuse_existing

_MODEL_TYPE = "m2f2_detector"


def calibrate(
    model: str,
    scored: ScoredSet,
    *,
    target_fpr: float = TARGET_FPR,
    output: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> Calibration:
    """Calibrate a detector by a set that it has scored, and store the result in its checkpoint.

    ``config.json`` gets ``score_temperature``, ``threshold`` and ``uncertain``; ``stage.json`` gets
    ``calibration``: the same, what it was learnt from and how good it was before and after. The
    fingerprint changes, as it covers what verdicts depend on.

    Args:
        model: The detector's folder, ``lite`` or a Hub id, as for ``detect``.
        scored: Its scores of the set, with the truth.
        target_fpr: Share of real pictures that may be called fake.
        output: Write a calibrated copy here, instead of changing the folder; needed for ``lite``
            and Hub ids.
        overwrite: Replace a checkpoint at ``output``.
        seed: Of the bootstrap behind the uncertain band.

    Raises:
        UsageError: The set is a test set or the training's own pictures, the scores are texts, or
            ``output`` is missing.
        InputError: Another model made the scores, or they do not suffice (see ``fit``).
        CheckpointError: The checkpoint is no detector, was changed, or cannot be written. What was
            there before is still there.
    """
    from m2f2cli.checkpoints.hub import resolve_checkpoint

    target = check_calibration(model, scored.split, output=output, overwrite=overwrite)
    if scored.task != "scores":
        raise UsageError("Only a detector's probabilities can be calibrated, not texts.")
    folder = resolve_checkpoint(model)
    config = store.read_config(folder)
    if config.get("model_type") != _MODEL_TYPE:
        raise CheckpointError(f"'{folder}' is no detector.", f"m2f2 info '{folder}'")
    before = store.fingerprint(folder, verify=True)
    if scored.model_fingerprint != before:
        raise InputError(
            f"The scores were made by another model than '{model}' is now.",
            hint="Let that model judge the pictures again.",
        )
    answered = [item for item in scored.items if item.fake_probability is not None]
    found = fit(
        [item.label for item in answered],
        [item.fake_probability or 0.0 for item in answered],
        groups=[item.group for item in answered],
        temperature=float(config.get("score_temperature", 1.0)),
        target_fpr=target_fpr,
        seed=seed,
    )
    provenance = {
        "model": before,
        "dataset": scored.dataset,
        "split": scored.split,
        "data": scored.data_fingerprint,
        "without_score": len(scored.items) - len(answered),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "m2f2cli": __version__,
    }
    write(folder, target, found, provenance, overwrite=overwrite or target == folder.resolve())
    return found


def write(
    folder: Path,
    target: Path,
    calibration: Calibration,
    provenance: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> str:
    """Write a checkpoint folder with a calibration stored in it, in one step.

    Args:
        folder: The checkpoint.
        target: Where; ``folder`` itself changes it.
        calibration: What to store.
        provenance: Further keys of ``stage.json``'s ``calibration``.
        overwrite: Replace a checkpoint at ``target``.

    Returns:
        The new fingerprint.

    Raises:
        CheckpointError: It cannot be written; what was there before is still there.
    """
    config = store.read_config(folder) | {
        "score_temperature": calibration.temperature,
        "threshold": calibration.threshold,
        "uncertain": list(calibration.uncertain) if calibration.uncertain else None,
    }
    stage = store.read_stage(folder) | {"calibration": {**asdict(calibration), **provenance}}
    stage.pop("fingerprint", None)
    with store.atomic_folder(target, overwrite) as partial:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name != MARK:
                (partial / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, partial / file.relative_to(folder))
        (partial / "config.json").write_bytes(store.json_bytes(config))
        mark = store.fingerprint(partial)
        (partial / MARK).write_bytes(store.json_bytes({**stage, "fingerprint": mark}))
    return mark


def check_calibration(
    model: str, split: str, *, output: Path | None = None, overwrite: bool = False
) -> Path:
    """Say whether a calibration may be made and stored, before pictures are judged for it.

    Args:
        model: As for ``calibrate``.
        split: Of the set; ``runs.is_test_set`` tells whether it is ``test``.
        output: As for ``calibrate``.
        overwrite: As for ``calibrate``.

    Returns:
        The folder that will be written: never in the package, a download cache, or kept otherwise.

    Raises:
        UsageError: The split is a test's or the training's, or ``output`` is missing.
        CheckpointError: The folder exists or may not be written.
    """
    reasons = {
        "test": "A test set is not for calibration: figures reported of it would be tuned to it.",
        "train": "Training pictures are not for calibration: a detector is surer of them than of "
        "others.",
    }
    if split in reasons:
        raise UsageError(
            reasons[split], "Calibrate on validation pictures, for example with --split validation."
        )
    own = Path(model).expanduser()
    if output is not None:
        target = output.expanduser().resolve()
        refuse_existing(target, overwrite or target == own.resolve())
        return target
    package = Path(str(files("m2f2cli"))).resolve()
    if model == "lite" or not own.exists() or own.resolve().is_relative_to(package):
        raise UsageError(
            f"'{model}' is not a folder of yours, so it is not changed.",
            "Add --calibrated DIR to get a calibrated copy.",
        )
    folder = own.resolve()
    for place in (folder, folder.parent):
        if not os.access(place, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"'{place}' may not be written.", "Add --calibrated DIR to get a calibrated copy."
            )
    return folder
