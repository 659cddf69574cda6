"""Training steps beside transformers + AdamW, in one run: tokens/s, memory and, on a GPU, the MFU.

    python benchmarks/training.py                  a small model on the CPU, ours beside transformers
    python benchmarks/training.py --device cuda    the published shapes, random weights, if they fit
    python benchmarks/training.py --device cuda --shapes SmolLM2-135M Qwen2.5-0.5B
    python benchmarks/training.py --quick          the GPU's way with a micro model: a rehearsal, no figures

A step is everything that a step is: the batch as tensors, forward, loss, backward, clipping, fused AdamW.
Both train the same float32 weights on the same sequences, all of whose tokens are targets; transformers
pads them to the longest, as its collators do. Useful tokens are those of the sequences, without padding.
Memory is each way's own process. On a GPU what is measured is ours alone: bf16 compute, fp32 weights, as
many blocks computed again as the memory asks for; its MFU is a share of the matmul rate that the same run
measured.

Left out: several GPUs, and the time that reading and tokenizing take (they run beside the steps).
"""

import argparse
import concurrent.futures
import dataclasses
import gc
import multiprocessing
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

from gramr2 import cost, fit, loss, parallel, weights
from gramr2.lora import adapt
from gramr2.loss import Trainee
from gramr2.model import Decoder, ModelConfig
from gramr2.records import Example, Tokens
from gramr2.settings import TrainSettings

SMALL = ModelConfig(
    vocab_size=32000,
    hidden_size=256,
    intermediate_size=688,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_size=64,
    max_positions=1024,
    tie_embeddings=True,
)
LARGE = {
    "LLaMA-3.2-3B": ModelConfig(128256, 3072, 8192, 28, 24, 8, 128, 131072, 1e-5, 5e5, tie_embeddings=True),
    "SmolLM2-135M": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 1e5, tie_embeddings=True),
    "Qwen2.5-0.5B": ModelConfig(
        151936, 896, 4864, 24, 14, 2, 64, 32768, 1e-6, 1e6, tie_embeddings=True, qkv_bias=True
    ),
    "LLaMA-3.1-8B": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, 5e5),  # where it fits
}
# A frozen model in bfloat16, whose adapters are trained in packs of 2,048 tokens: for a card of 24 GB.
ADAPTED = "LLaMA-3.1-8B, adapters of rank 64"
ADAPTERS: dict[str, Any] = {"lora_rank": 64, "recompute": 99}
LARGE[ADAPTED] = LARGE["LLaMA-3.1-8B"]
LITTLE = "SmolLM2-135M", "Qwen2.5-0.5B"  # on sequences of their kind of data
TOKENS = 32768  # of a step on a GPU, in two packs
MICRO = {"micro": ModelConfig(256, 32, 64, 1, 2, 2, 16, 512)}
CONFIG = TrainSettings(max_length=512, token_budget=4096, lr=1e-5, warmup=0.0)
REPEATS = 5


def sequences(case: str) -> list[list[int]]:
    """Four of 512 tokens, or eight of any length from 8 to 512."""
    rng = random.Random(3)
    lengths = [512] * 4 if case == "equal" else [rng.randint(8, 512) for _ in range(8)]
    return [[rng.randrange(SMALL.vocab_size) for _ in range(n)] for n in lengths]


def ours(case: str, model_dir: Path):
    rows = [Example((Tokens(tuple(ids), 1),)) for ids in sequences(case)]
    ranks = parallel.Ranks(0, 1, torch.device("cpu"))
    trainee = fit.make_trainee(loss.negative_log_likelihood, CONFIG, SMALL, model_dir, ranks)
    loop = fit.Loop(trainee, CONFIG, ranks, model_dir, 10**6)
    return lambda: loop.step(rows)


