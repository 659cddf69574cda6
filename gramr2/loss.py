"""The equations, over the hidden states of a pack: what each stage of training minimises.

Equations (1) label only, (2) rationale then label and (4) the prover's are one function, `token_loss`:
the negative log-likelihood of target tokens, each with a coefficient. What differs is the target, which is
data. Beside it stand GRAM's label smoothing between the two letters, Bradley-Terry on a scalar head,
and the clipped policy gradient (`PolicyGradient`), whose coefficients are the advantages.

Every loss is a sum. Coefficients carry the normalisation, one over the units of the whole step on all ranks
(target tokens; pairs for Bradley-Terry), so that packs, accumulation and ranks add up to the same gradient.

It leaves out: equation (5), which scores and does not train (selection.py), and building targets (fit.py).

Shapes: T tokens of a pack, S its sequences, P its pairs, N target tokens in it, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from gramr2.model import Decoder, packed_causal, packed_positions
from gramr2.records import Tokens

NO_RIVAL = -1


@dataclass(frozen=True)
class Example:
    """One training example: the sequences that share its loss, and what else the loss needs to know."""

    sequences: tuple[Tokens, ...]  # one; or the better and the worse response's, for Bradley-Terry
    coefficients: tuple[float, ...] = ()  # of the target tokens; empty: 1 for each
    old: tuple[float, ...] = ()  # a rollout's log-probs under the policy that drew it
    rival: tuple[int, int] | None = None  # (place of the label's letter in ids, the other letter's id)
    margin: float = 0.0

    @property
    def length(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def units(self) -> int:
        """What the loss is averaged over: target tokens; a pair of scores counts once."""
        first = self.sequences[0]
        return 1 if len(self.sequences) == 2 else len(first.ids) - first.start


@dataclass(frozen=True)
class Batch:
    """One pack as tensors. `places` are rows of the hidden states: place t predicts the id at t + 1."""

    ids_T: Tensor
    lengths: list[int]
    ends_S: Tensor
    places_N: Tensor
    targets_N: Tensor
    coefficients_N: Tensor
    old_N: Tensor
    rivals_N: Tensor
    margins_P: Tensor
    scale: float


def collate(rows: Sequence[Example], scale: float, device: torch.device | str) -> Batch:
    """Lays rows one behind the other. No rows make an empty pack: one token, and nothing to predict."""
    sequences = [sequence for row in rows for sequence in row.sequences]
    lengths = [len(sequence.ids) for sequence in sequences] or [1]
    ids = [i for sequence in sequences for i in sequence.ids] or [0]
    places, targets, coefficients, old, rivals, offset = [], [], [], [], [], 0
    for row in rows:
        for sequence in row.sequences:
            wanted = range(sequence.start, len(sequence.ids))
            places += [offset + place - 1 for place in wanted]
            targets += sequence.ids[sequence.start :]
            coefficients += row.coefficients or (1.0,) * len(wanted)
            old += row.old or (0.0,) * len(wanted)
            rivals += [row.rival[1] if row.rival and place == row.rival[0] else NO_RIVAL for place in wanted]
            offset += len(sequence.ids)
    long = {"dtype": torch.int64, "device": device}
    real = {"dtype": torch.float32, "device": device}
    return Batch(
        ids_T=torch.tensor(ids, **long),
        lengths=lengths,
        ends_S=torch.tensor(lengths, **long).cumsum(0) - 1,
        places_N=torch.tensor(places, **long),
        targets_N=torch.tensor(targets, **long),
        coefficients_N=torch.tensor(coefficients, **real) * scale,
        old_N=torch.tensor(old, **real),
        rivals_N=torch.tensor(rivals, **long),
        margins_P=torch.tensor([row.margin for row in rows if len(row.sequences) == 2], **real),
        scale=scale,
    )


# ---------------------------------------------------------------------------------- the losses


def token_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, coefficients_N: Tensor) -> Tensor:
    """- sum of coefficient x log p(target): equations (1), (2) and (4), and language modelling."""
    return -kernels.sequence_logprob_sum(hidden_ND, weight_VD, targets_N, coefficients_N)[0]


def clipped_loss(logp_N: Tensor, old_N: Tensor, advantages_N: Tensor, clip: float) -> Tensor:
    """- min(ratio x advantage, the ratio kept within 1 - clip ... 1 + clip, x advantage), for each token."""
    ratio_N = torch.exp(logp_N - old_N)
    return -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip) * advantages_N)


def k3(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """The estimator k3 of KL(policy || reference): q - log q - 1 with q = p_reference / p of a drawn token.

    Its mean over the policy's tokens is the divergence, and unlike the plain - log q it is never negative.
    Where the two models agree, value and gradient are 0 for every token and not only on average, so that a
    reward which says nothing moves nothing. Differentiated as it stands it pulls along the gradient of
    KL(reference || policy), whose minimum is the same.
    """
    gap_N = reference_N - logp_N
    return torch.expm1(gap_N) - gap_N


def bradley_terry(better_P: Tensor, worse_P: Tensor, margins_P: Tensor) -> Tensor:
    """- log sigmoid(r(better) - r(worse) - margin), for each pair."""
    return -F.logsigmoid(better_P - worse_P - margins_P)


# ---------------------------------------------------------------------------------- objectives

Objective = Callable[[Decoder, Tensor, Batch], Tensor]  # (decoder, hidden_TD, batch) -> the sum over a pack


def likelihood(decoder: Decoder, hidden_TD: Tensor, batch: Batch) -> Tensor:
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
        letter_N = batch.rivals_N != NO_RIVAL
        towards = weight_VD[batch.targets_N[letter_N]].float() - weight_VD[batch.rivals_N[letter_N]].float()
        gap = (hidden_ND[letter_N].float() * towards).sum(-1)  # log p(right) - log p(other)
        return loss + smoothing * (batch.coefficients_N[letter_N] * gap).sum()

    return objective


def preference(decoder: Decoder, hidden_TD: Tensor, batch: Batch) -> Tensor:
    """Bradley-Terry on the scalar head, read at each sequence's last token."""
    scores_S = decoder.score(hidden_TD[batch.ends_S]).float().squeeze(-1)
    if not len(batch.margins_P):
        return scores_S.sum() * 0
    better_P, worse_P = scores_S.unflatten(0, (-1, 2)).unbind(-1)
    return batch.scale * bradley_terry(better_P, worse_P, batch.margins_P).sum()


