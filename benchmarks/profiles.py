"""Device time by kernel, of one decode step and of one training step: what these times are made of.

    python benchmarks/profiles.py                           8B decode steps and 3B training, random weights
    python benchmarks/profiles.py --shapes SmolLM2-135M     the training step of another shape
    python benchmarks/profiles.py --device cpu --quick      a rehearsal with micro models: no figures

torch.profiler's times, summed by the kernels' names and divided by the number of steps. The time by the
clock is taken under the profiler and is somewhat longer than without it; what it has over the device's is
time in which the device waited for the host. tables.py sorts the kernels into kinds. On the CPU operators
stand for kernels.

Left out: what the host does in that time, memory, steps that compute prompts, and loads that do not fit.
"""

import argparse
import re
import sys
import time

import common
import sampling
import torch
import training
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gramr2 import parallel
from gramr2.settings import TrainSettings

ROWS = 24  # kernels that are kept of each profile, the longest first
SKIPPED, STEPS = 8, 16  # decode steps: the first ones capture a graph


class Watch:
    """Between `start` and `stop` the device's kernels are counted."""

    def __init__(self, device: str):
        self.device = device
        activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
        self.profile = profile(activities=[activity])
        self.began = self.seconds = 0.0

    def start(self) -> None:
        sampling.wait(self.device)
        self.profile.start()
        self.began = time.perf_counter()

    def stop(self) -> None:
        sampling.wait(self.device)
        self.seconds = time.perf_counter() - self.began
        self.profile.stop()

    def figures(self, name: str, steps: int) -> dict:
        """-> the milliseconds of a step, by kernel: (ms, share, count, name)."""
        cuda = self.device == "cuda"
        times: dict[str, tuple[float, float]] = {}
        for event in self.profile.key_averages():
            if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU) and not marks(event):
                spent = event.self_device_time_total if cuda else event.self_cpu_time_total
                before, count = times.get(short(event.key), (0.0, 0.0))
                times[short(event.key)] = before + spent / 1e3 / steps, count + event.count / steps
        whole = sum(ms for ms, _ in times.values())
        rows = sorted(((ms, ms / whole, count, key) for key, (ms, count) in times.items()), reverse=True)
        wall = 1e3 * self.seconds / steps
        return {"name": name, "device_ms": whole, "wall_ms": wall, "rows": rows[:ROWS]}


def marks(event) -> bool:
    """Whether it is a range that torch's own code has given a name, and no kernel."""
    return getattr(event, "is_user_annotation", False)


def short(name: str) -> str:
    """A kernel's name without its namespaces and numbers: what it is called, and the function inside."""
    base, _, inside = name.removeprefix("void ").replace("(anonymous namespace)", "").partition("<")
    base = base.partition("(")[0].rpartition("::")[2].strip() or name
    found = re.search(r"\b\w*(?:Functor\w*|_kernel_cuda|silu_kernel|ReduceOp|FusedOpt\w*)", inside)
    return f"{base} {found[0]}" if found else base


def decode(name: str, model, prompts: list[list[int]], k: int, device: str) -> dict:
    watch, seen = Watch(device), 0

    def step(_) -> None:
        nonlocal seen
        seen += 1
        if seen == SKIPPED:
            watch.start()
        if seen == SKIPPED + STEPS:
            watch.stop()

    sampling.full_steps(model, prompts, k, step)
    return watch.figures(name, STEPS)


def train(name: str, config, length: int, tokens: int, device: str) -> dict:
    with parallel.join_ranks(TrainSettings(device=device)) as ranks:
        loop, rows = training.prepare(config, length, tokens, ranks, False)
        for _ in range(2):
            loop.step(rows)
        watch = Watch(device)
        watch.start()
        for _ in range(2):
            loop.step(rows)
        watch.stop()
    return watch.figures(name, 2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shapes", nargs="*", choices=[*training.LARGE], default=["LLaMA-3.2-3B"])
    parser.add_argument("--quick", action="store_true", help="a rehearsal with micro models: no figures")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    result, context = {"profiles": []}, 96 if quick else 2048

    def add(found: dict) -> None:
        result["profiles"].append(found)
        common.write_result("profiles_quick" if quick else "profiles_cuda", result)
        print(f"{found['name']}: device {found['device_ms']:.2f} ms a step, wall {found['wall_ms']:.2f} ms")

    config = sampling.MICRO if quick else sampling.LARGE
    model = sampling.random_model(config, device, torch.float32 if quick else torch.bfloat16)
    for prompts, k, shared in sampling.MICRO_LOADS[1:] if quick else sampling.LARGE_LOADS[1:]:
        if not sampling.fits(model, prompts, k, shared, context):
            continue
        ids = sampling.random_prompts(prompts, shared or context - 64, config.vocab_size)
        name = f"decode, {'micro' if quick else '8B'}, {prompts} x {k}"
        name += f", {shared:,} shared" if shared else f" at {context:,}"
        add(decode(name, model, ids, k, device))
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    tokens = 512 if quick else training.TOKENS
    for shape in training.MICRO if quick else arguments.shapes:
        config = (training.LARGE | training.MICRO)[shape]
        length = training.lengths(shape, tokens)[0]
        add(train(f"training, {shape}, {tokens // length} x {length:,}", config, length, tokens, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
