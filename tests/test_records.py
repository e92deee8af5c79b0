from __future__ import annotations

import csv
import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f2cli.errors import InputError
from m2f2cli.records import (
    SCHEMA_VERSION,
    STATUSES,
    VERDICTS,
    Detection,
    FaceScore,
    FrameScore,
    Settings,
    to_csv,
    to_line,
)
from tests.detections import EXAMPLE

boxes = st.tuples(*[st.integers(-500, 5000)] * 4)
unit = st.floats(0, 1)
distances = st.none() | st.floats(0, 1e6)
flags = st.none() | st.booleans()
paths = st.binary(min_size=1, max_size=40).map(os.fsdecode)

settings_st = st.builds(
    Settings,
    uncertain=st.none() | st.tuples(unit, unit),
    threshold=unit,
    temperature=st.floats(0.1, 10),
    crop_margin=st.none() | unit,
)
records_st = st.builds(
    Detection,
    path=paths,
    status=st.sampled_from(sorted(STATUSES)),
    settings=settings_st,
    verdict=st.none() | st.sampled_from(VERDICTS),
    fake_probability=st.none() | unit,
    in_domain=flags,
    domain_distance=distances,
    forgery=st.none() | st.text(),
    crop=st.none() | boxes,
    faces=st.lists(
        st.builds(
            FaceScore,
            box=st.none() | boxes,
            crop=boxes,
            fake_probability=unit,
            in_domain=flags,
            domain_distance=distances,
            forgery=st.none() | st.text(),
            finder_score=st.none() | unit,
        ),
        max_size=3,
    ).map(tuple),
    frames=st.lists(
        st.builds(
            FrameScore,
            time=st.floats(0, 1e5),
            fake_probability=st.none() | unit,
            crop=st.none() | boxes,
            in_domain=flags,
            domain_distance=distances,
            forgery=st.none() | st.text(),
        ),
        max_size=3,
    ).map(tuple),
)


@given(records_st)
def test_a_record_survives_its_line_whatever_the_path_is(record: Detection) -> None:
    line = to_line(record.to_dict())
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert Detection.from_dict(json.loads(line)) == record


@pytest.fixture
def record() -> Detection:
    return EXAMPLE


def test_every_key_is_always_present(record: Detection) -> None:
    row = record.to_dict()
    assert row["schema_version"] == SCHEMA_VERSION
    assert {"sha256", "model_fingerprint", "crop", "threshold", "in_domain", "status"} <= set(row)
    assert "settings" not in row


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 99},
        {"unknown": 1},
        {"faces": [{"nose": 1}]},
        {"faces": 3},
    ],
)
def test_a_foreign_record_is_refused(record: Detection, change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Detection.from_dict({**record.to_dict(), **change})


def test_a_record_without_a_path_is_refused(record: Detection) -> None:
    row = record.to_dict()
    del row["path"]
    with pytest.raises(InputError, match="path"):
        Detection.from_dict(row)


@pytest.mark.parametrize("path", ["=cmd|' /C calc'!A0.jpg", "+1.jpg", "-2.jpg", "@x.jpg"])
def test_a_csv_path_is_no_formula(record: Detection, path: str) -> None:
    text = to_csv([Detection(path, "image", "missing", record.settings)])
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["path"] == "./" + path


@given(st.lists(records_st, max_size=4))
def test_csv_keeps_one_row_an_item(records: list[Detection]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(records), newline="")))
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        assert row["status"] == record.status
        assert row["path"].removeprefix("./") == record.path.removeprefix("./")
        expected = "" if record.fake_probability is None else str(record.fake_probability)
        assert row["fake_probability"] == expected
