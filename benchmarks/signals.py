"""What knew which pseudo-labels were wrong, in runs that weighed it (`--signals N`): means over seeds.

    for s in 0 1 2; do python selftrain.py --seed $s --name toy-$s --iters 1 --pool 300 --signals 300 \\
        --test-limit 50 --until round-1-labels; done
    python benchmarks/signals.py toy runs/toy-0 runs/toy-1 runs/toy-2

The first round is taken, since later judges have learnt from what the first one's filters kept. The result is
benchmarks/results/signals.json; what it has under other names stays there. Left out: the runs themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import common

from gramr2.extras.results import RunReader
from gramr2.files import InputError

STEP = "round-1-signals"


def collect(runs: list[RunReader]) -> dict:
    """Each signal's figures, run by run, and how many labels were weighed, and wrong."""
    found = {run.settings["seed"]: run.done(STEP)["counts"] for run in runs}
    for seed, counts in found.items():
        if not counts.get("signals"):
            raise InputError(f"the run of seed {seed} has weighed no signals; run it with --signals")
    names = next(iter(found.values()))["signals"]
    figures = {name: {str(s): counts["signals"][name] for s, counts in found.items()} for name in names}
    return {
        "pairs": {str(seed): [counts["pairs"], counts["wrong"]] for seed, counts in found.items()},
        "signals": {
            name: {"area": round(fmean(each["area"] for each in seeds.values()), 4), "by seed": seeds}
            for name, seeds in figures.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the data, for the table")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs, a seed each")
    arguments = parser.parse_args()
    found = collect([RunReader(run) for run in arguments.runs])
    known = common.kept_results("signals", "data")
    known[arguments.name] = {"environment": common.environment(), **found}
    common.write_result("signals", {"data": known})
    for name, each in sorted(found["signals"].items(), key=lambda item: -item[1]["area"]):
        print(f"{name:28} {each['area']:.3f}", [round(seed["area"], 3) for seed in each["by seed"].values()])


if __name__ == "__main__":
    main()
