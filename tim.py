"""Tencent IM: a callback's JSON becomes Messages; the REST client and its errors.

    [message] = parse("Bot.OnC2CMessage", event)
    client = Client("https://console.tim.qq.com", sdkappid, key, "administrator")
    client.send(message, text_element("hello"), order=7, part=1)

A repeated call has the same bytes and the same numbers, and Tencent drops what it has
already: a call whose answer was lost is safe to make again within two minutes.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import requests
from urllib3.exceptions import MaxRetryError

from session import CallEnded, CancelScope, Session
from usersig import gen_user_sig

ROBOT = "@RBT#"  # how the UserID of every chatbot account starts
LONGEST_ID = 128  # characters; Tencent's own limits are lower
CONNECT_TIMEOUT = 5  # seconds
CALL_TIMEOUT = 10  # seconds for one try of a call, from its start to its last byte
PAUSES = (0.3, 1.5)  # seconds before the second and the third try of a call
SIG_LIFE = 7 * 86400  # seconds a UserSig is made for; it is renewed at half of that
PARTS = 1024  # numbers set apart for the messages of one answer
FORBID = ["ForbidBeforeSendMsgCallback", "ForbidAfterSendMsgCallback"]

UNSUPPORTED = {  # what a user may send and no AI is asked about
    *("TIMSoundElem", "TIMFileElem", "TIMVideoFileElem"),
    *("TIMFaceElem", "TIMLocationElem", "TIMRelayElem"),
}

Json = dict[str, Any]


def _codes(listed: str) -> frozenset[int]:
    return frozenset(map(int, listed.split()))


# https://www.tencentcloud.com/document/product/1047/34348
NETWORK = -1  # our code for a call that brought no answer of Tencent's
# The network, a rate, or trouble of Tencent's own: any message may fare better later.
RETRY = _codes(
    "-1 10002 10006 10023 20004 20005 20018 22006 60007 60008 60011 60013 60014 60018 "
    "60019 70050 70169 70500 80003 90057 90992 91000"
)
# This message may fare better soon; if not, then never, and others are not concerned.
RETRY_MESSAGE = _codes("20027 20028 90994 90995")
STALE_SIG = _codes("20002 60004 60005 70001")  # a new UserSig may mend it

MEANING = {  # of final codes
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
    """A call that Tencent IM refused, or that did not get through.

    `retry`: the same call may succeed later; `about_message`: but only if soon, as the
    trouble is with this one message; `may_have_arrived`: this try, or one before it,
    may have had its effect all the same, so that another might show a message twice.
    """

    def __init__(
        self, command: str, code: int, info: str, may_have_arrived: bool = False
    ) -> None:
        meaning = f" ({MEANING[code]})" if code in MEANING else ""
        super().__init__(f"{command} failed with {code}: {info}{meaning}")
        self.code, self.may_have_arrived = code, may_have_arrived
        self.about_message = code in RETRY_MESSAGE
        self.retry = code in RETRY | RETRY_MESSAGE


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
    kind: str = "question"  # or "stop" (a button), "unsupported" (a voice, a file)

    def data(self) -> Json:
        """Return the fields, for the store."""
        return {name: getattr(self, name) for name in self.__slots__}

    def conversation(self, per_member: bool = False) -> str:
        """Return the key of the chat: who shares an order and a memory.

        Ids hold no tabs (see _name), so two chats never share a key.
        """
        if not self.group:
            return "\t".join(("c2c", self.robot, self.user))
        member = (self.user,) if per_member else ()
        return "\t".join(("group", self.robot, self.group, self.topic, *member))


def parse(
    command: str, event: Json, nicks: Mapping[str, str] | None = None
) -> list[Message]:
    """Return what a callback asks: of nobody, of a robot, or of each robot mentioned.

    `nicks` are the robots' names, by which they may be mentioned. Raises BadEvent.
    Ignored are other callbacks, what robots wrote, and what was not delivered.
    https://www.tencentcloud.com/document/product/1047/68952 (one-to-one)
    https://www.tencentcloud.com/document/product/1047/68953 (group)
    """
    if command not in ("Bot.OnC2CMessage", "Bot.OnGroupMessage"):
        return []
    user = _name(event, "From_Account")
    if user.upper().startswith(ROBOT) or str(event.get("SendMsgResult", 0)) != "0":
        return []
    content = _content(event.get("MsgBody"))
    found = _c2c if command == "Bot.OnC2CMessage" else _group
    messages = found(event, user, content, nicks or {})
    return [m for m in messages if m.text or m.images or m.kind != "question"]


def _c2c(
    event: Json, user: str, content: Json, nicks: Mapping[str, str]
) -> list[Message]:
    robot = _name(event, "To_Account")
    if not robot.startswith(ROBOT):
        return []
    numbers = [_number(event, name) for name in ("MsgSeq", "MsgRandom", "MsgTime")]
    return [Message("\t".join((robot, user, *numbers)), robot, user, **content)]


def _group(
    event: Json, user: str, content: Json, nicks: Mapping[str, str]
) -> list[Message]:
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
    names = [*robots, *(nicks[name] for name in robots if nicks.get(name))]
    content = content | {"text": cut_mentions(content["text"], names)}
    content |= {"group": group, "topic": topic}
    return [
        Message("\t".join((robot, group, topic, *numbers)), robot, user, **content)
        for robot in robots
    ]


def cut_mentions(text: str, names: Iterable[str]) -> str:
    """Return the text without `@name`, for every name, wherever it stands.

    If none is there, a single mention at the start is a name that we do not know.
    """
    cut = text
    for name in sorted(names, key=len, reverse=True):
        mention = rf"[@＠]{re.escape(name)}(?![A-Za-z0-9_])\s?"
        cut = re.sub(mention, "", cut, flags=re.IGNORECASE)
    if cut == text:
        cut = re.sub(r"^\s*[@＠]\S+(?:\s+(?![\s@＠])|\s*\Z)", "", text)
    return cut.strip()


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


def _content(body: Any) -> Json:
    """Return text, images and kind of a MsgBody."""
    found = _elements(body)
    texts = [_text(content) for content in found["TIMTextElem"]]
    images = [_image(content) for content in found["TIMImageElem"]]
    kind = "question"
    if any(_presses_stop(content) for content in found["TIMCustomElem"]):
        kind = "stop"
    elif UNSUPPORTED & found.keys() and not texts and not any(images):
        kind = "unsupported"
    text = "\n".join(texts).strip()
    return {"text": text, "images": tuple(filter(None, images)), "kind": kind}


def _elements(body: Any) -> defaultdict[str, list[Json]]:
    """Return the contents of a MsgBody's elements, by their MsgType."""
    if not isinstance(body, list) or not all(isinstance(item, dict) for item in body):
        raise BadEvent("MsgBody is not a list of objects")
    found: defaultdict[str, list[Json]] = defaultdict(list)
    for element in body:
        name, content = element.get("MsgType"), element.get("MsgContent")
        if not isinstance(name, str) or not isinstance(content, dict):
            raise BadEvent("an element of MsgBody lacks its MsgType or MsgContent")
        found[name].append(content)
    return found


