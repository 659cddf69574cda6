"""What the kernels mean, in a few lines of torch: the oracle, and the path of devices without a kernel.

`sequence_logprob` is the definition: log p(target) under softmax(hidden @ weight.T), as equations (1),
(2), (4) and (5) of the paper use it. It stores every logit and leaves the gradient to autograd.
`score` and `logits_to_gradient_` are the two operations that a Triton kernel replaces; here they keep
the same contract, which is about memory: the [T, V] logits never exist, only one chunk of rows does, in
place. `attend_pages` is the sampler's way on a CPU, and is written for speed there: a part of a softmax is
torch's fused attention. What is left out: speed beyond that and what a chunked matmul gives.

Legend of suffixes: T tokens, C tokens of one chunk, D width of the model, V vocabulary.
"""

import torch

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


# Paged attention: queries read keys and values that lie in pages of a pool. Further suffixes: H query heads,
# G key/value heads, K head size, N pages of the pool, P tokens of a page; I items of one batch of reads,
# J queries of an item, M pages of an item; R query rows of one item and key/value head, W keys of a cut,
# Z query heads of the whole batch (T * H), X places of a part's result (I * G * R).

KEYS = 128  # keys of a cut of the sum: MKL adds up to 192 products in one order, however many zeros follow
ROWS = 8  # rows are padded to a multiple: a matmul of fewer takes another kernel, which rounds differently
LOWEST = -1e30  # a log-sum-exp of nothing; finite, so that a difference of two of them is 0 and not NaN


