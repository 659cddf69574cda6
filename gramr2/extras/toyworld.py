"""The toy world: a shop whose prices nobody tells, on which the whole algorithm runs in minutes.

There are some goods, each with one price from 1 to 9, drawn anew for every seed and told by no question.
A question names a few goods; two clerks answer with price lists. One list is right throughout, the other
wrong in one place or more. Who knows the price of one disputed good can decide, and the better list then
teaches the other prices: that is how unlabelled pairs carry knowledge from round to round. Some goods are
new: they had no price yet when pairs were annotated, and both lists say 0 of them there, so that labels tell
nothing of what they cost. In unlabelled pairs and in the test all goods have their prices.

A rationale goes through the goods: what each costs, what each list says, whether that is right; then it
counts, then it concludes. The backbone is pre-trained on fragments of these forms with made-up prices: it
learns to copy names, to compare and to count, and knows no price. No fragment judges a question.

The world is a directory: human.jsonl (label and rationale), labelled.jsonl (label), unlabelled.jsonl (no
label; `truth.jsonl` beside it is for reporting only and is opened by nothing that trains or filters),
dev.jsonl, test.jsonl, and backbone/model/. The splits share no set of goods; they share the prices, which is
the point. The goods have the same names in every world, so one backbone serves all seeds: it is shipped
(toy_backbone/, made by `python train.py --stage pretrain`, settings and hashes in its training.json). A world
of another shape has pretrain.jsonl and backbone_init/ instead, a random model with its tokenizer and prompts.

It leaves out: language. The tokenizer has a token for each word and for each fixed phrase of the prompts
and answers, so that the form which the real data have costs the toy only a few tokens.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gramr2.denoise import RationaleFilter
from gramr2.files import InputError, JsonRow, need, read_json, write_json, write_rows
from gramr2.prompts import judge_prompt, label_target, parse_rationale, proof_from_rationale
from gramr2.recipes import read_recipe, resolve
from gramr2.records import Pair, mark, show
from gramr2.settings import FilterSettings, check_limits, setting

Prices = dict[str, int]
Goods = tuple[str, ...]
SHIPPED = Path(__file__).parent / "toy_backbone"
COUNT: dict[str, Any] = {"low": 1, "high": 10**7}
TOO_FEW = "[world] goods: {} goods give too few questions for {} pairs"
SPLITS = ("human", "labelled", "unlabelled", "dev", "test")
JUDGE_TEMPLATE = "{question}\nResponse A: {response_a}\nResponse B: {response_b}"
PROVER_TEMPLATE = "Prove {label}: {question}\nResponse A: {response_a}\nResponse B: {response_b}"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Fixed phrases of prompts, rationales, proofs and verdicts: a token each.
PHRASES = (
    *(" Response A", " Response B", "Response A", "Response B", "\nResponse A:", "\nResponse B:"),
    *("<think>\n", "</think>\n<answer>\n", "<answer>\n", "\n</answer>", "\n\n", "\n"),
    *("Feedback:\n", "Comparison:\n", "Conclusion:\n"),
    *(f"This argument justifies the choice of Response {letter}." for letter in "AB"),
    *("The responses in turn:", "Comparing the two:", "Therefore:"),
)
WORDS: tuple[str, ...] = ("A", "B", "unknown", "Prove")
WORDS += tuple(f" {word}" for word in ("A", "B", "yes", "no", "costs", "right", "is", "better", "price"))
WORDS += ("price", "Prices", " Prices", " of", ":", ",", ".", "?", *(f" {digit}" for digit in range(10)))


@dataclass(frozen=True)
class WorldSettings:
    """Sizes of the world and of its backbone."""

    directory: str = setting("", "where train.py keeps it; a self-training run has one of its own")
    goods: int = setting(160, "goods in the shop", low=4, high=1000)
    settled: int = setting(
        160, "goods that have a price in annotated pairs; both lists say 0 of the others", low=1, high=1000
    )
    asked: int = setting(3, "goods that a question names", low=2, high=9)
    human: int = setting(60, "pairs with a human rationale", **COUNT)
    labelled: int = setting(160, "pairs with a label only", **COUNT)
    unlabelled: int = setting(2400, "pairs without a label, over all rounds", **COUNT)
    dev: int = setting(300, "held-out pairs for choosing settings", **COUNT)
    test: int = setting(1500, "held-out pairs for reporting", **COUNT)
    pretrain: int = setting(20000, "fragments for the backbone", **COUNT)
    hidden_size: int = setting(96, "width of the backbone", low=8, high=2**14)
    layers: int = setting(3, "blocks of the backbone", low=1, high=1000)
    heads: int = setting(4, "attention heads of the backbone", low=1, high=512)

    def __post_init__(self):
        check_limits(self)
        whole = self.hidden_size % self.heads == 0 and self.hidden_size // self.heads % 2 == 0
        need(self.layers * self.hidden_size**2 < 2**32, "[world] hidden_size, layers: no toy is that large")
        need(whole, f"[world] hidden_size: {self.hidden_size} does not divide into {self.heads} even heads")
        # Questions are drawn until one is new: where nearly all are taken, that would never end.
        pairs = sum(getattr(self, split) for split in SPLITS)
        told = math.comb(self.goods, self.asked) - math.comb(max(0, self.goods - self.settled), self.asked)
        need(3 * pairs <= 2 * math.comb(self.goods, self.asked), TOO_FEW.format(self.goods, pairs))
        need(3 * (self.human + self.labelled) <= 2 * told, TOO_FEW.format(self.settled, "the annotated"))


def world_table(recipe: Path) -> tuple[str, JsonRow]:
    """A recipe's [world]: where it is to lie, and the sizes that it names."""
    directory = resolve(WorldSettings, recipe, ["world"], {}).directory
    table = read_recipe(recipe).get("world", {})
    return directory, {name: value for name, value in table.items() if name != "directory"}


