"""A judge that others can call: infer.py --serve.

    POST /judge      a pair as in a pair file, or {"pairs": […]} → its judgment, or {"judgments": […]}
    POST /rank       a list as in a list file, and "method" → what infer.py --rank --json says
    POST /reward     {"prompts": […], "completions": […], "references": […] or none} → {"rewards": […]}: those
                     of RewardModel.reward
    POST /openrlhf   OpenRLHF's remote reward, {"query", "prompts", "labels"} → {"rewards", "scores",
                     "extra_logs"}. Labels are references where all are texts; otherwise those that share a
                     prompt are compared. ?group=N gathers N of a prompt from as many requests, which is how
                     its rollouts come
    POST /v1/chat/completions, GET /v1/models    the model itself, in OpenAI's manner
    GET /health, GET /metrics

What a request says (votes, seed, temperature, top_p, top_k, max_new_tokens) goes before what the command line
says. All requests share one running batch, and each is answered as if it were alone (model_thread.py). A
request that was accepted has a thread of its own, which mostly waits. Most of them at once is `--queue`: who
comes after is told to come again (429). The same holds for who comes while the server stops (503); what was
accepted is answered. Nothing in a request is a path, and nothing but JSON is read.

It leaves out: several models, streaming, and who may ask how much.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from gramr2.extras.bulk import Judge
from gramr2.extras.http_server import CONNECTIONS, Answer, Call, HttpServer, Refusal, as_json
from gramr2.extras.model_thread import TICKET, Cut, ModelThread, Ticket
from gramr2.extras.printing import ranking_row
from gramr2.fields import Fields, typed
from gramr2.files import InputError, JsonRow, need, parse_json, read_text
from gramr2.interrupts import AGAIN
from gramr2.rankings import METHODS
from gramr2.records import Judgment, Pair, messages_of
from gramr2.settings import SAMPLING, SEEDS

LONGEST = 32768  # tokens of a prompt and its answer, where the model takes more
COMPARISONS, VOTES = 4096, 256  # most of a request, and most of a comparison
GATHER = 120.0  # seconds that the first of a group waits for the others: OpenRLHF's own patience is 180
SETTINGS: dict[str, tuple[Any, JsonRow]] = {"votes": (int, {"low": 1, "high": VOTES}), "seed": (int, SEEDS)}
SETTINGS |= SAMPLING
# Special tokens that end a completion, as model families spell them.
END = re.compile(r"(<\|[\w.-]{1,40}\|>|</s>|<eos>|<end_of_turn>|<｜[\w▁]{1,40}｜>)\Z")
# What a client of OpenAI's may say that changes nothing here.
HARMLESS = {"user", "metadata", "store", "service_tier"}


@dataclass
class Group:
    """Completions of one prompt that come one by one, and who waits for the reward of each."""

    members: list[tuple[str, Future[float], Ticket]] = field(default_factory=list)
    full: threading.Event = field(default_factory=threading.Event)

    @property
    def waiting(self) -> list[tuple[str, Future[float], Ticket]]:
        """Those whose caller has not left, in the order of their texts: who came when must not matter."""
        return sorted((each for each in self.members if not each[2].cut), key=lambda each: each[0])


class JudgeServer:
    """What is asked of a judge, and what is answered."""

    def __init__(self, judge: Judge, key: str | None, most: int, timeout: float, ended: Callable[[], object]):
        self.judge, self.model, self.key, self.most, self.timeout = judge, judge.model, key, most, timeout
        self.name, self.decoder = judge.judged_with["model"], judge.model.model
        room = min(self.decoder.config.max_positions, LONGEST)
        self.decoder.config = replace(self.decoder.config, max_positions=room)
        self.thread = ModelThread(self.decoder, ended)
        self.model.scores = partial(self.thread.call, self.model.scores)  # type: ignore[method-assign]
        if voter := self.model.voter:
            voter.generate, voter.logprobs = self.thread.generate, partial(self.thread.call, voter.logprobs)
        self.pool = ThreadPoolExecutor(most, "request")
        self.accepted, self.stopping = 0, False
        self.lock = threading.Lock()  # of what requests' threads share: the groups, and the counts
        self.groups: dict[tuple[str, int], Group] = {}
        self.counts: Counter[str] = Counter()
        self.seen = time.monotonic(), 0  # at the last look at the metrics: when, and how many tokens
        self.posts = {"/judge": self.judged, "/rank": self.ranked, "/reward": self.rewarded}
        self.posts |= {"/openrlhf": self.openrlhf, "/v1/chat/completions": self.chat}
        self.gets = {"/health": self.health, "/metrics": self.metrics, "/v1/models": self.models}

    # ------------------------------------------------------------------ in the I/O loop

    def admit(self, call: Call) -> None:
        given = call.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.key and call.path != "/health" and not hmac.compare_digest(given, self.key.encode()):
            self.count_request(call, 401)
            raise Refusal(401, "give the key: Authorization: Bearer KEY", www_authenticate="Bearer")

    def count_request(self, call: Call, status: int) -> None:
        path = call.path if call.path in {*self.posts, *self.gets} else "other"
        with self.lock:
            self.counts[f'requests_total{{path="{path}",status="{status}"}}'] += 1

    async def answer(self, call: Call) -> Answer:
        try:
            found = await self._answer(call)
        except Refusal as refusal:
            found = refusal.answer
        self.count_request(call, found.status)
        return found

    async def _answer(self, call: Call) -> Answer:
        if call.path not in {*self.posts, *self.gets}:
            there = ", ".join([*self.posts, *self.gets])
            raise Refusal(404, f"nothing is at {call.path:.60}; there are {there}")
        wanted = "POST" if call.path in self.posts else "GET"
        if ("GET" if call.method == "HEAD" else call.method) != wanted:
            raise Refusal(405, f"{call.path} takes {wanted}", allow=wanted)
        if wanted == "GET":
            return self.gets[call.path]()
        # A web page in somebody's browser may send other kinds anywhere, without asking first.
        if call.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "send JSON, as Content-Type: application/json")
        if self.stopping:
            raise Refusal(503, "the server is stopping", retry_after="5")
        if self.accepted >= self.most:
            raise Refusal(429, f"{self.accepted} requests are being worked on; come again", retry_after="1")
        return await self._accept(call)

    async def _accept(self, call: Call) -> Answer:
        ticket = Ticket()
        self.accepted += 1
        work = asyncio.get_running_loop().run_in_executor(self.pool, self._work, call, ticket)
        work.add_done_callback(self._done)
        try:
            return await asyncio.wait_for(asyncio.shield(work), self.timeout)
        except TimeoutError:
            self.thread.cut(ticket)
            raise Refusal(504, f"no answer within {self.timeout:g} seconds; ask for less at once") from None
        except asyncio.CancelledError:  # the client has left
            self.thread.cut(ticket)
            raise

    def _done(self, work: asyncio.Future) -> None:
        self.accepted -= 1
        work.exception()  # if there is one, and nobody is left to be told

    def health(self) -> Answer:
        state = {"status": "stopping" if self.stopping else "ok", "model": self.name}
        return as_json(state, 503 if self.stopping else 200)

    def models(self) -> Answer:
        model = {"id": self.name, "object": "model", "owned_by": "gramr2"}
        return as_json({"object": "list", "data": [model]})

    def metrics(self) -> Answer:
        """Prometheus' text. The tokens per second are those since the last look."""
        (then, before), (now, tokens) = self.seen, (time.monotonic(), self.thread.tokens)
        self.seen = now, tokens
        scheduler = self.thread.batch.scheduler
        found: JsonRow = {"requests_accepted": self.accepted, "requests_most": self.most}
        left = sum(each.left for each in list(self.thread.open.values()))
        found |= {"samples_left": left, "samples_running": len(scheduler.running), "tokens_total": tokens}
        found |= {"tokens_per_second": round((tokens - before) / max(now - then, 1e-3), 1)}
        found |= {"cache_pages": scheduler.pool.num_pages, "cache_pages_used": scheduler.pool.used}
        with self.lock:
            found |= {"votes_total": 0, "abstentions_total": 0} | self.counts
        lines = []
        for name, value in sorted(found.items()):
            plain, kind = name.partition("{")[0], "counter" if "_total" in name else "gauge"
            if (head := f"# TYPE gramr2_{plain} {kind}") not in lines:
                lines.append(head)
            lines.append(f"gramr2_{name} {value}")
        return Answer("\n".join([*lines, ""]).encode(), 200, {"Content-Type": "text/plain; version=0.0.4"})

    # ------------------------------------------------------------------ in a request's own thread

    def _work(self, call: Call, ticket: Ticket) -> Answer:
        TICKET.set(ticket)
        try:
            body = parse_json(call.body)
            need(isinstance(body, dict), "the body should be a JSON object")
            return as_json(self.posts[call.path](body, call.query))
        except ValueError as error:  # InputError among them
            raise Refusal(400, str(error)) from None
        except Cut:
            raise Refusal(503, "the request was cut") from None
        except Exception as error:
            print(f"error: {call.path}: {error!r}", file=sys.stderr, flush=True)
            raise Refusal(500, f"the server failed: {type(error).__name__}") from None

    def settings(self, body: JsonRow) -> JsonRow:
        """Takes out of a body what it says of how to judge; → that, over what the command line says."""
        said = {
            name: typed(body.pop(name), kind, f'field "{name}"', **limits)
            for name, (kind, limits) in SETTINGS.items() if body.get(name) is not None
        }  # fmt: skip
        usual: JsonRow = self.judge.sampling
        votes = said["votes"] if "votes" in said else usual["votes"]
        if 1 in (votes, usual["votes"]):  # one vote is greedy, and more are not
            usual = usual | {"temperature": float(votes > 1)}
        return usual | said | {"progress": False}

    def count(self, judged: Iterable[Judgment | InputError]) -> None:
        with self.lock:
            for each in judged:
                votes = {} if isinstance(each, InputError) else each.votes
                self.counts["votes_total"] += sum(votes.values())
                self.counts["abstentions_total"] += votes.get("none", 0)

    def judged(self, body: JsonRow, query: str) -> JsonRow:
        settings, many = self.settings(body), body.get("pairs")
        rows = typed([body] if many is None else many, list, 'field "pairs"')
        need(0 < len(rows) <= COMPARISONS, f"{len(rows)} pairs; send from 1 to {COMPARISONS} at once")
        pairs = [Pair.from_json(row) for row in rows]
        found = [each for _, each in self.model.judge_many(pairs, **settings, per_call=None)]
        self.count(found)
        if many is None and isinstance(found[0], InputError):
            raise found[0]
        answers = [{"error": str(e)} if isinstance(e, InputError) else e.to_json() for e in found]
        answers = [{"id": pair.id} | each for pair, each in zip(pairs, answers, strict=True)]
        return answers[0] if many is None else {"judgments": answers}

    def ranked(self, body: JsonRow, query: str) -> JsonRow:
        settings, fields = self.settings(body), Fields(body)
        method = fields.get("method", str, "merge", among=METHODS)
        responses = fields.get("responses", list[str])
        few(len(responses))
        ranking = self.model.rank(messages_of(body), responses, method, **settings)
        self.count(ranking.answers.values())
        return ranking_row(ranking)

    def rewarded(self, body: JsonRow, query: str) -> JsonRow:
        settings, fields = self.settings(body), Fields(body)
        prompts, completions = (fields.get(name, list[str]) for name in ("prompts", "completions"))
        references = fields.get("references", list[str], None)
        return {"rewards": self.rewards(prompts, completions, references, settings)}

    def rewards(self, prompts: list, completions: list, references: list | None, settings: JsonRow) -> list:
        need(len(prompts) <= COMPARISONS, f"{len(prompts)} rollouts; send {COMPARISONS} at most at once")
        if references is None and self.model.format.endings is not None:
            few(*Counter(prompts).values())
        log: list[tuple[Pair, Judgment | InputError]] = []
        found = self.model.reward(prompts, completions, references, **settings, log=log)
        self.count(judgment for _, judgment in log)
        return found

    def openrlhf(self, body: JsonRow, query: str) -> JsonRow:
        settings, fields = self.settings(body), Fields(body)
        queries, prompts = (fields.get(name, list[str]) for name in ("query", "prompts"))
        need(len(queries) == len(prompts), "query and prompts should be as many")
        completions = []
        for asked, prompt in zip(queries, prompts, strict=True):
            place = asked.find(prompt)
            need(place >= 0, "a query should hold its prompt, and its rollout behind it")
            completions.append(without_ends(asked[place + len(prompt) :]))
        labels = fields.get("labels", list, [])
        references = labels if labels and all(isinstance(each, str) and each for each in labels) else None
        size = parse_qs(query).get("group", ["1"])[0]
        need(re.fullmatch("[0-9]{1,3}", size) is not None, f"group={size:.20}: expected a number of rollouts")
        compares = references is None and self.model.format.endings is not None
        if compares and int(size) > 1:
            rewards = self.gathered(prompts, completions, int(size), settings)
        else:
            alone = compares and len(set(prompts)) == len(prompts) > 0
            need(not alone, "a rollout alone compares with nothing: send labels, or ask for ?group=N")
            rewards = self.rewards(prompts, completions, references, settings)
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"judge_reward": rewards}}

    def gathered(self, prompts: list, completions: list, size: int, settings: JsonRow) -> list[float]:
        """Rewards within groups that come in several requests. The first of a group waits for the others, and
        judges all of them."""
        few(size)
        rewards: list[Future[float]] = []
        opened: list[tuple[tuple[str, int], Group]] = []
        for key, completion in zip([(prompt, size) for prompt in prompts], completions, strict=True):
            with self.lock:
                if key not in self.groups:
                    opened.append((key, self.groups.setdefault(key, Group())))
                group = self.groups[key]
                rewards.append(Future())
                group.members.append((completion, rewards[-1], TICKET.get()))
                if len(group.waiting) == size:
                    del self.groups[key]
                    group.full.set()
        TICKET.set(Ticket())  # others wait for what it judges, also if its own client leaves
        for key, group in opened:
            group.full.wait(0 if self.stopping else GATHER)
            with self.lock:
                if self.groups.get(key) is group:  # nobody else has come
                    del self.groups[key]
                    self.counts["groups_not_full_total"] += 1
            members = group.waiting
            for each in group.members:
                if each not in members:
                    each[1].set_exception(Cut())
            try:
                texts = [text for text, *_ in members]
                found = self.rewards([key[0]] * len(texts), texts, None, settings)
            except Exception as error:
                for _, reward, _ in members:
                    reward.set_exception(error)
            else:
                for (_, reward, _), value in zip(members, found, strict=True):
                    reward.set_result(value)
        return [reward.result() for reward in rewards]

    def chat(self, body: JsonRow, query: str) -> JsonRow:
        need(self.model.voter is not None, "a model with a scalar head writes nothing")
        decoder, tokenizer, fields = self.decoder, self.model.tokenizer, Fields(body)
        need(fields.get("model", str, self.name) == self.name, f"model: this server has {self.name}")
        turns = [as_turn(each) for each in fields.get("messages", list[dict])]
        need(len(turns) > 0, "messages: expected one at least")
        ids = tokenizer.chat(turns)
        room = decoder.config.max_positions - len(ids)
        need(room > 0, f"{len(ids)} tokens of messages leave no room for an answer")
        usual = fields.get("max_tokens", int, self.judge.sampling["max_new_tokens"], low=1)
        most = fields.get("max_completion_tokens", int, usual, low=1)
        options: JsonRow = {"n": fields.get("n", int, 1, low=1, high=VOTES)}
        options["seed"] = fields.get("seed", int, 0, **SEEDS)
        for name, default in ("temperature", 1.0), ("top_p", 1.0), ("top_k", 0):
            options[name] = fields.get(name, SAMPLING[name][0], default, **SAMPLING[name][1])
        stops = fields.get("stop", tuple[str, ...], ())
        need(
            len(stops) <= 4 and all(len(each) <= 100 for each in stops), "stop: expected up to 4 short texts"
        )
        served = {"model", "messages", "max_tokens", "max_completion_tokens", "stop", *options, *HARMLESS}
        more = ", ".join(name for name in body if body[name] and name not in served)
        need(not more, f"not served: {more:.80}; leave it out")
        options |= {"max_new_tokens": min(most, room), "stop_texts": stops, "tokenizer": tokenizer}
        samples = self.thread.generate(decoder, [ids], **options)[0]
        choices = []
        for number, sample in enumerate(samples):
            need(sample.finish != "error", "the model's logits are not finite")
            text = tokenizer.decode(sample.ids)
            for stop in stops:
                text = text.partition(stop)[0]
            message = {"role": "assistant", "content": text}
            choices.append({"index": number, "message": message, "finish_reason": sample.finish})
        drawn = sum(len(each.ids) for each in samples)
        usage = {"prompt_tokens": len(ids), "completion_tokens": drawn, "total_tokens": len(ids) + drawn}
        about: JsonRow = {"id": f"chatcmpl-{os.urandom(12).hex()}", "object": "chat.completion"}
        about |= {"created": int(time.time()), "model": self.name}
        return about | {"choices": choices, "usage": usage}


