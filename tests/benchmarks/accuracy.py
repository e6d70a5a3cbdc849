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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torchvision.transforms import v2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from analyze_data import PathData, channel_stats, load_data  # noqa: E402
from Evaluation import validation_metrics  # noqa: E402
from MyModels import ResNet18, SkipCNN, count_parameters  # noqa: E402
from PathMNIST import EVAL_BATCH, make_loader  # noqa: E402
from Training import Config, fit, predict, resolve, to_float  # noqa: E402

CURVE = (100, 200, 400)


def simulated_shift(images: np.ndarray) -> np.ndarray:
    """Re-stain images in eight ways: uint8 (8 N, S, S, 3).

    Hue and saturation both ways, gamma both ways, and two random mixtures of the channels. It
    stands for another centre where the real one must not be looked at. Training's own colour
    augmentation is another one, but akin to it: gamma is what stain jitter does with equal gains,
    only stronger than there.
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


def add_shift(data: PathData) -> PathData:
    """Return the data with one more split, "shift": val as another centre might stain it."""
    shifted = simulated_shift(data.images["val"])
    labels = np.tile(data.labels["val"], len(shifted) // len(data.labels["val"]))
    return replace(
        data,
        images={**data.images, "shift": shifted},
        labels={**data.labels, "shift": labels},
    )


def subset(data: PathData, count: int, seed: int) -> PathData:
    """Return the data with only `count` random training images, other ones for each seed."""
    chosen = np.random.default_rng(seed).permutation(data.counts["train"])[:count]
    return replace(
        data,
        images={**data.images, "train": data.images["train"][chosen]},
        labels={**data.labels, "train": data.labels["train"][chosen]},
    )


def scores(model: nn.Module, data: PathData) -> dict[str, float]:
    """Return the accuracy on val, simulated shift and test, and on test over eight views."""
    row = {}
    for key, split, views in (
        ("val", "val", 1),
        ("shift", "shift", 1),
        ("test", "test", 1),
        ("test_tta", "test", 8),
    ):
        probs, labels = predict(model, make_loader(data, split, EVAL_BATCH), views)
        row[key] = float((probs.argmax(1) == labels).mean())
        row[f"{key}_probs"] = probs
    return row


def train_ours(data: PathData, seed: int, skip: bool = True, **options: object) -> dict:
    """Train the default recipe, or one that differs from it in `options`."""
    config = resolve(Config(seed=seed, device="cpu", **options), data.counts["train"])
    mean, std = channel_stats(data.images["train"])
    torch.manual_seed(seed)
    model = SkipCNN(mean.tolist(), std.tolist())
    if not skip:
        for stage in (model.stage1, model.stage2, model.stage3):
            stage.skip = Zero()
            nn.init.ones_(stage.norm2.weight)
    train = make_loader(data, "train", config.batch_size, shuffle_seed=seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        history = fit(model, train, make_loader(data, "val", EVAL_BATCH), config, Path(folder))
    seconds = time.perf_counter() - start
    return {
        "parameters": count_parameters(model),
        "seconds": seconds,
        "epochs": len(history),
        **scores(model, data),
    }


class Zero(nn.Module):
    """A skip path that carries nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros((), dtype=x.dtype, device=x.device)


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
    data: PathData,
    seed: int,
    model: Callable[[], nn.Module],
    make_optimizer: Callable,
    make_schedule: Callable,
    augment: Callable[[Tensor], Tensor],
    criterion: str,
    epochs: int = 100,
) -> dict:
    """Train in float32 by a plain loop, one schedule step per epoch; keep the best epoch."""
    torch.manual_seed(seed)
    net = model()
    optimizer = make_optimizer(net.parameters())
    schedule = make_schedule(optimizer)
    train = make_loader(data, "train", 128, shuffle_seed=seed)
    best, state = -1.0, {}
    start = time.perf_counter()
    for epoch in range(epochs):
        train.sampler.sampler.set_epoch(epoch)
        net.train()
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(net(augment(to_float(images).contiguous())), labels).backward()
            optimizer.step()
        schedule.step()
        val = validation_metrics(*predict(net, make_loader(data, "val", EVAL_BATCH)))
        if val[criterion] > best:
            best, state = val[criterion], {k: v.clone() for k, v in net.state_dict().items()}
    seconds = time.perf_counter() - start
    net.load_state_dict(state)
    row = {"parameters": count_parameters(net), "seconds": seconds, "epochs": epochs}
    return {**row, **scores(net, data)}


def train_medmnist(data: PathData, seed: int) -> dict:
    """Train MedMNIST's official recipe (Yang et al. 2023; MedMNIST/experiments on GitHub)."""
    half = (0.5, 0.5, 0.5)
    return train_plain(
        data,
        seed,
        lambda: ResNet18(half, half),
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [50, 75], gamma=0.1),
        lambda images: images,
        "auc",
    )


