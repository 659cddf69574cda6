"""A served judge under load: infer.py --serve, its callers, and what becomes of those that leave.

    python selftrain.py --recipe micro && python benchmarks/serving.py [--run runs/micro] [--quick]

The run's last judge is asked about the run's test pairs, each request with a seed of its own. First CLIENTS
callers at once, each with its own connection and REQUESTS requests one after the other; then one caller
with the same requests, one by one. Every answer must be the same to the last bit, and there must be one for
each request. Then a process with WAITING requests under way is killed with SIGKILL, and the pages of the
cache must come back; and the server is told to stop with WAITING requests under way: each must be answered,
and who comes later told that it stops.

Left out: a network between them, and answers as long as a large judge's.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT / "tests"))

from served import Client, Served, metrics, once, until

from gramr2.files import read_rows
from gramr2.run_directory import model_of

CLIENTS, REQUESTS, WAITING = 200, 5, 100
VOTES, ANSWER = 2, 64  # of a request, and most tokens of an answer
LONG = {"votes": 16, "max_new_tokens": 480}  # of a request that is under way when something happens


def make_rows(run: Path, count: int) -> list[dict]:
    (path,) = run.glob("steps/*-data/test.jsonl")
    pairs = [
        {name: row[name] for name in ("question", "response_a", "response_b")} for row in read_rows(path)
    ]
    how = {"votes": VOTES, "max_new_tokens": ANSWER}
    return [pairs[number % len(pairs)] | how | {"seed": number} for number in range(count)]


async def all_at_once(port: int, rows: list[dict], clients: int) -> tuple[float, list, list[float]]:
    """→ seconds, the answers, and how long each took."""
    answers, took = [None] * len(rows), [0.0] * len(rows)

    async def caller(number: int) -> None:
        client = Client(port)
        for place in range(number, len(rows), clients):
            began = time.perf_counter()
            assert answers[place] is None
            answers[place] = await client.ask("/judge", rows[place])
            took[place] = time.perf_counter() - began
        client.close()

    began = time.perf_counter()
    await asyncio.gather(*map(caller, range(clients)))
    return time.perf_counter() - began, answers, took


async def send_and_wait(port: int, rows: list[dict]) -> None:
    await asyncio.gather(*(once(port, "/judge", row | LONG) for row in rows))


async def kill_a_client(port: int, run: Path, waiting: int) -> dict:
    """A process with many requests under way, and SIGKILL."""
    words = [sys.executable, __file__, "--run", run, "--wait", port, waiting]
    client = subprocess.Popen([str(word) for word in words])

    def all_under_way(found: dict) -> bool:
        return found["requests_accepted"] == waiting <= found["samples_running"]

    before = await until(port, all_under_way, 600)
    client.send_signal(signal.SIGKILL)
    began = time.perf_counter()
    after = await until(port, lambda found: found["requests_accepted"] == 0 and found["samples_running"] == 0)
    client.wait()
    seconds = time.perf_counter() - began
    pages = {"before": before["cache_pages_used"], "after": after["cache_pages_used"]}
    return {"requests": waiting, "pages": pages, "seconds": seconds}


async def stop_under_load(server: Served, rows: list[dict]) -> dict:
    clients = [Client(server.port) for _ in rows]
    for client, row in zip(clients, rows, strict=True):
        await client.send("/judge", row | LONG | {"max_new_tokens": ANSWER})
    found = await until(server.port, lambda found: found["samples_running"] > 0)
    accepted = int(found["requests_accepted"])
    os.kill(server.process.pid, signal.SIGTERM)
    status = 200
    while status == 200:
        status, _ = await once(server.port, "/health")
    late, _ = await once(server.port, "/judge", rows[0])
    answers = await asyncio.gather(*(client.receive() for client in clients))
    statuses = [status for status, _ in answers]
    result = {"requests": len(rows), "accepted": accepted, "late": late}
    return result | {"answered": statuses.count(200), "exit_status": server.end()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/micro"), help="a finished run [runs/micro]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a rehearsal with few callers: no figures")
    parser.add_argument("--wait", nargs=2, type=int, help=argparse.SUPPRESS)  # the client that is killed
    arguments = parser.parse_args()
    quick = arguments.quick
    clients, requests, waiting = (8, 2, 4) if quick else (CLIENTS, REQUESTS, WAITING)
    if arguments.wait:
        port, waiting = arguments.wait
        asyncio.run(send_and_wait(port, make_rows(arguments.run, waiting)))
        return 0
    rows = make_rows(arguments.run, clients * requests)
    with Served("--model", model_of(arguments.run), "--device", arguments.device) as server:
        together, answers, took = asyncio.run(all_at_once(server.port, rows, clients))
        tokens = asyncio.run(metrics(server.port))["tokens_total"]
        alone, singles, _ = asyncio.run(all_at_once(server.port, rows, 1))
        same = sum(a == b for a, b in zip(answers, singles, strict=True))
        killed = asyncio.run(kill_a_client(server.port, arguments.run, waiting))
        stopped = asyncio.run(stop_under_load(server, rows[:waiting]))
    took.sort()
    result = {"device": arguments.device, "clients": clients, "requests": len(rows), "votes": VOTES,
              "answer": ANSWER, "answered": sum(status == 200 for status, _ in answers), "same": same,
              "seconds": together, "seconds_alone": alone, "tokens": tokens,
              "median": took[len(took) // 2], "p95": took[int(0.95 * len(took))],
              "killed": killed, "stopped": stopped}  # fmt: skip
    common.write_result("serving_quick" if quick else "serving", result)
    print(json.dumps(result, indent=1))
    fine = same == result["answered"] == len(rows) and killed["pages"]["after"] == 0
    fine = fine and stopped["answered"] == stopped["accepted"] == waiting
    return 0 if fine and (stopped["late"], stopped["exit_status"]) == (503, 0) else 1


if __name__ == "__main__":
    sys.exit(main())
