"""A tissue map: which class the network sees in every part of a slide.

    python Predict.py slide.png --map --mpp 8

A tile of PathMNIST shows 112 x 112 micrometres. The slide is resampled to the pixels of such tiles
and cut into windows of a tile's size, each half a tile from the next. Every window is classified
from one view: each point of the tissue is seen by four windows.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import Figures
import Training
from Common import (
    CLASS_NAMES,
    SHORT_NAMES,
    UserError,
    plain_table,
    refuse_foreign,
    write_atomically,
    write_csv,
)
from Images import open_image, to_rgb

TILE = 112.0  # micrometres a side: 224 pixels of 0.5 in NCT-CRC-HE
STEP = TILE / 2000  # millimetres from one window to the next
MAX_PIXELS = 400_000_000  # of a slide; each takes 4 bytes of memory
LONGEST = 150  # millimetres; a usual slide has 76
BACKGROUND = SHORT_NAMES.index("BACK")
EMPTY = 200  # a window whose pixels are all brighter is glass without tissue
HEADER = ["class", "area in mm2", "share of tissue"]  # of the CSV file


def draw_map(path: Path, mpp: float | None, models: list, identity: dict, out: Path) -> None:
    """Classify every window of the slide in `path`. Write NAME-map.png, NAME-map.csv (area of each
    class) and NAME-map.npz (probabilities) to the folder `out`. `mpp` is the slide's micrometres
    per pixel, or None if the file says it. `identity` is that of the data that the models were
    trained on. UserError if the slide cannot be read or is too small."""
    picture, table, arrays = (out / f"{path.stem[:80]}-map.{end}" for end in ("png", "csv", "npz"))
    refuse_foreign(table, HEADER, [picture, arrays])
    Figures.check_replaceable(picture)
    if table.exists():
        print(f"{table}: an earlier map of this name is replaced")
    image = open_slide(path)
    mpp = mpp or mpp_of(image, path)
    probs = classify_windows(image, mpp, models, identity["size"])
    rows = class_areas(probs)
    write_csv([HEADER, *rows], table)
    write_probabilities(probs, arrays)
    legend = [f"{name}  {float(share):.1%}" if share else name for name, _, share in rows]
    longest = max(image.size)
    size = [max(1, side * 1600 // longest) for side in image.size]
    small = np.asarray(to_rgb(image.resize(size, Image.Resampling.BOX)))
    width = image.width * mpp / 1000
    del image  # a large slide takes a gigabyte, which drawing needs for itself
    note = Figures.data_note(identity["kind"])
    Figures.save(Figures.map_figure(small, width, probs, STEP, legend, note), picture)
    print(plain_table([HEADER, *rows]))
    print(f"Map, areas and probabilities: {picture}, {table.name}, {arrays.name}")


def open_slide(path: Path) -> Image.Image:
    """Open and decode a slide. UserError if it cannot be read or has more than MAX_PIXELS."""
    try:
        image = open_image(path, MAX_PIXELS)
        image.load()
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except Exception as error:  # whatever a decoder raises
        reason = " ".join(str(error).split())[:150]
        what = f"{path}: cannot be read as a slide ({reason})"
        remedy = f"export it as PNG, JPEG or TIFF of at most {MAX_PIXELS:,} pixels"
        raise UserError(f"{what}; {remedy}") from error
    return image


def mpp_of(image: Image.Image, path: Path) -> float:
    """Return the micrometres per pixel that the file states. UserError if it states none, or one
    that no microscope has: from 16 on it is the resolution of a screen or a printer."""
    across, down = map(float, image.info.get("dpi", (0, 0)))  # pixels per inch
    mpp = 25_400 / across if across > 0 else 0.0
    if not 0.05 < mpp < 16 or abs(down / across - 1) > 0.01:
        what = f"{path}: does not say how many micrometres a pixel is"
        raise UserError(f"{what}; give it with --mpp")
    print(f"{path}: {mpp:.3g} micrometres per pixel, as the file says")
    return mpp


def classify_windows(image: Image.Image, mpp: float, models: list, size: int) -> ndarray:
    """Return the probabilities of the windows, float32 (rows, columns, 9): the mean of the models.
    `size` is the models' number of pixels for a tile. Only one row of windows is in memory at a
    time. UserError if the slide is smaller than one window."""
    scale = TILE / size / mpp  # pixels of the slide for each pixel of a tile
    width, height = int(image.width / scale), int(image.height / scale)
    shown = f"{image.width * mpp / 1000:.4g} x {image.height * mpp / 1000:.4g} mm"
    if min(width, height) < size:
        what = f"{mpp:g} micrometres per pixel: the slide shows only {shown}"
        raise UserError(f"{what}, less than a tile of {TILE / 1000}; check --mpp")
    if max(image.size) * mpp / 1000 > LONGEST:
        what = f"{mpp:g} micrometres per pixel: the slide would be {shown}"
        raise UserError(f"{what}, longer than any glass; check --mpp")
    rows = []
    tops = range(0, height - size + 1, size // 2)
    for top in tqdm(tops, desc="map", unit="row of windows", disable=None):
        band = torch.from_numpy(read_band(image, top, size, width, scale))
        windows = band.unfold(1, size, size // 2).permute(1, 0, 3, 2).contiguous()
        rows.append(classify_row(models, windows))
    return np.stack(rows)


def read_band(image: Image.Image, top: int, size: int, width: int, scale: float) -> ndarray:
    """Return `size` rows of the resampled slide from row `top` on, uint8 (size, width, 3). They are
    resized as PathMNIST's tiles were, with nothing from above or below them."""
    start, end = top * scale, min((top + size) * scale, image.height)
    first = int(start)
    part = to_rgb(image.crop((0, first, image.width, math.ceil(end))))
    box = (0, start - first, min(width * scale, image.width), end - first)
    return np.array(part.resize((width, size), Image.Resampling.BILINEAR, box=box))


