"""Imports point down only, nothing heavy is imported early, and the house rules hold."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "m2f2cli"
LAYERS = (
    {"files", "records", "registry", "errors", "runtime", "environment", "compat"},
    {"metrics"},
    {"options"},
    {"data"},
    {"models"},
    {"checkpoints"},
    {"training", "inference"},
    {"evaluation", "serving"},
    {"cli"},
    {"__main__", "__init__"},
)
# The ground and the command line import none of these at module level.
HEAVY = {"torch", "transformers", "timm", "open_clip", "safetensors", "dlib", "av", "PIL", "h5py"}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(part: str) -> int:
    return next(n for n, names in enumerate(LAYERS) if part in names)


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path, *, top_level: bool, members: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    nodes = tree.body if top_level else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "m2f2cli" or members:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    mine = part_of(path)
    for name in imports(path, top_level=False):
        if not name.startswith("m2f2cli."):
            continue
        other = name.split(".")[1]
        if other == mine or other.startswith("__"):
            continue
        same_ground = layer_of(other) == layer_of(mine) == 0
        assert same_ground or layer_of(other) < layer_of(mine), f"{mine} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_ground_and_command_line_import_nothing_heavy(path):
    if part_of(path) in {*LAYERS[0], *LAYERS[-2], *LAYERS[-1]}:
        assert not {n.split(".")[0] for n in imports(path, top_level=True)} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_fit_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"


def test_no_circle_of_imports():
    names = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in FILES}
    graph = {}
    for name, path in names.items():
        found = imports(path, top_level=False, members=True) & names.keys()
        graph[name] = found - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def private_names(path: Path) -> set[str]:
    """Private names of other libraries that a file uses: ``torch._x``, ``torch.ops.mkldnn._x``."""
    tree = ast.parse(path.read_text())
    outside: set[str] = set()
    found: set[str] = set()
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if modules and modules[0].split(".")[0] != "m2f2cli" and modules[0] != "__future__":
            outside |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
            found |= {m for m in modules if any(is_private(part) for part in m.split("."))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            chain = ast.unparse(node)
            if chain.split(".")[0] in outside:
                found.add(chain)
    return found - {"os._exit"}  # documented, for all its underscore


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_names_of_libraries_are_in_compat_alone(path):
    if path.stem != "compat":
        assert private_names(path) == set()


def test_no_drawers():
    names = {p.stem for p in FILES}
    assert not names & {"utils", "helpers", "common", "misc"}


def test_help_and_import_load_no_torch():
    code = (
        "import sys, m2f2cli\n"
        "from m2f2cli.cli.app import run\n"
        "run(['--help'])\n"
        "assert not {'torch', 'transformers', 'timm', 'numpy'} & set(sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
