"""The explainer: places and pictures, batches, gradients, saving."""

from __future__ import annotations

import pytest
import torch

from m2f2cli.errors import ConfigError, UsageError
from m2f2cli.models.conversation import DDVQA, VICUNA_V1, Turn
from m2f2cli.models.explainer import CACHE, Explainer, ExplainerConfig
from tests.models.explainers import (
    GREEDY,
    logits_of,
    picture,
    tiny_config,
    tiny_explainer,
    tiny_processor,
)

TWO = VICUNA_V1.render([Turn(VICUNA_V1.question("Which one is real?", pictures=2))])[0]
ONE = VICUNA_V1.render([Turn(VICUNA_V1.judgement())])[0]
WIDE = DDVQA.render([Turn(DDVQA.judgement())])[0]
NONE = VICUNA_V1.render([Turn("What is a deepfake?")])[0]
FIRST_WIDE, SECOND, THIRD, FOURTH = (
    picture(1, width=60),
    picture(2),
    picture(3),
    picture(4, height=55),
)
PROMPTS = [(NONE, []), (TWO, [FIRST_WIDE, SECOND]), (ONE, [THIRD]), (WIDE, [FOURTH])]


@pytest.fixture(scope="module")
def model():
    return tiny_explainer()


@pytest.fixture(scope="module")
def process():
    return tiny_processor()


def test_a_picture_becomes_its_patches_and_one_answer(model, process):
    batch = process(ONE, [SECOND])
    assert model.config.patches == 16
    assert (batch["input_ids"] == -200).sum() == 16
    assert (batch["input_ids"] == -300).sum() == 1
    features = model.encode_pictures(batch["pixel_values"])
    embedded = model.embed(batch["input_ids"], features)
    hidden = model.detector.clip(batch["pixel_values"])[0]
    assert torch.equal(embedded[batch["input_ids"] == -200], model.mm_projector(hidden[0, 1:]))
    believed = model.detector(batch["pixel_values"]).logits.softmax(dim=-1)
    assert torch.equal(embedded[batch["input_ids"] == -300], model.forgery_projector(believed))


def test_the_backbone_sees_the_centre_and_clip_all_of_it(model, process):
    batch = process(ONE, [FIRST_WIDE])
    clip, centre = batch["pixel_values"], batch["backbone_pixel_values"]
    assert not torch.equal(clip, centre)
    mixed = model.detector(clip, backbone_pixel_values=centre).logits
    assert torch.equal(model.encode_pictures(clip, centre).logits, mixed)
    assert not torch.allclose(mixed, model.detector(clip).logits)
    assert not torch.allclose(mixed, model.detector(centre).logits)
    square = tiny_processor(image_aspect="square")(ONE, [FIRST_WIDE])
    assert torch.equal(square["pixel_values"], centre)
    assert "backbone_pixel_values" not in square


def test_a_batch_gives_what_its_rows_give(model, process):
    """Rows of other lengths, without a picture or with two do not shift anything."""
    texts, pictures = zip(*PROMPTS, strict=True)
    together = process(list(texts), list(pictures))
    assert (together["attention_mask"] == 0).any()
    singles = [process(text, seen) for text, seen in PROMPTS]
    expected = torch.cat([logits_of(model, one) for one in singles])
    assert torch.allclose(logits_of(model, together), expected, atol=1e-5)
    swapped = process(list(texts), [[], [FIRST_WIDE, THIRD], [SECOND], [FOURTH]])
    difference = (logits_of(model, swapped) - expected).abs().amax(dim=1)
    assert difference[0] < 1e-5 < difference[1]
    answers = model.generate(**together, **GREEDY).tolist()
    assert answers == [model.generate(**one, **GREEDY)[0].tolist() for one in singles]


def test_a_row_may_show_the_detectors_answer_alone(model, process):
    """The next row still gets its own patches."""
    alone = VICUNA_V1.render([Turn("<deepfake>\nIs it real?")])[0]
    together = process([alone, ONE], [[SECOND], [THIRD]])
    expected = [process(alone, [SECOND]), process(ONE, [THIRD])]
    rows = torch.cat([logits_of(model, one) for one in expected])
    assert torch.allclose(logits_of(model, together), rows, atol=1e-5)


def test_a_cache_gives_what_the_whole_gives(model, process):
    batch = process(ONE, [SECOND])
    ids = batch["input_ids"]
    with torch.no_grad():
        whole = model(**batch).logits
        first = model(input_ids=ids[:, :-3], pixel_values=batch["pixel_values"], use_cache=True)
        rest = model(input_ids=ids[:, -3:], **{CACHE: first[CACHE]})
    assert torch.allclose(torch.cat([first.logits, rest.logits], dim=1), whole, atol=1e-5)


def test_saved_and_loaded_by_transformers(model, process, tmp_path):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    loaded, account = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is Explainer
    assert not any(account.values())
    batch = process(ONE, [SECOND])
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.allclose(logits_of(loaded.eval(), batch), logits_of(model, batch), atol=1e-6)
    assert loaded.config.detector_config.clip == model.config.detector_config.clip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_is_not_frozen_learns(process, checkpointing):
    model = tiny_explainer()
    model.requires_grad_(False)
    model.forgery_projector.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    samples = [process.sample([Turn(VICUNA_V1.judgement(), "It looks fake.")], [SECOND])]
    model(**process.collate(samples)).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {f"forgery_projector.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_checkpointing_changes_no_gradient(process):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_explainer()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model.detector.requires_grad_(False)
        model.train()
        samples = [process.sample([Turn(VICUNA_V1.judgement(), "It looks fake.")], [SECOND])]
        model(**process.collate(samples)).loss.backward()
        gradients.append(model.mm_projector[0].weight.grad)
    assert torch.allclose(*gradients, atol=1e-7)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize(
    ("ids", "pictures", "sentence"),
    [
        ([-200] * 16 + [-300, -300], 1, "2 detector answers"),
        ([-200] * 15, 1, "15 places for patches"),
        ([-200] * 16, 2, "places for 1 pictures; 2"),
        ([5, 6], 1, "places for 0 pictures; 1"),
        ([-300], 0, "no picture was given"),
    ],
)
def test_places_without_pictures_are_refused(model, ids, pictures, sentence):
    pixels = {"pixel_values": torch.zeros(pictures, 3, 32, 32)} if pictures else {}
    with pytest.raises(UsageError, match=sentence):
        model(input_ids=torch.tensor([[1, *ids]]), **pixels)


def test_an_unknown_aspect_is_refused():
    with pytest.raises(ConfigError, match="aspect 'stretch'"):
        tiny_config(image_aspect="stretch")
    assert ExplainerConfig.from_dict(tiny_config().to_dict()).patches == 16
