"""``m2f2 prepare`` as a user types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m2f2cli.cli.app import run
from tests.data.prepare.test_ddvqa import root as ddvqa_root  # noqa: F401 - a fixture
from tests.data.prepare.videos import PHOTO, Scene


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "clips"
    scene = Scene(200, 160, face=64, seconds=2)
    scene.record(folder / "a.mp4", 12, face=lambda number: number < 6)
    scene.record(folder / "empty.mp4", 4, face=lambda number: False)
    return folder


def faces(*arguments):
    return run(["prepare", "faces", *map(str, arguments), "--workers", "1"])


def test_faces_prints_what_lacks_and_totals(clips, tmp_path, capsys):
    assert faces(clips, "--output", tmp_path, "--size", 32) == 3
    printed = capsys.readouterr().out
    assert "no_face: No face was found in 4 frames." in printed
    assert "frames without face" in printed
    assert faces(clips, "--output", tmp_path, "--size", 32, "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert [(i["key"], i["status"], i["earlier"]) for i in report["items"]] == [
        ("a.mp4", "ok", True),
        ("empty.mp4", "no_face", False),
    ]
    assert report["files"]["clips.h5"] == {
        "videos": 2,
        "earlier": 1,
        "failed": 1,
        "crops": 6,
        "frames_looked_at": 16,
        "frames_without_face": 10,
        "interpolated": 0,
    }


def test_faces_of_a_whole_folder_exit_with_0(tmp_path, capsys):
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    assert faces(tmp_path / "photo.jpg", "--output", tmp_path / "out") == 0
    assert (tmp_path / "out" / "photo.h5").is_file()
    captured = capsys.readouterr()
    assert "photo.h5" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "nothing to prepare"),
        (("nowhere.mp4",), 1, "no file or folder 'nowhere.mp4'"),
        ((PHOTO, "--margin", "9"), 2, "--margin must be at most 4"),
        ((PHOTO, "--size", "1"), 2, "--size must be at least 16"),
        ((PHOTO, "--boxes-from", "nowhere.h5"), 1, "no file 'nowhere.h5'"),
        ((PHOTO, "--output", "/dev/null/x"), 1, "Cannot write '/dev/null/x'"),
    ],
)
def test_faces_used_wrongly(tmp_path, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    assert faces("--output", "out", *arguments) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.h5"))


def test_ddvqa_prints_counts_and_files(ddvqa_root, tmp_path, capsys):  # noqa: F811
    arguments = ["prepare", "ddvqa", str(ddvqa_root), "--output", str(tmp_path / "out")]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "FaceShifter" in printed
    assert re.search(r"train_judge_only_c40\.json +7 rows", printed)
    assert run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"]["test_c40.jsonl"] == 7
    assert {"part": "train", "kind": "FaceShifter"}.items() <= report["counts"][2].items()
    assert run([*arguments, "--seed", "5"]) == 2
    assert "is there already and differs" in capsys.readouterr().err
    assert run(["prepare", "ddvqa", str(tmp_path), "--output", str(tmp_path / "b")]) == 1
    assert "no annotation files" in capsys.readouterr().err


def test_prepare_imports_no_torch(ddvqa_root, tmp_path):  # noqa: F811
    code = (
        "import sys\n"
        "from m2f2cli.cli.app import run\n"
        "ddvqa, photo, out = sys.argv[1:]\n"
        "assert run(['prepare', 'ddvqa', ddvqa, '--output', out]) == 0\n"
        "assert run(['prepare', 'faces', photo, '--output', out, '--workers', '1']) == 0\n"
        "assert not {'torch', 'transformers', 'timm'} & set(sys.modules), 'heavy'\n"
    )
    arguments = [str(ddvqa_root), str(PHOTO), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    assert Path(tmp_path / "out" / "astronaut.h5").is_file()
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]
