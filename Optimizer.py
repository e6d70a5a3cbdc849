"""The optimisers: Muon for the convolutions, AdamW for everything else.

optimizers = make_optimizers(model, config)
"""

import math

import torch
from torch import Tensor, nn

from Runs import Config


def make_optimizers(model: nn.Module, config: Config) -> list:
    """Return Muon for the convolution kernels after the first layer, and AdamW for everything else.
    Both use the same learning rate. Biases and BatchNorm parameters get no weight decay (He et al.
    2019, arXiv 1812.01187)."""
    kernels, matrices, vectors = [], [], []
    for parameter in model.parameters():
        if parameter.ndim == 4 and parameter.shape[1] > 3:  # the first layer sees 3 channels
            kernels.append(parameter)
        elif parameter.ndim > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    optimizers: list[torch.optim.Optimizer] = []
    if kernels:
        muon = ConvMuon(kernels, dtype, lr=config.lr, weight_decay=config.weight_decay)
        optimizers.append(muon)
    optimizers.append(torch.optim.AdamW(groups, lr=config.lr, fused=True))
    return optimizers


class ConvMuon(torch.optim.Optimizer):
    """Muon for convolution kernels. It orthogonalises in `dtype`, while `torch.optim.Muon` always
    uses bf16. Muon replaces the momentum of a weight matrix by approximately the nearest orthogonal
    matrix, so that weak directions of the gradient are learned almost as fast as strong ones. A
    kernel (out, in, k, k) is treated as a matrix (out, k * k * in). Steps are scaled to the size of
    AdamW's (Liu et al. 2025, arXiv 2502.16982). In bf16 they equal those of `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`."""

    def __init__(self, kernels: list, dtype: torch.dtype, **options: float) -> None:
        self.dtype = dtype
        # Muon's usual five steps orthogonalise more exactly, but did not improve the results.
        super().__init__(kernels, {"ns_steps": 3, "momentum": 0.95, **options})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
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


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Return the matrix with its singular values moved towards 1, which is roughly the nearest
    orthogonal matrix. Uses the quintic Newton-Schulz iteration of Jordan et al. 2024
    (kellerjordan.github.io/posts/muon): a step multiplies small singular values by 3.4 and keeps
    large ones between about 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = len(matrix) > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x
