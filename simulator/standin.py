"""The stand-in but for its port: Tencent IM, AI services, and what users do."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import urlencode

import requests

from usersig import sign_callback

from .messages import Delivered, Json, c2c_event, group_event, name_of
from .platforms import AgentPlatforms
from .relay import Relay
from .wire import Wire


class Process(Protocol):
    """A bot that is ours to start and to stop."""

    env: dict[str, str]

    def alive(self) -> bool: ...
    def start(self) -> Any: ...
    def stop(self) -> int: ...


class StandIn(Wire, AgentPlatforms):
    """Tencent IM and AI services; server.Simulator serves them.

    Callbacks go to the bot at `bot_url`. With none, or while the bot is `unreachable`,
    users' messages are only kept in Tencent's history and returned.
    """

    url: str  # of the server

    def __init__(self, sdkappid: int, key: str) -> None:
        Wire.__init__(self, sdkappid, key)
        AgentPlatforms.__init__(self)
        self.token, self.secret = "stand-in-token", self.ai_key
        self.bot_url = ""
        self.platforms: dict[str, str] = {}  # user -> OptPlatform of his client
        self.unreachable = False  # Tencent cannot reach the bot: callbacks are lost
        self.bot: Process | None = None
        self.relay: Relay | None = None  # to the AI service, if it is a real one
        self.ai_name = ""  # what it is called
        self.trouble = {"ai": "", "im": "", "bot": ""}  # what the page's user asked for
        self.visitors = 0  # pages that are open
        self.news_every = 2.0  # seconds after which a page is told that nothing is new
        self.trouble_lasts = 3.0  # seconds without a page, after which trouble ends
        self.nobody = False  # nobody answered at the bot's address when last called
        self._http = requests.Session()

    def say(self, user: str, robot: str, text: str, **fields: Any) -> Json:
        """Write to a robot; return the callback's JSON."""
        event = c2c_event(user, robot, text) | fields
        self.deliver(event)
        return event

    def say_in_group(
        self, user: str, group: str, text: str, robots: list[str], **fields: Any
    ) -> Json:
        """Write to a group, mentioning robots; return the callback's JSON."""
        event = group_event(user, group, self.next_seq(group), text, robots) | fields
        self.deliver(event)
        return event

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

    def deliver(self, event: Json) -> bool:
        """Remember what a user wrote and tell the bot; return whether it was told.

        If that fails, requests' exception is raised; Tencent does not try it again.
        """
        with self.changed:
            self.said.append(event)
            self.remember_event(event)
            self.show_sent(event)
            self.changed.notify_all()
        for_robots = event.get("AtRobots_Account", True)
        if not self.bot_url or self.unreachable or not for_robots:
            return False
        self.callback(event).raise_for_status()
        return True

    def callback(
        self,
        event: Json,
        http: requests.Session | None = None,
        note: str = "delivered",
        **query: Any,
    ) -> requests.Response:
        """Deliver a callback, once more if it was delivered before."""
        url = f"/im?{urlencode(self.signed(event) | query)}"
        with self.on_wire(note, url, event, of=name_of(event)) as call:
            response = self._post(http or self._http, self.bot_url + url, event)
            call |= {"status": response.status_code, "answer": response.text}
            with suppress(ValueError):
                call["answer"] = response.json()
            return response

    def _post(self, http: requests.Session, url: str, event: Json) -> requests.Response:
        try:
            response = http.post(url, json=event, timeout=10)
        except requests.ConnectionError:
            self.nobody = True
            raise
        self.nobody = False
        return response

    def signed(self, event: Json) -> dict[str, str]:
        """Return the query of a callback, as Tencent signs it."""
        now = str(int(time.time()))
        return {
            "SdkAppid": str(self.sdkappid),
            "CallbackCommand": str(event.get("CallbackCommand", "")),
            "contenttype": "json",
            "ClientIP": "127.0.0.1",
            "OptPlatform": self.platforms.get(
                str(event.get("From_Account")), "RESTAPI"
            ),
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
        with self.changed:
            while True:
                seen = [m for m in self.delivered if m.chat == chat or not chat]
                if sum(m.closed or not closed for m in seen) >= count:
                    return seen
                if not self.changed.wait(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"{len(seen)} of {count} messages: {seen}")
