"""The page of ``m2f2 demo``: its layout, and what happens when someone does something on it."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import time
import traceback
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import gradio as gr
from gradio.events import api

from m2f2cli.checkpoints.hub import BUNDLED, find_explainer, resolve_checkpoint
from m2f2cli.errors import M2F2Error
from m2f2cli.inference.pipeline import DetectPipeline
from m2f2cli.records import Detection, Explanation
from m2f2cli.runtime import debug
from m2f2cli.serving import drawing
from m2f2cli.serving.worker import MAX_QUESTION, Look, Sent, Service

TITLE = "m2f2: is this face forged?"
NO_REASONS = (
    '<p class="m2-small">This model gives verdicts without reasons. For reasons, start the page '
    "with an explainer: <code>m2f2 demo --model EXPLAINER-FOLDER</code></p>"
)
DROP = "# Drop a picture here\nor click to choose one, paste it, or use the camera"
EXAMPLES = {"astronaut.jpg": "An astronaut", "grace_hopper.jpg": "A rear admiral"}
VIDEO = (
    "Up to ten minutes. Some frames are looked at, evenly spaced; the verdict is on their average."
)
BATCH = "Pictures and short videos, up to 50 files and 100 MB at a time."
GENERIC = "Something went wrong here. It was noted; try again, or with another file."
ASSETS = Path(str(files("m2f2cli") / "assets" / "demo"))
THEME = gr.themes.Base(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
# Every event that runs the model waits in one line; m2f2 reads uploads itself, as they were sent.
_MODEL: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "api_visibility": "private",
}
_DROPPED = {**_MODEL, "preprocess": False, "trigger_mode": "always_last"}
_EVERY = 0.15  # seconds between two pictures of growing answers
_CARD_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_LONGEST_CARD = 200_000  # characters
_log = logging.getLogger("m2f2.demo")


def build(page: Page) -> gr.Blocks:
    """The page, with controls that do what ``page`` says."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False) as blocks:
        gr.Markdown((ASSETS / "intro.md").read_text(encoding="utf-8"))
        with gr.Tabs():
            with gr.Tab("Picture", id="picture"):
                _picture_tab(page)
            with gr.Tab("Video", id="video"):
                _video_tab(page)
            with gr.Tab("Several files", id="batch"):
                gr.Markdown(BATCH)
                drop = gr.File(
                    file_count="multiple", label="Your files", height=140, elem_id="m2-files"
                )
                downloads = gr.HTML()
                table = gr.HTML(elem_id="m2-table")
                drop.upload(page.batch, drop, [drop, table, downloads], preprocess=False, **_MODEL)
            with gr.Tab("The model and its limits", id="limits"):
                gr.Markdown(card_of(page.service.pipeline), elem_classes="m2-model")
        api(page.detect, api_name="detect", concurrency_id="model", concurrency_limit=1)
        api(page.explain, api_name="explain", concurrency_id="model", concurrency_limit=1)
    return blocks


def _picture_tab(page: Page) -> None:
    look, face = gr.State(None), gr.State(0)
    script = (ASSETS / "stage.js").read_text(encoding="utf-8")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            drop = gr.Image(
                sources=["upload", "clipboard", "webcam"],
                label="Your picture",
                placeholder=DROP,
                buttons=[],
                height=300,
                elem_id="m2-drop",
            )
            gr.Markdown("No picture at hand? Try one of these:", elem_classes="m2-small")
            with gr.Row():
                examples = {
                    name: gr.Button(words, icon=ASSETS / name, size="sm")
                    for name, words in EXAMPLES.items()
                }
        with gr.Column(scale=3, min_width=300):
            verdict = gr.HTML(elem_id="m2-verdict")
            stage = gr.HTML(elem_id="m2-stage", js_on_load=script)
            reasons, record, running = _answers(page, look, face)
    outputs = [drop, verdict, stage, reasons, record, look, face]
    looks = [drop.upload(page.picture, drop, outputs, **_DROPPED)]
    for name, button in examples.items():
        shown = functools.partial(page.example, ASSETS / name)
        looks.append(button.click(shown, None, outputs, **_MODEL))
    running += _then_reasons(page, looks, [look, face], [reasons, record])
    focus = [verdict, stage, reasons, face]
    stage.click(page.focus, look, focus, concurrency_limit=None, api_visibility="private")
    for trigger in (drop.upload, stage.click, *(button.click for button in examples.values())):
        trigger(None, cancels=running, api_visibility="private")


def _video_tab(page: Page) -> None:
    look, face = gr.State(None), gr.State(0)
    gr.Markdown(VIDEO)
    drop = gr.File(file_types=["video"], label="Your video", height=140, elem_id="m2-video")
    verdict = gr.HTML()
    timeline = gr.HTML(elem_id="m2-timeline")
    worst = gr.HTML()
    reasons, record, running = _answers(page, look, face)
    outputs = [drop, verdict, timeline, worst, reasons, record, look, face]
    looked = drop.upload(page.video, drop, outputs, **_DROPPED)
    running += _then_reasons(page, [looked], [look, face], [reasons, record])
    drop.upload(None, cancels=running, api_visibility="private")


