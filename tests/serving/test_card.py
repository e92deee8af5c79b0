"""What the page says about its model before it is trusted."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from m2f2cli.inference.explain import load_pipeline
from m2f2cli.serving import drawing
from m2f2cli.serving.page import card_of
from tests.inference.conftest import MeanJudge

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("model", "page"), [("lite", "lite-detector"), ("lite-explainer", "lite-explainer")]
)
def test_the_bundled_models_limits_are_those_of_their_cards(model, page):
    own = (files("m2f2cli") / "assets" / model / "README.md").read_text(encoding="utf-8")
    card = (ROOT / "docs" / "models" / f"{page}.md").read_text(encoding="utf-8")
    paragraphs = [part for part in own.split("\n\n") if not part.startswith("#")]
    assert paragraphs
    for paragraph in paragraphs:
        assert paragraph.strip() in card


def test_a_folders_card_is_shown_without_its_header(tmp_path, tiny_detector_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_detector_folder, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Ours\n\nTrained on cats.")
    pipeline = load_pipeline(str(folder))
    card = card_of(pipeline)
    assert "# Ours\n\nTrained on cats." in card
    assert "license" not in card
    assert str(pipeline.settings.model_fingerprint) in card
    assert "Threshold 50 %" in card


def test_without_a_card_the_general_limits_stand_alone():
    assert drawing.OPINION in card_of(load_pipeline(MeanJudge()))
