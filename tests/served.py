"""Servers of judges, in a process of their own and in this one, and clients that speak plain HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from gramr2.extras.http_server import HttpServer
from gramr2.extras.serve import JudgeServer

ROOT = Path(__file__).parents[1]


class Served:
    """`with Served("--model", DIR) as server`: a server at `server.port`, told to stop at the end."""

    def __init__(self, *words):
        command = [sys.executable, ROOT / "infer.py", "--serve", "--port", "0", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"at http://[\d.]+:(\d+)", line):
                self.port = int(found[1])
                return
        raise RuntimeError("".join(self.said))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self) -> int:
        self.said += self.process.stderr.readlines()
        return self.process.wait(60)


class Client:
    """One connection, kept."""

    def __init__(self, port: int):
        self.port, self.writer = port, None

    async def ask(self, path: str, row=None, body: bytes | None = None, **headers) -> tuple[int, bytes]:
        await self.send(path, row, body, **headers)
        return await self.receive()

    async def send(self, path: str, row=None, body: bytes | None = None, **headers) -> None:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 26)
        if row is not None:
            body = json.dumps(row).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: here"]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        await self.writer.drain()

    async def receive(self) -> tuple[int, bytes]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"Content-Length: (\d+)", head)[1])
        return int(head.split()[1]), await self.reader.readexactly(length)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


async def once(port: int, path: str, row=None, body: bytes | None = None, **headers) -> tuple[int, bytes]:
    client = Client(port)
    try:
        return await client.ask(path, row, body, **headers)
    finally:
        client.close()


async def metrics(port: int) -> dict[str, float]:
    _, text = await once(port, "/metrics")
    lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("gramr2_"): float(value) for name, _, value in lines}


async def until(port: int, holds, seconds: float = 60) -> dict[str, float]:
    """The metrics as soon as they are as they should be."""
    latest = time.monotonic() + seconds
    while not holds(found := await metrics(port)):
        assert time.monotonic() < latest, found
        await asyncio.sleep(0.02)
    return found


class Here:
    """A server in a thread of this process: `server` is what answers, `port` where."""

    def __init__(self, judge, key=None, most=64, timeout=60.0):
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        self.ended = threading.Event()

        async def begin():
            self.server = JudgeServer(judge, key, most, timeout, self.ended.set)
            self.http = HttpServer(self.server.answer, self.server.admit)
            self.port = await self.http.open("127.0.0.1", 0)
            self.server.thread.start()
            ready.set()

        def run():
            self.loop.create_task(begin())
            self.loop.run_forever()

        threading.Thread(target=run, daemon=True).start()
        assert ready.wait(60)

    def ask(self, path: str, row=None, **headers):
        """→ the status, and what the JSON says."""
        status, body = asyncio.run(once(self.port, path, row, **headers))
        assert body.count(b"\n") == 1 and body.endswith(b"\n")
        return status, json.loads(body)

    def close(self):
        asyncio.run_coroutine_threadsafe(self.http.close(), self.loop).result(60)
        self.server.thread.end()
        self.loop.call_soon_threadsafe(self.loop.stop)
