"""Votes: pairs asked in both orders, one generate call, and each sampled answer read into a `Vote`.

Half of a pair's votes are asked with the responses exchanged, and turned back when they are read. A verdict
comes with a probability, the softmax over the two letters at the place where its letter stands among the
sampled ids. Where a sample writes its verdict in another way than the canonical one, the canonical ending is
scored after its rationale instead. What cannot be read is an abstention, counted, and never A or B.

`Format` is all that tells one kind of judge from another. Two kinds stand here: `THINK`, the paper's, and
`SCALAR`, the discriminative baseline, which casts no votes.

It leaves out: what votes come to (records.Judgment), how a verdict is parsed (prompts.py), sampling itself
(sampler.py), other published judges (extras/formats.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from gramr2 import prompts
from gramr2.files import InputError, need
from gramr2.kernels.choice import noise_seed
from gramr2.model import Decoder
from gramr2.records import OTHER, UNDECIDED, Judgment, Pair, Vote
from gramr2.sampler import Sample, generate
from gramr2.scoring import logprobs, softmax_of
from gramr2.tokenizer import Tokenizer, encoding_threads, in_threads


@dataclass(frozen=True)
class Format:
    """A kind of judge: all that tells it from the others.

    Without `endings` it writes nothing, and scores each response by itself. With `endings` and without
    `parse` it writes its letter at once: the likelier one is the verdict, and nothing need be sampled.
    """

    name: str
    description: str  # whose kind it is, and where its verdict stands, in words
    endings: tuple[str, str] | None = None  # its canonical verdicts, for A and for B
    openings: tuple[str, ...] = ()  # how the verdicts that `parse` reads may begin
    parse: Callable[[str, bool], prompts.Verdict] | None = None  # (text, thinking_open) → the verdict
    prompt: str = prompts.JUDGE_PROMPT  # asked where the checkpoint brings none

    @property
    def reading(self) -> str:
        """How verdict and probability are read, in words."""
        p = "the softmax over the two letters there, mean over votes, then over orders"
        if self.endings is None:
            p = "the sigmoid of the difference of the two (Bradley-Terry)"
        elif self.parse is None:
            p = "the softmax over A and B at the first token, mean over both orders; nothing is sampled"
        return f"{self.description}; p is {p}"


_CANONICAL = (prompts.label_target("A"), prompts.label_target("B"))
_AFTER_THINKING = "GRAM-R²: <answer>A</answer> after the thinking"
THINK = Format("think", _AFTER_THINKING, _CANONICAL, ("<answer>",), prompts.parse_verdict)
SCALAR = Format("scalar", "a discriminative model: the response with the higher scalar")


class Query(NamedTuple):
    """A pair as it is asked in one order."""

    key: str  # names it to the sampler's noise
    order: str  # "AB" as given, "BA" exchanged
    ids: list[int]


class Voter:
    """A model that is asked about pairs, and the reader of its answers."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: str, format: Format):
        assert format.endings is not None, "a judge that writes nothing has no votes"
        self.model, self.tokenizer, self.template = model, tokenizer, template
        # What the model is asked by: with an engine that is kept, or as one caller of a server among others.
        self.generate: Callable[..., list[list[Sample]]] | None = None
        self.logprobs = logprobs
        self.format, self.endings = format, format.endings
        a, b = map(tokenizer.encode, self.endings)
        differ = _first_difference(a, b)
        # The ids that tell the two verdicts apart, and the text that stands before them.
        self.letters, self.verdict_prefix = (a[differ], b[differ]), tokenizer.decode(a[:differ])
        self.thinking_open = tokenizer.opens_thinking

    def ask(self, pair: Pair, order: str) -> Query:
        """A pair's prompt; neither label nor rationale is shown to a judge."""
        shown = pair.swapped() if order == "BA" else pair
        content = prompts.judge_prompt(shown, self.template)
        ids = self.tokenizer.chat([{"role": "user", "content": content}])
        return Query(f"{pair.id} {order}", order, ids)

    def _queries(self, count: int, pair: Pair) -> list[Query] | InputError:
        """A pair as it is asked for so many votes, or why it cannot be."""
        orders = ("AB", "BA")[: 1 + (count > 1)] if pair.response_a != pair.response_b else ()
        try:
            return [self.ask(pair, order) for order in orders]
        except InputError as error:  # a word that the tokenizer does not have; what a template refuses
            return InputError(f"pair {pair.id}: {error}")

    def judgments(
        self, pairs: Sequence[Pair], count: int, seed: int,
        max_new_tokens: int, **sampling: Any,
    ) -> list[Judgment | InputError]:  # fmt: skip
        """Each pair by `count` votes, all from one generate call; by none on identical responses.

        `sampling` goes to it: temperature, top_p, top_k, progress.
        """
        found: list[list[Vote] | InputError] = []
        asked: list[tuple[Query, list[Vote]]] = []  # with the list that its votes go to
        room = self.model.config.max_positions
        threads = encoding_threads(self.model.head_weight.device.type)
        every = in_threads(partial(self._queries, count), pairs, threads)
        for pair, queries in zip(pairs, every, strict=True):
            if isinstance(queries, InputError):
                found.append(queries)
                continue
            ballot: list[Vote] = []
            tokens = max((len(query.ids) for query in queries), default=0)
            if tokens < room:
                found.append(ballot)
                asked += [(query, ballot) for query in queries]
            else:
                found.append(too_long(pair, tokens, room))
        answers = (self.generate or generate)(
            self.model,
            [query.ids for query, _ in asked],
            n=max(1, count // 2),
            max_new_tokens=[min(max_new_tokens, room - len(query.ids)) for query, _ in asked],
            watch=self.letters,
            seed=seed,
            keys=[query.key for query, _ in asked],
            **sampling,
        )
        for (query, ballot), samples in zip(asked, answers, strict=True):
            for number, sample in enumerate(samples):
                ballot.append(self.read(query, sample, noise_seed(seed, query.key, number)))
        return [
            each
            if isinstance(each, InputError)
            else replace(Judgment.from_votes(each), forged=prompts.forged(pair, self.template))
            for pair, each in zip(pairs, found, strict=True)
        ]

    def read(self, query: Query, sample: Sample, seed: int) -> Vote:
        """One sampled answer as a vote in the pair's own order."""
        text, p_a, label = self.tokenizer.decode(sample.ids), None, None
        if sample.finish == "error":
            reason = "no finite logits"
        elif self.format.parse is None:
            p_a = softmax_of(*sample.watched[0]) if sample.watched else None
            label = None if p_a is None or p_a == UNDECIDED else "A" if p_a > UNDECIDED else "B"
            reason = "no finite logits" if p_a is None else "" if label else "both letters are as likely"
        elif sample.finish == "length":
            reason = "cut at the length limit"
        else:
            label, reason = self.format.parse(text, self.thinking_open)
            if label is not None:
                start = max(map(text.rfind, self.format.openings))  # of the verdict that was read
                p_a = self._softmax_at_letter(sample, text, start)
                if p_a is None:
                    p_a = self._softmax_after(query.ids, text[:start])
                if p_a is None:
                    label, reason = None, "no room to score the verdict, or no finite logits"
        if query.order == "BA":
            label, p_a = OTHER[label], None if p_a is None else 1 - p_a
        return Vote(label, query.order, p_a, reason, text, seed, len(sample.ids))

    def reading(self, pair: Pair, rationale: str) -> float | None:
        """p(A) among {A, B} where the judge is given a rationale, as shown, instead of writing one."""
        written = prompts.continued(f"<think>\n{rationale}\n</think>\n", self.thinking_open)
        return self._softmax_after(self.ask(pair, "AB").ids, written)

    def _softmax_at_letter(self, sample: Sample, text: str, start: int) -> float | None:
        """p(A) among {A, B} where the verdict at `start` was sampled in its canonical form."""
        for place in range(len(sample.ids) - 1, -1, -1):
            if sample.ids[place] in self.letters:
                before = self.tokenizer.decode(sample.ids[:place])
                ending = self.endings[self.letters.index(sample.ids[place])]
                if before == text[:start] + self.verdict_prefix and text.startswith(ending, start):
                    return softmax_of(*sample.watched[place])
        return None

    def _softmax_after(self, prompt_ids: list[int], written: str) -> float | None:
        """p(A) among {A, B} in the canonical ending, scored after what was written before the verdict.

        A pass of its own: what else is judged beside it must not change its last bits.
        """
        try:
            a, b = (self.tokenizer.encode(written + ending) for ending in self.endings)
        except InputError:  # what was sampled is no text of this tokenizer
            return None
        differ = _first_difference(a, b)
        if len(prompt_ids) + differ >= self.model.config.max_positions:
            return None
        scored = self.logprobs(self.model, [prompt_ids + ending[: differ + 1] for ending in (a, b)])
        return softmax_of(float(scored[0][-1]), float(scored[1][-1]))


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    differ = [i for i, (one, two) in enumerate(zip(a, b, strict=False)) if one != two]
    need(len(differ) > 0, "the tokenizer does not tell a verdict for A from one for B; take another model")
    return differ[0]


def too_long(pair: Pair, tokens: int, room: int) -> InputError:
    return InputError(f"pair {pair.id}: {tokens} tokens are too many for the model's {room} positions")
