"""The synthetic sample is what its script draws, and it is neither too easy nor too hard."""

import subprocess
import sys

import numpy as np
import torch
from conftest import ROOT
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from analyze_data import channel_stats, load_data
from MyModels import SkipCNN
from PathMNIST import make_loader
from Runs import Config
from Training import TrainingState, fit, predict, resolve

SAMPLE = ROOT / "data" / "synthetic.npz"


def test_the_script_draws_the_committed_file(tmp_path):
    script = SAMPLE.with_name("make_synthetic.py")
    subprocess.run([sys.executable, script, "--out", tmp_path / "new.npz"], check=True)
    sample = load_data(SAMPLE)
    new = load_data(tmp_path / "new.npz")
    assert sample.kind == "synthetic"
    assert SAMPLE.stat().st_size < 3.5e6
    for split, per_class in {"train": 100, "val": 20, "test": 40}.items():
        assert np.bincount(sample.labels[split]).tolist() == [per_class] * 9
        # Another processor may round a few pixels differently.
        np.testing.assert_allclose(sample.images[split], new.images[split], rtol=0, atol=1)


def test_colour_alone_does_not_solve_it_but_the_network_learns_it(tmp_path):
    sample = load_data(SAMPLE)
    colours = {split: images.mean(axis=(1, 2)) for split, images in sample.images.items()}
    linear = LinearDiscriminantAnalysis()
    linear.fit(colours["train"], sample.labels["train"])
    assert 0.30 < linear.score(colours["test"], sample.labels["test"]) < 0.65

    torch.manual_seed(0)
    mean, std = channel_stats(sample.images["train"])
    model = SkipCNN(mean.tolist(), std.tolist())
    config = resolve(Config(epochs=6, device="cpu"), 900)
    state = TrainingState(model, config, tmp_path)
    fit(state, make_loader(sample, "train", 64, shuffle=True), make_loader(sample, "val", 500))
    probs, labels = predict(model, make_loader(sample, "test", 500))
    assert 0.70 < (probs.argmax(axis=1) == labels).mean() < 0.99
