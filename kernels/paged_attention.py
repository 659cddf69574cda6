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
a page, I items, J queries of an item, M pages of an item, R rows (queries x heads of a group), W keys, S
slots: in `write_kv` the places written to, elsewhere the splits of all reads, one behind the other.
"""

import torch
import triton
import triton.language as tl

from .reference import LOWEST

KEYS_PER_TILE = 64
FUSION = {"enable_fp_fusion": True}  # the default until Triton 3.9, said aloud since 3.10 changes it


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _write_kernel(k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, GK, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    at = tl.arange(0, BLOCK)
    k = tl.load(k_ptr + token * GK + at, mask=at < GK)
    v = tl.load(v_ptr + token * GK + at, mask=at < GK)
    tl.store(keys_ptr + slot * GK + at, k, mask=at < GK)
    tl.store(values_ptr + slot * GK + at, v, mask=at < GK)


# What changes from step to step (numbers of rows, members, pages, splits; where buffers begin) makes no
# kernel of its own: each would be compiled in the middle of a step.
@triton.jit(
    do_not_specialize=["T", "J", "M", "first_slot", "splits"],
    do_not_specialize_on_alignment=["rows_ptr", "visible_ptr", "pages_ptr"],
)
def _read_kernel(
    q_ptr, keys_ptr, values_ptr, rows_ptr, visible_ptr, pages_ptr, o_ptr, max_ptr, sum_ptr,
    T, G, J, M, first_slot, splits, scale,
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
    at_R += (first_slot + split).to(tl.int64) * T * G * HEADS
    tl.store(o_ptr + at_R[:, None] * K + d_K[None, :], o_RK, mask=inside_RK)
    tl.store(max_ptr + at_R, max_R, mask=real_R)
    tl.store(sum_ptr + at_R, sum_R, mask=real_R)


@triton.jit(do_not_specialize=["TH", "slots"])
def _merge_kernel(
    o_ptr, max_ptr, sum_ptr, out_ptr, TH, slots,
    K: tl.constexpr, LOWEST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot_S, d_K = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    sum_S = tl.load(sum_ptr + slot_S * TH + row, mask=slot_S < slots, other=0.0)
    # A slot that holds nothing was perhaps never written: it is neither read nor weighed.
    held_S = sum_S != 0
    max_S = tl.load(max_ptr + slot_S * TH + row, mask=held_S, other=LOWEST)
    weight_S = tl.exp(max_S - tl.max(max_S, 0))
    inside_SK = held_S[:, None] & (d_K < K)[None, :]
    o_SK = tl.load(o_ptr + (slot_S * TH + row)[:, None] * K + d_K[None, :], mask=inside_SK, other=0.0)
    total = tl.sum(sum_S * weight_S, 0)
    o_K = tl.sum(o_SK * weight_S[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * K + d_K, o_K, mask=d_K < K)


def _tiles(dtype, rows):
    """-> (keys of a tile, launch options): chosen so that nothing spills, on sm_80 and on sm_90."""
    if dtype == torch.float32:
        return 16, {"num_warps": 16 if rows > 16 else 4, "num_stages": 2, **FUSION}
    return KEYS_PER_TILE, {"num_warps": 8 if rows >= 64 else 4, "num_stages": 3, **FUSION}


def write_kv(k_TGK, v_TGK, keys_NPGK, values_NPGK, slots_S):
    """Puts the first S tokens' keys and values in their places: slot = page * P + place in the page."""
    places = keys_NPGK[0, 0].numel()
    _write_kernel[(len(slots_S),)](
        k_TGK.contiguous(), v_TGK.contiguous(), keys_NPGK, values_NPGK, slots_S, places,
        triton.next_power_of_2(places), **FUSION,
    )  # fmt: skip


def attend_pages(q_THK, keys_NPGK, values_NPGK, reads):
    """softmax(q k / sqrt(K)) v over all that `reads` lets each row see; 0 where that is nothing."""
    (count, heads, size), (_, page, groups, _) = q_THK.shape, keys_NPGK.shape
    q_THK = q_THK.contiguous()
    splits = [_splits(batch, groups, page, q_THK) for batch in reads]
    slots = max(1, sum(splits))
    o_STHK = torch.empty(slots, count, heads, size, dtype=torch.float32, device=q_THK.device)
    max_STH = torch.empty(slots, count, heads, dtype=torch.float32, device=q_THK.device)
    sum_STH = torch.zeros_like(max_STH)
    for index, (batch, parts) in enumerate(zip(reads, splits, strict=True)):
        items, members = batch.rows_IJ.shape
        rows = max(16, triton.next_power_of_2(members * heads // groups))
        keys, options = _tiles(q_THK.dtype, rows)
        _read_kernel[(items, groups, parts)](
            q_THK, keys_NPGK, values_NPGK, batch.rows_IJ, batch.visible_IJ, batch.pages_IM,
            o_STHK, max_STH, sum_STH,
            count, groups, members, batch.pages_IM.shape[1], sum(splits[:index]), parts, size**-0.5,
            size, page, heads // groups, LOWEST,
            rows, keys, max(16, triton.next_power_of_2(size)), **options,
        )  # fmt: skip
    out_THK = torch.empty_like(q_THK)
    _merge_kernel[(count * heads,)](
        o_STHK, max_STH, sum_STH, out_THK, count * heads, slots,
        size, LOWEST, triton.next_power_of_2(slots), triton.next_power_of_2(size), **FUSION,
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


def builds(major):
    """What a device of compute capability `major` would compile: see sequence_logprob_triton.builds.

    LLaMA-3.1-8B's heads. A sample alone has 16 rows or fewer, too few for Hopper's wide instruction, and is
    bound by the bytes it reads; a group that shares its prefix fills 64.
    """
    heads, size, page, slots = 4, 128, 64, 8
    for name, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16):
        pools = [f"*{name}"] * 2
        write = {"BLOCK": 1024}
        yield _write_kernel, [*pools, *pools, "*i64", "i32:16"], write, FUSION, False
        for rows in (16, 32, 64):
            keys, options = _tiles(dtype, rows)
            constants = {"K": size, "PAGE": page, "HEADS": heads, "LOWEST": LOWEST}
            constants |= {"BLOCK_R": rows, "BLOCK_W": keys, "BLOCK_K": size}
            types = [f"*{name}", *pools, *["*i64"] * 3, *["*fp32"] * 3, *["i32"] * 6, "fp32"]
            wanted = "wide" if rows == 64 else "any"
            yield _read_kernel, types, constants, options, dtype != torch.float32 and wanted
        merge = {"K": size, "LOWEST": LOWEST, "BLOCK_S": slots, "BLOCK_K": size}
        yield _merge_kernel, [*["*fp32"] * 3, f"*{name}", "i32", "i32"], merge, FUSION, False
