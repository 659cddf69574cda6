"""From published preference data to pair files: one small streaming reader per format.

    python -m gramr2.extras.datasets
        lists the formats
    python -m gramr2.extras.datasets helpsteer3 train.jsonl.gz out.jsonl
        converts a file, or a directory of files
    python -m gramr2.extras.datasets multipref train.parquet out.jsonl --against judgebench.jsonl
        and removes the pairs that share 13 words in a row, or a shorter question, with a benchmark
    python -m gramr2.extras.datasets convincing-arguments UKPConvArg1.tar.gz data/arguments/
        makes all files of a run (convincing_arguments.py; --help after that name says more)

The paper's data: HelpSteer3 has human rationales (they become z, in the parts of prompts.Rationale); six
sets are labelled without rationales; Stack-Exchange is unlabelled; RM-Bench, JudgeBench and PPE are what it
is measured on; RewardBench and its second version, LLMBar and RMB are what others are measured on too. A
reader turns one row into pairs, or into the reason why it is none. In training data ties,
empty and identical responses and duplicates are dropped and counted, and the place of the better response is
balanced, and decided by the seed; a benchmark is converted whole and in its own order. Memory does not grow
with the input, but for 8 bytes a pair to find duplicates. A conversion is whole or leaves nothing.

What it leaves out: fetching, sampling and mixing of sets, and scoring of benchmarks (evaluate.py).
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is imported, or a package be missing
    from gramr2.interrupts import end_in_one_line

    end_in_one_line()

import bisect
import codecs
import contextlib
import gzip
import html.parser
import json
import math
import random
import re
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gramr2.fields import typed
from gramr2.files import (
    InputError,
    JsonRow,
    Parser,
    need,
    open_file,
    parse_json,
    publish_file,
    run_command,
)
from gramr2.prompts import Rationale, parse_rationale, parse_verdict
from gramr2.records import OTHER, Messages, Pair, as_messages, content_id, mark

MALFORMED_LIMIT = 0.01  # an input with a larger share of malformed rows is refused; one row is let pass
DRAWS = 2  # pairs drawn from one unlabelled question's answers, at most; no answer is in two
GRAM_WORDS = 13  # overlap with a benchmark: this many words in a row are shared
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

Item = Pair | JsonRow | str  # a pair; a list-wise benchmark's row; the reason why there is none

# --- files → rows ----------------------------------------------------------------------------------------


class Source:
    """One input file, read from front to back: yields (where, row), or the error in a row's place.

    What breaks a single row is that row's; what breaks the file (gzip, UTF-8, a cut array) is raised.
    """

    def __init__(self, path: Path, seed: int = 0):
        self.path, self.seed, self.done = path, seed, 0  # done: bytes of the file that were read
        self.kind = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")
        if not self.kind:
            raise self.error(f"the name should end in one of {', '.join(SUFFIXES)}")
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise self.error(error.strerror) from None

    def error(self, message: object) -> InputError:
        return InputError(f"{self.path}: {message}")

    def __iter__(self) -> Iterator[tuple[str, JsonRow | InputError]]:
        readers = {".jsonl": self._lines, ".json": self._array, ".parquet": self._parquet}
        try:
            yield from readers[self.kind.removesuffix(".gz")]()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self.error(f"broken gzip ({error}); fetch it again") from None
        except OSError as error:
            raise self.error(error.strerror or error) from None

    def chunks(self, size: int = 1 << 20) -> Iterator[bytes]:
        """The content, unpacked: so many bytes at a time, or line by line where `size` is 0."""
        with open_file(self.path) as raw:
            file = gzip.GzipFile(fileobj=raw) if self.kind.endswith(".gz") else raw
            for chunk in iter(lambda: file.read(size), b"") if size else file:
                self.done = raw.tell()
                yield chunk

    def _lines(self) -> Iterator[tuple[str, JsonRow | InputError]]:
        for count, line in enumerate(self.chunks(0), 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except UnicodeDecodeError:
                raise self.error(f"line {count} is not UTF-8 text") from None
            except ValueError as error:
                row = InputError(f"not JSON: {getattr(error, 'msg', error)}")
            yield f"line {count}", row

    def _array(self) -> Iterator[tuple[str, JsonRow]]:
        window, count = _Window(self), 0
        if window.take() != "[":
            raise self.error("not a JSON array; a file of one object a line is named .jsonl")
        after = window.take() if window.peek() == "]" else ","
        while after == ",":
            count += 1
            yield f"element {count}", window.value(count)
            after = window.take()
        if not after:
            raise self.error(f"the array is cut in the middle, after element {count}")
        if after != "]" or window.peek():
            raise self.error(f'expected "," or the end after element {count}')

    def _parquet(self) -> Iterator[tuple[str, JsonRow]]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise self.error("reading .parquet needs pyarrow: pip install 'gramr2[parquet]'") from None
        count = 0
        try:
            with open_file(self.path) as raw, pyarrow.parquet.ParquetFile(raw, pre_buffer=False) as table:
                for batch in table.iter_batches(batch_size=256):
                    self.done = self.size * count // table.metadata.num_rows
                    for count, row in enumerate(batch.to_pylist(), count + 1):  # noqa: B020 - counts on
                        yield f"row {count}", row
        except pyarrow.ArrowException as error:
            raise self.error(f"not a readable parquet file ({error})") from None


_WHITE = re.compile(r"[ \t\r\n]*")


class _Window:
    """The part of a long JSON text that is being read, one value at a time."""

    def __init__(self, source: Source):
        self.source, self.chunks, self.text, self.at, self.ended = source, source.chunks(), "", 0, False
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.read = json.JSONDecoder().raw_decode

    def fill(self) -> None:
        """Lets go of what was read, and takes the next chunk."""
        chunk = next(self.chunks, b"")
        self.ended = not chunk
        try:
            self.text, self.at = self.text[self.at :] + self.decode(chunk, final=self.ended), 0
        except UnicodeDecodeError:
            raise self.source.error("not UTF-8 text") from None

    def peek(self) -> str:
        """The next character that is not white; "" at the end."""
        while True:
            white = _WHITE.match(self.text, self.at)
            self.at = white.end() if white else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.fill()

    def take(self) -> str:
        character = self.peek()
        self.at += len(character)
        return character

    def value(self, count: int) -> Any:
        while True:
            self.peek()
            try:
                value, end = self.read(self.text, self.at)
                if end < len(self.text) - 16 or self.ended:  # a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                # An error within a token's length of the window's end may be the window's, not the file's.
                at_end = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if self.ended or not at_end:
                    wrong = "the array is cut in the middle," if at_end else f"not JSON ({error.msg}),"
                    raise self.source.error(f"{wrong} in element {count}") from None
            except (ValueError, RecursionError):
                raise self.source.error(f"not JSON (too deep or too long), in element {count}") from None
            self.fill()


# --- a row's fields --------------------------------------------------------------------------------------


def get(row: Any, name: str, kind: type | tuple = object, kind_name: str = "") -> Any:
    if not isinstance(row, dict) or name not in row:
        raise InputError(f'no field "{name}"')
    if not isinstance(row[name], kind):
        raise InputError(f'field "{name}" is not {kind_name}')
    return row[name]


def text(row: Any, name: str) -> str:
    return get(row, name, str, "text")


def two_texts(row: Any, one: str, two: str) -> tuple[str, str]:
    return text(row, one), text(row, two)


def items(row: Any, name: str, length: int = 0) -> list:
    value = get(row, name, list, "a list")
    if length and len(value) != length:
        raise InputError(f'field "{name}" has {len(value)} entries; expected {length}')
    return value


def number(row: Any, name: str) -> float:
    """A finite number, also where it is written as text."""
    written = get(row, name, (int, float, str), "a number")
    try:
        value = float(written)
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f'field "{name}" is not a number')
    return value


def choice(row: Any, name: str, values: dict[Any, Any]) -> Any:
    """What one of a few values means."""
    value = get(row, name)
    if not isinstance(value, (str, int)) or value not in values:
        raise InputError(f'field "{name}" is {value!r:.40}; expected one of {", ".join(map(str, values))}')
    return values[value]


def asked(row: Any, name: str) -> Messages:
    return (("user", text(row, name)),)


def conversations(row: JsonRow, a: str, b: str) -> tuple[Messages, str, str] | None:
    """Two conversations that differ in their last turn → (messages, response a, response b), or None."""
    one, two = as_messages(get(row, a), a), as_messages(get(row, b), b)
    if min(len(one), len(two)) < 2 or not one[-1][0] == two[-1][0] == "assistant":
        raise InputError(f'fields "{a}" and "{b}" should end with an answer of the assistant')
    return (one[:-1], one[-1][1], two[-1][1]) if one[:-1] == two[:-1] else None


def by_margin(messages: Messages, a: str, b: str, margin: float, source: str, **more: Any) -> Pair | str:
    """The pair with the label that a margin above 0 (A is better) or below it gives; 0 is a tie."""
    label = "A" if margin > 0 else "B"
    return Pair(messages, a, b, label, source=source, margin=abs(margin), **more) if margin else "tie"


# --- rows → pairs ----------------------------------------------------------------------------------------

Reader = Callable[[JsonRow, Source], Iterable[Item]]


class Dataset(NamedTuple):
    """A published format: its reader, where it is published, whether it is a benchmark, and what its files
    are called where others stand beside them."""

    read: Reader
    published: str
    benchmark: bool
    files: str

    def items(self, row: Any, source: Source) -> list[Item]:
        """All that a row comes to, or an InputError where it is malformed."""
        if isinstance(row, InputError):
            raise row
        if not isinstance(row, dict):
            raise InputError("not an object with named fields")
        return list(self.read(row, source))


DATASETS: dict[str, Dataset] = {}


def reader(
    name: str, published: str, benchmark: bool = False, files: str = "*"
) -> Callable[[Reader], Reader]:
    """Registers a reader; the first line of its docstring is what the listing says."""

    def register(read: Reader) -> Reader:
        DATASETS[name] = Dataset(read, published, benchmark, files)
        return read

    return register


@reader("pairs", "a pair file of your own")
def pairs(row: JsonRow, source: Source) -> Iterator[Item]:
    """question (or prompt, instruction, messages), response_a (chosen, response1), …; any label"""
    yield Pair.from_json(row)


@reader("helpsteer3", "nvidia/HelpSteer3, preference/*.jsonl.gz")
def helpsteer3(row: JsonRow, source: Source) -> Iterator[Item]:
    """labels and human rationales"""
    overall, messages = number(row, "overall_preference"), as_messages(get(row, "context"), "context")
    responses = two_texts(row, "response1", "response2")
    more: dict[str, Any] = {"domain": text(row, "domain")}
    if overall:
        more["rationale"] = _human_rationale(items(row, "individual_preference"), overall)
    yield by_margin(messages, *responses, -overall, "helpsteer3", **more)


HUMAN_WORDS = ("feedback1", "feedback2", "reasoning")


def _human_rationale(annotations: list, overall: float) -> str | None:
    """z from the annotator who agrees with the overall preference, and most nearly; None where none does."""
    agreeing = []
    for annotation in annotations:
        said = (get(annotation, name, (str, type(None)), "text") for name in HUMAN_WORDS)
        words = [(one or "").strip() for one in said]
        score = number(annotation, "score")
        if score * overall > 0 and all(words):
            agreeing.append((abs(score - overall), words))
    if not agreeing:
        return None
    first, second, reasoning = map(mark, min(agreeing, key=lambda one: one[0])[1])
    label = "A" if overall < 0 else "B"
    better = {1.0: "slightly better", 3.0: "much better"}.get(abs(overall), "better")
    z = Rationale(
        feedback=f"Response ⟦A⟧: {first}\nResponse ⟦B⟧: {second}",
        comparison=reasoning,
        conclusion=f"Response ⟦{label}⟧ is {better} than Response ⟦{OTHER[label]}⟧.",
    )
    # Words that would be taken for the frame (a line "Conclusion:", say) make it unusable.
    return str(z) if parse_rationale(str(z)).rationale == z else None


MULTIPREF = {"A-is-clearly-better": 2, "A-is-slightly-better": 1, "Tie": 0}
MULTIPREF |= {"B-is-slightly-better": -1, "B-is-clearly-better": -2}


@reader("multipref", "allenai/multipref")
def multipref(row: JsonRow, source: Source) -> Iterator[Item]:
    """labels: the sum of all annotators' preferences"""
    votes = items(row, "normal_worker_annotations") + items(row, "expert_worker_annotations")
    total = sum(choice(vote, "overall_pref", MULTIPREF) for vote in votes)
    responses = two_texts(row, "completion_a", "completion_b")
    yield by_margin(asked(row, "text"), *responses, total / max(len(votes), 1), "multipref")


