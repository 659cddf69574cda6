"""docs/rlhf.md: each snippet does what the page says, called by the package, or as that package calls it."""

from __future__ import annotations

import asyncio
import re
import runpy
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
def snippet(here, tmp_path):
    """A snippet of the page as a file of its own, for the server that runs here and groups of three."""

    def write(name: str) -> Path:
        (code,) = re.findall(rf"<!-- run: {name} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
        code = re.sub(r":8000/(\w+)(\?group=8)?", rf":{here.port}/\1?group=3", code)
        place = tmp_path / f"{name}.py"
        place.write_text(code)
        return place

    return write


def run(place: Path) -> dict:
    return runpy.run_path(str(place))


def wanted(here, texts, asked="Which?") -> list[float]:
    status, answer = here.ask("/reward", {"prompts": [asked] * len(texts), "completions": texts})
    assert status == 200 and len(set(answer["rewards"])) > 1
    return answer["rewards"]


FRAME = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
ROLLOUTS = [([FRAME + text + "<|im_end|>\n"], [FRAME], [""]) for text in sorted(TEXTS)]


def test_openrlhf_calls_the_function_with_one_rollout_at_a_time(here, snippet):
    reward_func = run(snippet("openrlhf"))["reward_func"]  # once: a file is not read while it is written
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rollout: reward_func(*rollout), ROLLOUTS))
    assert [each["rewards"] for each in found] == [[reward] for reward in wanted(here, sorted(TEXTS))]
    assert all(each["scores"] == each["rewards"] and each["extra_logs"] for each in found)


@pytest.mark.parametrize("by", ["address", "function"])
def test_openrlhf_itself_gets_its_rewards(here, snippet, by):
    """What its rollouts call, with the address and with the file."""
    agent = pytest.importorskip("openrlhf.utils.agent", reason="OpenRLHF is not here: pip install openrlhf")
    url = f"http://127.0.0.1:{here.port}/openrlhf?group=3"
    executor = agent.SingleTurnAgentExecutor(url if by == "address" else str(snippet("openrlhf")))
    fetch = executor._fetch_rewards_via_http if by == "address" else executor._fetch_rewards_via_func

    async def everybody():
        return await asyncio.gather(*(fetch(*rollout) for rollout in ROLLOUTS))

    found = [each["rewards"] for (each,) in asyncio.run(everybody())]
    asked = FRAME if by == "address" else "Which?"
    assert found == [[reward] for reward in wanted(here, sorted(TEXTS), asked)]


def verl_calls(compute_score) -> list[float]:
    """A rollout at a time, as its reward managers do."""
    given = {"data_source": "shop", "ground_truth": None, "extra_info": {"question": "Which?", "index": 0}}

    async def everybody():
        return await asyncio.gather(*(compute_score(**given, solution_str=text) for text in sorted(TEXTS)))

    return asyncio.run(everybody())


def test_verl_calls_the_function_with_one_rollout_at_a_time(here, snippet):
    assert verl_calls(run(snippet("verl"))["compute_score"]) == wanted(here, sorted(TEXTS))


def test_verl_itself_gets_its_rewards(here, snippet, place):
    """Its own reward manager, with the settings of the page."""
    reward = pytest.importorskip("verl.trainer.ppo.reward", reason="verl is not here: pip install verl")
    verl, omegaconf, transformers = map(pytest.importorskip, ("verl", "omegaconf", "transformers"))
    function = {"path": str(snippet("verl")), "name": "compute_score", "reward_kwargs": {"votes": 2}}
    manager = {"source": "register", "name": "naive"}
    config = {"reward": {"custom_reward_function": function, "reward_manager": manager}}
    config |= {"actor_rollout_ref": {"rollout": {"multi_turn": {}}}}
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)

    async def everybody():
        managed = reward.load_reward_manager(omegaconf.OmegaConf.create(config), tokenizer)
        return await asyncio.gather(*(managed.run_single(rollout(text)) for text in sorted(TEXTS)))

    def rollout(text: str):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        row = {
            "data_source": "shop",
            "reward_model": {"ground_truth": None},
            "extra_info": {"question": "Which?"},
        }
        others = {name: np.array([value], dtype=object) for name, value in row.items()}
        return verl.DataProto.from_dict({"responses": ids, "attention_mask": ids != -1}, others)

    found = asyncio.run(everybody())
    assert [each["reward_score"] for each in found] == wanted(here, sorted(TEXTS))


def test_trl_trains_three_steps_on_the_judges_rewards(here, snippet, place, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not here; no extra brings it: pip install trl")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    pyarrow = pytest.importorskip("pyarrow")
    judged, seen = run(snippet("trl"))["judged"], []

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
