"""Judges elsewhere: a model behind somebody's HTTP endpoint in the place of one that is here.

`--model URL#NAME` names it; the URL's last word says what it speaks. `…/classify` and `…/pooling` (vLLM) and
`…/get_reward` (an OpenRLHF reward server) score a response by itself, as a discriminative model does.
Anything else is an OpenAI-compatible base, as `https://api.openai.com/v1`: `/chat/completions` there is asked
with our prompts, a request for each vote, and the chat frame is the endpoint's own. So are all settings of
sampling that the protocol has no word for.

A verdict's probability is that of its letter against the other one among the endpoint's `top_logprobs`, at
the token in which the verdict's letter stands. Where the other letter is not among them, it is at most as
likely as the last of them, and is taken for that; where there are none at all, a vote is worth its letter.

A request that fails for reasons that pass (no connection, no answer in time, 408, 409, 425, 429, 5xx, a body
that is none) is tried again, later each time; what an endpoint refuses is an error of its pair; and what it
would refuse of every pair ends the run. The key is taken from GRAMR2_API_KEY and goes to the named host
alone: no redirection is followed, and nothing that is written holds it.

It leaves out: verdicts that are begun for the judge (an endpoint does not go on with a prefilled answer), so
none is scored that was not sampled; calibration; prompts in another shape than one user's turn.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gramr2 import prompts
from gramr2.fields import Fields
from gramr2.files import InputError, JsonRow, need, parse_json, read_text
from gramr2.judge import RewardModel
from gramr2.kernels.choice import noise_seed
from gramr2.records import Judgment, Messages, Pair
from gramr2.votes import SCALAR, THINK, Answer, Asker, Format, Query

KEY = "GRAMR2_API_KEY"  # the environment variable
TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 1.0, 60.0  # of one request; seconds between two tries
LONGEST_ASKED_WAIT = 600.0  # that an endpoint's Retry-After is followed
SECONDS = 1800.0  # for one answer: a reasoning judge writes long
MOST_BYTES = 1 << 26  # of an answer
PASSING = {408, 409, 425, 429}  # and 5xx
FOR_ALL = {401, 402, 404, 405}  # what one request meets every other would: key, money, address
SCORERS = ("classify", "pooling", "get_reward")
TOP_LOGPROBS = 20, 5  # alternatives at each token that are asked for: first, and where that is refused
PAIRS_PER_CALL = 1024

Given = TypeVar("Given")
Made = TypeVar("Made")


class Endpoint:
    """An address that is asked in threads, and what it has cost."""

    def __init__(self, url: str, in_flight: int):
        self.url, _, self.name = url.partition("#")
        self.url = self.url.rstrip("/")
        parts = urlsplit(self.url)
        sound = parts.scheme in ("http", "https") and parts.hostname and not parts.query
        need(
            bool(sound),
            f"{self.url}: expected http://HOST[:PORT]/PATH#NAME, as https://api.openai.com/v1#NAME",
        )
        need("@" not in parts.netloc, f"--model: no name or key inside an address; put the key into {KEY}")
        self.kind = parts.path.rpartition("/")[2] if parts.path.endswith(SCORERS) else "chat"
        need(self.kind == "get_reward" or self.name != "", f"{self.url}: say which model: {self.url}#NAME")
        self.key = os.environ.get(KEY, "").strip()
        need(self.key.isascii() and self.key.isprintable(), f"{KEY}: holds what no key does")
        self.in_flight = in_flight
        self.requests = Workers(in_flight)  # one for each request that is under way
        self.pairs = Workers(in_flight)  # pairs that wait for their votes' requests
        self.lock, self.not_before, self.asked, self.again = threading.Lock(), 0.0, 0, 0
        self.tokens = {"prompt_tokens": 0, "completion_tokens": 0}
        self.refused: InputError | None = None  # what would be refused of every request
        self.opener = urllib.request.build_opener(_Stay)

    def post(self, path: str, body: JsonRow, read: Callable[[Fields], Made]) -> Made:
        """What `read` finds in the answer to one request. Passing failures are tried again, others raised."""
        for number in range(1, TRIES + 1):
            while (left := self.not_before - time.monotonic()) > 0:
                time.sleep(left)
            if self.refused:
                raise self.refused
            try:
                answer = Fields(parse_json(self._once(path, body)))
                found = read(answer)
                self._count(answer)
                return found
            except urllib.error.HTTPError as error:
                said, asked_wait = self._said(error), _seconds(error.headers.get("Retry-After"))
                if error.code in FOR_ALL:
                    self.refused = InputError(f"{said}; look at --model and at {KEY}")
                if error.code not in PASSING and error.code < 500:
                    raise self.refused or Declined(said) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                said, asked_wait = f"{self.url}: {self._without_key(error)}", None
            with self.lock:
                self.again += 1
                if asked_wait is not None:  # no other request has to hear that again
                    self.not_before = max(self.not_before, time.monotonic() + asked_wait)
            if number < TRIES and asked_wait is None:
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (number - 1))
                time.sleep(wait * random.uniform(0.5, 1))
        raise InputError(f"{said} ({TRIES} tries)")

    def _once(self, path: str, body: JsonRow) -> bytes:
        """The body of an answer, within SECONDS for all of it."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        content, latest = b"", time.monotonic() + SECONDS
        with self.opener.open(request, timeout=SECONDS) as response:
            while piece := response.read1(1 << 16):
                content += piece
                if len(content) > MOST_BYTES or time.monotonic() > latest:
                    raise ValueError("the answer has no end")
        return content

    def _count(self, answer: Fields) -> None:
        used = answer.row.get("usage")
        with self.lock:
            self.asked += 1
            for name in self.tokens if isinstance(used, dict) else ():
                self.tokens[name] += used[name] if type(used.get(name)) is int else 0

    def _said(self, error: urllib.error.HTTPError) -> str:
        """An endpoint's refusal, on one line."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            said = error.read(2000).decode("utf-8", "replace")
            found = re.search(r'"(?:message|detail)"\s*:\s*("(?:[^"\\]|\\.)*")', said)
            with contextlib.suppress(ValueError):
                said = json.loads(found[1]) if found else said
            return f"{self.url}: {error.code} {self._without_key(' '.join(said.split()))[:400]}"
        return f"{self.url}: {error.code} {error.reason}"

    def _without_key(self, text: Any) -> str:
        return str(text).replace(self.key, f"[{KEY}]") if self.key else str(text)

    @property
    def cost(self) -> str:
        tokens = "{prompt_tokens:,} tokens in, {completion_tokens:,} out".format_map(self.tokens)
        return f"{self.asked:,} answers, {tokens}" + (f", {self.again:,} failed tries" if self.again else "")


class Declined(InputError):
    """A request that an endpoint does not take as it is."""


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follows none: the key and the texts are for the host that was named."""


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After asks for: seconds, or a date."""
    try:
        wait = float(retry_after or "")
    except ValueError:
        try:
            wait = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
        except ValueError:
            return None
    return min(max(wait, 0.0), LONGEST_ASKED_WAIT) if math.isfinite(wait) else None


class Workers:
    """Threads that do one piece of work each at a time. Nobody waits for them where the process ends."""

    def __init__(self, count: int):
        self.queue: SimpleQueue[tuple[Future, Callable[[], Any]]] = SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            future, work = self.queue.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def submit(self, work: Callable[[], Made]) -> Future[Made]:
        future: Future[Made] = Future()
        self.queue.put((future, work))
        return future

    def map(self, work: Callable[[Given], Made], items: Iterable[Given], ahead: int) -> Iterator[Made]:
        """Results in the items' order; so many are under way, or wait for an earlier one."""
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(self.submit(partial(work, item)))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---------------------------------------------------------------------------------- verdicts


