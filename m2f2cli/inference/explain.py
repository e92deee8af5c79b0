"""Explain pictures and videos: the detector's verdict, the language model's judgement, reasons.

Items are judged by the pipeline of ``detect``, with the detector inside the explainer. Then the
questions about each face are answered in batches across items, equal faces once.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.data.conversations import parse_verdict
from m2f2cli.data.transforms import explainer_views
from m2f2cli.errors import UsageError
from m2f2cli.inference.optimize_cpu import optimize_for_cpu
from m2f2cli.inference.pipeline import (
    Judged,
    Score,
    Scorer,
    in_batches,
    judge,
    rule_of,
    settings_of,
)
from m2f2cli.inference.questions import Question, choose
from m2f2cli.inference.recordfile import EXPLANATIONS, Job
from m2f2cli.inference.sources import Crop, Decoder, Source, expand
from m2f2cli.inference.verdict import Judgement, faces_of
from m2f2cli.models.conversation import Template, template
from m2f2cli.models.explainer import Explainer, PictureFeatures
from m2f2cli.models.prefix import SharedPrompts
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import decode
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.records import Answer, Box, ExplainSettings, Explanation, FaceExplanation, agree

Loaded = tuple[Explainer, ExplainerProcessor]

_REMEMBERED = 4096  # faces whose answers are kept for another appearance
_PROMPTS = 16_384  # prompts whose tokens are kept


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


def explain_job(
    paths: Sequence[str],
    *,
    options: ExplainOptions,
    model: str | Loaded,
    recursive: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
) -> Job[Explanation]:
    """Everything one run of ``m2f2 explain`` over files does; ``run`` takes an ``on_text``.

    Arguments as for ``explain`` and ``recordfile.Job``.
    """
    return Job(
        expand(paths, recursive=recursive),
        run=lambda left, on_text=None: explain_sources(
            left, model=model, options=options, on_text=on_text
        ),
        settings=lambda: ExplainPipeline(model, options).settings(model),
        output=output,
        overwrite=overwrite,
        layout=EXPLANATIONS,
    )


def explain_sources(
    sources: Sequence[Source],
    *,
    model: str | Loaded,
    options: ExplainOptions,
    on_text: Callable[[TextChunk], object] | None = None,
) -> Iterator[Explanation]:
    """``explain`` for sources already listed; arguments and records as there.

    Args:
        sources: The items.
        model: As for ``explain``.
        options: As for ``explain``.
        on_text: Is called with each answer's text while it is generated, answer by answer.
    """
    if options.condition == "truth":
        raise UsageError(
            "Only the questions of a data set know the truth.",
            "Leave out --condition truth, or name the questions with --dataset.",
        )
    with Decoder(sources, options.detect) as decoder:
        pipeline = ExplainPipeline(model, options)
        questions = choose(options)
        pipeline.reserve(questions)
        settings = pipeline.settings(model)
        requests = (
            None if item is None else Request(item, pipeline.faces(item), questions)
            for item in pipeline.judge(decoder, settings)
        )
        for request, answers in pipeline.answers(requests, on_text=on_text):
            yield explanation(request, answers, settings)


class Face(NamedTuple):
    """A face to ask about.

    Attributes:
        crop: What is seen of it.
        score: The detector's.
        frame: Number of the video's frame; None for a picture.
    """

    crop: Crop
    score: Score
    frame: int | None = None


class Request(NamedTuple):
    """What is asked about one item.

    Attributes:
        judged: The item.
        faces: The faces asked about; none of an item without a verdict.
        questions: What is asked about each.
    """

    judged: Judged
    faces: Sequence[Face]
    questions: tuple[Question, ...]


class Prompt(NamedTuple):
    """A question inside the template: its text with placeholders, and its token ids."""

    text: str
    tokens: list[int]


class Completion(NamedTuple):
    """A generated answer.

    Attributes:
        text: Without the tokenizer's marks.
        complete: Whether it ended by itself.
    """

    text: str
    complete: bool


class Answers(NamedTuple):
    """The answers about one face.

    Attributes:
        verdict: The detector's.
        told: What the questions told of the face, ``real`` or ``fake``; None when nothing.
        asked: The questions, with what they told.
        prompts: The same inside the template.
        completions: The answers, in order.
    """

    verdict: Judgement
    told: str | None
    asked: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    completions: tuple[Completion, ...] = ()


class TextChunk(NamedTuple):
    """A piece of an answer while it is generated.

    Attributes:
        crop: Of the face.
        fake_probability: The detector's.
        verdict: The detector's.
        question: What is answered.
        asked: The same in words.
        text: New text; empty when the answer begins.
    """

    crop: Box
    fake_probability: float
    verdict: str
    question: Question
    asked: str
    text: str


class ExplainPipeline:
    """An explainer with everything that is needed to judge faces and to ask about them.

    Args:
        model: A checkpoint's name (see ``checkpoints.load.load_explainer``), or an
            explainer with its processor.
        options: How to ask.
        maps: Keep the detector's forgery maps.

    Raises:
        M2F2Error: The checkpoint is none of an explainer, or damaged.
    """

    def __init__(self, model: str | Loaded, options: ExplainOptions, *, maps: bool = False) -> None:
        if isinstance(model, str):
            where = options.detect
            explainer, folder = load_explainer(
                model, device=where.device, dtype=where.dtype, quantize=options.quantize
            )
            optimize_for_cpu(explainer.detector)
            model = (
                explainer,
                ExplainerProcessor.from_folder(folder, explainer.config, explainer_views),
            )
        self.model, self.processor = model
        self.options = options
        self.template: Template = template(options.template or self.model.config.template)
        self.scorer = Scorer(self.model.detector, explainer=self.model, maps=maps)
        self.rule = rule_of(self.model.detector, options.detect)
        self._prompts: dict[tuple[Question, str | None], Prompt] = {}
        self._room = options.max_new_tokens

    def settings(self, model: str | Loaded) -> ExplainSettings:
        """What the words of a run depend on, as every record tells it.

        Args:
            model: As the user named or gave it.
        """
        options = self.options
        name = model if isinstance(model, str) else type(self.model).__name__
        base = settings_of(name, self.model.detector, options.detect)
        return ExplainSettings(
            **{**vars(base), "model_fingerprint": self.model.fingerprint},
            template=self.template.name,
            condition=options.condition,
            questions=tuple(q.text for q in choose(options) if q.text is not None),
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling(),
            quantised=options.quantize,
        )

    def asking(self, options: ExplainOptions) -> ExplainPipeline:
        """The same explainer asked other questions; what was tokenized stays known."""
        other = copy.copy(self)
        other.options = options
        other.reserve(choose(options))
        return other

    def prompt(self, question: Question, told: str | None) -> Prompt:
        """A question about one picture, ready to be answered; each is tokenized once.

        Args:
            question: What is asked.
            told: As for ``Question.asked``.

        Raises:
            UsageError: Its placeholders do not fit one picture, or it is too long.
        """
        key = (question, None if question.text is None else told)
        if key not in self._prompts:
            if len(self._prompts) >= _PROMPTS:
                self._prompts.clear()
            text = question.prompt(self.template, told)
            self._prompts[key] = Prompt(text, self.processor.tokens(text, 1))
        return self._prompts[key]

    def length(self, question: Question) -> int:
        """How many tokens the prompt of a question has, whatever it may tell; errors as above."""
        told = (None, "real", "fake") if self.options.condition == "detector" else (None,)
        return max(len(self.prompt(question, label).tokens) for label in told)

    def reserve(self, questions: Iterable[Question]) -> None:
        """Let answers end where the model's context does.

        Args:
            questions: All of a run: the longest sets the room of every answer, so that none
                depends on what it is asked beside.

        Raises:
            UsageError: A question is impossible.
        """
        limit = self.model.config.text_config.max_position_embeddings
        longest = max(self.length(question) for question in questions)
        self._room = min(self.options.max_new_tokens, limit - longest)

    def judge(self, decoder: Decoder, settings: ExplainSettings) -> Iterator[Judged | None]:
        """The detector's verdicts on the items of a decoder; see ``pipeline.judge``."""
        return judge(decoder, self.scorer, options=self.options.detect, settings=settings)

    def faces(self, item: Judged) -> list[Face]:
        """Which faces are explained: every one of a picture, the most suspicious of a video."""
        if item.record.status != "ok":
            return []
        views = item.prepared.views
        if item.record.kind != "video":
            return [Face(crop, item.scores[crop.digest]) for crop in views[0].crops]
        view, face = max(
            ((view, faces_of(view, item.scores, self.rule)[0]) for view in views if view.crops),
            key=lambda pair: pair[1].fake_probability,
        )
        crop = item.crop(face.crop, view.index)
        return [Face(crop, item.scores[crop.digest], view.index)]

    def answers(
        self,
        requests: Iterable[Request | None],
        *,
        on_text: Callable[[TextChunk], object] | None = None,
    ) -> Iterator[tuple[Request, list[Answers]]]:
        """Answer everything that is asked, equal questions about equal faces once.

        Args:
            requests: One an item; None says that the next one takes its time.
            on_text: As for ``explain_sources``.

        Yields:
            Each request with the answers about its faces, in order, as soon as they are known.
        """
        work = (
            None
            if request is None
            else (request, {(f.crop.digest, request.questions): f for f in request.faces})
            for request in requests
        )
        for entry in in_batches(
            work,
            lambda batch: self._ask(batch, on_text),
            size=self.options.detect.batch_size,
            rows=lambda key: len(key[1]),
            remember=_REMEMBERED,
        ):
            if entry is not None:
                request, found = entry
                keys = [(face.crop.digest, request.questions) for face in request.faces]
                yield request, [found[key] for key in keys]

    def _ask(
        self,
        batch: Mapping[tuple[bytes, tuple[Question, ...]], Face],
        on_text: Callable[[TextChunk], object] | None,
    ) -> list[Answers]:
        """Ask about the faces of a batch, each with its questions."""
        faces = list(batch.values())
        asked = [self._questions(f, qs) for f, (_, qs) in zip(faces, batch, strict=True)]
        crops = [face.crop for face in faces]
        new = [face.crop for face in faces if face.score.features is None]
        again = iter(self.scorer.score(new) if new else ())
        features = [face.score.features or next(again).features for face in faces]
        heads = [
            TextChunk(f.crop.crop, f.score.fake_probability, a.verdict.verdict, question, words, "")
            for f, a, (_, questions) in zip(faces, asked, batch, strict=True)
            for question, words in zip(questions, a.asked, strict=True)
        ]
        tell = None
        if on_text is not None:
            tell = lambda number, text: on_text(heads[number]._replace(text=text))  # noqa: E731
        said = self.complete(crops, features, [a.prompts for a in asked], on_text=tell)
        return [a._replace(completions=tuple(texts)) for a, texts in zip(asked, said, strict=True)]

    def _questions(self, face: Face, questions: tuple[Question, ...]) -> Answers:
        """What is asked about a face with its score, still without answers."""
        verdict = self.rule.judge(face.score.fake_probability, face.score.domain_distance)
        decided = verdict.verdict if verdict.verdict in ("real", "fake") else None
        told = decided if self.options.condition == "detector" else None
        return Answers(
            verdict,
            told,
            tuple(question.words(self.template, told) for question in questions),
            tuple(self.prompt(question, told) for question in questions),
        )

    def complete(
        self,
        crops: Sequence[Crop],
        features: Sequence[PictureFeatures],
        prompts: Sequence[Sequence[Prompt]],
        *,
        on_text: Callable[[int, str], object] | None = None,
    ) -> list[list[Completion]]:
        """Generate answers about crops, all about one going on from the same beginning.

        Args:
            crops: N of them.
            features: Theirs, of one picture each.
            prompts: For each crop what is asked.
            on_text: Is called with (number of the prompt, new text); the prompts are then answered
                one by one.

        Returns:
            The answers to each crop's prompts.
        """
        groups = [[prompt.tokens for prompt in texts] for texts in prompts]
        shared = SharedPrompts(self.model, groups, features)
        places = [(n, q) for n, texts in enumerate(prompts) for q in range(len(texts))]
        at_once = 1 if on_text else self.options.detect.batch_size
        found: list[list[int]] = []
        for first in range(0, len(places), at_once):
            some = places[first : first + at_once]
            about = [(crops[n].digest, prompts[n][q].text) for n, q in some]
            streamer = _Streamer(self.processor.tokenizer, on_text, first) if on_text else None
            found += shared.ask(some, **self._generation(about), streamer=streamer)
        completions: list[list[Completion]] = [[] for _ in crops]
        for (n, _), ids in zip(places, found, strict=True):
            text = decode(self.processor.tokenizer, ids)
            completions[n].append(Completion(text, len(ids) < self._room))
        return completions

    def _generation(self, about: Sequence[tuple[bytes, str]]) -> dict[str, Any]:
        """Options of ``generate`` for answers about (crop's digest, prompt)."""
        chosen: dict[str, Any] = {
            "max_new_tokens": self._room,
            "do_sample": False,
            "num_beams": 1,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if sampling := self.options.sampling():
            draws = SeededSampling(
                [seed_of(int(sampling["seed"]), *which) for which in about],
                temperature=sampling["temperature"],
                top_p=sampling["top_p"],
            )
            chosen["logits_processor"] = LogitsProcessorList([draws])
        return chosen


class SeededSampling(LogitsProcessor):
    """Samples the next token of each row with a generator of its own.

    An answer so depends on nothing but seed, face and question. The largest of scores with Gumbel
    noise added is a draw from their softmax: the generation around it takes the likeliest token.

    Args:
        seeds: One a row.
        temperature: Divides the scores; above 0.
        top_p: Share of the probability that the likeliest tokens drawn from have, in (0, 1].
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, top_p: float) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature
        self._keep_likely = TopPLogitsWarper(top_p)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, V) with noise added, -inf where a token is not to be drawn."""
        likely = self._keep_likely(input_ids, scores / self._temperature)
        width = scores.shape[-1]
        noise = [torch.empty(width).exponential_(generator=g).log() for g in self._generators]
        result: Any = likely - torch.stack(noise).to(likely)
        return result


def seed_of(seed: int, digest: bytes, prompt: str) -> int:
    """The seed of one answer, from those of the run, the crop's pixels and the whole prompt."""
    text = f"{seed}\0".encode() + digest + prompt.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class _Streamer(BaseStreamer):
    """Passes the text of one answer on as its tokens come."""

    def __init__(self, tokenizer: Any, on_text: Callable[[int, str], object], number: int) -> None:
        self._tokenizer, self._on_text, self._number = tokenizer, on_text, number
        self._ids: list[int] = []
        self._passed = ""
        self._on_text(number, "")

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; the prompt's, which come first, are empty."""
        self._ids += value.flatten().tolist()
        text = decode(self._tokenizer, self._ids)
        # An unfinished character changes when its next byte comes.
        if text != self._passed and text.startswith(self._passed) and not text.endswith("\ufffd"):
            self._on_text(self._number, text[len(self._passed) :])
            self._passed = text

    def end(self) -> None:
        """Nothing is held back."""


def explanation(
    request: Request, answers: Sequence[Answers], settings: ExplainSettings
) -> Explanation:
    """The record of an item with the answers about its faces."""
    record = request.judged.record
    explained = [
        _face_explanation(face, found, request.questions)
        for face, found in zip(request.faces, answers, strict=True)
    ]
    order = [face.crop for face in record.faces]
    if order:
        explained.sort(key=lambda face: order.index(face.crop))
    judgement = explained[0].judgement if explained else None
    return Explanation(
        **{**vars(record), "settings": settings},
        judgement=judgement,
        agreement=agree(judgement, record.verdict),
        explanations=tuple(explained),
    )


def _face_explanation(face: Face, found: Answers, questions: Sequence[Question]) -> FaceExplanation:
    judged, *others = found.completions
    judgement, verdict = parse_verdict(judged.text), found.verdict.verdict
    reasons = zip(questions[1:], found.asked[1:], others, strict=True)
    return FaceExplanation(
        crop=face.crop.crop,
        frame=face.frame,
        fake_probability=face.score.fake_probability,
        verdict=verdict,
        told=found.told,
        judgement=judgement,
        judgement_text=judged.text,
        agreement=agree(judgement, verdict),
        reasons=tuple(Answer(q.region, asked, c.text, c.complete) for q, asked, c in reasons),
    )
