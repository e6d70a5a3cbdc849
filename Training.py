"""Training: the loop over epochs and batches, and everything that it needs.

state = TrainingState(model, config, run_dir)      # continues from last.pt if it exists
history = fit(state, train_loader, val_loader)
probs, labels = predict(model, test_loader)
"""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import Evaluation
import Optimizer
import Processor
from Augmentation import augment, cutmix, to_float
from Common import UserError
from Dashboard import Log
from MyModels import TissueModel, count_parameters
from Runs import (
    Config,
    config_from,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    write_history,
)

# Epochs for PathMNIST's 89,996 training images. 15 take a quarter of an hour on two cores; a GPU is
# fast enough for more. Fewer images get more epochs, up to MAX_EPOCHS: with a tenth of the images,
# four times as many.
EPOCHS = {"cpu": 15, "cuda": 60}
MAX_EPOCHS = 300
SYNTHETIC_EPOCHS = 20  # to try the program in less than a minute
# From so many epochs on, half of the batches are mixed by CutMix. Without it, the network memorises
# images that it sees so often; with it, many images give less accuracy (docs/experiments.md).
CUTMIX_EPOCHS = 200

SEED_STEP = 100_003  # more than the largest --epochs, so that no two epochs share a random seed
# Images of 28 px, see `eval_batch`. On a CPU, batches of 500 are half as fast per image.
EVAL_BATCH = 125


def fit(
    state: "TrainingState", train_loader: DataLoader, val_loader: DataLoader, log: Log | None = None
) -> list:
    """Train, validating after each epoch, and leave `best.pt` and `last.pt` in the run's folder.
    Continues after the state's last epoch: with the same number of threads (`OMP_NUM_THREADS` fixes
    it), the result is bit-identical to that of a run that was never interrupted. Returns the
    history, a row per epoch. At the end the model has the weights of the best epoch and is
    calibrated. UserError if the loss is no longer finite."""
    config = state.config
    done, steps = len(state.history), len(train_loader)
    print_start(state, steps)
    if not state.resumed:
        if log:
            log.start(state.model)
        state.save()  # a run that is stopped in its first epoch can be resumed too
    bar = tqdm(total=config.epochs * steps, initial=done * steps, unit="batch", disable=None)
    with bar, Processor.Threads() as threads:
        bar.write("  epoch  train loss  accuracy    val loss  accuracy     AUC")
        for epoch in range(done, config.epochs):
            if should_stop(state.history, config.patience):
                best = best_epoch(state.history)
                bar.write(f"early stop: val loss has not come near its lowest since epoch {best}")
                break
            row = train_one_epoch(state, train_loader, epoch, bar, threads)
            probs, labels = predict(state.model, val_loader)
            for name, value in Evaluation.validation_metrics(probs, labels).items():
                row[f"val_{name}"] = value
            check_finite(row, state)
            state.history.append(row)
            if log:
                log.epoch(row, probs, labels)
            state.save()
            print_epoch(row, state, bar)
    calibrate(state, val_loader)
    return state.history


def train_one_epoch(
    state: "TrainingState",
    loader: DataLoader,
    epoch: int,
    bar: tqdm,
    threads: Processor.Threads,
) -> dict:
    """Train for one epoch; return its row of the history, without the validation metrics.
    Cross-entropy and accuracy are means over the augmented images; in an image mixed by CutMix, the
    class with the larger part is the right one. The sums stay on the device until the end, so that
    no step has to wait for them."""
    start = time.perf_counter()
    config = state.config
    generator = seed_epoch(loader, config, epoch)
    first_step, total_steps = epoch * len(loader), config.epochs * len(loader)
    sums = torch.zeros(3, dtype=torch.float64, device=config.device)
    state.model.train()
    for step, (images, labels) in enumerate(loader, start=first_step):
        lr = learning_rate(step, total_steps, config)
        set_learning_rate(state.optimizers, lr)
        images = images.to(config.device, non_blocking=images.is_pinned())
        labels = labels.to(config.device, non_blocking=labels.is_pinned())
        logits, targets = train_step(state, images, labels, generator)
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        right = targets if targets.ndim == 1 else targets.argmax(1)
        correct = (logits.argmax(1) == right).sum()
        sums += torch.stack([loss_sum, correct, torch.full_like(correct, len(labels))])
        bar.update()
        threads.adapt()
    loss_sum, correct, count = sums.tolist()
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch + 1,
        "lr": lr,
        "train_loss": loss_sum / count,
        "train_accuracy": correct / count,
        "seconds": seconds,
        "images_per_second": count / seconds,
    }


