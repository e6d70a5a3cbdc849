"""Tests of training in two processes (torchrun): python -m pytest tests/test_distributed.py"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COUNTS, ROOT, TRAINING, differences, different_checkpoints, make_arrays

from Evaluation import RESULTS

# What each process runs. It notes its weights after every epoch; with KILL the second dies early.
WORKER = """
import os, signal, sys
import torch
from conftest import blank_figures
import Common, PathMNIST, Training

folder, rank, seen, train = sys.argv[1], os.environ["RANK"], [], Training.train_one_epoch

def note(net, state, *others):
    row = train(net, state, *others)
    seen.append({name: p.detach().clone() for name, p in state.model.named_parameters()})
    torch.save(seen, f"{folder}/rank{rank}.weights")
    if "KILL" in os.environ and rank == "1" and len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return row

Training.train_one_epoch = note
blank_figures(setattr)
print(os.getpid(), file=open(f"{folder}/rank{rank}.pid", "w"), flush=True)
sys.exit(Common.run_script(PathMNIST.main, sys.argv[2:]))
"""


def torchrun(folder: Path, *argv: object, **environment: str) -> tuple[int, str]:
    """Run `torchrun --nproc-per-node=2 PathMNIST.py argv`; return exit status and output."""
    (folder / "worker.py").write_text(WORKER)
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")} | environment
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [folder / "worker.py", folder, *map(str, argv)]
    options = {"capture_output": True, "text": True, "timeout": 300, "env": env}
    process = subprocess.run(command, **options)
    return process.returncode, process.stdout + process.stderr


@pytest.fixture(scope="module")
def job(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job of two processes that ran to its end."""
    folder = tmp_path_factory.mktemp("job")
    status, out = torchrun(folder, "--data", tiny, *TRAINING, "--log-dir", folder, "--name", "run")
    # 72 images in two shares of 36, in batches of 16: three steps an epoch. One process speaks.
    assert status == 0 and out.count("3 epochs of 3 batches of 16") == 1, out
    return folder


def test_both_processes_train_the_same_weights(job: Path) -> None:
    ranks = [torch.load(job / f"rank{rank}.weights") for rank in (0, 1)]
    assert len(ranks[0]) == 3 and differences(*ranks) == [] != differences(*ranks[0][:2])
    last = torch.load(job / "run" / "last.pt")["model"].items()
    assert differences(ranks[1][-1], {name: w for name, w in last if name in ranks[1][-1]}) == []
    assert len(list(job.rglob("events*"))) == 3  # one process writes


def test_metrics_equal_those_of_one_process(job: Path, cli: Callable, no_figures: None) -> None:
    path = job / "run" / "metrics.json"
    two, (status, *_) = json.loads(path.read_text()), cli("--evaluate", path.parent)
    one = json.loads(path.read_text())
    for split, name in product(RESULTS, ("accuracy", "auc", "loss")):
        assert one[split][name] == pytest.approx(two[split][name], abs=1e-6)
    row = torch.load(job / "run" / "last.pt")["history"][two["best_epoch"] - 1]
    assert row["val_accuracy"] == one["val"]["accuracy"]
    kept = torch.load(job / "run" / "best.pt")["model"]["temperature"]
    assert status == 0 and one["temperature"] == two["temperature"] == kept != 1


def test_a_job_with_a_killed_process_is_resumed(job: Path, tiny: Path, tmp_path: Path) -> None:
    argv = ["--data", tiny, *TRAINING, "--log-dir", tmp_path, "--name", "run"]
    status, out = torchrun(tmp_path, *argv, KILL="1")
    other = int((tmp_path / "rank0.pid").read_text())
    assert status != 0 and not Path(f"/proc/{other}").exists()  # it does not live on alone
    assert 1 <= torch.load(tmp_path / "run" / "last.pt")["epoch"] < 3, out
    assert "resumed after epoch" in torchrun(tmp_path, "--resume", tmp_path / "run")[1]
    assert different_checkpoints(tmp_path / "run", job / "run") == []


@pytest.mark.parametrize("said", ["exists already", "val_labels run from 5 to 13"])
def test_an_error_is_one_line_of_one_process(tmp_path: Path, said: str) -> None:
    arrays = make_arrays(COUNTS)
    arrays["val_labels"] += 5 * ("labels" in said)
    np.savez(path := tmp_path / "some.npz", **arrays)
    (tmp_path / "run" / "notes").mkdir(parents=True)
    status, out = torchrun(tmp_path, "--data", path, "--log-dir", tmp_path, "--name", "run")
    assert status != 0 and re.search(f"^error: .*{said}", out, re.M) and out.count(said) == 1
    assert out.count("error: ") == 1 and "PathMNIST.py" not in out  # no traceback of the second
