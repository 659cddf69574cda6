"""A model's card: its examples run as they stand, it is never taken for a prompt, and it may be edited."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from selfruns import ROOT, finished_micro
from trainings import make, write_rows

import gramr2
from gramr2 import fit, prompts, weights
from gramr2.commands import train
from gramr2.extras import card
from gramr2.extras.toyworld import SHIPPED
from gramr2.prover import Prover
from gramr2.records import Pair
from gramr2.seals import CARD, SEALS

PAIR = Pair((("user", "What is 17 + 25?"),), "17 + 25 = 42", "17 + 25 = 43", label="A")  # as in the examples
OTHERS = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base as it is published: its generation_config.json suits it, and its card has its licence."""
    model, data = make(tmp_path_factory.mktemp("world"))
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OTHERS))
    front = "language:\n- en\n- de\nlicense: other\nlicense_name: ours\nbase_model: its/base\n"
    (model / CARD).write_text(f"---\n{front}---\n# A base\n")
    return model, data


def words(world, out: Path, stage: str, steps: int = 40) -> list[str]:
    model, data = world
    words = f"--stage {stage} --model {model} --data {data} --out {out} --steps {steps} --batch-size 8 "
    words += "--max-length 420 --token-budget 6000 --lr 1e-2 --device cpu"
    return words.split()


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """What train.py leaves, by stage."""
    place = tmp_path_factory.mktemp("trained")
    for stage in ("reward", "generative", "discriminative", "prover", "pretrain"):
        data = world[1]
        if stage == "pretrain":
            data = write_rows(place / "said.jsonl", [{"question": "What is 1?", "response": "It is 1."}] * 8)
        assert train.main(words((world[0], data), place / stage, stage)) == 0
    for stage in ("reward", "discriminative"):
        assert train.main([*words(world, place / f"{stage}-lora", stage), "--lora-rank", "8"]) == 0
    return place


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def said(code: str, place: Path, monkeypatch) -> str:
    """What an example prints, run where the card stands."""
    monkeypatch.chdir(place)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "card", "exec"), {})
    return out.getvalue().removesuffix("\n")


def greedy(model: Path, asked: str, longest: int) -> str:
    loaded, tokenizer = gramr2.load(model)
    ids = tokenizer.chat([{"role": "user", "content": asked}])
    how = {"temperature": 0.0, "max_new_tokens": longest, "progress": False}
    ((sample,),) = gramr2.generate(loaded, [ids], **how)
    return tokenizer.decode(sample.ids)


@pytest.mark.parametrize("stage", ["reward", "generative", "prover", "pretrain", "reward-lora"])
def test_both_examples_run_and_transformers_writes_what_our_sampler_does(stage, trained, monkeypatch):
    """Also where the base's own file had a repetition penalty, which transformers applies to greedy ones."""
    model = trained / stage / "model"
    ours, theirs = examples((model / CARD).read_text())
    assert said(ours, model, monkeypatch)
    asked = PAIR.question
    if stage == "prover":
        asked = prompts.prover_prompt(PAIR, Prover.load(model).template)
    elif stage != "pretrain":
        judge = gramr2.RewardModel.load(model)
        asked = prompts.judge_prompt(PAIR, judge.template)
    answer = greedy(model, asked, 420)
    assert len(answer) > 4 and said(theirs, model, monkeypatch) == answer


@pytest.mark.parametrize("stage", ["discriminative", "discriminative-lora"])
def test_a_scoring_models_examples_give_one_score(stage, trained, monkeypatch):
    model = trained / stage / "model"
    ours, theirs = examples((model / CARD).read_text())
    scores, label = said(ours, model, monkeypatch).splitlines()
    assert json.loads(said(theirs, model, monkeypatch)) == pytest.approx(json.loads(scores), abs=1e-4)
    assert label == "AB"[json.loads(scores)[1] > json.loads(scores)[0]]


