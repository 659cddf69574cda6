"""The settings of the stage policy, which stand in a recipe's [train.policy] beside those of every stage.

It leaves out: what they do (policy.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from gramr2.settings import SHARE, TrainSettings, require, setting

REWARDS = ("pairwise", "tournament", "scalar")  # see policy.py


@dataclass(frozen=True)
class PolicySettings(TrainSettings):
    """A stage whose examples the model draws itself. batch_size counts rollouts."""

    lr_share = 0.2

    group: int = setting(
        8, "policy: rollouts of each prompt; their rewards are compared with each other", low=2, high=10**4
    )
    inner: int = setting(2, "policy: optimizer steps on each batch of rollouts", low=1, high=10**4)
    reward: str = setting("pairwise", f"policy: where rewards come from: {', '.join(REWARDS)}", among=REWARDS)
    votes: int = setting(
        2, "policy: votes per comparison, half in each order; 2 are greedy, more are drawn", low=2, high=10**4
    )
    clip_ratio: float = setting(
        0.2, "policy: share by which a token's probability may move on one batch", **SHARE
    )
    kl: float = setting(
        0.02, "policy: weight of the KL divergence from the starting model (estimator k3)", low=0
    )
    max_new_tokens: int = setting(256, "policy: most tokens of a rollout", low=1, high=10**7)
    judge_tokens: int = setting(1024, "policy: most tokens of a judge's answer", low=1, high=10**7)
    max_abstained: float = setting(
        0.5, "policy: share of a batch's comparisons without a verdict that stops", **SHARE
    )

    def __post_init__(self):
        super().__post_init__()
        require(self, ("votes",), lambda value: value % 2 == 0, "must be even")
        require(self, ("batch_size",), lambda n: n % self.group == 0, f"is not whole groups of {self.group}")
