"""The policy's objective: a clipped policy gradient with a pull to the model that it began from.

An objective like those of loss.py, over the same packs. A token's coefficient is its rollout's advantage over
the number of target tokens of the step; its old log-prob is the sampler's.

It leaves out: where rewards and advantages come from (policy.py).

Shapes: T tokens of a pack, N target tokens in it, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramr2 import kernels
from gramr2.kernels.packed_attention import packed_causal, packed_positions
from gramr2.loss import Batch
from gramr2.model import Decoder


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


class PolicyGradient:
    """Clipped policy gradient with a pull to the reference model, which reads the same pack beside it.

    (In the same pack, because another packing rounds differently: at the start the divergence is exactly 0.
    On a GPU, where a model that is trained takes other kernels, it is as near to that as bf16 is.)
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
        outside_N = (torch.exp(logp_N.detach() - batch.old_logp_N) - 1).abs() > self.clip
        figures = float(kl_N.detach().sum()), int(outside_N.sum()), len(outside_N)
        self.seen = [total + figure for total, figure in zip(self.seen, figures, strict=True)]
        policy_N = clipped_loss(logp_N, batch.old_logp_N, batch.coefficients_N, self.clip)
        return policy_N.sum() + self.kl * batch.scale * kl_N.sum()

    def _logp(self, decoder: Decoder, hidden_TD: Tensor, batch: Batch) -> Tensor:
        hidden_ND = hidden_TD.index_select(0, batch.places_N)
        return kernels.sequence_logprob(hidden_ND, decoder.head_weight, batch.targets_N)
