"""Ranks and accumulation change rounding and nothing else; one rank's death ends all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import fresh
import pytest
from trainings import curve, distance, drive, job, make

from gramr2.commands import train
from gramr2.files import exit_status

ROOT = Path(__file__).parents[1]


def test_one_sgd_step_is_the_same_on_1_2_and_3_ranks_and_in_one_pack_or_four(tmp_path):
    """Level 2, 1e-5 of each tensor's norm. A mean of means, a lost pack or a wrong divisor breaks it."""
    model, data = make(tmp_path, 21)
    one_step = {"batch_size": 21, "steps": 1, "save_steps": 0, "clip": 0.0}
    whole, split = one_step | {"token_budget": 8000}, one_step | {"token_budget": 1500, "max_length": 1400}
    shapes = [(1, whole), (1, split), (2, split), (3, whole)]
    jobs = [
        job(tmp_path / f"out{n}", model, data, config=config, ranks=ranks, sgd=True)
        for n, (ranks, config) in enumerate(shapes)
    ]
    for result in drive(jobs):
        assert set(result["statuses"]) == {0}, result
    assert [distance(tmp_path / "out0", tmp_path / f"out{n}") for n in range(1, 4)] == pytest.approx(
        [0] * 3, abs=1e-5
    )
    (tmp_path / "begin").mkdir()
    (tmp_path / "begin" / "model").symlink_to(model)
    assert distance(tmp_path / "out0", tmp_path / "begin") > 1e-3  # the step was one


def test_adamw_curves_agree_over_ranks_with_recomputation_hybrid_sharding_and_tied_or_free_heads(tmp_path):
    """Level 2, 1e-4 over 8 steps; what FSDP wraps must train as what it does not wrap."""
    model, data = make(tmp_path, 48, "llama3")  # tied
    settings = {"steps": 8, "save_steps": 0, "token_budget": 1500}
    shapes = {
        "one": (1, {}),
        "two": (2, {"recompute": 99}),
        "hybrid": (4, {"fsdp_size": 2}),
        "half": (2, {"dtype": "bfloat16"}),
        "half-one": (1, {"dtype": "bfloat16"}),
    }
    (tmp_path / "free").mkdir()
    other, _ = make(tmp_path / "free", 2, "qwen3")  # a head of its own, biases none, norms on q and k
    jobs = [
        job(tmp_path / name, model, data, "prover", settings | extra, ranks=ranks)
        for name, (ranks, extra) in shapes.items()
    ]
    scores = {"max_length": 1400}
    for name, ranks in (("score-1", 1), ("score-2", 2)):
        jobs.append(job(tmp_path / name, other, data, "discriminative", settings | scores, ranks=ranks))
    for result in drive(jobs):
        assert set(result["statuses"]) == {0}, result
    for name in ("two", "hybrid"):
        assert curve(tmp_path / name) == pytest.approx(curve(tmp_path / "one"), abs=1e-4)
    # What a GPU computes in: only near, and its coefficients must not be rounded with the activations.
    assert curve(tmp_path / "half") == pytest.approx(curve(tmp_path / "one"), abs=0.1)
    # Masters beside a copy are no other arithmetic than FSDP's casts.
    assert curve(tmp_path / "half-one") == pytest.approx(curve(tmp_path / "half"), abs=0.02)
    assert curve(tmp_path / "score-2") == pytest.approx(curve(tmp_path / "score-1"), abs=1e-4)


def test_a_run_on_two_ranks_continues_on_one_and_on_three(tmp_path):
    """Level 2; a resume point that remembers its number of ranks could not. In bfloat16 the one rank has
    masters, of which the two know nothing: where it went on from the copies, it would be 1e-3 off at once."""
    model, data = make(tmp_path)
    settings = {"steps": 8, "save_steps": 2}
    half = settings | {"dtype": "bfloat16", "lr": 1e-5}
    ways = {"to1": (settings, 2, 1), "to3": (settings, 2, 3), "half": (half, 2, 1), "half2": (half, 1, 2)}
    wholes = [job(tmp_path / "whole", model, data, config=settings, ranks=2)]
    wholes += [job(tmp_path / "whole-half", model, data, config=half, ranks=2)]
    cut = [job(tmp_path / to, model, data, config=c, ranks=n, stop_at=3) for to, (c, n, _) in ways.items()]
    rest = [job(tmp_path / to, model, data, config=c, ranks=n) for to, (c, _, n) in ways.items()]
    results = drive([*wholes, *cut, *rest])
    statuses = [result["statuses"][0] for result in results]
    assert statuses == [0, 0, 130, 130, 130, 130, 0, 0, 0, 0], results
    for to in ("to1", "to3"):
        assert curve(tmp_path / to) == pytest.approx(curve(tmp_path / "whole"), abs=1e-4)
        assert distance(tmp_path / "whole", tmp_path / to) < 1e-3
    for to in ("half", "half2"):
        assert curve(tmp_path / to) == pytest.approx(curve(tmp_path / "whole-half"), abs=0.02)
        assert distance(tmp_path / "whole-half", tmp_path / to) < 1e-4


