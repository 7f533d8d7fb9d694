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
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

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
LONGEST_QUOTE = 500  # characters of the message that a question replies to
PARTS = 1024  # values of MsgSeq set apart for the messages of one answer
NO_CALLBACKS = ["ForbidBeforeSendMsgCallback", "ForbidAfterSendMsgCallback"]

UNSUPPORTED = frozenset(  # what a user may send and no AI is asked about
    "TIMSoundElem TIMFileElem TIMVideoFileElem TIMFaceElem TIMLocationElem "
    "TIMRelayElem".split()
)

Json = dict[str, Any]


def _codes(listed: str) -> frozenset[int]:
    return frozenset(map(int, listed.split()))


# https://www.tencentcloud.com/document/product/1047/34348
NETWORK = -1  # our code for a call that brought no answer of Tencent's
# The network, a rate limit, or an error inside Tencent: a later try may succeed.
RETRY = _codes(
    "-1 10002 10006 10023 20004 20005 20018 22006 60007 60008 60011 60013 60014 60018 "
    "60019 70050 70169 70500 80003 90057 90992 91000"
)
# Trouble with this one message: a try soon may succeed, a late one will not.
RETRY_MESSAGE = _codes("20027 20028 90994 90995")
STALE_SIG = _codes("20002 60004 60005 70001")  # a new UserSig may mend it

MEANINGS = {  # of final codes, for the operator
    "10007": "the robot may not do this; is it a member of the group?",
    "10008": "not an app admin, or the app has all the robots it may have",
    "10010 10015": "the group does not exist",
    "10016 20006": "refused by the app's own before-callback",
    "10017": "the robot is muted in the group",
    "20003 70107 90012 90048": "the sender or the receiver does not exist",
    "60006 70020": "IM_SDKAPPID is not a valid app",
    "60010 90009": "IM_ADMIN is not an admin of this app",
    "60016": "the app is disabled",
    "60020": "the service is stopped: the package has expired or is unpaid",
    "60021": "this server's address is not on the app's list",
    "60026": "the app lives in another region: set IM_API_URL to that region's domain",
    "60028": "the trial edition's messages of the last 24 hours are used up",
    "70009": "IM_KEY is not the key of this app",
    "70398": "the edition allows no more accounts",
    "80001": "the text was stopped by the sensitive-word filter",
    "80002 93000": "the message is too long",
    "90008": "the robot does not exist: create it first",
}
MEANING = {code: text for codes, text in MEANINGS.items() for code in _codes(codes)}


class BadEvent(ValueError):
    """A callback's JSON that is not as Tencent documents it; the text says where."""


