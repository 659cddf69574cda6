"""Resume points: the state of a training on disk, from which it goes on, on any number of ranks.

`resume/step-N/` holds a whole state: rank-R.safetensors of every rank, with those rows of each tensor that
were its own, and point.json, which says where the run stood (the cursor), which rows each file has, and what
it held when it was written. Nothing in it is code: reading one executes nothing.

A state is copied, then written by a thread while training goes on, and published by a rename once every rank
has written its part; what is being written begins with a dot. A failure to write leaves the earlier points as
they are. A point that is damaged is passed over for the one before. On several nodes the directory has to be
one that all of them see.

It leaves out: when a point is due (fit.py), and what else a step depends on, which is its number alone.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from gramr2.fields import Fields
from gramr2.files import InputError, JsonRow, need, sync
from gramr2.loss import Trainee
from gramr2.parallel import Ranks
from gramr2.seals import check_seals, read_signed, seal, write_signed

KEPT = 2  # points: the newest, and the one before in case a disk lied
ABOUT, PARTS = "point.json", ("cursor", "files", "rows")
State = dict[str, Tensor]


def training_state(trainee: Trainee, optimizer: torch.optim.Optimizer) -> State:
    """Everything that a step changes, by flat names that no number of ranks appears in."""
    state = {}
    for name, parameter in trainee.trained.items():
        state[f"weight.{name}"] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{key}.{name}"] = optimizer.state[parameter][key]
    return state


class ResumePoints:
    """The directory `resume/`."""

    def __init__(self, directory: Path, ranks: Ranks):
        self.directory, self.ranks = directory, ranks
        self.writer = ThreadPoolExecutor(1, "resume point")
        self.pending: tuple[Future, Path, Path] | None = None

    def points(self) -> list[Path]:
        return sorted(self.directory.glob(f"step-{'[0-9]' * 8}"))  # their numbers have leading zeros

    def _begin(self) -> list[Path]:
        """The points there are, once what was half written is gone."""
        for stale in self.directory.glob(".step-*.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return self.points()

    # ------------------------------------------------------------------ reading

    def load(self, state: State) -> JsonRow | None:
        """Fills `state` in place from the newest point that is whole; → its cursor, or None without any.

        Those behind it are damaged, and go: their steps are taken, and saved, again.
        """
        points = self.ranks.on_rank_0(self._begin)
        for number, point in reversed([*enumerate(points, 1)]):
            # The first rank says for all whether it is whole, so that they take the same one.
            try:
                about = self.ranks.on_rank_0(partial(read_point, point, state))
            except InputError as damage:
                if self.ranks.is_first:
                    print(f"warning: {damage}; an earlier resume point is looked for", file=sys.stderr)
                continue
            fill(state, point, about["rows"])
            self.ranks.on_rank_0(partial(remove, points[number:]))
            return about["cursor"]
        begin = f"remove {self.directory.parent} to begin anew"
        need(not points, f"{self.directory}: no resume point is whole; {begin}")
        return None

    # ------------------------------------------------------------------ writing

    def save(self, step: int, state: State, cursor: JsonRow) -> None:
        self.finish()
        final = self.directory / f"step-{step:08}"
        temporary = self.directory / f".{final.name}.tmp-0"
        rows = {name: own_rows(tensor) for name, tensor in state.items() if writes_rows(tensor)}
        copies = {name: local_part(state[name]).to("cpu", copy=True).contiguous() for name in rows}
        self.pending = self.writer.submit(self._write, temporary, copies, rows, cursor), temporary, final

    def _write(self, place: Path, copies: State, rows: dict[str, Any], cursor: JsonRow) -> str:
        """This rank's file and, once all have theirs, the first rank's point.json; → what failed, or ""."""
        file, sealed, failure = place / f"rank-{self.ranks.rank}.safetensors", None, ""
        try:
            place.mkdir(parents=True, exist_ok=True)
            save_file(copies, file)
            sync(file)
            sealed = seal(file)
        except (OSError, InputError, SafetensorError) as error:
            failure = str(error)
        parts = [(file.name, sealed, rows, failure)]
        if self.ranks.size > 1:
            parts *= self.ranks.size
            dist.all_gather_object(parts, parts[0], group=self.ranks.checkpoint_group)
        failure = next((each[3] for each in parts if each[3]), "")
        if self.ranks.is_first and not failure:
            files, spans = ({part[0]: part[n] for part in parts} for n in (1, 2))
            try:
                write_signed(place / ABOUT, {"cursor": cursor, "files": files, "rows": spans})
            except OSError as error:
                failure = str(error)
        return failure

    def publish_when_written(self) -> None:
        """Between steps: the first rank's write ends when every rank's has."""
        if self.pending and self.pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Waits for what is being written, and publishes it."""
        if self.pending is None:
            return
        (future, temporary, final), self.pending = self.pending, None
        failure = future.result()
        if not self.ranks.is_first:
            return
        try:
            if not failure:
                remove([final] if final.exists() else [])
                os.replace(temporary, final)
                for old in self.points()[:-KEPT]:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            failure = str(error)
        if failure:  # a state that could not be written costs time, not the run
            shutil.rmtree(temporary, ignore_errors=True)
            kept = self.points()[-1:]
            stands = f"{kept[0]} stands" if kept else "there is no earlier one"
            reason = " ".join(failure.split())[-200:]
            print(f"warning: a resume point was not saved ({reason}); {stands}", file=sys.stderr)