class Reads:
    """Items of queries that read the same pages: one sample's own, or a prefix for all who share it.

    rows_IJ: each item's queries, as rows of the flat batch; -1 where it has fewer than J.
    visible_IJ: how many keys, from the first page's start on, each of them may see.
    pages_IM: each item's pages, in order; behind the last that is visible, any page.
    """

    def __init__(self, rows_IJ, visible_IJ, pages_IM):
        self.rows_IJ, self.visible_IJ, self.pages_IM = rows_IJ, visible_IJ, pages_IM
        self._layout = None

    def layout(self, count, heads, keys_NPGK):
        """What all layers share: which query heads go where, which come back from where, and the cuts."""
        if self._layout is None:
            page, groups = keys_NPGK.shape[1:3]
            head_G1h = torch.arange(heads, device=self.rows_IJ.device).view(groups, 1, -1)
            rows_IJ = torch.where(self.visible_IJ > 0, self.rows_IJ, -1)
            rows_IJ = rows_IJ.masked_fill(rows_IJ < 0, count)  # a row more, for what is nobody's
            there_IGR = (rows_IJ[:, None, :, None] * heads + head_G1h).flatten(2)
            padding = 0, -there_IGR.shape[2] % ROWS
            there_IGR = torch.nn.functional.pad(there_IGR, padding, value=count * heads)
            back_Z = there_IGR.new_full(((count + 1) * heads,), -1)
            back_Z[there_IGR.flatten()] = torch.arange(there_IGR.numel(), device=back_Z.device)
            back_Z = back_Z[: count * heads]
            absent_Z = back_Z < 0
            there_IGR.clamp_(max=count * heads - 1)
            cuts = [
                self._cut(first, page, head_G1h.shape[2], padding, keys_NPGK)
                for first in range(0, self.pages_IM.shape[1], KEYS // page)
            ]
            self._layout = there_IGR, back_Z.clamp_(min=0), absent_Z if absent_Z.any() else None, cuts
        return self._layout

    def _cut(self, first, page, shared, padding, keys_NPGK):
        """-> the pages of KEYS keys, what is to be added to scores to hide keys, and a buffer to gather in.

        Fresh memory for every layer would cost more than filling it.
        """
        pages_IM = self.pages_IM[:, first : first + KEYS // page]
        place_W = torch.arange(first * page, (first + pages_IM.shape[1]) * page, device=pages_IM.device)
        hidden_IJW = place_W >= self.visible_IJ[..., None]
        mask_I1RW = None
        if hidden_IJW.any():
            mask_IJW = torch.zeros(hidden_IJW.shape, device=place_W.device).masked_fill_(hidden_IJW, LOWEST)
            mask_IRW = mask_IJW.repeat_interleave(shared, 1)
            mask_I1RW = torch.nn.functional.pad(mask_IRW, (0, 0, *padding))[:, None]
        buffers = [keys_NPGK.new_empty(pages_IM.numel(), *keys_NPGK.shape[1:]) for _ in range(2)]
        return pages_IM.flatten(), mask_I1RW, buffers


def write_kv(k_TGK, v_TGK, keys_NPGK, values_NPGK, slots_S):
    """Puts the first S tokens' keys and values in their places: slot = page * P + place in the page."""
    for pool_NPGK, x_TGK in (keys_NPGK, k_TGK), (values_NPGK, v_TGK):
        pool_NPGK.flatten(0, 1).index_copy_(0, slots_S, x_TGK[: len(slots_S)])


def attend_pages(q_THK, keys_NPGK, values_NPGK, reads):
    """softmax(q k / sqrt(K)) v over all that `reads` lets each row see; 0 where that is nothing.

    In fp32 a row's result is bitwise a function of its own query, keys, values and reads: whatever the
    other rows are, however many pages pad its item, and whether its prefix is read alone or with others.
    A page has at most KEYS tokens here.
    """
    count, heads, size = q_THK.shape
    layouts = [batch.layout(count, heads, keys_NPGK) for batch in reads]
    parts = sum(len(cuts) for *_, cuts in layouts)
    q_ZK = q_THK.float().reshape(-1, size)
    o_SZK = q_ZK.new_zeros(max(1, parts), *q_ZK.shape)  # S: the cuts of all reads
    lse_SZ = q_ZK.new_full(o_SZK.shape[:2], LOWEST)
    slot = iter(range(parts))
    for there_IGR, back_Z, absent_Z, cuts in layouts:
        q_IGRK = q_ZK.index_select(0, there_IGR.flatten()).view(*there_IGR.shape, size)
        for pages_N, mask_I1RW, buffers in cuts:
            k_IGWK, v_IGWK = (
                torch.index_select(pool, 0, pages_N, out=buffer)
                .view(len(q_IGRK), -1, *pool.shape[2:]).transpose(1, 2).float()
                for pool, buffer in zip((keys_NPGK, values_NPGK), buffers, strict=True)
            )  # fmt: skip
            o_IGRK, lse_IGR = _softmax_part(q_IGRK, k_IGWK, v_IGWK, mask_I1RW)
            at = next(slot)
            torch.index_select(o_IGRK.reshape(-1, size), 0, back_Z, out=o_SZK[at])
            torch.index_select(lse_IGR.flatten(), 0, back_Z, out=lse_SZ[at])
            if absent_Z is not None:
                o_SZK[at].masked_fill_(absent_Z[:, None], 0)
                lse_SZ[at].masked_fill_(absent_Z, LOWEST)
    # In the order of the reads, one after the other: a part that sees nothing adds 0 and changes no bit.
    weight_SZ = (lse_SZ - lse_SZ.amax(0)).exp_()
    o_SZK.mul_(weight_SZ[..., None])
    total_Z, o_ZK = weight_SZ[0], o_SZK[0]
    for weight_Z, part_ZK in zip(weight_SZ[1:], o_SZK[1:], strict=True):
        total_Z.add_(weight_Z)
        o_ZK.add_(part_ZK)
    return o_ZK.div_(total_Z[:, None]).view_as(q_THK).to(q_THK.dtype)


def _softmax_part(q_IGRK, k_IGWK, v_IGWK, mask_I1RW):
    """Attention over one cut -> (its result, log-sum-exp of its scores), which are what merging needs."""
    if q_IGRK.device.type == "cpu":
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q_IGRK, k_IGWK, v_IGWK, attn_mask=mask_I1RW)
    score_IGRW = q_IGRK @ k_IGWK.transpose(2, 3) * q_IGRK.shape[3] ** -0.5
    if mask_I1RW is not None:
        score_IGRW += mask_I1RW
    return score_IGRW.softmax(3) @ v_IGWK, score_IGRW.logsumexp(3)
