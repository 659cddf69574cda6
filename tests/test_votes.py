"""Votes: every one asked in its own order and with its own noise, whatever is asked beside it."""

import re
from types import SimpleNamespace

import pytest
import torch
from planted import TOKENIZER, pair, planted

from gramr2.files import InputError

SMALL = SimpleNamespace(config=SimpleNamespace(max_positions=200, num_labels=0), head_weight=torch.empty(0))


def test_every_vote_has_a_seed_of_its_own_and_the_same_one_again(monkeypatch):
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if draw < 0.5 else 0.1)
    first, again, other = (judge.judge("q", "x", "y", votes=16, seed=seed) for seed in (0, 0, 1))
    seeds = {vote.seed for vote in first.details}
    assert len(seeds) == 16 and first == again and not seeds & {vote.seed for vote in other.details}
    assert all(vote.tokens == len(TOKENIZER.encode(vote.text)) for vote in first.details)


def test_a_pair_and_its_exchange_in_one_call_keep_their_own_order(monkeypatch):
    """They share an id; a ballot kept by id would give one of them the other's label."""
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if a == "good" else 0.1)
    pairs = [pair("q", "good", "bad"), pair("q", "bad", "good"), pair("q", "good", "bad")]
    judged = [judgment for _, judgment in judge.judge_many(pairs, votes=2)]
    assert [each.label for each in judged] == ["A", "B", "A"] and all(each.orders_agree for each in judged)
    assert [sum(each.votes.values()) for each in judged] == [2, 2, 2]


def test_identical_responses_and_an_empty_one(monkeypatch):
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if a else 0.2)
    same = judge.judge("q", "x", "x")
    assert (same.label, same.p_a, sum(same.votes.values())) == (None, 0.5, 0) and judge.calls == [0]
    assert judge.judge("q", "", "x", votes=2).label == "B"


def test_a_pair_that_is_too_long_is_refused_with_both_numbers_and_the_others_judged(monkeypatch):
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if a == "good" else 0.1, model=SMALL)
    long = pair("q", "good", "word " * 300)
    (_, refused), (_, judged) = judge.judge_many([long, pair("q", "good", "bad")], votes=2)
    assert isinstance(refused, InputError) and judged.label == "A"
    assert re.search(rf"{long.id}: \d{{3,}} tokens .* 200 positions", str(refused))
    with pytest.raises(InputError, match="200 positions"):
        judge.judge("q", "good", "word " * 300)
    with pytest.raises(InputError, match="votes: 3"):
        judge.judge("q", "a", "b", votes=3)
