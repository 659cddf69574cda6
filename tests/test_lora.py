"""Adapters compute, train, stop and travel as PEFT's do, and merge into what they were beside."""

import gc
import json
import shutil
import tomllib
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from trainings import CONFIG, curve, distance, drive, job, make, same_bits, weights_of

import gramr2
from gramr2 import fit, parallel, weights
from gramr2.commands import selftrain
from gramr2.commands import train as train_command
from gramr2.directories import base_of
from gramr2.files import InputError
from gramr2.judge import RewardModel
from gramr2.kernels.packed_attention import packed_causal, packed_positions
from gramr2.loss import OBJECTIVES, Batch, Trainee, collate
from gramr2.model import Decoder
from gramr2.records import Example, Tokens
from gramr2.settings import TrainSettings
from gramr2.weights import read_config

IDS = [5, 9, 2, 77, 31, 8, 64, 12, 40, 7]
LORA = {"lora_rank": 4, "lr": 1e-2}
PEFT = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["q_proj", "o_proj", "up_proj"]}


def batch() -> Batch:
    return collate([Example((Tokens(tuple(IDS), 1),))], 1.0, "cpu")


def logits(model: Decoder) -> torch.Tensor:
    hidden_TD = model(
        torch.tensor(IDS), packed_positions([len(IDS)], "cpu"), packed_causal([len(IDS)], "cpu")
    )
    return (hidden_TD @ model.head_weight.T).float().detach()


def trainee_of(model_dir, **settings) -> Trainee:
    """As a training of the stage `reward` begins."""
    settings = TrainSettings(**CONFIG | settings)
    objective = OBJECTIVES["likelihood"](settings)
    ranks = parallel.Ranks(0, 1, torch.device("cpu"))
    return fit.make_trainee(objective, settings, read_config(model_dir)[0], model_dir, ranks)


@pytest.fixture(params=["llama3", "qwen2", "qwen3"])
def theirs(request, tmp_path):
    """(PEFT's model, its directory): an adapter that is not at its beginning, as PEFT saves it."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = make_checkpoint(tmp_path / "base", request.param)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), peft.LoraConfig(**PEFT)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_gradients_and_logits_are_pefts(theirs):
    """On the same weights, level 2. A wrong scale, a layer left out or a frozen half would show here."""
    model, directory = theirs
    merged, tokenizer = gramr2.load(directory)
    assert tokenizer.stop_ids  # the base's
    output = model(torch.tensor([IDS]), labels=torch.tensor([IDS]))
    torch.testing.assert_close(logits(merged), output.logits[0].float(), atol=2e-5, rtol=1e-4)

    output.loss.backward()
    trainee = trainee_of(directory, lora_rank=4, lora_alpha=6.0, lora_layers=("q", "o", "up"))
    trainee(batch()).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(wanted) == len(trainee.trained) == 2 * 3 * len(trainee.decoder.blocks)
    places = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "up": "mlp.up_proj"}
    for name, parameter in trainee.trained.items():
        _, block, _, word, half, _ = name.split(".")
        path = f"base_model.model.model.layers.{block}.{places[word]}.lora_{half.upper()}.default.weight"
        gradient = wanted[path] * (len(IDS) - 1)  # theirs is of the mean, ours of the sum
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in trainee.parameters() if not p.requires_grad)


@pytest.mark.parametrize("stage", ["reward", "discriminative"])
def test_what_is_trained_here_peft_loads(tmp_path, stage):
    """The same logits there as here. Merged they are those of the adapter beside its base, to rounding."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, data = make(tmp_path)
    scores = stage == "discriminative"
    fit.train(stage, TrainSettings(**CONFIG | LORA | {"steps": 6}), [data], model, tmp_path / "out")
    place = tmp_path / "out" / "model"
    kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    base = kind.from_pretrained(model, dtype=torch.float32, **({"num_labels": 1} if scores else {}))
    theirs = peft.PeftModel.from_pretrained(base, place)
    ours, _ = gramr2.load(place)
    with torch.no_grad():
        if scores:
            theirs.config.pad_token_id = 0
            wanted = theirs(torch.tensor([IDS])).logits[0]
            found = RewardModel.load(place).scores([IDS])
            assert abs(found[0]) > 1e-3  # it has learnt
            torch.testing.assert_close(torch.tensor(found), wanted, atol=2e-5, rtol=1e-4)
            return
        wanted = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(ours), wanted, atol=5e-5, rtol=1e-4)
    beside = trainee_of(place, lora_rank=4).decoder
    torch.testing.assert_close(logits(ours), logits(beside), atol=5e-5, rtol=1e-4)
    start, _ = gramr2.load(model)
    assert (logits(ours) - logits(start)).abs().max() > 1e-2


