"""How fast the default trains: its steps beside others, and one whole epoch with its memory.

    python tests/benchmarks/speed.py --data data/pathmnist.npz

Prints a Markdown table and writes speed.json next to this file. Machines differ and are shared, so
compare the ratios: everything is measured in turn, round after round, and slow minutes meet all
alike. The machine should have nothing else to do.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from accuracy import processor  # noqa: E402

import Processor  # noqa: E402
import Training  # noqa: E402
from analyze_data import PathData, load_data  # noqa: E402
from Common import markdown_table, write_json  # noqa: E402
from MyModels import ResNet18, SkipCNN  # noqa: E402
from Runs import Config  # noqa: E402

ROUNDS, REPETITIONS = 7, 5  # of every measurement, in turn and each time


def our_step(data: PathData, config: Config) -> Callable[[], object]:
    """Return one step of the default: augmentation, both passes, optimisers."""
    state = Training.TrainingState(SkipCNN(), config, HERE)
    images = torch.from_numpy(data.images["train"][: config.batch_size]).to(config.device)
    labels = torch.from_numpy(data.labels["train"][: config.batch_size]).to(config.device)
    generator = torch.Generator(config.device).manual_seed(0)
    return lambda: Training.train_step(state, images, labels, generator)


def plain_step(model: nn.Module, data: PathData, config: Config) -> Callable[[], None]:
    """Return one float32 step with Adam and no augmentation, as MedMNIST's authors train."""
    model.to(config.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    labels = torch.from_numpy(data.labels["train"][: config.batch_size]).to(config.device)
    images = torch.from_numpy(data.images["train"][: config.batch_size]).to(config.device)
    images = (images.permute(0, 3, 1, 2).float() / 255).contiguous()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Return the median time of `work()`, after one call that is not counted."""
    times = []
    for _ in range(1 + REPETITIONS):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure_steps(data: PathData, config: Config) -> dict[str, float]:
    """Return images/s of training steps, and GFLOP/s of the default and of a large matrix product,
    which is in practice the most that the machine can do."""
    size = config.batch_size
    default = our_step(data, config)
    with FlopCounterMode(display=False) as counter:
        default()
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    left, right = torch.randn(2, 4096, 4096, device=config.device, dtype=dtype)
    works = {
        "default": default,
        "default in fp32": our_step(data, replace(config, precision="fp32")),
        "ResNet-18, MedMNIST's recipe": plain_step(ResNet18(), data, config),
        "matmul": lambda: left @ right,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            times[name].append(seconds_of(work, config.device))
    found = {name: size / statistics.median(each) for name, each in times.items()}
    found["matmul, GFLOP/s"] = 2 * 4.096**3 * found.pop("matmul") / size
    found["default, GFLOP/s"] = counter.get_total_flops() / size / 1e9 * found["default"]
    return found


# A new process inherits the memory count of the one that starts it. So a small process in between
# starts the command and reports.
REPORTER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=sys.stderr, check=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak}))
"""


def measure_run(data: PathData, epochs: int) -> dict[str, float]:
    """Run the main job with a few epochs: its seconds, peak memory, and images/s in training."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-S", "-c", REPORTER, sys.executable, str(ROOT / "PathMNIST.py")]
        command += ["--data", str(data.path), "--epochs", str(epochs)]
        command += ["--log-dir", folder, "--name", "run"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    found = {key: metrics[key] for key in ("epochs", "train_seconds", "images_per_second")}
    return json.loads(printed) | found


def markdown(found: dict) -> str:
    """Return the results as a Markdown table; ratios are to the default's step."""
    steps, run = found["steps"], found["run"]
    rows = [["what", "measured", "ratio"]]
    for name in ("default", "default in fp32", "ResNet-18, MedMNIST's recipe"):
        ratio = steps[name] / steps["default"]
        rows.append([f"training steps, {name}", f"{steps[name]:,.0f} images/s", f"{ratio:.3f}"])
    for name in ("default, GFLOP/s", "matmul, GFLOP/s"):
        ratio = steps[name] / steps["default, GFLOP/s"]
        rows.append([name, f"{steps[name]:,.0f}", f"{ratio:.2f}"])
    rate, ratio = run["images_per_second"], run["images_per_second"] / steps["default"]
    rows.append(["PathMNIST.py, its training", f"{rate:,.0f} images/s", f"{ratio:.3f}"])
    rows.append(["PathMNIST.py, all of it", f"{run['seconds']:,.0f} s", ""])
    rows.append(["PathMNIST.py, peak memory", f"{run['peak_mib']:,.0f} MiB", ""])
    return markdown_table(rows)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="npz file")
    parser.add_argument("--epochs", type=int, default=1, help="of the whole run, default: 1")
    args = parser.parse_args()
    Processor.prepare()
    data = load_data(args.data.resolve())
    config = Training.resolve(Config(), data.counts["train"])
    found: dict = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    found |= {"device": config.device, "precision": config.precision}
    found["processor"] = processor()
    found["steps"] = measure_steps(data, config)
    found["run"] = measure_run(data, args.epochs)
    write_json(HERE / "speed.json", found)
    print(markdown(found))


if __name__ == "__main__":
    main()
