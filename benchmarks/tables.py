"""Rewrites the tables of the pages from benchmarks/results/*.json, so that no figure is typed by hand.

    python benchmarks/tables.py            rewrites what stands between <!-- table:NAME --> and <!-- end -->
    python benchmarks/tables.py --check    changes nothing; exit status 1 if a table is stale

A table is a function below, registered under its NAME. It takes `read`, which gives the content of
results/NAME.json, or None where that was never measured: then the table says "unmeasured".
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gramr2.stages import STAGES  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
PAGES = ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))
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
    """results/NAME.json, or what acceptance.json (brought from a GPU) has of that name; the newer one."""
    paths = [RESULTS / f"{each}.json" for each in (name, "acceptance")]
    alone, whole = (json.loads(path.read_text("utf-8")) if path.exists() else {} for path in paths)
    found = [result for result in (alone, whole.get("results", {}).get(name)) if result]
    return max(found, key=lambda result: result.get("environment", {}).get("date", ""), default=None)


def grid(header, rows):
    """A Markdown table; the first column reads from the left, the others are figures."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def where(environment):
    """One line on the machine, the versions, the date and the commit of a result."""
    device = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} thread(s)"
    versions = [f"{name} {version}" for name, version in environment["versions"].items() if version]
    code = f", measured at commit {environment['commit']}" if environment.get("commit") else ""
    return f"{device}; {environment['system']}; {', '.join(versions)}; {environment['date'][:10]}{code}."


def card(gpu, commit):
    """A GPU and a commit, in a cell of their own where a table's rows differ in them."""
    return (gpu or "CPU").partition(",")[0] + (f", commit {commit}" if commit else "")


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


@table("memory-cpu", "memory_cpu", "python benchmarks/memory.py")
@table("memory-cuda", "memory_cuda", "python benchmarks/memory.py --device cuda", THERE)
def memory(result):
    lines = []
    for row in result["rows"]:
        name = f"{row['shape']}, {row['tokens']:,} tokens: {row['way']}"
        if "not_run" in row:
            lines.append((name, row["not_run"], "", "", ""))
            continue
        sizes = [f"{row[kind] / 1e6:,.1f}" for kind in ("estimate", "measured")]
        off = row["estimate"] / row["measured"] - 1
        lines.append((name, row["recomputed_blocks"], *sizes, f"{off:+.1%}"))
    header = "model, tokens of a pack", "blocks recomputed", "estimate, MB", "measured peak, MB", "off by"
    return f"{where(result['environment'])}\n\n{grid(header, lines)}"


@table("optimizer", "optimizer", "python benchmarks/optimizer.py toy")
def optimizer(result):
    """For each part: losses by seed; what a kind of moments changes beside what a seed does."""
    about = {"toy": "the toy's model", "smollm2": "SmolLM2-135M"}
    lines = []
    for part, rows in result["parts"].items():
        losses = {(row["way"], row["seed"]): row["loss"] for row in rows}
        exact = [row["loss"] for row in rows if row["way"] == "float32"]
        for way in dict.fromkeys(row["way"] for row in rows):
            mine = [row for row in rows if row["way"] == way]
            changes = [row["loss"] - losses["float32", row["seed"]] for row in mine]
            shown = f"{statistics.fmean(row['loss'] for row in mine):.4f}"
            shift = f"{statistics.fmean(changes):+.1g}", f"{max(map(abs, changes)):.1g}"
            cells = [shown, *(shift if way != "float32" else ("", ""))]
            cells += [f"{max(exact) - min(exact):.1g}" if exact[1:] else "", f"{mine[0]['bytes']:.0f}"]
            cells.append(f"{statistics.median(row['seconds'] for row in mine):.2f}")
            lines.append((f"{about[part]}, {mine[0]['steps']} steps: {way}", *cells, len(mine)))
    header = (
        "AdamW's moments in",
        "loss held out",
        "beside float32",
        "largest difference",
        "between seeds",
        "bytes a parameter",
        "s a step",
        "seeds",
    )
    each = " and ".join(f"{found['ns']:.1f} ns in {name}" for name, found in result["updates"].items())
    about = f"An update alone takes a parameter {each}, one thread (ratio "
    about += f"{result['updates']['bfloat16']['ratio']:.0f}). {where(result['environment'])}"
    return f"{about}\n\n{grid(header, lines)}"


