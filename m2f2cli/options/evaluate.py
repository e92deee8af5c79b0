"""The options of ``m2f2 evaluate``, ``m2f2 calibrate`` and ``m2f2 robustness``."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TypeVar

from m2f2cli.errors import UsageError
from m2f2cli.options.fields import Options, flag_name, group, option, required

Kind = TypeVar("Kind", bound="MeasureOptions")


@dataclass(frozen=True)
class DdvqaData(Options):
    """DD-VQA."""

    data: Path | None = option(
        None, "The data set's folder, with images/c40/ and annotations/ in it.", blank=True
    )
    truth_from_names: bool = option(
        False, "Take the labels from file names (5_012.jpg is real), where no file says them."
    )
    split: str = option("test", "Which part of the data set.", "test", "train")


@dataclass(frozen=True)
class ImagesData(Options):
    """A folder of pictures or videos."""

    folder: Path | None = option(
        None,
        "Folder with real/ and fake/, or of DD-VQA crops, or of what 'm2f2 prepare faces' made.",
        argument=True,
        metavar="[DIR]",
        blank=True,
    )
    frames: int = option(16, "Frames of each video, evenly spaced.", low=1, high=1000)
    split: str = option(
        "all",
        "all; train or validation: that part of what --model was trained on; test: all, and "
        "nothing may be calibrated on it.",
        *("all", "train", "validation", "test"),
    )


@dataclass(frozen=True)
class FfppData(Options):
    """FaceForensics++ in HDF5 files."""

    folder: Path | None = option(
        None,
        "Folder of FF++_<manipulation>_<compression>.h5 files.",
        argument=True,
        metavar="[DIR]",
        blank=True,
    )
    compression: str = option("c23", "Which files.", "raw", "c23", "c40")
    manipulations: tuple[str, ...] = option(
        ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures"),
        "A manipulation to measure; may be repeated. The originals always belong to it.",
    )
    frames: int = option(32, "Frames of each video, evenly spaced.", low=1, high=1000)
    split: str = option("test", "Official split.", "test", "validation", "train", "all")
    splits: Path | None = option(
        None, "Folder of train.json, val.json and test.json. Default: splits in the data folder."
    )


@dataclass(frozen=True)
class MeasureOptions(Options):
    """What every command that measures has.

    Raises:
        UsageError: There is nothing to measure, or options exclude each other.
    """

    data: DdvqaData | ImagesData | FfppData
    truth: Path | None = option(
        None,
        'What is true, one row an item: {"image": "5_012.jpg", "label": "real"}, or the published '
        "file of test questions. Without it, the data tell.",
        group="Answers",
    )
    protocol: str = option(
        "standard",
        "standard, or paper: the published computations, faults included, for comparison.",
        "standard",
        "paper",
        group="Protocol",
    )
    resamples: int = option(
        2000,
        "Bootstrap resamples behind the intervals; 0 for none.",
        low=0,
        group="Protocol",
        key=True,
    )
    seed: int = option(0, "Seed of the bootstrap.", low=0, group="Protocol", key=True)
    model: str = option(
        "lite", "The detector: 'lite' (bundled), a checkpoint folder, or a hub id.", group="Model"
    )
    output: Path | None = option(
        None,
        "The .jsonl file of its records; run again to resume. Default: predictions.jsonl in the "
        "--report folder, else none is kept.",
        group="Model",
    )
    overwrite: bool = option(False, "Judge anew instead of resuming.", group="Model")
    faces: str = option(
        "none",
        "none: pictures are face crops. auto, all, largest: find faces first, as in m2f2 detect.",
        *("none", "auto", "all", "largest"),
        group="Model",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.", group="Model")
    dtype: str = option(
        "auto",
        "Arithmetic of the network.",
        *("auto", "float32", "bfloat16", "float16"),
        group="Model",
        key=True,
    )
    batch_size: int = option(16, "Crops judged at a time.", low=1, group="Model")
    report: Path | None = option(
        None, "Write index.html, report.json and scored.jsonl into this folder.", group="Results"
    )
    expected: Path | None = option(
        None,
        "Leave with exit code 4 if a figure is not what this file expects; it may be an earlier "
        "report.json.",
        name="check",
        group="Gates",
        metavar="FILE.json",
    )
    min_auc: float | None = option(
        None,
        "Leave with exit code 4 if the AUC is below this or undefined.",
        group="Gates",
        metavar="0..1",
    )
    min_accuracy: float | None = option(
        None,
        "Leave with exit code 4 if the accuracy is below this or undefined.",
        group="Gates",
        metavar="0..1",
    )

    @property
    def predictions(self) -> Path | None:
        """File of answers to measure; None where the model judges the data."""
        return None

    def check(self) -> None:
        """Something must be measured, and what makes answers is no part of measuring given ones."""
        given = self.predictions is not None
        if isinstance(self.data, DdvqaData) and not given and self.data.data is None:
            raise UsageError(
                "There is nothing to measure.",
                "Add --predictions FILE.jsonl, or --data DIR for a model to judge.",
            )
        told = given and self.truth is not None
        if isinstance(self.data, ImagesData) and self.data.folder is None and not told:
            raise UsageError(
                "The folder of pictures is missing.",
                "m2f2 evaluate images DIR; or name both --predictions and --truth.",
            )
        if isinstance(self.data, FfppData) and not given and self.data.folder is None:
            raise UsageError("The folder of HDF5 files is missing.", "m2f2 evaluate ffpp DIR")
        for name in ("output", "overwrite"):
            if given and getattr(self, name):
                flag = flag_name(name)
                raise UsageError(
                    f"{flag} is for a model that is run; --predictions names its answers.",
                    f"Leave out {flag} or --predictions.",
                )
        if self.output is not None and self.output.suffix.lower() != ".jsonl":
            raise UsageError(f"--output must end in .jsonl, not '{self.output.name}'.")
        for name in ("min_auc", "min_accuracy"):
            floor = getattr(self, name)
            if floor is not None and not 0 <= floor <= 1:
                raise UsageError(f"{flag_name(name)} must lie between 0 and 1, not {floor:g}.")


@dataclass(frozen=True)
class EvaluateOptions(MeasureOptions):
    """How answers are measured."""

    predictions: Path | None = option(
        None,
        "File of answers to measure: records of 'm2f2 detect', or a published .jsonl or .csv. "
        "Without it, --model judges the data first.",
        group="Answers",
    )


@dataclass(frozen=True)
class CalibrateOptions(EvaluateOptions):
    """How a threshold is learned and where it is stored."""

    target_fpr: float = option(
        0.05,
        "Share of real pictures that the stored threshold may call fake.",
        low=0.0,
        high=1.0,
        group="Calibration",
    )
    calibrated: Path | None = option(
        None,
        "Write a calibrated copy of the checkpoint here instead of changing it.",
        group="Calibration",
    )


@dataclass(frozen=True)
class RobustnessOptions(MeasureOptions):
    """How corrupted pictures are measured."""

    corruptions: tuple[str, ...] = option(
        ("corruptions", "chains"),
        "A corruption or chain to judge under, or all of either; may be repeated.",
        group="Robustness",
    )
    robustness_dir: Path | None = option(
        None,
        "Folder of that sweep's records, plot and table, resumable. Default: robustness in the "
        "--report folder.",
        group="Robustness",
        blank=True,
    )

    def check(self) -> None:
        """The sweep needs a folder."""
        super().check()
        if not (self.robustness_dir or self.report):
            raise UsageError(
                "m2f2 robustness needs a folder for its records.",
                "Add --robustness-dir DIR or --report DIR.",
            )


@dataclass(frozen=True)
class CompareOptions(Options):
    """How two reports are compared."""

    first: Path = required(
        "A folder that --report made, or the report.json in it.", argument=True, metavar="REPORT"
    )
    second: Path = required("The other one.", argument=True, metavar="REPORT")
    common_items: bool = option(False, "Compare what both have although their data differ.")
    resamples: int = option(2000, "Bootstrap resamples behind the intervals.", low=1)
    seed: int = option(0, "Seed of the bootstrap.", low=0)


def about(options: type[Kind], data: type[Options]) -> type[Kind]:
    """The options of a command about one kind of data: flags are made from this class."""
    named = [("data", data, group(data))]
    return make_dataclass(options.__name__, named, bases=(options,), frozen=True)
