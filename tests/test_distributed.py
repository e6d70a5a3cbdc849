"""Tests of training in two processes (torchrun): python -m pytest tests/test_distributed.py"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRAINING, differences

# What each process runs: the command line, noting its weights after every epoch.
WORKER = """
import os, sys
import torch
from conftest import blank_figures
import PathMNIST, Training

folder, rank = sys.argv[1], os.environ["RANK"]
synchronise, seen = Training.synchronise_buffers, []

def note(model, averaged):
    synchronise(model, averaged)
    weights = {"model": model.state_dict(), "averaged": averaged.state_dict()}
    seen.append({part: {k: v.clone() for k, v in w.items()} for part, w in weights.items()})
    torch.save(seen, f"{folder}/rank{rank}.tmp")
    os.replace(f"{folder}/rank{rank}.tmp", f"{folder}/rank{rank}.weights")

Training.synchronise_buffers = note
blank_figures(setattr)
with open(f"{folder}/rank{rank}.pid", "w") as file:
    file.write(str(os.getpid()))
sys.exit(PathMNIST.main(sys.argv[2:]))
"""


def start(folder: Path, *argv: object) -> subprocess.Popen:
    """Start `torchrun --nproc-per-node=2 PathMNIST.py argv`."""
    (folder / "worker.py").write_text(WORKER)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(folder / "worker.py"), str(folder), *map(str, argv)]
    with open(folder / "output", "w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def job(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job of two processes that ran to its end."""
    folder = tmp_path_factory.mktemp("job")
    process = start(folder, "--data", tiny, *TRAINING, "--log-dir", folder, "--name", "run")
    status = process.wait(300)
    assert status == 0, (folder / "output").read_text()
    return folder


def test_both_processes_end_with_the_same_weights(job: Path) -> None:
    ranks = [torch.load(job / f"rank{rank}.weights", weights_only=True) for rank in (0, 1)]
    assert len(ranks[0]) == 3  # epochs
    assert differences(*ranks) == []
    last = torch.load(job / "run" / "last.pt", weights_only=True)
    assert differences(ranks[1][-1]["model"], dict(last["model"])) == []
    assert differences(ranks[1][-1]["averaged"], dict(last["averaged"])) == []
    assert differences(ranks[0][0]["model"], ranks[0][1]["model"]) != []  # it did train


def test_each_process_trains_on_its_own_half(job: Path) -> None:
    # 72 images in two shares of 36, in batches of 16: three steps an epoch.
    assert "3 epochs of 3 batches of 16" in (job / "output").read_text()


def test_one_process_writes(job: Path) -> None:
    assert len(list(job.rglob("events*"))) == 1
    assert {path.name for path in job.iterdir() if path.is_dir()} == {"run"}


def test_metrics_equal_those_of_one_process(job: Path, cli: Callable, no_figures: None) -> None:
    path = job / "run" / "metrics.json"
    two = json.loads(path.read_text())
    status, _, _ = cli("--evaluate", job / "run", "--device", "cpu")
    assert status == 0
    one = json.loads(path.read_text())
    for split in ("val", "test", "val_tta", "test_tta"):
        assert one[split]["confusion_matrix"] == two[split]["confusion_matrix"]
        for name in ("accuracy", "auc", "loss", "ece", "macro_f1"):
            assert one[split][name] == pytest.approx(two[split][name], abs=1e-6), (split, name)
    # Validation in training was shared between the two, and its sums joined.
    history = torch.load(job / "run" / "last.pt", weights_only=True)["history"]
    row = history[two["best_epoch"] - 1]
    for name in ("accuracy", "auc", "loss"):
        assert row[f"val_{name}"] == pytest.approx(one["val"][name], abs=1e-6)


def test_a_killed_process_ends_the_job(tiny: Path, tmp_path: Path) -> None:
    argv = ["--data", tiny, *TRAINING, "--epochs", "9999", "--log-dir", tmp_path, "--name", "run"]
    last = tmp_path / "run" / "last.pt"  # the last file that an epoch writes

    def epochs_saved() -> int:
        return torch.load(last, weights_only=True)["epoch"] if last.exists() else 0

    process = start(tmp_path, *argv)
    try:
        while process.poll() is None and not epochs_saved():
            time.sleep(0.05)
        assert process.poll() is None, (tmp_path / "output").read_text()
        os.kill(int((tmp_path / "rank1.pid").read_text()), signal.SIGKILL)
        assert process.wait(120) != 0
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):  # the other one does not live on alone
        os.kill(int((tmp_path / "rank0.pid").read_text()), 0)
    for name in ("best.pt", "last.pt"):
        assert torch.load(tmp_path / "run" / name, weights_only=True)["epoch"] >= 1


def test_a_taken_name_ends_both_processes_with_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    process = start(tmp_path, "--data", tiny, *TRAINING, "--log-dir", tmp_path, "--name", "run")
    assert process.wait(120) != 0
    output = (tmp_path / "output").read_text()
    assert output.count("exists already") == 1
    assert "broadcast_object_list" not in output  # no traceback of the second process
