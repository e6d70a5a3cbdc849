"""Tests of analyze_data.py: python -m pytest tests/test_analyze_data.py"""

import hashlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import only_line

import analyze_data
from analyze_data import CLASS_NAMES, SPLITS, PathData, UserError, load_data, main

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
COUNTS = {"train": 18, "val": 9, "test": 10}


def make_arrays(size: int = 28, seed: int = 0) -> dict[str, np.ndarray]:
    """Six valid arrays of noise: every class in every split, labels (N, 1)."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, n in COUNTS.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 9).astype(np.uint8)[:, None]
    return arrays


def save(path: Path, **changes: np.ndarray | None) -> Path:
    """Save valid arrays with some of them changed, or left out (None)."""
    arrays = make_arrays() | changes
    np.savez_compressed(path, **{key: a for key, a in arrays.items() if a is not None})
    return path


def save_with_member(path: Path, name: str, payload: bytes, **changes: np.ndarray) -> Path:
    """Save valid arrays, one of them replaced by raw bytes."""
    save(path, **changes, **{name: None})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", payload)
    return path


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command in the project's folder."""
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def npy_header(shape: str, descr: str = "|u1") -> bytes:
    """Return a version 1 npy header that claims any shape."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def patch(path: Path, edit: Callable[[bytearray], None]) -> Path:
    """Change the bytes of a file in place."""
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)
    return path


# ---- good files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [28, 64])
def test_a_good_file_is_read_as_it_is(tmp_path: Path, size: int) -> None:
    arrays = make_arrays(size)
    path = tmp_path / "good.npz"
    np.savez(path, **arrays)
    data = load_data(path)
    assert (data.path, data.size, data.counts, data.kind) == (path, size, COUNTS, "subset")
    assert data.md5 == hashlib.md5(path.read_bytes()).hexdigest()
    for split in SPLITS:
        assert data.images[split].dtype == np.uint8
        np.testing.assert_array_equal(data.images[split], arrays[f"{split}_images"])
        assert data.labels[split].dtype == np.int64
        np.testing.assert_array_equal(data.labels[split], arrays[f"{split}_labels"][:, 0])


@pytest.mark.parametrize("form", ["flat", "big-endian", "uint64", "fortran", "version 3", "extra"])
def test_other_spellings_of_the_same_data(tmp_path: Path, form: str) -> None:
    arrays = make_arrays()
    images, labels = arrays["train_images"], arrays["train_labels"]
    path = tmp_path / "good.npz"
    if form == "flat":
        save(path, train_labels=labels[:, 0])
    elif form == "big-endian":
        save(path, train_labels=labels.astype(">i4"))
    elif form == "uint64":
        save(path, train_labels=labels.astype(np.uint64))
    elif form == "fortran":
        save(path, train_images=np.asfortranarray(images))
    elif form == "version 3":
        member = tmp_path / "images.npy"
        with open(member, "wb") as file:
            np.lib.format.write_array(file, images, version=(3, 0))
        save_with_member(path, "train_images", member.read_bytes())
    else:  # an extra key is ignored, and what it holds is never unpickled
        save(path, note=np.array([{"object": 1}], dtype=object))
    data = load_data(path)
    np.testing.assert_array_equal(data.images["train"], images)
    assert data.images["train"].flags.c_contiguous
    np.testing.assert_array_equal(data.labels["train"], labels[:, 0])


def test_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.npz")
    synthetic = save(tmp_path / "b.npz", synthetic=np.array(True))
    assert load_data(synthetic).kind == "synthetic"
    monkeypatch.setitem(analyze_data.OFFICIAL_MD5, 28, hashlib.md5(path.read_bytes()).hexdigest())
    assert load_data(path).kind == "official"


def test_flat_images_are_no_bomb(tmp_path: Path) -> None:
    flat = np.zeros((2000, 28, 28, 3), np.uint8)
    path = save(
        tmp_path / "flat.npz", train_images=flat, train_labels=np.arange(2000, dtype=np.int64) % 9
    )
    assert load_data(path).counts["train"] == 2000


def test_an_absent_class_is_accepted_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = make_arrays()["train_labels"]
    labels[labels == 4] = 5
    path = save(tmp_path / "absent.npz", train_labels=labels)
    load_data(path)
    assert capsys.readouterr().err == f"warning: {path}: no train image of class mucus\n"
    assert main(["--data", str(path), "--out", str(tmp_path / "out")]) == 0


# ---- bad files ----------------------------------------------------------------------------------


class Boom:
    """Unpickling this makes a file, so that a test can see that it was not unpickled."""

    def __reduce__(self) -> tuple:
        return (open, ("unpickled", "w"))


def _flip_image_byte(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def _encrypt(content: bytearray) -> None:
    content[content.index(b"PK\x01\x02") + 8] |= 1
    content[6] |= 1


def _unknown_compression(content: bytearray) -> None:
    content[content.index(b"PK\x01\x02") + 10] = 97


A = make_arrays()
LABELS = A["train_labels"]
NAN = np.where(LABELS == 3, np.nan, LABELS)
BAD: dict[str, tuple[Callable[[Path], object], str]] = {  # name: (make the file, words to expect)
    "empty file": (lambda p: p.write_bytes(b""), "not a zip"),
    "text file": (lambda p: p.write_text("hello\n" * 99), "not a zip"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(Boom())), "not a zip"),
    "npy file": (lambda p: p.write_bytes(npy_header("(18, 28, 28, 3)")), "not a zip"),
    "flipped byte": (lambda p: patch(save(p), _flip_image_byte), "damaged"),
    "encrypted": (lambda p: patch(save(p), _encrypt), "encrypted"),
    "compression 97": (lambda p: patch(save(p), _unknown_compression), "unusual"),
    "missing key": (lambda p: save(p, val_labels=None), "holds 0 arrays named val_labels"),
    "float images": (lambda p: save(p, train_images=A["train_images"] / 255), "float64"),
    "int16 images": (lambda p: save(p, train_images=A["train_images"].astype("i2")), "int16"),
    "object images": (lambda p: save(p, val_images=np.array([Boom()], object)), "Python objects"),
    "object labels": (
        lambda p: save(p, val_labels=np.array([Boom()] * 9, object)),
        "Python objects",
    ),
    "raw pickle": (lambda p: save_with_member(p, "val_labels", pickle.dumps(Boom())), "magic"),
    "grey": (lambda p: save(p, train_images=A["train_images"][..., 0]), "(18, 28, 28)"),
    "NCHW": (lambda p: save(p, val_images=A["val_images"].transpose(0, 3, 1, 2)), "(9, 3, 28, 28)"),
    "not square": (lambda p: save(p, test_images=A["test_images"][:, :, :20]), "(10, 28, 20, 3)"),
    "27 px": (lambda p: save(p, test_images=A["test_images"][:, :27, :27]), "(10, 27, 27, 3)"),
    "RGBA": (lambda p: save(p, train_images=np.zeros((18, 28, 28, 4), "u1")), "(18, 28, 28, 4)"),
    "two sizes": (lambda p: save(p, val_images=make_arrays(64)["val_images"]), "[28, 64]"),
    "unequal lengths": (lambda p: save(p, train_labels=LABELS[1:]), "(17, 1)"),
    "empty split": (
        lambda p: save(p, val_images=A["val_images"][:0], val_labels=A["val_labels"][:0]),
        "val is empty",
    ),
    "one-hot": (lambda p: save(p, train_labels=np.eye(9, dtype="u1")[LABELS[:, 0]]), "(18, 9)"),
    "negative label": (lambda p: save(p, train_labels=LABELS.astype("i1") - 1), "from -1 to 7"),
    "label 9": (lambda p: save(p, train_labels=LABELS + 1), "from 1 to 9"),
    "label 2**64 - 1": (
        lambda p: save(p, train_labels=np.full(18, 2**64 - 1, np.uint64)),
        "18446744073709551615",
    ),
    "float labels": (lambda p: save(p, train_labels=LABELS.astype("f4")), "float32"),
    "NaN labels": (lambda p: save(p, train_labels=NAN), "float64"),
    "bool labels": (lambda p: save(p, train_labels=LABELS > 3), "bool"),
    "10**12 images": (
        lambda p: save_with_member(p, "train_images", npy_header("(1000000000000, 28, 28, 3)")),
        "claims shape (1000000000000, 28, 28, 3)",
    ),
    "negative shape": (
        lambda p: save_with_member(p, "train_images", npy_header("(-1, 28, 28, 3)")),
        "claims shape (-1, 28, 28, 3)",
    ),
    "endless header": (
        lambda p: save_with_member(p, "train_images", npy_header("(" + "1," * 20_000 + ")")),
        "cannot be read",
    ),
    "cut array": (
        lambda p: save_with_member(p, "train_images", npy_header("(18, 28, 28, 3)") + b"x" * 99),
        "holds 99 bytes",
    ),
    "folder": (lambda p: p.mkdir(), "--data"),
    "missing": (lambda p: None, "no such file"),
    "pipe": (lambda p: os.mkfifo(p), "not a regular file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.npz"
    make(path)
    before = sorted(os.listdir())
    if name not in ("folder", "missing"):
        with pytest.raises(UserError, match=r"bad\.npz"):
            load_data(path)
    assert main(["--data", str(path), "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert "bad.npz" in output.err and words in output.err and "; " in output.err
    assert len(output.err) < 400 + 2 * len(str(path))
    assert sorted(os.listdir()) == before  # nothing made, nothing unpickled


def test_the_command_line_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_text("no")
    command = [sys.executable, "analyze_data.py", "--data", str(path)]
    done = run(command)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: ") and done.stderr.count("\n") == 1


def test_truncated_at_20_places(tmp_path: Path) -> None:
    content = save(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for end in np.linspace(0, len(content) - 1, 20).astype(int):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"cut\.npz.*download it again"):
            load_data(path)


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    path = save(tmp_path / "twice.npz")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("val_labels.npy", archive.read("val_labels.npy"))
    with pytest.raises(UserError, match="holds 2 arrays named val_labels"):
        load_data(path)


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have about 100 characters only
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.npz")
        with pytest.raises(UserError, match=r"s\.npz: not a regular file"):
            load_data("s.npz")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX permissions")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path = save(tmp_path / "secret.npz")
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # root may read anything, so be nobody for a moment
            os.seteuid(65534)
        with pytest.raises(UserError, match=r"secret\.npz: no permission"):
            load_data(path)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("lie", [None, 1, 42464])
def test_a_bomb_is_refused_before_memory_is_taken(tmp_path: Path, lie: int | None) -> None:
    n = 64 * 2**20 // (28 * 28 * 3)
    bomb = npy_header(f"({n}, 28, 28, 3)") + bytes(n * 28 * 28 * 3)
    labels = np.arange(n) % 9
    path = save_with_member(tmp_path / "bomb.npz", "train_images", bomb, train_labels=labels)
    if lie is not None:  # the zip directory claims a small size
        size = struct.pack("<I", len(bomb))
        del bomb
        path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", lie)))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.npz: "):
        load_data(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_another_medmnist_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    path = SHARED / "breastmnist.npz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    assert main(["--data", str(path)]) == 2
    assert "not PathMNIST" in capsys.readouterr().err


def test_more_bytes_than_any_pathmnist_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "huge.npz")
    monkeypatch.setattr(analyze_data, "MAX_BYTES", 40_000)
    with pytest.raises(UserError, match=r"huge\.npz: train_images would grow"):
        load_data(path)


def test_100_fuzz_cases() -> None:
    command = [sys.executable, "tests/fuzz_npz.py", "--cases", "100", "--seed", "1"]
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split()[:2] == ["total", "100"]


# ---- finding ------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Empty places to search, and no network."""

    def no_network(target: Path) -> Path:
        raise UserError(f"{target}: download failed (no network)")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(analyze_data, "DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(analyze_data, "COURSE_FILE", tmp_path / "course" / "pathmnist.npz")
    monkeypatch.setattr(analyze_data, "download", no_network)
    paths = {
        "project": tmp_path / "data" / "pathmnist.npz",
        "cache": tmp_path / "home" / ".medmnist" / "pathmnist.npz",
        "course": tmp_path / "course" / "pathmnist.npz",
        "synthetic": tmp_path / "data" / "synthetic.npz",
    }
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths


def test_search_order(
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match=r"make_synthetic\.py.*no network"):
        analyze_data.find_data(None)
    save(places["synthetic"], synthetic=np.array(True))
    assert analyze_data.find_data(None) == places["synthetic"]
    banner = capsys.readouterr().err
    assert "SYNTHETIC DATA" in banner and "no network" in " ".join(banner.split("\n!! "))
    assert max(len(line) for line in banner.splitlines()) <= 100 + len(str(places["project"]))
    monkeypatch.setattr(analyze_data, "download", lambda target: target)
    assert analyze_data.find_data(None) == places["project"]
    for name in ("course", "cache", "project"):
        places[name].touch()
        assert analyze_data.find_data(None) == places[name]
    assert capsys.readouterr().err == ""


def test_data_flag(places: dict[str, Path]) -> None:
    path = places["cache"]
    with pytest.raises(UserError, match=r"holds no pathmnist\.npz"):
        analyze_data.find_data(str(path.parent))
    path.touch()
    assert analyze_data.find_data(str(path)) == path
    assert analyze_data.find_data(str(path.parent)) == path
    assert analyze_data.find_data("~/.medmnist") == path
    with pytest.raises(UserError, match="no such file"):
        analyze_data.find_data(str(path) + ".zip")


# ---- statistics, report and figures -------------------------------------------------------------


@pytest.mark.parametrize("size", [28, 224])
def test_channel_stats_equal_numpy(size: int) -> None:
    rng = np.random.default_rng(1)
    images = rng.integers((0, 50, 200), (256, 60, 210), (30, size, size, 3)).astype(np.uint8)
    mean, std = analyze_data.channel_stats(images)
    assert mean.dtype == std.dtype == np.float64
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-10)


