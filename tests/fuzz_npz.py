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
from analyze_data import SIZES, SPLITS, load_data
from Common import UserError

Arrays = dict[str, np.ndarray]
Rng = np.random.Generator
DTYPES = ("u1", "i1", ">u2", "i8", "u8", "f4", "f8", "c8", "bool", "S3", "U2", "O", "M8[s]")
MARKS = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b".npy")


def make_arrays(rng: Rng) -> Arrays:
    """Small valid arrays; half of them of two values, so that more of the file is structure."""
    arrays, high = {}, rng.choice([2, 256])
    for split, n in zip(SPLITS, (9, 2, 1), strict=True):
        arrays[f"{split}_images"] = rng.integers(0, high, (n, 28, 28, 3), dtype=np.uint8)
        labels = rng.permutation(9)[:n].astype(np.uint8)  # train has every class
        arrays[f"{split}_labels"] = labels if rng.random() < 0.5 else labels[:, None]
    return arrays


def pack(arrays: Arrays, rng: Rng) -> bytes:
    """Return an npz file's bytes, compressed or not."""
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(file := io.BytesIO(), **arrays)
    return file.getvalue()


def change_bytes(content: bytes, rng: Rng) -> bytes:
    """Change, cut out, insert, repeat or blank some bytes, or cut the file."""
    i, n = rng.integers(0, len(content)), rng.integers(1, 100)
    head, middle, tail = content[:i], content[i : i + n], content[i + n :]
    flipped = bytes([content[i] ^ rng.integers(1, 256)]) + content[i + 1 :]
    blank = bytes([rng.choice([0, 255])]) * len(middle)
    ways = (flipped, tail, rng.bytes(n) + middle + tail, middle * 2 + tail, blank + tail, b"")
    return head + ways[rng.integers(len(ways))]


def change_structure(content: bytes, rng: Rng) -> bytes:
    """Overwrite a byte just behind a zip or npy mark, where sizes, offsets and shapes are."""
    mark = MARKS[rng.integers(len(MARKS))]
    places = [i for i in range(len(content)) if content.startswith(mark, i)] or [0]
    changed = bytearray(content)
    place = rng.choice(places) + rng.integers(0, 64)
    changed[min(place, len(changed) - 1)] = rng.choice([0, 1, 255, rng.integers(256)])
    return bytes(changed)


def change_npy_header(content: bytes, rng: Rng) -> bytes:
    """Change one member's npy header and zip it again, so that its checksum is right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        members = {name: bytearray(old.read(name)) for name in old.namelist()}
        letters = b"0123456789,()'|<>uifOTrue-L \n\x00\xff"
        members[rng.choice(list(members))][rng.integers(0, 80)] = rng.choice(list(letters))
        for name, payload in members.items():
            new.writestr(name, bytes(payload))
    return file.getvalue()


def change_array(arrays: Arrays, rng: Rng) -> Arrays:
    """Change one array's type, shape, place or values (labels), or add another."""
    key, other = rng.choice(list(arrays), 2)
    a, labels, added = arrays[key], f"{rng.choice(SPLITS)}_labels", rng.choice(["synthetic", ".."])
    views = (a[:0], a[1:], a[..., None], a.T, a.ravel(), a[None], a[..., :1], np.asfortranarray(a))
    changes = (
        {key: a.astype(rng.choice(DTYPES))},
        {key: views[rng.integers(len(views))]},
        {key: arrays[other], other: a},
        {labels: rng.integers(-2, 12, arrays[labels].shape)},
        {added: np.array([None, "x"], object)},
    )
    return arrays | changes[rng.integers(len(changes))]


RAW = (change_bytes, change_structure)  # what is accepted then, must be the original
CHANGES: tuple[Callable, ...] = (*RAW, change_npy_header, change_array)


def try_case(change: Callable, path: Path, rng: Rng) -> str:
    """Change one file and load it; return "refused", "accepted" or "wrong"."""
    arrays = make_arrays(rng)
    raw = change is not change_array
    path.write_bytes(change(pack(arrays, rng), rng) if raw else pack(change(arrays, rng), rng))
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            data = load_data(path)
    except UserError as error:
        good = str(error).startswith(f"{path}: ") and "; " in str(error) and len(str(error)) < 500
        return "refused" if good else "wrong"
    except Exception:  # any traceback is what the fuzz looks for
        traceback.print_exc()
        return "wrong"
    right = all(line.startswith("warning: ") for line in said.getvalue().splitlines())
    right &= len({x.shape[1:] for x in data.images.values()}) == 1
    right &= len(set().union(*(y.tolist() for y in data.labels.values()))) == 9
    for split, x in data.images.items():
        y = data.labels[split]
        right &= x.dtype == np.uint8 and x.shape[1:] in {(s, s, 3) for s in SIZES}
        right &= y.dtype == np.int64 and y.shape == (len(x),) and 0 <= y.min() <= y.max() <= 8
        if change in RAW:
            right &= np.array_equal(x, arrays[f"{split}_images"])
            right &= np.array_equal(y, arrays[f"{split}_labels"].ravel())
    return "accepted" if right else "wrong"


def main() -> int:
    """Run the cases, print a table; return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description="Fuzz load_data with changed npz files.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes = {name: Counter() for name in [*(c.__name__ for c in CHANGES), "total"]}
    with tempfile.TemporaryDirectory() as folder:
        for case in range(args.cases):
            change = CHANGES[case % len(CHANGES)]
            rng = np.random.default_rng((args.seed, case))
            outcome = try_case(change, Path(folder) / "fuzz.npz", rng)
            for name in (change.__name__, "total"):
                outcomes[name].update(["tried", outcome])
            if outcome == "wrong":
                print(f"wrong: case {case}, {change.__name__}")
    columns = ("tried", "refused", "accepted", "wrong")
    print(f"{'change':<18}" + "".join(f"{column:>10}" for column in columns))
    for name, counts in outcomes.items():
        print(f"{name:<18}" + "".join(f"{counts[column]:>10}" for column in columns))
    return 1 if outcomes["total"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
