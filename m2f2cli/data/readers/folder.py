"""Pictures in ``real/`` and ``fake/`` folders, and who is in them as far as names tell."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from m2f2cli.data.images import IMAGE_SUFFIXES
from m2f2cli.data.samples import REAL, Sample, SampleSet
from m2f2cli.errors import InputError

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


def read_folder(root: Path) -> SampleSet:
    """Read ``root/real/**`` and ``root/fake/**``.

    Sub-folders: where only ``fake/`` has them, its first level names the manipulation; where both
    have them, the deepest folder names who is in the picture, and a first level of ``fake/`` with
    further folders below it names the manipulation. Identities are told by that folder or else
    by the file's name (see ``people_in``).

    Raises:
        InputError: ``real`` or ``fake`` is missing or empty.
    """
    listed = {}
    for label, word in enumerate((REAL, "fake")):
        folder = root / word
        if not folder.is_dir():
            raise InputError(
                f"'{root}' has no folder '{word}'.",
                "missing",
                "Put pictures in DIR/real/ and DIR/fake/, or name the layout: ddvqa:DIR.",
            )
        listed[label] = [(path, path.relative_to(folder).parts) for path in list_pictures(folder)]
        if not listed[label]:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise InputError(f"There are no pictures in '{folder}'.", "empty", f"Known: {known}.")
    real_has_folders = any(len(parts) > 1 for _, parts in listed[0])
    samples = []
    for label, pictures in listed.items():
        for path, parts in pictures:
            folders = parts[:-1]
            kind = REAL if label == 0 else "fake"
            if label == 1 and folders and (len(folders) > 1 or not real_has_folders):
                kind, folders = folders[0], folders[1:]
            token = folders[-1] if folders else path.stem
            name = path.relative_to(root).as_posix()
            samples.append(Sample(path, name, label, kind, people_in(token)))
    return SampleSet(root, "folder", tuple(sorted(samples, key=lambda sample: sample.name)))


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
