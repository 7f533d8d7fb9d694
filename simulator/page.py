"""The chat page: what it is told, what its user may do, and the page itself."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import requests

from .ai import ai_error
from .kits import KITS
from .messages import Delivered, Json, name_of, text_body
from .standin import StandIn

SHOWN = 500  # answers that the page shows
PACE, SLOW = 0.04, 0.5  # seconds between two chunks of an AI that is watched
_STARTING = threading.Lock()  # held while the bot is started or stopped
UNSHOWN = {"body", "states", "elements", "index", "ended"}
REPLY_MODES = ("whole", "card", "modify", "custom", "stream")
NO_TROUBLE = {"ai": "", "im": "", "bot": ""}


def read_page() -> tuple[bytes, dict[str, str]]:
    """Return page.html, and headers by which it can run nothing but itself.

    It may show the pictures that robots send.
    """
    page = Path(__file__).with_name("page.html").read_text("utf-8")
    allow = {"default-src": "'none'", "connect-src": "'self'", "img-src": "* data:"}
    allow |= dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'")
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allow[f"{tag}-src"] = f"'sha256-{digest}'"
    policy = "; ".join(f"{name} {sources}" for name, sources in allow.items())
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
    return page.encode(), headers


@contextmanager
def visit(simulator: StandIn) -> Iterator[None]:
    """Count a page as long as it is open. Trouble does not outlive the last one."""
    with simulator.changed:
        simulator.visitors += 1
    try:
        yield
    finally:
        with simulator.changed:
            simulator.visitors -= 1
        if simulator.trouble != NO_TROUBLE and not simulator.visitors:
            timer = threading.Timer(simulator.trouble_lasts, _end_trouble, (simulator,))
            timer.daemon = True
            timer.start()


def _end_trouble(simulator: StandIn) -> None:
    """End the trouble, unless its user came back: to reload is not to leave."""
    if not simulator.visitors and not simulator.closing:
        act(simulator, {"trouble": NO_TROUBLE})


def news(simulator: StandIn, seen: dict[str, Json]) -> list[Json]:
    """Return what is not seen yet, as soon as there is something, or after a while."""
    with simulator.changed:
        unseen = partial(_unseen, simulator, seen)
        return simulator.changed.wait_for(unseen, simulator.news_every) or []


def _unseen(simulator: StandIn, seen: dict[str, Json]) -> list[Json]:
    items = [_about(simulator), *simulator.warned, *simulator.calls_on_wire()]
    for event in simulator.said:
        name = name_of(event)
        called = name in simulator.called
        items.append({"id": name, "event": event, "called": called})
    for number, message in list(enumerate(simulator.delivered))[-SHOWN:]:
        shown = {k: v for k, v in vars(message).items() if k not in UNSHOWN}
        shown |= {"answer": number, "of": simulator.question_of(message.body)}
        shown["second"], shown["order"] = message.place
        shown["closed"] = message.closed
        shown["kits"] = _as_kits_show(simulator, message)
        items.append({"id": f"answer {number}", **shown})
    return [item for item in items if seen.get(item["id"]) != item]


def _as_kits_show(simulator: StandIn, message: Delivered) -> dict[str, str]:
    """Return what the kits show of a message; in groups they draw it as it is."""
    if message.chat in simulator.groups:
        return {}
    where = message.chat, message.robot
    return {kit: simulator.kit_chat(kit, *where).shown[message.key] for kit in KITS}


def _about(simulator: StandIn) -> Json:
    settings = simulator.bot.env if simulator.bot else {}
    return {
        "id": "about",
        "run": f"{id(simulator)} {os.getpid()}",
        "users": sorted(simulator.users),
        "robots": dict(simulator.robots),
        "groups": list(simulator.groups),
        "bot": simulator.bot_url,
        "nobody": simulator.nobody,
        "ai": simulator.ai_name,
        "modes": REPLY_MODES if simulator.bot else (),
        "mode": settings.get("REPLY_MODE", "whole") if simulator.bot else "",
        "language": settings.get("BOT_LANGUAGE", ""),
        "trouble": dict(simulator.trouble),
        "locked": simulator.locked(),
    }


def act(simulator: StandIn, wish: Json) -> Json:
    """Do what the page's user asked for."""
    with suppress(requests.RequestException):  # the page shows the failed call
        match wish:
            case {"say": text, "as": user, "to": to, "robots": robots}:
                fields: Json = {"MsgBody": text_body(text)}
                simulator.platforms[user] = KITS.get(wish.get("kit", ""), "RESTAPI")
                if quote := wish.get("quote"):
                    fields["CloudCustomData"] = _reply_to(quote)
                if to in simulator.groups:
                    simulator.say_in_group(user, to, text, robots, **fields)
                else:
                    simulator.say(user, to, text, **fields)
            case {"stop": number, "as": user}:
                simulator.press_stop(simulator.delivered[number], user)
            case {"deliver": name, "note": note} if simulator.bot_url:
                [event] = [item for item in simulator.said if name_of(item) == name]
                wrong: Json = {"Sign": "0" * 64} if note == "forged" else {}
                simulator.callback(event, note=note, **wrong)
            case {"trouble": {"ai": ai, "im": im, "bot": bot}}:
                simulator.trouble = {"ai": ai, "im": im, "bot": bot}
                _make_trouble(simulator, ai, im)
                _run_bot(simulator)
            case {"mode": mode} if mode in REPLY_MODES:
                _run_bot(simulator, REPLY_MODE=mode)
    with simulator.changed:
        simulator.changed.notify_all()
    return {}


def _reply_to(quote: Json) -> str:
    """Return what TUIKit sends along with a reply to a message."""
    reply = {"messageReply": quote | {"messageType": 1, "version": 1}}
    return json.dumps(reply, ensure_ascii=False)


def _run_bot(simulator: StandIn, **settings: str) -> None:
    """Let our bot run, or be down: then Tencent cannot reach it."""
    bot, down = simulator.bot, bool(simulator.trouble["bot"])
    with _STARTING:
        if bot and (settings or bot.alive() == down):
            simulator.unreachable = True
            bot.stop()
            bot.env |= settings
            if not down:
                bot.start()
        simulator.unreachable = down


def _make_trouble(simulator: StandIn, ai: str, im: str) -> None:
    """Make the AI "slow" or "fail", IM "busy" or "refuse", or end that."""
    simulator.ai_delay, simulator.ai_pace = (3.0, SLOW) if ai == "slow" else (0.0, PACE)
    broken = (500, ai_error("api_error", "a failure that was asked for (1000)"))
    code = {"busy": 90994, "refuse": 80001}.get(im)
    simulator.ai_fault = lambda body: broken if ai == "fail" else None
    simulator.fault = lambda command, body: code
