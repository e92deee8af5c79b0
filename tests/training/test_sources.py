from __future__ import annotations

import shutil

import h5py
import numpy as np
import pytest
from PIL import Image

from m2f2cli.errors import ConfigError, InputError
from m2f2cli.options import training_data as data_options
from m2f2cli.options.training_data import DataOptions
from m2f2cli.training.sources import is_ffpp, read_sources
from tests.training.conftest import TOY_KINDS, TOY_SPLITS

OFFICIAL = {name: {n for pair in rows for n in pair} for name, rows in TOY_SPLITS.items()}


def options(*sources, **changes) -> DataOptions:
    given = {"data": tuple(str(source) for source in sources), "manipulations": TOY_KINDS}
    return DataOptions(**(given | changes))


@pytest.fixture
def crops(tmp_path):
    """Pictures named as those of DD-VQA: of the official train, of validation, and of others."""
    folder = tmp_path / "crops"
    folder.mkdir()
    names = ["5_000", "0_000_001", "5_006", "3_006_007"]
    names += [f"5_{n}" for n in range(100, 120)] + [f"0_{n}_{n}" for n in range(100, 120)]
    for name in names:
        Image.new("RGB", (40, 40)).save(folder / f"{name}.png")
    return folder


def test_the_words_for_ffpp_are_those_of_its_reader():
    from m2f2cli.data.readers import ffpp

    assert data_options.COMPRESSIONS == ffpp.COMPRESSIONS
    assert data_options.MANIPULATIONS == ffpp.MANIPULATIONS
    assert DataOptions(("x",), manipulations=ffpp.KNOWN).manipulations == ffpp.KNOWN


def test_official_splits_decide_who_is_where(toy_ffpp):
    for source in (f"ffpp:{toy_ffpp}", toy_ffpp):  # named, or recognised
        assert is_ffpp(str(source))
        train, held = read_sources(options(source))
        assert train.people() == OFFICIAL["train"]
        assert held.people() == OFFICIAL["val"]
        assert train.counts() == {"Deepfakes": 6, "FaceSwap": 6, "identities": 6, "real": 6}
        assert held.counts() == {"Deepfakes": 4, "FaceSwap": 4, "identities": 4, "real": 4}
    first = train.samples[0]
    assert (first.name, first.clip, first.frames) == ("Deepfakes/000_001", "000_001", 5)
    fewer, _ = read_sources(options(toy_ffpp, manipulations=("FaceSwap",)))
    assert fewer.kinds() == ["FaceSwap"]


def test_fingerprint_tells_videos_apart(toy_ffpp, tmp_path):
    train, held = read_sources(options(toy_ffpp))
    assert train.fingerprint() == read_sources(options(toy_ffpp))[0].fingerprint()
    assert train.fingerprint() != held.fingerprint()
    copy = shutil.copytree(toy_ffpp, tmp_path / "copy")
    assert train.fingerprint() == read_sources(options(copy))[0].fingerprint()
    with h5py.File(copy / "FF++_original_c23.h5", "a") as file:
        del file["000"]
        file["000"] = np.zeros((4, 40, 40, 3), dtype=np.uint8)
    assert train.fingerprint() != read_sources(options(copy))[0].fingerprint()


def test_mixed_sources_put_nobody_on_both_sides(toy_ffpp, toy_data, crops):
    train, held = read_sources(options(f"ffpp:{toy_ffpp}", toy_data, f"ddvqa:{crops}"))
    assert not train.people() & held.people()
    names = {side: {s.name for s in part.samples} for side, part in (("t", train), ("h", held))}
    assert {"crops-2/5_000.png", "crops-2/0_000_001.png", "crops/real/000"} <= names["t"]
    assert {"crops-2/5_006.png", "crops-2/3_006_007.png", "crops/real/006"} <= names["h"]
    loose = [s for s in held.samples if s.clip is None and not set(s.identities) & OFFICIAL["val"]]
    assert {s.name.split("/")[0] for s in loose} == {toy_data.name, "crops-2"}
    assert len(train) + len(held) == 18 + 12 + 24 + 44
    assert train.layout == "mixed"
    assert [s.name for s in train.samples] == sorted(names["t"])


def test_an_earlier_single_folder_is_cut_as_before(toy_data):
    from m2f2cli.data.samples import read_samples, split_by_identity

    given = options(toy_data, validation_share=0.25, split_seed=3)
    assert read_sources(given) == split_by_identity(read_samples(toy_data), 0.25, 3)


