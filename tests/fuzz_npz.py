"""Fuzz load_data: it may refuse a damaged npz file in one line, or read it right; nothing else.

    python tests/fuzz_npz.py
    python tests/fuzz_npz.py --cases 1000 --seed 0

Changes of raw bytes may be accepted only if every array is still the original one. Files that
were rebuilt with other contents (a whole zip, right checksums) may be accepted only if their
arrays are a valid PathMNIST.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from analyze_data import SIZES, SPLITS, UserError, load_data

Arrays = dict[str, np.ndarray]
Rng = np.random.Generator
DTYPES = ("u1", "i1", ">u2", "i8", "u8", "f4", "f8", "c8", "bool", "S3", "U2", "O", "M8[s]")
MARKS = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b".npy")


def make_arrays(rng: Rng) -> Arrays:
    """Small valid arrays; half of them flat, so that more of the file is structure."""
    arrays: Arrays = {}
    high = rng.choice([2, 256])
    for split, n in zip(SPLITS, (4, 2, 1), strict=True):
        arrays[f"{split}_images"] = rng.integers(0, high, (n, 28, 28, 3), dtype=np.uint8)
        labels = rng.integers(0, 9, n, dtype=np.uint8)
        arrays[f"{split}_labels"] = labels if rng.random() < 0.5 else labels[:, None]
    return arrays


def pack(arrays: Arrays, rng: Rng) -> bytes:
    """Return an npz file's bytes, compressed or not."""
    file = io.BytesIO()
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(file, **arrays)
    return file.getvalue()


# ---- changes of raw bytes: an accepted file must hold the original arrays -----------------------


def flip_bytes(content: bytes, rng: Rng) -> bytes:
    array = np.frombuffer(content, np.uint8).copy()
    array[rng.integers(0, len(array), rng.integers(1, 4))] ^= np.uint8(rng.integers(1, 256))
    return array.tobytes()


def edit_structure(content: bytes, rng: Rng) -> bytes:
    """Overwrite a byte just behind a zip or npy mark, where sizes, offsets and shapes are."""
    mark = MARKS[rng.integers(len(MARKS))]
    places = [i for i in range(len(content)) if content.startswith(mark, i)]
    if not places:
        return flip_bytes(content, rng)
    changed = bytearray(content)
    place = rng.choice(places) + rng.integers(0, 64)
    changed[min(place, len(changed) - 1)] = rng.choice([0, 1, 255, rng.integers(256)])
    return bytes(changed)


def truncate(content: bytes, rng: Rng) -> bytes:
    return content[: rng.integers(0, len(content))]


def insert(content: bytes, rng: Rng) -> bytes:
    i = rng.integers(0, len(content) + 1)
    return content[:i] + rng.bytes(rng.integers(1, 100)) + content[i:]


def delete(content: bytes, rng: Rng) -> bytes:
    i = rng.integers(0, len(content))
    return content[:i] + content[i + rng.integers(1, 100) :]


def repeat_chunk(content: bytes, rng: Rng) -> bytes:
    i, j = sorted(rng.integers(0, len(content) + 1, 2))
    return content[:j] + content[i:j] + content[j:]


def fill(content: bytes, rng: Rng) -> bytes:
    i, n = rng.integers(0, len(content)), rng.integers(1, 400)
    return content[:i] + bytes([rng.choice([0, 255])]) * len(content[i : i + n]) + content[i + n :]


# ---- rebuilt files: an accepted file must be a valid PathMNIST ----------------------------------


def change_dtype(arrays: Arrays, rng: Rng) -> Arrays:
    key = rng.choice(list(arrays))
    return arrays | {key: arrays[key].astype(rng.choice(DTYPES))}


def change_shape(arrays: Arrays, rng: Rng) -> Arrays:
    key = rng.choice(list(arrays))
    a = arrays[key]
    choices = [
        a[:0],
        a[1:],
        a[..., None],
        a.T,
        a.ravel(),
        a[None],
        a[..., :1],
        np.asfortranarray(a),
    ]
    return arrays | {key: choices[rng.integers(len(choices))]}


def change_values(arrays: Arrays, rng: Rng) -> Arrays:
    key = f"{rng.choice(SPLITS)}_labels"
    values = rng.integers(-2, 12, arrays[key].shape)
    return arrays | {key: values}


