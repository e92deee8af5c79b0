"""What stands between the network and the page: password, host, known addresses, sizes, uploads.

The web framework behind it offers more than the page needs, among it fetching of addresses and of
files. Only what is listed here gets through.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from m2f2cli.errors import M2F2Error
from m2f2cli.serving.uploads import MAX_BYTES, Uploads

Scope = Mapping[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

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


class RefusalError(Exception):
    """A request that does not get through.

    Args:
        status: Of the answer.
        sentence: Why, for whoever sent it.
        headers: Of the answer.
    """

    def __init__(
        self, status: int, sentence: str, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, list(headers)


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
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
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
        except RefusalError as refusal:
            plain = {"detail": refusal.sentence}
            await _answer(guarded, plain, status=refusal.status, headers=refusal.headers)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._check_visitor(headers)
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            if path == f"{_API}/upload_progress":  # asked for while a file goes to our own store
                raise RefusalError(204, "")
            if path.startswith(_FILE):
                if not self._uploads.shows(path.removeprefix(_FILE)):
                    raise RefusalError(403, "There is no such upload.")
            elif not _GET.fullmatch(path) or ".." in path:
                raise RefusalError(404, "There is nothing here.")
            await self._app(scope, receive, send)
            return
        if method != "POST" or not _POST.fullmatch(path):
            raise RefusalError(404 if method == "POST" else 405, "There is nothing here.")
        takes_files = path.startswith(f"{_API}/upload")
        limit = MAX_BYTES if takes_files else MAX_JSON
        receive = _limited(receive, headers, limit)
        if takes_files:
            await self._upload(scope, receive, send)
            return
        body = await _whole(receive)
        self._check_files(body)
        await self._app(scope, _replayed(body, receive), send)

    def _check_visitor(self, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").rpartition(":")
        name = host[0] if host[1] and host[2].isdigit() else "".join(host)
        if self._hosts and name.lower() not in self._hosts:
            raise RefusalError(421, "This server does not go by that name.")
        if self._password is None:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        try:
            known = kind.lower() == b"basic" and secrets.compare_digest(
                base64.b64decode(given, validate=True), self._password
            )
        except ValueError:
            known = False
        if not known:
            asked = [(b"www-authenticate", b'Basic realm="m2f2", charset="UTF-8"')]
            raise RefusalError(401, "A user name and a password are needed.", asked)

    def _check_files(self, body: bytes) -> None:
        """Refuse a request that names a file which is no upload, or an address to fetch."""
        try:
            content = json.loads(body or b"null")
        except (ValueError, RecursionError) as error:
            raise RefusalError(400, "The request is not JSON.") from error
        pending = [content]
        while pending:
            item = pending.pop()
            if isinstance(item, dict):
                if "path" in item and not self._uploads.holds(item["path"]):
                    raise RefusalError(400, "Only uploaded files are read, no paths and addresses.")
                pending += item.values()
            elif isinstance(item, list):
                pending += item

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.formparsers import MultiPartException
        from starlette.requests import Request

        try:
            async with Request(scope, receive).form(max_files=MAX_FILES, max_fields=8) as form:
                sent = [item for item in form.getlist("files") if not isinstance(item, str)]
                paths = [self._uploads.store(f.filename or "", f.file) for f in sent]
        except MultiPartException as error:
            raise RefusalError(400, "The upload cannot be read.") from error
        except M2F2Error as error:
            raise RefusalError(503, f"{error.message} {error.hint}") from error
        if not paths:
            raise RefusalError(400, "The upload holds no file.")
        await _answer(send, paths)


def _limited(receive: Receive, headers: Mapping[bytes, bytes], limit: int) -> Receive:
    """Stop reading a body that is too long; one that says so itself is not begun."""
    refusal = RefusalError(413, f"More than {limit / 2**20:.0f} MB are not taken.")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > limit:
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


async def _whole(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusalError(400, "The request was cut off.")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already, then whatever comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


async def _answer(
    send: Send, value: object, *, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    body = b"" if status == 204 else json.dumps(value).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*about, *headers]})
    await send({"type": "http.response.body", "body": body})
