"""Tests of classifying new tiles: python -m pytest tests/test_predict.py"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, make_arrays, only_line
from PIL import Image

import Predict
from analyze_data import PathData
from Common import CLASS_NAMES, SHORT_NAMES, UserError
from PathMNIST import make_loader
from Runs import load_model
from Training import predict


def picture(height: int = 28, width: int = 28) -> np.ndarray:
    """A smooth picture, uint8 (height, width, 3), that JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 80 * np.sin(y / (5 + c)) + 40 * np.cos(x / (7 + c)) for c in range(3)]
    return np.stack(waves, axis=2).clip(0, 255).astype(np.uint8)


def save(path: Path, array: np.ndarray | None = None) -> Path:
    """Save an image: a picture, or another array."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(picture() if array is None else array).save(path)
    return path


def read_csv(folder: Path) -> tuple[list[dict], np.ndarray]:
    """Return the rows of predictions.csv, and the probabilities in them, float64 (N, 9)."""
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, np.array([[float(row[name]) for name in SHORT_NAMES] for row in rows])


def test_find_tiles(tmp_path: Path) -> None:
    single, folder = save(tmp_path / "single.png"), tmp_path / "folder"
    for name in ("b.png", "a.tif", ".hidden", ".git/index.png", "deep/er/c.jpg", "other.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = [path.name for path in Predict.find_tiles([single, folder])]
    assert found == ["single.png", "a.tif", "b.png", "c.jpg", "other.txt"]
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for name, said in (("nowhere", "no such"), ("pipe", "no such"), ("empty", "no files")):
        with pytest.raises(UserError, match=f"{name}: {said}"):
            Predict.find_tiles([tmp_path / name])


LOSSY = {"RGB.jpg": 6, "CMYK.jpg": 20, "CMYK.tif": 2}  # mean difference that is allowed
KINDS = ["RGB.png", "RGB.tif", "RGB.bmp", "L.png", "LA.png", "1.png", "RGBA.png", "P.png", *LOSSY]


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_read_as_pillow_shows_and_resizes_them(kind: str, tmp_path: Path) -> None:
    for height, width in ((28, 28), (1, 1), (64, 64), (13, 500), (300, 20)):
        image = Image.fromarray(picture(height, width)).convert(kind.split(".")[0])
        image.save(tmp_path / kind)
        tile = Predict.read_tile(tmp_path / kind, 28)
        expected = np.asarray(image.convert("RGB").resize((28, 28), Image.Resampling.BILINEAR))
        assert tile.dtype == np.uint8 and tile.shape == (28, 28, 3)
        assert np.abs(tile.astype(int) - expected).mean() <= LOSSY.get(kind, 0)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    array = np.concatenate([picture(), np.full((28, 28, 1), 255, np.uint8)], axis=2)
    array[:10, :, 3] = 0
    tile = Predict.read_tile(save(tmp_path / "tile.png", array), 28)
    assert (tile[:10] == 255).all() and np.array_equal(tile[10:], picture()[10:])
    palette = Image.fromarray(picture()).quantize(8)
    palette.save(tmp_path / "tile.png", transparency=0)
    assert (Predict.read_tile(tmp_path / "tile.png", 28)[np.asarray(palette) == 0] == 255).all()


def test_the_datas_own_tiles_get_the_evaluations_probabilities(
    predict_cli: Callable, run_dir: Path, data: PathData, tmp_path: Path
) -> None:
    tiles, out_dir = tmp_path / "tiles", tmp_path / "new" / "out"
    paths = [save(tiles / f"{i:03d}.png", image) for i, image in enumerate(data.images["test"])]
    status, out, err = predict_cli(tiles, "--run", run_dir, "--out", out_dir)
    assert (status, err) == (0, "")
    rows, probs = read_csv(out_dir)
    expected, _ = predict(load_model(run_dir, "cpu")[0], make_loader(data, "test", 500), views=8)
    assert np.abs(probs - expected).max() < 1e-5
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    assert [row["class"] for row in rows] == [SHORT_NAMES[p.argmax()] for p in expected]
    best = expected[0].argmax()
    assert f"{CLASS_NAMES[best]:36}  {expected[0][best]:.3f}" in out.splitlines()[1]
    assert str(out_dir / "predictions.csv") in out


def test_what_is_not_an_image_is_named_skipped_and_counted(
    predict_cli: Callable, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns, and refuses twice as many
    tiles, out_dir = tmp_path / "tiles", tmp_path / "out"
    cut = save(tiles / "a.png").read_bytes()[:200]
    (tiles / "b.txt").write_text("no image")
    save(tiles / "c.png", picture(50, 50))
    save(tiles / "d.png", picture(100, 100))
    (tiles / "e.png").write_bytes(cut)
    save(tiles / "f.png", np.full((28, 28), 200, np.uint16))
    save(tiles / "g.tif", np.full((28, 28), np.nan, np.float32))
    save(tiles / "h.tif", picture(30, 60))
    status, _, err = predict_cli(tiles, "--run", run_dir, "--out", out_dir)
    *skipped, last = err.strip().splitlines()
    reasons = ("identify", "limit", "limit", "truncated", "8 bits", "8 bits")
    for line, name, reason in zip(skipped, "bcdefg", reasons, strict=True):
        assert line.startswith(f"skipped {tiles / name}.") and reason in line
    assert status == 2 and last.startswith("error: 6 of 8 files")
    assert [Path(row["file"]).name for row in read_csv(out_dir)[0]] == ["a.png", "h.tif"]
    status, _, err = predict_cli(tiles / "b.txt", "--run", run_dir, "--out", out_dir)
    assert status == 2 and "b.txt: not a readable image" in err.splitlines()[-1]


def test_explain_draws_every_tile(predict_cli: Callable, run_dir: Path, tmp_path: Path) -> None:
    names = ("a/x.png", "b/x.png", "y" * 250 + ".png", os.fsdecode(b"\xff\xe9.png"))
    paths, out_dir = [save(tmp_path / name) for name in names], tmp_path / "out"
    status, out, err = predict_cli(*paths, "--explain", "--run", run_dir, "--out", out_dir)
    assert (status, err) == (0, "") and str(out_dir / "0000-*.png") in out
    pictures = sorted(out_dir.glob("*.png"))
    expected = ["0000-x", "0001-x", "0002-" + "y" * 50, "0003-" + os.fsdecode(b"\xff\xe9")]
    assert [path.stem for path in pictures] == expected
    with Image.open(pictures[2]) as image:
        assert min(image.size) > 200
    assert read_csv(out_dir)[0][3]["file"] == rf"{tmp_path}/\udcff\udce9.png"


def test_a_run_of_several_seeds_answers_as_their_ensemble(
    predict_cli: Callable, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, out_dir = tmp_path / "runs", tmp_path / "out"
    for seed in (0, 1):
        shutil.copytree(run_dir, runs / f"seed{seed}")
    settings = json.loads((run_dir / "config.json").read_text()) | {"seeds": [0, 1]}
    (runs / "config.json").write_text(json.dumps(settings))
    checkpoint = torch.load(runs / "seed1" / "best.pt")
    checkpoint["model"]["head.4.weight"].neg_()  # the opposite answers
    torch.save(checkpoint, runs / "seed1" / "best.pt")
    argv = [save(tmp_path / "tile.png"), "--explain", "--out", out_dir, "--run"]
    status, _, err = predict_cli(*argv, runs)
    assert status == 2 and "not all of its seeds are trained" in only_line(err)
    (runs / "summary.json").touch()
    monkeypatch.setattr(Predict, "grad_cam", Mock(wraps=Predict.grad_cam))
    answers = []
    for run in (runs / "seed0", runs / "seed1", runs):
        status, out, _ = predict_cli(*argv, run)
        assert status == 0 and ("ensemble of 2" in out) == (run == runs)
        answers += list(read_csv(out_dir)[1])
    first, other, both = answers
    assert first.argmax() != other.argmax()
    assert both == pytest.approx((first + other) / 2, abs=1e-5)
    assert Predict.grad_cam.call_args.args[2] == both.argmax()


def test_the_models_own_size(predict_cli: Callable, run_dir: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run_dir / "best.pt")
    checkpoint["identity"] |= {"size": 64, "kind": "synthetic"}
    torch.save(checkpoint, run_dir / "best.pt")
    image = make_arrays({"test": 1}, size=64)["test_images"][4]
    tile = save(tmp_path / "tile.png", image)
    status, _, err = predict_cli(tile, "--run", run_dir, "--out", tmp_path)
    assert status == 0 and "SYNTHETIC" in err
    batch = [(torch.from_numpy(image[None]), torch.zeros(1))]
    expected, _ = predict(load_model(run_dir, "cpu")[0], batch, views=8)
    assert read_csv(tmp_path)[1] == pytest.approx(expected, abs=1e-5)


def test_what_is_missing(predict_cli: Callable, run_dir: Path, tmp_path: Path) -> None:
    tile, run = save(tmp_path / "tile.png"), ["--run", run_dir]
    for argv, said in (
        ([], "PATH"),
        ([tile, "--run", tmp_path], f"{tmp_path / 'best.pt'}: "),
        ([tmp_path / "nowhere.png", *run], "nowhere.png: no such file"),
        ([tile, "--out", tile, *run], str(tile)),
    ):
        status, _, err = predict_cli(*argv)
        assert status == 2 and said in only_line(err)


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED}")
def test_the_committed_model_on_real_tiles_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "Predict.py", SHARED / "tiles"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    rows, _ = read_csv(tmp_path / "predictions")
    right = sum(row["class"] == Path(row["file"]).name.split("-")[0] for row in rows)
    assert len(rows) == 5 and right >= 4
