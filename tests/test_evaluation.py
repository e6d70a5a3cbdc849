"""Evaluation.py and Figures.py against scikit-learn, worked examples, a published result."""

import io
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
from conftest import ROOT, SHARED
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy.special import log_softmax, softmax
from scipy.stats import binom
from sklearn import metrics as sk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import Evaluation
import Figures
from Common import CLASS_NAMES, SHORT_NAMES
from MyModels import ResNet18, SkipCNN, layer_table

REFERENCE = SHARED / "reference_predictions.npz"
pytestmark = pytest.mark.filterwarnings("error")


def make_probs(n: int, classes: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 probs (n, 9) that are often right, and labels (n,) below `classes`."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=n)
    logits = rng.normal(0, 1.5, (n, 9))
    logits[np.arange(n), labels] += 3
    return softmax(logits, axis=1).astype(np.float32), labels


def confident(guesses: list[int], confidences: list[float]) -> np.ndarray:
    """Return probs with the given largest entry, the rest spread evenly."""
    probs = np.repeat((1 - np.array(confidences)[:, None]) / 8, 9, axis=1)
    probs[np.arange(len(guesses)), guesses] = confidences
    return probs


@pytest.mark.parametrize("present", [9, 3])  # what is absent is left out of the means
def test_metrics_equal_sklearn(present: int) -> None:
    probs, labels = make_probs(500, present)
    pair, macro = (labels, probs.argmax(axis=1)), {"labels": range(present), "average": "macro"}
    assert len(set(pair[1])) == 9  # absent classes are predicted all the same
    expected = {
        "accuracy": sk.accuracy_score(*pair),
        "auc": np.mean([sk.roc_auc_score(labels == c, probs[:, c]) for c in range(present)]),
        "macro_f1": sk.f1_score(*pair, **macro),
        "balanced_accuracy": sk.recall_score(*pair, **macro),
        "loss": sk.log_loss(labels, probs, labels=range(9)),
    }
    result = Evaluation.compute_metrics(probs, labels)
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert result["confusion_matrix"] == sk.confusion_matrix(*pair, labels=range(9)).tolist()
    scores = sk.precision_recall_fscore_support(*pair, labels=range(9), zero_division=0)
    for name, theirs in zip(CLASS_NAMES, np.transpose(scores), strict=True):
        assert list(result["per_class"][name].values()) == pytest.approx(theirs)
    losses = -np.log(probs[np.arange(500), labels])
    quick = Evaluation.validation_metrics(probs, labels)
    assert quick["loss_se"] == pytest.approx(losses.std() / 500**0.5, rel=1e-4)
    recall = [*scores[1][:present], *[np.nan] * (9 - present)]
    assert quick["recall"] == pytest.approx(recall, nan_ok=True)


def test_published_result() -> None:
    if not REFERENCE.exists():
        pytest.skip(f"needs {REFERENCE}")
    with np.load(REFERENCE) as file:
        scores, labels = file["log_scores"].astype(np.float64), file["targets"].astype(np.int64)
    result = Evaluation.compute_metrics(softmax(scores, axis=1), labels)
    assert (round(result["accuracy"], 5), round(result["auc"], 5)) == (0.90752, 0.99269)


def test_worked_example() -> None:
    # Truth 0 0 1 1, said 0 1 1 1: recall 1/2 and 1, precision 1 and 2/3, F1 2/3 and 4/5.
    probs = confident([0, 1, 1, 1], [0.9, 0.9, 0.5, 0.5])
    result = Evaluation.compute_metrics(probs, np.array([0, 0, 1, 1]))
    assert result["balanced_accuracy"] == 0.75
    assert result["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert result["loss"] == pytest.approx(-np.log([0.9, 0.1 / 8, 0.5, 0.5]).mean())
    assert result["confusion_matrix"][0][:3] == [1, 1, 0]
    # Class 0: scores .9, .0125 against .0625 twice: 2 of 4 pairs in order; class 1 likewise.
    assert result["auc"] == 0.5
    assert result["ece"] == pytest.approx((2 * (0.9 - 1 / 2) + 2 * (1 - 0.5)) / 4)  # two bins
    # 0.6 = 9/15 shares the bin of 0.55: accuracy 1/2, mean confidence 0.575.
    closed = confident([0, 0], [0.6, 0.55])
    assert Evaluation.expected_calibration_error(closed, np.array([1, 0])) == pytest.approx(0.075)
    # The bootstrap's interval is the binomial one.
    probs = confident([0] * 360 + [1] * 40, [0.9] * 400)
    interval = Evaluation.compute_metrics(probs, np.zeros(400, int))["accuracy_ci95"]
    assert interval == pytest.approx(binom.ppf([0.025, 0.975], 400, 0.9) / 400, abs=1.5 / 400)


def test_probabilities_that_underflow_or_diverge() -> None:
    probs, labels = np.eye(9, dtype=np.float32), np.arange(9)
    loss = Evaluation.validation_metrics(probs[::-1], labels)["loss"]
    assert loss == pytest.approx(8 / 9 * -np.log(1e-37), rel=1e-6)
    diverged = Evaluation.validation_metrics(probs * np.nan, labels)
    assert np.isnan([diverged["loss"], diverged["auc"]]).all()


def test_one_image() -> None:
    for guess, right in ((2, 1), (5, 0)):
        result = Evaluation.compute_metrics(confident([guess], [0.8]), np.array([2]))
        assert (result["accuracy"], result["auc"], result["macro_f1"]) == (right, None, right)
        assert result["ece"] == pytest.approx(0.2 if right else 0.8)
        assert result["accuracy_ci95"] == [right, right]
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert {type(row["support"]) for row in result["per_class"].values()} == {int}
        assert "|      1 |" in (table := Evaluation.results_markdown({"test": result}))
        assert "none" in table


@pytest.mark.parametrize("true", [0.5, 1, 1.8])
def test_temperature_of_many_images_is_the_true_one(true: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 9))
    labels = (logits / true + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn as they say
    probs = softmax(logits, axis=1).astype(np.float32)
    assert Evaluation.fit_temperature(probs, labels) == pytest.approx(true, rel=0.02)
    assert Evaluation.with_temperature(probs, true) == pytest.approx(softmax(logits / true, axis=1))


@pytest.mark.parametrize("n, guess", [(1, 0), (1, 1), (5, 0), (200, 0)])
def test_temperature_of_few_images_is_held_near_1(n: int, guess: int) -> None:
    probs, log_t = confident([guess], [0.9]), np.linspace(-2, 2, 40_001)
    likelihood = n * log_softmax(np.log(probs) / np.exp(log_t)[:, None], axis=1)[:, 0]
    expected = np.exp(log_t[np.argmax(likelihood - log_t**2 / (2 * 0.5**2))])
    fitted = Evaluation.fit_temperature(probs.repeat(n, axis=0), np.zeros(n, int))
    assert fitted == pytest.approx(expected, rel=1e-3) and 0.5 < fitted < 1.6


def test_results_are_written_as_medmnist_reads_them(tmp_path: Path) -> None:
    probs, run_dir = np.array([[0.125, 0.1, 0]], dtype=np.float32), tmp_path / "v1.0"
    run_dir.mkdir()
    for auc, said in ((None, "nan"), (0.98765, "0.988")):  # the second replaces the first
        results = {"test": {"auc": auc, "accuracy": 0.9}, "dataset": {"size": 64}}
        Evaluation.write_results(run_dir, results, probs)
        assert json.loads((run_dir / "metrics.json").read_text()) == results
        (path,) = run_dir.glob("*.csv")
        assert path.name == f"pathmnist_64_test_[AUC]{said}_[ACC]0.900@v1_0.csv"
    assert path.read_text() == "0,0.125,0.1,0.0\n"  # the shortest digits that read back the same


def check_legible(figure: Figure) -> list[str]:
    """Assert that no drawn text is cut off, tiny or on another text; return the texts."""
    with patch.object(Text, "draw", autospec=True, side_effect=Text.draw) as draw:
        figure.draw_without_rendering()
    drawn = [call.args[0] for call in draw.call_args_list]
    texts = [text for text in drawn if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert min(text.get_fontsize() for text in texts) >= 9
    for said, box in boxes:  # cut off?
        assert box.x0 >= 0 <= box.y0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, said
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), f"{one!r} on {other!r}"
    return [said.replace("\n", " ") for said, _ in boxes]


def curves(epochs: int, best: int, note: str = "") -> Figure:
    keys = ("epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr")
    rows = [(e, 1 / e, 2 / e, 3 / e, 4 / e, 5 / e) for e in range(1, epochs + 1)]
    history = [dict(zip(keys, row, strict=True)) for row in rows]
    return Figures.learning_curves(history, best, "synthetic" if note else "")


def reliability(probs: np.ndarray, labels: np.ndarray, note: str = "") -> Figure:
    ece = Evaluation.expected_calibration_error(probs, labels)
    return Figures.reliability_figure(*Evaluation.reliability_bins(probs, labels), ece, note)


def titles(figure: Figure) -> list[str]:
    return [a.get_title(loc="left").replace("\n", " ") for a in figure.axes if a.get_visible()]


PROBS, LABELS = make_probs(60)
FULL_SIZE = np.diag([1338, 847, 339, 634, 1035, 592, 741, 421, 1233]) + 12  # as the official test
TILES = np.random.default_rng(0).integers(256, size=(308, 28, 28, 3), dtype=np.uint8)
SURE, HEAT = np.eye(9)[[6] * 4 + [1] * 4], np.ones((8, 28, 28))
examples, gradcam = Figures.examples_figure, Figures.gradcam_figure
FIGURES = {
    "curves": lambda note: curves(60, 41, note),
    "curves of one epoch": lambda note: curves(1, 1, note),
    "confusion": lambda note: Figures.confusion_figure(FULL_SIZE, note),
    "per class": lambda n: Figures.per_class_figure(Evaluation.compute_metrics(PROBS, LABELS), n),
    "incorrect": lambda note: examples(TILES[:60], LABELS, PROBS, False, note),
    "none": lambda note: examples(TILES[:9], np.arange(9), np.eye(9), False, note),
    "all NORM, 100 %": lambda note: examples(TILES[:4], np.full(4, 6), SURE[:4], True, note),
    "reliability": lambda n: reliability(np.repeat(PROBS, 120, 0), np.repeat(LABELS, 120), n),
    "reliability of one": lambda note: reliability(np.eye(9)[:1], np.array([3]), note),
    "augmentation": lambda note: Figures.augmentation_figure(TILES[:8], TILES[:8] / 200, note),
    "unknown tile": lambda note: gradcam(TILES[:1], HEAT[:1], [None], SURE[:1], note),
    "Grad-CAM": lambda note: gradcam(TILES[:8], HEAT, [6] * 8, SURE, note),
    "tiles": lambda note: Figures.predictions_figure(TILES[:8], SURE, None, note),
    "explained tiles": lambda note: Figures.predictions_figure(TILES[:8], SURE, HEAT, note),
}
DARK = {"text.usetex": True, "text.color": "white", "font.size": 20, "figure.dpi": 60}
DARK |= {f"{part}.facecolor": "black" for part in ("figure", "axes", "savefig")}
DARK |= {"savefig.dpi": 70, "savefig.bbox": "tight", "savefig.transparent": True}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_legible_whatever_the_users_settings(name: str, tmp_path: Path) -> None:
    note = Figures.data_note("synthetic")
    for kind, settings in (("plain", {}), ("theirs", DARK)):
        with matplotlib.rc_context(settings):
            figure = FIGURES[name](f"test split, {note}")
            Evaluation.save_figures(tmp_path, {kind: figure})
            assert settings.items() <= matplotlib.rcParams.items()
    assert len({path.read_bytes() for path in tmp_path.glob("figures/*.png")}) == 1
    assert note in figure.get_suptitle() and "\n" not in FIGURES[name]("").get_suptitle()
    check_legible(figure)


def test_a_run_needs_no_backend_and_obeys_no_matplotlibrc(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("\n".join(f"{k}: {v}" for k, v in DARK.items()))
    backend = "module://matplotlib_inline.backend_inline"  # every notebook's; not installed here
    env = os.environ | {"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path)}
    command = [sys.executable, "PathMNIST.py", "--data", tiny, "--epochs", "1", "--device", "cpu"]
    subprocess.run([*command, "--log-dir", tmp_path, "--name", "a"], check=True, cwd=ROOT, env=env)
    run_dir = tmp_path / "a"
    assert len(list(run_dir.glob("figures/*.png"))) == 9
    log = EventAccumulator(str(run_dir)).Reload().Images("Confusion/val by epoch")
    matrix = json.loads((run_dir / "metrics.json").read_text())["val"]["confusion_matrix"]
    saved, logged = run_dir / "figures/confusion_val.png", io.BytesIO(log[0].encoded_image_string)
    for note, file in (("val split", saved), ("val, epoch 1", logged)):
        Figures.save(Figures.confusion_figure(matrix, note), ours := io.BytesIO())
        assert np.array_equal(Image.open(file), Image.open(ours)), note


def test_content_of_figures() -> None:
    loss, accuracy, rate = curves(2, 2).axes
    drawn = [line.get_ydata() for axes in (loss, accuracy) for line in axes.lines[:2]]
    assert np.array_equal(drawn, [[1, 0.5], [2, 1], [3, 1.5], [4, 2]])
    assert [line.get_label() for line in loss.lines[:2]] == ["train", "val"]
    assert loss.lines[2].get_xdata() == [2, 2] and rate.lines[0].get_ydata().tolist() == [5, 2.5]

    (axes,) = Figures.confusion_figure(FULL_SIZE).axes
    texts = {tuple(map(int, t.get_position())): t.get_text() for t in axes.texts}
    assert (len(texts), texts[0, 0], texts[8, 2]) == (81, "1350\n93%", "12\n3%")  # 12 of 447
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    few = np.diag([990] * 9)
    few[0, 1:3] = 4, 6  # of 1,000: a percentage that rounds to 0 is left out
    (axes,) = Figures.confusion_figure(few).axes
    assert [text.get_text() for text in axes.texts[:4]] == ["990\n99%", "4", "6\n1%", "0"]

    figure = reliability(confident([0, 0, 0], [0.9, 0.9, 0.5]), np.array([0, 1, 0]))
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights == [[0] * 7 + [1] + [0] * 5 + [0.5, 0], [0] * 7 + [1] + [0] * 5 + [2, 0]]
    assert figure.get_suptitle() == "Reliability: ECE 0.433"  # (2 * 0.4 + 1 * 0.5) / 3

    figure = gradcam(TILES[:2], HEAT[:2], [0, 0], np.eye(9)[[0, 7]])
    assert titles(figure) == ["true ADI pred. ADI 100%", "true ADI pred. STR 100%"]
    assert titles(FIGURES["unknown tile"]("")) == ["pred. NORM 100%"]
    shown, yellow = np.asarray(figure.axes[1].images[0].get_array()), [0.993, 0.906, 0.144]
    assert shown[:, :28] == pytest.approx(TILES[1] / 255)
    grey = TILES[1].mean(axis=2, keepdims=True) / 255
    assert shown[:, 29:] == pytest.approx((grey + yellow) / 2, abs=1e-3)

    figure = Figures.predictions_figure(TILES[:60], PROBS, None)
    order = np.argsort(PROBS.max(axis=1))[:50]  # the least certain first
    for title, axes, i in zip(titles(figure), figure.axes[:50], order, strict=True):
        assert title.endswith(f"{SHORT_NAMES[PROBS[i].argmax()]} {PROBS[i].max():.0%}")
        assert np.array_equal(axes.images[0].get_array(), TILES[i] / 255)


@pytest.mark.parametrize("correct", [True, False])
def test_examples_are_what_their_titles_say(correct: bool) -> None:
    figure = examples(TILES[:60], LABELS, PROBS, correct)
    candidates = np.flatnonzero((PROBS.argmax(axis=1) == LABELS) == correct)
    assert f"{len(candidates)} of 60 images" in figure.get_supxlabel()
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.get_visible()]
    assert len(shown) == min(12, len(candidates))
    for title, tile in zip(titles(figure), shown, strict=True):
        (index,) = [i for i in candidates if np.array_equal(TILES[i], tile)]
        true, guess = SHORT_NAMES[LABELS[index]], SHORT_NAMES[PROBS[index].argmax()]
        assert title == f"true {true} pred. {guess} {PROBS[index].max():.0%}"


def test_examples_are_of_every_class_and_of_the_commonest_confusions() -> None:
    labels = np.repeat(np.arange(9), [300, *[1] * 8])
    figure = examples(TILES, labels, np.eye(9)[labels], True)
    assert [title.split()[1] for title in titles(figure)] == ["ADI"] * 4 + list(SHORT_NAMES[1:])
    pairs = [(1 + i // 6, i % 6 + 3) for i in range(12)] * 2 + [(0, 1)]  # twelve twice, one once
    labels, guesses = np.array(pairs).T
    figure = examples(TILES[:25], labels, np.eye(9)[guesses], False)
    assert len(set(titles(figure))) == 12 and "true ADI pred. BACK 100%" not in titles(figure)
    assert "No image was incorrectly classified." in check_legible(FIGURES["none"](""))


def test_architecture_shows_the_skip_connections() -> None:
    figure = Figures.architecture_figure(layer_table(SkipCNN(), 224), "SkipCNN")
    texts, main = check_legible(figure), "Conv 3x3, BatchNorm, ReLU, Conv 3x3, BatchNorm, ReLU"
    assert texts.count("Conv 1x1") == texts.count(main) == 3 and "Orange" in figure.get_supxlabel()
    assert "Linear 128, ReLU, Linear 9" in texts
    figure = Figures.architecture_figure(layer_table(ResNet18(), 28), "ResNet18")
    assert "12 layers" in check_legible(figure) and "Orange" not in figure.get_supxlabel()


class ColourNet(nn.Module):
    """Says 0, 1 or 2 for red, green or blue patches wherever they are, by hand-set weights."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 3, 4, stride=4, bias=False), nn.Linear(3, 9)
        mix = 1.5 * torch.eye(3) - 0.5  # own colour minus half of the other two
        self.features.weight.data[:] = mix[:, :, None, None] / 16
        self.head.weight.data[:] = torch.cat([mix, torch.zeros(6, 3)])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).relu().mean(dim=(2, 3)))

    def gradcam_layer(self, _size: int) -> nn.Module:
        return self.features


def test_grad_cam_is_the_papers_formula_and_finds_planted_evidence() -> None:
    model, images, spots = ColourNet(), TILES[:2] // 8 + 112, [np.s_[20:, :8], np.s_[:8, 20:]]
    for colour, spot in enumerate(spots):
        images[:, *spot] = 255 * np.eye(3)[colour]
    activation = model.features(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    # The logit's gradient is head / 49 where the activation is positive, of 49 positions.
    weight = (activation > 0).float().mean(dim=(2, 3)) / 49 * model.head.weight[[1, 0]]
    heat = (weight[:, :, None, None] * activation).sum(1, keepdim=True).relu()
    heat = nn.functional.interpolate(heat, (28, 28), mode="bilinear")[:, 0]
    expected = (heat / heat.amax((1, 2), keepdim=True)).detach().numpy()
    for each in (model, model.requires_grad_(False)):
        with torch.no_grad():
            heat = Evaluation.grad_cam(each, images, np.array([1, 0]))
        assert heat == pytest.approx(expected, abs=1e-6)
    assert all(h[s].sum() > 0.8 * h.sum() for h, s in zip(heat, spots[::-1], strict=True))
    assert all(weights.grad is None for weights in model.parameters())
    assert not Evaluation.grad_cam(model, np.zeros_like(images)).any()  # no evidence
