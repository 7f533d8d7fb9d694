"""A stand-in for Tencent IM and for an AI service, on this machine, with no account.

    python simulator.py                  start it with the bot, hold a conversation
    python simulator.py --say "Hello"    say this instead
    python simulator.py --bot URL        drive a bot that runs elsewhere

It serves a chat page, simulator.html, too: open the URL that is printed. The tests and
the benchmark use the same stand-in: real HTTP on loopback, signed callbacks, REST calls
whose fields, types, sizes and UserSigs are checked as strictly as Tencent documents
them, its error codes and its de-duplication. Nothing deployed imports this file.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import requests

from usersig import BadSignature, check_user_sig, sign_callback

HERE = Path(__file__).parent
# The key that Tencent publishes in the README of its UserSig libraries.
KEY = "5bd2850fff3ecb11d7c805251c51ee463a25727bddc2385f3fa8bfee1bb93b5e"
C2C_WINDOW, GROUP_WINDOW = 120, 300  # seconds in which Tencent knows a repetition
LARGEST_MESSAGE = 12 * 1024  # bytes of a MsgBody
LARGEST_STREAM, STREAM_GAP = 128 * 1024, 15  # bytes; seconds
KEPT = 500  # messages and calls that the page shows
PACE, SLOW = 0.04, 0.5  # seconds between two chunks of an AI that is watched
UNSHOWN = {"body", "states", "index"}
REPLY_MODES = ("whole", "modify", "custom", "stream")
# What the demonstration's bot takes from the environment, besides AI_….
SETTINGS = (
    "REPLY_MODE BOT_LANGUAGE ROBOTS HISTORY_TURNS GROUP_MEMORY RATE_LIMIT MAX_WAITING "
    "MAX_BACKLOG ALLOW_USERS ALLOW_GROUPS RETENTION_DAYS WORKER_THREADS LOG_LEVEL"
).split()

Json = dict[str, Any]


class Refused(Exception):
    """A REST call that Tencent would refuse."""

    def __init__(self, code: int, info: str) -> None:
        super().__init__(info)
        self.code = code


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
}


class Simulator:
    """Tencent IM for one app, with its users, groups and robots, and an AI service.

    Set `fault` to a function (command, body) that returns an error code, "lost" (no
    answer, no effect) or "late" (effect, but no answer) to break REST calls, and
    `ai_fault` to one that returns an HTTP status and a body to break the AI.
    """

    def __init__(
        self, sdkappid: int = 1400000000, key: str = KEY, port: int = 0
    ) -> None:
        self.sdkappid, self.key, self.admin = sdkappid, key, "administrator"
        self.token, self.ai_key = "stand-in-token", "stand-in-ai-key"
        self.users = {"jared", "lin"}
        self.robots = {"@RBT#001": "Robot", "@RBT#002": "Helper"}
        self.groups = {"@TGS#demo": {"jared", "lin"}}
        self.delivered: list[Delivered] = []
        self.calls: list[tuple[str, Json]] = []
        self.ai_requests: list[Json] = []
        self.ai_ended = 0  # answers of which no more will be sent
        self.break_after = 0  # chunks, after which an answer breaks off
        self.ai_delay = self.im_delay = self.ai_pace = 0.0  # seconds
        self.skew = 0.0  # seconds by which Tencent's clock is ahead of ours
        self.ai_answer: Callable[[list[Json]], str] = parrot
        self.fault: Callable[[str, Json], int | str | None] = lambda command, body: None
        self.ai_fault: Callable[[Json], tuple[int, Json] | None] = lambda body: None
        self.bot_url = ""
        self.bot: BotProcess | None = None  # if it is ours
        self.ai_name = ""  # of the AI service, if it is not ours
        self.trouble = {"ai": "", "im": ""}  # what the page's user asked for
        self.said: deque[Json] = deque(maxlen=KEPT)  # callbacks of what users did
        self.wire: deque[Json] = deque(maxlen=KEPT)  # calls, for the page
        self._calls = 0
        self.closing = False
        self._sent: dict[Any, tuple[float, Json]] = {}
        self._seq = 0
        self._changed = threading.Condition(threading.RLock())
        self._http = requests.Session()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.simulator = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Simulator:
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self.closing = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._http.close()

    # What users do

    def say(self, user: str, robot: str, text: str, **fields: Any) -> Json:
        """Write to a robot; return the callback's JSON."""
        return self._deliver(c2c_event(user, robot, text) | fields)

    def say_in_group(
        self, user: str, group: str, text: str, robots: list[str], **fields: Any
    ) -> Json:
        """Write to a group, mentioning robots; return the callback's JSON."""
        with self._changed:
            self._seq += 1
            seq = self._seq
        event = {
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
        return self._deliver(event | fields)

    def press_stop(self, message: Delivered, user: str) -> Json:
        """Press TUIKit's stop button; where it has none, write what stops an answer."""
        if message.chat in self.groups:
            return self.say_in_group(user, message.chat, "/stop", [message.robot])
        if message.body["MsgBody"][0]["MsgType"] != "TIMCustomElem":
            return self.say(user, message.robot, "/stop")
        button = {"chatbotPlugin": 2, "src": 22, "msgKey": message.key}
        content = {"Data": json.dumps(button)}
        body = [{"MsgType": "TIMCustomElem", "MsgContent": content}]
        return self.say(user, message.robot, "", MsgBody=body)

    def _deliver(self, event: Json) -> Json:
        with self._changed:
            self.said.append(event)
            self._changed.notify_all()
        if self.bot_url and event.get("AtRobots_Account", True):
            self.callback(event).raise_for_status()
        return event

    def callback(
        self,
        event: Json,
        http: requests.Session | None = None,
        note: str = "delivered",
        **query: Any,
    ) -> requests.Response:
        """Deliver a callback, once more if it was delivered before."""
        url, began = f"/im?{urlencode(self.signed(event) | query)}", time.time()
        status, answer = 0, "no answer"
        try:
            response = (http or self._http).post(
                self.bot_url + url, json=event, timeout=10
            )
            status, answer = response.status_code, response.text
            with suppress(ValueError):
                answer = response.json()
            return response
        finally:
            self.record(note, began, url, event, status, answer)

    def signed(self, event: Json) -> dict[str, str]:
        """Return the query of a callback, as Tencent signs it."""
        now = str(int(time.time()))
        return {
            "SdkAppid": str(self.sdkappid),
            "CallbackCommand": str(event.get("CallbackCommand", "")),
            "contenttype": "json",
            "ClientIP": "127.0.0.1",
            "OptPlatform": "RESTAPI",
            "Sign": sign_callback(self.token, now),
            "RequestTime": now,
        }

    def wait(
        self, count: int, timeout: float = 20, chat: str = "", closed: bool = False
    ) -> list[Delivered]:
        """Return what robots sent (to one chat), as soon as it is `count` messages.

        If `closed`, those count that do not grow any more.
        """
        end = time.monotonic() + timeout
        with self._changed:
            while True:
                seen = [m for m in self.delivered if m.chat == chat or not chat]
                if sum(m.closed or not closed for m in seen) >= count:
                    return seen
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"{len(seen)} of {count} messages: {seen}")

    # The chat page

    def record(
        self, kind: str, began: float, url: str, body: Any, status: int, answer: Any
    ) -> None:
        """Keep a call ("IM", "AI", or how a callback was sent) without its secrets."""
        line = "POST " + re.sub("(Sign|usersig)=[^&]*", r"\1=•••", url)
        began, took = began * 1000, (time.time() - began) * 1000
        call = {"kind": kind, "time": began, "ms": took, "line": line, "body": body}
        with self._changed:
            self._calls += 1
            call |= {"id": f"call {self._calls}", "status": status, "answer": answer}
            self.wire.append(call)
            self._changed.notify_all()

    def news(self, seen: dict[str, Json]) -> list[Json]:
        """Return what is not seen yet, as soon as there is something, or after 10 s."""
        with self._changed:
            return self._changed.wait_for(lambda: self._unseen(seen), 10) or []

    def _unseen(self, seen: dict[str, Json]) -> list[Json]:
        items = [self._about(), *self.wire]
        items += [{"id": name_of(event), "event": event} for event in self.said]
        for number, message in list(enumerate(self.delivered))[-KEPT:]:
            shown = {k: v for k, v in vars(message).items() if k not in UNSHOWN}
            items.append({"id": f"answer {number}", "answer": number, **shown})
        return [item for item in items if seen.get(item["id"]) != item]

    def _about(self) -> Json:
        return {
            "id": "about",
            "run": f"{id(self)} {os.getpid()}",
            "users": sorted(self.users),
            "robots": dict(self.robots),
            "groups": list(self.groups),
            "bot": self.bot_url,
            "ai": self.ai_name,
            "modes": REPLY_MODES if self.bot else (),
            "mode": self.bot.env.get("REPLY_MODE", "whole") if self.bot else "",
            "trouble": dict(self.trouble),
        }

    def act(self, wish: Json) -> Json:
        """Do what the page's user asked for."""
        with suppress(requests.RequestException):  # the page shows the failed call
            match wish:
                case {"say": text, "as": user, "to": to, "robots": robots}:
                    if to in self.groups:
                        self.say_in_group(user, to, text, robots)
                    else:
                        self.say(user, to, text)
                case {"stop": number, "as": user}:
                    self.press_stop(self.delivered[number], user)
                case {"deliver": name, "note": note}:
                    [event] = [item for item in self.said if name_of(item) == name]
                    wrong: Json = {"Sign": "0" * 64} if note == "forged" else {}
                    self.callback(event, note=note, **wrong)
                case {"trouble": {"ai": ai, "im": im}}:
                    self.make_trouble(ai, im)
                case {"mode": mode} if self.bot and mode in REPLY_MODES:
                    self.bot.restart(REPLY_MODE=mode)
        with self._changed:
            self._changed.notify_all()
        return {}

    def make_trouble(self, ai: str = "", im: str = "") -> None:
        """Make the AI "slow" or "fail", IM "busy" or "refuse", or end that."""
        self.trouble = {"ai": ai, "im": im}
        self.ai_delay, self.ai_pace = (3.0, SLOW) if ai == "slow" else (0.0, PACE)
        broken = (500, ai_error("api_error", "a failure that was asked for (1000)"))
        code = {"busy": 90994, "refuse": 80001}.get(im)
        self.ai_fault = lambda body: broken if ai == "fail" else None
        self.fault = lambda command, body: code

    # Tencent's REST API

    def rest(self, path: str, query: dict[str, str], body: bytes) -> Json | None:
        """Do a REST call and return the answer, or None to give none."""
        began = time.time()
        answer = self._done(path.removeprefix("/v4/"), query, body)
        with suppress(ValueError):
            url = f"{path}?{urlencode(query)}"
            self.record("IM", began, url, json.loads(body), 200, answer)
        return answer

    def _done(self, command: str, query: dict[str, str], body: bytes) -> Json | None:
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
        try:
            sig = check_user_sig(self.key, query["usersig"])
        except BadSignature as error:
            raise Refused(error.code, str(error)) from None
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
        with self._changed:
            self.calls.append((command, fields))
        return dict(fields)

    def _effect(self, command: str, body: Json) -> Json:
        with self._changed:
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
                    if not self.robots.pop(body["Robot_Account"], None):
                        raise Refused(10004, "no such robot")
                    answer = {}
                case _:
                    answer = {"Robot_Account": list(self.robots)}
            self._changed.notify_all()
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
        self._seq += 1
        key = (body["GroupId"], body["Random"])
        answer = {"MsgTime": int(time.time()), "MsgSeq": self._seq}
        return self._once(key, GROUP_WINDOW, answer, body["GroupId"], self._seq, body)

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
            number = body.get("MsgSeq", self._seq)
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

    def _create_robot(self, body: Json) -> Json:
        userid = body["UserID"]
        if not userid.startswith("@RBT#") or len(userid.encode()) > 32:
            raise Refused(10004, "the UserID of a robot starts with @RBT#")
        if userid not in self.robots and len(self.robots) >= 20:
            raise Refused(10008, "the app has 20 robots already")
        self.robots[userid] = body.get("Nick") or self.robots.get(userid, "")
        return {}

    # The AI service

    def ai(self, headers: Any, body: bytes) -> tuple[int, Json]:
        """Return the status and either an error or {"text": the answer}."""
        if headers.get("Authorization") != f"Bearer {self.ai_key}":
            return 401, ai_error("authorized_error", "invalid api key (2049)")
        asked = json.loads(body)
        messages = asked.get("messages")
        if not messages or not all(message.get("content") for message in messages):
            return 400, ai_error("bad_request_error", "empty content (2013)")
        with self._changed:
            self.ai_requests.append(asked)
        time.sleep(self.ai_delay)
        if broken := self.ai_fault(asked):
            return broken
        text = self.ai_answer(messages)
        if asked.get("thinking", {}).get("type") != "disabled":
            text = f"<think>\nI repeat it.\n</think>\n\n{text}"
        return 200, {"text": text}

    def stream(self, text: str) -> Iterator[bytes]:
        """Yield an answer as the AI service streams it."""
        step = max(4, len(text) // 300)
        for start in range(0, len(text), step):
            if self.break_after and start >= step * self.break_after:
                return
            choice = {"index": 0, "delta": {"content": text[start : start + step]}}
            yield _event({"object": "chat.completion.chunk", "choices": [choice]})
            time.sleep(self.ai_pace)
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield b"data: [DONE]\n\n"


def parrot(messages: list[Json]) -> str:
    """Return an answer by which a question can be known, and how much is remembered."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    last = asked[-1]
    if isinstance(last, list):  # with pictures
        pictures = [part["image_url"]["url"] for part in last[1:]]
        last = " ".join([last[0]["text"], *pictures])
    return f"You said: {last} (question {len(asked)} of our chat)"


MARKDOWN = """\
Here is **Markdown** as an AI writes it, with a [link](https://www.tencentcloud.com):

1. Tencent IM calls `POST /im`
2. the bot keeps the message, then asks the AI
3. the answer *grows* in the chat

| way | who sees it grow |
|---|---|
| `modify` | nearly every client |
| `custom` | TUIKit, with a stop button |

```python
print("<script>alert('only text')</script>")
```"""


def actor(messages: list[Json]) -> str:
    """Return Markdown, or much of it, if the question says so; else be a parrot."""
    asked = str(messages[-1]["content"]).lower()
    if "long answer" in asked or "长" in asked:
        return "\n\n".join(f"## Part {n}\n\n{MARKDOWN}" for n in range(1, 25))
    return MARKDOWN if "markdown" in asked else parrot(messages)


def c2c_event(user: str, robot: str, text: str) -> Json:
    """Return the callback's JSON of a message to a robot."""
    seq, chance = random.getrandbits(31), random.getrandbits(32)
    now = int(time.time())
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


def name_of(event: Json) -> str:
    """Return what tells a callback's message from others."""
    return f"{event['MsgSeq']} {event.get('MsgRandom', event.get('Random'))}"


def text_body(text: str) -> list[Json]:
    """Return a MsgBody that holds a text."""
    return [{"MsgType": "TIMTextElem", "MsgContent": {"Text": text}}]


def ai_error(kind: str, message: str) -> Json:
    """Return an error as MiniMax words it."""
    return {"type": "error", "error": {"type": kind, "message": message}}


def _event(data: Json | list[Json]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def read_page() -> tuple[bytes, dict[str, str]]:
    """Return simulator.html, and headers by which it can run nothing but itself."""
    page = HERE.joinpath("simulator.html").read_text("utf-8")
    allow = {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:"}
    allow |= dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'")
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allow[f"{tag}-src"] = f"'sha256-{digest}'"
    policy = "; ".join(f"{name} {sources}" for name, sources in allow.items())
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
    return page.encode(), headers


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    simulator: Simulator

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a caller hung up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server

    def do_GET(self) -> None:
        if not self._is_ours():
            self._answer(403, {"error": "this page is for 127.0.0.1 only"})
        elif self.path == "/":
            self._send(200, "text/html; charset=utf-8", *read_page())
        elif self.path == "/page":
            self._start(200, "text/event-stream", None)
            self._tell(self.server.simulator)
        else:
            self._answer(404, {"error": "404 page not found"})

    def _tell(self, simulator: Simulator) -> None:
        """Tell the page what is new; if nothing is, see whether it is still there."""
        seen: dict[str, Json] = {}
        while not simulator.closing:
            items = simulator.news(seen)
            seen |= {item["id"]: item for item in items}
            self.wfile.write(_event(items))
            self.wfile.flush()
            time.sleep(0.05)

    def do_POST(self) -> None:
        simulator = self.server.simulator
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            return  # the caller died
        url = urlsplit(self.path)
        page = url.path == "/page"
        if not self._is_ours() if page else "Origin" in self.headers:
            self._answer(403, {"error": "another web page may not do this"})
        elif page:
            self._answer(200, simulator.act(json.loads(body)))
        elif url.path == "/v1/chat/completions":
            self._ai(simulator, body)
        elif url.path.startswith("/v4/"):
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            answer = simulator.rest(url.path, query, body)
            time.sleep(simulator.im_delay)
            self._answer(200, answer)
        else:
            self._answer(404, {"error": "404 page not found"})

    def _is_ours(self) -> bool:
        """Return whether no other web page sends this: by its form, or by its DNS."""
        host = self.headers.get("Host", "")
        ours = host.split(":")[0] in ("127.0.0.1", "localhost")
        return ours and self.headers.get("Origin", f"http://{host}") == f"http://{host}"

    def _ai(self, simulator: Simulator, body: bytes) -> None:
        began = time.time()
        status, answer = simulator.ai(self.headers, body)
        asked = json.loads(body)
        try:
            if status != 200:
                self._answer(status, answer)
            elif asked.get("stream"):
                self._stream(simulator, answer["text"])
            else:
                message = {"role": "assistant", "content": answer["text"]}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                base = {"status_code": 0, "status_msg": ""}
                self._answer(200, {"choices": [choice], "base_resp": base})
        finally:
            simulator.record("AI", began, self.path, asked, status, answer)

    def _stream(self, simulator: Simulator, text: str) -> None:
        self._start(200, "text/event-stream", {"Transfer-Encoding": "chunked"})
        try:
            for piece in simulator.stream(text):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                if simulator.ai_pace:
                    self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        finally:
            simulator.ai_ended += 1

    def _answer(self, status: int, answer: Json | None) -> None:
        if answer is None:
            self.close_connection = True
        else:
            self._send(status, "application/json", json.dumps(answer).encode(), {})

    def _send(
        self, status: int, kind: str, data: bytes, headers: dict[str, str]
    ) -> None:
        self._start(status, kind, headers | {"Content-Length": str(len(data))})
        self.wfile.write(data)

    def _start(self, status: int, kind: str, headers: dict[str, str] | None) -> None:
        """Begin an answer; without headers, one that ends with the connection."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {"Connection": "close"}).items():
            self.send_header(name, value)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() + self.server.simulator.skew)

    def log_message(self, *_: Any) -> None:
        pass


def bot_settings(simulator: Simulator) -> dict[str, str]:
    """Return the environment that makes a bot of this simulator's app."""
    return {
        "IM_SDKAPPID": str(simulator.sdkappid),
        "IM_KEY": simulator.key,
        "IM_CALLBACK_TOKEN": simulator.token,
        "IM_API_URL": simulator.url,
        "AI_SECRET_KEY": simulator.ai_key,
        "AI_BASE_URL": f"{simulator.url}/v1",
    }


class BotProcess:
    """The bot as the Procfile starts it, talking to a simulator."""

    def __init__(self, simulator: Simulator, folder: str, **settings: Any) -> None:
        self.simulator, self.port = simulator, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(folder, "bot.log")
        names = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")
        self.env = {name: os.environ[name] for name in names if name in os.environ}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env.get('PATH', '')}"
        self.env |= bot_settings(simulator)
        self.env["DATABASE"] = str(Path(folder, "bot.db"))
        self.env["GUNICORN_CMD_ARGS"] = f"--bind 127.0.0.1:{self.port}"
        self.env |= {name: str(value) for name, value in settings.items()}
        line = HERE.joinpath("Procfile").read_text().split("web:")[1].splitlines()[0]
        self.command, self.folder = shlex.split(line), HERE
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds_to_start = 0.0  # until it served

    def launch(self) -> BotProcess:
        """Start the process and return at once."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def start(self, timeout: float = 20) -> BotProcess:
        """Start the process and return when it serves."""
        began = time.monotonic()
        self.launch()
        while time.monotonic() < began + timeout and self.alive():
            with suppress(requests.RequestException):
                if requests.get(f"{self.url}/healthz", timeout=2).ok:
                    self.seconds_to_start = time.monotonic() - began
                    self.simulator.bot_url = self.url
                    return self
            time.sleep(0.02)
        self.stop(signal.SIGKILL)
        raise RuntimeError(f"the bot did not start:\n{self.log.read_text()}")

    def restart(self, **settings: str) -> None:
        """Stop the process and start it with other settings."""
        self.stop()
        self.env |= settings
        self.start()

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout: float = 40) -> int:
        """End the process, its workers too if killed, and return its exit status."""
        assert self.process
        if self.alive() and how == signal.SIGKILL:
            os.killpg(self.process.pid, how)
        elif self.alive():
            self.process.send_signal(how)
        return self.process.wait(timeout)


def free_port() -> int:
    """Return a port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(port: int = 0, **settings: Any) -> Iterator[tuple[Simulator, BotProcess]]:
    """Run a simulator and a bot that belong together."""
    with Simulator(port=port) as simulator, tempfile.TemporaryDirectory() as folder:
        simulator.bot = bot = BotProcess(simulator, folder, **settings)
        try:
            yield simulator, bot.start()
        finally:
            if bot.alive():
                bot.stop()


def show(simulator: Simulator, user: str, text: str, group: str = "") -> None:
    """Say something, print it, and print the answer when it comes."""
    chat, began = group or user, time.monotonic()
    known = sum(message.chat == chat for message in simulator.delivered)
    place = f"group {group}" if group else "one-to-one"
    if group:
        simulator.say_in_group(user, group, text, ["@RBT#001"])
        print(f"[{place}] {user}: @Robot {text}")
    else:
        simulator.say(user, "@RBT#001", text)
        print(f"[{place}] {user}: {text}")
    for message in simulator.wait(known + 1, 90, chat, closed=True)[known:]:
        took = (time.monotonic() - began) * 1000
        print(f"[{place}] Robot: {message.text}   ({took:.0f} ms)", flush=True)


def converse(simulator: Simulator, say: list[str]) -> None:
    """Hold the conversation of the demonstration, or say what is to be said."""
    for text in say or ["你好", "What did I say before?"]:
        show(simulator, "jared", text)
    if not say:
        show(simulator, "lin", "hello from the group", "@TGS#demo")


def type_on(simulator: Simulator) -> None:
    """Let the terminal write to the robot until its user has enough."""
    print("Write to the robot; begin with / g to write in the group; Ctrl-D ends.")
    while True:
        line = input("> ").strip()
        group = "@TGS#demo" if line.startswith("/g ") else ""
        try:
            if line:
                show(simulator, "jared", line.removeprefix("/g "), group)
        except (TimeoutError, requests.RequestException):
            print("No answer came.")


def demo_settings(environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return the bot's settings, and the name of the AI service if it is a real one."""
    chinese = environment.get("LANG", "").startswith("zh")
    settings = {"REPLY_MODE": "custom", "BOT_LANGUAGE": "zh" if chinese else "en"}
    for name, value in environment.items():
        if value and (name in SETTINGS or name.startswith("AI_")):
            settings[name] = value
    service = settings.get("AI_PROVIDER", "minimax")
    theirs = {"AI_SECRET_KEY", "AI_SECRET_KEYS", "AI_BASE_URL"} & set(settings)
    if not theirs and service not in ("echo", "ollama"):
        return settings, ""
    return {"AI_SECRET_KEY": "", "AI_BASE_URL": ""} | settings, service


@contextmanager
def demonstration(bot_url: str, port: int) -> Iterator[Simulator]:
    """Run what is to be shown, with a bot or for one elsewhere; print where it is."""
    if bot_url:
        with Simulator(port=port) as simulator:
            simulator.bot_url = bot_url.rstrip("/").removesuffix("/im")
            print("The bot needs these settings (or an AI service of its own):\n")
            for name, value in bot_settings(simulator).items():
                print(f"export {name}={value}")
            yield simulator
        return
    settings, service = demo_settings(os.environ)
    with running(port, **settings) as (simulator, bot):
        simulator.ai_name = service
        mode = settings["REPLY_MODE"]
        print(f"The bot, under gunicorn: {bot.url}, REPLY_MODE={mode}")
        print("The AI:", f"the real service {service}" if service else "a stand-in")
        yield simulator


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--say", action="append", default=[], metavar="TEXT")
    parser.add_argument("--bot", default="", metavar="URL", help="of a bot elsewhere")
    parser.add_argument("--port", type=int, help="serve here, and stay till Ctrl-C")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # they end the bot, too
        signal.signal(number, signal.default_int_handler)
    stage = demonstration(options.bot, options.port or 0)
    try:
        with suppress(KeyboardInterrupt, EOFError), stage as simulator:
            simulator.ai_answer = actor
            print(f"The chat page: open {simulator.url} in a browser\n", flush=True)
            if options.say or not options.bot:
                converse(simulator, options.say)
            simulator.ai_pace = PACE
            if sys.stdin.isatty():
                type_on(simulator)
            elif options.bot or options.port:
                threading.Event().wait()
    except RuntimeError as error:  # the bot did not start
        sys.exit(str(error))


if __name__ == "__main__":
    main()
