"""The Triton kernels of the sampler's cache: write new keys and values, and attend to pages.

`attend_pages` computes what reference.py's does. A program owns one item of a batch of reads, one
key/value head and one split of the item's keys. The query heads of that group, of all the item's queries,
are the rows of its matmuls, so a page is read once for all of them: once for the 4 query heads of a
sample, once for all samples that share a prefix, once for 16 tokens of a prompt. It walks its keys with a
running maximum and leaves (sum of exp * value, maximum, sum of exp); a second kernel merges what all splits
of all reads left for a row, in a fixed order: no atomics, and a run repeats bit for bit. Where one split has
it all, there is nothing to merge.

Decode is bound by the bytes it reads, so a read must not wait for one before it. A tile of keys is a page
or a part of one, and one head's keys of a page are one run of memory: all that a tile's addresses need is
the page's number, which is looked up a tile ahead. So the compiler can load the next tiles while one is
worked on, and the splits fill every processor with as many programs as fit.

A page may have any size; powers of two from 16 on waste nothing. Only visible keys are loaded: what stands
in other places is never looked at, NaN or not. Shapes and splits depend on the operands'
shapes only, and nothing is read back, so a call may be captured in a CUDA graph. Operands are fp32, bf16 or
fp16; products of fp32 stay fp32; sums are fp32 always. Scores and maxima are in powers of two.

Left out: the copy engine (a tile is copied by a few instructions of each thread anyway, and those know
masks), fp8 caches.
Legend of suffixes: T tokens, H query heads, G key/value heads, K head size, N pages of the pool, P tokens of
a page, I items, J queries of an item, M pages of an item, R rows (queries x heads of a group), W keys, U
tokens that are written (T without its padding), S splits of all reads, one behind the other.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from .paged_attention_cpu import LOWEST
from .tuning import FUSION, choice

MOST_SPLITS = 32  # a row's partial results are merged in one go
MOST_PARTIALS = 4096  # of all rows of a call: each takes as much memory as its row's result in fp32
LOG2_E = 1.4426950408889634
# By Triton's interpreter, on the CPU.
EMULATED = SimpleNamespace(major=9, multi_processor_count=8, shared_memory_per_multiprocessor=228 << 10)


@triton.jit(do_not_specialize_on_alignment=["places_ptr"])
def _write_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, places_ptr, G,
    K: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places_ptr + token)
    at = tl.arange(0, BLOCK)
    there = (place // PAGE * G * PAGE + place % PAGE) * K + at // K * PAGE * K + at % K
    k = tl.load(k_ptr + token * G * K + at, mask=at < G * K)
    v = tl.load(v_ptr + token * G * K + at, mask=at < G * K)
    tl.store(keys_ptr + there, k, mask=at < G * K)
    tl.store(values_ptr + there, v, mask=at < G * K)


# What changes from step to step (numbers of rows, members, pages, splits; where buffers begin) makes no
# kernel of its own: each would be compiled in the middle of a step.
@triton.jit(
    do_not_specialize=["T", "J", "M", "first_split", "splits"],
    do_not_specialize_on_alignment=["rows_ptr", "visible_ptr", "pages_ptr"],
)
def _read_kernel(
    q_ptr, keys_ptr, values_ptr, rows_ptr, visible_ptr, pages_ptr, o_ptr, max_ptr, sum_ptr,
    T, G, J, M, first_split, splits, scale,
    K: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, LOWEST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    item, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_R, d_K, at_W = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_W)
    member_R = row_R // HEADS
    token_R = tl.load(rows_ptr + item * J + member_R, mask=member_R < J, other=-1).to(tl.int32)
    visible_R = tl.load(visible_ptr + item * J + member_R, mask=member_R < J, other=0)
    real_R = token_R >= 0
    visible_R = tl.where(real_R, visible_R, 0).to(tl.int32)
    at_R = token_R * (G * HEADS) + group * HEADS + row_R % HEADS
    inside_RK = real_R[:, None] & (d_K < K)[None, :]
    at_RK = at_R.to(tl.int64)[:, None] * K + d_K[None, :]
    q_RK = tl.load(q_ptr + at_RK, mask=inside_RK, other=0.0)
    max_R = tl.full([BLOCK_R], LOWEST, tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    o_RK = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    PARTS: tl.constexpr = (PAGE + BLOCK_W - 1) // BLOCK_W  # tiles of a page
    longest = tl.max(visible_R, 0)
    tiles = longest // PAGE * PARTS + tl.cdiv(longest % PAGE, BLOCK_W)
    per_split = tl.cdiv(tiles, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, tiles)
    pages_ptr += item * M
    page = tl.load(pages_ptr + first // PARTS, mask=first < last, other=0)
    for tile in range(first, last):
        start = tile % PARTS * BLOCK_W
        key_W = tile // PARTS * PAGE + start + at_W
        if PAGE % BLOCK_W:  # the page's last tile reaches beyond it
            key_W = tl.where(start + at_W < PAGE, key_W, longest)
        run = ((page * G + group) * PAGE + start) * K
        # The next page is looked up while this one is on its way.
        page = tl.load(pages_ptr + (tile + 1) // PARTS, mask=tile + 1 < last, other=0)
        at_WK = at_W[:, None] * K + d_K[None, :]
        inside_WK = (key_W < longest)[:, None] & (d_K < K)[None, :]
        k_WK = tl.load(keys_ptr + run + at_WK, mask=inside_WK, other=0.0)
        v_WK = tl.load(values_ptr + run + at_WK, mask=inside_WK, other=0.0)
        score_RW = tl.dot(q_RK, k_WK.T, input_precision="ieee") * scale
        score_RW = tl.where(key_W[None, :] < visible_R[:, None], score_RW, float("-inf"))
        top_R = tl.maximum(max_R, tl.max(score_RW, 1))
        exp_RW = tl.exp2(score_RW - top_R[:, None])
        shrink_R = tl.exp2(max_R - top_R)
        sum_R = sum_R * shrink_R + tl.sum(exp_RW, 1)
        o_RK = tl.dot(exp_RW.to(v_WK.dtype), v_WK, o_RK * shrink_R[:, None], input_precision="ieee")
        max_R = top_R
    if WHOLE:  # no other split has anything for these rows: this is the result
        o_RK /= tl.where(sum_R == 0, 1.0, sum_R)[:, None]
        tl.store(o_ptr + at_RK, o_RK, mask=inside_RK)
    else:
        before = (first_split + split).to(tl.int64) * T * G * HEADS
        tl.store(o_ptr + before * K + at_RK, o_RK, mask=inside_RK)
        tl.store(max_ptr + before + at_R, max_R, mask=real_R)
        tl.store(sum_ptr + before + at_R, sum_R, mask=real_R)


@triton.jit(do_not_specialize=["TH", "splits"])
def _merge_kernel(
    o_ptr, max_ptr, sum_ptr, out_ptr, TH, splits,
    K: tl.constexpr, LOWEST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split_S, d_K = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    sum_S = tl.load(sum_ptr + split_S * TH + row, mask=split_S < splits, other=0.0)
    # A split that holds nothing was perhaps never written: it is neither read nor weighed.
    held_S = sum_S != 0
    max_S = tl.load(max_ptr + split_S * TH + row, mask=held_S, other=LOWEST)
    weight_S = tl.exp2(max_S - tl.max(max_S, 0))
    inside_SK = held_S[:, None] & (d_K < K)[None, :]
    o_SK = tl.load(o_ptr + (split_S * TH + row)[:, None] * K + d_K[None, :], mask=inside_SK, other=0.0)
    total = tl.sum(sum_S * weight_S, 0)
    o_K = tl.sum(o_SK * weight_S[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * K + d_K, o_K, mask=d_K < K)


def _tiles(dtype, rows, size, page, heads, device, processor):
    """-> (constants of `_read_kernel`, its options, how many programs fill the device).

    The built-in numbers spill nothing, on sm_80 and on sm_90. kernels/tuning.py may know better ones: kernel
    "paged read", shape "bfloat16 rows 16 size 128" (type; rows of an item with their padding: 16, 32 or 64;
    head size); names keys (of a tile, if a page has as many), num_warps, num_stages, and programs (that a
    processor holds at once: it sets the splits).
    """
    keys, warps, stages = 32 if rows > 32 and processor.major < 9 else 64, 4, 3
    if dtype == torch.float32:
        keys, warps, stages = 16, rows // 2, 2
    block = max(16, triton.next_power_of_2(size))
    # The queries, and the tiles that are worked on or on their way.
    held = (2 * rows + 2 * (stages - 1) * keys) * block * dtype.itemsize
    programs = max(1, min(4, processor.shared_memory_per_multiprocessor // held))
    shape = f"{str(dtype).removeprefix('torch.')} rows {rows} size {size}"
    built_in = {"keys": keys, "num_warps": warps, "num_stages": stages, "programs": programs}
    numbers = choice("paged read", shape, device, **built_in)
    tile = min(numbers["keys"], max(16, triton.next_power_of_2(page)))
    constants = {"K": size, "PAGE": page, "HEADS": heads, "LOWEST": LOWEST}
    constants |= {"BLOCK_R": rows, "BLOCK_W": tile, "BLOCK_K": block}
    options = {"num_warps": numbers["num_warps"], "num_stages": numbers["num_stages"], **FUSION}
    return constants, options, numbers["programs"] * processor.multi_processor_count


def write_kv(k_TGK, v_TGK, keys_NGPK, values_NGPK, places_U):
    """Puts the first U tokens' keys and values in their places: page * P + place in the page."""
    _, groups, page, size = keys_NGPK.shape
    _write_kernel[(len(places_U),)](
        k_TGK.contiguous(), v_TGK.contiguous(), keys_NGPK, values_NGPK, places_U, groups,
        size, page, triton.next_power_of_2(groups * size), **FUSION,
    )  # fmt: skip


