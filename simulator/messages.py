"""Messages: what a user writes, as a callback's JSON; what a robot wrote, as it shows.

https://www.tencentcloud.com/document/product/1047/70369 is what a callback looks like.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
STREAM_GAP = 15  # seconds between two chunks of a stream, at most
SEQS = itertools.count(random.getrandbits(31))  # a client sorts one second by MsgSeq


def text_body(text: str) -> list[Json]:
    """Return a MsgBody that holds a text."""
    return [{"MsgType": "TIMTextElem", "MsgContent": {"Text": text}}]


def c2c_event(user: str, robot: str, text: str) -> Json:
    """Return the callback's JSON of a message to a robot."""
    seq, chance, now = next(SEQS), random.getrandbits(32), int(time.time())
    return {
        "CallbackCommand": "Bot.OnC2CMessage",
        "From_Account": user,
        "To_Account": robot,
        "MsgSeq": seq,
        "MsgRandom": chance,
        "MsgTime": now,
        "MsgKey": f"{seq}_{chance}_{now}",
        "OnlineOnlyFlag": 0,
        "SendMsgResult": 0,
        "ErrorInfo": "send msg succeed",
        "MsgBody": text_body(text),
        "CloudCustomData": "",
        "EventTime": int(time.time() * 1000),
    }


def group_event(user: str, group: str, seq: int, text: str, robots: list[str]) -> Json:
    """Return the callback's JSON of a message in a group that mentions robots."""
    return {
        "CallbackCommand": "Bot.OnGroupMessage",
        "GroupId": group,
        "Type": "Public",
        "From_Account": user,
        "Operator_Account": user,
        "Random": random.getrandbits(32),
        "MsgSeq": seq,
        "MsgTime": int(time.time()),
        "OnlineOnlyFlag": 0,
        "MsgBody": text_body("".join(f"@{name} " for name in robots) + text),
        "AtRobots_Account": robots,
        "CloudCustomData": "",
        "EventTime": int(time.time() * 1000),
    }


def name_of(event: Json) -> str:
    """Return what tells a callback's message from others."""
    return f"{event['MsgSeq']} {event.get('MsgRandom', event.get('Random'))}"


def chatbot_data(element: Json) -> Json | None:
    """Return what an element says if it is a chatbot's, as TUIKit knows it."""
    if element.get("MsgType") != "TIMCustomElem":
        return None
    with suppress(ValueError, TypeError, RecursionError):
        data = json.loads(element["MsgContent"]["Data"])
        return data if isinstance(data, dict) and "chatbotPlugin" in data else None
    return None


def chatbot_text(data: Json) -> str:
    """Return the text of a chatbot element."""
    if data.get("src") == 23:
        return str(data.get("errorInfo", ""))
    return "".join(map(str, data.get("chunks") or ()))


def is_finished(data: Json) -> bool:
    """Return whether all kits take a chatbot element for finished.

    Without `isFinished` Android does and iOS does not; iOS does for every error.
    """
    if "isFinished" not in data:
        return data.get("src") == 23
    return type(data["isFinished"]) is int and data["isFinished"] == 1


def drawn(element: Json) -> str:
    """Return an element as text: what is no text, as a block of code."""
    kind, content = element["MsgType"], element["MsgContent"]
    if kind == "TIMTextElem":
        return str(content["Text"])
    if data := chatbot_data(element):
        return chatbot_text(data)
    if kind in ("TIMStreamElem", "TIMImageElem"):
        return ""
    code: Any = content
    if kind == "TIMCustomElem":
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            code = json.loads(content["Data"])
    shown = json.dumps(code, ensure_ascii=False, indent=2)
    return f"{kind}\n```\n{shown}\n```"


def picture(element: Json) -> str:
    """Return the address of an element's picture, "" if it has none."""
    if element["MsgType"] != "TIMImageElem":
        return ""
    sizes = element["MsgContent"].get("ImageInfoArray") or [{}]
    return str(sizes[0].get("URL", ""))


@dataclass
class Delivered:
    """A message that a robot sent, as a user sees it now."""

    robot: str
    chat: str  # the user, or the group
    number: int  # MsgSeq, by which a client sorts one second
    body: Json = field(repr=False)
    key: Any = None  # MsgKey, MsgSeq or StreamMsgID, by which it can be changed
    text: str = ""
    pictures: list[str] = field(default_factory=list)  # their addresses
    ended: bool = True  # it says so itself
    failed: bool = False  # it shows an error
    states: list[str] = field(default_factory=list, repr=False)  # every text shown
    elements: list[Json] = field(default_factory=list, repr=False)  # as they are now
    index: int = 0  # of a stream's last chunk
    born: float = field(default_factory=time.time)
    said: float = 0.0  # when it first said something
    time: float = field(default_factory=time.time)  # of the last change

    @property
    def closed(self) -> bool:
        """Whether no more of it is to come. Tencent closes a stream that is silent."""
        silent = self.is_stream() and time.time() - self.time > STREAM_GAP
        return self.ended or silent

    @property
    def place(self) -> tuple[int, int]:
        """What clients sort a chat by: MsgTime in seconds, then MsgSeq."""
        return int(self.born), self.number

    def is_stream(self) -> bool:
        """Return whether it is a streaming message."""
        return bool(self.body["MsgBody"][0]["MsgType"] == "TIMStreamElem")

    def show(self, text: str, closed: bool, failed: bool = False) -> None:
        """Change what the user sees."""
        self.text, self.ended, self.failed = text, closed, failed
        self.states.append(text)
        self.time = time.time()
        if not self.said and text.strip("…"):
            self.said = self.time

    def draw(self, elements: list[Json], is_growing: bool) -> None:
        """Change what the user sees to what the elements say.

        A chatbot element says itself whether it grows; of others the caller knows.
        """
        self.elements = elements
        cards = [card for element in elements if (card := chatbot_data(element))]
        closed = all(map(is_finished, cards)) and not is_growing
        failed = any(card.get("src") == 23 for card in cards)
        self.pictures = [*filter(None, map(picture, elements))]
        self.show("".join(map(drawn, elements)), closed, failed)
