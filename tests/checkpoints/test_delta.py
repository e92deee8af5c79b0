"""Deltas are written whole, say what they were trained on, and lead from one model to another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2f2cli.checkpoints import adapters, io, keymaps
from m2f2cli.checkpoints.adapters import open_delta
from m2f2cli.checkpoints.io import write_tensor_file
from m2f2cli.errors import CheckpointError
from tests.checkpoints import merges


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merges.base(tmp_path_factory.mktemp("base") / "base", torch.float16)


def variant(folder: Path, base: Path, change) -> Path:
    """A checkpoint of the same model with other values."""
    tensors = {key: tensor.clone() for key, tensor in io.read_tensors(base).items()}
    change(tensors)
    config = io.read_config(base)
    io.write_checkpoint(folder, config=config, tensors=tensors, stage={"stage": "x"})
    return folder


def test_tensors_become_a_delta(base, tmp_path):
    folder = merges.stage_2(tmp_path / "d", base)
    found = open_delta(folder)
    assert found.kind == keymaps.DELTA
    assert found.parent == io.fingerprint(base)
    assert found.fingerprint == io.read_stage(folder)["fingerprint"]
    assert set(found.whole) == set(load_file(folder / "delta.safetensors"))
    assert not found.pairs


def test_a_peft_configuration_becomes_plain_json():
    from peft import LoraConfig

    from m2f2cli.models import explainer  # noqa: F401 - makes torchvision importable

    config = LoraConfig(r=4, target_modules=["b", "a"], base_model_name_or_path="/home/x")
    fields = adapters.adapter_fields(config.to_dict())
    assert json.loads(json.dumps(fields)) == fields
    assert fields["target_modules"] == ["a", "b"]
    assert fields["peft_type"] == "LORA"
    assert fields["inference_mode"] is True
    assert fields["base_model_name_or_path"] is None


def test_an_adapter_is_read_by_our_names(base, tmp_path):
    found = open_delta(merges.stage_3(tmp_path / "d", base))
    assert found.kind == keymaps.PEFT
    assert found.parent == io.fingerprint(base)
    assert len(found.pairs) == 4
    assert all(pair.scale == 2.0 for pair in found.pairs.values())
    assert len(found.whole) == 8
    assert found.modules == ("mm_projector", "forgery_projector")


def test_an_adapter_that_peft_wrote_has_no_parent(base, tmp_path):
    found = open_delta(merges.foreign(tmp_path / "d", base))
    assert found.parent is None
    assert found.fingerprint == open_delta(merges.stage_3(tmp_path / "e", base)).fingerprint


def test_updates_that_are_zero_are_left_out(base, tmp_path):
    key = "language_model.model.layers.0.self_attn.q_proj"
    zero = {f"{merges.PREFIX}{key}.lora_B.weight": torch.zeros(32, merges.RANK)}
    found = open_delta(merges.stage_3(tmp_path / "d", base, **zero))
    assert f"{key}.weight" not in found.pairs
    assert found.dropped == {f"{merges.PREFIX}{key}": "its update is exactly zero"}


def test_a_header_of_any_length_is_one_of_safetensors(tmp_path):
    """Its length's first byte may be that of a pickle."""
    from m2f2cli.checkpoints.io import open_weight_file

    firsts = set()
    for size in range(40):
        path = tmp_path / f"{size}.safetensors"
        write_tensor_file(path, {"x" * 8 * size + "y": torch.ones(300)})
        firsts.add(path.read_bytes()[0])
        assert open_weight_file(path).layout == "safetensors"
    assert 0x80 in firsts


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_changed_delta_is_noticed(base, tmp_path, name):
    whole, other = merges.stage_3(tmp_path / "d", base), tmp_path / "other"
    config = merges.CONFIG | {"lora_alpha": 16}
    first = next(key for key in merges.adapter(base) if "lora_B" in key)
    merges.stage_3(other, base, config=config, **{first: torch.ones(48, merges.RANK)[:32]})
    bad = merges.spoiled(tmp_path / "bad", whole, name, (other / name).read_bytes())
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        open_delta(bad)


def test_a_delta_without_its_mark_is_not_complete(base, tmp_path):
    folder = merges.stage_2(tmp_path / "d", base)
    (folder / "stage.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_delta(folder)
    assert "no stage.json" in str(caught.value.hint)


@pytest.mark.parametrize("size", [0, 7, 200])
def test_a_broken_delta(base, tmp_path, size):
    folder = merges.stage_2(tmp_path / "d", base)
    path = folder / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError):
        open_delta(folder)


def test_nan_is_never_written(base, tmp_path):
    bad = {"forgery_projector.0.bias": torch.full((32,), float("nan"))}
    with pytest.raises(CheckpointError, match="NaN"):
        merges.stage_2(tmp_path / "d", base, **bad)
    assert not list(tmp_path.iterdir())


def test_a_difference_holds_what_moved(base, tmp_path):
    def change(tensors):
        tensors["language_model.lm_head.weight"][3, 5] += 1
        tensors["forgery_projector.2.bias"] += 1

    other = variant(tmp_path / "x", base, change)
    adapters.diff(base, other, tmp_path / "d")
    assert set(load_file(tmp_path / "d" / "delta.safetensors")) == {
        "language_model.lm_head.weight",
        "forgery_projector.2.bias",
    }
    stage = io.read_stage(tmp_path / "d")
    assert stage["parent"] == io.fingerprint(base)
    assert stage["changed"] == io.fingerprint(other)


def retype(tensors):
    tensors["mm_projector.0.bias"] = tensors["mm_projector.0.bias"].bfloat16()


def drop(tensors):
    del tensors["mm_projector.0.bias"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (retype, "types of mm_projector.0.bias"),
        (drop, "1 missing: mm_projector.0.bias"),
        (lambda tensors: None, "no difference"),
    ],
)
def test_what_is_no_difference_of_values(base, tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        adapters.diff(base, variant(tmp_path / "x", base, change), tmp_path / "d")
    assert not (tmp_path / "d").exists()
