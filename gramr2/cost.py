"""What a run costs, and the lines that say so before it begins: operations, memory, tokens and steps.

`step_flops` counts the operations of a step, `matmul_rate` measures what the device could do of them;
`memory_per_rank` estimates. `dry_run` is all of that for a model that this machine could never hold: it reads
the data, and no weight.

It leaves out: measuring a real training (benchmarks/training.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gramr2.examples import ExampleBuilder
from gramr2.model import Decoder, ModelConfig
from gramr2.parallel import Ranks, compute_dtype
from gramr2.plan import Plan, make_plan, read_model_config
from gramr2.records import Example
from gramr2.settings import TrainSettings


def step_flops(config: ModelConfig, rows: Sequence[Example]) -> float:
    """Multiply-adds x 2 of forward and backward: matrices, attention, and the projection of targets."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_size
    block = config.hidden_size * (heads + 3 * config.intermediate_size)
    tokens = sum(row.length for row in rows)
    squares = sum(len(sequence.ids) ** 2 for row in rows for sequence in row.sequences)
    attention = config.num_heads * config.head_size * squares
    targets = 0 if config.num_labels else sum(row.units for row in rows)
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


def memory_per_rank(settings: TrainSettings, config: ModelConfig, ranks: int, half: bool) -> dict[str, float]:
    """GB on each rank, estimated: a token leaves about 34 D + 8 F bytes in one block in bf16."""
    parameters, width = count_parameters(config), 2 if half else 4
    head = config.vocab_size * config.hidden_size
    block = (parameters - head * (2 - config.tie_embeddings)) / config.num_layers
    token = width / 2 * (34 * config.hidden_size + 8 * config.intermediate_size)
    stored = width * config.hidden_size * config.num_layers + token
    stored = stored if settings.checkpointing else token * config.num_layers
    gathered = width * (head * (2 - config.tie_embeddings) + 2 * block)
    sizes = {
        "weights, gradients and AdamW": 16 * parameters / (settings.fsdp_size or ranks),
        "gathered weights": gathered if ranks > 1 or half else 0,
        "activations": settings.token_budget * stored,
        "the head's gradient": 4 * head,
    }
    return {name: size / 1e9 for name, size in sizes.items()}


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


def dry_run(
    stage: str, settings: TrainSettings, data: Sequence[Path], model_dir: Path, ranks: Ranks
) -> list[str]:
    """What `train` would do with these, in lines: reads the data, and no weight."""
    builder = ExampleBuilder(stage, settings, data, model_dir)
    config = read_model_config(builder.stage.name, builder.stage.head, settings, model_dir, builder.tokenizer)
    plan = make_plan(builder, settings, Ranks(0, 1, ranks.device))
    half = compute_dtype(settings, ranks.device) == torch.bfloat16
    parts = memory_per_rank(settings, config, ranks.size, half)
    memory = f"memory   about {sum(parts.values()):.3g} GB on each of {ranks.size} ranks, in GB: "
    memory += ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    return [*describe(plan, builder, model_dir, config), memory]
