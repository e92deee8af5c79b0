from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m2f2cli.checkpoints import io
from m2f2cli.data.samples import read_samples
from m2f2cli.errors import CheckpointError, InputError, UsageError
from m2f2cli.evaluation.calibrate import calibrate_checkpoint as calibrate
from m2f2cli.evaluation.evaluate import score_set, truth_of
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.evaluation.truth import Joined, join
from m2f2cli.files import json_bytes
from m2f2cli.inference.pipeline import detect
from m2f2cli.options.detect import DetectOptions
from tests.evaluation.reports import calibrated
from tests.inference.conftest import noise_picture

CROPS = DetectOptions(faces="none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for number in range(25):
        noise_picture(root / "real" / f"{number}.png", number)
        noise_picture(root / "fake" / f"{number}.png", number + 500)
    return root


@pytest.fixture
def folder(tiny_detector_folder: Path, tmp_path: Path) -> Path:
    """A detector folder that may be changed, with a file and a sub-folder of the user's in it."""
    own = tmp_path / "detector"
    shutil.copytree(tiny_detector_folder, own)
    (own / "README.md").write_text("mine")
    (own / "curves").mkdir()
    (own / "curves" / "loss.csv").write_text("1,2")
    return own


@pytest.fixture(scope="module")
def scored(data: Path, tiny_detector_folder: Path, tmp_path_factory) -> Joined:
    file = tmp_path_factory.mktemp("scores") / "records.jsonl"
    samples = read_samples(data)
    score_set(samples, model=str(tiny_detector_folder), output=file)
    return join(truth_of(samples, CROPS, "validation"), read_predictions(file))


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_detect_judges_by_what_was_learnt(folder, data, scored):
    before = io.fingerprint(folder)
    found = calibrate(str(folder), scored, target_fpr=0.2)
    pictures = sorted(str(p) for p in data.rglob("*.png"))
    records = list(detect(pictures, model=str(folder), options=CROPS))
    settings = records[0].settings
    assert settings.threshold == found.threshold
    assert settings.temperature == pytest.approx(found.temperature)
    assert settings.uncertain == found.uncertain
    assert settings.model_fingerprint == io.fingerprint(folder, verify=True) != before
    real = [r.fake_probability for r in records if "/real/" in r.path]
    assert np.mean(np.array(real) >= settings.threshold) <= 0.2
    assert sum(p >= settings.threshold for p in real) == found.false_positives
    old = {item.name: item.fake_probability for item in scored.items}
    expected = calibrated(
        found, np.array([old[Path(r.path).relative_to(data).as_posix()] for r in records])
    )
    assert [r.fake_probability for r in records] == pytest.approx(expected.tolist(), abs=2e-4)


def test_the_checkpoint_says_what_it_was_learnt_from(folder, scored):
    files = content(folder)
    before = io.fingerprint(folder)
    found = calibrate(str(folder), scored, target_fpr=0.2)
    stage = io.read_stage(folder)
    noted = stage["calibration"]
    assert stage["stage"] == "test"
    assert noted["model"] == before
    assert (noted["dataset"], noted["split"]) == ("images", "validation")
    assert noted["data"] == scored.data_fingerprint
    assert (noted["real"], noted["fake"], noted["without_score"]) == (25, 25, 0)
    assert noted["nll"] == list(found.nll)
    assert noted["nll"][1] <= noted["nll"][0]
    assert noted["target_fpr"] == 0.2
    after = content(folder)
    changed = {name for name in files if files[name] != after[name]}
    assert changed == {"config.json", "stage.json"}
    assert files.keys() == after.keys()
    fields = (json.loads(part["config.json"]) for part in (files, after))
    first, second = fields
    assert {key for key in first if first[key] != second[key]} == {
        "score_temperature", "threshold", "uncertain"
    }  # fmt: skip


def test_a_copy_leaves_the_original(folder, scored, tmp_path):
    files = content(folder)
    copy = tmp_path / "deep" / "calibrated"
    calibrate(str(folder), scored, target_fpr=0.2, output=copy)
    assert content(folder) == files
    assert io.read_config(copy)["threshold"] == io.read_stage(copy)["calibration"]["threshold"]
    with pytest.raises(CheckpointError, match="exists"):
        calibrate(str(folder), scored, target_fpr=0.2, output=copy)
    calibrate(str(folder), scored, target_fpr=0.3, output=copy, overwrite=True)
    assert io.read_stage(copy)["calibration"]["target_fpr"] == 0.3


def test_calibrating_again_starts_from_the_stored_temperature(folder, data, scored, tmp_path):
    order = sorted(scored.items, key=lambda item: item.fake_probability)
    labels = {item.name: int(n >= 25) ^ int(n % 6 == 0) for n, item in enumerate(order)}

    def told(answers: Joined) -> Joined:
        """Labels that the scores tell, though not always."""
        items = tuple(replace(item, label=labels[item.name]) for item in answers.items)
        return replace(answers, items=items)

    first = calibrate(str(folder), told(scored), target_fpr=0.2)
    samples = read_samples(data)
    score_set(samples, model=str(folder), output=tmp_path / "again.jsonl")
    again = join(truth_of(samples, CROPS), read_predictions(tmp_path / "again.jsonl"))
    second = calibrate(str(folder), told(again), target_fpr=0.2)
    assert not first.notes
    assert second.temperature_before == first.temperature
    assert second.temperature == pytest.approx(first.temperature, rel=1e-2)
    assert second.threshold == pytest.approx(first.threshold, abs=1e-3)


def test_records_from_before_are_not_mixed_with_those_after(folder, data, scored, tmp_path):
    samples = read_samples(data)
    score_set(samples, model=str(folder), output=tmp_path / "out.jsonl")
    calibrate(str(folder), scored, target_fpr=0.2)
    with pytest.raises(UsageError, match="model_fingerprint"):
        score_set(samples, model=str(folder), output=tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="another model"):
        calibrate(str(folder), scored, target_fpr=0.2)


def test_a_full_disk_leaves_the_checkpoint_as_it_was(folder, scored, monkeypatch):
    files, siblings = content(folder), sorted(os.listdir(folder.parent))

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match="No space left"):
        calibrate(str(folder), scored, target_fpr=0.2)
    assert content(folder) == files
    assert sorted(os.listdir(folder.parent)) == siblings


