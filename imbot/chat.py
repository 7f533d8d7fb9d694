"""A chat: one message to a robot and all that belongs to it.

`Bot.compose`, `Bot.ask` and every command get one. What they may return is Said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .http import CancelScope
from .queue import Store
from .settings import Persona
from .tencent import Json, Message


@dataclass(frozen=True)
class Answer:
    """What the user gets."""

    text: str = ""  # "" if there is none, and `note` says why
    note: str = ""  # shown below the text, e.g. why it is cut; never remembered
    element: Json | None = None  # of a MsgBody, instead of a text
    remember: bool = False  # whether later questions see it
    outcome: str = "sent"  # for the log

    @classmethod
    def load(cls, kept: Any) -> Answer:
        """Return the answer that `data` stored."""
        return cls(kept) if isinstance(kept, str) else cls(**kept)

    def data(self) -> str | Json:
        """Return what has to be stored until it is sent: of most only a text."""
        if not (self.note or self.element):
            return self.text
        return {"text": self.text, "note": self.note, "element": self.element}

    @property
    def shown(self) -> str:
        return "\n\n".join(filter(None, (self.text, self.note)))


# A text, an element of a MsgBody, or a generator of the text so far, which grows.
Said = str | Json | Iterator[str]


@dataclass
class Chat:
    """What a fork's code may look at, and `memory`, which it may change."""

    message: Message  # .text, .user, .robot, .group, .images, .quote
    conversation: str  # its key in the store
    store: Store
    persona: Persona  # the settings of this robot
    language: str  # BOT_LANGUAGE
    texts: dict[str, str]  # what the bot says itself, in this language
    shared: bool  # whether a whole group shares the memory
    turns: int  # HISTORY_TURNS
    scope: CancelScope  # AI_TIMEOUT; /stop and the shutdown cancel it
    update_interval: float = 0.0  # seconds between two texts of an answer that grows
    memory: Json | None = None  # of an AI service that remembers its chats itself
    seen: Json = field(default_factory=dict)  # what it has seen once it has answered
    heard: list[str] = field(default_factory=list)  # the group's talk, the AI's text

    @cached_property
    def history(self) -> list[tuple[Message, str]]:
        """The questions that are remembered, with their answers, oldest first."""
        found = self.store.history(self.conversation, self.turns)
        return [(Message.load(data), Answer.load(kept).text) for data, kept in found]

    def said(self) -> list[str]:
        """Return what users and the robot said, which no log may repeat."""
        old = [text for turn in self.history for text in (turn[0].text, turn[1])]
        return [*old, self.message.text, self.message.quote, *self.heard]
