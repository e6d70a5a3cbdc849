"""Train a small CNN on PathMNIST and evaluate it on val and test.

    python PathMNIST.py                       # find data, train, evaluate
    python PathMNIST.py --data pathmnist.npz --seeds 0 1 2 3 4
    python PathMNIST.py --resume runs/NAME    # continue an interrupted run
    python PathMNIST.py --evaluate runs/NAME  # evaluate again, no training

Every run writes a folder with its TensorBoard log, weights, metrics,
figures and predictions. Predict.py classifies new tiles.
"""

import os
import signal

if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it, until `run_script`
    os.environ.pop("MPLBACKEND", None)  # a notebook's backend may be missing here

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

import Dashboard
import Evaluation
import Figures
import Processor
import Runs
import Training
from analyze_data import ROOT, PathData, channel_stats, find_data, load_data
from Common import SYNTHETIC, Stopped, UserError, plain_table, write_json
from MyModels import MODELS, TissueModel, count_parameters
from Runs import Config
from Script import Parser, as_path, run_script

Results = tuple[dict, dict]  # metrics.json's content, probabilities


def main(argv: list | None = None) -> None:
    """Do what the command line asks for."""
    args = parse_args(argv)
    Processor.prepare()
    if args.evaluate:
        evaluate_again(args)
    elif args.resume:
        resume_run(args)
    else:
        new_run(args)


def new_run(args: argparse.Namespace) -> None:
    """Train one run, or with `--seeds` one per seed."""
    device = Processor.choose_device(args.device or "auto")
    data = load_data(find_data(args.data))
    config = make_config(args, data, device)
    seeds = list(dict.fromkeys(args.seeds or [config.seed]))
    name = f"{config.model}-seed{'-'.join(map(str, seeds))[:50]}-{time.strftime('%Y%m%d-%H%M%S')}"
    if data.kind == "synthetic":
        name = f"synthetic-{name}"
    run_dir = Runs.make_run_dir(args.log_dir or Path("runs"), args.name, name)
    train_seeds(data, config, seeds, run_dir)


def make_config(args: argparse.Namespace, data: PathData, device: str) -> Config:
    """Return the options of a run: those of the command line, and the defaults for the others."""
    given = {}
    for field in fields(Config):
        value = getattr(args, field.name, None)  # not every field has a flag
        if value is not None:
            given[field.name] = value
    given["device"] = device
    return Training.resolve(Config(**given), data.counts["train"], data.kind)


def train_seeds(data: PathData, config: Config, seeds: list, run_dir: Path) -> None:
    """Train (or continue) one run in `run_dir`, or one run per seed in its subfolders. If the user
    stops the training, the message says how to continue."""
    try:
        if len(seeds) == 1:
            train(data, replace(config, seed=seeds[0]), run_dir)
        else:
            train_each(data, config, seeds, run_dir)
    except Stopped as stopped:
        if (run_dir / "config.json").exists():
            stopped.advice = f"; continue with:\n{Runs.resume_command(run_dir)}"
        raise


def train_each(data: PathData, config: Config, seeds: list, run_dir: Path) -> None:
    """Train one run per seed and summarise them. A seed that is already finished is not trained
    again."""
    with Runs.locked(run_dir):
        Runs.write_settings(run_dir, data, config, seeds)
        runs = []
        for seed, seed_dir in zip(seeds, Runs.seed_dirs(run_dir, seeds), strict=True):
            seed_dir.mkdir(exist_ok=True)
            if Runs.is_finished(seed_dir):
                runs.append(read_results(data, seed_dir, config.device))
            else:
                runs.append(train(data, replace(config, seed=seed), seed_dir))
        summarise_seeds(runs, data, run_dir)


