"""From the scores of an item's crops to its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from m2f2cli.inference.prepare import Prepared, View
from m2f2cli.inference.scoring import Score
from m2f2cli.inference.verdict import Rule, deciding_first
from m2f2cli.records import Detection, FaceScore, FrameScore, Settings


def assemble(
    prepared: Prepared, scores: Mapping[bytes, Score], rule: Rule, settings: Settings
) -> Detection:
    """Make the record of one item.

    Args:
        prepared: The item as read.
        scores: By the crops' digests; all of the item's crops.
        rule: Turns scores into verdicts.
        settings: Of the run.
    """
    width, height = prepared.size or (None, None)
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
    )
    ranked = [faces_of(view, scores, rule) for view in prepared.views]
    if prepared.source.kind == "video":
        return _video(record, prepared, ranked, rule)
    return _picture(record, ranked[0]) if prepared.status == "ok" else record


def faces_of(view: View, scores: Mapping[bytes, Score], rule: Rule) -> list[FaceScore]:
    """The judged crops of a picture or frame, the one that decides first."""
    faces = []
    for crop in view.crops:
        score = scores[crop.digest]
        judgement = rule.judge(score.fake_probability, score.domain_distance)
        faces.append(
            FaceScore(
                box=crop.box,
                crop=crop.crop,
                fake_probability=score.fake_probability,
                verdict=judgement.verdict,
                reason=judgement.reason,
                in_domain=judgement.in_domain,
                domain_distance=score.domain_distance,
                finder_score=crop.finder_score,
            )
        )
    return deciding_first(faces)


def _picture(record: Detection, faces: list[FaceScore]) -> Detection:
    first = faces[0]
    return replace(
        record,
        verdict=first.verdict,
        fake_probability=first.fake_probability,
        reason=first.reason,
        in_domain=first.in_domain,
        domain_distance=first.domain_distance,
        crop=first.crop,
        crop_source="picture" if first.box is None else "face",
        faces=tuple(faces),
    )


def _video(
    record: Detection, prepared: Prepared, ranked: list[list[FaceScore]], rule: Rule
) -> Detection:
    frames = []
    for view, faces in zip(prepared.views, ranked, strict=True):
        frame = FrameScore(view.index, round(view.time, 3), view.faces_found)
        if faces:
            first = faces[0]
            frame = replace(
                frame,
                fake_probability=first.fake_probability,
                crop=first.crop,
                in_domain=first.in_domain,
                domain_distance=first.domain_distance,
            )
        frames.append(frame)
    record = replace(record, frames=tuple(frames))
    if record.status != "ok":
        return record
    mean, distance, judgement = rule.judge_frames(frames)
    return replace(
        record,
        verdict=judgement.verdict,
        fake_probability=mean,
        reason=judgement.reason,
        in_domain=judgement.in_domain,
        domain_distance=distance,
    )
