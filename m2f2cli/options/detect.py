"""The options of ``m2f2 detect``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m2f2cli.errors import UsageError
from m2f2cli.options.fields import Options, group, option

FACES = ("auto", "all", "largest", "none")
GATES = ("fake", "uncertain", "error")


def _band(given: Any) -> Any:
    """A value of ``--uncertain``: LOW:HIGH or a pair, ``none`` or None, ``checkpoint``."""
    if given is None or given == "checkpoint":
        return given
    if str(given).lower() == "none":
        return None
    try:
        ends = given if isinstance(given, (tuple, list)) else str(given).split(":")
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        raise UsageError(
            f"--uncertain takes LOW:HIGH or none, not '{given}'.",
            "For example: --uncertain 0.4:0.6",
        ) from None
    if not 0 <= low <= high <= 1:
        raise UsageError(
            f"The uncertain band must be LOW:HIGH with 0 <= LOW <= HIGH <= 1, not {low}:{high}.",
            "For example: --uncertain 0.4:0.6, or --uncertain none.",
        )
    return low, high


def _spelled(band: tuple[float, float] | str | None) -> str:
    return f"{band[0]:g}:{band[1]:g}" if isinstance(band, tuple) else str(band or "none")


@dataclass(frozen=True)
class DetectOptions(Options):
    """How to judge."""

    faces: str = option(
        "auto",
        "auto: every face found, a small square picture without one counts as a crop; all; "
        "largest; none: pictures are crops.",
        *FACES,
        group="Input",
    )
    frames: int = option(
        16, "Frames looked at in a video, evenly spaced.", low=1, high=1000, group="Input"
    )
    min_face: int | None = option(
        None,
        "Look for faces from so many pixels on, in tiles. Default: 1/12 of the longest side.",
        low=16,
        high=1000,
        group="Input",
        metavar="PIXELS",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.", group="Model")
    dtype: str = option("auto", "auto, float32, bfloat16 or float16.", group="Model")
    batch_size: int = option(
        16, "Crops judged, or answers written, at a time.", low=1, group="Model"
    )
    threshold: float | None = option(
        None,
        "Probability from which the verdict is fake. Default: the model's.",
        low=0.0,
        high=1.0,
        group="Verdict",
        metavar="0..1",
    )
    uncertain: tuple[float, float] | Literal["checkpoint"] | None = option(
        "checkpoint",
        "Probabilities in this band give the verdict uncertain. Default: the model's.",
        group="Verdict",
        metavar="LOW:HIGH|none",
        says_default=True,
        parse=_band,
        spell=_spelled,
    )
    heatmap: Path | None = option(
        None,
        "Draw the forgery map over each picture, into this folder.",
        group="Output",
        metavar="DIR",
    )
    annotate: Path | None = option(
        None,
        "Draw boxes and scores into copies of the pictures, in this folder.",
        group="Output",
        metavar="DIR",
    )


@dataclass(frozen=True)
class ItemOptions(Options):
    """What is judged, by which model, and where the records go."""

    paths: tuple[str, ...] = option(
        (),
        "Pictures, videos, folders, globs, @LIST.txt, or - for a list on standard input.",
        argument=True,
        metavar="PATH...",
    )
    recursive: bool = option(False, "Enter the sub-folders of folders.", short="-r", group="Input")
    model: str = option(
        "lite",
        "The model: 'lite' (bundled), a checkpoint folder, or a hub id.",
        short="-m",
        group="Model",
        metavar="lite|DIR|HUB-ID",
    )
    fail_on: tuple[str, ...] = option(
        (),
        "Leave with exit code 4 if there is a fake item, a fake or uncertain one, or one without "
        "a verdict. May be repeated.",
        *GATES,
        group="Verdict",
    )
    output: Path | None = option(
        None,
        "Write one record an item; run again to resume. 'm2f2 detect' takes FILE.csv too.",
        short="-o",
        group="Output",
        metavar="FILE.jsonl",
    )
    overwrite: bool = option(False, "Replace what is there.", group="Output")


@dataclass(frozen=True)
class DetectCommand(Options):
    """Every option of ``m2f2 detect``."""

    items: ItemOptions = group(ItemOptions)
    detect: DetectOptions = group(DetectOptions)
