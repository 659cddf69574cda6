"""One pair followed through every file of a finished run, written into docs/walkthrough.md.

    python benchmarks/walkthrough.py runs/toy                 a pair that was kept
    python benchmarks/walkthrough.py runs/toy --pair ID       this one; if it was dropped, the walk ends there
    python benchmarks/walkthrough.py runs/toy --out FILE.md   somewhere else

Everything is read from the run's directory. What no file holds (the ids of prompts, and proofs that were not
chosen, unless the run had --keep-candidates) is made again by the code that made it the first time, from the
run's own models and seed; the chosen proof must then come out as it stands on file.

Left out: the steps before the first round, which do the same to labelled pairs, and the last fine-tuning.
"""

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import common

from gramr2 import denoise, fit, parallel, prompts, prover, sampler, selection, steps
from gramr2.examples import ExampleBuilder
from gramr2.extras import inputs, toyworld
from gramr2.extras.report import as_filtered
from gramr2.extras.results import JudgedPair, RunReader, read_round
from gramr2.files import InputError, exit_status, publish_file
from gramr2.plan import make_plan
from gramr2.records import Judgment, Pair, Proof, Vote
from gramr2.settings import SelfTrainSettings, TrainSettings
from gramr2.tokenizer import Tokenizer
from gramr2.votes import Voter

PAGE = common.ROOT / "docs/walkthrough.md"
SHOWN = 1200  # characters of a text that are shown

# ---------------------------------------------------------------------------------- markdown


def code(function) -> str:
    """`gramr2/votes.py:Asker.read`, of a function that exists."""
    path = Path(inspect.getsourcefile(function)).resolve().relative_to(common.ROOT)
    return f"`{path.as_posix()}:{function.__qualname__}`"


def block(text: str, kind: str = "text") -> str:
    """Somebody's text in a fence that it cannot close."""
    shown = (
        text if len(text) <= SHOWN else f"{text[:SHOWN]}\n[the first {SHOWN:,} of {len(text):,} characters]"
    )
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}{kind}\n{shown}\n{fence}"


