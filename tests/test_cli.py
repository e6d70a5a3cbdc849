"""Tests of PathMNIST.py's command line: python -m pytest tests/test_cli.py"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import kill_runs
import numpy as np
import pytest
import torch
from conftest import COUNTS, ROOT, TRAINING, make_arrays, only_line
from matplotlib.figure import Figure

import Common
import Evaluation
import PathMNIST
import Runs
import Training
from analyze_data import PathData
from Common import CLASS_NAMES
from Evaluation import RESULTS, compute_metrics
from MyModels import SkipCNN, count_parameters

Patch = pytest.MonkeyPatch


def read_json(path: Path) -> dict:
    """Read metrics.json, summary.json or config.json."""
    return json.loads(path.read_text())


def read_predictions(run_dir: Path) -> np.ndarray:
    """Read the probabilities (N, 9) of the CSV file in MedMNIST's format."""
    (path,) = run_dir.glob("pathmnist_test_*.csv")
    return np.loadtxt(path, delimiter=",")[:, 1:]


def times(folder: Path) -> dict[Path, int]:
    """Return when each file below a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def save_other(folder: Path, size: int = 28) -> Path:
    """Save other data than the trained run's."""
    np.savez(folder / "other.npz", **make_arrays(COUNTS, size, seed=1))
    return folder / "other.npz"


def test_a_run_leaves_everything(trained: SimpleNamespace, tiny: Path) -> None:
    process, run_dir = trained.process, trained.run_dir
    assert (process.returncode, process.stderr) == (0, "")
    names = {path.name for path in run_dir.iterdir() if path.name != ".lock"}
    (log,) = (name for name in names if name.startswith("events.out.tfevents."))
    metrics = read_json(run_dir / "metrics.json")
    auc, accuracy = (metrics["test"][name] for name in ("auc", "accuracy"))
    expected = "config.json history.csv metrics.json best.pt last.pt figures train val"
    predictions = f"pathmnist_test_[AUC]{auc:.3f}_[ACC]{accuracy:.3f}@main.csv"
    assert names == {*expected.split(), log, predictions}
    figures = "learning_curves confusion_val confusion_test per_class_test examples_correct"
    figures += " examples_incorrect reliability_test gradcam_test architecture"
    assert {path.stem for path in (run_dir / "figures").glob("*.png")} == set(figures.split())
    out = process.stdout
    assert str(tiny) in out and "SYNTHETIC" not in out and "3 epochs of 5 batches of 16" in out
    assert str(run_dir) in out and f"tensorboard --logdir {trained.log_dir}" in out
    assert f"{accuracy:.4f}" in out and f"{metrics['val']['accuracy']:.4f}" in out
    config = read_json(run_dir / "config.json")["config"]
    assert config.items() >= {"epochs": 3, "batch_size": 16, "device": "cpu", "seed": 0}.items()
    assert None not in config.values() and "auto" not in config.values()  # as resolved


def test_metrics_json(trained: SimpleNamespace, data: PathData) -> None:
    metrics = read_json(trained.run_dir / "metrics.json")
    counts = {split: 9 * n for split, n in COUNTS.items()}
    # The command gave it from the working folder; in the project's folder it is kept from there.
    card = {"path": str(data.path.resolve()), "kind": "subset", "md5": data.md5, "size": 28}
    assert replace(data, path=ROOT / "data" / "a.npz").card["path"] == str(Path("data", "a.npz"))
    assert metrics["dataset"] == card | {"counts": counts}
    assert metrics["model"] == {"name": "skipcnn", "parameters": count_parameters(SkipCNN())}
    history = torch.load(trained.run_dir / "last.pt")["history"]
    best = torch.load(trained.run_dir / "best.pt")["epoch"]
    assert metrics["best_epoch"] == best == Training.best_epoch(history) and metrics["epochs"] == 3
    assert metrics["train_seconds"] == (seconds := sum(row["seconds"] for row in history))
    assert metrics["images_per_second"] == pytest.approx(3 * 72 / seconds)
    model, checkpoint = Runs.load_model(trained.run_dir, "cpu")
    assert metrics["temperature"] == checkpoint["model"]["temperature"] != 1
    model.temperature.fill_(1)  # as in training
    plain, labels = Training.predict(model, PathMNIST.make_loader(data, "val", 36))
    for name, value in Evaluation.validation_metrics(plain, labels).items():
        assert history[best - 1][f"val_{name}"] == pytest.approx(value, abs=1e-6)
    fitted = Evaluation.fit_temperature(plain, labels)
    ece = Evaluation.expected_calibration_error(plain, labels)
    assert metrics["temperature"] == pytest.approx(fitted, rel=1e-4)
    assert metrics["val"]["ece_without_temperature"] == pytest.approx(ece, abs=1e-5)
    for key in RESULTS:
        assert set(metrics[key]["per_class"]) == set(CLASS_NAMES)
        assert np.sum(metrics[key]["confusion_matrix"]) == counts[key.split("_")[0]]
    probs = read_predictions(trained.run_dir).astype(np.float32)
    assert metrics["test"].items() >= compute_metrics(probs, data.labels["test"]).items()


