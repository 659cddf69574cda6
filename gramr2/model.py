"""The decoder: LLaMA (2, 3.x), Qwen2/2.5 and Qwen3 dense as one class, for training, scoring and sampling.

It reads flat ragged token ids: the sequences of a batch stand one behind the other without padding, each
token with its position, and hidden states come out in the same order. What a token may look at is not
known here: attention is an argument, a function of one layer's queries, keys and values. Training and scoring
pass kernels/packed_attention.py's; the sampler passes another that reads a paged cache.

The published families differ in four fields, and each is read from the configuration, never inferred:
biases (Qwen2 has them on q, k and v), a norm on queries and keys (Qwen3), the head size, and whether the
vocabulary's two matrices are one. The model stops at hidden states: `head_weight` is for whoever needs
log-probs or a next token, `score` is the scalar head of a discriminative reward model.

It leaves out: reading checkpoints (weights.py), the vocabulary projection (kernels/), the cache (cache.py,
engine.py), dropout, sliding windows, mixtures of experts and every RoPE but the plain one and llama3's.

Shapes: T tokens of all sequences, D model width, F width of the MLP, V vocabulary, H query heads,
G key/value heads, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gramr2 import kernels
from gramr2.kernels.linear_cpu import SideBySide
from gramr2.kernels.packed_attention import Attend


@dataclass(frozen=True)
class Llama3Rope:
    """LLaMA-3.1's stretched RoPE: slow frequencies are divided by `factor`, fast ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    """What the decoder's function depends on, and nothing else. weights.py reads it from config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_llama3: Llama3Rope | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    num_labels: int = 0  # 0: a language model; n: a scalar head of n outputs instead of the vocabulary's


@lru_cache(maxsize=64)
def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """The angle per position of each pair of channels, fp32 [K/2], kept per device."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.int64).float() / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_llama3 is not None:
        rope = config.rope_llama3
        wavelengths = 2 * math.pi / frequencies
        # 0 where a wave does not fit the original context (stretched), 1 where it fits often (kept).
        width = rope.high_freq_factor - rope.low_freq_factor
        keep = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / width
        keep = keep.clamp(0, 1)
        frequencies = (1 - keep) * frequencies / rope.factor + keep * frequencies
    return frequencies.to(device)


def rope_tables(config: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, 1, K] for each token, in fp32 to the last step; half of the sines with a minus."""
    angles = positions_T.float()[:, None] * rope_frequencies(config, positions_T.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1)[:, None].to(dtype), torch.cat((-sin, sin), dim=-1)[:, None].to(dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class Attention(SideBySide):
    side_by_side = "q", "k", "v"

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, size = config.hidden_size, config.head_size
        self.head_size = size
        self.q = nn.Linear(width, config.num_heads * size, bias=config.qkv_bias)
        self.k = nn.Linear(width, config.num_kv_heads * size, bias=config.qkv_bias)
        self.v = nn.Linear(width, config.num_kv_heads * size, bias=config.qkv_bias)
        self.o = nn.Linear(config.num_heads * size, width, bias=config.output_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        q_THK, k_TGK, v_TGK = (product.unflatten(-1, (-1, self.head_size)) for product in self.products(x_TD))
        q_THK, k_TGK = kernels.rotate(self.q_norm(q_THK), self.k_norm(k_TGK), *rope)
        return self.o(attend(layer, q_THK, k_TGK, v_TGK).flatten(-2))


class MLP(SideBySide):
    side_by_side = "gate", "up"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(kernels.silu_product(*self.products(x_TD)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rope, layer, attend)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Decoder(nn.Module):
    # Of the checkpoint that it was read from: what ends an answer, and config.json as it stood there.
    stop_ids: tuple[int, ...] = ()
    raw_config: dict[str, Any] | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = self.score = None
        if config.num_labels:
            self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        elif not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection [V, D]; the embedding itself where the two are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(self, ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        x_TD = self.embed(ids_T)
        rope = rope_tables(self.config, positions_T, x_TD.dtype)
        for layer, block in enumerate(self.blocks):
            x_TD = block(x_TD, rope, layer, attend)
        return self.norm(x_TD)