def test_duplicates_by_hand() -> None:
    a, b, c, d = np.random.default_rng(2).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)
    images = {"train": np.stack([a, a, a, b, c]), "val": np.stack([c, d, d]), "test": a[None]}
    assert analyze_data.count_duplicates(images) == {
        "train": 2,
        "val": 1,
        "test": 0,
        "train-val": 1,
        "train-test": 1,
        "val-test": 0,
    }


@pytest.fixture
def synthetic(tmp_path: Path) -> PathData:
    return load_data(save(tmp_path / "s.npz", synthetic=np.array(True)))


def test_report(synthetic: PathData) -> None:
    lines = analyze_data.report(synthetic).splitlines()
    assert lines[0].startswith("SYNTHETIC DATA")
    assert f"md5            {synthetic.md5}" in lines
    assert "official file  no (synthetic)" in lines
    assert "images         28 x 28 x 3, uint8, 0 to 255" in lines
    rows = [" ".join(line.split()) for line in lines]
    assert "ADI adipose 2 11.1 % 1 11.1 % 2 20.0 %" in rows
    assert "BACK background 2 11.1 % 1 11.1 % 1 10.0 %" in rows
    assert "total 18 100.0 % 9 100.0 % 10 100.0 %" in rows
    mean = (synthetic.images["train"] / 255).mean(axis=(0, 1, 2))
    assert " ".join(["mean", *(f"{x:.4f}" for x in mean)]) in rows
    assert all(len(line) <= 100 for line in lines if not line.startswith("file"))


