"""Sampling: prompts of ids in, samples of ids and log-probs out, many prompts times k samples each.

The loop of the paper draws k proofs per labelled pair and m votes per unlabelled one. Here a prompt is
computed once whatever k: its samples are forks of its cache (cache.py), and a decode step reads the pages
they share once for all of them. `RunningBatch.step` is a step of three: the scheduler (scheduler.py) plans,
the engine (engine.py) runs it, and `_collect` keeps what was drawn and ends the samples that are done.
requests.py holds what these three speak of. `generate` steps through one request; a server lets many join
a batch that runs on (extras/serve.py).

What a sample is depends on nothing but the model, its prompt and (seed, key, sample index): its noise is
hashed from those and the position. On the CPU in fp32 that holds bit for bit, whatever ran beside it: rows
are padded as far as it takes (kernels/linear_cpu.py), and a token always reads its keys in the same cuts
(batch.py). On CUDA with Triton the host works one step behind the device: what a sample computes after its
end is dropped.

It leaves out: beam search, penalties, keys and values that outlive a call (weights change between calls),
several devices (each rank samples its own shard).

Shapes: R rows of a decode step, C columns of what `choose` gives, W watched ids, S slots.
"""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm

from gramr2.cache import PagePool
from gramr2.engine import Engine
from gramr2.files import need
from gramr2.kernels.choice import Column, Options
from gramr2.model import Decoder
from gramr2.requests import Capacity, Decodes, DeviceStep, Limits, Prompt, Request, Sample
from gramr2.scheduler import Scheduler

Finished = tuple[int, int, Sample]  # index of the prompt, number of the sample
Done = tuple[Prompt, int, Sample]


def generate_iter(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    max_new_tokens: int | Sequence = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] | None = None,
    stop_texts: Sequence[str] = (),
    tokenizer: Decodes | None = None,
    watch: Sequence[int] = (),
    seed: int = 0,
    keys: Sequence[str] | None = None,
    progress: bool = True,
    limits: Limits | None = None,
    engine: Engine | None = None,
) -> Iterator[Finished]:
    """Yields (prompt index, sample index, Sample) as they finish.

    max_new_tokens: one number, one per prompt, or one list per prompt with one per sample. stop_ids: None
    takes the checkpoint's own. stop_texts are searched in what `tokenizer.decode` makes of the last tokens,
    and may span several. keys: one string per prompt, which names it to the noise; the default is a hash of
    its ids and of how often they came before. limits: how much runs at once. engine: `Engine(model)`, made
    once where many calls follow each other, so that they find its memory and its graphs ready. Everything is
    checked before anything is generated.
    """
    how = temperature, top_p, top_k, stop_ids, stop_texts, tokenizer, watch, seed, keys
    request = request_of(model, prompts, n, max_new_tokens, *how)
    engine = engine or Engine(model)
    need(engine.decoder is model, "engine: is of another model")
    limits = limits or engine.limits
    capacity = request.capacity(model.config, model.head_weight, limits, engine.pool_bytes)
    return _loop(request, capacity, engine, progress)


def request_of(
    model: Decoder, prompts: Sequence[Sequence[int]], n: int = 1, max_new_tokens: int | Sequence = 1024,
    temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, stop_ids: Sequence[int] | None = None,
    stop_texts: Sequence[str] = (), tokenizer: Decodes | None = None, watch: Sequence[int] = (),
    seed: int = 0, keys: Sequence[str] | None = None,
) -> Request:  # fmt: skip
    """The arguments of `generate`, checked but for what they take of the cache."""
    watch_W = torch.tensor(list(watch), dtype=torch.int64, device=model.head_weight.device)
    options = Options(temperature, top_p, top_k, watch_W)
    # Whole numbers: a tensor's elements are equal to none of the ids that are drawn.
    ends = frozenset(map(int, model.stop_ids if stop_ids is None else stop_ids))
    request = Request(prompts, n, max_new_tokens, options, ends, tuple(stop_texts), tokenizer, seed, keys)
    request.check(model.config)
    return request


@functools.wraps(generate_iter, assigned=(), updated=())
def generate(model: Decoder, prompts: Sequence[Sequence[int]], **options) -> list[list[Sample]]:
    """`generate_iter` with its arguments, collected: for each prompt its samples, in order."""
    samples = generate_iter(model, prompts, **options)  # checks them, before there is room for results
    results: list[list] = [[None] * options.get("n", 1) for _ in prompts]
    for prompt, number, sample in samples:
        results[prompt][number] = sample
    return results


# What `help` and editors show for the options of `generate`.
generate.__signature__ = inspect.signature(generate_iter).replace(return_annotation=list[list[Sample]])  # type: ignore[attr-defined]


