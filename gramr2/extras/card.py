"""A model's card, README.md: what it is, how to use it, what it scored, how it was trained, its limits.

The text is the template card.md beside this file. It is filled from what training left in the model's
directory, from the directory that training began from and, in a self-training run, from the run's results. A
card stands outside the directory's seals (seals.CARD), so that results are added when they are known, and one
that somebody has edited is left as it is.

It leaves out what nothing here knows: a licence, a language and a name on a hub are those that the base's own
card, or its place in a hub's cache, tells; and `datasets` in the front matter, which takes names on a hub,
where a training knows files. They stand in the text, with their hashes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gramr2.directories import base_of, model_file
from gramr2.extras.results import Results
from gramr2.files import JsonRow, digest, publish_file, read_json, read_text, short_hash
from gramr2.seals import CARD, read_signed
from gramr2.tokenizer import Tokenizer


def write_cards(results: Results, rows: list[JsonRow]) -> None:
    """The cards of a self-training run's models, with the accuracies of all of them."""
    told: JsonRow = {"results": rows, "tested": digest(results.inputs.test)}
    told["inputs"] = read_signed(results.run.directory.root / "plan.json")["inputs"]
    for step, start in results.run.starts.items():
        model = results.run.directory.paths[step] / "model"
        write_card(model, start, [name for name in results.models if results.models[name] == model], **told)


def write_card(model: Path, start: Path, own: Collection[str] = (), **told: Any) -> None:
    """`start`: the directory that training began from. `own`: which rows of the results are this model's."""
    path, text = model / CARD, card(model, start, **{"own": own, "results": [], "inputs": {}, **told})
    before = path.read_text("utf-8", "replace") if path.exists() else marked("")
    if before != marked(text) and before == marked(before.rpartition("\n<!--")[0]):
        with publish_file(path) as temporary:
            temporary.write_text(marked(text), encoding="utf-8")


def marked(text: str) -> str:
    """With a last line by which a card is known that is as it was written here."""
    return f"{text}\n<!-- as it was written: {short_hash(text.encode())} -->\n"


def card(model: Path, start: Path, **told: Any) -> str:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False)
    template = environment.from_string(read_text(Path(__file__).with_suffix(".md")))
    told |= {**read_json(model / "training.json"), "config": read_json(model_file(model, "config.json"))}
    told["adapter"] = base_of(model)
    told |= {"prompts": {path.name: read_text(path) for path in model.glob("*_prompt.txt")}}
    base, known = known_of(start)
    return template.render(told, base=base, known=known, tokenizer=Tokenizer.load(model), plain=plain)


def known_of(start: Path) -> tuple[str, list[str]]:
    """What a base is called, and the lines of its card's front matter that hold for what is trained from it.

    A name on a hub is certain in a hub's cache alone. What a card calls its base is the base's own base, but
    where the card is one of ours.
    """
    place, names = start.absolute(), "license|license_name|license_link|language"
    hub = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/", str(place))
    names += "|base_model" if (start / "training.json").is_file() and not hub else ""
    text = (start / CARD).read_text("utf-8", "replace") if (start / CARD).is_file() else ""
    front = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    lines = re.findall(rf"^(?:{names}):.*(?:\n[ -].*)*", front[1] if front else "", re.MULTILINE)
    name = f"{hub[1]}/{hub[2]}" if hub else plain(place.parent.name if place.name == "model" else place.name)
    return name, lines + [f"base_model: {name}"] * bool(hub)


def plain(text: str) -> str:
    """A name or a value that means nothing in a page, whatever it spells."""
    return re.sub(r"[^\w .,:()+=@/-]", "?", text)
