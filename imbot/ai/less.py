"""Asking again with less: what a question can do without when a service refuses it.

    attempts = Attempts(question, lessons, preset, remembers)
    attempts.question()          # what to ask
    attempts.shrink(error)       # after a refusal: whether there is less to ask
    attempts.answered()          # what helped is remembered for the next question

A cut that was not needed is found out later: each question tries to do without one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from ..http import CancelScope
from .errors import Json, ProviderError

CUTS = {  # cheapest first, with the words of a refusal that name it
    "pictures": r"image|picture|vision|multi-?modal|\bfile|图",
    "history": r"alternat|context|too long|token.{0,20}exceed|exceed.{0,20}token",
    "options": r"think|reason|max_\w*tokens|param|argument|unrecogni|field|option",
    "system": r"system",
}
VALUE = ["system", "options", "pictures", "history"]  # least valuable first
NO_LIMIT = float("inf")
PLACEHOLDER = "…"  # what a user "said" before a robot wrote first


@dataclass(frozen=True)
class Question:
    """What a service is asked."""

    messages: list[Json]  # OpenAI's
    scope: CancelScope
    update_interval: float  # seconds between two texts; 0 for the whole one alone
    memory: Json


@dataclass
class Lessons:
    """What a service has refused, until the process ends."""

    needed: set[str] = field(default_factory=set)  # cuts without which it refuses
    unsure: set[str] = field(default_factory=set)  # others that were made with them
    taken: set[str] = field(default_factory=set)  # what it was asked with and answered
    room: float = NO_LIMIT  # characters of all messages that it takes
    filtered: set[int] = field(default_factory=set)  # where chats begin anew, see _mark
    told: dict[str, str] = field(default_factory=dict)  # by cut, for the operator


def named_in(text: str) -> set[str]:
    """Return the cuts that a refusal speaks of."""
    return {cut for cut, word in CUTS.items() if re.search(word, text, re.I)}


def words(turn: Json) -> str:
    """Return the text of a message, of which pictures may be a part."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def size(messages: list[Json]) -> int:
    """Return the characters of messages."""
    return sum(len(words(turn)) for turn in messages)


def alternating(messages: list[Json]) -> list[Json]:
    """Return messages of which no two neighbours have one role, a user's first."""
    turns: list[Json] = []
    for turn in messages:
        if turns and turns[-1]["role"] == turn["role"]:
            turns[-1] = turn | {"content": _join(turns[-1]["content"], turn["content"])}
            continue
        if turn["role"] == "assistant" and (not turns or turns[-1]["role"] == "system"):
            turns.append({"role": "user", "content": PLACEHOLDER})
        turns.append(turn)
    return turns


def _join(*both: Any) -> Any:
    """Return two contents as one, be they texts or lists of parts."""
    if all(isinstance(content, str) for content in both):
        return "\n\n".join(both)
    lists = ([{"type": "text", "text": c}] if isinstance(c, str) else c for c in both)
    return [part for parts in lists for part in parts]


def _mark(turns: list[Json]) -> int:
    """Return a hash of the last two turns, which identifies this place in a chat."""
    return hash(tuple(words(turn) for turn in turns[-2:]))


