"""``m2f2 detect`` from the outside, with a real tiny detector."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m2f2cli.cli import app
from m2f2cli.inference.recordfile import Job
from m2f2cli.records import Detection
from tests.conftest import write_detector
from tests.inference.conftest import noise_picture

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_detector_folder: Path) -> Path:
    """A working folder with three crops, and the tiny detector as the model of every call."""
    for seed in range(3):
        noise_picture(tmp_path / "in" / f"{seed}.png", seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("M2F2_MODEL", str(tiny_detector_folder))
    monkeypatch.setenv("M2F2_FACES", "none")
    return tmp_path


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def test_the_table_is_for_people_and_the_rest_goes_to_stderr(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["detect", "in"]) == 0
    captured = capsys.readouterr()
    rows = captured.out.splitlines()
    assert rows[0].split() == ["File", "Verdict", "Fake", "probability", "Why"]
    assert [row.split()[0] for row in rows[1:]] == ["in/0.png", "in/1.png", "in/2.png"]
    assert captured.err.startswith("3 judged: ")
    assert "not proof" in captured.err
    assert app.run(["detect", "in", "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert quiet.out == captured.out


def test_the_kind_of_forgery_is_in_table_record_and_csv(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_detector(
        here / "kinds", kinds=["swapped or edited", "generated"], kind_margin=0.0, threshold=0.0
    )
    command = ["detect", "in", "--model", str(model)]
    assert app.run([*command, "--output", "out.jsonl"]) == 0
    named = {row["path"]: row["forgery"] for row in lines("out.jsonl")}
    assert set(named.values()) <= {"swapped or edited", "generated"}
    assert [row["faces"][0]["forgery"] for row in lines("out.jsonl")] == list(named.values())
    capsys.readouterr()
    assert app.run(command) == 0
    captured = capsys.readouterr()
    for row, (path, kind) in zip(captured.out.splitlines()[1:], named.items(), strict=True):
        assert row.split()[:2] == [path, "fake"]
        assert f" {kind}; taken whole" in row
    assert captured.err.startswith("3 judged: 3 fake (")
    assert app.run([*command, "--output", "out.csv"]) == 0
    with open("out.csv", newline="", encoding="utf-8") as file:
        assert {row["path"]: row["forgery"] for row in csv.DictReader(file)} == named


def test_a_record_is_printed_before_the_next_item_is_judged(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a table and as JSON lines, and as ``--output`` would write it."""
    seen: list[str] = []
    run = Job.run

    def watched(job: Any, **how: Any) -> Any:
        for record in run(job, **how):
            seen.append(capsys.readouterr().out)
            yield record
        seen.append(capsys.readouterr().out)

    assert app.run(["detect", "in", "--output", "out.jsonl"]) == 0
    monkeypatch.setattr(Job, "run", watched)
    assert app.run(["detect", "in"]) == 0
    assert [text.count(".png") for text in seen] == [0, 1, 1, 1]
    del seen[:]
    assert app.run(["detect", "in", "--jsonl"]) == 0
    assert "".join(seen).encode() == Path("out.jsonl").read_bytes()
    assert [text.count("\n") for text in seen] == [0, 1, 1, 1]
    assert app.run(["detect", "in", "--jsonl", "--json"]) == 2


