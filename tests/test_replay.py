"""infer.py --replay: a judged row's votes again, and what a row has to say for that."""

import json
from pathlib import Path

import pytest
from checkpoints import SHORT_PROMPT, make_checkpoint

from gramr2.commands import infer
from gramr2.extras import bulk
from gramr2.files import exit_status

DATED = '{{ strftime_now("%d %b %Y") }} {% for m in messages %}{{ m.content }}{% endfor %}'
FORMATS = {"think": ("--votes", 4), "label": (), "scalar": ()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A random judge whose prompt has a date in it, and a random scorer."""
    place = tmp_path_factory.mktemp("replay")
    made = {"dated": make_checkpoint(place / "dated", "llama2", max_positions=300)}
    made["scorer"] = make_checkpoint(place / "scorer", num_labels=1, tie_embeddings=False)
    (made["dated"] / "judge_prompt.txt").write_text(SHORT_PROMPT)
    (made["dated"] / "chat_template.jinja").write_text(DATED)
    return made


def run(capsys, *words) -> tuple[int, str, str]:
    status = exit_status(infer.main, [str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out, said.err.strip().splitlines()[-1] if said.err.strip() else ""


def rewrite(path: Path, change) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def judged(models, tmp_path, capsys, request):
    """Judges three pairs in one format: the file."""
    pair = {"question": "q?", "response_b": "No.", "label": "A"}
    pairs = [pair | {"id": f"p{n}", "response_a": f"{n}."} for n in range(3)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in pairs))

    def judge(format: str, *words) -> Path:
        model = models["scorer" if format == "scalar" else "dated"]
        how = ("--model", model, "--format", format, "--max-new-tokens", 8, *FORMATS[format])
        assert run(capsys, "--pairs", source, "--out", out, *how, *words)[0] == 0
        return out

    return judge


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_judged_is_drawn_again_and_what_was_changed_is_found(judged, format, capsys):
    """Level 1: from the row alone, whatever was judged beside it."""
    path = judged(format, "--seed", 7)
    words = ("--replay", path, "--item", "p1")
    status, out, _ = run(capsys, *words, "--json")
    found = json.loads(out)
    assert status == 0 and found["same"] and not found["note"]
    assert len(found["drawn"]) == {"think": 5, "label": 3, "scalar": 1}[format]

    def forge(row):
        if format == "scalar":
            row["scores"][0] += 0.01
        else:
            row["details"][1]["text"] += "!"

    rewrite(path, forge)
    status, out, _ = run(capsys, *words)
    assert status == 1 and "different, " in out
    if format != "scalar":
        assert run(capsys, *words, "--vote", 1)[0] == 0
        status, out, _ = run(capsys, *words, "--vote", 2)
        assert status == 1 and "texts part at character" in out and out.count("vote") == 1


def test_the_day_that_a_template_printed_is_drawn_again_years_later(judged, models, tmp_path, capsys):
    """The day is part of the prompt: drawn under another one, the votes are others."""
    path = judged("label")
    rewrite(path, lambda row: row["judge"].update(date="2019-03-05"))
    words = ("--replay", path, "--item", "p0")
    assert run(capsys, *words)[0] == 1
    today = bulk.date

    class Then(today):
        @classmethod
        def today(cls):
            return today(2019, 3, 5)

    path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "date", Then)
        judged("label")
    then = path.read_text()
    assert '"date": "2019-03-05"' in then and run(capsys, *words)[0] == 0
    # What goes on with a file keeps its day, and its own name for its code.
    path.write_text("".join(then.splitlines(True)[:1]).replace("sources ", "sources of old "))
    judged("label")
    assert path.read_text().splitlines()[1:] == then.splitlines()[1:]
    assert len(json.loads(run(capsys, "--score", "pairs", path, "--json")[1])["judges"]) == 1
    assert "note: it was judged with code" in run(capsys, *words)[1]
    rewrite(path, lambda row: row["judge"].pop("date"))
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "") and "the day" in err
    judged("label")  # rows of an earlier version are whole, and no other judge's


REFUSED = {
    "another model": (lambda row: row["judge"].update(weights="0" * 16), "weights 0000"),
    "another prompt": (lambda row: row["judge"].update(prompt="0" * 16), "prompt 0000"),
    "no weights": (lambda row: row["judge"].pop("weights"), "names no weights"),
    "an endpoint": (lambda row: row["judge"].update(model="http://127.0.0.1:9/v1#x"), "is an endpoint"),
    "no seed": (lambda row: row["judge"].pop("seed"), 'no field "seed"'),
    "another setting": (lambda row: row["judge"].update(top_q=1), "top_q 1, now None"),
    "no day": (lambda row: row["judge"].update(date=1), 'field "date": expected text'),
    "a failure": (lambda row: row.update(error="too long"), "could not be judged: too long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_no_model_can_be_held_to_is_one_line(name, judged, capsys):
    path = judged("label")
    change, expected = REFUSED[name]
    rewrite(path, change)
    status, out, err = run(capsys, "--replay", path, "--item", "p2")
    assert (status, out) == (2, "") and err.startswith(f"error: {path}: row p2: ") and expected in err


def test_what_a_row_says_is_not_said_again(judged, models, capsys):
    path = judged("label")
    for words, expected in [
        ((), "needs --item"),
        (("--item", "p9"), "no row has the id p9"),
        (("--item", "p0", "--votes", 2, "--top-k", 3), "leave out --votes, --top-k"),
        (("--item", "p0", "--vote", 3), "has the votes 1 to 2, and no --vote 3"),
        (("--item", "p0", "--model", models["scorer"]), "has a scalar head"),
    ]:
        status, out, err = run(capsys, "--replay", path, *words)
        assert (status, out) == (2, "") and expected in err
