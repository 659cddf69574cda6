"""What a device of some compute capability would compile: every Triton kernel, at the shapes that matter.

Needs triton. A kernel that is missing here fails test_kernels_compile.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from triton.runtime.jit import JITFunction

from gramr2.kernels import elementwise, paged_attention, sequence_logprob_triton
from gramr2.kernels.paged_attention_cpu import LOWEST

MODULES = elementwise, paged_attention, sequence_logprob_triton
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # as triton names them


CPU = torch.device("cpu")  # no card's measured numbers


class Build(NamedTuple):
    kernel: JITFunction
    types: list[
        str
    ]  # of the arguments, in order, as triton spells them; ":16": 16 divides it, as all pointers
    constants: dict
    options: dict
    tensor_cores: str | None = None  # "wide": the device's widest instruction; "any" will do for few rows


def builds(capability_major: int) -> list[Build]:
    return [
        build
        for name, dtype in DTYPES.items()
        for build in [
            *elementwise_builds(name),
            *cache_builds(name, dtype, capability_major),
            *logprob_builds(name, dtype, capability_major),
        ]
    ]


def elementwise_builds(name: str) -> list[Build]:
    """LLaMA-3.1-8B's width, and heads of 128 and 80."""
    operand, fusion = f"*{name}", elementwise.FUSION
    norm, wide = [operand] * 3 + ["i32", "fp32"], {"num_warps": 8, **fusion}
    rotate = [operand] * 6 + ["i32:16", "i32"]
    return [
        Build(elementwise._norm_kernel, norm, {"D": 4096, "BLOCK_R": 1, "BLOCK_D": 4096}, wide),
        Build(elementwise._norm_kernel, norm, {"D": 128, "BLOCK_R": 8, "BLOCK_D": 128}, fusion),
        Build(elementwise._rotate_kernel, rotate, {"HALF": 64, "BLOCK_R": 8, "BLOCK_P": 64}, fusion),
        Build(elementwise._rotate_kernel, rotate, {"HALF": 40, "BLOCK_R": 8, "BLOCK_P": 64}, fusion),
        Build(elementwise._gate_kernel, [operand] * 3 + ["i32:16"], {"BLOCK": 1024}, fusion),
    ]


# Query heads of a group, and head sizes, as they occur in published models; LLaMA-3.1-8B's first.
HEADS = [(4, 128), (1, 128), (3, 64), (5, 128), (7, 64), (7, 128), (8, 96), (16, 80)]


def cache_builds(name: str, dtype: torch.dtype, capability_major: int) -> list[Build]:
    """LLaMA-3.1-8B's heads in every type; the others' in bf16.

    A sample alone has 16 rows or fewer, too few for Hopper's wide instruction, and is bound by the bytes it
    reads; a group that shares its prefix fills 64.
    """
    size, page, splits, fusion = 128, 64, 8, paged_attention.FUSION
    operand, fp32 = f"*{name}", "*fp32"
    write = [operand] * 4 + ["*i64", "i32"]
    read = [operand] * 3 + ["*i64"] * 3 + [fp32] * 3 + ["i32"] * 6 + ["fp32"]
    written = {"K": size, "PAGE": page, "BLOCK": 1024}
    merge = {"K": size, "LOWEST": LOWEST, "BLOCK_S": splits, "BLOCK_K": size}
    processor = SimpleNamespace(**{**vars(paged_attention.EMULATED), "major": capability_major})
    found = [
        Build(paged_attention._write_kernel, write, written, fusion),
        Build(paged_attention._merge_kernel, [fp32] * 3 + [operand, "i32", "i32"], merge, fusion),
    ]
    for heads, size in HEADS if name == "bf16" else HEADS[:1]:
        # fp16 takes the instructions that bf16 takes
        for rows in (64,) if name == "fp16" else (16, 64) if heads != 4 else (16, 32, 64):
            constants, options, _ = paged_attention._tiles(dtype, rows, size, page, heads, CPU, processor)
            cores = None if dtype == torch.float32 else "wide" if rows == 64 else "any"
            whole = rows == 16 and heads == 4
            typed = [*read[:6], operand, *read[7:]] if whole else read
            constants["WHOLE"] = whole
            found.append(Build(paged_attention._read_kernel, typed, constants, options, cores))
    return found


def logprob_builds(name: str, dtype: torch.dtype, capability_major: int) -> list[Build]:
    tiles, options = split(sequence_logprob_triton._tiles(dtype, capability_major))
    operands = [f"*{name}"] * 2
    if tiles["COPY_ENGINE"]:
        blocks = ([tiles[f"BLOCK_{axis}"], tiles["BLOCK_D"]] for axis in "TV")
        operands = [f"tensordesc<{name}{block}>" for block in blocks]
    score = operands + ["*i64"] + ["*fp32"] * 3 + ["i32", "i32", "i32:16", "i32", "i32", "i32"]
    gradient = [f"*{name}", "*i64"] + ["*fp32"] * 3 + ["i32:16"]
    cores = None if dtype == torch.float32 else "wide"
    return [
        Build(sequence_logprob_triton._score_kernel, score, tiles, options, cores),
        Build(sequence_logprob_triton._gradient_kernel, gradient, *split(sequence_logprob_triton.GRADIENT)),
    ]


def split(numbers: dict) -> tuple[dict, dict]:
    """The numbers of a launch -> (the kernel's constants, Triton's options)."""
    options = {name: numbers[name] for name in ("num_warps", "num_stages") if name in numbers}
    constants = {name: number for name, number in numbers.items() if name not in options}
    return constants, options | sequence_logprob_triton.FUSION
