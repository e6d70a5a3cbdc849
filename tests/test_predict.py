"""Tests of classifying new tiles: python -m pytest tests/test_predict.py"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, make_arrays, only_line
from PIL import Image

import Figures
import Predict
import Training
from Common import CLASS_NAMES, SHORT_NAMES, UserError
from Images import open_image
from Runs import load_model

TILES = make_arrays({"test": 1})["test_images"]
TILE = TILES[0]


def save(path, array=TILE):
    """Save an array as an image."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def read_csv(folder):
    """Return the files, the classes and the probabilities (N, 9) in predictions.csv."""
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    files, classes, *probs = zip(*rows, strict=True)
    return list(files), list(classes), np.array(probs, float).T


def evaluated(run_dir, images):
    """Return the probabilities that the evaluation with eight views finds."""
    model, _ = load_model(run_dir, "cpu")
    batches = [(torch.from_numpy(images), torch.zeros(len(images)))]
    return Training.predict(model, batches, eight_views=True)[0]


def test_find_tiles(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    for name in ("b.png", "a.tif", ".hidden", ".git/index", "deep/er/c.txt", "out/old.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "also-deep").symlink_to("deep")  # shown once, in spite of a loop of links
    (folder / "deep" / "loop").symlink_to(folder)
    single, empty = tmp_path / "single.png", tmp_path / "empty"
    single.touch()
    empty.mkdir()
    found = [path.name for path in Predict.find_tiles([single, folder], folder / "out")]
    assert found == ["single.png", "a.tif", "b.png", "c.txt"]
    for path, said in ((empty, "no files"), (single / "x", "no such"), (folder, "--out .* lie")):
        with pytest.raises(UserError, match=said):
            Predict.find_tiles([path], folder)
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "denied", "deep")))
    with pytest.raises(UserError, match="deep: denied"):  # root may enter any folder
        Predict.find_tiles([folder], tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK"])
def test_images_are_read_as_pillow_shows_and_resizes_them(mode, tmp_path):
    for size in ((28, 28), (1, 1), (13, 500)):
        image = Image.fromarray(TILE).resize(size).convert(mode)
        image.save(tmp_path / "tile.tif")
        expected = image.convert("RGB").resize((28, 28), Image.Resampling.BILINEAR)
        tile = Predict.to_tile(open_image(tmp_path / "tile.tif"), 28)
        np.testing.assert_array_equal(tile, expected)


def test_transparent_pixels_are_white(tmp_path):
    array = np.dstack([TILE, np.full((28, 28), 255, np.uint8)])
    array[:10, :, 3] = 0
    tile = Predict.to_tile(open_image(save(tmp_path / "tile.png", array)), 28)
    assert (tile[:10] == 255).all()
    np.testing.assert_array_equal(tile[10:], TILE[10:])


def test_tiles_of_the_models_size_get_the_evaluations_probabilities(predict_cli, run_dir, tmp_path):
    checkpoint = torch.load(run_dir / "best.pt")
    checkpoint["identity"] |= {"size": 64, "kind": "synthetic"}
    torch.save(checkpoint, run_dir / "best.pt")
    images = make_arrays({"test": 2}, size=64)["test_images"]
    paths = [save(tmp_path / "tiles" / f"{i:02d}.png", image) for i, image in enumerate(images)]
    out_dir = tmp_path / "new" / "out"
    status, out, err = predict_cli(tmp_path / "tiles", "--run", run_dir, "--out", out_dir)
    assert status == 0
    assert "SYNTHETIC" in err
    assert str(out_dir / "predictions.csv") in out
    files, classes, probs = read_csv(out_dir)
    expected = evaluated(run_dir, images)
    assert files == [str(path) for path in paths]
    assert classes == [SHORT_NAMES[p.argmax()] for p in expected]
    assert probs == pytest.approx(expected, abs=1e-5)
    assert Image.open(out_dir / "predictions.png").width == 150 * Figures.WIDTH


def test_a_run_of_several_seeds_answers_as_their_ensemble(predict_cli, run_dir, tmp_path):
    runs = tmp_path / "runs"
    for name in ("seed0", "seed1"):
        shutil.copytree(run_dir, runs / name)
    settings = json.loads((run_dir / "config.json").read_text()) | {"seeds": [0, 1]}
    (runs / "config.json").write_text(json.dumps(settings))
    checkpoint = torch.load(run_dir / "best.pt")
    checkpoint["model"]["head.3.weight"].neg_()  # the opposite answers
    torch.save(checkpoint, runs / "seed1" / "best.pt")
    argv = [save(tmp_path / "tile.png"), "--run", runs, "--out", tmp_path / "out"]
    status, _, err = predict_cli(*argv)
    assert status == 2
    assert "not all of its seeds" in only_line(err)
    (runs / "summary.json").touch()
    status, out, _ = predict_cli(*argv)
    assert status == 0
    assert "ensemble of 2" in out
    answers = [evaluated(runs / name, TILE[None]) for name in ("seed0", "seed1")]
    assert read_csv(tmp_path / "out")[2] == pytest.approx(np.mean(answers, axis=0), abs=1e-5)


def test_the_terminal_shows_fifty_tiles_in_80_columns(predict_cli, tmp_path, capfd):
    probs = np.tile([0, 0, 0, 0, 0, 0, 0.21, 0, 0.79], (60, 1))
    files = [Path(f"{'x' * 40}{index}.png") for index in range(60)]
    Predict.write_predictions(files, probs, tmp_path / "predictions.csv")
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].split()[1:] == [*CLASS_NAMES[8].split(), "0.790", "NORM", "0.21"]
    assert "10 more" in lines[51]
    lines[52:] = predict_cli("--help")[1].splitlines()  # instead of the line with the path
    assert max(map(len, lines)) <= 80


