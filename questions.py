"""What an AI service is asked: the prompt, old turns of the chat, and the new question.

The turns are OpenAI's: {"role": "user", "content": "hello"}.
"""

from __future__ import annotations

from typing import Any

from providers import Json, words
from tim import Message

HISTORY_CHARACTERS = 24_000  # of old turns in one question

Turns = list[tuple[Message, str]]  # old questions with their answers, oldest first


def make_chat(
    prompt: str, history: Turns, message: Message, shared: bool, images: bool
) -> list[Json]:
    """Return a question with what came before it.

    `shared`: members of a group share the chat; `images`: the service reads pictures.
    """
    content: Any = spoken(message, shared)
    if images and message.images:
        urls = [{"type": "image_url", "image_url": {"url": u}} for u in message.images]
        content = [{"type": "text", "text": content}, *urls]
    turns, room = [{"role": "user", "content": content}], HISTORY_CHARACTERS
    for old, reply in history[::-1]:
        asked = spoken(old, shared)
        room -= len(asked) + len(reply)
        if room < 0:
            break
        turns.append({"role": "assistant", "content": reply})
        turns.append({"role": "user", "content": asked})
    return [*turns, {"role": "system", "content": prompt}][::-1]


def spoken(message: Message, shared: bool) -> str:
    """Return a question as a turn of the chat. In a group its first line says who
    asked; the others are indented, so that none looks like another member's."""
    text = message.text or ("[image]" if message.images else "")
    if message.quote:
        lines = [f"> {line}" for line in message.quote.splitlines()]
        text = "\n".join([*lines, "", text]).rstrip()
    if not (text and message.group and shared):
        return text
    return f"{message.user}: {text}".replace("\n", "\n    ")


def news(turns: Turns, memory: Json) -> Turns:
    """Return the turns that a service which remembers does not know: those that began
    with the robot since it was asked last. `memory` holds the last one."""
    turns = [turn for turn in turns if turn[0].kind == "said"]
    ids = [message.id for message, _ in turns]
    if memory.get("told") in ids:
        turns = turns[ids.index(memory["told"]) + 1 :]
    memory["told"] = ids[-1] if ids else ""
    return turns


def redact(details: str, chat: list[Json]) -> str:
    """Return an error's details for the log, in short if they repeat what was said."""
    said = [words(turn) for turn in chat if turn["role"] != "system"]
    told, all_said = details.encode(), "\n".join(said).encode()
    pieces = (told[start : start + 12] for start in range(len(told) - 11))
    quotes = any(piece in all_said for piece in pieces)
    if quotes or any(len(text) > 2 and text in details for text in said):
        return f"{details.split(': ')[0]}: (it repeats the chat)"
    return details