def test_what_was_recorded_before_is_said_not_to_be_drawn(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["detect", "in", "--output", "out.jsonl"]
    assert app.run(command) == 0
    assert "not drawn" not in capsys.readouterr().err
    assert app.run([*command, "--annotate", "drawn"]) == 0
    assert "What was recorded earlier was not drawn: --overwrite" in capsys.readouterr().err
    assert app.run([*command, "--annotate", "drawn", "--overwrite"]) == 0
    assert "not drawn" not in capsys.readouterr().err


def test_json_is_one_object(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["detect", "in", "nowhere.jpg", "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"items", "summary"}
    assert [item["status"] for item in result["items"]] == ["ok", "ok", "ok", "missing"]
    assert result["summary"]["failed"] == 1
    for item in result["items"]:
        assert Detection.from_dict(item).to_dict() == item
        assert item["model_fingerprint"].startswith("sha256:")


def test_records_are_appended_and_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["detect", "in/0.png", "--output", "out.jsonl"]) == 0
    assert app.run(["detect", "in", "--output", "out.jsonl"]) == 0
    assert [row["path"] for row in lines("out.jsonl")] == ["in/0.png", "in/1.png", "in/2.png"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 of them recorded earlier" in captured.err
    before = Path("out.jsonl").read_bytes()
    assert app.run(["detect", "in", "--output", "out.jsonl"]) == 0
    assert app.run(["detect", "in", "--output", "out.jsonl", "--threshold", "0.9"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == before
    again = ["detect", "in", "--output", "out.jsonl", "--threshold", "0.9", "--overwrite"]
    assert app.run(again) == 0
    assert [row["threshold"] for row in lines("out.jsonl")] == [0.9] * 3


def test_a_table_file_is_whole_or_absent(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["detect", "in", "nowhere.jpg", "--output", "out.csv"]) == 3
    with open("out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "missing"]
    assert all(row["sha256"] for row in rows[:3])
    assert app.run(["detect", "in", "--output", "out.csv"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert app.run(["detect", "in/0.png", "--output", "out.csv", "--overwrite"]) == 0
    assert len(Path("out.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--threshold", "0", "--fail-on", "fake"], 4),
        (["--threshold", "1", "--fail-on", "fake"], 0),
        (["--threshold", "1", "--uncertain", "0:1", "--fail-on", "fake"], 0),
        (["--threshold", "1", "--uncertain", "0:1", "--fail-on", "uncertain"], 4),
        (["--threshold", "0", "--fail-on", "uncertain"], 4),
        (["nowhere.jpg", "--threshold", "1"], 3),
        (["nowhere.jpg", "--threshold", "1", "--fail-on", "error"], 4),
        (["nowhere.jpg", "--threshold", "1", "--fail-on", "fake"], 3),
        (["nowhere.jpg", "--threshold", "0", "--fail-on", "fake", "--fail-on", "error"], 4),
    ],
)
def test_exit_codes(here: Path, arguments: list[str], code: int) -> None:
    assert app.run(["detect", "in", *arguments]) == code


def test_a_gate_counts_what_an_earlier_run_recorded(here: Path) -> None:
    command = ["detect", "in", "--threshold", "0", "--output", "out.jsonl"]
    assert app.run(command) == 0
    assert app.run([*command, "--fail-on", "fake"]) == 4


def header_only_png(path: Path, side: int) -> None:
    """A PNG that announces side x side pixels and holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b""))


@contextmanager
def as_nobody(*paths: Path) -> Iterator[None]:
    """Drop the superuser's right to read everything, where we have it."""
    if os.geteuid() != 0:
        yield
        return
    for path in paths:
        for folder in (path, *path.parents):
            if folder.stat().st_mode & 0o055 != 0o055:
                folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_every_kind_of_bad_input_is_one_record_with_its_reason(
    here: Path, tiny_detector_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise_picture(here / "bad" / "whole.jpg", 1, (300, 300))
    whole = (here / "bad" / "whole.jpg").read_bytes()
    (here / "bad" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (here / "bad" / "text.jpg").write_text("I am no picture.\n" * 9)
    (here / "bad" / "empty.jpg").write_bytes(b"")
    header_only_png(here / "bad" / "huge.png", 20_000)
    shutil.copy(here / "bad" / "whole.jpg", here / "bad" / "locked.jpg")
    (here / "bad" / "locked.jpg").chmod(0)
    with as_nobody(here / "bad", tiny_detector_folder):
        assert app.run(["detect", "bad", "nowhere.jpg", "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert {Path(item["path"]).name: item["status"] for item in result["items"]} == {
        "cut.jpg": "truncated",
        "empty.jpg": "empty",
        "huge.png": "too_large",
        "locked.jpg": "unreadable",
        "nowhere.jpg": "missing",
        "text.jpg": "not_an_image",
        "whole.jpg": "ok",
    }
    for item in result["items"]:
        assert (item["message"] is None) == (item["status"] == "ok")


def test_no_face_is_a_record(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise_picture(here / "wall.png", 2, (640, 480))
    assert app.run(["detect", "wall.png", "--faces", "auto"]) == 3
    captured = capsys.readouterr()
    assert "no_face: No face was found" in captured.out
    assert "0 judged" in captured.err
    assert "not proof" not in captured.err


def test_a_folder_without_pictures_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("x")
    assert app.run(["detect", "texts", "--output", "out.jsonl"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: The folder 'texts' holds no picture or video.\nhint: ")
    assert not Path("out.jsonl").exists()


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_whole_records_and_a_sentence(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["detect", "in", "--output", "whole.jsonl"]) == 0
    whole = Path("whole.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    capsys.readouterr()
    with disk_full_after(first + 40):
        assert app.run(["detect", "in", "--output", "out.jsonl"]) == 1
    assert "error: Cannot write 'out.jsonl'" in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == whole[:first]
    assert app.run(["detect", "in", "--output", "out.jsonl"]) == 0
    assert Path("out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("flags", [["--output", "out.csv"], ["--heatmap", "out"]])
def test_a_full_disk_leaves_no_half_written_file(
    here: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with disk_full_after(100):
        assert app.run(["detect", "in", *flags]) == 1
    assert "error: Cannot write" in capsys.readouterr().err
    assert [path for path in here.rglob("*out*") if path.is_file()] == []
    assert list(here.rglob("*.partial")) == []


@pytest.mark.slow
def test_sigkill_and_resume_give_each_item_once(here: Path) -> None:
    for seed in range(50):
        noise_picture(here / "many" / f"{seed:03}.png", seed)
    command = ["detect", "many", "--batch-size", "1", "--output"]
    assert app.run([*command, "expected.jsonl"]) == 0
    killed = subprocess.Popen(
        [sys.executable, "-m", "m2f2cli", *command, "out.jsonl"], stderr=subprocess.DEVNULL
    )
    out = here / "out.jsonl"
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert 5 <= out.read_bytes().count(b"\n") < 50
    assert app.run([*command, "out.jsonl"]) == 0
    assert out.read_bytes() == (here / "expected.jsonl").read_bytes()


def test_pictures_for_people_mirror_folders_and_leave_the_inputs_alone(here: Path) -> None:
    shutil.copy(EXAMPLES / "astronaut.jpg", here / "in" / "0.jpg")
    (here / "in" / "sub").mkdir()
    shutil.copy(EXAMPLES / "astronaut.jpg", here / "in" / "sub" / "0.jpg")
    before = {path: path.read_bytes() for path in (here / "in").rglob("*") if path.is_file()}
    command = ["detect", "in", "-r", "--faces", "auto", "--heatmap", "out", "--annotate", "out"]
    assert app.run([*command, "--output", "out.jsonl"]) == 0
    drawn = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.jpg"))
    rows = lines("out.jsonl")
    hashes = [hashlib.sha256(Path(row["path"]).read_bytes()).hexdigest()[:12] for row in rows]
    files = ["0.jpg", "0.png", "1.png", "2.png", "sub/0.jpg"]
    names = [f"{file}.{digest}" for file, digest in zip(files, hashes, strict=True)]
    assert drawn == [f"{n}.{kind}.jpg" for n in names for kind in ("annotated", "heatmap")]
    assert [row["heatmap"] for row in rows] == [f"out/{n}.heatmap.jpg" for n in names]
    assert [row["annotated"] for row in rows] == [f"out/{n}.annotated.jpg" for n in names]
    for path, content in before.items():
        assert path.read_bytes() == content
    with Image.open(rows[0]["heatmap"]) as heat, Image.open("in/0.jpg") as photo:
        assert heat.size == photo.size
        x0, y0, x1, y1 = rows[0]["crop"]
        inside = photo.convert("RGB").crop((x0, y0, x1, y1)).tobytes()
        assert heat.crop((x0, y0, x1, y1)).tobytes() != inside


def test_a_drawing_never_replaces_an_input(here: Path) -> None:
    digest = hashlib.sha256((here / "in" / "1.png").read_bytes()).hexdigest()[:12]
    other = here / "in" / f"1.png.{digest}.annotated.jpg"
    shutil.copy(here / "in" / "0.png", other)
    before = other.read_bytes()
    assert app.run(["detect", "in", "--annotate", "in", "--output", "out.jsonl"]) == 0
    assert other.read_bytes() == before
    named = {row["path"]: row["annotated"] for row in lines("out.jsonl")}
    assert named["in/1.png"] == f"in/1.png.{digest}.annotated-2.jpg"


def test_what_is_named_twice_is_judged_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["detect", "in/0.png", "in", "./in/0.png", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 3


def test_a_missing_model_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["detect", "in", "--model", "./nowhere", "--output", "out.jsonl"]) == 1
    assert "error: There is no checkpoint at './nowhere'" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_bad_entries_are_records_and_the_rest_is_judged(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink("self.jpg", here / "in" / "self.jpg")
    (here / "in" / "notes.txt").write_text("x")
    paths = ["in", "in/photo[1].jpg", "https://a.org/b.jpg"]
    assert app.run(["detect", *paths, "--json"]) == 3
    captured = capsys.readouterr()
    items = {item["path"]: item for item in json.loads(captured.out)["items"]}
    assert [item["status"] for item in items.values()] == ["ok"] * 3 + ["unreadable"] + [
        "missing"
    ] * 2
    assert "download it first" in items["https://a.org/b.jpg"]["message"]
    assert "Too many levels" in items["in/self.jpg"]["message"]
    assert captured.err.startswith("Left out: 1 file of other kinds in the folders (.txt).\n")
    app.run(["detect", *paths, "--output", "out.jsonl"])
    assert capsys.readouterr().err.startswith(
        "Left out: 1 file of other kinds in the folders (.txt).\n3 judged"
    )


@pytest.mark.parametrize("output", ["out.jsonl", "out.csv"])
def test_a_device_or_pipe_as_output_is_refused_at_once(
    here: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    os.mkfifo(output)
    assert app.run(["detect", "in", "--output", output, "--overwrite"]) == 2
    assert "is not a regular file" in capsys.readouterr().err
