"""Real gunicorn processes: killed, stopped, reloaded, overloaded, without a store."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import pytest
import requests
from conftest import FAST, STORY, Caller, idle, poll, said_to

from benchmark.load import Kept
from imbot.engine import DRAIN
from imbot.texts import TEXTS
from simulator import BotProcess, c2c_event, running

pytestmark = pytest.mark.slow


def test_answers_cut_by_a_crash_end_closed_and_true(tmp_path):
    """kill -9 while three robots speak, each in its own mode; then a restart."""
    modes = {"@RBT#001": "modify", "@RBT#002": "custom", "@RBT#003": "stream"}
    toml = "".join(f'["{name}"]\nreply_mode = "{modes[name]}"\n' for name in modes)
    tmp_path.joinpath("robots.toml").write_text(toml)
    with running(ROBOTS=tmp_path / "robots.toml", BOT_LANGUAGE="en") as (sim, bot):
        sim.robots |= dict.fromkeys(modes, "")
        sim.ai_answer, sim.ai_pace = (lambda messages: STORY), 0.05
        for robot in modes:
            sim.say("jared", robot, "tell")
        poll(lambda: len(sim.delivered) == 3)
        poll(lambda: all(len(m.text) > 20 for m in sim.delivered))
        bot.stop(signal.SIGKILL)
        sim.ai_pace = 0
        assert not any(message.closed for message in sim.delivered)
        let_claims_lapse(bot.log.with_name("bot.db"))
        bot.start()
        health = f"{bot.url}/healthz"
        poll(lambda: requests.get(health).json()["oldest"] == 0, 30)
        by_robot = {m.robot: m for m in sim.delivered}  # the last of each
        assert all(message.closed for message in by_robot.values())
        assert {m.text for m in by_robot.values()} == {STORY}
        assert len(sim.delivered) == 4
        broken = next(m for m in sim.delivered if m.text != STORY)
        assert broken.robot == "@RBT#003"  # Tencent closes its stream after 15 s
        assert STORY.startswith(broken.text)


def test_a_stop_reaches_an_answer_in_another_process(tmp_path):
    with running(WEB_CONCURRENCY=2, BOT_LANGUAGE="en") as (sim, bot):
        sim.ai_delay = 10
        users = [f"user{number}" for number in range(8)]
        sim.users |= set(users)
        for user in users:
            sim.say(user, "@RBT#001", "slow")
        poll(lambda: len(sim.ai_requests) == 8)
        began = time.monotonic()
        for user in users:
            sim.say(user, "@RBT#001", "/stop")
        sim.wait(16)
        assert time.monotonic() - began < 5


def test_two_processes_answer_each_message_once_and_in_order(tmp_path):
    """500 messages of 100 users, every callback delivered twice."""
    with running(WEB_CONCURRENCY=2) as (sim, bot):
        sim.users |= {f"user{number}" for number in range(100)}
        sim.ai_delay = 0.05
        sim.bot_url = ""  # the events first: they are delivered below
        events = {
            user: [sim.say(f"user{user}", "@RBT#001", f"q{n}") for n in range(5)]
            for user in range(100)
        }
        sim.bot_url = bot.url

        def deliver(share):
            with requests.Session() as http:
                for number in range(5):
                    for user in share:
                        for _ in range(2):
                            answer = sim.callback(events[user][number], http)
                            assert answer.json()["ActionStatus"] == "OK"

        threads = [
            threading.Thread(target=deliver, args=(range(start, 100, 4),))
            for start in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sim.wait(500, timeout=60)
        poll(lambda: requests.get(f"{bot.url}/healthz").json()["in_work"] == 0)
        assert len(sim.delivered) == 500
        for user in range(100):
            answers = [m for m in sim.delivered if m.chat == f"user{user}"]
            texts = [m.text.split(" (")[0] for m in answers]
            assert texts == [f"You said: q{number}" for number in range(5)]
            assert [m.number for m in answers] == sorted(m.number for m in answers)
        assert len(sim.ai_requests) == 500
        assert set(pids(bot)) and "Traceback" not in bot.log.read_text()


def pids(bot):
    return [line for line in bot.log.read_text().splitlines() if "Booting" in line]


@pytest.fixture
def start_bot(sim, tmp_path):
    """Return a function that starts the bot as the Procfile does."""
    bots = []

    def start(*options, before=(), **settings):
        bots.append(BotProcess(sim, str(tmp_path), **{"RATE_LIMIT": 0} | settings))
        bots[-1].command = [*before, *bots[-1].command, *options]
        return bots[-1].start()

    yield start
    for bot in bots:
        if bot.process:
            bot.stop(signal.SIGKILL)


def workers(bot):
    """Return the process ids of gunicorn's workers."""
    log = bot.log.read_text()
    return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", log)]


