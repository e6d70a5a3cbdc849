"""Kill a small run at random moments, resume it, and look for what was lost or is wrong.

    python tests/kill_runs.py --kills 30 --seed 0

Every second run is killed while a file is being written, the others at any moment. A third of the
runs are killed again after they were resumed. In the end, weights, optimiser state and history have
to be bit-identical to those of a run that nobody killed, and TensorBoard's three logs have to hold
every epoch once. The exit status is 1 if anything is lost or wrong.
"""

import argparse
import csv
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from conftest import COUNTS, blank_figures, differences, different_checkpoints, make_arrays
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import PathMNIST
from Script import run_script

EPOCHS = 6
OPTIONS = ["--epochs", str(EPOCHS), "--batch-size", "16", "--device", "cpu", "--patience", "99"]
MOMENTS = ("at a random moment", "while a file is written", "again, after a resume")


def new_run(folder: Path, name: str) -> list:
    """Return the options that start a run in `folder`, which `prepare` has filled."""
    return ["--data", folder / "tiny.npz", *OPTIONS, "--log-dir", folder, "--name", name]


def run_main(argv: list, log: Path) -> None:
    """Be `python PathMNIST.py argv`, with both outputs in `log`; empty figures, to save time."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout = open(1, "w")  # the old one takes a terminal for a file  # noqa: SIM115
    torch.set_num_threads(1)  # several runs share the processor
    blank_figures(setattr)
    sys.exit(run_script(PathMNIST.main, argv))


def start(argv: list, log: Path) -> BaseProcess:
    """Start the command line in a process of its own, which need not import torch again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_runs"])
    process = context.Process(target=run_main, args=([str(arg) for arg in argv], log))
    process.start()
    return process


def finish(argv: list, log: Path) -> int:
    """Run the command line to its end; return the exit status."""
    process = start(argv, log)
    process.join(1200)
    return process.exitcode


def wait_until(condition: Callable, process: BaseProcess) -> bool:
    """Wait until `condition()`; return whether that was in the process's lifetime."""
    end = time.monotonic() + 300
    while process.is_alive() and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def curves(run_dir: Path) -> dict:
    """Return each log's and tag's (step, value) as TensorBoard shows them; of speeds the steps."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it remarks on every resume
    found = {}
    for part in ("", "train/", "val/"):
        log = EventAccumulator(str(run_dir / part), size_guidance={"scalars": 0}).Reload()
        for tag in log.Tags()["scalars"]:
            events = log.Scalars(tag)
            found[part + tag] = [(e.step, tag.startswith("speed") or e.value) for e in events]
        assert part or log.Graph()  # raises ValueError where there is none
    return found


def checkpoint_epoch(run_dir: Path) -> int:
    """Return the epoch of last.pt, -1 without one. Raises when any checkpoint is not whole."""
    epochs = {path.name: torch.load(path)["epoch"] for path in run_dir.glob("*.pt")}
    return epochs.get("last.pt", -1)


def what_is_wrong(run_dir: Path, reference: Path) -> list:
    """Return how a run's results differ from the uninterrupted run's."""
    wrong = different_checkpoints(run_dir, reference)
    ours, theirs = curves(run_dir), curves(reference)
    for tag in ours.keys() | theirs.keys():
        if ours.get(tag) != theirs.get(tag):
            wrong.append(f"TensorBoard: {tag} {ours.get(tag)}, not {theirs.get(tag)}")
    with open(run_dir / "history.csv", encoding="utf-8") as file:
        epochs = [row["epoch"] for row in csv.DictReader(file)]
    if epochs != [str(epoch) for epoch in range(1, EPOCHS + 1)]:
        wrong.append(f"history.csv: epochs {epochs}")
    a, b = (json.loads((run / "metrics.json").read_text()) for run in (run_dir, reference))
    return wrong + differences(a, b, "metrics.json")


def wait_for(moment: str, process: BaseProcess, run_dir: Path, rng: random.Random, run: float):
    """Wait for the moment of a kill, where a whole run takes `run` seconds."""

    def is_writing() -> bool:
        return any(run_dir.glob(".*.unfinished"))

    if moment != "while a file is written":
        process.join(rng.uniform(0.1, 0.9) * run)
        return
    for _ in range(rng.randrange(1, 3 * EPOCHS)):  # an epoch writes up to three files
        wait_until(lambda: not is_writing(), process)
        wait_until(is_writing, process)
    time.sleep(rng.choice([0, 0, rng.random() * 0.02]))


def kill_one(folder: Path, seconds: float, name: str) -> tuple:
    """Kill one run once or twice and resume it. Return at which moments it was killed, and what was
    lost or is wrong."""
    rng = random.Random(name)
    run_dir, log = folder / name, folder / f"{name}.log"
    moments = [MOMENTS[int(name[-1]) % 2]]
    if rng.random() < 1 / 3:
        moments.append(MOMENTS[2])
    killed, epoch, argv = [], -1, new_run(folder, name)
    for moment in moments:
        process = start(argv, log)
        wait_for(moment, process, run_dir, rng, seconds)
        if process.is_alive():
            killed.append(moment)
        process.kill()
        process.join()
        before, epoch = epoch, checkpoint_epoch(run_dir)
        if epoch < before:
            return killed, [f"lost: epoch {before} of last.pt"]
        if (run_dir / "config.json").exists():  # else the same command must do
            argv = ["--resume", run_dir]
    status, text = finish(argv, log), log.read_text(errors="replace")
    if status != 0 or "Traceback" in text:
        return killed, [f"exit status {status}: {text[-500:]}"]
    return killed, what_is_wrong(run_dir, folder / "reference")


def prepare(folder: Path) -> float:
    """Make data, and the run that nobody kills; return the seconds that it took."""
    np.savez(folder / "tiny.npz", **make_arrays(COUNTS))
    finish(["--help"], folder / "help")  # imports torch, once for all processes
    begin = time.monotonic()
    if finish(new_run(folder, "reference"), folder / "log"):
        raise RuntimeError(f"the run without a kill failed: {(folder / 'log').read_text()}")
    return time.monotonic() - begin


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="runs to kill (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    count, status = 0, 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(max_workers=2) as pool:
        folder = Path(name)
        names = [f"seed{args.seed}-{number}" for number in range(args.kills)]
        for killed, wrong in pool.map(partial(kill_one, folder, prepare(folder)), names):
            count += len(killed)
            if wrong:
                print(f"killed {' and '.join(killed)}: {len(wrong)} faults, the first: {wrong[:3]}")
                status = 1
    print(f"{count} kills of {args.kills} runs: {'see above' if status else 'nothing lost'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
