"""Attention of sequences that stand one behind the other: what training and scoring pass to the decoder.

`packed_causal` makes, for a pack's lengths, the function that the decoder calls in every layer. On CUDA in
half precision that is one variable-length flash kernel; elsewhere sequences of equal length go through one
call of torch's fused attention. There is no padding, and no mask of all tokens by all tokens.

Left out: a paged cache (paged_attention.py). Legend of suffixes: T tokens of all sequences, H query heads,
G key/value heads, K head size, B sequences of one length L.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q_THK, k_TGK, v_TGK) -> o_THK


def packed_positions(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """Positions of sequences that stand one behind the other: 0 … length-1, again and again."""
    counts = torch.as_tensor(lengths, dtype=torch.int64, device=device)
    starts = counts.cumsum(0) - counts
    total = int(sum(lengths))
    return torch.arange(total, device=device) - starts.repeat_interleave(counts, output_size=total)


def packed_causal(lengths: Sequence[int], device: torch.device | str) -> Attend:
    """Causal attention within each sequence of a pack, and never across."""
    device, lengths = torch.device(device), [n for n in lengths if n > 0]
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths, default=0)
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)

    def flash(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        # The operator below torch.nn.attention.varlen: same kernel, and one signature in every
        # supported torch, where the public function's has changed from release to release.
        return torch.ops.aten._flash_attention_forward(
            q_THK, k_TGK, v_TGK, offsets, offsets, longest, longest, 0.0, True, False
        )[0]

    def by_length(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        if len(groups) == 1:
            return _attend_equal(q_THK, k_TGK, v_TGK, len(lengths)).flatten(0, 1)
        parts = [x.split(lengths) for x in (q_THK, k_TGK, v_TGK)]
        outputs = [q_THK] * len(lengths)
        for members in groups.values():
            q, k, v = (torch.cat([part[i] for i in members]) for part in parts)
            for i, o_LHK in zip(members, _attend_equal(q, k, v, len(members)), strict=True):
                outputs[i] = o_LHK
        return torch.cat(outputs)

    def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        if not lengths:
            return q_THK
        half = q_THK.dtype in (torch.bfloat16, torch.float16)
        size = q_THK.shape[-1]
        fits = q_THK.is_cuda and half and size <= 256 and size % 8 == 0
        return (flash if fits else by_length)(layer, q_THK, k_TGK, v_TGK)

    return attend


def _attend_equal(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, count: int) -> Tensor:
    """Causal attention of `count` sequences of one length: [B, L, H, K]."""
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q_THK, k_TGK, v_TGK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
