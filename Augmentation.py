"""Augmentation: a random view of every image, computed for the whole batch at once.

    images, targets = cutmix(images, labels)
    images = augment(images, generator, config)

The functions take tensors and a random generator and return tensors. `augment` turns uint8 images
(N, S, S, 3) into float images (N, 3, S, S) in about [0, 1]; most changes can lead slightly out of
that range.
"""

import io

import torch
from PIL import Image
from torch import Generator, Tensor

from Common import CLASSES
from Runs import Config

# Optical densities in red, green and blue of haematoxylin, eosin and DAB, which stands for the rest
# (Ruifrok & Johnston 2001).
HED = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
TO_HED = torch.linalg.inv(HED)


def augment(images: Tensor, generator: Generator, config: Config) -> Tensor:
    """Draw a random view of every image, change its colours as another laboratory would, and then
    its quality as another camera would. `images` are uint8 (N, S, S, 3). The generator, on the
    images' device, is the only source of randomness. `config` says how strong each augmentation is;
    0 is off."""
    if config.flips:
        images = random_view(images, generator)
    images = to_float(images)
    if config.stain:
        images = stain_jitter(images, generator, config.stain)
    if config.color:
        images = gain_and_offset(images, generator, config.color)
    return change_quality(images, generator, config)


def cutmix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of another image into every image of a batch, uint8 (N, S, S, 3). Returns
    the images and their targets, float (N, 9): the share of each class in the area. This is
    torchvision's CutMix (Yun et al. 2019, arXiv 1905.04899); it draws from PyTorch's global
    generator."""
    from torchvision.transforms import v2  # here, because this import takes two seconds

    images = images.permute(0, 3, 1, 2)
    images, targets = v2.CutMix(num_classes=len(CLASSES))(images, labels)
    return images.permute(0, 2, 3, 1).contiguous(), targets


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


def change_quality(images: Tensor, generator: Generator, config: Config) -> Tensor:
    """Change the sharpness of a share of the images, add noise to another share, and compress a
    third; the rest stay as they are. In trials, one change for each image was better than several
    (docs/experiments.md). A batch is in random order, so the shares are taken from its start."""
    n = len(images)
    counts = [round(n * share) for share in (config.sharpness, config.noise, config.jpeg)]
    counts.append(n - sum(counts))
    unsharp, noisy, compressed, unchanged = images.split(counts)
    unsharp = change_sharpness(unsharp, generator)
    noisy = add_noise(noisy, generator)
    compressed = compress(compressed, generator)
    return torch.cat([unsharp, noisy, compressed, unchanged])


def change_sharpness(images: Tensor, generator: Generator) -> Tensor:
    """Blur every image or sharpen it (unsharp masking), by a random amount: image + amount * (image
    - blurred image). The amount is uniform between -1, which gives the blurred image, and 1; the
    blur is Gaussian, with a standard deviation of 1 px. Focus, scanner and resizing all change the
    sharpness. Images are float (N, 3, S, S)."""
    from torchvision.transforms.v2 import functional  # here, because this import takes two seconds

    blurred = functional.gaussian_blur(images, [5, 5], [1.0, 1.0])
    return images + uniform(generator, -1, 1, len(images), 1, 1, 1) * (images - blurred)


def add_noise(images: Tensor, generator: Generator, max_std: float = 0.02) -> Tensor:
    """Add Gaussian noise to float images (N, 3, S, S). The standard deviation is `max_std` times
    the square of a number that is uniform in [0, 1), so most images get little."""
    n, _, size, _ = images.shape
    noise = torch.randn(n, size, size, 3, generator=generator, device=images.device)
    std = max_std * uniform(generator, 0, 1, n, 1, 1, 1).square()
    return images + std * noise.permute(0, 3, 1, 2)


def compress(images: Tensor, generator: Generator) -> Tensor:
    """Save every image as JPEG with a random quality from 50 to 95, and read it again. JPEG blurs
    colours far more than brightness. Takes and returns float images (N, 3, S, S), but the values
    become whole grey levels in [0, 1]."""
    device = images.device
    qualities = torch.randint(50, 96, (len(images),), generator=generator, device=device)
    pixels = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, quality in enumerate(qualities.tolist()):
        file = io.BytesIO()
        Image.fromarray(pixels[index]).save(file, "JPEG", quality=quality)
        pixels[index] = Image.open(file)
    return to_float(torch.from_numpy(pixels).to(device))
