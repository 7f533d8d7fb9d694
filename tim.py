"""Tencent IM: a callback's JSON becomes Messages, an answer becomes REST calls.

`parse` reads what Tencent sends to us, `Client` speaks to Tencent, and the classes in
MODES are the ways to show an answer. A retry repeats the same bytes with the same
numbers, and Tencent drops what it has already: a call whose answer was lost is safe to
make again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import requests

from session import open_session
from usersig import gen_user_sig

ROBOT = "@RBT#"  # how the UserID of every chatbot account starts
LONGEST_ID = 128  # characters; Tencent's own limits are lower
TIMEOUT = (5, 10)  # seconds to connect, and between two bytes of an answer
PAUSES = (0.3, 1.5)  # seconds before the second and the third try of a call
SIG_LIFE = 7 * 86400  # seconds a UserSig is made for; it is renewed at half of that
PART_BYTES = 9000  # of UTF-8 JSON in one message; Tencent refuses more than 12 KB
PARTS = 128  # numbers set apart for the parts of one answer

Json = dict[str, Any]
logger = logging.getLogger(__name__)

# https://www.tencentcloud.com/document/product/1047/34348
NETWORK = -1  # our code for a call that brought no answer of Tencent's
RETRY = frozenset(
    [NETWORK, 10002, 10006, 10023, 20004, 20005, 20018, 20027, 20028, 22006, 60007]
    + [
        70050,
        60008,
        60011,
        60013,
        60014,
        60018,
        60019,
        70169,
        70500,
        80003,
        90057,
        90992,
    ]
    + [90994, 90995, 91000]
)
STRANGE = frozenset(
    ["TIMSoundElem", "TIMFileElem", "TIMVideoFileElem", "TIMFaceElem"]
    + ["TIMLocationElem", "TIMRelayElem"]
)
STALE_SIG = frozenset([20002, 60004, 60005, 70001])
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
        self.unsure = False  # whether an earlier try may have had its effect

    @property
    def retry(self) -> bool:
        """Whether the same call may succeed later."""
        return self.code in RETRY


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
    kind: str = "question"  # or "stop" (a button), "strange" (a voice, a file, a face)

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
    if user.startswith(ROBOT) or str(event.get("SendMsgResult", 0)) != "0":
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
    if not isinstance(body, list) or not all(isinstance(item, dict) for item in body):
        raise BadEvent("MsgBody is not a list of objects")
    texts, images, kind = [], [], "question"
    for element in body:
        name, content = element.get("MsgType"), element.get("MsgContent")
        if not isinstance(name, str) or not isinstance(content, dict):
            raise BadEvent("an element of MsgBody lacks its MsgType or MsgContent")
        if name == "TIMTextElem":
            texts.append(_text(content))
        elif name == "TIMImageElem":
            images += _image(content)
        elif name == "TIMCustomElem":
            kind = "stop" if _presses_stop(content.get("Data")) else kind
        elif name in STRANGE:
            kind = "strange"
    kind = "question" if kind == "strange" and (texts or images) else kind
    return {"text": "\n".join(texts).strip(), "images": tuple(images), "kind": kind}


def _text(content: Json) -> str:
    if not isinstance(content.get("Text"), str):
        raise BadEvent("a TIMTextElem has no Text")
    return clean(content["Text"])


def _image(content: Json) -> list[str]:
    """Return the URL of a picture: rather the large than the original or a thumb."""
    infos = content.get("ImageInfoArray")
    infos = (
        [item for item in infos if isinstance(item, dict)]
        if type(infos) is list
        else []
    )
    for size in (2, 1, 3):
        for info in infos:
            if info.get("Type") == size and isinstance(info.get("URL"), str):
                return [clean(info["URL"])]
    return []


def _presses_stop(data: Any) -> bool:
    """Return whether a custom element is the stop button of TUIKit's AI answers."""
    try:
        signal = json.loads(data)
        return bool(signal["chatbotPlugin"] == 2 and signal["src"] == 22)
    except (TypeError, ValueError, KeyError, IndexError, RecursionError):
        return False


