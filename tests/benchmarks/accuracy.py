"""What the default recipe reaches, and what each part of it and others' recipes reach.

    python tests/benchmarks/accuracy.py --data data/pathmnist.npz
    python tests/benchmarks/accuracy.py --data data/pathmnist.npz --rows default --seeds 0 1

Every row is trained here, on the same images, by one thread, two runs at a time. On the official
file all of it takes a day of two cores, so it may be done in parts: a run that accuracy.json has is
not trained again, and an interrupted one goes on in its folder in --work (others' recipes start
again). Delete both when the recipe has changed. Prints a Markdown table; writes accuracy.json,
which report.md quotes, and three figures next to it.
"""

import argparse
import copy
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import robustness  # noqa: E402

import Evaluation  # noqa: E402
import Optimizer  # noqa: E402
import Processor  # noqa: E402
import Training  # noqa: E402
from analyze_data import PathData, channel_stats, load_data  # noqa: E402
from Augmentation import to_float  # noqa: E402
from Common import SHORT_NAMES, markdown_table, write_json  # noqa: E402
from Figures import BLUE, GREY, ORANGE, VERMILION, WIDTH, house_style  # noqa: E402
from MyModels import ResNet18, SkipCNN, count_parameters  # noqa: E402
from Optimizer import make_optimizers  # noqa: E402
from PathMNIST import make_loader  # noqa: E402
from Runs import Config  # noqa: E402

IMAGES = (900, 3_600, 14_400)
EPOCHS = {1: 1, 2: 1, 4: 1, 8: 1, 30: 1, 60: 3}  # and the number of seeds
SCORES = {  # key -> split, and whether the probabilities are means over eight views
    "val": ("val", False),
    "shift": ("shift", False),
    "test": ("test", False),
    "test_tta": ("test", True),
}

NAMES = ("val", "simulated shift", "test", "8 views", "suite")  # of SCORES and the suite in a table

# Test accuracy of pretrained networks, trained end to end at each size (Doerrich et al. 2024, arXiv
# 2404.15786: three seeds, epoch chosen by val). Quoted, not measured here.
SIZES = (28, 64, 128, 224)
BY_SIZE = {
    "VGG16": (0.889, 0.938, 0.949, 0.947),
    "ResNet-18": (0.855, 0.934, 0.953, 0.938),
    "DenseNet-121": (0.853, 0.923, 0.947, 0.957),
    "ViT-B/16": (0.828, 0.920, 0.946, 0.958),
    "SAM": (0.845, 0.918, 0.957, 0.961),
}


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


def scores(model: nn.Module, data: PathData, folder: Path) -> dict[str, object]:
    """Return the accuracy on val, simulated shift and test, on test over eight views and on its
    corrupted tiles, and the recall; leave the probabilities in the folder, for the ensemble."""
    row, probs = {"parameters": count_parameters(model)}, {}
    for key, (split, eight_views) in SCORES.items():
        probs[key], labels = Training.predict(model, eval_loader(data, split), eight_views)
        row[key] = float((probs[key].argmax(1) == labels).mean())
        if split == "test":
            recall = recall_score(labels, probs[key].argmax(1), average=None)
            row[f"recall_{key}"] = dict(zip(SHORT_NAMES, recall.tolist(), strict=True))
    predict = partial(robustness.probabilities, model)
    row["corruptions"] = robustness.measure(predict, data.images["test"], data.labels["test"])
    row["suite"] = row["corruptions"]["mean"]
    np.savez(folder / "probs.npz", test=probs["test"], test_tta=probs["test_tta"])
    return row


class Clock:
    """Stands for the TensorBoard log, and notes how long the processor worked on each epoch."""

    def __init__(self) -> None:
        self.last = time.process_time()

    def start(self, _model: nn.Module) -> None:
        """There is nothing to note yet."""

    def epoch(self, row: dict, *_predictions: np.ndarray) -> None:
        """Add the seconds to the epoch's row of the history, which the checkpoint keeps."""
        row["core_seconds"] = time.process_time() - self.last
        self.last = time.process_time()


