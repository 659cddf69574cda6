"""The preference-proving model: k proofs of a given label, each with what equation (5) scores it by.

A prover π_ψ reads s and the label l and writes ẑ, the proof form of a rationale (equation 3). For each pair k
proofs are sampled at a non-zero temperature from one prefill. The sampler gives the numerator of equation (5)
as it goes; one packed pass over all eligible proofs gives the denominator, or the second term of whatever
score was asked for (selection.py). Unfinished and malformed proofs, those that justify the other label, and
those that repeat the prompt's form instead of filling it in (which equation 5 would like) are not eligible.

It leaves out: which proof is picked (selection.py), the rules that its rationale must still pass
(denoise.py), and training (fit.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gramr2 import prompts
from gramr2.engine import Engine
from gramr2.files import InputError
from gramr2.model import Decoder
from gramr2.records import UNDECIDED, Pair, Proof, mark
from gramr2.requests import Limits
from gramr2.sampler import Sample, generate
from gramr2.scoring import logprobs, softmax_of
from gramr2.selection import SCORES, with_score
from gramr2.settings import pairs_per_call
from gramr2.tokenizer import Tokenizer, encoding_threads, in_threads
from gramr2.weights import load

MAX_NEW_TOKENS = 2048


class Prover:
    """A proving model, its tokenizer and the prompt that belongs to it."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: str = prompts.PROVER_PROMPT):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.engine: Engine | None = None
        self.thinking_open = tokenizer.opens_thinking

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device="cpu",
        dtype="float32",
        date: str | None = None,
        ours: str | None = None,
    ) -> Prover:
        """`ours`: a template for a checkpoint that brings none; None is this project's long one. `date` pins
        what a chat template prints as today."""
        model, tokenizer = load(directory, device, dtype, date)
        template, note = prompts.template_for(directory, kind="prover", ours=ours)
        if note.startswith("warning"):
            print(note, file=sys.stderr)
        return cls(model, tokenizer, template)

    def keep_engine(self, limits: Limits | None = None) -> None:
        """For many calls in a row: what sampling takes of the device is kept from one to the next."""
        self.engine = Engine(self.model, limits)

    def prove_many(
        self, pairs: Iterable[Pair], k: int = 4, seed: int = 0, *,
        temperature: float = 0.7, max_new_tokens: int = MAX_NEW_TOKENS,
        select_by: str = "equation-5", progress: bool = True,
    ) -> Iterator[tuple[Pair, list[Proof]]]:  # fmt: skip
        """(pair, its k proofs with their scores), in the pairs' order; no proofs where a pair is too long."""
        if k < 1 or temperature <= 0:
            raise InputError(f"proofs: k = {k} at temperature {temperature}; both must be above 0")
        if select_by not in SCORES:
            raise InputError(f"select_by: {select_by!r} must be one of {', '.join(SCORES)}")
        sampling = {"temperature": temperature, "seed": seed, "progress": progress}
        pairs = iter(pairs)
        while asked := list(islice(pairs, pairs_per_call(self.model.head_weight.device.type))):
            proved = list(zip(asked, self._write(asked, k, max_new_tokens, **sampling), strict=True))
            eligible = [(pair, proof) for pair, proofs in proved for proof in proofs if not proof.ineligible]
            terms = iter(self.second_terms(eligible, select_by))
            for pair, proofs in proved:
                scored = [
                    each if each.ineligible else with_score(each, next(terms), select_by) for each in proofs
                ]
                yield pair, scored

    def frame(self, turn: str) -> list[int]:
        """The ids that stand before ẑ: the chat frame with this user turn."""
        return self.tokenizer.chat([{"role": "user", "content": turn}])

    def _write(self, pairs: Sequence[Pair], k: int, longest: int, **sampling: Any) -> list[list[Proof]]:
        """The k proofs of each pair, without scores; none where the prompt leaves no room for any."""
        threads = encoding_threads(self.model.head_weight.device.type)
        turns = [prompts.prover_prompt(pair, self.template) for pair in pairs]
        fronts = list(in_threads(self.frame, turns, threads))
        room = [self.model.config.max_positions - len(front) for front in fronts]
        fits = [i for i, tokens in enumerate(room) if tokens > 0]
        asked, lengths = [fronts[i] for i in fits], [min(longest, room[i]) for i in fits]
        keys = [f"{pairs[i].id} proves {pairs[i].label}" for i in fits]
        sampling |= {"n": k, "max_new_tokens": lengths, "keys": keys, "engine": self.engine}
        samples = generate(self.model, asked, **sampling)
        proofs: list[list[Proof]] = [[] for _ in pairs]
        for i, group in zip(fits, samples, strict=True):
            proofs[i] = [self._read(pairs[i], sample) for sample in group]
        return proofs

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
        elif prompts.echoes(text, self.template):
            reason = "repeats the prompt's own words"
        logp_given, ids = float(sum(float(value) for value in sample.logprobs)), tuple(sample.ids)
        return Proof(pair.id, text, logp_given, finish=sample.finish, ineligible=reason, ids=ids)

    def guess(self, pairs: Sequence[Pair]) -> list[float]:
        """p(A) of each pair, of a prover that is not told the label: by how it would open its proof, the mean
        over both orders. Who trains it with `hide_label` has a second judge in it."""
        texts = (prompts.continued(prompts.proof_opening(label), self.thinking_open) for label in "AB")
        openings = list(map(self.tokenizer.encode, texts))

        def first_shown(pair: Pair) -> float:
            front = self.frame(prompts.prover_prompt(pair, self.template, hide_label=True))
            rows = [[*front, *opening] for opening in openings]
            if max(map(len, rows)) > self.model.config.max_positions:
                return UNDECIDED
            tails = zip(logprobs(self.model, rows), openings, strict=True)
            p = softmax_of(*(float(tail[-len(opening) :].double().sum()) for tail, opening in tails))
            return UNDECIDED if p is None else p

        return [(first_shown(pair) + 1 - first_shown(pair.swapped())) / 2 for pair in pairs]

    def second_terms(self, proofs: Sequence[tuple[Pair, Proof]], select_by: str) -> list[float]:
        """The second term of each proof's score: log π(ẑ | empty user turn), equation (5)'s denominator, or
        what another score asks for. One packed pass over all of them."""
        condition = SCORES[select_by].condition
        rows = [[*self.frame(condition(pair, self.template)), *proof.ids] for pair, proof in proofs]
        tails = zip(logprobs(self.model, rows), proofs, strict=True)
        return [float(tail[-len(proof.ids) :].double().sum()) for tail, (_, proof) in tails]


def as_rationale(proof: Proof, thinking_open: bool = False) -> str:
    """A chosen proof turned back into the rationale z, in the stored form."""
    return mark(str(prompts.rationale_from_proof(proof.text, thinking_open).rationale))
