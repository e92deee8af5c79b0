"""What gets through to the page, and with what status everything else is refused."""

from __future__ import annotations

import asyncio
import base64
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
    passed: list[bytes] = []
    sent: list[dict[str, Any]] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        passed.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'"through"'})

    async def receive() -> dict[str, Any]:
        part = chunks.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(chunks)}

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
