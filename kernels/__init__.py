"""The one place that chooses: which code computes a kernel's meaning on which device.

- `sequence_logprob`: per-token log-probs over the vocabulary, without the logits; differentiable.
- `sequence_logprob_sum`: their weighted sum for a training step, cheaper where the weights are known.
- `rms_norm`, `rotate`, `silu_product`: what stands between the decoder's matmuls.
- `write_kv`, `attend_pages`: the sampler's cache, written and read through tables of pages.
- `backend`: "triton" or "reference", for a device.

Each has a readable meaning in reference.py. A device without a Triton kernel runs torch code: that file's
for the log-probs and between matmuls (elementwise_cpu.py where a CPU samples), and paged_attention_cpu.py for
the cache. Importing imports no Triton and asks no device; both happen in the first call. The arguments of the
log-probs are checked here, before anything is launched, and what is wrong is a ValueError that names the
argument. The others' are not: they are the model's and the sampler's own, and met in every layer of every
step. choice.py, the choice of a token, is the same torch code on every device, and needs no choosing here.

Legend of suffixes: see reference.py.
"""

import functools
import importlib.util
import os
from typing import Literal, overload

import torch
from torch import Tensor

from . import elementwise_cpu, paged_attention_cpu, reference
from .paged_attention_cpu import KEYS as KEYS  # this and the next two are for whoever builds reads
from .paged_attention_cpu import ROWS as ROWS
from .reads import Reads as Reads
from .reference import IGNORE
from .sequence_logprob import LogProb, LogProbSum

DTYPES = torch.float32, torch.bfloat16, torch.float16


@functools.cache
def backend(device: torch.device | str | None = None) -> str:
    """What `device` (default: the CUDA device if there is one, else the CPU) runs."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not importlib.util.find_spec("triton"):
        return "reference"
    if device.type == "cuda" and torch.version.cuda:
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if able else "reference"


def _implementation(hidden_TD, weight_VD):
    """The module whose kernels these operands take."""
    fits = hidden_TD.numel() > 0 and hidden_TD.shape[1] % 16 == 0
    fits &= hidden_TD.data_ptr() % 16 == 0 and weight_VD.data_ptr() % 16 == 0
    # Triton's interpreter gets bf16 matmuls wrong without saying so.
    fits &= hidden_TD.is_cuda or hidden_TD.dtype != torch.bfloat16
    if fits and backend(hidden_TD.device) == "triton":
        from . import sequence_logprob_triton

        return sequence_logprob_triton
    return reference


@overload
def sequence_logprob(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, return_lse: Literal[False] = False
) -> Tensor: ...
@overload
def sequence_logprob(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def sequence_logprob(hidden_TD, weight_VD, targets_T, return_lse=False):
    """log softmax(hidden @ weight.T)[target] of every token: fp32 [T]; a target of -100 gives 0.

    With `return_lse` also the log-sum-exp of every row, ignored ones included, fp32 [T]: with it, any few
    token ids' log-probs are hidden @ weight[ids].T - lse. Both results are differentiable in hidden and
    weight. Where no gradient is asked for, none is computed, and nothing is kept.

    Cost, in T x d x V operations: 2 without gradients; with them 8, since backward computes the logits
    again. A loss whose weights are known before the log-probs are costs 6 in `sequence_logprob_sum`.
    An ignored row costs as much as any other: where they are many, leave them out beforehand.

    Under FSDP2 call it inside the root module's forward, where the root's weight is whole; outside, the
    weight is a sharded DTensor and is refused. Targets are checked by value before the launch, for which
    a CUDA device is waited for once: some tens of microseconds beside milliseconds.
    """
    hidden_TD = _checked(hidden_TD, weight_VD, targets_T)
    logp_T, lse_T = _logprob(hidden_TD, weight_VD, targets_T)
    return (logp_T, lse_T) if return_lse else logp_T


def sequence_logprob_sum(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    coefficients_T: Tensor,
    known_targets: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> (sum over tokens of coefficient * log-prob, differentiable; the log-probs, detached, fp32 [T]).

    For training. The coefficients (fp32, constants: -mask / token count, say) are known before the
    log-probs are, so each chunk's gradient is taken while its logits are there: 6 T x d x V operations
    instead of the 8 of `sequence_logprob(...)` with any expression after it. Gradients are rounded to the
    operands' type in forward: with a loss scaler, put its scale into the coefficients. `known_targets`: their
    values are known to be ids of the vocabulary, and a CUDA device is not waited for to check them.
    """
    hidden_TD = _checked(hidden_TD, weight_VD, targets_T, known_targets)
    fits = coefficients_T.shape == targets_T.shape and coefficients_T.dtype == torch.float32
    fits &= coefficients_T.device == hidden_TD.device and not coefficients_T.requires_grad
    expected = f"torch.float32 [{len(targets_T)}] on {hidden_TD.device}, not requiring grad"
    _expect(fits, "coefficients_T", expected, coefficients_T)
    if not _wants_gradient(hidden_TD, weight_VD):
        logp_T, _ = _logprob(hidden_TD, weight_VD, targets_T)
        return (coefficients_T * logp_T).sum(), logp_T
    implementation = _implementation(hidden_TD, weight_VD)
    return LogProbSum.apply(hidden_TD, weight_VD, targets_T, coefficients_T, implementation)


