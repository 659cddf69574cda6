"""What each stage trains on: prompts and targets, in either order, with and without the condition."""

import shutil
from collections import Counter

import pytest
from trainings import builder_of, make, sums, write_rows

from gramr2 import prompts
from gramr2.examples import ExampleBuilder
from gramr2.records import Example, Pair, show


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


def texts(builder: ExampleBuilder, example: Example) -> list[tuple[str, str]]:
    decode = builder.tokenizer.decode
    return [(decode(s.ids[: s.start], False), decode(s.ids[s.start :], False)) for s in example.sequences]


@pytest.mark.parametrize("letter", "AB")
def test_each_stage_asks_and_answers_what_its_equation_says(world, letter):
    """Prompt and target of every stage, in either order of the responses."""
    pair = Pair.from_json(next(sums(1)))
    turned = pair if pair.label == letter else pair.swapped()
    judge = f"{turned.question}\nA: {turned.response_a}\nB: {turned.response_b}"
    z = show(turned.rationale)
    expected = {
        "reward": (judge, f"<think>\n{z}\n</think>\n<answer>\n{letter}\n</answer>"),
        "prover": (f"Prove {letter}. {judge}", prompts.proof_from_rationale(z, letter)),
        "generative": (judge, f"<answer>\n{letter}\n</answer>"),
    }
    for stage, (asked, answered) in expected.items():
        builder = builder_of(stage, world, drop_condition=0.0)
        ((prompt, target),) = texts(builder, builder(0, 0, letter))
        assert prompt == builder.tokenizer.render([{"role": "user", "content": asked}])
        assert target == answered + "<|eot_id|>"


def test_the_discriminative_stage_reads_both_answers_to_their_last_token(world):
    """The better one first, nothing predicted, the turn closed: its stop token is where the score stands."""
    pair = Pair.from_json(next(sums(1)))
    builder = builder_of("discriminative", world)
    better, worse = builder(0, 0, "A").sequences
    said = [builder.tokenizer.decode(s.ids, False) for s in (better, worse)]
    chosen, rejected = (pair.response_a, pair.response_b)[:: 1 if pair.label == "A" else -1]
    assert said[0].endswith(chosen + "<|eot_id|>") and said[1].endswith(rejected + "<|eot_id|>")
    assert better.start == len(better.ids) and builder(0, 0, "A").units == 1


def test_a_short_prompt_is_taken_where_the_model_brings_none(world):
    """A setting must not take a prompt from a checkpoint that was trained on it."""
    bare = world[0].parent / "bare"
    shutil.copytree(world[0], bare, ignore=shutil.ignore_patterns("*_prompt.txt"))
    for stage, kind in ("reward", "judge"), ("generative", "label"), ("prover", "prover"):
        for size in "long", "short":
            template = builder_of(stage, (bare, world[1]), prompt=size).frame.template
            assert template == prompts.own_template(kind, size)
    own = (world[0] / "judge_prompt.txt").read_text()
    assert builder_of("reward", world, prompt="short").frame.template == own


def test_pretraining_reads_text_whole_and_responses_after_their_prompt(world, tmp_path):
    """Of a text every token is a target; of a response only its own."""
    data = write_rows(tmp_path / "p.jsonl", [{"text": "3 + 4"}, {"question": "3 + 4?", "response": "7"}])
    builder = builder_of("pretrain", (world[0], data))
    text, answer = (builder(i, 0, "A").sequences[0] for i in range(2))
    assert builder.tokenizer.decode(text.ids, False).startswith("<|begin_of_text|>3 + 4") and text.start == 1
    assert builder.tokenizer.decode(answer.ids[answer.start :], False) == "7<|eot_id|>"


def test_the_condition_is_dropped_in_a_tenth_and_leaves_an_empty_turn(world):
    """Equation 5's denominator means nothing to a prover that never wrote from an empty frame."""
    builder = builder_of("prover", world)
    empty = builder.tokenizer.render([{"role": "user", "content": ""}])
    prompts_seen = Counter(
        builder.tokenizer.decode(s.ids[: s.start], False) == empty
        for epoch in range(20)
        for i in range(builder.size)
        for s in builder(i, epoch, "A").sequences
    )
    share = prompts_seen[True] / prompts_seen.total()
    assert 0.07 < share < 0.13
    hidden = builder_of("prover", world, hide_label=1.0, drop_condition=0.0)
    assert f"Prove {prompts.HIDDEN_LABEL}." in texts(hidden, hidden(0, 0, "A"))[0][0]
