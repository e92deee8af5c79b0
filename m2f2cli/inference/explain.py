"""Explain pictures and videos: the detector's verdict, the language model's judgement, reasons.

Items are judged by the pipeline of ``detect``, with the detector inside the explainer. Then the
questions about each face are answered in batches across items, equal faces once.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from m2f2cli.checkpoints.load import is_explainer, load_explainer
from m2f2cli.data.conversations import parse_verdict
from m2f2cli.data.faces import Crop
from m2f2cli.data.transforms import explainer_views
from m2f2cli.errors import UsageError
from m2f2cli.inference.optimize_cpu import optimize_for_cpu
from m2f2cli.inference.pipeline import Decoder, DetectPipeline, Judged, Score, in_batches
from m2f2cli.inference.questions import Question, choose
from m2f2cli.inference.recordfile import EXPLANATIONS, Job
from m2f2cli.inference.sources import Items, Source, expand
from m2f2cli.inference.verdict import faces_of
from m2f2cli.models.conversation import template
from m2f2cli.models.detector import Detector
from m2f2cli.models.explainer import Explainer, PictureFeatures
from m2f2cli.models.prefix import SharedPrompts
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import decode
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.records import Answer, Box, ExplainSettings, Explanation, FaceExplanation, agree

Loaded = tuple[Explainer, ExplainerProcessor]

_REMEMBERED = 4096  # faces whose answers are kept for another appearance
_PROMPTS = 16_384  # prompts whose tokens are kept
_BATCHES = 2  # batches' worth of crops that wait for their questions with what is shown of them


def explain(
    paths: Items,
    *,
    model: str | Loaded = "lite",
    options: ExplainOptions | None = None,
    recursive: bool = False,
) -> Iterator[Explanation]:
    """Judge and explain files, folders, globs, lists and videos.

    Every judged face of a picture is explained; of a video, the face that decides its frame with
    the highest fake probability.

    Args:
        paths: One or several names, Pillow images or arrays; see ``sources.expand``.
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
    on_text: Callable[[TextChunk], object] | None = None,
) -> Iterator[Explanation]:
    """``explain`` for sources already listed; arguments and records as there.

    ``on_text`` is called with each answer's text while it is generated, answer by answer.
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
        requests = (
            None if item is None else Request(item, pipeline.faces(item), questions)
            for item in pipeline.judge(decoder)
        )
        for request, answers in pipeline.answers(requests, on_text=on_text):
            yield pipeline.explanation(request, answers)


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
        settings=lambda: ExplainPipeline(model, options).explain_settings,
        output=output,
        overwrite=overwrite,
        layout=EXPLANATIONS,
    )


def load_pipeline(
    model: str | Detector | Loaded, options: ExplainOptions | None = None
) -> DetectPipeline:
    """A detector or an explainer that stays loaded, and keeps its forgery maps.

    Args:
        model: A checkpoint's name, of a detector or an explainer; or either, loaded.
        options: How to judge and, given an explainer, to ask.

    Raises:
        M2F2Error: The model is unusable.
    """
    options = options or ExplainOptions()
    if isinstance(model, tuple) or (isinstance(model, str) and is_explainer(model)):
        pipeline = ExplainPipeline(model, options, maps=True)
        pipeline.reserve(choose(options))
        return pipeline
    return DetectPipeline(model, options.detect, maps=True)


class Face(NamedTuple):
    """A face to ask about; ``frame`` is the number of the video's frame, None for a picture."""

    crop: Crop
    score: Score
    frame: int | None = None


class Request(NamedTuple):
    """What is asked about each of some faces of one item; none of an item without a verdict."""

    judged: Judged
    faces: Sequence[Face]
    questions: tuple[Question, ...]


class Prompt(NamedTuple):
    """A question inside the template: its text with placeholders, and its token ids."""

    text: str
    tokens: list[int]


class Answers(NamedTuple):
    """The detector's verdict on a face, what the questions told of it (if anything), and answers.

    ``told`` is ``real``, ``fake`` or None; ``prompts`` are the questions inside the template.
    """

    verdict: str
    told: str | None
    prompts: list[Prompt]
    answers: list[Answer]


class TextChunk(NamedTuple):
    """A piece of an answer while it is generated: new text, empty when the answer begins.

    It comes with the face's crop, the detector's score and verdict, the question, and its words.
    """

    crop: Box
    fake_probability: float
    verdict: str
    question: Question
    asked: str
    text: str