def good_names(count: int) -> list[str]:
    """Pronounceable names of two syllables, the same in every world."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u")]
    names = [one + two for one, two in itertools.product(syllables, repeat=2)]
    return random.Random(7).sample(names, count)


def prices_of(seed: int, names: list[str]) -> Prices:
    """The secret of a world. For making it, and for measuring what was learnt of it."""
    rng = random.Random(f"prices {seed}")
    return {name: rng.randint(1, 9) for name in names}


def _list(goods: Goods, prices: Prices) -> str:
    return ", ".join(f"{good} {prices[good]}" for good in goods) + "."


def _wrong_prices(goods: Sequence[str], prices: Prices, rng: random.Random) -> Prices:
    """The other clerk's list: wrong about one of these goods or more, about few the likelier."""
    places = min(len(goods), rng.choices((1, 2, 3), (0.4, 0.35, 0.25))[0])
    wrong = dict(prices)
    for good in rng.sample(goods, places):
        wrong[good] = rng.choice([price for price in range(1, 10) if price != prices[good]])
    return wrong


def rationale(goods: Goods, prices: Prices, lists: dict[str, Prices]) -> str:
    """What someone who knows the prices writes about two lists: good by good, the count, the conclusion."""
    counts, lines = {"A": 0, "B": 0}, []
    for good in goods:
        said = []
        for letter, listed in lists.items():
            right = listed[good] == prices[good]
            counts[letter] += right
            said.append(f"Response {letter} {listed[good]} {'yes' if right else 'no'}")
        lines.append(f"{good} costs {prices[good]}: {', '.join(said)}.")
    better = "A" if counts["A"] > counts["B"] else "B"
    return (
        f"Feedback:\nPrices: {' '.join(lines)}\n\nComparison:\n"
        f"Response A {counts['A']} right, Response B {counts['B']} right.\n\n"
        f"Conclusion:\nResponse {better} is better."
    )


_LINE = re.compile(r"(\w+) costs (\d): Response ([AB]) (\d) (yes|no), Response ([AB]) (\d) (yes|no)\.")
_COUNT = re.compile(r"Response ([AB]) (\d) right, Response ([AB]) (\d) right\.")