@table("adapters-toy", "adapters-toy", "python benchmarks/adapters.py toy")
@table("adapters-real", "adapters-real", "python benchmarks/adapters.py real --model DIR --data ARGUMENTS")
def adapters(result):
    """Both ways on the same pairs; of all seeds the mean, and the mean of the paired differences."""
    seeds, lines = [*result["seeds"].values()], []
    right = {way: np.array([[*map(int, seed[way]["right"])] for seed in seeds]) for way in seeds[0]}
    first, *_ = right
    for way, bits in right.items():
        mine = [seed[way] for seed in seeds]
        mean = lambda name, mine=mine: statistics.fmean(each[name] for each in mine)  # noqa: E731
        accuracy, beside = resampled(bits), resampled(bits - right[first]) if way != first else ""
        cells = f"{mean('loss'):.3f}", f"{mean('memory') / 1e6:,.0f}"
        lines.append((way, accuracy, beside, *cells, f"{mean('saved') / 1e6:.2f}"))
    header = (
        "trained",
        "accuracy, %",
        "less all of it, points",
        "loss",
        "peak memory, MB",
        "saved, MB",
    )
    sizes = f"{len(seeds)} seed(s), {right[first].shape[1]} held-out pairs, {seeds[0][first]['steps']} steps."
    return f"{sizes} {where(result['environment'])}\n\n{grid(header, lines)}"


@table("adapters-steps", "adapters-steps", "python benchmarks/adapters.py steps")
def adapter_steps(result):
    first, second = result["seconds"].values()
    names = " and ".join(f"{each:.2f} s for {way}" for way, each in result["seconds"].items())
    about = f"A step of {result['tokens']:,} tokens at SmolLM2-135M's shape takes {names} "
    return f"{about}(ratio {second / first:.2f}). {where(result['environment'])}"


def resampled(values):
    """A mean in per cent, with its bootstrap interval over the pairs of all seeds."""
    each, rng = 100 * values.ravel(), np.random.default_rng(0)
    low, high = np.quantile(rng.choice(each, (2000, len(each))).mean(1), (0.025, 0.975))
    return f"{each.mean():.1f} [{low:.1f}, {high:.1f}]"


@table("training-cuda")
def training_cuda(read):
    """Blocks as they are and compiled blocks, in one table."""
    found = {way: read(f"training_cuda{way}") for way in ("", "_compiled")}
    if not any(found.values()):
        return "Unmeasured: `python benchmarks/training.py --device cuda` has not been run on such a device."
    abouts, lines = [], []
    for way, result in ((way, result) for way, result in found.items() if result):
        about = (
            f"{result['dtype']} compute, float32 weights; matmul rate {result['matmul_tflops']:.0f} TFLOP/s."
        )
        abouts.append(
            f"{way.removeprefix('_').capitalize()}{': ' * bool(way)}{about} {where(result['environment'])}"
        )
        for row in result["rows"]:
            name = f"{row['shape']} at {row['length']:,}" + way.replace("_", ", ")
            if "not_run" in row:
                lines.append((name, row["not_run"], "", "", "", ""))
                continue
            figures = f"{row['tokens_per_second']:,.0f}", f"{1000 * row['seconds']:,.0f}"
            again = row.get("recomputed_blocks", "all")  # all: as it was before this could be chosen
            lines.append((name, *figures, f"{row['of_matmul']:.0%}", f"{row['peak_gib']:.1f}", again))
    header = "shape and length", "tokens/s", "ms a step", "of matmul rate", "peak GiB", "blocks recomputed"
    return "\n\n".join([*abouts, grid(header, lines)])


KINDS = {  # of a kernel, by what its name holds; all others are small
    "attention": "_read_kernel|_merge_kernel|_write_kernel|flash|fmha|attention",
    "matmul": "nvjet|gemm|cutlass|splitKreduce|cublas|_score_kernel|^xmma|sm\\d+_xmma",
}


