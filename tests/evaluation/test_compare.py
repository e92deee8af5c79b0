from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from m2f2cli.errors import InputError
from m2f2cli.evaluation import protocols
from m2f2cli.evaluation.compare import compare_reports
from m2f2cli.evaluation.report import build_report, write_report
from m2f2cli.evaluation.truth import Joined, fingerprint
from m2f2cli.metrics import roc_auc
from tests.evaluation.reports import explanation_set, judgement_set, scores_set


def saved(folder, scored, protocol="standard"):
    measures = replace(protocols.standard(scored, resamples=0, java=False), protocol=protocol)
    write_report(folder, build_report(scored, measures), scored, "")
    return folder


def better(scored: Joined, by: float = 0.1) -> Joined:
    """The same items with scores nearer to the truth."""
    items = []
    for item in scored.items:
        score = np.clip((item.fake_probability or 0) + by * (2 * item.label - 1), 0, 1)
        items.append(replace(item, fake_probability=float(score)))
    return replace(scored, items=tuple(items), model="new")


def test_figures_side_by_side_with_their_difference(tmp_path):
    old, new = scores_set(80), better(scores_set(80))
    found = compare_reports(
        saved(tmp_path / "a", old), saved(tmp_path / "b", new) / "report.json", resamples=300
    )
    labels = np.array([item.label for item in old.items])
    aucs = [roc_auc(labels, np.array([i.fake_probability for i in s.items])) for s in (old, new)]
    row = found["figures"]["frame_auc"]
    assert [row["first"], row["second"]] == pytest.approx(aucs)
    assert row["difference"] == pytest.approx(aucs[1] - aucs[0])
    assert 0 < row["low"] < row["difference"] < row["high"]
    assert set(found["per_kind"]) == {"real", "Deepfakes", "FaceSwap"}
    assert found["items"] == {"both": 80, "only_first": 0, "only_second": 0}
    answers = found["answers"]
    assert sum(answers.values()) == 80
    assert answers["only_second_right"] > answers["only_first_right"] == 0
    assert found["first"]["model"]["name"] == "lite"
    assert found["second"]["model"]["name"] == "new"
    assert found["notes"] == []


def test_a_report_does_not_differ_from_itself(tmp_path):
    folder = saved(tmp_path / "a", scores_set())
    found = compare_reports(folder, folder, resamples=100)
    for row in (*found["figures"].values(), *found["per_kind"]["FaceSwap"].values()):
        assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)


def test_turned_around_the_signs_turn(tmp_path):
    one, two = saved(tmp_path / "a", scores_set()), saved(tmp_path / "b", better(scores_set()))
    there, back = (compare_reports(*p, resamples=100)["figures"] for p in ((one, two), (two, one)))
    for name, row in there.items():
        assert back[name]["difference"] == pytest.approx(-row["difference"])
        assert back[name]["low"] == pytest.approx(-row["high"])


def test_pairing_makes_the_interval_narrow(tmp_path):
    """The same small gain for every picture is certain although each figure alone is not."""
    old = scores_set(80)
    found = compare_reports(
        saved(tmp_path / "a", old), saved(tmp_path / "b", better(old, 0.02)), resamples=300
    )
    alone = protocols.standard(old, resamples=300).figures["frame_auc"]
    row = found["figures"]["frame_auc"]
    assert row["high"] - row["low"] < (alone.high - alone.low) / 3


def test_other_data_are_refused_unless_common_items_are_asked_for(tmp_path):
    whole = scores_set(80)
    half = replace(whole, items=whole.items[20:60])
    half = replace(half, data_fingerprint=fingerprint(half.items))
    one, two = saved(tmp_path / "a", whole), saved(tmp_path / "b", better(half))
    with pytest.raises(InputError, match="different data") as caught:
        compare_reports(one, two)
    assert "--common-items" in (caught.value.hint or "")
    found = compare_reports(one, two, common_items=True, resamples=50)
    assert found["items"] == {"both": 40, "only_first": 40, "only_second": 0}
    assert "40 items that both have" in found["notes"][0]
    expected = protocols.standard(half, resamples=0).figures["accuracy"].value
    assert found["figures"]["accuracy"]["first"] == expected


def test_items_in_another_order_are_the_same_items(tmp_path):
    one = scores_set()
    turned = replace(one, items=one.items[::-1])
    turned = replace(turned, data_fingerprint=fingerprint(turned.items))
    found = compare_reports(saved(tmp_path / "a", one), saved(tmp_path / "b", turned), resamples=20)
    assert all(row["difference"] == 0 for row in found["figures"].values())


def test_no_common_item_and_two_truths_are_named(tmp_path):
    one = scores_set(8)
    others = [replace(i, name="x" + i.name) for i in one.items]
    strange = replace(one, items=tuple(others), data_fingerprint="sha256:x")
    wrong = [replace(one.items[0], label=1, kind="fake"), *one.items[1:]]
    doubted = replace(one, items=tuple(wrong), data_fingerprint="sha256:y")
    folder = saved(tmp_path / "a", one)
    with pytest.raises(InputError, match="no item in common"):
        compare_reports(folder, saved(tmp_path / "b", strange), common_items=True)
    with pytest.raises(InputError, match=r"'real/000\.jpg' is labelled 0 in"):
        compare_reports(folder, saved(tmp_path / "c", doubted), common_items=True)


def test_a_detector_and_texts_are_compared_by_verdict(tmp_path):
    texts = judgement_set()
    scores = [replace(i, answer=None, verdict=None, fake_probability=0.1) for i in texts.items]
    detector = replace(texts, items=tuple(scores), task="scores", threshold=0.5, missing=())
    found = compare_reports(
        saved(tmp_path / "a", detector), saved(tmp_path / "b", texts), resamples=50
    )
    assert found["figures"]["accuracy"] | {"low": 0, "high": 0} == {
        "first": 0.5, "second": 0.25, "difference": -0.25, "low": 0, "high": 0,
    }  # fmt: skip
    assert "frame_auc" not in found["figures"]
    assert "by their verdicts alone" in found["notes"][0]


def test_explanations_are_compared_with_explanations_only(tmp_path):
    pytest.importorskip("pycocoevalcap")
    texts = explanation_set()
    spoken = [replace(texts.items[0], answer="The eyes."), texts.items[1]]
    one = saved(tmp_path / "a", texts)
    two = saved(tmp_path / "b", replace(texts, items=tuple(spoken)))
    found = compare_reports(one, two, resamples=20)
    assert found["figures"]["rouge_l"]["difference"] > 0
    assert found["answers"] is None
    numbers = replace(
        texts,
        task="scores",
        items=tuple(replace(i, fake_probability=0.5, answer=None) for i in texts.items),
    )
    with pytest.raises(InputError, match="only with explanations"):
        compare_reports(one, saved(tmp_path / "c", numbers))


def test_the_paper_protocol_is_said(tmp_path):
    one = saved(tmp_path / "a", scores_set(), protocol="paper")
    found = compare_reports(one, one, resamples=20)
    assert "paper protocol" in found["notes"][0]
