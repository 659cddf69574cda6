"""How often the longer response is the better one: the rule that a trained judge has to beat.

    python -m gramr2.extras.datasets convincing-arguments UKPConvArg1.tar.gz OUT --strict
    python benchmarks/length.py "UKPConvArg1, strict pairs" OUT/human.jsonl OUT/labelled.jsonl \\
        OUT/unlabelled.jsonl OUT/test.jsonl

Length is in characters; pairs of one length, and without a label, are left out. The label of an unlabelled
pair is taken from the truth.jsonl beside its file. The result is benchmarks/results/length.json; what it has
under other names stays there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import common

from gramr2.extras.evaluate import average
from gramr2.extras.results import by_length
from gramr2.files import read_rows


def hits(files: list[Path]) -> list[bool]:
    found = []
    for file in files:
        beside = file.with_name("truth.jsonl")
        truth = {row["id"]: row["label"] for row in read_rows(beside)} if beside.is_file() else {}
        for row in read_rows(file):
            label, longer = row.get("label") or truth.get(row["id"]), by_length(row)
            if label and longer:
                found.append(label == longer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the data set, for the table")
    parser.add_argument("files", nargs="+", type=Path, help="pair files")
    arguments = parser.parse_args()
    path = common.RESULTS / "length.json"
    known = json.loads(path.read_text(encoding="utf-8"))["data"] if path.exists() else {}
    known[arguments.name] = average(arguments.name, [hits(arguments.files)])
    print(known[arguments.name])
    common.write_result("length", {"data": known})


if __name__ == "__main__":
    main()
