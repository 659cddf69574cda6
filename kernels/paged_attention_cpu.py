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

import numpy as np
import torch
from torch import Tensor

from .reads import Reads
from .reference import write_kv as write_kv  # it is as fast as it is plain

KEYS = 128  # keys of a cut of the sum: MKL adds up to 192 products in one order, however many zeros follow
ROWS = 8  # rows are padded to a multiple: a matmul of fewer takes another kernel, which rounds differently
ROWS_AT_ONCE = 16  # where the number of rows matters beyond that (rows_alike)
PART_BYTES = 1 << 18  # of keys that are gathered at once: they, their values and more fit a core's own cache
LOWEST = -1e30  # a log-sum-exp of nothing; finite, so that a difference of two of them is 0 and not NaN

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Layout:
    """Which query heads go where, which keys they meet there, and from where each cut's results come back."""

    there_UGR: Tensor
    few: int  # of U, which are computed at once
    # Of each few: page * G + group, where a group's keys of a page stand; and what is added to scores to hide
    # keys, None where all are visible.
    parts: list[tuple[Tensor, Tensor | None]]
    back_SZ: Tensor
    absent_A: Tensor | None  # places in back_SZ of the query heads that no item has, if there are any
    # To gather keys and values in, for one part after the other: they are read while the cache holds them.
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
    there_UGR, size, results = layout.there_UGR, q_ZK.shape[1], []
    q_UGRK = q_ZK.index_select(0, there_UGR.view(-1)).view(*there_UGR.shape, size)
    pools = keys_NGPK.flatten(0, 1), values_NGPK.flatten(0, 1)
    for q_uGRK, (runs, mask_u1RW) in zip(q_UGRK.split(layout.few), layout.parts, strict=True):
        k_uGWK, v_uGWK = (
            torch.index_select(pool, 0, runs, out=buffer[: len(runs)])
            .view(*q_uGRK.shape[:2], -1, size).float()
            for pool, buffer in zip(pools, layout.buffers, strict=True)
        )  # fmt: skip
        results.append(_softmax_part(q_uGRK, k_uGWK, v_uGWK, mask_u1RW))
    o_UGRK, lse_UGR = map(torch.cat, zip(*results, strict=True)) if results[1:] else results[0]
    back = layout.back_SZ.view(-1)
    torch.index_select(o_UGRK.reshape(-1, size), 0, back, out=o_SZK.view(-1, size))
    torch.index_select(lse_UGR.flatten(), 0, back, out=lse_SZ.view(-1))
    if layout.absent_A is not None:
        o_SZK.view(-1, size).index_fill_(0, layout.absent_A, 0)
        lse_SZ.view(-1).index_fill_(0, layout.absent_A, LOWEST)


def _softmax_part(q_UGRK, k_UGWK, v_UGWK, mask_U1RW):
    """Attention over the keys of each cut -> (its result, log-sum-exp of its scores)."""
    if q_UGRK.device.type == "cpu":
        if rows_alike(q_UGRK.shape[3]):
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
def rows_alike(size: int) -> int | None:
    """The fewest rows, in multiples of which a row has the same bits in any number of them. With AVX2 alone
    there are none: MKL chooses a kernel by their number, and may round by a row's place in it.
    """
    draw = torch.Generator().manual_seed(0)
    q_11RK = torch.randn(1, 1, 192, size, generator=draw)
    k_11WK, v_11WK = torch.randn(2, 1, 1, KEYS, size, generator=draw)
    whole_11RK = _fused(q_11RK, k_11WK, v_11WK)[0]

    def alike(unit: int) -> bool:
        parts = [slice(0, unit * n) for n in (1, 2, 3, 5, 8, 12)] + [
            slice(n * unit, 3 * unit) for n in (1, 2)
        ]
        return all(
            _fused(q_11RK[:, :, each], k_11WK, v_11WK)[0].equal(whole_11RK[:, :, each]) for each in parts
        )

    return next((unit for unit in (2, 4, ROWS) if alike(unit)), None)