def _text(content: Json) -> str:
    if not isinstance(content.get("Text"), str):
        raise BadEvent("a TIMTextElem has no Text")
    return clean(content["Text"])


def _image(content: Json) -> str:
    """Return the URL of a picture: rather the large than the original or a thumb."""
    infos = content.get("ImageInfoArray")
    infos = infos if isinstance(infos, list) else []
    infos = [item for item in infos if isinstance(item, dict)]
    for size in (2, 1, 3):
        for info in infos:
            if info.get("Type") == size and isinstance(info.get("URL"), str):
                return clean(info["URL"])
    return ""


def _presses_stop(content: Json) -> bool:
    """Return whether a custom element is the stop button of TUIKit's AI answers."""
    try:
        signal = json.loads(content["Data"])
        return bool(signal["chatbotPlugin"] == 2 and signal["src"] == 22)
    except (TypeError, ValueError, KeyError, IndexError, RecursionError):
        return False


def clean(text: str) -> str:
    """Return the text without what UTF-8 or an AI service cannot hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


class Client:
    """Tencent IM's REST API, for any number of threads."""

    def __init__(
        self, url: str, sdkappid: int, key: str, admin: str, threads: int = 64
    ) -> None:
        url = url.rstrip("/")
        self.url, self.sdkappid, self._key, self.admin = url, sdkappid, key, admin
        self._sig, self._renew_at = "", 0.0
        self._lock = threading.Lock()
        self._session = Session(url, threads)

    def send(
        self,
        message: Message,
        element: Json,
        order: int,
        part: int,
        mention: bool = False,
    ) -> Json:
        """Send one element as the robot of `message` and return Tencent's answer.

        A group message may mention the asker. Raises IMError.
        https://www.tencentcloud.com/document/product/1047/34919 (one-to-one)
        https://www.tencentcloud.com/document/product/1047/34959 (group)
        """
        seq, msg_random = numbers(message.id, order, part)
        body = chat_fields(message) | {
            "From_Account": message.robot,
            "MsgBody": [element],
            "ForbidCallbackControl": FORBID,
        }
        if not message.group:
            body |= {"MsgSeq": seq, "MsgRandom": msg_random, "SyncOtherMachine": 2}
            return self.call("openim/sendmsg", body)
        asker = {"GroupAtAllFlag": 0, "GroupAt_Account": message.user}
        body |= {"Random": msg_random} | ({"GroupAtInfo": [asker]} if mention else {})
        return self.call("group_open_http_svc/send_group_msg", body)

    def create_robot(self, userid: str, nick: str = "") -> None:
        """Create a chatbot account; doing it again changes nothing. Raises IMError."""
        if not userid.startswith(ROBOT) or len(userid.encode()) > 32:
            raise ValueError(
                f"{userid!r} cannot be a robot: its UserID must start with {ROBOT} "
                "and have at most 32 bytes"
            )
        body = {"UserID": userid} | ({"Nick": nick} if nick else {})
        self.call("openim_robot_http_svc/create_robot", body)

    def delete_robot(self, userid: str) -> None:
        """Delete a chatbot account. Raises IMError."""
        self.call("openim_robot_http_svc/delete_robot", {"Robot_Account": userid})

    def robots(self) -> list[str]:
        """Return the UserIDs of the app's chatbot accounts. Raises IMError."""
        answer = self.call("openim_robot_http_svc/get_all_robots", {})
        return [str(userid) for userid in answer.get("Robot_Account") or []]

    def call(self, command: str, body: Json, waits: Sequence[float] = PAUSES) -> Json:
        """Make a REST call and return Tencent's answer.

        Where that may help, it is made again after each of `waits` seconds.

        Raises IMError. https://www.tencentcloud.com/document/product/1047/34620
        """
        data = json.dumps(body, ensure_ascii=False).encode()
        pauses, renewed, arrived = list(waits), False, False
        while True:
            sig = self._user_sig()
            try:
                return self._post(command, data, sig)
            except IMError as error:
                arrived = error.may_have_arrived = arrived or error.may_have_arrived
                if error.code in STALE_SIG and not renewed:
                    renewed = True
                    self._drop(sig)
                elif error.retry and pauses:
                    time.sleep(pauses.pop(0) * random.uniform(0.75, 1.25))
                else:
                    raise

    def _post(self, command: str, data: bytes, sig: str) -> Json:
        url = (
            f"{self.url}/v4/{command}?sdkappid={self.sdkappid}&contenttype=json"
            f"&identifier={quote(self.admin)}&usersig={quote(sig)}"
            f"&random={random.getrandbits(32)}"
        )
        limits = (CONNECT_TIMEOUT, CALL_TIMEOUT)
        try:
            with CancelScope(CALL_TIMEOUT):
                response = self._session.post(url, data, headers={}, timeout=limits)
        except (requests.RequestException, CallEnded) as error:
            # Its text holds the URL with the UserSig: only its name may be told.
            reason = f"no answer ({type(error).__name__})"
            raise IMError(command, NETWORK, reason, _was_sent(error)) from None
        return _verdict(command, response)

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


