"""Tests of what must not be lost or let in (more kills: python tests/kill_runs.py --kills 30)."""

import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import kill_runs
import pytest
import torch
from conftest import TRAINING, different_checkpoints, only_line

import PathMNIST
import Runs
import Training
from Common import Stopped
from MyModels import MODELS

Patch = pytest.MonkeyPatch


class Evil(str):
    """Makes a folder of this name when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self),)


def saved(value: object, **options: object) -> bytes:
    """Return what torch.save makes of a value."""
    torch.save(value, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def changed(real: bytes, **parts: object) -> bytes:
    """Return a checkpoint's bytes with other parts."""
    return saved(torch.load(io.BytesIO(real)) | parts)


def smaller(real: bytes) -> bytes:
    """Return a checkpoint whose every matrix has lost a row."""
    old = torch.load(io.BytesIO(real))["model"]
    weights = {k: v[1:] if v.ndim > 1 else v for k, v in old.items()}
    return changed(real, model=weights)


OLD = {"_use_new_zipfile_serialization": False}
HOSTILE = {  # name: content, from the real file's content and the marker's path
    "a pickle": lambda real, marker: pickle.dumps(Evil(marker)),
    "a pickle among the values": lambda real, marker: changed(real, epoch=Evil(marker)),
    "an old format": lambda real, marker: saved({"model": Evil(marker)}, **OLD),
    "a whole model": lambda real, _: saved(MODELS["skipcnn"]()),
    "nothing": lambda real, _: b"",
    "half": lambda real, _: real[: len(real) // 2],
    "a wrong byte": lambda real, _: real[: (n := len(real) // 2)] + b"?!?" + real[n + 3 :],
    "text": lambda real, _: b"epoch,loss\n1,0.5\n",
    "other weights": lambda real, _: saved({"weight": torch.zeros(3)}),
    "wrong types": lambda real, _: saved({"model": 1, "config": 2, "identity": 3}),
    "other shapes": lambda real, _: smaller(real),
    "no weights": lambda real, _: changed(real, model={}),
    "a model of the future": lambda real, _: changed(real, config={"model": "vit"}),
    "a model without a name": lambda real, _: changed(real, config={"model": ["skipcnn"]}),
}
BEST = {"an odd size": lambda real, _: changed(real, identity={"size": "x"})}
LAST = {  # what last.pt alone has
    "no history": lambda real, _: changed(real, history=5),
    "a history without losses": lambda real, _: changed(real, history=[{"epoch": 1}]),
    "other optimisers": lambda real, _: changed(real, optimizers=[1, 2]),
    "another epoch": lambda real, _: changed(real, epoch=2),
}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for mode in ("evaluate", "predict") for kind in HOSTILE | BEST]
    + [("resume", kind) for kind in HOSTILE | LAST],
)
def test_hostile_checkpoints(
    cli: Callable, predict_cli: Callable, run_dir: Path, tmp_path: Path, mode: str, kind: str
) -> None:
    path, marker = run_dir / ("last.pt" if mode == "resume" else "best.pt"), tmp_path / "marker"
    metrics = (run_dir / "metrics.json").read_bytes()
    content = (HOSTILE | BEST | LAST)[kind](path.read_bytes(), marker)
    path.write_bytes(content)
    predict = [run_dir, "--run", run_dir, "--out", tmp_path / "out"]
    status, _, err = predict_cli(*predict) if mode == "predict" else cli(f"--{mode}", run_dir)
    assert status == 2 and f"{path}: " in only_line(err) and err.endswith("train anew\n")
    assert not marker.exists() and not (tmp_path / "out").exists()
    assert path.read_bytes() == content and (run_dir / "metrics.json").read_bytes() == metrics


def test_a_folder_is_no_checkpoint(cli: Callable, run_dir: Path) -> None:
    for name, mode in (("best.pt", "--evaluate"), ("last.pt", "--resume")):
        (run_dir / name).unlink()
        (run_dir / name).mkdir()
        assert name in only_line(cli(mode, run_dir)[2])


def test_two_kills(capsys: pytest.CaptureFixture) -> None:
    status, table = kill_runs.main(["--kills", "2", "--seed", "1"]), capsys.readouterr().out
    assert status == 0 and table.count(" | 1 | 0 | 0 |") >= 2, table


def test_a_second_process_may_not_resume_the_same_run(cli: Callable, run_dir: Path) -> None:
    with Runs.locked(run_dir):  # as the first process holds it
        (run_dir / ".last.pt.8.tmp").touch()  # which it is about to write
        assert "another process" in only_line(cli("--resume", run_dir)[2])
    assert list(run_dir.glob(".*.tmp"))


KILLS = [(Runs, "locked", 0), (PathMNIST, "write_json", 0), (Training, "write_history", 2)]


@pytest.mark.parametrize("step", KILLS, ids=str)  # the last: TensorBoard is ahead by an epoch
def test_a_killed_run_can_be_begun_again_or_resumed(
    cli: Callable, no_figures: None, tiny: Path, run_dir: Path, monkeypatch: Patch, step: tuple
) -> None:
    new, argv = run_dir.with_name("new"), ["--data", tiny, *TRAINING, "--log-dir", run_dir.parent]
    monkeypatch.setattr(Runs.fcntl, "flock", lambda *_args: os.rmdir("/no/locks/here"))

    def stop(*_args: object) -> None:
        (new / ".config.json.7.tmp").touch()  # as SIGKILL leaves it
        raise Stopped(signal.SIGTERM)

    with Patch.context() as patch:
        steps = iter([getattr(*step[:2])] * step[2] + [stop])
        patch.setattr(*step[:2], lambda *args: next(steps)(*args))
        status, _, err = cli(*argv, "--name", "new")
    assert status == 143 and ("--resume" in err) == (step[0] == Training)
    time.sleep(1.1)  # TensorBoard orders a log's files by the second
    assert cli(*(["--resume", new] if "--resume" in err else [*argv, "--name", "new"]))[0] == 0
    assert different_checkpoints(new, run_dir) == [] and not list(new.glob(".*.tmp"))
    assert kill_runs.curves(new) == kill_runs.curves(run_dir)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that gives a file system of so many bytes."""
    (folder := tmp_path / "disk").mkdir()

    def mount(size: int) -> Path:
        option = f"{'remount,' * os.path.ismount(folder)}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system is not permitted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=os.path.ismount(folder), capture_output=True)


def test_a_checkpoint_that_does_not_fit(
    cli: Callable, no_figures: None, trained: SimpleNamespace, tiny: Path, small_disk: Callable
) -> None:
    weights = (trained.run_dir / "best.pt").stat().st_size
    # The first last.pt and best.pt take one of these each, and the next last.pt two or three.
    run_dir = small_disk(int(3.6 * weights)) / "run"
    argv = ["--data", tiny, *TRAINING, "--log-dir", run_dir.parent, "--name", "run"]
    assert re.search(f"{run_dir}/last.pt: .*No space left", only_line(cli(*argv)[2]))
    assert kill_runs.checkpoint_epoch(run_dir) == 0 and not list(run_dir.glob(".*.tmp"))
    small_disk(100 * weights)
    assert cli("--resume", run_dir)[::2] == (0, "")
    assert different_checkpoints(run_dir, trained.run_dir) == []


@pytest.mark.parametrize("size", [4096, 262_144])
def test_a_disk_that_is_full_from_the_start(
    tiny: Path, tmp_path: Path, small_disk: Callable, size: int
) -> None:
    # In a process of its own, for what TensorBoard's thread says when it cannot write.
    argv = ["--data", tiny, *TRAINING, "--log-dir", small_disk(size), "--name", "run"]
    assert kill_runs.finish(argv, tmp_path / "log") == 2
    log = (tmp_path / "log").read_text()
    assert re.fullmatch("(.* parameters.*\n)?error: .*No space left.*\n", log), log


def test_a_disk_that_is_full_at_the_end(cli: Callable, run_dir: Path, small_disk: Callable) -> None:
    disk = small_disk(60 * 2**20)
    copy, metrics = shutil.copytree(run_dir, disk / "run"), (run_dir / "metrics.json").read_bytes()
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
    assert "No space left" in only_line(cli("--evaluate", copy)[2])
    assert (copy / "metrics.json").read_bytes() == metrics
