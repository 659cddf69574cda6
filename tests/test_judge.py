"""Judging: votes, orders, formats, rankings, rewards. Planted judges answer by rule, so truth is known."""

import dataclasses
import itertools
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, random_model, tokenizer_files
from oracles import naive_logits

import gramr2.judge
from gramr2 import prompts
from gramr2.files import InputError
from gramr2.judge import FORMATS, RewardModel
from gramr2.records import Judgment, Pair
from gramr2.sampler import Sample
from gramr2.tokenizer import Tokenizer

TEMPLATE = "<<{question}|{response_a}|{response_b}>>"
TOKENIZER = Tokenizer(tokenizer_files("llama3"), "test", date="2026-01-31")


def planted(monkeypatch, rule, format="think", ending=None, positions=10_000):
    """A RewardModel whose sampler answers by `rule(question, a, b, draw) -> p of the first one shown`.

    `draw` is a uniform number from the sample's own seed. The letter is the likelier one.
    """
    judge = RewardModel(
        SimpleNamespace(config=SimpleNamespace(max_positions=positions, num_labels=0)),
        TOKENIZER,
        TEMPLATE,
        format,
    )
    judge.calls = []

    def generate(model, ids, *, n, seed, keys, watch, max_new_tokens, **options):
        judge.calls.append(len(ids))
        return [
            [answer(one, seed, key, number) for number in range(n)]
            for one, key in zip(ids, keys, strict=True)
        ]

    def answer(ids, seed, key, number):
        shown = re.search(r"<<(.*)\|(.*)\|(.*)>>", TOKENIZER.decode(ids), re.DOTALL).groups()
        p = rule(*shown, random.Random(f"{seed} {key} {number}").random())
        verdict = (ending or FORMATS[format].endings)[p <= 0.5]
        written = TOKENIZER.encode(f"<think>\nFor a reason.\n</think>\n{verdict}")
        watched = [[math.log(p), math.log(1 - p)]] * len(written)
        return Sample(written, [0.0] * len(written), watched, "stop")

    monkeypatch.setattr(gramr2.judge, "generate", generate)
    return judge


def answering(monkeypatch, better):
    """A RewardModel with planted comparisons, `better(a, b) -> p of a`; `asked` has the batches."""
    judge = planted(monkeypatch, None)
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


def test_every_vote_has_a_seed_of_its_own_and_the_same_one_again(monkeypatch):
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if draw < 0.5 else 0.1)
    first, again, other = (judge.judge("q", "x", "y", votes=16, seed=seed) for seed in (0, 0, 1))
    seeds = {vote.seed for vote in first.details}
    assert len(seeds) == 16 and first == again and not seeds & {vote.seed for vote in other.details}
    assert all(vote.tokens == len(TOKENIZER.encode(vote.text)) for vote in first.details)


def test_a_pair_and_its_exchange_in_one_shard_keep_their_own_order(monkeypatch):
    """They share an id; a ballot kept by id would give one of them the other's label."""
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if a == "good" else 0.1)
    pairs = [pair("q", "good", "bad"), pair("q", "bad", "good"), pair("q", "good", "bad")]
    judged = [judgment for _, judgment in judge.judge_many(pairs, votes=2)]
    assert [each.label for each in judged] == ["A", "B", "A"] and all(each.orders_agree for each in judged)
    assert [sum(each.votes.values()) for each in judged] == [2, 2, 2]


def test_the_comparisons_of_a_policy_step_are_one_batch_for_the_sampler(monkeypatch):
    """Cut into shards, a step would wait for each shard's longest answer; a file of pairs is cut."""
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if a == "good" else 0.1)
    count = gramr2.judge.PAIRS_PER_CALL + 6
    assert len(judge.reward(["q"] * count, ["good"] * count, ["bad"] * count)) == count
    assert len(judge.calls) == 1 and judge.calls[0] >= count
    judge.calls.clear()
    list(judge.judge_many([pair("q", "good", "bad")] * count, votes=2))
    assert len(judge.calls) == 2


def test_identical_responses_and_an_empty_one(monkeypatch):
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if a else 0.2)
    same = judge.judge("q", "x", "x")
    assert (same.label, same.p_a, sum(same.votes.values())) == (None, 0.5, 0) and judge.calls == [0]
    assert judge.judge("q", "", "x", votes=2).label == "B"


