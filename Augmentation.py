"""Augmentation: a random view of every image, drawn on the batch by a passed generator.

    images, targets = augment(images, targets, generator, config)

Pure functions from tensors and a generator to tensors. Images come as uint8 (N, S, S, 3) and leave
as float (N, 3, S, S) in about [0, 1]; colour augmentation may leave that range.
"""

import torch
from torch import Generator, Tensor

from Runs import Config

# Haematoxylin, eosin and, for what is neither, DAB in optical density (Ruifrok & Johnston 2001).
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
    """Turn uint8 images (N, S, S, 3) into float (N, 3, S, S) in [0, 1], channels last."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Draw uniformly from [low, high) on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def random_view(images: Tensor, generator: Generator, shift: int = 2) -> Tensor:
    """Flip, turn by quarters and shift every image by up to `shift` px, all in one gather. Tissue
    has no "up", so the eight flips and turns are equally likely. Shifts are whole pixels, reflected
    at the border: nothing is interpolated. Images are uint8 (N, S, S, 3) and stay so."""
    n, size = images.shape[:2]
    rows = random_positions(n, size, shift, generator)
    columns = random_positions(n, size, shift, generator)
    # Number an image's pixels row by row: each pixel of the view then shows pixel number...
    source = rows[:, :, None] * size + columns[:, None, :]
    # Flips and a swap of rows and columns together make all eight flips and turns.
    is_swapped = torch.rand(n, 1, 1, generator=generator, device=images.device) < 0.5
    source = torch.where(is_swapped, source.transpose(1, 2), source)
    source = source.reshape(n, -1, 1).expand(-1, -1, 3)
    return images.reshape(n, size * size, 3).gather(1, source).view_as(images)


def random_positions(n: int, size: int, shift: int, generator: Generator) -> Tensor:
    """Return which row (or column) of its image each row of a view shows, int64 (n, size). They are
    shifted by up to `shift`, reflected at the border, and in reverse order in half of the images.
    For size 4 and a shift of 1: 1 2 3 2, or in reverse 2 1 0 1."""
    device = generator.device
    offset = torch.randint(-shift, shift + 1, (n, 1), generator=generator, device=device)
    position = (torch.arange(size, device=device) + offset).abs()
    position = torch.where(position >= size, 2 * (size - 1) - position, position)
    is_reversed = torch.randint(0, 2, (n, 1), generator=generator, device=device).bool()
    return torch.where(is_reversed, size - 1 - position, position)


def stain_jitter(images: Tensor, generator: Generator, width: float) -> Tensor:
    """Vary how strongly each stain took, and its colour, as another laboratory would. Light is
    absorbed in proportion to the dye (Beer and Lambert), so stains add up in optical density, which
    is the negative logarithm of the light. A pixel's density is split into amounts of haematoxylin,
    eosin and a rest. Each amount is multiplied by 1 +- width and shifted by +- width / 4, and the
    density is put together again (Tellez et al. 2019, arXiv 1902.06543), from stains whose own
    densities in red, green and blue differ by up to 0.4 * width. Images are float (N, 3, S, S) in
    [0, 1], and may leave that range."""
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
    """Multiply every channel by 1 +- width and add +- width, on nine images of ten. Uniform per
    image and channel: what another camera and lamp do. The share is that of arXiv 2409.11546, which
    found both to carry across the two centres of NCT-CRC-HE."""
    n = len(images)
    on = uniform(generator, 0, 1, n, 1, 1, 1) < 0.9
    gain = 1 + on * uniform(generator, -width, width, n, 3, 1, 1)
    return images * gain + on * uniform(generator, -width, width, n, 3, 1, 1)


def cutmix(
    images: Tensor, targets: Tensor, generator: Generator, share: float
) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of another image into every image, in a share of the batches. The target
    becomes the mixture of both, by area. As in Yun et al. 2019 (arXiv 1905.04899), chance decides
    for a batch, and one rectangle serves all of its images; its sides are uniform between a seventh
    and two thirds of the image's. The partners are the batch reversed. Images are float (N, 3, S,
    S), targets (N, classes)."""
    size = images.shape[-1]
    pixels = torch.arange(size, device=images.device)

    def inside() -> Tensor:
        side = uniform(generator, size / 7, size * 2 / 3, 1).round()
        start = (uniform(generator, 0, 1, 1) * (size - side + 1)).floor()
        return (pixels >= start) & (pixels < start + side)

    rows, columns = inside(), inside()
    is_on = uniform(generator, 0, 1, 1) < share
    patch = rows[:, None] & columns & is_on  # nowhere, if this batch is not mixed
    area = patch.float().mean()
    images = torch.where(patch, images.flip(0), images)
    return images, (1 - area) * targets + area * targets.flip(0)
