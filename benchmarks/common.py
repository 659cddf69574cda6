"""What the benchmarks share: where they ran, how they time, where results go.

- `compare` times several functions in one process, in turns, so that a slow minute of the machine hits
  all of them alike; what is reported is each one's median and the median of its ratios to the first.
- `environment` says on what, with what, and of which commit: a figure without it is not a result.
- `write_result` leaves benchmarks/results/NAME.json; tables.py makes the tables of the READMEs from these.

Left out: profiling, and any judgement of the figures.
"""

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from gramr2.files import write_json  # noqa: E402

# acceptance.py lets each of its parts leave its results in a directory of its own.
RESULTS = Path(os.environ.get("GRAMR2_RESULTS", ROOT / "benchmarks/results"))
PACKAGES = "torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy"


def commit() -> str | None:
    """The commit that is measured, with "+" where the tree differs from it; None outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", ROOT, *words]
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}  # none that is around it
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


COMMIT = commit()  # when this process began: what it writes must not count as a change


def environment() -> dict:
    """Hardware, versions, date, threads, commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "commit": COMMIT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "gpu": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}" if gpu else None,
        "versions": versions,
    }


def _processor() -> str:
    """The processor's own name, which the platform module knows on macOS only."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(functions: dict, repeats: int = 5, warmups: int = 1) -> dict:
    """{name: function} -> {name: {"seconds": median, "ratio": median of its seconds over the first's}}."""
    for function in functions.values():
        for _ in range(warmups):
            _seconds(function)
    rounds = [{name: _seconds(function) for name, function in functions.items()} for _ in range(repeats)]
    first = next(iter(functions))
    return {
        name: {
            "seconds": statistics.median(times[name] for times in rounds),
            "ratio": statistics.median(times[name] / times[first] for times in rounds),
        }
        for name in functions
    }


def needed(package: str):
    """A peer without which there is nothing to compare with."""
    try:
        return importlib.import_module(package)
    except ImportError:
        sys.exit(f"this benchmark compares with {package}: pip install -e '.[bench]' brings it")


def kept_results(name: str, field: str) -> dict:
    """What a result that holds several, by their names, has of them so far."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))[field] if path.exists() else {}


def write_result(name: str, result: dict) -> Path:
    """Publishes a result with the environment it was measured in, and says where."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"environment": environment(), **result})
    print(f"wrote {path}", file=sys.stderr)
    return path
