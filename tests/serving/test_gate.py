"""What gets through to the page, and with what status everything else is refused."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest

from m2f2cli.serving import gate as module
from m2f2cli.serving.gate import Gate, Uploads


@pytest.fixture
def uploads(tmp_path) -> Uploads:
    return Uploads(tmp_path)


def ask(uploads: Uploads, method: str, path: str, body: bytes = b"", **given: Any) -> Any:
    """Send a request through a gate: (status, answer, headers); ``through`` is the page's."""
    headers = {"host": "127.0.0.1:7860", **given.pop("headers", {})}
    chunks = given.pop("chunks", [body])
    unfinished = given.pop("unfinished", False)
    passed: list[bytes] = []
    sent: list[dict[str, Any]] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        passed.append(message["body"])
        allowed = [(b"Access-Control-Allow-Origin", b"*")]  # as gradio does
        await send({"type": "http.response.start", "status": 200, "headers": allowed})
        await send({"type": "http.response.body", "body": b'"through"'})

    async def receive() -> dict[str, Any]:
        if not chunks:  # the rest never comes
            await asyncio.sleep(30)
        part = chunks.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(chunks) or unfinished}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }
    asyncio.run(Gate(page, uploads=uploads, **given)(scope, receive, send))
    about = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    answer = json.loads(sent[1]["body"] or b"null")
    return sent[0]["status"], answer, about


def post(uploads: Uploads, content: Any, path: str = "/gradio_api/queue/join", **given: Any) -> Any:
    return ask(uploads, "POST", path, json.dumps(content).encode(), **given)


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/queue/data", "/gradio_api/info",
     "/gradio_api/heartbeat/abc123", "/gradio_api/call/detect/abc123"],
)  # fmt: skip
def test_what_the_page_needs_gets_through(uploads, path):
    assert ask(uploads, "GET", path)[:2] == (200, "through")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/gradio_api/proxy=http://127.0.0.1:22/", 404),
        ("GET", "/gradio_api/file=/etc/passwd", 403),
        ("GET", "/gradio_api/file=../../../etc/passwd", 403),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/", 403),
        ("GET", "/gradio_api/file=file:///etc/passwd", 403),
        ("GET", "/gradio_api/file/etc/passwd", 404),
        ("GET", "/file=/etc/passwd", 404),
        ("GET", "/assets/../../../../etc/passwd", 404),
        ("GET", "/static/../server.py", 404),
        ("GET", "/monitoring", 404),
        ("GET", "/gradio_api/runs", 404),
        ("GET", "/gradio_api/stream/a/b/1/playlist.m3u8", 404),
        ("POST", "/login", 404),
        ("POST", "/gradio_api/run/predict", 404),
        ("POST", "/gradio_api/api/predict", 404),
        ("POST", "/gradio_api/component_server", 404),
        ("POST", "/gradio_api/process_recording", 404),
        ("POST", "/gradio_api/vibe-edit/", 404),
        ("PUT", "/gradio_api/upload", 405),
        ("DELETE", "/", 405),
        ("OPTIONS", "/gradio_api/upload", 405),
    ],
)
def test_nothing_else_does(uploads, method, path, status):
    assert ask(uploads, method, path, b"{}")[0] == status


def test_an_uploaded_file_may_be_loaded(uploads):
    path = uploads.store("a.png", io.BytesIO(b"x"))
    assert ask(uploads, "GET", f"/gradio_api/file={path}")[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "http://127.0.0.1:1/", "https://example.org/a.png", "README.md", "", None, 5,
     ["x"], "file:///etc/passwd", "\\\\host\\share\\a.png"],
)  # fmt: skip
def test_no_request_names_a_path_or_an_address(uploads, path):
    for content in ({"data": [{"path": path}]}, {"data": [[{"a": [{"path": path, "url": "x"}]}]]}):
        status, answer, _ = post(uploads, content)
        assert status == 400
        assert "Only uploaded files" in answer["detail"]


def test_a_request_about_an_upload_gets_through_whole(uploads):
    path = uploads.store("a.png", io.BytesIO(b"x"))
    body = json.dumps({"data": [{"path": path}]}).encode()
    for name in ("queue/join", "call/detect"):
        halves = [body[:10], body[10:]]
        assert ask(uploads, "POST", f"/gradio_api/{name}", chunks=halves)[0] == 200


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 200_000])
def test_a_body_that_is_no_json_is_refused(uploads, body):
    assert ask(uploads, "POST", "/gradio_api/queue/join", body)[0] == 400


