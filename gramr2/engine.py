"""The engine: what the device does in a step. The cache's tensors, the two passes, the choice of a token.

Prompts' chunks are computed in one pass, and all decode rows in another. A decode row feeds the last id of
a sample, which stays on the device, by the sample's slot; it reads the pages that its prompt's samples share
in one item with all of them. On CUDA with Triton decode steps are graphs (graphs.py), and the host may be a
step behind the device.

It leaves out: which work is next, and what becomes of it. It knows slots, pages and positions from the
`DeviceStep` that it is given, and keeps nothing of a sample but its last id.

Shapes: R rows of a decode step, T tokens of a pass, U tokens without padding, D width, V vocabulary, H query
heads, G key/value heads, K head size, L layers, N pages, P tokens of a page, S slots, C columns of what
`choose` gives, I items of reads, J queries of an item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import kernels
from gramr2.batch import DecodeBatch, DecodeRows, padded, prefill_arrays
from gramr2.cache import NULL
from gramr2.graphs import DecodeGraphs
from gramr2.model import Decoder, ModelConfig, rope_tables
from gramr2.requests import Capacity, Chunk, DeviceStep
from kernels.choice import Column, Options, choose, uniforms
from kernels.linear_cpu import laid_out, rows_needed
from kernels.packed_attention import Attend
from kernels.reads import Reads

QUERY_ROWS = 64  # of one item, on CUDA: what a program of the kernel takes; the CPU takes any number


class Engine:
    """A model, its pool of pages, and the options of one call."""

    def __init__(self, model: Decoder, capacity: Capacity, options: Options):
        config, weight, self.capacity, self.options = model.config, model.head_weight, capacity, options
        self.device, self.cuda = weight.device, weight.is_cuda
        self.model, self.project = laid_out(model, model.embed if model.head is None else model.head)
        exact = self.device.type == "cpu" and weight.dtype == torch.float32
        self.multiple = self._multiple(config) if exact else kernels.ROWS
        shape = capacity.pages, capacity.page_size, config.num_kv_heads, config.head_size
        self.keys_LNPGK, self.values_LNPGK = (
            torch.empty(config.num_layers, *shape, dtype=weight.dtype, device=self.device) for _ in range(2)
        )
        self._clear([NULL])
        # One more than there are slots: what rows that only pad a batch read and write.
        self.last_id_S = torch.zeros(capacity.running + 1, dtype=torch.int64, device=self.device)
        self.item_rows = QUERY_ROWS * config.num_kv_heads // config.num_heads if self.cuda else None
        self.graphs: DecodeGraphs | None = None
        if self.item_rows and kernels.backend(self.device) == "triton":
            self.graphs = DecodeGraphs(self.device, capacity, self.item_rows)
        self.batch_version: tuple[int, int] | None = None  # of the next two, which last for several steps
        self.rows: DecodeRows
        self.prefix: Reads[Tensor]

    @torch.inference_mode()
    def launch(self, step: DeviceStep) -> Callable[[], np.ndarray] | None:
        """Starts a step; -> what waits for the decoded rows' outputs, if there are any."""
        if step.fresh and not self.graphs:
            self._clear(step.fresh)
        if step.chunks:
            self._prefill(step.chunks)
        if step.copies:
            origins, copies = (self._upload(pages) for pages in zip(*step.copies, strict=True))
            for pool_LNPGK in (self.keys_LNPGK, self.values_LNPGK):
                pool_LNPGK[:, copies] = pool_LNPGK[:, origins]
        if step.joined:
            slots = self._upload([*step.joined.values()])
            self.last_id_S[slots] = self._upload([sample.ids[-1] for sample in step.joined])
        if not step.samples:
            return None
        if self.batch_version != step.batch_version:
            self.batch_version, size = step.batch_version, self.capacity.page_size
            self.rows = DecodeRows(step, size, self.item_rows, self.capacity.share_prefix)
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
        ids_R = self.last_id_S[batch.slots_R]
        hidden_RD = self.model(ids_R, batch.positions_R, self._attend(batch.places_U, reads))
        logits_RV = self.project(hidden_RD).float()
        outputs_RC = choose(logits_RV, uniforms(batch.seeds_R, batch.positions_R), self.options)
        self.last_id_S[batch.slots_R] = outputs_RC[:, Column.ID].long()
        return outputs_RC

    def _prefill(self, chunks: list[Chunk]) -> None:
        options = self.capacity.page_size, self.item_rows, self.multiple
        ids_T, positions_T, places_U, reads = prefill_arrays(chunks, *options)
        attend = self._attend(self._upload(places_U), [self._upload_reads(part) for part in reads])
        self.model(self._upload(ids_T), self._upload(positions_T), attend)

    @torch.inference_mode()
    def _multiple(self, config: ModelConfig) -> int:
        """Of rows, which a pass is padded to: in these, one layer and the head give each row its own bits."""
        numbers_T, per_group = torch.arange(512), config.num_heads // config.num_kv_heads
        options = Options(1.0, 1.0, 0, ids_T := numbers_T % config.vocab_size)

        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            return q_THK + (k_TGK + v_TGK).repeat_interleave(per_group, 1)

        def hidden(part: slice) -> Tensor:
            x_TD, rope = self.model.embed(ids_T[part]), rope_tables(config, numbers_T[part], torch.float32)
            return self.model.norm(self.model.blocks[0](x_TD, rope, 0, attend))

        def outputs(part: slice) -> Tensor:
            return choose(self.project(hidden(slice(0, 64))[part]), numbers_T[part] / 512, options)

        kind = config, str(self.model.blocks[0]), torch.get_num_threads()
        return max(rows_needed((*kind, "layer"), hidden, 512), rows_needed((*kind, "head"), outputs, 64))

    def _attend(self, places_U: Tensor, reads: list[Reads[Tensor]]) -> Attend:
        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            keys_NPGK, values_NPGK = self.keys_LNPGK[layer], self.values_LNPGK[layer]
            kernels.write_kv(k_TGK, v_TGK, keys_NPGK, values_NPGK, places_U)
            return kernels.attend_pages(q_THK, keys_NPGK, values_NPGK, reads)

        return attend

    def _clear(self, pages: list[int]) -> None:
        """Hidden keys are read, and weighed with 0: what stands there must not be NaN."""
        self.keys_LNPGK[:, pages] = self.values_LNPGK[:, pages] = 0

    def _upload(self, values: np.ndarray | Sequence) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values, np.int64))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.cuda else tensor

    def _upload_reads(self, reads: Reads[np.ndarray]) -> Reads[Tensor]:
        return Reads(*map(self._upload, reads.arrays()))

    def _upload_batch(self, batch: DecodeBatch[np.ndarray]) -> DecodeBatch[Tensor]:
        """The prefix is on the device already: a kernel's layout of it serves many steps."""
        rows = self.multiple
        slots_R = self._upload(padded(batch.slots_R, rows, self.capacity.running))
        positions_R, seeds_R = (self._upload(padded(x, rows)) for x in (batch.positions_R, batch.seeds_R))
        own, places_U = self._upload_reads(batch.own), self._upload(batch.places_U)
        return DecodeBatch(slots_R, positions_R, seeds_R, places_U, self.prefix, own)
