"""AdamW, in two kinds: torch's fused one with float32 moments, and one whose moments are kept in bfloat16.

A moment is a running mean that moves by a share of what is new: with beta2 = 0.999, by a thousandth.
bfloat16 has 8 significant bits, so that a move of less than a 512th of what stands there may be rounded away,
each time again, and the mean stands still. `RoundedAdamW` therefore rounds stochastically: up with the
probability of what would be cut off. Each rounding is right on average, and so is the mean. The update is
computed in float32, from moments that are not yet rounded, and weights stay float32: a parameter takes 12
bytes (weight, gradient, two moments) instead of 16.

The noise of an element is a function of (seed, update, parameter, its place in the whole tensor) and of the
kind of device: it is drawn for blocks of whole rows, and a rank that holds a few of a block's rows draws all
of it. A resumed run repeats it, no number of ranks changes it, and the copies of hybrid FSDP round alike.
What depends on the ranks is the order in which gradients are summed, as with float32.

It leaves out: moments in 8 bits, which save two bytes more and need a scale for each block; weights in 16
bits; and every option of AdamW that no setting reaches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramr2.resume import local_part, own_rows
from gramr2.settings import TrainSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 1 << 21  # elements that are in float32 at once: 8 MB a tensor


def make_optimizer(parameters: Sequence[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW; matrices decay and vectors (norms, biases) do not. Its state exists from the start."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": 1e-8}
    dtype = getattr(torch, settings.optimizer_dtype)
    optimizer: torch.optim.Optimizer = RoundedAdamW(groups, options | {"seed": settings.seed})
    if dtype == torch.float32:
        optimizer = torch.optim.AdamW(groups, **options, fused=True)
    for parameter in parameters:
        moments = {key: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for key in MOMENTS}
        where = parameter.device if dtype == torch.float32 else "cpu"  # the fused one counts on the device
        optimizer.state[parameter] = {"step": torch.zeros((), device=where), **moments}
    return optimizer


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW on float32 weights; its moments, which `make_optimizer` lays, are in bfloat16."""

    @torch.no_grad()
    def step(self, closure=None):
        places = [(each, group) for group in self.param_groups for each in group["params"]]
        for number, (parameter, group) in enumerate(places):
            if parameter.grad is not None:
                self.update(number, parameter, **group)

    def update(self, number: int, parameter: nn.Parameter, lr, betas, eps, weight_decay, seed, **_) -> None:
        """One parameter, with its group's options, block by block."""
        state = self.state[parameter]
        state["step"] += 1
        count, (beta1, beta2) = int(state["step"]), betas
        tensors = parameter, parameter.grad, *(state[key] for key in MOMENTS)
        weight, gradient, first, second = (local_part(tensor.detach()) for tensor in tensors)
        for rows, noise in blocks(parameter, f"{seed} {count} {number}"):
            new = gradient[rows]
            mean = first[rows].float().lerp_(new, 1 - beta1)
            square = second[rows].float().mul_(beta2).addcmul_(new, new, value=1 - beta2)
            first[rows] = rounded(mean, noise & 0xFFFF)
            second[rows] = rounded(square, (noise >> 16) & 0xFFFF)
            width = square.div_(1 - beta2**count).sqrt_().add_(eps)
            weight[rows].mul_(1 - lr * weight_decay).addcdiv_(mean, width, value=-lr / (1 - beta1**count))


def blocks(parameter: Tensor, name: str) -> Iterator[tuple[slice, Tensor]]:
    """(rows of this rank's part, 32 random bits for each of their elements), block by block."""
    start, stop = own_rows(parameter)
    wide, generator = parameter.shape[1:], torch.Generator(parameter.device)
    height = max(1, BLOCK // max(1, wide.numel()))  # rows of a block of the whole tensor
    for top in range(start - start % height, stop, height):
        bottom = min(top + height, len(parameter))
        digest = hashlib.blake2b(f"{name} {top}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "big", signed=True))
        count = (bottom - top) * wide.numel()
        pairs = torch.empty(-(-count // 2), dtype=torch.int64, device=parameter.device)
        noise = pairs.random_(-(1 << 63), None, generator=generator).view(torch.int32)[:count]
        begin, end = max(top, start), min(bottom, stop)
        yield slice(begin - start, end - start), noise.view(-1, *wide)[begin - top : end - top]


def rounded(values: Tensor, noise: Tensor) -> Tensor:
    """float32 → bfloat16, the upper half of its bits. Noise of 16 bits, added to the lower half, carries into
    the upper one as often as the share that is cut off says: away from zero, or else toward it."""
    bits = (values.view(torch.int32) + noise).bitwise_and_(-0x10000)
    return bits.view(torch.float32).to(torch.bfloat16)
