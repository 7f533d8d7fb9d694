"""The commands of `flask --app botserver …`, for operators.

    flask --app botserver doctor         check the settings, change nothing
    flask --app botserver failed         what was given up, and why

An option: without it, delete this file and its line in COMMAND_LINE.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import click
import requests

from botserver import or_exit
from config import Config, ConfigError, Persona
from providers import Provider, ProviderError
from session import CancelScope
from store import Store, StoreError
from tim import ROBOT, IMError
from usersig import gen_user_sig

LISTED = 100  # failed messages
LONGEST_ROBOT = 32  # bytes of a chatbot's UserID
CONSOLE = """
In the console, under Webhook: the URL https://<this server>/im, authentication with the
token of IM_CALLBACK_TOKEN, and both robot callbacks switched on."""


@contextmanager
def cli_errors() -> Iterator[None]:
    """Turn what can go wrong in a command into one sentence and exit status 1."""
    try:
        yield
    except (ValueError, IMError, StoreError, ProviderError) as error:
        raise click.ClickException(str(error)) from None


@contextmanager
def opened_store() -> Iterator[Store]:
    """Open the store for a command."""
    config = or_exit(Config.from_env)
    with cli_errors(), closing(or_exit(config.open_store)) as store:
        yield store


@click.command()
@click.argument("text")
def ask(text: str) -> None:
    """Ask the AI service TEXT, once, and print its answer."""
    config = or_exit(Config.from_env)
    chat = [
        {"role": "system", "content": config.ai_system_prompt},
        {"role": "user", "content": text},
    ]
    with cli_errors():
        click.echo(answer_of(config.provider(Persona()), chat, config))


def answer_of(provider: Provider, chat: list[dict[str, str]], config: Config) -> str:
    """Return the whole answer to a chat. Raises ProviderError."""
    *_, answer = provider.chat(chat, CancelScope(config.ai_timeout))
    return answer


@click.command()
@click.argument("userid")
@click.option("--nick", default="", help="The name that users see.")
def create_robot(userid: str, nick: str) -> None:
    """Create the chatbot account USERID, such as @RBT#001."""
    if not userid.startswith(ROBOT) or len(userid.encode()) > LONGEST_ROBOT:
        raise click.ClickException(
            f"{userid!r} cannot be a robot: its UserID must start with {ROBOT} "
            f"and have at most {LONGEST_ROBOT} bytes"
        )
    body = {"UserID": userid} | ({"Nick": nick} if nick else {})
    with cli_errors():
        call_robots(or_exit(Config.from_env), "create_robot", body)
    click.echo(f"{userid} is there: write to it.")


@click.command()
@click.argument("userid")
def delete_robot(userid: str) -> None:
    """Delete the chatbot account USERID; its name cannot be used again."""
    with cli_errors():
        body = {"Robot_Account": userid}
        call_robots(or_exit(Config.from_env), "delete_robot", body)
    click.echo(f"{userid} is deleted.")


@click.command()
def robots() -> None:
    """List the app's chatbot accounts."""
    with cli_errors():
        click.echo("\n".join(list_robots(or_exit(Config.from_env))))


def list_robots(config: Config) -> list[str]:
    """Return the UserIDs of the app's chatbot accounts. Raises IMError."""
    answer = call_robots(config, "get_all_robots", {})
    return [str(userid) for userid in answer.get("Robot_Account") or []]


def call_robots(config: Config, verb: str, body: dict[str, str]) -> dict[str, Any]:
    """Make a REST call about chatbot accounts. Raises IMError."""
    return config.im_client().call(f"openim_robot_http_svc/{verb}", body)


@click.command()
@click.argument("userid")
@click.option("--expire", default=86400, help="Seconds it is valid.")
def usersig(userid: str, expire: int) -> None:
    """Print a UserSig with which USERID can log in to a chat client."""
    config = or_exit(Config.from_env)
    click.echo(gen_user_sig(config.im_sdkappid, config.im_key, userid, expire))


@click.command()
def failed() -> None:
    """List the messages that were given up, and why."""
    with opened_store() as store:
        found = store.failed()
    for number, _, reason, age in found[:LISTED]:
        click.echo(f"{number}  {age:.0f} s ago: {reason}")
    if (more := len(found) - LISTED) > 0:
        click.echo(f"and {more} more")


@click.command()
@click.argument("numbers", nargs=-1, type=int)
def retry(numbers: tuple[int, ...]) -> None:
    """Let messages that were given up, all or those with NUMBERS, be answered."""
    with opened_store() as store:
        count = store.retry(numbers or None)
    click.echo(f"{count} put back.")


@click.command()
def doctor() -> None:
    """Check everything that can be checked from here; change nothing."""
    healthy = True
    config = or_exit(Config.from_env)
    for name, check in CHECKS.items():
        try:
            good, says = True, check(config)
        except (IMError, StoreError, ProviderError, ConfigError, ValueError) as error:
            good, says = False, str(error)
        healthy = healthy and good
        click.echo(f"{'ok  ' if good else 'FAIL'} {name:9} {says}")
    click.echo(CONSOLE)
    sys.exit(not healthy)


def check_token(config: Config) -> str:
    """Say whether callbacks are signed."""
    if config.im_callback_token:
        return f"{len(config.im_callback_token)} accepted"
    raise ValueError("IM_CALLBACK_TOKEN is not set: anybody can spend your AI budget")


def check_robots(config: Config) -> str:
    """Say whether Tencent takes the key, and which robots there are."""
    there = list_robots(config)
    if missing := [robot for robot in config.robots if robot not in there]:
        raise ValueError(f"{missing[0]} of robots.toml is not there: create-robot it")
    if not there:
        raise ValueError("there is no robot yet: use create-robot")
    return f"key accepted; {', '.join(there)}"


def check_clock(config: Config) -> str:
    """Say whether this machine's clock is right."""
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


def check_ai(config: Config) -> str:
    """Say how fast each AI service answers."""
    seen = []
    for persona in {Persona(), *config.robots.values()}:
        provider, began = config.provider(persona), time.monotonic()
        answer_of(provider, [{"role": "user", "content": "Say OK."}], config)
        name = persona.provider or config.ai_provider
        model = provider.model or provider.service.model
        seen.append(f"{name} {model} in {time.monotonic() - began:.1f} s")
    return f"answers: {', '.join(seen)}"


def check_store(config: Config) -> str:
    """Say what the store promises, and what is in it."""
    scheme, _, path = config.database_url.partition(":///")
    if scheme == "sqlite" and not Path(path).exists():
        if not os.access(Path(path).absolute().parent, os.W_OK):
            raise ValueError(f"{path} cannot be made there")
        return f"{path} is not there yet: the server will make it"
    with closing(config.open_store()) as store:
        state = store.stats()
        return (
            f"{store.durability()}; {state['waiting']} waiting, "
            f"{state['failed']} failed"
        )


CHECKS = {
    "callback": check_token,
    "Tencent": check_robots,
    "clock": check_clock,
    "AI": check_ai,
    "store": check_store,
}
COMMANDS = (ask, create_robot, delete_robot, robots, usersig, failed, retry, doctor)