def let_claims_lapse(path):
    """Do what LEASE seconds do to the claims of processes that died."""
    with closing(sqlite3.connect(path, timeout=10)) as other, other:
        other.execute("UPDATE conversation SET due = 0 WHERE token IS NOT NULL")


def questions(sim):
    """Return what the AI was asked."""
    return [asked["messages"][-1]["content"] for asked in sim.ai_requests]


def stand(url):
    return requests.get(f"{url}/healthz", timeout=5).json()


def test_after_kill_9_all_is_answered_in_30_s_and_a_kept_answer_sent_again(
    sim, start_bot
):
    bot = start_bot(WEB_CONCURRENCY=2, WORKER_THREADS=4)
    sim.users |= {"kept"} | {f"user{n}" for n in range(6)}
    # An answer that was shown, but the bot never hears of it.
    late = {"kept": "late"}
    sim.fault = lambda command, body: late.get(body.get("To_Account"))
    sim.say("kept", "@RBT#001", "kept")
    poll(lambda: sim.calls)
    sim.ai_delay = 60
    for text in ("first", "second", "third"):
        for number in range(6):
            sim.say(f"user{number}", "@RBT#001", text)
    poll(lambda: len(sim.ai_requests) >= 6)
    bot.stop(signal.SIGKILL)
    assert len(sim.delivered) == 1
    sim.ai_delay, sim.fault = 0, lambda command, body: None
    before = len(sim.calls)
    bot.start()
    sim.wait(19, timeout=30)
    poll(lambda: stand(bot.url)["in_work"] == 0)
    for number in range(6):
        assert said_to(sim, f"user{number}") == ["first", "second", "third"]
    sent = [body for _, body in sim.calls if body.get("To_Account") == "kept"]
    assert len({json.dumps(body) for body in sent}) == 1 and len(sim.calls) > before
    assert sent[0] in [body for _, body in sim.calls[before:]]
    assert said_to(sim, "kept") == ["kept"]
    assert questions(sim).count("kept") == 1


def test_a_message_that_kills_its_process_three_times_is_given_up(
    sim, start_bot, tmp_path
):
    bot, kills = start_bot(), []

    def kill(asked):
        if asked["messages"][-1]["content"] == "deadly":
            kills.append(workers(bot)[-1])
            os.kill(kills[-1], signal.SIGKILL)

    sim.ai_fault = kill
    event = sim.say("jared", "@RBT#001", "deadly")

    def given_up():
        if len(workers(bot)) > len(kills):
            let_claims_lapse(tmp_path / "bot.db")
        return " failed: " in bot.log.read_text()

    poll(given_up, 30)
    assert len({*kills}) == 3
    [line] = [x for x in bot.log.read_text().splitlines() if " failed: " in x]
    assert str(event["MsgRandom"]) in line and "3 times" in line
    poll(lambda: stand(bot.url)["failed"] == 1)
    assert sim.wait(1)[0].text == TEXTS["zh"]["undeliverable"]
    sim.say("jared", "@RBT#001", "harmless")
    assert sim.wait(2)[1].text.startswith("You said: harmless")


