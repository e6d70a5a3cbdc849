"""Train a small CNN on PathMNIST and evaluate it on val and test.

    python PathMNIST.py                                   # find the data, train, evaluate
    python PathMNIST.py --data pathmnist.npz --seeds 0 1 2 3 4
    python PathMNIST.py --resume runs/NAME                # go on after an interruption
    python PathMNIST.py --evaluate runs/NAME              # evaluate again, no training
    torchrun --nproc-per-node=2 PathMNIST.py              # several processes or GPUs

Every run leaves its own folder: TensorBoard log, weights, metrics, figures, predictions. New tiles
are classified by Predict.py.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import Evaluation
import Figures
import Runs
import Training
from analyze_data import ROOT, PathData, channel_stats, find_data, load_data
from Common import Parser, Stopped, UserError, as_path, run_script, write_json
from MyModels import MODELS, count_parameters
from Runs import Config
from Training import first_then_others, from_first, world

OPTIONS = {field.name for field in fields(Config)}
HONOURED = {"resume": {"data", "device"}, "evaluate": {"data", "device"}}  # other flags: refused


def number(kind: type, low: float, high: float):
    """Return an argparse type: a number of that kind within [low, high]."""

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not within {low:.10g} to {high:.10g}")
        return kind(text)

    parse.__name__ = kind.__name__  # what argparse calls the text that is no number
    return parse


def run_name(text: str) -> str:
    """Argparse type: a plain folder name, short enough for the files that are named after it."""
    if not re.fullmatch(r"(?a)[a-zA-Z0-9][\w.+-]{0,99}", text):
        what = "at most 100 letters, digits and ._+-, a letter or digit first"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return text


def build_parser() -> Parser:
    """Return the command line. What is not given is absent, so that `Config` has the defaults."""
    default = Config()
    parser = Parser(__doc__, usage="%(prog)s [options]", argument_default=argparse.SUPPRESS)
    where = parser.add_argument_group("data and results")
    training = parser.add_argument_group("training")
    seeds = training.add_mutually_exclusive_group()
    others = parser.add_argument_group("instead of a new run (RUN: a run's folder, runs/NAME)")
    modes = others.add_mutually_exclusive_group()
    count, seed, share = number(int, 1, 100_000), number(int, 0, 2**31 - 1), number(float, 0, 1e6)
    batch, rate = number(int, 2, 65_536), number(float, 1e-12, 1e12)
    epochs = "default: by the number of images; all of them: {cpu} on a CPU, {cuda} on a GPU"
    epochs = epochs.format(**Training.EPOCHS)
    data = "npz file, or folder with pathmnist.npz (default: found or downloaded; else the run's)"
    stop = "stop after so many epochs without a val loss near the lowest (default: a third, >= 5)"
    for group, flag, kind, metavar, text in (
        (where, "--data", str, "PATH", data),
        (where, "--log-dir", as_path, "DIR", "folder of all runs (default: runs)"),
        (where, "--name", run_name, "NAME", "the run's folder there (default: model, seed, time)"),
        (training, "--epochs", count, "N", epochs),
        (
            training,
            "--batch-size",
            batch,
            "N",
            f"per step and process (default: {default.batch_size})",
        ),
        (training, "--lr", rate, "X", f"peak learning rate (default: {default.lr})"),
        (training, "--weight-decay", share, "X", f"default: {default.weight_decay}; not of biases"),
        (training, "--patience", count, "N", stop),
        (seeds, "--seed", seed, "N", f"of all that is random (default: {default.seed})"),
        (modes, "--resume", as_path, "RUN", "continue an interrupted run"),
        (modes, "--evaluate", as_path, "RUN", "evaluate a finished run, on its --data or another"),
    ):
        group.add_argument(flag, type=kind, metavar=metavar, help=text)
    text = "one run per seed, and their ensemble"
    seeds.add_argument("--seeds", type=seed, nargs="+", metavar="N", help=text)
    for flag, choices, text in (
        ("--model", MODELS, f"the network (default: {default.model})"),
        ("--device", ("auto", "cpu", "cuda"), "default: auto (a CUDA GPU, else the CPU)"),
        ("--precision", ("auto", "fp32", "bf16"), "default: auto (bf16 where it is fast)"),
    ):
        training.add_argument(flag, choices=choices, help=text)
    return parser


class EpochSampler(BatchSampler):
    """Batches of indices in an order that is a function of the number given to `set_epoch`."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next epoch."""
        self.sampler.set_epoch(epoch)


