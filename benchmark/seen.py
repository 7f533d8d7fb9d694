"""What a user saw around a question, next to what was broken then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from simulator import Delivered

from .judge import Found, by_chat, shown_in
from .load import question
from .users import Chat

LONGEST = 30  # lines around one question
LONGEST_TEXT = 100  # characters of a message
Line = tuple[float, int, str]  # Unix seconds, the question it is about or 0, its text


def what_was_seen(
    found: Found,
    rows: Iterable[str],
    delivered: list[Delivered],
    accidents: Sequence[tuple[float, str]] = (),
) -> list[str]:
    """Return what a user saw around the first fault of each row that is not 0."""
    lines, shown = [], by_chat(delivered)
    for row in rows:
        if row in found.first:
            _, chat, number = found.first[row]
            lines.append(f"The first {row}: {name_of(chat)}, question [{number}]")
            lines += around(chat, number, shown_in(chat, shown), accidents)
    return lines


def name_of(chat: Chat) -> str:
    """Return how a chat is called in a report."""
    return " ".join(filter(None, (chat.user, chat.group, chat.robot)))


def around(
    chat: Chat,
    number: int,
    messages: list[Delivered],
    accidents: Sequence[tuple[float, str]] = (),
) -> list[str]:
    """Return the lines of a chat near a question, from the one before to the next."""
    broken = [(at, 0, f"-- {kind}") for at, kind in accidents]
    lines = sorted([*asked(chat), *map(shown, messages), *broken])
    near = [n for n, line in enumerate(lines) if abs(line[1] - number) <= 1 and line[1]]
    if not near:
        return []
    cut = lines[max(0, near[0] - 1) : near[-1] + 2]
    left_out = len(cut) - LONGEST
    if left_out > 0:
        half = LONGEST // 2
        gap = (cut[half][0], 0, f"... {left_out} lines are left out")
        cut = [*cut[:half], gap, *cut[-half:]]
    times = [
        datetime.fromtimestamp(at).strftime("%H:%M:%S.%f")[:-3] for at, _, _ in cut
    ]
    return [f"  {time}  {line[2]}" for time, line in zip(times, cut, strict=True)]


def asked(chat: Chat) -> list[Line]:
    """Return the questions of a chat, with what became of their callbacks."""
    lines = [(at, n, f"> question [{n}]") for n, at in chat.acknowledged.items()]
    for number, at in chat.lost.items():
        how = "refused by the bot" if number in chat.refused else "lost"
        lines.append((at, number, f"> question [{number}] (its callback was {how})"))
    return lines


def shown(message: Delivered) -> Line:
    """Return a message of the robot, as it was at the end."""
    text = " ".join(message.text.split())
    if len(text) > LONGEST_TEXT:
        text = text[:LONGEST_TEXT] + "..."
    kind = message.body["MsgBody"][0]["MsgType"]
    state = "" if message.closed else ", still open"
    about = max(0, question(message.text))
    return message.born, about, f"< {text} ({kind}, MsgSeq {message.number}{state})"
