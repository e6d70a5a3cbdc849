"""What a person sees on TensorBoard's page of a run, in a real browser."""

import json

import pytest
import torch

from Evaluation import RESULTS

pytest.importorskip("playwright", reason="needs Playwright (pip install playwright)")
import tensorboard_page as tb
from playwright.sync_api import expect

pytestmark = pytest.mark.skipif(not tb.CHROMIUM, reason="needs Chromium")


def test_page_shows_the_run(trained):
    assert trained.process.returncode == 0, trained.process.stderr
    run_dir = trained.run_dir
    config = json.loads((run_dir / "config.json").read_text())["config"]
    metrics = json.loads((run_dir / "metrics.json").read_text())
    with tb.browse(trained.log_dir) as (page, errors):
        # The curves that matter are in the window when the page opens, without a click or a filter.
        for tag in ("epoch/accuracy", "epoch/auc", "epoch/loss"):
            chart = page.locator(f'card-view:has([title="{tag}"]) line-chart')
            expect(chart).to_be_in_viewport(ratio=1, timeout=1000 * tb.LIMIT)
        check_charts(tb.read_charts(page), torch.load(run_dir / "last.pt")["history"][-1])

        nodes = " ".join(tb.open_graph(page))
        for name in ("stem", "stage1", "stage2", "stage3", "head"):
            assert f"[{name}]" in nodes
        texts = tb.read_texts(page)
        assert texts.keys() == {"config", "dataset", "layers", "results"}
        assert ["model", "skipcnn"] in texts["config"]
        assert [row[0] for row in texts["results"][1:]] == list(RESULTS)
        (row,) = tb.read_hparams(page)
        assert (row["Trial ID"], row["model"]) == (run_dir.name, config["model"])
        for name in ("lr", "batch_size", "epochs", "seed"):
            assert float(row[name]) == pytest.approx(config[name]), name
        for key in RESULTS:
            shown = float(row[f"results/{key} accuracy"])
            assert shown == pytest.approx(metrics[key]["accuracy"], rel=1e-3)
    assert errors == []


def check_charts(charts, row):
    """Compare the open charts with the last row of the history."""
    expected = {
        "epoch/accuracy": {"main/train": row["train_accuracy"], "main/val": row["val_accuracy"]},
        "epoch/auc": {"main/val": row["val_auc"]},
        "epoch/loss": {"main/train": row["train_loss"], "main/val": row["val_loss"]},
        "learning rate": {"main": row["lr"]},
    }
    assert charts.keys() == expected.keys()
    for tag, values in expected.items():
        assert charts[tag].keys() == values.keys(), tag
        for run, value in values.items():
            step, shown, _colour = charts[tag][run]
            assert step == row["epoch"]
            assert shown == pytest.approx(value, abs=1e-4), (tag, run)
        colours = {colour for _, _, colour in charts[tag].values()}
        assert len(colours) == len(values)  # train and val differ
