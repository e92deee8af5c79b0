from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f2cli.data.samples import read_samples
from m2f2cli.data.transforms import preprocess
from m2f2cli.errors import InputError
from m2f2cli.models.detector import DetectorConfig
from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.training.pictures import (
    PictureCollator,
    PictureStore,
    Targets,
    TrainingPictures,
    ValidationPictures,
)
from m2f2cli.training.sampler import BatchSampler

PLAIN = {"flip": 0.0, "blur": 0.0, "jpeg": 0.0}
HALF = (0.5, 0.5, 0.5)
CONFIG = DetectorConfig(image_size=32, image_mean=HALF, image_std=HALF)


def training(store, targets=None, **changes) -> TrainingPictures:
    """Training pictures with some options changed."""
    flat = {"data": "faces", "output": "detector", "seed": 3} | changes
    options = TrainDetectorOptions.from_flat(flat)
    return TrainingPictures(store, options, CONFIG, targets or Targets())


@pytest.fixture(scope="module")
def store(toy_data) -> PictureStore:
    return PictureStore(read_samples(toy_data), "auto", skip=False)


def order(pictures: TrainingPictures, epoch: int) -> list[int]:
    start = epoch * len(pictures)
    return [pictures.order[start + position].sample for position in range(len(pictures))]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_items_hang_on_seed_epoch_and_position_only(store):
    changes = {"self_blend": 0.5, "swap_blend": 0.5, "targets": Targets(grid=4)}
    pictures = training(store, **changes)
    again = training(store, **changes)
    numbers = [0, 30, 5, 47, 5]
    wanted = [pictures[n] for n in numbers]
    assert all(same(a, b) for a, b in zip(wanted, (again[n] for n in numbers), strict=True))
    assert same(wanted[2], wanted[4])
    assert not same(pictures[5], pictures[5 + len(pictures)])
    other = training(store, **changes, balance=True)
    assert len(other) == len(pictures) == 24
    reseeded = training(store, seed=4, **changes)
    assert not same(reseeded[5], pictures[5])


def test_an_epoch_shows_every_picture_once(store):
    pictures = training(store, **PLAIN)
    for epoch in (0, 3):
        assert sorted(order(pictures, epoch)) == list(range(24))
    orders = [tuple(order(pictures, epoch)) for epoch in range(3)]
    assert len(set(orders)) == 3


def test_balanced_epochs_take_turns_and_miss_nobody(store):
    fewer = PictureStore(store.samples.subset([*range(12), 12, 13, 14]), "auto", skip=False)
    pictures = training(fewer, balance=True)
    assert len(pictures) == 24
    labels = [int(pictures[n]["labels"]) for n in range(24, 48)]
    assert labels == [0, 1] * 12
    assert set(order(pictures, 1)) == set(range(15))


def test_without_changes_an_item_is_what_detect_would_see(store):
    pictures = training(store, **PLAIN)
    number = int(order(pictures, 0)[7])
    seen = preprocess(store.read(number), size=32, mean=HALF, std=HALF)
    assert np.array_equal(pictures[7]["pixel_values"], seen)
    measured = ValidationPictures(store, 0, CONFIG)[number]
    assert np.array_equal(measured["pixel_values"], seen)
    assert measured["labels"] == pictures[7]["labels"]


def test_pseudo_fakes_replace_forged_pictures_only(store):
    pseudo = {"self_blend": 0.4, "swap_blend": 0.3, "expression_warp": 0.3}
    told = PLAIN | {"targets": Targets(grid=4, kinds=("fake",))}
    pictures = training(store, **pseudo, **told)
    for position in range(24):
        item = pictures[position]
        assert item["map_known"] == 1
        if item["labels"] == 0:
            assert item["map"].max() == 0
            assert item["kind"].tolist() == [1, 0]
        else:
            assert 0 < item["map"].max() <= 1
            assert item["kind"].tolist() == [0, 0]
            assert item["target"] == 1
    plain = training(store, **told)
    forged = next(item for item in map(plain.__getitem__, range(24)) if item["labels"] == 1)
    assert forged["map_known"] == 0
    assert forged["kind"].tolist() == [0, 1]