def test_a_whole_width_of_rank_learns_what_full_tuning_learns(tmp_path):
    """With A the identity, B is the change of W: the same losses, step by step. A rank that is not whole, or
    a scale that is not alpha / r, leaves them."""
    model = make_checkpoint(tmp_path / "base")
    full = trainee_of(model)
    width = max(full.decoder.config.hidden_size, full.decoder.config.intermediate_size)
    wide = trainee_of(model, lora_rank=width, lora_alpha=float(width))
    for name, parameter in full.decoder.named_parameters():
        parameter.requires_grad_(".attention." in name or ".mlp." in name)
    for name, parameter in wide.decoder.named_parameters():
        if name.endswith(".a.weight"):
            torch.nn.init.eye_(parameter.requires_grad_(False))
    losses = [losses_of(trainee) for trainee in (full, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]


def losses_of(trainee: Trainee, steps: int = 12) -> list[float]:
    weights = [*trainee.trained.values()]
    optimizer = fit.make_optimizer(weights, TrainSettings(**CONFIG | {"lr": 3e-3}))
    losses = []
    for _ in range(steps):
        loss = trainee(batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_killed_resumed_and_moved_between_ranks(tmp_path):
    """Level 1 on one rank; level 2 on two, where FSDP splits frozen weights too, and in bfloat16."""
    model, data = make(tmp_path)
    settings = LORA | {"steps": 8, "save_steps": 2}
    half = {"dtype": "bfloat16"}
    jobs = [job(tmp_path / "whole", model, data, config=settings)]
    jobs += [job(tmp_path / "cut", model, data, config=settings, kill=["after", 3])]
    jobs += [job(tmp_path / "cut", model, data, config=settings)]
    jobs += [job(tmp_path / "two", model, data, config=settings, ranks=2)]
    jobs += [job(tmp_path / "moved", model, data, config=settings, stop_at=3, ranks=2)]
    jobs += [job(tmp_path / "moved", model, data, config=settings)]
    jobs += [job(tmp_path / "half", model, data, config=settings | half)]
    jobs += [job(tmp_path / "half-two", model, data, config=settings | half, ranks=2)]
    results = [each["statuses"] for each in drive(jobs)]
    assert [set(each) for each in results] == [{0}, {-9}, {0}, {0}, {130}, {0}, {0}, {0}]
    assert same_bits(tmp_path / "whole", tmp_path / "cut")
    for name in ("two", "moved"):
        assert curve(tmp_path / name) == pytest.approx(curve(tmp_path / "whole"), abs=1e-4)
        assert distance(tmp_path / name, tmp_path / "whole") < 1e-2
    assert curve(tmp_path / "half") == pytest.approx(curve(tmp_path / "whole"), abs=0.1)
    assert curve(tmp_path / "half-two") == pytest.approx(curve(tmp_path / "half"), abs=0.05)
    assert all("lora_" in name for name in weights_of(tmp_path / "whole"))


def test_a_stage_goes_on_with_an_adapter_or_with_what_it_makes_of_its_base(tmp_path):
    """With the same rank the adapter goes on, and its base stays; without one, all of the merged model."""
    model, data = make(tmp_path)
    settings = TrainSettings(**CONFIG | LORA | {"steps": 4})
    fit.train("reward", settings, [data], model, tmp_path / "first")
    first = tmp_path / "first" / "model"
    begun = trainee_of(first, lora_rank=4)
    merged, _ = gramr2.load(first)
    torch.testing.assert_close(logits(begun.decoder), logits(merged), atol=5e-5, rtol=1e-4)

    fit.train("finetune", settings, [data], first, tmp_path / "second")
    assert base_of(tmp_path / "second" / "model") == model.resolve()
    fit.train("finetune", TrainSettings(**CONFIG | {"steps": 2}), [data], first, tmp_path / "whole")
    assert base_of(tmp_path / "whole" / "model") is None
    with pytest.raises(InputError, match="another rank, alpha or choice of layers"):
        trainee_of(first, lora_rank=8)


def test_merge_leaves_a_whole_model_that_answers_alike(tmp_path, capsys):
    model, data = make(tmp_path)
    fit.train("reward", TrainSettings(**CONFIG | LORA | {"steps": 4}), [data], model, tmp_path / "run")
    adapter, out = tmp_path / "run" / "model", tmp_path / "whole"
    assert train_command.main(["--merge", str(adapter), "--out", str(out)]) == 0
    assert f"model: {out}" in capsys.readouterr().out
    shutil.rmtree(model)  # the base is no longer wanted
    (one, _) = gramr2.load(out)
    assert (out / "judge_prompt.txt").exists()
    with pytest.raises(InputError, match="there is no base model"):
        gramr2.load(adapter)
    assert logits(one).isfinite().all()
    with pytest.raises(InputError, match="is no adapter"):
        train_command.main(["--merge", str(out), "--out", str(tmp_path / "again")])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"base_model_name_or_path": "hub/name"}, "there is no base model hub/name here"),
        ({"r": "four"}, "r"),
    ],
)
def test_an_adapter_that_would_be_computed_otherwise_is_refused(tmp_path, change, line):
    model, data = make(tmp_path)
    fit.train("reward", TrainSettings(**CONFIG | LORA | {"steps": 1}), [data], model, tmp_path / "run")
    place = tmp_path / "copy"
    shutil.copytree(tmp_path / "run" / "model", place)
    (place / "seals.json").unlink()
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=line):
        gramr2.load(place)


