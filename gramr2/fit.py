"""The one training loop. Every stage of the paper is this file with another target (stages.py).

`train` reads from top to bottom: pairs become token ids (examples.py), every step's examples are fixed before
they are split over the ranks (plan.py), the loop takes its steps, and a Hugging Face directory is left.
`Loop.step` is one of them: it calls `loss.Trainee`, which runs the decoder and then the stage's objective.

A resumed run repeats the bits of an uninterrupted one on the CPU: what is trained on is a function of the
step's number, and no generator's state is carried along. A run lives in its directory: resume/run.json says
what it trains on, resume/step-N/ are its states, metrics.jsonl has a row per step, model/ appears last and at
once, with the figures in model/training.json.

It leaves out: evaluation, and the policy's own sampling (extras/policy.py, which makes other global batches
for the same `Loop`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor

from gramr2 import parallel, resume, tokenized
from gramr2.cost import describe, matmul_rate, recomputed_blocks, step_flops
from gramr2.directories import base_of, model_files
from gramr2.examples import ExampleBuilder
from gramr2.fields import Fields, as_dataclass
from gramr2.files import (
    InputError,
    digest,
    need,
    open_file,
    parse_json,
    publish_file,
    read_json,
    read_text,
    write_json,
    write_rows,
)
from gramr2.interrupts import AGAIN
from gramr2.lora import adapt, description
from gramr2.loss import OBJECTIVES, Objective, Trainee, collate
from gramr2.model import Decoder, ModelConfig
from gramr2.optimizer import make_optimizer
from gramr2.plan import make_plan, read_model_config, split_into_packs
from gramr2.records import Example
from gramr2.seals import SEALS, check_seals, read_signed
from gramr2.settings import FREE, TrainSettings, check_identity
from gramr2.tokenizer import Tokenizer
from gramr2.weights import WORDS, read_config, save

LEFT = (
    "model",
    "resume/[!.]*",
    "metrics.jsonl",
    "rollouts.jsonl",
    "bad-batch.jsonl",
)  # by a run in its place
BAD_STEPS = 3  # steps in a row whose loss or gradient is not finite; then the run stops


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C: the state was saved, or the model published; the same call continues."""


def train(
    stage: str, settings: TrainSettings, data: Sequence[Path], model_dir: Path, out: Path
) -> dict[str, Any]:
    """Trains a stage whole, or goes on with it, or finds it done; returns its figures.

    Joins a process group that exists. Raises Stopped once it has saved because a signal asked it to.
    """
    data, model_dir, out = [Path(path) for path in data], Path(model_dir), Path(out)
    with parallel.join_ranks(settings) as ranks, stop_on_signals() as stop, ranks.only_writer(out):
        builder = ExampleBuilder(stage, settings, data, model_dir)
        tokenizer, entry = builder.tokenizer, builder.stage  # the stage's entry in the table
        config = read_model_config(entry.name, entry.head, settings, model_dir, tokenizer)
        now = ranks.on_rank_0(lambda: identity(entry.name, settings, data, model_dir))
        if (figures := ranks.on_rank_0(lambda: finished(out, now))) is not None:
            return figures
        plan = make_plan(builder, settings, ranks)
        open_run(out, now, ranks)
        if ranks.is_first:
            say(describe(plan, builder, model_dir, config))
        trainee = make_trainee(OBJECTIVES[entry.objective](settings), settings, config, model_dir, ranks)
        loop = Loop(trainee, settings, ranks, out, plan.steps, tokenizer.decode)
        loop.restore()
        batches = tokenized.global_batches(plan, builder, ranks, out / "resume", loop.cursor.step)
        loop.run(batches, stop, entry.name)
        figures = dataclasses.asdict(loop.cursor) | {"dropped": plan.dropped, "examples": plan.examples}
        own: dict[str, str] = {}
        if entry.template:  # it is asked with this prompt, and its answers are drawn as they were trained
            own[f"{entry.template}_prompt.txt"] = builder.frame.template
            own["generation_config.json"] = tokenizer.generation_config()
        publish_model(loop, tokenizer, model_dir, {"run": now, "figures": figures}, own)
        return figures


# ---------------------------------------------------------------------------------- the loop


