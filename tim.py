"""Tencent IM: a callback's JSON becomes Messages, an answer becomes REST calls.

`parse` reads what Tencent sends to us; `Client` sends what we answer. A retry repeats the
same bytes with the same numbers, so Tencent drops what it already has: whether a call got
through or not, it is safe to make it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from usersig import gen_user_sig

ROBOT = "@RBT#"  # how the UserID of every chatbot account starts
LONGEST_ID = 128  # characters; Tencent's own limits are lower
TIMEOUT = (5, 10)  # seconds to connect, and between two bytes of an answer
PAUSES = (0.3, 1.5)  # seconds before the second and the third try of a call
SIG_LIFE = 7 * 86400  # seconds a UserSig is made for; it is renewed at half of that
PART_BYTES = 9000  # of UTF-8 JSON in one message; Tencent refuses more than 12 KB
PARTS = 128  # numbers set apart for the parts of one answer

logger = logging.getLogger(__name__)

# https://www.tencentcloud.com/document/product/1047/34348
NETWORK = -1  # our code for a call that brought no answer of Tencent's
RETRY = frozenset(
    [NETWORK, 10002, 10006, 10023, 20004, 20005, 20018, 20027, 20028, 22006, 60007]
    + [60008, 60011, 60013, 60014, 60018, 60019, 70169, 70500, 80003, 90057, 90992]
    + [90994, 90995, 91000]
)
STALE_SIG = frozenset([20002, 60004, 60005, 70001])
TOO_LONG = frozenset([80002, 90055, 93000])
MEANING = {
    10004: "a parameter is invalid",
    10007: "the robot may not do this; is it a member of the group?",
    10008: "not an app admin, or the app has all the robots it may have",
    10010: "the group does not exist any more",
    10015: "the group does not exist",
    10016: "refused by the app's own before-callback",
    10017: "the robot is muted in the group",
    20003: "the sender or the receiver does not exist",
    20006: "refused by the app's own before-callback",
    60006: "IM_SDKAPPID is not a valid app",
    60010: "IM_ADMIN is not an admin of this app",
    60016: "the app is disabled",
    60020: "the service is stopped: the package has expired or is unpaid",
    60021: "this server's address is not on the app's list",
    60026: "the app lives in another region: set IM_API_URL to that region's domain",
    60028: "the trial edition's messages of the last 24 hours are used up",
    70003: "the UserSig is malformed",
    70009: "IM_KEY is not the key of this app",
    70013: "the UserSig is another user's",
    70014: "the UserSig is another app's",
    70020: "IM_SDKAPPID does not exist",
    70107: "the account does not exist",
    70398: "the edition allows no more accounts",
    80001: "the text was stopped by the sensitive-word filter",
    80002: "the message is too long",
    90008: "the robot does not exist: create it first",
    90009: "IM_ADMIN is not an admin of this app",
    90012: "the receiver is not registered",
    90048: "the account does not exist",
    93000: "the message is too long",
}


class BadEvent(ValueError):
    """A callback's JSON that is not as Tencent documents it; the text says where."""


class IMError(Exception):
    """A call that Tencent IM refused, or that did not get through."""

    def __init__(self, command: str, code: int, info: str) -> None:
        meaning = MEANING.get(code)
        super().__init__(
            f"{command} failed with {code}: {info}"
            + (f" ({meaning})" if meaning else "")
        )
        self.code = code

    @property
    def retry(self) -> bool:
        """Whether the same call may succeed later."""
        return self.code in RETRY


@dataclass(frozen=True, slots=True)
class Message:
    """A question to one robot."""

    id: str  # unique, and the same however often Tencent delivers the callback
    robot: str
    user: str
    text: str
    group: str = ""  # empty in a one-to-one chat
    topic: str = ""

    def conversation(self, per_member: bool = False) -> str:
        """Return the key of the chat: who shares an order and a memory.

        Ids hold no tabs (see _name), so two chats never share a key.
        """
        if not self.group:
            return "\t".join(("c2c", self.robot, self.user))
        member = (self.user,) if per_member else ()
        return "\t".join(("group", self.robot, self.group, self.topic, *member))


