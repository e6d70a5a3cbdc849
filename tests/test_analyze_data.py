"""Tests of analyze_data.py: python -m pytest tests/test_analyze_data.py"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT, SHARED, in_process, make_arrays, only_line
from fuzz_npz import fuzz
from PIL import Image

import analyze_data
import Figures
from analyze_data import SPLITS, find_data, load_data, main
from Common import SHORT_NAMES, UserError

COUNTS = {"train": 2, "val": 1, "test": 2}  # images per class
ARRAYS = make_arrays(COUNTS)
IMAGES, LABELS = ARRAYS["train_images"], ARRAYS["train_labels"]


def save(path, **changes):
    """Save valid arrays with some of them changed, or left out (None)."""
    arrays = ARRAYS | changes
    np.savez_compressed(path, **{key: a for key, a in arrays.items() if a is not None})
    return path


ODD = {  # other spellings of the same arrays
    "train_images": np.asfortranarray(IMAGES),
    "train_labels": LABELS[:, 0],
    "test_labels": LABELS.astype(">u8"),
    "note": np.array([{"object": 1}], object),  # ignored, and never unpickled
}


@pytest.mark.parametrize("changes", [{}, ODD, make_arrays(COUNTS, size=64)])
def test_a_good_file_is_read_as_it_is(changes, tmp_path, monkeypatch):
    path = save(tmp_path / "good.npz", **changes)
    data = load_data(path)
    arrays = ARRAYS | changes
    for split in SPLITS:
        images, labels = data.images[split], data.labels[split]
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert images.flags.c_contiguous
        np.testing.assert_array_equal(images, arrays[f"{split}_images"])
        np.testing.assert_array_equal(labels, arrays[f"{split}_labels"].ravel())
        assert data.counts[split] == 9 * COUNTS[split]
    assert data.md5 == hashlib.md5(path.read_bytes()).hexdigest()
    assert data.kind == "subset"
    monkeypatch.setitem(analyze_data.OFFICIAL_MD5, 28, data.md5)
    assert load_data(path).kind == "official"


BAD_ARRAYS = {  # what is said -> what is changed
    "no array val_labels": {"val_labels": None},
    "cannot be read": {"val_images": np.array([None], object)},
    "float64, not uint8": {"train_images": IMAGES / 255},
    "(18, 3, 28, 28)": {"train_images": IMAGES.transpose(0, 3, 1, 2)},
    "[28, 64]": {"test_images": np.zeros((18, 64, 64, 3), np.uint8)},
    "(17, 1)": {"train_labels": LABELS[1:]},
    "val is empty": {"val_images": IMAGES[:0], "val_labels": LABELS[:0]},
    "from 1 to 9": {"train_labels": LABELS + 1},
    "float64, not integer": {"train_labels": np.where(LABELS == 3, np.nan, LABELS)},
    "no image of class colorectal": {  # as in BloodMNIST, which has eight classes
        f"{split}_labels": ARRAYS[f"{split}_labels"].clip(0, 7) for split in SPLITS
    },
}
BAD_FILES = {  # what is said -> what makes the file
    "not an npz file": lambda path: path.write_text("hello\n"),
    "damaged": lambda path: path.write_bytes(save(path).read_bytes()[:-300]),
    "no pathmnist.npz in this folder": lambda path: path.mkdir(),
    "no such file": lambda path: None,
    "not a regular file": os.mkfifo,
}


@pytest.mark.parametrize("words", [*BAD_ARRAYS, *BAD_FILES])
def test_bad_files_are_refused_in_one_line(words, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("bad.npz")
    if words in BAD_FILES:
        BAD_FILES[words](path)
    else:
        save(path, **BAD_ARRAYS[words])
    before = os.listdir()
    status, out, err = in_process(main, capfd, "--data", path, "--out", "new")
    assert (status, out) == (2, "")
    for part in (words, "bad.npz", "; "):  # what is wrong, where, and the remedy
        assert part in only_line(err)
    assert os.listdir() == before


def test_errors_that_are_not_the_files(tmp_path, monkeypatch):
    path = save(tmp_path / "good.npz")
    monkeypatch.setattr(analyze_data, "check_split", Mock(side_effect=NameError))
    with pytest.raises(NameError):  # a fault of our own code shows its traceback
        load_data(path)
    monkeypatch.setattr(np, "load", Mock(side_effect=MemoryError))
    with pytest.raises(UserError, match="memory"):
        load_data(path)
    monkeypatch.setattr("builtins.open", Mock(side_effect=PermissionError))
    with pytest.raises(UserError, match="no permission"):
        load_data(path)


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED}")
def test_another_data_set_is_refused():
    with pytest.raises(UserError, match="breastmnist.*not PathMNIST"):
        load_data(SHARED / "breastmnist.npz")


def test_damaged_files_are_refused_or_read_right():
    outcomes = fuzz(cases=100, seed=1)
    assert outcomes["wrong"] == 0
    assert min(outcomes["refused"], outcomes["accepted"]) > 5


def test_where_data_is_found(tmp_path, monkeypatch):
    course = tmp_path / "course" / "p.npz"
    cache = tmp_path / ".medmnist" / "pathmnist.npz"
    project = tmp_path / "data" / "pathmnist.npz"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(analyze_data, "DATA_DIR", project.parent)
    monkeypatch.setattr(analyze_data, "COURSE_FILE", course)
    monkeypatch.setattr(analyze_data, "download", Mock(side_effect=UserError("no network")))
    with pytest.raises(UserError, match=r"no network.*make_synthetic\.py"):
        find_data(None)
    for path in (course, cache, project):  # in this order, each before the ones so far
        path.parent.mkdir()
        path.touch()
        assert find_data(None) == path
    for text in (str(cache), str(cache.parent), "~/.medmnist"):
        assert find_data(text) == cache


def test_channel_stats_equal_numpy():
    rng = np.random.default_rng(1)
    images = rng.integers((0, 50, 200), (256, 60, 210), (30, 224, 224, 3)).astype(np.uint8)
    mean, std = analyze_data.channel_stats(images)
    scaled = images / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-10)
    np.testing.assert_allclose(std, scaled.std(axis=(0, 1, 2)), rtol=1e-10)


def test_duplicates_by_hand():
    a, b, c, d = np.random.default_rng(2).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)
    images = {"train": np.stack([a, a, a, b, c]), "val": np.stack([c, d, d]), "test": a[None]}
    assert analyze_data.count_duplicates(images) == {
        "within train": 2,
        "within val": 1,
        "within test": 0,
        "in both train and val": 1,
        "in both train and test": 1,
        "in both val and test": 0,
    }


@pytest.fixture
def drawn(tmp_path):
    """Synthetic data whose test split has three images of the first class, one of the second."""
    labels = np.repeat(np.arange(9), (3, 1, 2, 2, 2, 2, 2, 2, 2))
    return load_data(save(tmp_path / "s.npz", synthetic=np.array(True), test_labels=labels))


def test_report(drawn):
    lines = analyze_data.report(drawn).splitlines()
    assert lines[0].startswith("SYNTHETIC DATA")
    rows = [" ".join(line.split()) for line in lines]
    mean = (drawn.images["train"] / 255).mean(axis=(0, 1, 2))
    for row in (
        f"md5 {drawn.md5}",
        "official file no (synthetic)",
        "ADI adipose 2 11.1% 1 11.1% 3 16.7%",
        "total 18 9 18",
        "mean " + " ".join(f"{value:.4f}" for value in mean),
    ):
        assert row in rows


def test_figures_show_the_data_and_say_what_it_is(drawn):
    images, labels = drawn.images["train"], drawn.labels["train"]
    samples = Figures.sample_grid(images, labels, "synthetic", columns=2)
    assert "SYNTHETIC" in samples.get_suptitle()
    for label, row in enumerate(np.reshape(samples.axes, (9, 2))):
        shown = {axes.images[0].get_array().tobytes() for axes in row}
        assert shown == {image.tobytes() for image in images[labels == label]}
        assert f"({SHORT_NAMES[label]})" in row[0].get_ylabel()
    distribution = Figures.class_distribution(drawn.labels, "subset")
    assert "subset" in distribution.get_suptitle()
    axes = distribution.axes[0]
    percent = [bar.get_width() for bar in axes.containers[2]]  # of test
    np.testing.assert_allclose(percent, np.bincount(drawn.labels["test"]) / 0.18)


def test_the_whole_program(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    path = save(Path("absent.npz"), train_labels=np.where(LABELS == 4, 5, LABELS))
    status, out, err = in_process(main, capfd, "--data", path, "--out", "new/figures")
    assert (status, err) == (0, "warning: absent.npz: no train image of class mucus\n")
    for name in ("samples", "class_distribution"):
        assert f"new/figures/{name}.png" in out
        Image.open(f"new/figures/{name}.png").load()
    photo = Path("new/figures/samples.png")  # the user's own, which must not be overwritten
    Image.new("RGB", (9, 9)).save(photo)
    before = photo.read_bytes()
    status, _, err = in_process(main, capfd, "--data", path, "--out", "new/figures")
    assert status == 2 and "samples.png: exists" in err
    assert photo.read_bytes() == before
    out += in_process(main, capfd, "--help")[1]
    assert max(map(len, out.splitlines())) <= 80
    status, _, err = in_process(main, capfd, "--data", save(path), "--out", path)
    assert status == 2
    assert "--out absent.npz: " in only_line(err)


def test_the_stored_path_is_good_in_any_folder(drawn, tmp_path, monkeypatch):
    for folder, stored in ((ROOT / "data", "data/s.npz"), (tmp_path, str(drawn.path))):
        monkeypatch.chdir(folder)
        path = Path("new", "..", "s.npz")
        assert replace(drawn, path=path).card["path"] == stored
