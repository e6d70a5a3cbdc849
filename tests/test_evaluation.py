"""Evaluation.py and Figures.py against worked examples and a published result."""

import json
import os
import subprocess
import sys
from itertools import combinations
from unittest.mock import patch

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from matplotlib.text import Text
from scipy.special import softmax
from torch import nn

import Evaluation
import Figures
from Common import SHORT_NAMES
from MyModels import SkipCNN, TissueModel, layer_table

REFERENCE = SHARED / "reference_predictions.npz"
pytestmark = pytest.mark.filterwarnings("error")


def make_probs(n):
    """Return float32 probs (n, 9) that are often right, and labels (n,)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(9, size=n)
    logits = rng.normal(0, 1.5, (n, 9))
    logits[np.arange(n), labels] += 3
    return softmax(logits, axis=1).astype(np.float32), labels


def confident(guesses, confidences):
    """Return probs with the given largest entry, the rest spread evenly."""
    probs = np.repeat((1 - np.array(confidences)[:, None]) / 8, 9, axis=1)
    probs[np.arange(len(guesses)), guesses] = confidences
    return probs


def test_published_result():
    if not REFERENCE.exists():
        pytest.skip(f"needs {REFERENCE}")
    with np.load(REFERENCE) as file:
        probs = softmax(file["log_scores"].astype(np.float64), axis=1)
        result = Evaluation.compute_metrics(probs, file["targets"].astype(np.int64))
    assert round(result["accuracy"], 5) == 0.90752
    assert round(result["auc"], 5) == 0.99269


def test_worked_example():
    # Truth 0 0 1 1, said 0 2 1 1. Means are over the two classes that have images.
    probs, labels = confident([0, 2, 1, 1], [0.9, 0.9, 0.5, 0.5]), np.array([0, 0, 1, 1])
    result = Evaluation.compute_metrics(probs, labels)
    assert result["balanced_accuracy"] == (1 / 2 + 1) / 2
    assert result["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["confusion_matrix"][0][:3] == [1, 0, 1]
    first = {"precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert result["per_class"]["adipose"] == first
    # Class 0: scores .9, .0125 against .0625 twice: 2 of 4 pairs in order; class 1: all of them.
    assert result["auc"] == (0.5 + 1) / 2
    assert result["ece"] == pytest.approx((2 * (0.9 - 1 / 2) + 2 * (1 - 0.5)) / 4)  # two bins
    for end in result["accuracy_ci95"]:  # Wilson: 3/4 lies 1.96 standard deviations from each end
        distance = abs(end - 3 / 4)
        assert distance == pytest.approx(1.96 * np.sqrt(end * (1 - end) / 4), rel=1e-4)
    losses = -np.log([0.9, 0.1 / 8, 0.5, 0.5])
    quick = Evaluation.validation_metrics(probs, labels)
    assert result["loss"] == quick["loss"] == pytest.approx(losses.mean())
    assert quick["loss_se"] == pytest.approx(losses.std() / 4**0.5)
    assert quick["recall"] == pytest.approx([0.5, 1] + [np.nan] * 7, nan_ok=True)


def test_probabilities_that_underflow_or_diverge():
    probs, labels = np.eye(9, dtype=np.float32), np.arange(9)
    loss = Evaluation.validation_metrics(probs[::-1], labels)["loss"]
    assert loss == pytest.approx(8 / 9 * -np.log(1e-37), rel=1e-6)
    diverged = Evaluation.validation_metrics(probs * np.nan, labels)
    assert np.isnan([diverged["loss"], diverged["auc"]]).all()


@pytest.mark.parametrize("guess, right", [(2, 1), (5, 0)])
def test_one_image(guess, right):
    result = Evaluation.compute_metrics(confident([guess], [0.8]), np.array([2]))
    assert (result["accuracy"], result["auc"], result["macro_f1"]) == (right, None, right)
    assert result["ece"] == pytest.approx(abs(right - 0.8))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    _header, row = Evaluation.result_texts({"test": result})
    assert row[:2] == ["test", "1"]
    assert row[3] == "none"  # the AUC


@pytest.mark.parametrize("true", [0.5, 1.8])
def test_temperature_of_many_images_is_the_true_one(true):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 9))
    labels = (logits / true + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn as they say
    probs = softmax(logits, axis=1).astype(np.float32)
    assert Evaluation.fit_temperature(probs, labels) == pytest.approx(true, rel=0.02)
    assert Evaluation.with_temperature(probs, true) == pytest.approx(softmax(logits / true, axis=1))


@pytest.mark.parametrize("n, label", [(1, 0), (1, 1), (200, 0)])
def test_temperature_of_few_images_is_held_near_1(n, label):
    fitted = Evaluation.fit_temperature(confident([0] * n, [0.9] * n), np.full(n, label))
    assert 0.5 < fitted < 1.6
    assert (fitted < 1) == (label == 0)  # who is right may be more certain


@pytest.mark.parametrize("auc, said", [(None, "nan"), (0.98765, "0.988")])
def test_predictions_are_written_as_medmnist_reads_them(tmp_path, auc, said):
    run_dir = tmp_path / "v1.0"
    run_dir.mkdir()
    notes = run_dir / "pathmnist_test_my_notes.csv"
    notes.write_text("mine")
    results = {"test": {"auc": auc, "accuracy": 0.9}, "dataset": {"size": 64}}
    Evaluation.write_predictions(run_dir, results, np.array([[0.125, 0.1, 0]], dtype=np.float32))
    path = run_dir / f"pathmnist_64_test_[AUC]{said}_[ACC]0.900@v1_0.csv"
    assert path.read_text() == "0,0.125,0.1,0.0\n"  # the shortest digits that read back the same
    assert notes.read_text() == "mine"


def check_legible(figure):
    """Assert that no drawn text is cut off, tiny or on another text; return the texts."""
    with patch.object(Text, "draw", autospec=True, side_effect=Text.draw) as draw:
        figure.draw_without_rendering()
    boxes = []
    for call in draw.call_args_list:
        text = call.args[0]
        if text.get_visible() and text.get_text().strip():
            assert text.get_fontsize() >= 9
            boxes.append((text.get_text(), text.get_window_extent()))
    for said, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0, f"{said!r} is cut off"
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, f"{said!r} is cut off"
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), f"{one!r} on {other!r}"
    return [said.replace("\n", " ") for said, _ in boxes]


def curves(epochs, kind=""):
    """Return learning curves that are told apart by their values."""
    keys = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr")
    history = []
    for epoch in range(1, epochs + 1):
        values = {key: number / epoch for number, key in enumerate(keys, start=1)}
        history.append({"epoch": epoch, **values})
    return Figures.learning_curves(history, epochs, kind)


def reliability(probs, labels, note=""):
    """Return the reliability diagram of these probabilities."""
    ece = Evaluation.expected_calibration_error(probs, labels)
    return Figures.reliability_figure(*Evaluation.reliability_bins(probs, labels), ece, note)


def titles(figure):
    """Return the titles of a figure's tiles, each on one line."""
    shown = [axes for axes in figure.axes if axes.get_visible()]
    return [axes.get_title(loc="left").replace("\n", " ") for axes in shown]


