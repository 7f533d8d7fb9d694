"""Text from outside (Tencent, AI services, callers) made safe to show to an operator.

Whatever such a text holds, it cannot begin a log line of its own, move the cursor of a
terminal, fill a disk, or show a secret of ours.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable

LONGEST = 200  # characters that are shown of a text from outside
SHORTEST_SECRET = 8  # characters; a shorter one would also hide common words
HIDDEN = "***"


def printable(text: object, longest: int = LONGEST) -> str:
    """Return a text on one line, at most `longest` characters of it.

    Characters that are not printable (line breaks, escape codes, surrogates, marks of
    writing direction) are shown as escapes, such as \\n or \\u2028.
    """
    shown = str(text)[: longest + 1]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else _escaped(c) for c in shown)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class Secrets:
    """Hides secrets in texts: plain, as JSON or Python quote them, in capitals."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms: set[str] = set()
        for secret in secrets:
            if len(secret) >= SHORTEST_SECRET:
                in_json = {
                    json.dumps(secret, ensure_ascii=a)[1:-1] for a in (False, True)
                }
                quoted = {repr(secret)[1:-1], repr(os.fsencode(secret))[2:-1], *in_json}
                forms |= {secret, *quoted, *(q.replace("/", "\\/") for q in quoted)}
        longest_first = sorted(map(re.escape, forms), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first) or r"(?!)", re.IGNORECASE)

    def hide(self, text: str) -> str:
        """Return a text with *** in place of each secret."""
        return self._pattern.sub(HIDDEN, text)
