"""The models: a small CNN with skip connections, and a ResNet-18 to compare it with.

python MyModels.py                  # layer table of the default model
python MyModels.py --model resnet18 --size 64
"""

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from Common import Parser, run_script

NUM_CLASSES = 9
HALF = (0.5, 0.5, 0.5)


class Normalize(nn.Module):
    """Subtract the training pixels' channel mean and divide by their standard deviation. Both are 3
    floats in units of [0, 1], kept as buffers: they are saved with the weights, so that a
    checkpoint can never be used with another data set's normalisation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        std = torch.tensor(std, dtype=torch.float32).clamp_min(1 / 255)  # of a constant channel: 0
        self.register_buffer("std", std.view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the images (N, 3, S, S) in units of the data's standard deviation."""
        return (images - self.mean) / self.std


class SkipStage(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm, and a skip connection around both. The skip
    connection is a 1x1 convolution that matches the widths: (N, in, S, S) becomes (N, out, S, S).
    The last BatchNorm starts at zero, so that every stage starts as its skip connection alone
    (Goyal et al. 2017, arXiv 1706.02677, section 5.1)."""

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


class SkipCNN(nn.Module):
    """The project's CNN: a full-resolution stem, three skip stages and a dense head. A MaxPool
    before each stage halves the resolution; of an odd size, the last row and column are pooled
    alone. The stem's comes before its second BatchNorm, which leaves only a quarter of the values
    to normalise and activate. `widths` are the channels of the stem's two convolutions and of the
    stages, `mean` and `std` the training images'. Takes float images (N, 3, S, S) in [0, 1] with S
    of 8 or more, returns logits (N, 9)."""

    def __init__(
        self,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        widths: Sequence[int] = (16, 32, 48, 96, 128),
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
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
        self.register_buffer("temperature", torch.ones(()))  # see `Training.calibrate`

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (N, 3, S, S) in [0, 1] into logits (N, 9)."""
        x = self.stage1(self.stem(self.normalize(images)))
        x = self.stage2(self.pool1(x))
        x = self.stage3(self.pool2(x))
        return self.head(self.pool3(x)) / self.temperature

    def gradcam_layer(self, size: int) -> nn.Module:
        """Return the layer for Grad-CAM at this image size: the last of 7 x 7 positions or more."""
        return self.stage2 if size < 56 else self.stage3


class ResNet18(nn.Module):
    """torchvision's ResNet-18 with a 3x3 stride-1 stem and no first pooling. The ImageNet stem
    would shrink 28 px to 7 px before the first block; this is the variant that MedMNIST's official
    experiments use at 28 px. Same input and output as `SkipCNN`."""

    def __init__(self, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> None:
        from torchvision.models import resnet18  # here, for it takes as long as torch to import

        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = resnet18(num_classes=NUM_CLASSES)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (N, 3, S, S) in [0, 1] into logits (N, 9)."""
        return self.net(self.normalize(images)) / self.temperature

    def gradcam_layer(self, size: int) -> nn.Module:
        """Return the layer for Grad-CAM at this image size: the last of 7 x 7 positions or more."""
        return self.net.layer3 if size < 56 else self.net.layer4


MODELS = {"skipcnn": SkipCNN, "resnet18": ResNet18}


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def layer_table(model: nn.Module, size: int) -> list[tuple[str, str, str, str, int]]:
    """Describe every layer by running one image of that size through the model. One row (name,
    type, kernel, output shape, parameters) per layer without children, in order of execution."""
    rows = []

    def record(name: str, module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        kernel = getattr(module, "kernel_size", ())
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        shape = " x ".join(str(n) for n in output.shape[1:])
        row = (name, type(module).__name__, "x".join(map(str, kernel)), shape)
        rows.append((*row, count_parameters(module)))

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    hooks = [leaf.register_forward_hook(partial(record, name)) for name, leaf in leaves]
    was_training = model.training
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return rows


def layer_markdown(model: nn.Module, size: int) -> str:
    """Return `layer_table` as a Markdown table with the total in the last row."""
    lines = ["| layer | type | kernel | output | parameters |", "|---|---|---|---|---:|"]
    lines += ["| {} | {} | {} | {} | {:,} |".format(*row) for row in layer_table(model, size)]
    return "\n".join([*lines, f"| **total** | | | | **{count_parameters(model):,}** |"])


def main() -> None:
    """Print a model's layer table."""
    parser = Parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="skipcnn", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=28, help="image size in px (default: 28)")
    args = parser.parse_args()
    if not 8 <= args.size <= 1024:
        parser.error("--size: 8 to 1024 px")
    print(layer_markdown(MODELS[args.model](), args.size), flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
