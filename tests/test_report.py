"""The tables of report.md and README.md are what the files in the tree say.

Sentences are not tested; what a table or a picture's link says, and what the committed weights
compute, is.
"""

import importlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from torch.utils.data import DataLoader, TensorDataset

import Evaluation
import Runs
import Training
from Common import CLASS_NAMES, SHORT_NAMES, markdown_table
from MyModels import SkipCNN, count_parameters, layer_table

BEST = ROOT / "runs" / "best"
BENCHMARKS = ROOT / "tests" / "benchmarks"
TILES = SHARED / "pathmnist"
REPORT = (ROOT / "report.md").read_text()
README = (ROOT / "README.md").read_text()
METRICS = json.loads((BEST / "metrics.json").read_text())


def assert_rows(table, text):
    """Assert that the text has every row of a Markdown table, whatever the padding."""
    have = [" ".join(line.split()) for line in text.splitlines()]
    for row in table.splitlines():
        if set(row) > set("|- :"):
            assert " ".join(row.split()) in have


@pytest.mark.parametrize("document", ["report.md", "README.md", "docs/experiments.md"])
def test_every_file_that_the_texts_link_to_exists(document):
    path = ROOT / document
    text = path.read_text()
    files = [path.parent / link for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", text)]
    files += [ROOT / name for name in re.findall(r"`((?:docs|tests)/[^`*\s]*\.[a-z]+)`", text)]
    assert len(files) > 0
    assert [str(file) for file in files if not file.is_file()] == []


def test_results_are_those_of_the_committed_run():
    results = {key: METRICS[key] for key in Evaluation.RESULTS}
    assert_rows(markdown_table(Evaluation.result_texts(results)), REPORT)


def test_per_class_table_is_that_of_the_committed_run_and_of_five_seeds():
    runs = json.loads((BENCHMARKS / "accuracy.json").read_text())["runs"]
    five = [run["recall_test"] for run in runs if run["name"] == "default"]
    assert len(five) == 5
    for short, name in zip(SHORT_NAMES, CLASS_NAMES, strict=True):
        scores = METRICS["test"]["per_class"][name]
        row = f"| {short} | {name} | {scores['support']} |"
        row += f" {scores['precision']:.3f} | {scores['recall']:.3f} |"
        recall = [run[short] for run in five]
        row += f" {np.mean(recall):.3f} ({np.std(recall, ddof=1):.3f}) |"
        val = METRICS["val"]["per_class"][name]
        row += f" {val['precision']:.3f} | {val['recall']:.3f} |"
        assert_rows(row, REPORT)


def test_the_table_of_corruptions_is_that_of_the_benchmark():
    found = json.loads((BENCHMARKS / "robustness.json").read_text())
    for kind, before in found["before"]["kinds"].items():
        means = [np.mean(list(each.values())) for each in (before, found["after"]["kinds"][kind])]
        assert f"| {kind} | {means[0]:.3f} | {means[1]:.3f} |" in REPORT


def test_stage_table_and_parameter_count_are_the_models():
    model = SkipCNN()
    for name, part in model.named_children():
        shapes = [row[3] for row in layer_table(model, 28) if row[0].split(".")[0] == name]
        row = rf"\| `{name}` \|[^|]*\| {shapes[-1]} \| {count_parameters(part):,} \|"
        assert re.search(row, REPORT), row
    for text in (REPORT, README):
        assert f"{count_parameters(model):,} parameters" in " ".join(text.split())


def test_rows_of_the_benchmark_are_in_report_and_readme(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    accuracy = importlib.import_module("accuracy")
    found = json.loads((BENCHMARKS / "accuracy.json").read_text())
    for row in accuracy.markdown(found).splitlines():
        if "epochs: " not in row and "training images" not in row:  # those are in figures
            assert_rows(row, REPORT)
    default, both = accuracy.summarise(found["runs"])["default"], found["ensembles"]["default"]
    cells = [f"{default[k]['mean']:.3f} ({default[k]['std']:.3f})" for k in ("test", "test_tta")]
    parameters = f"{default['parameters']:,}"
    assert_rows(
        f"| this project, five seeds (s.d.) | {parameters} | {' | '.join(cells)} |\n"
        f"| this project, ensemble of the five | | {both['test']:.3f} | {both['test_tta']:.3f} |",
        README,
    )


def test_the_committed_weights_give_the_committed_predictions_and_these_the_metrics(
    monkeypatch,
):
    if not TILES.exists():
        pytest.skip(f"needs the official file's tiles, {TILES}")
    monkeypatch.syspath_prepend(str(SHARED))
    tiles = importlib.import_module("build_pathmnist").tiles
    labels = np.load(TILES / "labels.npz")["test"].ravel().astype(int)
    (committed,) = BEST.glob("pathmnist_test_*.csv")
    probs = np.loadtxt(committed, delimiter=",")[:, 1:]
    for name, value in Evaluation.compute_metrics(probs, labels).items():
        if name in ("accuracy", "auc", "ece", "loss", "macro_f1"):
            assert value == pytest.approx(METRICS["test"][name], abs=1e-4), name
    images = torch.from_numpy(tiles(TILES / "test-00.webp")[::10])
    batches = DataLoader(TensorDataset(images, torch.zeros(len(images))), 100)
    model, _ = Runs.load_model(BEST, "cpu")
    found, _ = Training.predict(model, batches)
    np.testing.assert_allclose(found, probs[: 10 * len(found) : 10], atol=1e-3)