def test_another_validation_replaces_the_official_one(toy_ffpp, toy_data):
    train, held = read_sources(options(toy_ffpp, validation=(str(toy_data),)))
    assert train.people() == OFFICIAL["train"]
    assert len(held) == 24
    train, held = read_sources(options(toy_data, validation=(f"ffpp:{toy_ffpp}",)))
    assert (len(train), held.people()) == (24, OFFICIAL["val"])


def test_a_chain_from_train_to_validation_is_refused(toy_ffpp, crops):
    Image.new("RGB", (40, 40)).save(crops / "0_000_006.png")
    with pytest.raises(InputError, match=r"join '000', .* with '006'"):
        read_sources(options(toy_ffpp, crops))


def test_people_of_mixed_folders_from_a_file(toy_ffpp, toy_data, tmp_path):
    rows = [
        f"{toy_data.name}/{word}/p{n:02d}.png,{'006' if n < 3 else f'q{n}'}"
        for word in ("real", "fake")
        for n in range(12)
    ]
    (tmp_path / "who.csv").write_text("\n".join(rows))
    given = options(toy_ffpp, toy_data, identities=tmp_path / "who.csv")
    _, held = read_sources(given)
    assert sum(s.identities == ("006",) and s.clip is None for s in held.samples) == 6


def test_limit_draws_some_of_each_class_by_seed(toy_ffpp):
    given = options(toy_ffpp, limit=2)
    train, held = read_sources(given, seed=0)
    assert [part.labels().tolist().count(1) for part in (train, held)] == [2, 2]
    assert [len(part) for part in (train, held)] == [4, 4]
    assert read_sources(given, seed=0) == (train, held)
    assert any(read_sources(given, seed=seed)[0] != train for seed in range(1, 5))
    assert len(read_sources(options(toy_ffpp, limit=99))[0]) == 18


def broken(root, change):
    file = root / "FF++_FaceSwap_c23.h5"
    if change == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    elif change == "text":
        file.write_text("no HDF5")
    elif change == "file":
        file.unlink()
    elif change == "split":
        (root / "splits" / "val.json").unlink()
    else:
        with h5py.File(file, "a") as content:
            del content["002_003"]
            if change == "dtype":
                content["002_003"] = np.zeros((5, 40, 40, 3), dtype=np.float32)
            elif change == "shape":
                content["002_003"] = np.zeros((5, 40, 40), dtype=np.uint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("truncated", r"FF\+\+_FaceSwap_c23\.h5' is not a readable HDF5 file"),
        ("text", r"FF\+\+_FaceSwap_c23\.h5' is not a readable HDF5 file"),
        ("file", r"no file 'FF\+\+_FaceSwap_c23\.h5'"),
        ("split", r"no split file '.*val\.json'"),
        ("key", r"FF\+\+_FaceSwap_c23\.h5: 002_003"),
        ("dtype", r"'002_003' in .* float32 .* uint8"),
        ("shape", r"'002_003' in .* shape"),
    ],
)
def test_faults_are_named(toy_ffpp, tmp_path, change, words):
    root = shutil.copytree(toy_ffpp, tmp_path / "broken")
    broken(root, change)
    with pytest.raises(InputError, match=words):
        read_sources(options(root))


def test_missing_videos_may_be_passed_over(toy_ffpp, tmp_path):
    root = shutil.copytree(toy_ffpp, tmp_path / "broken")
    broken(root, "key")
    told: list[str] = []
    train, _ = read_sources(options(root, unreadable="skip"), notify=told.append)
    assert told == ["FF++_FaceSwap_c23.h5: 002_003"]
    assert len(train) == 17


def test_an_unknown_layout_is_told_all_that_there_are(toy_ffpp):
    with pytest.raises(ConfigError, match="no data layout 'ffp'") as refused:
        read_sources(options(f"ffp:{toy_ffpp}"))
    assert refused.value.hint == "Use one of: folder, ddvqa, ffpp."


def test_videos_are_to_be_cropped_first(tmp_path, toy_data):
    for word in ("real", "fake"):
        (tmp_path / "clips" / word).mkdir(parents=True)
        (tmp_path / "clips" / word / "a.mp4").touch()
    with pytest.raises(InputError, match="learns from crops of faces") as refused:
        read_sources(options(tmp_path / "clips"))
    assert "m2f2 prepare faces" in refused.value.hint
    mixed = shutil.copytree(toy_data, tmp_path / "mixed")
    (mixed / "real" / "a.mp4").touch()
    named: list[str] = []
    train, held = read_sources(options(mixed), notify=named.append)
    assert "real/a.mp4" in named
    assert not any(sample.is_video for part in (train, held) for sample in part.samples)


def test_a_source_is_named_once(toy_data):
    with pytest.raises(ConfigError, match="twice"):
        options(toy_data, toy_data)
