"""The Triton kernels of what stands between a decoder's matmuls: norm, rotation, gate. Forward only.

A decode step has few rows, so that each of torch's small operations costs its launch, and there are five in a
norm and eight in a rotation of queries and keys. These kernels do one of reference.py's functions in one
launch each. Sums and products are fp32, and rounded where reference.py's operations round.

Left out: gradients. Where they are asked for torch's own operations run, which torch.compile can fuse.
Legend of suffixes: T tokens, H query heads, G key/value heads, K head size, F width of the MLP, D width of
what is normed; in kernels R rows of a program, P pairs of channels.
"""

import torch
import triton
import triton.language as tl

from .tuning import FUSION


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x_ptr, weight_ptr, out_ptr, rows, eps, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row_R, d_D = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    at_RD = row_R[:, None] * D + d_D[None, :]
    inside_RD = (row_R < rows)[:, None] & (d_D < D)[None, :]
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    x_RD = tl.load(x_ptr + at_RD, mask=inside_RD, other=0.0).to(tl.float32)
    scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / D + eps)
    normed_RD = (x_RD * scale_R[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at_RD, normed_RD * weight_D[None, :], mask=inside_RD)


@triton.jit
def _rotate(x_ptr, out_ptr, at_RP, inside_RP, cos_P, sin_P, cos2_P, sin2_P, HALF: tl.constexpr):
    """Channel i together with channel i + K/2: two products, each rounded, and their sum."""
    kind = x_ptr.dtype.element_ty
    x_RP = tl.load(x_ptr + at_RP, mask=inside_RP, other=0.0).to(tl.float32)
    x2_RP = tl.load(x_ptr + at_RP + HALF, mask=inside_RP, other=0.0).to(tl.float32)
    out_RP = (x_RP * cos_P).to(kind).to(tl.float32) + (x2_RP * sin_P).to(kind).to(tl.float32)
    out2_RP = (x2_RP * cos2_P).to(kind).to(tl.float32) + (x_RP * sin2_P).to(kind).to(tl.float32)
    tl.store(out_ptr + at_RP, out_RP, mask=inside_RP)
    tl.store(out_ptr + at_RP + HALF, out2_RP, mask=inside_RP)


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, H, G,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # A program takes a few heads of a token: first come the queries', then the keys'.
    token, p_P = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_P)
    head_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_P = token * 2 * HALF + p_P
    cos_P = tl.load(cos_ptr + at_P, mask=p_P < HALF).to(tl.float32)[None, :]
    sin_P = tl.load(sin_ptr + at_P, mask=p_P < HALF).to(tl.float32)[None, :]
    cos2_P = tl.load(cos_ptr + at_P + HALF, mask=p_P < HALF).to(tl.float32)[None, :]
    sin2_P = tl.load(sin_ptr + at_P + HALF, mask=p_P < HALF).to(tl.float32)[None, :]
    at_RP = (token * H + head_R)[:, None] * 2 * HALF + p_P[None, :]
    inside_RP = (head_R < H)[:, None] & (p_P < HALF)[None, :]
    _rotate(q_ptr, q_out_ptr, at_RP, inside_RP, cos_P, sin_P, cos2_P, sin2_P, HALF)
    at_RP = (token * G + head_R - H)[:, None] * 2 * HALF + p_P[None, :]
    inside_RP = ((head_R >= H) & (head_R < H + G))[:, None] & (p_P < HALF)[None, :]
    _rotate(k_ptr, k_out_ptr, at_RP, inside_RP, cos_P, sin_P, cos2_P, sin2_P, HALF)


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at, silu * up, mask=at < count)


def rms_norm(x, weight_D, eps):
    """x / sqrt(mean of x * x + eps) * weight, over the last dimension."""
    x, size = x.contiguous(), x.shape[-1]
    out, count, block = torch.empty_like(x), x.numel() // size, triton.next_power_of_2(size)
    rows = max(1, 1024 // block)
    with torch.cuda.device_of(x):
        _norm_kernel[(triton.cdiv(count, rows),)](
            x, weight_D, out, count, eps, size, rows, block, num_warps=8 if block >= 4096 else 4, **FUSION
        )
    return out


def rotate(q_THK, k_TGK, cos_T1K, sin_T1K):
    """-> queries and keys, each channel i rotated together with channel i + K/2."""
    operands = [x.contiguous() for x in (q_THK, k_TGK, cos_T1K, sin_T1K)]
    (tokens, heads, size), groups = q_THK.shape, k_TGK.shape[1]
    rotated = tuple(map(torch.empty_like, operands[:2]))
    block = triton.next_power_of_2(size // 2)
    rows = max(1, 512 // block)
    with torch.cuda.device_of(q_THK):
        _rotate_kernel[(tokens, triton.cdiv(heads + groups, rows))](
            *operands, *rotated, heads, groups, size // 2, rows, block, **FUSION
        )
    return rotated


def silu_product(gate_TF, up_TF):
    """silu(gate) * up."""
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    out_TF, count = torch.empty_like(gate_TF), gate_TF.numel()
    with torch.cuda.device_of(gate_TF):
        _gate_kernel[(triton.cdiv(count, 1024),)](gate_TF, up_TF, out_TF, count, 1024, **FUSION)
    return out_TF