def few(*sizes: int) -> None:
    """Each against each of these many is not more than a request may ask for."""
    asked = sum(n * (n - 1) // 2 for n in sizes)
    need(asked <= COMPARISONS, f"{asked} comparisons; a request may ask for {COMPARISONS}")


def without_ends(text: str) -> str:
    """A rollout as a reader sees it."""
    for _ in range(8):
        kept = text.rstrip()
        if found := END.search(kept, max(0, len(kept) - 48)):
            text = kept[: found.start()]
    return text


def as_turn(row: JsonRow) -> JsonRow:
    """A message of OpenAI's, whose content may be a list of texts."""
    fields, content = Fields(row, "messages: "), row.get("content")
    if isinstance(content, list):
        parts = [Fields(part, "messages: content: ") for part in content]
        content = "".join(part.get("text", str) for part in parts)
    return {"role": fields.get("role", str), "content": typed(content, str, 'messages: field "content"')}


# ---------------------------------------------------------------------------------- the command


def read_key(host: str, path: Path | None) -> str | None:
    """The key that callers must know: whoever is let in from elsewhere needs one."""
    if path:
        key = read_text(path).strip()
        is_key = re.fullmatch("[!-~]{16,200}", key) is not None
        need(is_key, f"{path}: expected a key of 16 letters or more, on one line")
        return key
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False
    need(is_here, f"--host {host}: others could come in; give --api-key-file FILE as well")
    return None


def serve(judge: Judge, host: str, port: int, key: str | None, most: int, timeout: float) -> int:
    """Until it is told to stop; → the exit status."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * CONNECTIONS + 256)), hard))
    return asyncio.run(_serve(judge, host, port, key, most, timeout))


async def _serve(judge: Judge, host: str, port: int, key: str | None, most: int, timeout: float) -> int:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    server = JudgeServer(judge, key, most, timeout, lambda: loop.call_soon_threadsafe(stop.set))
    told: list[float] = []

    def tell() -> None:
        told.append(time.monotonic())
        if told[-1] - told[0] > AGAIN:  # not waited for
            os._exit(130)
        stop.set()

    for kind in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(kind, tell)
    http = HttpServer(server.answer, server.admit)
    try:
        port = await http.open(host, port)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}") from None
    server.thread.start()
    print(f"serving {server.name} at http://{host}:{port}", file=sys.stderr, flush=True)
    await stop.wait()
    server.stopping = True
    for group in [*server.groups.values()]:
        group.full.set()
    print(f"stopping: {server.accepted} requests are answered first", file=sys.stderr, flush=True)
    while server.accepted:
        await asyncio.sleep(0.01)
    await http.close()
    server.pool.shutdown()
    failure = server.thread.failure
    server.thread.end()
    if failure:
        raise failure
    return 0
