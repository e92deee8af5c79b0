"""FaceForensics++ as HDF5 files of face crops: names, official splits, and who is in a video.

Names and keys as published: ``FF++_{original,Deepfakes,Face2Face,FaceSwap,NeuralTextures}_{c23,c40}
.h5``, or the same with ``_test_only`` before the suffix; key ``000`` for an original, ``000_003``
for the video 000 with the face or expression of 003. What is in a dataset: see ``data.clips``.

The official splits are three JSON files of pairs of video numbers, ``train.json``, ``val.json`` and
``test.json``. They come with FaceForensics++, not with this package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2f2cli.data.clips import ClipShape, FrameReader
from m2f2cli.data.naming import REAL, people_in
from m2f2cli.data.video import evenly
from m2f2cli.errors import ConfigError, InputError

ORIGINAL = "original"
MANIPULATIONS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
# FaceShifter came later and is not among the published files; name it to use it.
KNOWN = (*MANIPULATIONS, "FaceShifter")
COMPRESSIONS = ("raw", "c23", "c40")
# The name of a split to its file; "all" is every video there is and needs no file.
SPLITS = {"train": "train.json", "validation": "val.json", "test": "test.json", "all": ""}
_ALIASES = {"val": "validation"}
_TEST_ONLY = "_test_only"
_NUMBER = re.compile(r"\d{3}")


@dataclass(frozen=True)
class Clip:
    """One video in an HDF5 file.

    Attributes:
        file: The file.
        key: Its dataset there.
        label: 0 real, 1 fake.
        kind: ``real`` or the manipulation.
        identities: The video numbers in its key: one, or both of a manipulated video.
        frames: How many it has, at least one.
    """

    file: Path
    key: str
    label: int
    kind: str
    identities: tuple[str, ...]
    frames: int

    def frame_name(self, index: int) -> str:
        """Names a frame uniquely within the set: ``Deepfakes/000_003/17``, ``real/000/17``."""
        return f"{self.kind}/{self.key}/{index}"

    def spread(self, count: int | None = None) -> list[int]:
        """Up to ``count`` frame numbers, evenly spaced; all of them for None.

        Raises:
            ConfigError: ``count`` is below 1.
        """
        if count is not None and count < 1:
            raise ConfigError(f"At least one frame a video is needed, not {count}.")
        return evenly(self.frames, self.frames if count is None else count)


@dataclass(frozen=True)
class FfppSet:
    """Videos of FaceForensics++.

    Attributes:
        root: The folder of the HDF5 files.
        compression: One of ``COMPRESSIONS``.
        manipulations: Which were asked for.
        split: A key of ``SPLITS``.
        clips: The originals first, then each manipulation; sorted by key within.
        missing: ``FILE: KEY`` of the split's videos that the files lack; empty unless allowed.
    """

    root: Path
    compression: str
    manipulations: tuple[str, ...]
    split: str
    clips: tuple[Clip, ...]
    missing: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.clips)


def read_ffpp(
    root: Path,
    *,
    compression: str = "c23",
    manipulations: Sequence[str] = MANIPULATIONS,
    split: str = "train",
    splits: Path | None = None,
    allow_missing: bool = False,
) -> FfppSet:
    """List the videos of a split. Frames are read with ``FrameReader``, files are not kept open.

    Args:
        root: The folder of the HDF5 files.
        compression: One of ``COMPRESSIONS``.
        manipulations: Of ``KNOWN``; the originals always belong to a set.
        split: ``train``, ``validation`` (or ``val``), ``test``, or ``all`` for every video.
        splits: The folder of the split files; by default ``root/splits``, else ``root``.
        allow_missing: Pass over videos of the split that a file lacks (``prepare faces`` leaves
            out videos without a face) and name them in ``missing``, instead of failing.

    Raises:
        InputError: A file, video or split is missing, broken or of another layout; named.
        ConfigError: An unknown compression, manipulation or split.
    """
    split = _ALIASES.get(split, split)
    _check("compression", compression, COMPRESSIONS)
    _check("split", split, tuple(SPLITS))
    for manipulation in manipulations:
        _check("manipulation", manipulation, KNOWN)
    if not root.is_dir():
        raise InputError(f"There is no data folder '{root}'.", "missing", "Check the path.")
    pairs = None if split == "all" else read_split(splits_folder(root, splits), split)
    clips: list[Clip] = []
    missing: list[str] = []
    with FrameReader() as reader:
        for name in (ORIGINAL, *dict.fromkeys(manipulations)):
            file = find_file(root, name, compression, split=split)
            shapes = reader.shapes(file)
            keys = sorted(shapes) if pairs is None else _keys(name, pairs)
            clips += [_clip(file, name, key, shapes[key]) for key in keys if key in shapes]
            missing += [f"{file.name}: {key}" for key in keys if key not in shapes]
    if missing and not (allow_missing and clips):
        raise InputError(
            f"{len(missing)} videos of the split '{split}' are missing in '{root}', the first is "
            f"{missing[0]}.",
            "missing",
            "Prepare them with 'm2f2 prepare faces', or allow missing videos.",
        )
    return FfppSet(root, compression, tuple(manipulations), split, tuple(clips), tuple(missing))


def file_name(name: str, compression: str, *, test_only: bool = False) -> str:
    """The published name of a file: of ``original`` or of a manipulation."""
    return f"FF++_{name}_{compression}{_TEST_ONLY if test_only else ''}.h5"


def find_file(root: Path, name: str, compression: str, *, split: str = "train") -> Path:
    """Find the file of the originals or of a manipulation.

    Args:
        root: The folder of the HDF5 files.
        name: ``original`` or one of ``KNOWN``.
        compression: One of ``COMPRESSIONS``.
        split: For ``test`` the ``_test_only`` file serves where the whole one is not there.

    Raises:
        InputError: It is not there.
    """
    whole = root / file_name(name, compression)
    test_only = root / file_name(name, compression, test_only=True)
    if whole.is_file() or not (split == "test" and test_only.is_file()):
        if whole.is_file():
            return whole
        others = sorted(path.name for path in root.glob("FF++_*.h5"))
        raise InputError(
            f"There is no file '{whole.name}' in '{root}'.",
            "missing",
            f"It has {', '.join(others)}." if others else "Make it with 'm2f2 prepare faces'.",
        )
    return test_only


def looks_like_ffpp(root: Path) -> bool:
    """Whether a folder holds HDF5 files named as the published ones."""
    return any(root.glob("FF++_*.h5"))


def splits_folder(root: Path, given: Path | None = None) -> Path:
    """Where the split files are: as given, else ``root/splits`` if that is there, else ``root``."""
    if given is not None:
        return given
    return root / "splits" if (root / "splits").is_dir() else root


def read_split(folder: Path, split: str) -> list[tuple[str, str]]:
    """Read the pairs of video numbers of an official split.

    Args:
        folder: Where ``train.json``, ``val.json`` and ``test.json`` are.
        split: ``train``, ``validation`` (or ``val``) or ``test``.

    Raises:
        InputError: The file is missing or is no list of pairs of three-digit numbers.
    """
    file = folder / SPLITS[_ALIASES.get(split, split)]
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"There is no split file '{file}'.",
            "missing",
            "Name the folder of FaceForensics++'s train.json, val.json and test.json.",
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"The split file '{file}' cannot be read: {error}.") from error
    if not isinstance(rows, list) or not rows or not all(_is_pair(row) for row in rows):
        raise InputError(
            f"'{file}' is no list of pairs of video numbers.", hint='For example: [["000", "003"]].'
        )
    return [(first, second) for first, second in rows]


def _is_pair(row: object) -> bool:
    return (
        isinstance(row, list)
        and len(row) == 2
        and all(isinstance(number, str) and _NUMBER.fullmatch(number) for number in row)
    )


def _keys(name: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    return sorted(dict.fromkeys(_keys_of(name, pairs)))


def _keys_of(name: str, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    for first, second in pairs:
        yield from (
            (first, second)
            if name == ORIGINAL
            else (
                f"{first}_{second}",
                f"{second}_{first}",
            )
        )


def _clip(file: Path, name: str, key: str, shape: ClipShape) -> Clip:
    kind = REAL if name == ORIGINAL else name
    return Clip(file, key, int(name != ORIGINAL), kind, people_in(key), shape.frames)


def _check(noun: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ConfigError(f"There is no {noun} '{value}'.", f"Use one of: {', '.join(known)}.")
