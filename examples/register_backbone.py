"""A backbone of your own: timm learns its name, and a detector is built with it.

python examples/register_backbone.py

In an installed package an entry point makes it known to every m2f2 command (docs/extending.md).
"""

from __future__ import annotations

import tempfile
from itertools import pairwise

import torch
from torch import nn

from m2f2cli import Detector, DetectorConfig

# isort: split
# timm after m2f2cli, which lets it be imported beside a torchvision that does not fit torch.
from timm.models import register_model


class PlainCnn(nn.Module):
    """Strided convolutions, each halving the map. What m2f2 asks of a network is said beside it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                )
                for before, after in pairwise(sizes)
            )
        )
        self.default_cfg = {"classifier": None}  # --backbone-weights FILE: the layer not to load
        self.num_features = sizes[-1]  # always: the width of what forward returns
        self.feature_info = [  # always: the stages, finest first
            {"num_chs": channels, "reduction": 2 ** (number + 1)}
            for number, channels in enumerate(sizes[1:])
        ]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # always
        return self.forward_head(self.stages(pixels))

    def forward_head(self, last: torch.Tensor) -> torch.Tensor:  # with a bridge
        return last.mean(dim=(2, 3))

    def forward_intermediates(  # with a bridge
        self, pixels: torch.Tensor, indices: list[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        maps = []
        for stage in self.stages:
            pixels = stage(pixels)
            maps.append(pixels)
        return pixels, [maps[number] for number in indices]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:  # --freeze-stages
        return {"stem": r"^stages\.0", "blocks": r"^stages\.(\d+)"}


@register_model
def plain_cnn(width: int = 16, **_: object) -> PlainCnn:
    """timm's name for it is the function's; what timm says besides is of no use here."""
    return PlainCnn(width)


def main() -> None:
    config = DetectorConfig(
        backbone="plain_cnn", backbone_kwargs={"width": 8}, hidden_size=32, image_size=64
    )
    detector = Detector(config).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = detector(pixels).logits
    print(f"{sum(p.numel() for p in detector.backbone.parameters()):,} parameters in the backbone")
    print("logits (real, fake):", *(f"{real:.3f} {fake:.3f}" for real, fake in logits.tolist()))
    with tempfile.TemporaryDirectory() as folder:
        detector.save_pretrained(folder)
        with torch.no_grad():
            again = Detector.from_pretrained(folder).eval()(pixels).logits
    difference = (logits - again).abs().max().item()
    print(f"saved and loaded, the logits differ by at most {difference:.0e}")


if __name__ == "__main__":
    main()
