"""FaceForensics++ as HDF5 files of face crops: names, official splits, and who is in a video.

Names and keys as published: ``FF++_{original,Deepfakes,Face2Face,FaceSwap,NeuralTextures}_{c23,c40}
.h5``, or the same with ``_test_only`` before the suffix; key ``000`` for an original, ``000_003``
for the video 000 with the face or expression of 003. What is in a dataset: see ``data.clips``.

The official splits are three JSON files of pairs of video numbers, ``train.json``, ``val.json`` and
``test.json``. They come with FaceForensics++, not with this package.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from m2f2cli.data.clips import FrameReader
from m2f2cli.data.samples import REAL, Sample, SampleSet, load_json, people_in
from m2f2cli.errors import ConfigError, InputError
from m2f2cli.options.training_data import COMPRESSIONS, MANIPULATIONS

ORIGINAL = "original"
# FaceShifter came later and is not among the published files; name it to use it.
KNOWN = (*MANIPULATIONS, "FaceShifter")
# The name of a split to its file; "all" is every video there is and needs no file.
SPLITS = {"train": "train.json", "validation": "val.json", "test": "test.json", "all": ""}
_ALIASES = {"val": "validation"}
_NUMBER = re.compile(r"\d{3}")


def read_ffpp(
    root: Path,
    *,
    compression: str = "c23",
    manipulations: Sequence[str] = MANIPULATIONS,
    split: str = "train",
    splits: Path | None = None,
    allow_missing: bool = False,
) -> SampleSet:
    """List the videos of a split. Frames are read with ``FrameReader``, files are not kept open.

    Args:
        root: The folder of the HDF5 files.
        compression: One of ``COMPRESSIONS``.
        manipulations: Of ``KNOWN``; the originals always belong to a set.
        split: ``train``, ``validation`` (or ``val``), ``test``, or ``all`` for every video.
        splits: The folder of the split files; by default ``root/splits``, else ``root``.
        allow_missing: Pass over videos of the split that a file lacks (``prepare faces`` leaves
            out videos without a face) and name them in ``missing``, instead of failing.

    Returns:
        The originals first, then each manipulation; sorted by key within. A sample's name is its
        kind and its key (``Deepfakes/000_003``), its identities are the numbers in the key.

    Raises:
        InputError: A file, video or split is missing, broken or of another layout; named.
        ConfigError: An unknown compression, manipulation or split.
    """
    split = _ALIASES.get(split, split)
    _check("compression", compression, COMPRESSIONS)
    _check("split", split, SPLITS)
    for manipulation in manipulations:
        _check("manipulation", manipulation, KNOWN)
    if not root.is_dir():
        raise InputError(f"There is no data folder '{root}'.", "missing", "Check the path.")
    pairs = None
    if split != "all":
        beside = root / "splits"
        pairs = read_split(splits or (beside if beside.is_dir() else root), split)
    samples: list[Sample] = []
    missing: list[str] = []
    with FrameReader() as reader:
        for name in (ORIGINAL, *dict.fromkeys(manipulations)):
            file = find_file(root, name, compression, split=split)
            shapes = reader.shapes(file)
            label, kind = (0, REAL) if name == ORIGINAL else (1, name)
            for key in sorted(shapes if pairs is None else _keys(name, pairs)):
                if key not in shapes:
                    missing.append(f"{file.name}: {key}")
                    continue
                people, frames = people_in(key), shapes[key].frames
                samples.append(Sample(file, f"{kind}/{key}", label, kind, people, key, frames))
    if missing and not (allow_missing and samples):
        raise InputError(
            f"{len(missing)} videos of the split '{split}' are missing in '{root}', the first is "
            f"{missing[0]}.",
            "missing",
            "Prepare them with 'm2f2 prepare faces'; training passes over them with --unreadable "
            "skip.",
        )
    return SampleSet(root, "ffpp", tuple(samples), split, tuple(missing))


def file_name(name: str, compression: str, *, test_only: bool = False) -> str:
    """The published name of a file: of ``original`` or of a manipulation."""
    return f"FF++_{name}_{compression}{'_test_only' if test_only else ''}.h5"


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
    if whole.is_file():
        return whole
    test_only = root / file_name(name, compression, test_only=True)
    if split == "test" and test_only.is_file():
        return test_only
    others = sorted(path.name for path in root.glob("FF++_*.h5"))
    raise InputError(
        f"There is no file '{whole.name}' in '{root}'.",
        "missing",
        f"It has {', '.join(others)}." if others else "Make it with 'm2f2 prepare faces'.",
    )


def looks_like_ffpp(root: Path) -> bool:
    """Whether a folder holds HDF5 files named as the published ones."""
    return any(root.glob("FF++_*.h5"))


def read_split(folder: Path, split: str) -> list[tuple[str, str]]:
    """Read the pairs of video numbers of an official split.

    Args:
        folder: Where ``train.json``, ``val.json`` and ``test.json`` are.
        split: ``train``, ``validation`` (or ``val``) or ``test``.

    Raises:
        InputError: The file is missing or is no list of pairs of three-digit numbers.
    """
    file = folder / SPLITS[_ALIASES.get(split, split)]
    hint = "Name the folder of FaceForensics++'s train.json, val.json and test.json."
    rows = load_json(file, "split file", hint)
    if not isinstance(rows, list) or not rows or not all(map(_is_pair, rows)):
        raise InputError(
            f"'{file}' is no list of pairs of video numbers.", hint='For example: [["000", "003"]].'
        )
    return [(first, second) for first, second in rows]


def _is_pair(row: object) -> bool:
    if not isinstance(row, list) or len(row) != 2:
        return False
    return all(isinstance(number, str) and _NUMBER.fullmatch(number) for number in row)


def _keys(name: str, pairs: Sequence[tuple[str, str]]) -> set[str]:
    """The videos of a split: each person's original, or both directions of each pair."""
    if name == ORIGINAL:
        return {number for pair in pairs for number in pair}
    return {key for a, b in pairs for key in (f"{a}_{b}", f"{b}_{a}")}


def _check(noun: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ConfigError(f"There is no {noun} '{value}'.", f"Use one of: {', '.join(known)}.")
