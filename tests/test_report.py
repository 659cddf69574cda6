"""report.html: its figures against a run made by hand, and the page itself in a real browser."""

import ast
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from test_board import judged_file

from gramr2.extras import report
from gramr2.extras.results import RunReader, judge_by_length, read_round
from gramr2.files import write_json, write_rows
from gramr2.records import Judgment, Pair, Proof, Vote, mark
from gramr2.seals import write_signed

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEGABYTE = "a very long response " * 50000
HOSTILE = {
    "question": "<script>window.hacked = 1</script></title></style><!-- {{ 7 * 7 }}",
    "response_a": "</script><img src='https://example.org/x' onerror=window.hacked=2>\u202e\u2067 turned \0",
    "response_b": "<details><div></form><table><textarea><svg onload=window.hacked=3> half & &lt;",
}
Z = "Feedback:\nResponse A: <b>fine</b>\nResponse B: poor\n\nComparison:\nclear\n\nConclusion:\nResponse A."


def vote(label, order="AB"):
    return Vote(
        label,
        order,
        0.99 if label == "A" else 0.01,
        text=f"<think>\n{Z}\n</think>\n<answer>\n{label}\n</answer>",
    )


def judged(pair, labels):
    votes = [vote(label, order) for label, order in zip(labels, ("AB", "BA", "AB", "BA"), strict=True)]
    return {"id": pair.id, **Judgment.from_votes(votes).to_json(), "pair": pair.to_json()}


def proof(pair, score, **others):
    return Proof(pair.id, f"proof of {score}", 40 * score, -40.0, score, ids=(int(-1e4 * score),), **others)


def proved(pair, label="A"):
    every = [
        proof(pair, -0.02),
        proof(pair, -0.01),
        replace(proof(pair, -0.5), score=None, ineligible="unfinished"),
    ]
    row = {"pair": replace(pair, label=label).to_json(), "chosen": every[1].to_json(), "rationale": mark(Z)}
    return row | {"ineligible": {"unfinished": 1}, "candidates": [each.to_json() for each in every]}


NAMES = ("good", "bad", "turned", "split", "unsure", "unproved", "shapeless", "looping")


def make_run(root: Path, until: str = "end", truth: bool = True) -> Path:
    """A run of one round by hand. All votes are for A; A is right but for the pairs "bad" and "looping"."""
    pairs = {
        name: Pair((("user", f"question {name}"),), f"{name} one", f"{name} two", id=name) for name in NAMES
    }
    pairs["good"] = Pair(
        (("user", HOSTILE["question"]),), HOSTILE["response_a"], HOSTILE["response_b"], id="good"
    )
    pairs["bad"] = replace(
        pairs["bad"], response_a="x" * 999, response_b=MEGABYTE, domain='"><script>window.hacked = 4</script>'
    )
    labelled = {name: replace(pair, label="A") for name, pair in pairs.items()}
    labelled["turned"] = labelled["turned"].swapped()
    why = {"split": "agreement: the two orders disagree", "unsure": "confidence: votes below 0.75"}
    later = {
        "unproved": "no eligible proof: 3 unfinished",
        "shapeless": "structure: no Comparison",
        "looping": "repetition: x",
    }
    known = [{"id": name, "label": "B" if name in ("bad", "looping") else "A"} for name in NAMES]
    failed = {"id": "failed", "error": "too long", "pair": pairs["good"].to_json() | {"id": "failed"}}
    cast = {"split": "ABAB", "unsure": "AABA"}
    predicted = [judged(pair, cast.get(name, "AAAA")) for name, pair in pairs.items()] + [failed]
    dropped = [{"id": name, "reason": reason, "label": "A"} for name, reason in why.items()]
    dropped.append({"id": "failed", "reason": "not judged: too long", "label": None})
    left = [name for name in NAMES if name not in why]
    test = [replace(pair, label="A") for pair in pairs.values()]
    steps = {
        "data": {"truth": known if truth else []},
        "test-initial": {"judged": [judged(pair, "AAAA") for pair in test]},
        "round-1-predict": {"judged": predicted},
        "round-1-labels": {"dropped": dropped, "kept": [labelled[name].to_json() for name in left]},
        "round-1-prove": {"proofs": [proved(labelled[name]) for name in left if name != "unproved"]},
        "round-1-rationales": {
            "dropped": [{"id": name, "reason": each} for name, each in later.items()],
            "kept": [],
        },
    }
    settings = {"iters": 1, "without": [], "baselines": True, "coherence": "of plain text", "k": 3}
    settings["train prover"] = {"lr": 0.1}
    write_signed(root / "plan.json", {"settings": settings, "inputs": {}, "code": "0"})
    for number, (step, files) in enumerate(steps.items(), 1):
        place = root / "steps" / f"{number:02}-{step}"
        for name, rows in files.items():
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_signed(place / "done.json", {"counts": {"alone": {}}, "seconds": 1.0, "files": {}})
        if step == until:
            return root
    row = {
        "name": "round <1>",
        "accuracy": 75.0,
        "low": 60.0,
        "high": 88.0,
        "n": 8,
        "by_domain": {"<i>": 75.0},
    }
    passed = {"right": {"asked": 8, "passed": 7, "dropped": {"<u>": 1}}}
    passed["wrong"] = {"asked": 8, "passed": 2, "dropped": {"justifies the other label": 6}}
    write_json(root / "results.json", {"rows": [row], "prover": passed})
    return root