def coherent(pair: Pair, written: str, settings: FilterSettings) -> str | None:
    """The shop's own rule: flags follow from prices, counts from flags, the conclusion from counts.

    It reads the pair and the rationale alone and knows no price: a wrong price that is kept to throughout
    is coherent. Of pairs that ask for no prices it has nothing to say.
    """
    if not pair.question.startswith("price of "):
        return None
    reading = parse_rationale(show(written)).rationale
    if reading is None:
        return "not in the three parts"
    responses = {"A": pair.response_a, "B": pair.response_b}
    listed = {letter: dict(re.findall(r"(\w+) (\d)", each)) for letter, each in responses.items()}
    right = {"A": 0, "B": 0}
    lines = _LINE.findall(reading.feedback)
    if [line[0] for line in lines] != list(listed["A"]):
        return "does not go through the goods that were asked for"
    for good, price, *said in lines:
        if {said[0], said[3]} != {"A", "B"}:
            return "speaks of one response twice"
        for letter, quote, flag in (said[:3], said[3:]):
            if quote != listed[letter].get(good):
                return "quotes what the responses do not say"
            if flag != ("yes" if quote == price else "no"):
                return "a flag contradicts its price"
            right[letter] += flag == "yes"
    counted = _COUNT.search(reading.comparison)
    if not counted or {counted[1]: int(counted[2]), counted[3]: int(counted[4])} != right:
        return "the count contradicts the flags"
    if right["A"] == right["B"]:
        return "the count decides nothing"
    better = "A" if right["A"] > right["B"] else "B"
    stated = f"Response {better} is better." == reading.conclusion
    return None if stated and pair.label in (None, better) else "the conclusion contradicts the count"


def world_rules(plan: dict[str, Any]) -> dict[str, RationaleFilter]:
    """The rules that a run's plan asks for beside those of plain text."""
    return {"coherence": coherent} if plan["coherence"] == "the shop's" else {}


def make_pair(goods: Goods, prices: Prices, rng: random.Random, split: str, told: Set = frozenset()) -> Pair:
    """A question with its two lists; the better one is A or B. Of goods that are not `told`, both say 0."""
    label, untold = rng.choice("AB"), [good for good in goods if told and good not in told]
    prices = prices | dict.fromkeys(untold, 0)
    wrong = _wrong_prices([good for good in goods if good not in untold], prices, rng)
    lists = {"A": prices, "B": wrong} if label == "A" else {"A": wrong, "B": prices}
    return Pair(
        messages=(("user", f"price of {' '.join(goods)}?"),),
        response_a=_list(goods, lists["A"]),
        response_b=_list(goods, lists["B"]),
        label=label,
        rationale=mark(rationale(goods, prices, lists)) if split == "human" else None,
        source="shop",
        domain=f"{sum(lists['A'][g] != lists['B'][g] for g in goods)} disputed",
    )


_CONCLUSION, _THEREFORE = "\n\nConclusion:\n", "\n\nTherefore: "


def _fragments(names: list[str], asked: int, count: int, rng: random.Random) -> Iterator[dict[str, str]]:
    """Skills without knowledge: prices are made up anew in each fragment, and none is a judgment."""
    for _ in range(count):
        goods = tuple(rng.sample(names, asked))
        pair = make_pair(goods, {good: rng.randint(1, 9) for good in goods}, rng, "human")
        pair = pair.swapped() if rng.random() < 0.5 else pair  # then the statements about B come first
        written, label = show(str(pair.rationale)), str(pair.label)
        proof = show(proof_from_rationale(str(pair.rationale), label))
        copied, kind = judge_prompt(pair, JUDGE_TEMPLATE), rng.random()
        if kind < 0.4:  # copy, compare and count
            yield {"prompt": copied, "response": f"<think>\n{written.partition(_CONCLUSION)[0]}"}
        elif kind < 0.8:  # the same in a proof's words, for a choice that is stated
            yield {"prompt": copied, "response": proof.partition(_THEREFORE)[0]}
        elif kind < 0.9:  # conclude from counts
            counts, _, rest = written.partition("Comparison:\n")[2].partition(_CONCLUSION)
            yield {"prompt": counts, "response": f"Conclusion:\n{rest}\n</think>\n{label_target(label)}"}
        else:
            counts, _, rest = proof.partition("Comparing the two: ")[2].partition(_THEREFORE)
            yield {"prompt": counts, "response": f"Therefore: {rest}"}


