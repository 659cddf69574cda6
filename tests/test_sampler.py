"""The sampler against slow truth: naive recomputation, the softmax itself, and itself in other company."""

from __future__ import annotations

import random

import fresh
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint, random_model
from oracles import chi_square, naive_greedy, naive_logits
from small_caches import LENGTHS, PAGES, cache_bytes, prompts_of

import gramr2
from gramr2 import kernels
from gramr2.sampler import Limits, generate, generate_iter

# -------------------------------------------------------------------------------------- greedy, exactly


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_naive_oracle_token_for_token(family):
    """Ragged prompts, three samples each, chunks of 24 tokens, and a pool so small that it must preempt."""
    model = random_model(family)
    prompts = prompts_of(LENGTHS)
    limits = Limits(cache_bytes=cache_bytes(model, PAGES), token_budget=24)
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
    "chunks of 7 tokens": lambda model: Limits(token_budget=7),
    "one at a time": lambda model: Limits(running=1),
    "five at a time": lambda model: Limits(running=5, token_budget=40),
    "preempted": lambda model: Limits(cache_bytes=cache_bytes(model, PAGES)),
    "prefix read alone": lambda model: Limits(share_prefix=False),
}


def level_1() -> None:
    torch.set_num_threads(1)
    same_in_any_company(*COMPANY)
    same_beside_longer_ones()
    torch.set_num_threads(2)
    same_in_any_company("preempted")


def same_in_any_company(*companies: str) -> None:
    model = random_model("qwen3")
    prompts = prompts_of(LENGTHS)
    prompts += [[*prompts[-1][:48], *tail] for tail in ([5, 6, 7], [8], [9, 9])]  # prefix hits
    keys = [f"pair {i}" for i in range(len(prompts))]
    options = dict(
        n=3, max_new_tokens=40, temperature=0.8, watch=[1, 2], seed=3, stop_ids=[9], progress=False
    )
    wanted = generate(model, prompts, keys=keys, **options)
    assert {s.finish for group in wanted for s in group} == {"stop", "length"}
    for name in companies:
        limits = COMPANY[name](model)
        order = list(range(len(prompts)))
        random.Random(name).shuffle(order)
        ask = [prompts[i] for i in order], [keys[i] for i in order]
        got = generate(model, ask[0], keys=ask[1], limits=limits, **options)
        assert got == [wanted[i] for i in order], f"{name}, {torch.get_num_threads()} threads"
    alone = generate(model, prompts[3:4], keys=keys[3:4], **options | {"n": 1})
    assert alone[0][0] == wanted[3][0]


def same_beside_longer_ones() -> None:
    """A matmul adds more than 192 products in an order that depends on how many there are: too long a cut
    of the keys would let the padding that a longer prompt causes change another prompt's bits."""
    model = random_model("qwen3")
    prompts = prompts_of([150, 200, 250, 450])
    options = dict(n=2, max_new_tokens=20, stop_ids=(), progress=False)
    alone = [generate(model, [prompt], keys=["x"], **options)[0] for prompt in prompts]
    together = generate(model, prompts, keys=["x"] * 4, **options)
    chunked = generate(model, prompts, keys=["x"] * 4, limits=Limits(token_budget=60), **options)
    assert together == chunked == alone


# As most laptops are: there MKL has kernels for 8 and 32 rows that round differently.
AVX2_ALONE = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.parametrize("processor", [{}, AVX2_ALONE], ids=["this processor", "AVX2 alone"])
def test_level_1_same_bits_in_any_company(processor):
    """Ids and log-probs, whatever the batch, order, chunks, prefix hits, preemption; on 1 and 2 threads."""
    fresh.run(level_1, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive", **processor)


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


def test_first_tokens_follow_the_softmax():
    """Chi-square of 4,000 samples over 8 tokens. Seeds are fixed, so it passes or fails for good; for another
    seed the chance of a false alarm is 0.001 (24.32 is that quantile for 7 degrees of freedom)."""
    model = random_model("llama2", vocab_size=8)
    prompt = [1, 2, 3]
    samples = generate(model, [prompt], n=4000, max_new_tokens=1, stop_ids=(), progress=False)[0]
    counts = np.bincount([s.ids[0] for s in samples], minlength=8)
    expected = naive_logits(model, prompt).softmax(-1).numpy() * 4000
    assert chi_square(counts, expected) < 24.32


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
        stops = torch.tensor([sample.ids[9], 999])
        by_id = generate(model, [prompt], **options, stop_ids=stops)[0][number]
        assert (by_id.ids, by_id.finish) == (sample.ids[: sample.ids.index(sample.ids[9]) + 1], "stop")
    ragged = generate(model, [prompt] * 2, n=2, max_new_tokens=[[5, 1], [2, 7]], stop_ids=(), progress=False)
    assert [[len(s.ids) for s in group] for group in ragged] == [[5, 1], [2, 7]]
    assert ragged[0][0].ids == plain[0].ids[:5]
    model.stop_ids = (plain[0].ids[3],)
    default = generate(model, [prompt], n=4, max_new_tokens=60, progress=False)[0][0]
    assert default.ids == plain[0].ids[: plain[0].ids.index(plain[0].ids[3]) + 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_that_sample_alone(value, capsys):
    """The poisoned sample ends as "error"; pages it leaves behind harm nobody; the bar counts it."""
    model = random_model("llama2")
    prompts = prompts_of([30, 31, 32, 33, 34, 35], vocabulary=300)
    options = dict(n=2, max_new_tokens=30, seed=1, stop_ids=(), keys=list("abcdef"))
    limits = Limits(cache_bytes=cache_bytes(model, PAGES))
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


def test_the_bar_moves_before_a_sample_ends_and_says_how_long_it_may_take(capsys, monkeypatch):
    """Sixteen answers of thousands of tokens printed nothing for twenty minutes."""
    clock = iter(range(10**6))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))  # a second at each look
    model = random_model("llama3")
    generate(model, [[1, 2, 3]], n=2, max_new_tokens=[[40, 40]], stop_ids=())
    begun = capsys.readouterr().err.split("1/2")[0].split("2/2")[0]
    assert "0/2" in begun and "tokens/s" in begun and "more" in begun and "at most" in begun


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


# ---------------------------------------------------------------------------------- on Triton's kernels


def interpreted() -> None:
    assert kernels.backend() == "triton"
    model = random_model("qwen3")
    prompts = prompts_of([1, 17, 40])
    samples = generate(model, prompts, n=2, max_new_tokens=3, temperature=0, stop_ids=(), progress=False)
    for prompt, group in zip(prompts, samples, strict=True):
        ids, logprobs = naive_greedy(model, prompt, 3)
        for sample in group:
            assert sample.ids == ids
            np.testing.assert_allclose(sample.logprobs, logprobs, atol=2e-5)


def test_the_triton_kernels_serve_the_sampler():
    """In Triton's interpreter, which reads its switch when the kernels are defined."""
    pytest.importorskip("triton")
    fresh.run(interpreted, TRITON_INTERPRET="1")
