"""Matrices of the CPU's sampler: a row's bits are its own, and a copy follows what it was made from."""

from __future__ import annotations

import fresh
import pytest
import test_sampler
import torch
from checkpoints import random_model
from torch import nn

from gramr2.engine import Engine
from gramr2.kernels import linear_cpu
from gramr2.kernels.linear_cpu import LONG, Columns, Packed, rows_needed
from gramr2.sampler import generate

SIZES = [(64, 32), (33, 50), (960, 576), (576, 1536), (128, LONG), (128, LONG + 1), (70, 3000)]  # N, D
ROWS = 1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33, 64, 65, 200


@pytest.mark.parametrize("columns, width", SIZES)
def test_a_packed_products_row_is_bitwise_its_own(columns, width):
    """Any number of rows, anywhere among them: else a sample changes with what is sampled beside it."""
    torch.manual_seed(0)
    packed, x_RD = Packed(nn.Linear(width, columns)), torch.randn(256, width)
    many = packed(x_RD)
    for first in 0, 7:
        for rows in ROWS:
            assert packed(x_RD[first : first + rows]).equal(many[first : first + rows]), (first, rows)


@pytest.mark.parametrize("bias", [True, False])
def test_packed_side_by_side_is_each_matrix(bias):
    torch.manual_seed(0)
    linears, x_RD = [nn.Linear(40, n, bias=bias) for n in (48, 16, 16)], torch.randn(5, 40)
    packed = Packed(*linears)
    for got, linear in zip(packed(x_RD).split(packed.sizes, -1), linears, strict=True):
        torch.testing.assert_close(got, linear(x_RD), atol=1e-6, rtol=1e-5)


def through_optimizer(linear):
    linear(torch.ones(2, 32)).sum().backward()
    torch.optim.SGD(linear.parameters(), lr=0.1).step()


CHANGES = {
    "an optimizer's step": through_optimizer,
    "one number, behind autograd's back": lambda linear: linear.weight.data[3, 5].add_(1),
    "rows in another order": lambda linear: linear.weight.detach().copy_(linear.weight.detach().flip(0)),
    "another parameter": lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(16, 32))),
    "the bias": lambda linear: linear.bias.data.add_(1),
}


@pytest.mark.parametrize("kind", [Packed, Columns])
@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_follows_its_weights(change, kind):
    """A policy is sampled, trained in place and sampled again: never with the weights it had before."""
    linear, x_RD = nn.Linear(32, 16), torch.randn(4, 32)
    packed = kind(linear)
    before = packed.laid
    packed.refresh()
    assert packed.laid is before, "packed again, though nothing changed"
    CHANGES[change](linear)
    packed.refresh()
    torch.testing.assert_close(packed(x_RD), linear(x_RD).detach(), atol=1e-5, rtol=1e-5)


def packed_level_1() -> None:
    linear_cpu.SMALL = 0
    test_sampler.level_1()


def test_level_1_with_packed_matrices():
    """The sampler's promise, for the layout that larger models take."""
    fresh.run(packed_level_1, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive")


def test_without_onednn_the_samples_are_the_same(monkeypatch):
    """torch is built without it for some processors, Apple's among them; nothing may then be packed."""
    model, options = random_model("qwen3"), dict(max_new_tokens=8, seed=1, stop_ids=(), progress=False)
    (packed,) = generate(model, [[1, 2, 3]], **options)[0]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(linear_cpu, "Packed", None)
    (plain,) = generate(model, [[1, 2, 3]], **options)[0]
    assert plain.ids == packed.ids
    torch.testing.assert_close(torch.tensor(plain.logprobs), torch.tensor(packed.logprobs))


@pytest.mark.parametrize("small", [0, linear_cpu.SMALL], ids=["packed", "column by column"])
def test_a_kept_copy_samples_as_the_model_is_now(monkeypatch, small):
    monkeypatch.setattr(linear_cpu, "SMALL", small)
    model, options = random_model("qwen3"), dict(max_new_tokens=8, temperature=0, stop_ids=(), progress=False)
    generate(model, [[1, 2, 3]], **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.01)
    kept = generate(model, [[1, 2, 3]], **options)
    linear_cpu._kept.clear()
    assert kept == generate(model, [[1, 2, 3]], **options)


@pytest.mark.parametrize("needed", [1, 2, 8, 64])
def test_rows_are_padded_as_far_as_it_takes(needed):
    """A library that sums other numbers of rows than multiples of `needed` in another order."""
    x_M = torch.ones(512)
    assert rows_needed(object(), lambda part: x_M[part] * (1 + len(x_M[part]) % needed), 512) == needed


def test_rows_that_are_taken_six_at_a_time_are_padded_to_whole_sixes():
    """As oneDNN before 3.11 does with AVX2 alone: samples of torch 2.11 depended on what ran beside them."""

    def results(part: slice) -> torch.Tensor:
        row_M = torch.arange(512)[part]
        rest = len(row_M) % 6 if len(row_M) % 6 <= 3 else 0
        return row_M + (torch.arange(len(row_M)) >= len(row_M) - rest)

    assert rows_needed("six", results, 512) == 24
    assert rows_needed("another", results, 64) == 24


def test_a_model_of_zeros_says_nothing_of_the_next_one(monkeypatch):
    """It is alike in any number of rows, and what a kind of model needs is tried out once."""
    monkeypatch.setattr(linear_cpu, "_rows", {})
    zeros = random_model("llama2")
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    for model in zeros, random_model("llama2"):
        engine = Engine(model)
        generate(model, [[1, 2, 3]], max_new_tokens=1, progress=False, engine=engine)
        assert engine.multiple >= linear_cpu.ROWS
