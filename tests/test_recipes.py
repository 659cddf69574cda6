"""Recipes: merged in one order, and refused by name."""

import json
from pathlib import Path

import pytest
from test_settings import Some

from gramr2.commands import selftrain, train
from gramr2.commands.selftrain import REGISTRIES
from gramr2.extras.policy_settings import PolicySettings
from gramr2.files import InputError
from gramr2.recipes import read_recipe, resolve, suited_lr
from gramr2.settings import SelfTrainSettings, Sources, TrainSettings, check_names
from gramr2.stages import STAGES

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


def recipe(tmp_path: Path, text: str) -> Path:
    (tmp_path / "r.toml").write_text(text)
    return tmp_path / "r.toml"


def test_later_layers_win_and_the_command_line_is_last(tmp_path):
    """Defaults < [train] < [train.reward] < flags."""
    path = recipe(
        tmp_path, "[train]\nwhole = 2\nreal = 2\nword = 'r'\n[train.reward]\nwhole = 3\nreal = 3.5\n"
    )
    found = resolve(Some, path, ["train", "train.reward"], {"whole": 4})
    assert found == Some(4, 3.5, "r", False, ())
    assert resolve(Some, path, ["train"], {}).real == 2.0
    assert resolve(Some, None, ["train"], {}) == Some()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[train]\nwole = 1", r"\[train\] : unknown setting wole; there are whole, real, word"),
        ("[train.provr]\nwhole = 1", r"unknown table \[train.provr\]; tables are train, train.prover"),
        ("whole = 1", "whole stands outside a table"),
        ("[train]\nwhole = 1.5", "whole: expected a whole number, got 1.5"),
        ("[train]\nflag = 1", "flag: expected true or false, got 1"),
        ("[train]\nnames = [1]", "names: expected text, got 1"),
        ("[train", "not a TOML recipe"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, text, message):
    """A misspelt setting that is passed over trains with a default that nobody chose."""
    with pytest.raises(InputError, match=message.replace(" :", ":?")):
        resolve(Some, recipe(tmp_path, text), ["train"], {})
    with pytest.raises(InputError, match="No such file"):
        read_recipe(tmp_path / "none.toml")


def write_config(place: Path, width: int, blocks: int, inner: int, words: int, room: int = 8192) -> Path:
    place.mkdir()
    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": inner}
    sizes |= {"vocab_size": words, "max_position_embeddings": room}
    (place / "config.json").write_text(json.dumps(sizes))
    return place


def test_what_a_recipe_leaves_open_suits_the_model_and_its_data(tmp_path):
    """No toy settings for a model that is not the toy. What a recipe says holds."""
    small = write_config(tmp_path / "135M", 576, 30, 1536, 49152)
    large = write_config(tmp_path / "8B", 4096, 32, 14336, 128256)
    few, many = (tmp_path / f"{rows}.jsonl" for rows in (500, 20_000))
    for path in few, many:
        path.write_text("{}\n" * int(path.stem))
    found = resolve(TrainSettings, None, ["train"], {}, small, [few])
    assert (found.lr, found.batch_size, found.epochs, found.max_length) == (1e-4, 8, 3.0, 4096)
    found = resolve(TrainSettings, None, ["train"], {"max_length": 2048}, large, [many])
    assert (found.lr, found.batch_size, found.epochs, found.max_length) == (5e-6, 64, 1.0, 2048)
    assert resolve(TrainSettings, None, ["train"], {"limit": 900}, large, [many]).epochs == 3.0
    # A run may go on with another budget of tokens, and so must not have its length from there.
    with pytest.raises(InputError, match="less than max_length"):
        resolve(TrainSettings, None, ["train"], {"token_budget": 2048}, large, [many])
    path = recipe(tmp_path, "[train]\nlr = 1e-2\nsteps = 7\n")
    found = resolve(TrainSettings, path, ["train"], {"batch_size": 3}, small, [few])
    assert (found.lr, found.batch_size, found.epochs, found.steps) == (1e-2, 3, 1.0, 7)
    assert resolve(PolicySettings, None, ["train"], {}, large, [few]).lr == pytest.approx(1e-6)
    with pytest.raises(InputError, match="no such model directory"):
        resolve(TrainSettings, None, ["train"], {}, tmp_path / "nowhere", [few])


def test_the_rate_that_suits_a_size_is_the_recipes_own():
    """It is a line through these: a recipe that moves away takes its reason with it."""
    for name, parameters in ("toy", 320_304), ("llama3.2-3b", 3.2e9), ("llama3.1-8b", 8e9):
        path = next(path for path in RECIPES if path.stem == name)
        own = resolve(TrainSettings, path, ["train"], {}).lr
        assert 0.8 < suited_lr(parameters) / own < 1.25


def test_only_the_toy_takes_the_toys_settings(tmp_path):
    """`train.py --model X` took the toy's 300 steps at 1e-2."""
    model = write_config(tmp_path / "135M", 576, 30, 1536, 49152)
    words = ["--stage", "reward"]
    of_toy, _ = train.resolved(train.parse(words))
    assert (of_toy.lr, of_toy.steps) == (1e-2, 300)
    settings, _ = train.resolved(train.parse([*words, "--model", str(model)]))
    assert (settings.lr, settings.steps) == (1e-4, 0)
    asked = [*words, "--model", str(model), "--recipe", str(train.TOY)]
    assert train.resolved(train.parse(asked))[0] == of_toy  # asked for by name


def test_each_stage_of_a_loop_suits_the_model_that_it_begins_from(tmp_path):
    """The prover may be of another size than the judge, and has other data."""
    small = write_config(tmp_path / "135M", 576, 30, 1536, 49152)
    large = write_config(tmp_path / "8B", 4096, 32, 14336, 128256)
    files = {}
    for name, rows in ("human", 500), ("labelled", 20_000):
        (tmp_path / name).write_text("{}\n" * rows)
        files[name] = (str(tmp_path / name),)
    path = recipe(tmp_path, "[train]\nwarmup = 0.1\n")
    _, found = selftrain.resolved(path, {"seed": 3}, Sources(str(small), str(large), **files))
    assert {each.seed for each in found.values()} == {3} and {each.warmup for each in found.values()} == {0.1}
    assert (found["prover"].lr, found["prover"].epochs) == (5e-6, 3.0)
    assert (found["generative"].lr, found["generative"].epochs) == (1e-4, 1.0)
    _, toy = selftrain.resolved(train.TOY, {}, Sources(str(small), **files))
    assert toy["reward"].lr == 1e-2  # pairs of one's own beside the toy's recipe train the toy's backbone


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_for_every_stage(path):
    """A recipe that is refused, or a field that was renamed under it, is found here and not on a node."""
    for stage in STAGES.values():
        resolve(TrainSettings, path, ["train", *stage.tables], {})
    resolve(PolicySettings, path, ["train", "train.policy"], {})
    check_names(resolve(SelfTrainSettings, path, ["selftrain"], {}), REGISTRIES)
    resolve(Sources, path, ["models", "data"], {})
