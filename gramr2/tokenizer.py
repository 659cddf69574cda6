"""Text ↔ ids: the checkpoint's own tokenizer and its own chat template.

`tokenizer.json` is read by the `tokenizers` library; the template (`chat_template.jinja`, or the field in
`tokenizer_config.json`) runs in a sandbox (chat_templates.py). A rendered prompt is encoded once and without
added specials, because the template writes them itself: one BOS, never two.

A training target is never passed through the template, which would rewrite it (Qwen3's drops earlier
thinking, LLaMA's strips blanks): an example is the rendered prompt's ids, then the encoded target, then
the stop id.

Text is never control. Where a message, its role, a target or any other text spells one of the tokenizer's
special tokens, that spelling is encoded as ordinary text, so that a response cannot close its own turn: only
the chat template, and the stop id behind a target, are special tokens. (transformers encodes a spelling as
the token.) What a model writes is shown as it wrote it: of special tokens, decoding leaves out those alone
that begin, end or fill a sequence. A text that the vocabulary cannot spell is refused, with the word.

It leaves out: training tokenizers, sentencepiece models without a `tokenizer.json`, images, tools.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import tokenizers
from tokenizers import pre_tokenizers

from gramr2.chat_templates import compile_template
from gramr2.directories import model_file
from gramr2.fields import Fields
from gramr2.files import InputError, need, open_file, parse_json, read_json
from gramr2.settings import SAMPLING

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
FILES += ["generation_config.json", "vocab.json", "merges.txt"]
Message = Mapping[str, str]  # {"role": …, "content": …}
SILENT = ("bos", "eos", "pad")
Item = TypeVar("Item")
Made = TypeVar("Made")


def in_threads(make: Callable[[Item], Made], items: Sequence[Item], threads: int) -> Iterator[Made]:
    """`make` of each item, in order; in threads, since a tokenizer that encodes lets others go on."""
    if threads == 1:
        yield from map(make, items)
    else:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(make, items)


def encoding_threads(device: str) -> int:
    """For prompts that this kind of device waits for. On a CPU the cores have other work."""
    return min(4, os.cpu_count() or 1) if device == "cuda" else 1


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
        self._fast.encode_special_tokens = True  # as text: `_frame` alone knows them
        self._config = self._fields("tokenizer_config.json")
        self._generation = self._fields("generation_config.json")
        self._specials = self._fields("special_tokens_map.json")
        self._model = self._fields("config.json")

    @classmethod
    def load(cls, directory: str | Path, date: str | None = None) -> Tokenizer:
        """`date` ("2026-01-31") pins what a template prints as today."""
        directory = Path(directory)
        need(directory.is_dir(), f"{directory}: no such model directory; download or train one first")
        home = model_file(directory, "tokenizer.json").parent  # an adapter's own, or its base's: no mixture
        places = {name: home / name for name in FILES}
        places |= {name: model_file(directory, name) for name in ("generation_config.json", "config.json")}
        present = [name for name in FILES if places[name].exists()]
        need("tokenizer.json" in present, f"{directory}: holds no tokenizer.json")
        # Without its configuration, the model's says which tokens begin and end a text.
        if "tokenizer_config.json" not in present and places["config.json"].exists():
            present.append("config.json")
        files = {}
        for name in present:
            if name.endswith(".json") and name != "tokenizer.json":  # which its library reads
                read_json(places[name])
            with open_file(places[name]) as file:
                files[name] = file.read()
        return cls(files, str(directory), date)

    def _fields(self, name: str) -> Fields:
        return Fields(parse_json(self.files.get(name, b"{}")), f"{self.where}/{name}: ")

    # ------------------------------------------------------------------ plain text

    @property
    def size(self) -> int:
        """One more than the largest id; a model may have more rows."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def id_of(self, token: str | None) -> int | None:
        return None if token is None else self._fast.token_to_id(token)

    def _special_text(self, name: str) -> str | None:
        """bos_token and its kin stand in the config as text, or as {"content": text}."""
        for fields in (self._config, self._specials):
            if isinstance(fields.row.get(name), dict):
                return fields.object(name).get("content", str)
            if text := fields.get(name, str, ""):
                return text
        ids = self._model.get(f"{name}_id", tuple[int, ...], (), low=0)
        return self._fast.id_to_token(ids[0]) if ids else None

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
        stop = self._generation.get("eos_token_id", tuple[int, ...], (), low=0)
        own = self.id_of(self._special_text("eos_token"))
        return stop or (() if own is None else (own,))

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

    @cached_property
    def _silent(self) -> set[int | None]:
        """Ids that begin, end or fill a sequence, and are no part of what it says."""
        return {*self.stop_ids, *(self.id_of(self._special_text(f"{name}_token")) for name in SILENT)}

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands: nothing is added, and nothing in it is control."""
        return self._ids(self._fast, text)

    @cached_property
    def _frame(self) -> tokenizers.Tokenizer:
        """For what a chat template has rendered, where special tokens are its own. (Another object: to turn
        one back and forth would make control of a text that another thread encodes.)"""
        frame = tokenizers.Tokenizer.from_str(self.files["tokenizer.json"].decode())
        frame.no_padding()
        frame.no_truncation()
        return frame

    def _ids(self, tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        """Ids of a text, or which word the vocabulary cannot spell."""
        try:
            found = tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            raise InputError("text that is not Unicode (half of a surrogate pair)") from None
        said = text.encode()
        if len(said.translate(None, self._unspelled)) < len(said):
            lost = next(letter for letter in text if {*letter.encode()} & {*self._unspelled})
            raise InputError(f"the tokenizer cannot spell {lost!r}; leave it out")
        # In a frame special tokens are the template's own: of most, there is nothing to look at one by one.
        never = {self.unknown_id} if tokenizer is self._frame else self._never
        if never.isdisjoint(found.ids):
            return found.ids
        for i, (start, stop) in zip(found.ids, found.offsets, strict=True):
            word = text[start:stop].strip()
            if i in never and not (tokenizer is self._frame and word in self.special):
                # Some know a word by the blank before it: the first one of a text has none, and is let pass.
                known = start == 0 and self._never.isdisjoint(
                    self._fast.encode(f" {word}", add_special_tokens=False).ids
                )
                need(known, f"the tokenizer has no word for {word!r:.60}; use its words")
        return found.ids

    @cached_property
    def _never(self) -> set[int | None]:
        """Ids that no text has: special ones, and what stands for a word that is unknown."""
        return {*self.special.values(), self.unknown_id}

    @cached_property
    def _unspelled(self) -> bytes:
        """Bytes that a byte-level vocabulary lacks: its library would drop them, and not say so."""
        if "ByteLevel" not in repr(self._fast.pre_tokenizer):
            return b""
        # A byte's letter: its own in Latin-1 where that can be seen; the others have the next ones, in order.
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        plain = [ord(letter) for letter in letters if ord(letter) < 256]
        order = [*plain, *sorted({*range(256)}.difference(plain))]
        known = self._fast.get_vocab()
        return bytes(byte for letter, byte in zip(letters, order, strict=True) if letter not in known)

    @cached_property
    def _document_start(self) -> list[int]:
        """What the tokenizer puts before a text that stands by itself: BOS, or nothing. Its configuration
        says so, or else the post-processor in tokenizer.json."""
        if (add := self._config.get("add_bos_token", bool | None, None)) is not None:
            return [self.bos_id] if add and self.bos_id is not None else []
        probe = self._frame.encode("a", add_special_tokens=True)
        added = zip(probe.ids, probe.special_tokens_mask, strict=True)
        return [i for i, _ in itertools.takewhile(lambda each: each[1], added)]

    def encode_document(self, text: str) -> list[int]:
        """Ids of a text that stands by itself, begun as the tokenizer begins one."""
        return [*self._document_start, *self.encode(text)]

    @cached_property
    def sampling(self) -> dict[str, float]:
        """How the checkpoint wants to be sampled, where its generation_config.json says so."""
        if not self._generation.get("do_sample", bool, True):
            return {}
        read = self._generation.get
        found = {name: read(name, kind | None, None, **limits) for name, (kind, limits) in SAMPLING.items()}
        return {name: value for name, value in found.items() if value is not None}

    def generation_config(self) -> str:
        """generation_config.json of a model that was trained to be drawn from as it is: its base's ids, and
        none of the temperatures and penalties that suited its base."""
        row = self._generation.row
        ids = {name: row[name] for name in ("bos_token_id", "pad_token_id") if name in row}
        drawn = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return json.dumps({**ids, "eos_token_id": [*self.stop_ids], **drawn}, indent=2)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """What ids say: without those of beginning, end and filling. Others are words, as <filename> is."""
        said = [i for i in ids if not (skip_special and i in self._silent)]
        return self._fast.decode(said, skip_special_tokens=False)

    # ------------------------------------------------------------------ conversations

    @cached_property
    def _template(self):
        source = self.files.get("chat_template.jinja", b"").decode("utf-8", "replace")
        if not source and isinstance(self._config.row.get("chat_template"), list):
            templates = self._config.get("chat_template", tuple[dict, ...])
            named = [Fields(each, f"{self._config.where}chat_template: ") for each in templates]
            by_name = {each.get("name", str): each.get("template", str) for each in named}
            source = by_name.get("default", "")  # the conversation's, of several
        elif not source:
            source = self._config.get("chat_template", str, "")
        lacks = f"{self.where}: no chat template; copy the checkpoint's chat_template.jinja, or the "
        need(source != "", f"{lacks}tokenizer_config.json that holds it, into the directory")
        try:
            return compile_template(source, self.date)
        except Exception as error:  # jinja2's syntax errors have several bases
            raise InputError(f"{self.where}: chat template does not parse: {error}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables) -> str:
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if (text := self._special_text(name)) is not None:
                variables[name] = text
        turns = [dict(message) for message in messages]
        variables |= {"messages": turns, "add_generation_prompt": add_generation_prompt}
        template = self._template
        try:
            text = template(sum(len(text) for turn in turns for text in turn.values()), **variables)
            text.encode()  # half a character is none
            return text
        except Exception as error:  # a template may raise anything
            raise InputError(f"{self.where}: chat template refuses the messages: {error}") from None

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables) -> list[int]:
        """Ids of a conversation in the checkpoint's own frame, ready for an answer.

        Where a message spells special tokens, each spelling is hidden behind a private-use character while
        the template runs. Around the specials that remain, which are the template's own, the text is encoded
        piece by piece, as the tokenizer itself would cut it, with the hidden spellings back in place.
        """
        said = "\n".join(text for each in messages for text in each.values())
        spelled = [text for text in self.special if text in said]
        if not spelled:
            return self._ids(self._frame, self.render(messages, add_generation_prompt, **variables))
        used = {*said}
        free = (chr(c) for c in range(0xF0000, 0xFFFFE) if chr(c) not in used)
        hidden = dict(zip(spelled, free, strict=False))
        cut = "|".join(re.escape(text) for text in sorted(self.special, key=len, reverse=True))
        masked = [
            {key: re.sub(cut, lambda found: hidden[found[0]], text) for key, text in each.items()}
            for each in messages
        ]
        shown = str.maketrans({mark: text for text, mark in hidden.items()})
        ids: list[int] = []
        for piece in re.split(f"({cut})", self.render(masked, add_generation_prompt, **variables)):
            if piece in self.special:
                ids.append(self.special[piece])
            else:
                ids += self.encode(piece.translate(shown))
        return ids

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
