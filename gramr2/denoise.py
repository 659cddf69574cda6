"""Denoising: which pseudo-labels and which rationales are good enough to train on.

Every filter has a name and is a function that returns None (keep) or the reason why not. Label filters read
a judgment and come before proving; rationale filters read the rationale that the prover wrote, or a vote's
own. The first filter that objects drops the pair, and is written down with it; what each filter alone would
have dropped is counted beside it, because a filter that is never decisive is not needed.

The paper names a majority vote over several runs, a threshold on the softmax probability, and rule checks
(too long, without the predicted label, breaking the prompt's structure) and publishes no threshold.
The softmax after a rationale is nearly always certain, so `confidence` counts votes instead; the paper's own
filter stays, as `softmax`.

Coherence is a rule as well (`COHERENCE`): what a rationale quotes must stand in the question or a response,
and what it says plainly about which response is better must agree with its label. These two are also applied
to the votes' own rationales. A world that can check more (the toy's lists) brings a rule of its own under
the name `coherence`.

It leaves out: how a judgment or a rationale comes about. `balance` at the end drops nothing: it turns pairs.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from gramr2 import prompts
from gramr2.records import OTHER, Judgment, Pair, mark, show
from gramr2.settings import FilterSettings

LabelFilter = Callable[[Judgment, FilterSettings], str | None]
RationaleFilter = Callable[[Pair, str, FilterSettings], str | None]  # the rationale as stored

# ---------------------------------------------------------------------------------- labels


def agreement(judgment: Judgment, settings: FilterSettings) -> str | None:
    """Both orders have a majority, and the same one."""
    if not judgment.votes["A"] + judgment.votes["B"]:
        return "no readable vote"
    if judgment.orders_agree is False:
        return "the two orders disagree"
    if judgment.orders_agree is None and len({vote.order for vote in judgment.details}) == 2:
        return "one order has no readable vote"
    return None if judgment.label else "undecided"


def confidence(judgment: Judgment, settings: FilterSettings) -> str | None:
    """Enough of all votes, abstentions included, are for the label."""
    share = share_of_votes(judgment)
    return None if share >= settings.confidence else f"votes below {settings.confidence:g}"


def share_of_votes(judgment: Judgment) -> float:
    """Of all votes those for the label."""
    cast = sum(judgment.votes.values())
    return judgment.votes[judgment.label] / cast if judgment.label and cast else 0.0


def softmax(judgment: Judgment, settings: FilterSettings) -> str | None:
    """The paper's threshold: the mean softmax of the votes for the label."""
    return None if mean_softmax(judgment) >= settings.softmax else f"softmax below {settings.softmax:g}"


def mean_softmax(judgment: Judgment) -> float:
    sure = [vote.p_a for vote in judgment.details if vote.label == judgment.label and vote.p_a is not None]
    return sum(p if judgment.label == "A" else 1 - p for p in sure) / len(sure) if sure else 0.0


LABEL_FILTERS: dict[str, LabelFilter] = {rule.__name__: rule for rule in (agreement, confidence, softmax)}


def without_incoherent_votes(
    pair: Pair, judgment: Judgment, rules: Mapping[str, RationaleFilter], settings: FilterSettings
) -> Judgment:
    """The judgment with those votes turned into abstentions whose own rationale breaks a rule of coherence.

    A judge that quotes what nobody said, or concludes against its own count, has guessed.
    """
    votes = []
    for vote in judgment.details:
        own = dataclasses.replace(pair, label=vote.label)
        asked = own if vote.order == "AB" else own.swapped()
        reason = objection(asked, mark(vote.thinking), rules, settings) if vote.label else None
        votes.append(dataclasses.replace(vote, label=None, p_a=None, reason=reason) if reason else vote)
    return dataclasses.replace(Judgment.from_votes(votes), forged=judgment.forged)


# ---------------------------------------------------------------------------------- rationales


def length(pair: Pair, rationale: str, settings: FilterSettings) -> str | None:
    words = len(rationale.split())
    return None if words <= settings.max_words else f"more than {settings.max_words} words"


def structure(pair: Pair, rationale: str, settings: FilterSettings) -> str | None:
    """Feedback, Comparison, Conclusion, each once and in order."""
    return prompts.parse_rationale(rationale).reason or None


def _argument_and_conclusion(rationale: str) -> tuple[str, str]:
    """What stands before the conclusion, and the conclusion; the whole text twice where it has no parts."""
    shown = show(rationale)
    reading = prompts.parse_rationale(shown).rationale
    return (f"{reading.feedback}\n{reading.comparison}", reading.conclusion) if reading else (shown, shown)


def _named(text: str) -> set[str]:
    return set(re.findall(r"\bResponse ([AB])\b", text))


