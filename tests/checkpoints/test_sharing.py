"""Two checkpoints that share a part: stored once, and the same as the whole."""

from __future__ import annotations

import json

import pytest
import torch

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.inspect import inspect_checkpoint
from m2f2cli.checkpoints.io import open_weight_file, open_weights, share
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.errors import CheckpointError
from tests.models.explainers import write_explainer

BEGIN = "detector."


@pytest.fixture
def pair(tmp_path):
    """An explainer, its detector, and the explainer without the detector's tensors."""
    model = write_explainer(tmp_path / "whole")
    config = json.loads(model.config.detector_config.to_json_string(use_diff=False))
    tensors = model.detector.state_dict()
    io.write_checkpoint(
        tmp_path / "both" / "detector", config=config, tensors=tensors, stage={"stage": "test"}
    )
    small = tmp_path / "both" / "explainer"
    share(tmp_path / "whole", small, begin=BEGIN, source=tmp_path / "both" / "detector")
    return tmp_path / "whole", small


def test_what_is_shared_is_stored_once_and_nothing_else_changes(pair):
    whole, small = pair
    own = open_weight_file(small / "model.safetensors").tensors
    assert own
    assert not any(key.startswith(BEGIN) for key in own)
    before, after = io.read_tensors(whole), io.read_tensors(small)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert io.fingerprint(small) == io.fingerprint(small, verify=True)
    assert io.fingerprint(small) == io.fingerprint(whole)
    assert set(open_weights(small).tensors) == set(before)


def test_it_loads_like_the_whole(pair):
    states = [load_explainer(str(folder), device="cpu")[0].state_dict() for folder in pair]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_info_says_where_the_rest_lies(pair):
    whole, small = (inspect_checkpoint(str(folder)) for folder in pair)
    assert small.missing == whole.missing
    assert small.parameters == whole.parameters
    assert any("lie in" in note and "detector" in note for note in small.notes)


def test_the_two_folders_move_together(pair, tmp_path):
    _, small = pair
    small.parent.rename(tmp_path / "moved")
    assert load_explainer(str(tmp_path / "moved" / "explainer"), device="cpu")


def test_alone_or_with_another_detector_it_is_refused(pair, tmp_path):
    _, small = pair
    small.rename(tmp_path / "alone")
    with pytest.raises(CheckpointError, match="not there or not the checkpoint"):
        load_explainer(str(tmp_path / "alone"), device="cpu")
    found = inspect_checkpoint(str(tmp_path / "alone"))
    assert any("not there" in words for words in found.missing)
    (tmp_path / "alone" / "shared.json").write_text('{"detector.": 3}')
    with pytest.raises(CheckpointError, match="does not say"):
        io.open_tensors(tmp_path / "alone")


def test_only_what_is_the_same_can_be_shared(pair, tmp_path):
    _, small = pair
    write_explainer(tmp_path / "other", change=lambda t: t["detector.head.bias"].add_(1))
    with pytest.raises(CheckpointError, match=r"1 tensors: detector\.head\.bias"):
        share(
            tmp_path / "other",
            tmp_path / "out",
            begin=BEGIN,
            source=small.parent / "detector",
        )
    assert not (tmp_path / "out").exists()
