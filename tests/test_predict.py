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
from matplotlib import colormaps
from PIL import Image

import Figures
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


def test_find_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single, folder, empty = (tmp_path / name for name in ("single.png", "folder", "empty"))
    names = ["b.png", "a.tif", ".hidden", ".git/index.png", "deep/c.jpg", "deep/er/d.jpg"]
    for name in (*names, "other.txt", "out/0000-b.png", "../elsewhere/e.png", "../single.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "also-deep").symlink_to("deep")  # shown once, as is what lies behind a loop of links
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    found = [path.name for path in Predict.find_tiles([single, folder], folder / "out")]
    assert found == ["single.png", "a.tif", "b.png", "other.txt", "c.jpg", "d.jpg", "e.png"]
    empty.mkdir()
    scans = [os.scandir(empty), os.scandir(folder), PermissionError(13, "denied", "deep")]
    monkeypatch.setattr(os, "scandir", Mock(side_effect=scans))  # root may enter any folder
    for path, said in ((empty, "no files"), (folder, "deep: denied"), (tmp_path, "--out .*choose")):
        with pytest.raises(UserError, match=said):
            Predict.find_tiles([path], tmp_path)


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
    rows, probs = read_csv(out_dir)
    expected, _ = predict(load_model(run_dir, "cpu")[0], make_loader(data, "test", 500), views=8)
    assert probs == pytest.approx(expected, abs=1e-5)
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    assert [row["class"] for row in rows] == [SHORT_NAMES[p.argmax()] for p in expected]
    first = f"{CLASS_NAMES[expected[0].argmax()]:36}  {expected[0].max():.3f}"
    assert first in out.splitlines()[1] and str(out_dir / "predictions.csv") in out
    assert (status, err) == (0, "") and Image.open(out_dir / "predictions.png").width == 7 * 150


@pytest.mark.parametrize("explain", [False, True])
def test_the_picture_shows_the_fifty_least_certain_tiles(explain: bool) -> None:
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (60, 28, 28, 3), dtype=np.uint8)
    probs = rng.dirichlet(np.ones(9), 60)
    heat = rng.random((60, 28, 28)) if explain else None
    figure = Figures.predictions_figure(tiles, probs, heat)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    for axes, index in zip(shown, np.argsort(probs.max(axis=1))[:50], strict=True):
        best = probs[index].argmax()
        assert (
            axes.get_title("left") == f"{index:04d}\n{SHORT_NAMES[best]} {probs[index, best]:.0%}"
        )
        image = axes.images[0].get_array()
        np.testing.assert_allclose(image[:, :28], tiles[index] / 255)
        if explain:
            heated = image[:, -28:] - tiles[index].mean(axis=2, keepdims=True) / 510
            np.testing.assert_allclose(2 * heated, colormaps["viridis"](heat[index])[..., :3])