@reader("codeultrafeedback", "coseal/CodeUltraFeedback")
def codeultrafeedback(row: JsonRow, source: Source) -> Iterator[Item]:
    """labels: every two responses of an instruction whose ratings differ"""
    ratings = {text(one, "model"): str(get(one, "rating")) for one in items(row, "annotations")}
    rated = {model: float(each) for model, each in ratings.items() if re.fullmatch(r"\d+(\.\d+)?", each)}
    answers = [two_texts(one, "model", "response") for one in items(row, "responses")]
    question = asked(row, "instruction")
    for (model_a, a), (model_b, b) in combinations(answers, 2):
        if {model_a, model_b} <= rated.keys():
            margin = rated[model_a] - rated[model_b]
            yield by_margin(question, a, b, margin, "codeultrafeedback", domain="code")
        else:
            yield "no rating"


@reader("unified-feedback", "llm-blender/Unified-Feedback")
def unified_feedback(row: JsonRow, source: Source) -> Iterator[Item]:
    """labels: differing ratings"""
    margin = number(row, "conv_A_rating") - number(row, "conv_B_rating")
    found = conversations(row, "conv_A", "conv_B")
    yield by_margin(*found, margin, "unified-feedback") if found else "different conversations"


@reader("preference-collection", "prometheus-eval/Preference-Collection")
def preference_collection(row: JsonRow, source: Source) -> Iterator[Item]:
    """labels: the original preference"""
    label = choice(row, "orig_preference", {"A": "A", "B": "B"})
    margin = abs(number(row, "orig_score_A") - number(row, "orig_score_B"))
    question, responses = asked(row, "orig_instruction"), two_texts(row, "orig_response_A", "orig_response_B")
    yield Pair(question, *responses, label, source="preference-collection", margin=margin)


