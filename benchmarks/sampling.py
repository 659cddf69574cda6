"""Sampling beside transformers' static generate and its continuous batching, useful tokens only.

    python benchmarks/sampling.py --device cpu     k = 8 samples of 256-token prompts, two small models
    python benchmarks/sampling.py                  an 8B-shaped model in bf16 on a GPU, random weights

Everything is drawn at temperature 1 from the whole vocabulary, without stop ids, so that every way makes
the same number of tokens; where lengths are ragged, static generate runs to the longest of its batch and
only the tokens asked for count. On a GPU a decode step's time is the difference of two runs of different
length, and is set against its floor: bytes of weights and of keys and values, over the bandwidth measured in
the same run. Sharing is measured against itself with the prefix read once per sample.
"""

import argparse
import random
import time

import common
import torch

from gramr2 import sampler
from gramr2.model import Decoder, ModelConfig

K, PROMPT = 8, 256

# "32k" has the vocabulary of the larger model, whose projection is then most of the tiny one's work; "2k" is
# what a tokenizer made for a tiny corpus has.
SMALL = {
    "107M": ModelConfig(32000, 768, 2048, 12, 12, 6, 64, 2048, tie_embeddings=True),
    "tiny, vocabulary 2k": ModelConfig(2048, 256, 688, 4, 4, 2, 64, 2048),
    "tiny, vocabulary 32k": ModelConfig(32000, 256, 688, 4, 4, 2, 64, 2048),
}
LARGE = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, rope_theta=500000.0)


