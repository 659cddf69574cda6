"""The prover: both terms of equation (5) worked out by hand, what is eligible, and wrong labels."""

import dataclasses
import itertools
import math
import re
from collections import Counter
from functools import partial

import pytest
import torch
from checkpoints import KINDS, random_model, tokenizer_files

import gramr2.prover
from gramr2 import denoise
from gramr2.extras.evaluate import copied_share, score_leanings
from gramr2.extras.wrong_labels import label_coherence
from gramr2.files import InputError
from gramr2.prompts import Rationale, parse_rationale, proof_from_rationale, prover_prompt
from gramr2.prover import Prover, as_rationale
from gramr2.records import Pair, show
from gramr2.sampler import Sample
from gramr2.scoring import logprobs
from gramr2.selection import SCORES, select, with_score
from gramr2.settings import SelfTrainSettings

TEMPLATE = "{question}|{response_a}|{response_b}|{label}"
TOKENIZER = gramr2.tokenizer.Tokenizer(tokenizer_files("llama3"), "test", date="2026-01-31")
STOP, HEADER = TOKENIZER.turn_end, TOKENIZER.special["<|end_header_id|>"]
PREFILLED = -1000.0  # what a scripted model says of a token that nobody sampled


def pair(question="q", label="A", **fields):
    return Pair((("user", question),), "six pears", "two pears", label, **fields)


def proof_of(label, why="it counts them", conclusion=None):
    other = "B" if label == "A" else "A"
    said = Rationale(
        f"Response {label}: {why}.\nResponse {other}: is wrong.",
        "They differ.",
        f"Response {conclusion or label} is better.",
    )
    return proof_from_rationale(said, label)


def scripted(monkeypatch, written, given=-1.0, second=None, positions=10_000):
    """A Prover whose sampler writes what `written(question, label, number)` says, at `given` per token.

    A text, or (text, finish). `second(front, text)` is the log-prob per token in a score's other term. The
    rows that were scored are in `prover.scored`, as texts (what stands before the proof, the proof).
    """
    model = random_model("llama3", max_positions=positions)
    prover = Prover(model, TOKENIZER, TEMPLATE)
    prover.scored, prover.per_call = [], []

    def sampled(model, ids, *, n, keys, seed, **options):
        prover.per_call.append(len(ids))
        groups = []
        for one, _ in zip(ids, keys, strict=True):
            said = re.sub(r"<\|\w+\|>", "", TOKENIZER.decode(one))
            question, *_, label = said.partition("user\n\n")[2].split("|")
            texts = [written(question.strip(), label[0], number) for number in range(n)]
            groups.append([sample(*((text, "stop") if isinstance(text, str) else text)) for text in texts])
        return groups

    def sample(text, finish):
        ids = TOKENIZER.encode(text) + [STOP] * (finish == "stop")
        logps = given(text, len(ids)) if callable(given) else [given] * len(ids)
        return Sample(ids, logps, [[]] * len(ids), finish)

    def scored(model, rows):
        results = []
        for row in rows:
            start = max(i for i in range(len(row)) if row[i] == HEADER) + 1 + len(TOKENIZER.encode("\n\n"))
            front, text = TOKENIZER.decode(row[:start], skip_special=False), TOKENIZER.decode(row[start:])
            prover.scored.append((front, text))
            per_token = second(front, text) if second else -2.0
            values = [PREFILLED] * (start - 1) + [per_token] * (len(row) - start)
            results.append(torch.tensor(values))
        return results

    monkeypatch.setattr(gramr2.prover, "generate", sampled)
    monkeypatch.setattr(gramr2.prover, "logprobs", scored)
    return prover


def prove(prover, *pairs, k=1, **options):
    return [proofs for _, proofs in prover.prove_many(pairs, k, **options)]


def prompt_ids(prover, asked):
    return prover.frame(prover_prompt(asked, TEMPLATE))


def length(text):
    return len(TOKENIZER.encode(text)) + 1  # the stop token counts


