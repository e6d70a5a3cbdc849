"""Fuzz load_data: it may refuse a damaged npz file in one line, or read it right; nothing else.

    python tests/fuzz_npz.py --cases 1000 --seed 0

Changes of raw bytes may be accepted only if every array is still the original one. Files that were
rebuilt with other contents (a whole zip, right checksums) may be accepted only if their arrays are
a valid PathMNIST.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analyze_data import SIZES, SPLITS, PathData, load_data
from Common import UserError

Arrays = dict[str, np.ndarray]
Rng = np.random.Generator
DTYPES = ("i1", ">u2", "i8", "f4", "c8", "bool", "S3", "O", "M8[s]")
MARKS = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b".npy")


def make_arrays(rng: Rng) -> Arrays:
    """Small valid arrays. Pixels are 0 or 1, so that more of a compressed file is structure."""
    arrays = {}
    for split, n in zip(SPLITS, (9, 2, 1), strict=True):
        arrays[f"{split}_images"] = rng.integers(0, 2, (n, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.permutation(9)[:n, None].astype(np.uint8)
    return arrays


def pack(arrays: Arrays, rng: Rng) -> bytes:
    """Return an npz file's bytes, compressed or not."""
    file = io.BytesIO()
    save = rng.choice([np.savez, np.savez_compressed])
    save(file, **arrays)
    return file.getvalue()


def change_bytes(content: bytes, rng: Rng) -> bytes:
    """Change, cut out, insert or repeat some bytes, or cut the file."""
    start = rng.integers(len(content))
    end = start + rng.integers(1, 100)
    head, middle, tail = content[:start], content[start:end], content[end:]
    noise = rng.bytes(len(middle))
    ways = (noise + tail, tail, noise + middle + tail, middle * 2 + tail, b"")
    return head + ways[rng.integers(len(ways))]


def change_structure(content: bytes, rng: Rng) -> bytes:
    """Overwrite a byte just behind a zip or npy mark, where sizes, offsets and shapes are."""
    mark = MARKS[rng.integers(len(MARKS))]
    places = [i for i in range(len(content)) if content.startswith(mark, i)] or [0]
    changed = bytearray(content + bytes(64))
    changed[rng.choice(places) + rng.integers(64)] = rng.choice([0, 1, 255, rng.integers(256)])
    return bytes(changed[: len(content)])


def change_npy_header(content: bytes, rng: Rng) -> bytes:
    """Change one member's npy header and zip it again, so that its checksum is right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        names = old.namelist()
        changed = rng.choice(names)
        for name in names:
            payload = bytearray(old.read(name))
            if name == changed:
                payload[rng.integers(80)] = rng.choice(list(b"0123456789,()'|<>uifOTrue-L \n\xff"))
            new.writestr(name, bytes(payload))
    return file.getvalue()


def change_array(content: bytes, rng: Rng) -> bytes:
    """Change one array's type, shape, place or values (labels), or add another."""
    arrays = dict(np.load(io.BytesIO(content)))
    key, other = rng.choice(list(arrays), 2)
    a = arrays[key]
    labels = f"{rng.choice(SPLITS)}_labels"
    views = (a[:0], a[1:], a.T, a.ravel(), a[None], np.asfortranarray(a))
    changes = (
        {key: a.astype(rng.choice(DTYPES))},
        {key: views[rng.integers(len(views))]},
        {key: arrays[other], other: a},
        {labels: rng.integers(-2, 12, arrays[labels].shape)},
        {rng.choice(["synthetic", ".."]): np.array([None, "x"], object)},
    )
    return pack(arrays | changes[rng.integers(len(changes))], rng)


RAW = (change_bytes, change_structure)  # a file that is accepted after these must be the original
CHANGES = (*RAW, change_npy_header, change_array)


def check(data: PathData, original: Arrays | None) -> None:
    """Fail where this is no valid PathMNIST or, where that is given, not the original."""
    for split in SPLITS:
        images, labels = data.images[split], data.labels[split]
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert images.shape == (len(labels), data.size, data.size, 3)
        assert len(labels) > 0
        if original:
            np.testing.assert_array_equal(images, original[f"{split}_images"])
            np.testing.assert_array_equal(labels, original[f"{split}_labels"][:, 0])
    assert data.size in SIZES
    assert set(np.concatenate(list(data.labels.values()))) == set(range(9))


def try_case(change: Callable, path: Path, rng: Rng) -> str:
    """Change one file and load it; return "refused", "accepted" or "wrong"."""
    arrays = make_arrays(rng)
    path.write_bytes(change(pack(arrays, rng), rng))
    try:
        with contextlib.redirect_stderr(None):  # warnings that a class is absent from train
            data = load_data(path)
        check(data, arrays if change in RAW else None)
    except UserError as error:
        good = str(error).startswith(f"{path}: ") and "; " in str(error) and len(str(error)) < 500
        return "refused" if good else "wrong"
    except Exception:  # any traceback is what the fuzz looks for
        traceback.print_exc()
        return "wrong"
    return "accepted"


def fuzz(cases: int, seed: int) -> Counter:
    """Try so many cases; return how often each outcome came, and name the wrong ones."""
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for case in range(cases):
            change = CHANGES[case % len(CHANGES)]
            rng = np.random.default_rng((seed, case))
            outcome = try_case(change, Path(folder) / "fuzz.npz", rng)
            outcomes[outcome] += 1
            if outcome == "wrong":
                print(f"wrong: case {case}, {change.__name__}")
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fuzz load_data with changed npz files.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes = fuzz(args.cases, args.seed)
    print(f"{args.cases} cases:", dict(outcomes))
    sys.exit("wrong" in outcomes)