class IMError(Exception):
    """A call that Tencent IM refused, or that did not get through.

    `retry`: the same call may succeed later; `about_message`: only soon, and the
    trouble is with this message alone; `may_have_arrived`: this try, or one before it,
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
    # or "stop" (a button), "unsupported" (a voice, a file), "said" (by the robot, of
    # itself), "missed" (no message, but work of missed.py)
    kind: str = "question"
    sent: float = 0.0  # Unix seconds, by Tencent's clock; within a second by MsgSeq
    quote: str = ""  # of the message that it replies to

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


def parse(command: str, event: Json, nicks: Mapping[str, str] = {}) -> list[Message]:
    """Return the messages of a callback: one for each robot that it is for.

    `nicks` are the robots' names, by which they may be mentioned. Raises BadEvent.
    Ignored are other callbacks, what robots wrote, and what was not delivered.
    https://www.tencentcloud.com/document/product/1047/68952 (one-to-one)
    https://www.tencentcloud.com/document/product/1047/68953 (group)
    """
    if command not in ("Bot.OnC2CMessage", "Bot.OnGroupMessage"):
        return []
    user = _id(event, "From_Account")
    if user.upper().startswith(ROBOT) or str(event.get("SendMsgResult", 0)) != "0":
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
    content = (text, group, topic, images, kind, sent, quote)
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


class Client:
    """Tencent IM's REST API, for any number of threads."""

    def __init__(
        self, url: str, sdkappid: int, key: str, admin: str, threads: int = 64
    ) -> None:
        url = url.rstrip("/")
        self.url, self.sdkappid, self._key, self.admin = url, sdkappid, key, admin
        self._sig, self._renew_at = "", 0.0
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
        body = message_body(message, element, order, part)
        body["ForbidCallbackControl"] = NO_CALLBACKS
        if not message.group:
            return self.call("openim/sendmsg", body)
        body["Random"] = body.pop("MsgRandom")
        if mention and message.user:
            asker = {"GroupAtAllFlag": 0, "GroupAt_Account": message.user}
            body["GroupAtInfo"] = [asker]
        return self.call("group_open_http_svc/send_group_msg", body)

    def robots(self) -> list[str]:
        """Return the UserIDs of the app's chatbot accounts. Raises IMError."""
        listed = self.call("openim_robot_http_svc/get_all_robots", {})
        return [str(userid) for userid in listed.get("Robot_Account") or []]

    def call(self, command: str, body: Json, waits: Sequence[float] = PAUSES) -> Json:
        """Make a REST call and return Tencent's answer.

        If another try may help, there is one after each of `waits` seconds.
        Raises IMError. https://www.tencentcloud.com/document/product/1047/34620
        """
        data = json.dumps(body, ensure_ascii=False).encode()
        pauses, renewed, arrived = list(waits), False, False
        while True:
            try:
                return self._post(command, data)
            except IMError as error:
                arrived = error.may_have_arrived = arrived or error.may_have_arrived
                if error.code in STALE_SIG and not renewed:
                    renewed, self._renew_at = True, 0.0
                elif error.retry and pauses:
                    time.sleep(pauses.pop(0) * random.uniform(0.75, 1.25))
                else:
                    raise

    def _post(self, command: str, data: bytes) -> Json:
        # A UserSig needs no quoting, and urllib3 goes byte by byte where it finds a %.
        url = (
            f"{self.url}/v4/{command}?sdkappid={self.sdkappid}&contenttype=json"
            f"&identifier={quote(self.admin)}&usersig={self._user_sig()}"
            f"&random={random.getrandbits(32)}"
        )
        limits = (CONNECT_TIMEOUT, CALL_TIMEOUT)
        try:
            with CancelScope(CALL_TIMEOUT):
                response = self._session.post(url, data, headers={}, timeout=limits)
                _ = response.content  # reads it
        except (requests.RequestException, CallEnded) as error:
            # Its text holds the URL with the UserSig: only its name may be told.
            reason = f"no answer ({type(error).__name__})"
            no_address = isinstance(error, ValueError)
            no_connection = any(isinstance(arg, MaxRetryError) for arg in error.args)
            sent = not (no_address or no_connection)
            raise IMError(command, NETWORK, reason, may_have_arrived=sent) from None
        return _read_answer(command, response)

    def _user_sig(self) -> str:
        """Return a UserSig. Two threads may make one each at a time: both are valid."""
        if time.time() > self._renew_at:
            self._sig = gen_user_sig(self.sdkappid, self._key, self.admin, SIG_LIFE)
            self._renew_at = time.time() + SIG_LIFE / 2
        return self._sig


def _read_answer(command: str, response: requests.Response) -> Json:
    """Return Tencent's answer; raise IMError if it is a refusal, or none at all."""
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


def message_body(message: Message, element: Json, order: int, part: int) -> Json:
    """Return the body of a call that sends an element as the robot of `message`."""
    seq, msg_random = numbers(message.id, order, part)
    body = chat_fields(message) | {
        "From_Account": message.robot,
        "MsgRandom": msg_random,
        "MsgBody": [element],
    }
    one_to_one = {"MsgSeq": seq, "SyncOtherMachine": 2}  # in groups Tencent sets it
    return body if message.group else body | one_to_one


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
