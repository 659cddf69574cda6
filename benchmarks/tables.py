"""Rewrites the tables of the READMEs from benchmarks/results/*.json, so that no figure is typed by hand.

    python benchmarks/tables.py            rewrites what stands between <!-- table:NAME --> and <!-- end -->
    python benchmarks/tables.py --check    changes nothing; exit status 1 if a table is stale

A table is a function below, registered under its NAME. It takes `read`, which gives the content of
results/NAME.json, or None where that was never measured: then the table says "unmeasured".
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READMES = ROOT / "README.md", ROOT / "benchmarks/README.md"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {}


def table(name):
    """Registers the function that renders the table `name`: (read) -> Markdown."""

    def register(function):
        TABLES[name] = function
        return function

    return register


def read(name):
    path = ROOT / f"benchmarks/results/{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def grid(header, rows):
    """A Markdown table; the first column reads from the left, the others are figures."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def where(environment):
    """One line on the machine, the versions and the date of a result."""
    device = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} thread(s)"
    versions = [f"{name} {version}" for name, version in environment["versions"].items() if version]
    return f"{device}; {environment['system']}; {', '.join(versions)}; {environment['date']}."


# ---------------------------------------------------------------------------------- the tables


def sequence_logprob(result, command):
    if result is None:
        return f"Unmeasured: `{command}` has not been run on such a device."
    sections = []
    for mode, work in (("score", "2TdV"), ("train", "6TdV")):
        lines, absent = [], {}
        for row in (row for row in result["rows"] if row["mode"] == mode):
            if "not_run" in row:
                absent[row["way"]] = row["not_run"]
                continue
            shape = f"{row['shape']} (T {row['T']:,}, d {row['D']:,}, V {row['V']:,})"
            lines.append(
                (
                    f"{shape}: {row['way']}",
                    f"{1000 * row['seconds']:.1f}",
                    f"{row['ratio']:.2f}",
                    f"{row['tflops']:.3g}",
                    f"{row['of_matmul']:.0%}",
                    f"{row['peak_mib']:,.0f}",
                )
            )
        figures = "ms", "time / ours", f"TFLOP/s ({work})", "of matmul rate", "peak MiB"
        sections.append(grid((mode, *figures), lines))
        if absent:
            sections.append("Not run: " + "; ".join(f"{way} ({why})" for way, why in absent.items()) + ".")
    about = f"{result['dtype']}, {result['backend']} path, medians of {result['repeats']} turns."
    return "\n\n".join([f"{about} {where(result['environment'])}", *sections])


@table("sequence-logprob-cuda")
def sequence_logprob_cuda(read):
    return sequence_logprob(read("sequence_logprob_cuda"), "python benchmarks/sequence_logprob.py")


@table("sequence-logprob-cpu")
def sequence_logprob_cpu(read):
    command = "python benchmarks/sequence_logprob.py --device cpu"
    return sequence_logprob(read("sequence_logprob_cpu"), command)


@table("forward")
def forward(read):
    result = read("forward")
    if result is None:
        return "Unmeasured: `python benchmarks/forward.py` has not been run."
    lines = []
    for row in result["rows"]:
        speeds = (f"{row['tokens_per_second'][name]:,.0f}" for name in ("ours", "transformers"))
        peaks = (f"{row['peak_mib'][name]:,.0f}" for name in ("ours", "transformers"))
        ratio = f"{row['ratio']:.2f}"
        lines.append(
            (f"{row['dtype']}, {row['case']}", *speeds, ratio, *peaks, f"{row['largest_difference']:.1e}")
        )
    header = "lengths", "tokens/s", "transformers", "ratio", "peak MiB", "transformers", "largest difference"
    return f"{result['parameters']:,} parameters. {where(result['environment'])}\n\n{grid(header, lines)}"


@table("training-cpu")
def training_cpu(read):
    result = read("training_cpu")
    if result is None:
        return "Unmeasured: `python benchmarks/training.py` has not been run."
    lines = []
    for row in result["rows"]:
        speed = f"{row['tokens_per_second']:,.0f}", f"{row['speedup']:.2f}"
        lines.append((f"{row['case']}: {row['way']}", *speed, f"{row['peak_mib']:,.0f}"))
    header = "lengths", "useful tokens/s", "speed / ours", "peak RSS, MiB"
    about = f"{result['parameters']:,} parameters, {result['dtype']}, medians of {result['repeats']} turns."
    return f"{about} {where(result['environment'])}\n\n{grid(header, lines)}"


