"""Tests of Training.py and the loaders: python -m pytest tests/test_training.py"""

import copy
import csv
import errno
import math
import os
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, differences, different_checkpoints
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import nn

import PathMNIST
import Training
from analyze_data import PathData
from Augmentation import to_float
from Common import SHORT_NAMES, Stopped, UserError, write_atomically
from Evaluation import fit_temperature, validation_metrics
from MyModels import ResNet18, SkipCNN
from PathMNIST import make_loader
from Runs import Config
from Training import predict, resolve

LOGS = {"run": "", "train": "train", "val": "val"}
CONFIG = resolve(Config(epochs=3, batch_size=16, device="cpu", precision="fp32"), 72)


def small() -> nn.Module:
    """Return a model with all that makes training hard to repeat, and fast."""
    first = [nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    # BatchNorm over single values: a batch of one image is an error.
    model = nn.Sequential(*first, *second, nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 9))
    model.register_buffer("temperature", torch.ones(()))
    return model


def fit(data: PathData, run_dir: Path, config: Config = CONFIG) -> Training.TrainingState:
    """Train a small model into `run_dir`, or go on there."""
    run_dir.mkdir(exist_ok=True)
    torch.manual_seed(config.seed)
    state = Training.TrainingState(small(), config, run_dir)
    train = make_loader(data, "train", config.batch_size, shuffle=True)
    assert Training.fit(state, train, make_loader(data, "val", 500)) is state.history
    return state


