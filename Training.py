"""Training: the loop over epochs and batches, and everything that it needs.

Augmentation, optimiser and schedule, moving average of the weights, validation after each epoch,
early stopping, TensorBoard scalars, checkpoints and resume. Used by PathMNIST.py:

    history = fit(model, train_loader, val_loader, config, run_dir, writer)
    probs, labels = predict(model, test_loader)
"""

import copy
import csv
import ctypes
import functools
import io
import math
import os
import pickle
import signal
import sys
import time
import timeit
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from analyze_data import SHORT_NAMES, UserError, write_atomically
from Evaluation import validation_metrics

# The momenta of units that have died decay to denormal numbers, with which an Intel processor's
# fp32 is slow: without this, a step on 90,000 images took a third longer after 5,000 steps.
torch.set_flush_denormal(True)  # before any thread of PyTorch's is started: they inherit it

# glibc gives much of what a step frees back to the kernel, and to take it anew, page by page, was 3
# to 11 % of a step's time. So it keeps up to 256 MiB, and arrays up to 32 MiB come from these.
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
    libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD

# Budget of optimisation steps that sets the default number of epochs, and its limits. Eight epochs
# are what CIFAR-10's 50,000 images take with Muon (airbench94_muon.py of KellerJordan on GitHub).
STEPS, MIN_EPOCHS, MAX_EPOCHS = 1600, 8, 200

# More than the largest --epochs, so that no two epochs of any seeds are drawn alike.
SEED_STEP = 100_003

# Columns of history.csv; the checkpoint's history also has the recall per class.
CSV_FIELDS = ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_loss_se"]
CSV_FIELDS += ["val_accuracy", "val_auc", "seconds", "images_per_second"]

# Haematoxylin, eosin and, for what is neither, DAB in optical density (Ruifrok & Johnston 2001).
HED = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
TO_HED = torch.linalg.inv(HED)


@dataclass(frozen=True)
class Config:
    """The options of one training run; None means "decided by `resolve`"."""

    model: str = "skipcnn"
    epochs: int | None = None
    batch_size: int = 64
    lr: float = 5e-3
    weight_decay: float = 0.05
    patience: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    label_smoothing: float = 0.1
    warmup: float = 0.2  # share of the steps in which the learning rate rises
    ema: float = 0.04  # horizon of the weights' moving average, as a share of the steps; 0: off
    flips: bool = True  # flips, quarter turns and shifts
    stain: float = 0.25  # half width of the stains' gain, see `stain_jitter`; 0: off
    color: float = 0.07  # half width of the gain and the offset per channel; 0: off
    cutmix: float = 0.5  # share of the batches whose images get a patch of another; 0: off
    embeddings: bool = False  # log val tiles to TensorBoard's projector at the end


class Stopped(BaseException):
    """Ctrl-C or SIGTERM arrived; the last checkpoint on disk is whole.

    Checkpoints are written atomically at the end of every epoch, so the signal may interrupt
    anything at once. A second signal meets the system's own handler and ends the process.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum

    @classmethod
    def install(cls) -> None:
        """Turn the first SIGINT or SIGTERM of this process into a `Stopped` exception."""

        def handle(signum: int, _frame: object) -> None:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)
            raise cls(signum)

        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, handle)


def resolve(config: Config, n_train: int) -> Config:
    """Fill in what was left to the program: epochs, patience, device and precision.

    Parameters
    ----------
    config : Config
        As given by the user.
    n_train : int
        Number of training images.

    Raises
    ------
    UserError
        If the device is not available on this machine.
    """
    steps_per_epoch = math.ceil(n_train / config.batch_size)
    epochs = config.epochs or min(MAX_EPOCHS, max(MIN_EPOCHS, round(STEPS / steps_per_epoch)))
    device = config.device
    if device == "auto":
        # An Apple GPU must be asked for: nobody has tried it, and PyTorch's has been wrong on it.
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU here; use --device auto or cpu")
    if device == "mps" and not has_mps():
        raise UserError(
            "--device mps: no Apple GPU here, or several processes; use --device auto or cpu"
        )
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if is_bf16_faster(device) else "fp32"
    # The schedule needs its whole length to anneal, so by default only a run whose validation loss
    # has not come near its lowest (see `best_epoch`) for a third of its epochs is cut short.
    patience = config.patience or max(5, math.ceil(epochs / 3))
    return replace(config, epochs=epochs, patience=patience, device=device, precision=precision)


def has_mps() -> bool:
    """Return whether there is an Apple GPU; never under torchrun, as gloo cannot serve it."""
    return torch.backends.mps.is_available() and not dist.is_initialized()


@functools.cache
def is_bf16_faster(device: str) -> bool:
    """Return whether the device computes faster in bfloat16 than in float32.

    Not all with AVX-512 BF16 do: an AMD processor and one with AMX were faster, an Intel one
    without AMX took twice as long. So a small matrix product in each is timed, for some
    milliseconds; on one thread, as several disturb each other where the processor is busy.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions: none
    if device != "cpu" or not capabilities.get("avx512_bf16", False):
        return False  # emulated, it is far slower

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=7))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    faster = seconds(torch.bfloat16) < seconds(torch.float32)
    torch.set_num_threads(threads)
    return faster


