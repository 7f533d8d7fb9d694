"""Tencent's callbacks: JSON in, a Message out for each robot it is addressed to.

https://www.tencentcloud.com/document/product/1047/68952 (one-to-one)
https://www.tencentcloud.com/document/product/1047/68953 (group)
https://www.tencentcloud.com/document/product/1047/43466 (one-to-one, recalled)
https://www.tencentcloud.com/document/product/1047/46979 (group, recalled)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from .mentions import cut_mentions, trim
from .pictures import is_public

ROBOT = "@RBT#"  # the UserID of every robot account starts with this
LONGEST_ID = 128  # characters; Tencent's own limits are lower
LONGEST_QUOTE = 500  # characters of the message that a question replies to
LONGEST_FORWARD = 4000  # characters of the abstract of forwarded messages

Json = dict[str, Any]
Names = Mapping[str, str | None]  # robot -> its nick; None if it is not known yet


def read_messages(
    query: Mapping[str, str],
    body: bytes,
    nicks: Names,
    serves: Callable[[str], bool] = bool,
) -> list[Message]:
    """Return the messages to robots in the body of a callback. Raises BadEvent.

    `serves`: whether a robot is ours; others are left alone (ROBOTS_ONLY).
    """
    try:
        event = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise BadEvent("the body is not JSON") from None
    if not isinstance(event, dict):
        raise BadEvent("the body is not a JSON object")
    name = event.get("CallbackCommand") or query.get("CallbackCommand")
    messages = parse(str(name), event, nicks, query.get("OptPlatform", ""))
    return [m for m in messages if m.kind == "recalled" or serves(m.robot)]


class BadEvent(ValueError):
    """A callback's JSON that is not as Tencent documents it; the text says where."""


@dataclass(frozen=True, slots=True)
class Message:
    """One user message addressed to one robot."""

    id: str  # unique, and the same however often Tencent delivers the callback
    robot: str  # empty if a group's message was recalled: Tencent does not name it
    user: str
    text: str
    group: str = ""  # empty in a one-to-one chat
    topic: str = ""
    images: tuple[str, ...] = ()  # URLs
    # "question", or: "greeting" (a bare mention), "mention" (a question that still
    # holds the mention: see Nicks.settle), "stop" (a button), "recalled" (its id is the
    # recall_id of the question), "unsupported" (a voice, a file), "blank" (nothing that
    # could be answered), "said" (by the robot unasked)
    kind: str = "question"
    sent: float = 0.0  # Unix seconds, by Tencent's clock; within a second by MsgSeq
    seq: int = 0  # its MsgSeq: the answer's is higher, so clients sort it below
    platform: str = ""  # OptPlatform of who sent it, e.g. "iOS"
    quote: str = ""  # of the message that it replies to

    @classmethod
    def load(cls, data: Json) -> Message:
        """Return the message that the store kept as `data`."""
        return cls(**data | {"images": tuple(data["images"])})

    def data(self) -> Json:
        """Return the fields, for the store."""
        return {name: getattr(self, name) for name in self.__slots__}

    def conversation(self, per_member: bool = False) -> str:
        """Return the key of the chat, whose messages share an order and a memory.

        Ids hold no tabs (see _id), so two chats never share a key.
        """
        if not self.group:
            return "\t".join(("c2c", self.robot, self.user))
        member = (self.user,) if per_member else ()
        return "\t".join(("group", self.robot, self.group, self.topic, *member))

    def recall_id(self) -> str:
        """Return the id that a recall of this message has.

        One-to-one it is the message's own; of a group's Tencent tells the MsgSeq only.
        """
        if not self.group:
            return self.id
        return "\t".join((self.group, self.topic, str(self.seq)))


