"""Tries launch numbers of the kernels on this card, and leaves the file that kernels/tuning.py reads.

    python benchmarks/tune.py [--seconds 120] [--kernel score]    writes the file where kernels look for it
    python benchmarks/tune.py --device cpu --quick                a rehearsal in Triton's interpreter on micro
                                                                  shapes; without --out it writes nothing

A kernel asks `kernels.tuning.choice` before a launch. Here each is run once to hear what it asks for, and
then with other numbers in the answer: tile sizes, stages, warps, splits. A candidate must agree with the
kernel's meaning in kernels/reference.py, computed in float32, before it is timed, and be 2% faster than the
built-in numbers, timed again beside them, before it is chosen. One that does not compile is counted and
forgotten. Shapes are those of published models; those that ask by the same words get one choice, which is
right for all of them and the fastest in the geometric mean. The file keeps what it says of other devices and
shapes; where the built-in numbers are best its line goes.

To add a kernel: an `Entry`. Left out: chunks of prompts, whole models, and an end to end gain; measure that
with the other scripts before and after.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor

from gramr2.files import write_json
from gramr2.kernels import reference, tuning

GAIN = 1.02  # how much faster than the built-in numbers a candidate has to be
Numbers = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """Operands of one shape: `run` gives what is compared with what `truth` gives."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    truth: Callable[[], Sequence[Tensor]]
    ready: Callable[[], Callable] | None = None  # makes what is timed, for each candidate anew; None: `run`


@dataclass(frozen=True)
class Entry:
    kernel: str  # as it calls itself when it asks
    problem: Callable[..., Problem]  # of device, dtype and a shape
    shapes: tuple[tuple, ...]
    micro: tuple  # a shape for the interpreter
    candidates: tuple[Numbers, ...]  # over the built-in numbers; names unknown to a kernel are dropped
    quick: tuple[Numbers, ...]
    tolerance: float  # of the difference from the truth, as a share of it (both in the Euclidean norm)


# ---------------------------------------------------------------------------------- the kernels


def normal(device: str, dtype: torch.dtype, *sizes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, device=device, dtype=dtype) for size in sizes]


