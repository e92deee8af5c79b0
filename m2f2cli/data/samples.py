"""Labelled pictures and videos: what names tell, what is in a set, and how to cut it by identity.

Pictures themselves are read elsewhere.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from m2f2cli.data.images import IMAGE_SUFFIXES
from m2f2cli.data.video import VIDEO_SUFFIXES, evenly
from m2f2cli.errors import ConfigError, InputError
from m2f2cli.files import parse_json
from m2f2cli.registry import Registry

REAL = "real"
_NAMED = 6  # kinds of files in a remark
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
# Layouts of picture sets, each a function of its folder that returns a SampleSet.
LAYOUTS = Registry(
    "data layout",
    {
        "folder": "m2f2cli.data.readers.folder:read_folder",
        "ddvqa": "m2f2cli.data.readers.ddvqa:read_ddvqa",
    },
    group="m2f2cli.layouts",
)


@dataclass(frozen=True)
class Sample:
    """A labelled picture or video file, or a labelled video in an HDF5 file."""

    path: Path
    name: str  # the path inside the set's folder, with slashes: its key in side files
    label: int  # 0 real, 1 fake
    kind: str  # "real", or which manipulation made it
    identities: tuple[str, ...]  # the people in it, at least one; a face swap has two
    clip: str | None = None  # the video's dataset in an HDF5 file; None for a picture
    frames: int = 1  # how many the video has

    @property
    def is_video(self) -> bool:
        """Whether it is a video file, in which faces have to be found."""
        return self.clip is None and self.path.suffix.lower() in VIDEO_SUFFIXES

    def frame_name(self, index: int) -> str:
        """Names a frame uniquely within the set: ``Deepfakes/000_003/17``, ``real/000/17``."""
        return f"{self.name}/{index}"

    def spread(self, count: int | None = None) -> list[int]:
        """Up to ``count`` frame numbers, evenly spaced; all of them for None.

        Raises:
            ConfigError: ``count`` is below 1.
        """
        if count is not None and count < 1:
            raise ConfigError(f"At least one frame a video is needed, not {count}.")
        return evenly(self.frames, self.frames if count is None else count)


@dataclass(frozen=True)
class SampleSet:
    """Labelled pictures or videos of one folder."""

    root: Path
    layout: str  # which reader found them
    samples: tuple[Sample, ...]  # sorted by name; of FaceForensics++ the originals first
    split: str = "all"  # which official split they are, where there is one
    missing: tuple[str, ...] = ()  # "FILE: KEY" of the split's videos that the files lack
    remark: str | None = None  # which other files lie in the folder; None for none

    def __len__(self) -> int:
        return len(self.samples)

    def labels(self) -> np.ndarray:
        """int64 (N,), 0 real and 1 fake."""
        return np.array([sample.label for sample in self.samples], dtype=np.int64)

    def kinds(self) -> list[str]:
        """The manipulations that occur, sorted, without ``real``."""
        return sorted({sample.kind for sample in self.samples if sample.label == 1})

    def people(self) -> set[str]:
        """Every identity that occurs."""
        return {person for sample in self.samples for person in sample.identities}

    def counts(self) -> dict[str, int]:
        """How many pictures of each kind, plus ``identities``."""
        kinds = Counter(sample.kind for sample in self.samples)
        return {**dict(sorted(kinds.items())), "identities": len(self.people())}

    def subset(self, keep: Iterable[int]) -> SampleSet:
        """The pictures at the given positions, in order."""
        return replace(self, samples=tuple(self.samples[index] for index in sorted(keep)))

    def without_videos(self) -> SampleSet:
        """The same without video files."""
        return replace(self, samples=tuple(s for s in self.samples if not s.is_video))

    def with_people(self, people: Mapping[str, tuple[str, ...]]) -> SampleSet:
        """The same with other identities, by name (see ``read_people``)."""
        samples = tuple(replace(one, identities=people[one.name]) for one in self.samples)
        return replace(self, samples=samples)

    def fingerprint(self) -> str:
        """``sha256:`` over every picture's name, size in bytes, label and identities.

        For a video in an HDF5 file also its key and number of frames; the size is the whole
        file's. Contents are not read, so that a million pictures take seconds.
        """
        digest = hashlib.sha256()
        sizes: dict[Path, int] = {}
        for sample in self.samples:
            if sample.path not in sizes:
                sizes[sample.path] = sample.path.stat().st_size
            inside = () if sample.clip is None else (sample.clip, sample.frames)
            row = (sample.name, sizes[sample.path], sample.label, *inside, *sample.identities)
            digest.update(repr(row).encode())
        return f"sha256:{digest.hexdigest()}"


def read_samples(source: str | Path, identities: Path | None = None) -> SampleSet:
    """Read a set of labelled pictures in any known layout.

    Args:
        source: A folder; ``folder:DIR`` or ``ddvqa:DIR`` (any name in ``LAYOUTS``) settles its
            layout, otherwise it is recognized by its contents.
        identities: CSV file that says who is in which picture (see ``read_people``).

    Raises:
        InputError: The folder is missing, holds no pictures, or lacks one of the two classes.
        ConfigError: The layout is unknown.
    """
    layout, colon, rest = str(source).partition(":")
    if not colon or len(layout) < 2:  # a Windows drive is no layout
        layout, rest = "", str(source)
    root = Path(rest).expanduser()
    if not root.is_dir():
        raise InputError(f"There is no data folder '{root}'.", "missing", "Check the path.")
    if not layout:
        layout = "ddvqa" if _looks_like_ddvqa(root) else "folder"
    found: SampleSet = LAYOUTS.get(layout)(root)
    if identities is not None:
        found = found.with_people(read_people(identities, {s.name for s in found.samples}))
    check_classes(found, f"'{root}'")
    return found


def check_classes(found: SampleSet, where: str) -> None:
    """Refuse a set without real or without forged pictures.

    Raises:
        InputError: Naming the class that is empty.
    """
    labels = {sample.label for sample in found.samples}
    for label, word in ((0, "real"), (1, "forged")):
        if label not in labels:
            raise InputError(
                f"There are no {word} pictures in {where} ({len(found)} pictures in all).",
                "empty",
                "Training and measuring need both, for example as DIR/real/ and DIR/fake/.",
            )


def identity_groups(samples: Sequence[Sample]) -> list[list[int]]:
    """Positions of samples, grouped so that no two groups share an identity.

    Two pictures belong together when a chain of shared identities joins them: the swap of A and B
    joins every picture of A with every picture of B.
    """
    parent: dict[str, str] = {}

    def root_of(person: str) -> str:
        while parent.setdefault(person, person) != person:
            parent[person] = parent[parent[person]]
            person = parent[person]
        return person

    for sample in samples:
        first = root_of(sample.identities[0])
        for person in sample.identities[1:]:
            parent[root_of(person)] = first
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(root_of(sample.identities[0]), []).append(index)
    return sorted(groups.values())


def hold_out(
    groups: Sequence[Sequence[int]], classes: np.ndarray, share: float, seed: int
) -> list[int]:
    """Draw whole groups until they hold a share of every class.

    Groups are taken in an order drawn from ``seed``, each if it does not carry what is held out
    past its share of any class by more than half the group.

    Args:
        groups: Positions, as ``identity_groups`` gives them.
        classes: int64 (N,), the class of each position, from 0.
        share: Wanted share, in [0, 1).
        seed: Decides the order.

    Returns:
        The positions held out, in no particular order.
    """
    count = int(classes.max(initial=0)) + 1
    wanted = np.bincount(classes, minlength=count) * share
    have = np.zeros(count)
    held: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(groups)):
        more = np.bincount(classes[groups[number]], minlength=count)
        if np.all((have + more / 2 <= wanted) | (more == 0)):
            have += more
            held += groups[number]
    return held


def split_by_identity(whole: SampleSet, share: float, seed: int) -> tuple[SampleSet, SampleSet]:
    """Cut a set between identities, with real and forged pictures alike; see ``hold_out``.

    Returns:
        The larger part, and the held-out one of about ``share``, in (0, 1).

    Raises:
        InputError: A part would lack real or forged pictures.
    """
    groups = identity_groups(whole.samples)
    held = hold_out(groups, whole.labels(), share, seed)
    rest = set(range(len(whole))) - set(held)
    parts = whole.subset(rest), whole.subset(held)
    if any(len({s.label for s in part.samples}) < 2 for part in parts):
        largest = max(len(group) for group in groups)
        raise InputError(
            f"'{whole.root}' cannot be cut between identities so that both parts have real and "
            f"forged pictures: {len(groups)} groups of identities, the largest with {largest} of "
            f"{len(whole)} pictures.",
            "empty",
            "Give --validation DIR, another --validation-share, or --identities FILE.csv.",
        )
    return parts


def people_in(token: str) -> tuple[str, ...]:
    """The identities that a file's or folder's name, without suffix, tells.

    FaceForensics++ video numbers where the name is made of them (both, for a swap), otherwise the
    name up to its last separator and number.
    """
    if video := _VIDEO.fullmatch(token):
        return tuple(dict.fromkeys(person for person in video.groups() if person))
    number = _NUMBER.fullmatch(token)
    return (number.group(1) if number and number.group(1) else token,)


def kind_of(name: str) -> str | None:
    """What a DD-VQA crop's file name says: ``real`` or a manipulation; None for any other name."""
    stem = Path(name).stem
    return DDVQA_KINDS[stem[0]] if DDVQA_NAME.fullmatch(stem) else None


