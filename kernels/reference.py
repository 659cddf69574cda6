"""What the kernels mean, in a few lines of torch: the oracle that tests hold them to.

`sequence_logprob` is the definition: log p(target) under softmax(hidden @ weight.T), as equations (1),
(2), (4) and (5) of the paper use it. It stores every logit and leaves the gradient to autograd.
`score` and `logits_to_gradient_` are the two operations that a Triton kernel replaces, and what devices
without one run; they keep the same contract, which is about memory: the [T, V] logits never exist, only
one chunk of rows does, in place.

`rms_norm`, `rotate` and `silu_product` are the decoder's elementwise steps; on every device training runs
these, and so does all that is not CUDA.

`write_kv` and `attend_pages` are the sampler's cache: keys and values lie in pages of a pool, and `Reads`
(reads.py) says which query may look at which pages.

What is left out: speed. paged_attention_cpu.py is the cache's way on a CPU.
Legend of suffixes: T tokens, C tokens of one chunk, D width of the model, V vocabulary; H query heads, G
key/value heads, K head size, N pages of the pool, P tokens of a page; I items of one batch of reads, J
queries of an item, M pages of an item; U tokens that are written (T without its padding), W visible keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reads import Reads

IGNORE = -100  # as a target: the token has no log-prob, and gives 0
CHUNK_BYTES = 64 << 20


def sequence_logprob(hidden_TD, weight_VD, targets_T):
    """The definition: -> (log-prob of each target, log-sum-exp of each row), both fp32 [T]."""
    logits_TV = (hidden_TD @ weight_VD.T).float()
    lse_T = logits_TV.logsumexp(1)
    target_T = logits_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    return (target_T - lse_T).masked_fill(targets_T == IGNORE, 0), lse_T


def rows_per_chunk(weight_VD):
    """How many rows of logits fit CHUNK_BYTES; 16-bit logits are counted with their fp32 copy."""
    bytes_per_logit = 4 if weight_VD.dtype == torch.float32 else weight_VD.itemsize + 4
    return max(1, CHUNK_BYTES // (len(weight_VD) * bytes_per_logit))


def chunks(count, most):
    """-> slices that cover `count` rows, of nearly equal size and with at most `most` rows each."""
    size = -(-count // max(1, -(-count // most)))
    return [slice(start, min(start + size, count)) for start in range(0, count, max(1, size))]


def score(hidden_TD, weight_VD, targets_T):
    """`sequence_logprob` without gradients, one chunk of logits alive."""
    logp_T = hidden_TD.new_empty(len(hidden_TD), dtype=torch.float32)
    lse_T = torch.empty_like(logp_T)
    parts = chunks(len(hidden_TD), rows_per_chunk(weight_VD))
    buffer_CV = hidden_TD.new_empty(parts[0].stop if parts else 0, len(weight_VD))
    for rows in parts:
        logits_CV = buffer_CV[: rows.stop - rows.start]
        torch.mm(hidden_TD[rows], weight_VD.T, out=logits_CV)
        logp_T[rows], lse_T[rows], _ = _exponentials_(logits_CV.float(), targets_T[rows])
    return logp_T, lse_T


def logits_to_gradient_(logits_CV, targets_C, d_logp_C, d_lse_C):
    """Overwrites logits with the gradient that reaches them; -> the targets' log-probs.

    With p = softmax(logits): d_logits = d_logp * (onehot(target) - p) + d_lse * p.
    """
    work_CV = logits_CV.float()
    logp_C, _, sum_C = _exponentials_(work_CV, targets_C)
    d_logp_C = d_logp_C.masked_fill(targets_C == IGNORE, 0)
    work_CV.mul_(((d_lse_C - d_logp_C) / sum_C)[:, None])
    work_CV.scatter_add_(1, targets_C.clamp(min=0)[:, None], d_logp_C[:, None])
    logits_CV.copy_(work_CV)
    return logp_C


def _exponentials_(logits_CV, targets_C):
    """fp32 logits become exp(logits - max), in place; -> (log-probs, log-sum-exps, sums of the exps)."""
    max_C = logits_CV.amax(1)
    target_C = logits_CV.gather(1, targets_C.clamp(min=0)[:, None])[:, 0]
    sum_C = logits_CV.sub_(max_C[:, None]).exp_().sum(1)
    # target <= max and sum >= 1 hold exactly, so in this order no log-prob is ever positive.
    logp_C = (target_C - max_C) - sum_C.log()
    return logp_C.masked_fill(targets_C == IGNORE, 0), max_C + sum_C.log(), sum_C


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x * x + eps) * weight, over the last dimension."""
    # The statistics are fp32 and the product is not: the rounding that checkpoints were trained with.
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return weight_D * F.rms_norm(wide, x.shape[-1:], eps=eps).to(x.dtype)


def rotate(q_THK: Tensor, k_TGK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates channel i together with channel i + K/2, the published checkpoints' pairing."""
    half = q_THK.shape[-1] // 2
    q_rotated_THK = q_THK * cos_T1K + q_THK.roll(half, dims=-1) * sin_T1K
    return q_rotated_THK, k_TGK * cos_T1K + k_TGK.roll(half, dims=-1) * sin_T1K


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the middle of the decoder's MLP."""
    return F.silu(gate) * up


def write_kv(k_TGK: Tensor, v_TGK: Tensor, keys_NGPK: Tensor, values_NGPK: Tensor, places_U: Tensor) -> None:
    """Puts the first U tokens' keys and values in their places: page * P + place in the page."""
    page_U, place_U = places_U // keys_NGPK.shape[2], places_U % keys_NGPK.shape[2]
    for pool_NGPK, x_TGK in (keys_NGPK, k_TGK), (values_NGPK, v_TGK):
        pool_NGPK[page_U, :, place_U] = x_TGK[: len(places_U)]


def attend_pages(q_THK: Tensor, keys_NGPK: Tensor, values_NGPK: Tensor, reads: list[Reads[Tensor]]) -> Tensor:
    """softmax(q k / sqrt(K)) v of each row, over all that `reads` lets it see; 0 where that is nothing."""
    page, heads_per_group = keys_NGPK.shape[2], q_THK.shape[1] // keys_NGPK.shape[1]
    o_THK = torch.zeros_like(q_THK)
    for row, q_HK in enumerate(q_THK):
        pages, places = [], []
        for batch in reads:
            for item, query in (batch.rows_IJ == row).nonzero().tolist():
                key_W = torch.arange(int(batch.visible_IJ[item, query]), device=q_THK.device)
                pages.append(batch.pages_IM[item, key_W // page])
                places.append(key_W % page)
        if places:
            page_W, place_W = torch.cat(pages), torch.cat(places)
            k_WGK, v_WGK = (pool_NGPK[page_W, :, place_W] for pool_NGPK in (keys_NGPK, values_NGPK))
            k_HWK, v_HWK = (x.repeat_interleave(heads_per_group, 1).transpose(0, 1) for x in (k_WGK, v_WGK))
            score_H1W = q_HK[:, None] @ k_HWK.transpose(1, 2) * q_THK.shape[2] ** -0.5
            o_THK[row] = (score_H1W.softmax(2) @ v_HWK)[:, 0]
    return o_THK
