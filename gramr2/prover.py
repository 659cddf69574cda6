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
  Training drops the condition in a tenth of the examples (fit.py), so that this means something;
- unfinished and malformed proofs, and those that justify the other label, are not eligible.

Scores rank the proofs of one pair. They are not compared across pairs.

It leaves out: the rules that a chosen rationale must still pass (denoise.py), and training (fit.py).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from gramr2 import prompts
from gramr2.files import InputError
from gramr2.model import Decoder
from gramr2.records import Pair, Proof, mark
from gramr2.sampler import Sample, generate
from gramr2.scoring import logprobs
from gramr2.tokenizer import Tokenizer
from gramr2.weights import load

SHARD = 64  # pairs of one generate call
MAX_NEW_TOKENS = 2048


class Prover:
    """A proving model, its tokenizer and the prompt that belongs to it."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: str = prompts.PROVER_PROMPT):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        # The denominator's frame: a user turn with nothing in it.
        self.blank = tokenizer.chat([{"role": "user", "content": ""}])
        self.opened = tokenizer.opened_thinking([{"role": "user", "content": ""}])

    @classmethod
    def load(cls, directory: str | Path, device="cpu", dtype="float32") -> Prover:
        model, tokenizer = load(directory, device, dtype)
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
        progress: bool = True,
    ) -> Iterator[tuple[Pair, list[Proof]]]:
        """(pair, its k proofs with their scores), in the pairs' order; no proofs where a pair is too long."""
        if k < 1 or temperature <= 0:
            raise InputError(f"proofs: k = {k} at temperature {temperature}; both must be above 0")
        pairs = iter(pairs)
        while shard := list(islice(pairs, SHARD)):
            frames = [self.tokenizer.chat(self._messages(pair)) for pair in shard]
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
            proofs = [
                self._read(pair, sample) for i, pair in enumerate(shard) for sample in written.get(i, [])
            ]
            scored = iter(self.score(proofs))
            for i, pair in enumerate(shard):
                yield pair, list(islice(scored, len(written.get(i, []))))

    def _messages(self, pair: Pair) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompts.prover_prompt(pair, self.template)}]

    def _read(self, pair: Pair, sample: Sample) -> Proof:
        """One sampled proof with the numerator, which the sampler has already summed up token by token."""
        text = self.tokenizer.decode(sample.ids)
        reading = prompts.rationale_from_proof(text, self.opened)
        reason = None
        if sample.finish != "stop":
            reason = "unfinished"
        elif reading.rationale is None:
            reason = f"malformed: {reading.reason}"
        elif reading.label != pair.label:
            reason = "justifies the other label"
        logp_given = float(sum(float(value) for value in sample.logprobs))
        return Proof(
            pair.id, text, logp_given, finish=sample.finish, ineligible=reason, ids=tuple(sample.ids)
        )

    def score(self, proofs: Sequence[Proof]) -> list[Proof]:
        """Equation (5) for eligible proofs: one packed pass gives every denominator."""
        eligible = [proof for proof in proofs if proof.ineligible is None]
        tails = logprobs(self.model, [[*self.blank, *proof.ids] for proof in eligible])
        blanks = iter(float(tail[len(self.blank) - 1 :].double().sum()) for tail in tails)
        return [with_score(proof, next(blanks)) if proof.ineligible is None else proof for proof in proofs]


def with_score(proof: Proof, logp_blank: float) -> Proof:
    """Equation (5). A proof that is certain without any condition says nothing about this pair."""
    if logp_blank >= 0:
        return dataclasses.replace(proof, logp_blank=logp_blank, ineligible="certain without a condition")
    # 0.0 - x, so that a certain numerator scores 0 and not -0.
    score = 0.0 - proof.logp_given / logp_blank
    return dataclasses.replace(proof, logp_blank=logp_blank, score=score)


def select(proofs: Sequence[Proof]) -> Proof | None:
    """The best eligible proof by equation (5), the earlier one among equals; None where there is none."""
    eligible = [proof for proof in proofs if proof.score is not None]
    return max(eligible, key=lambda proof: proof.score, default=None)


def rationale_of(proof: Proof, opened: bool = False) -> str:
    """A chosen proof turned back into the rationale z, in the stored form."""
    return mark(str(prompts.rationale_from_proof(proof.text, opened).rationale))
