"""Scoring throughput of the decoder beside transformers, on the same checkpoint.

    python benchmarks/forward.py [--device cuda] [--threads 1] [--repeats 5]

A LLaMA-shaped model is made, saved, and loaded by both: 107M parameters (vocabulary 32,000) on the CPU,
LLaMA-3.2-1B's shape on a GPU. Scoring is log p(token given the tokens before it) for every token: ours
through gramr2.logprobs, theirs as a padded batch, its logits and their log-softmax. Equal lengths, 4 x 512;
ragged ones, 12 sequences of 8 to 512 tokens, useful tokens only; in bfloat16 on the CPU 1 x 256, and 6 of 8
to 128; on a GPU 8 x 2,048, and 16 of 8 to 2,048, in bfloat16. Timings alternate in one process and are
reported as the median of the ratios; the peak memory of each is read in a process of its own, on a GPU the
memory of the GPU. Results go to benchmarks/results/forward.json, or to forward_cuda.json.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

CASES = ("equal", "ragged")
SHAPES = {
    "cpu": dict(vocab_size=32000, hidden_size=768, intermediate_size=2112, num_layers=9, num_heads=12,
                num_kv_heads=4, head_size=64, max_positions=2048),
    "cuda": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
                 num_kv_heads=8, head_size=64, max_positions=4096, tie_embeddings=True),
    "quick": dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2,
                  num_kv_heads=2, head_size=16, max_positions=2048),
}  # fmt: skip
LENGTHS = {  # device, dtype: equal ones, how many ragged ones, and the longest of them
    ("cpu", "float32"): ([512] * 4, 12, 512),
    ("cpu", "bfloat16"): ([256], 6, 128),  # a CPU without instructions for it computes several times slower
    ("cuda", "bfloat16"): ([2048] * 8, 16, 2048),  # padded logits, and two copies of them, fit 80 GB
}


def make_model(directory: Path, shape: str) -> int:
    from checkpoints import randomise

    from gramr2 import weights
    from gramr2.model import Decoder, ModelConfig

    model = Decoder(ModelConfig(**SHAPES[shape]))
    randomise(model, seed=0)
    weights.save(model, None, directory)
    return sum(parameter.numel() for parameter in model.parameters())


def sequences(case: str, dtype: str, device: str) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths, count, longest = LENGTHS[device, dtype]
    if case == "ragged":
        lengths = torch.randint(8, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def ours(directory: Path, dtype: str, device: str):
    from gramr2 import logprobs, weights

    model = weights.load_model(directory, device, dtype)
    return lambda batch: logprobs(model, batch)


def theirs(directory: Path, dtype: str, device: str):
    from common import needed

    load = needed("transformers").AutoModelForCausalLM.from_pretrained
    model = load(directory, dtype=getattr(torch, dtype)).to(device).eval()

    @torch.no_grad()
    def score(batch):
        longest = max(map(len, batch))
        ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch], device=device)
        mask_BL = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], device=device)
        logits_BLV = model(ids_BL, attention_mask=mask_BL, use_cache=False).logits[:, :-1].float()
        logp_BLV = logits_BLV.log_softmax(-1)
        values_BL = logp_BLV.gather(-1, ids_BL[:, 1:, None])[..., 0]
        return [values_BL[i, : len(ids) - 1] for i, ids in enumerate(batch)]

    return score


ENGINES = {"ours": ours, "transformers": theirs}


def peak_memory(directory: Path, engine: str, dtype: str, case: str, device: str) -> float:
    """MiB of a process that loads the model with one engine and scores one batch."""
    command = [sys.executable, __file__, "--device", device, "--one", engine, dtype, case, str(directory)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_mib(device: str) -> float:
    """This process's own peak. (getrusage's begins at the size of the process that started this one.)"""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def measure(directory: Path, dtype: str, device: str, repeats: int) -> Iterator[dict]:
    """A row for each case, as it is measured."""
    from common import compare

    engines = {name: make(directory, dtype, device) for name, make in ENGINES.items()}
    for case in CASES:
        batch = sequences(case, dtype, device)
        a, b = (torch.cat(list(score(batch))) for score in engines.values())
        tokens = sum(map(len, batch))
        timing = compare(
            {name: (lambda s=score, b=batch: s(b)) for name, score in engines.items()}, repeats=repeats
        )
        difference = (a.float() - b.float()).abs().max().item()
        if device == "cuda":
            torch.cuda.empty_cache()  # the processes that measure memory need it
        yield {
            "dtype": dtype,
            "case": case,
            "tokens": tokens,
            "tokens_per_second": {name: tokens / timing[name]["seconds"] for name in ENGINES},
            "ratio": timing["transformers"]["ratio"],
            "peak_mib": {name: peak_memory(directory, name, dtype, case, device) for name in ENGINES},
            "largest_difference": difference,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a rehearsal with a micro model: no figures")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        engine, dtype, case, directory = arguments.one
        score = ENGINES[engine](Path(directory), dtype, arguments.device)
        score(sequences(case, dtype, arguments.device))
        print(peak_mib(arguments.device))
        return
    from common import write_result

    with tempfile.TemporaryDirectory() as place:
        device, model = arguments.device, Path(place) / "model"
        parameters = make_model(model, "quick" if arguments.quick else device)
        dtypes = [dtype for where, dtype in LENGTHS if where == device][: 1 if arguments.quick else 2]
        name = "forward_quick" if arguments.quick else "forward_cuda" if device == "cuda" else "forward"
        result = {"parameters": parameters, "threads": arguments.threads, "rows": []}
        for dtype in dtypes:
            for row in measure(model, dtype, device, arguments.repeats):
                print(row, file=sys.stderr)
                result["rows"].append(row)
                write_result(name, result)


if __name__ == "__main__":
    main()
