"""What a run says of itself: which step of how many, how long still, what ended it, and what it gained."""

import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from selfruns import ROOT

from gramr2.commands import selftrain
from gramr2.extras import progress
from gramr2.extras.progress import Planned, Progress, as_time
from gramr2.extras.results import CONTROL, RunReader, gain_in_words, gains
from gramr2.extras.results import test_step as name_of_test
from gramr2.files import write_rows
from gramr2.seals import write_signed


def said(log: str) -> list[tuple[int, int, str]]:
    return [(int(n), int(of), name) for n, of, name in re.findall(r"step (\d+) of (\d+), (\S+): ", log)]


def test_every_step_is_said_with_the_number_of_its_directory(forks, small, tmp_path):
    """Of a whole run, of one that is to stop, and of what is left when it goes on."""
    words = ["--recipe", small]
    part = forks.run(tmp_path, [*words, "--until", "prove-labelled"])["logs"][0]
    assert said(part)[-1] == (5, 5, "prove-labelled")  # behind data, backbone's test, prover, wrong-labels
    page = (tmp_path / "runs/small/report.html").read_text()
    assert "stopped after" in page and "as asked" in page and "Finished steps: 5 of 5" in page
    rest = forks.run(tmp_path, words)
    lines = said(rest["logs"][0])
    steps = {path.name[3:]: int(path.name[:2]) for path in tmp_path.glob("runs/small/steps/*")}
    assert [n for n, *_ in lines] == list(range(6, len(steps) + 1))
    assert all(steps[name] == n and of == len(steps) for n, of, name in lines)
    # A step of each kind was done before the last.
    assert re.search(
        r"test-labelled-only-2x-steps: a model is tested .* — about \d+ \w+ left", rest["logs"][0]
    )
    never = forks.run(tmp_path, [*words, "--until", "nosuch"])
    assert never["statuses"] == [2] and "--until: no step nosuch" in never["logs"][0]


def test_the_words_of_the_steps_name_the_parts_of_figure_2_as_its_code_does():
    number = 0
    for line in inspect.getsource(selftrain.self_train).splitlines():
        number = int(found[1]) if (found := re.match(r"\s+# (\d)\. ", line)) else number
        for name in re.findall(r'run\.\w+\(f?"(?:round-\{number\}-)?([\w-]+)"', line):
            assert selftrain.STEPS[name].endswith(f"(figure 2, {number})"), name
    assert number == 7


# ---------------------------------------------------------------------------------- how long


def planned(*steps: Planned, beside: bool = False, **rows: float) -> Progress:
    made = Progress.__new__(Progress)
    made.steps, made.rows = {step.name: step for step in steps}, rows
    made.names = list(made.steps)
    made.side_by_side, made.root = beside, Path("/nowhere")
    return made


def reader(tmp_path: Path, **done: dict) -> SimpleNamespace:
    record = {"counts": {}, "resumed": False}
    found = {name.replace("_", "-"): record | each for name, each in done.items()}
    return SimpleNamespace(steps=found, paths={name: tmp_path / name for name in found}, done=found.get)


PROVE = Planned("prove", "prove", ["labelled"], 4)
FILTER = Planned("filter", "filter", ["prove"])
TRAIN = Planned("train", "train reward", ["filter"], 0.5)
AGAIN = Planned("again", "train reward", ["filter"], fixed=30)
TEST = Planned("test", "judge", ["held_out"], beside=True)
STEPS = PROVE, FILTER, TRAIN, AGAIN, TEST
DONE = {
    "prove": {"seconds": 80.0},
    "filter": {"seconds": 1.0, "counts": {"in": 20, "kept": 10}},
    "train": {"seconds": 5.0},
    "test": {"seconds": 3.0},
}


def test_there_is_no_estimate_before_a_step_of_every_kind_is_done(tmp_path):
    run = planned(*STEPS, labelled=20, held_out=8)
    assert run.seconds_left(reader(tmp_path, prove=DONE["prove"], train=DONE["train"])) is None
    most = {name: DONE[name] for name in ("prove", "filter", "train")}
    assert run.seconds_left(reader(tmp_path, **most)) is None  # nobody knows how long a test takes
    # 10 rows, half a training step for each, took 5 s; then 30 of them take 30.
    assert run.seconds_left(reader(tmp_path, **DONE)) == pytest.approx(30)


