"""Slow, obvious ways to the same result."""

from __future__ import annotations

import torch

from gramr2.kernels.packed_attention import packed_causal, packed_positions
from gramr2.model import Decoder


@torch.inference_mode()
def naive_logits(model: Decoder, ids: list[int]) -> torch.Tensor:
    """Logits behind the last id, with everything computed from the start."""
    attend = packed_causal([len(ids)], "cpu")
    hidden_TD = model(torch.tensor(ids), packed_positions([len(ids)], "cpu"), attend)
    return (hidden_TD[-1] @ model.head_weight.T).float()


def naive_greedy(model: Decoder, prompt: list[int], count: int, stop_ids=()) -> tuple[list[int], list[float]]:
    """The most likely token again and again: its ids and their log-probs."""
    ids, logprobs = [], []
    while len(ids) < count and not (ids and ids[-1] in stop_ids):
        logp = naive_logits(model, prompt + ids).log_softmax(-1)
        ids.append(int(logp.argmax()))
        logprobs.append(float(logp[ids[-1]]))
    return ids, logprobs


def chi_square(counts, expected) -> float:
    """How far counts are from what was expected; to be compared with a quantile of the distribution."""
    return float(((counts - expected) ** 2 / expected).sum())
