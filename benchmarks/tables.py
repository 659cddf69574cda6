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
sys.path.insert(0, str(ROOT))

from gramr2.stages import STAGES  # noqa: E402

READMES = ROOT / "README.md", ROOT / "benchmarks/README.md"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {}
THERE = " on such a device"


def table(name, result=None, command="", where=""):
    """Registers the function that renders the table `name`: (read) -> Markdown.

    With `result` the function takes what results/RESULT.json holds, and where there is nothing the table says
    that `command` has not been run, and `where` it has not.
    """

    def register(function):
        def render(read):
            found = read(result)
            return f"Unmeasured: `{command}` has not been run{where}." if found is None else function(found)

        TABLES[name] = render if result else function
        return function

    return register


def read(name):
    """results/NAME.json, or what acceptance.json (made where there is a GPU) holds under that name."""
    path, whole = (ROOT / f"benchmarks/results/{each}.json" for each in (name, "acceptance"))
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return json.loads(whole.read_text(encoding="utf-8"))["results"].get(name) if whole.exists() else None


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


@table("sequence-logprob-cuda", "sequence_logprob_cuda", "python benchmarks/sequence_logprob.py", THERE)
@table(
    "sequence-logprob-cpu",
    "sequence_logprob_cpu",
    "python benchmarks/sequence_logprob.py --device cpu",
    THERE,
)
def sequence_logprob(result):
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
                    "unknown" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
                )
            )
        figures = "ms", "time / ours", f"TFLOP/s ({work})", "of matmul rate", "peak MiB"
        sections.append(grid((mode, *figures), lines))
        if absent:
            sections.append("Not run: " + "; ".join(f"{way} ({why})" for way, why in absent.items()) + ".")
    about = f"{result['dtype']}, {result['backend']} path, medians of {result['repeats']} turns."
    return "\n\n".join([f"{about} {where(result['environment'])}", *sections])


@table("forward", "forward", "python benchmarks/forward.py", THERE)
@table("forward-cuda", "forward_cuda", "python benchmarks/forward.py --device cuda", THERE)
def forward(result):
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


@table("training-cpu", "training_cpu", "python benchmarks/training.py")
def training_cpu(result):
    lines = []
    for row in result["rows"]:
        speed = f"{row['tokens_per_second']:,.0f}", f"{row['speedup']:.2f}"
        lines.append((f"{row['case']}: {row['way']}", *speed, f"{row['peak_mib']:,.0f}"))
    header = "lengths", "useful tokens/s", "speed / ours", "peak RSS, MiB"
    about = f"{result['parameters']:,} parameters, {result['dtype']}, medians of {result['repeats']} turns."
    return f"{about} {where(result['environment'])}\n\n{grid(header, lines)}"


@table("training-cuda", "training_cuda", "python benchmarks/training.py --device cuda", THERE)
def training_cuda(result):
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
    for part in ("training", "selftrain", "judging", "damage"):
        result = read(f"kills_{part}")
        if result is None:
            lines.append((part, "unmeasured", "", ""))
        else:
            equal = f"{result['runs_equal']} of {result['runs']}"
            named = f"{part}, recipe {result['recipe']}" if "recipe" in result else part
            lines.append((named, result["kills"], equal, result["level"]))
    return grid(("what was killed", "kills", "runs that ended equal", "level"), lines)


@table("hostile", "hostile", "python benchmarks/hostile.py")
def hostile(result):
    names = {"TRACEBACK": "tracebacks", "HANG": "hangs", "WRONG": "wrong"}
    rows = [
        (border, figures["cases"], figures["ok"], *(figures.get(kind, 0) for kind in names))
        for border, figures in result["borders"].items()
    ]
    return grid(("border", "cases", "as promised", *names.values()), rows)


@table("sampling-cpu", "sampling_cpu", "python benchmarks/sampling.py --device cpu")
def sampling_cpu(result):
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


MODELS = "python benchmarks/sampling.py --device cpu --model DIR"