def _safe_rlhf(row: JsonRow, which: str) -> Pair:
    label = choice(row, f"{which}_response_id", {0: "A", 1: "B"})
    responses = two_texts(row, "response_0", "response_1")
    return Pair(asked(row, "prompt"), *responses, label, source=f"safe-rlhf-{which}")


@reader("safe-rlhf-better", "PKU-Alignment/PKU-SafeRLHF")
def safe_rlhf_better(row: JsonRow, source: Source) -> Iterator[Item]:
    """labels: the more helpful response (better_response_id)"""
    yield _safe_rlhf(row, "better")


@reader("safe-rlhf-safer", "PKU-Alignment/PKU-SafeRLHF")
def safe_rlhf_safer(row: JsonRow, source: Source) -> Iterator[Item]:
    """labels: the safer response (safer_response_id)"""
    yield _safe_rlhf(row, "safer")


@reader("skywork-80k", "Skywork/Skywork-Reward-Preference-80K-v0.2")
def skywork_80k(row: JsonRow, source: Source) -> Iterator[Item]:
    """labels: chosen and rejected"""
    found = conversations(row, "chosen", "rejected")
    yield Pair(*found, "A", source="skywork-80k") if found else "different conversations"


class _PlainText(html.parser.HTMLParser):
    """HTML → text: paragraphs and list items as lines, code as it is, between backticks."""

    BLOCKS = ("p", "ul", "ol", "dl", "div", "blockquote", "hr", "table", "h1", "h2", "h3", "h4", "h5", "h6")
    CLOSE = dict.fromkeys(BLOCKS, "\n\n") | {"code": "`"}
    LINES = dict.fromkeys(("br", "tr", "dt", "dd"), "\n")
    OPEN = CLOSE | LINES | {"li": "\n- ", "td": " ", "th": " ", "sup": "^", "sub": "_"}

    def __init__(self):
        super().__init__()
        self.blocks, self.pending, self.in_pre = [], [], False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "pre":
            self.flush(in_pre=True)
        elif not self.in_pre:
            self.pending.append(self.OPEN.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self.flush(in_pre=False)
        elif not self.in_pre:
            self.pending.append(self.CLOSE.get(tag, ""))

    def handle_data(self, data: str) -> None:
        self.pending.append(data if self.in_pre else re.sub(r"\s+", " ", data))

    def flush(self, in_pre: bool) -> None:
        block = "".join(self.pending)
        if self.in_pre:
            block = "```\n" + block.strip("\r\n") + "\n```"
        else:
            block = re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", block)).strip()
        self.blocks += [block] if block else []
        self.pending, self.in_pre = [], in_pre


def plain(markup: str) -> str:
    parser = _PlainText()
    try:
        parser.feed(markup)
        parser.close()
    except AssertionError:  # how the standard library refuses a declaration ("<![if …") it does not know
        raise InputError("HTML that cannot be read") from None
    parser.flush(in_pre=False)
    return "\n\n".join(parser.blocks)


@reader("stack-exchange", "HuggingFaceH4/stack-exchange-preferences")
def stack_exchange(row: JsonRow, source: Source) -> Iterator[Item]:
    """no labels: answers of one question, drawn by the seed

    pm_score is how popular an answer was on its site, and not used.
    """
    question = plain(text(row, "question"))
    answers = [plain(text(answer, "text")) for answer in items(row, "answers")]
    if len(answers) < 2:
        yield "fewer than two answers"
    random.Random(f"{source.seed}:{question}").shuffle(answers)
    for a, b in list(zip(answers[::2], answers[1::2], strict=False))[:DRAWS]:
        yield Pair((("user", question),), a, b, source="stack-exchange")


GRAM_RR = (
    "[User Question]\n",
    "\n\n[The Start of Assistant A's Response]\n",
    "\n[The End of Assistant A's Response]\n\n[The Start of Assistant B's Response]\n",
    "\n[The End of Assistant B's Response]",
)


@reader("gram-rr", "wangclnlp/GRAM-RR-TrainingData")
def gram_rr(row: JsonRow, source: Source) -> Iterator[Item]:
    """labels and synthesized rationales, out of the judge's prompts and answers"""
    prompt = text(row, "instruction") + ("\n" + text(row, "input") if row.get("input") else "")
    answer = text(row, "output")
    counts = [prompt.count(line) for between in GRAM_RR for line in between.split("\n") if line]
    if 0 in counts:
        raise InputError('field "instruction" lacks the delimiters of a judge prompt ("[User Question]", …)')
    found = re.fullmatch(".*" + "(.*)".join(map(re.escape, GRAM_RR)) + r"\s*", prompt, re.DOTALL)
    label, z = parse_verdict(answer).label, parse_rationale(answer).rationale
    if max(counts) > 1 or found is None:
        yield "ambiguous delimiters"
    elif label is None:
        yield "no verdict"
    else:
        yield Pair((("user", found[1]),), found[2], found[3], label, mark(str(z)) if z else None, "gram-rr")


RM_BENCH = {"chat": "chat", "math": "math", "code": "code"}
RM_BENCH |= {"safety-refuse": "safety", "safety-response": "safety"}


@reader("rm-bench", "THU-KEG/RM-Bench", benchmark=True)
def rm_bench(row: JsonRow, source: Source) -> Iterator[Item]:
    """benchmark: nine pairs a prompt, the chosen response as A

    `meta` has the cell: chosen (row) and rejected (column), each 0 concise, 1 plain, 2 markdown.
    """
    subset = row.get("domain") or next((name for name in RM_BENCH if name in source.path.name), None)
    if subset is None:
        raise InputError(f'no field "domain", and the file\'s name says none of {", ".join(RM_BENCH)}')
    domain = choice({"domain": subset}, "domain", RM_BENCH)
    chosen, rejected = (items(row, name, 3) for name in ("chosen", "rejected"))
    about = {"prompt": _id(row, "id"), "subset": subset}
    yield from _each_with_each(asked(row, "prompt"), chosen, rejected, "rm-bench", domain, about)


def _id(row: JsonRow, name: str) -> int | str:
    return get(row, name, (int, str), "a number or text")


def _each_with_each(
    question: Messages, chosen: list, rejected: list, source: str, domain: str, about: JsonRow
) -> Iterator[Pair]:
    """A prompt's pairs: every chosen response, as A, with every rejected one."""
    for i, j in product(range(len(chosen)), range(len(rejected))):
        answers = text({"chosen": chosen[i]}, "chosen"), text({"rejected": rejected[j]}, "rejected")
        meta = about | {"chosen": i, "rejected": j}
        yield Pair(question, *answers, "A", source=source, domain=domain, meta=meta)


JUDGEBENCH = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning"}
JUDGEBENCH |= {"livebench-math": "math", "livecodebench": "coding"}


def judgebench_pair(row: JsonRow) -> Pair:
    label = choice(row, "label", {"A>B": "A", "B>A": "B"})
    question, responses = asked(row, "question"), two_texts(row, "response_A", "response_B")
    subset = text(row, "source")
    name = next((name for name in JUDGEBENCH if subset.startswith(name)), subset)
    domain = choice({"source": name}, "source", JUDGEBENCH)
    meta = {"pair_id": text(row, "pair_id"), "subset": subset, "model": row.get("response_model", "")}
    return Pair(question, *responses, label, None, "judgebench", domain, None, meta)


@reader("judgebench", "ScalerLab/JudgeBench", benchmark=True)
def judgebench(row: JsonRow, source: Source) -> Iterator[Item]:
    """benchmark: pairs of one model's responses"""
    yield judgebench_pair(row)


@reader("ppe", "lmarena-ai/PPE-*-Best-of-K", benchmark=True)
def ppe(row: JsonRow, source: Source) -> Iterator[Item]:
    """benchmark: lists of responses, with what each one scores"""
    count = sum(re.fullmatch(r"response_\d+", name) is not None for name in row)
    responses = [text(row, f"response_{k}") for k in range(1, 1 + max(count, 1))]
    scores = [number({"scores": score}, "scores") for score in items(row, "scores", len(responses))]
    meta = {name: row.get(name) for name in ("model_name", "conflict_pairs", "sampled_conflict_pairs")}
    about = {"id": str(get(row, "question_id")), "question": text(row, "prompt"), "source": "ppe"}
    yield about | {"responses": responses, "scores": scores, "meta": meta}


# The sections' subsets, and how much each one weighs: as many as it has pairs, but for math-prm's 447, which
# weigh as much as all code.
REWARDBENCH = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28}
    | {"mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134}
    | {"llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154}
    | {"xstest-should-respond": 250, "donotanswer": 136},
    "Reasoning": {"math-prm": 984}
    | dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164),
}


