"""From what the user named to the videos to crop, each with its HDF5 file and key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from m2f2cli.data.images import IMAGE_SUFFIXES, check_file
from m2f2cli.data.readers.ffpp import ORIGINAL, file_name
from m2f2cli.data.samples import list_files
from m2f2cli.data.video import VIDEO_SUFFIXES
from m2f2cli.errors import InputError, UsageError

# FaceForensics++ as its own script downloads it; "images" holds frames, a folder for each video.
_FFPP = re.compile(
    r"/(?:original_sequences/(?P<original>[^/]+)|manipulated_sequences/(?P<manipulation>[^/]+))"
    r"/(?P<compression>raw|c0|c23|c40)/(?P<form>videos|images)/(?P<rest>.+)$"
)
_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES


@dataclass(frozen=True)
class Video:
    """One video, or pictures that stand for one."""

    paths: tuple[Path, ...]  # the video file, a single picture, or the pictures of a video in order
    name: str  # as reports call it: the path inside the named folder
    file: str  # the HDF5 file's name
    key: str  # its dataset
    compression: str = ""  # of FaceForensics++; empty for others
    original: bool = False  # whether it is one of FaceForensics++'s unmanipulated videos

    @property
    def is_video(self) -> bool:
        """Whether it is a video file."""
        return self.paths[0].suffix.lower() in VIDEO_SUFFIXES

    @property
    def stored_bytes(self) -> int:
        """The size of its files.

        Raises:
            InputError: One is gone.
        """
        return sum(map(check_file, self.paths))


class Listing(NamedTuple):
    """What was found."""

    videos: tuple[Video, ...]  # by HDF5 file, originals first, then by key
    passed_over: int  # files beside a FaceForensics++ layout that are no part of it, such as masks


def list_videos(sources: Sequence[Path]) -> Listing:
    """List the videos and pictures behind the sources, sub-folders included.

    Files that lie as FaceForensics++ lays them out go to the published HDF5 files under the
    published keys; all others to one file named after the source, under their path inside it.

    Raises:
        UsageError: There are no sources.
        InputError: One is missing or holds nothing of use, or two videos have the same key.
    """
    if not sources:
        raise UsageError("There is nothing to prepare.", "Name videos, pictures or folders.")
    found: list[Video] = []
    passed_over = 0
    for source in sources:
        files = _files(source)
        known = list(_ffpp(files))
        if known:
            passed_over += len(files) - sum(len(video.paths) for video in known)
        found += known or _others(source, files, several=len(sources) > 1)
    videos = sorted(set(found), key=lambda v: (not v.original, v.file, v.key, v.paths))
    for first, second in pairwise(videos):
        if (first.file, first.key) == (second.file, second.key):
            raise InputError(
                f"'{first.paths[0]}' and '{second.paths[0]}' would both be the video "
                f"'{second.key}' of {second.file}.",
                hint="Rename one, or prepare them into two folders.",
            )
    return Listing(tuple(videos), passed_over)


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        files = list_files(source, _SUFFIXES)
        if not files:
            raise InputError(f"There are no videos or pictures in '{source}'.", "empty")
        return files
    if not source.exists():
        raise InputError(f"There is no file or folder '{source}'.", "missing", "Check the path.")
    if source.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"'{source}' is named like neither a video nor a picture.",
            hint=f"Known: {', '.join(sorted(_SUFFIXES))}.",
        )
    return [source]


def _ffpp(files: Sequence[Path]) -> Iterator[Video]:
    pictures: dict[tuple[str, str], Video] = {}
    for path in files:
        match = _FFPP.search(path.absolute().as_posix())
        if match is None:
            continue
        compression = match["compression"].replace("c0", "raw")
        name = match["manipulation"] or match["original"]
        video = Video(
            (path,),
            match[0][1:],
            file_name(ORIGINAL if name == "youtube" else name, compression),
            path.stem,
            compression,
            match["original"] is not None,
        )
        if match["form"] == "videos":
            yield video
            continue
        folder = path.parent.name
        before = pictures.get((video.file, folder))
        pictures[video.file, folder] = replace(
            video,
            paths=(*before.paths, path) if before else (path,),
            name=video.name.rpartition("/")[0],
            key=folder,
        )
    yield from pictures.values()


def _others(source: Path, files: Sequence[Path], *, several: bool) -> Iterator[Video]:
    """Keys keep the suffix, so that no two files of a source share one."""
    root = source if source.is_dir() else source.parent
    top = root.absolute().name
    stem = source.absolute().name if source.is_dir() else source.stem
    for path in files:
        name = path.relative_to(root).as_posix()
        key = f"{top}/{name}" if several and source.is_dir() else name
        yield Video((path,), name, "faces.h5" if several else f"{stem}.h5", key)