@table("sampling-models-cpu", "sampling_models_cpu", MODELS, THERE)
def sampling_models_cpu(result):
    lines = []
    for model in result["models"].values():
        for row in model["rows"]:
            speeds = (f"{row['ways'][way]['tokens_per_s']:,.1f}" for way in ("ours", "static"))
            lines.append((row["workload"], *speeds, f"{row['ways']['static']['ratio']:.2f}"))
    about = (
        f"{result['prompt']} tokens of prompt, {result['new']} new, medians of {result['repeats']} turns. "
    )
    header = "checkpoint: workload", "ours, tokens/s", "static generate", "ours is faster, times"
    return f"{about}{where(result['environment'])}\n\n{grid(header, lines)}"


@table("sampling-cuda", "sampling_cuda", "python benchmarks/sampling.py", THERE)
def sampling_cuda(result):
    lines = []
    for row in result["rows"]:
        name = f"{row['prompts']} x {row['k']}" + (f", {row['shared']:,} shared" if row["shared"] else "")
        if "not_run" in row:
            lines.append((name, row["not_run"], "", "", ""))
            continue
        gain = f"{row['ungrouped_over_grouped']:.2f}" if "ungrouped_over_grouped" in row else ""
        figures = f"{row['step_ms']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['of_floor']:.0%}", gain
        lines.append((name, *figures))
    header = "prompts x samples", "ms a step", "tokens/s", "of the floor", "time ungrouped / grouped"
    beside = result.get("continuous") or {"workload": "not measured", "ways": {}, "absent": {}}
    ways = ", ".join(f"{way} {f['tokens_per_s']:,.0f} tokens/s" for way, f in beside["ways"].items())
    ways += "".join(f"; {way} not run ({why})" for way, why in beside["absent"].items())
    about = f"{where(result['environment'])} {result['bandwidth'] / 1e12:.2f} TB/s measured."
    return "\n\n".join([about, grid(header, lines), f"End to end, {beside['workload']}: {ways}."])


@table("judging-cpu", "judging_cpu", "python benchmarks/judging.py --device cpu", THERE)
@table("judging-cuda", "judging_cuda", "python benchmarks/judging.py", THERE)
def judging(result):
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


@table("speed-cpu")
def speed_cpu(read):
    """The main README's comparison with transformers: units a second of both, from four benchmarks."""
    named = "forward", "training_cpu", "sampling_cpu", "judging_cpu"
    scoring, training, sampling, judged = found = [read(name) for name in named]
    if None in found:
        return "Unmeasured: a script of benchmarks/ has not been run."
    lines = []

    def add(what, unit, ours, theirs, ratio):
        digits = 2 if unit == "pairs" else 0
        lines.append((f"{what}: {unit}/s", f"{ours:,.{digits}f}", f"{theirs:,.{digits}f}", f"{ratio:.1f}"))

    for row in (row for row in scoring["rows"] if row["dtype"] == "float32"):
        speeds = row["tokens_per_second"]
        add(f"scoring, {row['case']} lengths", "tokens", speeds["ours"], speeds["transformers"], row["ratio"])
    for ours, theirs in zip(training["rows"][::2], training["rows"][1::2], strict=True):
        speeds = ours["tokens_per_second"], theirs["tokens_per_second"]
        add(f"training, {ours['case']} lengths", "tokens", *speeds, theirs["ratio"])
    for row in (row for row in sampling["rows"] if "static" in row["ways"]):
        speeds = (row["ways"][way]["tokens_per_s"] for way in ("ours", "static"))
        add(f"sampling, {row['workload']}", "tokens", *speeds, row["ways"]["static"]["ratio"])
    for row in judged["rows"]:
        votes = f"judging, {row['votes']} vote" + "s" * (row["votes"] > 1)
        add(votes, "pairs", row["ours"], row["loop"], row["ours"] / row["loop"])
    header = "", "ours", "transformers", "ours is faster, times"
    return f"{where(scoring['environment'])}\n\n{grid(header, lines)}"


