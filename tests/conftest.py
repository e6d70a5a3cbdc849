"""Shared by the tests: tiny data with a colour and a texture per class, and one trained run."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # their number changes the last bits of weights
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for scripts in this folder
import Figures
import PathMNIST
import Predict
from analyze_data import ROOT, PathData, load_data
from Script import run_script

SHARED = ROOT.parent / "shared" / "data"
COUNTS = {"train": 8, "val": 4, "test": 5}  # images per class
TRAINING = ["--epochs", "3", "--batch-size", "16", "--device", "cpu"]
TIMES = {"seconds", "train_seconds", "images_per_second"}


def make_arrays(counts: dict, size: int = 28, seed: int = 0) -> dict:
    """Return PathMNIST's six arrays; a class is a colour and the width of its stripes."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, n in counts.items():
        labels = np.repeat(np.arange(9), n)
        colour = np.stack([60 + 15 * labels, 220 - 15 * labels, 60 + 40 * (labels % 4)], axis=1)
        position = np.arange(size) + rng.integers(0, size, (len(labels), 1))
        stripes = np.where(position // (1 + labels[:, None] % 3) % 2, 25, -25)
        noise = rng.normal(0, 8, (len(labels), size, size, 3))
        images = colour[:, None, None, :] + stripes[:, :, None, None] + noise
        arrays[f"{split}_images"] = images.clip(0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    return arrays


def blank_figures(set_attribute: Callable) -> None:
    """Replace every figure by an empty one; `set_attribute` is monkeypatch's or the builtin."""
    for name in dir(Figures):
        if name == "learning_curves" or re.fullmatch("[a-z].*_figure", name):
            set_attribute(Figures, name, lambda *_args, **_kwargs: Figure(figsize=(1, 1)))


def differences(a: object, b: object, name: str = "") -> list:
    """Return where two checkpoints differ in any bit. Only the times that they took may differ."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [name]
    if isinstance(a, list | tuple):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not isinstance(a, dict):
        same = a == b or (a != a and b != b)  # nan is not equal to itself
        return [] if same else [f"{name}: {a} and {b}"]
    found = [f"{name}/{key} is in one only" for key in a.keys() ^ b.keys()]
    for key in a.keys() & b.keys() - TIMES:
        found += differences(a[key], b[key], f"{name}/{key}")
    return found


def different_checkpoints(run_a: Path, run_b: Path) -> list:
    """Return where best.pt and last.pt of two runs differ."""
    found = []
    for name in ("best.pt", "last.pt"):
        found += differences(torch.load(run_a / name), torch.load(run_b / name), name)
    return found


def only_line(text: str) -> str:
    """Return the one line that stderr must hold, without a traceback."""
    line = text.strip("\n")
    assert line.startswith("error: ") and "\n" not in line, text
    return line


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An npz file: 72 train, 36 val, 45 test images of 28 px."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **make_arrays(COUNTS))
    return path


@pytest.fixture(scope="session")
def data(tiny: Path) -> PathData:
    """The same, read."""
    return load_data(tiny)


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run from start to figures in a process of its own. Not to be written to: see `run_dir`."""
    log_dir = tmp_path_factory.mktemp("trained") / "runs"
    command = [sys.executable, "PathMNIST.py", "--data", os.path.relpath(tiny, ROOT), *TRAINING]
    command += ["--log-dir", log_dir, "--name", "main"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return SimpleNamespace(process=process, log_dir=log_dir, run_dir=log_dir / "main")


@pytest.fixture
def run_dir(trained: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the trained run's folder."""
    assert trained.process.returncode == 0, trained.process.stderr
    return shutil.copytree(trained.run_dir, tmp_path / "copy")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw empty figures."""
    blank_figures(monkeypatch.setattr)


def in_process(main: Callable, capfd: pytest.CaptureFixture, *argv: object) -> tuple:
    """Run a script's `main` in this process; return (exit status, stdout, stderr)."""
    capfd.readouterr()
    try:
        status = run_script(main, [str(arg) for arg in argv])
    except SystemExit as stop:  # from the argument parser
        status = stop.code
    return (status, *capfd.readouterr())


@pytest.fixture
def cli(capfd: pytest.CaptureFixture) -> Callable:
    """A function that runs PathMNIST.py with the given arguments."""
    return partial(in_process, PathMNIST.main, capfd)


@pytest.fixture
def predict_cli(capfd: pytest.CaptureFixture) -> Callable:
    """A function that runs Predict.py with the given arguments."""
    return partial(in_process, Predict.main, capfd)
