"""Judges with a trained model: which of two responses is better, why, and how sure it is.

    python infer.py --pair a.json                       verdict, probability, rationale, votes
    python infer.py --pair a.json --json --votes 16     the same as one JSON object
    python infer.py --rank b.json --method knockout     the best, the full ranking, comparisons used
    python infer.py --pairs in.jsonl --out judged.jsonl --votes 4     many pairs; the same command goes on
    python infer.py --bench judgebench FILE --out judged.jsonl        a benchmark, and its table
    python infer.py --score judgebench judged.jsonl     the table again, without a model
    python infer.py --calibrate judged.jsonl --model DIR    labelled pairs make DIR's probabilities honest
    python infer.py --formats                           what can be judged with, and how it is read

A pair file: {"question": "…", "response_a": "…", "response_b": "…"}, or "messages" instead of "question"; a
list file has "responses" instead (--json counts them from 0). Without --model the newest run of selftrain.py
under runs/ judges. One vote is greedy and in the given order; an even number of votes is sampled, half of
them with the responses exchanged. A benchmark takes votes per order: 1 is greedy in both. Benchmarks:
rm-bench, judgebench, ppe, helpsteer3, pairs. Exit status: 0 done, 2 bad input, 130 interrupted, 141 its
reader left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gramr2.files import InputError, Parser, exit_status, finished_runs, read_json, write_rows
from gramr2.records import Pair, messages_of, show

VOTES = {"pair": 16, "rank": 4, "pairs": 4, "bench": 1}  # 16 is what the paper's best figures use
METHODS = ("linear", "knockout", "merge", "selection")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("infer.py", description=__doc__)
    one = parser.add_mutually_exclusive_group(required=True).add_argument
    one("--pair", type=Path, metavar="FILE", help="one pair, a JSON file")
    one("--rank", type=Path, metavar="FILE", help="one list of responses, a JSON file")
    one("--pairs", type=Path, metavar="IN.jsonl", help="many pairs, one a line; needs --out")
    one("--bench", nargs=2, metavar=("NAME", "FILE"), help="a published benchmark; needs --out")
    one("--score", nargs="+", metavar=("NAME", "FILE"), help="a benchmark's table from judged files")
    one("--calibrate", type=Path, metavar="FILE", help="fit --model's calibration on judged pairs")
    one("--formats", action="store_true", help="list the kinds of judges")
    add = parser.add_argument
    add("--out", type=Path, metavar="OUT.jsonl", help="where the judgments of --pairs or --bench go")
    add("--model", type=Path, metavar="DIR", help="a model directory [the newest run's]")
    add("--prompt", type=Path, metavar="FILE", help="a judge prompt instead of the model's own")
    add("--format", metavar="NAME", help="the kind of judge, see --formats [think; scalar with such a head]")
    add("--method", choices=METHODS, default="merge", help="how --rank compares [merge]")
    votes = "1, or an even number [16; 4 for --pairs and --rank; 1 for --bench]"
    add("--votes", type=int, metavar="N", help=votes)
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same votes [0]")
    add("--max-new-tokens", type=int, default=4096, metavar="N", help="longest answer [4096]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[cuda where there is one]")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="[bfloat16 on cuda]")
    add("--json", action="store_true", help="nothing but JSON on standard output")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    if arguments.formats:
        from gramr2.judge import FORMATS

        readings = {name: each.reading for name, each in FORMATS.items()}
        lines = (f"{name:9} {reading}" for name, reading in readings.items())
        print(json.dumps(readings, indent=2) if arguments.json else "\n".join(lines))
    elif arguments.score:
        tell_score(arguments.score[0], [Path(each) for each in arguments.score[1:]], arguments.json)
    elif arguments.calibrate:
        from gramr2.extras.evaluate import calibrate

        path, fitted = calibrate(arguments.calibrate, arguments.model or newest_model())
        said = f"calibrated on {fitted['pairs']} pairs of {fitted['votes']} votes: {path}"
        print(json.dumps(fitted) if arguments.json else said)
    else:
        judge(arguments)
    return 0


def judge(arguments: argparse.Namespace) -> None:
    """--pair, --rank, --pairs and --bench. What goes in is read before the model, which takes its time."""
    kind = next(name for name in VOTES if getattr(arguments, name) is not None)
    if (kind in ("pairs", "bench")) != (arguments.out is not None):
        raise InputError("--out OUT.jsonl goes with --pairs and with --bench, which both need it")
    votes = VOTES[kind] if arguments.votes is None else arguments.votes
    if votes < 1 or (votes > 1 and votes % 2 and kind != "bench"):
        raise InputError(f"--votes {votes}: expected 1, or an even number (half in each order)")
    if kind == "pair":
        pair = read_one(arguments.pair, Pair.from_json)
        (row,) = Judge(arguments, votes).rows([pair])
        if "error" in row:
            raise InputError(row["error"])
        del row["pair"]
        print(json.dumps(row, ensure_ascii=False, indent=2) if arguments.json else readable(pair, row))
    elif kind == "rank":
        asked = read_one(arguments.rank, as_list)
        judge = Judge(arguments, votes)
        ranking = judge.model.rank(*asked, arguments.method, **judge.sampling, progress=False)
        tell_ranking(ranking, asked[1], arguments.json)
    elif kind == "pairs":
        from gramr2.data import Store

        counts = bulk(arguments, votes, Store(arguments.pairs, Pair.from_json))
        said = "{judged} judged, {before} were there before, {failed} failed: {out}"
        print(json.dumps(counts) if arguments.json else said.format(**counts, out=arguments.out))
    else:
        from gramr2.extras.evaluate import read_benchmark

        name, path = arguments.bench
        bulk(arguments, 2 * votes, list(read_benchmark(name, Path(path))))
        tell_score(name, [arguments.out], arguments.json)


class Judge:
    """The model that the command line names, with the settings that go into every row."""

    def __init__(self, arguments: argparse.Namespace, votes: int):
        directory = arguments.model or newest_model()
        import torch

        from gramr2.judge import RewardModel

        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: there is no CUDA device here")
        cuda = arguments.device != "cpu" and torch.cuda.is_available()
        dtype = arguments.dtype if arguments.dtype != "auto" else "bfloat16" if cuda else "float32"
        device, prompt = "cuda" if cuda else "cpu", arguments.prompt
        self.model = RewardModel.load(directory, device, dtype, prompt, arguments.format)
        self.sampling = {"votes": votes, "seed": arguments.seed, "max_new_tokens": arguments.max_new_tokens}
        self.sampling["temperature"] = float(votes > 1 and not (arguments.bench and votes == 2))
        self.settings = {"model": str(directory), "format": self.model.format, **self.sampling}
        calibrated = self.model.calibrates(votes, self.sampling["temperature"])
        self.settings |= {"prompt": prompt and str(prompt), "calibrated": calibrated}
        if self.model.calibration and not calibrated:
            fitted = "{votes} votes, greedy: {greedy}".format_map(self.model.calibration)
            print(f"warning: not calibrated: the calibration is for {fitted}", file=sys.stderr)

    def rows(self, items: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """The row of each pair, or of each of a benchmark's lists: a failure is a row with the reason."""
        if isinstance(items[0], Pair):
            found = (each for _, each in self.model.judge_many(items, **self.sampling, progress=False))
            about = ({"id": item.id, "pair": item.to_json()} for item in items)
        else:
            lists = [(item["question"], item["responses"]) for item in items]
            found = self.model.contests(lists, "linear", False, **self.sampling, progress=False)
            about = ({"id": item["id"], "scores": item["scores"]} for item in items)
        for row, each in zip(about, found, strict=True):
            failed = isinstance(each, InputError)
            yield row | ({"error": str(each)} if failed else each.to_json() | {"judge": self.settings})


