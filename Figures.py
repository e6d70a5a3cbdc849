"""Every figure, in one style. Each function returns a matplotlib Figure; the caller saves it.

    save(confusion_figure(metrics["confusion_matrix"], note="test"), Path("confusion.png"))

Everywhere, `probs` is float (N, 9) with rows that sum to 1, `labels` is int (N,) in 0..8, and N is
1 or more. A figure shows its `note` under the title: which split, and whether the data is
synthetic.
"""

import functools
import io
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator
from numpy import ndarray
from PIL import Image

from Common import CLASS_NAMES, CLASSES, SHORT_NAMES, SYNTHETIC, UserError, write_atomically

# Okabe and Ito's colours, which the colour-blind can tell apart (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
# For maps: background is white, the other classes have the eight colours of the same palette.
MAP_COLOURS = (
    "#F0E442",
    "#FFFFFF",
    "#000000",
    BLUE,
    "#56B4E9",
    "#CC79A7",
    GREEN,
    ORANGE,
    VERMILION,
)
SPLIT_COLOURS = {"train": BLUE, "val": ORANGE, "test": GREEN}
DPI = 150
WIDTH = 7.0  # inches; 12-point text stays legible if a phone shows the figure 2.5 inches wide
STYLE = ["default", str(Path(__file__).with_name("house.mplstyle"))]
# No-break spaces hold a code and its name on one line.
CODES = ", ".join(
    f"{short} {name}".replace(" ", "\u00a0")
    for short, name in zip(SHORT_NAMES, CLASS_NAMES, strict=True)
)


