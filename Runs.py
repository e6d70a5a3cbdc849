"""A run's folder and what lies in it: options, history, checkpoints, the finished model.

    run_dir = make_run_dir(Path("runs"), "first-try", "")
    model, checkpoint = load_model(run_dir, "cpu")

The folder of a run of several seeds contains one run per seed: seed0, seed1 and so on. A run is
trained when its best.pt has a note on the training, and finished when it is evaluated too: then
metrics.json, its last file, is there.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import platform
import shlex
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from analyze_data import SIZES, PathData
from Common import UserError, lacks_memory, write_atomically, write_json
from MyModels import MODELS, TissueModel

# Columns of history.csv; the checkpoint's history also has the recall of each class.
CSV_FIELDS = ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_loss_se"]
CSV_FIELDS += ["val_accuracy", "val_auc", "seconds", "images_per_second"]


@dataclass(frozen=True)
class Config:
    """The options of one training run. `Training.resolve` decides on epochs and patience if they
    are 0, and on cutmix if it is None."""

    model: str = "skipcnn"
    epochs: int = 0
    batch_size: int = 128
    lr: float = 7e-3
    weight_decay: float = 0.05
    patience: int = 0
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    warmup: float = 0.2  # share of the steps in which the learning rate rises
    flips: bool = True  # flips, quarter turns and shifts
    stain: float = 0.25  # half width of the stains' gain, see `stain_jitter`; 0: off
    color: float = 0.07  # half width of the gain and the offset per channel; 0: off
    sharpness: float = 0.4  # share of the images that are blurred or sharpened
    noise: float = 0.2  # share of the images that get noise
    jpeg: float = 0.07  # share of the images that are compressed
    cutmix: float | None = None  # share of the batches whose images are mixed


def config_from(values: dict) -> Config:
    """Return the options that a run has saved. A run that is older than an option has no value for
    it, and gets the default."""
    known = [field.name for field in fields(Config)]
    return Config(**{name: values[name] for name in known if name in values})


def make_run_dir(log_dir: Path, name: str | None, default: str) -> Path:
    """Create a run's own folder. A folder of the given `name` must be new or empty, except for
    hidden files. If `name` is None, the default name is used, with a number added if it is taken.
    UserError if the folder is not empty or cannot be created."""
    try:
        str(log_dir.resolve()).encode()
        log_dir.mkdir(parents=True, exist_ok=True)
        if name is None:
            return make_free_dir(log_dir, default)
        run_dir = log_dir / name
        run_dir.mkdir(exist_ok=True)
        taken = any(not path.name.startswith(".") for path in run_dir.iterdir())
    except UnicodeEncodeError as error:
        what = f"--log-dir {log_dir}: TensorBoard needs a name in UTF-8"
        raise UserError(f"{what}; choose another") from error
    except OSError as error:
        what = f"--log-dir {log_dir}: cannot create a folder in it ({error.strerror})"
        raise UserError(f"{what}; choose another") from error
    if taken:
        raise UserError(f"{run_dir}: exists already; choose another --name or --resume it")
    return run_dir


def make_free_dir(log_dir: Path, name: str) -> Path:
    """Create and return the first of NAME, NAME-2, NAME-3 and so on that does not exist yet."""
    for number in itertools.count(1):
        run_dir = log_dir / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()
            break
    return run_dir


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, and remove unfinished files that a killed process
    left there. UserError if another process has locked the folder."""
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{run_dir}: another process is training there; wait for it") from error
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    try:
        for part in run_dir.glob(".*.unfinished"):
            part.unlink()
        yield
    finally:
        lock.release()


