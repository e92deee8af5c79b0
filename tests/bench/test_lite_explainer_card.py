"""The figures of the lite explainer's model card, on the DD-VQA test pictures and questions.

Run with: M2F2_DDVQA=FOLDER pytest tests/bench/test_lite_explainer_card.py -m bench -s

M2F2_EXPLAINER names another explainer than the bundled one, M2F2_TALKS a folder that
``examples/lite/talks.py`` wrote: then its held-out people are measured instead of the test set.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f2cli.data.conversations import parse_verdict
from m2f2cli.data.faces import CropRule
from m2f2cli.data.prepare import explanations
from m2f2cli.data.prepare.ddvqa import QUESTIONS_FILE, TRUTH_FILE, prepare_ddvqa
from m2f2cli.data.readers.ddvqa import read_annotations
from m2f2cli.data.samples import REAL, kind_of
from m2f2cli.inference.explain import ExplainPipeline, Prompt
from m2f2cli.inference.pipeline import detect, prepare
from m2f2cli.inference.questions import JUDGEMENT, of_region
from m2f2cli.inference.sources import expand
from m2f2cli.models.explainer import PictureFeatures
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.explain import REGIONS, ExplainOptions

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="M2F2_DDVQA is not set"),
]
MODEL = os.environ.get("M2F2_EXPLAINER", "lite")
TALKS = os.environ.get("M2F2_TALKS")  # now: tests do not see such variables
CONDITIONS = {"truth": "the label (as published)", "detector": "its verdict", "none": "nothing"}
FEATURES = ("patches", "forgery", "logits")
FIGURES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "bleu", "rouge_l", "cider")
SPEAKING = ("--model", MODEL, "--max-new-tokens", "128", "--batch-size", "64")


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> dict[str, Path]:
    """Questions, truth and pictures that are measured on, and a folder for what is written."""
    root, work = Path(os.environ["M2F2_DDVQA"]), tmp_path_factory.mktemp("card")
    crops = root / "images" / "c40"
    if TALKS:
        files = Path(TALKS, "validation.jsonl"), Path(TALKS, "validation_truth.jsonl")
        return {"questions": files[0], "truth": files[1], "images": crops / "train", "work": work}
    prepare_ddvqa(root, work)
    files = work / QUESTIONS_FILE, work / TRUTH_FILE
    return {"questions": files[0], "truth": files[1], "images": crops / "test", "work": work}


def run(*words: object) -> str:
    command = [sys.executable, "-m", "m2f2cli", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def evaluate(predictions: Path, truth: Path) -> dict[str, str]:
    found = run("evaluate", "ddvqa", "--predictions", predictions, "--truth", truth, "--json")
    figures = json.loads(found)["figures"]
    return {
        name: f"{one['value']:.3f} ({one['low']:.3f}-{one['high']:.3f})"
        for name, one in figures.items()
        if one["value"] is not None and one["low"] is not None
    }


def row(name: str, figures: Mapping[str, str], keys: Iterable[str]) -> str:
    return f"| {name} | " + " | ".join(figures[key] for key in keys) + " |"


def test_explanations(part):
    print(f"\n| told in the question | {' | '.join(FIGURES)} |")
    for condition, words in CONDITIONS.items():
        answers = part["work"] / f"{condition}.jsonl"
        asked = ("explain", "--dataset", part["questions"], "--images", part["images"])
        run(*asked, *SPEAKING, "--condition", condition, "--output", answers, "--quiet")
        print(row(words, evaluate(answers, part["questions"]), FIGURES))
    print(row("commonest answer", evaluate(commonest(part), part["questions"]), FIGURES))
    published = Path(os.environ["M2F2_DDVQA"], "reference", "published_exp_c40.jsonl")
    if part["images"].name == "test":
        print(row("published 7B", evaluate(published, part["questions"]), FIGURES))


def commonest(part) -> Path:
    """Answers that see no picture: to each question what was answered to it most often."""
    questions = [json.loads(line) for line in part["questions"].read_text().splitlines()]
    asked = {key: entry["question"] for line in questions for key, entry in line.items()}
    told: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer, _ in training_answers(people={key.rpartition("_")[0] for key in asked}):
        told[question][answer] += 1
    everything = sum(told.values(), Counter())
    file = part["work"] / "commonest.jsonl"
    rows = [
        {"key": key, "image": f"{key}.jpg", "prompt": "", "metadata": {}}
        | {"text": (told.get(question) or everything).most_common(1)[0][0]}
        for key, question in asked.items()
    ]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


def training_answers(people: set[str]) -> Iterable[tuple[str, str, str]]:
    """Question, answer and verdict of the annotations for training, of none of these people."""
    strangers = {person for stem in people for person in stem[2:].split("_")}
    root = Path(os.environ["M2F2_DDVQA"]) / "annotations" / "train"
    for stem, answers in read_annotations(root).items():
        if strangers & set(stem[2:].split("_")):
            continue
        verdict = REAL if kind_of(stem) == REAL else "fake"
        for answer in answers:
            question = explanations.test_question(answer, verdict)
            yield question, explanations.reasons(answer), verdict


def test_judgements(part):
    truth = [json.loads(line) for line in part["truth"].read_text().splitlines()]
    labels = {Path(one["name"]).stem: one["label"] for one in truth}
    answers = part["work"] / "judge.jsonl"
    asked = ("explain", "--dataset", part["questions"], "--images", part["images"], "--judge")
    run(*asked, *SPEAKING, "--condition", "none", "--output", answers, "--quiet")
    said = {
        Path(one["image"]).stem: parse_verdict(one["text"])
        for one in map(json.loads, answers.read_text().splitlines())
    }
    paths = [str(part["images"] / f"{stem}.jpg") for stem in labels]
    records = list(detect(paths, options=DetectOptions(faces="none", uncertain=(0.5, 0.5))))
    threshold = records[0].settings.threshold
    judged = {
        Path(one.path).stem: "fake" if one.fake_probability >= threshold else REAL
        for one in records
    }
    assert said.keys() == judged.keys() == labels.keys()
    stems = sorted(labels)
    fake = {
        name: np.array([of[s] == "fake" for s in stems])
        for name, of in (("truth", labels), ("detector", judged), ("language model", said))
    }
    print(f"\n{len(stems)} pictures; unparsed {sum(one is None for one in said.values())}")
    print("| | accuracy | F1 of fake |")
    for name in ("detector", "language model"):
        print(
            f"| {name} | {spread(accuracy, fake['truth'], fake[name])} | "
            f"{spread(f1, fake['truth'], fake[name])} |"
        )
    print("agreement", spread(accuracy, fake["detector"], fake["language model"]))


def accuracy(truth: np.ndarray, said: np.ndarray) -> float:
    return float((truth == said).mean())


def f1(truth: np.ndarray, said: np.ndarray) -> float:
    return float(2 * (truth & said).sum() / max(truth.sum() + said.sum(), 1))


def spread(figure, *columns: np.ndarray) -> str:
    """A figure with its 95 % percentile bootstrap interval over pictures."""
    rng, count = np.random.default_rng(0), len(columns[0])
    draws = [
        figure(*(c[pick] for c in columns)) for pick in rng.integers(0, count, (10_000, count))
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{figure(*columns):.3f} ({low:.3f}-{high:.3f})"


def test_how_far_words_follow_the_evidence(part):
    """Nothing is told; patches and token are exchanged, one at a time and together."""
    options = ExplainOptions(
        detect=DetectOptions(faces="none", batch_size=64), condition="none", max_new_tokens=128
    )
    pipeline = ExplainPipeline(MODEL, options)
    questions = [JUDGEMENT, *map(of_region, REGIONS)]
    prompts: list[Prompt] = [pipeline.prompt(question, None) for question in questions]
    pipeline.reserve(questions)
    files = [json.loads(line)["name"] for line in part["truth"].read_text().splitlines()]
    rule: Future[CropRule] = Future()
    rule.set_result(pipeline.crops)
    sources = expand([str(part["images"] / file) for file in files])
    read = [prepare(source, options.detect, rule) for source in sources]
    crops = [one.views[0].crops[0] for one in read]
    rows = pipeline.features(crops)
    seen = PictureFeatures(*(torch.cat([getattr(r, n) for r in rows]) for n in FEATURES))
    gray = replace(crops[0], pixels=np.full_like(crops[0].pixels, 128))
    blank = pipeline.features([gray])[0]
    other = torch.roll(torch.arange(len(files)), len(files) // 3)
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=seen.forgery.dtype)
    real, fake = pipeline.model.forgery_projector(sure).detach()

    def mixed(patches: torch.Tensor, forgery: torch.Tensor) -> list[list[str]]:
        features = PictureFeatures(patches, forgery.expand_as(seen.forgery), seen.logits)
        each = [features.rows(n, n + 1) for n in range(len(crops))]
        said = pipeline.complete(crops, each, [prompts] * len(crops))
        return [[text for text, _ in row] for row in said]

    as_it_is = mixed(seen.patches, seen.forgery)
    blanked = blank.patches.expand_as(seen.patches)
    changed = {
        "patches of another picture": mixed(seen.patches[other], seen.forgery),
        "patches of a gray picture": mixed(blanked, seen.forgery),
        "token of another picture": mixed(seen.patches, seen.forgery[other]),
        "both of another picture": mixed(seen.patches[other], seen.forgery[other]),
        "token: surely real": mixed(seen.patches, real),
        "token: surely fake": mixed(seen.patches, fake),
        "gray, surely real": mixed(blanked, real),
        "gray, surely fake": mixed(blanked, fake),
    }
    sounds = tones()

    def fake_sounding(rows: Iterable[list[str]]) -> float:
        return float(np.mean([sounds(text) for row in rows for text in row[1:]]))

    def unlike(rows: list[list[str]], places: slice) -> float:
        pairs = zip(rows, as_it_is, strict=True)
        return float(np.mean([np.array(a[places]) != np.array(b[places]) for a, b in pairs]))

    print("\n| input | judged fake | sounds fake | judgements changed | reasons changed |")
    for name, rows in {"as it is": as_it_is, **changed}.items():
        judged = np.mean([parse_verdict(row[0]) == "fake" for row in rows])
        shares = judged, fake_sounding(rows), unlike(rows, slice(1)), unlike(rows, slice(1, None))
        print(f"| {name} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    labels = [json.loads(line)["label"] for line in part["truth"].read_text().splitlines()]
    for label in (REAL, "fake"):
        rows = [row for row, one in zip(as_it_is, labels, strict=True) if one == label]
        print(f"reasons about {label} pictures that sound fake: {fake_sounding(rows):.0%}")


def tones():
    """Whether a text's sentences were said of forged pictures more often than of real ones."""
    said: dict[str, Counter[str]] = {"fake": Counter(), REAL: Counter()}
    for _, answer, verdict in training_answers(set()):
        said[verdict].update(sentences(answer))
    totals = {verdict: sum(counts.values()) for verdict, counts in said.items()}

    def sounds(text: str) -> bool:
        weight = 0.0
        for sentence in sentences(text):
            fake, real = said["fake"][sentence], said[REAL][sentence]
            weight += math.log((fake + 0.5) / totals["fake"]) - math.log(
                (real + 0.5) / totals[REAL]
            )
        return weight > 0

    return sounds


def sentences(text: str) -> list[str]:
    return [one.strip().lower() for one in text.split(".") if one.strip()]
