from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.load import load_detector
from m2f2cli.errors import ConfigError, InputError, M2F2Error, MissingExtraError
from m2f2cli.metrics import average_precision, roc_auc
from m2f2cli.training.detector import prepare, train_detector
from m2f2cli.training.objective import Objective


@pytest.mark.slow
def test_it_learns_and_writes_a_detector(options):
    lines: list[str] = []
    steps: list[tuple[int, str]] = []
    folder = train_detector(
        options(epochs=8, learning_rate=3e-3, ema_decay=0.5, flip=0.0),
        notify=lines.append,
        advance=lambda done, words: steps.append((done, words)),
    )
    stage = io.read_stage(folder)
    chosen, epochs = stage["metrics"]["selected"], stage["metrics"]["epochs"]
    assert chosen["auc"] == max(record["auc"] for record in epochs) > 0.9
    assert [record["epoch"] for record in epochs] == list(range(1, 9))
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert stage["stage"] == "train-detector"
    assert stage["options"]["epochs"] == 8
    assert stage["data"]["train"]["real"] == 9
    assert stage["data"]["validation"]["fake"] == 3
    assert set(stage["versions"]) >= {"torch", "transformers", "timm", "m2f2cli"}
    assert stage["fingerprint"] == io.fingerprint(folder, verify=True)
    assert sum(done for done, _ in steps) == 8 * 3
    assert "loss" in steps[-1][1]
    assert "AUC" in steps[-1][1]
    assert any(line.startswith("epoch 8/8: loss") for line in lines)
    assert any("18 pictures of 9 identities" in line for line in lines)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "stage.json",
    ]  # fmt: skip
    assert not folder.with_name("detector.training").exists()


def test_the_written_detector_scores_as_measured(options):
    run = prepare(options(epochs=3, learning_rate=3e-3, ema_decay=0.8, select="loss"))
    folder = run.run()
    chosen = io.read_stage(folder)["metrics"]["selected"]
    detector = load_detector(str(folder), device="cpu", dtype="float32")
    pictures = run.measured
    items = [pictures[n] for n in range(len(pictures))]
    pixels = torch.from_numpy(np.stack([item["pixel_values"] for item in items]))
    labels = torch.tensor([int(item["labels"]) for item in items])
    with torch.no_grad():
        logits = detector(pixel_values=pixels).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert abs(float(loss) - chosen["validation_loss"]) < 1e-5
    assert roc_auc(labels.numpy(), (logits[:, 1] - logits[:, 0]).numpy()) == chosen["auc"]


@pytest.mark.slow
def test_the_best_epoch_is_kept_not_the_last(options):
    for select, key, best in (("loss", "validation_loss", min), ("ap", "ap", max)):
        folder = train_detector(
            options(epochs=4, learning_rate=0.05, select=select, overwrite=True)
        )
        metrics = io.read_stage(folder)["metrics"]
        assert metrics["selected"][key] == best(record[key] for record in metrics["epochs"])
    last = train_detector(options(epochs=3, select="last", overwrite=True))
    assert io.read_stage(last)["metrics"]["selected"]["epoch"] == 3


@pytest.mark.slow
def test_learning_rates_follow_the_schedule(options):
    cosine = train_detector(options(epochs=3, schedule="cosine", warmup_ratio=0.2))
    rates = [r["learning_rate"] for r in io.read_stage(cosine)["metrics"]["epochs"]]
    assert rates[0] > rates[1] > rates[2]
    plateau = train_detector(
        options(epochs=6, plateau_patience=0, plateau_cooldown=0, learning_rate=0.3, overwrite=True)
    )
    rates = [r["learning_rate"] for r in io.read_stage(plateau)["metrics"]["epochs"]]
    assert min(rates) <= 0.3 * 0.4 + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_all_terms_and_precisions_together(options, precision, tmp_path):
    teacher = tmp_path / "soft.jsonl"
    teacher.write_text(
        "\n".join(
            json.dumps({"sample": f"{word}/p{n:02d}.png", "fake_probability": p})
            for n in range(12)
            for word, p in (("fake", 0.9), ("real", 0.2))
        )
    )
    folder = train_detector(
        options(
            precision=precision, epochs=1, mixup=0.4, dropout=0.3, kind_weight=0.5, map_weight=0.2,
            self_blend=0.3, pseudo_h264=0.5, soft_labels=teacher, label_smoothing=0.05,
            max_grad_norm=1.0, optimizer="adamw", balance=True, bridge=True, ema_decay=0.9,
        )
    )  # fmt: skip
    detector = load_detector(str(folder))
    assert detector.config.bridge
    assert math.isfinite(io.read_stage(folder)["metrics"]["selected"]["loss"])
    assert all(
        torch.isfinite(t).all() for t in detector.state_dict().values() if t.is_floating_point()
    )