def attend_pages(q_THK, keys_NGPK, values_NGPK, reads):
    """softmax(q k / sqrt(K)) v over all that `reads` lets each row see; 0 where that is nothing."""
    (count, heads, size), (_, groups, page, _) = q_THK.shape, keys_NGPK.shape
    q_THK = q_THK.contiguous()
    processor = torch.cuda.get_device_properties(q_THK.device) if q_THK.is_cuda else EMULATED
    case, launches = (size, page, heads // groups, q_THK.device, processor), []
    for batch in reads:
        items, members = batch.rows_IJ.shape
        rows = max(16, triton.next_power_of_2(members * heads // groups))
        constants, options, fill = _tiles(q_THK.dtype, rows, *case)
        tiles = batch.pages_IM.shape[1] * triton.cdiv(page, constants["BLOCK_W"])
        splits = min(MOST_SPLITS, MOST_PARTIALS // count, tiles, fill // max(1, items * groups))
        launches.append((max(1, splits), constants, options))
    total = max(1, sum(splits for splits, _, _ in launches))
    # Items of many rows have no registers left for it.
    whole = total == 1 and all(constants["BLOCK_R"] == 16 for _, constants, _ in launches)
    out_THK = torch.zeros_like(q_THK) if whole else torch.empty_like(q_THK)
    o_STHK = max_STH = sum_STH = out_THK
    if not whole:
        o_STHK = torch.empty(total, count, heads, size, dtype=torch.float32, device=q_THK.device)
        max_STH = torch.empty(total, count, heads, dtype=torch.float32, device=q_THK.device)
        sum_STH = torch.zeros_like(max_STH)  # of a split that holds none of a row
    first = 0
    for batch, (splits, constants, options) in zip(reads, launches, strict=True):
        _read_kernel[(len(batch.rows_IJ), groups, splits)](
            q_THK, keys_NGPK, values_NGPK, batch.rows_IJ, batch.visible_IJ, batch.pages_IM,
            o_STHK, max_STH, sum_STH, count, groups, batch.rows_IJ.shape[1], batch.pages_IM.shape[1],
            first, splits, size**-0.5 * LOG2_E, WHOLE=whole, **constants, **options,
        )  # fmt: skip
        first += splits
    if not whole:
        _merge_kernel[(count * heads,)](
            o_STHK, max_STH, sum_STH, out_THK, count * heads, total,
            size, LOWEST, triton.next_power_of_2(total), triton.next_power_of_2(size),
            num_warps=1 if total <= 4 else 4, **FUSION,
        )  # fmt: skip
    return out_THK
