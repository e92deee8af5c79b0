"""A set of labelled pictures: what is in it, who is in it, and how to cut it between identities.

NumPy and the standard library only; pictures are read elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from m2f2cli.data.naming import looks_like_ddvqa, read_people
from m2f2cli.errors import InputError
from m2f2cli.registry import Registry

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
    """One labelled picture, or one labelled video in an HDF5 file.

    Attributes:
        path: Its file.
        name: The path inside the set's folder, with slashes: its key in side files.
        label: 0 real, 1 fake.
        kind: ``real``, or which manipulation made it.
        identities: The people in it, at least one; a face swap has two.
        clip: The video's dataset in an HDF5 file; None for a picture.
        frames: How many the video has; 1 for a picture.
    """

    path: Path
    name: str
    label: int
    kind: str
    identities: tuple[str, ...]
    clip: str | None = None
    frames: int = 1


@dataclass(frozen=True)
class SampleSet:
    """Labelled pictures of one folder.

    Attributes:
        root: The folder.
        layout: Which reader found them.
        samples: Sorted by name.
    """

    root: Path
    layout: str
    samples: tuple[Sample, ...]

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
            layout, otherwise it is recognised by its contents.
        identities: CSV file that says who is in which picture (see ``data.naming.read_people``).

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
        layout = "ddvqa" if looks_like_ddvqa(root) else "folder"
    found: SampleSet = LAYOUTS.get(layout)(root)
    if identities is not None:
        people = read_people(identities, {sample.name for sample in found.samples})
        found = replace(
            found, samples=tuple(replace(s, identities=people[s.name]) for s in found.samples)
        )
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
    """Cut a set in two between identities.

    Both parts get real and forged pictures alike; see ``hold_out``.

    Args:
        whole: The pictures.
        share: Wanted share of the second part, in (0, 1).
        seed: Decides the cut; equal seeds give equal cuts.

    Returns:
        The larger and the held-out part.

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
