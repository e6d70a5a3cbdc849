"""What the default recipe reaches, and what each part of it and others' recipes reach.

    python tests/benchmarks/accuracy.py --data pathmnist_sample.npz
    python tests/benchmarks/accuracy.py --data pathmnist_sample.npz --seeds 0 1 --rows default

Every row is trained here, on the same images, in one run of this program. Prints a Markdown
table, writes accuracy.json next to this file (which report.md quotes) and the learning curve.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import Training  # noqa: E402
from analyze_data import PathData, channel_stats, load_data  # noqa: E402
from Augmentation import to_float  # noqa: E402
from Evaluation import validation_metrics  # noqa: E402
from Figures import BLUE, ORANGE, VERMILION, house_style  # noqa: E402
from MyModels import ResNet18, SkipCNN, count_parameters  # noqa: E402
from PathMNIST import make_loader  # noqa: E402
from Runs import Config  # noqa: E402

CURVE = (100, 200, 400)


def simulated_shift(images: np.ndarray) -> np.ndarray:
    """Re-stain images in eight ways: uint8 (8 N, S, S, 3).

    Hue, saturation and gamma both ways, and two random mixtures of the channels: another centre,
    where the real one must not be looked at. Training's own colour augmentation is another one, but
    akin to it: gamma is what stain jitter does with equal gains, only stronger than there.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    generator = torch.Generator().manual_seed(1)
    mixes = torch.eye(3) + 0.12 * torch.randn(2, 3, 3, generator=generator)
    mixes = mixes / mixes.sum(2, keepdim=True)
    views = [v2.functional.adjust_hue(x, amount) for amount in (-0.06, 0.06)]
    views += [v2.functional.adjust_saturation(x, factor) for factor in (0.5, 1.6)]
    views += [x**gamma for gamma in (0.6, 1.6)]
    views += [torch.einsum("nchw,dc->ndhw", x, mix) for mix in mixes]
    shifted = torch.cat(views).clamp(0, 1).mul(255).round().byte()
    return shifted.permute(0, 2, 3, 1).contiguous().numpy()


def with_split(data: PathData, split: str, images: np.ndarray, labels: np.ndarray) -> PathData:
    """Return the data with one more split, or with other images in one of its own."""
    images, labels = data.images | {split: images}, data.labels | {split: labels}
    return replace(data, images=images, labels=labels)


def eval_loader(data: PathData, split: str) -> DataLoader:
    """Return a loader of a split that is not trained on."""
    return make_loader(data, split, Training.eval_batch(data.size))


def scores(model: nn.Module, data: PathData) -> dict[str, object]:
    """Return the accuracy on val, simulated shift and test, and on test over eight views."""
    row: dict[str, object] = {}
    for key in ("val", "shift", "test", "test_tta"):
        loader = eval_loader(data, key.removesuffix("_tta"))
        probs, labels = Training.predict(model, loader, 8 if key.endswith("_tta") else 1)
        row |= {key: float((probs.argmax(1) == labels).mean()), f"{key}_probs": probs}
    return row


