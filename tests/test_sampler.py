"""The sampler against slow truth: naive recomputation, the softmax itself, and itself in other company."""

from __future__ import annotations

import gc
import itertools
import os
import random
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import naive_greedy, naive_logits

import gramr2
from gramr2 import sampler
from gramr2.cache import BlockPool
from gramr2.sampler import Limits, generate, generate_iter
from kernels import choice

ROOT = Path(__file__).parents[1]
LENGTHS = 1, 2, 16, 17, 33, 50, 64, 65
BLOCKS = 10  # of 16 tokens: the longest sequence below takes 8 with the copy it may need


def prompts_of(lengths, vocabulary=320, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


def cache_bytes(model, blocks: int, size: int = 16) -> int:
    c = model.config
    return blocks * 2 * c.num_layers * c.num_kv_heads * c.head_size * size * 4


# -------------------------------------------------------------------------------------- greedy, exactly


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_naive_oracle_token_for_token(family):
    """Ragged prompts, three samples each, chunks of 24 tokens, and a pool so small that it must preempt."""
    model = random_model(family)
    prompts = prompts_of(LENGTHS)
    limits = Limits(cache_bytes=cache_bytes(model, BLOCKS), token_budget=24)
    results = generate(
        model, prompts, n=3, max_new_tokens=40, temperature=0, stop_ids=(), progress=False, limits=limits
    )
    for prompt, samples in zip(prompts, results, strict=True):
        ids, logprobs = naive_greedy(model, prompt, 40)
        for sample in samples:
            assert sample.ids == ids
            assert sample.finish == "length"
            np.testing.assert_allclose(sample.logprobs, logprobs, atol=2e-5)


def test_greedy_is_what_transformers_generates(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, _ = gramr2.load(make_checkpoint(tmp_path / "m", "qwen3"))
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    prompt = prompts_of([40])[0]
    with torch.no_grad():
        wanted = other.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=list(model.stop_ids)
        )
    (sample,) = generate(model, [prompt], max_new_tokens=30, temperature=0, progress=False)[0]
    assert sample.ids == wanted[0, len(prompt) :].tolist()


# ------------------------------------------------------------------------- level 1: bitwise the same samples


COMPANY = {
    "chunks of 7 tokens": Limits(token_budget=7),
    "one at a time": Limits(running=1),
    "five at a time": Limits(running=5, token_budget=40),
    "preempted": Limits(cache_bytes=-BLOCKS),
    "prefix read alone": Limits(share_prefix=False),
}


def sameness(threads: int, *companies: str) -> None:
    torch.set_num_threads(threads)
    model = random_model("qwen3")
    prompts = prompts_of(LENGTHS)
    prompts += [[*prompts[-1][:48], *tail] for tail in ([5, 6, 7], [8], [9, 9])]  # prefix hits
    keys = [f"pair {i}" for i in range(len(prompts))]
    options = dict(
        n=3, max_new_tokens=40, temperature=0.8, watch=[1, 2], seed=3, stop_ids=[9], progress=False
    )
    wanted = generate(model, prompts, keys=keys, **options)
    assert {s.finish for group in wanted for s in group} == {"stop", "length"}
    for name in companies or COMPANY:
        limits = COMPANY[name]
        if limits.cache_bytes:
            limits = Limits(cache_bytes=cache_bytes(model, -limits.cache_bytes))
        order = list(range(len(prompts)))
        random.Random(name).shuffle(order)
        ask = [prompts[i] for i in order], [keys[i] for i in order]
        got = generate(model, ask[0], keys=ask[1], limits=limits, **options)
        assert got == [wanted[i] for i in order], f"{name}, {threads} threads"
    alone = generate(model, prompts[3:4], keys=keys[3:4], **options | {"n": 1})
    assert alone[0][0] == wanted[3][0]


@pytest.mark.parametrize("arguments", ["1", "2, 'preempted'"])
def test_level_1_same_bits_in_any_company(arguments):
    """Ids and log-probs, whatever the batch, order, chunks, prefix hits, preemption; on 1 and 2 threads."""
    threads = {"OMP_NUM_THREADS": arguments[0], "OMP_WAIT_POLICY": "passive"}
    run(f"import test_sampler; test_sampler.sameness({arguments})", **threads)


def beside_longer_ones() -> None:
    model = random_model("qwen3")
    prompts = prompts_of([150, 200, 250, 450])
    options = dict(n=2, max_new_tokens=20, keys=["x"], stop_ids=(), progress=False)
    alone = [generate(model, [prompt], **options)[0] for prompt in prompts]
    together = generate(model, prompts, **options | {"keys": ["x"] * len(prompts)})
    chunked = generate(
        model, prompts, **options | {"keys": ["x"] * len(prompts)}, limits=Limits(token_budget=60)
    )
    assert together == chunked == alone


def test_level_1_long_prefixes_round_alike_beside_longer_ones():
    """A matmul adds more than 192 products in an order that depends on how many there are: too long a cut
    of the keys would let the padding that a longer prompt causes change another prompt's bits."""
    run("import test_sampler; test_sampler.beside_longer_ones()", OMP_NUM_THREADS="1")


def run(code: str, **environment) -> None:
    path = f"{ROOT}:{ROOT / 'tests'}"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]


