"""Settings: frozen dataclasses with a default and a line of help for every field.

`add_flags` gives every field of a dataclass its `--field-name`; recipes.py merges the defaults, a TOML recipe
and the command line. Defaults are for small models; recipes/toy.toml holds the toy's settings, the large
recipes those for the paper's models. The paper publishes hardly any setting of training: every value here is
a choice of ours. `check_identity` holds a run that goes on against what it was begun with.

It leaves out: recipes (recipes.py), environment variables, settings that change while a run is going, and
which names of filters and of scores there are: `check_names` holds settings against the registries that
define them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gramr2.fields import typed
from gramr2.files import InputError

# Settings that a run may be continued under with other values: they change how, not what, it computes.
FREE = {"device", "dtype", "threads", "fsdp_size", "recompute", "compile", "token_budget"}
FREE |= {"save_steps", "save_minutes", "side_by_side", "running"}
PROMPTS = ("long", "short")
DTYPES = ("auto", "float32", "bfloat16")
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")  # linear maps of a block, by our words (model.py)
PAIRS_PER_CALL = 64  # pairs of one generate call: enough to fill a batch, little to do again after a kill
PAIRS_ON_CUDA = 512  # there a batch is wider (requests.running_on_cuda), and the work is sooner done again


SEEDS: dict[str, Any] = {"low": 0, "high": 2**63 - 1}
SHARE: dict[str, Any] = {"low": 0, "high": 1}
# How answers are drawn, by the names that a generation_config.json has for it.
SAMPLING: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (float, {"low": 0, "high": 100}),
    "top_p": (float, {"above": 0, "high": 1}),
    "top_k": (int, {"low": 0, "high": 10**9}),
    "max_new_tokens": (int, {"low": 1, "high": 10**7}),
}


def pairs_per_call(device: str) -> int:
    """For a kind of device."""
    return PAIRS_ON_CUDA if device == "cuda" else PAIRS_PER_CALL


def setting(default: Any, text: str, **limits: Any) -> Any:
    """A field with its line of help, and the range that its value has to be in (fields.typed)."""
    return field(default=default, metadata={"help": text, "limits": limits})


def check_limits(settings: Any) -> None:
    """Refuses the first field whose value is not of its type, or out of its range."""
    kinds = typing.get_type_hints(type(settings))
    for each in dataclasses.fields(settings):
        typed(getattr(settings, each.name), kinds[each.name], each.name, **each.metadata["limits"])


@dataclass(frozen=True)
class TrainSettings:
    """One training stage. The objective is the stage's; what is here holds for all, or names its stage."""

    lr_share = 1.0  # of the rate that suits a model (recipes.suited_lr)

    batch_size: int = setting(16, "examples per optimizer step, over all ranks together", low=1, high=10**6)
    epochs: float = setting(1.0, "how often each example is seen; a fraction is allowed", low=0, high=10**6)
    steps: int = setting(
        0, "optimizer steps, instead of epochs; 0: as many as the epochs take", low=0, high=10**9
    )
    max_length: int = setting(
        512, "tokens of the longest example; longer ones are dropped and counted", low=1, high=10**7
    )
    token_budget: int = setting(
        4096, "tokens of one forward pass on one rank: examples packed together", low=1, high=10**9
    )
    limit: int = setting(0, "only the first N rows of the data; 0: all of them", low=0)
    seed: int = setting(
        0, "decides the order, the placement of A and B, and what the prover is not shown", **SEEDS
    )

    lr: float = setting(1e-3, "peak learning rate of AdamW", above=0)
    warmup: float = setting(0.05, "share of the steps over which the learning rate rises", **SHARE)
    final_lr: float = setting(0.1, "share of the peak that the cosine ends at", **SHARE)
    weight_decay: float = setting(
        0.0, "decoupled weight decay of matrices (norms and biases have none)", low=0
    )
    beta1: float = setting(0.9, "AdamW: memory of the gradient", low=0, below=1)
    beta2: float = setting(0.95, "AdamW: memory of its square", low=0, below=1)
    optimizer_dtype: str = setting(
        "float32",
        "what AdamW's two moments are kept in: float32, or bfloat16, which saves 4 of 16 bytes a parameter",
        among=("float32", "bfloat16"),
    )
    clip: float = setting(1.0, "largest norm of the gradient; 0 leaves it as it is", low=0)

    lora_rank: int = setting(
        0,
        "train adapters of this rank and leave the model as it is (LoRA); 0: train all of it",
        low=0,
        high=10**5,
    )
    lora_alpha: float = setting(0.0, "an adapter counts alpha / rank times; 0: twice the rank", low=0)
    lora_layers: tuple[str, ...] = setting(
        LAYERS, f"what has an adapter in each block, of {', '.join(LAYERS)}"
    )

    prompt: str = setting(
        "long",
        "which of this project's prompts a model gets that brings none: long, or short (a third of it, for "
        "small models)",
        among=PROMPTS,
    )
    label_smoothing: float = setting(
        0.0, "generative, as GRAM: the wrong letter's share of the target", **SHARE
    )
    use_margin: bool = setting(False, "discriminative: subtract the pair's margin, where the data has one")
    drop_condition: float = setting(
        0.1, "prover: share of examples without their condition (equation 5)", **SHARE
    )
    hide_label: float = setting(0.0, "prover: share of examples that are not told the label", **SHARE)

    device: str = setting(
        "auto", "auto (CUDA where there is one), cpu or cuda", among=("auto", "cpu", "cuda")
    )
    dtype: str = setting(
        "auto", "compute in bfloat16 or float32 (as weights are); auto: bfloat16 on CUDA", among=DTYPES
    )
    save_dtype: str = setting(
        "auto", "the saved model: float32, bfloat16, or auto, as the one it began from", among=DTYPES
    )
    threads: int = setting(1, "CPU threads per rank; the same number gives the same bits", low=1, high=1024)
    fsdp_size: int = setting(
        0, "ranks that one copy of the model is split over; 0: all (fewer: hybrid FSDP)", low=0, high=10**6
    )
    recompute: int = setting(
        -1,
        "blocks whose inside is computed again in the backward pass, which saves memory; -1: as many as the "
        "device's memory asks for, on the CPU none",
        low=-1,
        high=10**6,
    )
    compile: bool = setting(
        False, "compile each block: faster steps and less memory, after a minute at the start"
    )

    save_steps: int = setting(0, "steps between resume points; 0: by time only", low=0)
    save_minutes: float = setting(15.0, "minutes between resume points; 0: by steps only", low=0)
    date: str = setting("2025-01-01", "what a chat template that prints today's date prints")

    def __post_init__(self):
        check_limits(self)
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            raise InputError(f"date: expected one as 2025-01-31, got {self.date!r:.40}") from None
        require(
            self,
            ("lora_layers",),
            lambda words: words and {*words} <= {*LAYERS},
            f"must be of {', '.join(LAYERS)}",
        )
        if self.token_budget < self.max_length:
            raise InputError(
                f"token_budget: {self.token_budget} is less than max_length {self.max_length}, so that the "
                "longest examples would fit nowhere; raise token_budget or lower max_length"
            )


