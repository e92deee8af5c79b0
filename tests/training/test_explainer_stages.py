"""Stages 2 and 3: what is learnt from, what moves and what does not, and what is written."""

from __future__ import annotations

import json
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.data.conversations import Pictures
from m2f2cli.data.prepare.ddvqa import prepare_ddvqa
from m2f2cli.errors import CheckpointError, ConfigError, InputError, MissingExtraError
from m2f2cli.options.train_explainer import ConversationOptions
from m2f2cli.training import explainer
from m2f2cli.training.explainer import prepare, trained
from m2f2cli.training.explainer_data import (
    ConversationDataset,
    UsableConversations,
    read_usable,
)
from tests.models import explainers
from tests.models.explainers import tiny_processor
from tests.training.talks import stage_options, train, turns, write_all, write_talks

STAGES = ("align", "lora")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("stages"))


def check_labels(file: Path, images: Path, take: int | None = None) -> int:
    """Labels of every conversation against what its answers must teach; how many were looked at."""
    processor = tiny_processor()
    processor.config.text_config.max_position_embeddings = 10**6
    options = ConversationOptions(data=file, images=images, max_length=10**6, missing="skip")
    usable = read_usable(options, processor, Pictures(images))
    dataset = ConversationDataset(
        usable, processor, Pictures(images), max_length=10**6, seed=0, group=0
    )
    end = processor.tokenizer.eos_token
    for conversation in usable.train[:take]:
        item = dataset.encode(conversation)
        labels, ids = np.array(item["labels"]), np.array(item["input_ids"])
        learnt = np.flatnonzero(labels != -100)
        assert np.array_equal(labels[learnt], ids[learnt])
        assert len(ids) == usable.lengths[conversation.number]
        runs = np.split(ids[learnt], np.flatnonzero(np.diff(learnt) > 1) + 1)
        texts = [processor.tokenizer.decode(run).removeprefix(" ") for run in runs]
        assert texts == [answer + end for answer in conversation.answers]
    return len(usable.train[:take])


def test_unmasked_labels_decode_exactly_to_the_answers(root):
    assert check_labels(root / "talks.json", root / "crops") == 24


@pytest.mark.slow
@pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="needs DD-VQA")
def test_unmasked_labels_of_the_published_file_decode_to_the_answers():
    data = Path(os.environ["M2F2_DDVQA"])
    file = data / "reference" / "train_judge_only_c40.json"
    assert check_labels(file, data / "images" / "c40" / "train", take=500) == 500


@pytest.mark.slow
@pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="needs DD-VQA")
def test_unmasked_labels_of_every_prepared_conversation(tmp_path, monkeypatch):
    """Of both stages' whole files; labels do not hang on what a picture shows."""
    data = Path(os.environ["M2F2_DDVQA"])
    prepare_ddvqa(data, tmp_path)
    monkeypatch.setattr(Pictures, "pixels", lambda self, c: np.zeros((8, 8, 3), np.uint8))
    images = data / "images" / "c40" / "train"
    for name, count in (("judge_only", 9252), ("explain", 18504)):
        assert check_labels(tmp_path / f"train_{name}_c40.json", images) == count


class Gradients:
    """Notes the largest gradient each parameter ever got; a hook before an optimizer's steps."""

    def __init__(self, model):
        self.model = model
        self.largest = {}

    def __call__(self, *_):
        for name, weight in trained(self.model):
            now = 0.0 if weight.grad is None else float(weight.grad.abs().max())
            self.largest[name] = max(self.largest.get(name, 0.0), now)


def expected_names(stage: str, model: torch.nn.Module) -> set[str]:
    projector = [f"{n}.{part}" for n in (0, 2) for part in ("weight", "bias")]
    if stage == "align":
        return {f"forgery_projector.{name}" for name in projector}
    layers = [
        f"language_model.model.layers.{layer}.{part}_proj"
        for layer in range(2)
        for part in (
            *(f"self_attn.{x}" for x in "qkvo"),
            *(f"mlp.{x}" for x in ("gate", "up", "down")),
        )
    ]
    updates = {f"base_model.model.{name}.lora_{side}.weight" for name in layers for side in "AB"}
    return updates | {
        f"base_model.model.{part}_projector.{name}"
        for part in ("mm", "forgery")
        for name in projector
    }


