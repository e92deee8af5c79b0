from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from m2f2cli.evaluation import page as plots
from m2f2cli.evaluation.page import render_page
from m2f2cli.evaluation.protocols import Figure
from m2f2cli.evaluation.report import build_report, find_mistakes
from m2f2cli.evaluation.truth import Item
from tests.evaluation.reports import (
    as_set,
    explanation_set,
    judgement_set,
    picture,
    scores_set,
    some_measures,
)

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Checker(HTMLParser):
    """Notes tags, attributes and text, and refuses tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "

    def values(self, tag: str, name: str) -> list[str]:
        return [v or "" for t, n, v in self.attributes if (t, n) == (tag, name)]


def read(scored, **measures) -> Checker:
    page = render_page(build_report(scored, some_measures(**measures)), scored)
    assert "http://" not in page.replace("http-equiv", "")
    assert "https://" not in page
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    for image in checker.values("img", "src"):
        assert image.startswith("data:image/")
    assert all(checker.values("img", "alt"))
    assert len(checker.values("img", "alt")) == len(checker.values("img", "src"))
    assert not checker.values("script", "src")
    assert not checker.values("link", "href")
    checker.text = " ".join(checker.text.split())
    return checker


def test_a_page_of_scores_has_all_plots_and_figures():
    checker = read(scores_set())
    assert [alt.split()[0] for alt in checker.values("img", "alt")] == [
        "Bars:", "ROC", "Histogram", "Reliability:", "Risk",
    ]  # fmt: skip
    for words in ("frame_auc 0.8750 0.8000 – 0.9300", "video_auc – no videos", "Deepfakes 0.9000"):
        assert words in checker.text
    assert "95 % interval" in checker.text
    assert "A note with <brackets>." in checker.text
    assert checker.values("html", "lang") == ["en"]
    assert "width=device-width, initial-scale=1" in checker.values("meta", "content")


def test_the_curve_of_risk_shows_where_the_stored_rule_stands():
    point = {"coverage": Figure(0.8, 0.7, 0.9), "risk": Figure(0.05, 0.0, 0.125)}
    stands = "it decides 80.0% (70.0% to 90.0%), and 5.0% (0.0% to 12.5%) of that wrongly"
    assert stands in read(scores_set(), **point).text
    bare = {name: Figure(figure.value) for name, figure in point.items()}
    assert "it decides 80.0%, and 5.0% of that wrongly" in read(scores_set(), **bare).text
    nothing = {**point, "risk": Figure(None, note="nothing was decided")}
    for figures in ({}, nothing):
        text = read(scores_set(), **figures).text
        assert "Risk and coverage" in text
        assert "stored rule" not in text


@pytest.mark.parametrize(("label", "word"), [(0, "forged"), (1, "real")])
def test_one_class_is_said_instead_of_a_curve(label, word):
    kept = [item for item in scores_set().items if item.label == label]
    checker = read(as_set(kept, task="scores"))
    assert f"There is no ROC curve: there are no {word} pictures with a score." in checker.text
    assert not any("ROC" in alt for alt in checker.values("img", "alt"))


@pytest.mark.parametrize("make", [judgement_set, explanation_set])
def test_texts_have_no_score_plots_and_say_so(make):
    checker = read(make())
    assert "these predictions carry no probabilities" in checker.text
    assert not any("ROC" in alt for alt in checker.values("img", "alt"))


def test_a_page_of_texts_lists_wrong_unread_and_missing_answers():
    text = read(judgement_set()).text
    wrong = text.split("Wrong and unread answers")[1]
    assert "3 of 4 items." in wrong
    for words in (
        "5_003.jpg truth: real called fake It is <b>fake</b>.",
        "0_1_2.jpg truth: forged (Deepfakes) the answer says neither real nor fake I cannot tell.",
        "1_1_2.jpg truth: forged (Face2Face) no answer",
    ):
        assert words in wrong
    assert "Questions without an answer 1 of 2 items. k_1" in read(explanation_set()).text


def test_mistakes_come_most_confident_first_with_small_pictures(tmp_path):
    wide = picture(tmp_path / "wide.png")
    items = [
        Item("a", 0, "real", "a", fake_probability=0.7, file=wide),
        Item("b", 1, "FaceSwap", "b", fake_probability=0.01, file=tmp_path / "gone.png"),
        Item("c", 1, "FaceSwap", "c", fake_probability=0.9, file=wide),
        Item("d", 1, "FaceSwap", "d", fake_probability=0.45, in_domain=False),
        Item("e", 1, "FaceSwap", "e", status="truncated"),
    ]
    scored = as_set(items, task="scores", threshold=0.6)
    assert [m.item.name for m in find_mistakes(scored)] == ["b", "a", "d", "e"]
    checker = read(scored)
    text = checker.text.split("Most confident mistakes")[1]
    assert "4 of 5 items at the threshold 0.6." in text
    assert "No picture: missing b truth: forged (FaceSwap) fake probability 0.010" in text
    assert "unlike the training pictures" in text
    assert "not judged: truncated" in text
    small = [v for v in checker.values("img", "src") if v.startswith("data:image/jpeg")]
    assert len(small) == 1
    shown = Image.open(io.BytesIO(base64.b64decode(small[0].partition(",")[2])))
    assert shown.size == (160, 160)


def test_a_full_page_shows_two_dozen_and_says_of_how_many():
    scored = scores_set(400, shift=-0.5)
    assert re.search(
        r"\d{3} of 400 items at the threshold 0.5, the first 24 of them\.", read(scored).text
    )


def test_no_mistakes_are_said():
    assert "There are none at the threshold 0.5" in read(scores_set(8, shift=5.0)).text


def test_strings_from_files_stay_strings():
    evil = '<script>alert(1)</script>"><img src=x onerror=y>\u202e\x07'
    item = Item(evil, 0, "real", evil, answer=evil, verdict="fake", fake_probability=0.9)
    fake = Item("b", 1, evil, "b", fake_probability=0.1)
    scored = replace(scores_set(), items=(item, fake), notes=(evil,), model=evil, missing=(evil,))
    measures = some_measures()
    measures = replace(measures, per_kind={evil: measures.per_kind["Deepfakes"]})
    page = render_page(build_report(scored, measures), scored)
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "\u202e" not in page
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert not checker.values("img", "onerror")


def test_plots_are_files_a_viewer_reads_and_repeat_themselves():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 50), rng.random(50)
    first, second, third = (plots.roc(labels, scores, 0.5) for _ in range(3))
    assert Image.open(io.BytesIO(plots.drawn(first, "png"))).width > 300
    assert plots.drawn(second) == plots.drawn(third)
    assert plots.drawn(second).startswith(b"<?xml")


def test_a_name_is_no_mathematics():
    row = {"auc": {"value": 0.5, "low": None, "high": None}}
    assert plots.drawn(plots.bars({"$\\frac$ _^{": row, "x" * 200: row}, ["auc"]))


def test_without_matplotlib_the_extra_is_named():
    code = (
        "import sys\nsys.modules['matplotlib'] = None\n"
        "from m2f2cli.errors import MissingExtraError\n"
        "try:\n    import m2f2cli.evaluation.page\n"
        "except MissingExtraError as error:\n    print(error.message, error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Drawing a report needs the package 'matplotlib'" in done.stdout
    assert "pip install 'm2f2cli[eval]'" in done.stdout
