from __future__ import annotations

from itertools import pairwise

import pytest

from m2f2cli.checkpoints import keymaps
from m2f2cli.errors import CheckpointError
from tests.checkpoints import llavas
from tests.parity.published import manifest

TABLES = {
    "original": keymaps.ORIGINAL,
    "published": keymaps.PUBLISHED,
    "hugging face": keymaps.HUGGING_FACE,
}


def ours(keys, rows) -> dict[str, str]:
    found = keymaps.look_up(keys, rows, what="'x'")
    assert all(entry.why for entry in found if entry.action == "dropped")
    return {entry.key: entry.to for entry in found if entry.to is not None}


@pytest.mark.parametrize("version", llavas.HF_NAMES)
def test_every_serialisation_of_transformers_means_the_same_tensors(version):
    base = ours(llavas.original(), keymaps.ORIGINAL)
    theirs = llavas.hugging_face(version)
    found = ours(theirs, keymaps.HUGGING_FACE)
    assert sorted(found.values()) == sorted(base.values())
    by_name = {name: theirs[key] for key, name in found.items()}
    for key, tensor in llavas.original().items():
        assert (by_name[base[key]] == tensor).all()


def test_transformers_writes_what_the_table_knows(tmp_path):
    """The installed transformers saves a LLaVA of its own; every key lands once."""
    from safetensors import safe_open
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    clip = {k: v for k, v in llavas.CLIP.items() if k != "model_type"}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**clip), text_config=LlamaConfig(**llavas.LLAMA)
    )
    model = Llava(config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = list(file.keys())
    base = set(ours(llavas.original(), keymaps.ORIGINAL).values())
    for keys in (saved, list(model.state_dict())):
        assert keymaps.kind_of(keys) == keymaps.LLAVA_HF
        found = ours(keys, keymaps.HUGGING_FACE)
        assert len(set(found.values())) == len(found) == len(keys)
        assert set(found.values()) == base


def test_the_published_explainer_lands_on_the_names_of_the_explainer():
    from m2f2cli.checkpoints.load import build_empty
    from m2f2cli.models.explainer import ExplainerConfig

    found = ours(llavas.explainer(), keymaps.PUBLISHED)
    above = {n for n in found.values() if f"layers.{llavas.published.BLOCKS - 1}." in n}
    above |= {n for n in found.values() if "post_layernorm" in n}
    above = {n for n in above if n.startswith(keymaps.TOWER_PART)}
    text = {k: v for k, v in llavas.CLIP.items() if "size" not in k or k == "hidden_size"}
    text |= {"intermediate_size": llavas.published.INNER}
    config = ExplainerConfig(
        text_config=llavas.LLAMA,
        detector_config={
            "clip": {"library": "transformers", "vision": llavas.CLIP, "text": text},
            "image_size": llavas.published.SIDE,
        },
    )
    assert set(found.values()) - above == set(build_empty(config).state_dict())


@pytest.mark.parametrize("name", TABLES)
def test_the_inverse_undoes_the_map(name):
    rows = TABLES[name]
    keys = {
        "original": llavas.original,
        "published": llavas.explainer,
        "hugging face": lambda: llavas.hugging_face("4"),
    }[name]()
    kept = [entry.key for entry in keymaps.look_up(keys, rows, what="x") if entry.to is not None]
    renamed = keymaps.rename(keys, rows, what="x")
    back = keymaps.to_published(renamed, rows)
    assert set(back) == set(kept)
    assert all(back[key] is keys[key] for key in kept)


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_no_row_twice(name):
    rows = sorted(row[0] for row in TABLES[name])
    assert all(first != second for first, second in pairwise(rows))


def test_an_unknown_key_is_an_error():
    for rows in TABLES.values():
        with pytest.raises(CheckpointError, match=r"1 tensors .*: model\.image_newline"):
            keymaps.look_up(["model.image_newline"], rows, what="'x'")


def test_a_tensor_under_two_names_is_an_error():
    keys = ["vision_tower.vision_model.x", "vision_tower.x"]
    with pytest.raises(CheckpointError, match="the same tensor twice: vision_tower"):
        keymaps.look_up(keys, keymaps.HUGGING_FACE, what="'x'")


def test_constants_of_older_files_are_dropped():
    keys = [
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
        "deepfake_encoder.clip_text_encoder.model.text_model.embeddings.token_embedding.weight",
    ]
    assert ours(keys, keymaps.PUBLISHED) == {}


def test_modules_of_an_adapter():
    module = keymaps.module_of
    assert module("model.layers.11.mlp.up_proj") == "language_model.model.layers.11.mlp.up_proj"
    inside = "deepfake_encoder.clip_text_encoder.model.text_model.encoder.layers.0.self_attn.q_proj"
    assert module(inside) == "detector.clip.text.encoder.layers.0.self_attn.q_proj"
    with pytest.raises(CheckpointError, match=r"visual\.proj"):
        module("visual.proj")


def test_the_golden_manifest_lands_once():
    keys = manifest("llava_tiny")["tensors"]
    found = ours(keys, keymaps.PUBLISHED)
    assert len(found) == len(keys) - 1  # the word embeddings of the CLIP text tower
