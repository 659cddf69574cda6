"""Gives the commands what a user could give them by mistake, or another by malice, and says what they do.

    python benchmarks/hostile.py                    every case, some minutes
    python benchmarks/hostile.py --only calibration     the cases whose "border: name" has this in it
    python benchmarks/hostile.py --list             their names alone

A case is a command as it is typed, in a directory of its own that holds what the case is about: a file with
one field changed, a named pipe where a file should be, a run of which a byte was flipped. What a case
expects: an exit status (2 unless it says otherwise), what the one line "error: …" has to name, files that
stay as they were, files that must not appear. Where the right answer can be argued about, both 0 and 2 will
do. The three ways to fail:

- TRACEBACK: an exception that nobody caught, or a death by a signal;
- HANG: no end within 20 seconds;
- WRONG: another exit status, no single error line or one that does not name what is wrong, a file that was
  changed or made, or a raw escape character on the terminal.

Controls say that each command succeeds where nothing is wrong. Every case runs in a fork of a process that
has imported everything, with its memory and the size of its files limited. The result is
benchmarks/results/hostile.json: for each border how many cases are well, and which are not. Exit status 1:
some case failed.

It leaves out: torchrun and GPUs, the stage policy's own settings, full disks and kills (the tests and
kills.py have them), and whether an answer is right.
"""

from __future__ import annotations

import gc
import gzip
import importlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process that has threads is not forked

import common

sys.path.insert(0, str(common.ROOT / "tests"))

import forks
from checkpoints import make_checkpoint
from safetensors.torch import load
from selfruns import finished_micro, small_world, watch_shards

import gramr2.votes
from gramr2 import run_directory
from gramr2.extras.toyworld import SHIPPED, WorldSettings, good_names, make_pair
from gramr2.files import Parser, exit_status
from gramr2.sampler import Sample
from gramr2.settings import SelfTrainSettings, TrainSettings
from gramr2.tokenizer import Tokenizer

PATIENCE = 20.0  # seconds; the slowest case that ends takes a fifth of it
MEMORY = 6 << 30  # bytes that a case may map beyond what the imports have
FILE_SIZE = 64 << 20  # bytes of the largest file that a case may write
MAINS = {name: f"gramr2.commands.{name}" for name in ("infer", "train", "selftrain")}
MAINS["datasets"] = "gramr2.extras.datasets"
# What the commands import late, so that a fork need not.
IMPORTS = "torch._dynamo gramr2.judge gramr2.extras.formats gramr2.steps gramr2.fit gramr2.extras.toy_start"
IMPORTS += " gramr2.extras.dry_run gramr2.extras.policy_start"
FINE, REFUSED, EITHER = frozenset({0}), frozenset({2}), frozenset({0, 2})
MARKS = {"= ": FINE, "? ": EITHER}  # what a title may begin with: this has to succeed, and that may
Cases = Iterator["Case"]
Check = Callable[[Path, str], str]  # of a command that succeeded: directory, what it said → complaint


@dataclass(frozen=True)
class Case:
    """A command in a directory, and what is expected of it."""

    title: str  # "border: name"
    words: Sequence[str]  # the first is the command; HERE stands for the case's directory
    start: str  # of STARTS, or "": what the directory holds before `files`
    files: dict[str, Any]  # name → text, bytes, None for no file, or a function that makes it
    statuses: Collection[int] = REFUSED
    says: str = ""  # a pattern for the error line
    unchanged: Sequence[str] = ()
    absent: Sequence[str] = ()  # where the command refuses
    check: Check | None = None
    hook: Callable[[], Any] | None = None  # called in the process before the command
    rival: str = ""  # a pattern of a path: another process with these words has made it, and has not ended


def many(
    prefix: str, words: str | Sequence[str], start: str, file: str, contents: dict[str, Any],
    files: dict[str, Any] | None = None, statuses: Collection[int] = REFUSED, **more: Any,
) -> Cases:  # fmt: skip
    """A case for each content of a file. A dict stands for several files, a list for more words instead."""
    more.setdefault("says", re.escape(file))
    words = words.split() if isinstance(words, str) else words
    for title, content in contents.items():
        name, expected = prefix + title.lstrip("=? "), MARKS.get(title[:2], statuses)
        added = content if isinstance(content, list) else []
        given = content if isinstance(content, dict) else {} if added else {file: content}
        yield Case(name, [*words, *added], start, (files or {}) | given, expected, **more)


# ---------------------------------------------------------------------------------- what stands in a place


def folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine\n")


def device(number: int, path: Path) -> None:
    """A device of the case's own, or a pipe: only the superuser makes devices."""
    os.mknod(path, *((0o666 | stat.S_IFCHR, os.makedev(1, number)) if os.geteuid() == 0 else (stat.S_IFIFO,)))


def changed(source: str, change: Callable[[bytes], bytes] | None, every: bool = False) -> Callable:
    """What stands in the place already, changed, or gone where there is no change. `source` is a pattern in
    the case's directory, for the last of the files that it finds, or for all."""

    def make(path: Path) -> None:
        for found in sorted(path.parent.glob(source))[0 if every else -1 :]:
            place(found, change and change(found.read_bytes()))

    return make


