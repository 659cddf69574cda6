"""What the paper's run costs: tokens, GPU-hours and storage, step by step, computed into docs/scale.md.

    python benchmarks/scale.py            writes docs/scale.md
    python benchmarks/scale.py --check    changes nothing; exit status 1 if docs/scale.md is stale

The sizes of the run are the paper's, the settings that it does not publish are the recipes'. How long a
prompt or a rationale is, and how fast a GPU works, are the constants below, each with its source; where
benchmarks/results holds a measurement made on a GPU, that takes the constant's place, and the page says so.
Operations are counted by the function from which the trainer takes its share of the matmul rate; bytes of a
decode step are what benchmarks/sampling.py calls the floor.

Left out: reading and tokenizing (they run beside the steps), failures, waiting for a queue, and money.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import common
import tables

from gramr2 import cost, requests
from gramr2.model import ModelConfig
from gramr2.recipes import resolve
from gramr2.records import Example, Tokens
from gramr2.settings import SelfTrainSettings, TrainSettings

PAGE = common.ROOT / "docs/scale.md"
RECIPES = common.ROOT / "recipes"
PROVER = ModelConfig(151936, 5120, 17408, 40, 40, 8, 128, 40960, qk_norm=True)
JUDGES = {
    "LLaMA-3.1-8B": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072),
    "LLaMA-3.2-3B": ModelConfig(128256, 3072, 8192, 28, 24, 8, 128, 131072, tie_embeddings=True),
}
GPUS = 8  # of one node
LOOP = resolve(SelfTrainSettings, RECIPES / "llama3.1-8b.toml", ["selftrain"], {})

# ---------------------------------------------------------------------------------- what is assumed


@dataclass(frozen=True)
class Run:
    """The sizes of the run. ABOUT has each field's meaning and source."""

    human: int = 38_459
    labelled: int = 1_000_000
    unlabelled: int = 500_000
    test: int = 11_943
    prompt: int = 1600
    rationale: int = 500
    proved: float = 0.9
    trusted: float = 0.6
    k: int = LOOP.k
    votes: int = LOOP.votes
    rounds: int = LOOP.iters


@dataclass(frozen=True)
class Speed:
    """What one GPU does in a second."""

    train: float = 0.39 * 989e12
    dense: float = 0.6 * 790e12
    bandwidth: float = 4.3e12
    memory: float = 141e9
    of_floor: float = 0.55
    running: int = 1024
    occupied: float = 0.8
    link: float = 50e9


ABOUT = {
    "human": ("pairs with human rationales", "published: HelpSteer3's training set"),
    "labelled": ("labelled pairs", "published"),
    "unlabelled": ("unlabelled pairs of a round", "published"),
    "test": ("held-out pairs", "published: RM-Bench, 1,327 prompts of nine pairs"),
    "prompt": (
        "tokens of a judge's or a prover's prompt",
        "assumed: a question, two responses, the template",
    ),
    "rationale": ("tokens of a rationale, or of a proof, with its verdict", "assumed"),
    "proved": ("share of labelled pairs whose rationale is kept", "assumed"),
    "trusted": ("share of a round's unlabelled pairs that is kept", "assumed; the toy's is in its report"),
    "k": ("proofs of each pair", "recipes/llama3.1-8b.toml; not published"),
    "votes": ("votes on each unlabelled pair, half in each order", "recipes/llama3.1-8b.toml; not published"),
    "rounds": ("rounds", "published"),
    "train": ("FLOP/s of training", "39% of 989 TFLOP/s: torchtitan, 8B on eight H100, compiled"),
    "dense": ("FLOP/s of prompts and of scoring", "60% of 790 TFLOP/s, an H200's bf16 matmul rate"),
    "bandwidth": ("bytes/s of memory", "an H200, copying"),
    "memory": ("bytes of memory", "an H200; an H100 has 80e9, and decodes fewer samples together"),
    "of_floor": ("share of the floor that a decode step reaches", "the aim of benchmarks/sampling.py"),
    "running": ("samples decoded together on a GPU", "the sampler's default for an 8B model on 80 GB"),
    "occupied": ("share of them that still write, on average", "assumed: the end of each shard runs thin"),
    "link": ("bytes/s between nodes, for each GPU", "assumed: a 400 Gbit/s adapter for each GPU"),
}


