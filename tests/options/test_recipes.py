from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import yaml

from m2f2cli.cli import app
from m2f2cli.errors import ConfigError
from m2f2cli.options import recipes
from m2f2cli.options.fields import Options
from m2f2cli.options.recipes import RECIPES, read_recipe
from m2f2cli.options.train_detector import TrainDetectorOptions

PLACES = {"data": "faces", "output": "out"}
# The published stage 1, as far as it is settings.
PUBLISHED = {
    "compression": "c40", "frames-per-video": 1, "optimizer": "adam", "learning-rate": 1e-3,
    "weight-decay": 1e-6, "vision-alpha-lr": 1e-3, "text-alpha-lr": 3e-3, "batch-size": 80,
    "gradient-accumulation-steps": 1, "epochs": 200, "schedule": "plateau", "plateau-factor": 0.4,
    "plateau-patience": 6, "plateau-cooldown": 5, "blur": 0.1, "blur-sigma": [0.0, 3.0],
    "jpeg": 0.1, "jpeg-quality": [30, 100], "flip": 0.5, "noise": 0.0, "train": "published",
    "balance": False, "clip": "openai/clip-vit-large-patch14-336", "normalization": "clip",
}  # fmt: skip
SHAPES = {
    "published": {"backbone": "densenet121", "hidden-size": 1024, "prompt-tokens": 7,
                  "forgery-map": True, "bridge": False},
    "published-efficientnet-b4": {"backbone": "efficientnet_b4", "hidden-size": 1792,
                                  "forgery-map": False, "bridge": True},
}  # fmt: skip


def printed(capsys, *arguments: str) -> dict:
    assert app.run(["train-detector", *arguments, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", SHAPES)
def test_published_settings_exactly(capsys, name):
    shown = printed(capsys, "--recipe", name)
    wanted = PUBLISHED | SHAPES[name]
    assert {key: shown[key] for key in wanted} == wanted
    assert shown["recipe"] == name


@pytest.mark.parametrize("name", RECIPES.names())
def test_every_recipe_is_valid_and_means_the_same_everywhere(capsys, name):
    built = TrainDetectorOptions.from_flat(PLACES | {"recipe": name})
    assert built.to_flat() == printed(
        capsys, "--recipe", name, "--data", "faces", "--output", "out"
    )
    for key, value in read_recipe(name).items():
        assert built.to_flat()[key.replace("_", "-")] == value
    assert not {"data", "output", "recipe"} & read_recipe(name).keys()


def test_flags_then_environment_then_file_then_recipe_then_default(capsys, monkeypatch, tmp_path):
    recipe = read_recipe("small-data")
    assert (recipe["epochs"], recipe["batch_size"], recipe["ema_decay"]) == (16, 32, 0.98)
    file = tmp_path / "own.yaml"
    file.write_text("recipe: small-data\nepochs: 1\nbatch-size: 2\nema-decay: 0.5\n")
    monkeypatch.setenv("M2F2_EPOCHS", "11")
    monkeypatch.setenv("M2F2_BATCH_SIZE", "12")
    arguments = ("--config", str(file), "--epochs", "21")
    for order in (arguments, ("--recipe", "small-data", *arguments)):
        shown = printed(capsys, *order)
        assert (shown["epochs"], shown["batch-size"], shown["ema-decay"]) == (21, 12, 0.5)
        assert shown["mixup"] == recipe["mixup"] == 0.1  # only the recipe says so
        assert shown["plateau-patience"] == 6  # nobody says so
    shown = printed(capsys, *arguments, "--recipe", "robust")  # a flag names another recipe
    assert (shown["mixup"], shown["epochs"]) == (0.0, 21)
    monkeypatch.setenv("M2F2_RECIPE", "robust")
    assert printed(capsys)["jpeg"] == 0.5


def test_a_printed_recipe_is_a_file_that_says_the_same(capsys, tmp_path):
    first = printed(capsys, "--recipe", "robust", "--data", "a", "--data", "b")
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(first))
    assert printed(capsys, "--config", str(tmp_path / "printed.yaml")) == first
    assert first["data"] == ["a", "b"]


def test_unknown_recipe(capsys):
    assert app.run(["train-detector", "--recipe", "publishd", "--print-config"]) == 2
    told = capsys.readouterr().err
    assert "no recipe 'publishd'" in told
    assert "Did you mean 'published'?" in told
    with pytest.raises(ConfigError, match="no recipe"):
        TrainDetectorOptions.from_flat(PLACES | {"recipe": "mine"})


def test_a_package_brings_a_recipe(capsys, monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 5\n")
    monkeypatch.setattr(recipes, "MINE", file, raising=False)
    point = EntryPoint("mine", "m2f2cli.options.recipes:MINE", "m2f2cli.recipes")
    monkeypatch.setattr(
        "m2f2cli.registry.entry_points",
        lambda **wanted: [point] if wanted.get("name", "mine") == "mine" else [],
    )
    assert printed(capsys, "--recipe", "mine")["epochs"] == 5
    file.write_text("epoch: 5\n")
    assert app.run(["train-detector", "--recipe", "mine", "--print-config"]) == 2
    assert "Did you mean 'epochs'?" in capsys.readouterr().err
    for text in ("- 1\n", "a: [\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="recipe 'mine' cannot be read"):
            read_recipe("mine")


def test_recipes_are_files_of_the_package():
    from importlib.resources import files

    folder = files("m2f2cli") / "assets" / "recipes"
    assert sorted(item.name for item in folder.iterdir()) == sorted(
        f"{name}.yaml" for name in RECIPES.names()
    )
    assert issubclass(TrainDetectorOptions, Options)


@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_a_start_from_a_detector_implies_its_recipe(capsys, monkeypatch, tmp_path, source):
    arguments = ["--data", "d", "--output", "o"]
    if source == "flag":
        arguments += ["--model", "lite"]
    elif source == "environment":
        monkeypatch.setenv("M2F2_MODEL", "lite")
    else:
        (tmp_path / "c.yaml").write_text("model: lite\n")
        arguments += ["--config", str(tmp_path / "c.yaml")]
    shown = printed(capsys, *arguments)
    assert (shown["recipe"], shown["fit-head"], shown["epochs"]) == ("fine-tune", True, 8)
    assert printed(capsys, *arguments, "--epochs", "3")["epochs"] == 3
    for order in ((*arguments, "--recipe", "published"), ("--recipe", "published", *arguments)):
        named = printed(capsys, *order)
        assert (named["recipe"], named["fit-head"], named["epochs"]) == ("published", False, 200)
