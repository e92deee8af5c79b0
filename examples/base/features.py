"""Features of a fixed CLIP tower for several random draws of every picture, on a CPU.

    python examples/base/features.py FACES DDVQA ACTORS.json TOWER OUTPUT [WORKER WORKERS]

Of each tower block in BLOCKS the class token and the mean of the patches, standardized each (a
LayerNorm without weights). Goes on where it stopped; several workers share the work. About a tenth
of a second a draw on a core that multiplies bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path

from m2f2cli.runtime import cure_torchvision

cure_torchvision()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from pictures import list_draws, read_pictures  # noqa: E402
from torch.nn.functional import layer_norm  # noqa: E402

from m2f2cli.data.transforms import normalize  # noqa: E402
from m2f2cli.models.clip import ClipTower, VisionPart, load_clip  # noqa: E402
from m2f2cli.models.detector import CLIP_MEAN, CLIP_STD  # noqa: E402

BLOCKS = (4, 6, 8, 9, 10)
_PART, _BATCH = 256, 16


def tower(folder: Path) -> VisionPart:
    """The tower in bfloat16, cut after the last block read."""
    spec, tensors = load_clip(str(folder))
    clip = ClipTower(spec, max(BLOCKS), text=False)
    clip.load_state_dict({name: tensors[name] for name in clip.state_dict()})
    return clip.vision.to(torch.bfloat16).eval()


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 (224, 224, 3) each to (N, 3, 224, 224), bfloat16."""
    values = [normalize(pixels, CLIP_MEAN, CLIP_STD) for pixels in pictures]
    return torch.from_numpy(np.stack(values)).to(torch.bfloat16)


def read_blocks(part: VisionPart, pixels: torch.Tensor) -> torch.Tensor:
    """(N, blocks, 2, width): class token and patch mean, standardized, float32."""
    with torch.inference_mode():
        states = part(pixels, BLOCKS)
    parts = [torch.stack([s[:, 0].float(), s[:, 1:].float().mean(1)], 1) for s in states]
    found = torch.stack(parts, 1)
    return layer_norm(found, found.shape[-1:])


def main(faces: Path, ddvqa: Path, actors: Path, folder: Path, output: Path, *share: str) -> None:
    """Write one file for every 256 draws: ``features`` float16, and what they are of."""
    worker, workers = map(int, share or ("0", "1"))
    torch.set_num_threads(1 if workers > 1 else torch.get_num_threads())
    draws = list_draws(read_pictures(faces, ddvqa, actors))
    part = tower(folder)
    output.mkdir(parents=True, exist_ok=True)
    for first in range(worker * _PART, len(draws), workers * _PART):
        path = output / f"{first:06d}.npz"
        if path.exists():
            continue
        some, found = draws[first : first + _PART], []
        for start in range(0, len(some), _BATCH):
            batch = [one.pixels() for one in some[start : start + _BATCH]]
            found.append(read_blocks(part, to_tensor(batch)).half().numpy())
        temporary = path.with_suffix(".partial.npz")
        np.savez(
            temporary,
            features=np.concatenate(found),
            path=[str(one.picture.path) for one in some],
            seed=[one.seed for one in some],
            other=[str(one.other.path) if one.other else "" for one in some],
        )
        temporary.rename(path)
        print(f"{first + len(some)} of {len(draws)}", flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:6]), *sys.argv[6:8])
