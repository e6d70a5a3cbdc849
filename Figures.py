"""Every figure, in one style. Each function returns a matplotlib Figure; the caller saves it.

    confusion_figure(metrics["confusion_matrix"], note="test").savefig("confusion.png")

Everywhere, `probs` is float (N, 9) with rows that sum to 1, `labels` is int (N,) in 0..8, and N is
1 or more. A figure shows its `note` under the title: which split, and whether it is synthetic.
"""

import functools
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from Common import CLASS_NAMES, CLASSES, SHORT_NAMES

if TYPE_CHECKING:  # matplotlib is imported where figures are made: a start need not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

# Okabe and Ito's colours, which the colour-blind can tell apart (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
WIDTH = 7.0  # inches; with text of 12 points, legible where a phone shows it 2.5 inches wide
STYLE = ["default", str(Path(__file__).with_name("house.mplstyle"))]
# No-break spaces hold a code and its name on one line.
CODES = ", ".join(
    f"{short} {name}".replace(" ", "\u00a0")
    for short, name in zip(SHORT_NAMES, CLASS_NAMES, strict=True)
)


def house_style(draw: "Callable[..., Figure]") -> "Callable[..., Figure]":
    """Make a function draw its figure in the house style, whatever the user's (a decorator)."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> "Figure":
        from matplotlib import style

        with style.context(STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made, and styled, at the first drawing
        return figure

    return styled


def save(figure: "Figure", file: "Path | io.BytesIO", dpi: int = 150) -> None:
    """Write a figure as PNG: background, size and late ticks obey the settings of that moment."""
    from matplotlib import style

    with style.context(STYLE):
        figure.savefig(file, dpi=dpi)


def _figure(height: float, title: str, note: str, caption: str) -> "Figure":
    """Return an empty figure with its title, the note below it and a caption at the foot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    heading = [line for text in (title, note) for line in textwrap.wrap(text, 50)]
    figure.suptitle("\n".join(heading), x=0.02, ha="left")
    lines = [line for text in caption.splitlines() for line in textwrap.wrap(text, 86)]
    figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=10, color=GREY)
    return figure


def _legend_above(axes: "Axes", side: str, columns: int) -> None:
    """Put the legend over the axes at the left or right, where it hides no data."""
    x = 0 if side == "left" else 1
    axes.legend(loc=f"lower {side}", bbox_to_anchor=(x, 1), ncols=columns, columnspacing=1)


