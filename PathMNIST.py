"""Train a small CNN on PathMNIST, evaluate it, and classify new tiles with it.

    python PathMNIST.py                                   # find the data, train, evaluate
    python PathMNIST.py --data pathmnist.npz --seeds 0 1 2 3 4
    python PathMNIST.py --resume runs/NAME                # go on after an interruption
    python PathMNIST.py --evaluate runs/NAME              # evaluate again, no training
    python PathMNIST.py --predict tile.png folder/        # classify images with runs/best
    torchrun --nproc-per-node=2 PathMNIST.py              # several processes or GPUs

Every run leaves its own folder: TensorBoard log, weights, metrics, figures, predictions.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import errno
import io
import json
import math
import os
import re
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where runs are not locked
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

import Evaluation
from analyze_data import (
    CLASS_NAMES,
    SHORT_NAMES,
    SIZES,
    Parser,
    PathData,
    UserError,
    channel_stats,
    end_of_pipe,
    find_data,
    load_data,
    set_up_stdout,
    write_atomically,
)
from MyModels import MODELS, Ensemble, count_parameters, layer_markdown, layer_table
from Training import (
    MAX_EPOCHS,
    MIN_EPOCHS,
    SEED_STEP,
    STEPS,
    Config,
    Stopped,
    augment,
    best_epoch,
    cutmix,
    fit,
    load_checkpoint,
    load_weights,
    predict,
    read_history,
    resolve,
    to_device,
    to_float,
    world,
)

BEST = Path(__file__).resolve().parent / "runs" / "best"
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
OPTIONS = frozenset(field.name for field in fields(Config))
RESULTS = ("val", "val_tta", "test", "test_tta")  # _tta: mean over eight flips and turns
EVAL_BATCH = 125  # images of 28 px, see `eval_batch`; on a CPU 500 take half as long again each


# ------------------------------------------------------------------------------ command line


def number(kind: type, low: float, high: float):
    """Return an argparse type: a number of that kind within [low, high]."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            limits = f"{low:.10g} to {high:.10g}"  # up to ten digits, as the largest seed has
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {limits}")
        return value

    return parse


def run_name(text: str) -> str:
    """Argparse type: a plain folder name, short enough for the files that are named after it."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", text) or len(text.encode()) > 100:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a name of letters, digits and ._+-, which starts with one of a-z, "
            "A-Z or 0-9 and has at most 100 bytes"
        )
    return text


def as_path(text: str) -> Path:
    """Argparse type: a path, where a leading ~ is the home folder."""
    return Path(os.path.expanduser(text))


def build_parser() -> Parser:
    """Return the command line. What is not given is absent, so that `Config` has the defaults."""
    default = Config()
    parser = Parser(
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument_group("data and results").add_argument
    add(
        "--data",
        metavar="PATH",
        help="npz file, or folder with pathmnist.npz (default: found or downloaded; for --resume "
        "and --evaluate the run's)",
    )
    add(
        "--log-dir",
        type=as_path,
        metavar="DIR",
        help="folder of all runs (default: runs); with --predict, of its results (predictions)",
    )
    add("--name", type=run_name, help="the run's folder there (default: model, seed and time)")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--model", choices=MODELS, help=f"the network to train (default: {default.model})")
    add(
        "--epochs",
        type=number(int, 1, 100_000),
        metavar="N",
        help=f"default: as many as {STEPS:,} steps take, {MIN_EPOCHS} to {MAX_EPOCHS}",
    )
    add(
        "--batch-size",
        type=number(int, 2, 65_536),
        metavar="N",
        help=f"images per step and process (default: {default.batch_size})",
    )
    add(
        "--lr",
        type=number(float, 1e-12, 1e12),
        metavar="X",
        help=f"peak learning rate (default: {default.lr})",
    )
    add(
        "--weight-decay",
        type=number(float, 0, 1e6),
        metavar="X",
        help=f"of weights, not of biases (default: {default.weight_decay})",
    )
    add(
        "--patience",
        type=number(int, 1, 100_000),
        metavar="N",
        help="stop after so many epochs without a val loss near the lowest (default: a third of "
        "the epochs, 5 or more)",
    )
    seeds = training.add_mutually_exclusive_group()
    seed = {"type": number(int, 0, 2**31 - 1), "metavar": "N"}
    seeds.add_argument("--seed", **seed, help=f"of all that is random (default: {default.seed})")
    seeds.add_argument("--seeds", **seed, nargs="+", help="one run per seed, and their ensemble")
    add(
        "--device",
        choices=DEVICES,
        help="default: auto (a CUDA GPU, else the CPU); for --resume the run's",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        help="default: auto (bf16 where it is faster, else fp32)",
    )
    add("--embeddings", action="store_true", help="add val tiles to TensorBoard's projector")

    others = parser.add_argument_group("instead of a new run (RUN: a run's folder, runs/NAME)")
    mode, add = others.add_mutually_exclusive_group(), others.add_argument
    mode.add_argument("--resume", type=as_path, metavar="RUN", help="continue an interrupted run")
    mode.add_argument("--evaluate", type=as_path, metavar="RUN", help="evaluate a finished run")
    mode.add_argument(
        "--predict", type=as_path, nargs="+", metavar="PATH", help="classify images, or folders"
    )
    add(
        "--checkpoint",
        type=as_path,
        metavar="RUN",
        help="for --predict (default: runs/best); of a run of several seeds, their ensemble",
    )
    add("--explain", action="store_true", help="for --predict: save each tile beside its Grad-CAM")
    return parser


# ------------------------------------------------------------------------------ data and model


class BatchDataset(TensorDataset):
    """A `TensorDataset` that is asked for whole batches; a GPU is not waited for meanwhile."""

    def __getitem__(self, index: list[int]) -> tuple[torch.Tensor, ...]:
        """Return the rows of each tensor with these indices, on the tensors' device."""
        device = self.tensors[0].device
        return super().__getitem__(torch.tensor(index).to(device, non_blocking=True))