def test_one_rank_dying_ends_all_within_a_minute(tmp_path):
    """A rank that waits for ever holds a node."""
    model, data = make(tmp_path)
    died = drive([job(tmp_path / "out", model, data, ranks=3, die_at=[1, 3])])[0]
    assert died["statuses"][1] == -9 and 0 not in died["statuses"] and died["seconds"] < 60


def test_torchrun_trains_and_says_where_the_model_is(tmp_path):
    """The command line of the documentation, on two ranks."""
    model, data = make(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\nbatch_size = 8\nmax_length = 700\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py")]
    command += ["--recipe", str(recipe), "--model", str(model), "--data", str(data), "--stage", "generative"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--steps", "3"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "model: runs/train-generative/model"
    assert "generative (equation 1" in done.stderr and "parameters" in done.stderr


def test_bad_input_is_said_by_the_first_rank_alone(monkeypatch, capsys):
    """Every rank meets it."""
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert exit_status(train.main, ["--stage", "reward", "--token-budget", "100"]) == 2
    assert capsys.readouterr().err.count("error: token_budget") == 1


def train_on_two_ranks(place: str, *words: str) -> None:
    """What train.py says goes to log.0 and log.1; prints the two exit statuses."""
    os.chdir(place)

    def command(rank: int) -> int:
        for descriptor in (1, 2):
            os.dup2(os.open(f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        return exit_status(train.main, list(words))

    print(json.dumps(forks.exits(forks.fork_ranks(command, 2))))


def test_a_network_that_is_not_there_is_one_line_and_status_2(tmp_path, monkeypatch):
    """Where a node calls its network by another name, every rank ended in a traceback."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    words = ["--stage", "prover", "--recipe", str(ROOT / "recipes/micro.toml")]
    assert json.loads(fresh.run(train_on_two_ranks, str(tmp_path), *words)) == [2, 2]
    logs = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert "error: the ranks do not reach each other" in logs[0] and "nowhere0" in logs[0]
    assert "Traceback" not in logs[0] + logs[1]


def test_a_toy_world_that_is_refused_is_one_line_and_status_2_on_every_rank(tmp_path):
    """The first rank alone makes it; another that waits for it would see a connection that breaks."""
    (tmp_path / "recipe.toml").write_text('[world]\ndirectory = "world"\n')
    (tmp_path / "world").mkdir()
    (tmp_path / "world/world.json").write_text('{"seed": 7}')
    words = ["--stage", "prover", "--recipe", "recipe.toml"]
    assert json.loads(fresh.run(train_on_two_ranks, str(tmp_path), *words)) == [2, 2]
    logs = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert "a world of another seed or size" in logs[0] and logs[0].count("\n") == 1 and not logs[1]


def test_an_out_that_cannot_be_written_is_one_line_and_status_2_on_every_rank(tmp_path):
    model, data = make(tmp_path)
    (tmp_path / "file").touch()
    words = ["--stage", "reward", "--model", str(model), "--data", str(data), "--out", "file/out"]
    assert json.loads(fresh.run(train_on_two_ranks, str(tmp_path), *words)) == [2, 2]
    logs = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert "error: file/out: " in logs[0] and "mend that" in logs[0].splitlines()[-1] and not logs[1]


def test_the_plan_of_a_policy_is_printed_by_the_first_rank_alone(tmp_path):
    words = ["--stage", "policy", "--dry-run"]
    assert json.loads(fresh.run(train_on_two_ranks, str(tmp_path), *words)) == [0, 0]
    logs = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert "none yet; it would be made" in logs[0] and not logs[1]


def test_compiled_blocks_train_the_same(tmp_path):
    """Level 2, 1e-4; attention is an argument that changes from pack to pack, and must neither recompile nor
    break a block's graph (which the trainer asks for whole)."""
    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("torch.compile finds no C++ compiler here")
    model, data = make(tmp_path)
    settings = {"steps": 4, "save_steps": 0, "token_budget": 1500}
    jobs = [job(tmp_path / "plain", model, data, config=settings)]
    for again in (0, 1):
        config = settings | {"compile": True, "recompute": again}
        jobs.append(job(tmp_path / f"compiled{again}", model, data, config=config))
    for result in drive(jobs):
        assert result["statuses"] == [0], result
        assert "recompile_limit" not in result["log"]
    for again in (0, 1):
        assert curve(tmp_path / f"compiled{again}") == pytest.approx(curve(tmp_path / "plain"), abs=1e-4)
