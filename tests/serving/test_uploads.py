"""What visitors send is private, short-lived, and all that is ever read for them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2f2cli.errors import InputError, M2F2Error
from m2f2cli.serving import gate as module
from m2f2cli.serving.gate import Uploads


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    (tmp_path / "private").mkdir()
    return Uploads(tmp_path / "private")


def test_a_file_is_there_once(uploads):
    path = uploads.store("photo.jpg", io.BytesIO(b"bytes"))
    with uploads.taken({"path": path, "orig_name": "My photo.jpg"}) as (file, name):
        assert Path(file).read_bytes() == b"bytes"
        assert name == "My photo.jpg"
    assert not Path(path).exists()
    with pytest.raises(InputError, match="no such upload"), uploads.taken({"path": path}):
        pass


def test_it_is_deleted_even_when_the_answer_fails(uploads):
    path = uploads.store("a.png", io.BytesIO(b"x"))
    with pytest.raises(ZeroDivisionError), uploads.taken({"path": path}):
        raise ZeroDivisionError
    assert not Path(path).exists()


def test_equal_files_of_two_visitors_are_two_files(uploads):
    first, second = (uploads.store("a.png", io.BytesIO(b"same")) for _ in range(2))
    with uploads.taken({"path": first}):
        pass
    assert Path(second).exists()


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", ".bashrc", "a\0b", "a\nb", "", "..", "x" * 300]
)
def test_no_name_leads_out(uploads, name):
    path = Path(uploads.store(name, io.BytesIO(b"")))
    assert path.parent.parent == uploads.folder / "sent"
    assert path.name.isprintable()
    assert len(path.name) <= 100


def test_nothing_else_is_held(uploads, tmp_path):
    (tmp_path / "secret").write_text("s")
    inside = Path(uploads.store("a.png", io.BytesIO(b"")))
    os.symlink(tmp_path / "secret", inside.parent / "link")
    for path in (
        "/etc/passwd",
        str(tmp_path / "secret"),
        str(inside.parent / "link"),
        f"{inside.parent}/../../../secret",
        "http://127.0.0.1/",
        "a.png",
        "",
        str(uploads.folder),
        str(inside) + "\0",
        None,
        7,
        [str(inside)],
    ):
        assert not uploads.holds(path), path
    assert uploads.holds(str(inside))


@pytest.mark.parametrize("sent", [None, {}, "text", {"path": None}, {"path": "/etc/passwd"}, []])
def test_only_uploads_are_taken(uploads, sent):
    with pytest.raises(InputError), uploads.taken(sent):
        pass


def test_the_pages_own_files_are_shown_but_not_taken(uploads):
    own = uploads.folder / "icon.jpg"
    own.write_bytes(b"x")
    assert uploads.shows(str(own))
    assert not uploads.holds(str(own))


def test_forgotten_files_are_swept(uploads):
    old = Path(uploads.store("old.png", io.BytesIO(b"x")))
    os.utime(old.parent, (0, time.time() - module.MAX_AGE - 1))
    new = Path(uploads.store("new.png", io.BytesIO(b"x")))
    assert not old.exists()
    assert new.exists()


def test_the_disk_is_not_filled(uploads, monkeypatch):
    monkeypatch.setattr(module, "MAX_STORED", 10)
    uploads.store("a", io.BytesIO(b"x" * 11))
    with pytest.raises(M2F2Error, match="Too many files"):
        uploads.store("b", io.BytesIO(b"x"))


def test_a_killed_page_leaves_nothing_behind_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = tmp_path / f"m2f2-demo-{process.pid}-abcdefgh"
    (left / "sent" / "x").mkdir(parents=True)
    (left / "sent" / "x" / "a.png").write_bytes(b"x")
    running, foreign = tmp_path / f"m2f2-demo-{os.getppid()}-abcdefgh", tmp_path / "m2f2-demo-1"
    for folder in (running, foreign):
        folder.mkdir()
    own = Uploads()
    assert not left.exists()
    assert running.exists()
    assert foreign.exists()
    assert f"-{os.getpid()}-" in own.folder.name
    assert own.folder.stat().st_mode & 0o077 == 0


def test_all_is_gone_at_the_end(uploads):
    uploads.store("a", io.BytesIO(b"x"))
    uploads.close()
    assert not uploads.folder.exists()
