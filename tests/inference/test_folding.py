from __future__ import annotations

import pytest
import torch

from m2f2cli.inference.folding import fold_batch_norms
from m2f2cli.models.backbone import Backbone
from tests.conftest import randomise


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
