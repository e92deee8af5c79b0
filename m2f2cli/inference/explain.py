"""Explain pictures and videos: the detector's verdict, the language model's judgement, reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from m2f2cli.data.conversations import parse_verdict
from m2f2cli.errors import UsageError
from m2f2cli.inference.assemble import assemble, faces_of
from m2f2cli.inference.decoding import Decoder
from m2f2cli.inference.detect import rule_of, settings_of
from m2f2cli.inference.explain_asker import Asker, Loaded
from m2f2cli.inference.explain_interviews import Heard, Interview, Interviewer, Plan
from m2f2cli.inference.explain_questions import Question, choose
from m2f2cli.inference.prepare import Crop, Prepared, View
from m2f2cli.inference.scoring import Score
from m2f2cli.inference.sources import Source, expand
from m2f2cli.inference.verdict import Rule
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.records import (
    Answer,
    Detection,
    ExplainSettings,
    Explanation,
    FaceExplanation,
    agree,
)

FRAMES_AT_ONCE = 16


def explain(
    paths: Sequence[str],
    *,
    model: str | Loaded = "lite",
    options: ExplainOptions | None = None,
    recursive: bool = False,
) -> Iterator[Explanation]:
    """Judge and explain files, folders, globs, lists and videos.

    Every judged face of a picture is explained; of a video, the face that decides its frame with
    the highest fake probability.

    Args:
        paths: See ``sources.expand``.
        model: A checkpoint's name (see ``checkpoints.load.load_explainer``), or an
            explainer with its processor.
        options: How to ask.
        recursive: Enter sub-folders.

    Yields:
        One record an item, in order. A bad item is a record with another status than ``ok``.

    Raises:
        M2F2Error: Nothing to explain, a wrong option, an impossible question, or an unusable model.
    """
    chosen = options or ExplainOptions()
    yield from explain_sources(expand(paths, recursive=recursive), model=model, options=chosen)


def explain_sources(
    sources: Sequence[Source],
    *,
    model: str | Loaded,
    options: ExplainOptions,
    hear: Callable[[Heard], object] | None = None,
) -> Iterator[Explanation]:
    """``explain`` for sources already listed; arguments and records as there.

    Args:
        sources: The items.
        model: As for ``explain``.
        options: As for ``explain``.
        hear: Is told the words of each answer as they are written.
    """
    if options.condition == "truth":
        raise UsageError(
            "Only the questions of a data set know the truth.",
            "Leave out --condition truth, or name the questions with --dataset.",
        )
    with Decoder(sources, faces=options.detect.faces, frames=options.detect.frames) as decoder:
        asker = ready(model, options)
        questions = choose(options)
        settings = explain_settings(model, asker)
        rule = rule_of(asker.model.detector, options.detect)
        prepared = decoder.prepared(asker.recipe(), ahead=options.detect.batch_size)
        plans = (_plan(item, questions, asker, rule) for item in prepared)
        for plan, interviews in Interviewer(asker, rule, hear=hear).conduct(plans):
            seen = zip(plan.crops, interviews, strict=True)
            scores = {crop.digest: interview.score for crop, interview in seen} | plan.scores
            found = assemble(plan.prepared, scores, rule, settings)
            yield with_words(found, plan, interviews)


def ready(model: str | Loaded, options: ExplainOptions) -> Asker:
    """An explainer that can be asked what the options choose: the answers have their room.

    Raises:
        M2F2Error: The model is unusable, or a question impossible.
    """
    asker = Asker(model, options)
    asker.leave_room(
        asker.length(question.prompt(asker.template, told))
        for question in choose(options)
        for told in (None, "real", "fake")
    )
    return asker


def explain_settings(model: str | Loaded, asker: Asker) -> ExplainSettings:
    """What the words of a run depend on, as every record tells it.

    Args:
        model: As the user named or gave it.
        asker: The same, loaded.
    """
    options = asker.options
    name = model if isinstance(model, str) else type(asker.model).__name__
    base = settings_of(name, asker.model.detector, options.detect)
    return ExplainSettings(
        **{**vars(base), "model_fingerprint": asker.model.fingerprint},
        template=asker.template.name,
        condition=options.condition,
        questions=tuple(q.text for q in choose(options) if q.text is not None),
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling(),
        quantised=options.quantize,
    )


def _plan(prepared: Prepared, questions: tuple[Question, ...], asker: Asker, rule: Rule) -> Plan:
    """What is asked about an item; the frames of a video are judged first, to choose one."""
    if prepared.status != "ok":
        return Plan(prepared)
    if prepared.source.kind != "video":
        return Plan(prepared, prepared.views[0].crops, questions)
    crops = list({c.digest: c for view in prepared.views for c in view.crops}.values())
    scores: dict[bytes, Score] = {}
    for first in range(0, len(crops), FRAMES_AT_ONCE):
        some = crops[first : first + FRAMES_AT_ONCE]
        scores.update(zip((crop.digest for crop in some), asker.look(some)[0], strict=True))
    frame, crop = most_fake(prepared, scores, rule)
    return Plan(prepared, (crop,), questions, scores, frame.index)


def most_fake(prepared: Prepared, scores: Mapping[bytes, Score], rule: Rule) -> tuple[View, Crop]:
    """The frame of a video with the highest fake probability, and the face that decides it."""
    frame, face = max(
        ((view, faces_of(view, scores, rule)[0]) for view in prepared.views if view.crops),
        key=lambda pair: pair[1].fake_probability,
    )
    return frame, next(crop for crop in frame.crops if crop.crop == face.crop)


def with_words(found: Detection, plan: Plan, interviews: Sequence[Interview]) -> Explanation:
    """The record of an item with what the language model said of its faces."""
    explained = [
        _face(crop, interview, plan) for crop, interview in zip(plan.crops, interviews, strict=True)
    ]
    order = [face.crop for face in found.faces]
    if order:
        explained.sort(key=lambda face: order.index(face.crop))
    judgement = explained[0].judgement if explained else None
    return Explanation(
        **vars(found),
        judgement=judgement,
        agreement=agree(judgement, found.verdict),
        explanations=tuple(explained),
    )


def _face(crop: Crop, interview: Interview, plan: Plan) -> FaceExplanation:
    judged, *others = interview.said
    judgement, verdict = parse_verdict(judged.text), interview.verdict.verdict
    return FaceExplanation(
        crop=crop.crop,
        frame=plan.frame,
        fake_probability=plan.scores.get(crop.digest, interview.score).fake_probability,
        verdict=verdict,
        told=interview.told,
        judgement=judgement,
        judgement_text=judged.text,
        agreement=agree(judgement, verdict),
        reasons=tuple(
            Answer(question.region, asked, said.text, said.complete)
            for question, asked, said in zip(
                plan.questions[1:], interview.asked[1:], others, strict=True
            )
        ),
    )
