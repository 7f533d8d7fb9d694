"""The demonstration: what it prints, in both languages, a real AI, a bot elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import requests
from conftest import HERE, poll, sse

from simulator import (
    PACE,
    BotProcess,
    Simulator,
    actor,
    free_port,
    lifeline,
    running,
)
from simulator.relay import Relay

pytestmark = pytest.mark.slow
KEY = "sk-a-key-of-a-real-service"


def start(*arguments, **settings):
    """Start the demonstration without a terminal."""
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env["PYTHON_DOTENV_DISABLED"] = "1"
    return subprocess.Popen(
        [sys.executable, "-m", "simulator", *arguments],
        cwd=HERE,
        env=env | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def demonstrate(*arguments, until="", **settings):
    """Run the demonstration to its end, or until it prints something; return all that
    it printed."""
    process, printed = start(*arguments, **settings), []
    with lifeline(process):
        for line in process.stdout if until else ():
            printed.append(line)
            if until in line:
                process.terminate()
                break
        rest, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (0, "")
    return "".join(printed) + rest


SPOKEN = {
    "en": [
        "[one-to-one] jared: Hello!",
        "[one-to-one] Robot: You said: Hello! (question 1 of our chat)",
        "[one-to-one] jared: What did I say before?",
        "[one-to-one] Robot: You said: What did I say before? (question 2 of our chat)",
        "[group @TGS#demo] lin: @Robot hello from the group",
        "[group @TGS#demo] Robot: "
        "@lin You said: lin: hello from the group (question 1 of our chat)",
    ],
    "zh": [
        "[单聊] jared：你好",
        "[单聊] Robot：你说：你好（这段对话的第 1 个问题）",
        "[单聊] jared：我刚才说了什么？",
        "[单聊] Robot：你说：我刚才说了什么？（这段对话的第 2 个问题）",
        "[群聊 @TGS#demo] lin：@Robot 大家好",
        "[群聊 @TGS#demo] Robot：@lin 你说：lin: 大家好（这段对话的第 1 个问题）",
    ],
}


@pytest.mark.parametrize(
    ("language", "settings"),
    [
        ("en", {"LANG": "C.UTF-8"}),
        ("zh", {"LANG": "zh_CN.UTF-8", "PYTHONUTF8": "1"}),
        ("zh", {"LANG": "C.UTF-8", "BOT_LANGUAGE": "zh"}),
    ],
)
def test_the_demonstration_holds_a_conversation(language, settings):
    shown = SPOKEN[language]
    printed = demonstrate(until=shown[-1], **settings).splitlines()
    printed = [line.split("   (")[0] for line in printed]
    assert [line for line in printed if line.startswith("[")] == shown


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"AI_SECRET_KEY": "sk-wrong"}, "code 2049, trace -: invalid api key (2049)"),
        ({"AI_MODEL": "nix"}, "HTTP 404, code -, trace -: no such model"),
        ({"AI_BASE_URL": "{}/v2"}, "HTTP 404, code -, trace -: 404 page not found"),
        ({"AI_BASE_URL": "http://127.0.0.1:1"}, "127.0.0.1:1 gave no answer: [Errno"),
    ],
)
def test_why_a_real_service_does_not_answer_is_printed(settings, reason):
    with Simulator() as real:
        missing = (404, {"error": {"message": "no such model"}})
        real.ai_fault = lambda body: missing if body["model"] == "nix" else None
        real.ai_key = KEY
        env = {"AI_PROVIDER": "minimax", "AI_SECRET_KEY": KEY}
        env |= {"AI_BASE_URL": "{}/v1"} | settings
        env["AI_BASE_URL"] = env["AI_BASE_URL"].format(real.url)
        printed = demonstrate("--say", "hello", **env)
        assert f"the real service {env['AI_BASE_URL']} (minimax, " in printed
        url = env["AI_BASE_URL"]
        assert f"The bot warns: no answer for jared → @RBT#001: POST {url}" in printed
        assert reason in printed and env["AI_SECRET_KEY"] not in printed


@pytest.fixture
def real():
    """A stand-in that plays the real AI service."""
    with Simulator() as simulator:
        simulator.ai_key, simulator.ai_answer = KEY, actor
        yield simulator


@pytest.fixture
def relayed(real):
    """A stand-in whose bot asks that service."""
    with running(REPLY_MODE="modify", AI_SECRET_KEY=KEY) as (simulator, bot):
        simulator.relay, simulator.secret = Relay(f"{real.url}/v1"), KEY
        yield simulator


def ai_calls(simulator):
    return [call for call in simulator.calls_on_wire() if call["kind"] == "AI"]


def test_a_real_ai_call_is_on_the_wire_while_it_streams_without_the_key(real, relayed):
    real.ai_pace = PACE
    event = relayed.say("jared", "@RBT#001", f"Markdown, please; my key is {KEY}")
    poll(lambda: len({len(text) for m in relayed.delivered for text in m.states}) > 3)
    [call] = ai_calls(relayed)
    assert (call["ms"], call["status"]) == (None, 200)
    [answer] = poll(lambda: [m for m in relayed.delivered if m.closed])
    assert answer.text.startswith("Here is **Markdown**")
    [call] = ai_calls(relayed)
    assert call["line"] == f"POST {real.url}/v1/chat/completions"
    assert call["of"] == f"{event['MsgSeq']} {event['MsgRandom']}"
    assert call["body"]["messages"][-1]["content"].endswith("my key is •••")
    assert call["answer"].startswith("data: {")
    assert len(real.ai_requests) == 1 and not relayed.ai_requests
    assert KEY not in json.dumps([*relayed.wire], ensure_ascii=False)


@pytest.mark.parametrize("service", ["dify", "adp"])
def test_a_real_platform_is_relayed_too(real, service):
    real.dify_key = real.adp_key = KEY
    with running(AI_PROVIDER=service, AI_SECRET_KEY=KEY) as (simulator, bot):
        simulator.relay, simulator.secret = Relay(f"{real.url}/v1"), KEY
        event = simulator.say("jared", "@RBT#001", "hello")
        assert simulator.wait(1)[0].text == "You said: hello (question 1 of our chat)"
        [call] = ai_calls(simulator)
    assert call["of"] == f"{event['MsgSeq']} {event['MsgRandom']}"
    assert len(real.ai_requests) == 1 and KEY not in json.dumps(call)


def test_an_answer_in_one_piece_is_passed_on_too(real, relayed):
    real.ai_answer = lambda messages: "你好" * 5000
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": False}
    call = {"json": body, "headers": {"Authorization": f"Bearer {KEY}"}}
    url = "/v1/chat/completions"
    answers = [requests.post(base + url, **call) for base in (real.url, relayed.url)]
    assert answers[0].json() == answers[1].json()
    assert ai_calls(relayed)[0]["answer"] == answers[0].json()


def test_a_stop_ends_the_real_call(real, relayed):
    real.ai_pace = PACE
    relayed.say("jared", "@RBT#001", "a long answer")
    [message] = poll(lambda: [m for m in relayed.delivered if len(m.text) > 20])
    relayed.press_stop(message, "jared")
    poll(lambda: message.closed and real.ai_ended == 1, timeout=5)
    assert ai_calls(relayed)[0]["left"]


def test_a_stop_ends_a_real_call_that_says_nothing_yet(relayed, ai_socket):
    silent = ai_socket(lambda connection: connection.recv(1) and False)
    relayed.relay = Relay(silent.url)
    relayed.say("jared", "@RBT#001", "hello")
    [message] = relayed.wait(1)
    poll(lambda: silent.bodies)
    relayed.press_stop(message, "jared")
    poll(lambda: message.closed and ai_calls(relayed)[0]["left"], timeout=5)


def test_a_real_answer_that_breaks_off_breaks_off_for_the_bot(relayed, ai_socket):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    half = sse({"choices": [{"delta": {"content": "half of"}}]}, end="")

    def break_off(connection):
        connection.sendall(head + b"Content-Length: 9999\r\n\r\n" + half)
        poll(lambda: relayed.delivered[-1].text.startswith("half of"))

    broken = ai_socket(break_off)
    relayed.relay = Relay(broken.url)
    relayed.say("jared", "@RBT#001", "hello")
    [answer] = poll(lambda: [m for m in relayed.delivered if m.closed])
    assert answer.text.startswith("half of\n\n")
    assert "gave no answer" in ai_calls(relayed)[0]["answer"]


def test_the_robots_have_the_names_of_their_personas(tmp_path):
    tmp_path.joinpath("robots.toml").write_text('["@RBT#001"]\nnick = "Ada"\n')
    printed = demonstrate("--say", "hello", ROBOTS=str(tmp_path / "robots.toml"))
    assert "[one-to-one] Ada: You said: hello" in printed


def news(url):
    """Yield what the stand-in tells the page, for half a minute at most."""
    end = time.monotonic() + 30
    with requests.get(f"{url}/page", stream=True, timeout=30) as stream:
        for line in stream.iter_lines(chunk_size=1):
            assert time.monotonic() < end, "the page was not told in time"
            if line:
                yield from json.loads(line.removeprefix(b"data: "))


BROKEN_COMMAND = """
from imbot.commands import command

