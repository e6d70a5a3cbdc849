"""The tables of report.md and README.md are what the files in the tree say.

Sentences are not tested; what a table or a picture's link says, and what the committed weights
compute, is.
"""

import csv
import importlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import Evaluation
from Common import CLASS_NAMES, SHORT_NAMES
from MyModels import SkipCNN, count_parameters, layer_markdown

ROOT = Path(__file__).resolve().parents[1]
BEST = ROOT / "runs" / "best"
BENCHMARKS = ROOT / "tests" / "benchmarks"
SAMPLE = ROOT.parent / "shared" / "data" / "pathmnist_sample.npz"
SPLITS = ("val", "val_tta", "test", "test_tta")
DOCUMENTS = ["report.md", "README.md", "docs/experiments.md"]


@pytest.fixture(scope="module")
def report() -> str:
    return (ROOT / "report.md").read_text()


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((BEST / "metrics.json").read_text())


@pytest.fixture(scope="module")
def rows() -> dict:
    return json.loads((BENCHMARKS / "accuracy.json").read_text())["rows"]


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


def test_layer_table_and_parameter_count_are_the_models(report: str, metrics: dict) -> None:
    model = SkipCNN()
    assert rows_missing(layer_markdown(model, 28), report) == []
    assert metrics["model"]["parameters"] == count_parameters(model)


@pytest.mark.parametrize("name", ["accuracy", "speed"])
def test_benchmark_tables_are_what_the_benchmarks_wrote(
    report: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results = json.loads((BENCHMARKS / f"{name}.json").read_text())
    table = importlib.import_module(name).markdown(results.get("rows", results))
    assert len(table.splitlines()) > 10 and rows_missing(table, report) == []


def test_the_readmes_table_is_the_benchmarks(rows: dict) -> None:
    names = {  # as README.md's table calls them
        "default": "this project, 5 seeds",
        "128,809-parameter CNN, own recipe": "small CNN (Darkkavn, GitHub), own recipe, 3 seeds",
        "MedMNIST's official ResNet-18": "MedMNIST's official ResNet-18 recipe, 1 seed",
    }
    table = []
    for key, name in names.items():
        row = rows[key]
        cells = [name, f"{row['parameters']:,}"]
        for runs in (row["test"]["runs"], row["test_tta"]["runs"]):
            spread = f" (s.d. {statistics.stdev(runs):.3f})" if len(runs) > 1 else ""
            cells.append(f"{statistics.mean(runs):.3f}{spread}")
        ensemble = row.get("ensemble_test_tta")
        cells.append(f"{ensemble:.3f}" if ensemble else "")
        table.append(" | ".join(["", *cells, f"{row['seconds']['mean']:.0f} s", ""]).strip())
    assert rows_missing("\n".join(table), (ROOT / "README.md").read_text()) == []


def test_the_committed_run_is_small_and_agrees_with_itself(metrics: dict) -> None:
    assert metrics["seed"] == 0 and (BEST / "best.pt").stat().st_size < 5e6
    assert sum(p.stat().st_size for p in BEST.glob("events*")) < 3e6
    assert not list(BEST.glob("*.npz")) and not list(BEST.rglob("*sprite*"))
    history = list(csv.DictReader((BEST / "history.csv").read_text().splitlines()))
    best = history[metrics["best_epoch"] - 1]
    assert int(best["epoch"]) == metrics["best_epoch"] <= metrics["epochs"] == len(history)
    assert float(best["val_accuracy"]) == pytest.approx(metrics["val"]["accuracy"], abs=0.006)


def test_the_committed_weights_give_the_committed_predictions(
    tmp_path: Path, metrics: dict
) -> None:
    if not SAMPLE.exists():
        pytest.skip("needs the real sample, ../shared/data/pathmnist_sample.npz")
    run = shutil.copytree(BEST, tmp_path / "best")
    (committed,) = BEST.glob("pathmnist_test_*.csv")
    expected = np.loadtxt(committed, delimiter=",")
    for written in (run / committed.name, run / "metrics.json"):
        written.unlink()  # so that what is compared is what is computed here
    command = [sys.executable, "PathMNIST.py", "--evaluate", str(run), "--data", str(SAMPLE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = np.loadtxt(run / committed.name, delimiter=",")
    assert found.shape == expected.shape == (359, 1 + len(CLASS_NAMES))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    again = json.loads((run / "metrics.json").read_text())
    for key in SPLITS:
        error = 1.5 / sum(map(sum, metrics[key]["confusion_matrix"]))  # one image on a knife's edge
        assert again[key]["accuracy"] == pytest.approx(metrics[key]["accuracy"], abs=error)
        assert again[key]["auc"] == pytest.approx(metrics[key]["auc"], abs=1e-4)
