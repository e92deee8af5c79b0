"""Hook of the documentation site: files outside ``docs/`` that its pages lead to.

``examples/``, the changelog and the page for contributors become part of the site. Links stay what
a code host needs, paths from file to file (``../examples/README.md``), and are turned here into
paths inside the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the examples, the changelog and the page for contributors."""
    found = [
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "examples").rglob("*")),
    ]
    for path in found:
        if path.is_file() and "__pycache__" not in path.parts:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between files of the site."""
    places = {str(Path(f.abs_src_path).resolve()): f.src_uri for f in files if f.abs_src_path}
    folder = Path(page.file.abs_src_path or "").parent
    here = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match[str]) -> str:
        place = places.get(str((folder / link[0]).resolve()))
        return posixpath.relpath(place, here or ".") if place else link[0]

    return LINK.sub(inside, markdown)