@table("training-cuda")
def training_cuda(read):
    result = read("training_cuda")
    if result is None:
        return "Unmeasured: `python benchmarks/training.py --device cuda` has not been run on such a device."
    lines = []
    for row in result["rows"]:
        name = f"{row['shape']} at {row['length']:,}"
        if "not_run" in row:
            lines.append((name, row["not_run"], "", ""))
            continue
        figures = f"{row['tokens_per_second']:,.0f}", f"{row['of_matmul']:.0%}", f"{row['peak_gib']:.1f}"
        lines.append((name, *figures))
    header = "shape and length", "tokens/s", "of matmul rate", "peak GiB"
    about = f"{result['dtype']} compute, float32 weights; matmul rate {result['matmul_tflops']:.0f} TFLOP/s."
    return f"{about} {where(result['environment'])}\n\n{grid(header, lines)}"


@table("kills")
def kills(read):
    lines = []
    for part in ("training", "selftrain", "judging"):
        result = read(f"kills_{part}")
        if result is None:
            lines.append((part, "unmeasured", "", ""))
        else:
            equal = f"{result['runs_equal']} of {result['runs']}"
            lines.append((part, result["kills"], equal, result["level"]))
    return grid(("what was killed", "kills", "runs that ended equal", "level"), lines)


@table("sampling-cpu")
def sampling_cpu(read):
    result = read("sampling_cpu")
    if result is None:
        return "Unmeasured: `python benchmarks/sampling.py --device cpu` has not been run."
    lines, absent = [], {}
    for row in result["rows"]:
        absent |= row["absent"]
        for way, figure in row["ways"].items():
            lines.append(
                (f"{row['workload']}: {way}", f"{figure['tokens_per_s']:,.0f}", f"{figure['ratio']:.2f}")
            )
    parts = [where(result["environment"]), grid(("workload: way", "tokens/s", "time / ours"), lines)]
    if absent:
        parts.append("Not run: " + "; ".join(f"{way} ({why})" for way, why in absent.items()) + ".")
    return "\n\n".join(parts)


@table("sampling-cuda")
def sampling_cuda(read):
    result = read("sampling_cuda")
    if result is None:
        return "Unmeasured: `python benchmarks/sampling.py` has not been run on such a device."
    lines = []
    for row in result["rows"]:
        name = f"{row['prompts']} x {row['k']}" + (f", {row['shared']:,} shared" if row["shared"] else "")
        gain = f"{row['ungrouped_over_grouped']:.2f}" if "ungrouped_over_grouped" in row else ""
        figures = f"{row['step_ms']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['of_floor']:.0%}", gain
        lines.append((name, *figures))
    header = "prompts x samples", "ms a step", "tokens/s", "of the floor", "time ungrouped / grouped"
    beside = result["continuous"]
    ways = ", ".join(f"{way} {f['tokens_per_s']:,.0f} tokens/s" for way, f in beside["ways"].items())
    ways += "".join(f"; {way} not run ({why})" for way, why in beside["absent"].items())
    about = f"{where(result['environment'])} {result['bandwidth'] / 1e12:.2f} TB/s measured."
    return "\n\n".join([about, grid(header, lines), f"End to end, {beside['workload']}: {ways}."])


def judging(result, command):
    if result is None:
        return f"Unmeasured: `{command}` has not been run on such a device."
    lines = []
    for row in result["rows"]:
        gain = f"{row['ours'] / row['loop']:.1f}"
        lines.append(
            (row["votes"], f"{row['ours']:.2f}", f"{row['loop']:.3f}", gain, f"{row['singles']:.2f}")
        )
    header = "votes", "pairs/s", "the loop's", "ratio", "cost in single votes"
    about = f"{result['dtype']}, {result['prompt']} tokens of prompt, {result['answer']} of answer, "
    about += f"{result['pairs']} pairs, medians of {result['repeats']} turns."
    return f"{about} {where(result['environment'])}\n\n{grid(header, lines)}"


@table("judging-cpu")
def judging_cpu(read):
    return judging(read("judging_cpu"), "python benchmarks/judging.py --device cpu")


@table("judging-cuda")
def judging_cuda(read):
    return judging(read("judging_cuda"), "python benchmarks/judging.py")


# ---------------------------------------------------------------------------------- rewriting


def rewritten(text, path):
    """The text with every marked table made anew."""

    def render(match):
        opening, name, end = match.groups()
        if name not in TABLES:
            raise SystemExit(f"error: {path}: no table is called {name}; known: {', '.join(sorted(TABLES))}")
        return f"{opening}{TABLES[name](read)}\n{end}"

    if len(MARKED.findall(text)) != text.count("<!-- table:"):
        raise SystemExit(f"error: {path}: a <!-- table:NAME --> without its <!-- end -->")
    return MARKED.sub(render, text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a table is stale")
    check = parser.parse_args().check
    stale = []
    for path in (path for path in READMES if path.exists()):
        before = path.read_text(encoding="utf-8")
        after = rewritten(before, path.relative_to(ROOT))
        if before != after:
            stale.append(path)
            if not check:
                path.write_text(after, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'stale' if check else 'rewritten'}", file=sys.stderr)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
