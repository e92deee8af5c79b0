"""``m2f2 prepare faces``: videos to HDF5 files of face crops, in parallel, resumable."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from m2f2cli.data.clips import ClipNotes, ClipWriter, FrameReader
from m2f2cli.data.faces import finder_name
from m2f2cli.data.images import DECODE_ERRORS
from m2f2cli.data.prepare.sources import Video, list_videos
from m2f2cli.data.prepare.tracking import cut_faces
from m2f2cli.data.readers.ffpp import ORIGINAL, find_file
from m2f2cli.errors import InputError, M2F2Error, UsageError
from m2f2cli.files import locked, write_error
from m2f2cli.options.prepare import FacesOptions
from m2f2cli.runtime import processors


@dataclass(frozen=True)
class Prepared:
    """What became of one video."""

    file: str  # name of the HDF5 file
    key: str  # its dataset there
    source: str  # the video, as a path inside the named folder
    status: str = "ok"  # ok, or why there are no crops: a key of records.STATUSES
    frames: int = 0  # crops written
    looked_at: int = 0  # frames looked at
    without_face: int = 0  # of these, how many have no crop
    interpolated: int = 0  # crops whose box was filled in between two found ones
    earlier: bool = False  # whether an earlier run made it
    message: str | None = None  # the reason for a status other than ok, or a remark; None mostly


_Task = tuple[Video, Path, FacesOptions, ClipNotes | None]


class FacesJob:
    """One run over a list of videos.

    Args:
        sources: See ``sources.list_videos``.
        output: Folder for the HDF5 files; made when missing. What an earlier run with the same
            options made there is kept.
        options: How.

    Attributes:
        videos: What is to be done, in order.
        passed_over: See ``sources.Listing``.

    Raises:
        UsageError: There are no sources.
        InputError: A source, or the file of the boxes, is missing or unusable.
        CheckpointError: The folder cannot be made.
    """

    def __init__(self, sources: Sequence[Path], output: Path, options: FacesOptions) -> None:
        self.videos, self.passed_over = list_videos(sources)
        self.output = output
        self.options = options
        self._boxes = _read_boxes(options.boxes_from, self.videos)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(output, error) from error

    def run(self) -> Iterator[Prepared]:
        """Prepare the videos; each is reported as soon as it is settled.

        Raises:
            UsageError: The folder has clips made with other options.
            CheckpointError: The disk is full, or a file cannot be written. What is done is kept
                for the next run.
            M2F2Error: Another process prepares into the folder, or a worker died.
        """
        workers, most = self.options.workers, len(self.videos)
        with (
            locked(self.output, "preparing into"),
            worker_pool(workers, _work, at_most=most) as run_all,
        ):
            for name, group in groupby(self.videos, key=lambda video: video.file):
                videos = list(group)
                writer = ClipWriter(self.output / name)
                if self.options.overwrite:
                    writer.discard()
                tasks: list[_Task] = []
                earlier = self._earlier(writer, videos)
                for video in videos:
                    boxes, made = self._boxes.get(video), earlier.get(video.key)
                    if video in self._boxes and boxes is None:
                        message = f"There are no boxes for '{video.key}'."
                        yield _prepared(video, status="missing", message=message)
                    elif made is not None and made.source_bytes == video.stored_bytes:
                        yield _prepared(video, made, earlier=True)
                    else:
                        tasks.append((video, self.output, self.options, boxes))
                yield from run_all(tasks)
                writer.finish()

    def _earlier(self, writer: ClipWriter, videos: Sequence[Video]) -> dict[str, ClipNotes]:
        """The clips that are there already.

        Raises:
            UsageError: They were made in another way than ``videos`` will be.
        """
        boxes = next((boxes for video in videos if (boxes := self._boxes.get(video))), None)
        wanted = {
            "size": self.options.size,
            "margin": self.options.margin,
            "frames": boxes.asked if boxes else self.options.frames,
            "detector": boxes.detector if boxes else finder_name(),
            "boxes-from": boxes is not None,
        }
        found = {}
        for key, (shape, notes) in writer.done().items():
            if notes is None:
                raise UsageError(
                    f"'{writer.path}' was not made by m2f2.",
                    "Choose another --output, or add --overwrite to replace it.",
                )
            made = (shape.width, notes.margin, notes.asked, notes.detector, bool(notes.boxes_from))
            for (name, value), was in zip(wanted.items(), made, strict=True):
                if was != value:
                    raise UsageError(
                        f"'{writer.path}' was made with {name} {was}, this run has {value}.",
                        "Repeat the old options, choose another --output, or add --overwrite.",
                    )
            found[key] = notes
        return found


def _read_boxes(place: Path | None, videos: Sequence[Video]) -> dict[Video, ClipNotes | None]:
    """Find the boxes to use.

    Args:
        place: An HDF5 file, for every video; or a folder, whose file of originals of the same
            compression serves the manipulated videos; None for no boxes.
        videos: The videos.

    Returns:
        For each video that takes boxes: those of its own key, else of the original that its key
        begins with (``000`` of ``000_003``), else None.

    Raises:
        InputError: There is no such file, or it does not say where its crops were cut.
    """
    if place is None:
        return {}
    found: dict[Video, ClipNotes | None] = {}
    keys: dict[Path, Collection[str]] = {}
    with FrameReader() as reader:
        for video in videos:
            if place.is_dir() and (video.original or not video.compression):
                continue
            file = find_file(place, ORIGINAL, video.compression) if place.is_dir() else place
            if file not in keys:
                keys[file] = reader.shapes(file)
            candidates = (video.key, video.key.partition("_")[0])
            key = next((key for key in candidates if key in keys[file]), None)
            found[video] = None if key is None else reader.notes(file, key)
            if key is not None and found[video] is None:
                raise InputError(
                    f"Video '{key}' in '{file}' does not say where its crops were cut.",
                    hint="--boxes-from takes files made by 'm2f2 prepare faces'.",
                )
    return found


def _work(task: _Task) -> Prepared:
    """Prepare one video; runs in a process of its own."""
    video, output, options, boxes = task
    try:
        crops, notes, remark = cut_faces(
            video, frames=options.frames, size=options.size, margin=options.margin, boxes=boxes
        )
    except InputError as error:
        return _prepared(video, status=error.status, message=error.message)
    except DECODE_ERRORS as error:
        message = f"'{video.name}' cannot be read: {type(error).__name__}, {error}."
        return _prepared(video, status="unreadable", message=message)
    if not len(crops):
        message = f"No face was found in {notes.looked_at} frames."
        return _prepared(video, notes, status="no_face", message=message)
    ClipWriter(output / video.file).write(video.key, crops, notes)
    return _prepared(video, notes, message=remark)


def _prepared(video: Video, notes: ClipNotes | None = None, **more: Any) -> Prepared:
    counts: dict[str, Any] = {}
    if notes is not None:
        frames, looked_at = len(notes.frames), notes.looked_at
        counts = {
            "frames": frames,
            "looked_at": looked_at,
            "without_face": looked_at - frames,
            "interpolated": notes.interpolated,
        }
    return Prepared(video.file, video.key, video.name, **counts, **more)


Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def worker_pool(
    workers: int | None, work: Callable[[Task], Result], *, at_most: int
) -> Iterator[Callable[[Sequence[Task]], Iterator[Result]]]:
    """Give a function that works off tasks in processes and yields results as they come.

    Args:
        workers: How many processes; None for one a processor; 1 works in this process, in order.
        work: A function of a module's top level.
        at_most: There is no work for more than this many.

    Raises:
        M2F2Error: A worker died. Other errors are those of ``work``.
    """
    workers = min(workers or processors(), at_most)
    if workers <= 1:
        yield lambda tasks: map(work, tasks)
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)

    def run_all(tasks: Sequence[Task]) -> Iterator[Result]:
        for future in as_completed([pool.submit(work, task) for task in tasks]):
            yield future.result()

    try:
        yield run_all
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise M2F2Error(
                "A worker process died, perhaps for lack of memory.",
                "Run the command again, with fewer --workers; it goes on where it stopped.",
            ) from error
        raise
    pool.shutdown()


def _start() -> None:
    """In a worker: an interrupt is the parent's business, and its death the worker's own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
