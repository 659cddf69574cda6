"""The preference-proving model: k proofs of a given label, and equation (5), which picks one.

A prover π_ψ reads s and the label l and writes ẑ, the proof form of a rationale (equation 3). For each pair k
proofs are sampled at a non-zero temperature from one prefill, and the best eligible one by

    Score = - log π_ψ(ẑ given s, l) / log π_ψ(ẑ)                                      equation (5)

becomes the rationale. The score lies in (-inf, 0] and higher is better: a proof is good when the condition
makes it likely (numerator near 0) while it would be unlikely to be written of just any pair (denominator far
from 0). The paper leaves open what exactly is scored; here:

- every token that the prover sampled counts, its stop token included, and nothing that was prefilled;
- both terms are untempered sums, without further normalisation by length;
- π(ẑ) is taken in the same chat frame with an exactly empty user turn: no task, no question, no label.
  Training drops the condition in a tenth of the examples (stages.py), so that this means something;
- unfinished and malformed proofs, and those that justify the other label, are not eligible.

Scores rank the proofs of one pair. They are not compared across pairs. Other ways to pick a proof stand
beside equation (5) for comparison (`SCORES`); what tells them apart is `condition` and that table, and in
`with_score` what equation (5) alone cannot divide by.

`label_coherence` asks a prover for the wrong label too. One that reasons gives itself away there, one that
praises whatever it is told to does not, and both look alike on right labels.

It leaves out: the rules that a chosen rationale must still pass (denoise.py), and training (fit.py).
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gramr2 import prompts
from gramr2.files import InputError
from gramr2.model import Decoder
from gramr2.records import OTHER, Pair, Proof, mark
from gramr2.sampler import Sample, generate
from gramr2.scoring import logprobs
from gramr2.tokenizer import Tokenizer
from gramr2.weights import load

PAIRS_PER_CALL = 64  # pairs of one generate call
MAX_NEW_TOKENS = 2048


class Prover:
    """A proving model, its tokenizer and the prompt that belongs to it."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: str = prompts.PROVER_PROMPT):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        # The denominator's frame: a user turn with nothing in it.
        self.blank = tokenizer.chat([{"role": "user", "content": ""}])
        self.thinking_open = tokenizer.opens_thinking([{"role": "user", "content": ""}])

    @classmethod
    def load(cls, directory: str | Path, device="cpu", dtype="float32", date: str | None = None) -> Prover:
        """`date` pins what a chat template prints as today."""
        model, tokenizer = load(directory, device, dtype, date)
        template, note = prompts.template_for(directory, kind="prover")
        if note.startswith("warning"):
            print(note, file=sys.stderr)
        return cls(model, tokenizer, template)

    def prove_many(
        self,
        pairs: Iterable[Pair],
        k: int = 4,
        seed: int = 0,
        *,
        temperature: float = 0.7,
        max_new_tokens: int = MAX_NEW_TOKENS,
        select_by: str = "equation-5",
        progress: bool = True,
    ) -> Iterator[tuple[Pair, list[Proof]]]:
        """(pair, its k proofs with their scores), in the pairs' order; no proofs where a pair is too long."""
        if k < 1 or temperature <= 0:
            raise InputError(f"proofs: k = {k} at temperature {temperature}; both must be above 0")
        if select_by not in SCORES:
            raise InputError(f"select_by: {select_by!r} must be one of {', '.join(SCORES)}")
        pairs = iter(pairs)
        while shard := list(islice(pairs, PAIRS_PER_CALL)):
            frames = [self._frame(pair) for pair in shard]
            limit = self.model.config.max_positions
            fits = [i for i, ids in enumerate(frames) if len(ids) < limit]
            groups = generate(
                self.model,
                [frames[i] for i in fits],
                n=k,
                max_new_tokens=[min(max_new_tokens, limit - len(frames[i])) for i in fits],
                temperature=temperature,
                seed=seed,
                keys=[f"{shard[i].id} proves {shard[i].label}" for i in fits],
                progress=progress,
            )
            written = dict(zip(fits, groups, strict=True))
            asked = [(shard[i], self._read(shard[i], sample)) for i in fits for sample in written[i]]
            scored = iter(self.score(asked, select_by))
            for i, pair in enumerate(shard):
                yield pair, list(islice(scored, len(written.get(i, []))))

    def _frame(self, pair: Pair) -> list[int]:
        """s and l as the prover is asked: the ids that stand before ẑ."""
        content = prompts.prover_prompt(pair, self.template)
        return self.tokenizer.chat([{"role": "user", "content": content}])

    def _read(self, pair: Pair, sample: Sample) -> Proof:
        """One sampled proof with the numerator: the sum of the log-probs that came with its tokens."""
        text = self.tokenizer.decode(sample.ids)
        reading = prompts.rationale_from_proof(text, self.thinking_open)
        reason = None
        if sample.finish != "stop":
            reason = "unfinished" if sample.finish == "length" else "logits were not finite"
        elif reading.rationale is None:
            reason = f"malformed: {reading.reason}"
        elif reading.label != pair.label:
            reason = "justifies the other label"
        logp_given, ids = float(sum(float(value) for value in sample.logprobs)), tuple(sample.ids)
        return Proof(pair.id, text, logp_given, finish=sample.finish, ineligible=reason, ids=ids)

    def condition(self, pair: Pair, select_by: str) -> list[int]:
        """The ids before ẑ in a score's second term; equation (5) has the frame alone, without s and l."""
        if select_by == "contrast":
            return self._frame(dataclasses.replace(pair, label=OTHER[pair.label]))
        return self.blank

    def score(self, asked: Sequence[tuple[Pair, Proof]], select_by: str = "equation-5") -> list[Proof]:
        """Every proof, the eligible ones with a score. All second terms come from one packed call."""
        rows = [(self.condition(pair, select_by), proof.ids) for pair, proof in asked if not proof.ineligible]
        tails = logprobs(self.model, [[*front, *ids] for front, ids in rows])
        sums = (float(tail[-len(ids) :].double().sum()) for tail, (_, ids) in zip(tails, rows, strict=True))
        return [proof if proof.ineligible else with_score(proof, next(sums), select_by) for _, proof in asked]


