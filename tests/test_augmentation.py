"""Tests of Augmentation.py: python -m pytest tests/test_augmentation.py"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

import Augmentation
from Augmentation import augment, random_view, to_float
from Runs import Config

OFF = Config(flips=False, stain=0.0, color=0.0, cutmix=0.0)
# An image whose eight views all differ, as do its shifts.
IMAGE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def seeded(seed: int) -> Generator:
    """Return a new generator with that seed."""
    return Generator().manual_seed(seed)


def batch_of(n: int) -> Tensor:
    """Return `n` times the same image."""
    return torch.from_numpy(np.stack([IMAGE] * n))


def eight(image: np.ndarray) -> list[bytes]:
    """Return the eight flips and quarter turns of an image (S, S, 3), as numpy makes them."""
    turned = [np.rot90(image, k) for k in range(4)]
    return [view.tobytes() for view in turned + [turn[:, ::-1] for turn in turned]]


def test_random_view_draws_each_flip_turn_and_shift_of_each_image() -> None:
    views = random_view(torch.cat([batch_of(2000), 255 - batch_of(2000)]), seeded(0)).numpy()
    for image, drawn in ((IMAGE, views[:2000]), (255 - IMAGE, views[2000:])):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        shifts = [padded[y : y + 12, x : x + 12] for y in range(5) for x in range(5)]
        allowed = {view: i for shifted in shifts for i, view in enumerate(eight(shifted))}
        assert len(allowed) == 200 and {view.tobytes() for view in drawn} == allowed.keys()
        counts = np.bincount([allowed[view.tobytes()] for view in drawn])
        assert counts.min() > 190, counts  # 250 each, standard deviation 15


@pytest.mark.parametrize("on", [{"flips": True}, {"stain": 0.1}, {"color": 0.1}], ids=str)
def test_augmentation_differs_per_image_and_follows_the_generator(on: dict) -> None:
    def views(seed: int) -> Tensor:
        images, targets = augment(batch_of(32), torch.eye(32), seeded(seed), replace(OFF, **on))
        assert torch.equal(targets, torch.eye(32))
        return images

    assert len({view.numpy().tobytes() for view in views(1)}) > 24
    assert torch.equal(views(1), views(1))
    assert not torch.equal(views(1), views(2))


def test_augmentation_changes_nothing_when_it_is_off() -> None:
    views, targets = augment(batch_of(1), torch.eye(1), seeded(0), OFF)
    expected = IMAGE.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    assert np.array_equal(views.numpy(), expected) and torch.equal(targets, torch.eye(1))


def test_stain_jitter_scales_shifts_and_recolours_each_stain_in_optical_density() -> None:
    images = to_float(batch_of(200).clamp(30, 220))
    jittered = Augmentation.stain_jitter(images, seeded(0), 0.2)
    hed = Augmentation.HED.double()
    gains = []
    for before, after in zip(images.double(), jittered.double(), strict=True):
        x, y = (-t.log().flatten(1).T for t in (before, after))
        amounts = torch.cat([x @ torch.linalg.inv(hed), torch.ones(len(x), 1)], 1)
        fit = torch.linalg.lstsq(amounts, y).solution  # three stains, and what was added
        assert torch.allclose(amounts @ fit, y, atol=1e-4)
        assert fit[3].abs().max() <= 0.2 / 4 * 3 * (1 + 0.08) + 1e-4
        # Of each stain: one gain within +- 20 % for all three channels, the rest is its colour.
        low, high = (fit[:3] / (hed + side * 0.08) for side in (1, -1))
        low, high = (torch.where(hed > 0.08, t, fill) for t, fill in ((low, 0.0), (high, 9.0)))
        assert (low.amax(1).clamp_min(0.8) <= high.amin(1).clamp_max(1.2) + 1e-4).all()
        gains.append((fit[:3] * hed).sum(1) / (hed * hed).sum(1))
    assert 0.11 < torch.stack(gains).std() < 0.14  # 0.115 of the gain, 0.046 of the colour


def test_gain_and_offset_are_drawn_per_image_and_channel_on_nine_of_ten() -> None:
    images = torch.tensor([0.0, 1.0]).expand(1000, 3, 1, 2)  # gives the offset, and gain + offset
    low, high = Augmentation.gain_and_offset(images, seeded(0), 0.2)[:, :, 0].unbind(2)
    gain, offset = high - low - 1, low
    left_alone = (gain == 0).all(1) & (offset == 0).all(1)
    assert left_alone.float().mean() == pytest.approx(0.1, abs=0.03)
    for part in (gain, offset):
        drawn = part[~left_alone]
        assert drawn.abs().max() <= 0.2 + 1e-6
        assert drawn.std(0).numpy() == pytest.approx(0.2 / np.sqrt(3), rel=0.1)  # uniform
        assert np.abs(np.corrcoef(drawn.T.numpy()) - np.eye(3)).max() < 0.15


def test_cutmix_mixes_targets_by_the_area_that_was_pasted() -> None:
    n, size = 6, 28
    values = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    images, rows = values.expand(n, size, size, 3), torch.arange(n)
    generator, areas = seeded(0), []
    for _ in range(300):
        mixed, soft = augment(images, torch.eye(n), generator, replace(OFF, cutmix=0.5))
        mixed = (mixed[:, 0] * 255).round()
        pasted = mixed == values.flip(0)[..., 0]
        assert (pasted | (mixed == values[..., 0])).all()
        area = pasted.float().mean((1, 2))
        assert torch.allclose(soft[rows, n - 1 - rows], area)
        assert torch.allclose(soft[rows, rows], 1 - area)
        assert (area == area[0]).all()  # one rectangle for the batch
        areas.append(area[0].item())
    assert np.mean(np.array(areas) > 0) == pytest.approx(0.5, abs=0.1)
    assert max(areas) <= (19 / size) ** 2
    assert min(a for a in areas if a) >= (4 / size) ** 2
