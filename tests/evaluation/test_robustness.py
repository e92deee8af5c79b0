from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from m2f2cli.data import corruptions
from m2f2cli.data.images import read_picture
from m2f2cli.data.readers.ffpp import read_ffpp
from m2f2cli.data.samples import SampleSet, read_samples
from m2f2cli.errors import ConfigError, UsageError
from m2f2cli.evaluation import evaluate as runs
from m2f2cli.evaluation.robustness import conditions, sweep
from m2f2cli.inference.pipeline import detect
from m2f2cli.metrics import roc_auc, wilson_interval
from m2f2cli.options.detect import DetectOptions
from tests.evaluation.test_evaluate import clips
from tests.inference.conftest import FLAT_ONLY, MeanJudge, noise_picture, write_picture

__all__ = ["clips"]
TWO = {"corruptions": ("jpeg", "brightness"), "resamples": 50}
CROPS = DetectOptions(faces="none", frames=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in range(10):
        noise_picture(tmp_path / "data" / "real" / f"{number}.png", number)
        noise_picture(tmp_path / "data" / "fake" / f"{number}.png", number + 40)
    return tmp_path / "data"


def report(folder: Path) -> dict:
    def refuse(word: str) -> float:
        raise AssertionError(word)

    return json.loads((folder / "robustness.json").read_text(), parse_constant=refuse)


def test_every_condition_is_judged_and_measured(data, tmp_path):
    folder, steps = tmp_path / "sweep", []
    found = sweep(
        read_samples(data), model=MeanJudge(), folder=folder, **TWO,
        advance=lambda: steps.append(1),
    )  # fmt: skip
    assert [(r.corruption, r.severity) for r in found.rows] == [
        ("none", 0), *[(name, s) for name in TWO["corruptions"] for s in range(1, 6)]
    ]  # fmt: skip
    assert len(steps) == 11 * 20 == 20 * len(conditions(TWO["corruptions"]))
    pictures = read_samples(data).samples
    for row in found.rows:
        spoilt = []
        for sample in pictures:
            picture = read_picture(sample.path)
            pixels = picture.pixels
            if row.severity:
                change = corruptions.CORRUPTIONS[row.corruption]
                pixels = change.apply(pixels, row.severity, picture.sha256)
            spoilt.append(pixels.mean())
        labels = [sample.label for sample in pictures]
        # The judge resizes before it takes the mean, which may swap two near ties.
        assert row.auc.value == pytest.approx(roc_auc(labels, spoilt), abs=0.03)
        assert row.auc.low <= row.auc.value <= row.auc.high
        assert (row.judged, row.failed, row.in_domain) == (20, 0, None)


def test_untouched_pictures_score_as_detect_scores_them(data, tmp_path):
    sweep(read_samples(data), model=MeanJudge(), folder=tmp_path / "sweep", **TWO)
    wanted = detect([str(data)], model=MeanJudge(), options=CROPS, recursive=True)
    rows = [json.loads(line) for line in (tmp_path / "sweep/records/none-0.jsonl").open()]
    assert {str(data / r["path"]): (r["fake_probability"], r["sha256"]) for r in rows} == {
        record.path: (record.fake_probability, record.sha256) for record in wanted
    }


@pytest.mark.parametrize("after", [1, 90, 219])
def test_a_killed_sweep_goes_on_to_the_same_table(data, tmp_path, after):
    class Killed(Exception):
        pass

    steps = []

    def kill() -> None:
        steps.append(1)
        if len(steps) == after:
            raise Killed

    samples = read_samples(data)
    sweep(samples, model=MeanJudge(), folder=tmp_path / "whole", **TWO)
    with pytest.raises(Killed):
        sweep(samples, model=MeanJudge(), folder=tmp_path / "cut", **TWO, advance=kill)
    assert not (tmp_path / "cut" / "robustness.json").exists()
    sweep(samples, model=MeanJudge(), folder=tmp_path / "cut", **TWO, advance=kill)
    assert len(steps) == 220
    for name in ("robustness.json", "robustness.svg"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    judge = MeanJudge()
    sweep(samples, model=judge, folder=tmp_path / "cut", **TWO)
    assert judge.batches == []


def test_the_file_says_what_was_done(data, tmp_path):
    folder = tmp_path / "sweep"
    judge = MeanJudge(domain=FLAT_ONLY, threshold=0.4, uncertain=[0.3, 0.5])
    found = sweep(read_samples(data), model=judge, folder=folder, split="validation", **TWO)
    saved = report(folder)
    assert (saved["schema_version"], saved["kind"]) == (1, "robustness")
    assert saved["model"] == {
        "name": "MeanJudge", "fingerprint": "sha256:mean", "threshold": 0.4
    }  # fmt: skip
    assert saved["data"].items() >= {
        "dataset": "images", "split": "validation", "real": 10, "fake": 10
    }.items()  # fmt: skip
    assert saved["interval"] == {"resamples": 50, "seed": 0, "level": 0.95}
    assert saved["corruptions"]["jpeg"] == {
        "parameter": "quality", "values": [25, 18, 15, 10, 7], "source": "ImageNet-C"
    }  # fmt: skip
    assert len(saved["rows"]) == 11
    assert saved["rows"][1].items() >= {"corruption": "jpeg", "severity": 1, "value": 25}.items()
    assert saved["rows"][1]["auc"].keys() == {"value", "low", "high", "note"}
    assert saved["rows"][0]["in_domain"] == 0.0  # noise is not flat
    assert saved["rows"][0]["uncertain"] == 1.0
    heads, rows = found.table()
    assert len(rows) == 11
    assert {len(row) for row in rows} == {len(heads)}
    assert ET.fromstring((folder / "robustness.svg").read_bytes()).tag.endswith("svg")


def test_flips_and_what_turned_uncertain_are_told_apart(tmp_path):
    levels = {"real": [60, 90, 112, 128], "fake": [140, 150, 200, 240]}
    for label, row in levels.items():
        for level in row:
            write_picture(tmp_path / "data" / label / f"{level}.png", level)
    # 51 levels brighter, a gray of 90 turns fake (141), one of 60 uncertain (111).
    judge = MeanJudge(threshold=0.5, uncertain=[0.43, 0.45])
    found = sweep(
        read_samples(tmp_path / "data"), model=judge, folder=tmp_path / "s",
        corruptions=("brightness", "chains"), resamples=0,
    )  # fmt: skip
    clean, _, second = found.rows[:3]
    assert (second.corruption, second.severity) == ("brightness", 2)
    assert (clean.flipped.value, clean.now_uncertain.value) == (0, 0)
    assert (second.flipped.value, second.now_uncertain.value) == (1 / 8, 1 / 8)
    ends = pytest.approx(wilson_interval(1, 8))
    assert (second.flipped.low, second.flipped.high) == ends
    saved = report(tmp_path / "s")["rows"][2]
    assert saved["flipped"] == {
        "value": 1 / 8, "low": second.flipped.low, "high": second.flipped.high, "note": None
    }  # fmt: skip
    for row in found.rows[-5:]:  # flat pictures pass every chain unchanged
        assert (row.flipped.value, row.now_uncertain.value) == (0, 0)
        assert row.flipped.high == pytest.approx(wilson_interval(0, 8)[1])
        assert row.auc.value == clean.auc.value


def test_chains_alone_make_no_curves_and_join_an_older_sweep(data, tmp_path):
    folder, judge = tmp_path / "sweep", MeanJudge()
    sweep(read_samples(data), model=MeanJudge(), folder=folder, **TWO)
    plan = json.loads((folder / "plan.json").read_text())
    assert {"messenger", "h264-28"} <= plan["corruptions"].keys()
    older = {**plan, "corruptions": {k: v for k, v in plan["corruptions"].items() if "-" not in k}}
    (folder / "plan.json").write_text(json.dumps(older))
    (folder / "robustness.svg").unlink()
    found = sweep(
        read_samples(data), model=judge, folder=folder, corruptions=("chains",), resamples=0
    )
    assert [row.corruption for row in found.rows] == [
        "none", "jpeg-75", "half-size", "screenshot", "messenger", "h264-28"
    ]  # fmt: skip
    assert sum(judge.batches) <= 5 * 20
    assert not (folder / "robustness.svg").exists()
    assert json.loads((folder / "plan.json").read_text()) == plan
    older["corruptions"]["jpeg"]["values"] = [1, 2, 3, 4, 5]
    (folder / "plan.json").write_text(json.dumps(older))
    with pytest.raises(UsageError, match="other severities"):
        sweep(read_samples(data), model=judge, folder=folder, corruptions=("chains",))


def test_pictures_are_decoded_once_and_never_written(data, tmp_path, monkeypatch):
    read: list[Path] = []

    def counting(path: Path):
        read.append(path)
        return read_picture(path)

    monkeypatch.setattr(runs, "read_picture", counting)
    sweep(read_samples(data), model=MeanJudge(), folder=tmp_path / "sweep", **TWO)
    assert len(read) <= 20 + 8  # two threads may reach for one picture at the same time
    assert not {p.suffix for p in (tmp_path / "sweep").rglob("*.*")} - {".jsonl", ".json", ".svg"}


def test_an_unreadable_picture_fails_in_every_row_and_no_more(data, tmp_path):
    samples = read_samples(data)
    (data / "fake" / "3.png").write_bytes(b"no picture")
    found = sweep(samples, model=MeanJudge(), folder=tmp_path / "sweep", **TWO)
    assert {(row.judged, row.failed) for row in found.rows} == {(19, 1)}
    assert all(row.auc.value is not None for row in found.rows)


@pytest.mark.parametrize("broken", [False, True])
def test_one_class_or_no_picture_is_said_and_is_no_nan(data, tmp_path, broken):
    samples = read_samples(data)
    only = SampleSet(samples.root, "folder", tuple(s for s in samples.samples if s.label == 1))
    if broken:
        for sample in only.samples:
            sample.path.write_bytes(b"")
    sweep(only, model=MeanJudge(), folder=tmp_path / "sweep", **TWO)
    saved = report(tmp_path / "sweep")
    assert all(row["auc"]["value"] is None for row in saved["rows"])
    assert all(row["auc"]["note"] for row in saved["rows"])
    assert (tmp_path / "sweep" / "robustness.svg").stat().st_size


def test_a_sweep_of_other_data_or_another_model_is_not_continued(data, tmp_path):
    folder = tmp_path / "sweep"
    samples = read_samples(data)
    sweep(samples, model=MeanJudge(), folder=folder, **TWO)
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    other = MeanJudge()
    other.fingerprint = "sha256:other"
    with pytest.raises(UsageError, match="model_fingerprint"):
        sweep(samples, model=other, folder=folder, **TWO)
    with pytest.raises(UsageError, match="model_fingerprint"):  # also where work is left
        sweep(samples, model=other, folder=folder, corruptions=("jpeg", "blur"))
    with pytest.raises(UsageError, match="other data"):
        sweep(samples.subset(range(5, 15)), model=MeanJudge(), folder=folder, **TWO)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files


def test_pictures_that_changed_are_not_mixed_with_those_before(data, tmp_path):
    folder, samples = tmp_path / "sweep", read_samples(data)
    sweep(samples, model=MeanJudge(), folder=folder, **TWO)
    for sample in samples.samples:  # as the same frames of another compression
        noise_picture(sample.path, 7)
    with pytest.raises(UsageError, match="another content"):
        sweep(samples, model=MeanJudge(), folder=folder, corruptions=("blur",))


def test_more_corruptions_join_an_earlier_sweep(data, tmp_path):
    folder, judge = tmp_path / "sweep", MeanJudge()
    sweep(read_samples(data), model=MeanJudge(), folder=folder, **TWO)
    names = ("jpeg", "brightness", "contrast")
    found = sweep(read_samples(data), model=judge, folder=folder, corruptions=names, resamples=0)
    assert len(found.rows) == 16
    assert sum(judge.batches) <= 5 * 20
    assert found.rows[0].auc.low is None


def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no sweep"):
        sweep(read_samples(data), model=MeanJudge(), folder=folder, **TWO)
    with pytest.raises(UsageError, match="is a file"):
        sweep(read_samples(data), model=MeanJudge(), folder=folder / "mine.txt", **TWO)
    with pytest.raises(ConfigError, match="no corruption 'fog'"):
        sweep(
            read_samples(data), model=MeanJudge(), folder=tmp_path / "new",
            corruptions=("fog",),
        )  # fmt: skip
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]
    assert not (tmp_path / "new").exists()


def test_without_matplotlib_there_is_no_plot_and_all_else(data, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "m2f2cli.evaluation.page", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = sweep(read_samples(data), model=MeanJudge(), folder=tmp_path / "sweep", **TWO)
    assert "m2f2cli[eval]" in found.notes[0]
    assert report(tmp_path / "sweep")["notes"] == list(found.notes)
    assert not (tmp_path / "sweep" / "robustness.svg").exists()


def test_videos_are_swept_by_their_frames(clips, tmp_path):
    assert clips == read_ffpp(clips.root, manipulations=["FaceSwap"], split="all")
    folder = tmp_path / "sweep"
    found = sweep(clips, model=MeanJudge(), folder=folder, **TWO, detect=CROPS)
    assert {row.judged for row in found.rows} == {8}
    assert found.rows[0].auc.value == 0.5  # the same frames in both classes
    assert report(folder)["data"]["dataset"] == "ffpp"
