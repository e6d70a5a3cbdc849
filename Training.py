"""Training: the loop over epochs and batches, and everything that it needs.

state = TrainingState(model, config, run_dir)      # goes on from last.pt, if it is there
history = fit(state, train_loader, val_loader)
probs, labels = predict(model, test_loader)
"""

import contextlib
import ctypes
import io
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import Evaluation
import Figures
from Augmentation import augment, to_float
from Common import SHORT_NAMES, UserError
from Runs import Config, load_checkpoint, save_checkpoint, write_history

# The default number of epochs for PathMNIST's 89,996 training images: a quarter of an hour on two
# cores, and a GPU has time for more. A tenth of the images take four times the epochs.
EPOCHS, MAX_EPOCHS = {"cpu": 15, "cuda": 60}, 300

# More than the largest --epochs, so that no two epochs of any seeds are drawn alike.
SEED_STEP = 100_003

EVAL_BATCH = 125  # images of 28 px, see `eval_batch`; on a CPU 500 take half as long again each


def choose_device(device: str) -> str:
    """Return "cuda" or "cpu" for what `--device` says; UserError if it is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU here; use --device auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve(config: Config, n_train: int) -> Config:
    """Fill in what was left to the program: epochs, patience, device and precision."""
    device = choose_device(config.device)
    epochs = config.epochs or min(MAX_EPOCHS, round(EPOCHS[device] * (89_996 / n_train) ** 0.6))
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    # The schedule needs its whole length to anneal, so by default only a run whose validation loss
    # has not come near its lowest (see `best_epoch`) for a third of its epochs is cut short.
    patience = config.patience or max(5, math.ceil(epochs / 3))
    return replace(config, epochs=epochs, patience=patience, device=device, precision=precision)


def has_fast_bf16(device: str) -> bool:
    """Return whether the device computes faster in bfloat16 than in float32. Of processors those
    with AMX do, and AMD's with AVX-512 BF16; Intel's with that alone do not."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known, cpuinfo = torch.cpu.get_capabilities(), Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    amd = known.get("avx512_bf16", False) and "AuthenticAMD" in vendor
    return amd or known.get("amx_bf16", False)


def prepare_processor() -> None:
    """Set what makes a step on a CPU faster; to be called before PyTorch starts a thread."""
    # The momenta of dead units decay to denormal numbers, with which Intel's fp32 is slow.
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")  # numpy's
    # glibc gives much of what a step frees back to the kernel, and takes it anew page by page.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


def watch_cores() -> Callable[[], None]:
    """Return a function that lets PyTorch use as many threads as cores are free, if a second has
    passed since it was last called. Threads wait for each other at every layer: where another
    program takes the core of one, all come nearly to a halt. Their number changes the last bits of
    a result, so one that the user has set (`OMP_NUM_THREADS`) is kept."""
    most, stat = torch.get_num_threads(), Path("/proc/stat")
    if "OMP_NUM_THREADS" in os.environ or not stat.exists():
        return lambda: None

    def look() -> tuple[float, float]:
        """Return the time, and how many core seconds everybody else has computed so far."""
        user, nice, system, _idle, _iowait, *rest = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - time.process_time()

    then = look()

    def adapt() -> None:
        nonlocal then
        if time.perf_counter() - then[0] > 1:
            now = look()
            free = os.cpu_count() - (now[1] - then[1]) / (now[0] - then[0])
            then = now
            torch.set_num_threads(max(1, min(most, int(free + 0.3))))  # .3: a core nearly free

    return adapt


def world() -> tuple[int, int]:
    """Return (rank, number of processes); (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(make: Callable[[], Any]) -> Any:
    """Return what `make()` returns in the first process, in all processes. If it raises a
    `UserError`, the first process goes on to say so and the others end in silence."""
    box: list[Any] = [None, None]
    if world()[0] == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1] if world()[0] == 0 else SystemExit(2)
    return box[0]


def first_then_others(make: Callable[[], Any]) -> Any:
    """Return what `make()` returns in each process; what is wrong, the first one says alone."""
    made: list[Any] = []
    from_first(lambda: made.append(make()))
    if not made:
        with contextlib.redirect_stderr(io.StringIO()):  # the first has said it
            made.append(make())
    return made[0]


def join_processes(device: str) -> None:
    """Under torchrun, join the other processes (nccl between GPUs, gloo between CPUs)."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return
    gpu, rank = device == "cuda", int(os.environ["LOCAL_RANK"])
    if gpu and rank >= torch.cuda.device_count():
        raise UserError("more processes than GPUs; lower --nproc-per-node, or use --device cpu")
    if gpu:
        torch.cuda.set_device(rank)
    # The others wait while the first downloads or evaluates; torchrun ends them if it dies.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one voice on the terminal)


