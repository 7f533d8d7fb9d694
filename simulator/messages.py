"""Messages: what a user writes, as a callback's JSON; what a robot wrote, as it shows.

https://www.tencentcloud.com/document/product/1047/70369 is what a callback looks like.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
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


@dataclass
class Delivered:
    """A message that a robot sent, as a user sees it now."""

    robot: str
    chat: str  # the user, or the group
    number: int  # MsgSeq, by which a client sorts one second
    body: Json = field(repr=False)
    key: Any = None  # MsgKey, MsgSeq or StreamMsgID, by which it can be changed
    text: str = ""
    closed: bool = True  # no more of it is to come
    failed: bool = False  # it shows an error
    states: list[str] = field(default_factory=list, repr=False)  # every text shown
    index: int = 0  # of a stream's last chunk
    born: float = field(default_factory=time.time)
    time: float = field(default_factory=time.time)  # of the last change

    def is_stream(self) -> bool:
        """Return whether it is a streaming message."""
        return bool(self.body["MsgBody"][0]["MsgType"] == "TIMStreamElem")

    def show(self, text: str, closed: bool, failed: bool = False) -> None:
        """Change what the user sees."""
        self.text, self.closed, self.failed = text, closed, failed
        self.states.append(text)
        self.time = time.time()

    def draw(self, elements: list[Json]) -> None:
        """Change what the user sees to what the elements say."""
        texts, closed, failed = [], True, False
        for element in elements:
            content = element["MsgContent"]
            if element["MsgType"] == "TIMTextElem":
                texts.append(content["Text"])
                closed = not content["Text"].endswith("…")
            elif element["MsgType"] == "TIMCustomElem":
                data = json.loads(content["Data"])
                failed = data["src"] == 23
                texts += [data["errorInfo"]] if failed else data["chunks"]
                closed = bool(data["isFinished"])
        self.show("".join(texts), closed, failed)
