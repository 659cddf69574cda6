"""UKPConvArg1: what the five workers said is what the files say, and nothing tells what is held out."""

import io
import json
import os
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import escape

import pytest

from gramr2.extras import datasets
from gramr2.extras.convincing_arguments import FULL, STRICT
from gramr2.extras.inputs import split_pairs
from gramr2.extras.results import RunReader
from gramr2.files import InputError
from gramr2.prompts import parse_rationale
from gramr2.records import Pair, show
from gramr2.seals import write_signed
from gramr2.settings import SelfTrainSettings, Sources

DATA = Path(os.environ.get("GRAMR2_TEST_DATA") or Path(__file__).parents[2] / "shared/data")
ARCHIVE = DATA / "convincing-arguments/UKPConvArg1.tar.gz"
NAMES = ("human", "labelled", "unlabelled", "test")
DEBATES = (
    "evolution-vs-creation",
    "gay-marriage",
    "is-porn-wrong-",
    "pro-choice",
    "tv-or-books",
    "william-farquhar",
)
SAID = (
    "A1 is {}. ",
    "argument two is vague & a1 is {}",
    "arg. 2 rambles",
    "both are clear",
    "the first one is {}",
)


def side(debate: str, side: str) -> str:
    """Every two of five arguments: four or five workers choose the earlier one; of the first two, none."""
    dots = (6, 2, 9, 4, 1)
    texts = [f"argument {n} on {debate} {side}" + "." * count for n, count in enumerate(dots)]
    xml = "<?xml version='1.0'?>\n<list>"
    for one in range(5):
        for two in range(one + 1, 5):
            chosen = "equal" if two == 1 else "a1"
            workers = [(chosen if n else "a2", words.format("<good>")) for n, words in enumerate(SAID)]
            workers[0] = (chosen, workers[0][1]) if one == 0 else workers[0]
            xml += f"<annotatedArgumentPair><id>{one}_{two}</id>"
            for place, text in (("arg1", texts[one]), ("arg2", texts[two])):
                xml += f"<{place}><stance>{side}</stance><text>{escape(text)}</text></{place}>"
            xml += f"<debateMetaData><title>On {debate}?</title></debateMetaData><mTurkAssignments>"
            for value, reason in workers:
                vote = f"<value>{value}</value><reason>{escape(reason)}</reason>"
                xml += f"<mTurkAssignment>{vote}</mTurkAssignment>"
            gold = "" if (one, two) == (3, 4) else "<goldLabel>a1</goldLabel>"
            xml += f"</mTurkAssignments>{gold}</annotatedArgumentPair>"
    return xml + "</list>"


def files() -> dict[str, str]:
    found = {
        f"data/{FULL}/{debate}_{each}.xml": side(debate, each) for debate in DEBATES for each in ("yes", "no")
    }
    found[f"data/{STRICT}/x.csv"] = "#id\tlabel\ta1\ta2\n0_2\ta2\tone\ttwo\n"
    return found | {"data/readme.txt": "no part of it", f"data/{FULL}/._x_y.xml": "a Mac's"}


