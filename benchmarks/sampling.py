"""Sampling beside transformers' static generate and its continuous batching, useful tokens only.

    python benchmarks/sampling.py --device cpu     k = 8 samples of 256-token prompts, two small models
    python benchmarks/sampling.py --device cpu --model DIR   a checkpoint: one sample, eight, 4 prompts x 4
    python benchmarks/sampling.py                  an 8B-shaped model in bf16 on a GPU, random weights

Everything is drawn at temperature 1 from the whole vocabulary, without stop ids, so that every way makes
the same number of tokens. Every way takes a workload as one batch; where lengths are ragged, static generate
runs to the longest, and only the tokens asked for count. "tiny" stands with two vocabularies, because the
larger one's projection is most of such a model's work. Continuous batching is slow on a CPU, and is measured
there once, on one workload. On a GPU a decode step's time is set against its floor: bytes of weights and of
keys and values, over the bandwidth measured in the same run. Sharing is measured against itself with the
prefix read once per sample.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import torch

import gramr2
from gramr2 import cost
from gramr2.engine import Engine
from gramr2.model import Decoder, ModelConfig
from gramr2.records import Example, Tokens
from gramr2.requests import CUDA_CACHE_SHARE, free_bytes
from gramr2.sampler import Limits, generate

K, PROMPT = 8, 256
# What a sampler over pages cannot do without, by torch's names; the rest is many small operations.
KINDS = {
    "in_matrices": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise"),
    "in_attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "in_cache": ("aten::index_select", "aten::_index_put_impl_", "aten::index_copy_"),
}

# "32k" has the vocabulary of the larger model, whose projection is then most of the tiny one's work; "2k" is
# what a tokenizer made for a tiny corpus has.
SMALL = {
    "107M": ModelConfig(32000, 768, 2048, 12, 12, 6, 64, 2048, tie_embeddings=True),
    "tiny, vocabulary 2k": ModelConfig(2048, 256, 688, 4, 4, 2, 64, 2048),
    "tiny, vocabulary 32k": ModelConfig(32000, 256, 688, 4, 4, 2, 64, 2048),
}
LARGE = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, rope_theta=500000.0)
LARGE_LOADS = (
    (1, 1, 0),
    (32, 1, 0),
    (256, 1, 0),
    (16, 16, 1536),
)  # prompts, samples of each, tokens they share
# Of a real model: prompts, samples of each, greedy.
CHECKPOINT_LOADS = (
    ("one greedy sample", 1, 1, True),
    ("one sample", 1, 1, False),
    ("8 samples", 1, 8, False),
    ("4 prompts x 4", 4, 4, False),
)
CHECKPOINT_PROMPT, CHECKPOINT_NEW = 64, 32
MICRO, MICRO_LOADS = ModelConfig(256, 32, 64, 1, 2, 2, 16, 512), ((1, 1, 0), (4, 1, 0), (2, 4, 48))


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


def static_generate(model, prompts: list[list[int]], limits: list[list[int]], greedy: bool = False):
    """As many samples of each prompt as it has limits, as one padded batch that runs to its longest."""
    ids, longest, k = torch.tensor(prompts, device=model.device), max(map(max, limits)), len(limits[0])
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options = {"do_sample": False} if greedy else drawn
    options |= {"min_new_tokens": longest, "max_new_tokens": longest, "num_return_sequences": k}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    assert out.shape == (len(prompts) * k, len(prompts[0]) + longest)


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


def row(workload: str, tokens: int, ways: dict, repeats: int, once=()) -> dict:
    """Tokens per second of each way; a peer that cannot run is named with the reason."""
    absent, single = {}, {}
    for name, function in list(ways.items()):
        start = time.perf_counter()
        try:
            function()
            if name in once:
                single[name] = time.perf_counter() - start
                del ways[name]
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            del ways[name]
    timed = common.compare(ways, repeats=repeats, warmups=0)  # the attempt above was one
    ours = next(iter(timed.values()))["seconds"]
    timed |= {name: {"seconds": seconds, "ratio": seconds / ours} for name, seconds in single.items()}
    figures = {
        name: {"tokens_per_s": tokens / t["seconds"], "ratio": t["ratio"]} for name, t in timed.items()
    }
    for name, function in ways.items():
        figures[name] |= shares(function, timed[name]["seconds"])
    print(workload, {name: f"{f['tokens_per_s']:.0f} (x{f['ratio']:.2f})" for name, f in figures.items()})
    return {"workload": workload, "tokens": tokens, "ways": figures, "absent": absent}


def shares(function, whole: float) -> dict[str, float]:
    """Of one run, in each of `KINDS`: what would be left of its time if all else were free."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        function()
    seconds = {event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()}
    return {kind: sum(seconds.get(name, 0.0) for name in names) / whole for kind, names in KINDS.items()}


