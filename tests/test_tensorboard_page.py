"""What a person sees on TensorBoard's page of a run, in a real browser."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from Common import SHORT_NAMES

pytest.importorskip("playwright", reason="needs Playwright (pip install playwright)")
import tensorboard_page as tb

pytestmark = pytest.mark.skipif(not tb.CHROMIUM, reason="needs Chromium")


def last_points(run_dir: Path) -> dict[str, dict]:
    """Return what the charts have to end with: {tag: {run: (step, value)}}."""
    row, name = torch.load(run_dir / "last.pt")["history"][-1], run_dir.name
    points = {"LR": {name: row["lr"]}, "AUC": {f"{name}/val": row["val_auc"]}}
    points["Recall/TUM"] = {f"{name}/val": row["val_recall"][8]}
    for tag in ("Loss", "Accuracy"):
        points[tag] = {f"{name}/{part}": row[f"{part}_{tag.lower()}"] for part in ("train", "val")}
    return {
        tag: {run: (row["epoch"], pytest.approx(v, rel=1e-3, abs=1e-4)) for run, v in each.items()}
        for tag, each in points.items()
    }


def test_page_shows_the_run(trained: SimpleNamespace) -> None:
    assert trained.process.returncode == 0, trained.process.stderr
    run_dir, log_dir = trained.run_dir, trained.log_dir
    config = json.loads((run_dir / "config.json").read_text())["config"]
    metrics = json.loads((run_dir / "metrics.json").read_text())
    with tb.browse(log_dir) as (page, errors):
        tabs, runs = tb.read_names(page)
        assert {"TIME SERIES", "IMAGES", "GRAPHS", "TEXT", "PR CURVES", "HPARAMS"} <= set(tabs)
        name = run_dir.name
        assert runs == [name, f"{name}/train", f"{name}/val"]
        points = last_points(run_dir)
        charts = tb.read_charts(page, list(points))
        assert {t: {run: c[:2] for run, c in charts[t].items()} for t in charts} == points
        for tag in ("Loss", "Accuracy"):  # train and val in two colours on one chart
            assert len({colour for *_, colour in charts[tag].values()}) == 2

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