@reader("rewardbench", "allenai/reward-bench", benchmark=True)
def rewardbench(row: JsonRow, source: Source) -> Iterator[Item]:
    """benchmark: pairs, the chosen response as A (its split "filtered")"""
    subset = choice(row, "subset", {name: name for subsets in REWARDBENCH.values() for name in subsets})
    about = {"prompt": _id(row, "id")}
    answers = two_texts(row, "chosen", "rejected")
    yield Pair(asked(row, "prompt"), *answers, "A", source="rewardbench", domain=subset, meta=about)


REWARDBENCH2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")


@reader("rewardbench2", "allenai/reward-bench-2", benchmark=True)
def rewardbench2(row: JsonRow, source: Source) -> Iterator[Item]:
    """benchmark: a prompt's correct responses, as A, each with each wrong one; one with three but in Ties

    `meta` has the prompt, how many pairs it has, and which of its responses these two are.
    """
    domain = choice(row, "subset", {name: name for name in REWARDBENCH2})
    responses, prompt = items(row, "chosen") + items(row, "rejected"), _id(row, "id")
    count = 1
    if domain == "Ties":
        named = re.fullmatch(r"(ref|tied):\d+", str(prompt))
        need(named is not None, 'field "id" is neither ref:NUMBER nor tied:NUMBER')
        count = get(row, "num_correct", int, "a number")
    correct, wrong = responses[: max(count, 0)], responses[max(count, 0) :]
    need(min(len(correct), len(wrong)) > 0, "no correct response, or no wrong one")
    about = {"prompt": prompt, "pairs": len(correct) * len(wrong)}
    yield from _each_with_each(asked(row, "prompt"), correct, wrong, "rewardbench2", domain, about)


