"""Tests of PathMNIST.py's command line: python -m pytest tests/test_cli.py"""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import kill_runs
import numpy as np
import pytest
import torch
from conftest import COUNTS, ROOT, SHARED, TRAINING, different_checkpoints, make_arrays, only_line
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

import PathMNIST
from analyze_data import CLASS_NAMES, UserError
from Evaluation import compute_metrics
from MyModels import SkipCNN, count_parameters
from Training import Stopped, best_epoch

SPLITS = ("val", "test", "val_tta", "test_tta")


def read_metrics(run_dir: Path) -> dict:
    """Read a run's metrics.json."""
    return json.loads((run_dir / "metrics.json").read_text())


def read_predictions(run_dir: Path) -> np.ndarray:
    """Read the probabilities (N, 9) of the CSV file in MedMNIST's format."""
    (path,) = run_dir.glob("pathmnist_test_*.csv")
    return np.loadtxt(path, delimiter=",")[:, 1:]


# ---- from start to figures ----------------------------------------------------------------------


def test_a_run_leaves_everything(trained: SimpleNamespace, tiny: Path) -> None:
    process, run_dir = trained.process, trained.run_dir
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    names = {path.name for path in run_dir.iterdir() if path.name != ".lock"}
    (log,) = (name for name in names if name.startswith("events.out.tfevents."))
    (predictions,) = (name for name in names if name.endswith(".csv") and "test" in name)
    expected = {"config.json", "history.csv", "metrics.json", "best.pt", "last.pt", "figures"}
    assert names == expected | {log, predictions}
    metrics = read_metrics(run_dir)
    auc, accuracy = metrics["test"]["auc"], metrics["test"]["accuracy"]
    assert predictions == f"pathmnist_test_[AUC]{auc:.3f}_[ACC]{accuracy:.3f}@main.csv"
    figures = {path.stem for path in (run_dir / "figures").glob("*.png")}
    assert {
        "learning_curves",
        "confusion_val",
        "confusion_test",
        "per_class_test",
        "examples_correct",
        "examples_incorrect",
        "reliability_test",
        "gradcam_test",
    } <= figures

    out = process.stdout
    assert str(run_dir) in out and str(tiny) in out
    assert f"tensorboard --logdir {trained.log_dir}" in out
    assert f"{accuracy:.4f}" in out and f"{metrics['val']['accuracy']:.4f}" in out
    assert "3 epochs of 5 batches of 16" in out and "SYNTHETIC" not in out


def test_metrics_json(trained: SimpleNamespace, data: object) -> None:
    metrics = read_metrics(trained.run_dir)
    assert metrics["dataset"] == {
        "path": str(data.path),
        "kind": "subset",
        "md5": data.md5,
        "size": 28,
        "counts": {split: 9 * n for split, n in COUNTS.items()},
    }
    assert metrics["model"] == {"name": "skipcnn", "parameters": count_parameters(SkipCNN())}
    assert (metrics["seed"], metrics["epochs"]) == (0, 3)
    history = torch.load(trained.run_dir / "last.pt", weights_only=True)["history"]
    best = torch.load(trained.run_dir / "best.pt", weights_only=True)["epoch"]
    assert metrics["best_epoch"] == best == best_epoch(history)
    seconds = sum(row["seconds"] for row in history)
    assert metrics["train_seconds"] == pytest.approx(seconds)
    assert metrics["images_per_second"] == pytest.approx(3 * 72 / seconds)
    for name in ("loss", "accuracy", "auc"):  # validation in training and in the evaluation
        assert metrics["val"][name] == pytest.approx(history[best - 1][f"val_{name}"], abs=1e-6)
    for split in SPLITS:
        part = metrics[split]
        assert set(part["per_class"]) == set(CLASS_NAMES)
        assert set(part["per_class"]["mucus"]) == {"precision", "recall", "f1", "support"}
        assert np.sum(part["confusion_matrix"]) == 9 * COUNTS[split.split("_")[0]]
        low, high = part["accuracy_ci95"]
        assert low <= part["accuracy"] <= high
        for name in ("macro_f1", "balanced_accuracy", "ece"):
            assert 0 <= part[name] <= 1
    probs = read_predictions(trained.run_dir)
    expected = compute_metrics(probs.astype(np.float32), data.labels["test"])
    for name in ("accuracy", "auc", "loss", "confusion_matrix"):
        assert metrics["test"][name] == expected[name]


