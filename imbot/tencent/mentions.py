"""How people write to a robot in a group: `@nick`, and characters that nobody sees.

Clients insert `@nick ` or `@UserID `, people delete the space or type it themselves.
Tencent says which robots a message mentions, but not where in the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# White space, zero-width characters and fillers: nothing to see, nothing to read.
UNSEEN = "".join(
    chr(code)
    for first, last in [
        *((0x00, 0x20), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C)),
        *((0x115F, 0x1160), (0x1680, 0x1680), (0x180B, 0x180F), (0x2000, 0x200F)),
        *((0x2028, 0x202F), (0x205F, 0x206F), (0x2800, 0x2800), (0x3000, 0x3000)),
        *((0x3164, 0x3164), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0)),
    ]
    for code in range(first, last + 1)
)
SELECTORS = "".join(map(chr, range(0xFE00, 0xFE10)))  # how a character is drawn

ADDRESS = r"A-Za-z0-9._%+/／\-"  # before an @ they make it an address, or a path
DOMAIN = r"[.\-][A-Za-z0-9]"  # after a name it goes on: ada.example, Ada-2
# What changes the character before it: accents, joiners, selectors, skin tones, tags.
JOINED = (
    "\u0300-\u036f\u200d\u20d0-\u20ff\ufe00-\ufe0f"
    "\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f"
)
LETTER = rf"\w{JOINED}\u2600-\u27bf\U0001f000-\U0001faff"  # of a nick, emoji too
# Before the @ of a mention: no address, an @ (of a UserID, as in @@RBT#001), or a
# command, as in /help@Ada.
BEFORE = rf"(?:(?<![{ADDRESS}])|(?=[@＠]@)|(?P<command>\A\W{{0,9}}[/／]\w{{1,32}}))"

Span = tuple[int, int]


def trim(text: str) -> str:
    """Return the text without what nobody sees at its ends; "" if that is all."""
    return text.strip(UNSEEN) if text.strip(UNSEEN + SELECTORS) else ""


def mentions(text: str, robot: str, nick: str = "", glued: bool = False) -> list[Span]:
    """Return where a text mentions a robot: `@UserID`, or `@nick` standing alone.

    `glued`: also where the nick runs into the next word, as in "@Ada帮我". That may be
    a longer name, so it counts only if Tencent says that the robot is mentioned.
    """
    names = [rf"{re.escape(robot)}(?![A-Za-z0-9_])"]
    if nick := nick.strip():
        ascii_word = "A-Za-z0-9_" if re.match("[A-Za-z0-9_]", nick[-1]) else ""
        more = JOINED + ascii_word if glued else LETTER
        name = re.escape(nick).replace(r"\ ", r"\s+")
        names.append(f"{name}(?![{more}])")
    pattern = rf"{BEFORE}[@＠](?:{'|'.join(names)})(?!{DOMAIN})\s?"
    found = re.finditer(pattern, text, re.IGNORECASE)
    return [(max(match.start(), match.end("command")), match.end()) for match in found]


def cut_mentions(text: str, robots: Collection[tuple[str, str]]) -> str:
    """Return the text without the mentions of robots, each an id and a nick ("" if it
    has none).

    If there is none, a name at the start that we do not know is cut, such as the
    robot's name in this group, unless the text mentions others, too.
    """
    cut = text
    for robot, nick in sorted(robots, key=lambda names: len(names[1]), reverse=True):
        spans = mentions(cut, robot, nick) or mentions(cut, robot, nick, glued=True)
        for start, end in reversed(spans):
            cut = cut[:start] + cut[end:]
    if cut == text and len(re.findall(rf"(?<![{ADDRESS}@＠])[@＠]\S", text)) == 1:
        cut = re.sub(r"^\s*[@＠]\S+(?:\s+|\Z)", "", text)
    return trim(cut)