def _unit(size):
    return rows_alike(size) or ROWS_AT_ONCE


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
    """On the host, in numpy: many small steps, for which it takes a third of torch's time."""
    groups, page = keys_NGPK.shape[1:3]
    sizes = tokens, heads, groups, page, _unit(keys_NGPK.shape[3])
    there, hidden, pages, back = zip(*(_part(batch, *sizes) for batch in reads), strict=True)
    most = max(each.shape[2] for each in hidden), max(each.shape[1] for each in pages)
    mask_URW = np.concatenate([_wider(each, most[0], True) for each in hidden]) * np.float32(LOWEST)
    pages_UC = np.concatenate([_wider(each, most[1], 0) for each in pages])
    # Each part's results are counted from its own first on.
    begins = [0, *accumulate(each.size for each in there)]
    back_SZ = np.concatenate([each + begin * (each >= 0) for each, begin in zip(back, begins, strict=False)])
    runs_UGC = pages_UC[:, None] * groups + np.arange(groups)[:, None]
    absent_A = np.flatnonzero(back_SZ < 0)
    there_UGR = np.minimum(np.concatenate(there), tokens * heads - 1)
    arrays = there_UGR, runs_UGC, mask_URW[:, None], np.maximum(back_SZ, 0), absent_A
    whence, runs, mask, whither, absent = (torch.from_numpy(array).to(keys_NGPK.device) for array in arrays)
    few = max(1, PART_BYTES // (runs[0].numel() * keys_NGPK[0, 0].nbytes))
    few = -(-len(runs) // -(-len(runs) // few))  # parts of one size
    masks = mask.split(few) if mask.any() else repeat(None)
    parts = [(each.flatten(), mask) for each, mask in zip(runs.split(few), masks, strict=False)]
    buffers = [keys_NGPK.new_empty(len(parts[0][0]), *keys_NGPK.shape[2:]) for _ in range(2)]
    return Layout(whence, few, parts, whither, absent if len(absent) else None, buffers)


def _part(reads, tokens, heads, groups, page, unit):
    """Of one batch of reads: where each row's queries are from, its hidden keys, its pages, where it goes."""
    rows_IJ, visible_IJ, pages_IM = (array.cpu().numpy() for array in reads.arrays())
    (items, queries), per_group = rows_IJ.shape, heads // groups
    rows_IJ = np.where((visible_IJ > 0) & (rows_IJ >= 0), rows_IJ, tokens)  # a row more, for what is nobody's
    there_IGJh = rows_IJ[:, None, :, None] * heads + np.arange(heads).reshape(groups, 1, per_group)
    wide = -(-queries * per_group // unit) * unit
    there_IGR = _wider(there_IGJh.reshape(items, groups, -1), wide, tokens * heads)

    per_cut = min(KEYS // page, pages_IM.shape[1])
    pages_IM = _wider(pages_IM, -(-pages_IM.shape[1] // per_cut) * per_cut, 0)
    pages_SIC = pages_IM.reshape(items, -1, per_cut).swapaxes(0, 1)
    cuts = len(pages_SIC)
    place_SW = np.arange(cuts * per_cut * page).reshape(cuts, -1)
    hidden_SIJW = place_SW[:, None, None] >= visible_IJ[..., None]
    hidden_URW = np.zeros((cuts * items, wide, place_SW.shape[1]), bool)
    hidden_URW[:, : queries * per_group] = hidden_SIJW.reshape(cuts * items, queries, -1).repeat(per_group, 1)

    back_SZ = np.full((cuts, (tokens + 1) * heads), -1)
    back_SZ[:, there_IGR.ravel()] = np.arange(cuts * there_IGR.size).reshape(cuts, -1)
    pages_UC = pages_SIC.reshape(-1, per_cut)
    return np.tile(there_IGR, (cuts, 1, 1)), hidden_URW, pages_UC, back_SZ[:, : tokens * heads]


def _wider(array, size, fill):
    """The array, filled up in its last dimension."""
    if array.shape[-1] == size:
        return array
    wider = np.full((*array.shape[:-1], size), fill, array.dtype)
    wider[..., : array.shape[-1]] = array
    return wider