LLMBAR = ("Natural", "Neighbor", "GPTInst", "GPTOut", "Manual")


@reader("llmbar", "princeton-nlp/LLMBar", benchmark=True, files="dataset.json")
def llmbar(row: JsonRow, source: Source) -> Iterator[Item]:
    """benchmark: pairs; the path says which of the five subsets"""
    path = "/".join(source.path.parts[-2:])
    subset = next((name for name in LLMBAR if name in path), None)
    if subset is None:
        raise InputError(f"the file's path says none of {', '.join(LLMBAR)}")
    label, answers = choice(row, "label", {1: "A", 2: "B"}), two_texts(row, "output_1", "output_2")
    yield Pair(asked(row, "input"), *answers, label, source="llmbar", domain=subset)


RMB = tuple(f"{goal}, {kind}" for goal in ("Helpfulness", "Harmlessness") for kind in ("best of n", "pairs"))


@reader("rmb", "Zhou-Zoey/RMB-Reward-Model-Benchmark", benchmark=True)
def rmb(row: JsonRow, source: Source) -> Iterator[Item]:
    """benchmark: pairs, and the best of a list, as A, with each of the others"""
    listed = "bon_best" in row
    best, others = ("bon_best", items(row, "loser_list")) if listed else ("chosen", [get(row, "reject")])
    answers = [text(each, "answer") for each in (get(row, best), *others)]
    need(len(answers) > 1, 'field "loser_list" is empty')
    path, kind = text(row, "category_path"), "best of n" if listed else "pairs"
    found = {"category_path": f"{path.partition('/')[2].partition('/')[0]}, {kind}"}
    domain = choice(found, "category_path", {name: name for name in RMB})
    about = {"prompt": _id(row, "bon_uid" if listed else "pair_uid"), "pairs": len(answers) - 1, "path": path}
    messages = as_messages(get(row, "conversation_input"), "conversation_input")
    yield from _each_with_each(messages, answers[:1], answers[1:], "rmb", domain, about)


