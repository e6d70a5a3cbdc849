"""The models: a small CNN with skip connections, and a ResNet-18 to compare it with.

model = MODELS["skipcnn"]()
logits = model(images)      # float (N, 3, S, S) in [0, 1] -> (N, 9)
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from Common import CLASSES

NUM_CLASSES = len(CLASSES)
HALF = (0.5, 0.5, 0.5)


class Normalize(nn.Module):
    """Subtract each channel's mean over the training pixels and divide by its standard deviation.
    Both are 3 floats on the scale 0 to 1. They are buffers and so are saved with the weights: a
    checkpoint can never be used with another data set's normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        self.std.clamp_min_(1 / 255)  # a constant channel has a deviation of 0

    def forward(self, images: Tensor) -> Tensor:
        """Return the images (N, 3, S, S) in units of the data's standard deviation."""
        return (images - self.mean) / self.std


class TissueModel(nn.Module):
    """Base class of the models. It normalises images, float (N, 3, S, S) in [0, 1], and returns
    logits (N, 9). They are divided by a temperature that calibrates the probabilities (1 until
    `Training.calibrate` has fitted it). `mean` and `std` are those of the training images. To add a
    model, write a subclass with two methods, `logits` and `gradcam_layer`, and an entry in
    `MODELS`."""

    temperature: Tensor

    def __init__(self, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (N, 3, S, S) in [0, 1] into logits (N, 9)."""
        return self.logits(self.normalize(images)) / self.temperature

    def logits(self, x: Tensor) -> Tensor:
        """Turn normalised images (N, 3, S, S) into logits (N, 9)."""
        raise NotImplementedError

    def gradcam_layer(self, size: int) -> nn.Module:
        """Return the layer whose output Grad-CAM uses for images of that size: the last one with at
        least 7 x 7 positions."""
        raise NotImplementedError


class SkipStage(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm, and a skip connection around both. The skip
    connection is a 1x1 convolution that changes the number of channels: (N, in, S, S) becomes (N,
    out, S, S). The last BatchNorm starts at zero, so that every stage starts as its skip connection
    alone (Goyal et al. 2017, arXiv 1706.02677, section 5.1)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.act2 = nn.ReLU()
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Turn (N, in, S, S) into (N, out, S, S)."""
        main = self.act1(self.norm1(self.conv1(x)))
        main = self.norm2(self.conv2(main))
        return self.act2(main + self.skip(x))


class SkipCNN(TissueModel):
    """The project's CNN: a full-resolution stem, three skip stages and a dense head. A MaxPool
    before each stage halves the resolution; if a size is odd, the last row and column are pooled on
    their own. The stem's MaxPool comes before its second BatchNorm, so that BatchNorm and ReLU have
    only a quarter of the values to process. `widths` are the numbers of channels of the stem's two
    convolutions and of the stages."""

    def __init__(
        self,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        widths: Sequence[int] = (16, 32, 48, 96, 128),
    ) -> None:
        super().__init__(mean, std)
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            nn.Conv2d(widths[0], widths[1], 3, padding=1, bias=False),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.BatchNorm2d(widths[1]),
            nn.ReLU(),
        )
        self.stage1 = SkipStage(widths[1], widths[2])
        self.pool1 = nn.MaxPool2d(2, ceil_mode=True)
        self.stage2 = SkipStage(widths[2], widths[3])
        self.pool2 = nn.MaxPool2d(2, ceil_mode=True)
        self.stage3 = SkipStage(widths[3], widths[4])
        self.pool3 = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(widths[4], 128),
            nn.ReLU(),
            nn.Linear(128, NUM_CLASSES),
        )

    def logits(self, x: Tensor) -> Tensor:
        """Turn normalised images (N, 3, S, S) into logits (N, 9)."""
        x = self.stage1(self.stem(x))
        x = self.stage2(self.pool1(x))
        x = self.stage3(self.pool2(x))
        return self.head(self.pool3(x))

    def gradcam_layer(self, size: int) -> nn.Module:
        """Return the last stage with 7 x 7 positions or more."""
        return self.stage2 if size < 56 else self.stage3


class ResNet18(TissueModel):
    """torchvision's ResNet-18 with a 3x3 stride-1 stem and without the max pooling after it. The
    ImageNet stem would shrink 28 px to 7 px before the first block; this is the variant that
    MedMNIST's official experiments use at 28 px."""

    def __init__(self, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> None:
        from torchvision.models import resnet18  # here, because this import takes two seconds

        super().__init__(mean, std)
        self.net = resnet18(num_classes=NUM_CLASSES)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def logits(self, x: Tensor) -> Tensor:
        """Turn normalised images (N, 3, S, S) into logits (N, 9)."""
        return self.net(x)

    def gradcam_layer(self, size: int) -> nn.Module:
        """Return the last layer with 7 x 7 positions or more."""
        return self.net.layer3 if size < 56 else self.net.layer4


MODELS: dict[str, type[TissueModel]] = {"skipcnn": SkipCNN, "resnet18": ResNet18}


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def layer_table(model: TissueModel, size: int) -> list[tuple[str, str, str, str, int]]:
    """Describe every layer by running one image of that size through the model. One row (name,
    type, kernel, output shape, parameters) per layer without children, in order of execution."""
    rows = []

    def record(name: str, module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        kernel = getattr(module, "kernel_size", ())
        if isinstance(kernel, int):
            kernel = (kernel, kernel)
        kernel_text = "x".join(map(str, kernel))
        shape = " x ".join(map(str, output.shape[1:]))
        rows.append((name, type(module).__name__, kernel_text, shape, count_parameters(module)))

    hooks = []
    for name, module in model.named_modules():
        if not list(module.children()):
            hooks.append(module.register_forward_hook(partial(record, name)))
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        model(torch.zeros(1, 3, size, size, device=model.temperature.device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return rows


def layer_texts(model: TissueModel, size: int) -> list[list[str]]:
    """Return `layer_table` as rows of texts, with a header and the total."""
    rows = [["layer", "type", "kernel", "output", "parameters"]]
    for name, kind, kernel, shape, parameters in layer_table(model, size):
        rows.append([name, kind, kernel, shape, f"{parameters:,}"])
    rows.append(["total", "", "", "", f"{count_parameters(model):,}"])
    return rows
