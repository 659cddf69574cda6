"""UKPConvArg1, which of two arguments is more convincing, → the four files of a run, and the truth apart.

    python -m gramr2.extras.datasets convincing-arguments UKPConvArg1.tar.gz OUT/
        OUT/human.jsonl, labelled.jsonl, unlabelled.jsonl, truth.jsonl, test.jsonl and README.md
    python -m gramr2.extras.datasets convincing-arguments UKPConvArg1/ OUT/ --strict --test gay-marriage
        of the corpus' own strict pairs and labels, as it is published, with another debate held out

Sixteen debates with two sides each; 25 to 35 arguments for a side, and every two of them were shown to five
workers, who chose one ("a1", "a2" or "equal") and wrote why. A pair has the label that enough workers chose
(`--agree`); ties, and what they do not agree on, are left out and counted. `margin` is the votes for the
label less those against it.

The split is by debate, a debate's two sides together: the test shares no topic with training, and human,
labelled and unlabelled pairs share no argument. Within a side the same 35 arguments stand in all pairs: who
knows some of its labels nearly knows the others, so that pseudo-labels would look better than they are on
anything new. Which debates go where, the order of the pairs and the place of the better argument (A in half
of each file) are the seed's.

Rationales are the reasons of the workers who chose the label: those that name one argument are the feedback,
those that name both the comparison. A reason that names none, or has a name that is not certain
(`records.unmarked`), is left out, and so is a pair without feedback or comparison.

The longer argument (in characters) wins four times in five, so that `domain` says whether it did. In the
unlabelled file that would tell the label: there it stands, with the label, in truth.jsonl, which is for
reporting only. `--more` adds pairs of the same debates that were left out; their truth is null. (Pairs that
nobody compared there are none.)

It leaves out: fetching the archive, and arguments of opposite sides, which nobody compared.
"""

from __future__ import annotations

import random
import tarfile
import textwrap
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from gramr2.files import (
    InputError,
    JsonRow,
    Parser,
    disk_errors_as_input_errors,
    need,
    open_file,
    publish_directory,
    read_text,
    write_rows,
)
from gramr2.prompts import Rationale, parse_rationale
from gramr2.records import OTHER, Pair, mark, named, unmarked

FULL, STRICT = "UKPConvArg1-full-XML", "UKPConvArg1Strict-CSV"  # the archive's folders that are read
TEST = ["evolution-vs-creation", "william-farquhar"]
SHARE = 0.25  # of the pairs outside the test, for each of human and labelled
LARGEST = 1 << 26  # bytes of one file; the published ones are below 4 MB
LETTERS = {"a1": "A", "a2": "B", "equal": None}
HEAD = "# Convincing arguments: pairs of a run"
README = f"""{HEAD}

Made from UKPConvArg1 (Ivan Habernal and Iryna Gurevych, "Which argument is more convincing? Analyzing and
predicting convincingness of Web arguments using bidirectional LSTM", ACL 2016), which is licensed under
CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/); so are these files. Its arguments come from
createdebate.com (CC-BY 3.0) and convinceme.net (Creative Commons Public Domain). What was changed: pairs were
chosen and put in other orders, the workers' reasons were put together as rationales, and the names that they
give to the arguments were made one.

"""


Votes = tuple[tuple[str | None, str], ...]  # each worker's (letter or None, reason)

# --- the archive -----------------------------------------------------------------------------------------


class _Plain(ElementTree.TreeBuilder):
    """XML without a document type: what declares no entities cannot grow."""

    def doctype(self, *declared: str | None) -> None:
        raise InputError("declares a document type; the published files have none")


@dataclass(frozen=True)
class Compared:
    """Two arguments of one side of a debate, and what each worker chose and wrote."""

    debate: str
    title: str
    stance: str
    id: str
    arguments: tuple[str, str]
    votes: Votes
    in_corpus: bool  # has the corpus' own label, which 846 do not

    @property
    def question(self) -> str:
        asked = "Which of the two arguments is more convincing?"
        return f"Debate: {self.title}\nSide that both arguments take: {self.stance}\n{asked}"

    def pair(self, label: str | None) -> Pair:
        meta = {"debate": self.debate, "stance": self.stance, "pair": self.id}
        pair = Pair((("user", self.question),), *self.arguments, source="convincing-arguments", meta=meta)
        if label is None:
            return pair
        votes = Counter(letter for letter, _ in self.votes)
        agreement = {"for": votes[label], "against": votes[OTHER[label]], "equal": votes[None]}
        a, b = map(len, self.arguments)
        domain = "longer won" if (a > b) == (label == "A") else "shorter won"
        margin = float(agreement["for"] - agreement["against"])
        return replace(pair, label=label, domain=domain, margin=margin, meta=meta | {"votes": agreement})


