"""The cache's attention in torch operations: for the CPU, and for devices that no Triton kernel serves.

`attend_pages` computes what reference.py's does, a whole list of reads at a time. The keys of an item are
cut into parts of KEYS; the pages of some cuts are gathered, and torch's fused attention gives each cut's
result with the log-sum-exp of its scores, which is all that merging them needs. What does not depend on the
layer (where each query goes, what it may see, memory to gather in) is laid out once for all layers, and kept
with the last of the reads, which may be those of the next step too; reads that are alike in shape are
computed as one, since a few rows cost little more than the calls that compute them.

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
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .reads import Reads
from .reference import write_kv as write_kv  # it is as fast as it is plain

KEYS = 128  # keys of a cut of the sum: MKL adds up to 192 products in one order, however many zeros follow
ROWS = 8  # rows are padded to a multiple: a matmul of fewer takes another kernel, which rounds differently
ROWS_AT_ONCE = 16  # where the number of rows matters beyond that (rows_alike)
PART_BYTES = 1 << 19  # of keys that are gathered at once: they, their values and more fit a core's own cache
LOWEST = -1e30  # a log-sum-exp of nothing; finite, so that a difference of two of them is 0 and not NaN

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Part(NamedTuple):
    """Cuts of items that are computed at once: all of its memory is there before the first layer."""

    q_UGRK: Tensor
    runs: Tensor  # page * G + group: where a group's keys of a page stand
    gathered: list[Tensor]  # its keys and values, as pages, which every part gathers in one place
    mask_U1RW: Tensor  # what is added to scores, to hide keys


@dataclass(frozen=True)
class Layout:
    """Which query heads go where, which keys they meet there, and from where each cut's results come back."""

    there_V: Tensor
    q_VK: Tensor  # the parts' queries
    parts: list[Part]
    back_SZ: Tensor  # of results that stand as queries do
    lse_back_SZ: Tensor  # of results that stand row by row, and group by group in a row
    absent_A: Tensor  # places in back_SZ of the query heads that no item has
    mask_U1RW: Tensor  # of the last neighbours; their parts have views of it


def attend_pages(q_THK: Tensor, keys_NGPK: Tensor, values_NGPK: Tensor, reads: list[Reads[Tensor]]) -> Tensor:
    """softmax(q k / sqrt(K)) v over all that `reads` lets each row see; 0 where that is nothing."""
    tokens, heads, _ = q_THK.shape
    layout = _kept_layout(reads, tokens, heads, keys_NGPK)
    if not layout:
        return torch.zeros_like(q_THK)
    torch.index_select(q_THK.float().flatten(0, 1), 0, layout.there_V, out=layout.q_VK)
    pools = keys_NGPK.flatten(0, 1), values_NGPK.flatten(0, 1)
    results = [_attend(part, pools) for part in layout.parts]
    o_VK, lse_V = map(torch.cat, zip(*results, strict=True))
    o_SZK = o_VK.index_select(0, layout.back_SZ.view(-1)).view(*layout.back_SZ.shape, -1)
    lse_SZ = lse_V.index_select(0, layout.lse_back_SZ.view(-1)).view_as(layout.back_SZ)
    if layout.absent_A.numel():
        o_SZK.flatten(0, 1).index_fill_(0, layout.absent_A, 0)
        lse_SZ.view(-1).index_fill_(0, layout.absent_A, LOWEST)
    return _merge(o_SZK, lse_SZ).view_as(q_THK).to(q_THK.dtype)


def _attend(part, pools):
    """-> the results of a part, and the log-sum-exp of its scores; see Layout for their order."""
    q_UGRK, runs, gathered, mask_U1RW = part
    k_UGWK, v_UGWK = (
        torch.index_select(pool, 0, runs, out=pages).view(*q_UGRK.shape[:2], -1, q_UGRK.shape[3]).float()
        for pool, pages in zip(pools, gathered, strict=True)
    )
    o_UGRK, lse_UGR = _softmax_part(q_UGRK, k_UGWK, v_UGWK, mask_U1RW)
    return o_UGRK.flatten(0, 2), lse_UGR.transpose(1, 2).flatten()


