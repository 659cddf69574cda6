"""docs/table1.md: every command of the page judges and scores both benchmarks."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest
from checkpoints import SHORT_PROMPT, make_checkpoint, make_random_judge
from endpoints import GOOD, Endpoint

from gramr2.commands import infer
from gramr2.extras.formats import FORMATS
from gramr2.files import exit_status

PAGE = (Path(__file__).parents[1] / "docs/table1.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`(--model (?:https?://|models/)[^`]*)`", PAGE)
SYSTEMS = re.findall(r"^\| ((?!system|---).*?) \|", PAGE.partition("## LLM-as-a-judge")[2], re.MULTILINE)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """A prompt of RM-Bench, which is nine pairs, and two pairs of JudgeBench."""
    place = tmp_path_factory.mktemp("table1")
    texts = {name: [f"a {name} one, {n}" for n in range(3)] for name in (GOOD, "bad")}
    row = {"id": 1, "prompt": "q?", "domain": "chat", "chosen": texts[GOOD], "rejected": texts["bad"]}
    (place / "rm-bench.json").write_text(json.dumps([row]))
    pair = {"pair_id": "1", "source": "livebench-math", "question": "q?", "response_model": "m"}
    both = [{"label": "A>B", "response_A": GOOD, "response_B": "bad"}]
    both += [{"label": "B>A", "response_A": "bad", "response_B": GOOD}]
    (place / "judgebench.jsonl").write_text("".join(json.dumps(pair | each) + "\n" for each in both))
    return {"rm-bench": (place / "rm-bench.json", 9), "judgebench": (place / "judgebench.jsonl", 2)}


def small_model(place: Path, name: str) -> Path:
    """Of the kind that the page's command names."""
    if "Skywork" in name:
        return make_checkpoint(place, "llama3", num_labels=1, tie_embeddings=False)
    return make_random_judge(place, max_positions=400)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_judges_and_scores_both_benchmarks(command, benchmarks, tmp_path, capsys, monkeypatch):
    """A flag that does not fit the format, or an answer that cannot be read, would cost a day and money."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.replace("HOST", "127.0.0.1"))
    flags = dict(zip(words[::2], words[1::2], strict=True))
    elsewhere, endings = "://" in flags["--model"], FORMATS[flags.get("--format", "think")].endings
    if "--prompt" in flags:
        asked = FORMATS[flags["--format"]].prompt if elsewhere else SHORT_PROMPT
        Path(flags["--prompt"]).write_text(asked)
    server = Endpoint(endings, logprobs="anthropic" not in command) if elsewhere else contextlib.nullcontext()
    with server:
        if elsewhere:
            server.thinking = "So." if "DeepSeek-R1" in command else ""
            words[1] = re.sub(r"https?://[^/]*", server.base, words[1])
        else:
            words[1] = str(small_model(tmp_path / "model", words[1]))
            words += ["--device", "cpu", "--max-new-tokens", "8"]  # what it writes is noise
        for name, (source, count) in benchmarks.items():
            out = tmp_path / f"{name}.jsonl"
            bench = ["--bench", name, str(source), "--out", str(out), "--json", *words]
            assert exit_status(infer.main, bench) == 0, capsys.readouterr().err
            table = capsys.readouterr().out
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            assert len(rows) == count and not [row for row in rows if "error" in row]
            assert exit_status(infer.main, ["--score", name, str(out), "--json"]) == 0
            assert capsys.readouterr().out == table
            assert not elsewhere or all(row["label"] == row["pair"]["label"] for row in rows)


def test_each_system_of_the_paper_is_on_the_page():
    named = {"GPT-4o", "Claude-3.5-Sonnet", "DeepSeek-R1-0528", "Llama-3.1-Nemotron-70B-Reward"}
    named |= {"Skywork-Reward-Gemma-2-27B", "Skywork-Reward-Llama-3.1-8B", "Nemotron-Super"}
    named |= {"Nemotron-Super-Multilingual", "RM-R1-Distilled-Qwen-32B, -14B", "RRM-32B"}
    named |= {"GRAM-Qwen3-14B, -8B", "GRAM-RR-LLaMA-3.2-3B, -3.1-8B"}
    assert set(SYSTEMS) == named and len(COMMANDS) >= len(named)