def test_figures_show_the_data(synthetic: PathData) -> None:
    grid = analyze_data.sample_grid(synthetic, columns=2).axes[0]
    canvas = grid.images[0].get_array()
    assert canvas.shape == (9 * 30 - 2, 2 * 30 - 2, 3)
    for row in range(9):  # each class has two images: both are shown, in its own row
        tiles = {canvas[row * 30 :][:28, x : x + 28].tobytes() for x in (0, 30)}
        images = synthetic.images["train"][synthetic.labels["train"] == row]
        assert tiles == {image.tobytes() for image in images}
    bars = analyze_data.class_distribution(synthetic).axes[0]
    widths = [bar.get_width() for bar in bars.containers[2]]
    np.testing.assert_allclose(widths, [20, 10, 10, 10, 10, 10, 10, 10, 10])
    for axes in (grid, bars):
        title = axes.get_title() or axes.figure.get_suptitle()
        assert title.startswith("SYNTHETIC")
        labels = [text.get_text().replace("\n", " ") for text in axes.get_yticklabels()]
        assert [label.rsplit(" (", 1)[0] for label in labels] == list(CLASS_NAMES)


@pytest.mark.parametrize(("kind", "said"), [("official", "PathMNIST:"), ("subset", "a subset:")])
def test_figures_say_how_much_of_the_data_they_show(
    synthetic: PathData, kind: str, said: str
) -> None:
    axes = analyze_data.class_distribution(replace(synthetic, kind=kind)).axes[0]
    assert said in axes.get_title()