PROBS, LABELS = make_probs(60)
PER_CLASS = Evaluation.compute_metrics(PROBS, LABELS)
FULL_SIZE = np.diag([1338, 847, 339, 634, 1035, 592, 741, 421, 1233]) + 12  # as the official test
TILES = np.random.default_rng(0).integers(256, size=(308, 28, 28, 3), dtype=np.uint8)
NORMAL = np.eye(9)[[6] * 8]  # 100 % NORM: the longest titles
HEAT = np.ones((8, 28, 28))
MANY = (np.repeat(PROBS, 120, axis=0), np.repeat(LABELS, 120))
examples = Figures.examples_figure
gradcam = Figures.gradcam_figure
predictions = Figures.predictions_figure
FIGURES = {
    "curves": lambda note: curves(60, "synthetic" if note else ""),
    "confusion": lambda note: Figures.confusion_figure(FULL_SIZE, note),
    "per class": lambda note: Figures.per_class_figure(PER_CLASS, note),
    "incorrect": lambda note: examples(TILES[:60], LABELS, PROBS, False, note),
    "none": lambda note: examples(TILES[:9], np.arange(9), np.eye(9), False, note),
    "reliability": lambda note: reliability(*MANY, note),
    "augmentation": lambda note: Figures.augmentation_figure(TILES[:8], TILES[:8] / 200, note),
    "one Grad-CAM": lambda note: gradcam(TILES[:1], HEAT[:1], [None], NORMAL[:1], note),
    "Grad-CAM": lambda note: gradcam(TILES[:8], HEAT, [6] * 8, NORMAL, note),
    "explained tiles": lambda note: predictions(TILES[:8], ["W" * 20] * 8, NORMAL, HEAT, note),
}
DARK = {"text.usetex": True, "text.color": "white", "font.size": 20, "axes.facecolor": "black"}
DARK |= {"savefig.dpi": 70, "savefig.bbox": "tight"}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_legible_whatever_the_users_settings(name, tmp_path):
    note = Figures.data_note("synthetic")
    for kind, settings in (("plain", {}), ("theirs", DARK)):
        with matplotlib.rc_context(settings):
            figure = FIGURES[name](note)
            Evaluation.save_figures(tmp_path, {kind: figure})
    plain, theirs = sorted(tmp_path.glob("figures/*.png"))
    assert plain.read_bytes() == theirs.read_bytes()
    assert note in figure.get_suptitle()
    check_legible(figure)


