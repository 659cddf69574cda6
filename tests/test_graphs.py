"""Decode steps as graphs: the way that CUDA goes, also where there is none."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from checkpoints import random_model
from oracles import naive_greedy
from small_caches import LENGTHS, PAGES, cache_bytes, prompts_of

import gramr2
from gramr2 import engine, graphs, sampler
from gramr2.batch import DecodeBatch
from gramr2.sampler import Limits, generate, generate_iter


class EagerGraph:
    """Its replay decodes. Like a graph, it does not keep the engine alive."""

    def __init__(self, decode, batch, outputs_RC):
        self.decode, self.batch, self.outputs_RC = weakref.WeakMethod(decode), batch, outputs_RC

    def replay(self):
        # Fresh reads: a kernel on the CPU keeps its layout of these, whatever the buffers hold by then.
        batch = DecodeBatch.of(self.batch.arrays())
        self.outputs_RC.copy_(self.decode()(batch))


class EagerGraphs(graphs.DecodeGraphs):
    """The fixed buffers, the padding and the step of delay are real."""

    def _record(self, decode, batch):
        outputs_RC = decode(batch)
        return EagerGraph(decode, batch, outputs_RC), outputs_RC


class EngineWithGraphs(engine.Engine):
    def __init__(self, model):
        super().__init__(model)
        self.item_rows, self.uses_graphs = 2, True

    def begin(self, capacity):
        call = super().begin(capacity)
        self._clear(list(range(self.pages)))  # with graphs it leaves this to kernels that need it not
        return call


@pytest.fixture
def with_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    monkeypatch.setattr(sampler, "Engine", EngineWithGraphs)
    monkeypatch.setattr(engine, "DecodeGraphs", EagerGraphs)


def test_fixed_buffers_and_a_host_one_step_behind_change_nothing(request):
    """Also under preemption, with stop ids seen a step late, and prefixes split among several items."""
    model = random_model("llama2")
    prompts = prompts_of(LENGTHS)
    options = dict(n=3, max_new_tokens=40, temperature=0, stop_ids=(3, 17), watch=[5], progress=False)
    limits = Limits(cache_bytes=cache_bytes(model, PAGES), running=13, token_budget=64)
    wanted = generate(model, prompts, **options)
    request.getfixturevalue("with_graphs")
    got = generate(model, prompts, limits=limits, **options)
    for a, b in zip(itertools.chain(*wanted), itertools.chain(*got), strict=True):
        assert (a.ids, a.finish) == (b.ids, b.finish)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


def test_a_step_in_flight_may_end_all_that_runs_while_blocks_are_short(with_graphs):
    """Two samples stand at a page's end, one page is free, and the step before has just stopped both."""
    model = random_model("llama2")
    prompts = prompts_of([14, 14])
    options = dict(max_new_tokens=4, temperature=1, keys=["a", "b"], progress=False)
    whole = generate(model, prompts, **options, stop_ids=())
    stop_ids = [sample.ids[2] for (sample,) in whole]  # drawn at the page's last place
    limits = Limits(cache_bytes=cache_bytes(model, 4), running=2)
    got = generate(model, prompts, **options, stop_ids=stop_ids, limits=limits)
    assert [(len(sample.ids), sample.finish) for (sample,) in got] == [(3, "stop")] * 2


def test_only_samples_that_share_are_read_in_two_parts(with_graphs, monkeypatch):
    """A step without a shared prefix has no launch for one."""
    seen = []

    def noted(self, batch, *arguments):
        shared_R = batch.positions_R + 1 - batch.own.visible_IJ[:, 0]
        seen.append((len(batch.prefix.rows_IJ), shared_R.tolist()))
        return graphs.DecodeGraphs.launch(self, batch, *arguments)

    monkeypatch.setattr(EagerGraphs, "launch", noted)
    options = dict(max_new_tokens=4, stop_ids=(), progress=False)
    generate(random_model("llama2"), prompts_of([40, 40]), n=3, **options)
    assert seen[0] == (4, [32] * 6)  # items of at most two rows each
    seen.clear()
    generate(random_model("llama2"), prompts_of([40, 40]), **options)
    assert seen[0] == (0, [0, 0])


def test_a_calls_cache_goes_with_the_call(with_graphs, monkeypatch):
    """Kept in a circle, a device's cache would still be there when the next call measures what is free."""
    engines = []

    def remembered(*arguments):
        made = EngineWithGraphs(*arguments)
        engines.append(weakref.ref(made))
        return made

    monkeypatch.setattr(sampler, "Engine", remembered)
    model = random_model("llama2")
    gc.disable()
    try:
        generate(model, [[1, 2, 3]], max_new_tokens=2, progress=False)
        next(generate_iter(model, [[1, 2, 3]] * 2, max_new_tokens=2, progress=False))  # and left there
        assert [made() for made in engines] == [None, None]
    finally:
        gc.enable()


