"""Denoising: which pseudo-labels and which rationales are good enough to train on.

Every filter has a name and is a function that returns None (keep) or the reason why not. Label filters read
a judgment and come before proving; rationale filters read the rationale that the prover wrote, or a vote's
own. The first filter that objects drops the pair, and is written down with it; what each filter alone would
have dropped is counted beside it, because a filter that is never decisive is not needed.

The paper names a majority vote over several runs, a threshold on the softmax probability, and rule checks
(too long, without the predicted label, breaking the prompt's structure) and publishes no threshold.
The softmax after a rationale is nearly always certain, so `confidence` counts votes instead; the paper's own
filter stays, as `softmax`.

Coherence is a rule as well: what a rationale quotes must stand in the responses. A world that can check more
(the toy's lists) passes a rule of its own beside it.

It leaves out: how a judgment or a rationale comes about, and balancing, which is `balance` at the end.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gramr2 import prompts
from gramr2.config import SelfTrainConfig
from gramr2.records import OTHER, Judgment, Pair, Vote, mark, show

LabelFilter = Callable[[Judgment, SelfTrainConfig], str | None]
RationaleFilter = Callable[[Pair, str, SelfTrainConfig], str | None]  # (pair, rationale as stored, settings)

# ---------------------------------------------------------------------------------- labels


def agreement(judgment: Judgment, settings: SelfTrainConfig) -> str | None:
    """Both orders have a majority, and the same one."""
    if judgment.label is None:
        return "no readable vote"
    return "the two orders disagree" if judgment.orders_agree is False else None


def confidence(judgment: Judgment, settings: SelfTrainConfig) -> str | None:
    """Enough of all votes, abstentions included, are for the label."""
    cast = sum(judgment.votes.values())
    share = judgment.votes.get(judgment.label, 0) / cast if cast else 0.0
    return None if share >= settings.confidence else f"votes below {settings.confidence:g}"


def softmax(judgment: Judgment, settings: SelfTrainConfig) -> str | None:
    """The paper's threshold: the mean softmax of the votes for the label."""
    sure = [vote.p_a for vote in judgment.details if vote.label == judgment.label and vote.p_a is not None]
    mean = sum(p if judgment.label == "A" else 1 - p for p in sure) / len(sure) if sure else 0.0
    return None if mean >= settings.softmax else f"softmax below {settings.softmax:g}"


LABEL_FILTERS: dict[str, LabelFilter] = {
    "agreement": agreement,
    "confidence": confidence,
    "softmax": softmax,
}


def only_coherent(
    pair: Pair, judgment: Judgment, rules: dict[str, RationaleFilter], settings: SelfTrainConfig
) -> Judgment:
    """The judgment with those votes turned into abstentions whose own rationale breaks a rule of coherence.

    A judge that quotes what nobody said, or concludes against its own count, has guessed.
    """
    used = {name: rule for name, rule in rules.items() if name not in settings.without}

    def objection(vote: Vote) -> str | None:
        shown = pair if vote.order == "AB" else pair.swapped()
        stated = OTHER[vote.label] if vote.order == "BA" else vote.label
        asked = dataclasses.replace(shown, label=stated)
        written = mark(vote.thinking)
        return next((reason for rule in used.values() if (reason := rule(asked, written, settings))), None)

    votes = []
    for vote in judgment.details:
        reason = objection(vote) if vote.label else None
        votes.append(dataclasses.replace(vote, label=None, p_a=None, reason=reason) if reason else vote)
    return Judgment.from_votes(votes)


# ---------------------------------------------------------------------------------- rationales


def length(pair: Pair, rationale: str, settings: SelfTrainConfig) -> str | None:
    words = len(rationale.split())
    return None if words <= settings.max_words else f"more than {settings.max_words} words"


def structure(pair: Pair, rationale: str, settings: SelfTrainConfig) -> str | None:
    """Feedback, Comparison, Conclusion, each once and in order."""
    return prompts.parse_rationale(rationale).reason or None


def _named_in_conclusion(rationale: str) -> set[str]:
    reading = prompts.parse_rationale(rationale).rationale
    conclusion = reading.conclusion if reading else rationale
    return set(re.findall(r"\bResponse ([AB])\b", show(conclusion)))


def states_label(pair: Pair, rationale: str, settings: SelfTrainConfig) -> str | None:
    return None if pair.label in _named_in_conclusion(rationale) else "does not state the label"


def states_other(pair: Pair, rationale: str, settings: SelfTrainConfig) -> str | None:
    """The conclusion prefers the other response: it names it, and not the label's."""
    return "states the other label" if _named_in_conclusion(rationale) == {OTHER[pair.label]} else None


def mentions(pair: Pair, rationale: str, settings: SelfTrainConfig) -> str | None:
    return None if re.search(r"\bResponse [AB]\b", show(rationale)) else "talks of neither response"


def repetition(pair: Pair, rationale: str, settings: SelfTrainConfig) -> str | None:
    """A run of eight words that stands three times or more: a loop, not an argument."""
    words = rationale.split()
    runs = Counter(tuple(words[i : i + 8]) for i in range(len(words) - 7))
    return "repeats itself" if runs and max(runs.values()) >= 3 else None


def quotes(pair: Pair, rationale: str, settings: SelfTrainConfig) -> str | None:
    """What stands in quotation marks, three words or more, must stand in the question or a response."""
    known = _plain(f"{pair.question} {pair.response_a} {pair.response_b}")
    for quoted in re.findall(r"[\"“]([^\"“”]+)[\"”]", show(rationale)):
        if len(quoted.split()) >= 3 and _plain(quoted) not in known:
            return "quotes what the responses do not say"
    return None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


RATIONALE_FILTERS: dict[str, RationaleFilter] = {
    "length": length,
    "structure": structure,
    "states_label": states_label,
    "states_other": states_other,
    "mentions": mentions,
    "repetition": repetition,
    "quotes": quotes,
}

# ---------------------------------------------------------------------------------- applying them


@dataclass(frozen=True)
class Sieve:
    """What went through the filters: each pair's first reason (None: kept), and each filter's own count."""

    reasons: list[str | None]  # "filter: reason"
    alone: dict[str, int]  # pairs that a filter objects to, whatever the others say

    @property
    def dropped(self) -> dict[str, int]:
        return dict(Counter(reason.split(":")[0] for reason in self.reasons if reason))


def apply(filters: dict[str, Callable], items: Iterable[tuple], settings: SelfTrainConfig) -> Sieve:
    """Runs every filter on every item; `settings.without` names the ones that are switched off."""
    used = {name: rule for name, rule in filters.items() if name not in settings.without}
    reasons, alone = [], Counter(dict.fromkeys(used, 0))
    for item in items:
        objections = {name: rule(*item, settings) for name, rule in used.items()}
        objections = {name: reason for name, reason in objections.items() if reason}
        alone.update(objections.keys())
        reasons.append(next((f"{name}: {reason}" for name, reason in objections.items()), None))
    return Sieve(reasons, dict(alone))


def balance(pairs: Sequence[Pair]) -> list[Pair]:
    """As many A as B, within one: pairs whose rationale allows it are turned, every other one."""
    turned, lead = [], 0
    for pair in pairs:
        if lead * (1 if pair.label == "A" else -1) > 0 and pair.swappable:
            pair = pair.swapped()
        lead += 1 if pair.label == "A" else -1
        turned.append(pair)
    return turned
