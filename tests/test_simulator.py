"""The simulator: how strict it is, and its demonstration."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import requests

import tim
from botserver import Config
from conftest import APPID, HERE, poll
from simulator import (
    KEY,
    BotProcess,
    Refused,
    check_user_sig,
    free_port,
    lifeline,
    text_body,
)
from simulator.__main__ import SETTINGS
from usersig import gen_user_sig


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
            client = tim.Client(sim.url, *identity)
            client.call("openim_robot_http_svc/create_robot", {"UserID": "@RBT#x"})
        assert caught.value.code == code


@pytest.mark.parametrize(
    "made_by_tencent",
    [
        # Python: https://github.com/tencentyun/tls-sig-api-v2-python
        "eJyrVgrxCdYrSy1SslJQMtIzUNJRAItkpqTmlWSmZUIkKjIT87NK82CSxSnZiQUFmSlAKUMTAyiA"
        "yqVWFGQWpYJkTE1NjRDiJZm5YFFzNPXFmekgG3zKHM1T9D3LzdODi-OKs8vCqpxcAvydnV2SSv2c"
        "y03cPcpDnA2SMgu0nUxslWoBHdYzUg__",
        # Node: https://github.com/tencentyun/tls-sig-api-v2-node
        "eJyrVgrxCdYrSy1SslIy0jNQ0gHzM1NS80oy0zLBwhWZiflZpXlQqeKU7MSCgswUJStDEwMogMiU"
        "ZOamKlkZmqOKplYUZBaBxE1NTY3gosWZ6UpWSj5ljuYp*p7l5unBxXnF2WVhVU4uAf7Ozi5JpX7O"
        "5SbuHuUhzgZJmQXaTia2SrUAohcx8g__",
    ],
)
def test_usersig_of_tencents_libraries_is_accepted(made_by_tencent):
    fields = check_user_sig(KEY, made_by_tencent, now=1700000000)
    assert fields["TLS.identifier"] == "xiaojun"


@pytest.mark.parametrize(
    ("sig", "now", "code"),
    [
        ("", 1700000000, 70003),
        ("eJyr", 1700000000, 70003),
        ("not base64 é", 1700000000, 70003),
        (gen_user_sig(APPID, KEY, "a", 60, 1700000000)[:80], 0, 70003),
        (gen_user_sig(APPID, "other", "a", 60, 1700000000), 1700000000, 70009),
        (gen_user_sig(APPID, KEY, "a", 60, 1700000000), 1700000061, 70001),
    ],
)
def test_a_bad_usersig_is_refused_with_tencents_code(sig, now, code):
    with pytest.raises(Refused) as caught:
        check_user_sig(KEY, sig, now)
    assert caught.value.code == code


def test_an_answer_in_one_piece_takes_as_long_as_a_stream_and_breaks_off_too(sim):
    url, asked = f"{sim.url}/v1/chat/completions", [{"role": "user", "content": "hi"}]
    call = {"json": {"messages": asked, "thinking": {"type": "disabled"}}}
    call["headers"] = {"Authorization": f"Bearer {sim.ai_key}"}
    sim.ai_pace = 0.02
    began = time.monotonic()
    answer = requests.post(url, **call, timeout=10).json()
    said = answer["choices"][0]["message"]["content"]
    assert said.startswith("You said: hi")
    assert time.monotonic() - began > sim.ai_pace * len(said) / 4
    sim.break_after = 2
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.post(url, **call, timeout=10)
    sim.break_after, sim.ai_pace = 0, 0.2
    with pytest.raises(requests.ReadTimeout):
        requests.post(url, **call, timeout=0.1)  # and that is noticed
    poll(lambda: sim.ai_ended == 3, timeout=1)


def test_the_demonstration_shows_questions_and_answers():
    done = subprocess.run(
        [sys.executable, "-m", "simulator"],
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
    assert set(SETTINGS) == names - {"ALLOW_UNSIGNED", "DATABASE_URL"}


def news(url):
    """Yield what the stand-in tells the page."""
    with requests.get(f"{url}/page", stream=True, timeout=30) as stream:
        for line in stream.iter_lines(chunk_size=1):
            if line:
                yield from json.loads(line.removeprefix(b"data: "))


@pytest.fixture
def demonstration():
    """Return a function that starts the demonstration; it returns when there is a page
    with the process, and what that printed."""
    started = {}

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "simulator", *arguments],
            cwd=HERE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started[process], printed = lifeline(process), []
        for line in process.stdout:
            printed.append(line)
            if "The chat page" in line:
                break
        return process, "".join(printed)

    yield start
    for process, line in started.items():
        line.close()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demonstration_and_its_bot(demonstration, number):
    process, printed = demonstration("--port", str(free_port()))
    bot = printed.split("gunicorn: ")[1].split(",")[0]
    assert requests.get(f"{bot}/healthz").ok
    process.send_signal(number)
    _, complaints = process.communicate(timeout=40)
    assert (process.returncode, complaints) == (0, "")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{bot}/healthz")


def test_a_demonstration_that_is_killed_leaves_no_bot_behind(demonstration):
    process, printed = demonstration("--port", str(free_port()))
    bot = printed.split("gunicorn: ")[1].split(",")[0]

    def serves():
        try:
            return requests.get(f"{bot}/healthz", timeout=5).ok
        except requests.RequestException:
            return False

    assert serves()
    process.kill()
    poll(lambda: not serves(), 5)


def test_a_bot_elsewhere_is_driven_with_the_settings_that_are_printed(
    sim, demonstration, tmp_path
):
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