# ---------------------------------------------------------------------------------- equation (5), by hand


def test_equation_5_by_hand(monkeypatch):
    """Every sampled token with its stop token, nothing that was prefilled, no further normalisation."""
    prover = scripted(monkeypatch, lambda *_: proof_of("A"), math.log(1 / 2), lambda *_: math.log(1 / 8))
    ((proof,),) = prove(prover, pair())
    n = length(proof_of("A"))
    assert proof.logp_given == pytest.approx(n * math.log(1 / 2), rel=1e-6)
    assert proof.logp_blank == pytest.approx(n * math.log(1 / 8), rel=1e-6)
    assert proof.score == pytest.approx(-1 / 3, rel=1e-6) and proof.ids[-1] == STOP
    assert proof.select_by == "equation-5" and proof.ineligible is None


def test_a_model_that_does_not_look_at_its_condition_scores_minus_one():
    """A decoder with its blocks silenced is a table of bigrams: both terms are sums read off it."""
    model = random_model("llama3")
    for block in model.blocks:
        block.attention.o.weight.data.zero_()
        block.mlp.down.weight.data.zero_()
    states = torch.nn.functional.rms_norm(model.embed.weight.double(), (48,), eps=1e-5)
    table = ((states * model.norm.weight.double()) @ model.head_weight.double().T).log_softmax(-1).detach()
    prover = Anything(model, TOKENIZER, TEMPLATE)
    for proofs in prove(prover, pair(), pair("r"), k=3, max_new_tokens=16):
        for proof in proofs:
            path = [prover.frame("")[-1], *proof.ids]
            by_hand = sum(float(table[one, other]) for one, other in itertools.pairwise(path))
            assert proof.logp_given == pytest.approx(by_hand, rel=1e-5)
            assert proof.logp_blank == pytest.approx(by_hand, rel=1e-5)
            assert proof.score == pytest.approx(-1, rel=1e-5)


class Anything(Prover):
    """A random model writes no proofs; this one takes what it writes for eligible."""

    def _read(self, pair, sample):
        return dataclasses.replace(super()._read(pair, sample), ineligible=None)


def test_the_sampler_and_the_packed_pass_give_the_same_numerator_and_pick_the_same_proof():
    """Tolerance, level 2. A numerator of other tokens, or a tempered one, would rank by something else."""
    prover = Anything(random_model("qwen3"), TOKENIZER, TEMPLATE)
    pairs = [pair(f"question {n}", "AB"[n % 2]) for n in range(100)]
    same = 0
    for asked, proofs in prover.prove_many(pairs, 4, max_new_tokens=20, temperature=0.7, progress=False):
        front = prompt_ids(prover, asked)
        tails = logprobs(prover.model, [[*front, *proof.ids] for proof in proofs])
        packed = [float(tail[len(front) - 1 :].double().sum()) for tail in tails]
        for proof, value in zip(proofs, packed, strict=True):
            assert proof.logp_given == pytest.approx(value, rel=2e-6)
        again = [
            with_score(dataclasses.replace(proof, logp_given=value), proof.logp_blank)
            for proof, value in zip(proofs, packed, strict=True)
        ]
        same += select(proofs).text == select(again).text
    assert same >= 99


@pytest.mark.parametrize("kind", KINDS)
def test_the_blank_frame_is_the_chat_frame_and_nothing_else(kind):
    """One word of s or l in the denominator's condition would let it see what it must not."""
    tokenizer = gramr2.tokenizer.Tokenizer(tokenizer_files(kind), "test", date="2026-01-31")
    prover = Prover(random_model("llama3"), tokenizer, TEMPLATE)
    asked = pair("which pears?", "B")
    frame = tokenizer.decode(prompt_ids(prover, asked), skip_special=False)
    assert frame.count("which pears?|six pears|two pears|B") == 1
    blank = tokenizer.decode(prover.frame(""), skip_special=False)
    assert frame.replace("which pears?|six pears|two pears|B", "") == blank


