"""The parts of the ``generalize`` recipe, and the whole of it on a small tower."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from m2f2cli.checkpoints.load import load_detector
from m2f2cli.errors import ConfigError, InputError
from m2f2cli.models.detector import Detector, DetectorConfig
from m2f2cli.options.recipes import read_recipe
from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.training.detector import prepare, train_detector
from m2f2cli.training.head import RIDGES, fit_head
from m2f2cli.training.objective import alignment, group_of, uniformity
from m2f2cli.training.sampler import BatchSampler, EpochOrder
from m2f2cli.training.sources import read_sources
from tests.conftest import TINY_CLIP, TINY_SIDE, randomise


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    """CLIP's vision part alone, as transformers writes it."""
    folder = tmp_path_factory.mktemp("vision") / "clip"
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP["vision"])).save_pretrained(folder)
    return folder


def test_alignment_and_uniformity_of_a_hand_worked_batch():
    """Three unit vectors: 0 and 90 degrees of one class, 180 of the other."""
    features = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
    assert alignment(features, torch.tensor([0, 0, 1])).item() == pytest.approx(2.0)
    between = (2 * math.exp(-4) + math.exp(-8)) / 3
    assert uniformity(features).item() == pytest.approx(math.log(between))
    assert alignment(features, torch.tensor([0, 1, 2])).item() == 0
    assert uniformity(features[:1]).item() == 0


def test_uniformity_pushes_apart_and_alignment_pulls_together():
    for loss, sign in ((uniformity, 1), (lambda f: alignment(f, torch.zeros(2)), -1)):
        features = torch.tensor([[1.0, 0.1], [1.0, -0.1]], requires_grad=True)
        before = (features[0] - features[1]).norm()
        loss(features).backward()
        moved = features - 0.01 * features.grad
        assert sign * ((moved[0] - moved[1]).norm() - before) > 0


def test_norms_move_and_nothing_else_of_the_tower(options):
    run = prepare(options(train="norms", vision_layer=-1))
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    run.model.train()
    run.model(**next(iter(run.loader)))["loss"].backward()
    run.optimizer.step()
    moved = {n for n, t in run.model.state_dict().items() if not torch.equal(t, before[n])}
    in_tower = {name for name in moved if name.startswith("detector.clip.")}
    layers = "detector.clip.vision.encoder.layers"
    assert in_tower == {
        f"detector.clip.vision.pre_layrnorm.{kind}" for kind in ("weight", "bias")
    } | {
        f"{layers}.{n}.layer_norm{k}.{kind}"
        for n in range(TINY_CLIP["vision"]["num_hidden_layers"])
        for k in (1, 2)
        for kind in ("weight", "bias")
    }
    assert not any(name.startswith("detector.backbone.") for name in moved)
    assert "detector.head.weight" in moved


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_lora_is_folded_into_the_layers_it_changed(options, tmp_path, ema):
    chosen = options(clip_lora=2, epochs=1, ema_decay=ema, clip_lr=0.1, vision_layer=-1)
    run = prepare(chosen)
    named = run.model.named_parameters()
    trained = {n.removeprefix("detector.") for n, p in named if p.requires_grad}
    factors = {n.split(".")[-3] for n in trained if group_of(n) == "clip_lora"}
    assert factors == {"lora_A", "lora_B"}
    assert not any(n.startswith("clip.") and "lora" not in n for n in trained)
    folder = train_detector(chosen)
    loaded = load_detector(str(folder))
    start = prepare(options(output=tmp_path / "other", vision_layer=-1)).model.detector
    changed = {
        name
        for name, tensor in loaded.clip.state_dict().items()
        if not torch.allclose(tensor, start.clip.state_dict()[name])
    }
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    assert all(name.endswith("weight") for name in changed)


