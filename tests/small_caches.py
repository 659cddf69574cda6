"""Prompts of ragged lengths, and caches so small that their samples must give way to each other."""

from __future__ import annotations

import random

from gramr2.model import Decoder

LENGTHS = 1, 2, 16, 17, 33, 50, 64, 65
PAGES = 10  # of 16 tokens: 40 tokens behind the longest of these take 8 with the copy they may need


def prompts_of(lengths, vocabulary: int = 320, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


def cache_bytes(model: Decoder, pages: int, size: int = 16) -> int:
    c = model.config
    return pages * 2 * c.num_layers * c.num_kv_heads * c.head_size * size * 4
