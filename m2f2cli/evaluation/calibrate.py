"""``m2f2 calibrate``: temperature, threshold and uncertain band, learned from a scored set.

They make a detector's probabilities mean what they say. None of the three changes the order of
scores, so the AUC stays. ``docs/calibrate.md`` has the definitions and what they do not promise.
They are stored in the checkpoint, where ``detect`` reads them.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path

import numpy as np

from m2f2cli import __version__
from m2f2cli.checkpoints import io
from m2f2cli.errors import CheckpointError, InputError, UsageError
from m2f2cli.evaluation.evaluate import (
    Evaluation,
    is_test_set,
    measure,
    read_subject,
)
from m2f2cli.evaluation.truth import Joined
from m2f2cli.files import MARK, atomic_folder, json_bytes, refuse_existing
from m2f2cli.metrics import (
    SATURATED,
    Groups,
    Ranking,
    calibration_error,
    log_odds,
    wilson_interval,
)
from m2f2cli.options.evaluate import CalibrateOptions
from m2f2cli.runtime import Progress, no_progress

TARGET_FPR, BAND_LEVEL = 0.05, 0.95
FEWEST = 20  # pictures of each class below which nothing is fitted
RESAMPLES = 2000
TEMPERATURES = (0.2, 20.0)  # between these a fitted temperature lies
_DIGITS = 6  # of the probabilities in records
_STEPS = 80  # halvings of the interval that holds the temperature


def calibrate(options: CalibrateOptions, progress: Progress = no_progress) -> Evaluation:
    """Calibrate a detector on a set that it judges; measure and report that set as ``evaluate``.

    Raises:
        UsageError: The set is a test set or the training's own pictures.
        M2F2Error: As from ``evaluate`` and ``calibrate_checkpoint``.
    """
    subject = read_subject(options)
    if subject.samples is not None and subject.truth is not None:
        split = "test" if is_test_set(subject.samples) else subject.truth.split
        check_calibration(
            options.model, split, output=options.calibrated, overwrite=options.overwrite
        )
    with progress("Judging", subject.steps) as advance:
        found = measure(subject, advance)
    calibration = calibrate_checkpoint(
        options.model,
        found.scored,
        target_fpr=options.target_fpr,
        output=options.calibrated,
        overwrite=options.overwrite,
        seed=options.seed,
    )
    return found._replace(calibration=calibration)


@dataclass(frozen=True)
class Calibration:
    """What was learned, and from how much."""

    temperature: float  # what the logits are to be divided by, in all
    temperature_before: float  # what they were divided by when the scores were made
    threshold: float  # calibrated probability from which the verdict is fake
    # (low, high) of the uncertain band, ends included; None for no band
    uncertain: tuple[float, float] | None
    target_fpr: float  # share of real pictures that may be called fake
    band_level: float  # level of the band's bootstrap interval; 0 for no band
    real: int  # real pictures that it was learned from
    fake: int  # forged pictures
    false_positives: int  # real ones at or above the threshold
    detected: int  # forged ones at or above the threshold
    nll: tuple[float, float]  # mean negative log-likelihood in nats, before and after
    calibration_error: tuple[float, float]  # expected calibration error, before and after
    notes: tuple[str, ...] = ()  # what to know about it

    def sentences(self) -> tuple[str, ...]:
        """What was learned, in words for the user."""
        low, high = wilson_interval(self.false_positives, self.real)
        band = "none"
        if self.uncertain:
            band = f"{self.uncertain[0]:.4f} to {self.uncertain[1]:.4f}"
        return (
            f"temperature {self.temperature_before:.4g} -> {self.temperature:.4g}: negative "
            f"log-likelihood {self.nll[0]:.4f} -> {self.nll[1]:.4f}, calibration error "
            f"{self.calibration_error[0]:.4f} -> {self.calibration_error[1]:.4f}",
            f"threshold {self.threshold:.4f}: {self.false_positives} of {self.real} real pictures "
            f"called fake (asked for at most {100 * self.target_fpr:g} %; on new pictures "
            f"{100 * low:.1f} to {100 * high:.1f} %), {self.detected} of {self.fake} forged found",
            f"uncertain band: {band}",
            *self.notes,
        )


def fit(
    labels: Sequence[int] | np.ndarray,
    probabilities: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    temperature: float = 1.0,
    target_fpr: float = TARGET_FPR,
    band_level: float = BAND_LEVEL,
    seed: int = 0,
) -> Calibration:
    """Learn temperature, threshold and uncertain band.

    Args:
        labels: (N,), 0 real and 1 fake.
        probabilities: (N,), the fake probabilities that the model gave.
        groups: (N,), what the bootstrap draws together, such as the video; None for each alone.
        temperature: What the model divided its logits by.
        target_fpr: Share of real pictures that may be called fake, in (0, 1).
        band_level: Level of the band in (0, 1), or 0 for no band.
        seed: Of the bootstrap.

    Raises:
        UsageError: ``target_fpr`` or ``band_level`` is out of range.
        InputError: A class is empty or has too few pictures, too few real ones for the target, or
            no threshold reaches it.
    """
    if not 0 < target_fpr < 1:
        raise UsageError(f"--target-fpr lies between 0 and 1, not {target_fpr}.", "Try 0.05.")
    if not 0 <= band_level < 1:
        raise UsageError(f"The band's level lies in [0, 1), not {band_level}.", "Try 0.95.")
    truth, scores = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    _check_enough(truth, target_fpr)
    z = log_odds(scores)
    factor, notes = _fit_factor(truth, z, temperature)
    found = np.round(_sigmoid(z / factor), _DIGITS)
    real = truth == 0
    threshold = find_threshold(found, real, target_fpr)
    band = None
    if band_level:
        names = np.arange(len(truth)).astype(str) if groups is None else np.asarray(groups)
        rule = (threshold, target_fpr, band_level)
        band = _band(found[real], list(names[real]), rule, seed)
    saturated = int(np.sum((scores <= SATURATED) | (scores >= 1 - SATURATED)))
    if saturated:
        notes.append(f"{saturated} of {len(scores)} scores are 0 or 1 to {_DIGITS} digits")
    called = found >= threshold
    return Calibration(
        temperature=round(temperature * factor, 9),
        temperature_before=temperature,
        threshold=threshold,
        uncertain=band,
        target_fpr=target_fpr,
        band_level=band_level,
        real=int(real.sum()),
        fake=int((~real).sum()),
        false_positives=int((called & real).sum()),
        detected=int((called & ~real).sum()),
        nll=(_nll(truth, z), _nll(truth, z / factor)),
        calibration_error=(calibration_error(truth, scores), calibration_error(truth, found)),
        notes=tuple(notes),
    )


def find_threshold(scores: np.ndarray, real: np.ndarray, target_fpr: float) -> float:
    """The smallest threshold at which at most ``target_fpr`` of the real pictures are called fake.

    It lies half-way between the highest real score that must stay below it and the next score
    above, so that the last digit of a score decides nothing.

    Args:
        scores: (N,), of all pictures, rounded as records are.
        real: (N,), bool.
        target_fpr: In (0, 1).

    Raises:
        InputError: Too many real pictures score 1.
    """
    below = float(highest_excluded(scores[real], np.ones((1, int(real.sum()))), target_fpr)[0])
    step = 10**-_DIGITS
    if below > 1 - step:
        raise InputError(
            f"No threshold keeps the false positive rate at {target_fpr:g}: more real pictures "
            f"than that have the probability 1.",
            hint="Ask for a higher --target-fpr; this detector errs with certainty.",
        )
    above = scores[scores > below]
    following = float(above.min()) if len(above) else below + step
    return round(min(following, math.ceil((below + following) / 2 / step) * step), _DIGITS)


def highest_excluded(real_scores: np.ndarray, weights: np.ndarray, target_fpr: float) -> np.ndarray:
    """The highest score that a threshold must lie above, for each row of weights (R, N): (R,)."""
    curve = Ranking(np.zeros(len(real_scores)), real_scores).curve(weights)
    allowed = target_fpr * curve.false_positives[:, -1:] + 1e-9
    return curve.scores[np.argmax(curve.false_positives > allowed, axis=1)]


def _band(
    scores: np.ndarray, groups: Sequence[str], rule: tuple[float, float, float], seed: int
) -> tuple[float, float]:
    """Where the threshold lies in ``level`` of the bootstrap resamples of the real pictures.

    ``rule`` is the threshold, its target and the level.
    """
    threshold, target_fpr, level = rule
    drawn = Groups(groups, [0] * len(groups))
    found = [
        highest_excluded(scores, weights[:, drawn.of_item], target_fpr)
        for weights in drawn.weights(RESAMPLES, seed)
    ]
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return round(min(float(low), threshold), _DIGITS), round(max(float(high), threshold), _DIGITS)


def _check_enough(truth: np.ndarray, target_fpr: float) -> None:
    counts = {"real": int((truth == 0).sum()), "forged": int((truth == 1).sum())}
    for word, count in counts.items():
        if count < FEWEST:
            raise InputError(
                f"There are {count} {word} pictures with a score; a calibration needs at least "
                f"{FEWEST} of each class.",
                "empty",
                "Give more pictures.",
            )
    needed = math.ceil(1 / target_fpr - 1e-9)
    if counts["real"] < needed:
        raise InputError(
            f"A false positive rate of {target_fpr:g} cannot be told from {counts['real']} real "
            f"pictures: it takes at least {needed}.",
            "empty",
            f"Give more real pictures, or --target-fpr {math.ceil(100 / counts['real']) / 100:g}.",
        )


def _fit_factor(truth: np.ndarray, z: np.ndarray, present: float) -> tuple[float, list[str]]:
    """What to divide log-odds by so that their likelihood is largest, within ``TEMPERATURES``.

    The negative log-likelihood is convex in the inverse, so its slope has one zero.
    """

    def slope(inverse: float) -> float:
        return float(np.mean(z * (_sigmoid(z * inverse) - truth)))

    lowest, highest = (bound / present for bound in TEMPERATURES)
    low, high = 1 / highest, 1 / lowest
    if slope(low) >= 0:
        return highest, ["the temperature is at its upper bound: the scores tell next to nothing"]
    if slope(high) <= 0:
        return lowest, ["the temperature is at its lower bound: the scores tell the classes apart"]
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high), []


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def _nll(truth: np.ndarray, z: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(0, np.where(truth == 1, -z, z))))


def calibrate_checkpoint(
    model: str,
    scored: Joined,
    *,
    target_fpr: float = TARGET_FPR,
    output: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> Calibration:
    """Calibrate a detector by a set that it has scored, and store the result in its checkpoint.

    ``config.json`` gets ``score_temperature``, ``threshold`` and ``uncertain``; ``stage.json`` gets
    ``calibration``: the same, what it was learned from and how good it was before and after. The
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
    config = io.read_config(folder)
    if config.get("model_type") != "m2f2_detector":
        raise CheckpointError(f"'{folder}' is no detector.", f"m2f2 info '{folder}'")
    before = io.fingerprint(folder, verify=True)
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
    config |= {
        "score_temperature": found.temperature,
        "threshold": found.threshold,
        "uncertain": list(found.uncertain) if found.uncertain else None,
    }
    noted = {
        **asdict(found),
        "model": before,
        "dataset": scored.dataset,
        "split": scored.split,
        "data": scored.data_fingerprint,
        "without_score": len(scored.items) - len(answered),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "m2f2cli": __version__,
    }
    stage = io.read_stage(folder) | {"calibration": noted}
    with atomic_folder(target, overwrite or target == folder.resolve()) as partial:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name != MARK:
                (partial / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, partial / file.relative_to(folder))
        (partial / "config.json").write_bytes(json_bytes(config))
        stage |= {"fingerprint": io.fingerprint(partial)}
        (partial / MARK).write_bytes(json_bytes(stage))
    return found


def check_calibration(
    model: str, split: str, *, output: Path | None = None, overwrite: bool = False
) -> Path:
    """The folder that a calibration will be stored in; arguments as for ``calibrate_checkpoint``.

    It is known before pictures are judged, and never in the package or a download cache.

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
