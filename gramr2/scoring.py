"""log p(token given the tokens before it), for whole sequences: the packed pass behind equation 5.

Sequences are packed to a token budget, run through the decoder without padding, and their log-probs come
from the fused projection (kernels/), which never stores the logits of a batch.

Two such values come to a probability by `softmax_of`.

It leaves out: gradients (loss.py) and sampling (sampler.py, which returns the same log-probs as it goes).

Shapes: T tokens of a pack, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gramr2 import kernels
from gramr2.files import need
from gramr2.kernels.packed_attention import packed_causal, packed_positions
from gramr2.model import Decoder

TOKEN_BUDGET = 8192  # tokens of one forward pass; a longer sequence is a pass of its own


def check_ids(model: Decoder, sequences: Sequence[Sequence[int]]) -> None:
    """Ids of the vocabulary only, one token at least, and not more than the model has positions."""
    size, positions = model.config.vocab_size, model.config.max_positions
    for index, ids in enumerate(sequences):
        of = f"sequence {index}"
        need(len(ids) > 0, f"{of} is empty; expected at least one token")
        need(len(ids) <= positions, f"{of} has {len(ids)} tokens; the model has {positions} positions")
        token = min(ids) if min(ids) < 0 else max(ids)
        need(0 <= token < size, f"{of} holds the id {token}, outside the vocabulary of {size}")


def _packs(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices by length, filled up to the budget: equal lengths meet, which attention likes."""
    packs: list[list[int]] = []
    room = 0
    for index in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if len(sequences[index]) > room:
            packs.append([])
            room = TOKEN_BUDGET
        packs[-1].append(index)
        room -= len(sequences[index])
    return packs


@torch.no_grad()
def logprobs(model: Decoder, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """For each sequence of n ids the n-1 values log p(id_t | ids before t), t >= 1, in fp32."""
    need(not model.config.num_labels, "log-probs need a language model; this one has a scalar head")
    check_ids(model, sequences)
    device = model.embed.weight.device
    results: list[Tensor] = [torch.empty(0)] * len(sequences)
    for pack in _packs(sequences):
        lengths = [len(sequences[i]) for i in pack]
        ids_T = torch.tensor([token for i in pack for token in sequences[i]], device=device)
        hidden_TD = model(ids_T, packed_positions(lengths, device), packed_causal(lengths, device))
        # The last token of a sequence predicts nothing: it drops out before the projection.
        keep = torch.ones_like(ids_T, dtype=torch.bool)
        keep[torch.tensor(lengths, device=device).cumsum(0) - 1] = False
        targets_T = ids_T.roll(-1)[keep]
        values = kernels.sequence_logprob(hidden_TD[keep], model.head_weight, targets_T)
        for index, part in zip(pack, values.split([n - 1 for n in lengths]), strict=True):
            results[index] = part
    return results


def sigmoid(x: float) -> float:
    """Of the difference of two log-probabilities: the softmax over the two."""
    return 1 / (1 + math.exp(min(-x, 700)))


def softmax_of(a: float, b: float) -> float | None:
    """The share of A among two log-probabilities, or scores; None where one of them is not finite."""
    return sigmoid(a - b) if math.isfinite(a) and math.isfinite(b) else None