def states_label(pair: Pair, rationale: str, settings: FilterSettings) -> str | None:
    _, conclusion = _argument_and_conclusion(rationale)
    return None if pair.label in _named(conclusion) else "does not state the label"


def states_other(pair: Pair, rationale: str, settings: FilterSettings) -> str | None:
    """The conclusion prefers the other response: it names it, and not the label's."""
    _, conclusion = _argument_and_conclusion(rationale)
    return "states the other label" if _named(conclusion) == {OTHER[pair.label]} else None


def mentions(pair: Pair, rationale: str, settings: FilterSettings) -> str | None:
    """What stands before the conclusion names a response: general remarks and a letter are no argument."""
    argument, _ = _argument_and_conclusion(rationale)
    return None if _named(argument) else "talks of neither response"


def repetition(pair: Pair, rationale: str, settings: FilterSettings) -> str | None:
    """A run of eight words that stands three times or more: a loop, not an argument."""
    words = rationale.split()
    runs = Counter(tuple(words[i : i + 8]) for i in range(len(words) - 7))
    return "repeats itself" if runs and max(runs.values()) >= 3 else None


def quotes(pair: Pair, rationale: str, settings: FilterSettings) -> str | None:
    """What stands in quotation marks, three words or more, must stand in the question or a response.

    Each side of an ellipsis counts by itself. A line in which a quotation mark has no other is passed over.
    """
    known = _plain(f"{pair.question} {pair.response_a} {pair.response_b}")
    lines = [line for line in show(rationale).splitlines() if line.count('"') % 2 == 0]
    for quoted in re.findall(r'"([^"]+)"|“([^“”]+)”', "\n".join(lines)):
        for piece in re.split(r"\.\.\.|…", "".join(quoted)):
            if len(piece.split()) >= 3 and f" {_plain(piece)} " not in f" {known} ":
                return "quotes what the responses do not say"
    return None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


# A whole sentence, or its beginning up to a comma or a reason. "In tone, Response A is better" and "Response
# A is better formatted" speak of one side of it, and are not meant.
_VERDICT = re.compile(
    r"(?:(?i:overall|therefore|thus|so|hence|clearly|in (?:conclusion|summary|short|total)),? )?"
    r"Response ([AB]) is (?:(?:\w+ly|much|far|overall|the),? )*(better|superior|preferable|worse|inferior)"
    r"(?: (?:response|answer|choice|one))?(?: overall| than Response [AB])*(?:[,:;.!]|\s*$| because| since)"
)
# A sentence with one of these may take back, limit or only suppose what it says.
_DOUBT = re.compile(
    r"n[o'’]t\b|\?|\b(?:never|if|unless|whether|although|though|while|whereas|but|however|despite|except|only|why|"
    r"hardly|barely|nearly|almost|arguably|equally|would|could|might|may|should|some|those|who|neither|nor)\b",
    re.IGNORECASE,
)


def coherence(pair: Pair, rationale: str, settings: FilterSettings) -> str | None:
    """No sentence says plainly that the other response is better. What is hedged is passed over."""
    for sentence in re.split(r"(?<=[.!?;\n])", show(rationale)):
        found = None if _DOUBT.search(sentence) else _VERDICT.match(sentence.lstrip(" -*#>"))
        if found and (found[1] == pair.label) == (found[2] in ("worse", "inferior")):
            return "a statement contradicts its conclusion"
    return None


_RULES = (length, structure, states_label, states_other, mentions, repetition, quotes, coherence)
RATIONALE_FILTERS: dict[str, RationaleFilter] = {rule.__name__: rule for rule in _RULES}
COHERENCE = {name: RATIONALE_FILTERS[name] for name in ("quotes", "coherence")}
FILTERS: tuple[str, ...] = (*LABEL_FILTERS, *RATIONALE_FILTERS)

# ---------------------------------------------------------------------------------- applying them


def objections(
    rules: Mapping[str, Callable[..., str | None]], *subject: Any, settings: FilterSettings
) -> dict[str, str | None]:
    """What each rule has against a judgment, or against a pair and its rationale; None where it has nothing.

    A rule that is switched off does not stand there.
    """
    return {name: rule(*subject, settings) for name, rule in rules.items() if name not in settings.without}


def objection(
    pair: Pair, rationale: str, rules: Mapping[str, RationaleFilter], settings: FilterSettings
) -> str | None:
    """The first reason against a rationale."""
    return next(filter(None, objections(rules, pair, rationale, settings=settings).values()), None)


def balance(pair: Pair, lead: int) -> Pair:
    """The pair, turned where its label is ahead: `lead` says how many more A than B were kept before it.

    So there are as many A as B, within one where rationales allow it.
    """
    is_ahead = lead > 0 if pair.label == "A" else lead < 0
    return pair.swapped() if is_ahead and pair.swappable else pair