class EndpointVoter(Asker):
    """Asks for votes at `/chat/completions`, a request for each."""

    def __init__(self, endpoint: Endpoint, template: str, format: Format):
        super().__init__(template, format)
        self.endpoint, self.limit, self.seeded = endpoint, "max_tokens", True
        self.top: int | None = TOP_LOGPROBS[0]

    def ask(self, pair: Pair, order: str) -> Query:
        return Query(f"{pair.id} {order}", order, self.content(pair, order))

    def answers(
        self, queries: Sequence[Query], n: int, seed: int, max_new_tokens: int, **sampling: Any
    ) -> Iterable[Iterable[Answer]]:
        asked = []
        for query in queries:
            seeds = [noise_seed(seed, query.key, number) % 2**31 for number in range(n)]
            works = [partial(self._answer, query.prompt, each, max_new_tokens, sampling) for each in seeds]
            asked.append([self.endpoint.requests.submit(work) for work in works])
        return [[each.result() for each in one] for one in asked]

    def _answer(self, content: str, seed: int, most: int, sampling: JsonRow) -> Answer:
        body: JsonRow = {"model": self.endpoint.name, "messages": [{"role": "user", "content": content}]}
        body |= {name: sampling[name] for name in ("temperature", "top_p")}
        body |= {"top_k": sampling["top_k"]} if sampling["top_k"] else {}
        while True:
            how: JsonRow = {self.limit: most} | ({"seed": seed} if self.seeded else {})
            how |= {"logprobs": True, "top_logprobs": self.top} if self.top else {}
            try:
                return self.endpoint.post("/chat/completions", body | how, partial(self._read, seed))
            except Declined as error:
                if not self._asks_otherwise(how, str(error)):
                    raise

    def _asks_otherwise(self, how: JsonRow, said: str) -> bool:
        """After a refusal that names what can be left out, or said in another word."""
        if "logprobs" in said and "logprobs" in how:
            if how["top_logprobs"] == self.top:  # no other thread was told before
                self.top = TOP_LOGPROBS[1] if self.top == TOP_LOGPROBS[0] else None
        elif "max_completion_tokens" in said and "max_tokens" in how:
            self.limit = "max_completion_tokens"
        elif re.search(r"\bseed\b", said) and "seed" in how:
            self.seeded = False
        else:
            return False
        return True

    def _read(self, seed: int, fields: Fields) -> Answer:
        choice = Fields((fields.get("choices", list) or [None])[0], "choices: ")
        message, finish = choice.object("message"), choice.get("finish_reason", str, "stop")
        content = message.get("content", str, "")
        thinking = message.get("reasoning_content", str, "") or message.get("reasoning", str, "")
        need(content + thinking != "" or finish != "stop", "an empty answer")
        begun = thinking and "think>" not in content
        text = f"<think>\n{thinking}\n</think>\n{content}" if begun else content
        tokens = fields.object("usage").get("completion_tokens", int, 0, low=0)
        spelled = _spelled(choice.object("logprobs").get("content", list, []))
        return Answer(text, finish, seed, tokens, partial(self._p_at, text, content, spelled))

    def _p_at(self, text: str, content: str, spelled: Spelled, start: int) -> tuple[float | None, str]:
        if self.format.parse is None:  # the letter is the first token, and the text has no other
            p_a = _p_among(spelled[0][1], "", "A", "B") if spelled else None
            label = prompts.parse_letter(text.strip(" \n.*")).label
        else:
            letter = _LETTER.search(text, start)
            p_a = _p_where(content, spelled, letter, len(text) - len(content)) if letter else None
            label = self.format.parse(text, self.thinking_open).label
        if p_a is not None or label is None:
            return p_a, "" if p_a is not None else "neither letter can be read"
        return float(label == "A"), "no log-probabilities of the letters: p is the vote itself"


