"""Find, check and describe the PathMNIST data: tables and two figures.

    python analyze_data.py                        # finds or downloads it
    python analyze_data.py --data pathmnist.npz   # a file, or its folder
    python analyze_data.py --data ~/data --out figures

The other scripts use `find_data` and `load_data`.
"""

import os
import signal

if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it, until `run_script`
    os.environ.pop("MPLBACKEND", None)  # a notebook's backend may be missing here

import contextlib
import hashlib
import sys
import textwrap
import warnings
import zipfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy import ndarray

import Figures
from Common import CLASS_NAMES, CLASSES, SHORT_NAMES, SYNTHETIC, UserError, make_folder
from Script import Parser, as_path, run_script

SPLITS = ("train", "val", "test")
SIZES = (28, 64, 128, 224)

FILE_NAME = "pathmnist.npz"
ROOT = Path(__file__).resolve().parent
DATA_DIR = ROOT / "data"
COURSE_FILE = Path("/home/osz09/DATA_SharedClasses/SharedDatasets/MedMNIST") / FILE_NAME
URL = "https://zenodo.org/records/10519652/files/"
AGENT = {"User-Agent": "PathMNIST-CNN/1.0 (a student's training scripts)"}
OFFICIAL_MD5 = {  # pixels a side -> md5, from medmnist/info.py
    28: "a8b06965200029087d5bd730944a56c1",
    64: "55aa9c1e0525abe5a6b9d8343a507616",
    128: "ac42d08fb904d92c244187169d1fd1d9",
    224: "2c51a510bcdc9cf8ddb2af93af1eadec",
}


def main(argv: list | None = None) -> None:
    """Describe the data on the terminal and in two figures."""
    parser = Parser(__doc__)
    data_help = f"npz file, or folder with {FILE_NAME} (default: found or downloaded)"
    parser.add_argument("--data", metavar="PATH", help=data_help)
    out_help = "folder for the figures (default: figures)"
    parser.add_argument("--out", type=as_path, default="figures", metavar="DIR", help=out_help)
    args = parser.parse_args(argv)
    data = load_data(find_data(args.data))
    print(report(data))
    make_folder(args.out, "--out")
    figures = {
        "samples": Figures.sample_grid(data.images["train"], data.labels["train"], data.kind),
        "class_distribution": Figures.class_distribution(data.labels, data.kind),
    }
    print()
    for name, figure in figures.items():
        path = args.out / f"{name}.png"
        Figures.save(figure, path)
        print(f"figure         {path}")


@dataclass(frozen=True)
class PathData:
    """A checked PathMNIST file: for each split, images uint8 (N, S, S, 3) and labels int64 (N,).
    `kind` is "official" (the md5 is MedMNIST's), "synthetic" (not real tissue) or "subset" (any
    other file)."""

    path: Path
    kind: str
    md5: str
    images: dict
    labels: dict

    @property
    def size(self) -> int:
        """Width and height of the images in pixels."""
        return self.images["train"].shape[1]

    @property
    def counts(self) -> dict[str, int]:
        """Images per split."""
        return {split: len(labels) for split, labels in self.labels.items()}

    @property
    def identity(self) -> dict:
        """What checkpoints store about the training data."""
        return {"kind": self.kind, "md5": self.md5, "size": self.size}

    @property
    def card(self) -> dict:
        """What result files store about the data. If the file is inside this project, the path is
        relative to the project, so that a run still finds it after the project was moved."""
        path = self.path.resolve()
        if path.is_relative_to(ROOT):
            path = path.relative_to(ROOT)
        return {"path": str(path), **self.identity, "counts": self.counts}


def find_data(data: str | None) -> Path:
    """Return the npz file for `--data PATH`, a file or its folder; UserError if there is none. With
    None, return the first that exists of: `data/pathmnist.npz`, `~/.medmnist/pathmnist.npz`, the
    course server's file, a download, the synthetic sample (with a warning on stderr)."""
    if data is not None:
        return named_file(data)
    for path in (DATA_DIR / FILE_NAME, as_path("~/.medmnist") / FILE_NAME, COURSE_FILE):
        if os.path.isfile(path):
            return path
    can_write = os.access(DATA_DIR if DATA_DIR.exists() else ROOT, os.W_OK)
    try:
        return download(DATA_DIR if can_write else as_path("~/.medmnist"))
    except UserError as error:
        reason = str(error)
    for path in DATA_DIR.glob("pathmnist*npz*"):  # names that wget and browsers give it
        reason += f". If {path} is that file, rename it to {FILE_NAME}"
    fallback = DATA_DIR / "synthetic.npz"
    if not os.path.isfile(fallback):
        what = f"no PathMNIST file: {reason}"
        raise UserError(f"{what}. To use synthetic data, run data/make_synthetic.py")
    print(synthetic_banner(reason), file=sys.stderr)
    return fallback