def ours(model, prompts: list[list[int]], limits: list[list[int]], greedy: bool = False):
    options = {"n": len(limits[0]), "max_new_tokens": limits, "temperature": 0.0 if greedy else 1.0}
    samples = generate(model, prompts, **options, stop_ids=(), progress=False)
    assert [[len(sample.ids) for sample in group] for group in samples] == limits


def ragged(count: int) -> list[list[int]]:
    """For each sample of `count` prompts, how many tokens are asked for: 16 to 112, evenly, shuffled."""
    lengths = [16 + 96 * i // (K * count - 1) for i in range(K * count)]
    random.Random(1).shuffle(lengths)
    return [lengths[i : i + K] for i in range(0, len(lengths), K)]


def on_cpu(repeats: int, continuous: bool) -> dict:
    rows = []
    for name, config in SMALL.items():
        model, other = random_model(config, "cpu", torch.float32), peer(config, "cpu", torch.float32)
        count, new = (2, 32) if name == "107M" else (4, 64)
        workloads = {f"{count} prompts x {K}, {new} new": [[new] * K] * count}
        if name != "107M":
            workloads |= {f"{n} prompts x {K}, 16 to 112 new": ragged(n) for n in (count, 4 * count)}
        for workload, limits in workloads.items():
            prompts = random_prompts(len(limits), PROMPT, config.vocab_size)
            ways = {"ours": partial(ours, model, prompts, limits)}
            if other:
                ways["static"] = partial(static_generate, other, prompts, limits)
                if continuous and name == "tiny, vocabulary 2k" and len(rows) == 1:  # it takes minutes
                    ways["continuous"] = partial(continuous_batching, other, prompts, K, new)
            tokens = sum(map(sum, limits))
            rows.append(row(f"{name}: {workload}", tokens, ways, repeats, once=["continuous"]))
    return {"rows": rows, "k": K, "prompt": PROMPT}


def of_checkpoint(directory: Path, repeats: int) -> None:
    """A real model's few samples, in fp32, kept beside those of other models that were measured before."""
    transformers = common.needed("transformers")
    model = gramr2.load(directory)[0].float().requires_grad_(False)
    other = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    for name, count, k, greedy in CHECKPOINT_LOADS:
        prompts = random_prompts(count, CHECKPOINT_PROMPT, model.config.vocab_size)
        arguments = prompts, [[CHECKPOINT_NEW] * k] * count, greedy
        ways = {
            "ours": partial(ours, model, *arguments),
            "static": partial(static_generate, other, *arguments),
        }
        rows.append(row(f"{directory.name}: {name}", count * k * CHECKPOINT_NEW, ways, repeats))
    models = common.kept_results("sampling_models_cpu", "models")
    models[directory.name] = {"environment": common.environment(), "rows": rows}
    shape = {"prompt": CHECKPOINT_PROMPT, "new": CHECKPOINT_NEW, "repeats": repeats}
    common.write_result("sampling_models_cpu", {**shape, "models": models})


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: str, size: int) -> float:
    """Bytes per second that a reduction over `size` numbers of two bytes reads."""
    x = torch.ones(size, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        x.amax()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def full_steps(model, prompts: list[list[int]], k: int, seen: Callable, share: bool = True) -> None:
    """Samples k times for each prompt, and calls `seen` before each step in which every sample decodes and no
    prompt is computed."""
    rows = len(prompts) * k

    class Watched(Engine):
        def launch(self, step, call):
            if not step.chunks and len(step.samples) == rows:
                seen(step)
            return super().launch(step, call)

    limits = Limits(share_prefix=share, running=rows)
    computing = sum(map(len, prompts)) // 8192  # steps that take prompts in, while the first samples decode
    options = {"n": k, "max_new_tokens": computing + 48, "stop_ids": (), "limits": limits, "progress": False}
    generate(model, prompts, engine=Watched(model), **options)


def decode_step(model, prompts: list[list[int]], k: int, share: bool = True) -> tuple[float, float]:
    """-> (seconds of a decode step, tokens that a sample has behind it then).

    The host is one step behind the device and waits for it, so that the gap between two launches is a step.
    """
    launches = []

    def timed(step):
        launches.append((time.perf_counter(), statistics.fmean(step.positions) + 1))

    full_steps(model, prompts, k, timed, share)
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(launches)][4:]  # a graph is captured
    return statistics.median(gaps), statistics.mean(tokens for _, tokens in launches)


