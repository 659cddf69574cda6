"""Sampling: prompts of ids in, samples of ids and log-probs out, many prompts times k samples each.

The loop of the paper draws k proofs per labelled pair and m votes per unlabelled one. Here a prompt is
computed once whatever k: its samples are forks of its cache (cache.py), and a decode step reads the pages
they share once for all of them. Work enters and leaves a running batch as samples finish; prompts are
computed in chunks under a token budget beside it; when the cache is full the youngest sample gives its
blocks back, and is continued later.

What a sample is depends on nothing but the model, its prompt and (seed, key, sample index): its noise is
hashed from those and the position. On the CPU in fp32 that holds bit for bit, whatever ran beside it. Rows
are padded to a multiple of 8, and a token always reads its keys in the same cuts: a prompt's full pages
in cuts from the start (`_Prompt.split`), everything behind them in cuts from there. Whether a token
is computed in a chunk, alone, or again after its blocks were lost, makes no difference.

Prompts are computed up to their last token but one. The last is every sample's first decode row, so that
logits come from decode steps only. On CUDA with Triton those are graphs per batch size, and the host works
one step behind the device: what a sample computes after its end is dropped.

It leaves out: beam search, penalties, a cache that outlives a call (weights change between calls),
several devices (each rank samples its own shard).

Shapes: R rows of a decode step, T tokens, D width, V vocabulary, W watched ids, H query heads, G key/value
heads, K head size, N pages, P tokens of a page, I items, J queries of an item, M pages of an item, L layers,
S slots (of `writes_S`: places written to), C columns of what `choose` gives.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import os
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from gramr2.cache import NULL, BlockPool, BlockTable, Growth
from gramr2.files import InputError
from kernels.choice import Options, choose, uniforms

CPU_CACHE_BYTES = 1 << 30  # or what the longest request needs, up to half of the machine's memory
CUDA_CACHE_SHARE = 0.8  # of the memory that is free when generate is called


@dataclass(frozen=True)
class Sample:
    """One finished sample. What stopped it stays in `ids`; after an error they end before it."""

    ids: list[int]
    logprobs: list[float]  # of the untempered distribution
    watched: list[list[float]]  # for each id, the untempered log-probs of the watched ids in its place
    finish: str  # "stop", "length" or "error" (the model's logits were not finite)


@dataclass(frozen=True)
class Limits:
    """How much runs at once. None: a default for the device.

    On the CPU no result depends on any of it but block_size, which says where `_Prompt.split` cuts.
    """

    cache_bytes: int | None = None  # on the CPU 1 GiB, or more where one request alone needs more
    block_size: int | None = None  # tokens of a page: 16 on the CPU, 64 on CUDA; divides 128
    running: int = 256  # samples decoded together
    token_budget: int | None = None  # of a step, prompts' chunks and decode rows: 1024, on CUDA 8192
    share_prefix: bool = True  # False reads a shared prefix once per sample; for measuring what it buys

    def for_device(self, device: torch.device) -> Limits:
        cuda = device.type == "cuda"
        cache_bytes = self.cache_bytes or (int(_free_bytes(device) * CUDA_CACHE_SHARE) if cuda else None)
        size, budget = self.block_size or (64 if cuda else 16), self.token_budget or (8192 if cuda else 1024)
        return replace(self, cache_bytes=cache_bytes, block_size=size, token_budget=budget)


def _free_bytes(device: torch.device) -> int:
    held_idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held_idle


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------------------
# What is to be done: prompts, sequences, and the scheduler that decides what the next step computes


@dataclass(eq=False)
class _Prompt:
    index: int
    ids: list[int]
    key: str
    limits: list[int]  # one per sample
    started: int = 0  # samples that have begun

    def split(self, block_size: int) -> int:
        """Tokens in full pages, which all samples share; everything behind is read in a second part."""
        return (len(self.ids) - 1) // block_size * block_size


@dataclass(eq=False)
class _Sequence:
    """A sample; or, with the number behind the last sample's, what the prompt's samples are forked from."""

    prompt: _Prompt
    number: int
    table: BlockTable = field(default_factory=BlockTable)
    done: int = 0  # tokens whose keys and values are computed, or planned
    outputs: np.ndarray | None = None  # rows of `choose` so far, while it is not running
    slot: int = -1

    @property
    def rank(self) -> tuple[int, int]:
        """Older first."""
        return self.prompt.index, self.number

    @property
    def is_source(self) -> bool:
        return self.number == len(self.prompt.limits)

    @property
    def ids(self) -> list[int]:
        return self.prompt.ids if self.outputs is None else self.prompt.ids + _ids(self.outputs)

    @property
    def target(self) -> int:
        """Tokens that have to be in the cache before it can be decoded, or forked."""
        return len(self.prompt.ids) - 1 + (0 if self.outputs is None else len(self.outputs))


class _Chunk(NamedTuple):
    """Tokens start to stop of a sequence, to be computed into the blocks it had when this was planned."""

    sequence: _Sequence
    start: int
    stop: int
    blocks: list[int]


@dataclass
class _Step:
    """What the device does next, in this order."""

    fresh: list[int] = field(default_factory=list)  # pages to clear
    chunks: list[_Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # pages to copy: from, to
    joined: list[_Sequence] = field(default_factory=list)  # new in the running batch
    slots: np.ndarray | None = None  # the rows to decode,
    positions: np.ndarray | None = None  # where the tokens they feed stand,
    tenants: np.ndarray | None = None  # and whose slots they were

    def add(self, growth: Growth) -> None:
        self.fresh += growth.fresh
        self.copies += growth.copies


class Scheduler:
    """Decides what runs. Knows blocks, positions and slots; looks at no id's value, and holds no tensor."""

    def __init__(
        self, prompts: Iterator[_Prompt], pool: BlockPool, limits: Limits, settle: Callable[[], None]
    ):
        self.queue, self.pool, self.limits = prompts, pool, limits
        self.settle = settle  # collects what is still being computed, so that nothing in flight is preempted
        self.next_prompt = next(self.queue, None)
        self.waiting: list[_Sequence] = []  # without blocks: preempted
        self.filling: list[_Sequence] = []  # being computed in chunks
        self.sources: list[_Sequence] = []  # computed, with samples still to begin
        self.running: dict[int, _Sequence] = {}  # by slot
        self.free_slots = list(range(limits.running - 1, -1, -1))
        self.position = np.zeros(limits.running, np.int64)  # of the token that is fed next
        self.capacity = np.zeros(limits.running, np.int64)
        self.last = np.zeros(limits.running, np.int64)  # position that feeds the last token
        self.tenant = np.zeros(limits.running, np.int64)  # changes when a slot's sample leaves
        self.count = np.zeros(limits.running, np.int64)  # of outputs collected
        self.outputs = np.zeros((limits.running, 0, 3))
        self.version = 0  # of the running batch's members and tables

    @property
    def busy(self) -> bool:
        return bool(self.next_prompt or self.waiting or self.filling or self.sources or self.running)

    def plan(self) -> _Step:
        """The next step: those that run come first, then prompts in chunks, as far as the budget goes."""
        step = _Step()
        self._grow(step)
        budget = self.limits.token_budget - len(self._active())
        for sequence in list(self.filling):
            budget = self._fill(sequence, step, budget)
        while budget > 0 and self._admit(step):
            for sequence in list(self.filling):
                budget = self._fill(sequence, step, budget)
        step.slots = self._active()
        step.positions = self.position[step.slots]
        step.tenants = self.tenant[step.slots]
        self.position[step.slots] += 1
        return step

    def record(self, step: _Step, outputs_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keeps what a step gave, less the rows of those who have left since; -> (its rows, their slots)."""
        rows = np.flatnonzero(step.tenants == self.tenant[step.slots])
        slots = step.slots[rows]
        counts = self.count[slots]
        longest = counts.max(initial=0) + 1
        if self.outputs.shape[1] < longest or self.outputs.shape[2] != outputs_RC.shape[1]:
            grown = np.zeros((len(self.tenant), 2 * longest, outputs_RC.shape[1]))
            grown[:, : self.outputs.shape[1], : self.outputs.shape[2]] = self.outputs
            self.outputs = grown
        self.outputs[slots, counts] = outputs_RC[rows]
        self.count[slots] += 1
        return rows, slots

    def finish(self, sequence: _Sequence) -> None:
        self._leave(sequence)
        self.pool.release(sequence.table)

    def _active(self) -> np.ndarray:
        slots = np.fromiter(self.running, np.int64, len(self.running))
        return slots[self.position[slots] <= self.last[slots]]

    def _grow(self, step: _Step) -> None:
        """A page more for every running sample that is at its end, older ones first."""
        slots = self._active()
        full = [self.running[slot] for slot in slots[self.position[slots] == self.capacity[slots]]]
        for sequence in sorted(full, key=lambda s: s.rank):
            while sequence.slot >= 0 and not self.pool.free:
                self.settle()
                if not self.pool.free and sequence.slot >= 0:
                    ref_counts = *self.running.values(), *self.filling, *self.sources
                    self._preempt(max(ref_counts, key=lambda s: s.rank))
            if sequence.slot >= 0:
                step.add(self.pool.extend(sequence.table, self.pool.block_size))
                self.capacity[sequence.slot] += self.pool.block_size
                self.version += 1

    def _preempt(self, sequence: _Sequence) -> None:
        """Takes its blocks away. What it has written is kept, and computed again when it is admitted."""
        if sequence.slot >= 0:
            self._leave(sequence)
        else:
            (self.filling if sequence in self.filling else self.sources).remove(sequence)
        self.pool.release(sequence.table)
        sequence.done = 0
        self.waiting.append(sequence)

    def _admit(self, step: _Step) -> bool:
        """Lets the oldest that waits begin, if there is a slot and room for it."""
        candidates = sorted(
            [*self.waiting, *self.sources],
            key=lambda s: (s.prompt.index, s.prompt.started) if s in self.sources else s.rank,
        )
        promised = sum(not s.is_source or s.prompt.started < s.number for s in self.filling)
        if len(self.free_slots) <= promised or not (candidates or self.next_prompt):
            return False
        if candidates and candidates[0] in self.sources:
            return self._begin(candidates[0], step)
        sequence = candidates[0] if candidates else _Sequence(self.next_prompt, len(self.next_prompt.limits))
        if not self._start(sequence, step):
            return False
        if candidates:
            self.waiting.remove(sequence)
        else:
            self.next_prompt = next(self.queue, None)
        return True

    def _start(self, sequence: _Sequence, step: _Step) -> bool:
        """Gives blocks to a sequence whose tokens are to be computed, as far as no other has them already."""
        prompt, size = sequence.prompt, self.pool.block_size
        # A sample is given its next decode page with the rest, for it must find one when it is computed.
        room = sequence.target if sequence.is_source else (sequence.target // size + 1) * size
        table = self.pool.match(prompt.ids[: len(prompt.ids) - 1])
        if not self._room(lambda: self.pool.needs(table, room - table.length), sequence):
            self.pool.release(table)
            return False
        sequence.table, sequence.done = table, table.length
        step.add(self.pool.extend(table, room - table.length))
        self.filling.append(sequence)
        return True

    def _begin(self, source: _Sequence, step: _Step) -> bool:
        """Forks the next sample from a computed prompt."""
        prompt, size = source.prompt, self.pool.block_size
        sample = _Sequence(prompt, prompt.started, self.pool.fork(source.table), source.done)
        last = prompt.started + 1 == source.number
        if last:  # nobody forks from it again, and its half page needs no copy
            self.pool.release(source.table)
            self.sources.remove(source)
        more = size - sample.table.length % size
        if not self._room(lambda: self.pool.needs(sample.table, more), sample):
            if last:
                source.table = self.pool.fork(sample.table)
                self.sources.append(source)
            self.pool.release(sample.table)
            return False
        prompt.started += 1
        step.add(self.pool.extend(sample.table, more))
        self._join(sample, step)
        return True

    def _room(self, needs: Callable[[], int], sequence: _Sequence) -> bool:
        """Whether there are blocks for it, with one to spare for each running sample, which may need it.

        When nothing else runs, younger prompts that wait to be forked have to give way.
        """
        if needs() + len(self.running) <= self.pool.free:
            return True
        if self.running or self.filling:
            return False
        while needs() > self.pool.free:
            younger = [s for s in self.sources if s.rank > sequence.rank]
            if not younger:
                return False
            self._preempt(max(younger, key=lambda s: s.rank))
        return True

    def _fill(self, sequence: _Sequence, step: _Step, budget: int) -> int:
        """Plans as many of its missing tokens as the budget allows; -> what is left of the budget."""
        split = sequence.prompt.split(self.pool.block_size)
        while sequence.done < sequence.target and budget > 0:
            start = sequence.done
            stop = min(sequence.target, start + budget, split if start < split else sequence.target)
            step.chunks.append(_Chunk(sequence, start, stop, list(sequence.table.blocks)))
            sequence.done, budget = stop, budget - (stop - start)
            # From here on others may read these pages: they are written before anything of this step reads.
            self.pool.name(sequence.table, sequence.prompt.ids[: min(stop, split)])
        if sequence.done == sequence.target:
            self.filling.remove(sequence)
            if sequence.is_source:
                self.sources.append(sequence)
            else:
                self._join(sequence, step)
        return budget

    def _join(self, sample: _Sequence, step: _Step) -> None:
        slot = sample.slot = self.free_slots.pop()
        self.running[slot] = sample
        self.position[slot] = sample.done
        self.capacity[slot] = sample.table.length
        self.last[slot] = len(sample.prompt.ids) + sample.prompt.limits[sample.number] - 2
        self.count[slot] = 0 if sample.outputs is None else len(sample.outputs)
        if self.count[slot]:
            self.outputs[slot, : self.count[slot]] = sample.outputs
        step.joined.append(sample)
        self.version += 1

    def _leave(self, sample: _Sequence) -> None:
        sample.outputs = self.outputs[sample.slot, : self.count[sample.slot]].copy()
        del self.running[sample.slot]
        self.tenant[sample.slot] += 1
        self.free_slots.append(sample.slot)
        sample.slot = -1
        self.version += 1


# ---------------------------------------------------------------------------------------------------------
# What the device does: the cache's tensors, the two kinds of pass, and the choice of a token


QUERY_ROWS = 64  # of one item, on CUDA: what a program of the kernel takes; the CPU takes any number


class Engine:
    """A model, its pool of pages, and the options of one call."""

    def __init__(self, model, blocks: int, longest: int, limits: Limits, options: Options, seed: int):
        config, weight = model.config, model.head_weight
        self.limits, self.options, self.seed, self.device = limits, options, seed, weight.device
        # Larger models wait for their weights anyway, and a copy of them would cost memory.
        small = self.device.type == "cpu" and sum(p.nbytes for p in model.parameters()) < 1 << 26
        self.model = _by_columns(model) if small else model
        shape = config.num_layers, blocks, limits.block_size, config.num_kv_heads, config.head_size
        self.pools = [torch.empty(shape, dtype=weight.dtype, device=self.device) for _ in range(2)]
        self._clear([NULL])
        # One more than there are slots: what rows that only pad a batch read and write.
        self.last_S = torch.zeros(limits.running + 1, dtype=torch.int64, device=self.device)
        self.streams_S = np.zeros(limits.running + 1, np.int64)
        self.pages = longest // limits.block_size + 2  # of the longest table
        self.version, self.batch, self.prefix = None, None, []
        self.project = _projection(weight)
        self.cuda = self.device.type == "cuda"
        self.members = QUERY_ROWS * config.num_kv_heads // config.num_heads if self.cuda else None
        self.graphs = _Graphs(self) if self.cuda and kernels.backend(self.device) == "triton" else None

    @torch.inference_mode()
    def launch(self, step: _Step, scheduler: Scheduler) -> Callable[[], np.ndarray] | None:
        """Starts a step; -> what waits for the decoded rows' outputs, if there are any."""
        if step.fresh and not self.graphs:
            self._clear(step.fresh)
        if step.chunks:
            self._prefill(step.chunks)
        if step.copies:
            origin, copy = (self._upload(blocks) for blocks in zip(*step.copies, strict=True))
            for pool_LNPGK in self.pools:
                pool_LNPGK[:, copy] = pool_LNPGK[:, origin]
        if step.joined:
            slots = [sample.slot for sample in step.joined]
            self.last_S[self._upload(slots)] = self._upload([sample.ids[-1] for sample in step.joined])
            self.streams_S[slots] = [stream(self.seed, s.prompt.key, s.number) for s in step.joined]
        if not len(step.slots):
            return None
        arrays = self._arrays(step, scheduler)
        if self.graphs:
            return self.graphs.launch(arrays)
        for name, fill in ("slots", self.limits.running), ("positions", 0), ("streams", 0):
            arrays[name] = _pad(arrays[name], fill)
        batch = {name: self._upload(array) for name, array in arrays.items()}
        outputs_RC = self.decode(batch, self.prefix)
        return lambda: outputs_RC.cpu().numpy()

    def _clear(self, pages: list[int]) -> None:
        """Hidden keys are read, and weighed with 0: what stands there must not be NaN."""
        for pool_LNPGK in self.pools:
            pool_LNPGK[:, pages] = 0

    def _upload(self, values) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.int64))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.cuda else tensor

    def _prefill(self, chunks: list[_Chunk]) -> None:
        size, ids, positions, writes, prefix, own = self.limits.block_size, [], [], [], [], []
        for sequence, start, stop, blocks in chunks:
            split, place, blocks = sequence.prompt.split(size), np.arange(start, stop), np.array(blocks)
            rows = np.arange(len(ids), len(ids) + stop - start)
            ids += sequence.ids[start:stop]
            positions.append(place)
            writes.append(blocks[place // size] * size + place % size)
            first = 0 if start < split else split
            if first:
                prefix += self._items(rows, np.full(len(rows), first), blocks[: first // size])
            own += self._items(rows, place - first + 1, blocks[first // size : -(-stop // size)])
        reads = [self._reads(items) for kind in (prefix, own) for items in self._alike(kind)]
        ids_T, positions_T = (self._upload(_pad(x, 0)) for x in (np.array(ids), np.concatenate(positions)))
        self.model(ids_T, positions_T, self._attend(self._upload(np.concatenate(writes)), reads))

    def _reads(self, items: list[tuple]) -> kernels.Reads:
        return kernels.Reads(*map(self._upload, _columns(items)))

    def _alike(self, items: list[tuple]) -> list[list[tuple]]:
        """What one read takes: on CUDA all of a kind, elsewhere those that little padding makes alike."""
        kinds: dict[int, list[tuple]] = {}
        for item in items:
            kinds.setdefault(0 if self.cuda else len(item[0]).bit_length(), []).append(item)
        return list(kinds.values())

    def _items(self, rows: np.ndarray, visible: np.ndarray, blocks: np.ndarray) -> list[tuple]:
        step = self.members or len(rows)
        return [(rows[i : i + step], visible[i : i + step], blocks) for i in range(0, len(rows), step)]

    def _attend(self, writes_S: Tensor, reads: list[kernels.Reads]):
        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            pools = [pool_LNPGK[layer] for pool_LNPGK in self.pools]
            kernels.write_kv(k_TGK, v_TGK, *pools, writes_S)
            return kernels.attend_pages(q_THK, *pools, reads)

        return attend

    def _arrays(self, step: _Step, scheduler: Scheduler) -> dict[str, np.ndarray]:
        """The decode batch. What a prompt's samples share is rebuilt only when the batch changes."""
        size, slots = self.limits.block_size, step.slots
        if self.version != (scheduler.version, len(slots)):
            self.batch = self._batch([scheduler.running[slot] for slot in slots])
            self.version = scheduler.version, len(slots)
        split_R, own_RM, prefix = self.batch
        behind = step.positions - split_R
        return {
            "slots": slots,
            "positions": step.positions,
            "streams": self.streams_S[slots],
            "writes": own_RM[np.arange(len(slots)), behind // size] * size + behind % size,
            "own rows": np.arange(len(slots))[:, None],
            "own visible": behind[:, None] + 1,
            "own pages": own_RM,
            **prefix,
        }

    def _batch(self, samples: list[_Sequence]):
        """-> (where each sample's own part begins, its pages from there, reads of what is shared)."""
        size, groups = self.limits.block_size, {}
        split_R = np.array([sample.prompt.split(size) for sample in samples])
        own_RM = _stack(
            [s.table.blocks[split // size :] for s, split in zip(samples, split_R, strict=True)], NULL
        )
        for row, (sample, split) in enumerate(zip(samples, split_R, strict=True)):
            if split:
                alone = () if self.limits.share_prefix else (row,)
                groups.setdefault((tuple(sample.table.blocks[: split // size]), alone), []).append(row)
        items = [
            (rows, np.full(len(rows), split_R[rows[0]]), blocks)
            for (blocks, _), members in groups.items()
            for rows, _, blocks in self._items(np.array(members), np.array(members), blocks)
        ]
        if not self.graphs:  # which read it from their buffers; here it is laid out once for many steps
            self.prefix = [self._reads(items)] if items else []
            return split_R, own_RM, {}
        names = "prefix rows", "prefix visible", "prefix pages"
        return split_R, own_RM, dict(zip(names, _columns(items), strict=True) if items else ())

    def decode(self, batch: dict[str, Tensor], prefix: Sequence[kernels.Reads] = ()) -> Tensor:
        """One token for each row -> outputs of `choose`; also kept as what the row reads next."""
        reads = [*prefix]
        reads += [
            kernels.Reads(*(batch[f"{part} {field}"] for field in ("rows", "visible", "pages")))
            for part in ("prefix", "own")
            if f"{part} rows" in batch
        ]
        ids_R = self.last_S[batch["slots"]]
        hidden_RD = self.model(ids_R, batch["positions"], self._attend(batch["writes"], reads))
        logits_RV = self.project(hidden_RD).float()
        outputs_RC = choose(logits_RV, uniforms(batch["streams"], batch["positions"]), self.options)
        self.last_S[batch["slots"]] = outputs_RC[:, 0].long()
        return outputs_RC


class _Graphs:
    """Decode on CUDA: a graph per batch size over fixed buffers, captured when first met.

    A step is one copy to the device, one graph, one copy back; the host waits for none of them until it
    collects. Three sets of host buffers take turns, since at most two steps are in flight.
    """

    def __init__(self, engine: Engine):
        # A cycle would keep the cache until Python looks for cycles, and the next call finds no memory.
        self.engine = weakref.proxy(engine)
        self.pool, self.graphs, self.turn = torch.cuda.graph_pool_handle(), {}, 0

    def launch(self, arrays: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
        rows = len(arrays["slots"])
        size = min(_bucket(rows), self.engine.limits.running)
        if size not in self.graphs:
            self.graphs[size] = self._capture(size)
        graph, device, hosts, outputs_RC, returned = self.graphs[size]
        self.turn = (self.turn + 1) % len(hosts)
        host, back_RC = hosts[self.turn], returned[self.turn]
        for name, buffer in self._views(host.numpy(), size).items():
            buffer[...] = self._fill(name)
            if name in arrays:
                buffer[tuple(map(slice, arrays[name].shape))] = arrays[name]
        device.copy_(host, non_blocking=True)
        graph.replay()
        back_RC.copy_(outputs_RC, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> np.ndarray:
            done.synchronize()
            return back_RC.numpy()[:rows].copy()

        return wait

    def _fill(self, name: str) -> int:
        """Rows that pad a batch sit in the spare slot, write to the null page and see nothing."""
        return {"slots": self.engine.limits.running, "prefix rows": -1, "own rows": -1}.get(name, 0)

    def _views(self, flat, size: int) -> dict:
        """The arrays of a batch of this size, in a row in a flat buffer; for None, where each ends."""
        shapes = dict.fromkeys(("slots", "positions", "streams", "writes"), (size,))
        shapes |= {"own rows": (size, 1), "own visible": (size, 1), "own pages": (size, self.engine.pages)}
        shapes |= dict.fromkeys(("prefix rows", "prefix visible"), (size, self.engine.members))
        shapes |= {"prefix pages": (size, self.engine.pages)}
        views, start = {}, 0
        for name, shape in shapes.items():
            stop = start + int(np.prod(shape))
            views[name] = stop if flat is None else flat[start:stop].reshape(shape)
            start = stop
        return views

    def _capture(self, size: int):
        length = self._views(None, size)["prefix pages"]
        hosts = [torch.empty(length, dtype=torch.int64, pin_memory=True) for _ in range(3)]
        device = torch.empty(length, dtype=torch.int64, device=self.engine.device)
        batch = self._views(device, size)
        for name, buffer in batch.items():
            buffer.fill_(self._fill(name))
        # The first run compiles and allocates, on a batch of padding, which leaves no trace.
        stream = torch.cuda.Stream(self.engine.device)
        stream.wait_stream(torch.cuda.current_stream(self.engine.device))
        with torch.cuda.stream(stream):
            self.engine.decode(batch)
        torch.cuda.current_stream(self.engine.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread is held to what a capture allows: another may be writing a resume point.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs_RC = self.engine.decode(batch)
        returned = [torch.empty(outputs_RC.shape, dtype=outputs_RC.dtype, pin_memory=True) for _ in hosts]
        return graph, device, hosts, outputs_RC, returned


def _bucket(rows: int) -> int:
    """The batch size that a graph is made for: few graphs, and less than a third of a batch is padding."""
    step = max(1, 1 << (rows - 1).bit_length() >> 2)
    return -(-rows // step) * step


def _pad(array: np.ndarray, fill: int) -> np.ndarray:
    return np.pad(array, (0, -len(array) % kernels.ROWS), constant_values=fill)


def _stack(lists: Sequence, fill: int) -> np.ndarray:
    array = np.full((len(lists), max(map(len, lists))), fill, np.int64)
    for row, values in zip(array, lists, strict=True):
        row[: len(values)] = values
    return array


def _columns(items: list[tuple]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, visible, blocks) of each item, as the three arrays of `kernels.Reads`."""
    rows, visible, blocks = zip(*items, strict=True)
    return _stack(rows, -1), _stack(visible, 0), _stack(blocks, NULL)


def _by_columns(module: torch.nn.Module) -> torch.nn.Module:
    """The same function, with matrices copied column by column: few rows are 1.3 times faster then."""
    twin = copy.copy(module)
    twin._modules = {name: child and _by_columns(child) for name, child in module._modules.items()}
    if isinstance(module, torch.nn.Linear):
        twin._parameters = {**module._parameters, "weight": module.weight.detach().t().contiguous().t()}
    return twin


def _projection(weight_VD: Tensor) -> Callable[[Tensor], Tensor]:
    """hidden -> logits. On the CPU the weight is laid out for it once: few rows are 1.5 times faster then."""
    cpu = weight_VD.device.type == "cpu" and weight_VD.dtype == torch.float32
    if not cpu or not torch.backends.mkldnn.is_available():
        return lambda hidden_RD: torch.nn.functional.linear(hidden_RD, weight_VD)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_VD.detach(), kernels.ROWS)
    return lambda hidden_RD: torch.ops.mkldnn._linear_pointwise(hidden_RD, packed, None, "none", [], "")


def stream(seed: int, key: str, number: int) -> int:
    """The 64 bits that a sample's noise is made of, hashed once; positions are mixed in by `uniforms`."""
    digest = hashlib.blake2b(f"{seed}\n{number}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _ids(outputs: np.ndarray) -> list[int]:
    return outputs[:, 0].astype(np.int64).tolist()


# ---------------------------------------------------------------------------------------------------------
# The two functions that callers use


def generate_iter(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    max_new_tokens: int | Sequence = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] | None = None,
    stop_texts: Sequence[str] = (),
    tokenizer=None,
    watch: Sequence[int] = (),
    seed: int = 0,
    keys: Sequence[str] | None = None,
    progress: bool = True,
    limits: Limits | None = None,
) -> Iterator[tuple[int, int, Sample]]:
    """Yields (prompt index, sample index, Sample) as they finish.

    max_new_tokens: one number, one per prompt, or one list per prompt with one per sample. stop_ids: None
    takes the checkpoint's own. stop_texts are searched in what `tokenizer.decode` makes of the last tokens,
    and may span several. keys: one string per prompt, which names it to the noise; the default is a hash of
    its ids and of how often they came before. limits: how much runs at once. Everything is checked before
    anything is generated.
    """
    device, vocabulary = model.head_weight.device, model.config.vocab_size
    limits = (limits or Limits()).for_device(device)
    _need(n >= 1, f"n is {n}; it must be at least 1")
    _need(0 <= temperature < float("inf"), f"temperature is {temperature}; it must be 0 (greedy) or positive")
    _need(0 < top_p <= 1, f"top_p is {top_p}; it must be in (0, 1]")
    _need(top_k >= 0, f"top_k is {top_k}; it must be 0 (no limit) or positive")
    _need(not stop_texts or tokenizer is not None, "stop_texts needs tokenizer=")
    _need(all(stop_texts), "stop_texts holds an empty text")
    for token in watch:
        _need(0 <= token < vocabulary, f"watch holds id {token}; the vocabulary has 0 to {vocabulary - 1}")
    for name, values in ("keys", keys), ("max_new_tokens", max_new_tokens):
        if isinstance(values, Sequence):
            _need(len(values) == len(prompts), f"{name} has {len(values)} entries for {len(prompts)} prompts")

    def allowed(index: int) -> list[int]:
        value = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[index]
        return [value] * n if isinstance(value, int) else list(value)

    blocks, longest = _check_prompts(model.config, model.head_weight.itemsize, prompts, n, allowed, limits)
    options = Options(temperature, top_p, top_k, torch.tensor(list(watch), dtype=torch.int64, device=device))
    stop_ids = getattr(model, "stop_ids", ()) if stop_ids is None else stop_ids
    stops = _Stops(np.array(list(stop_ids), np.int64), tuple(stop_texts), tokenizer)
    engine = Engine(model, blocks, longest, limits, options, seed)
    return _run(engine, _intake(prompts, keys, allowed), blocks, stops, n * len(prompts), progress)


@functools.wraps(generate_iter, assigned=(), updated=())
def generate(model, prompts, **options) -> list[list[Sample]]:
    """`generate_iter` with its arguments, collected: for each prompt its samples, in order."""
    iterator = generate_iter(model, prompts, **options)
    results: list[list] = [[None] * options.get("n", 1) for _ in prompts]
    for prompt, number, sample in iterator:
        results[prompt][number] = sample
    return results


# What `help` and editors show for the options of `generate`.
generate.__signature__ = inspect.signature(generate_iter).replace(return_annotation=list[list[Sample]])


def _need(holds: bool, message: str, *values) -> None:
    if not holds:
        raise InputError(message.format(*values))


def _check_prompts(config, itemsize: int, prompts, n: int, allowed, limits: Limits) -> tuple[int, int]:
    """Every prompt, against vocabulary, model and cache; -> (blocks of the cache, longest sequence)."""
    size, last, room = limits.block_size, config.vocab_size - 1, config.max_positions
    _need(kernels.KEYS % size == 0, f"block_size is {size}; it must divide {kernels.KEYS}")
    per_block = 2 * config.num_layers * config.num_kv_heads * config.head_size * size * itemsize
    cache_bytes = limits.cache_bytes or max(CPU_CACHE_BYTES, _memory() // 2)
    affordable = cache_bytes // per_block
    wanted, largest, most = 2, 2, 0  # the null block, and one
    asked = "prompt {} has {} tokens and may get {} more"
    costly = f"{asked}, which takes {{:,}} bytes of cache; the limit is {cache_bytes:,}"
    for index, ids in enumerate(prompts):
        _need(len(ids) > 0, "prompt {} is empty; it needs at least one id", index)
        for token in (min(ids), max(ids)):
            _need(0 <= token <= last, "prompt {} holds id {}; the vocabulary has 0 to {}", index, token, last)
        row = allowed(index)
        of = f"max_new_tokens of prompt {index}"
        _need(len(row) == n, "{} has {} entries for n = {} samples", of, len(row), n)
        _need(min(row) >= 1, "{} is {}; it must be at least 1", of, min(row))
        longest, question = len(ids) + max(row), (index, len(ids), max(row))
        _need(longest <= room, asked + ": {}, but the model takes at most {}", *question, longest, room)
        # One block more than it fills: the prompt's last, half full, is copied when it is forked.
        needed = -(-longest // size) + 1
        _need(needed + 1 <= affordable, costly, *question, (needed + 1) * per_block)
        wanted, largest, most = wanted + n * needed, max(largest, needed + 1), max(most, longest)
    if limits.cache_bytes is None:
        affordable = max(CPU_CACHE_BYTES // per_block, largest)
    return min(affordable, wanted), most


def _intake(prompts, keys, allowed: Callable[[int], list[int]]) -> Iterator[_Prompt]:
    seen: Counter[bytes] = Counter()
    for index, ids in enumerate(prompts):
        ids = [int(i) for i in ids]
        if keys is None:
            digest = hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=16).digest()
            key = f"{digest.hex()}/{seen[digest]}"
            seen[digest] += 1
        else:
            key = keys[index]
        yield _Prompt(index, ids, key, allowed(index))


@dataclass(frozen=True)
class _Stops:
    ids: np.ndarray
    texts: tuple[str, ...]
    tokenizer: object

    def found(self, ids: list[int]) -> bool:
        """Whether a stop text ends in the last token. A token may be less than a character, but rarely is."""
        text = self.tokenizer.decode(ids[-(max(map(len, self.texts)) + 8) :])
        return any(stop in text for stop in self.texts)


def _run(engine: Engine, queue: Iterator[_Prompt], blocks: int, stops: _Stops, total: int, progress: bool):
    flying: deque[tuple[_Step, Callable[[], np.ndarray]]] = deque()
    finished: list[tuple[int, int, Sample]] = []

    def collect() -> None:
        step, wait = flying.popleft()
        finished.extend(_collect(scheduler, step, wait(), stops))

    def settle() -> None:
        while flying:
            collect()

    lag = 1 if engine.graphs else 0  # steps that the host is behind the device
    pool = BlockPool(blocks, engine.limits.block_size)
    scheduler = Scheduler(queue, pool, engine.limits, settle)
    counts: Counter[str] = Counter()
    with tqdm(total=total, unit="sample", disable=not progress, dynamic_ncols=True) as bar:
        while scheduler.busy:
            step = scheduler.plan()
            with torch.cuda.device_of(engine.last_S):  # which need not be the current one
                wait = engine.launch(step, scheduler)
            if wait:
                flying.append((step, wait))
            elif not flying and not step.chunks:
                raise RuntimeError("work is left, but none of it can run")
            while len(flying) > (lag if wait else 0):
                collect()
            for item in finished:
                _show(bar, item[2], pool, counts)
                yield item
            finished.clear()


def _collect(scheduler: Scheduler, step: _Step, outputs_RC: np.ndarray, stops: _Stops):
    """Keeps a step's outputs; -> the samples that it finished."""
    rows, slots = scheduler.record(step, outputs_RC)
    bad = outputs_RC[rows, 2] != 0
    stop = np.isin(outputs_RC[rows, 0], stops.ids)
    if stops.texts:
        history = [scheduler.outputs[slot, : scheduler.count[slot]] for slot in slots]
        stop |= [stops.found(_ids(outputs)) for outputs in history]
    full = step.positions[rows] == scheduler.last[slots]
    for i in np.flatnonzero(bad | stop | full):
        sequence = scheduler.running[slots[i]]
        scheduler.finish(sequence)
        outputs = sequence.outputs[:-1] if bad[i] else sequence.outputs
        finish = "error" if bad[i] else "stop" if stop[i] else "length"
        sample = Sample(_ids(outputs), outputs[:, 1].tolist(), outputs[:, 3:].tolist(), finish)
        yield sequence.prompt.index, sequence.number, sample


def _show(bar: tqdm, sample: Sample, pool: BlockPool, counts: Counter) -> None:
    """A bar of samples on stderr, with tokens per second, the cache's use, and errors if there are any."""
    counts["tokens"] += len(sample.ids)
    counts["errors"] += sample.finish == "error"
    rate = counts["tokens"] / max(1e-9, time.time() - bar.start_t) if not bar.disable else 0
    errors = f", {counts['errors']} with errors" if counts["errors"] else ""
    use = pool.used / pool.num_blocks
    bar.set_postfix_str(f"{rate:,.0f} tokens/s, cache {use:.0%}{errors}", refresh=False)
    bar.update()