def random_model(config: ModelConfig, device: str, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    return model


def peer(config: ModelConfig, device: str, dtype: torch.dtype):
    """The same shape in transformers, or None where it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype=dtype,
    )
    with torch.device(device):
        return LlamaForCausalLM(shape).to(dtype).eval()


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def static_generate(model, prompts: list[list[int]], k: int, new: int):
    """k samples of each prompt, as one padded batch that runs to its longest."""
    ids = torch.tensor(prompts, device=model.device)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": k}
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **options
        )
    assert out.shape == (len(prompts) * k, len(prompts[0]) + new)


def continuous_batching(model, prompts: list[list[int]], k: int, new: int):
    from transformers import GenerationConfig

    options = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        eos_token_id=-1,
        pad_token_id=0,
    )
    requests = [ids for ids in prompts for _ in range(k)]
    out = model.generate_batch(inputs=requests, generation_config=options, progress_bar=False)
    done = sum(len(o.generated_tokens) for o in out.values())
    if done != len(requests) * new:
        raise RuntimeError(f"it returned {done} of {len(requests) * new} tokens")


def row(workload: str, tokens: int, ways: dict, repeats: int) -> dict:
    """Tokens per second of each way; a peer that cannot run is named with the reason."""
    absent = {}
    for name, function in list(ways.items()):
        try:
            function()
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            del ways[name]
    timed = common.compare(ways, repeats=repeats, warmups=0)  # the attempt above was one
    figures = {
        name: {"tokens_per_s": tokens / t["seconds"], "ratio": t["ratio"]} for name, t in timed.items()
    }
    print(workload, {name: f"{f['tokens_per_s']:.0f} (x{f['ratio']:.2f})" for name, f in figures.items()})
    return {"workload": workload, "tokens": tokens, "ways": figures, "absent": absent}


def on_cpu(repeats: int, continuous: bool) -> dict:
    rows = []
    for name, config in SMALL.items():
        count, new = (2, 32) if name == "107M" else (4, 64)
        model, other = random_model(config, "cpu", torch.float32), peer(config, "cpu", torch.float32)
        prompts = random_prompts(count, PROMPT, config.vocab_size)

        def ours(limit=new, model=model, prompts=prompts):
            samples = sampler.generate(model, prompts, n=K, max_new_tokens=limit, stop_ids=(), progress=False)
            assert all(len(s.ids) == s_limit for s, s_limit in _with_limits(samples, limit))

        ways = {"ours": ours}
        if other:
            ways["static"] = lambda o=other, p=prompts, n=new: static_generate(o, p, K, n)
            if continuous and name != "107M":
                ways["continuous"] = lambda o=other, p=prompts, n=new: continuous_batching(o, p, K, n)
        rows.append(row(f"{name}: {count} prompts x {K}, {new} new", count * K * new, ways, repeats))
        if name == "107M":
            continue
        # Ragged: 16 to 112 tokens, evenly, shuffled; twice the prompts, of which static takes half at a time.
        prompts = random_prompts(2 * count, PROMPT, config.vocab_size)
        lengths = [16 + 96 * i // (2 * K * count - 1) for i in range(2 * K * count)]
        random.Random(1).shuffle(lengths)
        limits = [lengths[i : i + K] for i in range(0, len(lengths), K)]
        ways = {"ours": lambda f=ours, x=limits, p=prompts: f(x, prompts=p)}
        if other:
            ways["static"] = lambda o=other, p=prompts, x=limits, c=count: [
                static_generate(o, p[i : i + c], K, max(map(max, x[i : i + c]))) for i in (0, c)
            ]
        rows.append(row(f"{name}: {2 * count} prompts x {K}, 16 to 112 new", sum(lengths), ways, repeats))
    return {"rows": rows, "k": K, "prompt": PROMPT}


def _with_limits(samples: list, limit):
    for index, group in enumerate(samples):
        for number, sample in enumerate(group):
            yield sample, limit if isinstance(limit, int) else limit[index][number]


def bandwidth(device: str) -> float:
    """Bytes per second that a reduction over 8 GB reads."""
    x = torch.ones(4 << 30, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        x.amax()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def step_seconds(function, short: int = 16, long: int = 80) -> float:
    """Seconds per decode step: a long run less a short one, so that prefill and capture cancel out."""
    function(short)
    times = []
    for new in (short, long):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(new)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / (long - short)


def on_cuda() -> dict:
    model, speed = random_model(LARGE, "cuda", torch.bfloat16), bandwidth("cuda")
    weights = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    per_token = 2 * LARGE.num_layers * LARGE.num_kv_heads * LARGE.head_size * 2
    rows, context = [], 2048
    for prompts, k, shared in ((1, 1, 0), (32, 1, 0), (256, 1, 0), (16, 16, 1536)):
        ids = random_prompts(prompts, shared or context - 64, LARGE.vocab_size)
        batch = prompts * k

        def ours(new, ids=ids, k=k, batch=batch, share=True):
            limits = sampler.Limits(share_prefix=share, running=batch)
            sampler.generate(model, ids, n=k, max_new_tokens=new, stop_ids=(), progress=False, limits=limits)

        seconds = step_seconds(ours)
        own = context - 64 if not shared else 0
        read = prompts * shared + batch * (own + 48)  # 48: the middle of the 16 to 80 new tokens
        floor = (weights + read * per_token) / speed
        result = {"prompts": prompts, "k": k, "shared": shared, "step_ms": 1000 * seconds,
                  "tokens_per_s": batch / seconds, "of_floor": floor / seconds}  # fmt: skip
        if shared:
            result["ungrouped_over_grouped"] = step_seconds(lambda n: ours(n, share=False)) / seconds
        print(result)
        rows.append(result)
    return {"rows": rows, "bandwidth": speed, "context": context, "continuous": _beside(model)}


def _beside(model) -> dict:
    """16 prompts x 16 samples end to end, against transformers' continuous batching."""
    ids, new = random_prompts(16, 1536, LARGE.vocab_size), 128
    ways = {
        "ours": lambda: sampler.generate(model, ids, n=16, max_new_tokens=new, stop_ids=(), progress=False)
    }
    other = peer(LARGE, "cuda", torch.bfloat16)
    if other:
        other.set_attn_implementation("sdpa_paged")
        ways["continuous"] = lambda: continuous_batching(other, ids, 16, new)
    return row("16 prompts of 1,536 tokens x 16, 128 new", 16 * 16 * new, ways, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: OMP_NUM_THREADS=1 python benchmarks/sampling.py --device cpu",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each way takes (default 3)")
    parser.add_argument(
        "--no-continuous", action="store_true", help="leave continuous batching out on the CPU"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        common.write_result("sampling_cuda", on_cuda())
    else:
        common.write_result("sampling_cpu", on_cpu(arguments.repeats, not arguments.no_continuous))


if __name__ == "__main__":
    main()
