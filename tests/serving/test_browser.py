"""The page as people use it, in Chromium: what they see, and what they do not.

Run with: pytest tests/serving -m browser
"""

from __future__ import annotations

import base64
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.explain import REGIONS, ExplainOptions
from m2f2cli.serving.drawing import HEADLINES
from m2f2cli.serving.gate import Uploads
from tests.data.prepare.videos import Scene
from tests.inference.explainers import tiny
from tests.serving.browser import Browser
from tests.serving.live import served

pytestmark = pytest.mark.browser
PHOTOS = Path(__file__).parents[2] / "examples"
ASTRONAUT, ADMIRAL = PHOTOS / "astronaut.jpg", PHOTOS / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    return Uploads(tmp_path_factory.mktemp("uploads"))


@pytest.fixture(scope="module")
def url(uploads: Uploads) -> Iterator[str]:
    options = ExplainOptions(detect=DetectOptions(frames=6), max_new_tokens=8)
    with served(tiny(), uploads, options) as address:
        yield address


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(window: Browser, url: str) -> Browser:
    window.open(url)
    window.driver.get_log("browser")  # what earlier pages said
    return window


def reasons(page: Browser) -> dict[str, str]:
    """The finished answers by their headings."""
    page.one(".m2-answers[aria-busy=false]")
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
    headings, answers = (page.run(script, f".m2-answers {tag}") for tag in ("dt", "dd"))
    return {heading.lower(): answer for heading, answer in zip(headings, answers, strict=False)}


def test_a_photo_gets_verdict_box_map_and_reasons(page, uploads):
    page.drop(ASTRONAUT)
    assert page.text("#m2-verdict h2") in HEADLINES.values()
    assert "Probability of being forged" in page.one(".m2-scale").get_attribute("aria-label")
    box, photo = page.one("#m2-stage .m2-box"), page.one("#m2-stage .m2-photo")
    assert box.get_attribute("aria-label").startswith("Face 1 of 1: ")
    share = box.rect["width"] / photo.rect["width"]
    assert 0.2 < share < 0.35  # the astronaut's face with its margin
    assert page.run("return document.querySelector('.m2-map').naturalWidth") > 100
    found = reasons(page)
    assert set(found) == {"is it genuine?", *REGIONS}
    assert "Asked without being told the verdict" in page.text(".m2-judgement")
    assert not any((uploads.folder / "sent").iterdir())
    own = {page.driver.current_url.rstrip("/")}
    assert page.hosts() == own  # nothing was loaded from or sent to anywhere else


def test_the_map_fades_and_stays_faded(page):
    page.drop(ASTRONAUT)
    page.one(".m2-map")

    def opacity() -> float:
        return float(page.run("return getComputedStyle(document.querySelector('.m2-map')).opacity"))

    assert opacity() == pytest.approx(0.6)
    page.one(".m2-slider input").send_keys(Keys.HOME)
    assert opacity() == 0
    reasons(page)
    page.one("#m2-stage .m2-box").click()  # draws the picture anew
    page.wait(lambda: page.one(".m2-slider input").get_attribute("value") == "0", "kept slider")
    assert opacity() == 0


def test_no_picture_gets_the_sentence(page, tmp_path):
    file = tmp_path / "photo.png"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    page.drop(file)
    assert page.text("#m2-verdict h2") == "No verdict"
    words = page.text("#m2-verdict .m2-card")
    assert "'photo.png' is not a JPEG, PNG, WEBP, BMP, TIFF, GIF or AVIF picture." in words
    assert not page.all("#m2-stage .m2-box")


