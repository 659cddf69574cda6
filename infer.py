"""Judges with a trained model: which of two responses is better, why, and how sure it is.

    python infer.py --pair a.json                       verdict, probability, rationale, votes
    python infer.py --pair a.json --json --votes 16     the same as one JSON object
    python infer.py --rank b.json --method knockout     the best, the full ranking, comparisons used
    python infer.py --pairs in.jsonl --out judged.jsonl --votes 4     many pairs; the same command goes on
    python infer.py --bench judgebench FILE --out judged.jsonl        a benchmark, and its table
    python infer.py --score judgebench judged.jsonl     the table again, without a model
    python infer.py --replay judged.jsonl --item ID     draws a row's votes again: are they the same?
    python infer.py --audit in.jsonl --out audit.jsonl  what a judge follows besides the better response
    python infer.py --pair a.json --model http://HOST:PORT/v1#NAME    a model that is served elsewhere
    torchrun --nproc_per_node=8 infer.py --bench rm-bench FILE --out judged.jsonl     all GPUs of a node
    python infer.py --calibrate judged.jsonl --model DIR    labelled pairs make DIR's probabilities honest
    python infer.py --serve --port 8000                 a judge for others: /judge, /rank, /reward, /v1, …
    python infer.py --formats                           what can be judged with, and how it is read

A pair file: {"question": "…", "response_a": "…", "response_b": "…"}, or "messages" instead of "question"; a
list file has "responses" instead (--json counts them from 0). Without --model the newest run of selftrain.py
under runs/ judges. One vote is greedy and in the given order; an even number of votes is sampled, half of
them with the responses exchanged: as the flags say, or the checkpoint's generation_config.json, or at
temperature 1. A benchmark and an audit take votes per order: 1 is greedy in both. Benchmarks: rm-bench,
judgebench, ppe, rewardbench, rewardbench2, llmbar, rmb, helpsteer3, pairs; FILE may be a directory of its
files; --score audit FILE reads an audit's. An endpoint's key is taken from GRAMR2_API_KEY. Exit status: 0
done, 1 a vote that was replayed is another, 2 bad input, 130 interrupted, 141 its reader left.
"""

from __future__ import annotations

if __name__ == "__main__":  # Ctrl-C may come while the rest is imported, or a package be missing
    from gramr2.interrupts import end_in_one_line

    end_in_one_line()

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gramr2.data import Store
from gramr2.extras import audit, evaluate, replay
from gramr2.extras.bulk import Judge, JudgeSettings, judge_into, model_place, newest_model
from gramr2.extras.printing import judgment_text, ranking_lines, ranking_row
from gramr2.fields import Fields, typed
from gramr2.files import InputError, Parser, need, read_json, run_command, visible
from gramr2.rankings import METHODS
from gramr2.records import Messages, Pair, messages_of
from gramr2.settings import SAMPLING, SEEDS

# 16 is what the paper's best figures use.
VOTES = {"pair": 16, "rank": 4, "pairs": 4, "bench": 1, "audit": 2, "serve": 4}
PER_ORDER = ("bench", "audit")  # their votes are given for each order
BULK = ("pairs", *PER_ORDER)

