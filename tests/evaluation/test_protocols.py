"""The standard protocol on small sets whose figures can be counted by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f2cli.errors import UsageError
from m2f2cli.evaluation import protocols
from m2f2cli.evaluation.protocols import Figure
from m2f2cli.evaluation.truth import Item, Joined, fingerprint
from m2f2cli.metrics import (
    METRICS,
    average_precision,
    calibration_error,
    roc_auc,
)


def scored(items, *, task="scores", threshold=0.5, **more):
    items = tuple(items)
    return Joined("images", task, items, threshold, None, None, fingerprint(items), "test", **more)


def picture(number, label, score, *, kind=None, group=None, **more):
    name = f"{number}.jpg"
    return Item(name, label, kind or ("fake" if label else "real"), group or name, score, **more)


def videos(seed=0, count=12, frames=6):
    """Frames of real videos and of two manipulations, in a regular order."""
    random = np.random.default_rng(seed)
    items = []
    for video in range(count):
        kind = ("real", "swap", "real", "puppet")[video % 4]
        centre = random.normal() + (kind != "real")
        for frame in range(frames):
            score = float(1 / (1 + np.exp(-centre - random.normal())))
            label = int(kind != "real")
            items.append(picture(f"{video}/{frame}", label, score, kind=kind, group=str(video)))
    return items


def values(measures):
    return {name: figure.value for name, figure in measures.figures.items()}


def test_figures_of_frames_and_videos():
    items = videos()
    found = protocols.standard(scored(items, threshold=0.6), resamples=200)
    labels = np.array([item.label for item in items])
    scores = np.array([item.fake_probability for item in items])
    got = values(found)
    assert got["frame_auc"] == pytest.approx(roc_auc(labels, scores))
    assert got["video_auc"] == pytest.approx(
        roc_auc(labels.reshape(12, 6)[:, 0], scores.reshape(12, 6).mean(axis=1))
    )
    assert got["ap"] == pytest.approx(average_precision(labels, scores))
    assert got["calibration_error"] == pytest.approx(calibration_error(labels, scores))
    assert got["accuracy"] == pytest.approx(((scores >= 0.6) == labels).mean())
    swap = np.array([item.kind in ("swap", "real") for item in items])
    assert found.per_kind["swap"]["auc"].value == pytest.approx(roc_auc(labels[swap], scores[swap]))
    assert found.per_kind["swap"]["count"].value == 18
    assert list(found.per_kind) == ["real", "puppet", "swap"]
    assert "auc" not in found.per_kind["real"]
    assert found.counts["videos"] == 12
    for figure in found.figures.values():
        assert figure.low <= figure.value <= figure.high


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_the_order_of_frames_and_videos_does_not_matter(shuffler):
    items = videos()
    before = values(protocols.standard(scored(items), resamples=0))
    shuffler.shuffle(items)
    assert values(protocols.standard(scored(items), resamples=0)) == pytest.approx(before)


def test_intervals_repeat_with_the_seed():
    items = videos()
    runs = [protocols.standard(scored(items), resamples=100, seed=s).figures for s in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_frames_of_one_video_widen_the_interval():
    """Six frames of one video are hardly more than one picture."""
    items = videos(count=40)
    alone = [replace(item, group=item.name) for item in items]
    together, apart = (
        protocols.standard(scored(rows), resamples=300).figures["frame_auc"]
        for rows in (items, alone)
    )
    assert together.value == apart.value
    assert together.high - together.low > 1.3 * (apart.high - apart.low)


def test_pictures_have_no_video_figure():
    found = protocols.standard(scored([picture(0, 0, 0.1), picture(1, 1, 0.9)]), resamples=10)
    assert "video_auc" not in found.figures
    assert found.counts["videos"] == 0


@pytest.mark.parametrize(("label", "absent"), [(0, "no forged"), (1, "no real")])
def test_one_class_leaves_the_auc_undefined_and_says_so(label, absent):
    found = protocols.standard(scored([picture(n, label, 0.7) for n in range(3)]), resamples=10)
    for name in ("frame_auc", "eer", "tpr_at_fpr_1", "balanced_accuracy"):
        assert found.figures[name].value is None
    assert absent in found.figures["frame_auc"].note
    assert found.figures["accuracy"].value == float(label)
    assert (found.figures["ap"].value is None) == (label == 0)


def test_a_lone_video_has_no_interval():
    found = protocols.standard(scored([picture(n, 1, 0.7, group="v") for n in range(3)]))
    assert found.figures["accuracy"] == Figure(1.0)


def test_an_empty_set_has_no_figures():
    found = protocols.standard(scored([]), resamples=10)
    assert all(f.value is None and f.note for f in found.figures.values())


def test_scores_that_failed_everywhere():
    items = [picture(n, n % 2, None, status="no_face") for n in range(4)]
    found = protocols.standard(scored(items), resamples=10)
    assert found.figures["frame_auc"] == Figure(None, note="no picture has a probability")
    assert found.figures["accuracy"].value == 0
    assert found.counts["failed"] == 4


def test_what_has_no_answer_is_wrong_but_not_ranked():
    items = [
        picture(0, 0, 0.1),
        picture(1, 1, 0.9),
        picture(2, 1, None, status="no_face"),
        picture(3, 0, None),
    ]
    found = protocols.standard(scored(items, missing=("3.jpg",), unknown=("x",)), resamples=0)
    got = values(found)
    assert (got["frame_auc"], got["accuracy"], got["recall"], got["precision"]) == (
        1,
        0.5,
        0.5,
        0.5,
    )
    assert (found.counts["missing"], found.counts["failed"], found.counts["answered"]) == (1, 1, 2)
    said = " ".join(found.notes)
    assert "without an answer, taken as wrong: 1" in said
    assert "could not be judged (no face, unreadable), taken as wrong: 1" in said
    assert "about nothing in the truth, left out: 1" in said


def test_uncertain_verdicts_are_called_by_the_threshold():
    items = [picture(0, 0, 0.4, verdict="uncertain"), picture(1, 1, 0.6, verdict="uncertain")]
    found = protocols.standard(scored(items), resamples=0)
    assert found.figures["accuracy"].value == 1
    assert "Uncertain verdicts, called by the threshold: 2." in found.notes


def test_an_unknown_threshold_is_said():
    found = protocols.standard(scored([picture(0, 0, 0.5)], threshold=None), resamples=0)
    assert found.figures["accuracy"].value == 0
    assert "The predictions name no threshold: 0.5 is used." in found.notes
    assert found.definition["threshold_from"] == "the default"


def test_a_video_of_both_classes_is_left_out_and_said():
    items = [*videos(), *(picture(f"x/{n}", n % 2, 0.5, group="x") for n in range(4))]
    found = protocols.standard(scored(items), resamples=20)
    alone = protocols.standard(scored(videos()), resamples=20)
    assert found.figures["video_auc"].value == alone.figures["video_auc"].value
    assert "Videos with both real and forged frames, left out of the video AUC: 1." in found.notes


def test_the_stored_rule_stands_where_its_verdicts_put_it():
    verdicts = ["real", "fake", "uncertain", "fake", "real", "uncertain", "fake", None]
    scores = [0.12, 0.7, 0.5, 0.9, 0.22, 0.99, 0.8, None]  # the sixth is outside the domain
    labels = [0, 0, 0, 1, 1, 1, 1, 1]
    items = [
        picture(number, label, score, verdict=verdict)
        for number, (label, score, verdict) in enumerate(zip(labels, scores, verdicts, strict=True))
    ]
    found = protocols.standard(scored(items, threshold=0.5), resamples=200)
    got = values(found)
    assert got["coverage"] == pytest.approx(5 / 7)
    assert got["risk"] == pytest.approx(2 / 5)
    for name in ("aurc", "coverage", "risk"):
        figure = found.figures[name]
        assert figure.low <= figure.value <= figure.high
    curve = protocols.risk_curve(scored(items, threshold=0.5))
    assert curve["coverage"] == pytest.approx([n / 7 for n in range(1, 8)])
    # 0.99, 0.9, 0.12 and 0.8 are right; 0.22, 0.7 and 0.5 are wrong
    assert curve["risk"] == pytest.approx([0, 0, 0, 0, 1 / 5, 2 / 6, 3 / 7])
    assert got["aurc"] == pytest.approx(sum(curve["risk"]) / 7)
    undecided = [replace(item, verdict="uncertain") for item in items[:4]]
    figures = protocols.standard(scored(undecided, threshold=0.5), resamples=20).figures
    assert figures["risk"].note == "nothing was decided"
    assert figures["coverage"].value == 0
    silent = [replace(item, verdict=None) for item in items]
    names = protocols.standard(scored(silent, threshold=0.5), resamples=0).figures.keys()
    assert "aurc" in names
    assert not {"coverage", "risk"} & names


def said(number, label, verdict, text="x"):
    return picture(number, label, None, verdict=verdict, answer=text)


def test_judgements_count_unparsed_as_wrong():
    items = [
        said(0, 0, "real"),
        said(1, 0, None),
        said(2, 1, "fake"),
        said(3, 1, None),
        said(4, 1, "real"),
        picture(5, 1, None),
    ]
    found = protocols.standard(scored(items, task="judgement", missing=("5.jpg",)), resamples=50)
    got = values(found)
    assert set(got) == {name for name, metric in METRICS.items() if metric.needs == "calls"}
    assert set(got) >= {"accuracy", "balanced_accuracy", "f1", "precision", "recall"}
    assert got["accuracy"] == pytest.approx(2 / 6)
    assert got["recall"] == pytest.approx(1 / 4)
    assert got["precision"] == pytest.approx(1 / 2)
    assert (found.counts["unparsed"], found.counts["missing"], found.counts["failed"]) == (2, 1, 0)
    assert "threshold" not in found.definition


def explanations(texts):
    references = {
        f"p{n}_{k}": ("the nose is smooth", "no detail") for n in range(4) for k in (0, 1)
    }
    items = [Item(key, 1, "fake", key[:2], answer=texts.get(key)) for key in references]
    missing = tuple(key for key in references if key not in texts)
    return scored(items, task="explanation", references=references, missing=missing)


def test_explanations_resample_pictures_and_take_silence_as_an_empty_text():
    perfect = {f"p{n}_{k}": "<s> the nose is smooth</s>" for n in range(4) for k in (0, 1)}
    found = protocols.standard(explanations(perfect), resamples=50, java=False)
    assert found.figures["rouge_l"] == Figure(1.0, 1.0, 1.0)
    assert found.figures["meteor"].note == "skipped: not asked for"
    assert found.per_kind == {}
    silent = {key: text for key, text in perfect.items() if key[0:2] != "p0"}
    found = protocols.standard(explanations(silent), resamples=50, java=False)
    assert found.figures["rouge_l"].value == pytest.approx(0.75)
    # Both answers of a picture come and go together: only quarters occur.
    assert found.figures["rouge_l"].low in (0.0, 0.25, 0.5)
    assert "without an answer, taken as an empty text: 2" in " ".join(found.notes)


def test_difference_is_paired_and_refuses_other_items():
    items = videos()
    better = [replace(i, fake_probability=0.3 * i.fake_probability + 0.7 * i.label) for i in items]
    found = protocols.difference(scored(items), scored(better), resamples=100)
    value, low, high = found["frame_auc"]
    assert value > 0
    assert low <= value <= high
    assert found["swap.auc"][0] >= 0
    with pytest.raises(UsageError, match="not of the same"):
        protocols.difference(scored(items), scored(items[1:]))


def test_the_protocol_hash_tells_settings_apart():
    items = videos()
    hashes = {
        protocols.standard(scored(items, threshold=threshold), resamples=n, seed=s).protocol_hash
        for threshold, n, s in ((0.5, 0, 0), (0.5, 0, 0), (0.6, 0, 0), (0.5, 1, 0), (0.5, 0, 1))
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("wrong", [{"resamples": -1}, {"level": 0.0}, {"level": 1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        protocols.standard(scored(videos()), **wrong)


def test_a_figure_is_never_nan():
    with pytest.raises(ValueError, match="finite"):
        Figure(float("nan"))


def test_measuring_files_loads_no_torch(tmp_path):
    csv = tmp_path / "frames.csv"
    rows = [f"{v}_{f},{v % 2},{(v * 7 + f) % 10 / 10}" for v in range(4) for f in range(3)]
    csv.write_text("image_id,ground_truth,prediction\n" + "\n".join(rows))
    code = f"""
import sys
from pathlib import Path
from m2f2cli.evaluation import protocols, truth
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.evaluation.truth import join
found = read_predictions(Path({str(csv)!r}))
protocols.standard(join(truth.frames_truth(found), found), resamples=5)
protocols.paper(found)
heavy = {{'torch', 'transformers', 'timm', 'h5py'}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_figure_is_in_the_documents():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert not {name for name in METRICS if f"`{name}`" not in page}
