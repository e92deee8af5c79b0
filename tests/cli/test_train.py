from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from m2f2cli.cli import app
from m2f2cli.cli.reference import reference
from m2f2cli.options.fields import flag_name
from m2f2cli.options.train_detector import TrainDetectorOptions
from tests.training.conftest import clip_folder, one_thread, toy_data  # noqa: F401 - fixtures

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def printed(capsys, *arguments: str) -> dict:
    assert app.run(["train-detector", *arguments, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_help_shows_the_flags_people_set_with_type_default_and_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERMINAL_WIDTH", "250")
    assert app.run(["train-detector", "--help"]) == 0
    text = " ".join(ANSI.sub("", capsys.readouterr().out).replace("│", " ").split())
    for _, item in TrainDetectorOptions.walk():
        shown = f"{flag_name(item.name)} " in text
        assert shown != item.metadata["key"], item.name
        if shown:
            assert item.metadata["help"].split()[0] in text
    assert "[default: 0.001]" in text
    assert "published|head|norms|prompt|everything" in text
    assert "--no-balance" in text


@pytest.mark.parametrize("command", ["detect", "explain", "train-detector", "align", "lora"])
def test_a_help_page_shows_about_two_dozen_flags(command):
    root = typer.main.get_command(app.build())
    shown = [p for p in root.commands[command].params if not p.hidden]
    assert len(shown) <= 28


def test_what_help_leaves_out_is_a_key_with_type_default_and_words(capsys):
    page = reference()
    keys = yaml.safe_load(
        "\n".join(f"{k}: 1" for k in printed(capsys))  # every option is listed
    )
    for _, item in TrainDetectorOptions.walk():
        key = item.name.replace("_", "-")
        assert key in keys
        if item.metadata["key"]:
            assert f"| `{key}` | " in page
    assert "| `plateau`, `cosine`, `constant` | `plateau` |" in page
    assert "| `LOW HIGH` | `0.0`, `3.0` |" in page


def test_keys_are_set_one_by_one(capsys, monkeypatch):
    monkeypatch.setenv("M2F2_JPEG", "0.7")
    monkeypatch.setenv("M2F2_EPOCHS", "3")
    settings = ("augment.jpeg.p=0.2", "augment.jpeg.quality=[40, 60]", "augment.affine.degrees=4",
                "blur-sigma=[1, 2]", "optimizer.learning-rate=1e-4", "bridge=true", "epochs=5",
                "manipulations=[FaceSwap, Deepfakes]")  # fmt: skip
    shown = printed(capsys, *(word for one in settings for word in ("--set", one)))
    wanted = {"jpeg": 0.2, "jpeg-quality": [40, 60], "degrees": 4.0, "blur-sigma": [1.0, 2.0],
              "learning-rate": 1e-4, "bridge": True, "epochs": 5,
              "manipulations": ["FaceSwap", "Deepfakes"]}  # fmt: skip
    assert {key: shown[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("lerning-rate=1", "Did you mean 'learning-rate'?"),
        ("run.jpeg=1", "'run.jpeg'"),
        ("ema=1", "is now 'ema-decay'"),
        ("jpeg", "has no value"),
        ("jpeg=2", "--jpeg must be at most 1"),
        ("jpeg=[", "as a value"),
    ],
)
def test_a_wrong_setting_exits_2_in_one_sentence(capsys, setting, words):
    assert app.run(["train-detector", "--set", setting, "--print-config"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_print_config_resolves_flags_environment_file_and_defaults(capsys, monkeypatch, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: from-file\noutput: out\nlearning-rate: 1e-4\nepochs: 7\nblur-sigma: [1, 2]\n"
        "forgery_map: false\nbalance: true\nmodel: null\n"
    )
    plain = printed(capsys, "--config", str(recipe))
    assert plain["data"] == "from-file"
    assert plain["learning-rate"] == 1e-4
    assert plain["blur-sigma"] == [1.0, 2.0]
    assert plain["forgery-map"] is False
    assert plain["model"] is None
    assert plain["batch-size"] == 80
    monkeypatch.setenv("M2F2_EPOCHS", "8")
    monkeypatch.setenv("M2F2_BATCH_SIZE", "9")
    flags = ("--epochs", "10", "--blur-sigma", "0", "1.5", "--no-balance", "--forgery-map")
    changed = printed(capsys, "--config", str(recipe), *flags)
    assert changed["epochs"] == 10
    assert changed["batch-size"] == 9
    assert changed["blur-sigma"] == [0.0, 1.5]
    assert changed["balance"] is False
    assert changed["forgery-map"] is True
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(changed))
    monkeypatch.delenv("M2F2_EPOCHS")
    monkeypatch.delenv("M2F2_BATCH_SIZE")
    assert printed(capsys, "--config", str(again)) == changed


def test_flags_that_may_be_repeated(capsys, monkeypatch, tmp_path):
    assert printed(capsys, "--data", "a b", "--data", "ffpp:c")["data"] == ["a b", "ffpp:c"]
    assert printed(capsys, "--data", "a b", "--manipulations", "FaceSwap")["data"] == "a b"
    file = tmp_path / "own.yaml"
    for text, wanted in (("data: one", "one"), ("data: [one, two]", ["one", "two"])):
        file.write_text(f"{text}\nvalidation: other\nmanipulations: [FaceSwap, Deepfakes]\n")
        shown = printed(capsys, "--config", str(file))
        assert (shown["data"], shown["validation"]) == (wanted, "other")
        assert shown["manipulations"] == ["FaceSwap", "Deepfakes"]
        assert printed(capsys, "--config", str(file), "--data", "flag")["data"] == "flag"
    monkeypatch.setenv("M2F2_DATA", "three four")
    assert printed(capsys, "--config", str(file))["data"] == ["three", "four"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--data is missing"),
        (("--data", "x", "--data", "x", "--output", "y"), "--data names 'x' twice"),
        (("--data", "x", "--output", "y", "--manipulations", "FaceSwp"), "mean 'FaceSwap'"),
        (("--data", "x", "--output", "y", "--compression", "c32"), "mean 'c23'"),
        (("--data", "x", "--output", "y", "--recipe", "publishd"), "mean 'published'"),
        (("--data", "x"), "--output is missing"),
        (("--data", "x", "--output", "y", "--epochs", "0"), "--epochs must be at least 1"),
        (("--data", "x", "--output", "y", "--epochs", "many"), "'--epochs'"),
        (("--data", "x", "--output", "y", "--optimizer", "sgd"), "Use one of: adam, adamw"),
        (("--data", "x", "--output", "y", "--lerning-rate", "1"), "--learning-rate"),
    ],
)
def test_wrong_usage_exits_2_in_one_sentence(capsys, arguments, words):
    assert app.run(["train-detector", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert "Traceback" not in shown.err


def test_unknown_key_of_a_file_is_an_error(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lerning-rate: 1\n")
    assert app.run(["train-detector", "--config", str(recipe), "--print-config"]) == 2
    assert "'learning-rate'" in capsys.readouterr().err


def test_missing_data_exits_1(capsys, tmp_path):
    arguments = ("--data", str(tmp_path / "none"), "--output", str(tmp_path / "out"))
    assert app.run(["train-detector", *arguments]) == 1
    assert "There is no data folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_training_prints_its_folder_only(
    capsys,
    tmp_path,
    toy_data,  # noqa: F811
    clip_folder,  # noqa: F811
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {toy_data}\nclip: {clip_folder}\nbackbone: test_efficientnet\n"
        "backbone-weights: none\nhidden-size: 8\nepochs: 1\nbatch-size: 8\ndevice: cpu\n"
        "validation-share: 0.25\nreport-to: none\n"
    )
    output = tmp_path / "out"
    capsys.readouterr()
    assert app.run(["train-detector", "--config", str(recipe), "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{output}\n"
    assert "epoch 1/1: loss" in shown.err
    assert "Kept epoch 1" in shown.err
    arguments = ["train-detector", "--config", str(recipe), "--output", str(output)]
    assert app.run(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert app.run([*arguments, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert Path(output, "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("train-detector", "ema", "ema-decay"),
        ("train-detector", "init", "model"),
        ("lora", "load-in", "quantize"),
        ("lora", "rank", "lora-r"),
    ],
)
def test_an_old_name_is_an_error_that_names_the_new_one(capsys, tmp_path, command, old, new):
    file = tmp_path / "old.yaml"
    file.write_text(f"{old}: 1\n")
    for arguments in ((f"--{old}", "1"), ("--config", str(file))):
        assert app.run([command, *arguments, "--print-config"]) == 2
        told = capsys.readouterr().err
        assert f"{old}'" in told
        assert f"{new}'" in told


def test_records_of_earlier_versions_stay_readable():
    old = {"ema": 0.9, "accumulate": 2, "dropout": 0.1, "optimiser": "adam"}
    new = {"ema-decay": 0.9, "gradient-accumulation-steps": 2, "dropout": 0.1, "optimizer": "adam"}
    assert TrainDetectorOptions.recorded(old) == new