def tokenizer_files(names: list[str]) -> dict[str, bytes]:
    """A tokenizer of whole words that gives every text of this world back as it was."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unknown|>"]
    words = [*specials, *PHRASES, *WORDS, *(f" {name}" for name in names)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    fast = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\n| ?[^\w\s]|\s"), "isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens(specials)
    fast.add_tokens([tokenizers.AddedToken(phrase, normalized=False) for phrase in PHRASES])
    config = {"eos_token": "<|end|>", "unk_token": "<|unknown|>", "chat_template": CHAT_TEMPLATE}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {
        "tokenizer.json": fast.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps({"eos_token_id": 0}).encode(),
    }


def write_untrained(directory: Path, seed: int = 0, **sizes: int) -> None:
    """What a backbone is made from: the fragments, and a random model of the world's shape."""
    import torch

    from gramr2 import weights
    from gramr2.model import Decoder, ModelConfig
    from gramr2.tokenizer import Tokenizer

    settings = resolve(WorldSettings, None, [], sizes)
    names, rng = good_names(settings.goods), random.Random(f"fragments {seed}")
    write_rows(directory / "pretrain.jsonl", _fragments(names, settings.asked, settings.pretrain, rng))
    tokenizer = Tokenizer(tokenizer_files(names), str(directory / "backbone_init"))
    shape = ModelConfig(
        vocab_size=-(-tokenizer.size // 16) * 16,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_layers=settings.layers,
        num_heads=settings.heads,
        num_kv_heads=settings.heads,
        head_size=settings.hidden_size // settings.heads,
        max_positions=512,
        tie_embeddings=False,
        qk_norm=True,
    )
    model = Decoder(shape)
    generator = torch.Generator().manual_seed(seed)
    for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):
        torch.nn.init.normal_(matrix, std=shape.hidden_size**-0.5, generator=generator)
    prompts = {"judge_prompt.txt": JUDGE_TEMPLATE, "prover_prompt.txt": PROVER_TEMPLATE}
    weights.save(model, tokenizer, directory / "backbone_init", extra=prompts)


def make_world(directory: Path, seed: int = 0, **sizes: int) -> Path:
    """Writes the world, or finds it written; the same seed and sizes give the same bytes."""
    settings = resolve(WorldSettings, None, [], sizes)
    directory, world = Path(directory), {"seed": seed, **vars(settings)}
    del world["directory"]
    about = directory / "world.json"
    if about.is_file():
        if read_json(about) != world:
            raise InputError(f"{about}: a world of another seed or size; name another directory")
        return directory
    begun = directory / ".begun"  # by a making that was cut
    theirs = [path for path in directory.glob("*") if not begun.exists()]
    need(not theirs, f"{directory}: holds files, but no world.json, and is no world; name another directory")
    directory.mkdir(parents=True, exist_ok=True)
    begun.touch()
    names, rng = good_names(settings.goods), random.Random(f"shop {seed}")
    prices = prices_of(seed, names)
    counts = [getattr(settings, split) for split in SPLITS]
    sets = _distinct_sets(names, settings.asked, rng)
    for split, count in zip(SPLITS, counts, strict=True):
        told = set(names[: settings.settled] if split in ("human", "labelled") else names)
        asked = (goods for goods in sets if told & set(goods))
        pairs = [make_pair(goods, prices, rng, split, told) for goods in itertools.islice(asked, count)]
        if split == "unlabelled":
            write_rows(directory / "truth.jsonl", ({"id": pair.id, "label": pair.label} for pair in pairs))
            pairs = [Pair.from_json({**pair.to_json(), "label": None}) for pair in pairs]
        write_rows(directory / f"{split}.jsonl", (pair.to_json() for pair in pairs))
    if is_shipped(settings):
        shutil.copytree(SHIPPED, directory / "backbone" / "model", dirs_exist_ok=True)
    else:
        write_untrained(directory, seed, **sizes)
    write_json(about, world)  # last: a world without it is made anew
    begun.unlink()
    return directory


def is_shipped(settings: WorldSettings) -> bool:
    """Whether the shipped backbone knows this world's words and has its shape."""
    about = read_json(SHIPPED / "config.json")
    shape = (about["hidden_size"], about["num_hidden_layers"], about["num_attention_heads"])
    words = tokenizer_files(good_names(settings.goods))["tokenizer.json"]
    same = words == (SHIPPED / "tokenizer.json").read_bytes()
    return same and shape == (settings.hidden_size, settings.layers, settings.heads)


def _distinct_sets(names: list[str], size: int, rng: random.Random) -> Iterator[Goods]:
    """Sets of goods, every good as often as another, and none twice: splits share no question."""
    drawn: set[frozenset[str]] = set()
    deck: list[str] = []
    while True:
        deck = deck if len(deck) >= size else rng.sample(names, len(names))
        goods = tuple(deck.pop() for _ in range(size))
        if frozenset(goods) not in drawn:
            drawn.add(frozenset(goods))
            yield goods