@dataclass
class Cursor:
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
    cursor: Cursor = field(default_factory=Cursor)
    extra_figures: Callable[[], dict[str, Any]] = dict  # for a step's row of metrics.jsonl

    def __post_init__(self):
        self.weights = [*self.trainee.trained.values()]
        self.optimizer = make_optimizer(self.weights, self.settings)
        self.state = resume.training_state(self.trainee, self.optimizer)
        self.resume = resume.ResumePoints(self.out / "resume", self.ranks)

    def restore(self) -> None:
        """Continues from the newest resume point, if there is one."""
        cursor = self.resume.load(self.state)
        if cursor is not None:
            self.cursor = as_dataclass(Cursor, cursor, f"{self.resume.directory}: ")
            for state in self.optimizer.state.values():
                state["step"].fill_(self.cursor.updates)
            self.trainee.refresh()
        self.ranks.on_rank_0(lambda: keep_metrics(self.out / "metrics.jsonl", self.cursor.step))

    def run(self, batches: Iterator[list[Example]], stop: threading.Event, name: str) -> None:
        """Steps until all are done; saves on the way, and saves and raises Stopped where `stop` is set."""
        device = self.ranks.device
        rate = matmul_rate(device) * self.ranks.size if device.type == "cuda" else 0.0
        saved = clock = time.monotonic()
        with (
            self.ranks.bar(self.steps, initial=self.cursor.step, desc=name, unit="step") as bar,
            (self.out / "metrics.jsonl").open("a", encoding="utf-8") as metrics,
        ):
            for examples in batches:
                figures = self.step(examples)
                elapsed, clock = time.monotonic() - clock, time.monotonic()
                self.cursor.seconds += elapsed
                if self.ranks.is_first:
                    row = {"step": self.cursor.step, **figures, "seconds": elapsed}
                    print(json.dumps(row), file=metrics, flush=True)
                value = math.nan if figures["loss"] is None else figures["loss"]
                text = f"loss {value:.4f}, {figures['tokens'] / elapsed:,.0f} tokens/s"
                if rate:
                    flops = step_flops(self.trainee.decoder.config, examples, self.settings.lora_rank > 0)
                    text += f", {flops / rate / elapsed:.0%} MFU"
                bar.set_postfix_str(text, refresh=False)
                bar.update()
                if self.save_if_due(stop, clock - saved):
                    saved = clock
                self.resume.publish_when_written()
        self.resume.finish()

    def save_if_due(self, stop: threading.Event, since: float) -> bool:
        """One clock decides for all ranks, and a signal that reached one of them stops them all."""
        settings, step = self.settings, self.cursor.step
        late = self.ranks.is_first and 0 < settings.save_minutes <= since / 60
        stops, late_ranks = self.ranks.all_reduce_sum(stop.is_set(), late)
        due = late_ranks or (settings.save_steps and step % settings.save_steps == 0)
        if step == self.steps or not (stops or due):
            return False
        self.resume.save(step, self.state, dataclasses.asdict(self.cursor))
        if stops:
            self.resume.finish()
            if self.ranks.is_first:
                say([f"\nstopped after step {step} of {self.steps}; the same command continues"])
            raise Stopped
        return True

    def step(self, examples: list[Example]) -> dict[str, Any]:
        """One optimizer step on one global set of examples. A step that is not finite changes nothing.

        FSDP takes the mean of the ranks' gradients; times their number, it is the sum.
        """
        units = sum(example.units for example in examples)
        learning_rate = learning_rate_at(self.cursor.step, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.ranks.device)
        packs = split_into_packs(examples, self.ranks.size, self.settings.token_budget)[self.ranks.rank]
        for pack in packs:
            loss = self.trainee(collate(pack, self.ranks.size / units, self.ranks.device))
            loss.backward()
            total += loss.detach()
        whole = nn.utils.clip_grad_norm_(self.weights, self.settings.clip or math.inf)
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        own, norm = torch.stack([total, whole.to(total)]).tolist()  # the device is waited for once
        value = self.ranks.all_reduce_sum(own / self.ranks.size)[0]
        finite = math.isfinite(value) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
            self.trainee.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        tokens, cursor = sum(example.length for example in examples), self.cursor
        cursor.step += 1
        cursor.tokens += tokens
        cursor.targets += units
        cursor.updates += finite
        cursor.skipped += not finite
        cursor.bad_in_a_row = 0 if finite else cursor.bad_in_a_row + 1
        if cursor.bad_in_a_row == BAD_STEPS:
            self.give_up(examples)
        cursor.loss = value if finite else cursor.loss
        figures = {"loss": value, "norm": norm} if finite else {"loss": None, "norm": None, "skipped": True}
        size = {"examples": len(examples), "tokens": tokens, "targets": units}
        return figures | {"lr": learning_rate} | size | self.extra_figures()

    def give_up(self, examples: list[Example]) -> None:
        place = self.out / "bad-batch.jsonl"
        if self.ranks.is_first:
            sequences = (sequence for example in examples for sequence in example.sequences)
            write_rows(place, ({**each.to_json(), "text": self.decode(each.ids)} for each in sequences))
        raise InputError(
            f"loss or gradient was not finite in {BAD_STEPS} steps in a row, up to step {self.cursor.step}; "
            f"the last batch is in {place}; look at it, or lower lr and begin a new run"
        )


def say(lines: Sequence[str]) -> None:
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def make_trainee(
    objective: Objective, settings: TrainSettings, config: ModelConfig, model_dir: Path, ranks: parallel.Ranks
) -> Trainee:
    """The decoder with its objective, on its ranks, filled from a checkpoint, or an adapter and its base."""
    base = (settings.lora_rank and base_of(model_dir)) or model_dir  # of adapters that training goes on with
    with torch.device("meta"):
        trainee = Trainee(Decoder(config), objective)
        if settings.lora_rank:
            adapt(trainee.decoder, settings.lora_rank, settings.lora_alpha, settings.lora_layers)
    again = ranks.on_rank_0(lambda: recomputed_blocks(settings, config, ranks))
    parallel.wrap(trainee, dataclasses.replace(settings, recompute=again), ranks)
    stored, trainee.decoder.raw_config = read_config(base)
    parallel.load_weights(trainee, base, fresh_score=config.num_labels > stored.num_labels)
    if settings.lora_rank:
        parallel.load_adapters(trainee, model_dir, settings.seed)
    return trainee.train()