def test_config_json(trained: SimpleNamespace) -> None:
    config = json.loads((trained.run_dir / "config.json").read_text())["config"]
    for name, value in (("epochs", 3), ("batch_size", 16), ("device", "cpu"), ("seed", 0)):
        assert config[name] == value
    assert None not in config.values() and "auto" not in config.values()  # as resolved


def test_evaluate_reproduces_the_metrics_exactly(cli: Callable, run_dir: Path) -> None:
    before, weights = read_metrics(run_dir), (run_dir / "best.pt").read_bytes()
    shutil.rmtree(run_dir / "figures")
    (run_dir / "metrics.json").unlink()
    status, out, err = cli("--evaluate", run_dir, "--device", "cpu")
    assert (status, err) == (0, "") and "stopped after" not in out
    assert read_metrics(run_dir) == before
    assert (run_dir / "figures" / "learning_curves.png").exists()
    assert f"{before['test']['accuracy']:.4f}" in out
    assert (run_dir / "figures" / "confusion_test.png").stat().st_size > 10_000
    assert (run_dir / "best.pt").read_bytes() == weights


def test_evaluate_on_other_data_keeps_the_runs_own_results(
    cli: Callable, no_figures: None, run_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, **make_arrays(COUNTS, seed=1))
    before = (run_dir / "metrics.json").read_bytes()
    status, out, _ = cli("--evaluate", run_dir, "--data", other)
    assert status == 0 and "Not the data" in out
    assert (run_dir / "metrics.json").read_bytes() == before
    (folder,) = run_dir.glob("evaluated-on-other-*")
    assert read_metrics(folder)["dataset"]["path"] == str(other)


