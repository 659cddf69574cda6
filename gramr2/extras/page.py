"""What the pages have in common: one file that asks nothing of the network, one style, one kind of figure.

The template engine escapes all that a page fills in, and the page's policy allows its own style and script,
by their hashes, and nothing else. The parts that pages are made of are the macros of figures.html.

It leaves out: what a page shows (report.py, board.py).
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gramr2.files import publish_file
from gramr2.records import show


class Strip(NamedTuple):
    """A line of the one kind of figure: a text, and marks over a track from 0 to 100 per cent."""

    name: str
    note: str
    bars: Sequence[tuple[float, float, str]] = ()  # from, to, kind
    dots: Sequence[tuple[float, float, float, str]] = ()  # value, the interval's ends, kind


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> Any:
    import jinja2

    here = Path(__file__).parent
    how: Any = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    made = jinja2.Environment(loader=jinja2.FileSystemLoader(here), **how)
    made.filters |= {"show": show, "digest": digest, "clock": clock}
    made.globals |= {name: (here / f"report.{name}").read_text("utf-8") for name in ("css", "js")}
    return made


def write_page(path: Path, template: str, **shown: Any) -> None:
    """A page as its template has it, whole or not at all."""
    text = _environment().get_template(template).render(**shown)
    with publish_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