@pytest.mark.parametrize("script", ["PathMNIST.py", "Predict.py", "analyze_data.py"])
def test_a_script_starts_in_a_notebook_of_another_environment(script):
    backend = "module://matplotlib_inline.backend_inline"  # every notebook's; not installed here
    env = {**os.environ, "MPLBACKEND": backend}
    subprocess.run([sys.executable, script, "--help"], check=True, cwd=ROOT, env=env)


def test_learning_curves_show_the_history():
    loss, accuracy, rate = curves(2).axes
    drawn = [line.get_ydata() for axes in (loss, accuracy) for line in axes.lines[:2]]
    assert np.array_equal(drawn, [[1, 0.5], [2, 1], [3, 1.5], [4, 2]])
    assert [line.get_label() for line in loss.lines[:2]] == ["train", "val"]
    assert loss.lines[2].get_xdata() == [2, 2]  # the best epoch
    assert rate.lines[0].get_ydata().tolist() == [5, 2.5]
    assert [curves(epochs).axes[0].get_yscale() for epochs in (2, 20)] == ["linear", "log"]


def test_confusion_figure_shows_counts_and_percentages_of_the_true_class():
    few = np.diag([990] * 9)
    few[0, 1:3] = 4, 6  # of 1,000: a percentage that rounds to 0 is left out
    (axes,) = Figures.confusion_figure(few).axes
    assert [text.get_text() for text in axes.texts[:4]] == ["990\n99%", "4", "6\n1%", "0"]


def test_reliability_figure_shows_accuracy_and_images_of_each_bin():
    figure = reliability(confident([0, 0, 0], [0.9, 0.9, 0.5]), np.array([0, 1, 0]))
    accuracy, images = ([bar.get_height() for bar in axes.patches] for axes in figure.axes)
    assert accuracy == [0] * 7 + [1] + [0] * 5 + [0.5, 0]
    assert images == [0] * 7 + [1] + [0] * 5 + [2, 0]
    assert figure.get_suptitle().endswith("ECE 0.433")  # (2 * 0.4 + 1 * 0.5) / 3


def test_gradcam_figure_lays_the_heatmap_over_the_grey_tile():
    figure = gradcam(TILES[:2], HEAT[:2], [0, 0], np.eye(9)[[0, 7]])
    assert titles(figure) == ["true ADI pred. ADI 100%", "true ADI pred. STR 100%"]
    assert titles(FIGURES["one Grad-CAM"]("")) == ["pred. NORM 100%"]
    shown = np.asarray(figure.axes[1].images[0].get_array())
    assert shown[:, :28] == pytest.approx(TILES[1] / 255)
    grey = TILES[1].mean(axis=2, keepdims=True) / 255
    yellow = [0.993, 0.906, 0.144]
    assert shown[:, 29:] == pytest.approx((grey + yellow) / 2, abs=1e-3)


