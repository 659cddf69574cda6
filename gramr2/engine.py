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

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gramr2 import kernels
from gramr2.batch import DecodeBatch, DecodeRows, padded, prefill_arrays
from gramr2.cache import NULL
from gramr2.graphs import DecodeGraphs
from gramr2.kernels.choice import Column, Options, choose, uniforms
from gramr2.kernels.linear_cpu import Packed, laid_out, rows_needed
from gramr2.kernels.packed_attention import Attend, upload
from gramr2.kernels.reads import Reads
from gramr2.model import Decoder, ModelConfig, rope_tables
from gramr2.requests import Capacity, Chunk, DeviceStep, Limits, Request

MOST_OPTIONS = 8  # ways to choose that graphs are kept for
QUERY_ROWS = 64  # of one item, on CUDA: what a program of the kernel takes; the CPU takes any number


class Engine:
    """A model with what sampling from it takes on its device: pages, graphs, weights laid out for it.

    It may serve many calls of `generate`, one after the other, which then find all of that ready. Weights may
    change between them. Its memory goes with it.
    """

    def __init__(self, model: Decoder, limits: Limits | None = None):
        """`limits`: of calls that name none of their own."""
        self.decoder, self.limits, weight = model, limits or Limits(), model.head_weight
        self.device, self.cuda = weight.device, weight.is_cuda
        self.item_rows = None
        if self.cuda:
            self.item_rows = QUERY_ROWS * model.config.num_kv_heads // model.config.num_heads
        self.uses_graphs = self.cuda and kernels.backend(self.device) == "triton"
        self.pages = self.page_size = self.calls = 0  # pages of the pool, which grows with what a call needs
        self.keys_LNGPK = self.values_LNGPK = torch.empty(0)
        self.last_id_S = torch.empty(0)
        self.graphs: DecodeGraphs | None = None
        self.options_seen: dict[tuple, Options] = {}  # graphs read the tensors of these
        self.places_seen: list[int] = []
        self.rows: DecodeRows | None = None
        self.options: Options  # of these rows
        self.prefix: Reads[Tensor]

    @property
    def pool_bytes(self) -> int:
        return self.keys_LNGPK.nbytes + self.values_LNGPK.nbytes

    def begin(self, capacity: Capacity) -> int:
        """Makes ready for a call → its number, which `launch` is given. Calls that came before are over."""
        self.capacity = capacity
        self.calls += 1
        self.rows, self.batch_version = None, (0, 0)
        self._see_weights()
        if capacity.pages > self.pages or capacity.page_size != self.page_size:
            self._make_pool()
        # One more than there are slots: what rows that only pad a batch read and write.
        if len(self.last_id_S) <= capacity.running:
            self.last_id_S = torch.zeros(capacity.running + 1, dtype=torch.int64, device=self.device)
            self.graphs = None
        if self.uses_graphs and not (self.graphs and self.graphs.hold(capacity)):
            self._make_graphs()
        return self.calls

    def _make_graphs(self) -> None:
        self.graphs = DecodeGraphs(self.device, self.capacity, self.item_rows or 1)

    def _choose_by(self, request: Request) -> Options:
        """Its options; rows are laid out anew when they change. Graphs are kept for a few."""
        if request.way not in self.options_seen and len(self.options_seen) == MOST_OPTIONS:
            self.options_seen = {}
            if self.graphs:
                self._make_graphs()
        options = self.options_seen.setdefault(request.way, request.options)
        if self.rows and options is not self.options:
            self.rows = None
        return options

    def _see_weights(self) -> None:
        """Lays weights out, where that helps, and anew once they change; graphs read them where they were."""
        model = self.decoder
        places = [parameter.data_ptr() for parameter in model.parameters()]
        self.graphs = self.graphs if places == self.places_seen else None
        self.places_seen = places
        head = model.embed if model.head is None else model.head
        self.model, self.project = laid_out(model, head)
        self.multiple = kernels.ROWS
        if self.device.type == "cpu" and model.head_weight.dtype == torch.float32:
            multiple = self._multiple(model.config)
            if not multiple:  # MKL, with AVX2 alone, rounds some small shapes in too many ways
                self.model, self.project = laid_out(model, head, pack_small=True)
                multiple = self._multiple(model.config)
            self.multiple = multiple or kernels.ROWS

    def _make_pool(self) -> None:
        config, capacity = self.decoder.config, self.capacity
        self.graphs = None  # they read and write the pool that was
        self.keys_LNGPK = self.values_LNGPK = torch.empty(0)  # whose memory the next one may need
        self.pages, self.page_size = capacity.pages, capacity.page_size
        shape = self.pages, config.num_kv_heads, self.page_size, config.head_size
        like = self.decoder.head_weight
        self.keys_LNGPK, self.values_LNGPK = (like.new_empty(config.num_layers, *shape) for _ in range(2))
        self._clear([NULL])

    @torch.inference_mode()
    def launch(self, step: DeviceStep, call: int) -> Callable[[], np.ndarray] | None:
        """Starts a step; -> what waits for the decoded rows' outputs, if there are any."""
        if call != self.calls:
            raise RuntimeError("this call was cut by another one on the same engine; give each its own")
        if step.fresh and not self.graphs:
            self._clear(step.fresh)
        if step.chunks:
            self._prefill(step.chunks)
        if step.copies:
            origins, copies = (self._upload(pages) for pages in zip(*step.copies, strict=True))
            for pool_LNGPK in (self.keys_LNGPK, self.values_LNGPK):
                pool_LNGPK[:, copies] = pool_LNGPK[:, origins]
        if step.joined:
            slots = self._upload([*step.joined.values()])
            self.last_id_S[slots] = self._upload([sample.ids[-1] for sample in step.joined])
        if not step.samples:
            return None
        self.options = self._choose_by(next(iter(step.samples)).prompt.request)
        if step.joined or not self.rows or (step.batch_version != self.batch_version and not self.graphs):
            self.rows = DecodeRows(step, self.capacity.page_size, self.item_rows, self.capacity.share_prefix)
            self.own: Reads[Tensor] | None = None  # of these pages, once they were read
            if not self.graphs:
                self.prefix = self._upload_reads(self.rows.prefix)
        else:
            if step.batch_version != self.batch_version:
                self.rows.keep(step.samples)
            self.rows.grow(step.grown)
            self.own = None if step.grown else self.own
        self.batch_version = step.batch_version
        batch = self.rows.at(np.array(step.positions))
        if self.graphs:
            return self.graphs.launch(batch, self.decode, self.options)
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
    def _multiple(self, config: ModelConfig) -> int | None:
        """Of rows, which a pass is padded to: in these, one layer and the head give each row its own bits.
        None: in no number that was tried.

        It is tried out on the first model of a kind, and one whose weights are zeros would show nothing:
        without packed matrices a pass has 8 rows at least.
        """
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
        least = 1 if type(self.model.get_submodule("blocks.0.mlp.down")) is Packed else kernels.ROWS
        layer, last = rows_needed((*kind, "layer"), hidden, 512), rows_needed((*kind, "head"), outputs, 64)
        return math.lcm(least, layer, last) if layer and last else None

    def _attend(self, places_U: Tensor, reads: list[Reads[Tensor]]) -> Attend:
        def attend(layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
            keys_NGPK, values_NGPK = self.keys_LNGPK[layer], self.values_LNGPK[layer]
            kernels.write_kv(k_TGK, v_TGK, keys_NGPK, values_NGPK, places_U)
            return kernels.attend_pages(q_THK, keys_NGPK, values_NGPK, reads)

        return attend

    def _clear(self, pages: list[int]) -> None:
        """Hidden keys are read, and weighed with 0: what stands there must not be NaN."""
        self.keys_LNGPK[:, pages] = self.values_LNGPK[:, pages] = 0

    def _upload(self, values: np.ndarray | Sequence) -> Tensor:
        return upload(np.ascontiguousarray(values, np.int64), self.device)

    def _upload_reads(self, reads: Reads[np.ndarray]) -> Reads[Tensor]:
        return Reads(*map(self._upload, reads.arrays()))

    def _upload_batch(self, batch: DecodeBatch[np.ndarray]) -> DecodeBatch[Tensor]:
        """The prefix is on the device already, and often the rest: a kernel's layout serves many steps."""
        rows = self.multiple
        slots_R = self._upload(padded(batch.slots_R, rows, self.capacity.running))
        positions_R, seeds_R = (self._upload(padded(x, rows)) for x in (batch.positions_R, batch.seeds_R))
        if self.own:
            self.own.move(self._upload(batch.own.visible_IJ))
        else:
            self.own = self._upload_reads(batch.own)
        return DecodeBatch(slots_R, positions_R, seeds_R, self._upload(batch.places_U), self.prefix, self.own)
