"""Crops to numbers: batches through the network, equal crops once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from m2f2cli.data.transforms import normalize
from m2f2cli.errors import M2F2Error
from m2f2cli.inference.prepare import Crop
from m2f2cli.inference.verdict import DIGITS

if TYPE_CHECKING:
    import torch

_REMEMBERED = 65_536  # crops whose scores are kept for another appearance
AT_ONCE_ON_CPU = 4  # crops; the feature maps of more outgrow its cache


class Judge(Protocol):
    """What the pipeline asks of a model; ``models.detector.Detector`` is one."""

    config: Any
    fingerprint: str | None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        """Give ``logits`` and ``forgery_map`` of (B, 3, S, S) pictures."""

    def fake_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, 2), order (real, fake), to (B,) float32 in [0, 1]."""


class Score(NamedTuple):
    """What the model says of one crop.

    Attributes:
        fake_probability: In [0, 1], rounded to ``verdict.DIGITS``.
        domain_distance: 0 or more, rounded alike; None where it has no check.
        forgery_map: float32 (g, g), cosines in [-1, 1]; None when absent or not asked for.
    """

    fake_probability: float
    domain_distance: float | None = None
    forgery_map: np.ndarray | None = None


class Scorer:
    """Scores crops and remembers the scores.

    Args:
        model: A detector in evaluation mode.
        maps: Keep the forgery maps.
    """

    def __init__(self, model: Judge, *, maps: bool = False) -> None:
        self.model = model
        self.maps = maps
        self._known: OrderedDict[bytes, Score] = OrderedDict()

    def known(self, crop: Crop) -> Score | None:
        """The score of an equal crop seen before."""
        return self._known.get(crop.digest)

    def score(self, crops: Sequence[Crop]) -> list[Score]:
        """Judge crops; a GPU takes them in one batch.

        Args:
            crops: At least one, all of the model's input size.

        Raises:
            M2F2Error: The model answers with something that is no number.
        """
        import torch

        config = self.model.config
        pixels = np.stack(
            [normalize(crop.pixels, config.image_mean, config.image_std) for crop in crops]
        )
        values = torch.from_numpy(pixels).to(self.model.device, self.model.dtype)
        at_once = AT_ONCE_ON_CPU if values.device.type == "cpu" else len(values)
        probabilities: list[float] = []
        maps: list[np.ndarray] = []
        with torch.inference_mode():
            for some in values.split(at_once):
                out = self.model(pixel_values=some)
                probabilities += self.model.fake_probability(out.logits).tolist()
                if self.maps and out.forgery_map is not None:
                    maps += list(out.forgery_map.float().cpu().numpy())
        scores = []
        for place, crop in enumerate(crops):
            score = score_of(crop, probabilities[place], maps[place] if maps else None)
            self._remember(crop.digest, score)
            scores.append(score)
        return scores

    def _remember(self, digest: bytes, score: Score) -> None:
        self._known[digest] = score
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


def score_of(crop: Crop, probability: float, forgery_map: np.ndarray | None = None) -> Score:
    """What a model said of a crop, checked and rounded.

    Args:
        crop: Of which it was said.
        probability: Of being fake, as the model gave it.
        forgery_map: As in ``Score``.

    Raises:
        M2F2Error: The probability is no number.
    """
    if not 0 <= probability <= 1:
        raise M2F2Error(
            "The model's answer is not a number.", "Try --dtype float32 or another model."
        )
    distance = crop.domain_distance
    rounded = None if distance is None else round(distance, DIGITS)
    return Score(round(probability, DIGITS), rounded, forgery_map)