def _was_sent(error: Exception) -> bool:
    """Return whether the call may have left: there was an address and a connection."""
    cause = error.args[0] if error.args else None
    return not isinstance(error, ValueError) and not isinstance(cause, MaxRetryError)


def _verdict(command: str, response: requests.Response) -> Json:
    """Return Tencent's answer, or raise the IMError that it is."""
    try:
        answer = response.json()
        code = int(answer["ErrorCode"])
        ok = answer["ActionStatus"] == "OK" and code == 0
    except (ValueError, TypeError, KeyError, RecursionError):
        status = f"HTTP {response.status_code} without Tencent's JSON"
        raise IMError(command, NETWORK, status, may_have_arrived=True) from None
    if not ok:
        raise IMError(command, code, str(answer.get("ErrorInfo"))[:200])
    if answer.get("MsgDropReason"):
        raise IMError(command, 10023, f"dropped: {answer['MsgDropReason']}"[:200])
    return dict(answer)


def chat_fields(message: Message) -> Json:
    """Return the fields by which a call names the chat of a message."""
    if message.group:
        topic = {"TopicId": message.topic} if message.topic else {}
        return {"GroupId": message.group} | topic
    return {"From_Account": message.robot, "To_Account": message.user}


def numbers(id: str, order: int, part: int) -> tuple[int, int]:
    """Return (MsgSeq, MsgRandom) of one part of the answer to one message.

    They are the same at every try: so Tencent knows a repetition. MsgSeq grows from
    part to part and from answer to answer: so clients can sort what one second brings.
    """
    digest = hashlib.sha256(f"{id}\t{part}".encode()).digest()
    return (order * PARTS + part) % 2**32, int.from_bytes(digest[:4])


def text_element(text: str) -> Json:
    """Return the element of a plain text."""
    return {"MsgType": "TIMTextElem", "MsgContent": {"Text": text}}
