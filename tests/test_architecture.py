"""The four paths of ``docs/architecture.md`` are what really happens.

Each command runs once to load everything and once watched: which files of the package have a
function called. Imports do not count. A path on the page names, in order, the files that the
picture, tensor or question passes; a package the page lists as beside the path (options, loading of
checkpoints, the ground) may be entered, anything else may not.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from inspect import CO_OPTIMIZED
from pathlib import Path
from typing import Any

import pytest
import torch

import m2f2cli
from m2f2cli.cli.app import run
from tests.checkpoints import merges
from tests.documents import ROOT
from tests.training.conftest import clip_folder, toy_data  # noqa: F401 - fixtures

PACKAGE = Path(m2f2cli.__file__).parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PHOTO = ROOT / "examples" / "astronaut.jpg"
MOST = {"detect": 6, "merge": 4, "explain": 7, "train-detector": 7}


def entered(body: Callable[[], Any]) -> list[str]:
    """Files of the package whose functions a call enters, in the order of the first time."""
    seen: dict[str, None] = {}

    def look(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & CO_OPTIMIZED:  # no module or class body
            path = Path(code.co_filename)
            if path.is_relative_to(PACKAGE):
                seen[path.relative_to(PACKAGE).with_suffix("").as_posix()] = None

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        body()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(seen)


def path_of(command: str) -> tuple[list[str], list[str]]:
    """(files of a path, files and packages beside it), as the page names them."""
    section = PAGE.split(f"### `{command}`")[1].split("\n### ")[0].split("\n## ")[0]
    along = re.findall(r"^\d+\. `([\w/]+)`", section, re.MULTILINE)
    (beside,) = re.findall(r"^Beside it: (.*?)\.$", section, re.MULTILINE | re.DOTALL)
    return along, re.findall(r"`([\w/]+)`", beside)


@pytest.fixture
def arguments(
    tiny_detector_folder: Path,
    toy_data: Path,  # noqa: F811
    clip_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> Callable[[str, str], list[str]]:
    """The arguments of a small run of a command; a second run needs another output."""
    base, delta = tmp_path / "base", tmp_path / "delta"

    def build(command: str, output: str) -> list[str]:
        place = str(tmp_path / output)
        if command == "detect":
            return [str(PHOTO), "--model", str(tiny_detector_folder), "--output", f"{place}.jsonl"]
        if command == "explain":
            return [str(PHOTO), "--region", "eyes", "--output", f"{place}.jsonl"]
        if command == "merge":
            if not base.exists():
                merges.base(base, torch.float16)
                merges.stage_2(delta, base)
            return ["--base", str(base), "--delta", str(delta), "--output", place]
        return [
            "--data", str(toy_data), "--model", str(tiny_detector_folder), "--output", place,
            "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--limit", "8",
        ]  # fmt: skip

    return build


@pytest.mark.slow
@pytest.mark.parametrize("command", MOST)
def test_a_path_is_as_the_page_says(command, arguments, capsys):
    assert run([command, *arguments(command, "first")]) == 0, capsys.readouterr().err
    files = entered(lambda: run([command, *arguments(command, "second")]))
    along, beside = path_of(command)
    assert len(along) <= MOST[command]
    assert [file for file in along if file not in files] == []
    parts = {*along, *beside}
    unnamed = [f for f in files if not {f, *(p.as_posix() for p in Path(f).parents)} & parts]
    assert unnamed == []
