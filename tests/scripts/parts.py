"""Parts of the acceptance run that hang, fail or work: `parts.py WHICH BEATS`; see test_acceptance.py."""

import subprocess
import sys
import time
from pathlib import Path


def hangs(beats: str) -> None:
    """Leaves a half of its results, and a child that goes on until somebody ends it."""
    Path("results").mkdir()
    Path("results/half.json").write_text("1")
    print("I began", flush=True)
    subprocess.Popen([sys.executable, __file__, "beats", beats])
    time.sleep(60)


def beats(path: str) -> None:
    while True:
        with open(path, "a") as file:
            file.write(".")
        time.sleep(0.05)


def fails(_: str) -> None:
    raise SystemExit("it broke")


def works(_: str) -> None:
    print("fine")


if __name__ == "__main__":
    {each.__name__: each for each in (hangs, beats, fails, works)}[sys.argv[1]](sys.argv[2])