# ---------------------------------------------------------------------------------- what a point holds


def read_point(point: Path, state: State) -> JsonRow:
    """What point.json says, where the point is whole and is one of this state."""
    about = {name: Fields(read_signed(point / ABOUT), f"{point}: ").get(name, dict) for name in PARTS}
    check_seals(point, about["files"], "the point is damaged")
    covered = dict.fromkeys(state, 0)
    for file, rows in about["rows"].items():  # in the order of the ranks
        with safe_open(point / file, framework="pt") as stored:
            for name, (first, last) in rows.items():
                shape = [last - first, *state[name].shape[1:]] if name in state else None
                need(stored.get_slice(name).get_shape() == shape, f"{point}: {name} is of another model")
                need(covered[name] == first, f"{point}: {name} has a gap")
                covered[name] = last
    whole = all(covered[name] == len(tensor) for name, tensor in state.items())
    need(whole, f"{point}: some rows are in none of its files")
    return about


def remove(points: list[Path]) -> None:
    for point in points:
        shutil.rmtree(point)


def fill(state: State, point: Path, rows: dict[str, dict[str, list[int]]]) -> None:
    """Copies this rank's rows of every tensor from whatever files have them."""
    for file, spans in rows.items():
        with safe_open(point / file, framework="pt") as stored:
            for name, (first, last) in spans.items():
                start, stop = own_rows(state[name])
                begin, end = max(start, first), min(stop, last)
                if begin < end:
                    part = stored.get_slice(name)[begin - first : end - first]
                    local_part(state[name])[begin - start : end - start].copy_(part)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it or, where FSDP has split it, some of its rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[int, int]:
    """Which rows of the whole tensor this rank holds. FSDP cuts as torch.chunk does."""
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    mesh = tensor.device_mesh
    fsdp = mesh.ndim - 1  # the last dimension; over one before it, copies are replicated
    start = min(mesh.get_local_rank(fsdp) * math.ceil(len(tensor) / mesh.size(fsdp)), len(tensor))
    return start, start + len(tensor.to_local())


def writes_rows(tensor: Tensor) -> bool:
    """Whether this rank writes what it holds: of replicated copies, the first does."""
    if not isinstance(tensor, DTensor):
        return True
    mesh = tensor.device_mesh
    return len(tensor.to_local()) > 0 and (mesh.ndim == 1 or mesh.get_local_rank(0) == 0)
