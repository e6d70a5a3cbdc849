"""The benchmarks run, and accuracy.py keeps what it has measured."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from analyze_data import ROOT, PathData
from Runs import Config

BENCHMARKS = ROOT / "tests" / "benchmarks"


def test_accuracy_measures_each_run_once_and_draws_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "accuracy.json", ["epochs: 1", "logistic regression on mean colour"]
    command = [sys.executable, BENCHMARKS / "accuracy.py", "--data", tiny, "--rows", *names]
    command += ["--seeds", "0", "1", "--work", tmp_path / "work", "--out", out]
    found = []
    for _ in range(2):  # the second time everything is there
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(
            (printed[printed.index("| recipe") :], out.read_text(), out.stat().st_mtime_ns)
        )
    results = json.loads(out.read_text())
    seeds = [(run["name"], run["seed"]) for run in results["runs"]]
    assert found[0] == found[1] and seeds == [(names[1], 0), (names[0], 0), (names[0], 1)]
    assert list(results["ensembles"]) == names[:1]
    assert 0 <= results["ensembles"][names[0]]["test_tta"] <= 1
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    accuracy = importlib.import_module("accuracy")
    row = accuracy.summarise(results["runs"])["epochs: 1"]
    of_both = [run["test"] for run in results["runs"] if run["name"] == "epochs: 1"]
    assert row["epochs"] == 1 and row["test"]["seeds"] == 2
    assert row["test"]["mean"] == pytest.approx(sum(of_both) / 2)
    drawn = accuracy.figures({"default": row, "epochs: 1": row}, 72)
    assert list(drawn) == ["accuracy_minutes", "accuracy_images"]


def test_speed_takes_a_step_and_makes_its_table(
    data: PathData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    speed = importlib.import_module("speed")
    speed.our_step(data, speed.Training.resolve(Config(device="cpu"), 72))()
    results = json.loads((BENCHMARKS / "speed.json").read_text())
    assert "matmul of 4096 x 4096" in speed.markdown(results)
