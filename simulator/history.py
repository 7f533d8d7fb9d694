"""What Tencent remembers: messages of conversations, and the calls that list them.

https://www.tencentcloud.com/document/product/1047/43087 (conversations)
https://www.tencentcloud.com/document/product/1047/35478 (one-to-one messages)
https://www.tencentcloud.com/document/product/1047/34971 (messages of a group)
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from typing import Any

from .messages import Delivered, Json
from .signature import Refused

REMEMBERED = 1000  # messages of a conversation
RATE = 200  # calls of each command a second
RECALLED = 8  # in MsgFlagBits
# command -> (required fields, optional fields)
LOOKUPS: dict[str, tuple[Json, Json]] = {
    "recentcontact/get_list": (
        {"From_Account": str, "AssistFlags": int}
        | dict.fromkeys(
            ("TimeStamp", "StartIndex", "TopTimeStamp", "TopStartIndex"), int
        ),
        {},
    ),
    "openim/admin_getroammsg": (
        {"Operator_Account": str, "Peer_Account": str}
        | dict.fromkeys(("MaxCnt", "MinTime", "MaxTime"), int),
        {"LastMsgKey": str},
    ),
    "group_open_http_svc/group_msg_get_simple": (
        {"GroupId": str, "ReqMsgNumber": int},
        {"ReqMsgSeq": int, "WithRecalledMsg": int},
    ),
}

# What the documentation called some fields before.
OLD_NAMES = {
    "openim/admin_getroammsg": {
        "From_Account": "Operator_Account",
        "To_Account": "Peer_Account",
    }
}

Place = tuple[str, str]  # (robot, user), or (group, "")


@dataclass(slots=True)
class Kept:
    """A message as the history has it."""

    sender: str
    receiver: str
    time: int
    seq: int
    random: int
    body: list[Json]
    custom_data: str = ""
    receiver_only: bool = False  # the sender's side does not have it
    recalled: bool = False

    def key(self) -> str:
        """Return the MsgKey."""
        return f"{self.seq}_{self.random}_{self.time}"


class History:
    """The messages of all conversations: those of users, and those of robots.

    Commands in `refused` are refused, as if the app may not use them. A `history_fault`
    breaks them all: an error code, or "hang" for no answer as long as it is set.
    `lookups` counts the calls by command, `looked_up` those for a first page by (robot,
    user), (group, ""), or (robot, "") for the list of its conversations.
    """

    robots: dict[str, str]
    users: set[str]
    groups: dict[str, set[str]]
    changed: threading.Condition
    closing: bool

    def __init__(self) -> None:
        self.remembers = True
        self.refused: set[str] = set()
        self.history_fault: int | str = ""
        self.lookups: Counter[str] = Counter()
        self.looked_up: Counter[Place] = Counter()
        self.conversations_page = 30  # at most in one answer
        self.messages_page = 20
        self._kept: dict[Place, deque[Kept]] = {}
        self._places: defaultdict[str, dict[Place, None]] = defaultdict(dict)
        self._seqs: Counter[str] = Counter()  # group -> its last MsgSeq
        self._last: dict[str, deque[float]] = {}  # calls of a command

    def next_seq(self, group: str) -> int:
        """Return the MsgSeq of the next message in a group."""
        with self.changed:
            self._seqs[group] += 1
            return self._seqs[group]

    def remember_event(self, event: Json) -> None:
        """Remember what a user wrote, unless Tencent would not store it."""
        if event.get("OnlineOnlyFlag") or event.get("SendMsgResult"):
            return
        if event.get("TopicId"):  # topics have a history of their own
            return
        group = event.get("GroupId", "")
        kept = Kept(
            event["From_Account"],
            group or event["To_Account"],
            int(event["MsgTime"]),
            event["MsgSeq"],
            event["Random" if group else "MsgRandom"],
            event["MsgBody"],
            event.get("CloudCustomData", ""),
        )
        robots = event["AtRobots_Account"] if group else [event["To_Account"]]
        self._remember(place_of(event), robots, kept)

    def remember_sent(self, message: Delivered) -> None:
        """Remember what a robot sent."""
        body, chat = message.body, message.chat
        if body.get("OnlineOnlyFlag") or body.get("TopicId"):
            return
        chance = body["MsgRandom" if "MsgRandom" in body else "Random"]
        now, elements = int(message.born), body["MsgBody"]
        kept = Kept(message.robot, chat, now, message.number, chance, elements)
        kept.receiver_only = body.get("SyncOtherMachine") == 2
        place = (chat, "") if "GroupId" in body else (message.robot, chat)
        self._remember(place, [message.robot], kept)

    def _remember(self, place: Place, robots: list[str], kept: Kept) -> None:
        if not self.remembers:
            return
        self._kept.setdefault(place, deque(maxlen=REMEMBERED)).append(kept)
        for robot in robots:
            self._places[robot][place] = None

    def recall(self, event: Json) -> None:
        """Recall a message, as its user can."""
        for kept in self._kept[place_of(event)]:
            if (kept.seq, kept.time) == (event["MsgSeq"], event["MsgTime"]):
                kept.recalled = True

    def note_lookup(self, command: str, body: Json) -> None:
        """Count a call, if it looks something up; refuse it if it has to be."""
        if command not in LOOKUPS:
            return
        self.lookups[command] += 1
        if not any(map(body.get, ("StartIndex", "LastMsgKey", "ReqMsgSeq"))):
            self.looked_up[self._asked_for(body)] += 1
        if command in self.refused:
            raise Refused(10004, "this app may not use it")
        if isinstance(self.history_fault, int):
            raise Refused(self.history_fault, "a fault that was asked for")
        calls = self._last.setdefault(command, deque(maxlen=RATE + 1))
        calls.append(now := time.monotonic())
        if len(calls) > RATE and now < calls[0] + 1:
            raise Refused(60007, f"more than {RATE} calls a second")

    def hangs(self, command: str) -> bool:
        """Return whether a call gets no answer; if so, when that has ended."""
        if command not in LOOKUPS or self.history_fault != "hang":
            return False
        while self.history_fault == "hang" and not self.closing:
            with self.changed:
                self.changed.wait(0.1)
        return True

    def _asked_for(self, body: Json) -> Place:
        if "GroupId" in body:
            return (body["GroupId"], "")
        if "From_Account" in body:
            return (body["From_Account"], "")
        operator, peer = body["Operator_Account"], body["Peer_Account"]
        return (operator, peer) if operator in self.robots else (peer, operator)

    def look_up(self, command: str, body: Json) -> Json:
        """Answer a call of LOOKUPS."""
        if command == "recentcontact/get_list":
            return self._conversations(body)
        if command == "openim/admin_getroammsg":
            return self._one_to_one(body)
        return self._in_group(body)

    def _conversations(self, body: Json) -> Json:
        """List a robot's conversations, in no order that could be relied on."""
        robot, start = body["From_Account"], body["StartIndex"]
        if robot not in self.robots:
            raise Refused(70107, "From_Account does not exist")
        later = {bool(body[n]) for n in ("TimeStamp", "StartIndex", "TopTimeStamp")}
        if len(later) > 1 or start < 0 or body["AssistFlags"] not in range(16):
            raise Refused(10004, "not what the page before returned, or AssistFlags")
        places, now = [*self._places[robot]], int(time.time())
        end = start + self.conversations_page
        complete = end >= len(places)
        return {
            "SessionItem": [self._session(place) for place in places[start:end]],
            "CompleteFlag": int(complete),
            "TimeStamp": now,
            "StartIndex": 0 if complete else end,
            "TopTimeStamp": now,
            "TopStartIndex": 0,
        }

    def _session(self, place: Place) -> Json:
        one, user = place
        who = {"Type": 1, "To_Account": user} if user else {"Type": 2, "GroupId": one}
        return who | {"MsgTime": self._kept[place][-1].time, "TopFlag": 0}

    def _one_to_one(self, body: Json) -> Json:
        """List the messages of a time: the newest page first, each the oldest first.

        Operator_Account says whose side is asked, which may not have all it sent.
        """
        robot, user = place = self._asked_for(body)
        if robot not in self.robots or user not in self.users:
            raise Refused(70107, "one of the accounts does not exist")
        count, first, last = body["MaxCnt"], body["MinTime"], body["MaxTime"]
        if count not in range(1, 101):
            raise Refused(10004, "MaxCnt is not 1 to 100")
        side, all_kept = body["Operator_Account"], self._kept.get(place, ())
        kept = [k for k in all_kept if not (k.receiver_only and k.sender == side)]
        kept = [k for k in kept if first <= k.time <= last]
        found = sorted(kept, key=lambda one: (one.time, one.seq, one.random))
        if known := body.get("LastMsgKey"):
            keys = [one.key() for one in found]
            if known not in keys or not known.endswith(f"_{last}"):
                raise Refused(10004, "not LastMsgKey with the LastMsgTime as MaxTime")
            found = found[: keys.index(known)]
        page = found[-min(count, self.messages_page) :]
        return {
            "Complete": int(len(page) == len(found)),
            "MsgCnt": len(page),
            "LastMsgTime": page[0].time if page else 0,
            "LastMsgKey": page[0].key() if page else "",
            "MsgList": [roaming(one) for one in page],
        }

    def _in_group(self, body: Json) -> Json:
        """List messages of a group, the newest first, and gaps where one is gone.

        IsFinished says whether all that was asked for is listed, not whether there are
        older messages.
        """
        group, count = body["GroupId"], body["ReqMsgNumber"]
        if group not in self.groups:
            raise Refused(10015, "no such group")
        newest = self._seqs[group]
        last = min(body.get("ReqMsgSeq", newest), newest)
        if count not in range(1, 21) or body.get("ReqMsgSeq", 1) < 1:
            raise Refused(
                10004, "ReqMsgNumber is not 1 to 20, or ReqMsgSeq not 1 or more"
            )
        kept = {one.seq: one for one in self._kept.get((group, ""), ())}
        recalled = bool(body.get("WithRecalledMsg"))
        seqs = range(last, max(last - count, 0), -1)
        page = seqs[: self.messages_page]
        return {
            "GroupId": group,
            "IsFinished": int(len(page) == len(seqs)),
            "RspMsgList": [simple(seq, kept.get(seq), recalled) for seq in page],
        }


