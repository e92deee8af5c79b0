"""The options of training pictures: how they are changed, and which forgeries are made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from m2f2cli.errors import ConfigError
from m2f2cli.options.fields import Options, option

_P = {"low": 0.0, "high": 1.0}


@dataclass(frozen=True)
class AugmentOptions(Options):
    """How training pictures are changed, by ``data.augment.augment``."""

    flip: float = option(0.5, "Share of pictures mirrored (published).", **_P, key=True)
    affine: float = option(0.0, "Share turned, scaled and shifted a little.", **_P, key=True)
    degrees: float = option(8.0, "Largest turn either way, in degrees.", low=0, high=180, key=True)
    zoom: float = option(0.05, "Largest relative change of scale.", low=0, high=0.5, key=True)
    shift: float = option(
        0.03, "Largest shift, as a fraction of the edge.", low=0, high=0.5, key=True
    )
    crop: float = option(0.0, "Share cut to a random square.", **_P, key=True)
    crop_scale: tuple[float, float] = option(
        (0.8, 1.0), "Its edge as a fraction of the picture's.", low=0.05, high=1.0, key=True
    )
    color: float = option(
        0.0, "Share with changed brightness, contrast, saturation and hue.", **_P, key=True
    )
    brightness: float = option(0.2, "Largest relative change of brightness.", **_P, key=True)
    contrast: float = option(0.2, "Largest relative change of contrast.", **_P, key=True)
    saturation: float = option(0.2, "Largest relative change of saturation.", **_P, key=True)
    hue: float = option(0.02, "Largest turn of the hue, in turns.", low=0, high=0.5, key=True)
    blur: float = option(0.1, "Share blurred (published: 0.1).", **_P, key=True)
    blur_sigma: tuple[float, float] = option(
        (0.0, 3.0), "Its deviation in pixels (published: 0 3).", low=0, high=100, key=True
    )
    rescale: float = option(0.0, "Share shrunk and enlarged back.", **_P, key=True)
    rescale_factor: tuple[float, float] = option(
        (0.4, 0.9), "The shrunk size as a fraction.", low=0.01, high=1.0, key=True
    )
    noise: float = option(0.0, "Share with Gaussian noise.", **_P, key=True)
    noise_sigma: tuple[float, float] = option(
        (1.0, 8.0), "Its deviation in levels of 255.", low=0, high=255, key=True
    )
    jpeg: float = option(0.1, "Share compressed as JPEG (published: 0.1).", **_P, key=True)
    jpeg_quality: tuple[int, int] = option(
        (30, 100), "Its quality (published: 30 100).", low=1, high=100, key=True
    )
    resend: float = option(
        0.0,
        "Share put through a messenger, a screenshot or a video, drawn by chance.",
        **_P,
        key=True,
    )
    erase: float = option(0.0, "Share with a rectangle erased.", **_P, key=True)
    erase_area: tuple[float, float] = option(
        (0.02, 0.1), "The rectangle's area as a fraction.", **_P, key=True
    )


@dataclass(frozen=True)
class PseudoFakeOptions(Options):
    """Forgeries made of real pictures, as shares of the forged pictures of an epoch."""

    self_blend: float = option(0.0, "Share made of one real face.", **_P, key=True)
    swap_blend: float = option(
        0.0, "Share made of two real faces of different identities.", **_P, key=True
    )
    mouth_warp: float = option(0.0, "Share made by reshaping the mouth.", **_P, key=True)
    expression_warp: float = option(
        0.0, "Share made by moving mouth, eyes and brows.", **_P, key=True
    )
    pseudo_h264: float = option(
        0.0, "Share of pseudo-fakes compressed as a video frame is (H.264).", **_P, key=True
    )
    pseudo_crf: tuple[int, int] = option(
        (23, 40),
        "Its constant rate factor; FaceForensics++ calls 23 c23 and 40 c40.",
        low=0,
        high=51,
        key=True,
    )

    def check(self) -> None:
        """The shares are parts of one whole."""
        if self.total > 1:
            raise ConfigError(
                "--self-blend, --swap-blend, --mouth-warp and --expression-warp are shares of one "
                f"whole and must add up to at most 1, not {self.total:g}."
            )
        if self.pseudo_h264 and not self.total:
            raise ConfigError(
                "--pseudo-h264 needs pseudo-fakes to compress.", "Give --self-blend 0.3, say."
            )

    @property
    def total(self) -> float:
        """Share of an epoch's forged pictures that are pseudo-fakes, in [0, 1]."""
        return math.fsum(self.shares().values())

    def shares(self) -> dict[str, float]:
        """Share of an epoch's forged pictures by ``data.synthesis.KINDS``."""
        return {
            "self_blend": self.self_blend,
            "swap_blend": self.swap_blend,
            "mouth_warp": self.mouth_warp,
            "expression_warp": self.expression_warp,
        }
