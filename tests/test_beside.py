"""The second process of a self-training run: same results, errors that are heard, and an end with the first;
and how the commands' threads wait."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from selfruns import ROOT, same_results

LONG = "\n[train.discriminative]\nsteps = {}\n"  # a baseline that goes on for long enough to be met


def steps(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "runs/small/steps").iterdir())


def test_results_and_the_numbers_of_steps_are_those_of_one_process(forks, small, tmp_path):
    """A kill in between leaves unnumbered steps of the second process, which the next start takes up."""
    one, two = tmp_path / "one", tmp_path / "two"
    for place in (one, two):
        place.mkdir()
    alone = forks.run(one, ["--recipe", small])
    assert alone["statuses"] == [0] and "second process" not in alone["logs"][0]
    words = ["--recipe", small, "--side-by-side"]
    forks.run(two, words, kill_after=0.8 * alone["seconds"])
    done = forks.run(two, words)
    while "another process" in done["logs"][0]:  # it has not noticed yet that the first was killed
        done = forks.run(two, words)
    assert done["statuses"] == [0] and "second process" in done["logs"][0], done["logs"]
    assert same_results(one / "runs/small", two / "runs/small") and steps(one) == steps(two)
    assert not (two / "runs/small/beside").exists()
    again = forks.run(two, words)
    assert again["statuses"] == [0] and "second process" not in again["logs"][0]  # nothing is left for it


def test_a_baseline_that_fails_there_is_an_error_here(forks, small, tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(small.read_text() + "\n[train.discriminative]\nmax_length = 4\n")
    done = forks.run(tmp_path, ["--recipe", recipe, "--side-by-side"])
    (error,) = [line for line in done["logs"][0].splitlines() if line.startswith("error: ")]
    assert done["statuses"] == [2] and "max_length" in error and "Traceback" not in done["logs"][0]


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(holds) -> None:
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < 240  # seconds, on a machine that has other work
        time.sleep(0.05)


def start(small: Path, place: Path, steps: int) -> tuple[subprocess.Popen, list[int]]:
    """A run whose second process trains; and the processes that it has started."""
    recipe = place / "small.toml"
    recipe.write_text(small.read_text() + LONG.format(steps))
    command = [sys.executable, ROOT / "selftrain.py", "--recipe", recipe, "--side-by-side"]
    first = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = place / "runs/small/steps/ahead-discriminative/metrics.jsonl"
    try:
        wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0)
    except AssertionError:
        first.terminate()  # it would go on for hours, and its second process with it
        raise
    return first, children(first.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_second_process_leaves_undone_the_first_does(small, tmp_path):
    first, every = start(small, tmp_path, 150)
    (second,) = [pid for pid in every if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(second, signal.SIGKILL)
    shown, said = first.communicate(timeout=120)
    assert first.returncode == 0 and "second process ended with status -9" in said, said
    assert "discriminative  " in shown and not list(tmp_path.glob("runs/small/steps/ahead-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_the_second_process_ends_with_the_first(how, small, tmp_path):
    """Asked to stop, it saves what it trains; and where the first is killed, nobody else would end it."""
    first, every = start(small, tmp_path, 100_000)
    first.send_signal(how)
    _, said = first.communicate(timeout=60)
    assert first.returncode == (130 if how == signal.SIGTERM else -how)
    wait_until(lambda: not any(map(is_there, every)))
    if how == signal.SIGTERM:
        assert said.strip().splitlines()[-1] == "interrupted" and list(
            tmp_path.glob("runs/small/steps/ahead-discriminative/resume/step-*")
        )


SCRIPTS = {
    "train.py": ["--stage", "reward", "--dry-run"],
    "selftrain.py": ["--recipe", str(ROOT / "recipes/micro.toml")],
    "infer.py": ["--formats"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_threads_sleep_while_they_wait_before_torch_is_there_unless_a_user_says_otherwise(name, tmp_path):
    """Two that spin for each other made the toy seven times slower beside one other process."""
    words = [sys.executable, ROOT / "tests/scripts/wait_policy.py", ROOT / name, *SCRIPTS[name]]
    for set_before, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": set_before} if set_before else {}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout == f"torch: {expected}\n", done.stderr