def write_settings(
    run_dir: Path, data: PathData, config: Config, seeds: list | None = None
) -> None:
    """Write config.json; `seeds` are those of a folder that holds several runs."""
    settings: dict = {
        "config": asdict(config),
        "dataset": data.card,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if seeds is not None:
        settings["seeds"] = list(seeds)
    write_json(run_dir / "config.json", settings)


def read_run(run_dir: Path) -> tuple[dict, Config]:
    """Return config.json's content, with "seeds" added if it is missing, and the `Config` in it.
    UserError if there is no such file, or if it is not one of this project's."""
    path = run_dir / "config.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        why = f"config.json: {error.strerror}"
        raise UserError(f"{run_dir}: not the folder of a run ({why})") from error
    try:
        settings = json.loads(text)
        config = config_from(settings["config"])
        known = config.model in MODELS and {"path", "md5", "size"} <= settings["dataset"].keys()
    except (ValueError, LookupError, TypeError, AttributeError):
        known = False
    if not known:
        raise UserError(f"{path}: damaged, or written by another version; train again")
    return {"seeds": [config.seed], **settings}, config


def seed_dirs(run_dir: Path, seeds: list) -> list:
    """Return each seed's folder: the run's folder itself if there is one seed, else a subfolder."""
    if len(seeds) == 1:
        return [run_dir]
    return [run_dir / f"seed{seed}" for seed in seeds]


def is_finished(run_dir: Path) -> bool:
    """Return whether a run was trained to its end and evaluated. metrics.json is the last file that
    a run writes. It contains the best epoch, unless `--evaluate` wrote it for a run that was not
    finished."""
    path = run_dir / "metrics.json"
    return path.exists() and "best_epoch" in json.loads(path.read_text())


def check_resumable(run_dir: Path) -> None:
    """Raise a UserError if a resumed run would start from the beginning and overwrite results. A
    run that was stopped before its first checkpoint has no results, so it may start again."""
    if (run_dir / "last.pt").exists():
        return
    for name in ("best.pt", "metrics.json"):
        if (run_dir / name).exists():
            what = f"{run_dir}: cannot be resumed because last.pt is missing"
            raise UserError(f"{what}; train again, or use --evaluate")


def finished_dirs(run_dir: Path) -> list:
    """Return the folders of a finished run's models, one per seed. UserError if not all of its
    seeds are trained."""
    if (run_dir / "best.pt").exists():
        return [run_dir]
    seeds = read_run(run_dir)[0]["seeds"]
    if len(seeds) > 1 and not (run_dir / "summary.json").exists():
        raise UserError(f"{run_dir}: not all of its seeds are trained; --resume it first")
    return seed_dirs(run_dir, seeds)


def resume_command(run_dir: Path) -> str:
    """Return what to type to continue a run."""
    script = str(Path(__file__).with_name("PathMNIST.py"))
    with contextlib.suppress(ValueError):  # on another drive than the working folder
        script = os.path.relpath(script)
    return f"python {shlex.quote(script)} --resume {shlex.quote(str(run_dir))}"


def write_history(path: Path, history: list) -> None:
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
        with zipfile.ZipFile(path) as archive:  # never unpickle a file that is not a zip archive
            intact = archive.testzip() is None  # torch does not compare the checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True) if intact else None
    except OSError as error:
        what = f"{path}: cannot read this checkpoint ({error.strerror})"
        raise UserError(f"{what}; give the folder of a finished run") from error
    except Exception as error:  # torch and pickle raise many types of error on damaged files
        if lacks_memory(error):
            raise
        checkpoint = None
    parts = ("model", "config", "identity")
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(part), dict) for part in parts
    ):
        raise UserError(f"{path}: damaged, or not a checkpoint of this project; train again")
    return checkpoint


def load_weights(model: TissueModel, checkpoint: dict, path: Path) -> None:
    """Copy a checkpoint's weights into the model; UserError if they are another network's."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        if lacks_memory(error):
            raise
        raise UserError(f"{path}: its weights do not fit the model; train again") from error


def load_model(run_dir: Path, device: str) -> tuple[TissueModel, dict]:
    """Return a finished run's best model, in evaluation mode, and its checkpoint."""
    path = run_dir / "best.pt"
    checkpoint = load_checkpoint(path)
    name = checkpoint["config"].get("model")
    size = checkpoint["identity"].get("size")
    if name not in list(MODELS) or size not in SIZES:  # a list: the name may be of any type
        raise UserError(f"{path}: unknown model or size: {name!r} for {size!r} px; train again")
    model = MODELS[name]()
    load_weights(model, checkpoint, path)
    model = model.to(device).to(memory_format=torch.channels_last)
    return model.eval(), checkpoint
