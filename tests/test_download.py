"""Tests of download() against a local web server: python -m pytest tests/test_download.py"""

import functools
import hashlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import analyze_data
from analyze_data import UserError, download

ROOT = Path(__file__).parents[1]
BODY = bytes(range(256)) * 4000
MD5 = hashlib.md5(BODY).hexdigest()
CHILD = (
    "import sys, analyze_data as a, pathlib as p; a.download(p.Path(sys.argv[1]), *sys.argv[2:])"
)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the n-th request with the n-th of the server's answers (then with the last)."""

    def do_GET(self) -> None:
        answers = self.server.answers
        self.server.asked += 1
        answers[min(self.server.asked, len(answers)) - 1](self)

    def log_message(self, *args: object) -> None:
        pass

    def send(self, body: bytes, length: int | None = None, status: int = 200) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    """A web server on a free port of this machine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/pathmnist.npz"
        self.answers: list[Callable[[Handler], None]] = []
        self.asked = 0
        self.over = threading.Event()


def right(handler: Handler) -> None:
    handler.send(BODY, len(BODY))


def wrong(handler: Handler) -> None:
    handler.send(BODY[::-1], len(BODY))


def cut(handler: Handler) -> None:
    handler.send(BODY[:5000], len(BODY))


def cut_without_length(handler: Handler) -> None:
    handler.send(BODY[:5000])


def empty(handler: Handler) -> None:
    handler.send(b"", 0)


def missing(handler: Handler) -> None:
    handler.send(b"no such page", 12, status=404)


def busy(handler: Handler) -> None:
    handler.send(b"try later", 9, status=503)


def stall(handler: Handler) -> None:
    handler.send(BODY[:5000], len(BODY))
    handler.server.over.wait(30)


def silence(handler: Handler) -> None:
    handler.server.over.wait(30)


def no_http(handler: Handler) -> None:
    handler.wfile.write(b"hello\r\n\r\n")


def bad_length(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: many\r\n\r\nhello")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def refused() -> str:
    """A URL where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}/pathmnist.npz"


def assert_failed(error: UserError, target: Path, url: str) -> None:
    """The message says what to do by hand, and nothing is left behind."""
    for part in (url, MD5, str(target.parent)):
        assert part in str(error)
    assert "\n" not in str(error)
    assert not target.parent.is_dir() or os.listdir(target.parent) == []


def test_the_right_file(server: Server, tmp_path: Path) -> None:
    server.answers = [right]
    target = tmp_path / "new" / "pathmnist.npz"
    assert download(target, server.url, MD5) == target
    assert target.read_bytes() == BODY
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize(
    ("answer", "words", "asked"),
    [
        (wrong, "the md5 is", 1),
        (cut, "it ended after 5,000 of 1,024,000 bytes", 1),
        (cut_without_length, "the md5 is", 1),
        (empty, "the md5 is", 1),
        (missing, "404", 1),
        (busy, "503", 3),
        (stall, "timed out", 1),
        (silence, "timed out", 1),
        (no_http, "hello", 1),
        (bad_length, "many", 1),
    ],
)
def test_failures(
    answer: Callable[[Handler], None], words: str, asked: int, server: Server, tmp_path: Path
) -> None:
    server.answers = [answer]
    target = tmp_path / "pathmnist.npz"
    start = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        download(target, server.url, MD5, timeout=0.3, pauses=(0.01, 0.01))
    assert time.monotonic() - start < 2
    assert server.asked == asked
    assert_failed(caught.value, target, server.url)


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.answers = [busy, right]
    target = download(tmp_path / "pathmnist.npz", server.url, MD5, pauses=(0.01, 0.01))
    assert target.read_bytes() == BODY
    assert server.asked == 2


def test_nobody_listens(refused: str, tmp_path: Path) -> None:
    target = tmp_path / "pathmnist.npz"
    start = time.monotonic()
    with pytest.raises(UserError, match="refused") as caught:
        download(target, refused, MD5)
    assert time.monotonic() - start < 1
    assert_failed(caught.value, target, refused)


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    server.answers = [right]
    (tmp_path / "data").write_text("a file, not a folder")
    target = tmp_path / "data" / "pathmnist.npz"
    with pytest.raises(UserError, match="download failed") as caught:
        download(target, server.url, MD5)
    assert_failed(caught.value, target, server.url)
    assert server.asked == 0


def test_a_failed_download_keeps_the_old_file(server: Server, tmp_path: Path) -> None:
    server.answers = [wrong]
    target = tmp_path / "pathmnist.npz"
    target.write_text("old")
    with pytest.raises(UserError, match="the md5 is"):
        download(target, server.url, MD5)
    assert target.read_text() == "old"


def test_no_network_leads_to_the_synthetic_file(
    refused: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(analyze_data, "COURSE_FILE", tmp_path / "absent")
    monkeypatch.setattr(analyze_data, "DATA_DIR", tmp_path)
    monkeypatch.setattr(analyze_data, "download", functools.partial(download, url=refused))
    synthetic = tmp_path / "synthetic.npz"
    synthetic.touch()
    start = time.monotonic()
    assert analyze_data.find_data(None) == synthetic
    assert time.monotonic() - start < 2
    banner = capsys.readouterr().err
    assert "SYNTHETIC DATA" in banner and "refused" in banner and analyze_data.MD5 in banner


def start_child(target: Path, url: str) -> subprocess.Popen:
    """Download in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(target), url, MD5]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def test_interrupted_and_restarted(server: Server, tmp_path: Path) -> None:
    server.answers = [stall, right]
    target = tmp_path / "pathmnist.npz"
    child = start_child(target, server.url)
    deadline = time.monotonic() + 20
    while not os.listdir(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [name.endswith(".part") for name in os.listdir(tmp_path)] == [True]
    child.send_signal(signal.SIGINT)
    assert child.wait(20) != 0
    assert os.listdir(tmp_path) == []
    download(target, server.url, MD5)
    assert target.read_bytes() == BODY


def test_two_processes_at_once(server: Server, tmp_path: Path) -> None:
    both_have_half = threading.Barrier(2)

    def in_step(handler: Handler) -> None:
        handler.send(BODY[:5000], len(BODY))
        both_have_half.wait(20)
        handler.wfile.write(BODY[5000:])

    server.answers = [in_step]
    target = tmp_path / "pathmnist.npz"
    children = [start_child(target, server.url) for _ in range(2)]
    assert [child.wait(20) for child in children] == [0, 0]
    assert target.read_bytes() == BODY
    assert os.listdir(tmp_path) == [target.name]