class Attempts:
    """The ways to ask one question, each with less than the one before."""

    def __init__(
        self, question: Question, lessons: Lessons, preset: Json, remembers: bool
    ) -> None:
        """`preset` has the fields of the request that are not the operator's."""
        self.full, self.lessons = question, lessons
        self.preset = {n: v for n, v in preset.items() if v is not None}
        self.cuts: list[tuple[str, ProviderError]] = []  # made for this question
        *before, self.last = question.messages
        first = 1 if before and before[0]["role"] == "system" and not remembers else 0
        self.system, self.turns = before[:first], before[first:]
        possible = {
            "pictures": not isinstance(self.last["content"], str),
            "history": bool(self.turns) and not remembers,
            "options": bool(self.preset),
            "system": bool(self.system),
        }
        self.possible = [cut for cut in CUTS if possible[cut]]
        self.less = (lessons.needed | lessons.unsure) & {*self.possible}
        tested = [] if self._sent() - lessons.taken else self.less & lessons.unsure
        self.tested = max(tested, key=VALUE.index, default="")  # perhaps not needed
        self.less.discard(self.tested)

    def _sent(self) -> set[str]:
        """Return what is not cut of this question."""
        kept = {*self.possible} - self.less
        return kept if self._turns() else kept - {"history"}

    def question(self) -> Question:
        """Return what to ask now."""
        system, turns, last = self.system, self._turns(), self.last
        if "pictures" in self.less:
            last = last | {"content": words(last)}
        if "system" in self.less:
            last = last | {"content": _join(words(system[0]), last["content"])}
            system = []
        left_out = {"history"} if len(turns) < len(self.turns) else set()
        self.full.scope.left_out = left_out | self.less & {"pictures"}
        return replace(self.full, messages=[*system, *turns, last])

    def _turns(self) -> list[Json]:
        """Return the old turns that the service takes."""
        turns, filtered = self.turns, self.lessons.filtered
        ends = range(len(turns), 0, -1) if filtered else ()
        known = (end for end in ends if _mark(turns[:end]) in filtered)
        turns = turns[next(known, 0) :]
        if "history" in self.possible and self.lessons.room < NO_LIMIT:
            room = self.lessons.room - size([*self.system, self.last])
            while turns and size(turns) > room:
                turns = turns[1:]
        return [] if "history" in self.less else turns

    def shrink(self, error: ProviderError) -> bool:
        """Ask for less next time; return whether that may help after this error."""
        named = named_in(error.details)
        allowed = {
            "filter": {"history"},  # the filter may have hit an old turn
            "long": {"pictures", "history", "options"},
        }.get(error.kind, {*CUTS} if error.refused else set())
        if error.kind == "setup" and "pictures" in named:  # whatever the HTTP status
            allowed = allowed | {"pictures"}
        if error.kind == "long":
            named = {"history"}
        left = [cut for cut in self.possible if cut in self._sent() & allowed]
        if not left:
            return False
        self.before = size(self.question().messages)
        cut = min(left, key=lambda cut: (cut != self.tested, cut not in named))
        self.less.add(cut)
        self.cuts.append((cut, error))
        return True

    def answered(self) -> str:
        """Remember what helped; return the sentence about it, if it is news."""
        lessons = self.lessons
        lessons.taken |= self._sent()
        if not self.cuts:
            lessons.unsure.discard(self.tested)
            return ""
        *others, (cut, error) = self.cuts
        if error.kind == "filter":
            lessons.filtered.add(_mark(self.turns))
        elif cut == "history":
            fits = size(self.question().messages)
            lessons.room = min(lessons.room, max(fits, self.before // 2))
        else:
            lessons.needed.add(cut)
        lessons.unsure |= {other for other, _ in others}
        lessons.unsure -= {cut, *lessons.needed}
        if cut in lessons.told:
            return ""
        lessons.told[cut] = f"answers only without {self._advice(cut, error)}: {error}"
        return lessons.told[cut]

    def _advice(self, cut: str, error: ProviderError) -> str:
        """Return what is left out, and the setting that makes this lasting."""
        fields = [name for name in self.preset if name in error.details]
        extra = json.dumps(dict.fromkeys(fields or self.preset))
        return {
            "pictures": "pictures (AI_IMAGES=0 saves the refused call)",
            "history": "some old turns (see HISTORY_TURNS)",
            "options": f"some fields (AI_EXTRA_BODY={extra} saves the refused call)",
            "system": "a system role (so the prompt is part of the question)",
        }[cut]

    def explained(self, error: ProviderError) -> ProviderError:
        """Return the error to tell, when nothing helped: the first, and what to do."""
        if self.cuts and error.kind in ("setup", "long", "filter"):
            error = self.cuts[0][1]
        named = named_in(error.details)
        if not error.refused or error.hint:
            return error
        if capped := self._capped(error.details):
            error.kind, error.hint = "setup", f"set AI_EXTRA_BODY={json.dumps(capped)}"
        elif "pictures" in named and "pictures" in self.possible:
            error.kind, error.hint = "no_vision", "AI_IMAGES=0 if it reads no pictures"
        elif "stream" in error.details:
            other = json.dumps({"stream": not self.full.update_interval})
            error.hint = f"AI_EXTRA_BODY={other} may help"
        elif "options" in named and error.kind == "setup" and self.preset:
            error.hint = f"without {self._advice('options', error)}"
        return error

    def _capped(self, details: str) -> Json:
        """Return a smaller cap on an answer's tokens, if it is ours that is refused."""
        context = re.search(r"context\D{0,40}(\d{3,})", details)
        most = int(context[1]) if context else 0
        for name, cap in self.preset.items():
            if type(cap) is int and re.search(rf"\b{cap}\b", details):
                if most <= cap or re.search(r"max_\w*tokens", details):
                    return {name: (most or cap) // 2}
        return {}