def test_evaluate_on_data_with_a_long_name(
    cli: Callable, no_figures: None, run_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / f"{'d' * 200}.npz"
    np.savez(other, **make_arrays(COUNTS, seed=1))
    status, _, err = cli("--evaluate", run_dir, "--data", other)
    assert status == 0, err
    (folder,) = run_dir.glob(f"evaluated-on-{'d' * 50}-*")
    assert len(list(folder.glob("pathmnist_test_*.csv"))) == 1


def test_several_seeds_and_their_ensemble(
    cli: Callable, no_figures: None, tiny: Path, data: object, tmp_path: Path
) -> None:
    argv = ["--data", tiny, *TRAINING, "--epochs", "2", "--log-dir", tmp_path, "--name", "both"]
    status, out, _ = cli(*argv, "--seeds", "3", "1")
    assert status == 0
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    runs = [tmp_path / "both" / f"seed{seed}" for seed in (3, 1)]
    metrics = [read_metrics(run) for run in runs]
    assert summary["seeds"] == [m["seed"] for m in metrics] == [3, 1]
    for split in SPLITS:
        for name in ("accuracy", "auc", "loss", "macro_f1", "ece"):
            a, b = (m[split][name] for m in metrics)
            assert summary[split]["mean"][name] == pytest.approx((a + b) / 2)
            assert summary[split]["std"][name] == pytest.approx(abs(a - b) / np.sqrt(2))
    assert metrics[0]["test"]["loss"] != metrics[1]["test"]["loss"]
    probs = np.mean([read_predictions(run) for run in runs], axis=0)
    expected = compute_metrics(probs, data.labels["test"])
    for name in ("accuracy", "auc", "loss"):
        assert summary["test"]["ensemble"][name] == pytest.approx(expected[name], rel=1e-5)
    assert f"ensemble {expected['accuracy']:.4f}" in out

    path, other = tmp_path / "both" / "summary.json", tmp_path / "other.npz"
    before = path.read_bytes()
    path.write_text("")
    assert cli("--evaluate", tmp_path / "both", "--device", "cpu")[0] == 0
    assert path.read_bytes() == before
    np.savez(other, **make_arrays(COUNTS, seed=1))
    status, out, _ = cli("--evaluate", tmp_path / "both", "--device", "cpu", "--data", other)
    assert f"{tmp_path / 'both' / 'seed*' / 'evaluated-on-other-'}" in out
    (new,) = (tmp_path / "both").glob("evaluated-on-other-*/summary.json")
    assert status == 0 and out.count("Not the data") == 1
    assert len(list((tmp_path / "both").glob("seed*/evaluated-on-other-*/metrics.json"))) == 2
    assert json.loads(new.read_text())["test"] != summary["test"]
    assert path.read_bytes() == before
    (runs[1] / "best.pt").unlink()
    status, _, err = cli("--evaluate", tmp_path / "both", "--device", "cpu")
    assert status == 2 and "no such checkpoint" in only_line(err)
    path.unlink()
    status, _, err = cli("--evaluate", tmp_path / "both", "--device", "cpu")
    assert status == 2 and "--resume it first" in only_line(err)


def test_several_seeds_are_resumed_where_they_stopped(
    cli: Callable, no_figures: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--data", tiny, *TRAINING, "--epochs", "2", "--seeds", "3", "1", "--log-dir", tmp_path]
    assert cli(*argv, "--name", "whole")[0] == 0
    real, calls = PathMNIST.evaluate, []

    def stop_in_the_second(*args: object, **kwargs: object) -> dict:
        calls.append(1)
        if len(calls) == 2:
            raise Stopped(2)
        return real(*args, **kwargs)

    monkeypatch.setattr(PathMNIST, "evaluate", stop_in_the_second)
    status, _, err = cli(*argv, "--name", "stopped")
    assert status == 130
    assert err.strip().endswith(f"go on with: python PathMNIST.py --resume {tmp_path / 'stopped'}")
    status, _, err = cli("--resume", tmp_path / "stopped", "--seed", "0")
    assert status == 2 and "--seed: has no effect with --resume" in only_line(err)
    assert cli("--resume", tmp_path / "stopped")[0] == 0
    whole, again = (
        json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "stopped")
    )
    for summary in (whole, again):
        del summary["train_seconds"]
    assert again == whole


def test_a_run_whose_data_is_gone(cli: Callable, run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "without data")
    settings = json.loads((copy / "config.json").read_text())
    settings["dataset"]["path"] = str(tmp_path / "gone.npz")
    (copy / "config.json").write_text(json.dumps(settings))
    for mode in ("--evaluate", "--resume"):
        status, _, err = cli(mode, copy)
        line = only_line(err)
        assert status == 2 and "gone.npz" in line and "say with --data" in line


def test_synthetic_data_is_called_so_everywhere(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headings = []
    savefig = Figure.savefig

    def keep_and_save(figure: Figure, path: Path) -> None:
        keep(figure, path)
        savefig(figure, path)

    def keep(self: object, *args: object, **_kwargs: object) -> None:
        figure = next(a for a in (self, *args) if isinstance(a, Figure))
        headings.append((args[0], figure.get_suptitle()))

    monkeypatch.setattr(Figure, "savefig", keep_and_save)
    monkeypatch.setattr(SummaryWriter, "add_figure", keep)
    path = tmp_path / "synthetic.npz"
    np.savez(path, synthetic=np.array(True), **make_arrays(COUNTS))
    log_dir = tmp_path / "runs"
    status, out, _ = cli("--data", path, *TRAINING, "--epochs", "1", "--log-dir", log_dir)
    assert status == 0 and "SYNTHETIC" in out
    (run_dir,) = log_dir.iterdir()
    assert run_dir.name.startswith("synthetic-")
    assert read_metrics(run_dir)["dataset"]["kind"] == "synthetic"
    # A drawing of the model's layers shows no data.
    about_data = [(where, text) for where, text in headings if "architecture" not in str(where)]
    assert len(about_data) > 10
    for where, text in about_data:
        assert "SYNTHETIC" in text, where

    status, _, err = cli("--predict", write_tile(tmp_path), "--checkpoint", run_dir)
    assert status == 0 and "SYNTHETIC" in err


def write_tile(folder: Path) -> Path:
    """Write one tile as PNG."""
    from PIL import Image

    path = folder / "tile.png"
    Image.fromarray(make_arrays({"test": 1})["test_images"][0]).save(path)
    return path


# ---- refusals -----------------------------------------------------------------------------------

BAD_FLAGS = [
    *(["--epochs", v] for v in ("0", "-1", "nan", "inf", "2.5", "1e30", "9" * 30, "9" * 5000, "")),
    *(["--batch-size", v] for v in ("0", "1", "-4", "nan", "inf", "9" * 30)),
    *(["--lr", v] for v in ("0", "-1", "nan", "inf", "-inf", "1e300", "fast")),
    *(["--weight-decay", v] for v in ("-1", "nan", "inf", "1e300")),
    *(["--patience", v] for v in ("0", "-1", "nan", "inf", "9" * 30)),
    *(["--seed", v] for v in ("-1", "nan", "inf", "1.5", "9" * 30)),
    *(["--seeds", v] for v in ("-1", "0 nan", "9" * 30)),
    *(
        ["--name", v]
        for v in ("a/b", "..", "../up", "/tmp/x", ".", "", ".hidden", "a b", "a" * 101, "aé" * 40)
    ),
    ["--model", "vit"],
    ["--device", "tpu"],
    ["--device", "cuda:7"],
    ["--precision", "fp8"],
    ["--nonsense"],
    ["--seed", "1", "--seeds", "1 2"],
    ["--resume", "a", "--evaluate", "b"],
    ["--checkpoint", "a"],
    ["--explain"],
    ["--data", "nowhere.npz"],
    ["--resume", "nowhere"],
    ["--evaluate", "nowhere"],
    ["--predict", "nowhere.png", "--epochs", "3"],
    ["--predict", "nowhere.png", "--data", "nowhere.npz"],
]


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=lambda flags: " ".join(flags)[:30])
def test_bad_flags(
    cli: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PathMNIST, "train", lambda *_args: pytest.fail("it trains"))
    words = [word for flag in flags for word in (flag.split(" ") if " 2" in flag else [flag])]
    if flags[0] == "--seeds":
        words = ["--seeds", *flags[1].split()]
    mode = {"--resume", "--evaluate", "--predict", "--data"} & set(flags)
    status, out, err = cli(*([] if mode else ["--data", tiny]), *words)
    line = only_line(err)
    assert status == 2 and out == ""
    assert flags[0] in line or flags[-1] in line
    assert list(tmp_path.iterdir()) == []  # nothing was made


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", "2.5"], "whole number from 1 to"),
        (["--seed", "-1"], "whole number from 0 to 2147483647"),
        (["--lr", "fast"], "not a number from"),
        (["--name", "a" * 101], "at most 100 bytes"),
        (["--name", ".hidden"], "starts with one of a-z, A-Z or 0-9"),
    ],
)
def test_a_refused_value_says_what_is_allowed(cli: Callable, flags: list[str], words: str) -> None:
    assert words in only_line(cli(*flags)[2])