def train_step(
    state: "TrainingState", images: Tensor, labels: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Augment one batch, do the forward and backward pass, and update the weights. Takes uint8
    images (N, S, S, 3) and int64 labels (N,) on the device. Returns the logits (N, 9), float32 and
    detached, and the targets: the labels, or float (N, 9) after CutMix."""
    config = state.config
    targets = labels
    if config.cutmix and torch.rand(1).item() < config.cutmix:
        images, targets = cutmix(images, labels)
    images = augment(images, generator, config)
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = state.model(images)
    logits = logits.float()
    loss = F.cross_entropy(logits, targets)
    state.model.zero_grad()
    loss.backward()
    for optimizer in state.optimizers:
        optimizer.step()
    return logits.detach(), targets


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Iterable, eight_views: bool = False
) -> tuple[ndarray, ndarray]:
    """Return class probabilities, float32 (N, 9), and labels, int64 (N,), for batches of images,
    uint8 (n, S, S, 3), and labels (n,), as a loader yields them. Validation, test and new tiles all
    use this function. With `eight_views` the probabilities are averaged over the eight flips and
    quarter turns that training also uses. It computes in float32 whatever the training precision;
    on a GPU, convolutions use TF32, PyTorch's default. Afterwards the model is in train or eval
    mode as before."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    all_probs, all_labels = [], []
    for images, labels in batches:
        x = to_float(images.to(device, non_blocking=images.is_pinned()))
        views = [x]
        if eight_views:
            views = [torch.rot90(x, turn, (2, 3)) for turn in range(4)]
            views += [view.flip(3) for view in views]
        probs = [model(view).float().softmax(1) for view in views]
        all_probs.append(torch.stack(probs).mean(0))
        all_labels.append(labels)
    model.train(was_training)
    return torch.cat(all_probs).cpu().numpy(), torch.cat(all_labels).cpu().numpy()


def eval_batch(size: int) -> int:
    """Return the batch size for evaluation, which is smaller for larger images."""
    return max(1, EVAL_BATCH * 28**2 // size**2)


def best_epoch(history: list) -> int:
    """Return the epoch whose weights are kept, counted from 1; 0 before the first. It is the latest
    epoch whose val loss was within one standard error of the lowest so far (after the
    one-standard-error rule of Breiman et al. 1984). The later one is chosen because the val images
    cannot tell such losses apart, and a later epoch has a lower learning rate and more settled
    weights."""
    best, limit, lowest = 0, math.inf, math.inf
    for row in history:
        if row["val_loss"] <= lowest:
            lowest, limit = row["val_loss"], row["val_loss"] + row["val_loss_se"]
        if row["val_loss"] <= limit:
            best = row["epoch"]
    return best


def should_stop(history: list, patience: int) -> bool:
    """Early stopping: return whether the best epoch is at least `patience` epochs ago."""
    return len(history) - best_epoch(history) >= patience


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """Return the learning rate of a step: a linear rise (over the share `config.warmup` of all
    steps), then half a cosine down to zero. It depends on the step alone, so that a resumed run
    needs no scheduler state."""
    progress = step / total_steps
    if progress < config.warmup:
        # Above 0, so that the first step has an effect.
        return config.lr * max(progress, 1e-3) / config.warmup
    decline = (progress - config.warmup) / (1 - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * decline))


def set_learning_rate(optimizers: list, lr: float) -> None:
    """Use this learning rate for the next step of every optimiser."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def seed_epoch(loader: DataLoader, config: Config, epoch: int) -> Generator:
    """Make everything random in an epoch depend only on (seed, epoch): the order of the images, the
    augmentation (which uses the returned generator) and random layers such as dropout. Therefore a
    resumed run is bit-identical to one that was never interrupted, if both used the same number of
    threads."""
    number = config.seed * SEED_STEP + epoch
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    torch.manual_seed(number)
    return Generator(config.device).manual_seed(number)


def check_finite(row: dict, state: "TrainingState") -> None:
    """Raise a UserError if the loss is not finite, because the weights are useless then."""
    if math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]):
        return
    remedy = "a lower --lr"
    if state.config.precision != "fp32":
        remedy += ", or --precision fp32"
    what = f"{state.run_dir}: the loss is not finite in epoch {row['epoch']}"
    raise UserError(f"{what}; train again with {remedy}")


def print_start(state: "TrainingState", batches: int) -> None:
    """Print what is about to be trained."""
    config = state.config
    parameters = count_parameters(state.model)
    print(f"Training into {state.run_dir}:")
    print(f"{config.model}, {parameters:,} parameters")
    print(
        f"{config.epochs} epochs of {batches} batches of {config.batch_size} images, "
        f"{config.device} {config.precision}, seed {config.seed}"
    )
    if state.resumed:
        print(f"resumed after epoch {len(state.history)}")


def print_epoch(row: dict, state: "TrainingState", bar: tqdm) -> None:
    """Show the val accuracy at the progress bar; print a line for at most about 20 epochs."""
    epoch, epochs = row["epoch"], state.config.epochs
    line = (
        f"{epoch:3d}/{epochs:<3d}  {row['train_loss']:10.4f}  {row['train_accuracy']:8.4f}  "
        f"{row['val_loss']:10.4f}  {row['val_accuracy']:8.4f}  {row['val_auc']:6.4f}"
    )
    if best_epoch(state.history) == epoch:
        line += "  -> best.pt"
    if epoch % math.ceil(epochs / 20) == 0 or epoch == epochs:
        bar.write(line)
    bar.set_postfix_str(f"epoch {epoch}, val acc {row['val_accuracy']:.3f}")


def calibrate(state: "TrainingState", val_loader: DataLoader) -> None:
    """Load the best epoch's weights, fit their temperature on val, and write both to `best.pt`
    together with the entry "training", which also marks the training as finished."""
    path = state.run_dir / "best.pt"
    best = load_checkpoint(path)
    load_weights(state.model, best, path)
    if "training" in best:
        return
    state.model.temperature.fill_(1)
    probs, labels = predict(state.model, val_loader)
    state.model.temperature.fill_(Evaluation.fit_temperature(probs, labels))
    best["model"] = state.model.state_dict()
    best["training"] = how_trained(state.history)
    save_checkpoint(path, best)


def how_trained(history: list) -> dict:
    """Return what metrics.json says about the training."""
    return {
        "best_epoch": best_epoch(history),
        "epochs": len(history),
        "train_seconds": sum(row["seconds"] for row in history),
        "images_per_second": len(history) / sum(1 / row["images_per_second"] for row in history),
    }


class TrainingState:
    """Everything that changes during training, and its files: `best.pt`, `history.csv`, `last.pt`.
    If `run_dir/last.pt` exists, training continues from it and `resumed` is true. `identity` has
    the md5, size and kind of the data, which both checkpoints store."""

    def __init__(
        self,
        model: TissueModel,
        config: Config,
        run_dir: Path,
        identity: dict | None = None,
    ) -> None:
        self.model = model.to(config.device).to(memory_format=torch.channels_last)
        self.config = config
        self.run_dir = run_dir
        self.identity = identity or {}
        self.optimizers = Optimizer.make_optimizers(model, config)
        self.history: list = []
        self.resumed = (run_dir / "last.pt").exists()
        if self.resumed:
            self.load(run_dir / "last.pt")

    def save(self) -> None:
        """Write `best.pt` if this epoch is the best, then `history.csv`, then `last.pt`, which says
        how many epochs are done."""
        epoch = len(self.history)
        checkpoint = {
            "model": self.model.state_dict(),
            "config": asdict(self.config),
            "epoch": epoch,
            "identity": self.identity,
        }
        if epoch > 0 and epoch == best_epoch(self.history):
            save_checkpoint(self.run_dir / "best.pt", checkpoint)
        checkpoint["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        checkpoint["history"] = self.history
        write_history(self.run_dir / "history.csv", self.history)
        save_checkpoint(self.run_dir / "last.pt", checkpoint)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote to `last.pt`; UserError if it does not belong to this run."""
        last = load_checkpoint(path)
        load_weights(self.model, last, path)
        try:
            fits = replace(config_from(last["config"]), device=self.config.device) == self.config
            fits = fits and len(last["history"]) == last["epoch"]
            best_epoch(last["history"])
            for optimizer, saved in zip(self.optimizers, last["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (KeyError, ValueError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise UserError(f"{path}: this run cannot be resumed from this checkpoint; train again")
        self.history = last["history"]


def resolve(config: Config, n_train: int, kind: str = "") -> Config:
    """Choose the epochs, patience, device, precision and CutMix that the user did not set.
    `n_train` is the number of training images, `kind` the kind of the data (see `PathData`)."""
    device = Processor.choose_device(config.device)
    epochs = config.epochs
    if epochs == 0 and kind == "synthetic":
        epochs = SYNTHETIC_EPOCHS
    if epochs == 0:
        epochs = min(MAX_EPOCHS, round(EPOCHS[device] * (89_996 / n_train) ** 0.6))
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if Processor.has_fast_bf16(device) else "fp32"
    # The default patience is long, a third of the epochs, because the learning rate is low, and the
    # results best, only at the end of the schedule.
    patience = config.patience or max(5, math.ceil(epochs / 3))
    cutmix_share = config.cutmix
    if cutmix_share is None:
        cutmix_share = 0.5 if epochs >= CUTMIX_EPOCHS else 0.0
    return replace(
        config,
        epochs=epochs,
        patience=patience,
        device=device,
        precision=precision,
        cutmix=cutmix_share,
    )
