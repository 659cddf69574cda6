"""Every loss against an oracle in float64 that is written out naively and shares no code with it."""

import gc
import math
import weakref

import pytest
import torch
from checkpoints import random_model

from gramr2 import loss
from gramr2.kernels.packed_attention import packed_causal
from gramr2.loss import Trainee, collate
from gramr2.records import Example, Tokens


def examples(seed: int = 0, sizes=((9, 4), (23, 2), (5, 5), (23, 20))) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(0, 300, (n,), generator=generator).tolist())  # noqa: E731
    return [Tokens(draw(prompt + target), prompt) for prompt, target in sizes]


def states_alone(model, example: Tokens) -> torch.Tensor:
    """The hidden states of one sequence by itself, with plain attention."""

    def attend(layer, q_THK, k_TGK, v_TGK):
        groups = q_THK.shape[1] // k_TGK.shape[1]
        k_THK, v_THK = (x.repeat_interleave(groups, 1) for x in (k_TGK, v_TGK))
        scores_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK) / math.sqrt(q_THK.shape[-1])
        future = torch.ones(len(q_THK), len(q_THK)).triu(1).bool()
        return torch.einsum("hts,shk->thk", scores_HTT.masked_fill(future, -math.inf).softmax(-1), v_THK)

    return model(torch.tensor(example.ids), torch.arange(len(example.ids)), attend)


def log_p(model, example: Tokens) -> list[torch.Tensor]:
    """log p of each target token, one after the other."""
    states = states_alone(model, example)
    values = []
    for place in range(example.start, len(example.ids)):
        logits = model.head_weight @ states[place - 1]
        values.append(logits[example.ids[place]] - torch.log(torch.exp(logits).sum()))
    return values


def compare(model, rows, objective, oracle, scale: float) -> None:
    """Value, and the gradient of every weight."""
    mine = Trainee(model, objective)
    value = mine(collate(rows, scale, "cpu"))
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.double()
    expected = oracle(model)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=2e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (gradients[name].double() - parameter.grad).norm() / parameter.grad.norm().clamp_min(
                1e-12
            )
            assert error < 1e-4, (name, error)


@pytest.mark.parametrize("family", ["llama3", "qwen3"])  # tied, and a head of its own
def test_likelihood_of_a_pack_is_the_sum_over_its_sequences_alone(family):
    """Equations 1, 2 and 4: prompt tokens do not count, sequences do not see each other."""
    rows = [Example((example,)) for example in examples()]
    units = sum(row.units for row in rows)

    def oracle(model):
        return -sum(sum(log_p(model, row.sequences[0])) for row in rows) / units

    compare(random_model(family), rows, loss.negative_log_likelihood, oracle, 1 / units)


def test_per_token_coefficients_weigh_the_tokens_they_stand_for():
    """What a policy gradient trains with; a shift by one token would not show in a plain mean."""
    rows = []
    for n, example in enumerate(examples()):
        count = len(example.ids) - example.start
        rows.append(Example((example,), coefficients=tuple((k - 1.5) * (n + 1) for k in range(count))))

    def oracle(model):
        pairs = [zip(row.coefficients, log_p(model, row.sequences[0]), strict=True) for row in rows]
        return -sum(c * value for row in pairs for c, value in row)

    compare(random_model("llama3"), rows, loss.negative_log_likelihood, oracle, 1.0)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_smoothed_label_gives_the_other_letter_its_share(smoothing):
    """GRAM: the wrong letter gets `smoothing` itself, not half of it; the frame's tokens stay as they are."""
    rows = [Example((e,), other_letter=(e.start + 1, (e.ids[e.start + 1] + 7) % 300)) for e in examples()]

    def oracle(model):
        total = 0
        for row in rows:
            example, (place, other) = row.sequences[0], row.other_letter
            values = log_p(model, example)
            total = total - sum(values[:1]) - sum(values[2:])
            logp = (model.head_weight @ states_alone(model, example)[place - 1]).log_softmax(0)
            total = total - (1 - smoothing) * logp[example.ids[place]] - smoothing * logp[other]
        return total / 31

    compare(random_model("qwen2"), rows, loss.smoothed_label(smoothing), oracle, 1 / 31)


def test_preference_is_bradley_terry_on_the_last_tokens_with_its_margin():
    """A sign or an order exchanged trains the opposite; a score read elsewhere trains noise."""
    sequences = [Tokens(e.ids, len(e.ids)) for e in examples()]
    rows = [Example(tuple(sequences[:2]), margin=0.0), Example(tuple(sequences[2:]), margin=1.5)]

    def oracle(model):
        r = [(model.score.weight @ states_alone(model, s)[-1]).squeeze() for s in sequences]
        gaps = [r[0] - r[1], r[2] - r[3] - 1.5]
        return -sum(torch.log(1 / (1 + torch.exp(-gap))) for gap in gaps) / 2

    compare(random_model("qwen3", num_labels=1), rows, loss.preference, oracle, 1 / 2)


@pytest.mark.parametrize(
    "objective", [loss.negative_log_likelihood, loss.smoothed_label(0.1), loss.preference]
)
def test_an_empty_pack_adds_nothing_and_has_a_gradient(objective):
    """Ranks with nothing left must still take part in every reduction."""
    model = random_model("llama3", num_labels=int(objective is loss.preference))
    value = Trainee(model, objective)(collate([], 1.0, "cpu"))
    value.backward()
    assert value.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_trained_model_goes_with_its_training():
    """In a circle it would stay, with all its weights, beside the model that samples next."""
    trainee = Trainee(random_model("llama3"), loss.negative_log_likelihood)
    trainee(collate([Example((each,)) for each in examples()], 1.0, "cpu")).backward()
    decoder = weakref.ref(trainee.decoder)
    gc.disable()
    try:
        del trainee
        assert decoder() is None
    finally:
        gc.enable()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
@pytest.mark.parametrize("size", [64, 128])
def test_the_devices_attention_is_the_one_by_lengths(size):
    """Grouped heads in a ragged pack, value and gradients: what every bf16 step on a GPU runs."""
    lengths, generator = [7, 1, 130, 7], torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, size) for heads in (8, 2, 2, 8)]
    *qkv, weight = (torch.randn(shape, generator=generator) for shape in shapes)

    def results(device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in qkv]
        out = packed_causal(lengths, device)(0, *leaves)
        (out * weight.to(device, dtype)).sum().backward()
        return [x.float().cpu() for x in (out.detach(), *(leaf.grad for leaf in leaves))]

    for mine, exact in zip(results("cuda", torch.bfloat16), results("cpu", torch.float32), strict=True):
        assert (mine - exact).norm() / exact.norm() < 0.02
