"""Files that visitors sent: each in a folder of its own, gone as soon as it was answered."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from m2f2cli.errors import InputError, M2F2Error

MAX_BYTES = 100 * 2**20  # of one request
MAX_STORED = 20 * MAX_BYTES
MAX_AGE = 600.0  # seconds; a file that nobody asked about in that time is deleted
_NAME = re.compile(r"[^\w.\- ()]")


class Uploads:
    """A private folder for what visitors send. Nothing outside it is ever read for them.

    Args:
        folder: An empty folder that is ours alone; None makes one.

    Attributes:
        folder: It; the page's own pictures may lie in it beside what was sent.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or Path(tempfile.mkdtemp(prefix="m2f2-demo-"))).resolve()
        self._sent = self.folder / "sent"
        self._sent.mkdir()

    def store(self, name: str, content: BinaryIO) -> str:
        """Keep one file.

        Args:
            name: As the visitor calls it; only its last part is used.
            content: Is read to its end.

        Returns:
            Its path; the folder it is in cannot be guessed.

        Raises:
            M2F2Error: There is no room for it.
        """
        self.sweep(MAX_AGE)
        if self._stored() > MAX_STORED:
            raise M2F2Error("Too many files are waiting here.", "Try again in a few minutes.")
        place = self._sent / secrets.token_hex(16)
        place.mkdir()
        path = place / (_NAME.sub("_", Path(name).name)[-100:].lstrip(".") or "file")
        with open(path, "wb") as file:
            shutil.copyfileobj(content, file)
        return str(path)

    def holds(self, path: object) -> bool:
        """Whether something is the path of a file that was sent."""
        return _is_file_in(self._sent, path)

    def shows(self, path: str) -> bool:
        """Whether a path is one of a file that a page may load: sent, or the page's own."""
        return _is_file_in(self.folder, path)

    @contextmanager
    def taken(self, sent: object) -> Iterator[tuple[str, str]]:
        """Use an uploaded file for the last time: it is deleted afterwards.

        Args:
            sent: What a page or client tells of it: ``{"path": …, "orig_name": …}``.

        Yields:
            Its path, and the name that its owner knows it by.

        Raises:
            InputError: It is no upload.
        """
        about = sent if isinstance(sent, Mapping) else {}
        path: Any = about.get("path")
        if not self.holds(path):
            raise InputError("There is no such upload.", "missing", "Send the file again.")
        given = about.get("orig_name")
        name = Path(given).name[-200:] if isinstance(given, str) else ""
        try:
            yield path, name or Path(path).name
        finally:
            shutil.rmtree(Path(path).parent, ignore_errors=True)

    def sweep(self, age: float) -> None:
        """Delete what is older than so many seconds."""
        limit = time.time() - age
        for place in self._sent.iterdir():
            try:
                old = place.stat().st_mtime < limit
            except FileNotFoundError:
                continue
            if old:
                shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stored(self) -> int:
        total = 0
        for root, _, files in os.walk(self._sent):
            for name in files:
                try:
                    total += os.stat(os.path.join(root, name)).st_size
                except FileNotFoundError:
                    continue
        return total


def _is_file_in(folder: Path, path: object) -> bool:
    if not isinstance(path, str) or "\0" in path or not os.path.isabs(path):
        return False
    found = Path(os.path.realpath(path))
    return found.is_relative_to(folder) and found.is_file()
