"""What a judged file is worth against labels that the judge never saw: accuracy with its interval.

It reads judgments only, so that a table can be made again without a model. An abstention is never correct.

It leaves out: judging (judge.py), and anything that trains or filters; the truth stops here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000


def interval(correct: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95% interval of a mean over pairs."""
    values = np.asarray(correct, dtype=float)
    rng = np.random.default_rng(seed)
    means = rng.binomial(len(values), values.mean(), RESAMPLES) / len(values)  # resampling zeros and ones
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def accuracy_row(name: str, judged: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One row of results.json: accuracy in per cent over pairs that have a label, and by domain."""
    correct: dict[str, list[bool]] = {}
    for row in judged:
        domain = row["pair"].get("domain") or "all"
        correct.setdefault(domain, []).append(row.get("label") == row["pair"]["label"])
    every = [hit for hits in correct.values() for hit in hits]
    low, high = interval(every)
    return {
        "name": name,
        "accuracy": percent(every),
        "low": round(100 * low, 2),
        "high": round(100 * high, 2),
        "n": len(every),
        "by_domain": {domain: percent(hits) for domain, hits in sorted(correct.items())},
    }


def percent(hits: Sequence[bool]) -> float:
    return round(100 * sum(hits) / len(hits), 2)


def label_accuracy(labels: Iterable[tuple[str, str | None]], truth: dict[str, str]) -> float | None:
    """Share of (pair id, label) that are right, in per cent; None where there is nothing to compare.

    For reporting only.
    """
    hits = [truth[i] == label for i, label in labels if i in truth and label is not None]
    return percent(hits) if hits else None
