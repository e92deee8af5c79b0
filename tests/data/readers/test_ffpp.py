"""FaceForensics++ as HDF5 files: official splits, names, and what is said when something lacks."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from m2f2cli.data.clips import ClipWriter
from m2f2cli.data.readers.ffpp import (
    KNOWN,
    MANIPULATIONS,
    ORIGINAL,
    file_name,
    find_file,
    looks_like_ffpp,
    read_ffpp,
    read_split,
)
from m2f2cli.errors import ConfigError, InputError

PAIRS = {"train": [["000", "003"]], "val": [["010", "012"]], "test": [["020", "021"]]}


def fill(path, keys, frames=4):
    writer = ClipWriter(path)
    for key in keys:
        writer.write(key, np.full((frames, 6, 5, 3), int(key[-2:]), np.uint8))
    writer.finish()


def kinds_of(found):
    return dict(Counter(clip.kind for clip in found.samples))


def people_of(found):
    return {person for clip in found.samples for person in clip.identities}


@pytest.fixture
def root(tmp_path):
    for name in (ORIGINAL, *MANIPULATIONS):
        keys = [
            key
            for ((first, second),) in PAIRS.values()
            for key in (
                (first, second) if name == ORIGINAL else (f"{first}_{second}", f"{second}_{first}")
            )
        ]
        fill(tmp_path / file_name(name, "c40"), keys)
    (tmp_path / "splits").mkdir()
    for split, pairs in PAIRS.items():
        (tmp_path / "splits" / f"{split}.json").write_text(json.dumps(pairs))
    return tmp_path


def test_a_split_has_its_originals_and_both_directions(root):
    found = read_ffpp(root, compression="c40")
    assert kinds_of(found) == {"real": 2, **dict.fromkeys(MANIPULATIONS, 2)}
    assert [clip.clip for clip in found.samples[:4]] == ["000", "003", "000_003", "003_000"]
    assert [clip.label for clip in found.samples[:4]] == [0, 0, 1, 1]
    assert found.samples[1].identities == ("003",)
    assert found.samples[3].identities == ("003", "000")
    assert people_of(found) == {"000", "003"}
    assert {clip.frames for clip in found.samples} == {4}
    names = [clip.frame_name(index) for clip in found.samples for index in clip.spread()]
    assert len(set(names)) == len(names) == 10 * 4
    assert found.samples[2].frame_name(3) == "Deepfakes/000_003/3"


def test_official_splits_share_no_identity(root):
    people = [people_of(read_ffpp(root, compression="c40", split=s)) for s in ("train", "val")]
    assert not set.intersection(*people)
    assert read_ffpp(root, compression="c40", split="val").split == "validation"
    assert len(people_of(read_ffpp(root, compression="c40", split="all"))) == 6


def test_manipulations_are_chosen(root):
    found = read_ffpp(root, compression="c40", manipulations=["FaceSwap"], split="test")
    assert kinds_of(found) == {"real": 2, "FaceSwap": 2}
    with pytest.raises(InputError, match=r"no file 'FF\+\+_FaceShifter_c40\.h5'") as error:
        read_ffpp(root, compression="c40", manipulations=["FaceShifter"])
    assert "FF++_FaceSwap_c40.h5" in error.value.hint
    assert set(MANIPULATIONS) < set(KNOWN)


def test_files_with_only_the_test_videos_serve_the_test_split(root):
    whole = root / file_name(ORIGINAL, "c40")
    whole.rename(root / file_name(ORIGINAL, "c40", test_only=True))
    found = read_ffpp(root, compression="c40", split="test")
    assert found.samples[0].path.name == "FF++_original_c40_test_only.h5"
    with pytest.raises(InputError, match=r"no file 'FF\+\+_original_c40\.h5'"):
        read_ffpp(root, compression="c40", split="train")
    assert find_file(root, "FaceSwap", "c40", split="test").name == "FF++_FaceSwap_c40.h5"


def test_what_is_missing_is_named(root, tmp_path):
    fill(root / file_name(ORIGINAL, "c23"), ["000"])
    with pytest.raises(InputError, match=r"1 videos .* FF\+\+_original_c23\.h5: 003"):
        read_ffpp(root, compression="c23", manipulations=[])
    lenient = read_ffpp(root, compression="c23", manipulations=[], allow_missing=True)
    assert [clip.clip for clip in lenient.samples] == ["000"]
    assert lenient.missing == ("FF++_original_c23.h5: 003",)
    with pytest.raises(InputError, match=r"no split file '.*elsewhere/train\.json'"):
        read_ffpp(root, compression="c40", splits=tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no data folder"):
        read_ffpp(root / "nowhere")
    for wrong in (
        {"compression": "c99"},
        {"manipulations": ["Deepfake"]},
        {"split": "dev"},
    ):
        with pytest.raises(ConfigError, match="There is no"):
            read_ffpp(root, **wrong)


def test_splits_are_found_beside_the_files(root):
    for file in (root / "splits").iterdir():
        file.rename(root / file.name)
    (root / "splits").rmdir()
    assert len(read_ffpp(root, compression="c40")) == 10
    assert looks_like_ffpp(root)
    assert not looks_like_ffpp(root.parent)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '[["000"]]', "[[0, 3]]", '[["000", "3"]]', '["000", "003"]', "\xff"]
)
def test_a_malformed_split_is_one_sentence(tmp_path, text):
    (tmp_path / "train.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"train\.json"):
        read_split(tmp_path, "train")


def test_frames_are_spread_evenly(root):
    clip = read_ffpp(root, compression="c40").samples[0]
    assert clip.spread(2) == [1, 3]
    assert clip.spread(100) == [0, 1, 2, 3]
    with pytest.raises(ConfigError):
        clip.spread(0)
