"""Find, check and describe the PathMNIST data: tables on the terminal, two figures as PNG.

    python analyze_data.py                           # finds the file, downloads it if need be
    python analyze_data.py --data pathmnist.npz      # a file, or a folder holding pathmnist.npz
    python analyze_data.py --data ~/data --out figures

The other scripts use `find_data` and `load_data`. No torch is imported here, so this starts fast.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hashlib
import os
import sys
import textwrap
import time
import warnings
import zipfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from Common import CLASS_NAMES, SHORT_NAMES, Parser, UserError, as_path, run_script
from Figures import BLUE, GREEN, ORANGE, house_style, save

if TYPE_CHECKING:  # matplotlib is imported where figures are made: `--help` need not wait for it
    from matplotlib.figure import Figure

SPLITS = ("train", "val", "test")
SIZES = (28, 64, 128, 224)

FILE_NAME = "pathmnist.npz"
ROOT = Path(__file__).resolve().parent
DATA_DIR = ROOT / "data"
COURSE_FILE = Path("/home/osz09/DATA_SharedClasses/SharedDatasets/MedMNIST") / FILE_NAME
PAUSES = (1, 3)  # seconds before the second and the third try of a download
URL = "https://zenodo.org/records/10519652/files/pathmnist.npz"
AGENT = {"User-Agent": "PathMNIST-CNN/1.0 (a student's training scripts)"}
MD5 = "a8b06965200029087d5bd730944a56c1"
OFFICIAL_MD5 = {  # pixels a side -> md5, from medmnist/info.py
    28: MD5,
    64: "55aa9c1e0525abe5a6b9d8343a507616",
    128: "ac42d08fb904d92c244187169d1fd1d9",
    224: "2c51a510bcdc9cf8ddb2af93af1eadec",
}

SPLIT_COLOURS = (BLUE, ORANGE, GREEN)


@dataclass(frozen=True)
class PathData:
    """A checked PathMNIST file: for each split, images uint8 (N, S, S, 3) and labels int64 (N,).
    `kind` is "official" (the md5 is MedMNIST's), "synthetic" (drawn, not tissue) or "subset"."""

    path: Path
    kind: str
    md5: str
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images["train"].shape[1]

    @property
    def counts(self) -> dict[str, int]:
        """Images per split."""
        return {split: len(labels) for split, labels in self.labels.items()}

    @property
    def card(self) -> dict:
        """What results say about the data they come from."""
        path = self.path.resolve()  # from ROOT, so that a run can be resumed from elsewhere
        path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        parts = {"path": str(path), "kind": self.kind, "md5": self.md5}
        return {**parts, "size": self.size, "counts": self.counts}


def find_data(data: str | None) -> Path:
    """Return the npz file that `--data` names, itself or by its folder; UserError if there is none.
    With None, the first of: `data/pathmnist.npz`, `~/.medmnist/pathmnist.npz`, the course server's
    file, a download, the synthetic sample (said on stderr)."""
    if data is not None:
        path = as_path(data)
        if os.path.isdir(path):
            path = path / FILE_NAME
            if not os.path.exists(path):
                raise UserError(f"--data {data}: the folder holds no {FILE_NAME}; name the file")
        if not os.path.exists(path):
            raise UserError(f"--data {data}: no such file, or no access; check the path")
        return path
    for path in (DATA_DIR / FILE_NAME, as_path("~/.medmnist") / FILE_NAME, COURSE_FILE):
        if os.path.isfile(path):
            return path
    try:
        can_write = os.access(DATA_DIR if DATA_DIR.exists() else ROOT, os.W_OK)
        return download(DATA_DIR if can_write else as_path("~/.medmnist"))
    except UserError as error:
        reason = str(error)
    for path in DATA_DIR.glob("pathmnist*npz*"):  # what wget and browsers leave
        reason += f". {path} is there: is that it? Then rename it to {FILE_NAME}"
    fallback = DATA_DIR / "synthetic.npz"
    if not os.path.isfile(fallback):
        raise UserError(f"{fallback}: not there; run data/make_synthetic.py. Also: {reason}")
    print(synthetic_banner(reason), file=sys.stderr)
    return fallback


def synthetic_banner(reason: str) -> str:
    """Return a banner that says, impossible to miss, that the data is not real, and why."""
    whole = {"break_on_hyphens": False, "break_long_words": False}
    lines = [
        "SYNTHETIC DATA: no PathMNIST file was found, so this run uses drawn images.",
        "They are for trying the program. The results say nothing about tissue.",
        *textwrap.wrap(f"Why: {reason}", 96, **whole),
    ]
    return "\n".join(["!" * 100, *(f"!! {line}" for line in lines), "!" * 100])


def download(folder: Path, url: str = URL, md5: str = MD5) -> Path:
    """Download the npz file into a folder; it gets its name once its md5 is right. UserError if it
    fails; the message says what to do by hand."""
    import pooch  # here, for it takes as long as numpy to import

    pooch.get_logger().setLevel("WARNING")
    fetch = pooch.HTTPDownloader(progressbar=True, timeout=30, headers=AGENT)
    for pause in (*PAUSES, None):
        try:
            path = pooch.retrieve(url, f"md5:{md5}", FILE_NAME, folder, downloader=fetch)
            os.chmod(path, 0o644)  # for all who share the folder
            return Path(path)
        except (OSError, ValueError) as error:
            answer = getattr(error, "response", None)
            refused = answer is not None and answer.status_code in (401, 403, 404, 410)
            gone = "Max retries exceeded" in str(error)  # nobody is there; not so after a reset
            if pause is None or refused or gone or isinstance(error, PermissionError):
                raise UserError(
                    f"{folder / FILE_NAME}: download failed ({error}); get it by hand: {url} "
                    f"(md5 {md5}), and put it into {folder}"
                ) from error
            wait = answer.headers.get("Retry-After", "") if answer is not None else ""
        time.sleep(min(60, int(wait)) if wait.isdigit() else pause)


def load_data(path: str | Path) -> PathData:
    """Read a PathMNIST npz file and check everything about it. UserError, in one line with file,
    fault and remedy, if it cannot be read or is not PathMNIST. A class that is absent from train is
    accepted, with a warning on stderr."""
    path = Path(path)
    try:
        if not path.is_file() and path.exists():  # opening a pipe would wait forever
            raise UserError("not a regular file; give the npz file itself")
        data = read_npz(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it; change its mode") from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory; use the 28 px file") from error
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types on damaged bytes
        detail = (str(error) or type(error).__name__).splitlines()[0][:120]
        what = f"{path}: cannot be read as npz ({detail})"
        raise UserError(f"{what}; it is damaged or no npz file, download it again") from error
    counts = np.bincount(data.labels["train"], minlength=9)
    for name, count in zip(CLASS_NAMES, counts, strict=True):
        if count == 0:
            print(f"warning: {path}: no train image of class {name}", file=sys.stderr)
    return data


def read_npz(path: Path) -> PathData:
    """Do the work of load_data; many types of error leave it."""
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's remarks on headers that Python 2 wrote
            if not zipfile.is_zipfile(file):  # numpy would advise to load it unsafely
                raise UserError("no npz file, or a damaged one; download it again")
            file.seek(0)
            npz = np.load(file, allow_pickle=False)
            images, labels = {}, {}
            for split in SPLITS:
                keys = f"{split}_images", f"{split}_labels"
                for key in keys:
                    if key not in npz:
                        raise UserError(f"holds no array {key}; give a PathMNIST npz file")
                images[split], labels[split] = (npz[key] for key in keys)
                if wrong := what_is_wrong(split, images[split], labels[split]):
                    raise UserError(wrong)
                images[split] = np.ascontiguousarray(images[split])
                labels[split] = labels[split].reshape(-1).astype(np.int64)
            synthetic = "synthetic" in npz
    for label, name in enumerate(CLASS_NAMES):
        if not any(label in array for array in labels.values()):
            raise UserError(f"has no image of class {name}: not PathMNIST; give pathmnist.npz")
    sizes = sorted({array.shape[1] for array in images.values()})
    if len(sizes) > 1:
        raise UserError(f"its splits have different sizes {sizes}; use one size")
    kind = "official" if md5 in OFFICIAL_MD5.values() else "synthetic" if synthetic else "subset"
    return PathData(path, kind, md5, images, labels)


def what_is_wrong(split: str, images: np.ndarray, labels: np.ndarray) -> str:
    """Return how a split's arrays differ from PathMNIST's, and the remedy; "" if they do not."""
    if not (isinstance(images, np.ndarray) and isinstance(labels, np.ndarray)):
        return f"{split} holds something else than arrays; download it again"
    shape = images.shape
    if images.dtype != np.uint8:
        return f"{split}_images is {images.dtype!s:.60}, not uint8; save the pixels as 0..255"
    if len(shape) != 4 or shape[1:] not in {(size, size, 3) for size in SIZES}:
        what = f"{split}_images has shape {shape!s:.60}, not (N, S, S, 3) with S one of {SIZES}"
        return f"{what}: not PathMNIST; give pathmnist.npz or one of its sizes"
    if labels.dtype.kind not in "iu":
        return f"{split}_labels is {labels.dtype!s:.60}, not integer; save class numbers 0..8"
    if labels.shape not in ((shape[0],), (shape[0], 1)):
        what = f"{split} has images {shape} but labels {labels.shape!s:.60}"
        return f"{what}; save one class number an image, as (N,) or (N, 1)"
    if shape[0] < 1:
        return f"{split} is empty; put at least one image into every split"
    if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
        what = f"{split}_labels run from {labels.min()} to {labels.max()}, not within 0..8"
        return f"{what}; number the nine classes as MedMNIST does"
    return ""


def channel_stats(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each colour channel, exact, without a float copy.
    Images are uint8 (N, S, S, 3); both results are float64 (3,), in units of full scale (0 to 1).
    """
    histogram = np.zeros((3, 256), dtype=np.int64)
    step = max(1, 2**20 // images[0, ..., 0].size)
    for start in range(0, len(images), step):
        chunk = images[start : start + step]
        for channel in range(3):
            histogram[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ values
    return mean, np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))


def count_duplicates(images: dict[str, np.ndarray]) -> dict[str, int]:
    """Count images with identical pixels; `images` are contiguous arrays by split. "train": images
    of train that repeat an earlier one of train. "train-val": distinct images that are in both
    splits. So for every split and every pair."""
    hashes = {
        split: {hashlib.blake2b(image, digest_size=16).digest() for image in array}
        for split, array in images.items()
    }
    result = {split: len(array) - len(hashes[split]) for split, array in images.items()}
    for a, b in combinations(images, 2):
        result[f"{a}-{b}"] = len(hashes[a] & hashes[b])
    return result


def report(data: PathData) -> str:
    """Describe the data as plain text tables, at most 100 characters wide, a long path apart."""
    official = data.kind == "official"
    lines = [
        f"file           {data.path}",
        f"md5            {data.md5}",
        f"official file  {'yes' if official else 'no (' + data.kind + ')'}",
        f"images         {data.size} x {data.size} x 3, {data.images['train'].dtype}, 0 to 255",
        "",
        f"{'class':<42}" + "".join(f"{split:>19}" for split in SPLITS),
    ]
    if data.kind == "synthetic":
        lines.insert(0, "SYNTHETIC DATA: drawn images, not tissue; for trying the program only")
    counts = {split: np.bincount(data.labels[split], minlength=9) for split in SPLITS}
    for k, (name, code) in enumerate(zip(CLASS_NAMES, SHORT_NAMES, strict=True)):
        cells = [f"{n[k]:>10,}{100 * n[k] / n.sum():>7.1f} %" for n in counts.values()]
        lines.append(f"{code:<5}{name:<37}" + "".join(cells))
    lines.append(
        f"{'total':<42}" + "".join(f"{n.sum():>10,}{100:>7.1f} %" for n in counts.values())
    )
    mean, std = channel_stats(data.images["train"])
    lines += ["", f"{'train pixels, scale 0 to 1':<42}" + f"{'red':>10}{'green':>10}{'blue':>10}"]
    lines += [f"{'mean':<42}" + "".join(f"{x:>10.4f}" for x in mean)]
    lines += [f"{'standard deviation':<42}" + "".join(f"{x:>10.4f}" for x in std)]
    duplicates = count_duplicates(data.images)
    lines += ["", f"{'duplicates (identical pixels)':<42}" + f"{'images':>10}"]
    for where, n in duplicates.items():
        text = f"within {where}" if where in SPLITS else f"in both {where.replace('-', ' and ')}"
        lines.append(f"{text:<42}{n:>10,}")
    return "\n".join(lines)


@house_style
def sample_grid(data: PathData, columns: int = 6, seed: int = 0) -> "Figure":
    """Show random train images of every class, drawn with `seed`, one row a class. `columns` is the
    number of images per class; fewer where the class has fewer."""
    from matplotlib.figure import Figure

    rng = np.random.default_rng(seed)
    gap = max(1, data.size // 14)
    pitch = data.size + gap
    canvas = np.full((9 * pitch - gap, columns * pitch - gap, 3), 255, dtype=np.uint8)
    for row in range(9):
        of_class = np.flatnonzero(data.labels["train"] == row)
        chosen = rng.choice(of_class, min(columns, len(of_class)), replace=False)
        for column, index in enumerate(chosen):
            top, left = row * pitch, column * pitch
            tile = data.images["train"][index]
            canvas[top : top + data.size, left : left + data.size] = tile
    # In pixels at 100 dpi: 28 px tiles are enlarged exactly 3 times, their names take 290.
    width = 3 * 30 * columns - 6
    figure = Figure(figsize=(width / 100 + 3.1, 8.7))
    axes = figure.add_axes((290 / (width + 310), 12 / 870, width / (width + 310), 804 / 870))
    axes.grid(False)
    axes.imshow(canvas, interpolation="nearest" if data.size == 28 else None)
    axes.set_yticks(np.arange(9) * pitch + data.size / 2, _class_labels(), fontsize=14)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(_title(data, "random train images of each class"), fontsize=16)
    return figure


@house_style
def class_distribution(data: PathData) -> "Figure":
    """Show each class's share of the three splits, with the counts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.add_subplot()
    for i, (split, colour) in enumerate(zip(SPLITS, SPLIT_COLOURS, strict=True)):
        counts = np.bincount(data.labels[split], minlength=9)
        percent = 100 * counts / counts.sum()
        label = f"{split} ({counts.sum():,} images)"
        bars = axes.barh(np.arange(9) + (i - 1) * 0.28, percent, 0.27, color=colour, label=label)
        axes.bar_label(bars, [f"{n:,}" for n in counts], padding=3, fontsize=12)
    axes.set_yticks(np.arange(9), _class_labels(), fontsize=14)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1, y=0.02)
    axes.tick_params(axis="x", labelsize=13)
    axes.set_xlabel("share of the split, % (beside the bar: images)", fontsize=14)
    axes.set_title(_title(data, "class distribution"), fontsize=16)
    figure.legend(loc="outside lower center", ncols=3, fontsize=14)
    return figure


def _title(data: PathData, text: str) -> str:
    """Return a figure's title, which says so where the data is not real, or not all of it."""
    names = {"official": "PathMNIST", "synthetic": "SYNTHETIC data, not tissue"}
    return f"{names.get(data.kind, 'PathMNIST, a subset')}: {text}"


def _class_labels() -> list[str]:
    """Return "name (CODE)" of each class, wrapped to fit beside an axis."""
    pairs = zip(CLASS_NAMES, SHORT_NAMES, strict=True)
    return [textwrap.fill(f"{name} ({code})", 24) for name, code in pairs]


def main(argv: list[str] | None = None) -> None:
    """Describe the data on the terminal and in two figures."""
    parser = Parser(__doc__)
    data_help = f"npz file, or folder with {FILE_NAME} (default: found or downloaded)"
    parser.add_argument("--data", metavar="PATH", help=data_help)
    out_help = "folder for the figures (default: figures)"
    parser.add_argument("--out", type=as_path, default="figures", metavar="DIR", help=out_help)
    args = parser.parse_args(argv)
    data = load_data(find_data(args.data))
    print(report(data))
    figures = {"samples": sample_grid(data), "class_distribution": class_distribution(data)}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save(figure, args.out / f"{name}.png", dpi=100)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error}; give a folder that can be written") from error
    print(f"\nfigures        {', '.join(str(args.out / f'{name}.png') for name in figures)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