def to_device(model: nn.Module, device: str) -> nn.Module:
    """Move a model to a device, in the memory format that suits it; return the model.

    Channels last is the fastest. On an Apple GPU PyTorch's gradients of BatchNorm and MaxPool were
    wrong with it, without a word (github.com/pytorch/pytorch/issues/175189 and 175190).
    """
    layout = torch.contiguous_format if device == "mps" else torch.channels_last
    return model.to(device, memory_format=layout)


def world() -> tuple[int, int]:
    """Return (rank, number of processes); (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ------------------------------------------------------------------------------ augmentation


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 images (N, S, S, 3) into float (N, 3, S, S) in [0, 1], channels last."""
    return images.permute(0, 3, 1, 2).float().div_(255)


def augment(images: Tensor, generator: torch.Generator, config: Config) -> Tensor:
    """Draw a random view of every image.

    Parameters
    ----------
    images : uint8 Tensor (N, S, S, 3)
    generator : torch.Generator
        On the images' device; the only source of randomness.
    config : Config
        `flips`, `stain` and `color` say which augmentations are on.

    Returns
    -------
    float Tensor (N, 3, S, S)
        About [0, 1]; colour augmentation may leave that range.
    """
    if config.flips:
        images = random_view(images, generator)
    images = to_float(images)
    if config.stain:
        images = stain_jitter(images, generator, config.stain)
    if config.color:
        images = gain_and_offset(images, generator, config.color)
    return images


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Draw uniformly from [low, high) on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def random_view(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Flip, turn by quarters and shift every image by up to `shift` px, all in one gather.

    Tissue has no "up", so the eight flips and turns are equally likely. Shifts are whole pixels,
    reflected at the border: nothing is interpolated. Images are uint8 (N, S, S, 3) and stay so.
    """
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


def stain_jitter(images: Tensor, generator: torch.Generator, width: float) -> Tensor:
    """Vary how strongly each stain took, and its colour, as another laboratory would.

    Light is absorbed in proportion to the dye (Beer and Lambert), so stains add up in optical
    density: the density is split into haematoxylin, eosin and a rest, each is multiplied by
    1 +- width and shifted by +- width / 4, and the colour is put together again (Tellez et al.
    2019, arXiv 1902.06543), with stains whose own densities in red, green and blue differ by up to
    0.4 * width. Images are float (N, 3, S, S) in [0, 1], and may leave that range.
    """
    n, _, size, _ = images.shape
    stains, to_stains = (m.to(images.device, non_blocking=True) for m in (HED, TO_HED))
    stains = stains + uniform(generator, -0.4 * width, 0.4 * width, n, 3, 3)
    gain = uniform(generator, 1 - width, 1 + width, n, 3, 1)
    shift = uniform(generator, -width / 4, width / 4, n, 1, 3) @ stains
    density = -images.clamp_min(1 / 255).log().permute(0, 2, 3, 1).flatten(1, 2)
    density = torch.baddbmm(shift, density, to_stains @ (gain * stains))
    return density.neg_().exp_().view(n, size, size, 3).permute(0, 3, 1, 2)


def gain_and_offset(images: Tensor, generator: torch.Generator, width: float) -> Tensor:
    """Multiply every channel by 1 +- width and add +- width, on nine images of ten.

    Uniform per image and channel: what another camera and lamp do. The share is that of arXiv
    2409.11546, which adds before it multiplies, at twice this width, and found both to carry across
    the two centres of NCT-CRC-HE.
    """
    n = len(images)
    on = uniform(generator, 0, 1, n, 1, 1, 1) < 0.9
    gain = 1 + on * uniform(generator, -width, width, n, 3, 1, 1)
    return images * gain + on * uniform(generator, -width, width, n, 3, 1, 1)


def cutmix(
    images: Tensor, targets: Tensor, generator: torch.Generator, share: float
) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of another image into every image, in a share of the batches.

    The target becomes the mixture of both, by area. As in Yun et al. 2019 (arXiv 1905.04899),
    chance decides for a batch, and one rectangle serves all of its images; its sides are uniform
    between a seventh and two thirds of the image's. The partners are the batch reversed.

    Parameters
    ----------
    images : float Tensor (N, 3, S, S)
    targets : float Tensor (N, classes)
        Class probabilities.
    """
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


# ------------------------------------------------------------------------------ files


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write tensors and plain Python values atomically."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint into main memory, without running any code that it may hold.

    Raises
    ------
    UserError
        If the file is missing, damaged, or not one of this project's checkpoints.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, False where the folder may not be entered
        raise UserError(f"{path}: no such checkpoint; give the folder of a finished run")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read; ask for the permission to")
    try:
        if not zipfile.is_zipfile(path):  # nor is it unpickled: not even by torch's safe reader
            raise ValueError("no zip archive")
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not compare the checksums
                raise ValueError("damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on foreign files
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, it holds more than tensors; train anew") from error
    except Exception as error:  # torch and pickle raise a dozen types on damaged bytes
        raise UserError(f"{path}: damaged or not a checkpoint; train anew") from error
    types = {"model": dict, "config": dict, "epoch": int, "identity": dict}
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), kind) for key, kind in types.items()
    ):
        raise UserError(f"{path}: not a checkpoint of this project; train anew")
    return checkpoint


