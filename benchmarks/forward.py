"""Scoring throughput of the decoder beside transformers, on the same checkpoint.

    python benchmarks/forward.py [--threads 1] [--quick]

A LLaMA-shaped model of 107M parameters (vocabulary 32,000) is made, saved, and loaded by both. Scoring is
log p(token given the tokens before it) for every token: ours through gramr2.logprobs, theirs as a padded
batch, its logits and their log-softmax. Equal lengths, 4 x 512; ragged ones, 12 sequences of 8 to 512
tokens, useful tokens only; in bfloat16 1 x 256, and 6 of 8 to 128. Timings alternate in one process and are
reported as the median of the ratios; the peak memory of each is read in a process of its own. Results go to
benchmarks/results/forward.json.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

CASES = ("equal", "ragged")
SHAPE = dict(vocab_size=32000, hidden_size=768, intermediate_size=2112, num_layers=9, num_heads=12,
             num_kv_heads=4, head_size=64, max_positions=2048)  # fmt: skip


def make_model(directory: Path) -> int:
    from checkpoints import randomise

    from gramr2 import weights
    from gramr2.model import Decoder, ModelConfig

    model = Decoder(ModelConfig(**SHAPE))
    randomise(model, seed=0)
    weights.save(model, None, directory)
    return sum(parameter.numel() for parameter in model.parameters())


def sequences(case: str, dtype: str) -> list[list[int]]:
    """Fewer in bfloat16, which a CPU without instructions for it computes several times slower."""
    generator = torch.Generator().manual_seed(1)
    few = dtype == "bfloat16"
    if case == "equal":
        lengths = [256] if few else [512] * 4
    else:
        lengths = torch.randint(8, 129 if few else 513, (6 if few else 12,), generator=generator).tolist()
    return [torch.randint(0, SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def ours(directory: Path, dtype: str):
    from gramr2 import logprobs, weights

    model = weights.load_model(directory, dtype=dtype)
    return lambda batch: logprobs(model, batch)


def theirs(directory: Path, dtype: str):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def score(batch):
        longest = max(map(len, batch))
        ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch])
        mask_BL = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])
        logits_BLV = model(ids_BL, attention_mask=mask_BL, use_cache=False).logits[:, :-1].float()
        logp_BLV = logits_BLV.log_softmax(-1)
        values_BL = logp_BLV.gather(-1, ids_BL[:, 1:, None])[..., 0]
        return [values_BL[i, : len(ids) - 1] for i, ids in enumerate(batch)]

    return score


ENGINES = {"ours": ours, "transformers": theirs}


def peak_memory(directory: Path, engine: str, dtype: str, case: str) -> float:
    """MiB of a process that loads the model with one engine and scores one batch."""
    command = [sys.executable, __file__, "--one", engine, dtype, case, str(directory)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_mib() -> float:
    """This process's own peak. (getrusage's begins at the size of the process that started this one.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def measure(directory: Path, dtype: str, repeats: int) -> list[dict]:
    from common import compare

    engines = {name: make(directory, dtype) for name, make in ENGINES.items()}
    rows = []
    for case in CASES:
        batch = sequences(case, dtype)
        a, b = (torch.cat(list(score(batch))) for score in engines.values())
        tokens = sum(map(len, batch))
        timing = compare(
            {name: (lambda s=score, b=batch: s(b)) for name, score in engines.items()}, repeats=repeats
        )
        rows.append(
            {
                "dtype": dtype,
                "case": case,
                "tokens": tokens,
                "tokens_per_second": {name: tokens / timing[name]["seconds"] for name in ENGINES},
                "ratio": timing["transformers"]["ratio"],
                "peak_mib": {name: peak_memory(directory, name, dtype, case) for name in ENGINES},
                "largest_difference": (a.float() - b.float()).abs().max().item(),
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        engine, dtype, case, directory = arguments.one
        score = ENGINES[engine](Path(directory), dtype)
        score(sequences(case, dtype))
        print(peak_mib())
        return
    from common import write_result

    with tempfile.TemporaryDirectory() as place:
        parameters = make_model(Path(place) / "model")
        repeats = 2 if arguments.quick else 5
        rows = [
            row for dtype in ("float32", "bfloat16") for row in measure(Path(place) / "model", dtype, repeats)
        ]
    write_result("forward", {"parameters": parameters, "threads": arguments.threads, "rows": rows})


if __name__ == "__main__":
    main()
