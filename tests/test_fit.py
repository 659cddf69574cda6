"""The loop and the stages: what is trained on, resumed to the bit, and what happens to bad input."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainings import CONFIG, curve, drive, job, make, same_bits, sums, write_rows

from gramr2 import fit, parallel, prompts
from gramr2.files import InputError
from gramr2.loss import Example
from gramr2.records import Pair, Tokens, show
from gramr2.settings import TrainSettings

ALONE = parallel.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


def curriculum(stage: str, world, **config) -> fit.ExampleBuilder:
    model, data = world
    return fit.ExampleBuilder(stage, TrainSettings(**CONFIG | config), [data], model)


def train(out: Path, world, stage: str = "reward", data=None, **config) -> dict:
    settings = TrainSettings(**CONFIG | config)
    return fit.train(stage, settings, [data or world[1]], world[0], out, progress=False)


# ---------------------------------------------------------------------------------- what is trained on


def texts(rows: fit.ExampleBuilder, row: Example) -> list[tuple[str, str]]:
    decode = rows.tokenizer.decode
    return [(decode(s.ids[: s.start], False), decode(s.ids[s.start :], False)) for s in row.sequences]


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
        rows = curriculum(stage, world, drop_condition=0.0)
        ((prompt, target),) = texts(rows, rows(0, 0, letter))
        assert prompt == rows.tokenizer.render([{"role": "user", "content": asked}])
        assert target == answered + "<|eot_id|>"


def test_the_discriminative_stage_reads_both_answers_to_their_last_token(world):
    """The better one first, nothing predicted, the turn closed: its stop token is where the score stands."""
    pair = Pair.from_json(next(sums(1)))
    rows = curriculum("discriminative", world)
    better, worse = rows(0, 0, "A").sequences
    said = [rows.tokenizer.decode(s.ids, False) for s in (better, worse)]
    chosen, rejected = (pair.response_a, pair.response_b)[:: 1 if pair.label == "A" else -1]
    assert said[0].endswith(chosen + "<|eot_id|>") and said[1].endswith(rejected + "<|eot_id|>")
    assert better.start == len(better.ids) and rows(0, 0, "A").units == 1


def test_pretraining_reads_text_whole_and_responses_after_their_prompt(world, tmp_path):
    """Of a text every token is a target; of a response only its own."""
    data = write_rows(tmp_path / "p.jsonl", [{"text": "3 + 4"}, {"question": "3 + 4?", "response": "7"}])
    rows = curriculum("pretrain", (world[0], data))
    text, answer = (rows(i, 0, "A").sequences[0] for i in range(2))
    assert rows.tokenizer.decode(text.ids, False).startswith("<|begin_of_text|>3 + 4") and text.start == 1
    assert rows.tokenizer.decode(answer.ids[answer.start :], False) == "7<|eot_id|>"


def test_the_condition_is_dropped_in_a_tenth_and_leaves_an_empty_turn(world):
    """Equation 5's denominator means nothing to a prover that never wrote from an empty frame."""
    rows = curriculum("prover", world)
    empty = rows.tokenizer.render([{"role": "user", "content": ""}])
    prompts_seen = Counter(
        rows.tokenizer.decode(s.ids[: s.start], False) == empty
        for epoch in range(20)
        for i in range(rows.size)
        for s in rows(i, epoch, "A").sequences
    )
    share = prompts_seen[True] / prompts_seen.total()
    assert 0.07 < share < 0.13
    hidden = curriculum("prover", world, hide_label=1.0, drop_condition=0.0)
    assert f"Prove {prompts.HIDDEN_LABEL}." in texts(hidden, hidden(0, 0, "A"))[0][0]


@given(n=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_either_letter_is_right_in_half_of_an_epoch_and_turns_in_the_next(n, batch, seed):
    """A judge that sees the better answer more often as A learns the letter."""
    plan = fit.Plan(np.arange(n) * 2, np.ones(n), np.ones(n), {}, batch, 2 * n, seed)
    seen = [chosen for step in range(plan.steps) for chosen in plan.step(step)]
    first, second = ({i: letter for i, e, letter in seen if e == epoch} for epoch in (0, 1))
    assert len(seen) == 2 * n and first.keys() == second.keys() == set(range(0, 2 * n, 2))
    assert abs(sum(letter == "A" for letter in first.values()) - n / 2) <= 0.5
    assert all(first[i] != second[i] for i in first)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5), st.integers(50, 120))
@settings(max_examples=80, deadline=None)
def test_dealing_keeps_every_row_within_the_budget_and_gives_ranks_as_many_packs(lengths, ranks, budget):
    """A lost row changes the loss, an overfull pack the memory; unequal counts would hang the ranks."""
    rows = [Example((Tokens(tuple(range(n)), 0),), margin=float(i)) for i, n in enumerate(lengths)]
    dealt = fit.deal(rows, ranks, budget)
    assert len({len(packs) for packs in dealt}) == 1
    assert all(sum(row.length for row in members) <= budget for packs in dealt for members in packs)
    assert sorted(row.margin for packs in dealt for members in packs for row in members) == sorted(
        row.margin for row in rows
    )


