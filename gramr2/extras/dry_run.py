"""What `train` would do, and the memory that it would take: the data are read, and no weight.

So it serves for models that this machine could never hold, and names the cards on which they would fit.

It leaves out: the time, which nothing but a measurement tells (benchmarks/training.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gramr2.cost import cards, describe, memory_per_rank, recomputed_blocks
from gramr2.examples import ExampleBuilder
from gramr2.parallel import Ranks
from gramr2.plan import make_plan, read_model_config
from gramr2.settings import TrainSettings


def dry_run(
    stage: str, settings: TrainSettings, data: Sequence[Path], model_dir: Path, ranks: Ranks
) -> list[str]:
    """What `train` would do with these, in lines: reads the data, and no weight."""
    builder = ExampleBuilder(stage, settings, data, model_dir)
    config = read_model_config(builder.stage.name, builder.stage.head, settings, model_dir, builder.tokenizer)
    plan = make_plan(builder, settings, Ranks(0, 1, ranks.device))
    asked = dataclasses.replace(settings, recompute=recomputed_blocks(settings, config, ranks))
    largest_step = int(np.sort(plan.lengths)[-plan.batch_size :].sum())
    parts = memory_per_rank(asked, config, ranks.size, ranks.device, min(settings.token_budget, largest_step))
    memory = f"memory   about {sum(parts.values()):.3g} GB on each of {ranks.size} ranks, in GB: "
    memory += ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    return [*describe(plan, builder, model_dir, config), memory, *cards(settings, config, ranks.size)]
