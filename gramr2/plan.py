"""What a run of training will do, fixed before a weight is read: the model's shape, the rows, the steps.

`make_plan` reads every row once and drops what the stage cannot use. `Plan.step` names the examples of a
step over all ranks before they are split, so that a step is the same whatever the number of ranks;
`split_into_packs` then gives each rank as many packs as the others.

It leaves out: the steps themselves (fit.py), and what they cost (cost.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gramr2.data import order, pack
from gramr2.examples import ExampleBuilder
from gramr2.files import InputError
from gramr2.model import ModelConfig
from gramr2.parallel import Ranks
from gramr2.records import Example
from gramr2.settings import TrainSettings
from gramr2.stages import Unusable
from gramr2.tokenizer import Tokenizer
from gramr2.weights import read_config


def read_model_config(
    stage: str, head: str, settings: TrainSettings, model_dir: Path, tokenizer: Tokenizer
) -> ModelConfig:
    """The shape of the model that a stage trains; one that does not suit the stage is refused."""
    config, _ = read_config(model_dir)
    if head == "scalar":
        config = dataclasses.replace(config, num_labels=config.num_labels or 1)
    elif config.num_labels:
        raise InputError(f"{model_dir}: has a scalar head; the stage {stage} needs a language model")
    if config.num_labels > 1:
        raise InputError(f"{model_dir}: has {config.num_labels} scores; a reward model has one")
    if settings.max_length > config.max_positions:
        raise InputError(
            f"max_length: {settings.max_length} is beyond the model's {config.max_positions} positions"
        )
    if config.vocab_size < tokenizer.size:
        raise InputError(f"{model_dir}: the tokenizer has more ids than the model, {config.vocab_size}")
    return config


@dataclass(frozen=True)
class Plan:
    """Which rows are used, and how many steps that makes. `lengths` and `units` are of the rows in `kept`."""

    kept: np.ndarray
    lengths: np.ndarray
    units: np.ndarray
    dropped: dict[str, int]
    batch_size: int
    examples: int  # over all epochs; the last step may be smaller
    seed: int = 0

    @property
    def steps(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    def step(self, number: int) -> list[tuple[int, int, str]]:
        """(row, epoch, letter of the better response) of every example of a step, over all ranks.

        Either letter goes to half of the rows of an epoch, by a seeded draw, and the next epoch turns all.
        """
        last = min((number + 1) * self.batch_size, self.examples)
        places = [divmod(place, len(self.kept)) for place in range(number * self.batch_size, last)]
        orders = {epoch: order(len(self.kept), self.seed, epoch) for epoch in {e for e, _ in places}}
        turns = order(len(self.kept), self.seed + 1, 0)
        chosen = [(int(orders[epoch][place]), epoch) for epoch, place in places]
        return [(int(self.kept[k]), epoch, "AB"[(int(turns[k]) + epoch) % 2]) for k, epoch in chosen]


def make_plan(builder: ExampleBuilder, settings: TrainSettings, ranks: Ranks) -> Plan:
    """Tokenizes every row once, each rank its share: too long, or without what the stage needs, is out."""
    mine = range(ranks.rank, builder.size, ranks.size)

    def measure() -> tuple[list[tuple[int, int, int]], Counter[str]]:
        found, dropped = [], Counter[str]()
        for i in tqdm(mine, "reading", disable=not ranks.is_first or builder.size < 10000, leave=False):
            try:
                example = builder.plain(i)
                found.append((i, example.length, example.units))
            except Unusable as reason:
                dropped[str(reason)] += 1
        return found, dropped

    parts = ranks.on_all_ranks(measure)
    dropped: Counter[str] = sum((part[1] for part in parts), Counter())
    rows = np.array(sorted(row for part in parts for row in part[0]), dtype=np.int64).reshape(-1, 3)
    is_long = rows[:, 1] > settings.max_length
    if is_long.any():
        most = f"the longest has {rows[is_long, 1].max():,} tokens"
        dropped[f"longer than max_length {settings.max_length:,} ({most})"] = int(is_long.sum())
        rows = rows[~is_long]
    if not len(rows):
        stage, reasons = builder.stage.name, ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        raise InputError(
            f"{builder.names}: none of {builder.size} rows can train the stage {stage} ({reasons})"
        )
    examples = settings.steps * settings.batch_size or max(1, round(settings.epochs * len(rows)))
    kept, lengths, units = rows.T
    return Plan(kept, lengths, units, dict(dropped), settings.batch_size, examples, settings.seed)


def split_into_packs(examples: Sequence[Example], ranks: int, budget: int) -> list[list[list[Example]]]:
    """Packs for each rank, as many for one as for another, and as even in tokens as they come.

    There are as few as best-fit packing needs. Examples go, longest first, to the pack with the fewest
    tokens; where that overflows a pack, the tighter best-fit packs are taken. Packs may stay empty.
    """
    lengths = [example.length for example in examples]
    tight = pack(lengths, budget)
    count = math.ceil(len(tight) / ranks) * ranks
    even: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for i in sorted(range(len(examples)), key=lambda i: (-lengths[i], i)):
        lightest = tokens.index(min(tokens))
        even[lightest].append(i)
        tokens[lightest] += lengths[i]
    packs = even if max(tokens) <= budget else tight + [[]] * (count - len(tight))
    return [[[examples[i] for i in members] for members in packs[rank::ranks]] for rank in range(ranks)]