def named_file(data: str) -> Path:
    """Return the file for `--data PATH`, a file or its folder; UserError if there is none."""
    path = as_path(data)
    if os.path.isdir(path):
        path = path / FILE_NAME
        if not os.path.exists(path):
            what = f"--data {data}: there is no {FILE_NAME} in this folder"
            raise UserError(f"{what}; give the path of the file")
    if not os.path.exists(path):
        raise UserError(f"--data {data}: no such file, or no access; check the path")
    return path


def synthetic_banner(reason: str) -> str:
    """Return an eye-catching banner that says that the data is not real, and why."""
    text = (
        "No PathMNIST file was found, so synthetic images are used instead. They are only for "
        f"trying the program; the results say nothing about tissue. Reason: {reason}"
    )
    lines = textwrap.wrap(text, 76, break_on_hyphens=False, break_long_words=False)
    return "\n".join(["!" * 80, *(f"!! {line}" for line in [SYNTHETIC, *lines]), "!" * 80])


def download(folder: Path, url: str = URL, md5: str = OFFICIAL_MD5[28]) -> Path:
    """Download the npz file into a folder, under its final name only if its md5 is correct.
    UserError if three tries fail; the message says why, and how to download it by hand."""
    import pooch  # here, with requests, because only a download needs them
    from requests.exceptions import (
        ChunkedEncodingError,
        ConnectionError,
        RequestException,
        Timeout,
    )

    pooch.get_logger().setLevel("WARNING")
    registry = {FILE_NAME: f"md5:{md5}"}
    server = pooch.create(folder, url, registry=registry, retry_if_failed=2)
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=30, headers=AGENT)
    try:
        path = Path(server.fetch(FILE_NAME, downloader=downloader))
    except (RequestException, ValueError, OSError) as error:
        reason, host = str(error), url.split("/")[2]
        if isinstance(error, (ConnectionError, Timeout)):
            reason = f"{host} cannot be reached"
        elif isinstance(error, ChunkedEncodingError):
            reason = f"the connection to {host} broke off"
        where = f"get {url}{FILE_NAME} by hand (md5 {md5}) and put it into {folder}"
        raise UserError(f"download failed: {reason}; {where}") from error
    with contextlib.suppress(OSError):  # so that others who share the folder can read it
        path.chmod(0o644)
    return path


def load_data(path: str | Path) -> PathData:
    """Read a PathMNIST npz file and check everything about it. UserError, in one line with file,
    fault and remedy, if it cannot be read or is not PathMNIST. A class that is absent from train is
    accepted, with a warning on stderr."""
    path = Path(path)
    if os.path.exists(path) and not path.is_file():  # opening a pipe would wait forever
        raise UserError(f"{path}: not a regular file; give the npz file itself")
    try:
        with open(path, "rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            arrays = read_arrays(file, path)
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it; change its permissions") from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory; use the 28 px file") from error
    images, labels = {}, {}
    for split in SPLITS:
        images[split], labels[split] = check_split(split, arrays, path)
    check_whole(images, labels, path)
    kind = "subset"
    if md5 in OFFICIAL_MD5.values():
        kind = "official"
    elif "synthetic" in arrays:
        kind = "synthetic"
    return PathData(path, kind, md5, images, labels)


def read_arrays(file: BinaryIO, path: Path) -> dict:
    """Return the arrays of an npz file by name; UserError if it is damaged or not an npz file."""
    wanted = [f"{split}_{what}" for split in SPLITS for what in ("images", "labels")]
    arrays = {}
    try:
        file.seek(0)
        with zipfile.ZipFile(file):  # for other files, numpy's error advises unsafe loading
            file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's remarks on headers that Python 2 wrote
            npz = np.load(file, allow_pickle=False)
            for name in npz.files:
                if name in wanted:
                    arrays[name] = npz[name]
                elif name == "synthetic":
                    arrays[name] = np.array(True)
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many types of error on damaged files
        detail = (str(error) or type(error).__name__).splitlines()[0][:120]
        what = f"{path}: cannot be read as npz ({detail})"
        raise UserError(f"{what}; it is damaged or not an npz file; download it again") from error
    return arrays


