"""The paged cache's kernels against the oracle in float64: on a CPU, in Triton's interpreter, on a device."""

from __future__ import annotations

import fresh
import pytest
import torch

from gramr2 import kernels
from gramr2.kernels import paged_attention_cpu, reference

BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def case(dtype, heads, groups, size, page, device="cpu"):
    """Rows 0-4 share a prefix unevenly and have own pages, 5 has own pages only, 6 and 7 are padding."""
    torch.manual_seed(size + page)
    pool = torch.randn(2, 40, groups, page, size, dtype=torch.float32)
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
    reads = [kernels.Reads(*(array.to(device) for array in part.arrays())) for part in (prefix, own)]
    return q_THK.to(device), *pool.to(device), reads


# H, G, K, P: a page is a tile, or a tile reaches beyond its end, or it has several tiles
SHAPES = [(4, 2, 8, 16), (6, 2, 40, 16), (3, 3, 64, 4), (8, 1, 128, 64), (14, 2, 64, 48), (5, 1, 80, 128)]


def exact(q_THK, keys_NGPK, values_NGPK, reads):
    on_cpu = [kernels.Reads(*(array.cpu() for array in part.arrays())) for part in reads]
    return reference.attend_pages(*(x.cpu().double() for x in (q_THK, keys_NGPK, values_NGPK)), on_cpu)


def check(implementation, dtype, shape, device="cpu"):
    """Also: keys beyond what is visible are not looked at, and a prefix is the same for all its readers."""
    q_THK, keys, values, reads = case(dtype, *shape, device)
    rows_IJ, visible_IJ, pages_IM = reads[1].arrays()
    # What one split has all of needs no merge.
    one_page = kernels.Reads(rows_IJ, visible_IJ.clamp(max=shape[3]), pages_IM[:, :1].contiguous())
    for each in reads, [one_page]:
        got = implementation.attend_pages(q_THK, keys, values, each).cpu()
        wanted = exact(q_THK, keys, values, each)
        torch.testing.assert_close(got.double(), wanted, atol=BOUND[dtype], rtol=BOUND[dtype])
    k_TGK, v_TGK = torch.randn(2, 5, shape[1], shape[2], device=device).to(dtype)
    places_U = torch.tensor([7, 0, 3 * shape[3] + 1], device=device)
    expected = keys.clone(), values.clone()
    for token, place in enumerate(places_U.tolist()):
        for pool, x in zip(expected, (k_TGK, v_TGK), strict=True):
            pool[place // shape[3], :, place % shape[3]] = x[token]
    implementation.write_kv(k_TGK, v_TGK, keys, values, places_U)
    for pool, want in zip((keys, values), expected, strict=True):
        torch.testing.assert_close(pool, want, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_oracle_is_attention_over_the_listed_keys(shape):
    """Row by row beside torch's own; a row that sees nothing gives 0."""
    q_THK, keys, values, (prefix, own) = case(torch.float32, *shape)
    got = reference.attend_pages(q_THK, keys, values, [prefix, own])
    for row, item, first_pages in (0, 0, 5), (4, 1, 2), (5, None, 0):
        pages = [] if item is None else prefix.pages_IM[item, :first_pages].tolist()
        seen = len(pages) * shape[3] + int(own.visible_IJ[row, 0])
        pages += own.pages_IM[row].tolist()
        k_WGK, v_WGK = (pool[pages].transpose(1, 2).flatten(0, 1)[:seen] for pool in (keys, values))
        q_1H1K, k_1GWK, v_1GWK = (x.transpose(0, 1)[None] for x in (q_THK[row : row + 1], k_WGK, v_WGK))
        wanted = torch.nn.functional.scaled_dot_product_attention(q_1H1K, k_1GWK, v_1GWK, enable_gqa=True)
        torch.testing.assert_close(got[row], wanted[0, :, 0], atol=2e-6, rtol=2e-6)
    assert not got[6:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_cpus_way_is_the_oracles(shape, dtype):
    # NaN in the page behind the last visible key is not for this way, whose owner clears pages.
    operands = q_THK, keys, values, reads = case(dtype, *shape)
    keys[40] = values[40] = 0
    got = paged_attention_cpu.attend_pages(q_THK, keys, values, reads)
    torch.testing.assert_close(got.double(), exact(*operands), atol=BOUND[dtype], rtol=BOUND[dtype])


def test_reads_that_moved_by_a_key_see_it():
    """Their layout is kept from step to step, and only the mask follows: else the newest token is hidden."""
    q_THK, keys, values, (prefix, own) = case(torch.float32, *SHAPES[0])
    keys[40] = values[40] = 0
    paged_attention_cpu.attend_pages(q_THK, keys, values, [prefix, own])
    kept, later = own.layout, (own.visible_IJ + 3).clamp(max=3 * SHAPES[0][3])
    own.move(later)
    got = paged_attention_cpu.attend_pages(q_THK, keys, values, [prefix, own])
    anew = [prefix, kernels.Reads(own.rows_IJ, later, own.pages_IM)]
    assert own.layout is kept and got.equal(paged_attention_cpu.attend_pages(q_THK, keys, values, anew))


def interpreted():
    from gramr2.kernels import paged_attention

    for shape in SHAPES:
        for dtype in torch.float32, torch.float16:
            check(paged_attention, dtype, shape)


def test_the_kernels_agree_with_the_oracle_in_the_interpreter():
    """Triton reads its switch when a kernel is defined: a process of its own."""
    pytest.importorskip("triton")
    fresh.run(interpreted, TRITON_INTERPRET="1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_agree_with_the_oracle_on_the_device(dtype):
    for shape in SHAPES:
        check(kernels, dtype, shape, device="cuda")
