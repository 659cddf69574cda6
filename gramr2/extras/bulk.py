"""Many items and one judge: a file of judged rows that grows, and goes on where it was cut.

`Judge` is the reward model that somebody named, with the settings that go into every row; what cannot be
judged is a row with the reason. `judge_into` appends rows: what was judged before, by the same
weights under the same prompt, stays; what failed is tried again, and a row that stands twice in what goes in
is judged twice. A file of other rows is refused as it stands, and so is a second process.

Rows also tell which code judged and on what (`code`, `device`), and, where the chat template prints the day,
which (`date`): it is part of the prompt. Newer code, or another device, may go on with a file, each row under
its own name; the day stays the file's, so that what is cut at midnight ends as if it had not been.

It leaves out: what the rows are worth (evaluate.py), and the command line (infer.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from gramr2.data import Store
from gramr2.extras.evaluate import TOLD
from gramr2.extras.printing import unread_lines
from gramr2.extras.row_log import RowLog, read_log
from gramr2.fields import Fields
from gramr2.files import InputError, JsonRow, disk_errors_as_input_errors, need, visible, write_rows
from gramr2.installed import PROJECT
from gramr2.rankings import Ranking
from gramr2.records import Judgment, Pair, nothing_read
from gramr2.run_directory import Step, code_version, finished_runs, model_of, write_shard
from gramr2.settings import TrainSettings

if TYPE_CHECKING:
    from gramr2.parallel import Ranks

ROW = b'{"id": '  # what a judged row begins with
SMALL, SHORT_ANSWER, LONG_ANSWER = 10**9, 1024, 4096  # a model of fewer parameters; most tokens of an answer
NEUTRAL = (("top_p", 1.0), ("top_k", 0))  # go without saying
Item = Pair | JsonRow  # of bulk work: a pair, or one of a benchmark's lists
Source = Store | list[Item]


@dataclass(frozen=True)
class JudgeSettings:
    """What the command line says of the judge. No model: the newest run's. `drawn`: how answers are to be
    drawn (settings.SAMPLING), where it says so."""

    model: Path | str | None  # a text: the URL of one that is elsewhere (remote.py)
    prompt: Path | None
    format: str | None
    device: str
    dtype: str
    votes: int
    seed: int
    greedy: bool  # where nothing else is said
    drawn: JsonRow
    in_flight: int = 16  # requests to an endpoint at one time
    date: str | None = None  # that a chat template prints as today's; None: today's


def model_place(text: str) -> Path | str:
    """What --model names: a directory, or an address."""
    return text if "://" in text else Path(text)


def newest_model() -> Path:
    """The model of the run that finished last, under runs/ here."""
    for run in finished_runs():
        print(f"model: {model_of(run)}", file=sys.stderr)
        return model_of(run)
    raise InputError("no finished run under runs/; give --model DIR, or make one: python selftrain.py")


class Judge:
    """The model that the settings name, and what its rows say that they were judged with."""

    def __init__(self, settings: JudgeSettings):
        place = settings.model or newest_model()
        from gramr2.extras.formats import format_named  # brings torch, which takes seconds

        format = None if settings.format is None else format_named(settings.format)
        self.model = self.load(place, settings, format)
        self.endpoint = getattr(self.model, "endpoint", None)
        drawn = self.how_to_draw(settings, None if self.endpoint else Path(place))
        self.sampling: JsonRow = {"votes": settings.votes, "seed": settings.seed, **drawn}
        how = (drawn[name] for name in ("temperature", "top_p", "top_k"))
        calibrated = self.model.calibrates(settings.votes, *how)
        stated = {name: value for name, value in self.sampling.items() if (name, value) not in NEUTRAL}
        self.judged_with = {"model": str(place), "format": self.model.format.name, **stated}
        self.judged_with |= {"prompt": self.model.prompt_hash}
        self.judged_with["calibrated"] = calibrated and self.model.calibration_hash
        self.judged_with["code"] = code_name()
        if not self.endpoint:
            weight = self.model.model.head_weight
            self.judged_with["device"] = f"{weight.device.type} {str(weight.dtype).removeprefix('torch.')}"
            if settings.date and self.prints_date:
                self.judged_with["date"] = settings.date
        if self.model.calibration and not calibrated:
            fitted = "{votes} votes, greedy: {greedy}, drawn: {drawn}".format_map(self.model.calibration)
            print(f"warning: not calibrated: the calibration is for {fitted}, of its judge", file=sys.stderr)

    def load(self, place: Path | str, settings: JudgeSettings, format: Any) -> Any:
        """The model that is here, or the one that is elsewhere."""
        import torch

        from gramr2.extras.remote import EndpointModel
        from gramr2.judge import RewardModel

        if isinstance(place, str):
            said = settings.device, settings.dtype
            need(said == ("auto", "auto"), "--device and --dtype are for a model here, not for one at a URL")
            return EndpointModel(place, settings.prompt, format, settings.in_flight)
        cuda = settings.device != "cpu" and torch.cuda.is_available()
        if settings.device == "cuda" and not cuda:
            raise InputError("--device cuda: there is no CUDA device here")
        device, dtype = ("cuda", "bfloat16") if cuda else ("cpu", "float32")
        dtype = dtype if settings.dtype == "auto" else settings.dtype
        model = RewardModel.load(place, device, dtype, settings.prompt, format, settings.date)
        model.keep_engine()
        return model

    def how_to_draw(self, settings: JudgeSettings, directory: Path | None) -> JsonRow:
        """As the command line says, or else the checkpoint, or else we; and says so, with the most that it
        costs."""
        writes, most = self.model.format.parse is not None, 10**7
        is_small = foreign = False  # of a model elsewhere nothing is known
        if directory:
            is_small = sum(each.numel() for each in self.model.model.parameters()) < SMALL
            # A judge that was trained here was measured as is usual here; its file may still be its base's.
            foreign = writes and not (directory / "training.json").is_file()
            most = self.model.model.config.max_positions
        usual: JsonRow = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        usual["max_new_tokens"] = SHORT_ANSWER if writes and is_small else LONG_ANSWER
        own = self.model.tokenizer.sampling if foreign else {}
        if settings.greedy:
            usual["temperature"] = 0.0
            own = {name: value for name, value in own.items() if name != "temperature"}
        is_greedy = not (usual | own | settings.drawn)["temperature"]
        asked = ("max_new_tokens",) if is_greedy else tuple(usual)
        own = {name: own[name] for name in asked if name in own and name not in settings.drawn}
        drawn = usual | own | settings.drawn
        if writes:
            how = "temperature {temperature:g}, top-p {top_p:g}, top-k {top_k}".format_map(drawn)
            how = how if drawn["temperature"] else "greedy"
            how += f" ({', '.join(own)}: the checkpoint's generation_config.json)" if own else ""
            most = min(drawn["max_new_tokens"], most)
            cost = f"{settings.votes} x {most:,} tokens at most, less where the prompt leaves less room"
            print(f"votes: each pair takes {cost}; {how}", file=sys.stderr)
        return drawn

    @property
    def prints_date(self) -> bool:
        """Whether the day is part of what the model here is asked."""
        return any(b"strftime_now" in file for file in self.model.tokenizer.files.values())

    def sign_rows(self) -> None:
        """Rows say from now on which weights they are of: a file of them may meet others under one name."""
        from gramr2.weights import fingerprint

        if self.endpoint:  # which of its weights an endpoint serves, nothing tells
            return
        self.judged_with["weights"] = self.model.weights or fingerprint(self.judged_with["model"])

    def rows(self, items: Sequence[Item], progress: bool = True) -> Iterator[JsonRow]:
        """The row of each pair, or of each of a benchmark's lists: a failure is a row with the reason."""
        pairs = [item for item in items if isinstance(item, Pair)]
        for pair, judgment in self.model.judge_many(pairs, **self.sampling, progress=progress):
            yield {"id": pair.id, "pair": pair.to_json()} | self.outcome(judgment)
        lists = [item for item in items if not isinstance(item, Pair)]
        contests = [(item["question"], item["responses"]) for item in lists]
        rankings = self.model.contests(contests, "linear", False, **self.sampling, progress=progress)
        for item, ranking in zip(lists, rankings, strict=True):
            yield {"id": item["id"], "scores": item["scores"]} | self.outcome(ranking)

    def outcome(self, found: Judgment | Ranking | InputError) -> JsonRow:
        if isinstance(found, InputError):
            return {"error": str(found), "judge": self.judged_with}
        return found.to_json() | {"judge": self.judged_with}


