"""What a training costs: operations of a step, memory, the device's rate, and the lines a run begins with.

Memory is estimated, from the model's shape and the settings; benchmarks/memory.py holds that to the peak of
a step that is taken. It leaves out: time, which nothing but a measurement tells (benchmarks/training.py).
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gramr2.examples import ExampleBuilder
from gramr2.kernels.reference import CHUNK_BYTES
from gramr2.kernels.sequence_logprob import FEW
from gramr2.lora import adapt
from gramr2.model import Decoder, ModelConfig
from gramr2.optimizer import BLOCK
from gramr2.parallel import Ranks, compute_dtype
from gramr2.plan import Plan
from gramr2.recipes import LORA_LR, suited_lr
from gramr2.records import Example
from gramr2.requests import free_bytes
from gramr2.settings import TrainSettings

# A model of more parameters has been trained on text; more epochs than that, of any examples, are questioned.
PRETRAINED, MANY_EPOCHS = 10_000_000, 10
CARDS = (24, 48, 80, 141)  # GB of memory
ROOM = 0.9  # of a card, or of what is free: the rest is for libraries, and for what lies in pieces
CUDA_CHUNK_BYTES = 1 << 30  # kernels/sequence_logprob_triton.py, which is imported with Triton alone
MOST_TOKENS = 1 << 20  # of a budget that is looked for


def step_flops(config: ModelConfig, examples: Sequence[Example], frozen: bool = False) -> float:
    """Multiply-adds x 2 of forward and backward: matrices, attention, and the projection of targets. Where
    the model is `frozen`, no matrix has a gradient of its own; adapters are taken for nothing."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_size
    block = config.hidden_size * (heads + 3 * config.intermediate_size)
    tokens = sum(example.length for example in examples)
    squares = sum(len(sequence.ids) ** 2 for example in examples for sequence in example.sequences)
    attention = config.num_heads * config.head_size * squares
    targets = 0 if config.num_labels else sum(example.units for example in examples)
    head = config.hidden_size * config.vocab_size * targets
    products = 2 if frozen else 3
    return 2.0 * (products * (config.num_layers * block * tokens + head) + 3 * config.num_layers * attention)


