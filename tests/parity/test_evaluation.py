"""The paper protocol gives the published code's own numbers, on every golden file."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from m2f2cli.errors import InputError
from m2f2cli.evaluation import protocols
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.evaluation.truth import ddvqa_truth, file_truth, frames_truth, join

GOLDEN = Path(__file__).parent / "golden" / "eval"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TEXTS = {
    "Bleu_1": "bleu_1",
    "Bleu_2": "bleu_2",
    "Bleu_3": "bleu_3",
    "Bleu_4": "bleu_4",
    "Bleu_mean": "bleu",
    "ROUGE_L": "rouge_l",
    "CIDEr": "cider",
}
CALLS = ("accuracy", "f1", "precision", "recall")
CELLS = {"tp": "true_fake", "fp": "false_fake", "fn": "false_real", "tn": "true_real"}
DDVQA = os.environ.get("M2F2_DDVQA")
needs_ddvqa = pytest.mark.skipif(not DDVQA, reason="M2F2_DDVQA is not set")


def cases(prefix):
    return [name for name, case in EXPECTED.items() if name.startswith(prefix) and "file" in case]


def values(measures):
    return {name: figure.value for name, figure in measures.figures.items()}


def check_judgement(measures, case):
    assert values(measures) == pytest.approx({name: case[name] for name in CALLS}, abs=1e-9)
    assert {k: measures.counts[ours] for k, ours in CELLS.items()} == {k: case[k] for k in CELLS}
    assert measures.counts["items"] == case["lines"]
    assert measures.counts["answered"] == case["counted"]


def check_texts(measures, case, tolerance=1e-9):
    expected = {ours: case[theirs] for theirs, ours in TEXTS.items()}
    assert values(measures) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", cases("judgement"))
def test_judgements(name):
    case = EXPECTED[name]
    file = GOLDEN / case["file"]
    if case.get("error", "").startswith("KeyError"):
        with pytest.raises(InputError, match=r"Line 2 .* lacks 'image'"):
            read_predictions(file)
        return
    measures = protocols.paper(read_predictions(file))
    if "error" in case:
        assert set(values(measures).values()) == {None}
        assert "divides by zero" in measures.figures["accuracy"].note
        return
    check_judgement(measures, case)


@pytest.mark.parametrize("name", cases("explanation"))
def test_explanations(name):
    case = EXPECTED[name]
    file, truth = GOLDEN / case["file"], file_truth(GOLDEN / case["gt_file"])
    if case.get("error", "").startswith("KeyError"):
        with pytest.raises(InputError, match="lacks 'text'"):
            read_predictions(file)
        return
    predictions = read_predictions(file)
    measures = protocols.paper(predictions, references=truth.references)
    if "error" in case:
        assert set(values(measures).values()) == {None}
        counted = measures.counts["missing"], measures.counts["unknown"]
        assert counted == (len(case["missing"]), len(case["extra"]))
        return
    check_texts(measures, case)
    # A joined set is measured by its file, so that nothing is lost on the way.
    assert protocols.paper(join(truth, predictions)) == measures


@pytest.mark.parametrize("name", cases("auc"))
def test_videos(name):
    case = EXPECTED[name]
    predictions = read_predictions(GOLDEN / case["file"])
    measures = protocols.paper(predictions)
    found = values(measures)
    if "error" in case["reference"]:
        assert found["video_auc"] is None
        assert "20 frames" in measures.figures["video_auc"].note
    else:
        published = {"video_auc": "auc", "best_accuracy": "best_accuracy"}
        for ours, theirs in published.items():
            assert found[ours] == pytest.approx(case["reference"][theirs], abs=1e-9)
    if fixed := case.get("own_correct_labels_with_last"):
        assert found["video_auc_fixed"] == pytest.approx(fixed["auc"], abs=1e-9)
        assert found["best_accuracy_fixed"] == pytest.approx(fixed["best_accuracy"], abs=1e-9)
    if untrimmed := case.get("own_correct_labels_with_last_untrimmed"):
        own = protocols.standard(join(frames_truth(predictions), predictions), resamples=0)
        assert own.figures["video_auc"].value == pytest.approx(untrimmed["auc"], abs=1e-9)


def test_a_joined_set_of_frames_is_measured_as_its_file():
    predictions = read_predictions(GOLDEN / "frames_uneven.csv")
    joined = join(frames_truth(predictions), predictions)
    assert values(protocols.paper(joined)) == values(protocols.paper(predictions))


@needs_ddvqa
class TestPublishedAnswers:
    reference = Path(DDVQA or "", "reference")
    tolerance = 1e-6

    def test_judgements(self):
        predictions = read_predictions(self.reference / "published_det_c40.jsonl")
        check_judgement(protocols.paper(predictions), EXPECTED["judgement_published_outputs"])

    def test_judgements_under_another_path(self):
        """Every truth becomes fake."""
        predictions = read_predictions(self.reference / "published_det_c40.jsonl")
        moved = [replace(row, name=row.name.replace("./", "/data/", 1)) for row in predictions.rows]
        measures = protocols.paper(replace(predictions, rows=tuple(moved)))
        check_judgement(measures, EXPECTED["judgement_same_answers_but_absolute_image_paths"])
        assert "every picture counts as fake" in " ".join(measures.notes)

    def test_judgements_with_a_second_run_appended(self):
        predictions = read_predictions(self.reference / "published_det_c40.jsonl")
        twice = replace(predictions, rows=predictions.rows + predictions.rows[:100])
        measures = protocols.paper(twice)
        check_judgement(measures, EXPECTED["judgement_file_appended_by_a_second_partial_run"])
        assert "counted again: 100." in " ".join(measures.notes)

    def test_explanations(self):
        predictions = read_predictions(self.reference / "published_exp_c40.jsonl")
        truth = file_truth(self.reference / "test_c40.jsonl")
        measures = protocols.paper(predictions, references=truth.references)
        check_texts(measures, EXPECTED["explanation_published_outputs"], self.tolerance)

    def test_standard_judgements_count_words(self):
        """Two fakes that "unrealistic" made real are read rightly, one answer says neither."""
        predictions = read_predictions(self.reference / "published_det_c40.jsonl")
        truth = ddvqa_truth(task="judgement", data=self.reference.parent)
        measures = protocols.standard(join(truth, predictions), resamples=100)
        assert measures.figures["accuracy"].value == pytest.approx(133 / 144)
        assert measures.counts["unparsed"] == 1
        assert measures.counts["items"] == 144

    def test_standard_explanations_agree_and_say_what_questions_contain(self):
        predictions = read_predictions(self.reference / "published_exp_c40.jsonl")
        truth = ddvqa_truth(task="explanation", file=self.reference / "test_c40.jsonl")
        measures = protocols.standard(join(truth, predictions), resamples=0, java=False)
        found = {name: f for name, f in values(measures).items() if name in TEXTS.values()}
        expected = EXPECTED["explanation_published_outputs"]
        assert found == pytest.approx({TEXTS[k]: expected[k] for k in TEXTS}, abs=self.tolerance)
        assert "1,070 of 1,070 questions contain the label." in measures.notes