def clean(text: str) -> str:
    """Return the text without what UTF-8 or an AI service cannot hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def measure(text: str) -> int:
    """Return the bytes of a text in JSON within JSON, as a custom element holds it."""
    inner = json.dumps(text, ensure_ascii=False)
    return len(json.dumps(inner, ensure_ascii=False).encode("utf-8", "replace"))


_BREAKS = [r"\n\s*\n", r"\n", r"[。！？!?；;]+|\.\s", r"[，,、\s]"]
_FLAGS = re.compile("[\U0001f1e6-\U0001f1ff]+\\Z")
_FENCE = re.compile(r"^ {0,3}(```+|~~~+)[^`\n]*$", re.MULTILINE)
_TABLE = re.compile(r"(?:^|\n)(\|.*\n\|[ :|-]+\n)(?:\|.*\n)*\Z")


def split(text: str, limit: int = PART_BYTES) -> list[str]:
    """Return the text in parts of at most `limit` bytes as `measure` counts them.

    It breaks at paragraphs, lines, sentences, words or characters, whichever is found
    first in the second half of a part. A code block or a table that is cut is closed
    and opened again; apart from that the parts are the text.
    """
    parts, again = [], ""
    while len(text) > limit or measure(again + text) > limit:
        end = _break(text, _fitting(again, text, limit - 20))
        part, text = again + text[:end], text[end:]
        closing, again = _reopen(part, limit)
        parts.append(part + closing)
    return [*parts, again + text]


def _fitting(again: str, text: str, limit: int) -> int:
    """Return how many characters of the text fit, at least one."""
    low, high = 1, min(len(text), limit)
    while low < high:
        middle = (low + high + 1) // 2
        if measure(again + text[:middle]) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def _break(text: str, end: int) -> int:
    """Return the best place to cut, at most `end`."""
    half = text[end // 2 : end]
    for pattern in _BREAKS:
        for found in reversed([*re.finditer(pattern, half)]):
            if _boundary(text, end // 2 + found.end()):
                return end // 2 + found.end()
    nearby = range(end, max(0, end - 200), -1)
    return next((place for place in nearby if _boundary(text, place)), end)


def _boundary(text: str, place: int) -> bool:
    """Return whether no grapheme spans this place."""
    before, after = text[place - 1], text[place : place + 1]
    if not after:
        return True
    flags = _FLAGS.search(text, max(0, place - 50), place)
    return not (
        "\u200d" in (before, after)  # a family of emoji
        or unicodedata.category(after)[0] == "M"  # an accent, a keycap
        or "\U0001f3fb" <= after <= "\U0001f3ff"  # a skin tone
        or "\U000e0020" <= after <= "\U000e007f"  # a tag, as of Scotland's flag
        or ("\u1100" <= before <= "\u11ff" and "\u1100" <= after <= "\u11ff")  # jamo
        or (flags and len(flags[0]) % 2 and _FLAGS.match(after))  # half of a flag
        or before + after == "\r\n"
    )


def _reopen(part: str, limit: int) -> tuple[str, str]:
    """Return what closes a code block or table that a part cuts, what reopens it."""
    fence = ""
    for found in _FENCE.finditer(part):
        fence = "" if fence else found[0]
    closing, again = "", ""
    if fence:
        mark = fence.strip()[:3]
        closing = mark if part.endswith("\n") else f"\n{mark}"
        again = f"{fence}\n"
    elif table := _TABLE.search(part):
        again = table[1]
    return (closing, again) if measure(again) < limit // 4 else (closing, "")


class Client:
    """Tencent IM's REST API, for any number of threads."""

    def __init__(
        self, url: str, sdkappid: int, key: str, admin: str, threads: int = 64
    ) -> None:
        url = url.rstrip("/")
        self.url, self.sdkappid, self._key, self.admin = url, sdkappid, key, admin
        self._sig, self._renew_at = "", 0.0
        self._lock = threading.Lock()
        self._session = open_session(url, threads)

    def send(
        self, message: Message, element: Json, order: int, part: int, mention: bool
    ) -> Json:
        """Send one element as the robot of `message` and return Tencent's answer.

        A group message may mention the asker. Raises IMError.
        """
        seq, chance = numbers(message.id, order, part)
        body: Json = {
            "From_Account": message.robot,
            "MsgBody": [element],
            "ForbidCallbackControl": [
                "ForbidBeforeSendMsgCallback",
                "ForbidAfterSendMsgCallback",
            ],
        }
        if not message.group:
            body |= {"To_Account": message.user, "MsgSeq": seq, "MsgRandom": chance}
            return self.call("openim/sendmsg", body | {"SyncOtherMachine": 2})
        body |= {"GroupId": message.group, "Random": chance} | _topic(message)
        if mention:
            asker = {"GroupAtAllFlag": 0, "GroupAt_Account": message.user}
            body["GroupAtInfo"] = [asker]
        return self.call("group_open_http_svc/send_group_msg", body)

    def modify(
        self,
        message: Message,
        key: str | int,
        element: Json,
        waits: Sequence[float],
    ) -> None:
        """Replace a message that `send` sent; `key` is its MsgKey or MsgSeq."""
        body: Json = {"MsgBody": [element]}
        if message.group:
            body |= {"GroupId": message.group, "MsgSeq": key} | _topic(message)
            command = "openim/modify_group_msg"
        else:
            body |= {"From_Account": message.robot, "To_Account": message.user}
            body["MsgKey"] = key
            command = "openim/modify_c2c_msg"
        self.call(command, body, waits)

    def stream(
        self, message: Message, content: Json, order: int, waits: Sequence[float]
    ) -> Json:
        """Send the first or another chunk of a message that streams.

        https://cloud.tencent.com/document/product/269/128596 (and /128597 for groups)
        """
        seq, chance = numbers(message.id, order, 0)
        body: Json = {
            "From_Account": message.robot,
            "MsgRandom": chance,
            "MsgBody": [{"MsgType": "TIMStreamElem", "MsgContent": content}],
        }
        if message.group:
            body |= {"GroupId": message.group} | _topic(message)
            command = "stream_msg/send_group_stream_msg"
        else:
            body |= {"To_Account": message.user, "MsgSeq": seq, "SyncOtherMachine": 2}
            command = "stream_msg/send_c2c_stream_msg"
        return self.call(command, body, waits)

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
        pauses = list(waits)
        renewed = unsure = False
        while True:
            sig = self._user_sig()
            try:
                return self._post(command, data, sig)
            except IMError as error:
                error.unsure = unsure
                unsure = unsure or error.code == NETWORK
                if error.code in STALE_SIG and not renewed:
                    renewed = True
                    self._drop(sig)
                elif error.retry and pauses:
                    time.sleep(pauses.pop(0) * random.uniform(0.75, 1.25))
                else:
                    raise

    def _post(self, command: str, data: bytes, sig: str) -> Json:
        query = (
            f"sdkappid={self.sdkappid}&identifier={quote(self.admin)}"
            f"&usersig={quote(sig)}&random={random.getrandbits(32)}&contenttype=json"
        )
        try:
            url = f"{self.url}/v4/{command}?{query}"
            response = self._session.post(url, data, {}, TIMEOUT)
        except requests.RequestException as error:
            # Its text holds the URL with the UserSig: only its name may be told.
            kind = type(error).__name__
            raise IMError(command, NETWORK, f"no answer ({kind})") from None
        return self._verdict(command, response)

    @staticmethod
    def _verdict(command: str, response: requests.Response) -> Json:
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