@pytest.mark.parametrize("stage", STAGES)
def test_after_20_steps_exactly_the_stages_parameters_have_moved(stage, root, tmp_path):
    file = tmp_path / "talks.json"
    file.write_text(json.dumps(json.loads((root / "talks.json").read_text())[:20]))
    options = stage_options(stage, root, tmp_path / "delta", data=file, epochs=4)
    run = prepare(options)
    assert run.steps == 20
    model, gradients = run.model, Gradients(run.model)
    run.optimizer.register_step_pre_hook(gradients)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moving = {id(weight) for _, weight in trained(model)}
    folder = run.run()
    after = model.state_dict(keep_vars=True)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, tensor in after.items() if id(tensor) in moving}
    wanted = expected_names(stage, model)
    assert {name for name, _ in trained(model)} == wanted
    assert set(gradients.largest) == wanted
    assert all(value > 0 for value in gradients.largest.values())
    assert any("running_mean" in name for name in before)
    loaded, _ = load_explainer(str(root / "explainer"), device="cpu")
    inside = run.explainer.state_dict()
    for name, tensor in loaded.detector.state_dict().items():
        assert torch.equal(inside[f"detector.{name}"], tensor)
    delta = "delta.safetensors" if stage == "align" else "adapter_model.safetensors"
    assert set(load_file(folder / delta)) == wanted
    said = io.read_stage(folder)
    assert said["stage"] == stage
    assert said["parent"] == io.fingerprint(root / "explainer")
    assert said["options"] == options.to_flat()


@pytest.mark.slow
def test_peft_loads_the_adapter_folder_unchanged(root, tmp_path):
    run = prepare(stage_options("lora", root, tmp_path / "adapter"))
    folder = run.run()
    base, _ = load_explainer(str(root / "explainer"), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    batch = dict(next(iter(run.loader)))
    run.model.eval()
    with torch.no_grad():
        mine, theirs = run.model(**batch).logits, loaded(**batch).logits
        plain = load_explainer(str(root / "explainer"), device="cpu")[0](**batch).logits
    assert torch.equal(mine, theirs)
    assert not torch.allclose(mine, plain, atol=1e-2)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["r"] == 4
    assert written["lora_alpha"] == 8
    assert written["lora_dropout"] == 0.05
    assert len(written["target_modules"]) == 14
    assert written["modules_to_save"] == ["mm_projector", "forgery_projector"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "delta.safetensors"
    return load_file(file if file.exists() else folder / "adapter_model.safetensors")


def apart(one: Path, two: Path) -> float:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_how_memory_is_saved_changes_nothing_that_is_learnt(stage, root, tmp_path):
    plain = {"gradient_checkpointing": False, **({"lora_dropout": 0.0} if stage == "lora" else {})}
    whole = train(stage_options(stage, root, tmp_path / "whole", **plain))
    twice = plain | {"gradient_checkpointing": True}
    assert apart(whole, train(stage_options(stage, root, tmp_path / "cp", **twice))) < 1e-6
    parts = plain | {"batch_size": 2, "gradient_accumulation_steps": 2}
    assert apart(whole, train(stage_options(stage, root, tmp_path / "acc", **parts))) < 5e-4


@pytest.mark.slow
def test_half_precision_trains_in_float32(root, tmp_path):
    options = stage_options("lora", root, tmp_path / "half", precision="bfloat16")
    run = prepare(options)
    kinds = {w.dtype for w in run.model.parameters() if not w.requires_grad}
    assert kinds == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(run.run()).values()} == {torch.float32}


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_four_bits_hold_the_language_models_layers_only(tmp_path, monkeypatch):
    for name in ("hidden_size", "intermediate_size"):  # bitsandbytes packs 64 values together
        monkeypatch.setitem(explainers.TEXT, name, 128)
    root = write_all(tmp_path / "root")
    run = prepare(stage_options("lora", root, tmp_path / "qlora", quantize="4bit", epochs=2))
    packed = [n for n, w in run.model.named_parameters() if w.dtype == torch.uint8]
    assert len(packed) == 14
    assert all(".layers." in name and "language_model." in name for name in packed)
    folder = run.run()
    assert set(weights(folder)) == expected_names("lora", run.model)
    assert io.read_stage(folder)["options"]["quantize"] == "4bit"
    plain, _ = load_explainer(str(root / "explainer"), device="cpu")
    PeftModel.from_pretrained(plain, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_conversations_without_a_picture_train_too(stage, root, tmp_path):
    file = tmp_path / "words.json"
    row = {"id": "1", "conversations": turns("Is it real?", "It is fake.")}
    asked = json.loads((root / "talks.json").read_text())[:3]
    file.write_text(json.dumps([row, row, *asked, row]))
    settings = {"data": file, "batch_size": 2, "group_by_length": False}
    train(stage_options(stage, root, tmp_path / "out", **settings))


def test_measuring_does_not_hang_on_how_it_is_dealt_out(root, tmp_path, monkeypatch):
    """Each of three processes measures its share; together they measure every item once."""
    settings = {"validation_share": 0.4, "answer_tokens": 4}
    trainer = prepare(stage_options("align", root, tmp_path / "out", **settings))
    whole = list(trainer.held_losses())
    loss, tokens = (sum(part[n] for part in whole) for n in (0, 1))
    parts = []
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 3)
    for process in range(3):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", process)
        parts += list(trainer.held_losses())
    assert sum(part[1] for part in parts) == tokens
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-5)


