"""The Triton kernels of the sampler's cache: write new keys and values, and attend to pages.

`attend_pages` computes what reference.py's does. A program owns one item of a batch of reads, one
key/value head and one split of the item's keys. The query heads of that group, of all the item's queries,
are the rows of its matmuls, so a page is read once for all of them: once for the 4 query heads of a
sample, once for all samples that share a prefix, once for 16 tokens of a prompt. It walks its keys with a
running maximum and leaves (sum of exp * value, maximum, sum of exp); a second kernel merges what all splits
of all reads left for a row, in a fixed order: no atomics, and a run repeats bit for bit.

Keys are found through the table, key by key, so a page may have any size. Only visible keys are loaded:
what stands in other places is never looked at, NaN or not. Shapes and splits depend on the operands'
shapes only, and nothing is read back, so a call may be captured in a CUDA graph. Operands are fp32, bf16 or
fp16; products of fp32 stay fp32; sums are fp32 always.

Left out: the copy engine (pages are scattered, and decode is bound by the bytes it reads), fp8 caches.
Legend of suffixes: T tokens, H query heads, G key/value heads, K head size, N pages of the pool, P tokens of
a page, I items, J queries of an item, M pages of an item, R rows (queries x heads of a group), W keys, U
tokens that are written (T without its padding), S splits of all reads, one behind the other.
"""

import torch
import triton
import triton.language as tl

from .paged_attention_cpu import LOWEST

KEYS_PER_TILE = 64
FUSION = {"enable_fp_fusion": True}  # the default until Triton 3.9, said aloud since 3.10 changes it


