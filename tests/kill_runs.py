"""Kill a small run at random moments, resume it, and look for what was lost or is wrong.

    python tests/kill_runs.py --kills 30 --seed 0

Every second kill waits until a checkpoint is being written. A third of the runs are killed again
after they were resumed. In the end weights, optimiser state and history have to be bit-identical
with those of a run that nobody killed, and TensorBoard's three logs have to hold every epoch once.
Prints a table; the exit status is 1 if anything is lost or wrong.
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
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from conftest import COUNTS, blank_figures, different_checkpoints, make_arrays
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import PathMNIST
from Common import run_script

EPOCHS = 6
OPTIONS = ["--epochs", str(EPOCHS), "--batch-size", "16", "--device", "cpu", "--patience", "99"]
FAULTS = ("at a random moment", "while a file is written", "again, after a resume")


def new_run(folder: Path, name: str) -> list[str | Path]:
    """Return the options that start a run in `folder`, which `prepare` has filled."""
    return ["--data", folder / "tiny.npz", *OPTIONS, "--log-dir", folder, "--name", name]


def run_main(argv: list[str], log: Path) -> None:
    """Be `python PathMNIST.py argv`, with both outputs in `log`; empty figures, to save time."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)  # several runs share the processor
    blank_figures(setattr)
    sys.exit(run_script(PathMNIST.main, argv))


def start(argv: list[str | Path], log: Path, target: Callable = run_main) -> BaseProcess:
    """Start the command line in a process of its own, which need not import torch again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_runs"])
    process = context.Process(target=target, args=([str(a) for a in argv], log))
    process.start()
    return process


def finish(argv: list[str | Path], log: Path) -> int:
    """Run the command line to its end; return the exit status."""
    process = start(argv, log)
    process.join(1200)
    return process.exitcode


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> bool:
    """Wait until `condition()`; return whether that was in the process's lifetime."""
    end = time.monotonic() + 300
    while process.is_alive() and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def curves(run_dir: Path) -> dict[str, list]:
    """Return each log's and tag's (step, value) as TensorBoard shows them; of speeds the steps."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it remarks on every resume
    found = {}
    for part in ("", "train/", "val/"):
        log = EventAccumulator(str(run_dir / part), size_guidance={"scalars": 0})
        log.Reload()
        for tag in log.Tags()["scalars"]:
            is_speed = tag.startswith("Images")
            found[part + tag] = [(e.step, is_speed or e.value) for e in log.Scalars(tag)]
        assert part or log.Graph()  # raises ValueError where there is none
    return found


def checkpoint_epoch(run_dir: Path) -> int:
    """Return the epoch of last.pt, -1 without one. Raises when any checkpoint is not whole."""
    epochs = {p.name: torch.load(p, weights_only=True)["epoch"] for p in run_dir.glob("*.pt")}
    return epochs.get("last.pt", -1)


def what_is_wrong(run_dir: Path, reference: Path) -> list[str]:
    """Return how a run's results differ from the uninterrupted run's."""
    differing = different_checkpoints(run_dir, reference)
    wrong = [f"{len(differing)} values of the checkpoints: {differing[:3]}"] if differing else []
    ours, theirs = curves(run_dir), curves(reference)
    tags = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    wrong += [f"TensorBoard: {tag} {ours.get(tag)}, not {theirs.get(tag)}" for tag in tags]
    with open(run_dir / "history.csv", encoding="utf-8") as file:
        epochs = [row["epoch"] for row in csv.DictReader(file)]
    if epochs != [str(epoch) for epoch in range(1, EPOCHS + 1)]:
        wrong.append(f"history.csv: epochs {epochs}")
    a, b = (json.loads((run / "metrics.json").read_text()) for run in (run_dir, reference))
    keys = ("best_epoch", "epochs", "temperature", "val", "test", "val_tta", "test_tta")
    return wrong + [f"metrics.json: {key}" for key in keys if a[key] != b[key]]


def wait_for(fault: str, process: BaseProcess, run_dir: Path, rng: random.Random, run: float):
    """Wait for the moment of a fault, where a whole run takes `run` seconds."""
    if fault == FAULTS[1]:
        for _ in range(rng.randrange(1, 3 * EPOCHS)):  # the how many-th file
            wait_until(lambda: not any(run_dir.glob(".*.tmp")), process)
            wait_until(lambda: any(run_dir.glob(".*.tmp")), process)
        time.sleep(rng.choice([0, 0, rng.random() * 0.02]))
    else:
        process.join(rng.uniform(0.1, 0.9) * run)


def kill_one(folder: Path, name: str, seconds: float) -> tuple[list[str], str, str]:
    """Kill one run once or twice and resume it; return faults, what was lost, what is wrong."""
    rng, run_dir, log = random.Random(name), folder / name, folder / f"{name}.log"
    lost, epoch, argv, killed = "", -1, new_run(folder, name), []
    for fault in [FAULTS[int(name[-1]) % 2]] + [FAULTS[2]] * (rng.random() < 1 / 3):
        process = start(argv, log)
        wait_for(fault, process, run_dir, rng, seconds)
        killed += [fault] * process.is_alive()
        process.kill()
        process.join()
        try:
            before, epoch = epoch, checkpoint_epoch(run_dir)
        except Exception as error:  # whatever torch says of a file that is not whole
            return killed, f"a checkpoint: {error!r}", ""
        lost = lost or (f"epoch {before} of last.pt" if epoch < before else "")
        begun = (run_dir / "config.json").exists()  # else the same command must do
        argv = ["--resume", run_dir] if begun else new_run(folder, name)
        time.sleep(1.1)  # TensorBoard orders a log's files by the second in which they were begun
    status, text = finish(argv, log), log.read_text(errors="replace")
    if status != 0 or "Traceback" in text:
        return killed, f"exit status {status}: {text[-500:]}", ""
    return killed, lost, "; ".join(what_is_wrong(run_dir, folder / "reference"))


def prepare(folder: Path) -> float:
    """Make data, and the run that nobody kills; return the seconds that it took."""
    np.savez(folder / "tiny.npz", **make_arrays(COUNTS))
    finish(["--help"], folder / "help")  # imports torch, once for all processes
    begin = time.monotonic()
    if finish(new_run(folder, "reference"), folder / "log"):
        raise RuntimeError(f"the run without a fault failed: {(folder / 'log').read_text()}")
    return time.monotonic() - begin


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="default: 30")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args(argv)
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        folder, seconds = Path(name), prepare(Path(name))
        names = [f"seed{args.seed}-{number}" for number in range(args.kills)]
        found = pool.map(lambda name: kill_one(folder, name, seconds), names)
        for name, (killed, lost, wrong) in zip(names, found, strict=True):
            rows += [(fault, bool(lost), bool(wrong)) for fault in killed]
            if lost or wrong:
                print(f"{name}, killed {' and '.join(killed)}: lost {lost!r}, wrong {wrong!r}")
    print("| SIGKILL | tried | lost | wrong |\n|---|---:|---:|---:|")
    for fault in FAULTS:
        of = [row[1:] for row in rows if row[0] == fault]
        print(f"| {fault} | {len(of)} | {sum(x for x, _ in of)} | {sum(x for _, x in of)} |")
    print(f"{len(rows)} kills of {args.kills} runs in {time.monotonic() - begin:.0f} s")
    return 0 if rows and not any(lost or wrong for _, lost, wrong in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
