"""The fused log-prob against float64, and what it promises about memory, errors and gradients.

Numerics are judged relatively: the error against float64 must be no worse than that of the plain torch
way (logits in the operands' type, then fp32) plus a hair. The tests named `anywhere` run twice: here,
on the reference path, and in a process of their own under Triton's interpreter, on the kernels.
"""

import gc
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import fresh
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from gramr2 import kernels
from gramr2.kernels import reference

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAIR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Triton's interpreter is wrong in bf16; there the reference would run, and is tested by the other run.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def problem(T, D, V, dtype, seed=0, scale=1.0, ignored=0.0, device="cpu"):
    """-> hidden, weight, targets, coefficients; logits have a spread of about 3 * scale."""
    random = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(T, D, generator=random) * 3 * scale
    weight_VD = torch.randn(V, D, generator=random) * D**-0.5
    targets_T = torch.randint(V, (T,), generator=random)
    targets_T[torch.rand(T, generator=random) < ignored] = -100
    coefficients_T = torch.rand(T, generator=random) - 0.5
    hidden_TD, weight_VD = hidden_TD.to(device, dtype), weight_VD.to(device, dtype)
    return hidden_TD, weight_VD, targets_T.to(device), coefficients_T.to(device)


def with_gradients(way, hidden_TD, weight_VD, targets_T, coefficients_T):
    """-> (log-probs, d hidden, d weight) of sum of coefficient * log-prob, in float64."""
    operands = hidden_TD.detach().requires_grad_(), weight_VD.detach().requires_grad_()
    logp_T, total = way(*operands, targets_T, coefficients_T)
    gradients = torch.autograd.grad(total, operands)
    return [value.detach().double() for value in (logp_T, *gradients)]


def exactly(hidden_TD, weight_VD, targets_T, coefficients_T):
    logits_TV = hidden_TD.double() @ weight_VD.double().T
    picked_T = logits_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    logp_T = (picked_T - logits_TV.logsumexp(1)).masked_fill(targets_T == -100, 0)
    return logp_T, (logp_T * coefficients_T).sum()


def plainly(hidden_TD, weight_VD, targets_T, coefficients_T):
    logp_T, _ = reference.sequence_logprob(hidden_TD, weight_VD, targets_T)
    return logp_T, (logp_T * coefficients_T).sum()


def any_expression(hidden_TD, weight_VD, targets_T, coefficients_T):
    logp_T = kernels.sequence_logprob(hidden_TD, weight_VD, targets_T)
    return logp_T, (logp_T * coefficients_T).sum()


def weighted_sum(*arguments):
    total, logp_T = kernels.sequence_logprob_sum(*arguments)
    return logp_T, total


def assert_as_good_as_plain(way, arguments):
    """Every result's error against float64 is at most plain torch's plus a hair of the result's size."""
    hair = HAIR[arguments[0].dtype]
    truth, plain = (with_gradients(f, *arguments) for f in (exactly, plainly))
    for name, true, base, ours in zip(
        ("logp", "d hidden", "d weight"), truth, plain, with_gradients(way, *arguments), strict=True
    ):
        if true.numel():
            allowed = (base - true).abs().max() * 1.05 + hair * true.abs().max()
            assert (ours - true).abs().max() <= allowed, name


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Chunks of a few rows, so that small problems are cut too (40 kB: ten rows of 1,000 logits)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_BYTES", 40_000)
        if INTERPRETED:
            patch.setattr(triton_module(), "CHUNK_BYTES", 40_000)
        yield


def triton_module():
    return importlib.import_module("gramr2.kernels.sequence_logprob_triton")


# ------------------------------------------------------------------ on both paths: `anywhere`

SHAPES = {
    "T": st.integers(1, 150),
    "D": st.integers(1, 5).map(lambda n: 16 * n),
    "V": st.integers(1, 1100),
    "dtype": st.sampled_from(DTYPES),
    "ignored": st.sampled_from([0.0, 0.5]),
    "seed": st.integers(0, 9),
}