def test_sigterm_finishes_what_it_can_and_leaves_the_rest_to_the_next(sim, start_bot):
    """It takes what DRAIN says: the AI needs a minute for one answer."""
    bot, seconds = start_bot(), {"long": 60, "short": 6}
    hurry = threading.Event()

    def answer(messages):
        text = messages[-1]["content"]
        hurry.wait(seconds.get(text, 0))
        return f"You said: {text}"

    sim.ai_answer = answer
    sim.say("jared", "@RBT#001", "long")
    sim.say("lin", "@RBT#001", "short")
    poll(lambda: len(sim.ai_requests) == 2)
    sim.say("lin", "@RBT#001", "next")
    began = time.monotonic()
    assert bot.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < DRAIN + 4
    assert said_to(sim, "lin") == ["short"] and not said_to(sim, "jared")
    assert sorted(questions(sim)) == ["long", "short"]
    assert "1 messages were left to others" in bot.log.read_text()
    seconds.clear()
    hurry.set()
    bot.start()
    sim.wait(3, timeout=5)  # and not only when a claim has lapsed
    assert said_to(sim, "lin") == ["short", "next"] and said_to(sim, "jared") == [
        "long"
    ]


def test_as_the_first_process_of_a_container_it_ends_in_order(sim, start_bot):
    """The Dockerfile starts gunicorn as process 1, for which signals are special."""
    container = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*container, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("unshare may not make a namespace of processes here")
    bot = start_bot(before=container)
    sim.ai_delay = 2
    sim.say("jared", "@RBT#001", "hello")
    poll(lambda: sim.ai_requests)
    children = Path(f"/proc/{bot.process.pid}/task/{bot.process.pid}/children")
    os.kill(int(children.read_text()), signal.SIGTERM)
    assert bot.wait() == 0
    assert said_to(sim, "jared") == ["hello"]
    assert " 0 messages were left to others" in bot.log.read_text()


def test_sighup_reloads_without_a_refused_callback(sim, start_bot):
    bot = start_bot(WEB_CONCURRENCY=2, MAX_WAITING=10**6)
    sim.users |= {f"user{n}" for n in range(4)}
    sim.bot_url, done = "", threading.Event()
    answers, asked = [], [0] * 4

    def ask_on(user):
        while not done.is_set():
            event = sim.say(f"user{user}", "@RBT#001", str(asked[user]))
            signed = sim.signed(event)
            answers.append(requests.post(f"{bot.url}/im", params=signed, json=event))
            asked[user] += 1

    threads = [threading.Thread(target=ask_on, args=(user,)) for user in range(4)]
    for thread in threads:
        thread.start()
    for booted in (2, 4, 6):
        poll(lambda booted=booted: len(workers(bot)) == booted and len(answers) > 99)
        answers_before = len(answers)
        bot.process.send_signal(signal.SIGHUP)
        poll(lambda before=answers_before: len(answers) > before + 100)
    poll(lambda: len(workers(bot)) == 8)
    done.set()
    for thread in threads:
        thread.join()
    assert len(answers) == sum(asked) > 400
    assert {answer.status_code for answer in answers} == {200}
    sim.wait(len(answers), timeout=40)
    for user in range(4):
        assert said_to(sim, f"user{user}") == [str(n) for n in range(asked[user])]