@pytest.mark.parametrize("mode", ["--evaluate", "--resume"])
def test_a_finished_run_stays_the_same(
    cli: Callable, no_figures: None, run_dir: Path, monkeypatch: Patch, mode: str
) -> None:
    def results() -> tuple:  # the weights with the temperature, which is not fitted twice
        metrics, weights = read_json(run_dir / "metrics.json"), (run_dir / "best.pt").read_bytes()
        return metrics, weights, kill_runs.curves(run_dir)

    before, gone = results(), run_dir / "figures" / "confusion_test.png"
    gone.unlink()
    monkeypatch.chdir(run_dir.parent)  # the data is found from everywhere
    status, out, err = cli(mode, run_dir.name)
    assert (status, err) == (0, "") and f"{before[0]['test']['accuracy']:.4f}" in out
    assert results() == before and gone.exists()


def test_evaluate_a_run_that_is_not_finished(
    cli: Callable, run_dir: Path, no_figures: None, monkeypatch: Patch
) -> None:
    run_dir = run_dir.rename(run_dir.with_name("v1.0"))
    (run_dir / "metrics.json").unlink()
    monkeypatch.chdir(run_dir)
    status, out, _ = cli("--evaluate", ".", "--device", "cpu")
    assert status == 0 and "--resume finishes it" in out
    assert read_json(run_dir / "metrics.json")["model"]["name"] == "skipcnn"
    (path,) = run_dir.glob("pathmnist_test_*.csv")
    flag, split, *_ = path.name.split("_")  # as medmnist's Evaluator.parse_and_evaluate does
    run = path.name.split("@")[-1].split(".")[0]
    assert (flag, split, run) == ("pathmnist", "test", "v1_0") and path.name.endswith("@v1_0.csv")


def test_several_seeds_stopped_and_resumed_and_their_ensemble(
    cli: Callable, no_figures: None, tiny: Path, data: PathData, tmp_path: Path
) -> None:
    folder, argv = tmp_path / "both", ["--data", tiny, *TRAINING, "--epochs", "2"]
    steps = iter([PathMNIST.evaluate, lambda *_args: Common.stop(signal.SIGINT, None)])
    with Patch.context() as patch:
        patch.setattr(PathMNIST, "evaluate", lambda *args: next(steps)(*args))
        status, _, err = cli(*argv, "--log-dir", tmp_path, "--name", "both", "--seeds", "3", "1")
    assert status == 130 and err.strip().endswith(f"; go on with: {Runs.resume_command(folder, 1)}")
    status, out, _ = cli("--resume", folder)
    runs = [folder / f"seed{seed}" for seed in (3, 1)]
    metrics = [read_json(run / "metrics.json") for run in runs]
    summary = read_json(folder / "summary.json")
    assert status == 0 and summary["seeds"] == [m["seed"] for m in metrics] == [3, 1]
    assert metrics[0]["test"]["loss"] != metrics[1]["test"]["loss"]
    for split, name in product(RESULTS, ("accuracy", "auc", "loss", "macro_f1", "ece")):
        a, b = (m[split][name] for m in metrics)
        assert summary[split]["mean"][name] == pytest.approx((a + b) / 2)
        assert summary[split]["std"][name] == pytest.approx(abs(a - b) / np.sqrt(2))
    probs = np.mean([read_predictions(run) for run in runs], axis=0)
    expected = compute_metrics(probs, data.labels["test"])
    for name in ("accuracy", "auc", "loss"):
        assert summary["test"]["ensemble"][name] == pytest.approx(expected[name], rel=1e-5)
    assert f"ensemble {expected['accuracy']:.4f}" in out

    path = folder / "summary.json"
    before, evaluate = path.read_bytes(), ["--evaluate", folder, "--device", "cpu"]
    path.write_text("")
    assert cli(*evaluate)[0] == 0 and path.read_bytes() == before
    other = save_other(tmp_path).rename(tmp_path / f"{'d' * 200}.npz")
    status, out, _ = cli(*evaluate, "--data", other)
    (new,) = folder.glob(f"evaluated-on-{'d' * 50}-*/summary.json")
    assert status == 0 and out.count("Not the data") == 1
    assert read_json(new)["dataset"]["path"] == str(other.resolve())
    assert len(list(folder.glob("seed*/evaluated-on-ddd*/metrics.json"))) == 2
    assert read_json(new)["test"] != summary["test"] and path.read_bytes() == before
    assert [read_json(run / "metrics.json") for run in runs] == metrics
    path.unlink()
    assert "--resume it first" in only_line(cli(*evaluate)[2])


