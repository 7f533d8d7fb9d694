"""Tencent's side: REST calls, checked as strictly as Tencent documents them.

Every call is checked for its fields, their types and sizes, and its UserSig, answered
with Tencent's error codes, and known again if it is repeated. What robots have sent
is in `delivered`, as a user sees it now.
"""

from __future__ import annotations

import json
import random
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

from .history import LOOKUPS, History
from .messages import Delivered, Json
from .signature import Refused, check_user_sig

# The key that Tencent publishes in the README of its UserSig libraries.
KEY = "5bd2850fff3ecb11d7c805251c51ee463a25727bddc2385f3fa8bfee1bb93b5e"
C2C_WINDOW, GROUP_WINDOW = 120, 300  # seconds in which Tencent knows a repetition
LARGEST_MESSAGE = 12 * 1024  # bytes of a MsgBody
LARGEST_STREAM, STREAM_GAP = 128 * 1024, 15  # bytes; seconds

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
        COMMON | {"SyncOtherMachine": int, "MsgSeq": U32, "MsgLifeTime": int},
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
    "profile/portrait_get": ({"To_Account": list, "TagList": list}, {}),
    **LOOKUPS,
}


class Tencent(History):
    """Tencent IM for one app, with its users, groups and robots.

    Set `fault` to a function (command, body) that returns an error code, "lost" (no
    answer, no effect) or "late" (effect, but no answer) to break REST calls.
    """

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
        self.changed = threading.Condition(threading.RLock())
        self._sent: dict[Any, tuple[float, Json]] = {}

    def rest(self, command: str, query: dict[str, str], body: bytes) -> Json | None:
        """Do a REST call and return the answer, or None to give none."""
        try:
            fields = self._checked(command, query, body)
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
        now = int(time.time())
        answer = {"MsgTime": now, "MsgKey": f"{seq}_{body['MsgRandom']}_{now}"}
        return self._once(key, C2C_WINDOW, answer, body["To_Account"], seq, body)

    def _send_group_msg(self, body: Json) -> Json:
        self._check_message(body, 80002)
        if body["GroupId"] not in self.groups:
            raise Refused(10015, "no such group")
        seq = self.next_seq(body["GroupId"])
        key = (body["GroupId"], body["Random"])
        answer = {"MsgTime": int(time.time()), "MsgSeq": seq}
        return self._once(key, GROUP_WINDOW, answer, body["GroupId"], seq, body)

    def _check_message(self, body: Json, too_long: int) -> None:
        self._check_sender(body)
        self._check_body(body, too_long)

    def _check_sender(self, body: Json) -> None:
        if body.get("From_Account", self.admin) not in {self.admin, *self.robots}:
            raise Refused(90008, "From_Account does not exist")

    def _check_body(self, body: Json, too_long: int) -> None:
        if not body["MsgBody"] or any(
            not isinstance(item, dict) or set(item) != {"MsgType", "MsgContent"}
            for item in body["MsgBody"]
        ):
            raise Refused(90002, "MsgBody is not a list of elements")
        if (
            len(json.dumps(body["MsgBody"], ensure_ascii=False).encode())
            > LARGEST_MESSAGE
        ):
            raise Refused(too_long, "the message is too long")

    def _once(
        self, key: Any, window: int, answer: Json, chat: str, number: int, body: Json
    ) -> Json:
        """Show a message, unless Tencent would know it for a repetition."""
        known = self._sent.get(key)
        if known and time.time() - known[0] < window:
            return known[1]
        self._sent[key] = (time.time(), answer)
        name = answer.get("StreamMsgID") or answer.get("MsgKey") or number
        robot = body.get("From_Account", self.admin)
        message = Delivered(robot, chat, number, body, name)
        message.draw(body["MsgBody"])
        self.delivered.append(message)
        self.remember_sent(message)
        return answer

    def _modify(self, body: Json) -> Json:
        self._check_body(body, 93000)
        chat = body.get("GroupId") or body["To_Account"]
        self._find(chat, body.get("MsgKey") or body["MsgSeq"]).draw(body["MsgBody"])
        return {}

    def _find(self, chat: str, key: Any) -> Delivered:
        for message in reversed(self.delivered):
            if (message.chat, message.key) == (chat, key):
                return message
        raise Refused(20022, "no such message")

    def _stream(self, body: Json) -> Json:
        [element] = body["MsgBody"]
        content = element["MsgContent"]
        [chunk] = content["Chunks"]
        if element["MsgType"] != "TIMStreamElem" or not content["CompatibleText"]:
            raise Refused(90002, "not a TIMStreamElem with its CompatibleText")
        if set(chunk) != {"EventType", "Index", "Markdown", "IsLast"}:
            raise Refused(90002, "not a chunk")
        chat, answer = body.get("GroupId") or body["To_Account"], {}
        if "StreamMsgID" not in content:
            self._check_sender(body)
            answer = {"StreamMsgID": f"stream-{len(self.delivered)}"}
            key = (chat, "stream", body["MsgRandom"])
            number = body["MsgSeq"] if "MsgSeq" in body else self.next_seq(chat)
            answer = self._once(key, C2C_WINDOW, answer, chat, number, body)
        message = self._find(chat, content.get("StreamMsgID") or answer["StreamMsgID"])
        if chunk["Index"] == message.index:  # sent again
            return answer
        whole = message.text + chunk["Markdown"]
        late = message.index and time.time() - message.time > STREAM_GAP
        if late or message.closed and message.index or chunk["Index"] < message.index:
            message.closed = True
            raise Refused(10004, "the stream is closed")
        if len(whole.encode()) > LARGEST_STREAM:
            raise Refused(93000, "the stream is too long")
        message.index = chunk["Index"]
        message.show(whole, chunk["IsLast"])
        return answer

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
