"""What stands between the network and the page: password, origin, addresses, sizes, uploads.

The web framework behind it offers more than the page needs, among it fetching of addresses and of
files. Only what is listed here gets through. Each uploaded file lies in a folder of its own and is
deleted as soon as it was answered.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections import Counter
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
from m2f2cli.files import is_alive

MAX_FILES = 50  # of one request
MAX_JSON = 2**20  # bytes
_API = "/gradio_api"
_GET = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.+"
    rf"|{_API}/(info/?|startup-events|app_id|queue/data|heartbeat/\w+|call/\w+/\w+|theme\.css)"
)
_POST = re.compile(rf"{_API}/(upload|queue/join|call/\w+|cancel|reset)/?")
_FILE = f"{_API}/file="
# What stays open while a page is looked at, or until an answer comes.
_STREAM = re.compile(rf"{_API}/(queue/data|heartbeat/\w+|call/\w+/\w+)")
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
MAX_STORED = 20 * MAX_BYTES  # of all uploads, those on their way too
MAX_COMING = 3 * MAX_BYTES  # on their way from one visitor
MAX_OPEN = 128  # requests of one visitor at a time, and as many streams
PAUSE = 30.0  # seconds without a byte of a body after which its request is dropped
MAX_SENDING = 600.0  # seconds for a whole body
MAX_AGE = 600.0  # seconds; a file that nobody asked about in that time is deleted
_NAME = re.compile(r"[^\w.\- ()]")
_FOLDER = re.compile(r"m2f2-demo-(\d+)-\w+")  # the number is that of the process
_log = logging.getLogger("m2f2.demo")


class Uploads:
    """A private folder for what visitors send. Nothing outside it is ever read for them.

    ``folder`` is empty and ours alone, by default a new one, before which those of killed pages are
    removed; the page's own pictures may lie in it beside what was sent.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or _private_folder()).resolve()
        self._sent = self.folder / "sent"
        self._sent.mkdir()

    def store(self, name: str, content: BinaryIO) -> str:
        """Keep one file and tell its path; the folder it is in cannot be guessed.

        Args:
            name: As the visitor calls it; only its last part is used.
            content: Is read to its end.

        Raises:
            M2F2Error: There is no room for it.
            OSError: The disk refuses; nothing of it is left.
        """
        self.sweep()
        if self.size() > MAX_STORED:
            raise M2F2Error("Too many files are waiting here.", "Try again in a few minutes.")
        place = self._sent / secrets.token_hex(16)
        path = place / (_NAME.sub("_", Path(name).name)[-100:].lstrip(".") or "file")
        try:
            place.mkdir()
            with open(path, "wb") as file:
                shutil.copyfileobj(content, file)
        except OSError:
            self.drop(str(path))
            raise
        return str(path)

    def size(self) -> int:
        """Bytes of all files that were sent."""
        return sum(_size(path) for path in self._sent.glob("*/*"))

    def drop(self, path: str) -> None:
        """Delete one file of ``store``."""
        shutil.rmtree(Path(path).parent, ignore_errors=True)

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
            self.drop(path)

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


