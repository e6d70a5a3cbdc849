"""The embedded sample: small, made by its script, and as hard as it is meant to be."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analyze_data import PathData, channel_stats, load_data
from MyModels import SkipCNN
from PathMNIST import make_loader
from Runs import Config
from Training import TrainingState, fit, predict, resolve


@pytest.fixture(scope="module")
def sample() -> PathData:
    return load_data(ROOT / "data" / "synthetic.npz")


def test_its_script_makes_it_small_and_balanced(sample: PathData, tmp_path: Path) -> None:
    assert sample.path.stat().st_size < 3.5e6 and sample.kind == "synthetic"
    script = [sys.executable, ROOT / "data" / "make_synthetic.py", "--out", tmp_path / "again.npz"]
    subprocess.run(script, check=True)
    again = load_data(tmp_path / "again.npz")
    for split, per_class in (("train", 100), ("val", 20), ("test", 40)):
        assert np.bincount(sample.labels[split]).tolist() == [per_class] * 9
        assert np.array_equal(sample.labels[split], again.labels[split])
        # Other processors round a few values in a hundred thousand to the neighbouring grey level.
        difference = np.abs(sample.images[split].astype(int) - again.images[split])
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_it_is_neither_easy_nor_hopeless(sample: PathData, tmp_path: Path) -> None:
    means = {split: images.mean((1, 2)) for split, images in sample.images.items()}
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    linear.fit(means["train"], sample.labels["train"])
    assert 0.30 < linear.score(means["test"], sample.labels["test"]) < 0.65  # by mean colour
    config = resolve(Config(epochs=8, batch_size=64, device="cpu"), sample.counts["train"])
    torch.manual_seed(0)
    model = SkipCNN(*(values.tolist() for values in channel_stats(sample.images["train"])))
    train = make_loader(sample, "train", config.batch_size, shuffle=True)
    fit(TrainingState(model, config, tmp_path), train, make_loader(sample, "val", 500))
    results = {split: predict(model, make_loader(sample, split, 500)) for split in ("val", "test")}
    accuracy = {split: (p.argmax(1) == labels).mean() for split, (p, labels) in results.items()}
    assert accuracy["val"] > accuracy["test"] > 0.7  # test is of another centre
