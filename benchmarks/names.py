"""How people name two arguments, and what `records.mark` and `records.unmarked` make of it.

    python benchmarks/names.py --reasons UKPConvArg1.tar.gz [--texts judgebench.jsonl rm-bench.json]
        counts, and writes benchmarks/results/names.json
    python benchmarks/names.py --reasons UKPConvArg1.tar.gz --read 200
        prints so many reasons, drawn by a fixed seed, to be read by hand; writes nothing

A reason is one worker's, in free words, on why one argument is more convincing; its writer was shown "A1" and
"A2". Counted is how many it names for certain (slots), whether it has a mention that is not certain, and, of
those that say "X is better than Y", for how many X is what the worker voted for: names that were mistaken
would show there. `--texts` are responses of published benchmarks. They speak of no two responses, so that
what is found in them is a false alarm.

Left out: mentions that nothing finds; for those a person reads.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import common

from gramr2.extras.convincing_arguments import read_corpus
from gramr2.extras.evaluate import read_benchmark
from gramr2.records import Pair, mark, named, unmarked

BETTER = re.compile(
    r"⟦([AB])⟧(?:'s \w+)? (?:is|was|has|gives|provides|makes|goes|seems)[^⟦.]*"
    r"\b(?:better|more|stronger|clearer)\b[^⟦.]*\bthan (?:Response )?⟦([AB])⟧"
)
GROUPS = {"named": 0.45, "with no name": 0.25, "with a mention that is not certain": 0.3}  # of those to read


def reasons(archive: Path) -> Iterator[tuple[str, str | None]]:
    """Every reason of the corpus' own pairs as stored, with the letter that its writer chose."""
    for one in read_corpus(archive)[0]:
        if one.in_corpus:
            yield from ((mark(reason, "argument"), letter) for letter, reason in one.votes)


def group(stored: str) -> str:
    told, _, unsure = GROUPS
    return unsure if unmarked(stored) else told if named(stored) else "with no name"


def count_reasons(archive: Path) -> dict:
    counts, better, chosen = Counter[str](), 0, 0
    for stored, letter in reasons(archive):
        name = ("none", "one", "both")[len(named(stored))]
        counts[f"{name}, {'not certain' if unmarked(stored) else 'certain'}"] += 1
        said = BETTER.search(stored)
        if said and said[1] != said[2] and letter:
            better, chosen = better + 1, chosen + (said[1] == letter)
    return {"reasons": counts.total(), "named": dict(counts), "better_than": better, "as_voted": chosen}


def count_texts(path: Path) -> dict:
    name = "judgebench" if path.suffix == ".jsonl" else "rm-bench"
    pairs = [pair for pair in read_benchmark(name, path) if isinstance(pair, Pair)]
    texts = sorted({text for pair in pairs for text in (pair.response_a, pair.response_b)})
    stored = [mark(text) for text in texts]
    marked, unsure = sum(bool(named(one)) for one in stored), sum(bool(unmarked(one)) for one in stored)
    return {"format": name, "texts": len(texts), "named": marked, "not_certain": unsure}


def show(archive: Path, count: int) -> None:
    found: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for stored, letter in reasons(archive):
        found[group(stored)].append((stored, letter))
    rng = random.Random(0)
    for name, share in GROUPS.items():
        print(f"\n{name}: {round(share * count)} of {len(found[name]):,}")
        for stored, letter in rng.sample(found[name], round(share * count)):
            print(f"  {letter or '='} {stored}", *unmarked(stored) and [f"  <- {unmarked(stored)}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reasons", type=Path, required=True, metavar="ARCHIVE")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--read", type=int, metavar="N")
    given = parser.parse_args()
    if given.read:
        show(given.reasons, given.read)
        return
    result = count_reasons(given.reasons) | {"texts": [count_texts(path) for path in given.texts]}
    common.write_result("names", result)


if __name__ == "__main__":
    main()
