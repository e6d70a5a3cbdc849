"""Tests of the tissue map of a slide: python -m pytest tests/test_slide.py"""

import csv
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import make_arrays, only_line
from PIL import Image

import Figures
import Slide
import Training
from Common import CLASS_NAMES, SHORT_NAMES
from Runs import load_model

# Five by nine tiles whose pixels are 4 micrometres.
TILES = make_arrays({"test": 5})["test_images"].reshape(9, 5, 28, 28, 3).swapaxes(0, 1)
MOSAIC = TILES.swapaxes(1, 2).reshape(5 * 28, 9 * 28, 3)


def save(path: Path, array: np.ndarray = MOSAIC, **options: object) -> Path:
    """Save an array as an image."""
    Image.fromarray(array).save(path, **options)
    return path


def read_map(folder: Path, name: str) -> tuple[np.ndarray, dict, list]:
    """Return the probabilities, all arrays, and the rows of the table of a map."""
    arrays = dict(np.load(folder / f"{name}-map.npz"))
    with open(folder / f"{name}-map.csv", encoding="utf-8", newline="") as file:
        return arrays["probabilities"], arrays, list(csv.DictReader(file))


def test_a_mosaic_of_tiles_gets_the_tiles_probabilities(predict_cli, run_dir, tmp_path):
    slide = save(tmp_path / "mosaic.png")
    status, out, err = predict_cli(slide, "--map", "--mpp", 4, "--run", run_dir, "--out", tmp_path)
    assert (status, err) == (0, "")
    assert "colorectal adenocarcinoma epithelium" in out
    probs, arrays, rows = read_map(tmp_path, "mosaic")
    assert probs.shape == (9, 17, 9)  # windows are half a tile apart
    model, _ = load_model(run_dir, "cpu")
    tiles = torch.from_numpy(TILES.reshape(-1, 28, 28, 3))
    expected, _ = Training.predict(model, [(tiles, torch.zeros(len(tiles)))])
    np.testing.assert_allclose(probs[::2, ::2].reshape(-1, 9), expected, atol=1e-5)
    assert arrays["classes"].tolist() == list(SHORT_NAMES)
    assert arrays["x_mm"][::2] == pytest.approx(0.056 + 0.112 * np.arange(9))
    assert arrays["y_mm"][::2] == pytest.approx(0.056 + 0.112 * np.arange(5))
    assert [row["class"] for row in rows] == list(CLASS_NAMES)
    areas = [float(row["area in mm2"]) for row in rows]
    # Half a window at the border is not the middle of any window.
    assert sum(areas) == pytest.approx((9 * 0.112 - 0.056) * (5 * 0.112 - 0.056), abs=1e-3)
    shares = [float(row["share of tissue"]) for row in rows if row["share of tissue"]]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert Image.open(tmp_path / "mosaic-map.png").width == 1050
    status, out, _ = predict_cli(slide, "--map", "--mpp", 4, "--run", run_dir, "--out", tmp_path)
    assert status == 0
    assert "an earlier map of this name is replaced" in out


def test_the_map_lies_over_the_slide_and_the_bar_has_its_length():
    probs = np.zeros((3, 5, 9))
    probs[..., 1] = 1
    probs[1, 2] = np.eye(9)[8]
    figure = Figures.map_figure(np.zeros((41, 65, 3), np.uint8), 0.26, probs, 0.056, ["x"] * 9)
    _, axes, _ = figure.axes
    image = axes.images[0]
    left, right, bottom, top = image.get_extent()
    assert ((right - left) / 5, (bottom - top) / 3) == pytest.approx((0.056, 0.056))
    assert (left, top) == pytest.approx((0.028, 0.028))  # half a tile is 0.056, the first centre
    tumour = image.get_array()[1, 2]
    assert matplotlib.colors.to_hex(tumour) == Figures.VERMILION.lower()
    bar, label = axes.lines[0], axes.texts[0]
    assert label.get_text() == f"{bar.get_xdata()[1]:g} mm" == "0.05 mm"
    assert label.get_window_extent().width > 20  # it is drawn


def test_the_scale_decides_and_may_come_from_the_file(predict_cli, run_dir, tmp_path):
    argv = ["--map", "--run", run_dir, "--out", tmp_path]
    slide = save(tmp_path / "a.png")
    assert predict_cli(slide, "--mpp", 4, *argv)[0] == 0
    # The same slide with twice as many pixels, each half as long; 12,700 dpi are 2 micrometres.
    double = MOSAIC.repeat(2, axis=0).repeat(2, axis=1)
    slide = save(tmp_path / "b.tif", double, dpi=(12700, 12700))
    status, out, _ = predict_cli(slide, *argv)
    assert status == 0
    assert "2 micrometres per pixel, as the file says" in out
    first, second = (read_map(tmp_path, name)[0] for name in "ab")
    assert first.shape == second.shape
    assert (first.argmax(2) == second.argmax(2)).mean() > 0.8  # resizing smooths a little