def head(device: str, dtype: torch.dtype, T: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden_TD, weight_VD = normal(device, dtype, (T, D), (V, D))
    return hidden_TD, weight_VD * D**-0.5, torch.randint(V, (T,), device=device)


def score(device: str, dtype: torch.dtype, T: int, D: int, V: int) -> Problem:
    """Log-probs of tokens, without gradients."""
    from gramr2.kernels import sequence_logprob_triton

    hidden_TD, weight_VD, targets_T = head(device, dtype, T, D, V)
    return Problem(
        f"T {T:,}, d {D:,}, V {V:,}",
        lambda: sequence_logprob_triton.score(hidden_TD, weight_VD, targets_T),
        lambda: reference.score(hidden_TD.float(), weight_VD.float(), targets_T),
    )


def gradient(device: str, dtype: torch.dtype, C: int, V: int) -> Problem:
    """A chunk of logits that becomes its gradient; of half the rows the softmax's: a lost tile shows."""
    from gramr2.kernels import sequence_logprob_triton

    (logits_CV,) = normal(device, dtype, (C, V))
    worn_CV, targets_C = logits_CV.clone(), torch.randint(V, (C,), device=device)
    d_logp_C = (torch.arange(C, device=device) % 2).float()
    upstream = targets_C, d_logp_C, 1 - d_logp_C

    def by(function, copy_CV):
        logp_C = function(copy_CV, *upstream)
        return copy_CV[::2], copy_CV[1::2], logp_C

    ours = sequence_logprob_triton.logits_to_gradient_
    return Problem(
        f"C {C:,}, V {V:,}",
        lambda: by(ours, logits_CV.clone()),
        lambda: by(reference.logits_to_gradient_, logits_CV.to(torch.float32, copy=True)),
        ready=lambda: partial(ours, worn_CV, *upstream),  # in place, again and again
    )


def chunk(device: str, dtype: torch.dtype, T: int, D: int, V: int) -> Problem:
    """A head in training: log-probs and both gradients, a chunk of logits at a time."""
    from gramr2 import kernels
    from gramr2.kernels.sequence_logprob import LogProbSum

    hidden_TD, weight_VD, targets_T = head(device, dtype, T, D, V)
    ones_T = torch.ones(T, device=device)

    def by(function, *operands):
        leaves = [x.detach().requires_grad_() for x in operands]
        total, logp_T = function(*leaves, targets_T, ones_T)
        return logp_T, *torch.autograd.grad(total, leaves)

    return Problem(
        f"T {T:,}, d {D:,}, V {V:,}",
        lambda: by(kernels.sequence_logprob_sum, hidden_TD, weight_VD),
        lambda: by(lambda *x: LogProbSum.apply(*x, reference), hidden_TD.float(), weight_VD.float()),
    )


def paged_read(device, dtype, heads: int, groups: int, size: int, items: int, members: int, keys: int):
    """Decode rows over their pages: each alone with its own, or `members` together with those they share."""
    from gramr2 import kernels
    from gramr2.kernels.reads import Item, Reads, reads_of

    page = 64
    pages = -(-keys // page)
    rows = np.arange(items * members).reshape(items, members)
    tables = np.random.default_rng(0).permutation(items * pages).reshape(items, pages)
    host = reads_of([Item(rows[i], np.full(members, keys), tables[i]) for i in range(items)])
    arrays = [torch.from_numpy(array).to(device) for array in host.arrays()]
    sizes = {"N": items * pages, "P": page, "G": groups, "K": size}
    pool = tuple(sizes[axis] for axis in POOL)
    operands = normal(device, dtype, (items * members, heads, size), pool, pool)

    def reads() -> list[Reads]:  # a kernel may keep a layout in them, which hangs on its choices
        return [Reads(*arrays)]

    return Problem(
        f"{items} x {members}, {keys:,} keys, {heads} heads of {size}",
        lambda: [kernels.attend_pages(*operands, reads())],
        lambda: [reference.attend_pages(*(x.float() for x in operands), reads())],
        ready=lambda: partial(kernels.attend_pages, *operands, reads()),
    )


# In which order a pool's axes lie, as the suffix of its name says.
POOL = next(name[5:] for name in inspect.signature(reference.attend_pages).parameters if name[:5] == "keys_")
LLAMA_8B, SMOLLM2 = (32, 8, 128), (9, 3, 64)  # heads, groups, head size
ENTRIES = (  # the last get the time that the first leave
    Entry(
        "gradient", gradient,
        shapes=((2048, 128256), (1760, 151936), (5456, 49152)),
        micro=(6, 700),
        candidates=(
            {"BLOCK_V": 2048, "num_warps": 4}, {"BLOCK_V": 4096, "num_warps": 4}, {"BLOCK_V": 4096},
            {"num_warps": 16}, {"BLOCK_V": 16384, "num_warps": 32},
        ),
        quick=({"BLOCK_V": 256}, {"num_warps": 4}),
        tolerance=1e-2,
    ),
    Entry(  # never more than is built in: memory is not what is tuned here
        "chunk", chunk,
        shapes=((8192, 4096, 128256), (16384, 576, 49152)),
        micro=(12, 32, 64),
        candidates=({"size": 128 << 20}, {"size": 256 << 20}, {"size": 384 << 20}),
        quick=({"size": 1024}, {"size": 2048}),
        tolerance=3e-2,
    ),
    Entry(
        "score", score,
        shapes=((8192, 4096, 128256), (8192, 2048, 128256), (8192, 5120, 151936), (8192, 576, 49152)),
        micro=(40, 32, 700),
        candidates=(
            {"num_stages": 3}, {"GROUP": 8}, {"GROUP": 32}, {"BLOCK_V": 128},
            {"BLOCK_T": 256, "BLOCK_V": 128}, {"BLOCK_D": 128, "num_stages": 2},
            {"BLOCK_V": 128, "BLOCK_D": 128, "num_stages": 3},
            {"COPY_ENGINE": 0, "BLOCK_V": 128, "num_stages": 3},
        ),
        quick=({"BLOCK_V": 128}, {"GROUP": 8}),
        tolerance=3e-5,
    ),
    Entry(
        "paged read", paged_read,
        shapes=((*LLAMA_8B, 32, 1, 2048), (*LLAMA_8B, 256, 1, 2048), (*LLAMA_8B, 16, 16, 1536),
                (*LLAMA_8B, 256, 1, 512), (*SMOLLM2, 256, 1, 704)),
        micro=(4, 2, 16, 2, 1, 40),
        candidates=(
            {"num_stages": 2}, {"num_stages": 4}, {"num_stages": 5}, {"num_warps": 2}, {"num_warps": 8},
            {"programs": 1}, {"programs": 2}, {"programs": 6}, {"programs": 8},
            {"keys": 32}, {"keys": 32, "num_stages": 5}, {"keys": 32, "num_warps": 2, "programs": 8},
            {"num_stages": 2, "programs": 8}, {"num_stages": 4, "programs": 2},
            {"num_stages": 5, "programs": 2}, {"num_warps": 2, "programs": 8},
            {"num_warps": 2, "num_stages": 4}, {"num_warps": 8, "num_stages": 4},
        ),
        quick=({"keys": 32}, {"programs": 2}),
        tolerance=1e-2,
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------- trying


def clock(run: Callable[[], object], device: str) -> float:
    """Seconds of a run: the median, on a card with a cold cache."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=10, rep=40, return_mode="median") / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def agrees(found: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> bool:
    """No difference above the tolerance, and nothing that is not finite."""
    pairs = [(one.double(), other.double()) for one, other in zip(found, truth, strict=True)]
    return all(float((one - other).norm()) <= tolerance * float(other.norm()) for one, other in pairs)


def tune(
    entry: Entry, problems: Sequence[Problem], candidates: Sequence[Numbers], device: str, until: float
) -> Iterator[dict]:
    """A row for each thing that the kernel asks for at these shapes."""
    asked: dict[str, tuple[Numbers, list[Problem]]] = {}
    for problem in problems:
        with tuning.trying({}) as heard:
            problem.run()
            for key, built_in in heard.items():
                if key.startswith(f"{entry.kernel}, "):
                    asked.setdefault(key, (built_in, []))[1].append(problem)
    if not asked:
        names = "; ".join(problem.name for problem in problems)
        yield {"kernel": entry.kernel, "shape": names, "tried": 0, "outcome": "it asks for nothing"}
    for key, (built_in, alike) in asked.items():
        truths = [problem.truth() for problem in alike]

        def right(numbers: Numbers, key=key, alike=alike, truths=truths) -> bool:
            with tuning.trying({key: numbers}):
                pairs = zip(alike, truths, strict=True)
                return all(agrees(problem.run(), truth, entry.tolerance) for problem, truth in pairs)

        def seconds(numbers: Numbers, key=key, alike=alike) -> list[float]:
            with tuning.trying({key: numbers}):
                return [clock(each.ready() if each.ready else each.run, device) for each in alike]

        words, names = key.partition(", ")[2], "; ".join(problem.name for problem in alike)
        row = {"kernel": entry.kernel, "key": key, "shape": f"{words} ({names})"}
        yield row | best_of(built_in, candidates, right, seconds, until)


def best_of(
    built_in: Numbers,
    candidates: Sequence[Numbers],
    right: Callable[[Numbers], bool],
    seconds: Callable[[Numbers], list[float]],
    until: float,
) -> dict:
    """What was tried, and which numbers won: the rest of a row."""
    counts = {"tried": 0, "wrong": 0, "failed": 0}
    if not right(built_in):
        return counts | {"outcome": "the built-in numbers are wrong here"}
    base, best, winner, in_time = seconds(built_in), [math.inf], None, True
    for candidate in candidates:
        numbers = built_in | {name: number for name, number in candidate.items() if name in built_in}
        in_time = in_time and time.monotonic() < until
        if numbers == built_in or not in_time:
            continue
        counts["tried"] += 1
        try:
            if not right(numbers):
                counts["wrong"] += 1
                continue
            taken = seconds(numbers)
        except Exception as error:  # it asks for more than the card has, or does not compile
            print(f"{numbers}: {type(error).__name__}", file=sys.stderr)
            counts["failed"] += 1
            continue
        if geometric_mean(taken) < geometric_mean(best):
            best, winner = taken, numbers
    row = counts | {"choice": None, "in_time": in_time}
    if winner:  # once more, in turns
        base, best = (list(map(min, old, seconds(n))) for old, n in ((base, built_in), (best, winner)))
        row |= {"best_ms": [1e3 * each for each in best], "gain": geometric_mean(base) / geometric_mean(best)}
        row["choice"] = winner if row["gain"] >= GAIN else None
    wins = (row["choice"] or {}).items()
    changed = [f"{name} {number}" for name, number in wins if number != built_in[name]]
    notes = [f"{counts[name]} {name}" for name in ("wrong", "failed") if counts[name]]
    notes += [] if in_time else ["time was up"]
    outcome = "; ".join([", ".join(changed) or "built-in", *notes])
    return row | {"built_in_ms": [1e3 * each for each in base], "outcome": outcome}


def geometric_mean(numbers: Sequence[float]) -> float:
    return math.prod(numbers) ** (1 / len(numbers))


def publish(path: Path, device: str, rows: list[dict]) -> None:
    """Merges the rows' choices into the file: only their own lines of this device change, and none is dropped
    before all candidates had their turn."""
    whole = {}
    if path.exists():
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            whole = {name: dict(found) for name, found in whole.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            print(f"warning: {path} was damaged ({error}), and is written anew", file=sys.stderr)
            whole = {}
    mine = whole.setdefault(device, {})
    for row in rows:
        if row.get("choice"):
            mine[row["key"]] = row["choice"]
        elif row.get("in_time"):
            mine.pop(row["key"], None)
    write_json(path, whole)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [entry.kernel for entry in ENTRIES]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernel", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all of it (default: 120)")
    parser.add_argument("--out", type=Path, help="the file (default on a card: where kernels look for it)")
    parser.add_argument("--quick", action="store_true", help="micro shapes, two candidates each: a rehearsal")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    if device == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU here; rehearse with --device cpu --quick", file=sys.stderr)
        return 2
    if device == "cpu":
        if not quick:
            parser.error("--device cpu is for rehearsals: add --quick")
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    out = arguments.out or (tuning.place() if device == "cuda" else None)
    entries = [entry for entry in ENTRIES if entry.kernel in arguments.kernel]
    rows: list[dict] = []
    started = time.monotonic()
    for done, entry in enumerate(entries):
        now = time.monotonic()
        until = now + (arguments.seconds - (now - started)) / (len(entries) - done)
        dtype = torch.float32 if quick else torch.bfloat16  # Triton's interpreter gets bf16 wrong
        shapes, candidates = ((entry.micro,), entry.quick) if quick else (entry.shapes, entry.candidates)
        problems = [entry.problem(device, dtype, *shape) for shape in shapes]
        for row in tune(entry, problems, candidates, device, until):
            rows.append(row)
            gain = f"{row['gain'] - 1:+.0%}" if "gain" in row else ""
            print(f"{row['kernel']}, {row['shape']}: {gain} {row['outcome']}", flush=True)
        if out:  # after each kernel: what a run out of time has found is not lost
            publish(out, tuning.name_of(torch.device(device)), rows)
            common.write_result("tuning_quick" if quick else "tuning_cuda", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
