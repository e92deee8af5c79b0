"""Merging the published deltas gives the published merge's tensors, to one 16-bit step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.convert import import_weights
from m2f2cli.checkpoints.merge import Merge
from m2f2cli.errors import CheckpointError
from tests.parity import explainer
from tests.parity.published import HERE, state_dict
from tests.parity.recipe import tensor_for

GOLDEN = HERE / "golden" / "merge"
DELTAS = json.loads((GOLDEN / "deltas.json").read_text())
# What the reference keeps in float16 inside its bfloat16 detector.
HALF = ("clip_vision_alpha", "clip_text_alpha", "prompt_tokens")


def delta_file(name: str) -> dict[str, torch.Tensor]:
    spec = DELTAS["files"][name]
    return {
        key: tensor_for(key, shape, dtype, spec["salt"])
        for key, (shape, dtype) in spec["tensors"].items()
    }


def as_saved(key: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    inside = key.startswith("deepfake_encoder.") and not key.endswith(HALF)
    return tensor.to(torch.bfloat16 if inside else torch.float16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base in both precisions, imported, and the deltas as the published code leaves them."""
    home = tmp_path_factory.mktemp("merge")
    towers = explainer.FOLDER / "clip-tiny" / "config.json"
    explainer.write_published(home / "published")
    import_weights([home / "published"], home / "base-32", clip_config=towers)
    state = {key: as_saved(key, tensor) for key, tensor in state_dict("llava_tiny").items()}
    save_file(state, home / "published" / "model.safetensors")
    import_weights([home / "published"], home / "base", clip_config=towers)
    stage_2, stage_3 = home / "stage-2", home / "stage-3"
    stage_2.mkdir()
    stage_3.mkdir()
    torch.save(delta_file("mm_projector.bin"), stage_2 / "mm_projector.bin")
    (stage_2 / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    torch.save(delta_file("non_lora_trainables.bin"), stage_3 / "non_lora_trainables.bin")
    save_file(delta_file("adapter_model.safetensors"), stage_3 / "adapter_model.safetensors")
    (stage_3 / "adapter_config.json").write_text(json.dumps(DELTAS["adapter_config"]))
    yield home
    shutil.rmtree(home)  # 400 MB


def merged(place: Path, base: str, deltas: tuple[str, ...], force: bool = True):
    output = place / "-".join([base, *deltas, str(force)])
    Merge(place / base, [place / name for name in deltas], output, force=force).write()
    return io.read_tensors(output, finite=True)


def expected(prefix: str) -> dict[str, torch.Tensor]:
    found = load_file(GOLDEN / "expected.safetensors")
    mine = {k.removeprefix(prefix): t for k, t in found.items() if k.startswith(prefix)}
    return keymaps.rename(mine, keymaps.PUBLISHED, what="The golden")


def steps(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> float:
    """The largest distance in float16 steps, each at the size of the larger of base and sum.

    The published merge rounds the update before it adds it. Where base and update cancel, that
    error is as large as a step of theirs, not of the small sum.
    """
    size = torch.maximum(wanted.abs(), base.abs()).float()
    exponent = torch.frexp(size).exponent.clamp(min=-13) - 11
    step = torch.ldexp(torch.ones_like(size), exponent)
    return float(((found.float() - wanted.float()).abs() / step).max())


def cut(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor[: like.shape[0], : like.shape[1]] if like.ndim == 2 else tensor


def test_stage_2(place):
    found, wanted = merged(place, "base", ("stage-2",)), expected("stage2_merged.")
    assert len(wanted) == 4
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    base = io.read_tensors(place / "base")
    assert all(torch.equal(found[k], t) for k, t in base.items() if k not in wanted)


@pytest.mark.parametrize("chained", [False, True])
def test_stage_3(place, chained, record_property):
    """In one go, and with both deltas named at once."""
    found = merged(place, "base", ("stage-2", "stage-3") if chained else ("stage-3",))
    wanted = expected("merged.")
    assert len(wanted) == 5
    worst, base = 0.0, io.read_tensors(place / "base")
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype == torch.float16
        worst = max(worst, steps(cut(found[key], tensor), tensor, cut(base[key], tensor)))
    record_property("largest distance in float16 steps", worst)
    assert worst <= 1
    changed = {k for k, t in base.items() if not torch.equal(found[k], t)}
    # The last block of the vision tower, wrapped as well, is not part of the model.
    counts = {"language_model": 14, "mm_projector": 4, "forgery_projector": 4}
    for begin, count in counts.items():
        assert len([k for k in changed if k.startswith(begin)]) == count
    assert len([k for k in changed if k.startswith("detector.clip.vision")]) == 6


def test_stage_3_in_float32(place):
    found, wanted = merged(place, "base-32", ("stage-3",)), expected("merged_float32.")
    for key, tensor in wanted.items():
        assert (cut(found[key], tensor) - tensor).abs().max() <= 1e-6, key


def test_updates_of_frozen_modules_are_refused_unless_forced(place):
    """The golden adapter has noise where a trained one has zeros."""
    with pytest.raises(CheckpointError, match="updates 15 modules that every stage keeps"):
        merged(place, "base", ("stage-3",), force=False)
    trained = place / "stage-3-trained"
    trained.mkdir()
    for name in ("adapter_config.json", "non_lora_trainables.bin"):
        (trained / name).write_bytes((place / "stage-3" / name).read_bytes())
    state = {
        key: torch.zeros_like(tensor) if "lora_B" in key and ".model.layers." not in key else tensor
        for key, tensor in delta_file("adapter_model.safetensors").items()
    }
    save_file(state, trained / "adapter_model.safetensors")
    found = merged(place, "base", ("stage-3-trained",), force=False)
    base = io.read_tensors(place / "base")
    for key, tensor in expected("merged.").items():
        if not key.startswith("detector."):
            assert steps(cut(found[key], tensor), tensor, cut(base[key], tensor)) <= 1
    assert all(torch.equal(found[k], t) for k, t in base.items() if k.startswith("detector."))