def test_h264_changes_pseudo_fakes(store):
    plain = training(store, **PLAIN, self_blend=1.0)
    coded = training(store, **PLAIN, self_blend=1.0, pseudo_h264=1.0, pseudo_crf=(45, 45))
    for position in range(4):
        a, b = plain[position], coded[position]
        equal = np.array_equal(a["pixel_values"], b["pixel_values"])
        assert equal == (a["labels"] == 0)


def test_map_follows_the_flip(store):
    def maps(flip):
        changes = PLAIN | {"flip": flip, "mouth_warp": 1.0}
        pictures = training(store, Targets(grid=4), **changes)
        return [pictures[n]["map"] for n in range(24)]

    for straight, mirrored in zip(maps(0.0), maps(1.0), strict=True):
        assert np.allclose(straight[:, ::-1], mirrored, atol=0.02)


def test_soft_labels_and_judgements(store):
    forged, real = store.samples.samples[0], store.samples.samples[12]
    judged = {forged.name: np.array([1.0, 0.5], dtype=np.float32)}
    soft = {forged.name: 0.6, real.name: 0.2}
    targets = Targets(soft=soft, judgements=judged)
    pictures = training(store, targets, **PLAIN, soft_weight=0.5)
    place = {int(number): position for position, number in enumerate(order(pictures, 0))}
    items = [pictures[place[number]] for number in (0, 12, 1)]
    assert [round(float(item["target"]), 5) for item in items] == [0.8, 0.1, 1.0]
    assert [float(item["judgement_known"]) for item in items] == [1, 0, 0]
    assert items[0]["judgement"].tolist() == [1.0, 0.5]


@given(st.floats(0.05, 4.0), st.integers(2, 9), st.integers(0, 10**9))
@settings(max_examples=30)
def test_mixup_is_linear_and_keeps_labels(alpha, count, index):
    rng = np.random.default_rng(0)
    items = [
        {
            "index": np.array(index + n),
            "labels": np.array(n % 2),
            "target": np.array(n % 2, dtype=np.float32),
            "pixel_values": np.full((3, 2, 2), n % 2, dtype=np.float32),
            "noise": rng.random(3).astype(np.float32),
        }
        for n in range(count)
    ]
    sampler = BatchSampler(10**9 + 20, 9)
    plain, mixed = (
        PictureCollator(0.0, 1, sampler)(items),
        PictureCollator(alpha, 1, sampler)(items),
    )
    assert "index" not in plain
    assert torch.equal(plain["labels"], mixed["labels"])
    assert torch.allclose(mixed["pixel_values"][:, 0, 0, 0], mixed["target"], atol=1e-6)
    assert torch.allclose(mixed["noise"].sum(0), plain["noise"].sum(0), atol=1e-4)
    assert (mixed["target"] - plain["target"]).abs().max() <= 0.5 + 1e-6
    assert all(
        torch.equal(mixed[key], value)
        for key, value in PictureCollator(alpha, 1, sampler)(items).items()
    )


def test_sampler_counts_through_the_epochs():
    sampler = BatchSampler(4, 3)
    assert list(sampler) == [[0, 1, 2], [3]]
    sampler.start(2)
    assert list(sampler) == [[8, 9, 10], [11]]


@pytest.mark.parametrize("cache", ["auto", "never", "always"])
def test_unreadable_pictures_are_named_or_left_out(toy_data, tmp_path, cache):
    import shutil

    root = shutil.copytree(toy_data, tmp_path / "data")
    (root / "fake" / "p03.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    samples = read_samples(root)
    with pytest.raises(InputError, match=r"1 of 24 pictures cannot be read, .*fake/p03\.png"):
        PictureStore(samples, cache, skip=False)
    store = PictureStore(samples, cache, skip=True)
    assert store.skipped == ["fake/p03.png"]
    assert len(store.samples) == 23
    assert np.array_equal(
        store.read(3), PictureStore(read_samples(toy_data), cache, skip=False).read(4)
    )


def test_nothing_readable_left_of_a_class(toy_data, tmp_path):
    import shutil

    root = shutil.copytree(toy_data, tmp_path / "data")
    for picture in (root / "real").iterdir():
        picture.write_bytes(b"text")
    with pytest.raises(InputError, match="no real pictures"):
        PictureStore(read_samples(root), "auto", skip=True)
