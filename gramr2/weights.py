"""Hugging Face model directories ↔ the decoder: the same tables of names for loading and saving.

Loading checks every name and every shape before a byte is read: a missing, an unused or a misshapen
tensor is an error that names it. The model is built on the meta device and each tensor is copied from
the file's memory map straight to its place, so that the host never holds a second copy. Saving writes
what transformers loads unchanged, and publishes the directory whole (files.py).

`config.json` is understood as transformers 4 writes it (`rope_theta`, `rope_scaling`, `torch_dtype`) and
as transformers 5 does (`rope_parameters`, `dtype`); what a model came with is what it is saved with.

An adapter's directory (lora.py) is read as the whole model that it makes of its base.

It leaves out: pickled checkpoints (never opened), quantised ones, downloads, and splitting over ranks
(parallel.py distributes what `checkpoint_tensors` yields).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gramr2.directories import ADAPTER, adapter_config, base_of, model_file, open_tensors
from gramr2.fields import Fields
from gramr2.files import InputError, JsonRow, need, publish_directory, read_json, short_hash
from gramr2.lora import PREFIX, TASKS, TENSORS, Adapter, adapted, seal_base
from gramr2.model import Decoder, Llama3Rope, ModelConfig
from gramr2.seals import CARD, SEALS, check_seals, read_signed, seal, seals_below, write_signed
from gramr2.tokenizer import FILES, Tokenizer

MAX_FILE_BYTES = 5 * 10**9  # the largest file of tensors that the hub's own tools write
NamedTensors = Iterable[tuple[str, Tensor]]  # by our names; they may come one by one


@dataclass(frozen=True)
class Family:
    """What tells a family's checkpoints apart where config.json does not say it in the same words."""

    name: str  # its classes' names begin with it
    only_qkv_bias: bool = False  # biases on q, k and v whatever attention_bias says, and none on the output
    qk_norm: bool = False
    window_field: str = "use_sliding_window"  # is set where a sliding window is in use


# By model_type. Of those that a configuration would fit, the first is what a fresh config.json names.
FAMILIES = {
    "llama": Family("Llama"),
    "qwen2": Family("Qwen2", only_qkv_bias=True),
    "qwen3": Family("Qwen3", qk_norm=True),
}
# A configuration's fields, ours ↔ theirs, in the order in which a fresh config.json has them.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "rope_llama3": "rope_scaling",
    "tie_embeddings": "tie_word_embeddings",
    "output_bias": "attention_bias",
}
# The largest that is believed: what stands above was never meant, and would be built before it failed.
SIZES = {"vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_layers": 1000}
SIZES |= {"num_heads": 2**12, "max_positions": 2**31}
ROPE = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")}
ROPE["original_max_positions"] = "original_max_position_embeddings"
HEADS = ("ForCausalLM", "ForSequenceClassification")

# Our word ↔ theirs, for each part of a tensor's name but the layer's number.
WORDS = {word: word for word in ("norm", "q_norm", "k_norm", "mlp", "score", "weight", "bias")}
WORDS |= {word: f"{word}_proj" for word in ("q", "k", "v", "o", "gate", "up", "down")}
WORDS |= {
    "embed": "embed_tokens",
    "head": "lm_head",
    "blocks": "layers",
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "a": "lora_A",
    "b": "lora_B",
}
# Old LLaMA-2 files carry this table; it is a function of the configuration and is computed anew.
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def published_name(ours: str) -> str:
    """`blocks.3.mlp.up.weight` → `model.layers.3.mlp.up_proj.weight`; the heads stand outside of `model`."""
    theirs = ".".join(word if word.isdigit() else WORDS[word] for word in ours.split("."))
    return theirs if ours.startswith(("head.", "score.")) else f"model.{theirs}"


