"""Tests of downloading, against a local web server: python -m pytest tests/test_download.py"""

import hashlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
import requests

import analyze_data
from analyze_data import download, find_data
from Common import UserError, run_script

BODY = bytes(range(256)) * 4000
MD5 = hashlib.md5(BODY).hexdigest()
RIGHT, WRONG, CUT = (200, BODY), (200, BODY[::-1]), (200, BODY[:5000])  # status, body
MISSING, BUSY, FORBIDDEN = (404, b"no such page"), (503, b"try later"), (403, b"who are you?")
RESET, NOBODY = (0, b""), None
LATER = [(429, b"", text) for text in ("1", "7200", "Wed, 21 Oct 2015 07:28:00 GMT")]


class Handler(BaseHTTPRequestHandler):
    """Gives the server's answers in turn, the last one for ever; nameless scripts get a 403."""

    def do_GET(self) -> None:
        self.server.asked += 1
        answer = self.server.answers[min(self.server.asked, len(self.server.answers)) - 1]
        if self.headers["User-Agent"].startswith(("Python-urllib", "python-requests")):
            answer = FORBIDDEN
        if answer == RESET:  # closed without lingering: the other side's connection is reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return os.close(self.connection.detach())
        status, body, *wait = answer
        self.send_response(status)
        for seconds in wait:
            self.send_header("Retry-After", seconds)
        self.send_header("Content-Length", str(len(BODY) if body == CUT[1] else len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.then()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been made; no proxy is asked."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(analyze_data.time, "sleep", (slept := []).append)
    return slept


@pytest.fixture
def server(slept: list) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}/pathmnist.npz"
        server.asked, server.then = 0, lambda: None
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def project(server: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder, without data, that downloads from the server; HOME lies beside it."""
    (tmp_path / "project").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(analyze_data, "COURSE_FILE", tmp_path / "absent")
    monkeypatch.setattr(analyze_data, "ROOT", tmp_path / "project")
    monkeypatch.setattr(analyze_data, "DATA_DIR", tmp_path / "project" / "data")
    monkeypatch.setattr(analyze_data, "download", partial(download, url=server.url, md5=MD5))
    return tmp_path / "project"


BEFORE = [([], []), ([BUSY], [1]), ([CUT, BUSY], [1, 3]), ([RESET], [1]), ([BUSY, RESET], [1, 3])]
BEFORE += [([BUSY, LATER[0]], [1, 1]), ([BUSY, LATER[1]], [1, 60]), ([LATER[2]], [1])]


@pytest.mark.parametrize(("before", "pauses"), BEFORE)
def test_the_right_file(
    before: list, pauses: list, server: object, slept: list, tmp_path: Path, monkeypatch: object
) -> None:
    monkeypatch.setattr(requests, "get", Mock(wraps=requests.get))
    server.answers = [*before, RIGHT]
    target = tmp_path / "new" / "pathmnist.npz"
    assert download(target.parent, server.url, MD5) == target
    assert target.read_bytes() == BODY and os.listdir(target.parent) == [target.name]
    assert target.stat().st_mode & 0o777 == 0o644
    assert slept == pauses and server.asked == len(before) + 1
    assert requests.get.call_args.kwargs["timeout"] >= 30  # Zenodo's first byte took 12 seconds


FAILURES = [(WRONG, "hash", 3), (CUT, "5000", 3), (BUSY, "503", 3), (RESET, "reset", 3)]
FAILURES += [(MISSING, "404", 1), (FORBIDDEN, "403", 1), (NOBODY, "refused", 0)]


@pytest.mark.parametrize(("answer", "words", "asked"), FAILURES)
def test_a_failure_leaves_nothing_and_says_what_to_do(
    answer: tuple | None, words: str, asked: int, server: object, slept: list, tmp_path: Path
) -> None:
    server.answers = [answer]
    url = server.url if answer else "http://127.0.0.1:1/pathmnist.npz"
    with pytest.raises(UserError, match=words) as caught:
        download(tmp_path, url, MD5)
    assert all(part in str(caught.value) for part in (url, MD5, str(tmp_path)))
    assert server.asked == asked and os.listdir(tmp_path) == []
    assert slept == ([1, 3] if asked == 3 else [])  # no second try where it cannot help


def test_ctrl_c_leaves_nothing(server: object, tmp_path: Path) -> None:
    def interrupt() -> None:
        assert len(os.listdir(tmp_path)) == 1  # a part of the file
        os.kill(os.getpid(), signal.SIGINT)

    server.answers, server.then = [CUT], interrupt
    assert run_script(download, tmp_path, server.url, MD5) == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("denied", ["none", "project", "project/data"])  # not to be written to
def test_where_the_file_is_put(
    denied: str, project: Path, server: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if denied.endswith("data"):
        (project / "data").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: path != project.parent / denied)
    server.answers = [RIGHT]
    folder = project / "data" if denied == "none" else project.parent / ".medmnist"
    for _ in range(2):  # the second time, it is there
        assert find_data(None) == folder / "pathmnist.npz"
    assert server.asked == 1


def test_the_synthetic_file_comes_instead_and_the_banner_names_what_is_there(
    project: Path, server: object, capsys: pytest.CaptureFixture
) -> None:
    (data := project / "data").mkdir()
    left = [data / f"pathmnist{end}" for end in (".npz?download=1", " (1).npz")]
    for path in (*left, data / "synthetic.npz"):
        path.touch()
    server.answers = [FORBIDDEN]
    assert find_data(None) == data / "synthetic.npz" and "?" not in analyze_data.URL
    banner = " ".join(line.strip("! ") for line in capsys.readouterr().err.splitlines())
    assert all(str(part) in banner for part in ("SYNTHETIC DATA", "403", server.url, MD5, *left))
