"""Matrices laid out for the few rows of a decode step on a CPU, in fp32, and what rows then need.

A small model's matrices are copied column by column (`Columns`): they cost less than a call of another
library, where MKL's rounding allows it. Larger ones are `Packed` into oneDNN's blocks, those of the same
input as one. The copy costs as much memory as the matrices, and as much time as a few tokens; so it is kept
while the model lives, and what has changed in the model since is copied again by the next `laid_out`.

What a row gives must not depend on the rows beside it, so a pass may have to be padded. How far is a matter
of the libraries and of the processor, and `rows_needed` tries it out: packed matrices need no padding on
processors with AVX2 or AVX-512; MKL sums in another order below 2, 8, 16 or 64 rows.

Left out: matrices in 16 bits, and devices that are not a CPU: they are multiplied by as they are.
Legend of suffixes: R rows, D width, N columns of the result, V vocabulary, M many rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .paged_attention_cpu import ROWS

# Bytes of weights: all but the vocabulary's of a small model; and all of one of which a copy is too much to
# ask of a machine.
SMALL, LARGE = 1 << 26, 1 << 32
NARROW = 1 << 22  # bytes of a small model's projection on the vocabulary that are not packed either
LONG = 1024  # oneDNN sums the products of one row in another order where there are more; of two it does not
AnyModule = TypeVar("AnyModule", bound=nn.Module)
# Rows that a pass may be padded to a multiple of. 24 is for oneDNN before 3.11, with AVX2 alone: it takes six
# rows at a time, and rounds a rest of up to three in another way.
CANDIDATES = 1, 2, 4, 8, 16, 32, 24, 64

_kept: WeakKeyDictionary[nn.Module, tuple[type[Packed], Any, Packed]] = WeakKeyDictionary()
_rows: dict[Hashable, int | None] = {}


def laid_out(
    model: AnyModule, head: nn.Module, pack_small: bool = False
) -> tuple[AnyModule, Callable[[Tensor], Tensor]]:
    """-> (the same function as `model`, hidden -> logits), with the weights as they are now.

    `head`: a linear layer, or the embedding whose weight is also the head's. `pack_small`: small matrices
    too. Who keeps the result asks again at each call: a model that is trained between calls changes its
    weights in place.
    """
    weight_VD = head.get_parameter("weight")
    cpu = weight_VD.device.type == "cpu" and weight_VD.dtype == torch.float32
    if not cpu or not torch.backends.mkldnn.is_available():
        return model, lambda hidden_RD: nn.functional.linear(hidden_RD, weight_VD)
    if sum(p.nbytes for p in model.parameters()) >= LARGE:
        return model, Packed(head)
    size = sum(p.nbytes for p in model.parameters() if p.shape != weight_VD.shape)
    kind = Packed if pack_small or size >= SMALL else Columns
    if model not in _kept or _kept[model][0] is not kind:
        _kept[model] = (
            kind,
            with_copies(model, head, kind),
            (kind if weight_VD.nbytes < NARROW else Packed)(head),
        )
    _, twin, project = _kept[model]
    for module in *twin.modules(), project:
        if isinstance(module, Packed):
            module.refresh()
    return twin, project


class SideBySide(nn.Module):
    """Has linear maps of the same input, and names them: packed they are one."""

    side_by_side: tuple[str, ...]

    def products(self, x_RD: Tensor) -> Sequence[Tensor]:
        return [getattr(self, name)(x_RD) for name in self.side_by_side]


def with_copies(module: nn.Module, head: nn.Module, kind: type[Packed]) -> Any:
    """The same function, with matrices laid out; the head, which is not a part of it, is left as it is."""
    if isinstance(module, nn.Linear) and module is not head:
        return kind(module)
    twin, names = copy.copy(module), module.side_by_side if isinstance(module, SideBySide) else ()
    names = names if kind is Packed else ()  # MKL gains little by it, and rounds otherwise
    others = {name: child for name, child in module._modules.items() if name not in names}
    twin._modules = {name: child and with_copies(child, head, kind) for name, child in others.items()}
    if names:
        twin.joined = joined = kind(*map(module.get_submodule, names))
        twin.__dict__["products"] = lambda x_RD: joined(x_RD).split_with_sizes(joined.sizes, -1)
    return twin


class Packed(nn.Module):
    """hidden -> the products with several matrices side by side, by a packed copy; `refresh` follows them."""

    def __init__(self, *sources: nn.Module):
        """Linear layers, or the embedding whose weight projects on the vocabulary."""
        super().__init__()
        self.sources = sources  # in a tuple, so that they are not this module's own
        self.seen: list[tuple] = []
        self.refresh()

    def refresh(self) -> None:
        """Packs again if a weight has changed. To look costs a quarter of packing."""
        parts = [source._parameters.get(name) for name in ("weight", "bias") for source in self.sources]
        found = [part.detach() for part in parts if part is not None]
        seen = [fingerprint(part) for part in found]
        if seen == self.seen:
            return
        count = len(self.sources)
        self.sizes, self.seen = [*map(len, found[:count])], seen
        self.bias_N = torch.cat(found[count:]) if found[count:] else None
        self.lay_out(torch.cat(found[:count]))

    def lay_out(self, weight_ND: Tensor) -> None:
        self.long = weight_ND.shape[1] > LONG
        self.laid = torch.ops.mkldnn._reorder_linear_weight(weight_ND, ROWS)

    def forward(self, x_RD: Tensor) -> Tensor:
        alone = self.long and len(x_RD) == 1
        x_RD = torch.cat((x_RD, x_RD)) if alone else x_RD
        y_RN = torch.ops.mkldnn._linear_pointwise(x_RD, self.laid, self.bias_N, "none", [], "")
        return y_RN[:1] if alone else y_RN


class Columns(Packed):
    """The same by MKL, which multiplies few rows 1.3 times faster where a matrix stands column by column."""

    def lay_out(self, weight_ND: Tensor) -> None:
        self.laid = weight_ND.t().contiguous()

    def forward(self, x_RD: Tensor) -> Tensor:
        return x_RD @ self.laid if self.bias_N is None else self.bias_N.addmm(x_RD, self.laid)


def fingerprint(tensor: Tensor) -> tuple[int, int, int]:
    """What changes with a tensor: its place, its version, and the sum of its bits.

    A version does not count what is written through `.data`, and a sum does not tell an order.
    """
    version = 0 if tensor.is_inference() else tensor._version
    flat = tensor.detach().reshape(-1)
    bits = flat.view(torch.int64 if flat.numel() % 2 == 0 else torch.int32)
    return tensor.data_ptr(), version, int(bits.sum())


def rows_needed(kind: Hashable, results: Callable[[slice], Tensor], many: int) -> int | None:
    """The fewest rows, in multiples of which `results` gives each row the bits that it has among many; None
    where no candidate does.

    It is tried out once for a kind: the shapes, their layout, and the number of threads.
    """
    if kind in _rows:
        return _rows[kind]
    all_M = results(slice(0, many))

    def alike(rows: int) -> bool:
        parts = [slice(0, rows * n) for n in (1, 2, 3, 5)] + [slice(7, 7 + rows)]
        return all(results(part).equal(all_M[part]) for part in parts if part.stop <= many)

    _rows[kind] = next((rows for rows in CANDIDATES if alike(rows)), None)
    return _rows[kind]