def house_style(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: draw the figure in the house style, whatever the user's matplotlib settings."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with style.context(STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made, and styled, at the first drawing
        return figure

    return styled


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, in the house style: some settings only take effect on saving.
    UserError if there is a file of that name that is the user's."""
    check_replaceable(path)
    buffer = io.BytesIO()
    with style.context(STYLE):
        figure.savefig(buffer, dpi=DPI)
    write_atomically(path, buffer.getvalue())


def check_replaceable(path: Path) -> None:
    """UserError if there is a file of that name which Matplotlib did not write."""
    if path.exists() and b"Matplotlib" not in path.read_bytes()[:1000]:
        raise UserError(f"{path}: exists, and is not a figure of this program; move it elsewhere")


def pixels(figure: Figure) -> ndarray:
    """Return the pixels of the figure as it would be saved, uint8 (height, width, 4)."""
    buffer = io.BytesIO()
    with style.context(STYLE):
        figure.savefig(buffer, dpi=DPI)
    return np.asarray(Image.open(buffer))


def plain_name(name: str) -> str:
    """Return a file's name with "?" for what Matplotlib may lack or take for a formula."""
    return name.encode("ascii", "replace").decode().replace("$", "?")


def data_note(kind: str) -> str:
    """Return the note that every figure of this kind of data must show ("" unless synthetic)."""
    return SYNTHETIC if kind == "synthetic" else ""


def split_note(split: str, kind: str) -> str:
    """Return which split a figure shows, and whether the data is synthetic."""
    return f"{split} split, {SYNTHETIC}" if kind == "synthetic" else f"{split} split"


@house_style
def learning_curves(history: list, best_epoch: int, kind: str = "") -> Figure:
    """Draw loss and accuracy of train and val, and the learning rate, over the epochs. `history` is
    what `fit` returned; `best_epoch` is the one whose weights were kept, `kind` is that of the
    data."""
    caption = (
        f"Dotted: epoch {best_epoch}, whose weights were kept. Train loss and accuracy are "
        "measured on augmented images while the weights change."
    )
    figure = _figure(6, "Learning curves", data_note(kind), caption)
    panels = figure.subplot_mosaic([["loss", "accuracy"], ["lr", "lr"]], height_ratios=[3, 1])
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(history) < 15 else ""
    for key in ("loss", "accuracy"):
        for split in ("train", "val"):
            values = [row[f"{split}_{key}"] for row in history]
            colour = SPLIT_COLOURS[split]
            panels[key].plot(epochs, values, color=colour, label=split, linewidth=2, marker=marker)
        panels[key].set(title=key, xlabel="epoch")
        _legend_above(panels[key], "right", 2)
    losses = [row[key] for row in history for key in ("train_loss", "val_loss")]
    if min(losses) > 0 and max(losses) > 10 * min(losses):
        panels["loss"].set_yscale("log")
        panels["loss"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels["loss"].yaxis.set_major_formatter("{x:g}")
        panels["loss"].minorticks_off()
    rates = [row["lr"] for row in history]
    panels["lr"].plot(epochs, rates, color=GREY, clip_on=False, linewidth=2, marker=marker)
    panels["lr"].set(title="learning rate", xlabel="epoch", ylim=(0, None))
    panels["lr"].set_yticks([0, max(rates)], ["0", f"{max(rates):.2g}"])
    for axes in panels.values():
        axes.axvline(best_epoch, color="black", linestyle=":")
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    return figure


@house_style
def confusion_figure(matrix: list | ndarray, note: str = "") -> Figure:
    """Draw a confusion matrix (9, 9), rows true: counts and percent of the row in each cell."""
    counts = np.asarray(matrix)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    caption = "In each cell: number of images, and their percentage of the true class (colour)."
    figure = _figure(7.6, "Confusion matrix", note, f"{caption}\n{CODES}")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        text = f"{count}"
        if share[row, column] >= 0.005:
            text += f"\n{share[row, column]:.0%}"
        colour = "black" if count else "grey"
        if share[row, column] > 0.6:
            colour = "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=10.5, color=colour)
    axes.set_xticks(CLASSES, SHORT_NAMES)
    axes.set_yticks(CLASSES, SHORT_NAMES)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    axes.grid(False)
    return figure


@house_style
def per_class_figure(metrics: dict, note: str = "") -> Figure:
    """Draw precision and recall of each class as bars, from what `compute_metrics` returned."""
    rows = [metrics["per_class"][name] for name in CLASS_NAMES]
    figure = _figure(8, "Precision and recall by class", note, f"n: number of images.\n{CODES}")
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
    images: ndarray, labels: ndarray, probs: ndarray, correct: bool, note: str = ""
) -> Figure:
    """Draw at most twelve correctly (or incorrectly) classified images, uint8 (N, S, S, 3). First
    one of each class (or of each confusion, the most common first) is chosen, then others. They are
    shown sorted by true class."""
    candidates = np.flatnonzero((probs.argmax(axis=1) == labels) == correct)
    drawn = np.random.default_rng(0).permutation(candidates)
    pairs = [(labels[index], probs[index].argmax()) for index in drawn]
    common = Counter(sorted(pairs)).most_common()
    firsts = [pairs.index(pair) for pair, _ in common]  # one image of each pair of classes
    chosen = np.concatenate([drawn[firsts], np.delete(drawn, firsts)])[:12].astype(int)
    chosen = chosen[np.argsort(labels[chosen], kind="stable")]
    kind = "Correctly" if correct else "Incorrectly"
    each = "class" if correct else "confusion, the most common first"
    caption = (
        f"{kind} classified: {len(candidates):,} of {len(labels):,} images. "
        f"Shown, sorted by true class: {len(chosen)} images drawn at random (seed 0), one of each "
        f"{each}, then others. Percentage: probability of the predicted class.\n{CODES}"
    )
    titles = [_verdict(probs[index], labels[index]) for index in chosen]
    figure = _tiles(4, images[chosen], titles, f"{kind} classified images", note, caption)
    if len(chosen) == 0:
        figure.text(0.5, 0.55, f"No image was {kind.lower()} classified.", ha="center")
    return figure


@house_style
def reliability_figure(
    counts: ndarray, accuracy: ndarray, confidence: ndarray, ece: float, note: str = ""
) -> Figure:
    """Draw accuracy against confidence in bins, and the images per bin (Guo et al. 2017, fig. 1).
    The first three are what `Evaluation.reliability_bins` returned."""
    bins = len(counts)
    caption = (
        f"The images are put into {bins} bins by confidence, the probability of the predicted "
        "class. ECE: absolute difference between accuracy and mean confidence of a bin, averaged "
        "over the images."
    )
    figure = _figure(7.2, f"Reliability: ECE {ece:.3f}", note, caption)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    left, width = np.arange(bins) / bins, 1 / bins
    bar = {"width": width, "align": "edge", "edgecolor": "white"}
    upper.bar(left, accuracy, color=BLUE, label="accuracy", **bar)
    used = counts > 0
    start, mean = left[used], confidence[used]
    upper.hlines(mean, start, start + width, color=ORANGE, linewidth=3, label="mean confidence")
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfect")
    upper.set(ylabel="accuracy", ylim=(0, 1))
    _legend_above(upper, "left", 3)
    bars = lower.bar(left, counts, color=GREY, **bar)
    lower.bar_label(bars, labels=[str(c) if c else "" for c in counts], fontsize=9)
    lower.set(xlabel="confidence", ylabel="images", xlim=(0, 1), ylim=(0, 1.2 * counts.max()))
    return figure


@house_style
def augmentation_figure(plain: ndarray, augmented: ndarray, note: str = "") -> Figure:
    """Draw images, uint8 (N, S, S, 3), beside their augmented versions, floats in about [0, 1]."""
    caption = (
        "Each pair: left the image in the file, right the image after random augmentation. Of "
        "these eight, the first three change their sharpness, the next two get noise, and one is "
        "compressed as JPEG. Training takes the images in random order."
    )
    return _tiles(3, _pairs(plain, augmented), [], "Augmentation", note, caption)


@house_style
def gradcam_figure(
    images: ndarray,
    heatmaps: ndarray,
    labels: list,
    probs: ndarray,
    note: str = "",
) -> Figure:
    """Draw each image beside its Grad-CAM heatmap, which is laid over a grey copy of the image.
    `images` uint8 (N, S, S, 3), `heatmaps` (N, S, S) in [0, 1] from `Evaluation.grad_cam`; a label
    is None if it is unknown."""
    caption = (
        "Yellow: strongest evidence for the predicted class, violet: no evidence. Percentage: "
        "probability of that class."
    )
    if labels[0] is not None:
        caption += " Blue frame: classified correctly, orange: incorrectly."
    titles = [_verdict(row, label) for row, label in zip(probs, labels, strict=True)]
    columns = min(3, len(images))
    explained = _explained(images, heatmaps)
    return _tiles(columns, explained, titles, "Grad-CAM", note, f"{caption}\n{CODES}")


@house_style
def predictions_figure(
    tiles: ndarray, names: list, probs: ndarray, heatmaps: ndarray | None, note: str = ""
) -> Figure:
    """Draw at most fifty new tiles, uint8 (N, S, S, 3), with name, class and probability, the least
    certain first. If given, `heatmaps` (N, S, S) in [0, 1] are drawn beside the tiles."""
    order = np.argsort(probs.max(axis=1), kind="stable")[:50]
    caption = (
        f"{len(order)} of {len(tiles)} tiles, the least certain first. Above each tile: the start "
        "of its file's name, the predicted class and its probability."
    )
    columns, shown = 6, tiles[order] / 255
    if heatmaps is not None:
        columns, shown = 4, _explained(tiles[order], heatmaps[order])
        caption += " Right: Grad-CAM; yellow: strongest evidence for that class, violet: none."
    titles = []
    for index in order:
        guess = int(probs[index].argmax())
        title = f"{plain_name(names[index])[:10]}\n{SHORT_NAMES[guess]} {probs[index, guess]:.0%}"
        titles.append((title, GREY))
    return _tiles(columns, shown, titles, "Predictions", note, f"{caption}\n{CODES}")


@house_style
def map_figure(
    slide: ndarray, width: float, probs: ndarray, step: float, legend: list, note: str = ""
) -> Figure:
    """Draw a slide, uint8 (h, w, 3), `width` millimetres wide, and its tissue map: the class of
    each window in `probs` (rows, columns, 9), `step` millimetres apart. `legend` has a text for
    each class."""
    caption = (
        "Each window has the colour of its class, paler the less probable the class is. "
        "Percentage: share of the tissue. Colours: Okabe and Ito."
    )
    height = width * slide.shape[0] / slide.shape[1]
    layout: list = [["slide", "map"], ["legend", "legend"]]
    ratios = [min(12, WIDTH / 2 * height / width), 1.5]  # inches
    if width > height:
        layout = [["slide"], ["map"], ["legend"]]
        ratios = [WIDTH * height / width, WIDTH * height / width, 1.5]
    figure = _figure(sum(ratios) + 1.7, "Tissue map", note, caption)
    panels = figure.subplot_mosaic(layout, height_ratios=ratios)
    panels["slide"].imshow(slide, extent=(0, width, height, 0))
    colours = np.array([to_rgb(colour) for colour in MAP_COLOURS])[probs.argmax(2)]
    certainty = probs.max(2)[..., None]
    # Half a window at the border has no centre of a window in it, so the map begins half a step
    # from the upper left corner.
    right, bottom = step * (probs.shape[1] + 0.5), step * (probs.shape[0] + 0.5)
    extent = (step / 2, right, bottom, step / 2)
    panels["map"].imshow(certainty * colours + 1 - certainty, extent=extent)
    panels["map"].set(xlim=(0, width), ylim=(height, 0))
    _scale_bar(panels["map"], width, height)
    patches = [Patch(facecolor=colour, edgecolor=GREY) for colour in MAP_COLOURS]
    panels["legend"].legend(patches, legend, loc="upper left", ncols=2)
    panels["legend"].axis("off")
    for name in ("slide", "map"):
        panels[name].set(xticks=[], yticks=[])
        panels[name].spines[:].set(visible=True, color=GREY, linewidth=0.5)
    return figure


def _scale_bar(axes: Axes, width: float, height: float) -> None:
    """Draw a bar of 1, 2 or 5 times a power of ten millimetres, at most a quarter of the width."""
    power = 10.0 ** np.floor(np.log10(width / 4))
    length = max(n * power for n in (1, 2, 5) if n * power <= width / 4)
    y = 1.03 * height
    line: Any = {"linewidth": 3, "solid_capstyle": "butt", "clip_on": False}
    axes.plot([0, length], [y, y], color="black", **line)
    place: Any = {"xytext": (0, -5), "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(f"{length:g} mm", (0, y), va="top", fontsize=10, **place)


@house_style
def architecture_figure(table: list, name: str) -> Figure:
    """Draw the model's named stages as boxes, with the layers and the output shape of each. `table`
    is what `MyModels.layer_table` returned. A part called "skip" is drawn as an arrow around the
    layers that it skips."""
    stages: dict[str, list] = {}
    for row in table:
        stage = row[0].removeprefix("net.").split(".")[0]
        stages.setdefault(stage, []).append(row)
    total = sum(row[4] for row in table)
    caption = "In brackets: channels of the output."
    if any(".skip" in row[0] for row in table):
        caption += " Orange: skip connection, added before the stage's last ReLU."
    figure = _figure(1.7 + 0.75 * len(stages), f"{name}: {total:,} parameters", "", caption)
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(-len(stages), 1))
    axes.axis("off")
    axes.text(4, 0.8, "image", ha="center", va="bottom", fontsize=10)
    axes.text(8.4, 0.8, "output shape,\nparameters", va="bottom", weight="bold", fontsize=10)
    axes.text(4, -len(stages) + 0.2, "logits", ha="center", va="top", fontsize=10)
    for index, (stage, rows) in enumerate(stages.items()):
        _draw_stage(axes, -index, stage, rows)
    return figure


def _draw_stage(axes: Axes, y: int, stage: str, rows: list) -> None:
    """Draw one stage of the architecture as a box at height y, with an arrow above and below."""
    middle, right, corner = 4, 6.4, 6.9  # of the box, its right side, the skip connection's corner
    top, bottom = y + 0.28, y - 0.28
    main = _layer_names([row for row in rows if ".skip" not in row[0]])
    skip = _layer_names([row for row in rows if ".skip" in row[0]])
    shape, count = rows[-1][3], sum(row[4] for row in rows)
    width = 2 * (right - middle)
    axes.bar(middle, top - bottom, width, bottom, color="white", edgecolor=BLUE, linewidth=1.5)
    axes.text(middle, y, textwrap.fill(main, 38), ha="center", va="center", fontsize=9)
    axes.text(1.4, y, stage, ha="right", va="center", weight="bold", fontsize=11)
    axes.text(8.4, y, f"{shape}\n{count:,}", va="center", fontsize=10)
    _arrow(axes, (middle, y + 0.72), (middle, top), GREY)
    _arrow(axes, (middle, bottom), (middle, y - 0.72), GREY)
    if skip:
        start, end = y + 0.5, y - 0.12
        axes.plot([middle, corner, corner], [start, start, end], color=ORANGE, linewidth=1.5)
        _arrow(axes, (corner, end), (right, end), ORANGE)
        axes.text(7, y + 0.2, textwrap.fill(skip, 8), va="center", color=ORANGE, fontsize=9)


def _arrow(axes: Axes, start: tuple, end: tuple, colour: str) -> None:
    """Draw an arrow between two points (x, y)."""
    look = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.5, "color": colour}
    axes.annotate("", end, start, arrowprops=look)