# --- what is dropped, and what is placed where -----------------------------------------------------------


class Seen:
    """A set of 64-bit keys at 8 bytes each: sorted arrays, in buckets by the key's first bits."""

    def __init__(self):
        self.buckets = [array("Q") for _ in range(1 << 14)]

    def add(self, key: int) -> bool:
        """Whether the key is new."""
        bucket = self.buckets[key >> 50]
        at = bisect.bisect_left(bucket, key)
        new = at == len(bucket) or bucket[at] != key
        if new:
            bucket.insert(at, key)
        return new


def _words(of: str) -> list[str]:
    return re.findall(r"\w+", of.lower())


def _grams(words: list[str]) -> np.ndarray:
    """A 64-bit hash of every run of GRAM_WORDS words."""
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).astype(np.uint64)
    count = max(0, len(words) - GRAM_WORDS + 1)
    grams = np.zeros(count, np.uint64)
    for k in range(GRAM_WORDS):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[k : k + count]
    return grams


def _texts(item: Pair | JsonRow) -> list[list[str]]:
    """The words of each text; the question comes first."""
    if isinstance(item, Pair):
        turns = [content for _, content in item.messages[::-1]]
        return list(map(_words, (*turns, item.response_a, item.response_b)))
    return list(map(_words, (item["question"], *item["responses"])))


class Overlap:
    """What a benchmark file shares with a pair: a run of words, or a question that is shorter than that."""

    def __init__(self, path: Path):
        self.name, self.questions, grams = path.name, set(), [np.zeros(0, np.uint64)]
        for item in self._items(Source(path)):
            found = _texts(item)
            self.questions.add(tuple(found[0]))
            grams += [_grams(words) for words in found]
        # Sorted, with one more that nothing comes after.
        self.grams = np.append(np.unique(np.concatenate(grams)), np.uint64(2**64 - 1))

    @staticmethod
    def _items(source: Source) -> Iterator[Pair | JsonRow]:
        for where, row in source:
            if isinstance(row, dict):
                row = {"domain": "chat"} | row  # RM-Bench's files by domain do not say it; any will do here
            for name in (*(name for name, each in DATASETS.items() if each.benchmark), "pairs"):
                with contextlib.suppress(InputError):
                    items = DATASETS[name].items(row, source)
                    yield from (item for item in items if not isinstance(item, str))
                    break
            else:
                raise source.error(f"{where} is neither a benchmark's row nor a pair")

    def shares(self, pair: Pair) -> bool:
        found = _texts(pair)
        if len(found[0]) < GRAM_WORDS and tuple(found[0]) in self.questions:
            return True
        grams = np.concatenate(list(map(_grams, found)))
        return bool((self.grams[np.searchsorted(self.grams, grams)] == grams).any())


