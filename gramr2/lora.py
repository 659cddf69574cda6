"""LoRA: two thin matrices beside a frozen one, trained in its place (arXiv 2106.09685).

    y = W x   becomes   y = W x + (alpha / r) B A x        A: r rows, drawn; B: r columns, zero at first

`adapt` freezes a decoder and puts an `Adapted` where a linear map stood. Nothing else knows of it: the
optimizer, resume points and FSDP see trained weights, of which there are few, and frozen ones, which stand in
the type that is computed in, without a float32 master, a gradient or moments.

What was trained is kept as PEFT keeps it, without the model: `adapter_config.json`, which names the base's
directory, and `adapter_model.safetensors`. An `Adapter` reads such a directory, ours or PEFT's, to go on with
it or to sample: then W + (alpha / r) B A takes the place of W, and costs nothing more.

It leaves out: dropout (data are seen a few times at most), adapters of the embedding, other ranks for other
layers, DoRA, and bases of 4 or 8 bits.

Shapes: r rank, D width of the input, N of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gramr2.directories import ADAPTER, adapter_config, base_of, open_tensors
from gramr2.files import InputError, JsonRow, need, short_hash
from gramr2.model import Decoder
from gramr2.seals import check_seals, read_signed, seal, write_signed

TENSORS, BASE = "adapter_model.safetensors", "base.json"  # BASE: seals of the base's weights
PREFIX = "base_model.model."  # before every name in TENSORS
TASKS = {0: "CAUSAL_LM", 1: "SEQ_CLS"}  # by the model's number of scores
# What changes the function of an adapter, and what it has to be for this module to compute it.
PLAIN = {"use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none"}
PLAIN |= {"rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None, "peft_type": "LORA"}


class Adapted(nn.Module):
    """A linear map that is frozen, with what is learnt beside it."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.base(x_TD) + self.b(self.scale * self.a(x_TD))


def adapt(decoder: Decoder, rank: int, alpha: float, layers: Iterable[str]) -> None:
    """Freezes all but adapters beside `layers` (by our words, of every block), and a scalar head."""
    decoder.requires_grad_(False)
    for block in decoder.blocks:
        for part in (block.get_submodule("attention"), block.get_submodule("mlp")):
            for word in part._modules.keys() & {*layers}:
                base = cast(nn.Linear, part.get_submodule(word))
                setattr(part, word, Adapted(base, rank, (alpha or 2 * rank) / rank))
    if decoder.score is not None:
        decoder.score.requires_grad_(True)


def adapted(decoder: Decoder) -> dict[str, Adapted]:
    """Adapted maps, by the name that their frozen weight has in a checkpoint."""
    found = decoder.named_modules()
    return {f"{name}.weight": module for name, module in found if isinstance(module, Adapted)}


def first_values(trained: dict[str, nn.Parameter], seed: int) -> Iterator[tuple[str, Tensor]]:
    """What new adapters begin with: A drawn as PEFT draws it, B zero; the same on any number of ranks."""
    for name, parameter in trained.items():
        bound = 1 / math.sqrt(parameter.shape[1])
        own = torch.Generator().manual_seed(int(short_hash(f"{seed} {name}".encode()), 16) % 2**63)
        if name.endswith(".a.weight"):
            yield name, torch.empty(parameter.shape).uniform_(-bound, bound, generator=own)
        elif name.endswith(".b.weight"):
            yield name, torch.zeros(parameter.shape)


def merged(weight_ND: Tensor, a_rD: Tensor, b_Nr: Tensor, scale: float) -> Tensor:
    """W + (alpha / r) B A, in float32."""
    return torch.addmm(weight_ND.float(), b_Nr.float(), a_rD.float(), alpha=scale)


# ---------------------------------------------------------------------------------- a directory


def description(base: Path, rank: int, alpha: float, modules: list[str], scores: int) -> JsonRow:
    """adapter_config.json. `modules`: the layers, by their published names."""
    return {
        **PLAIN,
        "base_model_name_or_path": str(base.resolve()),
        "task_type": TASKS[scores],
        "r": rank,
        "lora_alpha": alpha or 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "modules_to_save": ["score"] if scores else None,
        "inference_mode": True,
    }


def seal_base(place: Path, base: Path) -> None:
    """Writes down which weights an adapter is for."""
    write_signed(place / BASE, {path.name: seal(path) for path in sorted(base.glob("*.safetensors"))})


class Adapter:
    """An adapter's directory, opened."""

    def __init__(self, directory: Path):
        config, base = adapter_config(directory), base_of(directory)
        assert config is not None and base is not None
        self.directory, self.base = directory, base
        for name, wanted in PLAIN.items():
            value = config.row.get(name, wanted)
            # (an empty pattern may be left out, or null)
            need(
                value == wanted or not (value or wanted),
                f"{config.where}{name} = {value!r:.60} is not supported",
            )
        kind = config.row.get("init_lora_weights", True)
        drawn = kind in (True, False, None, "gaussian", "orthogonal")  # others have changed the base as well
        need(drawn, f"{config.where}init_lora_weights = {kind!r:.60} is not supported")
        rank, alpha = config.get("r", int, low=1), config.get("lora_alpha", float, above=0)
        self.scale = alpha / (math.sqrt(rank) if config.get("use_rslora", bool, False) else rank)
        if (directory / BASE).exists():
            mend = f"the adapter was trained on other weights; name those in {ADAPTER}"
            check_seals(base, read_signed(directory / BASE), mend)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """By their published names, without the prefix."""
        stored = open_tensors(self.directory / TENSORS)
        names = [*stored.keys()]
        return {name.removeprefix(PREFIX): stored.get_tensor(name) for name in names}

    def check(self, weights: Iterable[str]) -> None:
        """Refuses tensors that are beside none of these published names."""
        stems = [name.removesuffix(".weight") for name in weights]
        known = {"score.weight"} | {f"{stem}.lora_{half}.weight" for stem in stems for half in "AB"}
        if unknown := self.tensors.keys() - known:
            raise InputError(f"{self.directory / TENSORS}: {min(unknown)} is of no layer that can be adapted")

    def halves(self, name: str) -> list[Tensor]:
        """A and B beside a weight, by its published name; none, where it has no adapter."""
        stem = name.removesuffix(".weight")
        found = [self.tensors.get(f"{stem}.lora_{half}.weight") for half in "AB"]
        return [half for half in found if half is not None]

    def merged(self, name: str, weight_ND: Tensor, device: Any = "cpu") -> Tensor:
        """W + (alpha / r) B A of a weight, in float32 on `device`; one without an adapter as it is."""
        halves = self.halves(name)
        if not halves:
            return weight_ND
        need(len(halves) == 2, f"{self.directory / TENSORS}: the adapter of {name} is not whole")
        a_rD, b_Nr = halves
        wanted = weight_ND.shape
        fits = (
            a_rD.ndim == b_Nr.ndim == 2
            and (b_Nr.shape[0], a_rD.shape[1]) == wanted
            and len(a_rD) == b_Nr.shape[1]
        )
        need(fits, f"{self.directory / TENSORS}: the adapter of {name} does not fit {list(wanted)}")
        return merged(weight_ND.to(device), a_rD.to(device), b_Nr.to(device), self.scale)
