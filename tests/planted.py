"""Planted judges: reward models whose answers are made by rule, so that the truth is known."""

import math
import random
import re
from types import SimpleNamespace

import torch
from checkpoints import tokenizer_files

import gramr2.votes
from gramr2.judge import RewardModel
from gramr2.records import Judgment, Pair
from gramr2.sampler import Sample
from gramr2.tokenizer import Tokenizer
from gramr2.votes import THINK, Format

TEMPLATE = "<<{question}|{response_a}|{response_b}>>"
TOKENIZER = Tokenizer(tokenizer_files("llama3"), "test", date="2026-01-31")
NO_MODEL = SimpleNamespace(
    config=SimpleNamespace(max_positions=10_000, num_labels=0), head_weight=torch.empty(0)
)


def planted(monkeypatch, rule, format: Format = THINK, endings=None, model=NO_MODEL) -> RewardModel:
    """A RewardModel whose sampler answers by `rule(question, a, b, draw) -> p of the first one shown`.

    `draw` is a uniform number from the sample's own seed. The letter is the likelier one; `endings` says how
    the two verdicts are written, where that is not the canonical way. `calls` has each call's prompts.
    """
    judge = RewardModel(model, TOKENIZER, TEMPLATE, format)
    judge.calls = []

    def answer(ids, seed, key, number):
        shown = re.search(r"<<(.*)\|(.*)\|(.*)>>", TOKENIZER.decode(ids), re.DOTALL).groups()
        p = rule(*shown, random.Random(f"{seed} {key} {number}").random())
        verdict = (endings or format.endings)[p <= 0.5]
        written = TOKENIZER.encode(f"<think>\nFor a reason.\n</think>\n{verdict}")
        watched = [[math.log(p), math.log(1 - p)]] * len(written)
        return Sample(written, [0.0] * len(written), watched, "stop")

    def generate(model, prompts, *, n, seed, keys, **options):
        judge.calls.append(len(prompts))
        asked = zip(prompts, keys, strict=True)
        return [[answer(ids, seed, key, number) for number in range(n)] for ids, key in asked]

    monkeypatch.setattr(gramr2.votes, "generate", generate)
    return judge


def answering(better) -> RewardModel:
    """A RewardModel with planted comparisons, `better(a, b) -> p of a`; `asked` has the batches."""
    judge = RewardModel(NO_MODEL, TOKENIZER, TEMPLATE)
    judge.asked = []

    def judge_many(pairs, votes=4, seed=0, **options):
        pairs = list(pairs)
        judge.asked += [[(pair.response_a, pair.response_b) for pair in pairs]] if pairs else []
        for pair in pairs:
            p = better(pair.response_a, pair.response_b)
            label = None if p == 0.5 else "A" if p > 0.5 else "B"
            yield pair, Judgment(label, p, {"A": 0, "B": 0, "none": 0})

    judge.judge_many = judge_many
    return judge


def pair(question, a, b, **fields) -> Pair:
    return Pair((("user", question),), a, b, **fields)
