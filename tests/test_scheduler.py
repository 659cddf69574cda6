"""The scheduler: every sample ends once, no page is written while shared, and nothing in flight gives way."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict, deque

from checkpoints import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from small_caches import LENGTHS, PAGES, cache_bytes, prompts_of

from gramr2.cache import PagePool
from gramr2.requests import Capacity, OpenSample, Prompt
from gramr2.sampler import Limits, generate
from gramr2.scheduler import Scheduler


class Asked:
    """A request, as far as a scheduler looks at one."""

    def __init__(self, prompts, way):
        self.prompts = [Prompt(self, i, *each) for i, each in enumerate(prompts)]
        self.way, self.arrives, self.leaves = (way,), 0, None

    def queue(self):
        return iter(self.prompts)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.none() | st.integers(0, 30)), max_size=3),
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 1),
    st.integers(0, 2**32),
)
def test_random_schedules_finish_every_request_once(shapes, others, spare, running, budget, lag, seed):
    """No tensors: a step is played on a model of the pages, which checks what every token finds before it.
    Requests come at some step, choose in their own way, and some are dropped before they are done."""
    size, draw = 4, random.Random(seed)
    shared = [draw.randrange(2) for _ in range(40)]
    prompts = [([*shared[: length - 1], 9][:length], [limit] * n, [0] * n) for length, n, limit in shapes]
    asked = [Asked(prompts[number :: 1 + len(others)], 0) for number in range(1 + len(others))]
    for one, (way, arrives, leaves) in zip(asked[1:], others, strict=True):
        one.way, one.arrives, one.leaves = (way,), arrives, None if leaves is None else arrives + leaves
    most = max(-(-(len(ids) + limits[0]) // size) + 2 for ids, limits, _ in prompts) + spare
    scheduler = Scheduler(Capacity(most, size, 0, running, budget, share_prefix=True))
    pages, drawn, in_flight, finished = {}, defaultdict(list), deque(), []
    gone, latest = set(), max(one.arrives for one in asked)
    for now in itertools.count():
        assert now < 10_000, "it goes round in circles"
        for one in asked:
            if one.arrives == now:
                scheduler.add(one)
            if one.leaves == now:
                scheduler.drop(one)
                gone.add(one)
        if not scheduler.busy:
            if now > latest:
                break
            continue
        draining = in_flight and scheduler.must_preempt
        if not draining:
            step = scheduler.plan()
            assert step.chunks or step.samples or in_flight, "work is left, but none of it runs"
            assert len({sample.prompt.request.way for sample in step.samples}) < 2
            play(step, pages, drawn, size)
            ids = [draw.randrange(2) for _ in step.samples]
            for sample, token in zip(step.samples, ids, strict=True):
                drawn[sample].append(token)
            in_flight.append((step.samples, ids))
        while len(in_flight) > (0 if draining else lag):
            for sample, token in zip(*in_flight.popleft(), strict=True):
                if sample not in scheduler.running:
                    assert sample in finished or sample.prompt.request in gone, "it was preempted in flight"
                    continue
                sample.new_ids.append(token)
                if len(sample.new_ids) == sample.limit or draw.random() < 0.05:
                    finished.append(sample)
                    scheduler.finish(sample)
    for one in asked:
        ends = sorted((s.prompt.index, s.number) for s in finished if s.prompt.request is one)
        wanted = [(p.index, i) for p in one.prompts for i in range(len(p.limits))]
        assert ends == wanted or (one in gone and set(ends) < set(wanted) and len(ends) == len(set(ends)))
    assert scheduler.pool.used == 0, "a page leaked"


def play(step, pages, drawn, size):
    """Each place of a page holds the whole history up to its token; written once, and read as expected."""

    def feed(ids, position, table):
        page, place = pages.setdefault(table[position // size], {}), position % size
        history = tuple(ids[: position + 1])
        assert page.get(place, history) == history, "written over what somebody holds"
        page[place] = history
        for p in range(position + 1):
            assert pages[table[p // size]][p % size] == history[: p + 1], "reads what another wrote"

    for page in step.fresh:
        pages[page] = {}
    for sequence, start, stop, table in step.chunks:
        for position in range(start, stop):
            feed(sequence.ids, position, table)
    for origin, copy in step.copies:
        pages[copy] = dict(pages[origin])
    for sample, position in zip(step.samples, step.positions, strict=True):
        feed(sample.prompt.ids + drawn[sample], position, sample.table.pages)


def test_the_small_pool_does_preempt(monkeypatch):
    """What is held with a cache of PAGES means little if nothing is preempted there, or no prefix found."""
    preempted, found = [], []
    preempt, match = Scheduler._preempt, PagePool.match

    def counting_preempt(self, sequence):
        preempted.append(sequence)
        preempt(self, sequence)

    def counting_match(self, ids):
        table = match(self, ids)
        found.append(table.length)
        return table

    monkeypatch.setattr(Scheduler, "_preempt", counting_preempt)
    monkeypatch.setattr(PagePool, "match", counting_match)
    model = random_model("llama2")
    prompts = prompts_of(LENGTHS)
    prompts.append([*prompts[-1][:48], 1])
    limits = Limits(cache_bytes=cache_bytes(model, PAGES))
    generate(model, prompts, n=3, max_new_tokens=40, stop_ids=(), progress=False, limits=limits)
    assert any(isinstance(sequence, OpenSample) for sequence in preempted)
    assert 48 in found
