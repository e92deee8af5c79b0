from __future__ import annotations

import pytest
import torch

from m2f2cli.errors import CheckpointError, ConfigError
from m2f2cli.models.clip import ClipTower, blocks_needed, load_clip
from tests.conftest import TINY_CLIP, TINY_SIDE, randomise

OPEN_CLIP = {
    "library": "open_clip",
    "embed_dim": 16,
    "vision": {"image_size": TINY_SIDE, "layers": 3, "width": 64, "patch_size": 8},
    "text": {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2},
    "quick_gelu": True,
}


def test_the_tower_equals_transformers_own_clip(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    parts = {"text_config": TINY_CLIP["text"], "vision_config": TINY_CLIP["vision"]}
    whole = CLIPModel(CLIPConfig(**parts, projection_dim=8)).eval()
    randomise(whole)
    whole.save_pretrained(tmp_path)
    spec, tensors = load_clip(str(tmp_path))
    tower = ClipTower(spec, -2).eval()
    tower.load_state_dict({k: tensors[k] for k in tower.state_dict()})
    pixels = torch.randn(2, 3, TINY_SIDE, TINY_SIDE)
    with torch.no_grad():
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states
        state, (first,) = tower(pixels, [1])
    assert torch.allclose(state, expected[-2], atol=1e-5)
    assert torch.allclose(first, expected[1], atol=1e-5)
    ids = torch.tensor([[5, 9, 3]])
    words = whole.text_model.embeddings.token_embedding(ids)
    with torch.no_grad():
        last = whole.text_model(ids).last_hidden_state[:, -1]
        assert torch.allclose(tower.text(words), last, atol=1e-5)


def test_the_open_clip_tower_equals_open_clips_own_blocks():
    from open_clip.model import CustomTextCLIP

    fields = {k: OPEN_CLIP[k] for k in ("embed_dim", "quick_gelu")}
    whole = CustomTextCLIP(vision_cfg=OPEN_CLIP["vision"], text_cfg=OPEN_CLIP["text"], **fields)
    randomise(whole).eval()
    tower = ClipTower(OPEN_CLIP, -2).eval()
    names = {k: (k if k.startswith("text.") else f"vision.{k}") for k in whole.state_dict()}
    tower.load_state_dict(
        {names[k]: t for k, t in whole.state_dict().items() if names[k] in tower.state_dict()}
    )
    pixels = torch.randn(2, 3, TINY_SIDE, TINY_SIDE)
    seen = []
    handle = whole.visual.transformer.resblocks[1].register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    ids = torch.tensor([[1, 2, 3, 4] + [63] * 12])
    with torch.no_grad():
        whole.encode_image(pixels)
        state, _ = tower(pixels)
        text = whole.text
        embedded = text.token_embedding(ids) + text.positional_embedding
        hidden = text.ln_final(text.transformer(embedded, attn_mask=text.attn_mask))
        mine = tower.text(text.token_embedding(ids[:, :4]))
    handle.remove()
    assert torch.allclose(state, seen[0], atol=1e-5)
    assert torch.allclose(mine, hidden[:, 3], atol=1e-5)


@pytest.mark.parametrize("spec", [TINY_CLIP, OPEN_CLIP], ids=["transformers", "open_clip"])
def test_unused_blocks_do_not_exist(spec):
    keys = set(ClipTower(spec, -2).state_dict())
    assert any(".1." in k for k in keys if k.startswith("vision"))
    assert not any(".2." in k for k in keys if k.startswith("vision"))
    assert not any("token_embedding" in k for k in keys)


def test_load_clip_reads_open_clip_names():
    spec, tensors = load_clip("openclip:ViT-S-32-alt")
    tower = ClipTower(spec, -2)
    assert set(tower.state_dict()) <= set(tensors)


@pytest.mark.parametrize(("total", "layer", "blocks"), [(24, -2, 23), (24, -1, 24), (24, 6, 6)])
def test_blocks_needed(total, layer, blocks):
    assert blocks_needed(total, layer) == blocks


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="Hidden state 9"):
        ClipTower(TINY_CLIP, 9)
    with pytest.raises(ConfigError, match="Unknown CLIP library 'keras'"):
        ClipTower({"library": "keras"}, -2)
    with pytest.raises(ConfigError, match="no architecture named 'ViT-Nope'"):
        load_clip("openclip:ViT-Nope")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_clip(str(tmp_path))
