"""Pairs judged per second with 1, 4 and 16 votes, beside the loop over generate that the model card shows.

    python benchmarks/judging.py [--device cpu|cuda] [--repeats 3] [--quick]

Both judge the same prompts with the same random weights, and every answer has the same length: the stop ids
never come. The loop is the card's: one pair at a time, and one call of transformers' generate for each vote,
which computes the prompt each time. Ours judges its pairs in one call, each in both orders, where the votes
of an order share its prompt. The prompt is four times the answer.

Left out: verdicts. A random model never writes one; reading it costs neither way anything.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import common
import torch

sys.path.insert(0, str(common.ROOT / "tests"))

from checkpoints import make_checkpoint

from gramr2.judge import RewardModel
from gramr2.prompts import judge_prompt
from gramr2.records import Pair

PROMPT, ANSWER = 256, 64  # tokens
VOTES = 1, 4, 16
SMALL = dict(hidden_size=256, intermediate_size=688, num_layers=4, num_heads=4, num_kv_heads=4, head_size=64,
             vocab_size=32000, max_positions=1024)  # fmt: skip
LARGE = dict(hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8,
             head_size=64, vocab_size=128256, max_positions=2048)  # fmt: skip
MICRO = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2, head_size=16,
             vocab_size=320, max_positions=1024)  # fmt: skip


def make_pairs(judge: RewardModel, count: int) -> list[Pair]:
    """Pairs whose prompts are PROMPT tokens long, give or take one."""
    pairs = []
    for number in range(count):
        question, words = f"Question {number}? ", 0
        while True:
            pair = Pair((("user", question + "x " * words),), "yes", "no")
            content = judge_prompt(pair, judge.template)
            if len(judge.tokenizer.chat([{"role": "user", "content": content}])) >= PROMPT:
                break
            words += 1
        pairs.append(pair)
    return pairs


def ours(judge: RewardModel, pairs: list[Pair], votes: int) -> None:
    judged = list(judge.judge_many(pairs, votes, max_new_tokens=ANSWER, temperature=1.0, progress=False))
    assert sum(len(judgment.details) for _, judgment in judged) == votes * len(pairs)
    assert all(vote.tokens == ANSWER for _, judgment in judged for vote in judgment.details)


def theirs(directory: Path, judge: RewardModel, device: str, dtype: str):
    """The card's loop: (pairs, votes) → nothing."""
    transformers = common.needed("transformers")
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(
        device
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def loop(pairs: list[Pair], votes: int) -> None:
        for pair in pairs:
            for _ in range(votes):
                messages = [{"role": "user", "content": judge_prompt(pair, judge.template)}]
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                inputs = tokenizer([text], return_tensors="pt", add_special_tokens=False).to(device)
                generated = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=True)
                answer = generated[0][inputs.input_ids.shape[1] :].tolist()
                assert len(answer) == ANSWER
                tokenizer.decode(answer, skip_special_tokens=True)

    return loop


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a rehearsal with a micro model: no figures")
    arguments = parser.parse_args()
    cuda, quick = arguments.device == "cuda", arguments.quick
    dtype, count = ("bfloat16", 32) if cuda else ("float32", 8)
    count = 2 if quick else count
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        shape = MICRO if quick else LARGE if cuda else SMALL
        place = make_checkpoint(Path(directory) / "model", **shape)
        (place / "judge_prompt.txt").write_text("{question} {response_a} {response_b}")
        judge = RewardModel.load(place, arguments.device, dtype)
        judge.model.stop_ids = ()
        pairs, loop = make_pairs(judge, count), theirs(place, judge, arguments.device, dtype)
        ways, sizes = {}, {}
        for votes in VOTES:
            ways[f"ours {votes}"], sizes[f"ours {votes}"] = lambda v=votes: ours(judge, pairs, v), count
            few = 2 if votes == 1 else 1
            ways[f"loop {votes}"], sizes[f"loop {votes}"] = lambda v=votes, n=few: loop(pairs[:n], v), few
        timed = common.compare(ways, arguments.repeats)
    rate = {name: sizes[name] / each["seconds"] for name, each in timed.items()}
    rows = []
    for votes in VOTES:
        mine, other = rate[f"ours {votes}"], rate[f"loop {votes}"]
        rows.append({"votes": votes, "ours": mine, "loop": other, "singles": rate["ours 1"] / mine})
    result = {"device": arguments.device, "dtype": dtype, "prompt": PROMPT, "answer": ANSWER, "pairs": count}
    name = "judging_quick" if quick else f"judging_{arguments.device}"
    common.write_result(name, result | {"repeats": arguments.repeats, "rows": rows})
    for row in rows:
        print(f"{row['votes']:3} votes: {row['ours']:.3f} pairs/s, the loop {row['loop']:.3f}, ", end="")
        print(f"{row['ours'] / row['loop']:.1f}x; as long as {row['singles']:.2f} single votes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
