"""Files of questions: their rows, what is told, resuming, faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m2f2cli.errors import InputError, UsageError
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.inference.explain_dataset import DatasetJob, read_questions
from tests.inference.explainers import asking, crops, tiny
from tests.inference.test_explain import alone

NOSE = "Describe the authenticity of the image based on nose."
QUESTIONS = {
    "0_0": f"This image is fake. {NOSE}",
    "1_0": f"This image is real. {NOSE}",
    "0_1": "The skin in the image is fake, tell me why.",
    "7_0": f"This image is real. {NOSE}",
}


@pytest.fixture(scope="module")
def loaded():
    return tiny()


@pytest.fixture
def images(tmp_path: Path) -> str:
    crops(tmp_path / "images", 2)
    return str(tmp_path / "images")


def write_questions(path: Path, questions: dict[str, str]) -> Path:
    lines = [json.dumps({key: {"question": q, "answer": ["…"]}}) for key, q in questions.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "questions.jsonl", QUESTIONS)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def run(file: Path, images: str, loaded, **changes) -> DatasetJob:
    kept = {name: changes.pop(name) for name in ("output", "overwrite") if name in changes}
    options = asking(**{"condition": "truth", **changes})
    job = DatasetJob(file, images, model=loaded, options=options, **kept)
    job.rows = list(job.run())
    return job


def test_rows_are_the_published_ones(file, images, loaded, tmp_path):
    out = tmp_path / "answers.jsonl"
    job = run(file, images, loaded, output=out)
    rows = lines(out)
    assert [list(row) for row in rows] == [["key", "image", "prompt", "text", "metadata"]] * 3
    assert {row["key"]: row["image"] for row in rows} == {
        "0_0": "0.png", "0_1": "0.png", "1_0": "1.png",
    }  # fmt: skip
    for row in rows:
        assert f"<image>\n<deepfake>\n{QUESTIONS[row['key']]} ASSISTANT:" in row["prompt"]
        words = alone(loaded, f"{images}/{row['image']}", row["prompt"])
        assert row["text"] == f"<s> {words}"  # no </s>: it did not end by itself
        assert row["metadata"]["told"] == ("real" if row["key"] == "1_0" else "fake")
    assert vars(job.count) == {"questions": 4, "answered": 3, "earlier": 0, "missing": 1}
    assert [row.status for row in job.rows if row.path == "7_0"] == ["missing"]
    found = read_predictions(out)
    assert (found.layout, found.task, len(found.rows)) == ("explanations", "explanation", 3)


def test_a_resumed_run_doubles_nothing(file, images, loaded, tmp_path):
    out = tmp_path / "answers.jsonl"
    run(file, images, loaded, output=out)
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index(b"\n") + 40])  # killed while writing the second row
    job = run(file, images, loaded, output=out)
    assert job.count.earlier == 1
    assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())
    crops(Path(images), 8)  # the missing picture turns up
    job = run(file, images, loaded, output=out)
    assert (job.count.earlier, job.count.missing) == (3, 0)
    assert [row["key"] for row in lines(out)][-1] == "7_0"
    before = out.read_bytes()
    run(file, images, loaded, output=out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("changes", [{"condition": "none"}, {"max_new_tokens": 5}, {"judge": True}])
def test_other_settings_are_not_mixed_in(file, images, loaded, tmp_path, changes):
    out = tmp_path / "answers.jsonl"
    run(file, images, loaded, output=out)
    before = out.read_bytes()
    with pytest.raises(UsageError, match="was made with"):
        run(file, images, loaded, output=out, **changes)
    write_questions(file, {**QUESTIONS, "1_1": NOSE})
    with pytest.raises(UsageError, match="was made with questions"):
        run(file, images, loaded, output=out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(("condition", "label"), [("none", None), ("detector", "fake")])
def test_the_label_is_taken_out_of_the_questions(file, images, loaded, condition, label):
    job = run(file, images, loaded, condition=condition, threshold=0.0)
    for row in job.rows[:3]:
        assert row.told == label
        told = "" if label is None else f"This image is {label}. "
        region = "skin" if row.path == "0_1" else "nose"
        question = f"{told}Describe the authenticity of the image based on {region}."
        assert f"<deepfake>\n{question} ASSISTANT:" in row.prompt


def test_judgements_are_asked_once_a_picture(file, images, loaded, tmp_path):
    out = tmp_path / "judged.jsonl"
    job = run(file, images, loaded, judge=True, output=out)
    rows = lines(out)
    assert [list(row) for row in rows] == [["image", "prompt", "text", "metadata"]] * 2
    assert [row["image"] for row in rows] == [f"{images}/0.png", f"{images}/1.png"]
    assert all(loaded[1].template.judgement() in row["prompt"] for row in rows)
    assert vars(job.count) == {"questions": 3, "answered": 2, "earlier": 0, "missing": 1}
    assert read_predictions(out).layout == "judgements"
    before = out.read_bytes()
    run(file, images, loaded, judge=True, output=out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "Line 2 of .* is no question"),
        ("[]", "Line 2 of .* is no question"),
        ('{"a_0": {"question": "?"}, "b_0": {"question": "?"}}', "is no question"),
        ('{"a_0": {"answer": []}}', "is no question"),
        ('{"a_0": {"question": " "}}', "is no question"),
        ('{"a_0": "?"}', "is no question"),
        ('{"a": {"question": "?"}}', "is no question"),
        ('{"../a_0": {"question": "?"}}', "is no question"),
        ('{"5_0": {"question": "Another?"}}', "asks another '5_0' than before"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, line, sentence):
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"5_0": {{"question": "Why?"}}}}\n{line}\n')
    with pytest.raises(InputError, match=sentence):
        read_questions(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"\n", "is empty"), (b"\xff\xfe", "no|not a text"), (None, "no file")],
)
def test_no_questions_at_all(tmp_path, content, sentence):
    path = tmp_path / "questions.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_questions(path)


def test_what_cannot_be_asked_is_refused_before_any_work(file, images, loaded, tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(InputError, match="no folder"):
        run(file, str(tmp_path / "nowhere"), loaded)
    with pytest.raises(UsageError, match="in its file"):
        run(file, images, loaded, regions=("nose",))
    with pytest.raises(UsageError, match="is the file of questions"):
        run(file, images, loaded, output=file)
    write_questions(file, {**QUESTIONS, "1_1": "why " * 400})
    with pytest.raises(UsageError, match=r"Question '1_1': The prompt has .* the model reads 400"):
        run(file, images, loaded, output=out)
    write_questions(file, {"0_0": "<image> <deepfake> <deepfake> Why?"})
    with pytest.raises(UsageError, match=r"Question '0_0': .*2 <deepfake>"):
        run(file, images, loaded, output=out)
    assert not out.exists()
