"""Loading an explainer: every tensor accounted for, and only the language model quantised."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from m2f2cli.checkpoints import load
from m2f2cli.checkpoints.load import (
    KEPT_FLOAT,
    build_empty,
    load_explainer,
    pick_attention,
    quantization_config,
)
from m2f2cli.errors import CheckpointError, MissingExtraError, UsageError
from m2f2cli.models.conversation import VICUNA_V1, Turn
from m2f2cli.models.processing import ExplainerProcessor
from tests.conftest import tiny_fields
from tests.models.explainers import (
    logits_of,
    picture,
    tiny_config,
    tiny_processor,
    write_explainer,
)

JUDGE = VICUNA_V1.render([Turn(VICUNA_V1.judgement())])[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explainer") / "tiny"
    return folder, write_explainer(folder, template="ddvqa")


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_what_is_loaded_is_what_was_written(written, device_map):
    folder, model = written
    loaded, found = load_explainer(str(folder), device="cpu", device_map=device_map)
    assert found == folder
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.fingerprint.startswith("sha256:")
    process = ExplainerProcessor.from_folder(folder, loaded.config)
    assert process.template.name == "ddvqa"
    batch = process(JUDGE, [tiny_processor().view(picture(1))])
    assert torch.allclose(logits_of(loaded, batch), logits_of(model, batch), atol=1e-6)


def test_half_precision_follows_the_caller(written):
    folder, model = written
    loaded, _ = load_explainer(str(folder), device="cpu", dtype="bfloat16")
    kinds = {v.dtype for v in loaded.state_dict().values() if v.is_floating_point()}
    assert kinds == {torch.bfloat16}
    batch = tiny_processor()(JUDGE, [picture(1)])
    found = logits_of(loaded, batch.to(torch.bfloat16)).float()
    batch = tiny_processor()(JUDGE, [picture(1)])
    assert torch.allclose(found, logits_of(model, batch), atol=0.2)


def test_a_backbone_with_unsaved_buffers(tmp_path):
    """Such buffers are in no checkpoint, so a model built without storage has to make them."""
    fields = {
        "backbone": "swin_tiny_patch4_window7_224",
        "backbone_kwargs": {
            "img_size": 32,
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 1, 1],
            "window_size": 2,
        },
    }
    config = tiny_config()
    config.detector_config = type(config.detector_config)(**tiny_fields(**fields))
    from m2f2cli.checkpoints import io
    from m2f2cli.models.explainer import Explainer
    from tests.conftest import randomise

    model = randomise(Explainer(config)).eval()
    names = [n for n, _ in model.named_buffers() if n not in model.state_dict()]
    assert any(name.startswith("detector.backbone") for name in names)
    folder = tmp_path / "swin"
    plain = json.loads(config.to_json_string(use_diff=False))
    io.write_checkpoint(folder, config=plain, tensors=model.state_dict(), stage={"stage": "t"})
    loaded, _ = load_explainer(str(folder), device="cpu")
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[n], b) for n, b in model.named_buffers())
    batch = tiny_processor()(JUDGE, [picture(1)])
    assert torch.allclose(logits_of(loaded, batch), logits_of(model, batch), atol=1e-6)


def drop(name):
    return lambda tensors: tensors.pop(name)


def widen(tensors):
    tensors["mm_projector.0.weight"] = torch.zeros(32, 25)


def rename(tensors):
    tensors["language_model.model.norm.bias"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop("forgery_projector.0.bias"), "1 missing: forgery_projector.0.bias"),
        (drop("language_model.lm_head.weight"), "1 missing: language_model.lm_head.weight"),
        (rename, "1 unexpected: language_model.model.norm.bias"),
        (widen, "tower .* is 24 wide, but the language model's projector .* one of 25"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, sentence):
    write_explainer(tmp_path / "bad", change=change)
    with pytest.raises(CheckpointError, match=sentence):
        load_explainer(str(tmp_path / "bad"), device="cpu")


@pytest.mark.parametrize(
    ("kind", "sentence", "hint"),
    [
        ("m2f2_detector", "holds a detector", "m2f2 init-llava"),
        ("llava_llama", "type 'llava_llama', not an explainer", "m2f2 import"),
        (None, "type 'None', not an explainer", "m2f2 info"),
    ],
)
def test_other_models_are_refused(tmp_path, kind, sentence, hint):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=sentence) as error:
        load_explainer(str(tmp_path), device="cpu")
    assert hint in error.value.hint


def test_only_the_language_models_layers_are_quantised():
    model = build_empty(tiny_config())
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    converted = {n for n in linear if should_convert_module(n, list(KEPT_FLOAT))}
    layers = {n for n in linear if n.startswith("language_model.model.layers.")}
    assert converted == layers
    assert len(layers) == 2 * 7


def test_quantised_loading_asks_for_what_it_needs(monkeypatch):
    assert quantization_config(None, torch.float32) is None
    with pytest.raises(UsageError, match="quantization '3bit'"):
        quantization_config("3bit", torch.float32)
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as error:
        quantization_config("4bit", torch.float32)
    assert error.value.hint == "pip install 'm2f2cli[quant]'"
    monkeypatch.setattr(load, "find_spec", lambda name: object())
    four, eight = (quantization_config(k, torch.bfloat16) for k in ("4bit", "8bit"))
    assert four.load_in_4bit
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert eight.load_in_8bit
    assert four.llm_int8_skip_modules == eight.llm_int8_skip_modules == list(KEPT_FLOAT)


def test_flash_attention_where_it_can_run(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(load, "find_spec", lambda name: object())
    flash = pick_attention("auto", cuda, torch.bfloat16)
    assert flash == {
        "": "flash_attention_2",
        "text_config": "flash_attention_2",
        "detector_config": "sdpa",
    }
    assert pick_attention("auto", cuda, torch.float32)["text_config"] == "sdpa"
    assert pick_attention("auto", cpu, torch.bfloat16)["text_config"] == "sdpa"
    assert pick_attention("eager", cuda, torch.bfloat16)["text_config"] == "eager"
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    assert pick_attention("auto", cuda, torch.bfloat16)["text_config"] == "sdpa"


def test_attention_reaches_the_language_model_alone(written):
    loaded, _ = load_explainer(str(written[0]), device="cpu", attention="eager")
    assert loaded.language_model.config._attn_implementation == "eager"
    assert loaded.detector.config._attn_implementation == "sdpa"