def archive(path: Path, content: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in content.items():
            info = tarfile.TarInfo(name)
            written = text if isinstance(text, bytes) else text.encode()
            info.size = len(written)
            tar.addfile(info, io.BytesIO(written))
    return path


def convert(source: Path, target: Path, *options: str) -> dict[str, list[Pair]]:
    datasets.main(["convincing-arguments", str(source), str(target), *options])
    return {name: [Pair.from_json(row) for row in rows(target / f"{name}.jsonl")] for name in NAMES}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return archive(tmp_path_factory.mktemp("ukp") / "UKPConvArg1.tar.gz", files())


def test_labels_are_what_the_workers_chose_and_debates_are_never_shared(source, tmp_path, capsys):
    """A debate in two files would let a model know the test's arguments from training."""
    made = convert(source, tmp_path / "out")
    debates = {name: {pair.meta["debate"] for pair in pairs} for name, pairs in made.items()}
    assert debates["test"] == {"evolution-vs-creation", "william-farquhar"} and set.union(
        *debates.values()
    ) == {each.strip("-") for each in DEBATES}
    assert sum(map(len, debates.values())) == len(DEBATES)
    for name in ("human", "labelled", "test"):
        for pair in made[name]:
            better, other = pair.response_a, pair.response_b
            better, other = (better, other) if pair.label == "A" else (other, better)
            assert pair.margin == pair.meta["votes"]["for"] - pair.meta["votes"]["against"]
            assert pair.domain == ("longer won" if len(better) > len(other) else "shorter won")
            assert int(better.split()[1]) < int(other.split()[1])  # "a1" is the earlier one
        places = Counter(pair.label for pair in made[name])
        assert abs(places["A"] - places["B"]) <= 1
    said = capsys.readouterr().out
    assert "tie 12;" in said and "own 12" in said and "read        120 " in said
    assert "CC-BY 4.0" in (tmp_path / "out/README.md").read_text()


def test_rationales_are_the_reasons_of_those_who_chose_the_label(source, tmp_path, capsys):
    """One name left behind, or a reason of the other side, would teach the prover to argue for the loser."""
    for pair in convert(source, tmp_path / "out")["human"]:
        best, other = pair.label, "B" if pair.label == "A" else "A"
        z = parse_rationale(show(pair.rationale)).rationale
        told = [f"Response {best} is <good>."] * (pair.meta["votes"]["for"] == 5) + [
            f"Response {other} rambles."
        ]
        assert sorted(z.feedback.splitlines()) == sorted(told)
        assert z.comparison == f"Response {other} is vague & Response {best} is <good>."
        assert z.conclusion == f"Response {best} is more convincing than Response {other}."
        assert pair.swappable
    assert "a name that is not certain" in capsys.readouterr().out  # "the first one"


def test_unlabelled_rows_do_not_tell_what_the_truth_beside_them_tells(source, tmp_path):
    """Domain, margin and votes of an unlabelled pair give its label away as much as the label does."""
    made = convert(source, tmp_path / "out", "--more", "3")["unlabelled"]
    assert {pair.meta["stance"] for pair in made} == {"yes", "no"}
    for row in rows(tmp_path / "out/unlabelled.jsonl"):
        assert not {"label", "domain", "margin", "rationale"} & row.keys() and "votes" not in row["meta"]
    truth = {row["id"]: row["label"] for row in rows(tmp_path / "out/truth.jsonl")}
    assert [pair.id for pair in made] == list(truth) and Counter(truth.values())[None] == 3
    for pair in made:
        first = int(pair.response_a.split()[1]) < int(pair.response_b.split()[1])
        assert truth[pair.id] in (None, "A" if first else "B")


def test_a_run_keeps_the_truth_for_its_report_alone(source, tmp_path):
    """The report says how many pseudo-labels were right; a batch that knew it would be worth nothing."""
    convert(source, tmp_path / "out")
    step = tmp_path / "run/steps/01-data"
    step.mkdir(parents=True)
    sources = Sources("", **{name: (str(tmp_path / f"out/{name}.jsonl"),) for name in NAMES})
    split_pairs(step, SelfTrainSettings(iters=1), sources, SimpleNamespace(unknown_id=None))
    write_signed(tmp_path / "run/plan.json", {"settings": {"iters": 1}})
    (step / "done.json").write_text("{}")
    truth = {row["id"]: row["label"] for row in rows(tmp_path / "out/truth.jsonl")}
    assert RunReader(tmp_path / "run").truth() == truth and set(truth.values()) == {"A", "B"}
    assert {row["id"] for row in rows(step / "unlabelled-1.jsonl")} == set(truth)
    # Two files that number their rows alike: each has the truth that lies beside it.
    pools = []
    for name, label in ("one", "A"), ("two", "B"):
        pools.append(tmp_path / name / "pairs.jsonl")
        pools[-1].parent.mkdir()
        pools[-1].write_text(json.dumps({"id": 0, "question": "q", "response_a": name, "response_b": "b"}))
        pools[-1].with_name("truth.jsonl").write_text(json.dumps({"id": 0, "label": label}))
    both = replace(sources, unlabelled=tuple(map(str, pools)))
    split_pairs(step, SelfTrainSettings(iters=1), both, SimpleNamespace(unknown_id=None))
    told = RunReader(tmp_path / "run").truth()
    found = {row["response_a"]: told[row["id"]] for row in rows(step / "unlabelled.jsonl")}
    assert found == {"one": "A", "two": "B"}
    (tmp_path / "out/truth.jsonl").write_text('{"id": "x", "label": "yes"}\n')
    with pytest.raises(InputError, match=r'truth.jsonl: row 1: field "label"'):
        split_pairs(step, SelfTrainSettings(iters=1), sources, SimpleNamespace(unknown_id=None))


def test_the_seed_decides_all_and_the_archive_may_be_unpacked(source, tmp_path):
    def content(place: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(place.glob("*.jsonl"))}

    with tarfile.open(source) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    for target, given, seed in (("a", source, "1"), ("b", tmp_path / "unpacked", "1"), ("c", source, "2")):
        convert(given, tmp_path / target, "--seed", seed)
    assert content(tmp_path / "a") == content(tmp_path / "b") != content(tmp_path / "c")
    convert(source, tmp_path / "c", "--seed", "1")  # over an earlier conversion
    assert content(tmp_path / "a") == content(tmp_path / "c")


def test_strict_takes_the_corpus_own_labels(source, tmp_path):
    made = convert(source, tmp_path / "out", "--strict", "--test", "tv")
    pairs = [pair for name in ("labelled", "test") for pair in made[name]]
    assert pairs and {pair.meta["pair"] for pair in pairs} == {"0_2"} and made["test"][0].margin == -5
    assert all("argument 2 " in (pair.response_a if pair.label == "A" else pair.response_b) for pair in pairs)


BOMB = '<?xml version="1.0"?><!DOCTYPE list [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><list>&b;</list>'
XML = f"data/{FULL}/a_b.xml"


@pytest.mark.parametrize(
    "content, named",
    [({XML: BOMB}, "a_b.xml: declares a document type"), ({XML: BOMB.encode("utf-16")}, "a_b.xml: declares"),
     ({XML: "<list><annotated"}, "a_b.xml"),
     ({XML: side("d", "s").replace("<value>a1", "<value>a3")}, 'a_b.xml: a vote is "a3"'),
     ({XML: side("d", "s").replace("<title>On d?</title>", "")}, "pair 1 has no text in .debateMetaData"),
     ({"x.xml": "<list/>"}, "holds no UKPConvArg1-full-XML"),
     ({XML: side("d", "s")}, "no debate begins with evolution")],
    ids=("entities", "entities in other bytes", "cut", "vote", "field", "empty", "debate"),
)  # fmt: skip
def test_what_is_not_the_corpus_is_one_line(content, named, tmp_path):
    with pytest.raises(InputError, match=named):
        convert(archive(tmp_path / "x.tar.gz", content), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_archive_and_a_directory_of_somebody_elses(source, tmp_path):
    (tmp_path / "cut.tar.gz").write_bytes(source.read_bytes()[:-200])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    for given, target in (
        (tmp_path / "cut.tar.gz", "out"),
        (source, "mine"),
        (tmp_path / "no.tar.gz", "out"),
    ):
        with pytest.raises(InputError, match=r"fetch it again|holds something else|No such file"):
            convert(given, tmp_path / target)
    assert (tmp_path / "mine/thesis.txt").exists() and not (tmp_path / "out").exists()


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is not there")
def test_the_published_archive(tmp_path, capsys):
    """The corpus' own counts; all pairs that are read are used or accounted for."""
    began = time.perf_counter()
    made = convert(ARCHIVE, tmp_path / "out")
    assert time.perf_counter() - began < 60
    said = capsys.readouterr().out
    assert "read        16,927 compared pairs of 16 debates" in said  # 16,081 have a label
    assert "without a label of the corpus' own 846" in " ".join(said.split())
    assert {name: len(pairs) for name, pairs in made.items()} == {
        "human": 1350, "labelled": 2032, "unlabelled": 2515, "test": 927
    }  # fmt: skip
    assert {pair.meta["debate"].split("-")[0] for pair in made["test"]} == {"evolution", "william"}
    assert all(pair.rationale and pair.swappable for pair in made["human"])
