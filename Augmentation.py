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

    def indices() -> Tensor:
        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (n, 1), generator=generator, device=images.device)

        index = (torch.arange(size, device=images.device) + draw(-shift, shift + 1)).abs()
        index = torch.where(index >= size, 2 * (size - 1) - index, index)
        return torch.where(draw(0, 2).bool(), size - 1 - index, index)

    # Where each pixel of the view lies in the image, whose rows are laid end to end.
    flat = indices()[:, :, None] * size + indices()[:, None, :]
    upright = torch.rand(n, 1, 1, generator=generator, device=images.device) >= 0.5
    flat = torch.where(upright, flat, flat.transpose(1, 2)).reshape(n, -1, 1).expand(-1, -1, 3)
    return images.reshape(n, size * size, 3).gather(1, flat).view_as(images)


def stain_jitter(images: Tensor, generator: Generator, width: float) -> Tensor:
    """Vary how strongly each stain took, and its colour, as another laboratory would. Light is
    absorbed in proportion to the dye (Beer and Lambert), so stains add up in optical density: the
    density is split into haematoxylin, eosin and a rest, each is multiplied by 1 +- width and
    shifted by +- width / 4, and the colour is put together again (Tellez et al. 2019, arXiv
    1902.06543), with stains whose own densities in red, green and blue differ by up to 0.4 * width.
    Images are float (N, 3, S, S) in [0, 1], and may leave that range."""
    n, _, size, _ = images.shape
    stains, to_stains = (m.to(images.device, non_blocking=True) for m in (HED, TO_HED))
    stains = stains + uniform(generator, -0.4 * width, 0.4 * width, n, 3, 3)
    gain = uniform(generator, 1 - width, 1 + width, n, 3, 1)
    shift = uniform(generator, -width / 4, width / 4, n, 1, 3) @ stains
    density = -images.clamp_min(1 / 255).log().permute(0, 2, 3, 1).flatten(1, 2)
    density = torch.baddbmm(shift, density, to_stains @ (gain * stains))
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

    patch = inside()[:, None] & inside() & (uniform(generator, 0, 1, 1) < share)
    area = patch.float().mean()
    images = torch.where(patch, images.flip(0), images)
    return images, (1 - area) * targets + area * targets.flip(0)
