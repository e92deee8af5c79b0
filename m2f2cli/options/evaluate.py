"""The options of ``m2f2 evaluate``, in groups; ``config`` checks and spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m2f2cli.errors import ConfigError, UsageError
from m2f2cli.options.fields import Options, flag_name, option
from m2f2cli.options.training_data import COMPRESSIONS, MANIPULATIONS


@dataclass(frozen=True)
class AnswerOptions(Options):
    """What is measured."""

    predictions: Path | None = option(
        None,
        "File of answers to measure: records of 'm2f2 detect', or a published .jsonl or .csv. "
        "Without it, --model judges the data first.",
    )
    truth: Path | None = option(
        None,
        'What is true, one row an item: {"image": "5_012.jpg", "label": "real"}, or the published '
        "file of test questions. Without it, the data tell.",
    )


@dataclass(frozen=True)
class ModelOptions(Options):
    """The detector that judges the data when there are no predictions."""

    model: str = option("lite", "The detector: 'lite' (bundled), a checkpoint folder, or a hub id.")
    output: Path | None = option(
        None,
        "The .jsonl file of its records; run again to resume. Default: predictions.jsonl in the "
        "--report folder, else none is kept.",
    )
    overwrite: bool = option(False, "Judge anew instead of resuming.")
    faces: str = option(
        "none",
        "none: pictures are face crops. auto, all, largest: find faces first, as in m2f2 detect.",
        "none",
        "auto",
        "all",
        "largest",
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")
    dtype: str = option(
        "auto", "Arithmetic of the network.", "auto", "float32", "bfloat16", "float16"
    )
    batch_size: int = option(16, "Crops judged at a time.", low=1)


@dataclass(frozen=True)
class ProtocolOptions(Options):
    """How it is measured."""

    protocol: str = option(
        "standard",
        "standard, or paper: the published computations, faults included, for comparison.",
        "standard",
        "paper",
    )
    resamples: int = option(2000, "Bootstrap resamples behind the intervals; 0 for none.", low=0)
    seed: int = option(0, "Seed of the bootstrap.", low=0)


@dataclass(frozen=True)
class ResultOptions(Options):
    """What comes of it."""

    report: Path | None = option(
        None, "Write index.html, report.json and scored.jsonl into this folder."
    )


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """Storing a threshold in the checkpoint."""

    calibrate: bool = option(
        False,
        "Fit temperature, threshold and uncertain band to this set and store them in the "
        "checkpoint. Refused on a test set.",
    )
    target_fpr: float = option(
        0.05,
        "Share of real pictures that the stored threshold may call fake.",
        low=0.0,
        high=1.0,
    )
    calibrated: Path | None = option(
        None, "Write a calibrated copy of the checkpoint here instead of changing it."
    )

    def check(self) -> None:
        """``--calibrated`` says where, not whether."""
        if self.calibrated is not None and not self.calibrate:
            raise ConfigError("--calibrated needs --calibrate.", "Add --calibrate.")


@dataclass(frozen=True)
class RobustnessOptions(Options):
    """Corrupted pictures."""

    robustness: bool = option(
        False, "Also judge the data corrupted: JPEG, blur, noise, scaling and brightness."
    )
    robustness_dir: Path | None = option(
        None,
        "Folder of that sweep's records, plot and table, resumable. Default: robustness in the "
        "--report folder.",
    )


@dataclass(frozen=True)
class DdvqaData(Options):
    """DD-VQA."""

    data: Path | None = option(
        None, "The data set's folder, with images/c40/ and annotations/ in it."
    )
    truth_from_names: bool = option(
        False, "Take the labels from file names (5_012.jpg is real), where no file says them."
    )
    split: str = option("test", "Which part of the data set.", "test", "train")


@dataclass(frozen=True)
class ImagesData(Options):
    """A folder of pictures."""

    folder: Path | None = option(None, "Folder with real/ and fake/, or of DD-VQA crops.")
    split: str = option(
        "all",
        "all; train or validation: that part of what --model was trained on; test: all, and "
        "nothing may be calibrated on it.",
        "all",
        "train",
        "validation",
        "test",
    )


@dataclass(frozen=True)
class FfppData(Options):
    """FaceForensics++ in HDF5 files."""

    folder: Path | None = option(None, "Folder of FF++_<manipulation>_<compression>.h5 files.")
    compression: str = option("c23", "Which files.", *COMPRESSIONS)
    manipulations: tuple[str, ...] = option(
        MANIPULATIONS,
        "A manipulation to measure; may be repeated. The originals always belong to it.",
    )
    frames: int = option(32, "Frames of each video, evenly spaced.", low=1, high=1000)
    split: str = option("test", "Official split.", "test", "validation", "train", "all")
    splits: Path | None = option(
        None, "Folder of train.json, val.json and test.json. Default: splits in the data folder."
    )


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """Options that every evaluation has; a data set's own are in its subclass.

    Raises:
        UsageError: Two of them exclude each other.
    """

    data: DdvqaData | ImagesData | FfppData
    answers: AnswerOptions = AnswerOptions()
    protocol: ProtocolOptions = ProtocolOptions()
    model: ModelOptions = ModelOptions()
    results: ResultOptions = ResultOptions()
    calibration: CalibrationOptions = CalibrationOptions()
    robustness: RobustnessOptions = RobustnessOptions()

    def check(self) -> None:
        """What excludes what."""
        if self.answers.predictions is not None:
            clash = [
                flag_name(name)
                for name, given in (
                    ("output", self.model.output is not None),
                    ("overwrite", self.model.overwrite),
                    ("robustness", self.robustness.robustness),
                )
                if given
            ]
            if clash:
                raise UsageError(
                    f"{clash[0]} is for a model that is run; --predictions names its answers.",
                    f"Leave out {clash[0]} or --predictions.",
                )
        wants_sweep = self.robustness.robustness
        if wants_sweep and not (self.robustness.robustness_dir or self.results.report):
            raise UsageError(
                "m2f2 robustness needs a folder for its records.",
                "Add --robustness-dir DIR or --report DIR.",
            )


@dataclass(frozen=True)
class EvaluateDdvqaOptions(EvaluateOptions):
    """Of ``m2f2 evaluate ddvqa``."""

    data: DdvqaData = DdvqaData()


@dataclass(frozen=True)
class EvaluateImagesOptions(EvaluateOptions):
    """Of ``m2f2 evaluate images``."""

    data: ImagesData = ImagesData()


@dataclass(frozen=True)
class EvaluateFfppOptions(EvaluateOptions):
    """Of ``m2f2 evaluate ffpp``."""

    data: FfppData = FfppData()
