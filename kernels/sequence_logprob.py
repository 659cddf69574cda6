"""The training path of the fused log-prob: exact gradients, at most one chunk of logits alive.

With Z = H W^T [T, V] the logits, logp_t = Z[t, y_t] - lse_t and p_t = softmax(Z_t):

    d logp_t / d Z_t = onehot(y_t) - p_t            d lse_t / d Z_t = p_t
    G_t = a_t (onehot(y_t) - p_t) + b_t p_t         a_t, b_t: upstream gradients of logp_t and lse_t
    dH  = G W                                       dW = G^T H

so a chunk of rows of Z, once computed, can be turned into the same rows of G in place and used for both
products: dH's rows are final (the sum over V is accumulated in fp32 inside the matmul), dW grows once per
chunk. One product costs 2TdV operations, so the floor is 6TdV: Z, dH, dW.

Each chunk is one more pass over dW. Where they are few, dW stands in the weight's own type, and is rounded
to it once per chunk; an fp32 one would be read and written at twice the bytes, and be rounded in the end all
the same. Where they are many, it is fp32.

- `LogProbSum` reaches it. It wants sum_t c_t logp_t with c known beforehand (a training loss: c is a
  mask over a token count), so a_t = c_t, and the backward of a chunk is taken in forward while its
  logits are there. What it keeps for backward is the gradients themselves, [T, D] and [V, D].
- `LogProb` returns every token's log-prob, to be used in any expression. Then a_t is known in backward
  only, and dW mixes tokens, so it cannot be made beforehand and scaled: the logits are computed a second
  time, chunk by chunk, 8TdV in all. It keeps nothing but its inputs.

Both hand dW to autograd as the gradient of the weight that they were given, and write to no `.grad`:
tied embeddings, accumulation over micro-batches and FSDP2's reduce-scatter work as for a linear layer.
Products of fp32 obey torch's own switch for TF32 here, as any matmul does; Triton's `score` never uses it.

`implementation` is the module whose `score`, `logits_to_gradient_` and `rows_per_chunk` are used:
reference.py or sequence_logprob_triton.py. Legend of suffixes: see reference.py.
"""

import torch
from torch.autograd.function import once_differentiable

from .reference import chunks

FEW = 4  # chunks: rounding dW with each gives it 1.6 times the error of rounding it once


class LogProb(torch.autograd.Function):
    """(hidden, weight, targets) -> (logp_T, lse_T); backward computes the logits again: 8TdV."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T, implementation):
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T)
        ctx.implementation = implementation
        return implementation.score(hidden_TD, weight_VD, targets_T)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logp_T, d_lse_T):
        operands = *ctx.saved_tensors, d_logp_T, d_lse_T
        _, *gradients = _gradients(ctx.implementation, *operands, *ctx.needs_input_grad[:2])
        return *gradients, None, None


class LogProbSum(torch.autograd.Function):
    """(hidden, weight, targets, c) -> (sum_t c_t logp_t, logp_T); backward is taken in forward: 6TdV."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T, coefficients_T, implementation):
        operands = hidden_TD, weight_VD, targets_T, coefficients_T, torch.zeros_like(coefficients_T)
        logp_T, d_hidden_TD, d_weight_VD = _gradients(implementation, *operands, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(d_hidden_TD, d_weight_VD)
        ctx.mark_non_differentiable(logp_T)
        return (coefficients_T * logp_T).sum(), logp_T

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        # Not in place: with retain_graph the saved gradients are used again.
        scaled = [None if saved is None else saved * upstream for saved in ctx.saved_tensors]
        return *scaled, None, None, None


def _gradients(
    implementation, hidden_TD, weight_VD, targets_T, d_logp_T, d_lse_T, needs_hidden, needs_weight
):
    """-> (logp_T, dH or None, dW or None). Every matmul names its `out`, which keeps autocast out too."""
    logp_T = torch.empty_like(d_logp_T)
    parts = chunks(len(hidden_TD), implementation.rows_per_chunk(weight_VD))
    d_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
    d_weight_VD = None
    if needs_weight:
        dtype = torch.float32 if len(parts) > FEW else weight_VD.dtype
        d_weight_VD = torch.empty_like(weight_VD, dtype=dtype) if parts else torch.zeros_like(weight_VD)
    buffer_CV = hidden_TD.new_empty(parts[0].stop if parts else 0, len(weight_VD))
    for rows in parts:
        gradient_CV = buffer_CV[: rows.stop - rows.start]
        torch.mm(hidden_TD[rows], weight_VD.T, out=gradient_CV)
        logp_T[rows] = implementation.logits_to_gradient_(
            gradient_CV, targets_T[rows], d_logp_T[rows], d_lse_T[rows]
        )
        if d_hidden_TD is not None:
            torch.mm(gradient_CV, weight_VD, out=d_hidden_TD[rows])
        if d_weight_VD is not None:
            _add_product_(d_weight_VD, gradient_CV, hidden_TD[rows], first=rows.start == 0)
    return logp_T, d_hidden_TD, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype)


def _add_product_(total_VD, gradient_CV, hidden_CD, first):
    """total += gradient^T hidden, or = with the first chunk: what stood there before is not read."""
    keep = 0 if first else 1
    if total_VD.dtype == gradient_CV.dtype:
        torch.addmm(total_VD, gradient_CV.T, hidden_CD, beta=keep, out=total_VD)
    elif total_VD.is_cuda:  # the matmul itself takes 16-bit operands and adds to fp32
        torch.addmm(total_VD, gradient_CV.T, hidden_CD, beta=keep, out_dtype=torch.float32, out=total_VD)
    else:
        torch.addmm(total_VD, gradient_CV.T.float(), hidden_CD.float(), beta=keep, out=total_VD)
