"""docs/rlhf.md: each snippet does what the page says, called by the package, or as that package calls it."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_random_judge
from served import Here
from test_serve import make_judge

PAGE = (Path(__file__).parents[1] / "docs/rlhf.md").read_text(encoding="utf-8")
TEXTS = ["Number 4.", "Number 0.", "Number 3."]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_random_judge(tmp_path_factory.mktemp("rlhf") / "model", max_positions=600)


@pytest.fixture(scope="module")
def here(place):
    """A judge by its first token."""
    here = Here(make_judge(place, format="label"))
    yield here
    here.close()


@pytest.fixture
def snippet(here):
    """What a snippet of the page defines, at the server that runs here."""

    def run(name: str) -> dict:
        (code,) = re.findall(rf"<!-- run: {name} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
        defined: dict = {}
        exec(code, defined)
        defined["URL"] = re.sub(r":\d+", f":{here.port}", defined["URL"])
        return defined

    return run


def wanted(here, texts) -> list[float]:
    status, answer = here.ask("/reward", {"prompts": ["Which?"] * len(texts), "completions": texts})
    assert status == 200 and len(set(answer["rewards"])) > 1
    return answer["rewards"]


def test_openrlhf_calls_the_function_with_one_rollout_at_a_time(here, snippet):
    defined = snippet("openrlhf")
    defined["URL"] = defined["URL"].replace("group=8", "group=3")
    frame = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"

    def rollout(text):
        return defined["reward_func"]([frame + text + "<|im_end|>\n"], [frame], [""])

    texts = sorted(TEXTS)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(rollout, texts))
    assert [each["rewards"] for each in found] == [[reward] for reward in wanted(here, texts)]
    assert all(each["scores"] == each["rewards"] and each["extra_logs"] for each in found)


def test_verl_calls_the_function_with_its_batch(here, snippet):
    extras = np.array([{"question": "Which?", "index": i} for i in range(3)], dtype=object)
    given = {"data_sources": np.array(["shop"] * 3, dtype=object), "solution_strs": TEXTS}
    found = snippet("verl")["compute_score"](**given, ground_truths=[None] * 3, extra_infos=extras, votes=2)
    assert found == wanted(here, TEXTS)


def test_trl_trains_three_steps_on_the_judges_rewards(here, snippet, place, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not here; no extra brings it: pip install trl")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    pyarrow = pytest.importorskip("pyarrow")
    judged, seen = snippet("trl")["judged"], []

    def noted(prompts, completions, **columns):
        rewards = judged(prompts, completions, **columns)
        seen.append((list(prompts), rewards))
        return rewards

    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
        max_steps=3, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    questions = [{"prompt": f"What is {number}?"} for number in range(8)]
    table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(questions))
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=noted, args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset(table, fingerprint="questions"),
    )  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 3 and not before.equal(model.lm_head.weight)
    assert len(seen) == 3 and all(len(set(prompts)) == 1 and len(prompts) == 4 for prompts, _ in seen)
    assert any(len(set(rewards)) > 1 for _, rewards in seen)
    logged = [row["rewards/noted/mean"] for row in trainer.state.log_history if "rewards/noted/mean" in row]
    assert logged == pytest.approx([sum(rewards) / 4 for _, rewards in seen])


def test_openais_own_client_finds_the_model(here):
    openai = pytest.importorskip("openai", reason="OpenAI's client is not here; no extra brings it")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{here.port}/v1", api_key="none")
    (model,) = client.models.list().data
    asked = {"model": model.id, "messages": [{"role": "user", "content": "What is 7?"}]}
    found = client.chat.completions.create(**asked, max_tokens=6, temperature=0, n=2)
    _, plain = here.ask("/v1/chat/completions", asked | {"max_tokens": 6, "temperature": 0, "n": 2})
    assert [each.message.content for each in found.choices] == [
        each["message"]["content"] for each in plain["choices"]
    ]
    assert found.usage.completion_tokens == 12
    with pytest.raises(openai.BadRequestError, match="not served: logit_bias"):
        client.chat.completions.create(**asked, logit_bias={"5": 1})
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked, stream=True)