def test_the_small_pool_did_preempt(monkeypatch):
    """The tests above mean little if nothing was ever preempted, or no prefix ever found."""
    preempted, found = [], []
    preempt, match = sampler.Scheduler._preempt, BlockPool.match
    monkeypatch.setattr(
        sampler.Scheduler, "_preempt", lambda self, s: (preempted.append(s.number), preempt(self, s))
    )

    def counting(self, ids):
        table = match(self, ids)
        found.append(table.length)
        return table

    monkeypatch.setattr(BlockPool, "match", counting)
    model = random_model("llama2")
    prompts = prompts_of(LENGTHS)
    prompts.append([*prompts[-1][:48], 1])
    limits = Limits(cache_bytes=cache_bytes(model, BLOCKS))
    generate(model, prompts, n=3, max_new_tokens=40, stop_ids=(), progress=False, limits=limits)
    assert any(number < 3 for number in preempted)
    assert 48 in found


def test_noise_depends_on_seed_key_and_number_only():
    model = random_model("llama2")
    prompt = prompts_of([20])[0]
    options = dict(n=2, max_new_tokens=20, stop_ids=(), progress=False)
    first, second = generate(model, [prompt, prompt], **options)
    assert len({tuple(s.ids) for s in first + second}) == 4, (
        "equal prompts, and samples, have their own noise"
    )
    assert generate(model, [prompt, prompt], **options) == [first, second]
    assert generate(model, [prompt], **options, seed=1)[0] != first
    assert generate(model, [prompt], **options, keys=["x"])[0] != first
    assert (
        generate(model, [prompt] * 2, **options, keys=["x", "x"])[0]
        == generate(model, [prompt], **options, keys=["x"])[0]
    )


# --------------------------------------------------------------------------------- the distribution


def options_of(**fields):
    base = dict(temperature=1.0, top_p=1.0, top_k=0, watch_W=torch.zeros(0, dtype=torch.int64))
    return choice.Options(**{**base, **fields})


