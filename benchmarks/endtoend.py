"""Pairs proved and judged per second from end to end, by a small model: what a round waits for.

    python benchmarks/endtoend.py [--device cuda|cpu] [--repeats 2]
    python benchmarks/endtoend.py --device cpu --quick      a rehearsal with a micro model: no figures

`Prover.prove_many` and `RewardModel.judge_many` as the steps of a run call them, with SmolLM2-135M's shape,
random weights and a tokenizer made up for it: prompts are written and tokenized, answers sampled, decoded and
read, and proofs scored by equation 5. Every prompt has about 600 tokens and every answer 100: the stop ids
never come. A random model proves nothing, so that each proof counts as eligible whatever was read from it;
otherwise none would be scored. Tokens written are those that were sampled.

Left out: reading pairs, writing shards, loading the model, and what it takes to choose among the proofs.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import common
import torch

sys.path.insert(0, str(common.ROOT / "tests"))

from checkpoints import make_checkpoint

from gramr2.judge import RewardModel
from gramr2.prover import Prover
from gramr2.records import Pair, Proof

K = VOTES = 4
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
               num_kv_heads=3, head_size=64, max_positions=8192, tie_embeddings=True)  # fmt: skip
MICRO = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2,
             head_size=16, max_positions=1024)  # fmt: skip


class Trusting(Prover):
    """Takes every proof for eligible."""

    def _read(self, pair, sample) -> Proof:
        return dataclasses.replace(super()._read(pair, sample), ineligible=None)


def make_pairs(prover: Prover, count: int, tokens: int) -> list[Pair]:
    """Pairs whose prompts have about so many tokens."""

    def pair(number: int, words: int) -> Pair:
        return Pair((("user", f"Question {number}? " + "x " * words),), "yes", "no", label="AB"[number % 2])

    short = len(prover.frame(prover.template)), len(prover.frame(prover.template + " x" * 100))
    words = (tokens - short[0]) * 100 // (short[1] - short[0])
    return [pair(number, words) for number in range(count)]


def prove(prover: Prover, pairs: list[Pair], new: int) -> None:
    proved = list(prover.prove_many(pairs, K, max_new_tokens=new, progress=False))
    proofs = [proof for _, each in proved for proof in each]
    assert len(proofs) == K * len(pairs)
    assert all(len(proof.ids) == new and proof.score is not None for proof in proofs)


def judge(judge: RewardModel, pairs: list[Pair], new: int) -> None:
    judged = list(judge.judge_many(pairs, VOTES, max_new_tokens=new, progress=False))
    votes = [vote for _, judgment in judged for vote in judgment.details]
    assert len(votes) == VOTES * len(pairs) and all(vote.tokens == new for vote in votes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a rehearsal with a micro model: no figures")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    dtype = "bfloat16" if device == "cuda" else "float32"
    prompt, new, count = (60, 4, 3) if quick else (600, 100, 256 if device == "cuda" else 4)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        place = make_checkpoint(Path(directory) / "model", **(MICRO if quick else SMOLLM2))
        (place / "judge_prompt.txt").write_text("{question} {response_a} {response_b}")
        (place / "prover_prompt.txt").write_text("{question} {response_a} {response_b} {label}")
        prover, reward = Trusting.load(place, device, dtype), RewardModel.load(place, device, dtype)
    prover.model.stop_ids = reward.model.stop_ids = ()
    pairs = make_pairs(prover, count, prompt)
    ways = {"prove": lambda: prove(prover, pairs, new), "judge": lambda: judge(reward, pairs, new)}
    named = {"prove": f"proving, {K} proofs of a pair, scored", "judge": f"judging by {VOTES} votes"}
    result = {"shape": "micro" if quick else "SmolLM2-135M", "dtype": dtype, "pairs": count, "prompt": prompt}
    result |= {"new": new, "repeats": arguments.repeats, "rows": []}
    for name, way in ways.items():
        seconds = common.compare({name: way}, arguments.repeats)[name]["seconds"]
        row = {"name": name, "what": named[name], "pairs_per_s": count / seconds}
        row["written_per_s"] = count * K * new / seconds
        print(f"{row['what']}: {row['pairs_per_s']:.1f} pairs/s")
        result["rows"].append(row)
        common.write_result("endtoend_quick" if quick else f"endtoend_{device}", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