def test_empty_glass_is_background_and_several_models_are_an_ensemble(run_dir):
    model, _ = load_model(run_dir, "cpu")
    other, _ = load_model(run_dir, "cpu")
    with torch.no_grad():
        other.head[3].weight.neg_()
    slide = np.full((28, 56, 3), 240, np.uint8)
    slide[:, 28:] = TILES[0, 0]
    image = Image.fromarray(slide)
    alone, opposite, both = (
        Slide.classify_windows(image, 4, models, 28)
        for models in ([model], [other], [model, other])
    )
    np.testing.assert_array_equal(alone[0, 0], np.eye(9)[Slide.BACKGROUND])
    np.testing.assert_allclose(both, (alone + opposite) / 2, atol=1e-6)
    assert not np.allclose(alone, opposite)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_a_band_is_resized_as_a_tile_would_be(mode):
    image = Image.fromarray(MOSAIC).convert(mode)
    band = Slide.read_band(image, 7, 28, 126, 2.0)
    part = image.crop((0, 14, 252, 70)).convert("RGB")
    expected = part.resize((126, 28), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(band, expected)


def test_bad_slides_are_refused_in_one_line(predict_cli, run_dir, tmp_path, monkeypatch):
    slide = save(tmp_path / "slide.png")
    screen = save(tmp_path / "screen.png", dpi=(96, 96))
    text = tmp_path / "text.png"
    text.write_text("no image")
    mine = tmp_path / "mine" / "slide-map.csv"
    mine.parent.mkdir()
    mine.write_text("my own file")
    for path, argv, said in (
        (slide, ["--map"], "give it with --mpp"),
        (screen, ["--map"], "give it with --mpp"),
        (slide, ["--map", "--mpp", "0"], "--mpp: 0 is not between"),
        (slide, ["--map", "--mpp", "0.1"], "less than a tile of 0.112"),
        (slide, ["--mpp", "4"], "--mpp: only with --map"),
        (slide, ["--map", "--mpp", "4", "--explain"], "--explain: not with --map"),
        (slide, ["--map", "--mpp", "1000"], "longer than any glass"),
        (tmp_path, ["--map", "--mpp", "4"], "not a regular file"),
        (tmp_path / ("x" * 300), ["--map", "--mpp", "4"], "File name too long"),
        (text, ["--map", "--mpp", "4"], "cannot be read as a slide (cannot identify"),
        (tmp_path / "none.png", ["--map", "--mpp", "4"], "no such file; check the path"),
        (slide, ["--map", "--mpp", "4", "--out", mine.parent], "choose another --out"),
    ):
        status, _, err = predict_cli(path, "--run", run_dir, "--out", tmp_path / "out", *argv)
        assert status == 2
        assert said in only_line(err)
    assert mine.read_text() == "my own file"
    status, _, err = predict_cli(slide, screen, "--map", "--mpp", 4, "--run", run_dir)
    assert status == 2
    assert "needs one slide" in only_line(err)
    monkeypatch.setattr(Slide, "MAX_PIXELS", 1000)
    status, _, err = predict_cli(slide, "--map", "--mpp", 4, "--run", run_dir, "--out", tmp_path)
    assert status == 2
    assert "at most 1,000 pixels" in only_line(err)


def test_a_users_picture_is_noticed_before_anything_is_replaced(predict_cli, run_dir, tmp_path):
    slide, out = save(tmp_path / "slide.png"), tmp_path / "out"
    argv = [slide, "--map", "--mpp", 4, "--run", run_dir, "--out", out]
    assert predict_cli(*argv)[0] == 0
    (out / "slide-map.png").write_text("my own picture")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    status, _, err = predict_cli(*argv)
    assert status == 2
    assert "not a figure of this program" in only_line(err)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_figure_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    figure, path = matplotlib.figure.Figure(), tmp_path / "figure.png"
    Figures.save(figure, path)
    earlier = path.read_bytes()

    def fail(_figure, file, **_options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        Figures.save(figure, path)
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]


def test_without_map_a_slide_is_named(predict_cli, run_dir, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    save(slides / "long.png")
    shutil.copy(slides / "long.png", slides / "other.png")
    status, _, err = predict_cli(slides, "--run", run_dir, "--out", tmp_path / "out")
    assert status == 0
    assert "long.png: looks like a slide, not a tile (and 1 more); --map" in err
