"""The tokeniser and the conversations give the published ids and labels."""

from __future__ import annotations

import json
import shutil

import pytest

from m2f2cli.models.conversation import (
    IGNORED,
    VICUNA_V1,
    Turn,
    encode,
    encode_with_labels,
    template,
    turns_of,
)
from m2f2cli.models.tokenizer import load_tokenizer
from tests.parity.explainer import FOLDER, prompts, read

TRAINING = read("train")
SAMPLES = {s["name"]: s for s in (*TRAINING["samples"], *TRAINING["edge_cases"])}
# What the published code refuses, or learns nothing from, and ours does not.
CRASHES = {"word_deepfake_in_second_turn", "word_deepfake_in_answer_of_second_turn"}
UNLEARNT = {"answer_contains_role_marker", "unk_in_text"}


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "files"
    shutil.copytree(FOLDER, folder)
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    fields["legacy"] = request.param
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """The same, written as tokenizer.json and read again."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    return load_tokenizer(folder)


def key_of(tokenizer) -> str:
    return f"ids_legacy_{str(tokenizer.init_kwargs['legacy']).lower()}"


@pytest.mark.parametrize("kind", ["prompts", "ids_only", "plain_tokenizer_call"])
def test_ids(tokenizer, saved, kind):
    for name, case in read("tokenization")[kind].items():
        expected = case[key_of(tokenizer)]
        if isinstance(expected, str):  # the published code crashes on the word alone
            assert name == "no_placeholder_word_deepfake"
            expected = case["tokenizer_image_token_legacy_true"]
        assert encode(case["text"], tokenizer) == expected, name
        assert encode(case["text"], saved) == expected, name


@pytest.mark.parametrize("name", sorted(SAMPLES.keys() - CRASHES - {"empty_answer"}))
def test_conversations(tokenizer, name):
    sample = SAMPLES[name]
    golden = sample[key_of(tokenizer).replace("ids_", "")]
    text, answers = VICUNA_V1.render(turns_of(sample["conversations"]))
    ids, labels = encode_with_labels(text, answers, tokenizer)
    assert ids == golden["input_ids"]
    if name in UNLEARNT:
        assert set(golden["labels"]) == {IGNORED}
        assert set(labels) != {IGNORED}
    else:
        assert labels == golden["labels"]


@pytest.mark.parametrize("name", sorted(CRASHES | UNLEARNT))
def test_what_is_learnt_are_the_answers(tokenizer, name):
    turns = turns_of(SAMPLES[name]["conversations"])
    _, labels = encode_with_labels(*VICUNA_V1.render(turns), tokenizer)
    learnt = tokenizer.decode([label for label in labels if label != IGNORED])
    for turn in turns:
        assert turn.answer in learnt
    assert labels.count(tokenizer.eos_token_id) == len(turns)
    assert not any("USER" in part for part in learnt.split("</s>"))


def test_templates_write_the_published_prompts():
    published = prompts()
    ddvqa, vicuna = template("ddvqa"), template("vicuna_v1")

    def ask(frame, question):
        return frame.render([Turn(question)])[0]

    assert ask(ddvqa, ddvqa.judgement()) == published["detection"]
    assert ask(vicuna, vicuna.judgement()) == published["v1_single"]
    text = "This image is fake. Describe the authenticity of the image based on nose, eyebrows."
    assert ask(ddvqa, ddvqa.question(text)) == published["explanation"]
    first = Turn(vicuna.judgement(), "The image looks fake.")
    second = Turn("Which part of the face shows it? Answer in one sentence.")
    assert vicuna.render([first, second])[0] == published["v1_two_turns"]
