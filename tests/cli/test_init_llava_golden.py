from __future__ import annotations

import pytest
import torch

from m2f2cli.checkpoints import keymaps
from m2f2cli.checkpoints.convert import import_weights
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.cli.app import run
from tests.checkpoints import golden, llavas


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_the_golden_explainer_from_its_parts(tmp_path, capsys, file):
    """A LLaVA base and a detector's file give every tensor of the merged golden explainer."""
    base = golden.write(tmp_path / "base", golden.base(), file)
    torch.save(golden.detector(), tmp_path / "detector.pth")
    import_weights(
        [tmp_path / "detector.pth", base], tmp_path / "detector", clip_config=golden.CLIP_CONFIG
    )
    arguments = ["--llava", base, "--detector", tmp_path / "detector", "--output", tmp_path / "out"]
    assert run(["init-llava", *map(str, arguments)]) == 0
    assert "the same CLIP tower" in capsys.readouterr().err
    found = llavas.stored(tmp_path / "out")
    saved = {**golden.as_saved()}
    saved |= {f"deepfake_encoder.{key}": tensor for key, tensor in golden.detector().items()}
    wanted = keymaps.rename(saved, keymaps.PUBLISHED, what="x")
    for key, tensor in found.items():
        if not key.startswith("forgery_projector."):
            assert tensor.dtype == wanted[key].dtype
            assert torch.equal(tensor, wanted[key]), key
    load_explainer(str(tmp_path / "out"), device="cpu")
