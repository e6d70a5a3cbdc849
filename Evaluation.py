"""What is said about a model's probabilities: metrics, Grad-CAM, results in files and in the log.

    metrics = compute_metrics(probs, labels)
    print(results_markdown({"test": metrics}))

Everywhere, `probs` is float (N, 9) with rows that sum to 1, `labels` is int (N,) in 0..8, and N is
1 or more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

import Figures
from analyze_data import PathData
from Augmentation import augment, to_float
from Common import CLASS_NAMES, CLASSES, SHORT_NAMES, write_atomically, write_json
from MyModels import MODELS, layer_markdown, layer_table
from Runs import Config

if TYPE_CHECKING:  # matplotlib is imported where figures are made
    from matplotlib.figure import Figure

RESULTS = ("val", "val_tta", "test", "test_tta")  # _tta: mean over eight flips and turns
ECE_BINS = 15  # Guo et al. 2017, arXiv 1706.04599
RESAMPLES = 10_000
TINY = 1e-37  # about the least float32: keeps a probability that underflowed to 0 from giving inf


def validation_metrics(probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the few metrics that are followed from epoch to epoch. "loss" (mean negative log
    likelihood, nats) and "loss_se" (its standard error over the images), "accuracy", "auc"
    (`macro_auc`) and "recall" (9 floats, nan where a class has no images). Probabilities that are
    not finite give a loss and an AUC of nan, so that the training loop can say what happened."""
    from sklearn.metrics import recall_score

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


