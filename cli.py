"""The commands of `flask --app botserver …`, for operators.

    flask --app botserver doctor         check the settings, change nothing
    flask --app botserver failed         what was given up, and why

An option: without it, delete this file and its line in COMMAND_LINE.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from email.utils import parsedate_to_datetime
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click
import requests

from config import CATCHING_UP, Config, ConfigError, Persona, misspelt
from providers import ProviderError
from session import CancelScope
from store import Store, StoreError
from tim import ROBOT, IMError, Message, clean
from usersig import gen_user_sig

LISTED = 100  # failed messages
WAIT = 5.0  # seconds in which `say` looks whether a message is sent
GROUP = "@TGS#"  # how a group's id starts, unless the app chose it
LONGEST_ROBOT = 32  # bytes of a chatbot's UserID
ROBOT_API = "openim_robot_http_svc"
CONSOLE = """
In the console, under Webhook: the URL https://<this server>/im, authentication with the
token of IM_CALLBACK_TOKEN, and both robot callbacks switched on."""
ERRORS = (ValueError, ConfigError, IMError, StoreError, ProviderError)
COMMANDS: list[click.Command] = []


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function; it gets the settings, and errors end it."""

    @wraps(run)
    def checked(**given: Any) -> None:
        try:
            run(Config.from_env(), **given)
        except ERRORS as error:
            raise click.ClickException(str(error)) from None

    COMMANDS.append(click.command()(checked))
    return run


@command
@click.argument("userid")
@click.option("--nick", default="", help="The name that users see.")
def create_robot(config: Config, userid: str, nick: str) -> None:
    """Create the chatbot account USERID, such as @RBT#001."""
    if not userid.startswith(ROBOT) or len(userid.encode()) > LONGEST_ROBOT:
        raise ValueError(
            f"{userid!r} cannot be a robot: its UserID must start with {ROBOT} "
            f"and have at most {LONGEST_ROBOT} bytes"
        )
    body = {"UserID": userid} | ({"Nick": nick} if nick else {})
    config.im_client().call(f"{ROBOT_API}/create_robot", body)
    click.echo(f"{userid} is there: write to it.")


@command
@click.argument("userid")
def delete_robot(config: Config, userid: str) -> None:
    """Delete the chatbot account USERID; its name cannot be used again."""
    body = {"Robot_Account": userid}
    config.im_client().call(f"{ROBOT_API}/delete_robot", body)
    click.echo(f"{userid} is deleted.")


@command
@click.argument("userid")
@click.option(
    "--expire", default=86400, type=click.IntRange(1), help="Seconds it is valid."
)
def usersig(config: Config, userid: str, expire: int) -> None:
    """Print a UserSig with which USERID can log in to a chat client."""
    click.echo(gen_user_sig(config.im_sdkappid, config.im_key, userid, expire))


@command
def failed(config: Config) -> None:
    """List the messages that were given up, and why."""
    with closing(config.open_store()) as store:
        found = store.failed()
    for number, _, reason, age in found[:LISTED]:
        click.echo(f"{number}  {age:.0f} s ago: {reason}")
    if (more := len(found) - LISTED) > 0:
        click.echo(f"and {more} more")
    if not found:
        click.echo("No message was given up.")


@command
@click.argument("numbers", nargs=-1, type=int)
def retry(config: Config, numbers: tuple[int, ...]) -> None:
    """Let messages that were given up, all or those with NUMBERS, be answered."""
    with closing(config.open_store()) as store:
        click.echo(f"{store.retry(numbers or None)} put back.")


@command
@click.argument("robot")
@click.argument("to", metavar="USER_OR_GROUP")
@click.argument("text")
@click.option("--group", is_flag=True, help=f"The id is a group's, without {GROUP}.")
def say(config: Config, robot: str, to: str, text: str, group: bool) -> None:
    """Let ROBOT write TEXT first; the server sends it, and the AI knows of it."""
    if not robot.startswith(ROBOT) or not text.strip():
        raise ValueError(f"give a robot, whose UserID starts with {ROBOT}, and a text")
    id, now = f"{robot}\tsaid\t{os.urandom(16).hex()}", time.time()
    user, group_id = ("", to) if group or to.startswith(GROUP) else (to, "")
    message = Message(id, robot, user, "", group_id, kind="said", sent=int(now))
    chat, data, remember = message.conversation(), message.data(), config.history_turns
    with closing(config.open_store()) as store:
        store.add(id, chat, data, reply=clean(text), sent=now, remember=remember > 0)
        click.echo(outcome(store, id))