def files_of(path: Path) -> Iterator[tuple[PurePath, bytes]]:
    """The files of an archive, or of a directory, that belong to the corpus; nothing is unpacked on disk."""
    if path.is_dir():
        for file in sorted(path.resolve().glob("**/*.*")):
            if file.parent.name in (FULL, STRICT):
                yield file, read_text(file).encode()
        return
    try:
        with open_file(path) as raw, tarfile.open(fileobj=raw, mode="r:gz") as archive:
            for member in archive:
                name = PurePath(member.name)
                if name.parent.name in (FULL, STRICT) and (content := archive.extractfile(member)):
                    need(member.size <= LARGEST, f"{path}: {name} is larger than anything published")
                    yield name, content.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError):
        raise InputError(f"{path}: broken, or no .tar.gz; fetch it again") from None


def read_corpus(path: Path) -> tuple[list[Compared], dict[str, str]]:
    """→ every compared pair, in the order of the files' names; and the strict labels, by the pair's id."""
    compared: dict[str, list[Compared]] = {}
    strict: dict[str, str] = {}
    for name, content in files_of(path):
        try:
            if name.parent.name == FULL and name.suffix == ".xml" and not name.name.startswith("."):
                compared[name.name] = list(_side(name.stem, content))
            elif name.parent.name == STRICT and name.suffix == ".csv":
                lines = (line.split("\t") for line in content.decode().splitlines() if line[:1] != "#")
                strict |= {pair: _letter(label) or "" for pair, label, *_ in lines}
        except (InputError, ValueError, ElementTree.ParseError) as error:
            raise InputError(f"{path}: {name.name}: {error}") from None
    need(bool(compared), f"{path}: holds no {FULL}/*.xml; give UKPConvArg1.tar.gz, or what it unpacks to")
    return [one for name in sorted(compared) for one in compared[name]], strict


def _side(stem: str, content: bytes) -> Iterator[Compared]:
    parser = ElementTree.XMLParser(target=_Plain())
    parser.feed(content)
    for number, element in enumerate(parser.close().iter("annotatedArgumentPair"), 1):

        def text(name: str, of: ElementTree.Element = element, number: int = number) -> str:
            found = of.findtext(name)
            need(bool(found and found.strip()), f'pair {number} has no text in "{name}"')
            return str(found).strip()

        workers = element.findall("mTurkAssignments/mTurkAssignment")
        yield Compared(
            debate=stem.rpartition("_")[0].strip("-"),
            title=text("debateMetaData/title"),
            stance=text("arg1/stance"),
            id=text("id"),
            arguments=(text("arg1/text"), text("arg2/text")),
            votes=tuple((_letter(text("value", of=worker)), text("reason", of=worker)) for worker in workers),
            in_corpus=element.find("goldLabel") is not None,
        )


def _letter(value: str) -> str | None:
    need(value in LETTERS, f'a vote is "{value:.20}"; expected one of {", ".join(LETTERS)}')
    return LETTERS[value]


# --- labels and rationales -------------------------------------------------------------------------------


def decided(one: Compared, agree: int, strict: dict[str, str] | None) -> Pair | str:
    """The pair with its label, or the reason why it has none. `strict`: the corpus' own labels, by id."""
    a, b = one.arguments
    votes = Counter(letter for letter, _ in one.votes)
    label = max("AB", key=lambda letter: votes[letter]) if strict is None else strict.get(one.id)
    if not one.in_corpus:
        return "without a label of the corpus' own"
    if a == b:
        return "identical arguments"
    if strict is None and votes[label] < agree:
        tied = votes["A"] == votes["B"] or votes[None] >= votes[label]
        return "tie" if tied else f"fewer than {agree} workers agree"
    if not label:
        return "not in the strict corpus"
    return "arguments of the same length" if len(a) == len(b) else one.pair(label)


