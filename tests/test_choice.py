"""The choice of a token: its noise is uniform, and its filters keep what their definitions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import chi_square

from gramr2.kernels.choice import Column, Options, choose, uniforms


def options_of(**fields):
    base = dict(temperature=1.0, top_p=1.0, top_k=0, watch_W=torch.zeros(0, dtype=torch.int64))
    return Options(**{**base, **fields})


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.7}]
)
def test_filters_follow_the_definition(fields):
    """Temperature, then the k likeliest, then the fewest that reach p: by sorting, beside the bisection.
    20,000 draws; chance of a false alarm 0.001 per case by the quantiles of chi-square, seeds being fixed."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.9, 0.1, -3.0, 1.0])
    p = (logits / fields.get("temperature", 1.0)).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: fields.get("top_k") or 7]
    share = p[kept] / p[kept].sum()
    kept = kept[: int((share.cumsum(0) < fields.get("top_p", 1.0) - 1e-6).sum()) + 1]
    wanted = torch.zeros(7).index_copy(0, kept, p[kept] / p[kept].sum()).numpy()
    rows = 20000
    uniform = uniforms(torch.arange(rows) * 1234567, torch.zeros(rows, dtype=torch.int64))
    outputs = choose(logits.expand(rows, 7), uniform, options_of(**fields))
    counts = np.bincount(outputs[:, Column.ID].long().numpy(), minlength=7)
    assert not counts[wanted == 0].any()
    quantile = {2: 10.83, 3: 13.82, 4: 16.27, 7: 22.46}[len(kept)]
    assert chi_square(counts[wanted > 0], wanted[wanted > 0] * rows) < quantile
    np.testing.assert_allclose(
        outputs[:, Column.LOGPROB], logits.log_softmax(-1)[outputs[:, Column.ID].long()], atol=1e-6
    )


def test_uniforms_are_uniform_and_never_0_or_1():
    x = uniforms(torch.arange(1000).repeat_interleave(100), torch.arange(100).repeat(1000))
    assert 0 < x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1
    # 100 equal bins of 100,000: a false alarm in 1 of 1,000 seeds (quantile for 99 degrees of freedom).
    assert chi_square(np.histogram(x, 100, (0, 1))[0], 1000.0) < 148.2
    grid = x.view(1000, 100) - 0.5
    for other in (grid.roll(1, 0), grid.roll(1, 1)):
        assert abs((grid * other).mean() * 12) < 4 / 100_000**0.5, "neighbours are correlated"
