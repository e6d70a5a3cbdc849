"""How fast loading, training, evaluation and data analysis are, as ratios within one run.

    python tests/benchmarks/speed.py                     # makes the full-size synthetic file
    python tests/benchmarks/speed.py --data full.npz     # uses that file
    python tests/benchmarks/speed.py --shares            # without the three whole runs

Prints a Markdown table and writes speed.json next to this file (which report.md quotes). Loader,
steps (in turn) and start-up are medians of several repetitions; epochs and whole runs, which take
minutes, are run once. The machine should have nothing else to do.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from analyze_data import SPLITS, PathData, channel_stats, load_data  # noqa: E402
from MyModels import ResNet18, SkipCNN  # noqa: E402
from PathMNIST import EVAL_BATCH, make_loader  # noqa: E402
from Training import (  # noqa: E402
    Config,
    make_average,
    make_optimizers,
    predict,
    resolve,
    train_one_epoch,
    train_step,
)

SHARES = (0.1, 0.3, 1.0)


class MedMNISTWay(Dataset):
    """One image at a time through Pillow, as medmnist's PathMNIST class does."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def median_seconds(work: Callable[[], object], repetitions: int = 7, device: str = "cpu") -> float:
    """Return the median time of `work()` after one call that is not counted."""
    times = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def exhaust(loader: DataLoader) -> None:
    """Take every batch once."""
    for _ in loader:
        pass


def loader_speed(data: PathData, batch_size: int) -> dict[str, float]:
    """Return images per second of loading alone."""
    images, labels = data.images["train"][:20_000], data.labels["train"][:20_000]
    some = replace(data, images={"train": images}, labels={"train": labels})
    ours = make_loader(some, "train", batch_size, shuffle_seed=0)
    out = {"loader, ours": len(images) / median_seconds(lambda: exhaust(ours), 5)}
    for workers in (0, 2):
        theirs = DataLoader(
            MedMNISTWay(images, labels), batch_size=128, shuffle=True, num_workers=workers
        )
        seconds = median_seconds(lambda theirs=theirs: exhaust(theirs), 3)
        out[f"loader, MedMNIST's way, {workers} workers"] = len(images) / seconds
    return out


def our_step(data: PathData, config: Config) -> Callable[[], None]:
    """Return one step of the default: augmentation, both passes, optimisers, moving average."""
    mean, std = channel_stats(data.images["val"])
    model = SkipCNN(mean.tolist(), std.tolist()).to(config.device)
    model.to(memory_format=torch.channels_last).train()
    _, average = make_average(model, config, 1000)
    optimizers = make_optimizers(model, config)
    images = torch.from_numpy(data.images["train"][: config.batch_size]).to(config.device)
    labels = torch.from_numpy(data.labels["train"][: config.batch_size]).to(config.device)
    generator = torch.Generator(config.device).manual_seed(0)

    def step() -> None:
        train_step(model, optimizers, images, labels, generator, config)
        average(10)

    return step


