"""Evaluate a model's probabilities: metrics, calibration, Grad-CAM, result files.

    metrics = compute_metrics(probs, labels)
    print(plain_table(result_texts({"test": metrics})))

Everywhere, `probs` is float (N, 9) with rows that sum to 1, `labels` is int (N,) in 0..8, and N is
1 or more.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy import ndarray
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

import Figures
from analyze_data import PathData
from Augmentation import to_float
from Common import CLASS_NAMES, CLASSES, write_atomically
from MyModels import TissueModel, layer_table

# What is evaluated: the key in metrics.json, the split, and whether the probabilities are means
# over the eight flips and quarter turns of each image ("tta": test-time augmentation).
RESULTS = {
    "val": ("val", False),
    "val_tta": ("val", True),
    "test": ("test", False),
    "test_tta": ("test", True),
}
ECE_BINS = 15  # Guo et al. 2017, arXiv 1706.04599
TINY = 1e-37  # close to the smallest float32; prevents log(0) and division by 0


def validation_metrics(probs: ndarray, labels: ndarray) -> dict:
    """Return the few metrics that are computed after every epoch: "loss" (mean negative log
    likelihood, nats) and "loss_se" (its standard error over the images), "accuracy", "auc"
    (`macro_auc`) and "recall" (9 floats, nan where a class has no images). Probabilities that are
    not finite give a loss and an AUC of nan, so that the training loop can say what happened."""
    from sklearn.metrics import recall_score  # here, because scikit-learn takes a second to import

    predicted = probs.argmax(axis=1)
    true_probs = np.maximum(probs[np.arange(len(labels)), labels], TINY)
    losses = -np.log(true_probs.astype(np.float64))
    recall = recall_score(labels, predicted, labels=CLASSES, average=None, zero_division=np.nan)
    return {
        "loss": float(losses.mean()),
        "loss_se": float(losses.std() / np.sqrt(len(losses))),
        "accuracy": float(np.mean(predicted == labels)),
        "auc": macro_auc(probs, labels),
        "recall": recall.tolist(),
    }


def compute_metrics(probs: ndarray, labels: ndarray) -> dict:
    """Return every metric of one split, in plain Python types that JSON can hold: "accuracy"; "auc"
    (`macro_auc`, None where undefined); "macro_f1" and "balanced_accuracy" (means of F1 and recall
    over the classes that have images); "loss" (mean negative log likelihood, nats); "ece"
    (`expected_calibration_error`); "accuracy_ci95" [low, high] (Wilson's interval over images);
    "per_class" {name: precision, recall, f1, support} (0 where undefined); "confusion_matrix" (see
    `confusion`)."""
    from scipy.stats import binomtest
    from sklearn.metrics import precision_recall_fscore_support

    predicted = probs.argmax(axis=1)
    correct = int((predicted == labels).sum())
    interval = binomtest(correct, len(labels)).proportion_ci(method="wilson")
    basics = validation_metrics(probs, labels)
    scores = precision_recall_fscore_support(labels, predicted, labels=CLASSES, zero_division=0)
    per_class = {}
    for name, precision, recall, f1, support in zip(CLASS_NAMES, *scores, strict=True):
        per_class[name] = {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
        }
    present = [row for row in per_class.values() if row["support"] > 0]
    return {
        "accuracy": basics["accuracy"],
        "auc": None if np.isnan(basics["auc"]) else basics["auc"],
        "macro_f1": float(np.mean([row["f1"] for row in present])),
        "balanced_accuracy": float(np.mean([row["recall"] for row in present])),
        "loss": basics["loss"],
        "ece": expected_calibration_error(probs, labels),
        "accuracy_ci95": [interval.low, interval.high],
        "per_class": per_class,
        "confusion_matrix": confusion(probs, labels).tolist(),
    }


def confusion(probs: ndarray, labels: ndarray) -> ndarray:
    """Return the confusion matrix (9, 9): images by true (rows) and predicted class (columns)."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, probs.argmax(axis=1), labels=CLASSES)


def macro_auc(probs: ndarray, labels: ndarray) -> float:
    """Return the mean one-vs-rest ROC AUC, as MedMNIST's `getAUC` computes it. A class that has no
    images, or all of them, has no AUC and is left out of the mean; nan when none is left or when
    `probs` (N, 9) is not finite."""
    from sklearn.metrics import roc_auc_score

    present = np.unique(labels)
    if len(present) < 2 or not np.isfinite(probs).all():
        return float("nan")
    # One call for all classes is three times as fast as a call for each.
    return float(roc_auc_score(labels[:, None] == present, probs[:, present], average="macro"))


def fit_temperature(probs: ndarray, labels: ndarray) -> float:
    """Return the T with which softmax(log(probs) / T) has the lowest loss (Guo et al. 2017). A
    normal prior on log T (mean 0, standard deviation 1/2) keeps T near 1 if there are few images.
    It counts about as much as four images."""

    def loss(log_t: float) -> float:
        fitted = with_temperature(probs, np.exp(log_t))
        prior = log_t**2 / (2 * 0.5**2)
        return prior - np.log(fitted[np.arange(len(labels)), labels]).sum()

    return float(np.exp(minimize_scalar(loss, bounds=(-2, 2), method="bounded").x))


def with_temperature(probs: ndarray, temperature: float) -> ndarray:
    """Return softmax(log(probs) / temperature), float64 (N, 9)."""
    return softmax(np.log(np.maximum(probs, TINY).astype(np.float64)) / temperature, axis=1)


def ece_without_temperature(probs: ndarray, labels: ndarray, temperature: float) -> float:
    """Return the ECE that the probabilities would have if the temperature were 1."""
    plain = with_temperature(probs, 1 / temperature)
    return expected_calibration_error(plain, labels)


def expected_calibration_error(probs: ndarray, labels: ndarray) -> float:
    """Return the ECE in 0..1: |accuracy - mean confidence| of each bin, averaged over the images.
    There are 15 bins of equal width, closed on the right (Guo et al. 2017, arXiv 1706.04599, eq.
    3). `probs` (N, 9), `labels` (N,)."""
    counts, accuracy, confidence = reliability_bins(probs, labels)
    return float(np.sum(counts * np.abs(accuracy - confidence)) / len(labels))


def reliability_bins(probs: ndarray, labels: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Return the number of images, accuracy and mean confidence per bin, each (15,); 0 if empty."""
    correct = probs.argmax(axis=1) == labels
    confidence = probs.max(axis=1).astype(np.float64)
    edges = np.linspace(0, 1, ECE_BINS + 1)
    bins = np.digitize(confidence, edges[1:-1], right=True)
    counts = np.bincount(bins, minlength=ECE_BINS)
    hits = np.bincount(bins, correct, minlength=ECE_BINS)
    total = np.bincount(bins, confidence, minlength=ECE_BINS)
    return counts, hits / np.maximum(counts, 1), total / np.maximum(counts, 1)


def result_texts(metrics_by_key: dict) -> list[list]:
    """Return the rows of a table with one row per evaluation, the first row being the header. A key
    is one of `RESULTS`, its value is what `compute_metrics` returned."""
    rows = [["split", "images", "accuracy (95 % interval)", "AUC", "macro F1", "ECE", "loss"]]
    for key, m in metrics_by_key.items():
        images = np.sum(m["confusion_matrix"])
        low, high = m["accuracy_ci95"]
        row = [key, f"{images:,}", f"{m['accuracy']:.4f} ({low:.3f} to {high:.3f})"]
        row.append("none" if m["auc"] is None else f"{m['auc']:.4f}")
        row += [f"{m['macro_f1']:.4f}", f"{m['ece']:.4f}", f"{m['loss']:.4f}"]
        rows.append(row)
    return rows


def write_predictions(out_dir: Path, results: dict, probs: ndarray) -> None:
    """Write the test probabilities in the format of `medmnist.Evaluator` (3.0.2, evaluator.py): one
    line per image, `index,p0,...,p8`, no header. The file name contains the AUC, the accuracy, and
    the image size unless it is 28 px."""
    test, size = results["test"], results["dataset"]["size"]
    auc = float("nan") if test["auc"] is None else test["auc"]
    run = out_dir.resolve().name.replace(".", "_")  # medmnist's parser cuts the name at a dot
    flag = "pathmnist" if size == 28 else f"pathmnist_{size}"
    name = f"{flag}_test_[AUC]{auc:.3f}_[ACC]{test['accuracy']:.3f}@{run}.csv"
    # str() of a numpy number is the shortest text that reads back as the same number.
    lines = [",".join(map(str, (index, *row))) for index, row in enumerate(probs)]
    write_atomically(out_dir / name, ("\n".join(lines) + "\n").encode())


def result_figures(
    model: TissueModel, data: PathData, probs: dict, results: dict
) -> dict[str, Figure]:
    """Return every figure of results by its file name. `probs` and `results` have the keys of
    `RESULTS`."""
    note = Figures.split_note("test", data.kind)
    images, labels, test = data.images["test"], data.labels["test"], probs["test"]
    right = test.argmax(axis=1) == labels
    first, wrong = np.flatnonzero(right)[:5], np.flatnonzero(~right)[:4]
    shown = np.concatenate([first, wrong])
    cam_note = f"{note}: first {len(first)} correct, first {len(wrong)} incorrect"
    heatmaps = grad_cam(model, images[shown])
    bins, ece = reliability_bins(test, labels), results["test"]["ece"]
    table = layer_table(model, data.size)
    return {
        "confusion_val": Figures.confusion_figure(
            results["val"]["confusion_matrix"], Figures.split_note("val", data.kind)
        ),
        "confusion_test": Figures.confusion_figure(results["test"]["confusion_matrix"], note),
        "per_class_test": Figures.per_class_figure(results["test"], note),
        "examples_correct": Figures.examples_figure(images, labels, test, True, note),
        "examples_incorrect": Figures.examples_figure(images, labels, test, False, note),
        "reliability_test": Figures.reliability_figure(*bins, ece, note),
        "gradcam_test": Figures.gradcam_figure(
            images[shown], heatmaps, labels[shown], test[shown], cam_note
        ),
        "architecture": Figures.architecture_figure(table, type(model).__name__),
    }


def save_figures(out_dir: Path, figures: dict) -> None:
    """Save each figure under its name in the subfolder `figures`."""
    (out_dir / "figures").mkdir(exist_ok=True)
    for name, figure in tqdm(figures.items(), desc="figures", unit="figure", disable=None):
        Figures.save(figure, out_dir / "figures" / f"{name}.png")


def summarise_seeds(results: list, probs: list, data: PathData) -> dict:
    """Return summary.json's content from each seed's results and probabilities: mean and standard
    deviation over the seeds, and the metrics of their ensemble, the mean of the probabilities."""
    summary: dict = {"dataset": data.card, "seeds": [run["seed"] for run in results]}
    for key, (split, _) in RESULTS.items():
        summary[key] = {"mean": {}, "std": {}}
        for name in ("accuracy", "auc", "macro_f1", "loss", "ece"):
            values = [run[key][name] for run in results]
            if None not in values:  # None: an AUC that is undefined
                summary[key]["mean"][name] = float(np.mean(values))
                summary[key]["std"][name] = float(np.std(values, ddof=1))
        together = np.mean([run[key] for run in probs], axis=0)
        summary[key]["ensemble"] = compute_metrics(together, data.labels[split])
    return summary


def grad_cam(model: TissueModel, images: ndarray, classes: ndarray | None = None) -> ndarray:
    """Return heatmaps of the evidence for a class in each image (Selvaraju et al. 2017, arXiv
    1610.02391, equations 1 and 2). The channels of the model's `gradcam_layer` are added up, each
    weighted by d(logit) / d(activation) averaged over the positions. Negative sums become 0, so
    that only evidence for the class is left. Takes uint8 images (N, S, S, 3) and the classes (N,)
    to explain, by default the predicted ones. Returns float32 (N, S, S), scaled to a maximum of 1
    per image, or all 0 if there is no evidence for the class. Runs in float32 and leaves the model
    in eval mode."""
    device = next(model.parameters()).device
    # With an input that needs a gradient this works even if the weights are frozen.
    inputs = to_float(torch.from_numpy(images).to(device)).requires_grad_()
    activations: list = []

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        activations.append(output)

    hook = model.gradcam_layer(images.shape[1]).register_forward_hook(keep)
    with torch.enable_grad():
        logits = model.eval()(inputs)
        chosen = logits.argmax(1) if classes is None else torch.as_tensor(classes, device=device)
        score = logits.gather(1, chosen.view(-1, 1)).sum()
        # Unlike backward(), grad() leaves the .grad of the weights alone.
        (gradient,) = torch.autograd.grad(score, activations[0])
    hook.remove()
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    heat = (weights * activations[0].detach()).sum(dim=1, keepdim=True).relu()
    heat = interpolate(heat, images.shape[1:3], mode="bilinear", align_corners=False)
    heat = heat / heat.amax(dim=(2, 3), keepdim=True).clamp_min(TINY)
    return heat[:, 0].cpu().numpy()