def _topic(message: Message) -> Json:
    return {"TopicId": message.topic} if message.topic else {}


def numbers(id: str, order: int, part: int) -> tuple[int, int]:
    """Return (MsgSeq, MsgRandom) of one part of the answer to one message.

    They are the same at every try: so Tencent knows a repetition. MsgSeq grows from
    part to part and from answer to answer: so clients can sort what one second brings.
    """
    chance = hashlib.sha256(f"{id}\t{part}".encode()).digest()[:4]
    return (order * PARTS + part) % 2**32, int.from_bytes(chance)


class Whole:
    """An answer on the screen: sent when it is complete, in as many parts as it needs.

    The classes below show it while it grows. A fifth way is another class with these
    methods. `open` and `close` raise IMError where another try may help. What was
    begun is closed: if IM refuses a growing message, the text goes as plain messages.
    """

    gap = 0.0  # seconds between two calls of grow; 0 if it does not grow
    idle = math.inf  # seconds of silence after which it needs a nudge
    limit = PART_BYTES

    def __init__(
        self,
        client: Client,
        message: Message,
        order: int,
        progress: Json,
        save: Callable[[Json], None],
        broken: str = "…",
    ) -> None:
        self.client, self.message, self.order = client, message, order
        self.progress = progress  # what an earlier process did, and what we do
        self._save = save
        self.broken = broken  # what to say of text that another answer replaces
        self.spoke = time.monotonic()
        self.parts = 0  # of the answer, when it is closed
        self._mention = f"@{message.user} " if message.group else ""

    def open(self) -> None:
        """Show that an answer is coming. Raises IMError."""

    def grow(self, text: str) -> None:
        """Show the answer so far."""

    def nudge(self) -> None:
        """Show a sign of life, where Tencent would else close the message."""

    def close(self, text: str) -> None:
        """Show the whole answer, marked as complete. Raises IMError.

        If progress has `failed`, the text is not an answer but says why there is none.
        """
        self._send_parts(self._split(text), 0)

    def _split(self, text: str) -> list[str]:
        return split(self._mention + text, self.limit)

    def _send_parts(self, parts: list[str], first: int) -> None:
        self.parts = len(parts)
        for number in range(max(first, self.progress.get("sent", 0)), len(parts)):
            mention = bool(self._mention) and number == 0
            if text := parts[number].strip("\n"):
                element = text_element(text)
                # Number 0 is that of a growing message.
                self.client.send(self.message, element, self.order, number + 1, mention)
            if number + 1 < len(parts):
                self._note(sent=number + 1)

    def _note(self, **progress: Any) -> None:
        self.progress |= progress
        self._save(self.progress)

    def _not_growing(self, error: Exception) -> None:
        """Go on with plain messages; raise an IMError that another try may mend.

        An earlier try may show the message already: then it must not stay open.
        """
        if isinstance(error, IMError) and error.retry:
            raise error
        logger.warning("%s is not shown growing: %s", self.message.id, error)
        self.progress["plain"] = True


