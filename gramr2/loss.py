"""The equations, over the hidden states of a pack: what each stage of training minimises.

Equations (1) label only, (2) rationale then label and (4) the prover's are one function, `token_loss`:
the negative log-likelihood of target tokens, each with a coefficient. What differs is the target, which is
data. Beside it stand GRAM's label smoothing between the two letters, and Bradley-Terry on a scalar head.
stages.py says which stage minimises which.

Every loss is a sum. Coefficients carry the normalisation, one over the units of the whole step on all ranks
(target tokens; pairs for Bradley-Terry), so that packs, accumulation and ranks add up to the same gradient.

It leaves out: equation (5), which scores and does not train (selection.py), building the targets (stages.py),
and the policy gradient (extras/policy_loss.py), whose coefficients are advantages.

Shapes: T tokens of a pack, S its sequences, P its pairs, N target tokens in it, L of which are the
label's letter, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramr2 import kernels
from gramr2.kernels.packed_attention import packed_causal, packed_positions, upload
from gramr2.model import Decoder
from gramr2.records import Example
from gramr2.settings import TrainSettings

NO_LETTER = -1  # at targets that are not the label's letter


@dataclass(frozen=True)
class Batch:
    """One pack as tensors. `places` are rows of the hidden states: place t predicts the id at t + 1."""

    ids_T: Tensor
    lengths: list[int]
    ends_S: Tensor
    places_N: Tensor
    targets_N: Tensor
    coefficients_N: Tensor
    old_logp_N: Tensor
    other_letters_N: Tensor
    margins_P: Tensor
    scale: float


def collate(examples: Sequence[Example], scale: float, device: torch.device | str) -> Batch:
    """Lays examples one behind the other. None make an empty pack: one token, and nothing to predict."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    lengths = [len(sequence.ids) for sequence in sequences] or [1]
    ids = [i for sequence in sequences for i in sequence.ids] or [0]
    places, other_letters, offset = [], [], 0
    targets: list[int] = []
    coefficients: list[float] = []
    old_logprobs: list[float] = []
    for example in examples:
        for sequence in example.sequences:
            wanted = range(sequence.start, len(sequence.ids))
            places += [offset + place - 1 for place in wanted]
            targets += sequence.ids[sequence.start :]
            coefficients += example.coefficients or (1.0,) * len(wanted)
            old_logprobs += example.old_logprobs or (0.0,) * len(wanted)
            letter_place, letter = example.other_letter or (None, NO_LETTER)
            other_letters += [letter if place == letter_place else NO_LETTER for place in wanted]
            offset += len(sequence.ids)

    def long(values: Sequence[int]) -> Tensor:
        return upload(values, device, torch.int64)

    def real(values: Sequence[float]) -> Tensor:
        return upload(values, device, torch.float32)

    return Batch(
        ids_T=long(ids),
        lengths=lengths,
        ends_S=long([end - 1 for end in accumulate(lengths)]),
        places_N=long(places),
        targets_N=long(targets),
        coefficients_N=real(coefficients) * scale,
        old_logp_N=real(old_logprobs),
        other_letters_N=long(other_letters),
        margins_P=real([each.margin for each in examples if len(each.sequences) == 2]),
        scale=scale,
    )


# ---------------------------------------------------------------------------------- the losses


def token_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, coefficients_N: Tensor) -> Tensor:
    """- sum of coefficient x log p(target): equations (1), (2) and (4), and language modelling. Targets are a
    tokenizer's ids, of which the model has enough (plan.read_model_config)."""
    return -kernels.sequence_logprob_sum(hidden_ND, weight_VD, targets_N, coefficients_N, known_targets=True)[
        0
    ]


def bradley_terry(better_P: Tensor, worse_P: Tensor, margins_P: Tensor) -> Tensor:
    """- log sigmoid(r(better) - r(worse) - margin), for each pair."""
    return -F.logsigmoid(better_P - worse_P - margins_P)


