"""The served page by its endpoints: right answers, nobody else's, and nothing it must not do."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from m2f2cli.inference.pipeline import detect
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.serving import gate
from m2f2cli.serving.gate import Uploads
from m2f2cli.serving.page import GENERIC
from m2f2cli.serving.server import QUEUE
from tests.inference.conftest import MeanJudge, write_picture
from tests.inference.explainers import asking, tiny
from tests.serving.live import served

WHOLE = ExplainOptions(detect=DetectOptions(faces="none", frames=4))
ROOT = Path(__file__).parents[2]


class Slow(MeanJudge):
    """Takes its time while ``held`` is set, and breaks on black."""

    held = threading.Event()

    def __call__(self, pixel_values: Any) -> Any:
        if float(pixel_values.max()) == 0:
            raise RuntimeError("secret /etc/hidden")
        while self.held.wait(0) and not self.released.wait(0.05):
            pass
        return super().__call__(pixel_values)

    released = threading.Event()


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    return Uploads(tmp_path_factory.mktemp("uploads"))


@pytest.fixture(scope="module")
def url(uploads: Uploads) -> Any:
    with served(Slow(), uploads, WHOLE) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return connect(url)


def connect(url: str, **given: Any) -> Client:
    return Client(url, verbose=False, analytics_enabled=False, download_files=False, **given)


def test_detect_gives_the_record_of_the_command(client, uploads, tmp_path):
    file = write_picture(tmp_path / "bright.png", 200)
    record = client.predict(handle_file(str(file)), api_name="/detect")
    theirs = next(detect([str(file)], model=MeanJudge(), options=WHOLE.detect)).to_dict()
    assert record == {**theirs, "path": "bright.png", "model": "Slow"}
    assert not any((uploads.folder / "sent").iterdir())


def test_only_the_two_functions_are_offered(client):
    info = client.view_api(return_format="dict", print_info=False)
    assert set(info["named_endpoints"]) == {"/detect", "/explain"}
    assert not info["unnamed_endpoints"]


def test_a_zip_called_png_gives_the_sentence(client, tmp_path):
    file = tmp_path / "photo.png"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    record = client.predict(handle_file(str(file)), api_name="/detect")
    assert (
        record["message"] == "'photo.png' is not a JPEG, PNG, WEBP, BMP, TIFF, GIF or AVIF picture."
    )


def test_a_detector_says_that_it_has_no_words(client, tmp_path):
    file = write_picture(tmp_path / "a.png", 9)
    with pytest.raises(AppError, match="judges without words"):
        client.predict(handle_file(str(file)), api_name="/explain")


def test_an_error_in_the_model_tells_nothing(client, tmp_path, caplog):
    file = write_picture(tmp_path / "black.png", 0)
    with caplog.at_level(logging.ERROR), pytest.raises(AppError) as caught:
        client.predict(handle_file(str(file)), api_name="/detect")
    assert str(caught.value) == GENERIC
    assert "secret" in caplog.text


def test_no_address_is_fetched(url):
    asked = []

    class Trap(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    trap = HTTPServer(("127.0.0.1", 0), Trap)
    threading.Thread(target=trap.serve_forever, daemon=True).start()
    target = f"http://127.0.0.1:{trap.server_port}/a.png"
    data = [{"path": target, "url": target, "meta": {"_type": "gradio.FileData"}}]
    statuses = [
        httpx.post(f"{url}/gradio_api/call/detect", json={"data": data}).status_code,
        httpx.post(f"{url}/gradio_api/queue/join", json={"data": data}).status_code,
        httpx.get(f"{url}/gradio_api/file={target}").status_code,
        httpx.get(f"{url}/gradio_api/proxy={target}").status_code,
    ]
    with pytest.raises(httpx.HTTPStatusError):
        connect(url).predict(handle_file(target), api_name="/detect")
    trap.shutdown()
    assert statuses == [400, 400, 403, 404]
    assert asked == []


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), "README.md"])
def test_no_file_of_the_server_is_read(url, path):
    data = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    answer = httpx.post(f"{url}/gradio_api/call/detect", json={"data": [data]})
    assert answer.status_code == 400
    assert path not in answer.text


def raw(url: str, method: str, path: str, headers: dict[str, str] | None = None) -> Any:
    """A request whose path no client library tidies up."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.putrequest(method, path, skip_host=bool(headers and "Host" in headers))
    for name, value in (headers or {}).items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file=..%2f..%2f..%2f..%2fetc/passwd",
        "/assets/../../../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/static/..%2f..%2f..%2fetc%2fpasswd",
        "/assets//etc/passwd",
    ],
)
def test_no_path_leads_out(url, path):
    answer = raw(url, "GET", path)
    assert answer.status in (403, 404)
    assert b"root:" not in answer.read()


