"""Annotations and crops become the published conversations and questions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f2cli.data.prepare import explanations
from m2f2cli.data.prepare.ddvqa import FILES, prepare_ddvqa
from m2f2cli.data.readers.ddvqa import Answer, read_annotations
from m2f2cli.errors import CheckpointError, InputError, UsageError
from m2f2cli.models.conversation import turns_of

REAL = {
    "0": {
        "question": "Does the image looks real/fake?",
        "answer": ["The image looks real. The person has smooth skin, oval eyes, full mouth."],
    },
    "1": {
        "question": "Do the person's eyes look real/fake?",
        "answer": ["The person's eyes look real. The person has naturally oval eyes."],
    },
}
FAKE = {
    "0": {
        "question": "Does the image looks real/fake?",
        "answer": [
            "The image looks fake. The person's skin looks a bit fake because there are "
            "stains/flaws on the person's face. The person's nose looks very fake because the "
            "nose is curved",
            "The image looks fake. The person's nose looks very fake because the nose is curved.",
        ],
    },
    "1": {
        "question": "Does the person's skin look real/fake?",
        "answer": [
            "The person's skin looks fake. The person's skin looks a bit fake because there are "
            "stains/flaws."
        ],
    },
}
PUBLISHED = os.environ.get("M2F2_DDVQA")


def write(root, part, folder, annotations):
    place = root / "annotations" / part / folder
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{folder}.json").write_text(json.dumps(annotations))


def crop(root, part, stem):
    place = root / "images" / "c40" / part
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), len(stem), np.uint8)).save(place / f"{stem}.jpg")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "ddvqa"
    for part, numbers in (("train", ("001", "002")), ("test", ("003", "004"))):
        first, second = numbers
        write(root, part, "Original", {f"5_{first}": REAL, f"5_{second}": REAL})
        write(root, part, "Deepfakes", {f"0_{first}_{second}": FAKE})
        write(root, part, "FaceShifter", {f"2_{first}_{second}": FAKE})
        for stem in (f"5_{first}", f"5_{second}", f"0_{first}_{second}"):
            crop(root, part, stem)
    return root


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_answer_gives_a_judgement_and_two_explanations(root, tmp_path):
    out = tmp_path / "out"
    report = prepare_ddvqa(root, out)
    assert list(report.rows.values()) == [7, 14, 7, 3]
    judge = json.loads((out / FILES[0]).read_text())
    assert Counter(row["image"] for row in judge) == {"5_001.jpg": 2, "5_002.jpg": 2,
                                                      "0_001_002.jpg": 3}  # fmt: skip
    fake = next(row for row in judge if row["image"].startswith("0"))
    crop_file = root / "images" / "c40" / "train" / "0_001_002.jpg"
    assert fake == {
        "id": "001_002",
        "image": "0_001_002.jpg",
        "sha256": hashlib.sha256(crop_file.read_bytes()).hexdigest(),
        "conversations": [
            {"from": "human", "value": "<image>\n<deepfake>\nDo the image looks real or fake?"},
            {"from": "gpt", "value": "The image looks fake."},
        ],
    }
    explain = json.loads((out / FILES[1]).read_text())
    said = {tuple(turn["value"] for turn in row["conversations"]) for row in explain}
    seen = "There are stains or flaws on the person's face. the nose is curved."
    judged = "Based on the learned representation, this image is fake."
    describe = "<image>\n<deepfake>\nDescribe the authenticity of the image based on face, nose."
    assert (describe + " Is the image real or fake?", f"{seen} {judged}") in said
    assert (describe, seen, "Is the image real or fake?", judged) in said
    region = "<image>\n<deepfake>\nDescribe the authenticity of the image based on skin."
    assert (region, "There are stains or flaws.", "Is the image real or fake?", judged) in said
    assert Counter(len(row["conversations"]) for row in explain) == {2: 7, 4: 7}
    for row in judge + explain:
        assert len(turns_of(row["conversations"])) == len(row["conversations"]) // 2


def test_questions_and_truth_of_the_test_part(root, tmp_path):
    prepare_ddvqa(root, tmp_path / "out")
    questions = {k: v for row in lines(tmp_path / "out" / FILES[2]) for k, v in row.items()}
    assert list(questions)[:3] == ["0_003_004_0", "0_003_004_1", "0_003_004_2"]
    assert questions["0_003_004_0"]["question"] == (
        "This image is fake. Describe the authenticity of the image based on face, nose."
    )
    # One region alone: asked about like that region.
    assert questions["0_003_004_1"]["question"].startswith("The nose in the image is fake,")
    assert questions["5_003_0"]["question"] == (
        "This image is real. Describe the authenticity of the image based on mouth, skin, eyes."
    )
    assert questions["5_003_1"]["answer"] == ["The person has naturally oval eyes."]
    assert lines(tmp_path / "out" / FILES[3])[0] | {"sha256": ""} == {
        "name": "0_003_004.jpg",
        "label": "fake",
        "kind": "Deepfakes",
        "video": "0_003_004",
        "sha256": "",
    }


def test_what_has_no_crop_is_counted(root, tmp_path):
    crop(root, "train", "5_999")
    broken = root / "images" / "c40" / "train" / "5_002.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    report = prepare_ddvqa(root, tmp_path / "out")
    by_kind = {(one.part, one.kind): one for one in report.counts}
    shifter, real = by_kind["train", "FaceShifter"], by_kind["train", "real"]
    assert (shifter.annotated, shifter.pictures, shifter.no_crop) == (1, 0, 1)
    assert (real.annotated, real.pictures, real.no_crop, real.unreadable) == (2, 1, 0, 1)
    assert list(report.unreadable) == ["5_002.jpg"]
    assert report.unannotated == ["train/5_999.jpg"]
    assert not any(
        "2_" in row["image"] for row in json.loads((tmp_path / "out" / FILES[0]).read_text())
    )


def test_the_seed_decides_the_order_alone(root, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_ddvqa(root, tmp_path / name, seed=seed)
    read = {name: [(tmp_path / name / f).read_bytes() for f in FILES] for name in "abc"}
    assert read["a"] == read["b"] != read["c"]
    assert read["a"][2:] == read["c"][2:]
    rows = [sorted(map(str, json.loads(read[name][1]))) for name in "ac"]
    assert rows[0] == rows[1]


def test_files_that_differ_are_not_replaced_unasked(root, tmp_path):
    out = tmp_path / "out"
    prepare_ddvqa(root, out)
    prepare_ddvqa(root, out)
    before = (out / FILES[0]).read_bytes()
    with pytest.raises(UsageError, match="is there already and differs"):
        prepare_ddvqa(root, out, seed=1)
    assert (out / FILES[0]).read_bytes() == before
    prepare_ddvqa(root, out, seed=1, overwrite=True)
    assert (out / FILES[0]).read_bytes() != before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        prepare_ddvqa(root, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        '{"5_001": ',
        '{"5_001": 3}',
        '{"holiday": {}}',
        '{"5_001": {"0": {"question": "Does the image looks real/fake?"}}}',
        '{"5_001": {"0": {"question": "Who is it?", "answer": []}}}',
        '{"5_001": {"0": {"question": "Does the image looks real/fake?", "answer": "real"}}}',
        '{"5_001": {"0": {"question": "Does the image looks real/fake?", "answer": [7]}}}',
        '{"5_001": {"0": {"question": "Does the image looks real/fake?", "answer": ["Hm."]}}}',
        '{"5_001": {"0": {"question": "Does the image looks real/fake?",'
        ' "answer": ["The image looks fake."]}}}',
    ],
)
def test_malformed_annotations_are_one_sentence(root, tmp_path, content):
    file = root / "annotations" / "train" / "Original" / "Original.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"Original\.json' is not a DD-VQA annotation file"):
        prepare_ddvqa(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_annotated_twice_is_refused(root, tmp_path):
    write(root, "train", "Again", {"5_001": REAL})
    with pytest.raises(InputError, match="'5_001' is annotated twice"):
        read_annotations(root / "annotations" / "train")


def test_missing_parts_are_named(root, tmp_path):
    shutil.rmtree(root / "images" / "c40" / "test")
    with pytest.raises(InputError, match=r"no folder of crops '.*c40/test'"):
        prepare_ddvqa(root, tmp_path / "out")
    (root / "images" / "c40" / "test").mkdir()
    with pytest.raises(InputError, match="No annotated picture has a crop"):
        prepare_ddvqa(root, tmp_path / "out")
    shutil.rmtree(root / "annotations" / "test")
    with pytest.raises(InputError, match="no annotation files"):
        prepare_ddvqa(root, tmp_path / "out")


def test_an_answer_that_names_nothing_is_asked_about_the_image():
    answer = Answer(None, "The image looks fake. It looks odd")
    one, two = explanations.explain_turns(answer, "fake")
    assert one[0]["value"].endswith(
        "Describe the authenticity of the image. Is the image real or fake?"
    )
    assert two[1]["value"] == "It looks odd."


@pytest.mark.skipif(PUBLISHED is None, reason="M2F2_DDVQA is not set")
def test_the_published_files_are_reproduced(tmp_path):
    root = Path(str(PUBLISHED))
    report = prepare_ddvqa(root, tmp_path)
    assert list(report.rows.values()) == [9252, 18504, 1070, 144]

    def rows(path):
        return Counter(
            json.dumps({k: v for k, v in row.items() if k != "sha256"}, sort_keys=True)
            for row in json.loads(path.read_text())
        )

    assert rows(tmp_path / FILES[0]) == rows(root / "reference" / FILES[0])
    ours, published = (
        {k: v for row in lines(path) for k, v in row.items()}
        for path in (tmp_path / FILES[2], root / "reference" / FILES[2])
    )
    assert ours.keys() == published.keys()
    assert all(ours[k]["question"] == published[k]["question"] for k in ours)
    # In the published text this answer has lost its first reason.
    differ = [k for k in ours if ours[k]["answer"] != published[k]["answer"]]
    assert differ == ["1_314_347_1"]
