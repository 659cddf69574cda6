"""The memory that a training is said to take, before it begins, beside what its steps come to hold.

    python benchmarks/memory.py                    small models on the CPU, in a minute
    python benchmarks/memory.py --device cuda      published shapes, random weights
    python benchmarks/memory.py --quick            one small model on the CPU: a rehearsal, no figures

`gramr2/cost.py:memory_per_rank` is what `train.py --dry-run` prints, what names the cards on which a training
fits, and what decides how many blocks are computed again. Measured is the second of two steps, of two packs
each. On a GPU that is torch.cuda.max_memory_allocated. On the CPU every tensor's storage is counted from the
operation that makes it to its end (`LiveBytes`): exact, and the same on every machine. Exit status 1 where an
estimate is more than a tenth off.

Left out: memory outside of tensors (a CUDA context takes about half a GB), that which lies in pieces, and
several ranks.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import weakref
from typing import Any

import common
import torch
import training
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gramr2 import cost, parallel
from gramr2.model import ModelConfig
from gramr2.settings import TrainSettings

WITHIN = 0.1
SMALL = ModelConfig(2000, 128, 352, 4, 4, 2, 32, 4096, tie_embeddings=True)
WORDS = ModelConfig(16000, 128, 352, 2, 4, 2, 32, 4096, qk_norm=True)  # a large vocabulary, twice
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "recompute": 0},
    "float32, blocks computed again": {"dtype": "float32", "recompute": 99},
    "bfloat16": {"dtype": "bfloat16", "recompute": 0},
    "bfloat16, blocks computed again": {"dtype": "bfloat16", "recompute": 99},
    "bfloat16, and AdamW's moments": {"dtype": "bfloat16", "optimizer_dtype": "bfloat16"},
    "float32, adapters of rank 8": {"dtype": "float32", "lora_rank": 8, "recompute": 0},
    "bfloat16, adapters of rank 8": {"dtype": "bfloat16", "lora_rank": 8, "recompute": 0},
    "bfloat16, adapters of rank 64, blocks computed again": {
        "dtype": "bfloat16",
        "lora_rank": 64,
        "recompute": 99,
    },
}
FITTING = {name: model for name, model in training.LARGE.items() if "8B" not in name}
CASES = {  # of a device: (shapes, ways, the tokens of a pack)
    "cpu": ({"small": SMALL, "many words": WORDS}, [*WAYS], (256, 1024)),
    "cuda": (FITTING, [*WAYS][2:], (8192,)),
    "quick": ({"small": SMALL}, [*WAYS], (256,)),
}


class LiveBytes(TorchDispatchMode):
    """Within it, `peak` is the most bytes that the storages of tensors had at once: of `held`, and of all
    that operations returned. What one of them takes for itself while it runs is not seen."""

    def __init__(self, held: Any):
        super().__init__()
        self.seen: dict[int, weakref.finalize] = {}
        self.live = self.peak = 0
        self.count(held)

    def count(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                key, size = storage._cdata, storage.nbytes()
                self.live += size
                self.seen[key] = weakref.finalize(storage, self.forget, key, size)
        self.peak = max(self.peak, self.live)

    def forget(self, key: int, size: int) -> None:
        del self.seen[key]
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count(result)
        return result


def measure(model: ModelConfig, tokens: int, ranks: parallel.Ranks, **settings: Any) -> dict[str, float]:
    """-> bytes, as estimated and as measured, for packs of so many tokens."""
    gc.collect()
    loop, rows = training.prepare(model, tokens // 2, 2 * tokens, ranks, compiled=False, **settings)
    estimate = sum(cost.memory_per_rank(loop.settings, model, 1, ranks.device).values()) * 1e9
    again = {"recomputed_blocks": min(loop.settings.recompute, model.num_layers)}
    loop.step(rows)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loop.step(rows)
        return {"estimate": estimate, "measured": torch.cuda.max_memory_allocated(), **again}
    states = [[*state.values()] for state in loop.optimizer.state.values()]
    with LiveBytes([[*loop.trainee.parameters()], [*loop.trainee.masters.values()], states]) as live:
        loop.step(rows)
    return {"estimate": estimate, "measured": live.peak, **again}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a rehearsal on the CPU: no figures")
    arguments = parser.parse_args()
    kind = "quick" if arguments.quick else arguments.device
    shapes, ways, budgets = CASES[kind]
    result: dict[str, Any] = {"rows": []}
    with parallel.join_ranks(TrainSettings(device=arguments.device)) as ranks:
        for (shape, model), way, tokens in itertools.product(shapes.items(), ways, budgets):
            row: dict[str, Any] = {"shape": shape, "way": way, "tokens": tokens}
            try:
                row |= measure(model, tokens, ranks, **WAYS[way])
            except torch.cuda.OutOfMemoryError:
                row["not_run"] = "does not fit in memory"
            result["rows"].append(row)
            common.write_result(f"memory_{kind}", result)
            if ranks.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    off = [row for row in result["rows"] if abs(row.get("estimate", 1) / row.get("measured", 1) - 1) > WITHIN]
    print(*off, sep="\n")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
