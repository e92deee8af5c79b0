"""The options of ``m2f2 prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m2f2cli.options.fields import Options, group, option, required


@dataclass(frozen=True)
class FacesOptions(Options):
    """How faces are prepared."""

    frames: int = option(
        100, "Frames looked at in a video, evenly spaced.", low=1, high=1000, group="Input"
    )
    size: int = option(224, "Side of a crop in pixels.", low=16, high=1024, group="Output")
    margin: float = option(
        0.3, "Share by which a crop is larger than the face box.", low=0, high=4, group="Output"
    )
    boxes_from: Path | None = option(
        None,
        "Cut where these crops were cut, same frames: a forged video like its original. An HDF5 "
        "file of 'prepare faces', or a folder with those of the originals.",
        metavar="FILE.h5|DIR",
        group="Input",
    )
    workers: int | None = option(
        None, "Videos worked on at a time. Default: one for each processor.", low=1, group="Input"
    )
    overwrite: bool = option(False, "Replace what is there.", group="Output")


@dataclass(frozen=True, kw_only=True)
class PrepareFacesCommand(Options):
    """Every option of ``m2f2 prepare faces``."""

    sources: tuple[Path, ...] = option(
        (),
        "Videos, pictures, or folders of them with all their sub-folders.",
        argument=True,
        metavar="SOURCE...",
    )
    output: Path = required("Folder to write into.", short="-o", group="Output")
    faces: FacesOptions = group(FacesOptions)


@dataclass(frozen=True)
class PrepareDdvqaCommand(Options):
    """Every option of ``m2f2 prepare ddvqa``."""

    root: Path = required(
        "Holds annotations/{train,test} and images/c40/{train,test}.",
        argument=True,
        metavar="DDVQA_DIR",
    )
    output: Path = required("Folder to write into.", short="-o", group="Output")
    seed: int = option(0, "Decides the order of the training conversations.", low=0, group="Output")
    overwrite: bool = option(False, "Replace what is there.", group="Output")
