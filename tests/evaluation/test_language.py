"""Texts against references: pycocoevalcap's own figures, Java's programs, and what is not there."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pycocoevalcap
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f2cli.errors import MissingExtraError
from m2f2cli.evaluation.language import java_score, score_texts

REFERENCES = {
    "a": ("the nose is overly smooth", "the nose lacks detail"),
    "b": ("both eyes look alike",),
    "c": ("there is a boundary around the mouth",),
}
ANSWERS = {"c": "a boundary around the mouth", "a": "the nose is smooth", "b": "Both eyes"}


@st.composite
def corpora(draw):
    text = st.lists(st.sampled_from(["the", "nose", "is", "Is", "smooth", "."]), max_size=7)
    texts = st.lists(text.map(" ".join), min_size=1, max_size=3)
    references = draw(st.lists(texts, min_size=1, max_size=6))
    answers = draw(st.lists(text, min_size=len(references), max_size=len(references)))
    return (
        {str(n): tuple(texts) for n, texts in enumerate(references)},
        {str(n): " ".join(words) for n, words in enumerate(answers)},
    )


@given(corpora())
def test_figures_are_those_of_pycocoevalcap(corpus):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, answers = corpus
    found = score_texts(references, answers).measure(np.ones((1, len(references))))
    truth = {key: list(texts) for key, texts in references.items()}
    given_ = {key: [text] for key, text in answers.items()}
    if not any(text for texts in references.values() for text in texts):
        assert found["cider"] == 0  # pycocoevalcap stops at references without a word
        return
    bleu, _ = Bleu(4).compute_score(truth, given_, verbose=0)
    assert [found[f"bleu_{n}"][0] for n in (1, 2, 3, 4)] == pytest.approx(bleu, abs=1e-12)
    assert found["bleu"] == pytest.approx(np.mean(bleu), abs=1e-12)
    assert found["rouge_l"] == pytest.approx(Rouge().compute_score(truth, given_)[0], abs=1e-12)
    assert found["cider"] == pytest.approx(Cider().compute_score(truth, given_)[0], abs=1e-12)


def test_a_weight_counts_an_answer_several_times():
    texts = score_texts(REFERENCES, ANSWERS)
    twice = score_texts(
        {**REFERENCES, "again": REFERENCES["b"]}, {**ANSWERS, "again": ANSWERS["b"]}
    )
    weighted = texts.measure(np.array([[1, 2, 1]]))
    for name in ("bleu_1", "bleu_4", "rouge_l"):  # CIDEr's rarity is of the whole set
        assert weighted[name] == pytest.approx(twice.measure(np.ones((1, 4)))[name])


def test_nothing_is_printed(capfd):
    score_texts(REFERENCES, ANSWERS)
    assert capfd.readouterr() == ("", "")


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu_scorer", None)
    with pytest.raises(MissingExtraError, match="pycocoevalcap") as caught:
        score_texts(REFERENCES, ANSWERS)
    assert caught.value.hint == "pip install 'm2f2cli[eval]'"


def install_java(tmp_path, monkeypatch, body):
    """A program named java, first and only on the path."""
    program = tmp_path / "java"
    program.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))


METEOR = """
for row in sys.stdin:
    if row.startswith("SCORE"):
        print(row.count("|||"), flush=True)
    else:
        assert row.startswith("EVAL") and row.split("|||")[1:] == [" 3 ", " 2 ", " 2\\n"], row
        print("0.5\\n" * row.count("|||") + "0.25", flush=True)
"""
SPICE = """
rows = json.load(open(sys.argv[4]))
assert os.path.dirname(sys.argv[4]) != os.getcwd()  # nothing is written beside the program
scores = [{"image_id": r["image_id"], "scores": {"All": {"f": 0.5}}} for r in rows]
json.dump(scores, open(sys.argv[sys.argv.index('-out') + 1], "w"))
"""


def test_without_java_both_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for program in ("meteor", "spice"):
        skipped = java_score(program, REFERENCES, ANSWERS)
        assert skipped == (None, "skipped: there is no program 'java'")


def test_meteor_speaks_its_protocol(tmp_path, monkeypatch):
    install_java(tmp_path, monkeypatch, METEOR)
    assert java_score("meteor", REFERENCES, {**ANSWERS, "a": "two\nlines ||| and bars"}) == (
        0.25,
        None,
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("time.sleep(60)", "not done within 0.5 seconds"),
        ("sys.exit('out of memory')", r"ended early \(out of memory\)"),
        ("print('hello')", r"ended early \(no message\)"),
        ("print('x\\n' * 9, flush=True); sys.stdin.read()", "not understood"),
        ("print('nan\\n' * 9, flush=True); sys.stdin.read()", "no number"),
    ],
)
def test_a_java_that_fails_is_a_reason(tmp_path, monkeypatch, body, reason):
    install_java(tmp_path, monkeypatch, body)
    timeout = 0.5 if "sleep" in body else 30
    value, said = java_score("meteor", REFERENCES, ANSWERS, timeout=timeout)
    assert value is None
    assert re.search(reason, said)


def test_a_java_that_ends_while_it_is_asked_is_a_reason(tmp_path, monkeypatch):
    body = "sys.stdin.readline(); os.close(0); print('1', flush=True); time.sleep(60)"
    install_java(tmp_path, monkeypatch, body)
    value, said = java_score(
        "meteor", {"a": ["one"], "b": ["two"]}, {"a": "one", "b": "two"}, timeout=20
    )
    assert value is None
    assert re.search(r"ended early \(no message\)", said)


def test_spice_needs_models_that_are_never_fetched(tmp_path, monkeypatch):
    install_java(tmp_path, monkeypatch, SPICE)
    value, reason = java_score("spice", REFERENCES, ANSWERS)
    assert value is None
    assert "Stanford CoreNLP" in reason
    package = tmp_path / "pycocoevalcap"
    shutil.copytree(Path(pycocoevalcap.__path__[0]) / "spice", package / "spice")
    (package / "__init__.py").touch()
    (package / "spice" / "lib" / "stanford-corenlp-3.6.0.jar").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    assert java_score("spice", REFERENCES, ANSWERS) == (0.5, None)
    assert not (package / "spice" / "tmp").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")
def test_real_meteor():
    value, reason = java_score(
        "meteor", REFERENCES, {key: texts[0] for key, texts in REFERENCES.items()}
    )
    assert reason is None
    assert value > 0.9
