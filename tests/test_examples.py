"""The examples do what their pages say; the command lines of those pages are run by test_docs."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from m2f2cli.cli import app
from tests.documents import ROOT, blocks

EXAMPLES = ROOT / "examples"
MODERATION = EXAMPLES / "moderation"


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two photos, in the current one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "uploads"
    folder.mkdir()
    for photo in EXAMPLES.glob("*.jpg"):
        shutil.copy(photo, folder)
    return folder


@pytest.fixture
def moderate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``moderate.py`` as a function of its arguments; its m2f2 runs in this process."""
    script = runpy.run_path(str(MODERATION / "moderate.py"))

    def run(command: list[str], check: bool) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "m2f2cli"]
        return SimpleNamespace(returncode=app.run(command[3:]))

    monkeypatch.setattr("subprocess.run", run)

    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["moderate.py", *arguments])
        return script["main"]()

    return call


@pytest.mark.slow
def test_moderation_lists_what_a_person_has_to_look_at_and_goes_on(uploads, moderate, capsys):
    (uploads / "bad.jpg").write_text("no picture")
    (uploads / "[x](http`.jpg").write_text("no picture either")
    assert moderate("uploads/") == 3
    out = capsys.readouterr().out
    assert out.startswith("# Nothing fake was found, but some files have no verdict.")
    assert "| uncertain | 2 |" in out
    assert "| without a verdict | 2 |" in out
    review = out[out.index("## Uncertain") : out.index("## Without")]
    assert review.index("grace_hopper.jpg") < review.index("astronaut.jpg")  # likeliest first
    assert "- `uploads/bad.jpg`: " in out
    assert "`uploads/?x?(http?.jpg`" in out

    (uploads / "bad.jpg").unlink()
    (uploads / "[x](http`.jpg").unlink()
    shutil.copy(uploads / "astronaut.jpg", uploads / "grace_hopper.jpg")
    assert moderate("uploads/", "--summary", "summary.md") == 0
    assert "2 uncertain (1 of them recorded earlier)" in capsys.readouterr().err
    again = Path("summary.md").read_text()
    assert again.startswith("# Nothing fake was found.")
    assert again.count("fake probability 0.214") == 2  # the changed picture was judged anew
    assert "bad.jpg" not in again


def test_moderation_says_when_nothing_was_judged(uploads, moderate, capsys):
    assert moderate("nowhere/", "--summary", "summary.md") == 3  # a record: there is no such file
    assert moderate("uploads/", "--model", "nowhere/") == 1
    assert "There is no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_the_workflow_stops_a_fake(uploads, tiny_detector_folder):
    workflow = yaml.safe_load((MODERATION / "workflow.yml").read_text())
    (job,) = workflow["jobs"].values()
    (step,) = (s["run"] for s in job["steps"] if s.get("name") == "Judge")
    folder = uploads.parent / ".github"
    folder.mkdir()
    shutil.copy(MODERATION / "moderate.py", folder)
    summary = uploads.parent / "summary.md"
    found = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(summary),
        "M2F2_MODEL": str(tiny_detector_folder),
        "M2F2_THRESHOLD": "0",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", step], env=found, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "::error::Fake pictures were found" in done.stdout
    assert "## Called fake" in summary.read_text()
    assert len(Path("verdicts.jsonl").read_text().splitlines()) == 2


def test_a_backbone_of_ones_own(capsys):
    from m2f2cli.models.backbone import Backbone

    script = runpy.run_path(str(EXAMPLES / "register_backbone.py"))
    script["main"]()
    difference = re.search(r"differ by at most (\S+)", capsys.readouterr().out)
    assert difference
    assert float(difference[1]) < 1e-5
    with_stages = Backbone("plain_cnn", {"width": 4}, stages=[-3, -1])
    assert with_stages.stage_channels == [8, 32]


KIT = """
import sys
from pathlib import Path

from m2f2cli import Detector, DetectorConfig
from m2f2cli.cli import app
from m2f2cli.data.samples import read_samples
from m2f2cli.models.conversation import template
from m2f2cli.training.objective import backbone_layers

detector = Detector(DetectorConfig(backbone="plain_cnn", image_size=32, bridge={
    "width": 16, "heads": 2, "size": 4, "clip_layers": [1, 2, 2]}))
assert max(backbone_layers(detector.backbone).values()) > 2
samples = read_samples("listed:data").samples
assert [(s.label, s.kind, s.identities) for s in samples] == [
    (0, "real", ("ada",)), (1, "fake", ("bob",))]
assert template("short").judge == "Is the face real or fake?"
sys.exit(app.run(["train-detector", "--recipe", "quick", "--print-config"]))
"""


@pytest.mark.slow
def test_the_package_on_the_extending_page_works(tmp_path):
    """Its blocks are written to files and installed; then every part is found by its name."""
    points = ""
    for block in blocks(ROOT / "docs" / "extending.md"):
        if block.title:
            (tmp_path / block.title).parent.mkdir(exist_ok=True)
            (tmp_path / block.title).write_text("\n".join(block.lines) + "\n")
        if block.language == "toml":
            toml = "\n".join(block.lines)
            points = re.sub(r'project\.entry-points\."(.+)"', r"\1", toml).replace('"', "")
    shutil.copy(EXAMPLES / "register_backbone.py", tmp_path)
    installed = tmp_path / "kit-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kit\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(points)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "list.csv").write_text("b.png,1,bob\na.png,0,ada\n")
    done = subprocess.run(
        [sys.executable, "-c", KIT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "epochs: 3\n" in done.stdout
    assert "model: lite\n" in done.stdout
