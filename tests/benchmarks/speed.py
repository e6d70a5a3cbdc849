"""How fast loading, training, evaluation and data analysis are, as ratios within one run.

    python tests/benchmarks/speed.py --data data/pathmnist.npz
    python tests/benchmarks/speed.py --data data/pathmnist.npz --shares    # without the whole runs

Prints a Markdown table and writes speed.json next to this file. Loader, steps (in turn) and
start-up are medians of several repetitions; epochs and whole runs, which take minutes, are run
once. The machine should have nothing else to do.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import Processor  # noqa: E402
import Training  # noqa: E402
from analyze_data import SPLITS, PathData, load_data  # noqa: E402
from MyModels import ResNet18, SkipCNN  # noqa: E402
from PathMNIST import make_loader  # noqa: E402
from Runs import Config  # noqa: E402


class MedMNISTWay(Dataset):
    """One image at a time through Pillow, as medmnist's PathMNIST class does."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
        self.transform = transforms.Compose([transforms.ToTensor(), normalize])

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


def loader_speed(data: PathData, batch_size: int) -> dict[str, float]:
    """Return images per second of loading alone."""
    images, labels = data.images["train"][:20_000], data.labels["train"][:20_000]
    some = replace(data, images={"train": images}, labels={"train": labels})
    ours = make_loader(some, "train", batch_size, shuffle=True)
    out = {"loader, ours": len(images) / median_seconds(lambda: deque(ours, 0), 5)}
    for workers in (0, 2):
        theirs = DataLoader(MedMNISTWay(images, labels), 128, shuffle=True, num_workers=workers)
        seconds = median_seconds(lambda theirs=theirs: deque(theirs, 0), 3)
        out[f"loader, MedMNIST's way, {workers} workers"] = len(images) / seconds
    return out


def first_batch(data: PathData, batch_size: int, device: str) -> tuple[Tensor, Tensor]:
    """Return the first images and labels of train, on the device."""
    arrays = data.images["train"][:batch_size], data.labels["train"][:batch_size]
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


def our_step(data: PathData, config: Config) -> Callable[[], None]:
    """Return one step of the default: augmentation, both passes, optimisers."""
    state = Training.TrainingState(SkipCNN(), config, HERE)
    images, labels = first_batch(data, config.batch_size, config.device)
    generator = torch.Generator(config.device).manual_seed(0)

    def step() -> None:
        Training.train_step(state, images, labels, generator)

    return step


