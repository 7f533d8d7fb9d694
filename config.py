"""The settings: what the environment and robots.toml say, checked once at the start.

`Config.from_env()` names everything that is missing or wrong in one ConfigError. The
registries below say which parts there are: an option is a line here and a file. To do
without one delete both; to add one write both. They are loaded when they are used.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from providers import PROVIDERS, Provider, Service
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
SERVICES: dict[str, Service | str] = {  # AI_PROVIDER -> a service, or where it is
    **PROVIDERS,
    "dify": "agents:DIFY",
    "adp": "agents:ADP",
}
COMMAND_LINE = [  # what `flask --app botserver` can do besides `run`
    "cli:COMMANDS",
]
CATCHING_UP = [  # how messages are found whose callbacks failed
    "missed:Missed",
]
REMOVED = {  # settings of version 1.0 -> what to write instead
    "DATABASE": "DATABASE_URL=sqlite:///botserver.db (sqlite:////… from the root)",
    "REDIS_URL": "DATABASE_URL=postgresql://user:password@host:5432/name",
}


class ConfigError(Exception):
    """Settings that are missing or wrong, a sentence each."""


def load(registry: Mapping[str, Any], name: str) -> Any:
    """Return what a registry has under a name. Raises ConfigError."""
    if not isinstance(registry[name], str):
        return registry[name]
    try:
        return resolve_name(registry[name])
    except (ImportError, AttributeError) as error:
        where = f"{name} is {registry[name]}, which cannot be loaded"
        raise ConfigError(f"{where}: {error}; see requirements.txt") from None


class Kind(NamedTuple):
    """What the text of a setting must be, and what reads it, or raises an error."""

    must_be: str
    read: Callable[[str], Any]


def number(kind: type, low: float, high: float = 2**53) -> Kind:
    """Return the kind of numbers from `low` to `high`."""

    def read(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)

    most = f" and at most {high}" if high < 2**53 else ""
    return Kind(f"a number of at least {low}{most}", read)


def matching(must_be: str, pattern: str) -> Kind:
    """Return the kind of texts that match a pattern."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError
        return text

    return Kind(must_be, read)


def one_of(*choices: str) -> Kind:
    """Return the kind of one word out of some."""
    return matching(f"one of: {', '.join(choices)}", "|".join(map(re.escape, choices)))


def address(text: str) -> str:
    """Return an HTTP address as it is. Raises ValueError."""
    url = urlsplit(text)
    if url.scheme not in ("https", "http") or not url.hostname:
        raise ValueError
    return text


def robots_file(path: str) -> dict[str, Persona]:
    """Return the personas of robots.toml. Raises ConfigError."""
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"names {path}, which is not there") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"names {path}, which cannot be read: {error}") from None
    personas, wrong = {}, []
    for robot, table in tables.items():
        if not robot.startswith(ROBOT) or not isinstance(table, dict):
            wrong.append(f'{robot} is not a robot: write ["{ROBOT}…"]')
            continue
        unknown = table.keys() - {item.name for item in fields(Persona)}
        wrong += [f"{robot} has an unknown key {name}" for name in sorted(unknown)]
        values, faults = read(Persona, table)
        wrong += [f"{robot}: {name} {why}" for name, why in faults.items()]
        personas[robot] = Persona(**values)
    if wrong:
        raise ConfigError(f"names {path}, where {'; '.join(wrong)}")
    return personas


