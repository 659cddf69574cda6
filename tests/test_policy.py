"""The policy stage: what moves it and what does not, resume, and bad input."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from trainings import same_bits, weights_of, write_rows

from gramr2 import fit, parallel
from gramr2.commands import train
from gramr2.extras import policy, policy_start
from gramr2.extras.policy_settings import PolicySettings
from gramr2.files import InputError, exit_status, write_json
from gramr2.judge import RewardModel
from gramr2.records import Judgment, Vote, nothing_read
from gramr2.settings import TrainSettings
from gramr2.votes import SCALAR, THINK
from gramr2.weights import load

ROOT = Path(__file__).parents[1]
CONFIG = {"batch_size": 8, "group": 4, "inner": 2, "steps": 4, "max_length": 256, "max_new_tokens": 40}
CONFIG |= {"lr": 3e-3, "device": "cpu", "save_minutes": 0.0, "judge_tokens": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(a policy that has learned to end, a file of prompts)."""
    place = tmp_path_factory.mktemp("world")
    asked = [{"question": f"What is {n} + {n}?"} for n in range(5)]
    asked += [{"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."},
                            {"role": "user", "content": "Again."}]}]  # fmt: skip
    said = [{"question": f"What is {n} + {n}?", "response": "it is " * k} for n in range(8) for k in range(4)]
    random = make_checkpoint(place / "random", max_positions=1024)
    config = TrainSettings(batch_size=16, steps=60, lr=1e-2, device="cpu")
    fit.train("pretrain", config, [write_rows(place / "said.jsonl", said)], random, place / "start")
    return place / "start/model", write_rows(place / "prompts.jsonl", asked)


def run(world, out: Path, function, **config):
    settings = PolicySettings(**CONFIG | config)
    return policy.train(settings, [world[1]], world[0], out, function)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def constant(prompts, completions, references=None) -> list[float]:
    return [0.3] * len(prompts)


def short(prompts, completions, references=None) -> list[float]:
    """Rewards few characters."""
    return [-float(len(each)) for each in completions]


# ---------------------------------------------------------------------------------- what a run does


groups = st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=8), min_size=1, max_size=6)


@given(groups)
@settings(max_examples=80, deadline=None)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(rewards):
    """A sum that is not 0 rewards or punishes whatever was drawn; equal rewards are no advantage at all."""
    for group, found in zip(rewards, policy.advantages(rewards), strict=True):
        assert math.fsum(found) == pytest.approx(0, abs=1e-6)
        order = sorted(range(len(group)), key=group.__getitem__)
        assert all(found[i] <= found[j] for i, j in itertools.pairwise(order))
    equal = [[group[0]] * 3 for group in rewards]
    assert policy.advantages(equal) == [[0.0] * 3] * len(equal)
    assert policy.advantages([[1.0, 0.0], [0.3, 0.3]]) == [pytest.approx([2**0.5, -(2**0.5)]), [0.0, 0.0]]