def parse(command: str, event: dict[str, Any]) -> list[Message]:
    """Return the questions in a callback: none, one, or one for each robot mentioned.

    Raises BadEvent. Ignored are other callbacks, what robots wrote, what was not
    delivered, and what holds no text.
    https://www.tencentcloud.com/document/product/1047/68952 (one-to-one)
    https://www.tencentcloud.com/document/product/1047/68953 (group)
    """
    if command not in ("Bot.OnC2CMessage", "Bot.OnGroupMessage"):
        return []
    user = _name(event, "From_Account")
    if user.startswith(ROBOT) or str(event.get("SendMsgResult", 0)) != "0":
        return []
    text = _text(event.get("MsgBody"))
    found = _c2c if command == "Bot.OnC2CMessage" else _group
    return [message for message in found(event, user, text) if message.text]


def _c2c(event: dict[str, Any], user: str, text: str) -> list[Message]:
    robot = _name(event, "To_Account")
    if not robot.startswith(ROBOT):
        return []
    numbers = [_number(event, name) for name in ("MsgSeq", "MsgRandom", "MsgTime")]
    return [Message("\t".join((robot, user, *numbers)), robot, user, text.strip())]


def _group(event: dict[str, Any], user: str, text: str) -> list[Message]:
    group = _name(event, "GroupId")
    topic = _name(event, "TopicId") if event.get("TopicId") else ""
    numbers = [_number(event, name) for name in ("MsgSeq", "Random", "MsgTime")]
    mentioned = event.get("AtRobots_Account", [])
    if not isinstance(mentioned, list):
        raise BadEvent("AtRobots_Account is not a list")
    robots = [
        _name({"AtRobots_Account": name}, "AtRobots_Account") for name in mentioned
    ]
    robots = [name for name in dict.fromkeys(robots) if name.startswith(ROBOT)]
    text = cut_mentions(text, robots)
    return [
        Message(
            "\t".join((robot, group, topic, *numbers)), robot, user, text, group, topic
        )
        for robot in robots
    ]


def cut_mentions(text: str, names: Iterable[str]) -> str:
    """Return the text without `@name`, for every name, wherever it stands."""
    for name in sorted(names, key=len, reverse=True):
        mention = rf"[@＠]{re.escape(name)}(?![A-Za-z0-9_])\s?"
        text = re.sub(mention, "", text, flags=re.IGNORECASE)
    return text.strip()


def _name(event: dict[str, Any], field: str) -> str:
    name = event.get(field)
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_ID:
        raise BadEvent(f"{field} is not a string of 1 to {LONGEST_ID} characters")
    if not name.isprintable():
        raise BadEvent(f"{field} holds a character that no id may have")
    return name


def _number(event: dict[str, Any], field: str) -> str:
    number = event.get(field)  # documented as a number, sent as a string in places
    if isinstance(number, int) and not isinstance(number, bool) and abs(number) < 2**64:
        return str(number)
    if isinstance(number, str) and re.fullmatch(r"[0-9]{1,20}", number):
        return number
    raise BadEvent(f"{field} is not a number")


def _text(body: Any) -> str:
    if not isinstance(body, list) or not all(isinstance(item, dict) for item in body):
        raise BadEvent("MsgBody is not a list of objects")
    return "\n".join(
        _element_text(item) for item in body if item.get("MsgType") == "TIMTextElem"
    )


def _element_text(element: dict[str, Any]) -> str:
    content = element.get("MsgContent")
    if not isinstance(content, dict) or not isinstance(content.get("Text"), str):
        raise BadEvent("a TIMTextElem has no Text")
    return clean(content["Text"])


