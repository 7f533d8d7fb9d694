"""A chatbot server for Tencent Cloud IM (Tencent Cloud Chat).

Tencent calls `POST /im` when somebody writes to a robot account (@RBT#…) or mentions one
in a group. The message is checked, stored and acknowledged at once; a pool of threads
asks the AI service and answers as the robot. Read `create_app` for the way in and `Bot`
for the way out.

    gunicorn --worker-class gthread --threads 8 'botserver:create_app()'

Settings come from the environment: see `Config` and README.md.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import click
from flask import Flask, request
from werkzeug.exceptions import HTTPException

import providers
import tim
from providers import PROVIDERS, Call, Provider, ProviderError
from store import Claim, SQLiteStore, Store, StoreError
from usersig import BadSignature, check_callback

LARGEST_CALLBACK = 1 << 20  # bytes
PATROL = 1.0  # seconds between two looks at what the store holds for us
RENEWAL = 5.0  # seconds between two renewals of our claims
DRAIN = 20.0  # seconds for answers in work when the server stops
HISTORY_CHARACTERS = 24_000  # of old turns in one question

logger = logging.getLogger(__name__)

TEXTS = {
    "zh": {
        "busy": "AI 服务正忙，请稍后再试。",
        "slow": "这个问题没能及时答完，请换个简单的问法再试。",
        "quota": "AI 服务的额度已用完，请联系管理员。",
        "filter": "这个问题我不能回答，请换个话题。",
        "long": "对话太长了，请发送 /clear 重新开始。",
        "empty": "这次我没有想出答案，请换个说法再试。",
        "setup": "AI 服务的设置有误，请联系管理员。",
    },
    "en": {
        "busy": "The AI service is busy. Please try again in a moment.",
        "slow": "I could not finish this answer in time. Please ask something simpler.",
        "quota": "The AI service's quota is used up. Please tell the administrator.",
        "filter": "I cannot answer this. Please ask something else.",
        "long": "This chat has become too long. Please send /clear to start again.",
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
    ai_base_url: str = setting("")
    ai_model: str = setting("")
    ai_extra_body: dict[str, Any] = field(default_factory=dict)
    ai_system_prompt: str = setting(
        "You are a helpful assistant in a chat app. Be brief."
    )
    ai_timeout: float = setting(60.0, low=1)  # seconds, for the whole answer
    worker_threads: int = setting(64, low=1)  # answers in work at once, per process
    database: str = setting("botserver.db")
    history_turns: int = setting(20)
    group_memory: str = setting("group", choices=("group", "member"))
    max_backlog: int = setting(10_000, low=1)
    bot_language: str = setting("zh", choices=tuple(TEXTS))
    log_level: str = setting("INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Config:
        """Read the environment; raise ConfigError that names all that is wrong."""
        values: dict[str, Any] = {}
        wrong = []
        for item in fields(cls):
            text = env.get(item.name.upper(), "").strip()
            try:
                if text:
                    values[item.name] = _read(text, str(item.type), item.metadata)
                elif item.default is MISSING and item.default_factory is MISSING:
                    raise ValueError("is missing")
            except ValueError as error:
                wrong.append(f"{item.name.upper()} {error}.")
        if wrong := wrong + _disagreements(values):
            raise ConfigError("\n".join(["The settings are not complete:", *wrong]))
        return cls(**values)


def _read(text: str, kind: str, limits: Mapping[str, Any]) -> Any:
    if kind.startswith("tuple"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind.startswith("dict"):
        return _read_object(text)
    if kind == "bool":
        if text.lower() not in ("0", "1", "true", "false", "yes", "no"):
            raise ValueError("must be 0 or 1")
        return text.lower() in ("1", "true", "yes")
    if kind == "str":
        if (choices := limits.get("choices")) and text not in choices:
            raise ValueError(f"must be one of: {', '.join(choices)}")
        return text
    return _read_number(text, int if kind == "int" else float, limits["low"])


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _read_number(text: str, kind: type[int] | type[float], low: float) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not low <= number < 2**53:
        raise ValueError(f"must be a number of at least {low}")
    return number


def _disagreements(values: Mapping[str, Any]) -> list[str]:
    wrong = []
    if not values.get("im_callback_token") and not values.get("allow_unsigned"):
        wrong.append(
            "IM_CALLBACK_TOKEN is missing: without it anybody can spend your AI budget. "
            "Set ALLOW_UNSIGNED=1 if that is what you want."
        )
    name = values.get("ai_provider", "minimax")
    if not values.get("ai_secret_key") and not PROVIDERS[name].keyless:
        wrong.append(f"AI_SECRET_KEY is missing: the AI service {name} needs one.")
    for name in ("im_api_url", "ai_base_url"):
        if not values.get(name, "https://").startswith(("https://", "http://")):
            wrong.append(f"{name.upper()} must start with https:// or http://.")
    return wrong


class Overloaded(Exception):
    """More messages wait than MAX_BACKLOG allows."""


@dataclass(eq=False)
class Work:
    """A claim in the hands of a thread of this process."""

    claim: Claim
    message: tim.Message
    call: Call


class Bot:
    """Answers what waits in the store, with a pool of threads that starts on demand."""

    def __init__(
        self, config: Config, store: Store, im: tim.Client, provider: Provider
    ) -> None:
        self.config, self.store, self.im, self.provider = config, store, im, provider
        self.texts = TEXTS[config.bot_language]
        self._state = threading.Condition()  # guards what follows
        self._work: set[Work] = set()
        self._threads = self._idle = self._wanted = 0
        self._closing = threading.Event()
        self._waiting = 0.0  # messages in the store, as the patrol last saw it
        self._store_down = False
        self._patrol = threading.Thread(target=self._walk, daemon=True)

    def start(self) -> None:
        """Begin to answer: first what an earlier process left behind."""
        self._patrol.start()

    def accept(self, message: tim.Message) -> None:
        """Store a message and wake a thread for it. Raises StoreError, Overloaded."""
        if self._waiting >= self.config.max_backlog:
            raise Overloaded
        conversation = message.conversation(self.config.group_memory == "member")
        if self.store.add(message.id, conversation, asdict(message)):
            self._waiting += 1
            self._wake(1)

    def _wake(self, count: int) -> None:
        with self._state:
            self._wanted = min(self._wanted + count, self.config.worker_threads)
            missing = min(
                self._wanted - self._idle, self.config.worker_threads - self._threads
            )
            for _ in range(max(0, missing) if not self._closing.is_set() else 0):
                self._threads += 1
                threading.Thread(target=self._run, daemon=True).start()
            self._state.notify(count)

    def _run(self) -> None:
        """Be a thread of the pool."""
        while True:
            with self._state:
                self._idle += 1
                while not self._wanted and not self._closing.is_set():
                    self._state.wait()
                self._idle -= 1
                self._wanted -= 1
            while claim := self._claim():
                self._answer(claim)
            if self._closing.is_set():
                return

    def _claim(self) -> Claim | None:
        if self._closing.is_set():
            return None
        try:
            return self.store.claim()
        except StoreError as error:
            self._store_failed(error)
            return None

    def _answer(self, claim: Claim) -> None:
        """Answer one message, whatever happens."""
        call = Call(self.config.ai_timeout)
        work = Work(claim, tim.Message(**claim.data), call)
        with self._state:
            self._work.add(work)
        try:
            self._ask_and_send(work)
        except tim.IMError as error:
            self._not_sent(claim, error)
        except StoreError as error:  # the claim runs out and somebody goes on
            self._store_failed(error)
        except Exception:
            logger.exception("message %s failed", claim.id)
            self._try_store(self.store.release, claim, 1.0, True)
        finally:
            with self._state:
                self._work.discard(work)
                self._state.notify_all()

    def _ask_and_send(self, work: Work) -> None:
        claim, began = work.claim, time.monotonic()
        reply = claim.reply
        if reply is None:
            reply, remember = self._ask(work)
            if not self.store.keep(claim, reply, remember):
                return  # somebody else has the message now
        asked = time.monotonic()
        self.im.send(work.message, reply, claim.seq)
        sent = time.monotonic()
        self.store.finish(claim)
        logger.info(
            "answered %s: ai %.0f ms, im %.0f ms",
            claim.id.replace("\t", " "),
            (asked - began) * 1000,
            (sent - asked) * 1000,
        )

    def _ask(self, work: Work) -> tuple[str, bool]:
        """Return what to answer, and whether it belongs into the memory of the chat."""
        try:
            chunks = self.provider.chat(self._chat(work), work.call, whole=True)
            return providers.joined(chunks), self.config.history_turns > 0
        except ProviderError as error:
            if error.kind == "stopped":
                raise StoreError("the claim was lost") from None
            logger.warning("no answer for %s: %s", work.claim.id, error)
            return self.texts.get(error.kind, self.texts["busy"]), False

    def _chat(self, work: Work) -> list[dict[str, Any]]:
        """Return the question as the AI service gets it: prompt, old turns, new one."""
        turns = [{"role": "user", "content": work.message.text}]
        room = HISTORY_CHARACTERS
        history = self.store.history(work.claim.conversation, self.config.history_turns)
        for data, reply in reversed(history):
            room -= len(data["text"]) + len(reply)
            if room < 0:
                break
            turns.append({"role": "assistant", "content": reply})
            turns.append({"role": "user", "content": data["text"]})
        turns.append({"role": "system", "content": self.config.ai_system_prompt})
        return turns[::-1]

    def _not_sent(self, claim: Claim, error: tim.IMError) -> None:
        if error.retry:
            delay = min(60.0, max(1.0, time.time() - claim.accepted))
            logger.warning("%s; trying again in %.0f s: %s", claim.id, delay, error)
            self._try_store(self.store.release, claim, delay)
        else:
            self._try_store(self.store.set_aside, claim, str(error))

    def _try_store(self, verb: Any, *values: Any) -> None:
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
        renew_at = 0.0
        while not self._closing.is_set():
            try:
                if time.monotonic() >= renew_at:
                    self._renew()
                    renew_at = time.monotonic() + RENEWAL
                self._waiting = self.store.stats()["waiting"]
                self._wake(self.store.due(self.config.worker_threads))
                if self._store_down:
                    logger.warning("the store works again")
                self._store_down = False
            except StoreError as error:
                self._store_failed(error)
            self._closing.wait(PATROL)

    def _renew(self) -> None:
        with self._state:
            works = {work.claim: work for work in self._work}
        for claim in self.store.renew(works):
            works[claim].call.stop()

    def close(self, drain: float = DRAIN) -> None:
        """Claim no more, let answers in work finish for `drain` seconds, release the rest."""
        with self._state:
            if self._closing.is_set():
                return
            self._closing.set()
            self._state.notify_all()
            self._state.wait_for(lambda: not self._work, drain)
            left = list(self._work)
        for work in left:
            self._try_store(self.store.release, work.claim, 0.0)
            work.call.stop()
        logger.info("stopped; %d messages were left to others", len(left))


def create_app(config: Config | None = None) -> Flask:
    """Return the WSGI app, its bot at work. Without `config` it reads the environment."""
    app = Flask(__name__)
    app.cli.add_command(create_robot)
    context = click.get_current_context(silent=True)
    if context and context.info_name != "run":
        return app  # a command of `flask` makes what it needs
    config = config or _config_or_exit()
    logging.basicConfig(
        level=config.log_level,
        stream=sys.stdout,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    # At DEBUG it logs whole URLs, and those of Tencent's REST API hold the UserSig.
    logging.getLogger("urllib3").setLevel(logging.WARNING)
    bot = _make_bot(config)
    bot.start()
    atexit.register(bot.close)
    app.extensions["bot"] = bot
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_CALLBACK

    @app.post("/im")
    def im() -> tuple[dict[str, Any], int]:
        try:
            _check(config, request.args)
            for message in _messages(request.args, request.get_data()):
                bot.accept(message)
        except BadSignature as error:
            return _refuse(403, str(error))
        except tim.BadEvent as error:
            return _refuse(400, str(error))
        except Overloaded:
            return _refuse(503, "too many messages wait (MAX_BACKLOG)")
        except StoreError as error:
            return _refuse(503, str(error))
        return {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0}, 200

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


def _config_or_exit() -> Config:
    try:
        return Config.from_env()
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(3)  # by which gunicorn knows not to start the worker again


def _make_bot(config: Config) -> Bot:
    im = tim.Client(
        config.im_api_url, config.im_sdkappid, config.im_key, config.im_admin
    )
    provider = Provider(
        PROVIDERS[config.ai_provider],
        config.ai_secret_key,
        config.ai_base_url,
        config.ai_model,
        config.ai_extra_body,
        providers.open_session(config.worker_threads),
    )
    try:
        return Bot(config, SQLiteStore(config.database), im, provider)
    except StoreError as error:
        print(f"DATABASE: {error}.", file=sys.stderr)
        sys.exit(3)


def _check(config: Config, query: Mapping[str, str]) -> None:
    """Raise BadSignature unless the callback is Tencent's and for our app."""
    if config.im_callback_token:
        sign, request_time = query.get("Sign", ""), query.get("RequestTime", "")
        check_callback(config.im_callback_token, sign, request_time)
    if query.get("SdkAppid", str(config.im_sdkappid)) != str(config.im_sdkappid):
        raise BadSignature(403, "SdkAppid is not this server's app")


def _messages(query: Mapping[str, str], body: bytes) -> list[tim.Message]:
    """Return the questions in a callback. Raises tim.BadEvent."""
    try:
        event = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise tim.BadEvent("the body is not JSON") from None
    if not isinstance(event, dict):
        raise tim.BadEvent("the body is not a JSON object")
    command = event.get("CallbackCommand") or query.get("CallbackCommand")
    return tim.parse(str(command), event)


def _refuse(status: int, why: str) -> tuple[dict[str, Any], int]:
    logger.warning("callback refused with %d: %s", status, why)
    return {"ActionStatus": "FAIL", "ErrorInfo": why, "ErrorCode": 1}, status


@click.command()
@click.argument("userid")
@click.option("--nick", default="", help="The name that users see.")
def create_robot(userid: str, nick: str) -> None:
    """Create the chatbot account USERID, such as @RBT#001."""
    config = _config_or_exit()
    im = tim.Client(
        config.im_api_url, config.im_sdkappid, config.im_key, config.im_admin
    )
    try:
        im.create_robot(userid, nick)
    except (ValueError, tim.IMError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{userid} is there: write to it.")
