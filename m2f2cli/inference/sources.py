"""From what the user typed to face crops: items are listed, read, searched for faces and cut.

Items are files, folders, globs, lists and standard input. Decoding and face search run in threads,
ahead of the model and while it loads. No torch.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from m2f2cli.data.domain import Domain
from m2f2cli.data.faces import crop_face, find_faces
from m2f2cli.data.images import IMAGE_SUFFIXES, Picture, read_picture
from m2f2cli.data.transforms import padded_square, resize_and_crop
from m2f2cli.data.video import VIDEO_SUFFIXES, read_frames
from m2f2cli.errors import InputError, UsageError
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Box
from m2f2cli.runtime import processors

if TYPE_CHECKING:
    from m2f2cli.options.detect import DetectOptions

# A picture without a face that is no larger than this and nearly square is most likely a face crop
# already, as the published data sets hold them; ``auto`` then judges it whole.
READY_CROP_SIDE = 400
READY_CROP_RATIO = 1.25
SHOWN_SIDE = 2048  # pixels; longest side of what is kept of a picture to be drawn on
PATIENCE = 2.0  # seconds that what is ready waits for more
_MAGIC = frozenset("*?[")
_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
_MOST_WORKERS = 8

Keep = Literal["nothing", "judged", "everything"]


@dataclass(frozen=True)
class Source:
    """One item to judge.

    Attributes:
        path: As the record names it.
        kind: ``image`` or ``video``, by the suffix.
        name: Where files about this item go below an output folder: the sub-folders of a given
            folder are kept, and no two items of a run share a name, whatever the file system.
        read: Gives the picture where it is no file of its own, such as a frame in an HDF5 file;
            None reads the file ``path``. Called in a decoding thread; raises ``InputError``.
    """

    path: str
    kind: str
    name: PurePosixPath
    read: Callable[[], Picture] | None = None

    def picture(self) -> Picture:
        """Decode it; raises ``InputError`` where that cannot be done."""
        return self.read() if self.read else read_picture(Path(self.path))


def expand(paths: Sequence[str], *, recursive: bool = False) -> list[Source]:
    """List the items behind the paths, in the given order, each file once.

    Args:
        paths: Files; folders (their pictures and videos, sorted); globs, for shells that do not
            expand them (``**`` enters sub-folders); ``@FILE`` and ``-`` for a list of files and
            folders, one a line. A file that does not exist is an item: its record says so.
        recursive: Enter the sub-folders of folders.

    Raises:
        UsageError: No paths at all, or no such list file.
        InputError: A folder without a supported file, or a glob that matches nothing.
    """
    if not paths:
        raise UsageError("There is nothing to judge.", "Give a file, a folder or a glob.")
    given = [found for path in paths for found in _literal(path)]
    folders = sum(os.path.isdir(path) for path in given)
    sources: list[Source] = []
    seen: set[str] = set()
    taken: set[str] = set()
    for path in given:
        for file, name in _files(path, recursive=recursive, prefix=folders > 1):
            key = os.path.abspath(file)
            if key not in seen:
                seen.add(key)
                kind = "video" if _suffix(file) in VIDEO_SUFFIXES else "image"
                sources.append(Source(file, kind, _free_name(name, taken)))
    return sources


def _literal(path: str) -> Iterator[str]:
    """Resolve list files, standard input and globs to files and folders."""
    if path == "-":
        yield from _lines(sys.stdin.buffer.read())
    elif path.startswith("@"):
        try:
            yield from _lines(Path(path[1:]).read_bytes())
        except OSError as error:
            raise UsageError(
                f"The list file '{path[1:]}' cannot be read: {error.strerror}.",
                f"For a picture whose name starts with @, type './{path}'.",
            ) from error
    elif not os.path.lexists(path) and _MAGIC & set(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise InputError(f"Nothing matches '{path}'.", "missing")
        yield from matches
    else:
        yield path


def _lines(content: bytes) -> Iterator[str]:
    for line in os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).split("\n"):
        if line.strip():
            yield line.rstrip("\r")


def _files(path: str, *, recursive: bool, prefix: bool) -> Iterator[tuple[str, PurePosixPath]]:
    """The files of a path, each with its name below an output folder."""
    if not os.path.isdir(path):
        yield str(Path(path)), PurePosixPath(Path(path).name or "item")
        return
    root = Path(path)
    top = PurePosixPath(root.resolve().name) if prefix else PurePosixPath()
    count = 0
    for file in _walk(root, recursive):
        count += 1
        parts = file.relative_to(root).parts or (root.resolve().name,)
        yield str(file), top / PurePosixPath(*parts)
    if not count:
        hint = f"Supported: {', '.join(sorted(_SUFFIXES))}."
        if not recursive and any(entry.is_dir() for entry in os.scandir(path)):
            hint = "It has sub-folders: add --recursive to enter them. " + hint
        raise InputError(f"The folder '{path}' holds no picture or video.", "missing", hint)


def _walk(root: Path, recursive: bool) -> Iterator[Path]:
    """Pictures and videos of a folder in sorted order; hidden names are skipped.

    A sub-folder that cannot be listed is yielded itself, so that it becomes a record.
    """
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        yield root
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if recursive and not entry.is_symlink():
                yield from _walk(root / entry.name, recursive)
        elif _suffix(entry.name) in _SUFFIXES:
            yield root / entry.name


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _free_name(name: PurePosixPath, taken: set[str]) -> PurePosixPath:
    candidate, number = name, 1
    while str(candidate).casefold() in taken:
        number += 1
        candidate = name.with_name(f"{name.stem}-{number}{name.suffix}")
    taken.add(str(candidate).casefold())
    return candidate


class CropRule(NamedTuple):
    """How a model wants its crops.

    Attributes:
        size: Side of the network's input in pixels.
        margin: Share of the face box's side added around it.
        domain: The model's domain check, if it has one.
        pads: Whether its CLIP tower sees all of a picture that is taken whole, on a square.
    """

    size: int
    margin: float
    domain: Domain | None = None
    pads: bool = False

    @classmethod
    def of(cls, config: Any, *, finds_faces: bool) -> CropRule:
        """Read it from a ``DetectorConfig``.

        Raises:
            UsageError: Faces are to be found, and it was trained on those of a finder that m2f2
                lacks.
        """
        finder = config.crop.get("detector", "dlib")
        if finds_faces and finder != "dlib":
            raise UsageError(
                f"The model wants face crops of '{finder}', which m2f2 does not have.",
                "Crop the faces yourself and add --faces none.",
            )
        domain = Domain.from_config(config.domain) if config.domain else None
        return cls(config.image_size, float(config.crop.get("margin", 0.3)), domain)

    def crop(
        self, cut: np.ndarray, square: Box, box: Box | None = None, score: float | None = None
    ) -> Crop:
        """Describe a cut, scaled crop."""
        digest = hashlib.sha256(cut.tobytes()).digest()
        distance = None if self.domain is None else self.domain.distance(cut)
        return Crop(cut, digest, square, box, score, distance)

    def whole(self, pixels: np.ndarray) -> Crop:
        """A picture's center square, which is what the preprocessing keeps of it."""
        height, width = pixels.shape[:2]
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        crop = self.crop(resize_and_crop(pixels, self.size), (left, top, left + side, top + side))
        padded = padded_square(pixels, self.size) if self.pads else None
        if padded is None:
            return crop
        digest = hashlib.sha256(crop.digest + padded.tobytes()).digest()
        return replace(crop, digest=digest, padded=padded)