def test_synthetic_data_is_called_so_everywhere(
    cli: Callable, predict_cli: Callable, tmp_path: Path, monkeypatch: Patch
) -> None:
    headings, savefig = [], Figure.savefig

    def keep(figure: Figure, file: object, **options: object) -> None:
        headings.append((file, figure.get_suptitle()))
        savefig(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    path, log_dir = tmp_path / "synthetic.npz", tmp_path / "runs"
    np.savez(path, synthetic=np.array(True), **make_arrays(COUNTS))
    status, out, _ = cli("--data", path, *TRAINING, "--epochs", "1", "--log-dir", log_dir)
    assert status == 0 and "SYNTHETIC" in out
    (run_dir,) = log_dir.iterdir()
    assert run_dir.name.startswith("synthetic-skipcnn-seed0-")
    # A drawing of the model's layers shows no data.
    about_data = [(where, text) for where, text in headings if "architecture" not in str(where)]
    assert len(about_data) == 10
    assert [where for where, text in about_data if "SYNTHETIC" not in text] == []
    tiles = run_dir / "figures" / "gradcam_test.png"
    status, _, err = predict_cli(tiles, "--run", run_dir, "--out", tmp_path / "out")
    assert status == 0 and "SYNTHETIC" in err


# ---- refusals -----------------------------------------------------------------------------------

BAD_FLAGS = [
    *(f"--epochs={v}" for v in ("0", "-1", "nan", "2.5", "1e30", "9" * 30, "9" * 5000, "")),
    *(f"--batch-size={v}" for v in ("0", "1", "inf")),
    *(f"--lr={v}" for v in ("0", "-1", "nan", "inf", "1e300", "fast")),
    *(f"--weight-decay={v}" for v in ("-1", "nan", "1e300")),
    *("--patience=0", "--seed=-1", "--seed=1.5", "--seeds=-1", "--seeds 0 nan", "--seeds"),
    *(f"--name={v}" for v in ("a/b", "..", "/tmp/x", "", ".hidden", "a b", "a" * 101, "aé")),
    *("--model=vit", "--device=tpu", "--device=cuda:7", "--precision=fp8", "--nonsense"),
    *("--seed 1 --seeds 1 2", "--resume a --evaluate b", "--explain", "--embeddings"),
    *("--data=nowhere.npz", "--resume=nowhere", "--evaluate=nowhere", "more\nwords"),
]


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=lambda flags: flags[:30])
def test_bad_flags(
    cli: Callable, tiny: Path, tmp_path: Path, monkeypatch: Patch, flags: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PathMNIST, "train", lambda *_args: pytest.fail("it trains"))
    words = [flags] if "=" in flags or "\n" in flags else flags.split()
    more = [] if "nowhere" in flags else ["--data", tiny]
    status, out, err = cli(*more, *words)
    assert (status, out) == (2, "")
    said = only_line(err)
    named = (words[0], words[0].split("=")[0], words[-1], "nowhere", "more words")
    assert any(each in said for each in named)
    assert list(tmp_path.iterdir()) == []  # nothing was made


def test_help_names_every_flag(cli: Callable) -> None:
    status, out, err = cli("--help")
    flags = "data model epochs batch-size lr weight-decay patience seed seeds device precision"
    missing = [f for f in f"{flags} log-dir name resume evaluate".split() if f"--{f} " not in out]
    assert (status, err, missing) == (0, "", [])


