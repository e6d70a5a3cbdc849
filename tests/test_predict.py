"""Tests of classifying new tiles: python -m pytest tests/test_predict.py"""

import csv
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, make_arrays, only_line
from PIL import Image

import PathMNIST
from analyze_data import CLASS_NAMES, SHORT_NAMES, UserError
from PathMNIST import find_tiles, load_model, make_loader, read_tile
from Training import predict


def picture(height: int = 28, width: int = 28, channels: int = 3) -> np.ndarray:
    """A smooth picture, uint8 (height, width, channels), that JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 80 * np.sin(y / (5 + c)) + 40 * np.cos(x / (7 + c)) for c in range(channels)]
    return np.stack(waves, axis=2).clip(0, 255).astype(np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    """Save a picture, converted to a mode."""
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def read_csv(folder: Path) -> list[dict]:
    """Read predictions.csv."""
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def probabilities(row: dict) -> list[float]:
    """Return a row's nine probabilities."""
    return [float(row[name]) for name in SHORT_NAMES]


# ---- finding and reading ------------------------------------------------------------------------


def test_find_tiles(tmp_path: Path) -> None:
    for name in ("b.png", "a.tif", ".hidden", ".git/index.png", "deep/er/c.jpg", "other.txt"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    single = tmp_path / "single.png"
    single.touch()
    found = find_tiles([single, tmp_path / "folder"])
    expected = ["single.png", "a.tif", "b.png", "c.jpg", "other.txt"]
    assert [path.name for path in found] == expected
    with pytest.raises(UserError, match="nowhere: no such file"):
        find_tiles([single, tmp_path / "nowhere"])
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with pytest.raises(UserError, match="pipe: no such file"):
        find_tiles([tmp_path / "pipe"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no files"):
        find_tiles([tmp_path / "empty"])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_lossless_files_are_read_as_they_are(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"tile{suffix}", picture())
    tile = read_tile(path, 28)
    assert tile.dtype == np.uint8 and np.array_equal(tile, picture())


def test_jpeg_is_read_nearly_as_it_is(tmp_path: Path) -> None:
    tile = read_tile(save(tmp_path / "tile.jpg", picture()), 28).astype(int)
    assert np.abs(tile - picture()).mean() < 6


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [("L", ".png", 0), ("LA", ".png", 0), ("1", ".png", 0), ("RGBA", ".png", 0)]
    + [("RGBA", ".tif", 0), ("P", ".png", 0), ("CMYK", ".tif", 2), ("CMYK", ".jpg", 20)]
    + [("L", ".jpg", 20), ("I", ".tif", 0)],
)
def test_modes_are_read_as_pillow_shows_them(
    tmp_path: Path, mode: str, suffix: str, tolerance: int
) -> None:
    path = save(tmp_path / f"tile{suffix}", picture(), mode)
    shown = Image.fromarray(picture()).convert(mode).convert("RGB")
    difference = np.abs(read_tile(path, 28).astype(int) - np.asarray(shown))
    assert difference.mean() <= tolerance


def test_sixteen_bit_greys_are_scaled(tmp_path: Path) -> None:
    grey = picture(channels=1)[..., 0]
    path = tmp_path / "tile.png"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I;16")
    difference = read_tile(path, 28).astype(int) - grey[..., None]
    assert np.abs(difference).max() <= 1


def test_dark_sixteen_bit_greys_stay_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((28, 28), 200, np.uint16)).save(tmp_path / "dark.tif")
    assert read_tile(tmp_path / "dark.tif", 28).max() == 0  # 200 of 65,535


def test_pixels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((28, 28), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="not a number"):
        read_tile(tmp_path / "nan.tif", 28)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    array = np.concatenate([picture(), np.full((28, 28, 1), 255, np.uint8)], axis=2)
    array[:10, :, 3] = 0
    tile = read_tile(save(tmp_path / "tile.png", array), 28)
    assert (tile[:10] == 255).all()
    assert np.array_equal(tile[10:], picture()[10:])

    image = Image.fromarray(picture()).quantize(8)
    image.info["transparency"] = 0
    image.save(tmp_path / "palette.png", transparency=0)
    tile = read_tile(tmp_path / "palette.png", 28)
    assert (tile[np.asarray(image) == 0] == 255).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (28, 28), (64, 64), (13, 500), (300, 20)])
def test_any_size_is_resized_bilinearly(tmp_path: Path, height: int, width: int) -> None:
    path = save(tmp_path / "tile.png", picture(height, width))
    expected = Image.fromarray(picture(height, width)).resize((28, 28), Image.Resampling.BILINEAR)
    assert np.array_equal(read_tile(path, 28), np.asarray(expected))


def test_real_tiles_are_resized_as_pathmnist_was_made() -> None:
    tiles = sorted((SHARED / "tiles").glob("*.tif"))
    if not tiles:
        pytest.skip(f"{SHARED / 'tiles'} is not there")
    sample = SHARED / "pathmnist_sample.npz"
    for path in tiles:
        with Image.open(path) as image:
            assert image.size == (224, 224)
            expected = image.convert("RGB").resize((28, 28), Image.Resampling.BILINEAR)
        assert np.array_equal(read_tile(path, 28), np.asarray(expected))
    if sample.exists():
        known = {image.tobytes() for image in np.load(sample)["test_images"]}
        print(sum(read_tile(path, 28).tobytes() in known for path in tiles), "are in the sample")


