"""The shop: what its backbone can do, what it cannot know, and that no question or truth leaks."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import gramr2
from gramr2 import prompts
from gramr2.data import Store
from gramr2.extras import toyworld
from gramr2.files import InputError
from gramr2.recipes import read_recipe, resolve
from gramr2.records import Pair, show
from gramr2.settings import SelfTrainSettings, TrainSettings

ROOT = Path(__file__).parents[1]
FILTER_SETTINGS = SelfTrainSettings().filters()
SMALL = dict(human=20, labelled=30, unlabelled=60, dev=20, test=40, pretrain=200)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return toyworld.make_world(tmp_path_factory.mktemp("world"), seed=3, **SMALL)


def pairs_of(world: Path, split: str) -> list[Pair]:
    return list(Store(world / f"{split}.jsonl", Pair.from_json))


def goods_of(pair: Pair) -> frozenset[str]:
    return frozenset(pair.question.removeprefix("price of ").removesuffix("?").split())


def test_the_splits_share_prices_and_no_question(world):
    sets = {split: [goods_of(pair) for pair in pairs_of(world, split)] for split in toyworld.SPLITS}
    every = [goods for split in sets.values() for goods in split]
    assert len(set(every)) == len(every)
    price = {}
    for split in ("human", "labelled", "dev", "test"):
        for pair in pairs_of(world, split):
            right = pair.response_a if pair.label == "A" else pair.response_b
            for good, told in re.findall(r"(\w+) (\d)", right):
                assert price.setdefault(good, told) == told


def test_annotation_tells_nothing_of_new_goods_and_names_all(tmp_path):
    """Else a judge trained on it could not write a new good's name, or knew its price without the pool."""
    world = toyworld.make_world(tmp_path, seed=3, settled=80, **SMALL | {"human": 50, "labelled": 100})
    settled = set(toyworld.good_names(160)[:80])
    named, priced = Counter(), {split: set() for split in ("human", "labelled", "unlabelled")}
    for split, found in priced.items():
        for pair in pairs_of(world, split):
            found |= {good for good, price in re.findall(r"(\w+) ([1-9])", pair.response_a + pair.response_b)}
            named.update(goods_of(pair) if split != "unlabelled" else ())
    assert priced["human"] | priced["labelled"] <= settled and len(named) == 160
    assert priced["unlabelled"] - settled


def test_unlabelled_pairs_carry_neither_label_nor_order(world):
    """The truth stands in its own file, and A is right as often as B."""
    rows = [json.loads(line) for line in (world / "unlabelled.jsonl").read_text().splitlines()]
    assert not any({"label", "rationale"} & set(row) for row in rows)
    truth = [json.loads(line)["label"] for line in (world / "truth.jsonl").read_text().splitlines()]
    assert len(truth) == len(rows) and 15 < Counter(truth)["A"] < 45


def test_human_rationales_are_coherent_and_their_proof_form_gives_them_back(world):
    for pair in pairs_of(world, "human"):
        assert toyworld.coherent(pair, pair.rationale, FILTER_SETTINGS) is None
        for shown in (pair, pair.swapped()):
            proof = show(prompts.proof_from_rationale(shown.rationale, shown.label))
            back = prompts.rationale_from_proof(proof)
            assert back.label == shown.label and str(back.rationale) == show(shown.rationale)


def test_the_rule_of_coherence_catches_each_kind_of_slip(world):
    pair = pairs_of(world, "human")[0]
    text = pair.rationale
    better, worse = (f"Response ⟦{letter}⟧" for letter in (pair.label, "AB"[pair.label == "A"]))
    first = re.search(r"(\w+) costs (\d)", text)
    slips = {
        "goods": text.replace(first[1], "nobody"),
        "a flag": text.replace(" yes", " no", 1),
        "quotes": re.sub(r"(Response ⟦A⟧ )\d (yes|no)", r"\g<1>0 no", text, count=1),
        "count": re.sub(r"\d right", "0 right", text),
        "conclusion": text.replace(f"{better} is better", f"{worse} is better"),
        "three parts": text.partition("Conclusion:")[0],
    }
    for what, slip in slips.items():
        assert what in str(toyworld.coherent(pair, slip, FILTER_SETTINGS)), what
    other = replace(pair, label="AB"[pair.label == "A"])
    assert "conclusion" in toyworld.coherent(other, text, FILTER_SETTINGS)


