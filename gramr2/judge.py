"""The reward model at work: pairs in, verdicts with reasons and probabilities out.

A judge's answer is sampled several times, half of the votes with the responses exchanged. After a rationale
the softmax of one answer says what that rationale concluded, almost always above 0.99; how sure the model is
shows in how its rationales disagree. So p_a is the mean of the two orders' means of the verdict's softmax
over {A, B}. Majorities that change with the order are no preference: p_a then reads 0.5, `orders_agree` is
false, and the label is only the side to which the votes lean.

Verdicts are parsed strictly (prompts.py): what cannot be read is an abstention, counted, and never A or B.
The softmax is read where the letter stands among the sampled ids. Where a sample writes its verdict in
another way than the canonical one, the canonical ending is scored after its rationale instead.

A model with a scalar head judges too, by the difference of its two scores, and has no votes to count.

It leaves out: rankings, benchmarks (extras/evaluate.py), filters (denoise.py), sampling itself (sampler.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gramr2 import prompts
from gramr2.files import InputError
from gramr2.model import Decoder, packed_causal, packed_positions
from gramr2.records import OTHER, Judgment, Pair, Vote
from gramr2.sampler import Sample, generate
from gramr2.scoring import logprobs
from gramr2.tokenizer import Tokenizer
from gramr2.weights import load

SHARD = 64  # pairs of one generate call: enough to fill a batch, little to do again after a kill
MAX_NEW_TOKENS = 4096


@dataclass(frozen=True)
class _Asked:
    """One prompt: a pair in one order."""

    pair: Pair
    order: str  # "AB" as given, "BA" exchanged
    ids: list[int]


class RewardModel:
    """A judge: a model, its tokenizer and the prompt that belongs to it."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: str = prompts.JUDGE_PROMPT):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.scalar = bool(model.config.num_labels)
        if not self.scalar:
            self.letters = prompts.verdict_ids(tokenizer.encode)[:2]
            self.opened = tokenizer.opened_thinking([{"role": "user", "content": ""}])

    @classmethod
    def load(
        cls, directory: str | Path, device="cpu", dtype="float32", prompt: str | Path | None = None
    ) -> RewardModel:
        """`prompt`: a template file that takes the place of the checkpoint's own."""
        model, tokenizer = load(directory, device, dtype)
        template, note = prompts.template_for(directory, prompt)
        if note.startswith("warning"):
            print(note, file=sys.stderr)
        return cls(model, tokenizer, template)

    def judge(self, question: str, a: str, b: str, votes: int = 16, seed: int = 0) -> Judgment:
        """One pair. An answer that could not be had is an InputError."""
        pair = Pair((("user", question),), a, b)
        judgment = next(self.judge_many([pair], votes, seed, progress=False))[1]
        if isinstance(judgment, InputError):
            raise judgment
        return judgment

    def judge_many(
        self,
        pairs: Iterable[Pair],
        votes: int = 4,
        seed: int = 0,
        *,
        temperature: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        progress: bool = True,
    ) -> Iterator[tuple[Pair, Judgment | InputError]]:
        """(pair, judgment) in the pairs' order; a pair that cannot be judged comes with the reason.

        One vote is greedy and in the given order; more are sampled at temperature 1, half in each order.
        """
        if votes < 1 or (votes > 1 and votes % 2):
            raise InputError(f"votes: {votes}; expected 1, or an even number (half in each order)")
        if temperature is None:
            temperature = float(votes > 1)
        pairs = iter(pairs)
        while shard := list(islice(pairs, SHARD)):
            if self.scalar:
                yield from zip(shard, self._compare_scores(shard), strict=True)
                continue
            asked, refused = self._ask(shard, votes)
            ballots = self._vote(asked, votes, seed, temperature, max_new_tokens, progress)
            for pair in shard:
                if pair.id in refused:
                    yield pair, refused[pair.id]
                else:
                    yield pair, Judgment.from_votes(ballots.get(pair.id, []))

    # ------------------------------------------------------------------ generative

    def _ask(self, shard: Sequence[Pair], votes: int) -> tuple[list[_Asked], dict[str, InputError]]:
        """The prompts of a shard, each pair once, and the pairs that are too long for the model."""
        asked, refused, limit = [], {}, self.model.config.max_positions
        for pair in {pair.id: pair for pair in shard}.values():
            if pair.response_a == pair.response_b:
                continue  # nothing to prefer: no votes, and p_a stays 0.5
            for order in ("AB", "BA")[: 1 + (votes > 1)]:
                shown = pair if order == "AB" else _exchanged(pair)
                content = prompts.judge_prompt(shown, self.template)
                ids = self.tokenizer.chat([{"role": "user", "content": content}])
                if len(ids) >= limit:
                    refused[pair.id] = InputError(
                        f"pair {pair.id}: its prompt has {len(ids)} tokens, the model {limit} positions"
                    )
                asked.append(_Asked(pair, order, ids))
        return [each for each in asked if each.pair.id not in refused], refused

    def _vote(
        self,
        asked: list[_Asked],
        votes: int,
        seed: int,
        temperature: float,
        max_new_tokens: int,
        progress: bool,
    ) -> dict[str, list[Vote]]:
        """Samples the answers to a shard's prompts in one call and reads them."""
        if not asked:
            return {}
        room = self.model.config.max_positions
        answers = generate(
            self.model,
            [each.ids for each in asked],
            n=max(1, votes // 2),
            max_new_tokens=[min(max_new_tokens, room - len(each.ids)) for each in asked],
            temperature=temperature,
            watch=self.letters,
            seed=seed,
            keys=[f"{each.pair.id} {each.order}" for each in asked],
            progress=progress,
        )
        ballots: dict[str, list[Vote]] = {}
        for each, samples in zip(asked, answers, strict=True):
            for sample in samples:
                ballots.setdefault(each.pair.id, []).append(self._read(each, sample, seed))
        return ballots

    def _read(self, asked: _Asked, sample: Sample, seed: int) -> Vote:
        """One sampled answer as a vote in the pair's own order."""
        text = self.tokenizer.decode(sample.ids)
        if sample.finish == "stop":
            label, reason = prompts.parse_verdict(text, self.opened)
        else:
            label, reason = None, {"length": "cut at the length limit"}.get(sample.finish, "no finite logits")
        p_a = None
        if label is not None:
            p_a = self._softmax_at_letter(sample, text)
            if p_a is None:
                p_a = self._softmax_after(asked.ids, text)
        if asked.order == "BA":
            label, p_a = OTHER[label], None if p_a is None else 1 - p_a
        return Vote(label, asked.order, p_a, reason, text, seed)

    def _softmax_at_letter(self, sample: Sample, text: str) -> float | None:
        """p(A) among {A, B} where the verdict's letter was sampled as a token of its own."""
        for place in range(len(sample.ids) - 1, -1, -1):
            if sample.ids[place] in self.letters:
                before = self.tokenizer.decode(sample.ids[:place])
                if before.endswith("<answer>\n") and text[len(before) + 1 :].startswith("\n</answer>"):
                    a, b = (float(value) for value in sample.watched[place])
                    return 1 / (1 + math.exp(min(b - a, 700)))
        return None

    def _softmax_after(self, prompt_ids: list[int], text: str) -> float:
        """p(A) among {A, B} in the canonical ending, scored after what was written before the answer."""
        thinking, closed, _ = text.rpartition("</think>")
        start = f"{thinking}{closed}\n" if closed else ""
        endings = [self.tokenizer.encode(start + prompts.label_target(label)) for label in "AB"]
        differ = next(i for i, (a, b) in enumerate(zip(*endings, strict=True)) if a != b)
        scored = logprobs(self.model, [prompt_ids + ending[: differ + 1] for ending in endings])
        a, b = (float(values[-1]) for values in scored)
        return 1 / (1 + math.exp(min(b - a, 700)))

    # ------------------------------------------------------------------ discriminative

    def _compare_scores(self, shard: Sequence[Pair]) -> list[Judgment | InputError]:
        sequences, limit = [], self.model.config.max_positions
        for pair in shard:
            turns = [{"role": role, "content": text} for role, text in pair.messages]
            sequences += [
                self.tokenizer.example(turns, each)[0] for each in (pair.response_a, pair.response_b)
            ]
        fits = [len(ids) <= limit for ids in sequences]
        scores = iter(self.scores([ids for ids, fit in zip(sequences, fits, strict=True) if fit]))
        judgments: list[Judgment | InputError] = []
        for place, pair in enumerate(shard):
            a, b = (next(scores) if fit else None for fit in fits[2 * place : 2 * place + 2])
            if a is None or b is None:
                longest = max(len(ids) for ids in sequences[2 * place : 2 * place + 2])
                judgments.append(
                    InputError(f"pair {pair.id}: it has {longest} tokens, the model {limit} positions")
                )
                continue
            p_a = 1 / (1 + math.exp(min(b - a, 700)))
            label = None if a == b else "A" if a > b else "B"
            judgments.append(Judgment(label, p_a, {"A": 0, "B": 0, "none": 0}))
        return judgments

    @torch.no_grad()
    def scores(self, sequences: Sequence[Sequence[int]], token_budget: int = 8192) -> list[float]:
        """The scalar head at each sequence's last token."""
        results, start = [], 0
        while start < len(sequences):
            stop, tokens = start, 0
            while stop < len(sequences) and (stop == start or tokens + len(sequences[stop]) <= token_budget):
                tokens += len(sequences[stop])
                stop += 1
            results += self._score_pack(sequences[start:stop]).tolist()
            start = stop
        return results

    def _score_pack(self, pack: Sequence[Sequence[int]]) -> Tensor:
        device, lengths = self.model.embed.weight.device, [len(ids) for ids in pack]
        ids_T = torch.tensor([token for ids in pack for token in ids], device=device)
        hidden_TD = self.model(ids_T, packed_positions(lengths, device), packed_causal(lengths, device))
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        return self.model.score(hidden_TD[ends])[:, 0].float()


def _exchanged(pair: Pair) -> Pair:
    """The pair in the other order, for a prompt: neither label nor rationale is shown to a judge."""
    return Pair(pair.messages, pair.response_b, pair.response_a, id=pair.id)
