"""Published judges of other kinds: one entry of `FORMATS` says how each asks for a verdict and writes it.

A judge that answers otherwise is one entry more: its canonical verdicts, how verdicts may begin, the function
that reads one, and a line for `infer.py --formats`. All may think first, and all are read strictly, as the
core reads its own: what is no letter is an abstention. Two of them score a response by itself.

It leaves out: the prompts of these judges. Each wants its own, word for word, from its model card; where a
checkpoint brings none, it is asked with ours, and that is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gramr2 import prompts
from gramr2.files import InputError
from gramr2.prompts import Verdict
from gramr2.votes import SCALAR, THINK, Format

# Patterns of what stands where the letter belongs.
_BRACKETS = r"\[\[([^\[\]]*)\]\]"
_BOX = r"\\boxed\{(?:\\text\{)?(?:Assistant )?([^{}]*)\}"
_SCALE = r"\\boxed\{\s*([1-6])\s*\}"
_ARENA = r"(?:\[\[|\\boxed\{)([AB](?=>)|[AB]=[AB])>{0,2}[AB]?(?:\]\]|\})"


_NUMBERS = {"1": "A", "2": "B"}


def _last(pattern: str, text: str, thinking_open: bool, letters: Mapping[str, str] = _NUMBERS) -> Verdict:
    """The last match of `pattern`'s group after any thinking; `letters`: what stands for A and B."""
    after, reason = prompts.after_thinking(text, thinking_open)
    if after is None:
        return Verdict(None, reason)
    found = re.findall(pattern, after, re.DOTALL)
    if not found:
        return Verdict(None, "no answer")
    return prompts.parse_letter(letters.get(found[-1], found[-1]))


def parse_brackets(text: str, thinking_open: bool = False) -> Verdict:
    """LLM-as-a-judge: the last [[A]] or [[B]]; [[C]] is a tie."""
    return _last(_BRACKETS, text, thinking_open)


def parse_rm_r1(text: str, thinking_open: bool = False) -> Verdict:
    """RM-R1: <answer>[[A]]</answer>"""
    answer, note = prompts.tagged_answer(text, thinking_open)
    if answer is None:
        return Verdict(None, note)
    found = re.fullmatch(_BRACKETS, answer)
    return prompts.parse_letter(found[1] if found else "no match", note)


def parse_boxed(text: str, thinking_open: bool = False) -> Verdict:
    r"""RRM: the last \boxed{A} or \boxed{Assistant 1}"""
    return _last(_BOX, text, thinking_open)


def parse_arena(text: str, thinking_open: bool = False) -> Verdict:
    """Arena: the last [[A>>B]], [[A>B]], [[A=B]], [[B>A]] or [[B>>A]], or one of them boxed"""
    return _last(_ARENA, text, thinking_open)


def parse_scale(text: str, thinking_open: bool = False) -> Verdict:
    r"""Nemotron-GenRM: the last \boxed{1} … \boxed{6}; up to 3 the first is better, from 4 on the second"""
    return _last(_SCALE, text, thinking_open, dict(zip("123456", "AAABBB", strict=True)))


def _asking_for(endings: tuple[str, str], prompt: str = prompts.JUDGE_PROMPT) -> str:
    """Our own prompt, with these verdicts in place of ours."""
    return prompt.replace(prompts.label_target("A or B"), " or ".join(endings))


_LETTERS = ("A", "B")
_IN_BRACKETS = ("[[A]]", "[[B]]")
_R1 = ("<answer>[[A]]</answer>", "<answer>[[B]]</answer>")
_BOXES = (r"\boxed{Assistant 1}", r"\boxed{Assistant 2}")
_RANKS = (r"\boxed{2}", r"\boxed{5}")
_ARROWS = ("[[A>B]]", "[[B>A]]")
_LABEL = _asking_for(_LETTERS, prompts.LABEL_PROMPT)

FORMATS = {each.name: each for each in (
    THINK,
    Format("label", "GRAM: the likelier letter, asked in both orders", _LETTERS, prompt=_LABEL),
    Format("brackets", "an instruct model as a judge: the last [[A]]", _IN_BRACKETS, ("[[",), parse_brackets,
           _asking_for(_IN_BRACKETS)),
    Format("rm-r1", f"RM-R1: {_R1[0]}", _R1, ("<answer>",), parse_rm_r1, _asking_for(_R1)),
    Format("boxed", f"RRM: the last {_BOXES[0]}", _BOXES, (r"\boxed{",), parse_boxed, _asking_for(_BOXES)),
    Format("arena", "Arena: the last [[A>B]] or [[A>>B]]", _ARROWS, ("[[", r"\boxed{"), parse_arena,
           _asking_for(_ARROWS)),
    Format("scale", r"Nemotron-GenRM: the last \boxed{1} (A) to \boxed{6} (B)", _RANKS, (r"\boxed{",),
           parse_scale, _asking_for(_RANKS), roles=True),
    SCALAR,
    Format("logit", "Nemotron-Reward: the higher logit of id 0 where an answer begins"),
)}  # fmt: skip


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise InputError(f"no format {name}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
