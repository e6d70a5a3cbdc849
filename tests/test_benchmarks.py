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
        times = sorted(path.stat().st_mtime_ns for path in tmp_path.glob("work/*/scores.json"))
        rows = json.loads(out.read_text())["rows"]
        found.append((printed[printed.index("| recipe") :], times, rows))
    assert found[0] == found[1] and len(found[0][1]) == 3 and rows.keys() == set(names)
    row = rows["epochs: 1"]
    assert row["epochs"] == 1 and row["seeds"] == [0, 1]
    assert row["test"]["mean"] == pytest.approx(sum(row["test"]["runs"]) / 2)
    assert 0 <= row["ensemble_test_tta"] <= 1
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    drawn = importlib.import_module("accuracy").figures({"default": row, "epochs: 1": row}, 72)
    assert list(drawn) == ["accuracy_minutes", "accuracy_images"]


def test_speed_takes_a_step_and_makes_its_table(
    data: PathData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    speed = importlib.import_module("speed")
    speed.our_step(data, speed.Training.resolve(Config(device="cpu"), 72))()
    results = json.loads((BENCHMARKS / "speed.json").read_text())
    assert "matmul of 4096 x 4096" in speed.markdown(results)
