from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f2cli.errors import ConfigError
from m2f2cli.models.detector import Detector, DetectorConfig
from tests.conftest import TINY_SIDE, randomise, tiny_fields

BRIDGE = {"width": 16, "heads": 2, "size": 6, "clip_layers": [1, 2, 2]}


def build(**changes) -> Detector:
    model = Detector(DetectorConfig(**tiny_fields(**changes)))
    return randomise(model).eval()


@pytest.fixture(scope="module")
def whole() -> Detector:
    return build(bridge=BRIDGE)


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, TINY_SIDE, TINY_SIDE, generator=generator)


def test_forward_shapes_and_loss(whole):
    out = whole(pixels(3), labels=torch.tensor([0, 1, 1]))
    grid = TINY_SIDE // 8
    assert out.logits.shape == (3, 2)
    assert out.forgery_map.shape == (3, grid, grid)
    assert out.features.shape == (3, grid**2 + 2 * 20 + 6)
    assert out.forgery_map.abs().max() <= 1
    expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 1, 1]))
    assert torch.allclose(out.loss, expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.data())
def test_a_verdict_never_depends_on_its_batch_mates(whole, seed, count, data):
    batch = pixels(count, seed)
    place = data.draw(st.integers(0, count - 1))
    with torch.no_grad():
        alone, among = whole(batch[place : place + 1]), whole(batch)
    assert torch.allclose(alone.logits[0], among.logits[place], atol=1e-5)
    assert torch.allclose(alone.forgery_map[0], among.forgery_map[place], atol=1e-5)


def test_every_parameter_gets_a_gradient(whole):
    model = build(bridge=BRIDGE).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(pixels(4), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    # Attention is blind to a shift of all keys by one vector, so key biases have none.
    silent = [
        name
        for name, p in model.named_parameters()
        if (p.grad is None or not p.grad.abs().max() > 0) and not name.endswith("k_proj.bias")
    ]
    assert silent == []


def test_the_text_feature_is_computed_once_and_follows_its_weights():
    model, calls = build(), []
    model.clip.text.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = model(pixels(1)).logits
        model(pixels(2))
        assert len(calls) == 1
        model.forgery_prompt.tokens[:, 0].zero_()
        changed = model(pixels(1)).logits
    assert len(calls) == 2
    assert not torch.equal(first, changed)
    model(pixels(1))
    assert len(calls) == 3, "with gradients the text part must run"


def test_frozen_parts_stay_in_evaluation_mode():
    model = build()
    model.requires_grad_(True)
    model.backbone.requires_grad_(False)
    model.train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    model(pixels(4))
    assert not model.backbone.training
    assert model.head.training
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


def test_save_and_load_with_transformers_gives_equal_numbers(whole, tmp_path):
    whole.save_pretrained(tmp_path)
    again, report = Detector.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels(2)).logits, whole(pixels(2)).logits)
    assert again.config.clip == whole.config.clip


def test_dtype_follows_the_caller(whole):
    model = build().bfloat16()
    out = model(pixels(2).bfloat16())
    assert out.logits.dtype == torch.bfloat16
    assert model.fake_probability(out.logits).dtype == torch.float32


def test_temperature_softens_the_probability():
    model = build(score_temperature=2.0)
    logits = torch.tensor([[0.0, 4.0]])
    assert model.fake_probability(logits).item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)))


def test_without_a_forgery_map_there_is_no_text_part():
    model = build(forgery_map=False)
    out = model(pixels(1))
    assert out.forgery_map is None
    assert not any("text" in k or "prompt" in k for k in model.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "efficientnet_b99"}, "no backbone named 'efficientnet_b99'"),
        ({"bridge": {**BRIDGE, "heads": 3}}, "not a multiple"),
    ],
)
def test_impossible_settings_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        build(**changes)