def judge_into(
    out: Path, settings: JudgeSettings, source: Source, path: Path, limit: int | None = None,
    made_of: Callable[[Path, Any, list[Any]], list[Any]] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Appends rows. What succeeded before stays, what failed is tried again.

    `path` is where `source` was read from; `limit`: only so many of its first rows; `made_of`: what is to be
    judged is made of them, once the model is there (audit.py). Nothing judged is an error, and not an empty
    result. Under torchrun the first rank is told what it comes to, the others {}.
    """
    need(len(source) > 0, f"{path}: holds no row")
    size = min(len(source), limit or len(source))
    need(not (out.exists() and out.samefile(path)), f"{out}: is what is to be judged; give another --out")
    import torch

    from gramr2.parallel import join_ranks

    joining = TrainSettings(device=settings.device, threads=torch.get_num_threads())
    with join_ranks(joining) as ranks, ranks.only_writer(out, is_directory=False):
        # Before the model, which takes its time. One rank's day is everyone's.
        settings = replace(settings, date=ranks.on_rank_0(lambda: day_of(out) or date.today().isoformat()))
        with ranks.errors_on_all_ranks(), redirect_stderr(sys.stderr if ranks.is_first else io.StringIO()):
            judge = Judge(settings)
            judge.sign_rows()
            if made_of:
                source = made_of(path, judge.model, [source[place] for place in range(size)])
                size = len(source)
        need(not (judge.endpoint and ranks.size > 1), "--model URL: one process asks it, without torchrun")
        done = ranks.on_rank_0(lambda: keep_finished(out, judge.judged_with))
        work = Work(out, judge, source, size, done)
        if ranks.size > 1 or any(out.parent.glob(f".{out.name}.shards-*")):
            work.in_shards(ranks)
        else:
            work.one_by_one()
        ranks.on_rank_0(lambda: work.conclude(f"{path}: none of {size} rows could be judged"))
        return work.counts if ranks.is_first else {}


class Work:
    """Rows that are to be judged into a file, and what they come to."""

    def __init__(self, out: Path, judge: Judge, source: Source, size: int, done: Counter[bytes]):
        self.out, self.judge, self.source, self.size = out, judge, source, size
        self.counts = {"judged": 0, "before": done.total(), "failed": 0, "unread": 0, "forged": 0}
        self.unread: list[JsonRow] = []  # the votes of one pair of which none could be read
        self.unreadable: list[JsonRow] = []  # rows that are no pairs; known when `waiting` is through
        self.waiting = pending(source, size, done, self.unreadable)

    def rows(self, places: Sequence[int], progress: bool) -> Iterator[JsonRow]:
        yield from self.judge.rows([self.source[place] for place in places], progress)

    def counted(self, rows: Iterable[JsonRow]) -> Iterator[JsonRow]:
        for row in rows:
            self.counts["failed" if "error" in row else "judged"] += 1
            if "votes" in row and nothing_read(row["votes"]):
                self.counts["unread"] += 1
                self.unread = self.unread or row["details"]
            self.counts["forged"] += bool(row.get("forged"))
            yield row

    def failed(self) -> Iterator[JsonRow]:
        return (row | {"judge": self.judge.judged_with} for row in self.unreadable)

    def one_by_one(self) -> None:
        """In one process: a row is in the file as soon as it is judged."""
        with RowLog(self.out, ROW) as log, tqdm(total=self.size, unit="pair") as bar:
            bar.update(self.counts["before"])
            while places := list(islice(self.waiting, self.judge.model.per_call)):
                # A bar below a bar moves the cursor, which is for terminals alone.
                for row in self.counted(self.rows(places, sys.stderr.isatty())):
                    log.write(row)
                    bar.set_postfix_str(self.judge.endpoint.cost if self.judge.endpoint else "", False)
                    bar.update()
                log.sync()
            for row in self.counted(self.failed()):
                log.write(row)

    def in_shards(self, ranks: Ranks) -> None:
        """In several: each takes shards as it becomes free, and the first puts the rows into the file, in
        their order and all at once. Shards of a call that was cut serve the next one with the same rows."""
        waiting = list(self.waiting)
        same = {k: v for k, v in self.judge.judged_with.items() if k not in ("code", "device")}
        asked = [same, [key_of(self.source[place]).hex() for place in waiting]]
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        shards = f".{self.out.name}.shards-"
        step = Step(self.out.with_name(shards + name), ranks, None, 0.0)

        def begin() -> None:
            for other in {*self.out.parent.glob(f"{shards}*")} - {step.path}:
                shutil.rmtree(other)
            step.path.mkdir(parents=True, exist_ok=True)
            for left in (*step.path.glob("shards/*.claim"), *step.path.glob("shards/.*.tmp-*")):
                left.unlink()

        def publish() -> None:
            fresh = self.counted(chain(step.rows(), self.failed()))
            write_rows(self.out, chain(judged_rows(self.out), fresh))
            shutil.rmtree(step.path)

        with disk_errors_as_input_errors(step.path):
            ranks.on_rank_0(begin)
            with ranks.errors_on_all_ranks():
                for shard, places in step.shards(waiting):
                    write_shard(shard, self.rows(places, False))
            ranks.on_rank_0(publish)

    def conclude(self, nothing: str) -> None:
        """Says what is to be said of all rows."""
        if self.judge.endpoint:
            print(f"asked: {self.judge.endpoint.cost}", file=sys.stderr)
        if self.counts["unread"] == self.counts["judged"] > 0:
            print("warning: no answer could be read; the first pair's:", file=sys.stderr)
            lines = unread_lines(self.unread, self.judge.model.format.name)
            print(*map(visible, lines), sep="\n", file=sys.stderr)
        if not self.counts["judged"] + self.counts["before"]:
            reason = next(row["error"] for row in judged_rows(self.out) if "error" in row)
            raise InputError(f"{nothing}; the first: {reason}")


def judged_rows(path: Path) -> Iterator[JsonRow]:
    """The rows of a judged file, or none where there is no file yet; a file of other rows is refused."""
    for number, row in enumerate(read_log(path, ROW) if path.exists() else (), 1):
        judge = row.get("judge") if isinstance(row, dict) else None
        if not (isinstance(judge, dict) and "id" in row and judge.keys() >= {"model", "format", "votes"}):
            raise InputError(f"{path}: row {number} is not a judged row; give another --out")
        yield row


def day_of(path: Path) -> str:
    """The day that the chat template printed in a judged file's rows; "" where they tell none."""
    found = ""
    for number, row in enumerate(judged_rows(path), 1):
        found = Fields(row["judge"], f"{path}: row {number}: judge: ").get("date", str, "") or found
    return found


def differences(was: JsonRow, now: JsonRow, but: Sequence[str] = TOLD) -> str:
    """What tells two judges apart, in words; "" where they are the same one."""
    names = [name for name in {**was, **now} if name not in but and was.get(name) != now.get(name)]
    return "; ".join(f"{name} {was.get(name)}, now {now.get(name)}" for name in names)


@cache
def code_name() -> str:
    """The code that judges: its version, a hash of its sources, and, in a clone, the commit below them."""
    version = next((each.version for each in metadata.distributions(name="gramr2")), "not installed")
    said, git = f"{version}, sources {code_version()}", PROJECT.parent / ".git"
    if git.exists() and shutil.which("git"):
        words = ["git", f"--git-dir={git}", "rev-parse", "--short=12", "HEAD"]
        found = subprocess.run(words, capture_output=True, text=True)
        said += f", commit {found.stdout.strip()}" if found.returncode == 0 else ""
    return said


def keep_finished(path: Path, judged_with: JsonRow) -> Counter[bytes]:
    """How often an earlier call has judged each key; its failures are taken out, to be tried again."""
    done: Counter[bytes] = Counter()
    failed = False
    for number, row in enumerate(judged_rows(path), 1):
        if "error" in row:
            failed = True
            continue
        was = row["judge"]
        if other := differences(was, judged_with):
            raise InputError(f"{path}: row {number} was judged with {other}; give another --out")
        if "pair" in row:
            Judgment.from_row(row)
        done[key_of(Pair.from_json(row["pair"]) if "pair" in row else row)] += 1
    if failed:
        write_rows(path, (row for row in judged_rows(path) if "error" not in row))
    return done


def pending(source: Source, size: int, done: Counter[bytes], unreadable: list[JsonRow]) -> Iterator[int]:
    """The places of what of the first `size` is still to be judged, as often as it stands there; `unreadable`
    is given what is no pair."""
    met: Counter[bytes] = Counter()
    for place in range(size):
        try:
            key = key_of(source[place])
        except InputError as error:
            unreadable.append({"id": f"row {place + 1}", "error": str(error)})
            continue
        met[key] += 1
        if met[key] > done[key]:
            yield place


def key_of(item: Item) -> bytes:
    """What makes an item the same in another call: a pair's whole row; a list's id."""
    content = item.to_json() if isinstance(item, Pair) else item["id"]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()