def _softmax_part(q_UGRK, k_UGWK, v_UGWK, mask_U1RW):
    """Attention over the keys of each cut -> (its result, log-sum-exp of its scores)."""
    if q_UGRK.device.type == "cpu":
        if rows_alike(q_UGRK.shape[3]):
            return _fused(q_UGRK, k_UGWK, v_UGWK, attn_mask=mask_U1RW)
        rows = zip(q_UGRK.split(ROWS_AT_ONCE, 2), mask_U1RW.split(ROWS_AT_ONCE, 2), strict=True)
        parts = [_fused(q_UGrK, k_UGWK, v_UGWK, attn_mask=mask_U1rW) for q_UGrK, mask_U1rW in rows]
        return [torch.cat(each, 2) for each in zip(*parts, strict=True)]
    score_UGRW = q_UGRK @ k_UGWK.transpose(2, 3) * q_UGRK.shape[3] ** -0.5 + mask_U1RW
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
        parts = [slice(0, unit * n) for n in (1, 2, 3, 5, 8, 12)] + [slice(unit, 3 * unit)]
        few = [_fused(q_11RK[:, :, each], k_11WK, v_11WK)[0] for each in parts]
        return all(o_11RK.equal(whole_11RK[:, :, each]) for o_11RK, each in zip(few, parts, strict=True))

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
    """It is kept with the last of the reads. That may have moved by a key since: then its mask is another."""
    some = [batch for batch in reads if batch.pages_IM.numel()]
    if not some:
        return None
    last = some[-1]
    if last.layout is None:
        last.layout = _layout(some, tokens, heads, keys_NGPK)
    elif last.moved:
        hidden_URW = _hidden(last, heads // keys_NGPK.shape[1], keys_NGPK.shape[2])
        (items, rows, keys), mask_U1RW = hidden_URW.shape, last.layout.mask_U1RW
        mask_U1RW[-items:, 0, :rows, :keys] = _mask(hidden_URW)
    last.moved = False
    return last.layout


def _layout(reads, tokens, heads, keys_NGPK):
    """On the host, in numpy: many small steps, for which it takes a third of torch's time."""
    (groups, page, size), device = keys_NGPK.shape[1:], keys_NGPK.device
    placed = [_placed(batch, tokens, heads, groups, page, _unit(size)) for batch in reads]
    there, *_, backs = zip(*placed, strict=True)
    # Each one's results are counted from its own first on.
    begins = accumulate((each.size for each in there), initial=0)
    back_2SZ = np.concatenate(
        [np.where(back < 0, -1, back + n) for back, n in zip(backs, begins, strict=False)], 1
    )
    q_VK = rest_VK = torch.empty(sum(each.size for each in there), size, device=device)
    most = max(PART_BYTES // keys_NGPK[0, 0].nbytes, groups * (KEYS // page))
    memory, parts = [keys_NGPK.new_empty(most, page, size) for _ in range(2)], []
    for (_, rows), alike in groupby(placed, lambda each: each[0].shape[1:]):  # neighbours are computed as one
        _, hidden, pages, _ = zip(*alike, strict=True)
        hidden_URW = np.concatenate(_equally_wide(hidden, True))
        pages_UC = np.concatenate(_equally_wide(pages, 0))
        mask_U1RW = _mask(hidden_URW[:, None]).to(device)
        runs_UGC = torch.from_numpy(pages_UC[:, None] * groups + np.arange(groups)[:, None]).to(device)
        q_UGRK = rest_VK[: len(pages_UC) * groups * rows].view(-1, groups, rows, size)
        rest_VK, few = rest_VK[len(pages_UC) * groups * rows :], most // runs_UGC[0].numel()
        for q, runs, mask in zip(*(each.split(few) for each in (q_UGRK, runs_UGC, mask_U1RW)), strict=True):
            parts.append(Part(q, runs.flatten(), [each[: runs.numel()] for each in memory], mask))
    arrays = np.concatenate([*map(np.ravel, there)]), *back_2SZ.clip(0), np.flatnonzero(back_2SZ[0] < 0)
    there_V, back_SZ, lse_back_SZ, absent_A = (torch.from_numpy(array).to(device) for array in arrays)
    return Layout(there_V, q_VK, parts, back_SZ, lse_back_SZ, absent_A, mask_U1RW)


def _placed(reads, tokens, heads, groups, page, unit):
    """Of one batch of reads: where each row's queries are from, its hidden keys, its pages, where it goes."""
    rows_IJ, visible_IJ, pages_IM = (array.cpu().numpy() for array in reads.arrays())
    (items, queries), per_group = rows_IJ.shape, heads // groups
    rows_IJ = np.where((visible_IJ > 0) & (rows_IJ >= 0), rows_IJ, tokens)  # a row more, for what is nobody's
    there_IGJh = rows_IJ[:, None, :, None] * heads + np.arange(heads).reshape(groups, 1, per_group)
    rows = -(-queries * per_group // unit) * unit
    there_IGR = _wider(there_IGJh.reshape(items, groups, -1), rows, tokens * heads)

    per_cut = _pages_per_cut(pages_IM, page)
    pages_IM = _wider(pages_IM, -(-pages_IM.shape[1] // per_cut) * per_cut, 0)
    pages_SIC = pages_IM.reshape(items, -1, per_cut).swapaxes(0, 1)
    cuts = len(pages_SIC)
    hidden_URW = np.zeros((cuts * items, rows, per_cut * page), bool)
    hidden_URW[:, : queries * per_group] = _hidden(reads, per_group, page)

    back_2SZ = np.full((2, cuts, (tokens + 1) * heads), -1)
    number_UGR = np.arange(cuts * there_IGR.size).reshape(-1, groups, rows)
    number_URG = number_UGR.reshape(-1, rows, groups).swapaxes(1, 2)
    for back_SZ, number in zip(back_2SZ, (number_UGR, number_URG), strict=True):
        back_SZ[:, there_IGR.ravel()] = number.reshape(cuts, -1)
    there_UGR = np.tile(there_IGR, (cuts, 1, 1)).clip(max=tokens * heads - 1)
    return there_UGR, hidden_URW, pages_SIC.reshape(-1, per_cut), back_2SZ[..., : tokens * heads]


def _hidden(reads, per_group, page):
    """Which keys each query row may not see."""
    visible_IJ, per_cut = reads.visible_IJ.cpu().numpy(), _pages_per_cut(reads.pages_IM, page)
    cuts = -(-reads.pages_IM.shape[1] // per_cut)
    place_S11W = np.arange(cuts * per_cut * page).reshape(cuts, 1, 1, -1)
    hidden_SIJW = place_S11W >= visible_IJ[..., None]
    return hidden_SIJW.reshape(-1, *hidden_SIJW.shape[2:]).repeat(per_group, 1)


def _pages_per_cut(pages_IM, page):
    return min(KEYS // page, pages_IM.shape[1])


def _mask(hidden):
    """What is added to scores."""
    return torch.from_numpy(hidden * np.float32(LOWEST))


def _equally_wide(arrays, fill):
    most = max(array.shape[-1] for array in arrays)
    return [_wider(array, most, fill) for array in arrays]


def _wider(array, size, fill):
    """The array, filled up in its last dimension."""
    if array.shape[-1] == size:
        return array
    wider = np.full((*array.shape[:-1], size), fill, array.dtype)
    wider[..., : array.shape[-1]] = array
    return wider
