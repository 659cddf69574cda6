"""Votes: pairs asked in both orders, and each answer read into a `Vote`.

Half of a pair's votes are asked with the responses exchanged, and turned back when they are read. A verdict
comes with a probability, the softmax over the two letters at the place where its letter stands among the
sampled ids. Where a sample writes its verdict in another way than the canonical one, the canonical ending is
scored after its rationale instead. What cannot be read is an abstention, counted, and never A or B.

`Format` is all that tells one kind of judge from another. Two kinds stand here: `THINK`, the paper's, and
`SCALAR`, the discriminative baseline, which casts no votes. `Asker` asks and reads, whoever answers; `Voter`
asks a model that is here, in one generate call.

It leaves out: what votes come to (records.Judgment), how a verdict is parsed (prompts.py), sampling itself
(sampler.py), other published judges (extras/formats.py), judges elsewhere (extras/remote.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    roles: bool = False  # where an endpoint takes the responses as turns of their own, with its own prompt

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
    prompt: Any  # ids for a model that is here, the text itself for one that is elsewhere


class Answer(NamedTuple):
    """What a judge wrote to one query."""

    text: str
    finish: str  # "stop", "length", "error" (a model's logits were not finite), or an endpoint's own word
    seed: int  # of its own noise
    tokens: int
    # p(A) among {A, B}, and what there is to say of it: of the verdict that begins at a place in the text.
    p_at: Callable[[int], tuple[float | None, str]]


Answers = Iterable[Iterable[Answer]]  # to each of several queries


class Asker:
    """Asks for votes on pairs, and reads the answers. Who answers is a subclass's."""

    ask: Callable[[Pair, str], Query]  # a pair in one order
    answers: Callable[..., Answers]  # (queries, n, seed, max_new_tokens) → n to each
    thinking_open = False  # whether answers begin inside the thinking
    threads = 1  # that prompts are made in

    def __init__(self, template: str, format: Format):
        assert format.endings is not None, "a judge that writes nothing has no votes"
        self.template, self.format, self.endings = template, format, format.endings

    def content(self, pair: Pair, order: str) -> str:
        """What is asked about a pair; neither label nor rationale is shown to a judge."""
        return prompts.judge_prompt(pair.swapped() if order == "BA" else pair, self.template)

    def queries(self, count: int, pair: Pair) -> list[Query] | InputError:
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
        """Each pair by `count` votes, all asked at once; by none on identical responses.

        `sampling` goes on to who answers: temperature, top_p, top_k, progress.
        """
        found: list[list[Vote] | InputError] = []
        asked: list[tuple[Query, list[Vote]]] = []  # with the list that its votes go to
        for queries in in_threads(partial(self.queries, count), pairs, self.threads):
            if isinstance(queries, InputError):
                found.append(queries)
                continue
            ballot: list[Vote] = []
            found.append(ballot)
            asked += [(query, ballot) for query in queries]
        each_n, every = max(1, count // 2), [query for query, _ in asked]
        answers = self.answers(every, each_n, seed, max_new_tokens, **sampling)
        for (query, ballot), given in zip(asked, answers, strict=True):
            ballot += [self.read(query, answer) for answer in given]
        return [
            each
            if isinstance(each, InputError)
            else replace(Judgment.from_votes(each), forged=prompts.forged(pair, self.template))
            for pair, each in zip(pairs, found, strict=True)
        ]

    def read(self, query: Query, answer: Answer) -> Vote:
        """One answer as a vote in the pair's own order."""
        text, p_a, label = answer.text, None, None
        if answer.finish == "error":
            reason = "no finite logits"
        elif self.format.parse is None:
            p_a, reason = answer.p_at(0)
            label = None if p_a is None or p_a == UNDECIDED else "A" if p_a > UNDECIDED else "B"
            reason = reason if label or p_a is None else "both letters are as likely"
        elif answer.finish == "length":
            reason = "cut at the length limit"
        elif answer.finish != "stop":
            reason = f"ended by {answer.finish}"
        else:
            label, reason = self.format.parse(text, self.thinking_open)
            if label is not None:
                start = max(map(text.rfind, self.format.openings))  # of the verdict that was read
                p_a, note = answer.p_at(start)
                label, reason = label if p_a is not None else None, note or reason
        if query.order == "BA":
            label, p_a = OTHER[label], None if p_a is None else 1 - p_a
        return Vote(label, query.order, p_a, reason, text, answer.seed, answer.tokens)


class Voter(Asker):
    """A model here that is asked about pairs."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: str, format: Format):
        super().__init__(template, format)
        self.model, self.tokenizer = model, tokenizer
        # What the model is asked by: with an engine that is kept, or as one caller of a server among others.
        self.generate: Callable[..., list[list[Sample]]] | None = None
        self.logprobs = logprobs
        a, b = map(tokenizer.encode, self.endings)
        differ = _first_difference(a, b)
        # The ids that tell the two verdicts apart, and the text that stands before them.
        self.letters, self.verdict_prefix = (a[differ], b[differ]), tokenizer.decode(a[:differ])
        self.thinking_open = tokenizer.opens_thinking
        self.threads = encoding_threads(model.head_weight.device.type)

    def ask(self, pair: Pair, order: str) -> Query:
        """A pair's prompt in the checkpoint's own frame."""
        ids = self.tokenizer.chat([{"role": "user", "content": self.content(pair, order)}])
        return Query(f"{pair.id} {order}", order, ids)

    def queries(self, count: int, pair: Pair) -> list[Query] | InputError:
        queries, room = super().queries(count, pair), self.model.config.max_positions
        if isinstance(queries, InputError):
            return queries
        tokens = max((len(query.prompt) for query in queries), default=0)
        return queries if tokens < room else InputError(f"pair {pair.id}: {too_long(tokens, room)}")

    def answers(self, queries: Sequence[Query], n: int, seed: int, most: int, **sampling: Any) -> Answers:
        asked, room = [query.prompt for query in queries], self.model.config.max_positions
        sampling |= {"max_new_tokens": [min(most, room - len(ids)) for ids in asked], "seed": seed}
        sampling |= {"keys": [query.key for query in queries], "watch": self.letters}
        sampled = (self.generate or generate)(self.model, asked, n=n, **sampling)
        for query, samples in zip(queries, sampled, strict=True):
            seeds = (noise_seed(seed, query.key, number) for number in range(n))
            yield [self.answer(query, *each) for each in zip(samples, seeds, strict=True)]

    def answer(self, query: Query, sample: Sample, seed: int) -> Answer:
        """A sample, as it is read."""
        text = self.tokenizer.decode(sample.ids)
        p_at = partial(self._p_at, query, sample, text)
        return Answer(text, sample.finish, seed, len(sample.ids), p_at)

    def _p_at(self, query: Query, sample: Sample, text: str, start: int) -> tuple[float | None, str]:
        """What was sampled, or, where the verdict is written otherwise, its canonical form scored instead."""
        if self.format.parse is None:
            p_a = softmax_of(*sample.watched[0]) if sample.watched else None
            return p_a, "" if p_a is not None else "no finite logits"
        p_a = self._softmax_at_letter(sample, text, start)
        if p_a is None:
            p_a = self._softmax_after(query.prompt, text[:start])
        return p_a, "" if p_a is not None else "no room to score the verdict, or no finite logits"

    def reading(self, pair: Pair, rationale: str) -> float | None:
        """p(A) among {A, B} where the judge is given a rationale, as shown, instead of writing one."""
        written = prompts.continued(f"<think>\n{rationale}\n</think>\n", self.thinking_open)
        return self._softmax_after(self.ask(pair, "AB").prompt, written)

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


def too_long(tokens: int, room: int) -> InputError:
    return InputError(f"{tokens} tokens are too many for the model's {room} positions")