def plain_step(model: nn.Module, data: PathData, size: int, device: str) -> Callable[[], None]:
    """Return one float32 NCHW step with Adam and no augmentation, as MedMNIST trains."""
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels = first_batch(data, size, device)
    images = (images.permute(0, 3, 1, 2).float() / 255).contiguous()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def step_speed(data: PathData, config: Config, rounds: int = 7) -> dict[str, float]:
    """Return images per second of training steps, and the default's share of the matmul peak.

    They are measured in turn, round after round: a shared machine's slow minutes meet all alike.
    """
    device, size = config.device, config.batch_size
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    step = our_step(data, config)
    with FlopCounterMode(display=False) as counter:
        step()
    fp32 = our_step(data, replace(config, precision="fp32"))
    left, right = torch.randn(2, 4096, 4096, device=device)  # in practice the machine's peak
    low, gflop = (left.to(dtype), right.to(dtype)), 2 * 4.096**3
    works = {  # what is done, and how many images or GFLOP that is
        "training step, default": (step, size),
        "training step, default in plain fp32": (fp32, size),
        "training step, same model in fp32 NCHW": (plain_step(SkipCNN(), data, size, device), size),
        "training step, ResNet-18 as MedMNIST": (plain_step(ResNet18(), data, 128, device), 128),
        "GFLOP/s, matmul 4096": (lambda: low[0] @ low[1], gflop),
        "GFLOP/s, matmul 4096 in fp32": (lambda: left @ right, gflop),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, (work, _) in works.items():
            seconds[name].append(median_seconds(work, 5, device))
    speeds = {name: n / statistics.median(seconds[name]) for name, (_, n) in works.items()}
    speeds["GFLOP per image"] = counter.get_total_flops() / size / 1e9
    ours = speeds["training step, default"] * speeds["GFLOP per image"]
    return {**speeds, "GFLOP/s, default": ours}


def epoch_speed(data: PathData, config: Config, folder: Path) -> dict[str, float]:
    """Return the seconds of one training epoch and of the validation that follows it."""
    train = make_loader(data, "train", config.batch_size, config.device, shuffle=True)
    val = make_loader(data, "val", Training.eval_batch(data.size), config.device)
    state = Training.TrainingState(SkipCNN(), config, folder)
    start = time.perf_counter()
    with Processor.Threads() as threads:
        Training.train_one_epoch(state, train, 0, tqdm(disable=True), threads)
    middle = time.perf_counter()
    Training.predict(state.model, val)
    return {"epoch, training": middle - start, "epoch, validation": time.perf_counter() - middle}


# The kernel counts a process's memory from its fork on, this large one's included: so a small
# process in between starts the command and reports.
REPORTER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=sys.stderr, check=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([time.perf_counter() - start, peak]))
"""


def child(script: str, *args: object) -> tuple[float, float]:
    """Run a script of the project to its end; return (seconds, peak memory in MiB)."""
    command = [sys.executable, "-S", "-c", REPORTER, sys.executable, ROOT / script, *args]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr[-2000:]}")
    return tuple(json.loads(done.stdout))


def whole_run(data: PathData, folder: Path, share: float) -> dict[str, float]:
    """Run the main job on the first `share` of every split."""
    arrays, path, name = {}, folder / f"share{share:g}.npz", f"run{share:g}"
    for split in SPLITS:
        count = round(data.counts[split] * share)
        arrays[f"{split}_images"] = data.images[split][:count]
        arrays[f"{split}_labels"] = data.labels[split][:count].astype(np.uint8)[:, None]
    np.savez_compressed(path, synthetic=np.uint8(data.kind == "synthetic"), **arrays)
    took, peak = child("PathMNIST.py", "--data", path, "--log-dir", folder, "--name", name)
    metrics = json.loads((folder / name / "metrics.json").read_text())
    out = {"seconds": took, "peak_mib": peak, "images": data.counts["train"] * share}
    out |= {key: metrics[key] for key in ("train_seconds", "epochs")}
    out["test_accuracy"] = metrics["test"]["accuracy"]
    print(f"share {share:g}: {out}", file=sys.stderr, flush=True)
    return out


def start_up(data: PathData, folder: Path) -> float:
    """Return the seconds from the start of Python until the first batch is there."""
    script = folder / "first_batch.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import PathMNIST as p\n"
        f"data = p.load_data({str(data.path)!r})\n"
        "next(iter(p.make_loader(data, 'train', 128, shuffle=True)))\n"
    )
    return statistics.median(child(str(script))[0] for _ in range(3))


def markdown(results: dict) -> str:
    """Return the results as Markdown tables with the ratios that the project promises."""
    steps, (training, validation) = results["step"], results["epoch"].values()
    ours, loader = steps["GFLOP/s, default"], results["loader"]["loader, ours"]
    peak, fp32 = (steps[f"GFLOP/s, matmul 4096{which}"] for which in ("", " in fp32"))
    loading = results["counts"]["train"] / loader
    seconds, memory = results["analyze_data"]
    rows = [
        (name, f"{value:,.0f} images/s", f"{first / value:.1f}")
        for first, part in ((loader, "loader"), (steps["training step, default"], "step"))
        for name, value in results[part].items()
        if name.startswith(("loader", "training step"))
    ]
    rows += [
        ("arithmetic of that step", f"{ours:,.0f} GFLOP/s", f"{ours / peak:.2f}"),
        ("matmul of 4096 x 4096, same precision", f"{peak:,.0f} GFLOP/s", "1"),
        ("the same matmul in fp32", f"{fp32:,.0f} GFLOP/s", f"{peak / fp32:.1f}"),
        ("one epoch, training", f"{training:.1f} s", "1"),
        ("one epoch, validation", f"{validation:.1f} s", f"{validation / training:.3f}"),
        ("loading in one epoch", f"{loading:.2f} s", f"{loading / training:.3f}"),
        ("start-up until the first batch", f"{results['start_up']:.1f} s", ""),
        ("analyze_data.py", f"{seconds:.1f} s, {memory:,.0f} MiB", ""),
    ]
    lines = ["| what | measured | ratio |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if results["runs"]:
        columns = "training images | epochs | whole run | peak memory"
        lines += ["", f"| {columns} | s per 1,000 images and epoch |", "|---:|---:|---:|---:|---:|"]
    for run in results["runs"].values():
        per = 1000 * run["seconds"] / run["images"] / run["epochs"]
        start = f"| {run['images']:,.0f} | {run['epochs']} | {run['seconds']:,.0f} s"
        lines.append(f"{start} | {run['peak_mib']:,.0f} MiB | {per:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="npz file")
    parser.add_argument(
        "--shares", type=float, nargs="*", default=(0.1, 0.3, 1.0), help="of whole runs"
    )
    parser.add_argument("--out", type=Path, default=HERE / "speed.json")
    args = parser.parse_args()
    Processor.prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = load_data(Path(args.data).resolve())
        config = Training.resolve(Config(), data.counts["train"])
        machine = {
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if config.device == "cuda" else "CPU",
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
        results = {
            "machine": {**machine, "precision": config.precision, "torch": torch.__version__},
            "counts": data.counts,
            "analyze_data": child("analyze_data.py", "--data", data.path, "--out", folder),
            "start_up": start_up(data, folder),
            "loader": loader_speed(data, config.batch_size),
            "step": step_speed(data, config),
            "epoch": epoch_speed(data, config, folder),
            "runs": {},
        }
        for share in (None, *args.shares):  # what is measured is written at once
            if share is not None:
                results["runs"][f"{share:g}"] = whole_run(data, folder, share)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
