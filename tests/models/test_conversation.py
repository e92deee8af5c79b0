"""Templates, turns and where the answers stand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f2cli.errors import ConfigError, UsageError
from m2f2cli.models.conversation import (
    DDVQA,
    DEEPFAKE_ID,
    IGNORED,
    IMAGE_ID,
    VICUNA_V1,
    Turn,
    encode,
    encode_with_labels,
    template,
    turns_of,
)
from m2f2cli.models.tokenizer import load_tokenizer
from m2f2cli.options.explain import TEMPLATES
from tests.models.explainers import TOKENIZER

TOKENS = load_tokenizer(TOKENIZER)
frames = st.sampled_from([VICUNA_V1, DDVQA])
texts = st.text(max_size=30).filter(str.strip)
turns = st.lists(st.builds(Turn, texts, texts), min_size=1, max_size=3)


def test_each_name_is_the_name_of_its_template():
    assert [template(name).name for name in TEMPLATES.names()] == TEMPLATES.names()
    with pytest.raises(ConfigError, match="no conversation template 'vicuna'") as error:
        template("vicuna")
    assert "vicuna_v1" in error.value.hint


@given(frames, turns)
def test_answers_are_where_they_are_said_to_be(frame, spoken):
    text, answers = frame.render(spoken)
    assert [text[a.start : a.stop] for a in answers] == [f" {t.answer}</s>" for t in spoken]
    assert text.startswith(frame.system + frame.human + spoken[0].question)
    assert text.count("</s>") >= len(spoken)


@given(frames, turns)
def test_what_is_learnt_reads_like_the_answers(frame, spoken):
    """Unmasked labels decode to the answers, whatever their characters."""
    ids, labels = encode_with_labels(*frame.render(spoken), TOKENS)
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    plain = [t for t in spoken if not any(m in t.answer for m in ("<", "\u2581"))]
    if plain == spoken:
        learnt = TOKENS.decode([label for label in labels if label != IGNORED])
        for turn in spoken:
            assert turn.answer.strip() in learnt.replace("\ufeff", "") or "\ufffd" in learnt
        assert [label for label in labels if label == TOKENS.eos_token_id] == [2] * len(spoken)


@given(st.text(alphabet="ab <>\nimagedpfk", max_size=60))
def test_only_whole_placeholders_are_cut_out(text):
    ids = encode(text, TOKENS)
    assert ids[0] == TOKENS.bos_token_id
    assert ids.count(IMAGE_ID) == text.count("<image>")
    assert ids.count(DEEPFAKE_ID) == text.count("<deepfake>")


def test_the_word_deepfake_is_a_word():
    assert DEEPFAKE_ID not in encode("Is this a deepfake?", TOKENS)


def test_the_end_token_is_the_tokenisers():
    text, _ = VICUNA_V1.render([Turn("Q", "A"), Turn("R")], end="<|end|>")
    assert text.endswith("USER: Q ASSISTANT: A<|end|>USER: R ASSISTANT:")
    assert DDVQA.render([Turn("Q", "A"), Turn("R")])[0].endswith(
        "###Human: Q ###Assistant: A</s>###Human: R ###Assistant:"
    )


@pytest.mark.parametrize(
    ("spoken", "sentence"),
    [
        ([], "at least one turn"),
        ([Turn("a"), Turn("b", "c")], "Turn 1 .* has no answer"),
        ([Turn("a", "b"), Turn("c", " \n")], "answer of turn 2 .* is empty"),
    ],
)
def test_broken_turns_are_refused(spoken, sentence):
    with pytest.raises(UsageError, match=sentence):
        VICUNA_V1.render(spoken)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        [{"from": "human", "value": "a"}],
        [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}],
        [{"from": "human", "value": "a"}, {"value": "b"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": 3}],
        [{"from": "human"}, {"from": "gpt", "value": "b"}],
    ],
)
def test_broken_entries_are_refused(entry):
    with pytest.raises(UsageError, match="conversation"):
        turns_of(entry)


def test_several_pictures_stay_where_they_were_written():
    question = "Is <image> newer than <image>?"
    entry = [{"from": "human", "value": question}, {"from": "gpt", "value": "No."}]
    assert turns_of(entry) == [Turn(question, "No.")]
