"""The simulator: how strict it is, and its demonstration."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys

import pytest
import requests

import tim
from botserver import Config
from conftest import APPID, HERE
from simulator import KEY, SETTINGS, BotProcess, free_port, text_body


def test_the_stand_in_checks_what_it_is_sent(sim):
    client = tim.Client(sim.url, APPID, KEY, "administrator")
    for body, code in [
        ({"To_Account": "jared", "MsgBody": text_body("x")}, 10004),
        ({"To_Account": "jared", "MsgRandom": "1", "MsgBody": text_body("x")}, 10004),
        ({"To_Account": "nobody", "MsgRandom": 1, "MsgBody": text_body("x")}, 90012),
        ({"To_Account": "jared", "MsgRandom": 1, "MsgBody": []}, 90002),
        (
            {"To_Account": "jared", "MsgRandom": 1, "MsgBody": text_body("好" * 5000)},
            93000,
        ),
        ({"To_Account": "jared", "MsgRandom": 1, "MsgBody": [], "Extra": 1}, 10004),
    ]:
        with pytest.raises(tim.IMError) as caught:
            client.call("openim/sendmsg", body)
        assert caught.value.code == code
    for identity, code in [
        ((APPID, "wrong key", "administrator"), 70009),
        ((APPID + 1, KEY, "administrator"), 70020),
        ((APPID, KEY, "jared"), 60010),
    ]:
        with pytest.raises(tim.IMError) as caught:
            tim.Client(sim.url, *identity).create_robot("@RBT#x")
        assert caught.value.code == code


def test_the_demonstration_shows_questions_and_answers():
    done = subprocess.run(
        [sys.executable, "simulator.py"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert "[one-to-one] jared: 你好" in done.stdout
    assert "[one-to-one] Robot: You said: 你好" in done.stdout
    assert "[group @TGS#demo] Robot: @lin You said: lin: hello from" in done.stdout
    assert not done.stderr


def test_the_demonstrations_bot_takes_every_setting_but_the_stand_ins():
    names = {item.name.upper() for item in dataclasses.fields(Config)}
    names = {name for name in names if not name.startswith(("AI_", "IM_"))}
    assert set(SETTINGS) == names - {"ALLOW_UNSIGNED", "DATABASE", "REDIS_URL"}


def news(url):
    """Yield what the stand-in tells the page."""
    with requests.get(f"{url}/page", stream=True, timeout=30) as stream:
        for line in stream.iter_lines(chunk_size=1):
            if line:
                yield from json.loads(line.removeprefix(b"data: "))


def demonstration(*arguments):
    """Start simulator.py, and return it when it has a page, and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "simulator.py", *arguments],
        cwd=HERE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "The chat page" in line:
            break
    return process, "".join(printed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demonstration_and_its_bot(number):
    process, printed = demonstration("--port", str(free_port()))
    bot = printed.split("gunicorn: ")[1].split(",")[0]
    assert requests.get(f"{bot}/healthz").ok
    process.send_signal(number)
    _, complaints = process.communicate(timeout=40)
    assert (process.returncode, complaints) == (0, "")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{bot}/healthz")


def test_a_bot_elsewhere_is_driven_with_the_settings_that_are_printed(sim, tmp_path):
    bot, port = BotProcess(sim, str(tmp_path)), str(free_port())
    process, printed = demonstration("--bot", f"{bot.url}/im", "--port", port)
    lines = [line for line in printed.splitlines() if line.startswith("export ")]
    bot.env |= dict(line.removeprefix("export ").split("=", 1) for line in lines)
    page = f"http://127.0.0.1:{port}"
    try:
        bot.start()
        wish = {"say": "hello", "as": "lin", "to": "@RBT#002", "robots": []}
        assert requests.post(f"{page}/page", json=wish).ok
        for item in news(page):
            if item.get("robot") and item["closed"]:
                break
        assert item["text"].startswith("You said: hello")
    finally:
        bot.stop()
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0