# ---------------------------------------------------------------------------------- against transformers


def test_twenty_adamw_steps_give_the_loss_curve_of_transformers(world, tmp_path):
    """Level 2, 1e-4: same model, same batches, same optimizer; the packed loss against the padded one."""
    import transformers

    settings = {"steps": 20, "warmup": 0.0, "final_lr": 1.0, "weight_decay": 0.0, "clip": 0.0}
    train(tmp_path / "out", world, **settings)
    rows = curriculum("reward", world, **settings)
    plan = fit.make_plan(rows, rows.settings, ALONE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(world[0], attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=CONFIG["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        value = padded_loss(theirs, [rows(*chosen).sequences[0] for chosen in plan.step(step)])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert curve(tmp_path / "out") == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < losses[0] - 0.5


def padded_loss(model, examples: list[Tokens]) -> torch.Tensor:
    longest = max(len(example.ids) for example in examples)
    ids, mask, labels = (torch.full((len(examples), longest), fill) for fill in (0, 0, -100))
    for n, example in enumerate(examples):
        size = len(example.ids)
        ids[n, :size] = torch.tensor(example.ids)
        mask[n, :size] = 1
        labels[n, example.start : size] = torch.tensor(example.ids[example.start :])
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def test_transformers_loads_what_training_leaves(world, tmp_path):
    """A causal model and a classifier, each giving our numbers; the prompt travels with the model."""
    import transformers

    import gramr2

    ids = [5, 9, 200, 31, 7]
    train(tmp_path / "lm", world, steps=3)
    model, _ = gramr2.load(tmp_path / "lm/model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm/model")
    logits = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.allclose(gramr2.logprobs(model, [ids])[0], expected, atol=1e-4)
    assert prompts.template_for(tmp_path / "lm/model")[0].startswith("{question}\nA:")
    train(tmp_path / "rm", world, "discriminative", steps=3, max_length=1400)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm/model")
    assert loaded.score.weight.shape == (1, 48) and float(loaded.score.weight.abs().sum()) > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
def test_a_gpu_trains_near_the_cpu(world, tmp_path):
    """bf16 compute over fp32 weights, one FSDP rank: near the CPU's curve, saving on the way."""
    settings = {"steps": 10, "save_steps": 5}
    train(tmp_path / "cpu", world, device="cpu", **settings)
    train(tmp_path / "gpu", world, device="cuda", checkpointing=True, **settings)
    assert curve(tmp_path / "gpu") == pytest.approx(curve(tmp_path / "cpu"), abs=0.1)


# ---------------------------------------------------------------------------------- resume


def test_killed_around_every_publication_it_ends_in_the_same_bits(world, tmp_path):
    """Level 1. Each run is killed before or after its n-th rename, then resumed to the end."""
    model, data = world
    config = {"steps": 5, "save_steps": 2, "batch_size": 2, "limit": 12}
    whole = drive([job(tmp_path / "whole", model, data, config=config)])[0]
    assert whole["statuses"] == [0]
    kills = [[when, n + 1] for n in range(whole["publications"]) for when in ("before", "after")]
    assert len(kills) >= 14
    jobs = []
    for number, kill in enumerate(kills):
        out = tmp_path / f"killed{number}"
        jobs.append(job(out, model, data, config=config, kill=kill))
        jobs.append(job(out, model, data, config=config))
    results = drive(jobs)
    assert [r["statuses"] for r in results] == [[-9], [0]] * len(kills)
    for number in range(len(kills)):
        out = tmp_path / f"killed{number}"
        assert same_bits(tmp_path / "whole", out), kills[number]
        assert curve(out) == curve(tmp_path / "whole")
        assert [p.parent.name for p in out.glob("*/config.json")] == ["model"]


def test_killed_or_stopped_at_odd_moments_it_ends_in_the_same_bits(world, tmp_path):
    """Level 1. SIGKILL at five moments and SIGTERM, which saves first, exits with 130 and loses no step."""
    model, data = world
    config = {"steps": 12, "save_steps": 2, "batch_size": 4}
    shared = tmp_path / "cut"
    jobs = [job(tmp_path / "whole", model, data, "prover", config)]
    jobs += [job(shared, model, data, "prover", config, kill_after=0.1 + 0.1 * n) for n in range(5)]
    jobs += [job(shared, model, data, "prover", config)]
    stopped = tmp_path / "stopped"
    jobs += [
        job(stopped, model, data, "prover", config, stop_at=3),
        job(stopped, model, data, "prover", config),
    ]
    results = drive(jobs)
    assert [r["statuses"][0] for r in results][-2:] == [130, 0] and results[6]["statuses"] == [0]
    assert -9 in [r["statuses"][0] for r in results[1:6]]
    assert same_bits(tmp_path / "whole", shared) and same_bits(tmp_path / "whole", stopped)


def test_a_full_disk_leaves_the_earlier_point_and_says_so(world, tmp_path):
    """The resume point does not fit: a warning, and training goes on. The model does not fit: an error."""
    model, data = world
    out = tmp_path / "out"
    config = {"steps": 8, "save_steps": 3}
    cut = job(out, model, data, config=config, stop_at=3)
    full = job(out, model, data, config=config, file_limit=100_000)
    first, second, third = drive([cut, full, job(out, model, data, config=config)])
    assert first["statuses"] == [130] and second["statuses"] == [2]
    assert "a resume point was not saved" in second["log"] and "stands" in second["log"]
    assert "model: could not be written" in second["error"] and "free some space" in second["error"]
    assert third["statuses"] == [0]
    drive([job(tmp_path / "whole", model, data, config=config)])
    assert same_bits(tmp_path / "whole", out)


def test_finished_is_finished_and_another_run_is_refused_by_name(world, tmp_path):
    """Silently training something else into a run's directory would mix two models."""
    out = tmp_path / "out"
    figures = train(out, world, steps=3)
    assert train(out, world, steps=3) == figures
    with pytest.raises(InputError, match=r"differs in steps \(3, now 4\); name another --out"):
        train(out, world, steps=4)
    other = write_rows(tmp_path / "other.jsonl", sums(20, seed=1))
    with pytest.raises(InputError, match="differs in data file 1"):
        train(out, world, steps=3, data=other)
    with pytest.raises(InputError, match=r"differs in model's model.safetensors"):
        train(out, (out / "model", world[1]), steps=3)


# ---------------------------------------------------------------------------------- bad input


def test_steps_that_are_not_finite_are_skipped_and_counted(world, tmp_path):
    """One bad batch costs one step and touches no weight; three in a row stop, with the batch on disk."""
    model, data = world
    config = {"steps": 8}
    one, three = drive(
        [
            job(tmp_path / "one", model, data, config=config, nan_at=[2, 3]),
            job(tmp_path / "three", model, data, config=config, nan_at=[2, 3, 4]),
        ]
    )
    assert one["statuses"] == [0] and one["figures"]["skipped"] == 2 and one["figures"]["updates"] == 6
    assert curve(tmp_path / "one")[2:4] == [None, None]
    assert three["statuses"] == [2] and "3 steps in a row, up to step 5" in three["error"]
    rows = [json.loads(line) for line in (tmp_path / "three/bad-batch.jsonl").read_text().splitlines()]
    assert len(rows) == CONFIG["batch_size"] and "What is" in rows[0]["text"]


def test_long_rows_are_dropped_and_counted(world, tmp_path):
    """Never cut: the label is the tail."""
    lengths = sorted(curriculum("reward", world).plain(i).length for i in range(48))
    limit = lengths[30]
    figures = train(tmp_path / "out", world, steps=1, max_length=limit)
    assert figures["dropped"] == {"longer than max_length": sum(n > limit for n in lengths)}


@pytest.mark.parametrize(
    "stage, rows, message",
    [
        ("reward", [], "no rows to train on"),
        ("reward", [{"question": "q", "response_a": "a", "response_b": "b", "label": "A"}], 'no "rationale"'),
        ("generative", [{"question": "q", "response_a": "a", "response_b": "b"}], 'no "label"'),
        ("pretrain", [{"words": "x"}], 'neither "text" nor "prompt" and "response"'),
        ("reward", [{"question": "q", "response_a": "a", "label": "A"}], 'row 1: no field "response_b"'),
        ("reward", [{"question": "q " * 900, "response_a": "a", "response_b": "b", "label": "A",
                     "rationale": next(sums(1))["rationale"]}], "longer than max_length"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_trained_on_is_said_in_one_line_before_training(
    world, tmp_path, stage, rows, message
):
    """Names the file and what is missing; nothing is left that looks like a run."""
    data = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=r"bad\.jsonl") as caught:
        train(tmp_path / "out", world, stage, data=data)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_suit_is_refused(world, tmp_path):
    """A scalar head cannot write; more positions than the model has would be noise."""
    train(tmp_path / "rm", world, "discriminative", steps=1, max_length=1400)
    with pytest.raises(InputError, match="has a scalar head"):
        train(tmp_path / "out", (tmp_path / "rm/model", world[1]), "reward")
    with pytest.raises(InputError, match="beyond the model's 2048 positions"):
        train(tmp_path / "out", world, max_length=4000)


def test_dry_run_says_the_plan_and_reads_no_weights(world, tmp_path):
    """A plan must be possible for a model that this machine could never hold."""
    data = world[1]
    model = shutil.copytree(world[0], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    lines = "\n".join(fit.dry_run("reward", TrainSettings(**CONFIG), [data], model, ALONE))
    for word in ("52,464 parameters", "48 examples", "6 of 8 examples", "GB on each of 1 ranks"):
        assert word in lines