@pytest.mark.parametrize("way", [any_expression, weighted_sum])
@hypothesis.settings(
    max_examples=5 if INTERPRETED else 30,
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.generate] + ([] if INTERPRETED else [hypothesis.Phase.shrink]),
)
@hypothesis.given(**SHAPES)
def test_anywhere_as_exact_as_plain_torch(way, T, D, V, dtype, ignored, seed):
    """Log-probs and both gradients, at any shape: ragged rows, ragged vocabulary, ragged width."""
    assert_as_good_as_plain(way, problem(T, D, V, dtype, seed, ignored=ignored))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "V"), [(150, 80, 1337), (1, 16, 1), (1, 64, 2049)])
def test_anywhere_scoring(T, D, V, dtype):
    """Without gradients: several splits of the vocabulary merge to the exact log-prob and log-sum-exp."""
    hidden_TD, weight_VD, targets_T, _ = problem(T, D, V, dtype, ignored=0.3)
    logp_T, lse_T = kernels.sequence_logprob(hidden_TD, weight_VD, targets_T, return_lse=True)
    true_T, _ = exactly(hidden_TD, weight_VD, targets_T, targets_T)
    plain_T, _ = plainly(hidden_TD, weight_VD, targets_T, targets_T)
    error, base = (logp_T - true_T).abs().max(), (plain_T - true_T).abs().max()
    assert error <= base * 1.05 + 1e-6 * (1 + true_T.abs().max())
    true_lse_T = (hidden_TD.double() @ weight_VD.double().T).logsumexp(1)
    plain_lse_T = reference.sequence_logprob(hidden_TD, weight_VD, targets_T)[1]
    assert (lse_T - true_lse_T).abs().max() <= (plain_lse_T - true_lse_T).abs().max() * 1.05 + 1e-5
    assert logp_T.dtype == lse_T.dtype == torch.float32 and not logp_T.requires_grad
    assert (logp_T <= 0).all() and (logp_T[targets_T == -100] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_anywhere_extreme_logits(dtype):
    """Logits of +-1e4 neither overflow nor give a positive log-prob; a certain token costs exactly 0."""
    hidden_TD = torch.tensor([[1e4], [-1e4], [1e4]]).repeat_interleave(16, 1).to(dtype) / 16
    weight_VD = torch.ones(700, 16, dtype=dtype)
    weight_VD[0::2] = -1
    weight_VD[3] = 2
    targets_T = torch.tensor([3, 2, 4])
    arguments = hidden_TD, weight_VD, targets_T, torch.ones(3)
    logp_T, d_hidden_TD, d_weight_VD = with_gradients(any_expression, *arguments)
    assert logp_T[0] == 0 and (logp_T <= 0).all()
    assert d_hidden_TD.isfinite().all() and d_weight_VD.isfinite().all()
    assert_as_good_as_plain(any_expression, arguments)
    assert_as_good_as_plain(weighted_sum, arguments)


def test_anywhere_repeats_bit_for_bit():
    """A second run gives the same bits: nothing is merged in an order of arrival."""
    arguments = problem(100, 48, 700, torch.float32)  # several chunks, several splits
    for way in (any_expression, weighted_sum):
        first, second = (with_gradients(way, *arguments) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    scores = [kernels.sequence_logprob(*arguments[:3]) for _ in range(2)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("way", [any_expression, weighted_sum])
def test_anywhere_nothing_to_predict(way):
    """All targets ignored, or no tokens at all: zeros and zero gradients, not NaN and not an error."""
    hidden_TD, weight_VD, targets_T, coefficients_T = problem(20, 32, 100, torch.float32, ignored=1.1)
    for T in (20, 0):
        arguments = hidden_TD[:T], weight_VD, targets_T[:T], coefficients_T[:T]
        assert all((result == 0).all() for result in with_gradients(way, *arguments))


def test_anywhere_log_sum_exp_has_a_gradient():
    """d lse / d logits is the softmax, also in rows whose target is ignored."""
    hidden_TD, weight_VD, targets_T, c_T = problem(30, 32, 500, torch.float32, ignored=0.5)
    hidden_TD.requires_grad_()
    logp_T, lse_T = kernels.sequence_logprob(hidden_TD, weight_VD, targets_T, return_lse=True)
    (ours_TD,) = torch.autograd.grad((c_T * lse_T).sum() + logp_T.sum(), hidden_TD)
    true_lse_T = (hidden_TD.double() @ weight_VD.double().T).logsumexp(1)
    true_T, _ = exactly(hidden_TD, weight_VD, targets_T, c_T)
    (true_TD,) = torch.autograd.grad((c_T * true_lse_T).sum() + true_T.sum(), hidden_TD)
    assert torch.allclose(ours_TD, true_TD.float(), atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process with Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_anywhere_copy_engine(dtype, monkeypatch):
    """The branch for sm_90, which loads through tensor descriptors, gives the pointer branch's bits."""
    module = triton_module()
    arguments = problem(70, 48, 900, dtype)[:3]
    results = []
    for copy_engine in (False, True):
        tiles = {"BLOCK_T": 32, "BLOCK_V": 64, "BLOCK_D": 32, "COPY_ENGINE": copy_engine, "GROUP": 2}
        monkeypatch.setattr(module, "_tiles", lambda *_, tiles=tiles: tiles | {"num_warps": 4})
        results.append(kernels.sequence_logprob(*arguments))
    assert torch.equal(*results)
    assert torch.allclose(results[0], reference.sequence_logprob(*arguments)[0], atol=0.02)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter():
    """The tests above, on the Triton kernels: the variable must be set before triton is imported."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "anywhere", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# ------------------------------------------------------------------ the choice, and bad input


def test_backend_names_what_runs():
    """On this machine's CPU the reference; under the interpreter, the kernels."""
    assert kernels.backend("cpu") == ("triton" if INTERPRETED else "reference")
    assert kernels.backend("meta") == "reference"


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("hidden_TD", lambda h, w, t, c: (h[0], w, t, c)),
        ("hidden_TD", lambda h, w, t, c: (h.double(), w.double(), t, c)),
        ("weight_VD", lambda h, w, t, c: (h.bfloat16(), w, t, c)),
        ("weight_VD", lambda h, w, t, c: (h, w[:, 1:], t, c)),
        ("weight_VD", lambda h, w, t, c: (h, w.T.contiguous().T, t, c)),
        ("weight_VD", lambda h, w, t, c: (h, w[:0], t, c)),
        ("targets_T", lambda h, w, t, c: (h, w, t[1:], c)),
        ("targets_T", lambda h, w, t, c: (h, w, t.int(), c)),
        ("targets_T", lambda h, w, t, c: (h, w, t.index_fill(0, torch.tensor([4]), 50), c)),
        ("targets_T", lambda h, w, t, c: (h, w, t.index_fill(0, torch.tensor([4]), -1), c)),
        ("coefficients_T", lambda h, w, t, c: (h, w, t, c[1:])),
        ("coefficients_T", lambda h, w, t, c: (h, w, t, c.double())),
        ("coefficients_T", lambda h, w, t, c: (h, w, t, c.requires_grad_())),
    ],
)
def test_bad_arguments_are_named(argument, change):
    """One ValueError line that begins with the argument and says what was expected, before any launch."""
    arguments = change(*problem(9, 16, 50, torch.float32))
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got .*$"):
        kernels.sequence_logprob_sum(*arguments)
    if argument != "coefficients_T":
        with pytest.raises(ValueError, match=rf"^{argument}: "):
            kernels.sequence_logprob(*arguments[:3])


# ------------------------------------------------------------------ gradients where they are used


def test_scoring_computes_no_gradient(monkeypatch):
    """Under no_grad, and where nothing requires a gradient, the path of gradients is not entered."""
    training = importlib.import_module("gramr2.kernels.sequence_logprob")
    monkeypatch.setattr(training, "_gradients", lambda *_: pytest.fail("gradients were computed"))
    hidden_TD, weight_VD, targets_T, c_T = problem(30, 32, 200, torch.float32)
    kernels.sequence_logprob_sum(hidden_TD, weight_VD, targets_T, c_T)
    with torch.no_grad():
        hidden_TD.requires_grad_()
        total, logp_T = kernels.sequence_logprob_sum(hidden_TD, weight_VD, targets_T, c_T)
        assert not total.requires_grad
        assert torch.equal(logp_T, kernels.sequence_logprob(hidden_TD, weight_VD, targets_T))


@pytest.mark.parametrize("way", [any_expression, weighted_sum])
def test_frozen_operands_get_no_gradient(way):
    """A frozen head's gradient, as large as the head, is not computed; the other one is the same."""
    hidden_TD, weight_VD, targets_T, c_T = problem(30, 32, 200, torch.float32)
    _, both_TD, both_VD = with_gradients(way, hidden_TD, weight_VD, targets_T, c_T)
    _, total = way(hidden_TD.requires_grad_(), weight_VD, targets_T, c_T)
    assert torch.equal(torch.autograd.grad(total, hidden_TD)[0].double(), both_TD)
    _, total = way(hidden_TD.detach(), weight_VD.requires_grad_(), targets_T, c_T)
    assert torch.equal(torch.autograd.grad(total, weight_VD)[0].double(), both_VD)


def test_upstream_gradient_and_second_backward():
    """The gradients taken in forward are scaled by what comes from above, and outlive one backward."""
    hidden_TD, weight_VD, targets_T, c_T = problem(30, 32, 200, torch.float32)
    hidden_TD.requires_grad_()
    total, logp_T = kernels.sequence_logprob_sum(hidden_TD, weight_VD, targets_T, c_T)
    (once_TD,) = torch.autograd.grad(total, hidden_TD, retain_graph=True)
    (scaled_TD,) = torch.autograd.grad(total * 3, hidden_TD)
    assert torch.allclose(scaled_TD, 3 * once_TD, rtol=1e-6)
    assert not logp_T.requires_grad


def test_autocast_changes_nothing():
    """Inside an autocast region fp32 operands stay fp32, in forward and in backward."""
    arguments = problem(30, 32, 200, torch.float32)
    for way in (any_expression, weighted_sum):
        outside = with_gradients(way, *arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = with_gradients(way, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(outside[1:], inside[1:], strict=True))


class Tied(torch.nn.Module):
    """An embedding whose weight is the head, with the log-probs taken inside the root's forward."""

    def __init__(self, way):
        super().__init__()
        self.embed = torch.nn.Embedding(120, 32)
        self.body = torch.nn.Linear(32, 32)
        self.way = way

    def forward(self, ids_T, targets_T, coefficients_T):
        hidden_TD = self.body(self.embed(ids_T))
        return self.way(hidden_TD, self.embed.weight, targets_T, coefficients_T)[1]


def micro_batches():
    random = torch.Generator().manual_seed(1)
    for T in (11, 6):
        ids_T, targets_T = torch.randint(120, (2, T), generator=random)
        yield ids_T, targets_T, torch.rand(T, generator=random)


def accumulated(module):
    """Gradients after two micro-batches, by name."""
    for batch in micro_batches():
        module(*batch).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("way", [any_expression, weighted_sum])
def test_tied_embeddings_and_accumulation(way):
    """The head's gradient adds to the embedding's and to that of the micro-batch before."""
    torch.manual_seed(0)
    ours, plain = Tied(way), Tied(plainly)
    plain.load_state_dict(ours.state_dict())
    expected = accumulated(plain)
    for name, gradient in accumulated(ours).items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


def sharded_rank(store: str, rank: str) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    for way in (any_expression, weighted_sum):
        check_sharded(way)
    gc.collect()  # nothing that holds the group outlives it: what the interpreter's end finds may abort there
    distributed.destroy_process_group()


def check_sharded(way) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    ours, plain = Tied(way), Tied(plainly)
    plain.load_state_dict(ours.state_dict())
    expected = accumulated(plain)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(ours.body, mesh=mesh)
    fully_shard(ours, mesh=mesh)  # both ranks run the same batches: the mean over ranks is the gradient
    for name, gradient in accumulated(ours).items():
        assert torch.allclose(gradient.full_tensor(), expected[name], atol=1e-5), name
    try:
        ours.reshard()
        kernels.sequence_logprob(torch.zeros(1, 32), ours.embed.weight, torch.zeros(1, dtype=torch.long))
    except ValueError as error:
        assert str(error).startswith("weight_VD: expected a whole tensor"), error
    else:
        pytest.fail("a sharded weight was taken")


def test_sharded_by_fsdp2(tmp_path):
    """Two ranks, root sharded, tied head, two micro-batches: the gradients of one process."""
    ranks = [fresh.start(sharded_rank, str(tmp_path / "store"), str(rank)) for rank in range(2)]
    for rank in ranks:
        fresh.finish(rank)


# ------------------------------------------------------------------ memory


def kilobytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def print_peak(dtype: str, mode: str) -> None:
    """MiB that a call takes beyond what stood before."""
    torch.set_num_threads(1)
    train, T, V, D = mode == "train", 700, 151_936, 64
    kind = getattr(torch, dtype)
    weight_VD = torch.nn.Parameter(torch.empty(V, D, dtype=kind).normal_(), requires_grad=train)
    hidden_TD = torch.empty(T, D, dtype=kind).normal_()
    targets_T, coefficients_T = torch.arange(T), torch.ones(T)
    kernels.sequence_logprob_sum(hidden_TD[:1], weight_VD, targets_T[:1], coefficients_T[:1])
    before = kilobytes("VmRSS")
    total, _ = kernels.sequence_logprob_sum(hidden_TD, weight_VD, targets_T, coefficients_T)
    if train:
        total.backward()
    print((kilobytes("VmHWM") - before) / 1024)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(("dtype", "mode", "extra"), [("bfloat16", "score", 0), ("float32", "train", 37.1)])
def test_peak_memory_is_one_chunk(dtype, mode, extra):
    """152k words: the peak rises by 64 MiB of logits (all of them are 406), training's by dW besides."""
    assert float(fresh.run(print_peak, dtype, mode)) <= 64 + extra + 16


# ------------------------------------------------------------------ where there is a CUDA device


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [any_expression, weighted_sum])
def test_cuda_as_exact_as_plain_torch(way, dtype):
    """The compiled kernels, at shapes with several chunks, splits and ragged edges; bit for bit twice."""
    assert kernels.backend() == "triton"
    for T, D, V in ((1000, 256, 32_001), (129, 80, 5000), (3000, 128, 128_256)):
        arguments = problem(T, D, V, dtype, ignored=0.2, device="cuda")
        assert_as_good_as_plain(way, arguments)
        first, second = (with_gradients(way, *arguments) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@cuda
@pytest.mark.cuda
def test_cuda_scoring_takes_under_50_megabytes():
    """8,192 tokens of LLaMA-3.1-8B's head: the logits would take 2.1 GB."""
    hidden_TD = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    weight_VD = torch.randn(128_256, 4096, device="cuda", dtype=torch.bfloat16) / 64
    targets_T = torch.arange(8192, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.sequence_logprob(hidden_TD, weight_VD, targets_T)
    assert torch.cuda.max_memory_allocated() - before < 50e6
