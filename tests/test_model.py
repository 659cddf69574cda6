"""The decoder is the published models' function: transformers is the oracle."""

import json

import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint, random_model, randomise

from gramr2 import weights
from gramr2.kernels.packed_attention import packed_causal, packed_positions

transformers = pytest.importorskip("transformers", reason="the oracle (dev extra) is not installed")
LENGTHS = [7, 1, 40, 7, 19]  # equal and unequal, one of a single token, one past llama3's old context


def ragged(vocab_size: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator) for n in LENGTHS]


def our_logits(model, sequences) -> list[torch.Tensor]:
    lengths = [len(ids) for ids in sequences]
    hidden_TD = model(torch.cat(sequences), packed_positions(lengths, "cpu"), packed_causal(lengths, "cpu"))
    return list((hidden_TD @ model.head_weight.T).split(lengths))


def their_logits(model, sequences) -> list[torch.Tensor]:
    return [model(ids[None]).logits[0] for ids in sequences]


def difference(ours, theirs) -> float:
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_logprobs_of_a_saved_checkpoint_equal_transformers(tmp_path, family):
    """A wrong norm, bias, rotation, head split or tie moves the logits. We wrote the file, they read it."""
    directory = make_checkpoint(tmp_path / "model", family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = weights.load_model(directory)
    sequences = ragged(320)
    a, b = our_logits(ours, sequences), their_logits(theirs, sequences)
    assert max(x.abs().max() for x in b) > 1  # random weights that move nothing would hide errors
    assert difference(a, b) < 1e-4
    assert difference([x.log_softmax(-1) for x in a], [x.log_softmax(-1) for x in b]) < 1e-4


ROPE4 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16}  # fmt: skip
PLAIN = {"rope_theta": 1e6, "rope_type": "default"}
THEIRS = {
    "llama": ("Llama", {"rope_parameters": {"rope_theta": 5e5, **ROPE4}, "head_dim": 18}),
    "llama-bias": ("Llama", {"rope_parameters": PLAIN, "attention_bias": True}),
    "qwen2": ("Qwen2", {"rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope_parameters": PLAIN, "head_dim": 26}),
}  # fmt: skip


def their_model(kind: str, head: str = "ForCausalLM", **fields):
    name, special = THEIRS[kind]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=331, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, **special, **fields,
    )  # fmt: skip
    model = getattr(transformers, f"{name}{head}")(config).eval()
    randomise(model, seed=3)
    return model


def spell_as_transformers_4(directory) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    raw["torch_dtype"] = raw.pop("dtype")
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("most", ["10GB", "40KB"])
@pytest.mark.parametrize("kind", THEIRS)
@torch.no_grad()
def test_loads_what_transformers_saves_and_saves_it_again_unchanged(tmp_path, kind, most, spelling):
    """Both spellings of config.json, one file and several; the way back keeps names, dtypes and bytes."""
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=most)
    if spelling == 4:
        spell_as_transformers_4(tmp_path / "theirs")
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (most == "40KB")
    ours = weights.load_model(tmp_path / "theirs", dtype="auto")
    sequences = ragged(331)
    assert difference(our_logits(ours, sequences), their_logits(theirs, sequences)) < 1e-4

    weights.save(ours, None, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert difference(their_logits(again, sequences), their_logits(theirs, sequences)) < 1e-6
    before, after = (weights._tensor_files(tmp_path / name) for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name in before:
        with weights.open_tensors(before[name]) as one, weights.open_tensors(after[name]) as two:
            a, b = one.get_tensor(name), two.get_tensor(name)
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_scalar_head_of_a_sequence_classifier(tmp_path, kind, labels):
    """Skywork-style reward models: the score at the last token, and back to transformers."""
    theirs = their_model(kind, "ForSequenceClassification", num_labels=labels)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = weights.load_model(tmp_path / "theirs")
    weights.save(ours, None, tmp_path / "ours")
    kept = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    for ids in ragged(331):
        ids = ids.clamp(min=1)  # 0 is transformers' padding here
        hidden = ours(ids, torch.arange(len(ids)), packed_causal([len(ids)], "cpu"))
        expected = theirs(ids[None]).logits[0]
        assert difference([ours.score(hidden[-1])], [expected]) < 1e-4
        assert difference([kept(ids[None]).logits[0]], [expected]) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_bf16_is_as_near_to_float64_as_transformers_own(tmp_path, kind):
    """Rounding at other places than the published code would show as a larger distance from the truth."""
    theirs = their_model(kind)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    sequences = ragged(331)
    truth = their_logits(theirs.double(), sequences)
    theirs = theirs.to(torch.bfloat16)
    ours = weights.load_model(tmp_path / "model", dtype="bfloat16")

    def rms_error(logits):
        return (
            torch.cat([(a.double() - b).flatten() for a, b in zip(logits, truth, strict=True)])
            .square()
            .mean()
            .sqrt()
        )

    assert rms_error(our_logits(ours, sequences)) <= 1.1 * rms_error(their_logits(theirs, sequences))


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
@torch.no_grad()
def test_packed_equals_alone(family):
    """A sequence's hidden states must not depend on its neighbours in the pack, in any order."""
    model = random_model(family)
    sequences = ragged(320)
    alone = [our_logits(model, [ids])[0] for ids in sequences]
    assert difference(our_logits(model, sequences), alone) < 1e-5
    assert difference(our_logits(model, sequences[::-1])[::-1], alone) < 1e-5


def test_packed_gradients_equal_alone():
    """Training runs on packs: the backward must keep sequences apart as well."""
    model = random_model("qwen3")
    sequences = ragged(320)

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            sum(logits.logsumexp(-1).sum() for logits in our_logits(model, batch)).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for a, b in zip(gradients([sequences]), gradients([[ids] for ids in sequences]), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_an_empty_pack_runs():
    """Ranks with less work run empty packs: they must give a zero gradient, not an error."""
    model = random_model("llama3")
    empty = torch.empty(0, dtype=torch.int64)
    model(empty, packed_positions([], "cpu"), packed_causal([], "cpu")).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
