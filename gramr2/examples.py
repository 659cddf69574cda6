"""The rows of a stage's data as training examples, each a function of its number alone.

No generator's state is carried along: which letter is the better one's, and what the prover is not shown,
are functions of (seed, epoch, row). So the number of a step says all about where a run stands in its data.

It leaves out: what each stage makes of a record (stages.py), and the order of the rows (plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gramr2 import prompts
from gramr2.data import Store
from gramr2.files import InputError
from gramr2.records import Example
from gramr2.settings import PROMPTS, TrainSettings
from gramr2.stages import STAGES, Draws, Frame, Unusable
from gramr2.tokenizer import Tokenizer


class ExampleBuilder:
    """A stage's data as examples: row `i`, in epoch `e`, at a letter, is always the same ids.

    A pair whose rationale cannot be swapped keeps its own order, whatever letter is asked for.
    """

    def __init__(self, stage: str, settings: TrainSettings, data: Sequence[Path], model_dir: Path):
        self.stage, self.settings = STAGES[stage], settings
        self.stores = [Store(path, self.stage.record) for path in data]
        self.names = ", ".join(map(str, data))
        self.starts = np.cumsum([0, *map(len, self.stores)])
        self.size = min(int(self.starts[-1]), settings.limit or int(self.starts[-1]))
        if not self.size:
            raise InputError(f"{self.names}: no rows to train on")
        self.tokenizer = Tokenizer.load(model_dir, date=settings.date)
        template, self.notes = "", []
        if self.stage.template:
            kind, size = self.stage.template, settings.prompt
            ours = prompts.own_template(kind, size)
            template, note = prompts.template_for(model_dir, kind=kind, ours=ours)
            self.notes = [f"{note} ({size})"] if note.startswith("warning") else []
            if self.stage.own_prompt and template in [prompts.own_template(kind, each) for each in PROMPTS]:
                template = prompts.own_template(self.stage.own_prompt, size)
        self.frame = Frame(self.tokenizer, template, settings)

    def record(self, i: int) -> Any:
        file = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.stores[file][i - int(self.starts[file])]

    def plain(self, i: int) -> Example:
        """Example i in its own order, with nothing hidden: what decides whether it is used at all."""
        record = self.record(i)
        try:
            return self.stage.example(record, self.frame, Draws())
        except InputError as error:  # a text that has no ids, or that the chat template refuses
            raise Unusable(str(error)) from None

    def key(self, i: int, epoch: int, letter: str) -> tuple:
        """What such an example is made of; with the same key it is the same."""
        settings, letter = self.settings, letter if self.stage.template else ""
        condition, label = self.draws(i, epoch)
        return i, letter, condition < settings.drop_condition, label < settings.hide_label

    def draws(self, i: int, epoch: int) -> Draws:
        if not self.stage.hides:
            return Draws()
        return Draws(*np.random.default_rng([self.settings.seed, epoch, i]).random(2))

    def __call__(self, i: int, epoch: int, letter: str) -> Example:
        record = self.record(i)
        # Without a prompt that shows both responses there is no order.
        turns = self.stage.template and record.label != letter and record.swappable
        example = self.stage.example(record.swapped() if turns else record, self.frame, self.draws(i, epoch))
        if example.length <= self.settings.max_length:
            return example
        # The other order may be a token longer. Nothing is cut: the row stands as it was measured.
        return self.stage.example(record, self.frame, Draws())
