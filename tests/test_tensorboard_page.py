"""What a person sees on TensorBoard's page of a run, in a real browser."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorboard_page as tb
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from analyze_data import SHORT_NAMES

pytestmark = pytest.mark.skipif(bool(tb.missing()), reason=tb.missing())


def check_charts(charts: dict[str, dict[str, tuple[int, float]]], run_dir: Path) -> None:
    """Hold the curves' last values, as the page shows them, against the run's history.csv."""
    with open(run_dir / "history.csv") as file:
        last = list(csv.DictReader(file))[-1]
    for chart in ("Loss", "Accuracy"):
        tags = [f"{chart}/train", f"{chart}/val"]
        assert sorted(charts[chart]) == tags
        for tag in tags:
            step, value = charts[chart][tag]
            expected = float(last[f"{tag.split('/')[1]}_{chart.lower()}"])
            assert step == int(last["epoch"]), tag
            assert value == pytest.approx(expected, rel=1e-3), tag


def check_hparams(rows: list[dict[str, str]], run_dir: Path) -> None:
    """Hold the only row of the HParams table against config.json and metrics.json."""
    config = json.loads((run_dir / "config.json").read_text())["config"]
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert [row["Trial ID"] for row in rows] == [run_dir.name]
    assert rows[0]["model"] == config["model"]
    for name in ("lr", "batch_size", "epochs", "seed"):
        assert float(rows[0][name]) == pytest.approx(config[name]), name
    for split in ("val", "test"):
        for name in ("accuracy", "auc"):
            shown = float(rows[0][f"hparam/{split} {name}"])
            assert shown == pytest.approx(metrics[split][name], rel=1e-3), (split, name)


def rewrite_log(run_dir: Path, change: Callable[[Event], None]) -> None:
    """Pass every event of a run's TensorBoard log through `change`."""
    (path,) = run_dir.glob("events.out.tfevents.*")
    events = list(LegacyEventFileLoader(str(path)).Load())
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        for event in events:
            change(event)
            writer.write(event.SerializeToString())


def test_page_shows_the_run(trained: SimpleNamespace):
    assert trained.process.returncode == 0, trained.process.stderr
    run_dir = trained.run_dir
    with tb.serve(trained.log_dir) as url, tb.browse() as (page, errors):
        tabs = ["CUSTOM SCALARS", "IMAGES", "GRAPHS", "TEXT", "PR CURVES", "HPARAMS"]
        assert set(tabs) <= set(tb.read_tabs(page, url))
        assert tb.read_runs(page, url) == [run_dir.name]

        charts = tb.read_charts(page, url)
        check_charts(charts, run_dir)
        assert set(charts["Recall val"]) == {f"Recall val/{name}" for name in SHORT_NAMES}

        nodes = " ".join(tb.read_graph(page, url))
        for name in ("stem", "stage1", "stage2", "stage3", "head"):
            assert f"[{name}]" in nodes

        for tag in ("Results/confusion_test", "Confusion/val by epoch", "Training/augmentation"):
            width, height = tb.read_image(page, url, tag)
            assert width >= 500 and height >= 300, tag

        texts = tb.read_texts(page, url)
        assert {"config", "dataset", "layers", "results"} <= set(texts)
        assert ["model", "skipcnn"] in texts["config"]
        accuracy = json.loads((run_dir / "metrics.json").read_text())["test"]["accuracy"]
        row = next(row for row in texts["results"] if row[0] == "test")
        assert row[2].startswith(f"{accuracy:.4f} (")

        curves = {f"PR {split}/{name}" for split in ("val", "test") for name in SHORT_NAMES}
        assert set(tb.read_pr_curves(page, url)) == curves

        check_hparams(tb.read_hparams(page, url), run_dir)
    assert errors == []


def test_check_fails_when_a_tag_is_renamed(trained: SimpleNamespace, tmp_path: Path):
    copy = tmp_path / "runs" / trained.run_dir.name
    shutil.copytree(trained.run_dir, copy)

    def rename(event: Event) -> None:
        for value in event.summary.value:
            if value.tag == "Loss/val":
                value.tag = "Loss/validation"

    rewrite_log(copy, rename)
    with tb.serve(copy.parent) as url, tb.browse() as (page, _):
        charts = tb.read_charts(page, url)
    with pytest.raises(AssertionError, match="Loss/val"):
        check_charts(charts, copy)
    assert set(charts["Accuracy"]) == {"Accuracy/train", "Accuracy/val"}  # the rest is still there
