"""Write what the lite explainer learns from and is chosen on.

    python examples/lite/talks.py DDVQA_FOLDER OUTPUT

Only the train half of DD-VQA is read. The people that the lite detector was chosen on are held out
here too: of them alone is its answer as uncertain as it will be of strangers.

    text.jsonl                questions and answers, without pictures, for the language model
    judge.json                stage 2: the authenticity question, in the words of both templates
    explain.json              stage 3: every answer, asked as in the test (the label is told) or
                              with nothing told; judgements
    validation.jsonl          the held-out people's pictures, in the form of the test questions
    validation_truth.jsonl    and their labels
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2f2cli.data.prepare import explanations
from m2f2cli.data.readers.ddvqa import Answer, read_annotations, read_ddvqa
from m2f2cli.data.samples import REAL, kind_of, people_in, split_by_identity
from m2f2cli.inference.questions import untold

HELD_OUT = {"share": 0.15, "seed": 0}  # as train.yaml has it
JUDGE = (explanations.JUDGE, "Determine the authenticity. Is the image real or fake?")


def verdict_of(stem: str) -> str:
    return REAL if kind_of(stem) == REAL else "fake"


def untold_question(answer: Answer, verdict: str) -> str | None:
    return untold(explanations.test_question(answer, verdict)).text


def told_question(answer: Answer, verdict: str) -> str:
    return f"This image is {verdict}. {untold_question(answer, verdict)}"


def said(answer: Answer) -> str:
    return explanations.reasons(answer).strip()


def questions(answer: Answer, verdict: str) -> tuple[str | None, ...]:
    """An answer's question as the test asks it, told in one sentence, and with nothing told."""
    published = explanations.test_question(answer, verdict)
    return published, told_question(answer, verdict), untold_question(answer, verdict)


def texts(annotations: Mapping[str, Sequence[Answer]]) -> Iterator[dict[str, str]]:
    """Questions and answers that need no picture, of people who are not held out."""
    for stem, answers in annotations.items():
        verdict = verdict_of(stem)
        for answer in filter(said, answers):
            for question in dict.fromkeys(questions(answer, verdict)):
                yield {"question": str(question), "answer": said(answer)}
        for judge in JUDGE:
            judged = explanations.JUDGEMENT.format(verdict=verdict)
            yield {"question": f"This image is {verdict}. {judge}", "answer": judged}
            yield {"question": judge, "answer": judged}


def row(stem: str, question: str, answer: str) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": explanations.PLACEHOLDERS + question},
        {"from": "gpt", "value": answer},
    ]
    return {"id": stem[2:], "image": f"{stem}.jpg", "conversations": turns}


def judgements(stem: str) -> Iterator[dict[str, Any]]:
    for judge in JUDGE:
        yield row(stem, judge, explanations.JUDGEMENT.format(verdict=verdict_of(stem)))


def talks(stem: str, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    verdict, draw = verdict_of(stem), random.Random(stem)
    for answer in filter(said, answers):
        published, _, plain = questions(answer, verdict)
        yield row(stem, str(draw.choice((published, plain))), said(answer))
    yield from judgements(stem)


def validation(stem: str, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    for number, answer in enumerate(answers):
        asked = explanations.test_question(answer, verdict_of(stem))
        yield {f"{stem}_{number}": {"question": asked, "answer": [explanations.reasons(answer)]}}


def truth(stem: str) -> dict[str, Any]:
    return {"name": f"{stem}.jpg", "label": verdict_of(stem), "kind": kind_of(stem), "video": stem}


def write(path: Path, rows: Sequence[Any]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main(root: Path, output: Path) -> None:
    annotations = read_annotations(root / "annotations" / "train")
    _, held = split_by_identity(read_ddvqa(root), HELD_OUT["share"], HELD_OUT["seed"])
    strangers = {person for sample in held.samples for person in sample.identities}
    known = {s: a for s, a in annotations.items() if not strangers & set(people_in(s[2:]))}
    crops = root / "images" / "c40" / "train"
    shown = [stem for stem in known if (crops / f"{stem}.jpg").exists()]
    kept = [Path(sample.name).stem for sample in held.samples]
    output.mkdir(parents=True, exist_ok=True)
    judge = [one for stem in shown for one in judgements(stem)]
    explain = [one for stem in shown for one in talks(stem, known[stem])]
    for rows in (judge, explain):
        random.Random(0).shuffle(rows)
    write(output / "text.jsonl", list(texts(known)))
    write(output / "judge.json", judge)
    write(output / "explain.json", explain)
    asked = [one for stem in kept for one in validation(stem, annotations[stem])]
    write(output / "validation.jsonl", asked)
    write(output / "validation_truth.jsonl", [truth(stem) for stem in kept])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