def test_what_filters_will_keep_is_taken_from_those_before(tmp_path):
    more = Planned("more", "prove", ["other"], 4), Planned("sift", "filter", ["more"])
    last = Planned("last", "train reward", ["sift"], 0.5)
    run = planned(*STEPS, *more, last, labelled=20, held_out=8, other=40)
    done = DONE | {"again": {"seconds": 30.0}}
    # 40 pairs to prove as 20 took 80 s, 2 s to sift them, and half of them to train on at 0.5 s each.
    assert run.seconds_left(reader(tmp_path, **done)) == pytest.approx(160 + 2 + 40 * 0.5 * 0.5)


def test_a_resumed_step_is_counted_for_what_is_left_of_it_and_not_for_a_speed(tmp_path):
    run = planned(*STEPS, labelled=20, held_out=8)
    seen = reader(tmp_path, **DONE)
    seen.paths["again"] = tmp_path
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert run.seconds_left(seen) == pytest.approx(28)
    shards = planned(PROVE._replace(name="first"), PROVE, labelled=20)
    (tmp_path / "prove/shards").mkdir(parents=True)
    for name in ("000000000-000000008.jsonl", "000000008-000000016.claim"):
        (tmp_path / "prove/shards" / name).touch()
    seen = reader(tmp_path, first={"seconds": 80.0})
    seen.paths["prove"] = tmp_path / "prove"
    assert shards.seconds_left(seen) == pytest.approx(80 * 12 / 20)
    # Cut and resumed, it took who knows how long: its last start's second is no speed.
    assert shards.seconds_left(reader(tmp_path, first={"seconds": 1.0, "resumed": True})) is None


def test_a_second_process_halves_what_the_loop_does_not_wait_for(tmp_path):
    slow = [TEST._replace(name=f"test-{n}", each=each) for n, each in enumerate((1, 20, 20))]
    done = {**DONE, "test_0": {"seconds": 8.0}}
    del done["test"]
    for beside, expected in ((False, 30 + 320), (True, 175)):
        run = planned(PROVE, FILTER, TRAIN, AGAIN, *slow, beside=beside, labelled=20, held_out=8)
        assert run.seconds_left(reader(tmp_path, **done)) == pytest.approx(expected)
    fast = slow[0], slow[1]._replace(each=1)
    run = planned(PROVE, FILTER, TRAIN, AGAIN, *fast, beside=True, labelled=20, held_out=8)
    assert run.seconds_left(reader(tmp_path, **done)) == pytest.approx(30)  # the loop is the longer


def test_a_guess_is_said_as_one():
    shown = [as_time(seconds) for seconds in (0.2, 44, 89, 95, 3000, 5400, 40 * 3600, 1e6)]
    guesses = "10 s", "40 s", "90 s", "2 min", "50 min", "2 h", "2 days", "12 days"
    assert shown == [f"about {each}" for each in guesses]


def test_reports_take_a_second_and_a_hundredth_of_a_run_at_most(tmp_path, monkeypatch):
    """Of a toy's steps some take milliseconds, and its report a second."""
    write_signed(tmp_path / "plan.json", {"settings": {"iters": 1}, "inputs": {}, "code": "0"})
    clock, written = [0.0], []

    def write_report(*_):
        clock[0] += 0.5
        written.append(clock[0])

    monkeypatch.setattr(progress, "write_report", write_report)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    made = planned(*STEPS, labelled=20, held_out=8)
    made.root, made.says, made.begun, made.spent = tmp_path, {"test": "a test"}, 0.0, 0.0
    for _ in range(400):
        made.begins("test", tmp_path)
        clock[0] += 1
    assert written[:3] == [0.5, 2, 3.5] and 8 <= len(written) <= (1 + 0.01 * clock[0]) / 0.5


# ---------------------------------------------------------------------------------- how it ends