def test_help_names_every_flag(cli: Callable) -> None:
    status, out, err = cli("--help")
    assert (status, err) == (0, "")
    for flag in re.findall(r'add\(\s*"(--[a-z-]+)"', Path(PathMNIST.__file__).read_text()):
        assert flag in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("mode", ["train", "evaluate", "predict"])
def test_cuda_where_there_is_none(
    cli: Callable, tiny: Path, run_dir: Path, tmp_path: Path, mode: str
) -> None:
    argv = {
        "train": ["--data", tiny, "--log-dir", tmp_path / "new"],
        "evaluate": ["--evaluate", run_dir],
        "predict": ["--predict", write_tile(tmp_path), "--checkpoint", run_dir],
    }[mode]
    status, _, err = cli(*argv, "--device", "cuda")
    assert status == 2 and "--device cuda" in only_line(err)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_log_folder_that_cannot_be_written(
    cli: Callable, tiny: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    for more in ([], ["--name", "given"]):
        status, _, err = cli("--data", tiny, "--log-dir", tmp_path / place, *more)
        assert status == 2
        assert "--log-dir" in only_line(err)
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_log_folder_without_permission(cli: Callable, tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    status, _, err = cli("--data", tiny, "--log-dir", tmp_path / "runs")
    assert status == 2 and "Permission denied" in only_line(err)


def test_bad_data_is_refused_here_too(cli: Callable, tmp_path: Path) -> None:
    path = tmp_path / "broken.npz"
    arrays = make_arrays(COUNTS)
    np.savez(path, **arrays | {"val_labels": arrays["val_labels"] + 5})
    status, _, err = cli("--data", path, "--log-dir", tmp_path / "runs")
    line = only_line(err)
    assert status == 2 and str(path) in line and "val_labels" in line
    assert not (tmp_path / "runs").exists()


def test_breastmnist_is_refused(cli: Callable, tmp_path: Path) -> None:
    path = SHARED / "breastmnist.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    status, _, err = cli("--data", path, "--log-dir", tmp_path / "runs")
    assert status == 2 and "breastmnist.npz" in only_line(err)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume", "RUN", "--model", "resnet18"], "--model resnet18"),
        (["--resume", "RUN", "--epochs", "9"], "--epochs 9"),
        (["--resume", "RUN", "--seed", "5"], "--seed 5"),
        (["--resume", "RUN", "--batch-size", "8"], "--batch-size 8"),
        (["--resume", "RUN", "--lr", "0.5"], "--lr 0.5"),
        (["--resume", "RUN", "--name", "new"], "--name"),
        (["--resume", "RUN", "--log-dir", "new"], "--log-dir"),
        (["--resume", "RUN", "--seeds", "1", "2"], "--seeds"),
        (["--resume", "RUN", "--data", "OTHER"], "not the file"),
        (["--evaluate", "RUN", "--model", "resnet18"], "--model resnet18"),
        (["--evaluate", "RUN", "--epochs", "9"], "--epochs"),
        (["--evaluate", "RUN", "--seed", "1"], "--seed"),
        (["--evaluate", "RUN", "--name", "new"], "--name"),
        (["--evaluate", "RUN", "--embeddings"], "--embeddings"),
        (["--evaluate", "EMPTY"], "config.json"),
        (["--resume", "EMPTY"], "config.json"),
        (["--resume", "RUN/best.pt"], "config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_runs_that_do_not_fit(
    cli: Callable, run_dir: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "other.npz", **make_arrays(COUNTS, seed=1))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    places = {"RUN": run_dir, "EMPTY": tmp_path / "empty", "OTHER": tmp_path / "other.npz"}
    places["RUN/best.pt"] = run_dir / "best.pt"
    status, _, err = cli(*[places.get(flag, flag) for flag in flags])
    assert status == 2 and said in only_line(err)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"no json", b"\xff\xfe", b'{"config": 1}', b'{"config": {}, "dataset": 1}'],
)
def test_a_damaged_config_json(cli: Callable, run_dir: Path, mode: str, content: bytes) -> None:
    (run_dir / "config.json").write_bytes(content)
    status, _, err = cli(mode, run_dir)
    assert status == 2 and "config.json" in only_line(err)


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("config", "epochs", "many"),
        ("config", "epochs", 0),
        ("config", "model", "vit"),
        ("config", "model", ["skipcnn"]),
        ("config", "batch_size", [8]),
        ("config", "lr", None),
        ("config", "device", "abacus"),
        ("config", "precision", "auto"),
        ("dataset", "path", None),
        *((None, "seeds", seeds) for seeds in ([], {}, "", [0, 0], [-1], [2**70, 1])),
        (None, "dataset", ["md5", "path"]),
        (None, "processes", "two"),
    ],
)
def test_an_edited_config_json(
    cli: Callable, run_dir: Path, mode: str, part: str | None, name: str, value: object
) -> None:
    path = run_dir / "config.json"
    settings = json.loads(path.read_text())
    (settings[part] if part else settings)[name] = value
    path.write_text(json.dumps(settings))
    status, _, err = cli(mode, run_dir)
    assert status == 2 and "config.json" in only_line(err)


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("config", "lr", 0.5, "last.pt"),
        (None, "processes", 2, "torchrun --nproc-per-node=2 PathMNIST.py --resume"),
    ],
)
def test_resume_goes_on_as_the_run_began_or_not_at_all(
    cli: Callable, run_dir: Path, part: str | None, name: str, value: object, said: str
) -> None:
    path = run_dir / "config.json"
    settings = json.loads(path.read_text())
    (settings[part] if part else settings)[name] = value
    path.write_text(json.dumps(settings))
    before = (run_dir / "last.pt").read_bytes()
    status, _, err = cli("--resume", run_dir)
    assert status == 2 and said in only_line(err)
    assert (run_dir / "last.pt").read_bytes() == before