def chi_square(counts, expected) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_first_tokens_follow_the_softmax():
    """Chi-square of 4,000 samples over 8 tokens. Seeds are fixed, so it passes or fails for good; for another
    seed the chance of a false alarm is 0.001 (24.32 is that quantile for 7 degrees of freedom)."""
    model = random_model("llama2", vocab_size=8)
    prompt = [1, 2, 3]
    samples = generate(model, [prompt], n=4000, max_new_tokens=1, stop_ids=(), progress=False)[0]
    counts = np.bincount([s.ids[0] for s in samples], minlength=8)
    expected = naive_logits(model, prompt).softmax(-1).numpy() * 4000
    assert chi_square(counts, expected) < 24.32


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.7}]
)
def test_filters_follow_the_definition(fields):
    """Temperature, then the k likeliest, then the fewest that reach p: by sorting, beside the bisection.
    20,000 draws; chance of a false alarm 0.001 per case by the quantiles of chi-square, seeds being fixed."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.9, 0.1, -3.0, 1.0])
    p = (logits / fields.get("temperature", 1.0)).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: fields.get("top_k") or 7]
    share = p[kept] / p[kept].sum()
    kept = kept[: int((share.cumsum(0) < fields.get("top_p", 1.0) - 1e-6).sum()) + 1]
    wanted = torch.zeros(7).index_copy(0, kept, p[kept] / p[kept].sum()).numpy()
    rows = 20000
    uniform = choice.uniforms(torch.arange(rows) * 1234567, torch.zeros(rows, dtype=torch.int64))
    outputs = choice.choose(logits.expand(rows, 7), uniform, options_of(**fields))
    counts = np.bincount(outputs[:, 0].long().numpy(), minlength=7)
    assert not counts[wanted == 0].any()
    quantile = {2: 10.83, 3: 13.82, 4: 16.27, 7: 22.46}[len(kept)]
    assert chi_square(counts[wanted > 0], wanted[wanted > 0] * rows) < quantile
    np.testing.assert_allclose(outputs[:, 1], logits.log_softmax(-1)[outputs[:, 0].long()], atol=1e-6)


def test_uniforms_are_uniform_and_never_0_or_1():
    x = choice.uniforms(torch.arange(1000).repeat_interleave(100), torch.arange(100).repeat(1000))
    assert 0 < x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1
    # 100 equal bins of 100,000: a false alarm in 1 of 1,000 seeds (quantile for 99 degrees of freedom).
    assert chi_square(np.histogram(x, 100, (0, 1))[0], 1000.0) < 148.2
    grid = x.view(1000, 100) - 0.5
    for other in (grid.roll(1, 0), grid.roll(1, 1)):
        assert abs((grid * other).mean() * 12) < 4 / 100_000**0.5, "neighbours are correlated"


def test_logprobs_are_untempered_and_watched_ids_stand_beside_them():
    model = random_model("qwen2")
    prompt = prompts_of([21])[0]
    options = dict(max_new_tokens=12, temperature=0.3, top_k=4, watch=(7, 11), stop_ids=(), progress=False)
    (sample,) = generate(model, [prompt], **options)[0]
    scored = gramr2.logprobs(model, [prompt + sample.ids])[0][len(prompt) - 1 :]
    np.testing.assert_allclose(sample.logprobs, scored, atol=2e-5)
    for i, watched in enumerate(sample.watched):
        logp = naive_logits(model, prompt + sample.ids[:i]).log_softmax(-1)
        np.testing.assert_allclose(watched, logp[[7, 11]], atol=2e-5)
    assert len(sample.watched) == len(sample.ids) == 12


# ------------------------------------------------------------------------------------------- stopping


class Letters:
    """Id i is the i-th letter; a stop text of several letters spans as many tokens."""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def test_stops_and_limits_keep_what_stopped_them():
    model = random_model("llama2", vocab_size=26)
    prompt = [1, 2, 3]
    plain = generate(model, [prompt], n=4, max_new_tokens=60, stop_ids=(), progress=False)[0]
    for number, sample in enumerate(plain):
        text = Letters().decode(sample.ids)
        options = dict(n=4, max_new_tokens=60, progress=False)
        by_text = generate(
            model, [prompt], **options, stop_ids=(), stop_texts=("zzzzzz", text[20:23]), tokenizer=Letters()
        )[0][number]
        end = text.index(text[20:23]) + 3
        assert (by_text.ids, by_text.finish) == (sample.ids[:end], "stop")
        by_id = generate(model, [prompt], **options, stop_ids=(sample.ids[9], 999))[0][number]
        assert (by_id.ids, by_id.finish) == (sample.ids[: sample.ids.index(sample.ids[9]) + 1], "stop")
    ragged = generate(model, [prompt] * 2, n=2, max_new_tokens=[[5, 1], [2, 7]], stop_ids=(), progress=False)
    assert [[len(s.ids) for s in group] for group in ragged] == [[5, 1], [2, 7]]
    assert ragged[0][0].ids == plain[0].ids[:5]
    model.stop_ids = (plain[0].ids[3],)
    default = generate(model, [prompt], n=4, max_new_tokens=60, progress=False)[0][0]
    assert default.ids == plain[0].ids[: plain[0].ids.index(plain[0].ids[3]) + 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_that_sample_alone(value, capsys):
    """The poisoned sample ends as "error"; blocks it leaves behind harm nobody; the bar counts it."""
    model = random_model("llama2")
    prompts = prompts_of([30, 31, 32, 33, 34, 35], vocabulary=300)
    options = dict(n=2, max_new_tokens=30, seed=1, stop_ids=(), keys=list("abcdef"))
    limits = Limits(cache_bytes=cache_bytes(model, BLOCKS))
    model.embed.weight.data[310:] = 0  # leaves ids from 310 on to the test
    wanted = generate(model, prompts, **options, progress=False)
    model.embed.weight.data[310] = value
    poisoned = [*prompts[:2], [310, *prompts[2][1:]], *prompts[3:]]
    got = generate(model, poisoned, **options, limits=limits)
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        for one, other in zip(a, b, strict=True):
            if index == 2:
                assert (other.ids, other.finish) == ([], "error")
            elif 310 not in one.ids:
                assert other == one
    assert "with errors" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- the scheduler


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 2**32),
)
def test_random_schedules_finish_every_request_once(requests, spare, running, budget, seed):
    """No tensors: a step is played on a model of the pages, which checks what every token finds before it."""
    size, draw = 4, random.Random(seed)
    shared = [draw.randrange(2) for _ in range(40)]
    prompts = [
        sampler._Prompt(i, [*shared[: length - 1], 9][:length], str(i), [limit] * n)
        for i, (length, n, limit) in enumerate(requests)
    ]
    blocks = max(-(-(len(p.ids) + p.limits[0]) // size) + 2 for p in prompts) + spare
    pool, pages = BlockPool(blocks, size), {}
    limits = Limits(1, size, running, budget)
    scheduler = sampler.Scheduler(iter(prompts), pool, limits, settle=lambda: None)
    finished = []
    steps = itertools.count()
    while scheduler.busy:
        assert next(steps) < 10_000, "it goes round in circles"
        step = scheduler.plan()
        assert step.chunks or len(step.slots), "work is left, but none of it runs"
        play(step, scheduler, pages, size)
        outputs = np.array([[draw.randrange(2), 0.0, 0] for _ in step.slots]).reshape(-1, 3)
        rows, slots = scheduler.record(step, outputs)
        for row, slot in zip(rows, slots, strict=True):
            if step.positions[row] == scheduler.last[slot] or draw.random() < 0.05:
                sample = scheduler.running[slot]
                finished.append((sample.prompt.index, sample.number))
                scheduler.finish(sample)
    assert sorted(finished) == [(p.index, i) for p in prompts for i in range(len(p.limits))]
    assert pool.used == 0, "a block leaked"


def play(step, scheduler, pages, size):
    """Each place of a page holds the whole history up to its token; written once, and read as expected."""

    def feed(ids, position, blocks):
        block, place = blocks[position // size], position % size
        page = pages.setdefault(block, {})
        history = tuple(ids[: position + 1])
        assert page.get(place, history) == history, "written over what somebody holds"
        page[place] = history
        for p in range(position + 1):
            assert pages[blocks[p // size]][p % size] == history[: p + 1], "reads what another wrote"

    for block in step.fresh:
        pages[block] = {}
    for sequence, start, stop, blocks in step.chunks:
        for position in range(start, stop):
            feed(sequence.ids, position, blocks)
    for origin, copy in step.copies:
        pages[copy] = dict(pages[origin])
    for slot, position in zip(step.slots, step.positions, strict=True):
        sequence = scheduler.running[slot]
        generated = scheduler.outputs[slot, : scheduler.count[slot]]
        feed(sequence.prompt.ids + sampler._ids(generated), position, sequence.table.blocks)


def test_a_hundred_thousand_queued_prompts_cost_their_ids():
    """Only what runs is taken in: at the first result memory has hardly grown."""
    model = random_model("llama2")
    ids = [[i % 300, i // 300 % 300, i // 90000] for i in range(100_000)]
    generate(model, ids[:1], max_new_tokens=2, progress=False)  # what is imported or built but once
    tracemalloc.start()
    small = Limits(cache_bytes=1 << 22)  # a larger pool has longer lists of blocks, whatever the queue
    iterator = generate_iter(model, ids, max_new_tokens=2, stop_ids=(), progress=False, limits=small)
    next(iterator)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    iterator.close()
    assert peak < 2_000_000


def test_the_default_cache_takes_one_request_that_needs_more(monkeypatch):
    """A default that refuses what one request needs would bar 8B models in fp32 from prompts of 4,096 tokens;
    what half of the machine's memory cannot hold is still refused before anything runs."""
    model, prompts = random_model("llama2"), prompts_of([100, 7, 7])
    options = dict(n=2, max_new_tokens=20, stop_ids=(), progress=False)
    wanted = generate(model, prompts, **options)
    monkeypatch.setattr(sampler, "CPU_CACHE_BYTES", cache_bytes(model, 3))
    monkeypatch.setattr(sampler, "_memory", lambda: cache_bytes(model, 40))
    assert generate(model, prompts, **options) == wanted
    monkeypatch.setattr(sampler, "_memory", lambda: cache_bytes(model, 16))
    with pytest.raises(ValueError, match="prompt 0 has 100 tokens and may get 20 more, which takes"):
        generate(model, prompts, **options)


