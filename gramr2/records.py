"""The records that pass between the parts: what a pair, a vote, a judgment and a proof are.

Frozen dataclasses, JSON both ways, and no behaviour beyond that but for two things: what votes come to
(`Judgment.from_votes`), and *slots*, the way in which a rationale names the two responses. The paper's
s = [c, x, y_a, y_b] holds x (`messages`) and the two responses; l is `label`; z is `rationale`.

Slots. A rationale says "Response A" and "Response B". So that a pair can be swapped together with its
rationale, these letters are marked when a text enters (`mark`) and shown when a model is to read them
(`show`): stored, "Response 1 is a better answer" becomes "Response ⟦A⟧ is a better answer". A swap
exchanges slots and nothing else, so articles, "vitamin B", option letters and code stay as they are. A
literal "⟦" is stored doubled. `Pair.rationale` is always in the stored form.

What it leaves out: prompts and parsing (prompts.py), files (data.py), published formats (extras/datasets.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from gramr2.fields import Fields, as_dataclass
from gramr2.files import InputError, JsonRow, need

Messages = tuple[tuple[str, str], ...]  # (role, content) of each turn
OTHER = {"A": "B", "B": "A", None: None}
UNDECIDED = 0.5

# --- slots -----------------------------------------------------------------------------------------------

_LETTER = {"1": "A", "2": "B", "a": "A", "b": "B", "one": "A", "two": "B"}
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_OPEN, _CLOSE, _JOIN = r"[(\[\"'“‘*]", r"[)\]\"'”’*]{1,2}", r"(?:and|or|nor|vs\.?|versus|&)"
_ARGUMENT = r"(?i:arg(?:[a-z]{1,8}ts?|s?\.?))"  # as people spell it
_NUMBERED = r"[ \u00a0]+(?:#|(?:no\.?|number) )?"
# "the best argument one could make" and "an argument one way or the other" count nothing.
_NUMERAL = r"(?i:one|two)(?! (?:can|could|would|may|might|must|should|of|way)\b(?!')|-)"
# What the two are called, up to the letter or number: "Response 1", "@Response 2", "resp. A", "@response1",
# "Output (a)"; and, where they are arguments, "argument 2", "Argument A2", "arg1", "a1".
_CALLED = {
    "response": rf"@?\b(?P<word>(?i:responses?|resp\.?)){_NUMBERED}|@[Rr]esponse|\bOutput (?=\()",
    "argument": rf"(?<!\b[Aa]n )\b(?P<word>{_ARGUMENT})(?:{_NUMBERED}|[#-]?(?=[12]))"
    r"|\b(?:Arguments? )?[Aa](?=[12])",
}
# The letter or number, and a second name with what joins it to the first.
_MENTION = {
    noun: re.compile(
        rf"(?:{called})(?P<open>{_OPEN}{{1,2}})?"
        rf"(?P<one>[12ABb]|a(?={_CLOSE})|{_NUMERAL})"
        rf"(?(open){_CLOSE}|(?!\w|[.,]\d|/c|-\w))"
        rf"(?:(?P<join>(?:,? {_JOIN} |/)@?)(?P<two>[12AB]|{_NUMERAL})(?!\w|[.,]\d))?"
    )
    for noun, called in _CALLED.items()
}
_STORED = re.compile(r"⟦(?:⟦|([AB])⟧)")
_ROLE = r"(?i:assistant|answer|output|model|completion|reply|chatbot|candidate|speaker|responses?|resp\.?)"
_ROLE = rf"(?:{_ROLE}|{_ARGUMENT})"
_SAYS = (
    r"(?:is|was|has|had|does|doesn['’]?t|did|didn['’]?t|gives|gave|provides|fails|offers|wins|seems|sounds|"
    r"includes?|lacks?|misses|beats|outperforms?|over|makes|uses|shows|talks|says|states|explains|presents)"
)
_UNMARKED = re.compile(
    # "cell A1", "table 2 is" and "the #1 reason" are none, and stand first so that nothing else finds them.
    r"\b(?i:cells?|columns?|rows?|section|appendix|figure|table|exhibit|level|size|grade)[ :=#$]+A?[12]\b"
    r"(?: (?:and|to) A[12]\b)?|\b(?:the|my) #1\b|(?P<mention>"
    # A letter or a number beside a role, or alone where it stands for somebody.
    rf"\b{_ROLE}(?:[ _#-]|{_NUMBERED})?[AB12]\b|\b{_ROLE} {_NUMERAL}\b|\b(?i:option|number) (?i:one|two)\b"
    rf"|\b(?i:responses?|assistant|arguments?)\s+(?:is )?{_OPEN}{{0,2}}[AB12]\b|@[AB12]\b|\bR[12]\b"
    rf"|\b{_ROLE} {_OPEN}{{1,2}}[ab]{_CLOSE}|\b[Mm]odel {_OPEN}?[mM]\b|(?<!\w)#[12]\b"
    r"|\([Aa][12]\)|\b[Aa]1/[Aa]2\b|(?<![\w.:$=+*/(-])[Aa][12](?:['’]?s|is|has|and)?\b(?![:*+/=])"
    rf"|⟦,? ?(?:{_JOIN}|/) ?{_OPEN}{{0,2}}(?:[12AB]|one|two)\b|\b[12] {_SAYS}\b"
    rf"|(?<![\w'’.-])[AB](?:['’]s|,? (?:{_SAYS}|and [AB]|or [AB])\b)"
    r"|\b(?i:than|prefer|prefers|choose|chose|pick|over|between|favou?r|both) [AB]\b(?!['’]?\w)"
    # A place: the first, the latter.
    rf"|\b(?i:first|second|1st|2nd|last|top|bottom) (?:(?:one|is|was|over)|{_ROLE})\b"
    rf"|\b[Tt]he (?:first|second|1st|2nd|former|latter)(?:'s\b| {_SAYS}\b|(?=[.,;:!?)]|$))"
    rf"|\b[Tt]he (?:former|latter) (?:one|{_ROLE})\b)"
)


def _mark_mention(found: re.Match) -> str:
    one, two, word = found["one"].lower(), (found["two"] or "").lower(), found["word"] or ""
    # "in response one …", "the right response (B)": lower-case, these are not sure. `unmarked` sees them.
    if word.startswith("resp") and (found["open"] or len(one) > 1):
        return found[0]
    # "Response 1 and 2" may go on with "examples": only the plural is sure.
    if two not in ("", "a", "b") and not word.lower().endswith("s"):
        return f"Response ⟦{_LETTER[one]}⟧{found['join']}{found['two']}"
    other = f"{found['join'].rstrip('@')}Response ⟦{_LETTER[two]}⟧" if two else ""
    return f"Response ⟦{_LETTER[one]}⟧{other}"


def mark(text: str, noun: str = "response") -> str:
    """A text that enters → its stored form: mentions of the two responses become slots, code stays.

    `noun` is what its writer was told that they are: where it is "argument", "A1" and "arg. 2" are names.
    """
    pieces = _CODE.split(text.replace("⟦", "⟦⟦"))
    pieces[::2] = [_MENTION[noun].sub(_mark_mention, piece) for piece in pieces[::2]]
    return "".join(pieces)


def show(slotted: str) -> str:
    """The stored form → what a model reads and writes."""
    return _STORED.sub(lambda found: found[1] or "⟦", slotted)


def swap(slotted: str) -> str:
    """Exchanges the slots and nothing else."""
    return _STORED.sub(lambda found: f"⟦{OTHER[found[1]]}⟧" if found[1] else found[0], slotted)


def named(slotted: str) -> set[str]:
    """The letters of the responses that a text in the stored form names."""
    return set(_STORED.findall(slotted)) - {""}


def unmarked(slotted: str) -> list[str]:
    """Mentions that a swap would miss ("Assistant A", "the first response", "A is better").

    A text that has any is used in its own order only.
    """
    found = (each["mention"] for each in _UNMARKED.finditer(_STORED.sub("⟦", slotted)))
    return list(filter(None, found))


def _is_stored(text: str) -> bool:
    return "⟦" in text and "⟦" not in _STORED.sub("", text)


# --- records ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """JSON both ways for the flat records: every field by its name and of its type, and no other."""

    def to_json(self) -> JsonRow:
        return asdict(self)

    @classmethod
    def from_json(cls, row: JsonRow):
        return as_dataclass(cls, row)


def content_id(messages: Messages, response_a: str, response_b: str) -> str:
    """A hash of the content: the same for both orders of the responses, and whatever the label."""
    content = json.dumps([messages, sorted((response_a, response_b))])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Pair:
    """A conversation and two responses to its last turn.

    `margin` says how much better the better one is, on its source's own scale. `meta` holds a
    benchmark's coordinates. `id` is the content's hash unless a file brings its own; a swap and a new
    label keep it.
    """

    messages: Messages
    response_a: str
    response_b: str
    label: str | None = None  # the better one: "A", "B", or None where it is not known
    rationale: str | None = None  # in the stored form
    source: str = ""
    domain: str = ""
    margin: float | None = None
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    id: str = ""

    def __post_init__(self):
        if self.label not in OTHER:
            raise InputError(f'label is {self.label!r}; expected "A", "B" or none')
        if not self.id:
            object.__setattr__(self, "id", self.content_id)

    @property
    def content_id(self) -> str:
        return content_id(self.messages, self.response_a, self.response_b)

    @property
    def question(self) -> str:
        """A single user turn as it is; a longer conversation as "Role: content" blocks, in order."""
        if len(self.messages) == 1 and self.messages[0][0] == "user":
            return self.messages[0][1]
        return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in self.messages)

    @property
    def swappable(self) -> bool:
        """Whether the rationale, if there is one, means the same after a swap."""
        return not (self.rationale and unmarked(self.rationale))

    def swapped(self) -> Pair:
        """The same pair in the other order. Ask `swappable` first where there is a rationale."""
        a, b, label = self.response_b, self.response_a, OTHER[self.label]
        rationale = self.rationale and swap(self.rationale)
        return replace(self, response_a=a, response_b=b, label=label, rationale=rationale)

    def to_json(self) -> JsonRow:
        row = {name: value for name, value in vars(self).items() if value not in (None, "", {})}
        del row["messages"]
        if len(self.messages) == 1 and self.messages[0][0] == "user":
            asked: JsonRow = {"question": self.messages[0][1]}
        else:
            asked = {"messages": [{"role": role, "content": text} for role, text in self.messages]}
        both = {"response_a": self.response_a, "response_b": self.response_b}
        return {"id": self.id} | asked | both | row

    @classmethod
    def from_json(cls, row: JsonRow) -> Pair:
        """A row of a pair file, in any of the common spellings (`SPELLINGS`)."""
        fields = Fields(row)
        a, b = _text(fields, "response_a"), _text(fields, "response_b")
        given = _known(fields, "rationale", "label")
        if not any(name in row for name in SPELLINGS["response_a"][:-1]):  # "chosen" it is
            if given.get("label", "A") != "A":
                raise InputError('fields "chosen" and "label" disagree; leave one of them out')
            given["label"] = "A"
        if "rationale" in given and not _is_stored(given["rationale"]):
            given["rationale"] = mark(given["rationale"])
        messages = messages_of(row)
        given |= _known(fields, "source", "domain", "margin", "meta")
        if row.get("id") is not None:
            given["id"] = str(fields.get("id", int if type(row["id"]) is int else str))
        return cls(messages, a, b, **given)


# Spellings of a pair file's fields; "chosen" and "rejected" bring the label with them.
SPELLINGS = {
    "question": ("question", "prompt", "instruction"),
    "response_a": ("response_a", "response_A", "response1", "response_1", "chosen"),
    "response_b": ("response_b", "response_B", "response2", "response_2", "rejected"),
}
# The fields that a pair need not have, and what they hold.
OPTIONAL: dict[str, type] = {"rationale": str, "label": str, "source": str, "domain": str, "margin": float}
OPTIONAL |= {"meta": dict}


def _text(fields: Fields, field_name: str) -> str:
    for name in SPELLINGS[field_name]:
        if name in fields.row:
            return fields.get(name, str)
    raise InputError(f'no field "{field_name}" (nor {", ".join(SPELLINGS[field_name][1:])})')


def _known(fields: Fields, *names: str) -> JsonRow:
    """Of these fields, those that the row has."""
    return {name: fields.get(name, OPTIONAL[name]) for name in names if fields.row.get(name) is not None}


def as_messages(turns: Any, name: str = "messages") -> Messages:
    """[{"role": …, "content": …}, …] → the frozen form, or says what is not as it must be."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f'field "{name}" is not a list of turns')
    texts = [turn.get(key) for turn in turns if isinstance(turn, dict) for key in ("role", "content")]
    if len(texts) < 2 * len(turns) or not all(isinstance(text, str) for text in texts):
        raise InputError(f'field "{name}" has a turn without a text "role" and "content"')
    return tuple((turn["role"], turn["content"]) for turn in turns)