def _answers(page: Page, look: gr.State, face: gr.State) -> tuple[gr.HTML, gr.JSON, list[Any]]:
    """Reasons, the box for a question, the record; and the events that write the reasons."""
    reasons = gr.HTML(elem_classes="m2-reasons")
    running: list[Any] = []
    if page.explains:
        question = gr.Textbox(
            label="Ask about this face",
            placeholder="Is the hair natural?",
            max_length=MAX_QUESTION,
        )
        with gr.Row():
            ask, again, stop = (
                gr.Button(words, size="sm", min_width=90)
                for words in ("Ask", "Reasons for this face", "Stop")
            )
    with gr.Accordion("Full record (JSON)", open=False):
        record = gr.JSON(show_label=False)
    if page.explains:
        words = [reasons, record]
        running = [
            question.submit(page.reasons, [look, face, question], words, **_MODEL),
            ask.click(page.reasons, [look, face, question], words, **_MODEL),
            again.click(page.reasons, [look, face], words, **_MODEL),
        ]
        stop.click(None, cancels=running, api_visibility="private")
    return reasons, record, running


def _then_reasons(page: Page, looks: list[Any], given: list[Any], words: list[Any]) -> list[Any]:
    """Let reasons follow each verdict."""
    return [look.success(page.reasons, given, words, **_MODEL) for look in looks if page.explains]


def card_of(pipeline: DetectPipeline) -> str:
    """What there is to know about a model before trusting it, in Markdown.

    What always holds comes first, then the checkpoint's own ``README.md``; of a bundled explainer,
    the bundled detector's as well.
    """
    settings, name = pipeline.settings, pipeline.name
    facts = (
        f"## The model\n\n`{settings.model}`, fingerprint `{settings.model_fingerprint}`. "
        f"Threshold {drawing.percent(settings.threshold)}"
    )
    if settings.uncertain:
        low, high = (drawing.percent(value) for value in settings.uncertain)
        facts += f"; between {low} and {high} it does not decide"
    limits = Template((ASSETS / "limits.md").read_text(encoding="utf-8"))
    told = limits.substitute(opinion=drawing.OPINION, legend=drawing.MAP_LEGEND)
    parts = [told, f"{facts}."]
    if name in BUNDLED or Path(name).is_dir():
        folders = [find_explainer(name)] if pipeline.explains else []
        for folder in dict.fromkeys([*folders, resolve_checkpoint(name)]):
            if (file := folder / "README.md").is_file():
                text = file.read_text(encoding="utf-8", errors="replace")[:_LONGEST_CARD]
                parts.append(_CARD_HEADER.sub("", text))
    return "\n\n".join(parts)


def _safe(body: Callable[..., Any]) -> Callable[..., Any]:
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
            except Exception as error:  # noqa: BLE001 - a visitor never sees anything else
                raise shown(error) from None

        return stream

    @functools.wraps(body)
    async def once(*given: Any) -> Any:
        try:
            return await body(*given)
        except Exception as error:  # noqa: BLE001 - a visitor never sees anything else
            raise shown(error) from None

    return once


class Page:
    """The functions that the page's controls and its clients call."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @property
    def explains(self) -> bool:
        """Whether there are reasons to ask for."""
        return self.service.pipeline.explains

    @_safe
    async def picture(self, sent: Sent) -> tuple[Any, ...]:
        """A picture was dropped, pasted or taken."""
        return self._picture(await self.service.look(sent, kind="image"))

    @_safe
    async def example(self, file: Path) -> tuple[Any, ...]:
        """An example was chosen."""
        return self._picture(await self.service.example(file))

    def _picture(self, look: Look) -> tuple[Any, ...]:
        return None, drawing.verdict(look), drawing.stage(look), *self._about(look)

    @_safe
    async def video(self, sent: Sent) -> tuple[Any, ...]:
        """A video was dropped."""
        look = await self.service.look(sent, kind="video")
        drawn = drawing.timeline(look.record), drawing.worst(look)
        return None, drawing.verdict(look), *drawn, *self._about(look)

    def _about(self, look: Look) -> tuple[Any, ...]:
        """(reasons, record, look, face)."""
        silent = look.record.verdict is None or self.explains
        return "" if silent else NO_REASONS, look.record.to_dict(), look, 0

    @_safe
    async def focus(self, look: Look | None, event: gr.EventData) -> tuple[Any, ...]:
        """A face was chosen: (verdict, stage, reasons, face)."""
        faces = len(look.record.faces) if look else 0
        face = getattr(event, "face", None)
        if look is None or not isinstance(face, int) or not 0 <= face < faces:
            return (gr.skip(),) * 4
        reasons = "" if self.explains else gr.skip()
        return drawing.verdict(look, face), drawing.stage(look, face), reasons, face

    @_safe
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

    @_safe
    async def batch(self, sent: list[Sent]) -> AsyncIterator[Any]:
        """Several files were dropped: (drop, table, downloads), once a file."""
        records: list[Detection] = []
        for number, one in enumerate(sent, start=1):
            records.append((await self.service.look(one)).record)
            done = number == len(sent)
            state = drawing.downloads(records) if done else drawing.progress(number, len(sent))
            yield None if done else gr.skip(), drawing.table(records), state

    @_safe
    async def detect(self, file: dict) -> dict:
        """Judge a picture or video; returns the record that m2f2 detect writes.

        Args:
            file: From gradio_client.handle_file.
        """
        return await self.service.detect(file)

    @_safe
    async def explain(self, file: dict, regions: list[str] = [], question: str = "") -> dict:  # noqa: B006
        """Judge and explain; returns the record that m2f2 explain writes, of the deciding face.

        Args:
            file: From gradio_client.handle_file.
            regions: Of skin, eyes, eyebrows, nose, mouth, face; empty for all, or for none when
                there is a question.
            question: One of your own.
        """
        return await self.service.explain(file, regions=regions, question=question)