def plain_step(
    model: nn.Module, data: PathData, batch_size: int, device: str
) -> Callable[[], None]:
    """Return one float32 NCHW step with Adam and no augmentation, as MedMNIST trains."""
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = torch.from_numpy(data.images["train"][:batch_size]).permute(0, 3, 1, 2)
    images = (images.float() / 255).contiguous().to(device)
    labels = torch.from_numpy(data.labels["train"][:batch_size]).to(device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def matmul(dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Return a matrix product of 4096 x 4096: its speed is the machine's peak, in practice."""
    left, right = torch.randn(2, 4096, 4096, device=device).to(dtype)
    return lambda: left @ right


def step_speed(data: PathData, config: Config, rounds: int = 7) -> dict[str, float]:
    """Return images per second of training steps, and the default's share of the matmul peak.

    All of them are measured in turn, round after round, so that a shared machine's slow minutes
    meet them alike.
    """
    device, size = config.device, config.batch_size
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    step = our_step(data, config)
    with FlopCounterMode(display=False) as counter:
        step()
    plain = our_step(data, replace(config, precision="fp32"))
    nchw = plain_step(SkipCNN(), data, size, device)
    resnet = plain_step(ResNet18(), data, 128, device)
    works = {  # what is done, and how many images or GFLOP that is
        "training step, default": (step, size),
        "training step, default in plain fp32": (plain, size),
        "training step, same model in fp32 NCHW": (nchw, size),
        "training step, ResNet-18 as MedMNIST": (resnet, 128),
        "GFLOP/s, matmul 4096": (matmul(dtype, device), 2 * 4.096**3),
        "GFLOP/s, matmul 4096 in fp32": (matmul(torch.float32, device), 2 * 4.096**3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, (work, _) in works.items():
            seconds[name].append(median_seconds(work, 5, device))
    speeds = {name: n / statistics.median(seconds[name]) for name, (_, n) in works.items()}
    gflop = counter.get_total_flops() / size / 1e9
    ours = speeds["training step, default"] * gflop
    return {**speeds, "GFLOP per image": gflop, "GFLOP/s, default": ours}


def epoch_speed(data: PathData, config: Config) -> dict[str, float]:
    """Return the seconds of one training epoch and of the validation that follows it."""
    from tqdm import tqdm

    model = SkipCNN().to(config.device, memory_format=torch.channels_last)
    train = make_loader(data, "train", config.batch_size, config.device, 0)
    averaged, average = make_average(model, config, config.epochs * len(train))
    start = time.perf_counter()
    with tqdm(disable=True) as bar:
        train_one_epoch(model, average, train, make_optimizers(model, config), config, 0, bar)
    middle = time.perf_counter()
    predict(averaged, make_loader(data, "val", EVAL_BATCH, config.device))
    return {
        "epoch, training": middle - start,
        "epoch, validation": time.perf_counter() - middle,
    }


# The kernel counts a process's memory from its fork on, this large one's included: so a small
# process in between starts the command and reports.
REPORTER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[2:], stdout=sys.stderr).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
open(sys.argv[1], "w").write(json.dumps([time.perf_counter() - start, peak, status]))
"""


def child(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command to its end; return (seconds, peak memory in MiB)."""
    report = folder / "child.json"
    with open(folder / "child.log", "w") as log:
        reporter = [sys.executable, "-S", "-c", REPORTER, str(report), *command]
        subprocess.run(reporter, stderr=log, cwd=folder, check=True)
    seconds, peak, status = json.loads(report.read_text())
    if status:
        raise SystemExit(f"{' '.join(command)}\n{(folder / 'child.log').read_text()[-2000:]}")
    return seconds, peak


def save_share(data: PathData, share: float, path: Path) -> None:
    """Write the first `share` of every split."""
    arrays = {}
    for split in SPLITS:
        count = round(data.counts[split] * share)
        arrays[f"{split}_images"] = data.images[split][:count]
        arrays[f"{split}_labels"] = data.labels[split][:count].astype(np.uint8)[:, None]
    np.savez_compressed(path, synthetic=np.uint8(data.kind == "synthetic"), **arrays)


def whole_runs(data: PathData, folder: Path, shares: Sequence[float]) -> dict[str, dict]:
    """Run the main job on shares of the data; return seconds, epochs and peak memory of each."""
    out = {}
    for share in shares:
        path = folder / f"share{share:g}.npz"
        save_share(data, share, path)
        command = [sys.executable, str(ROOT / "PathMNIST.py"), "--data", str(path)]
        name = f"run{share:g}"
        seconds, memory = child([*command, "--log-dir", str(folder), "--name", name], folder)
        metrics = json.loads((folder / name / "metrics.json").read_text())
        out[f"{share:g}"] = {
            "seconds": seconds,
            "peak_mib": memory,
            "train_seconds": metrics["train_seconds"],
            "images": data.counts["train"] * share,
            "epochs": metrics["epochs"],
            "test_accuracy": metrics["test"]["accuracy"],
        }
        print(f"share {share:g}: {out[f'{share:g}']}", file=sys.stderr, flush=True)
    return out


def start_up(data: PathData, folder: Path) -> float:
    """Return the seconds from the start of Python until the first batch is there."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import PathMNIST as p;"
        "d = p.load_data(sys.argv[2]); next(iter(p.make_loader(d, 'train', 128, 'cpu', 0)))"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(data.path.resolve())]
    return statistics.median(child(command, folder)[0] for _ in range(3))


def markdown(results: dict) -> str:
    """Return the results as Markdown tables with the ratios that the project promises."""
    r = results
    step, peak = r["step"]["training step, default"], r["step"]["GFLOP/s, matmul 4096"]
    loader = r["loader"]["loader, ours"]
    lines = ["| what | measured | ratio |", "|---|---:|---:|"]
    for name, value in r["loader"].items():
        lines.append(f"| {name} | {value:,.0f} images/s | {loader / value:.1f} |")
    for name, value in r["step"].items():
        if name.startswith("training step"):
            lines.append(f"| {name} | {value:,.0f} images/s | {step / value:.1f} |")
    ours = r["step"]["GFLOP/s, default"]
    lines.append(f"| arithmetic of that step | {ours:,.0f} GFLOP/s | {ours / peak:.2f} |")
    lines.append(f"| matmul of 4096 x 4096, same precision | {peak:,.0f} GFLOP/s | 1 |")
    fp32 = r["step"]["GFLOP/s, matmul 4096 in fp32"]
    lines.append(f"| the same matmul in fp32 | {fp32:,.0f} GFLOP/s | {peak / fp32:.1f} |")
    epoch, validation = r["epoch"]["epoch, training"], r["epoch"]["epoch, validation"]
    loading = r["counts"]["train"] / loader
    lines.append(f"| one epoch, training | {epoch:.1f} s | 1 |")
    lines.append(f"| one epoch, validation | {validation:.1f} s | {validation / epoch:.3f} |")
    lines.append(f"| loading in one epoch | {loading:.2f} s | {loading / epoch:.3f} |")
    lines.append(f"| start-up until the first batch | {r['start_up']:.1f} s | |")
    seconds, memory = r["analyze_data"]
    lines.append(f"| analyze_data.py | {seconds:.1f} s, {memory:,.0f} MiB | |")
    if r["runs"]:
        lines += [
            "",
            "| training images | epochs | whole run | peak memory | s per 1,000 images and epoch |",
        ]
        lines.append("|---:|---:|---:|---:|---:|")
    for run in r["runs"].values():
        per = 1000 * run["seconds"] / run["images"] / run["epochs"]
        memory = f"{run['peak_mib']:,.0f} MiB" if run["peak_mib"] else "not measured"
        lines.append(
            f"| {run['images']:,.0f} | {run['epochs']} | {run['seconds']:,.0f} s "
            f"| {memory} | {per:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="npz file (default: make a full-size synthetic one)")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="of whole runs")
    parser.add_argument("--out", type=Path, default=HERE / "speed.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = Path(args.data) if args.data else folder / "full.npz"
        if not args.data:
            script = str(ROOT / "data" / "make_synthetic.py")
            child([sys.executable, script, "--full", "--out", str(path)], folder)
        data = load_data(path)
        config = resolve(Config(), data.counts["train"])
        command = [sys.executable, str(ROOT / "analyze_data.py"), "--data", str(path.resolve())]
        results = {
            "machine": {
                "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if config.device == "cuda" else "CPU",
                "instructions": torch.backends.cpu.get_cpu_capability(),
                "precision": config.precision,
                "torch": torch.__version__,
            },
            "counts": data.counts,
            "analyze_data": child([*command, "--out", str(folder / "figures")], folder),
            "start_up": start_up(data, folder),
            "loader": loader_speed(data, config.batch_size),
            "step": step_speed(data, config),
            "epoch": epoch_speed(data, config),
            "runs": {},
        }
        for share in (None, *args.shares):  # what is measured is written at once
            if share is not None:
                results["runs"] |= whole_runs(data, folder, [share])
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
