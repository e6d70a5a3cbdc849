"""How accurate a run stays on tiles that are blurred, noisy, compressed, or otherwise changed.

    python tests/benchmarks/robustness.py --data data/pathmnist.npz
    python tests/benchmarks/robustness.py --data data/pathmnist.npz --split test --keep NAME

Nine kinds of corruption at several severities, by Pillow and torchvision, are applied to uint8
tiles, the same way each time. Prints a Markdown table: accuracy from one view by kind and severity,
the mean of the nine kinds, and the calibration error over the whole suite. Recipes are chosen on
val, the default split. With --keep, the results go under that name into robustness.json, and
robustness.png shows everything in that file. With --confusion, confusion matrices are drawn of the
tiles as they are, blurred, and noisy.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torchvision.transforms.v2 import functional
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import Evaluation  # noqa: E402
import Processor  # noqa: E402
import Runs  # noqa: E402
import Training  # noqa: E402
from analyze_data import load_data  # noqa: E402
from Common import SHORT_NAMES, markdown_table, write_json  # noqa: E402
from Figures import BLUE, GREY, ORANGE, WIDTH, house_style, save  # noqa: E402

COUNT = 2_400  # images, so that the suite takes a minute


def to_tensor(images: np.ndarray) -> Tensor:
    """Turn uint8 images (N, S, S, 3) into float (N, 3, S, S) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def to_bytes(images: Tensor) -> np.ndarray:
    """Turn float images (N, 3, S, S) into uint8 (N, S, S, 3); what leaves [0, 1] is clipped."""
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def blur(images: np.ndarray, sigma: float) -> np.ndarray:
    """Blur by a Gaussian with a standard deviation of `sigma` pixels: out of focus."""
    return to_bytes(functional.gaussian_blur(to_tensor(images), [9, 9], [sigma, sigma]))


def noise(images: np.ndarray, std: float) -> np.ndarray:
    """Add Gaussian noise to every value, with a standard deviation of `std` of the range."""
    x = to_tensor(images)
    generator = torch.Generator().manual_seed(0)
    return to_bytes(x + std * torch.randn(x.shape, generator=generator))


def jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """Save each tile as JPEG and read it again, with Pillow's other options as they are: colours at
    half the resolution."""
    out = np.empty_like(images)
    for index, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        out[index] = np.asarray(Image.open(file))
    return out


def resample(images: np.ndarray, size: int) -> np.ndarray:
    """Shrink each tile to `size` pixels a side and enlarge it again, both bilinear."""
    out = np.empty_like(images)
    for index, image in enumerate(images):
        small = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
        out[index] = small.resize(image.shape[:2], Image.Resampling.BILINEAR)
    return out


def motion(images: np.ndarray, path: list) -> np.ndarray:
    """Average over the pixels that are 1 in `path`, an odd number of rows and columns: the slide
    moved while it was scanned."""
    kernel = torch.tensor(path, dtype=torch.float32)
    kernel = (kernel / kernel.sum()).expand(3, 1, *kernel.shape)
    down, right = kernel.shape[2] // 2, kernel.shape[3] // 2
    padded = F.pad(to_tensor(images), (right, right, down, down), mode="reflect")
    return to_bytes(F.conv2d(padded, kernel, groups=3))


def adjust(images: np.ndarray, change: Callable, factor: float) -> np.ndarray:
    """Apply one of torchvision's functions that adjust an image by a factor; 1 changes nothing."""
    return to_bytes(change(to_tensor(images), factor))


def suite() -> Iterator[tuple[str, str, Callable[[np.ndarray], np.ndarray]]]:
    """Yield kind, severity and function of each corruption."""
    for sigma in (0.4, 0.5, 0.6, 0.8, 1.0):
        yield "blur", f"{sigma} px", partial(blur, sigma=sigma)
    for std in (0.01, 0.02, 0.04, 0.06):
        yield "noise", f"{std}", partial(noise, std=std)
    for quality in (90, 75, 50, 30):
        yield "JPEG", f"quality {quality}", partial(jpeg, quality=quality)
    for size in (24, 20, 16):
        yield "resampled", f"{size} px", partial(resample, size=size)
    diagonal = np.eye(3).tolist()
    for path in ([[1] * 3], [[1]] * 3, diagonal, [[1] * 5]):
        name = "diagonal" if path == diagonal else f"{len(path[0])} x {len(path)} px"
        yield "motion", name, partial(motion, path=path)
    for kind, change, factors in (
        ("sharpened", functional.adjust_sharpness, (1.5, 2, 2.5)),
        ("brightness", functional.adjust_brightness, (0.7, 0.8, 1.1, 1.2)),
        ("contrast", functional.adjust_contrast, (0.5, 0.7, 1.3, 1.6)),
        ("saturation", functional.adjust_saturation, (0.5, 0.75, 1.3, 1.6)),
    ):
        for factor in factors:
            yield kind, f"{factor}", partial(adjust, change=change, factor=factor)