Made = TypeVar("Made")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("infer.py", description=__doc__)
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one("--pair", type=Path, metavar="FILE", help="one pair, a JSON file")
    one("--rank", type=Path, metavar="FILE", help="one list of responses, a JSON file")
    one("--pairs", type=Path, metavar="IN.jsonl", help="many pairs, one a line; needs --out")
    one("--bench", nargs=2, metavar=("NAME", "FILE"), help="a published benchmark; needs --out")
    one("--audit", type=Path, metavar="IN.jsonl", help="audit the judge on labelled pairs; needs --out")
    one("--score", nargs="+", metavar=("NAME", "FILE"), help="a benchmark's table from judged files")
    one("--replay", type=Path, metavar="FILE", help="draw a judged row's votes again; needs --item")
    one("--calibrate", type=Path, metavar="FILE", help="fit --model's calibration on judged pairs")
    one("--serve", action="store_true", default=None, help="an HTTP server, until it is told to stop")
    one("--formats", action="store_true", help="list the kinds of judges")
    add = parser.add_argument
    add("--out", type=Path, metavar="OUT.jsonl", help="where the judgments of --pairs, --bench or --audit go")
    model = "a model directory; or, served elsewhere, URL#NAME [the newest run's]"
    add("--model", type=model_place, metavar="DIR", help=model)
    flying = f"requests to an endpoint at one time [{JudgeSettings.in_flight}]"
    add("--in-flight", type=int, default=JudgeSettings.in_flight, metavar="N", help=flying)
    add("--prompt", type=Path, metavar="FILE", help="a judge prompt instead of the model's own")
    add("--format", metavar="NAME", help="the kind of judge, see --formats [think; scalar with such a head]")
    add("--item", metavar="ID", help="the id of the row of --replay")
    add("--vote", type=int, metavar="N", help="compare only this vote of --replay, from 1 [all]")
    add("--method", choices=METHODS, default="merge", help="how --rank compares [merge]")
    votes = "1, or an even number [16; 4 for --pairs, --rank, --serve; 1 for --bench, 2 for --audit]"
    add("--votes", type=int, metavar="N", help=votes)
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same votes [0]")
    own = "checkpoint's, or"
    add("--temperature", type=float, metavar="T", help=f"of sampled votes; 0: the likeliest token [{own} 1]")
    add("--top-p", type=float, metavar="P", help=f"draw from the likeliest tokens of this share [{own} 1]")
    add("--top-k", type=int, metavar="K", help=f"draw from the K likeliest tokens; 0: all [{own} 0]")
    longest = (
        f"longest answer [{own} 4096; 1024 below a billion parameters; what the context leaves, at most]"
    )
    add("--max-new-tokens", type=int, metavar="N", help=longest)
    add("--limit", type=int, metavar="N", help="only the first N rows of --pairs, --bench or --audit")
    add("--host", default="127.0.0.1", help="where --serve listens; elsewhere needs a key [127.0.0.1]")
    add("--port", type=int, default=8000, help="[8000; 0: a free one]")
    add("--api-key-file", type=Path, metavar="FILE", help="the key that callers of --serve must give")
    add("--queue", type=int, default=1024, metavar="N", help="most requests at once, of --serve [1024]")
    add("--timeout", type=float, default=600.0, metavar="S", help="most seconds of a request [600]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[cuda where there is one]")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="[bfloat16 on cuda]")
    add("--json", action="store_true", help="nothing but JSON on standard output")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    given = parse(argv)
    if given.formats:
        print_formats(given.json)
    elif given.score:
        name, *files = given.score
        print_score(name, [Path(each) for each in files], given.json)
    elif given.replay:
        return replay.replay_item(given)
    elif given.calibrate:
        print_calibration(given.calibrate, given.model, given.json)
    else:
        kind = next(name for name in VOTES if getattr(given, name) is not None)
        if (kind in BULK) != (given.out is not None):
            raise InputError("--out OUT.jsonl goes with --pairs, --bench and --audit, which all need it")
        need(given.limit is None or kind in BULK, "--limit goes with --pairs, --bench and --audit")
        alone = kind in BULK or os.environ.get("WORLD_SIZE", "1") == "1"
        need(alone, f"--{kind}: one process does it; start it without torchrun")
        settings = judge_settings(kind, given)
        if kind == "pair":
            judge_pair(given.pair, settings, given.json)
        elif kind == "serve":
            return serve_judge(given, settings)
        elif kind == "rank":
            judge_list(given.rank, given.method, settings, given.json)
        elif kind == "pairs":
            judge_file(given.pairs, given.out, settings, given.limit, given.json)
        else:
            name, path = given.bench or ("audit", given.audit)
            judge_benchmark(name, Path(path), given.out, settings, given.limit, given.json)
    return 0


def judge_settings(kind: str, given: argparse.Namespace) -> JudgeSettings:
    votes = typed(VOTES[kind] if given.votes is None else given.votes, int, "--votes", high=10**4)
    typed(given.seed, int, "--seed", **SEEDS)
    typed(given.limit, int | None, "--limit", low=1, high=10**12)
    said = {name: (getattr(given, name), *SAMPLING[name]) for name in SAMPLING}
    drawn = {
        name: typed(value, kind, f"--{name.replace('_', '-')}", **limits)
        for name, (value, kind, limits) in said.items() if value is not None
    }  # fmt: skip
    if votes < 1 or (votes > 1 and votes % 2 and kind not in PER_ORDER):
        raise InputError(f"--votes {votes}: expected 1, or an even number (half in each order)")
    greedy = votes == 1
    votes *= 2 if kind in PER_ORDER else 1
    where = given.model, given.prompt, given.format, given.device, given.dtype
    in_flight = typed(given.in_flight, int, "--in-flight", low=1, high=1024)
    return JudgeSettings(*where, votes, given.seed, greedy, drawn, in_flight)


