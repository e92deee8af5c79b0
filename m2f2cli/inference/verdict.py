"""From scores to verdicts and records: threshold, uncertain band, domain check, faces, frames."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from m2f2cli.errors import UsageError
from m2f2cli.records import Detection, FaceScore, FrameScore, Settings

if TYPE_CHECKING:
    from m2f2cli.inference.pipeline import Prepared, Score, View

DIGITS = 6  # probabilities are rounded to this before anything is decided by them
_SEVERITY = {"fake": 2, "uncertain": 1, "real": 0}


class Judgement(NamedTuple):
    """A verdict with its reasons.

    Attributes:
        verdict: ``real``, ``fake`` or ``uncertain``.
        reason: Why it is uncertain; None otherwise.
        in_domain: Whether the input resembles the training crops; None without a check.
        forgery: The kind of forgery; None unless it is fake and one kind leads clearly.
    """

    verdict: str
    reason: str | None
    in_domain: bool | None
    forgery: str | None = None


@dataclass(frozen=True)
class Rule:
    """Turns a fake probability into a verdict.

    Attributes:
        threshold: Probability from which the verdict is fake, in [0, 1].
        uncertain: (low, high), both ends included, or None.
        domain_limit: Largest domain distance the model answers for, or None.
        kind_margin: How far a kind of forgery must lead the next to be named; None names none.
    """

    threshold: float
    uncertain: tuple[float, float] | None = None
    domain_limit: float | None = None
    kind_margin: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"The threshold must lie in [0, 1], not {self.threshold}.")
        if self.uncertain and not 0 <= self.uncertain[0] <= self.uncertain[1] <= 1:
            raise UsageError(
                f"The uncertain band must be LOW:HIGH with 0 <= LOW <= HIGH <= 1, "
                f"not {self.uncertain[0]}:{self.uncertain[1]}.",
                "For example: --uncertain 0.4:0.6, or --uncertain none.",
            )

    def judge(
        self,
        fake_probability: float,
        domain_distance: float | None,
        kind: tuple[str, float] | None = None,
    ) -> Judgement:
        """Decide about one crop.

        Args:
            fake_probability: In [0, 1].
            domain_distance: 0 or more; with None the domain is not checked.
            kind: As ``pipeline.Score.kind``.
        """
        in_domain = None
        if self.domain_limit is not None and domain_distance is not None:
            in_domain = domain_distance <= self.domain_limit
            if not in_domain:
                return Judgement(
                    "uncertain",
                    f"unlike the pictures the model was trained on "
                    f"(distance {domain_distance:.2f}, limit {self.domain_limit:.2f})",
                    in_domain,
                )
        found = self._by_score(fake_probability, in_domain)
        if found.verdict == "fake" and kind is not None and self.kind_margin is not None:
            return found._replace(forgery=kind[0] if kind[1] >= self.kind_margin else None)
        return found

    def judge_frames(self, frames: Sequence[FrameScore]) -> tuple[float, float | None, Judgement]:
        """Decide about a video by the mean over its frames that show a face.

        Args:
            frames: At least one with a ``fake_probability``.

        Returns:
            The mean probability, the mean domain distance (None without one), and the judgement;
            the video is in the domain when at least half of those frames are, and a fake one is of
            the kind that more than half of its frames with a named kind have.
        """
        judged = [frame for frame in frames if frame.fake_probability is not None]
        scores = [frame.fake_probability or 0.0 for frame in judged]
        mean = round(math.fsum(scores) / len(scores), DIGITS)
        distances = [f.domain_distance for f in judged if f.domain_distance is not None]
        distance = round(math.fsum(distances) / len(distances), DIGITS) if distances else None
        known = [frame.in_domain for frame in judged if frame.in_domain is not None]
        outside = len(known) - sum(known)
        if 2 * outside > len(known):
            reason = (
                f"{outside} of {len(known)} frames are unlike the pictures the model was trained on"
            )
            return mean, distance, Judgement("uncertain", reason, False)
        found = self._by_score(mean, True if known else None)
        named = Counter(frame.forgery for frame in judged if frame.forgery is not None)
        if found.verdict == "fake" and named:
            name, count = named.most_common(1)[0]
            found = found._replace(forgery=name if 2 * count > named.total() else None)
        return mean, distance, found

    def _by_score(self, score: float, in_domain: bool | None) -> Judgement:
        if self.uncertain and self.uncertain[0] <= score <= self.uncertain[1]:
            low, high = self.uncertain
            return Judgement(
                "uncertain", f"the score lies in the uncertain band {low:g} to {high:g}", in_domain
            )
        return Judgement("fake" if score >= self.threshold else "real", None, in_domain)


def deciding_first(faces: Sequence[FaceScore]) -> list[FaceScore]:
    """Order a picture's faces: the one that decides about the picture first.

    A fake face outranks an uncertain one and that a real one; among equals the higher fake
    probability leads, then the order found.
    """
    return sorted(faces, key=lambda face: (-_SEVERITY[face.verdict], -face.fake_probability))


def assemble(
    prepared: Prepared, scores: Mapping[bytes, Score], rule: Rule, settings: Settings
) -> Detection:
    """Make the record of one item, from the scores of its crops by their digests."""
    width, height = prepared.size or (None, None)
    ranked = [faces_of(view, scores, rule) for view in prepared.views]
    video = prepared.source.kind == "video"
    frames = [
        _frame(view, faces[0] if faces else None)
        for view, faces in zip(prepared.views, ranked, strict=True)
        if video
    ]
    record = Detection(
        path=prepared.source.path,
        kind=prepared.source.kind,
        status=prepared.status,
        settings=settings,
        message=prepared.message,
        note=prepared.note,
        sha256=prepared.sha256,
        width=width,
        height=height,
        faces_found=max((view.faces_found for view in prepared.views), default=None),
        frames=tuple(frames),
    )
    if record.status != "ok":
        return record
    if video:
        mean, distance, judgement = rule.judge_frames(frames)
        return replace(
            record, fake_probability=mean, domain_distance=distance, **judgement._asdict()
        )
    first = ranked[0][0]
    return replace(
        record,
        verdict=first.verdict,
        fake_probability=first.fake_probability,
        reason=first.reason,
        in_domain=first.in_domain,
        domain_distance=first.domain_distance,
        forgery=first.forgery,
        crop=first.crop,
        crop_source="picture" if first.box is None else "face",
        faces=tuple(ranked[0]),
    )


def faces_of(view: View, scores: Mapping[bytes, Score], rule: Rule) -> list[FaceScore]:
    """The judged crops of a picture or frame, the one that decides first."""
    faces = []
    for crop in view.crops:
        score = scores[crop.digest]
        judgement = rule.judge(score.fake_probability, score.domain_distance, score.kind)
        faces.append(
            FaceScore(
                box=crop.box,
                crop=crop.crop,
                fake_probability=score.fake_probability,
                domain_distance=score.domain_distance,
                finder_score=crop.finder_score,
                **judgement._asdict(),
            )
        )
    return deciding_first(faces)


def _frame(view: View, first: FaceScore | None) -> FrameScore:
    """A frame, represented by the face that decides it, if it shows one."""
    frame = FrameScore(view.index, round(view.time, 3), view.faces_found)
    if first is None:
        return frame
    return replace(
        frame,
        fake_probability=first.fake_probability,
        crop=first.crop,
        in_domain=first.in_domain,
        domain_distance=first.domain_distance,
        forgery=first.forgery,
    )