def test_samples_come_as_they_finish():
    model = random_model("llama2")
    limits = Limits(running=4)
    order = [
        (prompt, number)
        for prompt, number, _ in generate_iter(
            model,
            prompts_of([10] * 6),
            max_new_tokens=[50, 1, 2, 3, 1, 1],
            stop_ids=(),
            progress=False,
            limits=limits,
        )
    ]
    assert order[-1] == (0, 0)
    assert sorted(order) == [(i, 0) for i in range(6)]


# ---------------------------------------------------------------------- the way CUDA goes, without it


class FakeGraphs(sampler._Graphs):
    """Graphs whose replay decodes eagerly: the fixed buffers, the padding and the step of delay are real."""

    def _capture(self, size):
        length = self._views(None, size)["prefix pages"]
        device, engine = torch.zeros(length, dtype=torch.int64), self.engine
        hosts = [torch.zeros(length, dtype=torch.int64) for _ in range(3)]
        outputs = torch.zeros(size, 3 + len(engine.options.watch_W), dtype=torch.float64)

        class Graph:
            def replay(self, views=self._views):
                outputs.copy_(engine.decode(views(device, size)))

        return Graph(), device, hosts, outputs, [torch.zeros_like(outputs) for _ in hosts]


def test_fixed_buffers_and_a_host_one_step_behind_change_nothing(monkeypatch):
    """Also under preemption, with stop ids seen a step late, and prefixes split among several items."""

    class Event:
        def record(self):
            pass

        synchronize = record

    class Engine(sampler.Engine):
        def __init__(self, *args):
            super().__init__(*args)
            self.members = 2
            self.graphs = FakeGraphs(self)

    model = random_model("llama2")
    prompts = prompts_of(LENGTHS)
    options = dict(n=3, max_new_tokens=40, temperature=0, stop_ids=(3, 17), watch=[5], progress=False)
    limits = Limits(cache_bytes=cache_bytes(model, BLOCKS), running=13, token_budget=64)
    wanted = generate(model, prompts, **options)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(sampler, "Engine", Engine)
    got = generate(model, prompts, limits=limits, **options)
    for a, b in zip(itertools.chain(*wanted), itertools.chain(*got), strict=True):
        assert (a.ids, a.finish) == (b.ids, b.finish)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