WAYS: dict[str, Callable[[bytes], bytes] | None] = {
    "flipped": lambda old: old[: len(old) // 2] + bytes([old[len(old) // 2] ^ 1]) + old[len(old) // 2 + 1 :],
    "cut": lambda old: old[: len(old) * 2 // 3],
    "emptied": lambda old: b"",
    "removed": None,
}
NOT_FILES = {"a named pipe": os.mkfifo, "a directory": folder, "a device": partial(device, 3)}
INPUT_ITSELF: dict[str, Callable[[Path], None]] = {  # under another name
    "the input's other name": lambda path: path.hardlink_to(path.with_name("in.jsonl")),
    "a link to the input": lambda path: path.symlink_to("in.jsonl"),
}


def place(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None or (callable(content) and (path.is_file() or path.is_symlink())):
        path.unlink(missing_ok=True)
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def state(path: Path) -> Any:
    """What a place holds, to be compared: of a directory the names and contents. No pipe is opened."""
    if path.is_dir() and not path.is_symlink():
        return {each.name: state(each) for each in path.iterdir()}
    if path.is_file() and not path.is_symlink():
        return path.read_bytes()
    return (path.lstat().st_mode, path.lstat().st_rdev) if os.path.lexists(path) else None


DEEP = "[" * 100_000 + "]" * 100_000
BIG = f"1{'0' * 30}"
VALUES: dict[str, str | None] = {
    "absent": None, "null": "null", "-1": "-1", "0": "0", "1.5": "1.5", "text": '"text"', "list": "[]",
    "object": "{}", "true": "true", "10**30": BIG, "1e400": "1e400", "NaN": "NaN", "digits": "7" * 5000,
    "half": '"\\ud800"', "deep": DEEP,
}  # fmt: skip
ANY = " ".join(VALUES)
FEW = "absent null -1 text list object NaN half"
WHOLE_FILES: dict[str, Any] = {
    "is empty": b"", "is a list": b"[]", "is a number": b"5", "is null": b"null", "is deep": DEEP,
    "is not UTF-8": b'{"x": "\xff\xfe"}', "is cut": b'{"x', "is gzip": gzip.compress(b"{}", mtime=0),
    **{f"is {name}": each for name, each in NOT_FILES.items()},
}  # fmt: skip
SOME_FILES = {name: WHOLE_FILES[name] for name in ("is empty", "is a list", "is a named pipe")}


def with_value(row: dict, path: str, literal: str | None) -> str:
    """The row as JSON, with this JSON in place of the field at a dotted path; None leaves the field out."""
    edited = json.loads(json.dumps(row))
    *above, last = (int(name) if name.isdigit() else name for name in path.split("."))
    inner = reduce(getitem, above, edited)
    inner[last] = "@@"
    if literal is None:
        del inner[last]
    return json.dumps(edited).replace('"@@"', literal or "")


def values(fields: dict[str, str], names: str, make: Callable[[str, str | None], Any]) -> dict[str, Any]:
    """What is made of each field with each of these VALUES; `fields` names those that may be taken."""
    loose = {(path, name) for path, fine in fields.items() for name in fine.split()}
    every = [(path, name) for path in fields for name in names.split()]
    return {f"{'? ' * (each in loose)}{' is '.join(each)}": make(each[0], VALUES[each[1]]) for each in every}


def literals(table: dict[str, str], make: Callable[[str, str | None], Any]) -> dict[str, Any]:
    """The same with other JSON; blanks stand between."""
    return {f"{path} is {each}": make(path, each) for path in table for each in table[path].split()}


def lines(*rows: Any) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def titled(contents: Sequence[Any], mark: str = "") -> dict[str, Any]:
    """What speaks for itself."""
    return {f"{mark}{str(each)[:60]!r}": each for each in contents}


# ---------------------------------------------------------------------------------- border 1: a model

PAIR = {"question": "What is 2 + 2?", "response_a": "It is 4.", "response_b": "It is 5."}
SCORE = "infer --pair a.json --model model"
JUDGE = f"{SCORE} --format label"
VOTE = f"{SCORE} --votes 1 --max-new-tokens 4"
# The fields of config.json, with the values that may be taken. What has a default may be null, and what is
# empty may stand for null.
EMPTY = "null 0 list object"
CONFIG = {
    "vocab_size": "", "hidden_size": "", "intermediate_size": "", "num_hidden_layers": "", "model_type": "",
    "num_attention_heads": "", "max_position_embeddings": "10**30", "num_key_value_heads": "null",
    "head_dim": EMPTY, "rms_norm_eps": "null 0 10**30", "rope_theta": "null 10**30", "rope_scaling": EMPTY,
    "rope_scaling.rope_type": "", "rope_scaling.factor": "10**30",
    "rope_scaling.low_freq_factor": "0 10**30", "rope_scaling.high_freq_factor": "10**30",
    "rope_scaling.original_max_position_embeddings": "10**30", "tie_word_embeddings": "null true",
    "attention_bias": EMPTY, "mlp_bias": EMPTY, "hidden_act": "null", "architectures": EMPTY,
    "torch_dtype": ANY,  # judging computes in its own
}  # fmt: skip
# Where a field contradicts the tensors, these may be named instead; and a file that is no JSON has no field.
INSTEAD = "not JSON|model type|k_proj|lm_head|bias|RoPE|rope|architecture"
MORE_CONFIG = {
    "num_hidden_layers": "1000000000", "vocab_size": "1000000000000", "head_dim": "7",
    "rope_scaling.high_freq_factor": "1.0",  # equal to the low one: a width of nought
    "num_key_value_heads": "3", "quantization_config": "{}", "rope_parameters": '{"rope_type":"llama3"}',
    "architectures": "[[]]",
}  # fmt: skip
EOS = '-1 "text" ["text"] [1,null] [[1]] [1.5] [1,-1] [true] 320 1000000000 1.5 true {} 1e400 NaN'
MORE_FIELDS = {
    "tokenizer_config.json": {
        "bos_token": '-1 [] true NaN "\\ud800" {"content":5} {"content":["a"]}',
        "eos_token": f'0 1.5 {BIG} "\\ud800"', "unk_token": '-1 [] true "\\ud800"',
        "chat_template": '-1 {} true [5] [{"name":"x"}] [{"template":"x"}] [{"name":"default","template":5}]',
    },
    "generation_config.json": {"eos_token_id": EOS},
}  # fmt: skip
EACH, DONE = "{% for i in range(99999) %}", "{% endfor %}"
LOOPS = (  # chat templates that would not end, or would not fit
    EACH * 3 + DONE * 3 + "x", EACH * 2 + "aaaaaaaaaaaaaaaa" + DONE * 2, '{{ "a" * 10**10 }}',
    EACH + "{{ range(99999) | sum }}" + DONE, '{{ "%9999999999d" % 1 }}', '{{ "{:9999999999}".format(1) }}',
    "{{ 9 ** (9 ** 9) }}", "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(30) }}",
    "{% set ns = namespace(t='aaaaaaaa') %}" + EACH + "{% set ns.t = ns.t ~ ns.t %}" + DONE + "{{ ns.t }}",
)  # fmt: skip
SLOW = ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "{{ ([1] * 10**9) | length }}")
FAULTS = (  # chat templates that fail by themselves
    "{{ raise_exception('no') }}", "{{ raise_exception(5) }}", "{% for %}", "{{ 1 / 0 }}", "{{ '\\ud800' }}",
    "{% include '/etc/passwd' %}", "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ strftime_now(5) }}", "{{ messages | nosuch }}",
)  # fmt: skip
TOKENIZER = {"model": "", "model.vocab": "", "model.merges": ANY, "added_tokens": ANY, "decoder": ANY}
READ_FROM_A_MODEL = "config.json tokenizer_config.json tokenizer.json model.safetensors calibration.json"
READ_FROM_A_MODEL += " generation_config.json special_tokens_map.json model.safetensors.index.json"
READ_FROM_A_MODEL += " judge_prompt.txt chat_template.jinja README.md"
# What a pickle may do where it is opened as one: here, no more than leave a file.
ACTS = b"c__builtin__\nopen\n(Vplanted\nVw\ntR."
# Of these, what is no file may be passed over; of those, JSON that says nothing may be.
BESIDE_OTHERS = ("judge_prompt.txt", "chat_template.jinja", "README.md", "model.safetensors.index.json")
SAYS_NOTHING = ("special_tokens_map.json", "calibration.json", "generation_config.json")
PLACES = (  # of tensors, in an index; HERE is the directory of the case
    "HERE/elsewhere.safetensors", "../elsewhere.safetensors", "../model/model.safetensors", "config.json", 5,
    "sub/../../elsewhere.safetensors", "nowhere.safetensors", ".", "", None, ["x"], "\ud800", "a\0b",
)  # fmt: skip
CALIBRATION = {"votes": 2, "greedy": True, "pairs": 40, "p": [0.1, 0.9], "calibrated": [0.2, 0.8]}
MAPS = (  # what p and calibrated should not be
    '"p": [0.1, 0.5, 0.9]', '"p": [0.9, 0.1]', '"p": [0.5, 0.5], "calibrated": [0.8, 0.2]', '"p": [0.1, 1.7]',
    '"calibrated": [0.8, 0.2]', '"calibrated": [-0.2, 0.8]', '"p": [0.1, "x"]', '"calibrated": [NaN, 0.8]',
    '"p": [0.1, Infinity]', '"p": [null, 0.9]', '"p": [[0.1], [0.9]]', '"p": [false, true]',
    '"p": [], "calibrated": []',
)  # fmt: skip


def of_start(source: str, change: Callable[[bytes], Any]) -> Callable[[Path], None]:
    """A start's file, changed; it is read when the case begins, since starts are made late."""
    return lambda target: place(target, change((STARTED / source).read_bytes()))


def model_field(file: str, path: str, literal: str | None, start: str = "judge") -> Callable[[Path], None]:
    return of_start(f"{start}/model/{file}", lambda old: with_value(json.loads(old), path, literal))


def of_model(
    file: str, contents: dict[str, Any], words: str = JUDGE, start: str = "judge", **more: Any
) -> Cases:  # fmt: skip
    """One file of a small judge's directory is another."""
    more.setdefault("says", re.escape(file))
    yield from many(f"model: {file}: ", words, start, f"model/{file}", contents, **more)


def config_cases() -> Cases:
    file, names = "config.json", r"(?=.*(config\.json|checkpoint|\.safetensors))"
    for path, fine in CONFIG.items():
        contents = values({path: fine}, "null -1 0 text list true 10**30 NaN", partial(model_field, file))
        yield from of_model(file, contents, says=f"{names}.*({path.rpartition('.')[2]}|{INSTEAD})")
    yield from of_model(file, literals(MORE_CONFIG, partial(model_field, file)), says="model")
    make = partial(model_field, file, start="scalar")
    contents = values({"id2label": "absent"}, "absent -1 text true NaN half", make)
    yield from of_model(file, contents, SCORE, "scalar", says=f"{file}|score")
    yield from of_model("README.md", {"= as it should be": "a model"}, VOTE)
    for file, table in MORE_FIELDS.items():
        contents = literals(table, partial(model_field, file))
        yield from of_model(file, contents, VOTE, says=f"{'|'.join(table)}|{file}|chat template")
    file = "tokenizer.json"
    yield from of_model(file, values(TOKENIZER, "null list -1 half", partial(model_field, file)), VOTE)
    without = model_field(file, "model", '{"type": "BPE", "vocab": {"x": 0}, "merges": []}')
    yield from of_model(file, {"without A and B": without}, VOTE, says="model")
    templates = titled((*LOOPS, *FAULTS)) | titled(SLOW, "? ")
    yield from of_model("chat_template.jinja", templates, VOTE, says="template")
    file = "tokenizer_config.json"
    make = partial(model_field, file, "chat_template")
    contents = {title: make(json.dumps(source)) for title, source in templates.items()}
    yield from of_model(file, contents, VOTE, says="template")


def index_of(where: Any, target: Path) -> None:
    """An index that places every tensor at `where`, and a file that is none of the model's."""
    tensors = (STARTED / "judge/model/model.safetensors").read_bytes()
    place(target.parents[1] / "elsewhere.safetensors", tensors)
    where = where.replace("HERE", str(target.parents[1])) if isinstance(where, str) else where
    place(target, json.dumps({"weight_map": dict.fromkeys(load(tensors), where)}))


def file_cases() -> Cases:
    file, make = "model.safetensors", partial(of_start, "judge/model/model.safetensors")
    header = b'{"model.norm.weight": {"dtype": "F32", "shape": [48], "data_offsets": [0, 192]}}'
    far = header.replace(b"192", b"9" * 18)
    contents = {
        "cut in two": make(lambda old: old[: len(old) // 2]), "a header alone": make(lambda old: old[:999]),
        "without its last byte": make(lambda old: old[:-1]), "not there": None,
        "a header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
        "a header that is no JSON": (8).to_bytes(8, "little") + b"[1, 2, 3",
        "offsets far beyond the end": len(far).to_bytes(8, "little") + far,
        "one tensor of all": len(header).to_bytes(8, "little") + header + bytes(192),
        "a pickle that acts": ACTS,
    }  # fmt: skip
    yield from of_model(file, contents, says="model", unchanged=("planted",))
    file = "model.safetensors.index.json"
    contents = {f"tensors at {where!r}": partial(index_of, where) for where in PLACES}
    maps = {value: f'{{"weight_map": {value}}}' for value in ("null", "[]", "{}", "5", '"text"', "NaN")}
    yield from of_model(file, contents | maps, says="model")
    for file in READ_FROM_A_MODEL.split():
        words = VOTE if "token" in file or "generation" in file else JUDGE
        loose = {f"is {name}" for name in (NOT_FILES if file in BESIDE_OTHERS else ())}
        loose |= {"is a list", "is null"} if file in SAYS_NOTHING else set()
        every = file.endswith((".json", ".txt"))
        contents = {name: each for name, each in WHOLE_FILES.items() if every or name[3:] in NOT_FILES}
        contents = {f"{'? ' * (name in loose)}{name}": each for name, each in contents.items()}
        yield from of_model(file, contents, words, says="" if file in BESIDE_OTHERS else re.escape(file))
    file, found = "calibration.json", {"votes": "", "greedy": "", "p": "", "calibrated": ""}
    contents = values(found, "absent -1 text object NaN deep", partial(with_value, CALIBRATION))
    contents["= as it should be"] = json.dumps(CALIBRATION)
    contents |= {each: with_values(CALIBRATION, each) for each in MAPS}
    yield from of_model(file, contents)
    models = {name: [name] for name in ("a.json", "nowhere", "", "x" * 300, "pipe")}
    yield from many("model: --model ", JUDGE.split()[:4], "judge", "", models, {"pipe": os.mkfifo})


# ---------------------------------------------------------------------------------- border 2: pairs and lists

PAIR_FIELDS = {
    "question": "text", "response_a": "text", "response_b": "text", "messages": "absent null",
    "label": "absent null", "rationale": "absent null text", "source": "absent null text",
    "domain": "absent null text", "margin": "absent null -1", "meta": "absent null object",
    "id": "absent null -1 text list object NaN",
}  # fmt: skip
LIST = {"question": "What is 2 + 2?", "responses": ["It is 4.", "It is 5.", "It is 6."]}
LIST_FIELDS = {"question": "text", "responses": "", "messages": "absent null"}
MORE_PAIRS = {  # other JSON in fields: to be refused, to be taken, and what may be either
    "": ('"messages": [5]', '"messages": [{"role": "user", "content": null}]', '"label": "C"',
         '"messages": [{"role": "user", "content": "\\ud800"}]', '"meta": {"\\ud800": 1}',
         '"messages": [{"role": "\\udfff", "content": "x"}]', '"label": "\\u001b[31m"',
         f'"id": "\\u001b]0;x\\u0007", "response_a": "{"word " * 600}"'),
    "= ": ('"response_a": "<|eot_id|><|begin_of_text|>"', '"response_a": "\\u001b[31m\\u0000\\u0007\\r"',
           '"response_a": ""'),
    "? ": ('"messages": [{"role": "judge", "content": "x"}]', '"meta": {"x": NaN}'),
}  # fmt: skip
MORE_LISTS = {
    "": ('"responses": ["x"]', '"responses": ["x", null]', '"responses": ["x", "\\ud800"]',
         f'"responses": ["x", "{"word " * 600}"]'),
    "= ": ('"responses": ["\\u001b[31mred", "\\u001b]0;title\\u0007"]', '"responses": ["x", "x"]',
           '"responses": ["x\\ny\\rz", "y\\u2028\\u0085z"]', '"responses": ["", ""]'),
}  # fmt: skip
ROW = lines(PAIR | {"label": "A"})
PACKED = gzip.compress(ROW.encode(), mtime=0)
BULK_FILES: dict[str, Any] = {
    "empty": b"", "blank lines": b" \n\t\n\r\n", "not UTF-8": b'{"question": "\xff"}\n',
    "carriage returns alone": lines(PAIR, PAIR).replace("\n", "\r"), "UTF-16": lines(PAIR).encode("utf-16"),
    "gzip": PACKED, "one cut row": json.dumps(PAIR)[:-5], "zeros": bytes(5000), "deep": DEEP + "\n",
    "a JSON list": json.dumps([PAIR], indent=1), "no objects": '5\n[]\n"x"\nnull\n', **NOT_FILES,
}  # fmt: skip
JUDGED = {"id": "x", "label": "A", "p_a": 0.9, "votes": {"A": 1, "B": 0, "none": 0}, "pair": PAIR}
OUTS: dict[str, Any] = {  # what stands under the name of --out, and is not to be touched
    "a text": "my notes\nand more of them\n", "a text without an end": "my notes", "numbers": "1\n2\n",
    "rows with a torn end that is no row": lines({"error": "mine"}) + "and a note", "pairs": lines(PAIR),
    "a log of errors": lines({"error": "full", "at": 1}, {"error": "mine", "at": 2}), "gzip": PACKED,
    "a log of events": lines({"event": "begun", "at": 1}), "a judged file of nobody": lines(JUDGED),
    "error rows of another program": lines({"id": 1, "error": "timeout"}, {"id": 2, "error": "timeout"}),
    "a judged file of another judge": lines(JUDGED | {"judge": {"model": "other"}}),
    "a JSON file": json.dumps({"mine": [1, 2]}, indent=2), "a full device": partial(device, 7),
    "a link to a text": lambda path: path.symlink_to("notes.txt"), **NOT_FILES, **INPUT_ITSELF,
}  # fmt: skip


def with_values(row: dict, fields: str) -> str:
    """The row as JSON, with other JSON in these fields; each stands there once."""
    kept = {name: value for name, value in row.items() if f'"{name}": ' not in fields}
    return json.dumps(kept)[:-1] + ", " + fields + "}"


def pair_cases() -> Cases:
    tables = {"--pair": (PAIR, PAIR_FIELDS, MORE_PAIRS), "--rank": (LIST, LIST_FIELDS, MORE_LISTS)}
    for flag, (row, fields, table) in tables.items():
        contents = values(fields, "absent null -1 text list NaN half deep", partial(with_value, row))
        contents |= {"= as it should be": json.dumps(row), "? a byte order mark": "\ufeff" + json.dumps(row)}
        contents["? a field twice"] = json.dumps(row)[:-1] + ', "question": "It is 6."}'
        words = JUDGE.replace("--pair", flag)
        yield from many(f"pairs: {flag}, ", words, "judge", "a.json", contents | WHOLE_FILES)
        contents = {f"{mark}{each:.60}": with_values(row, each) for mark in table for each in table[mark]}
        yield from many(f"pairs: {flag}, ", words, "judge", "a.json", contents, says="")
    for name in ("\x1b[31m\x1b]0;x\x07", "\x9b31m"):
        hook = partial(answer, f"<think>\n{name}\n</think>\n<answer>\nA\n</answer>")
        yield Case(f"pairs: --pair, the rationale has {name!r}", VOTE.split(), "judge", {}, FINE, hook=hook)
    # The toy's words are its vocabulary; another one reads as all the others do.
    other = {"question": "price of dogs?", "response_a": "dogs 4.", "response_b": "dogs 5."}
    toys = {"--pair": [other, other | {"question": "price of"}, other | {"response_a": "\x1b[31m"}],
            "--rank": [{"question": "price of dogs?", "responses": ["dogs 4.", "dogs 5."]}],
            "--out out.jsonl --pairs": [other]}  # fmt: skip
    rest = VOTE.partition("a.json")[2]
    for flag, rows in toys.items():
        contents, words = {f"{row}": json.dumps(row) for row in rows}, f"infer {flag} a.json {rest}"
        yield from many(f"pairs: the toy, {flag} ", words, "toy", "a.json", contents, says="no word for")
    yield from many("pairs: the toy, ", f"infer --pair pair.json {rest}", "toy", "", {"= as it is": {}})


def answer(text: str) -> None:
    """Plants a judge that writes this text, and is sure of A."""
    ids = Tokenizer.load("model").encode(text)
    sample = Sample(ids, [0.0] * len(ids), [[math.log(0.9), math.log(0.1)]] * len(ids), "stop")
    gramr2.votes.generate = lambda model, prompts, *, n, **_: [[sample] * n for _ in prompts]


def bulk_cases() -> Cases:
    words, out = "infer --pairs in.jsonl --model model --format label --out", "out.jsonl"
    files, kept = {"in.jsonl": lines(PAIR), "notes.txt": "my notes\n"}, ("in.jsonl", out, "notes.txt")

    of = partial(many, words=f"{words} {out}", start="judge", files=files)
    rows = values(PAIR_FIELDS, "-1 list NaN half digits", partial(with_value, PAIR))
    contents = {f"= {title.lstrip('? ')}, beside a good row": lines(PAIR, row) for title, row in rows.items()}
    for title, row in rows.items():
        if title.endswith(("half", "digits")):  # of the file none is left; for one reason as for another
            contents[f"{title.lstrip('? ')}, alone"] = lines(row)
    contents["= as it should be"] = lines(PAIR)
    yield from of("pairs: --pairs, ", file="in.jsonl", contents=contents)
    yield from of("pairs: --pairs, the input is ", file="in.jsonl", contents=BULK_FILES)
    yield from of("pairs: --pairs, --out is ", file=out, contents=OUTS, unchanged=kept)
    yield from of("pairs: --pairs, --out is ", file=out, contents={"= an empty file": ""})
    outs = ("in.jsonl", "model/../in.jsonl", "", "in.jsonl/out", "model/config.json", "x" * 300)
    contents = {f"{path!r:.30}": [path] for path in outs}
    more = dict(unchanged=("in.jsonl", "model"))
    yield from many("pairs: --pairs, --out ", words, "judge", "", contents, files, **more)
    for name, index in {"a text": "my notes\n", "bytes": bytes(range(200)), **NOT_FILES}.items():
        mine = {"in.jsonl.idx": index}  # where an index would lie
        yield from of("pairs: in.jsonl.idx is ", file="", contents={f"? {name}": mine}, unchanged=[*mine])
        mine = {out: "my notes\n", "out.jsonl.idx": index}
        yield from of("pairs: out.jsonl.idx is ", file="", contents={name: mine}, unchanged=[*mine])
    rows_of_many = lines(*({**PAIR, "id": str(n)} for n in range(128)))
    slow = "infer --pairs in.jsonl --model model --votes 4 --max-new-tokens 64 --out out.jsonl"
    contents = {"two processes on one --out": rows_of_many}
    yield from many("pairs: --pairs, ", slow, "judge", "in.jsonl", contents, says=out, rival=out)


# ---------------------------------------------------------------------------------- border 3: scores


def judged_row(number: int = 0, domain: str = "math", **meta: Any) -> dict:
    """A judged row as --pairs and --bench write it."""
    pair = {**PAIR, "question": f"What is {number}?", "label": "A", "domain": domain, "meta": meta}
    judge = {"model": "model", "format": "think", "votes": 2, "seed": 0, "max_new_tokens": 64}
    judge |= {"temperature": 1.0, "prompt": "0123456789abcdef", "calibrated": False, "weights": "0" * 16}
    vote = {"label": "A", "order": "AB", "p_a": 0.9, "reason": "", "text": "", "seed": 0, "tokens": 3}
    figures = {"label": "A", "p_a": 0.9, "votes": {"A": 2, "B": 0, "none": 0}, "abstained": 0}
    figures |= {"rationale": None, "orders_agree": True, "details": [vote, vote | {"order": "BA"}]}
    return {"id": f"row {number}", "pair": pair, **figures, "judge": judge}


SCORED = {name: [judged_row(0), judged_row(1)] for name in ("pairs", "judgebench", "helpsteer3")}
CELL = partial(judged_row, 0, "chat", subset="x", prompt=1)
SCORED["rm-bench"] = [CELL(chosen=i, rejected=j) for i in range(3) for j in range(3)]
# A row of PPE: a list of responses with what each scores, and the comparisons.
DUEL = {"p": 0.9, **{key: value for key, value in judged_row().items() if key not in ("id", "pair", "judge")}}
SCORED["ppe"] = [{"id": "1", "scores": [0, 1, 0, 1], "judge": judged_row()["judge"],
                  "comparisons": [{"a": k, "b": 0, **DUEL} for k in (1, 2, 3)]}]  # fmt: skip
# A judged row's fields with the values that may be taken; what no table is made from may be anything.
JUDGED_FIELDS = {
    "p_a": "null", "label": "null", "details": "absent null list", "details.0.order": "", "pair.label": "",
    "details.0.label": "null", "orders_agree": "absent null", "votes": "", "pair": "", "details.0.p_a": ANY,
    "pair.domain": "absent null text", "details.0.tokens": ANY, "judge": ANY, "judge.votes": ANY, "id": ANY,
    "judge.model": ANY, "abstained": ANY, "rationale": ANY, "pair.meta": ANY,
}  # fmt: skip
RM_FIELDS = {"pair.meta.chosen": "", "pair.meta.rejected": "", "pair.meta.prompt": "-1 text null", "p_a": "",
             "pair.meta.subset": "text null", "pair.meta": "", "pair.domain": "text"}  # fmt: skip
PPE_FIELDS = {f"comparisons.0.{name}": "" for name in "abp"} | {"comparisons.0": "", "scores": "", "id": ANY}
PPE_FIELDS |= {"judge": "absent null text object", "comparisons": "list absent", "scores.0": "-1"}
MORE_SCORED = {
    "pairs": {"p_a": "1.2 -0.2", "label": '"C"', "pair.label": '"C"', "details.0.order": '"XY"',
              "details.0.label": '"C"', "details": '[1,2] ["AB"]', "votes": '{"A":"x"} {"A":1}'},
    "ppe": {"comparisons.0.a": "4", "comparisons.0.p": "1.5", "scores": "[1]"},
    "rm-bench": {"pair.meta.chosen": '3 -3 "0"'},
}  # fmt: skip
PUBLISHED = {"pair_id": "p", "source": "livecodebench", "question": "q", "label": "A>B", "response_A": "x",
             "response_B": "y", "judgments": [{"decision": "A>B"}, {"decision": "B>A"}]}  # fmt: skip


def score_cases() -> Cases:
    for benchmark, (first, *rest) in SCORED.items():
        fields = {"pairs": JUDGED_FIELDS, "rm-bench": RM_FIELDS, "ppe": PPE_FIELDS}.get(benchmark)
        table, make = MORE_SCORED.get(benchmark, {}), partial(with_value, first)
        found = values(fields or JUDGED_FIELDS, FEW if fields else "text NaN", make) | literals(table, make)
        contents = {title: lines(row, *rest) for title, row in found.items()}
        contents |= WHOLE_FILES if benchmark == "pairs" else SOME_FILES
        errors = ({"id": row["id"], "pair": row.get("pair"), "error": "too long"} for row in (first, *rest))
        contents |= {"? error rows alone": lines(*errors), "= as it should be": lines(first, *rest)}
        for path in ("pair.domain", "judge.model") if benchmark == "pairs" else ():
            contents[f"? {path} has an escape"] = lines(make(path, '"\\u001b[31mred"'), *rest)
        for each in ("5", "[1]", "null", "[]") if benchmark == "judgebench" else ():
            contents[f"? published judgments are {each}"] = lines(with_value(PUBLISHED, "judgments", each))
            contents["= published judgments"] = lines(PUBLISHED)
        words, says = f"infer --score {benchmark} j.jsonl", f"j.jsonl|{benchmark}:"
        yield from many(f"scores: --score {benchmark}, ", words, "", "j.jsonl", contents, says=says)


CALIBRATED = {name: JUDGED_FIELDS[name] for name in ("p_a", "pair", "votes", "details", "judge.model")}
CALIBRATED |= {"pair.label": "absent null", "judge": "", "judge.weights": "", "judge.prompt": ANY}
MORE_CALIBRATED = {"p_a": "1.2 -0.2 1e400", "pair.label": '"C"', "judge.weights": '"0" "a\\u0000b"'}


def calibrate_cases() -> Cases:
    def judged(change: Callable[[list[dict]], Sequence[Any]]) -> Callable[[Path], None]:
        """The rows that the judge wrote when the start was made, changed."""
        rows = partial(map, json.loads)
        return of_start("judged/j.jsonl", lambda old: lines(*change([*rows(old.splitlines())])))

    def make(path: str, literal: str | None) -> Callable[[Path], None]:
        """Of one row the judgment; of all rows what they were judged with, since that has to be the same."""
        most = 40 if path.startswith("judge") else 1
        return judged(lambda rows: [*(with_value(row, path, literal) for row in rows[:most]), *rows[most:]])

    words, says = "infer --calibrate j.jsonl --model model", "j.jsonl|calibrator"
    contents = values(CALIBRATED, FEW, make) | literals(MORE_CALIBRATED, make) | WHOLE_FILES
    contents["too few rows"], contents["= as it should be"] = judged(lambda rows: rows[:29]), judged(list)
    contents["error rows alone"] = lines(*({"id": "x", "pair": PAIR, "error": "x"} for _ in range(40)))
    contents["rows of other weights"] = lines(*(judged_row(n) for n in range(40)))
    more = dict(says=says, absent=("model/calibration.json",))
    yield from many("scores: --calibrate, ", words, "judged", "j.jsonl", contents, **more)
    file = "model/calibration.json"
    yield from many(f"scores: --calibrate, {file} is ", words, "judged", file, NOT_FILES, unchanged=(file,))


BENCHES: dict[str, dict] = {
    "rm-bench": {"id": 4, "prompt": "q", "chosen": [*"abc"], "rejected": [*"def"], "domain": "chat"},
    "judgebench": {"pair_id": "p", "source": "livecodebench", "question": "q", "label": "B>A",
                   "response_model": "m", "response_A": "x", "response_B": "y"},
    "ppe": {"question_id": "q1", "prompt": "q", "response_1": "x", "response_2": "y", "scores": [0, 1]},
    "helpsteer3": {"domain": "stem", "context": [{"role": "user", "content": "q"}], "response1": "x",
                   "response2": "y", "overall_preference": -2, "individual_preference": []},
    "pairs": {**PAIR, "label": "A"},
}  # fmt: skip
# Fields that may be anything, or that the reader can do without.
LOOSE = {"response_model", "id", "individual_preference", "domain", "question_id", "pair_id"}


def bench_cases() -> Cases:
    for benchmark, row in BENCHES.items():
        needed = dict.fromkeys(row.keys() - LOOSE, "")
        contents = values(needed, "absent list half", partial(with_value, row)) | SOME_FILES
        contents["= as it should be"] = lines(row)
        words = f"infer --bench {benchmark} in.jsonl --model model --format label --out"
        prefix, says, file = f"scores: --bench {benchmark}, ", "in.jsonl|out.jsonl", "in.jsonl"
        yield from many(prefix, f"{words} out.jsonl", "judge", file, contents, says=says)
        itself = {"--out is the input": lines(row)}
        yield from many(prefix, f"{words} in.jsonl", "judge", file, itself, unchanged=(file,))


# ---------------------------------------------------------------------------------- border 4: settings

DRY_TRAIN = "train --stage reward --model model --data data.jsonl --dry-run"
DRY_SELF = "selftrain --dry-run --recipe r.toml"
MICRO = (common.ROOT / "recipes/micro.toml").read_text()
TYPES = ("1979-05-27", "[1]", "{a = 1}", '"1"', "nan", "inf", "true")
SIZES = {"goods": 24, "asked": 2, "human": 4, "labelled": 4, "unlabelled": 4, "dev": 4, "test": 4,
         "pretrain": 20, "hidden_size": 16, "layers": 2, "heads": 2}  # fmt: skip
NEST, TABLES = "[" * 20_000 + "]" * 20_000, ".".join("a" * 20_000)
RECIPES = (
    "[trian]\nlr = 1\n", "[world]\n[train.nosuch]\nlr = 1\n", "[world]\n[train]\nnosuch = 1\n",
    "[world]\n[selftrain]\nnosuch = 1\n", "[world]\nnosuch = 1\n", '[models]\nnosuch = "x"\n',
    '[data]\nnosuch = ["x"]\n', "lr = 1\n[world]\n", "world = 5\n", "[[world]]\n[[world]]\n", "", "{no toml",
    '[models]\nbackbone = "x"\n[data]\nhuman = 5\n', '[models]\nbackbone = "x"\n[data]\nhuman = [5]\n',
    "[models]\nbackbone = 5\n", "[world]\n[train]\nlr = 1\nlr = 2\n", b"[world]\n# \xff\n",
    f"[world]\n[train]\nlr = {'7' * 5000}\n", f"[world]\n[train]\nlr = {NEST}\n", f"[train.{TABLES}]\n",
    "[world]\n[train]\nlr = 2025-02-31\n",
)  # fmt: skip
WORLDS: tuple[dict[str, Any], ...] = (  # sizes that do not go together
    dict(hidden_size=97, heads=4), dict(goods=4, asked=5), dict(layers=10**9), dict(goods=4226),
    dict(hidden_size=10**9, heads=2), dict(goods=4, test=1000), dict(goods="[24]"), dict(goods="{a = 1}"),
)  # fmt: skip
DIRECTORIES = ("5", '""', '["x"]', '"r.toml"', "true", "1979-05-27", '"r.toml/x"')
# A run is the directory runs/NAME, and nothing else is its own. Claims and half-written files are what a run
# takes away where it begins.
PRECIOUS = {f"{where}{name}": "mine\n" for where in ("", "runs/", "runs/a/", "elsewhere/", "runs/mine/")
            for name in ("x.claim", ".y.tmp-1")}  # fmt: skip
PRECIOUS |= {"runs/mine/plan.json": '{"mine": 1}', "runs/mine/notes.txt": "mine\n", "runs/file": "mine\n"}
PRECIOUS |= {"runs/mine/steps/01-world/mine.txt": "mine\n", "runs/hidden/.y.tmp-1": "mine\n"}
NAMES = ("..", ".", "", "a/b", "a/", "a/../..", "HERE/elsewhere", "x" * 300, "mine", "file", "hidden")
PLANS = ("", "[]", "null", '{"settings": 5}', '{"settings": {}, "inputs": {}}', DEEP)


def recipe(**world: Any) -> str:
    """The micro recipe with a world of a few rows, and these of its sizes in TOML."""
    text = "[world]\n" + "".join(f"{name} = {value}\n" for name, value in (SIZES | world).items())
    return text + "".join(MICRO.partition("[models]")[1:])


def setting_cases() -> Cases:
    files = {"r.toml": MICRO}
    for cls, words in ((TrainSettings, DRY_TRAIN), (SelfTrainSettings, DRY_SELF)):
        command, start = words.split()[0], "toy" if words == DRY_TRAIN else ""
        yield from many(f"settings: {command} --dry-run, ", words, start, "", {"= as it should be": files})
        for name, kind in typing.get_type_hints(cls).items():
            if kind not in (int, float, tuple[float, ...]):
                continue
            flag, says = f"--{name.replace('_', '-')}", name.replace("_", "[_-]")
            limits = cls.__dataclass_fields__[name].metadata["limits"]
            below = "? -1" if limits.get("low") == -1 else "-1"
            bad: dict[str, Any] = {
                each: [f"{flag}={each.removeprefix('? ')}"] for each in (below, "inf", "nan", "text")
            }
            bad["10**30" if kind is int else "? 10**30"] = [f"{flag}={BIG}"]
            yield from many(f"settings: {command} {flag}=", words, start, "", bad, files, says=says)
            loose = "[1]" if name == "confidence" else ""
            text = f"[world]\n[{command}]\n{name} = "
            bad = {f"{'? ' * (each == loose)}{each}": f"{text}{each}\n" for each in TYPES}
            yield from many(f"settings: [{command}] {name} = ", DRY_SELF, "", "r.toml", bad, says=name)
    bad = {f"{value}": [f"--threads={value}"] for value in (0, 5_000_000, 2**31, 2**63)}
    yield from many("settings: train --threads=", DRY_TRAIN, "toy", "", bad, says="threads")
    for flag, each in {"votes": "-1 0 3 text", "seed": "-1 text 1.5", "max-new-tokens": "-1 0 text"}.items():
        bad = {value: [f"--{flag}={value}"] for value in (*each.split(), BIG)}
        words, says = f"{SCORE} --max-new-tokens=4 --votes=2", flag.replace("-", "[_-]")
        yield from many(f"settings: infer --{flag}=", words, "judge", "", bad, says=says)
    contents: dict[str, Any] = titled(RECIPES) | NOT_FILES
    yield from many("settings: a recipe: ", DRY_SELF, "", "r.toml", contents)
    contents = {"= as it should be": recipe(), "? settled = 25": recipe(settled=25)}
    counts = ("human", "labelled", "unlabelled", "dev", "test", "pretrain")
    for name in (*SIZES, "settled"):
        for value in (-1, 0, "nan", "1979-05-27", 2**62, BIG):
            contents[f"{'? ' * (value == 0 and name in counts)}{name} = {value}"] = recipe(**{name: value})
    contents |= {str(sizes)[1:-1]: recipe(**sizes) for sizes in WORLDS}
    words, says = "selftrain --recipe r.toml --until world", "|".join(("r.toml", "world", "settled", *SIZES))
    yield from many("settings: [world] ", words, "", "r.toml", contents, says=says)
    contents = {f"directory = {value}": recipe(directory=value) for value in DIRECTORIES}
    for name, value in {"goods": -1, "hidden_size": 97, "layers": 0, "asked": "nan", "heads": 0}.items():
        contents[f"{name} = {value}"] = recipe(directory='"w"', **{name: value})
    words, says = "train --stage pretrain --recipe r.toml --dry-run", f"directory|{says}"
    yield from many("settings: train, [world] ", words, "", "r.toml", contents, says=says)
    words, files = "selftrain --recipe r.toml --until world --name", PRECIOUS | {"r.toml": recipe()}
    more: dict[str, Any] = dict(files=files, unchanged=(*PRECIOUS, "runs/mine", "runs/hidden"))
    names = {f"{name!r:.20}": [name] for name in NAMES} | {"? a blank": [" "], "? not UTF-8": ["\udcff"]}
    yield from many("settings: selftrain --name ", words, "", "", names, **more)
    done = {"runs/mine/steps/01-world/done.json": "{}"}
    plans = {f"{plan!r:.40}": done | {"runs/mine/plan.json": plan} for plan in PLANS}
    yield from many("settings: selftrain, a user's plan.json: ", f"{words} mine", "", "", plans, **more)
    steps = {f"{step!r}": ["--from", step] for step in ("nosuch", "..", "", "01-world")}
    yield from many("settings: selftrain, a user's runs/mine --from ", f"{words} mine", "", "", steps, **more)


# ---------------------------------------------------------------------------------- border 5: runs

SELF = "selftrain --recipe small.toml --no-baselines"
RUN_FILES = "plan.json data/test.jsonl data/unlabelled-1.jsonl prove-labelled/proofs.jsonl prover/done.json"
RUN_FILES += " filter-labelled/kept.jsonl filter-labelled/done.json round-1-predict/judged.jsonl"
RUN_FILES += " test-fine-tuned/judged.jsonl initial/model/model.safetensors initial/model/judge_prompt.txt"
RUN_FILES += " fine-tune/model/config.json"
MICRO_MODELS = {"backbone": "micro/steps/09-initial/model", "prover": "micro/steps/05-prover/model"}
OTHER_MODELS: dict[str, Callable[[bytes], bytes]] = {  # the last bytes of a model file are weights
    "model.safetensors": lambda old: old[:-4000] + bytes(range(200)) * 10 + old[-2000:],
    "judge_prompt.txt": lambda old: b"Now: " + old,
    "config.json": lambda old: old.replace(b"10000.0", b"20000.0"),
}
STEPS = "runs/small/steps"
SHARD, KEPT = f"{STEPS}/*-prove-labelled/shards/000000000-*.jsonl", f"{STEPS}/*-filter-labelled/kept.jsonl"
EDITS = WAYS | {
    "one row of two": lambda old: old[: old.index(b"\n") + 1],
    "a row twice": lambda old: old[: old.index(b"\n") + 1] + old,
    "untouched": lambda old: old,
}
TWO_A_SHARD = partial(setattr, run_directory, "shard_rows", lambda *_: 2)  # as the start was made
TRAIN = "train --stage reward --model model --data data.jsonl --out out --threads 1 --batch-size 2 --steps"
LONG = f"{TRAIN} 30 --save-steps 1"


def same(start: str, pattern: str, word: str = "") -> Check:
    """What goes on past some damage comes to what the untouched one came to, and says this word."""

    def check(here: Path, err: str) -> str:
        one, other = (next(root.glob(pattern)).read_bytes() for root in (here, STARTED / start))
        if pattern.endswith(".json"):
            one, other = (json.dumps(json.loads(each) | {"seconds": 0}).encode() for each in (one, other))
        said = "" if re.search(word, err) else f"not a word of {word}"
        return said if one == other else f"exit status 0 with another {pattern}"

    return check


def damage_cases() -> Cases:
    of = partial(many, words=SELF, file="damage", check=same("run", "runs/small/results.json"))
    contents: dict[str, Any] = {"= as it should be": {}, "= verified": ["--verify"]}
    yield from of("runs: a finished run, ", start="run", contents=contents)
    for path in RUN_FILES.split():
        name, pattern = Path(path).name, "runs/small/" + (path if path == "plan.json" else f"steps/*-{path}")
        signed = name in ("done.json", "plan.json")
        contents = {way: changed(pattern, change) for way, change in WAYS.items()}
        contents |= {"? removed": contents.pop("removed")} if signed else {}
        for text in ("[]", "null", "{}", '{"seconds": 1}') if signed else ():
            contents[text] = changed(pattern, lambda _, text=text: text.encode())
        if signed:
            contents["another number"] = changed(pattern, lambda old: re.sub(rb": (\d)", rb": 9\1", old))
        yield from of(f"runs: {path}: ", start="run", contents=contents, says=f"{name}|runs/small")
    for start in ("run", "begun"):  # one is finished, the other goes on
        for name, path in MICRO_MODELS.items():
            contents = {file: changed(f"{path}/{file}", change) for file, change in OTHER_MODELS.items()}
            more = dict(says=f"{name}|{path}", contents=contents)
            yield from of(f"runs: {start}, the {name} has another ", start=start, **more)
        contents = {name: changed(f"{name}.jsonl", lambda old: old.replace(b"price", b"prices", 1))
                    for name in ("human", "labelled", "unlabelled", "test")}  # fmt: skip
        yield from of(f"runs: {start}, edited data: ", start=start, contents=contents, says="jsonl")
        contents = {"another seed": ["--seed", "5"]}
        yield from of(f"runs: {start}, ", start=start, contents=contents, says="seed")
    contents, rival = {"two processes on one run": {}}, "runs/small/steps/*-prove-labelled"
    yield from of("runs: ", start="begun", contents=contents, says="runs/small", rival=rival)
    contents = {way: changed(SHARD, change) for way, change in EDITS.items()}
    more = dict(check=same("run", KEPT), hook=TWO_A_SHARD, statuses=FINE)
    words = f"{SELF} --until filter-labelled"
    yield from many("runs: a shard, ", words, "shards", "damage", contents, **more)
    of = partial(many, words=LONG, start="cut", file="damage")
    point, weights = "out/resume/step-*[0-9]", "out/model/model.safetensors"
    more = dict(statuses=FINE, unchanged=("planted",), check=same("trained", weights))
    planted = {f"out/resume/step-{n:08}/.metadata": ACTS for n in range(2, 4)}  # a name that was a pickle's
    contents = {"untouched": {}, "with a planted .metadata": planted}
    yield from of("runs: a resume point, ", contents=contents, **more)
    more["check"] = same("trained", weights, "warning: .*step-")
    others: dict[str, Callable[[bytes], bytes]] = {
        "null": lambda old: b"null",
        "another step": lambda old: re.sub(rb'"step": \d+', b'"step": 29', old),
        "no signature": lambda old: json.dumps({**json.loads(old), "signature": None}).encode(),
    }
    for file in ("rank-0.safetensors", "point.json"):
        ways = WAYS | {"a pickle that acts": lambda old: ACTS} | (others if file == "point.json" else {})
        contents = {way: changed(f"{point}/{file}", change) for way, change in ways.items()}
        yield from of(f"runs: the newest point's {file}: ", contents=contents, **more)
        contents = {f"{file}: flipped": changed(f"{point}/{file}", WAYS["flipped"], every=True)}
        yield from of("runs: every point's ", contents=contents, says="no resume point is whole")
    for file in ("out/resume/run.json", "out/metrics.jsonl"):
        ways = {f"? {way}": changed(file, change) for way, change in WAYS.items()}
        yield from of(f"runs: {file}: ", contents=ways, says="out")
    slow, rival = f"{TRAIN} 300 --save-steps 1", "out/resume/run.json"
    yield from many("runs: ", slow, "toy", "", {"two trainings in one place": {}}, says="out", rival=rival)


# ---------------------------------------------------------------------------------- border 6: train.py

# Rows that cannot be trained on, and the stages that they are no rows for: fields of a good row in JSON, or
# all of a row.
OF_PAIRS = "prover reward generative discriminative"
BAD_ROWS = {
    OF_PAIRS: ('"question": null', '"question": 5', '"label": "C"', '"label": null', '"margin": NaN'),
    "reward discriminative": (
        '"question": "\\ud800"', '"response_b": ["x"]', '"response_a": "\\udfff"', '"margin": "1"',
        '"label": 1', '"margin": true', '"meta": []', '"messages": []', '"messages": [5]', '"rationale": 5',
        f'"response_a": "{"4 " * 5000}"',
    ),
    "prover reward": ('"rationale": null', '"rationale": "A is better"', '"rationale": "\\ud800"'),
    "reward pretrain": ("[]", "5", "null", "{}", DEEP, "7" * 5000, '{"question": "x'),
    "pretrain": ('{"text": 5}', '{"text": "\\ud800"}', '{"prompt": 5, "response": "x"}', '{"prompt": "x"}',
                 '{"messages": [{}], "response": "x"}', json.dumps({"text": " 4" * 5000})),
}  # fmt: skip
# Pairs of the toy's shop, with their rationales: its tokenizer can spell them.
RNG, GOODS = random.Random(0), good_names(WorldSettings().goods)[:6]
PRICES = {name: n + 1 for n, name in enumerate(GOODS)}
GOOD = [make_pair(tuple(RNG.sample(GOODS, 3)), PRICES, RNG, "human").to_json() for _ in range(8)]
ODD_FIELDS = ('"response_a": "dogs 4."', '"response_b": ""', '"margin": 1e400', '"nosuch": 1')
TAKEN: tuple[dict[str, Any], ...] = (  # what the directory of --out holds, and has to keep
    {"model/config.json": "{}", "model/model.safetensors": "mine"}, {"model/notes.txt": "mine\n"},
    {"model": "mine\n"}, {"resume/notes.txt": "mine\n", "resume/keep/notes.txt": "mine\n"},
    {"resume": "mine\n"}, {"resume/step-1/notes.txt": "mine\n", "resume/run.json": "mine\n"},
    {"model/training.json": "mine"}, {"model/training.json": '{"mine": 1}'}, {"model/training.json": "[]"},
    {"metrics.jsonl": lines({"step": 1, "loss": 2.0})}, {"metrics.jsonl": lines({"mine": 1})},
    {"metrics.jsonl": "my notes\n"}, {"metrics.jsonl": os.mkfifo}, {"metrics.jsonl": folder},
)  # fmt: skip


def train_cases() -> Cases:
    for stage in (*OF_PAIRS.split(), "pretrain"):
        good = {"prompt": "price of", "response": " 4."} if stage == "pretrain" else GOOD[0]
        contents = {"= as it should be": lines(good), **(WHOLE_FILES if stage == "reward" else SOME_FILES)}
        bad = [each for stages in BAD_ROWS if stage in stages.split() for each in BAD_ROWS[stages]]
        for each in (*bad, *(ODD_FIELDS if stage != "pretrain" else ())):
            row = with_values(good, each) if each.startswith('"') else each
            contents[f"? {each:.50}, beside a good row"] = lines(good, row)
            contents |= {f"{each:.50}": lines(row)} if each in bad else {}
        words = TRAIN.replace("reward", stage).replace("data.jsonl", "bad.jsonl")
        more = dict(unchanged=("bad.jsonl",))
        yield from many(f"train: {stage}, ", f"{words} 1", "toy", "bad.jsonl", contents, **more)
    of = partial(many, words=f"{TRAIN} 1", start="toy")
    for taken in TAKEN:
        mine = {f"out/{name}": each for name, each in taken.items()}
        yield from of("train: --out holds ", file="out", contents={f"{taken!r:.60}": mine}, unchanged=[*mine])
    kinds = {"a file": "mine\n", "a link": lambda path: path.symlink_to("pair.json"), "a pipe": os.mkfifo}
    yield from of("train: --out is ", file="out", contents=kinds, unchanged=("out", "pair.json"))
    outs = {f"{out!r:.20}": ["--out", out] for out in (".", "", "pair.json/x", "x" * 300)}
    kept = ("model/config.json", "model/model.safetensors", "model/tokenizer.json", "pair.json")
    outs["? the model"] = ["--out", "model"]
    yield from of("train: --out ", file="", contents=outs, unchanged=kept)
    for file in ("out/notes.txt", "data.jsonl.idx"):
        yield from of("train: a user's ", file=file, contents={f"? {file}": "mine\n"}, unchanged=(file,))
    kinds = {"a file": "mine", "a named pipe": os.mkfifo, "an empty directory": os.mkdir, "not there": {}}
    yield from many("train: --model is ", f"{TRAIN} 1 --model other", "toy", "other", kinds)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "judge_prompt.txt", "mine.bin"):
        loose, says = "? " * (file in ("judge_prompt.txt", "mine.bin")), re.escape(file)
        kinds = {f"{loose}{file} is {name}": each for name, each in NOT_FILES.items()}
        yield from of("train: the model's ", file=f"model/{file}", contents=kinds, says="" if loose else says)
    make, file = partial(model_field, "config.json", start="toy"), "config.json"
    contents = literals({"torch_dtype": '"float8" 5 [5] "nosuch"', "num_hidden_layers": "true"}, make)
    yield from of("train: the model's ", file=f"model/{file}", contents=contents, says=file)
    texts, loops = titled(("", "no placeholder", "{question}", b"\xff")), titled(LOOPS[:3])
    yield from of("train: the model's prompt is ", file="model/judge_prompt.txt", contents=texts)
    file = "model/chat_template.jinja"
    yield from of("train: the model's template: ", file=file, contents=loops, says="template")


# ---------------------------------------------------------------------------------- border 7: published data

TURNS = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in "xy"]
HUMAN = {"score": -2, "feedback1": "x", "feedback2": "y", "reasoning": "z"}
FORMATS: dict[str, dict] = BENCHES | {
    "helpsteer3": BENCHES["helpsteer3"] | {"individual_preference": [HUMAN]},
    "multipref": {"text": "q", "completion_a": "x", "completion_b": "y", "normal_worker_annotations": [],
                  "expert_worker_annotations": [{"overall_pref": "A-is-clearly-better"}]},
    "codeultrafeedback": {"instruction": "q", "responses": [{"model": m, "response": m} for m in "mn"],
                          "annotations": [{"model": "m", "rating": "5"}, {"model": "n", "rating": "3"}]},
    "unified-feedback": {"conv_A": TURNS[0], "conv_B": TURNS[1], "conv_A_rating": 1, "conv_B_rating": 2.5},
    "preference-collection": {"orig_instruction": "q", "orig_response_A": "x", "orig_response_B": "y",
                              "orig_score_A": "2", "orig_score_B": 5, "orig_preference": "B"},
    "safe-rlhf-better": {"prompt": "q", "response_0": "x", "response_1": "y", "better_response_id": 1},
    "skywork-80k": {"chosen": TURNS[0], "rejected": TURNS[1]},
    "stack-exchange": {"question": "<p>q</p>", "answers": [{"text": "<p>a</p>"}, {"text": "<p>b</p>"}]},
}  # fmt: skip
SOURCES: dict[str, dict[str, Any]] = {
    "in.jsonl": {"gzip": PACKED, "zeros": bytes(999), "? with a byte order mark": "\ufeff" + ROW,
                 "cut": '{"question": "x', "not UTF-8": b'{"x": "\xff"}', **NOT_FILES},
    "in.jsonl.gz": {"no gzip": ROW, "cut gzip": PACKED[:-9], "a pipe": os.mkfifo, "empty": ""},
    "in.json": {"no array": "{}", "a cut array": '[{"x": 1}, ', "two arrays": "[][]", "deep": DEEP,
                "a long number": f"[{'7' * 5000}]", "a pipe": os.mkfifo, "not UTF-8": b"[\xff]", "empty": ""},
    "in.parquet": {"text": "mine", "empty": "", "a pipe": os.mkfifo, "its marks alone": b"PAR1PAR1"},
    "in.txt": {"an ending that nothing reads": ROW},
}  # fmt: skip
PAIRS_OF_PLACES = (  # IN and OUT
    "in.jsonl in.jsonl", "in.jsonl ./e/../in.jsonl", "in.jsonl in.jsonl/x.jsonl", "in.jsonl out.txt",
    "f f/in.jsonl", f"in.jsonl {'x' * 300}.jsonl", "e out.jsonl", "d out.jsonl", "nowhere out.jsonl",
)  # fmt: skip


def dataset_cases() -> Cases:
    for format, row in FORMATS.items():
        # Which values are some format's own is the readers' business: here, that nothing breaks.
        sure = [path for path in row if path not in LOOSE and (format, path) != ("pairs", "label")]
        contents = values(dict.fromkeys(row, ANY), "null list NaN 1e400", partial(with_value, row))
        contents |= values(dict.fromkeys(sure, ""), "absent digits deep", partial(with_value, row))
        contents |= {"= as it should be": lines(row), "is empty": "", "is a list": "[]"}
        words = f"datasets {format} in.jsonl out.jsonl"
        yield from many(f"datasets: {format}, ", words, "", "in.jsonl", contents)
    for source, kinds in SOURCES.items():
        words = f"datasets pairs {source} out.jsonl"
        yield from many(f"datasets: {source} is ", words, "", source, kinds, says="in")
    files = {"in.jsonl": ROW, "d/in.jsonl": os.mkfifo, "e": folder, "f/in.jsonl": ROW}
    words, out, kept = "datasets pairs in.jsonl out.jsonl", "out.jsonl", ("in.jsonl", "f", "out.jsonl")
    kinds = {**NOT_FILES, "a full device": partial(device, 7), "a text": "mine\n", "JSON": '{"mine": 1}\n'}
    yield from many("datasets: OUT is ", words, "", out, kinds, files, unchanged=kept)
    # A file that takes the place of another name of the input leaves the input as it is.
    kinds = {f"? {name}": each for name, each in INPUT_ITSELF.items()}
    kinds["= an earlier conversion"] = lines({"id": "1"} | PAIR)
    yield from many("datasets: OUT is ", words, "", out, kinds, files, unchanged=kept[:2])
    places = {f"{both:.40}": both.split() for both in PAIRS_OF_PLACES}
    more: dict[str, Any] = dict(unchanged=kept, absent=("out.jsonl", "out.txt"))
    yield from many("datasets: IN and OUT are ", words[:14], "", "", places, files, **more)
    file, bad = "other.jsonl", {"a list": "[]", "a cut row": '{"x', **NOT_FILES}
    yield from many("datasets: --against ", f"{words} --against {file}", "", file, bad, files, **more)
    flags = ("--malformed-limit=nan", "--malformed-limit=text", "--max-characters=1.5", "--seed=text")
    yield from many("datasets: ", words, "", "", {flag: [flag] for flag in flags}, files, **more)
    formats = {f"{name!r}": [name, "in.jsonl", "out.jsonl"] for name in ("nosuch", "", "\x1b[31m")}
    yield from many("datasets: no format ", "datasets", "", "", formats, files, **more)


BORDERS: tuple[Callable[[], Cases], ...] = (
    config_cases, file_cases, pair_cases, bulk_cases, score_cases, calibrate_cases,
    bench_cases, setting_cases, damage_cases, train_cases, dataset_cases,
)  # fmt: skip

# ---------------------------------------------------------------------------------- what cases start from

STARTED = Path("hostile-starts")  # replaced by the place where the starts of this call are


def start_judge(here: Path, **fields: Any) -> None:
    """A random model of the LLaMA-3 kind, with a prompt, and a pair to judge."""
    make_checkpoint(here / "model", "llama3", **fields)
    prompt = "{question}\nA: {response_a}\nB: {response_b}\nThe better one:"
    (here / "model/judge_prompt.txt").write_text(prompt)
    (here / "a.json").write_text(json.dumps(PAIR))


def start_judged(here: Path) -> None:
    """The same, and forty labelled pairs that it has judged."""
    start_judge(here)
    labelled = ({**PAIR, "question": f"What is {n} + 2?", "label": "AB"[n % 2]} for n in range(40))
    (here / "in.jsonl").write_text(lines(*labelled))
    succeed(here, "infer --pairs in.jsonl --out j.jsonl --model model --format label")


def start_toy(here: Path) -> None:
    """The shipped backbone, and pairs in its words."""
    shutil.copytree(SHIPPED, here / "model")
    (here / "model/training.json").unlink()
    (here / "data.jsonl").write_text(lines(*GOOD))
    (here / "pair.json").write_text(json.dumps(GOOD[0]))


def start_run(here: Path) -> None:
    """A finished self-training run, with everything that it began from beside it, by relative paths."""
    with tempfile.TemporaryDirectory() as made:
        micro = finished_micro(Path(made))
        recipe_file = small_world(micro, here)
        text = recipe_file.read_text().replace(str(micro), "micro").replace(f"{here}/", "")
        for step in ("09-initial", "05-prover"):
            shutil.copytree(micro / f"steps/{step}/model", here / f"micro/steps/{step}/model")
    recipe_file.write_text(text)
    succeed(here, SELF)


def start_again(first: str, words: str, here: Path) -> None:
    """What another start began with, and another command."""
    shutil.copytree(started(first), here, dirs_exist_ok=True)
    shutil.rmtree(here / "runs", ignore_errors=True)
    succeed(here, words)


def start_shards(here: Path) -> None:
    """A run that was killed in the middle of its proofs: two shards of two pairs are there."""
    shutil.copytree(started("begun"), here, dirs_exist_ok=True)
    died = run_command(here, SELF.split(), hook=lambda: (TWO_A_SHARD(), watch_shards(3)))
    assert died[0] == -signal.SIGKILL and len(list(here.rglob("shards/*.jsonl"))) == 2, died


def start_cut(here: Path) -> None:
    """A training that was killed: its resume points stand."""
    shutil.copytree(started("trained").with_name("toy"), here, dirs_exist_ok=True)
    pid = begin(here, LONG.split(), here.parent / "cut.out")
    wait_for(here, "out/resume/step-*3", pid)
    end(pid)


STARTS: dict[str, Callable[[Path], None]] = {
    "judge": start_judge, "scalar": partial(start_judge, num_labels=1, tie_embeddings=False),
    "judged": start_judged, "toy": start_toy, "run": start_run, "shards": start_shards, "cut": start_cut,
    "begun": partial(start_again, "run", f"{SELF} --until wrong-labels"),  # the prover is measured
    "trained": partial(start_again, "toy", LONG),
}  # fmt: skip


def succeed(here: Path, words: str) -> None:
    done = run_command(here, words.split(), patience=600)
    assert done[0] == 0, done


def started(name: str) -> Path:
    """A start, made where it is not there yet, in a process of its own: the one that forks stays idle."""
    place = STARTED / name
    if not place.exists():
        print(f"making {name} …", file=sys.stderr, flush=True)
        place.mkdir(parents=True)
        pid = forks.fork(lambda _: STARTS[name](place) or 0, 0, 1, 0)
        assert forks.exits([pid]) == [0], f"the start {name} could not be made"
    return place


# ---------------------------------------------------------------------------------- how a case runs


def begin(here: Path, words: Sequence[str], log: Path, hook: Callable[[], Any] | None = None) -> int:
    """The command in a child of its own session, with `here` as its directory; → its process id."""
    given = [word.replace("HERE", str(here)) for word in words]

    def work(_: int) -> int:
        os.setsid()
        os.chdir(here)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for kind, most in (("AS", mapped + MEMORY), ("FSIZE", FILE_SIZE), ("CORE", 0)):
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
        if hook:
            hook()
        return exit_status(importlib.import_module(MAINS[given[0]]).main, given[1:])

    sys.stdout.flush()
    sys.stderr.flush()
    return forks.fork(work, 0, 1, 0)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    forks.exits([pid])


def wait_for(here: Path, pattern: str, pid: int) -> None:
    latest = time.monotonic() + PATIENCE
    while not any(here.glob(pattern)):
        gone = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert gone is None and time.monotonic() < latest, f"{pattern} does not appear"
        time.sleep(0.001)


def run_command(here: Path, words: Sequence[str], hook: Any = None, patience: float = PATIENCE) -> tuple:
    """The command to its end, or to the end of patience; → its status, or None, and what it wrote."""
    log = here.parent / f"{here.name}.log"
    pid, latest, found, code = begin(here, words, log, hook), time.monotonic() + patience, 0, 0
    while not found and time.monotonic() < latest:
        time.sleep(0.003)
        found, code = os.waitpid(pid, os.WNOHANG)
    if not found:
        end(pid)
    out, err = (Path(f"{log}.{kind}").read_text("utf-8", errors="surrogateescape") for kind in ("out", "err"))
    return os.waitstatus_to_exitcode(code) if found else None, out, err


def run_case(case: Case, here: Path) -> tuple[str, str]:
    """→ ("ok", "TRACEBACK", "HANG" or "WRONG"; what was seen)."""
    if case.start:
        shutil.copytree(started(case.start), here)
    here.mkdir(parents=True, exist_ok=True)
    for name, content in case.files.items():
        place(here / name, content)
    before = {name: state(here / name) for name in case.unchanged}
    rival = begin(here, case.words, here.parent / "rival", case.hook) if case.rival else 0
    try:
        if rival:
            wait_for(here, case.rival, rival)
            time.sleep(0.1)  # what it holds, it holds from about when it made this
            os.kill(rival, signal.SIGSTOP)
        status, out, err = run_command(here, case.words, case.hook)
    except AssertionError as error:
        return "WRONG", f"the first process: {error}"
    finally:
        if rival:
            end(rival)
    wrong = [f"{name} was changed" for name, held in before.items() if state(here / name) != held]
    wrong += [f"{name} appeared" for name in case.absent if status == 2 and os.path.lexists(here / name)]
    named = re.findall(r"(?m)^[\w.]+(?:Error|Exception|Interrupt|Iteration|Exit)\b.*", err)
    if status is None or status < 0 or "Traceback (most recent call last)" in out + err:
        last = (named or err.split("\n")[-2:-1] or [""])[-1][:200]
        return "HANG" if status is None else "TRACEBACK", "; ".join([*wrong, f"exit status {status}", last])
    errors = [line for line in re.split(r"[\n\r]", err) if line.startswith("error: ")]
    if status not in case.statuses:
        wrong.append(f"exit status {status} ({' '.join(errors)[:200]})")
    elif status == 2 and len(errors) != 1:
        wrong.append(f"{len(errors)} error lines")
    elif status == 2 and not re.search(case.says, errors[0]):
        wrong.append(f"does not say {case.says}: {errors[0][:300]}")
    if "\x1b" in out + err:
        wrong.append("a raw escape character")
    if case.check and status == 0:
        wrong += filter(None, [case.check(here, err)])
    return ("WRONG", "; ".join(wrong)) if wrong else ("ok", "")


def run_all(cases: Sequence[Case], scratch: Path) -> dict[str, dict]:
    """→ for each border how many cases, what became of them, and the titles of those that failed."""
    borders: dict[str, dict] = {}
    for number, case in enumerate(cases):
        none: dict[str, Any] = dict.fromkeys(("cases", "ok", "TRACEBACK", "HANG", "WRONG", "seconds"), 0)
        here, none["failed"] = scratch / str(number) / "case", []
        figures = borders.setdefault(case.title.partition(":")[0], none)
        if case.start:
            started(case.start)
        began = time.monotonic()
        try:
            found, seen = run_case(case, here)
        except (OSError, ValueError, LookupError, AssertionError) as error:
            found, seen = "WRONG", f"the case itself cannot be made: {error!r}"
        shutil.rmtree(here.parent, ignore_errors=True)
        for name, more in (("seconds", time.monotonic() - began), ("cases", 1), (found, 1)):
            figures[name] = round(figures[name] + more, 3)
        if found != "ok":
            figures["failed"].append(f"{found}: {case.title}")
            print(f"{found:10}{case.title}\n          {seen!r}", flush=True)
    return borders


def main() -> int:
    parser = Parser("hostile.py", __doc__)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help='cases whose "border: name" has it')
    parser.add_argument("--list", action="store_true", help="print the cases, and run none")
    arguments = parser.parse_args()
    cases = [case for maker in BORDERS for case in maker() if arguments.only in case.title]
    if arguments.list:
        print(*(case.title for case in cases), f"{len(cases)} cases", sep="\n")
        return 0
    for module in (*IMPORTS.split(), *MAINS.values()):
        importlib.import_module(module)
    gc.freeze()  # a fork that collects its garbage need not look at all that was imported
    global STARTED
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        STARTED = Path(scratch) / "starts"
        borders = run_all(cases, Path(scratch))
    gc.unfreeze()  # what was frozen would be taken for leaked
    for name, figures in borders.items():
        print(f"{name:10}" + ", ".join(f"{key} {value}" for key, value in figures.items() if key != "failed"))
    failed = sum(len(figures["failed"]) for figures in borders.values())
    if not arguments.only:  # some of the cases are no result
        common.write_result("hostile", {"cases": len(cases), "failed": failed, "borders": borders})
    print(f"{len(cases)} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