def test_an_engine_serves_call_after_call_with_other_sizes_options_and_weights(with_graphs):
    """Each as a call of its own: what the calls before left (pages, graphs, columns of weights) is theirs."""
    model = random_model("llama2")
    kept = EngineWithGraphs(model)
    calls, captured = [(1, 10, 0.0), (3, 40, 0.0), (3, 40, 1.0), (2, 20, 0.0), (3, 40, 1.0)], 0
    for seed, (n, new, temperature) in enumerate(calls):
        if seed == 3:
            with torch.no_grad():
                model.blocks[0].mlp.down.weight.mul_(-1)
        options = dict(n=n, max_new_tokens=new, temperature=temperature, seed=seed, stop_ids=())
        options |= dict(progress=False, watch=[3 + n])
        pages = kept.pages
        got, alone = (generate(model, prompts_of(LENGTHS), engine=each, **options) for each in (kept, None))
        assert got == alone
        assert kept.pages == pages or seed < 2
        assert seed != 4 or len(kept.graphs.captured) == captured  # its sizes and options have been met
        captured = len(kept.graphs.captured)


def test_a_call_that_another_has_cut_into_says_so():
    """Two of them would write over each other's pages."""
    model = random_model("llama2")
    kept = engine.Engine(model)
    first = generate_iter(model, [[1, 2, 3]] * 2, max_new_tokens=[1, 9], progress=False, engine=kept)
    next(first)
    generate(model, [[1, 2]], max_new_tokens=1, progress=False, engine=kept)
    with pytest.raises(RuntimeError, match="another one on the same engine"):
        next(first)


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
    limits = Limits(cache_bytes=cache_bytes(model, PAGES), page_size=16, running=13, token_budget=64)
    options = dict(n=3, max_new_tokens=40, top_p=0.9, top_k=50, stop_ids=(), progress=False)
    for prompt, group in zip(prompts, generate(model, prompts, limits=limits, **options), strict=True):
        for sample in group:
            assert len(sample.ids) == 40 and sample.finish == "length"
            scored = gramr2.logprobs(model, [prompt + sample.ids])[0][len(prompt) - 1 :].cpu().numpy()
            np.testing.assert_allclose(sample.logprobs, scored, atol=0.15)


@pytest.mark.parametrize("way", ["graphs", "plain"])
def test_requests_that_join_and_leave_and_choose_in_their_own_ways(request, monkeypatch, way):
    """Five ways, where graphs are kept for two, in one running batch; some join late, one leaves."""
    model = random_model("llama2")
    lengths = [33, 40, 17, 50, 34]
    ways = [{"temperature": 0}, {"temperature": 0.8}, {"top_k": 4}, {"top_p": 0.7}, {"watch": [7, 11]}]
    same = {"n": 2, "max_new_tokens": 12, "stop_ids": ()}
    asked = [same | {"keys": [str(number)]} | each for number, each in enumerate(ways)]
    prompts = [prompts_of([length], seed=length) for length in lengths]
    wanted = [generate(model, p, progress=False, **o)[0] for p, o in zip(prompts, asked, strict=True)]
    if way == "graphs":
        request.getfixturevalue("with_graphs")
        monkeypatch.setattr(engine, "MOST_OPTIONS", 2)
    requests = [sampler.request_of(model, p, **o) for p, o in zip(prompts, asked, strict=True)]
    capacity = requests[3].capacity(model.config, model.head_weight, Limits(running=7))
    batch = sampler.RunningBatch(sampler.Engine(model), replace(capacity, pages=60))
    arrivals, found = {0: [0, 1], 3: [2, 3], 9: [4]}, {}
    for step in itertools.count():
        for number in arrivals.pop(step, []):
            batch.add(requests[number])
        if step == 6:
            batch.drop(requests[1])
        if not (batch.busy or arrivals):
            break
        found |= {(requests.index(p.request), n): sample for p, n, sample in batch.step()[1]}
    assert batch.pool.used == 0 and found.keys() == {(i, n) for i in (0, 2, 3, 4) for n in range(2)}
    for (i, n), sample in found.items():
        assert sample.ids == wanted[i][n].ids
        np.testing.assert_allclose(sample.logprobs, wanted[i][n].logprobs, atol=2e-5)
        assert len(sample.watched[0]) == len(ways[i].get("watch", []))
        assert way == "graphs" or sample == wanted[i][n]