def train_ours(data: PathData, seed: int, skip: bool = True, **options: object) -> dict:
    """Train the default recipe, or one that differs from it in `options`."""
    config = Training.resolve(Config(seed=seed, device="cpu", **options), data.counts["train"])
    mean, std = channel_stats(data.images["train"])
    torch.manual_seed(seed)
    model = SkipCNN(mean.tolist(), std.tolist())
    if not skip:
        for stage in (model.stage1, model.stage2, model.stage3):
            del stage.skip
            stage.skip = lambda _x: 0.0
            nn.init.ones_(stage.norm2.weight)
    train = make_loader(data, "train", config.batch_size, shuffle=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        state = Training.TrainingState(model, config, Path(folder))
        epochs = len(Training.fit(state, train, eval_loader(data, "val")))
    row = {"parameters": count_parameters(model), "seconds": time.perf_counter() - start}
    return {**row, "epochs": epochs, **scores(model, data)}


def train_subset(data: PathData, seed: int, count: int) -> dict:
    """Train the default on `count` random training images, other ones for each seed."""
    chosen = np.random.default_rng(seed).permutation(data.counts["train"])[:count]
    images, labels = data.images["train"][chosen], data.labels["train"][chosen]
    return train_ours(with_split(data, "train", images, labels), seed)


class SmallCNN(nn.Sequential):
    """The 128,809-parameter CNN that reached .922 on the full test split (Darkkavn, GitHub)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if after < 128 else [nn.AdaptiveAvgPool2d(1)]
        dense = [nn.Linear(128, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 9)]
        super().__init__(*layers, nn.Flatten(), *dense)


def train_plain(
    data: PathData, seed: int, net: nn.Module, schedule: LRScheduler, augment: Callable, by: str
) -> dict:
    """Train for 100 epochs in float32, the schedule stepping after each; keep the best by `by`."""
    train, epochs, best, state = make_loader(data, "train", 128, shuffle=True), 100, -1.0, {}
    start = time.perf_counter()
    for epoch in range(epochs):
        train.sampler.set_epoch(seed * Training.SEED_STEP + epoch)
        net.train()
        for images, labels in train:
            schedule.optimizer.zero_grad()
            F.cross_entropy(net(augment(to_float(images).contiguous())), labels).backward()
            schedule.optimizer.step()
        schedule.step()
        val = validation_metrics(*Training.predict(net, eval_loader(data, "val")))
        if val[by] > best:
            best, state = val[by], {k: v.clone() for k, v in net.state_dict().items()}
    row = {"parameters": count_parameters(net), "seconds": time.perf_counter() - start}
    net.load_state_dict(state)
    return {**row, "epochs": epochs, **scores(net, data)}


def train_medmnist(data: PathData, seed: int) -> dict:
    """Train MedMNIST's official recipe (Yang et al. 2023; MedMNIST/experiments on GitHub)."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam((net := ResNet18()).parameters(), lr=1e-3)
    return train_plain(data, seed, net, MultiStepLR(optimizer, [50, 75]), lambda x: x, "auc")


def train_small_cnn(data: PathData, seed: int) -> dict:
    """Train the small CNN by its own recipe."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW((net := SmallCNN()).parameters(), lr=1e-3, weight_decay=1e-4)
    colour = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.1)
    jitter = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), colour])

    def augment(images: Tensor) -> Tensor:
        return torch.stack([jitter(image) for image in images])

    schedule = CosineAnnealingLR(optimizer, 100)
    return train_plain(data, seed, net, schedule, augment, "accuracy")


def train_mean_colour(data: PathData, seed: int) -> dict:
    """Fit a logistic regression on each image's three channel means."""
    start = time.perf_counter()
    means = {split: images.mean((1, 2)) / 255 for split, images in data.images.items()}
    model = LogisticRegression(C=1e4, max_iter=5000).fit(means["train"], data.labels["train"])
    row = {"parameters": 36, "seconds": time.perf_counter() - start, "epochs": 0}
    for split in ("val", "shift", "test"):
        row[split] = float(model.score(means[split], data.labels[split]))
    return {**row, "test_tta": row["test"]}


def rows() -> dict[str, tuple[Callable[[PathData, int], dict], int]]:
    """Return what is measured: by name, the function and how many of the seeds it gets."""
    table: dict[str, tuple] = {
        "default": (train_ours, 5),
        "MedMNIST's official ResNet-18": (train_medmnist, 1),
        "128,809-parameter CNN, own recipe": (train_small_cnn, 3),
        "logistic regression on mean colour": (train_mean_colour, 1),
        "default without colour augmentation": (partial(train_ours, color=0.0, stain=0.0), 3),
        "default without flips, turns and shifts": (partial(train_ours, flips=False), 2),
        "default without CutMix": (partial(train_ours, cutmix=0.0), 2),
        "default without skip connections": (partial(train_ours, skip=False), 3),
        "default without EMA": (partial(train_ours, ema=0.0), 3),
        "default without bf16": (partial(train_ours, precision="fp32"), 5),
    }
    subsets = {f"default, {count} training images": count for count in CURVE}
    return table | {name: (partial(train_subset, count=subsets[name]), 3) for name in subsets}


def summarise(runs: list[dict], labels: np.ndarray) -> dict:
    """Return mean and standard deviation over the seeds, and the ensemble's accuracy on test."""
    out: dict = {key: runs[0][key] for key in ("parameters", "epochs")}
    out["seeds"] = [run["seed"] for run in runs]
    for key in ("seconds", "val", "shift", "test", "test_tta"):
        values = [run[key] for run in runs]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        out[key] = {"mean": float(np.mean(values)), "std": std, "runs": values}
    for key in ("test", "test_tta"):
        if len(runs) > 1 and f"{key}_probs" in runs[0]:
            probs = np.mean([run[f"{key}_probs"] for run in runs], axis=0)
            out[f"ensemble_{key}"] = float((probs.argmax(1) == labels).mean())
    return out


def markdown(results: dict[str, dict]) -> str:
    """Return the results as a Markdown table: mean (standard deviation) over the seeds."""

    def cell(part: dict) -> str:
        return f"{part['mean']:.3f}" + (f" ({part['std']:.3f})" if part["std"] is not None else "")

    columns = "recipe | parameters | seeds | seconds | val | simulated shift | test"
    lines = [f"| {columns} | test, 8 views | ensemble, 8 views |"]
    lines += ["|---|---:|---:|---:|---|---|---|---|---|"]
    for name, row in results.items():
        ensemble = row.get("ensemble_test_tta")
        cells = [name, f"{row['parameters']:,}", f"{len(row['seeds'])}"]
        cells += [f"{row['seconds']['mean']:.1f}"]
        cells += [cell(row[key]) for key in ("val", "shift", "test", "test_tta")]
        lines += ["| " + " | ".join([*cells, f"{ensemble:.3f}" if ensemble else ""]) + " |"]
    return "\n".join(lines)


@house_style
def curve_figure(results: dict[str, dict], full: int) -> Figure:
    """Return the learning curve: accuracy by number of training images."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = {count: f"default, {count} training images" for count in CURVE} | {full: "default"}
    points = {count: results[name] for count, name in names.items() if name in results}
    for key, label, colour, aside in (  # side by side, so that none hides another
        ("val", "val", ORANGE, 0.97),
        ("test", "test, one view", BLUE, 1),
        ("test_tta", "test, eight views", VERMILION, 1.03),
    ):
        means = [row[key]["mean"] for row in points.values()]
        spread = [row[key]["std"] or 0 for row in points.values()]
        style = {"label": label, "color": colour, "marker": "o", "capsize": 3}
        axes.errorbar([aside * count for count in points], means, spread, **style)
    axes.set_xscale("log")
    axes.set_xticks(list(points), [str(count) for count in points])
    axes.minorticks_off()
    axes.set(xlabel="training images (logarithmic)", ylabel="accuracy")
    axes.set_title("Learning curve of the default recipe: mean and s.d. over the seeds")
    axes.legend()
    return figure


def prepare_process() -> None:
    """Set up a process that measures: with one thread, so that several do not slow each other."""
    Training.prepare_processor()
    torch.set_num_threads(1)


def measure(path: str, name: str, seed: int) -> dict:
    """Train one row with one seed, in a process of its own."""
    data = load_data(Path(path))  # and val as another centre might stain it
    shift = simulated_shift(data.images["val"]), np.tile(data.labels["val"], 8)
    row = rows()[name][0](with_split(data, "shift", *shift), seed)
    return {"name": name, "seed": seed, **row}


def main() -> None:
    """Measure every row, several at a time, and write the results as rows are complete."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="npz file to train and test on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", choices=rows(), metavar="ROW", help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=HERE / "accuracy.json")
    args = parser.parse_args()
    Training.prepare_processor()
    data = load_data(Path(args.data))
    table = rows().items()
    seeds = {n: args.seeds[:most] for n, (_, most) in table if n in (args.rows or rows())}
    about = {"md5": data.md5, "counts": data.counts, "jobs": args.jobs, "torch": torch.__version__}
    about["precision"] = Training.resolve(Config(device="cpu"), 1).precision
    # The longest first, so that no process is left alone at the end.
    order = sorted(seeds, key=lambda name: "MedMNIST" not in name)
    runs: dict[str, list[dict]] = {name: [] for name in seeds}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, prepare_process) as pool:
        tasks = [pool.submit(measure, args.data, name, s) for name in order for s in seeds[name]]
        for task in as_completed(tasks):
            run = task.result()
            short = {key: value for key, value in run.items() if not key.endswith("_probs")}
            print(short, file=sys.stderr, flush=True)
            runs[run.pop("name")].append(run)
            full = {
                name: summarise(sorted(done, key=lambda run: run["seed"]), data.labels["test"])
                for name, done in runs.items()
                if len(done) == len(seeds[name])
            }
            args.out.write_text(json.dumps({**about, "rows": full}, indent=1) + "\n")
    print(markdown(full))
    if not args.rows:
        figure = curve_figure(full, data.counts["train"])
        figure.savefig(args.out.with_name("learning_curve.png"), dpi=150)


if __name__ == "__main__":
    main()