class Sieve:
    """Training data's filters, and the placement of the better response."""

    def __init__(self, overlaps: list[Overlap], max_characters: int, domains: Sequence[str], seed: int):
        self.overlaps, self.max_characters, self.seen = overlaps, max_characters, Seen()
        self.domains = domains
        self.random, self.placed = random.Random(seed), Counter[str | None]()

    def passes(self, pair: Pair) -> Item:
        """The pair in its place, or the reason why it is dropped."""
        a, b = pair.response_a.strip(), pair.response_b.strip()
        if self.domains and pair.domain not in self.domains:
            return "of another domain"
        if not a or not b or not pair.messages[-1][1].strip():
            return "empty"
        if a == b:
            return "identical responses"
        if 0 < self.max_characters < len(pair.question) + len(pair.response_a) + len(pair.response_b):
            return "over-long"
        if not self.seen.add(int(content_id(pair.messages, pair.response_a, pair.response_b)[:16], 16)):
            return "duplicate"
        overlap = next((overlap for overlap in self.overlaps if overlap.shares(pair)), None)
        return f"overlap with {overlap.name}" if overlap else self.place(pair)

    def place(self, pair: Pair) -> Pair:
        """As many better responses in one place as in the other; where they are even, by chance."""
        ahead = self.placed["A"] - self.placed["B"]
        wanted = ("A" if ahead < 0 else "B") if ahead else self.random.choice("AB")
        if pair.label not in (None, wanted) and pair.swappable:
            pair = pair.swapped()
        self.placed[pair.label] += 1
        return pair


# --- the conversion --------------------------------------------------------------------------------------

KEPT = {"A": "with A better", "B": "with B better", None: "without a label"}
SHOWN = 5  # malformed rows that the account describes


@dataclass
class Account:
    """What became of every row and pair."""

    read: int = 0
    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    malformed: int = 0
    shown: list[str] = field(default_factory=list)  # where, and what is wrong
    seconds: float = 0.0

    def count(self, item: Item) -> None:
        if isinstance(item, str):
            self.dropped[item] += 1
            return
        self.kept[KEPT[item.label] if isinstance(item, Pair) else "lists"] += 1
        if isinstance(item, Pair) and item.rationale:
            self.notes["with a rationale"] += 1
            self.notes["with a rationale for its own order only"] += not item.swappable

    def refuse(self, where: str, error: Exception) -> None:
        self.malformed += 1
        if len(self.shown) < SHOWN:
            said = str(error) if isinstance(error, InputError) else "text that is not Unicode"
            self.shown.append(f"{where} ({said})")

    def check(self, name: str, path: str | Path, limit: float) -> None:
        """Refuses a file that is not what it was said to be, rather than return scraps of it."""
        if self.malformed > max(1 if limit else 0, limit * self.read):
            share = f"{self.malformed:,} of {self.read:,} rows are not as {name} has them (limit {limit:.0%})"
            raise InputError(f"{path}: {share}; the first: {self.shown[0]}")
        if not self.kept:
            reasons = _listed(self.dropped) or "; ".join(self.shown) or "there are no rows"
            raise InputError(f"{path}: nothing to keep: {reasons}")

    def lines(self) -> Iterator[str]:
        rows_a_second = self.read / max(self.seconds, 1e-9)
        more = f"; and {self.malformed - SHOWN:,} more" if self.malformed > SHOWN else ""
        yield f"read       {self.read:,} rows in {self.seconds:.1f} s ({rows_a_second:,.0f} rows/s)"
        yield f"kept       {self.kept.total():,}: {_listed(self.kept + self.notes)}"
        yield f"dropped    {self.dropped.total():,}: {_listed(self.dropped)}".removesuffix(": ")
        yield f"malformed  {self.malformed:,}: {'; '.join(self.shown)}{more}".removesuffix(": ")


def _listed(counts: Counter) -> str:
    return "; ".join(f"{name} {count:,}" for name, count in sorted(counts.items()) if count)


def inputs(name: str, path: Path) -> list[Path]:
    """The file, or a directory's files of the named format in the order of their names."""
    if not path.is_dir():
        return [path]
    found = sorted(one for one in path.rglob(DATASETS[name].files) if one.name.endswith(SUFFIXES))
    if not found:
        raise InputError(f"{path}: no file below it ends in one of {', '.join(SUFFIXES)}")
    return found


