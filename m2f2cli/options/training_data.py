"""The options of ``m2f2 train-detector`` that say what it trains on and measures on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m2f2cli.errors import ConfigError
from m2f2cli.options.fields import Options, option, required

COMPRESSIONS = ("raw", "c23", "c40")
MANIPULATIONS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")


@dataclass(frozen=True)
class DataOptions(Options):
    """What to train on and what to measure on."""

    data: tuple[str, ...] = required(
        "What to train on: a folder with real/ and fake/ (sub-folders included), of DD-VQA crops "
        "named <manipulation>_<video>.jpg, or of FF++ HDF5 files. 'folder:DIR', 'ddvqa:DIR' or "
        "'ffpp:DIR' settles which. Repeat it to mix several."
    )
    validation: tuple[str, ...] | None = option(
        None,
        "Such folders to measure on. Default: the official validation videos of FF++, and a share "
        "of all else.",
    )
    validation_share: float = option(
        0.15,
        "Share of the pictures held out to measure on, cut between identities.",
        low=0.0,
        high=0.9,
        open_low=True,
    )
    split_seed: int = option(0, "Seed that decides which identities are held out.", low=0, key=True)
    compression: str = option("c23", "Which files of FF++ (published: c40).", *COMPRESSIONS)
    manipulations: tuple[str, ...] = option(
        MANIPULATIONS,
        "Which forgeries of FF++. Repeat it to name several; FaceShifter may be added.",
        *MANIPULATIONS,
        "FaceShifter",
        key=True,
    )
    splits: Path | None = option(
        None,
        "Folder of the official split files of FF++, train.json and val.json; 'splits' beside its "
        "HDF5 files, or these files' own folder, if unset.",
        key=True,
    )
    frames_per_video: int = option(
        1,
        "Frames of each FF++ video in an epoch, drawn anew each time (published: 1); 0 takes all.",
        low=0,
        key=True,
    )
    validation_frames: int = option(
        4, "Frames of each FF++ video to measure on, evenly spaced; 0 takes all.", low=0, key=True
    )
    limit: int = option(
        0,
        "Use at most this many real and as many forged pictures (or FF++ videos) to train on, and "
        "to measure on, drawn by --seed: for trial runs. 0 uses all.",
        low=0,
        key=True,
    )
    hold_out_manipulation: str | None = option(
        None,
        "Measure on this manipulation (or sub-folder of fake/) alone, beside the real pictures, "
        "and never train on it.",
        key=True,
    )
    identities: Path | None = option(
        None,
        "CSV file with lines 'picture,identity,...' (paths inside --data) that says who is in "
        "which picture. Without it, folders and file names tell.",
        key=True,
    )
    annotations: Path | None = option(
        None,
        "Folder of DD-VQA annotation files: what people saw in forged faces. Feeds "
        "--judgement-weight.",
        key=True,
    )
    unreadable: str = option(
        "error",
        "A picture that cannot be read, or a video that an FF++ file lacks, ends the run (error), "
        "or is left out and named (skip).",
        "error",
        "skip",
        key=True,
    )
    cache: str = option(
        "auto",
        "Keep decoded pictures in memory: always, never, or if they take at most 2 GiB (auto). "
        "Frames of FF++ are always read from their files.",
        *("auto", "always", "never"),
        key=True,
    )
    workers: int = option(0, "Processes that prepare pictures beside the training one.", low=0)
    crop_margin: float = option(
        0.3,
        "Margin around the face box that the pictures were cropped with; stored in the detector "
        "so that detect crops alike.",
        low=0.0,
        high=4.0,
        key=True,
    )
    domain_quantile: float = option(
        0.99,
        "Share of the held-out pictures whose features count as familiar: the detector stores the "
        "limit, and 'm2f2 detect' answers uncertain beyond it. 0 stores no check.",
        low=0.0,
        high=1.0,
        key=True,
    )

    def check(self) -> None:
        """A source is named once."""
        for source in self.data:
            if self.data.count(source) > 1:
                raise ConfigError(f"--data names '{source}' twice.", "Name each folder once.")
