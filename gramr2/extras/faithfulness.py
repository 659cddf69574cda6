"""Faithfulness: does a rationale name the reasons that people gave? By words alone, no model is asked.

    python -m gramr2.extras.faithfulness PROOFS.jsonl --reasons UKPConvArg1.tar.gz
        of what a proving step or a judge wrote: rows of "pair" and "rationale"

Five workers each wrote why they chose one of two arguments (convincing_arguments.py). The reasons of those
who chose the pair's label are the reference. They are held out: no step of a run reads them, but for those of
the human pairs, of which rationales are made; a pair that brings a rationale of its own is left out.

A text is the set of its words, stemmed, without stop words and without a rationale's conclusion, which only
names the label. It is held against the words of all reasons together but one, each left out in turn (so that
whoever wrote that one can be held against the same). Their *overlap* is F1: twice the weight of the words
that they share over the weight of all their words, in per cent. A word weighs -log of the share of all
reasons that have it, so that "better" counts for little. The mean over who is left out is taken twice:

- *own words*: without what stands in the question or in either argument. What is left is what is said about
  the arguments; who copies them scores nothing. This is the measure.
- *all words*: a reason may well name what an argument says. But here copying pays, as its line shows.

*Chance* is the same text's overlap with as many reasons of other pairs of the same side of the debate, which
share no argument with it (own words: without the words of either pair). What is above chance is about this
pair. A worker's own reason, held against the others', says how much people agree.

Of pairs with all candidates written down (a few of each step; all with --keep-candidates) it says whether the
score picks proofs that are further above chance than a random one (the mean over the eligible ones), the
likeliest, and the longest; and what the best choice would gain. Intervals are bootstrap, 95%, over pairs;
differences are taken within a pair. Pairs of a side share arguments, so that intervals are rather too narrow.

With --reasons CHECKLIST.jsonl the reference is what RationaleRM made of HelpSteer3's annotations (rows with
"context", "response1", "response2", "domain" and a list "human-checklist"; CC BY 4.0): the domain is the
side, and an item counts as a worker. Its authors match items by a model, and so have other figures.

It leaves out: paraphrases, which share no word; and of which argument a word is said ("A has facts", "B has
none"). It trains and filters nothing, and nothing that does may read the reasons.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is imported, or a package be missing
    from gramr2.interrupts import end_in_one_line

    end_in_one_line()

import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np

from gramr2.data import Store
from gramr2.extras.convincing_arguments import read_corpus
from gramr2.extras.evaluate import average
from gramr2.fields import Fields
from gramr2.files import JsonRow, Parser, need, run_command
from gramr2.prompts import Reading, parse_rationale, rationale_from_proof
from gramr2.records import Pair, Proof, as_messages

OTHERS = 20  # pairs of the same side that chance is taken from, at most
STOP = """about all also an and arg are argument as at be because but by can do does for from had has have he
his if in into is it its just more most my no not of on one only or other our out response so some such
than that the their them then there these they this those to two was we were which will with would you your"""
Words = frozenset[str]
Given = list[tuple[str, str]]  # (the response that was chosen, the reason)

# ---------------------------------------------------------------------------------- the reasons


def stems(text: str) -> Words:
    """The words of a text, without endings and as a set; numbers and letters are none."""
    found = re.findall(r"[^\W\d_]{2,}", re.sub(r"['’]\w+", "", text.lower()))
    return frozenset(re.sub(r"(?<=\w{3})(?:ing|ed|es|ly|s|e)$", "", word) for word in found)


NO_WORDS = stems(STOP)


def words(text: str) -> Words:
    """What a text says: "has facts" and "the fact" are alike."""
    return stems(text) - NO_WORDS


@dataclass(frozen=True)
class Told:
    """What people wrote of one pair."""

    pair: Pair
    side: str  # other pairs of it are its chance
    known: Words  # of the question and both responses
    given: dict[str, list[Words]] = field(default_factory=dict)  # reasons, by the response that they chose

    @property
    def most(self) -> list[Words]:
        return max(self.given.values(), key=len, default=[])


def _of_workers(path: Path) -> Iterator[tuple[Pair, str, Given]]:
    for one in read_corpus(path)[0]:
        chosen = [("AB".index(letter), reason) for letter, reason in one.votes if letter]
        given = [(one.arguments[place], reason) for place, reason in chosen]
        yield one.pair(None), f"{one.debate}: {one.stance}", given


def _of_checklists(path: Path) -> Iterator[tuple[Pair, str, Given]]:
    def read(row: JsonRow) -> tuple[Pair, str, Given]:
        fields = Fields(row)
        a, b = fields.get("response1", str), fields.get("response2", str)
        pair = Pair(as_messages(row.get("context"), "context"), a, b)
        items = fields.get("human-checklist", tuple[str, ...])
        return pair, fields.get("domain", str), [(each, item) for item in items for each in {a, b}]

    yield from Store(path, read)


class Reference:
    """All reasons, what their words weigh, and how much a text has of them."""

    def __init__(self, path: Path):
        self.told: dict[str, Told] = {}  # by the hash of the pair's content
        self.sides: dict[str, list[Told]] = defaultdict(list)
        for pair, side, given in (_of_checklists if path.suffix == ".jsonl" else _of_workers)(path):
            if pair.id not in self.told:
                text = " ".join((pair.question, pair.response_a, pair.response_b))
                self.told[pair.id] = told = Told(pair, side, words(text))
                self.sides[side].append(told)
                for response, reason in given:
                    told.given.setdefault(response, []).append(words(reason))
        texts = [text for told in self.told.values() for given in told.given.values() for text in given]
        rarest = math.log(1 + len(texts))  # of what stands in no reason
        self.weights: dict[str, float] = defaultdict(lambda: rarest)
        for word, count in Counter(word for text in texts for word in text).items():
            self.weights[word] -= math.log(count)

    def overlap(self, text: Words, reasons: Sequence[Words], *without: Words) -> float:
        """F1 of the words of a text and of reasons together."""
        said, wanted = (each.difference(*without) for each in (text, frozenset[str]().union(*reasons)))
        shared, *both = (sum(map(self.weights.__getitem__, each)) for each in (said & wanted, said, wanted))
        return 2 * shared / sum(both) if shared else 0.0

    def others(self, told: Told, reasons: int) -> list[Told]:
        """Pairs of the same side that share no response with this one and have so many reasons, too."""
        both = {told.pair.response_a, told.pair.response_b}
        side = (each for each in self.sides[told.side] if len(each.most) >= reasons)
        apart = [each for each in side if not both & {each.pair.response_a, each.pair.response_b}]
        return random.Random(told.pair.id).sample(apart, min(OTHERS, len(apart)))


# ---------------------------------------------------------------------------------- what was written


@dataclass(frozen=True)
class Written:
    """A pair's rationale and eligible candidates, and the reasons that they are held against."""

    better: Words  # the response that the label names
    told: Told
    reasons: list[Words]  # of those who chose it
    others: list[Told]
    rationale: Words
    candidates: list[tuple[Proof, Words]]

    def against(self, reference: Reference, own: bool, *texts: Words) -> tuple[float, float]:
        """Overlap with the reasons, and by chance: of a text, or of one for each reason that is left out."""
        count = len(self.reasons)
        left = [self.reasons[:i] + self.reasons[i + 1 :] for i in range(count)]
        known = [self.told.known] if own else []
        asked = zip(texts * (count // len(texts)), left, strict=True)
        values = (reference.overlap(text, reasons, *known) for text, reasons in asked)
        apart = [(each.most[: count - 1], [*known, each.known] if own else []) for each in self.others]
        chance = (reference.overlap(text, reasons, *less) for text in texts for reasons, less in apart)
        return fmean(values), fmean(chance)


def _said(text: str, read: Callable[[str, bool], Reading]) -> Words:
    """Without the conclusion, where the parts can be told apart."""
    z = read(text, "</think>" in text).rationale
    return words(f"{z.feedback} {z.comparison}" if z else text)


def read_row(row: JsonRow, reference: Reference) -> Written | str:
    """What of a row is measured, or why nothing is."""
    fields = Fields(row)
    pair = Pair.from_json(fields.get("pair", dict))
    told = reference.told.get(pair.content_id)
    if told is None or pair.label is None or row.get("rationale") is None or pair.rationale:
        unseen = "a human rationale, made of its reasons" if pair.rationale else "no label or no rationale"
        return "nobody's reasons" if told is None else unseen
    better = pair.response_a if pair.label == "A" else pair.response_b
    reasons = told.given.get(better, [])
    others = reference.others(told, len(reasons) - 1)
    if len(reasons) < 2 or not others:
        return "fewer than two reasons for its label" if others else "no other pair of its side"
    proofs = [Proof.from_json(each) for each in fields.get("candidates", list[dict], [])]
    candidates = [(each, _said(each.text, rationale_from_proof)) for each in proofs if each.score is not None]
    said = _said(fields.get("rationale", str), parse_rationale)
    return Written(words(better), told, reasons, others, said, candidates)


# ---------------------------------------------------------------------------------- the figures


def levels(found: Sequence[Written], reference: Reference, own: bool) -> Iterator[JsonRow]:
    """Overlap, overlap by chance, and what is above it."""
    texts: dict[str, Callable[[Written], Sequence[Words]]] = {
        "the rationales": lambda one: [one.rationale],
        "a worker's reason, against the others'": lambda one: one.reasons,
        "the better response, copied": lambda one: [one.better],
    }
    for name, of in texts.items():
        values, chance = np.transpose([one.against(reference, own, *of(one)) for one in found])
        means = {"overlap": round(100 * values.mean(), 2), "chance": round(100 * chance.mean(), 2)}
        yield average(name, [values - chance]) | means


def choices(found: Sequence[Written], reference: Reference, own: bool) -> Iterator[JsonRow]:
    """How far above chance the score's choice is, less how far another choice of the same proofs is."""
    less = defaultdict(list)
    for one in found:
        overlaps = [(proof, *one.against(reference, own, text)) for proof, text in one.candidates]
        worth = [(value - chance, proof) for proof, value, chance in overlaps]
        rivals = {
            "a random one": fmean(above for above, _ in worth),
            "the likeliest": max(worth, key=lambda each: each[1].logp_given)[0],
            "the longest": max(worth, key=lambda each: len(each[1].ids))[0],
            "the best by this measure": max(above for above, _ in worth),
        }
        for name, above in rivals.items():
            less[name].append(max(worth, key=lambda each: each[1].score or 0.0)[0] - above)
    yield from (average(name, [values]) for name, values in less.items())


def score(paths: Sequence[Path], reasons: Path) -> JsonRow:
    """All figures, as JSON has them."""
    reference = Reference(reasons)
    rows = [one for path in paths for one in Store(path, lambda row: read_row(row, reference))]
    found = [one for one in rows if isinstance(one, Written)]
    left_out = Counter(one for one in rows if isinstance(one, str))
    why = ", ".join(f"{count} with {reason}" for reason, count in left_out.most_common()) or "it has no rows"
    need(len(found) > 0, f"{paths[0]}: nothing to measure ({why})")
    several = [one for one in found if len({proof.text for proof, _ in one.candidates}) > 1]
    names = {str(proof.select_by) for one in several for proof, _ in one.candidates}
    measures = {"own words": True, "all words": False}.items()
    return {
        "left out": dict(left_out),
        "levels": {name: list(levels(found, reference, own)) for name, own in measures},
        "picked by": ", ".join(sorted(names)),
        "choices": {name: list(choices(several, reference, own)) for name, own in measures},
    }


# ---------------------------------------------------------------------------------- the command


def readable(found: JsonRow) -> str:
    lines = []
    for name, rows in found["levels"].items():
        lines.append(f"{name:40} overlap  chance   above chance [95%]       n")
        lines += ["  {name:38} {overlap:7.2f} {chance:7.2f} ".format(**row) + _spread(row) for row in rows]
        if less := found["choices"][name]:
            lines.append(f"  picked by {found['picked by']}, less another choice of the same proofs")
            lines += [f"    {row['name']:52} {_spread(row)}" for row in less]
    lines += [f"left out: {count} with {reason}" for reason, count in found["left out"].items()]
    return "\n".join(lines)


def _spread(row: JsonRow) -> str:
    return "{value:7.2f} [{low:.2f}, {high:.2f}]".format(**row).ljust(24) + f"{row['n']:5}"


def main(argv: Sequence[str]) -> int:
    parser = Parser("gramr2.extras.faithfulness", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PROOFS.jsonl", help="proofs, or judged pairs")
    parser.add_argument("--reasons", type=Path, required=True, help="UKPConvArg1.tar.gz, or checklists.jsonl")
    parser.add_argument("--json", action="store_true", help="all figures, for machines")
    given = parser.parse_args(argv)
    print((json.dumps if given.json else readable)(score(given.paths, given.reasons)))
    return 0


if __name__ == "__main__":
    run_command(main)
