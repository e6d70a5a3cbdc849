"""Find, check and describe the PathMNIST data: tables on the terminal, two figures as PNG.

    python analyze_data.py                           # finds the file, downloads it if need be
    python analyze_data.py --data pathmnist.npz      # a file, or a folder holding pathmnist.npz
    python analyze_data.py --data ~/data --out figures

The other scripts use `find_data` and `load_data`. No torch is imported here, so this starts fast.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import hashlib
import http.client
import io
import math
import os
import stat
import sys
import textwrap
import time
import urllib.error
import urllib.request
import uuid
import warnings
import zipfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:  # matplotlib is imported where figures are made: `--help` need not wait for it
    from matplotlib.figure import Figure

# Names: MedMNIST, medmnist/info.py. Codes: Kather et al. 2018, doi:10.5281/zenodo.1214456.
CLASS_NAMES = (
    "adipose",
    "background",
    "debris",
    "lymphocytes",
    "mucus",
    "smooth muscle",
    "normal colon mucosa",
    "cancer-associated stroma",
    "colorectal adenocarcinoma epithelium",
)
SHORT_NAMES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
SPLITS = ("train", "val", "test")
SIZES = (28, 64, 128, 224)

FILE_NAME = "pathmnist.npz"
DATA_DIR = Path(__file__).resolve().parent / "data"
COURSE_FILE = Path("/home/osz09/DATA_SharedClasses/SharedDatasets/MedMNIST") / FILE_NAME
URL = "https://zenodo.org/records/10519652/files/pathmnist.npz?download=1"
MD5 = "a8b06965200029087d5bd730944a56c1"
OFFICIAL_MD5 = {  # pixels a side -> md5, from medmnist/info.py
    28: MD5,
    64: "55aa9c1e0525abe5a6b9d8343a507616",
    128: "ac42d08fb904d92c244187169d1fd1d9",
    224: "2c51a510bcdc9cf8ddb2af93af1eadec",
}

MAX_BYTES = 20 * 10**9  # the official 224 px images are 16.1 GB once unpacked
MAX_RATIO = 100  # real tiles shrink 1.1 to 2 times, a zip bomb about 1000 times
SMALL_MEMBER = 16 * 2**20  # bytes; harmless however well they were compressed
SPLIT_COLOURS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito: safe for the colour-blind


class UserError(Exception):
    """One line for the user: which file or flag, what is wrong with it, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True)
class PathData:
    """A checked PathMNIST file.

    Attributes
    ----------
    path : Path
    kind : str
        "official" (the md5 is MedMNIST's), "synthetic" (drawn, not tissue) or "subset".
    md5 : str
    images : dict of str to np.ndarray
        For each split, uint8 (N, S, S, 3) in 0..255.
    labels : dict of str to np.ndarray
        For each split, int64 (N,) in 0..8.
    """

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


# ---- finding and downloading --------------------------------------------------------------------


def find_data(data: str | None) -> Path:
    """Find the npz file; see the search order below.

    Parameters
    ----------
    data : str or None
        What `--data` was given: an npz file, or a folder that holds `pathmnist.npz`. With None,
        the first of: `data/pathmnist.npz`, `~/.medmnist/pathmnist.npz`, the course server's
        file, a download into `data/`, the synthetic sample (said on stderr).

    Returns
    -------
    Path
        A path that exists; what it holds is for `load_data` to check.

    Raises
    ------
    UserError
        Nothing is there.
    """
    if data is not None:
        path = Path(os.path.expanduser(data))
        if os.path.isdir(path):
            path = path / FILE_NAME
            if not os.path.exists(path):
                raise UserError(f"--data {data}: the folder holds no {FILE_NAME}; name the file")
        if not os.path.exists(path):
            raise UserError(f"--data {data}: no such file, or no access; check the path")
        return path
    cache = Path(os.path.expanduser("~/.medmnist")) / FILE_NAME
    for path in (DATA_DIR / FILE_NAME, cache, COURSE_FILE):
        if os.path.isfile(path):
            return path
    try:
        return download(DATA_DIR / FILE_NAME)
    except UserError as error:
        reason = str(error)
    fallback = DATA_DIR / "synthetic.npz"
    if not os.path.isfile(fallback):
        raise UserError(f"{fallback}: not there; run data/make_synthetic.py. Also: {reason}")
    print(synthetic_banner(reason), file=sys.stderr)
    return fallback