def train(data: PathData, config: Config, run_dir: Path) -> Results:
    """Train (or continue) one model in `run_dir`, evaluate it, and return the results."""
    train_loader = make_loader(data, "train", config.batch_size, config.device, shuffle=True)
    val_loader = make_loader(data, "val", Training.eval_batch(data.size), config.device)
    model = make_model(data, config)
    with Dashboard.open_run(run_dir, data, config) as log:
        state = Training.TrainingState(model, config, run_dir, data.identity)
        history = Training.fit(state, train_loader, val_loader, log)
        save_curves(history, data, run_dir)
        training = Training.how_trained(history)
        results, probs = evaluate(model, data, config, training, run_dir)
        log.results(results, probs)
    finish(results, run_dir)
    return results, probs


def read_results(data: PathData, run_dir: Path, device: str) -> Results:
    """Return the results of a finished run."""
    print(f"{run_dir}: already finished")
    results = json.loads((run_dir / "metrics.json").read_text())
    model, _ = Runs.load_model(run_dir, device)
    return results, predict_all(model, data)


def make_model(data: PathData, config: Config) -> TissueModel:
    """Return an untrained model that normalises images by the statistics of the training split."""
    torch.manual_seed(config.seed)
    mean, std = channel_stats(data.images["train"])
    return MODELS[config.model](mean=mean.tolist(), std=std.tolist())


def evaluate(
    model: TissueModel, data: PathData, config: Config, training: dict, out_dir: Path
) -> Results:
    """Evaluate on val and test, save predictions and figures, and return the content of
    metrics.json and the probabilities. `training` is the part of metrics.json about the training.
    The test split is not used before training has ended."""
    probs = predict_all(model, data)
    temperature = model.temperature.item()
    results = {
        "dataset": data.card,
        "model": {"name": config.model, "parameters": count_parameters(model)},
        "seed": config.seed,
        **training,
        "temperature": temperature,
    }
    for key, (split, eight_views) in Evaluation.RESULTS.items():
        labels = data.labels[split]
        results[key] = Evaluation.compute_metrics(probs[key], labels)
        if not eight_views:
            ece = Evaluation.ece_without_temperature(probs[key], labels, temperature)
            results[key]["ece_without_temperature"] = ece
    Evaluation.write_predictions(out_dir, results, probs["test"])
    figures = Evaluation.result_figures(model, data, probs, results)
    Evaluation.save_figures(out_dir, figures)
    return results, probs


def finish(results: dict, out_dir: Path) -> None:
    """Write metrics.json, the last file of a run, and print the results."""
    write_json(out_dir / "metrics.json", results)
    data = results["dataset"]
    kind = SYNTHETIC if data["kind"] == "synthetic" else f"the {data['kind']} data"
    table = Evaluation.result_texts({key: results[key] for key in Evaluation.RESULTS})
    print(f"\nResults on {kind} in {data['path']}:\n{plain_table(table)}")
    print("(_tta: mean over the eight flips and quarter turns of each image;")
    print("loss and ECE are measured after the temperature was fitted on val)")
    one, eight = results["test"]["accuracy"], results["test_tta"]["accuracy"]
    print(f"\nTest accuracy {one:.4f} from one view, {eight:.4f} from eight")
    print(f"All files: {out_dir}")
    print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(out_dir.parent))}")


def predict_all(model: TissueModel, data: PathData) -> dict:
    """Return the probabilities (N, 9) for each of the evaluations in `Evaluation.RESULTS`."""
    probs = {}
    passes = tqdm(Evaluation.RESULTS.items(), desc="evaluate", unit="pass", disable=None)
    for key, (split, eight_views) in passes:
        device = model.temperature.device.type
        loader = make_loader(data, split, Training.eval_batch(data.size), device)
        probs[key], _ = Training.predict(model, loader, eight_views)
    return probs


def save_curves(history: list, data: PathData, run_dir: Path) -> None:
    """Draw the learning curves into the run's folder."""
    best = Training.best_epoch(history)
    figure = Figures.learning_curves(history, best, data.kind)
    Evaluation.save_figures(run_dir, {"learning_curves": figure})


