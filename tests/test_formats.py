"""Other judges' formats: what each writes is read, where it stands, and p belongs to what was read."""

import dataclasses

import pytest
import torch
from checkpoints import make_checkpoint, random_model
from hypothesis import given
from hypothesis import strategies as st
from oracles import naive_logits
from planted import NO_MODEL, TEMPLATE, TOKENIZER, planted
from test_prompts import texts

import gramr2.votes
from gramr2.extras.formats import FORMATS, format_named
from gramr2.files import InputError
from gramr2.judge import RewardModel
from gramr2.sampler import Sample
from gramr2.votes import Query, Voter

PARSED = [name for name, each in FORMATS.items() if each.parse]


@pytest.mark.parametrize(
    "name, text, label",
    [("brackets", "[[B]] was said, but: [[A]]", "A"), ("brackets", "[[ b ]]", "B"),
     ("brackets", "[[C]]", None), ("brackets", "A", None), ("brackets", "<think>[[A]]", None),
     ("rm-r1", "<eval>[[B]]</eval><answer>[[A]]</answer>", "A"), ("rm-r1", "<answer>A</answer>", None),
     ("rm-r1", "[[A]]", None), ("boxed", "<think>\\boxed{B}</think>\\boxed{Assistant 1}", "A"),
     ("boxed", "\\boxed{\\text{B}}", "B"), ("boxed", "\\boxed{tie}", None), ("boxed", "B", None),
     ("arena", "Verdict: [[A>>B]]", "A"), ("arena", "\\boxed{B>A}", "B"), ("arena", "[[A=B]]", None)],
)  # fmt: skip
def test_verdicts_of_other_judges(name, text, label):
    assert FORMATS[name].parse(text, False).label == label


@given(texts, st.booleans(), st.sampled_from(PARSED))
def test_parsers_never_raise(text, opened, name):
    """One odd sample must not end a run of a million."""
    verdict = FORMATS[name].parse(text, opened)
    assert verdict.label in ("A", "B") or (verdict.label is None and verdict.reason)


def test_where_a_checkpoint_brings_no_prompt_ours_asks_for_the_formats_own_verdict(tmp_path, capsys):
    directory = make_checkpoint(tmp_path / "model", "llama3")
    for name in PARSED:
        template = RewardModel.load(directory, format=format_named(name)).template
        a, b = FORMATS[name].endings
        assert "in exactly this form:\n<think>" in template and (name == "think" or f"{a} or {b}" in template)
    assert capsys.readouterr().err.count("warning") == len(PARSED)
    with pytest.raises(InputError, match="no format nosuch; there are think, label"):
        format_named("nosuch")


@pytest.mark.parametrize("name", PARSED)
def test_a_canonical_verdict_is_read_where_its_letter_stands(monkeypatch, name):
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.8 if a == "good" else 0.3, FORMATS[name])
    monkeypatch.setattr(gramr2.votes, "logprobs", None)  # nothing needs to be scored again
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


@pytest.mark.parametrize("name, verdicts", OTHER_WAYS)
def test_a_verdict_written_otherwise_is_scored_by_its_canonical_ending(monkeypatch, name, verdicts):
    """p is then the model's own, at the letter, after what was written before the verdict."""
    model = random_model("llama3", max_positions=2000)
    judge = planted(monkeypatch, lambda question, a, b, draw: 0.8, FORMATS[name], verdicts, model)
    judgment = judge.judge("q", "x", "y", votes=1)
    prompt = TOKENIZER.chat([{"role": "user", "content": "<<q|x|y>>"}])
    written = "<think>\nFor a reason.\n</think>\n"
    a, b = (TOKENIZER.encode(written + ending) for ending in FORMATS[name].endings)
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


@pytest.mark.parametrize("name, text", EARLIER)
def test_p_belongs_to_the_verdict_that_was_read(monkeypatch, name, text):
    """An earlier canonical letter, of which the judge was sure, would turn the judgment round."""
    voter = Voter(NO_MODEL, TOKENIZER, TEMPLATE, FORMATS[name])
    ids = TOKENIZER.encode(text)
    sample = Sample(ids, [0.0] * len(ids), [[0.0, -6.0]] * len(ids), "stop")
    monkeypatch.setattr(voter, "_softmax_after", lambda prompt_ids, written: 0.01)
    vote = voter.read(query := Query("key", "AB", [1]), voter.answer(query, sample, 0))
    assert (vote.label, vote.p_a) == ("B", 0.01)