def test_200_megabytes_are_refused_unread(url):
    length = {"Content-Length": str(200 * 2**20), "Content-Type": "multipart/form-data; boundary=b"}
    assert raw(url, "POST", "/gradio_api/upload", length).status == 413


def test_a_foreign_name_is_refused(url):
    assert raw(url, "GET", "/", {"Host": "evil.example"}).status == 421


def opened(url: str, sent: bytes = b"") -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(sent)
    return connection


HALF_A_HEAD = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-a: "
NO_BODY = b"GET /gradio_api/app_id HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nx"


@pytest.mark.parametrize("begun", [b"", HALF_A_HEAD, NO_BODY, b"GET / HTTP/1.1\r\n"])
def test_a_request_that_is_never_finished_is_dropped(url, monkeypatch, begun):
    monkeypatch.setattr("m2f2cli.serving.connection.HEAD", 0.3)
    with opened(url, begun) as connection:
        begin = time.monotonic()
        with contextlib.suppress(OSError):  # closed while we were still sending
            while time.monotonic() < begin + 10:
                connection.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(4096):
                        break
                connection.sendall(b"a")
        assert 0.2 < time.monotonic() - begin < 8


def test_a_connection_may_wait_for_its_answer(url, tmp_path, monkeypatch):
    monkeypatch.setattr("m2f2cli.serving.connection.HEAD", 0.2)
    with opened(url, b"GET /gradio_api/heartbeat/abc HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as line:
        assert b"200 OK" in line.recv(4096)
        time.sleep(0.6)
        line.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while piece := line.recv(4096):  # its first words, perhaps
                assert piece
            pytest.fail("It was closed.")


def test_half_sent_heads_keep_nobody_out(url):
    held = []
    try:
        for _ in range(450):
            held.append(opened(url, HALF_A_HEAD))
            if len(held) % 150 == 0:
                assert httpx.get(f"{url}/gradio_api/app_id", timeout=10).status_code == 200
    finally:
        for connection in held:
            connection.close()


@pytest.mark.slow
def test_unfinished_uploads_hold_little_and_keep_nobody_out(url, uploads, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "MAX_COMING", 3 * 2**20)
    monkeypatch.setattr(gate, "PAUSE", 2.0)
    head = (
        b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: multipart/form-data; boundary=a\r\nContent-Length: 9999999\r\n\r\n"
        b'--a\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    held = [opened(url, head) for _ in range(12)]
    try:
        for connection in held:
            with contextlib.suppress(OSError):  # refused already
                connection.sendall(bytes(2**20 - 1000))
        refusals = 0
        for connection in held:
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                refusals += b" 503 " in connection.recv(4096)
        assert refusals >= 8
        assert put(url, write_picture(tmp_path / "a.png", 9))["path"]
        held[-1].settimeout(10)
        left = [c for c in held if c.settimeout(10) is None and b" 408 " in _answer(c)]
        assert len(left) <= 3
    finally:
        for connection in held:
            connection.close()


def _answer(connection: socket.socket) -> bytes:
    with contextlib.suppress(OSError):
        return connection.recv(4096)
    return b""


@pytest.mark.parametrize("path", ["call/detect", "queue/join"])
@pytest.mark.parametrize(
    "body",
    [{"data": []}, {"data": [], "fn_index": 0}, {"data": "x"}, {"data": None}, {}, [], 5, "x",
     {"data": [None] * 9, "fn_index": 99, "session_hash": "s"},
     {"data": [None] * 9, "fn_index": -1, "session_hash": "s"},
     {"data": [], "fn_index": 1, "session_hash": "s"}],
)  # fmt: skip
def test_a_malformed_request_prints_no_traceback(url, path, body, capfd):
    answer = httpx.post(f"{url}/gradio_api/{path}", json=body)
    if answer.status_code == 200:
        httpx.get(f"{url}/gradio_api/call/detect/{answer.json()['event_id']}", timeout=10)
    else:
        assert 400 <= answer.status_code < 500
    assert "Traceback" not in capfd.readouterr().err


def test_foreign_pages_get_nothing_from_a_page_for_others(tmp_path):
    """As served with ``--host 0.0.0.0 --auth``: any name may stand in Host."""
    with served(MeanJudge(), Uploads(tmp_path), WHOLE, auth="a:b", host="0.0.0.0") as address:
        for host in ("192.168.1.5:7872", "m2f2.example.org"):
            headers = {"Host": host, "Origin": "http://evil.com"}
            with httpx.Client(base_url=address, auth=("a", "b"), headers=headers) as visitor:
                files = {"files": ("a.png", b"x", "image/png")}
                answers = [
                    visitor.get("/config"),
                    visitor.post("/gradio_api/upload", files=files),
                    visitor.post("/gradio_api/call/detect", json={"data": [None]}),
                    visitor.get("/config", headers={"Origin": f"http://{host}"}),
                ]
            assert [answer.status_code for answer in answers] == [403, 403, 403, 200]
            names = {name for answer in answers for name in answer.headers}
            assert not [name for name in names if name.startswith("access-control")]


def put(url: str, file: Path) -> dict[str, Any]:
    with open(file, "rb") as content:
        sent = {"files": (file.name, content)}
        answer = httpx.post(f"{url}/gradio_api/upload", files=sent, timeout=30)
    return {"path": answer.json()[0], "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}


def test_a_full_queue_says_so_and_the_rest_is_answered(url, tmp_path):
    given = [put(url, write_picture(tmp_path / f"{n}.png", 5 * n + 5)) for n in range(50)]
    Slow.released.clear()
    Slow.held.set()

    def join(one: dict[str, Any]) -> httpx.Response:
        body = {"data": [one]}
        return httpx.post(f"{url}/gradio_api/call/detect", json=body, timeout=30)

    try:
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(join, given))
    finally:
        Slow.held.clear()
        Slow.released.set()
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    # One may have been taken out of the queue while others came.
    assert QUEUE <= statuses.count(200) <= QUEUE + 2
    for one, answer in zip(given, answers, strict=True):
        if answer.status_code == 200:
            record = result(url, answer.json()["event_id"])
            assert record["path"] == one["orig_name"]
            level = 5 * int(Path(one["orig_name"]).stem) + 5
            assert record["fake_probability"] == pytest.approx(level / 255, abs=1e-4)


def result(url: str, event: str) -> dict[str, Any]:
    with httpx.stream("GET", f"{url}/gradio_api/call/detect/{event}", timeout=30) as lines:
        name = ""
        for line in lines.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data" and name == "complete":
                found: dict[str, Any] = json.loads(value)[0]
                return found
    raise AssertionError("no answer")


@pytest.mark.slow
def test_two_visitors_get_their_own(url, tmp_path):
    def visit(level: int) -> list[float]:
        client = connect(url)
        file = write_picture(tmp_path / f"v{level}.png", level)
        return [
            client.predict(handle_file(str(file)), api_name="/detect")["fake_probability"]
            for _ in range(8)
        ]

    with ThreadPoolExecutor(2) as pool:
        dark, bright = pool.map(visit, (50, 200))
    assert dark == pytest.approx([50 / 255] * 8, abs=1e-4)
    assert bright == pytest.approx([200 / 255] * 8, abs=1e-4)


def test_explain_gives_judgement_and_reasons(uploads, url, tmp_path):
    file = write_picture(tmp_path / "a.png", (90, 120, 30))
    with served(tiny(), uploads_beside(uploads, tmp_path), asking()) as address:
        client = connect(address)
        record = client.predict(handle_file(str(file)), ["eyes"], api_name="/explain")
        asked = client.predict(handle_file(str(file)), [], "Why?", api_name="/explain")
    face = record["explanations"][0]
    assert [reason["region"] for reason in face["reasons"]] == ["eyes"]
    assert face["judgement_text"]
    assert [reason["region"] for reason in asked["explanations"][0]["reasons"]] == [None]


def test_a_protected_page_wants_its_password(tmp_path):
    with served(MeanJudge(), Uploads(tmp_path), WHOLE, auth="anna:secret") as address:
        for path in ("/", "/config", "/gradio_api/info", "/assets/x.js"):
            assert httpx.get(address + path).status_code == 401
        assert httpx.post(f"{address}/gradio_api/upload", files={"files": b"x"}).status_code == 401
        assert httpx.get(address, auth=("anna", "wrong")).status_code == 401
        assert httpx.get(address, auth=("anna", "secret")).status_code == 200
        client = connect(address, httpx_kwargs={"auth": ("anna", "secret")})
        file = write_picture(tmp_path / "a.png", 200)
        record = client.predict(handle_file(str(file)), api_name="/detect")
    assert record["verdict"] == "fake"


def uploads_beside(uploads: Uploads, tmp_path: Path) -> Uploads:
    folder = tmp_path / "own"
    folder.mkdir()
    return Uploads(folder)