def funnel(root: Path):
    run = RunReader(root)
    return report.funnel(run, 1, read_round(run, 1, run.truth()))


def test_the_funnel_follows_every_pair_to_what_stopped_it(tmp_path):
    """A pair counted at a stage that it did not reach, or a label read in the wrong order, shows here."""
    found = funnel(make_run(tmp_path))
    notes = {strip.name: strip.note for strip in found["strips"]}
    assert [note.split()[0] for note in notes.values()] == ["9", "7", "6", "4", "3"]
    # Right at each stage: all but "bad" and "looping", and the failed and undecided pairs have no label.
    rights = [float(note.split("· ")[1].rstrip("% right")) for note in notes.values()]
    assert rights == [round(100 * share, 1) for share in (5 / 7, 5 / 7, 4 / 6, 2 / 4, 2 / 3)]
    drops = {name: (count, wrong) for name, count, wrong, _ in found["rows"]}
    assert drops["repetition"] == (1, 1) and drops["confidence"] == (1, 0) and drops["not judged"] == (1, 0)


def test_examples_come_from_every_outcome(tmp_path, monkeypatch):
    """A rare outcome must not be crowded out by a common one."""
    run = RunReader(make_run(tmp_path))
    pairs = read_round(run, 1, {})
    many = [replace(pair, id=f"{pair.id} {n}") for n in range(50) for pair in pairs if pair.id == "good"]
    monkeypatch.setattr(report, "EXAMPLES", 10)
    chosen = report.pick([*many, *pairs])
    assert len(chosen) == 10
    assert {pair.outcome for pair in chosen.values()} == {pair.outcome for pair in pairs} - {"not judged"}


def test_proofs_are_ranked_by_their_score(tmp_path):
    """The best proof stands first and at the right; what is not eligible has no place on the scale."""
    (first, *_) = report.proofs(RunReader(make_run(tmp_path)))["shown"]
    names = [(strip.name, len(strip.dots)) for strip in first["strips"]]
    assert names == [("proof 1, chosen", 1), ("proof 2", 1), ("proof 3", 0)]
    assert [text for _, text in first["texts"]][:2] == ["proof of -0.01", "proof of -0.02"]
    assert first["strips"][0].dots[0][0] == 50.0 and first["strips"][1].dots[0][0] == 0.0


def test_confidence_counts_a_disagreement_as_half_right():
    strips = report.sureness([(0.5, "A"), (0.5, "B"), (0.9, "A"), (0.1, "A"), (1.0, "A")])
    assert [strip.note for strip in strips] == ["50.0% right of 2", "50.0% right of 2", "100.0% right of 1"]


