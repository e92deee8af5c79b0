from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from m2f2cli.cli import app
from m2f2cli.cli.flags import command
from m2f2cli.cli.output import Output
from m2f2cli.options.fields import Options, group, option


@dataclass(frozen=True)
class Size(Options):
    """How large."""

    batch_size: int = option(16, "Crops at a time.", low=1)
    side: int = option(8, "Pixels.", key=True)


@dataclass(frozen=True)
class Probe(Options):
    """One option of each kind."""

    size: Size = group(Size)
    model: str = option("lite", "The model.")
    fail_on: tuple[str, ...] = option((), "Gates.", "fake", "error")


def call(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run a command that notes what it was given."""
    seen: dict[str, Any] = {}
    application = typer.Typer()

    @command(Probe)
    def show(options: Probe, output: Output) -> None:
        seen.update(
            batch_size=options.size.batch_size,
            model=options.model,
            quiet=output.quiet,
            fail_on=options.fail_on,
        )

    application.command()(show.callback())
    return app.run(arguments, app=application), seen


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("batch-size: 3\nmodel: from-file\nquiet: true\nfail-on: [fake, error]\n")
    return path


def test_flags_beat_environment_beat_file_beat_default(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call()[1] == {"batch_size": 16, "model": "lite", "quiet": False, "fail_on": ()}
    file = ("--config", str(config))
    in_file = {
        "batch_size": 3,
        "model": "from-file",
        "quiet": True,
        "fail_on": ("fake", "error"),
    }
    assert call(*file)[1] == in_file
    monkeypatch.setenv("M2F2_BATCH_SIZE", "4")
    assert call(*file)[1] == {**in_file, "batch_size": 4}
    assert call(*file, "--batch-size", "5")[1] == {**in_file, "batch_size": 5}
    assert call("--batch-size", "5", *file)[1] == {**in_file, "batch_size": 5}
    assert call(*file, "--batch-size", "5", "--set", "batch-size=6")[1]["batch_size"] == 6
    monkeypatch.setenv("M2F2_CONFIG", str(config))
    assert call()[1] == {**in_file, "batch_size": 4}


@pytest.mark.parametrize(
    "content", ["batch_size: 7\n", "size:\n  batch-size: 7\n", "size: {batch: {size: 7}}\n"]
)
def test_underscores_are_dashes_and_groups_may_be_written_out(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert call("--config", str(path))[1]["batch_size"] == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("batchsize: 3\n", ["'batchsize'", "Did you mean 'batch-size'?"]),
        ("size: {batchsize: 3}\n", ["'size.batchsize'", "Did you mean 'batch-size'?"]),
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


@pytest.mark.parametrize(
    "line",
    [
        "detect a.jpg b/ -r --uncertain none --fail-on fake",
        "detect a.jpg --uncertain 0.25:0.75 --threshold 0.4 --heatmap out",
        "explain a.jpg --question Why? --region nose --region eyes --sample --top-p 0.5",
        "evaluate ffpp crops/ --manipulations FaceSwap --min-auc 0.5",
        "evaluate compare a b --seed 2",
        "demo --port 8000 --uncertain 0.2:0.3",
        "merge --base a --delta b --delta c --output d --dry-run",
        "import a.pth b.pth --output d --verify",
        "init-llava --llava a --detector b --output c --seed 3",
        "info lite --verify",
        "prepare faces clips/ more/ --output d --boxes-from e",
        "prepare ddvqa data/ --output d --seed 2",
    ],
)
def test_printed_settings_are_a_file_that_says_the_same(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = line.split()[: 2 if line.startswith(("prepare", "evaluate")) else 1]
    assert app.run([*line.split(), "--print-config"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(first)
    assert app.run([*verb, "--config", str(tmp_path / "printed.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == first
    assert len(yaml.safe_load(first)) >= 3


@pytest.mark.parametrize(
    ("verb", "line"),
    [
        ("evaluate ddvqa", "data: PATH"),
        ("evaluate images", "folder: DIR"),
        ("evaluate ffpp", "folder: DIR"),
        ("calibrate images", "folder: DIR"),
        ("robustness ddvqa", "robustness-dir: PATH"),
        ("robustness images --min-auc 0.7", "min-auc: 0.7"),
    ],
)
def test_settings_are_listed_before_there_is_anything_to_do(
    verb: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run([*verb.split(), "--print-config"]) == 0
    assert line in capsys.readouterr().out.splitlines()
    assert app.run([*verb.split(), "--print-config", "--min-auc", "7"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err


def test_a_password_is_not_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M2F2_DEMO_AUTH", "anna:geheim")
    for more in ([], ["--auth", "bob:geheim"]):
        assert app.run(["demo", "--print-config", *more]) == 0
        shown = capsys.readouterr().out
        assert "geheim" not in shown
        assert yaml.safe_load(shown)["auth"] is None
    monkeypatch.delenv("M2F2_DEMO_AUTH")
    assert app.run(["demo", "--print-config"]) == 0
    assert "auth: null\n" in capsys.readouterr().out


def test_every_flag_answers_to_its_environment_variable() -> None:
    """The variable is the flag's own name; nothing is spelled twice."""
    root = typer.main.get_command(app.build())
    for parameter in root.commands["detect"].params:  # type: ignore[attr-defined]
        longs = [o for o in parameter.opts if o.startswith("--") and o != "--help"]
        if longs:
            assert parameter.envvar == "M2F2_" + longs[0][2:].upper().replace("-", "_")
            assert parameter.help
            assert re.search(r"[.)]$", parameter.help)


def test_an_old_name_in_the_environment_is_an_error_that_names_the_new_one(capsys, monkeypatch):
    monkeypatch.setenv("M2F2_EMA", "0.9")
    assert app.run(["train-detector", "--data", "faces", "--output", "out"]) == 2
    assert "'M2F2_EMA' is now 'M2F2_EMA_DECAY'" in capsys.readouterr().err
    assert app.run(["info"]) == 0  # has no such option


def test_messages_name_flags_that_exist():
    """Every flag in a text of the package is one of a command, of torchrun, or a placeholder."""
    known = {"--help", "--name", "--nproc-per-node", "--no-"}
    rest: list[Any] = [typer.main.get_command(app.build())]
    while rest:
        part = rest.pop()
        rest += getattr(part, "commands", {}).values()
        known |= {name for given in part.params for name in (*given.opts, *given.secondary_opts)}
    unknown = []
    for file in sorted(Path(app.__file__).parent.parent.rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", node.value)
                unknown += [f"{file.name}:{node.lineno} {n}" for n in named if n not in known]
    assert unknown == []


@pytest.mark.parametrize(
    "value",
    ["!!int abc", "&a {b: *a}", "2001-99-99", "[" * 3000, "9" * 4000, "9" * 5000],
    ids=["tag", "cycle", "date", "depth", "large", "longer"],
)
def test_no_configuration_file_is_unexpected(tmp_path, capsys, value):
    file = tmp_path / "x.yaml"
    file.write_text(f"batch-size: {value}", encoding="utf-8")
    assert call("--config", str(file))[0] == 2
    assert "Unexpected" not in capsys.readouterr().err


def test_a_configuration_file_may_begin_with_a_mark(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("batch-size: 3", encoding="utf-8-sig")
    assert call("--config", str(file))[1]["batch_size"] == 3