@table("profiles-cuda", "profiles_cuda", "python benchmarks/profiles.py", THERE)
def profiles(result):
    lines = []
    for profile in result["profiles"]:
        sums = {kind: [0.0, 0.0] for kind in (*KINDS, "small")}
        longest = []
        for ms, _, count, name in profile["rows"]:
            kind = next((kind for kind, words in KINDS.items() if re.search(words, name)), "small")
            sums[kind] = [sums[kind][0] + ms, sums[kind][1] + count]
            longest += [f"{name.split()[-1]} {ms:.2f}"] if kind == "small" else []
        rest = profile["device_ms"] - sum(ms for ms, _ in sums.values())  # kernels too short to be listed
        sums["small"][0] += max(rest, 0.0)
        cells = [
            f"{ms:,.2f} ({ms / profile['device_ms']:.0%}) in {count:,.0f}" for ms, count in sums.values()
        ]
        wall = f"{profile['wall_ms']:,.1f}" if profile["wall_ms"] else ""
        lines.append((profile["name"], wall, f"{profile['device_ms']:,.1f}", *cells, "; ".join(longest[:3])))
    header = "a step of", "ms by the clock", "on the device", "attention", "matmul", "small kernels"
    about = "ms (share) in so many launches; of the small kernels the three that take most."
    return f"{about} {where(result['environment'])}\n\n{grid((*header, 'of these'), lines)}"


@table("endtoend-cuda", "endtoend_cuda", "python benchmarks/endtoend.py", THERE)
def endtoend(result):
    lines = []
    for row in result["rows"]:
        lines.append((row["what"], f"{row['pairs_per_s']:.1f}", f"{row['written_per_s']:,.0f}"))
    about = f"{result['shape']}, {result['dtype']}, {result['pairs']} pairs, {result['prompt']} tokens of "
    about += f"prompt, {result['new']} written, medians of {result['repeats']} turns."
    return f"{about} {where(result['environment'])}\n\n{grid(('', 'pairs/s', 'tokens written/s'), lines)}"


@table("smollm2-cuda", "smollm2_cuda", "python selftrain.py", THERE)
def smollm2(result):
    lines = []
    for row in result["rows"]:
        shares = row.get("of_matmul", ())
        cells = f"{row['low']:,.0f} to {row['high']:,.0f}", " to ".join(f"{share:.0%}" for share in shares)
        lines.append((row["step"], *cells))
    about = f"{result['k']} proofs of a pair. {where(result['environment'])}"
    return f"{about}\n\n{grid(('step', 'as its bar said', 'of matmul rate'), lines)}"


@table("tuning-cuda", "tuning_cuda", "python benchmarks/tune.py", THERE)
def tuning(result):
    lines = []
    for row in result["rows"]:
        times = [" / ".join(f"{ms:.3f}" for ms in row.get(name, ())) for name in ("built_in_ms", "best_ms")]
        gain = f"{row['gain'] - 1:+.0%}" if "gain" in row else ""
        lines.append((f"{row['kernel']}: {row['shape']}", *times, gain, row["tried"], row["outcome"]))
    header = "kernel: shape", "built-in ms", "best ms", "gain", "tried", "choice"
    return f"{where(result['environment'])}\n\n{grid(header, lines)}"


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
            kinds = [figure.get(kind) for kind in ("in_matrices", "in_attention", "in_cache")]
            shares = ("" if share is None else f"{share:.0%}" for share in kinds)
            name, floor = f"{row['workload']}: {way}", ""
            if way == "static" and "in_cache" in row["ways"]["ours"]:
                ours = row["ways"]["ours"]
                floor = f"{figure['ratio'] / sum(ours[kind] for kind in ours if kind.startswith('in_')):.1f}"
            ratio = f"{figure['ratio']:.2f}"
            lines.append((name, f"{figure['tokens_per_s']:,.0f}", ratio, *shares, floor))
    header = "workload: way", "tokens/s", "time / ours", "in matrices", "attention", "cache", "at most"
    parts = [where(result["environment"]), grid(header, lines)]
    if absent:
        parts.append("Not run: " + "; ".join(f"{way} ({why})" for way, why in absent.items()) + ".")
    return "\n\n".join(parts)


MODELS = "python benchmarks/sampling.py --device cpu --model DIR"


