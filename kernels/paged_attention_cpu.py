"""The cache's attention in torch operations: for the CPU, and for devices that no Triton kernel serves.

`attend_pages` computes what reference.py's does, a whole batch of reads at a time. The keys of an item are
cut into parts of KEYS; the pages of all cuts are gathered, and torch's fused attention gives each cut's
result with the log-sum-exp of its scores, which is all that merging them needs. What does not depend on the
layer (where each query goes, what it may see, memory to gather in) is laid out once for all layers, and kept
with the reads; reads that are alike in shape are laid out as one, since a few rows cost little more than the
calls that compute them.

In fp32 on the CPU, of what the engine asks, a row's result is bitwise a function of its own query, keys,
values and reads: whatever the other rows are, and whether its prefix is read alone or with others.
KEYS, ROWS and the order of the merge are chosen for that. A page has at most KEYS tokens here, and a hidden
key is read and weighed with 0: what stands in a page must not be NaN.

Left out: 16-bit products (operands are widened to fp32).
Legend of suffixes: T tokens, H query heads, G key/value heads, h query heads of a group (H / G), K head size,
N pages of the pool, P tokens of a page, I items, J queries of an item, M pages of an item; S cuts of all
reads, U cuts of items (S * I), R query rows of an item and group (J * h, padded), C pages of a cut, W its
keys; Z query heads of the whole batch (T * H), V what all items have together.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, repeat

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reads import Reads
from .reference import write_kv as write_kv  # it is as fast as it is plain

KEYS = 128  # keys of a cut of the sum: MKL adds up to 192 products in one order, however many zeros follow
ROWS = 8  # rows are padded to a multiple: a matmul of fewer takes another kernel, which rounds differently
ROWS_AT_ONCE = 16  # where the number of rows matters beyond that (any_number_of_rows)
LOWEST = -1e30  # a log-sum-exp of nothing; finite, so that a difference of two of them is 0 and not NaN

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Layout:
    """Which query heads go where, which keys they meet there, and from where each cut's results come back."""

    there_UGR: Tensor
    runs_UGC: Tensor  # page * G + group: where a group's keys of a page stand
    mask_URW: Tensor | None  # what is added to scores to hide keys; None where all are visible
    back_SZ: Tensor
    absent_SZ: Tensor | None  # query heads that no item has, if there are any
    # To gather keys and values in: fresh memory for every layer would cost more than filling it.
    buffers: list[Tensor]


