"""Tests of Training.py: python -m pytest tests/test_training.py"""

import csv
import errno
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAINING, differences, different_checkpoints, only_line
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import Training
from analyze_data import SHORT_NAMES, PathData, UserError
from Evaluation import compute_metrics
from MyModels import SkipCNN
from PathMNIST import make_loader
from Training import Config, Stopped, augment, predict, random_view, resolve, to_float

CONFIG = resolve(Config(epochs=3, batch_size=16, device="cpu", precision="fp32"), 72)
PLAIN = {"flips": False, "stain": 0.0, "color": 0.0, "cutmix": 0.0}  # no augmentation at all


class Small(nn.Module):
    """A model with all that makes training hard to repeat, and fast: BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        # BatchNorm over single values: a batch of one image is an error.
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 9))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def fit(data: PathData, run_dir: Path, config: Config = CONFIG) -> list[dict]:
    """Train a small model into `run_dir`, or go on there."""
    run_dir.mkdir(exist_ok=True)
    torch.manual_seed(config.seed)
    model = Small()
    train = make_loader(data, "train", config.batch_size, "cpu", config.seed)
    val = make_loader(data, "val", 500)
    return Training.fit(model, train, val, config, run_dir)


def load(path: Path) -> dict:
    """Read a checkpoint without this project's own code."""
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def finished(data: PathData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of `CONFIG`."""
    run_dir = tmp_path_factory.mktemp("fit") / "run"
    history = fit(data, run_dir)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    return run_dir


def script_val_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict]:
    """Make validation report these losses; return the list of weights that it was asked about."""
    seen, validate = [], Training.validate

    def scripted(model: nn.Module, loader: object) -> tuple:
        row, probs, labels = validate(model, loader)
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return row | {"val_loss": losses[len(seen) - 1], "val_loss_se": 0.0}, probs, labels

    monkeypatch.setattr(Training, "validate", scripted)
    return seen


# ---- augmentation -------------------------------------------------------------------------------


def eight(image: np.ndarray) -> list[bytes]:
    """Return the eight flips and quarter turns of an image (S, S, 3), as numpy makes them."""
    turned = [np.rot90(image, k) for k in range(4)]
    return [view.tobytes() for view in turned + [turn[:, ::-1] for turn in turned]]


def asymmetric() -> np.ndarray:
    """An image whose eight views all differ, as do its shifts."""
    return np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def test_random_view_draws_each_of_the_eight_views_per_image() -> None:
    image = asymmetric()
    batch = torch.from_numpy(np.stack([image] * 400))
    views = random_view(batch, torch.Generator().manual_seed(0), shift=0)
    assert views.dtype == torch.uint8 and views.shape == batch.shape
    counts = [sum(view.tobytes() == e for view in views.numpy()) for e in eight(image)]
    assert sum(counts) == 400
    assert min(counts) > 25, counts  # 50 each, standard deviation 6.6


def test_random_view_shifts_by_two_pixels_at_most() -> None:
    image = asymmetric()
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    shifts = [padded[y : y + 12, x : x + 12] for y in range(5) for x in range(5)]
    allowed = {view for shifted in shifts for view in eight(shifted)}
    batch = torch.from_numpy(np.stack([image] * 2000))
    drawn = {v.tobytes() for v in random_view(batch, torch.Generator().manual_seed(0)).numpy()}
    assert len(allowed) == 200
    assert drawn == allowed


def test_augmentation_differs_per_image_and_follows_the_generator() -> None:
    batch = torch.from_numpy(np.stack([asymmetric()] * 32))
    for on in ({"flips": True}, {"stain": 0.1}, {"color": 0.1}):
        config = replace(CONFIG, **PLAIN | on)
        views = augment(batch, torch.Generator().manual_seed(1), config)
        assert len({view.numpy().tobytes() for view in views}) > 24, on
        assert torch.equal(views, augment(batch, torch.Generator().manual_seed(1), config))
        assert not torch.equal(views, augment(batch, torch.Generator().manual_seed(2), config))


def test_augmentation_keeps_each_image_in_its_place() -> None:
    values = torch.arange(40, dtype=torch.uint8)
    batch = values.view(40, 1, 1, 1).expand(40, 12, 12, 3).contiguous()
    config = replace(CONFIG, **PLAIN | {"flips": True})
    views = augment(batch, torch.Generator().manual_seed(0), config)
    assert torch.equal((views * 255).round().amin((1, 2, 3)), values.float())
    assert torch.equal((views * 255).round().amax((1, 2, 3)), values.float())


def test_stain_jitter_scales_shifts_and_recolours_each_stain_in_optical_density() -> None:
    images = to_float(torch.from_numpy(np.stack([asymmetric().clip(30, 220)] * 200)))
    jittered = Training.stain_jitter(images, torch.Generator().manual_seed(0), 0.2)
    hed = Training.HED.double()
    gains, colours = [], []
    for before, after in zip(images.double(), jittered.double(), strict=True):
        x, y = (-t.log().flatten(1).T for t in (before, after))
        amounts = torch.cat([x @ torch.linalg.inv(hed), torch.ones(len(x), 1)], 1)
        fit = torch.linalg.lstsq(amounts, y).solution  # three stains, and what was added
        assert torch.allclose(amounts @ fit, y, atol=1e-4)
        assert fit[3].abs().max() <= 0.2 / 4 * 3 * (1 + 0.08) + 1e-4
        # Of each stain: one gain within +- 20 % for all three channels, the rest is its colour.
        low, high = (fit[:3] / (hed + side * 0.08) for side in (1, -1))
        low, high = (torch.where(hed > 0.08, t, fill) for t, fill in ((low, 0.0), (high, 9.0)))
        assert (low.amax(1).clamp_min(0.8) <= high.amin(1).clamp_max(1.2) + 1e-4).all()
        gains.append((fit[:3] * hed).sum(1) / (hed * hed).sum(1))
        colours.append(fit[:3] / fit[:3].norm(dim=1, keepdim=True))
    assert 0.11 < torch.stack(gains).std() < 0.14  # 0.115 of the gain, 0.046 of the colour
    assert (torch.stack(colours).std(0) > 0.005).all()
    unchanged = Training.stain_jitter(images, torch.Generator().manual_seed(0), 0.0)
    assert torch.allclose(unchanged, images, atol=1e-5)


def test_cutmix_mixes_targets_by_the_area_that_was_pasted() -> None:
    n, size = 6, 28
    values = torch.arange(float(n))
    images = values.view(n, 1, 1, 1).expand(n, 3, size, size)
    generator, areas = torch.Generator().manual_seed(0), []
    for _ in range(300):
        mixed, soft = Training.cutmix(images, torch.eye(n), generator, 0.5)
        pasted = mixed[:, 0] == values.flip(0).view(n, 1, 1)
        assert (pasted | (mixed[:, 0] == values.view(n, 1, 1))).all()
        area = pasted.float().mean((1, 2))
        rows = torch.arange(n)
        assert torch.allclose(soft[rows, n - 1 - rows], area)
        assert torch.allclose(soft[rows, rows], 1 - area)
        assert (area == area[0]).all()  # one rectangle for the batch
        areas.append(area[0].item())
    assert np.mean(np.array(areas) > 0) == pytest.approx(0.5, abs=0.1)
    assert max(areas) <= (19 / size) ** 2
    assert min(a for a in areas if a) >= (4 / size) ** 2


def test_augmentation_changes_nothing_when_it_is_off() -> None:
    batch = torch.from_numpy(asymmetric()[None])
    views = augment(batch, torch.Generator().manual_seed(0), replace(CONFIG, **PLAIN))
    expected = asymmetric().transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    assert np.array_equal(views.numpy(), expected)


def test_what_half_of_the_gpus_memory_cannot_hold_stays_in_the_computers(
    data: PathData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 10**9))
    loader = make_loader(data, "train", 16, "cuda", 0)
    assert {tensor.device.type for tensor in loader.dataset.tensors} == {"cpu"}
    assert loader.pin_memory


def test_training_sees_every_image_once_with_its_label(data: PathData) -> None:
    loader = make_loader(data, "train", 16, "cpu", 0)
    known = zip(data.images["train"], data.labels["train"], strict=True)
    label_of = {image.tobytes(): label for image, label in known}
    orders = []
    for epoch in range(2):
        loader.sampler.sampler.set_epoch(epoch)
        order = [
            (i.numpy().tobytes(), n.item()) for x, y in loader for i, n in zip(x, y, strict=True)
        ]
        assert dict(order) == label_of and len(order) == len(label_of)
        orders.append(order)
    assert orders[0] != orders[1]


# ---- prediction ---------------------------------------------------------------------------------


def test_predict_is_the_plain_model_and_changes_nothing(data: PathData) -> None:
    torch.manual_seed(0)
    model = SkipCNN().train()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probs, labels = predict(model, make_loader(data, "val", 500))
    assert differences(before, dict(model.state_dict())) == []
    assert [module.training for module in model.modules()] == modes

    images = to_float(torch.from_numpy(data.images["val"]))
    with torch.no_grad():
        plain = model.eval()(images).softmax(1).numpy()
    assert np.array_equal(labels, data.labels["val"])
    assert probs.dtype == np.float32 and np.allclose(probs, plain, atol=1e-6)


def test_eight_views_are_the_mean_over_flips_and_turns(data: PathData) -> None:
    torch.manual_seed(0)
    model = SkipCNN().eval()
    probs, _ = predict(model, make_loader(data, "val", 500), views=8)
    images = data.images["val"]
    turned = [np.rot90(images, k, axes=(1, 2)) for k in range(4)]
    with torch.no_grad():
        each = [
            model(to_float(torch.from_numpy(view.copy()))).softmax(1).numpy()
            for view in turned + [turn[:, :, ::-1] for turn in turned]
        ]
    assert np.abs(each[0] - each[1]).max() > 1e-4  # the views do differ
    assert np.allclose(probs, np.mean(each, axis=0), atol=1e-6)


def test_metrics_do_not_depend_on_the_batch_size(data: PathData) -> None:
    torch.manual_seed(0)
    model = SkipCNN().eval()
    whole, labels = predict(model, make_loader(data, "val", 500))
    expected = compute_metrics(whole, labels)
    for batch_size in (1, 7, 35):  # the last batches are of one
        probs, _ = predict(model, make_loader(data, "val", batch_size))
        assert np.allclose(probs, whole, atol=1e-6)
        metrics = compute_metrics(probs, labels)
        assert metrics["confusion_matrix"] == expected["confusion_matrix"]
        for name in ("accuracy", "auc", "loss", "ece", "macro_f1"):
            assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name


# ---- the loop -----------------------------------------------------------------------------------


def test_same_seed_same_weights_other_seed_other_weights(
    data: PathData, finished: Path, tmp_path: Path
) -> None:
    fit(data, tmp_path / "again")
    assert different_checkpoints(finished, tmp_path / "again") == []
    fit(data, tmp_path / "other", replace(CONFIG, seed=1))
    weights = [load(run / "last.pt")["model"] for run in (finished, tmp_path / "other")]
    assert not torch.equal(*[w["features.0.weight"] for w in weights])


@pytest.mark.parametrize("step", [2, 7, 11])  # of 15: in the first, second and third epoch
def test_resume_equals_never_having_stopped(
    data: PathData,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    calls = []

    def stop(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == step:
            raise Stopped(signal.SIGINT)
        return augment(*args)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Training, "augment", stop)
        fit(data, tmp_path)
    assert load(tmp_path / "last.pt")["epoch"] == (step - 1) // 5
    torch.rand(7)  # whatever state the random numbers are in
    history = fit(data, tmp_path)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert different_checkpoints(finished, tmp_path) == []


def test_history_is_the_same_in_checkpoint_and_csv(finished: Path) -> None:
    history = load(finished / "last.pt")["history"]
    rows = list(csv.DictReader((finished / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row, expected in zip(rows, history, strict=True):
        assert all(float(row[name]) == expected[name] for name in row)
    assert sorted(p.name for p in finished.iterdir()) == ["best.pt", "history.csv", "last.pt"]


def test_a_last_batch_of_one_does_not_break_training(data: PathData, tmp_path: Path) -> None:
    few = replace(
        data,
        images=data.images | {"train": data.images["train"][::4][:17]},
        labels=data.labels | {"train": data.labels["train"][::4][:17]},
    )
    loader = make_loader(few, "train", 16, "cpu", 0)
    assert [len(labels) for _, labels in loader] == [16]
    history = fit(few, tmp_path, replace(CONFIG, epochs=2))
    assert len(history) == 2 and math.isfinite(history[-1]["train_loss"])


def test_training_loss_and_accuracy_are_means_over_images(data: PathData, tmp_path: Path) -> None:
    # With a learning rate of (almost) 0 and one epoch, the weights are the initial ones; 72 images
    # in batches of 16 leave a last batch of 8, which a mean of means would weight twice.
    config = replace(CONFIG, epochs=1, lr=1e-12, weight_decay=0.0, **PLAIN)
    (row,) = fit(data, tmp_path, config)
    torch.manual_seed(config.seed)
    model = Small().train()
    loader = make_loader(data, "train", 16, "cpu", config.seed)
    Training.seed_epoch(loader, config, 0)
    with torch.no_grad():
        both = [(model(to_float(images)), labels) for images, labels in loader]
    logits, labels = (torch.cat(part) for part in zip(*both, strict=True))
    expected = nn.functional.cross_entropy(logits.double(), labels).item()
    assert row["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert row["train_accuracy"] == (logits.argmax(1) == labels).double().mean().item()


def test_learning_rate_schedule() -> None:
    config = replace(CONFIG, lr=1.0, warmup=0.2)
    expected = {0: 0.005, 1: 0.25, 2: 0.5, 4: 1.0, 12: 0.5, 16: (1 - math.sqrt(0.5)) / 2, 20: 0.0}
    for step, value in expected.items():
        assert Training.learning_rate(step, 20, config) == pytest.approx(value, abs=1e-12), step


def test_moving_average_equals_a_loop_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    config = replace(CONFIG, ema=0.1)
    averaged, update = Training.make_average(model, config, 50)  # horizon: 5 steps
    by_hand = {k: v.double().clone() for k, v in model.state_dict().items()}
    for step in range(50):
        model(torch.randn(4, 3))  # moves the BatchNorm statistics
        with torch.no_grad():
            model[0].weight += torch.randn(2, 3)
        update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                by_hand[key] = decay * by_hand[key] + (1 - decay) * value.double()
    for key in ("0.weight", "1.running_mean", "1.running_var"):
        assert torch.allclose(averaged.state_dict()[key].double(), by_hand[key], atol=1e-5), key
    assert not averaged.training
    assert Training.make_average(model, replace(CONFIG, ema=0.0), 50)[0] is model


def test_early_stopping_and_the_best_epoch(
    data: PathData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = script_val_losses(monkeypatch, [1.0, 0.8, 0.9, 0.7, 0.71, 0.9, 0.1, 0.1])
    history = fit(data, tmp_path, replace(CONFIG, epochs=8, patience=2))
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    best = load(tmp_path / "best.pt")
    assert best["epoch"] == 4
    assert differences(best["model"], seen[3]) == []
    assert differences(load(tmp_path / "last.pt")["averaged"], seen[5]) == []
    # Started again, it stays stopped.
    assert len(fit(data, tmp_path, replace(CONFIG, epochs=8, patience=2))) == 6


def test_best_epoch_is_the_latest_within_a_standard_error_of_the_lowest() -> None:
    losses = [1.0, 0.50, 0.58, 0.61, 0.40, 0.49, 0.51]
    history = [
        {"epoch": epoch, "val_loss": loss, "val_loss_se": 0.1}
        for epoch, loss in enumerate(losses, start=1)
    ]
    assert [Training.best_epoch(history[:n]) for n in range(8)] == [0, 1, 2, 3, 3, 5, 6, 6]


def test_the_model_is_left_with_the_best_weights(
    data: PathData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = script_val_losses(monkeypatch, [0.5, 0.9, 0.9])
    model = Small()
    loaders = make_loader(data, "train", 16, "cpu", 0), make_loader(data, "val", 500)
    Training.fit(model, *loaders, CONFIG, tmp_path)
    assert differences(dict(model.state_dict()), seen[0]) == []


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(
    data: PathData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = script_val_losses(monkeypatch, [1.0, math.nan])
    with pytest.raises(UserError, match=r"epoch 2 .*best\.pt keeps epoch 1.*--lr"):
        fit(data, tmp_path)
    assert differences(load(tmp_path / "best.pt")["model"], seen[0]) == []
    assert load(tmp_path / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_divergence_at_the_command_line(
    cli: Callable, no_figures: None, tiny: Path, tmp_path: Path, precision: str
) -> None:
    argv = ["--data", tiny, *TRAINING, "--lr", "1e9", "--log-dir", tmp_path, "--name", "wild"]
    status, _, err = cli(*argv, "--precision", precision)
    line = only_line(err)
    assert status == 2
    assert "not finite in epoch" in line and "lower --lr" in line
    assert ("--precision fp32" in line) == (precision == "bf16")


def test_an_epoch_is_printed_once_it_is_saved(
    data: PathData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []

    def note(row: dict, *_: object) -> None:
        printed.append((row["epoch"], load(tmp_path / "last.pt")["epoch"]))

    monkeypatch.setattr(Training, "print_epoch", note)
    fit(data, tmp_path)
    assert printed == [(1, 1), (2, 2), (3, 3)]


# ---- options ------------------------------------------------------------------------------------


def test_default_epochs_serve_small_and_full_data() -> None:
    small, full = (resolve(Config(device="cpu"), n) for n in (800, 90_000))
    batches = math.ceil(800 / small.batch_size)
    assert 1500 <= small.epochs * batches <= 5000
    assert (small.epochs, full.epochs) == (123, 8)  # as report.md says
    assert resolve(Config(device="cpu"), 9).epochs <= 1000
    for config in (small, full):
        assert 1 <= config.patience <= config.epochs
    given = resolve(Config(epochs=7, patience=3, device="cpu"), 800)
    assert (given.epochs, given.patience) == (7, 3)
    assert resolve(given, 90_000) == given  # resolving twice changes nothing


def test_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Training, "has_mps", lambda: False)
    monkeypatch.setattr(Training, "is_bf16_faster", lambda device: True)
    assert resolve(Config(), 800).device == "cpu"
    assert resolve(Config(), 800).precision == "bf16"
    assert resolve(Config(precision="fp32"), 800).precision == "fp32"
    for device in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {device}"):
            resolve(Config(device=device), 800)
    monkeypatch.setattr(Training, "is_bf16_faster", lambda device: False)
    assert resolve(Config(), 800).precision == "fp32"
    assert resolve(Config(precision="bf16"), 800).precision == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve(Config(), 800).device == "cuda"
    assert resolve(Config(device="cpu"), 800).device == "cpu"


@pytest.mark.parametrize(("capable", "bf16"), [(True, 2.0), (True, 0.5), (False, 0.5)])
def test_bf16_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, capable: bool, bf16: float
) -> None:
    """`bf16`: how long its matrix product takes, that in float32 taking 1."""
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16}

    def repeat(work, **_: int) -> list[float]:
        assert torch.get_num_threads() == 1
        return [seconds[work().dtype] + noise for noise in (3.0, 0.0)]

    before = torch.get_num_threads()
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False
    )
    monkeypatch.setattr(Training.timeit, "repeat", repeat)
    measure = Training.is_bf16_faster.__wrapped__  # without the cache
    assert measure("cpu") == (capable and bf16 < 1)
    assert torch.get_num_threads() == before
    assert not measure("mps")


def test_an_apple_gpu_is_used_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Training, "has_mps", lambda: True)
    assert resolve(Config(), 800).device == "cpu"
    config = resolve(Config(device="mps"), 800)
    assert (config.device, config.precision) == ("mps", "fp32")


def test_memory_format_of_each_device() -> None:
    asked = []

    class Recorder(nn.Module):
        def to(self, device: str, memory_format: torch.memory_format) -> nn.Module:
            asked.append(memory_format)
            return self

    for device in ("cpu", "cuda", "mps"):
        Training.to_device(Recorder(), device)
    assert asked == [torch.channels_last, torch.channels_last, torch.contiguous_format]
    model = Training.to_device(SkipCNN(), "cpu")
    assert model.stem[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_several_processes_do_not_use_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Training.has_mps()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not Training.has_mps()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_steps_as_torchs_does(dtype: torch.dtype) -> None:
    """In bf16 bit for bit; in fp32 as closely as bf16 allows."""
    shapes = [(24, 8, 3, 3), (48, 4, 3, 3), (32, 16, 1, 1)]  # more columns, more rows, 1 x 1
    options = {"lr": 0.02, "weight_decay": 0.05, "ns_steps": 3}

    def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().permute(0, 2, 3, 1).flatten(1).clone()

    torch.manual_seed(0)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        kernels = [nn.Parameter(torch.randn(s).to(memory_format=memory_format)) for s in shapes]
        matrices = [nn.Parameter(as_matrix(kernel)) for kernel in kernels]
        before = [as_matrix(kernel) for kernel in kernels]
        ours = Training.ConvMuon(kernels, dtype=dtype, **options)
        theirs = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
        for _ in range(4):
            for kernel, matrix in zip(kernels, matrices, strict=True):
                kernel.grad = torch.randn_like(kernel)
                matrix.grad = as_matrix(kernel.grad)
            ours.step()
            theirs.step()
        for kernel, matrix, start in zip(kernels, matrices, before, strict=True):
            difference = (as_matrix(kernel) - matrix).norm()
            moved = (matrix - start).norm()
            assert moved > 0.1
            assert difference == 0 if dtype == torch.bfloat16 else difference < 0.02 * moved


def test_denormal_numbers_are_flushed_in_every_thread() -> None:
    code = "import Training, torch; print(int((torch.full((10**6,), 1e-39) * 0.9).count_nonzero()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    assert done.stdout.strip() == "0"


def test_freed_memory_is_kept_for_the_next_step() -> None:
    code = """
import {}, resource, torch
from MyModels import SkipCNN
model, images = SkipCNN(), torch.rand(64, 3, 28, 28)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        model(images).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10
faults()
print(faults())
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library than glibc")
    counts = []
    for module in ("torch", "Training"):
        command = [sys.executable, "-c", code.format(module)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        counts.append(float(done.stdout))
    if counts[0] < 300:
        pytest.skip("here freed memory is kept anyway")
    assert counts[1] < counts[0] / 3


# ---- files and signals --------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Stopped(15)])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    Training.write_atomically(path, b"old")
    with monkeypatch.context() as patched:

        def fail(*_args: object) -> None:
            raise error

        patched.setattr(os, failing, fail)
        expected = UserError if isinstance(error, OSError) else Stopped
        with pytest.raises(expected):
            Training.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    Training.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(UserError, match="nowhere"):
        Training.write_atomically(tmp_path / "nowhere" / "file", b"new")


def test_a_failed_clean_up_does_not_hide_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(UserError, match="file: cannot be written"):
        Training.write_atomically(tmp_path / "file", b"new")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_an_exception_and_the_second_the_systems(first: signal.Signals) -> None:
    Stopped.install()
    with pytest.raises(Stopped) as stop:
        signal.raise_signal(first)
    assert stop.value.signum == first
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- TensorBoard --------------------------------------------------------------------------------


def test_the_log_read_back(trained: object) -> None:
    logs = list(trained.log_dir.rglob("events*"))
    assert len(logs) == 1 and logs[0].parent == trained.run_dir  # one run, one file
    log = EventAccumulator(str(trained.run_dir), size_guidance={"tensors": 0, "scalars": 0})
    log.Reload()
    history = load(trained.run_dir / "last.pt")["history"]
    columns = {
        "Loss/train": "train_loss",
        "Loss/val": "val_loss",
        "Accuracy/train": "train_accuracy",
        "Accuracy/val": "val_accuracy",
        "AUC/val": "val_auc",
        "LR": "lr",
    }
    for tag, column in columns.items():
        events = log.Scalars(tag)
        assert [event.step for event in events] == [1, 2, 3], tag
        expected = [row[column] for row in history]
        assert [event.value for event in events] == pytest.approx(expected, rel=1e-6), tag
    for label, name in enumerate(SHORT_NAMES):
        values = [event.value for event in log.Scalars(f"Recall val/{name}")]
        assert values == pytest.approx([row["val_recall"][label] for row in history])

    tags = log.Tags()
    assert "Training/augmentation" in tags["images"]
    saved = list((trained.run_dir / "figures").glob("*.png"))
    assert {f"Results/{path.stem}" for path in saved} <= set(tags["images"]) and len(saved) > 8
    for path in saved:  # TensorBoard has the pictures that were saved, after the last epoch
        (event,) = log.Images(f"Results/{path.stem}")
        logged, picture = Image.open(BytesIO(event.encoded_image_string)), Image.open(path)
        assert event.step == 4 and np.array_equal(np.asarray(logged), np.asarray(picture))
    texts = {"config/text_summary", "dataset/text_summary", "results/text_summary"}
    assert texts | {"custom_scalars__config__", "PR test/ADI"} <= set(tags["tensors"])
    assert any(tag.startswith("hparam/test") for tag in tags["scalars"])
    parts = {node.name.split("/")[1] for node in log.Graph().node if "/" in node.name}
    modules = {part.split("[")[-1].rstrip("]") for part in parts}
    assert {"stem", "stage1", "stage2", "stage3", "head"} <= modules, parts


def test_one_graph(trained: object) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (path,) = trained.run_dir.glob("events*")
    events = list(EventFileLoader(str(path)).Load())
    assert sum(event.HasField("graph_def") for event in events) == 1