# Each from log π(ẑ | s, l) and log π(ẑ | the second condition), for one pair's proofs; higher is better.
SCORES: dict[str, Callable[[float, float], float]] = {
    "equation-5": lambda given, blank: 0.0 - given / blank,  # 0.0 - x: a certain numerator scores 0, not -0
    "numerator": lambda given, blank: given,
    "contrast": lambda given, wrong: given - wrong,  # the second condition is s with the other label
    "random": lambda given, blank: 0.0,  # all k are drawn alike: the first eligible one is a random one
}


def with_score(proof: Proof, second: float, select_by: str = "equation-5") -> Proof:
    """A proof with its score. What is certain without any condition says nothing about this pair."""
    if select_by == "equation-5" and second >= 0:
        return dataclasses.replace(proof, logp_blank=second, ineligible="certain without a condition")
    score = SCORES[select_by](proof.logp_given, second)
    blank = None if select_by == "contrast" else second
    return dataclasses.replace(proof, logp_blank=blank, score=score, select_by=select_by)


def select(proofs: Sequence[Proof]) -> Proof | None:
    """The eligible proof with the highest score, the earliest among equals; None where there is none."""
    eligible = [proof for proof in proofs if proof.score is not None]
    return max(eligible, key=lambda proof: proof.score, default=None)


def rationale_of(proof: Proof, thinking_open: bool = False) -> str:
    """A chosen proof turned back into the rationale z, in the stored form."""
    return mark(str(prompts.rationale_from_proof(proof.text, thinking_open).rationale))


def label_coherence(
    prover: Prover, pairs: Iterable[Pair], objection: Callable[[Pair, str], str | None], **sampling: Any
) -> dict[str, dict[str, Any]]:
    """How often a proof of the right label passes every rule, and how often one of the wrong label does.

    `pairs` is read twice; they have labels and were not trained on. `objection` is all rules together: the
    first reason against a rationale, or None. `sampling` goes to `prove_many`, one proof for each pair.
    Returns, under "right" and under "wrong", {"asked": n, "passed": n, "dropped": {reason: n}}. Where "wrong"
    passes nearly as often as "right", rules cannot tell a wrong pseudo-label by its proof: only the label
    filters keep it out.
    """
    counts = {}
    for name, turned in (("right", {"A": "A", "B": "B"}), ("wrong", OTHER)):
        asked = (dataclasses.replace(pair, label=turned[pair.label], rationale=None) for pair in pairs)
        reasons: list[str | None] = []
        for pair, proofs in prover.prove_many(asked, 1, **sampling):
            failed = proofs[0].ineligible if proofs else "too long to prove"
            reasons.append(failed or objection(pair, rationale_of(proofs[0], prover.thinking_open)))
        dropped = dict(Counter(filter(None, reasons)))
        counts[name] = {"asked": len(reasons), "passed": reasons.count(None), "dropped": dropped}
    return counts