def test_a_pair_that_is_too_long_is_refused_with_both_numbers_and_the_others_judged(monkeypatch):
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.9 if a == "good" else 0.1, positions=200)
    long = pair("q", "good", "word " * 300)
    (_, refused), (_, judged) = judge.judge_many([long, pair("q", "good", "bad")], votes=2)
    assert isinstance(refused, InputError) and judged.label == "A"
    assert re.search(rf"{long.id}: \d{{3,}} tokens .* 200 positions", str(refused))
    with pytest.raises(InputError, match="200 positions"):
        judge.judge("q", "good", "word " * 300)
    with pytest.raises(InputError, match="votes: 3"):
        judge.judge("q", "a", "b", votes=3)


def test_a_calibration_maps_p_for_its_number_of_votes_and_leaves_one_half(monkeypatch):
    judge = planted(monkeypatch, lambda question, a, b, draw: {"good": 0.9, "bad": 0.1}.get(a, 0.8))
    judge.calibration = {"votes": 4, "greedy": False, "p": [0.1, 0.9], "calibrated": [0.3, 0.7]}
    assert judge.judge("q", "good", "bad", votes=4).p_a == pytest.approx(0.7)
    assert judge.judge("q", "bad", "good", votes=4).p_a == pytest.approx(0.3)
    assert judge.judge("q", "good", "bad", votes=2).p_a == pytest.approx(0.9)
    judge.calibration["calibrated"] = [0.31, 0.71]  # not symmetric: would move one half
    assert judge.judge("q", "x", "y", votes=4).p_a == 0.5


# ---------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("format", ["think", "brackets", "rm-r1", "boxed", "arena"])
def test_a_canonical_verdict_is_read_where_its_letter_stands(monkeypatch, format):
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.8 if a == "good" else 0.3, format)
    monkeypatch.setattr(gramr2.judge, "logprobs", None)  # nothing needs to be scored again
    judgment = judge.judge("q", "good", "bad", votes=2)
    assert judgment.label == "A" and judgment.p_a == pytest.approx((0.8 + 0.7) / 2) and judgment.orders_agree


OTHER_WAYS = [
    ("think", ("<answer>A</answer>", "<answer> B</answer>")),
    ("brackets", ("[[ A ]]", "[[ B ]]")),
    ("rm-r1", ("<answer> [[A]]</answer>", "<answer> [[B]]</answer>")),
    ("boxed", (r"\boxed{A}", r"\boxed{B}")),
    ("arena", ("[[A>>B]]", "[[B>>A]]")),
    ("arena", (r"\boxed{A>B}", r"\boxed{B>A}")),
]


@pytest.mark.parametrize("format, verdicts", OTHER_WAYS)
def test_a_verdict_written_otherwise_is_scored_by_its_canonical_ending(monkeypatch, format, verdicts):
    """p is then the model's own, at the letter, after what was written before the verdict."""
    model = random_model("llama3", max_positions=2000)
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.8, format, verdicts)
    judge.model = model
    judgment = judge.judge("q", "x", "y", votes=1)
    prompt = TOKENIZER.chat([{"role": "user", "content": "<<q|x|y>>"}])
    written = "<think>\nFor a reason.\n</think>\n"
    a, b = (TOKENIZER.encode(written + ending) for ending in FORMATS[format].endings)
    differ = next(i for i, (one, two) in enumerate(zip(a, b, strict=True)) if one != two)
    logits = naive_logits(model, prompt + a[:differ])
    expected = torch.softmax(logits[[a[differ], b[differ]]], 0)[0]
    assert judgment.votes["A"] == 1 and judgment.p_a == pytest.approx(float(expected), abs=1e-5)
    model.config = dataclasses.replace(model.config, max_positions=len(prompt) + differ)
    (cut,) = judge.judge("q", "x", "y", votes=1).details
    assert cut.label is None and "no room" in cut.reason  # and nothing is raised, which would stop a bulk run


EARLIER = [
    ("think", "<think>\nFirst <answer>\nA\n</answer>.\n</think>\n<answer>B</answer>"),
    ("brackets", "Not [[A]], but [[ B ]]"),
    ("boxed", r"Not \boxed{Assistant 1}, but \boxed{B}"),
    ("arena", "At first [[A>B]], then [[B>>A]]"),
]


@pytest.mark.parametrize("format, text", EARLIER)
def test_p_belongs_to_the_verdict_that_was_read(monkeypatch, format, text):
    """An earlier canonical letter, of which the judge was sure, would turn the judgment round."""
    judge = planted(monkeypatch, None, format)
    ids = TOKENIZER.encode(text)
    sample = Sample(ids, [0.0] * len(ids), [[0.0, -6.0]] * len(ids), "stop")
    monkeypatch.setattr(judge, "_softmax_after", lambda prompt, start: 0.01)
    vote = judge._read(SimpleNamespace(order="AB", ids=[1]), sample, 0)
    assert (vote.label, vote.p_a) == ("B", 0.01)


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
    judge = RewardModel.load(directory, prompt=template, format="label")
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
    nemotron, skywork = RewardModel.load(directory, format="logit"), RewardModel.load(scalar)
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
    for wrong, format in ((directory, "scalar"), (scalar, "think")):
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