def _layer_names(rows: list) -> str:
    """Return the layers' types, kernels and widths as one text, or their number if 9 or more."""
    names = []
    for _, kind, kernel, shape, _ in rows:
        size = shape if kind == "Linear" else kernel
        if kind == "Conv2d":
            size += f" ({shape.split()[0]})"
        if kind != "Flatten":
            names.append(f"{kind.replace('2d', '')} {size}".strip())
    return ", ".join(names) if len(names) < 9 else f"{len(names)} layers"


@house_style
def sample_grid(images: ndarray, labels: ndarray, kind: str, columns: int = 6) -> Figure:
    """Show `columns` random images (seed 0), uint8 (N, S, S, 3), of every class, or fewer if the
    class has fewer. Each class is one row. `kind` is that of the data."""
    figure = _figure(7.8, _data_title(kind, "random train images of each class"), "", "")
    grid = figure.subplots(len(CLASSES), columns)
    rng = np.random.default_rng(0)
    for label, row in enumerate(grid):
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        chosen = rng.permutation(np.flatnonzero(labels == label))
        for axes, index in zip(row, chosen, strict=False):
            axes.imshow(images[index], interpolation="nearest")
        row[0].set_ylabel(_class_name(label), rotation=0, ha="right", va="center")
    return figure


@house_style
def class_distribution(labels: dict, kind: str) -> Figure:
    """Show each class's share of the three splits, with the counts. `labels` are those of each
    split, `kind` is that of the data."""
    figure = _figure(
        9, _data_title(kind, "class distribution"), "", "Beside each bar: number of images."
    )
    axes = figure.subplots()
    for index, (split, colour) in enumerate(SPLIT_COLOURS.items()):
        counts = np.bincount(labels[split], minlength=len(CLASSES))
        percent = 100 * counts / counts.sum()
        name = f"{split} ({counts.sum():,})"
        height = np.add(CLASSES, (index - 1) * 0.28)
        bars = axes.barh(height, percent, 0.27, color=colour, label=name)
        axes.bar_label(bars, [f"{n:,}" for n in counts], padding=3, fontsize=10)
    axes.set_yticks(CLASSES, [_class_name(label) for label in CLASSES])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1, y=0.02)
    axes.set_xlabel("share of the split, %")
    _legend_above(axes, "right", 3)
    return figure


