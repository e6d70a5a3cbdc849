"""Classify images of tissue with a trained model.

    python Predict.py tile.png folder/                  # with runs/best
    python Predict.py folder/ --run runs/NAME --explain # with Grad-CAM
    python Predict.py slide.png --map --mpp 8           # a tissue map

Any image that Pillow can read is converted to RGB and resized to the
model's input size in the same way as PathMNIST's tiles were. Writes
predictions.csv and predictions.png. The probabilities are averaged over the
eight flips and quarter turns of a tile.

With --map, a whole slide is cut into windows of a tile's size; writes
NAME-map.png, NAME-map.csv (areas) and NAME-map.npz (probabilities).
"""

import os
import signal

if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it, until `run_script`
    os.environ.pop("MPLBACKEND", None)  # a notebook's backend may be missing here

import sys
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

import Figures
import Processor
import Runs
import Slide
import Training
from Common import (
    CLASS_NAMES,
    SHORT_NAMES,
    SYNTHETIC,
    UserError,
    make_folder,
    plain_table,
    refuse_foreign,
    write_csv,
)
from Evaluation import grad_cam
from Images import open_image, to_rgb
from MyModels import TissueModel
from Script import Parser, as_path, run_script

BEST = Path(__file__).resolve().parent / "runs" / "best"
HEADER = ["file", "class", *SHORT_NAMES]  # of predictions.csv


def main(argv: list | None = None) -> None:
    """Classify images, and name those that cannot be read."""
    args = parse_args(argv)
    Processor.prepare()
    device = Processor.choose_device(args.device)
    folders = Runs.finished_dirs(args.run)
    if len(folders) > 1:
        print(f"{args.run}: an ensemble of {len(folders)} models")
    loaded = [Runs.load_model(folder, device) for folder in folders]
    models = [model for model, _ in loaded]
    identity = loaded[0][1]["identity"]
    if identity["kind"] == "synthetic":
        print(f"The model knows only {SYNTHETIC}: its answers mean nothing", file=sys.stderr)
    if args.map:
        make_folder(args.out, "--out")
        Slide.draw_map(args.paths[0], args.mpp, models, identity, args.out)
        return
    files = find_tiles(args.paths, args.out)
    prepare_out(args.out, files)
    good, tiles = read_tiles(files, identity["size"])
    probs = classify(models, tiles)
    write_predictions(good, probs, args.out / "predictions.csv")
    note = Figures.data_note(identity["kind"])
    heatmaps = explain(models[0], tiles, probs) if args.explain else None
    picture = args.out / "predictions.png"
    names = [path.stem for path in good]
    Figures.save(Figures.predictions_figure(tiles, names, probs, heatmaps, note), picture)
    print(f"The least certain tiles: {picture}")
    if heatmaps is not None:
        save_heatmaps(good, tiles, heatmaps, probs, note, args.out / "gradcam")
    if len(good) < len(files):
        what = f"{len(files) - len(good)} of {len(files)} files could not be read as images"
        raise UserError(f"{what}, named above; convert or remove them")


def find_tiles(paths: list, out: Path) -> list:
    """Return the files among `paths`, and the files inside the folders among them. Hidden files and
    the output folder `out` are left out. UserError if a path does not exist or is `out`."""
    files = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; check the path")
        if path.resolve() == out.resolve():
            raise UserError(f"--out {out}: the images lie there; choose another folder")
        if path.is_dir():
            files += files_in(path, out)
        else:
            files.append(path)
    if not files:
        raise UserError(f"{paths[0]}: no files in that folder; check the path")
    return files


def files_in(top: Path, out: Path) -> list:
    """Return the files in a folder and, sorted by name, in its subfolders. Links to folders are
    followed, each folder once. UserError if a folder cannot be read."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; ask for access, or leave it out")

    files = []
    seen = {os.path.realpath(out)}
    for folder, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()  # os.walk then goes no deeper
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return files


def prepare_out(out: Path, files: list) -> None:
    """Make the results' folder before anything is computed. UserError if it cannot be written to,
    if it holds one of the images, or if its predictions.csv is not one that this program wrote."""
    if any(file.parent.resolve() == out.resolve() for file in files):
        raise UserError(f"--out {out}: one of the images lies there; choose another folder")
    make_folder(out, "--out")
    refuse_foreign(out / "predictions.csv", HEADER, [out / "predictions.png"])


def read_tiles(files: list, size: int) -> tuple[list, ndarray]:
    """Return the readable files and their tiles, uint8 (N, S, S, 3); name the others on stderr."""
    good, tiles, slides = [], [], []
    for path in tqdm(files, desc="read", unit="tile", disable=None):
        try:
            with open_image(path) as image:
                tiles.append(to_tile(image, size))
                if looks_like_slide(image):
                    slides.append(path)
            good.append(path)
        except Exception as error:  # whatever a decoder raises, go on with the other files
            reason = " ".join(str(error).split())[:100]
            tqdm.write(f"skipped {path}: {type(error).__name__}: {reason}", file=sys.stderr)
    if not good:
        what = f"{files[0]}: not a readable image, and neither is any other file"
        raise UserError(f"{what}; check the paths")
    if slides:
        what = f"{slides[0]}: looks like a slide, not a tile"
        more = f" (and {len(slides) - 1} more)" if len(slides) > 1 else ""
        print(f"{what}{more}; --map --mpp N draws a tissue map of it", file=sys.stderr)
    return good, np.stack(tiles)


def to_tile(image: Image.Image, size: int) -> ndarray:
    """Return an image as uint8 (S, S, 3), resized bilinearly, as PathMNIST's tiles were."""
    return np.asarray(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR))


