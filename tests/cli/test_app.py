from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from m2f2cli import __version__
from m2f2cli.cli import app
from m2f2cli.errors import InputError, MissingExtraError, UsageError

TWO_COMMANDS = """
import typer
app = typer.Typer()
@app.command()
def one(x: str): "One."
@app.command()
def two(x: str): "Two."
app()
"""


def m2f2(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "m2f2cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def test_help_names_every_command_and_version_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--help"]) == 0
    help_text = capsys.readouterr().out
    for entry in app.COMMANDS:
        assert entry.name.split()[0] in help_text
    assert app.run([]) == 0
    assert "detect" in capsys.readouterr().out
    for flag in ("--version", "-V"):
        assert app.run([flag]) == 0
        assert capsys.readouterr().out == f"m2f2 {__version__}\n"


@pytest.mark.parametrize("group", app.GROUPS)
def test_a_group_alone_shows_its_commands(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([group]) == 0
    shown = capsys.readouterr()
    assert app.GROUPS[group] in shown.out
    assert not shown.err


@pytest.mark.parametrize("entry", app.COMMANDS, ids=lambda entry: entry.name)
def test_every_command_explains_itself_with_examples(
    entry: app.Entry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run([*entry.name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: m2f2 " + entry.name in text
    assert f"m2f2 {entry.name} " in text.split("Examples")[1]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom m2f2cli.cli.app import run\nrun(['--help'])\nrun(['detect', '--help'])\n"
        "heavy = {'torch', 'transformers', 'timm', 'numpy', 'PIL', 'dlib', 'av', 'yaml'}\n"
        "sys.exit(repr(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_help_takes_at_most_three_times_a_two_command_typer_app() -> None:
    def seconds(command: list[str]) -> float:
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        return time.perf_counter() - start

    ours, theirs = [], []
    for _ in range(5):
        ours.append(seconds([sys.executable, "-m", "m2f2cli", "--help"]))
        theirs.append(seconds([sys.executable, "-c", TWO_COMMANDS, "--help"]))
    assert min(ours) <= 3 * min(theirs)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            UsageError("Wrong flag.", "Use another."),
            2,
            ["error: Wrong flag.", "hint: Use another."],
        ),
        (InputError("No such picture."), 1, ["error: No such picture."]),
        (
            MissingExtraError("deepspeed", "train", "ZeRO training"),
            1,
            ["'deepspeed'", "hint: pip install 'm2f2cli[train]'"],
        ),
        (OSError(errno.ENOSPC, "No space left", "out.bin"), 1, ["disk is full", "'out.bin'"]),
        (OSError(errno.EACCES, "Permission denied", "x"), 1, ["error: 'x': Permission denied."]),
        (MemoryError(), 1, ["error: There is not enough memory."]),
        (RuntimeError("alloc_cpu.cpp: can't allocate memory: you tried"), 1, ["not enough memory"]),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
            1,
            ["error: There is no folder for temporary files.", "hint: Set TMPDIR"],
        ),
        (ZeroDivisionError("1/0"), 1, ["Unexpected ZeroDivisionError: 1/0", "M2F2_DEBUG=1"]),
        (KeyboardInterrupt(), 130, ["Interrupted"]),
        (typer.Exit(3), 3, []),
    ],
)
def test_every_failure_is_a_sentence_and_a_code(
    error: BaseException,
    code: int,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.run([], app=failing(error)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    for word in words:
        assert word in captured.err


def failing(error: BaseException) -> typer.Typer:
    broken = typer.Typer()

    @broken.command()
    def fail() -> None:
        raise error

    return broken


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M2F2_DEBUG", "1")
    assert app.run([], app=failing(InputError("No such picture."))) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["detcet"], ["detcet", "See 'm2f2 --help'"]),
        (["detect", "--treshold", "1"], ["--treshold", "See 'm2f2 detect --help'"]),
        (["detect", "--batch-size", "none"], ["--batch-size", "valid integer"]),
        (["detect", "--batch-size", "0"], ["--batch-size"]),
        (["detect"], ["nothing to judge"]),
        (["detect", "x.jpg", "--faces", "some"], ["'some'", "auto, all, largest, none"]),
        (["detect", "x.jpg", "--uncertain", "0.6:0.4"], ["LOW:HIGH"]),
        (["detect", "x.jpg", "--uncertain", "half"], ["LOW:HIGH", "'half'"]),
        (["detect", "x.jpg", "--set", "uncertain=[a, b]"], ["LOW:HIGH"]),
        (["detect", "x.jpg", "--threshold", "2"], ["threshold", "2"]),
        (["detect", "x.jpg", "--fail-on", "doubt"], ["doubt", "fake, uncertain, error"]),
        (["detect", "x.jpg", "--output", "x.txt"], [".jsonl or .csv"]),
        (["detect", "x.jpg", "--config", "none.yaml"], ["none.yaml"]),
        (["detect", "@none.txt"], ["list file 'none.txt'"]),
    ],
)
def test_wrong_usage_is_exit_2(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    for word in words:
        assert word in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "m2f2cli", "--help"]
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 1


def test_control_characters_of_a_name_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    app.run([], app=failing(InputError("Cannot read '\x1b[2Jevil\r.jpg'.")))
    captured = capsys.readouterr().err
    assert "\x1b" not in captured
    assert "\\x1b[2Jevil\\r.jpg" in captured


def test_an_interrupt_does_not_wait_for_pictures_that_are_being_decoded() -> None:
    code = (
        "import threading, time, warnings\n"
        "from m2f2cli.cli import app\n"
        "def interrupted(_):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    warnings.warn('a remark of a library')\n"
        "    return 130\n"
        "app.run = interrupted\n"
        "app.main()\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert time.monotonic() - began < 50


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
@pytest.mark.parametrize(
    ("command", "code", "out", "err"),
    [
        ("--version >&-", 1, "", "error: Standard output is closed, so the result"),
        ("detect --help >&-", 1, "", "error: Standard output is closed, so the result"),
        ("--version 2>&- <&-", 0, f"m2f2 {__version__}", ""),
        ("detect 2>&-", 2, "", ""),
        ("detect >&- 2>&-", 2, "", ""),
        ("detect - <&-", 0, "", "0 judged"),
    ],
)
def test_closed_streams(command: str, code: int, out: str, err: str, tmp_path: Path) -> None:
    whole = f"exec {sys.executable} -m m2f2cli {command}"
    done = subprocess.run(["sh", "-c", whole], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (code, out)
    assert done.stderr.startswith(err)
    assert "Unexpected" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
def test_no_file_becomes_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "import sys; from m2f2cli.cli.output import stand_in_for_closed_streams as do; do();"
        "file = open(sys.argv[1], 'w'); assert file.fileno() > 2; file.write('x')"
    )
    shell = ["sh", "-c", f'exec {sys.executable} -c "$0" "$1" <&- >&- 2>&-', code]
    assert subprocess.run([*shell, str(tmp_path / "a")], check=False).returncode == 0


def test_a_file_named_like_a_flag_gets_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-photo").touch()
    for name in ("-dash.jpg", "-photo", "--dash.jpg"):
        assert app.run(["detect", name]) == 2
        assert f"If '{name}' is a file, write './{name}', or '--' before it." in (
            capsys.readouterr().err
        )
    assert app.run(["detect", "-z"]) == 2
    assert "See 'm2f2 detect --help'." in capsys.readouterr().err