def _data_title(kind: str, text: str) -> str:
    """Return a figure's title, which also says if the data is synthetic or only a subset."""
    names = {"official": "PathMNIST", "synthetic": SYNTHETIC}
    return f"{names.get(kind, 'PathMNIST, a subset')}: {text}"


def _class_name(label: int) -> str:
    """Return "name (CODE)" of a class, wrapped to fit beside an axis."""
    return textwrap.fill(f"{CLASS_NAMES[label]} ({SHORT_NAMES[label]})", 24)


def _figure(height: float, title: str, note: str, caption: str) -> Figure:
    """Return an empty figure with its title, the note below it and a caption at the foot."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    heading = [line for text in (title, note) for line in textwrap.wrap(text, 50)]
    figure.suptitle("\n".join(heading), x=0.02, ha="left")
    lines = [line for text in caption.splitlines() for line in textwrap.wrap(text, 86)]
    figure.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=10, color=GREY)
    return figure


def _legend_above(axes: Axes, side: str, columns: int) -> None:
    """Put the legend above the axes, at the left or right, so that it hides no data."""
    x = 0 if side == "left" else 1
    place: Any = f"lower {side}"
    axes.legend(loc=place, bbox_to_anchor=(x, 1), ncols=columns, columnspacing=1)


def _tiles(
    columns: int,
    tiles: ndarray,
    titles: list,
    title: str,
    note: str,
    caption: str,
) -> Figure:
    """Draw images (N, h, w, 3) in a grid with sharp pixels. `titles` has a title and a colour for
    each, or is empty."""
    rows = max(1, -(-len(tiles) // columns))
    tile_height = WIDTH / columns * tiles.shape[1] / tiles.shape[2]
    height = 1.9 + (tile_height + 0.45) * rows if titles else 1.4 + tile_height * rows
    figure = _figure(height, title, note, caption)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set(xticks=[], yticks=[], visible=False)
    for axes, tile in zip(grid, tiles, strict=False):
        axes.set_visible(True)
        axes.imshow(tile, interpolation="nearest")
        axes.spines[:].set(visible=True, color="white", linewidth=3)
    for axes, (text, colour) in zip(grid, titles, strict=False):
        axes.set_title(text, fontsize=11, color=colour)
        axes.spines[:].set_color(colour)
    return figure


def _verdict(probs: ndarray, label: int | None) -> tuple[str, str]:
    """Return a tile's title and its colour (blue: right) from probs (9,) and the true class."""
    guess = int(probs.argmax())
    said = f"pred. {SHORT_NAMES[guess]} {probs[guess]:.0%}"
    if label is None:
        return said, "black"
    return f"true {SHORT_NAMES[label]}\n{said}", BLUE if guess == label else VERMILION


def _pairs(left: ndarray, right: ndarray) -> ndarray:
    """Join two stacks of images (N, S, S, 3), uint8 and float, side by side as floats in [0, 1]."""
    gap = np.ones((len(left), left.shape[1], max(1, left.shape[1] // 28), 3))
    return np.concatenate([left / 255, gap, right], axis=2).clip(0, 1)


def _explained(images: ndarray, heatmaps: ndarray) -> ndarray:
    """Join images, uint8 (N, S, S, 3), with their heatmaps (N, S, S) laid over them in grey."""
    grey = images.mean(axis=3, keepdims=True) / 255
    return _pairs(images, 0.5 * grey + 0.5 * colormaps["viridis"](heatmaps)[..., :3])
