"""What is asked, and what questions give away."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from m2f2cli.errors import ConfigError, UsageError
from m2f2cli.inference.questions import (
    JUDGEMENT,
    Question,
    choose,
    of_region,
    untold,
)
from m2f2cli.models.conversation import DDVQA, VICUNA_V1
from m2f2cli.options.explain import REGIONS, ExplainOptions

HEAD = "<image>\n<deepfake>\n"
NOSE = "Describe the authenticity of the image based on nose."


def test_the_judgement_comes_first_and_then_the_reasons():
    def chosen(*questions: str, **changes) -> tuple[Question, ...]:
        return choose(ExplainOptions(questions=questions, **changes))

    assert [q.region for q in chosen()] == [None, *REGIONS]
    assert chosen(regions=("nose", "nose")) == (JUDGEMENT, of_region("nose"))
    assert chosen("Why?", "Why?") == (JUDGEMENT, Question("Why?"))
    assert chosen("Why?", regions=("skin",)) == (JUDGEMENT, of_region("skin"), Question("Why?"))
    assert chosen(judge=True) == (JUDGEMENT,)


def test_a_question_tells_what_was_decided_and_the_judgement_nothing():
    nose = of_region("nose")
    assert nose.asked(VICUNA_V1, None) == HEAD + NOSE
    assert nose.asked(VICUNA_V1, "fake") == f"{HEAD}This image is fake. {NOSE}"
    assert nose.words(VICUNA_V1, "real") == f"This image is real. {NOSE}"
    for template in (VICUNA_V1, DDVQA):
        assert JUDGEMENT.asked(template, "fake") == template.judgement()
        assert JUDGEMENT.words(template, "fake") == template.judge
    assert nose.prompt(VICUNA_V1, "fake").endswith(
        f"USER: {HEAD}This image is fake. {NOSE} ASSISTANT:"
    )


def test_placeholders_of_the_users_own_are_left_where_they_are():
    own = Question("<deepfake> <image> Why?")
    assert own.asked(VICUNA_V1, None) == "<deepfake> <image> Why?"
    assert own.asked(VICUNA_V1, "real") == "<deepfake> <image> This image is real. Why?"


@pytest.mark.parametrize(
    ("text", "neutral"),
    [
        (f"This image is fake. {NOSE}", NOSE),
        ("The eyes in the image are real, tell me why. Answer like this.", of_region("eyes").text),
        ("What do you see?", "What do you see?"),
        ("Is it real or fake?", "Is it real or fake?"),
    ],
)
def test_a_data_sets_question_without_its_label(text, neutral):
    assert untold(text).text == neutral


@pytest.mark.parametrize(
    "text", ["The ears in the image are fake, tell me why.", "The hair is fake, why?"]
)
def test_a_label_that_cannot_be_taken_out_is_refused(text):
    with pytest.raises(UsageError, match="cannot be taken out") as caught:
        untold(text)
    assert "--condition truth" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"regions": ("ears",)}, "--region does not know 'ears'"),
        ({"questions": (" ",)}, "question is empty"),
        ({"judge": True, "regions": ("nose",)}, "judgement alone"),
        ({"condition": "verdict"}, "--condition does not know 'verdict'"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"temperature": 0.5}, "likeliest word"),
        ({"top_p": 0.5}, "likeliest word"),
        ({"sample": True, "temperature": 0.0}, "above 0"),
        ({"sample": True, "top_p": 1.5}, "--top-p must be at most 1"),
    ],
)
def test_impossible_options_are_one_sentence(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        ExplainOptions(**changes)


def test_an_unknown_template_is_refused():
    with pytest.raises(ConfigError, match="conversation template 'ddvq'"):
        ExplainOptions(template="ddvq")


@pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="M2F2_DDVQA is not set")
def test_prompts_are_the_published_ones():
    folder = Path(os.environ["M2F2_DDVQA"]) / "reference"

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    questions = {k: v["question"] for row in rows("test_c40.jsonl") for k, v in row.items()}
    published = rows("published_exp_c40.jsonl")
    assert len(published) == len(questions) == 1070
    for row in published:
        question = questions[row["key"]]
        assert Question(question).prompt(DDVQA, None) == row["prompt"]
        assert not {"fake", "real"} & set(re.findall(r"\w+", untold(question).text or ""))
    judged = rows("published_det_c40.jsonl")
    assert {row["prompt"] for row in judged} == {JUDGEMENT.prompt(DDVQA, None)}