def learning_rate_at(step: int, steps: int, settings: TrainSettings) -> float:
    """Linear warm-up, then a cosine down to its final share."""
    rising = math.ceil(settings.warmup * steps)
    if step < rising:
        return settings.lr * (step + 1) / rising
    way = (step - rising) / max(1, steps - rising)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * way)))


# ---------------------------------------------------------------------------------- a run and its directory


def identity(stage: str, settings: TrainSettings, data: Sequence[Path], model_dir: Path) -> dict[str, str]:
    """What a run computes, field by field; a run is continued only where all of it is the same."""
    fields = {"stage": stage}
    fields |= {name: str(value) for name, value in vars(settings).items() if name not in FREE}
    fields |= {f"data file {n + 1}": f"{path.name} {digest(path)}" for n, path in enumerate(data)}
    for path in model_files(model_dir):
        whose = "model" if path.parent == model_dir else "base"
        fields[f"{whose}'s {path.name}"] = digest(path)
    return fields


def finished(out: Path, now: dict[str, str]) -> dict[str, Any] | None:
    """The figures of a run that left its model; None while there is none. Another run's are refused."""
    model = out / "model"
    if not (model / "training.json").exists():
        return None
    record = Fields(read_json(model / "training.json"), f"{model / 'training.json'}: ")
    check_identity(record.get("run", dict), now, out)
    if (model / SEALS).exists():
        check_seals(model, read_signed(model / SEALS), f"bring it back, or remove {model} and train it again")
    return record.get("figures", dict)


def open_run(out: Path, now: dict[str, str], ranks: parallel.Ranks) -> None:
    """Writes down what the run is, or checks that it is what stands there. Without a state it begins anew."""

    def open_or_check() -> None:
        record = out / "resume" / "run.json"
        theirs = [path for name in LEFT for path in out.glob(name)]
        need(record.exists() or not theirs, f"{[*theirs, ''][0]}: is of no run of ours; name another --out")
        if any(record.parent.glob("step-*")) and record.exists():
            check_identity(Fields(read_json(record), f"{record}: ").row, now, out)
        else:
            write_json(record, now)

    ranks.on_rank_0(open_or_check)


def keep_metrics(path: Path, steps: int) -> None:
    """Drops the rows of steps after the last resume point: a resumed run takes, and writes, them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with open_file(path) as file:
            lines = file.readlines()
        lines = lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines  # a kill has cut it
        try:
            numbers = [Fields(parse_json(line)).get("step", int) for line in lines]
        except ValueError as error:
            raise InputError(f"{path}: is damaged ({error}); remove {path.parent} to begin anew") from None
        with publish_file(path) as temporary:
            temporary.write_bytes(
                b"".join(line for line, n in zip(lines, numbers, strict=True) if n <= steps)
            )


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C ask for a stop between steps; a second one is not waited for."""
    stop, before, asked = threading.Event(), dict[int, Any](), list[float]()

    def ask(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        stop.set()
        if asked[-1] - asked[0] > AGAIN:
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        before = {kind: signal.signal(kind, ask) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if stop.is_set():  # asked when no step was left; what is behind the block would never know
        raise Stopped


def publish_model(
    loop: Loop, tokenizer: Tokenizer, model_dir: Path, record: dict[str, Any], own: dict[str, str]
) -> None:
    """Leaves model/ with the prompts that it was trained on and the run's figures; then drops the states.

    `own`: files of this training, in the place of its base's.
    """
    model, place, wanted = loop.trainee.decoder, loop.out / "model", loop.settings.save_dtype
    if wanted == "auto":
        raw = model.raw_config or {}
        wanted = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    extra = {path.name: read_text(path) for path in sorted(model_dir.glob("*_prompt.txt"))}
    extra |= own | {"training.json": json.dumps(record, indent=2)}
    tensors, adapter = parallel.whole_tensors(loop.trainee, getattr(torch, wanted)), None
    if loop.settings.lora_rank:
        layers = [WORDS[word] for word in loop.settings.lora_layers]
        base, scores = base_of(model_dir) or model_dir, model.config.num_labels
        adapter = description(base, loop.settings.lora_rank, loop.settings.lora_alpha, layers, scores)
        tensors = parallel.trained_tensors(loop.trainee)
    with loop.ranks.errors_on_all_ranks():
        try:
            if loop.ranks.is_first:
                save(model, tokenizer, place, extra, tensors, adapter)
        except (OSError, SafetensorError) as error:
            mend = "free some space, and run it again"
            raise InputError(f"{place}: could not be written ({error}); {mend}") from None
        finally:
            for _ in tensors:  # the other ranks take part in every tensor that the first one writes
                pass
    if loop.ranks.is_first:
        resume.remove(loop.resume.points())
        tokenized.remove(loop.resume.directory)
