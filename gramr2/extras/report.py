"""report.html: what a self-training run did, in one file without scripts or network. Everything is escaped.

It leaves out: figures and examples to browse; it is the tables of results.json, readable.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from gramr2.files import publish_file

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8886 }
td:first-child, th:first-child { text-align: left }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } }
"""
HEAD = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any], tag: str) -> str:
        shown = ("–" if cell is None else escape(str(cell)) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def write_report(path: Path, results: dict[str, Any], title: str) -> None:
    rows = [[r["name"], r["accuracy"], f"{r['low']} – {r['high']}", r["n"]] for r in results["rows"]]
    stages = ("judged", "agreed", "confident", "wellformed", "kept")
    truth = ("label_accuracy_before", "label_accuracy_after")
    rounds = [
        [n, *(each[stage] for stage in stages), *(each[name] for name in truth)]
        for n, each in enumerate(results["rounds"], 1)
    ]
    drops = [
        [f"round {n}: {reason}", count]
        for n, each in enumerate(results["rounds"], 1)
        for reason, count in each["dropped"].items()
    ]
    body = [
        f"<h1>{escape(title)}</h1>",
        "<h2>Accuracy on held-out pairs, per cent</h2>",
        _table(["", "accuracy", "95% interval", "pairs"], rows),
        "<h2>What each round kept</h2>",
        _table(["round", *stages, "labels right before, %", "after, %"], rounds),
        _table(["dropped by", "pairs"], drops) if drops else "<p>Nothing was dropped.</p>",
        "<h2>Seconds</h2>",
        _table(["step", "seconds"], [[name, value] for name, value in results["seconds"].items()]),
    ]
    page = f"{HEAD}<title>{escape(title)}</title><style>{STYLE}</style>{''.join(body)}</html>"
    with publish_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
