"""The reward model at work: pairs in, verdicts with reasons and probabilities out; lists in, rankings out.

A judge's answer is sampled several times, half of the votes with the responses exchanged (votes.py). The
label is what most votes say. After a rationale the softmax of one answer says what that rationale concluded,
almost always above 0.99; how sure the model is shows in how its rationales disagree. So p_a is the mean of
the two orders' means of what each vote is worth: its letter says the side, its softmax over {A, B} how far
(`Judgment.from_votes`). Majorities that change with the order are no preference: p_a then reads 0.5,
`orders_agree` is false, and the label is only the side to which the votes lean.

A discriminative model scores each response by itself, and has no votes to count. What other kinds of judges
there are is a `Format` each.

It leaves out: benchmarks (extras/evaluate.py), filters (denoise.py), which comparisons a list needs
(rankings.py), published judges' formats (extras/formats.py).

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch

from gramr2 import prompts
from gramr2.engine import Engine
from gramr2.fields import Fields
from gramr2.files import InputError, JsonRow, need, read_json, short_hash
from gramr2.kernels.packed_attention import packed_causal, packed_positions
from gramr2.model import Decoder
from gramr2.rankings import Contest, Duel, Ranking, preference
from gramr2.records import UNDECIDED, Judgment, Messages, Pair, Vote
from gramr2.requests import Limits
from gramr2.sampler import generate
from gramr2.scoring import softmax_of
from gramr2.settings import pairs_per_call
from gramr2.tokenizer import Tokenizer
from gramr2.votes import SCALAR, THINK, Asker, Format, Voter, too_long
from gramr2.weights import fingerprint, load

MAX_NEW_TOKENS = 4096
CALIBRATION = "calibration.json"  # in the model directory
Found = TypeVar("Found")
Judged = tuple[Pair, Judgment | InputError]


class RewardModel:
    """A judge: a model, its tokenizer, the prompt that belongs to it, and the format that it answers in."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, template=prompts.JUDGE_PROMPT, format: Format = THINK
    ):
        self.model, self.tokenizer, self.template, self.format = model, tokenizer, template, format
        self.voter: Asker | None = Voter(model, tokenizer, template, format) if format.endings else None
        self.calibration: JsonRow = {}  # fitted by extras/evaluate.py; empty: none
        self.weights = ""  # a hash of them, where a calibration was fitted to some

    @classmethod
    def load(
        cls, directory: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32",
        prompt: str | Path | None = None, format: Format | None = None, date: str | None = None,
        ours: str | None = None,
    ) -> RewardModel:  # fmt: skip
        """`prompt`: a template file in place of the checkpoint's own. `format`: None takes the model's kind.

        `ours`: a template for a checkpoint that brings none; None is the format's. `date` pins what a chat
        template prints as today.
        """
        model, tokenizer = load(directory, device, dtype, date)
        has_head = model.config.num_labels > 0
        format = format or (SCALAR if has_head else THINK)
        if has_head != (format == SCALAR):
            head = "a scalar head" if has_head else "no scalar head"
            raise InputError(f"{directory}: has {head}, and cannot be read as {format.name}")
        template = format.prompt
        if format.endings:
            template, note = prompts.template_for(directory, prompt, ours=ours or format.prompt)
            if note.startswith("warning"):
                print(note, file=sys.stderr)
        judge = cls(model, tokenizer, template, format)
        if (Path(directory) / CALIBRATION).exists():
            judge.calibration = read_calibration(Path(directory) / CALIBRATION)
            judge.weights = fingerprint(directory)
        return judge

    def keep_engine(self, limits: Limits | None = None) -> None:
        """For many calls in a row: what sampling takes of the device (on CUDA most of its memory) is kept
        from one to the next. Not for a judge beside a training, which needs that memory in between."""
        if isinstance(self.voter, Voter):
            self.voter.generate = partial(generate, engine=Engine(self.model, limits))

    @property
    def prompt_hash(self) -> str:
        return short_hash(self.template.encode()) if self.voter else ""

    @property
    def calibration_hash(self) -> str:
        return short_hash(str(self.calibration).encode())

    # ------------------------------------------------------------------ pairs

    def judge(self, question: str, a: str, b: str, votes: int = 16, seed: int = 0) -> Judgment:
        """One pair. An answer that could not be had is an InputError."""
        pair = Pair((("user", question),), a, b)
        return raise_if_error(next(self.judge_many([pair], votes, seed, progress=False))[1])

    def judge_many(
        self, pairs: Iterable[Pair], votes: int = 4, seed: int = 0, *,
        temperature: float | None = None, top_p: float = 1.0, top_k: int = 0,
        max_new_tokens: int = MAX_NEW_TOKENS, progress: bool = True, per_call: int | None = 0,
    ) -> Iterator[Judged]:  # fmt: skip
        """(pair, judgment) in the pairs' order; a pair that cannot be judged comes with the reason.

        One vote is greedy and in the given order; more are sampled at temperature 1, half in each order.
        `per_call`: pairs of one generate call; 0: as many as suit the device; None: all of them.
        """
        if votes < 1 or (votes > 1 and votes % 2):
            raise InputError(f"votes: {votes}; expected 1, or an even number (half in each order)")
        if temperature is None:
            temperature = float(votes > 1)
        if self.format.parse is None:  # the letters' distribution is known without drawing from it
            votes, temperature, max_new_tokens = 2, 0.0, 1
        calibrated = self.calibrates(votes, temperature, top_p, top_k)
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "progress": progress}
        calls = iter_calls(pairs, self.per_call if per_call == 0 else per_call)
        for pair, judgment in self._judged(calls, votes, seed, max_new_tokens, **sampling):
            yield pair, self._calibrated(judgment) if calibrated else judgment

    @property
    def per_call(self) -> int:
        """Pairs that suit one call."""
        return pairs_per_call(self.model.head_weight.device.type)

    def _judged(self, calls: Iterable[list[Pair]], *how: Any, **sampling: Any) -> Iterator[Judged]:
        for together in calls:
            if self.voter:
                judged = self.voter.judgments(together, *how, **sampling)
            else:
                judged = [self._compare_scores(pair) for pair in together]
            yield from zip(together, judged, strict=True)

    def calibrates(self, votes: int, temperature: float, top_p: float = 1.0, top_k: int = 0) -> bool:
        """Whether the directory's calibration is for such votes of this judge, with these weights and this
        prompt: others are distributed in another way."""
        fitted = self.calibration
        if fitted.get("judge") != f"{self.weights} {self.prompt_hash}":
            return False
        if self.format.parse is None:  # nothing is sampled
            return fitted["votes"] == (2 if self.voter else 0)
        if (fitted["votes"], fitted["greedy"]) != (votes, not temperature):
            return False
        return fitted["greedy"] or fitted["drawn"] == (temperature, top_p, top_k)

    def _calibrated(self, judgment: Judgment | InputError) -> Judgment | InputError:
        if isinstance(judgment, InputError) or judgment.p_a == UNDECIDED:
            return judgment
        p_a = float(np.interp(judgment.p_a, self.calibration["p"], self.calibration["calibrated"]))
        same_side = (p_a > UNDECIDED) == (judgment.p_a > UNDECIDED)
        return dataclasses.replace(judgment, p_a=p_a if same_side else UNDECIDED)

    # ------------------------------------------------------------------ scores

    def _compare_scores(self, pair: Pair) -> Judgment | InputError:
        if pair.response_a == pair.response_b:
            return Judgment.from_votes([])
        try:
            a, b = (self.score(pair.messages, each) for each in (pair.response_a, pair.response_b))
        except InputError as error:  # too long; a template may refuse a conversation's roles
            return InputError(f"pair {pair.id}: {error}")
        p_a = softmax_of(a, b)
        if p_a is None:
            return Judgment.from_votes([Vote(None, "AB", None, "the scores are not finite")])
        label = None if a == b else "A" if a > b else "B"
        return Judgment(label, p_a, {"A": 0, "B": 0, "none": 0}, scores=(a, b))

    def score(self, messages: Messages, response: str) -> float:
        """What a scoring model gives a response."""
        ids, _ = self.tokenizer.example(messages, response)
        if len(ids) > self.model.config.max_positions:
            raise too_long(len(ids), self.model.config.max_positions)
        return self.scores([ids])[0]

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The scalar head at each sequence's last token; of a language model, its logit of id 0.

        A pass for each: a response is long enough to fill a device, and its score is its own to the bit.
        """
        head = self.model.score
        weight_D = (self.model.head_weight if head is None else head.weight)[0].float()
        results, device = [], weight_D.device
        for ids in sequences:
            lengths = [len(ids)]
            ids_T = torch.tensor(ids, device=device)
            hidden_TD = self.model(ids_T, packed_positions(lengths, device), packed_causal(lengths, device))
            results.append(float(hidden_TD[-1].float() @ weight_D))
        return results

    # ------------------------------------------------------------------ lists

    def best_of(
        self, question: str, responses: Sequence[str], method: str = "linear", **sampling: Any
    ) -> Ranking:
        """The best of n in n - 1 comparisons: one after the other, or in rounds that are a batch each."""
        return raise_if_error(self.contests([(question, responses)], method, full=False, **sampling)[0])

    def rank(
        self, question: str | Messages, responses: Sequence[str], method: str = "merge", **sampling: Any
    ) -> Ranking:
        """All n in order. "linear" and "knockout" find the best first, and merge the others."""
        return raise_if_error(self.contests([(question, responses)], method, **sampling)[0])

    def contests(
        self, lists: Sequence[tuple[str | Messages, Sequence[str]]], method: str, full: bool = True,
        votes: int = 4, seed: int = 0, **sampling: Any,
    ) -> list[Ranking | InputError]:  # fmt: skip
        """A ranking of each (question, or its turns; responses).

        What all of them wait for at one time is one batch.
        """
        contests = [Contest(len(responses)) for _, responses in lists]
        searches = {k: contest.search(method, full) for k, contest in enumerate(contests)}
        results: dict[int, Ranking | InputError] = {}
        while searches:
            wanted: list[tuple[int, Duel]] = []
            for k, search in list(searches.items()):
                try:
                    wanted += [(k, duel) for duel in next(search) if duel not in contests[k].p]
                except StopIteration as stop:
                    results[k] = stop.value
                    del searches[k]
            pairs = [_as_pair(*lists[k], *duel) for k, duel in wanted]
            judged = self.judge_many(pairs, votes, seed, per_call=None, **sampling)
            for (k, duel), (_, judgment) in zip(wanted, judged, strict=True):
                if isinstance(judgment, InputError):
                    results[k] = judgment
                    searches.pop(k, None)
                else:
                    contests[k].add_answer(duel, judgment)
            for k in {k for k, _ in wanted}:
                contests[k].rounds += 1
        return [results[k] for k in range(len(lists))]

    # ------------------------------------------------------------------ rewards

    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], references: Sequence[str] | None = None, *,
        votes: int = 2, seed: int = 0, log: list[tuple[Pair, Judgment | InputError]] | None = None,
        **sampling: Any,
    ) -> list[float]:  # fmt: skip
        """Rewards of rollouts, from one batch of comparisons.

        With references: the probability that a completion is better than its own, the mean over both orders
        and all votes. Without: a scoring model's score; else a round-robin among the completions of the same
        prompt, and the share that each has won. Whatever cannot be judged counts one half. `log` is given
        every (pair, judgment).
        """
        as_many = completions if references is None else references
        if not len(prompts) == len(completions) == len(as_many):
            raise InputError("reward: prompts, completions and references must be as many")
        questions = [(("user", prompt),) for prompt in prompts]
        if references is None and self.format.endings is None:
            return [self.score(*each) for each in zip(questions, completions, strict=True)]
        if references is not None:
            pairs = [Pair(*each) for each in zip(questions, completions, references, strict=True)]
        else:
            duels = [(i, j) for i, j in combinations(range(len(prompts)), 2) if prompts[i] == prompts[j]]
            pairs = [Pair(questions[i], completions[i], completions[j]) for i, j in duels]
        judged = list(self.judge_many(pairs, votes, seed, per_call=None, **sampling))
        if log is not None:
            log += judged
        preferences = [preference(judgment) for _, judgment in judged]
        return preferences if references is not None else _shares_won(duels, preferences, len(prompts))


def iter_calls(pairs: Iterable[Pair], per_call: int | None) -> Iterator[list[Pair]]:
    """Pairs, so many together; None: all of them."""
    pairs = iter(pairs)
    while together := list(islice(pairs, per_call)):
        yield together


def _shares_won(duels: Sequence[Duel], preferences: Sequence[float], count: int) -> list[float]:
    """Of each of `count` rollouts, the share of its duels that it won; a draw, and no duel, is one half."""
    won: list[list[float]] = [[] for _ in range(count)]
    for (i, j), p in zip(duels, preferences, strict=True):
        share = 1.0 if p > UNDECIDED else 0.0 if p < UNDECIDED else 0.5
        won[i].append(share)
        won[j].append(1 - share)
    return [fmean(each) if each else UNDECIDED for each in won]


def read_calibration(path: Path) -> JsonRow:
    """A map of probabilities to frequencies: it rises, from 0 to 1, and says whose it is."""
    fields = Fields(read_json(path), f"{path}: ")
    found = {"votes": fields.get("votes", int, low=0), "greedy": fields.get("greedy", bool)}
    found["drawn"] = fields.get("drawn", tuple[float, ...], (1.0, 1.0, 0.0))  # temperature, top_p, top_k
    found |= {name: fields.get(name, tuple[float, ...], low=0, high=1) for name in ("p", "calibrated")}
    p, calibrated = map(list, (found["p"], found["calibrated"]))
    rises = len(p) == len(calibrated) > 0 and p == sorted(p) and calibrated == sorted(calibrated)
    need(rises, f"{path}: p and calibrated should be as many, and rise; fit it again (infer.py --calibrate)")
    return found | {"judge": fields.get("judge", str, "")}


def raise_if_error(found: Found | InputError) -> Found:
    if isinstance(found, InputError):
        raise found
    return found


def _as_pair(question: str | Messages, responses: Sequence[str], i: int, j: int) -> Pair:
    messages = (("user", question),) if isinstance(question, str) else tuple(question)
    return Pair(messages, responses[i], responses[j])