class Modified(Whole):
    """A message that is edited until it holds the answer, or its first part."""

    gap = 1.0

    def open(self) -> None:
        if "key" in self.progress:
            return
        try:
            # Always the same, so that after a crash Tencent names the same message.
            first = self.element("", False)
            answer = self.client.send(self.message, first, self.order, 0, True)
            self._note(key=answer["MsgSeq" if self.message.group else "MsgKey"])
        except (IMError, KeyError) as error:
            self._not_growing(error)

    def grow(self, text: str) -> None:
        if "key" in self.progress:
            try:
                self._modify(self.element(self._split(text)[0], False), ())
            except IMError as error:
                logger.info("%s: an edit failed: %s", self.message.id, error)

    def close(self, text: str) -> None:
        parts, first = self._split(text), 0
        if "key" in self.progress:
            try:
                self._modify(self.element(parts[0], True), PAUSES)
                first = 1
            except IMError as error:
                self._not_growing(error)
        self._send_parts(parts, first)

    def _modify(self, element: Json, waits: Sequence[float]) -> None:
        self.client.modify(self.message, self.progress["key"], element, waits)

    def element(self, text: str, finished: bool) -> Json:
        """Return the element that shows `text`."""
        return text_element(text if finished else f"{text}…")


class Custom(Modified):
    """The element that Tencent's TUIKit draws as an AI's answer, with a stop button.

    https://cloud.tencent.com/document/product/269/122036
    """

    def element(self, text: str, finished: bool) -> Json:
        data: Json = {"chatbotPlugin": 2, "src": 2, "chunks": [text] if text else []}
        if "failed" in self.progress:
            data = {"chatbotPlugin": 2, "src": 23, "errorInfo": text}
        shown = json.dumps(data | {"isFinished": int(finished)}, ensure_ascii=False)
        content = {"Data": shown, "Desc": text[:50] or "…"}
        return {"MsgType": "TIMCustomElem", "MsgContent": content}


