from __future__ import annotations

import json
import os
import pty

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f2cli.cli.output import Output, printable


@given(st.text())
def test_printable_text_is_printable_and_one_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


def test_results_and_the_rest_go_to_their_streams(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.text("result")
    output.json({"ü": 1})
    output.note("note")
    output.warning("careful")
    output.error("bad", "do this")
    captured = capsys.readouterr()
    assert captured.out.startswith("result\n")
    assert json.loads(captured.out.removeprefix("result\n")) == {"ü": 1}
    assert captured.err == "note\nwarning: careful\nerror: bad\nhint: do this\n"


def test_quiet_drops_notes_and_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(quiet=True)
    output.note("note")
    output.warning("careful")
    with output.progress("Judging", 3) as advance:
        advance()
    assert capsys.readouterr().err == "warning: careful\n"


def test_a_table_is_whole_and_plain_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    long = "folder/" + "x" * 150 + "[bold].jpg"
    Output().table(("File", "Score>"), [(long, 0.5), ("\x1b[31m", 10.25)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["File", "Score"]
    assert lines[1].split() == [long, "0.5"]
    assert lines[2].split() == ["\\x1b[31m", "10.25"]
    assert all("\x1b" not in line for line in lines)


def test_progress_shows_only_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Output().progress("Judging", 2) as advance:
        advance(note="a.jpg")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with Output().progress("Judging", 2) as advance:
            advance(2, note="a.jpg")
        terminal.flush()
        assert b"Judging" in os.read(leader, 65536)
    os.close(leader)