# ---------------------------------------------------------------------------------- other scores


def test_each_score_is_computed_after_its_own_user_turn(monkeypatch):
    """The contrast asks the same model for the other label; each proof says by what it was chosen."""
    texts = [proof_of("A", "one"), proof_of("A", "two"), proof_of("A", "three")]
    given = dict(zip(texts, (-1.0, -0.5, -2.0), strict=True))
    blank = dict(zip(texts, (-9.0, -1.0, -4.0), strict=True))
    wrong = dict(zip(texts, (-2.0, -1.0, -7.0), strict=True))
    prover = scripted(
        monkeypatch,
        lambda question, label, number: texts[number],
        lambda text, n: [given[text]] * n,
        lambda front, text: wrong[text] if "|B" in front else blank[text],
    )
    for name in SCORES:
        prover.scored.clear()
        (proofs,) = prove(prover, pair(), k=3, select_by=name)
        assert {proof.select_by for proof in proofs} == {name}
        assert len({front for front, _ in prover.scored}) == 1
        assert ("q|six pears|two pears|B" in prover.scored[0][0]) == (name == "contrast")
        assert all((proof.logp_blank is None) == (name == "contrast") for proof in proofs)
        second = wrong if name == "contrast" else blank
        expected = [
            SCORES[name].value(given[text] * length(text), second[text] * length(text)) for text in texts
        ]
        assert [proof.score for proof in proofs] == pytest.approx(expected)
    with pytest.raises(InputError, match="select_by: 'best' must be one of equation-5, numerator"):
        prove(prover, pair(), select_by="best")


# ---------------------------------------------------------------------------------- what is not eligible


def test_what_is_no_proof_of_the_label_is_not_eligible_and_says_why(monkeypatch):
    """Each of these, chosen, would be trained on."""
    texts = [
        ("", "stop"),
        ("I prefer the first.", "stop"),
        (proof_of("A"), "length"),  # it looks whole, and nothing says that it is
        (proof_of("B"), "stop"),
        (proof_of("A").replace("Therefore: ", ""), "stop"),
        (proof_of("A"), "error"),
        (proof_of("A"), "stop"),
    ]
    prover = scripted(monkeypatch, lambda question, label, number: texts[number])
    (proofs,) = prove(prover, pair(), k=7)
    reasons = [proof.ineligible for proof in proofs]
    assert reasons[0] == reasons[1] == "malformed: opening is missing"
    assert reasons[2:] == [
        "unfinished", "justifies the other label", "malformed: Conclusion is missing",
        "logits were not finite", None,
    ]  # fmt: skip
    assert [proof.score is None for proof in proofs] == [True] * 6 + [False]
    assert select(proofs) is proofs[6] and len(prover.scored) == 1  # the others cost no second pass
    assert select(proofs[:6]) is None


def test_a_proof_that_repeats_the_form_of_its_prompt_is_not_eligible(monkeypatch):
    """A barely trained prover is sure of the form, and equation 5 picks what it is sure of."""
    form = proof_of("A", "what it does well and what it does badly")
    prover = scripted(
        monkeypatch,
        lambda question, label, number: (proof_of("A"), form)[number],
        lambda text, n: [-0.01 if text == form else -1.0] * n,
    )
    (proofs,) = prove(prover, pair(), k=2)
    assert select(proofs).text == form  # of a prompt that does not say so, it is a proof
    prover.template = f"Write: Response A: what it does well and what it does badly. {TEMPLATE}"
    (proofs,) = prove(prover, pair(), k=2)
    assert [proof.ineligible for proof in proofs] == [None, "repeats the prompt's own words"]
    assert select(proofs).text == proof_of("A")


def test_no_eligible_proof_at_all_is_no_error(monkeypatch):
    prover = scripted(monkeypatch, lambda *_: "nothing")
    assert [select(proofs) for proofs in prove(prover, pair(), pair("r"), k=3)] == [None, None]
    assert list(prover.prove_many([], 3)) == []


