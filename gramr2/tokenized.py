"""A run's examples as token ids: made once, before the first step, and kept beside the run until it is done.

Tokenizing takes about as long as a step of a small model on a GPU, and would take turns with it. So every
rank makes its share of all that the steps will ask for, each example once however often it is used, and
`global_batches` reads them as they come. A run that goes on finds them; where they are damaged, or another
number of examples is asked for, they are made anew.

It leaves out: which examples a step takes (plan.py), and what they are (examples.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from gramr2.examples import ExampleBuilder
from gramr2.fields import Fields
from gramr2.files import InputError, publish_file
from gramr2.parallel import Ranks
from gramr2.plan import Plan
from gramr2.records import Example, Tokens
from gramr2.seals import check_seals, read_signed, seal, write_signed
from gramr2.tokenizer import in_threads

ABOUT, NONE = "tokens.json", -1
Use = tuple[int, int, str]  # row, epoch and letter: what the builder makes an example of


def global_batches(
    plan: Plan, builder: ExampleBuilder, ranks: Ranks, place: Path, first: int
) -> Iterator[list[Example]]:
    """The examples of each step, over all ranks, from the step `first` on; made before it returns."""
    numbers: dict[tuple, int] = {}  # of what is the same wherever it is used
    uses: list[Use] = []
    steps: list[list[int]] = []
    for step in range(plan.steps):
        steps.append([])
        for use in plan.step(step):
            number = numbers.setdefault(builder.key(*use), len(uses))
            if number == len(uses):
                uses.append(use)
            steps[-1].append(number)
    examples = TokenFiles(_files(uses, builder, ranks, place))
    return ([examples[number] for number in chosen] for chosen in steps[first:])


def remove(place: Path) -> None:
    for path in place.glob("tokens*"):
        path.unlink()


class TokenFiles:
    """Of n files, one from each rank: example i is in file i % n."""

    def __init__(self, paths: Sequence[Path]):
        files = [safe_open(path, framework="np") for path in paths]
        self.ids = [file.get_slice("ids") for file in files]  # read as they are asked for
        self.rows, self.margins = ([file.get_tensor(name) for file in files] for name in ("rows", "margins"))

    def __getitem__(self, number: int) -> Example:
        place, file = divmod(number, len(self.ids))
        offset, one, start, two, second_start, letter_place, letter = self.rows[file][place].tolist()
        ids = self.ids[file][offset : offset + one + max(two, 0)].tolist()
        sequences = [Tokens(tuple(ids[:one]), start)]
        if two != NONE:
            sequences.append(Tokens(tuple(ids[one:]), second_start))
        other_letter = None if letter == NONE else (letter_place, letter)
        margin = float(self.margins[file][place])
        return Example(tuple(sequences), other_letter=other_letter, margin=margin)


def _files(uses: list[Use], builder: ExampleBuilder, ranks: Ranks, place: Path) -> list[Path]:
    """The files with all examples, as they were left here, or made now."""

    def known() -> list[str] | None:
        try:
            about = Fields(read_signed(place / ABOUT), f"{place / ABOUT}: ")
            check_seals(place, about.get("files", dict), "it is made anew")
        except InputError:
            return None
        return [*about.get("files", dict)] if about.get("examples", int) == len(uses) else None

    def make() -> str:
        name = f"tokens-{ranks.rank}-of-{ranks.size}.safetensors"
        _write(place / name, uses[ranks.rank :: ranks.size], builder, ranks)
        return name

    def sign(names: list[str]) -> None:
        seals = {name: seal(place / name) for name in names}
        write_signed(place / ABOUT, {"examples": len(uses), "files": seals})

    names = ranks.on_rank_0(known)
    if names is None:
        names = ranks.on_all_ranks(make)
        ranks.on_rank_0(lambda: sign(names))
    return [place / name for name in names]


def _write(path: Path, uses: Sequence[Use], builder: ExampleBuilder, ranks: Ranks) -> None:
    ids: list[np.ndarray] = [np.zeros(0, np.int32)]
    rows, margins, offset = [], [], 0
    threads = max(1, (os.cpu_count() or 1) // ranks.size)
    bar = ranks.bar(len(uses), least=1000, desc="tokenizing", leave=False)
    with bar:
        for example in in_threads(lambda use: builder(*use), uses, threads):
            one, *more = example.sequences
            two: Any = more[0] if more else None
            second = (len(two.ids), two.start) if two else (NONE, NONE)
            rows.append((offset, len(one.ids), one.start, *second, *(example.other_letter or (NONE, NONE))))
            ids += [np.array(sequence.ids, np.int32) for sequence in example.sequences]
            margins.append(example.margin)
            offset += example.length
            bar.update()
    table = np.array(rows, np.int64).reshape(-1, 7)
    with publish_file(path) as temporary:
        save_file({"ids": np.concatenate(ids), "rows": table, "margins": np.array(margins)}, temporary)