def load_weights(model: nn.Module, checkpoint: dict, key: str, path: Path) -> None:
    """Copy a checkpoint's weights into the model.

    Raises
    ------
    UserError
        If they do not fit the model.
    """
    try:
        model.load_state_dict(checkpoint[key])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        name = checkpoint["config"].get("model", "another model")
        raise UserError(f"{path}: its weights (of {name}) do not fit this model") from error


def write_history(path: Path, history: Sequence[dict]) -> None:
    """Write one CSV row per epoch."""
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write_atomically(path, buffer.getvalue().encode())


def read_history(path: Path) -> list[dict[str, float]]:
    """Return what `write_history` wrote, without the recall; nothing where it cannot be read."""
    try:
        with open(path, newline="") as file:
            return [
                {"epoch": int(row.pop("epoch"))} | {key: float(row[key]) for key in CSV_FIELDS[1:]}
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


# ------------------------------------------------------------------------------ prediction


@torch.inference_mode()
def predict(model: nn.Module, loader: DataLoader, views: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return class probabilities and labels of every image in the loader, in its order.

    The one path to probabilities: validation, test, figures and new tiles all come here. It is
    computed in float32, whatever the training precision (a GPU's convolutions in TF32, as is
    PyTorch's default), and changes nothing in the model.

    Parameters
    ----------
    model : nn.Module
        On any device; its train or eval mode is restored.
    loader : DataLoader
        Yields uint8 images (n, S, S, 3) and int64 labels (n,).
    views : int
        1, or 8 for the mean over the flips and quarter turns that training draws from.

    Returns
    -------
    probs : float32 array (N, 9)
    labels : int64 array (N,)
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    all_probs, all_labels = [], []
    for images, labels in loader:
        x = to_float(images.to(device, non_blocking=images.is_pinned()))
        turned = [torch.rot90(x, turn, (2, 3)) for turn in range(4 if views == 8 else 1)]
        flipped = [t.flip(3) for t in turned] if views == 8 else []
        probs = [model(view).float().softmax(1) for view in turned + flipped]
        all_probs.append(torch.stack(probs).mean(0))
        all_labels.append(labels)
    model.train(was_training)
    return torch.cat(all_probs).cpu().numpy(), torch.cat(all_labels).cpu().numpy()


def gather(*arrays: np.ndarray) -> list[np.ndarray]:
    """Join what each process holds of an evaluation; with one process, change nothing."""
    if not dist.is_initialized():
        return list(arrays)
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, arrays)
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


# ------------------------------------------------------------------------------ training


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Return the matrix with its singular values moved towards 1: about the nearest orthogonal one.

    The quintic Newton-Schulz iteration of Jordan et al. 2024 (kellerjordan.github.io/posts/muon):
    a step multiplies small singular values by 3.4 and keeps large ones between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if len(matrix) > matrix.shape[1] else x


class ConvMuon(torch.optim.Optimizer):
    """Muon for convolution kernels, fast on processors without bf16 too.

    Muon moves the averaged gradient of a matrix (its momentum) towards the nearest orthogonal
    matrix, so that its weak directions learn at nearly the pace of its strong ones. A kernel (out,
    in, k, k) is taken as a matrix (out, k * k * in). Steps are scaled to the size of AdamW's (Liu
    et al. 2025, arXiv 2502.16982).

    It steps as `torch.optim.Muon` does, but that always orthogonalises in bf16: where a processor
    has to emulate it, this can take longer than the rest of a training step. Here `dtype` says in
    what.
    """

    def __init__(
        self,
        kernels: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        ns_steps: int = 3,  # 5, as usual, orthogonalise more exactly; here they gain nothing
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        options = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(kernels, {**options, "ns_steps": ns_steps, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update the kernels from their gradients."""
        for group in self.param_groups:
            for kernel in group["params"]:
                weights = kernel.permute(0, 2, 3, 1)
                gradient = kernel.grad.permute(0, 2, 3, 1).flatten(1)
                state = self.state[kernel]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"])  # Nesterov's
                update = orthogonalize(update.to(self.dtype), group["ns_steps"])
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * math.sqrt(max(update.shape))
                weights.add_(update.reshape(weights.shape), alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Return Muon for the kernels behind the first layer, and AdamW for everything else.

    Both take the same learning rate. Biases and BatchNorm scales are not decayed (He et al. 2019,
    arXiv 1812.01187).
    """
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 3]  # not the first
    taken = {id(p) for p in kernels}
    others = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    muon = ConvMuon(kernels, config.lr, config.weight_decay, dtype=dtype)
    return [muon, torch.optim.AdamW(groups, lr=config.lr, fused=config.device != "mps")]


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down to zero.

    A pure function of the step, so that resuming needs no scheduler state.
    """
    progress = step / total_steps
    if progress < config.warmup:
        return config.lr * max(progress, 1e-3) / config.warmup  # above 0: the first step counts
    return (
        config.lr * 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup)))
    )


def float_state(model: nn.Module) -> list[Tensor]:
    """Return the model's weights and BatchNorm statistics, as views that stay current."""
    return [t for t in model.state_dict().values() if t.is_floating_point()]


def seed_epoch(loader: DataLoader, config: Config, epoch: int) -> torch.Generator:
    """Make order, dropout and augmentation functions of (seed, epoch) alone.

    That is what makes a resumed run equal, bit for bit, one that was never interrupted.
    """
    rank, size = world()
    number = (config.seed * SEED_STEP + epoch) * size + rank
    loader.sampler.sampler.set_epoch(epoch)  # the order that the BatchSampler cuts into batches
    torch.manual_seed(number)
    return torch.Generator(config.device).manual_seed(number)


def train_one_epoch(
    net: nn.Module,
    average: Callable[[int], None],
    loader: DataLoader,
    optimizers: Sequence[torch.optim.Optimizer],
    config: Config,
    epoch: int,
    bar: tqdm,
) -> dict[str, float]:
    """Train for one epoch; return its train figures and how long it took.

    Cross-entropy and accuracy are means over the augmented images. An image with a pasted patch
    counts as right when its larger part's class is found.

    Sums stay on the device until the end: no step waits for what a GPU has computed (but for what
    BatchNorm exchanges between several of them).
    """
    start = time.perf_counter()
    net.train()
    generator = seed_epoch(loader, config, epoch)
    total_steps = config.epochs * len(loader)
    sums = torch.zeros(3, dtype=torch.float64 if config.device != "mps" else None)
    sums = sums.to(config.device)
    for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, config)
        images = images.to(config.device, non_blocking=images.is_pinned())
        labels = labels.to(config.device, non_blocking=labels.is_pinned())
        logits, targets = train_step(net, optimizers, images, labels, generator, config)
        average(step)
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.argmax(1) == targets.argmax(1)).sum()
        sums += torch.stack([loss_sum, correct, torch.full_like(correct, len(labels))])
        bar.update()
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss_sum, correct, count = sums.tolist()
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss_sum / count,
        "train_accuracy": correct / count,
        "seconds": seconds,
        "images_per_second": len(loader.dataset) / seconds,
    }


def train_step(
    net: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Augment one batch, pass it forwards and backwards, update the weights.

    Takes uint8 images (N, S, S, 3) and int64 labels (N,) on the device; returns detached float32
    logits and the targets that they should have met, both (N, 9).
    """
    images = augment(images, generator, config)
    targets = F.one_hot(labels, len(SHORT_NAMES)).float()
    if config.cutmix:
        images, targets = cutmix(images, targets, generator, config.cutmix)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = net(images)
    logits = logits.float()
    net.zero_grad()
    F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing).backward()
    for optimizer in optimizers:
        optimizer.step()
    return logits.detach(), targets


def make_average(model: nn.Module, config: Config, total_steps: int):
    """Return (averaged model, function to call after each step with the step's number).

    An exponential moving average of weights and BatchNorm statistics, over a share of the run so
    that long and short runs average alike; its decay rises with the first steps so that the
    random initial weights are soon forgotten. With `config.ema` 0 it is the model itself.
    """
    if not config.ema:
        return model, lambda step: None
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    ours, theirs = float_state(averaged), float_state(model)
    longest = 1 - 1 / max(1.0, config.ema * total_steps)

    def update(step: int) -> None:
        decay = min(longest, (1 + step) / (10 + step))
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    return averaged, update


def synchronise_buffers(*models: nn.Module) -> None:
    """Average what differs between processes, the BatchNorm statistics, so that all hold one model.

    The weights, which are equal already, are averaged along with them.
    """
    if dist.is_initialized():
        for tensor in sum(map(float_state, models), []):
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def best_epoch(history: Sequence[dict]) -> int:
    """Return the epoch whose weights are kept, counted from 1; 0 before the first.

    The latest one whose val loss is within a standard error of the lowest before it (after the
    one-standard-error rule of Breiman et al. 1984). Among losses that the val images cannot tell
    apart, the later epoch has the lower learning rate and the more settled weights.
    """
    best, limit, lowest = 0, math.inf, math.inf
    for row in history:
        if row["val_loss"] <= lowest:
            lowest, limit = row["val_loss"], row["val_loss"] + row["val_loss_se"]
        if row["val_loss"] <= limit:
            best = row["epoch"]
    return best


@dataclass
class TrainingState:
    """All that changes during training, and how it is saved and restored."""

    model: nn.Module
    averaged: nn.Module
    optimizers: list[torch.optim.Optimizer]
    config: Config
    identity: dict
    history: list[dict]

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights are kept: see `best_epoch`."""
        return best_epoch(self.history)

    def save(self, run_dir: Path) -> None:
        """Write `best.pt` if this epoch is the best, then `history.csv` and `last.pt`."""
        common = {
            "config": asdict(self.config),
            "epoch": len(self.history),
            "identity": self.identity,
        }
        averaged = self.averaged.state_dict()
        if self.history and self.best_epoch == len(self.history):
            save_checkpoint(run_dir / "best.pt", {"model": averaged, **common})
        last = {"averaged": averaged, "optimizers": [o.state_dict() for o in self.optimizers]}
        last |= {"model": self.model.state_dict(), "history": self.history}
        write_history(run_dir / "history.csv", self.history)
        save_checkpoint(run_dir / "last.pt", {**last, **common})  # last: it says what is done

    def load(self, path: Path) -> None:
        """Restore what `save` wrote to `last.pt`."""
        last = load_checkpoint(path)
        load_weights(self.model, last, "model", path)
        load_weights(self.averaged, last, "averaged", path)
        try:
            for optimizer, saved in zip(self.optimizers, last["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.history = last["history"]
            if len(self.history) != last["epoch"]:
                raise ValueError("another number of epochs")
            if last["config"] | {"device": self.config.device} != asdict(self.config):
                raise ValueError("other options than those of config.json")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a checkpoint to resume from; train anew") from error


def fit(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    config: Config,
    run_dir: Path,
    writer: SummaryWriter | None = None,
    identity: dict | None = None,
    after_epoch: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
) -> list[dict]:
    """Train, validating after each epoch, and leave `best.pt` and `last.pt` in `run_dir`.

    Continues from `run_dir/last.pt` when there is one; the result is then bit-identical to that
    of a run which was never interrupted.

    Parameters
    ----------
    model : nn.Module
        Takes float images (N, 3, S, S) in [0, 1]; is left with the best epoch's weights.
    train_loader, val_loader : DataLoader
        As `PathMNIST.make_loader` makes them.
    config : Config
        Resolved (see `resolve`).
    run_dir : Path
        An existing folder.
    writer : SummaryWriter, optional
        TensorBoard's.
    identity : dict, optional
        Plain values that both checkpoints carry (which data they come from, say).
    after_epoch : callable, optional
        Called with (epoch, val probabilities, val labels).

    Returns
    -------
    list of dict
        One row per epoch: see `train_one_epoch` and `validate`.

    Raises
    ------
    UserError
        If the loss is no longer finite. `best.pt` is then that of the best epoch before.
    """
    rank, size = world()
    to_device(model, config.device)
    if size > 1 and config.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = DistributedDataParallel(model, broadcast_buffers=False) if size > 1 else model
    averaged, average = make_average(model, config, config.epochs * len(train_loader))
    state = TrainingState(
        model, averaged, make_optimizers(model, config), config, identity or {}, []
    )
    if (run_dir / "last.pt").exists():
        state.load(run_dir / "last.pt")
    elif rank == 0:
        state.save(run_dir)  # so that a run stopped in its first epoch can be resumed too
    if size > 1:
        dist.barrier()

    steps, done = len(train_loader), len(state.history)
    bar = tqdm(
        total=config.epochs * steps, initial=done * steps, unit="batch", disable=rank > 0 or None
    )
    with bar:
        for epoch in range(done, config.epochs):
            if epoch - state.best_epoch >= config.patience:
                bar.write(f"early stop: val loss is worse than at epoch {state.best_epoch}")
                break
            row = train_one_epoch(net, average, train_loader, state.optimizers, config, epoch, bar)
            synchronise_buffers(model, averaged)
            val, probs, labels = validate(averaged, val_loader)
            row |= val | {"epoch": epoch + 1, "lr": state.optimizers[0].param_groups[0]["lr"]}
            check_finite(row, state, run_dir)
            state.history.append(row)
            if rank == 0:
                if after_epoch is not None:
                    after_epoch(epoch + 1, probs, labels)
                if writer is not None:
                    log_epoch(row, writer)
                    writer.flush()  # before the checkpoint: a resumed log then has no gap
                state.save(run_dir)
                print_epoch(row, state, bar)
    if size > 1:
        dist.barrier()
    best = load_checkpoint(run_dir / "best.pt")
    load_weights(model, best, "model", run_dir / "best.pt")
    return state.history


def validate(model: nn.Module, loader: DataLoader) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return (loss, accuracy, AUC and recall per class on val; probabilities; labels).

    Several processes each evaluate their share; all of them return the whole.
    """
    probs, labels = gather(*predict(model, loader))
    metrics = validation_metrics(probs, labels)
    return {f"val_{name}": value for name, value in metrics.items()}, probs, labels


def check_finite(row: dict, state: TrainingState, run_dir: Path) -> None:
    """Stop a run that has diverged."""
    if not (math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"])):
        best = state.best_epoch
        kept = f"{run_dir / 'best.pt'} keeps epoch {best}" if best else "nothing to keep"
        remedy = "a lower --lr" + ", or --precision fp32" * (state.config.precision != "fp32")
        raise UserError(
            f"{run_dir}: the loss is not finite in epoch {row['epoch']} ({kept}); "
            f"start a new run with {remedy}"
        )


def print_epoch(row: dict, state: TrainingState, bar: tqdm) -> None:
    """Show an epoch's results beside the progress bar; after every twentieth of them, as a line."""
    text = (
        f"epoch {row['epoch']:3d}/{state.config.epochs}  "
        f"train loss {row['train_loss']:.4f} acc {row['train_accuracy']:.4f}  "
        f"val loss {row['val_loss']:.4f} acc {row['val_accuracy']:.4f} auc {row['val_auc']:.4f}"
    )
    epochs = state.config.epochs
    if row["epoch"] % math.ceil(epochs / 20) == 0 or row["epoch"] == epochs:
        bar.write(text + ("  best" if state.best_epoch == row["epoch"] else ""))
    bar.set_postfix_str(f"epoch {row['epoch']}, val acc {row['val_accuracy']:.3f}")


def log_epoch(row: dict, writer: SummaryWriter) -> None:
    """Log an epoch's results to TensorBoard."""
    tags = {
        "Loss/train": row["train_loss"],
        "Loss/val": row["val_loss"],
        "Accuracy/train": row["train_accuracy"],
        "Accuracy/val": row["val_accuracy"],
        "AUC/val": row["val_auc"],
        "LR": row["lr"],
        "Speed/images per second": row["images_per_second"],
    }
    recalls = zip(SHORT_NAMES, row["val_recall"], strict=True)
    tags |= {f"Recall val/{name}": recall for name, recall in recalls}
    for tag, value in tags.items():
        if not math.isnan(value):  # AUC or recall of a class that val does not have
            writer.add_scalar(tag, value, row["epoch"])