def test_the_last_models_votes_are_audited(micro, tmp_path):
    """Its order and length lie in the run's own files; a run that has no votes yet has nothing of it."""
    rows = {name.removeprefix("! "): rest for name, *rest in report.audited(RunReader(micro))}
    wanted = next(row for row in RunReader(micro).results["rows"] if row["name"].startswith("voting"))
    value, interval, n, _ = rows["verdicts that are right"]
    assert (float(value), n) == (pytest.approx(wanted["accuracy"], abs=0.06), wanted["n"]) and "–" in interval
    assert {"first place, all pairs", "two votes of different orders agree", "ECE"} <= rows.keys()
    assert not report.audited(RunReader(make_run(tmp_path)))


@pytest.mark.parametrize(
    "until", ["data", "test-initial", "round-1-predict", "round-1-labels", "round-1-prove"]
)
def test_an_interrupted_run_has_a_report_that_says_so(tmp_path, until):
    run = make_run(tmp_path, until)
    done = subprocess.run(
        [sys.executable, "-m", "gramr2.extras.report", run], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and done.stdout == f"report: {run / 'report.html'}\n", done.stderr
    text = (run / "report.html").read_text()
    assert "This run is not finished" in text and until in text
    assert ("No round has been judged yet" in text) == (until in ("data", "test-initial"))
    assert "kept no pair" not in text and "equation 4: the proof" in text


def test_a_round_that_kept_nothing_and_a_run_without_truth_are_said(tmp_path):
    run = make_run(tmp_path, truth=False)
    kept = next(run.glob("steps/*-rationales"))
    write_rows(kept / "dropped.jsonl", [{"id": name, "reason": "repetition: x"} for name in NAMES])
    write_json(run / "results.json", {"rows": [], "stopped": "nothing left <b>"})
    text = report.write_report(run).read_text()
    assert "This round kept no pair" in text and "nothing left &lt;b&gt;" in text
    assert "The true labels of the unlabelled pairs are not known" in text and "% right" not in text


def test_a_directory_that_is_no_run_is_one_line(tmp_path):
    command = [sys.executable, "-m", "gramr2.extras.report", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "plan.json" in done.stderr


def test_the_walk_through_names_code_that_exists():
    """docs/walkthrough.md is made from a run; where the code has moved on, it has to be made again."""
    text = (ROOT / "docs/walkthrough.md").read_text()
    named = set(re.findall(r"`([\w/]+)\.py:([\w.]+)`", text))
    assert len(named) > 20 and "/tmp" not in text
    for path, function in named:
        node = ast.parse((ROOT / f"{path}.py").read_text())
        for name in function.split("."):
            node = next((each for each in node.body if getattr(each, "name", None) == name), None)
            assert node, f"{path}.py:{function}"


# ---------------------------------------------------------------------------------- in a browser


class Browser:
    """Headless Chromium over its debugging pipe: JSON messages that end with a zero byte, on 3 and 4."""

    def __init__(self, profile: str):
        (its_in, self.out), (self.back, its_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_in, its_out)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: [os.dup2(end, place) for end, place in zip(high, (3, 4), strict=True)],
        )
        for end in (*high, its_in, its_out):
            os.close(end)
        self.events, self.number, self.session, self.rest = [], 0, None, b""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.rest:
            got = os.read(self.back, 1 << 20)
            assert got, "the browser is gone"
            self.rest += got
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def send(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path):
        self.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def js(self, text: str):
        answer = self.send("Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, text: str = ""):
        for kind in ("keyDown", "keyUp"):
            code = {"Tab": 9, "Enter": 13}[key]
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text
            )

    def said(self, *methods: str):
        return [event["params"] for event in self.events if event["method"] in methods]

    def close(self):
        os.close(self.out)
        os.close(self.back)
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        contextlib.closing(Browser(profile)) as it,
    ):
        yield it


@pytest.fixture
def opened(browser, tmp_path):
    """A finished run's report with hostile texts, opened."""
    browser.open(report.write_report(make_run(tmp_path)))
    return browser


VISIBLE = "[...document.querySelectorAll('.example')].filter(each => each.offsetParent !== null).length"