def probabilities(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Return the model's probabilities (N, 9) from one view."""
    parts = torch.from_numpy(images).split(Training.eval_batch(images.shape[1]))
    return Training.predict(model, [(part, torch.zeros(len(part))) for part in parts])[0]


def chosen(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return COUNT of the images and their labels, drawn at random, the same each time."""
    order = np.random.default_rng(0).permutation(len(images))[:COUNT]
    return images[order], labels[order]


def measure(predict: Callable, images: np.ndarray, labels: np.ndarray) -> dict:
    """Corrupt COUNT of the images, drawn at random. `predict` turns uint8 images (N, S, S, 3) into
    probabilities (N, 9). Returns "clean" accuracy, "kinds" (accuracy by kind and severity), "mean"
    (of the kinds) and "ece" (over all corrupted images)."""
    images, labels = chosen(images, labels)
    clean = predict(images)
    kinds: dict = {}
    everything = []
    for kind, severity, corrupt in tqdm(list(suite()), desc="corruptions", disable=None):
        probs = predict(corrupt(images))
        everything.append(probs)
        accuracy = float((probs.argmax(1) == labels).mean())
        kinds.setdefault(kind, {})[severity] = accuracy
    together = np.concatenate(everything)
    return {
        "clean": float((clean.argmax(1) == labels).mean()),
        "kinds": kinds,
        "mean": float(np.mean([np.mean(list(each.values())) for each in kinds.values()])),
        "ece": Evaluation.expected_calibration_error(together, np.tile(labels, len(everything))),
    }


@house_style
def confusion_figure(predict: Callable, images: np.ndarray, labels: np.ndarray) -> Figure:
    """Draw confusion matrices side by side: of COUNT tiles as they are, blurred, and noisy."""
    images, labels = chosen(images, labels)
    panels = {
        "as they are": images,
        "blurred by 0.8 px": blur(images, 0.8),
        "noise of 0.02": noise(images, 0.02),
    }
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    row = figure.subplots(1, 3, sharey=True)
    for axes, (title, tiles) in zip(row, panels.items(), strict=True):
        predicted = predict(tiles).argmax(1)
        share = confusion_matrix(labels, predicted, labels=range(9), normalize="true")
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(9), SHORT_NAMES, rotation=90, fontsize=9)
        axes.set_yticks(range(9), SHORT_NAMES, fontsize=9)
        axes.set_title(f"{title}: {(predicted == labels).mean():.3f}", fontsize=11)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.set_xlabel("predicted class")
    row[0].set_ylabel("true class")
    return figure


@house_style
def severity_figure(results: dict) -> Figure:
    """Draw accuracy against severity, one panel for each kind, one line for each of the results."""
    figure = Figure(figsize=(WIDTH, 7.5), layout="constrained")
    panels = figure.subplots(3, 3, sharey=True).ravel()
    for (name, found), colour in zip(results.items(), (ORANGE, BLUE, GREY), strict=False):
        for axes, (kind, each) in zip(panels, found["kinds"].items(), strict=True):
            label = f"{name}: mean {found['mean']:.3f}" if kind == "blur" else None
            axes.plot(list(each), list(each.values()), color=colour, marker="o", label=label)
            axes.axhline(found["clean"], color=colour, linestyle=":")
            axes.set_title(kind)
            axes.set_xticks(list(each), list(each), rotation=35, ha="right", fontsize=8)
    panels[0].set(ylim=(0, 1))
    figure.supylabel("accuracy (dotted: of the tiles as they are)", fontsize=11)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def table(found: dict) -> str:
    """Return the results as a Markdown table."""
    rows = [["corruption", "severity: accuracy", "mean"]]
    for kind, each in found["kinds"].items():
        severities = ", ".join(f"{name}: {value:.3f}" for name, value in each.items())
        rows.append([kind, severities, f"{np.mean(list(each.values())):.3f}"])
    rows.append(["mean of the kinds", f"ECE {found['ece']:.3f}", f"{found['mean']:.3f}"])
    rows.append(["none", "", f"{found['clean']:.3f}"])
    return markdown_table(rows)


def main() -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="npz file")
    parser.add_argument(
        "--run", type=Path, default=ROOT / "runs" / "best", help="default: runs/best"
    )
    parser.add_argument("--split", choices=("val", "test"), default="val", help="default: val")
    parser.add_argument("--keep", metavar="NAME", help="name of the results in robustness.json")
    parser.add_argument("--confusion", type=Path, metavar="FILE", help="draw it into this file")
    args = parser.parse_args()
    Processor.prepare()
    data = load_data(args.data)
    split = data.images[args.split], data.labels[args.split]
    model, _ = Runs.load_model(args.run, "cpu")
    predict = partial(probabilities, model)
    if args.confusion:
        save(confusion_figure(predict, *split), args.confusion)
    found = measure(predict, *split)
    print(table(found))
    if args.keep:
        path = HERE / "robustness.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        results[args.keep] = {"split": args.split, **found}
        write_json(path, results)
        save(severity_figure(results), HERE / "robustness.png")


if __name__ == "__main__":
    main()