def check_split(split: str, arrays: dict, path: Path) -> tuple[ndarray, ndarray]:
    """Return a split's images, uint8 (N, S, S, 3), and labels, int64 (N,); UserError if they are
    missing or differ from PathMNIST's format."""

    def require(is_right: bool, problem: str) -> None:
        if not is_right:
            raise UserError(f"{path}: {problem}")

    for name in (f"{split}_images", f"{split}_labels"):
        require(name in arrays, f"holds no array {name}; give a PathMNIST npz file")
        is_array = isinstance(arrays[name], ndarray)
        require(is_array, f"{name} is not an array; download the file again")
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    kind, shape = f"{images.dtype!s:.60}", f"{images.shape!s:.60}"
    require(images.dtype == np.uint8, f"{split}_images is {kind}, not uint8; save pixels as 0..255")
    is_square = images.ndim == 4 and images.shape[1:] in {(size, size, 3) for size in SIZES}
    what = f"{split}_images has shape {shape}, not (N, S, S, 3) with S one of {SIZES}"
    require(is_square, f"{what}: not PathMNIST; give pathmnist.npz or another of these sizes")
    what = f"{split}_labels is {labels.dtype!s:.60}, not integer"
    require(labels.dtype.kind in "iu", f"{what}; save class numbers 0..8")
    count = len(images)
    what = f"{split} has images {shape} but labels {labels.shape!s:.60}"
    fits = labels.shape in ((count,), (count, 1))
    require(fits, f"{what}; save one class number per image, as (N,) or (N, 1)")
    require(count > 0, f"{split} is empty; put at least one image into every split")
    what = f"{split}_labels run from {labels.min()} to {labels.max()}, not within 0..8"
    is_class = labels.min() >= 0 and labels.max() < len(CLASS_NAMES)
    require(is_class, f"{what}; number the nine classes as MedMNIST does")
    return np.ascontiguousarray(images), labels.reshape(-1).astype(np.int64)


def check_whole(images: dict, labels: dict, path: Path) -> None:
    """Check all splits together: every class has images, and all images have one size."""
    for label, name in enumerate(CLASS_NAMES):
        if not any(label in array for array in labels.values()):
            what = f"{path}: has no image of class {name}: not PathMNIST"
            raise UserError(f"{what}; give pathmnist.npz")
        if label not in labels["train"]:
            print(f"warning: {path}: no train image of class {name}", file=sys.stderr)
    sizes = sorted({array.shape[1] for array in images.values()})
    if len(sizes) > 1:
        raise UserError(f"{path}: its splits have different sizes {sizes}; use one size")


def channel_stats(images: ndarray) -> tuple[ndarray, ndarray]:
    """Return the exact mean and standard deviation of each colour channel, without a float copy.
    Images are uint8 (N, S, S, 3); both results are float64 (3,), on the scale 0 to 1."""
    histogram = np.zeros((3, 256), dtype=np.int64)
    for chunk in np.array_split(images, 1 + images.nbytes // 2**22):
        for channel in range(3):
            histogram[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    values = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ values
    return mean, np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))


def count_duplicates(images: dict) -> dict[str, int]:
    """Count images with identical pixels; `images` are contiguous arrays by split. "within train":
    images of train that repeat an earlier one of train. "in both train and val": distinct images
    that are in both splits. The same for every other split and pair of splits."""
    hashes, counts = {}, {}
    for split, array in images.items():
        hashes[split] = {hashlib.blake2b(image, digest_size=16).digest() for image in array}
        counts[f"within {split}"] = len(array) - len(hashes[split])
    for a, b in combinations(images, 2):
        counts[f"in both {a} and {b}"] = len(hashes[a] & hashes[b])
    return counts


def report(data: PathData) -> str:
    """Describe the data as plain text tables, at most 80 characters wide but for a long path."""
    official = "yes" if data.kind == "official" else f"no ({data.kind})"
    lines = [
        f"file           {data.card['path']}",
        f"md5            {data.md5}",
        f"official file  {official}",
        f"images         {data.size} x {data.size} x 3, {data.images['train'].dtype}, 0 to 255",
        "",
        *class_lines(data),
        "",
        f"{'train pixels, scale 0 to 1':<41}{'red':>13}{'green':>13}{'blue':>13}",
    ]
    if data.kind == "synthetic":
        lines.insert(0, f"{SYNTHETIC}: for trying the program only")
    mean, std = channel_stats(data.images["train"])
    for name, values in (("mean", mean), ("standard deviation", std)):
        lines.append(f"{name:<41}" + "".join(f"{value:>13.4f}" for value in values))
    lines += ["", f"{'duplicates (identical pixels)':<41}{'images':>13}"]
    for where, count in count_duplicates(data.images).items():
        lines.append(f"{where:<41}{count:>13,}")
    return "\n".join(lines)


def class_lines(data: PathData) -> list:
    """Return a table: the number of images of each class in each split, and their share of it."""
    lines = [f"{'class':<41}" + "".join(f"{split:>13}" for split in SPLITS)]
    for label in CLASSES:
        line = f"{SHORT_NAMES[label]:<5}{CLASS_NAMES[label]:<36}"
        for split in SPLITS:
            count = int((data.labels[split] == label).sum())
            line += f"{count:>7,}{count / data.counts[split]:>6.1%}"
        lines.append(line)
    totals = "".join(f"{count:>7,}{'':6}" for count in data.counts.values())
    return [*lines, f"{'total':<41}{totals}".rstrip()]


if __name__ == "__main__":
    sys.exit(run_script(main))