def _rows(sources: list[Source]) -> Iterator[tuple[str, Source, JsonRow | InputError]]:
    finished, total = 0, sum(source.size for source in sources)
    # On a terminal only: elsewhere the account is the record.
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for source in sources:
            for where, row in source:
                bar.update(finished + source.done - bar.n)
                yield where if len(sources) == 1 else f"{source.path.name} {where}", source, row
            finished += source.size


def convert(
    name: str, path: str | Path, target: str | Path, against: Sequence[str | Path] = (), seed: int = 0,
    max_characters: int = 0, domain: Sequence[str] = (), malformed_limit: float = MALFORMED_LIMIT,
) -> Account:  # fmt: skip
    """Converts a file, or a directory of files, of the named format into a pair file; → its Account.

    The options are those of the command. `against`: benchmark files; `max_characters`: 0 is no limit; of
    `domain`, none are all.
    """
    typed(malformed_limit, float, "--malformed-limit", low=0, high=1)
    if name not in DATASETS:
        raise InputError(f'no format "{name}"; there are {", ".join(DATASETS)}')
    chosen, account, began = DATASETS[name], Account(), time.perf_counter()
    if chosen.benchmark and (against or max_characters or domain):
        options = "--against, --max-characters and --domain are for training data"
        raise InputError(f"{name} is a benchmark, and converted whole: {options}")
    sources = [Source(one, seed) for one in inputs(name, Path(path))]
    _check_target(Path(target), [*(source.path for source in sources), *map(Path, against)])
    sieve = Sieve([Overlap(Path(one)) for one in against], max_characters, domain, seed)
    with publish_file(target) as temporary, temporary.open("wb") as out:
        for where, source, row in _rows(sources):
            account.read += 1
            try:
                found = chosen.items(row, source)
                if not chosen.benchmark:
                    found = [sieve.passes(one) if isinstance(one, Pair) else one for one in found]
                lines = [_line(one) for one in found if not isinstance(one, str)]
            except (InputError, UnicodeEncodeError) as error:
                account.refuse(where, error)
                continue
            out.writelines(lines)
            for one in found:
                account.count(one)
        account.seconds = time.perf_counter() - began
        account.check(name, path, 0 if chosen.benchmark else malformed_limit)
    return account


def _check_target(target: Path, inputs: Sequence[Path]) -> None:
    """Nothing is written over but an earlier conversion, whose rows begin with their id."""
    if target.exists():
        with open_file(target) as file:
            first = file.readline(7)
        need(not any(target.samefile(one) for one in inputs), f"{target}: is read; name another output")
        need(first in (b"", b'{"id": '), f"{target}: holds something else than pairs; name another output")


def _line(item: Pair | JsonRow) -> bytes:
    return json.dumps(item if isinstance(item, dict) else item.to_json(), ensure_ascii=False).encode() + b"\n"


# --- the command -----------------------------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser("gramr2.extras.datasets", description=__doc__)
    add = parser.add_argument
    add("name", nargs="?", metavar="FORMAT", help="what IN is: one of the listed names")
    add("path", nargs="?", metavar="IN", help=f"a file ({', '.join(SUFFIXES)}) or a directory of them")
    add("target", nargs="?", metavar="OUT.jsonl", help="the pair file to write")
    add("--against", nargs="+", default=[], metavar="FILE", help="benchmarks; overlapping pairs are removed")
    add("--seed", type=int, default=0, help="decides where the better response stands, and what is drawn")
    add("--max-characters", type=int, default=0, help="of question and responses; longer is dropped [none]")
    domains = "only pairs of these, as helpsteer3's code or stem [all]"
    add("--domain", nargs="+", default=[], metavar="NAME", help=domains)
    add("--malformed-limit", type=float, default=MALFORMED_LIMIT, help="share over which a file is refused")
    return parser


def main(words: list[str]) -> None:
    if words[:1] == ["convincing-arguments"]:  # makes a directory, and has options of its own
        from gramr2.extras import convincing_arguments

        convincing_arguments.main(words[1:])
        return
    given = _parser().parse_args(words)
    if given.name is None:
        listed = {name: (known.published, known.read.__doc__ or "") for name, known in DATASETS.items()}
        listed["convincing-arguments"] = "UKPConvArg1.tar.gz", "a directory: labels, human reasons, a test"
        for name, (published, about) in listed.items():
            print(f"{name:22} {published:43} {about.splitlines()[0]}")
        return
    if given.name in DATASETS and not (given.target or "").endswith(".jsonl"):
        raise InputError(f"{given.name}: name an input, and an output that ends in .jsonl; see --help")
    try:
        account = convert(**vars(given))
    except OSError as error:
        raise InputError(f"{given.target}: {error.strerror}") from None
    print("\n".join(account.lines()))


if __name__ == "__main__":
    run_command(main)