@table("speed-gpu")
def speed_gpu(read):
    """The main README's GPU cells, each unmeasured until benchmarks/acceptance.py has run on one."""
    kernels, sampling, training, judged = (
        (read(f"{name}_cuda") or {"rows": []})["rows"]
        for name in ("sequence_logprob", "sampling", "training", "judging")
    )

    def cell(rows, name, **wanted):
        values = (r[name] for r in rows if name in r and all(r[key] == each for key, each in wanted.items()))
        return next(values, None)

    head = {"shape": "LLaMA-3.1-8B", "way": "ours"}
    rows = [
        (f"log-probs of 8,192 tokens at LLaMA-3.1-8B's head, {mode}: share of the matmul rate",
         cell(kernels, "of_matmul", mode=mode, **head), "{:.0%}")
        for mode in ("score", "train")
    ]  # fmt: skip
    rows += [
        (f"decode step, 8B, {count} prompts at 2,048 tokens: share of the memory floor",
         cell(sampling, "of_floor", prompts=count, k=1), "{:.0%}")
        for count in (32, 256)
    ]  # fmt: skip
    rows += [
        (f"training, {shape} at 2,048 tokens: share of the matmul rate",
         cell(training, "of_matmul", shape=shape, length=2048), "{:.0%}")
        for shape in ("LLaMA-3.2-3B", "LLaMA-3.1-8B")
    ]  # fmt: skip
    rows.append(("judging by 16 votes, 1B: pairs/s", cell(judged, "ours", votes=16), "{:.1f}"))
    lines = [(what, "unmeasured" if value is None else form.format(value)) for what, value, form in rows]
    measured = next(
        filter(None, map(read, ("sequence_logprob_cuda", "sampling_cuda", "training_cuda"))), None
    )
    about = f"{where(measured['environment'])}\n\n" if measured else ""
    return about + grid(("one GPU, bf16, random weights", "measured"), lines)


@table("acceptance")
def acceptance(read):
    path = ROOT / "benchmarks/results/acceptance.json"
    if not path.exists():
        return "Unmeasured: `python benchmarks/acceptance.py` has not been run on such a device."
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = [(row["part"], row["status"], f"{row['seconds']:.0f}") for row in result["parts"]]
    return f"{where(result['environment'])}\n\n{grid(('part', 'ended', 'seconds'), lines)}"


def spread(figures):
    low, high = (
        f"{each:.1f}" if abs(each) >= 0.05 or not each else f"{each:.2f}" for each in figures["interval"]
    )
    return f"{figures['mean']:.1f} [{low}, {high}]"  # a bound beside zero shows on which side it lies


@table("toy", "toy", "python benchmarks/toy.py")
def toy(result):
    lines = []
    for row, figures in result["accuracy"].items():
        seeds = figures["by seed"].values()
        lines.append((row, spread(figures), f"{min(seeds):.1f} – {max(seeds):.1f}", len(seeds)))
    minutes = sorted(result["seconds"].values())
    about = f"Seeds {', '.join(map(str, result['seeds']))}; per cent of the held-out pairs. "
    about += (
        f"A seed's steps took {minutes[0] / 60:.1f} to {minutes[-1] / 60:.1f} minutes, seeds side by side. "
    )
    header = "", "mean [95% interval]", "lowest – highest seed", "seeds"
    return f"{about}{where(result['environment'])}\n\n{grid(header, lines)}"


@table("toy-claims", "toy", "python benchmarks/toy.py")
def toy_claims(result):
    lines = []
    for each in result["differences"]:
        low, high = each["interval"]
        verdict = "yes" if low > 0 else "the opposite" if high < 0 else "not shown"
        seeds = f"{each['above zero']} / {each['below zero']} of {each['seeds']}"
        lines.append((each["claim"], f"{each['of']} − {each['less']}", spread(each), seeds, verdict))
    header = "claim", "difference", "points [95% interval]", "seeds above / below zero", "came out"
    return grid(header, lines)


