"""Where the page is served and to whom; what the command does about impossible wishes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from m2f2cli.cli.app import run
from m2f2cli.errors import M2F2Error, UsageError
from m2f2cli.serving.server import Address

DEMO = [sys.executable, "-m", "m2f2cli", "demo"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1", "[::1]"])
def test_this_computer_needs_no_password(host):
    assert Address(host).is_local


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_others_do(host):
    with pytest.raises(UsageError, match="password"):
        Address(host)
    assert not Address(host, auth="a:b").is_local


@pytest.mark.parametrize("auth", ["", "anna", "anna:", ":pass"])
def test_a_password_has_two_parts(auth):
    with pytest.raises(UsageError, match="USER:PASS"):
        Address(auth=auth)


def test_the_password_is_not_shown():
    assert "secret" not in repr(Address(auth="anna:secret"))


def test_a_used_port_is_a_clear_error(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["demo", "--port", str(port)]) == 1
    assert f"Another program uses port {port} of '127.0.0.1'" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.7"])
def test_a_foreign_host_is_a_clear_error(host):
    with pytest.raises(M2F2Error, match=r"cannot be served|no host") as caught:
        Address(host, 0, "a:b").bind()
    assert caught.value.hint


def test_another_host_without_a_password_does_not_start(capsys, monkeypatch):
    assert run(["demo", "--host", "0.0.0.0"]) == 2
    assert "M2F2_DEMO_AUTH" in capsys.readouterr().err
    monkeypatch.setenv("M2F2_DEMO_AUTH", "nonsense")
    assert run(["demo"]) == 2


def test_a_missing_model_is_an_error(capsys):
    assert run(["demo", "--port", "0", "--model", "/nowhere"]) == 1
    assert "There is no checkpoint" in capsys.readouterr().err


def test_a_missing_package_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(["demo", "--port", "0"]) == 1
    assert "pip install 'm2f2cli[demo]'" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize(
    ("sent", "code", "started"),
    [
        (signal.SIGINT, 130, ""),
        pytest.param(signal.SIGINT, 130, "trap '' INT; ", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, -15, "", marks=pytest.mark.slow),
    ],
    ids=["interrupted", "interrupted in the background", "terminated"],
)
def test_it_says_when_it_is_ready_and_ends_at_once(
    tiny_detector_folder, tmp_path, sent, code, started
):
    command = ["sh", "-c", f'{started}exec "$@"', "sh", *DEMO]
    command += ["--port", "0", "--model", str(tiny_detector_folder)]
    about = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=about
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("Ready at http://127.0.0.1:"), line + process.stderr.read()
        url = line.split()[2]
        page = urllib.request.urlopen(url, timeout=30)
        assert page.status == 200
        open_line = urllib.request.urlopen(f"{url}/gradio_api/heartbeat/abc", timeout=30)
        begin = time.perf_counter()
        process.send_signal(sent)
        out, err = process.communicate(timeout=20)
        seconds = time.perf_counter() - begin
        open_line.close()
    finally:
        process.kill()
    assert process.returncode == code
    assert out == ""
    assert err in ("error: Interrupted.\n", "")
    assert seconds < 10  # a second, on a machine that has nothing else to do
    assert list(Path(tmp_path).glob("m2f2-demo-*")) == []