def test_generation_config_is_true_of_what_was_trained(world, trained):
    """A server takes its defaults from there: a base's penalty, or its top-k, is not what was measured."""
    before = json.loads((world[0] / "generation_config.json").read_text())
    for stage in ("reward", "generative", "prover"):
        found = transformers.GenerationConfig.from_pretrained(trained / stage / "model")
        assert found.eos_token_id == before["eos_token_id"] and len(found.eos_token_id) == 2
        drawn = found.do_sample, found.temperature, found.top_k, found.top_p, found.repetition_penalty
        assert drawn[:4] == (True, 1.0, 0, 1.0) and drawn[4] in (None, 1.0)
    after = json.loads((trained / "pretrain/model/generation_config.json").read_text())
    assert after == before  # which is drawn from as its base is


def test_the_front_matter_is_what_the_bases_card_tells_and_nothing_is_guessed(world, trained, tmp_path):
    front, text = (trained / "reward/model" / CARD).read_text().split("---\n")[1:3]
    found = yaml.safe_load(front)
    assert (
        found["license"] == "other" and found["license_name"] == "ours" and found["language"] == ["en", "de"]
    )
    assert "base_model" not in found and "datasets" not in found  # the base's base is not this model's
    assert found["pipeline_tag"] == "text-generation" and found["library_name"] == "transformers"
    assert "`start`" in text and "| lr | 0.01 |" in text and "| seed | 0 |" in text
    run = json.loads((trained / "reward/model/training.json").read_text())["run"]
    name, content = run["data file 1"].split()
    assert f"| {name} {content} |" in text and run["model's model.safetensors"] in text
    hub = tmp_path / "models--Some--Model-1B/snapshots/0123"
    shutil.copytree(world[0], hub)
    (hub / CARD).unlink()
    assert card.known_of(hub) == ("Some/Model-1B", ["base_model: Some/Model-1B"])
    (hub / "README.md").write_text("no front matter; license: mit\n")
    assert card.known_of(hub) == ("Some/Model-1B", ["base_model: Some/Model-1B"])
    assert card.known_of(SHIPPED) == ("toy_backbone", ["license: mit", "language: en"])
    scores = yaml.safe_load((trained / "discriminative/model" / CARD).read_text().split("---\n")[1])
    assert scores["pipeline_tag"] == "text-classification"


@pytest.mark.parametrize("stage", ["reward", "generative", "discriminative", "prover", "pretrain"])
def test_our_card_is_never_taken_for_a_prompt(stage, trained, tmp_path):
    text = (trained / stage / "model" / CARD).read_text()
    hostile = '"""{question} {response_a} {response_b} {label}""".jsonl\n---\nlicense: x'
    for each in (text, text + card.plain(hostile)):
        assert prompts._template_in_card(each, "judge") is None
        assert prompts._template_in_card(each, "prover") is None
    if stage in ("reward", "generative"):
        model = shutil.copytree(trained / stage / "model", tmp_path / "model")
        own = (model / "judge_prompt.txt").read_text()
        (model / CARD).write_text(f'"""{own} of the card"""')  # the file goes before it
        assert gramr2.RewardModel.load(model).template == own


def test_a_card_may_be_edited_and_is_then_left_alone(world, trained, tmp_path):
    """It is what people change before they pass a model on; nothing that is sealed or compared holds it."""
    out = shutil.copytree(trained / "reward", tmp_path / "reward", copy_function=shutil.copy2)
    model, path = out / "model", out / "model" / CARD
    assert CARD not in json.loads((model / SEALS).read_text())
    mark, written = weights.fingerprint(model), path.read_text()
    further = words((model, world[1]), tmp_path / "further", "reward", steps=2)
    train.main(further)
    card.write_card(model, world[0], own=["round 1"], results=ROWS, tested="0")  # known later
    assert written != path.read_text() and "| **round 1** | 61.2 | 55.0 – 67.1 | 240 |" in path.read_text()
    path.write_text(path.read_text() + "\nMine.\n")
    edited = path.read_text()
    assert train.main(words(world, out, "reward")) == 0  # done, and found to be
    assert train.main(further) == 0
    assert path.read_text() == edited and weights.fingerprint(model) == mark
    gramr2.load(model)