def choose(name: str, value: str) -> str:
    return (
        f"(() => {{ const each = document.querySelector('{name}'); each.value = {json.dumps(value)};"
        f"each.dispatchEvent(new Event('input', {{bubbles: true}})); return {VISIBLE}; }})()"
    )


def test_hostile_text_stays_text(opened):
    """Script tags, unclosed tags and turned text in what others wrote change nothing."""
    assert opened.js("window.hacked") is None
    texts = opened.js("[...document.querySelectorAll('.example .text')].map(each => each.textContent)")
    assert HOSTILE["question"] in texts
    assert HOSTILE["response_a"].replace("\0", "\ufffd") in texts
    assert HOSTILE["response_b"] in texts
    assert opened.js("document.querySelectorAll('img, textarea, main script, svg svg svg').length") == 0
    assert opened.js("document.querySelectorAll('.example').length") == len(NAMES)
    assert opened.js("document.querySelectorAll('section').length") == 8
    long = next(text for text in texts if text.startswith("a very long response"))
    assert len(long) < 2000 and f"of {len(MEGABYTE):,} characters" in long


def test_the_page_is_silent_and_asks_nothing_of_the_network(opened):
    assert opened.said("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") == []
    asked = [each["request"]["url"] for each in opened.said("Network.requestWillBeSent")]
    assert len(asked) == 1 and asked[0].startswith("file:")


REFUSALS = """new Promise(tell => {
  const refused = [];
  addEventListener("securitypolicyviolation", event => {
    if (refused.push(event.effectiveDirective) === 2) tell(refused.sort().join());
  });
  setTimeout(() => tell("only " + refused.join()), 5000);
  const put = (tag, given) => document.body.append(Object.assign(document.createElement(tag), given));
  put("script", {textContent: "window.hacked = 5"});
  put("img", {src: "https://example.org/x"});
})"""


def test_the_policy_forbids_what_the_page_did_not_bring(opened):
    """Were a text ever to become an element, its script and its picture would still be refused."""
    assert opened.js(REFUSALS) == "img-src,script-src-elem"
    assert opened.js("window.hacked") is None


def test_filters_show_what_they_say(opened):
    every = len(NAMES)
    assert (
        opened.js(VISIBLE) == every and opened.js("document.getElementById('shown').textContent") == "8 shown"
    )
    assert opened.js(choose("[data-filter=outcome]", "repetition")) == 1
    assert opened.js("document.getElementById('shown').textContent") == "1 shown"
    assert opened.js(choose("[data-filter=outcome]", "kept")) == 3
    assert opened.js(choose("[data-filter=truth]", "wrong")) == 1
    assert opened.js(choose("[data-filter=truth]", "")) == 3
    assert opened.js(choose("#words", "response a: <B>fine")) == 3
    assert opened.js(choose("#words", "window.HACKED")) == 1
    assert opened.js(choose("[data-filter=outcome]", "")) == 1
    assert opened.js(choose("#words", "")) == every
    assert opened.js(choose("[data-filter=round]", "1")) == every


def test_the_keyboard_reaches_and_opens_an_example(opened):
    opened.js("document.getElementById('words').focus()")
    opened.press("Tab")
    assert opened.js("document.activeElement.closest('.example') === document.querySelector('.example')")
    opened.press("Enter", "\r")
    assert opened.js("document.querySelector('.example').open")


