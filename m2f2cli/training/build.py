"""The detector a training starts from: pre-trained parts put together, or an earlier detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from m2f2cli.checkpoints.io import check_names_and_shapes, open_weight_file
from m2f2cli.checkpoints.keymaps import to_timm
from m2f2cli.checkpoints.load import load_detector
from m2f2cli.errors import CheckpointError, ConfigError
from m2f2cli.models.backbone import Backbone
from m2f2cli.models.clip import blocks_needed, load_clip
from m2f2cli.models.detector import CLIP_MEAN, CLIP_STD, Detector, DetectorConfig
from m2f2cli.options.train_detector import ModelOptions

NORMALISATIONS = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# The published bridge reads CLIP layers 6, 10 and 14 of the 23 that run, 64 wide, into 128.
_BRIDGE_DEPTHS = (6 / 23, 10 / 23, 14 / 23)
_BRIDGE = {"width": 64, "heads": 4, "size": 128}


def build_detector(options: ModelOptions, crop_margin: float) -> Detector:
    """Build the detector that training starts from, in float32 on the CPU.

    Args:
        options: What it is made of.
        crop_margin: Margin of the face crops it will see, stored in its configuration.

    Returns:
        A detector without a domain check (it describes the pictures of another training).

    Raises:
        CheckpointError: A weights file, CLIP folder or starting detector is missing or does not
            fit.
        ConfigError: An architecture is unknown or sizes do not go together.
    """
    if options.model:
        return _from_detector(options.model, crop_margin)
    transformers_logging.disable_progress_bar()
    try:
        spec, clip_tensors = load_clip(options.clip)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"The CLIP tower '{options.clip}' cannot be had: {type(error).__name__}.",
            "Check the name and the connection, or give a folder: --clip DIR.",
        ) from error
    if options.image_size:
        spec, clip_tensors = resize_clip(spec, clip_tensors, options.image_size)
    mean, std = NORMALISATIONS[options.normalization]
    vision = spec["vision"]
    total = vision["num_hidden_layers" if spec["library"] == "transformers" else "layers"]
    config = DetectorConfig(
        backbone=None if options.backbone == "none" else options.backbone,
        clip=spec,
        hidden_size=options.hidden_size,
        prompt_tokens=options.prompt_tokens,
        vision_layer=options.vision_layer,
        forgery_map=options.forgery_map,
        bridge=_bridge(blocks_needed(total, options.vision_layer)) if options.bridge else None,
        image_size=vision["image_size"],
        image_mean=list(mean),
        image_std=list(std),
        crop={"detector": "dlib", "margin": crop_margin},
    )
    detector = Detector(config)
    _load_part(detector.clip, clip_tensors, f"The CLIP tower '{options.clip}'")
    if detector.backbone is not None:
        load_backbone(detector.backbone, options.backbone, options.backbone_weights)
    return detector


def _from_detector(name: str, crop_margin: float) -> Detector:
    parent = load_detector(name, device="cpu", dtype="float32")
    config = DetectorConfig.from_dict(
        {
            **parent.config.to_dict(),
            "domain": None,
            "crop": {**parent.config.crop, "margin": crop_margin},
        }
    )
    detector = Detector(config)
    detector.load_state_dict(parent.state_dict())
    detector.fingerprint = parent.fingerprint
    return detector


def _bridge(blocks: int) -> dict[str, Any]:
    layers = [max(1, round(depth * blocks)) for depth in _BRIDGE_DEPTHS]
    return {**_BRIDGE, "clip_layers": layers}


def _load_part(part: nn.Module, tensors: dict[str, torch.Tensor], what: str) -> None:
    """Load the tensors a part has; blocks above those it runs are left over, nothing else."""
    wanted = part.state_dict()
    kept = {key: tensors[key] for key in wanted if key in tensors}
    check_names_and_shapes(kept, wanted, what=what)
    part.load_state_dict(kept)


def load_backbone(backbone: Backbone, name: str, source: str) -> None:
    """Give a backbone its starting weights, all but the classifier, strictly.

    Args:
        backbone: Filled in place.
        name: Its timm name.
        source: ``none``, ``pretrained`` (timm's own) or a weights file.

    Raises:
        CheckpointError: The file is missing or does not fit, or timm's weights cannot be had.
    """
    import timm

    if source == "none":
        return
    net = backbone.net
    if source == "pretrained":
        try:
            loaded = timm.create_model(name, pretrained=True, num_classes=0, global_pool="")
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"The pre-trained weights of '{name}' cannot be had: {type(error).__name__}.",
                "Give --backbone-weights FILE, or none to start at random.",
            ) from error
        net.load_state_dict(loaded.state_dict())
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"There is no backbone weights file '{path}'.", "Check --backbone-weights."
        )
    classifier = net.default_cfg.get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    wanted = net.state_dict()
    stored = to_timm(open_weight_file(path).tensors, list(wanted), classifier)
    counters = {k: t for k, t in wanted.items() if k.endswith("num_batches_tracked")}
    tensors = counters | {key: tensor.load() for key, tensor in stored.items()}
    check_names_and_shapes(tensors, wanted, what=f"'{path}'")
    net.load_state_dict(tensors)


def resize_clip(
    spec: dict[str, Any], tensors: dict[str, torch.Tensor], image_size: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fit a CLIP vision part to another picture size by resampling its position embeddings.

    Args:
        spec: As ``models.clip.load_clip`` gives it.
        tensors: Its tensors.
        image_size: Wanted edge in pixels, a multiple of the patch size.

    Raises:
        ConfigError: The size is no multiple of the patch size.
    """
    vision = spec["vision"]
    patch = vision["patch_size"]
    if image_size == vision["image_size"]:
        return spec, tensors
    if image_size % patch:
        raise ConfigError(
            f"--image-size {image_size} is no multiple of the CLIP tower's patch size {patch}.",
            f"Use --image-size {max(1, round(image_size / patch)) * patch}.",
        )
    key = (
        "vision.embeddings.position_embedding.weight"
        if spec["library"] == "transformers"
        else "vision.visual.positional_embedding"
    )
    table = tensors[key]
    old, new = vision["image_size"] // patch, image_size // patch
    grid = table[1:].float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    resized = torch.cat([table[:1], grid[0].flatten(1).T.to(table.dtype)])
    return (
        {**spec, "vision": {**vision, "image_size": image_size}},
        {**tensors, key: resized},
    )
