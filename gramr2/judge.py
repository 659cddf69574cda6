"""The reward model at work: pairs in, verdicts with reasons and probabilities out; lists in, rankings out.

A judge's answer is sampled several times, half of the votes with the responses exchanged. After a rationale
the softmax of one answer says what that rationale concluded, almost always above 0.99; how sure the model is
shows in how its rationales disagree. So p_a is the mean of the two orders' means of the verdict's softmax
over {A, B}. Majorities that change with the order are no preference: p_a then reads 0.5, `orders_agree` is
false, and the label is only the side to which the votes lean.

Verdicts are parsed strictly (prompts.py): what cannot be read is an abstention, counted, and never A or B.
The softmax is read where the letter stands among the sampled ids. Where a sample writes its verdict in
another way than the canonical one, the canonical ending is scored after its rationale instead. `FORMATS`
lists the kinds of judges; two of them score a response by itself, and have no votes to count.

Lists: the paper's linear search for the best and its divide and conquer (a knockout), its full ranking by
repeated selection and, ours, a merge sort. Each is a generator that stops where it needs answers, so that
whatever waits at the same time, in one list or in many, is one batch (`Contest`).

It leaves out: benchmarks (extras/evaluate.py), filters (denoise.py), sampling itself (sampler.py).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from gramr2 import prompts
from gramr2.files import InputError, read_json
from gramr2.model import Decoder, packed_causal, packed_positions
from gramr2.records import OTHER, UNDECIDED, Judgment, Pair, Vote
from gramr2.sampler import Sample, generate
from gramr2.scoring import logprobs
from gramr2.tokenizer import Tokenizer
from gramr2.weights import load
from kernels.choice import noise_seed

PAIRS_PER_CALL = 64  # pairs of one generate call: enough to fill a batch, little to do again after a kill
MAX_NEW_TOKENS = 4096
CALIBRATION = "calibration.json"  # in the model directory


class Format(NamedTuple):
    """A kind of judge: its canonical verdicts for A and for B, and how verdicts that it reads may begin.

    No verdicts (None): it scores each response by itself.
    """

    endings: tuple[str, str] | None
    openings: tuple[str, ...]
    reading: str  # how verdict and probability are read, in words


_P = "p is the softmax over the two letters there, mean over votes, then over orders"
_P1 = "p is the softmax over A and B at the first token, mean over both orders; nothing is sampled"
_BT = "p is the sigmoid of the difference of the two (Bradley-Terry)"
_THINK = (prompts.label_target("A"), prompts.label_target("B"))
_R1 = ("<answer>[[A]]</answer>", "<answer>[[B]]</answer>")
_BOXES = (r"\boxed{Assistant 1}", r"\boxed{Assistant 2}")
FORMATS = {
    "think": Format(_THINK, ("<answer>",), f"GRAM-R²: <answer>A</answer> after the thinking; {_P}"),
    "label": Format(("A", "B"), (), f"GRAM: the likelier letter, asked in both orders; {_P1}"),
    "brackets": Format(("[[A]]", "[[B]]"), ("[[",), f"an instruct model as a judge: the last [[A]]; {_P}"),
    "rm-r1": Format(_R1, ("<answer>",), f"RM-R1: {_R1[0]}; {_P}"),
    "boxed": Format(_BOXES, (r"\boxed{",), f"RRM: the last {_BOXES[0]}; {_P}"),
    "arena": Format(("[[A>B]]", "[[B>A]]"), ("[[", r"\boxed{"), f"Arena: the last [[A>B]] or [[A>>B]]; {_P}"),
    "scalar": Format(None, (), f"a discriminative model: the response with the higher scalar; {_BT}"),
    "logit": Format(None, (), f"Nemotron-Reward: the higher logit of id 0 where an answer begins; {_BT}"),
}


class _Asked(NamedTuple):
    """One prompt: a pair in one order."""

    place: int  # of the pair in its shard
    key: str  # names the prompt to the noise
    order: str  # "AB" as given, "BA" exchanged
    ids: list[int]


class RewardModel:
    """A judge: a model, its tokenizer and the prompt that belongs to it."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template=prompts.JUDGE_PROMPT, format="think"):
        self.model, self.tokenizer, self.template, self.format = model, tokenizer, template, format
        self.calibration: dict[str, Any] | None = None  # fitted by extras/evaluate.py
        self.endings = FORMATS[format].endings
        if self.endings:
            a, b = map(tokenizer.encode, self.endings)
            differ = next(i for i, (one, two) in enumerate(zip(a, b, strict=False)) if one != two)
            # The ids that tell the two verdicts apart, and the text that stands before them.
            self.letters, self.head = (a[differ], b[differ]), tokenizer.decode(a[:differ])
            self.thinking_open = tokenizer.opens_thinking([{"role": "user", "content": ""}])

    @classmethod
    def load(
        cls, directory: str | Path, device="cpu", dtype="float32", prompt=None, format: str | None = None,
        date: str | None = None,
    ):  # fmt: skip
        """`prompt`: a template file in place of the checkpoint's own. `format`: a name in `FORMATS`.

        `date` pins what a chat template prints as today.
        """
        if format not in (None, *FORMATS):
            raise InputError(f"no format {format}; there are {', '.join(FORMATS)}")
        model, tokenizer = load(directory, device, dtype, date)
        has_head = model.config.num_labels > 0
        format = format or ("scalar" if has_head else "think")
        if has_head != (format == "scalar"):
            head = "a scalar head" if has_head else "no scalar head"
            raise InputError(f"{directory}: has {head}, and cannot be read as {format}")
        template = prompts.JUDGE_PROMPT
        if FORMATS[format].endings:
            template, note = prompts.template_for(directory, prompt)
            if note.startswith("warning"):
                print(note, file=sys.stderr)
                template = prompts.LABEL_PROMPT if format == "label" else template
                if format != "think":
                    form = " or ".join(FORMATS[format].endings)
                    template = template.replace(prompts.label_target("A or B"), form)
        judge = cls(model, tokenizer, template, format)
        if (Path(directory) / CALIBRATION).is_file():
            judge.calibration = read_json(Path(directory) / CALIBRATION)
        return judge

    def judge(self, question: str, a: str, b: str, votes: int = 16, seed: int = 0) -> Judgment:
        """One pair. An answer that could not be had is an InputError."""
        pair = Pair((("user", question),), a, b)
        return raise_if_error(next(self.judge_many([pair], votes, seed, progress=False))[1])

    def judge_many(
        self,
        pairs: Iterable[Pair],
        votes: int = 4,
        seed: int = 0,
        *,
        temperature: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        progress: bool = True,
        per_call: int | None = PAIRS_PER_CALL,
    ) -> Iterator[tuple[Pair, Judgment | InputError]]:
        """(pair, judgment) in the pairs' order; a pair that cannot be judged comes with the reason.

        One vote is greedy and in the given order; more are sampled at temperature 1, half in each order.
        `per_call`: pairs of one generate call; None takes all of them at once.
        """
        if votes < 1 or (votes > 1 and votes % 2):
            raise InputError(f"votes: {votes}; expected 1, or an even number (half in each order)")
        if temperature is None:
            temperature = float(votes > 1)
        if self.format == "label":  # its distribution is known without drawing from it
            votes, temperature, max_new_tokens = 2, 0.0, 1
        calibrated = self.calibrates(votes, temperature)
        pairs = iter(pairs)
        while together := list(islice(pairs, per_call)):
            if self.endings:
                judgments = self._vote(together, votes, seed, temperature, max_new_tokens, progress)
            else:
                judgments = [self._compare_scores(pair) for pair in together]
            for pair, judgment in zip(together, judgments, strict=True):
                if calibrated and isinstance(judgment, Judgment) and judgment.p_a != UNDECIDED:
                    known = self.calibration["p"], self.calibration["calibrated"]
                    judgment = dataclasses.replace(judgment, p_a=float(np.interp(judgment.p_a, *known)))
                yield pair, judgment

    def calibrates(self, votes: int, temperature: float) -> bool:
        """Whether the directory's calibration is for such votes: others are distributed in another way."""
        kept = self.calibration or {}
        if not self.endings or self.format == "label":  # nothing is sampled
            return kept.get("votes") == (2 if self.endings else 0)
        return (kept.get("votes"), kept.get("greedy")) == (votes, not temperature)

    # ------------------------------------------------------------------ generative

    def _vote(self, shard: Sequence[Pair], votes: int, seed: int, temperature: float, longest: int, progress):
        """The judgments of a shard: its prompts in both orders are one generate call."""
        asked, room = [], self.model.config.max_positions
        results: list[Any] = [Judgment.from_votes([])] * len(shard)  # what identical responses keep
        for place, pair in enumerate(shard):
            if pair.response_a != pair.response_b:
                both = [self._ask(place, pair, order) for order in ("AB", "BA")[: 1 + (votes > 1)]]
                tokens = max(len(each.ids) for each in both)
                results[place] = [] if tokens < room else _too_long(pair, tokens, room)
                asked += both if tokens < room else []
        answers = generate(
            self.model,
            [each.ids for each in asked],
            n=max(1, votes // 2),
            max_new_tokens=[min(longest, room - len(each.ids)) for each in asked],
            temperature=temperature,
            watch=self.letters,
            seed=seed,
            keys=[each.key for each in asked],
            progress=progress,
        )
        for each, samples in zip(asked, answers, strict=True):
            for number, sample in enumerate(samples):
                results[each.place].append(self._read(each, sample, noise_seed(seed, each.key, number)))
        return [Judgment.from_votes(each) if isinstance(each, list) else each for each in results]

    def _ask(self, place: int, pair: Pair, order: str) -> _Asked:
        """A prompt; neither label nor rationale is shown to a judge."""
        responses = (pair.response_a, pair.response_b)[:: 1 if order == "AB" else -1]
        content = prompts.judge_prompt(Pair(pair.messages, *responses), self.template)
        ids = self.tokenizer.chat([{"role": "user", "content": content}])
        return _Asked(place, f"{pair.id} {order}", order, ids)

    def _read(self, asked: _Asked, sample: Sample, seed: int) -> Vote:
        """One sampled answer as a vote in the pair's own order."""
        text, p_a = self.tokenizer.decode(sample.ids), None
        if self.format == "label" and sample.watched:
            p_a = _sigmoid(sample.watched[0][0] - sample.watched[0][1])
            label, reason = "A" if p_a > UNDECIDED else "B", ""
        elif sample.finish == "stop":
            label, reason = prompts.VERDICTS[self.format](text, self.thinking_open)
        else:
            label, reason = None, {"length": "cut at the length limit"}.get(sample.finish, "no finite logits")
        if label is not None and p_a is None:
            start = max(map(text.rfind, FORMATS[self.format].openings))  # the verdict that was read
            p_a = self._softmax_at_letter(sample, text, start)
            if p_a is None:
                p_a = self._softmax_after(asked.ids, text[:start])
            if p_a is None:
                label, reason = None, "no room to score the verdict"
        if asked.order == "BA":
            label, p_a = OTHER[label], None if p_a is None else 1 - p_a
        return Vote(label, asked.order, p_a, reason, text, seed, len(sample.ids))

    def _softmax_at_letter(self, sample: Sample, text: str, start: int) -> float | None:
        """p(A) among {A, B} where the verdict at `start` was sampled in its canonical form."""
        for place in range(len(sample.ids) - 1, -1, -1):
            if sample.ids[place] in self.letters:
                before = self.tokenizer.decode(sample.ids[:place])
                ending = self.endings[self.letters.index(sample.ids[place])]
                if before == text[:start] + self.head and text.startswith(ending, start):
                    return _sigmoid(sample.watched[place][0] - sample.watched[place][1])
        return None

    def _softmax_after(self, prompt_ids: list[int], start: str) -> float | None:
        """p(A) among {A, B} in the canonical ending, scored after what was written before the verdict.

        A pass of its own: what else is judged beside it must not change its last bits.
        """
        endings = [self.tokenizer.encode(start + ending) for ending in self.endings]
        differ = next(i for i, (a, b) in enumerate(zip(*endings, strict=False)) if a != b)
        if len(prompt_ids) + differ >= self.model.config.max_positions:
            return None
        scored = logprobs(self.model, [prompt_ids + ending[: differ + 1] for ending in endings])
        return _sigmoid(float(scored[0][-1] - scored[1][-1]))

    # ------------------------------------------------------------------ discriminative

    def _compare_scores(self, pair: Pair) -> Judgment | InputError:
        if pair.response_a == pair.response_b:
            return Judgment.from_votes([])
        try:
            both = pair.response_a, pair.response_b
            sequences = [self.tokenizer.answered(pair.messages, each)[0] for each in both]
        except InputError as error:  # a template may refuse a conversation's roles
            return InputError(f"pair {pair.id}: {error}")
        tokens, room = max(map(len, sequences)), self.model.config.max_positions
        if tokens > room:
            return _too_long(pair, tokens, room)
        a, b = self.scores(sequences)
        label = None if a == b else "A" if a > b else "B"
        return Judgment(label, _sigmoid(a - b), {"A": 0, "B": 0, "none": 0})

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The scalar head at each sequence's last token; of a language model, its logit of id 0.

        A pass for each: a response is long enough to fill a device, and its score is its own to the bit.
        """
        weight_D = (self.model.score.weight if self.format == "scalar" else self.model.head_weight)[0].float()
        results, device = [], weight_D.device
        for ids in sequences:
            lengths = [len(ids)]
            ids_T = torch.tensor(ids, device=device)
            hidden_TD = self.model(ids_T, packed_positions(lengths, device), packed_causal(lengths, device))
            results.append(float(hidden_TD[-1].float() @ weight_D))
        return results

    # ------------------------------------------------------------------ lists, and rewards

    def best_of(self, question: str, responses: Sequence[str], method: str = "linear", **options) -> Ranking:
        """The best of n in n - 1 comparisons: one after the other, or in rounds that are a batch each."""
        return raise_if_error(self.contests([(question, responses)], method, full=False, **options)[0])

    def rank(self, question: str, responses: Sequence[str], method: str = "merge", **options) -> Ranking:
        """All n in order. "linear" and "knockout" find the best first, and merge the others."""
        return raise_if_error(self.contests([(question, responses)], method, **options)[0])

    def contests(self, lists, method, full=True, votes=4, seed=0, **options) -> list[Ranking | InputError]:
        """A ranking of each (question, or its turns; responses).

        What all of them wait for at one time is one batch.
        """
        contests = [Contest(len(responses)) for _, responses in lists]
        waiting = {k: contest.run(method, full) for k, contest in enumerate(contests)}
        results: list[Any] = [None] * len(lists)
        while waiting:
            wanted: list[tuple[int, Duel]] = []
            for k, generator in list(waiting.items()):
                try:
                    wanted += [(k, duel) for duel in next(generator) if duel not in contests[k].p]
                except StopIteration as stop:
                    results[k] = stop.value
                    del waiting[k]
            pairs = [_duel(*lists[k], *duel) for k, duel in wanted]
            judged = self.judge_many(pairs, votes, seed, per_call=None, **options)
            for (k, duel), (_, judgment) in zip(wanted, judged, strict=True):
                if isinstance(judgment, InputError):
                    results[k] = judgment
                    waiting.pop(k, None)
                else:
                    contests[k].note(duel, judgment)
            for k in {k for k, _ in wanted}:
                contests[k].rounds += 1
        return results

    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], references: Sequence[str] | None = None,
        *, votes: int = 2, seed: int = 0, log: list | None = None, **options,
    ) -> list[float]:  # fmt: skip
        """Rewards of rollouts, from one batch of comparisons.

        With references: the probability that a completion is better than its own, the mean over both orders
        and all votes. Without: a scoring model's score; else a round-robin among the completions of the same
        prompt, and the share that each has won. Whatever cannot be judged counts one half. `log` is given
        every (pair, judgment).
        """
        if len(prompts) != len(completions) or len(completions) != len(references or completions):
            raise InputError("reward: prompts, completions and references must be as many")
        asked = [(("user", prompt),) for prompt in prompts]
        if references is None and not self.endings:
            both = zip(asked, completions, strict=True)
            return self.scores([self.tokenizer.answered(*each)[0] for each in both])
        if references is not None:
            duels = [(i, None) for i in range(len(prompts))]
            pairs = [Pair(*each) for each in zip(asked, completions, references, strict=True)]
        else:
            duels = [(i, j) for i, j in combinations(range(len(prompts)), 2) if prompts[i] == prompts[j]]
            pairs = [Pair(asked[i], completions[i], completions[j]) for i, j in duels]
        shares: list[list[float]] = [[] for _ in prompts]
        judged = self.judge_many(pairs, votes, seed, per_call=None, **options)
        for (i, j), each in zip(duels, judged, strict=True):
            p = preference(each[1])
            if j is not None:
                p = 0.5 + 0.5 * ((p > UNDECIDED) - (p < UNDECIDED))
                shares[j].append(1 - p)
            shares[i].append(p)
            if log is not None:
                log.append(each)
        return [fmean(each) if each else UNDECIDED for each in shares]


# ---------------------------------------------------------------------------------- rankings

Duel = tuple[int, int]  # (shown as A, shown as B)
Asking = Generator[list[Duel], None, Any]  # yields the comparisons that it waits for, then returns its result
METHODS = ("linear", "knockout", "merge", "selection")


@dataclass(frozen=True)
class Ranking:
    """Indices of responses, best first; of a search for the best, that one alone."""

    order: list[int]
    rounds: int  # batches
    answers: dict[Duel, Judgment]
    overruled: list[tuple[int, int, float]]  # (i, j, p): i was preferred to j, which the order puts first

    @property
    def best(self) -> int:
        return self.order[0]

    @property
    def comparisons(self) -> int:
        return len(self.answers)

    @property
    def undecided(self) -> int:
        return sum(answer.p_a == UNDECIDED for answer in self.answers.values())

    def to_json(self) -> dict[str, Any]:
        """Every comparison, in the order in which they were made."""
        rows = [
            {"a": a, "b": b, "p": preference(each), **each.to_json()} for (a, b), each in self.answers.items()
        ]
        return {"order": self.order, "comparisons": rows}


class Contest:
    """One list of responses, and what was answered about it: a comparison is made once and serves both ways.

    Where there is no preference, the response that came first stays ahead.
    """

    def __init__(self, size: int):
        if not size:
            raise InputError("no responses to choose from")
        self.size, self.rounds = size, 0
        self.p: dict[Duel, float] = {}
        self.answers: dict[Duel, Judgment] = {}

    def note(self, duel: Duel, judgment: Judgment) -> None:
        self.answers[duel] = judgment
        self.p[duel] = preference(judgment)
        self.p[duel[::-1]] = 1 - self.p[duel]

    def better(self, i: int, j: int) -> bool:
        return self.p[i, j] > UNDECIDED

    def run(self, method: str, full: bool) -> Asking:
        """The search for the best, or the full ranking.

        A sort asks so little that it never contradicts itself. So a ranking ends with one batch more, of all
        neighbours and next neighbours that were not compared: a circle of three shows there.
        """
        if method not in METHODS or not (full or method in ("linear", "knockout")):
            raise InputError(f"method {method}: give one of {', '.join(METHODS)}; best-of-n: the first two")
        order, rest = [], list(range(self.size))
        if method in ("linear", "knockout"):
            order = [(yield from self._linear(rest) if method == "linear" else self._knockout(rest))]
            rest.remove(order[0])
        if full:
            order += yield from self._selection(rest) if method == "selection" else self._merge_sort(rest)
            yield [(i, j) for at, i in enumerate(order) for j in order[at + 1 : at + 3]]
            order = self._settled(order)
        ahead = {(i, j) for at, j in enumerate(order) for i in order[at + 1 :]}
        overruled = [(*duel, p) for duel, p in self.p.items() if p > UNDECIDED and duel in ahead]
        return Ranking(order, self.rounds, self.answers, overruled)

    def _linear(self, items: list[int]) -> Asking:
        """The paper's search: the best so far is response B, its challenger A."""
        best = items[0]
        for challenger in items[1:]:
            yield [(challenger, best)]
            best = challenger if self.better(challenger, best) else best
        return best

    def _knockout(self, items: list[int]) -> Asking:
        """The paper's divide and conquer: a round's duels are one batch; the odd one out goes on."""
        while len(items) > 1:
            duels = list(zip(items[::2], items[1::2], strict=False))
            yield duels
            items = [j if self.better(j, i) else i for i, j in duels] + items[2 * len(duels) :]
        return items[0]

    def _selection(self, items: list[int]) -> Asking:
        """The paper's full ranking: the best, then the best of the others, and so on."""
        order: list[int] = []
        while len(order) < len(items):
            order.append((yield from self._linear([i for i in items if i not in order])))
        return order

    def _merge_sort(self, items: list[int]) -> Asking:
        """From runs of one: the next comparison of every merge of a level is one batch."""
        runs = [[i] for i in items]
        while len(runs) > 1:
            merges = [(left, right, []) for left, right in zip(runs[::2], runs[1::2], strict=False)]
            while open := [merge for merge in merges if merge[0] and merge[1]]:
                yield [(left[0], right[0]) for left, right, _ in open]
                for left, right, merged in open:
                    merged.append((right if self.better(right[0], left[0]) else left).pop(0))
            runs = [merged + left + right for left, right, merged in merges] + runs[2 * len(merges) :]
        return runs[0] if runs else []

    def _settled(self, order: list[int]) -> list[int]:
        """Ranked pairs: answers hold from the surest down, but for those that would close a circle."""
        below = {i: {i} for i in order}  # whom each is ahead of, itself among them
        for (i, j), p in sorted(self.p.items(), key=lambda answer: -answer[1]):
            if p > UNDECIDED and i not in below[j]:
                for k in order:
                    below[k] |= below[j] if i in below[k] else set()
        return sorted(order, key=lambda i: -len(below[i]))


def preference(judgment: Judgment | InputError) -> float:
    """p that A is better: a number also where the orders disagree and `p_a` is 0.5; 0.5 after a failure.

    It is made from the votes, where there are any: a calibration enters for judges without votes only.
    """
    if isinstance(judgment, InputError):
        return UNDECIDED
    by_order = [
        [vote.p_a for vote in judgment.details if vote.order == order and vote.p_a is not None]
        for order in ("AB", "BA")
    ]
    means = [fmean(each) for each in by_order if each]
    return fmean(means) if means else judgment.p_a


def raise_if_error(result: Any) -> Any:
    if isinstance(result, InputError):
        raise result
    return result


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(min(-x, 700)))


def _too_long(pair: Pair, tokens: int, room: int) -> InputError:
    return InputError(f"pair {pair.id}: {tokens} tokens are too many for the model's {room} positions")


def _duel(question: str | Sequence[tuple[str, str]], responses: Sequence[str], i: int, j: int) -> Pair:
    messages = (("user", question),) if isinstance(question, str) else tuple(question)
    return Pair(messages, responses[i], responses[j])
