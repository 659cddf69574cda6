"""Log-probs of whole sequences: transformers is the oracle, and bad input is said before anything runs."""

import pytest
import torch
from checkpoints import make_checkpoint, random_model

import gramr2
from gramr2 import scoring
from gramr2.files import InputError
from gramr2.scoring import logprobs

transformers = pytest.importorskip("transformers", reason="the oracle (dev extra) is not installed")
LENGTHS = [30, 1, 7, 30, 2, 511]


def sequences(vocab_size: int = 320) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3-tied"])
@torch.no_grad()
def test_logprobs_equal_transformers_in_the_given_order(tmp_path, family):
    """Sorting into packs must be undone, and the last token of a sequence must predict nothing."""
    directory = make_checkpoint(tmp_path / "model", family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model, _ = gramr2.load(directory)
    scored = gramr2.logprobs(model, sequences())
    for ids, values in zip(sequences(), scored, strict=True):
        ids = torch.tensor(ids)
        expected = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        assert values.shape == expected.shape and values.dtype == torch.float32
        assert len(ids) == 1 or (values - expected).abs().max() < 1e-4


def test_the_budget_changes_nothing_but_the_packs(monkeypatch):
    model = random_model("qwen3")
    together = logprobs(model, sequences())
    monkeypatch.setattr(scoring, "TOKEN_BUDGET", 64)
    for one, other in zip(logprobs(model, sequences()), together, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ([[1, 2], []], "sequence 1 is empty"),
        ([[1, 2], [3, 320]], "sequence 1 holds the id 320, outside the vocabulary of 320"),
        ([[400, 320]], "sequence 0 holds the id 400"),
        ([[-1, 320]], "sequence 0 holds the id -1"),
        ([[1] * 513], "sequence 0 has 513 tokens; the model has 512 positions"),
    ],
    ids=["empty", "too large", "all too large", "negative", "too long"],
)
def test_bad_sequences_are_refused_by_their_place(bad, expected):
    with pytest.raises(InputError, match=expected):
        logprobs(random_model("llama3"), bad)


def test_a_scalar_head_has_no_logprobs():
    with pytest.raises(InputError, match="scalar head"):
        logprobs(random_model("llama3", num_labels=1), [[1, 2]])