def test_a_pair_shares_a_batch_and_an_identity(toy_data, options):
    run = prepare(options(pairs=True, batch_size=6))
    order, samples = run.dataset.order, run.dataset.store.samples.samples
    seen = []
    for epoch in range(2):
        run.sampler.start(epoch)
        for batch in run.sampler:
            assert len(batch) % 2 == 0
            shown = [samples[order[index].sample] for index in batch]
            assert [sample.label for sample in shown] == [0, 1] * (len(batch) // 2)
            for real, fake in zip(shown[::2], shown[1::2], strict=True):
                assert set(real.identities) & set(fake.identities)
            seen += [sample.name for sample in shown[1::2]]
    fakes = [sample.name for sample in samples if sample.label == 1]
    assert sorted(seen) == sorted(2 * fakes)
    assert seen[: len(fakes)] != seen[len(fakes) :]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("length", [6, 8, 14, 22])
def test_processes_never_part_a_pair(processes, length):
    samplers = [BatchSampler(length, 4, 2, processes, p, together=2) for p in range(processes)]
    batches = [batch for sampler in samplers for batch in sampler]
    assert sorted(index for batch in batches for index in batch) == list(range(length))
    assert all(len(batch) % 2 == 0 and batch[0] % 2 == 0 for batch in batches)


def test_a_fake_without_a_real_of_its_own_is_shown_with_any(toy_data):
    train, _ = read_sources_of(toy_data)
    lonely = train.samples[0].identities
    kept = train.subset(
        n for n, s in enumerate(train.samples) if s.label == 1 or s.identities != lonely
    )
    order = EpochOrder(kept, seed=0, pairs=True)
    shown = [kept.samples[order[n].sample] for n in range(len(order))]
    place = next(n for n, s in enumerate(shown) if s.label == 1 and s.identities == lonely)
    assert shown[place - 1].label == 0


def read_sources_of(folder, **changes):
    options = TrainDetectorOptions.from_flat({"data": str(folder), "output": "x", **changes})
    return read_sources(options.data)


def test_a_manipulation_is_held_out(toy_ffpp):
    train, held = read_sources_of(
        toy_ffpp, hold_out_manipulation="FaceSwap", manipulations=["Deepfakes", "FaceSwap"]
    )
    assert train.kinds() == ["Deepfakes"]
    assert held.kinds() == ["FaceSwap"]
    assert {s.label for s in held.samples} == {0, 1}
    assert not train.people() & held.people()
    with pytest.raises(InputError, match="forgeries are lacking"):
        read_sources_of(toy_ffpp, hold_out_manipulation="FaceShifter", manipulations=["Deepfakes"])


def test_a_logit_for_each_kind_learns_its_own(toy_ffpp, options):
    chosen = options(
        data=str(toy_ffpp), manipulations=["Deepfakes", "FaceSwap"], kind_logits=True, batch_size=8
    )
    run = prepare(chosen)
    detector = run.model.detector
    assert detector.config.kinds == ["Deepfakes", "FaceSwap"]
    run.model.train()
    batch = next(iter(run.loader))
    assert batch["kind"].shape == (8, 3)
    loss = run.model(**batch)["loss"]
    out = detector(batch["pixel_values"])
    wanted = batch["kind"][:, 1:]
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    both = torch.nn.functional.cross_entropy(out.logits, batch["labels"])
    assert loss.item() == pytest.approx((both + binary(out.kind_logits, wanted)).item(), rel=1e-4)


def test_the_recipe_trains_a_detector_of_clip_alone(toy_data, vision_folder, tmp_path):
    small = {"epochs": 1, "batch-size": 4, "clip": str(vision_folder), "clip-blocks": [1, 2]}
    options = TrainDetectorOptions.from_flat(
        {"recipe": "generalize", "data": str(toy_data), "output": str(tmp_path / "d"), **small}
    )
    folder = train_detector(options)
    detector = load_detector(str(folder))
    assert detector.backbone is None
    assert detector.clip.text is None
    assert detector.config.clip_blocks == [1, 2]
    with torch.no_grad():
        out = detector(torch.zeros(1, 3, TINY_SIDE, TINY_SIDE))
    assert torch.allclose(out.features.norm(dim=1), torch.ones(1), atol=1e-5)


def test_the_recipe_says_what_it_is_known_for():
    recipe = read_recipe("generalize")
    assert recipe["train"] == "norms"
    assert recipe["pairs"]
    assert recipe["head_normalize"]
    assert (recipe["alignment"], recipe["uniformity"]) == (0.1, 0.5)
    assert recipe["backbone"] == "none"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": True, "balance": True}, "exclude each other"),
        ({"pairs": True, "batch_size": 5}, "even --batch-size"),
        ({"clip_lora": 4, "train": "head"}, "does not go with --train head"),
    ],
)
def test_options_that_do_not_go_together(options, changes, words):
    with pytest.raises(ConfigError, match=words):
        options(**changes)


