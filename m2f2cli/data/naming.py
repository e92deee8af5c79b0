"""What the names of files and folders tell: who is in a picture, what made it, its layout.

Identities, manipulations and layouts; pictures themselves are not read.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from m2f2cli.data.images import IMAGE_SUFFIXES
from m2f2cli.errors import InputError

REAL = "real"
# The digit that a DD-VQA crop's name begins with.
DDVQA_KINDS = {
    "0": "Deepfakes",
    "1": "Face2Face",
    "2": "FaceShifter",
    "3": "FaceSwap",
    "5": REAL,
    "6": "NeuralTextures",
}
DDVQA_CROPS = Path("images", "c40")
DDVQA_NAME = re.compile(r"([01236])_\d{3}_\d{3}|5_\d{3}")
# FaceForensics++ video names: 005, 005_010, 0_005_010, each perhaps with a frame number behind.
_VIDEO = re.compile(r"(?:\d_)?(\d{3})(?:_(\d{3}))?(?:[_-](?:frame[_-]?)?\d+)?")
# A trailing number of a file name: holiday_003, holiday-3, holiday frame 3.
_NUMBER = re.compile(r"(.*?)[ _.-]+(?:frame[ _.-]*)?\d+")


def people_in(token: str) -> tuple[str, ...]:
    """The identities that a file's or folder's name tells.

    Args:
        token: A name without suffix.

    Returns:
        FaceForensics++ video numbers where the name is made of them (both, for a swap), otherwise
        the name up to its last separator and number.
    """
    if video := _VIDEO.fullmatch(token):
        return tuple(dict.fromkeys(person for person in video.groups() if person))
    number = _NUMBER.fullmatch(token)
    return (number.group(1) if number and number.group(1) else token,)


def kind_of(name: str) -> str | None:
    """What a crop's file name says: ``real`` or a manipulation; None for any other name."""
    stem = Path(name).stem
    return DDVQA_KINDS[stem[0]] if DDVQA_NAME.fullmatch(stem) else None


def looks_like_ddvqa(root: Path) -> bool:
    """Whether a folder is a DD-VQA data set, or directly holds crops named as its crops are."""
    if (root / DDVQA_CROPS / "train").is_dir():
        return True
    if (root / "real").is_dir() or (root / "fake").is_dir():
        return False
    first = next((path for path in list_pictures(root) if path.parent == root), None)
    return first is not None and kind_of(first.name) is not None


def list_pictures(folder: Path) -> list[Path]:
    """Every picture file under a folder, sorted; hidden files and folders are left out.

    Raises:
        InputError: A sub-folder cannot be read.
    """
    return list_files(folder, IMAGE_SUFFIXES)


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Every file under a folder with one of the suffixes (lower case), as ``list_pictures``."""

    def refuse(error: OSError) -> None:
        raise InputError(f"'{error.filename}' cannot be read: {error.strerror}.") from error

    found = []
    for where, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if Path(name).suffix.lower() in suffixes and not name.startswith("."):
                found.append(Path(where, name))
    return sorted(found)


def read_people(file: Path, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Read a CSV file with lines ``picture,identity[,identity…]``, without a heading.

    Args:
        file: The CSV file.
        names: The pictures it must speak of, as paths inside the data folder.

    Returns:
        The identities of every picture of ``names``.

    Raises:
        InputError: The file is unreadable, a line has no identity, or a picture is missing.
    """
    people: dict[str, tuple[str, ...]] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            for number, row in enumerate(csv.reader(lines), start=1):
                cells = tuple(cell.strip() for cell in row if cell.strip())
                if not cells:
                    continue
                if len(cells) < 2:
                    raise InputError(
                        f"Line {number} of '{file}' names no identity.",
                        hint="Write picture,identity on each line.",
                    )
                people[PurePosixPath(cells[0].replace("\\", "/")).as_posix()] = cells[1:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"The identities file '{file}' cannot be read: {error}.") from error
    missing = sorted(set(names) - people.keys())
    if missing:
        raise InputError(
            f"'{file}' does not say who is in '{missing[0]}' ({len(missing)} pictures in all).",
            hint="Give each picture a line, with its path inside the data folder.",
        )
    return people
