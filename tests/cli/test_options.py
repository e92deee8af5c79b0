from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from m2f2cli.cli import app, options


def probe(seen: dict[str, Any]) -> typer.Typer:
    """A command with one flag of each kind that notes what it was given."""
    application = typer.Typer()

    @application.command()
    def show(
        config: options.Config = None,
        batch_size: options.BatchSize = 16,
        model: options.Model = "lite",
        quiet: options.Quiet = False,
        fail_on: options.FailOn = None,
    ) -> None:
        seen.update(batch_size=batch_size, model=model, quiet=quiet, fail_on=fail_on)

    return application


def call(*arguments: str) -> tuple[int, dict[str, Any]]:
    seen: dict[str, Any] = {}
    return app.run(arguments, app=probe(seen)), seen


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("batch-size: 3\nmodel: from-file\nquiet: true\nfail-on: [fake, error]\n")
    return path


def test_flags_beat_environment_beat_file_beat_default(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call()[1] == {"batch_size": 16, "model": "lite", "quiet": False, "fail_on": None}
    file = ("--config", str(config))
    in_file = {
        "batch_size": 3,
        "model": "from-file",
        "quiet": True,
        "fail_on": ["fake", "error"],
    }
    assert call(*file)[1] == in_file
    monkeypatch.setenv("M2F2_BATCH_SIZE", "4")
    assert call(*file)[1] == {**in_file, "batch_size": 4}
    assert call(*file, "--batch-size", "5")[1] == {**in_file, "batch_size": 5}
    assert call("--batch-size", "5", *file)[1] == {**in_file, "batch_size": 5}
    monkeypatch.setenv("M2F2_CONFIG", str(config))
    assert call()[1] == {**in_file, "batch_size": 4}


def test_underscores_in_the_file_are_dashes(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: 7\n")
    assert call("--config", str(path))[1]["batch_size"] == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("batchsize: 3\n", ["'batchsize'", "Did you mean 'batch-size'?"]),
        ("colour: red\n", ["'colour'", "Known: "]),
        ("batch-size: many\n", ["--batch-size", "valid integer"]),
        ("batch-size: 0\n", ["batch-size"]),
        ("- 1\n", ["flag: value"]),
        ("a: [\n", ["not valid YAML"]),
        ("config: other.yaml\n", ["'config'"]),
    ],
)
def test_a_wrong_file_is_named_with_the_way_out(
    content: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert call("--config", str(path))[0] == 2
    captured = capsys.readouterr().err
    for word in words:
        assert word in captured


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n")
    assert call("--config", str(path))[0] == 0


def test_every_flag_answers_to_its_environment_variable() -> None:
    """The variable is the flag's own name; nothing is spelled twice."""
    command = typer.main.get_command(app.build())
    for name, sub in command.commands.items():  # type: ignore[attr-defined]
        for parameter in sub.params:
            longs = [o for o in parameter.opts if o.startswith("--") and o != "--help"]
            if not longs or name != "detect":
                continue
            assert parameter.envvar == "M2F2_" + longs[0][2:].upper().replace("-", "_")
            assert parameter.help
            assert re.search(r"[.)]$", parameter.help)


def test_an_old_name_in_the_environment_is_an_error_that_names_the_new_one(capsys, monkeypatch):
    monkeypatch.setenv("M2F2_EMA", "0.9")
    assert app.run(["train-detector", "--data", "faces", "--output", "out"]) == 2
    assert "'M2F2_EMA' is now 'M2F2_EMA_DECAY'" in capsys.readouterr().err
    assert app.run(["info"]) == 0  # has no such option
