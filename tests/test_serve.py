"""A served judge: answers as if alone, whatever comes, leaves, or is no request at all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, make_random_judge
from served import Client, Here, Served, metrics, once, until

from gramr2.extras import http_server, serve
from gramr2.extras.bulk import Judge, JudgeSettings
from gramr2.files import InputError, parse_json
from gramr2.judge import RewardModel
from gramr2.records import Pair
from gramr2.sampler import generate

SETTINGS = JudgeSettings(None, None, None, "cpu", "float32", 2, 0, False, {"max_new_tokens": 24})


def make_judge(place: Path, **settings) -> Judge:
    return Judge(replace(SETTINGS, model=place, **settings))


def pair(number: int) -> dict:
    return {"question": f"What is {number}?", "response_a": f"It is {number}.", "response_b": "No idea."}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """All that it writes depends on its noise."""
    return make_random_judge(tmp_path_factory.mktemp("serve") / "model", max_positions=600)


@pytest.fixture(scope="module")
def here(place):
    here = Here(make_judge(place))
    yield here
    here.close()


@pytest.fixture(scope="module")
def labels(place):
    """It judges by its first token: a probability for each pair."""
    here = Here(make_judge(place, format="label"))
    yield here
    here.close()


LONG = {"votes": 8, "max_new_tokens": 500}  # seconds of work, for those who will not wait for it


def test_every_caller_gets_what_it_would_get_alone(here, place):
    """Twelve at once, who choose tokens in four ways, beside three who leave."""
    ways = {}, {"votes": 1}, {"temperature": 0.7, "top_k": 5}, {"votes": 4, "top_p": 0.9}
    rows = [pair(i) | ways[i % 4] | {"seed": i} for i in range(12)]

    async def leave():
        client = Client(here.port)
        await client.send("/judge", pair(99) | LONG)
        await until(here.port, lambda found: found["samples_running"] > 0)
        client.close()

    async def everybody():
        await asyncio.gather(*(leave() for _ in range(3)))
        return await asyncio.gather(*(once(here.port, "/judge", row) for row in rows))

    answers = asyncio.run(everybody())
    judge = make_judge(place)
    for i, (status, body) in enumerate(answers):
        sampling = judge.sampling | {"temperature": 0.0 if i % 4 == 1 else 1.0, "seed": i} | ways[i % 4]
        ((asked, alone),) = judge.model.judge_many([Pair.from_json(pair(i))], **sampling, progress=False)
        assert (status, json.loads(body)) == (200, json.loads(json.dumps({"id": asked.id} | alone.to_json())))


def test_many_pairs_in_one_request_and_one_that_cannot_be_judged(here):
    long = pair(1) | {"question": "word " * 900}
    status, found = here.ask("/judge", {"pairs": [pair(0), long, pair(2)], "seed": 5})
    assert status == 200
    assert found["judgments"][0] == here.ask("/judge", pair(0) | {"seed": 5})[1]
    assert "tokens are too many" in found["judgments"][1]["error"]
    assert found["judgments"][2]["votes"] == {"A": 0, "B": 0, "none": 2}
    assert here.ask("/judge", long)[0] == 400


# ---------------------------------------------------------------------------------- rewards


GROUPS = [
    ("Which?", [f"Number {i}." for i in (4, 0, 3, 1)]),
    ("What?", ["This.", "That.", "Neither of these."]),
]


def test_rewards_and_rankings_are_those_of_the_library_to_the_digit(labels, place):
    judge = make_judge(place, format="label")
    prompts, completions = zip(*[(q, text) for q, texts in GROUPS for text in texts], strict=True)
    wanted = judge.model.reward(prompts, completions, votes=2, progress=False)
    assert len(set(wanted)) > 3, "a test of nothing"
    row = {"prompts": prompts, "completions": completions}
    assert labels.ask("/reward", row) == (200, {"rewards": wanted})
    references = ["It depends."] * len(prompts)
    against = judge.model.reward(prompts, completions, references, votes=2, progress=False)
    assert labels.ask("/reward", row | {"references": references}) == (200, {"rewards": against})
    ranking = judge.model.rank("Which?", GROUPS[0][1], "knockout", votes=2, progress=False)
    found = labels.ask("/rank", {"question": "Which?", "responses": GROUPS[0][1], "method": "knockout"})
    assert found[1]["order"] == ranking.order and found[1]["comparisons"] == ranking.comparisons
    queries = [f"<s>{p}{c}<|im_end|>\n</s>" for p, c in zip(prompts, completions, strict=True)]
    remote = {"query": queries, "prompts": prompts, "labels": [""] * len(prompts)}
    both = {"rewards": wanted, "scores": wanted, "extra_logs": {"judge_reward": wanted}}
    assert labels.ask("/openrlhf", remote) == (200, both)
    assert labels.ask("/openrlhf", remote | {"labels": references})[1]["rewards"] == against
    # Of several addresses OpenRLHF asks all, most of them about nothing; a base model's prompt may be empty.
    assert labels.ask("/openrlhf", {"query": [], "prompts": [], "labels": []})[1]["rewards"] == []
    bare = {"query": ["This.", "That."], "prompts": ["", ""], "labels": []}
    alone = judge.model.reward(bare["prompts"], bare["query"], progress=False)
    assert labels.ask("/openrlhf", bare)[1]["rewards"] == alone
    status, said = labels.ask("/reward", row | {"references": []})
    assert status == 400 and "must be as many" in said["error"]["message"]
    status, said = labels.ask("/judge", pair(0) | {"id": "x" * 5000, "question": "word " * 900})
    assert status == 400 and len(said["error"]["message"]) < 1000


def test_a_group_whose_rollouts_come_one_by_one_is_judged_as_one(labels, place):
    """OpenRLHF sends each rollout by itself: what it is compared with must be waited for, in any order."""
    judge, found = make_judge(place, format="label"), {}

    async def everybody():
        members = [(q, text) for q, texts in GROUPS for text in texts[:3]]
        random.Random(0).shuffle(members)
        rows = [{"query": [q + text], "prompts": [q], "labels": [""]} for q, text in members]
        answers = await asyncio.gather(*(once(labels.port, "/openrlhf?group=3", row) for row in rows))
        found.update(zip(members, (json.loads(body)["rewards"] for _, body in answers), strict=True))

    asyncio.run(everybody())
    for question, texts in GROUPS:
        texts = sorted(texts[:3])
        wanted = judge.model.reward([question] * 3, texts, votes=2, progress=False)
        assert [found[question, text] for text in texts] == [[reward] for reward in wanted]
    alone = {"query": ["Which? This."], "prompts": ["Which?"], "labels": [""]}
    assert labels.ask("/openrlhf", alone)[0] == 400  # and not a half for each
    assert not labels.server.groups


def test_a_group_that_stays_too_small_is_judged_as_it_is_and_counted(labels, place, monkeypatch):
    """A trainer whose rollout was lost goes on; that its rewards are of fewer comparisons is not hidden."""
    monkeypatch.setattr(serve, "GATHER", 0.3)
    row = {"query": ["Which? That.", "Which? This."], "prompts": ["Which? "] * 2, "labels": ["", ""]}
    wanted = make_judge(place, format="label").model.reward(
        ["Which? "] * 2, ["That.", "This."], progress=False
    )
    assert labels.ask("/openrlhf?group=3", row)[1]["rewards"] == wanted
    assert asyncio.run(metrics(labels.port))["groups_not_full_total"] == 1


def test_a_rollout_whose_caller_has_left_is_none_of_its_group(labels, place, monkeypatch):
    """It took the place of one that was still to come: who came last waited for a group of its own."""
    monkeypatch.setattr(serve, "GATHER", 20.0)
    asked = [
        {"query": [f"Which? {text}"], "prompts": ["Which? "], "labels": [""]} for text in GROUPS[0][1][:4]
    ]
    monkeypatch.setattr(labels.server, "timeout", 0.3)
    assert labels.ask("/openrlhf?group=3", asked[0])[0] == 504
    monkeypatch.undo()

    async def others():
        return await asyncio.gather(*(once(labels.port, "/openrlhf?group=3", row) for row in asked[1:]))

    found = [json.loads(body).get("rewards") for _, body in asyncio.run(others())]
    texts = [row["query"][0].removeprefix("Which? ") for row in asked[1:]]
    judge = make_judge(place, format="label").model
    wanted = dict(
        zip(sorted(texts), judge.reward(["Which? "] * 3, sorted(texts), progress=False), strict=True)
    )
    assert found == [[wanted[text]] for text in texts]
    assert not labels.server.groups


def test_a_scalar_judge_scores_and_writes_nothing(tmp_path):
    place = make_checkpoint(tmp_path / "model", "llama3", num_labels=1, tie_embeddings=False)
    here = Here(make_judge(place, format="scalar"))
    row = {"prompts": ["Which?"] * 3, "completions": ["This.", "That.", ""]}
    wanted = RewardModel.load(place).reward(**row)
    assert here.ask("/reward", row) == (200, {"rewards": wanted})
    assert here.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})[0] == 400
    assert here.ask("/reward", {"prompts": ["word " * 9000], "completions": ["x"]})[0] == 400
    here.close()


# ---------------------------------------------------------------------------------- OpenAI's manner


def test_the_model_under_the_judge_answers_as_generate_does(here, place):
    name = here.ask("/v1/models")[1]["data"][0]["id"]
    assert name == str(place)
    turns = [{"role": "user", "content": [{"type": "text", "text": "What is 7?"}]}]
    row = {"model": name, "messages": turns, "max_tokens": 12, "n": 2, "seed": 3, "temperature": 0.9}
    status, found = here.ask("/v1/chat/completions", row)
    model, tokenizer = here.server.decoder, here.server.model.tokenizer
    ids = tokenizer.chat([{"role": "user", "content": "What is 7?"}])
    samples = generate(model, [ids], n=2, max_new_tokens=12, seed=3, temperature=0.9, progress=False)[0]
    assert [c["message"]["content"] for c in found["choices"]] == [tokenizer.decode(s.ids) for s in samples]
    assert (status, found["usage"]["prompt_tokens"]) == (200, len(ids))
    for more in {"stream": True}, {"tools": [{}]}, {"model": "gpt-4o"}, {"logprobs": True}, {"messages": []}:
        status, said = here.ask("/v1/chat/completions", row | more)
        assert status == 400 and len(said["error"]["message"]) < 200


# ---------------------------------------------------------------------------------- who leaves, and too many


def test_who_leaves_gives_its_pages_back_and_so_does_who_takes_too_long(here, monkeypatch):
    async def leave():
        clients = [Client(here.port) for _ in range(4)]
        for client in clients:
            await client.send("/judge", pair(0) | LONG)
        await until(here.port, lambda found: found["samples_running"] == 32)
        for client in clients:
            client.close()
        found = await until(here.port, lambda found: found["requests_accepted"] == 0)
        assert (found["cache_pages_used"], found["samples_running"]) == (0, 0)

    asyncio.run(leave())
    monkeypatch.setattr(here.server, "timeout", 0.3)
    assert here.ask("/judge", pair(0) | LONG)[0] == 504
    asyncio.run(until(here.port, lambda found: found["cache_pages_used"] == 0 == found["requests_accepted"]))


def test_a_full_queue_says_when_to_come_again(here, monkeypatch):
    async def two():
        client = Client(here.port)
        await client.send("/judge", pair(0) | LONG)
        await until(here.port, lambda found: found["requests_accepted"] == 1)
        await client.send("/judge", pair(1))  # waits for its turn, unread
        other = Client(here.port)
        status, body = await other.ask("/judge", pair(1))
        found = await other.ask("/health")  # the connection is kept
        client.close()
        return status, body, found

    monkeypatch.setattr(here.server, "most", 1)
    status, body, found = asyncio.run(two())
    assert (status, found[0]) == (429, 200) and b"come again" in body
    asyncio.run(until(here.port, lambda found: found["requests_accepted"] == 0))


def test_a_model_that_fails_is_said_to_everybody_and_ends_the_server(place, capsys):
    here = Here(make_judge(place))

    def launch(step, call):
        raise RuntimeError("out of memory")

    here.server.thread.batch.engine.launch = launch
    said = {"message": "the server failed: RuntimeError", "code": 500}
    assert here.ask("/judge", pair(0)) == (500, {"error": said})
    assert here.ask("/judge", pair(0))[0] == 500
    assert here.ended.wait(10) and "out of memory" in capsys.readouterr().err
    here.close()


def test_told_to_stop_it_answers_what_was_accepted_and_refuses_what_comes(place, tmp_path):
    """As a user starts it, with a key; exit status 0."""
    (tmp_path / "key").write_text("0123456789abcdef\n")
    key = {"authorization": "Bearer 0123456789abcdef"}
    server = Served("--model", place, "--device", "cpu", "--api-key-file", tmp_path / "key")

    async def stop():
        port = server.port
        assert (await once(port, "/judge", pair(0)))[0] == 401
        stranger = Client(port)  # is not waited for: his body would take the room of others
        await stranger.send("/judge", **{"content-length": str(http_server.BODY)})
        assert (await stranger.receive())[0] == 401
        assert (await once(port, "/metrics", authorization="Bearer 0123456789abcdeF"))[0] == 401
        clients = [Client(port) for _ in range(5)]
        for client in clients:
            await client.send("/judge", pair(0) | {"votes": 8, "max_new_tokens": 200}, **key)
        while b"requests_accepted 5" not in (await once(port, "/metrics", **key))[1]:
            pass
        server.process.send_signal(signal.SIGTERM)
        while (await once(port, "/health"))[0] == 200:
            pass
        late = await once(port, "/judge", pair(1), **key)
        return late, [await client.receive() for client in clients]

    late, answers = asyncio.run(stop())
    assert late[0] == 503 and [status for status, _ in answers] == [200] * 5
    assert server.end() == 0


def test_whoever_lets_others_in_gives_a_key(tmp_path):
    for host in "127.0.0.1", "localhost", "::1", "127.9.9.9":
        assert serve.read_key(host, None) is None
    for host in "0.0.0.0", "::", "example.org", "192.168.0.7":
        with pytest.raises(InputError, match="--api-key-file"):
            serve.read_key(host, None)
    (tmp_path / "key").write_text("short\n")
    with pytest.raises(InputError, match="16 letters"):
        serve.read_key("0.0.0.0", tmp_path / "key")


# ---------------------------------------------------------------------------------- what is no request


PATHS = "/judge", "/rank", "/reward", "/openrlhf", "/v1/chat/completions"
ODD = [None, True, -1, 10**30, 0.5, "", "x", [], {}, [[]], {"a": 1}, [None], "\ud800", "A" * 5000]
NAMES = ["question", "messages", "response_a", "response_b", "pairs", "responses", "method", "prompts"]
NAMES += ["completions", "references", "query", "labels", "votes", "seed", "temperature", "max_new_tokens"]
NAMES += ["n", "stop", "model", "id", "label"]


def fuzzed(draw: random.Random) -> bytes:
    """A body that is no good: damaged bytes, or a good row with odd values."""
    row = {name: draw.choice(ODD) for name in draw.sample(NAMES, draw.randrange(8))}
    if draw.random() < 0.3:
        row |= {"messages": [{"role": "user", "content": draw.choice([None, True, 7, {}, [None], [[]]])}]}
    body = bytearray(json.dumps(draw.choice([row, row, row, list(row), draw.choice(ODD)])).encode())
    if draw.random() < 0.5:
        for _ in range(draw.randrange(1, 6)):
            body[draw.randrange(len(body)) if body else 0 : draw.randrange(len(body) + 1)] = draw.randbytes(3)
    return bytes(body)


def test_200_fuzzed_bodies_are_refused_in_one_line_and_the_server_lives(here):
    draw = random.Random(0)

    async def all_of_them():
        client = Client(here.port)
        for path in itertools.islice(itertools.cycle(PATHS), 200):
            status, answer = await client.ask(path, body=(body := fuzzed(draw)))
            said = parse_json(answer)["error"]["message"]
            assert 400 <= status < 500 and answer.count(b"\n") == 1 and said, (path, body, status, answer)

    asyncio.run(all_of_them())
    assert here.ask("/judge", pair(0))[0] == 200


POST = b"POST /judge HTTP/1.1\r\nContent-Type: application/json\r\n"
NO_REQUESTS = {
    "noise": (b"\x00\xff\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 400),
    "no header": (b"GET / HTTP/1.1\r\nname\r\n\r\n", 400),
    "folded": (b"GET / HTTP/1.1\r\na: b\r\n c\r\n\r\n", 400),
    "a long head": (b"GET / HTTP/1.1\r\na: " + b"x" * (1 << 17) + b"\r\n\r\n", 431),
    "chunked": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    "both": (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 411),
    "no length": (POST + b"\r\n{}", 411),
    "a sign": (POST + b"Content-Length: +2\r\n\r\n{}", 400),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    "too long": (POST + b"Content-Length: 99999999\r\n\r\n" + b"x" * 100_000, 413),
    "not JSON by its type": (b"POST /judge HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 415),
    "another method": (b"DELETE /judge HTTP/1.1\r\n\r\n", 405),
    "a path": (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
    "half a body": (POST + b"Content-Length: 20\r\n\r\n{}", 408),
}


@pytest.mark.parametrize("name", NO_REQUESTS)
def test_what_is_no_request_is_refused(here, monkeypatch, name):
    monkeypatch.setattr(http_server, "SECONDS", 0.5)
    monkeypatch.setattr(http_server, "LINGER", 0.1)
    sent, wanted = NO_REQUESTS[name]

    async def speak():
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(sent)
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1]))
        writer.close()
        return int(head.split()[1]), json.loads(body)

    status, said = asyncio.run(speak())
    assert status == wanted == said["error"]["code"] and said["error"]["message"]


def test_requests_sent_ahead_are_answered_in_their_order_and_slow_ones_let_go(here, monkeypatch):
    async def speak():
        client = Client(here.port)
        for path in "/health", "/nothing", "/v1/models", "/health":
            await client.send(path)
        ahead = [(await client.receive())[0] for _ in range(4)]
        monkeypatch.setattr(http_server, "SECONDS", 0.2)
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(b"GET /health HT")  # and no more
        return ahead, await reader.read()

    assert asyncio.run(speak()) == ([200, 404, 200, 200], b"")


def test_an_answer_to_head_has_no_body_that_would_be_taken_for_the_next_answer(here):
    """Load balancers ask so whether a server is there."""

    async def speak():
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        for path in b"/health", b"/judge":
            writer.write(b"HEAD " + path + b" HTTP/1.1\r\n\r\n")
        writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        return await reader.read()

    answers = asyncio.run(speak()).split(b"HTTP/1.1 ")[1:]
    assert [each[:3] for each in answers] == [b"200", b"405", b"200"]
    assert [each.partition(b"\r\n\r\n")[2][:1] for each in answers] == [b"", b"", b"{"]


def test_who_never_reads_his_answer_is_let_go(monkeypatch):
    """Closing politely would wait until he has read it all: his socket and his answer would stay for ever."""
    monkeypatch.setattr(http_server, "SECONDS", 0.3)
    size = 1 << 25

    async def speak():
        async def answer(call):
            return http_server.Answer(bytes(size))

        server = http_server.HttpServer(answer, lambda call: None)
        port = await server.open("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await asyncio.sleep(1)
        found = 0
        with contextlib.suppress(ConnectionError):
            while piece := await asyncio.wait_for(reader.read(1 << 16), 5):
                found += len(piece)
        await server.close()
        return found

    assert asyncio.run(speak()) < size


def test_metrics_are_what_prometheus_reads(here):
    here.ask("/judge", pair(3))
    status, text = asyncio.run(once(here.port, "/metrics"))
    kinds = dict(re.findall(r"^# TYPE (\w+) (counter|gauge)$", text.decode(), re.MULTILINE))
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    sample = re.compile(r'(\w+)(\{\w+="[^"]*",\w+="\d+"\})? [\d.]+')
    assert status == 200 and {sample.fullmatch(line)[1] for line in lines} == kinds.keys()
    found = asyncio.run(metrics(here.port))
    assert found["abstentions_total"] == found["votes_total"] > 0 == found["cache_pages_used"]