@dataclass(frozen=True)
class Sources:
    """Where a recipe's models and data stand. What is empty, and needed, is asked for by name."""

    backbone: str = setting("", "model that every judge begins from")
    prover: str = setting("", "model that the prover begins from; empty: the backbone")
    human: tuple[str, ...] = setting((), "pairs with a label and a human rationale")
    labelled: tuple[str, ...] = setting((), "pairs with a label only")
    unlabelled: tuple[str, ...] = setting((), "pairs without a label")
    test: tuple[str, ...] = setting((), "held-out pairs with a label")
    pretrain: tuple[str, ...] = setting((), "raw text, or responses given prompts")


@dataclass(frozen=True)
class FilterSettings:
    """One round's settings of the filters in denoise.py; fields as in `SelfTrainSettings`."""

    confidence: float
    softmax: float
    max_words: int
    without: tuple[str, ...]


@dataclass(frozen=True)
class SelfTrainSettings:
    """The loop around training. The paper publishes rounds, pool and test votes, and no other number."""

    iters: int = setting(3, "rounds of self-training", low=1, high=1000)
    seed: int = setting(0, "decides the world, the order, and every sample", **SEEDS)
    k: int = setting(4, "proofs per pair, of which equation 5 picks one", low=1, high=10**4)
    proof_temperature: float = setting(0.7, "temperature at which proofs are sampled", above=0)
    proof_tokens: int = setting(1024, "most tokens of a proof", low=1, high=10**7)
    select_by: str = setting("equation-5", "how one of the k proofs is chosen")
    votes: int = setting(8, "votes per unlabelled pair, half of them in each order", low=2, high=10**4)
    judge_tokens: int = setting(1024, "most tokens of a judge's answer", low=1, high=10**7)
    confidence: tuple[float, ...] = setting(
        (0.75,), "share of all votes that a label needs; one for each round, or for all", **SHARE
    )
    softmax: float = setting(0.0, "mean softmax that it needs (the paper's filter); 0: not used", **SHARE)
    max_words: int = setting(1500, "longest rationale that is kept, in words", low=1)
    without: tuple[str, ...] = setting((), "filters that are switched off")
    running: int = setting(
        0, "samples decoded together on a rank; 0: as many as suit its device", low=0, high=10**5
    )
    keep_candidates: bool = setting(False, "write down all k proofs of every pair, not of a few alone")
    mix_human: bool = setting(False, "every judge also trains on the human rationales, in every arm alike")
    lora_rank: int = setting(
        0,
        "every training is one of adapters of this rank; 0: as the recipe's [train] says",
        low=0,
        high=10**5,
    )
    pool: int = setting(0, "unlabelled pairs per round; 0: an equal share of all of them", low=0)
    limit: int = setting(0, "only the first N human pairs, and as many labelled ones; 0: all", low=0)
    test_votes: int = setting(16, "votes of the row voting@N", low=2, high=10**4)
    test_limit: int = setting(0, "only the first N test pairs; 0: all", low=0)
    signals: int = setting(
        0,
        "labels of each round, of known truth, on which it is weighed what knows wrong ones; 0: none",
        low=0,
    )
    baselines: bool = setting(True, "also train discriminative, generative and labelled only, 2x steps")
    side_by_side: bool = setting(True, "on a CPU with a core to spare: a second process tests and compares")

    def __post_init__(self):
        check_limits(self)
        require(self, ("confidence",), len, "must name a share at least")
        require(self, ("votes", "test_votes"), lambda value: value % 2 == 0, "must be even")

    def filters(self, number: int = 1) -> FilterSettings:
        """What filters go by in a round. Rounds count from 1; the last confidence holds on for later ones."""
        confidence = self.confidence[min(number, len(self.confidence)) - 1]
        return FilterSettings(confidence, self.softmax, self.max_words, self.without)


