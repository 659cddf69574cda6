"""benchmarks/scale.py: its arithmetic, against figures worked out by hand."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale

MODEL = scale.JUDGES["LLaMA-3.1-8B"]


@pytest.mark.parametrize(
    ("groups", "samples", "shared", "own", "milliseconds"),
    [(1, 1, 0, 2048, 3.55), (32, 1, 0, 2048, 5.49), (256, 1, 0, 2048, 19.5), (16, 16, 1536, 512, 8.2)],
)
def test_a_decode_step_reads_what_it_has_to(groups, samples, shared, own, milliseconds):
    """An 8B model at 2,048 tokens on 4.3 TB/s: weights once, a shared prefix once for its group."""
    seconds = scale.decode_floor(MODEL, groups, samples, shared, own, 4.3e12)
    assert 1000 * seconds == pytest.approx(milliseconds, rel=0.01)


def test_each_round_trains_on_all_data_so_far():
    """Were a round to train on its own data alone, a third of the run's cost would be missing."""
    run = scale.Run(human=10, labelled=100, unlabelled=50, proved=0.8, trusted=0.4, rounds=2)
    rows = {row.name: row for row in scale.steps(MODEL, "llama3.1-8b", run, scale.Speed())}
    trained = [rows[name].examples for name in ("initial", "round 1: train", "round 2: train")]
    assert trained == [80, 100, 120]
    assert rows["round 1: predict"].written == 50 * run.votes * run.rationale
    assert rows["round 1: predict"].read == 2 * 50 * run.prompt, "a prompt is read once for each order"
    assert rows["round 1: prove"].written == 20 * run.k * run.rationale
    # 6 operations for each weight and token, give or take attention and the prompt's unprojected tokens.
    length = run.prompt + run.rationale
    rough = 80 * length * 6 * scale.parameters(MODEL) / scale.Speed().train
    assert rows["initial"].seconds == pytest.approx(rough, rel=0.1)


def test_a_measured_speed_takes_the_stated_ones_place():
    """The page would go on stating what has long been measured."""
    results = {
        "training_cuda": {"matmul_tflops": 800, "rows": [{"of_matmul": 0.5}, {"not_run": "does not fit"}]},
        "sampling_cuda": {
            "bandwidth": 4e12,
            "rows": [{"shared": 0, "of_floor": 0.9}, {"shared": 1536, "of_floor": 0.7}],
        },
    }
    rate, measured = scale.speed(results.get)
    assert (rate.train, rate.bandwidth, rate.of_floor) == (400e12, 4e12, 0.7)
    assert measured.keys() == {"train", "bandwidth", "of_floor"}
    assert scale.speed(lambda name: None) == (scale.Speed(), {})
    page = scale.page(results.get)
    assert page.count("**measured**") == 3
    slower = dataclasses.replace(rate, train=200e12)
    rows = [scale.steps(MODEL, "llama3.1-8b", scale.Run(), each) for each in (rate, slower)]
    assert scale.hours(rows[1]) > scale.hours(rows[0])
