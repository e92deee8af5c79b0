"""Evenly spaced upright frames of a video, by PyAV. Memory is bounded by a single frame.

The packets are listed first without decoding, which gives the true number and time of the frames
whatever the container claims; then only the stretches that hold wanted frames are decoded. Pixels
are not stretched to a pixel aspect ratio, and high dynamic range is not mapped.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m2f2cli.data.images import (
    DECODE_ERRORS,
    MAX_PIXELS,
    check_file,
    file_sha256,
    take_memory,
    unreadable,
)
from m2f2cli.errors import ConfigError, InputError

VIDEO_SUFFIXES = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
        ".flv", ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".mpe", ".vob", ".qt", ".divx",
    }
)  # fmt: skip
MAX_FRAMES = 2_000_000
# Containers that hold their own data: no playlists, no scripts, nothing that opens other files.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,h264,hevc"
)
# Seeking costs about as much as decoding this many frames.
_SEEK_PAYS_FROM = 24
_ENDS_EARLY = "the file ends early or is damaged; its readable part was used"
_HINT = "Play it to see if it is whole; ffmpeg -i IN -c copy OUT.mp4 often mends a video."


@dataclass(frozen=True)
class Frame:
    """One frame."""

    index: int  # its number in the video, from 0, in order of display
    time: float  # seconds since the first frame
    pixels: np.ndarray  # uint8 (H, W, 3), RGB, upright: the stored rotation has been applied


class _Listing(NamedTuple):
    """What the packets say: times of display in order; keyframes as (display, decoding) times."""

    times: list[int]
    keys: list[tuple[int, int]]
    timed: bool
    whole: bool
    end: float | None  # seconds from the container's start to the end of the last frame


class VideoFrames:
    """An open video; use it in a ``with`` block and iterate over ``frames`` once.

    Attributes:
        total: Frames in the file.
        fps: Frames a second, averaged; None when the file does not say.
        duration: Seconds from the first frame to the end of the last, where known.
        frames: The wanted frames, decoded one by one.
        notes: What a user should know about the reading, complete once ``frames`` is exhausted.
    """

    def __init__(
        self, path: Path, count: int, numbers: Sequence[int] | None, max_pixels: int
    ) -> None:
        self.path = path
        self.notes: list[str] = []
        self._max_pixels = max_pixels
        with _decoding(path):
            with _open(path) as container:
                listing = _list_packets(container, self._pick_stream(container))
            # Opened anew, because raw streams cannot be sought.
            self._container = _open(path)
            self._stream = self._pick_stream(self._container)
            self.fps = float(self._stream.average_rate) if self._stream.average_rate else None
            self.total = len(listing.times)
            self.duration = self._measure(listing)
            declared = (self._container.duration or 0) / 1e6
        if not listing.whole:
            self.notes.append(_ENDS_EARLY)
        elif listing.end and self.duration and declared > 1.1 * listing.end + 1:
            self.notes.append(
                f"frames for {self.duration:.1f} of {declared:.1f} seconds were found"
            )
        wanted = evenly(self.total, count)
        if numbers is not None:
            wanted = sorted({number for number in numbers if 0 <= number < self.total})
        self.frames = self._decode(listing, wanted)

    def __enter__(self) -> VideoFrames:
        return self

    def __exit__(self, *_: object) -> None:
        self.frames.close()
        self._container.close()

    @cached_property
    def sha256(self) -> str:
        """Of the file's bytes, hexadecimal; read when first asked for."""
        return file_sha256(self.path)

    @property
    def note(self) -> str | None:
        """All notes in one line; None when there are none."""
        return "; ".join(dict.fromkeys(self.notes)) or None

    def _pick_stream(self, container: Any) -> Any:
        import av

        attached = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & attached]
        if not streams:
            raise InputError(f"'{self.path}' holds no moving picture.", "no_frames")
        stream = streams[0]
        if stream.codec_context is None:
            raise InputError(f"'{self.path}' is coded in a way that cannot be read.", "unreadable")
        self._refuse_large(stream.codec_context.width, stream.codec_context.height)
        stream.thread_type = "AUTO"
        return stream

    def _refuse_large(self, width: int, height: int) -> None:
        if width * height > self._max_pixels:
            raise InputError(
                f"'{self.path}' has frames of {width}x{height}, more than the "
                f"{self._max_pixels:,} pixels that are decoded.",
                "too_large",
                "Save the video smaller.",
            )
        take_memory(width * height)

    def _measure(self, listing: _Listing) -> float | None:
        if not listing.timed or not listing.times:
            return self.total / self.fps if self.fps else None
        span = float((listing.times[-1] - listing.times[0]) * self._stream.time_base)
        last = 1 / self.fps if self.fps else 0.0
        return span + last

    def _decode(self, listing: _Listing, wanted: list[int]) -> Generator[Frame, None, None]:
        found = 0
        walk = (self._by_time if listing.timed else self._by_order)(listing, wanted)
        try:
            while True:
                with _decoding(self.path):
                    step = next(walk, None)
                    if step is None:
                        break
                    index, time, raw = step
                    self._refuse_large(raw.width, raw.height)
                    frame = Frame(index, time, _upright(raw))
                found += 1
                yield frame
        finally:
            self._container.close()
        if not found:
            raise InputError(f"'{self.path}' has no frame that can be decoded.", "no_frames", _HINT)
        if found < len(wanted):
            self.notes.append(f"{found} of {len(wanted)} frames could be decoded")

    def _by_time(self, listing: _Listing, wanted: list[int]) -> Iterator[tuple[int, float, Any]]:
        """(number, seconds, frame) of the wanted frames, seeking where that pays."""
        times, step = listing.times, float(self._stream.time_base)
        keys = [display for display, _ in listing.keys]
        position = -1  # number of the last frame that left the decoder
        frames = self._decoded()
        for target in wanted:
            if position >= target:
                continue
            key = bisect_right(keys, times[target]) - 1
            if key >= 0:
                far = bisect_right(times, keys[key]) - 1 - position > _SEEK_PAYS_FROM
                if far and self.seek(listing.keys[key][1]):
                    frames = self._decoded()
            for raw in frames:
                if raw.pts is None:
                    continue
                position = bisect_right(times, raw.pts) - 1
                if position >= target:
                    yield position, (times[position] - times[0]) * step, raw
                    break
            else:
                return

    def _by_order(self, _: _Listing, wanted: Collection[int]) -> Iterator[tuple[int, float, Any]]:
        """The same for streams without times: decode from the start and count."""
        last = max(wanted, default=-1)
        for index, raw in enumerate(islice(self._decoded(), last + 1)):
            if index in wanted:
                yield index, index / (self.fps or 25.0), raw

    def seek(self, time: int) -> bool:
        """Go to the keyframe at a decoding time, in the stream's units; False where it fails."""
        import av

        try:
            self._container.seek(time, stream=self._stream, backward=True)
        except av.error.FFmpegError:
            return False
        return True

    def _decoded(self) -> Iterator[Any]:
        """Frames from the present position on; damaged packets are passed over."""
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError:
                self.notes.append(_ENDS_EARLY)
                return
            if _is_empty(packet):
                continue
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                self.notes.append("damaged frames were passed over")
                continue
            yield from decoded


