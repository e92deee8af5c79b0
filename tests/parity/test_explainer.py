"""The explainer gives the published code's pixels, logits, words, loss and gradients."""

from __future__ import annotations

import hashlib

import pytest
import torch

from m2f2cli.checkpoints.convert import import_weights
from m2f2cli.checkpoints.initialize import init_llava
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.data.transforms import explainer_views
from m2f2cli.models.conversation import turns_of
from m2f2cli.models.explainer import PictureFeatures
from m2f2cli.models.prefix import SharedPrompts
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import decode
from tests.checkpoints import golden
from tests.parity.explainer import (
    FOLDER,
    model,
    pictures,
    processor,
    prompts,
    read,
    tensors,
    write_published,
)
from tests.parity.published import state_dict

LOGITS = 2e-5
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def features(aspect: str = "pad") -> PictureFeatures:
    with torch.no_grad():
        return model().encode_pictures(**processor(aspect).pixels(list(pictures().values())))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def expected_words() -> dict[tuple[int, str], dict]:
    rows = {image["name"]: row for row, image in enumerate(read("index")["images"])}
    results = read("generation")["results"]
    return {(rows[r["image"]], r["prompt"]): r for r in results if rows[r["image"]] in pictures()}


def test_pixels_are_the_published_ones():
    images = read("index")["images"]
    for row, picture in pictures().items():
        assert hashlib.sha256(picture.tobytes()).hexdigest() == images[row]["rgb_sha256"]
        seen = zip(("clip", "detector"), processor().view(picture), strict=True)
        for name, pixels in seen:
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            assert digest == images[row][f"{name}_pixel_values_sha256"]


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_prefill_logits(aspect, record_property):
    golden, lengths = tensors("golden"), read("index")["prefill_lengths"]
    prefix = "" if aspect == "pad" else "square_"
    seen = features(aspect)
    worst = 0.0
    for number, row in enumerate(pictures()):
        mine = seen.rows(number, number + 1)
        assert difference(mine.logits[0], golden[f"{prefix}detector_logits"][row]) <= 1e-5
        assert difference(mine.forgery[0], golden[f"{prefix}deepfake_token"][row]) <= 1e-5
        if aspect == "pad":
            patches = mine.patches[0, [0, 1, 287, 575]]
            assert difference(patches, golden["image_tokens"][row, 1:]) <= 1e-4
        for column, (name, text) in enumerate(prompts().items()):
            ids = processor(aspect).tokens(text, 1)
            assert len(ids) == lengths[name]
            with torch.no_grad():
                embedded = model().embed(torch.tensor([ids]), mine)
                logits = model()(inputs_embeds=embedded, logits_to_keep=1).logits[0, -1]
            expected = golden[f"{prefix}logits_last"][row, column]
            worst = max(worst, difference(logits, expected))
    record_property(f"largest logit difference, {aspect}", worst)
    assert worst <= LOGITS


def logits_of(loaded, folder) -> torch.Tensor:
    """Of the first prompt about the last picture, the one that is always at hand."""
    process = ExplainerProcessor.from_folder(folder, loaded.config, explainer_views)
    with torch.no_grad():
        batch = process(prompts()["detection"], [list(pictures().values())[-1]])
        return loaded(**batch, logits_to_keep=1).logits[0, -1]


@pytest.mark.slow
def test_an_explainer_built_from_its_parts_gives_the_same(tmp_path, record_property):
    """A LLaVA base and a detector's file, both float32, through import and init-llava."""
    state = state_dict("llava_tiny")
    parts = {key: tensor for key, tensor in state.items() if not key.startswith("deepfake_")}
    base = golden.write(tmp_path / "base", parts, "model.safetensors")
    torch.save(golden.detector(), tmp_path / "detector.pth")
    import_weights(
        [tmp_path / "detector.pth", base], tmp_path / "detector", clip_config=golden.CLIP_CONFIG
    )
    init_llava(str(base), str(tmp_path / "detector"), tmp_path / "out")
    loaded, folder = load_explainer(str(tmp_path / "out"), device="cpu", dtype="float32")
    # A new explainer's own projector is drawn at random; the golden one takes its place.
    loaded.forgery_projector.load_state_dict(model().forgery_projector.state_dict())
    worst = difference(
        logits_of(loaded, folder), tensors("golden")["logits_last"][list(pictures())[-1], 0]
    )
    record_property("largest logit difference, from parts", worst)
    assert worst <= LOGITS