def make_loader(
    data: PathData,
    split: str,
    batch_size: int,
    device: str = "cpu",
    shuffle_seed: int | None = None,
    shared_out: bool = False,
) -> DataLoader:
    """Return a loader of uint8 images (n, S, S, 3) and int64 labels (n,).

    One index fetches a whole batch out of one tensor (`batch_size=None` with a `BatchSampler`):
    no image is ever handled alone. For a GPU the split lies in its memory, if it takes no more
    than half of what is free there.

    Parameters
    ----------
    data : PathData
    split : str
        "train", "val" or "test".
    batch_size : int
    device : str
    shuffle_seed : int, optional
        Shuffles anew each epoch, as a function of this seed and the epoch; each of several
        processes gets its own share. Without it the order is the file's.
    shared_out : bool
        Without a seed too, each of several processes gets its own share.
    """
    tensors = [torch.from_numpy(array) for array in (data.images[split], data.labels[split])]
    pinned = device == "cuda"
    if pinned and sum(t.nbytes for t in tensors) < torch.cuda.mem_get_info()[0] / 2:
        tensors, pinned = [tensor.to(device) for tensor in tensors], False
    load = partial(DataLoader, BatchDataset(*tensors), batch_size=None, pin_memory=pinned)
    rank, size = world()
    if shuffle_seed is None:
        first, step = (rank, size) if shared_out else (0, 1)
        order: Iterable[int] = range(first, len(tensors[0]), step)
        return load(sampler=BatchSampler(order, batch_size, False))
    # For one process too: its `set_epoch` makes the order a function of (seed, epoch).
    order = DistributedSampler(tensors[0], size, rank, seed=shuffle_seed * SEED_STEP)
    # One image's statistics are no basis for BatchNorm: such a last batch waits for another epoch.
    drop_last = len(order) % batch_size == 1 and len(order) > 1
    return load(sampler=BatchSampler(order, batch_size, drop_last))


def eval_batch(size: int) -> int:
    """Return how many images of that size are evaluated at once: as many pixels at any size."""
    return max(1, EVAL_BATCH * 28**2 // size**2)


def dataset_card(data: PathData) -> dict:
    """Return what results say about the data they come from."""
    return {
        "path": str(data.path),
        "kind": data.kind,
        "md5": data.md5,
        "size": data.size,
        "counts": data.counts,
    }


def figure_note(data: PathData) -> str:
    """Return what every figure has to say about its data."""
    return "SYNTHETIC DATA, not real tissue" if data.kind == "synthetic" else ""


def load_model(run_dir: Path, device: str) -> tuple[nn.Module, dict]:
    """Return a finished run's best model, in evaluation mode, and its checkpoint.

    Of a folder with one run per seed, their ensemble and the first one's checkpoint.
    """
    path = run_dir / "best.pt" if os.path.isdir(run_dir) else run_dir
    if os.path.isdir(run_dir) and not os.path.exists(path) and any(run_dir.glob("seed*")):
        return load_ensemble(run_dir, device)
    checkpoint = load_checkpoint(path)
    name, size = checkpoint["config"].get("model"), checkpoint["identity"].get("size", 28)
    if name not in list(MODELS):  # a list, for a damaged file's name may be of any type
        raise UserError(f"{path}: holds an unknown model {name!r}; known: {', '.join(MODELS)}")
    if size not in SIZES:
        raise UserError(f"{path}: made for images of {size!r} px; known: {SIZES}")
    model = MODELS[name]()
    load_weights(model, checkpoint, "model", path)
    return to_device(model, device).eval(), checkpoint


def load_ensemble(run_dir: Path, device: str) -> tuple[nn.Module, dict]:
    """Return the models of a run of several seeds as one, and the first seed's checkpoint."""
    folders = finished_seeds(run_dir, read_run(run_dir)["seeds"])
    loaded = [load_model(folder / "best.pt", device) for folder in folders]
    models, checkpoints = zip(*loaded, strict=True)
    kinds = [(checkpoint["config"]["model"], checkpoint["identity"]) for checkpoint in checkpoints]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(f"{run_dir}: its seeds are not of one model and one data set; train anew")
    return Ensemble(models).eval(), checkpoints[0]


# ------------------------------------------------------------------------------ run folders


def make_run_dir(log_dir: Path, name: str, unique: bool = True) -> Path:
    """Create a run's own folder; where `unique`, the name must not be taken yet."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 2 if unique else 1000):
            run_dir = log_dir / (name if attempt == 1 else f"{name}-{attempt}")
            with suppress(FileExistsError):
                run_dir.mkdir()
                return run_dir
    except OSError as error:
        raise UserError(
            f"--log-dir {log_dir}: no folder that can be written ({error.strerror}); choose another"
        ) from error
    raise UserError(f"{run_dir}: exists already; choose another --name or --resume it")


def lock(run_dir: Path) -> io.IOBase:
    """Keep a second process out of a run's folder until the returned file is closed."""
    file = open(run_dir / ".lock", "w")  # noqa: SIM115 (stays open, the system closes it)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{run_dir}: another process is training there; wait for it") from error
    except OSError:  # a file system without locks
        pass
    return file


@contextmanager
def say_how_to_resume(run_dir: Path) -> Iterator[None]:
    """Add the command that continues this run to what a `Stopped` in the block says."""
    try:
        yield
    except Stopped as stop:
        if world()[0] == 0 and any(run_dir.rglob("last.pt")):
            stop.add_note(f"go on with: {resume_command(run_dir, world()[1])}")
        raise


def resume_command(run_dir: Path, processes: int) -> str:
    """Return what to type to continue a run."""
    start = "python" if processes == 1 else f"torchrun --nproc-per-node={processes}"
    script = shlex.quote(os.path.relpath(__file__))
    return f"{start} {script} --resume {shlex.quote(str(run_dir))}"


def write_json(path: Path, value: object) -> None:
    """Write JSON that a person can read."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def run_settings(data: PathData, config: Config) -> dict:
    """Return config.json's content."""
    return {
        "config": asdict(config),
        "dataset": dataset_card(data),
        "processes": world()[1],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }


def read_run(run_dir: Path) -> dict:
    """Return a run's config.json, "config" as a `Config` and "seeds" always there."""
    path = run_dir / "config.json"
    try:
        settings = json.loads(path.read_text())
        config = Config(**{name: settings["config"][name] for name in OPTIONS})
        seeds = settings.setdefault("seeds", [config.seed])
        texts = [settings["dataset"][key] for key in ("md5", "path")]
        if not (
            all(isinstance(getattr(config, field.name), field.type) for field in fields(Config))
            and min(config.epochs, config.batch_size, config.patience) >= 1
            and config.model in MODELS
            and config.device in DEVICES[1:]  # "auto" is resolved before it is written
            and config.precision in PRECISIONS[1:]
            and all(isinstance(text, str) for text in texts)
            and isinstance(settings["dataset"]["counts"]["train"], int)
            and isinstance(seeds, list)
            and all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in seeds)
            and len(set(seeds)) == len(seeds) >= 1
            and isinstance(settings.setdefault("processes", 1), int)
        ):
            raise ValueError("a value that no run has")
        settings["config"] = config
        return settings
    except OSError as error:
        why = f"config.json: {error.strerror}"
        raise UserError(f"{run_dir}: not the folder of a run ({why})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or of another version; train anew") from error