@table("sampling-models-cpu", "sampling_models_cpu", MODELS, THERE)
def sampling_models_cpu(result):
    lines = []
    for model in result["models"].values():
        for row in model["rows"]:
            ways = [row["ways"][way] for way in ("ours", "static")]
            speeds = (f"{way['tokens_per_s']:,.1f}" for way in ways)
            shares = (f"{way['in_matrices']:.0%}" if "in_matrices" in way else "" for way in ways)
            lines.append((row["workload"], *speeds, f"{ways[1]['ratio']:.2f}", *shares))
    about = (
        f"{result['prompt']} tokens of prompt, {result['new']} new, medians of {result['repeats']} turns. "
    )
    speeds = "ours, tokens/s", "static generate", "ours is faster, times"
    header = "checkpoint: workload", *speeds, "ours in matrices", "static in matrices"
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
    ends = f"End to end, {beside['workload']}: {ways}."
    if read := result.get("reading"):
        ends += f" Prompts alone, {read['prompts']} of {read['length']:,} tokens: "
        ends += f"{read['tokens_per_s']:,.0f} tokens/s, {read['tflops']:.0f} TFLOP/s."
    return "\n\n".join([about, grid(header, lines), ends])


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


@table("serving", "serving", "python benchmarks/serving.py")
def serving(result):
    count, together, alone = result["requests"], result["seconds"], result["seconds_alone"]
    killed, stopped = result["killed"], result["stopped"]
    rows = []
    for who, seconds in (f"{result['clients']} callers at once", together), ("one caller, one by one", alone):
        rows.append((who, f"{count / seconds:.1f}", f"{result['tokens'] / seconds:,.0f}"))
    about = (
        f"{count:,} requests of {result['votes']} votes, {result['answer']} tokens of answer at most; half "
        f"were answered within {result['median']:.1f} s, 95% within {result['p95']:.1f} s. "
        f"{result['answered']:,} were answered, {result['same']:,} to the last bit as alone, and "
        f"{alone / together:.1f} times as fast."
    )
    after = (
        f"A client that was killed with {killed['requests']} requests under way held "
        f"{killed['pages']['before']:.0f} pages of the cache; {killed['seconds']:.1f} s later "
        f"{killed['pages']['after']:.0f} were in use. Told to stop with {stopped['accepted']} requests under "
        f"way, the server answered {stopped['answered']} of them, and {stopped['late']} to who came later."
    )
    table = grid(("", "requests/s", "tokens/s"), rows)
    return f"{about} {where(result['environment'])}\n\n{table}\n\n{after}"


@table("speed-cpu")
def speed_cpu(read):
    """docs/results.md's comparison with transformers: units a second of both, from four benchmarks."""
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
    """docs/results.md's GPU cells, each with where and of which commit it was measured."""

    def row(what, source, figure, form, **wanted):
        result = read(f"{source}_cuda") or {"rows": []}
        found = (
            each[figure]
            for each in result["rows"]
            if figure in each and all(each[key] == value for key, value in wanted.items())
        )
        value = next(found, None)
        if value is None:
            return what, "unmeasured", ""
        environment = result["environment"]
        return what, form.format(value), card(environment["gpu"], environment.get("commit"))

    head = "log-probs of 8,192 tokens at LLaMA-3.1-8B's head, {}: share of the matmul rate"
    decode = "decode step, 8B, {}: share of the memory floor"
    rate, speed = (
        "training, {} at 2,048 tokens: share of the matmul rate",
        "training, {} at 512 tokens: tokens/s",
    )
    loads = {
        "1 prompt at 2,048 tokens": (1, 1), "32 prompts at 2,048 tokens": (32, 1),
        "256 prompts at 2,048 tokens": (256, 1), "16 prompts x 16 that share 1,536 tokens": (16, 16),
    }  # fmt: skip
    lines = [
        *(row(head.format(mode), "sequence_logprob", "of_matmul", "{:.0%}",
              mode=mode, shape="LLaMA-3.1-8B", way="ours") for mode in ("score", "train")),
        *(row(decode.format(load), "sampling", "of_floor", "{:.0%}", prompts=prompts, k=k)
          for load, (prompts, k) in loads.items()),
        *(row(rate.format(shape), "training", "of_matmul", "{:.0%}", shape=shape, length=2048)
          for shape in ("LLaMA-3.2-3B", "LLaMA-3.1-8B")),
        *(row(speed.format(shape), "training", "tokens_per_second", "{:,.0f}", shape=shape, length=512)
          for shape in ("SmolLM2-135M", "Qwen2.5-0.5B")),
        row("proving, SmolLM2-135M, 4 proofs: pairs/s", "endtoend", "pairs_per_s", "{:.0f}", name="prove"),
        row("judging by 4 votes, SmolLM2-135M: pairs/s", "endtoend", "pairs_per_s", "{:.0f}", name="judge"),
        row("judging by 16 votes, 1B: pairs/s", "judging", "ours", "{:.1f}", votes=16),
    ]  # fmt: skip
    return grid(("one GPU, bf16, random weights", "measured", "on"), lines)


