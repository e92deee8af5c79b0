"""The robustness table of the lite detector's model card, on the DD-VQA test crops.

Run with: M2F2_DDVQA=FOLDER pytest tests/bench/test_lite_robustness.py -m bench -s
"""

from __future__ import annotations

import os
import time

import pytest

from m2f2cli.data.corruptions import CORRUPTIONS, SEVERITIES
from m2f2cli.data.samples import read_samples
from m2f2cli.evaluation.robustness import Row, sweep

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="M2F2_DDVQA is not set"),
]


def cell(row: Row) -> str:
    assert row.auc.value is not None
    inside = "" if row.in_domain is None else f", {row.in_domain:.0%}"
    return f"{row.auc.value:.2f} ({row.auc.low:.2f}–{row.auc.high:.2f}){inside}"


def test_table_of_the_card(tmp_path):
    samples = read_samples(f"ddvqa:{os.environ['M2F2_DDVQA']}/images/c40/test")
    started = time.perf_counter()
    found = sweep(
        samples,
        model="lite",
        folder=tmp_path / "sweep",
        corruptions=("corruptions",),
        split="test",
    )
    seconds = time.perf_counter() - started
    rows = {(row.corruption, row.severity): row for row in found.rows}
    clean = rows["none", 0]
    print(f"\n{len(samples)} crops, {len(rows)} conditions in {seconds:.0f} s")
    print(f"untouched: AUC {cell(clean)}; accuracy {clean.accuracy.value:.3f}\n")
    print("| corruption | " + " | ".join(f"severity {s}" for s in SEVERITIES) + " |")
    print("|---|" + "---|" * len(SEVERITIES))
    for name in CORRUPTIONS:
        print(f"| {name} | " + " | ".join(cell(rows[name, s]) for s in SEVERITIES) + " |")
    print("\naccuracy at the stored threshold; share uncertain")
    for name in CORRUPTIONS:
        told = (rows[name, s] for s in SEVERITIES)
        print(
            f"| {name} | " + " | ".join(f"{r.accuracy.value:.2f}; {r.uncertain:.0%}" for r in told)
        )
    assert len(rows) == 1 + 5 * len(CORRUPTIONS)
    assert {(row.judged, row.failed) for row in found.rows} == {(144, 0)}
