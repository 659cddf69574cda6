"""The choice of a token from its logits, in torch operations alone: the same on every device.

Noise is a number per (sample, position), hashed and not drawn: no generator, no state, nothing that depends
on what else is in the batch. A token is the inverse of the cumulative distribution at that number. Nothing
here looks at the data from the host, so all of it may be captured in a CUDA graph.

Left out: a fused kernel (it reads the logits a few times; a decode step of an 8B model reads 100 times that).
Legend of suffixes: R rows, V vocabulary, B blocks of it, C columns of one, W watched ids.
"""

import hashlib
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
# splitmix64's step and finishing multiplications, in wrapping int64, which every device computes alike
_STEP, _MIX = -7046029254386353131, ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))


class Options(NamedTuple):
    """How a call chooses. The log-probs that come with a token are of the untempered distribution."""

    temperature: float
    top_p: float
    top_k: int
    watch_W: Tensor


class Column(IntEnum):
    """What stands where in a row that `choose` gives."""

    ID = 0
    LOGPROB = 1
    NOT_FINITE = 2  # 1 if the logits are not
    WATCHED = 3  # the first of the watched ids' log-probs, which are the rest of the row


def noise_seed(seed: int, key: str, number: int) -> int:
    """The 64 bits that a sample's noise is made of, hashed once; positions are mixed in by `uniforms`."""
    digest = hashlib.blake2b(f"{seed}\n{number}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """One fp32 number in (0, 1) for each (sample's noise seed, position), with 23 random bits."""
    x = seeds_R + (positions_R + 1) * _STEP
    for shift, factor in _MIX:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (((x >> 41) & ((1 << 23) - 1)).float() + 0.5) * 2.0**-23


def choose(logits_RV: Tensor, uniform_R: Tensor, options: Options) -> Tensor:
    """Draws a token per row; -> fp64 [R, Column.WATCHED + W]."""
    low_R, high_R = logits_RV.amin(-1), logits_RV.amax(-1)
    weight_RV = (logits_RV - high_R[:, None]).exp_()
    total_RB = _blocks(weight_RV).sum(-1)
    lse_R = high_R + total_RB.sum(-1).log()
    if options.temperature == 0:
        id_R = logits_RV.argmax(-1)
    else:
        if options.temperature != 1:
            weight_RV = ((logits_RV - high_R[:, None]) / options.temperature).exp_()
        if options.top_k:
            weight_RV = _keep(weight_RV, weight_RV.new_full((len(weight_RV),), options.top_k), counted=True)
        if options.top_p < 1:
            weight_RV = _keep(weight_RV, options.top_p * _blocks(weight_RV).sum(-1).sum(-1), counted=False)
        if options.temperature != 1 or options.top_k or options.top_p < 1:
            total_RB = _blocks(weight_RV).sum(-1)
        id_R = _draw(weight_RV, total_RB, uniform_R)
    not_finite_R = ~(high_R - low_R).isfinite()
    logprob_R = logits_RV.gather(1, id_R[:, None])[:, 0] - lse_R
    watched_RW = logits_RV[:, options.watch_W] - lse_R[:, None]
    # As Column says; they become what the first is.
    return torch.cat((id_R.double()[:, None], logprob_R[:, None], not_finite_R[:, None], watched_RW), dim=1)


def _blocks(weight_RV: Tensor) -> Tensor:
    missing = -weight_RV.shape[1] % BLOCK
    return (pad(weight_RV, (0, missing)) if missing else weight_RV).unflatten(1, (-1, BLOCK))


def _draw(weight_RV: Tensor, total_RB: Tensor, uniform_R: Tensor) -> Tensor:
    """The inverse of the cumulative distribution at uniform_R: first the block it falls into, then the token.

    Only a block, and in it a token, of positive weight is ever taken, whatever the sums' rounding.
    """
    upto_RB = total_RB.cumsum(-1)
    aim_R = uniform_R * upto_RB[:, -1]
    block_R = _first(upto_RB, total_RB, aim_R)
    row_R = torch.arange(len(block_R), device=block_R.device)
    chosen_RC = _blocks(weight_RV)[row_R, block_R]
    aim_R = aim_R - (upto_RB - total_RB)[row_R, block_R]
    return block_R * BLOCK + _first(chosen_RC.cumsum(-1), chosen_RC, aim_R)


def _first(upto_RC: Tensor, weight_RC: Tensor, aim_R: Tensor) -> Tensor:
    """The first column of positive weight whose sum passes the aim; the last such if rounding left none."""
    positive_RC = weight_RC > 0
    passed_RC = positive_RC & (upto_RC > aim_R[:, None])
    column_C = torch.arange(upto_RC.shape[1], device=upto_RC.device)
    last_R = (positive_RC * column_C).amax(-1)
    return torch.where(passed_RC, column_C, last_R[:, None]).amin(-1)


def _keep(weight_RV: Tensor, target_R: Tensor, counted: bool) -> Tensor:
    """Zeroes all but the largest weights that together reach the target, in number or in sum.

    The threshold is found by bisection over the bits of a float (as integers, they are in the same order),
    which needs neither a sort nor a look at the data. Tokens equal to the last one kept are kept too.
    """
    bits_RV = weight_RV.view(torch.int32)
    low_R = torch.zeros(len(weight_RV), dtype=torch.int32, device=weight_RV.device)  # keeps enough
    high_R = bits_RV.amax(-1) + 1  # keeps nothing
    for _ in range(31):
        middle_R = low_R + (high_R - low_R) // 2
        kept_RV = bits_RV >= middle_R[:, None]
        enough_R = (kept_RV.float() if counted else weight_RV * kept_RV).sum(-1) >= target_R
        low_R, high_R = torch.where(enough_R, middle_R, low_R), torch.where(enough_R, high_R, middle_R)
    return weight_RV * (bits_RV >= low_R[:, None])
