"""What a training reads: sources of several layouts as one set to train on and one to measure on.

FaceForensics++ brings its official splits. All other pictures are cut between identities, so that
nobody is on both sides: whoever the official splits know goes where they put him.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from m2f2cli.data.readers.ffpp import looks_like_ffpp, read_ffpp
from m2f2cli.data.samples import (
    LAYOUTS,
    REAL,
    SampleSet,
    check_classes,
    identity_groups,
    read_people,
    read_samples,
    split_by_identity,
)
from m2f2cli.errors import ConfigError, InputError
from m2f2cli.options.training_data import DataOptions

_FFPP = "ffpp:"
Notify = Callable[[str], None]


def read_sources(
    data: DataOptions, *, seed: int = 0, notify: Notify | None = None
) -> tuple[SampleSet, SampleSet]:
    """The pictures and videos to train on and those to measure on, with no identity in both.

    ``seed`` draws those that ``data.limit`` leaves; ``notify`` is called with the name of each
    video that is passed over.

    Raises:
        InputError: A source cannot be read or cut, or one identity is on both sides.
    """
    notify = notify or (lambda _: None)
    official: list[SampleSet] = []
    official_held: list[SampleSet] = []
    free: list[SampleSet] = []
    for source, prefix in _prefixes(data.data).items():
        into = official if is_ffpp(source) else free
        into.append(_read(source, prefix, data, "train", notify))
        if is_ffpp(source) and data.validation is None:
            official_held.append(_read(source, prefix, data, "validation", notify))
    if data.identities is not None:
        people = read_people(data.identities, {s.name for part in free for s in part.samples})
        free = [part.with_people(people) for part in free]
    if data.validation is not None:
        sources = _prefixes(data.validation).items()
        train = _joined([*official, *free])
        held = _joined([_read(s, prefix, data, "validation", notify) for s, prefix in sources])
    elif official:
        train, held = _joined(official), _joined(official_held)
    else:
        train, held = split_by_identity(_joined(free), data.validation_share, data.split_seed)
    if shared := sorted(train.people() & held.people()):
        raise InputError(
            f"{len(shared)} identities are in both --data and --validation, '{shared[0]}' first.",
            hint="Validation must show people that training has not seen; if these are different "
            "people of one name, rename their folders or files.",
        )
    for part in free if official and data.validation is None else ():
        more, rest = _cut_along(part, train.people(), held.people(), data)
        train, held = _joined([train, *more]), _joined([held, *rest])
    if data.hold_out_manipulation is not None:
        train, held = _hold_out(train, held, data.hold_out_manipulation)
    return _limited(train, data.limit, seed), _limited(held, data.limit, seed)


def _hold_out(train: SampleSet, held: SampleSet, kind: str) -> tuple[SampleSet, SampleSet]:
    """Take a kind of forgery out of the training part, and all others out of the held-out one.

    Raises:
        InputError: One of them then lacks forgeries.
    """
    seen = [n for n, sample in enumerate(train.samples) if sample.kind != kind]
    asked = [n for n, sample in enumerate(held.samples) if sample.kind in (REAL, kind)]
    parts = train.subset(seen), held.subset(asked)
    if not all(part.kinds() for part in parts):
        raise InputError(
            f"Without '{kind}' to train on and with it to measure on, forgeries are lacking: the "
            f"data has {', '.join(train.kinds())}.",
            "empty",
            "Name one of several manipulations with --hold-out-manipulation.",
        )
    return parts


def is_ffpp(source: str) -> bool:
    """Whether a source is of FaceForensics++ videos in HDF5 files, by its prefix or contents."""
    return source.startswith(_FFPP) or (":" not in source[2:] and looks_like_ffpp(_root(source)))


def _root(source: str) -> Path:
    """The folder of a source, without the name of its layout."""
    layout, colon, rest = source.partition(":")
    return Path(rest if colon and len(layout) > 1 else source).expanduser()


def _read(source: str, prefix: str, data: DataOptions, split: str, notify: Notify) -> SampleSet:
    """A source's pictures, or the videos of its official split, with a prefix to their names."""
    if is_ffpp(source):
        found = _read_videos(source, data, split, notify)
    else:
        try:
            found = read_samples(source)
        except ConfigError as error:
            known = ", ".join([*LAYOUTS.names(), _FFPP.removesuffix(":")])
            raise ConfigError(error.message, f"Use one of: {known}.") from error
        found = _without_videos(found, notify)
        if found.remark:
            notify(found.remark)
    named = (replace(s, name=f"{prefix}/{s.name}" if prefix else s.name) for s in found.samples)
    return replace(found, samples=tuple(named))