def bulk(arguments: argparse.Namespace, votes: int, source: Sequence[Any]) -> dict[str, int]:
    """Appends rows shard by shard. What succeeded before stays, what failed is tried again."""
    from tqdm import tqdm

    from gramr2.data import RowLog
    from gramr2.judge import PAIRS_PER_CALL

    judge = Judge(arguments, votes)
    done = keep_finished(arguments.out, judge.settings)
    bad: list[dict[str, Any]] = []
    waiting, counts = pending(source, done, bad), {"judged": 0, "before": done.total(), "failed": 0}
    with RowLog(arguments.out) as out, tqdm(total=len(source), unit="pair", disable=None) as bar:
        bar.update(done.total())
        while shard := list(islice(waiting, PAIRS_PER_CALL)):
            rows = list(judge.rows(shard))
            for row in rows:
                out.write(row)
                counts["failed" if "error" in row else "judged"] += 1
            out.sync()
            bar.update(len(rows))
        for row in bad:
            out.write(row)
    return counts | {"failed": counts["failed"] + len(bad)}


def key_of(item: Pair | dict) -> bytes:
    """What makes an item the same in another call: a pair's whole row; a list's id."""
    content = item.to_json() if isinstance(item, Pair) else item["id"]
    try:
        text = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("text that is not Unicode (half of a surrogate pair)") from None
    return hashlib.blake2b(text, digest_size=16).digest()


