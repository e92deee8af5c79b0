"""Write HDF5 files of clips so that a killed run loses little and leaves nothing half-written.

An HDF5 file that is being written is lost when its process is killed. So every video first becomes
a small file of its own, atomically, in the hidden folder ``.NAME.parts`` beside the wanted file;
``finish`` copies them, sorted by key, into a new file that then takes the wanted name in one step.
A later run finds the parts that are there and goes on. Equal clips give equal files, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from m2f2cli.data.clips import ClipNotes, ClipShape, FrameReader, check_pixels, write_notes
from m2f2cli.files import sync_folder, write_error


class ClipWriter:
    """Collects the clips of one HDF5 file.

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
        check_pixels(self.path, key, frames)
        # Keys may be longer than a file's name, or differ in case alone.
        name = hashlib.sha256(key.encode()).hexdigest()[:32] + ".h5"
        with self._replacing(self.parts / name) as file:
            dataset = file.create_dataset(key, data=frames, chunks=(1, *frames.shape[1:]))
            write_notes(dataset, notes)

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
        where: dict[str, Path] = {}
        with FrameReader() as reader:
            for file in self._files():
                where |= dict.fromkeys(reader.shapes(file), file)
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
            with _Sink(partial) as sink:
                with sink.failing_first(), h5py.File(sink, "w") as file:
                    yield file
                os.fsync(sink.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except OSError as error:
            raise write_error(self.path, error) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


class _Sink(io.FileIO):
    """A file that lets HDF5 believe that every write went well.

    HDF5 cannot close a file that it failed to write to: it raises over and over and in the end
    brings the process down. So the first failure is kept for ``failing_first`` to raise.
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

    @contextmanager
    def failing_first(self) -> Iterator[None]:
        """Raise what a write failed with, whatever HDF5 then made of the file."""
        try:
            yield
        except (OSError, RuntimeError):
            if self.failure is None:
                raise
        if self.failure is not None:
            raise self.failure