def with_rationale(pair: Pair, votes: Votes, left_out: Counter[str]) -> Pair | str:
    """The pair with the reasons of those who chose its label as z, or why they do not make one."""
    parts: dict[str, list[str]] = {"A": [], "B": [], "AB": []}
    for letter, reason in votes:
        stored = mark(" ".join(reason.split()), "argument")
        who = "".join(sorted(named(stored)))
        if letter != pair.label:
            left_out["chose otherwise"] += 1
        elif unmarked(stored) or not who:
            left_out["a name that is not certain" if unmarked(stored) else "no name"] += 1
        else:
            parts[who].append(_sentence(stored))
    feedback, comparison = [*parts["A"], *parts["B"]], parts["AB"]
    if not feedback or not comparison:
        return f"no reason that names {'one of them' if comparison else 'both'}"
    conclusion = f"Response ⟦{pair.label}⟧ is more convincing than Response ⟦{OTHER[pair.label]}⟧."
    z = Rationale("\n".join(feedback), "\n".join(comparison), conclusion)
    if parse_rationale(str(z)).rationale != z:
        return "reasons in the words of the frame"
    return replace(pair, rationale=str(z))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text[-1] in ".!?\"'”)" else ".")


# --- the split -------------------------------------------------------------------------------------------


def split_debates(pairs: dict[str, int], held_out: list[str], seed: int) -> dict[str, list[str]]:
    """Each file's debates: those that are named, then by the seed until a share is full, then the rest."""
    for name in held_out:
        known = any(debate.startswith(name) for debate in pairs)
        need(known, f"--test: no debate begins with {name}; there are {', '.join(sorted(pairs))}")
    test = [debate for debate in sorted(pairs) if debate.startswith(tuple(held_out))]
    rest = [debate for debate in sorted(pairs) if debate not in test]
    need(len(rest) >= 3, f"--test: leaves {len(rest)} debates; expected 3 or more, for the other files")
    random.Random(f"debates {seed}").shuffle(rest)
    share = SHARE * sum(pairs[debate] for debate in rest)
    split: dict[str, list[str]] = {"test": test, "human": [], "labelled": [], "unlabelled": []}
    for name, left in (("human", 2), ("labelled", 1)):
        while not split[name] or (sum(pairs[d] for d in split[name]) < share and len(rest) > left):
            split[name].append(rest.pop())
    return split | {"unlabelled": rest}


