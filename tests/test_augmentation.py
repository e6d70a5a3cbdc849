"""Tests of Augmentation.py: python -m pytest tests/test_augmentation.py"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator

import Augmentation
from Augmentation import augment, random_view, to_float
from Runs import Config

OFF = Config(flips=False, stain=0.0, color=0.0, cutmix=0.0)
# An image whose eight views all differ, as do its shifts.
IMAGE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def seeded(seed):
    """Return a new generator with that seed."""
    return Generator().manual_seed(seed)


def batch_of(n):
    """Return `n` times the same image."""
    return torch.from_numpy(np.stack([IMAGE] * n))


def test_random_view_draws_each_flip_turn_and_shift_of_each_image():
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    allowed = []
    for row in range(5):
        for column in range(5):
            shifted = padded[row : row + 12, column : column + 12]
            for turns in range(4):
                turned = np.rot90(shifted, turns)
                allowed += [turned.tobytes(), turned[:, ::-1].tobytes()]
    assert len(set(allowed)) == 200
    *views, other = random_view(torch.cat([batch_of(4000), 255 - batch_of(1)]), seeded(0)).numpy()
    drawn = [view.tobytes() for view in views]
    assert set(drawn) == set(allowed)
    assert (255 - other).tobytes() in allowed  # nothing comes from another image of the batch
    for number in range(8):  # each is drawn 500 times, with a standard deviation of 21
        count = sum(drawn.count(view) for view in allowed[number::8])
        assert 420 < count < 580


@pytest.mark.parametrize("on", [{"flips": True}, {"stain": 0.1}, {"color": 0.1}], ids=str)
def test_augmentation_differs_per_image_and_follows_the_generator(on):
    def views(seed):
        images, targets = augment(batch_of(32), torch.eye(32), seeded(seed), replace(OFF, **on))
        assert torch.equal(targets, torch.eye(32))
        return images

    assert len({view.numpy().tobytes() for view in views(1)}) > 24
    assert torch.equal(views(1), views(1))
    assert not torch.equal(views(1), views(2))


def test_stain_jitter_scales_shifts_and_recolours_each_stain_in_optical_density():
    images = to_float(batch_of(200).clamp(30, 220))
    jittered = Augmentation.stain_jitter(images, seeded(0), 0.2)
    hed = Augmentation.HED.double()
    gains = []
    for before, after in zip(images.double(), jittered.double(), strict=True):
        density = -before.log().flatten(1).T
        stains = density @ torch.linalg.inv(hed)
        stains = torch.cat([stains, torch.ones(len(stains), 1)], dim=1)
        # What each stain absorbs afterwards, and what was added everywhere, explain all pixels.
        expected = -after.log().flatten(1).T
        fit = torch.linalg.lstsq(stains, expected).solution
        assert torch.allclose(stains @ fit, expected, atol=1e-4)
        # A gain within 20 % of a colour that differs by up to 0.4 * 0.2 in each channel.
        recoloured = (fit[:3] - hed).abs()
        assert (recoloured <= 0.2 * hed + 1.2 * 0.08 + 1e-4).all()
        assert fit[3].abs().max() <= 3 * 0.2 / 4 * 1.08 + 1e-4  # three stains' shifts
        gains.append((fit[:3] * hed).sum(1) / (hed * hed).sum(1))
    # The gain's own deviation is 0.2 / sqrt(3) = 0.115; that of the colour adds 0.046.
    assert 0.11 < torch.stack(gains).std() < 0.14


def test_gain_and_offset_are_drawn_per_image_and_channel_on_nine_of_ten():
    images = torch.tensor([0.0, 1.0]).expand(1000, 3, 1, 2)
    offset, bright = Augmentation.gain_and_offset(images, seeded(0), 0.2)[:, :, 0].unbind(2)
    gain = bright - offset - 1
    left_alone = (gain == 0).all(1) & (offset == 0).all(1)
    assert left_alone.float().mean() == pytest.approx(0.1, abs=0.03)
    for part in (gain, offset):
        drawn = part[~left_alone]
        assert drawn.abs().max() <= 0.2 + 1e-6
        assert drawn.std(0).numpy() == pytest.approx(0.2 / np.sqrt(3), rel=0.1)  # uniform
        assert drawn.T.corrcoef().fill_diagonal_(0).abs().max() < 0.15  # each by itself


def test_cutmix_mixes_targets_by_the_area_that_was_pasted():
    n, size = 6, 28
    values = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    images = values.expand(n, size, size, 3)  # image i has the value i everywhere
    generator = seeded(0)
    areas = []
    for _ in range(300):
        mixed, targets = augment(images, torch.eye(n), generator, replace(OFF, cutmix=0.5))
        mixed = (mixed[:, 0] * 255).round()
        pasted = mixed == values.flip(0)[..., 0]
        assert (pasted | (mixed == values[..., 0])).all()
        area = pasted.float().mean()
        assert torch.equal(pasted, pasted[:1].expand_as(pasted))  # one rectangle for the batch
        assert torch.allclose(targets.diagonal(), 1 - area)
        assert torch.allclose(targets.fliplr().diagonal(), area)
        areas.append(area.item())
    areas = np.array(areas)
    assert np.mean(areas > 0) == pytest.approx(0.5, abs=0.1)
    assert areas.max() <= (19 / size) ** 2
    assert areas[areas > 0].min() >= (4 / size) ** 2
