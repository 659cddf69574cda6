"""The Triton kernels of the fused log-prob: scoring without logits, and a chunk's gradient in place.

`score` (2TdV, all of it matmul): a program owns a block of tokens and one split of the vocabulary. It
walks the split's tiles with the running maximum, sum of exponentials and target logit of its tokens in
registers, and writes those three once. A few lines of torch then merge the splits, always in the same
order: no locks and no atomics, so a run repeats bit for bit. Extra memory is 12 bytes per token and
split. Operands are fp32, bf16 or fp16; products of fp32 stay fp32 (no TF32); sums are fp32 always.

`logits_to_gradient_` turns a chunk of logits into their gradient (see sequence_logprob.py) in one read
for the softmax's normaliser and one read and write for the gradient.

Left out: devices before sm_80, AMD, widths that are not a multiple of 16; they take reference.py.
Importing needs triton, so kernels/__init__.py does it only where a kernel will run.
Legend of suffixes: T tokens, C tokens of a chunk, D width, V vocabulary, S splits of the vocabulary.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .reference import IGNORE
from .tuning import FUSION, choice

CHUNK_BYTES = 1 << 30  # 4,185 rows of 128,256 bf16 logits: each chunk is a pass over W and two over dW
# Blocks of tokens that run side by side: they share the tiles of W in the L2 cache, while their own
# rows (16 blocks of 128 rows: 16 MB at width 4096) stay there from tile to tile.
GROUP = 16
EMULATED = SimpleNamespace(major=8, multi_processor_count=8)  # by Triton's interpreter, on the CPU


@triton.jit
def _score_kernel(
    hidden, weight, targets_ptr, max_ptr, sum_ptr, target_ptr, T, V, D, row_blocks, splits, per_split,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    COPY_ENGINE: tl.constexpr,
):  # fmt: skip
    # Programs are numbered group by group; within a group, all its blocks of one split come first.
    group = tl.program_id(0) // (GROUP * splits)
    place = tl.program_id(0) % (GROUP * splits)
    blocks = tl.minimum(row_blocks - group * GROUP, GROUP)
    first_row = (group * GROUP + place % blocks) * BLOCK_T
    split = place // blocks
    row_T = first_row + tl.arange(0, BLOCK_T)
    target_T = tl.load(targets_ptr + row_T, mask=row_T < T, other=-1).to(tl.int32)
    max_T = tl.full([BLOCK_T], float("-inf"), tl.float32)
    sum_T = tl.zeros([BLOCK_T], tl.float32)
    logit_T = tl.zeros([BLOCK_T], tl.float32)  # of the target; stays 0 where another split has it
    d_D = tl.arange(0, BLOCK_D)
    last_tile = tl.minimum((split + 1) * per_split, tl.cdiv(V, BLOCK_V))
    for tile in range(split * per_split, last_tile):
        col_V = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        logits_TV = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for d in range(0, D, BLOCK_D):
            if COPY_ENGINE:  # hidden and weight are descriptors; what lies outside reads as 0
                hidden_TD = hidden.load([first_row, d])
                weight_DV = weight.load([tile * BLOCK_V, d]).T
            else:  # they are pointers; rows outside read the last one, and are masked below
                h_TD = hidden + tl.minimum(row_T, T - 1).to(tl.int64)[:, None] * D + (d + d_D)[None, :]
                w_DV = weight + tl.minimum(col_V, V - 1).to(tl.int64)[None, :] * D + (d + d_D)[:, None]
                hidden_TD = tl.load(h_TD, mask=(d + d_D)[None, :] < D, other=0.0)
                weight_DV = tl.load(w_DV, mask=(d + d_D)[:, None] < D, other=0.0)
            logits_TV = tl.dot(hidden_TD, weight_DV, logits_TV, input_precision="ieee")
        logits_TV = tl.where(col_V[None, :] < V, logits_TV, float("-inf"))
        logit_T += tl.sum(tl.where(col_V[None, :] == target_T[:, None], logits_TV, 0.0), 1)
        new_T = tl.maximum(max_T, tl.max(logits_TV, 1))
        sum_T = sum_T * tl.exp(max_T - new_T) + tl.sum(tl.exp(logits_TV - new_T[:, None]), 1)
        max_T = new_T
    out_T = split * T + row_T
    tl.store(max_ptr + out_T, max_T, mask=row_T < T)
    tl.store(sum_ptr + out_T, sum_T, mask=row_T < T)
    tl.store(target_ptr + out_T, logit_T, mask=row_T < T)


def _tiles(dtype, major):
    """The built-in numbers of `_score_kernel`: its constants and options. Chosen so that nothing spills."""
    if dtype == torch.float32:
        t, v, d, copy_engine, warps, stages = 64, 64, 32, False, 4, 3
    elif major in (9, 10):
        t, v, d, copy_engine, warps, stages = 128, 256, 64, True, 8, 4
    else:
        t, v, d, copy_engine, warps, stages = 128, 128, 64, False, 8, 3
    tiles = {"BLOCK_T": t, "BLOCK_V": v, "BLOCK_D": d, "COPY_ENGINE": copy_engine, "GROUP": GROUP}
    return tiles | {"num_warps": warps, "num_stages": stages}


def _shape(tensor):
    """What choices go by: the type, and the power of two that the last axis reaches to."""
    return f"{str(tensor.dtype).removeprefix('torch.')} to {triton.next_power_of_2(tensor.shape[-1])}"


def score(hidden_TD, weight_VD, targets_T):
    """-> (logp_T, lse_T) of contiguous operands, no gradients, no logits in memory."""
    (T, D), V = hidden_TD.shape, len(weight_VD)
    device = torch.cuda.get_device_properties(hidden_TD.device) if hidden_TD.is_cuda else EMULATED
    built_in = _tiles(hidden_TD.dtype, device.major)
    tiles = choice("score", _shape(hidden_TD), hidden_TD.device, **built_in)
    row_blocks, count = triton.cdiv(T, tiles["BLOCK_T"]), triton.cdiv(V, tiles["BLOCK_V"])
    # Splits fill the device; four tiles or more in each keep their partials near 1% of the logits, or below.
    splits = min(device.multi_processor_count // min(tiles["GROUP"], row_blocks), count // 4)
    per_split = triton.cdiv(count, max(1, splits))
    splits = triton.cdiv(count, per_split)
    partials = hidden_TD.new_empty(3, splits, T, dtype=torch.float32)
    operands = hidden_TD, weight_VD
    if tiles["COPY_ENGINE"]:
        blocks = [tiles["BLOCK_T"], tiles["BLOCK_D"]], [tiles["BLOCK_V"], tiles["BLOCK_D"]]
        operands = tuple(map(TensorDescriptor.from_tensor, operands, blocks))
    sizes = T, V, D, row_blocks, splits, per_split
    with torch.cuda.device_of(hidden_TD):
        _score_kernel[(row_blocks * splits,)](*operands, targets_T, *partials, *sizes, **tiles, **FUSION)
    max_ST, sum_ST, logit_ST = partials
    max_T = max_ST.amax(0)
    log_sum_T = (sum_ST * (max_ST - max_T).exp()).sum(0).log()
    logp_T = (logit_ST.sum(0) - max_T) - log_sum_T  # in this order never positive
    return logp_T.masked_fill(targets_T == IGNORE, 0), max_T + log_sum_T


@triton.jit
def _gradient_kernel(logits_ptr, targets_ptr, d_logp_ptr, d_lse_ptr, logp_ptr, V, BLOCK_V: tl.constexpr):
    # One program per row: d_logits = d_logp * (onehot - p) + d_lse * p, in place.
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    target = tl.load(targets_ptr + row)
    d_logp = tl.where(target >= 0, tl.load(d_logp_ptr + row), 0.0)
    d_softmax = tl.load(d_lse_ptr + row) - d_logp
    logit = tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32)
    col_V = tl.arange(0, BLOCK_V)
    largest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK_V):
        inside_V = start + col_V < V
        x_V = tl.load(logits_ptr + start + col_V, mask=inside_V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x_V, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x_V - new), 0)
        largest = new
    for start in range(0, V, BLOCK_V):
        inside_V = start + col_V < V
        x_V = tl.load(logits_ptr + start + col_V, mask=inside_V, other=float("-inf")).to(tl.float32)
        gradient_V = d_softmax * (tl.exp(x_V - largest) / total)
        gradient_V += tl.where(start + col_V == target, d_logp, 0.0)
        tl.store(logits_ptr + start + col_V, gradient_V, mask=inside_V)
    tl.store(logp_ptr + row, tl.where(target >= 0, (logit - largest) - tl.log(total), 0.0))


GRADIENT = {"BLOCK_V": 8192, "num_warps": 8}


def rows_per_chunk(weight_VD):
    size = choice("chunk", _shape(weight_VD), weight_VD.device, size=CHUNK_BYTES)["size"]
    return max(1, size // (len(weight_VD) * weight_VD.itemsize))


def logits_to_gradient_(logits_CV, targets_C, d_logp_C, d_lse_C):
    """Overwrites logits with the gradient that reaches them; -> the targets' log-probs."""
    logp_C = torch.empty_like(d_logp_C)
    vectors = targets_C, d_logp_C.contiguous(), d_lse_C.contiguous(), logp_C
    numbers = choice("gradient", _shape(logits_CV), logits_CV.device, **GRADIENT)
    with torch.cuda.device_of(logits_CV):
        _gradient_kernel[(len(logits_CV),)](logits_CV, *vectors, logits_CV.shape[1], **numbers, **FUSION)
    return logp_C
