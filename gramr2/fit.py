"""The one training loop. Every stage of the paper is this file with another target (settings.STAGES).

`train` reads pairs, turns each into token ids (`ExampleBuilder`), fixes every step's global set of examples
before it is split, deals it into packs over the ranks, and leaves a Hugging Face directory. What the stages
share is everything but the target, so that comparing two trained models compares their objectives.

    prover          (4)  prompt with the label -> proof; the condition dropped in a tenth (equation 5)
    reward          (2)  judge prompt -> rationale, then label
    generative      (1)  judge prompt -> label; with label smoothing, as GRAM
    discriminative  BT   the two responses' scores
    pretrain             text, or responses given prompts

No generator's state is carried from step to step: order, placement and what is hidden are functions of (seed,
epoch, row), so the number of the step says all about where a run stands in its data, and a resumed run
repeats the bits of an uninterrupted one on the CPU. A run lives in its directory: resume/run.json says what
it trains on, resume/step-N/ are its states, metrics.jsonl has a row per step, model/ appears last and at
once, with the figures in model/training.json.

It leaves out: evaluation, and the policy's own sampling (extras/policy.py, which is a stream of global
batches for the same `Loop`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from gramr2 import loss, parallel, prompts
from gramr2.data import Store, order, pack
from gramr2.files import InputError, digest, publish_file, read_json, write_json, write_rows
from gramr2.loss import Example, Trainee, collate
from gramr2.model import Decoder, ModelConfig
from gramr2.records import Pair, Tokens, as_messages
from gramr2.settings import TrainSettings
from gramr2.tokenizer import Tokenizer
from gramr2.weights import read_config, save_tensors

BAD_STEPS = 3  # steps in a row whose loss or gradient is not finite; then the run stops
EQUATION = {
    "prover": "equation 4: the proof, given the pair and its label",
    "reward": "equation 2: the rationale, then the label",
    "generative": "equation 1: the label alone",
    "discriminative": "Bradley-Terry on a scalar head",
    "pretrain": "language modelling",
}
# Settings that a run may be continued under with other values: they change how, not what, it computes.
FREE = {"device", "dtype", "threads", "shard", "checkpointing", "compile", "token_budget"}
FREE |= {"save_steps", "save_minutes"}
Flops = Callable[[list[Example]], float] | None  # of a batch, as a share of what the device does in a second


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C: the state was saved; the same call continues."""


# ---------------------------------------------------------------------------------- rows of a stage


class Unusable(Exception):
    """A row that this stage cannot train on; the reason is counted."""