def test_two_visitors_get_their_own_answers(page, url, tmp_path):
    other = Browser(tmp_path / "profile")
    try:
        other.open(url)
        seen = []
        for turn in ([(page, ASTRONAUT), (other, ADMIRAL)], [(page, ADMIRAL), (other, ASTRONAUT)]):
            for visitor, photo in turn:
                visitor.drop(photo)
            for visitor, photo in turn:
                own = f"#m2-stage .m2-photo[alt='The picture {photo.name}']"
                visitor.one(own)
                reasons(visitor)
                seen.append(visitor.text("#m2-stage .m2-box"))
        assert seen[0] == seen[3] != seen[1] == seen[2]
    finally:
        other.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both photos side by side."""
    left, right = (Image.open(file).resize((512, 512)) for file in (ASTRONAUT, ADMIRAL))
    both = Image.fromarray(np.concatenate([np.asarray(left), np.asarray(right)], axis=1))
    path = tmp_path_factory.mktemp("pair") / "pair.png"
    both.save(path)
    return path


def test_a_face_is_chosen_by_mouse_and_by_keyboard(page, pair):
    page.drop(pair)
    page.wait(lambda: len(page.all("#m2-stage .m2-box")) == 2, "two boxes")
    reasons(page)

    def pressed() -> list[str | None]:
        return [box.get_attribute("aria-pressed") for box in page.all("#m2-stage .m2-box")]

    def verdict_of(number: int) -> bool:
        score = page.all("#m2-stage .m2-box")[number].text.split(": ")[1]
        return score in page.text("#m2-verdict .m2-scale")

    assert pressed() == ["true", "false"]
    page.all("#m2-stage .m2-box")[1].click()
    page.wait(lambda: pressed() == ["false", "true"], "second face")
    page.wait(lambda: verdict_of(1), "its verdict")
    page.all("#m2-stage .m2-box")[0].send_keys(Keys.ENTER)
    page.wait(lambda: pressed() == ["true", "false"] and verdict_of(0), "first face again")


def test_a_question_of_ones_own(page):
    page.drop(ASTRONAUT)
    reasons(page)
    page.one("textarea[placeholder='Is the hair natural?']").send_keys("Why the hair?", Keys.ENTER)
    page.wait(lambda: any("why the hair?" in heading for heading in reasons(page)), "answer")


def test_the_full_record_is_there(page):
    page.drop(ASTRONAUT)
    reasons(page)
    page.wait(
        lambda: [b for b in page.all("button") if b.is_displayed() and "record" in b.text.lower()],
        "record",
    )[0].click()
    page.wait(lambda: "schema_version" in page.one("body").text, "open record")


def test_an_example_is_a_click_away(page):
    page.wait(lambda: [b for b in page.all("button") if b.text == "An astronaut"], "example")[
        0
    ].click()
    assert page.one("#m2-stage .m2-photo").get_attribute("alt") == "The picture astronaut.jpg"
    reasons(page)


def test_a_picture_from_the_camera(page):
    page.one("#m2-drop button[aria-label='Capture from camera']").click()
    page.one("#m2-drop .icon-wrap").click()  # allows it
    moving = "return document.querySelector('#m2-drop video').readyState > 2"
    page.wait(lambda: page.run(moving), "moving picture")
    page.one("#m2-drop button[aria-label='capture photo']").click()
    assert page.text("#m2-verdict h2") == "No verdict"  # the test device shows no face
    assert "No face was found" in page.text("#m2-verdict .m2-card")


def test_a_pasted_picture(page):
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    page.driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        const canvas = new OffscreenCanvas(500, 900);
        canvas.getContext('2d').fillRect(0, 0, 100, 100);
        canvas.convertToBlob({type: 'image/png'}).then((blob) =>
          navigator.clipboard.write([new ClipboardItem({'image/png': blob})])).then(done, done);
        """
    )
    page.one("#m2-drop button[aria-label='Paste from clipboard']").click()
    assert "No face was found" in page.text("#m2-verdict .m2-card")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scene = Scene(320, 240, face=110, seconds=2.0)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return scene.record(path, 30, face=lambda number: number < 20)


def test_a_video_gets_a_timeline_and_its_worst_frames(page, clip):
    page.tab("Video")
    page.drop(clip, place="#m2-video")
    page.one(".m2-timeline svg")
    assert len(page.all(".m2-timeline .m2-dot")) == 4
    assert len(page.all(".m2-timeline .m2-gap")) == 2
    assert len(page.all(".m2-worst img")) == 3
    shown = [heading.text for heading in page.all("h2") if heading.is_displayed()]
    assert shown[0] in HEADLINES.values()