class TrainingState:
    """All that changes during training, and its files: `best.pt`, `history.csv`, `last.pt`. Goes on
    from `run_dir/last.pt` when there is one (`resumed`). `identity` are plain values that both
    checkpoints carry: md5, size and kind of the data."""

    def __init__(
        self, model: nn.Module, config: Config, run_dir: Path, identity: dict | None = None
    ) -> None:
        model.to(config.device, memory_format=torch.channels_last)
        if world()[1] > 1 and config.device == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.config, self.run_dir = model, config, run_dir
        self.identity = identity or {}
        self.optimizers = make_optimizers(model, config)
        self.history: list[dict] = []
        self.adapt_threads = watch_cores()
        self.resumed = (run_dir / "last.pt").exists()
        if self.resumed:
            self.load(run_dir / "last.pt")

    def save(self) -> None:
        """Write `best.pt` if this epoch is the best, then `history.csv`, then `last.pt`."""
        epoch = len(self.history)
        common = {"config": asdict(self.config), "epoch": epoch, "identity": self.identity}
        weights = self.model.state_dict()
        if 0 < epoch == best_epoch(self.history):
            save_checkpoint(self.run_dir / "best.pt", {"model": weights, **common})
        last = {"model": weights, "optimizers": [o.state_dict() for o in self.optimizers]}
        last["history"] = self.history
        write_history(self.run_dir / "history.csv", self.history)
        save_checkpoint(self.run_dir / "last.pt", {**last, **common})  # last: it says what is done

    def load(self, path: Path) -> None:
        """Restore what `save` wrote to `last.pt`."""
        last = load_checkpoint(path)
        try:
            if last["config"] | {"device": self.config.device} != asdict(self.config):
                raise ValueError("other options than those of config.json")
            if len(last["history"]) != last["epoch"]:
                raise ValueError("another number of epochs")
            self.history = last["history"]
            self.model.load_state_dict(last["model"])
            for optimizer, saved in zip(self.optimizers, last["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            what = f"{path}: not a checkpoint to resume this run from"
            raise UserError(f"{what}; train anew") from error


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Return the matrix with its singular values moved towards 1: about the nearest orthogonal one.
    The quintic Newton-Schulz iteration of Jordan et al. 2024 (kellerjordan.github.io/posts/muon): a
    step multiplies small singular values by 3.4 and keeps large ones between about 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if len(matrix) > matrix.shape[1] else x


class ConvMuon(torch.optim.Optimizer):
    """Muon for convolution kernels, orthogonalising in `dtype`; torch's own always does in bf16.
    Muon moves the averaged gradient of a matrix (its momentum) towards the nearest orthogonal
    matrix, so that its weak directions learn at nearly the pace of its strong ones. A kernel (out,
    in, k, k) is taken as a matrix (out, k * k * in). Steps are scaled to the size of AdamW's (Liu
    et al. 2025, arXiv 2502.16982). Steps equal those of `torch.optim.Muon`."""

    def __init__(self, kernels: list, dtype: torch.dtype, **options: float) -> None:
        self.dtype = dtype
        # Five steps, as usual, orthogonalise more exactly; here they gain nothing.
        super().__init__(kernels, {"ns_steps": 3, "momentum": 0.95, **options})

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
    """Return Muon for the kernels behind the first layer, and AdamW for everything else. Both take
    the same learning rate. Biases and BatchNorm scales are not decayed (He et al. 2019, arXiv
    1812.01187)."""
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 3]  # not the first
    taken = {id(p) for p in kernels}
    others = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    muon = ConvMuon(kernels, dtype, lr=config.lr, weight_decay=config.weight_decay)
    return [muon, torch.optim.AdamW(groups, lr=config.lr, fused=True)]


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down to zero. A pure
    function of the step, so that resuming needs no scheduler state."""
    progress = step / total_steps
    if progress < config.warmup:
        return config.lr * max(progress, 1e-3) / config.warmup  # above 0: the first step counts
    decline = (progress - config.warmup) / (1 - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * decline))


def fit(
    state: TrainingState,
    train_loader: DataLoader,
    val_loader: DataLoader,
    log: dict[str, SummaryWriter] | None = None,
) -> list[dict]:
    """Train, validating after each epoch, and leave `best.pt` and `last.pt` in the run's folder.
    Goes on behind the state's last epoch; on as many threads, the result is bit-identical to that
    of a run which was never interrupted. Returns the history, a row per epoch, and leaves the best
    epoch's weights in the model, calibrated. UserError if the loss is no longer finite."""
    config, (rank, processes) = state.config, world()
    net = DistributedDataParallel(state.model) if processes > 1 else state.model
    if rank == 0 and not state.resumed:
        state.save()  # so that a run stopped in its first epoch can be resumed too
    steps, done = len(train_loader), len(state.history)
    progress = {"total": config.epochs * steps, "initial": done * steps, "unit": "batch"}
    with tqdm(**progress, disable=rank > 0 or None) as bar:
        for epoch in range(done, config.epochs):
            if should_stop(state.history, config.patience):
                best = best_epoch(state.history)
                bar.write(f"early stop: no val loss near the lowest since epoch {best}")
                break
            row = {"epoch": epoch + 1} | train_one_epoch(net, state, train_loader, epoch, bar)
            probs, labels = from_first(lambda: predict(state.model, val_loader))
            val = Evaluation.validation_metrics(probs, labels)
            row |= {f"val_{name}": value for name, value in val.items()}
            if not (math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"])):
                remedy = "a lower --lr" + ", or --precision fp32" * (config.precision != "fp32")
                what = f"{state.run_dir}: the loss is not finite in epoch {epoch + 1}"
                raise UserError(f"{what}; train anew with {remedy}")
            state.history.append(row)
            if rank == 0:
                if log is not None:
                    log_epoch(log, row, state, probs, labels)
                state.save()
                print_epoch(row, state, bar)
    from_first(lambda: calibrate(state, val_loader))  # the others wait for it
    state.model.load_state_dict(load_checkpoint(state.run_dir / "best.pt")["model"])
    return state.history


def calibrate(state: TrainingState, val_loader: DataLoader) -> None:
    """Fit the temperature of the best model on val and keep it in `best.pt`, once."""
    path = state.run_dir / "best.pt"
    best = load_checkpoint(path)
    state.model.load_state_dict(best["model"])
    if state.model.temperature == 1:
        temperature = Evaluation.fit_temperature(*predict(state.model, val_loader))
        best["model"]["temperature"].fill_(temperature)
        save_checkpoint(path, best)


def train_one_epoch(
    net: nn.Module, state: TrainingState, loader: DataLoader, epoch: int, bar: tqdm
) -> dict[str, float]:
    """Train for one epoch; return its train figures and how long it took. Cross-entropy and
    accuracy are means over the augmented images. An image with a pasted patch counts as right when
    its larger part's class is found. Sums stay on the device until the end: no step waits for what
    a GPU has computed."""
    start = time.perf_counter()
    net.train()
    config = state.config
    generator = seed_epoch(loader, config, epoch)
    total_steps = config.epochs * len(loader)
    sums = torch.zeros(3, dtype=torch.float64, device=config.device)
    for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
        lr = learning_rate(step, total_steps, config)
        for group in (group for each in state.optimizers for group in each.param_groups):
            group["lr"] = lr
        images = images.to(config.device, non_blocking=images.is_pinned())
        labels = labels.to(config.device, non_blocking=labels.is_pinned())
        logits, targets = train_step(net, state.optimizers, images, labels, generator, config)
        state.adapt_threads()
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.argmax(1) == targets.argmax(1)).sum()
        sums += torch.stack([loss_sum, correct, torch.full_like(correct, len(labels))])
        bar.update()
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss_sum, correct, count = sums.tolist()
    seconds = time.perf_counter() - start
    return {
        "lr": lr,
        "train_loss": loss_sum / count,
        "train_accuracy": correct / count,
        "seconds": seconds,
        "images_per_second": len(loader.dataset) / seconds,
    }


def seed_epoch(loader: DataLoader, config: Config, epoch: int) -> torch.Generator:
    """Make order and augmentation functions of (seed, epoch) alone, and what a model draws. That is
    what makes a resumed run equal, bit for bit, one that was never interrupted."""
    rank, processes = world()
    number = config.seed * SEED_STEP + epoch
    loader.sampler.set_epoch(number)
    torch.manual_seed(number * processes + rank)
    return torch.Generator(config.device).manual_seed(number * processes + rank)


def train_step(
    net: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Augment one batch, pass it forwards and backwards, update the weights. Takes uint8 images (N,
    S, S, 3) and int64 labels (N,) on the device; returns detached float32 logits and the targets
    that they should have met, both (N, 9)."""
    targets = F.one_hot(labels, len(SHORT_NAMES)).float()
    images, targets = augment(images, targets, generator, config)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = net(images)
    logits = logits.float()
    net.zero_grad()
    F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing).backward()
    for optimizer in optimizers:
        optimizer.step()
    return logits.detach(), targets


def eval_batch(size: int) -> int:
    """Return how many images of that size are evaluated at once: as many pixels at any size."""
    return max(1, EVAL_BATCH * 28**2 // size**2)


@torch.inference_mode()
def predict(model: nn.Module, loader: DataLoader, views: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return class probabilities, float32 (N, 9), and labels, int64 (N,), of a loader's images. The
    one path to probabilities: validation, test, figures and new tiles all come here. `views` is 1,
    or 8 for the mean over the flips and quarter turns that training draws from. Computed in
    float32, whatever the training precision (a GPU's convolutions in TF32, as is PyTorch's
    default); the model is left as it was, in train or eval mode."""
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


def best_epoch(history: Sequence[dict]) -> int:
    """Return the epoch whose weights are kept, counted from 1; 0 before the first. The latest one
    whose val loss is within a standard error of the lowest before it (after the one-standard-error
    rule of Breiman et al. 1984). Among losses that the val images cannot tell apart, the later
    epoch has the lower learning rate and the more settled weights."""
    best, limit, lowest = 0, math.inf, math.inf
    for row in history:
        if row["val_loss"] <= lowest:
            lowest, limit = row["val_loss"], row["val_loss"] + row["val_loss_se"]
        if row["val_loss"] <= limit:
            best = row["epoch"]
    return best


def should_stop(history: Sequence[dict], patience: int) -> bool:
    """Return whether the best epoch lies `patience` epochs back: early stopping."""
    return len(history) - best_epoch(history) >= patience


def how_trained(history: Sequence[dict]) -> dict:
    """Return what metrics.json says about the training."""
    return {
        "best_epoch": best_epoch(history),
        "epochs": len(history),
        "train_seconds": sum(row["seconds"] for row in history),
        "images_per_second": len(history) / sum(1 / row["images_per_second"] for row in history),
    }


def print_epoch(row: dict, state: TrainingState, bar: tqdm) -> None:
    """Show an epoch's results beside the progress bar; about twenty of a run's also as lines."""
    epochs, best = state.config.epochs, best_epoch(state.history) == row["epoch"]
    text = (
        "epoch {epoch:3d}/{epochs}  train loss {train_loss:.4f} acc {train_accuracy:.4f}  "
        "val loss {val_loss:.4f} acc {val_accuracy:.4f} auc {val_auc:.4f}"
    )
    if row["epoch"] % math.ceil(epochs / 20) == 0 or row["epoch"] == epochs:
        bar.write(text.format(**row, epochs=epochs) + "  best" * best)
    bar.set_postfix_str(f"epoch {row['epoch']}, val acc {row['val_accuracy']:.3f}")


@contextlib.contextmanager
def open_log(run_dir: Path, purge_step: int) -> Iterator[dict[str, SummaryWriter]]:
    """Open TensorBoard's logs of a run: its own, and train's and val's, two colours of one chart.
    What they hold of steps from `purge_step` on, an interrupted run has left: it is hidden."""
    with contextlib.ExitStack() as stack:
        folders = {"run": run_dir, "train": run_dir / "train", "val": run_dir / "val"}
        yield {
            name: stack.enter_context(SummaryWriter(str(folder), purge_step=purge_step))
            for name, folder in folders.items()
        }


def log_graph(writer: SummaryWriter, model: nn.Module, image: np.ndarray) -> None:
    """Log the model's graph, traced with one uint8 image (S, S, 3)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit")  # add_graph's own way to trace
        device = next(model.parameters()).device
        writer.add_graph(model.eval(), to_float(torch.from_numpy(image[None]).to(device)))


def log_epoch(
    log: dict[str, SummaryWriter],
    row: dict,
    state: TrainingState,
    probs: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Log an epoch's scalars, and about five times a run the confusion matrix on val."""
    epoch, epochs = row["epoch"], state.config.epochs
    for split in ("train", "val"):
        log[split].add_scalar("Loss", row[f"{split}_loss"], epoch)
        log[split].add_scalar("Accuracy", row[f"{split}_accuracy"], epoch)
    recalls = zip(SHORT_NAMES, row["val_recall"], strict=True)
    scores = {"AUC": row["val_auc"]} | {f"Recall/{name}": recall for name, recall in recalls}
    for tag, score in scores.items():
        if not math.isnan(score):  # of a class that val does not have
            log["val"].add_scalar(tag, score, epoch)
    log["run"].add_scalar("LR", row["lr"], epoch)
    log["run"].add_scalar("Images per second", row["images_per_second"], epoch)
    if epoch % math.ceil(epochs / 5) == 0 or epoch == epochs:
        kind = Figures.data_note(state.identity.get("kind", ""))
        note = f"val, epoch {epoch}{kind and f', {kind}'}"
        figure = Figures.confusion_figure(Evaluation.confusion(probs, labels), note)
        Figures.add_to_log(log["run"], "Confusion/val by epoch", figure, epoch)
    for writer in log.values():
        writer.flush()  # before the checkpoint: a resumed log then has no gap
