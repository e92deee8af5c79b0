from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from m2f2cli.data.readers.ddvqa import FLAWS, REGIONS, read_judgements
from m2f2cli.data.samples import read_samples, split_by_identity
from m2f2cli.errors import InputError

CROPS = ("0_005_010.jpg", "3_005_010.jpg", "5_005.jpg", "5_010.jpg", "6_020_021.jpg", "5_020.jpg")


def crops(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in CROPS:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize("inner", ["", "images/c40/train"])
@pytest.mark.parametrize("prefix", ["", "ddvqa:"])
def test_crops_are_recognized(tmp_path, inner, prefix):
    crops(tmp_path / "set" / inner)
    found = read_samples(f"{prefix}{tmp_path / 'set'}")
    assert found.layout == "ddvqa"
    assert found.counts() == {
        "Deepfakes": 1, "FaceSwap": 1, "NeuralTextures": 1, "real": 3, "identities": 4,
    }  # fmt: skip
    by_name = {s.name: s for s in found.samples}
    assert by_name["0_005_010.jpg"].identities == ("005", "010")
    assert by_name["5_020.jpg"].label == 0


def test_both_identities_of_a_swap_stay_together(tmp_path):
    found = read_samples(crops(tmp_path / "set"))
    train, held = split_by_identity(found, 0.4, 0)
    assert sorted(len(part.people()) for part in (train, held)) == [2, 2]


def test_a_foreign_name_is_an_error(tmp_path):
    folder = crops(tmp_path / "set")
    (folder / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"holiday\.jpg' is not named like a DD-VQA crop"):
        read_samples(f"ddvqa:{folder}")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no DD-VQA crops"):
        read_samples(f"ddvqa:{tmp_path / 'none'}")


def test_judgements_of_regions_and_flaws(tmp_path):
    (tmp_path / "Deepfakes").mkdir()
    annotations = {
        "0_005_010": {
            "0": {
                "question": "Does the image looks real/fake?",
                "answer": [
                    "The image looks fake. The person's nose looks a bit fake and curved.",
                    "The person's eyes look very fake: they are asymmetric.",
                ],
            },
            "1": {
                "question": "Does the person's skin look real/fake?",
                "answer": ["The person's skin looks fake. There is a blurry boundary."],
            },
            "2": {"question": "...", "answer": ["The person's eyes look fake."]},
        }
    }
    (tmp_path / "Deepfakes" / "x.json").write_text(json.dumps(annotations))
    found = read_judgements(tmp_path, ["0_005_010", "5_001"])
    assert list(found) == ["0_005_010"]
    values = dict(zip([*REGIONS, *FLAWS], found["0_005_010"].tolist(), strict=True))
    assert {name for name, value in values.items() if value == 1} == {
        "skin", "eyes", "boundary", "blur", "asymmetry", "curvature",
    }  # fmt: skip
    assert values["nose"] == 0.5
    assert values["mouth"] == values["smoothness"] == 0
    assert found["0_005_010"].dtype == np.float32


def test_broken_annotations_are_named(tmp_path):
    with pytest.raises(InputError, match="no annotation files"):
        read_judgements(tmp_path, ["0_005_010"])
    (tmp_path / "a.json").write_text('{"0_005_010": {"0": {"question": "?"}}}')
    with pytest.raises(InputError, match=r"a\.json' is not a DD-VQA annotation file"):
        read_judgements(tmp_path, ["0_005_010"])


@pytest.mark.skipif(not os.environ.get("M2F2_DDVQA"), reason="M2F2_DDVQA is not set")
def test_the_real_data_set():
    root = Path(os.environ["M2F2_DDVQA"])
    train = read_samples(root)
    test = read_samples(root / "images" / "c40" / "test")
    assert (len(train), int((train.labels() == 0).sum())) == (1339, 455)
    assert (len(test), int((test.labels() == 0).sum())) == (144, 72)
    assert (train.counts()["identities"], test.counts()["identities"]) == (711, 121)
    assert not train.people() & test.people()
    kept, held = split_by_identity(train, 0.15, 0)
    assert not kept.people() & held.people()
    assert 0.13 < len(held) / len(train) < 0.17