def test_several_files_give_a_table_and_downloads(page, clip, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    page.tab("Several files")
    page.drop(ASTRONAUT, clip, bad, place="#m2-files")
    links = page.wait(lambda: page.all("a.m2-link"), "downloads")
    rows = [row.text for row in page.all("#m2-table tbody tr")]
    assert [row.split()[0] for row in rows] == ["astronaut.jpg", "clip.mp4", "bad.png"]
    content = base64.b64decode(links[0].get_attribute("href").partition("base64,")[2])
    records = [json.loads(line) for line in content.splitlines()]
    assert [record["path"] for record in records] == ["astronaut.jpg", "clip.mp4", "bad.png"]
    assert links[1].get_attribute("download") == "verdicts.csv"


def test_the_limits_are_one_click_away(page):
    page.tab("The model and its limits")
    assert "not proof" in page.text(".m2-model")
    assert "sha256:" in page.text(".m2-model") or "None" in page.text(".m2-model")


def test_every_control_has_a_name(page):
    page.drop(ASTRONAUT)
    reasons(page)
    nameless = []
    for element in page.all("button:not([tabindex='-1']), input, textarea, a, img, svg[role=img]"):
        if not element.is_displayed() or element.get_attribute("aria-hidden") == "true":
            continue
        decorative = element.tag_name == "img" and element.get_attribute("alt") == ""
        if not decorative and not element.accessible_name:
            nameless.append(element.get_attribute("outerHTML")[:120])
    assert nameless == []


def contrast(page: Browser, selector: str) -> float:
    """Between the text of an element and the page or card behind it (WCAG)."""
    colors = page.run(
        """
        const found = document.querySelector(arguments[0]);
        let behind = found;
        const clear = /rgba\\(0, 0, 0, 0\\)|transparent/;
        while (behind && clear.test(getComputedStyle(behind).backgroundColor))
          behind = behind.parentElement;
        const paint = (color) => {
          const pen = new OffscreenCanvas(1, 1).getContext('2d');
          pen.fillStyle = color; pen.fillRect(0, 0, 1, 1);
          return [...pen.getImageData(0, 0, 1, 1).data];
        };
        return [paint(getComputedStyle(found).color),
                paint(behind ? getComputedStyle(behind).backgroundColor : 'white')];
        """,
        selector,
    )
    lights = []
    front, back = (np.array(color, dtype=float) for color in colors)
    front = front[:3] * front[3] / 255 + back[:3] * (1 - front[3] / 255)
    for color in (front, back[:3]):
        unit = color / 255
        linear = np.where(unit <= 0.03928, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_can_be_read_in_light_and_dark(page, url, theme):
    page.open(f"{url}/?__theme={theme}")
    page.drop(ASTRONAUT)
    reasons(page)
    dark = page.run("return document.body.classList.contains('dark')")
    assert dark == (theme == "dark")
    for selector in ("#m2-verdict h2", "#m2-verdict p", "#m2-verdict .m2-small", ".m2-answers dd"):
        assert contrast(page, selector) >= 4.5, selector


def test_a_phone_needs_no_sideways_scrolling(page, url, clip):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open(url)
        page.drop(ASTRONAUT)
        reasons(page)
        assert page.run("return document.documentElement.scrollWidth") <= 360
        photo = page.one("#m2-stage .m2-photo").rect
        assert photo["x"] >= 0
        assert photo["x"] + photo["width"] <= 360
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_went_wrong_in_the_console(page):
    page.drop(ASTRONAUT)
    reasons(page)
    worrying: list[Any] = [
        entry["message"]
        for entry in page.driver.get_log("browser")
        # The framework also cancels what never ran, and says so.
        if entry["level"] == "SEVERE" and not re.search("_api/(cancel|reset)", entry["message"])
    ]
    assert worrying == []
    assert page.all(".toast-body.error") == []
