"""The pipeline with a real, tiny detector: what must hold whatever the weights are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f2cli.checkpoints.load import load_detector
from m2f2cli.data.transforms import preprocess
from m2f2cli.inference.pipeline import detect
from m2f2cli.models.detector import Detector
from m2f2cli.options.detect import DetectOptions
from tests.inference.conftest import noise_picture

EXAMPLES = Path(__file__).parents[2] / "examples"
NONE = DetectOptions(faces="none")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    return [str(noise_picture(folder / f"{seed}.png", seed)) for seed in range(9)]


@pytest.fixture(scope="module")
def model(tiny_detector_folder: Path) -> Detector:
    return load_detector(str(tiny_detector_folder))


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(9)), batch=st.integers(1, 9))
def test_batch_mates_change_nothing(
    model: Detector, pictures: list[str], order: list[int], batch: int
) -> None:
    alone = {
        record.path: record
        for record in detect(pictures, model=model, options=replace(NONE, batch_size=1))
    }
    chosen = [pictures[i] for i in order]
    for record in detect(chosen, model=model, options=replace(NONE, batch_size=batch)):
        expected = alone[record.path]
        assert record.verdict == expected.verdict
        assert record.fake_probability == pytest.approx(expected.fake_probability, abs=1e-5)


def test_the_score_is_the_detectors_own(
    model: Detector, tiny_detector_folder: Path, pictures: list[str]
) -> None:
    config = model.config
    for record in detect(pictures, model=str(tiny_detector_folder), options=NONE):
        picture = Image.open(record.path)
        values = preprocess(
            np.asarray(picture),
            size=config.image_size,
            mean=config.image_mean,
            std=config.image_std,
        )
        with torch.inference_mode():
            out = model(pixel_values=torch.from_numpy(values)[None])
            expected = model.fake_probability(out.logits).item()
        assert record.fake_probability == pytest.approx(expected, abs=1e-5)
        assert record.settings.model == str(tiny_detector_folder)
        assert record.settings.model_fingerprint == model.fingerprint
        assert record.settings.dtype == "float32"


def test_all_eight_orientations_score_the_same(model: Detector, tmp_path: Path) -> None:
    upright = Image.open(EXAMPLES / "grace_hopper.jpg").convert("RGB")
    undo = [None, 0, 3, 1, 5, 2, 6, 4]  # Image.Transpose that stores a picture for each tag
    for tag, turn in enumerate(undo, start=1):
        exif = Image.Exif()
        exif[0x0112] = tag
        stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
        stored.save(tmp_path / f"{tag}.png", exif=exif)
    records = list(detect([str(tmp_path)], model=model))
    assert len(records) == 8
    assert {record.status for record in records} == {"ok"}
    assert len({(record.fake_probability, record.crop) for record in records}) == 1


def test_a_forgery_map_reaches_the_picture(tiny_detector_folder: Path, tmp_path: Path) -> None:
    options = DetectOptions(heatmap=tmp_path)
    (record,) = detect(
        [str(EXAMPLES / "grace_hopper.jpg")], model=str(tiny_detector_folder), options=options
    )
    assert record.crop_source == "face"
    with Image.open(str(record.heatmap)) as drawn:
        assert drawn.size == (record.width, record.height)