def summarise_seeds(runs: list, data: PathData, out_dir: Path) -> None:
    """Write summary.json (mean, s.d. and ensemble of the seeds) and print the accuracies."""
    results, probs = [run[0] for run in runs], [run[1] for run in runs]
    summary = Evaluation.summarise_seeds(results, probs, data)
    write_json(out_dir / "summary.json", summary)
    rows = [["accuracy", "mean", "s.d.", "ensemble"]]
    for key in Evaluation.RESULTS:
        mean, std = summary[key]["mean"]["accuracy"], summary[key]["std"]["accuracy"]
        ensemble = summary[key]["ensemble"]["accuracy"]
        rows.append([key, f"{mean:.4f}", f"{std:.4f}", f"{ensemble:.4f}"])
    print(f"\n{len(runs)} seeds, written to {out_dir / 'summary.json'}:\n{plain_table(rows)}")


def resume_run(args: argparse.Namespace) -> None:
    """Continue an interrupted run with its own options and data."""
    run_dir = args.resume
    settings, config = Runs.read_run(run_dir)
    config = replace(config, device=Processor.choose_device(args.device or config.device))
    for folder in Runs.seed_dirs(run_dir, settings["seeds"]):
        Runs.check_resumable(folder)
    data = data_of_run(args, settings)
    if data.md5 != settings["dataset"]["md5"]:
        what = f"{data.path}: not the file that {run_dir} was trained on"
        raise UserError(f"{what}; give that file with --data")
    train_seeds(data, config, settings["seeds"], run_dir)


def evaluate_again(args: argparse.Namespace) -> None:
    """Evaluate a finished run, or each seed of it, on its own data or on other data."""
    run_dir = args.evaluate
    device = Processor.choose_device(args.device or "auto")
    settings, _ = Runs.read_run(run_dir)
    folders = Runs.finished_dirs(run_dir)
    data, trained = data_of_run(args, settings), settings["dataset"]
    if data.size != trained["size"]:
        what = f"{data.path}: images of {data.size} px"
        raise UserError(f"{what}; {run_dir} was trained on {trained['size']} px: give such data")
    subfolder = "."
    if data.md5 != trained["md5"]:
        subfolder = f"evaluated-on-{data.path.stem[:50]}-{data.md5[:8]}"
        print(f"{run_dir} was trained on other data:\nthe results go to its subfolder {subfolder}")
    loaded = [Runs.load_model(folder, device) for folder in folders]
    runs = []
    for folder, (model, checkpoint) in zip(folders, loaded, strict=True):
        if "training" not in checkpoint:
            print(f"{folder}: training was stopped before its end; --resume continues it")
        out_dir = folder / subfolder
        out_dir.mkdir(exist_ok=True)
        config = Runs.config_from(checkpoint["config"])
        training = checkpoint.get("training", {})
        results, probs = evaluate(model, data, config, training, out_dir)
        finish(results, out_dir)
        runs.append((results, probs))
    if len(runs) > 1:
        (run_dir / subfolder).mkdir(exist_ok=True)
        summarise_seeds(runs, data, run_dir / subfolder)


def data_of_run(args: argparse.Namespace, settings: dict) -> PathData:
    """Return the data that --data names, or else the data that the run was trained on."""
    path = str(ROOT / settings["dataset"]["path"])
    if args.data is None and not os.path.exists(path):
        raise UserError(f"{path}: the run's data is not there; say with --data where it is")
    return load_data(find_data(args.data or path))


class EpochSampler(BatchSampler):
    """Batches of indices. Their order depends only on the number given to `set_epoch`."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next epoch."""
        self.sampler.generator.manual_seed(epoch)  # type: ignore[union-attr]


def make_loader(
    data: PathData, split: str, batch_size: int, device: str = "cpu", shuffle: bool = False
) -> DataLoader:
    """Return a loader of uint8 images (n, S, S, 3) and int64 labels (n,) of a split. The
    `BatchSampler` yields lists of indices, and with `batch_size=None` each list fetches a whole
    batch at once, because loading images one by one is slow. For a GPU, the split is copied to GPU
    memory if it takes less than half of the free memory."""
    images = torch.from_numpy(data.images[split])
    labels = torch.from_numpy(data.labels[split])
    pin_memory = device == "cuda"
    if device == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images, labels = images.to(device), labels.to(device)
        pin_memory = False
    dataset = TensorDataset(images, labels)
    batches = BatchSampler(range(len(labels)), batch_size, drop_last=False)
    if shuffle:
        # BatchNorm needs more than one image, so a last batch of one image is left out.
        drop_last = len(labels) % batch_size == 1 and len(labels) > 1
        batches = EpochSampler(RandomSampler(dataset, generator=Generator()), batch_size, drop_last)
    return DataLoader(dataset, batch_size=None, sampler=batches, pin_memory=pin_memory)


