"""The one model behind the page: uploads in, records and answers out, one after another."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from m2f2cli.data.video import VIDEO_SUFFIXES, read_frames
from m2f2cli.errors import InputError, UsageError
from m2f2cli.inference.pipeline import DetectPipeline, Judged
from m2f2cli.inference.sources import Source
from m2f2cli.options.explain import REGIONS
from m2f2cli.records import Box, Detection, Explanation
from m2f2cli.serving.gate import Uploads

if TYPE_CHECKING:
    from m2f2cli.inference.explain import TextChunk

MAX_SECONDS = 600.0  # of a video
MAX_QUESTION = 500  # characters
WORST_FRAMES = 3
SHOWN_SIDE = 1280  # pixels

Sent = Mapping[str, Any]
R = TypeVar("R")
T = TypeVar("T")


class GoneError(Exception):
    """Whoever asked has left; raised inside the work to end it."""


class Worker:
    """Runs pieces of work one after another, in the order they came."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._work, name="m2f2-model", daemon=True).start()

    def _work(self) -> None:
        while True:
            future, work = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                future.set_exception(error)
            del future, work  # a result is not to be kept until the next one

    async def run(self, work: Callable[[], R]) -> R:
        """Wait for the result of some work. Cancelled before its turn, it is never begun."""
        future: Future[R] = Future()
        self._jobs.put((future, work))
        return await asyncio.wrap_future(future)

    async def stream(self, work: Callable[[Callable[[T], None]], object]) -> AsyncIterator[T]:
        """Give what work tells while it goes on.

        Args:
            work: Is called with a function to tell things with, which raises ``GoneError`` once the
                reader has left.

        Yields:
            What it told, in order.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[T | None] = asyncio.Queue()
        gone = threading.Event()

        def tell(thing: T) -> None:
            if gone.is_set():
                raise GoneError
            loop.call_soon_threadsafe(told.put_nowait, thing)

        done = asyncio.ensure_future(self.run(lambda: work(tell)))
        done.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (thing := await told.get()) is not None:
                yield thing
            await done
        finally:
            gone.set()
            done.cancel()
            with suppress(asyncio.CancelledError, GoneError):
                if done.done():
                    done.exception()


@dataclass(frozen=True)
class Said:
    """One answer, as far as it is written."""

    # The region it is about; None for a question of the visitor's own, and for the judgement.
    region: str | None
    asked: str  # the question in words
    text: str  # the answer so far
    judges: bool = False  # whether it is the question for the language model's own judgement


@dataclass(frozen=True)
class Look:
    """An answered upload: what is kept of it while its owner looks at it."""

    judged: Judged  # the verdict, with crops and scores
    # JPEG files, SHOWN_SIDE pixels at most: the picture (0), or the worst frames of a video by
    # number; empty where nothing could be decoded.
    shown: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def record(self) -> Detection:
        """The record of the verdict."""
        return self.judged.record


class Service:
    """Answers about uploads, one at a time, with a loaded model."""

    def __init__(self, pipeline: DetectPipeline, uploads: Uploads) -> None:
        self.pipeline, self._uploads, self._worker = pipeline, uploads, Worker()

    async def look(self, sent: Sent | None, *, kind: str | None = None) -> Look:
        """Judge an upload and delete it.

        Args:
            sent: As ``Uploads.taken`` has it.
            kind: ``image`` or ``video``; None goes by the file's name, as ``m2f2 detect`` does.

        Raises:
            M2F2Error: It is no upload, or a video that lasts too long.
        """
        return await self._worker.run(lambda: self._look(sent, kind))

    async def example(self, file: Path) -> Look:
        """Judge a picture of ours."""
        return await self._worker.run(lambda: self._judge(file, file.name, "image"))

    async def detect(self, sent: Sent) -> dict[str, Any]:
        """The record of ``m2f2 detect`` about an upload."""
        return (await self.look(sent)).record.to_dict()

    async def explain(
        self, sent: Sent, *, regions: Sequence[str] = (), question: str = ""
    ) -> dict[str, Any]:
        """The record of ``m2f2 explain`` about an upload; of a picture, its deciding face."""
        questions = self._questions(question)
        look = await self.look(sent)
        if look.record.status != "ok":
            return look.record.to_dict()
        ask = partial(self.pipeline.explain, look.judged, regions=regions, questions=questions)
        return (await self._worker.run(ask)).to_dict()

    async def reasons(
        self, look: Look, *, face: Box | None = None, question: str = ""
    ) -> AsyncIterator[tuple[Said, ...] | Explanation]:
        """Ask about a face: a question, or for the judgement and every region.

        Args:
            look: From ``look``, with a verdict.
            face: ``crop`` of the face; None for the one that decides.
            question: The visitor's own; empty asks for judgement and regions.

        Yields:
            All answers so far, whenever there are new words; at last the record.
        """
        questions = self._questions(question)
        said: list[Said] = []

        def work(tell: Callable[[tuple[Said, ...] | Explanation], None]) -> None:
            def add(chunk: TextChunk) -> None:
                if chunk.text:
                    said[-1] = replace(said[-1], text=said[-1].text + chunk.text)
                else:
                    asked = chunk.question
                    said.append(Said(asked.region, chunk.asked, "", asked.text is None))
                tell(tuple(said))

            regions = () if questions else REGIONS
            record = self.pipeline.explain(
                look.judged, face=face, regions=regions, questions=questions, on_text=add
            )
            explained = record.explanations[0]
            whole = (explained.judgement_text, *(reason.text for reason in explained.reasons))
            tell(tuple(replace(one, text=text) for one, text in zip(said, whole, strict=True)))
            tell(record)

        async for item in self._worker.stream(work):
            yield item

    def _questions(self, question: str) -> tuple[str, ...]:
        text = question.strip()
        if len(text) > MAX_QUESTION:
            raise UsageError(f"A question may have {MAX_QUESTION} characters.", "Ask shorter.")
        return (text,) if text else ()

    def _look(self, sent: Sent | None, kind: str | None) -> Look:
        with self._uploads.taken(sent) as (path, name):
            named = "video" if Path(name).suffix.lower() in VIDEO_SUFFIXES else "image"
            return self._judge(Path(path), name, kind or named)

    def _judge(self, file: Path, name: str, kind: str) -> Look:
        if kind == "video":
            _check_length(file, name)
        judged = self.pipeline.judge_one(Source(str(file), kind, PurePosixPath("item")))
        views = {view.index: view for view in judged.prepared.views}
        numbers = worst_frames(judged.record) if kind == "video" else list(views)
        chosen = [views[number] for number in numbers]
        shown = {v.index: _jpeg(v.pixels) for v in chosen if v.pixels is not None}
        # Under its owner's name: nobody is told where it lay here.
        judged = judged.reduced()
        message = judged.record.message and judged.record.message.replace(str(file), name)
        return Look(
            replace(judged, record=replace(judged.record, path=name, message=message)), shown
        )


def _check_length(file: Path, name: str) -> None:
    try:
        with read_frames(file, count=1) as video:
            seconds = video.duration or 0.0
    except InputError:
        return  # its record will say so
    if seconds > MAX_SECONDS:
        raise InputError(
            f"'{name}' lasts {seconds / 60:.0f} minutes; {MAX_SECONDS / 60:.0f} are looked at.",
            "too_large",
            "Cut out the part in question.",
        )


def worst_frames(record: Detection) -> list[int]:
    """The frames with the highest fake probability, the highest first."""
    scored = [f for f in record.frames if f.fake_probability is not None]
    scored.sort(key=lambda frame: -(frame.fake_probability or 0.0))
    return [frame.index for frame in scored[:WORST_FRAMES]]


def _jpeg(pixels: np.ndarray) -> bytes:
    picture = Image.fromarray(pixels)
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88)
    return data.getvalue()