def clean(text: str) -> str:
    """Return the text without what UTF-8 or an AI service cannot hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def split(text: str, limit: int = PART_BYTES) -> list[str]:
    """Return the text in parts of at most `limit` bytes of JSON."""
    parts = [""]
    size = 0
    for line in re.findall(r".{1,500}\n?|\n", text):
        more = len(json.dumps(line, ensure_ascii=False).encode())
        if size + more > limit:
            parts.append("")
            size = 0
        parts[-1] += line
        size += more
    return parts


class Client:
    """Tencent IM's REST API, for any number of threads."""

    def __init__(
        self, url: str, sdkappid: int, key: str, admin: str, threads: int = 64
    ) -> None:
        self.url, self.sdkappid, self._key, self.admin = url, sdkappid, key, admin
        self._sig, self._renew_at = "", 0.0
        self._lock = threading.Lock()
        # Threads share the session: nothing in it changes after these lines but the
        # connection pool, which urllib3 locks.
        self._http = requests.Session()
        self._http.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._http.mount(url, HTTPAdapter(pool_maxsize=threads))

    def send(self, message: Message, text: str, order: int) -> None:
        """Answer a message as its robot; `order` grows from answer to answer.

        Raises IMError.
        """
        for number, part in enumerate(split(text)):
            seq, chance = numbers(message.id, order, number)
            self._send_part(message, part, seq, chance)

    def _send_part(self, message: Message, text: str, seq: int, chance: int) -> None:
        body: dict[str, Any] = {
            "From_Account": message.robot,
            "MsgBody": [{"MsgType": "TIMTextElem", "MsgContent": {"Text": text}}],
            "ForbidCallbackControl": [
                "ForbidBeforeSendMsgCallback",
                "ForbidAfterSendMsgCallback",
            ],
        }
        if message.group:
            topic = {"TopicId": message.topic} if message.topic else {}
            body |= {"GroupId": message.group, "Random": chance} | topic
            self.call("group_open_http_svc/send_group_msg", body)
        else:
            body |= {"To_Account": message.user, "MsgSeq": seq, "MsgRandom": chance}
            self.call("openim/sendmsg", body | {"SyncOtherMachine": 2})

    def create_robot(self, userid: str, nick: str = "") -> None:
        """Create a chatbot account; doing it again changes nothing. Raises IMError."""
        if not userid.startswith(ROBOT) or len(userid.encode()) > 32:
            raise ValueError(
                f"{userid!r} cannot be a robot: its UserID must start with {ROBOT} "
                "and have at most 32 bytes"
            )
        body = {"UserID": userid} | ({"Nick": nick} if nick else {})
        self.call("openim_robot_http_svc/create_robot", body)

    def call(self, command: str, body: dict[str, Any]) -> dict[str, Any]:
        """Make a REST call, again where that may help, and return Tencent's answer.

        Raises IMError. https://www.tencentcloud.com/document/product/1047/34620
        """
        data = json.dumps(body, ensure_ascii=False).encode()
        pauses = list(PAUSES)
        renewed = False
        while True:
            sig = self._user_sig()
            try:
                return self._post(command, data, sig)
            except IMError as error:
                if error.code in STALE_SIG and not renewed:
                    renewed = True
                    self._drop(sig)
                elif error.retry and pauses:
                    time.sleep(pauses.pop(0) * random.uniform(0.75, 1.25))
                else:
                    raise

    def _post(self, command: str, data: bytes, sig: str) -> dict[str, Any]:
        query: dict[str, str | int] = {
            "sdkappid": self.sdkappid,
            "identifier": self.admin,
            "usersig": sig,
            "random": random.getrandbits(32),
            "contenttype": "json",
        }
        try:
            response = self._http.post(
                f"{self.url}/v4/{command}",
                params=query,
                data=data,
                headers={"Content-Type": "application/json"},
                timeout=TIMEOUT,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            # Its text holds the URL, and the URL the UserSig: only its name may be told.
            kind = type(error).__name__
            raise IMError(command, NETWORK, f"no answer ({kind})") from None
        return self._verdict(command, response)

    @staticmethod
    def _verdict(command: str, response: requests.Response) -> dict[str, Any]:
        try:
            answer = response.json()
            code = int(answer["ErrorCode"])
            ok = answer["ActionStatus"] == "OK" and code == 0
        except (ValueError, TypeError, KeyError, RecursionError):
            status = f"HTTP {response.status_code} without Tencent's JSON"
            raise IMError(command, NETWORK, status) from None
        if not ok:
            raise IMError(command, code, str(answer.get("ErrorInfo"))[:200])
        if answer.get("MsgDropReason"):
            raise IMError(command, 10023, f"dropped: {answer['MsgDropReason']}"[:200])
        return dict(answer)

    def _user_sig(self) -> str:
        with self._lock:
            if time.time() > self._renew_at:
                self._sig = gen_user_sig(self.sdkappid, self._key, self.admin, SIG_LIFE)
                self._renew_at = time.time() + SIG_LIFE / 2
            return self._sig

    def _drop(self, sig: str) -> None:
        with self._lock:
            if sig == self._sig:
                self._renew_at = 0.0


def numbers(id: str, order: int, part: int) -> tuple[int, int]:
    """Return (MsgSeq, MsgRandom) of one part of the answer to one message.

    They are the same at every try, by which Tencent knows a repetition, and MsgSeq grows
    from part to part and from answer to answer, by which clients sort one second.
    """
    chance = hashlib.sha256(f"{id}\t{part}".encode()).digest()[:4]
    return (order * PARTS + part) % 2**32, int.from_bytes(chance)
