"""The cache's attention in torch operations: for the CPU, and for devices that no Triton kernel serves.

`attend_pages` computes what reference.py's does, a whole batch of reads at a time. The keys of an item are
cut into parts of KEYS; the pages of one part of all items are gathered, and torch's fused attention gives
each part's result with the log-sum-exp of its scores, which is all that merging the parts needs. What does
not depend on the layer (where each query goes, what it may see, memory to gather in) is laid out once for
all layers, and kept with the reads.

In fp32 on the CPU a row's result is bitwise a function of its own query, keys, values and reads: whatever
the other rows are, however many pages pad its item, and whether its prefix is read alone or with others.
KEYS, ROWS and the order of the merge are chosen for that. A page has at most KEYS tokens here, and a hidden
key is read and weighed with 0: what stands in a page must not be NaN.

Left out: 16-bit products (operands are widened to fp32).
Legend of suffixes: T tokens, H query heads, G key/value heads, h query heads of a group (H / G), K head size,
N pages of the pool, P tokens of a page, I items, J queries of an item, M pages of an item, R query rows of an
item and group (J * h, padded), W keys of a cut, C pages of a cut, of all items and groups; Z query heads of
the whole batch (T * H), S parts: the cuts of all reads, one behind the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reads import Reads
from .reference import write_kv as write_kv  # it is as fast as it is plain

KEYS = 128  # keys of a cut of the sum: MKL adds up to 192 products in one order, however many zeros follow
ROWS = 8  # rows are padded to a multiple: a matmul of fewer takes another kernel, which rounds differently
LOWEST = -1e30  # a log-sum-exp of nothing; finite, so that a difference of two of them is 0 and not NaN


@dataclass(frozen=True)
class Cut:
    """KEYS keys of each item."""

    runs_C: Tensor  # page * G + group: where a group's keys of a page stand
    mask_I1RW: Tensor | None  # what is added to scores to hide keys; None where all are visible
    # To gather keys and values in: fresh memory for every layer would cost more than filling it.
    buffers: list[Tensor]


@dataclass(frozen=True)
class Layout:
    """Which query heads of the batch go where in the items, and from where their results come back."""

    there_IGR: Tensor
    back_Z: Tensor
    absent_Z: Tensor | None  # query heads that no item has, if there are any
    cuts: list[Cut]


def attend_pages(q_THK: Tensor, keys_NGPK: Tensor, values_NGPK: Tensor, reads: list[Reads[Tensor]]) -> Tensor:
    """softmax(q k / sqrt(K)) v over all that `reads` lets each row see; 0 where that is nothing."""
    tokens, heads, size = q_THK.shape
    layouts = [_layout(batch, tokens, heads, keys_NGPK) for batch in reads]
    q_ZK = q_THK.float().reshape(-1, size)
    o_SZK = q_ZK.new_zeros(max(1, sum(len(layout.cuts) for layout in layouts)), *q_ZK.shape)
    lse_SZ = q_ZK.new_full(o_SZK.shape[:2], LOWEST)
    results = zip(o_SZK, lse_SZ, strict=True)
    for layout in layouts:
        there_IGR, back_Z, absent_Z = layout.there_IGR, layout.back_Z, layout.absent_Z
        q_IGRK = q_ZK.index_select(0, there_IGR.flatten()).view(*there_IGR.shape, size)
        for cut in layout.cuts:
            k_IGWK, v_IGWK = (
                torch.index_select(pool.flatten(0, 1), 0, cut.runs_C, out=buffer)
                .view(*q_IGRK.shape[:2], -1, size).float()
                for pool, buffer in zip((keys_NGPK, values_NGPK), cut.buffers, strict=True)
            )  # fmt: skip
            o_IGRK, lse_IGR = _softmax_part(q_IGRK, k_IGWK, v_IGWK, cut.mask_I1RW)
            o_ZK, lse_Z = next(results)
            torch.index_select(o_IGRK.reshape(-1, size), 0, back_Z, out=o_ZK)
            torch.index_select(lse_IGR.flatten(), 0, back_Z, out=lse_Z)
            if absent_Z is not None:
                o_ZK.masked_fill_(absent_Z[:, None], 0)
                lse_Z.masked_fill_(absent_Z, LOWEST)
    return _merge(o_SZK, lse_SZ).view_as(q_THK).to(q_THK.dtype)


def _softmax_part(q_IGRK, k_IGWK, v_IGWK, mask_I1RW):
    """Attention over one cut -> (its result, log-sum-exp of its scores)."""
    if q_IGRK.device.type == "cpu":
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q_IGRK, k_IGWK, v_IGWK, attn_mask=mask_I1RW)
    score_IGRW = q_IGRK @ k_IGWK.transpose(2, 3) * q_IGRK.shape[3] ** -0.5
    if mask_I1RW is not None:
        score_IGRW += mask_I1RW
    return score_IGRW.softmax(3) @ v_IGWK, score_IGRW.logsumexp(3)


def _merge(o_SZK, lse_SZ):
    """One part after the other, in the order of the reads: a part that sees nothing changes no bit."""
    weight_SZ = (lse_SZ - lse_SZ.amax(0)).exp_()
    o_SZK.mul_(weight_SZ[..., None])
    total_Z, o_ZK = weight_SZ[0], o_SZK[0]
    for weight_Z, part_ZK in zip(weight_SZ[1:], o_SZK[1:], strict=True):
        total_Z.add_(weight_Z)
        o_ZK.add_(part_ZK)
    return o_ZK.div_(total_Z[:, None])


def _layout(reads, tokens, heads, keys_NGPK):
    if reads.layout is None:
        groups, page = keys_NGPK.shape[1:3]
        head_G1h = torch.arange(heads, device=reads.rows_IJ.device).view(groups, 1, -1)
        rows_IJ = torch.where(reads.visible_IJ > 0, reads.rows_IJ, -1)
        rows_IJ = rows_IJ.masked_fill(rows_IJ < 0, tokens)  # a row more, for what is nobody's
        there_IGR = (rows_IJ[:, None, :, None] * heads + head_G1h).flatten(2)
        padding = 0, -there_IGR.shape[2] % ROWS
        there_IGR = pad(there_IGR, padding, value=tokens * heads)
        back_Z = there_IGR.new_full(((tokens + 1) * heads,), -1)
        back_Z[there_IGR.flatten()] = torch.arange(there_IGR.numel(), device=back_Z.device)
        back_Z = back_Z[: tokens * heads]
        absent_Z = back_Z < 0
        there_IGR.clamp_(max=tokens * heads - 1)
        cuts = [
            _cut(reads, first, heads // groups, padding, keys_NGPK)
            for first in range(0, reads.pages_IM.shape[1], KEYS // page)
        ]
        reads.layout = Layout(there_IGR, back_Z.clamp_(min=0), absent_Z if absent_Z.any() else None, cuts)
    return reads.layout


def _cut(reads, first, heads_per_group, padding, keys_NGPK):
    """The keys of the pages from `first` on, of every item."""
    groups, page = keys_NGPK.shape[1:3]
    pages_IM = reads.pages_IM[:, first : first + KEYS // page]
    place_W = torch.arange(first * page, (first + pages_IM.shape[1]) * page, device=pages_IM.device)
    hidden_IJW = place_W >= reads.visible_IJ[..., None]
    mask_I1RW = None
    if hidden_IJW.any():
        mask_IJW = torch.zeros(hidden_IJW.shape, device=place_W.device).masked_fill_(hidden_IJW, LOWEST)
        mask_IRW = mask_IJW.repeat_interleave(heads_per_group, 1)
        mask_I1RW = pad(mask_IRW, (0, 0, *padding))[:, None]
    group_G1 = torch.arange(groups, device=pages_IM.device)[:, None]
    runs_C = (pages_IM[:, None] * groups + group_G1).flatten()
    buffers = [keys_NGPK.new_empty(len(runs_C), *keys_NGPK.shape[2:]) for _ in range(2)]
    return Cut(runs_C, mask_I1RW, buffers)