def swap_members(arrays: Arrays, rng: Rng) -> Arrays:
    a, b = rng.choice(list(arrays), 2)
    return arrays | {a: arrays[b], b: arrays[a]}


def drop_or_add(arrays: Arrays, rng: Rng) -> Arrays:
    name = rng.choice([*arrays, "synthetic", "note", "train_images.npy", ".."])
    changed = {key: array for key, array in arrays.items() if key != name}
    return changed if name in arrays else changed | {name: np.array([None, "x"], dtype=object)}


def edit_npy_header(content: bytes, rng: Rng) -> bytes:
    """Change one member's npy header and zip it again, so that its checksum is right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            payload = old.read(name)
            if name == chosen:
                head = bytearray(payload[:80])
                head[rng.integers(0, 80)] = rng.choice(
                    list(b"0123456789,()'|<>uifOTrue-L \n\x00\xff")
                )
                payload = bytes(head) + payload[80:]
            new.writestr(name, payload)
    return file.getvalue()


RAW = (flip_bytes, edit_structure, truncate, insert, delete, repeat_chunk, fill)
REBUILT = (change_dtype, change_shape, change_values, swap_members, drop_or_add)
MUTATIONS: tuple[Callable, ...] = (*RAW, *REBUILT, edit_npy_header)


# ---- the verdict --------------------------------------------------------------------------------


def is_valid(images: Arrays, labels: Arrays) -> bool:
    """Whether accepted arrays are what load_data promises."""
    sizes = {a.shape[1:] for a in images.values()}
    return (
        sizes <= {(s, s, 3) for s in SIZES}
        and len(sizes) == 1
        and all(
            images[s].dtype == np.uint8
            and labels[s].dtype == np.int64
            and labels[s].shape == (len(images[s]),)
            and len(labels[s]) > 0
            and 0 <= labels[s].min() <= labels[s].max() <= 8
            for s in SPLITS
        )
    )


def try_case(mutate: Callable, path: Path, rng: Rng) -> str:
    """Mutate one file and load it; return "refused", "accepted" or "wrong"."""
    arrays = make_arrays(rng)
    if mutate in REBUILT:
        content = pack(mutate(arrays, rng), rng)
    else:
        content = mutate(pack(arrays, rng), rng)
    path.write_bytes(content)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            data = load_data(path)
    except UserError as error:
        message = str(error)
        good = message.startswith(f"{path}: ") and len(message.splitlines()) == 1
        return "refused" if good and "; " in message and len(message) < 500 else "wrong"
    except Exception:  # noqa: BLE001 (any traceback is what the fuzz looks for)
        traceback.print_exc()
        return "wrong"
    warnings_only = all(line.startswith("warning: ") for line in said.getvalue().splitlines())
    same = mutate not in RAW or all(
        np.array_equal(data.images[s], arrays[f"{s}_images"])
        and np.array_equal(data.labels[s], arrays[f"{s}_labels"].ravel())
        for s in SPLITS
    )
    return "accepted" if warnings_only and same and is_valid(data.images, data.labels) else "wrong"


def main() -> int:
    """Run the cases, print a table; return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description="Fuzz load_data with mutated npz files.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.npz"
        for case in range(args.cases):
            mutate = MUTATIONS[case % len(MUTATIONS)]
            outcome = try_case(mutate, path, np.random.default_rng((args.seed, case)))
            results[mutate.__name__, outcome] += 1
            if outcome == "wrong":
                print(f"wrong: case {case}, {mutate.__name__}")
    outcomes = ("refused", "accepted", "wrong")
    print(f"{'mutation':<18}{'tried':>9}" + "".join(f"{outcome:>10}" for outcome in outcomes))
    for name in [mutate.__name__ for mutate in MUTATIONS]:
        row = [results[name, outcome] for outcome in outcomes]
        print(f"{name:<18}{sum(row):>9}" + "".join(f"{n:>10}" for n in row))
    totals = [sum(n for (_, o), n in results.items() if o == outcome) for outcome in outcomes]
    print(f"{'total':<18}{args.cases:>9}" + "".join(f"{n:>10}" for n in totals))
    return 1 if totals[2] else 0


if __name__ == "__main__":
    sys.exit(main())
