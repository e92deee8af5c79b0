from __future__ import annotations

import pytest
import torch

from m2f2cli.checkpoints.load import load_detector
from m2f2cli.compat import can_pack
from m2f2cli.inference.optimize_cpu import (
    PackedConvolution,
    PackedLinear,
    few_heads_attention,
    fold_batch_norms,
    optimize_convolutions,
    optimize_for_cpu,
)
from m2f2cli.models.backbone import Backbone
from tests.conftest import TINY_SIDE, randomise


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("tf_efficientnet_lite0", 49),
        ("efficientnet_lite0", 49),
        ("test_efficientnet", 13),
        ("efficientnet_b0", 49),
    ],
)
def test_a_folded_network_answers_the_same(name: str, folded: int) -> None:
    backbone = randomise(Backbone(name)).eval()
    pictures = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before, _ = backbone(pictures)
        assert fold_batch_norms(backbone.net) == folded
        after, _ = backbone(pictures)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in backbone.modules())
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("size", [96, 100])  # evenly halved, or not
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "efficientnet_lite0", "efficientnet_b0"])
def test_optimized_convolutions_answer_the_same(name: str, size: int) -> None:
    backbone = randomise(Backbone(name)).eval()
    fold_batch_norms(backbone.net)
    pictures = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before, _ = backbone(pictures)
        backbone.net = optimize_convolutions(backbone.net, size)
        after, _ = backbone(pictures)
    if can_pack(torch.float32):
        assert any(isinstance(part, PackedConvolution) for part in backbone.modules())
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("change", ["train", "bfloat16", "densenet"])
def test_what_folding_would_change_is_left_alone(change: str) -> None:
    backbone = Backbone("densenet121" if change == "densenet" else "test_efficientnet").eval()
    if change == "train":
        backbone.train()
    if change == "bfloat16":
        backbone.to(torch.bfloat16)
    keys = set(backbone.state_dict())
    assert fold_batch_norms(backbone.net) == 0
    assert set(backbone.state_dict()) == keys


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_an_optimized_detector_answers_the_same(tiny_detector_folder, dtype, allowed) -> None:
    plain = load_detector(str(tiny_detector_folder), device="cpu", dtype="float32")
    quick = optimize_for_cpu(load_detector(str(tiny_detector_folder), device="cpu", dtype=dtype))
    pictures = torch.randn(3, 3, TINY_SIDE, TINY_SIDE, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = plain(pictures)
        found = quick(pictures.to(quick.dtype))
    assert isinstance(quick.clip.vision.encoder.layers[0].mlp.activation_fn, torch.nn.SiLU)
    probability = plain.fake_probability(expected.logits)
    assert (quick.fake_probability(found.logits) - probability).abs().max() <= allowed
    assert (found.forgery_map.float() - expected.forgery_map).abs().max() <= allowed


def test_attention_in_slices_is_attention() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 6, 9, 8, generator=generator) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    found, _ = few_heads_attention(torch.nn.Identity(), query, key, value, None, scaling=0.3)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "swish"])
def test_a_packed_linear_layer_answers_the_same(dtype: torch.dtype, activation: str) -> None:
    if not can_pack(dtype):
        pytest.skip("this torch or CPU packs no such layers")
    linear = torch.nn.Linear(512, 96).to(dtype)
    values = torch.randn(2, 7, 512, generator=torch.Generator().manual_seed(4)).to(dtype)
    with torch.inference_mode():
        expected = linear(values)
        if activation == "swish":
            expected = torch.nn.functional.silu(expected)
        found = PackedLinear(linear, rows=14, activation=activation)(values)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found, expected, atol=allowed, rtol=allowed)
