"""The house rules: layers, line budgets, lazy imports, what the interfaces promise, a README that is true."""

import ast
import inspect
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import gramr2
from gramr2 import kernels

ROOT = Path(__file__).parents[1]
LAYERS = [
    ["gramr2.installed"],
    ["gramr2.interrupts"],
    ["gramr2.files"],
    ["gramr2.fields"],
    ["gramr2.kernels", "gramr2.records", "gramr2.settings", "gramr2.seals", "gramr2.chat_templates"],
    ["gramr2.directories"],
    ["gramr2.prompts", "gramr2.tokenizer", "gramr2.cache", "gramr2.model"],
    ["gramr2.lora"],
    ["gramr2.data", "gramr2.weights", "gramr2.loss", "gramr2.scoring", "gramr2.requests"],
    ["gramr2.denoise", "gramr2.selection", "gramr2.rankings", "gramr2.stages", "gramr2.parallel"],
    [
        "gramr2.scheduler",
        "gramr2.batch",
        "gramr2.recipes",
        "gramr2.examples",
        "gramr2.run_directory",
        "gramr2.resume",
    ],
    ["gramr2.graphs", "gramr2.plan", "gramr2.optimizer"],
    ["gramr2.engine", "gramr2.tokenized"],
    ["gramr2.sampler", "gramr2.cost"],
    ["gramr2.votes", "gramr2.prover"],
    ["gramr2.judge", "gramr2.fit"],
    ["gramr2.steps"],
    ["gramr2.extras"],
    ["gramr2.commands"],
]
BUDGET = {"core": 6350, "kernels": 1110, "extras": 5200}
LARGEST = 350  # lines of code of one file of the core


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer(module: str) -> int | None:
    """The layer of the longest listed name that `module` is, or is inside of."""
    found = [n for n, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    return max(found, default=None)


def sources() -> list[Path]:
    return sorted({*ROOT.glob("gramr2/**/*.py"), *ROOT.glob("gramr2/kernels/*.py")})


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_point_down():
    """A file that imports from its own layer or above ties a knot that nobody can read in order."""
    wrong = []
    for path in sources():
        module = module_name(path)
        if module == "gramr2" or layer(module) is None:
            continue
        for name in imported(path):
            above = layer(name)
            same_package = module.split(".")[:2] == name.split(".")[:2]
            if above is None or same_package:
                continue
            if above >= layer(module):
                wrong.append(f"{module} (layer {layer(module)}) imports {name} (layer {above})")
    assert not wrong


def test_every_module_has_a_layer():
    assert not [
        module_name(p) for p in sources() if layer(module_name(p)) is None and module_name(p) != "gramr2"
    ]


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings |= set(range(first.lineno, first.end_lineno + 1))
    lines = set()
    skip = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skip:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def part_of(path: Path) -> str:
    return "kernels" if path.parent.name == "kernels" else "extras" if "extras" in path.parts else "core"


def test_line_budgets():
    """The project is read in a weekend, or it is not what it says."""
    counts = dict.fromkeys(BUDGET, 0)
    for path in sources():
        counts[part_of(path)] += code_lines(path)
    assert not {part: count for part, count in counts.items() if count > BUDGET[part]}


def test_rooms_are_of_one_size():
    """A file of the core is read in one sitting."""
    sizes = {module_name(path): code_lines(path) for path in sources() if part_of(path) == "core"}
    assert not {name: lines for name, lines in sizes.items() if lines > LARGEST}


def test_functions_fit_a_screen():
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{module_name(path)}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert not long


def test_every_module_says_what_it_is_and_what_it_leaves_out():
    silent = []
    for path in sources():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if not text or (len(text) > 400 and "leaves out" not in text and path.parent.name == "gramr2"):
            silent.append(module_name(path))
    assert not [name for name in silent if name != "gramr2"]


def run_script(name: str) -> str:
    """What a script beside these tests says, in a process that has imported nothing else."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, ROOT / "tests/scripts" / name]
    return subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout


def test_importing_does_nothing():
    """No extra, no change of the environment: `import gramr2` must be safe anywhere and cost nothing."""
    assert run_script("import_only.py").split() == ["environment", "unchanged,", "loaded:", "[]"]


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_no_extra_is_imported_at_top_level(path):
    extras = {"transformers", "pyarrow", "liger_kernel", "cut_cross_entropy", "pytest", "hypothesis"}
    extras |= {"tensorboard", "wandb"}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots = {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else {
                (node.module or "").split(".")[0]
            }  # fmt: skip
            assert not roots & extras


# ---------------------------------------------------------------------------------- interfaces


SIGNATURES = {
    gramr2.load: ["directory", "device", "dtype"],
    gramr2.save: ["model", "tokenizer", "directory", "extra"],
    gramr2.logprobs: ["model", "sequences"],
    gramr2.generate: ["model", "prompts", "n", "max_new_tokens", "temperature", "top_p", "top_k", "stop_ids",
                      "stop_texts", "tokenizer", "watch", "seed", "keys", "progress"],
    gramr2.RewardModel.load: ["directory", "device", "dtype", "prompt"],
    gramr2.RewardModel.judge: ["self", "question", "a", "b", "votes", "seed"],
    gramr2.RewardModel.judge_many: ["self", "pairs", "votes", "seed"],
    gramr2.RewardModel.best_of: ["self", "question", "responses", "method"],
    gramr2.RewardModel.rank: ["self", "question", "responses", "method"],
    gramr2.RewardModel.reward: ["self", "prompts", "completions", "references"],
    gramr2.prompts.parse_verdict: ["text", "opened"],
    kernels.sequence_logprob: ["hidden_TD", "weight_VD", "targets_T"],
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_pinned_signatures(function):
    names = list(inspect.signature(function).parameters)
    assert names[: len(SIGNATURES[function])] == SIGNATURES[function]


def test_pinned_defaults():
    defaults = {n: p.default for n, p in inspect.signature(gramr2.generate).parameters.items()}
    pinned = dict(n=1, max_new_tokens=1024, temperature=1.0, top_p=1.0, top_k=0, stop_ids=None, stop_texts=(),
                  tokenizer=None, watch=(), seed=0, keys=None, progress=True)  # fmt: skip
    assert {name: defaults[name] for name in pinned} == pinned
    of_a_request = inspect.signature(gramr2.sampler.request_of).parameters.items()
    assert not {n for n, p in of_a_request if p.default != defaults[n]}  # a server's requests are such calls
    assert {"ids", "logprobs", "watched", "finish"} <= set(gramr2.Sample.__dataclass_fields__)
    assert gramr2.prompts.parse_verdict("<answer>\nA\n</answer>") == ("A", "")
    assert kernels.backend("cpu") == "reference" or os.environ.get("TRITON_INTERPRET") == "1"


COMMANDS = {
    "train.py": ["--stage", "--recipe", "--data", "--model", "--out", "--limit", "--dry-run"],
    "selftrain.py": ["--iters", "--recipe", "--human", "--labelled", "--unlabelled", "--test", "--name",
                     "--seed", "--from", "--until", "--dry-run"],
    "infer.py": ["--pair", "--rank", "--pairs", "--bench", "--audit", "--score", "--out", "--model",
                 "--prompt", "--votes", "--seed", "--max-new-tokens", "--temperature", "--top-p", "--top-k",
                 "--limit", "--json"],
}  # fmt: skip


def command(name, *words, options=(), cwd=None):
    line = [sys.executable, *options, ROOT / name, *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_flag_and_unknown_ones_are_refused(name):
    said = command(name, "--help")
    assert said.returncode == 0 and f"python {name}" in said.stdout  # an example of use
    assert not [flag for flag in COMMANDS[name] if not re.search(rf"{flag}\b", said.stdout)]
    refused = command(name, "--no-such-flag")
    assert refused.returncode == 2 and "error:" in refused.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_waits_for_no_torch(name):
    """Seconds before a line of help appears are what a beginner takes for a hang."""
    said = command(name, "--help", options=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in said.stderr.splitlines()}
    assert "gramr2.files" in imported and "torch" not in imported


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "--stage", "reward", "--recipe", "nowhere.toml"),
        ("selftrain.py", "--recipe", "nowhere.toml"),
        ("selftrain.py", "--human", "nowhere.jsonl"),
        ("infer.py", "--pair", "nowhere.json", "--model", "nowhere"),
        ("infer.py", "--pair", "nowhere.json"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exit_status_2(words, tmp_path):
    result = command(*words, cwd=tmp_path)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr and result.stdout == ""


def test_a_reader_who_leaves_early_ends_a_command_quietly_but_not_as_done(tmp_path):
    """`infer.py --formats | head -1` ended in a traceback; a run that is cut so must not pass for done."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, ROOT / "infer.py", "--formats"]
    with os.fdopen(writer, "w") as gone:
        result = subprocess.run(words, stdout=gone, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (141, "")


PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_name_in_the_pages_resolves(page):
    """A reader follows the table from an equation to its lines; a stale name sends him nowhere."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py):(\w+)`", text)
    assert len(named) >= 8 or page != ROOT / "docs/understand.md"
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        tables = re.findall(r"^([A-Z_]+)\b.* = ", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert name in {*defined, *tables}, f"{path}:{name}"
    folders = "gramr2|kernels|recipes|benchmarks|docs|tests"
    for path in re.findall(rf"\b((?:{folders})/[\w./-]+\.(?:py|toml|md))\b", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)#]+)", text):  # links
        assert (page.parent / path).exists(), path


def test_every_flag_in_the_pages_exists():
    """Whoever copies a line would learn of a flag that is gone when the job has waited for its nodes."""
    launcher = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    known = {name: {*re.findall(r"--[a-z][\w-]*", command(name, "--help").stdout)} for name in COMMANDS}
    blocks = [(ROOT / "docs/slurm.sbatch").read_text(encoding="utf-8")]
    for page in PAGES:
        blocks += re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    wrong, seen = set(), set()
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        before, name, behind = re.match(r"(.*?)(\b(?:train|selftrain|infer)\.py|$)([^#]*)", line).groups()
        pairs = [(behind, known.get(name, set()))]
        if "torchrun" in before:
            pairs.append((before.partition("torchrun")[2], launcher))
        for words, flags in pairs if name or "torchrun" in before else []:
            used = {*re.findall(r"(?<![\w-])--[a-z][\w-]*", words)}
            seen, wrong = seen | used, wrong | used - flags
    assert {"--rdzv_endpoint", "--recipe", "--votes"} <= seen and not wrong


def test_without_triton_the_choice_is_visible():
    """macOS has no Triton: everything must import, and `backend` must say that the reference runs."""
    assert run_script("without_triton.py").split() == ["reference", "reference"]


def test_the_roads_of_the_architecture_page_have_five_stops_at_most():
    """Figure 2 to equation 5, a vote to its label, a target to its loss: each stop is a name in the code."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    roads = re.findall(r"(?:^\d\. .*\n(?:   .*\n)*)+", page, re.MULTILINE)
    stops = [re.split(r"^\d\. ", road, flags=re.MULTILINE)[1:] for road in roads]
    assert len(roads) == 5 and max(map(len, stops)) <= 5
    assert not [stop for road in stops for stop in road if not re.search(r"`[\w/]+\.py:\w+`", stop)]