@table("toy-rounds", "toy", "python benchmarks/toy.py")
def toy_rounds(result):
    lines = []
    for number, rounds in enumerate(zip(*result["rounds"].values(), strict=True), 1):
        mean = [sum(each[name] for each in rounds) / len(rounds) for name in ("judged", "kept")]
        mean += [
            sum(each[f"label_accuracy_{n}"] for each in rounds) / len(rounds) for n in ("before", "after")
        ]
        lines.append((number, *(f"{value:.1f}" for value in mean), f"{mean[3] - mean[2]:+.1f}"))
    header = "round", "judged", "kept", "labels right before, %", "after the filters, %", "points"
    return f"Means over {len(result['rounds'])} seeds.\n\n{grid(header, lines)}"


@table("paper", "paper", "python benchmarks/paper.py")
def paper(result):
    named = {"gram": "GRAM", "amount": "figure 5: {} synthesized pairs"}
    lines = [
        (form.format(row), spread(figures), figures["seeds"])
        for part, form in named.items()
        for row, figures in result[part].items()
    ]
    grids = [where(result["environment"]), grid(("", "accuracy [95% interval]", "seeds"), lines)]
    adapted: dict[str, dict[str, str]] = {}
    for row, figures in result["adaptation"].items():
        name, _, units = row.rpartition(", ")
        adapted.setdefault(name, {})[units] = spread(figures)
    if adapted:
        units = list(next(iter(adapted.values())))
        header = "figure 4, after units of the task", *units
        grids.append(grid(header, [(name, *cells.values()) for name, cells in adapted.items()]))
    return "\n\n".join(grids)


@table("paper-claims", "paper", "python benchmarks/paper.py")
def paper_claims(result):
    return toy_claims(result)


def interval(figure, form="{:.1f}"):
    value, low, high = (form.format(figure[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


@table("policy", "policy", "python benchmarks/policy.py RUN...")
def policy(result):
    lines = []
    for row in result["rows"]:
        gains = [interval(row[name], "{:+.1f}") for name in ("gain", "over scalar")]
        gains = ["", ""] if row["name"] == "before" else gains
        means = [f"{row[name]['value']:.1f}" for name in ("prices", "greedy")]
        by_seed = ", ".join(map(str, row["right by seed"]))
        lines.append((row["name"], interval(row["right"]), by_seed, *gains, *means))
    header = (
        "reward",
        "right throughout, %",
        "of each seed",
        "gain",
        "over the scalar",
        "prices right, %",
        "greedy answer right, %",
    )
    seeds = ", ".join(map(str, result["seeds"]))
    about = f"Seeds {seeds}; {result['questions']} held-out questions, {result['drawn']} "
    about += f"answers drawn for each; intervals 95%, paired by question. {where(result['environment'])}"
    return f"{about}\n\n{grid(header, lines)}"


@table("policy-best-of-n", "policy", "python benchmarks/policy.py RUN...")
def policy_best_of_n(result):
    sizes = list(result["curves"]["oracle"])
    lines = [(way, *(interval(curve[n]) for n in sizes)) for way, curve in result["curves"].items()]
    about = (
        f"Means over seeds {', '.join(map(str, result['seeds']))}, {result['lists']} held-out questions each."
    )
    return f"{about}\n\n{grid(('picked by', *(f'n = {n}' for n in sizes)), lines)}"


@table("stages")
def stages(read):
    """Made from the code, and not from a measurement: the stages of train.py."""
    rows = [
        (f"`{name}`", stage.equation, stage.template or "none", stage.head, stage.data)
        for name, stage in STAGES.items()
    ]
    rows.append(
        ("`policy`", "a model's own answers, as a judge rewards them", "none", "vocabulary", "prompts")
    )
    header = ("`--stage`", "what it minimises", "prompt", "head", "data")
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ("---",) * 5, *rows))


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
