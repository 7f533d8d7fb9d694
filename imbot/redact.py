"""Errors of AI services without what was said in a chat, which they may repeat.

    redact("bad input: My PIN is 4711", ["my pin is 4711"])    # "bad input: ***"

Only what was said is hidden: the service's own sentence can still be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .outside import HIDDEN

LONGEST = 2_000  # characters of a text that are looked at; the rest is left out
QUOTED = 20  # bytes in common that are no longer a coincidence
SHORTEST = 3  # characters of a whole text that is hidden where it stands by itself

_ESCAPES = re.compile(
    r"""\\u([0-9a-f]{4})|((?:\\x[0-9a-f]{2})+)|\\([nrt])|\\(["'\\/])""", re.IGNORECASE
)


def redact(text: str, said: Iterable[str]) -> str:
    """Return a text on one line, with *** in place of what was said.

    It is found in any case, and as JSON or Python's repr escape it.
    """
    text = plain(text[:LONGEST])
    told, said = _lower(text), [_lower(plain(each)) for each in said]
    hidden = bytearray(len(text))
    for start, end in (*_whole(told, said), *_quoted(told, "\n".join(said))):
        hidden[start:end] = b"\1" * (end - start)
    shown = "".join("\0" if hide else c for hide, c in zip(hidden, text, strict=True))
    return re.sub(r"\0+", HIDDEN, shown)


def plain(text: str) -> str:
    """Return a text without the escapes of JSON or repr, and on one line."""
    for _ in range(2):  # a service may quote JSON within JSON
        text = _ESCAPES.sub(_unescape, text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(text.replace("\0", " ").split())


def _unescape(found: re.Match[str]) -> str:
    if found[1]:
        return chr(int(found[1], 16))
    if found[2]:
        return bytes.fromhex(found[2].replace("\\x", "")).decode("utf-8", "replace")
    return found[4] or " "


def _lower(text: str) -> str:
    return "".join(low if len(low := c.lower()) == 1 else c for c in text)


def _whole(told: str, said: list[str]) -> Iterator[tuple[int, int]]:
    """Yield where a whole text is repeated, unless inside a word."""
    for each in {each for each in said if len(each) >= SHORTEST}:
        pattern = rf"(?<![a-z0-9]){re.escape(each)}(?![a-z0-9])"
        yield from (found.span() for found in re.finditer(pattern, told))


def _quoted(told: str, said: str) -> Iterator[tuple[int, int]]:
    """Yield where QUOTED bytes or more are repeated."""
    for start in range(len(told)):
        end, size = start, 0
        while size < QUOTED and end < len(told):
            size += len(told[end].encode("utf-8", "replace"))
            end += 1
        if size >= QUOTED and told[start:end] in said:
            yield start, end
