"""The settings: what the environment and robots.toml say, checked once at the start.

`Config.from_env()` names everything that is missing or wrong in one ConfigError. The
registries below say which parts there are: an option is a line here and a file. To do
without one delete both; to add one write both. They are loaded when they are used.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from urllib.parse import urlsplit

from providers import PROVIDERS, Provider
from session import Session
from store import Store, StoreError
from tim import ROBOT, Client

REPLIES = {  # REPLY_MODE -> how an answer is shown
    "whole": "replies:PlainReply",
    "modify": "growing:EditedReply",
    "custom": "growing:CardReply",
    "stream": "growing:StreamReply",
}
STORES = {  # the scheme of DATABASE_URL -> where messages wait
    "sqlite": "store:SQLiteStore",
    "postgres": "postgres:PostgresStore",
    "postgresql": "postgres:PostgresStore",
}
COMMAND_LINE = [  # what `flask --app botserver` can do besides `run`
    "cli:COMMANDS",
]
REMOVED = {  # settings of version 1.0 -> what to write instead
    "DATABASE": "DATABASE_URL=sqlite:///botserver.db (sqlite:////… from the root)",
    "REDIS_URL": "DATABASE_URL=postgresql://user:password@host:5432/name",
}


class ConfigError(Exception):
    """Settings that are missing or wrong, a sentence each."""


def load(registry: Mapping[str, str], name: str) -> Any:
    """Return what a registry has under a name. Raises ConfigError."""
    try:
        return resolve_name(registry[name])
    except ImportError as error:
        why = f"{name} needs {error.name}, which is not installed: see requirements.txt"
        raise ConfigError(why) from None


def word(text: Any) -> str:
    """Read a text as it is."""
    if not isinstance(text, str):
        raise ValueError("must be a text in quotes")
    return text


def number(kind: type, low: float, high: float = 2**53) -> Callable[[str], Any]:
    """Return a reader of numbers from `low` to `high`."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            most = f" and at most {high}" if high < 2**53 else ""
            raise ValueError(f"must be a number of at least {low}{most}")
        return value

    return read


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a reader of one of some words."""

    def read(text: Any) -> str:
        if word(text) not in choices:
            raise ValueError(f"must be one of: {', '.join(choices)}")
        return str(text)

    return read


def flag(text: str) -> bool:
    """Read a switch."""
    if text.lower() not in ("0", "1", "true", "false", "yes", "no"):
        raise ValueError("must be 0 or 1")
    return text.lower() in ("1", "true", "yes")


def address(text: str) -> str:
    """Read an HTTP address."""
    try:
        url = urlsplit(text)
    except ValueError:
        url = urlsplit("")
    if url.scheme not in ("https", "http") or not url.hostname:
        raise ValueError("must be an address with https:// or http://")
    return text


def listed(text: str) -> tuple[str, ...]:
    """Read words with commas between them."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def database(text: str) -> str:
    """Read the address of a database."""
    one_of(*STORES)(text.partition(":")[0])
    return text


def robots_file(path: str) -> dict[str, Persona]:
    """Read the personas of robots.toml."""
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"names {path}, which is not there") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"names {path}, which cannot be read: {error}") from None
    personas, wrong = {}, []
    for robot, table in tables.items():
        if not robot.startswith(ROBOT) or not isinstance(table, dict):
            wrong.append(f'{robot} is not a robot: write ["{ROBOT}…"]')
            continue
        unknown = table.keys() - {item.name for item in fields(Persona)}
        wrong += [f"{robot} has an unknown key {name}" for name in sorted(unknown)]
        values, faults = _read_all(Persona, table)
        wrong += [f"{robot}: {name} {why}" for name, why in faults]
        personas[robot] = Persona(**values)
    if wrong:
        raise ValueError(f"names {path}, where {'; '.join(wrong)}")
    return personas


def setting(
    default: Any = MISSING, read: Callable[[Any], Any] = word, secret: bool = False
) -> Any:
    """Return a field: its default, how its text is read, whether it may be shown."""
    factory = (
        {"default_factory": default} if callable(default) else {"default": default}
    )
    return field(**factory, repr=not secret, metadata={"read": read})


@dataclass(frozen=True, kw_only=True)
class Persona:
    """A robot's own settings, from robots.toml; empty ones are the server's."""

    nick: str = setting("")
    system_prompt: str = setting("")
    provider: str = setting("", one_of(*PROVIDERS))
    model: str = setting("")
    reply_mode: str = setting("", one_of(*REPLIES))


