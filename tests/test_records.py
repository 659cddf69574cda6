"""Records: what a file says is what is read, a swap changes the order and nothing else."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gramr2.files import InputError
from gramr2.records import Judgment, Pair, Proof, Tokens, Vote, mark, named, show, swap, unmarked

PIECES = [
    "Response A", "Response B", "response 1", "@Response 2", "Responses 1 and 2", "⟦", "⟧", "⟦A⟧", "⟦⟦",
    "vitamin B", "(A) or (B)", "option B", "a better answer", "A bee", "`Response A`", "B[0] = A", "\n",
    "```\nResponse 1 = A\n```", " ", "In response a user", "response 12", "Response 1.5", "'s", ". ", "@",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map(" ".join)
pairs = st.builds(
    Pair,
    messages=st.lists(st.tuples(st.sampled_from(["user", "tool"]), texts), min_size=1, max_size=3).map(tuple),
    response_a=texts,
    response_b=texts,
    label=st.sampled_from(["A", "B", None]),
    rationale=st.none() | texts.filter(bool).map(mark),
    source=st.text(max_size=3),
    domain=st.text(max_size=3),
    margin=st.none() | st.floats(0, 3),
    meta=st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@given(pairs)
def test_pair_survives_json(pair):
    """Otherwise a run reads something else than the run before it wrote."""
    assert Pair.from_json(json.loads(json.dumps(pair.to_json()))) == pair


@given(pairs)
def test_swap_twice_is_identity(pair):
    assert pair.swapped().swapped() == pair


@given(pairs)
def test_id_knows_neither_order_nor_label(pair):
    """Otherwise a pair and its swap are two pairs, and a duplicate is trained on twice."""
    fresh = Pair(pair.messages, pair.response_b, pair.response_a)
    assert fresh.id == pair.id == pair.swapped().id
    assert Pair(pair.messages, pair.response_a + ".", pair.response_b).id != pair.id


@given(texts)
def test_swap_changes_slots_and_nothing_else(text):
    """Whatever is not a mention of a response is the same, character for character, after a swap."""
    slotted = mark(text)
    once, twice = show(slotted), show(swap(slotted))
    assert swap(swap(slotted)) == slotted
    exchanged = re.sub(r"Response ([AB])", "Response ?", once)
    assert exchanged == re.sub(r"Response ([AB])", "Response ?", twice)


@pytest.mark.parametrize(
    "text",
    ["vitamin B and a vitamin A pill", "Option B is (B), not (A)", "```python\nA, B = B, A\n```", "plan B",
     "A better answer. In response a user wrote B.", "Response 12 and response 1.5", "⟦A⟧", "`Response A`"],
)  # fmt: skip
def test_what_is_no_mention_stays(text):
    """Letters, articles and code must not change with the order of the responses."""
    assert show(mark(text)) == show(swap(mark(text))) == text


@pytest.mark.parametrize(
    "text, shown",
    [("@Response 1 is good", "Response A is good"), ("response 2's list.", "Response B's list."),
     ("Responses 1 and 2 differ", "Response A and Response B differ"), ("Response 2.", "Response B."),
     ("@response1 and @Response 2", "Response A and Response B"), ("Response A/B", "Response A/Response B"),
     ("Response A, not B12", "Response A, not B12"), ("response 1 and 2 men", "Response A and 2 men"),
     ("Response (a) is", "Response A is"), ("Response **1**", "Response A"),
     ("Response “B” is", "Response B is"), ("Output (b) wins", "Response B wins"),
     ("Resp. A, resp 2", "Response A, Response B"), ("Response one is", "Response A is"),
     ("Response #2", "Response B")],
)  # fmt: skip
def test_mentions_as_people_write_them(text, shown):
    """HelpSteer3 says "Response 1" and "@Response 2"; a mention that is missed stays behind in a swap."""
    assert show(mark(text)) == shown
    trade = {"Response A": "Response B", "Response B": "Response A"}
    assert show(swap(mark(text))) == re.sub("Response [AB]", lambda found: trade[found[0]], shown)


@pytest.mark.parametrize(
    "text",
    ["Assistant B is", "the first response", "A is better", "I prefer B.", "Answer 2", "B's list",
     "`Response A` is quoted", "the second one fails", "the right response (B)", "in response one finds",
     "The better response is B.", "Response 1 and 2 both", "@1 is clear", "A outperforms",
     "1 is better than 2", "the first is shorter", "Response\n1 is", "A1 is clear", "argument 2", "arg. one",
     "the former", "The latter is", "Model M", "assistant (b)", "I prefer #2", "A2s argument",
     "2 uses facts", "A1/A2 differ", "the clear one (A1)"],
)  # fmt: skip
def test_unmarked_mentions_are_seen(text):
    """A swap would make such a rationale argue for the wrong response."""
    assert unmarked(mark(text)) and not Pair((("user", "q"),), "a", "b", "A", mark(text)).swappable


@pytest.mark.parametrize(
    "text",
    ["Response 1 beats @Response 2", "vitamin B", "a better answer", "Option (B) is", "the answer is B",
     "first of all", "section A1 says", "the sum of cells A1 and A2", "=A1+A2", "the #1 reason",
     "table 2 is long", "one way or another", "the former president", "the second half", "a 2 year old",
     "he argues one point"],
)  # fmt: skip
def test_marked_texts_may_be_swapped(text):
    assert not unmarked(mark(text))


@pytest.mark.parametrize(
    "text, shown",
    [("A1 beats a2.", "Response A beats Response B."), ("arg. 2, Arg1", "Response B, Response A"),
     ("Argument two's tone", "Response B's tone"), ("Argument A2 rambles", "Response B rambles"),
     ("Arguments 1 and 2 differ", "Response A and Response B differ"), ("arguement #1", "Response A"),
     # Where a sentence ends with the word, or it has a meaning of its own, it stays.
     ("no argument. A2 has", "no argument. Response B has"), ("its argument a1", "its argument Response A"),
     *((same, same) for same in ("an argument one way or the other", "the best argument one could make",
                                 "argument one-sidedly", "A12, a1b", "(A) a better one"))],
)  # fmt: skip
def test_arguments_have_names_of_their_own(text, shown):
    """People write so; with one name left behind, a swapped reason argues for the other side."""
    assert show(mark(text, "argument")) == shown
    assert not unmarked(mark(text, "argument"))
    assert named(mark(text, "argument")) == set(re.findall("Response ([AB])", shown))


@pytest.mark.parametrize("order, said", [("AB", "A"), ("BA", "B")])
def test_a_judgments_rationale_is_for_whoever_reads_it(order, said):
    """In the pair's order, and without slots, which no caller of a judge knows."""
    vote = Vote("A", order, 0.9, "", f"<think>\nResponse {said} is it. ⟦sic⟧\n</think>\n<answer>A</answer>")
    assert Judgment.from_votes([vote]).rationale == "Response A is it. ⟦sic⟧"