@pytest.mark.parametrize("place", ["detector", "parent"])
def test_a_read_only_folder_is_refused_before_anything_is_written(
    folder, scored, tmp_path, monkeypatch, place
):
    locked = folder if place == "detector" else folder.parent
    true_answer = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != locked and true_answer(path, mode)
    )
    with pytest.raises(CheckpointError, match="may not be written") as caught:
        calibrate(str(folder), scored, target_fpr=0.2)
    assert "--calibrated DIR" in str(caught.value.hint)
    calibrate(str(folder), scored, target_fpr=0.2, output=tmp_path / "out" / "copy")


def test_the_bundled_detector_is_never_changed(scored):
    with pytest.raises(UsageError, match="not a folder of yours") as caught:
        calibrate("lite", scored)
    assert "--calibrated DIR" in str(caught.value.hint)


def test_a_folder_inside_the_package_is_never_changed(scored):
    import m2f2cli

    bundled = Path(m2f2cli.__file__).parent / "assets" / "lite"
    files = content(bundled)
    with pytest.raises(UsageError, match="not a folder of yours"):
        calibrate(str(bundled), scored)
    assert content(bundled) == files


@pytest.mark.parametrize(("split", "words"), [("test", "A test set"), ("train", "Training")])
def test_test_and_training_pictures_are_refused(folder, scored, split, words):
    files = content(folder)
    with pytest.raises(UsageError, match=words):
        calibrate(str(folder), replace(scored, split=split), target_fpr=0.2)
    assert content(folder) == files


def test_texts_and_other_models_are_refused(folder, scored):
    with pytest.raises(UsageError, match="not texts"):
        calibrate(str(folder), replace(scored, task="judgement"))
    with pytest.raises(InputError, match="another model"):
        calibrate(str(folder), replace(scored, model_fingerprint="sha256:other"))
    config = io.read_config(folder) | {"model_type": "llava"}
    (folder / "config.json").write_bytes(json_bytes(config))
    with pytest.raises(CheckpointError, match="no detector"):
        calibrate(str(folder), scored)


def test_a_checkpoint_that_was_tampered_with_gets_no_new_fingerprint(folder, scored):
    config = io.read_config(folder) | {"threshold": 0.9}
    (folder / "config.json").write_bytes(json_bytes(config))
    with pytest.raises(CheckpointError, match="changed after it was written"):
        calibrate(str(folder), scored, target_fpr=0.2)


def test_pictures_without_a_score_are_counted_and_left_out(folder, scored):
    items = (replace(scored.items[0], fake_probability=None, verdict=None), *scored.items[1:])
    found = calibrate(str(folder), replace(scored, items=items), target_fpr=0.2)
    assert found.real + found.fake == 49
    assert io.read_stage(folder)["calibration"]["without_score"] == 1


def test_one_class_only_is_refused(folder, scored):
    fakes = tuple(item for item in scored.items if item.label == 1)
    with pytest.raises(InputError, match="0 real pictures"):
        calibrate(str(folder), replace(scored, items=fakes))