class ExampleBuilder:
    """A stage's data as examples: row `i`, in epoch `e`, at a letter, is always the same ids.

    A pair whose rationale cannot be swapped keeps its own order, whatever letter is asked for.
    """

    def __init__(self, stage: str, settings: TrainSettings, data: Sequence[Path], model_dir: Path):
        self.stage, self.settings = stage, settings
        self.stores = [Store(path, None if stage == "pretrain" else Pair.from_json) for path in data]
        self.starts = np.cumsum([0, *map(len, self.stores)])
        self.size = min(int(self.starts[-1]), settings.limit or int(self.starts[-1]))
        if not self.size:
            raise InputError(f"{', '.join(map(str, data))}: no rows to train on")
        self.tokenizer = Tokenizer.load(model_dir, date=settings.date)
        self.template, self.notes, self.template_kind = "", [], "prover" if stage == "prover" else "judge"
        if stage in ("prover", "reward", "generative"):
            self.template, note = prompts.template_for(model_dir, kind=self.template_kind)
            self.notes = [note] if note.startswith("warning") else []
        if stage == "generative" and self.template == prompts.JUDGE_PROMPT:
            self.template = prompts.LABEL_PROMPT  # our own prompt without the rationale

    @cached_property
    def thinking_open(self) -> bool:
        return self.tokenizer.opens_thinking([{"role": "user", "content": ""}])

    def record(self, i: int) -> Any:
        file = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.stores[file][i - int(self.starts[file])]

    def plain(self, i: int) -> Example:
        """Example i in its own order, with nothing hidden: what decides whether it is used at all."""
        record = self.record(i)
        try:
            row = self._build(record)
        except InputError as error:  # of its text
            raise Unusable(str(error)) from None
        if row.length > self.settings.max_length:
            raise Unusable("longer than max_length")
        return row

    def __call__(self, i: int, epoch: int, letter: str) -> Example:
        if self.stage in ("pretrain", "discriminative"):
            return self._build(self.record(i))
        pair = self.record(i)
        turned = pair.swapped() if pair.label != letter and pair.swappable else pair
        row = self._build(turned, np.random.default_rng([self.settings.seed, epoch, i]).random(2))
        # The other order may be a token longer. Nothing is cut: the row stands as it was measured.
        return row if row.length <= self.settings.max_length else self._build(pair)

    def _build(self, record: Any, draws: Sequence[float] = (1.0, 1.0)) -> Example:
        """One record's example; the draws decide what the prover is not shown."""
        if self.stage == "pretrain":
            return Example((self._text(record),))
        if record.label is None:
            raise Unusable('no "label"')
        if self.stage == "discriminative":
            return self._scored(record)
        if self.stage == "generative":
            return self._label(record)
        if not record.rationale:
            raise Unusable('no "rationale"')
        reading = prompts.parse_rationale(record.rationale)
        if reading.rationale is None:
            raise Unusable(f"rationale: {reading.reason}")
        if self.stage == "reward":
            shown = prompts.show(str(reading.rationale))
            asked = prompts.judge_prompt(record, self.template)
            return Example((self._answer(asked, prompts.judge_target(shown, record.label)),))
        proof = prompts.show(prompts.proof_from_rationale(reading.rationale, record.label))
        hidden = draws[1] < self.settings.hide_label
        asked = prompts.prover_prompt(record, self.template, hidden)
        return Example((self._answer("" if draws[0] < self.settings.drop_condition else asked, proof),))

    def _answer(self, asked: str, target: str) -> Tokens:
        """Where the chat template has opened <think>, the target goes on from there, or closes it first."""
        if self.thinking_open:
            begun = target.startswith("<think>\n")
            target = target.removeprefix("<think>\n") if begun else f"\n</think>\n\n{target}"
        ids, start = self.tokenizer.answered([("user", asked)], target)
        return Tokens(tuple(ids), start)

    def _label(self, pair: Pair) -> Example:
        answer = self._answer(prompts.judge_prompt(pair, self.template), prompts.label_target(pair.label))
        if not self.settings.label_smoothing:
            return Example((answer,))
        of_a, of_b, before = prompts.verdict_ids(self.tokenizer.encode)
        after = len(self.tokenizer.encode(prompts.label_target("A"))) - len(before)
        place = len(answer.ids) - 1 - after  # counted from the end, where the stop token stands
        return Example((answer,), rival=(place, of_b if pair.label == "A" else of_a))

    def _scored(self, pair: Pair) -> Example:
        better, worse = pair.response_a, pair.response_b
        if pair.label == "B":
            better, worse = worse, better
        margin = (pair.margin or 0.0) if self.settings.use_margin else 0.0
        both = (self.tokenizer.answered(pair.messages, text)[0] for text in (better, worse))
        return Example(tuple(Tokens(tuple(ids), len(ids)) for ids in both), margin=abs(margin))

    def _text(self, row: dict[str, Any]) -> Tokens:
        """{"text"}: every token but the first is a target. A response given a prompt: the response's are."""
        if not isinstance(row, dict):
            raise Unusable("not an object with named fields")
        if isinstance(row.get("text"), str):
            ids = [*self.tokenizer.encode_document(row["text"]), *self.tokenizer.stop_ids[:1]]
            return Tokens(tuple(ids), 1)
        asked = row.get("messages") or row.get("prompt", row.get("question"))
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if not isinstance(turns, list) or not isinstance(row.get("response"), str):
            raise Unusable('neither "text" nor "prompt" and "response"')
        ids, start = self.tokenizer.answered(as_messages(turns), row["response"])
        return Tokens(tuple(ids), start)


# ---------------------------------------------------------------------------------- what a run will do


