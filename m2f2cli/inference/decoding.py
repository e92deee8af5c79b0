"""Items decoded and cut in threads, ahead of the model that judges them; no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from m2f2cli.inference.prepare import Prepared, Recipe, prepare
from m2f2cli.inference.sources import Source
from m2f2cli.runtime import processors

_MOST_WORKERS = 8


class Decoder:
    """Prepares sources in order; the first ones from the moment it is made, while the model loads.

    Args:
        sources: The items.
        faces: One of ``prepare.FACES_MODES``.
        frames: Frames sampled from each video.
    """

    def __init__(self, sources: Sequence[Source], *, faces: str, frames: int) -> None:
        self._faces, self._frames = faces, frames
        self._left = iter(sources)
        self._recipe: Future[Recipe] = Future()
        self._queue: deque[Future[Prepared]] = deque()
        self._workers = min(_MOST_WORKERS, processors())
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="m2f2-decode")
        self._fill(self._workers)

    def _fill(self, size: int) -> None:
        while len(self._queue) < size and (source := next(self._left, None)) is not None:
            self._queue.append(
                self._pool.submit(
                    prepare, source, faces=self._faces, frames=self._frames, recipe=self._recipe
                )
            )

    def prepared(self, recipe: Recipe, *, ahead: int) -> Iterator[Prepared]:
        """Every source, read and cut, in order.

        Args:
            recipe: How the model wants its crops.
            ahead: How many items the model takes at a time.
        """
        self._recipe.set_result(recipe)
        window = 2 * self._workers + ahead
        self._fill(window)
        while self._queue:
            item = self._queue.popleft().result()
            self._fill(window)
            yield item

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._recipe.cancel()
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
