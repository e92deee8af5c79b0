from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path

import pytest

from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation import report as reports
from m2f2cli.evaluation.report import (
    build_report,
    check_folder,
    items_as_lines,
    read_report,
    write_report,
)
from tests.evaluation.reports import explanation_set, judgement_set, scores_set, some_measures


@pytest.fixture
def folder(tmp_path):
    scored = scores_set()
    write_report(tmp_path / "r", build_report(scored, some_measures()), scored, "<html></html>")
    return tmp_path / "r"


def test_a_report_is_strict_json_with_every_documented_key(tmp_path):
    predictions = tmp_path / "p.jsonl"
    predictions.write_text("{}\n")
    report = build_report(scores_set(), some_measures(), predictions=predictions)
    again = json.loads(json.dumps(report, allow_nan=False))
    assert list(again) == [
        "schema_version", "kind", "created", "versions", "dataset", "task", "split", "protocol",
        "model", "data", "predictions", "items", "counts", "figures", "per_kind", "forgeries",
        "risk_coverage", "notes",
    ]  # fmt: skip
    assert again["schema_version"] == 1
    assert datetime.fromisoformat(again["created"]).utcoffset() is not None
    assert {"m2f2cli", "python", "numpy"} <= again["versions"].keys()
    digest = hashlib.sha256(b"{}\n").hexdigest()
    assert again["predictions"] == {"file": str(predictions), "sha256": f"sha256:{digest}"}
    assert again["figures"]["video_auc"] == {
        "value": None, "low": None, "high": None, "note": "no videos",
    }  # fmt: skip
    assert again["per_kind"]["Deepfakes"]["auc"]["low"] == 0.8
    assert again["notes"] == ["A note with <brackets>.", "Three items are uncertain."]


def test_every_key_is_in_the_documents():
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    report = build_report(explanation_set(), some_measures())
    item = json.loads(items_as_lines(explanation_set()).splitlines()[0])
    figure = report["figures"]["accuracy"]
    for key in (*report, *item, *report["data"], *report["predictions"], *figure):
        assert f"`{key}`" in page or f'"{key}"' in page, key


def test_the_protocol_hash_follows_the_definition_alone():
    hashes = []
    for resamples, count in ((200, 40), (200, 44), (300, 40)):
        measures = some_measures()
        measures.definition["resamples"] = resamples  # type: ignore[index]
        hashes.append(build_report(scores_set(count), measures)["protocol"]["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("make", [scores_set, judgement_set, explanation_set])
def test_items_come_back_as_they_were(tmp_path, make):
    scored = make()
    report = build_report(scored, some_measures())
    write_report(tmp_path / "r", report, scored, "")
    for path in (tmp_path / "r", tmp_path / "r" / "report.json"):
        saved = read_report(path)
        assert saved.report == report
        assert saved.scored.items == scored.items
        assert saved.scored.references == scored.references
        assert saved.scored.task == scored.task


def test_names_that_are_no_unicode_survive(tmp_path):
    from dataclasses import replace

    scored = scores_set(4)
    odd = replace(scored.items[0], name="caf\udce9\u202e\n.jpg")
    scored = replace(scored, items=(odd, *scored.items[1:]), missing=(odd.name,))
    write_report(tmp_path, build_report(scored, some_measures()), scored, odd.name)
    assert read_report(tmp_path).scored.items[0].name == odd.name


def test_a_second_report_takes_the_place_of_the_first(folder):
    scored = scores_set(8)
    write_report(folder, build_report(scored, some_measures()), scored, "new")
    assert len(read_report(folder).scored.items) == 8
    assert (folder / "index.html").read_text() == "new"
    assert {p.name for p in folder.iterdir()} == {"index.html", "report.json", "scored.jsonl"}


def test_a_page_of_something_else_is_kept(tmp_path):
    (tmp_path / "index.html").write_text("my site")
    with pytest.raises(UsageError, match="not the page of a report"):
        check_folder(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        check_folder(tmp_path / "index.html")
    check_folder(tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("report.json", "", "is empty"),
        ("report.json", '{"schema_version": 1, "kind": "eval', "not valid JSON"),
        ("report.json", "[1]", "does not hold a JSON object"),
        ("report.json", '{"a": NaN}', "NaN is not a JSON number"),
        ("report.json", '{"accuracy": 1}', "is not a report"),
        ("report.json", '{"schema_version": 9, "kind": "evaluation"}', "schema version 9"),
        ("report.json", '{"schema_version": 1, "kind": "evaluation"}', "malformed: KeyError"),
        ("scored.jsonl", '{"name": "a"', "not the file that 'report.json'"),
        ("scored.jsonl", None, "needs the file 'scored.jsonl'"),
        ("report.json", None, "There is no file"),
    ],
)
def test_a_broken_report_is_named(folder, name, content, words):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=words):
        read_report(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"label": 2}, {"verdict": "maybe"}, {"fake_probability": "high"}, {"name": None}, {"x": 1},
        {"label": [1]}, {"label": True}, {"fake_probability": 10**400}, {"fake_probability": 1.5},
        {"fake_probability": True}, {"references": "abc"}, {"references": [1]}, {"kind": 3},
        {"answer": ["x"]}, {"question": 5}, {"in_domain": "no"}, {"file": 3}, {"status": ["ok"]},
        {"name": "x" * 10, "kind": {"a": 1}},
    ],
)  # fmt: skip
def test_items_of_another_kind_are_refused(folder, change):
    lines = (folder / "scored.jsonl").read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), **change})
    data = ("\n".join(lines) + "\n").encode()
    (folder / "scored.jsonl").write_bytes(data)
    report = json.loads((folder / "report.json").read_text())
    report["items"]["sha256"] = reports.sha256_of(data)
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="malformed"):
        read_report(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("threshold", "x"), ("threshold", [0.5]), ("threshold", True), ("threshold", 10**400),
     ("name", 3), ("protocol", None), ("protocol", {"name": 1}), ("notes", "text"), ("notes", [1]),
     ("task", ["scores"]), ("split", 1), ("model", []), ("data", 5), ("missing", [[]])],
)  # fmt: skip
def test_a_report_of_other_types_is_malformed(folder, key, value):
    file = folder / "report.json"
    report = json.loads(file.read_text())
    holder = next(one for one in (report, report["model"], report["data"]) if key in one)
    holder[key] = value
    file.write_text(json.dumps(report))
    with pytest.raises(InputError, match="malformed"):
        read_report(folder)


def test_a_report_nested_without_end_is_no_json(folder):
    for text in ('{"a":' * 3000 + "1" + "}" * 3000, '{"a":' * 200 + "1" + "}" * 200):
        (folder / "report.json").write_text(text)
        with pytest.raises(InputError, match=r"not valid JSON: nested (too deeply|deeper than)"):
            read_report(folder)
