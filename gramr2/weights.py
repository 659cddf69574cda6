"""Hugging Face model directories ↔ the decoder: the same tables of names for loading and saving.

Loading checks every name and every shape before a byte is read: a missing, an unused or a misshapen
tensor is an error that names it. The model is built on the meta device and each tensor is copied from
the file's memory map straight to its place, so that the host never holds a second copy. Saving writes
what transformers loads unchanged, and publishes the directory whole (files.py).

`config.json` is understood as transformers 4 writes it (`rope_theta`, `rope_scaling`, `torch_dtype`) and
as transformers 5 does (`rope_parameters`, `dtype`); what a model came with is what it is saved with.

It leaves out: pickled checkpoints (never opened), quantised ones, downloads, and splitting over ranks
(parallel.py distributes what `checkpoint_tensors` yields).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gramr2.files import InputError, publish_directory, read_json
from gramr2.model import Decoder, Llama3Rope, ModelConfig
from gramr2.tokenizer import Tokenizer

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
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_positions")
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
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: holds no config.json; expected a Hugging Face model directory")
    raw = read_json(directory / "config.json")
    try:
        return parse_config(raw, str(directory / "config.json")), raw
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{directory}/config.json: missing or malformed field {error}") from None


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """config.json's fields as the decoder's; what it cannot compute is refused by name."""
    model_type = str(raw.get("model_type"))
    family = FAMILIES.get(model_type)
    architecture = (raw.get("architectures") or [f"{family and family.name}ForCausalLM"])[0]
    supported = [each.name + head for each in FAMILIES.values() for head in HEADS]
    if family is None or architecture not in [family.name + head for head in HEADS]:
        raise InputError(
            f"{where}: architecture {architecture} (model type {model_type}) is not supported; "
            f"supported are {', '.join(supported)}"
        )
    refused = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "mlp_bias": raw.get("mlp_bias", False),
        family.window_field: raw.get(family.window_field),
        "quantization_config": "quantization_config" in raw,
    }
    for field in (name for name, present in refused.items() if present):
        raise InputError(f"{where}: {field} = {raw[field]!r} is not supported")
    for field in (FIELDS[name] for name in SIZES):
        if not isinstance(raw.get(field), int) or raw[field] < 1:
            raise InputError(f"{where}: {field} is {raw.get(field)!r}, expected a positive number")
    theta, llama3 = _parse_rope(raw, where)
    classifies = architecture.endswith("ForSequenceClassification")
    heads = raw["num_attention_heads"]
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        **{name: raw[FIELDS[name]] for name in SIZES},
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_size=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        rope_llama3=llama3,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.only_qkv_bias or attention_bias,
        output_bias=not family.only_qkv_bias and attention_bias,
        qk_norm=family.qk_norm,
        # transformers leaves the field out where it has its default, two labels.
        num_labels=len(raw.get("id2label") or "01") if classifies else 0,
    )


def _parse_rope(raw: dict[str, Any], where: str) -> tuple[float, Llama3Rope | None]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{where}: RoPE type {kind!r} is not supported; supported are default, llama3")
    return theta, Llama3Rope(**{ours: rope[theirs] for ours, theirs in ROPE.items()})


def published_config(config: ModelConfig, dtype: torch.dtype, raw: Mapping[str, Any] | None) -> dict:
    """config.json for a model: what it came with where there was such, corrected in what training changes.

    A fresh one is written in transformers 4's spelling, which every later version reads as well.
    """
    if raw:
        written = dict(raw)
    else:
        traits = config.qkv_bias > config.output_bias, config.qk_norm
        fits = (name for name, each in FAMILIES.items() if (each.only_qkv_bias, each.qk_norm) == traits)
        written = {"model_type": next(fits)}
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
    tokenizer = Tokenizer.load(directory, date)
    model = load_model(directory, device, dtype)
    if model.config.vocab_size < tokenizer.size:
        raise InputError(
            f"{directory}: the tokenizer has {tokenizer.size} ids, the model only {model.config.vocab_size}"
        )
    model.stop_ids = tokenizer.stop_ids
    return model, tokenizer


def load_model(directory: str | Path, device="cpu", dtype="float32") -> Decoder:
    """The decoder alone."""
    config, raw = read_config(directory)
    with torch.device("meta"):
        model = Decoder(config)
    wanted = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    state = {
        name: torch.empty(tensor.shape, dtype=wanted or tensor.dtype, device=device).copy_(tensor)
        for name, tensor in checkpoint_tensors(directory, model)
    }
    model.load_state_dict(state, assign=True)
    model.raw_config = raw
    return model.eval()


def checkpoint_tensors(directory: str | Path, model: Decoder, fresh_score: bool = False) -> NamedTensors:
    """Every weight of `model`, still in its file's map, all checked beforehand.

    With `fresh_score` a language model's checkpoint fills the backbone of a model with a scalar head: the
    vocabulary's head is left behind, and the score is not expected.
    """
    directory = Path(directory)
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
    opened = {path: _open(path) for path in set(files.values())}
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


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Where each tensor stands: from the index where there is one, else from the single file."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise InputError(f"{directory}: holds neither model.safetensors nor an index of files")
        return dict.fromkeys(_open(single).keys(), single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map")
    files = {name: directory / place for name, place in weight_map.items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise InputError(f"{path}: missing, though {index.name} names it")
        absent = {name for name, place in files.items() if place == path} - set(_open(path).keys())
        if absent:
            raise InputError(f"{path}: {_some(sorted(absent))} missing, though {index.name} places it there")
    return files


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or not safetensors ({error}); copy the file again") from None


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
) -> None:
    """Publishes a directory that transformers loads unchanged. `extra`: further text files, name → text.

    `named` takes the place of the model's own tensors.
    """
    with publish_directory(directory) as place:
        dtype = _write_tensors(named or model.named_parameters(), place)
        text = dict(tokenizer.files) if tokenizer else {}
        text |= {name: content.encode() for name, content in (extra or {}).items()}
        config = published_config(model.config, dtype, model.raw_config)
        text["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
        for name, content in text.items():
            (place / name).write_bytes(content)


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