@dataclass(frozen=True)
class Plan:
    """Which rows are used, and how many steps that makes. `lengths` and `units` are of the rows in `kept`."""

    kept: np.ndarray
    lengths: np.ndarray
    units: np.ndarray
    dropped: dict[str, int]
    batch_size: int
    examples: int  # over all epochs; the last step may be smaller
    seed: int = 0

    @property
    def steps(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    def step(self, number: int) -> list[tuple[int, int, str]]:
        """(row, epoch, letter of the better response) of every example of a step, over all ranks.

        Either letter goes to half of the rows of an epoch, by a seeded draw, and the next epoch turns all.
        """
        last = min((number + 1) * self.batch_size, self.examples)
        places = [divmod(place, len(self.kept)) for place in range(number * self.batch_size, last)]
        orders = {epoch: order(len(self.kept), self.seed, epoch) for epoch in {e for e, _ in places}}
        turns = order(len(self.kept), self.seed + 1, 0)
        chosen = [(int(orders[epoch][place]), epoch) for epoch, place in places]
        return [(int(self.kept[k]), epoch, "AB"[(int(turns[k]) + epoch) % 2]) for k, epoch in chosen]


def make_plan(builder: ExampleBuilder, settings: TrainSettings, ranks: parallel.Ranks) -> Plan:
    """Tokenizes every row once, each rank its share: too long, or without what the stage needs, is out."""
    mine = range(ranks.rank, builder.size, ranks.size)

    def measure() -> tuple[list[tuple[int, int, int]], Counter[str]]:
        found, dropped = [], Counter()
        for i in tqdm(mine, "reading", disable=not ranks.is_first or builder.size < 10000, leave=False):
            try:
                row = builder.plain(i)
                found.append((i, row.length, row.units))
            except Unusable as reason:
                dropped[str(reason)] += 1
        return found, dropped

    parts = ranks.on_all_ranks(measure)
    dropped = sum((part[1] for part in parts), Counter())
    rows = np.array(sorted(row for part in parts for row in part[0]), dtype=np.int64).reshape(-1, 3)
    if not len(rows):
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        names = ", ".join(str(store.path) for store in builder.stores)
        raise InputError(
            f"{names}: none of {builder.size} rows can train the stage {builder.stage} ({reasons})"
        )
    examples = settings.steps * settings.batch_size or max(1, round(settings.epochs * len(rows)))
    return Plan(*rows.T, dict(dropped), settings.batch_size, examples, settings.seed)


def deal(rows: Sequence[Example], ranks: int, budget: int) -> list[list[list[Example]]]:
    """Packs for each rank, as many for one as for another, and as even in tokens as they come.

    There are as few as best-fit packing needs. Rows go, longest first, to the pack with the fewest tokens;
    where that overflows a pack, the tighter best-fit packs are taken. Packs may stay empty.
    """
    lengths = [row.length for row in rows]
    tight = pack(lengths, budget)
    count = math.ceil(len(tight) / ranks) * ranks
    even: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for i in sorted(range(len(rows)), key=lambda i: (-lengths[i], i)):
        lightest = tokens.index(min(tokens))
        even[lightest].append(i)
        tokens[lightest] += lengths[i]
    packs = even if max(tokens) <= budget else tight + [[]] * (count - len(tight))
    return [[[rows[i] for i in members] for members in packs[rank::ranks]] for rank in range(ranks)]


def stream(plan: Plan, builder: ExampleBuilder, first: int) -> Iterator[list[Example]]:
    """The global set of examples of each step; the next one is built while this one is computed."""

    def build(step: int) -> list[Example]:
        return [builder(*chosen) for chosen in plan.step(step)]

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(build, first)
        for step in range(first, plan.steps):
            rows, waiting = waiting.result(), pool.submit(build, step + 1)
            yield rows


# ---------------------------------------------------------------------------------- the loop


@dataclass
class Progress:
    """Where a run stands; saved with every resume point."""

    step: int = 0  # steps behind us, skipped ones included
    updates: int = 0  # what AdamW counts
    skipped: int = 0
    bad_in_a_row: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    loss: float | None = None


@dataclass
class Loop:
    """Optimizer steps over a stream of global batches, which is the same on every rank."""

    trainee: Trainee
    settings: TrainSettings
    ranks: parallel.Ranks
    out: Path
    steps: int
    decode: Callable[[Sequence[int]], str] = str
    at: Progress = field(default_factory=Progress)
    more: Callable[[], dict[str, Any]] = dict  # what else goes into a step's row of metrics.jsonl

    def __post_init__(self):
        self.optimizer = make_optimizer(self.trainee, self.settings)
        self.state = parallel.training_state(self.trainee, self.optimizer)
        self.resume = parallel.ResumePoints(self.out / "resume", self.ranks)

    def restore(self) -> None:
        """Continues from the newest resume point, if there is one."""
        cursor = self.resume.load(self.state)
        if cursor is not None:
            self.at = Progress(**cursor)
            for state in self.optimizer.state.values():
                state["step"].fill_(self.at.updates)
        self.ranks.on_rank_0(lambda: keep_metrics(self.out / "metrics.jsonl", self.at.step))

    def run(
        self, batches: Iterator[list[Example]], bar: tqdm, stop: threading.Event, flops: Flops = None
    ) -> None:
        """Steps until all are done; saves on the way, and saves and raises Stopped where `stop` is set."""
        settings, first = self.settings, self.ranks.is_first
        saved = clock = time.monotonic()
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
            for rows in batches:
                figures = self.step(rows)
                elapsed, clock = time.monotonic() - clock, time.monotonic()
                self.at.seconds += elapsed
                if first:
                    metrics.write(json.dumps({"step": self.at.step, **figures, "seconds": elapsed}) + "\n")
                    metrics.flush()
                share = f", {flops(rows) / elapsed:.0%} MFU" if flops else ""
                rate = f"{figures['tokens'] / elapsed:,.0f} tokens/s"
                value = math.nan if figures["loss"] is None else figures["loss"]
                bar.set_postfix_str(f"loss {value:.4f}, {rate}{share}", refresh=False)
                bar.update()
                # One clock decides for all ranks, and a signal that reached one of them stops them all.
                due = first and 0 < settings.save_minutes <= (clock - saved) / 60
                stops, due = self.ranks.all_reduce_sum(stop.is_set(), due)
                due = due or (settings.save_steps and self.at.step % settings.save_steps == 0)
                if self.at.step < self.steps and (stops or due):
                    saved = clock
                    self.resume.save(self.at.step, self.state, dataclasses.asdict(self.at))
                    if stops:
                        self.resume.finish()
                        raise Stopped
                self.resume.publish_when_written()
        self.resume.finish()

    def step(self, rows: list[Example]) -> dict[str, Any]:
        """One optimizer step on one global set of examples. A step that is not finite changes nothing.

        FSDP takes the mean of the ranks' gradients; times their number, it is the sum.
        """
        units = sum(row.units for row in rows)
        learning_rate = scheduled(self.at.step, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.ranks.device)
        for members in deal(rows, self.ranks.size, self.settings.token_budget)[self.ranks.rank]:
            value = self.trainee(collate(members, self.ranks.size / units, self.ranks.device))
            value.backward()
            total += value.detach()
        norm = nn.utils.clip_grad_norm_(self.trainee.parameters(), self.settings.clip or math.inf)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        value = self.ranks.all_reduce_sum(float(total) / self.ranks.size)[0]
        finite = math.isfinite(value) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens, at = sum(row.length for row in rows), self.at
        at.step, at.tokens, at.targets = at.step + 1, at.tokens + tokens, at.targets + units
        at.updates, at.skipped = at.updates + finite, at.skipped + (not finite)
        at.bad_in_a_row = 0 if finite else at.bad_in_a_row + 1
        if at.bad_in_a_row == BAD_STEPS:
            self.give_up(rows)
        at.loss = value if finite else at.loss
        figures = {"loss": value, "norm": norm} if finite else {"loss": None, "norm": None, "skipped": True}
        size = {"examples": len(rows), "tokens": tokens, "targets": units}
        return figures | {"lr": learning_rate} | size | self.more()

    def give_up(self, rows: list[Example]) -> None:
        place = self.out / "bad-batch.jsonl"
        if self.ranks.is_first:
            sequences = (sequence for row in rows for sequence in row.sequences)
            write_rows(place, ({**each.to_json(), "text": self.decode(each.ids)} for each in sequences))
        raise InputError(
            f"loss or gradient was not finite in {BAD_STEPS} steps in a row, up to step {self.at.step}; "
            f"the last batch is in {place}; look at it, or lower lr and begin a new run"
        )


def make_optimizer(trainee: Trainee, settings: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay and vectors (norms, biases) do not. Its state exists from the start."""
    parameters = list(trainee.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)
    for parameter in parameters:
        moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def scheduled(step: int, steps: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine down to its final share."""
    rising = math.ceil(settings.warmup * steps)
    if step < rising:
        return settings.lr * (step + 1) / rising
    way = (step - rising) / max(1, steps - rising)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * way)))


