"""Shared by the tests: tiny data with a colour and a texture per class, and one trained run."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
COUNTS = {"train": 8, "val": 4, "test": 5}  # images per class
TRAINING = ["--epochs", "3", "--batch-size", "16", "--device", "cpu"]


def make_arrays(counts: dict[str, int], size: int = 28, seed: int = 0) -> dict[str, np.ndarray]:
    """Return PathMNIST's six arrays; a class is a colour and the width of its stripes."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, n in counts.items():
        labels = np.repeat(np.arange(9), n)
        colour = np.stack([60 + 15 * labels, 220 - 15 * labels, 60 + 40 * (labels % 4)], axis=1)
        position = np.arange(size) + rng.integers(0, size, (len(labels), 1))
        stripes = np.where(position // (1 + labels[:, None] % 3) % 2, 25, -25)
        images = colour[:, None, None, :] + stripes[:, :, None, None]
        images = images + rng.normal(0, 8, (len(labels), size, size, 3))
        arrays[f"{split}_images"] = images.clip(0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    return arrays


def blank_figures(set_attribute: Callable[[object, str, object], None]) -> None:
    """Replace every figure by an empty one, where figures are not what a test is about.

    `set_attribute` is monkeypatch's `setattr`, or the builtin in a process of its own.
    """
    from matplotlib.figure import Figure

    import Evaluation

    for name in dir(Evaluation):
        if name == "learning_curves" or (name.endswith("_figure") and name[0] != "_"):
            set_attribute(Evaluation, name, lambda *_args, **_kwargs: Figure(figsize=(1, 1)))


def differences(a: object, b: object, name: str = "") -> list[str]:
    """Return where two checkpoints differ in any bit; times (`seconds`) may differ."""
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{name}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        kept = [key for key in a if key not in ("seconds", "images_per_second")]
        return [d for key in kept for d in differences(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{name}/{i}")]
    return [] if a == b or (a != a and b != b) else [f"{name}: {a} and {b}"]


def different_checkpoints(run_a: Path, run_b: Path) -> list[str]:
    """Return where best.pt and last.pt of two runs differ."""
    import torch

    found = []
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(run / name, weights_only=True) for run in (run_a, run_b))
        found += differences(a, b, name)
    return found


def only_line(text: str) -> str:
    """Return the one line that stderr must hold, without a traceback."""
    lines = text.strip("\n").split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An npz file: 72 train, 36 val, 45 test images of 28 px."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **make_arrays(COUNTS))
    return path


@pytest.fixture(scope="session")
def data(tiny: Path) -> object:
    """The same, read."""
    from analyze_data import load_data

    return load_data(tiny)


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run from start to figures in a process of its own. Not to be written to: see `run_dir`."""
    log_dir = tmp_path_factory.mktemp("trained") / "runs"
    command = [sys.executable, "PathMNIST.py", "--data", str(tiny), *TRAINING]
    command += ["--log-dir", str(log_dir), "--name", "main"]
    process = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    return SimpleNamespace(process=process, log_dir=log_dir, run_dir=log_dir / "main")


@pytest.fixture
def run_dir(trained: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the trained run's folder."""
    assert trained.process.returncode == 0, trained.process.stderr
    return shutil.copytree(trained.run_dir, tmp_path / "copy")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put back the handlers of signals and threads' errors that `PathMNIST.main` replaces."""
    excepthook = threading.excepthook
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    threading.excepthook = excepthook
    for each, handler in handlers.items():
        signal.signal(each, handler)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw empty figures."""
    blank_figures(monkeypatch.setattr)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return (exit status, stdout, stderr)."""
    import PathMNIST

    def run(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = PathMNIST.main([os.fspath(a) if isinstance(a, Path) else a for a in argv])
        except SystemExit as stop:
            status = stop.code
        return (status, *capfd.readouterr())

    return run