def speed(read) -> tuple[Speed, dict[str, str]]:
    """The constants, and measured figures over them where there are any. → (speed, where those were)."""
    measured = {}
    training, sampling = results = read("training_cuda"), read("sampling_cuda")
    if training:
        rows = [row for row in training["rows"] if "of_matmul" in row]
        best = max((row["of_matmul"] for row in rows), default=None)
        measured |= {"train": best * training["matmul_tflops"] * 1e12} if best else {}
    if sampling:
        measured["bandwidth"] = sampling["bandwidth"]
        grouped = [row["of_floor"] for row in sampling["rows"] if row["shared"] and "of_floor" in row]
        measured |= {"of_floor": grouped[0]} if grouped else {}
        measured |= {"dense": sampling["reading"]["tflops"] * 1e12} if "reading" in sampling else {}
    on = [(result or {}).get("environment", {}) for result in results]
    trained, sampled = (tables.card(each.get("gpu"), each.get("commit")) for each in on)
    found = {name: trained if name == "train" else sampled for name in measured}
    return dataclasses.replace(Speed(), **measured), found


# ---------------------------------------------------------------------------------- what a step costs


@dataclass(frozen=True)
class Step:
    """One row of the page: what is computed, by which model, and how long one GPU takes."""

    name: str
    model: str
    examples: float
    read: float  # tokens that are computed many at a time: prompts, scored proofs, training examples
    written: float  # tokens that are sampled one after the other
    seconds: float


def per_token(model: ModelConfig) -> int:
    """Bytes of keys and values in bf16."""
    return 2 * 2 * model.num_layers * model.num_kv_heads * model.head_size


@cache
def parameters(model: ModelConfig) -> int:
    return cost.count_parameters(model)


def weight_bytes(model: ModelConfig) -> int:
    """What a decode step reads of the weights in bf16; of an embedding's own table it reads a few rows."""
    unread = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    return 2 * (parameters(model) - unread)


def decode_floor(model: ModelConfig, groups: int, samples: int, shared: float, own: float, bandwidth: float):
    """Seconds of a step of `groups` prompts with `samples` each: weights, shared parts once, own parts."""
    tokens = groups * shared + groups * samples * own
    return (weight_bytes(model) + tokens * per_token(model)) / bandwidth


