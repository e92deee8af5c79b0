from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from m2f2cli.cli import app
from m2f2cli.data.clips import ClipWriter
from tests.inference.conftest import noise_picture

ANSWERS = {
    "5_000.jpg": "The image is real.",
    "5_003.jpg": "<s> It looks real. </s>",
    "0_024_073.jpg": "The image is fake.",
    "1_035_036.jpg": "A fake: the eyes are blurred.",
    "3_044_945.jpg": "The image is real.",
}
LABELS = {"5_000.jpg": 0, "5_003.jpg": 0, "0_024_073.jpg": 1, "1_035_036.jpg": 1}
LABELS["3_044_945.jpg"] = 1


def lines(path: Path, rows: Iterable[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def judged(tmp_path: Path) -> list[str]:
    """A command line about five answers, four of them right."""
    answers = [{"image": f"x/{k}", "prompt": "?", "text": v} for k, v in ANSWERS.items()]
    labels = [{"image": name, "label": label} for name, label in LABELS.items()]
    predictions = lines(tmp_path / "answers.jsonl", answers)
    truth = lines(tmp_path / "labels.jsonl", labels)
    return ["evaluate", "ddvqa", "--predictions", predictions, "--truth", truth]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        noise_picture(root / "real" / f"{number}.png", number)
        noise_picture(root / "fake" / f"{number}.png", number + 500)
    return root


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert app.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_strangers_gate_opens_at_60_and_shuts_at_99_percent(judged, capsys):
    assert app.run([*judged, "--min-accuracy", "0.6"]) == 0
    shown = capsys.readouterr()
    assert "0.8000" in shown.out
    assert "95 % interval" in shown.out
    assert "Counts: 5 items, 2 real, 3 fake, 5 answered." in shown.err
    assert app.run([*judged, "--min-accuracy", "0.99"]) == 4
    shown = capsys.readouterr()
    assert "error: accuracy is 0.800000, at least 0.99 was asked for." in shown.err
    assert app.run([*judged, "--min-auc", "0.1", "--quiet"]) == 4
    assert "frame_auc is not among" in capsys.readouterr().err


def test_json_is_the_report_and_nothing_else(judged, capsys, tmp_path):
    found = printed(capsys, *judged, "--report", str(tmp_path / "r"))
    assert found == json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["figures"]["accuracy"]["value"] == 0.8
    assert found["predictions"]["file"] == judged[3]
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "index.html", "report.json", "scored.jsonl",
    }  # fmt: skip


def test_drifts_are_named_and_a_report_passes_its_own_check(judged, capsys, tmp_path):
    report = tmp_path / "r"
    assert app.run([*judged, "--report", str(report)]) == 0
    assert app.run([*judged, "--check", str(report / "report.json")]) == 0
    expected = tmp_path / "expected.json"
    expected.write_text('{"accuracy": {"value": 0.81, "tolerance": 0.02}, "f1": 1, "auc": 1}')
    capsys.readouterr()
    assert app.run([*judged, "--check", str(expected)]) == 4
    shown = capsys.readouterr().err
    assert "error: f1 is 0.8, expected 1.0" in shown
    assert "error: auc is not in this report" in shown
    assert "accuracy is" not in shown


def test_missing_answers_exit_3_unless_a_gate_trips(judged, capsys):
    answers = Path(judged[3])
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:4]))
    assert app.run(judged) == 3
    assert "1 missing" in capsys.readouterr().err
    assert app.run([*judged, "--min-accuracy", "0.81"]) == 4
    assert app.run([*judged, "--min-accuracy", "0.8"]) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ddvqa"], 2, "There is nothing to measure"),
        (["images"], 2, "The folder of pictures is missing"),
        (["ffpp"], 2, "The folder of HDF5 files is missing"),
        (["images", "none"], 1, "no data folder 'none'"),
        (["ddvqa", "--predictions", "none.jsonl"], 1, "no file 'none.jsonl'"),
        (["ddvqa", "--predictions", "a", "--output", "b.jsonl"], 2, "--output is for a model"),
        (["ddvqa", "--predictions", "a", "--robustness"], 2, "now 'm2f2 robustness'"),
        (["images", "x", "--calibrate"], 2, "now 'm2f2 calibrate'"),
        (["images", "x", "--calibrated", "y"], 2, "now 'm2f2 calibrate --calibrated'"),
        (["images", "x", "--output", "y.csv"], 2, "must end in .jsonl"),
        (["images", "x", "--protocol", "papre"], 2, "Did you mean 'paper'?"),
        (["images", "x", "--min-auc", "1.5"], 2, "--min-auc must lie between 0 and 1"),
        (["images", "x", "--check", "none.json"], 1, "no file 'none.json'"),
        (["compare", "none", "none"], 1, "no file 'none'"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments, code, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app.run(["evaluate", *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert len(shown.err.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"image": "5_000.jpg", "text": "re', "is cut off"),
        ('{"image": "9.jpg", "text": "real"}\n', "is about an item of the truth"),
        ("%PDF-1.4", "no file of answers that m2f2 knows"),
    ],
)
def test_broken_answers_leave_no_report(judged, content, words, capsys, tmp_path):
    Path(judged[3]).write_text(content)
    assert app.run([*judged, "--report", str(tmp_path / "r")]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_labels_come_from_names_only_when_asked(judged, capsys):
    asked = judged[:4]
    assert app.run(asked) == 2
    assert "--truth-from-names" in capsys.readouterr().err
    found = printed(capsys, *asked, "--truth-from-names")
    assert found["per_kind"]["FaceSwap"]["accuracy"]["value"] == 0
    assert any("read from file names" in note for note in found["notes"])


def test_one_class_is_undefined_and_trips_a_gate_with_the_reason(capsys, tmp_path):
    records = tmp_path / "records.jsonl"
    rows = [record(f"real/{n}.png", 0.1 + n / 100) for n in range(3)]
    truth = lines(tmp_path / "t.jsonl", [{"image": f"real/{n}.png", "label": 0} for n in range(3)])
    command = ["evaluate", "images", "--predictions", lines(records, rows), "--truth", truth]
    found = printed(capsys, *command, "--report", str(tmp_path / "r"))
    assert found["figures"]["frame_auc"]["value"] is None
    assert app.run([*command, "--min-auc", "0.5"]) == 4
    assert "frame_auc is undefined (one class only" in capsys.readouterr().err
    assert "There is no ROC curve" in (tmp_path / "r" / "index.html").read_text()


def record(name: str, score: float) -> dict:
    """A record of detect, as far as an evaluation reads it."""
    return {
        "schema_version": 1, "path": name, "kind": "image", "status": "ok", "verdict": "real",
        "fake_probability": score, "in_domain": None, "threshold": 0.5, "model": "m",
        "model_fingerprint": "sha256:m",
    }  # fmt: skip


def test_named_kinds_of_forgery_are_counted_by_manipulation(capsys, tmp_path):
    names = {"a": None, "b": "edited", "c": "generated", "d": "generated", "e": "edited"}
    truth = [("a", 0, "real"), ("b", 0, "real"), ("c", 1, "GAN"), ("d", 1, "GAN"), ("e", 1, "GAN")]
    rows = [record(name, 0.9) | {"forgery": named} for name, named in names.items()]
    told = [{"path": name, "label": label, "kind": kind} for name, label, kind in truth]
    command = ["evaluate", "images", "--predictions", lines(tmp_path / "p.jsonl", rows)]
    command += ["--truth", lines(tmp_path / "t.jsonl", told), "--resamples", "0"]
    report = printed(capsys, *command, "--report", str(tmp_path / "r"))
    counted = {"GAN": {"edited": 1, "generated": 2}, "real": {"edited": 1}}
    assert report["forgeries"] == counted
    assert app.run(command) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["GAN", "1", "2"] in table
    assert ["real", "1", "0"] in table
    page = (tmp_path / "r" / "index.html").read_text()
    assert "How often a kind of forgery was named" in page
    plain = [
        {k: v for k, v in row.items() if k != "forgery"} for row in rows
    ]  # as older versions wrote them
    command[3] = lines(tmp_path / "old.jsonl", plain)
    assert printed(capsys, *command)["forgeries"] == {}


def test_a_model_is_run_first_and_resumed(pictures, tiny_detector_folder, capsys, tmp_path):
    report = tmp_path / "r"
    command = ["evaluate", "images", str(pictures), "--model", str(tiny_detector_folder)]
    found = printed(capsys, *command, "--report", str(report), "--resamples", "20")
    records = report / "predictions.jsonl"
    assert found["predictions"]["file"] == str(records)
    assert found["counts"]["answered"] == 48
    assert found["protocol"]["definition"]["resamples"] == 20
    whole = records.read_bytes()
    records.write_bytes(whole[: len(whole) // 2])
    again = printed(capsys, *command, "--report", str(report), "--resamples", "20")
    assert records.read_bytes() == whole
    assert again["figures"] == found["figures"]
    alone = printed(capsys, *command)
    assert alone["predictions"]["file"] is None
    assert alone["predictions"]["sha256"] == found["predictions"]["sha256"]


def test_a_picture_that_cannot_be_read_exits_3(tiny_detector_folder, capsys, tmp_path):
    for number in range(2):
        noise_picture(tmp_path / "d" / "real" / f"{number}.png", number)
        noise_picture(tmp_path / "d" / "fake" / f"{number}.png", number)
    (tmp_path / "d" / "fake" / "1.png").write_bytes(b"no picture")
    command = ["evaluate", "images", str(tmp_path / "d"), "--model", str(tiny_detector_folder)]
    assert app.run([*command, "--resamples", "0"]) == 3
    assert "1 failed" in capsys.readouterr().err


def test_calibrating_stores_a_copy_and_never_on_a_test_set(
    pictures, tiny_detector_folder, capsys, tmp_path
):
    command = ["calibrate", "images", str(pictures), "--model", str(tiny_detector_folder)]
    command += ["--calibrated", str(tmp_path / "c"), "--resamples", "0"]
    assert app.run([*command, "--split", "test"]) == 2
    assert "A test set is not for calibration" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert app.run([*command, "--target-fpr", "0.2"]) == 0
    assert "threshold" in capsys.readouterr().err
    stage = json.loads((tmp_path / "c" / "stage.json").read_text())
    assert stage["calibration"]["target_fpr"] == 0.2


def test_a_sweep_of_spoilt_pictures_goes_with_it(tiny_detector_folder, capsys, tmp_path):
    for number in range(2):
        noise_picture(tmp_path / "d" / "real" / f"{number}.png", number)
        noise_picture(tmp_path / "d" / "fake" / f"{number}.png", number + 9)
    command = ["robustness", "images", str(tmp_path / "d"), "--model", str(tiny_detector_folder)]
    assert app.run(command) == 2
    assert "m2f2 robustness needs a folder" in capsys.readouterr().err
    assert app.run(["robustness", "ddvqa", "--predictions", "a"]) == 2
    assert "--predictions" in capsys.readouterr().err
    command += ["--resamples", "0", "--robustness-dir", str(tmp_path / "s")]
    assert app.run([*command, "--corruptions", "fog"]) != 0
    assert "Use some of: corruptions, chains, jpeg" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    command += ["--corruptions", "chains", "--corruptions", "contrast"]
    assert app.run(command) == 0
    table = capsys.readouterr().out
    assert "Corruption" in table
    assert "Flipped" in table
    assert "messenger" in table
    assert (tmp_path / "s" / "robustness.json").is_file()


def test_videos_in_hdf5_are_measured_by_video(tiny_detector_folder, capsys, tmp_path):
    rng = np.random.default_rng(0)
    for file, keys in (("original", ("000", "003")), ("FaceSwap", ("000_003", "003_000"))):
        writer = ClipWriter(tmp_path / f"FF++_{file}_c40.h5")
        for key in keys:
            writer.write(key, rng.integers(0, 255, (5, 40, 40, 3), dtype=np.uint8))
        writer.finish()
    command = ["evaluate", "ffpp", str(tmp_path), "--model", str(tiny_detector_folder)]
    command += ["--compression", "c40", "--manipulations", "FaceSwap", "--split", "all"]
    found = printed(capsys, *command, "--frames", "3", "--resamples", "50")
    assert (found["counts"]["items"], found["counts"]["videos"]) == (12, 4)
    assert found["figures"]["video_auc"]["value"] is not None
    assert found["dataset"] == "ffpp"


def test_a_published_csv_needs_no_folder(capsys, tmp_path):
    rows = [f"{v}_{n},{v % 2},{0.3 + 0.4 * (v % 2)}" for v in range(6) for n in range(30)]
    csv = tmp_path / "frames.csv"
    csv.write_text("\n".join(["image_id,ground_truth,prediction", *rows]) + "\n")
    found = printed(capsys, "evaluate", "ffpp", "--predictions", str(csv))
    assert found["figures"]["video_auc"]["value"] == 1
    found = printed(capsys, "evaluate", "ffpp", "--predictions", str(csv), "--protocol", "paper")
    assert found["protocol"]["name"] == "paper"


def test_two_reports_side_by_side(judged, capsys, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert app.run([*judged, "--report", one]) == 0
    answers = Path(judged[3])
    answers.write_text(answers.read_text().replace("is real", "is fake"))
    assert app.run([*judged, "--report", two]) == 0
    capsys.readouterr()
    assert app.run(["evaluate", "compare", one, two, "--resamples", "50"]) == 0
    shown = capsys.readouterr()
    row = next(line for line in shown.out.splitlines() if line.startswith("accuracy"))
    assert row.split()[1:4] == ["0.8000", "0.8000", "+0.0000"]
    assert "1 only first right, 1 only second right" in shown.err
    found = printed(capsys, "evaluate", "compare", one, two, "--resamples", "50")
    assert found["kind"] == "comparison"
    assert found["figures"]["recall"]["difference"] == pytest.approx(1 / 3)


def test_different_data_are_compared_only_when_told(judged, capsys, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert app.run([*judged, "--report", one]) == 0
    Path(judged[5]).write_text("".join(Path(judged[5]).read_text().splitlines(True)[:4]))
    assert app.run([*judged, "--report", two]) == 0
    capsys.readouterr()
    assert app.run(["evaluate", "compare", one, two]) == 1
    assert "--common-items" in capsys.readouterr().err
    assert app.run(["evaluate", "compare", one, two, "--common-items"]) == 0
    assert "Compared on the 4 items" in capsys.readouterr().err


def test_flags_come_from_a_file_and_the_environment_too(judged, capsys, monkeypatch, tmp_path):
    config = tmp_path / "ci.yaml"
    config.write_text(f"predictions: {judged[3]}\ntruth: {judged[5]}\nmin-accuracy: 0.6\n")
    assert app.run(["evaluate", "ddvqa", "--config", str(config)]) == 0
    monkeypatch.setenv("M2F2_MIN_ACCURACY", "0.9")
    assert app.run(["evaluate", "ddvqa", "--config", str(config)]) == 4


def test_existing_files_are_evaluated_without_torch(judged, pictures, tmp_path):
    names = [f"{kind}/{n}.png" for kind in ("real", "fake") for n in range(24)]
    records = lines(tmp_path / "r.jsonl", [record(n, i / 48) for i, n in enumerate(names)])
    report = str(tmp_path / "report")
    calls = [
        [*judged, "--report", report],
        ["evaluate", "images", str(pictures), "--predictions", records, "--json"],
        ["evaluate", "compare", report, report],
    ]
    code = (
        "import sys\nfrom m2f2cli.cli.app import run\n"
        f"assert [run(call) for call in {calls!r}] == [0, 0, 0]\n"
        "heavy = {'torch', 'transformers', 'timm', 'dlib', 'av'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_only_the_page_is_refused(judged, tmp_path):
    code = (
        "import sys\nsys.modules['matplotlib'] = None\nfrom m2f2cli.cli.app import run\n"
        f"assert run({judged!r}) == 0\n"
        f"assert run({[*judged, '--report', str(tmp_path / 'r')]!r}) == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'm2f2cli[eval]'" in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="M2F2_DDVQA names no DD-VQA folder")
def test_the_published_answers_as_published(capsys):
    answers = Path(os.environ["M2F2_DDVQA"]) / "reference" / "published_det_c40.jsonl"
    command = ("evaluate", "ddvqa", "--predictions", str(answers))
    found = printed(capsys, *command, "--protocol", "paper")
    assert found["figures"]["accuracy"]["value"] == pytest.approx(0.944444, abs=1e-6)
    found = printed(capsys, *command, "--data", os.environ["M2F2_DDVQA"])
    assert found["counts"]["missing"] == 0
