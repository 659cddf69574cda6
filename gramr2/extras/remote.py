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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gramr2 import prompts
from gramr2.fields import Fields
from gramr2.files import InputError, JsonRow, need, parse_json, read_text
from gramr2.judge import Judged, RewardModel
from gramr2.kernels.choice import noise_seed
from gramr2.records import Judgment, Messages, Pair
from gramr2.votes import SCALAR, THINK, Answer, Answers, Asker, Format, Query

KEY = "GRAMR2_API_KEY"  # the environment variable
TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 1.0, 60.0  # of one request; seconds between two tries
LONGEST_ASKED_WAIT = 600.0  # that an endpoint's Retry-After is followed
SECONDS = 900.0  # for one answer: a reasoning judge writes long
MOST_BYTES = 1 << 26  # of an answer
PASSING = {408, 409, 425, 429}  # and 5xx
FOR_ALL = {401, 402, 404, 405}  # what one request meets every other would: key, money, address
SCORERS = ("classify", "pooling", "get_reward")
TOP_LOGPROBS = 20  # alternatives at each token that are asked for
PAIRS_PER_CALL = 512
MOST_IN_A_ROW = 32  # requests of which all tries failed: nobody is there

Made = TypeVar("Made")


class Endpoint:
    """An address that is asked in threads, and what it has cost."""

    def __init__(self, url: str, in_flight: int):
        self.url, _, self.name = url.partition("#")
        self.url = self.url.rstrip("/")
        parts = urlsplit(self.url)
        sound = parts.scheme in ("http", "https") and parts.hostname and not parts.query
        need(bool(sound), f"{self.url}: expected http://HOST[:PORT]/PATH#NAME")
        need("@" not in parts.netloc, f"--model: no name or key inside an address; put the key into {KEY}")
        self.kind = parts.path.rpartition("/")[2] if parts.path.endswith(SCORERS) else "chat"
        need(self.kind == "get_reward" or self.name != "", f"{self.url}: say which model: {self.url}#NAME")
        self.key = os.environ.get(KEY, "").strip()
        need(self.key.isascii() and self.key.isprintable(), f"{KEY}: holds what no key does")
        # A thread for each request that is under way, and one for each pair that waits for its requests.
        self.requests, self.pairs = ThreadPool(in_flight), ThreadPool(in_flight)
        self.lock, self.not_before, self.in_a_row = threading.Lock(), 0.0, 0
        self.asked = self.again = self.tokens_in = self.tokens_out = 0
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
                used = answer.object("usage")
                with self.lock:
                    self.asked, self.in_a_row = self.asked + 1, 0
                    self.tokens_in += used.get("prompt_tokens", int, 0)
                    self.tokens_out += used.get("completion_tokens", int, 0)
                return found
            except urllib.error.HTTPError as error:
                said, asked_wait = self._said(error), _seconds(error.headers.get("Retry-After"))
                if error.code in FOR_ALL:
                    self.refused = InputError(f"{said}; look at --model and at {KEY}")
                if error.code not in PASSING and error.code < 500:
                    raise self.refused or Declined(said) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                said, asked_wait = self._without_key(error), 0.0
            with self.lock:
                self.again += 1
                self.not_before = max(self.not_before, time.monotonic() + asked_wait)  # for all requests
            if number < TRIES:
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (number - 1)) * random.uniform(0.5, 1))
        self.in_a_row += 1
        failed = InputError(f"{said} ({TRIES} tries)")
        if self.in_a_row >= MOST_IN_A_ROW:
            self.refused = InputError(f"{failed}, {self.in_a_row} times in a row; the same command goes on")
        raise failed

    def _once(self, path: str, body: JsonRow) -> bytes:
        """The body of an answer, within SECONDS for all of it."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        content, latest = b"", time.monotonic() + SECONDS
        with self.opener.open(request, timeout=SECONDS) as response:
            while piece := response.read1(1 << 16):
                content += piece
                if len(content) > MOST_BYTES or time.monotonic() > latest:
                    raise ValueError("the answer has no end")
        return content

    def _said(self, error: urllib.error.HTTPError) -> str:
        """An endpoint's refusal, on one line."""
        said = error.reason
        with contextlib.suppress(OSError, http.client.HTTPException):
            said = " ".join(error.read(2000).decode("utf-8", "replace").split()) or said
        return self._without_key(f"{error.code} {said}")

    def _without_key(self, error: Any) -> str:
        said = str(error).replace(self.key, f"[{KEY}]") if self.key else str(error)
        return f"{self.url}: {said[:400]}"

    @property
    def cost(self) -> str:
        failed = f", {self.again:,} failed tries" if self.again else ""
        return f"{self.asked:,} answers, {self.tokens_in:,} tokens in, {self.tokens_out:,} out{failed}"


