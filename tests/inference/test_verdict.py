from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f2cli.errors import UsageError
from m2f2cli.inference.verdict import Rule, deciding_first
from m2f2cli.records import FaceScore, FrameScore


def frame(p: float | None, in_domain: bool | None = None) -> FrameScore:
    return FrameScore(0, 0.0, 1, p, in_domain=in_domain, domain_distance=None)


@pytest.mark.parametrize(
    ("score", "verdict"), [(0.0, "real"), (0.4999, "real"), (0.5, "fake"), (1.0, "fake")]
)
def test_the_threshold_itself_is_fake(score: float, verdict: str) -> None:
    assert Rule(0.5).judge(score, None).verdict == verdict


@pytest.mark.parametrize(
    ("score", "verdict"),
    [(0.39, "real"), (0.4, "uncertain"), (0.6, "uncertain"), (0.61, "fake")],
)
def test_the_band_includes_its_ends(score: float, verdict: str) -> None:
    judgement = Rule(0.5, (0.4, 0.6)).judge(score, None)
    assert judgement.verdict == verdict
    assert (judgement.reason is not None) == (verdict == "uncertain")


@given(st.floats(0, 1), st.floats(0, 100))
def test_outside_the_domain_nothing_is_claimed(score: float, distance: float) -> None:
    judgement = Rule(0.5, None, 2.0).judge(score, distance)
    assert judgement.in_domain == (distance <= 2.0)
    if distance > 2.0:
        assert judgement.verdict == "uncertain"
        assert "trained on" in str(judgement.reason)
    else:
        assert judgement.verdict in ("real", "fake")


def test_without_a_check_nothing_is_said_about_the_domain() -> None:
    assert Rule(0.5).judge(0.9, 50.0).in_domain is None
    assert Rule(0.5, None, 2.0).judge(0.9, None).in_domain is None


@given(st.lists(st.none() | st.floats(0, 1), min_size=1), st.randoms())
def test_a_video_is_the_mean_of_its_frames_in_any_order(
    scores: list[float | None], random: object
) -> None:
    known = [score for score in scores if score is not None]
    if not known:
        return
    frames = [frame(score) for score in scores]
    mean, _, judgement = Rule(0.5).judge_frames(frames)
    assert mean == pytest.approx(sum(known) / len(known), abs=1e-6)
    assert judgement.verdict == ("fake" if mean >= 0.5 else "real")
    random.shuffle(frames)  # type: ignore[attr-defined]
    assert Rule(0.5).judge_frames(frames)[0] == mean


@pytest.mark.parametrize(("inside", "verdict"), [(2, "fake"), (1, "uncertain"), (0, "uncertain")])
def test_a_video_is_in_the_domain_when_half_its_frames_are(inside: int, verdict: str) -> None:
    frames = [frame(0.9, i < inside) for i in range(4)]
    assert Rule(0.5, None, 2.0).judge_frames(frames)[2].verdict == verdict


KIND = ("generated", 1.0)


@pytest.mark.parametrize(
    ("margin", "score", "distance", "kind", "named"),
    [
        (1.0, 0.9, None, KIND, "generated"),
        (1.01, 0.9, None, KIND, None),
        (0.0, 0.9, None, ("generated", 0.0), "generated"),
        (None, 0.9, None, KIND, None),
        (0.0, 0.9, None, None, None),
        (0.0, 0.2, None, KIND, None),  # real
        (0.0, 0.5, None, KIND, None),  # in the uncertain band
        (0.0, 0.9, 3.0, KIND, None),  # outside the domain
    ],
)
def test_only_a_fake_verdict_names_a_kind_that_leads_far_enough(
    margin, score, distance, kind, named
) -> None:
    rule = Rule(0.5, (0.4, 0.6), 2.0, margin)
    assert rule.judge(score, distance, kind).forgery == named


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (["a", "a", "b", None], "a"),
        (["a", "b", None, None], None),
        ([None, None, None, "b"], "b"),
        (["a", "b", "c", None], None),
        ([None] * 4, None),
    ],
)
def test_a_fake_video_is_of_the_kind_that_most_of_its_named_frames_have(kinds, named) -> None:
    frames = [replace(frame(0.9), forgery=kind) for kind in kinds]
    assert Rule(0.5).judge_frames(frames)[2].forgery == named
    assert Rule(0.95).judge_frames(frames)[2].forgery is None  # real
    assert Rule(0.5, (0.8, 1.0)).judge_frames(frames)[2].forgery is None


def test_a_fake_face_outranks_an_uncertain_one_with_a_higher_score() -> None:
    def face(p: float, verdict: str) -> FaceScore:
        return FaceScore(None, (0, 0, 1, 1), p, verdict)

    faces = [face(0.1, "real"), face(0.95, "uncertain"), face(0.6, "fake"), face(0.7, "fake")]
    assert [f.fake_probability for f in deciding_first(faces)] == [0.7, 0.6, 0.95, 0.1]


@pytest.mark.parametrize("band", [(0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_an_impossible_band_is_refused(band: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="LOW:HIGH"):
        Rule(0.5, band)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_an_impossible_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold"):
        Rule(threshold)