def keep_finished(path: Path, settings: dict[str, Any]) -> Counter[bytes]:
    """How often an earlier call has judged each key; its failures are taken out, to be tried again."""
    if not path.exists():
        return Counter()
    from gramr2.data import Store

    done, failed, rows = Counter(), False, Store(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("judge", {}), dict):
            raise InputError(f"{path}: row {number} is not a judged row; give another --out")
        if "error" in row:
            failed = True
            continue
        was = row.get("judge", {})
        other = [f"{k} {was.get(k)}, now {settings[k]}" for k in settings if was.get(k) != settings[k]]
        if other:
            raise InputError(f"{path}: row {number} was judged with {'; '.join(other)}; give another --out")
        done[key_of(Pair.from_json(row["pair"]) if "pair" in row else row)] += 1
    if failed:
        write_rows(path, (row for row in rows if "error" not in row))
    return done


def pending(source: Sequence[Any], done: Counter[bytes], bad: list[dict[str, Any]]) -> Iterator[Any]:
    """What is still to be judged, as often as it stands there; what is no pair goes to `bad`, with why."""
    met: Counter[bytes] = Counter()
    for place in range(len(source)):
        try:
            item = source[place]
            key = key_of(item)
        except InputError as error:
            bad.append({"id": f"row {place + 1}", "error": str(error)})
            continue
        met[key] += 1
        if met[key] > done[key]:
            yield item


def read_one(path: Path, make) -> Any:
    row = read_json(path)
    try:
        item = make(row)
        key_of(item if isinstance(item, Pair) else {"id": item})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return item


def as_list(row: Any) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """A list file's conversation and responses: a pair file's fields, with "responses"."""
    responses = row.get("responses") if isinstance(row, dict) else None
    if not isinstance(responses, list) or len(responses) < 2 or {*map(type, responses)} != {str}:
        raise InputError('field "responses" should be a list of two texts or more')
    return messages_of(row), responses


def newest_model() -> Path:
    """The model of the run that finished last, under runs/ here."""
    for run in finished_runs():
        model = run / read_json(run / "results.json")["model"]
        print(f"model: {model}", file=sys.stderr)
        return model
    raise InputError("no finished run under runs/; give --model DIR, or make one: python selftrain.py")


def tell_score(name: str, paths: list[Path], as_json: bool) -> None:
    from gramr2.extras import evaluate

    if not paths:
        raise InputError(f"--score {name}: give a judged file as well")
    result = evaluate.score(name, paths)
    print(json.dumps(result, indent=2) if as_json else evaluate.readable(result))


def tell_ranking(ranking, responses: list[str], as_json: bool) -> None:
    if as_json:
        names = ("best", "order", "comparisons", "rounds", "undecided", "overruled")
        print(json.dumps({name: getattr(ranking, name) for name in names}))
        return
    print(f"The best is response {ranking.best + 1}.")
    for place, index in enumerate(ranking.order, 1):
        print(f"{place:4}. response {index + 1}: {' '.join(responses[index].split())[:80]}")
    said = f"{ranking.comparisons} comparisons in {ranking.rounds} batches, {ranking.undecided}"
    print(f"{said} without a preference")
    for i, j, p in ranking.overruled:
        print(f"intransitive: {i + 1} was preferred to {j + 1} (p {p:.2f}), which surer answers overrule")


def readable(pair: Pair, judgment: dict[str, Any]) -> str:
    label, votes, sure = judgment["label"], judgment["votes"], max(judgment["p_a"], 1 - judgment["p_a"])
    if pair.response_a == pair.response_b:
        lines = ["No preference: the two responses are identical."]
    elif label is None:
        why = "the votes are tied" if votes["A"] + votes["B"] else "none of the answers could be read"
        lines = [f"No verdict: {why if sum(votes.values()) else 'the two scores are equal'}."]
    elif judgment["orders_agree"] is False:
        lines = [f"Leaning to {label}, but the verdict changes with the order: no clear preference."]
    else:
        lines = [f"Response {label} is better (probability {sure:.2f})"]
    if sum(votes.values()):
        lines.append(f"votes: {votes['A']} for A, {votes['B']} for B, {votes['none']} unreadable")
    if judgment["rationale"]:
        lines += ["", show(judgment["rationale"])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
