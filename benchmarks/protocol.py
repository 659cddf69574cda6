"""The published protocol of UKPConvArg1: all strict pairs, each judged by a model of other debates.

    python benchmarks/protocol.py --model SmolLM2-135M-Instruct --corpus UKPConvArg1.tar.gz

The arm is the discriminative one with its body frozen, so that it can be trained once for each fold without
a GPU: a published model reads every argument once, as `RewardModel.score` has it, and a Bradley-Terry head on
its last state is fitted to the training pairs (logistic regression of the difference, Newton's steps, an L2
penalty chosen within the training debates). Folds leave out one side of a debate, its other side being in
training, or the whole debate, which is harder. Beside it stands the rule "longer", which needs no training,
and a head that is told the length as well.

Intervals are over the 32 sides, resampled, since the pairs of one side share their arguments. Left out: an
arm whose body is trained too, which takes a GPU (`train.py --stage discriminative`, once for each fold).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import torch
from tqdm import tqdm

import gramr2
from gramr2.extras.convincing_arguments import Compared, read_corpus
from gramr2.kernels.packed_attention import packed_causal, packed_positions

PENALTIES = 3.0, 30.0, 300.0, 3000.0
HELD = 4  # every fourth training debate is held out to choose the penalty by
STEPS = 6  # Newton's


@torch.no_grad()
def last_states(model_dir: Path, asked: Sequence[tuple[str, str]]) -> np.ndarray:
    """Of each (question, argument): the model's state at the end of the turn, float64."""
    model, tokenizer = gramr2.load(model_dir)
    states = []
    for question, argument in tqdm(asked, "reading", mininterval=10):
        ids, _ = tokenizer.example([("user", question)], argument)
        attend, positions_T = packed_causal([len(ids)], "cpu"), packed_positions([len(ids)], "cpu")
        states.append(model(torch.tensor(ids), positions_T, attend)[-1])
    return torch.stack(states).double().numpy()


def fitted(x_ND: np.ndarray, penalty: float) -> np.ndarray:
    """w that makes sigmoid(x w) near 1: x is the better argument's features less the worse one's."""
    w_D = np.zeros(x_ND.shape[1])
    for _ in range(STEPS):
        p_N = 1 / (1 + np.exp(-np.clip(x_ND @ w_D, -30, 30)))
        gradient_D = x_ND.T @ (p_N - 1) + penalty * w_D
        root_N = np.sqrt(p_N * (1 - p_N)).astype(np.float32)
        half_ND = x_ND.astype(np.float32) * root_N[:, None]  # enough for the way there, and twice as fast
        hessian_DD = (half_ND.T @ half_ND).astype(float) + penalty * np.eye(len(w_D))
        w_D -= np.linalg.solve(hessian_DD, gradient_D)
    return w_D


def chosen_penalty(x_ND: np.ndarray, debates_N: np.ndarray) -> float:
    """The one whose model does best on debates of the training set that it was not fitted to."""
    held_N = np.isin(debates_N, np.unique(debates_N)[::HELD])
    right = {c: (x_ND[held_N] @ fitted(x_ND[~held_N], c) > 0).sum() for c in PENALTIES}
    return max(PENALTIES, key=lambda c: right[c])


def judged(x_ND: np.ndarray, folds_N: np.ndarray, debates_N: np.ndarray) -> np.ndarray:
    """Whether each pair is judged right, by a model fitted to the pairs of other folds."""
    right_N = np.zeros(len(x_ND))
    for fold in tqdm(np.unique(folds_N), "folds", mininterval=10):
        test_N = folds_N == fold
        scale_D = x_ND[~test_N].std(0)
        train = x_ND[~test_N] / scale_D
        w_D = fitted(train, chosen_penalty(train, debates_N[~test_N]))
        right_N[test_N] = x_ND[test_N] / scale_D @ w_D > 0
    return right_N


def over_sides(right_N: np.ndarray, sides_N: np.ndarray) -> dict[str, float]:
    """The mean over pairs in per cent, with the interval that resampled sides give it."""
    groups = [right_N[sides_N == side] for side in np.unique(sides_N)]
    sums, sizes = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    draws = np.random.default_rng(0).integers(len(groups), size=(2000, len(groups)))
    low, high = np.quantile(sums[draws].sum(1) / sizes[draws].sum(1), (0.025, 0.975))
    figures = {"value": right_N.mean(), "low": low, "high": high}
    return {name: round(100 * float(value), 2) for name, value in figures.items()}


def strict_pairs(corpus: Path) -> tuple[list[Compared], list[tuple[str, str]]]:
    """Pairs with a label of the corpus' own, and their (better, worse) argument."""
    compared, strict = read_corpus(corpus)
    pairs = [one for one in compared if strict.get(one.id)]
    ordered = [one.arguments if strict[one.id] == "A" else one.arguments[::-1] for one in pairs]
    return pairs, [(better, worse) for better, worse in ordered]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a model's directory")
    parser.add_argument("--corpus", type=Path, required=True, help="UKPConvArg1.tar.gz")
    given = parser.parse_args()
    pairs, ordered = strict_pairs(given.corpus)
    both = [(one.question, text) for one, texts in zip(pairs, ordered, strict=True) for text in texts]
    asked = list(dict.fromkeys(both))
    place = {each: number for number, each in enumerate(asked)}
    index_2N = np.array([place[each] for each in both]).reshape(-1, 2).T
    states, lengths = last_states(given.model, asked), np.array([[math.log(len(a))] for _, a in asked])
    debates = np.array([one.debate for one in pairs])
    sides = np.array([f"{one.debate} {one.stance}" for one in pairs])

    def difference(features: np.ndarray) -> np.ndarray:
        return features[index_2N[0]] - features[index_2N[1]]

    arms = {"longer": (difference(lengths)[:, 0] > 0).astype(float)}
    told = {"head": states, "head, and told the length": np.hstack([states, lengths])}
    for out, folds in (("a side left out", sides), ("a debate left out", debates)):
        arms |= {f"{name}: {out}": judged(difference(x), folds, debates) for name, x in told.items()}
    rows = {
        name: over_sides(right, sides) | {"beside": over_sides(right - arms["longer"], sides)}
        for name, right in arms.items()
    }
    for name, row in rows.items():
        print(name, row)
    sizes = {
        "pairs": len(pairs),
        "arguments": len(asked),
        "sides": len(set(sides)),
        "debates": len(set(debates)),
    }
    common.write_result("protocol", {"model": given.model.name, **sizes, "rows": rows})


if __name__ == "__main__":
    main()