def outcome(store: Store, id: str) -> str:
    """Say what becomes of a message within WAIT seconds. Raises ValueError if it has
    failed."""
    end = time.monotonic() + WAIT
    while (state := store.state(id)) == "open":
        if time.monotonic() > end:
            return "It waits, and is sent as soon as a server takes it."
        time.sleep(0.1)
    for _, failed, reason, _ in store.failed() if state == "failed" else ():
        if failed == id:
            raise ValueError(reason)
    return "Sent."


@command
def doctor(config: Config) -> None:
    """Check everything that can be checked from here; change nothing."""
    healthy = True
    for name, check in CHECKS.items():
        try:
            line = f"ok   {name:9} {check(config)}"
        except ERRORS as error:
            healthy, line = False, f"FAIL {name:9} {error}"
        click.echo(line)
    click.echo("\n".join([*misspelt(os.environ, config.ai_secret_keys), CONSOLE]))
    sys.exit(not healthy)


def check_token(config: Config) -> str:
    """Say whether callbacks are signed."""
    if config.im_callback_token:
        return f"{len(config.im_callback_token)} accepted"
    raise ValueError("IM_CALLBACK_TOKEN is not set: anybody can spend your AI budget")


def check_robots(config: Config) -> str:
    """Say whether Tencent takes the key, and which robots there are."""
    there = config.im_client().robots()
    if missing := [robot for robot in config.robots if robot not in there]:
        raise ValueError(f"{missing[0]} of robots.toml is not there: create-robot it")
    if not there:
        raise ValueError("there is no robot yet: use create-robot")
    return f"key accepted; {', '.join(there)}"


def check_clock(config: Config) -> str:
    """Say whether this machine's clock is right."""
    try:
        response = requests.head(config.im_api_url, timeout=5)
        theirs = parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (requests.RequestException, KeyError, ValueError) as error:
        raise ValueError(f"{config.im_api_url}: {type(error).__name__}") from None
    off = time.time() - theirs
    if abs(off) > 30:
        raise ValueError(f"this server's clock is {off:+.0f} s off: callbacks fail")
    return "agrees with Tencent's"


def check_history(config: Config) -> str:
    """Say whether messages whose callbacks failed can be found."""
    if not config.catch_up or not CATCHING_UP:
        return "not asked: what is written while no server runs is not answered"
    return str(resolve_name(CATCHING_UP[0]).probe(config.im_client()))


def check_ai(config: Config) -> str:
    """Say how fast each AI service answers."""
    seen, question = [], [{"role": "user", "content": "Say OK."}]
    for persona in {Persona(), *config.robots.values()}:
        began, provider = time.monotonic(), config.provider(persona)
        list(provider.chat(question, CancelScope(config.ai_timeout)))
        name = f"{persona.provider or config.ai_provider} {provider.model}".strip()
        seen.append(f"{name} in {time.monotonic() - began:.1f} s")
    return f"answers: {', '.join(seen)}"


def check_store(config: Config) -> str:
    """Say what the store promises, and what is in it."""
    scheme, _, path = config.database_url.partition(":///")
    if scheme == "sqlite" and not Path(path).exists():
        if not os.access(Path(path).absolute().parent, os.W_OK):
            raise ValueError(f"{path} cannot be made there")
        return f"{path} is not there yet: the server will make it"
    with closing(config.open_store()) as store:
        state, promise = store.stats(), store.durability()
    return f"{promise}; {state['waiting']} waiting, {state['failed']} failed"


CHECKS = {
    "callback": check_token,
    "Tencent": check_robots,
    "clock": check_clock,
    "history": check_history,
    "AI": check_ai,
    "store": check_store,
}
