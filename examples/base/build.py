"""Train a detector's head, forgery map and domain check on a fixed tower.

    python examples/base/build.py FACES DDVQA ACTORS.json TOWER FEATURES OUTPUT

A hidden layer and a logit for each kind of forgery: one kind need not look like the other.
``calibrate.py`` is the next step.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

from m2f2cli.runtime import cure_torchvision, seed_everything

cure_torchvision()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from features import BLOCKS, to_tensor, tower  # noqa: E402
from pictures import KINDS, SIDE, Draw, Picture, draw, draw_forgery, load, read_pictures  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from m2f2cli.checkpoints import io  # noqa: E402
from m2f2cli.files import json_bytes  # noqa: E402
from m2f2cli.metrics import roc_auc  # noqa: E402
from m2f2cli.models.clip import load_clip  # noqa: E402
from m2f2cli.models.detector import Detector, DetectorConfig  # noqa: E402
from m2f2cli.models.domain import Domain  # noqa: E402
from m2f2cli.models.forgery_prompt import forgery_map  # noqa: E402

LICENSE = (
    "Research and non-commercial use only: learned from DFDC, FFHQ and FaceForensics++ pictures."
)
HIDDEN, EPOCHS, BATCH, RATE, DECAY = 256, 12, 256, 5e-4, 1e-2
DROPOUT = (0.25, 0.5)  # of the features and of the hidden layer
OTHERS = 0.2  # what a source counts against the generated pictures
FORGED = 0.3  # what pseudo-forgeries count beside a source of forgeries
MAP_PICTURES, MAP_WIDTH = 1200, 256
DOMAIN_PICTURES = 2048


def read_draws(folder: Path, pictures: list[Picture]) -> tuple[list[Draw], torch.Tensor]:
    """What features.py wrote: draws, and float16 (N, blocks, 2, width)."""
    of = {str(picture.path): picture for picture in pictures}
    files = [np.load(path) for path in sorted(folder.glob("[0-9]*[0-9].npz"))]
    columns = ("path", "seed", "other")
    path, seed, other = (np.concatenate([f[name] for f in files]).tolist() for name in columns)
    draws = [Draw(of[p], s, of.get(o)) for p, s, o in zip(path, seed, other, strict=True)]
    return draws, torch.from_numpy(np.concatenate([file["features"] for file in files]))


class Features:
    """Draws: ``x`` float32 (N, F), standardized; ``kind`` and ``split`` (N,), ``source`` (N,)."""

    def __init__(self, x: torch.Tensor, draws: list[Draw]) -> None:
        self.kind = torch.tensor([one.kind for one in draws])
        self.source = np.array([one.source for one in draws])
        self.split = np.array([one.picture.split for one in draws])
        self.train = torch.from_numpy(self.split == "train")
        self.mean, self.spread = x[self.train].mean(0), x[self.train].std(0) + 1e-3
        self.x = (x - self.mean) / self.spread

    def weights(self, kind: int) -> torch.Tensor:
        """(N,) float32: sources and classes count alike, against generated pictures less."""
        found = torch.zeros(len(self.kind))
        for source in np.unique(self.source):
            for label in range(1 + len(KINDS)):
                here = self.train & (self.kind == label) & torch.from_numpy(self.source == source)
                if kind == 1 and label == 2:  # a generated face may or may not look edited
                    continue
                if here.any():
                    counts = 1.0 if kind == 1 or label == kind else OTHERS
                    found[here] = counts * (FORGED if source == "forged" else 1) / here.sum()
        return found / found.sum()


def train_head(data: Features, seed: int = 0) -> nn.Sequential:
    """Two layers on standardized features, dropout between."""
    seed_everything(seed)
    head = nn.Sequential(
        nn.Dropout(DROPOUT[0]),
        nn.Linear(data.x.shape[1], HIDDEN),
        nn.GELU(),
        nn.Dropout(DROPOUT[1]),
        nn.Linear(HIDDEN, len(KINDS)),
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    rows = data.train.nonzero().flatten()
    weight = torch.stack([data.weights(1 + k) for k in range(len(KINDS))], 1) * len(rows)
    target = torch.stack([data.kind == 1 + k for k in range(len(KINDS))], 1).float()
    steps = EPOCHS * (len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in rows[torch.randperm(len(rows))].split(BATCH)[: len(rows) // BATCH]:
            with torch.autocast("cpu", torch.bfloat16):
                scores = head(data.x[batch])
            each = functional.binary_cross_entropy_with_logits(
                scores.float(), target[batch], reduction="none"
            )
            optimizer.zero_grad()
            (weight[batch] * each).mean().backward()
            optimizer.step()
            schedule.step()
    return head.eval()


def train_map(detector: Detector, genuine: list[Picture], folder: Path) -> None:
    """Let the forgery prompt tell forged patches of pseudo-forgeries from genuine ones."""
    part, rng = tower(folder), random.Random(1)
    pixels, masks = [], []
    for _ in range(MAP_PICTURES):
        base = rng.choice(genuine)
        other = rng.choice([picture for picture in genuine if picture.source == base.source])
        made, mask = draw_forgery(base, other, rng)
        pixels.append(made)
        masks.append(mask)
    for picture in rng.sample(genuine, MAP_PICTURES):
        pixels.append(draw(load(picture.path), picture.source, rng))
        masks.append(np.zeros((SIDE, SIDE), np.float32))
    with torch.inference_mode():
        some = (to_tensor(pixels[i : i + 16]) for i in range(0, len(pixels), 16))
        patches = torch.cat([part(x, [max(BLOCKS)])[0][:, 1:] for x in some])
    grid = part.grid
    target = functional.adaptive_avg_pool2d(torch.from_numpy(np.stack(masks)), grid).flatten(1)
    learned = [*detector.vision_proj.parameters(), *detector.forgery_prompt.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=1e-3)
    for _ in range(10):
        for batch in torch.randperm(len(patches)).split(64):
            projected = detector.vision_proj(patches[batch].float())
            scores = forgery_map(projected, detector.text_feature())
            loss = functional.binary_cross_entropy_with_logits(10 * scores, target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def assemble(data: Features, head: nn.Sequential, folder: Path) -> Detector:
    """A detector whose block norms standardize what the head was trained on."""
    spec, tensors = load_clip(str(folder))
    # The last block that runs is the one before the last, as LLaVA reads it.
    spec["vision"]["num_hidden_layers"] = max(BLOCKS) + 1
    config = DetectorConfig(
        backbone=None,
        clip=spec,
        hidden_size=MAP_WIDTH,
        prompt_tokens=4,
        clip_blocks=BLOCKS,
        head_hidden=HIDDEN,
        kinds=KINDS,
        image_size=SIDE,
        license=LICENSE,
    )
    detector = Detector(config).eval()
    detector.clip.load_state_dict({name: tensors[name] for name in detector.clip.state_dict()})
    width = detector.clip.vision.width
    with torch.no_grad():
        for number, norm in enumerate(detector.block_norms):
            part = slice(number * width, (number + 1) * width)
            norm.weight.copy_(1 / data.spread[part])
            norm.bias.copy_(-data.mean[part] / data.spread[part])
        detector.hidden[0].weight.zero_()  # the map's cells tell the head nothing
        detector.hidden[0].weight[:, -data.x.shape[1] :] = head[1].weight
        detector.hidden[0].bias.copy_(head[1].bias)
        detector.head.load_state_dict(head[4].state_dict())
    return detector


def show(data: Features, scores: torch.Tensor) -> None:
    """Print the AUC of each source's draws of people whom nothing was learned from."""
    held, largest = data.split == "select", scores.amax(1).numpy()
    labels = (data.kind > 0).int().numpy()
    for source in np.unique(data.source):
        here = held & ((data.source == source) | ((source == "forged") & (labels == 0)))
        print(source, round(roc_auc(labels[here], largest[here]), 4))


