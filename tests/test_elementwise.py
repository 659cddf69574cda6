"""What stands between the decoder's matmuls: the kernels beside the plain operations, and who runs which."""

from __future__ import annotations

import fresh
import pytest
import torch
from checkpoints import random_model

from gramr2 import kernels
from gramr2.kernels import reference
from gramr2.model import rope_tables

# Tokens, query heads, key/value heads, head size, widths of the model and of the MLP
SHAPES = [(3, 4, 2, 8, 24, 48), (1, 9, 3, 64, 576, 1536), (5, 2, 1, 80, 130, 1030)]


def operands(shape, dtype, device="cpu"):
    torch.manual_seed(shape[0])
    tokens, heads, groups, size, width, inner = shape
    shapes = (tokens, width), (width,), (tokens, heads, size), (tokens, groups, size), (2, tokens, inner)
    x_TD, weight_D, q_THK, k_TGK, gate_and_up = (torch.randn(s).to(dtype).to(device) for s in shapes)
    angle_T1P = torch.arange(tokens)[:, None, None] * torch.rand(size // 2)
    cos, sin = angle_T1P.cos(), angle_T1P.sin()
    rope = (torch.cat(halves, -1).to(dtype).to(device) for halves in ((cos, cos), (-sin, sin)))
    return (3 * x_TD, weight_D, 1e-5), (q_THK, k_TGK, *rope), tuple(3 * gate_and_up)


def check(implementation, dtype, device="cpu"):
    """Within one step of the type's own: sums and exponentials are rounded in another order."""
    step = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    for shape in SHAPES:
        norm, rotation, gate = operands(shape, dtype, device)
        for name, arguments in ("rms_norm", norm), ("rotate", rotation), ("silu_product", gate):
            got, wanted = (getattr(each, name)(*arguments) for each in (implementation, reference))
            torch.testing.assert_close(got, wanted, atol=step / 2**10, rtol=step)
        q_THK, k_TGK, cos, sin = rotation
        for x, y in zip(implementation.rotate(*rotation), (q_THK, k_TGK), strict=True):
            wanted = y.double() * cos.double() + y.double().roll(shape[3] // 2, -1) * sin.double()
            torch.testing.assert_close(x.double(), wanted, atol=4 * step, rtol=2 * step)


def test_a_cpu_that_samples_computes_the_same_in_fewer_operations():
    """Bit for bit: an older version's samples are to come out again."""
    with torch.inference_mode():
        for shape in SHAPES:
            for name, arguments in zip(
                ("rms_norm", "rotate", "silu_product"), operands(shape, torch.float32), strict=True
            ):
                got, wanted = (getattr(each, name)(*arguments) for each in (kernels, reference))
                assert all(map(torch.equal, got, wanted)), name


def interpreted():
    from gramr2.kernels import elementwise

    for dtype in torch.float32, torch.float16:
        check(elementwise, dtype)


def test_the_kernels_agree_with_the_plain_operations_in_the_interpreter():
    pytest.importorskip("triton")
    fresh.run(interpreted, TRITON_INTERPRET="1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_agree_with_the_plain_operations_on_the_device(dtype):
    with torch.no_grad():
        check(kernels, dtype, device="cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
def test_where_gradients_are_asked_for_torchs_operations_run():
    norm, _, _ = operands(SHAPES[1], torch.bfloat16, "cuda")
    x_TD, weight_D, eps = norm
    weight_D.requires_grad_()
    kernels.rms_norm(x_TD, weight_D, eps).float().sum().backward()
    assert weight_D.grad is not None and weight_D.grad.any()
    with torch.no_grad():
        assert not kernels.rms_norm(x_TD, weight_D, eps).requires_grad


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_a_block_that_trains_is_compiled_in_one_graph(family):
    """Whoever chooses between two ways must not stand in the way of torch.compile."""
    model = random_model(family).train()
    positions = torch.arange(6)
    rope = rope_tables(model.config, positions, torch.float32)

    def attend(layer, q_THK, k_TGK, v_TGK):
        return q_THK + (k_TGK + v_TGK).repeat_interleave(q_THK.shape[1] // k_TGK.shape[1], dim=1)

    x_TD = torch.randn(6, model.config.hidden_size, requires_grad=True)
    block = model.blocks[0]
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_TD, rope, 0, attend), block(x_TD, rope, 0, attend), atol=0, rtol=0)
    compiled(x_TD, rope, 0, attend).sum().backward()
    assert x_TD.grad is not None and block.mlp_norm.weight.grad is not None