class Streamed(Whole):
    """Tencent's own streaming message, to which text can only be added."""

    gap = 0.2
    limit = 100_000  # bytes; Tencent refuses a stream of 128 KB
    idle = 8.0  # seconds until a sign of life; Tencent closes a stream after 15
    old_client = "…"  # what clients show that know no streams

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._lock = threading.Lock()
        self._said = self.progress.get("said", "")  # and confirmed by Tencent
        self._pending: str | None = None  # sent, but not confirmed
        self._index = self.progress.get("index", 0)
        self._confirmed = -math.inf  # when Tencent last took something of us

    def open(self) -> None:
        try:
            if "key" not in self.progress:
                self._note(key=self._push("", waits=PAUSES)["StreamMsgID"])
            self._take_over()
        except (IMError, KeyError) as error:
            self._not_growing(error)

    def _flows(self) -> bool:
        return "key" in self.progress and "plain" not in self.progress

    def _take_over(self) -> None:
        """Close what a dead process began: nobody knows how much it had said."""
        if self._index == 0:
            self._index = 100_000
            self._push(f"\n\n{self.broken}", last=True, waits=PAUSES)
            self._not_growing(InterruptedError("the process that began it died"))

    def grow(self, text: str) -> None:
        self._try_push(self._split(text)[0])

    def nudge(self) -> None:
        self._try_push(self._said, empty=True)

    def _try_push(self, text: str, empty: bool = False) -> None:
        with self._lock:
            if not self._flows() or not text.startswith(self._said):
                return
            if empty and time.monotonic() - self.spoke <= self.idle:
                return  # somebody else spoke, or the stream is closed
            try:
                if self._pending is not None:
                    self._push(self._pending)
                elif empty or text != self._said:
                    self._push(text[len(self._said) :])
            except IMError as error:
                if not error.retry:
                    self._not_growing(error)

    def close(self, text: str) -> None:
        parts = self._split(text)
        with self._lock:
            complete = False
            if self._flows():
                self.open()  # if a process died after it kept the answer
            if self._flows():
                self._note(said=self._said, index=self._index)
                complete = self._complete(parts[0])
            self.idle = math.inf
        if complete:
            return self._send_parts(parts, 1)
        # What the stream does not show goes as plain messages.
        text = "".join(parts)
        known = len(self._said) if text.startswith(self._said) else 0
        self._send_parts(split(text[known:]), 0)

    def _complete(self, text: str) -> bool:
        """Say the rest and close the stream; False if that cannot be done.

        In doubt, as after a crash, the end may be said twice: better than never.
        """
        fresh = time.monotonic() - self._confirmed < self.idle
        try:
            if self._pending is not None:
                self._push(self._pending, waits=PAUSES)
            fits = text.startswith(self._said)
            rest = text[len(self._said) :] if fits else f"\n\n{self.broken}"
            self._push(rest, last=True, waits=PAUSES)
            return fits
        except IMError as error:
            self._not_growing(error)
            return error.unsure and fresh  # then an earlier try has closed it

    def _push(self, text: str, last: bool = False, waits: Sequence[float] = ()) -> Json:
        if self._pending is None:
            self._index += 1
        self._pending, self.spoke = text, time.monotonic()
        chunk = {"EventType": "data", "Index": self._index}
        chunk |= {"Markdown": text, "IsLast": last}
        content: Json = {"CompatibleText": self.old_client, "Chunks": [chunk]}
        if "key" in self.progress:
            content["StreamMsgID"] = self.progress["key"]
        answer = self.client.stream(self.message, content, self.order, waits)
        self._said, self._pending = self._said + text, None
        self._confirmed = time.monotonic()
        return answer


MODES = {"whole": Whole, "modify": Modified, "custom": Custom, "stream": Streamed}


def text_element(text: str) -> Json:
    """Return the element of a plain text."""
    return {"MsgType": "TIMTextElem", "MsgContent": {"Text": text}}
