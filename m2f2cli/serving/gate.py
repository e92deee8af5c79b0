"""What stands between the network and the page: password, host, known addresses, sizes, uploads.

The web framework behind it offers more than the page needs, among it fetching of addresses and of
files. Only what is listed here gets through. Each uploaded file lies in a folder of its own and is
deleted as soon as it was answered.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m2f2cli.errors import InputError, M2F2Error

MAX_FILES = 50  # of one request
MAX_JSON = 2**20  # bytes
_API = "/gradio_api"
_GET = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.+"
    rf"|{_API}/(info/?|startup-events|app_id|queue/data|heartbeat/\w+|call/\w+/\w+|theme\.css)"
)
_POST = re.compile(rf"{_API}/(upload|queue/join|call/\w+|cancel|reset)/?")
_FILE = f"{_API}/file="
# The page's own scripts and styles stand in it; nothing is loaded from, or sent to, anywhere else.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
MAX_BYTES = 100 * 2**20  # of one request
MAX_STORED = 20 * MAX_BYTES
MAX_AGE = 600.0  # seconds; a file that nobody asked about in that time is deleted
_NAME = re.compile(r"[^\w.\- ()]")


class Uploads:
    """A private folder for what visitors send. Nothing outside it is ever read for them.

    ``folder`` is empty and ours alone, by default a new one; the page's own pictures may lie in it
    beside what was sent.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or Path(tempfile.mkdtemp(prefix="m2f2-demo-"))).resolve()
        self._sent = self.folder / "sent"
        self._sent.mkdir()

    def store(self, name: str, content: BinaryIO) -> str:
        """Keep one file and tell its path; the folder it is in cannot be guessed.

        Args:
            name: As the visitor calls it; only its last part is used.
            content: Is read to its end.

        Raises:
            M2F2Error: There is no room for it.
        """
        self.sweep()
        if sum(_size(path) for path in self._sent.glob("*/*")) > MAX_STORED:
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
        """Use an uploaded file, told of as ``{"path": …, "orig_name": …}``, for the last time.

        Yields:
            Its path, and the name that its owner knows it by; it is deleted afterwards.

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

    def sweep(self) -> None:
        """Delete what nobody asked about in ``MAX_AGE`` seconds."""
        limit = time.time() - MAX_AGE
        for place in self._sent.iterdir():
            with suppress(FileNotFoundError):
                if place.stat().st_mtime < limit:
                    shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_file_in(folder: Path, path: object) -> bool:
    if not isinstance(path, str) or "\0" in path or not os.path.isabs(path):
        return False
    found = Path(os.path.realpath(path))
    return found.is_relative_to(folder) and found.is_file()


class Gate:
    """An ASGI application around another one.

    Args:
        app: What is behind it.
        uploads: Where files go, and the only place that files are served from.
        password: ``USER:PASS`` that every request has to bring (HTTP Basic); None for none.
        hosts: Names that requests may call this server by; empty for any.
    """

    def __init__(
        self,
        app: ASGIApp,
        uploads: Uploads,
        password: str | None = None,
        hosts: Iterable[str] = (),
    ) -> None:
        self._app, self._uploads, self._hosts = app, uploads, frozenset(hosts)
        self._password = None if password is None else password.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a WebSocket, which nothing here uses: unanswered, the server refuses it

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            await self._pass(scope, receive, guarded)
        except HTTPException as refusal:
            answer = JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers)
            await answer(scope, receive, guarded)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._check_visitor(headers)
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            if path == f"{_API}/upload_progress":  # asked for while a file goes to our own store
                await Response(status_code=204)(scope, receive, send)
                return
            if path.startswith(_FILE):
                if not self._uploads.shows(path.removeprefix(_FILE)):
                    raise HTTPException(403, "There is no such upload.")
            elif not _GET.fullmatch(path) or ".." in path:
                raise HTTPException(404, "There is nothing here.")
            await self._app(scope, receive, send)
        elif method != "POST" or not _POST.fullmatch(path):
            raise HTTPException(404 if method == "POST" else 405, "There is nothing here.")
        elif path.startswith(f"{_API}/upload"):
            request = Request(scope, _limited(receive, headers, MAX_BYTES))
            await JSONResponse(await self._stored(request))(scope, receive, send)
        else:
            try:
                body = await Request(scope, _limited(receive, headers, MAX_JSON)).body()
            except ClientDisconnect as error:
                raise HTTPException(400, "The request was cut off.") from error
            self._check_files(body)
            await self._app(scope, _replayed(body, receive), send)

    def _check_visitor(self, headers: Headers) -> None:
        name = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if self._hosts and name not in self._hosts:
            raise HTTPException(421, "This server does not go by that name.")
        if self._password is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        try:
            known = kind.lower() == "basic" and secrets.compare_digest(
                base64.b64decode(given, validate=True), self._password
            )
        except ValueError:
            known = False
        if not known:
            asked = {"www-authenticate": 'Basic realm="m2f2", charset="UTF-8"'}
            raise HTTPException(401, "A user name and a password are needed.", asked)

    def _check_files(self, body: bytes) -> None:
        """Refuse a request that names a file which is no upload, or an address to fetch."""
        try:
            content = json.loads(body or b"null")
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, "The request is not JSON.") from error
        pending = [content]
        while pending:
            item = pending.pop()
            if isinstance(item, dict):
                if "path" in item and not self._uploads.holds(item["path"]):
                    raise HTTPException(400, "Only uploaded files are read, no paths or addresses.")
                pending += item.values()
            elif isinstance(item, list):
                pending += item

    async def _stored(self, request: Request) -> list[str]:
        """The paths of the files that a form holds."""
        try:
            async with request.form(max_files=MAX_FILES, max_fields=8) as form:
                sent = [item for item in form.getlist("files") if not isinstance(item, str)]
                paths = [self._uploads.store(f.filename or "", f.file) for f in sent]
        except MultiPartException as error:
            raise HTTPException(400, "The upload cannot be read.") from error
        except M2F2Error as error:
            raise HTTPException(503, f"{error.message} {error.hint}") from error
        if not paths:
            raise HTTPException(400, "The upload holds no file.")
        return paths


def _limited(receive: Receive, headers: Headers, limit: int) -> Receive:
    """Stop reading a body that is too long; one that says so itself is not begun."""
    refusal = HTTPException(413, f"More than {limit / 2**20:.0f} MB are not taken.")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise refusal
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise refusal
        return message

    return counted


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already, then whatever comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