def test_judged_accuracy_reads_the_generated_answers(root, tmp_path, monkeypatch):
    settings = {"validation_share": 0.4, "answer_tokens": 4}
    trainer = prepare(stage_options("align", root, tmp_path / "out", **settings))
    processor = trainer.processor
    say = processor.tokenizer("The image looks fake.", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(
        trainer.explainer,
        "generate",
        lambda input_ids, **_: torch.tensor([say] * len(input_ids)),
    )
    figures = trainer.evaluate()
    labels = [c.label for c in trainer.held]
    assert figures["judged"] == len(labels)
    assert figures["judged_accuracy"] == sum(labels) / len(labels)
    people = [
        {p for c in part for p in c.identities}
        for part in (trainer.dataset.conversations, trainer.held)
    ]
    assert not people[0] & people[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_measured_within_epochs_too(stage, root, tmp_path):
    """Measuring changes nothing that is learnt, nor any figure of the epochs."""
    settings = {"validation_share": 0.4, "answer_tokens": 4, "epochs": 2}
    lines: list[str] = []
    plain = train(stage_options(stage, root, tmp_path / "plain", **settings))
    settings["eval_steps"] = 2
    often = prepare(stage_options(stage, root, tmp_path / "often", **settings), notify=lines.append)
    folder = often.run()
    each = often.steps // 2
    assert apart(plain, folder) == 0
    one, two = (io.read_stage(run)["metrics"] for run in (plain, folder))
    assert set(one) == {"epochs"}
    for a, b in zip(one["epochs"], two["epochs"], strict=True):
        assert a == pytest.approx(b)
    wanted = [step for step in range(2, often.steps, 2) if step % each]
    assert [record["step"] for record in two["steps"]] == wanted
    assert wanted
    for record in two["steps"]:
        assert set(record) == {"step", "epoch", "validation_loss", "judged_accuracy", "judged"}
        assert record["epoch"] == pytest.approx(record["step"] / each)
        assert 0 < record["validation_loss"] < 20
    losses = [record["validation_loss"] for record in (*two["steps"], *two["epochs"])]
    assert len(set(losses)) == len(losses)
    said = [line.partition(":")[0] for line in lines[1:]]
    assert said == [
        f"epoch {s // each}/2" if s % each == 0 else f"step {s}"
        for s in sorted({*wanted, each, 2 * each})
    ]
    with pytest.raises(ConfigError, match="nothing to measure on"):
        stage_options(stage, root, tmp_path / "no", eval_steps=2)


def usable_of(lengths):
    rows = [type("Row", (), {"number": n})() for n in range(len(lengths))]
    return UsableConversations(rows, [], dict(enumerate(lengths)), {}, {})


def test_batches_of_like_length_and_every_item_once():
    lengths = np.random.default_rng(0).integers(10, 500, 1003)

    def dataset(group):
        usable = usable_of(lengths)
        return ConversationDataset(usable, None, None, max_length=500, seed=1, group=group)

    made = dataset(8)
    first, second = made.order(0), made.order(1)
    for order in (first, second):
        assert sorted(order) == list(range(1003))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, made.order(0))
    spans = [np.ptp(lengths[first[i : i + 8]]) for i in range(0, 1000, 8)]
    assert np.median(spans) < 20
    starts = lengths[first[:1000:8]]
    assert np.abs(np.corrcoef(starts, np.arange(125))[0, 1]) < 0.3
    loose = ConversationDataset(
        usable_of(lengths), None, None, max_length=500, seed=1, group=0
    ).order(0)
    assert sorted(loose) == list(range(1003))


@pytest.mark.parametrize("stage", STAGES)
def test_too_long_is_counted_or_refused_never_cut(stage, root, tmp_path):
    rows = json.loads((root / "talks.json").read_text())
    rows[1]["conversations"][-1]["value"] = "The image looks fake. " * 200
    file = tmp_path / "talks.json"
    file.write_text(json.dumps(rows))
    lines: list[str] = []
    run = prepare(stage_options(stage, root, tmp_path / "out", data=file), notify=lines.append)
    assert run.record["data"]["too_long"] == 1
    assert run.record["data"]["train"] == 23
    assert "1 too long" in lines[-1]
    with pytest.raises(InputError, match=r"have more than 400 tokens, the first is number 1 "):
        prepare(stage_options(stage, root, tmp_path / "no", data=file, too_long="error"))
    assert not (tmp_path / "no").exists()


def test_a_limit_takes_conversations_from_all_over_the_file(root):
    def usable(**changes):
        images = root / "crops"
        options = ConversationOptions(data=root / "talks.json", images=images, **changes)
        return read_usable(options, tiny_processor(), Pictures(images))

    few = usable(limit=5)
    assert [c.number for c in few.train] == [0, 4, 9, 14, 19]
    assert few.counts["read"] == few.counts["train"] == 5
    assert usable(limit=99).counts == usable().counts


def test_missing_pictures_are_counted_or_refused(root, tmp_path):
    write_talks(tmp_path / "data")
    crops = tmp_path / "data" / "crops"
    (crops / "5_000.jpg").unlink()
    (crops / "5_001.jpg").write_bytes(b"no picture")
    given = {"data": tmp_path / "data" / "talks.json", "images": crops}
    with pytest.raises(InputError, match=r"2 pictures .* cannot be read") as refused:
        prepare(stage_options("align", root, tmp_path / "out", **given))
    assert "--missing skip" in refused.value.hint
    folder = train(stage_options("align", root, tmp_path / "skipped", missing="skip", **given))
    data = io.read_stage(folder)["data"]
    assert (data["missing"], data["train"]) == (4, 20)
    assert data["missing_pictures"] == ["5_000.jpg", "5_001.jpg"]


def test_wrong_starts_are_refused(root, tmp_path, tiny_detector_folder, monkeypatch):
    with pytest.raises(CheckpointError, match="detector"):
        prepare(stage_options("align", root, tmp_path / "a", model=str(tiny_detector_folder)))
    monkeypatch.setattr(explainer, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as refused:
        prepare(stage_options("align", root, tmp_path / "b", deepspeed="zero2"))
    assert refused.value.hint == "pip install 'm2f2cli[train]'"
    with pytest.raises(ConfigError, match="is no file"):
        stage_options("align", root, tmp_path / "c", deepspeed="zero4")
    with pytest.raises(ConfigError, match="wandb"):
        prepare(stage_options("align", root, tmp_path / "d", report_to="wandb"))
    with pytest.raises(ConfigError, match="a single step"):
        prepare(stage_options("align", root, tmp_path / "e", batch_size=24))
    assert not list(tmp_path.iterdir())
    assert (
        prepare(stage_options("align", root, tmp_path / "f", batch_size=24, warmup_ratio=0)).steps
        == 1
    )
