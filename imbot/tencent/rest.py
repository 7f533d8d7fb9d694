"""Tencent's REST API: the client, its error codes, and the numbers of a message.

A retry sends the same bytes and the same numbers, so Tencent drops the duplicate: a
call whose answer was lost can safely be made again within two minutes.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import quote

import requests
from urllib3.exceptions import HTTPError, MaxRetryError

from ..http import CallEnded, CancelScope, Session, TooLarge, cause_of, read_all
from ..outside import printable
from ..redact import redact
from ..timing import NORMAL, Timing
from .callback import Json, Message

CONNECT_TIMEOUT = 5  # seconds
SIG_LIFE = 7 * 86400  # seconds a UserSig is made for; it is renewed at half of that
SORRY = -1  # the part that says that no more comes; less 1 for each that has arrived
LARGEST_ANSWER = 1 << 20  # bytes, decompressed; Tencent's own limit (its error 10018)
ALREADY_FRIENDS = 30520
# In MsgDropReason of a repeated group message: the first one was shown.
DUPLICATE = re.compile("dup|repeat|重复", re.IGNORECASE)
NO_CALLBACKS = ["ForbidBeforeSendMsgCallback", "ForbidAfterSendMsgCallback"]


def _codes(listed: str) -> frozenset[int]:
    return frozenset(map(int, listed.split()))


# https://www.tencentcloud.com/document/product/1047/34348
NETWORK = -1  # our code for a call that brought no answer of Tencent's
# The network, a rate limit, or an error inside Tencent: a later retry may succeed.
RETRY = _codes(
    "-1 10002 10006 10023 20004 20005 20018 22006 60007 60008 60011 60013 60014 60018 "
    "60019 70050 70169 70500 80003 90057 90992 91000"
)
# Only this message is rejected: a retry soon may succeed, a late one will not.
RETRY_MESSAGE = _codes("20027 20028 90994 90995")
STALE_SIG = _codes("20002 60004 60005 70001")  # a new UserSig may help
RATE_LIMITED = 10023

MEANINGS = {  # of final codes, for the operator
    "10007": "the robot may not do this; is it a member of the group?",
    "10008": "not an app admin, or the app has all the robots it may have",
    "10010 10015": "the group does not exist",
    "10016 20006": "refused by the app's own before-callback",
    "10017": "the robot is muted in the group",
    "20003 30003 70107 90012 90048": "the sender or the receiver does not exist",
    "30010 30014": "the friend list is full",
    "60006 70020": "IM_SDKAPPID is not a valid app",
    "60010 90009": "IM_ADMIN is not an admin of this app",
    "60016 60017": "the app is disabled: see the console",
    "60020": "the package has expired or is unpaid: see the console",
    "60021": "this server's address is not on the list of the app; see the console",
    "60026": "the app lives in another region: set IM_API_URL to that region's domain",
    "60028": "the trial edition's messages of the last 24 hours are used up",
    "70009": "IM_KEY is not the key of this app, which IM_SDKAPPID names",
    "70398": "the edition allows no more accounts",
    "80001": "the text was stopped by the sensitive-word filter",
    "80002 93000": "the message is too long",
    "90008": "the robot does not exist: use create-robot",
}
MEANING = {code: text for codes, text in MEANINGS.items() for code in _codes(codes)}


UNREADABLE = (KeyError, TypeError, ValueError, AttributeError)  # not as documented


class IMError(Exception):
    """A call that Tencent refused, or that brought no answer.

    `retry`: a later retry may succeed. `about_message`: only this message is rejected,
    so retry briefly. `may_have_arrived`: this try, or an earlier one, may have taken
    effect all the same (unconfirmed), so that a retry might show a message twice.
    """

    def __init__(
        self, command: str, code: int, info: str, may_have_arrived: bool = False
    ) -> None:
        meaning = f" ({MEANING[code]})" if code in MEANING else ""
        failed = "failed" if code == NETWORK else f"failed with {code}"
        super().__init__(f"{command} {failed}: {printable(info)}{meaning}")
        self.code, self.may_have_arrived = code, may_have_arrived
        self.about_message = code in RETRY_MESSAGE
        self.retry = code in RETRY | RETRY_MESSAGE


class Client:
    """Tencent IM's REST API, for any number of threads."""

    def __init__(
        self,
        url: str,
        sdkappid: int,
        admin: str,
        make_sig: Callable[..., str],
        threads: int = 64,
        timing: Timing = NORMAL,
    ) -> None:
        self.timing = timing
        self.url, self.sdkappid, self.admin = url.rstrip("/"), sdkappid, admin
        self.make_sig = make_sig  # gen_user_sig, with the app and its key
        self._sig, self._renew_at = "", 0.0
        self._session = Session(self.url, threads)

    def send(
        self,
        message: Message,
        element: Json,
        part: int,
        mention: bool = False,
        until: float = math.inf,
    ) -> Json:
        """Send one element as the robot of `message` and return Tencent's answer.

        A group message may mention the asker. See `call` for `until`. Raises IMError.
        https://www.tencentcloud.com/document/product/1047/34919 (one-to-one)
        https://www.tencentcloud.com/document/product/1047/34959 (group)
        """
        body = message_body(message, element, part)
        body["ForbidCallbackControl"] = NO_CALLBACKS
        if not message.group:
            return self.call("openim/sendmsg", body, until=until)
        body["Random"] = body.pop("MsgRandom")
        if mention and message.user:
            asker = {"GroupAtAllFlag": 0, "GroupAt_Account": message.user}
            body["GroupAtInfo"] = [asker]
        return self.call("group_open_http_svc/send_group_msg", body, until=until)

    def robots(self) -> list[str]:
        """Return the UserIDs of the app's chatbot accounts. Raises IMError."""
        command = "openim_robot_http_svc/get_all_robots"
        userids = self.call(command, {}).get("Robot_Account") or []
        if not isinstance(userids, list):
            raise IMError(command, NETWORK, "no valid answer")
        return [*map(printable, userids)]

    def befriend(self, user: str, robot: str) -> None:
        """Put a robot into the friend list of a user, whose app can then show it.

        Raises IMError. https://www.tencentcloud.com/document/product/1047/34902
        """
        friend = {"To_Account": robot, "AddSource": "AddSource_Type_Server"}
        body = {"From_Account": user, "AddFriendItem": [friend], "ForceAddFlags": 1}
        results = self.call("sns/friend_add", body).get("ResultItem") or [{}]
        try:
            code, info = _integer(results[0].get("ResultCode", 0)), results[0]
        except UNREADABLE:
            code, info = NETWORK, {"ResultInfo": "no valid answer"}
        if code not in (0, ALREADY_FRIENDS):
            raise IMError("sns/friend_add", code, info.get("ResultInfo", ""))

    def call(
        self,
        command: str,
        body: Json,
        pauses: Sequence[float] | None = None,
        timeout: float | None = None,
        until: float = math.inf,
    ) -> Json:
        """Make a REST call and return Tencent's answer. Raises IMError.

        If a retry may help, there is one after each of `pauses`; each try ends after
        `timeout`. Both are in seconds. There is no retry after `until`, Unix seconds:
        this machine may have stood still, and what arrived would be shown twice.
        https://www.tencentcloud.com/document/product/1047/34620
        """
        data = json.dumps(body, ensure_ascii=False).encode()
        waits = list(self.timing.pauses if pauses is None else pauses)
        renewed = arrived = False
        while True:
            try:
                return self._post(command, data, timeout or self.timing.call_timeout)
            except IMError as error:
                arrived = error.may_have_arrived = arrived or error.may_have_arrived
                if error.code in STALE_SIG and not renewed:
                    renewed, self._renew_at = True, 0.0
                elif error.retry and waits:
                    time.sleep(waits.pop(0) * random.uniform(0.75, 1.25))
                else:
                    raise
                if error.retry and time.time() > until:
                    raise

    def _post(self, command: str, data: bytes, seconds: float) -> Json:
        # The UserSig needs no quoting, and urllib3 re-encodes URLs with a % slowly.
        sig = self._user_sig()
        url = (
            f"{self.url}/v4/{command}?sdkappid={self.sdkappid}&contenttype=json"
            f"&identifier={quote(self.admin)}&usersig={sig}"
            f"&random={random.getrandbits(32)}"
        )
        limits = (min(CONNECT_TIMEOUT, seconds), seconds)
        try:
            with CancelScope(seconds):
                response = self._session.post(url, data, headers={}, timeout=limits)
                answer = read_all(response, LARGEST_ANSWER)
        except (requests.RequestException, HTTPError, CallEnded, TooLarge) as error:
            # Its text holds the URL with the UserSig: tell only its name.
            reason = f"no answer ({cause_of(error)[1] or type(error).__name__})"
            no_address = isinstance(error, ValueError)
            no_connection = any(isinstance(arg, MaxRetryError) for arg in error.args)
            sent = not (no_address or no_connection)
            raise IMError(command, NETWORK, reason, may_have_arrived=sent) from None
        return _read_answer(command, response.status_code, answer, sig, data)

    def _user_sig(self) -> str:
        """Return a UserSig. Two threads may make one each at a time: both are valid."""
        if time.time() > self._renew_at:
            self._sig = self.make_sig(self.admin, SIG_LIFE)
            self._renew_at = time.time() + SIG_LIFE / 2
        return self._sig