def seed_dirs(run_dir: Path, seeds: Sequence[int]) -> list[Path]:
    """Return each seed's folder: the run's own, or one of its folders where it has several."""
    return [run_dir / f"seed{seed}" for seed in seeds] if len(seeds) > 1 else [run_dir]


def finished_seeds(run_dir: Path, seeds: Sequence[int]) -> list[Path]:
    """Return each seed's folder; refuse a run of several that was stopped before its end."""
    if len(seeds) > 1 and not (run_dir / "summary.json").exists():
        raise UserError(f"{run_dir}: not all of its seeds are trained; --resume it first")
    return seed_dirs(run_dir, seeds)


# ------------------------------------------------------------------------------ the story


def train(data: PathData, config: Config, run_dir: Path) -> dict:
    """Train one model into `run_dir` (or go on there), evaluate it, and return its results.

    Returns
    -------
    dict
        metrics.json's content, and under "probs" the arrays that it was computed from.
    """
    rank, _ = world()
    mean, std = channel_stats(data.images["train"])
    torch.manual_seed(config.seed)
    model = MODELS[config.model](mean=mean.tolist(), std=std.tolist())
    train_loader = make_loader(data, "train", config.batch_size, config.device, config.seed)
    val_loader = make_loader(data, "val", eval_batch(data.size), config.device, shared_out=True)
    if rank > 0:
        fit(model, train_loader, val_loader, config, run_dir)
        return {}

    _guard = lock(run_dir)  # held for as long as this name lives
    for stale in run_dir.glob(".*.tmp"):  # of a process that was killed while writing
        stale.unlink()
    last = run_dir / "last.pt"
    epochs_done = load_checkpoint(last)["epoch"] if last.exists() else None  # None: a new run
    settings = run_settings(data, config)
    if epochs_done is None:
        write_json(run_dir / "config.json", settings)
    announce(run_dir, model, config, len(train_loader), epochs_done)
    purge = None if epochs_done is None else epochs_done + 1
    with SummaryWriter(str(run_dir), purge_step=purge) as writer:
        if epochs_done is None:
            log_start(writer, model, data, config, settings)
        identity = {"md5": data.md5, "size": data.size, "kind": data.kind}
        log_epoch = partial(log_confusion, writer, config, figure_note(data))
        history = fit(model, train_loader, val_loader, config, run_dir, writer, identity, log_epoch)
        training = how_trained(history, config.seed, data.counts["train"])
        results = evaluate(model, config, data, run_dir, training, history, writer)
        log_end(writer, config, results)
        if config.embeddings:
            log_embeddings(writer, model, data)
    return results


def how_trained(history: Sequence[dict], seed: int, images: int) -> dict:
    """Return what metrics.json says about the training; without a history, the seed alone."""
    if not history:
        return {"seed": seed}
    seconds = sum(row["seconds"] for row in history)
    return {
        "seed": seed,
        "best_epoch": best_epoch(history),
        "epochs": len(history),
        "train_seconds": seconds,
        "images_per_second": len(history) * images / seconds,
    }


