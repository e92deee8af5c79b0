"""Face crops of videos in HDF5 files: one dataset a video, frames read one by one.

The layout, which is that of the published FaceForensics++ files:

* a file holds one dataset for each video, its key the video's name (``000_003``);
* a dataset is uint8 (frames, H, W, 3), RGB;
* ours are stored uncompressed with one frame a chunk, and each dataset's attributes say how it was
  made (``ClipNotes``), ending with ``complete``. Files of others need no attributes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from m2f2cli.data.images import check_file
from m2f2cli.errors import InputError

COMPLETE = "complete"
# What h5py raises on damaged files.
_FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
_HINT = "Copy the file again, or make it anew with 'm2f2 prepare faces'."


@dataclass(frozen=True)
class ClipNotes:
    """How a clip was made: the attributes of its dataset, in this order.

    Attributes:
        source: The video, as a path inside the folder it was taken from.
        source_sha256: Of the video's bytes, hexadecimal.
        source_bytes: The video's size.
        detector: What finds the faces, with its version.
        margin: Share by which a crop is larger than the face box.
        fps: Frames a second of the video; 0 where unknown, and for pictures.
        asked: The largest number of frames wanted.
        looked_at: How many frames were looked at; those without a face are left out.
        interpolated: How many of the boxes were filled in between two found ones.
        boxes_from: SHA-256 of the video whose boxes these are; empty for the clip's own.
        picture: int32 (2,), width and height of the video in pixels.
        frames: int32 (F,), each crop's frame number in the video.
        boxes: int32 (F, 4), each face box x0, y0, x1, y1 in pixels of the video, without margin.
    """

    source: str
    source_sha256: str
    source_bytes: int
    detector: str
    margin: float
    fps: float
    asked: int
    looked_at: int
    interpolated: int
    boxes_from: str
    picture: np.ndarray
    frames: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class ClipShape:
    """The size of a clip.

    Attributes:
        frames: How many, at least one.
        height: In pixels.
        width: In pixels.
    """

    frames: int
    height: int
    width: int


class FrameReader:
    """Reads single frames out of HDF5 files of clips.

    Files open when first needed and stay open. Each process opens its own: a reader that is
    pickled or inherited by a fork starts without open files, so one reader may be handed to the
    workers of a ``torch.utils.data.DataLoader`` however they are started. Safe in threads, one
    read at a time (HDF5 has one lock).
    """

    def __init__(self) -> None:
        self._files: dict[Path, h5py.File] = {}
        self._process = os.getpid()

    def frame(self, file: Path, key: str, index: int) -> np.ndarray:
        """Read one frame; nothing else of the clip is read where it is stored by frames.

        Args:
            file: The HDF5 file.
            key: The video's dataset.
            index: The frame, from 0.

        Returns:
            uint8 (H, W, 3), RGB.

        Raises:
            InputError: No such file, key or frame; or the file is broken or holds something else.
        """
        dataset = self._dataset(file, key)
        if not 0 <= index < dataset.shape[0]:
            raise InputError(
                f"Video '{key}' in '{file}' has no frame {index}: it has {dataset.shape[0]}.",
                "no_frames",
            )
        return self._read(file, key, dataset, index)

    def shapes(self, file: Path) -> dict[str, ClipShape]:
        """Every clip of a file by its key, in the order of keys; groups inside are entered.

        Raises:
            InputError: The file is missing, broken or empty, or a dataset is no clip.
        """
        found: dict[str, ClipShape] = {}

        def visit(key: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                check_pixels(file, key, item)
                found[key] = ClipShape(*item.shape[:3])

        try:
            self._open(file).visititems(visit)
        except _FAULTS as error:
            raise _broken(file, error) from error
        if not found:
            raise InputError(f"'{file}' holds no videos.", "empty", _HINT)
        return found

    def notes(self, file: Path, key: str) -> ClipNotes | None:
        """How a clip was made; None where its dataset does not say, as in the published files.

        Raises:
            InputError: As ``frame`` does.
        """
        attributes = self._dataset(file, key).attrs
        try:
            return read_notes(attributes)
        except _FAULTS as error:
            raise _broken(file, error) from error

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def _open(self, path: Path) -> h5py.File:
        if self._process != os.getpid():
            self._files, self._process = {}, os.getpid()
        if path not in self._files:
            check_file(path)
            try:  # nothing is kept between reads: a cache of 1 MiB a video adds up
                self._files[path] = h5py.File(path, "r", rdcc_nbytes=0)
            except _FAULTS as error:
                raise _broken(path, error) from error
        return self._files[path]

    def _dataset(self, path: Path, key: str) -> h5py.Dataset:
        file = self._open(path)
        try:
            item = file.get(key)
        except _FAULTS as error:
            raise _broken(path, error) from error
        if not isinstance(item, h5py.Dataset):
            raise InputError(f"'{path}' has no video '{key}'.", "missing")
        check_pixels(path, key, item)
        return item

    def _read(self, path: Path, key: str, dataset: h5py.Dataset, where: Any) -> np.ndarray:
        try:
            pixels: np.ndarray = dataset[where]
        except _FAULTS as error:
            raise InputError(
                f"Video '{key}' in '{path}' is damaged: {_reason(error)}.", "unreadable", _HINT
            ) from error
        return pixels


def read_notes(attributes: Mapping[str, Any]) -> ClipNotes | None:
    """Turn a dataset's attributes into notes; None where they are not ours or not complete."""
    if not attributes.get(COMPLETE, False):
        return None
    values: dict[str, Any] = {item.name: attributes.get(item.name) for item in fields(ClipNotes)}
    if any(value is None for value in values.values()):
        return None
    for name in ("source_bytes", "asked", "looked_at", "interpolated"):
        values[name] = int(values[name])
    for name in ("margin", "fps"):
        values[name] = float(values[name])
    return ClipNotes(**values)


def write_notes(dataset: h5py.Dataset, notes: ClipNotes | None) -> None:
    """Attach notes to a dataset; the mark of completeness comes last."""
    for item in fields(notes) if notes is not None else ():
        dataset.attrs[item.name] = getattr(notes, item.name)
    dataset.attrs[COMPLETE] = True


def check_pixels(path: Path, key: str, clip: h5py.Dataset | np.ndarray) -> None:
    """Refuse what is not uint8 (frames, H, W, 3) with at least one frame.

    Raises:
        InputError: Naming the file, the key and what is wrong.
    """
    if clip.dtype != np.uint8:
        raise InputError(
            f"Video '{key}' in '{path}' holds {clip.dtype} values, not uint8.",
            hint="Clips are uint8 (frames, height, width, 3), RGB.",
        )
    shape = clip.shape
    if shape is None or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise InputError(
            f"Video '{key}' in '{path}' has the shape {shape}, not (frames, height, width, 3)."
        )
    if not shape[0]:
        raise InputError(f"Video '{key}' in '{path}' has no frames.", "no_frames")


def _broken(path: Path, error: Exception) -> InputError:
    return InputError(
        f"'{path}' is not a readable HDF5 file: {_reason(error)}.", "unreadable", _HINT
    )


def _reason(error: Exception) -> str:
    """The library's own words inside its brackets, without the names of its functions."""
    text = " ".join(str(error).strip("'\"").split())
    return text.partition("(")[2].rstrip(")") or text
