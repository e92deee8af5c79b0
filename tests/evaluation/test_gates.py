from __future__ import annotations

import json

import pytest

from m2f2cli.errors import InputError
from m2f2cli.evaluation.protocols import Figure
from m2f2cli.evaluation.report import ACCURACY, AUC, below, build_report, drifts, read_expectation
from tests.evaluation.reports import scores_set, some_measures


@pytest.fixture
def report():
    return build_report(scores_set(), some_measures())


def drift(report, tmp_path, expected):
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(expected))
    return drifts(report, read_expectation(path))


@pytest.mark.parametrize(
    "expected",
    [
        {"accuracy": 0.8},
        {"accuracy": 0.8 + 5e-7},
        {"accuracy": {"value": 0.81, "tolerance": 0.011}},
        {"frame_auc": 0.87, "accuracy": {"value": 0.8, "tolerance": 0}, "tolerance": 0.01},
        {"figures": {"accuracy": 0.8}, "per_kind": {"Deepfakes": {"auc": 0.9}}},
        {"Deepfakes.auc": 0.9, "counts.items": 40, "FaceSwap.auc": None, "video_auc": None},
    ],
)
def test_as_expected(report, tmp_path, expected):
    assert drift(report, tmp_path, expected) == []


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"accuracy": 0.81}, "accuracy is 0.8, expected 0.81 (off by -0.01, tolerance 1e-06)."),
        ({"accuracy": {"value": 0.9, "tolerance": 0.01}}, "tolerance 0.01"),
        ({"counts.items": 41}, "counts.items is 40, expected 41"),
        ({"Deepfakes.auc": 0.5}, "Deepfakes.auc is 0.9"),
        ({"bleu_1": 0.5}, "bleu_1 is not in this report, expected 0.5."),
        ({"video_auc": 0.0}, "video_auc is undefined (no videos), expected 0.0."),
        ({"accuracy": None}, "accuracy is 0.8, expected it to be undefined."),
    ],
)
def test_each_drift_is_named(report, tmp_path, expected, words):
    found = drift(report, tmp_path, {**expected, "frame_auc": 0.875})
    assert len(found) == 1
    assert words in found[0]


def test_every_drift_is_named(report, tmp_path):
    found = drift(report, tmp_path, {"accuracy": 1.0, "nothing": 1.0, "frame_auc": 0.875, "x": 0})
    assert [line.split()[0] for line in found] == ["accuracy", "nothing", "x"]


def test_a_report_serves_as_expectation(report, tmp_path):
    assert drift(report, tmp_path, report) == []
    other = build_report(scores_set(44), some_measures(accuracy=Figure(0.7, 0.6, 0.8)))
    found = drift(report, tmp_path, other)
    assert [line.split()[0] for line in found] == ["data.fingerprint", "accuracy"]
    changed = {**report, "protocol": {**report["protocol"], "sha256": "sha256:0"}}
    assert drift(report, tmp_path, changed)[0].startswith("protocol.sha256 is sha256:")


def test_only_the_value_of_an_earlier_report_counts_not_its_interval(report, tmp_path):
    earlier = build_report(scores_set(), some_measures(accuracy=Figure(0.8, 0.1, 0.9)))
    assert drift(report, tmp_path, earlier) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("{", "not valid JSON"),
        ("[0.9]", "JSON object"),
        ("{}", "expects nothing"),
        ('{"tolerance": 1}', "expects nothing"),
        ('{"accuracy": NaN}', "NaN"),
        ('{"accuracy": "high"}', "'high' of 'accuracy', which is not a number"),
        ('{"accuracy": true}', "True of 'accuracy'"),
        ('{"accuracy": [0.1]}', "which is not a number"),
        ('{"accuracy": {"tolerance": 1}}', "gives 'accuracy' no value"),
        ('{"accuracy": {"value": 1, "tolerance": -1}}', "below 0"),
        ('{"accuracy": {"value": 1, "tolerance": "wide"}}', "accuracy.tolerance"),
    ],
)
def test_a_broken_expectation_is_named(tmp_path, content, words):
    path = tmp_path / "expected.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_expectation(path)


def test_a_missing_expectation_is_named(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        read_expectation(tmp_path / "none.json")


def test_floors(report):
    assert below(report, ACCURACY, 0.8) is None
    assert "accuracy is 0.800000, at least 0.81" in (below(report, ACCURACY, 0.81) or "")
    assert "frame_auc" in (below(report, AUC, 0.9) or "")
    only_video = build_report(scores_set(), some_measures(video_auc=Figure(None, note="one class")))
    assert "video_auc is undefined (one class)" in (below(only_video, AUC, 0.1) or "")
    assert "not among" in (below(only_video, ACCURACY, 0.1) or "")
