"""Classify images of tissue with a trained model.

    python Predict.py tile.png folder/                    # with the committed runs/best
    python Predict.py folder/ --run runs/NAME --explain   # with another run, and Grad-CAM pictures

Any images that Pillow reads are converted to RGB and shrunk to the model's size as PathMNIST was
made. Writes predictions.csv; probabilities are means over the eight flips and quarter turns.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import csv
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import Figures
from Common import (
    CLASS_NAMES,
    SHORT_NAMES,
    Parser,
    UserError,
    as_path,
    run_script,
    write_atomically,
)
from Evaluation import grad_cam
from Runs import load_model, read_run, seed_dirs
from Training import choose_device, eval_batch, predict, prepare_processor

BEST = Path(__file__).resolve().parent / "runs" / "best"


def find_tiles(paths: Sequence[Path], out: Path) -> list[Path]:
    """Return the files among `paths` and, sorted, those in the folders. Links to folders are
    followed. Hidden files are left out, and so is `out`, the results' folder."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; ask for access, or leave it out")

    files: list[Path] = []
    seen = {os.path.realpath(out)}
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        if os.path.samefile(path, out):
            raise UserError(f"--out {out}: the folder of the tiles; choose another")
        for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
            new = os.path.realpath(folder) not in seen
            seen.add(os.path.realpath(folder))
            folders[:] = sorted(name for name in folders if new and name[0] != ".")
            files += [Path(folder, name) for name in sorted(names) if new and name[0] != "."]
    if not files:
        raise UserError(f"{paths[0]}: no files in that folder; check the path")
    return files


def read_tile(path: Path, size: int) -> np.ndarray:
    """Read any image as PathMNIST was made: RGB, bilinear to size x size; uint8 (S, S, 3).
    Transparent pixels become white, as an empty slide is. Raises an exception, mostly Pillow's,
    when the file is no image, is too large, or has pixels of more than 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if path.exists() and not path.is_file():  # opening a pipe would wait forever
            raise ValueError("not a regular file")
        with Image.open(path) as image:
            if (pages := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"{pages} pages or frames; cut it into tiles, a file for each")
            if image.mode.startswith(("I", "F")):
                raise ValueError("pixels of more than 8 bits; convert them")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def read_tiles(files: Sequence[Path], size: int) -> tuple[list[Path], np.ndarray]:
    """Return the readable files and their tiles, uint8 (N, S, S, 3); name the others on stderr."""
    good, tiles = [], []
    for path in tqdm(files, desc="read", unit="tile", disable=None):
        try:
            tiles.append(read_tile(path, size))
            good.append(path)
        except Exception as error:  # whatever a decoder raises, the other files go on
            reason = " ".join(str(error).split())[:100]
            print(f"skipped {path}: {type(error).__name__}: {reason}", file=sys.stderr)
    if not good:
        raise UserError(f"{files[0]}: not a readable image, nor is any other; check the paths")
    return good, np.stack(tiles)


def write_predictions(rows: Sequence[tuple[Path, np.ndarray]], path: Path) -> None:
    """Write every tile's class and probabilities as CSV; print the first fifty."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["file", "class", *SHORT_NAMES])
    table.writerows([name, SHORT_NAMES[p.argmax()], *p.tolist()] for name, p in rows)
    write_atomically(path, buffer.getvalue().encode(errors="backslashreplace"))
    print(f"{'file':40}  {'class':36}  prob.  second")
    for name, p in rows[:50]:
        second, first = np.argsort(p)[-2:]
        print(
            f"{name.name[-40:]:40}  {CLASS_NAMES[first]:36}  {p[first]:.3f}  "
            f"{SHORT_NAMES[second]} {p[second]:.3f}"
        )
    if len(rows) > 50:
        print(f"... and {len(rows) - 50} more")
    print(f"All nine probabilities of {len(rows)} tiles: {path}")


def save_pictures(
    tiles: np.ndarray, probs: np.ndarray, heatmaps: np.ndarray | None, paths: list[Path], note: str
) -> None:
    """Draw the least certain tiles in `paths[0]`; with heatmaps, each tile also in one of the
    others."""
    Figures.save(Figures.predictions_figure(tiles, probs, heatmaps, note), paths[0])
    print(f"The least certain tiles: {paths[0]}")
    if heatmaps is not None:
        for index, path in enumerate(tqdm(paths[1:], desc="explain", unit="tile", disable=None)):
            tile, heatmap, p = (array[index : index + 1] for array in (tiles, heatmaps, probs))
            Figures.save(Figures.gradcam_figure(tile, heatmap, [None], p, note), path)
        print(f"Each tile beside its Grad-CAM: {paths[1]} and so on")


def build_parser() -> Parser:
    """Return the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("paths", type=as_path, nargs="+", metavar="PATH", help="image, or folder of images")
    run = "a run's folder (default: runs/best); of a run of several seeds, their ensemble"
    add("--run", type=as_path, default=BEST, metavar="RUN", help=run)
    out = "folder for the results (default: predictions)"
    add("--out", type=as_path, default="predictions", metavar="DIR", help=out)
    add("--explain", action="store_true", help="save each tile beside its Grad-CAM")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Classify images, and name those that cannot be read."""
    args = build_parser().parse_args(argv)
    prepare_processor()
    device = choose_device(args.device)
    folders = [args.run]
    if not (args.run / "best.pt").exists() and (args.run / "config.json").exists():
        folders = seed_dirs(args.run, read_run(args.run)[0]["seeds"], finished=True)
        print(f"{args.run}: an ensemble of {len(folders)} models")
    models, checkpoints = zip(*(load_model(folder, device) for folder in folders), strict=True)
    identity = checkpoints[0]["identity"]
    if identity.get("kind") == "synthetic":
        what = "This model was trained on SYNTHETIC data: its answers mean nothing."
        print(what, file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # can it be written to? Before all is computed
    files = find_tiles(args.paths, args.out)
    names, tiles = read_tiles(files, identity["size"])
    if (args.out / "predictions.csv").exists():  # pictures of an earlier run
        for old in args.out.glob("[0-9][0-9][0-9][0-9]*-*.png"):
            old.unlink()
    parts = torch.from_numpy(tiles).split(eval_batch(identity["size"]))
    batches = [(part, torch.zeros(len(part))) for part in parts]
    bar = tqdm(models, desc="classify", unit="model", disable=None)
    probs = np.mean([predict(model, batches, views=8)[0] for model in bar], axis=0)
    write_predictions(list(zip(names, probs, strict=True)), args.out / "predictions.csv")
    heatmaps = None
    if args.explain:  # where the first model looks
        batches = np.split(np.arange(len(tiles)), range(100, len(tiles), 100))
        heatmaps = [grad_cam(models[0], tiles[rows], probs[rows].argmax(1)) for rows in batches]
        heatmaps = np.concatenate(heatmaps)
    pictures = [f"{index:04d}-{name.stem[:50]}.png" for index, name in enumerate(names)]
    paths = [args.out / name for name in ("predictions.png", *pictures)]
    save_pictures(tiles, probs, heatmaps, paths, Figures.data_note(identity.get("kind", "")))
    if len(names) < len(files):
        what = f"{len(files) - len(names)} of {len(files)} files are not readable images"
        raise UserError(f"{what}, named above; convert or remove them")


if __name__ == "__main__":
    sys.exit(run_script(main))