@pytest.mark.slow
def test_equal_commands_give_equal_weights_and_seeds_matter(options, tmp_path):
    def weights(name, **changes):
        folder = train_detector(options(output=tmp_path / name, epochs=1, **changes))
        return (folder / "model.safetensors").read_bytes()

    first = weights("a", workers=0)
    assert first == weights("b", workers=2, cache="never")
    assert first != weights("c", seed=1)


def test_judgements_need_annotations_of_these_pictures(options, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.json").write_text('{"0_001_002": {}}')
    with pytest.raises(InputError, match="speaks of no picture"):
        prepare(options(judgement_weight=1.0, annotations=tmp_path / "annotations"))
    (tmp_path / "annotations" / "a.json").write_text(
        '{"p01": {"0": {"question": "?", "answer": ["The person\'s skin looks very fake."]}}}'
    )
    train_detector(options(epochs=1, judgement_weight=1.0, annotations=tmp_path / "annotations"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"sample": "fake/p01.png"}', "soft labels .* cannot be read: KeyError"),
        ("nonsense", "cannot be read"),
        ('{"sample": "fake/p01.png", "fake_probability": 1.5}', "not between 0 and 1"),
        ('{"sample": "x.png", "fake_probability": 0.5}', "speaks of no picture"),
    ],
)
def test_bad_soft_labels(options, tmp_path, text, words):
    (tmp_path / "soft.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match=words):
        prepare(options(soft_labels=tmp_path / "soft.jsonl"))


def test_validation_folder_must_hold_other_people(options, toy_data):
    with pytest.raises(InputError, match="12 identities are in both"):
        prepare(options(validation=str(toy_data)))


def test_impossible_precision_and_missing_tensorboard(options, monkeypatch):
    with pytest.raises(ConfigError, match="float16 needs a CUDA device"):
        prepare(options(precision="float16"))
    monkeypatch.setattr("m2f2cli.training.trainer.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="tensorboard"):
        prepare(options(report_to="tensorboard"))


def test_divergence_ends_the_run_in_one_sentence(options):
    with pytest.raises(M2F2Error, match="diverged") as refused:
        train_detector(options(learning_rate=1e30))
    assert "--learning-rate" in refused.value.hint


def test_curves_are_written_beside_the_output(options):
    pytest.importorskip("tensorboard")
    folder = train_detector(options(epochs=1, report_to="tensorboard"))
    curves = list(folder.with_name("detector.training").rglob("events.out.*"))
    assert curves
    assert not list(folder.with_name("detector.training").glob("checkpoint-*"))


def test_the_average_is_measured_and_kept(options):
    run = prepare(options(epochs=2, ema_decay=0.9, learning_rate=1e-2))
    run.run()
    objective: Objective = run.model
    kept, live = objective.result(), objective.detector.state_dict()
    assert not torch.equal(kept["head.weight"], live["head.weight"])
    statistics = "backbone.net.bn1.running_mean"
    assert not torch.equal(kept[statistics], live[statistics])
    frozen = "clip.vision.embeddings.class_embedding"
    assert torch.equal(kept[frozen], live[frozen])
    assert int(objective.average.steps) > 0


SCORES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=2, max_size=40)


@given(SCORES)
def test_figures_agree_with_their_definitions(rows):
    labels = np.array([label for label, _ in rows])
    scores = np.array([score for _, score in rows], dtype=float)
    fake, real = scores[labels == 1], scores[labels == 0]
    if not len(fake) or not len(real):
        assert math.isnan(roc_auc(labels, scores))
        return
    pairs = (fake[:, None] > real).mean() + 0.5 * (fake[:, None] == real).mean()
    assert abs(roc_auc(labels, scores) - pairs) < 1e-12
    assert roc_auc(labels, np.exp(scores)) == roc_auc(labels, scores)
    expected, before = 0.0, 0.0
    for cut in sorted(set(scores), reverse=True):
        chosen = scores >= cut
        recall = labels[chosen].sum() / labels.sum()
        expected += (recall - before) * labels[chosen].mean()
        before = recall
    assert abs(average_precision(labels, scores) - expected) < 1e-12
