"""What the documents say is true: links lead somewhere, commands parse and run, output is as shown.

A command of a page is run when all it needs is there (``documents.runs_here``): files of the
repository, stand-ins for what a reader would bring, or what earlier commands of the page made. A
command after a ``$`` is always run, and prints what is shown. Every other one must parse.
"""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from m2f2cli.cli import app
from m2f2cli.cli.reference import reference
from tests.documents import (
    PAGES,
    REFERENCE,
    ROOT,
    SCRIPTS,
    application,
    blocks,
    commands,
    mentions,
    name_of,
    parse,
    resolve,
    runs_here,
)
from tests.standins import bring

LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
PATH = re.compile(r"[\w.*-]*[/.-][\w/.*-]*")
WRITTEN = [page for page in PAGES if page != REFERENCE]  # by people
# The README's commands run always, those of the other pages with the slow tests.
RUN = [
    page if page == ROOT / "README.md" else pytest.param(page, marks=pytest.mark.slow)
    for page in WRITTEN
]
SCRIPT = re.compile(r"^ *python (examples/\S+\.py.*)$", re.MULTILINE)
SCRIPT_LINES = sorted({line for page in WRITTEN for line in SCRIPT.findall(page.read_text())})
EVERY_COMMAND = [command for page in [*PAGES, *SCRIPTS] for command in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=lambda command: command.place)
def test_commands_parse(command):
    parse(command.arguments)


def test_no_command_is_overlooked():
    """A plain search finds no command line that the reading of blocks does not."""
    for page in [*PAGES, *SCRIPTS]:
        begin = r"(?:^ *(?:\$ )?|&& |\|\| |-m(?:odule)? )m2f2(?:cli)? [a-z]"
        plain = re.findall(begin, page.read_text(), re.MULTILINE)
        assert len(plain) == len(list(commands(page))), name_of(page)


@pytest.mark.parametrize("line", ["detct a.jpg", "detect --colour", "detect --frames x", "merge"])
def test_a_wrong_command_does_not_parse(line):
    with pytest.raises(Exception, match=r"detct|colour|frames|valid|[Mm]issing|base"):
        parse(shlex.split(line))
    with pytest.raises(LookupError, match="faces takes"):
        parse(["detect", "a.jpg", "--faces", "some"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_exist(page):
    for words in mentions(page):
        if words.startswith("COMMAND"):
            continue
        command, rest = resolve([word for word in words.split() if word != "…"])
        family = [command, *getattr(command, "commands", {}).values()]
        known = {
            name for one in family for p in one.params for name in (*p.opts, *p.secondary_opts)
        }
        missing = {word for word in rest if word.startswith("--")} - known - {"--help"}
        assert not missing, f"m2f2 {words}"


def flags_of(command):
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts)}


def test_flags_in_the_documents_exist():
    known = {"--help", "--version"}
    family = list(application().commands.values())
    for command in family:
        family += getattr(command, "commands", {}).values()
        known |= flags_of(command)
    # Of torchrun and of the deepspeed launcher (--no_local_rank).
    foreign = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    foreign |= {"--hostfile", "--module", "--no"}
    foreign |= {"--dist", "--tags"}  # of pytest-xdist and git
    # Of examples/moderation/moderate.py.
    foreign |= {"--records", "--summary"}
    for page in PAGES:
        missing = set(FLAG.findall(page.read_text())) - known - foreign
        assert not missing, f"{page.name}: {sorted(missing)}"


def test_the_reference_is_fresh():
    assert REFERENCE.read_text(encoding="utf-8") == reference(), (
        "Run: python -m m2f2cli.cli.reference > docs/cli.md"
    )


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What readers would bring, under the names that the pages use."""
    return bring(tmp_path_factory.mktemp("reader"))


@pytest.fixture
def place(standins, tmp_path, monkeypatch) -> Path:
    """A folder of the reader's own to stand in."""
    folder = tmp_path / "place"
    shutil.copytree(standins, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("M2F2_MAX_NEW_TOKENS", "8")  # of an explainer with random weights
    return folder


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_commands_run_and_print_what_is_shown(page, place, capfd):
    for command in commands(page):
        if not runs_here(command) and command.shown is None:
            continue
        code = app.run(command.arguments)
        printed = capfd.readouterr()
        gated = bool({"--fail-on", "--min-auc", "--min-accuracy"} & set(command.arguments))
        allowed = {command.code or 0, 4} if gated and not command.code else {command.code or 0}
        assert code in allowed, f"{command.place}: {printed.err}"
        if command.shown:
            lines = [line.rstrip() for line in (printed.out + printed.err).splitlines()]
            assert re.fullmatch(_pattern(command.shown), "\n".join(lines)), (
                f"{command.place} prints:\n" + "\n".join(lines)
            )


def _pattern(shown: list[str]) -> str:
    """A line ``…`` stands for any lines."""
    lines = [r"(?:.*\n?)*?" if line == "…" else re.escape(line) + r"\n?" for line in shown]
    return "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_slow_commands_run(page, place, capfd, monkeypatch):
    monkeypatch.setenv("M2F2_EPOCHS", "1")
    monkeypatch.setenv("M2F2_TRAIN", "head")
    for command in commands(page):
        if runs_here(command, patiently=True) and not runs_here(command):
            shutil.rmtree("my-detector", ignore_errors=True)  # what training makes in its place
            assert app.run(command.arguments) == 0, capfd.readouterr().err


def test_most_commands_of_the_first_pages_run(place):
    """The rule that decides what is run does not quietly leave everything out."""
    for page, least in (("README.md", 3), ("docs/index.md", 8), ("docs/detect.md", 4)):
        ready = [c for c in commands(ROOT / page) if runs_here(c)]
        assert len(ready) >= least, page


@pytest.mark.slow
@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_python_in_the_documents_runs(page, place, capfd):
    for block in blocks(page):
        if block.language != "python" or block.title:
            continue
        code = "\n".join(block.lines)
        tree = ast.parse(code)
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        paths = [text for text in texts if isinstance(text, str) and PATH.fullmatch(text)]
        if all(Path(path).exists() for path in paths):
            exec(compile(tree, f"{name_of(page)}:{block.line}", "exec"), {"__name__": "__main__"})
            continue
        for node in ast.walk(tree):  # what it imports must be there
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name), code


@pytest.mark.slow
@pytest.mark.parametrize("line", SCRIPT_LINES)
def test_scripts_in_the_documents_run(line, place, capfd, monkeypatch):
    script, *arguments = shlex.split(line)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    code = None
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code, capfd.readouterr().err