def test_what_is_not_an_image_is_named_skipped_and_counted(
    predict_cli: Callable, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow warns, and refuses twice as many
    tiles, out_dir = tmp_path / "tiles", tmp_path / "out"
    arrays = {"a.png": picture(), "c.png": picture(50, 50), "d.png": picture(100, 100)}
    arrays |= {"f.png": np.full((28, 28), 200, "u2"), "g.tif": np.full((28, 28), np.nan, "f4")}
    for name, array in (arrays | {"h.tif": picture(30, 60)}).items():
        save(tiles / name, array)
    (tiles / "b.txt").write_text("no image")
    (tiles / "e.png").write_bytes((tiles / "a.png").read_bytes()[:200])
    pages = [Image.fromarray(picture() // k) for k in (1, 2, 3)]
    for name in ("i.tif", "j.gif"):
        pages[0].save(tiles / name, save_all=True, append_images=pages[1:])
    (tiles / "k.png").symlink_to("/dev/null")  # or a pipe: reading that would wait for ever
    status, _, err = predict_cli(tiles, "--run", run_dir, "--out", out_dir)
    *skipped, last = err.strip().splitlines()
    reasons = ["identify", "limit", "limit", "truncated", "8 bits", "8 bits", "3 pages", "3 pages"]
    for line, name, reason in zip(skipped, "bcdefgijk", [*reasons, "regular file"], strict=True):
        assert line.startswith(f"skipped {tiles / name}.") and reason in line
    assert status == 2 and last.startswith("error: 9 of 11 files")
    assert [Path(row["file"]).name for row in read_csv(out_dir)[0]] == ["a.png", "h.tif"]
    status, _, err = predict_cli(tiles / "nowhere.png", "--run", run_dir, "--out", out_dir)
    skipped, last = err.splitlines()
    assert status == 2 and "No such file" in skipped and "nowhere.png: not a readable" in last


def test_explain_draws_every_tile_and_runs_in_their_folder(
    predict_cli: Callable, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiles").mkdir()
    monkeypatch.chdir(tmp_path / "tiles")
    names, out_dir = ["y" * 250, os.fsdecode(b"\xff\xe9"), "a/x", "b/x"], Path("predictions")
    for name in names:
        save(Path(f"{name}.png"))
    for _ in range(2):  # the second time, results lie there
        status, out, err = predict_cli(".", "--explain", "--run", run_dir)
        assert (status, err) == (0, "") and str(out_dir / "0000-") in out
        pictures = sorted(path.stem for path in out_dir.glob("0*.png"))
        assert pictures == ["0000-" + "y" * 50, f"0001-{names[1]}", "0002-x", "0003-x"]
        assert read_csv(out_dir)[0][1]["file"] == r"\udcff\udce9.png"
    assert predict_cli("a", "--run", run_dir)[0] == 0 and list(out_dir.glob("0*.png")) == []
    tile = save(Path("0000-tile.png"))
    shutil.copy(out_dir / "predictions.csv", ".")  # results from before this was refused:
    status, _, err = predict_cli(".", "--run", run_dir, "--out", ".")
    assert status == 2 and "--out" in only_line(err) and tile.exists()


def test_a_run_of_several_seeds_answers_as_their_ensemble(
    predict_cli: Callable, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, out_dir = tmp_path / "runs", tmp_path / "out"
    for seed in (0, 1):
        shutil.copytree(run_dir, runs / f"seed{seed}")
    settings = json.loads((run_dir / "config.json").read_text()) | {"seeds": [0, 1]}
    (runs / "config.json").write_text(json.dumps(settings))
    checkpoint = torch.load(runs / "seed1" / "best.pt")
    checkpoint["model"]["head.3.weight"].neg_()  # the opposite answers
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
    assert both == pytest.approx((first + other) / 2, abs=1e-5) and first.argmax() != other.argmax()
    assert Predict.grad_cam.call_args.args[2] == both.argmax()


def test_the_models_own_size(predict_cli: Callable, run_dir: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run_dir / "best.pt")
    checkpoint["identity"] |= {"size": 64, "kind": "synthetic"}
    torch.save(checkpoint, run_dir / "best.pt")
    save(tmp_path / "tile.png", image := make_arrays({"test": 1}, size=64)["test_images"][4])
    status, _, err = predict_cli(tmp_path / "tile.png", "--run", run_dir, "--out", tmp_path)
    assert status == 0 and "SYNTHETIC" in err
    batch = [(torch.from_numpy(image[None]), torch.zeros(1))]
    expected, _ = predict(load_model(run_dir, "cpu")[0], batch, views=8)
    assert read_csv(tmp_path)[1] == pytest.approx(expected, abs=1e-5)


def test_what_is_missing_is_said_before_anything_is_computed(
    predict_cli: Callable, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predict, "predict", None)
    tile, run = save(tmp_path / "tile.png"), ["--run", run_dir]
    for argv, said in (
        ([tile, "--run", tmp_path], f"{tmp_path / 'best.pt'}: "),
        ([tile, "--out", tile, *run], str(tile)),
        ([tile, "--out", "/proc", *run], "/proc/"),  # nobody can write there
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
