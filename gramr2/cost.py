"""What a training costs: operations of a step, memory, the device's rate, and the lines a run begins with.

It leaves out: measuring a real one (benchmarks/training.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from gramr2.examples import ExampleBuilder
from gramr2.model import Decoder, ModelConfig
from gramr2.parallel import Ranks, compute_dtype
from gramr2.plan import Plan
from gramr2.recipes import suited_lr
from gramr2.records import Example
from gramr2.requests import free_bytes
from gramr2.settings import TrainSettings

# A model of more parameters has been trained on text; more epochs than that, of any examples, are questioned.
PRETRAINED, MANY_EPOCHS = 10_000_000, 10


def step_flops(config: ModelConfig, examples: Sequence[Example]) -> float:
    """Multiply-adds x 2 of forward and backward: matrices, attention, and the projection of targets."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_size
    block = config.hidden_size * (heads + 3 * config.intermediate_size)
    tokens = sum(example.length for example in examples)
    squares = sum(len(sequence.ids) ** 2 for example in examples for sequence in example.sequences)
    attention = config.num_heads * config.head_size * squares
    targets = 0 if config.num_labels else sum(example.units for example in examples)
    head = config.hidden_size * config.vocab_size * targets
    return 6.0 * (config.num_layers * (block * tokens + attention) + head)


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


def memory_per_rank(settings: TrainSettings, config: ModelConfig, ranks: int, half: bool) -> dict[str, float]:
    """GB on each rank, estimated, with `settings.recompute` blocks computed again. A token leaves about
    34 D + 8 F bytes in a block in bf16 (14 D + 6 F where the compiler chooses), and D numbers in one computed
    again."""
    parameters, width, blocks = count_parameters(config), 2 if half else 4, config.num_layers
    head = config.vocab_size * config.hidden_size
    block = (parameters - head * (2 - config.tie_embeddings)) / blocks
    per_width, per_mlp = (14, 6) if settings.compile else (34, 8)
    token = width / 2 * (per_width * config.hidden_size + per_mlp * config.intermediate_size)
    again = min(settings.recompute, blocks)
    # Of blocks that are computed again, one at a time is whole.
    stored = token * (blocks - again + (again > 0)) + width * config.hidden_size * again
    beside = width * (head * (2 - config.tie_embeddings) + 2 * block)  # gathered of other ranks' parts
    if ranks == 1:
        beside = width * parameters if half else 0  # a copy of its own
    sizes = {
        "weights, gradients and AdamW": 16 * parameters / (settings.fsdp_size or ranks),
        "weights to compute with": beside,
        "activations": settings.token_budget * stored,
        "the head's gradient": 4 * head,
    }
    return {name: size / 1e9 for name, size in sizes.items()}


def recomputed_blocks(settings: TrainSettings, config: ModelConfig, ranks: Ranks) -> int:
    """`settings.recompute`, where that leaves it open: as few as fit into nine tenths of what is free."""
    if settings.recompute >= 0 or ranks.device.type != "cuda":
        return max(0, settings.recompute)
    half, free = compute_dtype(settings, ranks.device) == torch.bfloat16, free_bytes(ranks.device)

    def fits(again: int) -> bool:
        asked = dataclasses.replace(settings, recompute=again)
        return sum(memory_per_rank(asked, config, ranks.size, half).values()) * 1e9 < 0.9 * free

    return next(filter(fits, range(config.num_layers)), config.num_layers)


def count_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


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
    if settings.lr > 10 * suited_lr(parameters):
        lines.append(
            f"warning: lr {settings.lr:g} would undo what a model of this size knows; about "
            f"{suited_lr(parameters):g} suits it (--lr, or lr in [train])"
        )
    lines += [f"dropped  {count:,}: {reason}" for reason, count in sorted(plan.dropped.items())]
    return lines + builder.notes