def make_loader(
    data: PathData, split: str, batch_size: int, device: str = "cpu", shuffle: bool = False
) -> DataLoader:
    """Return a loader of uint8 images (n, S, S, 3) and int64 labels (n,) of a split. One index, a
    list, fetches a whole batch (`batch_size=None` with a `BatchSampler`): no image is ever handled
    alone. For a GPU the split lies in its memory, if it takes no more than half of what is free
    there. With `shuffle`, each of several processes gets its own share."""
    tensors = [torch.from_numpy(array) for array in (data.images[split], data.labels[split])]
    pinned = device == "cuda"
    if pinned and sum(t.nbytes for t in tensors) < torch.cuda.mem_get_info()[0] / 2:
        tensors, pinned = [tensor.to(device) for tensor in tensors], False
    order, drop_last = range(len(tensors[0])), False
    if shuffle:
        rank, processes = world()
        order = DistributedSampler(tensors[0], processes, rank)
        # One image's statistics are no basis for BatchNorm: it waits for another epoch.
        drop_last = len(order) % batch_size == 1 and len(order) > 1
    sampler = EpochSampler(order, batch_size, drop_last)
    return DataLoader(TensorDataset(*tensors), None, sampler=sampler, pin_memory=pinned)


def main(argv: list[str] | None = None) -> None:
    """Do what the command line asks for: a new run, or one resumed or evaluated again."""
    args = vars(build_parser().parse_args(argv))
    mode = next((mode for mode in HONOURED if mode in args), None)
    for flag in args if mode else ():
        if flag != mode and flag not in HONOURED[mode]:
            name = f"--{flag.replace('_', '-')}"
            raise UserError(f"{name}: --{mode} keeps to the run's own options; leave it out")
    Training.prepare_processor()
    if mode == "evaluate":
        evaluate_run(args)
        return
    device = Runs.read_run(args["resume"])[1].device if mode == "resume" else "auto"
    device = Training.choose_device(args.get("device", device))
    Training.join_processes(device)
    try:
        resume_run(args, device) if mode == "resume" else new_run(args, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def new_run(args: dict, device: str) -> None:
    """Train one run, or with `--seeds` one per seed."""
    path = from_first(lambda: find_data(args.get("data")))
    data = first_then_others(lambda: load_data(path))
    config = Config(**{key: value for key, value in args.items() if key in OPTIONS})
    seeds = list(dict.fromkeys(args.get("seeds", [config.seed])))
    config = replace(config, device=device)
    config = Training.resolve(config, max(1, data.counts["train"] // world()[1]))
    names = "-".join(map(str, seeds))[:50]
    name = f"{config.model}-seed{names}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = args.get("name", f"synthetic-{name}" if data.kind == "synthetic" else name)
    run_dir = from_first(lambda: Runs.make_run_dir(args.get("log_dir", Path("runs")), name))
    train_seeds(data, config, seeds, run_dir)


def resume_run(args: dict, device: str) -> None:
    """Continue an interrupted run with its own options and data."""
    run_dir = args["resume"]
    settings, config = Runs.read_run(run_dir)
    data = data_of_run(args, settings)
    if data.md5 != settings["dataset"]["md5"]:
        what = f"{data.path}: not the file that {run_dir} was trained on"
        raise UserError(f"{what}; give that --data")
    if settings["processes"] != world()[1]:
        command = Runs.resume_command(run_dir, settings["processes"])
        raise UserError(f"{run_dir}: started with another number of processes; use {command}")
    train_seeds(data, replace(config, device=device), settings["seeds"], run_dir)


def train_seeds(data: PathData, config: Config, seeds: Sequence[int], run_dir: Path) -> None:
    """Train (or go on with) one run in `run_dir`, or one per seed in folders of their own."""
    runs, first, several = [], world()[0] == 0, len(seeds) > 1
    if first and several:
        write_json(run_dir / "config.json", run_settings(data, config) | {"seeds": seeds})
    try:
        for seed, seed_dir in zip(seeds, Runs.seed_dirs(run_dir, seeds), strict=True):
            from_first(lambda seed_dir=seed_dir: seed_dir.mkdir(exist_ok=True))
            runs.append(train(data, replace(config, seed=seed), seed_dir))
    except Stopped as stop:
        if first and any(run_dir.rglob("config.json")):
            stop.advice = f"; go on with: {Runs.resume_command(run_dir, world()[1])}"
        raise
    if first and several:
        Evaluation.summarise_seeds(runs, data, run_dir)


def train(data: PathData, config: Config, run_dir: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Train one model into `run_dir` (or go on there) and evaluate it. Returns metrics.json's
    content and the probabilities that it was computed from; nothing in other processes than the
    first."""
    mean, std = channel_stats(data.images["train"])
    torch.manual_seed(config.seed)
    model = MODELS[config.model](mean=mean.tolist(), std=std.tolist())
    train_loader = make_loader(data, "train", config.batch_size, config.device, shuffle=True)
    val_loader = make_loader(data, "val", Training.eval_batch(data.size), config.device)
    identity = {"md5": data.md5, "size": data.size, "kind": data.kind}
    if world()[0] > 0:
        state = Training.TrainingState(model, config, run_dir, identity)
        Training.fit(state, train_loader, val_loader)
        return {}, {}
    with Runs.locked(run_dir):
        state = Training.TrainingState(model, config, run_dir, identity)
        done = len(state.history)
        resumed = f", resumed after epoch {done}" if state.resumed else ""
        print(
            f"{run_dir}: {config.model}, {count_parameters(model):,} parameters, "
            f"{config.epochs} epochs of {len(train_loader)} batches of {config.batch_size}, "
            f"{config.device} {config.precision}, seed {config.seed}{resumed}"
        )
        write_json(run_dir / "config.json", run_settings(data, config))  # from here on resumable
        with Training.open_log(run_dir, done + 1 if state.resumed else 0) as log:
            if not state.resumed:
                Training.log_graph(log["run"], model, data.images["train"][0])
                Evaluation.log_start(log["run"], model, data, config)
            history = Training.fit(state, train_loader, val_loader, log)
            about = {"model": {"name": config.model, "parameters": count_parameters(model)}}
            about |= {"seed": config.seed, **Training.how_trained(history)}
            curves = Figures.learning_curves(history, about["best_epoch"], data.kind)
            Evaluation.save_figures(run_dir, {"learning_curves": curves})
            results, probs = evaluate(model, data, about, run_dir)
            Evaluation.log_results(log["run"], run_dir, config, results, data, probs)
    return results, probs


def evaluate(
    model: torch.nn.Module, data: PathData, about: dict, out_dir: Path
) -> tuple[dict, dict[str, np.ndarray]]:
    """Evaluate on val and test; write and return the results, and return the probabilities. `about`
    is what metrics.json says of the model beside its results. The test split is read here, after
    training, and never before."""
    results, probs = {"dataset": data.card, **about}, {}
    results["temperature"] = temperature = model.temperature.item()
    device = next(model.parameters()).device.type
    for key in tqdm(Evaluation.RESULTS, desc="evaluate", unit="pass", disable=None):
        split, views = key.removesuffix("_tta"), 8 if key.endswith("_tta") else 1
        loader = make_loader(data, split, Training.eval_batch(data.size), device)
        probs[key], labels = Training.predict(model, loader, views)
        results[key] = Evaluation.compute_metrics(probs[key], labels)
        if views == 1:
            plain = Evaluation.with_temperature(probs[key], 1 / temperature)
            ece = Evaluation.expected_calibration_error(plain, labels)
            results[key]["ece_without_temperature"] = ece
    Evaluation.write_results(out_dir, results, probs["test"])
    Evaluation.save_figures(out_dir, Evaluation.result_figures(model, data, probs, results))
    summarise(results, out_dir)
    return results, probs


def summarise(results: dict, out_dir: Path) -> None:
    """Print what was reached and where everything lies."""
    data = results["dataset"]
    what = "SYNTHETIC data: no result" if data["kind"] == "synthetic" else f"{data['kind']} data"
    table = Evaluation.results_markdown({key: results[key] for key in Evaluation.RESULTS})
    print(f"\n{out_dir} on {what}, {data['path']}\n{table}")
    print(f"(_tta: mean over the eight flips and quarter turns)\n\nEverything is in {out_dir}:")
    for path in sorted(out_dir.iterdir()):
        if path.name[0] != ".":
            print(f"  {path.name}{'/' if path.is_dir() else ''}")
    print(f"Look at it with: tensorboard --logdir {shlex.quote(str(out_dir.parent))}")


def evaluate_run(args: dict) -> None:
    """Evaluate a finished run, or its runs of several seeds, again on their own or other data."""
    if int(os.environ.get("RANK", 0)) > 0:
        return  # only training is shared
    run_dir, device = args["evaluate"], Training.choose_device(args.get("device", "auto"))
    settings, config = Runs.read_run(run_dir)
    data, seeds, subfolder = data_of_run(args, settings), settings["seeds"], "."
    folders = Runs.seed_dirs(run_dir, seeds, finished=True)
    loaded = [Runs.load_model(folder, device) for folder in folders]
    for _, checkpoint in loaded:
        if (size := checkpoint["identity"]["size"]) != data.size:
            what = f"{data.path}: images of {data.size} px, but {run_dir} knows {size} px"
            raise UserError(f"{what}; give --data of that size")
    if data.md5 != settings["dataset"]["md5"]:
        subfolder = f"evaluated-on-{data.path.stem[:50]}-{data.md5[:8]}"
        print(
            f"Not the data that {run_dir} was trained on: results go to {subfolder} in its folder."
        )
    runs = []
    for folder, (model, checkpoint) in zip(folders, loaded, strict=True):
        (folder / subfolder).mkdir(exist_ok=True)
        runs.append(evaluate(model, data, about_run(folder, model, checkpoint), folder / subfolder))
    if len(runs) > 1:
        (run_dir / subfolder).mkdir(exist_ok=True)
        Evaluation.summarise_seeds(runs, data, run_dir / subfolder)


def about_run(run_dir: Path, model: torch.nn.Module, checkpoint: dict) -> dict:
    """Return what metrics.json said of a run beside its results."""
    try:
        old = json.loads((run_dir / "metrics.json").read_text())
        return {key: old[key] for key in old if key not in ("dataset", *Evaluation.RESULTS)}
    except (OSError, ValueError):
        print(f"{run_dir}: stopped before its end; --resume finishes it")
        name = checkpoint["config"]["model"]
        about = {"model": {"name": name, "parameters": count_parameters(model)}}
        return about | {"seed": checkpoint["config"]["seed"]}


def data_of_run(args: dict, settings: dict) -> PathData:
    """Return the data that --data names, or else that the run was trained on."""
    path = args.get("data", str(ROOT / settings["dataset"]["path"]))
    if "data" not in args and not os.path.exists(path):
        raise UserError(f"{path}: the run's data is no longer there; say with --data where it is")
    return first_then_others(lambda: load_data(find_data(path)))


def run_settings(data: PathData, config: Config) -> dict:
    """Return config.json's content."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    settings = {"config": asdict(config), "dataset": data.card}
    return {**settings, "processes": world()[1], "versions": versions}


if __name__ == "__main__":
    sys.exit(run_script(main))