def _tiles(
    columns: int, tiles: np.ndarray, titles: Sequence[tuple[str, str]], text: tuple[str, str, str]
) -> "Figure":
    """Draw images (N, h, w, 3) in a grid with sharp pixels. `titles` has a title and a colour for
    each or is empty, `text` is title, note and caption."""
    rows = max(1, -(-len(tiles) // columns))
    row_height = WIDTH / columns * tiles.shape[1] / tiles.shape[2] + (0.45 if titles else 0)
    figure = _figure((1.9 if titles else 1.4) + row_height * rows, *text)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, axes in enumerate(grid):
        axes.set(xticks=[], yticks=[], visible=index < len(tiles))
        if index < len(tiles):
            title, colour = titles[index] if titles else ("", "white")
            axes.imshow(tiles[index], interpolation="nearest")
            axes.spines[:].set(visible=True, color=colour, linewidth=3)
            axes.set_title(title, fontsize=11, color=colour)
    return figure


def _verdict(probs: np.ndarray, label: int | None) -> tuple[str, str]:
    """Return a tile's title and its colour (blue: right) from probs (9,) and the true class."""
    guess = int(probs.argmax())
    said = f"pred. {SHORT_NAMES[guess]} {probs[guess]:.0%}"
    if label is None:
        return said, "black"
    return f"true {SHORT_NAMES[label]}\n{said}", BLUE if guess == label else VERMILION


def _pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Join two stacks of images (N, S, S, 3), uint8 and float, side by side as floats in [0, 1]."""
    gap = np.ones((len(left), left.shape[1], max(1, left.shape[1] // 28), 3))
    return np.concatenate([left / 255, gap, right], axis=2).clip(0, 1)


def _explained(images: np.ndarray, heatmaps: np.ndarray) -> np.ndarray:
    """Join images, uint8 (N, S, S, 3), with their heatmaps (N, S, S) laid over them in grey."""
    from matplotlib import colormaps

    grey = images.mean(axis=3, keepdims=True) / 255
    return _pairs(images, 0.5 * grey + 0.5 * colormaps["viridis"](heatmaps)[..., :3])


def data_note(kind: str) -> str:
    """Return what every figure has to say about its data, from its kind."""
    return "SYNTHETIC DATA, not real tissue" if kind == "synthetic" else ""


def add_to_log(writer: "SummaryWriter", tag: str, figure: "Figure", step: int) -> None:
    """Log a figure to TensorBoard; its own `add_figure` needs the user's matplotlib backend."""
    from PIL import Image

    buffer = io.BytesIO()
    save(figure, buffer)
    writer.add_image(tag, np.asarray(Image.open(buffer)), step, dataformats="HWC")


@house_style
def learning_curves(history: Sequence[Mapping], best_epoch: int, kind: str = "") -> "Figure":
    """Draw loss and accuracy of train and val, and the learning rate, over the epochs. `history` is
    what `fit` returned; `best_epoch` is the one whose weights were kept, `kind` the data's."""
    caption = (
        f"Dotted: epoch {best_epoch}, whose weights were kept. Train is measured on augmented "
        "images while the weights change."
    )
    figure = _figure(6, "Learning curves", data_note(kind), caption)
    panels = figure.subplot_mosaic([["loss", "accuracy"], ["lr", "lr"]], height_ratios=[3, 1])
    epochs = [row["epoch"] for row in history]
    style = {"linewidth": 2, "marker": "o" if len(history) < 15 else ""}
    for key in ("loss", "accuracy"):
        for split, colour in (("train", BLUE), ("val", ORANGE)):
            values = [row[f"{split}_{key}"] for row in history]
            panels[key].plot(epochs, values, color=colour, label=split, **style)
        panels[key].set(title=key, xlabel="epoch")
        _legend_above(panels[key], "right", 2)
    panels["lr"].plot(epochs, [row["lr"] for row in history], color=GREY, clip_on=False, **style)
    panels["lr"].set(title="learning rate", xlabel="epoch", ylim=(0, None))
    for axes in panels.values():
        axes.axvline(best_epoch, color="black", linestyle=":")
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    return figure


@house_style
def confusion_figure(matrix: Sequence[Sequence[int]] | np.ndarray, note: str = "") -> "Figure":
    """Draw a confusion matrix (9, 9), rows true: counts and percent of the row in each cell."""
    counts = np.asarray(matrix)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    caption = "In each cell: images, and their percentage of the true class (colour)."
    figure = _figure(7.6, "Confusion matrix", note, f"{caption}\n{CODES}")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        text = f"{count}\n{share[row, column]:.0%}" if share[row, column] >= 0.005 else f"{count}"
        colour = "white" if share[row, column] > 0.6 else "black" if count else "grey"
        axes.text(column, row, text, ha="center", va="center", fontsize=10.5, color=colour)
    axes.set_xticks(CLASSES, SHORT_NAMES)
    axes.set_yticks(CLASSES, SHORT_NAMES)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    axes.grid(False)
    return figure


@house_style
def per_class_figure(metrics: Mapping[str, Any], note: str = "") -> "Figure":
    """Draw precision and recall of each class as bars, from what `compute_metrics` returned."""
    rows = [metrics["per_class"][name] for name in CLASS_NAMES]
    figure = _figure(8, "Precision and recall by class", note, f"n: images of the class.\n{CODES}")
    axes = figure.subplots()
    for key, colour, offset in (("precision", BLUE, -0.2), ("recall", ORANGE, 0.2)):
        values = [row[key] for row in rows]
        bars = axes.barh(np.add(CLASSES, offset), values, 0.38, color=colour, label=key)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=10.5)
    names = [f"{s}  n={row['support']}" for s, row in zip(SHORT_NAMES, rows, strict=True)]
    axes.set_yticks(CLASSES, names)
    axes.set(xlim=(0, 1.1), xticks=np.arange(0, 1.1, 0.2), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    _legend_above(axes, "left", 2)
    return figure


@house_style
def examples_figure(
    images: np.ndarray, labels: np.ndarray, probs: np.ndarray, correct: bool, note: str = ""
) -> "Figure":
    """Draw at most twelve correctly (or incorrectly) classified images, uint8 (N, S, S, 3). One of
    each class, or of each confusion (the commonest first), as far as there is room; then others.
    They are sorted by true class."""
    candidates = np.flatnonzero((probs.argmax(axis=1) == labels) == correct)
    drawn = np.random.default_rng(0).permutation(candidates)
    pairs = np.stack([labels[drawn], probs[drawn].argmax(axis=1)])
    _, firsts, sizes = np.unique(pairs, axis=1, return_index=True, return_counts=True)
    firsts = firsts[np.argsort(-sizes, kind="stable")]
    chosen = np.concatenate([drawn[firsts], np.delete(drawn, firsts)])[:12]
    chosen = chosen[np.argsort(labels[chosen], kind="stable")]
    kind = "Correctly" if correct else "Incorrectly"
    each = "class" if correct else "confusion (or of the commonest)"
    caption = (
        f"{kind} classified: {len(candidates):,} of {len(labels):,} images. "
        f"Shown, by true class: {len(chosen)} drawn at random (seed 0), one of each {each}, "
        f"then others. Percentage: probability of the predicted class.\n{CODES}"
    )
    titles = [_verdict(probs[index], labels[index]) for index in chosen]
    figure = _tiles(4, images[chosen], titles, (f"{kind} classified images", note, caption))
    if len(chosen) == 0:
        figure.text(0.5, 0.55, f"No image was {kind.lower()} classified.", ha="center")
    return figure


@house_style
def reliability_figure(
    counts: np.ndarray, accuracy: np.ndarray, confidence: np.ndarray, ece: float, note: str = ""
) -> "Figure":
    """Draw accuracy against confidence in bins, and the images per bin (Guo et al. 2017, fig. 1).
    The first three are what `Evaluation.reliability_bins` returned."""
    bins = len(counts)
    caption = (
        f"Images in {bins} bins by confidence, the probability of the predicted class. ECE: the "
        "distance between accuracy and mean confidence, averaged over the images."
    )
    figure = _figure(7.2, f"Reliability: ECE {ece:.3f}", note, caption)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    left, width = np.arange(bins) / bins, 1 / bins
    style = {"width": width, "align": "edge", "edgecolor": "white"}
    upper.bar(left, accuracy, color=BLUE, label="accuracy", **style)
    used = left[counts > 0]
    means = {"color": ORANGE, "linewidth": 3, "label": "mean confidence"}
    upper.hlines(confidence[counts > 0], used, used + width, **means)
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect")
    upper.set(ylabel="accuracy", ylim=(0, 1))
    _legend_above(upper, "left", 3)
    bars = lower.bar(left, counts, color=GREY, **style)
    lower.bar_label(bars, labels=[str(c) if c else "" for c in counts], fontsize=9)
    lower.set(xlabel="confidence", ylabel="images", xlim=(0, 1), ylim=(0, 1.2 * counts.max()))
    return figure


@house_style
def augmentation_figure(plain: np.ndarray, augmented: np.ndarray, note: str = "") -> "Figure":
    """Draw images, uint8 (N, S, S, 3), beside their augmented versions, floats in about [0, 1]."""
    caption = (
        "Each pair: left as in the file, right as training may see it. A patch of another tile is "
        "CutMix's: one serves a whole batch, and not every batch gets one."
    )
    return _tiles(3, _pairs(plain, augmented), [], ("Augmentation", note, caption))


@house_style
def gradcam_figure(
    images: np.ndarray,
    heatmaps: np.ndarray,
    labels: Sequence[int | None],
    probs: np.ndarray,
    note: str = "",
) -> "Figure":
    """Draw each image beside its Grad-CAM heatmap laid over the image in grey. `images` uint8 (N,
    S, S, 3), `heatmaps` (N, S, S) in [0, 1] from `Evaluation.grad_cam`; a label is None where
    nobody knows it."""
    caption = (
        "Yellow: what spoke most for the predicted class, violet: what did not. Percentage: "
        "its probability."
    )
    if labels[0] is not None:
        caption += " Blue frame: classified correctly, orange: incorrectly."
    titles = [_verdict(row, label) for row, label in zip(probs, labels, strict=True)]
    text = ("Grad-CAM", note, f"{caption}\n{CODES}")
    return _tiles(min(3, len(images)), _explained(images, heatmaps), titles, text)


@house_style
def predictions_figure(
    tiles: np.ndarray, probs: np.ndarray, heatmaps: np.ndarray | None, note: str = ""
) -> "Figure":
    """Draw at most fifty new tiles, uint8 (N, S, S, 3), with class and probability. The least
    certain come first. `heatmaps` (N, S, S) in [0, 1] are drawn beside them."""
    order = np.argsort(probs.max(axis=1), kind="stable")[:50]
    shown = tiles[order] / 255 if heatmaps is None else _explained(tiles[order], heatmaps[order])
    said = (_verdict(probs[i], None)[0].removeprefix("pred. ") for i in order)
    titles = [(f"{i:04d}\n{each}", GREY) for i, each in zip(order, said, strict=True)]
    caption = (
        f"{len(order)} of {len(tiles)} tiles, the least certain first: row of predictions.csv, "
        "counted from 0; class, probability."
    )
    if heatmaps is not None:
        caption += (
            " Right: Grad-CAM; yellow is what spoke most for that class, violet what did not."
        )
    text = ("Predictions", note, f"{caption}\n{CODES}")
    return _tiles(4 if heatmaps is not None else 6, shown, titles, text)


@house_style
def architecture_figure(table: Sequence[tuple[str, str, str, str, int]], name: str) -> "Figure":
    """Draw the model's named stages as boxes, with what each holds and its output shape. `table` is
    what `MyModels.layer_table` returned. A part called "skip" is drawn as an arrow around the
    layers that it skips."""
    stages: dict[str, list] = {}
    for row in table:
        stages.setdefault(row[0].removeprefix("net.").split(".")[0], []).append(row)
    total = sum(row[4] for row in table)
    caption = "Top to bottom. At the right: output shape (channels x height x width), parameters."
    if any(".skip" in row[0] for row in table):
        caption += " Orange: skip connection, added before the stage's last ReLU."
    figure = _figure(1.7 + 0.75 * len(stages), f"{name}: {total:,} parameters", "", caption)
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(-len(stages), 1))
    axes.axis("off")
    box = {"facecolor": "white", "edgecolor": BLUE, "linewidth": 1.5, "zorder": 3}
    arrow = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.5}
    axes.text(4, 0.8, "image", ha="center", va="bottom", fontsize=10)
    axes.text(4, -len(stages) + 0.2, "logits", ha="center", va="top", fontsize=10)
    for y, (stage, rows) in zip(range(0, -len(stages), -1), stages.items(), strict=True):
        main, skip = (_layer_names([r for r in rows if (".skip" in r[0]) == s]) for s in (0, 1))
        axes.bar(4, 0.56, 4.8, y - 0.28, **box)
        axes.text(4, y, textwrap.fill(main, 38), ha="center", va="center", fontsize=9, zorder=4)
        axes.text(1.4, y, stage, ha="right", va="center", weight="bold", fontsize=11)
        shape, count = rows[-1][3], sum(row[4] for row in rows)
        axes.text(8.4, y, f"{shape}\n{count:,}", va="center", fontsize=10)
        for top in (y, y - 1):
            axes.annotate("", (4, top + 0.28), (4, top + 0.72), arrowprops=arrow | {"color": GREY})
        if skip:
            axes.plot([4, 6.9, 6.9], [y + 0.5, y + 0.5, y - 0.12], color=ORANGE, linewidth=1.5)
            end = (6.4, y - 0.12), (6.9, y - 0.12)
            axes.annotate("", *end, arrowprops=arrow | {"color": ORANGE})
            axes.text(7, y + 0.2, skip, va="center", color=ORANGE, fontsize=9)
    return figure


def _layer_names(rows: Sequence[tuple]) -> str:
    """Return the layers' types and kernels (or units) as one text, or how many they are."""
    sizes = [row[3] if row[1] == "Linear" else row[2] for row in rows]
    named = [(row[1].replace("2d", ""), size) for row, size in zip(rows, sizes, strict=True)]
    names = [f"{kind} {size}".strip() for kind, size in named if kind != "Flatten"]
    return ", ".join(names) if len(names) < 9 else f"{len(names)} layers"