@dataclass(frozen=True)
class Crop:
    """One square to judge.

    Attributes:
        pixels: uint8 (size, size, 3), RGB.
        digest: Of the pixels; equal crops are judged once.
        crop: (x0, y0, x1, y1) in the upright picture or frame.
        box: The face as found; None when the picture was taken whole.
        finder_score: The face finder's confidence; None as above.
        domain_distance: From the training crops; None where the model has no check.
        padded: uint8 as ``pixels``: the whole of a picture that is not square, on a square; None
            where the model does not look at it.
        turn: Quarter turns, counter-clockwise, that made the face in it upright.
    """

    pixels: np.ndarray
    digest: bytes
    crop: Box
    box: Box | None = None
    finder_score: float | None = None
    domain_distance: float | None = None
    padded: np.ndarray | None = None
    turn: int = 0


@dataclass(frozen=True)
class View:
    """A picture, or one frame of a video.

    Attributes:
        crops: What is to be judged in it.
        faces_found: Faces the finder saw, which may be more.
        index: Number of the frame, from 0.
        time: Seconds from the start of the video.
        pixels: uint8 (H, W, 3), RGB, to draw on, ``SHOWN_SIDE`` at most; None when not kept.
        scale: Kept pixels per pixel of the picture, in (0, 1].
    """

    crops: tuple[Crop, ...]
    faces_found: int
    index: int = 0
    time: float = 0.0
    pixels: np.ndarray | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Prepared:
    """A source, read; or the reason why it could not be.

    ``status``, ``message``, ``note`` and ``sha256`` are as in ``records.Detection``; ``size`` is
    (width, height) upright, in pixels. A picture has one view, a video one a frame.
    """

    source: Source
    status: str = "ok"
    message: str | None = None
    sha256: str | None = None
    size: tuple[int, int] | None = None
    views: tuple[View, ...] = ()
    note: str | None = None


