"""Options turned into the settings of training pictures."""

from __future__ import annotations

import json
from pathlib import Path

from m2f2cli.data.readers.ddvqa import read_judgements
from m2f2cli.data.samples import SampleSet
from m2f2cli.errors import ConfigError, InputError
from m2f2cli.models.detector import Detector
from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.training.pictures import PictureSettings


def picture_settings(
    options: TrainDetectorOptions, detector: Detector, train: SampleSet, kinds: tuple[str, ...]
) -> PictureSettings:
    """How training pictures are made.

    Args:
        options: Augmentations, pseudo-fakes and targets.
        detector: Gives size, mean, deviation and the map's grid.
        train: The pictures to train on.
        kinds: Manipulations to tell apart.

    Raises:
        InputError: Annotations or soft labels are unreadable or speak of none of the pictures.
    """
    config, grid = detector.config, detector.clip.vision.grid
    aims, data = options.objective, options.data
    judgements = {}
    if aims.judgement_weight and data.annotations is not None:
        judged = read_judgements(data.annotations, [s.path.stem for s in train.samples])
        judgements = {
            s.name: judged[s.path.stem] * s.label  # nothing is wrong with a real picture
            for s in train.samples
            if s.path.stem in judged
        }
        if not judgements:
            raise InputError(f"'{data.annotations}' speaks of no picture in '{train.root}'.")
    if aims.map_weight and not config.forgery_map:
        raise ConfigError("--map-weight needs the forgery map, which the --model detector lacks.")
    return PictureSettings(
        seed=options.run.seed,
        size=config.image_size,
        mean=tuple(config.image_mean),
        std=tuple(config.image_std),
        augment=options.augment,
        pseudo=options.pseudo,
        balance=aims.balance,
        frames_per_video=data.frames_per_video,
        validation_frames=data.validation_frames,
        grid=grid if aims.map_weight else 0,
        kinds=kinds,
        judgements=judgements,
        soft=_soft_labels(aims.soft_labels, train) if aims.soft_labels else {},
        soft_weight=aims.soft_weight,
    )


def _soft_labels(path: Path, train: SampleSet) -> dict[str, float]:
    """Mean teacher probability of each training picture that has one."""
    found: dict[str, list[float]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                found.setdefault(row["sample"], []).append(float(row["fake_probability"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The soft labels '{path}' cannot be read: {type(error).__name__} {error}.",
            hint='Each line is {"sample": "fake/1.png", "fake_probability": 0.9}.',
        ) from error
    if any(not 0 <= p <= 1 for values in found.values() for p in values):
        raise InputError(f"A fake_probability in '{path}' is not between 0 and 1.")
    names = {sample.name for sample in train.samples}
    soft = {name: sum(values) / len(values) for name, values in found.items() if name in names}
    if not soft:
        raise InputError(f"'{path}' speaks of no picture to train on in '{train.root}'.")
    return soft
