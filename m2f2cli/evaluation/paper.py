"""The paper protocol: what the published evaluation computes, faults included.

For comparison with published numbers only. Each fault is named in ``docs/metrics.md`` and in the
figures' notes; the video CSV is measured a second time without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m2f2cli.data.conversations import parse_as_published, plain
from m2f2cli.errors import UsageError
from m2f2cli.evaluation.predictions import Predictions
from m2f2cli.evaluation.truth import FAKE, REAL, Figure, Joined, Measures
from m2f2cli.metrics import Confusion, confusion, roc_auc

PROTOCOL = "paper"
REAL_PREFIX = "./utils/DDVQA_images/c40/test/5"  # a picture is real if its path starts so
TRIMMED = 10  # frames dropped at each end of a video's sorted scores
THRESHOLDS = 11_000  # tried for the best accuracy: 0, 1/10000, 2/10000, …
_STEP = 10_000

References = Mapping[str, Sequence[str]]


class Video(NamedTuple):
    """A run of frames.

    Attributes:
        scores: Probability of real, each frame.
        real: Whether it is real.
    """

    scores: tuple[float, ...]
    real: bool


def measure(found: Predictions | Joined, *, references: References | None = None) -> Measures:
    """Measure answers as the published code does.

    Args:
        found: A file of answers, or a set joined from one; a joined set of probabilities is taken
            in its own order, its groups as the videos.
        references: Explanations: key to reference answers; a joined set brings its own.

    Raises:
        UsageError: There is nothing that the published code measures: probabilities without
            truth, explanations without references, or texts that were joined without their file.
        MissingExtraError: Explanations are measured and pycocoevalcap is not installed.
    """
    if isinstance(found, Joined):
        if found.task == "scores":
            frames = [
                (item.group, item.label == REAL, 1 - item.fake_probability)
                for item in found.items
                if item.fake_probability is not None
            ]
            return _videos(frames, dropped=len(found.items) - len(frames))
        if found.predictions is None:
            raise UsageError(
                "The paper protocol counts the rows of the file of answers, which are not kept in "
                "a report.",
                "Evaluate the file of answers itself: --predictions FILE.jsonl.",
            )
        references = references or found.references
        found = found.predictions
    if found.layout == "judgements":
        return _judgements(found)
    if found.layout == "explanations":
        if not references:
            raise UsageError(
                "Explanations are measured against reference answers, and none were named.",
                "Add --truth with the file of test questions.",
            )
        return _explanations(found, references)
    if found.layout == "frames":
        frames = [
            (_video_of(row.name), found.labels[row.name] == REAL, 1 - row.fake_probability)
            for row in found.rows
            if row.fake_probability is not None
        ]
        return _videos(frames, dropped=0)
    raise UsageError(
        "Records of 'm2f2 detect' hold no truth, which the paper protocol needs.",
        "Name the data set or --truth FILE.jsonl.",
    )


def _video_of(name: str) -> str:
    return name.rpartition("_")[0]


def _judgements(found: Predictions) -> Measures:
    read = [(row.name, parse_as_published(row.answer or "")) for row in found.rows]
    kept = [(name, verdict) for name, verdict in read if verdict is not None]
    labels = np.array([not name.startswith(REAL_PREFIX) for name, _ in kept], dtype=np.int64)
    called = confusion(labels, np.array([verdict == "fake" for _, verdict in kept], dtype=bool))
    reason = "no answer says real or fake: the published code divides by zero"
    figures = {
        name: _figure(getattr(called, name), reason if not kept else None)
        for name in ("accuracy", "f1", "precision", "recall")
    }
    counts = {
        "items": len(found.rows),
        "real": int((labels == REAL).sum()),
        "fake": int((labels == FAKE).sum()),
        "answered": len(kept),
        "unparsed": len(read) - len(kept),
        **_cells(called),
    }
    notes = [
        "Published rule: a text with the letters 'real' says real ('unrealistic' too).",
        f"Published truth: a picture is real if its path starts with '{REAL_PREFIX}'.",
    ]
    if counts["unparsed"]:
        notes.append(f"Rows left out because no verdict was read: {counts['unparsed']:,}.")
    if repeated := len(found.rows) - len({row.name for row in found.rows}):
        notes.append(f"Rows about a picture seen before, counted again: {repeated:,}.")
    if labels.size and labels.min() == FAKE:
        notes.append("No path starts as the published code expects: every picture counts as fake.")
    definition = {
        "task": "judgement",
        "parser": "'real' as a substring first, then 'fake' or 'computer-generated'",
        "truth": f"real if the path starts with {REAL_PREFIX}",
        "unparsed": "left out",
        "repeated": "counted again",
    }
    return Measures(PROTOCOL, figures, {}, counts, definition, (*found.notes, *notes))


def _cells(called: Confusion) -> dict[str, int]:
    names = ("true_fake", "false_fake", "false_real", "true_real")
    return {name: int(count) for name, count in zip(names, called, strict=True)}


def _figure(value: Any, reason: str | None = None) -> Figure:
    """A number, or undefined for NaN."""
    if np.isnan(value):
        return Figure(None, note=reason or "a denominator is 0")
    return Figure(float(value))


def _explanations(found: Predictions, references: References) -> Measures:
    from m2f2cli.evaluation.language import ORDER, TOKENISER, score_texts

    answers = {row.name: plain(row.answer or "") for row in found.rows}
    missing, extra = references.keys() - answers.keys(), answers.keys() - references.keys()
    names = [*(f"bleu_{n + 1}" for n in range(ORDER)), "bleu", "rouge_l", "cider"]
    if missing or extra:
        reason = (
            f"the published code stops: {len(missing):,} questions without an answer, "
            f"{len(extra):,} answers to unknown questions"
        )
        figures = dict.fromkeys(names, Figure(None, note=reason))
    else:
        values = score_texts(references, answers).measure(np.ones((1, len(references))))
        figures = {name: Figure(float(values[name][0])) for name in names}
    notes = list(found.notes)
    if repeated := len(found.rows) - len(answers):
        notes.append(f"Answers to a question seen before, which replace the earlier: {repeated:,}.")
    counts = {
        "items": len(references),
        "answered": len(answers.keys() & references.keys()),
        "missing": len(missing),
        "unknown": len(extra),
        "duplicates": repeated,
    }
    definition = {
        "task": "explanation",
        "tokeniser": TOKENISER,
        "marks_removed": ["<s>", "</s>"],
        "keys": "must be those of the references",
        "repeated": "the last answer counts",
    }
    return Measures(PROTOCOL, figures, {}, counts, definition, tuple(notes))


def _videos(frames: Sequence[tuple[str, bool, float]], *, dropped: int) -> Measures:
    """Measure frames given as (video, whether real, probability of real), in the file's order."""
    published, whole = _published_videos(frames), _whole_videos(frames)
    figures = {
        **_pair("video_auc", "best_accuracy", published),
        **_pair("video_auc_fixed", "best_accuracy_fixed", whole),
    }
    notes = [
        "Published fault: a video is scored when the next one begins, with the next one's label; "
        "the last video is never scored.",
        "Published accuracy: the best of 11,000 thresholds, chosen on this very set.",
        "The figures named *_fixed have each video's own label and count every video.",
    ]
    short = sum(len(video.scores) <= 2 * TRIMMED for video in whole)
    if short:
        notes.append(
            f"Videos of at most {2 * TRIMMED} frames: {short:,}; *_fixed takes the mean of all of "
            "their frames."
        )
    if dropped:
        notes.append(f"Frames without a probability, left out: {dropped:,}.")
    counts = {
        "items": len(frames),
        "real": sum(real for _, real, _ in frames),
        "fake": sum(not real for _, real, _ in frames),
        "videos": len(whole),
        "videos_as_published": len(published),
    }
    definition = {
        "task": "scores",
        "positive": "real",
        "video_score": f"mean without the {TRIMMED} highest and lowest frames",
        "label_as_published": "of the first frame of the next video",
        "last_video_as_published": "left out",
        "thresholds": {"count": THRESHOLDS, "step": 1 / _STEP},
    }
    return Measures(PROTOCOL, figures, {}, counts, definition, tuple(notes))


