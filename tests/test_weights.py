"""Every weight is accounted for; what is wrong with a directory is said in one line."""

import json
import threading
from pathlib import Path

import forks
import pytest
import torch
from checkpoints import make_checkpoint, random_model
from safetensors.torch import load_file, save_file

import gramr2
from gramr2 import weights
from gramr2.files import InputError, publish_directory


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index_with_an_absent_file(directory):
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    names = load_file(directory / "a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "a.safetensors") | {"model.norm.weight": "b.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "not JSON"),
    "config without a field": (lambda d: edit_config(d, hidden_size=None), 'no field "hidden_size"'),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor an index"),
    "truncated": (truncate, "truncated"),
    "absent file": (index_with_an_absent_file, "b.safetensors: missing, though"),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        "model.norm.weight has shape [7], expected [48]",
    ),
    "missing tensor": (
        lambda d: edit_tensors(d, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "model.layers.1.mlp.up_proj.weight missing",
    ),
    "unused tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.layers.1.extra.weight": torch.ones(7)})),
        "model.layers.1.extra.weight in the checkpoint, but not in the model",
    ),
    "untied head in a tied model": (
        lambda d: edit_tensors(d, lambda t: t.update({"lm_head.weight": torch.ones(320, 48)})),
        "lm_head.weight differs",
    ),
    "MoE": (
        lambda d: edit_config(d, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"]),
        "Qwen3MoeForCausalLM (model_type qwen3_moe) is not supported; supported are LlamaForCausalLM",
    ),
    "Gemma": (lambda d: edit_config(d, model_type="gemma2", architectures=["Gemma2ForCausalLM"]), "Gemma2"),
    "YaRN": (
        lambda d: edit_config(d, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "type 'yarn' is not supported",
    ),
    "sliding window": (lambda d: edit_config(d, use_sliding_window=True), "use_sliding_window = True"),
    "quantised": (lambda d: edit_config(d, quantization_config={"bits": 4}), "quantization_config"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "tokenizer not JSON": (lambda d: (d / "tokenizer.json").write_text("[1"), "tokenizer.json: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_in_one_line(tmp_path, case):
    damage, expected = BROKEN[case]
    directory = make_checkpoint(tmp_path / "model", "llama3")
    gramr2.load(directory)  # it was whole
    damage(directory)
    with pytest.raises(InputError) as caught:
        gramr2.load(directory)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_window_that_is_not_in_use_is_no_window(tmp_path):
    """Qwen2's files state a window's size whether it is in use or not."""
    directory = make_checkpoint(tmp_path / "model", "qwen2")
    edit_config(directory, sliding_window=32)
    weights.load_model(directory)
    edit_config(directory, use_sliding_window=False)
    weights.load_model(directory)


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path):
    """Its last ids would index past the embedding."""
    directory = make_checkpoint(tmp_path / "model", "qwen2", vocab_size=290)
    with pytest.raises(InputError, match="tokenizer has 295 ids, the model only 290"):
        gramr2.load(directory)


def test_a_half_written_directory_is_never_loaded(tmp_path):
    """A writer that dies leaves nothing under the name, and its temporary directory is refused."""
    with pytest.raises(ZeroDivisionError), publish_directory(tmp_path / "model") as place:
        make_checkpoint(place / "inner")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    half = make_checkpoint(tmp_path / ".model.tmp-123")
    with pytest.raises(InputError, match="half-written"):
        gramr2.load(half)


def test_replacing_a_model_swaps_it_whole(tmp_path):
    """The second and third publication: the name always resolves to one whole version, the last."""
    for seed in (0, 1, 2):
        weights.save(random_model("llama3", seed), None, tmp_path / "model")
        loaded = weights.load_model(tmp_path / "model")
        assert torch.equal(loaded.norm.weight, random_model("llama3", seed).norm.weight)
    assert (tmp_path / "model").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2  # the link and the version behind it


def test_versions_that_a_kill_left_without_their_link_are_cleared(tmp_path):
    """Killed between the two renames, a publication leaves versions and no link; later ones go on."""
    for left in ("model.v1", "model.v2"):
        weights.save(random_model("llama3"), None, tmp_path / left)
    for seed in (1, 2):
        weights.save(random_model("llama3", seed), None, tmp_path / "model")
    loaded = weights.load_model(tmp_path / "model")
    assert torch.equal(loaded.norm.weight, random_model("llama3", 2).norm.weight)
    assert len(list(tmp_path.iterdir())) == 2


def test_known_superfluous_tensors_are_accepted(tmp_path):
    """Old LLaMA-2 files carry RoPE tables, and some tied checkpoints a copy of the embedding as head."""
    directory = make_checkpoint(tmp_path / "model", "llama3")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(directory, add)
    weights.load_model(directory)


def test_tokenizer_files_and_extras_travel_with_the_model(tmp_path):
    first = make_checkpoint(tmp_path / "first", "qwen3")
    model, tokenizer = gramr2.load(first)
    gramr2.save(model, tokenizer, tmp_path / "second", extra={"judge_prompt.txt": "{question} é"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (first / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert (tmp_path / "second/judge_prompt.txt").read_text(encoding="utf-8") == "{question} é"
    assert model.stop_ids == tokenizer.stop_ids and len(model.stop_ids) == 2


def test_files_of_tensors_are_cut_at_the_limit_and_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 50_000)
    directory = make_checkpoint(tmp_path / "model", "llama2")
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    model = weights.load_model(directory)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert torch.equal(model.head.weight, random_model("llama2").head.weight)


def anonymous() -> int:
    """kB of this process's memory that are no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def write_peak_while_loading(directory: Path, dtype: str) -> int:
    """Anonymous memory beyond what there was, as a share of the model's size: into a file named `dtype`."""
    torch.set_num_threads(1)  # this is a fork
    weights.load_model(directory / "small")
    before, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    model = weights.load_model(directory / "large", dtype=dtype)
    done.set()
    thread.join()
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1024
    (directory / dtype).write_text(str((max(*seen, anonymous()) - before) / size))
    return 0


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="anonymous memory is read from /proc"
)
def test_loading_holds_one_copy(tmp_path):
    """A second copy of an 8B model in memory is what stops people from loading it."""
    make_checkpoint(tmp_path / "small")
    make_checkpoint(tmp_path / "large", "llama2", vocab_size=16000, hidden_size=768, intermediate_size=3072)
    for dtype in ("float32", "bfloat16"):
        children = forks.fork_ranks(lambda _, dtype=dtype: write_peak_while_loading(tmp_path, dtype), 1)
        assert forks.exits(children) == [0] and float((tmp_path / dtype).read_text()) <= 1.15