def number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type: a number of that kind within [low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not between {low:.10g} and {high:.10g}")
        return value

    parse.__name__ = getattr(kind, "__name__", "number")  # named in argparse's error messages
    return parse


def run_name(text: str) -> str:
    """Argparse type: a plain folder name, short enough for the files that are named after it."""
    if not re.fullmatch(r"(?a)[a-zA-Z0-9][\w.+-]{0,99}", text):
        what = "a name of at most 100 letters, digits and ._+- that starts with a letter or digit"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return text


def parse_args(argv: list | None) -> argparse.Namespace:
    """Read the command line. An option that is not given is None; `Config` has the defaults."""
    parser = build_parser()
    args = parser.parse_args(argv)
    mode = "resume" if args.resume else "evaluate"
    if args.resume or args.evaluate:
        for name, value in vars(args).items():
            if value is not None and name not in (mode, "data", "device"):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag}: --{mode} uses the run's saved options; leave {flag} out")
    return args


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("data and results")
    group.add_argument(
        "--data",
        metavar="PATH",
        help="npz file, or folder with pathmnist.npz "
        "(default: search the usual places, then download)",
    )
    group.add_argument(
        "--log-dir", type=as_path, metavar="DIR", help="folder of all runs (default: runs)"
    )
    group.add_argument(
        "--name",
        type=run_name,
        help="name of the run's folder in --log-dir (default: model, seed, time)",
    )
    add_training_options(parser.add_argument_group("training"))
    group = parser.add_argument_group("instead of a new run (RUN: a run's folder, runs/NAME)")
    modes = group.add_mutually_exclusive_group()
    modes.add_argument("--resume", type=as_path, metavar="RUN", help="continue an interrupted run")
    modes.add_argument(
        "--evaluate",
        type=as_path,
        metavar="RUN",
        help="evaluate a finished run on its own data, or on --data",
    )
    return parser


def add_training_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of a new run."""
    default = Config()
    count = number(int, 1, 100_000)
    seed = number(int, 0, 2**31 - 1)
    rate = number(float, 1e-12, 1e12)
    decay = number(float, 0, 1e6)
    batch = number(int, 2, 65_536)
    epochs = "default: by number of images: {cpu} on a CPU, {cuda} on a GPU for all of PathMNIST"
    epochs = epochs.format(**Training.EPOCHS)
    patience = "stop after N epochs without improvement (default: epochs / 3, at least 5)"
    add = group.add_argument
    add("--model", choices=MODELS, help=f"the network (default: {default.model})")
    add("--epochs", type=count, metavar="N", help=epochs)
    add("--batch-size", type=batch, metavar="N", help=f"default: {default.batch_size} images")
    add("--lr", type=rate, metavar="X", help=f"highest learning rate (default: {default.lr})")
    add("--weight-decay", type=decay, metavar="X", help=f"default: {default.weight_decay}")
    add("--patience", type=count, metavar="N", help=patience)
    add("--device", choices=("auto", "cpu", "cuda"), help="default: a CUDA GPU, else the CPU")
    add("--precision", choices=("auto", "fp32", "bf16"), help="default: bf16 if fast, else fp32")
    seeds = group.add_mutually_exclusive_group()
    one, several = f"default: {default.seed}", "one run per seed, and their ensemble"
    seeds.add_argument("--seed", type=seed, metavar="N", help=one)
    seeds.add_argument("--seeds", type=seed, nargs="+", metavar="N", help=several)


if __name__ == "__main__":
    sys.exit(run_script(main))
