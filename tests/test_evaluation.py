"""Evaluation.py and Figures.py against scikit-learn, worked examples, a published result."""

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
from torch import Tensor, nn

import Evaluation
import Figures
from Common import CLASS_NAMES, SHORT_NAMES
from MyModels import ResNet18, SkipCNN, layer_table

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared" / "data" / "reference_predictions.npz"
pytestmark = pytest.mark.filterwarnings("error")


def make_probs(n: int, classes: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 probs (n, 9) that are often right, and labels (n,) below `classes`."""
    rng = np.random.default_rng(0)
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


def test_metrics_equal_sklearn() -> None:
    probs, labels = make_probs(500)
    predicted = probs.argmax(axis=1)
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "auc": sk.roc_auc_score(labels, probs, multi_class="ovr"),
        "macro_f1": sk.f1_score(labels, predicted, average="macro"),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "loss": sk.log_loss(labels, probs),
    }
    result = Evaluation.compute_metrics(probs, labels)
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert result["confusion_matrix"] == sk.confusion_matrix(labels, predicted).tolist()
    report = sk.classification_report(labels, predicted, target_names=CLASS_NAMES, output_dict=True)
    for name, ours in result["per_class"].items():
        theirs = {key.removesuffix("-score"): value for key, value in report[name].items()}
        assert ours == pytest.approx(theirs)
    losses = -np.log(probs[np.arange(500), labels])
    quick = Evaluation.validation_metrics(probs, labels)
    assert quick["loss_se"] == pytest.approx(losses.std() / 500**0.5, rel=1e-4)
    assert quick["recall"] == [result["per_class"][name]["recall"] for name in CLASS_NAMES]


def test_published_result() -> None:
    if not REFERENCE.exists():
        pytest.skip(f"needs {REFERENCE}")
    with np.load(REFERENCE) as file:
        scores, labels = file["log_scores"].astype(np.float64), file["targets"].astype(np.int64)
    probs = np.exp(scores - scores.max(axis=1, keepdims=True))
    result = Evaluation.compute_metrics(probs / probs.sum(axis=1, keepdims=True), labels)
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
    # Bin of .9: accuracy 1/2; bin of .5: accuracy 1.
    assert result["ece"] == pytest.approx((2 * 0.4 + 2 * 0.5) / 4)
    # 0.6 = 9/15 shares the bin of 0.55: accuracy 1/2, mean confidence 0.575.
    closed = confident([0, 0], [0.6, 0.55])
    assert Evaluation.expected_calibration_error(closed, np.array([1, 0])) == pytest.approx(0.075)
    # The bootstrap's interval is the binomial one.
    probs = confident([0] * 360 + [1] * 40, [0.9] * 400)
    interval = Evaluation.compute_metrics(probs, np.zeros(400, int))["accuracy_ci95"]
    assert interval == pytest.approx(binom.ppf([0.025, 0.975], 400, 0.9) / 400, abs=1.5 / 400)


def test_absent_classes_are_left_out_of_the_means() -> None:
    probs, labels = make_probs(200, classes=3)
    assert set(probs.argmax(axis=1)) > set(labels)  # absent classes are predicted all the same
    result = Evaluation.compute_metrics(probs, labels)
    one_by_one = [sk.roc_auc_score(labels == c, probs[:, c]) for c in range(3)]
    assert result["auc"] == pytest.approx(np.mean(one_by_one))
    rows = list(result["per_class"].values())
    assert result["balanced_accuracy"] == pytest.approx(np.mean([r["recall"] for r in rows[:3]]))
    assert result["macro_f1"] == pytest.approx(np.mean([r["f1"] for r in rows[:3]]))
    assert rows[8] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    recall = Evaluation.validation_metrics(probs, labels)["recall"]
    assert np.isnan(recall).tolist() == [False] * 3 + [True] * 6


def test_probabilities_that_underflow_or_diverge() -> None:
    probs, labels = np.eye(9, dtype=np.float32), np.arange(9)
    loss = Evaluation.validation_metrics(probs[::-1], labels)["loss"]
    assert loss == pytest.approx(8 / 9 * 87.33655, rel=1e-6)
    diverged = Evaluation.validation_metrics(probs * np.nan, labels)
    assert np.isnan([diverged["loss"], diverged["auc"]]).all()


def test_one_image() -> None:
    for guess, right in ((2, 1), (5, 0)):
        result = Evaluation.compute_metrics(confident([guess], [0.8]), np.array([2]))
        assert (result["accuracy"], result["auc"], result["macro_f1"]) == (right, None, right)
        assert result["ece"] == pytest.approx(0.2 if right else 0.8)
        assert result["accuracy_ci95"] == [right, right]
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert "none" in Evaluation.results_markdown({"test": result})


def test_results_are_written_as_medmnist_reads_them(tmp_path: Path) -> None:
    probs = np.array([[0.125, 0.1, 0]], dtype=np.float32)
    for auc, said in ((None, "nan"), (0.98765, "0.988")):  # the second replaces the first
        results = {"test": {"auc": auc, "accuracy": 0.9}, "dataset": {"size": 64}}
        Evaluation.write_results(tmp_path, results, probs)
        assert json.loads((tmp_path / "metrics.json").read_text()) == results
        (path,) = tmp_path.glob("*.csv")
        assert path.name == f"pathmnist_64_test_[AUC]{said}_[ACC]0.900@{tmp_path.name}.csv"
    assert path.read_text() == "0,0.125,0.1,0.0\n"  # the shortest digits that read back the same


def check_legible(figure: Figure) -> list[str]:
    """Assert that no drawn text is cut off, tiny or on another text; return the texts."""
    texts, draw = [], Text.draw

    def record(self: Text, *args: object, **options: object) -> None:
        if self.get_visible() and self.get_text().strip():
            texts.append(self)
        return draw(self, *args, **options)

    with patch.object(Text, "draw", record):
        FigureCanvasAgg(figure).draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert min(text.get_fontsize() for text in texts) >= 9
    for said, box in boxes:
        inside = box.x0 >= 0 <= box.y0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{said!r} is cut off"
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
    plain, theirs = ((tmp_path / f"figures/{k}.png").read_bytes() for k in ("plain", "theirs"))
    assert plain == theirs
    assert note in figure.get_suptitle() and "\n" not in FIGURES[name]("").get_suptitle()
    check_legible(figure)


def test_figures_need_no_backend_and_wait_for_matplotlib(tmp_path: Path) -> None:
    code = f"""if True:
        import sys, Figures
        assert "matplotlib" not in sys.modules
        from torch.utils.tensorboard import SummaryWriter
        figure = Figures.confusion_figure([[1] * 9] * 9)
        figure.savefig("{tmp_path}/figure.png")
        SummaryWriter("{tmp_path}").add_figure("figure", figure)
    """
    env = os.environ | {"MPLBACKEND": "module://does_not_exist"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)
    Figures.confusion_figure([[1] * 9] * 9).savefig(tmp_path / "ours.png")
    assert (tmp_path / "figure.png").read_bytes() == (tmp_path / "ours.png").read_bytes()


def test_content_of_figures() -> None:
    loss, accuracy, rate = curves(2, 2).axes
    drawn = [line.get_ydata() for axes in (loss, accuracy) for line in axes.lines[:2]]
    assert np.array_equal(drawn, [[1, 0.5], [2, 1], [3, 1.5], [4, 2]])
    assert [line.get_label() for line in loss.lines[:2]] == ["train", "val"]
    assert loss.lines[2].get_xdata() == [2, 2] and rate.lines[0].get_ydata().tolist() == [5, 2.5]

    (axes,) = Figures.confusion_figure(FULL_SIZE).axes
    texts = {tuple(map(int, t.get_position())): t.get_text() for t in axes.texts}
    assert len(texts) == 81 and texts[0, 0] == "1350\n93%"
    assert texts[8, 2] == "12\n3%"  # column 8, row 2: 12 of 447
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")

    figure = reliability(confident([0, 0, 0], [0.9, 0.9, 0.5]), np.array([0, 1, 0]))
    upper, lower = ([bar.get_height() for bar in axes.patches] for axes in figure.axes)
    assert figure.get_suptitle() == "Reliability: ECE 0.433"  # (2 * 0.4 + 1 * 0.5) / 3
    assert upper == [0] * 7 + [1] + [0] * 5 + [0.5, 0]
    assert lower == [0] * 7 + [1] + [0] * 5 + [2, 0]

    figure = gradcam(TILES[:2], HEAT[:2], [0, 0], np.eye(9)[[0, 7]])
    assert titles(figure) == ["true ADI pred. ADI 100%", "true ADI pred. STR 100%"]
    assert titles(FIGURES["unknown tile"]("")) == ["pred. NORM 100%"]
    shown, yellow = np.asarray(figure.axes[1].images[0].get_array()), [0.993, 0.906, 0.144]
    assert shown[:, :28] == pytest.approx(TILES[1] / 255)
    grey = TILES[1].mean(axis=2, keepdims=True) / 255
    assert shown[:, 29:] == pytest.approx((grey + yellow) / 2, abs=1e-3)


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
    assert "Linear 128, ReLU, Dropout, Linear 9" in texts
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


@pytest.mark.parametrize("y", [0, 20])
@pytest.mark.parametrize("x", [0, 20])
def test_grad_cam_finds_planted_evidence(y: int, x: int) -> None:
    image = np.full((1, 28, 28, 3), 128, dtype=np.uint8)
    spots = [np.s_[y : y + 8, x : x + 8], np.s_[20 - y : 28 - y, 20 - x : 28 - x]]
    for colour, spot in enumerate(spots):
        image[0][spot] = 255 * np.eye(3)[colour]
    for colour, spot in enumerate(spots):
        (heat,) = Evaluation.grad_cam(ColourNet(), image, np.array([colour]))
        assert heat.max() == 1 and heat[spot].sum() > 0.8 * heat.sum()


def test_grad_cam_is_the_papers_formula() -> None:
    model, images = ColourNet(), TILES[:2]
    activation = model.features(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    # logit = head of the mean over 49 positions of relu(activation), so the gradient is
    # head / 49 where the activation is positive.
    weight = (activation > 0).float().mean(dim=(2, 3)) / 49 * model.head.weight[[2, 0]]
    heat = (weight[:, :, None, None] * activation).sum(1, keepdim=True).relu()
    heat = nn.functional.interpolate(heat, (28, 28), mode="bilinear")[:, 0]
    expected = (heat / heat.amax((1, 2), keepdim=True)).detach().numpy()
    for each in (model, model.requires_grad_(False)):
        with torch.no_grad():
            heat = Evaluation.grad_cam(each, images, np.array([2, 0]))
        assert heat == pytest.approx(expected, abs=1e-6)
    assert all(weights.grad is None for weights in model.parameters())
    assert not Evaluation.grad_cam(model, np.zeros_like(images)).any()  # no evidence