def test_sizes_are_limited_said_or_not(uploads, monkeypatch):
    told = {"content-length": str(200 * 2**20)}
    for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
        assert ask(uploads, "POST", path, b"", headers=told)[0] == 413
        assert ask(uploads, "POST", path, b"", headers={"content-length": "-1"})[0] == 413
    monkeypatch.setattr(module, "MAX_JSON", 10)
    assert ask(uploads, "POST", "/gradio_api/queue/join", chunks=[b"1" * 6, b"1" * 6])[0] == 413
    monkeypatch.setattr(module, "MAX_BYTES", 300)
    kind, body = form({"a.png": b"x" * 400})
    assert ask(uploads, "POST", "/gradio_api/upload", body, headers=kind)[0] == 413
    assert not any((uploads.folder / "sent").iterdir())


def form(files: dict[str, bytes]) -> tuple[dict[str, str], bytes]:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in files.items()
    ]
    return {"content-type": "multipart/form-data; boundary=b"}, b"".join(parts) + b"--b--\r\n"


def test_uploads_are_kept_by_the_gate_itself(uploads):
    kind, body = form({"a.png": b"one", "../b.png": b"two"})
    status, paths, _ = ask(uploads, "POST", "/gradio_api/upload", body, headers=kind)
    assert status == 200
    assert [Path(path).read_bytes() for path in paths] == [b"one", b"two"]
    assert all(uploads.holds(path) for path in paths)


@pytest.mark.parametrize("files", [{}, {f"{n}.png": b"x" for n in range(module.MAX_FILES + 1)}])
def test_none_or_too_many_files_are_refused(uploads, files):
    kind, body = form(files)
    assert ask(uploads, "POST", "/gradio_api/upload", body, headers=kind)[0] == 400
    plain = {"content-type": "text/plain"}
    assert ask(uploads, "POST", "/gradio_api/upload", b"x", headers=plain)[0] == 400


def basic(text: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}


def test_a_protected_page_wants_its_password_for_everything(uploads):
    given = {"password": "anna:pässword"}
    for method, path in (("GET", "/"), ("GET", "/assets/a.js"), ("POST", "/gradio_api/upload")):
        status, answer, about = ask(uploads, method, path, **given)
        assert status == 401
        assert about["www-authenticate"].startswith("Basic")
        assert "password" in answer["detail"]
    for wrong in (
        basic("anna:pass"),
        basic("anna:pässword2"),
        basic(":"),
        {"authorization": "Basic ***"},
        {"authorization": "Bearer x"},
    ):
        assert ask(uploads, "GET", "/", headers=wrong, **given)[0] == 401
    assert ask(uploads, "GET", "/", headers=basic("anna:pässword"), **given)[0] == 200


def test_a_local_page_answers_to_local_names_only(uploads):
    given = {"hosts": ["localhost", "127.0.0.1", "[::1]"]}
    for host, status in (
        ("localhost", 200),
        ("LOCALHOST:7860", 200),
        ("[::1]:7860", 200),
        ("127.0.0.1", 200),
        ("evil.example:7860", 421),
        ("localhost.evil.example", 421),
        ("", 421),
    ):
        assert ask(uploads, "GET", "/", headers={"host": host}, **given)[0] == status


def test_pages_load_and_send_nothing_elsewhere(uploads):
    policy = ask(uploads, "GET", "/")[2]["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert ask(uploads, "GET", "/nothing")[2]["x-content-type-options"] == "nosniff"


FOREIGN = ["http://evil.example", "http://evil.example:7860", "null", "http://127.0.0.1:7861", "x"]


@pytest.mark.parametrize("origin", FOREIGN)
def test_pages_of_other_sites_are_refused(uploads, origin):
    given = {"headers": {"origin": origin}}
    kind, body = form({"a.png": b"x"})
    for method, path in (
        ("GET", "/config"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/call/detect"),
    ):
        status, answer, about = ask(uploads, method, path, b"{}", **given)
        assert (status, "Another site" in answer["detail"]) == (403, True)
        assert not any(name.lower().startswith("access-control") for name in about)
    given["headers"] |= kind
    assert ask(uploads, "POST", "/gradio_api/upload", body, **given)[0] == 403
    assert not any((uploads.folder / "sent").iterdir())


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:7860", "http://127.0.0.1:7860"),
        ("localhost:7860", "http://LOCALHOST:7860"),
        ("m2f2.example", "https://m2f2.example"),  # behind a server with TLS
        ("m2f2.example", None),  # no browser's page
    ],
)
def test_the_pages_own_requests_pass_and_no_other_site_may_read(uploads, host, origin):
    headers = {"host": host} | ({"origin": origin} if origin else {})
    for method, path in (("GET", "/config"), ("POST", "/gradio_api/queue/join")):
        status, _, about = ask(uploads, method, path, b"{}", headers=headers)
        assert status == 200
        assert not any(name.lower().startswith("access-control") for name in about)


