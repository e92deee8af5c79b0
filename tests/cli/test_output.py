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


def test_a_log_gets_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Output().progress("Training", 500) as advance:
        advance(100, "")  # a resumed run
        for step in range(1, 121):
            now += 1.5
            advance(1, f"loss {1 / step:.3f}")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Training: 140/500, 0:09:00 left, loss 0.025",
        "Training: 180/500, 0:08:00 left, loss 0.013",
        "Training: 220/500, 0:07:00 left, loss 0.008",
    ]


def test_bursts_and_what_was_done_before_are_not_taken_for_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Output().progress("Judging", 1000) as advance:
        for _ in range(16):  # a batch leaves at once
            advance()
        for _ in range(30):
            now += 4
            for _ in range(16):
                advance()
    assert capsys.readouterr().err.splitlines() == [
        "Judging: 241/1000, 0:03:22 left",  # four a second
        "Judging: 481/1000, 0:02:14 left",
    ]


def test_a_row_is_there_at_once_and_its_name_cannot_drive_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for cells in (("File", "Score", "Why"), ("\x1b[31m", "0.5", ""), ("名前", "0.5", "a  b")):
        Output().row(cells, (8, -6))
        assert capsys.readouterr().out in (
            "File       Score  Why\n",
            "\\x1b[31m     0.5\n",
            "名前         0.5  a  b\n",
        )


def test_nobody_reading_notes_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as gone:
        monkeypatch.setattr("sys.stderr", gone)
        Output().note("note")
        Output().error("bad", "do this")


def test_a_log_of_bytes_or_of_no_known_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Output().progress("Merging", 14_000_000_000, in_bytes=True) as merged:
        merged(0)
        now += 60
        merged(3_500_000_000, "layers.0")
    with Output().progress("Verifying") as verified:
        verified()
        now += 61
        verified(note="layers.0")
    assert capsys.readouterr().err.splitlines() == [
        "Merging: 3.5 GB/14.0 GB, 0:03:00 left, layers.0",
        "Verifying: 2, layers.0",
    ]


def test_a_short_command_adds_nothing_to_a_log_and_draws_a_bar_on_a_terminal(
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
