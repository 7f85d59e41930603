"""Json files too big for memory, entry by entry: the lists of a top-level object, or a top-level list."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from opendet_jax.errors import InputError

CHUNK = 2**22  # characters read at a time
LONGEST_TOKEN = 16  # characters: a number, a literal or an escape that ends this near may go on in the next chunk
SHOWN_AFTER = 3  # seconds: what is read faster needs no progress bar
_DECODER = json.JSONDecoder()


class AnnotationError(InputError):
    """Annotations that cannot be used: the message names the file, the entry and the field."""


def lists_of(path: Path) -> Iterator[tuple[str, Iterator[Any]]]:
    """(key, its entries) of each list in a top-level object, in its order; ("", its entries) of a top-level list.

    Holds one entry in memory. NaN and infinity are numbers, as in Python's own reader. Entries that the caller leaves
    are passed over; other members of the object too.
    Raises AnnotationError, naming the entry, where the file cannot be read, is not json, or ends too early.
    """
    try:
        with path.open("rb") as raw:
            size = path.stat().st_size
            bar = tqdm(total=size, desc=f"read {path.name}", unit="B", unit_scale=True, leave=False, delay=SHOWN_AFTER)
            with bar, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
                yield from _Scanner(path, text, bar).lists()
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error


def is_list(path: Path) -> bool:
    """Whether the top level of a json is a list. Raises AnnotationError where the file cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as text:
            while (character := text.read(1)).isspace():
                pass
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: is not json: {error}") from error
    return character == "["


class _Scanner:
    """Reads values one after the other; `_at` is the place in `_buffer`, which is what has been read and not used."""

    def __init__(self, path: Path, text: io.TextIOWrapper, bar: tqdm):
        self._path, self._text, self._bar = path, text, bar
        self._buffer, self._at, self._passed = "", 0, 0
        self._where = "its beginning"

    def lists(self) -> Iterator[tuple[str, Iterator[Any]]]:
        opening = self._peek()
        if opening == "[":
            yield from self._one("")
        elif opening == "{":
            self._take("{")
            yield from self._members()
        elif opening:
            self._value()
        else:
            raise self._broken("the file is empty")
        if rest := self._peek():
            raise self._broken(f"{rest!r} after its end")

    def _members(self) -> Iterator[tuple[str, Iterator[Any]]]:
        if self._peek() == "}":
            return self._take("}")
        while True:
            if self._peek() != '"':
                raise self._broken("a key in quotes is expected")
            key = self._value()
            self._where = f"{key!r}"
            self._take(":")
            if self._peek() == "[":
                yield from self._one(key)
            else:
                self._value()
            if self._peek() == "}":
                return self._take("}")
            self._take(",")

    def _one(self, key: str) -> Iterator[tuple[str, Iterator[Any]]]:
        entries = self._entries(key)
        yield key, entries
        for _ in entries:
            pass

    def _entries(self, key: str) -> Iterator[Any]:
        self._take("[")
        if self._peek() == "]":
            return self._take("]")
        index = 0
        while True:
            self._where = f"{key}[{index}]"
            yield self._value()
            if self._peek() == "]":
                return self._take("]")
            self._take(",")
            index += 1

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                open_string = error.msg.startswith("Unterminated string")
                if (open_string or error.pos + LONGEST_TOKEN >= len(self._buffer)) and self._more():
                    continue
                cut = open_string or error.pos >= len(self._buffer.rstrip())
                raise self._broken("the file ends in the middle of it" if cut else error.msg) from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
                raise self._broken(str(error)) from error
            length = end - self._at
            if end + LONGEST_TOKEN > len(self._buffer) and self._more():  # a number may go on
                continue
            self._at += length
            return value

    def _peek(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                return ""

    def _take(self, character: str) -> None:
        found = self._peek()
        if found != character:
            raise self._broken(f"{character!r} is expected, not {found!r}" if found else "the file ends there")
        self._at += 1

    def _more(self) -> bool:
        """Reads on, at least as much as is still unused, so that a long value is not tried too often."""
        rest = self._buffer[self._at :]
        try:
            read = self._text.read(max(CHUNK, len(rest)))
        except UnicodeDecodeError as error:
            raise self._broken(str(error)) from error
        self._passed += self._at
        self._buffer, self._at = rest + read, 0
        self._bar.update(len(read))
        return bool(read)

    def _broken(self, what: str) -> AnnotationError:
        place = self._passed + self._at
        return AnnotationError(f"{self._path}: is not json: {self._where}, at character {place:,}: {what}")
