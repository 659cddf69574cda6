"""The memory of a training, told beforehand: held to what its tensors come to hold, byte by byte."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memory
import training

from gramr2 import cost, parallel
from gramr2.settings import TrainSettings

ALONE = parallel.Ranks(0, 1, torch.device("cpu"))
DEEP = replace(memory.SMALL, num_layers=6, qkv_bias=True, num_kv_heads=4)


@pytest.mark.parametrize("way", memory.WAYS)
@pytest.mark.parametrize("model, tokens", [(memory.SMALL, 512), (memory.WORDS, 256), (DEEP, 256)])
def test_the_estimate_is_within_a_tenth_of_the_peak(model, tokens, way):
    """Blocks would be computed again for nothing, or a run end on a card that it was said to fit. In bfloat16
    the estimate was a fifth too low: logits and their copy were not in it."""
    found = memory.measure(model, tokens, ALONE, **memory.WAYS[way])
    assert found["estimate"] == pytest.approx(found["measured"], rel=memory.WITHIN)


def test_the_count_of_live_bytes_sees_what_comes_and_goes():
    """What every estimate is held to; a view holds no more, and what is dropped is gone."""
    held = torch.zeros(100)
    with memory.LiveBytes([held]) as live:
        one = torch.ones(1000).view(10, 100)[:5] + held
        two = torch.ones(50)
        del one
        three = two * 2
    assert live.peak == 400 + 4000 + 2000 and live.live == 400 + 200 + 200 and len(three) == 50


def test_an_estimate_is_near_what_a_gpu_held():
    """Measured when one rank was wrapped in FSDP as many are: 55.15 GiB, and 54.56 with compiled blocks."""
    settings = TrainSettings(max_length=8192, token_budget=16384, recompute=99, fsdp_size=1)
    model, cuda = training.LARGE["LLaMA-3.2-3B"], torch.device("cuda")
    for compiled, gib in ((False, 55.15), (True, 54.56)):
        parts = cost.memory_per_rank(replace(settings, compile=compiled), model, 2, cuda)
        assert sum(parts.values()) * 1e9 == pytest.approx(gib * 2**30, rel=0.05)


def test_cards_are_named_with_their_largest_budget_and_what_would_change_it():
    """A recipe that fits nowhere has to say what would make it fit, and that has to be true."""
    settings = TrainSettings(max_length=4096, token_budget=16384)
    lines = cost.cards(settings, training.LARGE["LLaMA-3.2-3B"], 1)
    assert [line.split()[2] for line in lines[1:]] == ["no", "no", "yes", "yes"]
    budget = int(lines[3].split()[3].replace(",", ""))
    asked = replace(settings, token_budget=budget, recompute=99)
    for more, fits in ((0, True), (256, False)):
        asked = replace(asked, token_budget=budget + more)
        parts = cost.memory_per_rank(asked, training.LARGE["LLaMA-3.2-3B"], 1, torch.device("cuda"))
        assert (sum(parts.values()) <= 0.9 * 80) is fits
    large = training.LARGE["LLaMA-3.1-8B"]
    *lines, change = cost.cards(settings, large, 1)
    assert not [line for line in lines if "yes" in line] and "(141 GB)" in change
    assert change.split()[1:3] == ["--optimizer-dtype", "bfloat16"] and "torchrun over 2 cards" in change
    assert "--lora-rank 16 (24 GB)" in change or "--lora-rank 16 (48 GB)" in change
    *lines, last = cost.cards(replace(settings, optimizer_dtype="bfloat16"), large, 1)
    assert last.split()[:3] == ["141", "GB", "yes"]
    long = replace(settings, token_budget=10**6, recompute=0)
    *_, change = cost.cards(long, training.LARGE["SmolLM2-135M"], 1)
    assert change.startswith("change   --recompute -1 (80 GB), or --token-budget ")
