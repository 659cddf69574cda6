"""The stages of training, in one table: what each is shown, what it is to write, and what it minimises.

Everything that tells one stage from another stands here. The loop (fit.py) is the same for all of them, so
comparing two trained models compares their objectives. `STAGES` is at the end; above it stand the functions
that make a record into an example, one for each target. Losses are named and not imported: reading this
table costs no torch.

It leaves out: the losses themselves (loss.py), which rows are used and in which order (plan.py), and the
settings that a stage runs under (recipes.py lays the tables named here over one another).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gramr2 import prompts
from gramr2.files import JsonRow
from gramr2.records import Example, Pair, Tokens, as_messages, show
from gramr2.settings import TrainSettings
from gramr2.tokenizer import Tokenizer


class Unusable(Exception):
    """A row that this stage cannot train on; the reason is counted."""


class Draws(NamedTuple):
    """Two numbers from 0 to 1 that decide what the prover is not shown; 1 hides nothing."""

    condition: float = 1.0
    label: float = 1.0


@dataclass(frozen=True)
class Frame:
    """What an example is written with: the model's tokenizer and chat template, the prompt, the settings."""

    tokenizer: Tokenizer
    template: str  # of the stage's prompt; "" where it has none
    settings: TrainSettings

    def answer(self, asked: str, target: str) -> Tokens:
        target = prompts.continued(target, self.tokenizer.opens_thinking)
        ids, start = self.tokenizer.example([("user", asked)], target)
        return Tokens(tuple(ids), start)


# ---------------------------------------------------------------------------------- a record as an example


def label_of(pair: Pair) -> str:
    if pair.label is None:
        raise Unusable('no "label"')
    return pair.label


def rationale_of(pair: Pair) -> prompts.Rationale:
    if not pair.rationale:
        raise Unusable('no "rationale"')
    reading = prompts.parse_rationale(pair.rationale)
    if reading.rationale is None:
        raise Unusable(f"rationale: {reading.reason}")
    return reading.rationale


def proof_example(pair: Pair, frame: Frame, draws: Draws) -> Example:
    """(4) The prompt with its label → the proof. In a share of the examples the condition is dropped, so that
    equation 5's denominator means something."""
    label, settings = label_of(pair), frame.settings
    proof = show(prompts.proof_from_rationale(rationale_of(pair), label))
    asked = prompts.prover_prompt(pair, frame.template, hide_label=draws.label < settings.hide_label)
    return Example((frame.answer("" if draws.condition < settings.drop_condition else asked, proof),))


def reasoned_example(pair: Pair, frame: Frame, _: Draws) -> Example:
    """(2) The judge's prompt → the rationale, then the label."""
    label = label_of(pair)
    target = prompts.judge_target(show(str(rationale_of(pair))), label)
    return Example((frame.answer(prompts.judge_prompt(pair, frame.template), target),))


def label_example(pair: Pair, frame: Frame, _: Draws) -> Example:
    """(1) The judge's prompt → the label. Label smoothing needs to know where the letter stands."""
    target = prompts.label_target(label_of(pair))
    answer = frame.answer(prompts.judge_prompt(pair, frame.template), target)
    if not frame.settings.label_smoothing:
        return Example((answer,))
    encode = frame.tokenizer.encode
    of_a, of_b, before = prompts.verdict_ids(encode)
    after = len(encode(prompts.label_target("A"))) - len(before)
    place = len(answer.ids) - 1 - after  # counted from the end, where the stop token stands
    return Example((answer,), other_letter=(place, of_b if pair.label == "A" else of_a))


def scored_example(pair: Pair, frame: Frame, _: Draws) -> Example:
    """Bradley-Terry: the conversation with the better response, then with the worse; nothing is written."""
    better, worse = pair.response_a, pair.response_b
    if label_of(pair) == "B":
        better, worse = worse, better
    margin = (pair.margin or 0.0) if frame.settings.use_margin else 0.0
    both = (frame.tokenizer.example(pair.messages, text)[0] for text in (better, worse))
    return Example(tuple(Tokens(tuple(ids), len(ids)) for ids in both), margin=abs(margin))


def text_example(row: JsonRow, frame: Frame, _: Draws) -> Example:
    """{"text"}: every token but the first is a target. A response given a prompt: the response's are."""
    if not isinstance(row, dict):
        raise Unusable("not an object with named fields")
    tokenizer = frame.tokenizer
    if isinstance(row.get("text"), str):
        ids = [*tokenizer.encode_document(row["text"]), *tokenizer.stop_ids[:1]]
        return Example((Tokens(tuple(ids), 1),))
    asked = row.get("messages") or row.get("prompt", row.get("question"))
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not isinstance(turns, list) or not isinstance(row.get("response"), str):
        raise Unusable('neither "text" nor "prompt" and "response"')
    ids, start = tokenizer.example(as_messages(turns), row["response"])
    return Example((Tokens(tuple(ids), start),))


# ---------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Stage:
    """One stage of training. `name` is what a run says of itself."""

    name: str
    equation: str
    example: Callable[[Any, Frame, Draws], Example]
    data: str  # what it trains on where nothing else is named: a field of settings.Sources
    tables: tuple[str, ...]  # of a recipe, in the order in which they lie over [train]
    template: str | None = None  # which prompt is shown: "judge", "prover", or none
    hides: bool = False  # whether `Draws` say what an example does not show
    own_prompt: str = ""  # this project's prompt for it (prompts.own_template), where that is another
    objective: str = "likelihood"  # what is minimised: a name of loss.OBJECTIVES
    head: str = "vocabulary"  # or "scalar"
    start: str = "backbone"  # the model that it begins from: a field of settings.Sources
    record: Callable[[JsonRow], Any] | None = Pair.from_json  # what a row of data is; None: as it stands


REWARD = Stage(
    "reward", "equation 2: the rationale, then the label", reasoned_example,
    data="human", tables=("train.reward",), template="judge",
)  # fmt: skip
STAGES = {
    "prover": Stage(
        "prover", "equation 4: the proof, given the pair and its label", proof_example,
        data="human", tables=("train.prover",), template="prover", hides=True, start="prover",
    ),
    "reward": REWARD,
    # The loop's last training is the stage reward again, and says so of itself.
    "finetune": replace(
        REWARD, equation="equation 2 again, on the human rationales: the last training of the loop",
        tables=("train.reward", "train.finetune"),
    ),
    "generative": Stage(
        "generative", "equation 1: the label alone", label_example,
        data="labelled", tables=("train.generative",), template="judge", own_prompt="label",
        objective="label likelihood",
    ),
    "discriminative": Stage(
        "discriminative", "Bradley-Terry on a scalar head", scored_example,
        data="labelled", tables=("train.discriminative",), objective="preference", head="scalar",
    ),
    "pretrain": Stage(
        "pretrain", "language modelling", text_example,
        data="pretrain", tables=("train.pretrain",), record=None,
    ),
}  # fmt: skip