def announce(
    run_dir: Path, model: nn.Module, config: Config, batches: int, done: int | None
) -> None:
    """Print what is about to be trained; `done`: the epochs behind a run that is resumed."""
    print(
        f"{run_dir}: {config.model}, {count_parameters(model):,} parameters, "
        f"{config.epochs} epochs of {batches} batches of {config.batch_size}, "
        f"{config.device} {config.precision}, seed {config.seed}"
        + (f", resumed after epoch {done}" if done is not None else "")
    )


def evaluate(
    model: nn.Module,
    config: Config,
    data: PathData,
    out_dir: Path,
    training: dict,
    history: Sequence[dict],
    writer: SummaryWriter | None = None,
) -> dict:
    """Evaluate on val and test, write metrics, predictions and figures into `out_dir`.

    `training` is what metrics.json says about how the model came about; the learning curves are
    drawn from `history`, if it is not empty. The test split is read here, after training, and never
    before. Results are logged one step after the last epoch: what a run logs twice because it was
    stopped here and resumed, TensorBoard then shows once (see `purge_step`).
    """
    note = figure_note(data)
    probs, metrics = {}, {}
    with tqdm(total=4, desc="evaluate", unit="pass", disable=None) as bar:
        for split in ("val", "test"):
            loader = make_loader(data, split, eval_batch(data.size), config.device)
            for views, key in ((1, split), (8, f"{split}_tta")):
                probs[key], labels = predict(model, loader, views)
                metrics[key] = Evaluation.compute_metrics(probs[key], labels)
                bar.update()
    results = {
        "dataset": dataset_card(data),
        "model": {"name": config.model, "parameters": count_parameters(model)},
        **training,
        **metrics,
    }
    new = Evaluation.save_predictions(
        out_dir, probs["test"], metrics["test"], out_dir.resolve().name, data.size
    )
    for old in set(out_dir.glob("pathmnist*_test_*.csv")) - {new}:
        old.unlink()
    write_json(out_dir / "metrics.json", results)
    figures = result_figures(model, data, probs, metrics, note)
    if history:
        curves = Evaluation.learning_curves(history, training["best_epoch"], note=note)
        figures = {"learning_curves": curves, **figures}
    (out_dir / "figures").mkdir(exist_ok=True)
    for name, figure in tqdm(figures.items(), desc="figures", unit="figure", disable=None):
        path = out_dir / "figures" / f"{name}.png"
        figure.savefig(path)
        if writer is not None:  # the saved picture: add_figure would draw it a second time
            picture, step = np.asarray(Image.open(path)), training["epochs"] + 1
            writer.add_image(f"Results/{name}", picture, step, dataformats="HWC")
    if writer is not None:
        log_pr_curves(writer, data, probs, training["epochs"] + 1)
    return {**results, "probs": probs}


def explained_layer(model: nn.Module, size: int) -> nn.Module:
    """Return the layer for Grad-CAM: the last that still has 7 x 7 positions or more."""
    stages = model.net if hasattr(model, "net") else model
    early, late = ("layer3", "layer4") if hasattr(model, "net") else ("stage2", "stage3")
    return getattr(stages, early if size < 56 else late)


def result_figures(
    model: nn.Module,
    data: PathData,
    probs: dict[str, np.ndarray],
    metrics: dict[str, dict],
    note: str,
) -> dict:
    """Return every figure of results by its file name."""
    note, val_note = (f"{split} split{note and f', {note}'}" for split in ("test", "val"))
    images, labels, test = data.images["test"], data.labels["test"], probs["test"]
    figures = {
        "confusion_val": Evaluation.confusion_figure(metrics["val"]["confusion_matrix"], val_note),
        "confusion_test": Evaluation.confusion_figure(metrics["test"]["confusion_matrix"], note),
        "per_class_test": Evaluation.per_class_figure(metrics["test"], note),
        "examples_correct": Evaluation.examples_figure(images, labels, test, True, note=note),
        "examples_incorrect": Evaluation.examples_figure(images, labels, test, False, note=note),
        "reliability_test": Evaluation.reliability_figure(test, labels, note),
        "confidence_test": Evaluation.confidence_figure(test, labels, note),
    }
    right = test.argmax(1) == labels
    first, wrong = np.flatnonzero(right)[:5], np.flatnonzero(~right)[:4]
    shown = np.concatenate([first, wrong])
    inputs = to_float(torch.from_numpy(images[shown]))
    heatmaps = Evaluation.grad_cam(model, inputs, explained_layer(model, data.size))
    table = layer_table(model, data.size)
    figures["architecture"] = Evaluation.architecture_figure(table, type(model).__name__)
    figures["gradcam_test"] = Evaluation.gradcam_figure(
        images[shown],
        heatmaps,
        labels[shown],
        test[shown],
        f"{note}: first {len(first)} right and first {len(wrong)} wrong",
    )
    return figures


# ------------------------------------------------------------------------------ TensorBoard