@command("/boom", "炸", zh="", en="")
def boom(chat, argument):
    return f"{1 / 0}"
"""


def test_the_bot_gets_the_environment_and_its_tracebacks_are_shown(tmp_path):
    tmp_path.joinpath("sitecustomize.py").write_text(BROKEN_COMMAND)
    path = {"PYTHONPATH": f"{tmp_path}:{HERE}", "port": "of something else"}
    printed = demonstrate("--say", "/boom", **path)
    assert "The bot warns: " in printed
    assert "ZeroDivisionError: division by zero" in printed
    assert 'in boom\n    return f"{1 / 0}"\n' in printed  # its traceback, line by line


def test_it_serves_until_it_is_stopped(demonstration):
    process, printed = demonstration()
    for line in process.stdout:
        if "from the group (question" in line:
            break
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    page = printed.split("open ")[1].split(" ")[0]
    assert requests.get(page).ok


def test_a_bot_elsewhere_that_is_not_there_is_missed():
    url = f"http://127.0.0.1:{free_port()}"
    text = f"Nobody answers at {url}: start the bot with the settings above."
    assert text in demonstrate("--bot", url, until="The chat page")


@pytest.fixture
def demonstration():
    """Return a function that starts the demonstration; it returns when there is a page
    with the process, and what that printed."""
    started = {}

    def run(*arguments, **settings):
        process = start(*arguments, **settings)
        started[process], printed = lifeline(process), []
        for line in process.stdout:
            printed.append(line)
            if "The chat page" in line:
                break
        return process, "".join(printed)

    yield run
    for process, line in started.items():
        line.close()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demonstration_and_its_bot(demonstration, number):
    process, printed = demonstration()
    bot = printed.split("gunicorn: ")[1].split(",")[0]
    assert requests.get(f"{bot}/healthz").ok
    process.send_signal(number)
    _, complaints = process.communicate(timeout=40)
    assert (process.returncode, complaints) == (0, "")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{bot}/healthz")


def test_a_demonstration_that_is_killed_leaves_no_bot_behind(demonstration):
    process, printed = demonstration()
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
    bot.env |= re.findall(r"^([A-Z_]+)=(.+)$", printed, re.MULTILINE)
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
