"""What `train` would do, and the memory that it would take: the data are read, and no weight.

So it serves for models that this machine could never hold.

It leaves out: the time, which nothing but a measurement tells (benchmarks/training.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from gramr2.cost import describe, memory_per_rank, recomputed_blocks
from gramr2.examples import ExampleBuilder
from gramr2.parallel import Ranks, compute_dtype
from gramr2.plan import make_plan, read_model_config
from gramr2.settings import TrainSettings


def dry_run(
    stage: str, settings: TrainSettings, data: Sequence[Path], model_dir: Path, ranks: Ranks
) -> list[str]:
    """What `train` would do with these, in lines: reads the data, and no weight."""
    builder = ExampleBuilder(stage, settings, data, model_dir)
    config = read_model_config(builder.stage.name, builder.stage.head, settings, model_dir, builder.tokenizer)
    plan = make_plan(builder, settings, Ranks(0, 1, ranks.device))
    half = compute_dtype(settings, ranks.device) == torch.bfloat16
    settings = dataclasses.replace(settings, recompute=recomputed_blocks(settings, config, ranks))
    parts = memory_per_rank(settings, config, ranks.size, half)
    memory = f"memory   about {sum(parts.values()):.3g} GB on each of {ranks.size} ranks, in GB: "
    memory += ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    return [*describe(plan, builder, model_dir, config), memory]
