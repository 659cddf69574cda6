"""How often the longer response is the better one: the rule that a trained judge has to beat.

    python benchmarks/length.py "UKPConvArg1, strict pairs" UKPConvArg1.tar.gz
    python -m gramr2.extras.datasets rm-bench total_dataset.json rm-bench.jsonl
    python benchmarks/length.py "RM-Bench" rm-bench.jsonl

Length is in characters; a pair of one length counts as wrong, and one without a label not at all. The label
of an unlabelled pair is taken from the truth.jsonl beside its file; of the archive itself, all strict pairs
are taken. The result is benchmarks/results/length.json; what it has under other names stays there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common

from gramr2.extras.convincing_arguments import read_corpus
from gramr2.extras.evaluate import average
from gramr2.extras.inputs import truth_beside
from gramr2.extras.results import by_length
from gramr2.files import read_rows


def hits(files: list[Path]) -> list[bool]:
    found = []
    for file in files:
        if file.name.endswith(".tar.gz"):
            compared, strict = read_corpus(file)
            both = ((one.arguments, strict[one.id]) for one in compared if strict.get(one.id))
            found += [by_length({"response_a": a, "response_b": b}) == label for (a, b), label in both]
            continue
        truth = truth_beside(file)
        for row in read_rows(file):
            label, longer = row.get("label") or truth.get(row["id"]), by_length(row)
            if label:
                found.append(label == longer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the data set, for the table")
    parser.add_argument("files", nargs="+", type=Path, help="pair files, or the archive")
    arguments = parser.parse_args()
    known = common.kept_results("length", "data")
    known[arguments.name] = average(arguments.name, [hits(arguments.files)])
    print(known[arguments.name])
    common.write_result("length", {"data": known})


if __name__ == "__main__":
    main()