def classify_row(models: list, windows: Tensor) -> ndarray:
    """Return the probabilities (n, 9) of a row of windows, uint8 (n, S, S, 3). Bright windows
    without tissue are background, and are not computed."""
    probs = np.zeros((len(windows), len(SHORT_NAMES)), dtype=np.float32)
    probs[:, BACKGROUND] = 1
    is_tissue = windows.amin((1, 2, 3)) <= EMPTY
    if is_tissue.any():
        parts = windows[is_tissue].split(Training.eval_batch(windows.shape[1]))
        batches = [(part, torch.zeros(len(part))) for part in parts]
        found = [Training.predict(model, batches)[0] for model in models]
        probs[is_tissue.numpy()] = np.mean(found, axis=0)
    return probs


def class_areas(probs: ndarray) -> list:
    """Return for each class its name, its area in square millimetres and its share of the tissue,
    as texts. Every window stands for the square of STEP in its middle. Areas of tissue come out a
    little large, because a window that touches its border is seldom called background."""
    counts = np.bincount(probs.argmax(2).ravel(), minlength=len(CLASS_NAMES))
    tissue = counts.sum() - counts[BACKGROUND]
    rows = []
    for label, name in enumerate(CLASS_NAMES):
        share = "" if label == BACKGROUND else f"{counts[label] / max(tissue, 1):.4f}"
        rows.append([name, f"{counts[label] * STEP**2:.4f}", share])
    return rows


def write_probabilities(probs: ndarray, path: Path) -> None:
    """Write the probabilities (rows, columns, 9) as npz, with the positions of the windows' centres
    in millimetres from the upper left corner."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        probabilities=probs,
        classes=np.array(SHORT_NAMES),
        x_mm=STEP * np.arange(1, probs.shape[1] + 1),
        y_mm=STEP * np.arange(1, probs.shape[0] + 1),
    )
    write_atomically(path, buffer.getvalue())