ROWS = [
    {"name": "initial", "accuracy": 58.0, "low": 51.9, "high": 64.0, "n": 240},
    {"name": "round 1", "accuracy": 61.25, "low": 55.0, "high": 67.1, "n": 240},
]


def test_another_ones_card_may_hold_its_prompt_and_is_a_part_of_the_model(world, tmp_path):
    """A training that goes on from it with another prompt would be another training."""
    base = shutil.copytree(world[0], tmp_path / "base")
    out = tmp_path / "out"
    train.main(words((base, world[1]), out, "reward", steps=2))
    (base / CARD).write_text("another")
    with pytest.raises(fit.InputError, match=f"model's {CARD}"):
        train.main(words((base, world[1]), out, "reward", steps=2))


def test_the_models_of_a_self_training_run_say_what_they_scored(tmp_path_factory):
    run = finished_micro(tmp_path_factory.getbasetemp())
    results = json.loads((run / "results.json").read_text())
    final = (run / results["model"] / CARD).read_text()
    for row in results["rows"]:
        own = row["name"] in ("fine-tuned", "voting@16")
        name = f"**{row['name']}**" if own else row["name"]
        line = f"| {name} | {row['accuracy']:.1f} | {row['low']:.1f} – {row['high']:.1f} | {row['n']} |"
        assert line in final
    cards = {path.parents[1].name.partition("-")[2]: path for path in run.glob(f"steps/*/model/{CARD}")}
    judges = {"initial", "round-1-train", "fine-tune", "generative", "labelled-2x"}
    assert cards.keys() == {"prover", "discriminative", *judges}
    texts = {name: path.read_text() for name, path in cards.items()}
    assert all(yaml.safe_load(text.split("---\n")[1])["library_name"] for text in texts.values())
    assert "`round-1-train`" in re.sub(r"`\d+-", "`", texts["fine-tune"])
    assert "none of these" in texts["prover"] and "none of these" not in texts["initial"]
    assert "those of its data, and no others" in texts["initial"]


def test_a_run_whose_cards_were_edited_is_still_what_it_was(tmp_path_factory, tmp_path):
    """Results, and a user's words, are added to what a step has sealed."""
    place = shutil.copytree(
        finished_micro(tmp_path_factory.getbasetemp()).parent, tmp_path / "runs", copy_function=shutil.copy2
    )
    for path in place.glob(f"micro/steps/*/model/{CARD}"):
        path.write_text("mine")
    line = [sys.executable, str(ROOT / "selftrain.py"), "--recipe", str(ROOT / "recipes/micro.toml")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.read_text() == "mine" for path in place.glob(f"micro/steps/*/model/{CARD}"))


def test_the_toys_judge_answers_transformers_as_it_answers_us(tmp_path_factory, monkeypatch):
    """Its tokenizer knows a word by the blank before it, and a question has to be made of its words."""
    run = finished_micro(tmp_path_factory.getbasetemp())
    (model,) = run.glob("steps/*-initial/model")
    _, theirs = examples((model / CARD).read_text())
    row = json.loads((run / "pair.json").read_text())
    pair = Pair.from_json(row)
    values = {"question": pair.question, "response_a": pair.response_a, "response_b": pair.response_b}
    for name, value in values.items():
        shown = getattr(PAIR, name)
        assert f'"{shown}"' in theirs
        theirs = theirs.replace(f'"{shown}"', repr(value))
    judge = gramr2.RewardModel.load(model)
    answer = greedy(model, prompts.judge_prompt(pair, judge.template), 160)
    assert len(answer) > 4 and said(theirs, model, monkeypatch) == answer
    assert torch.get_default_dtype() == torch.float32
