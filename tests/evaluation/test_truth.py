"""Truth: from files, from annotations, and from names only when asked; joined with answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.predictions import Prediction, Predictions, read_predictions
from m2f2cli.evaluation.truth import (
    Item,
    Truth,
    ddvqa_truth,
    file_truth,
    fingerprint,
    frames_truth,
    join,
)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(*rows, layout="judgements"):
    return Predictions(Path("answers.jsonl"), layout, tuple(rows))


def said(name, text):
    return Prediction(name, answer=text)


QUESTIONS = (
    {"5_012_0": {"question": "This image is real. Why?", "answer": ["Fine.", "Good."]}},
    {"5_012_1": {"question": "The nose in the image is real, tell me why.", "answer": ["A nose."]}},
    {"0_005_010_0": {"question": "This image is fake. Why?", "answer": ["Blurry."]}},
)


def test_labels_in_every_spelling(tmp_path):
    file = lines(
        tmp_path / "t.jsonl",
        {"image": "a.jpg", "label": "Real"},
        {"path": "v/1.jpg", "label": 1, "kind": "FaceSwap", "video": "v"},
        {"name": "b.jpg", "label": "fake"},
        {"name": "b.jpg", "label": 1},
    )
    first, second, third = file_truth(file).items
    assert (first.label, first.kind, first.group) == (0, "real", "a.jpg")
    assert (second.label, second.kind, second.group) == (1, "FaceSwap", "v")
    assert (third.label, third.kind) == (1, "fake")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, "names no picture"),
        ({"image": "x"}, "None for 'label'"),
        ({"image": "x", "label": 2}, "2 for 'label'"),
        ({"image": "x", "label": True}, "True for 'label'"),
        ({"image": "x", "label": 0, "kind": "FaceSwap"}, "kind 'FaceSwap' and the label 0"),
        ({"image": "a.jpg", "label": 1}, "something else of 'a.jpg'"),
        ({"image": 7, "label": 1}, "7 for 'image'"),
        ({"k": {"question": "q", "answer": []}}, "no reference answer"),
        ({"k": {"question": "q", "answer": "text"}}, "'text' for 'answer'"),
        ({"k": {"question": "q"}}, "lacks 'answer'"),
    ],
)
def test_broken_truth_is_named(tmp_path, row, message):
    file = lines(tmp_path / "t.jsonl", {"image": "a.jpg", "label": 0}, row)
    with pytest.raises(InputError, match=f"Line 2 .*{message}"):
        file_truth(file)


def test_labels_and_questions_are_not_mixed(tmp_path):
    file = lines(tmp_path / "t.jsonl", {"image": "a.jpg", "label": 0}, QUESTIONS[0])
    with pytest.raises(InputError, match="mixes"):
        file_truth(file)


def test_questions_are_items_of_their_picture(tmp_path):
    found = file_truth(lines(tmp_path / "q.jsonl", *QUESTIONS))
    assert [item.group for item in found.items] == ["5_012", "5_012", "0_005_010"]
    assert [item.label for item in found.items] == [0, 0, 1]
    assert found.references["5_012_0"] == ("Fine.", "Good.")


def test_questions_give_labels_of_pictures(tmp_path):
    file = lines(tmp_path / "q.jsonl", *QUESTIONS)
    found = ddvqa_truth(task="judgement", file=file)
    assert [(i.name, i.label) for i in found.items] == [("5_012.jpg", 0), ("0_005_010.jpg", 1)]
    assert "questions" in found.notes[0]
    silent = {"5_013_0": {"question": "Describe the nose.", "answer": ["A nose."]}}
    with pytest.raises(InputError, match="'5_013' do not say"):
        ddvqa_truth(task="judgement", file=lines(tmp_path / "s.jsonl", *QUESTIONS, silent))


@pytest.fixture
def ddvqa(tmp_path):
    for name in ("5_012.jpg", "0_005_010.jpg"):
        file = tmp_path / "images" / "c40" / "test" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    for kind, stems in (("Original", ["5_012", "5_099"]), ("Deepfakes", ["0_005_010"])):
        file = tmp_path / "annotations" / "test" / kind / f"{kind}.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({stem: {} for stem in stems}))
    return tmp_path


def test_annotations_say_what_is_real_and_crops_what_counts(ddvqa):
    found = ddvqa_truth(task="judgement", data=ddvqa)
    assert [(i.name, i.kind) for i in found.items] == [
        ("0_005_010.jpg", "Deepfakes"),
        ("5_012.jpg", "real"),
    ]
    assert all(item.file.is_file() for item in found.items)
    named = ddvqa_truth(task="judgement", data=ddvqa, from_names=True)
    assert named.items == found.items
    assert "file names" in named.notes[0]


def test_faults_of_annotations_are_named(ddvqa):
    file = ddvqa / "annotations" / "test" / "Deepfakes" / "Deepfakes.json"
    file.write_text(json.dumps({"5_012": {}}))
    with pytest.raises(InputError, match="'5_012' is annotated both"):
        ddvqa_truth(task="scores", data=ddvqa)
    for broken in ("{", "[]"):
        file.write_text(broken)
        with pytest.raises(InputError, match="not a DD-VQA annotation file"):
            ddvqa_truth(task="scores", data=ddvqa)
    with pytest.raises(InputError, match="no annotations"):
        ddvqa_truth(task="scores", data=ddvqa, split="train")


def test_names_are_truth_only_when_asked():
    found = answers(said("x/5_012.jpg", "real"), said("0_005_010.jpg", "fake"))
    with pytest.raises(UsageError, match="which pictures are real") as caught:
        ddvqa_truth(task="judgement", predictions=found)
    assert "--truth-from-names" in caught.value.hint
    named = ddvqa_truth(task="judgement", predictions=found, from_names=True)
    assert [(i.name, i.label) for i in named.items] == [("5_012.jpg", 0), ("0_005_010.jpg", 1)]
    with pytest.raises(InputError, match=r"'me\.jpg' is not named like"):
        ddvqa_truth(task="judgement", predictions=answers(said("me.jpg", "")), from_names=True)


def test_explanations_need_references(tmp_path):
    with pytest.raises(UsageError, match="reference answers"):
        ddvqa_truth(task="explanation", from_names=True)
    labels = lines(tmp_path / "t.jsonl", {"image": "a.jpg", "label": 0})
    with pytest.raises(InputError, match="holds no reference answers"):
        ddvqa_truth(task="explanation", file=labels)
    with pytest.raises(UsageError, match="the truth no reference answers"):
        join(file_truth(labels), answers(said("k", ""), layout="explanations"))


def test_a_prediction_may_name_the_file_itself(ddvqa, monkeypatch):
    truth = ddvqa_truth(task="scores", data=ddvqa)
    file = truth.items[1].file
    monkeypatch.chdir(file.parent)
    for name in (str(file), "./5_012.jpg"):
        joined = join(truth, answers(Prediction(name, 0.25, "real"), layout="detections"))
        assert [item.fake_probability for item in joined.items] == [None, 0.25]
        assert joined.missing == ("0_005_010.jpg",)
        assert joined.notes == ()


def test_frames_bring_their_own_truth(tmp_path):
    file = tmp_path / "f.csv"
    file.write_text("image_id,ground_truth,prediction\n0_000_0,1,0.75\n1_000_003_0,0,0.5\n")
    predictions = read_predictions(file)
    joined = join(frames_truth(predictions), predictions)
    assert [(i.group, i.label, i.fake_probability) for i in joined.items] == [
        ("0_000", 0, 0.25),
        ("1_000_003", 1, 0.5),
    ]


TRUTH = Truth(
    "ddvqa",
    (Item("5_1.jpg", 0, "real", "5_1.jpg"), Item("0_2.jpg", 1, "Deepfakes", "0_2.jpg")),
    "test",
)


def test_joining_matches_exact_names_then_file_names_and_nothing_else():
    found = join(TRUTH, answers(said("5_1.jpg", "real"), said("d/0_2.jpg", "it is fake")))
    assert [item.verdict for item in found.items] == ["real", "fake"]
    assert "Predictions matched by file name alone: 1." in found.notes
    assert found.data_fingerprint == fingerprint(TRUTH.items)
    # Two predicted names share a file name: neither is taken for the picture.
    found = join(
        TRUTH, answers(said("5_1.jpg", ""), said("d/0_2.jpg", "fake"), said("e/0_2.jpg", "fake"))
    )
    assert found.missing == ("0_2.jpg",)
    assert found.unknown == ("d/0_2.jpg", "e/0_2.jpg")
    with pytest.raises(InputError, match="None of the 1 predictions"):
        join(TRUTH, answers(said("0_2", "fake")))


def test_repeated_answers_are_counted_and_the_last_one_stands():
    found = join(
        TRUTH,
        answers(
            said("5_1.jpg", "fake"),
            said("0_2.jpg", "<s> fake</s>"),
            said("5_1.jpg", "real"),
            said("0_2.jpg", "fake"),
        ),
    )
    assert [item.verdict for item in found.items] == ["real", "fake"]
    assert found.duplicates == ("5_1.jpg", "0_2.jpg")
    assert "more than once: 2, 1 of them with different answers" in found.notes[0]


def test_unparsed_is_not_missing():
    found = join(TRUTH, answers(said("5_1.jpg", "I cannot tell.")))
    assert found.items[0].answer == "I cannot tell."
    assert found.items[0].verdict is None
    assert found.missing == ("0_2.jpg",)


def test_questions_that_give_the_label_away_are_counted(tmp_path):
    truth = file_truth(lines(tmp_path / "q.jsonl", *QUESTIONS))
    rows = [said(item.name, "x") for item in truth.items]
    joined = join(truth, answers(*rows, layout="explanations"))
    assert joined.notes == ("3 of 3 questions contain the label.",)
    # What was really asked counts, not what the file of questions would have asked.
    rows[0] = Prediction("5_012_0", answer="x", question="Is it real or fake, and why?")
    joined = join(truth, answers(*rows, layout="explanations"))
    assert joined.notes == ("2 of 3 questions contain the label.",)


DDVQA = os.environ.get("M2F2_DDVQA")


@pytest.mark.skipif(not DDVQA, reason="M2F2_DDVQA is not set")
def test_annotations_questions_and_names_of_ddvqa_agree():
    data = Path(DDVQA)
    labels = [
        {item.name: item.label for item in found.items}
        for found in (
            ddvqa_truth(task="judgement", data=data),
            ddvqa_truth(task="judgement", data=data, from_names=True),
            ddvqa_truth(task="judgement", file=data / "reference" / "test_c40.jsonl"),
        )
    ]
    assert labels[0] == labels[1] == labels[2]
    assert len(labels[0]) == 144
    assert sum(labels[0].values()) == 72