def test_a_client_that_keeps_its_connections_loses_no_callback(sim, start_bot):
    """It rests for about as long as gunicorn by default keeps a connection, 2 s."""
    bot, taken = start_bot(WEB_CONCURRENCY=2), []
    sim.users |= {f"user{n}" for n in range(200)}
    query = urlencode(sim.signed({"CallbackCommand": "Bot.OnC2CMessage"}))

    def ask_three_times(users):
        lines = {user: Kept(bot.port, query) for user in users}
        due = dict.fromkeys(users, 0.0)
        for turn in range(3):
            for user, line in lines.items():
                time.sleep(max(0.0, due[user] - time.monotonic()))
                event = c2c_event(user, "@RBT#001", f"{turn}")
                taken.append(line(json.dumps(event).encode()))
                due[user] = time.monotonic() + random.uniform(1.9, 2.1)
        for line in lines.values():
            line.close()

    everybody = sorted(sim.users - {"jared", "lin"})
    threads = [
        threading.Thread(target=ask_three_times, args=(everybody[start::8],))
        for start in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken.count(True) == len(taken) == 600
    sim.wait(600, timeout=60)


def memory(pid):
    """Return the bytes a process holds in memory."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_three_times_too_much_is_acknowledged_quickly_and_worked_off_in_order(
    sim, start_bot
):
    """Six threads and an AI of about 0.1 s answer 60 a second; 180 come."""
    bot = start_bot(WORKER_THREADS=6, MAX_WAITING=1000)
    users = [f"user{n}" for n in range(6)]
    sim.users |= {*users}
    began, took, chance = time.monotonic(), [], random.Random(1)

    def answer(messages):
        time.sleep(chance.uniform(0, 0.2))
        return f"You said: {messages[-1]['content']}"

    sim.ai_answer = answer

    def ask(user):
        for number in range(120):
            time.sleep(max(0, began + number / 30 - time.monotonic()))
            start = time.monotonic()
            sim.say(user, "@RBT#001", str(number))
            took.append(time.monotonic() - start)

    threads = [threading.Thread(target=ask, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stand(bot.url)["waiting"] > 200
    assert memory(workers(bot)[-1]) < 120e6
    sim.wait(720, timeout=60)
    assert sorted(took)[int(len(took) * 0.99)] < 1
    for user in users:
        assert said_to(sim, user) == [str(number) for number in range(120)]


@contextmanager
def locked(path, bot):
    with closing(sqlite3.connect(path, timeout=10)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def read_only(path, bot):
    for switch in ("ON", "OFF"):
        with bot.store._write_lock:
            bot.store._writer.execute(f"PRAGMA query_only = {switch}")
        if switch == "ON":
            yield


@contextmanager
def full(path, bot):
    """Let no file of this process grow, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("broken", [locked, read_only, full])
def test_a_store_that_fails_costs_nothing_but_time(
    sim, make_app, tmp_path, caplog, broken
):
    app, path = make_app(replace(FAST, save_patience=0.5)), tmp_path / "bot.db"
    im, bot = Caller(sim, app.test_client()), app.extensions["bot"]
    handle, ended = bot.workers.handle, threading.Event()

    def noted(job):
        try:
            handle(job)
        finally:
            ended.set()

    bot.workers.handle = noted
    sim.ai_delay = 0.5
    im.say("before")
    poll(lambda: sim.ai_requests)
    with broken(path, bot):
        answer = im.say("during")
        assert answer.status_code == 503 and answer.get_json()["ActionStatus"] == "FAIL"
        poll(lambda: "cannot be written" in caplog.text)
        assert im.say("during").status_code == 503
        assert ended.wait(20)
    poll(lambda: im.say("after").status_code == 200)
    let_claims_lapse(path)
    # What was refused is found in Tencent's history.
    poll(lambda: len(sim.delivered) == len(sim.said) and idle(im))
    texts = [event["MsgBody"][0]["MsgContent"]["Text"] for event in sim.said]
    assert said_to(sim, "jared") == texts
    assert texts[:3] == ["before", "during", "during"]
    assert "Traceback" not in caplog.text


def test_a_server_that_is_killed_for_good_is_replaced_by_another(
    sim, tmp_path, postgres_server
):
    """Two servers, as on two machines, share a PostgreSQL; one dies in the middle."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    url = postgres_server.url
    bots = [BotProcess(sim, str(f), DATABASE_URL=url) for f in folders]
    users = [f"user{number}" for number in range(40)]
    sim.users |= set(users)
    sim.ai_delay = 2
    try:
        dying, living = (bot.start() for bot in bots)
        for number, user in enumerate(users):
            sim.bot_url = bots[number % 2].url
            sim.say(user, "@RBT#001", f"first {user}")
            sim.say(user, "@RBT#001", f"second {user}")
        poll(lambda: len(sim.ai_requests) >= 20)
        dying.stop(signal.SIGKILL)
        killed = time.monotonic()
        sim.wait(80, timeout=30)
        assert time.monotonic() - killed < 30
        poll(lambda: stand(living.url)["in_work"] == 0)
        assert len(sim.delivered) == 80
        for user in users:
            assert said_to(sim, user) == [f"first {user}", f"second {user}"]
    finally:
        for bot in bots:
            if bot.alive():
                bot.stop(signal.SIGKILL)
