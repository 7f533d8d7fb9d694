"""Tencent's callbacks: JSON in, a Message out for each robot it is addressed to.

https://www.tencentcloud.com/document/product/1047/68952 (one-to-one)
https://www.tencentcloud.com/document/product/1047/68953 (group)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

ROBOT = "@RBT#"  # the UserID of every robot account starts with this
LONGEST_ID = 128  # characters; Tencent's own limits are lower
LONGEST_QUOTE = 500  # characters of the message that a question replies to

UNSUPPORTED = frozenset(  # what a user may send but the AI is not asked about
    "TIMSoundElem TIMFileElem TIMVideoFileElem TIMFaceElem TIMLocationElem "
    "TIMRelayElem".split()
)

Json = dict[str, Any]


def read_messages(
    query: Mapping[str, str], body: bytes, nicks: Mapping[str, str]
) -> list[Message]:
    """Return the messages to robots in the body of a callback. Raises BadEvent."""
    try:
        event = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise BadEvent("the body is not JSON") from None
    if not isinstance(event, dict):
        raise BadEvent("the body is not a JSON object")
    name = event.get("CallbackCommand") or query.get("CallbackCommand")
    return parse(str(name), event, nicks, query.get("OptPlatform", ""))


class BadEvent(ValueError):
    """A callback's JSON that is not as Tencent documents it; the text says where."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a user wants of one robot."""

    id: str  # unique, and the same however often Tencent delivers the callback
    robot: str
    user: str
    text: str
    group: str = ""  # empty in a one-to-one chat
    topic: str = ""
    images: tuple[str, ...] = ()  # URLs
    # or "stop" (a button), "unsupported" (a voice, a file), "said" (by the robot, of
    # itself), "missed" (no message, but work of missed.py)
    kind: str = "question"
    sent: float = 0.0  # Unix seconds, by Tencent's clock; within a second by MsgSeq
    seq: int = 0  # its MsgSeq: the answer's is higher, so clients sort it below
    platform: str = ""  # OptPlatform of who sent it, e.g. "iOS"
    quote: str = ""  # of the message that it replies to

    @classmethod
    def load(cls, data: Json) -> Message:
        """Return the message that the store kept as `data`."""
        return cls(**data | {"images": tuple(data["images"])})

    def is_from_robot(self) -> bool:
        """Return whether a robot wrote it."""
        return self.user.upper().startswith(ROBOT)

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


def parse(
    command: str, event: Json, nicks: Mapping[str, str] = {}, platform: str = ""
) -> list[Message]:
    """Return the messages of a callback: one for each robot that it is for.

    `nicks` are the robots' names, by which they may be mentioned. Raises BadEvent.
    Other callbacks and messages that were not delivered are ignored.
    https://www.tencentcloud.com/document/product/1047/68952 (one-to-one)
    https://www.tencentcloud.com/document/product/1047/68953 (group)
    """
    if command not in ("Bot.OnC2CMessage", "Bot.OnGroupMessage"):
        return []
    user = _id(event, "From_Account")
    if str(event.get("SendMsgResult", 0)) != "0":  # it was not delivered
        return []
    text, images, kind = _content(event.get("MsgBody"))
    if command == "Bot.OnC2CMessage":
        group, topic, random_field = "", "", "MsgRandom"
        robots = _robots([event.get("To_Account")], "To_Account")
    else:
        group, random_field = _id(event, "GroupId"), "Random"
        topic = _id(event, "TopicId") if event.get("TopicId") else ""
        robots = _robots(event.get("AtRobots_Account", []), "AtRobots_Account")
        names = [nicks[robot] for robot in robots if nicks.get(robot)]
        text = cut_mentions(text, [*robots, *names])
    unique = [_number(event, name) for name in ("MsgSeq", random_field, "MsgTime")]
    rest = "\t".join((user, group, topic, *unique))
    match _inner(event.get("CloudCustomData")):
        case {"messageReply": {"messageAbstract": str(quote)}}:
            quote = clean(quote)[:LONGEST_QUOTE].strip()
        case _:
            quote = ""
    if kind == "question" and not (text or images or quote):
        return []
    sent = int(unique[2]) + int(unique[0]) % 2**22 / 2**22  # what a float can hold
    seq = int(unique[0]) % 2**32
    content = (text, group, topic, images, kind, sent, seq, platform, quote)
    return [Message(f"{robot}\t{rest}", robot, user, *content) for robot in robots]


def cut_mentions(text: str, names: Iterable[str]) -> str:
    """Return the text without `@name`, for every name, wherever it stands.

    If there is none, a single mention at the start is cut: a name we do not know.
    """
    cut = text
    for name in sorted(names, key=len, reverse=True):
        cut = _mention(name).sub("", cut)
    if cut == text:
        cut = re.sub(r"^\s*[@＠]\S+(?:\s+(?![\s@＠])|\s*\Z)", "", text)
    return cut.strip()


def is_mentioned(name: str, text: str) -> bool:
    """Return whether a text holds `@name`."""
    return bool(name and _mention(name).search(text))


def _mention(name: str) -> re.Pattern[str]:
    after = r"(?![A-Za-z0-9_])\s?"
    return re.compile(f"[@＠]{re.escape(name)}{after}", re.IGNORECASE)


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


def _content(body: Any) -> tuple[str, tuple[str, ...], str]:
    """Return the text, the images and the kind of a MsgBody."""
    if not isinstance(body, list):
        raise BadEvent("MsgBody is not a list")
    texts, images, others, kind = [], [], set(), "question"
    for element in body:
        match element:
            case {"MsgType": "TIMTextElem", "MsgContent": {"Text": str(text)}}:
                texts.append(clean(text))
            case {"MsgType": "TIMImageElem", "MsgContent": {"ImageInfoArray": list(i)}}:
                images += _image(i)
            case {"MsgType": "TIMCustomElem", "MsgContent": {"Data": str(data)}}:
                match _inner(data):
                    case {"chatbotPlugin": 2, "src": 22}:  # TUIKit's stop button
                        kind = "stop"
            case {"MsgType": str(name), "MsgContent": dict()} if name != "TIMTextElem":
                others.add(name)
            case _:
                raise BadEvent(
                    "an element of MsgBody has no MsgType, MsgContent or Text"
                )
    if kind != "stop" and others & UNSUPPORTED and not texts and not images:
        kind = "unsupported"
    return "\n".join(texts).strip(), tuple(images), kind


def _image(infos: list[Any]) -> list[str]:
    """Return one URL of a picture: of the large one, the original or the thumbnail."""
    urls = {}
    for info in infos:
        match info:
            case {"Type": int(size), "URL": str(url)} if _is_public(url):
                urls[size] = clean(url)
    return [urls[size] for size in (2, 1, 3) if urls.get(size)][:1]


def _is_public(url: str) -> bool:
    """Return whether an AI service may fetch it: by HTTPS, from a name in public."""
    try:
        parts = urlsplit(url)
        name = (parts.hostname or "").rstrip(".")
    except ValueError:
        return False
    literal = re.fullmatch(r"[\d.]*|0x[\da-f.x]*|.*:.*", name)
    local = name.endswith((".local", ".localhost", ".internal", ".lan", ".home.arpa"))
    return parts.scheme == "https" and "." in name and not literal and not local


def _inner(data: Any) -> Any:
    """Return what JSON in a text holds, None if it is another program's."""
    with suppress(TypeError, ValueError, RecursionError):
        return json.loads(data)


def clean(text: str) -> str:
    """Return the text without what UTF-8 or an AI service cannot hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()
