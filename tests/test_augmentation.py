"""Tests of Augmentation.py: python -m pytest tests/test_augmentation.py"""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

import Augmentation
from Augmentation import augment, cutmix, random_view, to_float
from Runs import Config

OFF = Config(flips=False, stain=0.0, color=0.0, sharpness=0.0, noise=0.0, jpeg=0.0)
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


def test_cutmix_mixes_targets_by_the_area_that_was_pasted():
    torch.manual_seed(0)
    labels = torch.tensor([2, 5, 8])
    images = labels.view(3, 1, 1, 1).expand(3, 28, 28, 3).byte()  # an image's value is its class
    for _ in range(20):
        mixed, targets = cutmix(images, labels)
        for image, target in zip(mixed, targets, strict=True):
            share = torch.bincount(image.flatten(), minlength=9) / image.numel()
            assert torch.allclose(share, target, atol=1e-6)
    assert (mixed.shape, mixed.dtype) == (images.shape, torch.uint8)
    assert mixed.is_contiguous()


@pytest.mark.parametrize("name", ["flips", "stain", "color", "sharpness", "noise", "jpeg"])
def test_augmentation_differs_per_image_and_follows_the_generator(name):
    def views(seed):
        on = {name: 0.1 if name in ("stain", "color") else 1}
        return augment(batch_of(32), seeded(seed), replace(OFF, **on))

    assert len({view.numpy().tobytes() for view in views(1)}) > 20
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


def test_every_image_of_a_batch_gets_at_most_one_change_of_its_quality():
    config = replace(OFF, sharpness=0.5, noise=0.25, jpeg=0.125)
    images = augment(batch_of(16), seeded(0), config)
    plain = to_float(batch_of(16))
    is_changed = (images != plain).flatten(1).any(1)
    assert is_changed.tolist() == [True] * 14 + [False] * 2
    in_grey_levels = images[12:14] * 255  # JPEG leaves whole numbers, sharpness and noise do not
    assert torch.allclose(in_grey_levels, in_grey_levels.round(), atol=1e-4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    one = augment(batch_of(1), seeded(0), replace(OFF, jpeg=0.07))  # its share rounds to none
    assert torch.equal(one, to_float(batch_of(1)))


def test_sharpness_moves_along_the_line_from_the_blurred_image_to_a_sharpened_one():
    images = to_float(batch_of(500))
    weights = torch.exp(-(torch.arange(-2.0, 3) ** 2) / 2)
    weights = weights / weights.sum()
    kernel = torch.outer(weights, weights).expand(3, 1, 5, 5)
    padded = torch.nn.functional.pad(images[:1], (2, 2, 2, 2), mode="reflect")
    detail = images[0] - torch.nn.functional.conv2d(padded, kernel, groups=3)[0]
    change = Augmentation.change_sharpness(images, seeded(0)) - images
    amounts = (change * detail).sum((1, 2, 3)) / detail.square().sum()
    assert torch.allclose(change, amounts.view(-1, 1, 1, 1) * detail, atol=1e-5)
    assert -1 <= amounts.min() < -0.97
    assert 0.97 < amounts.max() <= 1
    assert amounts.std() == pytest.approx(2 / np.sqrt(12), rel=0.1)


def test_noise_is_gaussian_and_mostly_weak():
    images = torch.full((2000, 3, 12, 12), 0.5)
    noise = Augmentation.add_noise(images, seeded(0), 0.1) - images
    assert noise.mean() == pytest.approx(0, abs=1e-3)
    stds = noise.std((1, 2, 3)) / 0.1
    assert stds.max() < 1.15  # 1, and what 432 numbers let it differ
    assert stds.mean() == pytest.approx(1 / 3, abs=0.03)  # of the square of a uniform number
    standardised = noise / noise.std((1, 2, 3), keepdim=True)
    assert (standardised.abs() < 1).float().mean() == pytest.approx(0.683, abs=0.01)


def test_compression_is_that_of_jpeg():
    tile = np.asarray(Image.fromarray(IMAGE).resize((28, 28), Image.Resampling.BICUBIC))
    images = to_float(torch.from_numpy(np.stack([tile] * 200)))
    compressed = Augmentation.compress(images, seeded(0)).mul(255).round().byte()
    possible = {}
    for quality in range(50, 96):
        file = io.BytesIO()
        Image.fromarray(tile).save(file, "JPEG", quality=quality)
        possible[quality] = np.asarray(Image.open(file)).astype(int)
    nearest = []
    for image in compressed.permute(0, 2, 3, 1).numpy():
        errors = {q: np.abs(image - other).mean() for q, other in possible.items()}
        nearest.append(min(errors, key=errors.get))
        assert errors[nearest[-1]] == 0
    assert len(set(nearest)) > 30
