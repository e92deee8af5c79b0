"""MTCNN: a face finder with five landmarks, behind dlib's; three small networks in torch.

Zhang et al., "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks",
2016 (arXiv 1604.02878), with the weights of facenet-pytorch 2.6.0 (MIT; ``assets/mtcnn``). The
first network scans a pyramid of the picture for faces of 12 pixels, the second and third look at
what is left at 24 and 48 pixels; each scores a window and moves it onto the face.

Coordinates are x0, y0, x1, y1 in pixels, x1 and y1 exclusive. torch is imported when first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

WINDOW = 12  # pixels, what the first network looks at
_STRIDE = 2  # between two of its windows
_PYRAMID = 0.709  # of two levels: half the area
_THRESHOLDS = (0.6, 0.7)  # of the first two networks, as published
# Max pooling after each convolution, 0 for none; stride 2, borders included.
_POOLS = {"pnet": (2, 0, 0), "rnet": (3, 3, 0), "onet": (3, 3, 2, 0)}


class Find(NamedTuple):
    """A face.

    Attributes:
        box: float64 (4,), from the forehead to the chin, between the ears.
        score: Probability that it is one, in [0, 1].
        landmarks: float64 (5, 2), x and y of the eyes, the nose and the corners of the mouth; what
            is left in the picture comes first.
    """

    box: np.ndarray
    score: float
    landmarks: np.ndarray


def find(pixels: np.ndarray, *, smallest: float, score: float) -> list[Find]:
    """Find upright faces, the surest first.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        smallest: Side in pixels from which faces are sought, at least ``WINDOW``.
        score: From which a find counts, in [0, 1].
    """
    import torch

    with torch.inference_mode():
        picture = _picture(pixels)
        boxes, scores = _scan(picture, max(smallest, WINDOW))
        kept = _suppress(boxes, scores, 0.7)
        boxes = _square(boxes[kept])
        if len(boxes):
            scores, offsets, _ = _look("rnet", picture, boxes, 24)
            kept = _suppress(boxes, np.where(scores >= _THRESHOLDS[1], scores, 0), 0.7)
            boxes = _square(_moved(boxes[kept], offsets[kept]))
        if not len(boxes):
            return []
        scores, offsets, landmarks = _look("onet", picture, boxes, 48)
    moved = _moved(boxes, offsets)
    kept = _suppress(moved, np.where(scores >= score, scores, 0), 0.7, inside=True)
    return [Find(moved[i], float(scores[i]), _placed(landmarks[i], boxes[i])) for i in kept]


def mark(pixels: np.ndarray, box: Sequence[float]) -> Find:
    """Look once more at a face whose box is known, for its landmarks.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        box: As this finder draws boxes.
    """
    import torch

    squares = _square(np.asarray([box], dtype=np.float64))
    with torch.inference_mode():
        picture = _picture(pixels)
        scores, offsets, landmarks = _look("onet", picture, squares, 48)
    moved = _moved(squares, offsets)[0]
    return Find(moved, float(scores[0]), _placed(landmarks[0], squares[0]))


@lru_cache(maxsize=1)
def _weights() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(str(files("m2f2cli") / "assets" / "mtcnn" / "model.safetensors"))


def _picture(pixels: np.ndarray) -> torch.Tensor:
    """float32 (1, 3, H, W), about -1 to 1."""
    import torch

    values = (pixels.astype(np.float32) - 127.5) / 128
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]


def _run(net: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a network says of (B, 3, H, W): ``score``, ``offsets`` and, the third, ``landmarks``."""
    from torch.nn import functional

    weights = _weights()

    def layer(name: str, values: torch.Tensor) -> torch.Tensor:
        weight, bias = weights[f"{net}.{name}.weight"], weights[f"{net}.{name}.bias"]
        if weight.ndim == 4:
            return functional.conv2d(values, weight, bias)
        return functional.linear(values.flatten(1), weight, bias)

    for number, pool in enumerate(_POOLS[net], 1):
        values = functional.prelu(layer(f"conv{number}", values), weights[f"{net}.slopes{number}"])
        if pool:
            values = functional.max_pool2d(values, pool, 2, ceil_mode=True)
    if f"{net}.dense_slopes" in weights:
        values = functional.prelu(layer("dense", values), weights[f"{net}.dense_slopes"])
    heads = ("score", "offsets", "landmarks") if net == "onet" else ("score", "offsets")
    return {head: layer(head, values) for head in heads}


