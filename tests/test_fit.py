"""The loop: beside transformers, resumed to the bit, and what happens to bad input."""

import json
import math
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from trainings import CONFIG, builder_of, curve, drive, job, make, same_bits, sums, write_rows

from gramr2 import fit, parallel, prompts
from gramr2.files import InputError
from gramr2.loss import OBJECTIVES, Trainee
from gramr2.model import Decoder
from gramr2.plan import make_plan, read_model_config
from gramr2.records import Tokens
from gramr2.settings import TrainSettings

ALONE = parallel.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


def train(out: Path, world, stage: str = "reward", data=None, **config) -> dict:
    settings = TrainSettings(**CONFIG | config)
    return fit.train(stage, settings, [data or world[1]], world[0], out)


# ---------------------------------------------------------------------------------- against transformers


def test_twenty_adamw_steps_give_the_loss_curve_of_transformers(world, tmp_path):
    """Level 2, 1e-4: same model, same batches, same optimizer; the packed loss against the padded one."""
    import transformers

    settings = {"steps": 20, "warmup": 0.0, "final_lr": 1.0, "weight_decay": 0.0, "clip": 0.0}
    train(tmp_path / "out", world, **settings)
    builder = builder_of("reward", world, **settings)
    plan = make_plan(builder, builder.settings, ALONE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(world[0], attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=CONFIG["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        value = padded_loss(theirs, [builder(*chosen).sequences[0] for chosen in plan.step(step)])
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
    assert loaded.score.weight.shape == (1, 48) and float(loaded.score.weight.detach().abs().sum()) > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: pytest -m cuda")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_near_the_cpu(world, tmp_path, compiled):
    """A bf16 copy computes for its fp32 masters, and a block is computed again: near the CPU's curve, saving
    on the way."""
    settings = {"steps": 10, "save_steps": 5}
    train(tmp_path / "cpu", world, device="cpu", **settings)
    train(tmp_path / "gpu", world, device="cuda", recompute=1, compile=compiled, **settings)
    assert curve(tmp_path / "gpu") == pytest.approx(curve(tmp_path / "cpu"), abs=0.1)


# ---------------------------------------------------------------------------------- adapters


class Adapter(nn.Module):
    """A low-rank change of a matrix that stays as it was. A head is read, not called: `weight`."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(2, base.in_features))
        self.up = nn.Parameter(torch.empty(base.out_features, 2))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight + self.up @ self.down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("stage", ["reward", "discriminative"])
def test_adapters_around_every_matrix_are_trained_and_nothing_else(tmp_path, stage):
    """They go around a decoder on the meta device; the checkpoint fills what they stand around."""
    config = {"steps": 3, "max_length": 1400, "recompute": 99}
    builder = builder_of(stage, make(tmp_path, family="qwen3"), **config)
    settings, (model, _) = builder.settings, (tmp_path / "start", None)
    with torch.device("meta"):
        shape = read_model_config(stage, builder.stage.head, settings, model, builder.tokenizer)
        trainee = Trainee(Decoder(shape).requires_grad_(False), OBJECTIVES[builder.stage.objective](settings))
        linear = [name for name, module in trainee.named_modules() if isinstance(module, nn.Linear)]
        for name in linear:
            trainee.set_submodule(name, Adapter(trainee.get_submodule(name)))
    parallel.wrap(trainee, settings, ALONE)
    parallel.load_weights(trainee, model, fresh_score=stage == "discriminative")
    trained = {name: each for name, each in trainee.named_parameters() if each.requires_grad}
    for name, parameter in trained.items():
        nn.init.zeros_(parameter) if name.endswith("up") else nn.init.normal_(parameter)
    before = {name: each.clone() for name, each in trainee.named_parameters()}
    loop = fit.Loop(trainee, settings, ALONE, tmp_path, 3)
    plan = make_plan(builder, settings, ALONE)
    losses = [loop.step([builder(*use) for use in plan.step(step)])["loss"] for step in range(plan.steps)]
    changed = {name for name, each in trainee.named_parameters() if not torch.equal(each, before[name])}
    assert changed == trained.keys() and len(changed) == 2 * len(linear) and losses[-1] < losses[0]
    assert {name.partition(".")[0] for name in loop.state} == {"weight", "exp_avg", "exp_avg_sq"}
    assert len(loop.state) == 3 * len(trained)


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


def test_a_stop_asked_for_while_the_model_is_published_is_not_forgotten(world, tmp_path, monkeypatch):
    """A loop went on with its next step as if nobody had asked, until whoever did killed it."""
    model, data = world
    settings, publish = TrainSettings(**CONFIG | {"steps": 1}), fit.publish_model

    def publish_after_a_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        publish(*arguments)

    monkeypatch.setattr(fit, "publish_model", publish_after_a_signal)
    with pytest.raises(fit.Stopped):
        fit.train("generative", settings, [data], model, tmp_path / "out")
    monkeypatch.undo()
    assert fit.train("generative", settings, [data], model, tmp_path / "out")["step"] == 1  # it is done


class Planted:
    """What a pickle may hold: reading it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_damaged_resume_point_falls_back_and_an_object_planted_in_one_is_not_run(world, tmp_path):
    """The newest point is passed over for the one before; the state of the torch library was unpickled."""
    model, data = world
    config = {"steps": 8, "save_steps": 2, "batch_size": 2, "limit": 12}
    whole = drive([job(tmp_path / "whole", model, data, config=config)])[0]
    kill = ["before", whole["publications"]]  # of the model
    jobs = [job(tmp_path / name, model, data, config=config, kill=kill) for name in ("flip", "all")]
    assert [result["statuses"] for result in drive(jobs)] == [[-9], [-9]]
    older, newest = sorted((tmp_path / "flip/resume").glob("step-*"))
    content = bytearray((newest / "rank-0.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "rank-0.safetensors").write_bytes(content)
    for place in (older, newest):
        (place / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    for point in (tmp_path / "all/resume").glob("step-*"):
        (point / "point.json").write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    flipped, spoilt = drive([job(tmp_path / name, model, data, config=config) for name in ("flip", "all")])
    assert flipped["statuses"] == [0] and f"warning: {newest}" in flipped["log"]
    assert same_bits(tmp_path / "whole", tmp_path / "flip")
    assert spoilt["statuses"] == [2] and "no resume point is whole" in spoilt["error"]
    assert not (tmp_path / "executed").exists()


def test_what_another_left_in_the_place_of_a_run_stays(world, tmp_path):
    """A model of one's own under OUT/model was replaced, and a metrics.jsonl emptied."""
    for name in ("model/config.json", "metrics.jsonl", "resume/notes"):
        mine = tmp_path / name.replace("/", "-") / name
        mine.parent.mkdir(parents=True)
        mine.write_text("mine\n")
        with pytest.raises(InputError, match="is of no run of ours"):
            train(tmp_path / name.replace("/", "-"), world, steps=1)
        assert mine.read_text() == "mine\n"


def test_weights_that_are_not_finite_are_not_published(world, tmp_path, monkeypatch):
    """A step that is not finite is skipped; what is left may be so all the same."""
    taken = fit.Loop.step

    def spoil(loop, examples):
        figures = taken(loop, examples)
        next(loop.trainee.parameters()).data[0] = math.inf
        return figures

    monkeypatch.setattr(fit.Loop, "step", spoil)
    with pytest.raises(InputError, match=r"embed.weight: holds numbers that are not finite"):
        train(tmp_path / "out", world, steps=1)
    assert not (tmp_path / "out/model").exists()


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
    with pytest.raises(InputError, match=r"differs in .*model's model.safetensors"):
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
    lengths = sorted(builder_of("reward", world).plain(i).length for i in range(48))
    limit = lengths[30]
    figures = train(tmp_path / "out", world, steps=1, max_length=limit)
    reason = f"longer than max_length {limit} (the longest has {lengths[-1]} tokens)"
    assert figures["dropped"] == {reason: sum(n > limit for n in lengths)}


@pytest.mark.parametrize(
    "stage, rows, message",
    [
        ("reward", [], "no rows to train on"),
        ("reward", [{"question": "q", "response_a": "a", "response_b": "b", "label": "A"}], 'no "rationale"'),
        ("generative", [{"question": "q", "response_a": "a", "response_b": "b"}], 'no "label"'),
        ("pretrain", [{"words": "x"}], 'neither "text" nor "prompt" and "response"'),
        ("reward", [{"question": "q", "response_a": "a", "label": "A"}], 'row 1: no field "response_b"'),
        ("reward", [{"question": "q " * 900, "response_a": "a", "response_b": "b", "label": "A",
                     "rationale": next(sums(1))["rationale"]}], "longer than max_length 700 (the longest"),
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
