"""reference.py's steps between a decoder's matmuls for a CPU without gradients, in fewer operations.

On few rows of a small model an operation costs its call, and one in place saves the memory of another.
Left out: gradients and 16 bits, which are the reference's. Legend of suffixes: see there.
"""

import torch.nn.functional as F


def rms_norm(x, weight_D, eps):
    """x / sqrt(mean of x * x + eps) * weight, over the last dimension."""
    scale = (x * x).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x * scale).mul_(weight_D)


def rotate(q_THK, k_TGK, cos_T1K, sin_T1K):
    """Queries and keys, each channel i rotated together with channel i + K/2."""
    half = q_THK.shape[-1] // 2
    return tuple((x * cos_T1K).add_(x.roll(half, -1).mul_(sin_T1K)) for x in (q_THK, k_TGK))


def silu_product(gate, up):
    """silu(gate) * up."""
    return F.silu(gate).mul_(up)