DEFAULT_PERSONA = Persona()


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting; its name in the environment is the name here in capitals."""

    im_sdkappid: int = setting(read=number(int, 1))
    im_key: str = setting(secret=True)
    im_callback_token: tuple[str, ...] = setting((), listed, secret=True)
    allow_unsigned: bool = setting(False, flag)
    im_admin: str = setting("administrator")
    im_api_url: str = setting("https://console.tim.qq.com", address)
    ai_provider: str = setting("minimax", one_of(*PROVIDERS))
    ai_secret_key: str = setting("", secret=True)
    ai_secret_keys: dict[str, str] = setting(dict, secret=True)
    ai_base_url: str = setting("", address)
    ai_model: str = setting("")
    ai_extra_body: dict[str, Any] = setting(dict, json_object)
    ai_system_prompt: str = setting(
        "You are a helpful assistant in a chat app. Be brief."
    )
    ai_timeout: float = setting(60.0, number(float, 1))  # seconds, a whole answer
    reply_mode: str = setting("whole", one_of(*REPLIES))
    worker_threads: int = setting(64, number(int, 1))  # answers at once, per process
    database_url: str = setting("sqlite:///botserver.db", database, secret=True)
    retention_days: float = setting(7.0, number(float, 1))
    history_turns: int = setting(20, number(int, 0, 50))
    group_memory: str = setting("group", one_of("group", "member"))
    rate_limit: int = setting(20, number(int, 0))  # messages a minute; 0: no limit
    max_waiting: int = setting(20, number(int, 1))  # messages of one conversation
    max_backlog: int = setting(10_000, number(int, 1))  # messages in all
    allow_users: tuple[str, ...] = setting((), listed)
    allow_groups: tuple[str, ...] = setting((), listed)
    robots: dict[str, Persona] = setting(dict, robots_file)
    bot_language: str = setting("zh", one_of("zh", "en"))
    log_level: str = setting("INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR"))

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Config:
        """Read the environment; raise ConfigError that names all that is wrong."""
        texts = {f.name: env.get(f.name.upper(), "").strip() for f in fields(cls)}
        if not texts["robots"] and Path("robots.toml").exists():
            texts["robots"] = "robots.toml"
        values, faults = _read_all(cls, texts)
        keys = {name: env.get(key_name(name), "").strip() for name in PROVIDERS}
        values["ai_secret_keys"] = {name: key for name, key in keys.items() if key}
        wrong = [f"{name.upper()} {why}." for name, why in faults]
        for name in filter(env.get, REMOVED):
            wrong.append(f"{name} is not read any more: write {REMOVED[name]}.")
        wrong += cls(**{"im_sdkappid": 0, "im_key": "", **values})._disagreements()
        if wrong:
            raise ConfigError("\n".join(["The settings are not complete:", *wrong]))
        return cls(**values)

    def _disagreements(self) -> list[str]:
        wrong = []
        if not self.im_callback_token and not self.allow_unsigned:
            wrong.append(
                "IM_CALLBACK_TOKEN is missing: without it anybody can spend your AI "
                "budget. Set ALLOW_UNSIGNED=1 if that is what you want."
            )
        if not self.ai_secret_key and not PROVIDERS[self.ai_provider].keyless:
            name = self.ai_provider
            wrong.append(f"AI_SECRET_KEY is missing: the AI service {name} needs one.")
        for robot, persona in self.robots.items():
            name = persona.provider or self.ai_provider
            keyed = {self.ai_provider, *self.ai_secret_keys}
            if name not in keyed and not PROVIDERS[name].keyless:
                wrong.append(f"{key_name(name)} is missing: {robot} uses {name}.")
        return wrong

    def persona(self, robot: str) -> Persona:
        """Return what is set for a robot."""
        return self.robots.get(robot, DEFAULT_PERSONA)

    def provider(self, persona: Persona) -> Provider:
        """Return the AI service of a persona, with the key that is set for it."""
        name = persona.provider or self.ai_provider
        service, url, extra = PROVIDERS[name], "", {}
        key, model = self.ai_secret_keys.get(name, ""), persona.model
        if name == self.ai_provider:
            key, url, extra = self.ai_secret_key, self.ai_base_url, self.ai_extra_body
            model = model or self.ai_model
        session = Session(url or service.url, self.worker_threads)
        return Provider(service, key, url, model, extra, session)

    def im_client(self) -> Client:
        """Return Tencent IM's REST API."""
        account = (self.im_sdkappid, self.im_key, self.im_admin)
        return Client(self.im_api_url, *account, self.worker_threads)

    def open_store(self) -> Store:
        """Return the store of DATABASE_URL. Raises ConfigError."""
        try:
            store: Store = load(STORES, self.database_url.partition(":")[0])(
                self.database_url
            )
            return store
        except StoreError as error:
            raise ConfigError(f"DATABASE_URL: {error}.") from None


def key_name(provider: str) -> str:
    """Return the setting that holds the key of a service that personas use."""
    return f"AI_SECRET_KEY_{provider.upper().replace('-', '_')}"


def _read_all(
    kind: Any, texts: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the values of a dataclass's fields, and what is wrong with which."""
    values, wrong = {}, []
    for item in fields(kind):
        text = texts.get(item.name)
        try:
            if text:
                values[item.name] = item.metadata["read"](text)
            elif item.default is MISSING and item.default_factory is MISSING:
                wrong.append((item.name, "is missing"))
        except ValueError as error:
            wrong.append((item.name, str(error)))
    return values, wrong