def theirs(case: str, model_dir: Path):
    transformers = common.needed("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG.lr, fused=True)
    batch = sequences(case)
    longest = max(map(len, batch))

    def step():
        ids, mask, labels = (torch.full((len(batch), longest), fill) for fill in (0, 0, -100))
        for n, row in enumerate(batch):
            ids[n, : len(row)] = labels[n, : len(row)] = torch.tensor(row)
            mask[n, : len(row)] = 1
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


WAYS = {"ours": ours, "transformers": theirs}


def peak_rss(way: str, case: str, model_dir: Path) -> float:
    """MiB that a process of its own came to hold in three steps."""
    torch.set_num_threads(1)
    step = WAYS[way](case, model_dir)
    for _ in range(3):
        step()
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss would begin at the parent's
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def on_cpu() -> dict:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model_dir = Path(directory) / "model"
        model = Decoder(SMALL)
        nn.init.normal_(model.embed.weight, std=0.02)  # as published models begin; torch's own is 1
        weights.save(model, None, model_dir)
        for case in ("equal", "ragged"):
            steps = {name: make(case, model_dir) for name, make in WAYS.items()}
            timings = common.compare(steps, REPEATS)
            useful = sum(map(len, sequences(case)))
            for name, timing in timings.items():
                with fresh_process() as pool:
                    peak = pool.submit(peak_rss, name, case, model_dir).result()
                speed = {"tokens_per_second": useful / timing["seconds"], "speedup": 1 / timing["ratio"]}
                rows.append({"case": case, "way": name, **timing, **speed, "peak_mib": peak})
    parameters = cost.count_parameters(SMALL)
    return {"rows": rows, "repeats": REPEATS, "parameters": parameters, "dtype": "float32"}


def fresh_process():
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


# ---------------------------------------------------------------------------------- on a GPU


def at_published_shapes(device: str, shapes: dict, tokens: int, compile_blocks: bool) -> None:
    """A row for each shape and length, written as it comes; `tokens` of a step, in two packs."""
    name = "training_cuda" + "_compiled" * compile_blocks if shapes is not MICRO else "training_quick"
    with parallel.join_ranks(TrainSettings(device=device)) as ranks:
        rate = cost.matmul_rate(ranks.device) if device == "cuda" else 1e12
        result = {"rows": [], "matmul_tflops": rate / 1e12, "compiled": compile_blocks, "tokens": tokens}
        result["dtype"] = str(parallel.compute_dtype(CONFIG, ranks.device)).removeprefix("torch.")
        for shape in shapes:
            for length in lengths(shape, tokens):
                row = {"shape": shape, "length": length}
                how = (4096, ADAPTERS) if shape == ADAPTED else (tokens, {})
                try:
                    row |= measure(shapes[shape], length, *how, ranks, rate, compile_blocks)
                except torch.cuda.OutOfMemoryError:
                    row["not_run"] = "does not fit in memory"
                result["rows"].append(row)
                common.write_result(name, result)
                gc.collect()
                torch.cuda.empty_cache()


def lengths(shape: str, tokens: int) -> tuple[int, ...]:
    """Of the sequences of a step; the first are the shape's usual ones."""
    if shape == ADAPTED:
        return (2048,)
    return (tokens // 64, tokens // 16) if shape in LITTLE else (tokens // 16, tokens // 4)


def prepare(
    model: ModelConfig, length: int, tokens: int, ranks: parallel.Ranks, compiled: bool, **more: Any
) -> tuple[fit.Loop, list[Example]]:
    """-> (what takes steps, with random weights; the examples of a step, in two packs)."""
    settings = dataclasses.replace(
        CONFIG, max_length=length, token_budget=tokens // 2, compile=compiled, **more
    )
    again = cost.recomputed_blocks(settings, model, ranks)
    settings = dataclasses.replace(settings, recompute=again)
    with torch.device("meta"):
        trainee = Trainee(Decoder(model), loss.negative_log_likelihood)
        if settings.lora_rank:
            adapt(trainee.decoder, settings.lora_rank, settings.lora_alpha, settings.lora_layers)
    parallel.wrap(trainee, settings, ranks)
    with torch.no_grad():
        for weight in {**parallel.weights(trainee), **trainee.trained}.values():
            weight.normal_(std=0.02) if weight.ndim > 1 else weight.fill_(1.0)
    trainee.refresh()
    draw = lambda: tuple(torch.randint(0, model.vocab_size, (length,)).tolist())  # noqa: E731
    rows = [Example((Tokens(draw(), 1),)) for _ in range(tokens // length)]
    return fit.Loop(trainee, settings, ranks, Path(tempfile.gettempdir()), 10**6), rows


def measure(
    model: ModelConfig, length: int, tokens: int, more: dict, ranks: parallel.Ranks, rate, compiled: bool
) -> dict:
    """The median of three steps, after two."""
    loop, rows = prepare(model, length, tokens, ranks, compiled, **more)
    cuda = ranks.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        loop.step(rows)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    return {
        "seconds": median,
        "recomputed_blocks": loop.settings.recompute,
        "tokens_per_second": tokens / median,
        "of_matmul": cost.step_flops(model, rows, "lora_rank" in more) / median / rate,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=[*LARGE], default=[*LARGE], help="on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile each block (on a GPU)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal with a micro model: no figures")
    arguments = parser.parse_args()
    if arguments.quick:
        at_published_shapes(arguments.device, MICRO, 512, arguments.compile)
    elif arguments.device == "cuda":
        shapes = {name: LARGE[name] for name in arguments.shapes}
        at_published_shapes("cuda", shapes, TOKENS, arguments.compile)
    else:
        common.write_result("training_cpu", on_cpu())
    return 0


if __name__ == "__main__":
    sys.exit(main())
