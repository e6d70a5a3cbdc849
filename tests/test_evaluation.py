"""Evaluation.py against scikit-learn, worked examples, a published result and planted evidence."""

import errno
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import binom
from sklearn import metrics as sk
from torch import nn

import Evaluation
from analyze_data import CLASS_NAMES, SHORT_NAMES, UserError
from MyModels import ResNet18, SkipCNN, layer_table

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "data" / "reference_predictions.npz"
NOTE = "SYNTHETIC DATA: drawn images that say nothing about tissue (skipcnn, seed 0, test)"

pytestmark = pytest.mark.filterwarnings("error")


def make_probs(n: int, seed: int = 0, classes: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 probs (n, 9) that are often right, and labels (n,) below `classes`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    logits = rng.normal(0, 1.5, (n, 9))
    logits[np.arange(n), labels] += 3
    probs = np.exp(logits)
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32), labels


def confident(guesses: list[int], confidences: list[float]) -> np.ndarray:
    """Return probs with the given largest entry, the rest spread evenly."""
    probs = np.repeat((1 - np.array(confidences)[:, None]) / 8, 9, axis=1)
    probs[np.arange(len(guesses)), guesses] = confidences
    return probs


# ---- metrics ------------------------------------------------------------------------------------


def test_metrics_equal_sklearn():
    probs, labels = make_probs(500)
    predicted = probs.argmax(axis=1)
    result = Evaluation.compute_metrics(probs, labels)
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert result["auc"] == pytest.approx(sk.roc_auc_score(labels, probs, multi_class="ovr"))
    assert result["macro_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert result["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(labels, predicted)
    )
    assert result["loss"] == pytest.approx(sk.log_loss(labels, probs), rel=1e-6)
    assert result["confusion_matrix"] == sk.confusion_matrix(labels, predicted).tolist()
    report = sk.classification_report(
        labels, predicted, target_names=CLASS_NAMES, output_dict=True, zero_division=0
    )
    for name in CLASS_NAMES:
        ours = {**result["per_class"][name]}
        ours["f1-score"] = ours.pop("f1")
        assert ours == pytest.approx(report[name])


def test_validation_metrics_are_those_of_compute_metrics():
    probs, labels = make_probs(300)
    quick, full = (
        Evaluation.validation_metrics(probs, labels),
        Evaluation.compute_metrics(probs, labels),
    )
    assert {key: full[key] for key in ("loss", "accuracy", "auc")} == {
        key: quick[key] for key in ("loss", "accuracy", "auc")
    }
    assert quick["recall"] == [full["per_class"][name]["recall"] for name in CLASS_NAMES]


def test_published_result():
    if not REFERENCE.exists():
        pytest.skip(f"{REFERENCE} is not there")
    with np.load(REFERENCE) as file:
        scores, labels = file["log_scores"].astype(np.float64), file["targets"].astype(np.int64)
    probs = np.exp(scores - scores.max(axis=1, keepdims=True))
    result = Evaluation.compute_metrics(probs / probs.sum(axis=1, keepdims=True), labels)
    assert round(result["accuracy"], 5) == 0.90752
    assert round(result["auc"], 5) == 0.99269


