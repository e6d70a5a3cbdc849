"""What a person sees on TensorBoard's page of a run, in a real browser."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from Common import SHORT_NAMES

pytest.importorskip("playwright", reason="needs Playwright (pip install playwright)")
import tensorboard_page as tb

pytestmark = pytest.mark.skipif(not tb.find_chromium(), reason="needs Chromium")


def last_points(run_dir: Path) -> dict[str, dict]:
    """Return what the charts have to end with, by history.csv: {tag: {run: (step, value)}}."""
    row = list(csv.DictReader((run_dir / "history.csv").read_text().splitlines()))[-1]
    points = {
        f"{name}/{split}": {run_dir.name: float(row[f"{split}_{name.lower()}"])}
        for name in ("Loss", "Accuracy")
        for split in ("train", "val")
    } | {"AUC/val": {run_dir.name: float(row["val_auc"])}}
    step = int(row["epoch"])
    return {
        tag: {run: (step, pytest.approx(value, rel=1e-3)) for run, value in curves.items()}
        for tag, curves in points.items()
    }


def test_page_shows_the_run(trained: SimpleNamespace) -> None:
    assert trained.process.returncode == 0, trained.process.stderr
    run_dir, log_dir = trained.run_dir, trained.log_dir
    config = json.loads((run_dir / "config.json").read_text())["config"]
    metrics = json.loads((run_dir / "metrics.json").read_text())
    with tb.browse(log_dir) as (page, errors):
        tabs, runs = tb.read_names(page)
        assert {"TIME SERIES", "IMAGES", "GRAPHS", "TEXT", "PR CURVES", "HPARAMS"} <= set(tabs)
        assert runs == [run_dir.name]
        points = last_points(run_dir)
        assert tb.read_charts(page, list(points)) == points

        nodes = " ".join(tb.read_graph(page))
        for name in ("stem", "stage1", "stage2", "stage3", "head"):
            assert f"[{name}]" in nodes
        for tag in ("Results/confusion_test", "Confusion/val by epoch", "Training/augmentation"):
            width, height = tb.read_image(page, tag)
            assert width >= 500 and height >= 300, tag

        texts = tb.read_texts(page, ".*")
        assert {"config", "dataset", "layers", "results"} <= set(texts)
        assert ["model", "skipcnn"] in texts["config"]
        row = next(row for row in texts["results"] if row[0] == "test")
        assert row[2].startswith(f"{metrics['test']['accuracy']:.4f} (")
        curves = {f"PR {split}/{name}" for split in ("val", "test") for name in SHORT_NAMES}
        assert set(tb.read_pr_curves(page)) == curves

        (row,) = tb.read_hparams(page)
        assert (row["Trial ID"], row["model"]) == (run_dir.name, config["model"])
        for name in ("lr", "batch_size", "epochs", "seed"):
            assert float(row[name]) == pytest.approx(config[name]), name
        for score in ("val accuracy", "val auc", "test accuracy", "test auc", "test_tta accuracy"):
            split, name = score.split()
            assert float(row[f"hparam/{score}"]) == pytest.approx(metrics[split][name], rel=1e-3)
    assert errors == []
