"""Policy optimisation: a reward model at work, the application that the paper names and does not describe.

How does a model that compares two responses reward a single one? A reward is a function with the signature
of `RewardModel.reward`, (prompts, completions, references=None) -> a number for each completion:

    pairwise     against the policy's own greedy answer: the probability that the rollout is better, the mean
                 over both orders and all votes
    tournament   each against each among the rollouts of a prompt: the share won
    scalar       a discriminative model's score

Any Python callable with that signature serves; `references` are the greedy answers where the setting is
pairwise, and None otherwise. A batch is `group` rollouts of each of some prompts, drawn from the policy as it
stands (at temperature 1: their log-probs are the sampler's own) and judged in one batch. Rewards become
advantages within each group; `inner` steps of the clipped objective follow (policy_loss.py), in the loop
that trains everything else (fit.Loop). Targets are the rollout's tokens, its stop token the last.

Nothing is silent. Equal rewards are no advantage. A rollout that was cut at the length limit is not judged
and takes its group's lowest reward. An empty rollout is a rollout: its one token is the stop. One whose
logits were not finite is left out, and counted. What has no verdict counts one half; where that is more than
`max_abstained` of a batch's comparisons, the run stops and says so.

OUT/rollouts.jsonl has a row for each rollout: response, reward, advantage, and what the judge wrote about it.
From these rows a run that was cut between two inner steps goes on, to the same bits.

Each rank holds the policy whole, to sample from, beside its part of the one that is trained, the model that
it began from, and the judge; it draws and judges its share of the prompts. It leaves out: a value model,
rewards within a rollout, and policy and judge on different machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from gramr2 import fit, parallel
from gramr2.data import Store
from gramr2.directories import model_files
from gramr2.engine import Engine
from gramr2.extras.policy_loss import PolicyGradient
from gramr2.extras.policy_settings import PolicySettings
from gramr2.extras.row_log import RowLog
from gramr2.fields import as_dataclass
from gramr2.files import InputError
from gramr2.judge import RewardModel
from gramr2.model import Decoder
from gramr2.plan import Plan, read_model_config
from gramr2.rankings import preference
from gramr2.records import Example, Judgment, Pair, Tokens, messages_of, nothing_read
from gramr2.sampler import generate
from gramr2.tokenizer import Tokenizer
from gramr2.weights import load_model

Reward = Callable[..., Sequence[float]]
Log = list[tuple[Pair, Judgment | InputError]]


class Judged:
    """A reward model's rewards under a run's settings. Equal rollouts of a prompt are one contestant.

    Two votes are not drawn: they are the greedy answer in each order. `log` is the last call's comparisons.
    """

    def __init__(self, judge: RewardModel, settings: PolicySettings):
        if (settings.reward == "scalar") != (judge.format.endings is None):
            kind = "a judge that writes verdicts" if judge.format.endings else "a discriminative model"
            raise InputError(f"reward: {settings.reward} cannot come from {kind}; give another --judge")
        self.judge = judge
        self.log: Log = []
        self.options: dict[str, Any] = {
            "votes": settings.votes,
            "temperature": float(settings.votes > 2),
            "seed": settings.seed,
        }
        self.options |= {"max_new_tokens": settings.judge_tokens, "progress": False}

    def __call__(self, prompts, completions, references=None) -> list[float]:
        self.log = []
        asked = list(zip(prompts, completions, references or completions, strict=True))
        different = list(dict.fromkeys(asked))
        one, two, three = (list(column) for column in zip(*different, strict=True))
        values = self.judge.reward(one, two, references and three, **self.options, log=self.log)
        found = dict(zip(different, values, strict=True))
        return [found[each] for each in asked]


def advantages(groups: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rewards above their group's mean, in units of their spread over the batch; a group's sum to 0.

    Equal rewards give exactly 0. (Divided by its own spread, a group whose rewards differ by a judge's noise
    would have as much to say as one with right and wrong answers.)
    """
    above = [[r - fmean(group) if len(set(group)) > 1 else 0.0 for r in group] for group in groups]
    spread = math.sqrt(fmean(each * each for group in above for each in group)) or 1.0
    return [[each / spread for each in group] for group in above]


class Prompt(NamedTuple):
    question: str  # a longer conversation as judges read it: "Role: content" blocks
    ids: list[int]


@dataclass
class Rollout:
    """A row of rollouts.jsonl. `step` is the first optimizer step that it serves, from 1 as in metrics."""

    step: int
    prompt: int  # its place among the prompts that are used
    question: str
    response: str
    finish: str  # "stop", or "length": cut, and not judged
    ids: list[int]
    logprobs: list[float]
    greedy: str | None = None  # what a pairwise reward compared it with
    reward: float = 0.0
    advantage: float = 0.0
    judged: list[dict[str, Any]] = field(default_factory=list)


