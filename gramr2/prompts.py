"""Every template with its parser: what a judge and a prover are asked, and how their answers are read.

The judge prompt is the paper's s = [c, x, y_a, y_b]: the task and its rules, the format of the answer, the
question and the two responses. A judge answers with a rationale z (Feedback, Comparison, Conclusion) between
thinking tags and then a letter (equation 2), or with the letter alone (equation 1). A prover is given s and
the label and writes the proof form ẑ of a rationale (equation 3); `proof_from_rationale` and
`rationale_from_proof` are the reversible rule between the two.

The wording is this project's own: the paper publishes a judge prompt with its checkpoints, and none for the
prover. A published checkpoint wants its own prompt byte for byte, so a template travels with the checkpoint
(`template_for`). A template is plain text in which {question}, {response_a}, {response_b} and, for a prover,
{label} stand for the data (or, as published, {user_input}, {response_1}, {response_2}); any other brace is
itself. All are filled in one pass, so data may contain a placeholder's name.

Verdicts are read strictly (`parse_verdict`): what cannot be read is an abstention, and never A or B.

What it leaves out: the chat template around a prompt (tokenizer.py); rules on what a rationale says
(denoise.py); how other published judges write their verdicts (extras/formats.py).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gramr2.files import InputError, read_text
from gramr2.records import Pair

# --- templates -------------------------------------------------------------------------------------------

TEMPLATES = Path(__file__).parent / "templates"


def own_template(kind: str, size: str = "long") -> str:
    """This project's own prompt; an editor's newline at the end is not a part of it.

    The short ones are for models whose examples are as long as the long ones' rules.
    """
    name = f"{kind}_prompt" if size == "long" else f"{kind}_{size}_prompt"
    return read_text(TEMPLATES / f"{name}.txt").removesuffix("\n")


JUDGE_PROMPT, LABEL_PROMPT, PROVER_PROMPT = (own_template(kind) for kind in ("judge", "label", "prover"))
HIDDEN_LABEL = "unknown"  # what a prover's prompt says where the label is hidden from it

_PLACEHOLDER = re.compile(r"\{(question|user_input|response_[ab12]|label)\}")
_AS_PUBLISHED = {"user_input": "question", "response_1": "response_a", "response_2": "response_b"}
_NEEDED: dict[str, tuple[str, ...]] = {"judge": ("question", "response_a", "response_b")}
_NEEDED["prover"] = (*_NEEDED["judge"], "label")


def check_template(template: str, kind: str = "judge", where: str = "template") -> str:
    """The template itself, or an InputError that names the placeholder which it lacks."""
    found = {_AS_PUBLISHED.get(name, name) for name in _PLACEHOLDER.findall(template)}
    for name in _NEEDED[kind]:
        if name not in found:
            raise InputError(f"{where}: no {{{name}}}; a {kind} prompt must say where it belongs")
    return template


def _filled(template: str, pair: Pair, label: str | None = None) -> str:
    """The template with the data in their places; without a label, {label} stays as it is."""
    values = {"question": pair.question, "response_a": pair.response_a, "response_b": pair.response_b}
    values |= {published: values[name] for published, name in _AS_PUBLISHED.items()}
    values["label"] = label or "{label}"
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


def judge_prompt(pair: Pair, template: str = JUDGE_PROMPT) -> str:
    """What a judge is asked about a pair, in the pair's own order."""
    return _filled(check_template(template), pair)


def prover_prompt(pair: Pair, template: str = PROVER_PROMPT, hide_label: bool = False) -> str:
    """What a prover is asked; with `hide_label` it has to find the label itself."""
    if pair.label is None and not hide_label:
        raise InputError(f"pair {pair.id}: no label to prove")
    return _filled(check_template(template, "prover"), pair, HIDDEN_LABEL if hide_label else pair.label)


ECHO = 8  # words: a proof's frame alone makes seven in a row


def echoes(text: str, template: str) -> str | None:
    """The first run of `ECHO` words that stands in a prompt's own words as well; None where there is none.

    Such a text repeats the form that it was to fill in. Case, marks and line breaks do not count.
    """

    def runs(text: str) -> list[str]:
        words = re.findall(r"\w+", text.casefold())
        return [" ".join(words[start : start + ECHO]) for start in range(len(words) - ECHO + 1)]

    asked = {run for piece in _PLACEHOLDER.split(template)[::2] for run in runs(piece)}
    return next((run for run in runs(text) if run in asked), None)


