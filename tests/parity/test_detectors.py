"""The imported detectors give the published code's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from m2f2cli.checkpoints.convert import import_weights
from m2f2cli.checkpoints.load import load_detector
from m2f2cli.data.transforms import preprocess
from m2f2cli.models.detector import Detector
from tests.parity.published import golden, manifest, state_dict, write_stage_1

LOGITS = 1e-5
FEATURES = 2e-5


def judge(model: Detector, picture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    config = model.config
    pixels = preprocess(
        picture, size=config.image_size, mean=config.image_mean, std=config.image_std
    )
    with torch.no_grad():
        out = model(torch.from_numpy(pixels)[None])
    return out.logits[0], out.features[0], out.forgery_map


def import_small(folder: Path) -> Path:
    """Import the small detector B; its CLIP is no known tower, so its sizes are given."""
    torch.save(state_dict("detector_b_small"), folder / "b.pth")
    config = manifest("detector_b_small")["config"]
    towers = {"vision_config": config["vision"], "text_config": config["text"]}
    (folder / "clip.json").write_text(json.dumps(towers))
    import_weights([folder / "b.pth"], folder / "out", clip_config=folder / "clip.json")
    return folder / "out"


def check_b(model: Detector, name: str) -> float:
    expected, pictures = golden(name)
    worst = 0.0
    for row, picture in enumerate(pictures):
        logits, features, forgery = judge(model, picture)
        worst = max(worst, (logits - expected["logits"][row]).abs().max().item())
        assert torch.allclose(forgery.flatten(), expected["clip_scores"][row], atol=FEATURES)
        published = torch.cat(
            [
                model.alpha_text * expected["clip_scores"][row],
                expected["clip_cls_times_alpha"][row],
                expected["deepfake_feature"][row],
            ]
        )
        assert torch.allclose(features, published, atol=5e-5)
    with torch.no_grad():
        prompt = model.forgery_prompt(model.clip.text)
        assert torch.allclose(prompt, expected["text_feature"], atol=FEATURES)
        assert torch.allclose(model.text_feature(), expected["text_projected"], atol=5e-5)
    assert worst <= LOGITS
    return worst


def test_detector_b_small(tmp_path, record_property):
    model = load_detector(str(import_small(tmp_path)), device="cpu")
    record_property("largest logit difference", check_b(model, "detector_b_small"))


@pytest.mark.slow
def test_a_batch_gives_what_single_pictures_give(tmp_path):
    model = load_detector(str(import_small(tmp_path)), device="cpu")
    _, pictures = golden("detector_b_small")
    config = model.config
    batch = torch.stack(
        [
            torch.from_numpy(
                preprocess(p, size=config.image_size, mean=config.image_mean, std=config.image_std)
            )
            for p in pictures
        ]
    )
    with torch.no_grad():
        together = model(batch).logits
    for row, picture in enumerate(pictures):
        assert torch.allclose(together[row], judge(model, picture)[0], atol=LOGITS)


@pytest.mark.slow
def test_detector_b_full_size(tmp_path, record_property):
    torch.save(state_dict("detector_b"), tmp_path / "anything.pth")
    import_weights([tmp_path / "anything.pth"], tmp_path / "out")
    model = load_detector(str(tmp_path / "out"), device="cpu")
    record_property("largest logit difference", check_b(model, "detector_b"))


@pytest.mark.slow
def test_detector_a(tmp_path, record_property):
    write_stage_1(tmp_path / "current_model_180.pth", state_dict("detector_a"))
    import_weights([tmp_path / "current_model_180.pth"], tmp_path / "out")
    model = load_detector(str(tmp_path / "out"), device="cpu")
    expected, pictures = golden("detector_a")
    width, worst = model.config.hidden_size, 0.0
    for row, picture in enumerate(pictures):
        logits, features, _ = judge(model, picture)
        worst = max(worst, (logits - expected["logits"][row]).abs().max().item())
        published = expected["features"][row]
        assert torch.allclose(features[:width], published[:width], atol=5e-5)
        assert torch.allclose(features[width:], published[-width:], atol=5e-5)
    record_property("largest logit difference", worst)
    assert worst <= LOGITS