def prepare(
    source: Source, options: DetectOptions, rule: Future[CropRule], *, keep: Keep = "nothing"
) -> Prepared:
    """Read a source and cut its crops. A bad file gives a status, never an exception.

    Args:
        source: A picture or a video.
        options: Which faces, and how many frames of a video.
        rule: Waited for after decoding and face search, which need no model.
        keep: Of which views pixels are kept to draw on: none, those with crops, or all.
    """
    try:
        if source.kind == "image":
            picture = source.picture()
            view = _view(picture.pixels, options.faces, rule, keep)
            notes = [picture.note] if picture.note else []
            if turn := max((crop.turn for crop in view.crops), default=0):
                notes.append(f"faces were found with the picture turned by {90 * turn} degrees")
            note = "; ".join(notes) or None
            found = Prepared(source, "ok", None, picture.sha256, picture.size, (view,), note)
            where = "the picture"
        else:
            views = []
            with read_frames(Path(source.path), count=options.frames) as video:
                for frame in video.frames:
                    view = _view(frame.pixels, options.faces, rule, keep)
                    views.append(replace(view, index=frame.index, time=frame.time))
                    height, width = frame.pixels.shape[:2]
                found = Prepared(
                    source, "ok", None, video.sha256, (width, height), tuple(views), video.note
                )
            where = f"any of the {len(views)} frames looked at"
    except InputError as error:
        return Prepared(source, error.status, error.message)
    except UnicodeDecodeError:  # PyAV, at texts inside a video that are not UTF-8
        message = f"'{source.path}' holds texts that are not UTF-8, so it cannot be decoded."
        return Prepared(source, "unreadable", message)
    if any(view.crops for view in found.views):
        return found
    return replace(found, status="no_face", message=f"No face was found in {where}.")


def _view(pixels: np.ndarray, faces: str, rule: Future[CropRule], keep: Keep) -> View:
    found = [] if faces == "none" else find_faces(pixels)
    wanted = rule.result()
    if faces == "none" or (faces == "auto" and not found and _looks_like_a_crop(pixels)):
        crops = [wanted.whole(pixels)]
    else:
        crops = []
        for face in found[:1] if faces == "largest" else found:
            square = face.crop(wanted.margin)
            cut = resize_and_crop(crop_face(pixels, square, face.turn), wanted.size)
            crop = wanted.crop(cut, square, face.box, round(face.score, 4))
            if face.turn:  # its map is turned, too: another score than of the same pixels upright
                digest = hashlib.sha256(crop.digest + bytes([face.turn])).digest()
                crop = replace(crop, digest=digest, turn=face.turn)
            crops.append(crop)
    view = View(tuple(crops), len(found))
    if keep == "nothing" or (keep == "judged" and not crops):
        return view
    height, width = pixels.shape[:2]
    scale = min(1.0, SHOWN_SIDE / max(width, height))
    if scale < 1:
        small = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)))
        pixels = np.asarray(small)
    return replace(view, pixels=pixels, scale=scale)


def _looks_like_a_crop(pixels: np.ndarray) -> bool:
    sides = pixels.shape[:2]
    return max(sides) <= READY_CROP_SIDE and max(sides) <= READY_CROP_RATIO * min(sides)


class Decoder:
    """Prepares sources in threads; the first from the moment it is made, while the model loads.

    Args:
        sources: The items.
        options: Which faces, and how many frames of a video.
        keep: As for ``prepare``; kept pixels limit how far it goes ahead.
    """

    def __init__(
        self, sources: Sequence[Source], options: DetectOptions, *, keep: Keep = "nothing"
    ) -> None:
        self._options, self._keep = options, keep
        self._left = iter(sources)
        self._rule: Future[CropRule] = Future()
        self._queue: deque[tuple[int, Future[Prepared]]] = deque()
        self._workers = min(_MOST_WORKERS, processors())
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="m2f2-decode")
        self._fill(self._workers)

    def _fill(self, size: int) -> None:
        """Begin further items until ``size`` are under way; a video with kept frames is many."""
        held = sum(weight for weight, _ in self._queue)
        while held < size and (source := next(self._left, None)) is not None:
            many = self._keep != "nothing" and source.kind == "video"
            weight = self._options.frames if many else 1
            future = self._pool.submit(prepare, source, self._options, self._rule, keep=self._keep)
            self._queue.append((weight, future))
            held += weight

    def prepared(self, rule: CropRule) -> Iterator[Prepared | None]:
        """Every source, read and cut, in order; None whenever the next takes over ``PATIENCE``."""
        self._rule.set_result(rule)
        window = 2 * self._workers + self._options.batch_size
        self._fill(window)
        while self._queue:
            future = self._queue[0][1]
            wait([future], timeout=PATIENCE)
            if not future.done():
                yield None
                continue
            self._queue.popleft()
            self._fill(window)
            yield future.result()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._rule.cancel()
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