class PolicyGradient:
    """Clipped policy gradient with a pull to the reference model, which reads the same pack beside it.

    (In the same pack, because another packing rounds differently: at the start the divergence is exactly 0.)
    `seen` sums over this rank's packs since it was last emptied: k3, tokens beyond the clip, tokens.
    """

    def __init__(self, reference: Decoder, clip: float, kl: float):
        self.reference, self.clip, self.kl, self.seen = reference, clip, kl, [0.0, 0, 0]

    def __call__(self, decoder: Decoder, hidden_TD: Tensor, batch: Batch) -> Tensor:
        logp_N = self._logp(decoder, hidden_TD, batch)
        with torch.no_grad():
            positions_T = packed_positions(batch.lengths, batch.ids_T.device)
            attend = packed_causal(batch.lengths, batch.ids_T.device)
            reference_N = self._logp(self.reference, self.reference(batch.ids_T, positions_T, attend), batch)
        kl_N = k3(logp_N, reference_N)
        outside_N = (torch.exp(logp_N.detach() - batch.old_N) - 1).abs() > self.clip
        figures = float(kl_N.detach().sum()), int(outside_N.sum()), len(outside_N)
        self.seen = [total + figure for total, figure in zip(self.seen, figures, strict=True)]
        policy_N = clipped_loss(logp_N, batch.old_N, batch.coefficients_N, self.clip)
        return policy_N.sum() + self.kl * batch.scale * kl_N.sum()

    def _logp(self, decoder: Decoder, hidden_TD: Tensor, batch: Batch) -> Tensor:
        hidden_ND = hidden_TD.index_select(0, batch.places_N)
        return kernels.sequence_logprob(hidden_ND, decoder.head_weight, batch.targets_N)


class Trainee(nn.Module):
    """Decoder and objective under one root.

    Under FSDP the vocabulary's matrix is whole only while the root's forward runs, and it is needed by the
    loss; so the loss runs there as well.
    """

    def __init__(self, decoder: Decoder, objective: Objective):
        super().__init__()
        self.decoder, self.objective = decoder, objective
        # Each pack brings its own attention. A compiled block is given this one function instead, which it
        # does not look into; otherwise it would be compiled again for every pack.
        # It does not hold the module: a cycle would outlive the training, with all its weights.
        self._packs = packs = {}
        self._attend = torch.compiler.disable(lambda *arguments: packs["now"](*arguments))

    def forward(self, batch: Batch) -> Tensor:
        device = batch.ids_T.device
        positions_T = packed_positions(batch.lengths, device)
        self._packs["now"] = packed_causal(batch.lengths, device)
        hidden_TD = self.decoder(batch.ids_T, positions_T, self._attend)
        return self.objective(self.decoder, hidden_TD, batch)
