"""The same judge in three places: in this process, behind somebody else's server, and behind ours.

    pip install "transformers[serving]" openai
    python benchmarks/endpoints.py DIR

The model in DIR judges 20 pairs greedily and in both orders: here; as a judge elsewhere, served by
`transformers serve`; and served by `infer.py --serve`, asked by OpenAI's own client. It is shown three
examples and asked for the letter alone, which any instruct model can give: what it writes to each of the 40
questions, and each verdict, must be the same everywhere. Answers that cannot be read, or that are one letter
throughout, prove nothing, and are said to. A repetition penalty in the model's generation_config.json, which
an endpoint applies and no request can take back, is left out.

Left out: probabilities, which neither server gives; endpoints that fail, and runs that are killed (pytest
tests/test_remote.py).
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT / "tests"))

import openai
from forks import free_port
from served import Served

from gramr2.extras.formats import format_named
from gramr2.extras.remote import EndpointModel
from gramr2.fields import Fields
from gramr2.files import read_json, write_json
from gramr2.judge import RewardModel
from gramr2.records import Pair, Vote
from gramr2.votes import Format

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Greece": "Athens", "Russia": "Moscow", "Norway": "Oslo", "Peru": "Lima", "Cuba": "Havana",
    "Kenya": "Nairobi", "Austria": "Vienna", "Ireland": "Dublin", "Germany": "Berlin", "China": "Beijing",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Finland": "Helsinki", "Hungary": "Budapest", "Iran": "Tehran",
}  # fmt: skip
PROMPT = """Which answer is right? Say A or B.

What colour is the sky?
A: It is red.
B: It is blue.
B

What is 2 + 2?
A: It is 4.
B: It is 5.
A

What is the capital of Brazil?
A: It is London.
B: It is Brasilia.
B

{question}
A: {response_a}
B: {response_b}
"""
SECONDS = 300  # for a server to load its model


def make_pairs() -> list[Pair]:
    pairs, capitals = [], list(CAPITALS.values())
    for n, country in enumerate(CAPITALS):
        asked = (("user", f"What is the capital of {country}?"),)
        right, wrong = f"It is {capitals[n]}.", f"It is {capitals[n - 1]}."
        pairs.append(Pair(asked, *((right, wrong) if n % 2 else (wrong, right))))
    return pairs


def without_penalty(model: Path, place: Path) -> Path:
    """The same directory with other settings of generation."""
    for path in model.resolve().iterdir():
        (place / path.name).symlink_to(path)
    if (settings := place / "generation_config.json").exists():
        found = read_json(settings) | {"repetition_penalty": 1.0}
        settings.unlink()
        write_json(settings, found)
    return place


def judge_all(model: RewardModel) -> list[Vote]:
    model.voter.template = PROMPT
    judged = model.judge_many(make_pairs(), votes=2, progress=False)
    return [vote for _, judgment in judged for vote in judgment.details]


@contextlib.contextmanager
def served_by_transformers(model: Path) -> Iterator[str]:
    port = free_port()
    words = ["serve", model, "--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32"]
    quiet = subprocess.DEVNULL
    command = [Path(sys.executable).with_name("transformers"), *words]
    process = subprocess.Popen([str(word) for word in command], stdout=quiet, stderr=quiet)
    try:
        latest = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > latest:
                    raise
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1#{model}"
    finally:
        process.terminate()
        process.wait()


def asked_by_openai(model: EndpointModel) -> EndpointModel:
    """The same model, but that OpenAI's client brings its questions there."""
    client = openai.OpenAI(base_url=model.endpoint.url, api_key="none")

    def post(path, body, read):
        asked = {name: body[name] for name in ("model", "messages", "max_tokens", "temperature")}
        return read(Fields(client.chat.completions.create(**asked).to_dict()))

    model.endpoint.post = post
    return model


def is_same(name: str, here: list[Vote], there: list[Vote]) -> bool:
    texts = sum(a.text == b.text for a, b in zip(here, there, strict=True))
    read = [(a.label, b.label) for a, b in zip(here, there, strict=True) if b.label]
    same = sum(a == b for a, b in read)
    print(f"{name}: {texts} of {len(here)} texts and {same} of {len(read)} readable verdicts are the same")
    return texts == len(here) and len(here) / 2 < same == len(read)


def compare(place: Path, format: Format) -> bool:
    here = judge_all(RewardModel.load(place, format=format))
    said = Counter(vote.text for vote in here)
    print(f"here: {said['A']} x A, {said['B']} x B, {len(here) - said['A'] - said['B']} x something else")
    with served_by_transformers(place) as url:
        there = judge_all(EndpointModel(url, None, format, 1))
    fine = is_same("transformers serve", here, there)
    with Served("--model", place, "--device", "cpu", "--dtype", "float32") as server:
        model = EndpointModel(f"http://127.0.0.1:{server.port}/v1#{place}", None, format, 8)
        there = judge_all(asked_by_openai(model))
    fine &= is_same("infer.py --serve and the openai client", here, there)
    return fine and min(said["A"], said["B"]) > 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    given, format = parser.parse_args().model, format_named("label")
    with tempfile.TemporaryDirectory() as directory:
        return 0 if compare(without_penalty(given, Path(directory)), format) else 1


if __name__ == "__main__":
    sys.exit(main())