def test_what_is_not_an_image_is_named_skipped_and_counted(
    predict_cli, run_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tiles = Path("tiles")
    good = save(tiles / "good.png")
    (tiles / "1.txt").write_text("no image")
    (tiles / "2.png").write_bytes(good.read_bytes()[:200])
    save(tiles / "3.png", np.zeros((28, 28), np.uint16))
    page = Image.fromarray(TILE)
    page.save(tiles / "4.tif", save_all=True, append_images=[page, page])
    (tiles / "5.png").symlink_to("/dev/null")  # or a pipe: reading that would wait for ever
    status, _, err = predict_cli(tiles, "--run", run_dir)
    assert status == 2
    *skipped, last = err.splitlines()
    reasons = ["identify", "truncated", "8 bits", "3 pages", "regular file"]
    for number, (line, reason) in enumerate(zip(skipped, reasons, strict=True), start=1):
        assert line.startswith(f"skipped tiles/{number}.")
        assert reason in line
    assert last.startswith("error: 5 of 6 files")
    assert read_csv(Path("predictions"))[0] == [str(good)]


def test_explain_draws_every_tile_and_leaves_the_users_files(
    predict_cli, run_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(save(tmp_path / "tiles" / "a.png").parent)
    names = ["y" * 250, os.fsdecode(b"\xff\xe9")]
    for name in names:
        save(Path(f"{name}.png"))
    out_dir = Path("predictions")
    users = [save(out_dir / "0001-TUM.png"), save(out_dir / "gradcam" / "0009-TUM.png")]
    for replaced in (False, True):
        status, out, err = predict_cli(".", "--explain", "--run", run_dir)
        assert (status, err) == (0, "")
        assert ("are replaced" in out) == replaced
    drawn = {path.stem for path in (out_dir / "gradcam").iterdir()}
    assert drawn == {"0000-a", "0001-" + "y" * 50, f"0002-{names[1]}", "0009-TUM"}
    for path in users:
        np.testing.assert_array_equal(Image.open(path), TILE)
    assert read_csv(out_dir)[0] == ["a.png", f"{names[0]}.png", r"\udcff\udce9.png"]


def test_explain_takes_few_tiles_at_a_time(run_dir, monkeypatch):
    model, _ = load_model(run_dir, "cpu")
    tiles = TILES[:5]
    classes = [3, 1, 4, 1, 5]
    expected = Predict.grad_cam(model, tiles, np.array(classes))
    monkeypatch.setattr(Training, "eval_batch", lambda size: 56 // size)
    monkeypatch.setattr(Predict, "grad_cam", Mock(wraps=Predict.grad_cam))
    np.testing.assert_allclose(
        Predict.explain(model, tiles, np.eye(9)[classes]), expected, atol=1e-4
    )
    assert [len(call.args[1]) for call in Predict.grad_cam.call_args_list] == [2, 2, 1]


def test_refused_in_one_line_before_anything_is_written(predict_cli, run_dir, tmp_path):
    unfinished = shutil.copytree(run_dir, tmp_path / "unfinished")
    (unfinished / "best.pt").unlink()
    tile = save(tmp_path / "tiles" / "1001-TUM.png")
    users = tmp_path / "predictions.csv"
    users.write_text("file,class,price\n")
    plot = save(tmp_path / "plots" / "predictions.png")
    before = sorted(tmp_path.rglob("*"))
    for run, out, said in (
        (unfinished, "out", str(unfinished / "best.pt")),
        (run_dir, users, str(users)),
        (run_dir, tile.parent, "lies there"),
        (run_dir, tmp_path, "predictions.csv: not written by this program"),
        (run_dir, plot.parent, "predictions.png: not written by this program"),
    ):
        status, printed, err = predict_cli(tile, "--run", run, "--out", out)
        assert (status, printed) == (2, "")
        assert said in only_line(err)
    assert sorted(tmp_path.rglob("*")) == before
    assert users.read_text() == "file,class,price\n"


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED}")
def test_the_committed_model_on_real_tiles_from_any_folder(tmp_path):
    command = [sys.executable, ROOT / "Predict.py", SHARED / "tiles"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    files, classes, _ = read_csv(tmp_path / "predictions")
    right = [Path(file).name.startswith(name) for file, name in zip(files, classes, strict=True)]
    assert len(right) == 5
    assert sum(right) >= 4