class Declined(InputError):
    """A request that an endpoint does not take as it is."""


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follows none: the key and the texts are for the host that was named."""


def _seconds(retry_after: str | None) -> float:
    """How long a Retry-After asks us to wait. (A date is passed over: endpoints give seconds.)"""
    try:
        return min(max(0.0, float(retry_after or 0)), LONGEST_ASKED_WAIT)
    except ValueError:
        return 0.0


# ---------------------------------------------------------------------------------- verdicts


class EndpointVoter(Asker):
    """Asks for votes at `/chat/completions`, a request for each."""

    def __init__(self, endpoint: Endpoint, template: str, format: Format):
        super().__init__(template, format)
        self.endpoint = endpoint
        self.words: dict[str, str] = {}  # of the protocol, as it has them; "": it has none

    def ask(self, pair: Pair, order: str) -> Query:
        turns = [("user", self.content(pair, order))]
        if self.format.roles:
            shown = pair.swapped() if order == "BA" else pair
            turns = [*pair.messages, ("response_1", shown.response_a), ("response_2", shown.response_b)]
        messages = [{"role": role, "content": text} for role, text in turns]
        return Query(f"{pair.id} {order}", order, messages)

    def answers(self, queries: Sequence[Query], n: int, seed: int, most: int, **sampling: Any) -> Answers:
        asked = []
        for query in queries:
            seeds = [noise_seed(seed, query.key, number) % 2**31 for number in range(n)]
            every = [(query.prompt, each, most, sampling) for each in seeds]
            asked.append([self.endpoint.requests.apply_async(self._answer, each) for each in every])
        return [[each.get() for each in one] for one in asked]

    def _answer(self, messages: list[JsonRow], seed: int, most: int, sampling: JsonRow) -> Answer:
        how: JsonRow = {"temperature": sampling["temperature"], "top_p": sampling["top_p"]}
        how |= {"top_k": sampling["top_k"]} if sampling["top_k"] else {}
        how |= {"max_tokens": most, "seed": seed, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        while True:
            words = dict(self.words)
            body = {words.get(name, name): value for name, value in how.items() if words.get(name, name)}
            body |= {"model": self.endpoint.name, "messages": messages}
            try:
                return self.endpoint.post("/chat/completions", body, partial(self._read, seed))
            except Declined as error:
                self._learn(str(error))
                if self.words == words:
                    raise

    def _learn(self, said: str) -> None:
        """From a refusal that names what can be left out, or said in another word."""
        if "logprobs" in said:
            self.words |= {"logprobs": "", "top_logprobs": ""}
        elif "max_completion_tokens" in said:
            self.words["max_tokens"] = "max_completion_tokens"
        elif re.search(r"\bseed\b", said):
            self.words["seed"] = ""

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
            letter = None if self.format.roles else _LETTER.search(text, start)  # a scale has no two letters
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
    whole, said, own = b"".join(token for token, _ in spelled), content.encode(), letter[0]
    place = whole.rfind(said) + len(content[: letter.start() - before].encode())
    a, b = (own, _OTHER[own]) if own in "Aa1" else (_OTHER[own], own)
    for token, likely in spelled if said in whole else ():
        if place < len(token):
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

    def __init__(self, url: str, prompt: Path | None, format: Format | None, in_flight: int):
        """The model that a URL names, with the prompt of a file or the format's own."""
        self.endpoint = Endpoint(url, in_flight)
        scores = self.endpoint.kind != "chat"
        self.format = format or (SCALAR if scores else THINK)
        need(scores == (self.format == SCALAR), f"{url}: cannot be read as {self.format.name}")
        need(not (prompt and (scores or self.format.roles)), f"--prompt: {url} is asked none of ours")
        self.template = prompts.check_template(read_text(prompt) if prompt else self.format.prompt)
        self.voter = None if scores else EndpointVoter(self.endpoint, self.template, self.format)
        self.calibration, self.weights = {}, ""

    def _judged(self, calls: Iterable[list[Pair]], *how: Any, **sampling: Any) -> Iterator[Judged]:
        """Pair by pair: what one of them meets is its own, and is known as soon as it is there."""

        def judged(pair: Pair) -> Judgment | InputError:
            try:
                found = self.voter.judgments([pair], *how, **sampling)[0] if self.voter else None
            except InputError as error:
                return InputError(f"pair {pair.id}: {error}")
            return found or self._compare_scores(pair)

        for together in calls:
            for pair, judgment in zip(together, self.endpoint.pairs.imap(judged, together), strict=True):
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
        return self.endpoint.requests.apply(self.endpoint.post, ("", body, _read_score))


def _read_score(fields: Fields) -> float:
    """vLLM: data[0].probs, or data[0].data, of which the last token's counts. OpenRLHF: rewards[0]."""
    found = fields.row.get("rewards")
    if found is None:
        first = Fields((fields.get("data", list) or [None])[0], "data: ")
        found = first.get("probs" if "probs" in first.row else "data", list)
        found = found[-1] if found and isinstance(found[-1], list) else found
    need(isinstance(found, list) and len(found) == 1, "not one number for a response")
    return Fields({"score": found[0]}).get("score", float)
