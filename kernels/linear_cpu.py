"""Matrices laid out for the few rows of a decode step on a CPU, in fp32.

Two ways. `column_major` copies a matrix column by column: for small models, whose matrices cost less than a
call of another library. `Packed` gives oneDNN a copy in blocks: for all others. A row's result is there a
function of that row alone, whatever the number of rows (but for one row, see LONG), which MKL's is not: it
changes its order of summing at 2, 8, 16 or 64 rows, depending on the processor. That it holds is looked at
where it is relied on (gramr2/decoder_cpu.py).

Left out: matrices in 16 bits, and devices that are not a CPU: they are multiplied by as they are.
Legend of suffixes: R rows, D width, N columns of the result, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .paged_attention_cpu import ROWS

LONG = 1024  # oneDNN sums products of one row in another order where there are more; of two rows it does not


def packs(weight: Tensor) -> bool:
    """Whether `Packed` can multiply by such a matrix."""
    cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return cpu and torch.backends.mkldnn.is_available()


def column_major(module: nn.Module) -> nn.Module:
    """The same function, with matrices copied column by column: few rows are 1.3 times faster then."""
    twin = copy.copy(module)
    twin._modules = {name: child and column_major(child) for name, child in module._modules.items()}
    if isinstance(module, nn.Linear):
        weight = nn.Parameter(module.weight.detach().t().contiguous().t(), requires_grad=False)
        twin._parameters = {**module._parameters, "weight": weight}
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
        weight_ND = torch.cat(found[:count])
        self.sizes, self.long, self.seen = [*map(len, found[:count])], weight_ND.shape[1] > LONG, seen
        self.bias_N = torch.cat(found[count:]) if found[count:] else None
        self.weight_ND = torch.ops.mkldnn._reorder_linear_weight(weight_ND, ROWS)

    def forward(self, x_RD: Tensor) -> Tensor:
        alone = self.long and len(x_RD) == 1
        x_RD = torch.cat((x_RD, x_RD)) if alone else x_RD
        y_RN = torch.ops.mkldnn._linear_pointwise(x_RD, self.weight_ND, self.bias_N, "none", [], "")
        return y_RN[:1] if alone else y_RN


def fingerprint(tensor: Tensor) -> tuple[int, int, int]:
    """What changes with a tensor: its place, its version, and the sum of its bits.

    A version does not count what is written through `.data`, and a sum does not tell an order.
    """
    version = 0 if tensor.is_inference() else tensor._version
    flat = tensor.detach().reshape(-1)
    bits = flat.view(torch.int64 if flat.numel() % 2 == 0 else torch.int32)
    return tensor.data_ptr(), version, int(bits.sum())


def projection(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """hidden -> logits. On the CPU the weight is laid out for it once: few rows are 1.5 times faster then."""
    if packs(weight_VD := cast(Tensor, head.weight)):
        return Packed(head)
    return lambda hidden_RD: nn.functional.linear(hidden_RD, weight_VD)
