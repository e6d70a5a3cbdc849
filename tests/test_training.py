"""Tests of Training.py, the loaders and the log: python -m pytest tests/test_training.py"""

import copy
import errno
import itertools
import math
import os
import platform
import signal
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from unittest.mock import Mock

import kill_runs
import numpy as np
import pytest
import torch
from conftest import differences, different_checkpoints
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import Optimizer
import Processor
import Training
from Augmentation import to_float
from Common import SHORT_NAMES, Stopped, UserError, write_atomically
from Evaluation import RESULTS, fit_temperature, validation_metrics
from MyModels import SkipCNN
from PathMNIST import make_loader
from Runs import Config
from Training import predict, resolve

Patch = pytest.MonkeyPatch
CONFIG = Config(epochs=3, batch_size=16, device="cpu", precision="fp32", cutmix=0.5)
CONFIG = resolve(CONFIG, 72)


def small():
    """Return a model that trains in no time."""
    return SkipCNN(widths=(4, 4, 8, 8, 8))


def fit(data, run_dir, config=CONFIG):
    """Train a small model into `run_dir`, or go on there."""
    run_dir.mkdir(exist_ok=True)
    torch.manual_seed(config.seed)
    state = Training.TrainingState(small(), config, run_dir)
    train = make_loader(data, "train", config.batch_size, shuffle=True)
    assert Training.fit(state, train, make_loader(data, "val", 500)) is state.history
    return state


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of an uninterrupted run of `CONFIG`."""
    return fit(data, tmp_path_factory.mktemp("fit") / "run").run_dir


def script_val_losses(monkeypatch, losses):
    """Make validation report these losses."""
    left = iter(losses)

    def scripted(*predictions):
        return validation_metrics(*predictions) | {"loss": next(left), "loss_se": 0.0}

    monkeypatch.setattr(Training.Evaluation, "validation_metrics", scripted)


def numbered(data, n):
    """Return data whose n training images are their own numbers."""
    numbers = np.arange(n)
    images, labels = {"train": numbers.reshape(n, 1, 1, 1)}, {"train": numbers % 9}
    return replace(data, images=images, labels=labels)


def test_training_sees_every_image_once_with_its_label(data):
    loader = make_loader(numbered(data, 72), "train", 16, shuffle=True)
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
        orders.append(images.flatten().tolist())
        assert sorted(orders[epoch]) == list(range(72))
        assert torch.equal(images.flatten() % 9, labels)
    assert orders[0] != orders[1]


def test_a_last_batch_of_one_is_only_evaluated(data):
    few = numbered(data, 17)
    assert [len(labels) for _, labels in make_loader(few, "train", 16, shuffle=True)] == [16]
    assert [len(labels) for _, labels in make_loader(few, "train", 16)] == [16, 1]


def test_predict_is_the_mean_over_views_and_changes_nothing(data):
    torch.manual_seed(0)
    model = SkipCNN().train()
    before = copy.deepcopy(dict(model.state_dict()))
    loader = make_loader(data, "val", 35)
    probs, labels = predict(model, loader)
    eight, _ = predict(model, loader, eight_views=True)
    assert differences(before, dict(model.state_dict())) == [] and model.training
    assert labels.tolist() == data.labels["val"].tolist()
    images = torch.from_numpy(data.images["val"])
    views = [images.rot90(turn, (1, 2)) for turn in range(4)]
    views += [view.flip(2) for view in views]
    with torch.no_grad():
        each = [model.eval()(to_float(view)).softmax(1).numpy() for view in views]
    assert np.abs(each[0] - each[1]).max() > 1e-4  # the views do differ
    assert probs == pytest.approx(each[0], abs=1e-6)
    assert eight == pytest.approx(np.mean(each, axis=0), abs=1e-6)


@pytest.mark.parametrize("step", [2, 7, 11])  # of 15: in the first, second and third epoch
def test_resume_equals_never_having_stopped(data, finished, tmp_path, monkeypatch, step):
    calls, augment = itertools.count(1), Training.augment

    def stop(*args):
        if next(calls) == step:
            raise Stopped(signal.SIGINT)
        return augment(*args)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Training, "augment", stop)
        fit(data, tmp_path)
    assert torch.load(tmp_path / "last.pt")["epoch"] == (step - 1) // 5
    torch.rand(7)  # whatever state the random numbers are in
    assert fit(data, tmp_path).resumed
    assert different_checkpoints(finished, tmp_path) == []


def test_training_loss_and_accuracy_are_means_over_images(data, tmp_path):
    # With a learning rate of (almost) 0 and one epoch, the weights are the initial ones; 72 images
    # in batches of 16 leave a last batch of 8, which a mean of means would weight twice.
    plain = {"flips": False, "stain": 0.0, "color": 0.0}
    plain |= {"sharpness": 0.0, "noise": 0.0, "jpeg": 0.0}
    config = replace(CONFIG, epochs=1, lr=1e-12, weight_decay=0.0, **plain)
    (row,) = fit(data, tmp_path, config).history
    torch.manual_seed(config.seed)
    model, loader = small().train(), make_loader(data, "train", 16, shuffle=True)
    Training.seed_epoch(loader, config, 0)
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    logits = torch.cat([model(to_float(batch)) for batch in images.split(16)])
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert row["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert row["train_accuracy"] == (logits.argmax(1) == labels).double().mean()


def test_learning_rate_schedule():
    config = replace(CONFIG, lr=1.0, warmup=0.2)
    rates = [Training.learning_rate(step, 20, config) for step in (0, 2, 4, 12, 16, 20)]
    cosine = (1 - math.sqrt(0.5)) / 2
    assert rates == pytest.approx([0.005, 0.5, 1, 0.5, cosine, 0])


def test_early_stopping_and_the_best_epoch(data, tmp_path, monkeypatch):
    script_val_losses(monkeypatch, [1.0, 0.8, 0.9, 0.7, 0.71, 0.9, 0.1, 0.1])
    config = replace(CONFIG, epochs=8, patience=2)
    state = fit(data, tmp_path, config)
    best = torch.load(tmp_path / "best.pt")
    assert (best["epoch"], len(state.history)) == (4, 6)
    assert differences(best["model"], dict(state.model.state_dict())) == []
    assert len(fit(data, tmp_path, config).history) == 6  # started again, it stays stopped


def test_best_epoch_is_the_latest_within_a_standard_error_of_the_lowest():
    losses = [1.0, 0.50, 0.58, 0.61, 0.40, 0.49, 0.51]
    history = [{"epoch": i + 1, "val_loss": x, "val_loss_se": 0.1} for i, x in enumerate(losses)]
    assert [Training.best_epoch(history[:n]) for n in range(8)] == [0, 1, 2, 3, 3, 5, 6, 6]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(data, tmp_path, monkeypatch):
    script_val_losses(monkeypatch, [1.0, math.nan])
    with pytest.raises(UserError, match="not finite in epoch 2; .*--lr"):
        fit(data, tmp_path)
    epochs = [torch.load(tmp_path / name)["epoch"] for name in ("best.pt", "last.pt")]
    assert epochs == [1, 1]


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 15, 25), (1.0, 40, 40)])
def test_cutmix_mixes_that_share_of_the_batches(share, low, high, tmp_path):
    state = Training.TrainingState(small(), replace(CONFIG, cutmix=share), tmp_path)
    images, labels = torch.zeros(2, 28, 28, 3, dtype=torch.uint8), torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    steps = [Training.train_step(state, images, labels, generator) for _ in range(40)]
    assert low <= sum(targets.ndim == 2 for _, targets in steps) <= high


def test_default_options(monkeypatch):
    resolved = [resolve(Config(device="cpu"), n) for n in (9, 800, 90_000)]
    assert [(c.epochs, c.patience) for c in resolved] == [(300, 100), (255, 85), (15, 5)]
    assert [c.cutmix for c in resolved] == [0.5, 0.5, 0]  # only where images are few
    assert resolve(Config(), 800, "synthetic").epochs == 20  # less than a minute
    assert resolve(CONFIG, 90_000, "synthetic") == CONFIG  # what is given stays
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Processor, "has_fast_bf16", lambda device: device == "cuda")
    config = resolve(Config(), 90_000)
    assert (config.device, config.precision, config.epochs) == ("cuda", "bf16", 60)


@pytest.mark.parametrize(
    ("amx", "vendor", "fast"),
    [(True, "Intel", True), (False, "Intel", False), (False, "AuthenticAMD", True)],
)
def test_bf16_is_taken_by_what_the_processor_is(monkeypatch, amx, vendor, fast):
    features = {"avx512_bf16": True, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(platform, "processor", lambda: vendor)
    monkeypatch.setattr(Path, "exists", lambda _path: False)  # no /proc/cpuinfo, as on Windows
    assert Processor.has_fast_bf16("cpu") is fast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [24, 48])
def test_muon_steps_as_torchs_does(dtype, rows):
    """In bf16 bit for bit; in fp32 as closely as bf16 allows."""

    def as_kernel(matrix):
        return matrix.detach().view(rows, 3, 3, 4).permute(0, 3, 1, 2).clone()

    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(rows, 36))
    start = as_kernel(matrix)
    kernel = nn.Parameter(as_kernel(matrix))
    options = {"lr": 0.02, "weight_decay": 0.05, "ns_steps": 3}
    ours = Optimizer.ConvMuon([kernel], dtype, **options)
    theirs = torch.optim.Muon([matrix], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        matrix.grad = torch.randn_like(matrix)
        kernel.grad = as_kernel(matrix.grad)
        ours.step()
        theirs.step()
    allowed = 0 if dtype == torch.bfloat16 else 0.02 * (kernel - start).norm()
    assert (kernel - as_kernel(matrix)).norm() <= allowed < (kernel - start).norm()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Stopped(15)])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_file_system_without_fsync_does_no_harm(tmp_path, monkeypatch):
    error = OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_calibration_finds_the_temperature_once(data, tmp_path):
    model = fit(data, tmp_path).model
    best = (tmp_path / "best.pt").read_bytes()
    temperature = torch.load(tmp_path / "best.pt")["model"]["temperature"]
    assert model.temperature == temperature != 1
    model.temperature.fill_(1)
    expected = fit_temperature(*predict(model, make_loader(data, "val", 500)))
    assert temperature.item() == pytest.approx(expected, rel=1e-6)
    fit(data, tmp_path)
    assert (tmp_path / "best.pt").read_bytes() == best


@pytest.mark.parametrize(
    ("quota", "fixed", "expected"), [(4, False, [4, 2]), (3, False, [3, 2]), (3, True, [4, 4])]
)
def test_threads_make_room_for_others(monkeypatch, quota, fixed, expected):
    """Of four cores, other programs use two; a container may use `quota` of the four."""
    psutil = Mock(cpu_count=lambda: 4, cpu_percent=lambda: 50.0)
    psutil.Process().cpu_percent = lambda: 0.0  # this process
    psutil.Error = OSError
    monkeypatch.setattr(Processor, "psutil", psutil)
    monkeypatch.setattr(Processor.joblib, "cpu_count", lambda: quota)
    monkeypatch.setattr(time, "perf_counter", itertools.count(2, 2).__next__)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if fixed:
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    for _ in range(2):  # the second fit starts again with all threads
        with Processor.Threads() as threads:
            used = [torch.get_num_threads()]
            threads.adapt()
            used.append(torch.get_num_threads())
        assert used == expected and torch.get_num_threads() == 4
    torch.set_num_threads(before)


def test_the_log_read_back(trained):
    history = torch.load(trained.run_dir / "last.pt")["history"]
    columns = {"learning rate": "lr", "val/epoch/auc": "val_auc"}
    for split in ("train", "val"):
        columns[f"{split}/epoch/loss"] = f"{split}_loss"
        columns[f"{split}/epoch/accuracy"] = f"{split}_accuracy"
    expected = {tag: [row[column] for row in history] for tag, column in columns.items()}
    for label, short in enumerate(SHORT_NAMES):
        expected[f"val/recall/{short}"] = [row["val_recall"][label] for row in history]
    shown = kill_runs.curves(trained.run_dir)
    for tag, numbers in expected.items():
        steps, values = zip(*shown.pop(tag), strict=True)
        assert steps == (1, 2, 3) and values == pytest.approx(numbers, rel=1e-6), tag
    scores = {f"results/{key} accuracy" for key in RESULTS}  # what HParams shows
    assert shown.keys() == scores | {"speed/images per second"}

    log = EventAccumulator(str(trained.run_dir)).Reload()
    for path in (trained.run_dir / "figures").iterdir():
        (event,) = log.Images(f"results/{path.stem}")
        logged, saved = Image.open(BytesIO(event.encoded_image_string)), Image.open(path)
        assert np.array_equal(np.asarray(logged), np.asarray(saved))
    assert log.Images("pictures/augmentation")[0].step == 0
    assert [event.step for event in log.Images("pictures/confusion by epoch")] == [1, 2, 3]
    assert {"config/text_summary", "PR test/ADI"} <= set(log.Tags()["tensors"])