def messages_of(row: JsonRow) -> Messages:
    """A row's conversation, or its one question."""
    fields = Fields(row)
    if row.get("messages") is not None:
        return as_messages(row["messages"])
    return (("user", _text(fields, "question")),)


@dataclass(frozen=True)
class Vote(_Record):
    """One sampled verdict. `label` and `p_a` are in the pair's own order, whatever order was asked."""

    label: str | None = field(metadata={"among": ("A", "B")})  # None: an abstention, and `reason` says why
    order: str = field(metadata={"among": ("AB", "BA")})  # "AB" as given, "BA" swapped
    # Softmax over {A, B} where the verdict stands; None where there is none.
    p_a: float | None = field(metadata={"low": 0, "high": 1})
    reason: str = ""
    text: str = ""  # what the model wrote, in the order that was asked
    seed: int = 0  # of the vote's own noise
    tokens: int = field(default=0, metadata={"low": 0})  # sampled

    @property
    def thinking(self) -> str:
        """What was written before the answer, without the tags; "" where the thinking did not close."""
        return self.text.rpartition("</think>")[0].strip().removeprefix("<think>").strip()

    @property
    def worth(self) -> float | None:
        """The probability of A that the vote stands for: its letter says which side, its softmax how far.

        A letter may be drawn against the softmax; it is then as sure of itself as that was of the other.
        """
        if self.label is None or self.p_a is None:
            return self.p_a
        return max(self.p_a, 1 - self.p_a) if self.label == "A" else min(self.p_a, 1 - self.p_a)


