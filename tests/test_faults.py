"""Tests of what must not be lost or let in: python -m pytest tests/test_faults.py

Kills at many more moments: python tests/kill_runs.py --kills 30
"""

import errno
import io
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import kill_runs
import numpy as np
import pytest
import torch
from conftest import TRAINING, different_checkpoints, only_line

import PathMNIST
from analyze_data import UserError
from MyModels import MODELS
from Training import load_checkpoint

# ---- hostile checkpoints ------------------------------------------------------------------------


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def saved(value: object, **options: object) -> bytes:
    """Return what torch.save makes of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def other_shapes(checkpoint: dict) -> dict:
    """Return a checkpoint whose every matrix has lost a row."""
    weights = {k: v[1:] if v.ndim > 1 else v for k, v in checkpoint["model"].items()}
    return checkpoint | {"model": weights, "averaged": weights}


HOSTILE = {  # name: (content, from the real file's content and the marker's path; what is said)
    "pickle": (lambda real, marker: pickle.dumps(Evil(marker)), "not a checkpoint"),
    "pickle in a dict": (
        lambda real, marker: saved(load(real) | {"epoch": Evil(marker)}),
        "refused",
    ),
    "pickle of protocol 4": (
        lambda real, marker: saved(Evil(marker), pickle_protocol=4),
        "refused",
    ),
    "old format": (
        lambda real, marker: saved({"model": Evil(marker)}, _use_new_zipfile_serialization=False),
        "not a checkpoint",
    ),
    "a whole model": (lambda real, marker: saved(MODELS["skipcnn"]()), "refused"),
    "cut to nothing": (lambda real, marker: b"", "damaged"),
    "cut to 4 bytes": (lambda real, marker: real[:4], "damaged"),
    "cut to 1000 bytes": (lambda real, marker: real[:1000], "damaged"),
    "cut in half": (lambda real, marker: real[: len(real) // 2], "damaged"),
    "cut by one byte": (lambda real, marker: real[:-1], "damaged"),
    "text": (lambda real, marker: b"epoch,loss\n1,0.5\n", "not a checkpoint"),
    "JSON": (lambda real, marker: b'{"model": {}, "config": {}, "epoch": 1}\n', "not a checkpoint"),
    "random bytes": (lambda real, marker: np.random.default_rng(0).bytes(5000), "not a checkpoint"),
    "a tensor": (lambda real, marker: saved(torch.zeros(3)), "not a checkpoint"),
    "other weights": (lambda real, marker: saved({"weight": torch.zeros(3)}), "not a checkpoint"),
    "wrong types": (
        lambda real, marker: saved({"model": 1, "config": 2, "epoch": "x", "identity": 3}),
        "not a checkpoint",
    ),
    "other shapes": (lambda real, marker: saved(other_shapes(load(real))), "do not fit"),
    "no weights": (lambda real, marker: saved(load(real) | {"model": {}}), "do not fit"),
    "another model": (
        lambda real, marker: saved(
            load(real)
            | {"model": MODELS["resnet18"]().state_dict()}
            | {"config": load(real)["config"] | {"model": "resnet18"}}
        ),
        "resnet18",
    ),
    "a model of the future": (
        lambda real, marker: saved(load(real) | {"config": {"model": "vit"}}),
        "vit",
    ),
}


def load(content: bytes) -> dict:
    """Read a checkpoint's bytes without this project's own code."""
    return torch.load(io.BytesIO(content), weights_only=True)


def put(path: Path, kind: str, marker: Path) -> str:
    """Replace a checkpoint by a hostile one; return what has to be said about it."""
    make, said = HOSTILE[kind]
    path.write_bytes(make(path.read_bytes(), marker))
    return said


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("mode", ["--evaluate", "--predict"])
def test_hostile_best_checkpoint(
    cli: Callable, run_dir: Path, tmp_path: Path, kind: str, mode: str
) -> None:
    marker = tmp_path / "marker"
    said = put(run_dir / "best.pt", kind, marker)
    metrics = (run_dir / "metrics.json").read_bytes()
    tile = tmp_path / "tile.png"
    tile.write_bytes(b"never read")
    argv = [mode, run_dir]
    if mode == "--predict":
        if kind == "another model":
            return  # a whole and honest one of this project
        argv = [mode, tile, "--checkpoint", run_dir, "--log-dir", tmp_path / "out"]
    status, out, err = cli(*argv)
    line = only_line(err)
    assert status == 2 and out == ""
    assert str(run_dir / "best.pt") in line and said in line
    assert not marker.exists()
    assert (run_dir / "metrics.json").read_bytes() == metrics


@pytest.mark.parametrize("kind", [k for k in HOSTILE if k != "a model of the future"])
def test_hostile_last_checkpoint(cli: Callable, run_dir: Path, tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"
    said = put(run_dir / "last.pt", kind, marker)
    content = (run_dir / "last.pt").read_bytes()
    status, _, err = cli("--resume", run_dir)
    line = only_line(err)
    assert status == 2
    assert str(run_dir / "last.pt") in line and said in line
    assert not marker.exists()
    assert (run_dir / "last.pt").read_bytes() == content


@pytest.mark.parametrize(
    "change",
    [
        {"history": 5},
        {"history": [{"epoch": 1}]},
        {"optimizers": []},
        {"optimizers": [1, 2]},
        {"averaged": {}},
        {"epoch": 2},
    ],
    ids=str,
)
def test_a_last_checkpoint_with_a_foreign_part(cli: Callable, run_dir: Path, change: dict) -> None:
    path = run_dir / "last.pt"
    path.write_bytes(saved(load(path.read_bytes()) | change))
    status, _, err = cli("--resume", run_dir)
    assert status == 2 and str(path) in only_line(err)


def test_a_few_wrong_bytes_among_the_weights(run_dir: Path) -> None:
    data = bytearray((run_dir / "best.pt").read_bytes())
    data[len(data) // 2] ^= 255
    (run_dir / "best.pt").write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(run_dir / "best.pt")


def test_a_checkpoint_in_a_folder_that_may_not_be_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "glob", refuse)  # as `exists` and `is_dir` do in such a folder
    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(UserError, match="no such checkpoint"):
        PathMNIST.load_model(tmp_path / "secret" / "best.pt", "cpu")


def test_missing_checkpoints_are_named(cli: Callable, run_dir: Path) -> None:
    for name, mode in (("best.pt", "--evaluate"), ("last.pt", "--resume")):
        (run_dir / name).unlink()
        (run_dir / name).mkdir()  # a folder in its place is none either
        status, _, err = cli(mode, run_dir)
        assert status == 2 and name in only_line(err)


def test_any_bytes_are_refused_in_one_way(run_dir: Path, tmp_path: Path) -> None:
    # Mutated pickles reach every corner of the reader; only UserError may come out of it.
    rng = np.random.default_rng(0)
    small = {"model": {"w": torch.zeros(2)}, "config": {"lr": 0.1}, "epoch": 1, "identity": {}}
    whole = saved(small)
    path = tmp_path / "mutated.pt"
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 20)):
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(content)
        try:
            checkpoint = load_checkpoint(path)
        except UserError:
            refused += 1
        else:
            assert {"model", "config", "epoch"} <= checkpoint.keys()
    assert refused > 100


# ---- kill, two at once, the same twice ----------------------------------------------------------


def test_two_kills(capsys: pytest.CaptureFixture) -> None:
    assert kill_runs.main(["--kills", "2", "--seed", "1"]) == 0, capsys.readouterr().out
    table = capsys.readouterr().out
    for fault in kill_runs.FAULTS[:2]:
        assert f"| {fault} | 1 | 0 | 0 |" in table


def test_a_second_process_may_not_resume_the_same_run(cli: Callable, run_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    with PathMNIST.lock(run_dir):  # as the first process holds it
        status, _, err = cli("--resume", run_dir)
    assert status == 2 and "another process" in only_line(err)
    after = {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    assert after.pop(run_dir / ".lock") and before.pop(run_dir / ".lock")
    assert after == before


def test_a_file_system_without_locks(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_args: object) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(PathMNIST.fcntl, "flock", flock)
    with PathMNIST.lock(run_dir) as file:
        assert not file.closed


def test_two_processes_make_the_same_weights(
    cli: Callable, no_figures: None, trained: SimpleNamespace, tiny: Path, tmp_path: Path
) -> None:
    status, _, _ = cli("--data", tiny, *TRAINING, "--log-dir", tmp_path, "--name", "again")
    assert status == 0
    assert different_checkpoints(tmp_path / "again", trained.run_dir) == []


# ---- full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that gives a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        option = f"{'remount,' * os.path.ismount(folder)}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system is not permitted here")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_that_does_not_fit(
    cli: Callable, no_figures: None, trained: SimpleNamespace, tiny: Path, small_disk: Callable
) -> None:
    # Weights are 1: the first last.pt takes 2, the first best.pt 1, and the next last.pt 3 or 4.
    weights = (trained.run_dir / "best.pt").stat().st_size
    disk = small_disk(int(4.6 * weights))
    run_dir = disk / "run"
    argv = ["--data", tiny, *TRAINING, "--log-dir", disk, "--name", "run"]
    status, _, err = cli(*argv)
    line = only_line(err)
    assert status == 2
    assert str(run_dir / "last.pt") in line and "No space left" in line
    assert kill_runs.checkpoint_epoch(run_dir) == 0
    assert not list(run_dir.glob(".*.tmp"))

    small_disk(100 * weights)
    status, _, err = cli("--resume", run_dir)
    assert (status, err) == (0, "")
    assert different_checkpoints(run_dir, trained.run_dir) == []


@pytest.mark.parametrize("size", [4096, 65_536, 262_144])
def test_a_disk_that_is_full_from_the_start(
    tiny: Path, tmp_path: Path, small_disk: Callable, size: int
) -> None:
    # In a process of its own, for what TensorBoard's thread says when it cannot write.
    argv = ["--data", tiny, *TRAINING, "--log-dir", small_disk(size), "--name", "run"]
    assert kill_runs.finish(argv, tmp_path / "log") == 2
    *said, last = (tmp_path / "log").read_text().splitlines()
    assert last.startswith("error: ") and "No space left" in last
    assert len(said) <= 1 and all("parameters" in line for line in said), said


def test_a_disk_that_is_full_at_the_end(
    cli: Callable, run_dir: Path, tmp_path: Path, small_disk: Callable
) -> None:
    disk = small_disk(60 * 2**20)
    copy = shutil.copytree(run_dir, disk / "run")
    metrics = (copy / "metrics.json").read_bytes()
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(free - 4096))
    status, _, err = cli("--evaluate", copy)
    assert status == 2 and "No space left" in only_line(err)
    assert (copy / "metrics.json").read_bytes() == metrics
    assert kill_runs.checkpoint_epoch(copy) == 3
