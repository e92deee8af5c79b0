"""Questions that share a beginning are answered as they are alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TextStreamer

from m2f2cli.errors import UsageError
from m2f2cli.models.conversation import DDVQA, VICUNA_V1, Turn
from m2f2cli.models.prefix import SharedPrompts, common_start
from tests.models.explainers import GREEDY, picture, tiny_explainer, tiny_processor

MODEL, PROCESS = tiny_explainer(), tiny_processor()
PICTURES = [picture(1, width=60), picture(2), picture(3)]


def features():
    with torch.no_grad():
        seen = MODEL.encode_pictures(**PROCESS.pixels(PICTURES))
    return [seen.rows(n, n + 1) for n in range(len(PICTURES))]


def alone(text: str, pictures: list) -> list[int]:
    return MODEL.generate(**PROCESS(text, pictures), **GREEDY)[0].tolist()


words = st.text(alphabet="abc fake?", max_size=12)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(words, min_size=1, max_size=3), min_size=1, max_size=3))
def test_any_questions(questions):
    """Also equal ones, empty ones, and groups of different sizes."""
    texts = [[VICUNA_V1.render([Turn(VICUNA_V1.question(q))])[0] for q in qs] for qs in questions]
    groups = [[PROCESS.tokens(text, 1) for text in group] for group in texts]
    shared = SharedPrompts(MODEL, groups, features()[: len(groups)])
    expected = [
        alone(text, [p]) for group, p in zip(texts, PICTURES, strict=False) for text in group
    ]
    assert shared.ask(**GREEDY) == expected
    assert len(shared) == len(expected)


def test_the_judgement_and_the_reasons_differ_after_the_picture():
    """The detector's answer then belongs to each question's own part."""
    judge = DDVQA.render([Turn(DDVQA.judgement())])[0]
    reason = DDVQA.render([Turn(DDVQA.question("Describe the nose."))])[0]
    groups = [[PROCESS.tokens(text, 1) for text in (judge, reason)] for _ in PICTURES]
    shared = SharedPrompts(MODEL, groups, features())
    assert groups[0][0].index(-300) >= shared.starts[0] > groups[0][0].index(-200) + 15
    assert shared.ask([(2, 1), (0, 0)], **GREEDY) == [
        alone(reason, [PICTURES[2]]),
        alone(judge, [PICTURES[0]]),
    ]
    assert shared.ask([(1, 0)], **GREEDY) == [alone(judge, [PICTURES[1]])]


def test_groups_without_a_picture_and_with_two():
    plain = [VICUNA_V1.render([Turn(q)])[0] for q in ("What is real?", "What is fake?")]
    both = VICUNA_V1.render([Turn(VICUNA_V1.question("Which?", pictures=2))])[0]
    with torch.no_grad():
        pair = MODEL.encode_pictures(**PROCESS.pixels(PICTURES[:2]))
    groups = [[PROCESS.tokens(text, 0) for text in plain], [PROCESS.tokens(both, 2)]]
    out = SharedPrompts(MODEL, groups, [None, pair]).ask(**GREEDY)
    assert out == [alone(plain[0], []), alone(plain[1], []), alone(both, PICTURES[:2])]


def test_beams_alternatives_and_streams():
    prompts = [VICUNA_V1.render([Turn(VICUNA_V1.question(q))])[0] for q in ("a?", "b c?")]
    shared = SharedPrompts(MODEL, [[PROCESS.tokens(p, 1) for p in prompts]], features()[1:2])
    options = {**GREEDY, "num_beams": 3}
    expected = [MODEL.generate(**PROCESS(p, [PICTURES[1]]), **options)[0].tolist() for p in prompts]
    assert shared.ask(**options) == expected
    sampled = shared.ask(do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert [len(answer) for answer in sampled] == [3] * 4
    pieces: list[str] = []

    class Collector(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    answer = shared.ask([(0, 1)], streamer=Collector(PROCESS.tokenizer), **GREEDY)[0]
    assert "".join(pieces) == PROCESS.tokenizer.decode(answer)


def test_an_answer_ends_before_its_end_token():
    prompt = VICUNA_V1.render([Turn(VICUNA_V1.judgement())])[0]
    whole = alone(prompt, [PICTURES[0]])
    stop = whole[3]
    shared = SharedPrompts(MODEL, [[PROCESS.tokens(prompt, 1)]], features()[:1])
    MODEL.generation_config.eos_token_id = stop
    try:
        assert shared.ask(**GREEDY) == [whole[: whole.index(stop)]]
    finally:
        MODEL.generation_config.eos_token_id = None


def test_a_group_without_a_question_is_refused():
    with pytest.raises(UsageError, match="at least one question"):
        SharedPrompts(MODEL, [[]], features()[:1])


def test_each_prompt_keeps_a_token_of_its_own():
    assert common_start([[1, 2, 3]]) == 2
    assert common_start([[1, 2, 3], [1, 2]]) == 1
    assert common_start([[1, 2, 3], [1, 5, 3]]) == 1
    assert common_start([[1], [1, 2]]) == 0