def _looks_like_ddvqa(root: Path) -> bool:
    """Whether a folder is a DD-VQA data set, or directly holds crops named as its crops are."""
    if (root / DDVQA_CROPS / "train").is_dir():
        return True
    if (root / "real").is_dir() or (root / "fake").is_dir():
        return False
    first = next((path for path in list_files(root) if path.parent == root), None)
    return first is not None and kind_of(first.name) is not None


def other_files(counted: Counter[str], where: object) -> str | None:
    """In words, how many files of which suffixes were passed over; None for none."""
    number = counted.total()
    kinds = sorted(suffix or "without suffix" for suffix in counted)
    named = ", ".join(kinds[:_NAMED]) + (", …" if len(kinds) > _NAMED else "")
    noun = "file" if number == 1 else "files"
    return f"{number} {noun} of other kinds in {where} ({named})" if number else None


def list_files(
    folder: Path,
    suffixes: Collection[str] = IMAGE_SUFFIXES,
    *,
    others: Counter[str] | None = None,
) -> list[Path]:
    """Every file under a folder with one of the suffixes (lower case), sorted; none that is hidden.

    Args:
        folder: Its sub-folders are entered.
        suffixes: Of what is wanted.
        others: Where files with other suffixes are counted.

    Raises:
        InputError: A sub-folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"'{error.filename}' cannot be read: {error.strerror}.") from error

    found = []
    for where, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            suffix = Path(name).suffix.lower()
            if suffix in suffixes and not name.startswith("."):
                found.append(Path(where, name))
            elif others is not None and not name.startswith("."):
                others[suffix] += 1
    return sorted(found)


def load_json(file: Path, noun: str, hint: str) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: It is missing (``hint`` says how to come by it) or unreadable.
    """
    try:
        return parse_json(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"There is no {noun} '{file}'.", "missing", hint) from error
    except (OSError, ValueError) as error:
        raise InputError(f"The {noun} '{file}' cannot be read: {error}.") from error


def read_people(file: Path, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Read a CSV file with lines ``picture,identity[,identity…]``, without a heading.

    Args:
        file: The CSV file.
        names: The pictures it must speak of, as paths inside the data folder.

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