def synthetic_banner(reason: str) -> str:
    """Return a banner that says, impossible to miss, that the data is not real.

    `reason` says why the real data is not used. Lines have at most 100 characters, a long path
    apart.
    """
    text = (
        "SYNTHETIC DATA: no PathMNIST file was found, so this run uses drawn images.\n"
        "They are for trying the program. The results say nothing about tissue.\n"
    )
    lines = text.splitlines() + textwrap.wrap(
        f"Why: {reason}", 96, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(["!" * 100, *(f"!! {line}" for line in lines), "!" * 100])


def download(
    target: Path,
    url: str = URL,
    md5: str = MD5,
    timeout: float = 10.0,
    pauses: tuple[float, ...] = (1.0, 3.0),
) -> Path:
    """Download the npz file, check its md5 and only then give it its name.

    Parameters
    ----------
    target : Path
        The final name; its folder is made if need be.
    url, md5 : str
        Where from, and the checksum to expect.
    timeout : float
        Limit in seconds on connecting and on waiting for the next bytes.
    pauses : tuple of float
        Seconds before each new try when the server answers 5xx.

    Returns
    -------
    Path

    Raises
    ------
    UserError
        It failed; the message says what to do by hand. No partial file is left.
    """
    # A name of its own, so that two downloads at once cannot write into the same file.
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _open_url(url, timeout, pauses) as response, open(part, "xb") as file:
            _copy(response, file, md5)
        os.replace(part, target)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{target}: download failed ({error}); get it by hand: {url} "
            f"(md5 {md5}), and put it into {target.parent}"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            part.unlink()
    return target


def _open_url(url: str, timeout: float, pauses: tuple[float, ...]) -> http.client.HTTPResponse:
    """Open `url`; a busy server (5xx) is asked again after each pause."""
    for pause in pauses:
        try:
            return urllib.request.urlopen(url, timeout=timeout)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
            error.close()
            time.sleep(pause)
    return urllib.request.urlopen(url, timeout=timeout)


def _copy(response: http.client.HTTPResponse, file: BinaryIO, md5: str) -> None:
    """Write the body to `file` under a progress bar; ValueError unless it is whole and right."""
    digest, received = hashlib.md5(usedforsecurity=False), 0
    total = int(response.headers.get("Content-Length", 0))
    with tqdm(total=total or None, unit="B", unit_scale=True, desc="Downloading") as bar:
        # read1 returns what has arrived, so the bar moves and the time limit holds for each piece.
        while piece := response.read1(2**20):
            file.write(piece)
            digest.update(piece)
            received += len(piece)
            bar.update(len(piece))
    if total and received != total:
        raise ValueError(f"it ended after {received:,} of {total:,} bytes")
    if digest.hexdigest() != md5:
        raise ValueError(f"the md5 is {digest.hexdigest()}, not the expected one")


# ---- reading and checking -----------------------------------------------------------------------


def load_data(path: str | Path) -> PathData:
    """Read a PathMNIST npz file and check everything about it.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    PathData
        A class that is absent from train is accepted, with a warning on stderr.

    Raises
    ------
    UserError
        The file cannot be read or is not PathMNIST: file, what is wrong, remedy, in one line.
    """
    path = Path(path)
    try:
        data = _load(path)
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


def _load(path: Path) -> PathData:
    """Do the work of load_data; many types of error leave it."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe or socket would wait forever
        raise UserError("not a regular file; give the npz file itself")
    images, labels = {}, {}
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's remarks on headers that Python 2 wrote
        with zipfile.ZipFile(file) as archive:
            _check_archive(archive, os.fstat(file.fileno()).st_size)
            for split in SPLITS:
                images[split] = _read(archive, f"{split}_images")
                labels[split] = _check_labels(split, _read(archive, f"{split}_labels"))
            synthetic = "synthetic.npy" in archive.namelist()
        file.seek(0)
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    kind = "official" if md5 in OFFICIAL_MD5.values() else "synthetic" if synthetic else "subset"
    return PathData(path, kind, md5, images, labels)


def _check_archive(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Refuse, before memory is taken, whatever is not six arrays as PathMNIST has them."""
    names = archive.namelist()
    sizes = set()
    for split in SPLITS:
        for key in (f"{split}_images", f"{split}_labels"):
            if names.count(f"{key}.npy") != 1:
                n = names.count(f"{key}.npy")
                raise UserError(f"holds {n} arrays named {key}, not 1; give a PathMNIST npz file")
        shape, dtype = _header(archive, f"{split}_images", file_bytes)
        if dtype != np.uint8:
            raise UserError(
                f"{split}_images is {dtype!s:.60}, not uint8; save the pixels as 0..255"
            )
        if len(shape) != 4 or shape[1] != shape[2] or shape[1] not in SIZES or shape[3] != 3:
            what = f"{split}_images has shape {shape!s:.60}, not (N, S, S, 3) with S one of {SIZES}"
            raise UserError(f"{what}: not PathMNIST; give pathmnist.npz or one of its sizes")
        label_shape, dtype = _header(archive, f"{split}_labels", file_bytes)
        if dtype.kind not in "iu":
            raise UserError(
                f"{split}_labels is {dtype!s:.60}, not integer; save class numbers 0..8"
            )
        if label_shape not in ((shape[0],), (shape[0], 1)):
            what = f"{split} has images {shape} but labels {label_shape!s:.60}"
            raise UserError(f"{what}; save one class number an image, as (N,) or (N, 1)")
        if shape[0] < 1:
            raise UserError(f"{split} is empty; put at least one image into every split")
        sizes.add(shape[1])
    if len(sizes) > 1:
        raise UserError(f"its splits have different sizes {sorted(sizes)}; use one size")


def _header(
    archive: zipfile.ZipFile, key: str, file_bytes: int
) -> tuple[tuple[int, ...], np.dtype]:
    """Return the (shape, dtype) that an array claims; UserError unless its size bears it out."""
    info = archive.getinfo(f"{key}.npy")
    plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not plain or info.flag_bits & 1:
        what = f"{key} is encrypted or has an unusual compression"
        raise UserError(f"{what}; save it with numpy.savez_compressed")
    packed = min(info.compress_size, file_bytes)  # the directory may lie
    if info.file_size > min(MAX_BYTES, max(SMALL_MEMBER, MAX_RATIO * packed)):
        what = f"{key} would grow from {packed:,} to {info.file_size:,} bytes"
        raise UserError(f"{what} (limit {MAX_RATIO} times); download the file again")
    with archive.open(info) as member:
        head = io.BytesIO(member.read(10_000))
    version = np.lib.format.read_magic(head)
    # Version 3 is laid out like version 2; only its encoding differs.
    v1 = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if v1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(head)
    if dtype.hasobject:
        raise UserError(f"{key} holds Python objects, which could run code; save plain numbers")
    if head.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
        what = f"{key} claims shape {shape!s:.60}, but holds {info.file_size - head.tell():,} bytes"
        raise UserError(f"{what}; it is damaged, download it again")
    return shape, dtype


def _read(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """Read one array; nothing is unpickled, and zipfile compares the checksum at the end."""
    with archive.open(f"{key}.npy") as member:
        return np.ascontiguousarray(np.lib.format.read_array(member, allow_pickle=False))


def _check_labels(split: str, labels: np.ndarray) -> np.ndarray:
    """Return labels as int64 (N,); UserError where one is no class."""
    if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
        what = f"{split}_labels run from {labels.min()} to {labels.max()}, not within 0..8"
        raise UserError(f"{what}; number the nine classes as MedMNIST does")
    return labels.reshape(-1).astype(np.int64)


# ---- statistics ---------------------------------------------------------------------------------


def channel_stats(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each colour channel, exact, without a float copy.

    Parameters
    ----------
    images : np.ndarray
        uint8 (N, S, S, 3).

    Returns
    -------
    mean, std : np.ndarray
        float64 (3,), in units of full scale (0 to 1).
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
    """Count images with identical pixels.

    Parameters
    ----------
    images : dict of str to np.ndarray
        For each split, uint8 (N, S, S, 3), contiguous.

    Returns
    -------
    dict of str to int
        "train": images of train that repeat an earlier one of train. "train-val": distinct
        images that are in both splits. So for every split and every pair.
    """
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


# ---- figures ------------------------------------------------------------------------------------


def sample_grid(data: PathData, columns: int = 6, seed: int = 0) -> "Figure":
    """Show random train images of every class, drawn with `seed`, one row a class.

    `columns` is the number of images per class; fewer where the class has fewer.
    """
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
    figure = Figure(figsize=(width / 100 + 3.1, 8.7), facecolor="white")
    axes = figure.add_axes((290 / (width + 310), 12 / 870, width / (width + 310), 804 / 870))
    axes.imshow(canvas, interpolation="nearest" if data.size == 28 else None)
    axes.set_yticks(np.arange(9) * pitch + data.size / 2, _class_labels(), fontsize=14)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(_title(data, "random train images of each class"), fontsize=16)
    return figure


def class_distribution(data: PathData) -> "Figure":
    """Show each class's share of the three splits, with the counts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for i, (split, colour) in enumerate(zip(SPLITS, SPLIT_COLOURS, strict=True)):
        counts = np.bincount(data.labels[split], minlength=9)
        percent = 100 * counts / counts.sum()
        label = f"{split} ({counts.sum():,} images)"
        bars = axes.barh(np.arange(9) + (i - 1) * 0.28, percent, 0.27, color=colour, label=label)
        axes.bar_label(bars, [f"{n:,}" for n in counts], padding=3, fontsize=12)
    axes.set_yticks(np.arange(9), _class_labels(), fontsize=14)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.tick_params(axis="x", labelsize=13)
    axes.set_xlabel("share of the split, % (beside the bar: images)", fontsize=14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_title(data, "class distribution"), fontsize=16)
    figure.legend(loc="outside lower center", ncols=3, fontsize=14, frameon=False)
    return figure


def _title(data: PathData, text: str) -> str:
    """Return a figure's title, which says so where the data is not real, or not all of it."""
    names = {"official": "PathMNIST", "synthetic": "SYNTHETIC data, not tissue"}
    return f"{names.get(data.kind, 'PathMNIST, a subset')}: {text}"


def _class_labels() -> list[str]:
    """Return "name (CODE)" of each class, wrapped to fit beside an axis."""
    pairs = zip(CLASS_NAMES, SHORT_NAMES, strict=True)
    return [textwrap.fill(f"{name} ({code})", 24) for name, code in pairs]


# ---- what every script needs --------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Raises
    ------
    UserError
        If it cannot be written (no space, no permission); the old file is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        remedy = "free some space, or choose a folder that can be written"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            temporary.unlink()


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def set_up_stdout() -> None:
    """Print each line at once, into a file too; odd bytes of file names become escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)


def end_of_pipe() -> int:
    """Say nothing where nobody reads any more (`| head`); return the status shells give that."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


# ---- the command line ---------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0; 2 bad input; 130 stopped; 141 pipe."""
    parser = Parser(description="Check and describe the PathMNIST data.")
    parser.add_argument(
        "--data", help=f"npz file, or folder with {FILE_NAME} (default: found or downloaded)"
    )
    parser.add_argument(
        "--out", default="figures", help="folder for the figures (default: figures)"
    )
    args = parser.parse_args(argv)
    try:
        set_up_stdout()
        data = load_data(find_data(args.data))
        print(report(data))
        out = Path(os.path.expanduser(args.out))
        try:
            out.mkdir(parents=True, exist_ok=True)
            sample_grid(data).savefig(out / "samples.png", dpi=100)
            class_distribution(data).savefig(out / "class_distribution.png", dpi=100)
        except OSError as error:
            raise UserError(f"--out {out}: {error}; give a folder that can be written") from error
        print(f"\nfigures        {out / 'samples.png'}\n{'':15}{out / 'class_distribution.png'}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return end_of_pipe()
    except OSError as error:  # a full disk behind stdout
        print(f"error: {error}; free some space", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