def _logprob(hidden_TD, weight_VD, targets_T):
    implementation = _implementation(hidden_TD, weight_VD)
    if _wants_gradient(hidden_TD, weight_VD):
        return LogProb.apply(hidden_TD, weight_VD, targets_T, implementation)
    return implementation.score(hidden_TD, weight_VD, targets_T)


def _wants_gradient(hidden_TD, weight_VD):
    return torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)


def _expect(holds, argument, expected, tensor):
    if not holds:
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def _checked(hidden_TD, weight_VD, targets_T, known_targets=False):
    """Raises ValueError for operands that do not fit together; -> hidden, contiguous."""
    dtype, device, shape = hidden_TD.dtype, hidden_TD.device, hidden_TD.shape
    fits = len(shape) == 2 and dtype in DTYPES
    _expect(fits, "hidden_TD", "float32, bfloat16 or float16 [T, D]", hidden_TD)
    whole = "a whole tensor (under FSDP2: inside the root module's forward)"
    _expect(not hasattr(weight_VD, "full_tensor"), "weight_VD", whole, weight_VD)
    fits = weight_VD.ndim == 2 and weight_VD.shape[1] == shape[1] and len(weight_VD) > 0
    fits &= weight_VD.dtype == dtype and weight_VD.device == device and weight_VD.is_contiguous()
    _expect(fits, "weight_VD", f"contiguous {dtype} [V, {shape[1]}] on {device}", weight_VD)
    fits = targets_T.shape == shape[:1] and targets_T.dtype == torch.int64 and targets_T.device == device
    _expect(fits, "targets_T", f"torch.int64 [{shape[0]}] on {device}", targets_T)
    if known_targets:
        return hidden_TD.contiguous()
    bad_T = ((targets_T < 0) & (targets_T != IGNORE)) | (targets_T >= len(weight_VD))
    if bad_T.any():
        expected = f"ids in [0, {len(weight_VD)}) or {IGNORE}"
        raise ValueError(f"targets_T: expected {expected}, got {targets_T[bad_T][0].item()}")
    return hidden_TD.contiguous()


def _elementwise(*operands):
    """The module whose elementwise steps these operands take: one with gradients, or one that is faster."""
    if torch.compiler.is_compiling():  # what torch compiles it fuses by itself
        return reference
    if not operands[0].is_cuda:
        plain = torch.is_grad_enabled() or operands[0].dtype != torch.float32
        return reference if plain else elementwise_cpu
    wanted = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
    alike = all(operand.dtype == operands[0].dtype for operand in operands)
    if wanted or not alike or backend(operands[0].device) != "triton":
        return reference
    from . import elementwise

    return elementwise


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x * x + eps) * weight, over the last dimension."""
    return _elementwise(x, weight_D).rms_norm(x, weight_D, eps)


def rotate(q_THK: Tensor, k_TGK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, each channel i rotated together with channel i + K/2."""
    return _elementwise(q_THK, k_TGK, cos_T1K, sin_T1K).rotate(q_THK, k_TGK, cos_T1K, sin_T1K)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _elementwise(gate, up).silu_product(gate, up)


def _paged(keys_NGPK):
    """The module that reads and writes pages of this kind on this device."""
    trusted = keys_NGPK.is_cuda or keys_NGPK.dtype != torch.bfloat16
    if trusted and backend(keys_NGPK.device) == "triton":
        from . import paged_attention

        return paged_attention
    return paged_attention_cpu


def write_kv(k_TGK: Tensor, v_TGK: Tensor, keys_NGPK: Tensor, values_NGPK: Tensor, places_U: Tensor) -> None:
    """Puts the first U tokens' keys and values into their places of the pools: page * P + place."""
    _paged(keys_NGPK).write_kv(k_TGK, v_TGK, keys_NGPK, values_NGPK, places_U)


def attend_pages(q_THK: Tensor, keys_NGPK: Tensor, values_NGPK: Tensor, reads: list[Reads[Tensor]]) -> Tensor:
    """Attention of each row over what a list of `Reads` lets it see of the pools -> [T, H, K]."""
    return _paged(keys_NGPK).attend_pages(q_THK, keys_NGPK, values_NGPK, reads)