def test_the_device_is_looked_for_before_the_data(cli: Callable, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(PathMNIST, "find_data", lambda _data: pytest.fail("looked for"))
    status, _, err = cli("--device", "cuda")
    assert status == 2 and "--device cuda" in only_line(err)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--resume RUN --epochs 3", "--epochs: "),
        ("--resume RUN --log-dir new", "--log-dir: "),
        ("--resume RUN --seeds 1 2", "--seeds: "),
        ("--resume RUN --data OTHER", "not the file"),
        ("--evaluate RUN --model resnet18", "--model: "),
        ("--evaluate RUN --batch-size 8", "--batch-size: "),
        ("--evaluate RUN --data LARGE", "images of 64 px"),
        ("--evaluate EMPTY", "config.json"),
        ("--resume EMPTY", "config.json"),
        ("--resume RUN/best.pt", "config.json"),
        ("--evaluate=~/no-run", "/home-folder/no-run: not the folder of a run"),
        ("--data OTHER --log-dir UP --name copy", "exists already"),
        ("--data OTHER --log-dir RUN/best.pt", "--log-dir"),
        ("--data OTHER --log-dir /proc/nowhere", "--log-dir"),
    ],
)
def test_what_does_not_fit_a_run(
    cli: Callable, run_dir: Path, tmp_path: Path, monkeypatch: Patch, flags: str, said: str
) -> None:
    monkeypatch.setenv("HOME", "/home-folder")
    for name in ("empty", "large"):
        (tmp_path / name).mkdir()
    places = {"RUN": run_dir, "RUN/best.pt": run_dir / "best.pt", "EMPTY": tmp_path / "empty"}
    places |= {"OTHER": save_other(tmp_path), "LARGE": save_other(tmp_path / "large", 64)}
    places |= {"UP": tmp_path}
    before = times(run_dir)
    status, _, err = cli(*(places.get(flag, flag) for flag in flags.split()))
    assert status == 2 and said in only_line(err)
    monkeypatch.setenv("RANK", "1")  # another process of torchrun does not evaluate
    assert cli("--evaluate", run_dir) == (0, "", "") and times(run_dir) == before


@pytest.mark.parametrize(
    ("mode", "change", "said"),
    [
        ("resume", {"dataset": {"path": "gone.npz"}}, f"{ROOT / 'gone.npz'}: the run's data is no"),
        ("evaluate", {"dataset": {"path": "gone.npz"}}, "gone.npz: the run's data is no longer"),
        ("resume", {"processes": 2}, "use torchrun --nproc-per-node=2"),
        ("resume", {"config": {"lr": 0.5}}, "last.pt"),
        *(("resume", content, "config.json: damaged") for content in (b"", b"[]", b"\xff\xfe")),
        ("evaluate", b'{"config": {}}', "config.json: damaged"),
    ],
)
def test_a_run_goes_on_as_it_began_or_not_at_all(
    cli: Callable, run_dir: Path, mode: str, change: dict | bytes, said: str
) -> None:
    path = run_dir / "config.json"
    if isinstance(change, dict):
        settings = read_json(path)
        for key, value in change.items():
            settings[key] = settings[key] | value if isinstance(value, dict) else value
        change = json.dumps(settings).encode()
    path.write_bytes(change)
    status, _, err = cli(f"--{mode}", run_dir)
    assert status == 2 and said in only_line(err)


# ---- signals, pipes, memory ---------------------------------------------------------------------


