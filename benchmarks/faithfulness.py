"""Do proofs name the reasons that people gave, and does equation (5) pick those that do? On real arguments.

    python benchmarks/faithfulness.py runs/convincing-cpu data/convincing-arguments/labelled.jsonl \\
        --reasons UKPConvArg1.tar.gz --proofs proofs.jsonl

The run's prover writes k proofs of each of some labelled pairs, drawn by the seed; all are written down. What
the workers wrote of these pairs no model has seen, and gramr2/extras/faithfulness.py holds it against them. A
file of proofs that is there is measured as it is. The result is benchmarks/results/faithfulness.json. Left
out: training the prover (`selftrain.py --recipe recipes/convincing-cpu.toml`).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import common

from gramr2 import prompts
from gramr2.data import Store
from gramr2.extras.faithfulness import readable, score
from gramr2.extras.results import RunReader
from gramr2.files import publish_rows, read_rows
from gramr2.prover import Prover, as_rationale
from gramr2.records import Pair
from gramr2.selection import select


def write_proofs(run: RunReader, pairs: list[Pair], k: int, longest: int, path: Path) -> None:
    """Rows as a proving step with --keep-candidates has them."""
    training = run.settings["train prover"]
    ours = prompts.own_template("prover", training["prompt"])
    prover = Prover.load(run.steps["prover"] / "model", date=training["date"], ours=ours)
    with publish_rows(path) as write:
        for pair, proofs in prover.prove_many(pairs, k, max_new_tokens=longest):
            chosen = select(proofs)
            write({
                "pair": pair.to_json(),
                "chosen": chosen and chosen.to_json(),
                "rationale": chosen and as_rationale(chosen),
                "candidates": [proof.to_json() for proof in proofs],
            })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a self-training run with a prover")
    parser.add_argument("pairs", type=Path, help="labelled pairs that the prover was not trained on")
    parser.add_argument("--reasons", type=Path, required=True, help="UKPConvArg1.tar.gz")
    parser.add_argument("--proofs", type=Path, required=True, help="where the proofs are, or will be")
    parser.add_argument("--count", type=int, default=320, help="pairs to be proved")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--longest", type=int, default=128, help="tokens of a proof")
    arguments = parser.parse_args()
    run = RunReader(arguments.run)
    if not arguments.proofs.exists():
        known = list(Store(arguments.pairs, Pair.from_json))
        pairs = random.Random(0).sample(known, arguments.count)
        write_proofs(run, pairs, arguments.k, arguments.longest, arguments.proofs)
    found = score([arguments.proofs], arguments.reasons)
    proofs = [len(row["candidates"]) for row in read_rows(arguments.proofs)]
    training = {name: run.settings["train prover"][name] for name in ("steps", "batch_size")}
    about = {"backbone": Path(run.settings["from"]["backbone"]).name, "training": training}
    common.write_result("faithfulness", {**about, "pairs": len(proofs), "k": max(proofs), **found})
    print(readable(found))


if __name__ == "__main__":
    main()