def test_a_reward_that_says_nothing_moves_nothing(world, tmp_path):
    """Level 1. At the start the divergence and its gradient are exactly 0, in whatever packs."""
    run(world, tmp_path / "out", constant, token_budget=256)
    before = load(world[0])[0].state_dict()
    after = load(tmp_path / "out/model")[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    metrics = rows_of(tmp_path / "out/metrics.jsonl")
    assert [row["kl"] for row in metrics] == [0.0] * 4 and {row["reward"] for row in metrics} == {0.3}


def test_a_reward_is_learned_and_a_heavy_pull_holds_the_policy_back(world, tmp_path):
    """A sign or a shift wrong between the sampler and the loss learns the opposite, or nothing."""
    options = {"steps": 16, "batch_size": 32, "group": 8, "lr": 5e-3, "kl": 0.0}
    run(world, tmp_path / "free", short, **options)
    run(world, tmp_path / "held", short, **options | {"kl": 10.0})
    free, held = (rows_of(tmp_path / f"{name}/metrics.jsonl") for name in ("free", "held"))
    assert free[0]["kl"] == held[0]["kl"] == 0.0
    assert free[-1]["reward"] > free[0]["reward"] + 4
    assert 0 < held[-1]["kl"] < 0.5 * free[-1]["kl"]


def test_targets_are_the_rollout_and_its_stop_token_and_nothing_else(world, tmp_path):
    """A prompt that is a target trains the asking; what stands behind the stop was never drawn."""
    run(world, tmp_path / "out", short, steps=1, inner=1, max_new_tokens=6)
    tokenizer = load(world[0])[1]
    prompts, _ = policy.read_prompts([world[1]], tokenizer, PolicySettings(**CONFIG))
    assert prompts[5].question == "User: Say it.\n\nAssistant: It.\n\nUser: Again."
    rows = rows_of(tmp_path / "out/rollouts.jsonl")
    stopped = 0
    for row in rows:
        rollout = policy.Rollout(**row)
        made = policy.Rollouts.example(SimpleNamespace(prompts=prompts), rollout)
        (example,) = made.sequences
        assert list(example.ids[: example.start]) == prompts[row["prompt"]].ids
        assert list(example.ids[example.start :]) == row["ids"] and len(made.old_logprobs) == len(row["ids"])
        ends = [i for i, token in enumerate(row["ids"]) if token in tokenizer.stop_ids]
        assert ends == ([len(row["ids"]) - 1] if row["finish"] == "stop" else [])
        stopped += bool(ends)
    metrics = rows_of(tmp_path / "out/metrics.jsonl")[0]
    assert metrics["targets"] == sum(len(row["ids"]) for row in rows) and stopped > 0
    assert metrics["cut"] == len(rows) - stopped


class Cut:
    """A reward that at its n-th call ends the work as a kill would, or asks for a stop as SIGTERM does."""

    def __init__(self, at: int, killed: bool):
        self.calls, self.at, self.killed = 0, at, killed

    def __call__(self, prompts, completions, references=None):
        self.calls += 1
        if self.calls == self.at and self.killed:
            raise RuntimeError("cut")
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return short(prompts, completions)


@pytest.mark.parametrize("killed", [True, False])
def test_resumed_equals_uninterrupted(world, tmp_path, killed):
    """Level 1. Two steps share their rollouts; the stop, after step 5, stands between them."""
    options = {"steps": 9, "save_steps": 2 if killed else 0, "reward": "pairwise"}
    run(world, tmp_path / "whole", short, **options)
    with pytest.raises(RuntimeError if killed else fit.Stopped):
        run(world, tmp_path / "cut", Cut(4 if killed else 3, killed), **options)
    if not killed:
        assert [path.name for path in (tmp_path / "cut/resume").glob("step-*")] == ["step-00000005"]
    assert list((tmp_path / "cut/resume").glob("step-*"))
    run(world, tmp_path / "cut", short, **options)
    assert same_bits(tmp_path / "whole", tmp_path / "cut")
    assert rows_of(tmp_path / "whole/rollouts.jsonl") == rows_of(tmp_path / "cut/rollouts.jsonl")
    whole, cut = (rows_of(tmp_path / f"{name}/metrics.jsonl") for name in ("whole", "cut"))
    assert [row | {"seconds": 0} for row in whole] == [row | {"seconds": 0} for row in cut]
    assert len(cut) == 9 and whole[-1]["norm"] > 0
    with pytest.raises(InputError, match="differs in steps"):
        run(world, tmp_path / "cut", short, **options | {"steps": 10})


# ---------------------------------------------------------------------------------- rewards


class Verdicts:
    """Stands for a judge: says which it was asked, and prefers the longer."""

    format = THINK

    def __init__(self, silent: bool = False):
        self.silent, self.asked = silent, []

    def judge_many(self, pairs, votes, seed, **options):
        for pair in pairs:
            self.asked.append((pair.question, pair.response_a, pair.response_b))
            if pair.response_a == pair.response_b:
                yield pair, Judgment.from_votes([])
            elif self.silent:
                yield (
                    pair,
                    Judgment.from_votes(
                        [Vote(None, order, None, "no answer", "hm") for order in ("AB", "BA")]
                    ),
                )
            else:
                p = 0.9 if len(pair.response_a) > len(pair.response_b) else 0.2
                yield pair, Judgment("A" if p > 0.5 else "B", p, {"A": 2, "B": 0, "none": 0})

    reward = RewardModel.reward


ASKED = (["q", "q", "q", "r"], ["aa", "b", "aa", "ccc"])


def test_pairwise_is_the_probability_of_beating_the_reference():
    """Equal rollouts are judged once, and one that equals the reference counts one half."""
    judge = Verdicts()
    reward = policy.Judged(judge, PolicySettings(**CONFIG))
    assert reward(*ASKED, ["b", "b", "b", "dddd"]) == [0.9, 0.5, 0.9, 0.2]
    assert judge.asked == [("q", "aa", "b"), ("q", "b", "b"), ("r", "ccc", "dddd")]


def test_tournament_is_the_share_won_among_the_rollouts_of_a_prompt():
    """Equal rollouts are one contestant; a lone one has won one half."""
    judge = Verdicts()
    reward = policy.Judged(judge, PolicySettings(**CONFIG | {"reward": "tournament"}))
    assert reward(*ASKED) == [1.0, 0.0, 1.0, 0.5]
    assert judge.asked == [("q", "aa", "b")]


def test_a_source_that_does_not_suit_its_judge_is_refused():
    for kind, format in (("scalar", THINK), ("tournament", SCALAR), ("pairwise", SCALAR)):
        with pytest.raises(InputError, match=f"reward: {kind} cannot come from"):
            policy.Judged(SimpleNamespace(format=format), PolicySettings(**CONFIG | {"reward": kind}))


def stream(tmp_path, reward, **config) -> policy.Rollouts:
    loop = SimpleNamespace(out=tmp_path, ranks=parallel.Ranks(0, 1, torch.device("cpu")))
    return policy.Rollouts(PolicySettings(**CONFIG | config), [], None, loop, None, reward, None)


def rollout(response: str, finish: str = "stop", question: str = "q") -> policy.Rollout:
    return policy.Rollout(1, 0, question, response, finish, [5, 7], [-1.0, -2.0], greedy="greedy")


def test_an_empty_rollout_is_judged_and_a_cut_one_takes_its_groups_lowest(tmp_path):
    """Cut answers are no matter for the judge; a group of nothing else has no preference."""
    groups = [[rollout("abc"), rollout(""), rollout("a" * 50, "length")], [rollout("x", "length", "r")] * 2]
    judge = Verdicts()
    made = stream(tmp_path, policy.Judged(judge, PolicySettings(**CONFIG)))
    made.assign(groups)
    assert judge.asked == [("q", "abc", "greedy"), ("q", "", "greedy")]
    assert [each.reward for each in groups[0]] == [0.2, 0.2, 0.2]
    made.batch = [each for group in groups for each in group]
    assert made.counts() == {"failed": 3, "cut": 3, "comparisons": 2, "no verdict": 0}
    (said,) = groups[0][0].judged
    assert said["against"] == "greedy" and said["p"] == 0.2
    groups = [[rollout("a" * 9), rollout("b"), rollout("c" * 50, "length")]]
    made.assign(groups)
    assert [each.reward for each in groups[0]] == [0.9, 0.2, 0.2]


def test_a_judge_that_says_nothing_counts_one_half_and_stops_the_run(world, tmp_path):
    """Past the share the run ends in one line, with what was written on disk; allowed, it moves nothing."""
    silent = policy.Judged(Verdicts(silent=True), PolicySettings(**CONFIG))
    with pytest.raises(InputError, match=r"step 1: \d+ of \d+ comparisons have no verdict, more than max_ab"):
        run(world, tmp_path / "out", silent, max_abstained=0.2)
    rows = rows_of(tmp_path / "out/rollouts.jsonl")
    assert {row["reward"] for row in rows if row["finish"] == "stop"} <= {0.5}
    run(world, tmp_path / "all", silent, max_abstained=1.0)
    before, after = load(world[0])[0].state_dict(), load(tmp_path / "all/model")[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_equals_are_no_abstentions():
    """Late in training most rollouts equal the greedy answer: that must not stop the run."""
    assert not nothing_read(Judgment.from_votes([]).votes)
    votes = [Vote("A", "AB", 0.9), Vote(None, "BA", None)]
    read = [nothing_read(Judgment.from_votes(each).votes) for each in (votes, votes[1:])]
    assert read == [False, True]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"group": 1, "batch_size": 8}, "group: expected a whole number from 2"),
        ({"batch_size": 10}, "batch_size: 10 is not whole groups of 4"),
        ({"votes": 3}, "votes: 3 must be even"),
        ({"reward": "guess"}, "reward: expected one of pairwise"),
        ({"lr": math.inf}, "lr: expected a number above 0, got inf"),
        ({"beta1": 1.0}, "beta1: expected a number from 0 below 1"),
        ({"max_abstained": 1.5}, "max_abstained: expected a number from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(config, message):
    with pytest.raises(InputError, match=message):
        PolicySettings(**CONFIG | config)


@pytest.mark.parametrize(
    "reward, message",
    [(lambda *a: [1.0], "gave .1.0.; expected"), (lambda p, c, r: [math.nan] * len(p), "finite numbers")],
)
def test_a_reward_that_is_no_number_for_each_is_refused(world, tmp_path, reward, message):
    with pytest.raises(InputError, match=message):
        run(world, tmp_path / "out", reward)


def test_prompts_that_cannot_be_used_are_said_before_anything_is_trained(world, tmp_path):
    for rows, message in (
        ([{"x": 1}], 'row 1: no field "question"'),
        ([{"question": "q " * 500}], "no prompt of 216"),
    ):
        data = write_rows(tmp_path / "bad.jsonl", rows)
        with pytest.raises(InputError, match=rf"bad\.jsonl.*{message}"):
            run((world[0], data), tmp_path / "out", short)
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- ranks, and the command


def words(recipe: Path, world, judge: Path, out: Path) -> list[str]:
    given = {"recipe": recipe, "model": world[0], "data": world[1], "judge": judge, "out": out}
    flags = ((f"--{name}", str(value)) for name, value in given.items())
    return ["--stage", "policy", *itertools.chain(*flags)]


def test_the_command_on_two_ranks_draws_the_same_and_trains_alike(world, tmp_path):
    """Level 1 for a batch's rollouts and rewards, level 2 for the two steps that it serves."""
    options = CONFIG | {"steps": 2, "batch_size": 12, "lr": 1e-4, "reward": "scalar"}  # prompts: 2 and 1
    recipe, judge = tmp_path / "r.toml", make_checkpoint(tmp_path / "judge", "qwen3", 4, num_labels=1)
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
    recipe.write_text(f"[train.policy]\n{settings}\n")
    reward = policy.Judged(RewardModel.load(judge), PolicySettings(**options))
    run(world, tmp_path / "one", reward, **options)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(ROOT / "train.py"), *words(recipe, world, judge, tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout == f"model: {tmp_path / 'two/model'}\n", said.stderr
    assert "# A policy\n" in (tmp_path / "two/model/README.md").read_text(encoding="utf-8")
    one, two = (rows_of(tmp_path / f"{name}/rollouts.jsonl") for name in ("one", "two"))
    assert one == two and len({row["reward"] for row in one}) > 3
    one, two = (rows_of(tmp_path / f"{name}/metrics.jsonl") for name in ("one", "two"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-4)
    assert two[0]["kl"] == 0.0 and two[1]["kl"] == pytest.approx(one[1]["kl"], rel=1e-3)
    weights = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]) < 2e-4


def test_the_world_is_that_of_the_named_judges_run(tmp_path, monkeypatch):
    """An older run's judge was asked about the newest run's prices, of which it knows none."""
    monkeypatch.chdir(tmp_path)
    for age, name in (10, "old"), (0, "new"):
        place = tmp_path / "runs" / name
        write_json(place / "steps/01-world/world.json", {"test": 4})
        write_json(place / "results.json", {})
        os.utime(place / "results.json", (1e9 - age, 1e9 - age))
    old = tmp_path / "runs/old"
    assert policy_start.run_of({"test": 4}).name == "new"
    assert policy_start.run_of({"test": 4}, Path("runs/old/steps/28-fine-tune/model")) == old
    assert policy_start.run_of({"test": 5}, Path("runs/old/steps/28-fine-tune/model")) is None


def test_the_command_says_in_one_line_what_does_not_fit(world, tmp_path, capsys):
    """On the command line as in Python: exit status 2, and nothing is left that looks like a run."""
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train.policy]\nmax_new_tokens = 8\n")
    for flag, value, reason in [
        ("--reward", "scalar", "scalar cannot come from a judge that writes verdicts"),
        ("--data", "nowhere.jsonl", "nowhere.jsonl: No such file"),
    ]:
        line = [*words(recipe, world, world[0], tmp_path / "out"), flag, value]
        assert exit_status(train.main, line) == 2 and not (tmp_path / "out").exists()
        said = capsys.readouterr()
        errors = [each for each in said.err.splitlines() if each.startswith("error: ")]
        assert len(errors) == 1 and reason in errors[0]
        assert said.out == ""
