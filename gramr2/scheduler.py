"""The scheduler: which prompts and samples run in the next step of the device.

Requests come and go; their prompts are taken in turn about. Work enters and leaves a running batch as
samples finish. Prompts are computed in chunks, under a token
budget, beside the samples that are decoded; a computed prompt is the source that its samples are forked
from. When pages run out the youngest gives its own back, and is computed again later.

It knows pages, positions and slots. It leaves out: the tensors (engine.py), what was sampled, and when a
sample ends (sampler.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter

from gramr2.cache import PagePool, PageTable
from gramr2.requests import (
    Capacity,
    Chunk,
    DeviceStep,
    OpenSample,
    Prompt,
    PromptSource,
    Request,
    TokenSequence,
)

by_order = attrgetter("order")


def at_page_end(samples: Iterable[OpenSample]) -> list[OpenSample]:
    """Samples that need a page, and each exactly one, before they are decoded."""
    return [sample for sample in samples if sample.done == sample.table.length]


class Scheduler:
    """A sequence waits, is being filled, and is then among the sources or among those that run."""

    def __init__(self, capacity: Capacity):
        self.capacity = capacity
        self.queue: dict[Request, Iterator[Prompt]] = {}  # and what is left of the prompts of each
        self.next_prompt: Prompt | None = None
        self.taken_in = 0  # prompts
        self.pool = PagePool(capacity.pages, capacity.page_size)
        self.token_budget = capacity.token_budget
        self.waiting: list[TokenSequence] = []  # without pages: new, or preempted
        self.filling: list[TokenSequence] = []  # being computed in chunks
        self.sources: list[PromptSource] = []  # computed, with samples still to begin
        self.running: dict[OpenSample, int] = {}  # and the slot of each
        self.free_slots = list(range(capacity.running - 1, -1, -1))
        self.ways: dict[tuple, int] = {}  # how many of them choose in each way, the next one's turn first
        self.version = 0  # of the running batch's members

    @property
    def busy(self) -> bool:
        return bool(self.next_prompt or self.waiting or self.filling or self.sources or self.running)

    def add(self, request: Request) -> None:
        self.queue[request] = request.queue()
        if not self.next_prompt:
            self._advance()

    def drop(self, request: Request) -> None:
        """All of its work goes, and its pages come back."""
        self.queue.pop(request, None)
        if self.next_prompt and self.next_prompt.request is request:
            self._advance()
        for sequence in [*self.waiting, *self.filling, *self.sources, *self.running]:
            if sequence.prompt.request is request:
                self._take_away(sequence)

    def _advance(self) -> None:
        """The next prompt, of the request whose turn it is: a large one does not hold up the others."""
        self.next_prompt = None
        while self.queue and not self.next_prompt:
            request, prompts = next(iter(self.queue.items()))
            del self.queue[request]
            if prompt := next(prompts, None):
                self.next_prompt, self.queue[request] = prompt, prompts

    @property
    def must_preempt(self) -> bool:
        """Whether some running sample would lose its pages if the next step were planned now."""
        free = self.pool.free
        return len(self.running) > free and len(at_page_end(self._active())) > free

    def plan(self) -> DeviceStep:
        """The next step: those that run come first, then prompts in chunks, as far as the budget goes."""
        step = DeviceStep()
        active = self._grow(step)
        budget = self.token_budget - len(active)
        while True:
            for sequence in list(self.filling):
                budget = self._plan_chunks(sequence, step, budget)
            if budget <= 0 or not self._admit(step):
                break
        step.samples = self._turn(active | step.joined)
        step.positions = [sample.done for sample in step.samples]
        # No sample leaves the active ones and comes back within a version: their number tells the rest.
        step.batch_version = self.version, len(step.samples)
        for sample in step.samples:
            sample.done += 1
        return step

    def finish(self, sample: OpenSample) -> None:
        self._leave(sample)
        self.pool.release(sample.table)

    def _turn(self, ready: dict[OpenSample, int]) -> dict[OpenSample, int]:
        """A step chooses in one way: where there are several, they take turns."""
        if len(self.ways) < 2 or not ready:
            return ready
        present = {sample.prompt.request.way for sample in ready}
        way = next(way for way in self.ways if way in present)
        self.ways[way] = self.ways.pop(way)  # behind the others
        return {sample: slot for sample, slot in ready.items() if sample.prompt.request.way == way}

    def _active(self) -> dict[OpenSample, int]:
        """Those whose last token is not planned yet, and their slots."""
        return {sample: slot for sample, slot in self.running.items() if sample.done != sample.planned_length}

    def _grow(self, step: DeviceStep) -> dict[OpenSample, int]:
        """A page more for every running sample that is at its page's end, older ones first -> the active."""
        active, version = self._active(), self.version
        for sample in sorted(at_page_end(active), key=by_order):
            while not self.pool.free and sample in self.running:
                self._preempt(max([*self.running, *self.filling, *self.sources], key=by_order))
            if sample in self.running:
                step.add(self.pool.extend(sample.table, self.pool.page_size))
                step.grown.append(sample)
        return active if version == self.version else self._active()

    def _preempt(self, sequence: TokenSequence) -> None:
        """Takes its pages away. What it has written is kept, and computed again when it is admitted."""
        self._take_away(sequence)
        sequence.done = 0
        self.waiting.append(sequence)

    def _take_away(self, sequence: TokenSequence) -> None:
        """From wherever it is; its pages come back."""
        if isinstance(sequence, OpenSample) and sequence in self.running:
            self._leave(sequence)
        else:
            places: list[list] = [self.waiting, self.filling, self.sources]
            next(place for place in places if sequence in place).remove(sequence)
        self.pool.release(sequence.table)

    def _admit(self, step: DeviceStep) -> bool:
        """Lets the oldest that waits begin, if there is a slot and room for it."""
        if self.next_prompt and not (self.waiting or self.sources):
            self.waiting.append(PromptSource(prompt=self.next_prompt, place=self.taken_in))
            self.taken_in += 1
            self._advance()
        oldest = min([*self.waiting, *self.sources], key=by_order, default=None)
        if oldest is None or len(self.free_slots) <= len(self.filling):
            return False  # each of those that are filling will take a slot
        if isinstance(oldest, PromptSource) and oldest in self.sources:
            return self._fork(oldest, step)
        return self._start(oldest, step)

    def _start(self, sequence: TokenSequence, step: DeviceStep) -> bool:
        """Gives pages to a sequence whose tokens are to be computed, as far as no other has them already."""
        ids, size = sequence.prompt.ids, self.pool.page_size
        room = sequence.prefill_length
        if isinstance(sequence, OpenSample):  # with the page that it is decoded into: it must find one then
            room += size - room % size
        table = self.pool.match(ids[:-1])
        if not self._make_room(table, room - table.length, sequence):
            self.pool.release(table)
            return False
        sequence.table, sequence.done = table, table.length
        step.add(self.pool.extend(table, room - table.length))
        self.waiting.remove(sequence)
        self.filling.append(sequence)
        return True

    def _fork(self, source: PromptSource, step: DeviceStep) -> bool:
        """Begins the next sample of a computed prompt."""
        is_last = source.number + 1 == len(source.prompt.limits)
        # The last one takes the table itself: nobody forks from it again, and its half page needs no copy.
        table = source.table if is_last else self.pool.fork(source.table)
        sample = OpenSample(prompt=source.prompt, place=source.place, number=source.number)
        sample.table, sample.done = table, source.done
        more = self.pool.page_size - table.length % self.pool.page_size
        if not self._make_room(table, more, sample):
            if not is_last:
                self.pool.release(table)
            return False
        if is_last:
            self.sources.remove(source)
        source.number += 1
        step.add(self.pool.extend(table, more))
        self._join(sample, step)
        return True

    def _make_room(self, table: PageTable, count: int, sequence: TokenSequence) -> bool:
        """Whether the table can grow, with one page to spare for each running sample, which may need it.

        When nothing else runs, younger prompts that wait to be forked have to give way: also the source of
        the very sample that is to begin, unless it grows the source's own table.
        """
        if self.pool.needs(table, count) + len(self.running) <= self.pool.free:
            return True
        if self.running or self.filling:
            return False
        while self.pool.needs(table, count) > self.pool.free:
            others = [source for source in self.sources if source.table is not table]
            younger = [source for source in others if source.order >= sequence.order]
            if not younger:
                return False
            self._preempt(max(younger, key=by_order))
        return True

    def _plan_chunks(self, sequence: TokenSequence, step: DeviceStep, budget: int) -> int:
        """Plans as many of its missing tokens as the budget allows; -> what is left of the budget."""
        shared = sequence.prompt.shared_tokens(self.pool.page_size)
        while sequence.done < sequence.prefill_length and budget > 0:
            start = sequence.done
            stop = min(
                sequence.prefill_length, start + budget, shared if start < shared else sequence.prefill_length
            )
            step.chunks.append(Chunk(sequence, start, stop, list(sequence.table.pages)))
            sequence.done, budget = stop, budget - (stop - start)
            # From here on others may read these pages: they are written before anything of this step reads.
            self.pool.name(sequence.table, sequence.prompt.ids[: min(stop, shared)])
        if sequence.done == sequence.prefill_length:
            self.filling.remove(sequence)
            if isinstance(sequence, PromptSource):
                self.sources.append(sequence)
            elif isinstance(sequence, OpenSample):
                self._join(sequence, step)
        return budget

    def _join(self, sample: OpenSample, step: DeviceStep) -> None:
        self.running[sample] = step.joined[sample] = self.free_slots.pop()
        way = sample.prompt.request.way
        self.ways[way] = self.ways.get(way, 0) + 1
        self.version += 1

    def _leave(self, sample: OpenSample) -> None:
        self.free_slots.append(self.running.pop(sample))
        way = sample.prompt.request.way
        self.ways[way] -= 1
        if not self.ways[way]:
            del self.ways[way]
        self.version += 1
