"""What the sampler is asked, what it gives back, and what passes between its parts.

A `Request` is one call of `generate`; it is checked here, whole, before anything runs. Its prompts become
`Prompt`s one by one, and these are what the scheduler works on: a `PromptSource` is a prompt that is being
computed, once for all its samples, and an `OpenSample` is a sample that is not finished. A `DeviceStep` is
what the scheduler tells the device to do next. A finished sample is a `Sample`.

It leaves out: which of them runs when (scheduler.py), and the cache's tensors (engine.py).

Shapes: W watched ids.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gramr2 import kernels
from gramr2.cache import Growth, PageTable
from gramr2.files import need
from gramr2.kernels.choice import Options, noise_seed
from gramr2.model import ModelConfig

MEMORY_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # of the machine
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

    On the CPU no result depends on any of it but page_size, which says where a prompt's shared part ends.
    """

    cache_bytes: int | None = None  # on the CPU 1 GiB, or more where one request alone needs more
    page_size: int | None = None  # tokens of a page: 16 on the CPU, 64 on CUDA; divides 128
    running: int | None = None  # samples decoded together: 256, on CUDA up to 2048, as their logits find room
    token_budget: int | None = None  # of a step, prompts' chunks and decode rows: 1024, on CUDA 8192
    share_prefix: bool = True  # False reads a shared prefix once per sample; for measuring what it buys


@dataclass(frozen=True)
class Capacity:
    """The `Limits` of a request on a device, with everything decided that they leave open."""

    pages: int  # of the cache
    page_size: int
    longest: int  # tokens of the longest sequence
    running: int
    token_budget: int
    share_prefix: bool


def free_bytes(device: torch.device) -> int:
    held_idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held_idle


def running_on_cuda(free: int, vocabulary: int) -> int:
    """Samples decoded together: many keep a small model's card busy. A step's fp32 logits may take 1/64 of
    the free memory (the choice of a token makes a few copies). A power of two: the same from call to call."""
    rows = free // (64 * 4 * vocabulary)
    return min(2048, max(256, 1 << rows.bit_length() >> 1))


class Decodes(Protocol):
    """What stop texts need of a tokenizer."""

    def decode(self, ids: list[int]) -> str: ...


