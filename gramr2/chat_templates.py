"""A checkpoint's chat template, run as what it is: a program that came with the weights.

It runs in jinja2's sandbox, which neither reads nor writes, with the few functions that published templates
use, and within a budget: so many seconds, and texts so much longer than what it was given. A template that
goes on for ever, or that doubles a text in a loop, would otherwise hold a machine.

It leaves out: what is done with the text (tokenizer.py).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SECONDS = 5.0  # of one conversation; published templates take milliseconds
ROOM = 10**6  # characters that a template may add
TIMES = 4  # what it was given may stand there so often
WORKED_OVER = 50  # as often as a text may be cut, changed and put together, on the way to the output
MOST_BITS = 10**4  # of a number


_LONG_NUMBER = re.compile(r"\d{6}")  # in a pattern for `%` or format: the width of what it makes


class OverBudget(Exception):
    """The template takes more time or room than any conversation needs."""


class Budget(threading.local):
    """What is left of a rendering's time and room. A running template is made to pass by its functions.

    Each thread has its own: its clock is its own, and another may be in the middle of a rendering.
    """

    def __init__(self) -> None:
        self.until, self.longest, self.total, self.is_endless = 0.0, 0, 0, False

    def begin(self, given: int) -> None:
        """A conversation of so many characters is rendered from now on."""
        self.until, self.longest, self.total = time.thread_time() + SECONDS, ROOM + TIMES * given, 0

    def check_time(self) -> None:
        if self.is_endless or time.thread_time() > self.until:
            self.is_endless = True  # nor is it run for as long again with the next conversation
            raise OverBudget(f"it runs for more than {SECONDS:g} seconds")

    def check_size(self, size: int) -> None:
        if size > self.longest:
            raise OverBudget(f"it makes a text of more than {self.longest:,} characters")

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop."""
        for item in items:
            self.check_time()
            yield item

    def made(self, value: Any) -> Any:
        """A value that an expression has made."""
        self.check_time()
        if isinstance(value, (str, list, tuple, dict)):
            self.total += len(value)
            self.check_size(max(len(value), self.total // WORKED_OVER))
        return value

    def given(self, value: Any) -> Any:
        """What a call, a filter, a comparison or the output is given: no list that is large by what is in its
        lists, through which one step of C code would walk, and no number to make a text from."""
        waiting, count = [value], 0
        while waiting:
            each = waiting.pop()
            self.check_size(count := count + 1)
            if isinstance(each, dict):
                waiting += each.values()
            elif isinstance(each, (list, tuple)):
                waiting += each
            elif isinstance(each, int):
                self.check_size(abs(each))
        return value

    def check_operation(self, operator: str, left: Any, right: Any) -> None:
        """What makes much of little is refused before it is made."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > MOST_BITS:
                raise OverBudget("it makes a number of thousands of digits")
        elif operator == "%" and isinstance(left, str) and _LONG_NUMBER.search(left):
            raise OverBudget("it makes a text of millions of characters")
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(times, int):
                    self.check_size(len(text) * times)


def compile_template(source: str, date: str | None) -> Callable[..., str]:
    """A chat template as a function of how long its messages are, and of its variables."""
    import jinja2

    budget = Budget()
    environment = _environment(budget)
    environment.globals["strftime_now"] = lambda form: _now(date).strftime(form)
    tree = environment.parse(source)
    for loop in tree.find_all(jinja2.nodes.For):
        loop.iter = jinja2.nodes.Filter(loop.iter, "each item", [], [], None, None)
    for join in tree.find_all(jinja2.nodes.Concat):  # a ~ b
        join.nodes = [jinja2.nodes.Filter(each, "made", [], [], None, None) for each in join.nodes]
    for compare in tree.find_all(jinja2.nodes.Compare):
        for side in (compare, *compare.ops):
            side.expr = jinja2.nodes.Filter(side.expr, "given", [], [], None, None)
    code = environment.compile(tree)
    template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(given: int, **variables: Any) -> str:
        budget.begin(given)
        budget.check_time()
        pieces, size = [], 0
        for piece in template.generate(**variables):
            budget.check_size(size := size + len(budget.made(piece)))
            pieces.append(piece)
        return "".join(pieces)

    return render


def _now(date: str | None) -> datetime.datetime:
    return datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()


def _environment(budget: Budget):
    """jinja2's sandbox, in which calls, operations and filters pass by the budget."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for other tools; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 wants a plain class attribute)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "+", "%"))

        def call(self, context, called, *arguments, **named):
            budget.given((arguments, named))
            pattern = getattr(getattr(called, "__wrapped__", called), "__self__", "")  # of "…".format(…)
            budget.check_operation("%", pattern, 0)
            return budget.made(super().call(context, called, *arguments, **named))

        def call_binop(self, context, operator, left, right):
            budget.check_operation(operator, left, right)
            budget.given((left, right))
            return budget.made(super().call_binop(context, operator, left, right))

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.globals["raise_exception"] = raise_exception
    environment.finalize = budget.given
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **({"ensure_ascii": False} | how))
    environment.filters = {name: _bounded(each, budget) for name, each in environment.filters.items()}
    environment.filters |= {"each item": budget.each, "made": budget.made, "given": budget.given}
    return environment


def _bounded(function: Callable, budget: Budget) -> Callable:
    @functools.wraps(function)  # jinja2 leaves marks on its filters
    def bounded(*arguments, **named):
        plain = [each for each in arguments if isinstance(each, (str, int, list, tuple, dict))]
        budget.given((plain, named))
        if function.__name__ == "do_format":
            budget.check_operation("%", plain[0], 0)
        return budget.made(function(*arguments, **named))

    return bounded
