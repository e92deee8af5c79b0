"""What ``import m2f2cli`` offers: each name is there, typed, and loads only when it is used."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import m2f2cli
from tests.documents import ROOT

SOURCE = Path(m2f2cli.__file__).read_text()
NAMES = [name for name in m2f2cli.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name):
    found = getattr(m2f2cli, name)
    assert found.__name__ == name
    assert found.__doc__
    assert name in dir(m2f2cli)


def test_other_names_are_an_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = m2f2cli.nothing


def test_type_checkers_see_the_names_where_they_are():
    (typing,) = (
        node
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.name: node.module
        for node in typing.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(NAMES)
    for name, module in seen.items():
        assert getattr(m2f2cli, name) is getattr(importlib.import_module(module or ""), name)


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, m2f2cli\ndir(m2f2cli)\n"
        "assert not {'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_python_page_needs_nothing_deeper():
    page = (ROOT / "docs" / "python.md").read_text()
    assert set(re.findall(r"(?:from|import) (m2f2cli[\w.]*)", page)) <= {
        "m2f2cli",
        "m2f2cli.errors",
    }
    for name in NAMES:
        assert name in page, name


def test_one_version_everywhere():
    version = m2f2cli.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text()