Spelled = list[tuple[bytes, dict[str, float]]]  # each token of an answer, and what might stand in its place
_LETTER = re.compile(r"(?<![A-Za-z])[ABab12](?![A-Za-z0-9])")
_OTHER = dict(zip("ABab12", "BAba21", strict=True))


def _spelled(rows: list) -> Spelled:
    """An answer's tokens with the log-probabilities of all that is known to be likely there."""
    found: Spelled = []
    for row in rows:
        fields = Fields(row, "logprobs: ")
        token = bytes(fields.get("bytes", list, None) or fields.get("token", str).encode())
        every = [fields, *(Fields(each, "top_logprobs: ") for each in fields.get("top_logprobs", list, []))]
        found.append((token, {each.get("token", str): each.get("logprob", float) for each in every}))
    return found


def _p_where(content: str, spelled: Spelled, letter: re.Match, before: int) -> float | None:
    """p(A) where a verdict's letter was sampled; `before`: what the text has before the content."""
    whole, said = b"".join(token for token, _ in spelled), content.encode()
    place = whole.rfind(said) + len(content[: letter.start() - before].encode())
    if said not in whole:
        return None
    for token, likely in spelled:
        if place < len(token):
            own = letter[0]
            a, b = (own, _OTHER[own]) if own in "Aa1" else (_OTHER[own], own)
            return _p_among(likely, token[:place].decode("utf-8", "replace"), a, b)
        place -= len(token)
    return None


