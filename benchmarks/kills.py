"""Kills runs with SIGKILL, continues them, and compares the end with an uninterrupted run, bit by bit.

    python benchmarks/kills.py training [--kills 20]
    python benchmarks/kills.py judging --kills 10
    python benchmarks/kills.py selftrain --kills 25 [--recipe recipes/micro.toml]
    python benchmarks/kills.py damage [--kills 10]

Each run is killed at a moment drawn at random over the time that a whole one takes, continued by the same
call, killed again, and continued to its end. Equal means: every tensor of the final model has the
same bits, and metrics.jsonl has the same losses; of self-training, the same results.json but for seconds.

`damage` kills as many runs for each kind of damage, and does it before the run goes on: one byte is flipped
in a file drawn at random, a file is cut, one is removed, or a model's weights are swapped for another's. What
was damaged must be refused by name, or made again: a run that ends otherwise than the whole one has used it.
The result is benchmarks/results/kills_PART.json.

Left out: kills around each single rename, which the tests do.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT / "tests"))


def training(kills: int) -> dict:
    """The reward stage on a model of 52 thousand parameters, a resume point every second step."""
    from trainings import curve, drive, job, make, same_bits

    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model, data = make(place)
        config = {"steps": 12, "save_steps": 2, "batch_size": 4}
        whole = drive([job(place / "whole", model, data, config=config)])[0]
        assert whole["statuses"] == [0], whole["log"]
        done = equal = runs = 0
        while done < kills:
            out, runs = place / f"run{runs}", runs + 1
            # Two calls that are killed, at a moment before an uninterrupted run's end, and one that is not.
            moments = [{"kill_after": rng.uniform(0.05, whole["seconds"])} for _ in range(2)] + [{}]
            results = drive([job(out, model, data, config=config, **more) for more in moments])
            done += sum(result["statuses"] == [-9] for result in results)
            same = same_bits(place / "whole", out) and curve(place / "whole") == curve(out)
            equal += results[-1]["statuses"] == [0] and same
    return {"kills": done, "runs": runs, "runs_equal": equal, "level": "bitwise, float32, one thread"}


def judging(kills: int) -> dict:
    """infer.py --pairs, 120 pairs in shards of four, killed when as many rows are there as chance says."""
    from checkpoints import make_checkpoint
    from test_infer import PROMPT, Forks, pair, write

    rng, forks = random.Random(0), Forks()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = make_checkpoint(place / "model", "llama2", max_positions=200)
        (model / "judge_prompt.txt").write_text(PROMPT)
        source = write(place / "in.jsonl", [pair(n) for n in range(120)])
        words = ["--pairs", source, "--model", model, "--votes", 4, "--max-new-tokens", 16, "--out"]
        assert forks.run([*words, place / "whole"], place / "whole") == 0
        done = equal = runs = 0
        while done < kills:
            out, runs = place / f"run{runs}", runs + 1
            moments = sorted(rng.sample(range(1, 117), min(kills - done, rng.randint(1, 4))))
            done += sum(forks.run([*words, out], out, rows) == -9 for rows in moments)
            status = forks.run([*words, out], out)
            equal += status == 0 and out.read_bytes() == (place / "whole").read_bytes()
        forks.close()
    return {"kills": done, "runs": runs, "runs_equal": equal, "level": "every byte of the judged file"}


def selftrain(kills: int, recipe: Path) -> dict:
    """selftrain.py, the toy by default: thirteen kills a run, spread over what a whole one takes."""
    from selfruns import Forks, same_results

    rng, forks = random.Random(0), Forks()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        words, root = ["--recipe", recipe.resolve()], Path("runs") / recipe.stem

        def start(name: str, **how) -> dict:
            (place / name).mkdir(exist_ok=True)
            result = forks.run(place / name, words, **how)
            while "another process" in result["logs"][0]:  # the second one has not met its end yet
                result = forks.run(place / name, words, **how)
            return result

        whole = start("whole")
        assert whole["statuses"] == [0], whole["logs"]
        done = equal = runs = 0
        while done < kills:
            name, runs = f"run{runs}", runs + 1
            for _ in range(min(13, kills - done)):
                result = start(name, kill_after=rng.uniform(0.02, 0.13) * whole["seconds"])
                done += result["statuses"] == [-9]
            finished = start(name)["statuses"] == [0]
            equal += finished and same_results(place / "whole" / root, place / name / root)
        forks.close()
    figures = {"kills": done, "runs": runs, "runs_equal": equal, "recipe": recipe.stem}
    return figures | {"level": "results.json but for seconds; float32"}


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def damage(kills: int) -> dict:
    """A self-training run of seconds, of its own backbone; each kind of damage `kills` times."""
    from selfruns import Forks, finished_micro, same_results, small_world

    rng, forks = random.Random(0), Forks()
    counts = {kind: Counter(refused=0, repaired=0, used=0) for kind in ("flip", "cut", "remove", "swap")}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        micro = finished_micro(place)
        recipe, root = small_world(micro, place), Path("runs/small")
        others = [
            micro / f"steps/{step}/model/model.safetensors" for step in ("02-backbone", "15-round-1-train")
        ]

        def start(name: str, **how) -> dict:
            (place / name).mkdir(exist_ok=True)
            return forks.run(place / name, ["--recipe", recipe, "--no-baselines"], **how)

        whole = start("whole")
        assert whole["statuses"] == [0], whole["logs"]
        for number, kind in enumerate(kind for kind in counts for _ in range(kills)):
            name, files = f"run{number}", []
            while not files:  # a kill before the first file is none
                start(name, kill_after=rng.uniform(0.1, 0.95) * whole["seconds"])
                every = (path for path in (place / name / root).rglob("*") if path.is_file())
                hidden = (path for path in every if not any(part[0] == "." for part in path.parts))
                files = sorted(path for path in hidden if kind != "swap" or path.name == "model.safetensors")
            chosen = rng.choice(files)
            if kind == "swap":
                shutil.copyfile(
                    next(path for path in others if path.read_bytes() != chosen.read_bytes()), chosen
                )
            elif kind == "remove":
                chosen.unlink()
            else:
                {"flip": flip, "cut": cut}[kind](chosen, rng)
            end = start(name)
            errors = [line for line in end["logs"][0].splitlines() if line.startswith("error: ")]
            if end["statuses"] == [2] and len(errors) == 1 and "Traceback" not in end["logs"][0]:
                counts[kind]["refused"] += 1
            elif end["statuses"] == [0] and same_results(place / "whole" / root, place / name / root):
                counts[kind]["repaired"] += 1
            else:
                counts[kind]["used"] += 1
                print(f"{kind} {chosen}: {end['statuses']} {end['logs'][0][-500:]}", file=sys.stderr)
            shutil.rmtree(place / name)
        forks.close()
    used = sum(each["used"] for each in counts.values())
    runs = kills * len(counts)
    figures = {"kills": runs, "runs": runs, "runs_equal": runs - used, "recipe": "small"}
    return figures | {
        "outcomes": {kind: dict(each) for kind, each in counts.items()},
        "level": "refused or equal",
    }


PARTS = {"damage": damage, "training": training, "judging": judging, "selftrain": selftrain}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS])
    parser.add_argument("--kills", type=int, default=20)
    toy = common.ROOT / "recipes/toy.toml"
    parser.add_argument("--recipe", type=Path, default=toy, help="of selftrain [toy]")
    arguments = parser.parse_args()
    more = [arguments.recipe] if arguments.part == "selftrain" else []
    result = PARTS[arguments.part](arguments.kills, *more)
    common.write_result(f"kills_{arguments.part}", result)
    print(f"{result['kills']} kills, {result['runs_equal']} of {result['runs']} runs equal", file=sys.stderr)
    return 0 if result["runs_equal"] == result["runs"] else 1


if __name__ == "__main__":
    sys.exit(main())