def test_predictions_figure_shows_the_least_certain_first():
    figure = predictions(TILES[:60], [f"tile {index}" for index in range(60)], PROBS, None)
    order = np.argsort(PROBS.max(axis=1))[:50]
    for title, axes, index in zip(titles(figure), figure.axes[:50], order, strict=True):
        answer = f"{SHORT_NAMES[PROBS[index].argmax()]} {PROBS[index].max():.0%}"
        assert title == f"tile {index} {answer}"
        assert np.array_equal(axes.images[0].get_array(), TILES[index] / 255)


@pytest.mark.parametrize("correct", [True, False])
def test_examples_are_what_their_titles_say(correct):
    figure = examples(TILES[:60], LABELS, PROBS, correct)
    candidates = np.flatnonzero((PROBS.argmax(axis=1) == LABELS) == correct)
    assert f"{len(candidates)} of 60 images" in figure.get_supxlabel()
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.get_visible()]
    assert len(shown) == min(12, len(candidates))
    for title, tile in zip(titles(figure), shown, strict=True):
        (index,) = [i for i in candidates if np.array_equal(TILES[i], tile)]
        true, guess = SHORT_NAMES[LABELS[index]], SHORT_NAMES[PROBS[index].argmax()]
        assert title == f"true {true} pred. {guess} {PROBS[index].max():.0%}"


def test_examples_are_of_every_class_and_of_the_commonest_confusions():
    labels = np.repeat(np.arange(9), [300, *[1] * 8])
    figure = examples(TILES, labels, np.eye(9)[labels], True)
    assert [title.split()[1] for title in titles(figure)] == ["ADI"] * 4 + list(SHORT_NAMES[1:])
    common = [(1 + i // 6, i % 6 + 3) for i in range(12)]
    labels, guesses = np.array([*common, *common, (0, 1)]).T  # twelve of them twice, one once
    shown = titles(examples(TILES[:25], labels, np.eye(9)[guesses], False))
    assert len(set(shown)) == 12
    assert "true ADI pred. BACK 100%" not in shown
    assert "No image was incorrectly classified." in check_legible(FIGURES["none"](""))


def test_architecture_shows_the_skip_connections():
    figure = Figures.architecture_figure(layer_table(SkipCNN(), 224), "SkipCNN")
    texts = check_legible(figure)
    assert [text for text in texts if text.startswith("Conv 1x1")] == [
        f"Conv 1x1 ({width})" for width in (48, 96, 128)
    ]
    assert "Conv 3x3 (96), BatchNorm, ReLU, Conv 3x3 (96), BatchNorm, ReLU" in texts
    assert "Linear 128, ReLU, Linear 9" in texts


class ColourNet(TissueModel):
    """Says 0, 1 or 2 for red, green or blue patches wherever they are, by hand-set weights."""

    def __init__(self):
        super().__init__((0, 0, 0), (1, 1, 1))
        self.features = nn.Conv2d(3, 3, 4, stride=4, bias=False)
        self.head = nn.Linear(3, 9, bias=False)
        mix = 1.5 * torch.eye(3) - 0.5  # own colour minus half of the other two
        self.features.weight.data[:] = mix[:, :, None, None] / 16
        self.head.weight.data[:] = torch.cat([mix, torch.zeros(6, 3)])

    def logits(self, x):
        return self.head(self.features(x).relu().mean(dim=(2, 3)))

    def gradcam_layer(self, _size):
        return self.features


def test_grad_cam_finds_planted_evidence():
    image = np.zeros((28, 28, 3), dtype=np.uint8)
    image[20:, :8, 0] = 255  # red, bottom left: the evidence for class 0, and against 1
    image[:4, 16:, 1] = 255  # green, top right: the evidence for class 1, and against 0
    expected = torch.zeros(3, 1, 7, 7)
    expected[0, 0, 5:, :2] = 1
    expected[1, 0, 0, 4:] = 1  # and nothing speaks for class 2, blue
    expected = nn.functional.interpolate(expected, (28, 28), mode="bilinear")[:, 0]
    model = ColourNet().requires_grad_(False)
    with torch.no_grad():
        heat = Evaluation.grad_cam(model, np.stack([image] * 3), np.arange(3))
    assert heat == pytest.approx(expected.numpy(), abs=1e-6)
    (predicted,) = Evaluation.grad_cam(model, image[None])
    assert np.array_equal(predicted, heat[0])
