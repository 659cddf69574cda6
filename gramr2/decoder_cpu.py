"""The decoder as a CPU samples with it in fp32: its matrices laid out anew, and rows that do not notice others.

A larger model's matrices are packed (kernels/linear_cpu.py), those of the same input as one. The copy costs
as much memory as the matrices, and as much time as a few tokens; so it is kept while the model lives, and
what has changed in the model since is packed again by the next `laid_out`.

What a row gives must not depend on the others beside it, so a pass may have to be padded. To how many rows
is a matter of the libraries and of the processor, and `rows_needed` tries it out: packed matrices need no
padding on processors with AVX2 or AVX-512, MKL needs 2 to 64 rows.

It leaves out: attention, which pads its own rows (kernels/paged_attention_cpu.py); other devices and types.
Shapes: T tokens, R rows, D model width, F width of the MLP.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import kernels
from gramr2.model import MLP, Attention, Block, Decoder, ModelConfig, rope_tables
from kernels.choice import Options, choose
from kernels.linear_cpu import Packed, column_major, packs, projection

# Bytes of all weights. Below the first a matrix costs less than the call that multiplies by a packed one;
# above the second a copy is too much to ask of a machine, and the matrices are multiplied by as they are.
SMALL, LARGE = 1 << 26, 1 << 32
CANDIDATES = 1, 2, 4, 8, 16, 32, 64  # rows that a pass is padded to a multiple of
MANY = 512  # rows beside which fewer must come out the same
Layers = tuple[Decoder, Callable[[Tensor], Tensor]]  # ids -> hidden, and hidden -> logits

_packed: WeakKeyDictionary[Decoder, Layers] = WeakKeyDictionary()
_rows: dict[tuple[ModelConfig, bool, int], int] = {}


class PackedAttention(Attention):
    def __init__(self, plain: Attention):
        nn.Module.__init__(self)
        self.head_size, self.q_norm, self.k_norm = plain.head_size, plain.q_norm, plain.k_norm
        self.joined, self.o = Packed(plain.q, plain.k, plain.v), Packed(plain.o)

    def queries_keys_values(self, x_TD: Tensor) -> Sequence[Tensor]:
        return self.joined(x_TD).split(self.joined.sizes, -1)


class PackedMLP(MLP):
    def __init__(self, plain: MLP):
        nn.Module.__init__(self)
        self.joined, self.down = Packed(plain.gate, plain.up), Packed(plain.down)

    def gate_and_up(self, x_TD: Tensor) -> Sequence[Tensor]:
        return self.joined(x_TD).split(self.joined.sizes, -1)


def laid_out(model: Decoder) -> Layers:
    """The same function in the layout that suits the model, with its weights as they are now."""
    head = model.embed if model.head is None else model.head
    size = sum(p.nbytes for p in model.parameters())
    if not packs(model.head_weight) or size >= LARGE:
        return model, projection(head)
    if size < SMALL:
        return column_major(model), projection(head)
    if model not in _packed:
        _packed[model] = packed(model), Packed(head)
    for layers in _packed[model]:
        for module in layers.modules():
            if isinstance(module, Packed):
                module.refresh()
    return _packed[model]


def packed(model: Decoder) -> Decoder:
    twin = copy.copy(model)
    twin._modules = {**model._modules, "blocks": nn.ModuleList(map(_packed_block, model.blocks))}
    return twin


def _packed_block(block: Block) -> Block:
    twin = copy.copy(block)
    parts = {"attention": PackedAttention(block.attention), "mlp": PackedMLP(block.mlp)}
    twin._modules = {**block._modules, **parts}
    return twin


def rows_needed(layers: Layers) -> int:
    """The fewest rows, in multiples of which each is bitwise what it is among many; tried out once."""
    model, project = layers
    if not packs(model.head_weight):
        return kernels.ROWS
    key = model.config, isinstance(model.blocks[0].attention, PackedAttention), torch.get_num_threads()
    if key not in _rows:
        found = (rows for rows in CANDIDATES if _alike(model, project, rows))
        _rows[key] = next(found, kernels.ROWS)
    return _rows[key]


@torch.inference_mode()
def _alike(model: Decoder, project: Callable[[Tensor], Tensor], rows: int) -> bool:
    """Whether a few rows come out of one layer and the head as they do among many."""
    config, ids_T = model.config, torch.arange(MANY) % model.config.vocab_size

    def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
        return q_THK + (k_TGK + v_TGK).repeat_interleave(config.num_heads // config.num_kv_heads, 1)

    def layer(first: int, count: int) -> Tensor:
        part = slice(first, first + count)
        x_TD = model.embed(ids_T[part])
        rope = rope_tables(config, torch.arange(MANY)[part], x_TD.dtype)
        return model.norm(model.blocks[0](x_TD, rope, 0, attend))

    def chosen(hidden_RD: Tensor) -> Tensor:
        options = Options(1.0, 1.0, 0, torch.arange(config.vocab_size))
        return choose(project(hidden_RD), torch.full((len(hidden_RD),), 0.5), options)

    def same(some: Tensor, all_T: Tensor) -> bool:
        return some.equal(all_T[: len(some)])

    hidden_TD = layer(0, MANY)
    alike = all(same(layer(0, rows * n), hidden_TD) for n in (1, 2, 3, 5))
    alike &= same(layer(7, rows), hidden_TD[7:])
    outputs_RC = chosen(hidden_TD[: max(CANDIDATES)])
    return alike and all(same(chosen(hidden_TD[:n]), outputs_RC) for n in (rows, max(CANDIDATES) - rows) if n)
