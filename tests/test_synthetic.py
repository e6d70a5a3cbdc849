"""The embedded sample: small, made by its script, and as hard as it is meant to be."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analyze_data import PathData, channel_stats, load_data
from MyModels import SkipCNN
from PathMNIST import make_loader
from Training import Config, fit, predict, resolve

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def data() -> PathData:
    return load_data(DATA / "synthetic.npz")


def test_is_small_balanced_and_says_that_it_is_synthetic(data: PathData) -> None:
    assert (DATA / "synthetic.npz").stat().st_size < 3.5e6
    assert data.kind == "synthetic"
    for split, per_class in (("train", 100), ("val", 20), ("test", 40)):
        assert np.bincount(data.labels[split]).tolist() == [per_class] * 9


def test_script_makes_it(data: PathData, tmp_path: Path) -> None:
    script = [sys.executable, str(DATA / "make_synthetic.py")]
    subprocess.run([*script, "--out", str(tmp_path / "again.npz")], check=True)
    again = load_data(tmp_path / "again.npz")
    for split, images in data.images.items():
        # Other processors round a few values in a hundred thousand to the neighbouring grey level.
        difference = np.abs(images.astype(int) - again.images[split])
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
        assert np.array_equal(data.labels[split], again.labels[split])


def test_mean_colour_alone_does_not_solve_it(data: PathData) -> None:
    means = {split: images.mean((1, 2)) for split, images in data.images.items()}
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(means["train"], data.labels["train"])
    assert 0.30 < model.score(means["test"], data.labels["test"]) < 0.65


def test_cnn_solves_it_and_the_other_centre_costs_accuracy(data: PathData, tmp_path: Path) -> None:
    config = resolve(Config(epochs=16, device="cpu"), data.counts["train"])
    mean, std = channel_stats(data.images["train"])
    torch.manual_seed(0)
    model = SkipCNN(mean.tolist(), std.tolist())
    train = make_loader(data, "train", config.batch_size, shuffle_seed=0)
    fit(model, train, make_loader(data, "val", 500), config, tmp_path)
    accuracy = {}
    for split in ("val", "test"):
        probs, labels = predict(model, make_loader(data, split, 500))
        accuracy[split] = (probs.argmax(1) == labels).mean()
    assert accuracy["test"] >= 0.85
    assert accuracy["val"] > accuracy["test"]
