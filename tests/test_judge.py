"""Judging: votes together, calibrations, scores, rewards. Planted judges answer by rule."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from oracles import naive_logits
from planted import TEMPLATE, pair, planted

from gramr2 import prompts
from gramr2.extras.formats import FORMATS
from gramr2.files import InputError
from gramr2.judge import RewardModel
from gramr2.settings import PAIRS_PER_CALL
from gramr2.votes import SCALAR, THINK

# ---------------------------------------------------------------------------------- votes and orders


def test_an_always_first_judge_has_no_preference(monkeypatch):
    """One order alone would call it certain."""
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9)
    judgment = judge.judge("q", "x", "y", votes=8)
    assert (
        judgment.p_a == 0.5
        and judgment.orders_agree is False
        and judgment.votes == {"A": 4, "B": 4, "none": 0}
    )
    assert judge.judge("q", "x", "y", votes=1).label == "A"


def test_voting_gains_what_the_binomial_says(monkeypatch):
    """Votes that were one vote, or orders that were not turned back, would not."""
    right = 0.7
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if (a == "good") == (draw < right) else 0.1)
    pairs = [pair(f"q{i}", *(("good", "bad") if i % 2 else ("bad", "good"))) for i in range(1000)]
    hits = {1: 0, 16: 0}
    for votes in hits:
        for each, judgment in judge.judge_many(pairs, votes=votes, seed=3):
            hits[votes] += judgment.label == ("A" if each.response_a == "good" else "B")
    binomial = [math.comb(16, k) * right**k * (1 - right) ** (16 - k) for k in range(17)]
    low, high = sum(binomial[9:]), sum(binomial[8:])  # a tie is decided by the last bit
    assert abs(hits[1] / 1000 - right) < 0.045
    assert low - 0.025 < hits[16] / 1000 < high + 0.025


def test_the_comparisons_of_a_policy_step_are_one_batch_for_the_sampler(monkeypatch):
    """Cut into calls, a step would wait for each call's longest answer; a file of pairs is cut."""
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if a == "good" else 0.1)
    count = PAIRS_PER_CALL + 6
    assert len(judge.reward(["q"] * count, ["good"] * count, ["bad"] * count)) == count
    assert len(judge.calls) == 1 and judge.calls[0] >= count
    judge.calls.clear()
    list(judge.judge_many([pair("q", "good", "bad")] * count, votes=2))
    assert len(judge.calls) == 2


def test_a_calibration_maps_p_for_its_number_of_votes_and_leaves_one_half(monkeypatch):
    judge = planted(monkeypatch, lambda question, a, b, draw: {"good": 0.9, "bad": 0.1}.get(a, 0.8))
    judge.calibration = {"votes": 4, "greedy": False, "drawn": (1.0, 1.0, 0)}
    judge.calibration |= {"p": [0.1, 0.9], "calibrated": [0.3, 0.7]}
    judge.calibration["judge"] = f"{judge.weights} {judge.prompt_hash}"
    assert judge.judge("q", "good", "bad", votes=4).p_a == pytest.approx(0.7)
    assert judge.judge("q", "bad", "good", votes=4).p_a == pytest.approx(0.3)
    assert judge.judge("q", "good", "bad", votes=2).p_a == pytest.approx(0.9)
    assert not judge.calibrates(4, 0.7) and not judge.calibrates(4, 1.0, top_p=0.8)  # drawn in another way
    judge.calibration["calibrated"] = [0.31, 0.71]  # not symmetric: would move one half
    assert judge.judge("q", "x", "y", votes=4).p_a == 0.5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("judge") / "model", "llama3", max_positions=2000)


@pytest.fixture(scope="module")
def scalar(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("judge") / "scalar", "llama3", num_labels=1, tie_embeddings=False
    )


PAIRS = [pair(f"Which is more, {i} or {i + 1}?", f"It is {i}.", "It is" + " more" * i) for i in range(5)]


def test_gram_is_the_softmax_at_the_first_token_of_both_orders(directory, tmp_path):
    template = tmp_path / "prompt.txt"
    template.write_text(TEMPLATE)
    judge = RewardModel.load(directory, prompt=template, format=FORMATS["label"])
    expected = []
    for shown, sign in ((PAIRS[2], 1), (PAIRS[2].swapped(), -1)):
        content = prompts.judge_prompt(shown, TEMPLATE)
        logits = naive_logits(judge.model, judge.tokenizer.chat([{"role": "user", "content": content}]))
        p = torch.softmax(logits[[judge.tokenizer.encode(letter)[0] for letter in "AB"]], 0)[0]
        expected.append(float(p if sign > 0 else 1 - p))
    ((_, judgment),) = judge.judge_many([PAIRS[2]], votes=1, progress=False)
    assert [vote.p_a for vote in judgment.details] == pytest.approx(expected, abs=1e-5)
    assert judgment.abstained == 0