def test_a_fragment_is_never_a_judgment():
    """No fragment goes from a question to a verdict, and a good's price differs from fragment to fragment."""
    names = toyworld.good_names(160)
    prices = {}
    for row in toyworld._fragments(names, 3, 2000, random.Random(1)):
        assert not ("price of" in row["prompt"] and "better" in row["response"])
        for good, price in re.findall(r"(\w+) costs (\d)", row["response"]):
            prices.setdefault(good, []).append(price)
    shares = [max(Counter(told).values()) / len(told) for told in prices.values()]
    assert sum(shares) / len(shares) < 0.3


def test_the_same_seed_makes_the_same_world_and_other_sizes_are_refused(world, tmp_path):
    again = toyworld.make_world(tmp_path / "w", seed=3, **SMALL)
    for name in (*(f"{split}.jsonl" for split in toyworld.SPLITS), "truth.jsonl"):
        assert (again / name).read_bytes() == (world / name).read_bytes(), name
    with pytest.raises(InputError, match="another seed or size"):
        toyworld.make_world(again, seed=4, **SMALL)


def test_the_shipped_backbone_is_what_the_recipe_makes():
    """Its size, and the settings that remake it; a recipe that moved on would ship an orphan."""
    assert (toyworld.SHIPPED / "model.safetensors").stat().st_size <= 4 * 2**20
    said = json.loads((toyworld.SHIPPED / "training.json").read_text())["run"]
    recipe = ROOT / "recipes/toy.toml"
    now = resolve(TrainSettings, recipe, ["train", "train.pretrain"], {})
    assert said["stage"] == "pretrain"
    for name in ("steps", "batch_size", "lr", "weight_decay", "seed", "max_length"):
        assert said[name] == str(getattr(now, name)), name
    world = resolve(toyworld.WorldSettings, None, [], {
        name: value for name, value in read_recipe(recipe)["world"].items() if name != "directory"
    })  # fmt: skip
    assert toyworld.is_shipped(world)


def test_the_shipped_backbone_copies_compares_and_counts():
    """At least 99% of names, quotes and flags: otherwise every arm of the study fails for one reason."""
    model, tokenizer = gramr2.load(toyworld.SHIPPED)
    names = toyworld.good_names(160)
    asked = [
        row for row in toyworld._fragments(names, 3, 100, random.Random("fresh"))
        if "costs" in row["response"] and row["response"].startswith("<think>")
    ]  # fmt: skip
    prompts_ids = [tokenizer.chat([{"role": "user", "content": row["prompt"]}]) for row in asked]
    written = gramr2.generate(model, prompts_ids, temperature=0.0, max_new_tokens=60, progress=False)
    right = total = 0
    for row, (sample,) in zip(asked, written, strict=True):
        lists = {
            letter: dict(
                re.findall(r"(\w+) (\d)", row["prompt"].split(f"Response {letter}: ")[1].split("\n")[0])
            )
            for letter in "AB"
        }
        lines = toyworld._LINE.findall(tokenizer.decode(sample.ids))
        for good, line in zip(lists["A"], [*lines, *[()] * 3][:3], strict=True):
            total += 3
            if not line:
                continue
            said, price, *rest = line
            right += said == good
            right += all(lists[rest[i]].get(said) == rest[i + 1] for i in (0, 3))
            right += all((rest[i + 1] == price) == (rest[i + 2] == "yes") for i in (0, 3))
    assert right / total >= 0.99, right / total