def test_a_resumed_run_logs_the_embeddings_that_it_was_started_with(
    cli: Callable, tiny: Path, tmp_path: Path, no_figures: None
) -> None:
    argv = ["--data", tiny, *TRAINING, "--epochs", "1", "--log-dir", tmp_path, "--name", "run"]
    assert cli(*argv, "--embeddings")[0] == 0
    assert cli(*argv[:-1], "plain")[0] == 0
    status, _, err = cli("--resume", tmp_path / "plain", "--embeddings")
    assert status == 2 and "--embeddings: " in only_line(err) and "without it; resume" in err
    projector = tmp_path / "run" / "projector_config.pbtxt"
    projector.unlink()
    assert cli("--resume", tmp_path / "run")[0] == 0
    assert "val" in projector.read_text()


def test_the_other_processes_wait_for_the_first_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined = {}
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        PathMNIST.dist, "init_process_group", lambda backend, **more: joined.update(more)
    )
    monkeypatch.setattr(PathMNIST.dist, "get_rank", lambda: 0)
    PathMNIST.join_processes({"device": "cpu"})
    assert joined["timeout"].total_seconds() >= 24 * 3600  # torch's own: 10 or 30 minutes


def test_more_processes_than_val_images(
    cli: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PathMNIST, "world", lambda: (0, 37))
    status, _, err = cli("--data", tiny, *TRAINING, "--log-dir", tmp_path / "runs")
    assert status == 2 and "--nproc-per-node" in only_line(err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("mode", ["--evaluate", "--predict"])
def test_only_the_first_of_several_processes_evaluates(
    cli: Callable, run_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    monkeypatch.setattr(PathMNIST, "world", lambda: (1, 2))
    assert cli(mode, run_dir) == (0, "", "")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_taken_name_is_refused_and_a_default_name_is_not(
    cli: Callable, tiny: Path, run_dir: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    argv = ["--data", tiny, *TRAINING, "--log-dir", run_dir.parent, "--name", run_dir.name]
    status, _, err = cli(*argv)
    line = only_line(err)
    assert status == 2 and "exists already" in line and str(run_dir) in line
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    names = [PathMNIST.make_run_dir(tmp_path / "new", "same", unique=False).name for _ in range(3)]
    assert names == ["same", "same-2", "same-3"]
    with pytest.raises(UserError, match="same: exists already"):
        PathMNIST.make_run_dir(tmp_path / "new", "same")


# ---- signals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> kill_runs.Setting:
    """Tiny data, and a run of it that nothing interrupted."""
    return kill_runs.prepare(tmp_path_factory.mktemp("signals"))


def start_and_wait(setting: kill_runs.Setting, name: str, target: Callable) -> SimpleNamespace:
    """Start a run in a process of its own and return when its first epoch is saved."""
    run_dir, log = setting.folder / name, setting.folder / f"{name}.log"
    argv = ["--data", setting.data, *kill_runs.OPTIONS, "--log-dir", setting.folder]
    process = kill_runs.start([*argv, "--name", name], log, target)
    history = run_dir / "history.csv"
    done = kill_runs.wait_until(
        lambda: history.exists() and history.read_text().count("\n") > 2, process
    )
    assert done, log.read_text()
    return SimpleNamespace(process=process, run_dir=run_dir, log=log)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_run_that_can_be_resumed(
    setting: kill_runs.Setting, signum: signal.Signals, status: int
) -> None:
    run = start_and_wait(setting, f"stopped{status}", kill_runs.run_main)
    os.kill(run.process.pid, signum)
    run.process.join(60)
    text = run.log.read_text()
    assert run.process.exitcode == status, text
    assert f"PathMNIST.py --resume {run.run_dir}" in text and "Traceback" not in text
    assert not list(run.run_dir.glob(".*.tmp"))
    epoch = kill_runs.checkpoint_epoch(run.run_dir)
    assert 1 <= epoch < kill_runs.EPOCHS
    assert not (run.run_dir / "metrics.json").exists()

    assert kill_runs.finish(["--resume", run.run_dir], run.log) == 0
    assert f"resumed after epoch {epoch}" in run.log.read_text()
    assert different_checkpoints(run.run_dir, setting.reference) == []
    with open(run.run_dir / "history.csv", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == 1 + kill_runs.EPOCHS


def hang_when_stopped(argv: list[str], log: Path) -> None:
    """Run the command line, but never get done with closing the log."""
    import time

    PathMNIST.SummaryWriter.close = lambda _self: time.sleep(600)
    kill_runs.run_main(argv, log)


def test_a_second_signal_ends_at_once(setting: kill_runs.Setting) -> None:
    run = start_and_wait(setting, "twice", hang_when_stopped)
    os.kill(run.process.pid, signal.SIGTERM)
    run.process.join(1)
    assert run.process.is_alive()
    os.kill(run.process.pid, signal.SIGTERM)
    run.process.join(10)
    assert run.process.exitcode == -signal.SIGTERM
    assert kill_runs.checkpoint_epoch(run.run_dir) >= 1


# ---- odd folders, signals and pipes -------------------------------------------------------------


def test_evaluate_refuses_images_of_another_size(
    cli: Callable, run_dir: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "large.npz", **make_arrays(COUNTS, size=64))
    before = read_metrics(run_dir)
    status, _, err = cli("--evaluate", run_dir, "--data", tmp_path / "large.npz")
    assert status == 2 and "images of 64 px" in only_line(err) and "28 px" in err
    assert read_metrics(run_dir) == before


def test_evaluate_inside_the_runs_folder(
    cli: Callable, run_dir: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    monkeypatch.chdir(run_dir)
    status, _, _ = cli("--evaluate", ".", "--device", "cpu")
    (predictions,) = Path().glob("pathmnist_test_*.csv")
    assert status == 0 and predictions.name.endswith("@copy.csv")


@pytest.mark.parametrize("history", [b"", b"epoch,lr\n1,x\n", b"\xff\n", b"a\nb,c\n"])
def test_evaluate_where_the_history_is_of_no_use(
    cli: Callable, run_dir: Path, no_figures: None, history: bytes
) -> None:
    (run_dir / "history.csv").write_bytes(history)
    status, _, _ = cli("--evaluate", run_dir, "--device", "cpu")
    assert status == 0 and read_metrics(run_dir)["seed"] == 0


def test_evaluate_says_that_a_run_is_not_finished(
    cli: Callable, run_dir: Path, no_figures: None
) -> None:
    lines = (run_dir / "history.csv").read_text().splitlines()
    (run_dir / "history.csv").write_text("\n".join(lines[:2]) + "\n")
    status, out, _ = cli("--evaluate", run_dir, "--device", "cpu")
    assert status == 0 and "stopped after 1 of 3 epochs; --resume" in out
    assert read_metrics(run_dir)["epochs"] == 1


def test_the_command_that_resumes_works_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    command = shlex.split(PathMNIST.resume_command(Path("runs/x"), 1))
    assert (tmp_path / command[1]).samefile(ROOT / "PathMNIST.py") and command[3] == "runs/x"


def test_a_home_folder_that_the_shell_did_not_expand(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, _, err = cli("--evaluate=~/no-run")
    assert f"error: {tmp_path / 'no-run'}: not the folder of a run" in only_line(err)


def test_the_device_is_looked_for_before_the_data(
    cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(PathMNIST, "find_data", lambda _data: pytest.fail("looked for"))
    status, _, err = cli("--device", "cuda")
    assert status == 2 and "--device cuda" in only_line(err)


@pytest.mark.parametrize("script", ["PathMNIST.py", "analyze_data.py"])
def test_ctrl_c_during_the_imports_shows_no_traceback(script: str) -> None:
    command = [sys.executable, "-X", "importtime", script, "--help"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:  # numpy's own modules are the first of those that take long
        if "numpy" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == -signal.SIGINT
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest


def test_start_does_not_wait_for_what_is_needed_later() -> None:
    later = "{'matplotlib', 'sklearn', 'torchvision'}"
    code = f"import sys, PathMNIST; print({later} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_start_without_locks_as_on_windows() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import PathMNIST; PathMNIST.main(['--help'])"
    assert "--predict" in subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)


def test_a_redirected_log_shows_each_line_at_once() -> None:
    code = "import os, analyze_data; analyze_data.set_up_stdout(); print('epoch 1'); os._exit(0)"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert output == "epoch 1\n"  # though nothing is written at such an exit


def test_nobody_reads_the_output_of_predict(run_dir: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [
        sys.executable,
        "PathMNIST.py",
        "--predict",
        str(run_dir / "figures"),
        "--checkpoint",
    ]
    command += [str(run_dir), "--log-dir", str(tmp_path / "out"), "--device", "cpu"]
    process = subprocess.run(
        command, check=False, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert process.returncode == 128 + signal.SIGPIPE
    assert process.stderr == "" and (tmp_path / "out" / "predictions.csv").exists()


def test_a_log_folder_that_is_a_file_is_not_called_a_full_disk(
    cli: Callable, run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    tiles = run_dir / "figures"
    status, _, err = cli(
        "--predict", tiles, "--checkpoint", run_dir, "--log-dir", tmp_path / "file"
    )
    assert status == 2 and "choose a folder" in only_line(err) and "space" not in err


def test_the_command_to_resume_can_be_pasted(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "last.pt").touch()
    with pytest.raises(Stopped) as caught, PathMNIST.say_how_to_resume(tmp_path / "a b"):
        raise Stopped(signal.SIGINT)
    assert caught.value.__notes__[0].endswith(f"--resume '{tmp_path / 'a b'}'")


def test_confusion_is_logged_five_times_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathMNIST.Evaluation, "confusion_figure", lambda _matrix, note: note)
    logged = []
    writer = SimpleNamespace(add_figure=lambda _tag, figure, epoch: logged.append((figure, epoch)))
    for epoch in range(1, 124):
        config = PathMNIST.Config(epochs=123)
        PathMNIST.log_confusion(writer, config, "", epoch, np.eye(9), np.arange(9))
    assert logged == [(f"val, epoch {epoch}", epoch) for epoch in (25, 50, 75, 100, 123)]


def test_gradcam_figure_counts_what_it_shows(
    trained: SimpleNamespace, data: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = []
    monkeypatch.setattr(
        PathMNIST.Evaluation, "gradcam_figure", lambda *args: notes.append(args[-1])
    )
    model, _ = PathMNIST.load_model(trained.run_dir, "cpu")
    labels = data.labels["test"]
    probs = np.eye(9)[labels]
    probs[0] = np.roll(probs[0], 1)  # one mistake
    metrics = dict.fromkeys(("val", "test"), compute_metrics(probs, labels))
    PathMNIST.result_figures(model, data, {"test": probs}, metrics, "SYNTHETIC")
    assert notes == ["test split, SYNTHETIC: first 5 right and first 1 wrong"]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses such names")
def test_a_data_file_whose_name_is_not_utf8(
    cli: Callable, tiny: Path, tmp_path: Path, no_figures: None
) -> None:
    odd = shutil.copy(tiny, os.fsdecode(bytes(tmp_path) + b"/\xff.npz"))
    argv = ["--data", odd, *TRAINING, "--epochs", "1", "--log-dir", tmp_path, "--name", "run"]
    status, out, _ = cli(*argv)
    assert status == 0 and r"\udcff.npz" in out
    assert read_metrics(tmp_path / "run")["dataset"]["path"] == odd


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("script", ["PathMNIST.py", "analyze_data.py"])
def test_a_full_disk_behind_stdout(tiny: Path, run_dir: Path, tmp_path: Path, script: str) -> None:
    argv = {
        "PathMNIST.py": ["--predict", write_tile(tmp_path), "--checkpoint", run_dir],
        "analyze_data.py": ["--data", tiny],
    }[script]
    out = ["--log-dir" if script == "PathMNIST.py" else "--out", tmp_path / "out"]
    command = [sys.executable, script, *map(str, [*argv, *out])]
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            command, check=False, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == 2 and "free some space" in only_line(process.stderr)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        torch.OutOfMemoryError("no\nmore"),
        RuntimeError("x DefaultCPUAllocator: no: can't allocate memory"),
    ],
)
def test_out_of_memory(cli: Callable, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_args: dict) -> None:
        raise error

    monkeypatch.setattr(PathMNIST, "new_runs", fail)
    status, _, err = cli()
    assert status == 2 and only_line(err).startswith("error: no")
    assert "; use a lower --batch-size" in err
    monkeypatch.setattr(PathMNIST, "evaluate_run", fail)  # where that flag is refused
    status, _, err = cli("--evaluate", "runs/best")
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    remedy = "use --device cpu" if on_gpu else "close other programs"
    assert status == 2 and only_line(err).endswith(f"; {remedy}")


def test_a_lack_of_memory_without_a_text(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_args: dict) -> None:
        raise MemoryError

    monkeypatch.setattr(PathMNIST, "new_runs", fail)
    assert only_line(cli()[2]).startswith("error: out of memory; use a lower --batch-size")


def test_the_cpus_own_lack_of_memory(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathMNIST, "new_runs", lambda _args: torch.empty(1 << 46))
    status, _, err = cli()
    assert status == 2 and "memory" in only_line(err) and "--batch-size" in err


def test_another_error_is_not_taken_for_a_lack_of_memory(
    cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PathMNIST, "new_runs", lambda _args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        cli()


def test_an_argument_of_several_lines(cli: Callable) -> None:
    status, _, err = cli("a\nb")
    assert status == 2 and "a b" in only_line(err)


def test_the_folder_of_many_seeds_has_a_short_name(
    cli: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PathMNIST, "train_seeds", lambda *_args: None)
    seeds = [str(seed) for seed in range(90)]
    assert cli("--data", tiny, "--log-dir", tmp_path / "runs", "--seeds", *seeds)[0] == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert len(run_dir.name) <= 100 and run_dir.name.startswith("skipcnn-seed0-1-2-")
    assert json.loads((run_dir / "config.json").read_text())["seeds"] == list(range(90))


@pytest.mark.parametrize(("part", "value"), [("size", 27), ("size", "x"), ("model", ["skipcnn"])])
def test_a_checkpoint_of_another_kind(
    cli: Callable, run_dir: Path, tmp_path: Path, part: str, value: object
) -> None:
    checkpoint = torch.load(run_dir / "best.pt", weights_only=True)
    checkpoint["identity" if part == "size" else "config"][part] = value
    torch.save(checkpoint, run_dir / "best.pt")
    status, _, err = cli("--predict", write_tile(tmp_path), "--checkpoint", run_dir)
    assert status == 2 and "known:" in only_line(err)
