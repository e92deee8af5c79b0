"""What happens when someone does something on the page; an error is one sentence, never more."""

from __future__ import annotations

import functools
import inspect
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from m2f2cli.errors import M2F2Error
from m2f2cli.records import Detection, Explanation
from m2f2cli.runtime import debug
from m2f2cli.serving import drawing
from m2f2cli.serving.service import Look, Sent, Service

GENERIC = "Something went wrong here. It was noted; try again, or with another file."
_EVERY = 0.15  # seconds between two pictures of growing answers
_log = logging.getLogger("m2f2.demo")


def _polite(body: Callable[..., Any]) -> Callable[..., Any]:
    """Let a visitor see a sentence of m2f2's or a general one; anything else goes to the log."""

    def shown(error: Exception) -> gr.Error:
        if isinstance(error, M2F2Error):
            words = f"{error.message} {error.hint}" if error.hint else error.message
            return gr.Error(words, print_exception=False)
        detail = traceback.format_exc() if debug() else f"{type(error).__name__}: {error}"
        _log.error("%s failed: %s", body.__name__, detail)
        return gr.Error(GENERIC, print_exception=False)

    if inspect.isasyncgenfunction(body):

        @functools.wraps(body)
        async def stream(*given: Any) -> AsyncIterator[Any]:
            try:
                async for item in body(*given):
                    yield item
            except Exception as error:  # noqa: BLE001 - the visitors' funnel
                raise shown(error) from None

        return stream

    @functools.wraps(body)
    async def once(*given: Any) -> Any:
        try:
            return await body(*given)
        except Exception as error:  # noqa: BLE001 - the visitors' funnel
            raise shown(error) from None

    return once


class Page:
    """The functions that the page's controls and its clients call.

    Args:
        service: Answers them.
        no_reasons: What stands in the place of reasons where the model gives none.
    """

    def __init__(self, service: Service, *, no_reasons: str) -> None:
        self.service, self._no_reasons = service, no_reasons

    @_polite
    async def picture(self, sent: Sent) -> tuple[Any, ...]:
        """A picture was dropped, pasted or taken."""
        return self._picture(await self.service.look(sent, kind="image"))

    @_polite
    async def example(self, file: Path) -> tuple[Any, ...]:
        """An example was chosen."""
        return self._picture(await self.service.example(file))

    def _picture(self, look: Look) -> tuple[Any, ...]:
        return None, drawing.verdict(look), drawing.stage(look), *self._about(look)

    @_polite
    async def video(self, sent: Sent) -> tuple[Any, ...]:
        """A video was dropped."""
        look = await self.service.look(sent, kind="video")
        drawn = drawing.timeline(look.record), drawing.worst(look)
        return None, drawing.verdict(look), *drawn, *self._about(look)

    def _about(self, look: Look) -> tuple[Any, ...]:
        """(reasons, record, look, face)."""
        silent = look.record.verdict is None or self.explains
        return "" if silent else self._no_reasons, look.record.to_dict(), look, 0

    @property
    def explains(self) -> bool:
        """Whether there are reasons to ask for."""
        return self.service.session.explains

    @_polite
    async def focus(self, look: Look | None, event: gr.EventData) -> tuple[Any, ...]:
        """A face was chosen: (verdict, stage, reasons, face)."""
        faces = len(look.record.faces) if look else 0
        face = getattr(event, "face", None)
        if look is None or not isinstance(face, int) or not 0 <= face < faces:
            return (gr.skip(),) * 4
        reasons = "" if self.explains else gr.skip()
        return drawing.verdict(look, face), drawing.stage(look, face), reasons, face

    @_polite
    async def reasons(self, look: Look | None, face: int, question: str = "") -> AsyncIterator[Any]:
        """Reasons were asked for, or are due: (answers, record), again and again."""
        if look is None or look.record.verdict is None:
            yield gr.skip(), gr.skip()
            return
        faces = look.record.faces
        place = faces[face].crop if face < len(faces) else None
        said: Any = ()
        shown = 0.0
        async for item in self.service.reasons(look, face=place, question=question):
            if isinstance(item, Explanation):
                yield drawing.answers(said, item), item.to_dict()
                return
            said = item
            if time.monotonic() - shown > _EVERY:
                shown = time.monotonic()
                yield drawing.answers(said), gr.skip()

    @_polite
    async def batch(self, sent: list[Sent]) -> AsyncIterator[Any]:
        """Several files were dropped: (drop, table, downloads), once a file."""
        records: list[Detection] = []
        for number, one in enumerate(sent, start=1):
            records.append((await self.service.look(one)).record)
            done = number == len(sent)
            links = (
                drawing.downloads(records) if done else f"<p>{number} of {len(sent)} judged.</p>"
            )
            yield None if done else gr.skip(), drawing.table(records), links

    @_polite
    async def detect(self, file: dict) -> dict:
        """Judge a picture or video; returns the record that m2f2 detect writes.

        Args:
            file: From gradio_client.handle_file.
        """
        return await self.service.detect(file)

    @_polite
    async def explain(self, file: dict, regions: list[str] = [], question: str = "") -> dict:  # noqa: B006
        """Judge and explain; returns the record that m2f2 explain writes, of the deciding face.

        Args:
            file: From gradio_client.handle_file.
            regions: Of skin, eyes, eyebrows, nose, mouth, face; empty for all, or for none when
                there is a question.
            question: One of your own.
        """
        return await self.service.explain(file, regions=regions, question=question)
