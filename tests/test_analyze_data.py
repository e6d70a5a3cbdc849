"""Tests of analyze_data.py: python -m pytest tests/test_analyze_data.py"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock
from zipfile import ZipFile

import matplotlib.style
import numpy as np
import pytest
from conftest import ROOT, SHARED, in_process, make_arrays, only_line
from PIL import Image

import analyze_data
from analyze_data import SPLITS, PathData, find_data, load_data, main
from Common import CLASS_NAMES, UserError

COUNTS = {"train": 2, "val": 1, "test": 2}  # images per class
ARRAYS = make_arrays(COUNTS)
IMAGES, LABELS = ARRAYS["train_images"], ARRAYS["train_labels"]
EIGHT = {key: array.clip(0, 7) for key, array in ARRAYS.items() if key.endswith("labels")}


def save(path: Path, **changes: np.ndarray | None) -> Path:
    """Save valid arrays with some of them changed, or left out (None)."""
    arrays = ARRAYS | changes
    np.savez_compressed(path, **{key: a for key, a in arrays.items() if a is not None})
    return path


@pytest.mark.parametrize("size", [28, 64])
def test_a_good_file_is_read_as_it_is(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = make_arrays(COUNTS, size)
    path = save(tmp_path / "good.npz", **arrays)
    data, counts = load_data(path), {"train": 18, "val": 9, "test": 18}
    assert (data.path, data.size, data.counts, data.kind) == (path, size, counts, "subset")
    for split in SPLITS:
        assert (data.images[split].dtype, data.labels[split].dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(data.images[split], arrays[f"{split}_images"])
        np.testing.assert_array_equal(data.labels[split], arrays[f"{split}_labels"][:, 0])
    assert data.md5 == hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(analyze_data.OFFICIAL_MD5, size, data.md5)
    assert load_data(path).kind == "official"


@pytest.mark.parametrize(
    "changes",
    [{"train_labels": LABELS[:, 0]}, {"train_labels": LABELS.astype(">i4")}]
    + [{"train_labels": LABELS.astype(np.uint64)}, {"train_images": np.asfortranarray(IMAGES)}]
    + [{"note": np.array([{"object": 1}], object)}],  # ignored, and never unpickled
)
def test_other_spellings_of_the_same_data(tmp_path: Path, changes: dict) -> None:
    data = load_data(save(tmp_path / "good.npz", **changes))
    assert data.images["train"].flags.c_contiguous
    np.testing.assert_array_equal(data.images["train"], IMAGES)
    np.testing.assert_array_equal(data.labels["train"], LABELS[:, 0])


BAD: dict[str, tuple[Callable[[Path], object] | dict, str]] = {  # maker or changes, what is said
    "text": (lambda p: p.write_text("hello\n" * 99), "no npz file"),
    "cut": (lambda p: p.write_bytes(save(p).read_bytes()[:-300]), "damaged"),
    "npy": (lambda p: (np.save(p, IMAGES), os.rename(f"{p}.npy", p)), "npz file"),
    "folder": (lambda p: p.mkdir(), "--data"),
    "missing": (lambda p: None, "no such file"),
    "pipe": (lambda p: os.mkfifo(p), "not a regular file"),
    "no npy in it": (
        lambda p: ZipFile(save(p, val_labels=None), "a").writestr("val_labels.npy", b"no npy"),
        "than arrays",
    ),
    "no labels": ({"val_labels": None}, "no array val_labels"),
    "objects": ({"val_images": np.array([None], object)}, "cannot be read"),
    "float images": ({"train_images": IMAGES / 255}, "float64"),
    "grey": ({"train_images": IMAGES[..., 0]}, "(18, 28, 28)"),
    "NCHW": ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, "(18, 3, 28, 28)"),
    "not square": ({"test_images": IMAGES[:, :, :20]}, "(18, 28, 20, 3)"),
    "two sizes": ({"test_images": np.zeros((18, 64, 64, 3), "u1")}, "[28, 64]"),
    "unequal lengths": ({"train_labels": LABELS[1:]}, "(17, 1)"),
    "empty split": ({"val_images": IMAGES[:0], "val_labels": LABELS[:0]}, "val is empty"),
    "one-hot": ({"train_labels": np.eye(9, dtype="u1")[LABELS[:, 0]]}, "(18, 9)"),
    "negative label": ({"train_labels": LABELS.astype("i1") - 1}, "from -1 to 7"),
    "label 9": ({"train_labels": LABELS + 1}, "from 1 to 9"),
    "eight classes": (EIGHT, "no image of class colorectal"),  # as BloodMNIST's
    "NaN labels": ({"train_labels": np.where(LABELS == 3, np.nan, LABELS)}, "float64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(
    name: str, capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (bad, words), path = BAD[name], tmp_path / "bad.npz"
    bad(path) if callable(bad) else save(path, **bad)
    before = os.listdir()
    status, out, err = in_process(main, capfd, "--data", path, "--out", "new")
    assert (status, out) == (2, "") and words in only_line(err) and "bad.npz" in err
    assert "; " in err and len(err) < 400 + len(str(path))
    assert os.listdir() == before


def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path, user = save(tmp_path / "secret.npz"), os.geteuid()
    path.chmod(0)
    try:
        if user == 0:  # root may read anything, so be nobody for a moment
            os.seteuid(65534)
        with pytest.raises(UserError, match=r"secret\.npz: no permission"):
            load_data(path)
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED}")
def test_real_files() -> None:
    data = load_data(SHARED / "pathmnist_sample.npz")
    assert (data.kind, data.counts) == ("subset", {"train": 800, "val": 200, "test": 359})
    with pytest.raises(UserError, match="breastmnist.*not PathMNIST"):
        load_data(SHARED / "breastmnist.npz")


def test_100_fuzz_cases() -> None:
    command = [sys.executable, "tests/fuzz_npz.py", "--cases", "100", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    tried, refused, accepted = map(int, done.stdout.split()[-4:-1])
    assert done.returncode == 0 and tried == 100 and min(refused, accepted) > 5, done


def test_where_data_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("course/p.npz", ".medmnist/pathmnist.npz", "data/pathmnist.npz")
    course, cache, project = places = [tmp_path / name for name in names]
    for path in places:
        path.parent.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(analyze_data, "DATA_DIR", project.parent)
    monkeypatch.setattr(analyze_data, "COURSE_FILE", course)
    monkeypatch.setattr(analyze_data, "download", Mock(side_effect=UserError("no network")))
    with pytest.raises(UserError, match=r"make_synthetic\.py.*no network"):
        find_data(None)
    with pytest.raises(UserError, match=r"holds no pathmnist\.npz"):
        find_data(str(cache.parent))
    for path in (course, cache, project):  # in this order, each before the ones so far
        path.touch()
        assert find_data(None) == path
    for text in (str(cache), str(cache.parent), "~/.medmnist"):
        assert find_data(text) == cache


@pytest.mark.parametrize("size", [28, 224])
def test_channel_stats_equal_numpy(size: int) -> None:
    rng = np.random.default_rng(1)
    images = rng.integers((0, 50, 200), (256, 60, 210), (30, size, size, 3)).astype(np.uint8)
    mean, std = analyze_data.channel_stats(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-10)


def test_duplicates_by_hand() -> None:
    a, b, c, d = np.random.default_rng(2).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)
    images = {"train": np.stack([a, a, a, b, c]), "val": np.stack([c, d, d]), "test": a[None]}
    expected = {"train": 2, "val": 1, "test": 0, "train-val": 1, "train-test": 1, "val-test": 0}
    assert analyze_data.count_duplicates(images) == expected


@pytest.fixture
def drawn(tmp_path: Path) -> PathData:
    """Synthetic data whose test split has three images of the first class, one of the second."""
    labels = np.repeat(np.arange(9), (3, 1, 2, 2, 2, 2, 2, 2, 2))
    return load_data(save(tmp_path / "s.npz", synthetic=np.array(True), test_labels=labels))


def test_report(drawn: PathData) -> None:
    lines = analyze_data.report(drawn).splitlines()
    assert lines[0].startswith("SYNTHETIC DATA")
    rows = [" ".join(line.split()) for line in lines]
    assert f"md5 {drawn.md5}" in rows and "official file no (synthetic)" in rows
    assert "ADI adipose 2 11.1 % 1 11.1 % 3 16.7 %" in rows
    assert "total 18 100.0 % 9 100.0 % 18 100.0 %" in rows
    mean = (drawn.images["train"] / 255).mean(axis=(0, 1, 2))
    assert " ".join(["mean", *(f"{x:.4f}" for x in mean)]) in rows
    assert all(len(line) <= 100 for line in lines if not line.startswith("file"))


def test_figures_show_the_data(drawn: PathData) -> None:
    grid = analyze_data.sample_grid(drawn, columns=2).axes[0]
    canvas = grid.images[0].get_array()
    assert canvas.shape == (9 * 30 - 2, 2 * 30 - 2, 3)
    for row in range(9):  # each class has two images: both are shown, in its own row
        tiles = {canvas[row * 30 :][:28, x : x + 28].tobytes() for x in (0, 30)}
        images = drawn.images["train"][drawn.labels["train"] == row]
        assert tiles == {image.tobytes() for image in images}
    bars = analyze_data.class_distribution(drawn).axes[0]
    widths = [bar.get_width() for bar in bars.containers[2]]
    np.testing.assert_allclose(widths, np.array([3, 1, 2, 2, 2, 2, 2, 2, 2]) / 0.18)
    for axes in (grid, bars):
        labels = [text.get_text().replace("\n", " ") for text in axes.get_yticklabels()]
        assert [label.rsplit(" (", 1)[0] for label in labels] == list(CLASS_NAMES)


def test_figures_say_what_data_they_show_inside_the_figure(drawn: PathData) -> None:
    for kind, said in (("official", "MNIST:"), ("subset", "subset:"), ("synthetic", "SYNTHETIC")):
        for draw in (analyze_data.sample_grid, analyze_data.class_distribution):
            figure = draw(replace(drawn, kind=kind))
            assert said in figure.get_suptitle() + figure.axes[0].get_title("left")
            box = figure.get_tightbbox()
            assert box.min.min() >= 0 and (box.max <= figure.get_size_inches()).all()


def test_figures_are_written_whatever_the_users_matplotlib(
    capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = save(tmp_path / "absent.npz", train_labels=np.where(LABELS == 4, 5, LABELS))
    users = {"text.usetex": True, "savefig.bbox": "tight", "font.size": 40, "figure.dpi": 20}
    pictures = []
    for settings in ([], ["dark_background", users]):
        out = tmp_path / "new" / str(len(pictures))
        with matplotlib.style.context(settings):
            status, printed, err = in_process(main, capfd, "--data", path, "--out", out)
        assert (status, err) == (0, f"warning: {path}: no train image of class mucus\n")
        files = [out / "samples.png", out / "class_distribution.png"]
        assert all(str(file) in printed for file in files)
        pictures.append([file.read_bytes() for file in files])
    assert pictures[0] == pictures[1] and Image.open(files[0]).getpixel((0, 0))[0] == 255
    status, _, err = in_process(main, capfd, "--data", save(path), "--out", path)
    assert status == 2 and f"--out {path}: " in only_line(err) and load_data(path)


def test_the_stored_path_is_good_in_any_folder(
    drawn: PathData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, stored in ((ROOT / "data", "data/s.npz"), (tmp_path, str(drawn.path))):
        monkeypatch.chdir(folder)
        for path in (Path("s.npz"), folder / "s.npz", folder / "new" / ".." / "s.npz"):
            assert replace(drawn, path=path).card["path"] == stored


def test_it_starts_without_what_is_slow() -> None:
    code = "import sys, analyze_data; print({'torch', 'matplotlib', 'pooch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"