def reading(model, count: int, length: int) -> dict:
    """Prompts alone: one token of each is sampled. Operations are those of a training step's forward half."""
    ids = random_prompts(count, length, model.config.vocab_size)
    run = partial(generate, model, ids, max_new_tokens=1, stop_ids=(), progress=False)
    seconds = common.compare({"ours": run}, repeats=2)["ours"]["seconds"]
    flops = cost.step_flops(model.config, [Example((Tokens(tuple(each), length - 1),)) for each in ids]) / 3
    figures = {"tokens_per_s": count * length / seconds, "tflops": flops / seconds / 1e12}
    return {"prompts": count, "length": length, **figures}


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of a token's keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * dtype.itemsize


def fits(model, prompts: int, k: int, shared: int, context: int) -> bool:
    """Whether a load's keys and values find room beside the weights."""
    weight = model.head_weight
    needed = prompts * (1 if shared else k) * context * token_bytes(model.config, weight.dtype)
    return not weight.is_cuda or needed <= CUDA_CACHE_SHARE * free_bytes(weight.device)


def at_published_shape(device: str, quick: bool, continuous: bool) -> None:
    """Decode steps of the 8B shape against their floor, written row by row; `quick`: a micro model."""
    config, context = (MICRO, 96) if quick else (LARGE, 2048)
    loads = MICRO_LOADS if quick else LARGE_LOADS
    name, dtype = (
        "sampling_quick" if quick else "sampling_cuda",
        getattr(torch, "float32" if quick else "bfloat16"),
    )
    model, speed = random_model(config, device, dtype), bandwidth(device, 1 << 16 if quick else 1 << 32)
    weights = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    per_token = token_bytes(config, dtype)
    result = {"rows": [], "bandwidth": speed, "context": context}
    for prompts, k, shared in loads:
        row = {"prompts": prompts, "k": k, "shared": shared}
        ids = random_prompts(prompts, shared or context - 64, config.vocab_size)
        if not fits(model, prompts, k, shared, context):
            row["not_run"] = "its keys and values do not fit in memory"
        else:
            seconds, tokens = decode_step(model, ids, k)
            read = prompts * shared + prompts * k * (tokens - shared)
            row |= {"step_ms": 1000 * seconds, "tokens_per_s": prompts * k / seconds}
            row["of_floor"] = (weights + read * per_token) / speed / seconds
            if shared:
                row["ungrouped_over_grouped"] = decode_step(model, ids, k, share=False)[0] / seconds
        print(row)
        result["rows"].append(row)
        common.write_result(name, result)
    result["reading"] = reading(model, 2 if quick else 32, context)
    common.write_result(name, result)
    prompts, k, shared = loads[-1]
    result["continuous"] = beside(model, random_prompts(prompts, shared, config.vocab_size), k, continuous)
    common.write_result(name, result)


def beside(model, ids: list[list[int]], k: int, continuous: bool) -> dict:
    """Many samples of each prompt end to end, against transformers' continuous batching."""
    new, config, weight = 128 if model.config is LARGE else 8, model.config, model.head_weight
    ways = {"ours": lambda: generate(model, ids, n=k, max_new_tokens=new, stop_ids=(), progress=False)}
    other = peer(config, weight.device.type, weight.dtype) if continuous else None
    if other:
        other.set_attn_implementation("sdpa_paged")
        ways["continuous"] = lambda: continuous_batching(other, ids, k, new)
    return row(f"{len(ids)} prompts of {len(ids[0]):,} tokens x {k}, {new} new", len(ids) * k * new, ways, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: OMP_NUM_THREADS=1 python benchmarks/sampling.py --device cpu",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each way takes (default 3)")
    parser.add_argument(
        "--no-continuous", action="store_true", help="leave transformers' continuous batching out"
    )
    parser.add_argument("--quick", action="store_true", help="a rehearsal with a micro model: no figures")
    parser.add_argument("--model", type=Path, metavar="DIR", help="with --device cpu: time this checkpoint")
    arguments = parser.parse_args()
    if arguments.model:
        if arguments.device != "cpu":
            parser.error("--model is timed with --device cpu")
        of_checkpoint(arguments.model, arguments.repeats)
    elif arguments.quick or arguments.device == "cuda":
        at_published_shape(arguments.device, arguments.quick, not arguments.no_continuous)
    else:
        common.write_result("sampling_cpu", on_cpu(arguments.repeats, not arguments.no_continuous))


if __name__ == "__main__":
    main()