def _read_answer(command: str, status: int, body: bytes, sig: str, sent: bytes) -> Json:
    """Return Tencent's answer; raise IMError if it is a refusal, or none at all.

    What a refusal quotes of the UserSig and of the texts that were sent is left out.
    """
    try:
        answer: Json = {**json.loads(body)}
        code = _integer(answer["ErrorCode"])
        ok = answer["ActionStatus"] == "OK" and code == 0
    except (*UNREADABLE, RecursionError):
        info = f"no valid answer (HTTP {status} without Tencent's JSON)"
        raise IMError(command, NETWORK, info, may_have_arrived=True) from None
    if not ok:
        elements = json.loads(sent).get("MsgBody", [])
        contents = [one.get("MsgContent") for one in elements if isinstance(one, dict)]
        info = redact(str(answer.get("ErrorInfo", "")), [sig, *_texts(contents)])
        raise IMError(command, code, info)
    dropped = str(answer.get("MsgDropReason") or "")
    if dropped and not DUPLICATE.search(dropped):
        raise IMError(command, RATE_LIMITED, f"dropped: {dropped}")
    return answer


def _texts(value: object) -> Iterator[str]:
    """Yield all texts of an element's content."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _integer(value: object) -> int:
    """Return a code of Tencent's as a number. Raises ValueError, TypeError.

    Some of its numbers are documented as numbers and sent as texts.
    """
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value, re.ASCII):
        return int(value)
    if type(value) is not int or abs(value) >= 2**31:
        raise ValueError("not a code")
    return value


def message_body(message: Message, element: Json, part: int) -> Json:
    """Return the body of a call that sends an element as the robot of `message`."""
    seq, msg_random = numbers(message, part)
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


def numbers(message: Message, part: int) -> tuple[int, int]:
    """Return (MsgSeq, MsgRandom) of one part of the answer to a message.

    They are the same at every try, so Tencent drops a duplicate. Clients sort one
    second by MsgSeq: an answer must not stand above its question. In groups Tencent
    sets the MsgSeq. https://www.tencentcloud.com/document/product/1047/33526
    """
    digest = hashlib.sha256(f"{message.id}\t{part}".encode()).digest()
    return (message.seq + 1 + abs(part)) % 2**32, int.from_bytes(digest[:4])


def text_element(text: str) -> Json:
    """Return the element of a plain text."""
    return {"MsgType": "TIMTextElem", "MsgContent": {"Text": text}}