# ---------------------------------------------------------------------------------- lists


def known_order(a: str, b: str) -> float:
    return 0.9 if int(a) > int(b) else 0.1


def merge_comparisons(items: list[int]) -> int:
    """A plain bottom-up merge sort's comparisons, counted."""
    runs, count = [[i] for i in items], 0
    while len(runs) > 1:
        merged = []
        for left, right in itertools.zip_longest(runs[::2], runs[1::2], fillvalue=[]):
            left, right, out = list(left), list(right), []
            while left and right:
                count += 1
                out.append((right if right[0] > left[0] else left).pop(0))
            merged.append(out + left + right)
        runs = merged
    return count


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_every_method_recovers_a_known_order_with_the_stated_comparisons(monkeypatch, n):
    for shuffle in range(4):
        quality = random.Random(shuffle).sample(range(n), n)
        responses, expected = [str(q) for q in quality], sorted(range(n), key=lambda i: -quality[i])
        for method in ("linear", "knockout", "merge", "selection"):
            judge = answering(monkeypatch, known_order)
            ranking = judge.rank("q", responses, method)
            asked = [frozenset(duel) for batch in judge.asked for duel in batch]
            assert ranking.order == expected and not ranking.overruled
            assert ranking.comparisons == len(asked) == len(set(asked)) and ranking.rounds == len(judge.asked)
            if method == "merge":
                sort = merge_comparisons(quality)
                assert sort <= ranking.comparisons <= sort + max(0, n - 2)
            assert ranking.comparisons <= n * (n - 1) // 2
        for method, rounds in (("linear", n - 1), ("knockout", math.ceil(math.log2(n)))):
            judge = answering(monkeypatch, known_order)
            best = judge.best_of("q", responses, method)
            assert best.best == expected[0] and best.comparisons == n - 1 and best.rounds == rounds


def test_the_incumbent_is_shown_as_b_and_its_challenger_as_a(monkeypatch):
    judge = answering(monkeypatch, lambda a, b: 0.5)
    assert judge.best_of("q", ["x", "y", "z"]).best == 0  # without a preference the first stays
    assert judge.asked == [[("y", "x")], [("z", "x")]]


@pytest.mark.parametrize("method", ["linear", "knockout", "merge", "selection"])
def test_a_circle_is_resolved_by_the_surest_answers_and_reported(monkeypatch, method):
    p = {("x", "y"): 0.9, ("y", "z"): 0.8, ("z", "x"): 0.6}
    judge = answering(monkeypatch, lambda a, b: p.get((a, b)) or 1 - p[b, a])
    ranking = judge.rank("q", ["x", "y", "z"], method)
    assert ranking.order == [0, 1, 2] and ranking.comparisons == 3
    assert [(i, j) for i, j, _ in ranking.overruled] == [(2, 0)]
    assert ranking.overruled[0][2] == pytest.approx(0.6)


def test_lists_share_their_batches_and_one_that_fails_stops_alone(monkeypatch):
    judge = answering(monkeypatch, known_order)
    one, two = judge.contests([("q", list("3142")), ("r", list("12345678"))], "knockout", full=False)
    assert (one.best, two.best) == (2, 7) and [len(batch) for batch in judge.asked] == [2 + 4, 1 + 2, 1]
    whole = judge.judge_many

    def failing(pairs, *arguments, **options):
        for each, judgment in whole(pairs, *arguments, **options):
            yield each, InputError("too long") if "9" in each.response_a + each.response_b else judgment

    judge.judge_many = failing
    bad, good = judge.contests([("q", list("129")), ("r", list("123"))], "merge")
    assert isinstance(bad, InputError) and good.order == [2, 1, 0]
    with pytest.raises(InputError, match="too long"):
        judge.rank("q", list("129"))
    with pytest.raises(InputError, match="no responses"):
        judge.rank("q", [])
    with pytest.raises(InputError, match="best-of-n"):
        judge.best_of("q", ["1", "2"], "merge")


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
        ids = judge.tokenizer.example([{"role": "user", "content": each.question}], each.response_a)[0]
        assert judge.scores([ids]) == [reward]
    assert np.isfinite(rewards).all() and len(set(rewards)) == len(rewards)
