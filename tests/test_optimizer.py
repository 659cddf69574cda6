"""AdamW with bfloat16 moments: right on average, the same on any ranks, resumed to the bit."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from trainings import curve, distance, drive, job, make, same_bits

from gramr2 import optimizer
from gramr2.settings import TrainSettings

HALF = TrainSettings(optimizer_dtype="bfloat16", lr=1e-2, weight_decay=0.1, beta2=0.999)


def nearest(values, noise):
    """What rounds every time alike."""
    return values.to(torch.bfloat16)


def trained(settings: TrainSettings, device: str = "cpu", steps: int = 400):
    """A matrix after gradients that become a hundred times smaller, and its second moment."""
    weight = nn.Parameter(torch.ones(4, 1000, device=device))
    adam = optimizer.make_optimizer([weight], settings)
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        scale = 1.0 if step < steps // 2 else 0.01
        weight.grad = scale * (1 + 0.3 * torch.randn(weight.shape, generator=draw)).to(device)
        adam.step()
    return weight.detach(), adam.state[weight]["exp_avg_sq"].float()


def test_moments_in_bfloat16_follow_float32_where_rounding_to_nearest_stalls(monkeypatch, device="cpu"):
    """With beta2 0.999 a gradient that shrinks leaves the second moment where it was, for ever, when each
    step of a thousandth is rounded away; and the size of an update with it."""
    exact, moment = trained(replace(HALF, optimizer_dtype="float32"), device)
    ours, rounded = trained(HALF, device)
    assert rounded.mean() == pytest.approx(float(moment.mean()), rel=0.01)
    assert (ours - exact).norm() < 0.005 * (exact - 1).norm()
    monkeypatch.setattr(optimizer, "rounded", nearest)
    _, stalled = trained(HALF, device)
    assert abs(float(stalled.mean() / moment.mean()) - 1) > 0.2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
def test_so_they_do_on_a_gpu(monkeypatch):
    """Its generator is another, and so is its arithmetic on 32 bits."""
    test_moments_in_bfloat16_follow_float32_where_rounding_to_nearest_stalls(monkeypatch, "cuda")


def test_a_number_is_rounded_to_its_neighbours_and_on_average_to_itself():
    """A biased or a clumsy carry would move every moment the same way at each step."""
    values = torch.tensor([1.001, -1.001, 3.0, 1e-30, -7e-41, 0.0, 255.9, 1e38])
    for value in values:
        noise = torch.arange(1 << 16, dtype=torch.int32)
        found = optimizer.rounded(value.expand(len(noise)).contiguous(), noise).double()
        assert len(found.unique()) <= 2 and found.mean().item() == pytest.approx(value.item(), rel=1e-7)
    assert math.isinf(optimizer.rounded(torch.tensor([math.inf]), noise[-1:]).item())


def test_noise_is_a_function_of_seed_update_parameter_and_place(monkeypatch):
    """Blocks are cut by the whole tensor, so that whoever holds some rows draws what all the rows get."""
    monkeypatch.setattr(optimizer, "BLOCK", 64)
    weight = torch.zeros(37, 10)
    whole = torch.cat([noise for _, noise in optimizer.blocks(weight, "0 1 0")])
    assert whole.shape == weight.shape and len(whole.unique()) == 370
    for start, stop in ((0, 13), (13, 26), (26, 37), (37, 37)):
        monkeypatch.setattr(optimizer, "own_rows", lambda _, start=start, stop=stop: (start, stop))
        mine = [*optimizer.blocks(weight, "0 1 0")]
        assert torch.equal(torch.cat([whole[:0], *(noise for _, noise in mine)]), whole[start:stop])
        assert [row for rows, _ in mine for row in range(stop)[rows]] == [*range(stop - start)]
    monkeypatch.undo()
    (_, other), *_ = optimizer.blocks(weight, "0 2 0")
    assert not torch.equal(other, whole)


def test_resumed_or_on_two_ranks_a_run_ends_alike_and_its_points_hold_bfloat16(tmp_path):
    """Level 1 for a run that is killed and resumed; over ranks what float32 promises, and from one to two.
    Noise from a generator that is carried along, or that each rank has, would end elsewhere."""
    model, data = make(tmp_path)
    config = {"steps": 8, "save_steps": 2, "optimizer_dtype": "bfloat16"}
    runs = [
        ("whole", 1, {}),
        ("again", 1, {}),
        ("seed", 1, {"seed": 1}),
        ("two", 2, {}),
        ("hybrid", 4, {"fsdp_size": 2}),
    ]
    jobs = [job(tmp_path / name, model, data, config=config | more, ranks=n) for name, n, more in runs]
    kill = ["after", 4]
    jobs.append(job(tmp_path / "cut", model, data, config=config, kill=kill))
    jobs.append(job(tmp_path / "moved", model, data, config=config, stop_at=3))
    results = drive(jobs)
    assert [each["statuses"][0] for each in results] == [0] * 5 + [-9, 130], results
    point = sorted((tmp_path / "moved/resume").glob("step-*"))[-1] / "rank-0.safetensors"
    with safe_open(point, framework="pt") as stored:
        kinds = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    assert {kind for name, kind in kinds.items() if name.startswith("exp_avg")} == {"BF16"}
    assert {kind for name, kind in kinds.items() if name.startswith("weight")} == {"F32"}
    rest = [
        job(tmp_path / "cut", model, data, config=config),
        job(tmp_path / "moved", model, data, config=config, ranks=2),
    ]
    assert [each["statuses"][0] for each in drive(rest)] == [0, 0]
    for name in ("again", "cut"):
        assert same_bits(tmp_path / "whole", tmp_path / name), name
    assert not same_bits(tmp_path / "whole", tmp_path / "seed")
    for name in ("two", "hybrid", "moved"):
        assert curve(tmp_path / name) == pytest.approx(curve(tmp_path / "whole"), abs=1e-3), name
        assert distance(tmp_path / "whole", tmp_path / name) < 1e-4, name
