"""Face crops of videos in HDF5 files: one dataset a video, frames read one by one.

The layout, which is that of the published FaceForensics++ files:

* a file holds one dataset for each video, its key the video's name (``000_003``);
* a dataset is uint8 (frames, H, W, 3), RGB;
* ours are stored uncompressed with one frame a chunk, and each dataset's attributes say how it was
  made (``ClipNotes``), ending with ``complete``. Files of others need no attributes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from m2f2cli.data.images import MAX_PIXELS, check_file
from m2f2cli.data.video import MAX_FRAMES
from m2f2cli.errors import InputError
from m2f2cli.files import sync_folder, write_error

COMPLETE = "complete"
# What h5py raises on damaged files.
_FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
_HINT = "Copy the file again, or make it anew with 'm2f2 prepare faces'."


@dataclass(frozen=True)
class ClipNotes:
    """How a clip was made: the attributes of its dataset, in this order."""

    source: str  # the video, as a path inside the folder it was taken from
    source_sha256: str  # of the video's bytes, hexadecimal
    source_bytes: int  # the video's size
    detector: str  # what finds the faces, with its version
    margin: float  # share by which a crop is larger than the face box
    fps: float  # frames a second of the video; 0 where unknown, and for pictures
    asked: int  # the largest number of frames wanted
    looked_at: int  # how many frames were looked at; those without a face are left out
    interpolated: int  # how many of the boxes were filled in between two found ones
    boxes_from: str  # SHA-256 of the video whose boxes these are; empty for the clip's own
    picture: np.ndarray  # int32 (2,), width and height of the video in pixels
    frames: np.ndarray  # int32 (F,), each crop's frame number in the video
    # int32 (F, 4), each face box x0, y0, x1, y1 in pixels of the video, without margin.
    boxes: np.ndarray


_TEXTS = ("source", "source_sha256", "detector", "boxes_from")
_NUMBERS: dict[str, type] = {
    "source_bytes": int, "margin": float, "fps": float,
    "asked": int, "looked_at": int, "interpolated": int,
}  # fmt: skip
_DEEPEST = 32  # groups inside each other
_LARGEST_CHUNK = 3 * MAX_PIXELS  # bytes that are unpacked to read one frame


class ClipShape(NamedTuple):
    """The size of a clip: how many frames, at least one, and their pixels."""

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
        """Read one frame, from 0, as uint8 (H, W, 3), RGB; no other where they are stored apart.

        Raises:
            InputError: No such file, key or frame; or the file is broken or holds something else.
        """
        dataset = self._dataset(file, key)
        if not 0 <= index < dataset.shape[0]:
            raise InputError(
                f"Video '{key}' in '{file}' has no frame {index}: it has {dataset.shape[0]}.",
                "no_frames",
            )
        try:
            pixels: np.ndarray = dataset[index]
        except _FAULTS as error:
            raise InputError(
                f"Video '{key}' in '{file}' is damaged: {_reason(error)}.", "unreadable", _HINT
            ) from error
        return pixels

    def shapes(self, file: Path) -> dict[str, ClipShape]:
        """Every clip of a file by its key, in the order of keys; groups inside are entered.

        Raises:
            InputError: The file is missing, broken or empty, or a dataset is no clip.
        """
        found: dict[str, ClipShape] = {}
        with _reading(file):
            for key, dataset in _datasets(file, self._open(file)):
                _check_clip(file, key, dataset)
                found[key] = ClipShape(*dataset.shape[:3])
        if not found:
            raise InputError(f"'{file}' holds no videos.", "empty", _HINT)
        return dict(sorted(found.items()))

    def notes(self, file: Path, key: str) -> ClipNotes | None:
        """How a clip was made; None where its dataset does not say, as in the published files.

        Raises:
            InputError: As ``frame`` does; or what it says is of other types.
        """
        attributes = self._dataset(file, key).attrs
        with _reading(file):
            names = [item.name for item in fields(ClipNotes)]
            if not attributes.get(COMPLETE, False) or not set(names) <= set(attributes):
                return None
            if any(math.prod(attributes.get_id(n).shape or ()) > 4 * MAX_FRAMES for n in names):
                raise ValueError("(its attributes are too long)")
            return _notes_of({name: attributes[name] for name in names})

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
            with _reading(path):  # nothing is kept between reads: a cache of 1 MiB a video adds up
                self._files[path] = h5py.File(path, "r", rdcc_nbytes=0)
        return self._files[path]

    def _dataset(self, path: Path, key: str) -> h5py.Dataset:
        file = self._open(path)
        with _reading(path):
            item = _find(path, file, key)
            if not isinstance(item, h5py.Dataset):
                raise InputError(f"'{path}' has no video '{key}'.", "missing")
            _check_clip(path, key, item)
        return item


class ClipWriter:
    """Writes one HDF5 file of clips so that a killed run loses little and leaves nothing half-made.

    An HDF5 file that is being written is lost when its process is killed. So every video first
    becomes a small file of its own, atomically, in the hidden folder ``.NAME.parts`` beside the
    wanted file; ``finish`` copies them, sorted by key, into a new file that then takes the wanted
    name in one step. A later run finds the parts that are there and goes on. Equal clips give equal
    files, byte for byte.

    Different processes may write different keys of one file at the same time, each with a writer
    of its own; only one may call ``finish``, when the others are done.

    Args:
        path: The HDF5 file. What it already holds is kept; a clip written anew replaces its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = path.parent / f".{path.name}.parts"

    def write(self, key: str, frames: np.ndarray, notes: ClipNotes | None = None) -> None:
        """Store one clip as a part, atomically.

        Args:
            key: Its dataset's name; slashes make groups.
            frames: uint8 (F, H, W, 3), RGB, at least one.
            notes: How it was made; None stores the pixels alone.

        Raises:
            InputError: The frames have another type or shape.
            CheckpointError: It cannot be written, for example because the disk is full.
        """
        _check_pixels(self.path, key, frames)
        # Keys may be longer than a file's name, or differ in case alone.
        name = hashlib.sha256(key.encode()).hexdigest()[:32] + ".h5"
        with self._replacing(self.parts / name) as file:
            dataset = file.create_dataset(key, data=frames, chunks=(1, *frames.shape[1:]))
            for item in fields(notes) if notes is not None else ():
                dataset.attrs[item.name] = getattr(notes, item.name)
            dataset.attrs[COMPLETE] = True

    def done(self) -> dict[str, tuple[ClipShape, ClipNotes | None]]:
        """The size and notes of every clip there is, in the file or in a part, by key.

        Raises:
            InputError: The file is there but broken or of another layout.
        """
        with FrameReader() as reader:
            return {
                key: (shape, reader.notes(file, key))
                for file in self._files()
                for key, shape in reader.shapes(file).items()
            }

    def discard(self) -> None:
        """Remove the file and its parts."""
        try:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.parts, ignore_errors=True)
        except OSError as error:
            raise write_error(self.path, error) from error

    def finish(self) -> None:
        """Put the file together from what it held and the parts, then remove the parts.

        Nothing happens when there are no parts.

        Raises:
            InputError: The old file is broken.
            CheckpointError: It cannot be written; the old file and the parts are kept.
        """
        if not self.parts.is_dir():
            return
        with FrameReader() as reader:
            where = {key: file for file in self._files() for key in reader.shapes(file)}
        if any(file != self.path for file in where.values()):
            with self._replacing(self.path) as whole:
                for key in sorted(where):
                    with h5py.File(where[key], "r") as file:
                        file.copy(file[key], whole, name=key)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _files(self) -> list[Path]:
        """The file, where it exists, and the parts, which are newer."""
        parts = sorted(self.parts.glob("*.h5")) if self.parts.is_dir() else []
        return [*([self.path] if self.path.exists() else []), *parts]

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[h5py.File]:
        """Give an HDF5 file to fill; when the block ends well it takes the place of ``path``."""
        partial = self.parts / f"{os.getpid()}-{secrets.token_hex(4)}.partial"
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            with Sink(partial) as sink:
                try:
                    with h5py.File(sink, "w") as file:
                        yield file
                except (OSError, RuntimeError):
                    if sink.failure is None:
                        raise
                if sink.failure is not None:  # whatever HDF5 then made of it
                    raise sink.failure
                os.fsync(sink.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except OSError as error:
            raise write_error(self.path, error) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


class Sink(io.FileIO):
    """A file that lets HDF5 believe that every write went well.

    HDF5 cannot close a file that it failed to write to: it raises over and over and in the end
    brings the process down. So the first failure is kept in ``failure`` for the caller to raise.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, or remember why not."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view) and self.failure is None:
                written += super().write(view[written:])
        except OSError as error:
            self.failure = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, or remember why not."""
        try:
            if self.failure is None:
                super().truncate(size)
        except OSError as error:
            self.failure = error
        return self.tell() if size is None else size


def _check_pixels(path: Path, key: str, clip: h5py.Dataset | np.ndarray) -> None:
    """Refuse what is not uint8 (frames, H, W, 3) with at least one frame."""
    if clip.dtype != np.uint8:
        raise InputError(
            f"Video '{key}' in '{path}' holds {clip.dtype} values, not uint8.",
            hint="Clips are uint8 (frames, height, width, 3), RGB.",
        )
    shape = clip.shape
    if shape is not None and len(shape) == 4 and shape[0] > MAX_FRAMES:
        raise InputError(f"Video '{key}' in '{path}' has {shape[0]:,} frames.", "too_large")
    if shape is not None and len(shape) == 4 and shape[1] * shape[2] > MAX_PIXELS:
        raise InputError(
            f"Video '{key}' in '{path}' has frames of {shape[2]}x{shape[1]}, more than the "
            f"{MAX_PIXELS:,} pixels that are decoded.",
            "too_large",
        )
    if shape is None or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise InputError(
            f"Video '{key}' in '{path}' has the shape {shape}, not (frames, height, width, 3)."
        )
    if not shape[0]:
        raise InputError(f"Video '{key}' in '{path}' has no frames.", "no_frames")


def _check_clip(path: Path, key: str, clip: h5py.Dataset) -> None:
    """Refuse what is no clip, lies in another file, or takes much memory to read."""
    if clip.external is not None or clip.is_virtual:
        raise InputError(
            f"Video '{key}' in '{path}' lies in another file, which is not opened.",
            "unreadable",
            "Copy its pixels into one file.",
        )
    _check_pixels(path, key, clip)
    if clip.chunks is not None and math.prod(clip.chunks) > _LARGEST_CHUNK:
        raise InputError(
            f"Video '{key}' in '{path}' is stored in pieces of {math.prod(clip.chunks):,} bytes.",
            "too_large",
            "Store it with one frame a chunk.",
        )


def _datasets(path: Path, file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """The datasets of a file by their keys; links to other places are not followed."""
    seen = set()
    waiting = [("", file)]
    while waiting:
        prefix, group = waiting.pop()
        place = h5py.h5o.get_info(group.id).addr
        if place in seen:
            continue
        seen.add(place)
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise _leads_away(path, prefix + name)
            if not isinstance(link, h5py.HardLink):
                continue
            item = group[name]
            if isinstance(item, h5py.Dataset):
                yield prefix + name, item
            elif isinstance(item, h5py.Group):
                if prefix.count("/") >= _DEEPEST:
                    raise InputError(f"'{path}' has more than {_DEEPEST} groups in each other.")
                waiting.append((f"{prefix}{name}/", item))


def _find(path: Path, file: h5py.File, key: str) -> Any:
    """What has a key in a file, reached without links to other places; None for nothing."""
    item: Any = file
    for part in filter(None, key.split("/")):
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise _leads_away(path, key)
        item = item[part]
    return item


def _leads_away(path: Path, key: str) -> InputError:
    return InputError(
        f"Video '{key}' in '{path}' is a link to another place, which is not followed.",
        "unreadable",
        "Copy the video itself into the file.",
    )


def _notes_of(values: dict[str, Any]) -> ClipNotes:
    """Notes of the types that ``ClipNotes`` has.

    Raises:
        TypeError, ValueError: A value is of another type.
    """
    if wrong := [name for name in _TEXTS if not isinstance(values[name], str)]:
        raise TypeError(f"({wrong[0]} is no text)")
    numbers = {name: kind(values[name]) for name, kind in _NUMBERS.items()}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError("(a number is not finite)")
    arrays = {name: np.asarray(values[name]) for name in ("picture", "frames", "boxes")}
    shapes = ((2,), arrays["frames"].shape[:1], (*arrays["frames"].shape[:1], 4))
    for (name, array), shape in zip(arrays.items(), shapes, strict=True):
        if array.dtype.kind not in "iu" or array.shape != shape:
            raise ValueError(f"({name} is {array.dtype} {array.shape})")
    return ClipNotes(**values | numbers | arrays)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what h5py raises on a damaged file into one sentence."""
    try:
        yield
    except _FAULTS as error:
        if "unable to lock file" in str(error):
            raise InputError(
                f"'{path}' cannot be locked: another program has it open, or its file system has "
                "no locks.",
                "unreadable",
                "Close that program, or set HDF5_USE_FILE_LOCKING=FALSE.",
            ) from error
        raise InputError(
            f"'{path}' is not a readable HDF5 file: {_reason(error)}.", "unreadable", _HINT
        ) from error


def _reason(error: Exception) -> str:
    """The library's own words inside its brackets, without the names of its functions."""
    text = " ".join(str(error).strip("'\"").split())
    return text.partition("(")[2].rstrip(")") or text
