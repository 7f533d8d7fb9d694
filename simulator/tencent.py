"""Tencent's side: REST calls, checked as strictly as Tencent documents them.

Every call is checked for its fields, their types and sizes, and its UserSig, answered
with Tencent's error codes, and known again if it is repeated. What robots have sent
is in `delivered`, as a user sees it now.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from .history import LOOKUPS, OLD_NAMES, History
from .kits import KITS, KitChat
from .messages import Delivered, Json
from .signature import Refused, check_user_sig

# The key that Tencent publishes in the README of its UserSig libraries.
KEY = "5bd2850fff3ecb11d7c805251c51ee463a25727bddc2385f3fa8bfee1bb93b5e"
C2C_WINDOW, GROUP_WINDOW = 120, 300  # seconds in which Tencent knows a repetition
LARGEST_MESSAGE = 12 * 1024  # bytes of a MsgBody
LARGEST_STREAM = 128 * 1024  # bytes
OPENED = re.compile(r"(@\S+ )?…")  # the text of a message that is going to be edited

U32 = range(2**32)
COMMON = {
    "From_Account": str,
    "MsgBody": list,
    "OnlineOnlyFlag": int,
    "ForbidCallbackControl": list,
    "SendMsgControl": list,
    "CloudCustomData": str,
    "OfflinePushInfo": dict,
    "SupportMessageExtension": int,
}
# command -> (required fields, optional fields)
FIELDS: dict[str, tuple[Json, Json]] = {
    "openim/sendmsg": (
        {"To_Account": str, "MsgRandom": U32, "MsgBody": list},
        COMMON
        | dict.fromkeys(("SyncOtherMachine", "MsgLifeTime", "MsgTimeStamp"), int)
        | {"MsgSeq": U32},
    ),
    "group_open_http_svc/send_group_msg": (
        {"GroupId": str, "Random": U32, "MsgBody": list},
        COMMON | {"GroupAtInfo": list, "TopicId": str, "MsgPriority": str},
    ),
    "openim/modify_c2c_msg": (
        {"From_Account": str, "To_Account": str, "MsgKey": str},
        {"MsgBody": list, "CloudCustomData": str},
    ),
    "openim/modify_group_msg": (
        {"GroupId": str, "MsgSeq": int},
        {"MsgBody": list, "CloudCustomData": str, "TopicId": str},
    ),
    "stream_msg/send_c2c_stream_msg": (
        {"From_Account": str, "To_Account": str, "MsgRandom": U32, "MsgBody": list},
        {"SyncOtherMachine": int, "MsgSeq": U32, "CloudCustomData": str},
    ),
    "stream_msg/send_group_stream_msg": (
        {"From_Account": str, "GroupId": str, "MsgRandom": U32, "MsgBody": list},
        {"TopicId": str, "CloudCustomData": str},
    ),
    "openim_robot_http_svc/create_robot": (
        {"UserID": str},
        {"Nick": str, "FaceUrl": str, "SelfSignature": str},
    ),
    "openim_robot_http_svc/delete_robot": ({"Robot_Account": str}, {}),
    "openim_robot_http_svc/get_all_robots": ({}, {}),
    "sns/friend_add": (
        {"From_Account": str, "AddFriendItem": list},
        {"AddType": str, "ForceAddFlags": int},
    ),
    "profile/portrait_get": ({"To_Account": list, "TagList": list}, {}),
    **LOOKUPS,
}


class Tencent(History):
    """Tencent IM for one app, with its users, groups and robots.

    Set `fault` to a function (command, body) that returns an error code, "lost" (no
    answer, no effect) or "late" (effect, but no answer) to break REST calls. With a
    `drop_reason` a repeated group message is answered with that MsgDropReason.
    """

    is_whole: Callable[[str], bool]

    def __init__(self, sdkappid: int, key: str) -> None:
        History.__init__(self)
        self.sdkappid, self.key, self.admin = sdkappid, key, "administrator"
        self.users = {"jared", "lin"}
        self.robots = {"@RBT#001": "Robot", "@RBT#002": "Helper"}
        self.groups = {"@TGS#demo": {"jared", "lin"}}
        self.delivered: list[Delivered] = []
        self.calls: list[tuple[str, Json]] = []
        self.fault: Callable[[str, Json], int | str | None] = lambda command, body: None
        self.im_delay = 0.0  # seconds before an answer
        self.skew = 0.0  # seconds by which Tencent's clock is ahead of ours
        self.drop_reason = ""
        self.friends: defaultdict[str, set[str]] = defaultdict(set)  # user -> robots
        self.closing = False
        self.changed = threading.Condition(threading.RLock())
        self._kits: dict[tuple[str, str], dict[str, KitChat]] = {}
        self._sent: dict[Any, tuple[float, Json]] = {}

    def rest(self, command: str, query: dict[str, str], body: bytes) -> Json | None:
        """Do a REST call and return the answer, or None to give none."""
        try:
            fields = self._checked(command, query, body)
            if self.hangs(command):
                return None
            fault = self.fault(command, fields)
            if isinstance(fault, int):
                raise Refused(fault, "a fault that was asked for")
            if fault == "lost":
                return None
            answer = self._effect(command, fields)
            return None if fault == "late" else answer
        except Refused as error:
            info = str(error)
            return {"ActionStatus": "FAIL", "ErrorCode": error.code, "ErrorInfo": info}

    def _checked(self, command: str, query: dict[str, str], body: bytes) -> Json:
        for name in ("sdkappid", "identifier", "usersig", "random", "contenttype"):
            if not query.get(name):
                raise Refused(60012 if name == "sdkappid" else 60025, f"no {name}")
        if query["contenttype"] != "json" or int(query["random"]) not in U32:
            raise Refused(60025, "contenttype or random is wrong")
        if query["sdkappid"] != str(self.sdkappid):
            raise Refused(70020, "no such app")
        sig = check_user_sig(self.key, query["usersig"])
        if sig["TLS.identifier"] != query["identifier"]:
            raise Refused(70013, "the UserSig is another user's")
        if sig["TLS.sdkappid"] != self.sdkappid:
            raise Refused(70014, "the UserSig is another app's")
        if query["identifier"] != self.admin:
            raise Refused(60010, "not an admin")
        if command not in FIELDS:
            raise Refused(60009, f"no such command: {command}")
        return self._typed(command, body)

    def _typed(self, command: str, body: bytes) -> Json:
        try:
            fields = json.loads(body)
        except ValueError:
            raise Refused(60003, "the body is not JSON") from None
        for old, new in OLD_NAMES.get(command, {}).items():
            if old in fields and new not in fields:
                fields[new] = fields.pop(old)
        required, optional = FIELDS[command]
        for name in required:
            if name not in fields:
                raise Refused(10004, f"{name} is missing")
        for name, value in fields.items():
            kind = (required | optional).get(name)
            if kind is None:
                raise Refused(10004, f"{name} is not a field of {command}")
            if kind is U32:
                fits = type(value) is int and value in U32
            else:
                fits = type(value) is kind
            if not fits:
                raise Refused(10004, f"{name} has the wrong type")
        with self.changed:
            self.calls.append((command, fields))
            self.note_lookup(command, fields)
        return dict(fields)

    def kit_chat(self, kit: str, user: str, robot: str) -> KitChat:
        """Return a one-to-one chat as one of the KITS shows it."""
        with self.changed:
            return self._chats(user, robot)[kit]

    def locked(self) -> dict[str, dict[str, str]]:
        """Return the chats whose input is locked, by kit and "user robot", and why."""
        found: dict[str, dict[str, str]] = {kit: {} for kit in KITS}
        for (user, robot), chats in self._kits.items():
            for kit, chat in chats.items():
                if chat.why:
                    found[kit][f"{user} {robot}"] = chat.why
        return found

    def _chats(self, user: str, robot: str) -> dict[str, KitChat]:
        if (user, robot) not in self._kits:
            self._kits[user, robot] = {kit: KitChat(kit) for kit in KITS}
        return self._kits[user, robot]

    def show_sent(self, event: Json) -> None:
        """Let a user's kits know what he sent to a robot."""
        if "GroupId" not in event:
            for chat in self._chats(
                event["From_Account"], event["To_Account"]
            ).values():
                chat.send(event["MsgBody"])

    def _draw(self, message: Delivered, elements: list[Json], is_growing: bool) -> None:
        """Show what a robot's message says now, as a client of one's own and as kits.

        In the mode "modify" a text grows if it ends in "…".
        """
        message.draw(elements, is_growing)
        if message.chat not in self.groups:
            for chat in self._chats(message.chat, message.robot).values():
                chat.show(message.key, elements)

    def _effect(self, command: str, body: Json) -> Json:
        with self.changed:
            match command.rpartition("/")[2]:
                case "sendmsg":
                    answer = self._sendmsg(body)
                case "send_group_msg":
                    answer = self._send_group_msg(body)
                case "modify_c2c_msg" | "modify_group_msg":
                    answer = self._modify(body)
                case "send_c2c_stream_msg" | "send_group_stream_msg":
                    answer = self._stream(body)
                case "create_robot":
                    answer = self._create_robot(body)
                case "delete_robot":
                    if self.robots.pop(body["Robot_Account"], None) is None:
                        raise Refused(10004, "no such robot")
                    answer = {}
                case "friend_add":
                    answer = self._add_friends(body)
                case "portrait_get":
                    answer = self._profiles(body)
                case "get_list" | "admin_getroammsg" | "group_msg_get_simple":
                    answer = self.look_up(command, body)
                case _:
                    answer = {"Robot_Account": list(self.robots)}
            self.changed.notify_all()
        return {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0, **answer}

    def _sendmsg(self, body: Json) -> Json:
        self._check_message(body, 93000)
        if body["To_Account"] not in self.users:
            raise Refused(90012, "To_Account is not registered")
        seq = body.get("MsgSeq", random.getrandbits(32))
        content = zlib.crc32(json.dumps(body["MsgBody"]).encode())
        sender, receiver = body["From_Account"], body["To_Account"]
        key = (sender, receiver, seq, body["MsgRandom"], content)
        now = time.time()
        name = f"{seq}_{body['MsgRandom']}_{int(now)}"
        answer = {"MsgTime": int(now), "MsgKey": name}
        return self._once(key, C2C_WINDOW, answer, receiver, seq, body, now)

    def _send_group_msg(self, body: Json) -> Json:
        self._check_message(body, 80002)
        if body["GroupId"] not in self.groups:
            raise Refused(10015, "no such group")
        seq = self.next_seq(body["GroupId"])
        key = (body["GroupId"], body["Random"])
        now = time.time()
        answer = {"MsgTime": int(now), "MsgSeq": seq}
        return self._once(key, GROUP_WINDOW, answer, body["GroupId"], seq, body, now)

    def _check_message(self, body: Json, too_long: int) -> None:
        self._check_sender(body)
        self._check_body(body, too_long)

    def _check_sender(self, body: Json) -> None:
        if body.get("From_Account", self.admin) not in {self.admin, *self.robots}:
            raise Refused(90008, "From_Account does not exist")

    def _check_body(self, body: Json, too_long: int) -> None:
        elements = body["MsgBody"]
        if not elements or not all(map(is_element, elements)):
            raise Refused(90002, "MsgBody is not a list of elements")
        if len(json.dumps(elements, ensure_ascii=False).encode()) > LARGEST_MESSAGE:
            raise Refused(too_long, "the message is too long")

    def _once(
        self,
        key: Any,
        window: int,
        answer: Json,
        chat: str,
        number: int,
        body: Json,
        now: float,
    ) -> Json:
        """Show a message, unless Tencent would know it for a repetition."""
        known = self._sent.get(key)
        if known and now - known[0] < window:
            if self.drop_reason and "MsgSeq" in known[1]:
                return known[1] | {"MsgDropReason": self.drop_reason}
            return known[1]
        self._sent[key] = (now, answer)
        name = answer.get("StreamMsgID") or answer.get("MsgKey") or number
        robot, elements = body.get("From_Account", self.admin), body["MsgBody"]
        message = Delivered(robot, chat, number, body, name, born=now)
        self._draw(message, elements, bool(OPENED.fullmatch(text_of(elements))))
        self.delivered.append(message)
        self.remember_sent(message)
        return answer

    def _modify(self, body: Json) -> Json:
        self._check_body(body, 93000)
        chat, elements = body.get("GroupId") or body["To_Account"], body["MsgBody"]
        message = self._find(chat, body.get("MsgKey") or body["MsgSeq"])
        text = text_of(elements)
        self._draw(message, elements, text.endswith("…") and not self.is_whole(text))
        return {}

    def _find(self, chat: str, key: Any) -> Delivered:
        for message in reversed(self.delivered):
            if (message.chat, message.key) == (chat, key):
                return message
        raise Refused(20022, "no such message")

    def _stream(self, body: Json) -> Json:
        content, chunk = streamed(body["MsgBody"])
        chat, answer = body.get("GroupId") or body["To_Account"], {}
        if "StreamMsgID" not in content:
            self._check_sender(body)
            answer = {"StreamMsgID": f"stream-{len(self.delivered)}"}
            key, now = (chat, "stream", body["MsgRandom"]), time.time()
            number = body["MsgSeq"] if "MsgSeq" in body else self.next_seq(chat)
            answer = self._once(key, C2C_WINDOW, answer, chat, number, body, now)
        message = self._find(chat, content.get("StreamMsgID") or answer["StreamMsgID"])
        if chunk["Index"] != message.index:
            self._grow(message, chunk)
        return answer  # also if it was sent before

    def _grow(self, message: Delivered, chunk: Json) -> None:
        """Add a chunk to a stream. Clients ignore one that does not follow the last."""
        if message.index and message.closed:
            message.ended = True
            raise Refused(10004, "the stream is closed")
        whole = message.text + chunk["Markdown"]
        if len(whole.encode()) > LARGEST_STREAM:
            raise Refused(93000, "the stream is too long")
        if chunk["Index"] == message.index + 1:
            message.index = chunk["Index"]
            message.show(whole, chunk["IsLast"])

    def _add_friends(self, body: Json) -> Json:
        """Make robots friends of a user, as only the app's server can."""
        user, found = body["From_Account"], []
        if user not in self.users:
            raise Refused(30003, "From_Account does not exist")
        for item in body["AddFriendItem"]:
            robot, source = item.get("To_Account"), str(item.get("AddSource"))
            if not source.startswith("AddSource_Type_"):
                raise Refused(30001, "AddSource is wrong")
            code = 30520 if robot in self.friends[user] else 0
            if robot not in self.robots:
                code = 30003
            else:
                self.friends[user].add(robot)
            found.append({"To_Account": robot, "ResultCode": code, "ResultInfo": ""})
        failed = [item["To_Account"] for item in found if item["ResultCode"]]
        return {"ResultItem": found, "Fail_Account": failed, "ErrorDisplay": ""}

    def _profiles(self, body: Json) -> Json:
        """https://www.tencentcloud.com/document/product/1047/34917"""
        profiles = []
        for account in body["To_Account"]:
            nick = self.robots.get(account, "")
            item = {"Tag": "Tag_Profile_IM_Nick", "Value": nick}
            there = nick and item["Tag"] in body["TagList"]
            profile = {"To_Account": account, "ProfileItem": [item] if there else []}
            profiles.append(profile | {"ResultCode": 0, "ResultInfo": ""})
        return {"UserProfileItem": profiles}

    def _create_robot(self, body: Json) -> Json:
        userid = body["UserID"]
        if not userid.startswith("@RBT#") or len(userid.encode()) > 32:
            raise Refused(10004, "the UserID of a robot starts with @RBT#")
        if userid not in self.robots and len(self.robots) >= 20:
            raise Refused(10008, "the app has 20 robots already")
        self.robots[userid] = body.get("Nick") or self.robots.get(userid, "")
        return {}