def test_a_body_that_stops_coming_is_dropped(uploads, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.05)
    kind, body = form({"a.png": b"x" * 1000})
    for path, sent in (("upload", body[:500]), ("queue/join", b"{")):
        given = {"headers": kind, "chunks": [sent], "unfinished": True}
        status, answer, _ = ask(uploads, "POST", f"/gradio_api/{path}", **given)
        assert (status, answer["detail"]) == (408, "The request took too long to arrive.")
    assert not any((uploads.folder / "sent").iterdir())


def test_a_body_that_comes_for_ever_is_dropped(uploads, monkeypatch):
    monkeypatch.setattr(module, "MAX_SENDING", 0.0)
    assert ask(uploads, "POST", "/gradio_api/queue/join", b"{}")[0] == 408


def test_what_is_on_its_way_counts_against_the_room(uploads, monkeypatch):
    kind, body = form({"a.png": b"x" * 1000})
    assert ask(uploads, "POST", "/gradio_api/upload", body, headers=kind)[0] == 200
    monkeypatch.setattr(module, "MAX_STORED", 1500)
    status, answer, _ = ask(uploads, "POST", "/gradio_api/upload", body, headers=kind)
    assert (status, "Try again" in answer["detail"]) == (503, True)
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_COMING", 500)
    assert ask(uploads, "POST", "/gradio_api/upload", body, headers=kind)[0] == 503
    monkeypatch.undo()
    assert ask(uploads, "POST", "/gradio_api/upload", body, headers=kind)[0] == 200


def test_one_visitor_keeps_only_so_many_requests_open(uploads):
    """Others are answered meanwhile, and so are his after he closed them."""
    app = Held()
    gate = Gate(app, uploads=uploads)

    async def ask_for(path: str, client: str) -> asyncio.Task[int]:
        task = asyncio.create_task(app.status(gate, path, client))
        await asyncio.sleep(0)
        return task

    async def visit() -> None:
        stream = "/gradio_api/heartbeat/a"
        held = [await ask_for(stream, "10.0.0.1") for _ in range(module.MAX_OPEN)]
        assert await (await ask_for(stream, "10.0.0.1")) == 429
        others = [await ask_for(stream, "10.0.0.2"), await ask_for("/config", "10.0.0.1")]
        app.go.set()
        assert [await task for task in [*held, *others]] == [200] * (module.MAX_OPEN + 2)
        assert await (await ask_for(stream, "10.0.0.1")) == 200

    asyncio.run(visit())


class Held:
    """An application that answers once ``go`` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def status(self, gate: Gate, path: str, client: str) -> int:
        found: list[int] = []

        async def send(message: dict[str, Any]) -> None:
            found.append(message.get("status", 0))

        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "headers": [],
            "client": (client, 1),
        }
        await gate(scope, self.go.wait, send)
        return found[0]


def test_a_full_disk_is_a_sentence_and_nothing_is_left(uploads, monkeypatch, caplog):
    class Full(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(errno.ENOSPC, "No space left on device")

    store = Uploads.store
    monkeypatch.setattr(Uploads, "store", lambda *given: store(*given[:2], full.pop(0)))
    full = [io.BytesIO(b"one"), Full()]
    kind, body = form({"a.png": b"one", "b.png": b"two"})
    status, answer, _ = ask(uploads, "POST", "/gradio_api/upload", body, headers=kind)
    assert (status, answer["detail"]) == (503, "There is no room for files here. Try again later.")
    assert "No space left on device" in caplog.text
    assert not any((uploads.folder / "sent").iterdir())


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("call/detect", {"data": []}, 400),
        ("call/explain", {"data": [None]}, 400),
        ("call/explain/", {"data": [None, [], ""]}, 200),
        ("queue/join", {"data": [], "fn_index": 3}, 400),
        ("queue/join", {"data": [None], "fn_index": 3}, 200),
        ("queue/join", {"data": [], "fn_index": [3]}, 404),
        ("queue/join", {"data": []}, 404),
        ("call/nothing", {"data": []}, 404),
        ("queue/join", {"data": {}, "fn_index": 3}, 200),
    ],
)
def test_unknown_functions_and_too_few_values_are_refused(uploads, path, content, status):
    takes = {"detect": 1, "explain": 3, "3": 1}
    found = post(uploads, content, f"/gradio_api/{path}", takes=takes)
    assert found[0] == status
    assert status != 400 or "are needed" in found[1]["detail"]
