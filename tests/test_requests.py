"""What is asked of the sampler: defaults that fit, prompts that wait, and bad input by its name."""

from __future__ import annotations

import tracemalloc

import pytest
from checkpoints import random_model
from small_caches import cache_bytes, prompts_of

from gramr2 import requests
from gramr2.sampler import Limits, generate, generate_iter


def test_prompts_that_wait_cost_their_ids():
    """Only what runs is taken in: at the first result of 30,000 prompts memory has hardly grown."""
    model = random_model("llama2")
    ids = [[i % 300, i // 300] for i in range(30_000)]
    generate(model, ids[:1], max_new_tokens=2, progress=False)  # what is imported or built but once
    tracemalloc.start()
    small = Limits(cache_bytes=1 << 22)  # a larger pool has longer lists of pages, whatever the queue
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
    monkeypatch.setattr(requests, "CPU_CACHE_BYTES", cache_bytes(model, 3))
    monkeypatch.setattr(requests, "MEMORY_BYTES", cache_bytes(model, 40))
    assert generate(model, prompts, **options) == wanted
    monkeypatch.setattr(requests, "MEMORY_BYTES", cache_bytes(model, 16))
    with pytest.raises(ValueError, match="prompt 0 has 100 tokens and may get 20 more, which takes"):
        generate(model, prompts, **options)


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
    "page_size is 7": dict(limits=Limits(page_size=7)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_before_anything_runs(message):
    options = {"prompts": [[1]], "max_new_tokens": 20, "progress": False} | BAD[message]
    with pytest.raises(ValueError, match=r".") as caught:
        generate_iter(random_model("llama2"), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_input_is_named_before_results_have_a_place():
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(random_model("llama2"), [[]], n=10**15, progress=False)
