"""The settings of the stage policy, which stand in a recipe's [train.policy] beside those of every stage.

It leaves out: what they do (policy.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from gramr2.settings import TrainSettings, is_positive, is_share, require, setting

REWARDS = ("pairwise", "tournament", "scalar")  # see policy.py


@dataclass(frozen=True)
class PolicySettings(TrainSettings):
    """A stage whose examples the model draws itself. batch_size counts rollouts."""

    group: int = setting(8, "policy: rollouts of each prompt; their rewards are compared with each other")
    inner: int = setting(2, "policy: optimizer steps on each batch of rollouts")
    reward: str = setting("pairwise", f"policy: where rewards come from: {', '.join(REWARDS)}")
    votes: int = setting(2, "policy: votes per comparison, half in each order; 2 are greedy, more are drawn")
    clip_ratio: float = setting(0.2, "policy: share by which a token's probability may move on one batch")
    kl: float = setting(0.02, "policy: weight of the KL divergence from the starting model (estimator k3)")
    max_new_tokens: int = setting(256, "policy: most tokens of a rollout")
    judge_tokens: int = setting(1024, "policy: most tokens of a judge's answer")
    max_abstained: float = setting(0.5, "policy: share of a batch's comparisons without a verdict that stops")

    def __post_init__(self):
        super().__post_init__()
        require(self, ("group",), lambda value: value > 1, "is too few: a reward is relative to its group's")
        positive = ("inner", "max_new_tokens", "judge_tokens")
        require(self, positive, is_positive, "must be above 0")
        require(self, ("votes",), lambda value: value > 0 and value % 2 == 0, "must be even, and above 0")
        require(self, ("clip_ratio", "max_abstained"), is_share, "must be from 0 to 1")
        require(self, ("kl",), lambda value: value >= 0, "must not be negative")
        require(self, ("reward",), REWARDS.__contains__, f"must be one of {', '.join(REWARDS)}")
        require(self, ("batch_size",), lambda n: n % self.group == 0, f"is not whole groups of {self.group}")