def _scan(picture: torch.Tensor, smallest: float) -> tuple[np.ndarray, np.ndarray]:
    """The first network's boxes (N, 4) and scores (N,) over all levels of the pyramid."""
    from torch.nn import functional

    height, width = picture.shape[2:]
    boxes, scores = [np.zeros((0, 4))], [np.zeros(0)]
    scale = WINDOW / smallest
    while min(height, width) * scale >= WINDOW:
        size = (round(height * scale), round(width * scale))
        said = _run("pnet", functional.interpolate(picture, size=size, mode="area"))
        chances = said["score"].softmax(1)[0, 1].double().numpy()
        rows, columns = np.nonzero(chances >= _THRESHOLDS[0])
        corners = np.stack([columns, rows], 1) * float(_STRIDE)
        level = np.concatenate([corners, corners + WINDOW], 1)
        level *= (width / size[1], height / size[0]) * 2
        chances = chances[rows, columns]
        offsets = said["offsets"][0].double().numpy()[:, rows, columns].T
        kept = _suppress(level, chances, 0.5)
        boxes.append(_moved(level[kept], offsets[kept]))
        scores.append(chances[kept])
        scale *= _PYRAMID
    return np.concatenate(boxes), np.concatenate(scores)


def _look(
    net: str, picture: torch.Tensor, boxes: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (N,), offsets (N, 4) and landmarks (N, 10) of a network about boxes (N, 4)."""
    import torch
    from torch.nn import functional

    height, width = picture.shape[2:]
    cuts = []
    for box in np.rint(boxes).astype(int):
        x0, y0 = np.clip(box[:2], 0, (width - 1, height - 1))
        x1, y1 = max(x0 + 1, min(box[2], width)), max(y0 + 1, min(box[3], height))
        cut = picture[:, :, y0:y1, x0:x1]
        cuts.append(functional.interpolate(cut, size=(side, side), mode="area"))
    said = _run(net, torch.cat(cuts))
    chances = said["score"].softmax(1)[:, 1].double().numpy()
    landmarks = said.get("landmarks", said["offsets"])
    return chances, said["offsets"].double().numpy(), landmarks.double().numpy()


def _moved(boxes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) whose edges are moved by shares (N, 4) of their sides."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return boxes + offsets * np.concatenate([sides, sides], 1)


def _square(boxes: np.ndarray) -> np.ndarray:
    """The squares of the longer sides about the same centers."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True) / 2
    return np.concatenate([centers - half, centers + half], 1)


def _placed(landmarks: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Landmarks (10,), five x and five y as shares of a box, in pixels (5, 2)."""
    return box[:2] + landmarks.reshape(2, 5).T * (box[2:] - box[:2])


def _suppress(
    boxes: np.ndarray, scores: np.ndarray, limit: float, *, inside: bool = False
) -> list[int]:
    """The boxes that no surer one overlaps by more than ``limit``; a score of 0 counts for none.

    Overlap is intersection over union, or with ``inside`` over the smaller of the two areas.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    order = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > 0]
    left = np.array(order, dtype=int)
    kept = []
    while len(left):
        best, left = int(left[0]), left[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[left, :2])
        high = np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        whole = (
            np.minimum(areas[best], areas[left]) if inside else areas[best] + areas[left] - shared
        )
        left = left[shared <= limit * whole]
    return kept
