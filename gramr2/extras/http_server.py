"""HTTP/1.1 for one server behind a trainer: whole requests in, whole answers out, on one asyncio loop.

It is Python's own asyncio, and no framework: what matters here is what a framework leaves to a proxy in front
of it. A client that leaves, killed or not, ends its request (`answer` is cancelled). Every wait has an end:
for a head, for a body, for a reader that is slow. Heads, bodies, connections and what is being read at once
have limits. While it stops, who comes is told so, and not shut out. Connections are kept; requests that were
sent ahead wait their turn.

It leaves out: TLS and HTTP/2 (a proxy's), chunked bodies (411: send a Content-Length), streamed answers, and
what is asked (serve.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

HEAD, BODY = 1 << 14, 1 << 23  # most bytes of each
CONNECTIONS, READING = 4096, 1 << 28  # most at once, and most bytes of bodies that are being read
SECONDS = 60  # that a client may take to send a head, to send a body, and to take its answer
LINE = 500  # most characters of a reason
LINGER = 1.0  # seconds in which what is refused may still arrive: the answer must not be lost with it
START = re.compile(r"([A-Z]{1,16}) (/[!-~]{0,2000}) HTTP/1\.([01])")
FIELD = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\r\n\0]*)")


class Refusal(Exception):
    """What is not answered as it was asked: a status, one line, and headers."""

    def __init__(self, status: int, reason: str, **headers: str):
        super().__init__(reason)
        said = {"message": " ".join(reason.split())[:LINE], "code": status}  # as OpenAI's clients read it
        self.answer = as_json({"error": said}, status, **headers)


@dataclass
class Call:
    method: str
    path: str
    query: str
    headers: dict[str, str]  # names in lower case
    keeps: bool  # the connection
    body: bytes = b""


@dataclass
class Answer:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    named = {name.replace("_", "-").title(): text for name, text in headers.items()}
    return Answer(text.encode(), status, {"Content-Type": "application/json", **named})


class Reader(asyncio.StreamReader):
    """One that tells when its client is gone: also while nobody reads."""

    def __init__(self):
        super().__init__(limit=HEAD)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.gone.set()


class HttpServer:
    """`admit` sees a call before its body, and refuses strangers, who must not take the room of others."""

    def __init__(
        self, answer: Callable[[Call], Coroutine[Any, Any, Answer]], admit: Callable[[Call], object]
    ):
        self.answer, self.admit, self.reading = answer, admit, 0
        self.connections: set[asyncio.Task] = set()
        self.answering = 0

    async def open(self, host: str, port: int) -> int:
        """Listens → the port, which is a free one where 0 was asked for."""
        self.server = await asyncio.get_running_loop().create_server(
            lambda: asyncio.StreamReaderProtocol(Reader(), self._connected), host, port, backlog=CONNECTIONS
        )
        return self.server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Those that are being answered are; all other connections end."""
        self.server.close()
        while self.answering:
            await asyncio.sleep(0.01)
        for task in self.connections:
            task.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    async def _connected(self, reader: Any, writer: asyncio.StreamWriter) -> None:
        task: Any = asyncio.current_task()
        self.connections.add(task)
        writer.transport.set_write_buffer_limits(0)  # an answer that was written is with the system
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError):
            writer.transport.abort()  # the client's end, or ours: what was not taken yet is not waited for
        finally:
            self.connections.discard(task)
            writer.close()

    async def _exchange(self, reader: Reader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer → whether the connection is kept."""
        try:
            if len(self.connections) > CONNECTIONS:
                raise Refusal(503, f"more than {CONNECTIONS} connections; come again", retry_after="1")
            call = await self._read(reader, writer)
        except Refusal as refusal:
            await self._write(writer, refusal.answer, keeps=False)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    while await reader.read(HEAD):
                        pass
            return False
        self.answering += 1
        try:
            found = await self._answer_unless_gone(call, reader)
            if found:
                await self._write(writer, found, call.keeps, call.method != "HEAD")
            return found is not None and call.keeps
        finally:
            self.answering -= 1

    async def _answer_unless_gone(self, call: Call, reader: Reader) -> Answer | None:
        work, leaves = asyncio.create_task(self.answer(call)), asyncio.create_task(reader.gone.wait())
        try:
            await asyncio.wait({work, leaves}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            leaves.cancel()
            work.cancel()

    async def _read(self, reader: Reader, writer: asyncio.StreamWriter) -> Call:
        try:
            async with asyncio.timeout(SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise Refusal(431, f"a head of more than {HEAD} bytes") from None
        call = as_call(head)
        self.admit(call)
        length = body_length(call)
        if self.reading + length > READING:
            raise Refusal(503, "too much is being read at once; come again", retry_after="1")
        if call.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.reading += length
        try:
            async with asyncio.timeout(SECONDS):
                call.body = await reader.readexactly(length)
        except TimeoutError:
            raise Refusal(408, f"the body did not come in {SECONDS} seconds") from None
        finally:
            self.reading -= length
        return call

    async def _write(self, writer: asyncio.StreamWriter, answer: Answer, keeps: bool, whole=True) -> None:
        connection = "keep-alive" if keeps else "close"
        fields = answer.headers | {"Content-Length": str(len(answer.body)), "Connection": connection}
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        writer.write("\r\n".join([*lines, "\r\n"]).encode("latin-1") + answer.body * whole)
        async with asyncio.timeout(SECONDS):
            await writer.drain()


def as_call(head: bytes) -> Call:
    start, *lines = head[:-4].decode("latin-1").split("\r\n")
    first = START.fullmatch(start)
    if not first:
        raise Refusal(400, "no HTTP/1.1 request")
    headers: dict[str, str] = {}
    for line in lines:
        found = FIELD.fullmatch(line)
        if not found:
            raise Refusal(400, "a header that is none")
        name = found[1].lower()
        if name in headers and name in ("content-length", "authorization", "host"):
            raise Refusal(400, f"the header {name} stands there twice")
        headers[name] = found[2].strip(" \t")
    method, target, minor = first.groups()
    path, _, query = target.partition("?")
    keeps = minor == "1" and headers.get("connection", "").lower() != "close"
    return Call(method, path, query, headers, keeps)


def body_length(call: Call) -> int:
    if "transfer-encoding" in call.headers:
        raise Refusal(411, "chunked bodies are not read; send a Content-Length")
    length = call.headers.get("content-length", "" if call.method == "POST" else "0")
    if not length:
        raise Refusal(411, "send a Content-Length")
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "a Content-Length that is no number")
    if len(length) > 12 or int(length) > BODY:
        raise Refusal(413, f"a body of more than {BODY} bytes; send fewer at once")
    return int(length)