class _Headed(SimpleNamespace):
    """A decoder with the head that the oracle is to read."""

    def __init__(self, model, head):
        super().__init__(model=model, head_weight=head)

    def __call__(self, *arguments):
        return self.model(*arguments)


def test_a_scoring_model_judges_by_its_two_scores(directory, scalar):
    """Skywork's kind has a scalar head at the last token; Nemotron's reads the logit of id 0 there."""
    nemotron, skywork = RewardModel.load(directory, format=FORMATS["logit"]), RewardModel.load(scalar)
    for judge in (nemotron, skywork):
        turns = [{"role": "user", "content": PAIRS[3].question}]
        expected = []
        for response in (PAIRS[3].response_a, PAIRS[3].response_b):
            ids = judge.tokenizer.chat([*turns, {"role": "assistant", "content": response}], False)
            head = SimpleNamespace(T=(judge.model.score if judge is skywork else judge.model.embed).weight.T)
            expected.append(float(naive_logits(_Headed(judge.model, head), ids)[0]))
        ((_, judgment),) = judge.judge_many([PAIRS[3]], votes=16, progress=False)
        a, b = expected
        assert judgment.p_a == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-5)
        assert judgment.label == ("A" if a > b else "B")


def test_a_format_that_the_checkpoint_cannot_be_read_as(directory, scalar):
    for wrong, format in ((directory, SCALAR), (scalar, THINK)):
        with pytest.raises(InputError, match="scalar head"):
            RewardModel.load(wrong, format=format)


@pytest.mark.parametrize("kind", ["think", "scalar"])
def test_one_pair_alone_and_among_others_is_the_same_to_the_bit(kind, directory, scalar, capsys):
    """Level 1: neither the batch nor its order shows in a verdict or a probability."""
    judge = RewardModel.load(directory if kind == "think" else scalar)
    options = dict(votes=4, seed=5, max_new_tokens=12, progress=False)
    together = {each.id: judgment for each, judgment in judge.judge_many(PAIRS[::-1], **options)}
    for each in PAIRS:
        ((_, alone),) = judge.judge_many([each], **options)
        assert alone == together[each.id]
    assert ("warning" in capsys.readouterr().err) == (kind == "think")  # that the prompt is ours


# ---------------------------------------------------------------------------------- rewards


def test_a_reward_against_references_is_the_mean_over_both_orders(monkeypatch):
    """Also where the orders disagree, which a judgment reads as one half."""
    shown = {("good", "ref"): 0.9, ("ref", "good"): 0.2, ("odd", "ref"): 0.9, ("ref", "odd"): 0.7}
    judge = planted(monkeypatch, lambda question, a, b, draw: shown[a, b])
    log = []
    rewards = judge.reward(["q", "q", "r"], ["good", "odd", "ref"], ["ref"] * 3, log=log)
    assert rewards == pytest.approx([(0.9 + 0.8) / 2, (0.9 + 0.3) / 2, 0.5])
    assert len(judge.calls) == 1 and [judgment.p_a for _, judgment in log][1:] == [0.5, 0.5]


def test_a_reward_within_the_group_is_the_share_won(monkeypatch):
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if a > b else 0.1)
    rewards = judge.reward(["q", "q", "r", "q", "q"], ["2", "3", "9", "1", "2"])
    assert rewards == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.5])  # alone: one half; equal texts: half each
    with pytest.raises(InputError, match="as many"):
        judge.reward(["q"], ["a", "b"])


def test_a_scoring_models_reward_is_its_score(scalar):
    judge = RewardModel.load(scalar)
    rewards = judge.reward([each.question for each in PAIRS], [each.response_a for each in PAIRS])
    for each, reward in zip(PAIRS, rewards, strict=True):
        ids = judge.tokenizer.example(each.messages, each.response_a)[0]
        assert judge.scores([ids]) == [reward]
    assert np.isfinite(rewards).all() and len(set(rewards)) == len(rewards)