# ---------------------------------------------------------------------------------- objectives

Objective = Callable[[Decoder, Tensor, Batch], Tensor]  # (decoder, hidden_TD, batch) -> the sum over a pack


def negative_log_likelihood(decoder: Decoder, hidden_TD: Tensor, batch: Batch) -> Tensor:
    """Only the states that predict a target meet the vocabulary."""
    hidden_ND = hidden_TD.index_select(0, batch.places_N)
    return token_loss(hidden_ND, decoder.head_weight, batch.targets_N, batch.coefficients_N)


def smoothed_label(smoothing: float) -> Objective:
    """Equation (1), with `smoothing` of the letter's target given to the other letter.

    -(1 - s) log p(right) - s log p(other), over the whole vocabulary: GRAM's two-way loss over {A, B}, and
    what that leaves out, that a letter is written there at all. Trained on the two letters' ratio alone, a
    model may prefer any other token to both, and a sampled answer has no verdict.
    """

    def objective(decoder: Decoder, hidden_TD: Tensor, batch: Batch) -> Tensor:
        hidden_ND, weight_VD = hidden_TD.index_select(0, batch.places_N), decoder.head_weight
        loss = token_loss(hidden_ND, weight_VD, batch.targets_N, batch.coefficients_N)
        letter_N = batch.other_letters_N != NO_LETTER
        right_LD = weight_VD[batch.targets_N[letter_N]].float()
        other_LD = weight_VD[batch.other_letters_N[letter_N]].float()
        # log p(right) - log p(other)
        gap_L = (hidden_ND[letter_N].float() * (right_LD - other_LD)).sum(-1)
        return loss + smoothing * (batch.coefficients_N[letter_N] * gap_L).sum()

    return objective


def preference(decoder: Decoder, hidden_TD: Tensor, batch: Batch) -> Tensor:
    """Bradley-Terry on the scalar head, read at each sequence's last token."""
    assert decoder.score is not None
    scores_S = decoder.score(hidden_TD[batch.ends_S]).float().squeeze(-1)
    if not len(batch.margins_P):
        return scores_S.sum() * 0
    better_P, worse_P = scores_S.unflatten(0, (-1, 2)).unbind(-1)
    return batch.scale * bradley_terry(better_P, worse_P, batch.margins_P).sum()


def label_likelihood(settings: TrainSettings) -> Objective:
    smoothing = settings.label_smoothing
    return smoothed_label(smoothing) if smoothing else negative_log_likelihood


# What a stage may name (stages.py), each made from its settings.
OBJECTIVES: dict[str, Callable[[TrainSettings], Objective]] = {
    "likelihood": lambda settings: negative_log_likelihood,
    "label likelihood": label_likelihood,
    "preference": lambda settings: preference,
}


class Trainee(nn.Module):
    """Decoder and objective under one root.

    Under FSDP the vocabulary's matrix is whole only while the root's forward runs, and it is needed by the
    loss; so the loss runs there as well.
    """

    def __init__(self, decoder: Decoder, objective: Objective):
        super().__init__()
        self.decoder, self.objective = decoder, objective
        # Where the decoder computes with copies in 16 bits (parallel.wrap): the float32 weight of each.
        self.masters: dict[nn.Parameter, nn.Parameter] = {}

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What a step updates, by the decoder's names: float32 weights."""
        parameters = self.decoder.named_parameters()
        return {name: self.masters.get(each, each) for name, each in parameters if each.requires_grad}

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies follow their masters, once these have changed."""
        if self.masters:
            torch._foreach_copy_([*self.masters], [*self.masters.values()])

    def forward(self, batch: Batch) -> Tensor:
        device = batch.ids_T.device
        positions_T = packed_positions(batch.lengths, device)
        hidden_TD = self.decoder(batch.ids_T, positions_T, packed_causal(batch.lengths, device))
        return self.objective(self.decoder, hidden_TD, batch)
