"""The engine: what the device does in a step. The cache's tensors, the two passes, the choice of a token.

Prompts' chunks are computed in one pass, and all decode rows in another. A decode row feeds the last id of
a sample, which stays on the device, by the sample's slot; it reads the pages that its prompt's samples share
in one item with all of them. On CUDA with Triton decode steps are graphs (graphs.py), and the host may be a
step behind the device.

It leaves out: which work is next, and what becomes of it. It knows slots, pages and positions from the
`Step` that it is given, and keeps nothing of a sample but its last id.

Shapes: R rows of a decode step, T tokens of a pass, U tokens without padding, D width, V vocabulary, H query
heads, G key/value heads, K head size, L layers, N pages, P tokens of a page, S slots, C columns of what
`choose` gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import kernels
from gramr2.batch import DecodeBatch, DecodeRows, padded, prefill
from gramr2.cache import NULL
from gramr2.graphs import DecodeGraphs
from gramr2.model import Attend, Decoder
from gramr2.requests import Chunk, Limits, Step
from kernels.choice import Column, Options, choose, uniforms

QUERY_ROWS = 64  # of one item, on CUDA: what a program of the kernel takes; the CPU takes any number


class Engine:
    """A model, its pool of pages, and the options of one call."""

    def __init__(self, model: Decoder, blocks: int, longest: int, limits: Limits, options: Options):
        config, weight = model.config, model.head_weight
        self.limits, self.options, self.device = limits, options, weight.device
        self.cuda = self.device.type == "cuda"
        # Larger models wait for their weights anyway, and a copy of them would cost memory.
        small = self.device.type == "cpu" and sum(p.nbytes for p in model.parameters()) < 1 << 26
        self.model = _column_major(model) if small else model
        self.project = _projection(weight)
        shape = config.num_layers, blocks, limits.block_size, config.num_kv_heads, config.head_size
        self.pools = [torch.empty(shape, dtype=weight.dtype, device=self.device) for _ in range(2)]
        self._clear([NULL])
        # One more than there are slots: what rows that only pad a batch read and write.
        self.last_S = torch.zeros(limits.running + 1, dtype=torch.int64, device=self.device)
        self.item_rows = QUERY_ROWS * config.num_kv_heads // config.num_heads if self.cuda else None
        self.graphs: DecodeGraphs | None = None
        if self.item_rows and kernels.backend(self.device) == "triton":
            pages = longest // limits.block_size + 2
            self.graphs = DecodeGraphs(self.device, limits.running, pages, self.item_rows)
        self.batch_version: tuple[int, int] | None = None  # of the next two, which last for several steps
        self.rows: DecodeRows
        self.prefix: kernels.Reads[Tensor]

    @torch.inference_mode()
    def launch(self, step: Step) -> Callable[[], np.ndarray] | None:
        """Starts a step; -> what waits for the decoded rows' outputs, if there are any."""
        if step.fresh and not self.graphs:
            self._clear(step.fresh)
        if step.chunks:
            self._prefill(step.chunks)
        if step.copies:
            origin, copy = (self._upload(blocks) for blocks in zip(*step.copies, strict=True))
            for pool_LNPGK in self.pools:
                pool_LNPGK[:, copy] = pool_LNPGK[:, origin]
        if step.joined:
            slots = self._upload([sample.slot for sample in step.joined])
            self.last_S[slots] = self._upload([sample.ids[-1] for sample in step.joined])
        if not step.samples:
            return None
        if self.batch_version != step.batch_version:
            self.batch_version = step.batch_version
            self.rows = DecodeRows(
                step.samples, self.limits.block_size, self.item_rows, self.limits.share_prefix
            )
            if not self.graphs:
                self.prefix = self._upload_reads(self.rows.prefix)
        batch = self.rows.at(np.array(step.positions))
        if self.graphs:
            return self.graphs.launch(batch, self.decode)
        outputs_RC = self.decode(self._upload_batch(batch))[: len(step.samples)]
        return lambda: outputs_RC.cpu().numpy()

    def decode(self, batch: DecodeBatch[Tensor]) -> Tensor:
        """One token for each row -> outputs of `choose`; also kept as what the row reads next."""
        reads = [part for part in (batch.prefix, batch.own) if len(part.rows_IJ)]
        ids_R = self.last_S[batch.slots_R]
        hidden_RD = self.model(ids_R, batch.positions_R, self._attend(batch.places_U, reads))
        logits_RV = self.project(hidden_RD).float()
        outputs_RC = choose(logits_RV, uniforms(batch.seeds_R, batch.positions_R), self.options)
        self.last_S[batch.slots_R] = outputs_RC[:, Column.ID].long()
        return outputs_RC

    def _prefill(self, chunks: list[Chunk]) -> None:
        batch = prefill(chunks, self.limits.block_size, self.item_rows)
        attend = self._attend(
            self._upload(batch.places_U), [self._upload_reads(part) for part in batch.reads]
        )
        self.model(self._upload(batch.ids_T), self._upload(batch.positions_T), attend)

    def _attend(self, places_U: Tensor, reads: list[kernels.Reads[Tensor]]) -> Attend:
        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            pools = [pool_LNPGK[layer] for pool_LNPGK in self.pools]
            kernels.write_kv(k_TGK, v_TGK, *pools, places_U)
            return kernels.attend_pages(q_THK, *pools, reads)

        return attend

    def _clear(self, pages: list[int]) -> None:
        """Hidden keys are read, and weighed with 0: what stands there must not be NaN."""
        for pool_LNPGK in self.pools:
            pool_LNPGK[:, pages] = 0

    def _upload(self, values: np.ndarray | Sequence) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.int64))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.cuda else tensor

    def _upload_reads(self, reads: kernels.Reads[np.ndarray]) -> kernels.Reads[Tensor]:
        return kernels.Reads(*map(self._upload, reads.arrays()))

    def _upload_batch(self, batch: DecodeBatch[np.ndarray]) -> DecodeBatch[Tensor]:
        """The prefix is on the device already: it is laid out there once for many steps."""
        slots, positions = padded(batch.slots_R, self.limits.running), padded(batch.positions_R)
        first = map(self._upload, (slots, positions, padded(batch.seeds_R), batch.places_U))
        return DecodeBatch(*first, self.prefix, self._upload_reads(batch.own))


def _column_major(module: torch.nn.Module) -> torch.nn.Module:
    """The same function, with matrices copied column by column: few rows are 1.3 times faster then."""
    twin = copy.copy(module)
    twin._modules = {name: child and _column_major(child) for name, child in module._modules.items()}
    if isinstance(module, torch.nn.Linear):
        twin._parameters = {**module._parameters, "weight": module.weight.detach().t().contiguous().t()}
    return twin


def _projection(weight_VD: Tensor) -> Callable[[Tensor], Tensor]:
    """hidden -> logits. On the CPU the weight is laid out for it once: few rows are 1.5 times faster then."""
    cpu = weight_VD.device.type == "cpu" and weight_VD.dtype == torch.float32
    if not cpu or not torch.backends.mkldnn.is_available():
        return lambda hidden_RD: torch.nn.functional.linear(hidden_RD, weight_VD)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_VD.detach(), kernels.ROWS)
    return lambda hidden_RD: torch.ops.mkldnn._linear_pointwise(hidden_RD, packed, None, "none", [], "")