def test_it_fits_a_phone_the_dark_and_paper(opened):
    opened.js("document.querySelectorAll('details').forEach(each => { each.open = true })")
    opened.send("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=2, mobile=True)
    try:
        assert opened.js("document.documentElement.scrollWidth") == 360
        colour = "getComputedStyle(document.body).backgroundColor"
        light = opened.js(colour)
        opened.send(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
        )
        assert opened.js(colour) != light == "rgb(255, 255, 255)"
        opened.send("Emulation.setEmulatedMedia", media="print", features=[])
        assert opened.js("getComputedStyle(document.getElementById('filters')).display") == "none"
    finally:
        opened.send("Emulation.clearDeviceMetricsOverride")
        opened.send("Emulation.setEmulatedMedia", media="", features=[])


def test_every_figure_has_words(opened):
    assert opened.js("[...document.querySelectorAll('main > section svg[role]')].length") == 6
    assert opened.js(
        "[...document.querySelectorAll('svg[role]')].every(each => each.ariaLabel.includes(':'))"
    )
    assert "round <1>: 75.0 (60.0 – 88.0)" in opened.js("document.querySelector('#accuracy svg').ariaLabel")


def test_curves_are_drawn_of_what_a_training_has_left(browser, tmp_path):
    """A step that was not finite has no loss, and the row that is being written is no row yet."""
    root = make_run(tmp_path, "data")
    rows = [{"step": n, "loss": 4 / n if n != 7 else None, "lr": 0.01, "seconds": 0.5} for n in range(1, 251)]
    place = root / "steps/ahead-discriminative"
    place.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "metrics.jsonl").write_text(text + '{"step": 251, "lo')
    standing = {"state": "going on", "says": "<b>", "at": 1.0, "done": 1, "steps": 9}
    browser.open(report.write_report(root, standing))
    shown = browser.js(
        "[...document.querySelectorAll('#training polyline')].map(each => each.getAttribute('points'))"
    )
    assert len(shown) == 2 and "NaN" not in "".join(shown)
    heights = [float(point.split(",")[1]) for point in shown[1].split()]
    assert heights == sorted(heights) and 4 <= heights[0] < heights[-1] <= 116 and 80 <= len(heights) <= 100
    assert "250 steps so far" in browser.js("document.querySelector('#training svg').ariaLabel")
    assert "minutes before you opened this page" in browser.js("document.querySelector('.gap').textContent")
    assert browser.js("document.querySelector('progress').position") == pytest.approx(1 / 9)


def test_the_prover_is_shown_with_what_it_does_for_wrong_labels(opened):
    rows = opened.js("[...document.querySelectorAll('#proofs > .wide tbody tr')].map(each => each.innerText)")
    assert rows == ["right label\t8\t7\t<u>: 1", "wrong label\t8\t2\tjustifies the other label: 6"]


def test_the_rule_of_length_is_tested_on_the_pairs_that_models_are(tmp_path):
    """On all of them, where models saw the first few, its row would stand beside another test's."""
    responses = [("long one", "short"), ("one", "two"), ("short", "long one"), ("long one", "short")]
    rows = [{"id": f"{n}", "response_a": a, "response_b": b} for n, (a, b) in enumerate(responses)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge_by_length(tmp_path / "test.jsonl", 3, tmp_path)
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [row["label"] for row in judged] == ["A", None, "B"]


def test_the_leaderboard_is_silent_fits_a_phone_and_takes_names_for_text(browser, tmp_path):
    name = "models/<script>window.hacked=1<!--"
    files = [
        judged_file(
            tmp_path / f"{k}.jsonl", name, lambda place, k=k: place % (k + 2) > 0, source=source, seed=k
        )
        for k, source in enumerate(["judgebench", "judgebench", "</title><i>mine"])
    ]
    assert report.main(["--board", *map(str, files), "--out", str(tmp_path / "board.html")]) == 0
    browser.open(tmp_path / "board.html")
    assert browser.said("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded") == []
    assert len(browser.said("Network.requestWillBeSent")) == 1 and browser.js("window.hacked") is None
    assert browser.js("[...document.querySelectorAll('h2')].map(each => each.textContent)") == [
        "All boards", "judgebench", "</title><i>mine", "Judges",
    ]  # fmt: skip
    assert browser.js("document.querySelectorAll('script, i').length") == 0
    assert browser.js("document.querySelectorAll('#board-1 tbody tr').length") == 2 + 1 + 2
    browser.send(
        "Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=2, mobile=True
    )
    browser.js("document.querySelectorAll('details').forEach(each => { each.open = true })")
    try:
        assert browser.js("document.documentElement.scrollWidth") == 360
    finally:
        browser.send("Emulation.clearDeviceMetricsOverride")