def check_identity(found: dict[str, Any], now: dict[str, Any], out: Path, flag: str = "--out") -> None:
    """Refuses to go on with another run, naming each field in which what was found differs from now."""
    names = [name for name in {**found, **now} if found.get(name) != now.get(name)]
    if names:
        differ = ", ".join(f"{name} ({found.get(name)}, now {now.get(name)})" for name in names)
        raise InputError(
            f"{out} holds another run; it differs in {differ}; name another {flag}, or remove it"
        )


def require(settings: Any, names: Sequence[str], holds: Callable[[Any], object], rule: str) -> None:
    """Refuses the first of these fields whose value the rule does not hold of."""
    for name in names:
        if not holds(value := getattr(settings, name)):
            raise InputError(f"{name}: {value!r} {rule}")


def check_names(settings: Any, registries: Mapping[str, Collection[str]]) -> None:
    """Refuses a name that its field's registry lacks. Registries, {field: names}, come from modules above."""
    for field_name, known in registries.items():
        if isinstance(getattr(settings, field_name), tuple):
            require(settings, (field_name,), set(known).issuperset, f"must be of {', '.join(known)}")
        else:
            require(settings, (field_name,), set(known).__contains__, f"must be one of {', '.join(known)}")


# ---------------------------------------------------------------------------------- command line


def add_flags(
    parser: argparse.ArgumentParser, cls: type, registries: Mapping[str, Collection[str]] = {}
) -> None:
    """A flag for each field; a flag that is not given leaves no trace, so that the recipe holds.

    The help of a field that has a registry says which names there are.
    """
    group = parser.add_argument_group("settings: the flag, or the recipe's, or [this]; --no-NAME for false")
    kinds = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        flag, kind = "--" + each.name.replace("_", "-"), kinds[each.name]
        options: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS}
        is_list = typing.get_origin(kind) is tuple
        text = each.metadata["help"].replace("%", "%%")
        if each.name in registries:
            text += (", of " if is_list else ": ") + ", ".join(registries[each.name])
        default = each.default if isinstance(each.default, tuple) else (str(each.default).lower(),)
        options["help"] = f"{text} [{' '.join(map(str, default)) or 'none'}]"
        if is_list:
            options |= {"nargs": "*", "action": "extend", "type": typing.get_args(kind)[0]}
        elif kind is bool:
            silent: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(f"--no-{flag[2:]}", dest=each.name, action="store_false", **silent)
            options |= {"nargs": "?", "const": True, "type": _boolean}
        else:
            options["type"] = kind
        group.add_argument(flag, metavar=each.name.upper().rpartition("_")[2], **options)


def given(cls: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line said about the fields of `cls`."""
    names = {each.name for each in dataclasses.fields(cls)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"