@dataclass(frozen=True)
class Judgment(_Record):
    """What the votes on one pair come to."""

    label: str | None = field(metadata={"among": ("A", "B")})
    # 0.5 where every vote abstained, and where the two orders disagree.
    p_a: float = field(metadata={"low": 0, "high": 1})
    # {"A": n, "B": n, "none": n}
    votes: dict[str, int] = field(hash=False, metadata={"low": 0})
    abstained: int = field(default=0, metadata={"low": 0})
    rationale: str | None = None  # of a vote for the label, in the pair's order; for readers: as shown
    orders_agree: bool | None = None  # None where only one order was asked, or could be read
    details: tuple[Vote, ...] = ()
    forged: tuple[str, ...] = ()  # fields of the pair in which a line of the judge's prompt stands
    scores: tuple[float, ...] = ()  # of A and of B, by a judge that scores each by itself

    @classmethod
    def from_votes(cls, votes: Sequence[Vote]) -> Judgment:
        """The label is what most of the votes say that were read, over both orders; of a tie, its lean.

        p_a is `mean_over_orders`; 0.5 where the orders' majorities are not the same letter, and where it
        would contradict the label.
        """
        given = [vote.label for vote in votes]
        counts = {"A": given.count("A"), "B": given.count("B"), "none": given.count(None)}
        p_a = mean_over_orders(votes, UNDECIDED)
        lean = None if p_a == UNDECIDED else "A" if p_a > UNDECIDED else "B"
        label = _majority(given) or lean
        by_order = [[vote.label for vote in votes if vote.order == order] for order in ("AB", "BA")]
        read = [_majority(labels) for labels in by_order if any(labels)]
        orders_agree = read in (["A", "A"], ["B", "B"]) if len(read) == 2 else None
        p_a = p_a if label == lean and orders_agree is not False else UNDECIDED
        rationale = _surest_rationale(label, votes)
        return cls(label, p_a, counts, counts["none"], rationale, orders_agree, tuple(votes))

    @classmethod
    def from_json(cls, row: JsonRow) -> Judgment:
        votes = tuple(Vote.from_json(vote) for vote in Fields(row).get("details", tuple[dict, ...], ()))
        found = super().from_json(row | {"details": votes})
        need(found.votes.keys() == {"A", "B", "none"}, 'field "votes": expected numbers for A, B and none')
        cast = cls.from_votes(votes).votes
        need(not votes or cast == found.votes, 'fields "votes" and "details" differ')
        return found

    @classmethod
    def from_row(cls, row: JsonRow) -> Judgment:
        """The judgment in a row of a judged file, without what says which pair it is of, and whose it is."""
        return cls.from_json({key: row[key] for key in row if key not in ("id", "pair", "judge")})


