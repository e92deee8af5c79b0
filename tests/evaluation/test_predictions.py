"""Files of answers: told apart by content, and each way to be broken is named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from m2f2cli.errors import InputError
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.records import to_csv, to_line
from tests.detections import EXAMPLE, SETTINGS


def written(tmp_path, *rows, end="\n"):
    file = tmp_path / "answers"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + end, encoding="utf-8")
    return file


def detection(**changes):
    return to_line(replace(EXAMPLE, **changes).to_dict()).decode().rstrip()


def test_records_of_detect(tmp_path):
    failed = detection(path="b.jpg", status="no_face", verdict=None, fake_probability=None)
    found = read_predictions(written(tmp_path, detection(path="a.jpg"), failed))
    assert (found.layout, found.task) == ("detections", "scores")
    assert (found.threshold, found.model, found.model_fingerprint) == (0.5, "lite", "sha256:00")
    first, second = found.rows
    assert (first.name, first.fake_probability, first.verdict) == ("a.jpg", 0.75, "fake")
    assert first.in_domain is True
    assert (second.fake_probability, second.status) == (None, "no_face")


def test_published_judgements(tmp_path):
    row = {"image": "./x/5_000.jpg", "prompt": "Real?", "text": "<s> real</s>", "metadata": {}}
    found = read_predictions(written(tmp_path, row, "", row))
    assert (found.layout, found.task, found.threshold) == ("judgements", "judgement", None)
    assert [r.name for r in found.rows] == ["./x/5_000.jpg"] * 2
    assert (found.rows[0].answer, found.rows[0].question) == ("<s> real</s>", "Real?")


def test_published_explanations(tmp_path):
    row = {"key": "5_000_0", "image": "5_000.jpg", "prompt": "Why?", "text": "Fine."}
    found = read_predictions(written(tmp_path, row))
    assert (found.layout, found.task) == ("explanations", "explanation")
    assert found.rows[0].name == "5_000_0"


def test_published_frames_speak_of_real(tmp_path):
    file = written(
        tmp_path, "image_id,ground_truth,prediction", "0_000_0,1,0.75", "1_001_002_0,0,1"
    )
    found = read_predictions(file)
    assert (found.layout, found.task) == ("frames", "scores")
    assert [row.fake_probability for row in found.rows] == [0.25, 0.0]
    assert found.labels == {"0_000_0": 0, "1_001_002_0": 1}


def test_a_last_line_without_its_end_is_read(tmp_path):
    assert len(read_predictions(written(tmp_path, detection(), end="")).rows) == 1


def test_cut_last_record_of_our_own_is_left_out_and_said(tmp_path):
    file = written(tmp_path, detection(), detection(path="b.jpg")[:100], end="")
    found = read_predictions(file)
    assert len(found.rows) == 1
    assert "cut off" in found.notes[0]


HEADER = "image_id,ground_truth,prediction"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["hello"], "no file of answers"),
        (["a,b,c", "1,2,3"], "no file of answers"),
        (['["image"]'], "no file of answers"),
        ([{"image": "a", "text": "real"}, '{"image": "b", "te'], "Line 2 .* is cut off"),
        (
            [{"image": "a", "text": "real"}, '{"ima', {"image": "b", "text": ""}],
            "Line 2 .* no JSON",
        ),
        ([{"image": "a", "text": "real"}, "7"], "Line 2 .* no JSON object"),
        ([{"image": "a", "text": "real"}, {"key": "b", "text": "real"}], "Line 2 .* lacks 'image'"),
        ([{"image": "a"}], "Line 1 .* lacks 'text'"),
        ([{"image": "a", "text": 3}], "Line 1 .* has 3 for 'text'"),
        ([{"image": None, "text": "real"}], "Line 1 .* lacks 'image'"),
        ([{"text": "real"}], "Line 1 .* no known layout"),
        ([{"schema_version": 2, "path": "a"}], "Line 1 .* schema version 2, not 1"),
        ([{"schema_version": 1, "path": "a", "kind": "sound"}], "'sound' for 'kind'"),
        (
            [{"schema_version": 1, "path": "a", "kind": "image", "status": "ok"}],
            "lacks 'fake_probability'",
        ),
        ([detection(fake_probability=1.5)], "1.5 for 'fake_probability', which is no probability"),
        ([detection(fake_probability=True)], "no probability"),
        ([detection().replace("0.75", "NaN", 1)], "no JSON .*NaN"),
        ([detection(status="odd")], "'odd' for 'status'"),
        ([detection(verdict="maybe")], "'maybe' for 'verdict'"),
        (
            [detection(), detection(path="b", settings=replace(SETTINGS, threshold=0.6))],
            "Line 2 .* another model, or with another threshold",
        ),
        ([HEADER], "holds no rows"),
        ([HEADER, "0_0_0,1"], "Line 2 .* 2 columns"),
        ([HEADER, "0_0_0,2,0.5"], "'2' for 'ground_truth'"),
        ([HEADER, "0_0_0,1,high"], "'high' for 'prediction'"),
        ([HEADER, "0_0_0,1,nan"], "'nan' for 'prediction'"),
        ([HEADER, "0_0_0,1,0.5", "0_0_0,0,0.5"], "Line 3 .* another label"),
    ],
)
def test_broken_files_are_named(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_predictions(written(tmp_path, *rows, end="" if "cut" in message else "\n"))


def test_missing_empty_and_binary_files_are_named(tmp_path):
    with pytest.raises(InputError, match="There is no file") as caught:
        read_predictions(tmp_path / "nothing.jsonl")
    assert caught.value.status == "missing"
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(InputError, match="is empty"):
        read_predictions(tmp_path / "empty")
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    with pytest.raises(InputError, match="not a text file"):
        read_predictions(tmp_path / "picture")
    with pytest.raises(InputError, match="cannot be read"):
        read_predictions(tmp_path)


def test_the_table_of_detect(tmp_path):
    failed = replace(EXAMPLE, path="b.jpg", status="no_face", verdict=None, fake_probability=None)
    file = tmp_path / "verdicts.csv"
    file.write_text(to_csv([replace(EXAMPLE, path="a,\n.jpg"), failed]), encoding="utf-8")
    found = read_predictions(file)
    assert (found.layout, found.task, len(found.rows)) == ("detections", "scores", 2)
    assert (found.threshold, found.model, found.model_fingerprint) == (0.5, "lite", "sha256:00")
    first, second = found.rows
    assert (first.name, first.fake_probability, first.verdict) == ("a,\n.jpg", 0.75, "fake")
    assert first.in_domain is True
    assert (second.fake_probability, second.status) == (None, "no_face")


@pytest.mark.parametrize(
    "change", [("0.75", "high"), (",ok,", ",fine,"), (",0.5,", ",0.6,"), ("True", "so")]
)
def test_a_table_that_was_changed_names_its_line(tmp_path, change):
    good = to_csv([EXAMPLE])
    row = good.splitlines()[1]
    file = tmp_path / "verdicts.csv"
    file.write_text(good + row.replace(*change) + "\r\n", encoding="utf-8")
    with pytest.raises(InputError, match="Line 3 of"):
        read_predictions(file)


def test_a_field_without_end_names_its_line(tmp_path):
    for text in (f"{'a' * 200_000},1,0.5", 'a,1,0.5\n"b,1,0.5\n' + "c,1,0.5\n" * 20_000):
        file = written(tmp_path, "image_id,ground_truth,prediction", text)
        with pytest.raises(InputError, match=r"Line \d+ of .* is no line of a CSV file"):
            read_predictions(file)
