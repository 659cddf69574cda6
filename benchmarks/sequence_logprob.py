"""The fused sequence log-prob beside its peers: time, TFLOP/s, share of the matmul rate, peak memory.

    python benchmarks/sequence_logprob.py [--device cuda] [--repeats 7] [--ways ours "eager torch"]

Ours, eager torch, torch.compile, Liger and Cut Cross-Entropy (exact: without its gradient filter) compute
per-token log-probs (score) and their sum with both gradients (train), in one process and in turns. On CUDA
the shapes are 8,192 tokens and the heads of LLaMA-3.1-8B, LLaMA-3.2-3B and Qwen3-14B in bf16; on the CPU,
where the two Triton peers cannot run, small shapes in fp32. A peer that did not run is listed, and why.
Work is counted as 2TdV for score and 6TdV for train, whoever recomputes what; the matmul rate is that of a
square product timed in the same turns. Results: benchmarks/results/sequence_logprob_{cuda,cpu}.json.
"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

from common import ROOT, compare, write_result

import torch  # isort: skip
import torch.nn.functional as F

from gramr2 import kernels

SHAPES = {  # device: {name: (T, D, V)}
    "cuda": {
        "LLaMA-3.1-8B": (8192, 4096, 128_256),
        "LLaMA-3.2-3B": (8192, 3072, 128_256),
        "Qwen3-14B": (8192, 5120, 151_936),
    },
    "cpu": {"small": (1024, 256, 32_000), "wide vocabulary": (512, 128, 151_936)},
}
MICRO = {"micro": (64, 32, 256)}  # for a rehearsal: it shows that the script runs, and no figure
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
SQUARE = {"cuda": 8192, "cpu": 1024}
WORK = {"score": 2, "train": 6}  # products of T x D x V


def eager(hidden_TD, weight_VD, targets_T):
    return -F.cross_entropy((hidden_TD @ weight_VD.T).float(), targets_T, reduction="none")


def liger(mode):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    reduction = "none" if mode == "score" else "sum"
    options = None, None, -100, 0.0, 0.0, reduction
    return lambda *operands: -Function.apply(*operands, *options)[0]


def cut_cross_entropy(mode):
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "cce", "filter_eps": None, "reduction": "none" if mode == "score" else "sum"}
    return lambda *operands: -linear_cross_entropy(*operands, **options)


def ours(mode):
    def total(hidden_TD, weight_VD, targets_T):
        ones_T = torch.ones(len(targets_T), device=targets_T.device)
        return kernels.sequence_logprob_sum(hidden_TD, weight_VD, targets_T, ones_T)[0]

    return kernels.sequence_logprob if mode == "score" else total


WAYS = {  # name: maker(mode) -> function(hidden, weight, targets) -> log-probs, or their sum
    "ours": ours,
    "ours, recomputing": lambda mode: kernels.sequence_logprob,
    "eager torch": lambda mode: eager,
    "torch.compile": lambda mode: torch.compile(eager, dynamic=False),
    "Liger": liger,
    "Cut Cross-Entropy": cut_cross_entropy,
}
NEEDS = {"Liger": "liger_kernel", "Cut Cross-Entropy": "cut_cross_entropy"}


def unavailable(way: str, mode: str, device: str) -> str | None:
    """Why a way cannot run here, or None."""
    if way == "ours, recomputing" and mode == "score":
        return "scoring computes the logits once"
    if way not in NEEDS:
        return None
    if device != "cuda":
        return "its kernels need a CUDA device"
    try:
        importlib.import_module(NEEDS[way])
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def operands(device: str, shape: str):
    T, D, V = (SHAPES[device] | MICRO)[shape]
    torch.manual_seed(0)
    hidden_TD = torch.randn(T, D, device=device, dtype=DTYPES[device])
    weight_VD = torch.randn(V, D, device=device, dtype=DTYPES[device]) * D**-0.5
    return hidden_TD, weight_VD, torch.randint(V, (T,), device=device)


def runner(way: str, mode: str, hidden_TD, weight_VD, targets_T):
    """-> a function that runs one way once and returns the sum of the log-probs."""
    function = WAYS[way](mode)

    @torch.no_grad()
    def score():
        return function(hidden_TD, weight_VD, targets_T).sum()

    def train():
        leaves = hidden_TD.detach().requires_grad_(), weight_VD.detach().requires_grad_()
        total = function(*leaves, targets_T).sum()
        total.backward()
        return total.detach()

    return score if mode == "score" else train


def peak(way: str, mode: str, device: str, shape: str) -> float | None:
    """MiB above what stood before the call, gradients included; on the CPU in a process of its own.

    None where the system does not tell (macOS has no /proc).
    """
    if device == "cpu":
        command = [sys.executable, __file__, "--one", way, mode, shape]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return float(done.stdout.split()[-1]) if done.returncode == 0 else None
    run = runner(way, mode, *operands(device, shape))
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_of_this_process(way: str, mode: str, shape: str) -> float:
    """The CPU's part of `peak`. Compiled code is run from its cache, so that no compiler is measured."""

    def kibibytes(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    hidden_TD, weight_VD, targets_T = operands("cpu", shape)
    run = runner(way, mode, hidden_TD, weight_VD, targets_T)
    if way == "torch.compile":
        run()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = kibibytes("VmRSS")
    run()
    return (kibibytes("VmHWM") - before) / 1024


def measure(device: str, shape: str, mode: str, ways: list[str], repeats: int) -> list[dict]:
    """One row per way, the ways that could not run among them."""
    T, D, V = (SHAPES[device] | MICRO)[shape]
    arguments = operands(device, shape)
    rows, runs, truth = [], {}, None
    for way in ways:
        row = {"shape": shape, "T": T, "D": D, "V": V, "mode": mode, "way": way}
        reason = unavailable(way, mode, device)
        if reason is None:
            try:
                runs[way] = runner(way, mode, *arguments)
                total = runs[way]().item()
                truth = total if truth is None else truth
                row["difference"] = abs(total / truth - 1)  # of the summed log-prob, from ours
            except Exception as error:  # a peer's failure is a line of the table, not the end of the run
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                runs.pop(way, None)
        rows.append(row | ({"not_run": reason} if reason else {}))
    side = SQUARE[device]
    square = torch.randn(side, side, device=device, dtype=DTYPES[device])
    product = torch.empty_like(square)
    timing = compare({**runs, "matmul": lambda: torch.mm(square, square, out=product)}, repeats)
    matmul_rate = 2 * side**3 / timing["matmul"]["seconds"]
    for row in rows:
        if row["way"] in runs:
            rate = WORK[mode] * T * D * V / timing[row["way"]]["seconds"]
            row |= timing[row["way"]] | {"tflops": rate / 1e12, "of_matmul": rate / matmul_rate}
            row |= {"matmul_tflops": matmul_rate / 1e12, "peak_mib": peak(row["way"], mode, device, shape)}
        print(row, file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--repeats", type=int, default=7, help="turns that are timed (default: 7)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal on a micro shape")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(peak_of_this_process(*arguments.one))
        return
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    shapes = MICRO if arguments.quick else SHAPES[device]
    dtype, rows = str(DTYPES[device]).removeprefix("torch."), []
    result = {"dtype": dtype, "backend": kernels.backend(device), "repeats": arguments.repeats, "rows": rows}
    for shape, mode in ((shape, mode) for shape in shapes for mode in WORK):
        rows += measure(device, shape, mode, arguments.ways, arguments.repeats)
        # After each shape: what a run out of time has measured is not lost.
        write_result("sequence_logprob_quick" if arguments.quick else f"sequence_logprob_{device}", result)


if __name__ == "__main__":
    main()
