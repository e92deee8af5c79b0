"""The explainer that comes with the package: whole, small, sharing its detector, and talking."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.hub import resolve_checkpoint
from m2f2cli.checkpoints.inspect import inspect_checkpoint
from m2f2cli.checkpoints.io import open_weight_file
from m2f2cli.checkpoints.load import load_detector, load_explainer
from m2f2cli.cli import app

PHOTO = Path(__file__).parents[2] / "examples" / "astronaut.jpg"
MEGABYTE = 1_000_000


def test_it_is_whole_small_and_stores_nothing_twice():
    found = inspect_checkpoint("lite-explainer", verify=True)
    assert (found.kind, found.missing) == ("explainer", ())
    assert set(found.dtypes) == {"float16", "int64"}
    folder = resolve_checkpoint("lite-explainer")
    assert not any(
        k.startswith("detector.") for k in open_weight_file(folder / "model.safetensors").tensors
    )
    files = [path for path in folder.parent.glob("lite*/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 45 * MEGABYTE


def test_its_detector_is_the_bundled_one():
    explainer, _ = load_explainer("lite", device="cpu")
    detector = load_detector("lite", device="cpu")
    inside = explainer.detector.state_dict()
    assert all(bool((inside[key] == value).all()) for key, value in detector.state_dict().items())
    assert explainer.detector.config.threshold == detector.config.threshold
    assert explainer.detector.config.domain == detector.config.domain


def test_its_stages_are_told_without_a_path_of_some_machine():
    stage = io.read_stage(resolve_checkpoint("lite-explainer"))
    assert "/" not in json.dumps(stage).replace("docs/models/", "")


def test_explain_needs_no_model_and_says_which_it_took(capsys):
    assert app.run(["explain", str(PHOTO), "--json"]) == 0
    said = capsys.readouterr()
    assert "small bundled model" in said.err
    assert "--model" in said.err
    record = json.loads(said.out)["items"][0]
    assert app.run(["detect", str(PHOTO), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["items"][0]
    assert record["verdict"] == verdict["verdict"]
    assert record["fake_probability"] == pytest.approx(verdict["fake_probability"], abs=1e-3)
    (face,) = record["explanations"]
    assert face["judgement"] in ("real", "fake")
    reasons = face["reasons"]
    assert [r["region"] for r in reasons] == ["skin", "eyes", "eyebrows", "nose", "mouth", "face"]
    assert all(r["complete"] and r["text"] for r in reasons)
    for region in ("skin", "eyes", "eyebrows", "nose", "mouth"):
        text = next(r["text"].lower() for r in reasons if r["region"] == region)
        assert region in text or region.rstrip("s") in text