def sampling(model: ModelConfig, prompts: float, samples: int, run: Run, rate: Speed) -> float:
    """Seconds of one GPU that reads `prompts` and writes `samples` rationales for each."""
    forward = cost.step_flops(model, [Example((Tokens((0,) * run.prompt, run.prompt),))]) / 3
    share = (run.prompt + samples * run.rationale) * per_token(
        model
    )  # of the cache, for one prompt's samples
    room = requests.CUDA_CACHE_SHARE * (rate.memory - 2 * parameters(model)) / share
    groups = max(1, min(rate.running // samples, int(room)))
    step = decode_floor(model, groups, samples, run.prompt, run.rationale / 2, rate.bandwidth) / rate.of_floor
    computing = 2 * parameters(model) * groups * samples / rate.dense
    written = prompts * samples * run.rationale
    return prompts * forward / rate.dense + written / (groups * samples * rate.occupied) * max(
        step, computing
    )


def prove(name: str, pairs: float, run: Run, rate: Speed) -> Step:
    """k proofs of each pair, and one pass for equation 5's denominator."""
    scored = pairs * run.k * run.rationale
    forward = cost.step_flops(PROVER, [Example((Tokens((0,) * run.rationale, 0),))]) / 3
    seconds = sampling(PROVER, pairs, run.k, run, rate) + pairs * run.k * forward / rate.dense
    return Step(name, "prover", pairs, pairs * run.prompt + scored, pairs * run.k * run.rationale, seconds)


def judge(name: str, model: ModelConfig, pairs: float, votes: int, run: Run, rate: Speed) -> Step:
    """Votes, half of them in each order; a single one in the given order."""
    orders = min(votes, 2)
    seconds = sampling(model, pairs * orders, votes // orders, run, rate)
    return Step(name, "judge", pairs, pairs * orders * run.prompt, pairs * votes * run.rationale, seconds)


def train(name: str, who: str, model: ModelConfig, examples: float, run: Run, rate: Speed) -> Step:
    length = run.prompt + run.rationale
    flops = cost.step_flops(model, [Example((Tokens((0,) * length, run.prompt),))])
    return Step(name, who, examples, examples * length, 0, examples * flops / rate.train)


def steps(model: ModelConfig, recipe: str, run: Run, rate: Speed) -> list[Step]:
    """The steps of selftrain.py, in its order."""

    def epochs(*stages: str) -> float:
        return resolve(TrainSettings, RECIPES / f"{recipe}.toml", ["train", *stages], {}).epochs

    once, data = epochs("train.reward"), run.labelled * run.proved
    rows = [
        train("prover", "prover", PROVER, run.human * epochs("train.prover"), run, rate),
        prove("prove the labelled", run.labelled, run, rate),
        train("initial", "judge", model, data * once, run, rate),
    ]
    for number in range(1, run.rounds + 1):
        kept = run.unlabelled * run.trusted
        data += kept
        rows += [
            judge(f"round {number}: predict", model, run.unlabelled, run.votes, run, rate),
            prove(f"round {number}: prove", kept, run, rate),
            train(f"round {number}: train", "judge", model, data * once, run, rate),
        ]
    rows.append(train("fine-tune", "judge", model, run.human * epochs("train.finetune"), run, rate))
    tests = run.rounds + 3  # the backbone, the initial model, the rounds, the last one
    rows.append(judge(f"test {tests} models", model, tests * run.test, 1, run, rate))
    return [*rows, judge("test by 16 votes", model, run.test, LOOP.test_votes, run, rate)]


def hours(rows: list[Step]) -> float:
    return sum(row.seconds for row in rows) / 3600


# ---------------------------------------------------------------------------------- the page


def figure(value: float) -> str:
    """A constant as a person writes it."""
    for name, size in (("10¹²", 1e12), ("10⁹", 1e9)):
        if value >= size:
            return f"{value / size:.3g} × {name}"
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}"


def assumptions(run: Run, rate: Speed, measured: dict[str, str]) -> str:
    lines = []
    for name, value in (vars(run) | vars(rate)).items():
        about, source = ABOUT[name]
        lines.append(
            (about, figure(value), f"**measured**, {measured[name]}" if name in measured else source)
        )
    return tables.grid(("what", "value", "source"), lines)


def cost_table(rows: list[Step]) -> str:
    total = hours(rows)
    lines = [
        (
            row.name,
            row.model,
            f"{row.examples:,.0f}",
            f"{row.read / 1e9:,.2f}",
            f"{row.written / 1e9:,.2f}",
            f"{row.seconds / 3600:,.1f}",
            f"{row.seconds / 3600 / GPUS:,.1f}",
            f"{row.seconds / 3600 / total:.0%}",
        )
        for row in rows
    ]
    sums = (sum(getattr(row, name) for row in rows) / 1e9 for name in ("read", "written"))
    lines.append(
        ("**all**", "", "", *(f"{s:,.1f}" for s in sums), f"{total:,.0f}", f"{total / GPUS:,.0f}", "100%")
    )
    header = (
        "step",
        "model",
        "examples",
        "10⁹ tokens read",
        "10⁹ written",
        "GPU-hours",
        f"hours on {GPUS}",
        "share",
    )
    return tables.grid(header, lines)


def kinds(rows: list[Step]) -> dict[str, float]:
    """GPU-hours by kind of work."""
    found = dict.fromkeys(
        ("the prover writes", "the judge votes", "the judge is trained", "the prover is trained"), 0.0
    )
    for row in rows:
        verb = {"prover": "the prover writes", "judge": "the judge votes"}[row.model]
        name = verb if row.written else f"the {row.model} is trained"
        found[name] += row.seconds / 3600
    return found


def storage(model: ModelConfig, run: Run) -> str:
    """Bytes on disk: text at four bytes a token, models in bf16, resume points in fp32."""
    pair, text = 4 * run.prompt, 4 * run.rationale
    weights = parameters(model)
    kept = run.labelled * run.proved + run.rounds * run.unlabelled * run.trusted
    judged = run.rounds * run.unlabelled * (pair + run.votes * text)
    proved = run.labelled + run.rounds * run.unlabelled * run.trusted
    lines = [
        ("pairs, as they come", (run.human + run.labelled + run.rounds * run.unlabelled) * pair),
        ("judged files: every vote's text", judged),
        ("proofs: the chosen one, its ids, and its rationale", proved * (pair + 3 * text)),
        ("all k proofs, with `--keep-candidates`, in addition", proved * run.k * text),
        ("training sets of rationales", kept * (pair + text)),
        (
            "models in bf16: prover, initial, rounds, last",
            2 * (parameters(PROVER) + (run.rounds + 2) * weights),
        ),
        ("two resume points of a judge in training: weights and AdamW's state in fp32", 2 * 12 * weights),
        ("two resume points of the prover in training", 2 * 12 * parameters(PROVER)),
    ]
    return tables.grid(("what", "GB"), [(what, f"{size / 1e9:,.0f}") for what, size in lines])


def sensitivity(run: Run, rate: Speed) -> str:
    """The 8B run's GPU-hours where one setting is another."""
    model, recipe = JUDGES["LLaMA-3.1-8B"], "llama3.1-8b"
    base = hours(steps(model, recipe, run, rate))
    lines = []
    changes = [("k", (1, 4, 8, 16)), ("votes", (4, 8, 16, 32)), ("rationale", (250, 500, 1000, 2000))]
    changes += [("prompt", (800, 1600, 3200)), ("trusted", (0.3, 0.6, 0.9))]
    for name, values in changes:
        for value in values:
            total = hours(steps(model, recipe, dataclasses.replace(run, **{name: value}), rate))
            lines.append((f"{ABOUT[name][0]}: {value:,}", f"{total:,.0f}", f"{total / base:.2f}"))
    return tables.grid(("changed to", "GPU-hours", "of the run above"), lines)


def nodes(rows: list[Step], model: ModelConfig, recipe: str, rate: Speed) -> str:
    """Hours on more nodes, and what a pack sends between them while it is computed."""
    settings = resolve(TrainSettings, RECIPES / f"{recipe}.toml", ["train", "train.reward"], {})
    weights, by_kind = parameters(model), kinds(rows)
    written = by_kind["the prover writes"] + by_kind["the judge votes"]
    trained = sum(by_kind.values()) - written
    length = Run().prompt + Run().rationale
    example = cost.step_flops(model, [Example((Tokens((0,) * length, Run().prompt),))])
    pack = settings.token_budget / length * example / rate.train
    whole = 2 * 2 * weights + 4 * weights  # bf16 weights in both passes, fp32 gradients
    halves = 2 * 4 * weights / GPUS  # an all-reduce of each GPU's share of the gradients
    lines = []
    for count in (1, 2, 4, 8):
        sent = [(count - 1) / count * size / rate.link for size in (whole, halves)]
        sampled, training = written / GPUS / count, trained / GPUS / count
        lines.append((count, f"{sampled:,.1f}", f"{training:,.1f}", f"{sampled + training:,.1f}",
                      f"{pack:.2f}", *(f"{s:.2f}" for s in sent)))  # fmt: skip
    header = (
        "nodes",
        "sampling, h",
        "training, h",
        "both, h",
        "a pack computes, s",
        "sends, s",
        "sends with `fsdp_size = 8`, s",
    )
    return tables.grid(header, lines)


def page(read) -> str:
    run = Run()
    rate, measured = speed(read)
    rows = {name: steps(model, recipe_of(name), run, rate) for name, model in JUDGES.items()}
    big, small = rows.values()
    model = JUDGES["LLaMA-3.1-8B"]
    largest = sorted(kinds(big).items(), key=lambda item: -item[1])
    shares = "; ".join(f"{name} {value / hours(big):.0%}" for name, value in largest)
    found = "no speed was measured on a GPU, all are stated"
    if measured:
        found = f"{len(measured)} speeds were measured on a GPU, the others are stated"
    batch = resolve(TrainSettings, RECIPES / "llama3.1-8b.toml", ["train"], {}).batch_size
    baselines = 4 * next(row.seconds for row in big if row.name == "initial") / 3600
    return f"""# What the paper's run costs

<!-- computed by `python benchmarks/scale.py`; edit that file, not this one -->

One run of the whole algorithm at the paper's sizes: a Qwen3-14B prover, and a reward model of 8B or 3B, on
{GPUS} GPUs of the H200's kind. `python benchmarks/scale.py` computes everything below from the first table
and the recipes; the cache takes {requests.CUDA_CACHE_SHARE:.0%} of what the weights leave, and a token is
four bytes of text; {found}. Expect a factor of two either way,
and read it for which setting costs what.

## Assumed

{assumptions(run, rate, measured)}

Whatever else a step needs (epochs, the length of a pack) is read from the recipes. A training example is a
prompt and a rationale, and its operations are those that the trainer counts: matrices, attention, and the
projection of the targets. A decode step reads the weights, each prompt's keys and values once for all its
samples, and each sample's own.

## LLaMA-3.1-8B

{cost_table(big)}

"Read" are tokens computed many at a time: prompts, scored proofs, training examples. "Written" are sampled
one after the other. Where the hours go: {shares}.

The baselines, which the loop also trains unless it is told `--no-baselines`, are not in the table. They cost
about four initial models: one labelled-only model trained for twice as long, and two others on the same
pairs, together some {baselines:,.0f} GPU-hours.

## LLaMA-3.2-3B

{cost_table(small)}

The prover costs the same; only the judge's own steps shrink. Proofs of the labelled pairs do not depend on
the judge, so a second judge's run can begin with copies of the first one's steps `prover` to
`filter-labelled`.

## Storage, 8B

{storage(model, run)}

A step's files are needed by the next steps only, and to look at; resume points are removed when their
training is done.

## What changes a lot

{sensitivity(run, rate)}

## More nodes, 8B

{nodes(big, model, "llama3.1-8b", rate)}

Sampling takes its pairs in shards and needs no talk between nodes, so its hours divide. Training sends the
weights and the gradients of every pack: fully sharded over all nodes that is the second-last column, which
hides behind the computing only while it is well below it. `fsdp_size = 8` in the recipe keeps one copy of the
model on each node and sends gradients alone. What does not divide is the order of things: a round starts
when the one before has ended, and a step's batch stays at {batch} examples, fewer for each GPU.
"""


def recipe_of(name: str) -> str:
    return name.lower().replace("llama-", "llama")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the page is stale")
    check = parser.parse_args().check
    text = page(tables.read)
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if before == text:
        return 0
    print(f"{Path(PAGE).relative_to(common.ROOT)}: {'stale' if check else 'rewritten'}", file=sys.stderr)
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    return 1 if check else 0


if __name__ == "__main__":
    sys.exit(main())