@pytest.fixture(scope="module")
def finished(data: PathData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of `CONFIG`."""
    return fit(data, tmp_path_factory.mktemp("fit") / "run").run_dir


def script_val_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict]:
    """Make validation report these losses; return the list of each epoch's weights."""
    seen, left = [], iter(losses)

    def note(row: dict, state: Training.TrainingState, _bar: object) -> None:
        assert torch.load(state.run_dir / "last.pt")["epoch"] == row["epoch"]  # told once saved
        seen.append(copy.deepcopy(dict(state.model.state_dict())))

    def scripted(*predictions: np.ndarray) -> dict:
        return validation_metrics(*predictions) | {"loss": next(left), "loss_se": 0.0}

    monkeypatch.setattr(Training, "print_epoch", note)
    monkeypatch.setattr(Training.Evaluation, "validation_metrics", scripted)
    return seen


@pytest.mark.parametrize("processes", [1, 2])
def test_training_sees_every_image_once_with_its_label(
    data: PathData, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    known = [
        (i.tobytes(), n)
        for i, n in zip(*(d["train"] for d in (data.images, data.labels)), strict=True)
    ]
    orders = ([], [])
    for epoch, order in enumerate(orders):
        for rank in range(processes):
            monkeypatch.setattr(PathMNIST, "world", lambda rank=rank: (rank, processes))
            loader = make_loader(data, "train", 16, shuffle=True)
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                order += [(i.numpy().tobytes(), n.item()) for i, n in zip(*batch, strict=True)]
        assert sorted(order) == sorted(known)
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("views", "batch_size"), [(1, 500), (1, 35), (8, 500)])
def test_predict_is_the_mean_over_views_and_changes_nothing(
    data: PathData, views: int, batch_size: int
) -> None:
    torch.manual_seed(0)
    model = SkipCNN().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probs, labels = predict(model, make_loader(data, "val", batch_size), views)
    assert differences(before, dict(model.state_dict())) == []
    assert all(module.training for module in model.modules())
    assert probs.dtype == np.float32 and np.array_equal(labels, data.labels["val"])
    turned = [np.rot90(data.images["val"], k, axes=(1, 2)) for k in range(4)]
    each = [
        model.eval()(to_float(torch.from_numpy(view.copy()))).softmax(1).detach().numpy()
        for view in turned + [turn[:, :, ::-1] for turn in turned]
    ]
    assert np.abs(each[0] - each[1]).max() > 1e-4  # the views do differ
    assert np.allclose(probs, np.mean(each[:views], axis=0), atol=1e-6)


@pytest.mark.parametrize("step", [2, 7, 11])  # of 15: in the first, second and third epoch
def test_resume_equals_never_having_stopped(
    data: PathData, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    calls, augment = [], Training.augment

    def stop(*args: object) -> tuple:
        calls.append(1)
        if len(calls) == step:
            raise Stopped(signal.SIGINT)
        return augment(*args)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Training, "augment", stop)
        fit(data, tmp_path)
    assert torch.load(tmp_path / "last.pt")["epoch"] == (step - 1) // 5
    torch.rand(7)  # whatever state the random numbers are in
    assert fit(data, tmp_path).resumed
    assert different_checkpoints(finished, tmp_path) == []


def test_history_and_another_seed(data: PathData, finished: Path, tmp_path: Path) -> None:
    last = torch.load(finished / "last.pt")
    rows = list(csv.DictReader((finished / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row, expected in zip(rows, last["history"], strict=True):
        assert all(float(row[name]) == expected[name] for name in row)
    assert sorted(p.name for p in finished.iterdir()) == ["best.pt", "history.csv", "last.pt"]
    weights = fit(data, tmp_path, replace(CONFIG, seed=1)).model[0].weight
    assert not torch.equal(weights, last["model"]["0.weight"])


def test_a_last_batch_of_one_does_not_break_training(data: PathData, tmp_path: Path) -> None:
    images, labels = (d | {"train": d["train"][::4][:17]} for d in (data.images, data.labels))
    few = replace(data, images=images, labels=labels)
    assert [len(batch) for _, batch in make_loader(few, "train", 16, shuffle=True)] == [16]
    assert math.isfinite(fit(few, tmp_path).history[-1]["train_loss"])


def test_training_loss_and_accuracy_are_means_over_images(data: PathData, tmp_path: Path) -> None:
    # With a learning rate of (almost) 0 and one epoch, the weights are the initial ones; 72 images
    # in batches of 16 leave a last batch of 8, which a mean of means would weight twice.
    plain = {"flips": False, "stain": 0.0, "color": 0.0, "cutmix": 0.0}
    config = replace(CONFIG, epochs=1, lr=1e-12, weight_decay=0.0, **plain)
    (row,) = fit(data, tmp_path, config).history
    torch.manual_seed(config.seed)
    model, loader = small().train(), make_loader(data, "train", 16, shuffle=True)
    Training.seed_epoch(loader, config, 0)
    both = [(model(to_float(images)).detach(), labels) for images, labels in loader]
    logits, labels = (torch.cat(part) for part in zip(*both, strict=True))
    expected = nn.functional.cross_entropy(logits.double(), labels).item()
    assert row["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert row["train_accuracy"] == (logits.argmax(1) == labels).double().mean().item()


def test_learning_rate_schedule() -> None:
    config = replace(CONFIG, lr=1.0, warmup=0.2)
    expected = {0: 0.005, 1: 0.25, 2: 0.5, 4: 1.0, 12: 0.5, 16: (1 - math.sqrt(0.5)) / 2, 20: 0.0}
    for step, value in expected.items():
        assert Training.learning_rate(step, 20, config) == pytest.approx(value, abs=1e-12), step


def test_early_stopping_and_the_best_epoch(
    data: PathData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = script_val_losses(monkeypatch, [1.0, 0.8, 0.9, 0.7, 0.71, 0.9, 0.1, 0.1])
    config = replace(CONFIG, epochs=8, patience=2)
    state = fit(data, tmp_path, config)
    best = torch.load(tmp_path / "best.pt")
    assert (best["epoch"], len(seen)) == (4, 6)
    for weights in (best["model"], state.model.state_dict()):  # left in the model too
        assert differences(dict(weights), seen[3]) == ["/temperature"]  # it is fitted behind them
    assert len(fit(data, tmp_path, config).history) == 6  # started again, it stays stopped


def test_best_epoch_is_the_latest_within_a_standard_error_of_the_lowest() -> None:
    losses = [1.0, 0.50, 0.58, 0.61, 0.40, 0.49, 0.51]
    history = [{"epoch": i + 1, "val_loss": x, "val_loss_se": 0.1} for i, x in enumerate(losses)]
    assert [Training.best_epoch(history[:n]) for n in range(8)] == [0, 1, 2, 3, 3, 5, 6, 6]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(
    data: PathData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    config = replace(CONFIG, precision=precision)
    remedy = "lower --lr" + ", or --precision fp32" * (precision == "bf16")
    with pytest.raises(UserError, match=f"not finite in epoch 1; .*{remedy}$"):
        fit(data, tmp_path / "wild", replace(config, lr=1e9))
    seen = script_val_losses(monkeypatch, [1.0, math.nan])
    with pytest.raises(UserError, match="not finite in epoch 2"):
        fit(data, tmp_path, config)
    assert differences(torch.load(tmp_path / "best.pt")["model"], seen[0]) == []
    assert torch.load(tmp_path / "last.pt")["epoch"] == 1


def test_default_options(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = [resolve(Config(device="cpu"), n) for n in (9, 800, 90_000)]
    assert [(c.epochs, c.patience) for c in resolved] == [(300, 100), (255, 85), (15, 5)]
    assert resolve(CONFIG, 90_000) == CONFIG  # what is given stays
    for gpu, fast in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(Training, "has_fast_bf16", lambda _device, fast=fast: fast)
        config = resolve(Config(), 90_000)
        assert config.epochs == (60 if gpu else 15)
        assert config.device == ("cuda" if gpu else "cpu")
        assert config.precision == ("bf16" if fast else "fp32")
    with pytest.raises(UserError, match="--device cuda"):
        resolve(Config(device="cuda"), 800)


CASES = {(1, 1, "Intel"): True, (1, 0, "Intel"): False}
CASES |= {(1, 0, "AuthenticAMD"): True, (0, 0, "AuthenticAMD"): False}


@pytest.mark.parametrize(("avx512", "amx", "vendor"), CASES)
def test_bf16_is_taken_by_what_the_processor_is(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, vendor: str
) -> None:
    known = {"avx512_bf16": bool(avx512), "amx_bf16": bool(amx)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(platform, "processor", lambda: vendor)
    for linux in (True, False):
        file = SimpleNamespace(exists=lambda linux=linux: linux, read_text=lambda: vendor)
        monkeypatch.setattr(Training, "Path", lambda _path, file=file: file)
        assert Training.has_fast_bf16("cpu") is CASES[avx512, amx, vendor]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_steps_as_torchs_does(dtype: torch.dtype) -> None:
    """In bf16 bit for bit; in fp32 as closely as bf16 allows."""
    options = {"lr": 0.02, "weight_decay": 0.05, "ns_steps": 3}

    def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().permute(0, 2, 3, 1).flatten(1).clone()

    torch.manual_seed(0)
    for shape in ((24, 8, 3, 3), (48, 4, 3, 3), (32, 16, 1, 1)):  # more columns, more rows, 1 x 1
        for memory_format in (torch.channels_last, torch.contiguous_format):
            kernel = nn.Parameter(torch.randn(shape).to(memory_format=memory_format))
            matrix, start = nn.Parameter(as_matrix(kernel)), as_matrix(kernel)
            ours = Training.ConvMuon([kernel], dtype=dtype, **options)
            theirs = torch.optim.Muon([matrix], adjust_lr_fn="match_rms_adamw", **options)
            for _ in range(4):
                kernel.grad = torch.randn_like(kernel)
                matrix.grad = as_matrix(kernel.grad)
                ours.step()
                theirs.step()
            difference, moved = (as_matrix(kernel) - matrix).norm(), (matrix - start).norm()
            assert moved > 0.1
            assert difference == 0 if dtype == torch.bfloat16 else difference < 0.02 * moved


def test_denormals_are_flushed_in_every_thread() -> None:
    code = "import Training, torch; Training.prepare_processor(); torch.set_num_threads(2);"
    code += "print(int((torch.full((10**6,), 1e-39) * 0.9).count_nonzero()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    assert done.stdout == "0\n"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Stopped(15)])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    def fail(*_args: object) -> None:
        raise error

    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else Stopped):
        write_atomically(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_calibration_finds_the_temperature_once(data: PathData, tmp_path: Path) -> None:
    state = fit(data, tmp_path)
    best = (tmp_path / "best.pt").read_bytes()
    temperature = torch.load(tmp_path / "best.pt")["model"]["temperature"]
    assert state.model.temperature == temperature != 1
    model = copy.deepcopy(state.model)
    model.temperature.fill_(1)
    expected = fit_temperature(*predict(model, make_loader(data, "val", 500)))
    assert temperature.item() == pytest.approx(expected, rel=1e-6)
    fit(data, tmp_path)
    assert (tmp_path / "best.pt").read_bytes() == best


@pytest.mark.parametrize("model", [SkipCNN(), ResNet18()])
def test_the_temperature_divides_the_logits(model: nn.Module) -> None:
    images = torch.rand(2, 3, 28, 28)
    logits = model.eval()(images)
    model.temperature.fill_(0.5)
    assert torch.equal(model(images), logits / 0.5)


def test_threads_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, others = [0.0], [0.0]  # seconds; core seconds of everybody but this process
    stat = SimpleNamespace(exists=lambda: True)
    stat.read_text = lambda: (
        f"cpu  {round(100 * others[0])} 0 0 {round(400 * clock[0])} 0 0 0 0 0 0"
    )
    chosen = []
    monkeypatch.setattr(Training, "Path", lambda _path: stat)
    monkeypatch.setattr(Training.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Training.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(Training.os, "sysconf", lambda _name: 100)
    monkeypatch.setattr(Training.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    adapt = Training.watch_cores()
    for busy in (0, 1.2, 2.2, 2.5, 9, 0):
        clock[0] += 1.5
        others[0] += 1.5 * busy
        adapt()
        adapt()  # within the same second: nothing
    assert chosen == [3, 3, 2, 1, 1, 3]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    clock[0] += 9
    Training.watch_cores()()
    assert len(chosen) == 6  # what the user has set is kept


def test_the_log_read_back(trained: SimpleNamespace) -> None:
    folders = {name: trained.run_dir / part for name, part in LOGS.items()}
    assert all(len(list(folder.glob("events*"))) == 1 for folder in folders.values())
    (path,) = folders["run"].glob("events*")
    assert sum(event.HasField("graph_def") for event in EventFileLoader(str(path)).Load()) == 1
    history = torch.load(trained.run_dir / "last.pt")["history"]
    expected = {"run": {"LR": "lr", "Images per second": "images_per_second"}}
    for split in ("train", "val"):
        expected[split] = {"Loss": f"{split}_loss", "Accuracy": f"{split}_accuracy"}
    expected["val"]["AUC"] = "val_auc"
    values = {
        name: {tag: [row[column] for row in history] for tag, column in columns.items()}
        for name, columns in expected.items()
    }
    for label, short in enumerate(SHORT_NAMES):
        values["val"][f"Recall/{short}"] = [row["val_recall"][label] for row in history]
    for name, folder in folders.items():
        log = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
        shown = {tag for tag in log.Tags()["scalars"] if not tag.startswith("hparam/")}
        assert shown == values[name].keys()
        for tag, numbers in values[name].items():
            assert [event.step for event in log.Scalars(tag)] == [1, 2, 3], tag
            assert [e.value for e in log.Scalars(tag)] == pytest.approx(numbers, rel=1e-6), tag
    log = EventAccumulator(str(folders["run"]), size_guidance={"tensors": 0}).Reload()
    tags, saved = log.Tags(), list((trained.run_dir / "figures").glob("*.png"))
    assert "Training/augmentation" in tags["images"] and len(saved) == 9
    for path in saved:  # TensorBoard has the pictures that were saved, after the last epoch
        (event,) = log.Images(f"Results/{path.stem}")
        logged, picture = Image.open(BytesIO(event.encoded_image_string)), Image.open(path)
        assert event.step == 4 and np.array_equal(np.asarray(logged), np.asarray(picture))
    texts = {f"{name}/text_summary" for name in ("config", "dataset", "results", "layers")}
    assert texts | {"PR test/ADI"} <= set(tags["tensors"])
    assert any(tag.startswith("hparam/test") for tag in tags["scalars"])
    nodes = " ".join(node.name for node in log.Graph().node)
    assert all(f"[{name}]" in nodes for name in ("stem", "stage1", "stage2", "stage3", "head"))
