"""What a training costs: operations of a step, the device's rate, and the lines that a run begins with.

It leaves out: memory, which is estimated before a training (extras/dry_run.py), and measuring a real one
(benchmarks/training.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gramr2.examples import ExampleBuilder
from gramr2.model import Decoder, ModelConfig
from gramr2.plan import Plan
from gramr2.records import Example


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


def count_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


def describe(plan: Plan, builder: ExampleBuilder, model_dir: Path, config: ModelConfig) -> list[str]:
    """The first lines of a run: what it trains, on what, with how many tokens and parameters."""
    stage, epochs = builder.stage, plan.examples / len(plan.kept)
    per_step = plan.lengths.mean() * min(plan.batch_size, plan.examples)
    lines = [
        f"{stage.name} ({stage.equation})",
        f"model    {model_dir}: {count_parameters(config):,} parameters",
        f"data     {builder.names}: {len(plan.kept):,} examples, {plan.lengths.sum():,} tokens, "
        f"{plan.units.sum():,} {'pairs' if stage.head == 'scalar' else 'target tokens'}",
        f"steps    {plan.steps:,} of {plan.batch_size} examples, about {per_step:,.0f} tokens each "
        f"({epochs:.4g} epochs)",
    ]
    lines += [f"dropped  {count:,}: {reason}" for reason, count in sorted(plan.dropped.items())]
    return lines + builder.notes