def read(cls: Any, texts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a dataclass's settings, and what is wrong with which."""
    values, faults = {}, {}
    for item in fields(cls):
        text, kind = texts.get(item.name, ""), item.metadata["kind"]
        try:
            if not isinstance(text, str):
                faults[item.name] = "must be a text in quotes"
            elif text:
                values[item.name] = kind.read(text)
        except ConfigError as error:
            faults[item.name] = str(error)
        except (ValueError, KeyError, TypeError):
            faults[item.name] = f"must be {kind.must_be}"
    return values, faults


SWITCH = {"0": False, "no": False, "false": False, "1": True, "yes": True, "true": True}
TEXT = Kind("a text", str)
FLAG = Kind("0 or 1", lambda text: SWITCH[text.lower()])
ADDRESS = Kind("an address with https:// or http://", address)
VARIABLE = matching("the name of a variable of the environment", r"[A-Za-z_]\w*")
JSON = Kind("a JSON object", lambda text: {**json.loads(text)})
LIST = Kind(
    "words with commas between them",
    lambda text: tuple(filter(None, map(str.strip, text.split(",")))),
)
DATABASE = matching(f"a URL of one of: {', '.join(STORES)}", f"({'|'.join(STORES)}):.*")
PERSONAS = Kind("a file of personas", robots_file)


def setting(default: Any, kind: Kind = TEXT, secret: bool = False) -> Any:
    """Return a field of some kind; a secret one is not shown."""
    name = "default_factory" if callable(default) else "default"
    return field(**{name: default}, repr=not secret, metadata={"kind": kind})


@dataclass(frozen=True, kw_only=True)
class Persona:
    """A robot's own settings, from robots.toml; empty ones are the server's."""

    nick: str = setting("")
    system_prompt: str = setting("")
    provider: str = setting("", one_of(*SERVICES))
    secret_key_env: str = setting("", VARIABLE)  # which holds its key for it
    base_url: str = setting("", ADDRESS)
    model: str = setting("")
    reply_mode: str = setting("", one_of(*REPLIES))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting; its name in the environment is the name here in capitals."""

    im_sdkappid: int = setting(0, number(int, 1))
    im_key: str = setting("", secret=True)
    im_callback_token: tuple[str, ...] = setting((), LIST, secret=True)
    allow_unsigned: bool = setting(False, FLAG)
    im_admin: str = setting("administrator")
    im_api_url: str = setting("https://console.tim.qq.com", ADDRESS)
    ai_provider: str = setting("minimax", one_of(*SERVICES))
    ai_secret_key: str = setting("", secret=True)
    ai_secret_keys: dict[str, str] = setting(dict, secret=True)  # others, by variable
    ai_base_url: str = setting("", ADDRESS)
    ai_model: str = setting("")
    ai_extra_body: dict[str, Any] = setting(dict, JSON)
    ai_system_prompt: str = setting(
        "You are a helpful assistant in a chat app. Be brief."
    )
    ai_timeout: float = setting(60.0, number(float, 1))  # seconds, a whole answer
    reply_mode: str = setting("whole", one_of(*REPLIES))
    worker_threads: int = setting(64, number(int, 1))  # answers at once, per process
    database_url: str = setting("sqlite:///botserver.db", DATABASE, secret=True)
    retention_days: float = setting(7.0, number(float, 1))
    history_turns: int = setting(20, number(int, 0, 50))
    group_memory: str = setting("group", one_of("group", "member"))
    rate_limit: int = setting(20, number(int, 0))  # messages a minute; 0: no limit
    max_waiting: int = setting(20, number(int, 1))  # messages of one conversation
    max_backlog: int = setting(10_000, number(int, 1))  # messages in all
    allow_users: tuple[str, ...] = setting((), LIST)
    allow_groups: tuple[str, ...] = setting((), LIST)
    robots: dict[str, Persona] = setting(dict, PERSONAS)
    catch_up: int = setting(3600, number(int, 0, 86400))  # seconds; 0: never
    bot_language: str = setting("zh", one_of("zh", "en"))
    log_level: str = setting("INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR"))

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Config:
        """Read the environment; raise ConfigError that names all that is wrong."""
        texts = {f.name: env.get(f.name.upper(), "").strip() for f in fields(cls)}
        if not texts["robots"] and Path("robots.toml").exists():
            texts["robots"] = "robots.toml"
        if texts["ai_base_url"] and not texts["ai_provider"]:
            texts["ai_provider"] = "openai-compatible"
        values, faults = read(cls, texts)
        faults |= {n: "is missing" for n in ("im_sdkappid", "im_key") if not texts[n]}
        names = {*map(key_name, SERVICES)}
        names |= {p.secret_key_env for p in values.get("robots", {}).values()} - {""}
        keys = {name: env.get(name, "").strip() for name in names}
        config = cls(**values | {"ai_secret_keys": keys})
        wrong = [f"{name.upper()} {why}." for name, why in faults.items()]
        for name in filter(env.get, REMOVED):
            wrong.append(f"{name} is not read any more: write {REMOVED[name]}.")
        if wrong := wrong + config._disagreements():
            lines = "The settings are not complete:", *wrong, *misspelt(env, names)
            raise ConfigError("\n".join(lines))
        return config

    def _disagreements(self) -> list[str]:
        wrong = []
        if not self.im_callback_token and not self.allow_unsigned:
            wrong.append(
                "IM_CALLBACK_TOKEN is missing: without it anybody can spend your AI "
                "budget. Set ALLOW_UNSIGNED=1 if that is what you want."
            )
        for persona in {Persona(), *self.robots.values()}:
            name = persona.provider or self.ai_provider
            ai = self.provider(persona)
            if not ai.key and not ai.service.keyless:
                setting = self._key_setting(persona)
                wrong.append(f"{setting} is missing: the AI service {name} needs one.")
            if not ai.url and not ai.service.ask:
                wrong.append(f"AI_BASE_URL is missing: {name} has no address itself.")
        return sorted({*wrong})

    def persona(self, robot: str) -> Persona:
        """Return what is set for a robot."""
        return self.robots.get(robot, Persona())

    def provider(self, persona: Persona) -> Provider:
        """Return the AI service of a persona, with what is set for it."""
        name = persona.provider or self.ai_provider
        service: Service = load(SERVICES, name)
        keys = {"AI_SECRET_KEY": self.ai_secret_key} | self.ai_secret_keys
        key = keys.get(self._key_setting(persona), "")
        url, model, extra = persona.base_url, persona.model, {}
        if name == self.ai_provider:
            url, model = url or self.ai_base_url, model or self.ai_model
            extra = self.ai_extra_body
        session = Session(url or service.url, self.worker_threads)
        return Provider(service, key, url, model, extra, session)

    def _key_setting(self, persona: Persona) -> str:
        """Return the variable that holds the key of a persona's AI service."""
        if persona.secret_key_env:
            return persona.secret_key_env
        own = persona.provider not in ("", self.ai_provider)
        return key_name(persona.provider) if own else "AI_SECRET_KEY"

    def im_client(self) -> Client:
        """Return Tencent IM's REST API."""
        account = (self.im_sdkappid, self.im_key, self.im_admin)
        return Client(self.im_api_url, *account, self.worker_threads)

    def open_store(self) -> Store:
        """Return the store of DATABASE_URL. Raises ConfigError."""
        try:
            scheme = self.database_url.partition(":")[0]
            store: Store = load(STORES, scheme)(self.database_url)
            return store
        except StoreError as error:
            raise ConfigError(f"DATABASE_URL: {error}.") from None


def key_name(provider: str) -> str:
    """Return the setting that holds the key of a service that personas use."""
    return f"AI_SECRET_KEY_{provider.upper().replace('-', '_')}"


def misspelt(env: Mapping[str, str], known: Collection[str] = ()) -> list[str]:
    """Return a sentence for each variable that looks like a misspelt setting, unless
    it is known."""
    ours = [f.name.upper() for f in fields(Config) if f.name != "ai_secret_keys"]
    ours += [key_name(name) for name in SERVICES]
    found = []
    for name in sorted(env.keys() - {*ours, *REMOVED, *known}):
        alike = [own for own in ours if own[:2] == name[:2]]
        # Few variables of other programs begin like these two.
        least = 0.6 if name.startswith(("AI_", "IM_")) else 0.85
        for near in get_close_matches(name, alike, 1, least):
            found.append(f"{name} is not a setting: do you mean {near}?")
    return found