# ---------------------------------------------------------------------------------------------------------
# One call of generate


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `generate_iter`, which explains them."""

    prompts: Sequence[Sequence[int]]
    n: int
    max_new_tokens: int | Sequence
    options: Options
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    tokenizer: Decodes | None
    seed: int
    keys: Sequence[str] | None

    def check(self, config: ModelConfig) -> None:
        """All but the prompts, which `capacity` looks at one by one."""
        temperature, top_p, top_k, watch_W = self.options
        need(self.n >= 1, f"n is {self.n}; it must be at least 1")
        finite = 0 <= temperature < float("inf")
        need(finite, f"temperature is {temperature}; it must be 0 (greedy) or positive")
        need(0 < top_p <= 1, f"top_p is {top_p}; it must be in (0, 1]")
        need(top_k >= 0, f"top_k is {top_k}; it must be 0 (no limit) or positive")
        need(not self.stop_texts or self.tokenizer is not None, "stop_texts needs tokenizer=")
        need(all(self.stop_texts), "stop_texts holds an empty text")
        last, count = config.vocab_size - 1, len(self.prompts)
        for token in watch_W.tolist():
            need(0 <= token <= last, f"watch holds id {token}; the vocabulary has 0 to {last}")
        for name, values in ("keys", self.keys), ("max_new_tokens", self.max_new_tokens):
            if isinstance(values, Sequence):
                need(len(values) == count, f"{name} has {len(values)} entries for {count} prompts")

    def capacity(self, config: ModelConfig, weight: Tensor, limits: Limits, held: int = 0) -> Capacity:
        """Checks every prompt against model and cache; -> what runs at once. `weight`: any of the model's;
        `held`: bytes that its engine has for the cache already."""
        cuda = weight.device.type == "cuda"
        size = limits.page_size or (64 if cuda else 16)
        budget = limits.token_budget or (8192 if cuda else 1024)
        need(kernels.KEYS % size == 0, f"page_size is {size}; it must divide {kernels.KEYS}")
        per_page = 2 * config.num_layers * config.num_kv_heads * config.head_size * size * weight.itemsize
        free = free_bytes(weight.device) + held if cuda else 0
        usual = int(free * CUDA_CACHE_SHARE) if cuda else CPU_CACHE_BYTES
        cache_bytes = limits.cache_bytes or usual
        allowed = cache_bytes if limits.cache_bytes or cuda else max(usual, MEMORY_BYTES // 2)
        wanted, longest = self.needs(config, size, per_page, allowed)
        if cuda:  # the next call may want some more, and should find them there
            wanted = 1 << (wanted - 1).bit_length()
        # The longest must run, alone if need be: its pages, one for a copy, and the null page.
        pages = min(max(cache_bytes // per_page, -(-longest // size) + 2), wanted)
        running = limits.running or (running_on_cuda(free, config.vocab_size) if cuda else 256)
        return Capacity(pages, size, longest, running, budget, limits.share_prefix)

    def needs(self, config: ModelConfig, size: int, per_page: int, allowed: int) -> tuple[int, int]:
        """Checks every prompt against the model, and `allowed` bytes of cache in pages of `size` tokens and
        `per_page` bytes; -> pages that all of it takes, and tokens of the longest sequence."""
        wanted, longest, room = 2, 0, config.max_positions  # the null page, and one
        for index, ids in enumerate(self.prompts):
            most = self._checked_most(index, ids, config.vocab_size - 1)
            total = len(ids) + most
            asked = f"prompt {index} has {len(ids)} tokens and may get {most} more"
            need(total <= room, f"{asked}: {total}, but the model takes at most {room}")
            # One page more than it fills: the prompt's last, half full, is copied when it is forked.
            needed = -(-total // size) + 1
            takes = f"{(needed + 1) * per_page:,} bytes of cache; the limit is {allowed:,}"
            need(needed + 1 <= allowed // per_page, f"{asked}, which takes {takes}")
            wanted, longest = wanted + self.n * needed, max(longest, total)
        return wanted, longest

    def _checked_most(self, index: int, ids: Sequence[int], last: int) -> int:
        """Checks a prompt in itself; -> the most tokens that a sample of it may get."""
        need(len(ids) > 0, f"prompt {index} is empty; it needs at least one id")
        for token in (min(ids), max(ids)):
            need(0 <= token <= last, f"prompt {index} holds id {token}; the vocabulary has 0 to {last}")
        new, of = self.new_tokens(index), f"max_new_tokens of prompt {index}"
        need(len(new) == self.n, f"{of} has {len(new)} entries for n = {self.n} samples")
        need(min(new) >= 1, f"{of} is {min(new)}; it must be at least 1")
        return max(new)

    def new_tokens(self, index: int) -> list[int]:
        """How many tokens each sample of a prompt may get."""
        value = self.max_new_tokens if isinstance(self.max_new_tokens, int) else self.max_new_tokens[index]
        return [value] * self.n if isinstance(value, int) else list(value)

    @cached_property
    def way(self) -> tuple:
        """Its options as plain values: requests with the same ones are decoded in the same steps."""
        temperature, top_p, top_k, watch_W = self.options
        return temperature, top_p, top_k, *watch_W.tolist()

    def queue(self) -> Iterator[Prompt]:
        """The prompts, taken in one by one: those that wait cost their ids and nothing else."""
        seen: Counter[str] = Counter()
        for index, given in enumerate(self.prompts):
            ids = [int(i) for i in given]
            digest = hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=16).hexdigest()
            key = f"{digest}/{seen[digest]}" if self.keys is None else self.keys[index]
            seen[digest] += 1
            seeds = [noise_seed(self.seed, key, number) for number in range(self.n)]
            yield Prompt(self, index, ids, self.new_tokens(index), seeds)

    def ends_text(self, ids: list[int]) -> bool:
        """Whether the last id ends a stop text. A token is rarely less than a character."""
        if not self.stop_texts or self.tokenizer is None:
            return False
        text = self.tokenizer.decode(ids[-(max(map(len, self.stop_texts)) + 8) :])
        return any(stop in text for stop in self.stop_texts)


# ---------------------------------------------------------------------------------------------------------
# What is at work: prompts, their samples, and the steps of the device


@dataclass(frozen=True, eq=False)
class Prompt:
    request: Request
    index: int
    ids: list[int]
    limits: list[int]  # how many tokens each of its samples may get
    seeds: list[int]  # of each sample's noise

    def shared_tokens(self, page_size: int) -> int:
        """Tokens in full pages, which all samples share; everything behind is read in a second part."""
        return (len(self.ids) - 1) // page_size * page_size


@dataclass(eq=False, kw_only=True)
class TokenSequence:
    """Tokens that stand in the cache, or will: what a prompt's source and a sample have in common."""

    prompt: Prompt
    place: int  # of the prompt, among all that were taken in
    number: int = 0  # among its prompt's samples
    table: PageTable = field(default_factory=PageTable)
    done: int = 0  # tokens whose keys and values are computed, or planned

    @property
    def ids(self) -> list[int]:
        return self.prompt.ids

    @property
    def prefill_length(self) -> int:
        """Tokens that have to be in the cache before samples are forked from it, or it is decoded.

        All but the last one: a decode step feeds it, so that logits come from these steps only.
        """
        return len(self.ids) - 1

    @property
    def order(self) -> tuple[int, int]:
        """Older first: the oldest is admitted first, and the youngest gives way."""
        return self.place, self.number


class PromptSource(TokenSequence):
    """A prompt, computed once: its samples are forked from it. Its number is that of the next one."""


@dataclass(eq=False, kw_only=True)
class OpenSample(TokenSequence):
    """A sample that is not finished. It may lose its pages, and be computed again."""

    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    watched: list[list[float]] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.prompt.ids + self.new_ids

    @cached_property
    def limit(self) -> int:
        """How many tokens it may get."""
        return self.prompt.limits[self.number]

    @cached_property
    def planned_length(self) -> int:
        """How many of its tokens are fed once a step is planned that draws the last one."""
        return len(self.prompt.ids) + self.limit - 1


class Chunk(NamedTuple):
    """Tokens start to stop of a sequence, to be computed into the pages it had when this was planned."""

    sequence: TokenSequence
    start: int
    stop: int
    pages: list[int]


@dataclass
class DeviceStep:
    """What the device does next, in this order."""

    fresh: list[int] = field(default_factory=list)  # pages to clear
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # pages to copy: from, to
    joined: dict[OpenSample, int] = field(default_factory=dict)  # new in the running batch, with their slots
    grown: list[OpenSample] = field(default_factory=list)  # of the running batch, with a page more
    samples: dict[OpenSample, int] = field(default_factory=dict)  # to be decoded, a row each, and their slots
    positions: list[int] = field(default_factory=list)  # where the tokens stand that they feed
    batch_version: tuple[int, int] = (0, 0)  # the same as long as rows and slots are

    def add(self, growth: Growth) -> None:
        self.fresh += growth.fresh
        self.copies += growth.copies
