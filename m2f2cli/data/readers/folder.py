"""Pictures and videos in ``real/`` and ``fake/`` folders, and their crops in HDF5 files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from m2f2cli.data.clips import FrameReader
from m2f2cli.data.images import IMAGE_SUFFIXES
from m2f2cli.data.samples import REAL, Sample, SampleSet, list_files, other_files, people_in
from m2f2cli.data.video import VIDEO_SUFFIXES
from m2f2cli.errors import InputError

# Names of the folders of a class, in whatever case: the usual ones, those of Celeb-DF, of DFD.
CLASSES = {
    "real": 0, "0_real": 0, "celeb-real": 0, "youtube-real": 0, "dfd_original_sequences": 0,
    "fake": 1, "1_fake": 1, "celeb-synthesis": 1, "dfd_manipulated_sequences": 1,
}  # fmt: skip


class _Found(NamedTuple):
    """A picture, a video, or a video's crops, by its place below the folder of its class."""

    label: int
    path: Path
    name: str
    parts: tuple[str, ...]
    clip: str | None = None
    frames: int = 1


def read_folder(root: Path) -> SampleSet:
    """Read ``root/real/**`` and ``root/fake/**``, or the videos ``real/**`` of ``root/*.h5``.

    ``CLASSES`` has the other names of these folders. Sub-folders: where only ``fake/`` has them,
    its first level names the manipulation; where both have them, the deepest folder names who is
    in the picture, and a first level of ``fake/`` with further folders below it names the
    manipulation. Identities are told by that folder or else by the file's name (see ``people_in``).

    Raises:
        InputError: ``real`` or ``fake`` is missing or empty.
    """
    others: Counter[str] = Counter()
    found = list(_files(root, others)) or list(_clips(root))
    for label, word in enumerate((REAL, "fake")):
        if any(one.label == label for one in found):
            continue
        folder = next(iter(_folders(root, label)), None)
        if folder is None:
            raise InputError(
                f"'{root}' has no folder '{word}'.",
                "missing",
                "Put pictures in DIR/real/ and DIR/fake/, or name the layout: ddvqa:DIR.",
            )
        known = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise InputError(f"There are no pictures in '{folder}'.", "empty", f"Known: {known}.")
    real_has_folders = any(len(one.parts) > 1 for one in found if one.label == 0)
    samples = []
    for one in found:
        folders = one.parts[:-1]
        kind = REAL if one.label == 0 else "fake"
        if one.label == 1 and folders and (len(folders) > 1 or not real_has_folders):
            kind, folders = folders[0], folders[1:]
        people = people_in(folders[-1] if folders else PurePosixPath(one.parts[-1]).stem)
        samples.append(
            Sample(one.path, one.name, one.label, kind, people, one.clip, frames=one.frames)
        )
    ordered = tuple(sorted(samples, key=lambda sample: sample.name))
    return SampleSet(root, "folder", ordered, remark=other_files(others, f"'{root}'"))


def _folders(root: Path, label: int) -> list[Path]:
    """The folders of a class."""
    inside = (path for path in sorted(root.iterdir()) if path.is_dir())
    return [path for path in inside if CLASSES.get(path.name.lower()) == label]


def _files(root: Path, others: Counter[str]) -> Iterator[_Found]:
    for label in (0, 1):
        for folder in _folders(root, label):
            for path in list_files(folder, IMAGE_SUFFIXES | VIDEO_SUFFIXES, others=others):
                parts = path.relative_to(folder).parts
                yield _Found(label, path, path.relative_to(root).as_posix(), parts)


def _clips(root: Path) -> Iterator[_Found]:
    """The videos that ``m2f2 prepare faces`` made of such a folder, or of several of them."""
    with FrameReader() as reader:
        for file in sorted(root.glob("*.h5")):
            for key, shape in reader.shapes(file).items():
                top, *parts = PurePosixPath(key).parts
                label = CLASSES.get(top.lower())
                if parts and label is not None:
                    name = f"{file.stem}/{key}"
                    yield _Found(label, file, name, tuple(parts), key, shape.frames)