def read_frames(
    path: Path | str,
    *,
    count: int = 16,
    numbers: Sequence[int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> VideoFrames:
    """Open a video to read ``count`` frames from the middles of as many equal stretches.

    Args:
        path: A file in a container that holds its own data (MP4, MOV, MKV, WebM, AVI, …).
        count: Frames wanted; a shorter video gives all of its frames.
        numbers: The wanted frames themselves, in place of ``count``; those beyond the end are
            passed over.
        max_pixels: Videos with larger frames are refused.

    Returns:
        The open video; a context manager.

    Raises:
        InputError: With the status ``missing``, ``unreadable``, ``empty``, ``too_large`` or
            ``no_frames``; the last also while iterating.
        ConfigError: ``count`` is below 1.
    """
    if count < 1:
        raise ConfigError(f"The number of frames must be at least 1, not {count}.")
    path = Path(path)
    if check_file(path) == 0:
        raise InputError(f"'{path}' is empty.", "empty", "Copy the file again.")
    return VideoFrames(path, count, numbers, max_pixels)


def _open(path: Path) -> Any:
    import av

    only_this_file = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        with open(path, "rb"):
            pass
        return av.open(f"file:{path}", mode="r", options=only_this_file, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise InputError(
            f"'{path}' is not a video that can be read, or it is damaged.", "unreadable", _HINT
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Whatever the decoder raises becomes the one sentence."""
    import av

    try:
        yield
    except (av.error.FFmpegError, *DECODE_ERRORS) as error:
        raise InputError(
            f"'{path}' is damaged and cannot be decoded ({type(error).__name__}).",
            "unreadable",
            _HINT,
        ) from error


def _is_empty(packet: Any) -> bool:
    """Whether it says that the frame before is shown on; a decoder takes it for the end."""
    return not packet.size and packet.dts is not None


def _list_packets(container: Any, stream: Any) -> _Listing:
    """Read the packets without decoding them."""
    import av

    times: list[int] = []
    keys: list[tuple[int, int]] = []
    timed = whole = True
    seen, last = 0, None  # packets, and where the last of them ends
    packets = container.demux(stream)
    while len(times) < MAX_FRAMES:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except av.error.FFmpegError:
            whole = False
            break
        if packet.size or _is_empty(packet):
            seen += 1
            if packet.dts is not None:
                last = max(last or 0, packet.dts + (packet.duration or 0))
        # A cut without new coding keeps frames before it that are decoded and not shown.
        if not packet.size or packet.is_discard:
            continue
        whole = whole and not packet.is_corrupt
        if packet.pts is None:
            timed = False
            times.append(0)
            continue
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
    begin, length = stream.start_time, stream.duration
    ends = None not in (begin, length, last) and last >= begin + length
    whole = whole and (ends or seen >= (stream.frames or 0))
    # AVI stores no display times: those of reordered frames are guesses.
    reordered = container.format.name == "avi" and stream.codec_context.has_b_frames
    timed = timed and not reordered and len(set(times)) == len(times)
    if timed:
        times.sort()
    end = None if last is None else float(last * stream.time_base)
    if end is not None and container.start_time:
        end -= container.start_time / 1e6
    return _Listing(times, sorted(keys), timed, whole, end)


def looks_like_video(head: bytes) -> bool:
    """Whether the first 32 bytes of a file that is no picture are those of a video container."""
    if head[4:8] == b"ftyp":
        return head[8:11] not in (b"M4A", b"M4B", b"avi", b"hei", b"hev", b"mif", b"msf", b"crx")
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    return head.startswith((b"\x1aE\xdf\xa3", b"FLV\x01", b"\0\0\x01\xba"))


def evenly(total: int, count: int) -> list[int]:
    """The middles of ``count`` equal stretches of ``total`` frames; all of them if fewer."""
    if total <= count:
        return list(range(total))
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _upright(raw: Any) -> np.ndarray:
    """The pixels of a frame, turned as its display matrix says.

    It shows (x, y) at (a x + c y, b x + d y); the nearest of the eight turns and mirrorings is
    taken.
    """
    pixels: np.ndarray = raw.to_ndarray(format="rgb24")
    for side in raw.side_data:
        if getattr(side.type, "name", "") == "DISPLAYMATRIX":
            a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(side), np.int32)[:5])
            break
    else:
        return pixels
    if abs(a) + abs(d) >= abs(b) + abs(c):
        mirror_x, mirror_y = a < 0, d < 0
    else:
        pixels = pixels.transpose(1, 0, 2)
        mirror_x, mirror_y = c < 0, b < 0
    pixels = pixels[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
    return np.ascontiguousarray(pixels)