@pytest.mark.slow
def test_an_imported_folder_gives_the_same(tmp_path, record_property):
    """From the published layout on disk, through import and loading, to the logits."""
    write_published(tmp_path / "published")
    towers = FOLDER / "clip-tiny" / "config.json"
    import_weights([tmp_path / "published"], tmp_path / "out", clip_config=towers)
    loaded, folder = load_explainer(str(tmp_path / "out"), device="cpu")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model().state_dict().items())
    worst = difference(
        logits_of(loaded, folder), tensors("golden")["logits_last"][list(pictures())[-1], 0]
    )
    record_property("largest logit difference, imported", worst)
    assert worst <= LOGITS


@pytest.mark.slow
def test_greedy_words_batched_with_padding():
    """One call: pictures and prompts of different lengths side by side."""
    expected = expected_words()
    texts = [prompts()[name] for _, name in expected]
    batch = processor()(texts, [[pictures()[row]] for row, _ in expected])
    out = model().generate(**batch, **GREEDY).tolist()
    for ids, wanted in zip(out, expected.values(), strict=True):
        assert ids == wanted["new_ids"]
        assert decode(processor().tokenizer, ids) == wanted["text_skip_special"].strip()


def test_greedy_words_with_a_shared_beginning():
    expected = expected_words()
    names = ["detection", "explanation"]
    groups = [[processor().tokens(prompts()[n], 1) for n in names] for _ in pictures()]
    seen = features()
    shared = SharedPrompts(
        model(), groups, [seen.rows(number, number + 1) for number in range(len(groups))]
    )
    assert shared.starts == [groups[0][0].index(processor().config.image_token_id) + 578] * len(
        groups
    )
    out = shared.ask(**GREEDY)
    assert out == [expected[row, name]["new_ids"] for row in pictures() for name in names]


def test_generation_stops_at_the_end_token():
    for stop in read("generation")["stopping"]:
        if 0 not in pictures():
            pytest.skip("needs DD-VQA's pictures (M2F2_DDVQA)")
        batch = processor()(prompts()[stop["prompt"]], [pictures()[0]])
        out = model().generate(**batch, **GREEDY, eos_token_id=stop["eos_token_id"])
        assert out[0].tolist() == stop["sequences"][1:]


def test_loss_and_gradients(record_property):
    if len(pictures()) < 4:
        pytest.skip("needs DD-VQA's pictures (M2F2_DDVQA)")
    golden = read("train")
    made, process = model(), processor()
    samples = [
        process.sample(turns_of(sample["conversations"]), [pictures()[row]])
        for row, sample in enumerate(golden["samples"])
    ]
    for sample, expected in zip(samples, golden["expanded_labels_supervised"], strict=True):
        assert [[n, x] for n, x in enumerate(sample["labels"]) if x != -100] == expected
    batch = process.collate(samples)
    mask = batch["attention_mask"].bool().numpy().tobytes()
    assert hashlib.sha256(mask).hexdigest() == golden["attention_mask_sha256"]
    made.requires_grad_(True).detector.requires_grad_(False)
    made.train()  # a frozen detector stays as it is, unlike the published one
    try:
        out = made(**batch)
        out.loss.backward()
        assert difference(out.detector_logits, torch.tensor(golden["detector_logits"])) <= 1e-5
        assert abs(out.loss.item() - golden["loss"]) <= 1e-5
        record_property("loss difference", abs(out.loss.item() - golden["loss"]))
        check_gradients(dict(made.named_parameters()), golden["gradient_norms"], record_property)
    finally:
        made.requires_grad_(False).eval().zero_grad()


def check_gradients(parameters, norms, record_property) -> None:
    ours = {
        "deepfake_projector": "forgery_projector",
        "model.mm_projector": "mm_projector",
        "model.layers": "language_model.model.layers",
        "lm_head": "language_model.lm_head",
    }
    for theirs, norm in norms.items():
        begin = next(name for name in ours if theirs.startswith(name))
        gradient = parameters[ours[begin] + theirs.removeprefix(begin)].grad
        assert abs(gradient.norm().item() - norm) <= 1e-5 * norm
        expected = tensors("gradients").get(theirs)
        if expected is not None:  # of large matrices the first rows
            error = (gradient[: len(expected)] - expected).norm().item() / norm
            record_property(f"gradient of {theirs}, relative difference", error)
            assert error <= 1e-5
