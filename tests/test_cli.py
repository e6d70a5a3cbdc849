"""Tests of PathMNIST.py's command line: python -m pytest tests/test_cli.py"""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys

import kill_runs
import numpy as np
import pytest
import torch
from conftest import COUNTS, ROOT, TRAINING, in_process, make_arrays, only_line
from matplotlib.figure import Figure

import analyze_data
import Common
import Evaluation
import PathMNIST
import Predict
import Runs
import Script
import Training

Patch = pytest.MonkeyPatch


def read_json(path):
    """Read metrics.json, summary.json or config.json."""
    return json.loads(path.read_text())


def read_predictions(run_dir):
    """Read the probabilities (N, 9) of the CSV file in MedMNIST's format."""
    (path,) = run_dir.glob("pathmnist_test_*.csv")
    return np.loadtxt(path, delimiter=",", dtype=np.float32)[:, 1:]


def contents(folder):
    """Return what the files below a folder hold."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_fits_terminal(text, *paths):
    """Check that each line has at most 80 columns, or is longer because of a path."""
    for line in text.splitlines():
        assert len(line) <= 80 or any(str(path) in line for path in paths), line


def test_a_run_leaves_everything(trained, tiny):
    run_dir, out = trained.run_dir, trained.process.stdout
    assert (trained.process.returncode, trained.process.stderr) == (0, "")
    metrics, config = (read_json(run_dir / f"{name}.json") for name in ("metrics", "config"))
    auc, accuracy = metrics["test"]["auc"], metrics["test"]["accuracy"]
    for name in ("history.csv", "best.pt", "last.pt", "train", "val"):
        assert (run_dir / name).exists()
    assert (run_dir / f"pathmnist_test_[AUC]{auc:.3f}_[ACC]{accuracy:.3f}@main.csv").exists()
    figures = "learning_curves confusion_val confusion_test per_class_test examples_correct"
    figures += " examples_incorrect reliability_test gradcam_test architecture"
    assert {path.stem for path in (run_dir / "figures").iterdir()} == set(figures.split())
    assert str(tiny) in out and "SYNTHETIC" not in out and "3 epochs of 5 batches of 16" in out
    eight = metrics["test_tta"]["accuracy"]
    last_lines = rf"{accuracy:.4f} .*{eight:.4f} .*\n.*{run_dir}.*\n.*{trained.log_dir}\n$"
    assert re.search(last_lines, out)
    assert_fits_terminal(out, tiny, run_dir)
    assert config["config"].items() >= {"epochs": 3, "batch_size": 16, "seed": 0}.items()
    assert "auto" not in config["config"].values()  # but what the program has chosen


def test_metrics_json(trained, data):
    metrics = read_json(trained.run_dir / "metrics.json")
    assert metrics["dataset"]["md5"] == data.md5
    assert metrics["dataset"]["counts"] == {split: 9 * n for split, n in COUNTS.items()}
    history = torch.load(trained.run_dir / "last.pt")["history"]
    model, checkpoint = Runs.load_model(trained.run_dir, "cpu")
    seconds = sum(row["seconds"] for row in history)
    expected = {"epochs": 3, "seed": 0, "train_seconds": seconds, **checkpoint["training"]}
    assert metrics.items() >= expected.items()
    assert metrics["best_epoch"] == checkpoint["epoch"] == Training.best_epoch(history)
    assert metrics["temperature"] == pytest.approx(model.temperature.item())
    model.temperature.fill_(1)  # as in training
    plain, labels = Training.predict(model, PathMNIST.make_loader(data, "val", 36))
    ece = Evaluation.expected_calibration_error(plain, labels)
    assert metrics["val"]["ece_without_temperature"] == pytest.approx(ece, abs=1e-5)
    expected = Evaluation.compute_metrics(read_predictions(trained.run_dir), data.labels["test"])
    assert metrics["test"].items() >= expected.items()


@pytest.mark.parametrize("mode", ["--evaluate", "--resume"])
def test_a_finished_run_stays_the_same(cli, no_figures, run_dir, monkeypatch, mode):
    notes, figure = (
        run_dir / "pathmnist_test_my_notes.csv",
        run_dir / "figures" / "confusion_val.png",
    )
    notes.touch()
    figure.unlink()
    before, curves = contents(run_dir), kill_runs.curves(run_dir)
    monkeypatch.setenv("RANK", "gpu")  # left by another program
    monkeypatch.chdir(run_dir.parent)  # the data is found from everywhere
    status, out, err = cli(mode, run_dir.name)
    assert (status, err) == (0, "") and "Test accuracy" in out
    for path in (notes, run_dir / "best.pt", run_dir / "metrics.json"):
        assert path.read_bytes() == before[path]
    assert kill_runs.curves(run_dir) == curves and figure.exists()


def test_evaluate_an_older_run_that_is_not_finished(cli, no_figures, run_dir):
    run_dir = run_dir.rename(run_dir.with_name("v1.0"))
    before = read_json(run_dir / "metrics.json")
    settings, best = read_json(run_dir / "config.json"), torch.load(run_dir / "best.pt")
    for config in (settings["config"], best["config"]):
        del config["stain"]  # an option that was added later
        config["blur"] = 1  # and one that is gone
    (run_dir / "config.json").write_text(json.dumps(settings))
    del best["training"]
    torch.save(best, run_dir / "best.pt")
    for _ in range(2):  # evaluating it does not make it a finished one
        status, out, _ = cli("--evaluate", run_dir)
        assert status == 0 and "--resume" in out and not Runs.is_finished(run_dir)
    assert read_json(run_dir / "metrics.json")["test"] == before["test"]
    # medmnist's evaluator takes the text up to the first dot for the run's name.
    assert len(list(run_dir.glob("*@v1_0.csv"))) == 1


def test_several_seeds_stopped_and_resumed_and_their_ensemble(
    cli, no_figures, tiny, data, tmp_path
):
    folder, argv = tmp_path / "a b" / "both", ["--data", tiny, *TRAINING, "--epochs", "2"]
    runs = [folder / "seed3", folder / "seed1"]
    steps = iter([PathMNIST.evaluate, lambda *_args: Script.stop(signal.SIGINT, None)])
    argv += ["--log-dir", folder.parent, "--name", "both", "--seeds", "3", "1"]
    with Patch.context() as patch:
        patch.setattr(PathMNIST, "evaluate", lambda *args: next(steps)(*args))
        status, _, err = cli(*argv)
    assert status == 130 and shlex.split(err)[-2:] == ["--resume", str(folder)]  # can be pasted
    with Runs.locked(folder):
        assert "another process" in only_line(cli("--resume", folder)[2])
    finished = contents(runs[0])
    assert cli("--resume", folder)[0] == 0 and contents(runs[0]) == finished
    losses = [read_json(run / "metrics.json")["test"]["loss"] for run in runs]
    summary = read_json(folder / "summary.json")
    assert summary["seeds"] == [3, 1] and losses[0] != losses[1]
    assert summary["test"]["mean"]["loss"] == pytest.approx(np.mean(losses))
    assert summary["test"]["std"]["loss"] == pytest.approx(abs(losses[0] - losses[1]) / np.sqrt(2))
    probs = np.mean([read_predictions(run) for run in runs], axis=0)
    expected = Evaluation.compute_metrics(probs, data.labels["test"])
    assert summary["test"]["ensemble"]["auc"] == pytest.approx(expected["auc"])
    assert summary["test"]["ensemble"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)

    before, other = contents(folder), tmp_path / "other.npz"
    np.savez(other, **make_arrays(COUNTS, seed=1))
    assert cli("--evaluate", folder, "--data", other)[0] == 0
    (new,) = folder.glob("evaluated-on-other-*/summary.json")
    assert read_json(new)["test"] != summary["test"] and contents(folder).items() >= before.items()
    (folder / "summary.json").unlink()
    assert "--resume it first" in only_line(cli("--evaluate", folder)[2])


def test_synthetic_data_is_called_so_everywhere(cli, tmp_path, monkeypatch):
    titles, savefig = [], Figure.savefig

    def keep(figure, file, **options):
        titles.append(figure.get_suptitle().replace("\n", " "))
        savefig(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    path, log_dir = tmp_path / "synthetic.npz", tmp_path / "runs"
    np.savez(path, synthetic=True, **make_arrays(COUNTS))
    status, out, _ = cli("--data", path, *TRAINING, "--epochs", "1", "--log-dir", log_dir)
    assert status == 0 and Common.SYNTHETIC in out
    assert list(log_dir.glob("synthetic-skipcnn-seed0-*"))
    unnamed = {title for title in titles if Common.SYNTHETIC not in title}
    assert unnamed == {"SkipCNN: 459,353 parameters"}  # the architecture shows no data


# ---- refusals -----------------------------------------------------------------------------------

BAD_FLAGS = ["--epochs=0", "--epochs=2.5", f"--epochs={'9' * 5000}", "--batch-size=1", "--lr=nan"]
BAD_FLAGS += ["--weight-decay=-1", "--patience=0", "--seed=-1", "--name=a/b", f"--name={'a' * 101}"]
BAD_FLAGS += ["--model=vit", "--device=cuda", "--nonsense", "more\nwords", "--data=nowhere"]
BAD_FLAGS += ["--seed 1 --seeds 1 2", "--resume a --evaluate b", "--resume=nowhere"]


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=lambda flags: flags[:30])
def test_bad_flags(cli, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = cli(*flags.split(" "))
    assert (status, out) == (2, "")
    assert any(word in only_line(err) for word in re.split(r"[ =\n]", flags))
    assert list(tmp_path.iterdir()) == []  # nothing was made


@pytest.mark.parametrize("script", [PathMNIST, Predict, analyze_data])
def test_help_fits_a_terminal(capfd, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = in_process(script.main, capfd, "--help")
    assert (status, err) == (0, "") and "--help" in out
    assert_fits_terminal(out)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--resume RUN --epochs 3", "--epochs: "),
        ("--resume RUN --data OTHER", "not the file"),
        ("--evaluate RUN --log-dir new", "--log-dir: "),
        ("--evaluate RUN --data LARGE", "64 px"),
        ("--evaluate UP", "config.json"),
        ("--data OTHER --log-dir UP --name copy", "exists already"),
        ("--data OTHER --log-dir RUN/best.pt", "--log-dir"),
        ("--data OTHER --log-dir LATIN", "--log-dir"),
    ],
)
def test_what_does_not_fit_a_run(cli, run_dir, tmp_path, flags, said):
    places = {"RUN": run_dir, "RUN/best.pt": run_dir / "best.pt", "UP": tmp_path}
    places["LATIN"] = tmp_path / os.fsdecode(b"caf\xe9")  # a name that is not UTF-8
    for name, size in (("OTHER", 28), ("LARGE", 64)):
        places[name] = tmp_path / f"{name}.npz"
        np.savez(places[name], **make_arrays(COUNTS, size, seed=1))
    before = contents(run_dir)
    status, _, err = cli(*(places.get(flag, flag) for flag in flags.split()))
    assert status == 2 and said in only_line(err) and contents(run_dir) == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"path": ".*"', '"path": "gone.npz"', f"{ROOT / 'gone.npz'}: "),
        ('"lr": .*,', '"lr": 0.5,', "last.pt"),
        ("{", "[", "config.json: damaged"),
    ],
)
def test_a_run_goes_on_as_it_began_or_not_at_all(cli, run_dir, old, new, said):
    path = run_dir / "config.json"
    path.write_text(re.sub(old, new, path.read_text()))
    status, _, err = cli("--resume", run_dir)
    assert status == 2 and said in only_line(err)


@pytest.mark.parametrize("results", ["best.pt", "metrics.json"])
def test_resume_without_last_pt_replaces_no_results(cli, run_dir, results):
    for name in {"last.pt", "best.pt", "metrics.json"} - {results}:
        (run_dir / name).unlink()
    before = contents(run_dir)
    assert "last.pt" in only_line(cli("--resume", run_dir)[2])
    assert contents(run_dir) == before


def test_runs_that_start_in_the_same_second(tmp_path):
    folders = [Runs.make_run_dir(tmp_path, None, "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run", "run-2", "run-3"]


def test_seeds_with_a_single_seed_trains_that_seed(cli, no_figures, tiny, tmp_path):
    argv = ["--data", tiny, *TRAINING, "--epochs", "1", "--log-dir", tmp_path, "--name", "one"]
    assert cli(*argv, "--seeds", "3")[0] == 0
    assert read_json(tmp_path / "one" / "metrics.json")["seed"] == 3


# ---- signals, pipes, memory ---------------------------------------------------------------------


def test_signals_and_a_closed_terminal(tmp_path):
    """Killed, stopped and resumed, a run ends as one that nothing interrupted, although at last its
    terminal is closed."""
    kill_runs.prepare(tmp_path)
    run_dir, log, epoch = tmp_path / "run", tmp_path / "log", 0
    process = kill_runs.start(kill_runs.new_run(tmp_path, "run"), log)

    def has_gone_on():
        return kill_runs.checkpoint_epoch(run_dir) > epoch

    for signum, status in ((9, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
        assert kill_runs.wait_until(has_gone_on, process), log.read_text()
        os.kill(process.pid, signum)
        process.join(60)
        assert process.exitcode == status
        epoch = kill_runs.checkpoint_epoch(run_dir)
        terminal, end = pty.openpty()
        screen = os.ttyname(end) if signum == signal.SIGTERM else log
        process = kill_runs.start(["--resume", run_dir], screen)
    text = log.read_text()
    assert text.count(f"PathMNIST.py --resume {run_dir}\n") == 2 and "Traceback" not in text
    assert kill_runs.wait_until(has_gone_on, process)
    assert f"resumed after epoch {epoch}" in os.read(terminal, 4000).decode()
    os.close(end)
    os.close(terminal)
    process.join(60)
    assert process.exitcode == 0
    assert kill_runs.what_is_wrong(run_dir, tmp_path / "reference") == []


def run_code(code, *before, **streams):
    """Run a script whose `main` is `code`, in a process of its own."""
    code = f"import os, sys, Script\ndef main(): {code}\nsys.exit(Script.run_script(main))"
    command = [*before, sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, timeout=60, **streams)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("os.kill(os.getpid(), 15)", 143, "\nstopped by SIGTERM\n"),
        ("\n try: os.kill(os.getpid(), 15)\n finally: os.kill(os.getpid(), 15)", -15, ""),
        ("raise BrokenPipeError", 141, ""),
        ("print('epoch 1') or os._exit(0)", 0, "epoch 1\n"),  # each line is shown at once
    ],
)
def test_how_a_script_ends(code, status, said):
    process = run_code(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (process.returncode, process.stdout.decode()) == (status, said)


def test_ctrl_c_shows_how_to_go_on_when_it_ends_the_reader_too():
    """As in `python PathMNIST.py 2>&1 | tee log`: then the line goes to the terminal itself."""
    terminal, end = pty.openpty()
    reader, writer = os.pipe()
    os.close(reader)
    code = "os.kill(os.getpid(), 2)"
    process = run_code(code, "setsid", "--ctty", stdin=end, stdout=writer, stderr=writer)
    assert process.returncode == 130
    assert b"stopped by SIGINT" in os.read(terminal, 1000)


def test_a_closed_stderr_does_no_harm(tiny, tmp_path):
    argv = [sys.executable, "PathMNIST.py", "--data", tiny, *TRAINING, "--log-dir", tmp_path]
    command = f"{shlex.join(map(str, argv))} --epochs 1 --name run 2>&-"
    subprocess.run(command, shell=True, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert Runs.is_finished(tmp_path / "run")


@pytest.mark.parametrize("script", ["PathMNIST.py", "Predict.py", "analyze_data.py"])
def test_ctrl_c_during_the_imports_shows_no_traceback(script):
    command = [sys.executable, "-X", "importtime", script, "--help"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while "numpy" not in process.stderr.readline():  # one of the first that take long
        pass
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" not in process.stderr.read()
    assert process.wait(60) == -signal.SIGINT


ERRORS = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory\nmore")]
ERRORS += [RuntimeError("can't start new thread"), RuntimeError("can't allocate memory")]


def test_errors_that_become_one_line(capsys):
    def fail(error):
        raise error

    for error in ERRORS:
        assert Script.run_script(fail, error) == 2
        assert "--batch-size" in only_line(capsys.readouterr().err)
    for error in (FileNotFoundError(2, "No such file"), RuntimeError("shapes"), NameError("x")):
        with pytest.raises(type(error)):  # these are faults of the program
            Script.run_script(fail, error)