def test_after_a_kill_the_report_says_when_it_was_going_on_and_made_again_that_it_is_not(small, tmp_path):
    """The page that a killed run leaves must not be taken for one of a run that goes on."""
    recipe = tmp_path / "small.toml"
    recipe.write_text(small.read_text() + "\n[train.prover]\nsteps = 100000\n")
    run = subprocess.Popen(
        [sys.executable, ROOT / "selftrain.py", "--recipe", recipe], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    root, again = tmp_path / "runs/small", [sys.executable, "-m", "gramr2.extras.report", "runs/small"]
    try:
        begun = time.monotonic()
        while not any(path.stat().st_size for path in root.glob("steps/*-prover/metrics.jsonl")):
            assert run.poll() is None and time.monotonic() - begun < 240
            time.sleep(0.05)
        page = root / "report.html"
        assert re.search(r"it was going on: step \d of \d+, ", page.read_text())
        subprocess.run(again, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        assert "it was going on: its last finished step is" in page.read_text()
        assert re.search(r"prover: loss .* steps so far", page.read_text())  # the curve of a part
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    left = page.read_text()
    assert "This run is not finished" in left and "it was going on" in left
    subprocess.run(again, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert "it was going on" not in page.read_text() and "nothing works on it" in page.read_text()


def test_an_error_is_said_in_the_report(forks, small, tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(small.read_text() + "\n[train.discriminative]\nmax_length = 4\n")
    done = forks.run(tmp_path, ["--recipe", recipe])
    page = (tmp_path / "runs/small/report.html").read_text()
    top = page.partition("<nav")[0]
    assert done["statuses"] == [2] and "nothing works on it" in top and "max_length" in top


# ---------------------------------------------------------------------------------- what it came to


def run_with_tests(root: Path, **hits: str) -> RunReader:
    """A run whose models got these of its pairs right (1) and wrong (0)."""
    write_signed(root / "plan.json", {"settings": {"iters": 1}, "inputs": {}, "code": "0"})
    for number, (name, row) in enumerate(hits.items(), 1):
        place = root / "steps" / f"{number:02}-{name_of_test(name)}"
        place.mkdir(parents=True)
        rows = ({"label": "A" if hit == "1" else None, "pair": {"label": "A"}} for hit in row)
        write_rows(place / "judged.jsonl", rows)
        write_signed(place / "done.json", {"counts": {}, "seconds": 1.0, "files": {}})
    return RunReader(root)


def test_a_gain_is_over_the_control_on_the_same_pairs(tmp_path):
    """Unpaired, 20 of 100 pairs more would be as uncertain as two tests apart; the last round counts."""
    rows = {
        "initial": "0" * 100,
        "round 1": "1" * 100,
        "round 2": "1" * 70 + "0" * 30,
        CONTROL: "1" * 50 + "0" * 50,
    }
    run = run_with_tests(tmp_path, **rows)
    (gain,) = gains(run, list(rows))
    assert (gain["name"], gain["over"], gain["value"], gain["n"]) == ("round 2", CONTROL, 20, 100)
    assert 10 < gain["low"] < 20 < gain["high"] < 30
    text = gain_in_words(gain)
    assert "20.0 points more" in text and "more than chance" in text and f"{gain['low']:+.1f}" in text
    (gain,) = gains(run, ["initial", "round 1"])
    assert (gain["over"], gain["value"]) == ("initial", 100)  # no baselines
    assert not list(gains(run, ["initial", CONTROL]))  # no round was finished
    assert "2.0 points less" in gain_in_words(gain | {"value": -2.0, "low": -5.0, "high": 1.0})
    assert "may be chance" in gain_in_words(gain | {"value": -2.0, "low": -5.0, "high": 1.0})


def test_the_end_is_one_screen_whose_commands_work(forks, small, tmp_path):
    done = forks.run(tmp_path, ["--recipe", small, "--name", "mine"])
    shown = done["logs"][0].partition("accuracy, %")[2]
    assert len(shown.splitlines()) < 40
    assert "than the control, “labelled only, 2x steps” (95% interval" in " ".join(shown.split())
    judge, look, again = re.findall(r"^    (\S.*)", shown.partition("next:")[2], re.MULTILINE)
    assert judge == "python infer.py --pair runs/mine/pair.json"
    assert (tmp_path / "runs/mine/pair.json").is_file()
    seen = subprocess.run(look, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert seen.returncode == 0 and "filter-labelled/dropped.jsonl" in seen.stdout
    python, script, *words = shlex.split(again)
    assert (python, script) == ("python", "selftrain.py") and words[:2] == ["--recipe", str(small)]
    command = [sys.executable, ROOT / script, *words, "--dry-run"]
    plan = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert plan["run"] == "runs/mine-seed-1" and plan["seed"] == 1


def test_the_command_for_another_seed_does_not_begin_in_the_middle():
    settings, directory = SimpleNamespace(seed=3), SimpleNamespace(root=Path("runs/a b"))
    run = SimpleNamespace(settings=settings, directory=directory, ranks=SimpleNamespace(size=1))
    command = selftrain.with_another_seed(run, ["--from", "round-1-train", "--name", "a b", "--iters", "2"])
    assert command == "python selftrain.py --name 'a b' --iters 2 --seed 4 --name 'a b-seed-4'"