def log_start(
    writer: SummaryWriter, model: nn.Module, data: PathData, config: Config, settings: dict
) -> None:
    """Log what is known before training: graph, chart layout, texts, augmented tiles."""
    example = to_float(torch.from_numpy(data.images["train"][:1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit")  # add_graph's own way to trace
        writer.add_graph(model.eval(), example)
    writer.add_custom_scalars(
        {
            "Train and val": {
                "Loss": ["Multiline", ["Loss/train", "Loss/val"]],
                "Accuracy": ["Multiline", ["Accuracy/train", "Accuracy/val"]],
            },
            "Classes": {"Recall val": ["Multiline", [f"Recall val/{s}" for s in SHORT_NAMES]]},
        }
    )
    counts = ", ".join(f"{n:,} {split}" for split, n in settings["dataset"]["counts"].items())
    card = settings["dataset"] | {"counts": counts}
    for name, values in (("config", settings["config"]), ("dataset", card)):
        rows = [f"| {key} | {value} |" for key, value in values.items()]
        text = "\n".join([f"| {name} | |", "|---|---|", *rows])
        writer.add_text(name, text.encode(errors="backslashreplace").decode())
    writer.add_text("layers", layer_markdown(model, data.size))
    tiles = torch.from_numpy(data.images["train"][:8])
    generator = torch.Generator().manual_seed(config.seed)
    views = augment(tiles, generator, config)
    if config.cutmix:
        views, _ = cutmix(views, torch.zeros(len(tiles), 1), generator, config.cutmix)
    figure = Evaluation.augmentation_figure(
        tiles.numpy(), views.permute(0, 2, 3, 1).numpy(), figure_note(data)
    )
    writer.add_figure("Training/augmentation", figure, 0)
    writer.flush()  # before the first checkpoint: a resumed run does not log this again


def log_confusion(
    writer: SummaryWriter,
    config: Config,
    note: str,
    epoch: int,
    probs: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Log the confusion matrix on val after every fifth of the epochs and after the last one."""
    if epoch % math.ceil(config.epochs / 5) == 0 or epoch == config.epochs:
        matrix = Evaluation.compute_metrics(probs, labels)["confusion_matrix"]
        figure = Evaluation.confusion_figure(matrix, f"val, epoch {epoch} {note}".strip())
        writer.add_figure("Confusion/val by epoch", figure, epoch)


def log_pr_curves(
    writer: SummaryWriter, data: PathData, probs: dict[str, np.ndarray], step: int
) -> None:
    """Log one precision-recall curve for each class of val and of test."""
    for split in ("val", "test"):
        for label, short in enumerate(SHORT_NAMES):
            positive, p = data.labels[split] == label, probs[split][:, label]
            writer.add_pr_curve(f"PR {split}/{short}", positive, p, step)


def log_end(writer: SummaryWriter, config: Config, results: dict) -> None:
    """Log the results table and the run's row in the HParams table."""
    metrics = {key: results[key] for key in RESULTS}
    writer.add_text("results", Evaluation.results_markdown(metrics), results["epochs"] + 1)
    # As many columns as TensorBoard shows unasked; the other options are in the text "config".
    values = {key: getattr(config, key) for key in ("model", "epochs", "batch_size", "lr", "seed")}
    columns = ("val accuracy", "val auc", "test accuracy", "test auc", "test_tta accuracy")
    figures = {f"hparam/{c}": results[c.split()[0]][c.split()[1]] for c in columns}
    figures = {tag: value for tag, value in figures.items() if value is not None}
    for summary in hparams(values, figures, {"model": list(MODELS)}):
        writer.file_writer.add_summary(summary)
    for tag, value in figures.items():
        writer.add_scalar(tag, value, results["epochs"] + 1)


def log_embeddings(writer: SummaryWriter, model: nn.Module, data: PathData) -> None:
    """Log the last layer's input for every val tile, with names and pictures, to the projector."""
    features: list[torch.Tensor] = []
    hook = list(model.modules())[-1].register_forward_pre_hook(
        lambda _module, inputs: features.append(inputs[0].cpu())
    )
    loader = make_loader(data, "val", eval_batch(data.size), next(model.parameters()).device.type)
    probs, labels = predict(model, loader)
    hook.remove()
    names = [[CLASS_NAMES[i] for i in pair] for pair in zip(labels, probs.argmax(1), strict=True)]
    step = data.size // 28  # of larger tiles every second (fourth, eighth) pixel: 28 to 32 px
    tiles = to_float(torch.from_numpy(data.images["val"][:, ::step, ::step]))
    header = ["true class", "predicted class"]
    writer.add_embedding(torch.cat(features), names, tiles, tag="val", metadata_header=header)


# ------------------------------------------------------------------------------ new tiles


def find_tiles(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths` and, sorted, those in the folders, hidden ones apart."""
    files: list[Path] = []
    for path in paths:
        if os.path.isdir(path):
            below = [p for p in path.rglob("*") if os.path.isfile(p)]
            files += sorted(p for p in below if "/." not in f"/{p.relative_to(path).as_posix()}")
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise UserError(f"--predict {path}: no such file or folder, or no access; check it")
    if not files:
        raise UserError(f"--predict {paths[0]}: no files in that folder, or no access; check it")
    return files


def read_tile(path: Path, size: int) -> np.ndarray:
    """Read any image as PathMNIST was made: RGB, bilinear to size x size; uint8 (S, S, 3).

    Transparent pixels become white, as an empty slide is; 16-bit greys are scaled to 8 bits.
    Raises an exception, mostly Pillow's, when the file is no image, too large, or holds NaN.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                grey = np.asarray(image, dtype=np.float64)
                if not np.isfinite(grey).all():
                    raise ValueError("not a number")
                scales = [65_535] if image.mode.startswith("I;16") else [1, 255, 65_535]
                top = next((t for t in scales if grey.max() <= t), grey.max())
                image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def read_tiles(
    files: Sequence[Path], size: int, skipped: list[Path]
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Yield the readable files in batches; name the others on stderr and put them in `skipped`."""
    step = eval_batch(size)
    for start in range(0, len(files), step):
        good, tiles = [], []
        for path in files[start : start + step]:
            try:
                tiles.append(read_tile(path, size))
                good.append(path)
            except Exception as error:  # whatever a decoder raises, the other files go on
                skipped.append(path)
                reason = " ".join(str(error).split())[:100]
                print(f"skipped {path}: {type(error).__name__}: {reason}", file=sys.stderr)
        if good:
            yield good, torch.from_numpy(np.stack(tiles))


def classify(
    paths: Sequence[Path], run_dir: Path, device: str, explain: bool, out_dir: Path
) -> int:
    """Classify image files; print a table, write `predictions.csv`; return the exit status.

    Probabilities are means over the eight flips and quarter turns.
    """
    model, checkpoint = load_model(run_dir, device)
    size = checkpoint["identity"].get("size", 28)
    files, skipped, rows = find_tiles(paths), [], []
    out_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Ensemble):
        print(f"{run_dir}: an ensemble of {len(model.members)} models")
    if checkpoint["identity"].get("kind") == "synthetic":
        print(
            "This model was trained on SYNTHETIC data: its answers mean nothing.", file=sys.stderr
        )
    with tqdm(total=len(files), unit="tile", disable=None) as bar:
        for names, tiles in read_tiles(files, size, skipped):
            probs, _ = predict(model, [(tiles, torch.zeros(len(tiles)))], views=8)
            rows += zip(names, probs, strict=True)
            if explain:
                save_explanations(model, names, tiles, probs, len(rows) - len(names), out_dir)
            bar.update(len(names))
    write_predictions(rows, out_dir / "predictions.csv")
    if explain:
        print(f"Each tile beside its Grad-CAM: {out_dir / '0000-*.png'} and so on")
    if skipped:
        print(
            f"error: {len(skipped)} of {len(files)} files are not readable images, named above; "
            "convert or remove them",
            file=sys.stderr,
        )
    return 2 if skipped else 0


def save_explanations(
    model: nn.Module,
    names: Sequence[Path],
    tiles: torch.Tensor,
    probs: np.ndarray,
    first: int,
    out_dir: Path,
) -> None:
    """Save each tile beside its Grad-CAM; numbered from `first`, as file names may be alike."""
    if isinstance(model, Ensemble):  # its answer, explained by where its first member looks
        model = model.members[0]
    layer = explained_layer(model, tiles.shape[1])
    heatmaps = Evaluation.grad_cam(model, to_float(tiles), layer, probs.argmax(1))
    each = zip(names, tiles.numpy(), heatmaps, probs, strict=True)
    for index, (name, tile, heatmap, p) in enumerate(each, start=first):
        figure = Evaluation.gradcam_figure(tile[None], heatmap[None], None, p[None])
        figure.savefig(out_dir / f"{index:04d}-{name.stem[:50]}.png")


def write_predictions(rows: Sequence[tuple[Path, np.ndarray]], path: Path) -> None:
    """Write every tile's class and probabilities as CSV; print the first fifty."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["file", "class", *SHORT_NAMES])
    table.writerows([name, SHORT_NAMES[p.argmax()], *p.tolist()] for name, p in rows)
    write_atomically(path, buffer.getvalue().encode(errors="backslashreplace"))
    print(f"{'file':40}  {'class':36}  prob.  second")
    for name, p in rows[:50]:
        second, first = np.argsort(p)[-2:]
        print(
            f"{name.name[-40:]:40}  {CLASS_NAMES[first]:36}  {p[first]:.3f}  "
            f"{SHORT_NAMES[second]} {p[second]:.3f}"
        )
    if len(rows) > 50:
        print(f"... and {len(rows) - 50} more")
    print(f"All nine probabilities of {len(rows)} tiles: {path}")


# ------------------------------------------------------------------------------ modes


def new_runs(args: dict) -> None:
    """Train one run, or with `--seeds` one per seed."""
    config = Config(**{key: value for key, value in args.items() if key in OPTIONS})
    resolve(config, 1)  # is the device there? Before anything is downloaded
    data = load_data(shared(lambda: find_data(args.get("data"))))
    if data.counts["val"] < world()[1]:
        raise UserError("more processes than val images; lower --nproc-per-node")
    seeds = list(dict.fromkeys(args.get("seeds", [args.get("seed", Config.seed)])))
    log_dir = args.get("log_dir", Path("runs"))
    config = shared(lambda: resolve(config, max(1, data.counts["train"] // world()[1])))
    names = "-".join(map(str, seeds))[:50]
    name = f"{config.model}-seed{names}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = args.get("name", f"synthetic-{name}" if data.kind == "synthetic" else name)
    run_dir = shared(lambda: make_run_dir(log_dir, name, unique="name" in args))
    if len(seeds) > 1 and world()[0] == 0:
        write_json(run_dir / "config.json", {**run_settings(data, config), "seeds": seeds})
    train_seeds(data, config, seeds, run_dir)


def train_seeds(data: PathData, config: Config, seeds: Sequence[int], run_dir: Path) -> None:
    """Train (or go on with) one run in `run_dir`, or one per seed in folders of their own."""
    runs = []
    with say_how_to_resume(run_dir):
        for seed, seed_dir in zip(seeds, seed_dirs(run_dir, seeds), strict=True):
            shared(lambda seed_dir=seed_dir: seed_dir.mkdir(exist_ok=True))
            runs.append(train(data, replace(config, seed=seed), seed_dir))
            summarise(runs[-1], seed_dir, run_dir.parent)
    if len(runs) > 1:
        summarise_seeds(runs, data, run_dir)


def resume_run(args: dict) -> None:
    """Continue an interrupted run with its own options and data."""
    run_dir = args["resume"]
    settings = read_run(run_dir)
    config = settings["config"]
    several = len(settings["seeds"]) > 1
    refuse(args, ("seeds", *["seed"] * several, "name", "log_dir"), "--resume")
    for key, value in args.items():
        if hasattr(config, key) and key != "device" and getattr(config, key) != value:
            flag, had = f"--{key.replace('_', '-')}", f"with {getattr(config, key)}"
            flag, had = (flag, "without it") if value is True else (f"{flag} {value}", had)
            raise UserError(
                f"{flag}: {run_dir} was started {had}; resume without that flag, or start a new run"
            )
    data = data_of_run(args, settings, run_dir)
    if data.md5 != settings["dataset"]["md5"]:
        raise UserError(
            f"{data.path}: not the file that {run_dir} was trained on; give that --data"
        )
    seeds = settings["seeds"]
    if len(seeds) == 1 and not (run_dir / "last.pt").exists():
        raise UserError(f"{run_dir}: no last.pt to resume from; start a new run")
    if settings["processes"] != world()[1]:
        command = resume_command(run_dir, settings["processes"])
        raise UserError(f"{run_dir}: started with another number of processes; use {command}")
    config = replace(config, device=args.get("device", config.device))
    config = resolve(config, data.counts["train"])
    train_seeds(data, config, seeds, run_dir)


def data_of_run(args: dict, settings: dict, run_dir: Path) -> PathData:
    """Return the data that --data names, or else that the run was trained on."""
    path = args.get("data", settings["dataset"]["path"])
    if "data" not in args and not os.path.exists(path):
        raise UserError(f"{run_dir}: its data is not at {path}; say with --data where it is")
    return load_data(find_data(path))


def evaluate_run(args: dict) -> None:
    """Evaluate a finished run, or its runs of several seeds, again on their own or other data."""
    run_dir = args["evaluate"]
    settings = read_run(run_dir)
    if args.get("model", settings["config"].model) != settings["config"].model:
        raise UserError(f"--model {args['model']}: {run_dir} holds a {settings['config'].model}")
    refuse(args, (*OPTIONS - {"model", "device"}, "seeds", "name", "log_dir"), "--evaluate")
    data = data_of_run(args, settings, run_dir)
    config = resolve(replace(settings["config"], device=args.get("device", "auto")), 1)
    seeds = settings["seeds"]
    folders = finished_seeds(run_dir, seeds)
    models = [load_finished(folder, config, data) for folder in folders]
    below = "."
    if data.md5 != settings["dataset"]["md5"]:
        below = f"evaluated-on-{data.path.stem[:50]}-{data.md5[:8]}"
        where = run_dir / ("seed*" if len(seeds) > 1 else "") / below
        print(f"Not the data that {run_dir} was trained on: results go to {where}.")
    images = settings["dataset"]["counts"]["train"]
    runs = []
    for seed, folder, model in zip(seeds, folders, models, strict=True):
        out_dir = folder / below
        out_dir.mkdir(exist_ok=True)
        history = read_history(folder / "history.csv")
        training = how_trained(history, seed, images)
        done = len(history)
        if 0 < done < config.epochs and done - training["best_epoch"] < config.patience:
            print(f"{folder}: stopped after {done} of {config.epochs} epochs; --resume finishes it")
        curves = history if below == "." else []
        runs.append(evaluate(model, config, data, out_dir, training, curves))
        summarise(runs[-1], out_dir, run_dir.parent)
    if len(runs) > 1:
        (run_dir / below).mkdir(exist_ok=True)
        summarise_seeds(runs, data, run_dir / below)


def predict_tiles(args: dict) -> int:
    """Classify images with a finished run; return the exit status."""
    refuse(args, (*OPTIONS - {"device"}, "data", "seeds", "name"), "--predict")
    device = resolve(Config(device=args.get("device", "auto")), 1).device
    out_dir = args.get("log_dir", Path("predictions"))
    checkpoint = args.get("checkpoint", BEST)
    return classify(args["predict"], checkpoint, device, "explain" in args, out_dir)


def load_finished(run_dir: Path, config: Config, data: PathData) -> nn.Module:
    """Return a finished run's best model; refuse one that is not the run's or not for the data."""
    model, checkpoint = load_model(run_dir / "best.pt", config.device)
    if checkpoint["config"]["model"] != config.model:
        raise UserError(
            f"{run_dir / 'best.pt'}: holds a {checkpoint['config']['model']}, but the run is of a "
            f"{config.model}; train anew"
        )
    size = checkpoint["identity"].get("size", data.size)
    if size != data.size:
        raise UserError(f"{data.path}: images of {data.size} px, but {run_dir} knows {size} px")
    return model


def refuse(args: dict, names: Sequence[str], mode: str) -> None:
    """Say which flags a mode cannot honour instead of ignoring them."""
    for name in names:
        if name in args:
            raise UserError(f"--{name.replace('_', '-')}: has no effect with {mode}; leave it out")


def summarise_seeds(runs: Sequence[dict], data: PathData, run_dir: Path) -> None:
    """Write summary.json: mean and spread over the seeds, and their ensemble; print the table."""
    if world()[0] > 0:
        return
    summary: dict = {"dataset": dataset_card(data), "seeds": [run["seed"] for run in runs]}
    for key in RESULTS:
        first = runs[0][key]
        names = [n for n in first if all(isinstance(run[key][n], float) for run in runs)]
        values = {name: [run[key][name] for run in runs] for name in names}
        ensemble = np.mean([run["probs"][key] for run in runs], axis=0)
        summary[key] = {
            "mean": {name: float(np.mean(v)) for name, v in values.items()},
            "std": {name: float(np.std(v, ddof=1)) for name, v in values.items()},
            "ensemble": Evaluation.compute_metrics(ensemble, data.labels[key.split("_")[0]]),
        }
    summary["train_seconds"] = [run.get("train_seconds") for run in runs]
    write_json(run_dir / "summary.json", summary)
    print(f"\n{len(runs)} seeds, mean accuracy (standard deviation), and their ensemble:")
    for key in RESULTS:
        part = summary[key]
        print(
            f"  {key:9} {part['mean']['accuracy']:.4f} ({part['std']['accuracy']:.4f})   "
            f"ensemble {part['ensemble']['accuracy']:.4f}"
        )
    print(f"Written to {run_dir / 'summary.json'}")


def summarise(results: dict, out_dir: Path, log_dir: Path) -> None:
    """Print what was reached and where everything lies."""
    if world()[0] > 0:
        return
    rows = {key: results[key] for key in RESULTS}
    data = results["dataset"]
    what = "SYNTHETIC data: no result" if data["kind"] == "synthetic" else f"{data['kind']} data"
    print(f"\n{out_dir} on {what}, {data['path']}\n{Evaluation.results_markdown(rows)}")
    print(f"(_tta: mean over the eight flips and quarter turns)\n\nEverything is in {out_dir}:")
    for path in sorted(out_dir.iterdir()):
        if path.name[0] != ".":
            print(f"  {path.name}{'/' if path.is_dir() else ''}")
    print(f"Look at it with: tensorboard --logdir {shlex.quote(str(log_dir))}")


# ------------------------------------------------------------------------------ several processes


def join_processes(args: dict) -> None:
    """Under torchrun, join the other processes (nccl between GPUs, gloo between CPUs)."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return
    device = read_run(args["resume"])["config"].device if "resume" in args else "auto"
    device = args.get("device", device)
    gpu = torch.cuda.is_available() and device != "cpu"
    if gpu and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise UserError("more processes than GPUs; lower --nproc-per-node, or use --device cpu")
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Statistics are averaged after each epoch instead; `forward_sync_buffers` is too new to use.
    warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
    # The others wait while the first downloads or evaluates; torchrun ends them if it dies.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one voice on the terminal)


def shared(make):
    """Return what `make()` returns in the first process, in all processes.

    If it raises a `UserError`, the first process goes on to say so and the others end.
    """
    box: list = [None]
    try:
        if world()[0] == 0:
            box = [make()]
    except UserError as error:
        box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if isinstance(box[0], UserError):
        raise box[0] if world()[0] == 0 else SystemExit(2)
    return box[0]


def no_traceback_of_full_disks(args: threading.ExceptHookArgs) -> None:
    """Say nothing of an OSError in TensorBoard's thread: who uses the thread is told of it."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def run(args: dict) -> int:
    """Do what the command line asks for; return the exit status."""
    join_processes(args)
    if world()[0] > 0 and ("predict" in args or "evaluate" in args):
        return 0  # only training is shared
    if "predict" in args:
        return predict_tiles(args)
    refuse(args, ("checkpoint", "explain"), "training or evaluation (only with --predict)")
    mode = resume_run if "resume" in args else evaluate_run if "evaluate" in args else new_runs
    mode(args)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status (0; 2 bad input; 130, 143 stopped; 141 pipe)."""
    args = vars(build_parser().parse_args(argv))
    Stopped.install()
    threading.excepthook = no_traceback_of_full_disks
    set_up_stdout()
    try:
        return run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return end_of_pipe()
    except (MemoryError, RuntimeError) as error:  # a CPU's lack is a RuntimeError like any other
        # "[enforce fail at ...] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        text = str(error).partition("\n")[0].rpartition("Allocator: ")[2]
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in text:
            raise
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        remedies = ["use --device cpu" if on_gpu else "close other programs"]
        if not {"predict", "evaluate", "resume"} & args.keys():  # they refuse that flag
            remedies.insert(0, "use a lower --batch-size")
        print(f"error: {text or 'out of memory'}; {' or '.join(remedies)}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that was taken away
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "choose a folder that can be written"
        print(f"error: {error}; {remedy}", file=sys.stderr)
        return 2
    except Stopped as stop:
        advice = "".join(f"; {note}" for note in getattr(stop, "__notes__", []))
        print(f"\nstopped by {signal.Signals(stop.signum).name}{advice}", file=sys.stderr)
        return 128 + stop.signum
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