def nothing_read(votes: Mapping[str, int]) -> bool:
    """Whether answers were asked for, and none could be read. (Equal responses are not asked about.)"""
    return 0 < votes["none"] == sum(votes.values())


def _majority(labels: Sequence[str | None]) -> str | None:
    lead = labels.count("A") - labels.count("B")
    return "A" if lead > 0 else "B" if lead < 0 else None


def mean_over_orders(votes: Sequence[Vote], otherwise: float) -> float:
    """The mean of the two orders' mean worth: both weigh the same. `otherwise`: where no vote has one."""
    by_order: dict[str, list[float]] = {}
    for vote in votes:
        if vote.worth is not None:
            by_order.setdefault(vote.order, []).append(vote.worth)
    return fmean(map(fmean, by_order.values())) if by_order else otherwise


def _surest_rationale(label: str | None, votes: Sequence[Vote]) -> str | None:
    """The rationale of the surest vote for the label, in the pair's own order, as shown."""
    sign = 1 if label == "A" else -1
    given = [vote for vote in votes if vote.label == label and vote.p_a is not None and vote.thinking]
    for vote in sorted(given, key=lambda vote: -sign * (vote.p_a or 0.0)):
        written = mark(vote.thinking)
        if vote.order == "AB" or not unmarked(written):
            return show(written if vote.order == "AB" else swap(written))
    return None


