"""Judges with a trained model: which of two responses is better, why, and how sure it is.

    python infer.py --pair a.json                       verdict, probability, rationale, votes
    python infer.py --pair a.json --json --votes 16     the same as one JSON object
    python infer.py --pairs in.jsonl --out judged.jsonl --votes 4     many pairs; the same command goes on

A pair file: {"question": "…", "response_a": "…", "response_b": "…"}, or "messages" instead of "question".
Without --model the newest run of selftrain.py under runs/ judges. One vote is greedy and in the given order;
an even number of votes is sampled, half of them with the responses exchanged. Exit status: 0 done, 2 bad
input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gramr2.files import InputError, exit_status, read_json
from gramr2.records import Judgment, Pair, show

VOTES = 16  # what the paper's best figures use
BULK_VOTES = 4


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "infer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pair", type=Path, metavar="FILE", help="one pair, a JSON file")
    what.add_argument("--pairs", type=Path, metavar="IN.jsonl", help="many pairs, one a line; needs --out")
    parser.add_argument("--out", type=Path, metavar="OUT.jsonl", help="where the judgments of --pairs go")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model directory [the newest run's]")
    parser.add_argument(
        "--prompt", type=Path, metavar="FILE", help="a judge prompt instead of the model's own"
    )
    votes = f"1, or an even number [{VOTES}; {BULK_VOTES} for --pairs]"
    parser.add_argument("--votes", type=int, metavar="N", help=votes)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed gives the same votes [0]"
    )
    parser.add_argument("--max-new-tokens", type=int, default=4096, metavar="N", help="longest answer [4096]")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto [auto]")
    parser.add_argument("--dtype", default="auto", help="float32 or bfloat16 [bfloat16 on CUDA]")
    parser.add_argument("--json", action="store_true", help="nothing but JSON on standard output")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    if (arguments.pairs is None) != (arguments.out is None):
        raise InputError("--pairs IN.jsonl and --out OUT.jsonl go together")
    votes = arguments.votes or (VOTES if arguments.pair else BULK_VOTES)
    if votes < 1 or (votes > 1 and votes % 2):
        raise InputError(f"--votes {votes}: expected 1, or an even number (half in each order)")
    return one(arguments, votes) if arguments.pair else many(arguments, votes)


def one(arguments: argparse.Namespace, votes: int) -> int:
    pair = read_pair(arguments.pair)
    ((_, judgment),) = judgments(arguments, [pair], votes, progress=False)
    if isinstance(judgment, InputError):
        raise judgment
    if arguments.json:
        print(json.dumps({"id": pair.id, **judgment.to_json()}, ensure_ascii=False, indent=2))
    else:
        print(readable(pair, judgment))
    return 0


def many(arguments: argparse.Namespace, votes: int) -> int:
    """Appends a row per pair as it is judged. What succeeded before stays, what failed is tried again."""
    from gramr2.data import Shard, Store

    store = Store(arguments.pairs)
    done = keep_finished(arguments.out)
    bad: list[dict[str, Any]] = []
    failed = judged = 0
    with Shard(arguments.out) as out:
        for pair, judgment in judgments(arguments, pending(store, done, bad), votes, progress=True):
            failure = isinstance(judgment, InputError)
            failed += failure
            judged += not failure
            row = {"error": str(judgment)} if failure else judgment.to_json()
            out.write({"id": pair.id, **row, "pair": pair.to_json()})
        for row in bad:
            out.write(row)
    counts = {"judged": judged, "before": len(done), "failed": failed + len(bad)}
    if arguments.json:
        print(json.dumps(counts))
    else:
        print(f"{judged} judged, {len(done)} were there before, {counts['failed']} failed: {arguments.out}")
    return 0


def keep_finished(path: Path) -> set[str]:
    """Ids that an earlier call has judged; its failures are taken out, to be tried again."""
    if not path.is_file():
        return set()
    from gramr2.data import Store
    from gramr2.steps import write_rows

    rows = [row for row in Store(path) if "error" not in row]
    write_rows(path, rows)
    return {row["id"] for row in rows}


def pending(store, done: set[str], bad: list[dict[str, Any]]) -> Iterator[Pair]:
    """Pairs that are still to be judged; rows that are none go to `bad` with the reason."""
    for place in range(len(store)):
        try:
            pair = Pair.from_json(store[place])
        except InputError as error:
            bad.append({"id": f"row {place + 1}", "error": str(error)})
            continue
        if pair.id not in done:
            yield pair


def read_pair(path: Path) -> Pair:
    try:
        return Pair.from_json(read_json(path))
    except InputError as error:
        raise InputError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None


def judgments(arguments: argparse.Namespace, pairs: Iterable[Pair], votes: int, progress: bool) -> Iterator:
    """(pair, judgment) from the model that the command line names."""
    directory = arguments.model or newest_model()
    import torch

    from gramr2.judge import RewardModel

    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    dtype = arguments.dtype if arguments.dtype != "auto" else "bfloat16" if cuda else "float32"
    model = RewardModel.load(directory, "cuda" if cuda else "cpu", dtype, arguments.prompt)
    longest = arguments.max_new_tokens
    return model.judge_many(pairs, votes, arguments.seed, max_new_tokens=longest, progress=progress)


def newest_model() -> Path:
    """The model of the run that finished last, under runs/ here."""
    finished = sorted(Path("runs").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise InputError(
            "no finished run under runs/; give --model DIR, or make one first: python selftrain.py --iters 3"
        )
    model = finished[-1].parent / read_json(finished[-1])["model"]
    print(f"model: {model}", file=sys.stderr)
    return model


def readable(pair: Pair, judgment: Judgment) -> str:
    votes = judgment.votes
    lines = []
    if pair.response_a == pair.response_b:
        lines.append("No preference: the two responses are identical.")
    elif judgment.label is None:
        lines.append("No verdict: none of the answers could be read.")
    elif judgment.orders_agree is False:
        lines.append(
            f"Leaning to {judgment.label}, but the verdict changes with the order: no clear preference."
        )
    else:
        sure = max(judgment.p_a, 1 - judgment.p_a)
        lines.append(f"Response {judgment.label} is better (probability {sure:.2f})")
    if sum(votes.values()):
        lines.append(f"votes: {votes['A']} for A, {votes['B']} for B, {votes['none']} unreadable")
    if judgment.rationale:
        lines += ["", show(judgment.rationale)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
