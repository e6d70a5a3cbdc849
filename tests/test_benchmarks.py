"""The benchmarks run, and accuracy.py keeps what it has measured."""

import importlib
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from analyze_data import ROOT
from MyModels import MODELS
from Runs import Config

BENCHMARKS = ROOT / "tests" / "benchmarks"


def test_accuracy_measures_each_run_once_and_draws_it(tiny, tmp_path, monkeypatch):
    out, names = tmp_path / "accuracy.json", ["epochs: 60", "logistic regression on mean colour"]
    command = [sys.executable, BENCHMARKS / "accuracy.py", "--data", tiny, "--rows", *names]
    command += ["--seeds", "0", "1", "--out", out]
    found = []
    for work in (tmp_path / "work", tmp_path / "of another machine"):  # which has all it needs
        full = [*command, "--work", work]
        printed = subprocess.run(full, check=True, capture_output=True, text=True).stdout
        table = printed[printed.index("| recipe") :]
        found.append((table, out.read_text(), out.stat().st_mtime_ns))
    results = json.loads(out.read_text())
    seeds = [(run["name"], run["seed"]) for run in results["runs"]]
    assert found[0] == found[1] and seeds == [(names[1], 0), (names[0], 0), (names[0], 1)]
    assert list(results["ensembles"]) == names[:1]
    both = [np.load(tmp_path / "work" / f"epochs-60-{seed}" / "probs.npz") for seed in (0, 1)]
    for key in ("test", "test_tta"):
        right = (both[0][key] + both[1][key]).argmax(1) == np.load(tiny)["test_labels"].ravel()
        assert results["ensembles"][names[0]][key] == pytest.approx(right.mean())
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    accuracy = importlib.import_module("accuracy")
    row = accuracy.summarise(results["runs"])["epochs: 60"]
    of_both = [run["test"] for run in results["runs"] if run["name"] == "epochs: 60"]
    assert row["epochs"] == 60 and row["test"]["seeds"] == 2
    assert row["test"]["mean"] == pytest.approx(sum(of_both) / 2)
    runs = []
    for name, values in (("default", (0.5, 0.6)), ("without skip connections", (0.7, 0.7))):
        for seed, value in enumerate(values):
            scores = dict.fromkeys((*accuracy.SCORES, "suite"), value)
            runs.append({"name": name, "seed": seed, **scores})
    expected = ["without skip connections", "2", *["+0.150 (0.050)"] * 5]
    assert accuracy.paired(runs)[1:] == [expected]
    drawn = accuracy.figures({"default": row, "epochs: 60": row}, 72)
    assert list(drawn) == ["accuracy_minutes", "accuracy_images", "accuracy_size"]


def test_speed_takes_steps_and_makes_its_table(data, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    speed = importlib.import_module("speed")
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "REPETITIONS", 1)
    config = speed.Training.resolve(Config(device="cpu", batch_size=8), 72)
    steps = speed.measure_steps(data, config)
    assert min(steps.values()) > 0
    results = json.loads((BENCHMARKS / "speed.json").read_text())
    assert "| matmul, GFLOP/s |" in speed.markdown({**results, "steps": steps})


def test_every_corruption_changes_the_tiles_the_same_way_each_time(data, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    robustness = importlib.import_module("robustness")
    images, kinds = data.images["val"], set()
    for kind, severity, corrupt in robustness.suite():
        kinds.add(kind)
        changed = corrupt(images)
        assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
        assert not np.array_equal(changed, images), (kind, severity)
        assert np.array_equal(changed, corrupt(images))
    assert len(kinds) == 9
    model = MODELS["skipcnn"]().eval()
    predict = partial(robustness.probabilities, model)
    found = robustness.measure(predict, images, data.labels["val"])
    means = [np.mean(list(each.values())) for each in found["kinds"].values()]
    assert found["mean"] == pytest.approx(np.mean(means))
    assert "| mean of the kinds |" in robustness.table(found)
    assert len(robustness.severity_figure({"before": found, "after": found}).axes) == 9
