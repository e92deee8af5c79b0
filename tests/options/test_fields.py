from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import m2f2cli.training
from m2f2cli.errors import ConfigError, UsageError
from m2f2cli.options.fields import flag_name, parse_yaml
from m2f2cli.options.train_detector import RunOptions, TrainDetectorOptions
from m2f2cli.registry import Registry

NEEDED = {"data": "faces", "output": "detector"}


def build(**values) -> TrainDetectorOptions:
    return TrainDetectorOptions.from_flat(NEEDED | values)


def test_yaml_says_the_same():
    options = build(blur_sigma=[0.5, 2], soft_labels="a b.jsonl", learning_rate="3e-4", model=None)
    assert TrainDetectorOptions.from_flat(yaml.safe_load(options.to_yaml())) == options
    assert options.optimizer.learning_rate == 3e-4
    assert options.augment.blur_sigma == (0.5, 2.0)
    assert options.objective.soft_labels == Path("a b.jsonl")


@given(st.floats(0, 1), st.integers(1, 10_000), st.booleans(), st.sampled_from(["adam", "adamw"]))
def test_any_valid_options_survive_yaml(share, epochs, balance, rule):
    options = build(flip=share, epochs=epochs, balance=balance, optimizer=rule)
    assert TrainDetectorOptions.from_flat(yaml.safe_load(options.to_yaml())) == options


@pytest.mark.parametrize(
    ("values", "words", "hint"),
    [
        ({"lerning_rate": 1}, "no option 'lerning-rate'", "'learning-rate'"),
        ({"optimizer": "adamv"}, "--optimizer does not know 'adamv'", "'adam"),
        ({"epochs": 0}, "--epochs must be at least 1, not 0", None),
        ({"epochs": 1.5}, "--epochs needs a whole number", None),
        ({"epochs": True}, "--epochs needs a whole number", None),
        ({"balance": 1}, "--balance needs true or false", None),
        ({"learning_rate": "fast"}, "--learning-rate needs a number", None),
        ({"learning_rate": float("nan")}, "finite", None),
        ({"ema_decay": 1.0}, "--ema-decay must be at most", None),
        ({"validation_share": 0}, "--validation-share must be above 0", None),
        ({"blur_sigma": 3}, "--blur-sigma needs 2 values", None),
        ({"blur_sigma": [3, 1]}, "lower value first", None),
        ({"output": ""}, "--output needs a path", None),
        ({"data": None}, "--data is missing", "--data"),
        ({"warmup_ratio": 0.1}, "--warmup-ratio has no effect with --schedule plateau", "cosine"),
        ({"model": "lite", "hidden_size": 8}, "--hidden-size does not go with --model", "--model"),
        ({"judgement_weight": 1}, "--judgement-weight needs", "--annotations"),
        ({"map_weight": 1, "forgery_map": False}, "--map-weight needs", "--no-forgery-map"),
        ({"self_blend": 0.6, "swap_blend": 0.6}, "add up to at most 1", None),
        ({"pseudo_h264": 0.5}, "--pseudo-h264 needs", "--self-blend"),
        ({"resume": True, "overwrite": True}, "exclude each other", None),
    ],
)
def test_errors_speak_in_flags(values, words, hint):
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        build(**values)
    assert refused.value.exit_code == 2
    if hint:
        assert hint in refused.value.hint


def test_every_option_is_explained_and_names_are_unique():
    names = [item.name for _, item in TrainDetectorOptions.walk()]
    assert len(names) == len(set(names))
    for _, item in TrainDetectorOptions.walk():
        text = item.metadata["help"]
        assert text.endswith((".", ")")), item.name
        assert len(text) > 10
    assert {name.replace("-", "_") for name in RunOptions.incidental} < set(names)


def test_every_option_is_read_somewhere():
    package = Path(m2f2cli.training.__file__).parent
    source = "\n".join(path.read_text() for path in sorted(package.glob("*.py")))
    shares = ["shares", "self_blend", "swap_blend", "mouth_warp", "expression_warp"]
    unread = [
        item.name
        for group, item in TrainDetectorOptions.walk()
        if group != "augment"
        and item.name not in shares  # read through ``shares()``
        and item.name != "recipe"  # read while the options are put together
        and not re.search(rf"\.{item.name}\b", source)
    ]
    assert unread == []
    assert "pseudo.shares()" in source


def test_pseudo_fakes_are_those_of_the_data_layer():
    from m2f2cli.data.synthesis import KINDS

    assert tuple(build().pseudo.shares()) == KINDS


def test_flag_names():
    assert flag_name("learning_rate") == "--learning-rate"


def test_registry_imports_late_and_offers_the_nearest():
    table = Registry("thing", {"path": "pathlib:Path", "lost": "no_such_module:x"}, group="none.x")
    assert table.get("path") is Path
    assert table.names() == ["path", "lost"]
    with pytest.raises(ConfigError, match="no thing 'paht'") as refused:
        table.get("paht")
    assert "'path'" in refused.value.hint


@pytest.mark.parametrize("number", range(12))
def test_a_yaml_value_that_is_none_is_one_kind_of_error(number):
    text = ["!!int abc", "!!int ''", "!!float abc", "!!bool x", "!!binary 5", "!!timestamp x",
            "2001-99-99", "2001-01-01T99:99:99", "9" * 5000, "[" * 2000, "*x",
            "!!python/object:os.system x"][number]  # fmt: skip
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its words are PyYAML's
        parse_yaml(f"frames: {text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["epochs", "learning-rate", "seed", "output", "init-clip"])
@pytest.mark.parametrize(
    "value",
    [10**400, 16**5000, -(10**30), "\0", float("nan"), [[1]], {"a": 1}, b"x"],
    ids=["large", "too long to write", "below", "nul", "nan", "list", "mapping", "bytes"],
)
def test_whatever_a_value_is_it_is_refused_in_a_sentence(name, value):
    with pytest.raises(UsageError) as caught:
        TrainDetectorOptions.from_flat({"data": "x", "output": "y", name: value})
    assert len(caught.value.message) < 2000
