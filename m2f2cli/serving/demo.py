"""The page of ``m2f2 demo``: its layout and its texts."""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from m2f2cli.serving.page import Page

TITLE = "m2f2: is this face forged?"
INTRO = """# Is this face forged?
Drop a picture. The program finds the faces, says for each whether it looks forged, and shows where
it looked. Files are deleted once they are answered; nothing is sent anywhere else."""
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
RECORD = "Full record (JSON)"
ASSETS = Path(str(files("m2f2cli") / "assets" / "demo"))
THEME = gr.themes.Base(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
# A click on a face tells the server which; the slider sets how strongly maps show, and keeps it.
STAGE_SCRIPT = """
element.addEventListener('click', (event) => {
  const face = event.target.closest('[data-face]');
  if (face) trigger('click', { face: Number(face.dataset.face) });
});
const show = (value) => element.style.setProperty('--map', value / 100);
element.addEventListener('input', (event) => {
  element.dataset.map = event.target.value;
  show(event.target.value);
});
watch('value', () => {
  const slider = element.querySelector('input[type=range]');
  if (slider && element.dataset.map) slider.value = element.dataset.map;
});
"""


def _as_sent(component: Any) -> Any:
    """Let a component hand over uploads as they came: m2f2 reads them itself."""
    component.preprocess = lambda payload: payload and payload.model_dump()
    return component


def build(page: Page, *, card: str) -> gr.Blocks:
    """The page.

    Args:
        page: What its controls do.
        card: The model's card, Markdown.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False) as blocks:
        gr.Markdown(INTRO)
        with gr.Tabs():
            with gr.Tab("Picture", id="picture"):
                _picture_tab(page)
            with gr.Tab("Video", id="video"):
                _video_tab(page)
            with gr.Tab("Several files", id="batch"):
                _batch_tab(page)
            with gr.Tab("The model and its limits", id="limits"):
                gr.Markdown(card, elem_classes="m2-model")
        gr.api(page.detect, api_name="detect", concurrency_id="model", concurrency_limit=1)
        gr.api(page.explain, api_name="explain", concurrency_id="model", concurrency_limit=1)
    return blocks


# Every event that runs the model waits in one line.
_MODEL: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "api_visibility": "private",
}
_DROPPED = {**_MODEL, "trigger_mode": "always_last"}


def _picture_tab(page: Page) -> None:
    look, face = gr.State(None), gr.State(0)
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
            _as_sent(drop)
            gr.Markdown("No picture at hand? Try one of these:", elem_classes="m2-small")
            with gr.Row():
                examples = {
                    name: gr.Button(words, icon=ASSETS / name, size="sm")
                    for name, words in EXAMPLES.items()
                }
        with gr.Column(scale=3, min_width=300):
            verdict = gr.HTML(elem_id="m2-verdict")
            stage = gr.HTML(elem_id="m2-stage", js_on_load=STAGE_SCRIPT)
            reasons, record, running = _words(page, look, face)
    outputs = [drop, verdict, stage, reasons, record, look, face]
    looks = [drop.upload(page.picture, drop, outputs, **_DROPPED)]
    for name, button in examples.items():
        looks.append(button.click(partial(page.example, ASSETS / name), None, outputs, **_MODEL))
    running += _then_reasons(page, looks, [look, face], [reasons, record])
    focus = [verdict, stage, reasons, face]
    stage.click(page.focus, look, focus, concurrency_limit=None, api_visibility="private")
    for trigger in (drop.upload, stage.click, *(button.click for button in examples.values())):
        trigger(None, cancels=running, api_visibility="private")


def _words(page: Page, look: gr.State, face: gr.State) -> tuple[gr.HTML, gr.JSON, list[Any]]:
    """Reasons, the box for a question, the record; and the events that write the reasons."""
    reasons = gr.HTML(elem_classes="m2-reasons")
    running: list[Any] = []
    if page.explains:
        question = gr.Textbox(
            label="Ask about this face", placeholder="Is the hair natural?", max_length=500
        )
        with gr.Row():
            ask, again, stop = (
                gr.Button(words, size="sm", min_width=90)
                for words in ("Ask", "Reasons for this face", "Stop")
            )
    with gr.Accordion(RECORD, open=False):
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


def _video_tab(page: Page) -> None:
    look, face = gr.State(None), gr.State(0)
    gr.Markdown(VIDEO)
    drop = _as_sent(
        gr.File(file_types=["video"], label="Your video", height=140, elem_id="m2-video")
    )
    verdict = gr.HTML()
    timeline = gr.HTML(elem_id="m2-timeline")
    worst = gr.HTML()
    reasons, record, running = _words(page, look, face)
    outputs = [drop, verdict, timeline, worst, reasons, record, look, face]
    looked = drop.upload(page.video, drop, outputs, **_DROPPED)
    running += _then_reasons(page, [looked], [look, face], [reasons, record])
    drop.upload(None, cancels=running, api_visibility="private")


def _batch_tab(page: Page) -> None:
    gr.Markdown(BATCH)
    drop = _as_sent(
        gr.File(file_count="multiple", label="Your files", height=140, elem_id="m2-files")
    )
    downloads = gr.HTML()
    table = gr.HTML(elem_id="m2-table")
    drop.upload(page.batch, drop, [drop, table, downloads], **_MODEL)
