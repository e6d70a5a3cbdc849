"""The tables of report.md and README.md are what the files in the tree say.

Sentences are not tested; what a table or a picture's link says, and what the committed weights
compute, is.
"""

import csv
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import Evaluation
import Runs
import Training
from Common import CLASS_NAMES, SHORT_NAMES
from MyModels import SkipCNN, count_parameters, layer_table

ROOT = Path(__file__).resolve().parents[1]
BEST = ROOT / "runs" / "best"
BENCHMARKS = ROOT / "tests" / "benchmarks"
TILES = ROOT.parent / "shared" / "data" / "pathmnist"
SPLITS = ("val", "val_tta", "test", "test_tta")
DOCUMENTS = ["report.md", "README.md", "docs/experiments.md"]


@pytest.fixture(scope="module")
def report() -> str:
    return (ROOT / "report.md").read_text()


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((BEST / "metrics.json").read_text())


def rows_missing(table: str, text: str) -> list[str]:
    """Return the rows of a Markdown table that the text does not have, whatever the padding."""
    have = {" ".join(line.split()) for line in text.splitlines()}
    return [row for row in table.splitlines() if row and " ".join(row.split()) not in have]


def broken_links(text: str, folder: Path) -> list[str]:
    """Return the files that a Markdown text links to or names as a path, and that do not exist."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    named = re.findall(r"`((?:docs|tests|runs/best)/[^`*\s]*\.[a-z]+)`", text)
    local = [folder / link for link in links if "://" not in link]
    return [str(path) for path in [*local, *map(ROOT.joinpath, named)] if not path.is_file()]


def test_a_wrong_figure_and_a_broken_link_are_noticed() -> None:
    assert rows_missing("| a | 1 |\n| b | 2 |", "| a   | 1 |\n| b | 3 |") == ["| b | 2 |"]
    text = "![a](README.md) [b](docs/no.md#part) [c](https://x.org/y.md) `tests/no.txt`"
    broken = broken_links(text, ROOT)
    assert broken == [str(ROOT / "docs" / "no.md"), str(ROOT / "tests" / "no.txt")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_the_texts_link_to_exists(document: str) -> None:
    path = ROOT / document
    assert broken_links(path.read_text(), path.parent) == []


def test_results_are_those_of_the_committed_run(report: str, metrics: dict) -> None:
    table = Evaluation.results_markdown({key: metrics[key] for key in SPLITS})
    assert len(table.splitlines()) >= 6 and rows_missing(table, report) == []


def test_per_class_table_is_that_of_the_committed_run(report: str, metrics: dict) -> None:
    for short, name in zip(SHORT_NAMES, CLASS_NAMES, strict=True):
        both = [metrics[split]["per_class"][name] for split in ("test", "val")]
        cells = [f"{m['precision']:.3f} | {m['recall']:.3f} | {m['support']}" for m in both]
        assert rows_missing(f"| {short} | {name} | {' | '.join(cells)} |", report) == []


def test_stage_table_and_parameter_count_are_the_models(report: str, metrics: dict) -> None:
    model = SkipCNN()
    total = count_parameters(model)
    for name, part in model.named_children():
        shapes = [row[3] for row in layer_table(model, 28) if row[0].split(".")[0] == name]
        row = rf"\| `{name}` \|[^|]*\| {shapes[-1]} \| {count_parameters(part):,} \|"
        assert re.search(row, report), row
    for text in (report, (ROOT / "README.md").read_text()):
        assert f"{total:,} parameters" in " ".join(text.split())
    assert metrics["model"]["parameters"] == total


def test_rows_of_the_benchmark_are_in_report_and_readme(
    report: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    accuracy = importlib.import_module("accuracy")
    found = json.loads((BENCHMARKS / "accuracy.json").read_text())
    drawn = re.compile("epochs: |training images")  # in figures instead
    table = [row for row in accuracy.markdown(found).splitlines() if not drawn.search(row)]
    assert len(table) > 3 and rows_missing("\n".join(table), report) == []
    default, both = accuracy.summarise(found["runs"])["default"], found["ensembles"]["default"]
    cells = [f"{default[k]['mean']:.3f} ({default[k]['std']:.3f})" for k in ("test", "test_tta")]
    rows = [
        f"| this project, five seeds (s.d.) | {default['parameters']:,} | {' | '.join(cells)} |"
    ]
    cells = [f"{both[key]:.3f}" for key in ("test", "test_tta")]
    rows.append(f"| this project, ensemble of the five | | {' | '.join(cells)} |")
    assert default["test"]["seeds"] == both["seeds"] == 5
    assert rows_missing("\n".join(rows), (ROOT / "README.md").read_text()) == []


def test_the_committed_run_is_small_and_agrees_with_itself(metrics: dict) -> None:
    assert metrics["seed"] == 0 and (BEST / "best.pt").stat().st_size < 5e6
    assert sum(p.stat().st_size for p in BEST.glob("events*")) < 3e6
    assert not list(BEST.glob("*.npz")) and not list(BEST.rglob("*sprite*"))
    history = list(csv.DictReader((BEST / "history.csv").read_text().splitlines()))
    best = history[metrics["best_epoch"] - 1]
    assert int(best["epoch"]) == metrics["best_epoch"] <= metrics["epochs"] == len(history)
    assert float(best["val_accuracy"]) == pytest.approx(metrics["val"]["accuracy"], abs=0.006)


def test_the_committed_weights_give_the_committed_predictions_and_these_the_metrics(
    metrics: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not TILES.exists():
        pytest.skip(f"needs the official file's tiles, {TILES.relative_to(ROOT.parent)}")
    monkeypatch.syspath_prepend(str(TILES.parent))
    tiles = importlib.import_module("build_pathmnist").tiles
    labels = np.load(TILES / "labels.npz")["test"].ravel().astype(int)
    images = np.concatenate([tiles(path) for path in sorted(TILES.glob("test-*.webp"))])
    (committed,) = BEST.glob("pathmnist_test_*.csv")
    probs = np.loadtxt(committed, delimiter=",")[:, 1:]
    assert probs.shape == (len(labels), len(CLASS_NAMES)) == (7180, 9)
    some = torch.from_numpy(images[: len(labels)][::10]), torch.from_numpy(labels[::10])
    model, _ = Runs.load_model(BEST, "cpu")
    found, _ = Training.predict(model, DataLoader(TensorDataset(*some), 100))
    np.testing.assert_allclose(found, probs[::10], atol=1e-3)
    for name, value in Evaluation.compute_metrics(probs, labels).items():
        if name in ("accuracy", "auc", "ece", "loss", "macro_f1"):
            assert value == pytest.approx(metrics["test"][name], abs=1e-4), name
