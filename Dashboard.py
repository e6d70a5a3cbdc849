"""Everything that TensorBoard shows of a run.

with open_run(run_dir, data, config) as log:
    log.start(model)
    log.epoch(row, probs, labels)      # after each epoch
    log.results(results, probs)

TensorBoard sorts the groups of tags by name and opens only the first two. The most important curves
are therefore called `epoch/...`, and all other groups have names that come later.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy import ndarray
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

import Evaluation
import Figures
import Runs
from analyze_data import PathData
from Augmentation import augment, to_float
from Common import SHORT_NAMES, markdown_table
from MyModels import MODELS, TissueModel, layer_texts
from Runs import Config


@contextlib.contextmanager
def open_run(run_dir: Path, data: PathData, config: Config) -> Iterator["Log"]:
    """Lock a run's folder against other processes, write config.json (from then on the run can be
    resumed), and keep the TensorBoard logs open while the run is trained."""
    with Runs.locked(run_dir):
        last = run_dir / "last.pt"
        first_step = Runs.load_checkpoint(last)["epoch"] + 1 if last.exists() else 0
        Runs.write_settings(run_dir, data, config)
        log = Log(run_dir, data, config, first_step)
        try:
            yield log
        finally:
            for writer in (log.run, log.train, log.val):
                writer.close()


def open_writer(folder: Path, first_step: int) -> SummaryWriter:
    """Open a TensorBoard log. Events from `first_step` on were written by the interrupted run;
    TensorBoard hides them. TensorBoard reads the files in the order of the times in their names.
    The existing files are renamed to times long ago, so that the new file comes last even if the
    clock was set back."""
    for number, path in enumerate(sorted(folder.glob("events.out.tfevents.*"))):
        earlier = re.sub(r"tfevents\.\d+", f"tfevents.{number:010d}", path.name)
        path.rename(folder / earlier)
    return SummaryWriter(str(folder), purge_step=first_step)


class Log:
    """The three TensorBoard logs of a run: one for the run itself, and one each for train and val,
    so that a chart shows both as two curves. `first_step` is the first step that this process
    logs."""

    def __init__(self, run_dir: Path, data: PathData, config: Config, first_step: int) -> None:
        self.run_dir = run_dir
        self.data = data
        self.config = config
        self.run = open_writer(run_dir, first_step)
        self.train = open_writer(run_dir / "train", first_step)
        self.val = open_writer(run_dir / "val", first_step)

    def start(self, model: TissueModel) -> None:
        """Log what is known before training: options, layers, graph, augmented tiles."""
        data, config = self.data, self.config
        self.text("config", asdict(config))
        self.text("dataset", data.card)
        self.run.add_text("layers", markdown_table(layer_texts(model, data.size)))
        tiles = torch.from_numpy(data.images["train"][:8])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch.jit")  # add_graph still uses it
            self.run.add_graph(model.eval(), to_float(tiles[:1].to(model.temperature.device)))
        generator = torch.Generator().manual_seed(config.seed)
        views = augment(tiles, generator, config)
        views = views.permute(0, 2, 3, 1)
        note = Figures.data_note(data.kind)
        figure = Figures.augmentation_figure(tiles.numpy(), views.numpy(), note)
        self.picture("augmentation", figure, 0)
        self.run.flush()  # before the first checkpoint, because a resumed run skips this method

    def text(self, name: str, values: dict) -> None:
        """Log names and values as a table."""
        rows = [[name, ""]] + [[key, str(value)] for key, value in values.items()]
        table = markdown_table(rows)
        self.run.add_text(name, table.encode(errors="backslashreplace").decode())

    def epoch(self, row: dict, probs: ndarray, labels: ndarray) -> None:
        """Log a row of the history, and about five times a run the confusion matrix on val."""
        epoch, epochs = row["epoch"], self.config.epochs
        for name in ("accuracy", "loss"):
            self.train.add_scalar(f"epoch/{name}", row[f"train_{name}"], epoch)
            self.val.add_scalar(f"epoch/{name}", row[f"val_{name}"], epoch)
        scores = {"epoch/auc": row["val_auc"]}
        for short, recall in zip(SHORT_NAMES, row["val_recall"], strict=True):
            scores[f"recall/{short}"] = recall
        for tag, score in scores.items():
            if not math.isnan(score):  # nan: val has no image of this class
                self.val.add_scalar(tag, score, epoch)
        self.run.add_scalar("learning rate", row["lr"], epoch)
        self.run.add_scalar("speed/images per second", row["images_per_second"], epoch)
        if epoch % math.ceil(epochs / 5) == 0 or epoch == epochs:
            matrix = Evaluation.confusion(probs, labels)
            note = f"epoch {epoch}, {Figures.split_note('val', self.data.kind)}"
            self.picture("confusion by epoch", Figures.confusion_figure(matrix, note), epoch)
        for writer in (self.run, self.train, self.val):
            writer.flush()  # before the checkpoint, so that a resumed run's log has no gap

    def picture(self, name: str, figure: Figure, step: int) -> None:
        """Log a figure."""
        self.run.add_image(f"pictures/{name}", Figures.pixels(figure), step, dataformats="HWC")

    def results(self, results: dict, probs: dict) -> None:
        """Log the saved figures, precision-recall curves, the table of results and the row in
        HParams. The step is the last epoch plus one, so that a resumed run replaces these
        entries."""
        step = results["epochs"] + 1
        for path in sorted((self.run_dir / "figures").glob("*.png")):
            pixels = np.asarray(Image.open(path))
            self.run.add_image(f"results/{path.stem}", pixels, step, dataformats="HWC")
        for split in ("val", "test"):
            for label, short in enumerate(SHORT_NAMES):
                is_class = self.data.labels[split] == label
                self.run.add_pr_curve(f"PR {split}/{short}", is_class, probs[split][:, label], step)
        table = Evaluation.result_texts({key: results[key] for key in Evaluation.RESULTS})
        self.run.add_text("results", markdown_table(table), step)
        self.hparams(results, step)

    def hparams(self, results: dict, step: int) -> None:
        """Log the run's row in the table of HParams, with only as many columns as TensorBoard shows
        by default. The text "config" has all options."""
        options = ("model", "epochs", "batch_size", "lr", "seed")
        values = {option: getattr(self.config, option) for option in options}
        scores = {}
        for key in Evaluation.RESULTS:
            scores[f"results/{key} accuracy"] = results[key]["accuracy"]
        for summary in hparams(values, scores, {"model": list(MODELS)}):
            self.run.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        for tag, score in scores.items():
            self.run.add_scalar(tag, score, step)
