"""Decode steps on CUDA: a graph per batch size and options, captured when they are first met.

A step is one copy to the device, one graph, and one copy back; the host waits for none of them until it
collects. A graph reads and writes fixed memory: a flat buffer in which the arrays of a `DecodeBatch` stand
one behind the other, as `DecodeGraphs.layout` says. Three pairs of host buffers take turns, since at most
two steps are in flight.

It leaves out: prefill, whose shapes change from step to step, and devices without CUDA graphs.

Shapes: R rows of a decode step, C columns of what `choose` gives, F numbers of a flat buffer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gramr2.batch import DecodeBatch
from gramr2.cache import NULL
from gramr2.kernels.choice import Options
from gramr2.requests import Capacity

Decode = Callable[[DecodeBatch[Tensor]], Tensor]
Sizes = tuple[int, int]  # rows, and items of their shared prefixes


@dataclass(frozen=True)
class CapturedGraph:
    """A graph with the memory that it reads and writes, and what that is copied from and to."""

    graph: torch.cuda.CUDAGraph
    input_F: Tensor
    outputs_RC: Tensor
    host_buffers: Iterator[tuple[Tensor, ...]]  # pinned: for the input, for the outputs; in turns, for ever
    options: Options  # kept, since it goes by their id


class DecodeGraphs:
    def __init__(self, device: torch.device, capacity: Capacity, item_rows: int):
        self.device, self.running = device, capacity.running
        # Of the longest table. Rounded up: a call of somewhat longer ones finds its graphs captured.
        self.longest = 1 << (capacity.longest // capacity.page_size + 1).bit_length()
        pages = (self.longest,)
        # Of each of a batch's arrays, in their order: shape per row or prefix, and what pads it. Rows that
        # pad a batch sit in the spare slot, write to the null page and see nothing.
        slots, positions, seeds, places = ((), capacity.running), ((), 0), ((), 0), ((), 0)
        prefix = ((item_rows,), -1), ((item_rows,), 0), (pages, NULL)
        own = ((1,), -1), ((1,), 0), (pages, NULL)
        self.layout: list[tuple[tuple, int]] = [slots, positions, seeds, places, *prefix, *own]
        self.captured: dict[tuple[Sizes, int], CapturedGraph] = {}  # by batch sizes, and by whose options
        self.memory = torch.cuda.graph_pool_handle()

    def hold(self, capacity: Capacity) -> bool:
        """Whether these graphs serve a call of such a capacity too."""
        pages = capacity.longest // capacity.page_size + 2
        return capacity.running <= self.running and pages <= self.longest

    def launch(
        self, batch: DecodeBatch[np.ndarray], decode: Decode, options: Options
    ) -> Callable[[], np.ndarray]:
        """Starts a step; -> what waits for its outputs. `decode` is one that chooses by the options."""
        rows, prefixes = len(batch.slots_R), len(batch.prefix.rows_IJ)
        # Prefixes come in powers of two: none has no launch, and few have few that are padding.
        sizes = min(graph_size(rows), self.running), prefixes and 1 << (prefixes - 1).bit_length()
        key = sizes, id(options)
        if key not in self.captured:
            self.captured[key] = self._capture(sizes, decode, options)
        captured = self.captured[key]
        host_F, host_RC = next(captured.host_buffers)
        self._write(batch, host_F, sizes)
        captured.input_F.copy_(host_F, non_blocking=True)
        captured.graph.replay()
        host_RC.copy_(captured.outputs_RC, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> np.ndarray:
            done.synchronize()
            return host_RC.numpy()[:rows].copy()

        return wait

    def _shapes(self, sizes: Sizes) -> list[tuple[int, ...]]:
        rows, prefixes = sizes
        counts = [rows] * 4 + [prefixes] * 3 + [rows] * 3
        return [(count, *each) for count, (each, _) in zip(counts, self.layout, strict=True)]

    def _views(self, flat_F: Tensor, sizes: Sizes) -> list[Tensor]:
        """A batch's arrays in a flat buffer."""
        shapes = self._shapes(sizes)
        parts = flat_F.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _write(self, batch: DecodeBatch[np.ndarray], host_F: Tensor, sizes: Sizes) -> None:
        views = self._views(host_F, sizes)
        for view, (_, fill), array in zip(views, self.layout, batch.arrays(), strict=True):
            buffer = view.numpy()
            buffer[...] = fill
            buffer[tuple(map(slice, array.shape))] = array

    def _capture(self, sizes: Sizes, decode: Decode, options: Options) -> CapturedGraph:
        length = sum(map(math.prod, self._shapes(sizes)))
        input_F = torch.empty(length, dtype=torch.int64, device=self.device)
        views = self._views(input_F, sizes)
        for view, (_, fill) in zip(views, self.layout, strict=True):
            view.fill_(fill)
        graph, outputs_RC = self._record(decode, DecodeBatch.of(views))
        pinned, copied = self.device.type == "cuda", (input_F, outputs_RC)
        host_buffers = [
            tuple(torch.empty(each.shape, dtype=each.dtype, pin_memory=pinned) for each in copied)
            for _ in range(3)
        ]
        return CapturedGraph(graph, input_F, outputs_RC, itertools.cycle(host_buffers), options)

    def _record(self, decode: Decode, batch: DecodeBatch[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # The first run compiles and allocates, on a batch of padding, which leaves no trace.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            decode(batch)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread is held to what a capture allows: another may be writing a resume point.
        with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
            outputs_RC = decode(batch)
        return graph, outputs_RC


def graph_size(rows: int) -> int:
    """The batch size that a graph is made for: few graphs, and less than a third of a batch is padding."""
    step = max(1, 1 << (rows - 1).bit_length() >> 2)
    return -(-rows // step) * step
