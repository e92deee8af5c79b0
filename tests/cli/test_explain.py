"""``m2f2 explain`` from the outside, with a real tiny explainer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from m2f2cli.cli import app
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.evaluation.truth import file_truth, join
from m2f2cli.records import Explanation
from tests.inference.explainers import crops
from tests.models.explainers import write_explainer

FAST = ["--max-new-tokens", "4", "--judge"]


@pytest.fixture(scope="session")
def explainer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explainers") / "tiny"
    write_explainer(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, explainer_folder: Path) -> Path:
    """A working folder with three crops, and the tiny explainer as the model of every call."""
    crops(tmp_path / "in", 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("M2F2_MODEL", str(explainer_folder))
    monkeypatch.setenv("M2F2_FACES", "none")
    return tmp_path


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def test_texts_are_for_people_and_the_rest_goes_to_stderr(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["explain", "in", "nowhere.jpg", "--max-new-tokens", "4"]) == 3
    captured = capsys.readouterr()
    rows = captured.out.splitlines()
    assert len(rows) == 3 * 8 + 1
    assert rows[0].startswith("in/0.png: ")
    assert rows[1].startswith("  language model: ")
    assert [row.split(":")[0].strip() for row in rows[2:8]] == [
        "skin", "eyes", "eyebrows", "nose", "mouth", "face",
    ]  # fmt: skip
    assert rows[-1].startswith("nowhere.jpg: missing: ")
    assert captured.err.startswith("3 judged: ")
    assert "not evidence" in captured.err


def test_json_is_one_object(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["explain", "in", "--region", "nose", "--json", *FAST[:2]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"items", "summary"}
    for item in result["items"]:
        assert Explanation.from_dict(item).to_dict() == item
        assert item["model_fingerprint"].startswith("sha256:")
        assert [r["region"] for r in item["explanations"][0]["reasons"]] == ["nose"]


def test_records_are_appended_resumed_and_evaluated(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["explain", *FAST, "--output", "out.jsonl"]
    assert app.run([*command, "in/0.png"]) == 0
    assert app.run([*command, "in"]) == 0
    assert [row["path"] for row in lines("out.jsonl")] == ["in/0.png", "in/1.png", "in/2.png"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 of them recorded earlier" in captured.err
    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(whole[:-50])  # killed while writing
    assert app.run([*command, "in"]) == 0
    assert Path("out.jsonl").read_bytes() == whole
    for change in (["--condition", "none"], ["--threshold", "0.9"], ["--sample"]):
        assert app.run([*command, "in", *change]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == whole
    found = read_predictions(Path("out.jsonl"))
    assert (found.layout, len(found.rows)) == ("detections", 3)


def test_records_of_detections_are_not_mixed_in(
    here: Path, tiny_detector_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detect = ["detect", "in", "--model", str(tiny_detector_folder), "--output", "out.jsonl"]
    assert app.run(detect) == 0
    before = Path("out.jsonl").read_bytes()
    assert app.run(["explain", "in", *FAST, "--output", "out.jsonl"]) == 2
    assert "error: 'out.jsonl' was made with " in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == before


def test_without_a_model_the_bundled_one_answers_and_says_which_it_is(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("M2F2_MODEL")
    assert app.run(["explain", "in", "--judge"]) == 0
    sentences = capsys.readouterr().err
    assert "small bundled model" in sentences
    assert "m2f2 import" in sentences


def test_each_command_wants_its_own_kind_of_model(
    here: Path,
    tiny_detector_folder: Path,
    explainer_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.run(["explain", "in", "--model", str(tiny_detector_folder)]) == 1
    sentences = capsys.readouterr().err
    assert "holds a detector" in sentences
    assert f"m2f2 init-llava --llava DIR --detector {tiny_detector_folder}" in sentences
    assert app.run(["detect", "in", "--model", str(explainer_folder)]) == 1
    assert f"m2f2 explain PATH --model {explainer_folder}" in capsys.readouterr().err


def test_a_damaged_explainer_is_one_sentence(
    here: Path, explainer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(explainer_folder, here / "cut")
    data = (here / "cut" / "model.safetensors").read_bytes()
    (here / "cut" / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert app.run(["explain", "in", "--model", "cut", "--output", "out.jsonl"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["in", "--condition", "truth"], "Only the questions of a data set"),
        (["in", "--condition", "detectr"], "--condition does not know 'detectr'"),
        (["in", "--region", "ears"], "--region does not know 'ears'"),
        (["in", "--question", ""], "question is empty"),
        (["in", "--question", "<image><deepfake><deepfake>Why?"], "2 <deepfake> for 1"),
        (["in", "--question", "why " * 500], "the model reads 400"),
        (["in", "--template", "vicuna"], "Did you mean 'vicuna_v1'"),
        (["in", "--temperature", "0.2"], "Add --sample"),
        (["in", "--output", "out.csv"], "must end in .jsonl"),
        (["in", "--fail-on", "real"], "--fail-on "),
        (["in", "--uncertain", "x"], "--uncertain takes"),
        (["in", "--quantize", "3bit"], "--quantize does not know '3bit'"),
        (["in", "--images", "in"], "belong together"),
        (["--dataset", "q.jsonl"], "belong together"),
        (["--dataset", "q.jsonl", "--images", "in"], "need a place to go"),
        (["in", "--dataset", "q.jsonl", "--images", "in", "--json"], "takes no PATH"),
        ([], "nothing to"),
    ],
)
def test_wrong_usage_is_one_sentence(
    here: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.out == ""


def test_gates_are_those_of_detect(here: Path) -> None:
    command = ["explain", "in/0.png", *FAST, "--fail-on", "fake"]
    assert app.run([*command, "--threshold", "0"]) == 4
    assert app.run([*command, "--threshold", "1"]) == 0


def test_words_stream_on_a_terminal(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["explain", "in/0.png", "--region", "nose", "--max-new-tokens", "6"]
    assert app.run([*command, "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)["items"]
    pieces = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "write", lambda text: (pieces.append(text), write(text))[1])
    assert app.run([*command, "--quiet"]) == 0
    shown = "".join(pieces)
    reason = item["explanations"][0]["reasons"][0]
    assert f"> {reason['question']}\n" in shown
    assert reason["text"].split("\ufffd")[0] in shown
    assert f"in/0.png: {item['verdict']}" in shown
    assert len(pieces) > 10  # not all at once


def test_a_data_set_is_answered_and_evaluated(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("q.jsonl", "w", encoding="utf-8") as file:
        for key in ("0_0", "1_0", "9_0"):
            entry = {"question": "This image is fake. Describe it.", "answer": ["It is odd."]}
            file.write(json.dumps({key: entry}) + "\n")
    command = ["explain", "--dataset", "q.jsonl", "--images", "in", "--max-new-tokens", "4"]
    assert app.run([*command, "--output", "a.jsonl"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "9.jpg: There is no file 'in/9.jpg'." in captured.err
    assert "2 of 3 questions answered; 1 without their picture." in captured.err
    before = Path("a.jsonl").read_bytes()
    assert app.run([*command, "--output", "a.jsonl"]) == 3
    assert Path("a.jsonl").read_bytes() == before
    scored = join(file_truth(Path("q.jsonl")), read_predictions(Path("a.jsonl")))
    assert (scored.task, scored.missing, scored.unknown) == ("explanation", ("9_0",), ())
    capsys.readouterr()
    assert app.run([*command, "--judge", "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in result["items"]] == ["in/0.png", "in/1.png", "in/9.jpg"]
    assert app.run([*command, "--judge", "--output", "j.jsonl"]) == 3
    labels = [{"image": f"{number}.png", "label": number} for number in (0, 1)]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, labels)))
    capsys.readouterr()
    evaluate = ["evaluate", "ddvqa", "--predictions", "j.jsonl", "--truth", "t.jsonl", "--json"]
    assert app.run(evaluate) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["answered"] == 2
    Path("q.jsonl").write_text('{"0_0": {"question": "Why?"}}\n{"0_1": {\n')
    assert app.run([*command, "--output", "b.jsonl"]) == 1
    assert "Line 2 of 'q.jsonl' is no question" in capsys.readouterr().err
    assert not Path("b.jsonl").exists()
