"""Small random checkpoints of every supported family, with tokenizers and templates of their kind."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gramr2 import weights
from gramr2.model import Decoder, Llama3Rope, ModelConfig
from gramr2.seals import SEALS
from gramr2.tokenizer import Tokenizer

CORPUS = [
    "Which response is better, Response A or Response B? <think> <answer> </answer> </think>",
    "Feedback: it is short and right. Comparison: A is wrong, B is right. Conclusion: B is better.",
    "The pears cost 7 and the yarn costs 4; def f(x): return x + 1\n\n    print(f(41))",
    "naïve café, 东京, emoji 🙂, tabs\tand\nlines, user assistant system 0123456789",
]

LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set said = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set said = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today: " + date_string + "\\n\\n" + said + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception("no such role: " + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN2_TEMPLATE = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3_TEMPLATE = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages|length - 1 - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

KINDS = {
    "llama3": (
        LLAMA3_TEMPLATE,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
    ),
    "qwen2": (QWEN2_TEMPLATE, None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "qwen3": (QWEN3_TEMPLATE, None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
}

_SHAPE = dict(hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=2, head_size=12,
              max_positions=512)  # fmt: skip
_ROPE = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
FAMILIES = {
    "llama2": dict(rms_norm_eps=1e-5),
    "llama3": dict(rope_theta=500000.0, rope_llama3=_ROPE, tie_embeddings=True, rms_norm_eps=1e-5),
    "qwen2": dict(qkv_bias=True, rope_theta=1e6),
    "qwen2-tied": dict(qkv_bias=True, tie_embeddings=True, num_kv_heads=4),
    "qwen3": dict(qk_norm=True, head_size=20, rope_theta=1e6),  # a head size of its own: 4 x 20 != 48
    "qwen3-tied": dict(qk_norm=True, head_size=20, tie_embeddings=True, num_kv_heads=1),
}


def tokenizer_files(kind: str, vocab_size: int = 300, corpus: list[str] = CORPUS) -> dict[str, bytes]:
    """A byte-level BPE tokenizer with the specials, stop ids and template of one family's kind."""
    template, bos, eos, others = KINDS[kind]
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(corpus, trainer)
    fast.add_special_tokens([*filter(None, (bos, eos)), *others])
    if bos:  # as published: a text that stands by itself begins with it
        begun = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, fast.token_to_id(bos))])
        fast.post_processor = begun
    config = {"bos_token": bos, "eos_token": eos, "chat_template": template}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    generation = {"eos_token_id": [fast.token_to_id(others[-1]), fast.token_to_id(eos)]}
    return {
        "tokenizer.json": fast.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random weights with random norms and biases: a factor that is ignored would show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        else:
            values = values * (0.7 / parameter.shape[-1] ** 0.5)
        parameter.data = values.to(parameter.dtype)


def random_model(family: str, seed: int = 0, vocab_size: int = 320, **fields) -> Decoder:
    config = ModelConfig(**{"vocab_size": vocab_size, **_SHAPE, **FAMILIES[family], **fields})
    model = Decoder(config).eval()
    randomise(model, seed)
    return model


def make_checkpoint(
    directory: Path, family: str = "llama3", seed: int = 0, corpus: list[str] = CORPUS, **fields
) -> Path:
    """A saved random checkpoint with its tokenizer; `fields` override the model's configuration."""
    kind = family.split("-")[0].replace("llama2", "llama3")
    model = random_model(family, seed, **fields)
    files = tokenizer_files(kind, max(300, fields.get("vocab_size", 320) - 20), corpus)
    weights.save(model, Tokenizer(files, str(directory)), directory)
    (directory / SEALS).unlink()  # somebody else's have none
    return directory


# A judge's prompt of few tokens.
SHORT_PROMPT = "Q {question} A {response_a} B {response_b} Better:"


def make_random_judge(directory: Path, max_positions: int) -> Path:
    """A random model with a prompt: what it writes is no verdict, and its first token is one where the letter
    alone is asked for."""
    make_checkpoint(directory, "llama2", max_positions=max_positions)
    (directory / "judge_prompt.txt").write_text(SHORT_PROMPT)
    return directory
