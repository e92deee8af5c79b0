"""What the documents say is true: links lead somewhere, README commands run, flags exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")
COMMAND = re.compile(r"^ +\$ (m2f2 .+)$", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.mark.parametrize("command", COMMAND.findall((ROOT / "README.md").read_text()))
def test_readme_commands_run(command, workplace):
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "m2f2cli", *arguments],
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_flags_in_the_documents_exist():
    import typer.main

    from m2f2cli.cli.app import build

    known = {"--help", "--version"}
    commands = list(typer.main.get_group(build()).commands.values())
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    # Of torchrun and of the deepspeed launcher (--no_local_rank).
    foreign = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    foreign |= {"--hostfile", "--module", "--no"}
    for page in PAGES:
        missing = set(FLAG.findall(page.read_text())) - known - foreign
        assert not missing, f"{page.name}: {sorted(missing)}"