def forged(pair: Pair, template: str = JUDGE_PROMPT) -> tuple[str, ...]:
    """The fields of a pair in which a line begins as the template's own lines around what is filled in do, or
    as a turn of a conversation does.

    A response could so end before its end, and speak as the prompt: no frame of text keeps that out.
    """
    pieces = [each.split("\n") for each in _PLACEHOLDER.split(template)[::2]]
    beside = {_bare(line) for piece in pieces for line in (*piece[:2], *piece[-2:])}
    frame = tuple(line for line in beside if re.search(r"\w{3}", line))
    texts = {"question": [text for _, text in pair.messages]}
    texts |= {"response_a": [pair.response_a], "response_b": [pair.response_b]}
    lines = {
        name: [_bare(line) for text in each for line in text.splitlines()] for name, each in texts.items()
    }
    turns = tuple(f"{role}:" for role, _ in pair.messages) if len(pair.messages) > 1 else ()
    begins = {"question": (*frame, *map(str.casefold, turns)), "response_a": frame, "response_b": frame}
    return tuple(name for name in lines if any(line.startswith(begins[name]) for line in lines[name] if line))


def _bare(line: str) -> str:
    """A line without what may stand before its first word or bracket, and without its case."""
    return re.sub(r"^[^\w\[<(#]+", "", line).strip().casefold()


# --- which template a checkpoint wants -------------------------------------------------------------------

_PYTHON_STRING = re.compile(r"(\"\"\"|''')(?:[^\\]|\\.)*?\1", re.DOTALL)


def _template_in_card(card: str, kind: str) -> str | None:
    """The first Python string in a model card's code that has every placeholder which a prompt needs."""
    for found in _PYTHON_STRING.finditer(card):
        try:
            text = ast.literal_eval(found[0])
            check_template(text, kind)
        except (ValueError, SyntaxError):
            continue
        return text.strip() if card.startswith(".strip()", found.end()) else text
    return None


def template_for(
    directory: str | Path, prompt_file: str | Path | None = None, kind: str = "judge", ours: str | None = None
) -> tuple[str, str]:
    """→ (template, note): the prompt that a checkpoint's directory wants, and where it comes from.

    In this order: the file that was named; judge_prompt.txt (prover_prompt.txt) in the directory; the
    directory's model card, README.md, where that shows one; our own (`ours`, where the judge is of another
    kind than the paper's), and then the note is a warning.
    """
    directory = Path(directory)
    own = directory / f"{kind}_prompt.txt"
    if prompt_file is not None:
        note = f"prompt: {prompt_file}" + (f", instead of the checkpoint's own {own.name}" * own.exists())
        return check_template(read_text(prompt_file), kind, str(prompt_file)), note
    if own.exists():
        return check_template(read_text(own), kind, str(own)), f"prompt: {own}"
    card = directory / "README.md"
    if card.exists() and (template := _template_in_card(read_text(card), kind)) is not None:
        return template, f"prompt: as shown in {card}"
    ours = ours or {"judge": JUDGE_PROMPT, "prover": PROVER_PROMPT}[kind]
    return ours, f"warning: {directory} brings no {own.name} and no card with a prompt; using this project's"


# --- targets, and where the verdict stands ---------------------------------------------------------------


def label_target(label: str) -> str:
    """The answer of equation (1). The newlines make the letter a token of its own."""
    return f"<answer>\n{label}\n</answer>"


def judge_target(rationale: Rationale | str, label: str) -> str:
    """The answer of equation (2): the rationale (as shown, not as stored), then the label."""
    return f"<think>\n{rationale}\n</think>\n{label_target(label)}"


def continued(target: str, thinking_open: bool) -> str:
    """A target behind a chat frame: where this has opened <think>, it goes on there, or closes it first."""
    if not thinking_open:
        return target
    begun = target.startswith("<think>\n")
    return target.removeprefix("<think>\n") if begun else f"\n</think>\n\n{target}"


def verdict_ids(encode: Callable[[str], list[int]]) -> tuple[int, int, list[int]]:
    """→ (id of A, id of B, the canonical answer's ids before the letter), in a tokenizer.

    The two ids are those by which the canonical answers of A and of B differ.
    """
    a, b = (encode(label_target(label)) for label in "AB")
    differ = [place for place, (one, two) in enumerate(zip(a, b, strict=False)) if one != two]
    if len(a) != len(b) or len(differ) != 1:
        raise InputError("a tokenizer in which the verdict's letters are not tokens of their own")
    return a[differ[0]], b[differ[0]], a[: differ[0]]


# --- verdicts --------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """`label` is "A", "B" or None; `reason` says why None, or notes what was passed over."""

    label: str | None
    reason: str = ""