def matmul_rate(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """bf16 FLOP/s of a square matrix product, measured: what the MFU is a share of."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        a @ a
    start.record()
    for _ in range(repeats):
        a @ a
    end.record()
    torch.cuda.synchronize()
    return 2.0 * size**3 * repeats / (start.elapsed_time(end) / 1e3)


@cache
def count_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


@cache
def count_adapters(config: ModelConfig, rank: int, layers: tuple[str, ...]) -> int:
    """Parameters that are trained beside a frozen model: adapters, and a scalar head."""
    with torch.device("meta"):
        decoder = Decoder(config)
        adapt(decoder, rank, 0.0, layers)
    return sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)


# ---------------------------------------------------------------------------------- memory


def memory_per_rank(
    settings: TrainSettings, config: ModelConfig, ranks: int, device: torch.device,
    tokens: int = 0,
) -> dict[str, float]:  # fmt: skip
    """GB on each rank at its peak, estimated, by what holds them: in a step of several packs of so many
    tokens (of the budget, unless it is said), with `settings.recompute` blocks computed again. What is
    trained has a gradient and two moments; beside adapters the model has not."""
    whole, shards = count_parameters(config), min(settings.fsdp_size or ranks, ranks)
    rank, matrix = settings.lora_rank, config.vocab_size * config.hidden_size
    trained = count_adapters(config, rank, settings.lora_layers) if rank else whole
    frozen = whole if rank else 0
    width = compute_dtype(settings, device).itemsize
    moment = getattr(torch, settings.optimizer_dtype).itemsize
    beside: float = width * trained if width < 4 else 0  # a copy to compute with
    if ranks > 1:  # of other ranks' parts, for now: all that is in no block, two blocks, and their gradients
        outside = matrix * (2 - config.tie_embeddings)
        beside = width * outside + 2 * (2 * width + 4) * (whole - outside) / config.num_layers
    kept, peak = activations(settings, config, device, tokens or settings.token_budget, frozen > 0)
    # Rounded moments take room once activations have gone: for a block of a matrix at a time.
    peak = max(peak, 22 * min(BLOCK, matrix, trained) if moment < 4 else 0)
    sizes = {
        "weights, gradients and AdamW": (8 + 2 * moment) * trained / shards,
        "weights to compute with": beside + width * frozen / shards,
        "activations": kept,
        "what comes and goes": peak - kept,
    }
    return {name: size / 1e9 for name, size in sizes.items()}


def activations(
    settings: TrainSettings, config: ModelConfig, device: torch.device, tokens: int, frozen: bool
) -> tuple[float, float]:
    """Bytes that are kept when a pack has gone forward, each of its tokens a target; and the most that there
    are at once until it has gone backward. Counted operation by operation, from what autograd keeps of each;
    with the model `frozen` there are no gradients of its weights, and adapters are taken for nothing."""
    c, D, F, cuda = config, config.hidden_size, config.intermediate_size, device.type == "cuda"
    width, vocabulary = compute_dtype(settings, device).itemsize, 0 if c.num_labels else c.vocab_size
    heads, again = (c.num_heads + c.num_kv_heads) * c.head_size, min(max(0, settings.recompute), c.num_layers)
    # Numbers of a token. A norm keeps its input in float32, what its weight is multiplied by, and its output.
    norm = 4 / width + (1 if frozen else 2)
    block = 2 * norm * D + 2 * heads + c.qk_norm * (norm - 1) * heads + 4 / width * c.num_heads + 4 * F
    if settings.compile:
        block = 7 * D + 3 * F  # a compiler's choice: measured, not counted
    kept = (c.num_layers - again) * block + again * D + norm * D
    # Bytes. The loss has a chunk of logits, in float32 too where no kernel works on them in place, and what
    # gradients it adds to; then these a second time, at their scale (kernels/sequence_logprob.py).
    number, matrix = tokens * width, 0 if frozen else width * vocabulary * D
    logits = tokens * vocabulary * (width if cuda or width == 4 else width + 4)
    chunks = math.ceil(logits / (CUDA_CHUNK_BYTES if cuda else CHUNK_BYTES)) or 1
    summed = matrix * 4 / width if chunks > FEW else matrix
    loss = max(number * 2 * D + logits / chunks + summed, number * 3 * D + 2 * matrix)
    # A block's backward pass, the last one's first: gradients of activations, of a matrix, and of the
    # head's matrix, if it is the embedding, as that has more to come. When a block is computed again, those
    # behind it have gone.
    passing = number * (2 * F + 3 * D) + (0 if frozen else width * F * D) + c.tie_embeddings * matrix
    whole = max(kept if again < c.num_layers else 0, again * D + block if again else 0)
    return number * kept, max(number * kept + loss, number * whole + passing)


def recomputed_blocks(settings: TrainSettings, config: ModelConfig, ranks: Ranks) -> int:
    """`settings.recompute`, where that leaves it open: as few as fit into nine tenths of what is free."""
    if settings.recompute >= 0 or ranks.device.type != "cuda":
        return max(0, settings.recompute)
    free = free_bytes(ranks.device) / 1e9

    def fits(again: int) -> bool:
        asked = dataclasses.replace(settings, recompute=again)
        return sum(memory_per_rank(asked, config, ranks.size, ranks.device).values()) < ROOM * free

    return next(filter(fits, range(config.num_layers)), config.num_layers)


def largest_budget(settings: TrainSettings, config: ModelConfig, ranks: int, card: float) -> int:
    """Tokens of a pack that fit on each rank's card of so many GB, with as many blocks computed again as may
    be, in steps of 256; 0 where the longest example does not fit."""
    again = config.num_layers if settings.recompute < 0 else settings.recompute
    asked, cuda = dataclasses.replace(settings, recompute=again), torch.device("cuda")

    def is_too_much(tokens: int) -> bool:
        return sum(memory_per_rank(asked, config, ranks, cuda, tokens).values()) > ROOM * card

    found = 256 * bisect_left(range(256, MOST_TOKENS + 1, 256), True, key=is_too_much)
    return found if found >= min(settings.max_length, MOST_TOKENS) else 0


def cards(settings: TrainSettings, config: ModelConfig, ranks: int) -> list[str]:
    """Lines: on which cards this fits, with the largest token budget of each; and where it fits on none, what
    would change that."""

    def smallest(settings: TrainSettings, ranks: int) -> int:
        budgets = ((card, largest_budget(settings, config, ranks, card)) for card in CARDS)
        return next((card for card, most in budgets if most >= settings.token_budget), 0)

    dtype = str(compute_dtype(settings, torch.device("cuda"))).removeprefix("torch.")
    lines = [f"cards             fits   largest token budget, in {dtype}, on each of {ranks} ranks"]
    for card in CARDS:
        most = largest_budget(settings, config, ranks, card)
        fits = "yes" if most >= settings.token_budget else "no"
        lines.append(f"{card:12} GB   {fits:5}  {f'{most:,}' if most else 'none'}")
    if smallest(settings, ranks):
        return lines
    changes: dict[str, Any] = {"--optimizer-dtype": "bfloat16", "--lora-rank": 16, "--recompute": -1}
    changes["--token-budget"] = most or settings.token_budget
    helps = {}
    for flag, value in changes.items():
        changed = dataclasses.replace(settings, **{flag[2:].replace("-", "_"): value})
        helps[f"{flag} {value}"] = smallest(changed, ranks)
    more = next((n for n in (2, 4, 8, 16, 32) if n > ranks and smallest(settings, n)), 0)
    helps[f"torchrun over {more} cards"] = more and smallest(settings, more)
    shown = ", or ".join(f"{change} ({card} GB)" for change, card in helps.items() if card)
    return [*lines, f"change   {shown or 'the model: this one is too large for 32 cards'}"]


def describe(plan: Plan, builder: ExampleBuilder, model_dir: Path, config: ModelConfig) -> list[str]:
    """The first lines of a run: what it trains, on what, with how many tokens and parameters."""
    stage, settings, epochs = builder.stage, builder.settings, plan.examples / len(plan.kept)
    per_step, parameters = plan.lengths.mean() * min(plan.batch_size, plan.examples), count_parameters(config)
    lines = [
        f"{stage.name} ({stage.equation})",
        f"model    {model_dir}: {parameters:,} parameters",
        f"data     {builder.names}: {len(plan.kept):,} examples, {plan.lengths.sum():,} tokens, "
        f"{plan.units.sum():,} {'pairs' if stage.head == 'scalar' else 'target tokens'}",
        f"steps    {plan.steps:,} of {plan.batch_size} examples, about {per_step:,.0f} tokens each "
        f"({epochs:.4g} epochs)",
        f"lr       {settings.lr:g} at its peak, after {settings.warmup:.0%} of the steps; examples of up to "
        f"{settings.max_length:,} tokens",
    ]
    if parameters > PRETRAINED and epochs > MANY_EPOCHS:
        lines.append(
            f"warning: {plan.steps:,} steps make {epochs:.4g} epochs of these {len(plan.kept):,} examples, "
            "which will be learnt by heart; steps = 0 and epochs = 3 in [train], or as flags of train.py, "
            f"make {3 * plan.steps / epochs:,.0f} steps"
        )
    suits = suited_lr(parameters)
    if settings.lora_rank:
        suits *= LORA_LR
        trained = count_adapters(config, settings.lora_rank, settings.lora_layers)
        beside = f"beside {', '.join(settings.lora_layers)} of each block: {trained:,} trained parameters"
        lines.insert(2, f"adapters of rank {settings.lora_rank} {beside}")
    if settings.lr > 10 * suits:
        lines.append(
            f"warning: lr {settings.lr:g} would undo what a model of this size knows; about "
            f"{suits:g} suits it (--lr, or lr in [train])"
        )
    lines += [f"dropped  {count:,}: {reason}" for reason, count in sorted(plan.dropped.items())]
    return lines + builder.notes