@triton.jit(do_not_specialize_on_alignment=["places_ptr"])
def _write_kernel(k_ptr, v_ptr, keys_ptr, values_ptr, places_ptr, GK, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places_ptr + token)
    at = tl.arange(0, BLOCK)
    k = tl.load(k_ptr + token * GK + at, mask=at < GK)
    v = tl.load(v_ptr + token * GK + at, mask=at < GK)
    tl.store(keys_ptr + place * GK + at, k, mask=at < GK)
    tl.store(values_ptr + place * GK + at, v, mask=at < GK)


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
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    item, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_R, d_K = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    member_R = row_R // HEADS
    token_R = tl.load(rows_ptr + item * J + member_R, mask=member_R < J, other=-1)
    real_R = token_R >= 0
    visible_R = tl.load(visible_ptr + item * J + member_R, mask=real_R & (member_R < J), other=0)
    head_R = group * HEADS + row_R % HEADS
    at_R = token_R * (G * HEADS) + head_R
    inside_RK = real_R[:, None] & (d_K < K)[None, :]
    q_RK = tl.load(q_ptr + at_R[:, None] * K + d_K[None, :], mask=inside_RK, other=0.0)
    max_R = tl.full([BLOCK_R], LOWEST, tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    o_RK = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    longest = tl.max(visible_R, 0)
    tiles = tl.cdiv(longest, BLOCK_W)
    per_split = tl.cdiv(tiles, splits)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        key_W = tile * BLOCK_W + tl.arange(0, BLOCK_W)
        page_W = tl.load(pages_ptr + item * M + key_W // PAGE, mask=key_W < longest, other=0)
        at_WK = ((page_W * PAGE + key_W % PAGE) * G + group)[:, None] * K + d_K[None, :]
        inside_WK = (key_W < longest)[:, None] & (d_K < K)[None, :]
        k_WK = tl.load(keys_ptr + at_WK, mask=inside_WK, other=0.0)
        v_WK = tl.load(values_ptr + at_WK, mask=inside_WK, other=0.0)
        score_RW = tl.dot(q_RK, k_WK.T, input_precision="ieee") * scale
        seen_RW = key_W[None, :] < visible_R[:, None]
        score_RW = tl.where(seen_RW, score_RW, float("-inf"))
        top_R = tl.maximum(max_R, tl.max(score_RW, 1))
        exp_RW = tl.exp(score_RW - top_R[:, None])
        shrink_R = tl.exp(max_R - top_R)
        sum_R = sum_R * shrink_R + tl.sum(exp_RW, 1)
        o_RK = o_RK * shrink_R[:, None]
        o_RK += tl.dot(exp_RW.to(v_WK.dtype), v_WK, input_precision="ieee")
        max_R = top_R
    at_R += (first_split + split).to(tl.int64) * T * G * HEADS
    tl.store(o_ptr + at_R[:, None] * K + d_K[None, :], o_RK, mask=inside_RK)
    tl.store(max_ptr + at_R, max_R, mask=real_R)
    tl.store(sum_ptr + at_R, sum_R, mask=real_R)


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
    weight_S = tl.exp(max_S - tl.max(max_S, 0))
    inside_SK = held_S[:, None] & (d_K < K)[None, :]
    o_SK = tl.load(o_ptr + (split_S * TH + row)[:, None] * K + d_K[None, :], mask=inside_SK, other=0.0)
    total = tl.sum(sum_S * weight_S, 0)
    o_K = tl.sum(o_SK * weight_S[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * K + d_K, o_K, mask=d_K < K)


def _tiles(dtype, rows):
    """-> (keys of a tile, launch options): chosen so that nothing spills, on sm_80 and on sm_90."""
    if dtype == torch.float32:
        return 16, {"num_warps": 16 if rows > 16 else 4, "num_stages": 2, **FUSION}
    return KEYS_PER_TILE, {"num_warps": 8 if rows >= 64 else 4, "num_stages": 3, **FUSION}


def write_kv(k_TGK, v_TGK, keys_NPGK, values_NPGK, places_U):
    """Puts the first U tokens' keys and values in their places: page * P + place in the page."""
    numbers = keys_NPGK[0, 0].numel()  # of one token
    _write_kernel[(len(places_U),)](
        k_TGK.contiguous(), v_TGK.contiguous(), keys_NPGK, values_NPGK, places_U, numbers,
        triton.next_power_of_2(numbers), **FUSION,
    )  # fmt: skip


def attend_pages(q_THK, keys_NPGK, values_NPGK, reads):
    """softmax(q k / sqrt(K)) v over all that `reads` lets each row see; 0 where that is nothing."""
    (count, heads, size), (_, page, groups, _) = q_THK.shape, keys_NPGK.shape
    q_THK = q_THK.contiguous()
    splits = [_splits(batch, groups, page, q_THK) for batch in reads]  # of each batch of reads
    total = max(1, sum(splits))
    o_STHK = torch.empty(total, count, heads, size, dtype=torch.float32, device=q_THK.device)
    max_STH = torch.empty(total, count, heads, dtype=torch.float32, device=q_THK.device)
    sum_STH = torch.zeros_like(max_STH)
    for index, batch in enumerate(reads):
        items, members = batch.rows_IJ.shape
        rows = max(16, triton.next_power_of_2(members * heads // groups))
        keys, options = _tiles(q_THK.dtype, rows)
        _read_kernel[(items, groups, splits[index])](
            q_THK, keys_NPGK, values_NPGK, batch.rows_IJ, batch.visible_IJ, batch.pages_IM,
            o_STHK, max_STH, sum_STH,
            count, groups, members, batch.pages_IM.shape[1], sum(splits[:index]), splits[index], size**-0.5,
            size, page, heads // groups, LOWEST,
            rows, keys, max(16, triton.next_power_of_2(size)), **options,
        )  # fmt: skip
    out_THK = torch.empty_like(q_THK)
    _merge_kernel[(count * heads,)](
        o_STHK, max_STH, sum_STH, out_THK, count * heads, total,
        size, LOWEST, triton.next_power_of_2(total), triton.next_power_of_2(size), **FUSION,
    )  # fmt: skip
    return out_THK


def _splits(batch, groups, page, q_THK):
    """As many as fill the device four times over, but at most 32, and one per tile; by the shapes alone.

    Every row has room in every split, so many rows have few. A split may be empty.
    """
    processors = torch.cuda.get_device_properties(q_THK.device).multi_processor_count if q_THK.is_cuda else 8
    programs = max(1, len(batch.rows_IJ) * groups)
    tiles = -(-batch.pages_IM.shape[1] * page // KEYS_PER_TILE)
    return max(1, min(32, tiles, 4 * processors // programs, 4096 // len(q_THK)))
