"""The program in docs/demo.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from m2f2cli.options.explain import ExplainOptions
from m2f2cli.serving.gate import Uploads
from tests.serving.live import served

ROOT = Path(__file__).parents[2]


def test_the_snippet_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "demo.md").read_text()
    snippet = re.search(r"```python[^\n]*\n(.*?)```", page, re.DOTALL)
    assert snippet
    monkeypatch.chdir(ROOT)
    with served("lite", Uploads(tmp_path), ExplainOptions()) as url:
        exec(snippet[1].replace("http://127.0.0.1:7860", url), {})
    verdict, score = capsys.readouterr().out.split()[-2:]
    assert verdict in ("real", "fake", "uncertain")
    assert float(score) == pytest.approx(0.214, abs=0.01)