def _private_folder() -> Path:
    for left in Path(tempfile.gettempdir()).glob("m2f2-demo-*"):
        owner = _FOLDER.fullmatch(left.name)
        if owner and (int(owner[1]) == os.getpid() or not is_alive(int(owner[1]))):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"m2f2-demo-{os.getpid()}-"))


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
        takes: How many values each function of ``app`` takes, by its name and by its number.
    """

    def __init__(
        self,
        app: ASGIApp,
        uploads: Uploads,
        password: str | None = None,
        hosts: Iterable[str] = (),
        takes: Mapping[str, int] | None = None,
    ) -> None:
        self._app, self._uploads, self._hosts = app, uploads, frozenset(hosts)
        self._password = None if password is None else password.encode()
        self._takes = takes or {}
        self._open: Counter[tuple[str, bool]] = Counter()  # requests and streams of each visitor
        self._coming: Counter[str] = Counter()  # bytes of bodies of each visitor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a WebSocket, which nothing here uses: unanswered, the server refuses it

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Leave for other sites to read the answers is never given.
                own = [
                    pair
                    for pair in message.get("headers", ())
                    if not pair[0].lower().startswith(b"access-control-")
                ]
                message = {**message, "headers": [*own, *_HEADERS]}
            await send(message)

        try:
            with self._admitted(_visitor(scope), bool(_STREAM.fullmatch(scope["path"]))):
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
            with self._limited(scope, receive, MAX_BYTES) as limited:
                paths = await self._stored(Request(scope, limited))
            await JSONResponse(paths)(scope, receive, send)
        else:
            with self._limited(scope, receive, MAX_JSON) as limited:
                body = await _whole(Request(scope, limited))
            self._check_body(path, body)
            await self._app(scope, _replayed(body, receive), send)

    @contextmanager
    def _admitted(self, visitor: str, stream: bool) -> Iterator[None]:
        """Refuse more requests, or streams, of one visitor than may be open together."""
        if self._open[visitor, stream] >= MAX_OPEN:
            raise HTTPException(429, "Too many requests of yours are open. Try again later.")
        self._open[visitor, stream] += 1
        try:
            yield
        finally:
            self._open[visitor, stream] -= 1
            self._open += Counter()  # forgets who has left

    @contextmanager
    def _limited(self, scope: Scope, receive: Receive, limit: int) -> Iterator[Receive]:
        """Stop reading a body that is too long, too slow, or more than there is room for.

        One that says so itself is not begun.
        """
        too_long = HTTPException(413, f"More than {limit / 2**20:.0f} MB are not taken.")
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            raise too_long
        visitor, seen = _visitor(scope), 0
        room = MAX_STORED - self._uploads.size()
        end = time.monotonic() + MAX_SENDING

        async def counted() -> Message:
            nonlocal seen
            wait = min(PAUSE, end - time.monotonic())
            try:
                message = await asyncio.wait_for(receive(), max(wait, 0.0))
            except asyncio.TimeoutError as error:
                raise HTTPException(408, "The request took too long to arrive.") from error
            size = len(message.get("body", b""))
            seen += size
            self._coming[visitor] += size
            if seen > limit:
                raise too_long
            if self._coming[visitor] > MAX_COMING or self._coming.total() > room:
                raise HTTPException(503, "Too many files are being sent. Try again in a minute.")
            return message

        try:
            yield counted
        finally:
            self._coming[visitor] -= seen
            self._coming += Counter()

    def _check_visitor(self, headers: Headers) -> None:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self._hosts and re.sub(r":\d+$", "", host) not in self._hosts:
            raise HTTPException(421, "This server does not go by that name.")
        if origin is not None and origin.lower().partition("://")[2] != host:
            raise HTTPException(403, "Another site's page may not ask for anything here.")
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

    def _check_body(self, path: str, body: bytes) -> None:
        """Refuse a request that names a file which is no upload, or an address to fetch.

        Also one for a function that is not there, or with too few values for it.
        """
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
        values = content.get("data") if isinstance(content, dict) else None
        if not isinstance(values, list) or not self._takes:
            return  # the page says what is wrong with it
        function = path.partition("/call/")[2].strip("/") or str(content.get("fn_index"))
        needed = self._takes.get(function)
        if needed is None:
            raise HTTPException(404, "There is no such function.")
        if len(values) < needed:
            raise HTTPException(400, f"'data' holds {len(values)} values, {needed} are needed.")

    async def _stored(self, request: Request) -> list[str]:
        """The paths of the files that a form holds."""
        paths: list[str] = []
        try:
            async with request.form(max_files=MAX_FILES, max_fields=8) as form:
                for item in form.getlist("files"):
                    if not isinstance(item, str):
                        paths.append(self._uploads.store(item.filename or "", item.file))
            if not paths:
                raise HTTPException(400, "The upload holds no file.")
            return paths
        except (MultiPartException, ClientDisconnect) as error:
            refusal = HTTPException(400, "The upload cannot be read, or was cut off.")
            cause: Exception = error
        except M2F2Error as error:
            refusal, cause = HTTPException(503, f"{error.message} {error.hint}"), error
        except OSError as error:
            _log.error("An upload could not be kept: %s", error.strerror or error)
            refusal = HTTPException(503, "There is no room for files here. Try again later.")
            cause = error
        for path in paths:
            self._uploads.drop(path)
        raise refusal from cause


def _visitor(scope: Scope) -> str:
    """The address that a request comes from."""
    client = scope.get("client")
    return str(client[0]) if client else ""


async def _whole(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise HTTPException(400, "The request was cut off.") from error


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already, then whatever comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
