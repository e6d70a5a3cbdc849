"""Kill a small run at random moments, resume it, and look for what was lost or is wrong.

    python tests/kill_runs.py --kills 30 --seed 0

Every second kill waits until a checkpoint is being written. A third of the runs are killed again
after they were resumed. In the end weights, optimiser state and history have to be bit-identical
with those of a run that nobody killed, and TensorBoard's curves have to hold every epoch once.
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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from conftest import COUNTS, ROOT, blank_figures, different_checkpoints, make_arrays

EPOCHS = 6
OPTIONS = ["--epochs", str(EPOCHS), "--batch-size", "16", "--device", "cpu", "--patience", "99"]
FAULTS = ("at a random moment", "while a file is written", "again, after a resume")


# ---- processes ----------------------------------------------------------------------------------


def run_main(argv: list[str], log: Path) -> None:
    """Be `python PathMNIST.py argv`, with both outputs in `log`; empty figures, to save time."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    import torch

    import PathMNIST

    torch.set_num_threads(1)  # several runs share the processor
    blank_figures(setattr)
    sys.exit(PathMNIST.main(argv))


def start(argv: list[str | Path], log: Path, target: Callable = run_main) -> BaseProcess:
    """Start the command line in a process of its own, which need not import torch again."""
    sys.path.insert(0, str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["PathMNIST"])
    process = context.Process(target=target, args=([str(a) for a in argv], log))
    process.start()
    return process


def finish(argv: list[str | Path], log: Path) -> int:
    """Run the command line to its end; return the exit status."""
    process = start(argv, log)
    process.join(1200)
    return process.exitcode


def wait_until(
    condition: Callable[[], bool], process: BaseProcess, wanted: bool = True, seconds: float = 300
) -> bool:
    """Wait until `condition()` is as wanted; return whether that was in the process's lifetime."""
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        if condition() == wanted:
            return True
        time.sleep(0.0005)
    return False


def is_writing(run_dir: Path) -> bool:
    """Return whether a file is being written there, under its temporary name."""
    return run_dir.is_dir() and any(name.endswith(".tmp") for name in os.listdir(run_dir))


# ---- what a run left ----------------------------------------------------------------------------


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return each tag's (step, value) pairs as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it remarks on every resume
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    log.Reload()
    log.Graph()  # raises ValueError where there is none
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def checkpoint_epoch(run_dir: Path) -> int:
    """Return the epoch of last.pt, -1 without one. Raises when any checkpoint is not whole."""
    import torch

    epochs = {p.name: torch.load(p, weights_only=True)["epoch"] for p in run_dir.glob("*.pt")}
    return epochs.get("last.pt", -1)


def what_is_wrong(run_dir: Path, reference: Path) -> list[str]:
    """Return how a run's results differ from the uninterrupted run's."""
    differing = different_checkpoints(run_dir, reference)
    wrong = [f"{len(differing)} values of the checkpoints: {differing[:3]}"] if differing else []
    ours, theirs = curves(run_dir), curves(reference)
    if ours.keys() != theirs.keys():
        wrong.append(f"TensorBoard: tags {sorted(ours.keys() ^ theirs.keys())}")
    for tag in ours.keys() & theirs.keys():
        pairs = list(zip_longest(ours[tag], theirs[tag], fillvalue=(0, 0.0)))
        if tag.startswith("Speed"):
            pairs = [(a[:1], b[:1]) for a, b in pairs]  # the steps alone
        first = next((f"{a}, not {b}" for a, b in pairs if a != b), "")
        if first:
            wrong.append(f"TensorBoard: {tag} {first}")
    with open(run_dir / "history.csv", encoding="utf-8") as file:
        epochs = [row["epoch"] for row in csv.DictReader(file)]
    if epochs != [str(epoch) for epoch in range(1, EPOCHS + 1)]:
        wrong.append(f"history.csv: epochs {epochs}")
    metrics = [json.loads((d / "metrics.json").read_text()) for d in (run_dir, reference)]
    for key in ("best_epoch", "epochs", "val", "test", "val_tta", "test_tta"):
        if metrics[0][key] != metrics[1][key]:
            wrong.append(f"metrics.json: {key}")
    return wrong