def place_of(event: Json) -> Place:
    """Return the conversation that a user's message belongs to."""
    if "GroupId" in event:
        return (event["GroupId"], "")
    return (event["To_Account"], event["From_Account"])


def roaming(kept: Kept) -> Json:
    """Return a one-to-one message as admin_getroammsg lists it."""
    return {
        "From_Account": kept.sender,
        "To_Account": kept.receiver,
        "MsgSeq": kept.seq,
        "MsgRandom": kept.random,
        "MsgTimeStamp": kept.time,
        "MsgFlagBits": RECALLED * kept.recalled,
        "IsPeerRead": 0,
        "MsgKey": kept.key(),
        "MsgBody": kept.body,
        "CloudCustomData": kept.custom_data,
    }


def simple(seq: int, kept: Kept | None, recalled: bool) -> Json:
    """Return a group's message as group_msg_get_simple lists it, or a gap."""
    if kept is None:
        gap: dict[str, Any] = {"From_Account": "", "MsgRandom": 0, "MsgTimeStamp": 0}
        return gap | {"IsPlaceMsg": 1, "MsgPriority": 2, "MsgSeq": seq, "MsgBody": []}
    gone = (2 if recalled else 1) if kept.recalled else 0
    return {
        "From_Account": kept.sender,
        "IsPlaceMsg": gone,
        "MsgBody": [] if gone else kept.body,
        "MsgPriority": 2,
        "MsgRandom": kept.random,
        "MsgSeq": seq,
        "MsgTimeStamp": kept.time,
        "CloudCustomData": kept.custom_data,
    }
