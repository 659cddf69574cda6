"""Text ↔ ids: the checkpoint's own tokenizer and its own chat template.

`tokenizer.json` is read by the `tokenizers` library; the template (`chat_template.jinja`, or the field in
`tokenizer_config.json`) runs in jinja2's sandbox with the few functions that published templates use. A
rendered prompt is encoded once and without added specials, because the template writes them itself: one
BOS, never two.

A training target is never passed through the template, which would rewrite it (Qwen3's drops earlier
thinking, LLaMA's strips blanks): an example is the rendered prompt's ids, then the encoded target, then
the stop id.

What a message says is text. If it spells one of the tokenizer's special tokens, that spelling is encoded
as ordinary text, so that a response cannot close its own turn. (transformers encodes it as the token.)

It leaves out: training tokenizers, sentencepiece models without a `tokenizer.json`, images, tools.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from gramr2.files import InputError, read_json

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
FILES += ["generation_config.json", "vocab.json", "merges.txt"]
Message = Mapping[str, str]  # {"role": …, "content": …}


def _compile_template(source: str, date: str | None):
    """A chat template as a function of its variables, in a sandbox that can neither read nor write."""
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

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        now = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
        return now.strftime(form)

    def tojson(value: Any, **options) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | options))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)


class Tokenizer:
    """Reads a model directory's tokenizer files; `files` keeps them as they were, for saving."""

    def __init__(self, files: Mapping[str, bytes], where: str = "tokenizer", date: str | None = None):
        self.files, self.where, self.date = dict(files), where, date
        try:
            self._fast = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{where}/tokenizer.json: {error}") from None
        self._fast.no_padding()
        self._fast.no_truncation()
        self._config = self._json("tokenizer_config.json")
        self._generation = self._json("generation_config.json")

    @classmethod
    def load(cls, directory: str | Path, date: str | None = None) -> Tokenizer:
        """`date` ("2026-01-31") pins what a template prints as today."""
        directory = Path(directory)
        if not (directory / "tokenizer.json").is_file():
            raise InputError(f"{directory}: holds no tokenizer.json")
        present = {name: directory / name for name in FILES if (directory / name).is_file()}
        for name in present:
            if name.endswith(".json"):
                read_json(present[name])
        return cls({name: path.read_bytes() for name, path in present.items()}, str(directory), date)

    def _json(self, name: str) -> dict[str, Any]:
        return json.loads(self.files[name]) if name in self.files else {}

    # ------------------------------------------------------------------ plain text

    @property
    def size(self) -> int:
        """One more than the largest id; a model may have more rows."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def id_of(self, token: str | None) -> int | None:
        return None if token is None else self._fast.token_to_id(token)

    def _special_text(self, name: str) -> str | None:
        """bos_token and its kin stand in the config as text, or as {"content": text}."""
        value = self._config.get(name) or self._json("special_tokens_map.json").get(name)
        return value.get("content") if isinstance(value, dict) else value

    @cached_property
    def bos_id(self) -> int | None:
        return self.id_of(self._special_text("bos_token"))

    @cached_property
    def unknown_id(self) -> int | None:
        """What stands for text that the vocabulary cannot spell; None where it can spell everything."""
        return self.id_of(self._special_text("unk_token"))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends an answer: generation_config.json's list, or the tokenizer's own end of text."""
        stop = self._generation.get("eos_token_id")
        if stop is None:
            stop = self.id_of(self._special_text("eos_token"))
        if stop is None:
            return ()
        return tuple(stop) if isinstance(stop, list) else (stop,)

    @cached_property
    def turn_end(self) -> int:
        """The stop id that closes a trained answer: the tokenizer's eos where it is among the stop ids.

        (LLaMA-3's list begins with the end of the text, while its turns end with <|eot_id|>, its eos.)
        """
        eos = self.id_of(self._special_text("eos_token"))
        if not self.stop_ids:
            raise InputError(f"{self.where}: names no stop id (eos_token_id in generation_config.json)")
        return eos if eos in self.stop_ids else self.stop_ids[0]

    @cached_property
    def special(self) -> dict[str, int]:
        """Special tokens by their text."""
        added = self._fast.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands: nothing is added."""
        try:
            return self._fast.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InputError("text that is not Unicode (half of a surrogate pair)") from None

    def encode_document(self, text: str) -> list[int]:
        """Ids of a text that stands by itself: with BOS where the tokenizer has one, and exactly one."""
        ids = self.encode(text)
        if self.bos_id is None or ids[:1] == [self.bos_id] or self._config.get("add_bos_token") is False:
            return ids
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=skip_special)

    # ------------------------------------------------------------------ conversations

    @cached_property
    def _template(self):
        source = self.files.get("chat_template.jinja", b"").decode() or self._config.get("chat_template")
        if isinstance(source, list):  # several templates by name; "default" is the conversation's
            source = next((each["template"] for each in source if each["name"] == "default"), None)
        if not source:
            raise InputError(
                f"{self.where}: has no chat template (chat_template.jinja, or in tokenizer_config.json)"
            )
        try:
            return _compile_template(source, self.date)
        except Exception as error:  # jinja2's syntax errors have several bases
            raise InputError(f"{self.where}: chat template does not parse: {error}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables) -> str:
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if (text := self._special_text(name)) is not None:
                variables[name] = text
        turns = [dict(message) for message in messages]
        try:
            return self._template.render(
                variables, messages=turns, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may raise anything
            raise InputError(f"{self.where}: chat template refuses the messages: {error}") from None

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables) -> list[int]:
        """Ids of a conversation in the checkpoint's own frame, ready for an answer.

        Where a message spells special tokens, each spelling is hidden behind a private-use character while
        the template runs. Around the specials that remain, which are the template's own, the text is encoded
        piece by piece, as the tokenizer itself would cut it, with the hidden spellings back in place.
        """
        spelled = [text for text in self.special if any(text in m["content"] for m in messages)]
        if not spelled:
            return self.encode(self.render(messages, add_generation_prompt, **variables))
        used = {*"".join(m["content"] for m in messages)}
        free = (chr(c) for c in range(0xF0000, 0xFFFFE) if chr(c) not in used)
        hidden = dict(zip(spelled, free, strict=False))
        cut = "|".join(re.escape(text) for text in sorted(self.special, key=len, reverse=True))
        contents = [re.sub(cut, lambda found: hidden[found[0]], each["content"]) for each in messages]
        masked = [{**each, "content": text} for each, text in zip(messages, contents, strict=True)]
        shown = str.maketrans({mark: text for text, mark in hidden.items()})
        ids: list[int] = []
        for piece in re.split(f"({cut})", self.render(masked, add_generation_prompt, **variables)):
            if piece in self.special:
                ids.append(self.special[piece])
            else:
                ids += self._encode_plain(piece.translate(shown))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        self._fast.encode_special_tokens = True
        try:
            return self.encode(text)
        finally:
            self._fast.encode_special_tokens = False

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether the frame has already opened <think>, so that the answer will not."""
        return self.render([{"role": "user", "content": ""}]).rstrip().endswith("<think>")

    def example(self, turns: Iterable[tuple[str, str]], target: str) -> tuple[list[int], int]:
        """(ids, start): a conversation of (role, text) with its answer, and where that begins.

        The stop id closes it; there stands a scalar head's score.
        """
        prompt_ids = self.chat([{"role": role, "content": text} for role, text in turns])
        return [*prompt_ids, *self.encode(target), self.turn_end], len(prompt_ids)