def parse_letter(answer: str, note: str = "") -> Verdict:
    """An answer that is a letter and nothing else, whatever its case."""
    answer = answer.strip()
    if answer.upper() in ("A", "B"):
        return Verdict(answer.upper(), note)
    if not answer:
        return Verdict(None, "empty answer")
    both = {"A", "B"} <= set(re.findall(r"\b[AB]\b", answer)) or answer.lower() == "both"
    return Verdict(None, "answer names both" if both else "answer is neither A nor B")


def after_thinking(text: str, thinking_open: bool) -> tuple[str | None, str]:
    """→ what follows "</think>"; or None, and why: thinking that has not closed, or goes on behind it.

    Which of two "</think>" is the judge's own, and which one it quotes, nothing tells: no verdict counts.
    """
    _, closed, after = text.partition("</think>")
    thinking, answer = text.find("<think>"), text.find("<answer>")
    if not closed and (thinking_open or (thinking >= 0 and (answer < 0 or thinking < answer))):
        return None, "unfinished thinking"
    if closed and re.search("</?think>", after):
        return None, "a second thinking after the first"
    return (after if closed else text), ""


def tagged_answer(text: str, thinking_open: bool) -> tuple[str | None, str]:
    """→ (what stands in the last closed <answer>…</answer> after the thinking, or None; a note, or why)."""
    after, reason = after_thinking(text, thinking_open)
    if after is None:
        return None, reason
    start = after.rfind("<answer>", 0, max(after.rfind("</answer>"), 0))
    if start < 0:
        return None, "unclosed answer" if "<answer>" in after else "no answer"
    answer, _, rest = after[start + len("<answer>") :].partition("</answer>")
    # Thinking that quotes "<think>…</think><answer>B</answer>" and is then cut looks finished, but for this.
    if rest.strip() and text.count("<think>") + thinking_open > text.count("</think>") > 0:
        return None, "unfinished thinking"
    return answer.strip(), "text after the answer" if rest.strip() else ""


def parse_verdict(text: str, opened: bool = False) -> Verdict:
    """The letter inside the last closed <answer>…</answer> after the thinking has closed, and nothing else.

    `opened`: the chat template had already opened <think>. What follows the answer is ignored, and noted. A
    text that was cut by its length limit is the caller's to refuse: nothing in it need show that.
    """
    answer, note = tagged_answer(text, opened)
    return Verdict(None, note) if answer is None else parse_letter(answer, note)


# --- rationales and proofs -------------------------------------------------------------------------------

_NAME = r"Response (⟦?[AB]⟧?)"  # as shown or as stored
_FEEDBACK = re.compile(rf"{_NAME}: (\S(?:.*\S)?)\nResponse (?!\1)(⟦?[AB]⟧?): (\S.*)", re.DOTALL)


@dataclass(frozen=True)
class Rationale:
    """The three parts of z, without their headings and stripped. `str()` is z itself."""

    feedback: str
    comparison: str
    conclusion: str

    def __str__(self) -> str:
        feedback, comparison = f"Feedback:\n{self.feedback}", f"Comparison:\n{self.comparison}"
        return f"{feedback}\n\n{comparison}\n\nConclusion:\n{self.conclusion}"


class Reading(NamedTuple):
    """A rationale, or None and the reason; from a proof also the label that it says it justifies."""

    rationale: Rationale | None
    reason: str = ""
    label: str | None = None


def _heading(words: str) -> re.Pattern:
    return re.compile(f"^{words}", re.MULTILINE)


# The frame of z: a part begins below its heading. "Comparision" is what the published prompt says.
_Z_HEADINGS = {"Feedback": "Feedback", "Comparison": "Comparisi?on", "Conclusion": "Conclusion"}
_RATIONALE_FRAME = {part: _heading(rf"{words}:[ \t]*(?:\n|\Z)") for part, words in _Z_HEADINGS.items()}
# The frame of ẑ: each part begins a line with these words. Feedback that is not given response by response
# takes the place of the first two.
_OPENING = _heading(rf"This argument justifies the choice of {_NAME}\.[ \t]*$")
_FIRST = _heading(rf"First, {_NAME}\. ?")
_SECOND = _heading(rf"Second, {_NAME}\. ?")
_IN_TURN = _heading("The responses in turn: ?")
_LAST_TWO = {"Comparison": _heading("Comparing the two: ?"), "Conclusion": _heading("Therefore: ?")}
_PROOF_FRAME = {"opening": _OPENING, "first response": _FIRST, "second response": _SECOND} | _LAST_TWO
_PROOF_FRAME_IN_TURN = {"opening": _OPENING, "Feedback": _IN_TURN} | _LAST_TWO
_TAGS = re.compile(r"</?(?:think|answer)>")


