"""Tests of what must not be lost or let in (more kills: python tests/kill_runs.py --kills 30)."""

import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from unittest.mock import Mock

import kill_runs
import pytest
import torch
from conftest import TRAINING, different_checkpoints, only_line

import Runs
import Training
from Common import Stopped

Patch = pytest.MonkeyPatch


class Evil(str):
    """Makes a folder of this name when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def saved(value):
    """Return what torch.save makes of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def changed(real, **parts):
    """Return a checkpoint's bytes with other parts."""
    return saved(torch.load(io.BytesIO(real)) | parts)


def with_wrong_byte(real):
    """Return a checkpoint with a fault that only its checksums show."""
    middle = len(real) // 2
    return real[:middle] + bytes([real[middle] ^ 1]) + real[middle + 1 :]


HOSTILE = {  # name: mode, and content from the real file's content and the marker's path
    "a pickle": ("predict", lambda real, marker: pickle.dumps(Evil(marker))),
    "a pickle inside": ("predict", lambda real, marker: changed(real, epoch=Evil(marker))),
    "half": ("evaluate", lambda real, _: real[: len(real) // 2]),
    "a wrong byte": ("evaluate", lambda real, _: with_wrong_byte(real)),
    "other parts": ("evaluate", lambda real, _: saved({"weight": 0})),
    "other weights": ("predict", lambda real, _: changed(real, model={})),
    "a model of the future": ("predict", lambda real, _: changed(real, config={"model": "vit"})),
    "no history": ("resume", lambda real, _: changed(real, history=5)),
    "other optimisers": ("resume", lambda real, _: changed(real, optimizers=[1, 2])),
    "another epoch": ("resume", lambda real, _: changed(real, epoch=2)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoints(cli, predict_cli, run_dir, tmp_path, kind):
    mode, make = HOSTILE[kind]
    path = run_dir / ("last.pt" if mode == "resume" else "best.pt")
    path.write_bytes(make(path.read_bytes(), tmp_path / "marker"))
    before = {path: path.read_bytes() for path in run_dir.glob("*.pt")}
    if mode == "predict":
        status, _, err = predict_cli(run_dir, "--run", run_dir, "--out", tmp_path / "out")
    else:
        status, _, err = cli(f"--{mode}", run_dir)
    assert status == 2 and f"{path}: " in only_line(err)
    assert list(tmp_path.iterdir()) == [run_dir]  # no marker, no results
    assert {path: path.read_bytes() for path in before} == before


def test_too_little_memory_is_not_called_a_damaged_file(run_dir, monkeypatch):
    monkeypatch.setattr(torch, "load", Mock(side_effect=RuntimeError("can't allocate memory")))
    with pytest.raises(RuntimeError, match="allocate memory"):
        Runs.load_checkpoint(run_dir / "best.pt")


def test_a_second_process_may_not_resume_the_same_run(cli, run_dir):
    unfinished = run_dir / ".last.pt.8.unfinished"
    with Runs.locked(run_dir):  # as the first process holds it
        unfinished.touch()  # which it is about to write
        assert "another process" in only_line(cli("--resume", run_dir)[2])
    assert unfinished.exists()


KILLS = [(Runs, "locked", 0), (Runs, "write_json", 0), (Training, "write_history", 2)]


@pytest.mark.parametrize("step", KILLS, ids=str)  # the last: TensorBoard is ahead by an epoch
def test_a_killed_run_can_be_begun_again_or_resumed(
    cli, no_figures, tiny, run_dir, monkeypatch, step
):
    """Also on a file system without locks, and when the clock was set back in between."""
    module, name, calls = step
    new, argv = run_dir.with_name("new"), ["--data", tiny, *TRAINING, "--log-dir", run_dir.parent]

    def stop(*_args):
        (new / ".config.json.7.unfinished").touch()  # as SIGKILL leaves it
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(Runs.FileLock, "acquire", Mock(side_effect=OSError))
    with Patch.context() as patch:
        steps = iter([getattr(module, name)] * calls + [stop])
        patch.setattr(module, name, lambda *args: next(steps)(*args))
        status, _, err = cli(*argv, "--name", "new")
    assert status == 143 and ("--resume" in err) == (module is Training)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    argv = ["--resume", new] if "--resume" in err else [*argv, "--name", "new"]
    assert cli(*argv)[0] == 0
    assert different_checkpoints(new, run_dir) == [] and not list(new.glob(".*.unfinished"))
    assert kill_runs.curves(new) == kill_runs.curves(run_dir)


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_checkpoint_that_does_not_fit(trained, tiny, tmp_path, small_disk):
    weights = (trained.run_dir / "best.pt").stat().st_size
    # The first last.pt and best.pt take one of these each, and the next last.pt two or three.
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**26 - int(3.6 * weights)))
    run_dir, log = small_disk / "run", tmp_path / "log"
    argv = ["--data", tiny, *TRAINING, "--log-dir", small_disk, "--name", "run"]
    # In a process of its own, for what TensorBoard's thread says when it cannot write.
    assert kill_runs.finish(argv, log) == 2
    text = log.read_text()
    assert re.search(f"\nerror: {run_dir}/last.pt: No space left.*\n$", text), text
    assert "Traceback" not in text and not list(run_dir.glob(".*.unfinished"))
    assert kill_runs.checkpoint_epoch(run_dir) == 0
    filler.unlink()
    assert kill_runs.finish(["--resume", run_dir], log) == 0
    assert different_checkpoints(run_dir, trained.run_dir) == []
