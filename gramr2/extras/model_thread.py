"""The thread that runs a model for many callers: one batch that requests join and leave, and passes between.

A caller is a thread of its own, with a `Ticket`. `generate` is for it what sampler.generate is, to the bit,
whatever runs beside it; `call` runs a pass of the model. Both wait. `cut` ends what a ticket waits for: its
requests leave the batch, their pages come back, and the caller gets a `Cut`. If a step fails, everybody who
waits is told so, and nobody is served after that.

It leaves out: what is asked (serve.py), and who may ask (http_server.py).
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from gramr2.engine import Engine
from gramr2.model import Decoder
from gramr2.requests import Request
from gramr2.sampler import RunningBatch, Sample, request_of

MOST_RUNNING = 2048  # sequences that the cache is made for, as far as there is memory


class Cut(Exception):
    """The answer is not wanted any more: who asked has left, or the time is over."""


@dataclass(eq=False)
class Ticket:
    """Whose work it is."""

    cut: bool = False


TICKET: contextvars.ContextVar[Ticket] = contextvars.ContextVar("ticket")


@dataclass
class Open:
    """Who waits for a request in the batch, and what of it is there."""

    ticket: Ticket
    answer: Future[list[list[Sample]]]
    samples: list[list[Any]]
    left: int


class ModelThread(threading.Thread):
    def __init__(self, model: Decoder, when_it_fails: Callable[[], object]):
        super().__init__(name="model", daemon=True)
        self.model, self.when_it_fails = model, when_it_fails
        engine, weight, config = Engine(model), model.head_weight, model.config
        fullest = request_of(model, [[0]], MOST_RUNNING, max(1, config.max_positions - 1))
        capacity = fullest.capacity(config, weight, engine.limits)
        self.batch = RunningBatch(engine, capacity)
        self.cache = capacity.page_size, engine.pool_bytes // capacity.pages, engine.pool_bytes
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.open: dict[Request, Open] = {}
        self.failure: BaseException | None = None
        self.over = False
        self.tokens = 0  # drawn so far

    # ------------------------------------------------------------------ for the callers' threads

    def generate(self, model: Decoder, prompts: Sequence[Sequence[int]], progress=False, **options) -> list:
        """`options` are those of sampler.generate."""
        request = request_of(model, prompts, **options)
        request.needs(model.config, *self.cache)
        if not prompts:
            return []
        answer: Future[list[list[Sample]]] = self.call(self._join, request, TICKET.get())
        return answer.result()

    def call(self, function: Callable, *arguments: Any) -> Any:
        """A pass of the model, between two steps; → what it gives."""
        answer, ticket = Future[Any](), TICKET.get()
        self.jobs.put(lambda: self._do(ticket, answer, function, *arguments))
        return answer.result()

    def cut(self, ticket: Ticket) -> None:
        ticket.cut = True
        self.jobs.put(lambda: self._leave(ticket))

    def end(self) -> None:
        """When nobody waits any more."""
        self.jobs.put(self._end)
        self.join()

    # ------------------------------------------------------------------ in this thread

    def run(self) -> None:
        while not self.over:
            try:
                self._next()
            except BaseException as error:
                self._fail(error)
                self.when_it_fails()

    def _next(self) -> None:
        """A job, if there is one; otherwise a step."""
        try:
            job = self.jobs.get(block=self.failure is not None or not self.batch.busy)
        except queue.Empty:
            tokens, done = self.batch.step()
        else:
            job()
            return
        self.tokens += tokens
        for prompt, number, sample in done:
            open = self.open[prompt.request]
            open.samples[prompt.index][number] = sample
            open.left -= 1
            if not open.left:
                del self.open[prompt.request]
                open.answer.set_result(open.samples)

    def _do(self, ticket: Ticket, answer: Future, function: Callable, *arguments: Any) -> None:
        try:
            if self.failure or ticket.cut:
                raise self.failure or Cut
            answer.set_result(function(*arguments))
        except BaseException as error:
            answer.set_exception(error)

    def _join(self, request: Request, ticket: Ticket) -> Future:
        samples: list[list[Any]] = [[None] * request.n for _ in request.prompts]
        self.open[request] = Open(ticket, Future(), samples, request.n * len(samples))
        self.batch.add(request)
        return self.open[request].answer

    def _leave(self, ticket: Ticket) -> None:
        for request, open in list(self.open.items()):
            if open.ticket is ticket:
                self.batch.drop(request)
                del self.open[request]
                open.answer.set_exception(Cut())

    def _end(self) -> None:
        self.over = True

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for open in self.open.values():
            open.answer.set_exception(error)
        self.open = {}