def placed(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    """The pairs in a new order, the better argument first in half of them."""
    rng.shuffle(pairs)
    letters = ([*"AB"] * len(pairs))[: len(pairs)]
    rng.shuffle(letters)
    both = zip(pairs, letters, strict=True)
    return [pair if (pair.label or "A") == letter else pair.swapped() for pair, letter in both]


# --- the conversion --------------------------------------------------------------------------------------


def convert(
    path: Path, target: Path, seed: int = 0, agree: int = 4, strict: bool = False, more: int = 0,
    test: list[str] = TEST,
) -> str:  # fmt: skip
    """Writes the directory; → what became of every pair and reason, as README.md has it as well."""
    readme = target / "README.md"
    ours = not target.exists() or (readme.is_file() and read_text(readme).startswith(HEAD))
    need(ours, f"{target}: holds something else than an earlier conversion; name another directory")
    compared, published = read_corpus(path)
    need(bool(published) or not strict, f"{path}: --strict: holds no {STRICT}/*.csv")
    left_out, reasons = Counter[str](), Counter[str]()
    pairs: dict[str, Pair] = {}
    votes = {}
    for one in compared:
        pair = decided(one, agree, published if strict else None)
        if isinstance(pair, str) or pair.id in pairs:
            left_out[pair if isinstance(pair, str) else "duplicate"] += 1
        else:
            pairs[pair.id], votes[pair.id] = pair, one.votes
    split = split_debates(Counter(pair.meta["debate"] for pair in pairs.values()), test, seed)
    files = {
        name: [pair for pair in pairs.values() if pair.meta["debate"] in split[name]]
        for name in ("human", "labelled", "unlabelled", "test")
    }
    told = [with_rationale(pair, votes[pair.id], reasons) for pair in files["human"]]
    files["human"] = [pair for pair in told if isinstance(pair, Pair)]
    left_out.update(f"human: {pair}" for pair in told if isinstance(pair, str))
    spare = (one for one in compared if one.debate in split["unlabelled"] and len({*one.arguments}) == 2)
    pool = {pair.id: pair for pair in (one.pair(None) for one in spare) if pair.id not in pairs}
    rng = random.Random(f"pairs {seed}")
    files["unlabelled"] += rng.sample(list(pool.values()), min(more, len(pool)))
    files = {name: placed(chosen, rng) for name, chosen in files.items()}
    account = {
        "read": f"{len(compared):,} compared pairs of {len({one.debate for one in compared})} debates",
        **{name: _described(chosen, split[name]) for name, chosen in files.items()},
        "undecided": f"{len(pool):,} in the unlabelled debates; {min(more, len(pool)):,} were added (--more)",
        "left out": _listed(left_out),
        "reasons": f"of human pairs, left out: {_listed(reasons)}",
    }
    said = "\n".join(_filled(head, text) for head, text in account.items())
    options = f"--seed {seed} --test {' '.join(test)} --more {more} "
    options += "--strict" if strict else f"--agree {agree}"
    _publish(target, files, f"{README}{options}\n\n```\n{said}\n```\n")
    return said


def _publish(target: Path, files: dict[str, list[Pair]], readme: str) -> None:
    with publish_directory(target) as place:
        for name, pairs in files.items():
            shown = map(_bare, pairs) if name == "unlabelled" else pairs
            write_rows(place / f"{name}.jsonl", (pair.to_json() for pair in shown))
        write_rows(place / "truth.jsonl", map(_truth, files["unlabelled"]))
        (place / "README.md").write_text(readme, encoding="utf-8")


def _bare(pair: Pair) -> Pair:
    """What an unlabelled pair may say of itself: whether the longer argument won is not of it."""
    meta = {name: value for name, value in pair.meta.items() if name != "votes"}
    return replace(pair, label=None, domain="", margin=None, meta=meta)


def _truth(pair: Pair) -> JsonRow:
    return {"id": pair.id, "label": pair.label, "domain": pair.domain, "margin": pair.margin}


def _described(pairs: list[Pair], debates: list[str]) -> str:
    won, places = Counter(pair.domain for pair in pairs), Counter(pair.label for pair in pairs)
    by_debate = Counter(pair.meta["debate"] for pair in pairs)
    listed = _listed(Counter({debate: by_debate[debate] for debate in debates}))
    longer = f"longer won {won['longer won']:,}, shorter won {won['shorter won']:,}"
    return f"{len(pairs):,} ({longer}; A {places['A']:,}, B {places['B']:,}): {listed}"


def _filled(head: str, text: str) -> str:
    return textwrap.fill(f"{head:12}{text}", 110, subsequent_indent=" " * 12, break_on_hyphens=False)


def _listed(counts: Counter[str]) -> str:
    return "; ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


# --- the command -----------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    parser = Parser("gramr2.extras.datasets convincing-arguments", description=__doc__)
    add = parser.add_argument
    add("path", type=Path, metavar="IN", help="UKPConvArg1.tar.gz, or the directory that it unpacks to")
    add("target", type=Path, metavar="OUT", help="the directory to write")
    add(
        "--seed", type=int, default=0, help="deals debates to files, orders pairs, places the better argument"
    )
    add(
        "--agree",
        type=int,
        choices=(3, 4, 5),
        default=4,
        help="workers of five who choose a pair's label [4]",
    )
    add("--strict", action="store_true", help="the corpus' own strict pairs and labels, instead of --agree")
    add("--more", type=int, default=0, metavar="N", help="unlabelled pairs that nobody decided, added [0]")
    add("--test", nargs="+", default=TEST, metavar="DEBATE", help=f"held out, by first words {TEST}")
    given = parser.parse_args(arguments)
    need(given.more >= 0, "--more: expected a number of pairs")
    with disk_errors_as_input_errors(given.target):
        print(convert(**vars(given)))
