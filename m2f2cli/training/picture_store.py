"""The pixels of a training: all checked at the start, kept where they fit, else read anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from m2f2cli.data.clips import FrameReader
from m2f2cli.data.images import read_picture
from m2f2cli.data.samples import Sample, SampleSet, check_classes
from m2f2cli.errors import InputError

_CACHE_BYTES = 2 * 2**30
_TOLD = 10_000  # pictures between two lines on how far the check is
_AHEAD = 256  # pictures decoded before the reader has taken them


class PictureStore:
    """Pixels of a sample set, from memory or from its files.

    Every picture, and one frame of every video, is decoded once at the start, so a broken one is
    known before training begins. Frames of videos are never kept: their files are opened in each
    process that reads them, and one frame is read at a time.

    Args:
        samples: The pictures and videos.
        cache: ``always`` or ``never`` keep pictures decoded, or ``auto``: if they take at most
            2 GiB.
        skip: Leave out what cannot be read, instead of failing.
        tell: Called with a line for people after every 10,000 pictures.

    Attributes:
        samples: What can be read.
        skipped: Names of what cannot.

    Raises:
        InputError: Something cannot be read and ``skip`` is off; it is named.
    """

    def __init__(
        self,
        samples: SampleSet,
        cache: str,
        *,
        skip: bool,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._clips = FrameReader()
        self._kept: dict[int, np.ndarray] = {}
        keep, taken = cache != "never", 0
        good: list[int] = []
        failed: list[tuple[Sample, InputError]] = []
        for index, result in enumerate(self._read_all(samples.samples)):
            if tell and index and index % _TOLD == 0:
                tell(f"checked {index:,} of {len(samples):,} pictures of '{samples.root}'")
            if isinstance(result, InputError):
                failed.append((samples.samples[index], result))
                continue
            if samples.samples[index].clip is None:
                taken += result.nbytes
                keep = keep and (cache == "always" or taken <= _CACHE_BYTES)
                if keep:
                    self._kept[len(good)] = result
                else:
                    self._kept.clear()
            good.append(index)
        if failed and not skip:
            sample, error = failed[0]
            raise InputError(
                f"{len(failed)} of {len(samples)} pictures cannot be read, '{sample.name}' of "
                f"'{samples.root}' first: {error.message}",
                error.status,
                "Mend or remove them, or leave them out with --unreadable skip.",
            )
        self.skipped = [sample.name for sample, _ in failed]
        self.samples = samples.subset(good)
        check_classes(self.samples, f"'{samples.root}' that can be read")

    def read(self, index: int, frame: int | None = None) -> np.ndarray:
        """Pixels of a picture, or of a frame of a video.

        Args:
            index: Which sample.
            frame: Of a video; None for the middle one.

        Returns:
            uint8 (H, W, 3) RGB.

        Raises:
            InputError: It cannot be read.
        """
        kept = self._kept.get(index)
        return self._read(self.samples.samples[index], frame) if kept is None else kept

    def _read_all(self, samples: Sequence[Sample]) -> Iterator[np.ndarray | InputError]:
        """Read in threads, a bounded number ahead of the reader."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(samples), _AHEAD):
                yield from pool.map(self._try, samples[start : start + _AHEAD])

    def _try(self, sample: Sample) -> np.ndarray | InputError:
        try:
            return self._read(sample, None)
        except InputError as error:
            return error

    def _read(self, sample: Sample, frame: int | None) -> np.ndarray:
        if sample.clip is None:
            return read_picture(sample.path).pixels
        frame = sample.frames // 2 if frame is None else frame
        return self._clips.frame(sample.path, sample.clip, frame)
