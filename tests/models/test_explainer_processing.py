"""The processor: prompts and pictures in, tensors out, and what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from m2f2cli.errors import CheckpointError, UsageError
from m2f2cli.models.conversation import IGNORED, VICUNA_V1, Turn
from m2f2cli.models.explainer import ExplainerConfig
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import decode, load_tokenizer
from tests.conftest import tiny_fields
from tests.models.explainers import TEXT, TOKENIZER, picture, tiny_config, tiny_processor

JUDGE = VICUNA_V1.render([Turn(VICUNA_V1.judgement())])[0]
LEARN = [Turn(VICUNA_V1.judgement(), "The image looks fake.")]


@pytest.fixture(scope="module")
def process():
    return tiny_processor()


def test_one_prompt_or_several(process):
    one, again = process(JUDGE, [picture(1)]), process([JUDGE], [[picture(1)]])
    assert all(torch.equal(one[name], again[name]) for name in one)
    plain = process(["Hello.", "What is a deepfake?"])
    assert set(plain) == {"input_ids", "attention_mask"}
    assert plain["attention_mask"][0].tolist() == sorted(plain["attention_mask"][0].tolist())
    half = one.to(torch.float16)
    assert (half["pixel_values"].dtype, half["input_ids"].dtype) == (torch.float16, torch.int64)


def test_views_may_come_ready(process):
    ready = process.view(picture(1, width=70))
    without = ExplainerProcessor(process.tokenizer, process.config)
    batch, expected = without(JUDGE, [ready]), process(JUDGE, [picture(1, width=70)])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with pytest.raises(UsageError, match="ready views"):
        without(JUDGE, [picture(1)])


def test_a_very_wide_picture_is_padded_without_filling_the_memory(process):
    strip = np.zeros((2, 40_000, 3), dtype=np.uint8)
    clip, centre = process.view(strip)
    assert clip.shape == centre.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("prompt", "pictures", "sentence"),
    [
        ("Is it real?", 1, "no <image> or <deepfake>"),
        ("<image>\n<deepfake>\n<deepfake>\nIs it real?", 1, "2 <deepfake> for 1 pictures"),
        ("<image>\n<image>\nIs it real?", 1, "2 <image> for 1 pictures"),
        ("<image>\nIs it real?", 2, "1 <image> for 2 pictures"),
        ("<image>\nIs it real?", 0, "1 <image> for 0 pictures"),
        ("<deepfake>\nIs it real?", 2, "1 <deepfake> for 2 pictures"),
        (
            "<image>\n<deepfake>\n" + "why " * 400,
            1,
            "tokens with its pictures; the model reads 400",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_refused(process, prompt, pictures, sentence):
    with pytest.raises(UsageError, match=sentence) as error:
        process(prompt, [picture(n) for n in range(pictures)])
    assert error.value.hint


def test_prompts_and_lists_of_pictures_must_pair_up(process):
    with pytest.raises(UsageError, match="2 prompts came with 1 lists"):
        process(["a", "b"], [[]])


def test_a_sample_has_a_label_a_token(process):
    sample = process.sample(LEARN, [picture(1)])
    ids, labels = sample["input_ids"], sample["labels"]
    assert len(ids) == len(labels)
    assert ids.count(process.config.image_token_id) == 16
    learnt = [label for label in labels if label != IGNORED]
    assert decode(process.tokenizer, learnt) == "The image looks fake."
    assert learnt[-1] == process.tokenizer.eos_token_id
    assert ids[-len(learnt) :] == learnt


def test_long_samples_lose_their_end_but_nothing_else(process):
    whole = process.sample(LEARN, [picture(1)])
    length = len(whole["input_ids"]) - 2
    cut = process.sample(LEARN, [picture(1)], max_length=length)
    assert cut["input_ids"] == whole["input_ids"][:-2]
    assert cut["labels"] == whole["labels"][:-2]
    for short in (length - 6, 100, 80):
        with pytest.raises(UsageError, match=f"first {short} hold"):
            process.sample(LEARN, [picture(1)], max_length=short)


def test_a_batch_to_learn_from_is_padded_on_the_right(process):
    plain = [Turn("Hello.", "Good day.")]
    samples = [
        process.sample(LEARN, [picture(1, width=60)]),
        process.sample(plain),
        process.sample(LEARN, [picture(2)]),
    ]
    batch = process.collate(samples)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert batch["attention_mask"][1, : lengths[1]].all()
    assert batch["pixel_values"].shape == batch["backbone_pixel_values"].shape == (2, 3, 32, 32)
    assert torch.equal(batch["backbone_pixel_values"][1], batch["pixel_values"][1])
    assert set(process.collate([samples[1]])) == {"input_ids", "attention_mask", "labels"}


def spoilt(tmp_path, **changes):
    folder = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, folder)
    (folder / "special_tokens_map.json").unlink()
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, **changes}))
    return folder


def test_a_tokeniser_without_its_special_tokens_is_refused(tmp_path):
    folder = spoilt(tmp_path, eos_token=None)
    with pytest.raises(CheckpointError, match="has no eos_token"):
        load_tokenizer(folder)


def test_missing_and_damaged_tokenisers_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    folder = spoilt(tmp_path)
    for text, sentence in (("{}", "no vocabulary"), ('{"model": ', "not readable JSON")):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=sentence):
            load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    data = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_tokenizer(folder)


def test_a_tokeniser_of_a_larger_model_is_refused():
    small = ExplainerConfig(detector_config=tiny_fields(), text_config={**TEXT, "vocab_size": 700})
    with pytest.raises(CheckpointError, match="800 tokens, the language model 700"):
        ExplainerProcessor(load_tokenizer(TOKENIZER), small)
    assert len(tiny_processor().tokenizer) == tiny_config().text_config.vocab_size