# ---------------------------------------------------------------------------------- one pair, one list, many
# What goes in is read before the model, which takes its time.


def judge_pair(path: Path, settings: JudgeSettings, as_json: bool) -> None:
    pair = read_one(path, Pair.from_json)
    (row,) = Judge(settings).rows([pair])
    if "error" in row:
        raise InputError(row["error"])
    del row["pair"]
    print(as_text(row, indent=2) if as_json else judgment_text(pair, row))


def judge_list(path: Path, method: str, settings: JudgeSettings, as_json: bool) -> None:
    question, responses = read_one(path, as_list)
    judge = Judge(settings)
    ranking = judge.model.rank(question, responses, method, **judge.sampling)
    if as_json:
        print(json.dumps(ranking_row(ranking)))
    else:
        print("\n".join(ranking_lines(ranking, responses, judge.model.format.name)))


def judge_file(path: Path, out: Path, settings: JudgeSettings, limit: int | None, as_json: bool) -> None:
    counts = judge_into(out, settings, Store(path, Pair.from_json), path, limit)
    line = "{judged} judged ({unread} of them unreadable), {before} were there before, {failed} failed: {out}"
    if counts.get("forged"):
        line += "\n{forged} hold a line of the judge's own prompt, and may speak in its name"
    if counts:  # as the first rank has them
        print(json.dumps(counts) if as_json else line.format(**counts, out=out))


def judge_benchmark(
    name: str, path: Path, out: Path, settings: JudgeSettings, limit: int | None, as_json: bool
) -> None:
    made_of = audit.variants if name == "audit" else None
    items = list(evaluate.read_benchmark("pairs" if made_of else name, path))
    if judge_into(out, settings, items, path, limit, made_of):
        print_score(name, [out], as_json)


def serve_judge(given: argparse.Namespace, settings: JudgeSettings) -> int:
    typed(given.port, int, "--port", low=0, high=65535)
    typed(given.queue, int, "--queue", low=1, high=10**4)
    typed(given.timeout, float, "--timeout", above=0, high=10**6)
    need(not isinstance(given.model, str), "--serve: takes a model here; one at a URL is served already")
    from gramr2.extras.serve import read_key, serve  # brings torch

    key = read_key(given.host, given.api_key_file)
    return serve(Judge(settings), given.host, given.port, key, given.queue, given.timeout)


# ---------------------------------------------------------------------------------- what goes in


def read_one(path: Path, make: Callable[[Any], Made]) -> Made:
    row = read_json(path)
    try:
        return make(row)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def as_list(row: Any) -> tuple[Messages, list[str]]:
    """A list file's conversation and responses: a pair file's fields, with "responses"."""
    responses = Fields(row).get("responses", tuple[str, ...])
    need(len(responses) > 1, 'field "responses" should be a list of two texts or more')
    return messages_of(row), list(responses)


# ---------------------------------------------------------------------------------- what comes out


def as_text(found: Any, indent: int | None = None) -> str:
    """JSON that a terminal may show as well."""
    return visible(json.dumps(found, ensure_ascii=False, indent=indent))


def print_formats(as_json: bool) -> None:
    from gramr2.extras.formats import FORMATS  # brings torch

    readings = {name: each.reading for name, each in FORMATS.items()}
    lines = (f"{name:9} {reading}" for name, reading in readings.items())
    print(json.dumps(readings, indent=2) if as_json else "\n".join(lines))


def print_calibration(judged: Path, model: Path | str | None, as_json: bool) -> None:
    model = model or newest_model()
    if isinstance(model, str):
        raise InputError(f"--calibrate: its map lies in a model's directory, and {model} has none here")
    path, fitted = evaluate.calibrate(judged, model)
    line = f"calibrated on {fitted['pairs']} pairs of {fitted['votes']} votes: {path}"
    print(json.dumps(fitted) if as_json else line)


def print_score(name: str, paths: list[Path], as_json: bool) -> None:
    if not paths:
        raise InputError(f"--score {name}: give a judged file as well")
    tables = audit if name == "audit" else evaluate
    result = tables.score(name, paths)
    print(as_text(result, indent=2) if as_json else visible(tables.readable(result)))


if __name__ == "__main__":
    run_command(main)