# ---- one run, killed and resumed ----------------------------------------------------------------


@dataclass
class Setting:
    """What all killed runs share."""

    folder: Path
    data: Path
    reference: Path
    seconds: float  # that the uninterrupted run took


def kill_one(number: int, seed: int, setting: Setting) -> list[tuple[str, str, str]]:
    """Kill one run once or twice and resume it; return (fault, what was lost, what is wrong)."""
    rng = random.Random(f"{seed}-{number}")
    run_dir, log = setting.folder / f"run{number}", setting.folder / f"log{number}"
    new = ["--data", setting.data, *OPTIONS, "--log-dir", setting.folder, "--name", run_dir.name]
    faults = [FAULTS[number % 2]] + [FAULTS[2]] * (rng.random() < 1 / 3)
    lost, epoch, argv, killed = "", -1, new, []
    for fault in faults:
        process = start(argv, log)
        if fault == FAULTS[1]:
            for _ in range(rng.randrange(1, 3 * EPOCHS)):  # the how many-th file
                wait_until(partial(is_writing, run_dir), process, False)
                wait_until(partial(is_writing, run_dir), process)
            time.sleep(rng.choice([0, 0, rng.random() * 0.02]))
        else:
            process.join(rng.uniform(0.1, 0.9) * setting.seconds)
        killed += [fault] * process.is_alive()
        process.kill()
        process.join()
        try:
            now = checkpoint_epoch(run_dir)
            lost = lost or (f"epoch {epoch} of last.pt" if now < epoch else "")
            epoch = now
        except Exception as error:  # whatever torch says of a file that is not whole
            return [(fault, f"a checkpoint: {error!r}", "") for fault in killed]
        if epoch < 0:  # nothing was there yet to go on from
            new[-1] += "-again"
            run_dir = run_dir.with_name(new[-1])
        argv = new if epoch < 0 else ["--resume", run_dir]
        # TensorBoard orders the log's files by the second in which they were begun.
        time.sleep(1.1)
    status = finish(argv, log)
    text = log.read_text(errors="replace")
    if status != 0 or "Traceback" in text:
        return [(fault, f"exit status {status}: {text[-500:]}", "") for fault in killed]
    wrong = "; ".join(what_is_wrong(run_dir, setting.reference))
    return [(fault, lost, wrong) for fault in killed]


def prepare(folder: Path) -> Setting:
    """Make data, and the run that nobody kills."""
    data = folder / "tiny.npz"
    np.savez(data, **make_arrays(COUNTS))
    argv = ["--data", data, *OPTIONS, "--log-dir", folder, "--name", "reference"]
    finish(["--help"], folder / "help")  # imports torch, once for all processes
    begin = time.monotonic()
    status = finish(argv, folder / "log")
    if status != 0:
        raise RuntimeError(f"the run without a fault failed: {(folder / 'log').read_text()}")
    return Setting(folder, data, folder / "reference", time.monotonic() - begin)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="default: 30")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    tried, lost, wrong = Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        setting = prepare(Path(name))
        runs = [pool.submit(kill_one, n, args.seed, setting) for n in range(args.kills)]
        for number, run in enumerate(runs):
            for fault, what_lost, what_wrong in run.result():
                tried[fault] += 1
                lost[fault] += bool(what_lost)
                wrong[fault] += bool(what_wrong)
                if what_lost or what_wrong:
                    print(f"run {number}, killed {fault}: lost {what_lost!r}, wrong {what_wrong!r}")
    print("| SIGKILL | tried | lost | wrong |\n|---|---:|---:|---:|")
    for fault in tried:
        print(f"| {fault} | {tried[fault]} | {lost[fault]} | {wrong[fault]} |")
    print(f"{tried.total()} kills of {args.kills} runs in {time.monotonic() - begin:.0f} s")
    return 1 if lost.total() or wrong.total() or not tried.total() else 0


if __name__ == "__main__":
    sys.exit(main())