# ---------------------------------------------------------------------------------- pairs in and out


def test_a_pair_that_is_too_long_has_no_proofs_and_the_others_have_theirs(monkeypatch):
    """Cut, it would lose its label; and its neighbours must not get its proofs."""
    prover = scripted(monkeypatch, lambda question, label, number: proof_of(label, question), positions=150)
    long = pair("pear " * 300)
    found = prove(prover, pair("one"), long, pair("two", "B"), k=2)
    assert [len(proofs) for proofs in found] == [2, 0, 2] and prover.per_call == [2]
    assert [proofs[0].pair_id for proofs in found if proofs] == [pair("one").id, pair("two").id]
    assert "two" in found[2][0].text and all(proof.ineligible is None for proof in found[2])


def test_a_proof_may_fill_the_model_to_its_last_position_and_not_beyond(monkeypatch):
    asked = {}
    prover = scripted(monkeypatch, lambda *_: proof_of("A"), positions=150)
    inner = gramr2.prover.generate
    monkeypatch.setattr(
        gramr2.prover, "generate", lambda *a, **named: asked.update(named) or inner(*a, **named)
    )
    prove(prover, pair("one"), max_new_tokens=10_000, temperature=0.9, seed=5)
    assert asked["max_new_tokens"] == [150 - len(prompt_ids(prover, pair("one")))]
    assert (asked["temperature"], asked["seed"]) == (0.9, 5)


def test_the_proofs_of_a_pair_are_the_same_alone_and_among_others():
    """Level 1, bitwise, texts and scores' numerators: a resumed run would otherwise be another run."""
    prover = Anything(random_model("llama3"), TOKENIZER, TEMPLATE)
    options = {"max_new_tokens": 12, "progress": False, "seed": 3}
    pairs = [pair(f"question {n} " + "pear " * n, "AB"[n % 2]) for n in range(7)]
    together = prove(prover, *pairs, k=3, **options)
    for alone, among in zip(
        (prove(prover, each, k=3, **options)[0] for each in pairs), together, strict=True
    ):
        assert [(proof.ids, proof.logp_given) for proof in alone] == [
            (proof.ids, proof.logp_given) for proof in among
        ]
        assert [proof.logp_blank for proof in alone] == pytest.approx([p.logp_blank for p in among], rel=1e-5)
    turned = prove(prover, *(dataclasses.replace(each, label="B") for each in pairs), k=3, **options)
    seeds = prove(prover, *pairs, k=3, **options | {"seed": 4})
    assert turned[0] != together[0] and seeds[0] != together[0]
    assert len({proof.ids for proof in together[0]}) == 3  # k proofs, not one k times


def test_k_proofs_cost_one_prefill(monkeypatch):
    """Prompts are the long part of a pair: computed once per proof, they would cost k times as much."""
    computed = Counter()
    model = random_model("llama3")
    prover = Anything(model, TOKENIZER, TEMPLATE)
    monkeypatch.setattr(
        gramr2.prover, "logprobs", lambda model, rows: [torch.zeros(len(r)) - 1 for r in rows]
    )
    forward = type(model).forward

    def counting(self, ids_T, *rest, **named):
        computed["tokens"] += len(ids_T)
        return forward(self, ids_T, *rest, **named)

    monkeypatch.setattr(type(model), "forward", counting)
    long = pair("pear " * 100)
    prompt = len(prompt_ids(prover, long))
    prove(prover, long, k=8, max_new_tokens=4, progress=False)
    assert computed["tokens"] < 2 * prompt + 8 * 8  # not 8 * prompt


def test_a_rationale_comes_back_from_a_proof_in_the_stored_form(monkeypatch):
    """A rationale with plain letters in it would say the wrong thing once its pair is swapped."""
    prover = scripted(monkeypatch, lambda *_: proof_of("A", "a better answer, vitamin B counts"))
    ((proof,),) = prove(prover, pair())
    rationale = as_rationale(proof)
    assert rationale.count("Response ⟦A⟧") == 2 and "vitamin B counts" in rationale
    assert proof_from_rationale(parse_rationale(show(rationale)).rationale, "A") == proof.text


