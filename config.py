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

from providers import PROVIDERS
from tim import ROBOT

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
LANGUAGES = ("zh", "en")


class ConfigError(Exception):
    """Settings that are missing or wrong, a sentence each."""


def load(registry: Mapping[str, str], name: str) -> Any:
    """Return what a registry has under a name. Raises ConfigError."""
    try:
        return resolve_name(registry[name])
    except KeyError:
        raise ConfigError(f"{name} is none of: {', '.join(registry)}") from None
    except ImportError as error:
        raise ConfigError(
            f"{name} needs {error.name}, which is not installed: see requirements.txt"
        ) from None


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
    reply_mode: str = setting("", choices=tuple(REPLIES))


DEFAULT_PERSONA = Persona()


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
    reply_mode: str = setting("whole", choices=tuple(REPLIES))
    worker_threads: int = setting(64, low=1)  # answers in work at once, per process
    database_url: str = setting("sqlite:///botserver.db", secret=True)
    retention_days: float = setting(7.0, low=1)
    history_turns: int = setting(20, high=50)
    group_memory: str = setting("group", choices=("group", "member"))
    rate_limit: int = setting(20)  # messages a user a minute; 0 for no limit
    max_waiting: int = setting(20, low=1)  # messages of one conversation
    max_backlog: int = setting(10_000, low=1)  # messages in all
    allow_users: tuple[str, ...] = setting(())
    allow_groups: tuple[str, ...] = setting(())
    robots: dict[str, Persona] = field(
        default_factory=dict, metadata={"file": "robots.toml"}
    )
    bot_language: str = setting("zh", choices=LANGUAGES)
    log_level: str = setting("INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Config:
        """Read the environment; raise ConfigError that names all that is wrong."""
        names = [item.name for item in fields(cls) if item.name != "ai_secret_keys"]
        texts = {name: env.get(name.upper(), "").strip() for name in names}
        values, wrong = _read_all(cls, texts, str.upper)
        keys = {name: env.get(_key_name(name), "").strip() for name in PROVIDERS}
        values["ai_secret_keys"] = {name: key for name, key in keys.items() if key}
        wrong += _removed(env) + _disagreements(values)
        if wrong:
            raise ConfigError("\n".join(["The settings are not complete:", *wrong]))
        return cls(**values)

    def persona(self, robot: str) -> Persona:
        """Return what is set for a robot."""
        return self.robots.get(robot, DEFAULT_PERSONA)


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
    read = {robot: _read_persona(robot, table) for robot, table in tables.items()}
    if wrong := [fault for _, faults in read.values() for fault in faults]:
        raise ValueError(f"names {path}, where {'; '.join(wrong)}")
    return {robot: Persona(**values) for robot, (values, _) in read.items()}


def _read_persona(robot: str, table: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a robot's table, and what is wrong with it."""
    if not robot.startswith(ROBOT) or not isinstance(table, dict):
        return {}, [f'{robot} is not a robot: write ["{ROBOT}…"]']
    values, wrong = _read_all(Persona, table, lambda name: f"{robot}: {name}")
    unknown = table.keys() - {item.name for item in fields(Persona)}
    more = [f"{robot} has an unknown key {name}" for name in sorted(unknown)]
    return values, more + [fault.rstrip(".") for fault in wrong]


def _removed(env: Mapping[str, str]) -> list[str]:
    """Return a sentence for each setting that an earlier version had."""
    wrong = []
    if file := env.get("DATABASE"):
        absolute = "/" if file.startswith("/") else ""
        wrong.append(
            "DATABASE is not read any more: write "
            f"DATABASE_URL=sqlite:///{absolute}{file.lstrip('/')} instead."
        )
    if env.get("REDIS_URL"):
        wrong.append(
            "REDIS_URL is not read any more, messages are kept in PostgreSQL: write "
            "DATABASE_URL=postgresql://user:password@host:5432/name instead."
        )
    return wrong


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
    scheme = values.get("database_url", "sqlite").partition(":")[0]
    if scheme not in STORES:
        wrong.append(f"DATABASE_URL must start with one of: {', '.join(STORES)}.")
    return wrong