@table("acceptance")
def acceptance(read):
    path = RESULTS / "acceptance.json"
    if not path.exists():
        return "Unmeasured: `python benchmarks/acceptance.py` has not been run on such a device."
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        (row["part"], row["status"], f"{row['seconds']:.0f}", card(row["gpu"], row["commit"]))
        for row in result["parts"]
    ]
    return grid(("part", "ended", "seconds", "on"), lines)


def spread(figures):
    low, high = (
        f"{each:.1f}" if abs(each) >= 0.05 or not each else f"{each:.2f}" for each in figures["interval"]
    )
    return f"{figures['mean']:.1f} [{low}, {high}]"  # a bound beside zero shows on which side it lies


@table("names", "names", "python benchmarks/names.py --reasons UKPConvArg1.tar.gz")
def names(result):
    counts, total = result["named"], result["reasons"]
    cells = {
        name: [f"{counts.get(f'{name}, {sure}', 0):,}" for sure in ("certain", "not certain")]
        for name in ("both", "one", "none")
    }
    lines = [(f"reasons that name {name} of the two", *figures) for name, figures in cells.items()]
    lines += [
        (f"{row['format']}: {row['texts']:,} responses, with a false alarm", row["named"], row["not_certain"])
        for row in result["texts"]
    ]
    header = "", "names and no other mention", "with a mention that is not certain"
    about = f"{total:,} reasons. Of {result['better_than']:,} that say which is better than which, "
    about += f"{result['as_voted']:,} name first what their writer chose."
    return f"{about} {where(result['environment'])}\n\n{grid(header, lines)}"


@table("toy", "toy", "python benchmarks/study.py")
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


@table("toy-short", "toy", "python benchmarks/study.py")
def toy_short(result):
    rows = "initial", "round 1", "round 2", "round 3", "labelled only, 2x steps", "fine-tuned", "voting@16"
    lines = [(row, spread(result["accuracy"][row]), result["accuracy"][row]["seeds"]) for row in rows]
    return grid(("per cent of the held-out pairs", "mean [95% interval]", "seeds"), lines)


@table("signals", "signals", "python benchmarks/signals.py")
def signals(result):
    """A table for each data set: what knows a wrong label, best first."""
    parts = []
    for name, found in result["data"].items():
        lines = []
        for signal, each in sorted(found["signals"].items(), key=lambda item: -item[1]["area"]):
            seeds = each["by seed"].values()
            spans = ", ".join(f"{seed['area']:.2f} [{seed['low']:.2f}, {seed['high']:.2f}]" for seed in seeds)
            kept = (", ".join(f"{seed[f'kept at {errors}%']:.0f}" for seed in seeds) for errors in (5, 10))
            lines.append((signal, f"{each['area']:.3f}", spans, *kept))
        of = ", ".join(f"seed {seed}: {wrong} of {pairs}" for seed, (pairs, wrong) in found["pairs"].items())
        header = "signal", "area", "by seed [95% interval]", "% kept at 5% wrong", "at 10%"
        parts.append(f"*{name}*; wrong labels, {of}. {where(found['environment'])}\n\n{grid(header, lines)}")
    return "\n\n".join(parts)


@table("faithfulness", "faithfulness", "python benchmarks/faithfulness.py")
def faithfulness(result):
    """What names people's reasons, and what the score's choice adds to it."""

    def spread_of(row):
        return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"

    steps, size = (result["training"][name] for name in ("steps", "batch_size"))
    prover = f"{result['backbone']}, trained for {steps} steps of {size} human pairs"
    proofs = f"{result['k']} proofs for each of {result['pairs']} pairs"
    parts = [f"{proofs}, by {prover}. {where(result['environment'])}"]
    for name, rows in result["levels"].items():
        header = f"{name}: F1, per cent", "overlap", "by chance", "above chance [95% interval]", "pairs"
        lines = [
            (row["name"], f"{row['overlap']:.2f}", f"{row['chance']:.2f}", spread_of(row), row["n"])
            for row in rows
        ]
        parts.append(grid(header, lines))
    columns = [f"{name} [95% interval]" for name in result["choices"]]
    lines = [
        (rows[0]["name"], *map(spread_of, rows), rows[0]["n"])
        for rows in zip(*result["choices"].values(), strict=True)
    ]
    parts.append(grid((f"picked by {result['picked by']}, above chance, less", *columns, "pairs"), lines))
    return "\n\n".join(parts)