def train_small_cnn(data: PathData, seed: int) -> dict:
    """Train the small CNN by its own recipe."""
    jitter = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.1),
        ]
    )
    return train_plain(
        data,
        seed,
        SmallCNN,
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
        lambda images: torch.stack([jitter(image) for image in images]),
        "accuracy",
    )


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
    table = {
        "default": (train_ours, 5),
        "MedMNIST's official ResNet-18": (train_medmnist, 1),
        "128,809-parameter CNN, own recipe": (train_small_cnn, 3),
        "logistic regression on mean colour": (train_mean_colour, 1),
    }
    without = {  # what is left out: the options, and how many seeds it gets
        "colour augmentation": ({"color": 0.0, "stain": 0.0}, 3),
        "flips, turns and shifts": ({"flips": False}, 2),
        "CutMix": ({"cutmix": 0.0}, 2),
        "skip connections": ({"skip": False}, 3),
        "EMA": ({"ema": 0.0}, 3),
        "bf16": ({"precision": "fp32"}, 5),
    }
    for name, (options, seeds) in without.items():
        table[f"default without {name}"] = (
            lambda data, seed, options=options: train_ours(data, seed, **options),
            seeds,
        )
    for count in CURVE:
        table[f"default, {count} training images"] = (
            lambda data, seed, count=count: train_ours(subset(data, count, seed), seed),
            3,
        )
    return table


def summarise(runs: list[dict], labels: np.ndarray) -> dict:
    """Return mean and standard deviation over the seeds, and the ensemble's accuracy on test."""
    out: dict = {key: runs[0][key] for key in ("parameters", "epochs")}
    out["seeds"] = [run["seed"] for run in runs]
    for key in ("seconds", "val", "shift", "test", "test_tta"):
        values = [run[key] for run in runs]
        out[key] = {
            "mean": float(np.mean(values)),
            "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "runs": values,
        }
    for key in ("test", "test_tta"):
        if len(runs) > 1 and f"{key}_probs" in runs[0]:
            ensemble = np.mean([run[f"{key}_probs"] for run in runs], axis=0)
            out[f"ensemble_{key}"] = float((ensemble.argmax(1) == labels).mean())
    return out


def markdown(results: dict[str, dict]) -> str:
    """Return the results as a Markdown table: mean (standard deviation) over the seeds."""

    def cell(part: dict) -> str:
        return f"{part['mean']:.3f}" + (f" ({part['std']:.3f})" if part["std"] is not None else "")

    lines = [
        "| recipe | parameters | seeds | seconds | val | simulated shift | test | test, 8 views "
        "| ensemble, 8 views |",
        "|---|---:|---:|---:|---|---|---|---|---|",
    ]
    for name, row in results.items():
        ensemble = row.get("ensemble_test_tta")
        cells = [name, f"{row['parameters']:,}", str(len(row["seeds"]))]
        cells += [f"{row['seconds']['mean']:.1f}"]
        cells += [cell(row[key]) for key in ("val", "shift", "test", "test_tta")]
        lines.append("| " + " | ".join([*cells, f"{ensemble:.3f}" if ensemble else ""]) + " |")
    return "\n".join(lines)


def curve_figure(results: dict[str, dict], full: int):
    """Return the learning curve: accuracy by number of training images."""
    from Evaluation import BLUE, ORANGE, VERMILION, house_style

    @house_style
    def draw():
        from matplotlib.figure import Figure

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
            x = [aside * count for count in points]
            axes.errorbar(x, means, spread, label=label, color=colour, marker="o", capsize=3)
        axes.set_xscale("log")
        axes.set_xticks(list(points), [str(count) for count in points])
        axes.minorticks_off()
        axes.set_xlabel("training images (logarithmic)")
        axes.set_ylabel("accuracy")
        axes.set_title("Learning curve of the default recipe: mean and s.d. over the seeds")
        axes.legend()
        return figure

    return draw()


def measure(path: str, name: str, seed: int) -> dict:
    """Train one row with one seed, in a process of its own."""
    row = rows()[name][0](add_shift(load_data(path)), seed)
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
    data = load_data(args.data)
    chosen = {n: most for n, (_, most) in rows().items() if not args.rows or n in args.rows}
    results: dict[str, list[dict]] = {name: [] for name in chosen}
    pool = ProcessPoolExecutor(
        args.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    )
    # The longest first, so that no process is left alone at the end.
    order = sorted(chosen, key=lambda name: "MedMNIST" not in name)
    with pool:
        tasks = [
            pool.submit(measure, args.data, name, seed)
            for name in order
            for seed in args.seeds[: chosen[name]]
        ]
        for task in as_completed(tasks):
            run = task.result()
            short = {k: v for k, v in run.items() if not k.endswith("_probs")}
            print(short, file=sys.stderr, flush=True)
            results[run.pop("name")].append(run)
            full = {
                name: summarise(sorted(runs, key=lambda r: r["seed"]), data.labels["test"])
                for name, runs in results.items()
                if len(runs) == len(args.seeds[: chosen[name]])
            }
            about = {"md5": data.md5, "counts": data.counts, "jobs": args.jobs}
            about |= {
                "torch": torch.__version__,
                "precision": resolve(Config(device="cpu"), 1).precision,
            }
            args.out.write_text(json.dumps({**about, "rows": full}, indent=1) + "\n")
    print(markdown(full))
    if not args.rows:
        figure = curve_figure(full, data.counts["train"])
        figure.savefig(args.out.with_name("learning_curve.png"), dpi=150)


if __name__ == "__main__":
    main()