def test_worked_example():
    # Truth 0 0 1 1, said 0 1 1 1: recall 1/2 and 1, precision 1 and 2/3, F1 2/3 and 4/5.
    probs = confident([0, 1, 1, 1], [0.9, 0.9, 0.5, 0.5])
    result = Evaluation.compute_metrics(probs, np.array([0, 0, 1, 1]))
    assert result["accuracy"] == 0.75
    assert result["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert result["balanced_accuracy"] == 0.75
    assert result["loss"] == pytest.approx(-np.log([0.9, 0.1 / 8, 0.5, 0.5]).mean())
    assert result["confusion_matrix"][0][:3] == [1, 1, 0]
    # Class 0: scores .9, .0125 against .0625 twice: 2 of 4 pairs in order. Class 1: .5, .5
    # against .0125, .9: also 2 of 4.
    assert result["auc"] == 0.5
    # Bin of .9: accuracy 1/2; bin of .5: accuracy 1.
    assert result["ece"] == pytest.approx((2 * 0.4 + 2 * 0.5) / 4)


def test_ece_bins_are_closed_on_the_right():
    # 0.6 = 9/15 shares the bin of 0.55: accuracy 1/2, mean confidence 0.575.
    probs = confident([0, 0], [0.6, 0.55])
    assert Evaluation.expected_calibration_error(probs, np.array([1, 0])) == pytest.approx(0.075)
    assert Evaluation.expected_calibration_error(np.eye(9), np.arange(9)) == 0


def test_confidence_interval_is_the_binomial_one():
    labels = np.zeros(400, dtype=np.int64)
    probs = confident([0] * 360 + [1] * 40, [0.9] * 400)
    low, high = Evaluation.compute_metrics(probs, labels, seed=3)["accuracy_ci95"]
    expected = binom.ppf([0.025, 0.975], 400, 0.9) / 400
    assert [low, high] == pytest.approx(expected, abs=1.5 / 400)
    assert Evaluation.compute_metrics(probs, labels, seed=3)["accuracy_ci95"] == [low, high]
    assert Evaluation.compute_metrics(np.eye(9), np.arange(9))["accuracy_ci95"] == [1, 1]


def test_absent_classes_are_left_out_of_the_means():
    probs, labels = make_probs(200, classes=3)
    assert set(probs.argmax(axis=1)) > set(labels)  # absent classes are predicted all the same
    result = Evaluation.compute_metrics(probs, labels)
    one_by_one = [sk.roc_auc_score(labels == c, probs[:, c]) for c in range(3)]
    assert result["auc"] == pytest.approx(np.mean(one_by_one))
    per_class = list(result["per_class"].values())
    assert result["balanced_accuracy"] == pytest.approx(
        np.mean([row["recall"] for row in per_class[:3]])
    )
    assert result["macro_f1"] == pytest.approx(np.mean([row["f1"] for row in per_class[:3]]))
    assert per_class[8] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert (
        np.isnan(Evaluation.validation_metrics(probs, labels)["recall"]).tolist()
        == [False] * 3 + [True] * 6
    )


@pytest.mark.parametrize("guess", [2, 5])
def test_one_image(guess):
    probs = confident([guess], [0.8])
    result = Evaluation.compute_metrics(probs, np.array([2]))
    right = float(guess == 2)
    assert (result["accuracy"], result["auc"], result["macro_f1"]) == (right, None, right)
    assert result["ece"] == pytest.approx(0.2 if right else 0.8)
    assert result["accuracy_ci95"] == [right, right]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "undefined" in Evaluation.results_markdown({"test": result})


def test_probabilities_that_underflow_or_diverge():
    zero = np.eye(9, dtype=np.float32)
    assert Evaluation.validation_metrics(zero, np.arange(9)[::-1].copy())["loss"] == pytest.approx(
        8 / 9 * 87.33655, rel=1e-6
    )
    diverged = Evaluation.validation_metrics(np.full((4, 9), np.nan, np.float32), np.arange(4))
    assert np.isnan(diverged["loss"])
    assert np.isnan(diverged["auc"])


def test_results_table():
    probs, labels = make_probs(120)
    result = Evaluation.compute_metrics(probs, labels)
    lines = Evaluation.results_markdown({"val": result, "test": result}).splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    low, high = result["accuracy_ci95"]
    assert cells[:3] == ["test", "120", f"{result['accuracy']:.4f} ({low:.3f} to {high:.3f})"]
    assert cells[3:] == [
        f"{result[key]:.4f}" for key in ("auc", "macro_f1", "balanced_accuracy", "ece", "loss")
    ]
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 100


# ---- the predictions file -----------------------------------------------------------------------


@pytest.mark.parametrize(("size", "flag"), [(28, "pathmnist"), (64, "pathmnist_64")])
def test_predictions_read_back_as_medmnist_reads_them(tmp_path, size, flag):
    probs, labels = make_probs(50)
    result = Evaluation.compute_metrics(probs, labels)
    path = Evaluation.save_predictions(tmp_path, probs, result, "skipcnn_seed0", size)
    auc, accuracy = f"{result['auc']:.3f}", f"{result['accuracy']:.3f}"
    assert path.name == f"{flag}_test_[AUC]{auc}_[ACC]{accuracy}@skipcnn_seed0.csv"
    # medmnist's parse_and_evaluate: no header, first column the index, the run after the "@".
    assert path.name.split("@")[-1].split(".")[0] == "skipcnn_seed0"
    table = np.loadtxt(path, delimiter=",")
    assert table[:, 0].tolist() == list(range(50))
    assert np.array_equal(table[:, 1:].astype(np.float32), probs)


def test_predictions_are_written_like_the_example_in_medmnist(tmp_path):
    probs = np.array([[0.125, 0.275, 0.5, 0.1, 0, 0, 0, 0, 0]], dtype=np.float32)
    path = Evaluation.save_predictions(tmp_path, probs, {"auc": None, "accuracy": 1.0}, "3")
    assert path.name == "pathmnist_test_[AUC]nan_[ACC]1.000@3.csv"
    assert path.read_text() == "0,0.125,0.275,0.5,0.1,0.0,0.0,0.0,0.0,0.0\n"


def test_predictions_outlive_a_full_disk(tmp_path, monkeypatch):
    probs = np.eye(9, dtype=np.float32)
    path = Evaluation.save_predictions(tmp_path, probs, {"auc": 1.0, "accuracy": 1.0}, "run")
    before = path.read_bytes()

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="free some space"):
        Evaluation.save_predictions(tmp_path, probs[::-1], {"auc": 1.0, "accuracy": 1.0}, "run")
    assert path.read_bytes() == before