@dataclass(frozen=True)
class Proof(_Record):
    """One sampled proof ẑ of a pair's label, with the two sums of equation (5)."""

    pair_id: str
    text: str
    logp_given: float  # log π(ẑ | s, l): the numerator
    logp_blank: float | None = None  # log π(ẑ) in an empty frame: the denominator; None: not taken
    score: float | None = None  # what proofs are chosen by, higher is better; None: not eligible
    finish: str = "stop"
    ineligible: str | None = None  # the reason, or None
    ids: tuple[int, ...] = ()
    select_by: str | None = None  # the score's name; equation-5: - logp_given / logp_blank, in (-inf, 0]


@dataclass(frozen=True)
class Tokens(_Record):
    """Token ids of prompt and target in one row, and the index at which the target begins."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Example:
    """One training example: the sequences that share its loss, and what else the loss needs to know."""

    sequences: tuple[Tokens, ...]  # one; or the better and the worse response's, for Bradley-Terry
    coefficients: tuple[float, ...] = ()  # of the target tokens; empty: 1 for each
    old_logprobs: tuple[float, ...] = ()  # a rollout's, under the policy that drew it
    other_letter: tuple[int, int] | None = None  # (place of the label's letter in ids, the other letter's id)
    margin: float = 0.0

    @property
    def length(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def units(self) -> int:
        """What the loss is averaged over: target tokens; a pair of scores counts once."""
        first = self.sequences[0]
        return 1 if len(self.sequences) == 2 else len(first.ids) - first.start
