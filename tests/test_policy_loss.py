"""The policy's objective against its naive form in float64."""

import pytest
import torch
from checkpoints import random_model
from test_loss import compare, examples, log_p

from gramr2.extras.policy_loss import PolicyGradient, k3
from gramr2.loss import Trainee, collate
from gramr2.records import Example


@pytest.mark.parametrize("family", ["llama3", "qwen3"])  # tied, and a head of its own
def test_the_objective_is_its_naive_form_by_value_and_gradient(family):
    """Far from the policy that drew, so that tokens of either sign are clipped on either side."""
    model, reference = random_model(family, 0), random_model(family, 3)
    generator, rows = torch.Generator().manual_seed(5), []
    with torch.no_grad():
        for sign, example in zip((1.5, -0.7, 0.9, -1.1), examples(), strict=True):
            logp = torch.stack(log_p(model, example))
            old = logp + 0.5 * torch.randn(len(logp), generator=generator)
            rows.append(Example((example,), (sign,) * len(logp), tuple(old.tolist())))

    clipped = []

    def oracle(model):
        total, reference64 = 0, reference.double()
        for row in rows:
            here, there = log_p(model, row.sequences[0]), log_p(reference64, row.sequences[0])
            for advantage, old, p, q in zip(row.coefficients, row.old_logprobs, here, there, strict=True):
                ratio = torch.exp(p - old)
                kept = min(max(ratio.item(), 0.8), 1.2)
                clipped.append((advantage > 0, ratio.item() > kept, ratio.item() < kept))
                total = total - min(ratio * advantage, torch.tensor(kept * advantage, dtype=torch.float64))
                q = q.detach()
                total = total + 0.3 * (torch.exp(q - p) - (q - p) - 1)
        return total / 31

    objective = PolicyGradient(reference, 0.2, 0.3)
    compare(model, rows, objective, oracle, 1 / 31)
    assert {(True, True, False), (True, False, True), (False, True, False), (False, False, True)} <= {
        *clipped
    }
    assert objective.seen[1:] == [sum(high or low for _, high, low in clipped), 31]


def test_k3_is_the_divergence_on_average_and_nothing_where_the_models_agree():
    """Its mean under the policy is KL(policy || reference), its value never below 0."""
    p, q = (torch.randn(7, generator=torch.Generator().manual_seed(n)).log_softmax(0) for n in (1, 2))
    assert float((p.exp() * k3(p, q)).sum()) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
    assert (k3(p, q) >= 0).all()
    p.requires_grad_()
    value = k3(p, p.detach()).sum()
    value.backward()
    assert value.item() == 0 and not p.grad.any()


def test_an_empty_pack_of_a_policy_adds_nothing():
    """A rank without rollouts must still take part in every reduction."""
    model = random_model("llama3")
    objective = PolicyGradient(random_model("llama3"), 0.2, 0.1)
    value = Trainee(model, objective)(collate([], 1.0, "cpu"))
    value.backward()
    assert value.item() == 0 and objective.seen == [0.0, 0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
