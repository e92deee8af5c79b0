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


def test_the_text_feature_follows_every_way_of_changing_its_weights():
    """Fused optimizers and ``param.data`` change weights without a trace on the tensor."""
    model = build()
    seen = []

    def judged() -> torch.Tensor:
        with torch.no_grad():
            seen.append(model(pixels(1)).logits)
        assert not any(torch.equal(seen[-1], earlier) for earlier in seen[:-1])

    judged()
    with torch.no_grad():
        model.forgery_prompt.tokens[:, 0].zero_()
    judged()
    model.text_proj[0].weight.data *= torch.rand(20, 1)
    judged()
    text = list(model.clip.text.parameters())
    optimizer = torch.optim.AdamW(text, lr=0.1, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(pixels(2), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        judged()


def test_kinds_of_forgery_have_a_logit_each_and_the_largest_counts():
    model = build(kinds=["swapped or edited", "generated"])
    with torch.no_grad():
        model.head.bias -= model(pixels(8)).kind_logits.mean(0)
        out = model(pixels(8), labels=torch.tensor([0, 1] * 4))
    assert out.kind_logits.shape == (8, 2)
    assert len(set(out.kind_logits.argmax(1).tolist())) == 2
    assert torch.equal(out.logits[:, 1], out.kind_logits.amax(1))
    assert torch.equal(out.logits[:, 0], torch.zeros(8))
    expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 1] * 4))
    assert torch.allclose(out.loss, expected)


def test_the_leading_kind_and_how_far_it_leads():
    logits = torch.tensor([[1.0, -1.0, 0.5], [-4.0, 2.0, 0.0], [3.0, 3.0, 3.0]])
    three = build(kinds=["swapped", "edited", "generated"])
    assert three.leading_kinds(logits) == [("swapped", 0.5), ("edited", 2.0), ("swapped", 0.0)]
    for few in (["generated"], None):
        assert build(kinds=few).leading_kinds(logits[:, :1]) == [None] * 3


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf"), "wide", [1]])
def test_an_impossible_margin_of_kinds_is_refused(margin):
    with pytest.raises(ConfigError, match="kind_margin"):
        DetectorConfig(**tiny_fields(kind_margin=margin))
    assert DetectorConfig(**tiny_fields(kind_margin=0)).kind_margin == 0


@pytest.mark.parametrize("forgery_map", [True, False])
def test_a_detector_of_clip_alone_reads_several_blocks(forgery_map, tmp_path):
    spec = {k: v for k, v in tiny_fields()["clip"].items() if k != "text"}
    model = build(
        backbone=None, clip=spec, clip_blocks=[1, 2], head_normalize=True, forgery_map=forgery_map
    )
    out = model(pixels(3))
    grid, width = TINY_SIDE // 8, model.clip.vision.width
    assert out.features.shape == (3, forgery_map * grid**2 + 4 * width)
    assert torch.allclose(out.features.norm(dim=1), torch.ones(3), atol=1e-5)
    assert out.pooled is None
    assert (out.forgery_map is not None) == forgery_map
    assert model.clip.text is None
    with torch.no_grad():
        states = model.clip(pixels(3), [1, 2])[1]
        last = model.block_norms[3](states[1][:, 1:].mean(1))
    length = out.features[:, -width:] / last
    assert torch.allclose(length, length.mean(1, keepdim=True).expand_as(length), rtol=1e-3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            Detector.from_pretrained(tmp_path)(pixels(3)).logits, model(pixels(3)).logits
        )


def test_a_bridge_without_a_backbone_is_refused():
    with pytest.raises(ConfigError, match="needs a backbone"):
        build(backbone=None, bridge=BRIDGE)


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
