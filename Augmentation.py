"""Augmentation: a random view of every image, computed for the whole batch at once.

    images, targets = augment(images, targets, generator, config)

The functions take tensors and a random generator and return tensors. `augment` turns uint8 images
(N, S, S, 3) into float images (N, 3, S, S) in about [0, 1]; changes of colour can lead slightly out
of that range.
"""

import torch
from torch import Generator, Tensor

from Runs import Config

# Optical densities in red, green and blue of haematoxylin, eosin and DAB, which stands for the rest
# (Ruifrok & Johnston 2001).
HED = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
TO_HED = torch.linalg.inv(HED)


def augment(
    images: Tensor, targets: Tensor, generator: Generator, config: Config
) -> tuple[Tensor, Tensor]:
    """Draw a random view of every image, and mix it with another by CutMix. `images` uint8 (N, S,
    S, 3), `targets` float (N, classes). The generator, on the images' device, is the only source of
    randomness. `config` says how strong each augmentation is; 0 is off."""
    if config.flips:
        images = random_view(images, generator)
    images = to_float(images)
    if config.stain:
        images = stain_jitter(images, generator, config.stain)
    if config.color:
        images = gain_and_offset(images, generator, config.color)
    if config.cutmix:
        images, targets = cutmix(images, targets, generator, config.cutmix)
    return images, targets


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 images (N, S, S, 3) into float (N, 3, S, S) in [0, 1], stored channels last."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Draw uniformly from [low, high) on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def random_view(images: Tensor, generator: Generator, shift: int = 2) -> Tensor:
    """Flip, turn by quarters and shift every image by up to `shift` px, all in one gather. Tissue
    has no "up", so the eight flips and turns are equally likely. Shifts are by whole pixels, and
    the border is filled by reflection, so nothing is interpolated. Takes and returns uint8 images
    (N, S, S, 3)."""
    n, size = images.shape[:2]
    rows = random_positions(n, size, shift, generator)
    columns = random_positions(n, size, shift, generator)
    # For each pixel of the view, the number of the image's pixel that it shows, counted row by row.
    source = rows[:, :, None] * size + columns[:, None, :]
    # Flips and a swap of rows and columns together make all eight flips and turns.
    is_swapped = torch.rand(n, 1, 1, generator=generator, device=images.device) < 0.5
    source = torch.where(is_swapped, source.transpose(1, 2), source)
    source = source.reshape(n, -1, 1).expand(-1, -1, 3)
    return images.reshape(n, size * size, 3).gather(1, source).view_as(images)


def random_positions(n: int, size: int, shift: int, generator: Generator) -> Tensor:
    """Return for each row (or column) of a view which row of its image it shows, int64 (n, size).
    The rows are shifted by up to `shift`, reflected at the border, and mirrored in half of the
    images. For size 4 and a shift of 1: 1 2 3 2, or mirrored 2 1 0 1."""
    device = generator.device
    offset = torch.randint(-shift, shift + 1, (n, 1), generator=generator, device=device)
    position = (torch.arange(size, device=device) + offset).abs()
    position = torch.where(position >= size, 2 * (size - 1) - position, position)
    is_reversed = torch.randint(0, 2, (n, 1), generator=generator, device=device).bool()
    return torch.where(is_reversed, size - 1 - position, position)


def stain_jitter(images: Tensor, generator: Generator, width: float) -> Tensor:
    """Vary the strength and the colour of each stain, because laboratories differ in both. Optical
    density, the negative logarithm of the light, is proportional to the amount of dye (Beer-Lambert
    law), so the densities of stains add up. A pixel's density is split into amounts of
    haematoxylin, eosin and a rest. Each amount is multiplied by a random number in 1 +- width and
    shifted by one in +- width / 4. Then the density is computed again (Tellez et al. 2019, arXiv
    1902.06543), with each stain's own densities in red, green and blue changed by up to 0.4 *
    width. Images are float (N, 3, S, S) in [0, 1]; the results may lie outside that range."""
    n, _, size, _ = images.shape
    to_amounts = TO_HED.to(images.device, non_blocking=True)
    stains = HED.to(images.device, non_blocking=True)
    stains = stains + uniform(generator, -0.4 * width, 0.4 * width, n, 3, 3)
    gain = uniform(generator, 1 - width, 1 + width, n, 3, 1)
    shift = uniform(generator, -width / 4, width / 4, n, 1, 3)
    density = -images.clamp_min(1 / 255).log().permute(0, 2, 3, 1).flatten(1, 2)
    # The new density is (amounts * gain + shift) @ stains, where amounts = density @ to_amounts.
    # There are many pixels, so everything that does not depend on them is multiplied first.
    change = to_amounts @ (gain * stains)
    density = torch.baddbmm(shift @ stains, density, change)
    return density.neg_().exp_().view(n, size, size, 3).permute(0, 3, 1, 2)


def gain_and_offset(images: Tensor, generator: Generator, width: float) -> Tensor:
    """In nine of ten images, multiply every channel by a number in 1 +- width and add one in +-
    width, as another camera or lamp would. Both are uniform, drawn per image and channel. The share
    is that of arXiv 2409.11546, which used both to train on one centre of NCT-CRC-HE and test on
    the other."""
    n = len(images)
    on = uniform(generator, 0, 1, n, 1, 1, 1) < 0.9
    gain = 1 + on * uniform(generator, -width, width, n, 3, 1, 1)
    return images * gain + on * uniform(generator, -width, width, n, 3, 1, 1)


def cutmix(
    images: Tensor, targets: Tensor, generator: Generator, share: float
) -> tuple[Tensor, Tensor]:
    """In a random share of the batches, paste a rectangle of another image into every image. The
    targets of both images are mixed in proportion to area. As in Yun et al. 2019 (arXiv
    1905.04899), a batch is either mixed or not, and all its images use the same rectangle. Each
    side of the rectangle is uniform between a seventh and two thirds of the image's side. The
    patches come from the same batch in reversed order. Images are float (N, 3, S, S), targets (N,
    classes)."""
    size = images.shape[-1]
    pixels = torch.arange(size, device=images.device)

    def inside() -> Tensor:
        side = uniform(generator, size / 7, size * 2 / 3, 1).round()
        start = (uniform(generator, 0, 1, 1) * (size - side + 1)).floor()
        return (pixels >= start) & (pixels < start + side)

    rows, columns = inside(), inside()
    is_on = uniform(generator, 0, 1, 1) < share
    patch = rows[:, None] & columns & is_on  # all False if this batch is not mixed
    area = patch.float().mean()
    images = torch.where(patch, images.flip(0), images)
    return images, (1 - area) * targets + area * targets.flip(0)
