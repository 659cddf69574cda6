"""What the kernels mean, in a few lines of torch: the oracle, and the path of devices without a kernel.

`sequence_logprob` is the definition: log p(target) under softmax(hidden @ weight.T), as equations (1),
(2), (4) and (5) of the paper use it. It stores every logit and leaves the gradient to autograd.
`score` and `logits_to_gradient_` are the two operations that a Triton kernel replaces; here they keep
the same contract, which is about memory: the [T, V] logits never exist, only one chunk of rows does, in
place. What is left out: speed beyond what a chunked matmul gives.

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
# J queries of an item, M pages of an item; X = I * G, R query rows of one item and key/value head, W keys.

KEYS = 256  # keys per block of the sum: MKL's matmul adds up to that many products in one fixed order
ROWS = 8  # rows are padded to a multiple: a matmul of fewer takes another kernel, which rounds differently
LOWEST = -1e30  # a maximum over nothing; finite, so that a difference of two of them is 0 and not NaN


class Reads:
    """Items of queries that read the same pages: one sample's own, or a prefix for all who share it.

    rows_IJ: each item's queries, as rows of the flat batch; -1 where it has fewer than J.
    visible_IJ: how many keys, from the first page's start on, each of them may see.
    pages_IM: each item's pages, in order; behind the last that is visible, any page.
    """

    def __init__(self, rows_IJ, visible_IJ, pages_IM):
        self.rows_IJ, self.visible_IJ, self.pages_IM = rows_IJ, visible_IJ, pages_IM
        self._cuts = None

    def cuts(self, keys_NGPK):
        """What all layers share: for each block of KEYS keys, where it lies, what is hidden, and buffers.

        The buffers are for the keys and the values gathered: fresh memory for every layer would cost more
        than filling it.
        """
        if self._cuts is None:
            groups, page, size = keys_NGPK.shape[1:]
            device, many = self.pages_IM.device, KEYS // page
            rows = self.rows_IJ.flatten()
            ordered = torch.equal(rows, torch.arange(len(rows), device=device))
            self._cuts = slice(len(rows)) if ordered else rows, []
            head_G1 = torch.arange(groups, device=device)[:, None]
            for first in range(0, self.pages_IM.shape[1], many):
                pages_IM = self.pages_IM[:, first : first + many]
                pages_X = (pages_IM[:, None] * groups + head_G1).flatten()
                place_W = torch.arange(first * page, (first + pages_IM.shape[1]) * page, device=device)
                hidden_IJW = place_W >= self.visible_IJ[..., None]
                hidden_I1J1W = hidden_IJW[:, None, :, None] if hidden_IJW.any() else None
                buffers = [keys_NGPK.new_empty(len(pages_X), page, size) for _ in range(2)]
                self._cuts[1].append((pages_X, hidden_I1J1W, buffers))
        return self._cuts


def write_kv(k_TGK, v_TGK, keys_NGPK, values_NGPK, slots_S):
    """Puts the first S tokens' keys and values in their places: slot = page * P + place in the page."""
    groups, page, size = keys_NGPK.shape[1:]
    head_G = torch.arange(groups, device=slots_S.device) * page
    place = ((slots_S // page * (groups * page) + slots_S % page)[:, None] + head_G).flatten()
    for pool_NGPK, x_TGK in ((keys_NGPK, k_TGK), (values_NGPK, v_TGK)):
        pool_NGPK.view(-1, size).index_copy_(0, place, x_TGK[: len(slots_S)].reshape(-1, size))


def attend_pages(q_THK, keys_NGPK, values_NGPK, reads):
    """softmax(q k / sqrt(K)) v over all that `reads` lets each row see; 0 where that is nothing.

    In fp32 a row's result is bitwise a function of its own query, keys, values and reads: whatever the
    other rows are, however many pages pad its item, and whether its prefix is read alone or with others.
    """
    count, heads, size = q_THK.shape
    o_THK = q_THK.new_zeros(count + 1, heads, size, dtype=torch.float32)  # one more: where -1 points
    max_TH = o_THK.new_full((count + 1, heads), LOWEST)
    sum_TH = o_THK.new_zeros(count + 1, heads)
    total = o_THK, max_TH, sum_TH
    for batch in reads:
        where, cuts = batch.cuts(keys_NGPK)
        part = _read(q_THK.float()[where], keys_NGPK, values_NGPK, *batch.rows_IJ.shape, cuts)
        merged = _merge([x[where] for x in total], part)
        for x, y in zip(total, merged, strict=True):
            x[where] = y
    return (o_THK / sum_TH.clamp(min=1e-30)[..., None])[:count].to(q_THK.dtype)


def _read(q_YHK, keys_NGPK, values_NGPK, items, members, cuts):
    """One batch's part of the softmax for its rows (Y = I * J): (sum of exp * value, maximum, sum of exp)."""
    groups, size = keys_NGPK.shape[1], keys_NGPK.shape[3]
    # The query heads of a group, of all members, become rows of one matmul.
    q_IGJHK = q_YHK.view(items, members, groups, -1, size).transpose(1, 2)
    shape, rows = q_IGJHK.shape[:-1], members * q_IGJHK.shape[3]
    q_XRK = q_IGJHK.reshape(items * groups, rows, size) * size**-0.5
    q_XRK = torch.nn.functional.pad(q_XRK, (0, 0, 0, -rows % ROWS))
    total = None
    for pages_X, hidden_I1J1W, buffers in cuts:
        for pool, buffer in zip((keys_NGPK, values_NGPK), buffers, strict=True):
            torch.index_select(pool.flatten(0, 1), 0, pages_X, out=buffer)
        k_XWK, v_XWK = (buffer.view(len(q_XRK), -1, size).to(q_XRK.dtype) for buffer in buffers)
        score_XRW = torch.bmm(q_XRK, k_XWK.transpose(1, 2))
        if hidden_I1J1W is not None:
            score_XRW[:, :rows].unflatten(1, shape[2:]).unflatten(0, shape[:2]).masked_fill_(
                hidden_I1J1W, -torch.inf
            )
        max_XR = score_XRW.amax(2).clamp_(min=LOWEST)
        exp_XRW = score_XRW.sub_(max_XR[..., None]).exp_()
        # A matmul with ones, because its order of additions does not depend on how many keys pad it.
        sum_XR = (exp_XRW.flatten(0, 1) @ exp_XRW.new_ones(k_XWK.shape[1], ROWS))[:, 0].view_as(max_XR)
        part = torch.bmm(exp_XRW, v_XWK), max_XR, sum_XR
        total = part if total is None else _merge(total, part)
    flat = (x[:, :rows].reshape(*shape, *x.shape[2:]).transpose(1, 2) for x in total)
    return [x.reshape(items * members, -1, *x.shape[4:]) for x in flat]


def _merge(one, two):
    """Two parts of one softmax as one. Merging nothing changes no bit: exp(0) is 1, and 0 is added."""
    (o_1, max_1, sum_1), (o_2, max_2, sum_2) = one, two
    top = torch.maximum(max_1, max_2)
    scale_1, scale_2 = (max_1 - top).exp(), (max_2 - top).exp()
    o = o_1 * scale_1[..., None] + o_2 * scale_2[..., None]
    return o, top, sum_1 * scale_1 + sum_2 * scale_2