def interpreted() -> None:
    model = random_model("qwen3")
    prompts = prompts_of([1, 17, 40])
    samples = generate(model, prompts, n=2, max_new_tokens=4, temperature=0, stop_ids=(), progress=False)
    for prompt, group in zip(prompts, samples, strict=True):
        ids, logprobs = naive_greedy(model, prompt, 4)
        for sample in group:
            assert sample.ids == ids
            np.testing.assert_allclose(sample.logprobs, logprobs, atol=2e-5)


def test_the_triton_kernels_serve_the_sampler():
    """In Triton's interpreter, which reads its switch when the kernels are defined: a process of its own."""
    pytest.importorskip("triton")
    run("import test_sampler, kernels; assert kernels.backend() == 'triton'; test_sampler.interpreted()",
        TRITON_INTERPRET="1")  # fmt: skip


def test_a_calls_cache_goes_with_the_call(monkeypatch):
    """Kept in a circle, a device's cache would still be there when the next call measures what is free."""
    engines = []

    class Engine(sampler.Engine):
        def __init__(self, *args):
            super().__init__(*args)
            self.members, self.graphs = 2, FakeGraphs(self)
            engines.append(weakref.ref(self))

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    monkeypatch.setattr(sampler, "Engine", Engine)
    model = random_model("llama2")
    gc.disable()
    try:
        generate(model, [[1, 2, 3]], max_new_tokens=2, progress=False)
        next(generate_iter(model, [[1, 2, 3]] * 2, max_new_tokens=2, progress=False))  # and left there
        assert [engine() for engine in engines] == [None, None]
    finally:
        gc.enable()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