def _loop(request: Request, capacity: Capacity, engine: Engine, progress: bool) -> Iterator[Finished]:
    batch = RunningBatch(engine, capacity)
    batch.add(request)
    with _Meter(request, batch.pool, progress) as meter:
        while batch.busy:
            tokens, done = batch.step()
            meter.show(tokens, done)
            yield from ((prompt.index, number, sample) for prompt, number, sample in done)


class RunningBatch:
    """An engine at work: plan, run, collect. Requests join it, and leave it, between two steps.

    `in_flight`: steps that the device has been given, and what waits for each.
    """

    def __init__(self, engine: Engine, capacity: Capacity):
        self.engine, self.scheduler = engine, Scheduler(capacity)
        self.pool, self.add, self.drop = self.scheduler.pool, self.scheduler.add, self.scheduler.drop
        self.call = engine.begin(capacity)
        self.lag = 1 if engine.graphs else 0  # steps that the host is behind the device
        self.in_flight: deque[tuple[DeviceStep, Callable[[], np.ndarray]]] = deque()

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def step(self) -> tuple[int, list[Done]]:
        """-> how many tokens were drawn, and what is finished."""
        most, tokens, done = 0, 0, []
        # What is in flight may finish samples, and must not lose its pages.
        if not (self.in_flight and self.scheduler.must_preempt):
            step = self.scheduler.plan()
            with torch.cuda.device_of(self.engine.last_id_S):  # which need not be the current one
                wait = self.engine.launch(step, self.call)
            if wait:
                self.in_flight.append((step, wait))
                most = self.lag
            elif not self.in_flight and not step.chunks:
                raise RuntimeError("work is left, but none of it can run")
        while len(self.in_flight) > most:
            step, wait = self.in_flight.popleft()
            tokens += len(step.samples)
            done += self._collect(step, wait())
        return tokens, done

    def _collect(self, step: DeviceStep, outputs_RC: np.ndarray) -> list[Done]:
        """Gives each sample what was drawn for it; -> those that are finished. (Once per sample and step:
        what is done here for each takes as long as the device takes for a row of a small model.)"""
        finished, running = [], self.scheduler.running
        ids, logprobs, failures = outputs_RC[:, : Column.WATCHED].T.tolist()
        watched = outputs_RC[:, Column.WATCHED :].tolist()
        for row, sample in enumerate(step.samples):
            if sample not in running:
                continue  # it ended in the step before, when this one was already on its way; or was dropped
            finish, new_ids, request = "", sample.new_ids, sample.prompt.request
            if failures[row]:
                finish = "error"
            else:
                new_ids.append(int(ids[row]))
                sample.logprobs.append(logprobs[row])
                sample.watched.append(watched[row])
                if new_ids[-1] in request.stop_ids or (request.stop_texts and request.ends_text(new_ids)):
                    finish = "stop"
                elif len(new_ids) == sample.limit:
                    finish = "length"
            if finish:
                self.scheduler.finish(sample)
                result = Sample(new_ids, sample.logprobs, sample.watched, finish)
                finished.append((sample.prompt, sample.number, result))
        return finished


class _Meter(tqdm):
    """A bar of samples on stderr: tokens per second, what it takes if each sample gets all the tokens that it
    may, the cache's use, and errors if there are any. Below another bar, it goes when it is done."""

    def __init__(self, request: Request, pool: PagePool, progress: bool):
        # It moves from the first tokens on, which may be minutes before a sample ends; in a log, seldom.
        seconds = 0.5 if sys.stderr.isatty() else 10
        moves = {"miniters": 0, "mininterval": seconds, "dynamic_ncols": True}
        total = request.n * len(request.prompts)
        super().__init__(total=total, unit="sample", leave=None, disable=not progress, **moves)
        self.request, self.page_pool, self.tokens, self.errors = request, pool, 0, 0
        if progress:
            self.left = sum(sum(request.new_tokens(prompt)) for prompt in range(len(request.prompts)))

    def show(self, tokens: int, done: list[Done]) -> None:
        if self.disable:
            return
        if not self.tokens:
            self.began = time.time()  # prompts are another kind of work
        self.tokens += tokens
        self.left -= tokens
        for prompt, number, sample in done:
            self.left -= prompt.limits[number] - len(sample.ids)
            self.errors += sample.finish == "error"
        text = f"cache {self.page_pool.used / self.page_pool.num_pages:.0%}"
        if self.tokens > tokens > 0:  # one step has no speed yet
            rate = self.tokens / max(1e-3, time.time() - self.began)
            text = f"{rate:,.0f} tokens/s, {text}"
            text += f", at most {self.format_interval(self.left / rate)} more" if self.left > 0 else ""
        errors = f", {self.errors} with errors" if self.errors else ""
        self.set_postfix_str(text + errors, refresh=False)
        self.update(len(done))
