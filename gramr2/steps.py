"""The steps of the paper's loop, each from files to files: train, prove, judge, and the two filters.

Paths go in, the path of what was written comes out. Every step reads from top to bottom: open it, do the
shards that fall to this rank, let the first rank make files of what all of them left, close it with counts
(run_directory.py says how ranks share a step, and what a kill leaves of it). The same seed gives the same
rows on any number of ranks.

It leaves out: the order of the steps (selftrain.py), what only measures (extras/results.py), and everything
about the truth: no step here is given a label that the run did not start with or make itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gramr2 import denoise, fit, parallel, prompts
from gramr2.data import Store
from gramr2.denoise import RationaleFilter
from gramr2.files import InputError, JsonRow, publish_rows, read_rows
from gramr2.judge import RewardModel
from gramr2.prover import Prover, as_rationale
from gramr2.records import Judgment, Pair
from gramr2.requests import Limits
from gramr2.run_directory import RunDirectory, Step, write_shard
from gramr2.selection import select
from gramr2.settings import FilterSettings, SelfTrainSettings, TrainSettings

SHOWN = 4  # pairs of each shard whose k proofs are all written down, for the report to show their ranking
Model = TypeVar("Model", Prover, RewardModel)


class NothingKept(InputError):
    """The loop cannot go on: nothing is left to train on. What was reached stands."""


@dataclasses.dataclass
class Run:
    """The steps of one run, over its directory.

    `trainings`: the settings of each stage. `rules`: the world's own rationale filters, by name.
    """

    directory: RunDirectory
    settings: SelfTrainSettings
    trainings: Mapping[str, TrainSettings]
    rules: dict[str, RationaleFilter]
    starts: dict[str, Path] = dataclasses.field(default_factory=dict)  # what each training began from

    def __post_init__(self) -> None:
        self.ranks = self.directory.ranks
        self.coherence_rules = denoise.COHERENCE | self.rules
        self.rationale_rules = denoise.RATIONALE_FILTERS | self.rules

    def load(self, kind: type[Model], directory: Path) -> Model:
        """A model to sample from, whole on this rank's device."""
        settings, device = self.trainings["reward"], self.ranks.device
        gc.collect()  # FSDP holds its modules in circles: one trained before may still be there
        with contextlib.redirect_stderr(sys.stderr if self.ranks.is_first else io.StringIO()):
            dtype = parallel.compute_dtype(settings, device)
            ours = prompts.own_template("prover" if kind is Prover else "judge", settings.prompt)
            model = kind.load(directory, device, dtype, date=settings.date, ours=ours)
        model.keep_engine(Limits(running=self.settings.running or None))
        return model

    # ------------------------------------------------------------------ training

    def train(self, name: str, stage: str, data: Sequence[Path], start: Path, times: float = 1) -> Path:
        """Trains from `start`, `times` times as long as the stage's settings say; → the model directory."""
        settings = self.trainings[stage]
        steps, epochs = round(settings.steps * times), settings.epochs * times
        settings = dataclasses.replace(settings, steps=steps, epochs=epochs)
        self.starts[name] = start
        with self.directory.step(name) as step:
            if step.to_do:
                step.close(fit.train(stage, settings, data, start, step.path))
        return step.path / "model"

    # ------------------------------------------------------------------ proving

    @property
    def proving(self) -> dict[str, Any]:
        """How proofs are sampled."""
        s = self.settings
        return dict(
            seed=s.seed, temperature=s.proof_temperature, max_new_tokens=s.proof_tokens,
            select_by=s.select_by, progress=False,
        )  # fmt: skip

    def prove(self, name: str, prover: Path, pairs: Path) -> Path:
        """k proofs for each labelled pair; the best by equation (5), or `select_by`, gives the rationale.

        Rows of pair, chosen, rationale, ineligible and, of a few pairs of each shard, all candidates.
        """
        with self.directory.step(name) as step:
            if step.to_do:
                model = None
                with self.ranks.errors_on_all_ranks():
                    for shard, asked in step.shards(Store(pairs, Pair.from_json)):
                        model = model or self.load(Prover, prover)
                        write_shard(shard, self._proofs(model, asked))
                step.close(self.ranks.on_rank_0(lambda: join_proofs(step)))
        return step.path / "proofs.jsonl"

    def _proofs(self, prover: Prover, pairs: Sequence[Pair]) -> Iterator[JsonRow]:
        for number, (pair, proofs) in enumerate(prover.prove_many(pairs, self.settings.k, **self.proving)):
            chosen = select(proofs)
            row: JsonRow = {"pair": pair.to_json(), "chosen": chosen and chosen.to_json()}
            row["rationale"] = chosen and as_rationale(chosen, prover.thinking_open)
            failed = (proof.ineligible for proof in proofs if proof.ineligible)
            row["ineligible"] = Counter(failed if proofs else ["too long to prove"])
            if self.settings.keep_candidates or number < SHOWN:
                row["candidates"] = [proof.to_json() for proof in proofs]
            yield row

    # ------------------------------------------------------------------ judging

    def judge(self, name: str, model: Path, pairs: Path, votes: int, limit: int = 0) -> Path:
        """Votes on each pair; a row has the pair with its judgment, or with an error."""
        with self.directory.step(name) as step:
            if step.to_do:
                judge, store = None, Store(pairs, Pair.from_json)
                with self.ranks.errors_on_all_ranks():
                    for shard, asked in step.shards(store[:limit] if limit else store):
                        judge = judge or self.load(RewardModel, model)
                        write_shard(shard, self._judgments(judge, asked, votes))
                step.close(self.ranks.on_rank_0(lambda: join_judgments(step)))
        return step.path / "judged.jsonl"

    def _judgments(self, judge: RewardModel, pairs: Sequence[Pair], votes: int) -> Iterator[JsonRow]:
        bare = [dataclasses.replace(pair, label=None, rationale=None) for pair in pairs]
        seed, longest = self.settings.seed, self.settings.judge_tokens
        judged = judge.judge_many(bare, votes, seed, max_new_tokens=longest, progress=False)
        for pair, (_, found) in zip(pairs, judged, strict=True):
            row = {"error": str(found)} if isinstance(found, InputError) else found.to_json()
            yield {"id": pair.id, **row, "pair": pair.to_json()}

    # ------------------------------------------------------------------ filtering

    def filter_labels(self, name: str, judged: Path, number: int) -> Path:
        """Pairs whose votes can be trusted, with the label that these give; every drop with its reason."""
        settings = self.settings.filters(number)
        return self._filter_step(name, judged, lambda row: self._decide_label(row, settings))

    def _decide_label(self, row: JsonRow, settings: FilterSettings) -> JsonRow:
        pair = Pair.from_json(row["pair"])
        if "error" in row:
            return decision(pair, {}, f"not judged: {row['error']}")
        judgment = denoise.without_incoherent_votes(
            pair, Judgment.from_row(row), self.coherence_rules, settings
        )
        objections = denoise.objections(denoise.LABEL_FILTERS, judgment, settings=settings)
        pair = dataclasses.replace(pair, label=judgment.label, rationale=None)
        # Without a label there is nothing to prove, whatever filters are switched off.
        other_reason = None if judgment.label else "no label: no side has more votes"
        return decision(pair, objections, other_reason, votes=judgment.votes, p_a=judgment.p_a)

    def filter_rationales(self, name: str, proofs: Path) -> Path:
        """Pairs whose chosen rationale passes every rule, ready to train on."""
        settings = self.settings.filters()
        return self._filter_step(name, proofs, lambda row: self._decide_rationale(row, settings))

    def _decide_rationale(self, row: JsonRow, settings: FilterSettings) -> JsonRow:
        pair, rationale = Pair.from_json(row["pair"]), row["rationale"]
        if not rationale:
            failed = ", ".join(f"{count} {reason}" for reason, count in row["ineligible"].items())
            return decision(pair, {}, f"no eligible proof: {failed}")
        objections = denoise.objections(self.rationale_rules, pair, rationale, settings=settings)
        pair = dataclasses.replace(pair, rationale=rationale)
        return decision(pair, objections, score=row["chosen"] and row["chosen"]["score"])

    def _filter_step(self, name: str, source: Path, decide: Callable[[JsonRow], JsonRow]) -> Path:
        """Decides on a file's rows in shards, and splits them: the kept are balanced, drops written down."""
        with self.directory.step(name) as step:
            if step.to_do:
                with self.ranks.errors_on_all_ranks():
                    for shard, rows in step.shards(Store(source)):
                        write_shard(shard, map(decide, rows))
                step.close(self.ranks.on_rank_0(lambda: split_kept_and_dropped(step)))
        counts = self.directory.counts[name]
        if not counts["kept"]:
            most, count = max(
                counts["dropped"].items(), key=lambda each: each[1], default=("nothing came in", 0)
            )
            dropped = (row["reason"] for row in read_rows(step.path / "dropped.jsonl"))
            reasons = Counter(reason for reason in dropped if reason.startswith(most))
            why = f"“{reasons.most_common(1)[0][0]}”" if reasons else most
            remedy = "loosen that filter, or switch it off (--without)"
            if "no readable vote" in why or "no label" in why:
                remedy = (
                    "train the judge longer ([train.reward] in the recipe), for it does not write verdicts "
                )
                remedy += "yet, or give its answers more room (--judge-tokens)"
            raise NothingKept(
                f"{name}: none of {counts['in']} pairs was kept; most were dropped by {most} ({count}), as "
                f"{why}; the model before is the last. In a new run, {remedy}"
            )
        return step.path / "kept.jsonl"