def looks_like_slide(image: Image.Image) -> bool:
    """Return whether an image is too large or too long for a tile."""
    short, long = sorted(image.size)
    return long > 1024 or long > 1.5 * short


def classify(models: list, tiles: ndarray) -> ndarray:
    """Return the mean of the models' probabilities (N, 9) for tiles, uint8 (N, S, S, 3)."""
    parts = torch.from_numpy(tiles).split(Training.eval_batch(tiles.shape[1]))
    batches = [(part, torch.zeros(len(part))) for part in parts]
    probs = []
    for model in tqdm(models, desc="classify", unit="model", disable=None):
        probs.append(Training.predict(model, batches, eight_views=True)[0])
    return np.mean(probs, axis=0)


def write_predictions(files: list, probs: ndarray, path: Path) -> None:
    """Write every tile's class and probabilities as CSV; print the first fifty."""
    table: list = [HEADER]
    rows = [["file", "class", "prob.", "second"]]
    for file, p in zip(files, probs, strict=True):
        second, first = np.argsort(p)[-2:]
        table.append([file, SHORT_NAMES[first], *p.tolist()])
        runner_up = f"{SHORT_NAMES[second]} {p[second]:.2f}"
        rows.append([file.name[-24:], CLASS_NAMES[first], f"{p[first]:.3f}", runner_up])
    if path.exists():
        print(f"{path.parent}: the results of an earlier run are replaced")
    write_csv(table, path)
    print(plain_table(rows[:51]))
    if len(files) > 50:
        print(f"... and {len(files) - 50} more")
    print(f"All nine probabilities of {len(files)} tiles: {path}")


def explain(model: TissueModel, tiles: ndarray, probs: ndarray) -> ndarray:
    """Return the Grad-CAM heatmaps (N, S, S) of the predicted classes, computed in batches."""
    batch = Training.eval_batch(tiles.shape[1])
    heatmaps = []
    for start in tqdm(range(0, len(tiles), batch), desc="explain", unit="batch", disable=None):
        rows = slice(start, start + batch)
        heatmaps.append(grad_cam(model, tiles[rows], probs[rows].argmax(axis=1)))
    return np.concatenate(heatmaps)


def save_heatmaps(
    files: list, tiles: ndarray, heatmaps: ndarray, probs: ndarray, note: str, out: Path
) -> None:
    """Draw each tile beside its heatmap, one file per tile, in the folder `out`."""
    out.mkdir(exist_ok=True)
    for index, file in enumerate(tqdm(files, desc="draw", unit="tile", disable=None)):
        tile, heatmap, p = (array[index : index + 1] for array in (tiles, heatmaps, probs))
        figure = Figures.gradcam_figure(
            tile, heatmap, [None], p, f"{Figures.plain_name(file.name)} {note}"
        )
        Figures.save(figure, out / f"{index:04d}-{file.stem[:50]}.png")
    print(f"Each tile beside its Grad-CAM: {out}")


def parse_args(argv: list | None):
    """Read the command line."""
    parser = Parser(__doc__, usage="%(prog)s PATH... [options]")
    add = parser.add_argument
    add("paths", type=as_path, nargs="+", metavar="PATH", help="image, or folder of images")
    run = "a run's folder (default: runs/best); a run of several seeds is used as an ensemble"
    add("--run", type=as_path, default=BEST, metavar="RUN", help=run)
    out = "folder for the results (default: predictions)"
    add("--out", type=as_path, default="predictions", metavar="DIR", help=out)
    grad_cam_help = "save each tile beside its Grad-CAM (for an ensemble: of its first model)"
    add("--explain", action="store_true", help=grad_cam_help)
    add("--map", action="store_true", help="PATH is one slide: draw a tissue map of it")
    mpp = "with --map: the slide's micrometres per pixel (default: what the file says)"
    add("--mpp", type=float, metavar="N", help=mpp)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    args = parser.parse_args(argv)
    if args.map and len(args.paths) > 1:
        parser.error("--map: needs one slide; give the path of one image")
    if args.map and args.explain:
        parser.error("--explain: not with --map")
    if args.mpp is not None and not args.map:
        parser.error("--mpp: only with --map")
    if args.mpp is not None and not 0.01 <= args.mpp <= 1000:
        parser.error(f"--mpp: {args.mpp:g} is not between 0.01 and 1000")
    return args


if __name__ == "__main__":
    sys.exit(run_script(main))