def test_an_adapter_of_other_weights_is_refused(tmp_path):
    """Merged into another base it would answer, and mean nothing."""
    model, data = make(tmp_path)
    fit.train("reward", TrainSettings(**CONFIG | LORA | {"steps": 1}), [data], model, tmp_path / "run")
    other = make_checkpoint(tmp_path / "other", "llama3", seed=1, max_positions=2048)
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    with pytest.raises(InputError, match="trained on other weights"):
        gramr2.load(tmp_path / "run" / "model")


def test_in_a_loop_one_base_is_in_memory_at_a_time_and_every_round_begins_from_it(
    small, tmp_path, monkeypatch
):
    """Two of 8B, to prove and to judge or to train and to sample from, would not fit a card."""
    alive, loads = weakref.WeakSet(), []

    def alone(module, name):
        original = getattr(module, name)

        def first(*arguments, **named):
            gc.collect()
            assert not alive, f"{name} while another model is held"
            model = original(*arguments, **named)
            alive.add(model)
            loads.append(name)
            return model

        monkeypatch.setattr(module, name, first)

    alone(weights, "load_model")
    alone(fit, "make_trainee")
    monkeypatch.chdir(tmp_path)
    assert selftrain.main(["--recipe", str(small), "--lora-rank", "4", "--no-baselines"]) == 0
    assert loads.count("make_trainee") == 4 and loads.count("load_model") >= 7
    models = {path.parent.name: base_of(path) for path in tmp_path.glob("runs/small/steps/*/model")}
    backbone, prover = (micro_model(small, name) for name in ("backbone", "prover"))
    assert len(models) == 4
    for step, base in models.items():
        assert base == (prover if step.endswith("-prover") else backbone)


def micro_model(recipe, name):
    return Path(tomllib.loads(recipe.read_text())["models"][name]).resolve()