def bomb(width: int, height: int) -> bytes:
    """Return a PNG file that claims to be large; a few bytes long."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("side", [10_000, 50_000])  # Pillow warns of the one, refuses the other
def test_an_absurdly_large_image_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    with pytest.raises((Image.DecompressionBombWarning, Image.DecompressionBombError)):
        read_tile(path, 28)


# ---- classifying --------------------------------------------------------------------------------


def test_the_datas_own_tiles_get_the_evaluations_probabilities(
    cli: Callable, run_dir: Path, data: object, tmp_path: Path
) -> None:
    for index, image in enumerate(data.images["test"]):
        save(tmp_path / "tiles" / f"{index:03d}.png", image)
    out_dir = tmp_path / "out"
    status, out, err = cli(
        "--predict", tmp_path / "tiles", "--checkpoint", run_dir, "--log-dir", out_dir
    )
    assert (status, err) == (0, "")
    rows = read_csv(out_dir)
    names = [str(tmp_path / "tiles" / f"{i:03d}.png") for i in range(len(data.labels["test"]))]
    assert [row["file"] for row in rows] == names
    model, _ = load_model(run_dir, "cpu")
    expected, _ = predict(model, make_loader(data, "test", 500), views=8)
    assert np.abs(np.array([probabilities(row) for row in rows]) - expected).max() < 1e-5
    for row, p in zip(rows, expected, strict=True):
        assert row["class"] == SHORT_NAMES[p.argmax()]
        assert sum(probabilities(row)) == pytest.approx(1, abs=1e-5)

    table = out.splitlines()
    assert table[0].split() == ["file", "class", "prob.", "second"]
    second, first = np.argsort(expected[0])[-2:]
    line = next(line for line in table if line.startswith("000.png"))
    assert CLASS_NAMES[first] in line and f"{expected[0][first]:.3f}" in line
    assert line.endswith(f"{SHORT_NAMES[second]} {expected[0][second]:.3f}")
    assert str(out_dir / "predictions.csv") in out


def test_what_is_not_an_image_is_named_skipped_and_counted(
    cli: Callable, run_dir: Path, tmp_path: Path
) -> None:
    tiles = tmp_path / "tiles"
    save(tiles / "a.png", picture())
    (tiles / "b.txt").write_text("no image")
    (tiles / "c.png").write_bytes(bomb(50_000, 50_000))
    (tiles / "d.png").write_bytes((tiles / "a.png").read_bytes()[:200])
    (tiles / "e.png").write_bytes(b"")
    save(tiles / "z.tif", picture(50, 60))
    argv = ["--predict", tiles, "--checkpoint", run_dir, "--log-dir", tmp_path / "out"]
    status, _, err = cli(*argv)
    assert status == 2 and "Traceback" not in err
    *skipped, last = err.strip().splitlines()
    reasons = {"b.txt": "identify", "c.png": "exceeds limit", "d.png": "truncated", "e.png": ""}
    for line, (name, reason) in zip(skipped, reasons.items(), strict=True):
        assert line.startswith(f"skipped {tiles / name}: ") and reason in line
    assert last.startswith("error: 4 of 6 files")
    assert [Path(row["file"]).name for row in read_csv(tmp_path / "out")] == ["a.png", "z.tif"]


def test_nothing_but_unreadable_files(cli: Callable, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("no image")
    argv = ["--predict", tmp_path / "b.txt", "--checkpoint", run_dir, "--log-dir", tmp_path / "out"]
    status, _, err = cli(*argv)
    assert status == 2 and "1 of 1" in err and "Traceback" not in err
    assert read_csv(tmp_path / "out") == []


def test_explain_writes_a_picture_of_every_tile(
    cli: Callable, run_dir: Path, tmp_path: Path
) -> None:
    paths = [save(tmp_path / name, picture()) for name in ("a/x.png", "b/x.png", "b/x.tif")]
    argv = ["--checkpoint", run_dir, "--log-dir", tmp_path / "out", "--explain"]
    status, out, err = cli("--predict", *paths, *argv)
    assert (status, err) == (0, "") and str(tmp_path / "out" / "0000-*.png") in out
    pictures = list((tmp_path / "out").glob("*.png"))
    assert len(pictures) == 3  # of three tiles, though their names are alike
    for path in pictures:
        with Image.open(path) as image:
            assert min(image.size) > 200


def test_a_run_of_several_seeds_answers_as_their_ensemble(
    cli: Callable, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = [save(tmp_path / f"{i}.png", picture()) for i in range(2)]
    for seed in (0, 1, 2):  # the last is none of the run's own
        shutil.copytree(run_dir, tmp_path / "runs" / f"seed{seed}")
    settings = json.loads((run_dir / "config.json").read_text()) | {"seeds": [0, 1]}
    (tmp_path / "runs" / "config.json").write_text(json.dumps(settings))
    second = tmp_path / "runs" / "seed1" / "best.pt"
    checkpoint = torch.load(second, weights_only=True)
    checkpoint["model"]["head.4.bias"] += torch.arange(9.0)
    torch.save(checkpoint, second)
    argv = ["--predict", *tiles, "--checkpoint", tmp_path / "runs", "--log-dir", tmp_path / "out"]
    status, _, err = cli(*argv)
    assert status == 2 and "not all of its seeds are trained" in only_line(err)
    (tmp_path / "runs" / "summary.json").touch()
    answers, maps = [], []
    real = PathMNIST.Evaluation.grad_cam

    def grad_cam(model: object, images: object, layer: object, classes: object) -> np.ndarray:
        maps.append([real(model, images, layer, [label] * 2) for label in range(9)])
        return real(model, images, layer, classes)

    monkeypatch.setattr(PathMNIST.Evaluation, "grad_cam", grad_cam)
    for run in ("runs/seed0", "runs/seed1", "runs"):
        argv[-3] = tmp_path / run
        status, out, _ = cli(*argv, "--explain")
        assert status == 0 and ("ensemble of 2" in out) == (run == "runs")
        answers.append([probabilities(row) for row in read_csv(tmp_path / "out")])
    first, other, both = np.array(answers)
    assert np.abs(first - other).max() > 0.01
    assert np.array_equal(maps[2], maps[0])  # the first model's, for whatever class
    assert both == pytest.approx((first + other) / 2, abs=1e-5)

    checkpoint["identity"]["md5"] = "of other data"
    torch.save(checkpoint, second)
    status, _, err = cli(*argv)
    assert status == 2 and "not of one model and one data set" in only_line(err)
    second.unlink()
    status, _, err = cli(*argv)
    assert status == 2 and f"{second}: no such checkpoint" in only_line(err)


def test_the_models_own_size_is_used(cli: Callable, run_dir: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run_dir / "best.pt", weights_only=True)
    checkpoint["identity"]["size"] = 64
    torch.save(checkpoint, run_dir / "best.pt")
    image = make_arrays({"test": 1}, size=64)["test_images"][4]
    path = save(tmp_path / "tile.png", image)
    status, _, _ = cli("--predict", path, "--checkpoint", run_dir, "--log-dir", tmp_path / "out")
    assert status == 0
    model, _ = load_model(run_dir, "cpu")
    batch = [(torch.from_numpy(image[None]), torch.zeros(1))]
    (expected,), _ = predict(model, batch, views=8)
    assert probabilities(read_csv(tmp_path / "out")[0]) == pytest.approx(expected, abs=1e-5)


def test_a_missing_checkpoint_is_said_in_one_line(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = save(tmp_path / "tile.png", picture())
    monkeypatch.setattr(PathMNIST, "BEST", tmp_path / "runs" / "best")
    monkeypatch.chdir(tmp_path)
    for more, place in (([], "runs/best"), (["--checkpoint", tmp_path], "best.pt")):
        status, _, err = cli("--predict", tile, *more)
        assert status == 2 and place in only_line(err)


def test_missing_tiles_and_a_bad_folder_are_said_in_one_line(
    cli: Callable, run_dir: Path, tmp_path: Path
) -> None:
    tile = save(tmp_path / "tile.png", picture())
    for argv, said in (
        (["--predict", tmp_path / "nowhere.png"], "nowhere.png"),
        (["--predict", tile, "--log-dir", tile], "tile.png"),
        (["--predict", tile, "--epochs", "3"], "--epochs"),
    ):
        status, _, err = cli(*argv, "--checkpoint", run_dir)
        assert status == 2 and said in only_line(err)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses such names")
def test_names_that_are_not_utf8(cli: Callable, run_dir: Path, tmp_path: Path) -> None:
    tiles = tmp_path / "tiles"
    save(tiles / "a.png", picture()).rename(os.fsdecode(bytes(tiles) + b"/\xff\xe9.png"))
    status, out, _ = cli("--predict", tiles, "--checkpoint", run_dir, "--log-dir", tmp_path / "out")
    assert status == 0 and r"\udcff\udce9.png" in out
    assert read_csv(tmp_path / "out")[0]["file"].endswith(r"\udcff\udce9.png")


def test_explain_with_a_long_name(cli: Callable, run_dir: Path, tmp_path: Path) -> None:
    tile, out = save(tmp_path / f"{'x' * 250}.png", picture()), tmp_path / "out"
    status, _, _ = cli("--predict", tile, "--explain", "--checkpoint", run_dir, "--log-dir", out)
    assert status == 0
    assert [path.name for path in out.glob("*.png")] == [f"0000-{'x' * 50}.png"]


def test_the_terminal_shows_fifty_tiles_and_says_how_many_more(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    probs = np.eye(9, dtype=np.float32)[3]
    path = tmp_path / "predictions.csv"
    PathMNIST.write_predictions([(Path(f"{i}.png"), probs) for i in range(52)], path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 50 + 2 and lines[50].startswith("49.png")
    assert lines[-2:] == ["... and 2 more", f"All nine probabilities of 52 tiles: {path}"]
    assert len(read_csv(tmp_path)) == 52