def processor() -> str:
    """Return the processor's name, family and model, as Linux tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    values = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    names = [values.get(key, "?") for key in ("model name", "cpu family", "model")]
    return "{}, family {}, model {}".format(*names)


def train_ours(
    data: PathData,
    seed: int,
    folder: Path,
    skip: bool = True,
    adamw: bool = False,
    **options,
) -> dict:
    """Train the default recipe, or one that differs from it in `options`; without skip connections,
    or with AdamW instead of Muon for the kernels."""
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
    with mock.patch.object(Optimizer, "make_optimizers", all_adamw if adamw else make_optimizers):
        state = Training.TrainingState(model, config, folder)
    history = Training.fit(state, train, eval_loader(data, "val"), Clock())
    about = {"epochs": len(history), "precision": config.precision}
    about["core_minutes"] = sum(row["core_seconds"] for row in history) / 60
    about["train_accuracy"] = history[-1]["train_accuracy"]
    return {**about, **scores(model, data, folder)}


def all_adamw(model: nn.Module, config: Config) -> list:
    """Return AdamW for all parameters; those that are vectors get no weight decay."""
    tensors = list(model.parameters())
    matrices = {"params": [p for p in tensors if p.ndim > 1], "weight_decay": config.weight_decay}
    vectors = {"params": [p for p in tensors if p.ndim <= 1], "weight_decay": 0.0}
    return [torch.optim.AdamW([matrices, vectors], lr=config.lr, fused=True)]


def train_subset(data: PathData, seed: int, folder: Path, count: int) -> dict:
    """Train the default on `count` random training images, other ones for each seed."""
    chosen = np.random.default_rng(seed).permutation(data.counts["train"])[:count]
    images, labels = data.images["train"][chosen], data.labels["train"][chosen]
    return train_ours(with_split(data, "train", images, labels), seed, folder)


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


def train_small_cnn(data: PathData, seed: int, folder: Path) -> dict:
    """Train the small CNN by its author's recipe: 30 epochs, the best of them by val accuracy."""
    torch.manual_seed(seed)
    net = SmallCNN()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = CosineAnnealingLR(optimizer, 30)
    colour = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.1)
    jitter = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), colour])

    def views(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([jitter(image) for image in images])

    return train_others(net, optimizer, schedule, views, 30, "accuracy", data, seed, folder)


def train_resnet(data: PathData, seed: int, folder: Path, epochs: int) -> dict:
    """Train ResNet-18 by MedMNIST's recipe, shortened to `epochs`: Adam, no augmentation, the rate
    divided by ten at half and at three quarters, the best epoch by val AUC."""
    torch.manual_seed(seed)
    net = ResNet18(mean=[0.5] * 3, std=[0.5] * 3)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = MultiStepLR(optimizer, [0.5 * epochs, 0.75 * epochs], 0.1)
    return train_others(net, optimizer, schedule, nn.Identity(), epochs, "auc", data, seed, folder)


def train_others(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    views: Callable,
    epochs: int,
    chosen_by: str,
    data: PathData,
    seed: int,
    folder: Path,
) -> dict:
    """Train in float32 with batches of 128; keep the epoch that is best on val by `chosen_by`."""
    train = make_loader(data, "train", 128, shuffle=True)
    best, weights, start = -1.0, {}, time.process_time()
    for epoch in range(epochs):
        train.sampler.set_epoch(seed * Training.SEED_STEP + epoch)
        net.train()
        for images, labels in train:
            x = to_float(images).contiguous()
            optimizer.zero_grad()
            F.cross_entropy(net(views(x)), labels).backward()
            optimizer.step()
        schedule.step()
        probs, labels = Training.predict(net, eval_loader(data, "val"))
        score = Evaluation.validation_metrics(probs, labels)[chosen_by]
        if score > best:
            best, weights = score, copy.deepcopy(net.state_dict())
    minutes = (time.process_time() - start) / 60
    net.load_state_dict(weights)
    about = {"epochs": epochs, "precision": "fp32", "core_minutes": minutes}
    return {**about, **scores(net, data, folder)}


def mean_colour(images: np.ndarray) -> np.ndarray:
    """Return each image's three channel means, (N, 3) in [0, 1]."""
    return images.mean((1, 2)) / 255


def colour_histogram(images: np.ndarray) -> np.ndarray:
    """Return the root of each image's share of pixels in 8 x 8 x 8 cells of RGB, (N, 512)."""
    cells = (images >> 5).astype(np.int64) @ np.array([64, 8, 1])
    return np.stack([np.bincount(c.ravel(), minlength=512) for c in cells]) ** 0.5 / 28


def fit_logistic(data: PathData, seed: int, folder: Path, features: Callable) -> dict:
    """Fit a logistic regression on features of each image."""
    start = time.process_time()
    x = {split: features(images) for split, images in data.images.items()}
    model = LogisticRegression(C=1e3, max_iter=1000).fit(x["train"], data.labels["train"])
    row = {"epochs": 0, "core_minutes": (time.process_time() - start) / 60}
    row["parameters"] = model.coef_.size + model.intercept_.size
    for split in ("val", "shift", "test"):
        row[split] = float(model.score(x[split], data.labels[split]))

    def predict(images: np.ndarray) -> np.ndarray:
        return model.predict_proba(features(images))

    row["corruptions"] = robustness.measure(predict, data.images["test"], data.labels["test"])
    row["suite"] = row["corruptions"]["mean"]
    return row


CHANGES: dict[str, Callable] = {  # one part of the default changed
    "without stain and colour": partial(train_ours, color=0.0, stain=0.0),
    "without sharpness, noise and compression": partial(
        train_ours, sharpness=0.0, noise=0.0, jpeg=0.0
    ),
    "without flips, turns and shifts": partial(train_ours, flips=False),
    "without skip connections": partial(train_ours, skip=False),
    "AdamW instead of Muon": partial(train_ours, adamw=True),
}


def rows() -> dict[str, tuple[Callable[[PathData, int, Path], dict], int]]:
    """Return what is measured: by name, the function and how many of the seeds it gets."""
    histogram = partial(fit_logistic, features=colour_histogram)
    return {
        "default": (train_ours, 5),
        **{name: (train, 3) for name, train in CHANGES.items()},
        "logistic regression on mean colour": (partial(fit_logistic, features=mean_colour), 1),
        "logistic regression on a colour histogram": (histogram, 1),
        "ResNet-18, MedMNIST's recipe, 1 epoch": (partial(train_resnet, epochs=1), 1),
        "ResNet-18, MedMNIST's recipe, 3 epochs": (partial(train_resnet, epochs=3), 1),
        "CNN of 128,809 parameters, own recipe": (train_small_cnn, 3),
        **{f"epochs: {n}": (partial(train_ours, epochs=n), seeds) for n, seeds in EPOCHS.items()},
        **{f"{n:,} training images": (partial(train_subset, count=n), 1) for n in IMAGES},
    }


def summarise(runs: list[dict]) -> dict[str, dict]:
    """Return, by the name of the row, the mean and standard deviation over its seeds."""
    out: dict[str, dict] = {}
    for name in rows():
        if not (chosen := [run for run in runs if run["name"] == name]):
            continue
        out[name] = {key: chosen[0][key] for key in ("parameters", "epochs")}
        out[name]["core_minutes"] = float(np.mean([run["core_minutes"] for run in chosen]))
        for key in (*SCORES, "suite"):
            if values := [run[key] for run in chosen if key in run]:
                std = float(np.std(values, ddof=1)) if len(values) > 1 else None
                out[name][key] = {"mean": float(np.mean(values)), "std": std, "seeds": len(values)}
    return out


def ensemble(runs: list[dict], labels: np.ndarray, work: Path) -> dict[str, float]:
    """Return the accuracy on test of the mean of the runs' probabilities; nothing if there is one
    run, or if the folder of one is elsewhere."""
    files = [work / run_folder(run["name"], run["seed"]) / "probs.npz" for run in runs]
    if len(files) < 2 or not all(file.exists() for file in files):
        return {}
    probs = [np.load(file) for file in files]
    means = {key: np.mean([each[key] for each in probs], axis=0) for key in probs[0]}
    found = {key: float((mean.argmax(1) == labels).mean()) for key, mean in means.items()}
    return {"seeds": len(files), **found}


def markdown(found: dict) -> str:
    """Return the results as a Markdown table: mean (standard deviation) over the seeds."""

    def cell(part: dict | None) -> str:
        if part is None:
            return ""
        return f"{part['mean']:.3f}" + (
            f" ({rounded(part['std'])})" if part["std"] is not None else ""
        )

    keys = (*SCORES, "suite")
    lines = [f"| recipe | parameters | epochs | minutes | seeds | {' | '.join(NAMES)} |"]
    lines += ["|---|---:|---:|---:|---:|" + "---|" * len(NAMES)]
    for name, row in summarise(found["runs"]).items():
        cells = [name, f"{row['parameters']:,}", f"{row['epochs']}", f"{row['core_minutes']:.1f}"]
        cells.append(f"{row['val']['seeds']}")
        lines.append("| " + " | ".join([*cells, *(cell(row.get(key)) for key in keys)]) + " |")
        if both := found["ensembles"].get(name):
            cells = [f"{name}, ensemble", "", "", "", f"{both['seeds']}", "", ""]
            cells += [f"{both['test']:.3f}", f"{both['test_tta']:.3f}", ""]
            lines.append("| " + " | ".join(cells) + " |")
    if len(differences := paired(found["runs"])) > 1:
        lines += ["", markdown_table(differences)]
    return "\n".join(lines)


def rounded(spread: float) -> str:
    """Return a spread with three decimals, or with its first digit if it is smaller."""
    return f"{spread:.3f}" if spread >= 0.0005 or spread == 0 else f"{spread:.1g}"


def paired(runs: list[dict]) -> list[list[str]]:
    """Return the rows of a table: for each change of the default, the mean difference from the
    default with the same seeds, and its standard error."""
    default = {run["seed"]: run for run in runs if run["name"] == "default"}
    table = [["difference from the default", "seeds", *NAMES]]
    for name in CHANGES:
        changed = [run for run in runs if run["name"] == name and run["seed"] in default]
        if not changed:
            continue
        cells = [name, f"{len(changed)}"]
        for key in (*SCORES, "suite"):
            differences = [run[key] - default[run["seed"]][key] for run in changed]
            cell = f"{np.mean(differences):+.3f}"
            if len(changed) > 1:
                cell += f" ({rounded(np.std(differences, ddof=1) / len(changed) ** 0.5)})"
            cells.append(cell)
        table.append(cells)
    return table


@house_style
def curve_figure(
    points: dict[float, dict], xlabel: str, title: str, others: dict | None = None
) -> Figure:
    """Draw test accuracy of rows over a number each, with rows of others' recipes as crosses."""
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    axes = figure.subplots()
    points = dict(sorted(points.items()))
    for key, label, colour in (
        ("val", "val", ORANGE),
        ("test", "test, one view", BLUE),
        ("test_tta", "test, eight views", VERMILION),
    ):
        means = [row[key]["mean"] for row in points.values()]
        spread = [row[key]["std"] or 0 for row in points.values()]
        style = {"label": label, "color": colour, "marker": "o", "capsize": 3}
        axes.errorbar(list(points), means, spread, **style)
    for name, row in (others or {}).items():
        place = row["core_minutes"], row["test"]["mean"]
        axes.plot(*place, color=GREY, marker="x")
        axes.annotate(name, place, xytext=(5, -10), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks(list(points), [f"{x:,.0f}" if x > 10 else f"{x:.1f}" for x in points])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel="accuracy", title=title)
    axes.legend(loc="lower right")
    return figure


@house_style
def size_figure(default: dict) -> Figure:
    """Draw test accuracy over the images' size: the default's row, and published networks."""
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
    for (name, values), line in zip(BY_SIZE.items(), styles, strict=True):
        axes.plot(SIZES, values, color=GREY, linestyle=line, label=f"{name}, pretrained")
    for key, label, colour in (
        ("test", "this project, one view", BLUE),
        ("test_tta", "this project, eight views", VERMILION),
    ):
        spread = default[key]["std"] or 0
        style = {"color": colour, "marker": "o", "capsize": 3, "label": label}
        axes.errorbar(28, default[key]["mean"], spread, linestyle="", **style)
    axes.set_xscale("log")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.set(xlabel="pixels a side", ylabel="accuracy", title="Test accuracy by size of the images")
    axes.legend(loc="lower right")
    return figure


def figures(results: dict[str, dict], n_train: int) -> dict[str, Figure]:
    """Return the figures, as far as their rows are there."""
    by_time = {row["core_minutes"]: row for name, row in results.items() if "epochs:" in name}
    by_count = {n: results[name] for n in IMAGES if (name := f"{n:,} training images") in results}
    others = {}
    for name, row in results.items():
        if "recipe" in name:
            others[f"{name.split(',')[0]}, {row['epochs']} epochs"] = row
    drawn = {}
    if "default" in results:
        by_time[results["default"]["core_minutes"]] = results["default"]
        by_count[n_train] = results["default"]
        xlabel = "minutes of training on one core"
        drawn["accuracy_minutes"] = curve_figure(
            by_time, xlabel, "Accuracy against training time", others
        )
        title = "Accuracy against the number of training images"
        drawn["accuracy_images"] = curve_figure(by_count, "training images", title)
        drawn["accuracy_size"] = size_figure(results["default"])
    return drawn


def prepare_process() -> None:
    """Set up a process that measures: with one thread, so that several do not slow each other."""
    Processor.prepare()
    torch.set_num_threads(1)


def run_folder(name: str, seed: int | str) -> str:
    """Return the name of a run's folder."""
    return re.sub(r"[^\w.-]+", "-", f"{name}-{seed}")


def measure(path: str, name: str, seed: int, work: Path) -> dict:
    """Train one row with one seed, in a process of its own."""
    data = load_data(Path(path))  # and a quarter of val as another centre might stain it
    shift = simulated_shift(data.images["val"][::4]), np.tile(data.labels["val"][::4], 8)
    (folder := work / run_folder(name, seed)).mkdir(parents=True, exist_ok=True)
    row = rows()[name][0](with_split(data, "shift", *shift), seed, folder)
    return {"name": name, "seed": seed, "processor": processor(), **row}


def main() -> None:
    """Measure every row, several at a time, and write each run as it is complete."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="npz file to train and test on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", choices=rows(), metavar="ROW", help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    work = ROOT / "data" / "accuracy"
    parser.add_argument("--work", type=Path, default=work, help="the runs' folders")
    parser.add_argument("--out", type=Path, default=HERE / "accuracy.json")
    args = parser.parse_args()
    Processor.prepare()
    data = load_data(Path(args.data))
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    if found.get("md5") != data.md5:
        found = {"md5": data.md5, "counts": data.counts, "runs": [], "ensembles": {}}
    done = {(run["name"], run["seed"]) for run in found["runs"]}
    wanted = [(n, seed) for n in args.rows or rows() for seed in args.seeds[: rows()[n][1]]]
    jobs = [(args.data, *run, args.work) for run in wanted if run not in done]
    order = list(rows())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, prepare_process) as pool:
        for task in as_completed([pool.submit(measure, *job) for job in jobs]):
            print(run := task.result(), file=sys.stderr, flush=True)
            found["runs"].append(run)
            found["runs"].sort(key=lambda run: (order.index(run["name"]), run["seed"]))
            chosen = [other for other in found["runs"] if other["name"] == run["name"]]
            if score := ensemble(chosen, data.labels["test"], args.work):
                found["ensembles"][run["name"]] = score
            write_json(args.out, found)
    print(markdown(found))
    for name, figure in figures(summarise(found["runs"]), data.counts["train"]).items():
        figure.savefig(args.out.with_name(f"{name}.png"))


if __name__ == "__main__":
    main()