def row_block(row: dict) -> str:
    """A row of a file; long texts in it are shortened."""

    def short(value):
        if isinstance(value, dict):
            return {key: short(each) for key, each in value.items()}
        long = isinstance(value, str) and len(value) > SHOWN // 2
        return value[: SHOWN // 2] + f" [{len(value):,} characters]" if long else value

    return block(json.dumps(short(row), indent=1, ensure_ascii=False), "json")


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def some_ids(ids: Sequence[int]) -> str:
    if len(ids) <= 40:
        return " ".join(map(str, ids))
    return " ".join(map(str, ids[:20])) + f" … ({len(ids) - 40} more) … " + " ".join(map(str, ids[-20:]))


# ---------------------------------------------------------------------------------- the walk


class Walk:
    """A pair in a round of a run. Each method is a section of the page."""

    def __init__(self, run: RunReader, found: JudgedPair):
        self.run, self.found, self.name = run, found, f"round-{found.round}-"
        known = {field.name for field in dataclasses.fields(SelfTrainSettings)}
        given = {key: value for key, value in run.settings.items() if key in known}
        for key in ("confidence", "without"):
            given[key] = tuple(given[key]) if isinstance(given[key], list) else (given[key],)
        self.settings = SelfTrainSettings(**given)
        self.filters = self.settings.filters(found.round)
        trains, known = (
            run.settings["train reward"],
            {field.name for field in dataclasses.fields(TrainSettings)},
        )
        self.training = TrainSettings(**{key: value for key, value in trains.items() if key in known})
        self.world_rules = toyworld.world_rules(run.settings)

    def path(self, step: str, name: str) -> Path:
        return self.run.steps[step] / name

    def file(self, step: str, name: str) -> str:
        return f"`steps/{self.run.steps[step].name}/{name}`"

    def row(self, step: str, name: str) -> dict | None:
        """The pair's row in a file of a step, if it has one."""
        rows = self.run.rows(step, name)
        return next((row for row in rows if row.get("pair", row)["id"] == self.found.id), None)

    def section(self, title: str, step: str, name: str, *functions) -> str:
        return f"## {title}\n\nFile {self.file(step, name)}. Code: {', '.join(map(code, functions))}."

    def sections(self) -> Iterator[str]:
        yield from self.question()
        yield from self.frames()
        yield from self.votes()
        yield from self.label()
        if self.found.reached >= 3:
            yield from self.proofs()
        if self.found.reached == 5:
            yield from self.rules()
            yield from self.example()
            yield from self.next_model()
        else:
            yield f"## It ends here\n\nThe pair was dropped: {self.found.why}. No model was trained on it."

    def question(self) -> Iterator[str]:
        batch = f"unlabelled-{self.found.round}.jsonl"
        yield self.section(
            "1. A question and two responses",
            "data",
            batch,
            inputs.split_pairs,
            inputs.deal_rounds,
            Pair.from_json,
        )
        yield f"The pair has no label. It was dealt to round {self.found.round}, and to no other."
        yield row_block(self.row("data", batch))
        if self.found.truth:
            truth = self.file("data", "truth.jsonl")
            yield (
                f"This world was made, so the truth is known: {self.found.truth} is better. It stands in "
                f"{truth}, which reports read, and nothing that trains or filters."
            )

    @property
    def judge(self) -> Path:
        before = "initial" if self.found.round == 1 else f"round-{self.found.round - 1}-train"
        return self.path(before, "model")

    def frames(self) -> Iterator[str]:
        tokenizer = Tokenizer.load(self.judge, date=self.training.date)
        template, _ = prompts.template_for(self.judge)
        pair = Pair.from_json(self.row("data", f"unlabelled-{self.found.round}.jsonl"))
        step = self.judge.parent.name.partition("-")[2]
        functions = Voter.ask, prompts.judge_prompt, Tokenizer.chat
        yield self.section("2. The judge is asked in both orders", step, "model/judge_prompt.txt", *functions)
        yield (
            "The prompt's template belongs to the model. It is filled with the question and the "
            "responses, once as they are given and once exchanged, put into the tokenizer's chat frame, "
            "and encoded. The prompts themselves are not kept; here they are made again."
        )
        for order, shown in (("AB, as given", pair), ("BA, exchanged", pair.swapped())):
            ids = tokenizer.chat([{"role": "user", "content": prompts.judge_prompt(shown, template)}])
            yield f"{order}, {len(ids)} tokens:"
            yield block(tokenizer.decode(ids, skip_special=False))
            yield block(some_ids(ids))

    def votes(self) -> Iterator[str]:
        row = self.row(self.name + "predict", "judged.jsonl")
        votes = [Vote.from_json(each) for each in row["details"]]
        functions = steps.Run.judge, sampler.generate, Voter.read, Judgment.from_votes
        yield self.section("3. Votes", self.name + "predict", "judged.jsonl", *functions)
        yield (
            f"{len(votes)} answers are sampled, half in each order. The sampler gets ids and gives back "
            "ids with their log-probabilities; it knows nothing of pairs. Its noise comes from the seed, "
            "the pair's id and order, the number of the sample and the place in it, so a vote is the "
            "same in whatever batch it is drawn. The first answer in each order:"
        )
        for order in dict.fromkeys(vote.order for vote in votes):
            first = next(vote for vote in votes if vote.order == order)
            yield block(first.text)
            read = prompts.parse_verdict(first.text)
            note = f" ({read.reason})" if read.reason else ""
            yield f"Asked {order}, {code(prompts.parse_verdict)} reads **{read.label or 'nothing'}**{note}."
        yield (
            "A vote of the order BA is turned back, so that A is always the pair's first response. p(A) "
            "is the softmax over the two letters at the place where the verdict stands."
        )
        head = ["vote", "asked", "for", "p(A)", "tokens", "note"]
        yield table(head, [
            (n, vote.order, vote.label or "none", "–" if vote.p_a is None else f"{vote.p_a:.6f}", vote.tokens,
             vote.reason) for n, vote in enumerate(votes, 1)
        ])  # fmt: skip
        names = ("label", "p_a", "votes", "abstained", "orders_agree")
        yield "Together, in the row:"
        yield row_block({name: row[name] for name in names})

    def label(self) -> Iterator[str]:
        row = self.row(self.name + "predict", "judged.jsonl")
        _, judgment = as_filtered(self.run, row)
        name = "kept.jsonl" if self.found.reached >= 3 else "dropped.jsonl"
        filters = denoise.without_incoherent_votes, denoise.objections, denoise.balance
        title = "4. Can the label be trusted?"
        yield self.section(title, self.name + "labels", name, steps.Run.filter_labels, *filters)
        lost = [vote for vote in judgment.details if vote.reason and vote.label is None]
        counted = ", ".join(f"{count} {label}" for label, count in judgment.votes.items())
        agree = "agree" if judgment.orders_agree else "do not agree"
        yield (
            f"Votes whose own rationale breaks a rule of coherence count as none: {len(lost)} here"
            + (f" ({'; '.join(sorted({vote.reason for vote in lost}))})" if lost else "")
            + f". That leaves {counted}, and the orders {agree}. Then each filter may object:"
        )
        said = denoise.objections(denoise.LABEL_FILTERS, judgment, settings=self.filters)
        yield table(["filter", "objects"], [(name, reason or "–") for name, reason in said.items()])
        if self.found.reached >= 3:
            turned = "This one was: from here on its responses stand exchanged, and so does its label."
            yield (
                "It is kept, with the label of the votes. Pairs are turned where that is needed for as many "
                f"labels A as B. {turned if self.found.turned else 'This one was not.'}"
            )
        yield row_block(self.row(self.name + "labels", name))

    def candidates(self, row: dict) -> tuple[list[Proof], str]:
        """The k proofs of the pair: from the file, or sampled again with the run's seed."""
        if row.get("candidates"):
            return [Proof.from_json(each) for each in row["candidates"]], "All of them stand in the file."
        if self.settings.k == 1:
            return [Proof.from_json(row["chosen"])] if row["chosen"] else [], "k is 1."
        model = prover.Prover.load(self.path("prover", "model"))
        (_, proofs), *_ = model.prove_many(
            [Pair.from_json(row["pair"])],
            self.settings.k,
            self.settings.seed,
            temperature=self.settings.proof_temperature,
            max_new_tokens=self.settings.proof_tokens,
            select_by=self.settings.select_by,
            progress=False,
        )
        chosen = selection.select(proofs)
        if (chosen and chosen.text) != (row["chosen"] and row["chosen"]["text"]):
            raise InputError(
                f"{self.run.root}: the proofs sampled again are others than the run's (other code, or "
                "another device); make the run with --keep-candidates"
            )
        return proofs, (
            "The file keeps the chosen one; the others are sampled again here, from the same seed, and "
            "the chosen one came out the same."
        )

    def proofs(self) -> Iterator[str]:
        row = self.row(self.name + "prove", "proofs.jsonl")
        functions = steps.Run.prove, prompts.prover_prompt, prover.Prover.prove_many
        functions += prover.Prover.second_terms, selection.with_score, selection.select
        yield self.section("5. Proofs, and equation 5", self.name + "prove", "proofs.jsonl", *functions)
        template, _ = prompts.template_for(self.path("prover", "model"), kind="prover")
        pair = Pair.from_json(row["pair"])
        yield "The prover is told the label and asked to prove it:"
        yield block(prompts.prover_prompt(pair, template))
        proofs, note = self.candidates(row)
        yield (
            f"It writes k = {self.settings.k} proofs. {note} Equation 5 scores each that is finished, "
            "well-formed and proves the label it was asked for: minus the log-probability of the proof "
            "given the pair and the label, over that of the same tokens given an empty prompt. Nearest "
            "to 0 is best."
        )
        order = sorted(proofs, key=lambda proof: (proof.score is None, -(proof.score or 0)))
        yield table(["proof", "given pair and label", "given nothing", "score", "tokens", ""], [
            (n, f"{each.logp_given:.4f}", "–" if each.logp_blank is None else f"{each.logp_blank:.4f}",
             "–" if each.score is None else f"{each.score:.6f}", len(each.ids),
             f"not eligible: {each.ineligible}" if each.ineligible else "chosen" * (n == 1))
            for n, each in enumerate(order, 1)
        ])  # fmt: skip
        texts: dict[str, list[str]] = {}
        for n, each in enumerate(order, 1):
            texts.setdefault(each.text, []).append(str(n))
        for text, numbers in texts.items():
            yield f"Proof {' and '.join(numbers)}:"
            yield block(text)
        if row["rationale"]:
            yield (
                "The chosen proof is turned back into a rationale by "
                f"{code(prompts.rationale_from_proof)} and {code(prover.as_rationale)}. In the stored "
                "form each mention of a response is a slot, ⟦A⟧ or ⟦B⟧, so that a swap can exchange the "
                "slots and nothing else:"
            )
            yield block(row["rationale"])

    def rules(self) -> Iterator[str]:
        row = self.row(self.name + "prove", "proofs.jsonl")
        functions = steps.Run.filter_rationales, denoise.objections
        yield self.section("6. Rules on the rationale", self.name + "rationales", "kept.jsonl", *functions)
        yield "Each rule reads the pair and the rationale, and may object:"
        rules = denoise.RATIONALE_FILTERS | self.world_rules
        pair = Pair.from_json(row["pair"])
        said = denoise.objections(rules, pair, row["rationale"], settings=self.filters)
        yield table(
            ["rule", "code", "objects"],
            [(name, code(rules[name]), reason or "–") for name, reason in said.items()],
        )
        yield "It is kept: this row is what the next model is trained on."
        yield row_block(self.row(self.name + "rationales", "kept.jsonl"))

    def example(self) -> Iterator[str]:
        """The pair as token ids, and the training steps that met it."""
        kept = [self.path(f"round-{n}-rationales", "kept.jsonl") for n in range(1, self.found.round + 1)]
        human = [self.path("data", "human.jsonl")] if self.settings.mix_human else []
        data = [*human, self.path("filter-labelled", "kept.jsonl"), *kept]
        step = self.name + "train"
        model = self.path(step, "model")
        builder = ExampleBuilder("reward", self.training, data, model)
        plan = make_plan(builder, self.training, parallel.Ranks(0, 1, "cpu"))
        number = next(i for i in range(builder.size) if builder.record(i).id == self.found.id)
        met = [(n, *each[1:]) for n in range(plan.steps) for each in plan.step(n) if each[0] == number]
        functions = fit.train, make_plan, ExampleBuilder.__call__, Tokenizer.example
        yield self.section("7. A training example", step, "metrics.jsonl", *functions)
        names = ", ".join(f"`{path.relative_to(self.run.root).as_posix()}`" for path in data)
        yield (
            f"The next model is trained from the backbone on all synthesized data so far: {names}: "
            f"{builder.size} rows. This pair is met {len(met)} times in {plan.steps} steps of "
            f"{plan.batch_size} examples, with A as the better response in one epoch and B in the next. "
            "An example is the prompt in its chat frame, then the rationale and the verdict, then the "
            "token that ends the turn; only what follows the prompt is a target."
        )
        if not met:
            return
        first, epoch, letter = met[0]
        (example,) = builder(number, epoch, letter).sequences
        tokenizer = builder.tokenizer
        yield f"Step {first + 1}, with {letter} as the better one. {example.start} tokens that are given:"
        yield block(tokenizer.decode(example.ids[: example.start], skip_special=False))
        yield block(some_ids(example.ids[: example.start]))
        yield f"{len(example.ids) - example.start} tokens that are learned:"
        yield block(tokenizer.decode(example.ids[example.start :], skip_special=False))
        yield block(some_ids(example.ids[example.start :]))
        wanted = {met[0][0] + 1, met[-1][0] + 1}
        chosen = [row for row in self.run.rows(step, "metrics.jsonl") if row["step"] in wanted]
        yield "What the first and the last of these steps wrote down, for all of their examples together:"
        yield block("\n".join(json.dumps(row) for row in chosen), "json")

    def next_model(self) -> Iterator[str]:
        step = self.name + "train"
        yield self.section("8. The next model", step, "model/", fit.train, fit.publish_model)
        files = sorted(path.name for path in self.path(step, "model").iterdir())
        yield f"{', '.join(f'`{name}`' for name in files)}."
        before = "initial" if self.found.round == 1 else f"round {self.found.round - 1}"
        names = (before, f"round {self.found.round}")
        rows = [row for row in self.run.results.get("rows", ()) if row["name"] in names]
        yield "On the held-out pairs, before and after this round, in per cent:"
        yield table(
            ["model", "accuracy", "95% interval", "pairs"],
            [(row["name"], row["accuracy"], f"{row['low']} – {row['high']}", row["n"]) for row in rows],
        )
        if f"round-{self.found.round + 1}-predict" in self.run.steps:
            file = self.file(f"round-{self.found.round + 1}-predict", "judged.jsonl")
            yield f"It labels the pairs of the next round ({file}), and the walk begins again."


# ---------------------------------------------------------------------------------- the command


def choose(run: RunReader, wanted: str | None) -> JudgedPair:
    """The pair that was asked for; or a kept one, rightly labelled, on which the votes differ,
    if there is one.
    """
    truth = {row["id"]: row["label"] for row in run.rows("data", "truth.jsonl")}
    best = None
    for number in run.rounds:
        found = {pair.id: pair for pair in read_round(run, number, truth)}
        for row in run.rows(f"round-{number}-predict", "judged.jsonl"):
            pair = found[row["id"]]
            if wanted == pair.id:
                return pair
            split = sum(1 for count in row.get("votes", {}).values() if count) > 1
            rank = (pair.reached, pair.right is not False, split, pair.turned)
            if best is None or rank > best[0]:
                best = rank, pair
    if wanted or best is None:
        raise InputError(
            f"{run.root}: no judged pair {wanted}" if wanted else f"{run.root}: no round was judged"
        )
    return best[1]


def write(root: Path, wanted: str | None, out: Path) -> None:
    run = RunReader(root)
    walk = Walk(run, choose(run, wanted))
    command = f"python benchmarks/walkthrough.py runs/{root.resolve().name}" + (
        f" --pair {wanted}" if wanted else ""
    )
    opening = [
        "# One pair, from a question to the next model",
        f"This page is made by `{command}` from a real run, and not written by hand. It follows the pair "
        f"`{walk.found.id}` through every file of round {walk.found.round}. Files are below the run's "
        f"directory, `runs/{root.resolve().name}/`; each section names the code that wrote them. The "
        f"run's settings: seed {walk.settings.seed}, {walk.settings.votes} votes, k = {walk.settings.k} "
        f"proofs, {walk.settings.confidence[0]:.0%} of the votes for a label (`plan.json`).",
    ]
    with publish_file(out) as temporary:
        text = "\n\n".join([*opening, *walk.sections()]) + "\n"
        temporary.write_bytes(text.encode("utf-8", "replace"))
    print(f"walk-through of {walk.found.id}: {out}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the directory of a finished run")
    parser.add_argument("--pair", metavar="ID", help="the pair's id")
    parser.add_argument("--out", type=Path, default=PAGE, help="[docs/walkthrough.md]")
    arguments = parser.parse_args(argv)
    write(arguments.run, arguments.pair, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