def keep_metrics(path: Path, steps: int) -> None:
    """Drops the rows of steps after the last resume point: a resumed run takes, and writes, them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with publish_file(path) as temporary:
            whole = (line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= steps)
            temporary.write_text("".join(whole), encoding="utf-8")


# ---------------------------------------------------------------------------------- what a person sees


def step_flops(config: ModelConfig, rows: Sequence[Example]) -> float:
    """Multiply-adds x 2 of forward and backward: matrices, attention, and the projection of targets."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_size
    block = config.hidden_size * (heads + 3 * config.intermediate_size)
    tokens = sum(row.length for row in rows)
    squares = sum(len(sequence.ids) ** 2 for row in rows for sequence in row.sequences)
    attention = config.num_heads * config.head_size * squares
    targets = 0 if config.num_labels else sum(row.units for row in rows)
    head = config.hidden_size * config.vocab_size * targets
    return 6.0 * (config.num_layers * (block * tokens + attention) + head)


def matmul_rate(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """bf16 FLOP/s of a square matrix product, measured: what the MFU is a share of."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        a @ a
    start.record()
    for _ in range(repeats):
        a @ a
    end.record()
    torch.cuda.synchronize()
    return 2.0 * size**3 * repeats / (start.elapsed_time(end) / 1e3)


def count_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


def memory_per_rank(settings: TrainSettings, config: ModelConfig, ranks: int, half: bool) -> dict[str, float]:
    """GB on each rank, estimated: a token leaves about 34 D + 8 F bytes in one block in bf16."""
    parameters, width = count_parameters(config), 2 if half else 4
    head = config.vocab_size * config.hidden_size
    block = (parameters - head * (2 - config.tie_embeddings)) / config.num_layers
    token = width / 2 * (34 * config.hidden_size + 8 * config.intermediate_size)
    stored = width * config.hidden_size * config.num_layers + token
    stored = stored if settings.checkpointing else token * config.num_layers
    sizes = {
        "weights, gradients and AdamW": 16 * parameters / (settings.shard or ranks),
        "gathered weights": width * (head * (2 - config.tie_embeddings) + 2 * block)
        if ranks > 1 or half
        else 0,
        "activations": settings.token_budget * stored,
        "the head's gradient": 4 * head,
    }
    return {name: size / 1e9 for name, size in sizes.items()}


def describe(
    stage: str, plan: Plan, builder: ExampleBuilder, model_dir: Path, config: ModelConfig
) -> list[str]:
    """The first lines of a run: what it trains, on what, with how many tokens and parameters."""
    epochs = plan.examples / len(plan.kept)
    names = ", ".join(str(store.path) for store in builder.stores)
    per_step = plan.lengths.mean() * min(plan.batch_size, plan.examples)
    lines = [
        f"{stage} ({EQUATION[stage]})",
        f"model    {model_dir}: {count_parameters(config):,} parameters",
        f"data     {names}: {len(plan.kept):,} examples, {plan.lengths.sum():,} tokens, "
        f"{plan.units.sum():,} {'pairs' if stage == 'discriminative' else 'target tokens'}",
        f"steps    {plan.steps:,} of {plan.batch_size} examples, about {per_step:,.0f} tokens each "
        f"({epochs:.4g} epochs)",
    ]
    lines += [f"dropped  {count:,}: {reason}" for reason, count in sorted(plan.dropped.items())]
    return lines + builder.notes


def dry_run(
    stage: str, settings: TrainSettings, data: Sequence[Path], model_dir: Path, ranks: parallel.Ranks
) -> list[str]:
    """What `train` would do with these, in lines: reads the data, and no weight."""
    builder = ExampleBuilder(stage, settings, data, model_dir)
    config = read_model_config(stage, settings, model_dir, builder.tokenizer)
    plan = make_plan(builder, settings, parallel.Ranks(0, 1, ranks.device))
    half = parallel.compute_dtype(settings, ranks.device) == torch.bfloat16
    parts = memory_per_rank(settings, config, ranks.size, half)
    memory = f"memory   about {sum(parts.values()):.3g} GB on each of {ranks.size} ranks, in GB: "
    memory += ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    return [*describe(stage, plan, builder, model_dir, config), memory]


def say(lines: Sequence[str]) -> None:
    print(*lines, sep="\n", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------- a run and its directory


def identity(stage: str, settings: TrainSettings, data: Sequence[Path], model_dir: Path) -> dict[str, str]:
    """What a run computes, field by field; a run is continued only where all of it is the same."""
    fields = {"stage": stage} | {
        name: str(value) for name, value in vars(settings).items() if name not in FREE
    }
    fields |= {f"data file {n + 1}": f"{path.name} {digest(path)}" for n, path in enumerate(data)}
    files = sorted(path for path in model_dir.iterdir() if path.is_file() and path.name != "training.json")
    return fields | {f"model's {path.name}": digest(path) for path in files}


def check_identity(found: dict[str, Any], now: dict[str, Any], out: Path, flag: str = "--out") -> None:
    names = [name for name in {**found, **now} if found.get(name) != now.get(name)]
    if names:
        differ = ", ".join(f"{name} ({found.get(name)}, now {now.get(name)})" for name in names)
        raise InputError(
            f"{out} holds another run; it differs in {differ}; name another {flag}, or remove it"
        )


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C ask for a stop between steps; a second one is not waited for."""
    stop, before = threading.Event(), {}

    def ask(number, frame):
        stop.set()
        signal.signal(number, before.get(number, signal.SIG_DFL))

    if threading.current_thread() is threading.main_thread():
        before = {kind: signal.signal(kind, ask) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def read_model_config(
    stage: str, settings: TrainSettings, model_dir: Path, tokenizer: Tokenizer
) -> ModelConfig:
    config, _ = read_config(model_dir)
    if stage == "discriminative":
        config = dataclasses.replace(config, num_labels=config.num_labels or 1)
    elif config.num_labels:
        raise InputError(f"{model_dir}: has a scalar head; the stage {stage} needs a language model")
    if config.num_labels > 1:
        raise InputError(f"{model_dir}: has {config.num_labels} scores; a reward model has one")
    if settings.max_length > config.max_positions:
        raise InputError(
            f"max_length: {settings.max_length} is beyond the model's {config.max_positions} positions"
        )
    if config.vocab_size < tokenizer.size:
        raise InputError(f"{model_dir}: the tokenizer has more ids than the model, {config.vocab_size}")
    return config


def objective_of(stage: str, settings: TrainSettings) -> loss.Objective:
    if stage == "discriminative":
        return loss.preference
    if stage == "generative" and settings.label_smoothing:
        return loss.smoothed_label(settings.label_smoothing)
    return loss.likelihood


def make_trainee(
    objective: loss.Objective,
    settings: TrainSettings,
    config: ModelConfig,
    model_dir: Path,
    ranks: parallel.Ranks,
) -> Trainee:
    """The decoder with its objective, on its ranks, filled from the checkpoint."""
    with torch.device("meta"):
        trainee = Trainee(Decoder(config), objective)
    parallel.wrap(trainee, settings, ranks)
    parallel.load_weights(
        trainee, model_dir, fresh_score=config.num_labels > read_config(model_dir)[0].num_labels
    )
    return trainee.train()


def train(
    stage: str,
    settings: TrainSettings,
    data: Sequence[Path],
    model_dir: Path,
    out: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a stage whole, or goes on with it, or finds it done; returns its figures.

    Joins a process group that exists. Raises Stopped once it has saved because a signal asked it to.
    """
    data, model_dir, out = [Path(path) for path in data], Path(model_dir), Path(out)
    with parallel.join_ranks(settings) as ranks, stop_on_signals() as stop:
        builder = ExampleBuilder(stage, settings, data, model_dir)
        config = read_model_config(stage, settings, model_dir, builder.tokenizer)
        now = ranks.on_rank_0(lambda: identity(stage, settings, data, model_dir))
        if (figures := finished(out, now)) is not None:
            return figures
        plan = make_plan(builder, settings, ranks)
        open_run(out, now, ranks)
        if ranks.is_first and progress:
            say(describe(stage, plan, builder, model_dir, config))
        trainee = make_trainee(objective_of(stage, settings), settings, config, model_dir, ranks)
        loop = Loop(trainee, settings, ranks, out, plan.steps, builder.tokenizer.decode)
        loop.restore()
        run_loop(loop, stream(plan, builder, loop.at.step), stage, config, progress, stop)
        figures = dataclasses.asdict(loop.at) | {"dropped": plan.dropped, "examples": plan.examples}
        own = {f"{builder.template_kind}_prompt.txt": builder.template} if builder.template else {}
        publish_model(loop, builder.tokenizer, config, model_dir, {"run": now, "figures": figures}, own)
        return figures


def finished(out: Path, now: dict[str, str]) -> dict[str, Any] | None:
    """The figures of a run that left its model; None while there is none. Another run's are refused."""
    if not (out / "model" / "training.json").exists():
        return None
    record = read_json(out / "model" / "training.json")
    check_identity(record["run"], now, out)
    return record["figures"]


def open_run(out: Path, now: dict[str, str], ranks: parallel.Ranks) -> None:
    """Writes down what the run is, or checks that it is what stands there. Without a state it begins anew."""
    record = out / "resume" / "run.json"
    begun = any(record.parent.glob("step-*")) and record.exists()
    ranks.on_rank_0(lambda: check_identity(read_json(record), now, out) if begun else write_json(record, now))


def run_loop(loop: Loop, batches, stage: str, config: ModelConfig, progress: bool, stop: threading.Event):
    """The loop with its progress bar; a log gets a line now and then."""
    flops = None
    if loop.ranks.device.type == "cuda":
        rate = matmul_rate(loop.ranks.device) * loop.ranks.size
        flops = lambda rows: step_flops(config, rows) / rate  # noqa: E731
    shown = {"desc": stage, "unit": "step", "disable": not (progress and loop.ranks.is_first)}
    shown["mininterval"] = 0.2 if sys.stderr.isatty() else 10
    with tqdm(total=loop.steps, initial=loop.at.step, **shown) as bar:
        try:
            loop.run(batches, bar, stop, flops)
        except Stopped:
            if loop.ranks.is_first:
                say([f"\nstopped after step {loop.at.step} of {loop.steps}; the same command continues"])
            raise


def publish_model(
    loop: Loop, tokenizer: Tokenizer, config: ModelConfig, model_dir: Path, record: dict, own: dict[str, str]
) -> None:
    """Leaves model/ with the prompts that it was trained on and the run's figures; then drops the states."""
    raw = read_config(model_dir)[1]
    named = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    wanted = named if loop.settings.save_dtype == "auto" else loop.settings.save_dtype
    extra = {path.name: path.read_text(encoding="utf-8") for path in sorted(model_dir.glob("*_prompt.txt"))}
    extra |= own | {"training.json": json.dumps(record, indent=2)}
    tensors, place = parallel.whole_tensors(loop.trainee, getattr(torch, wanted)), loop.out / "model"

    def save() -> None:
        try:
            if loop.ranks.is_first:
                save_tensors(tensors, config, raw, tokenizer, place, extra)
        except (OSError, SafetensorError) as error:
            mend = "free some space, and run it again"
            raise InputError(f"{place}: could not be written ({error}); {mend}") from None
        finally:
            for _ in tensors:  # the other ranks take part in every tensor that the first one writes
                pass

    loop.ranks.on_all_ranks(save)
    if loop.ranks.is_first:
        for state in (path for path in loop.resume.directory.iterdir() if path.is_dir()):
            shutil.rmtree(state)