def test_two_runs_of_one_name_and_signals(tmp_path: Path) -> None:
    # Of two processes that start at once, one trains. Killed, stopped and resumed, it ends as a run
    # that nothing interrupted: weights, metrics, history and TensorBoard's three logs.
    kill_runs.prepare(tmp_path)
    run_dir, logs = tmp_path / "run", [tmp_path / "a.log", tmp_path / "b.log"]
    pair = [(kill_runs.start(kill_runs.new_run(tmp_path, "run"), log), log) for log in logs]
    if not kill_runs.wait_until(lambda: not pair[1][0].is_alive(), pair[0][0]):
        pair.reverse()
    (process, log), (other, said), epoch = *pair, 0
    assert other.exitcode == 2 and re.search("another process|exists", only_line(said.read_text()))
    for signum, status in ((9, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
        more = lambda old=epoch: kill_runs.checkpoint_epoch(run_dir) > old  # noqa: E731
        assert kill_runs.wait_until(more, process), log.read_text()
        os.kill(process.pid, signum)
        process.join(60)
        text, log = log.read_text(), tmp_path / f"after{status}.log"
        assert process.exitcode == status and "Traceback" not in text, text
        assert status < 0 or f"PathMNIST.py --resume {run_dir}" in text, text
        assert status < 0 or not list(run_dir.glob(".*.tmp"))
        epoch = kill_runs.checkpoint_epoch(run_dir)
        assert 1 <= epoch < kill_runs.EPOCHS
        time.sleep(1.1)  # TensorBoard orders a log's files by the second
        process = kill_runs.start(["--resume", run_dir], log)
    process.join(60)
    assert process.exitcode == 0 and f"resumed after epoch {epoch}" in log.read_text()
    assert kill_runs.what_is_wrong(run_dir, tmp_path / "reference") == []


def run_code(code: str) -> subprocess.CompletedProcess:
    """Run a few lines of Python in a process of their own, without what Windows lacks."""
    code = f"import os, signal, sys\nsys.modules['fcntl'] = None\ndel signal.SIGPIPE\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("os.kill(os.getpid(), 15)", 143, "\nstopped by SIGTERM\n"),
        ("\n try: os.kill(os.getpid(), 15)\n finally: os.kill(os.getpid(), 15)", -15, ""),
        ("raise BrokenPipeError", 141, ""),
    ],
)
def test_how_a_script_ends(code: str, status: int, said: str) -> None:
    process = run_code(f"import Common\ndef main(): {code}\nsys.exit(Common.run_script(main))")
    assert (process.returncode, process.stderr) == (status, said)


def test_start() -> None:
    # Without locks, as on Windows, without what is needed later, and each line is shown at once.
    later = "print({'matplotlib', 'sklearn', 'torchvision'} & set(sys.modules))"
    line = "Common.run_script(lambda: print('epoch 1') or os._exit(0))"
    process = run_code(f"import Common, PathMNIST\n{later}\n{line}")
    assert (process.stdout, process.stderr) == ("set()\nepoch 1\n", "")


def test_the_command_that_resumes_can_be_pasted(monkeypatch: Patch, tmp_path: Path) -> None:
    def other_drive(path: str) -> None:
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.chdir(tmp_path)
    for relpath in (os.path.relpath, other_drive):
        monkeypatch.setattr(os.path, "relpath", relpath)
        _, script, *rest = shlex.split(Runs.resume_command(Path("runs/a b"), 1))
        assert (tmp_path / script).samefile(ROOT / "PathMNIST.py")
        assert rest == ["--resume", "runs/a b"]


@pytest.mark.parametrize("script", ["PathMNIST.py", "Predict.py", "analyze_data.py"])
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("full", [True, False])
def test_output_that_nobody_takes(run_dir: Path, tmp_path: Path, full: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as disk:
        command = [sys.executable, "Predict.py", run_dir / "figures", "--run", run_dir]
        command += ["--out", tmp_path]
        where = {"stdout": disk if full else writer, "stderr": subprocess.PIPE}
        process = subprocess.run(command, cwd=ROOT, text=True, **where)
    os.close(writer)
    assert process.returncode == (2 if full else 128 + signal.SIGPIPE)
    assert "free some space" in only_line(process.stderr) if full else process.stderr == ""
    assert (tmp_path / "predictions.csv").exists()


def test_out_of_memory(capsys: pytest.CaptureFixture) -> None:
    def fail(error: Exception) -> None:
        raise error

    for error in (MemoryError(), torch.OutOfMemoryError("out of memory\nmore")):
        status, line = Common.run_script(fail, error), only_line(capsys.readouterr().err)
        assert status == 2 and re.match("error: out of memory; .*--batch-size", line)
    assert Common.run_script(torch.empty, 1 << 46) == 2  # the processor's own
    assert "memory" in only_line(capsys.readouterr().err)


def test_what_a_script_changes_it_puts_back(monkeypatch: Patch) -> None:
    def handlers() -> list:
        return [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)), threading.excepthook]

    monkeypatch.setattr(threading, "excepthook", print)  # somebody's own
    before = handlers()
    for call in ((int,), (os.kill, os.getpid(), 15), (os.rmdir, "/nowhere"), (torch.ones, -1)):
        try:
            Common.run_script(*call)
        except RuntimeError as error:  # one that is not of the user's making
            assert call[0] is torch.ones, error
        assert handlers() == before