def test_cuda_graphs_follow_the_oracle():
    model = random_model("qwen3").cuda()
    prompts = prompts_of(LENGTHS)
    got = generate(model, prompts, n=3, max_new_tokens=40, temperature=0, stop_ids=(), progress=False)
    model = model.cpu()
    for prompt, group in zip(prompts, got, strict=True):
        ids, _ = naive_greedy(model, prompt, 40)
        assert all(sample.ids == ids for sample in group)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
def test_a_tight_cache_changes_no_sample_in_bf16():
    """Preempted, forked and copied on the device, and cut off by top-p: log-probs are those of the ids."""
    model = random_model("qwen3").cuda().bfloat16()
    prompts = prompts_of(LENGTHS)
    limits = Limits(cache_bytes=cache_bytes(model, BLOCKS), block_size=16, running=13, token_budget=64)
    options = dict(n=3, max_new_tokens=40, top_p=0.9, top_k=50, stop_ids=(), progress=False)
    for prompt, group in zip(prompts, generate(model, prompts, limits=limits, **options), strict=True):
        for sample in group:
            assert len(sample.ids) == 40 and sample.finish == "length"
            scored = gramr2.logprobs(model, [prompt + sample.ids])[0][len(prompt) - 1 :].cpu().numpy()
            np.testing.assert_allclose(sample.logprobs, scored, atol=0.15)


# -------------------------------------------------------------------------------------------- bad input


BAD = {
    "prompt 1 is empty": dict(prompts=[[1], []]),
    "prompt 0 holds id 320": dict(prompts=[[320]]),
    "prompt 1 holds id -1": dict(prompts=[[1], [-1]]),
    "n is 0": dict(n=0),
    "temperature is -1": dict(temperature=-1),
    "temperature is nan": dict(temperature=float("nan")),
    "top_p is 0": dict(top_p=0),
    "top_p is 1.5": dict(top_p=1.5),
    "top_k is -2": dict(top_k=-2),
    "prompt 1 has 500 tokens and may get 20 more: 520, but the model takes at most 512": dict(
        prompts=[[1], [1] * 500]
    ),
    "the limit is 20,000": dict(prompts=[[1], [1] * 100], limits=Limits(cache_bytes=20_000)),
    "max_new_tokens has 1 entries for 2 prompts": dict(prompts=[[1], [2]], max_new_tokens=[3]),
    "max_new_tokens of prompt 1 has 1 entries for n = 2": dict(
        prompts=[[1], [2]], max_new_tokens=[[3, 3], [3]], n=2
    ),
    "max_new_tokens of prompt 0 is 0": dict(max_new_tokens=0),
    "stop_texts needs tokenizer": dict(stop_texts=["x"]),
    "watch holds id 1000": dict(watch=[1000]),
    "keys has 2 entries for 1 prompts": dict(keys=["a", "b"]),
    "block_size is 7": dict(limits=Limits(block_size=7)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_before_anything_runs(message):
    options = {"prompts": [[1]], "max_new_tokens": 20, "progress": False} | BAD[message]
    with pytest.raises(ValueError, match=r".") as caught:
        generate_iter(random_model("llama2"), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