def test_figure_text_lies_inside_the_figure(synthetic: PathData) -> None:
    for make in (analyze_data.sample_grid, analyze_data.class_distribution):
        figure = make(synthetic)
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()


def test_main_writes_both_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "good.npz")
    out = tmp_path / "new" / "figures"
    assert main(["--data", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for name in ("samples.png", "class_distribution.png"):
        assert str(out / name) in printed
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_main_refuses_an_out_that_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "good.npz")
    assert main(["--data", str(path), "--out", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out {path}: ") and error.count("\n") == 1
    assert load_data(path).counts == COUNTS


def test_a_wrong_flag_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--bogus"])
    assert stop.value.code == 2
    assert "--bogus" in only_line(capsys.readouterr().err)


def test_nobody_reads_the_description(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    path = save(tmp_path / "good.npz")
    command = [sys.executable, "analyze_data.py", "--data", path, "--out", tmp_path]
    process = subprocess.run(command, check=False, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, b"")


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> PathData:
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze_data, "load_data", interrupt)
    assert main(["--data", __file__]) == 130


def test_no_torch_is_imported() -> None:
    code = "import sys, analyze_data; print({'torch', 'matplotlib'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=ROOT, text=True).strip() == "set()"


def test_the_real_sample(capsys: pytest.CaptureFixture[str]) -> None:
    path = SHARED / "pathmnist_sample.npz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    data = load_data(path)
    assert data.counts == {"train": 800, "val": 200, "test": 359}
    assert data.md5 == "f051250fb28a273769b4472b7c6072ff"
    assert capsys.readouterr().err == ""