def compute_metrics(probs: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return every metric of one split, in plain Python types that JSON can hold. "accuracy"; "auc"
    (`macro_auc`, None where undefined); "macro_f1" and "balanced_accuracy" (means of F1 and recall
    over the classes that have images); "loss" (mean negative log likelihood, nats); "ece"
    (`expected_calibration_error`); "accuracy_ci95" [low, high] (percentile bootstrap over images,
    10,000 resamples drawn with `seed`); "per_class" {name: precision, recall, f1, support} (0 where
    undefined); "confusion_matrix" (see `confusion`)."""
    from sklearn.metrics import precision_recall_fscore_support

    predicted = probs.argmax(axis=1)
    basics = validation_metrics(probs, labels)
    scores = precision_recall_fscore_support(labels, predicted, labels=CLASSES, zero_division=0)
    scores = (*scores[:3], scores[3].astype(int))  # floats where nothing is right
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
        "confusion_matrix": confusion(probs, labels).tolist(),
    }


def confusion(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the confusion matrix (9, 9): images by true (rows) and predicted class (columns)."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, probs.argmax(axis=1), labels=CLASSES)


def macro_auc(probs: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean one-vs-rest ROC AUC, as MedMNIST's `getAUC` computes it. A class that has no
    images, or all of them, has no AUC and is left out of the mean; nan when none is left or when
    `probs` (N, 9) is not finite."""
    from sklearn.metrics import roc_auc_score

    present = np.unique(labels)
    if len(present) < 2 or not np.isfinite(probs).all():
        return float("nan")
    # All classes in one call: one for each spends three times as long on checking its arguments.
    return float(roc_auc_score(labels[:, None] == present, probs[:, present], average="macro"))


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """Return the T with which softmax(log(probs) / T) has the lowest loss (Guo et al. 2017). A
    normal prior on log T, of mean 0 and standard deviation 1/2, keeps it near 1 where images are
    few; it weighs as much as their likelihood at about four of them."""
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        fitted = with_temperature(probs, np.exp(log_t))
        return 2 * log_t**2 - np.log(fitted[np.arange(len(labels)), labels]).sum()

    return float(np.exp(minimize_scalar(loss, bounds=(-2, 2), method="bounded").x))


def with_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(log(probs) / temperature), float64 (N, 9)."""
    from scipy.special import softmax

    return softmax(np.log(np.maximum(probs, TINY).astype(np.float64)) / temperature, axis=1)


def expected_calibration_error(probs: np.ndarray, labels: np.ndarray) -> float:
    """Return the ECE in 0..1: |accuracy - mean confidence| of each bin, averaged over images. 15
    bins of equal width, closed on the right (Guo et al. 2017, arXiv 1706.04599, eq. 3). `probs` (N,
    9), `labels` (N,)."""
    counts, accuracy, confidence = reliability_bins(probs, labels)
    return float(np.sum(counts * np.abs(accuracy - confidence)) / len(labels))


def reliability_bins(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return images, accuracy and mean confidence of each bin: three (15,), 0 in empty bins."""
    correct = probs.argmax(axis=1) == labels
    confidence = probs.max(axis=1).astype(np.float64)
    bins = np.digitize(confidence, np.linspace(0, 1, ECE_BINS + 1)[1:-1], right=True)
    counts, hits, total = (
        np.bincount(bins, weights, ECE_BINS) for weights in (None, correct, confidence)
    )
    return counts, hits / np.maximum(counts, 1), total / np.maximum(counts, 1)


def results_markdown(metrics_by_split: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with one row per split, aligned so that a terminal shows it well.
    `metrics_by_split` maps a split's name to what `compute_metrics` returned."""
    row = "| {:8} | {:>6} | {:24} | {:>6} | {:8} | {:9} | {:6} | {:6} |".format
    header = ["split", "images", "accuracy (95 % interval)", "AUC", "macro F1", "bal. acc.", "ECE"]
    lines = [row(*header, "loss"), row(*["---"] * (len(header) + 1))]
    for split, m in metrics_by_split.items():
        images = sum(each["support"] for each in m["per_class"].values())
        accuracy = "{:.4f} ({:.3f} to {:.3f})".format(m["accuracy"], *m["accuracy_ci95"])
        auc = "none" if m["auc"] is None else f"{m['auc']:.4f}"
        rest = (f"{m[key]:.4f}" for key in ("macro_f1", "balanced_accuracy", "ece", "loss"))
        lines.append(row(split, f"{images:,}", accuracy, auc, *rest))
    return "\n".join(lines)


def write_results(out_dir: Path, results: dict[str, Any], probs: np.ndarray) -> None:
    """Write metrics.json (`results`), and test's `probs` as `medmnist.Evaluator` writes them. That
    (3.0.2, evaluator.py) is one line per image, `index,p0,...,p8`, no header; AUC and accuracy
    stand in the file's name, and the size of the images unless it is 28 px. Replaces older ones."""
    write_json(out_dir / "metrics.json", results)
    test, size = results["test"], results["dataset"]["size"]
    auc = float("nan") if test["auc"] is None else test["auc"]
    run = out_dir.resolve().name.replace(".", "_")  # medmnist's parser cuts it at a dot
    flag = "pathmnist" if size == 28 else f"pathmnist_{size}"
    name = f"{flag}_test_[AUC]{auc:.3f}_[ACC]{test['accuracy']:.3f}@{run}.csv"
    # str() of a numpy number is the shortest text that reads back as the same number.
    lines = [",".join(map(str, (index, *row))) for index, row in enumerate(probs)]
    write_atomically(out_dir / name, ("\n".join(lines) + "\n").encode())
    for old in out_dir.glob("pathmnist*_test_*.csv"):
        if old.name != name:
            old.unlink()


def result_figures(
    model: nn.Module, data: PathData, probs: dict[str, np.ndarray], results: dict[str, Any]
) -> "dict[str, Figure]":
    """Return every figure of results by its file name."""
    kind = Figures.data_note(data.kind)
    note, val_note = (f"{split} split{kind and f', {kind}'}" for split in ("test", "val"))
    images, labels, test = data.images["test"], data.labels["test"], probs["test"]
    bins, table = reliability_bins(test, labels), layer_table(model, data.size)
    matrices = {split: results[split]["confusion_matrix"] for split in ("val", "test")}
    right = test.argmax(1) == labels
    first, wrong = np.flatnonzero(right)[:5], np.flatnonzero(~right)[:4]
    shown = np.concatenate([first, wrong])
    explained = images[shown], grad_cam(model, images[shown]), labels[shown], test[shown]
    cam_note = f"{note}: first {len(first)} right and first {len(wrong)} wrong"
    return {
        "confusion_val": Figures.confusion_figure(matrices["val"], val_note),
        "confusion_test": Figures.confusion_figure(matrices["test"], note),
        "per_class_test": Figures.per_class_figure(results["test"], note),
        "examples_correct": Figures.examples_figure(images, labels, test, True, note=note),
        "examples_incorrect": Figures.examples_figure(images, labels, test, False, note=note),
        "reliability_test": Figures.reliability_figure(*bins, results["test"]["ece"], note),
        "gradcam_test": Figures.gradcam_figure(*explained, cam_note),
        "architecture": Figures.architecture_figure(table, type(model).__name__),
    }


def save_figures(out_dir: Path, figures: "dict[str, Figure]") -> None:
    """Save figures by their names in the folder's own folder `figures`."""
    (out_dir / "figures").mkdir(exist_ok=True)
    for name, figure in tqdm(figures.items(), desc="figures", unit="figure", disable=None):
        Figures.save(figure, out_dir / "figures" / f"{name}.png")


def summarise_seeds(
    runs: Sequence[tuple[dict, dict[str, np.ndarray]]], data: PathData, out_dir: Path
) -> None:
    """Write summary.json, mean and spread over the seeds and their ensemble; print the table.
    `runs` has each seed's results and probabilities."""
    results, probs = zip(*runs, strict=True)
    summary: dict = {"dataset": data.card, "seeds": [run["seed"] for run in results]}
    print(f"\n{len(runs)} seeds, mean accuracy (standard deviation), and their ensemble:")
    for key in RESULTS:
        scores = [run[key] for run in results]
        names = [name for name in scores[0] if all(isinstance(s[name], float) for s in scores)]
        values = {name: [score[name] for score in scores] for name in names}
        mean = {name: float(np.mean(v)) for name, v in values.items()}
        std = {name: float(np.std(v, ddof=1)) for name, v in values.items()}
        together = np.mean([each[key] for each in probs], axis=0)
        ensemble = compute_metrics(together, data.labels[key.removesuffix("_tta")])
        summary[key] = {"mean": mean, "std": std, "ensemble": ensemble}
        spread = f"{mean['accuracy']:.4f} ({std['accuracy']:.4f})"
        print(f"  {key:9} {spread}   ensemble {ensemble['accuracy']:.4f}")
    summary["train_seconds"] = [run.get("train_seconds") for run in results]
    write_json(out_dir / "summary.json", summary)
    print(f"Written to {out_dir / 'summary.json'}")


def log_start(writer: SummaryWriter, model: nn.Module, data: PathData, config: Config) -> None:
    """Log what is known before training: texts, augmented tiles."""
    counts = ", ".join(f"{n:,} {split}" for split, n in data.counts.items())
    card = data.card | {"counts": counts}
    for name, values in (("config", asdict(config)), ("dataset", card)):
        rows = [f"| {key} | {value} |" for key, value in values.items()]
        text = "\n".join([f"| {name} | |", "|---|---|", *rows])
        writer.add_text(name, text.encode(errors="backslashreplace").decode())
    writer.add_text("layers", layer_markdown(model, data.size))
    tiles = torch.from_numpy(data.images["train"][:8])
    generator = torch.Generator().manual_seed(config.seed)
    views, _ = augment(tiles, torch.zeros(len(tiles), 1), generator, config)
    figure = Figures.augmentation_figure(
        tiles.numpy(), views.permute(0, 2, 3, 1).numpy(), Figures.data_note(data.kind)
    )
    Figures.add_to_log(writer, "Training/augmentation", figure, 0)
    writer.flush()  # before the first checkpoint: a resumed run does not log this again


def log_results(
    writer: SummaryWriter,
    run_dir: Path,
    config: Config,
    results: dict[str, Any],
    data: PathData,
    probs: dict[str, np.ndarray],
) -> None:
    """Log the saved figures, precision-recall curves, the results' table and the row in HParams.
    One step behind the last epoch: what a run logs twice because it was stopped here and resumed,
    TensorBoard then shows once."""
    step = results["epochs"] + 1
    for path in sorted((run_dir / "figures").glob("*.png")):
        picture = np.asarray(Image.open(path))
        writer.add_image(f"Results/{path.stem}", picture, step, dataformats="HWC")
    for split in ("val", "test"):
        for label, short in enumerate(SHORT_NAMES):
            positive, p = data.labels[split] == label, probs[split][:, label]
            writer.add_pr_curve(f"PR {split}/{short}", positive, p, step)
    writer.add_text("results", results_markdown({key: results[key] for key in RESULTS}), step)
    # As many columns as TensorBoard shows unasked; the other options are in the text "config".
    values = {key: getattr(config, key) for key in ("model", "epochs", "batch_size", "lr", "seed")}
    columns = ("val accuracy", "val auc", "test accuracy", "test auc", "test_tta accuracy")
    scores = {f"hparam/{c}": results[c.split()[0]][c.split()[1]] for c in columns}
    scores = {tag: score for tag, score in scores.items() if score is not None}
    for summary in hparams(values, scores, {"model": list(MODELS)}):
        writer.file_writer.add_summary(summary)
    for tag, score in scores.items():
        writer.add_scalar(tag, score, step)


def grad_cam(model: nn.Module, images: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
    """Return where in each image the evidence for a class lies (Selvaraju et al. 2017). arXiv
    1610.02391, equations 1 and 2: the channels of the model's `gradcam_layer` are averaged with the
    weights d(logit) / d(activation), averaged over the positions, and only what speaks for the
    class is kept. Takes uint8 images (N, S, S, 3) and the classes (N,) to explain, by default the
    predicted ones. Returns float32 (N, S, S), 1 at each image's strongest point, all 0 where
    nothing speaks for the class. Runs in float32 and leaves the model in eval mode."""
    # An input that needs a gradient makes every activation differentiable, frozen weights or not.
    device = next(model.parameters()).device
    inputs = to_float(torch.from_numpy(images).to(device)).requires_grad_()
    kept: list[Tensor] = []
    layer = model.gradcam_layer(images.shape[1])
    hook = layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    with torch.enable_grad():
        logits = model.eval()(inputs)
        chosen = logits.argmax(1) if classes is None else torch.as_tensor(classes, device=device)
        score = logits.gather(1, chosen.long().view(-1, 1)).sum()
        # Unlike backward(), grad() leaves the .grad of the weights alone.
        (gradient,) = torch.autograd.grad(score, kept[0])
    hook.remove()
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    heat = (weights * kept[0].detach()).sum(dim=1, keepdim=True).relu()
    heat = interpolate(heat, images.shape[1:3], mode="bilinear", align_corners=False)
    heat = heat / heat.amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    return heat[:, 0].cpu().numpy()