# ---- figures ------------------------------------------------------------------------------------


def drawn_texts(figure: Figure) -> list[Text]:
    """Render the figure; return the texts that were really drawn."""
    texts, draw = [], Text.draw

    def record(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip():
            texts.append(self)
        return draw(self, renderer, *args, **kwargs)

    with patch.object(Text, "draw", record):
        FigureCanvasAgg(figure).draw()
    return texts


def check_legible(figure: Figure) -> list[str]:
    """Assert that no drawn text is cut off, tiny or on another text; return the texts."""
    texts = drawn_texts(figure)
    boxes = [text.get_window_extent() for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        said = text.get_text()
        assert text.get_fontsize() >= 9, said
        assert box.x0 >= 0 and box.y0 >= 0, f"{said!r} is cut off"
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, f"{said!r} is cut off"
    for (one, box1), (other, box2) in combinations(zip(texts, boxes, strict=True), 2):
        clear = box1.padded(-1), box2.padded(-1)
        assert not clear[0].overlaps(clear[1]), f"{one.get_text()!r} on {other.get_text()!r}"
    return [text.get_text() for text in texts]


def test_the_check_of_legibility_sees_faults():
    for spot, other in (((0.5, 0.5), (0.51, 0.5)), ((0.5, 0.5), (0.99, 0.2))):
        figure = Figure()
        figure.text(*spot, "one text")
        figure.text(*other, "another text")
        with pytest.raises(AssertionError, match=r"on 'another|is cut off"):
            check_legible(figure)


def make_history(epochs: int) -> list[dict]:
    keys = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_auc", "lr")
    return [
        {"epoch": e, **{key: (i + 1) / e for i, key in enumerate(keys)}}
        for e in range(1, epochs + 1)
    ]


def make_images(n: int, size: int = 28) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(n, size, size, 3), dtype=np.uint8)


PROBS, LABELS = make_probs(60)
RESULT = Evaluation.compute_metrics(PROBS, LABELS)
FULL_SIZE = np.diag([1338, 847, 339, 634, 1035, 592, 741, 421, 1233]) + 12  # as the official test
FIGURES = {
    "curves": lambda note: Evaluation.learning_curves(make_history(60), 41, note=note),
    "curves of one epoch": lambda note: Evaluation.learning_curves(make_history(1), 1, note=note),
    "confusion": lambda note: Evaluation.confusion_figure(FULL_SIZE, note=note),
    "per class": lambda note: Evaluation.per_class_figure(RESULT, note=note),
    "correct": lambda note: Evaluation.examples_figure(
        make_images(60), LABELS, PROBS, True, note=note
    ),
    "incorrect": lambda note: Evaluation.examples_figure(
        make_images(60, 64), LABELS, PROBS, False, n=3, note=note
    ),
    "none": lambda note: Evaluation.examples_figure(
        make_images(9), np.arange(9), np.eye(9), False, note=note
    ),
    "all NORM, 100 %": lambda note: Evaluation.examples_figure(
        make_images(8), np.full(8, 6), np.eye(9)[[6] * 8], True, note=note
    ),
    "reliability": lambda note: Evaluation.reliability_figure(PROBS, LABELS, note=note),
    "reliability of one image": lambda note: Evaluation.reliability_figure(
        np.eye(9)[:1], np.array([3]), note=note
    ),
    "reliability, full size": lambda note: Evaluation.reliability_figure(
        np.repeat(PROBS, 120, axis=0), np.repeat(LABELS, 120), note=note
    ),
    "confidence": lambda note: Evaluation.confidence_figure(PROBS, LABELS, note=note),
    "confidence, none wrong": lambda note: Evaluation.confidence_figure(
        np.eye(9), np.arange(9), note=note
    ),
    "augmentation": lambda note: Evaluation.augmentation_figure(
        make_images(8), make_images(8) / 200 - 0.1, note=note
    ),
    "Grad-CAM of one tile without label": lambda note: Evaluation.gradcam_figure(
        make_images(1, 224), np.ones((1, 224, 224)), None, PROBS[:1], note=note
    ),
    "Grad-CAM": lambda note: Evaluation.gradcam_figure(
        make_images(8), np.ones((8, 28, 28)), np.full(8, 6), np.eye(9)[[6] * 4 + [1] * 4], note=note
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_legible_and_shows_the_note(name):
    figure = FIGURES[name](NOTE)
    check_legible(figure)
    assert figure.get_suptitle().replace("\n", " ").endswith(NOTE)
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert FIGURES[name]("").get_suptitle().count("\n") == 0


def test_figures_leave_the_settings_alone():
    before = dict(matplotlib.rcParams)
    FIGURES["confusion"]("")
    assert dict(matplotlib.rcParams) == before


def test_learning_curves_of_one_epoch_name_no_other():
    for axes in Evaluation.learning_curves(make_history(1), 1).axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_learning_curves_content():
    history = make_history(5)
    loss, accuracy, rate = Evaluation.learning_curves(history, 4).axes
    for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
        train, val, best = axes.lines
        assert train.get_ydata().tolist() == [row[f"train_{key}"] for row in history]
        assert val.get_ydata().tolist() == [row[f"val_{key}"] for row in history]
        assert train.get_xdata().tolist() == [1, 2, 3, 4, 5]
        assert best.get_xdata() == [4, 4]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train", "val"]
    assert rate.lines[0].get_ydata().tolist() == [row["lr"] for row in history]


def test_confusion_content():
    (axes,) = Evaluation.confusion_figure(FULL_SIZE).axes
    texts = {tuple(map(int, t.get_position())): t.get_text() for t in axes.texts}
    assert len(texts) == 81
    assert texts[0, 0] == "1350\n93%"
    assert texts[8, 2] == "12\n3%"  # column 8, row 2: 12 of 447
    assert [t.get_text() for t in axes.get_xticklabels()] == list(SHORT_NAMES)
    assert [t.get_text() for t in axes.get_yticklabels()] == list(SHORT_NAMES)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    empty = Evaluation.confusion_figure(np.zeros((9, 9), dtype=int)).axes[0]
    assert {t.get_text() for t in empty.texts} == {"0"}


def test_per_class_content():
    (axes,) = Evaluation.per_class_figure(RESULT).axes
    rows = RESULT["per_class"].values()
    for bars, key in zip(axes.containers, ("precision", "recall"), strict=True):
        assert bars.get_label() == key
        assert [bar.get_width() for bar in bars] == [row[key] for row in rows]
    ticks = [t.get_text() for t in axes.get_yticklabels()]
    assert ticks == [f"{s}  n={r['support']}" for s, r in zip(SHORT_NAMES, rows, strict=True)]


@pytest.mark.parametrize("correct", [True, False])
def test_examples_content(correct):
    images = make_images(60)
    figure = Evaluation.examples_figure(images, LABELS, PROBS, correct, n=4, seed=1)
    candidates = np.flatnonzero((PROBS.argmax(axis=1) == LABELS) == correct)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 4
    for axes in shown:
        pixels = np.asarray(axes.images[0].get_array())
        (index,) = [i for i in candidates if np.array_equal(images[i], pixels)]
        guess = PROBS[index].argmax()
        assert axes.get_title(loc="left") == (
            f"true {SHORT_NAMES[LABELS[index]]}\n"
            f"pred. {SHORT_NAMES[guess]} {PROBS[index, guess]:.0%}"
        )
    assert f"{len(candidates)} of 60 images" in figure.get_supxlabel()


def test_examples_are_of_every_class():
    labels = np.repeat(np.arange(9), [300, *[1] * 8])
    figure = Evaluation.examples_figure(make_images(308), labels, np.eye(9)[labels], True)
    shown = [axes.get_title(loc="left").split()[1] for axes in figure.axes if axes.get_visible()]
    assert shown == ["ADI"] * 4 + list(SHORT_NAMES[1:])


def test_the_commonest_confusions_come_first():
    labels = np.array([0, 0, 0, 0, 4, 4, 4, 8])  # all called BACK but one MUC, called TUM
    guesses = np.array([1, 1, 1, 1, 1, 1, 8, 1])
    for seed in range(5):
        figure = Evaluation.examples_figure(
            make_images(8), labels, np.eye(9)[guesses], False, n=2, seed=seed
        )
        shown = [axes.get_title(loc="left").split() for axes in figure.axes if axes.get_visible()]
        assert [(title[1], title[3]) for title in shown] == [("ADI", "BACK"), ("MUC", "BACK")]


def test_examples_without_any():
    figure = FIGURES["none"]("")
    assert "No image was incorrectly classified." in check_legible(figure)
    assert not any(axes.get_visible() for axes in figure.axes)


def test_reliability_content():
    figure = Evaluation.reliability_figure(
        confident([0, 0, 0], [0.9, 0.9, 0.5]), np.array([0, 1, 0])
    )
    upper, lower = figure.axes
    assert figure.get_suptitle() == "Reliability: ECE 0.433"  # (2 * 0.4 + 1 * 0.5) / 3
    assert [bar.get_height() for bar in upper.patches] == [0] * 7 + [1] + [0] * 5 + [0.5, 0]
    assert [bar.get_height() for bar in lower.patches] == [0] * 7 + [1] + [0] * 5 + [2, 0]
    assert [t.get_text() for t in lower.texts if t.get_text()] == ["1", "2"]


def test_confidence_content():
    figure = Evaluation.confidence_figure(
        confident([0, 0, 0], [0.91, 0.92, 0.52]), np.array([0, 1, 0])
    )
    right, wrong = figure.axes
    assert (right.get_title(loc="left"), wrong.get_title(loc="left")) == (
        "right (n=2)",
        "wrong (n=1)",
    )
    assert [bar.get_height() for bar in right.patches] == [0] * 10 + [1] + [0] * 7 + [1, 0]
    assert [bar.get_height() for bar in wrong.patches] == [0] * 18 + [1, 0]


def test_pairs_content():
    images = make_images(2)
    augmented = images / 255 * 1.5 - 0.2
    axes = Evaluation.augmentation_figure(images, augmented).axes[1]
    pixels = np.asarray(axes.images[0].get_array())
    assert pixels.shape == (28, 57, 3)
    assert pixels[:, :28] == pytest.approx(images[1] / 255)
    assert pixels[:, 29:] == pytest.approx(augmented[1].clip(0, 1))


def test_gradcam_figure_content():
    images, heat = make_images(2), np.zeros((2, 28, 28))
    heat[1] = 1
    figure = Evaluation.gradcam_figure(images, heat, np.array([0, 0]), np.eye(9)[[0, 7]])
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles == ["true ADI\npred. ADI 100%", "true ADI\npred. STR 100%"]
    (axes,) = Evaluation.gradcam_figure(images[:1], heat[:1], None, np.eye(9)[[7]]).axes
    assert axes.get_title(loc="left") == "pred. STR 100%"
    grey = (images / 255).mean(axis=3, keepdims=True)
    for axes, image, colour in zip(figure.axes, grey, (0.0, 1.0), strict=False):
        pixels = np.asarray(axes.images[0].get_array())
        expected = 0.5 * image + 0.5 * np.array(matplotlib.colormaps["viridis"](colour)[:3])
        assert pixels[:, 29:] == pytest.approx(expected)


def test_import_needs_neither_torch_nor_matplotlib_nor_sklearn():
    code = "import sys, Evaluation; print({'torch', 'matplotlib', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# ---- Grad-CAM -----------------------------------------------------------------------------------


class ColourNet(nn.Module):
    """Says 0, 1 or 2 for red, green or blue patches wherever they are, by hand-set weights."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 3, 4, stride=4)
        self.head = nn.Linear(3, 9)
        with torch.no_grad():
            mix = 1.5 * torch.eye(3) - 0.5  # own colour minus half of the other two
            self.features.weight[:] = mix[:, :, None, None] / 16
            self.features.bias.zero_()
            self.head.weight.zero_()
            self.head.weight[:3] = mix
            self.head.bias.zero_()

    def forward(self, images):
        return self.head(self.features(images).relu().mean(dim=(2, 3)))


CORNERS = {
    "upper left": (0, 0),
    "upper right": (0, 20),
    "lower left": (20, 0),
    "lower right": (20, 20),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("label", [0, 1, 2])
def test_grad_cam_finds_planted_evidence(corner, label):
    row, column = CORNERS[corner]
    image = torch.full((1, 3, 28, 28), 0.5)
    other = (label + 1) % 3
    for colour, (y, x), strength in (
        (label, (row, column), 1.0),
        (other, (20 - row, 20 - column), 0.8),
    ):
        image[0, :, y : y + 8, x : x + 8] = 0
        image[0, colour, y : y + 8, x : x + 8] = strength
    model = ColourNet()
    (heat,) = Evaluation.grad_cam(model, image, model.features)
    assert heat.shape == (28, 28)
    assert heat[row : row + 8, column : column + 8].sum() > 0.8 * heat.sum()
    assert heat.max() == pytest.approx(1)
    # Asked for the other colour, it points to the opposite corner.
    (heat,) = Evaluation.grad_cam(model, image, model.features, classes=np.array([other]))
    assert heat[20 - row : 28 - row, 20 - column : 28 - column].sum() > 0.8 * heat.sum()


def test_grad_cam_is_the_papers_formula():
    torch.manual_seed(0)
    model = ColourNet()
    images = torch.rand(2, 3, 28, 28)
    activation = model.features(images)
    # logit = head of the mean over 49 positions of relu(activation), so the gradient is
    # head / 49 where the activation is positive.
    weight = (activation > 0).float().mean(dim=(2, 3)) / 49 * model.head.weight[[2, 0]]
    weight = weight[:, :, None, None]
    heat = (weight * activation).sum(1, keepdim=True).relu()
    heat = nn.functional.interpolate(heat, (28, 28), mode="bilinear")[:, 0]
    expected = heat / heat.amax((1, 2), keepdim=True)
    result = Evaluation.grad_cam(model, images, model.features, torch.tensor([2, 0]))
    assert result == pytest.approx(expected.detach().numpy(), abs=1e-6)


def test_grad_cam_of_an_image_without_evidence_is_zero():
    model = ColourNet()
    assert not Evaluation.grad_cam(model, torch.zeros(2, 3, 28, 28), model.features).any()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layer", ["stage2", "stage3"])
def test_grad_cam_leaves_the_model_alone(frozen, layer):
    torch.manual_seed(0)
    model = SkipCNN().requires_grad_(not frozen).train()
    model.stage1.eval()  # a mixture of modes has to survive too
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(3, 3, 28, 28)
    with torch.no_grad():
        heat = Evaluation.grad_cam(model, images, getattr(model, layer))
    assert heat.shape == (3, 28, 28)
    assert heat.dtype == np.float32
    assert heat.min() >= 0 and heat.max() == pytest.approx(1)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert images.grad is None and not images.requires_grad


ENDS = ("image", "logits")


def test_architecture_figure_shows_where_the_skip_connection_joins():
    figure = Evaluation.architecture_figure(layer_table(SkipCNN()), "SkipCNN")
    check_legible(figure)
    texts = [text.get_text().replace("\n", " ") for text in figure.axes[0].texts]
    at_the_stages = ("Conv 1x1", "add", "Conv 3x3, BatchNorm, ReLU, Conv 3x3, BatchNorm")
    assert [t for t in texts if t.startswith(at_the_stages)] == 3 * [
        "Conv 1x1",
        "add, ReLU",
        at_the_stages[2],
    ]
    (top,), (bottom,) = ([t for t in figure.axes[0].texts if t.get_text() == end] for end in ENDS)
    assert top.get_position()[1] > 0 > bottom.get_position()[1]
    assert "Linear 128, ReLU, Dropout, Linear 9" in [t.get_text() for t in figure.axes[0].texts]
    other = Evaluation.architecture_figure(layer_table(ResNet18()), "ResNet18")
    check_legible(other)
    assert "12 layers" in [text.get_text() for text in other.axes[0].texts]
    assert "Orange" not in other.get_supxlabel()