# ---------------------------------------------------------------------------------- what shards come to


def join_proofs(step: Step) -> JsonRow:
    """Makes proofs.jsonl of the shards; → counts."""
    counts, ineligible = Counter(pairs=0, proved=0), Counter[str]()
    with publish_rows(step.path / "proofs.jsonl") as write:
        for row in step.rows():
            write(row)
            counts.update(pairs=1, proved=bool(row["chosen"]))
            ineligible.update(row["ineligible"])
    if not counts["proved"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in ineligible.most_common())
        raise NothingKept(
            f"{step.path.name}: no eligible proof of {counts['pairs']} pairs ({reasons}); train it "
            "longer ([train.prover] in the recipe), or give it room (--proof-tokens), in a new run"
        )
    return {**counts, "ineligible": dict(ineligible)}


def join_judgments(step: Step) -> JsonRow:
    """Makes judged.jsonl of the shards; → counts."""
    labels, forged = Counter[str](), 0
    with publish_rows(step.path / "judged.jsonl") as write:
        for row in step.rows():
            write(row)
            labels[str(row.get("label", "failed"))] += 1
            forged += bool(row.get("forged"))
    return {"judged": labels.total(), "labels": dict(labels), "forged": forged}


def decision(
    pair: Pair, objections: dict[str, str | None], other_reason: str | None = None, **figures: Any
) -> JsonRow:
    """Whether a pair is kept: the first reason to drop it, or None; and which filters alone would drop it."""
    reason = next((f"{name}: {why}" for name, why in objections.items() if why), other_reason)
    alone = {name: int(why is not None) for name, why in objections.items()}
    return {"pair": pair.to_json(), "reason": reason, "alone": alone, "figures": figures}


def split_kept_and_dropped(step: Step) -> JsonRow:
    """Makes kept.jsonl and dropped.jsonl of the shards; → counts, and what each filter alone would drop."""
    counts, dropped, alone, lead = Counter({"in": 0, "kept": 0}), Counter[str](), Counter[str](), 0
    with publish_rows(step.path / "kept.jsonl") as keep, publish_rows(step.path / "dropped.jsonl") as drop:
        for row in step.rows():
            pair, reason = Pair.from_json(row["pair"]), row["reason"]
            counts.update({"in": 1, "kept": reason is None})
            alone.update(row["alone"])
            if reason is None:
                pair = denoise.balance(pair, lead)
                lead += 1 if pair.label == "A" else -1
                keep(pair.to_json())
            else:
                dropped[reason.partition(":")[0]] += 1
                drop({"id": pair.id, "reason": reason, "label": pair.label, **row["figures"]})
    return {**counts, "dropped": dict(dropped), "alone": dict(alone)}
