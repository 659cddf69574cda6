"""The filters: what each keeps, what each drops and why, and how they are switched off and counted."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gramr2 import denoise
from gramr2.denoise import (
    COHERENCE,
    FILTERS,
    LABEL_FILTERS,
    RATIONALE_FILTERS,
    balance,
    objection,
    objections,
    without_incoherent_votes,
)
from gramr2.prompts import Rationale, judge_target
from gramr2.records import OTHER, Judgment, Pair, Vote, mark, show, swap
from gramr2.settings import SelfTrainSettings

SETTINGS = SelfTrainSettings().filters()
PAIR = Pair(
    (("user", "Which vitamins are soluble in water?"),),
    "Vitamin C and the eight kinds of vitamin B dissolve in water.",
    "Only vitamin C. Vitamin B is a better known one, but it is a fat.",
    "A",
)


def votes(*cast, p=0.95):
    """ "AB:A" is a vote in the given order for A; "BA:-" one in the other order that could not be read."""
    labels = [(order, None if label == "-" else label) for order, label in (each.split(":") for each in cast)]
    sure = {"A": p, "B": 1 - p, None: None}
    return Judgment.from_votes([Vote(label, order, sure[label], text="x") for order, label in labels])


def z(feedback="Response A: names both.\nResponse B: is wrong.", comparison="Response A is right.",
      conclusion="Response A is better."):  # fmt: skip
    return mark(str(Rationale(feedback, comparison, conclusion)))


def reason(name, rationale, pair=PAIR, settings=SETTINGS):
    return RATIONALE_FILTERS[name](pair, rationale, settings)


# ---------------------------------------------------------------------------------- labels

LABEL_CASES = [
    ("agreement", votes("AB:A", "AB:A", "BA:A", "BA:B", "BA:A"), None),
    ("agreement", votes("AB:A", "AB:A", "BA:B", "BA:B"), "the two orders disagree"),
    ("agreement", votes("AB:A", "AB:A", "BA:A", "BA:B"), "the two orders disagree"),  # a tie is no majority
    ("agreement", votes("AB:A", "AB:A", "BA:-", "BA:-"), "one order has no readable vote"),
    ("agreement", votes("AB:-", "BA:-"), "no readable vote"),
    ("agreement", votes("AB:B", "AB:A"), "undecided"),
    ("agreement", votes("AB:B"), None),  # one order was asked: there is nothing to disagree
    ("confidence", votes("AB:B", "AB:B", "BA:B", "BA:A"), None),  # 3 of 4: at the threshold
    ("confidence", votes("AB:B", "AB:B", "BA:B", "BA:A", "BA:A"), "votes below 0.75"),
    ("confidence", votes("AB:B", "AB:B", "BA:-", "BA:B", "BA:-"), "votes below 0.75"),  # abstentions count
    ("confidence", votes("AB:-", "BA:-"), "votes below 0.75"),
    ("softmax", votes("AB:B", "BA:B", p=0.9), None),
    ("softmax", votes("AB:B", "BA:B", p=0.7), "softmax below 0.8"),
    ("softmax", votes("AB:A", "AB:A", "BA:A", "BA:B", p=0.9), None),  # of the votes for the label alone
    ("softmax", votes("AB:-", "BA:-"), "softmax below 0.8"),
]


@pytest.mark.parametrize("name, judgment, expected", LABEL_CASES)
def test_a_label_filter_drops_what_it_should_and_nothing_else(name, judgment, expected):
    """A filter that passes everything, or takes B's probability for A's, lets wrong pseudo-labels in."""
    settings = dataclasses.replace(SETTINGS, softmax=0.8)
    assert LABEL_FILTERS[name](judgment, settings) == expected


def test_confidence_may_change_by_round():
    """Rounds after the last number would fall back to the first, or be refused."""
    settings = SelfTrainSettings(confidence=(0.5, 0.9))
    judgment = votes("AB:A", "AB:A", "BA:A", "BA:B")
    found = [denoise.confidence(judgment, settings.filters(number)) for number in (1, 2, 3)]
    assert found == [None, "votes below 0.9", "votes below 0.9"]


# ---------------------------------------------------------------------------------- rationales

LOOP = "it is clear and short and right and " * 3
RATIONALE_CASES = [
    ("length", z("word " * 1480), None),
    ("length", z("word " * 1500), "more than 1500 words"),
    ("structure", z(), None),
    ("structure", "Response ⟦A⟧ is better.", "Feedback is missing"),
    ("structure", z(comparison="Conclusion:\nyes"), "Conclusion stands 2 times"),
    ("structure", z() + "\n</think>", "</think> inside the rationale"),
    ("states_label", z(), None),
    ("states_label", z(conclusion="Response A beats Response B."), None),
    (
        "states_label",
        z(conclusion="It is a better answer, and vitamin A matters."),
        "does not state the label",
    ),
    ("states_label", z(conclusion="Response B is better."), "does not state the label"),
    ("states_other", z(), None),
    ("states_other", z(conclusion="Response A beats Response B."), None),
    ("states_other", z(conclusion="A better answer; vitamin B is one."), None),
    ("states_other", z("Response B: good.", "Response B it is.", "Response B."), "states the other label"),
    ("mentions", z("Response B: wrong.", "It is wrong."), None),
    ("mentions", z("A good answer about vitamin B.", "A is short."), "talks of neither response"),
    ("mentions", "nothing of the kind", "talks of neither response"),
    ("repetition", z("it is clear and short and right and so on. " * 2), None),
    ("repetition", z(LOOP), "repeats itself"),
    ("quotes", z('Response A: says "the eight kinds of Vitamin B", and more.'), None),
    ("quotes", z('Response A: says "Vitamin C ... dissolve in water."'), None),
    ("quotes", z("Response B: asks “soluble in water?” again."), None),  # the question may be quoted
    ("quotes", z('Response B: calls it "a fat", "so to say".'), "quotes what the responses do not say"),
    ("quotes", z("Response A: says “vitamin C is an acid”."), "quotes what the responses do not say"),
    ("quotes", z('Response A: "dissolve ... in a glass of milk"'), "quotes what the responses do not say"),
    ("quotes", z('A 5" screen is not a vitamin C.\nResponse B: a 3" one is.'), None),  # inches
    ("quotes", z('Response A: "oluble in wate"'), "quotes what the responses do not say"),  # whole words
]


@pytest.mark.parametrize("name, rationale, expected", RATIONALE_CASES)
def test_a_rationale_filter_drops_what_it_should_and_nothing_else(name, rationale, expected):
    """Both ways: a filter that objects to good rationales keeps only what the model knows already."""
    assert reason(name, rationale) == expected
    turned = Pair.swapped(dataclasses.replace(PAIR, rationale=rationale))
    assert reason(name, turned.rationale, turned) == expected  # the same in the other order


PLAIN = [
    "Response B is better.",
    "Response B is clearly the better answer.",
    "- Therefore Response B is superior, and it is short.",
    "Overall, Response B is much better than Response A, because it is short.",
    "Response B is far superior since it is right.",
    "Response A is worse.",
    "Response A is significantly worse than Response B!",
    "Response A is the inferior one overall.",
]
HEDGED = [
    "Response B is better formatted.",
    "Response B is better in tone.",
    "In tone, Response B is better.",
    "On the whole question of length Response B is better.",
    "Response B is not better.",
    "Response B is better, but Response A is right.",
    "Although Response B is better, it is wrong.",
    "Is Response B better?",
    "One might say that Response B is better.",
    "If length counted, Response B is better.",
    "Response B isn’t better.",
    "Response A is worse formatted.",
    "Vitamin B is a better one.",
]


@pytest.mark.parametrize("part", ["feedback", "comparison", "conclusion"])
def test_a_plain_statement_for_the_other_response_is_incoherent_and_a_hedged_one_is_not(part):
    """A rationale that argues for B and concludes A teaches that reasons do not matter."""
    other = dataclasses.replace(PAIR, label="B")
    for sentence in PLAIN:
        parts = {part: f"Response A: short. {sentence} Response A is right."}
        assert reason("coherence", z(**parts)) == "a statement contradicts its conclusion", sentence
        assert reason("coherence", z(**{"conclusion": "Response B."} | parts), other) is None, sentence
    for sentence in HEDGED:
        text = z(**{part: f"Response A: short. {sentence} Response A is right."})
        assert reason("coherence", text) is None, sentence


def test_an_article_is_no_slot_and_a_swap_changes_none():
    """ "A better answer" and "vitamin B" are not the responses, in either order."""
    text = z("Response A: A better answer. Vitamin B counts.\nResponse B: wrong.", "A is for apple.")
    assert show(swap(text)).count("A better answer. Vitamin B counts.") == 1
    assert all(rule(PAIR, text, SETTINGS) is None for rule in RATIONALE_FILTERS.values())
    assert reason("states_label", z(conclusion="A better answer.")) == "does not state the label"


# ---------------------------------------------------------------------------------- votes' own rationales


def test_votes_whose_own_rationale_is_incoherent_abstain_in_either_order():
    """A judge that concludes against its own words has guessed. The other order is read turned."""

    def vote(order, label, better, p_a):
        shown = label if order == "AB" else OTHER[label]
        text = judge_target(
            show(z("Response A: short.\nResponse B: long.", better, f"Response {shown}.")), shown
        )
        return Vote(label, order, p_a, text=text)

    cast = [
        vote("AB", "A", "Response A is better.", 0.9),
        vote("AB", "A", "Response B is better.", 0.9),
        vote("BA", "A", "Response B is better.", 0.8),  # shown as B, for A
        vote("BA", "B", "Response B is better.", 0.1),
        Vote(None, "BA", None, "no answer"),
    ]
    judged = without_incoherent_votes(PAIR, Judgment.from_votes(cast), COHERENCE, SETTINGS)
    assert [each.label for each in judged.details] == ["A", None, "A", None, None]
    assert judged.details[1].reason == "a statement contradicts its conclusion"
    assert judged.details[4].reason == "no answer"
    assert (judged.label, judged.votes, judged.orders_agree) == ("A", {"A": 2, "B": 0, "none": 3}, True)
    off = dataclasses.replace(SETTINGS, without=("coherence", "quotes"))
    assert without_incoherent_votes(PAIR, Judgment.from_votes(cast), COHERENCE, off) == Judgment.from_votes(
        cast
    )


def test_a_label_without_a_rationale_is_no_incoherent_one():
    """A judge that answers with the letter alone would lose every vote."""
    cast = [Vote("A", order, 0.9, text="<answer>\nA\n</answer>") for order in ("AB", "BA")]
    assert without_incoherent_votes(PAIR, Judgment.from_votes(cast), COHERENCE, SETTINGS).votes["A"] == 2


# ---------------------------------------------------------------------------------- applying them


def test_each_filter_is_switched_off_alone_and_objects_alone():
    """The first reason is written down; what each alone would drop says which filter is needed."""
    bad = z("nothing", "nothing", "Response B is better.")
    assert objections(RATIONALE_FILTERS, PAIR, z(), settings=SETTINGS) == dict.fromkeys(RATIONALE_FILTERS)
    found = objections(RATIONALE_FILTERS, PAIR, bad, settings=SETTINGS)
    assert [name for name, why in found.items() if why] == [
        "states_label", "states_other", "mentions", "coherence",
    ]  # fmt: skip
    unformed = objections(RATIONALE_FILTERS, PAIR, "Response ⟦A⟧.", settings=SETTINGS)
    assert unformed["structure"] == "Feedback is missing"
    assert objection(PAIR, bad, RATIONALE_FILTERS, SETTINGS) == "does not state the label"
    assert objection(PAIR, z(), RATIONALE_FILTERS, SETTINGS) is None
    for name in found:
        without = dataclasses.replace(SETTINGS, without=(name,))
        others = {other: reason for other, reason in found.items() if other != name}
        assert objections(RATIONALE_FILTERS, PAIR, bad, settings=without) == others
    none = dataclasses.replace(SETTINGS, without=FILTERS)
    assert objections(RATIONALE_FILTERS, PAIR, bad, settings=none) == {}
    assert objection(PAIR, bad, RATIONALE_FILTERS, none) is None


@hypothesis_settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("AB"), max_size=40))
def test_labels_are_balanced_whatever_came_before(labels):
    """More A than B would teach a position. Nothing is lost, and a rationale is turned with its pair."""
    pairs = [
        Pair((("user", str(n)),), "good", "bad", "A", rationale=z(conclusion="Response A is better."))
        for n in range(len(labels))
    ]
    pairs = [pair if label == "A" else pair.swapped() for pair, label in zip(pairs, labels, strict=True)]
    balanced, count = [], Counter()
    for pair in pairs:
        balanced.append(balance(pair, count["A"] - count["B"]))
        count[balanced[-1].label] += 1
    assert abs(count["A"] - count["B"]) <= 1
    assert [pair.id for pair in balanced] == [pair.id for pair in pairs]
    for pair in balanced:
        assert (pair.response_a == "good") == (pair.label == "A")
        assert reason("states_label", pair.rationale, pair) is None


def test_a_rationale_that_cannot_be_turned_is_left_in_its_order():
    """ "The first response" would be wrong after a swap."""
    fixed = dataclasses.replace(PAIR, rationale=z("The first response is right."))
    assert fixed.label == "A" and balance(fixed, 3) == fixed
