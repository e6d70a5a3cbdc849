"""A run's folder and what lies in it: options, history, checkpoints, the finished model.

    run_dir = make_run_dir(Path("runs"), "first-try")
    model, checkpoint = load_model(run_dir, "cpu")

A run of several seeds has a folder with one run per seed in it: seed0, seed1 and so on.
"""

import contextlib
import csv
import io
import json
import os
import shlex
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where runs are not locked
    fcntl = None

import torch
from torch import nn

from analyze_data import SIZES
from Common import UserError, write_atomically
from MyModels import MODELS

# Columns of history.csv; the checkpoint's history also has the recall per class.
CSV_FIELDS = ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_loss_se"]
CSV_FIELDS += ["val_accuracy", "val_auc", "seconds", "images_per_second"]


@dataclass(frozen=True)
class Config:
    """The options of one training run; None means "decided by `Training.resolve`"."""

    model: str = "skipcnn"
    epochs: int | None = None
    batch_size: int = 128
    lr: float = 7e-3
    weight_decay: float = 0.05
    patience: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    label_smoothing: float = 0.1
    warmup: float = 0.2  # share of the steps in which the learning rate rises
    flips: bool = True  # flips, quarter turns and shifts
    stain: float = 0.25  # half width of the stains' gain, see `stain_jitter`; 0: off
    color: float = 0.07  # half width of the gain and the offset per channel; 0: off
    cutmix: float = 0.5  # share of the batches whose images get a patch of another; 0: off


def make_run_dir(log_dir: Path, name: str) -> Path:
    """Create a run's own folder; UserError if there is a run in it or it cannot be made."""
    run_dir = log_dir / name
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        taken = any(path.name[0] != "." for path in run_dir.iterdir())
    except OSError as error:
        why = f"no folder that can be written ({error.strerror})"
        raise UserError(f"--log-dir {log_dir}: {why}; choose another") from error
    if taken:
        raise UserError(f"{run_dir}: exists already; choose another --name or --resume it")
    return run_dir


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep a second process out of a run's folder, and clear up what a killed one left."""
    with open(run_dir / ".lock", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{run_dir}: another process is training there; wait for it") from error
        except OSError:  # a file system without locks
            pass
        for stale in run_dir.glob(".*.tmp"):
            stale.unlink()
        yield


def read_run(run_dir: Path) -> tuple[dict, Config]:
    """Return config.json's content, with "seeds" always there, and the `Config` in it."""
    path = run_dir / "config.json"
    try:
        settings = json.loads(path.read_text())
        config = Config(**{field.name: settings["config"][field.name] for field in fields(Config)})
        _ = MODELS[config.model], settings["processes"], settings["dataset"]["md5"]  # all there?
        return {"seeds": [config.seed], **settings}, config
    except OSError as error:
        why = f"config.json: {error.strerror}"
        raise UserError(f"{run_dir}: not the folder of a run ({why})") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of another version; train anew") from error


def seed_dirs(run_dir: Path, seeds: Sequence[int], finished: bool = False) -> list[Path]:
    """Return each seed's folder: the run's own, or one of its folders where it has several."""
    if len(seeds) == 1:
        return [run_dir]
    if finished and not (run_dir / "summary.json").exists():
        raise UserError(f"{run_dir}: not all of its seeds are trained; --resume it first")
    return [run_dir / f"seed{seed}" for seed in seeds]


def resume_command(run_dir: Path, processes: int) -> str:
    """Return what to type to continue a run."""
    start = "python" if processes == 1 else f"torchrun --nproc-per-node={processes}"
    script = str(Path(__file__).with_name("PathMNIST.py"))
    with contextlib.suppress(ValueError):  # on another drive than the working folder
        script = os.path.relpath(script)
    return f"{start} {shlex.quote(script)} --resume {shlex.quote(str(run_dir))}"


def write_history(path: Path, history: Sequence[dict]) -> None:
    """Write one CSV row per epoch."""
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write_atomically(path, buffer.getvalue().encode())


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write tensors and plain Python values atomically."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint into main memory, without running any code that it may hold. UserError if
    the file is missing, damaged, or not one of this project's checkpoints."""
    try:
        with zipfile.ZipFile(path) as archive:  # what is none, is not unpickled at all
            if archive.testzip():  # torch does not compare the checksums
                raise ValueError("damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint[key], dict) for key in ("model", "config", "identity")
        ):
            raise TypeError("other values")
        return checkpoint
    except OSError as error:
        what = f"{path}: no checkpoint that can be read ({error.strerror})"
        raise UserError(f"{what}; give the folder of a finished run") from error
    except Exception as error:  # torch and pickle raise a dozen types on damaged bytes
        what = f"{path}: damaged, or not a checkpoint of this project"
        raise UserError(f"{what}; train anew") from error


def load_model(run_dir: Path, device: str) -> tuple[nn.Module, dict]:
    """Return a finished run's best model, in evaluation mode, and its checkpoint."""
    path = run_dir / "best.pt"
    checkpoint = load_checkpoint(path)
    name, size = checkpoint["config"].get("model"), checkpoint["identity"].get("size")
    if name not in list(MODELS) or size not in SIZES:  # a list: the name may be of any type
        raise UserError(f"{path}: a {name!r} for {size!r} px, which is not known; train anew")
    model = MODELS[name]()
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit a {name}; train anew") from error
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint
