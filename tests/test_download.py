"""Tests of downloading, against a local web server: python -m pytest tests/test_download.py"""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import analyze_data
from analyze_data import download
from Common import UserError, run_script

BODY = bytes(range(256)) * 4000
MD5 = hashlib.md5(BODY).hexdigest()
RIGHT, WRONG, CUT = (200, BODY), (200, BODY[::-1]), (200, BODY[:5000])  # status, body
MISSING, BUSY = (404, b"no such page"), (503, b"try later")


class Handler(BaseHTTPRequestHandler):
    """Gives the server's answers in turn, the last one again and again."""

    def do_GET(self) -> None:
        self.server.asked += 1
        status, body = self.server.answers[min(self.server.asked, len(self.server.answers)) - 1]
        self.send_response(status)
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


@pytest.mark.parametrize("before", [[], [BUSY], [CUT, BUSY]])
def test_the_right_file(before: list, server: object, slept: list, tmp_path: Path) -> None:
    server.answers = [*before, RIGHT]
    target = tmp_path / "new" / "pathmnist.npz"
    assert download(target.parent, server.url, MD5) == target
    assert target.read_bytes() == BODY and os.listdir(target.parent) == [target.name]
    assert slept == [1, 3][: len(before)] and server.asked == len(before) + 1


FAILURES = [(WRONG, "hash", 1), (CUT, "5000", 3), (BUSY, "503", 3), (MISSING, "404", None)]


@pytest.mark.parametrize(("answer", "words", "asked"), FAILURES)
def test_a_failure_leaves_nothing_and_says_what_to_do(
    answer: tuple, words: str, asked: int | None, server: object, tmp_path: Path
) -> None:
    server.answers = [answer]
    with pytest.raises(UserError, match=words) as caught:
        download(tmp_path, server.url, MD5)
    assert all(part in str(caught.value) for part in (server.url, MD5, str(tmp_path)))
    assert asked in (server.asked, None) and os.listdir(tmp_path) == []


def test_ctrl_c_leaves_nothing(server: object, tmp_path: Path) -> None:
    def interrupt() -> None:
        assert len(os.listdir(tmp_path)) == 1  # a part of the file
        os.kill(os.getpid(), signal.SIGINT)

    server.answers, server.then = [CUT], interrupt
    assert run_script(download, tmp_path, server.url, MD5) == 130
    assert os.listdir(tmp_path) == []


def test_where_nobody_listens_the_synthetic_file_comes_at_once(
    slept: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    url = "http://127.0.0.1:1/pathmnist.npz"  # a port that no server uses
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(analyze_data, "COURSE_FILE", tmp_path / "absent")
    monkeypatch.setattr(analyze_data, "DATA_DIR", tmp_path)
    monkeypatch.setattr(analyze_data, "download", lambda folder: download(folder, url))
    (synthetic := tmp_path / "synthetic.npz").touch()
    assert analyze_data.find_data(None) == synthetic
    assert slept == [] and os.listdir(tmp_path) == [synthetic.name]
    banner = capsys.readouterr().err
    assert all(part in banner for part in ("SYNTHETIC DATA", "refused", url, analyze_data.MD5))