class ExplainPipeline(DetectPipeline):
    """A loaded explainer with everything that is needed to judge items and to ask about them.

    Args:
        model: A checkpoint's name (see ``checkpoints.load.load_explainer``), or an
            explainer with its processor.
        options: How to ask.
        maps: Keep the detector's forgery maps.

    Raises:
        M2F2Error: The checkpoint is none of an explainer, or damaged.
    """

    explains = True

    def __init__(self, model: str | Loaded, options: ExplainOptions, *, maps: bool = False) -> None:
        if isinstance(model, str):
            where = options.detect
            self.model, folder = load_explainer(
                model, device=where.device, dtype=where.dtype, quantize=options.quantize
            )
            optimize_for_cpu(self.model.detector)
            self.processor = ExplainerProcessor.from_folder(
                folder, self.model.config, explainer_views
            )
        else:
            self.model, self.processor = model
        super().__init__(self.model.detector, options.detect, maps=maps)
        self.name = model if isinstance(model, str) else type(self.model).__name__
        self.fingerprint = self.model.fingerprint
        self.crops = self.crops._replace(pads=self.model.config.image_aspect == "pad")
        self.options = options
        self.template = template(options.template or self.model.config.template)
        self._prompts: dict[tuple[Question, str | None], Prompt] = {}
        self._features: dict[bytes, PictureFeatures] = {}
        self._room = options.max_new_tokens

    @property
    def explain_settings(self) -> ExplainSettings:
        """What the words of a run depend on, as every record tells it."""
        options = self.options
        return ExplainSettings(
            **vars(self.settings),
            template=self.template.name,
            condition=options.condition,
            questions=tuple(q.text for q in choose(options) if q.text is not None),
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling(),
            quantised=options.quantize,
        )

    def _look(self, crops: Sequence[Crop]) -> PictureFeatures:
        views = [self._pixels([crop.pixels for crop in crops])]
        if any(crop.padded is not None for crop in crops):
            whole = [crop.pixels if crop.padded is None else crop.padded for crop in crops]
            views.insert(0, self._pixels(whole))
        with torch.no_grad():
            seen = self.model.encode_pictures(*views)
        for row, crop in enumerate(crops):
            self._features[crop.digest] = seen.rows(row, row + 1)
        while len(self._features) > max(len(crops), _BATCHES * self.judging.batch_size):
            del self._features[next(iter(self._features))]
        return seen

    def features(self, crops: Sequence[Crop]) -> list[PictureFeatures]:
        """What the language model is shown of each of some crops, one picture each.

        Of crops that were judged just before it is still known; others are looked at again.
        """
        known = {c.digest: self._features[c.digest] for c in crops if c.digest in self._features}
        new = [crop for crop in crops if crop.digest not in known]
        for first in range(0, len(new), self.judging.batch_size):
            some = new[first : first + self.judging.batch_size]
            self.score(some)
            known.update((crop.digest, self._features[crop.digest]) for crop in some)
        return [known[crop.digest] for crop in crops]

    def prompt(self, question: Question, told: str | None) -> Prompt:
        """A question about one picture, ready to be answered; each is tokenized once.

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

    def explain(
        self,
        judged: Judged,
        *,
        face: Box | None = None,
        regions: Sequence[str] = (),
        questions: Sequence[str] = (),
        on_text: Callable[[TextChunk], object] | None = None,
    ) -> Explanation:
        """Ask about one face of a judged item with status ``ok``.

        Args:
            judged: The item.
            face: ``crop`` of a face of a picture; None takes the one that decides. Of a video it
                is always the one that decides the frame with the highest fake probability.
            regions: As in ``ExplainOptions``, like ``questions``.
            questions: See ``regions``.
            on_text: As for ``explain_sources``.

        Raises:
            UsageError: A question is impossible.
        """
        asking = copy.copy(self)  # what was tokenized stays known
        asking.options = replace(self.options, regions=tuple(regions), questions=tuple(questions))
        chosen = choose(asking.options)
        asking.reserve(chosen)
        faces = self.faces(judged)
        if judged.record.kind != "video":
            box = face or judged.record.faces[0].crop
            faces = [one for one in faces if one.crop.crop == box][:1]
        request = Request(judged, faces, chosen)
        _, answers = next(asking.answers([request], on_text=on_text))
        return asking.explanation(request, answers)

    def answers(
        self,
        requests: Iterable[Request | None],
        *,
        on_text: Callable[[TextChunk], object] | None = None,
    ) -> Iterator[tuple[Request, list[Answers]]]:
        """Answer everything that is asked, equal questions about equal faces once.

        Yields:
            Each request with the answers about its faces, in order, as soon as they are known;
            None among the requests says that the next one takes its time.
        """
        items = (
            None
            if asked is None
            else (
                asked,
                {(f.crop.digest, asked.questions): (f, asked.questions) for f in asked.faces},
            )
            for asked in requests
        )
        for entry in in_batches(
            items,
            lambda batch: self._ask(batch, on_text),
            size=self.judging.batch_size,
            rows=lambda key: len(key[1]),
            remember=_REMEMBERED,
        ):
            if entry is not None:
                request, found = entry
                yield request, [found[f.crop.digest, request.questions] for f in request.faces]

    def _ask(
        self,
        batch: Sequence[tuple[Face, tuple[Question, ...]]],
        on_text: Callable[[TextChunk], object] | None,
    ) -> list[Answers]:
        """Ask about the faces of a batch, each with its questions."""
        found: list[Answers] = []
        chunks: list[TextChunk] = []
        for (crop, score, _), questions in batch:
            verdict = self.rule.judge(score.fake_probability, score.domain_distance).verdict
            tells = self.options.condition == "detector" and verdict in ("real", "fake")
            told = verdict if tells else None
            prompts = [self.prompt(question, told) for question in questions]
            found.append(Answers(verdict, told, prompts, []))
            for question in questions:
                asked = question.words(self.template, told)
                about = (crop.crop, score.fake_probability, verdict)
                chunks.append(TextChunk(*about, question, asked, ""))
        tell = None
        if on_text is not None:
            tell = lambda number, text: on_text(chunks[number]._replace(text=text))  # noqa: E731
        crops = [face.crop for face, _ in batch]
        each = [one.prompts for one in found]
        rows = self.complete(crops, self.features(crops), each, on_text=tell)
        heads = iter(chunks)
        for one, texts in zip(found, rows, strict=True):
            for (text, complete), head in zip(texts, heads):  # noqa: B905 - of all faces
                one.answers.append(Answer(head.question.region, head.asked, text, complete))
        return found

    def complete(
        self,
        crops: Sequence[Crop],
        features: Sequence[PictureFeatures],
        prompts: Sequence[Sequence[Prompt]],
        *,
        on_text: Callable[[int, str], object] | None = None,
    ) -> list[list[tuple[str, bool]]]:
        """Generate answers about crops, all about one going on from the same beginning.

        Args:
            crops: N of them.
            features: Theirs, of one picture each.
            prompts: For each crop what is asked.
            on_text: Is called with (number of the prompt, new text); the prompts are then answered
                one by one.

        Returns:
            For each crop its answers: the text, and whether it ended by itself.
        """
        groups = [[prompt.tokens for prompt in texts] for texts in prompts]
        shared = SharedPrompts(self.model, groups, features)
        places = [(n, q) for n, texts in enumerate(prompts) for q in range(len(texts))]
        at_once = 1 if on_text else self.judging.batch_size
        answers: list[list[tuple[str, bool]]] = [[] for _ in crops]
        tokenizer = self.processor.tokenizer
        for first in range(0, len(places), at_once):
            some = places[first : first + at_once]
            about = [(crops[n].digest, prompts[n][q].text) for n, q in some]
            streamer = _Streamer(tokenizer, on_text, first) if on_text else None
            generated = shared.ask(some, **self._generation(about), streamer=streamer)
            for (n, _), ids in zip(some, generated, strict=True):
                answers[n].append((decode(tokenizer, ids), len(ids) < self._room))
        return answers

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

    def explanation(self, request: Request, answers: Sequence[Answers]) -> Explanation:
        """The record of an item with the answers about its faces."""
        record = request.judged.record
        explained = []
        for face, found in zip(request.faces, answers, strict=True):
            judged, *reasons = found.answers
            judgement = parse_verdict(judged.text)
            explained.append(
                FaceExplanation(
                    crop=face.crop.crop,
                    frame=face.frame,
                    fake_probability=face.score.fake_probability,
                    verdict=found.verdict,
                    told=found.told,
                    judgement=judgement,
                    judgement_text=judged.text,
                    agreement=agree(judgement, found.verdict),
                    reasons=tuple(reasons),
                )
            )
        order = [face.crop for face in record.faces]
        if order:
            explained.sort(key=lambda face: order.index(face.crop))
        first = explained[0].judgement if explained else None
        return Explanation(
            **{**vars(record), "settings": self.explain_settings},
            judgement=first,
            agreement=agree(first, record.verdict),
            explanations=tuple(explained),
        )


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