def fit_domain(data: Features, detector: Detector) -> None:
    """Store a domain check whose limit keeps 95 % of every source when it was held out.

    The forgery map's cells, before the features of the tower, count nothing in it.
    """
    chosen = data.train & torch.from_numpy(data.source != "forged")
    limits = []
    for source in np.unique(data.source[chosen.numpy()]):
        here = torch.from_numpy(data.source == source)
        rows = (chosen & ~here).nonzero().flatten()
        others = Domain.fit(data.x[rows[torch.randperm(len(rows))[:DOMAIN_PICTURES]]])
        left_out = here & torch.from_numpy(data.split == "select")
        limits.append(float(others(data.x[left_out]).quantile(0.95)))
    rows = chosen.nonzero().flatten()
    found = Domain.fit(data.x[rows[torch.randperm(len(rows))[:DOMAIN_PICTURES]]])
    width = detector.hidden[0].in_features
    cells = width - data.x.shape[1]
    whole = Domain(width, len(found.basis))
    whole.mean[cells:], whole.scale[cells:] = found.mean, found.scale
    whole.basis[:, cells:], whole.scale[:cells] = found.basis, 0
    detector.domain = whole
    # The root mean square is over more features than the check looks at.
    limit = max(limits) * math.sqrt(data.x.shape[1] / width)
    detector.config.domain = {"limit": round(limit, 4), "size": len(found.basis)}
    print("domain limits with a source held out:", [round(x, 3) for x in limits])


def main(
    faces: Path, ddvqa: Path, actors: Path, folder: Path, features: Path, output: Path
) -> None:
    """Train, write."""
    pictures = read_pictures(faces, ddvqa, actors)
    draws, x = read_draws(features, pictures)
    data = Features(x.flatten(1).float(), draws)
    head = train_head(data)
    detector = assemble(data, head, folder)
    with torch.no_grad():
        show(data, head(data.x))
    fit_domain(data, detector)
    genuine = [p for p in pictures if p.split == "train" and p.kind == 0]
    train_map(detector, genuine, folder)
    write(detector, output, recipe="examples/base")


def write(detector: Detector, output: Path, recipe: str) -> None:
    """Write the checkpoint: tower linear layers int8 where they came so, other matrices float16."""
    config = detector.config
    packed, dtype = [], "float16"
    if config.clip_blocks:
        dtype = "bfloat16"
        linear = [n for n, m in detector.named_modules() if isinstance(m, nn.Linear)]
        packed = [f"{name}.weight" for name in linear if name.startswith("clip.vision.encoder")]
    state = {
        name: t.half() if t.ndim > 1 and name not in packed else t
        for name, t in detector.state_dict().items()
    }
    processor = io.preprocessor_config(SIDE, config.image_mean, config.image_std)
    io.write_checkpoint(
        output,
        config=config.to_dict() | {"architectures": ["Detector"], "dtype": dtype},
        tensors=state,
        stage={"stage": "train-detector", "recipe": recipe},
        extra_files={"preprocessor_config.json": json_bytes(processor)},
        int8=packed,
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:7]))
