"""Judges elsewhere: what goes out, what is read from what comes back, and what becomes of all that fails."""

import json
import threading
from collections import Counter

import pytest
from endpoints import SURE, Endpoint
from inferruns import Forks

from gramr2.commands import infer
from gramr2.extras import remote
from gramr2.extras.formats import FORMATS
from gramr2.files import exit_status

WRITING = [name for name, each in FORMATS.items() if each.endings]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Failures that pass do so within the test."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "SECONDS", 0.5)
    monkeypatch.delenv(remote.KEY, raising=False)


def run(capsys, *words) -> tuple[int, str, str]:
    status = exit_status(infer.main, [str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out, said.err


def pairs(path, count):
    """Pairs of which every other one's A is good."""
    texts = ["a good one", "a bad one"]
    rows = [
        {"question": f"q{n}?", "response_a": texts[n % 2], "response_b": texts[n % 2 - 1]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row | {"label": "AB"[n % 2]}) + "\n" for n, row in enumerate(rows)))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge_one(capsys, tmp_path, server, *words):
    place = pairs(tmp_path / "one.json", 1)
    words = ("--pair", place, "--json", "--model", f"{server.base}/v1#some", "--votes", 2, *words)
    status, out, err = run(capsys, *words)
    assert status == 0, err
    return json.loads(out)


# ---------------------------------------------------------------------------------- what is asked and read


@pytest.mark.parametrize("name", WRITING)
def test_each_format_is_asked_in_both_orders_and_read_at_its_letter(name, tmp_path, capsys):
    """p is the letter's own among what the endpoint finds likely there, and is turned back with the order."""
    with Endpoint(FORMATS[name].endings) as server:
        judged = judge_one(capsys, tmp_path, server, "--format", name)
    roles = FORMATS[name].roles
    assert judged["label"] == "A" and judged["p_a"] == pytest.approx(1.0 if roles else SURE)
    assert judged["votes"] == {"A": 2, "B": 0, "none": 0} and judged["orders_agree"]
    path, body, _ = server.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "some" and body["top_logprobs"] == 20
    first = body["messages"][0]["content"]
    assert first == "q0?" if roles else FORMATS[name].prompt.partition("{question}")[0] in first
    assert len({body.get("seed") for _, body, _ in server.asked}) == 2


def test_what_an_endpoint_does_not_know_is_left_out_and_votes_stand_for_themselves(tmp_path, capsys):
    def fails(number, body):
        for field, said in (("top_logprobs", "logprobs is not supported"), ("seed", "no such field: seed"),
                            ("max_tokens", "use 'max_completion_tokens' instead")):  # fmt: skip
            if field in body:
                return 400, said, {}
        return None

    with Endpoint(fails=fails) as server:
        judged = judge_one(capsys, tmp_path, server)
    assert (judged["label"], judged["p_a"], judged["orders_agree"]) == ("A", 1.0, True)
    assert all("the vote itself" in vote["reason"] for vote in judged["details"])
    assert "max_completion_tokens" in server.asked[-1][1] and len(server.asked) <= 2 * 5


def test_a_letter_that_is_not_among_the_likeliest_is_taken_for_the_last_of_them():
    p = remote._p_among({"A": -0.1, "The": -3.0, "x": -5.0}, "", "A", "B")
    assert p == pytest.approx(1 / (1 + 2.718281828 ** (-5.0 + 0.1)))
    assert remote._p_among({" A": -0.5, "A": -1.5, " B": -2.0, "As": -0.1}, "", "A", "B") > 0.8
    assert remote._p_among({"A": -0.1}, "", "A", "B") is None  # nothing is known of the other one


def test_thinking_that_comes_apart_from_the_answer_is_the_rationale(tmp_path, capsys):
    with Endpoint() as server:
        server.thinking = "Feedback:\nResponse A is fine."
        judged = judge_one(capsys, tmp_path, server)
    assert judged["rationale"] == "Feedback:\nResponse A is fine." and judged["p_a"] == pytest.approx(SURE)


def test_an_answer_that_was_cut_or_kept_back_is_no_verdict(tmp_path, capsys):
    def cut(answer):
        answer["choices"][0]["finish_reason"] = "content_filter" if len(server.asked) > 1 else "length"
        return answer

    with Endpoint() as server:
        server.change = cut
        judged = judge_one(capsys, tmp_path, server, "--in-flight", 1)
    assert [vote["reason"] for vote in judged["details"]] == [
        "cut at the length limit",
        "ended by content_filter",
    ]
    assert judged["label"] is None and judged["abstained"] == 2


@pytest.mark.parametrize("path", ["v1/classify#some", "pooling#some", "get_reward"])
def test_scores_come_from_scoring_endpoints(path, tmp_path, capsys):
    place = pairs(tmp_path / "one.json", 1)
    with Endpoint() as server:
        status, out, _ = run(capsys, "--pair", place, "--json", "--model", f"{server.base}/{path}")
    judged, (_, body, _) = json.loads(out), server.asked[0]
    assert status == 0 and judged["label"] == "A" and judged["judge"]["format"] == "scalar"
    assert judged["p_a"] == pytest.approx(0.731 if path == "get_reward" else 0.953, abs=1e-3)
    if path == "get_reward":
        assert body == {"query": ["q0?a good one"], "prompts": ["q0?"], "labels": [""]}
    else:
        assert [turn["role"] for turn in body["messages"]] == ["user", "assistant"]
        assert body["use_activation"] is False


def test_a_list_is_ranked(tmp_path, capsys):
    (tmp_path / "b.json").write_text(json.dumps({"question": "q", "responses": ["bad", "good", "worse"]}))
    with Endpoint() as server:
        words = ("--rank", tmp_path / "b.json", "--model", f"{server.base}/v1#some", "--json", "--votes", 2)
        status, out, _ = run(capsys, *words)
    assert status == 0 and json.loads(out)["best"] == 1


# ---------------------------------------------------------------------------------- what fails


def unsound(number, body):
    """A fifth of the calls fail, each in another way."""
    ways = [500, "garbage", "hang up", "no answer", (429, "slowly", {"Retry-After": "0"}), 503]
    return ways[number // 5 % len(ways)] if number % 5 == 0 else None


def test_failures_that_pass_are_tried_again_and_others_are_rows_that_the_same_command_tries_again(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv(remote.KEY, "key-of-mine")
    source, out = pairs(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    refuses = [True]

    def fails(number, body):
        if refuses[0] and "q7?" in body["messages"][0]["content"]:
            return 400, "too long, key-of-mine", {}
        return unsound(number, body)

    with Endpoint(fails=fails) as server:
        words = ("--pairs", source, "--out", out, "--model", f"{server.base}/v1#some", "--votes", 2, "--json")
        status, said, err = run(capsys, *words)
        assert status == 0 and json.loads(said)["judged"] == 39 and json.loads(said)["failed"] == 1
        assert "tokens in" in err and "failed tries" in err
        (failed,) = [row for row in read(out) if "error" in row]
        assert (
            " 400 " in failed["error"]
            and "too long" in failed["error"]
            and [row["pair"]["question"] for row in read(out)][7] == "q7?"
        )
        refuses[0], before = False, len(server.asked)
        status, said, _ = run(capsys, *words)
        assert json.loads(said)["judged"] == 1 and len(server.asked) - before < 10
    assert Counter(row["pair"]["question"] for row in read(out)) == {f"q{n}?": 1 for n in range(40)}
    assert all(row["label"] == row["pair"]["label"] for row in read(out))
    assert {headers["Authorization"] for _, _, headers in server.asked} == {"Bearer key-of-mine"}
    assert "key-of-mine" not in out.read_text() + err  # not even where the endpoint says it


def test_killed_twice_every_pair_is_judged_once(tmp_path):
    source, out = pairs(tmp_path / "in.jsonl", 60), tmp_path / "out.jsonl"
    forks = Forks()
    try:
        with Endpoint(fails=unsound) as server:
            words = ["--pairs", source, "--out", out, "--model", f"{server.base}/v1#some", "--votes", 2]
            for rows in (5, 30):
                assert forks.run([*words, "--in-flight", 4], out, rows) == -9
            assert forks.run(words, out) == 0
    finally:
        forks.close()
    assert Counter(row["pair"]["question"] for row in read(out)) == {f"q{n}?": 1 for n in range(60)}
    assert all(row["label"] == row["pair"]["label"] for row in read(out))


def test_so_many_requests_are_in_flight_and_no_more(tmp_path, capsys):
    under_way, most, lock = [0], [0], threading.Lock()

    def fails(number, body):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        threading.Event().wait(0.02)
        with lock:
            under_way[0] -= 1

    with Endpoint(fails=fails) as server:
        words = ("--pairs", pairs(tmp_path / "in.jsonl", 20), "--out", tmp_path / "o", "--votes", 2)
        assert run(capsys, *words, "--model", f"{server.base}/v1#some", "--in-flight", 3)[0] == 0
    assert most[0] == 3


@pytest.mark.parametrize(
    "status, headers", [(401, {}), (404, {}), (307, {"Location": "/v1/chat/completions"})]
)
def test_what_every_request_would_meet_ends_the_run(status, headers, tmp_path, capsys):
    """A wrong key is not tried for each of a million pairs; nor is it carried to another host."""
    with Endpoint(fails=lambda number, body: (status, "no", headers)) as server:
        words = ("--pairs", pairs(tmp_path / "in.jsonl", 50), "--out", tmp_path / "o", "--in-flight", 2)
        code, _, err = run(capsys, *words, "--model", f"{server.base}/v1#some")
    assert (
        code == 2
        and f": {status} " in err
        and len([1 for line in err.splitlines() if "error: " in line]) == 1
    )
    assert len(server.asked) < 10 or status == 307


def test_where_nobody_is_there_the_run_ends_and_leaves_the_rest(tmp_path, capsys, monkeypatch):
    """Eight tries of each of a million pairs would take a year, and fill the file with one reason."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "MOST_IN_A_ROW", 6)
    with Endpoint() as server:
        gone = server.base
    words = ("--pairs", pairs(tmp_path / "in.jsonl", 50), "--out", tmp_path / "o", "--in-flight", 2)
    status, _, err = run(capsys, *words, "--model", f"{gone}/v1#some")
    assert status == 2 and "refused" in err and "times in a row" in err
    assert len(read(tmp_path / "o")) < 10


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--model", "ftp://host/v1#x"], "expected http://"),
        (["--model", "http://host/v1"], "say which model"),
        (["--model", "https://me:secret@host/v1#x"], "inside an address"),
        (["--model", "http://host/v1#x", "--device", "cpu"], "for a model here"),
        (["--model", "http://host/v1#x", "--format", "scalar"], "cannot be read as scalar"),
        (["--model", "http://host/classify#x", "--format", "think"], "cannot be read as think"),
        (["--model", "http://host/classify#x", "--prompt", "a.json"], "is asked none"),
        (["--model", "http://host/v1#x", "--in-flight", "0"], "--in-flight"),
    ],
    ids=str,
)
def test_addresses_that_are_none_are_refused(words, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path / "a.json", 1)
    status, out, err = run(capsys, "--pair", "a.json", *words)
    assert status == 2 and out == "" and expected in err
    status, _, err = run(capsys, "--serve", "--model", "http://host/v1#x")
    assert status == 2 and "is served already" in err
    status, _, err = run(capsys, "--calibrate", "a.json", "--model", "http://host/v1#x")
    assert status == 2 and "has none here" in err