def plain_parameters(model: Decoder) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a checkpoint holds, by the names that a plain decoder gives them.

    A module put around one of a decoder's keeps that one as `base`; what it adds is not in a checkpoint.
    """
    with torch.device("meta"):
        names = {name for name, _ in Decoder(model.config).named_parameters()}
    for name, parameter in model.named_parameters():
        if (plain := name.replace(".base.", ".")) in names:
            yield plain, parameter


# ---------------------------------------------------------------------------------- configuration


def read_config(directory: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The decoder's configuration, and the file as it stands (saved again with the model)."""
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory")
    if ".tmp-" in directory.name:
        raise InputError(f"{directory}: a half-written directory; use the one it was meant to become")
    path = model_file(directory, "config.json")
    if not path.is_file():
        raise InputError(f"{directory}: holds no config.json; expected a Hugging Face model directory")
    raw = read_json(path)
    config, adapter = parse_config(Fields(raw, f"{path}: ")), adapter_config(directory)
    if adapter and adapter.get("task_type", str, TASKS[0]) == TASKS[1]:
        config = dataclasses.replace(config, num_labels=1)
    return config, raw


def parse_config(raw: Fields) -> ModelConfig:
    """config.json's fields as the decoder's; what it cannot compute is refused by name."""
    model_type = raw.get("model_type", str, "")
    family = FAMILIES.get(model_type)
    own = (f"{family and family.name}ForCausalLM",)
    architecture = (raw.get("architectures", tuple[str, ...], own) or own)[0]
    supported = [each.name + head for each in FAMILIES.values() for head in HEADS]
    if family is None or architecture not in [family.name + head for head in HEADS]:
        raise InputError(
            f"{raw.where}architectures {architecture} (model_type {model_type}) is not supported; "
            f"supported are {', '.join(supported)}"
        )
    refused = {
        "hidden_act": raw.get("hidden_act", str, "silu") != "silu",
        "mlp_bias": raw.get("mlp_bias", bool, False),
        family.window_field: raw.get(family.window_field, bool, False),
        "quantization_config": "quantization_config" in raw.row,
    }
    for field in (name for name, present in refused.items() if present):
        raise InputError(f"{raw.where}{field} = {raw.row[field]!r:.60} is not supported")
    for field in ("dtype", "torch_dtype"):  # what it is saved as
        raw.get(field, str, "float32", among=("float32", "bfloat16", "float16"))
    sizes = {name: raw.get(FIELDS[name], int, low=1, high=most) for name, most in SIZES.items()}
    theta, llama3 = _parse_rope(raw)
    attention_bias = raw.get("attention_bias", bool, False)
    heads = sizes["num_heads"]
    head_size = raw.get("head_dim", int, sizes["hidden_size"] // heads, low=2, high=2**16)
    kv_heads = raw.get("num_key_value_heads", int, heads, low=1, high=heads)
    need(head_size > 1 and head_size % 2 == 0, f"{raw.where}head_dim {head_size} cannot be rotated by halves")
    need(
        heads % kv_heads == 0, f"{raw.where}{heads} heads do not share {kv_heads} num_key_value_heads evenly"
    )
    labels = raw.get("id2label", dict, {"0": "", "1": ""})  # transformers leaves two, its default, out
    need(len(labels) > 0, f"{raw.where}id2label is empty")
    return ModelConfig(
        **sizes,
        num_kv_heads=kv_heads,
        head_size=head_size,
        rms_norm_eps=raw.get("rms_norm_eps", float, 1e-6, above=0, below=1),
        rope_theta=theta,
        rope_llama3=llama3,
        tie_embeddings=raw.get("tie_word_embeddings", bool, False),
        qkv_bias=family.only_qkv_bias or attention_bias,
        output_bias=not family.only_qkv_bias and attention_bias,
        qk_norm=family.qk_norm,
        num_labels=len(labels) if architecture.endswith("ForSequenceClassification") else 0,
    )


def _parse_rope(raw: Fields) -> tuple[float, Llama3Rope | None]:
    rope = raw.object("rope_parameters" if raw.row.get("rope_parameters") else "rope_scaling")
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    theta = rope.get("rope_theta", float, raw.get("rope_theta", float, 10000.0, above=0), above=0)
    if kind == "default" and "factor" not in rope.row:
        return theta, None
    need(kind == "llama3", f"{rope.where}type {kind!r:.40} is not supported; supported are default, llama3")
    kinds = typing.get_type_hints(Llama3Rope)
    llama3 = Llama3Rope(**{ours: rope.get(theirs, kinds[ours], above=0) for ours, theirs in ROPE.items()})
    need(
        llama3.low_freq_factor < llama3.high_freq_factor, f"{rope.where}low_freq_factor is not the lower one"
    )
    return theta, llama3


def published_config(config: ModelConfig, dtype: torch.dtype, raw: Mapping[str, Any] | None) -> dict:
    """config.json for a model: what it came with where there was such, corrected in what training changes.

    A fresh one is written in transformers 4's spelling, which every later version reads as well.
    """
    if raw:
        written = dict(raw)
    else:
        traits = config.qkv_bias > config.output_bias, config.qk_norm
        fits = [name for name, each in FAMILIES.items() if (each.only_qkv_bias, each.qk_norm) == traits]
        need(len(fits) > 0, "no family of models has both biases on q, k, v alone and norms of q and k")
        written = {"model_type": fits[0]}
        written |= {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
        written["hidden_act"] = "silu"
        if rope := config.rope_llama3:
            scaling = {theirs: getattr(rope, ours) for ours, theirs in ROPE.items()}
            written["rope_scaling"] = {"rope_type": "llama3", **scaling}
    written["architectures"] = [FAMILIES[written["model_type"]].name + HEADS[config.num_labels > 0]]
    if config.num_labels:
        written["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        written["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    written["dtype" if "dtype" in written else "torch_dtype"] = str(dtype).removeprefix("torch.")
    return written


# ---------------------------------------------------------------------------------- loading


def load(directory: str | Path, device="cpu", dtype="float32", date=None) -> tuple[Decoder, Tokenizer]:
    """(model, tokenizer) of a Hugging Face directory.

    dtype "auto" keeps what is stored; `date` is what a chat template prints as today (Tokenizer.load).
    """
    check_published(Path(directory))
    tokenizer = Tokenizer.load(directory, date)
    model = load_model(directory, device, dtype)
    if model.config.vocab_size < tokenizer.size:
        raise InputError(
            f"{directory}: the tokenizer has {tokenizer.size} ids, the model only {model.config.vocab_size}"
        )
    if beyond := [token for token in tokenizer.stop_ids if token >= model.config.vocab_size]:
        raise InputError(f"{directory}: eos_token_id {beyond[0]} is outside of the vocabulary")
    model.stop_ids = tokenizer.stop_ids
    return model, tokenizer


def check_published(directory: Path) -> None:
    """Refuses a model that was published here and is no longer what it was; a prompt may be changed."""
    if base := base_of(directory):
        check_published(base)
    if (directory / SEALS).exists():
        seals = read_signed(directory / SEALS)
        mine = {name: seals[name] for name in seals if not name.endswith("_prompt.txt")}
        check_seals(directory, mine, f"copy the model again, or remove {SEALS} if this is meant")


def load_model(directory: str | Path, device="cpu", dtype="float32") -> Decoder:
    """The decoder alone."""
    config, raw = read_config(directory)
    with torch.device("meta"):
        model = Decoder(config)
    wanted = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    state = {
        name: torch.empty(tensor.shape, dtype=wanted or tensor.dtype, device=device).copy_(tensor)
        for name, tensor in checkpoint_tensors(directory, model, device=device, dtype=wanted)
    }
    model.load_state_dict(state, assign=True)
    model.raw_config = raw
    return model.eval()


def checkpoint_tensors(
    directory: str | Path, model: Decoder, fresh_score=False, device="cpu", dtype: torch.dtype | None = None
) -> NamedTensors:
    """Every weight of `model`, still in its file's map, all checked beforehand.

    With `fresh_score` a language model's checkpoint fills the backbone of a model with a scalar head: the
    vocabulary's head is left behind, and the score is not expected. What an adapter changes is merged on
    `device`, and rounded once, to `dtype` (None: as the base is stored).
    """
    directory = Path(directory)
    if base_of(directory):
        yield from _merged_tensors(Adapter(directory), model, fresh_score, device, dtype)
        return
    files = _tensor_files(directory)
    expected = {published_name(name): (name, tuple(p.shape)) for name, p in plain_parameters(model)}
    if fresh_score:
        del expected["score.weight"]
    if missing := [name for name in expected if name not in files]:
        raise InputError(f"{directory}: {_some(missing)} missing from the checkpoint")
    head, embedding = published_name("head.weight"), published_name("embed.weight")
    known = {*expected, head} if model.config.tie_embeddings or fresh_score else expected.keys()
    if unused := [name for name in files if name not in known and not COMPUTED.fullmatch(name)]:
        raise InputError(f"{directory}: {_some(unused)} in the checkpoint, but not in the model")
    opened = {path: open_tensors(path) for path in set(files.values())}
    stored = {name: opened[path] for name, path in files.items()}
    for name, (_, wanted) in expected.items():
        shape = tuple(stored[name].get_slice(name).get_shape())
        if shape != wanted:
            raise InputError(f"{files[name]}: {name} has shape {list(shape)}, expected {list(wanted)}")
    if model.config.tie_embeddings and head in files:
        # Some tied checkpoints store the head as well; it must then say the same as the embedding.
        copy, original = (stored[name].get_tensor(name) for name in (head, embedding))
        if not torch.equal(copy, original):
            raise InputError(f"{files[head]}: tie_word_embeddings is true, but {head} differs")
    for name, (ours, _) in expected.items():
        yield ours, stored[name].get_tensor(name)


def _merged_tensors(
    adapter: Adapter, model: Decoder, fresh_score: bool, device: Any, dtype: torch.dtype | None
) -> NamedTensors:
    """A base's weights with what an adapter changes; a scalar head is the adapter's own."""
    has_score = "score.weight" in adapter.tensors and not fresh_score
    adapter.check(published_name(name) for name, _ in plain_parameters(model))
    for name, tensor in checkpoint_tensors(adapter.base, model, fresh_score or has_score):
        yield name, adapter.merged(published_name(name), tensor, device).to(dtype or tensor.dtype)
    if has_score:
        yield "score.weight", adapter.tensors["score.weight"]


def adapter_tensors(directory: Path, decoder: Decoder) -> NamedTensors:
    """An adapter's tensors for a decoder that is adapted in the same way, to go on with them."""
    adapter, maps = Adapter(directory), adapted(decoder)
    names = {f"{name.removesuffix('weight')}{half}.weight": name for name in maps for half in "ab"}
    theirs = {name for name in adapter.tensors if name != "score.weight"}
    same = theirs == {published_name(name) for name in names}
    shapes = dict(decoder.named_parameters())
    for name in names if same else ():
        same &= adapter.tensors[published_name(name)].shape == shapes[name].shape
        same &= math.isclose(adapter.scale, maps[names[name]].scale)
    mend = "give the same --lora-rank, --lora-alpha and --lora-layers, or merge it first (train.py --merge)"
    need(
        same,
        f"{directory}: is an adapter of another rank, alpha or choice of layers than is asked for; {mend}",
    )
    for name in (*names, *(["score.weight"] if "score.weight" in adapter.tensors else [])):
        yield name, adapter.tensors[published_name(name)]


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Where each tensor stands: from the index where there is one, else from the single file."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not index.exists():
        if not single.exists():
            raise InputError(f"{directory}: holds neither model.safetensors nor an index of files")
        return dict.fromkeys(open_tensors(single).keys(), single)
    weight_map = Fields(read_json(index), f"{index}: ").get("weight_map", dict[str, str])
    need(weight_map, f"{index}: weight_map is empty")
    files = {name: directory / place for name, place in weight_map.items()}
    for path in sorted(set(files.values())):
        need(path.parent == directory, f"{index}: {path} leaves the directory; files are named, not paths")
        need(path.exists(), f"{path}: missing, though {index.name} names it")
        absent = {name for name, place in files.items() if place == path} - set(open_tensors(path).keys())
        if absent:
            raise InputError(f"{path}: {_some(sorted(absent))} missing, though {index.name} places it there")
    return files


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


# ---------------------------------------------------------------------------------- saving


def save(
    model: Decoder,
    tokenizer: Tokenizer | None,
    directory: str | Path,
    extra: Mapping[str, str] | None = None,
    named: NamedTensors | None = None,
    adapter: JsonRow | None = None,
) -> None:
    """Publishes a directory that transformers loads unchanged. `extra`: further text files, name → text.

    `named` takes the place of the model's own tensors. With `adapter`, which describes it, they are one's,
    and the directory is one that PEFT loads.
    """
    directory = Path(directory)
    mine = not directory.is_dir() or (directory / SEALS).is_file()
    need(mine, f"{directory}: there are files that this project did not write; name another place")
    with publish_directory(directory) as place:
        text = dict(tokenizer.files) if tokenizer else {}
        text |= {name: content.encode() for name, content in (extra or {}).items()}
        if adapter is None:
            dtype = _write_tensors(named or model.named_parameters(), place)
            name, written = "config.json", published_config(model.config, dtype, model.raw_config)
        else:
            tensors = {PREFIX + published_name(name): tensor for name, tensor in named or ()}
            save_file(tensors, place / TENSORS, metadata={"format": "pt"})
            name, written = ADAPTER, adapter
            seal_base(place, Path(adapter["base_model_name_or_path"]))
        text[name] = json.dumps(written, indent=2).encode() + b"\n"
        for name, content in text.items():
            (place / name).write_bytes(content)
        write_signed(place / SEALS, seals_below(place, (CARD,)))


def fingerprint(directory: str | Path) -> str:
    """A hash of all that makes a model answer as it does, but for its prompt: weights, shape and tokenizer.

    Files that are what they were when they were published are not read again for it.
    """
    directory = Path(directory)
    known = read_signed(directory / SEALS) if (directory / SEALS).exists() else {}
    files = sorted(
        [*directory.glob("*.safetensors"), *(directory / name for name in ("config.json", *FILES))]
    )
    hashes = [f"{path.name} {seal(path, known.get(path.name))['hash']}" for path in files if path.is_file()]
    if base := base_of(directory):
        hashes += [f"scale {Adapter(directory).scale}", fingerprint(base)]
    return short_hash("\n".join(hashes).encode())


def _write_tensors(named: NamedTensors, place: Path) -> torch.dtype:
    """One file, or several and their index, of which one at a time is held; → the first tensor's dtype."""
    numbers: dict[str, int] = {}  # of the file that a tensor stands in, from 1
    tensors: dict[str, Tensor] = {}
    sizes, dtype = [0], torch.float32
    for name, parameter in named:
        tensor = parameter.detach().to("cpu").contiguous()
        dtype = dtype if numbers else tensor.dtype
        if tensors and sizes[-1] + tensor.nbytes > MAX_FILE_BYTES:
            save_file(tensors, place / f"file-{len(sizes)}", metadata={"format": "pt"})
            sizes.append(0)
            tensors = {}
        tensors[published_name(name)] = tensor
        numbers[published_name(name)] = len(sizes)
        sizes[-1] += tensor.nbytes
    count = len(sizes)
    save_file(tensors, place / f"file-{count}", metadata={"format": "pt"})
    # Files get their final names once their count is known; the index only where there are several.
    names = {n: f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)}
    names = names if count > 1 else {1: "model.safetensors"}
    for number, name in names.items():
        (place / f"file-{number}").rename(place / name)
    if count > 1:
        weight_map = {tensor: names[number] for tensor, number in numbers.items()}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return dtype