def attend_pages(q_THK: Tensor, keys_NGPK: Tensor, values_NGPK: Tensor, reads: list[Reads[Tensor]]) -> Tensor:
    """softmax(q k / sqrt(K)) v over all that `reads` lets each row see; 0 where that is nothing."""
    (tokens, heads, _), groups = q_THK.shape, keys_NGPK.shape[1]
    # Neighbours with as many query rows are computed as one; their layout is kept with the last of them.
    some = [batch for batch in reads if batch.pages_IM.numel()]
    unit = _unit(keys_NGPK.shape[3])
    alike = groupby(some, lambda batch: -(-batch.rows_IJ.shape[1] * (heads // groups) // unit))
    layouts = [_kept_layout(list(group), tokens, heads, keys_NGPK) for _, group in alike]
    if not layouts:
        return torch.zeros_like(q_THK)
    cuts = [len(layout.back_SZ) for layout in layouts]
    q_ZK = q_THK.float().flatten(0, 1)
    o_SZK, lse_SZ = q_ZK.new_empty(sum(cuts), *q_ZK.shape), q_ZK.new_empty(sum(cuts), len(q_ZK))
    for layout, *results in zip(layouts, o_SZK.split(cuts), lse_SZ.split(cuts), strict=True):
        _attend(q_ZK, keys_NGPK, values_NGPK, layout, *results)
    return _merge(o_SZK, lse_SZ).view_as(q_THK).to(q_THK.dtype)


def _attend(q_ZK, keys_NGPK, values_NGPK, layout, o_SZK, lse_SZ):
    """Fills in the results of a layout's cuts, and the log-sum-exp of their scores."""
    there_UGR, size = layout.there_UGR, q_ZK.shape[1]
    q_UGRK = q_ZK.index_select(0, there_UGR.view(-1)).view(*there_UGR.shape, size)
    k_UGWK, v_UGWK = (
        torch.index_select(pool.flatten(0, 1), 0, layout.runs_UGC.view(-1), out=buffer)
        .view(*there_UGR.shape[:2], -1, size).float()
        for pool, buffer in zip((keys_NGPK, values_NGPK), layout.buffers, strict=True)
    )  # fmt: skip
    mask_U1RW = None if layout.mask_URW is None else layout.mask_URW[:, None]
    o_UGRK, lse_UGR = _softmax_part(q_UGRK, k_UGWK, v_UGWK, mask_U1RW)
    back = layout.back_SZ.view(-1)
    torch.index_select(o_UGRK.reshape(-1, size), 0, back, out=o_SZK.view(-1, size))
    torch.index_select(lse_UGR.flatten(), 0, back, out=lse_SZ.view(-1))
    if layout.absent_SZ is not None:
        o_SZK.masked_fill_(layout.absent_SZ[..., None], 0)
        lse_SZ.masked_fill_(layout.absent_SZ, LOWEST)


def _softmax_part(q_UGRK, k_UGWK, v_UGWK, mask_U1RW):
    """Attention over the keys of each cut -> (its result, log-sum-exp of its scores)."""
    if q_UGRK.device.type == "cpu":
        if any_number_of_rows(q_UGRK.shape[3]):
            return _fused(q_UGRK, k_UGWK, v_UGWK, attn_mask=mask_U1RW)
        masks = repeat(None) if mask_U1RW is None else mask_U1RW.split(ROWS_AT_ONCE, 2)
        rows = zip(q_UGRK.split(ROWS_AT_ONCE, 2), masks, strict=False)
        parts = [_fused(q_UGrK, k_UGWK, v_UGWK, attn_mask=mask_U1rW) for q_UGrK, mask_U1rW in rows]
        return [torch.cat(each, 2) for each in zip(*parts, strict=True)]
    score_UGRW = q_UGRK @ k_UGWK.transpose(2, 3) * q_UGRK.shape[3] ** -0.5
    if mask_U1RW is not None:
        score_UGRW += mask_U1RW
    return score_UGRW.softmax(3) @ v_UGWK, score_UGRW.logsumexp(3)


@lru_cache
def any_number_of_rows(size: int) -> bool:
    """Whether a row has the same bits in any multiple of ROWS. With AVX2 alone MKL chooses a kernel by their
    number, and may round by a row's place in it; but not in 16.
    """
    draw = torch.Generator().manual_seed(0)
    q_11RK = torch.randn(1, 1, 192, size, generator=draw)
    k_11WK, v_11WK = torch.randn(2, 1, 1, KEYS, size, generator=draw)
    whole_11RK = _fused(q_11RK, k_11WK, v_11WK)[0]
    fewer = [slice(0, rows) for rows in (8, 16, 24, 40, 64)] + [slice(8, 24)]
    return all(_fused(q_11RK[:, :, each], k_11WK, v_11WK)[0].equal(whole_11RK[:, :, each]) for each in fewer)


def _unit(size):
    return ROWS if any_number_of_rows(size) else ROWS_AT_ONCE


def _merge(o_SZK, lse_SZ):
    """One cut after the other, in the order of the reads: a cut that sees nothing changes no bit."""
    weight_SZ = (lse_SZ - lse_SZ.amax(0)).exp_()
    o_SZK.mul_(weight_SZ[..., None])
    total_Z, o_ZK = weight_SZ[0], o_SZK[0]
    for weight_Z, part_ZK in zip(weight_SZ[1:], o_SZK[1:], strict=True):
        total_Z.add_(weight_Z)
        o_ZK.add_(part_ZK)
    return o_ZK.div_(total_Z[:, None])


def _kept_layout(reads, tokens, heads, keys_NGPK):
    last = reads[-1]
    last.layout = last.layout or _layout(reads, tokens, heads, keys_NGPK)
    return last.layout


def _layout(reads, tokens, heads, keys_NGPK):
    parts = [_part(batch, tokens, heads, keys_NGPK) for batch in reads]
    there, hidden, pages, back = zip(*parts, strict=True)
    most = max(each.shape[2] for each in hidden), max(each.shape[1] for each in pages)
    hidden_URW = torch.cat([pad(each, (0, most[0] - each.shape[2]), value=True) for each in hidden])
    pages_UC = torch.cat([pad(each, (0, most[1] - each.shape[1])) for each in pages])
    there_UGR, groups = torch.cat(there), keys_NGPK.shape[1]
    # Each part's results are counted from its own first on.
    begins = [0, *accumulate(each.numel() for each in there)]
    back_SZ = torch.cat([each + begin * (each >= 0) for each, begin in zip(back, begins, strict=False)])
    runs_UGC = pages_UC[:, None] * groups + torch.arange(groups, device=pages_UC.device)[:, None]
    mask_URW = torch.zeros(hidden_URW.shape, device=there_UGR.device).masked_fill_(hidden_URW, LOWEST)
    absent_SZ = back_SZ < 0
    return Layout(
        there_UGR.clamp(max=tokens * heads - 1), runs_UGC,
        mask_URW if hidden_URW.any() else None,
        back_SZ.clamp(min=0), absent_SZ if absent_SZ.any() else None,
        [keys_NGPK.new_empty(runs_UGC.numel(), *keys_NGPK.shape[2:]) for _ in range(2)],
    )  # fmt: skip


def _part(reads, tokens, heads, keys_NGPK):
    """Of one batch of reads: where each row's queries are from, its hidden keys, its pages, where it goes."""
    (groups, page), (items, pages) = keys_NGPK.shape[1:3], reads.pages_IM.shape
    rows_IJ = torch.where(reads.visible_IJ > 0, reads.rows_IJ, -1)
    rows_IJ = rows_IJ.masked_fill(rows_IJ < 0, tokens)  # a row more, for what is nobody's
    head_G1h = torch.arange(heads, device=rows_IJ.device).view(groups, 1, -1)
    there_IGR = (rows_IJ[:, None, :, None] * heads + head_G1h).flatten(2)
    padding = 0, -there_IGR.shape[2] % _unit(keys_NGPK.shape[3])
    there_IGR = pad(there_IGR, padding, value=tokens * heads)

    per_cut = min(KEYS // page, pages)
    pages_SIC = pad(reads.pages_IM, (0, -pages % per_cut)).view(items, -1, per_cut).transpose(0, 1)
    place_SW = torch.arange(pages_SIC[:, 0].numel() * page, device=rows_IJ.device).view(len(pages_SIC), -1)
    hidden_SIJW = place_SW[:, None, None] >= reads.visible_IJ[..., None]
    hidden_URW = pad(hidden_SIJW.flatten(0, 1).repeat_interleave(heads // groups, 1), (0, 0, *padding))

    there_UGR = there_IGR.repeat(len(pages_SIC), 1, 1)
    back_SZ = there_UGR.new_full((len(pages_SIC), (tokens + 1) * heads), -1)
    number_SV = torch.arange(there_UGR.numel(), device=rows_IJ.device).view(len(pages_SIC), -1)
    back_SZ.scatter_(1, there_UGR.view_as(number_SV), number_SV)
    return there_UGR, hidden_URW, pages_SIC.flatten(0, 1), back_SZ[:, : tokens * heads]
