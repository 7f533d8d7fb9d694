"""A chatbot server for Tencent Cloud IM (Tencent Cloud Chat).

Tencent calls `POST /im` when somebody writes to a robot account (@RBT#…) or mentions
one in a group. The message is checked, stored and acknowledged at once; a pool of
threads asks the AI service and answers as the robot. Read `create_app` for the way in
and `Bot` for the way out.

    gunicorn --worker-class gthread --threads 8 'botserver:create_app()'

Settings come from the environment: see `Config` and README.md.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import requests
from flask import Flask, request
from werkzeug.exceptions import HTTPException

import providers
import tim
from providers import PROVIDERS, Provider, ProviderError
from session import CancelScope, open_session
from store import ANY, MINUTE, REMEMBERED, Claim, Store, StoreError, open_store
from usersig import BadSignature, check_callback, gen_user_sig

__version__ = "1.0.0"
OK = {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0}
LARGEST_CALLBACK = 1 << 20  # bytes
PATROL = 0.5  # seconds between two looks at what the store holds for us
NOTICE_EVERY = 600  # seconds in which a user is told once why messages are refused
GIVE_UP = 86400  # seconds in which Tencent IM is asked again to take an answer
DRAIN = 20.0  # seconds for answers in work when the server stops
HISTORY_CHARACTERS = 24_000  # of old turns in one question

Json = dict[str, Any]
logger = logging.getLogger(__name__)

# Whole messages that are commands, and everything the bot says itself.
COMMANDS = {
    "/help": "help",
    "帮助": "help",
    "/clear": "clear",
    "清空": "clear",
    "/stop": "stop",
    "停止": "stop",
}
TEXTS = {
    "zh": {
        "help": "直接发消息给我就行。/clear（清空）忘掉对话，/stop（停止）打断回答。",
        "clear": "好的，这段对话我已经忘掉了。",
        "stop": "好的，我停下了。",
        "stopped": "（已停止）",
        "strange": "这种消息我还看不懂，请发文字给我。",
        "blind": "图片我还看不懂，请发文字给我。",
        "stranger": "抱歉，我还不能为你服务，请联系管理员。",
        "flood": "消息太多了，请等我答完前面的再发。",
        "rate": "你发得太快了，请过一分钟再试。",
        "cut": "（回答中断了：{}）",
        "broken": "（回答中断了，下面重新回答。）",
        "busy": "AI 服务正忙，请稍后再试。",
        "slow": "没能及时答完，请换个简单的问法再试。",
        "quota": "AI 服务的额度已用完，请联系管理员。",
        "filter": "这个问题我不能回答，请换个话题。",
        "long": "对话太长了，请发送 /clear 重新开始。",
        "length": "（回答太长，到这里被截断了。发送“继续”可以接着说。）",
        "empty": "这次我没有想出答案，请换个说法再试。",
        "setup": "AI 服务的设置有误，请联系管理员。",
    },
    "en": {
        "help": "Write to me. /clear: I forget this chat. /stop: I stop the answer.",
        "clear": "I have forgotten this chat.",
        "stop": "I have stopped.",
        "stopped": "(stopped)",
        "strange": "I cannot read this kind of message yet. Please write to me.",
        "blind": "I cannot see pictures yet. Please write to me.",
        "stranger": "Sorry, I may not serve you yet. Please ask the administrator.",
        "flood": "That is a lot. Please wait until I have answered what came before.",
        "rate": "You are very fast. Please try again in a minute.",
        "cut": "(The answer was cut: {})",
        "broken": "(The answer was cut. Here it is again.)",
        "busy": "The AI service is busy. Please try again in a moment.",
        "slow": "I could not finish in time. Please ask something simpler.",
        "quota": "The AI service's quota is used up. Please tell the administrator.",
        "filter": "I cannot answer this. Please ask something else.",
        "long": "This chat has become too long. Please send /clear to start again.",
        "length": "(The answer was cut by its length limit. Say “go on” to hear more.)",
        "empty": "I found no answer this time. Please ask in other words.",
        "setup": "The AI service is not set up rightly. Please tell the administrator.",
    },
}


class ConfigError(Exception):
    """Settings that are missing or wrong, a sentence each."""


def setting(default: Any = MISSING, low: float = 0, **more: Any) -> Any:
    """Return a field of Config: its default, its least value, its choices."""
    return field(
        default=default, repr=not more.get("secret"), metadata={"low": low, **more}
    )


@dataclass(frozen=True, kw_only=True)
class Persona:
    """A robot's own settings, from robots.toml; empty ones are the server's."""

    nick: str = ""
    system_prompt: str = ""
    provider: str = setting("", choices=tuple(PROVIDERS))
    model: str = ""
    reply_mode: str = setting("", choices=tuple(tim.MODES))


NOBODY = Persona()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting; its name in the environment is the name here in capitals."""

    im_sdkappid: int = setting(low=1)
    im_key: str = setting(secret=True)
    im_callback_token: tuple[str, ...] = setting((), secret=True)
    allow_unsigned: bool = setting(False)
    im_admin: str = setting("administrator")
    im_api_url: str = setting("https://console.tim.qq.com")
    ai_provider: str = setting("minimax", choices=tuple(PROVIDERS))
    ai_secret_key: str = setting("", secret=True)
    ai_secret_keys: dict[str, str] = field(default_factory=dict, repr=False)
    ai_base_url: str = setting("")
    ai_model: str = setting("")
    ai_extra_body: dict[str, Any] = field(default_factory=dict)
    ai_system_prompt: str = setting(
        "You are a helpful assistant in a chat app. Be brief."
    )
    ai_timeout: float = setting(60.0, low=1)  # seconds, for the whole answer
    reply_mode: str = setting("whole", choices=tuple(tim.MODES))
    worker_threads: int = setting(64, low=1)  # answers in work at once, per process
    database: str = setting("botserver.db")
    redis_url: str = setting("", secret=True)
    retention_days: float = setting(7.0, low=1)
    history_turns: int = setting(20, high=REMEMBERED)
    group_memory: str = setting("group", choices=("group", "member"))
    rate_limit: int = setting(20)  # messages a user a minute; 0 for no limit
    max_waiting: int = setting(20, low=1)  # messages of one conversation
    max_backlog: int = setting(10_000, low=1)  # messages in all
    allow_users: tuple[str, ...] = setting(())
    allow_groups: tuple[str, ...] = setting(())
    robots: dict[str, Persona] = field(
        default_factory=dict, metadata={"file": "robots.toml"}
    )
    bot_language: str = setting("zh", choices=tuple(TEXTS))
    log_level: str = setting("INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Config:
        """Read the environment; raise ConfigError that names all that is wrong."""
        names = [item.name for item in fields(cls) if item.name != "ai_secret_keys"]
        texts = {name: env.get(name.upper(), "").strip() for name in names}
        values, wrong = _read_all(cls, texts, str.upper)
        keys = {name: env.get(_key_name(name), "").strip() for name in PROVIDERS}
        values["ai_secret_keys"] = {name: key for name, key in keys.items() if key}
        if wrong := wrong + _disagreements(values):
            raise ConfigError("\n".join(["The settings are not complete:", *wrong]))
        return cls(**values)


def _read_all(
    kind: Any, texts: Mapping[str, Any], spell: Callable[[str], str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values for a dataclass's fields, and a sentence for each wrong one."""
    values, wrong = {}, []
    for item in fields(kind):
        text = texts.get(item.name) or item.metadata.get("file", "")
        try:
            if text:
                values[item.name] = _read(text, str(item.type), item.metadata)
            elif item.default is MISSING and item.default_factory is MISSING:
                raise ValueError("is missing")
        except ValueError as error:
            wrong.append(f"{spell(item.name)} {error}.")
    return values, wrong


def _read(text: Any, kind: str, limits: Mapping[str, Any]) -> Any:
    if not isinstance(text, str):
        raise ValueError("must be a text in quotes")
    if kind == "str" and text not in limits.get("choices", [text]):
        raise ValueError(f"must be one of: {', '.join(limits['choices'])}")
    if kind == "bool" and text.lower() not in ("0", "1", "true", "false", "yes", "no"):
        raise ValueError("must be 0 or 1")
    readers: dict[str, Callable[[], Any]] = {
        "str": lambda: text,
        "bool": lambda: text.lower() in ("1", "true", "yes"),
        "int": lambda: _read_number(text, int, limits),
        "float": lambda: _read_number(text, float, limits),
        "tuple[str, ...]": lambda: tuple(filter(None, map(str.strip, text.split(",")))),
        "dict[str, Any]": lambda: _read_object(text),
        "dict[str, Persona]": lambda: _read_robots(text, limits["file"]),
    }
    return readers[kind]()


def _read_number(
    text: str, kind: type[int] | type[float], limits: Mapping[str, Any]
) -> float:
    low, high = limits["low"], limits.get("high", 2**53)
    try:
        number = kind(text)
    except ValueError:
        number = -1
    if not low <= number <= high:
        most = f" and at most {high}" if "high" in limits else ""
        raise ValueError(f"must be a number of at least {low}{most}")
    return number


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _read_robots(path: str, default: str) -> dict[str, Persona]:
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        if path == default:
            return {}
        raise ValueError(f"names {path}, which is not there") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"names {path}, which cannot be read: {error}") from None
    personas, wrong = {}, []
    for robot, table in tables.items():
        if not robot.startswith(tim.ROBOT) or not isinstance(table, dict):
            wrong.append(f'{robot} is not a robot: write ["{tim.ROBOT}…"]')
            continue
        known = {item.name for item in fields(Persona)}
        wrong += [
            f"{robot} has an unknown key {name}" for name in table if name not in known
        ]
        values, faults = _read_all(Persona, table, lambda name: f"{robot}: {name}")  # noqa: B023
        wrong += [fault.rstrip(".") for fault in faults]
        personas[robot] = Persona(**values)
    if wrong:
        raise ValueError(f"names {path}, where {'; '.join(wrong)}")
    return personas


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("https", "http") and bool(url.hostname)
    except ValueError:
        return False


def _key_name(provider: str) -> str:
    return f"AI_SECRET_KEY_{provider.upper().replace('-', '_')}"


def _disagreements(values: Mapping[str, Any]) -> list[str]:
    wrong = []
    if not values.get("im_callback_token") and not values.get("allow_unsigned"):
        wrong.append(
            "IM_CALLBACK_TOKEN is missing: without it anybody can spend your AI "
            "budget. Set ALLOW_UNSIGNED=1 if that is what you want."
        )
    name = values.get("ai_provider", "minimax")
    if not values.get("ai_secret_key") and not PROVIDERS[name].keyless:
        wrong.append(f"AI_SECRET_KEY is missing: the AI service {name} needs one.")
    for robot, persona in values.get("robots", {}).items():
        other = persona.provider not in ("", name)
        if other and not PROVIDERS[persona.provider].keyless:
            if persona.provider not in values["ai_secret_keys"]:
                key = _key_name(persona.provider)
                wrong.append(f"{key} is missing: {robot} uses {persona.provider}.")
    for name in ("im_api_url", "ai_base_url"):
        if not _is_address(values.get(name, "https://x")):
            wrong.append(f"{name.upper()} must be an address with https:// or http://.")
    return wrong


class Overloaded(Exception):
    """More messages wait than MAX_BACKLOG allows."""


class Lost(Exception):
    """Another process has taken the message over."""


@dataclass(eq=False)
class Work:
    """A claim in the hands of a thread of this process."""

    claim: Claim
    message: tim.Message
    call: CancelScope
    screen: tim.Whole
    outcome: str = "sent"  # for the log
    lost: bool = False


class Bot:
    """Answers what waits in the store, with a pool of threads that starts on demand."""

    def __init__(self, config: Config, store: Store, im: tim.Client) -> None:
        self.config, self.store, self.im = config, store, im
        self.texts = TEXTS[config.bot_language]
        self._providers: dict[Persona, Provider] = {}
        self._lock = threading.Lock()  # guards _work and the three counts
        self._wake_up = threading.Condition(self._lock)  # a thread may be wanted
        self._done = threading.Condition(self._lock)  # an answer has ended
        self._work: set[Work] = set()
        self._threads = self._idle = self._wanted = 0
        self._closing, self._closed = threading.Event(), threading.Event()
        self._waiting = 0.0  # messages in the store, as the patrol last saw it
        self._store_down = False
        self._owed: list[Claim] = []  # to be released when the store works again
        self.leaving = False  # claim no more
        self._patrol = threading.Thread(target=self._walk, daemon=True)

    def start(self) -> None:
        """Begin to answer: first what an earlier process left behind."""
        self._patrol.start()

    def persona(self, robot: str) -> Persona:
        """Return what is set for a robot."""
        return self.config.robots.get(robot, NOBODY)

    def provider(self, robot: str) -> Provider:
        """Return the AI service of a robot."""
        persona = self.persona(robot)
        if persona not in self._providers:
            self._providers[persona] = make_provider(self.config, persona)
        return self._providers[persona]

    def accept(self, message: tim.Message) -> None:
        """Store a message and wake a thread for it. Raises StoreError, Overloaded.

        A stop and a refusal do not wait behind the answers of their conversation: they
        stand in a conversation of their own.
        """
        if self._waiting >= self.config.max_backlog:
            raise Overloaded
        conversation = message.conversation(self.config.group_memory == "member")
        stop = message.kind == "stop" or command(message) == "stop"
        lane = f"{conversation}\tstop" if stop else conversation
        refusal = self._keep_question(message, lane)
        if refusal == "known":
            return
        if refusal:
            lane, stop = f"{conversation}\tnotice", False
            notice = _notice(message, refusal)
            if not self.store.add(notice.id, lane, notice.data()):
                return
        self._waiting += 1
        if stop:
            self.store.request_stop(conversation)
            self._stop_requested()
        self._wake(1)

    def _keep_question(self, message: tim.Message, lane: str) -> str:
        """Store a message; return "", or why not: "known" or a key of TEXTS."""
        users, groups = self.config.allow_users, self.config.allow_groups
        if users and message.user not in users:
            return "stranger"
        if groups and message.group and message.group not in groups:
            return "stranger"
        asker = "" if command(message) or message.kind == "stop" else message.user
        room, rate = self.config.max_waiting, self.config.rate_limit or ANY
        while not self.store.add(message.id, lane, message.data(), asker, room, rate):
            known, waiting, asked = self.store.look_up(message.id, lane, asker)
            if known or waiting >= room or asked >= rate:
                return "known" if known else "flood" if waiting >= room else "rate"
        return ""

    def _wake(self, count: int) -> None:
        most = self.config.worker_threads
        with self._lock:
            self._wanted = min(self._wanted + count, most)
            missing = min(self._wanted - self._idle, most - self._threads)
            with suppress(RuntimeError):  # no more threads: the patrol tries again
                for _ in range(0 if self._closing.is_set() else missing):
                    threading.Thread(target=self._run, daemon=True).start()
                    self._threads += 1
            self._wake_up.notify(count)

    def _run(self) -> None:
        """Be a thread of the pool."""
        while not self._closing.is_set():
            with self._lock:
                self._idle += 1
                self._wake_up.wait_for(lambda: self._wanted or self._closing.is_set())
                self._idle -= 1
                self._wanted -= 1
            while claim := self._claim():
                self._answer(claim)

    def _claim(self) -> Claim | None:
        try:
            stop = self.leaving or self._closing.is_set()
            return None if stop else self.store.claim()
        except StoreError as error:
            self._store_failed(error)
        except Exception:
            logger.exception("a claim cannot be read")
        return None

    def _answer(self, claim: Claim) -> None:
        """Answer one message, whatever happens."""
        try:
            work = self._begin(claim)
            try:
                self._ask_and_send(work)
            finally:
                with self._lock:
                    self._work.discard(work)
                    self._done.notify_all()
        except tim.IMError as error:
            self._not_sent(claim, error)
        except StoreError as error:  # not the message's fault: it goes on soon
            self._store_failed(error)
            self._owed.append(claim)
        except Lost:
            logger.warning("%s is in other hands now", claim.id)
        except Exception:
            logger.exception("%s failed", claim.id)
            self._try_store(self.store.release, claim, 1.0, True)

    def _begin(self, claim: Claim) -> Work:
        message, call = read_message(claim.data), CancelScope(self.config.ai_timeout)
        mode = self.persona(message.robot).reply_mode or self.config.reply_mode
        screen = tim.MODES[mode](
            self.im,
            message,
            claim.seq,
            claim.progress,
            lambda progress: self._keep(claim, None, progress),
            self.texts["broken"],
        )
        work = Work(claim, message, call, screen)
        with self._lock:
            self._work.add(work)
        return work

    def _keep(
        self, claim: Claim, reply: str | None, progress: Json, remember: bool = True
    ) -> None:
        if not self.store.keep(claim, reply, remember, progress):
            raise Lost

    def _ask_and_send(self, work: Work) -> None:
        claim, screen, began = work.claim, work.screen, time.monotonic()
        reply = claim.reply
        if reply is None:
            reply, remember = self._own_words(work), False
            if reply is None:
                work.outcome = "answered"
                screen.open()
                reply, remember = self._ask(work)
            self._keep(claim, reply, screen.progress, remember)
        asked = time.monotonic()
        if reply:
            screen.close(reply)
        sent = time.monotonic()
        self.store.finish(claim)
        logger.info(
            "%s: %s, ai %.0f ms, im %.0f ms, %d parts, %s",
            claim.id,
            work.outcome,
            (asked - began) * 1000,
            (sent - asked) * 1000,
            screen.parts,
            self.persona(work.message.robot).provider or self.config.ai_provider,
        )

    def _own_words(self, work: Work) -> str | None:
        """Return what the bot itself says; "" for nothing, None to ask the AI."""
        message, texts = work.message, self.texts
        if message.kind == "stop":
            return ""
        if message.kind != "question":
            return texts[message.kind]
        if name := command(message):
            if name == "clear":
                self.store.forget(work.claim.conversation)
            return texts[name]
        readable = message.text or self.provider(message.robot).service.images
        return None if readable else texts["blind"]

    def _ask(self, work: Work) -> tuple[str, bool]:
        """Return what to answer, and whether it belongs into the memory of the chat."""
        screen, text, shown = work.screen, "", 0.0
        provider = self.provider(work.message.robot)
        chat = self._chat(work, provider)
        try:
            for text in provider.chat(chat, work.call, screen.gap):
                if screen.gap and time.monotonic() - shown >= screen.gap:
                    screen.grow(text)
                    shown = time.monotonic()
            return text, self.config.history_turns > 0
        except ProviderError as error:
            if work.lost:
                raise Lost from None
            spoken = bool(text) and error.kind in ("stopped", "length")
            remember = spoken and self.config.history_turns > 0
            return self._ask_failed(work, error, text, chat), remember

    def _ask_failed(
        self, work: Work, error: ProviderError, text: str, chat: list[Json]
    ) -> str:
        """Return what to show instead of an answer, or after half of one."""
        work.outcome = error.kind
        why = self.texts.get(error.kind, self.texts["busy"])
        if error.kind != "stopped":
            details = _without_quotes(str(error), chat)
            logger.warning("no answer for %s: %s", work.claim.id, details)
            work.screen.progress |= {} if text else {"failed": True}
            if text and error.kind != "length":
                why = self.texts["cut"].format(why)
        return f"{text}\n\n{why}" if text else why

    def _chat(self, work: Work, provider: Provider) -> list[Json]:
        """Return the question as the AI service gets it: prompt, old turns, new one."""
        message = work.message
        turns = [{"role": "user", "content": self._question(message, provider)}]
        room, most = HISTORY_CHARACTERS, self.config.history_turns
        for data, reply in self.store.history(work.claim.conversation, most)[::-1]:
            asked = self._spoken(read_message(data))
            room -= len(asked) + len(reply)
            if room < 0:
                break
            turns.append({"role": "assistant", "content": reply})
            turns.append({"role": "user", "content": asked})
        prompt = self.persona(message.robot).system_prompt
        prompt = prompt or self.config.ai_system_prompt
        return [*turns, {"role": "system", "content": prompt}][::-1]

    def _spoken(self, message: tim.Message) -> str:
        """Return a question as a line of the chat; in a group it says who asked."""
        text = message.text or "[image]"
        shared = message.group and self.config.group_memory == "group"
        return f"{message.user}: {text}" if shared else text

    def _question(self, message: tim.Message, provider: Provider) -> Any:
        text = self._spoken(message)
        if not message.images or not provider.service.images:
            return text
        urls = [{"type": "image_url", "image_url": {"url": u}} for u in message.images]
        return [{"type": "text", "text": text}, *urls]

    def _not_sent(self, claim: Claim, error: tim.IMError) -> None:
        if error.retry and time.time() - claim.accepted < GIVE_UP:
            delay = min(60.0, max(1.0, time.time() - claim.accepted))
            logger.warning("%s; trying again in %.0f s: %s", claim.id, delay, error)
            self._try_store(self.store.release, claim, delay)
        else:
            self._try_store(self.store.set_aside, claim, str(error))

    def _try_store(self, verb: Callable[..., Any], *values: Any) -> None:
        try:
            verb(*values)
        except StoreError as error:
            self._store_failed(error)

    def _store_failed(self, error: StoreError) -> None:
        if not self._store_down:
            logger.error("%s", error)
        self._store_down = True

    def _walk(self) -> None:
        """Patrol: renew our claims, and wake threads for what others left behind."""
        round = 0
        while not self._closed.wait(PATROL if round else 0):
            try:
                self._look(round)
            except StoreError as error:
                self._store_failed(error)
            except Exception:
                logger.exception("the patrol stumbled")
            round += 1

    def _look(self, round: int) -> None:
        if round % 4 == 0:
            self._renew()
        if round % 7200 == 0:
            seconds = self.config.retention_days * 86400
            self._aside(self._try_store, self.store.prune, seconds)
        while self._owed:
            self.store.release(self._owed[0], 1.0)
            self._owed.pop(0)
        self._stop_requested()
        self._waiting = self.store.stats()["waiting"]
        self._wake(self.store.due(self.config.worker_threads))
        for work in self._at_work():
            if time.monotonic() - work.screen.spoke > work.screen.idle:
                self._aside(work.screen.nudge)
        if self._store_down:
            logger.warning("the store works again")
        self._store_down = False

    @staticmethod
    def _aside(act: Callable[..., None], *values: Any) -> None:
        """Do what may take long without holding up the patrol."""
        threading.Thread(target=act, args=values, daemon=True).start()

    def _at_work(self) -> list[Work]:
        with self._lock:
            return list(self._work)

    def _renew(self) -> None:
        works = {work.claim: work for work in self._at_work()}
        for claim in self.store.renew(works) if works else []:
            works[claim].lost = True
            works[claim].call.cancel()

    def _stop_requested(self) -> None:
        works = {work.claim: work for work in self._at_work()}
        for claim in self.store.stops(works) if works else []:
            works[claim].call.cancel()

    def close(self, drain: float = DRAIN) -> None:
        """Claim no more, finish what `drain` seconds allow, release the rest."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            self._wake_up.notify_all()
            self._done.wait_for(lambda: not self._work, drain)
            left = list(self._work)
        for work in left:
            work.lost = True
            self._try_store(self.store.release, work.claim, 0.0)
            work.call.cancel()
        self._closed.set()
        logger.info("stopped; %d messages were left to others", len(left))


def make_provider(config: Config, persona: Persona) -> Provider:
    """Return the AI service of a persona, with the key that is set for it."""
    name = persona.provider or config.ai_provider
    service, url, threads = PROVIDERS[name], "", config.worker_threads
    key, model, extra = config.ai_secret_keys.get(name, ""), persona.model, {}
    if name == config.ai_provider:
        key, url, extra = config.ai_secret_key, config.ai_base_url, config.ai_extra_body
        model = model or config.ai_model
    session = open_session(url or service.url, threads)
    return Provider(service, key, url, model, extra, session)


def make_client(config: Config) -> tim.Client:
    """Return Tencent IM's REST API."""
    return tim.Client(
        config.im_api_url,
        config.im_sdkappid,
        config.im_key,
        config.im_admin,
        config.worker_threads,
    )


def _without_quotes(details: str, chat: list[Json]) -> str:
    """Return an error's details for the log, in short if they repeat what was said."""
    said = [providers.words(turn) for turn in chat if turn["role"] != "system"]
    told, all_said = details.encode(), "\n".join(said).encode()
    pieces = (told[start : start + 12] for start in range(len(told) - 11))
    quotes = any(piece in all_said for piece in pieces)
    if quotes or any(len(words) > 2 and words in details for words in said):
        return f"{details.split(': ')[0]}: (it repeats the chat)"
    return details


def _notice(message: tim.Message, refusal: str) -> tim.Message:
    """Return what is stored instead of a message that is refused. By its id the store
    knows that this user was told already."""
    every = MINUTE if refusal == "rate" else NOTICE_EVERY
    id = f"{refusal}\t{message.user}\t{time.time() // every:.0f}"
    return replace(message, id=id, kind=refusal)


def read_message(data: Json) -> tim.Message:
    """Return the message that the store kept as `data`."""
    return tim.Message(**data | {"images": tuple(data["images"])})


def command(message: tim.Message) -> str:
    """Return which command a message is, or ""."""
    return COMMANDS.get(message.text.lower(), "") if message.kind == "question" else ""


def create_app(config: Config | None = None) -> Flask:
    """Return the WSGI app, its bot at work; the environment has the settings."""
    app = Flask(__name__)
    for verb in CLI:
        app.cli.add_command(verb)
    context = click.get_current_context(silent=True)
    if context and context.info_name != "run":
        return app  # a command of `flask` makes what it needs
    config = config or _config_or_exit()
    logging.basicConfig(
        level=config.log_level,
        stream=sys.stdout,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    for name in ("urllib3", "werkzeug"):  # they log URLs, with UserSig and Sign
        logging.getLogger(name).setLevel(logging.WARNING)
    nicks = {robot: persona.nick for robot, persona in config.robots.items()}
    bot = Bot(config, _open_store_or_exit(config), make_client(config))
    bot.start()
    atexit.register(bot.close)
    _leave_on_sigterm(bot)
    logger.info(
        "version %s, store %s, AI service %s, replies %s, %d threads",
        __version__,
        "Redis" if config.redis_url else config.database,
        config.ai_provider,
        config.reply_mode,
        config.worker_threads,
    )
    app.extensions["bot"] = bot
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_CALLBACK

    @app.post("/im")
    def im() -> tuple[dict[str, Any], int]:
        try:
            _check(config, request.args)
            for message in _messages(request.args, request.get_data(), nicks):
                bot.accept(message)
        except BadSignature as error:
            return _refuse(403, str(error))
        except tim.BadEvent as error:
            return _refuse(400, str(error))
        except Overloaded:
            return _refuse(503, "too many messages wait (MAX_BACKLOG)")
        except StoreError as error:
            return _refuse(503, str(error))
        return OK, 200

    @app.get("/healthz")
    def healthz() -> tuple[dict[str, Any], int]:
        try:
            return {"status": "ok", **bot.store.stats()}, 200
        except StoreError as error:
            return {"status": str(error)}, 503

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> tuple[dict[str, Any], int]:
        return _refuse(error.code or 500, error.description or error.name)

    return app


def _leave_on_sigterm(bot: Bot) -> None:
    """Claim no more when gunicorn stops a worker, not seconds later at its exit."""
    before = signal.getsignal(signal.SIGTERM)

    def leave(number: int, frame: Any) -> None:
        bot.leaving = True
        before(number, frame)  # type: ignore[operator,misc]

    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


def _config_or_exit() -> Config:
    try:
        return Config.from_env()
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(3)  # by which gunicorn knows not to start the worker again


def _open_store_or_exit(config: Config) -> Store:
    try:
        return open_store(config.database, config.redis_url)
    except StoreError as error:
        print(
            f"{'REDIS_URL' if config.redis_url else 'DATABASE'}: {error}.",
            file=sys.stderr,
        )
        sys.exit(3)


def _check(config: Config, query: Mapping[str, str]) -> None:
    """Raise BadSignature unless the callback is Tencent's and for our app."""
    if config.im_callback_token:
        sign, request_time = query.get("Sign", ""), query.get("RequestTime", "")
        check_callback(config.im_callback_token, sign, request_time)
    if query.get("SdkAppid", str(config.im_sdkappid)) != str(config.im_sdkappid):
        raise BadSignature("SdkAppid is not this server's app")


def _messages(
    query: Mapping[str, str], body: bytes, nicks: Mapping[str, str]
) -> list[tim.Message]:
    """Return the questions in a callback. Raises tim.BadEvent."""
    try:
        event = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise tim.BadEvent("the body is not JSON") from None
    if not isinstance(event, dict):
        raise tim.BadEvent("the body is not a JSON object")
    name = event.get("CallbackCommand") or query.get("CallbackCommand")
    return tim.parse(str(name), event, nicks)


def _refuse(status: int, why: str) -> tuple[dict[str, Any], int]:
    if request.path == "/im":
        logger.warning("callback refused with %d: %s", status, why)
    return {"ActionStatus": "FAIL", "ErrorInfo": why, "ErrorCode": 1}, status


@contextmanager
def _told() -> Iterator[None]:
    """Turn what can go wrong in a command into one sentence and exit status 1."""
    try:
        yield
    except (ValueError, tim.IMError, StoreError, ProviderError) as error:
        raise click.ClickException(str(error)) from None


@click.command()
@click.argument("text")
def ask(text: str) -> None:
    """Ask the AI service TEXT, once, and print its answer as it comes."""
    config = _config_or_exit()
    provider = make_provider(config, NOBODY)
    chat = [
        {"role": "system", "content": config.ai_system_prompt},
        {"role": "user", "content": text},
    ]
    with _told():
        shown = ""
        for text in provider.chat(chat, CancelScope(config.ai_timeout), 0.2):
            new = text.removeprefix(shown)
            click.echo(new if text.startswith(shown) else f"\n{text}", nl=False)
            shown = text
    click.echo()


@click.command()
@click.argument("userid")
@click.option("--nick", default="", help="The name that users see.")
def create_robot(userid: str, nick: str) -> None:
    """Create the chatbot account USERID, such as @RBT#001."""
    with _told():
        make_client(_config_or_exit()).create_robot(userid, nick)
    click.echo(f"{userid} is there: write to it.")


@click.command()
@click.argument("userid")
def delete_robot(userid: str) -> None:
    """Delete the chatbot account USERID; its name cannot be used again."""
    with _told():
        make_client(_config_or_exit()).delete_robot(userid)
    click.echo(f"{userid} is deleted.")


@click.command()
def robots() -> None:
    """List the app's chatbot accounts."""
    with _told():
        click.echo("\n".join(make_client(_config_or_exit()).robots()))


@click.command()
@click.argument("userid")
@click.option("--expire", default=86400, help="Seconds it is valid.")
def usersig(userid: str, expire: int) -> None:
    """Print a UserSig with which USERID can log in to a chat client."""
    config = _config_or_exit()
    click.echo(gen_user_sig(config.im_sdkappid, config.im_key, userid, expire))


@click.command()
def failed() -> None:
    """List the messages that were set aside, and why."""
    with _told():
        for id, reason, age in _open_store_or_exit(_config_or_exit()).failed():
            click.echo(f"${id!r}  {age:.0f} s ago: {reason}")  # as a shell takes it


@click.command()
@click.argument("ids", nargs=-1)
def retry(ids: tuple[str, ...]) -> None:
    """Put messages that were set aside, all or those with IDS, back to be answered."""
    with _told():
        count = _open_store_or_exit(_config_or_exit()).retry(ids or None)
    click.echo(f"{count} put back.")


@click.command()
def doctor() -> None:
    """Check everything that can be checked from here; change nothing."""
    healthy = True
    config = _config_or_exit()
    for name, check in CHECKS.items():
        try:
            good, says = True, check(config)
        except (tim.IMError, StoreError, ProviderError, ValueError) as error:
            good, says = False, str(error)
        healthy = healthy and good
        click.echo(f"{'ok  ' if good else 'FAIL'} {name:9} {says}")
    click.echo(CONSOLE)
    sys.exit(not healthy)


CONSOLE = """
In the console, under Webhook: the URL https://<this server>/im, authentication with the
token of IM_CALLBACK_TOKEN, and both robot callbacks switched on."""


def _check_token(config: Config) -> str:
    if config.im_callback_token:
        return f"{len(config.im_callback_token)} accepted"
    raise ValueError("IM_CALLBACK_TOKEN is not set: anybody can spend your AI budget")


def _check_robots(config: Config) -> str:
    there = make_client(config).robots()
    if missing := [robot for robot in config.robots if robot not in there]:
        raise ValueError(f"{missing[0]} of robots.toml is not there: create-robot it")
    if not there:
        raise ValueError("there is no robot yet: use create-robot")
    return f"key accepted; {', '.join(there)}"


def _check_clock(config: Config) -> str:
    try:
        answer = requests.head(config.im_api_url, timeout=5)
        theirs = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (requests.RequestException, KeyError, ValueError) as error:
        raise ValueError(f"{config.im_api_url}: {type(error).__name__}") from None
    if abs(off := time.time() - theirs) > 30:
        raise ValueError(
            f"this server's clock is {off:+.0f} s off: callbacks will fail"
        )
    return "agrees with Tencent's"


def _check_ai(config: Config) -> str:
    seen = []
    for persona in {NOBODY, *config.robots.values()}:
        provider = make_provider(config, persona)
        chat = [{"role": "user", "content": "Say OK."}]
        began = time.monotonic()
        list(provider.chat(chat, CancelScope(config.ai_timeout)))
        name = persona.provider or config.ai_provider
        model = provider.model or provider.service.model
        seen.append(f"{name} {model} in {time.monotonic() - began:.1f} s")
    return f"answers: {', '.join(seen)}"


def _check_store(config: Config) -> str:
    if not config.redis_url and not Path(config.database).exists():
        if not os.access(Path(config.database).absolute().parent, os.W_OK):
            raise ValueError(f"{config.database} cannot be made there")
        return f"{config.database} is not there yet: the server will make it"
    state = open_store(config.database, config.redis_url).stats()
    place = "Redis" if config.redis_url else config.database
    return f"{place} works; {state['waiting']} waiting, {state['set_aside']} set aside"


CHECKS = {
    "callback": _check_token,
    "Tencent": _check_robots,
    "clock": _check_clock,
    "AI": _check_ai,
    "store": _check_store,
}
CLI = (ask, create_robot, delete_robot, robots, usersig, failed, retry, doctor)