def text_of(elements: list[Json]) -> str:
    """Return the plain text among the elements of a message."""
    plain = (one["MsgContent"] for one in elements if one["MsgType"] == "TIMTextElem")
    return "".join(content["Text"] for content in plain)


def streamed(elements: list[Json]) -> tuple[Json, Json]:
    """Return the content of a TIMStreamElem and its chunk; raise Refused (90002)."""
    [element] = elements
    content = element["MsgContent"]
    [chunk] = content["Chunks"]
    if element["MsgType"] != "TIMStreamElem" or not content["CompatibleText"]:
        raise Refused(90002, "not a TIMStreamElem with its CompatibleText")
    if set(chunk) != {"EventType", "Index", "Markdown", "IsLast"}:
        raise Refused(90002, "not a chunk")
    return content, chunk


def is_element(item: Any) -> bool:
    """Return whether a part of a MsgBody is as documented."""
    match item:
        case {"MsgType": "TIMTextElem", "MsgContent": {"Text": text}}:
            return isinstance(text, str) and len(item) == 2
        case {"MsgType": "TIMCustomElem", "MsgContent": {"Data": data}}:
            return isinstance(data, str) and len(item) == 2
        case {"MsgType": "TIMTextElem" | "TIMCustomElem"}:
            return False
        case {"MsgType": str(), "MsgContent": dict()}:
            return len(item) == 2
        case _:
            return False