def parse(
    command: str,
    event: Json,
    nicks: Mapping[str, str | None] = {},
    platform: str = "",
) -> list[Message]:
    """Return the messages of a callback: one for each robot that it is for.

    `nicks` are the names by which robots may be mentioned. Raises BadEvent.
    Other callbacks and messages that were not delivered are ignored.
    """
    match command:
        case "Bot.OnC2CMessage":
            robots = _robots([event.get("To_Account")], "To_Account")
            messages = _messages(event, robots, "", "MsgRandom")
        case "Bot.OnGroupMessage":
            robots = _robots(event.get("AtRobots_Account", []), "AtRobots_Account")
            messages = _messages(event, robots, _id(event, "GroupId"), "Random")
            known = [(robot, nicks.get(robot, "")) for robot in robots]
            messages = [read_mention(message, known) for message in messages]
        case "C2C.CallbackAfterMsgWithDraw":
            return _recalled(event)
        case "Group.CallbackAfterRecallMsg":
            return _recalled_in_group(event)
        case _:
            return []
    found = [replace(m, platform=platform, kind=_kind(m, event)) for m in messages]
    return [message for message in found if message.kind]


def _kind(message: Message, event: Json) -> str:
    """Return the kind of a message, "" if it is nothing for a robot.

    One-to-one a blank message counts: TUIKit's input waits for an answer to it, too.
    """
    if message.kind != "question" or message.text or message.images or message.quote:
        return message.kind if message.kind != "signal" else ""
    return "" if message.group or event.get("OnlineOnlyFlag") else "blank"


def read_mention(
    message: Message, robots: Collection[tuple[str, str | None]]
) -> Message:
    """Return a group's message without the mentions of robots: pairs of id and nick.

    If a nick is not known yet (None), the message is of kind "mention".
    """
    if message.kind not in ("question", "mention") or not message.text:
        return message
    if any(nick is None for _, nick in robots):
        return replace(message, kind="mention")
    text = cut_mentions(message.text, [(robot, nick or "") for robot, nick in robots])
    bare = not (text or message.images or message.quote)
    return replace(message, text=text, kind="greeting" if bare else "question")


def _messages(
    event: Json, robots: list[str], group: str, random_field: str
) -> list[Message]:
    """Return what a user wrote, for each of the robots."""
    user = _id(event, "From_Account")
    if str(event.get("SendMsgResult", 0)) != "0":  # it was not delivered
        return []
    text, images, forwarded, kind = read_body(event.get("MsgBody"))
    topic = _id(event, "TopicId") if group and event.get("TopicId") else ""
    unique = [_number(event, name) for name in ("MsgSeq", random_field, "MsgTime")]
    seq = int(unique[0])
    return [
        Message(
            _message_id(robot, user, group, topic, *unique),
            robot,
            user,
            text,
            group,
            topic,
            images,
            kind,
            sent=int(unique[2]) + seq % 2**22 / 2**22,  # what a float can hold
            seq=seq % 2**32,
            quote="\n".join(filter(None, (_quote(event), forwarded))),
        )
        for robot in robots
    ]


def _message_id(*parts: str) -> str:
    """Join robot, user, group, topic, MsgSeq, MsgRandom and MsgTime."""
    return "\t".join(parts)


def _quote(event: Json) -> str:
    """Return the start of the message that this one replies to."""
    match _inner(event.get("CloudCustomData")):
        case {"messageReply": {"messageAbstract": str(quote)}}:
            return clean(quote)[:LONGEST_QUOTE].strip()
    return ""


def _recalled(event: Json) -> list[Message]:
    """Return the recall of a one-to-one message. Its MsgKey holds what its id does."""
    user, key = _id(event, "From_Account"), str(event.get("MsgKey"))
    if not re.fullmatch(r"[0-9]{1,20}(_[0-9]{1,20}){2}", key, re.ASCII):
        raise BadEvent("MsgKey is not like 1_2_3")
    return [
        Message(
            _message_id(robot, user, "", "", *key.split("_")),
            robot,
            user,
            "",
            kind="recalled",
            seq=int(key.split("_")[0]) % 2**32,
        )
        for robot in _robots([event.get("To_Account")], "To_Account")
    ]