@pytest.mark.parametrize("head_hidden", [None, 16])
@pytest.mark.parametrize("kinds", [None, ["Deepfakes", "FaceSwap"]])
def test_a_fitted_head_separates_what_fixed_features_can(kinds, head_hidden, options):
    detector = prepare(options()).model.detector
    config = DetectorConfig.from_dict(
        {**detector.config.to_dict(), "kinds": kinds, "head_hidden": head_hidden}
    )
    detector = randomise(Detector(config), 3)
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(24) % 3
    pixels = 0.1 * torch.randn(24, 3, TINY_SIDE, TINY_SIDE, generator=generator)
    pixels += kind[:, None, None, None] * torch.tensor([1.0, -1.0, 0.5])[:, None, None]
    batches = [
        {
            "pixel_values": pixels[rows],
            "target": (kind[rows] > 0).float(),
            "kind": torch.eye(3)[kind[rows]],
        }
        for rows in torch.arange(24).split(7)
    ]
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    detector.train()
    held = [{"pixel_values": pixels, "labels": (kind > 0).long()}]
    assert fit_head(detector, batches, held) == min(RIDGES)
    moved = {n for n, t in detector.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"head.weight", "head.bias"}
    assert detector.training
    detector.eval()
    with torch.no_grad():
        out = detector(pixels)
    assert (out.logits.argmax(1) == (kind > 0)).all()
    if kinds:
        assert (out.kind_logits[kind > 0].argmax(1) == kind[kind > 0] - 1).all()


def test_a_head_that_other_pictures_contradict_stays_close_to_what_it_was(options):
    detector = prepare(options()).model.detector
    pixels = torch.randn(24, 3, TINY_SIDE, TINY_SIDE, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(24) % 2
    batches = [{"pixel_values": pixels, "target": labels.float()}]
    held = [{"pixel_values": pixels, "labels": 1 - labels}]
    assert fit_head(detector, batches, held) == max(RIDGES)


def test_a_trained_detector_is_tuned_gently_unless_a_recipe_is_named(tiny_detector_folder):
    start = {"data": "d", "output": "o", "model": str(tiny_detector_folder)}
    gentle = TrainDetectorOptions.from_flat(start)
    assert gentle.objective.fit_head
    assert gentle.optimizer.epochs < 20
    assert gentle.optimizer.early_stopping_patience
    assert TrainDetectorOptions.from_flat({**start, "epochs": 3}).optimizer.epochs == 3
    published = TrainDetectorOptions.from_flat({**start, "recipe": "published"})
    assert published.optimizer.epochs == 200


def test_the_time_is_told_before_the_first_step(options):
    told: list[str] = []
    steps: list[int] = []
    run = prepare(options(fit_head=True, epochs=1), notify=told.append)
    run.run(advance=lambda done, _: steps.append((done, len(told))))
    said = [line for line in told if "will take about" in line]
    assert len(said) == 1
    assert steps[0][1] > told.index(said[0])
    assert any("The head is fitted" in line for line in told)