def _published_videos(frames: Sequence[tuple[str, bool, float]]) -> list[Video]:
    """Videos as the published reader cuts them: at each change of the name, labelled too late."""
    videos = []
    scores: list[float] = []
    before: str | None = None
    for name, real, score in frames:
        if before is not None and name != before:
            videos.append(Video(tuple(scores), real))
            scores = []
        scores.append(score)
        before = name
    return videos


def _whole_videos(frames: Sequence[tuple[str, bool, float]]) -> list[Video]:
    """Every video with its own label, wherever its frames stand."""
    scores: dict[tuple[str, bool], list[float]] = {}
    for name, real, score in frames:
        scores.setdefault((name, real), []).append(score)
    return [Video(tuple(found), real) for (_, real), found in scores.items()]


def _pair(auc: str, accuracy: str, videos: Sequence[Video]) -> dict[str, Figure]:
    fixed = auc.endswith("_fixed")
    reason = None
    if not fixed and any(len(video.scores) <= 2 * TRIMMED for video in videos):
        reason = (
            f"the published code stops: a video of at most {2 * TRIMMED} frames has none left "
            "after trimming"
        )
    elif len({video.real for video in videos}) < 2:
        reason = "one class only among the videos"
    if reason:
        return {auc: Figure(None, note=reason), accuracy: Figure(None, note=reason)}
    scores = np.array([_trimmed_mean(video.scores) for video in videos])
    real = np.array([video.real for video in videos])
    steps = np.arange(THRESHOLDS) / _STEP
    # What is right at a threshold: real videos above it, and the others.
    ranked_real, ranked_fake = np.sort(scores[real]), np.sort(scores[~real])
    right = real.sum() - np.searchsorted(ranked_real, steps, "right")
    right = right + np.searchsorted(ranked_fake, steps, "right")
    return {
        auc: Figure(roc_auc(real.astype(np.int64), scores)),
        accuracy: Figure(float(right.max() / len(scores)), note="threshold chosen on this set"),
    }


def _trimmed_mean(scores: Sequence[float]) -> float:
    kept = sorted(scores)[TRIMMED:-TRIMMED]
    return float(np.mean(kept if kept else scores))
