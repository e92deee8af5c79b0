from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from m2f2cli.checkpoints.keymaps import to_timm
from m2f2cli.errors import CheckpointError, ConfigError
from m2f2cli.models.backbone import Backbone
from m2f2cli.models.clip import load_clip
from m2f2cli.options.train_detector import ModelOptions
from m2f2cli.training.detector import (
    build_detector,
    load_backbone,
    resize_clip,
    train_detector,
)

STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


PLAIN = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
EXPANDED = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
SQUEEZE = {"conv_reduce": "_se_reduce", "conv_expand": "_se_expand"}


def published_names(net) -> dict[str, torch.Tensor]:
    """The tensors of a timm efficientnet under EfficientNet-PyTorch's names, in its order."""
    back = {timm: theirs for theirs, timm in STEM.items()}
    tensors, places = {}, []
    for key, tensor in net.state_dict().items():
        module, *rest = key.split(".")
        if module == "blocks":
            stage, block, part, *rest = rest
            if (stage, block) not in places:
                places.append((stage, block))
            expanded = f"blocks.{stage}.{block}.conv_pwl.weight" in net.state_dict()
            if part == "se":
                name, rest = SQUEEZE[rest[0]], rest[1:]
            else:
                name = (EXPANDED if expanded else PLAIN)[part]
            number = places.index((stage, block))
            tensors[".".join(["_blocks", str(number), name, *rest])] = tensor
        else:
            tensors[".".join([back[module], *rest])] = tensor
    return tensors


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_b0"])
def test_published_efficientnet_names_land_where_they_belong(name, tmp_path):
    source, target = Backbone(name), Backbone(name)
    tensors = published_names(source.net)
    tensors["_fc.weight"], tensors["_fc.bias"] = torch.zeros(10, 1280), torch.zeros(10)
    torch.save(tensors, tmp_path / "net.pth")
    load_backbone(target, name, str(tmp_path / "net.pth"))
    for key, tensor in source.net.state_dict().items():
        assert torch.equal(tensor, target.net.state_dict()[key]), key


@pytest.mark.slow
def test_torchvision_densenet_names(tmp_path):
    source, target = Backbone("densenet121"), Backbone("densenet121")
    tensors = {}
    for key, tensor in source.net.state_dict().items():
        for part in ("norm", "conv"):
            if "denselayer" in key:
                key = key.replace(f".{part}1.", f".{part}.1.").replace(f".{part}2.", f".{part}.2.")
        tensors[f"module.{key}"] = tensor
    tensors["module.classifier.weight"] = torch.zeros(2, 1024)
    tensors["module.classifier.bias"] = torch.zeros(2)
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "net.pth")
    load_backbone(target, "densenet121", str(tmp_path / "net.pth"))
    for key, tensor in source.net.state_dict().items():
        assert torch.equal(tensor, target.net.state_dict()[key]), key


def test_backbone_weights_are_strict(tmp_path):
    backbone = Backbone("test_efficientnet")
    tensors = dict(backbone.net.state_dict())
    file = tmp_path / "net.safetensors"
    save_file({k: t.clone() for k, t in tensors.items()}, file)
    load_backbone(backbone, "test_efficientnet", str(file))
    for change, words in (
        ({"conv_stem.weight": None}, "missing: conv_stem.weight"),
        ({"surprise": torch.zeros(1)}, "unexpected: surprise"),
        ({"conv_stem.weight": torch.zeros(1, 3, 3, 3)}, "wrong shape: conv_stem.weight"),
    ):
        save_file({k: t.clone() for k, t in (tensors | change).items() if t is not None}, file)
        with pytest.raises(CheckpointError, match=words):
            load_backbone(backbone, "test_efficientnet", str(file))
    with pytest.raises(CheckpointError, match="no backbone weights file"):
        load_backbone(backbone, "test_efficientnet", str(tmp_path / "lost.pth"))
    with pytest.raises(CheckpointError, match=r"'_surprise\.weight' has no place"):
        to_timm({"_conv_stem.weight": 0, "_surprise.weight": 0}, [], ["classifier"])


def test_clip_is_resampled_to_the_picture_size(clip_folder):
    spec, tensors = load_clip(str(clip_folder))
    key = "vision.embeddings.position_embedding.weight"
    larger, resized = resize_clip(spec, tensors, 64)
    assert larger["vision"]["image_size"] == 64
    assert resized[key].shape == (1 + 8 * 8, 24)
    assert torch.equal(resized[key][0], tensors[key][0])
    grid = resized[key][1:].unflatten(0, (8, 8))
    old = tensors[key][1:].unflatten(0, (4, 4))
    assert torch.allclose(grid.mean((0, 1)), old.mean((0, 1)), atol=0.05)
    assert resize_clip(spec, tensors, 32)[1][key] is tensors[key]
    with pytest.raises(ConfigError, match=r"no multiple of .* patch size 8"):
        resize_clip(spec, tensors, 60)


def test_a_new_detector_takes_the_clip_weights_it_needs(clip_folder):
    options = ModelOptions(
        clip=str(clip_folder), backbone="test_efficientnet", backbone_weights="none", hidden_size=8
    )
    detector = build_detector(options, 0.4)
    _, tensors = load_clip(str(clip_folder))
    own = detector.clip.state_dict()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in own.items())
    assert not [key for key in own if "layers.2" in key and key.startswith("vision")]
    assert detector.config.crop == {"detector": "dlib", "margin": 0.4}
    with pytest.raises(CheckpointError, match=r"no config\.json|cannot be loaded"):
        build_detector(ModelOptions(clip=str(clip_folder.parent)), 0.3)


def test_init_starts_from_a_detector_and_names_its_parent(options, tmp_path):
    from m2f2cli.checkpoints import io
    from m2f2cli.checkpoints.load import load_detector

    first = train_detector(options(output=tmp_path / "first", epochs=1))
    calibrated = {"threshold": 0.7, "uncertain": [0.4, 0.7], "score_temperature": 2.0}
    fields = json.loads((first / "config.json").read_text()) | calibrated
    (first / "config.json").write_text(json.dumps(fields))
    parent = load_detector(str(first))
    assert parent.config.threshold == 0.7
    shape = ("clip", "backbone", "backbone_weights", "hidden_size", "prompt_tokens", "image_size")
    plain = dict.fromkeys(shape)
    from m2f2cli.options.train_detector import TrainDetectorOptions

    flat = options(output=tmp_path / "second", epochs=1).to_flat()
    kept = {k: v for k, v in flat.items() if k.replace("-", "_") not in plain}
    second = train_detector(
        TrainDetectorOptions.from_flat(kept | {"model": str(first), "train": "prompt"})
    )
    assert io.read_stage(second)["parent"] == parent.fingerprint
    child = load_detector(str(second))
    config = child.config  # other weights than the calibration's
    assert (config.threshold, config.uncertain, config.score_temperature) == (0.5, None, 1.0)
    ours, theirs = child.state_dict(), parent.state_dict()
    learned = [key for key in ours if not key.startswith("domain.")]  # fitted anew
    moved = {key for key in learned if not torch.equal(ours[key], theirs[key])}
    assert moved == {"forgery_prompt.tokens", "alpha_vision", "alpha_text"}
