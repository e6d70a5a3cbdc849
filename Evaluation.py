"""What is said about a model's probabilities: metrics, figures, Grad-CAM and MedMNIST's CSV file.

    metrics = compute_metrics(probs, labels)
    print(results_markdown({"test": metrics}))
    confusion_figure(metrics["confusion_matrix"], note="test").savefig("confusion.png")

Everywhere, `probs` is float (N, 9) with rows that sum to 1, `labels` is int (N,) in 0..8, and N is
1 or more. A figure shows its `note` under the title: which split, and whether it is synthetic.
"""

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analyze_data import CLASS_NAMES, SHORT_NAMES, write_atomically

# Imported where they are used, so that a start need not wait for them: matplotlib, torch and
# scikit-learn, which alone took a quarter of the time until PathMNIST.py --help was there.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor, nn

CLASSES = range(len(CLASS_NAMES))
ECE_BINS = 15  # Guo et al. 2017, arXiv 1706.04599
RESAMPLES = 10_000

# ---- metrics ------------------------------------------------------------------------------------


def validation_metrics(probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the few metrics that are followed from epoch to epoch.

    Parameters
    ----------
    probs, labels : np.ndarray
        Probabilities (N, 9) and true classes (N,).

    Returns
    -------
    dict
        "loss" (mean negative log likelihood, nats) and "loss_se" (its standard error over the
        images), "accuracy", "auc" (`macro_auc`) and "recall" (9 floats, nan where a class has no
        images). Probabilities that are not finite give a loss and an AUC of nan, so that the
        training loop can say what happened.
    """
    from sklearn.metrics import recall_score

    predicted = probs.argmax(axis=1)
    # The smallest normal float32 keeps a probability that underflowed to 0 from giving inf.
    true_probs = np.maximum(probs[np.arange(len(labels)), labels], np.finfo(np.float32).tiny)
    losses = -np.log(true_probs.astype(np.float64))
    recall = recall_score(labels, predicted, labels=CLASSES, average=None, zero_division=np.nan)
    return {
        "loss": float(losses.mean()),
        "loss_se": float(losses.std() / np.sqrt(len(losses))),
        "accuracy": float(np.mean(predicted == labels)),
        "auc": macro_auc(probs, labels),
        "recall": recall.tolist(),
    }


def compute_metrics(probs: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return every metric of one split, in plain Python types that JSON can hold.

    Parameters
    ----------
    probs, labels : np.ndarray
        Probabilities (N, 9) and true classes (N,).
    seed : int
        Of the bootstrap.

    Returns
    -------
    dict
        "accuracy"; "auc" (`macro_auc`, None where undefined); "macro_f1" and
        "balanced_accuracy" (means of F1 and recall over the classes that have images); "loss"
        (mean negative log likelihood, nats); "ece" (`expected_calibration_error`);
        "accuracy_ci95" [low, high] (percentile bootstrap over images, 10,000 resamples);
        "per_class" {name: precision, recall, f1, support} (0 where undefined);
        "confusion_matrix" 9 x 9, rows true, columns predicted.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    predicted = probs.argmax(axis=1)
    basics = validation_metrics(probs, labels)
    scores = precision_recall_fscore_support(labels, predicted, labels=CLASSES, zero_division=0)
    present = scores[3] > 0
    keys = ("precision", "recall", "f1", "support")
    rows = [dict(zip(keys, (s[c].item() for s in scores), strict=True)) for c in CLASSES]
    # A resample of N zeros and ones has a binomial sum: no need to draw the images one by one.
    resampled = np.random.default_rng(seed).binomial(len(labels), basics["accuracy"], RESAMPLES)
    return {
        "accuracy": basics["accuracy"],
        "auc": None if np.isnan(basics["auc"]) else basics["auc"],
        "macro_f1": float(scores[2][present].mean()),
        "balanced_accuracy": float(scores[1][present].mean()),
        "loss": basics["loss"],
        "ece": expected_calibration_error(probs, labels),
        "accuracy_ci95": (np.percentile(resampled, [2.5, 97.5]) / len(labels)).tolist(),
        "per_class": dict(zip(CLASS_NAMES, rows, strict=True)),
        "confusion_matrix": confusion_matrix(labels, predicted, labels=CLASSES).tolist(),
    }


def macro_auc(probs: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean one-vs-rest ROC AUC, as MedMNIST's `getAUC` computes it.

    A class that has no images, or all of them, has no AUC and is left out of the mean; nan when
    none is left or when `probs` (N, 9) is not finite.
    """
    from sklearn.metrics import roc_auc_score

    present = np.unique(labels)
    if len(present) < 2 or not np.isfinite(probs).all():
        return float("nan")
    # All classes in one call: one for each spends three times as long on checking its arguments.
    return float(roc_auc_score(labels[:, None] == present, probs[:, present], average="macro"))


def expected_calibration_error(probs: np.ndarray, labels: np.ndarray) -> float:
    """Return the ECE in 0..1: |accuracy - mean confidence| of each bin, averaged over images.

    15 bins of equal width, closed on the right (Guo et al. 2017, arXiv 1706.04599, eq. 3).
    `probs` (N, 9), `labels` (N,).
    """
    counts, accuracy, confidence = _reliability_bins(probs, labels)
    return float(np.sum(counts * np.abs(accuracy - confidence)) / len(labels))


def _reliability_bins(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return images, accuracy and mean confidence of each bin: three (15,), 0 in empty bins."""
    correct = probs.argmax(axis=1) == labels
    confidence = probs.max(axis=1).astype(np.float64)
    bins = np.digitize(confidence, np.linspace(0, 1, ECE_BINS + 1)[1:-1], right=True)
    counts, hits, total = (
        np.bincount(bins, weights, ECE_BINS) for weights in (None, correct, confidence)
    )
    return counts, hits / np.maximum(counts, 1), total / np.maximum(counts, 1)


# ---- tables and files ---------------------------------------------------------------------------


def results_markdown(metrics_by_split: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with one row per split, aligned so that a terminal shows it well.

    `metrics_by_split` maps the name of a split to what `compute_metrics` returned.
    """
    columns = ("macro_f1", "balanced_accuracy", "ece", "loss")
    header = ["split", "images", "accuracy (95 % interval)", "AUC", "macro F1", "bal. acc.", "ECE"]
    rows = [[*header, "loss"], ["---"] * (len(header) + 1)]
    for split, m in metrics_by_split.items():
        low, high = m["accuracy_ci95"]
        images = sum(row["support"] for row in m["per_class"].values())
        accuracy = f"{m['accuracy']:.4f} ({low:.3f} to {high:.3f})"
        auc = "undefined" if m["auc"] is None else f"{m['auc']:.4f}"
        rows.append([split, f"{images:,}", accuracy, auc, *(f"{m[key]:.4f}" for key in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[c.ljust(width) for c, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def save_predictions(
    folder: Path, probs: np.ndarray, metrics: Mapping[str, Any], name: str, size: int = 28
) -> Path:
    """Write test predictions as `medmnist.Evaluator` (3.0.2, evaluator.py) writes and parses them.

    One line per image, `index,p0,...,p8`, no header; the file's name holds AUC and accuracy, and
    the size of the images unless that is 28.

    Parameters
    ----------
    folder : Path
        Exists.
    probs : np.ndarray
        Float (N, 9), in the order of the test split.
    metrics : dict
        What `compute_metrics` returned for `probs`.
    name : str
        Of the run; goes into the file's name.
    size : int
        Pixels a side of the data set's images.

    Returns
    -------
    Path
        The file that was written.
    """
    auc = float("nan") if metrics["auc"] is None else metrics["auc"]
    flag = "pathmnist" if size == 28 else f"pathmnist_{size}"
    path = folder / f"{flag}_test_[AUC]{auc:.3f}_[ACC]{metrics['accuracy']:.3f}@{name}.csv"
    # str() of a numpy number is the shortest text that reads back as the same number.
    lines = [",".join(map(str, (index, *row))) for index, row in enumerate(probs)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


# ---- house style --------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind can tell apart (jfly.uni-koeln.de/color).
BLUE, ORANGE, VERMILION, GREY = "#0072B2", "#E69F00", "#D55E00", "#595959"
WIDTH = 7.0  # inches; with text of 12 points, legible where a phone shows it 2.5 inches wide
HOUSE_STYLE = {
    "figure.dpi": 150,
    "figure.facecolor": "white",  # opaque: on a dark page, black on nothing cannot be read
    "figure.titlesize": 15,
    "figure.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "legend.borderaxespad": 0.1,
    "legend.fontsize": 11,
}
# No-break spaces hold a code and its name on one line.
CODES = ", ".join(
    f"{short} {name}".replace(" ", "\u00a0")
    for short, name in zip(SHORT_NAMES, CLASS_NAMES, strict=True)
)


def house_style(draw: "Callable[..., Figure]") -> "Callable[..., Figure]":
    """Make a function draw its figure in the house style (a decorator)."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> "Figure":
        import matplotlib

        with matplotlib.rc_context(HOUSE_STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made, and styled, at the first drawing
        return figure

    return styled


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
    columns: int,
    tiles: np.ndarray,
    titles: Sequence[tuple[str, str]] | None,
    text: tuple[str, str, str],
) -> "Figure":
    """Draw images (N, h, w, 3) in a grid with sharp pixels.

    `titles` has a title and a colour for each, `text` is title, note and caption as in `_figure`.
    """
    rows = max(1, -(-len(tiles) // columns))
    row_height = WIDTH / columns * tiles.shape[1] / tiles.shape[2] + (0.45 if titles else 0)
    figure = _figure((1.9 if titles else 1.4) + row_height * rows, *text)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(tiles) :]:
        axes.set_visible(False)
    for index, (axes, tile) in enumerate(zip(grid, tiles, strict=False)):
        title, colour = titles[index] if titles else ("", "white")
        axes.imshow(tile, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
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
    """Join two stacks of images (N, S, S, 3), uint8 or float, side by side as floats in [0, 1]."""
    gap = np.ones((len(left), left.shape[1], max(1, left.shape[1] // 28), 3))
    return np.concatenate([_unit(left), gap, _unit(right)], axis=2).clip(0, 1)


def _unit(images: np.ndarray) -> np.ndarray:
    """Return images, uint8 or float in [0, 1], as floats in [0, 1]."""
    return images / 255 if images.dtype == np.uint8 else images


# ---- figures ------------------------------------------------------------------------------------


@house_style
def learning_curves(
    history: Sequence[Mapping[str, float]], best_epoch: int, note: str = ""
) -> "Figure":
    """Draw loss and accuracy of train and val, and the learning rate, over the epochs.

    `history` has one dict per epoch with epoch, train_loss, val_loss, train_accuracy,
    val_accuracy and lr; `best_epoch` is the one whose weights were kept.
    """
    caption = f"Dotted: epoch {best_epoch}, whose weights were kept. Train is measured on augmented"
    figure = _figure(6, "Learning curves", note, f"{caption} images while the weights change.")
    panels = figure.subplot_mosaic([["loss", "accuracy"], ["lr", "lr"]], height_ratios=[3, 1])
    epochs = [row["epoch"] for row in history]
    style = {"linewidth": 2, "marker": "o" if len(history) < 15 else ""}
    for key in ("loss", "accuracy"):
        for split, colour in (("train", BLUE), ("val", ORANGE)):
            values = [row[f"{split}_{key}"] for row in history]
            panels[key].plot(epochs, values, color=colour, label=split, **style)
        panels[key].set(title=key, xlabel="epoch")
        _legend_above(panels[key], "right", 2)
    panels["lr"].plot(epochs, [row["lr"] for row in history], color=GREY, **style)
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
        text = f"{count}\n{share[row, column]:.0%}" if count else "0"
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
    images: np.ndarray,
    labels: np.ndarray,
    probs: np.ndarray,
    correct: bool,
    n: int = 12,
    seed: int = 0,
    note: str = "",
) -> "Figure":
    """Draw at most `n` correctly (or incorrectly) classified images, drawn with `seed`.

    One of each class, or of each confusion (the commonest first), as far as there is room; then
    others. They are sorted by true class.

    `images` uint8 (N, S, S, 3), `labels` (N,), `probs` (N, 9).
    """
    candidates = np.flatnonzero((probs.argmax(axis=1) == labels) == correct)
    drawn = np.random.default_rng(seed).permutation(candidates)
    pairs = np.stack([labels[drawn], probs[drawn].argmax(axis=1)])
    _, firsts, sizes = np.unique(pairs, axis=1, return_index=True, return_counts=True)
    firsts = firsts[np.argsort(-sizes, kind="stable")]
    chosen = np.concatenate([drawn[firsts], np.delete(drawn, firsts)])[:n]
    chosen = chosen[np.argsort(labels[chosen], kind="stable")]
    kind = "Correctly" if correct else "Incorrectly"
    each = "class" if correct else "confusion (or of the commonest)"
    caption = (
        f"{kind} classified: {len(candidates):,} of {len(labels):,} images. "
        f"Shown, by true class: {len(chosen)} drawn at random (seed {seed}), one of each {each}, "
        f"then others. Percentage: probability of the predicted class.\n{CODES}"
    )
    titles = [_verdict(probs[index], labels[index]) for index in chosen]
    text = (f"{kind} classified images", note, caption)
    figure = _tiles(4, images[chosen], titles, text)
    if len(chosen) == 0:
        figure.text(0.5, 0.55, f"No image was {kind.lower()} classified.", ha="center")
    return figure


@house_style
def reliability_figure(probs: np.ndarray, labels: np.ndarray, note: str = "") -> "Figure":
    """Draw accuracy against confidence in bins, and the images per bin (Guo et al. 2017, fig. 1).

    `probs` (N, 9), `labels` (N,).
    """
    counts, accuracy, confidence = _reliability_bins(probs, labels)
    ece = expected_calibration_error(probs, labels)
    caption = (
        "Images in 15 bins by confidence, the probability of the predicted class. ECE: the "
        "distance between accuracy and mean confidence, averaged over the images."
    )
    figure = _figure(7.2, f"Reliability: ECE {ece:.3f}", note, caption)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    left, width = np.arange(ECE_BINS) / ECE_BINS, 1 / ECE_BINS
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
def confidence_figure(probs: np.ndarray, labels: np.ndarray, note: str = "") -> "Figure":
    """Draw histograms of the confidence of right and of wrong predictions.

    `probs` (N, 9), `labels` (N,).
    """
    correct = probs.argmax(axis=1) == labels
    caption = "Confidence: the probability of the predicted class. The two vertical scales differ."
    figure = _figure(6, "Confidence of right and wrong predictions", note, caption)
    panels = figure.subplots(2, 1, sharex=True)
    groups = (("right", correct, BLUE), ("wrong", ~correct, VERMILION))
    for axes, (name, chosen, colour) in zip(panels, groups, strict=True):
        confidence = probs.max(axis=1)[chosen]
        counts, *_ = axes.hist(confidence, np.linspace(0, 1, 21), color=colour, edgecolor="white")
        axes.set(title=f"{name} (n={len(confidence):,})", ylabel="images")
        axes.set(xlim=(0, 1), ylim=(0, 1.1 * max(1, counts.max())))
        axes.locator_params(axis="y", integer=True, nbins=5)
    panels[1].set_xlabel("confidence")
    return figure


@house_style
def augmentation_figure(plain: np.ndarray, augmented: np.ndarray, note: str = "") -> "Figure":
    """Draw each image beside an augmented version of it.

    `plain` (N, S, S, 3) uint8 or float in [0, 1]; `augmented` the same images as floats in about
    [0, 1], clipped for display.
    """
    caption = (
        "Each pair: left as in the file, right as training may see it. A patch of another tile is "
        "CutMix's: one serves a whole batch, and not every batch gets one."
    )
    return _tiles(3, _pairs(plain, augmented), None, ("Augmentation", note, caption))


@house_style
def gradcam_figure(
    images: np.ndarray,
    heatmaps: np.ndarray,
    labels: np.ndarray | None,
    probs: np.ndarray,
    note: str = "",
) -> "Figure":
    """Draw each image beside its Grad-CAM heatmap laid over the image in grey.

    `images` (N, S, S, 3) uint8 or float in [0, 1], `heatmaps` (N, S, S) in [0, 1] from
    `grad_cam`, `labels` (N,) or None where nobody knows them, `probs` (N, 9).
    """
    from matplotlib import colormaps

    grey = _unit(images).mean(axis=3, keepdims=True)
    overlay = 0.5 * grey + 0.5 * colormaps["viridis"](heatmaps)[..., :3]
    caption = (
        "Yellow: what spoke most for the predicted class, violet: what did not. Percentage: "
        "its probability."
    )
    if labels is not None:
        caption += " Blue frame: classified correctly, orange: incorrectly."
    truth = [None] * len(images) if labels is None else labels
    titles = [_verdict(row, label) for row, label in zip(probs, truth, strict=True)]
    text = ("Grad-CAM", note, f"{caption}\n{CODES}")
    return _tiles(min(3, len(images)), _pairs(images, overlay), titles, text)


LAYERS_X, SKIP_X = 3.6, 7.3  # where `architecture_figure` has the layers and skip connections


@house_style
def architecture_figure(table: Sequence[tuple[str, str, str, str, int]], name: str) -> "Figure":
    """Draw the model's named stages as boxes, with what each holds and its output shape.

    `table` is what `MyModels.layer_table` returned. In a stage that has a part called "skip", that
    part is drawn as a box beside the layers that it goes around, then their sum, then the rest.
    """
    stages: dict[str, list] = {}
    for row in table:
        stages.setdefault(row[0].removeprefix("net.").split(".")[0], []).append(row)
    heights = [1 + any(".skip" in row[0] for row in rows) for rows in stages.values()]
    total = sum(row[4] for row in table)
    caption = "Top to bottom. At the right: output shape (channels x height x width), parameters."
    if max(heights) > 1:
        caption += " Orange: skip connection."
    figure = _figure(1.2 + 0.85 * sum(heights), f"{name}: {total:,} parameters", "", caption)
    axes = figure.subplots()
    axes.set(xlim=(0, 10.4), ylim=(-sum(heights) - 0.3, 0.3))
    axes.axis("off")
    ends = {"ha": "center", "fontsize": 10, "color": GREY}
    axes.text(LAYERS_X, 0.05, "image", va="bottom", **ends)
    axes.text(LAYERS_X, -sum(heights) - 0.05, "logits", va="top", **ends)
    for index, (stage, rows) in enumerate(stages.items()):
        _draw_stage(axes, -sum(heights[:index]), heights[index], stage, rows)
    return figure


def _draw_stage(axes: "Axes", top: int, height: int, name: str, rows: Sequence[tuple]) -> None:
    """Draw one stage of `architecture_figure`, from `top` down: boxes, arrows and numbers."""
    path, side = LAYERS_X, SKIP_X
    skips = [index for index, row in enumerate(rows) if ".skip" in row[0]]
    first, last = (skips[0], skips[-1] + 1) if skips else (len(rows), len(rows))
    parts = (rows[:first], rows[first:last], rows[last:])
    before, skip, after = (_layer_names(part) for part in parts)

    def box(x: float, y: float, text: str, colour: str) -> None:
        style = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": colour}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style, zorder=3)

    def arrow(colour: str, *points: tuple[float, float]) -> None:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5)
        style = {"arrowstyle": "->", "color": colour, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", points[-1], points[-2], arrowprops=style)

    middle = top - height / 2
    if skips:
        entry, middle, total = top - 0.12, top - 0.8, top - 1.5
        arrow(ORANGE, (path, entry), (side, entry), (side, total), (path + 0.62, total))
        arrow(GREY, (path, middle), (path, total + 0.15))
        box(side, middle, textwrap.fill(skip, 14), ORANGE)
        box(path, total, f"add, {after}", BLUE)
    layers = textwrap.fill(before, 36)
    arrow(GREY, (path, top), (path, middle + (0.25 if "\n" in layers else 0.15)))
    box(path, middle, layers, BLUE)
    axes.plot([path, path], [total if skips else middle, top - height], color=GREY, linewidth=1.5)
    axes.text(1.1, middle, name, ha="right", va="center", weight="bold", fontsize=11)
    shape, count = rows[-1][3], sum(row[4] for row in rows)
    axes.text(8.6, middle, f"{shape}\n{count:,}", va="center", fontsize=10)


def _layer_names(rows: Sequence[tuple]) -> str:
    """Return the layers' types and kernels (or units) as one text, or how many they are."""
    sizes = [row[3] if row[1] == "Linear" else row[2] for row in rows]
    named = [(row[1].replace("2d", ""), size) for row, size in zip(rows, sizes, strict=True)]
    names = [f"{kind} {size}".strip() for kind, size in named if kind != "Flatten"]
    return ", ".join(names) if len(names) < 9 else f"{len(names)} layers"


# ---- Grad-CAM -----------------------------------------------------------------------------------


def grad_cam(
    model: "nn.Module",
    images: "Tensor",
    layer: "nn.Module",
    classes: "Tensor | np.ndarray | None" = None,
) -> np.ndarray:
    """Return where in each image the evidence for a class lies (Selvaraju et al. 2017).

    arXiv 1610.02391, equations 1 and 2: the layer's channels are averaged with the weights
    d(logit) / d(activation), averaged over the positions, and only what speaks for the class
    is kept. Runs in eval mode and float32, and leaves the model as it found it.

    Parameters
    ----------
    model : nn.Module
        Takes float (N, 3, S, S), returns logits (N, 9).
    images : Tensor
        Float (N, 3, S, S) in [0, 1].
    layer : nn.Module
        A part of `model` whose output is (N, channels, height, width). For `SkipCNN` at 28 px,
        `model.stage2` (7 x 7 positions) shows structures, `model.stage3` (4 x 4, the layer that
        the head pools) little more than a half of the image; from 64 px on, `stage3`.
    classes : (N,) int or None
        The classes to explain; the predicted ones when None.

    Returns
    -------
    np.ndarray
        float32 (N, S, S), 1 at each image's strongest point; all 0 where nothing speaks for
        the class.
    """
    import torch
    from torch.nn.functional import interpolate

    # A copy that needs a gradient makes every activation differentiable, frozen weights or not.
    device = next(model.parameters()).device
    images = images.detach().to(device, torch.float32, copy=True).requires_grad_()
    activation, gradient = _activation_and_gradient(model, images, layer, classes)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    heat = (weights * activation).sum(dim=1, keepdim=True).relu()
    heat = interpolate(heat, images.shape[2:], mode="bilinear", align_corners=False)
    heat = heat / heat.amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    return heat[:, 0].cpu().numpy()


def _activation_and_gradient(
    model: "nn.Module",
    images: "Tensor",
    layer: "nn.Module",
    classes: "Tensor | np.ndarray | None",
) -> tuple["Tensor", "Tensor"]:
    """Return the layer's output and d(logit of the class) / d(output), both (N, K, h, w)."""
    import torch

    kept = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            logits = model(images)
            chosen = logits.argmax(1) if classes is None else torch.as_tensor(classes)
            score = logits.gather(1, chosen.to(logits.device).long().view(-1, 1)).sum()
            # Unlike backward(), grad() leaves the .grad of the weights alone.
            (gradient,) = torch.autograd.grad(score, kept[0])
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training
    return kept[0].detach(), gradient