@pytest.mark.parametrize("named", [{"k": 0}, {"temperature": 0.0}])
def test_k_equal_proofs_are_refused(named):
    with pytest.raises(InputError, match="must be above 0"):
        prove(Prover(random_model("llama3"), TOKENIZER, TEMPLATE), pair(), **named)


# ---------------------------------------------------------------------------------- asked for the wrong label


def test_a_prover_that_reasons_gives_itself_away_on_wrong_labels_and_a_parrot_does_not(monkeypatch):
    """Both look alike on right labels; only the count on wrong ones tells them apart."""
    pairs = [pair(f"q{n}", "AB"[n % 2], rationale="seen by nobody") for n in range(6)]
    true = {each.question: each.label for each in pairs}
    filters = {"rules": denoise.RATIONALE_FILTERS, "settings": SelfTrainSettings().filters()}
    objection = partial(denoise.objection, **filters)
    parrot = scripted(monkeypatch, lambda question, label, number: proof_of(label))
    right = {"asked": 6, "passed": 6, "dropped": {}}
    assert label_coherence(parrot, pairs, objection) == {"right": right, "wrong": right}
    # It opens with the label that it was told, and argues for the one that it finds.
    reasons = scripted(
        monkeypatch, lambda question, label, number: proof_of(label, conclusion=true[question])
    )
    dropped = {"does not state the label": 6}
    assert label_coherence(reasons, pairs, objection) == {
        "right": right,
        "wrong": {"asked": 6, "passed": 0, "dropped": dropped},
    }
    honest = scripted(monkeypatch, lambda question, label, number: proof_of(true[question]))
    long = pair("pear " * 4000, "A")
    true[long.question.strip()] = "A"
    counts = label_coherence(honest, [*pairs, long], objection)
    assert counts["right"] == {"asked": 7, "passed": 6, "dropped": {"too long to prove": 1}}
    assert counts["wrong"]["dropped"] == {"justifies the other label": 6, "too long to prove": 1}


# ---------------------------------------------------------------------------------- what the score rewards


def test_leanings_are_rank_correlations_within_a_pair():
    """Pooled over pairs, scores that are not comparable would make up a correlation of their own."""
    asked = dataclasses.replace(pair(), response_a="one two three four five six", response_b="seven")
    assert copied_share(asked, "One, two three four five! Six? eight") == pytest.approx(2 / 3)
    assert copied_share(asked, "one two three four") == 0.0  # no run of five
    assert copied_share(asked, "five six seven seven seven") == 0.0  # a run over two texts is none

    def proof(score, text, length):
        return {"score": score, "text": text, "ids": [0] * length}

    copy, half, free = "one two three four five", "zero one two three four five", "a b c d e f"
    up = [proof(-0.1, copy, 9), proof(-0.2, half, 5), proof(-0.3, free, 7), proof(None, free, 99)]
    far = [proof(-10 + each["score"], each["text"], len(each["ids"])) for each in up[:3]]
    flat = [proof(-5, free, 3), proof(-6, free, 3)]  # nothing varies: no correlation
    rows = [{"pair": asked.to_json(), "candidates": each} for each in (up, far, flat)]
    assert score_leanings(rows) == {"copied": 1.0, "length": 0.5, "pairs": {"copied": 2, "length": 2}}
    tied = [proof(-1, copy, 1), proof(-1, copy, 2), proof(-2, half, 3), proof(-3, free, 4)]
    assert score_leanings([{"pair": asked.to_json(), "candidates": tied}]) == {
        "copied": 1.0, "length": -0.949, "pairs": {"copied": 1, "length": 1},
    }  # fmt: skip
    assert score_leanings([]) == {"copied": None, "length": None, "pairs": {"copied": 0, "length": 0}}
