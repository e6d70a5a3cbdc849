"""Tests of downloading, against a local web server: python -m pytest tests/test_download.py"""

import gc
import hashlib
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import pooch
import pytest

import analyze_data
from analyze_data import FILE_NAME, download, find_data
from Common import UserError
from Script import run_script

BODY = bytes(range(256)) * 4000
MD5 = hashlib.md5(BODY).hexdigest()
RIGHT = (200, BODY)  # status and body of an answer
CUT = (200, BODY[:5000])
BUSY = (503, b"try later")


class Handler(BaseHTTPRequestHandler):
    """Gives the server's answers in turn, the last one for ever."""

    def do_GET(self):
        answers = self.server.answers
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if self.headers["User-Agent"].startswith("python-requests"):  # Zenodo refuses those
            status = 403
        self.send_response(status)
        self.send_header("Content-Length", str(len(BODY) if status == 200 else len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.after_answer()


@pytest.fixture
def server(monkeypatch):
    """A server in this process; `pauses` are those that a download would have made."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}/files/"
        server.after_answer = lambda: None
        server.pauses = []
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(pooch.core.time, "sleep", server.pauses.append)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
    # Pooch leaves its connections open. They are collected here, because their warning would make
    # a later test fail.
    gc.collect()


@pytest.fixture
def project(server, tmp_path, monkeypatch):
    """A project's folder, without data, that downloads from the server; HOME lies beside it."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(analyze_data, "COURSE_FILE", tmp_path / "absent")
    monkeypatch.setattr(analyze_data, "ROOT", root)
    monkeypatch.setattr(analyze_data, "DATA_DIR", root / "data")
    monkeypatch.setattr(analyze_data, "download", lambda folder: download(folder, server.url, MD5))
    return root


@pytest.mark.parametrize("before", [[], [BUSY], [CUT, BUSY]])
def test_the_right_file(before, server, tmp_path):
    server.answers = [*before, RIGHT]
    target = tmp_path / "new" / FILE_NAME
    assert download(target.parent, server.url, MD5) == target
    assert target.read_bytes() == BODY
    assert target.stat().st_mode & 0o777 == 0o644
    assert os.listdir(target.parent) == [FILE_NAME]
    assert server.pauses == [1, 2][: len(before)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [((200, BODY[::-1]), "hash"), (CUT, "broke"), (BUSY, "503"), (None, "cannot be reached")],
)
def test_three_failures_leave_nothing_and_say_why_in_plain_words(answer, reason, server, tmp_path):
    server.answers = [answer]
    url = server.url if answer else "http://127.0.0.1:1/"  # where nobody answers
    with pytest.raises(UserError, match=reason) as caught:
        download(tmp_path, url, MD5)
    for part in (url + FILE_NAME, MD5, str(tmp_path)):
        assert part in str(caught.value)
    assert "('" not in str(caught.value)  # as a chain of nested exceptions is written
    assert server.pauses == [1, 2]
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_nothing(server, tmp_path):
    def interrupt():
        assert len(os.listdir(tmp_path)) == 1  # a part of the file
        os.kill(os.getpid(), signal.SIGINT)

    server.answers = [CUT]
    server.after_answer = interrupt
    assert run_script(download, tmp_path, server.url, MD5) == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("denied", ["none", "project", "project/data"])  # not to be written to
def test_where_the_file_is_put(denied, project, server, monkeypatch):
    if denied == "project/data":
        (project / "data").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _mode: path != project.parent / denied)
    monkeypatch.setattr(os, "chmod", Mock(side_effect=PermissionError))  # some network drives
    server.answers = [RIGHT]
    folder = project / "data" if denied == "none" else project.parent / ".medmnist"
    assert find_data(None) == folder / FILE_NAME
    server.answers = [BUSY]
    assert find_data(None) == folder / FILE_NAME  # it is there: nothing is downloaded


def test_the_synthetic_file_comes_instead_and_the_banner_names_what_is_there(
    project, server, capsys
):
    (project / "data").mkdir()
    synthetic = project / "data" / "synthetic.npz"
    left = project / "data" / "pathmnist.npz?download=1"  # what wget makes of Zenodo's link
    for path in (synthetic, left):
        path.touch()
    server.answers = [BUSY]
    assert find_data(None) == synthetic
    lines = capsys.readouterr().err.splitlines()
    for words in ("SYNTHETIC DATA", "503", str(left)):
        assert words in " ".join(line.strip("! ") for line in lines)
    for line in lines:
        assert len(line) <= 80 or " " not in line[3:]  # a path is not broken