def _p_among(likely: dict[str, float], left: str, a: str, b: str) -> float | None:
    """p(A) among the tokens that write A or B behind `left`; a letter that is not among them is taken for as
    likely as the last that is."""
    wanted = [re.compile(re.escape(left.lstrip()) + letter + r"(?![A-Za-z0-9])") for letter in (a, b)]
    both = [sum(math.exp(p) for token, p in likely.items() if each.match(token.lstrip())) for each in wanted]
    if not any(both) or len(likely) < 2:
        return None
    p_a, p_b = (p or math.exp(min(likely.values())) for p in both)
    return p_a / (p_a + p_b)


# ---------------------------------------------------------------------------------- the model


class EndpointModel(RewardModel):
    """A reward model that is elsewhere. It has no weights here, and no calibration."""

    per_call = PAIRS_PER_CALL

    def __init__(self, endpoint: Endpoint, template: str, format: Format):
        self.endpoint, self.template, self.format = endpoint, template, format
        self.voter = EndpointVoter(endpoint, template, format) if format.endings else None
        self.calibration, self.weights = {}, ""

    @classmethod
    def at(cls, url: str, prompt: Any, format: Format | None, in_flight: int) -> EndpointModel:
        """The model that a URL names, with the prompt of a file or the format's own."""
        endpoint = Endpoint(url, in_flight)
        scores = endpoint.kind != "chat"
        format = format or (SCALAR if scores else THINK)
        need(scores == (format == SCALAR), f"{url}: cannot be read as {format.name}")
        need(format.endings is not None or prompt is None, f"--prompt: {url} scores, and is asked none")
        template = (
            prompts.check_template(read_text(prompt), "judge", str(prompt)) if prompt else format.prompt
        )
        return cls(endpoint, template, format)

    def _judged(
        self, calls: Iterable[list[Pair]], votes: int, seed: int, max_new_tokens: int, **sampling: Any
    ) -> Iterator[tuple[Pair, Judgment | InputError]]:
        def judged(pair: Pair) -> Judgment | InputError:
            if self.voter is None:
                return self._compare_scores(pair)
            try:
                return self.voter.judgments([pair], votes, seed, max_new_tokens, **sampling)[0]
            except InputError as error:
                return InputError(f"pair {pair.id}: {error}")

        for together in calls:
            found = self.endpoint.pairs.map(judged, together, 4 * self.endpoint.in_flight)
            for pair, judgment in zip(together, found, strict=True):
                if self.endpoint.refused:
                    raise self.endpoint.refused
                yield pair, judgment

    def score(self, messages: Messages, response: str) -> float:
        """What a scoring endpoint gives a response."""
        turns = [{"role": role, "content": text} for role, text in (*messages, ("assistant", response))]
        body: JsonRow = {"model": self.endpoint.name, "messages": turns, "use_activation": False}
        if self.endpoint.kind == "get_reward":
            question = Pair(messages, "", "").question
            body = {"query": [question + response], "prompts": [question], "labels": [""]}
        return self.endpoint.requests.submit(partial(self.endpoint.post, "", body, _read_score)).result()


def _read_score(fields: Fields) -> float:
    """vLLM: data[0].probs, or data[0].data, of which the last token's counts. OpenRLHF: rewards[0]."""
    found = fields.row.get("rewards")
    if found is None:
        first = Fields((fields.get("data", list) or [None])[0], "data: ")
        found = first.get("probs" if "probs" in first.row else "data", list)
        found = found[-1] if found and isinstance(found[-1], list) else found
    need(
        isinstance(found, list) and len(found) == 1, "not one number for a response: no reward model's score"
    )
    return Fields({"score": found[0]}).get("score", float)
