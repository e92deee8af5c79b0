from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from m2f2cli.checkpoints import io
from m2f2cli.cli import app
from m2f2cli.options.fields import flag_name
from tests.training.conftest import one_thread  # noqa: F401 - a fixture
from tests.training.talks import KINDS, stage_options, write_all

ANSI = re.compile(r"\x1b\[[0-9;]*m")
STAGES = ("align", "lora")
GIVEN = ("--model", "m", "--data", "d.json", "--images", "i", "--output", "o")
# Of the published stages 2 and 3.
PUBLISHED = {
    "max-length": 2048,
    "epochs": 1,
    "gradient-accumulation-steps": 1,
    "learning-rate": 2e-5,
    "weight-decay": 0.0,
    "schedule": "cosine",
    "warmup-ratio": 0.03,
    "gradient-checkpointing": True,
}


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_flags_people_set(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERMINAL_WIDTH", "250")
    assert app.run([stage, "--help"]) == 0
    text = " ".join(ANSI.sub("", capsys.readouterr().out).replace("│", " ").split())
    for _, item in KINDS[stage].walk():
        shown = f"{flag_name(item.name)} " in text
        assert shown != item.metadata["key"], item.name
        if shown:
            assert item.metadata["help"].split()[0] in text
    assert ("--quantize" in text) == ("--lora-r" in text) == (stage == "lora")


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_the_published_settings(stage, capsys, tmp_path):
    assert app.run([stage, "--print-config"]) == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    own = {"batch-size": 40} if stage == "align" else {
        "batch-size": 20, "lora-r": 128, "lora-alpha": 256, "lora-dropout": 0.05,
        "projector-lr": 2e-5,
    }  # fmt: skip
    assert {key: shown[key] for key in PUBLISHED | own} == PUBLISHED | own
    file = tmp_path / "stage.yaml"
    file.write_text(text)
    assert app.run([stage, "--config", str(file), "--print-config", "--epochs", "3"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == shown | {"epochs": 3}


def test_settings_are_shown_without_torch():
    code = (
        "import sys\n"
        "from m2f2cli.cli.app import run\n"
        "assert run(['lora', '--print-config']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (GIVEN[2:], "--model is missing"),
        (GIVEN[:-2], "--output is missing"),
        ((*GIVEN, "--missing", "never"), "--missing does not know 'never'"),
        ((*GIVEN, "--deepspeed", "zero4"), "--deepspeed 'zero4' is no file"),
        ((*GIVEN, "--resume", "--overwrite"), "exclude each other"),
        ((*GIVEN, "--validation-share", "1"), "at most 0.9"),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_wrong_usage_exits_2_in_one_sentence(stage, arguments, words, capsys):
    assert app.run([stage, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in " ".join(shown.err.split())
    assert "Traceback" not in shown.err


def test_4_bits_are_for_lora_only(capsys):
    assert app.run(["align", *GIVEN, "--quantize", "4bit"]) == 2
    assert "--quantize" in capsys.readouterr().err
    assert app.run(["lora", *GIVEN, "--quantize", "3bit"]) == 2


def test_a_missing_explainer_exits_1(capsys, tmp_path):
    arguments = ("--model", str(tmp_path / "none"), *GIVEN[2:-1], str(tmp_path / "out"))
    assert app.run(["align", *arguments]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_prints_its_folder_only(stage, capsys, tmp_path):
    root = write_all(tmp_path / "root")
    options = stage_options(stage, root, tmp_path / "delta", validation_share=0.3, answer_tokens=2)
    (tmp_path / "stage.yaml").write_text(options.to_yaml())
    assert app.run([stage, "--config", str(tmp_path / "stage.yaml")]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'delta'}\n"
    assert "conversations: 16 to learn from, 8 held out" in shown.err
    assert "epoch 1/1: loss" in shown.err
    assert io.read_stage(tmp_path / "delta")["stage"] == stage
