"""Attention of sequences that stand one behind the other: what training and scoring pass to the decoder.

`packed_causal` makes, for a pack's lengths, the function that the decoder calls in every layer. On CUDA in
half precision that is one variable-length flash kernel; elsewhere sequences of equal length go through one
call of torch's fused attention. There is no padding, and no mask of all tokens by all tokens.

A compiler must not look into it: each pack would be another program. So under torch.compile the same kernels
are called by an operator, `gramr2::packed_attention`, whose backward pass is written out; the block around it
is one graph.

Left out: a paged cache (paged_attention.py). Legend of suffixes: T tokens of all sequences, H query heads,
G key/value heads, K head size, B sequences of one length L, S = B of all lengths.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q_THK, k_TGK, v_TGK) -> o_THK


def packed_positions(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """Positions of sequences that stand one behind the other: 0 … length-1, again and again."""
    return upload(torch.cat([torch.arange(0), *map(torch.arange, lengths)]), device)


def upload(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers on the device. The host waits neither for the copy, nor for what the device has
    still to do."""
    tensor, device = torch.as_tensor(values, dtype=dtype), torch.device(device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def packed_causal(lengths: Sequence[int], device: torch.device | str) -> Attend:
    """Causal attention within each sequence of a pack, and never across."""
    device, lengths = torch.device(device), [n for n in lengths if n > 0]
    lengths_S = torch.tensor(lengths, dtype=torch.int32)  # on the host
    offsets_S = upload(F.pad(lengths_S, (1, 0)).cumsum(0, dtype=torch.int32), device)  # one more: the end
    longest = max(lengths, default=0)

    def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        if not lengths:
            return q_THK
        flash = _fits_flash(q_THK)
        if torch.compiler.is_compiling() and (flash or not q_THK.is_cuda):
            return packed_attention(q_THK, k_TGK, v_TGK, offsets_S, lengths_S)[0]
        if flash:
            return _flash(q_THK, k_TGK, v_TGK, offsets_S, longest)[0]
        return _by_length(q_THK, k_TGK, v_TGK, lengths)

    return attend


def _fits_flash(q_THK: Tensor) -> bool:
    half, size = q_THK.dtype in (torch.bfloat16, torch.float16), q_THK.shape[-1]
    return q_THK.is_cuda and half and size <= 256 and size % 8 == 0


def _flash(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, offsets_S: Tensor, longest: int
) -> tuple[Tensor, ...]:
    # The operator below torch.nn.attention.varlen: same kernel, and one signature in every supported torch,
    # where the public function's has changed from release to release.
    return torch.ops.aten._flash_attention_forward(
        q_THK, k_TGK, v_TGK, offsets_S, offsets_S, longest, longest, 0.0, True, False
    )


def _by_length(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, lengths: list[int]) -> Tensor:
    """Sequences of one length together: [B, L, H, K], in one call of torch's fused attention."""

    def attention(*parts: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return _each_length(lambda *parts: (attention(*parts),), lengths, q_THK, k_TGK, v_TGK)[0]


def _each_length(function: Callable, lengths: list[int], *packed_T: Tensor) -> list[Tensor]:
    """Calls the function with the sequences of each length, [B, L, ...], and packs what it gives again."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    if len(groups) == 1:
        return [x.flatten(0, 1) for x in function(*(x.unflatten(0, (len(lengths), -1)) for x in packed_T))]
    parts = [x.split(lengths) for x in packed_T]
    results: list[list[Tensor]] = [[] for _ in lengths]
    for members in groups.values():
        found = function(*(torch.stack([part[i] for i in members]) for part in parts))
        for place, i in enumerate(members):
            results[i] = [x[place] for x in found]
    return [torch.cat(column) for column in zip(*results, strict=True)]


# ---------------------------------------------------------------------------------- for the compiler


@torch.library.custom_op("gramr2::packed_attention", mutates_args=())
def packed_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, offsets_S: Tensor, lengths_S: Tensor
) -> tuple[Tensor, Tensor]:
    """-> (attention [T, H, K], the log-sum-exps of its scores [H, T]); lengths_S stands on the host."""
    if _fits_flash(q_THK):
        o_THK, lse_HT, *_ = _flash(q_THK, k_TGK, v_TGK, offsets_S, int(lengths_S.max()))
        return o_THK, lse_HT

    def forward(*parts: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part.transpose(1, 2) for part in parts)
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return o.transpose(1, 2), lse.transpose(1, 2)

    o_THK, lse_TH = _each_length(forward, lengths_S.tolist(), q_THK, k_TGK, v_TGK)
    return o_THK.contiguous(), lse_TH.T.contiguous()


@packed_attention.register_fake
def _(q_THK, k_TGK, v_TGK, offsets_S, lengths_S):
    return torch.empty_like(q_THK), q_THK.new_empty(q_THK.shape[1::-1], dtype=torch.float32)


@torch.library.custom_op("gramr2::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    d_o_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, o_THK: Tensor, lse_HT: Tensor,
    offsets_S: Tensor, lengths_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _fits_flash(q_THK):
        longest, unused = int(lengths_S.max()), torch.empty(2, dtype=torch.uint64, device=q_THK.device)
        return torch.ops.aten._flash_attention_backward(
            d_o_THK.contiguous(), q_THK, k_TGK, v_TGK, o_THK, lse_HT, offsets_S, offsets_S, longest, longest,
            0.0, True, unused, unused[0],
        )  # fmt: skip

    def backward(*parts: Tensor) -> list[Tensor]:
        parts = tuple(part.transpose(1, 2) for part in parts)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, 0.0, True)
        return [x.transpose(1, 2) for x in found]

    operands = d_o_THK, q_THK, k_TGK, v_TGK, o_THK, lse_HT.T
    dq_THK, dk_TGK, dv_TGK = _each_length(backward, lengths_S.tolist(), *operands)
    return dq_THK.contiguous(), dk_TGK.contiguous(), dv_TGK.contiguous()


@packed_attention_backward.register_fake
def _(d_o_THK, q_THK, k_TGK, v_TGK, *_):
    return torch.empty_like(q_THK), torch.empty_like(k_TGK), torch.empty_like(v_TGK)


def _save(ctx, inputs, output):
    q_THK, k_TGK, v_TGK, offsets_S, lengths_S = inputs
    ctx.save_for_backward(q_THK, k_TGK, v_TGK, *output, offsets_S, lengths_S)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o_THK, _):
    return *packed_attention_backward(d_o_THK, *ctx.saved_tensors), None, None


packed_attention.register_autograd(_backward, setup_context=_save)