def read_prompts(data: Sequence[Path], tokenizer: Tokenizer, settings: PolicySettings) -> tuple[list, int]:
    """The prompts of the files, pair files among them, that leave room for an answer; and how many do not."""
    prompts, room = [], settings.max_length - settings.max_new_tokens
    for messages in islice(chain(*(Store(path, messages_of) for path in data)), settings.limit or None):
        ids = tokenizer.chat([{"role": role, "content": text} for role, text in messages])
        prompts.append(Prompt(Pair(messages, "", "").question, ids))
    kept = [prompt for prompt in prompts if len(prompt.ids) <= room]
    if not kept:
        names = ", ".join(map(str, data))
        raise InputError(f"{names}: no prompt of {room} tokens or less (max_length less max_new_tokens)")
    return kept, len(prompts) - len(kept)


# ---------------------------------------------------------------------------------- a batch of rollouts


@dataclass
class Rollouts:
    """The stream of global batches: rollouts of the policy as it stands when a batch begins."""

    settings: PolicySettings
    prompts: list[Prompt]
    plan: Plan
    loop: fit.Loop
    actor: Decoder
    reward: Reward
    objective: PolicyGradient
    batch: list[Rollout] = field(default_factory=list)

    def __post_init__(self):
        self.path, self.ranks = self.loop.out / "rollouts.jsonl", self.loop.ranks

    def global_batches(self, first: int) -> Iterator[list[Example]]:
        for step in range(first, self.loop.steps):
            number, again = divmod(step, self.settings.inner)
            if not again:
                self.draw(number, step + 1)
            elif step == first:  # cut between two inner steps: the rollouts that the first one used
                self.batch = [
                    as_dataclass(Rollout, row, f"{self.path}: ")
                    for row in Store(self.path)
                    if row["step"] == step - again + 1
                ]
            yield list(map(self.example, self.batch))

    def example(self, rollout: Rollout) -> Example:
        asked, count = self.prompts[rollout.prompt].ids, len(rollout.ids)
        tokens = Tokens((*asked, *rollout.ids), len(asked))
        return Example((tokens,), (rollout.advantage,) * count, tuple(rollout.logprobs))

    def draw(self, number: int, step: int) -> None:
        """A batch, in the plan's order whatever the number of ranks. The first rank writes it down."""
        parameters = dict(self.actor.named_parameters())
        with torch.no_grad():
            for name, tensor in parallel.whole_tensors(self.loop.trainee, self.actor.head_weight.dtype):
                parameters[name].copy_(tensor)
        chosen, size = [row for row, _, _ in self.plan.step(number)], self.ranks.size
        mine = chosen[self.ranks.rank :: size]
        parts = self.ranks.on_all_ranks(lambda: self.assign(self.sample(mine, step)))
        groups = [parts[i % size][i // size] for i in range(len(chosen))]
        values = advantages([[each.reward for each in group] for group in groups])
        self.batch = [each for group in groups for each in group]
        for rollout, value in zip(self.batch, chain.from_iterable(values), strict=True):
            rollout.advantage = value
        if self.ranks.is_first:
            with RowLog(self.path, b'{"step": ') as file:
                for rollout in self.batch:
                    file.write(asdict(rollout))
        self.check(step)

    def sample(self, chosen: Sequence[int], step: int) -> list[list[Rollout]]:
        """The groups of some prompts. A rollout is the same whatever rank draws it."""
        questions, ids = zip(*(self.prompts[i] for i in chosen), strict=True) if chosen else ((), ())
        how: dict[str, Any] = {
            "max_new_tokens": self.settings.max_new_tokens,
            "seed": self.settings.seed,
            "progress": False,
        }
        how["engine"] = Engine(self.actor)  # for two calls: the training needs its memory back
        drawn = generate(self.actor, ids, n=self.settings.group, keys=[f"{step} {i}" for i in chosen], **how)
        greedy: list[str | None] = [None] * len(chosen)
        if self.settings.reward == "pairwise":
            greedy = [self.text(each) for (each,) in generate(self.actor, ids, temperature=0.0, **how)]
        return [
            [
                Rollout(step, i, question, self.text(each), each.finish, each.ids, each.logprobs, answer)
                for each in group
                if each.finish != "error"
            ]
            for i, question, group, answer in zip(chosen, questions, drawn, greedy, strict=True)
        ]

    def text(self, sample) -> str:
        """An answer as its reader gets it."""
        return self.loop.decode(sample.ids).strip()

    def assign(self, groups: list[list[Rollout]]) -> list[list[Rollout]]:
        """Rewards, from one call, and what was said."""
        whole = [each for each in chain(*groups) if each.finish == "stop"]
        references = [each.greedy for each in whole] if self.settings.reward == "pairwise" else None
        asked = [each.question for each in whole], [each.response for each in whole], references
        values = list(self.reward(*asked)) if whole else []
        if len(values) != len(whole) or not all(map(math.isfinite, values)):
            raise InputError(f"reward: gave {values!r:.60}; expected {len(whole)} finite numbers")
        for each, value in zip(whole, values, strict=True):
            each.reward = float(value)
        written = by_response(getattr(self.reward, "log", []) if whole else [])
        for group in groups:
            lowest = min((each.reward for each in group if each.finish == "stop"), default=0.0)
            for each in group:
                each.reward = each.reward if each.finish == "stop" else lowest
                each.judged = written.pop((each.question, each.response), [])
        return groups

    def counts(self) -> dict[str, int]:
        judged = [row for each in self.batch for row in each.judged]
        return {
            "failed": self.settings.batch_size - len(self.batch),
            "cut": sum(each.finish == "length" for each in self.batch),
            "comparisons": len(judged),
            "no verdict": sum(not row["read"] for row in judged),
        }

    def check(self, step: int) -> None:
        if not self.batch:
            raise InputError(f"step {step}: no rollout had finite logits; lower lr, in a new run")
        counts = self.counts()
        asked, lost = counts["comparisons"], counts["no verdict"]
        if lost > self.settings.max_abstained * asked:
            raise InputError(
                f"step {step}: {lost} of {asked} comparisons have no verdict, more than max_abstained "
                f"{self.settings.max_abstained:g}; look at {self.path}, and begin anew with another --judge"
            )

    def figures(self) -> dict[str, Any]:
        """What metrics.jsonl says of a step beside its loss, over all ranks."""
        kl, clipped, tokens = self.ranks.all_reduce_sum(*self.objective.seen)
        self.objective.seen = [0.0, 0, 0]
        mean = fmean(each.reward for each in self.batch)
        return {"reward": mean, "kl": kl / tokens, "clipped": clipped / tokens, **self.counts()}


def by_response(log: Log) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What was judged of each response that stood first in a comparison, as its rollout's row says it."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for pair, found in log:
        read = isinstance(found, Judgment) and not nothing_read(found.votes)
        row = {"against": pair.response_b, "p": preference(found), "read": read}
        if isinstance(found, InputError):
            row["error"] = str(found)
        else:
            row["written"] = found.rationale or "" if row["read"] else found.details[0].text
        rows.setdefault((pair.question, pair.response_a), []).append(row)
    return rows


# ---------------------------------------------------------------------------------- a run


def train(
    settings: PolicySettings,
    data: Sequence[Path],
    model_dir: Path,
    out: Path,
    reward: Reward,
    judge_dir: Path | None = None,
) -> dict[str, Any]:
    """Optimises the policy in `model_dir` whole, or goes on with it, or finds it done, as fit.train does.

    `judge_dir` is where the reward's model stands, if it has one: a run with another model is another run.
    """
    data, model_dir, out = [Path(path) for path in data], Path(model_dir), Path(out)
    with parallel.join_ranks(settings) as ranks, fit.stop_on_signals() as stop, ranks.only_writer(out):
        tokenizer = Tokenizer.load(model_dir, date=settings.date)
        config = read_model_config("policy", "vocabulary", settings, model_dir, tokenizer)
        files = [*data, *(model_files(Path(judge_dir)) if judge_dir else ())]
        now = ranks.on_rank_0(lambda: fit.identity("policy", settings, files, model_dir))
        if (figures := ranks.on_rank_0(lambda: fit.finished(out, now))) is not None:
            return figures
        prompts, too_long = read_prompts(data, tokenizer, settings)
        plan, steps = make_plan(settings, len(prompts))
        fit.open_run(out, now, ranks)
        if ranks.is_first:
            how = f"{settings.reward} reward from {judge_dir or reward}"
            size = f"{plan.batch_size} x {settings.group} rollouts, {settings.inner} steps on each batch"
            shown = f"{len(prompts):,} prompts ({too_long:,} more are too long), {size}"
            fit.say([f"policy   {model_dir}, {how}", f"steps    {steps:,}: {shown}"])
        dtype = parallel.compute_dtype(settings, ranks.device)
        actor, reference = (load_model(model_dir, ranks.device, dtype) for _ in range(2))
        actor.stop_ids = tokenizer.stop_ids
        objective = PolicyGradient(reference, settings.clip_ratio, settings.kl)
        trainee = fit.make_trainee(objective, settings, config, model_dir, ranks)
        loop = fit.Loop(trainee, settings, ranks, out, steps, tokenizer.decode)
        rollouts = Rollouts(settings, prompts, plan, loop, actor, reward, objective)
        loop.extra_figures = rollouts.figures
        loop.restore()
        # The other ranks read what is left.
        ranks.on_rank_0(lambda: fit.keep_metrics(rollouts.path, loop.cursor.step))
        loop.run(rollouts.global_batches(loop.cursor.step), stop, "policy")
        figures = asdict(loop.cursor)
        fit.publish_model(loop, tokenizer, model_dir, {"run": now, "figures": figures}, {})
        return figures


def make_plan(settings: PolicySettings, prompts: int) -> tuple[Plan, int]:
    """Which prompts each batch takes, and how many optimizer steps there are."""
    each, rows = settings.batch_size // settings.group, np.arange(prompts)
    steps = settings.steps or math.ceil(settings.epochs * prompts / each) * settings.inner
    return Plan(rows, rows, rows, {}, each, math.ceil(steps / settings.inner) * each, settings.seed), steps