def _split_by(text: str, frame: dict[str, re.Pattern]) -> tuple[list[re.Match], list[str], str]:
    """→ (headings, parts, what is wrong or ""): every heading once, in order, no part empty."""
    headings = []
    for name, heading in frame.items():
        found = list(heading.finditer(text))
        if len(found) != 1:
            return [], [], f"{name} stands {len(found)} times" if found else f"{name} is missing"
        headings.append(found[0])
    starts = [heading.start() for heading in headings]
    if starts != sorted(starts):
        return [], [], "parts out of order"
    if text[: starts[0]].strip():
        return [], [], f"text before {next(iter(frame))}"
    ends = [*starts[1:], len(text)]
    parts = [text[heading.end() : end].strip() for heading, end in zip(headings, ends, strict=True)]
    empty = [name for name, part in zip(frame, parts, strict=True) if not part and name != "opening"]
    return headings, parts, f"{empty[0]} is empty" if empty else ""


def _checked(rationale: Rationale, label: str | None = None) -> Reading:
    """The rationale, where z can be told from its frame, from that of ẑ and from a verdict; else why not."""
    z = str(rationale)
    _, parts, reason = _split_by(z, _RATIONALE_FRAME)
    if tag := _TAGS.search(z):
        reason = f"{tag[0]} inside the rationale"
    elif any(heading.search(z) for heading in (*_PROOF_FRAME.values(), _IN_TURN)):
        reason = "words of the proof's frame at the beginning of a line"
    elif not reason and Rationale(*parts) != rationale:
        reason = "parts run into each other"
    return Reading(None if reason else rationale, reason, label)


def parse_rationale(text: str, thinking_open: bool = False) -> Reading:
    """Reads z from a judge's answer (the thinking, up to the last "</think>"), or from z itself."""
    z = text.strip()
    if thinking_open or z.startswith("<think>"):
        z, closed, _ = z.removeprefix("<think>").rpartition("</think>")
        if not closed:
            return Reading(None, "unfinished thinking")
    _, parts, reason = _split_by(z.strip(), _RATIONALE_FRAME)
    return Reading(None, reason) if reason else _checked(Rationale(*parts))


def proof_opening(label: str) -> str:
    return f"This argument justifies the choice of Response {label}."


def proof_from_rationale(rationale: Rationale | str, label: str) -> str:
    """z → ẑ: opens by saying what it justifies, takes one response, then the other, compares, concludes.

    Exact for every z that `parse_rationale` accepts. Slots inside z stay slots; the opening is plain, so a
    proof is never swapped: swap the rationale, and make the proof anew.
    """
    reading = parse_rationale(rationale) if isinstance(rationale, str) else _checked(rationale)
    if reading.rationale is None:
        raise InputError(f"not a well-formed rationale: {reading.reason}")
    z = reading.rationale
    if apart := _FEEDBACK.fullmatch(z.feedback):
        feedback = f"First, Response {apart[1]}. {apart[2]}\n\nSecond, Response {apart[3]}. {apart[4]}"
    else:
        feedback = f"The responses in turn: {z.feedback}"
    opening = proof_opening(label)
    return f"{opening}\n\n{feedback}\n\nComparing the two: {z.comparison}\n\nTherefore: {z.conclusion}"


def rationale_from_proof(text: str, thinking_open: bool = False) -> Reading:
    """ẑ → z, whatever a prover wrote: the rationale and the label it justifies, or what is missing.

    Thinking before the proof is passed over.
    """
    proof, reason = after_thinking(text, thinking_open)
    if proof is None:
        return Reading(None, reason)
    in_turn = _IN_TURN.search(proof) is not None
    headings, parts, reason = _split_by(proof.strip(), _PROOF_FRAME_IN_TURN if in_turn else _PROOF_FRAME)
    if reason:
        return Reading(None, reason)
    label = headings[0][1].strip("⟦⟧")
    if parts[0]:
        return Reading(None, "text between the opening and the first response", label)
    if in_turn:
        return _checked(Rationale(*parts[1:]), label)
    one, two = headings[1][1], headings[2][1]
    if one.strip("⟦⟧") == two.strip("⟦⟧"):
        return Reading(None, f"Response {'B' if 'A' in one else 'A'} is missing", label)
    feedback = f"Response {one}: {parts[1]}\nResponse {two}: {parts[2]}"
    return _checked(Rationale(feedback, *parts[3:]), label)