def test_rationale_of_a_plain_file_is_marked_once():
    """A person writes "Response A" and a run writes slots: both are read as the same."""
    row = {
        "question": "q",
        "response_a": "a",
        "response_b": "b",
        "label": "A",
        "rationale": "Response A wins",
    }
    pair = Pair.from_json(row)
    assert pair.rationale == "Response ⟦A⟧ wins" == Pair.from_json(pair.to_json()).rationale


@pytest.mark.parametrize("question", ["question", "prompt", "instruction"])
@pytest.mark.parametrize(
    "a, b", [("response_A", "response_B"), ("response1", "response2"), ("chosen", "rejected")]
)
def test_common_spellings(question, a, b):
    pair = Pair.from_json({question: "q", a: "x", b: "y"})
    assert (pair.question, pair.response_a, pair.response_b) == ("q", "x", "y")
    assert pair.label == ("A" if a == "chosen" else None)


def test_conversation_is_flattened_in_one_way():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"messages": turns, "response_a": "x", "response_b": "y"}
    assert Pair.from_json(row).question == "User: Hi\n\nAssistant: Hello"
    assert Pair.from_json(row).to_json()["messages"] == turns
    assert (
        Pair.from_json({"question": " as it is\n", "response_a": "", "response_b": ""}).question
        == " as it is\n"
    )


@pytest.mark.parametrize(
    "change, named",
    [({"response_b": None}, "response_b"), ({"question": 3}, "question"), ({"label": "C"}, "label"),
     ({"label": ["A"]}, "label"), ({"messages": []}, "messages"), ({"messages": [{"role": 1}]}, "messages"),
     ({"margin": "2"}, "margin"), ({"rationale": 1}, "rationale"), ({"meta": []}, "meta"),
     # of two, the first
     ({"messages": [], "source": 1}, "messages"), ({"messages": [], "label": 1}, "label")],
)  # fmt: skip
def test_a_wrong_field_is_named(change, named):
    row = {"question": "q", "response_a": "a", "response_b": "b"} | change
    with pytest.raises(InputError, match=named):
        Pair.from_json(row)


def test_a_missing_field_is_named():
    with pytest.raises(InputError, match="response_b"):
        Pair.from_json({"question": "q", "response_a": "a"})
    with pytest.raises(InputError, match="disagree"):
        Pair.from_json({"question": "q", "chosen": "a", "rejected": "b", "label": "B"})


@pytest.mark.parametrize(
    "record",
    [Judgment("A", 0.7, {"A": 1, "B": 0, "none": 0}, 0, "⟦A⟧", True, (Vote("A", "BA", 0.9, "", "t", 7),)),
     Judgment(None, 0.5, {"A": 0, "B": 0, "none": 2}, 2), Vote(None, "AB", None, "no answer"),
     Proof("id", "text", -3.5, -9.0, -0.4, "stop", None, (1, 2)), Tokens((1, 2, 3), 2)],
)  # fmt: skip
def test_other_records_survive_json(record):
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("row", [None, 1, "x", [1]])
def test_what_is_no_object_is_no_record(row):
    with pytest.raises(InputError, match=r"details|Vote"):
        Judgment.from_json({"details": [row]})