@table("length", "length", "python benchmarks/length.py")
def length(result):
    lines = [
        (name, f"{each['value']:.1f} [{each['low']:.1f}, {each['high']:.1f}]", f"{each['n']:,}")
        for name, each in result["data"].items()
    ]
    return grid(("", "the longer response is the better one, % [95% interval]", "pairs"), lines)


@table("protocol", "protocol", "python benchmarks/protocol.py --model DIR --corpus UKPConvArg1.tar.gz")
def protocol(result):
    lines = []
    for name, row in result["rows"].items():
        cells = [
            f"{each['value']:.1f} [{each['low']:.1f}, {each['high']:.1f}]" for each in (row, row["beside"])
        ]
        lines.append((name, cells[0], cells[1] if name != "longer" else ""))
    about = f"{result['model']}; {result['pairs']:,} pairs of {result['arguments']:,} arguments. "
    header = "", "right, % [95% interval over sides]", "beside the longer one, points"
    return f"{about}{where(result['environment'])}\n\n{grid(header, lines)}"


def by_domain(result):
    """A study's rows with their accuracy in each domain."""
    domains = result["by domain"]
    lines = [
        (row, spread(figures), *(spread(domains[name][row]) for name in domains), figures["seeds"])
        for row, figures in result["accuracy"].items()
    ]
    about = f"Seeds {', '.join(map(str, result['seeds']))}; per cent of the held-out pairs. "
    return f"{about}{where(result['environment'])}\n\n{grid(('', 'all', *domains, 'seeds'), lines)}"


CONVINCING = "python benchmarks/study.py --recipe recipes/convincing"
table("convincing", "convincing", f"{CONVINCING}.toml --seeds 0-2", THERE)(by_domain)
table("convincing-cpu", "convincing-cpu", f"{CONVINCING}-cpu.toml --seeds 0")(by_domain)


@table("toy-cuda", "toy_cuda", "python selftrain.py --iters 3", THERE)
def toy_cuda(result):
    lines = [
        (row["name"], f"{row['accuracy']:.1f} [{row['low']:.1f}, {row['high']:.1f}]")
        for row in result["rows"]
    ]
    about = (
        f"Seed {result['seed']}, {result['dtype']}, {result['rows'][0]['n']} held-out pairs; the steps took "
    )
    about += f"{result['seconds']:.0f} seconds, beside other jobs. {where(result['environment'])}"
    return f"{about}\n\n{grid(('', 'per cent [95% interval]'), lines)}"


@table("toy-claims", "toy", "python benchmarks/study.py")
def toy_claims(result):
    lines = []
    for each in result["differences"]:
        low, high = each["interval"]
        verdict = "yes" if low > 0 else "the opposite" if high < 0 else "not shown"
        seeds = f"{each['above zero']} / {each['below zero']} of {each['seeds']}"
        lines.append((each["claim"], f"{each['of']} − {each['less']}", spread(each), seeds, verdict))
    header = "claim", "difference", "points [95% interval]", "seeds above / below zero", "came out"
    return grid(header, lines)


@table("toy-rounds", "toy", "python benchmarks/study.py")
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


@table("threads", "threads", "python benchmarks/threads.py", " on a quiet machine")
def threads(result):
    rows = {(row["part"], row["way"], row["busy"]): row for row in result["rows"]}
    cell = "{seconds:.1f} ({ratio:.2f})".format_map
    ways = dict.fromkeys(key[:2] for key in rows)
    lines = [[": ".join(way), *(cell(rows[*way, others]) for others in (0, 1))] for way in ways]
    header = ["whole commands, on two cores", "alone, s (ratio)", "beside a busy process, s (ratio)"]
    load = f"Load average before: {result['load_before']}."
    said = f"Medians of {result['turns']} turns. {load} {where(result['environment'])}"
    return f"{said}\n\n{grid(header, lines)}"


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
    for path in PAGES:
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