def _recalled_in_group(event: Json) -> list[Message]:
    """Return the recalls of a group's messages, of which Tencent tells the MsgSeq."""
    group = _id(event, "GroupId")
    topic = _id(event, "TopicId") if event.get("TopicId") else ""
    items = event.get("MsgSeqList")
    if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
        raise BadEvent("MsgSeqList is not a list of objects")
    seqs = [int(_number(item, "MsgSeq")) % 2**32 for item in items]
    place = ("", "", "", "", group, topic)
    recalls = [Message(*place, kind="recalled", seq=seq) for seq in seqs]
    return [replace(recall, id=recall.recall_id()) for recall in recalls]


def _robots(accounts: Any, field: str) -> list[str]:
    """Return the robots among the accounts of a field, each once."""
    if not isinstance(accounts, list):
        raise BadEvent(f"{field} is not a list")
    ids = dict.fromkeys(_id({field: account}, field) for account in accounts)
    return [id for id in ids if id.startswith(ROBOT)]


def _id(event: Json, field: str) -> str:
    id = event.get(field)
    if isinstance(id, str) and 0 < len(id) <= LONGEST_ID and id.isprintable():
        return id
    raise BadEvent(f"{field} is not a string of 1 to {LONGEST_ID} visible characters")


def _number(event: Json, field: str) -> str:
    number = event.get(field)  # documented as a number, sent as a string in places
    if isinstance(number, int | str) and re.fullmatch(r"-?[0-9]{1,20}", str(number)):
        return str(number)
    raise BadEvent(f"{field} is not a number")


def read_body(body: Any) -> tuple[str, tuple[str, ...], str, str]:
    """Return the text, the pictures, what was forwarded, and the kind of a MsgBody.

    https://www.tencentcloud.com/document/product/1047/33527
    """
    if not isinstance(body, list):
        raise BadEvent("MsgBody is not a list")
    texts, images, forwarded, kind = [], [], "", "question"
    for element in body:
        match element:
            case {"MsgType": "TIMTextElem", "MsgContent": {"Text": str(text)}}:
                texts.append(clean(text))
            case {"MsgType": "TIMImageElem", "MsgContent": {"ImageInfoArray": list(i)}}:
                images += _image(i)
            case {
                "MsgType": "TIMRelayElem",
                "MsgContent": {"AbstractList": [str(), *_] as lines, **content},
            }:
                forwarded = _abstract(content.get("Title"), lines)
            case {"MsgType": "TIMCustomElem", "MsgContent": {**content}}:
                match _inner(content.get("Data")):  # others are programs' signals
                    case {"chatbotPlugin": 2, "src": 22}:  # TUIKit's stop button
                        kind = "stop"
                    case {"businessID": "user_typing_status"}:
                        kind = "signal"
            case {"MsgType": str(name), "MsgContent": dict()} if name != "TIMTextElem":
                kind = "unsupported" if kind == "question" else kind
            case _:
                raise BadEvent(
                    "an element of MsgBody has no MsgType, MsgContent or Text"
                )
    if kind == "unsupported" and (texts or images or forwarded):
        kind = "question"  # about what can be read
    return trim("\n".join(texts)), tuple(images), forwarded, kind


def _abstract(title: Any, lines: list[Any]) -> str:
    """Return the first lines of forwarded messages, as the client shows them."""
    said = [clean(line) for line in [title, *lines] if isinstance(line, str)]
    return "\n".join(said)[:LONGEST_FORWARD].strip()


def _image(infos: list[Any]) -> list[str]:
    """Return one URL of a picture: of the large one, the original or the thumbnail."""
    urls = {}
    for info in infos:
        match info:
            case {"Type": int(size), "URL": str(url)} if is_public(url):
                urls[size] = clean(url)
    return [urls[size] for size in (2, 1, 3) if urls.get(size)][:1]


def _inner(data: Any) -> Any:
    """Return what JSON in a text holds, None if it is another program's."""
    with suppress(TypeError, ValueError, RecursionError):
        return json.loads(data)


def clean(text: str) -> str:
    """Return the text without what UTF-8 or an AI service cannot hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def attributed(user: str, text: str) -> str:
    """Return what a user wrote as an entry of a log. Its further lines are indented,
    so none looks like another user's entry."""
    return "\n    ".join(f"{user}: {text}".splitlines())