def _without_videos(found: SampleSet, notify: Notify) -> SampleSet:
    """The pictures of a set; its videos are named, or an error where there is nothing else."""
    pictures = found.without_videos()
    if {sample.label for sample in pictures.samples} != {0, 1}:
        raise InputError(
            f"'{found.root}' holds videos; a detector learns from crops of faces.",
            "empty",
            f"m2f2 prepare faces '{found.root}' --output CROPS, then --data CROPS.",
        )
    for sample in found.samples:
        if sample.is_video:
            notify(sample.name)
    return pictures


def _read_videos(source: str, data: DataOptions, split: str, notify: Notify) -> SampleSet:
    found = read_ffpp(
        _root(source),
        compression=data.compression,
        manipulations=data.manipulations,
        split=split,
        splits=data.splits,
        allow_missing=data.unreadable == "skip",
    )
    for name in found.missing:
        notify(name)
    ordered = sorted(found.samples, key=lambda sample: sample.name)
    videos = SampleSet(found.root, "ffpp", tuple(ordered))
    check_classes(videos, f"the split '{split}' of '{found.root}'")
    return videos


def _prefixes(sources: Sequence[str]) -> dict[str, str]:
    """What goes before the names of each source's pictures: its folder's name, if it is not alone.

    Folders of one name are numbered: ``faces``, ``faces-2``.
    """
    if len(sources) == 1:
        return {sources[0]: ""}
    taken: dict[str, str] = {}
    for source in sources:
        name = base = _root(source).absolute().name
        number = 2
        while name in taken.values():
            name, number = f"{base}-{number}", number + 1
        taken[source] = name
    return taken


def _joined(parts: Sequence[SampleSet]) -> SampleSet:
    if len(parts) == 1:
        return parts[0]
    roots = dict.fromkeys(str(part.root) for part in parts)
    samples = sorted((s for part in parts for s in part.samples), key=lambda sample: sample.name)
    return SampleSet(Path(" + ".join(roots)), "mixed", tuple(samples))


def _cut_along(
    part: SampleSet, trained: set[str], held_out: set[str], data: DataOptions
) -> tuple[list[SampleSet], list[SampleSet]]:
    """Cut a set so that whoever is already on a side stays there; the others by share.

    Raises:
        InputError: A chain of shared identities joins the two sides.
    """
    sides: dict[str, list[int]] = {"train": [], "held": [], "loose": []}
    for group in identity_groups(part.samples):
        people = {person for index in group for person in part.samples[index].identities}
        if people & trained and people & held_out:
            raise InputError(
                f"Pictures of '{part.root}' join '{min(people & trained)}', whom the official "
                f"split trains on, with '{min(people & held_out)}', whom it measures on.",
                hint="Leave out those pictures, or give --validation DIR.",
            )
        side = "train" if people & trained else "held" if people & held_out else "loose"
        sides[side] += group
    train, held = [part.subset(sides["train"])], [part.subset(sides["held"])]
    if sides["loose"]:
        loose = part.subset(sides["loose"])
        more, rest = split_by_identity(loose, data.validation_share, data.split_seed)
        train, held = [*train, more], [*held, rest]
    return train, held


def _limited(part: SampleSet, limit: int, seed: int) -> SampleSet:
    """At most ``limit`` samples of each class; equal seeds draw equal ones."""
    if not limit:
        return part
    rng = np.random.default_rng(seed)
    labels = part.labels()
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:limit] for label in (0, 1)]
    return part.subset(int(index) for index in np.concatenate(drawn))
