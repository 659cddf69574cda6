"""The paged cache's kernels: against float64 in Triton's interpreter, in torch, and compiled for sm_90.

Triton reads TRITON_INTERPRET when a kernel is defined, so each way runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import reference

ROOT = Path(__file__).parents[1]


def exact(q_THK, keys_NPGK, values_NPGK, reads):
    """Attention in float64, query by query and key by key, as the tables say."""
    out = torch.zeros(q_THK.shape, dtype=torch.float64)
    _, page, groups, size = keys_NPGK.shape
    heads = q_THK.shape[1]
    for row in range(len(q_THK)):
        for head in range(heads):
            places = []
            for batch in reads:
                for item, rows in enumerate(batch.rows_IJ.tolist()):
                    for member, token in enumerate(rows):
                        if token == row:
                            seen = range(int(batch.visible_IJ[item, member]))
                            places += [(int(batch.pages_IM[item, p // page]), p % page) for p in seen]
            if places:
                group = head // (heads // groups)
                k = torch.stack([keys_NPGK[n, p, group].double() for n, p in places])
                v = torch.stack([values_NPGK[n, p, group].double() for n, p in places])
                out[row, head] = (k @ q_THK[row, head].double() * size**-0.5).softmax(0) @ v
    return out


def case(dtype, heads, groups, size, page, device="cpu"):
    """Rows 0-4 share a prefix unevenly and have own pages, 5 has own pages only, 6 and 7 are padding."""
    torch.manual_seed(size + page)
    pool = torch.randn(2, 40, page, groups, size, dtype=torch.float32)
    poison = torch.full_like(pool[:, :1], torch.nan)
    pool = torch.cat([pool, poison], dim=1).to(dtype)  # page 40 is never visible, and is NaN
    q_THK = torch.randn(8, heads, size).to(dtype)
    order = torch.randperm(39) + 1
    prefix = kernels.Reads(
        torch.tensor([[0, 1, 2], [3, 4, -1]]),
        torch.tensor([[5 * page] * 3, [2 * page] * 3]),
        order[:10].view(2, 5),
    )
    own_IM = torch.cat([order[10:28].view(6, 3), torch.full((6, 1), 40)], dim=1)
    own = kernels.Reads(
        torch.arange(6)[:, None], torch.tensor([1, 3, page, page + 1, 2, 3 * page])[:, None], own_IM
    )
    reads = [kernels.Reads(*(getattr(b, f).to(device) for f in ("rows_IJ", "visible_IJ", "pages_IM")))
             for b in (prefix, own)]  # fmt: skip
    return q_THK.to(device), *pool.to(device), reads


SHAPES = [(4, 2, 8, 16), (6, 2, 40, 16), (3, 3, 64, 4), (8, 1, 128, 64)]


def check(implementation, dtype, shape, device="cpu"):
    q_THK, keys, values, reads = case(dtype, *shape, device)
    wanted = exact(*(x.cpu() for x in (q_THK, keys, values)), case(dtype, *shape)[-1])
    got = implementation.attend_pages(q_THK, keys, values, reads).cpu()
    bound = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got.double(), wanted, atol=bound, rtol=bound)
    k_TGK, v_TGK = torch.randn(2, 5, *keys.shape[2:], device=device).to(dtype)
    slots = torch.tensor([7, 0, 3 * shape[3] + 1], device=device)
    expected = keys.clone(), values.clone()
    for token, slot in enumerate(slots.tolist()):
        for pool, x in zip(expected, (k_TGK, v_TGK), strict=True):
            pool[slot // shape[3], slot % shape[3]] = x[token]
    implementation.write_kv(k_TGK, v_TGK, keys, values, slots)
    for pool, want in zip((keys, values), expected, strict=True):
        torch.testing.assert_close(pool, want, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_torch_way_is_the_softmax_over_the_listed_keys(shape, dtype):
    # NaN in the page behind the last visible key is not for the torch way, whose owner clears pages.
    q_THK, keys, values, reads = case(dtype, *shape)
    keys[40] = values[40] = 0
    wanted = exact(q_THK, keys, values, reads)
    got = reference.attend_pages(q_THK, keys, values, reads)
    bound = 2e-6 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(got.double(), wanted, atol=bound, rtol=bound)


def run(code: str, **environment) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def test_the_kernels_agree_with_float64_in_the_interpreter():
    """Also: keys beyond what is visible are not looked at, and a prefix is the same for all its readers."""
    pytest.importorskip("triton")
    code = """
import torch, test_paged_attention as t
from kernels import paged_attention
for shape in t.SHAPES:
    for dtype in torch.float32, torch.float16:
        t.check(paged_attention, dtype, shape)
"""
    run(code, TRITON_INTERPRET="1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_agree_with_float64_on_the_device(dtype):
    for shape in SHAPES:
        check(kernels, dtype, shape, device="cuda")
