"""The commands of `flask --app botserver`, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import requests
from conftest import HERE, poll

from simulator import KEY, BotProcess, check_user_sig


@pytest.fixture
def flask(sim, tmp_path):
    """Return a function that runs a command of `flask --app botserver`."""
    env = BotProcess(sim, str(tmp_path)).env

    def run(*words, **settings):
        settings = {name: str(value) for name, value in settings.items()}
        return subprocess.run(
            [sys.executable, "-m", "flask", "--app", "botserver", *words],
            cwd=HERE,
            env={**env, **settings},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_robots_are_made_listed_and_deleted_by_command(sim, flask):
    done = flask("create-robot", "@RBT#cli", "--nick", "Clio")
    assert done.returncode == 0 and sim.robots["@RBT#cli"] == "Clio", done.stderr
    assert "accepted; @RBT#001, @RBT#002, @RBT#cli\n" in flask("doctor").stdout
    assert flask("delete-robot", "@RBT#cli").returncode == 0
    assert "@RBT#cli" not in sim.robots
    done = flask("create-robot", "robot")
    assert done.returncode == 1
    assert "must start with @RBT#" in done.stderr and "Traceback" not in done.stderr
    done = flask("create-robot", "@RBT#x", IM_KEY="wrong")
    assert done.returncode == 1 and "IM_KEY is not the key" in done.stderr


def test_a_robot_that_is_made_by_command_can_be_written_to(im, flask):
    assert flask("create-robot", "@RBT#new", "--nick", "Newcomer").returncode == 0
    robots = dict(im.sim.robots)
    assert flask("create-robot", "@RBT#new", "--nick", "Newcomer").returncode == 0
    assert im.sim.robots == robots
    im.say("welcome", robot="@RBT#new")
    assert im.sim.wait(1)[0].robot == "@RBT#new"


@pytest.mark.parametrize("name", ["dify", "adp"])
def test_a_platform_can_be_checked_by_command(sim, flask, name):
    done = flask("doctor", AI_PROVIDER=name, AI_SECRET_KEY="wrong")
    assert done.returncode == 1 and "FAIL AI" in done.stdout
    assert re.search("code (unauthorized|4505004)", done.stdout)
    assert "wrong" not in done.stdout
    assert f"answers: {name} in " in flask("doctor", AI_PROVIDER=name).stdout


def test_a_usersig_is_made_by_command(flask):
    sig = flask("usersig", "jared", "--expire", "60").stdout.strip()
    assert check_user_sig(KEY, sig)["TLS.identifier"] == "jared"


@pytest.mark.parametrize(
    "words", ["frobnicate", "retry one", "usersig jared --expire 0", "say"]
)
def test_a_mistyped_command_is_told(flask, words):
    done = flask(*words.split())
    assert done.returncode == 2
    assert "Error: " in done.stderr and "Traceback" not in done.stderr


def test_what_failed_is_listed_and_put_back_by_command(sim, flask, tmp_path):
    sim.fault = lambda command, body: 20003
    bot = BotProcess(sim, str(tmp_path)).start()
    try:
        sim.say("jared", "@RBT#001", "hello")
        health = f"{bot.url}/healthz"
        poll(lambda: requests.get(health).json()["failed"] == 1)
        done, id = flask("failed"), r"@RBT#001 jared \d+ \d+ \d+"
        assert re.match(r"\d+  \d+ s ago: .*20003", done.stdout)
        assert re.search(f" message {id} failed: ", bot.log.read_text())
        sim.fault = lambda command, body: None
        assert flask("retry", "99").stdout == "0 put back.\n"
        assert flask("retry", done.stdout.split()[0]).stdout == "1 put back.\n"
        assert sim.wait(1)[0].text == "You said: hello (question 1 of our chat)"
        assert flask("failed").stdout == "No message was given up.\n"
    finally:
        bot.stop()


@pytest.fixture
def bot(sim, tmp_path):
    bot = BotProcess(sim, str(tmp_path), REPLY_MODE="modify").start()
    yield bot
    bot.stop()


def test_a_robot_writes_first_and_the_ai_knows_of_it(sim, flask, bot):
    text = "Your order is on its way. " * 700
    done = flask("say", "@RBT#001", "jared", text)
    assert (done.returncode, done.stdout) == (0, "Sent.\n")
    parts = [message.text for message in sim.wait(3)]
    assert "".join(parts).split() == text.split() and len(parts) == 3
    assert flask("say", "@RBT#001", "@TGS#demo", "Good morning").returncode == 0
    sim.groups["own-id"] = {"jared"}
    assert flask("say", "@RBT#001", "own-id", "Hi", "--group").returncode == 0
    told = [(message.chat, message.text) for message in sim.delivered[3:]]
    assert told == [("@TGS#demo", "Good morning"), ("own-id", "Hi")]
    assert all(message.closed for message in sim.delivered)
    assert not sim.ai_requests
    sim.say("jared", "@RBT#001", "when?")
    sim.say_in_group("lin", "@TGS#demo", "hello", ["@RBT#001"])
    sim.wait(7, closed=True)
    asked = [request["messages"][1:] for request in sim.ai_requests]
    assert [[turn["role"] for turn in turns] for turns in asked] == [
        ["assistant", "user"],
        ["assistant", "user"],
    ]
    assert {turns[0]["content"] for turns in asked} == {text, "Good morning"}


def test_what_a_robot_cannot_write_is_told_to_the_operator_alone(sim, flask, bot):
    for robot, to, says in [
        ("robot", "jared", "starts with @RBT#"),
        ("@RBT#001", "nobody", "90012"),
        ("@RBT#009", "jared", "the robot does not exist"),
        ("@RBT#001", "@TGS#none", "the group does not exist"),
    ]:
        done = flask("say", robot, to, "the-text")
        assert done.returncode == 1 and says in done.stderr
        assert "Traceback" not in done.stderr
    sim.fault = lambda command, body: 80001 if "the-text" in str(body) else None
    done = flask("say", "@RBT#001", "jared", "the-text")
    assert done.returncode == 1 and "sensitive-word filter" in done.stderr
    assert not sim.delivered
    assert flask("failed").stdout.count("\n") == 4
    assert "the-text" not in bot.log.read_text()


def test_what_a_robot_writes_while_no_server_runs_waits(sim, flask, tmp_path):
    done = flask("say", "@RBT#001", "jared", "later")
    assert (done.returncode, done.stdout[:9]) == (0, "It waits,")
    bot = BotProcess(sim, str(tmp_path)).start()
    try:
        assert sim.wait(1)[0].text == "later"
    finally:
        bot.stop()


def test_the_doctor_finds_nothing_wrong_with_a_good_set_up(flask):
    done = flask("doctor")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok  ") == 6 and "FAIL" not in done.stdout
    assert "/im" in done.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"IM_SDKAPPID": ""}, "IM_SDKAPPID is missing"),
        ({"IM_CALLBACK_TOKEN": ""}, "IM_CALLBACK_TOKEN is missing"),
        ({"IM_CALLBACK_TOKEN": "", "ALLOW_UNSIGNED": 1}, "anybody can spend"),
        ({"IM_KEY": "wrong"}, "70009"),
        ({"IM_SDKAPPID": 1400000009}, "70020"),
        ({"IM_ADMIN": "jared"}, "60010"),
        ({"IM_API_URL": "http://127.0.0.1:1"}, "no answer (ConnectionError)"),
        ({"AI_SECRET_KEY": "wrong"}, "2049"),
        ({"AI_BASE_URL": "http://127.0.0.1:1"}, "ConnectionError"),
        ({"AI_PROVIDER": "nobody"}, "AI_PROVIDER must be one of"),
        (
            {"DATABASE_URL": "sqlite:////nowhere/bot.db"},
            "/nowhere/bot.db cannot be made there",
        ),
        ({"fault": 60026}, "set IM_API_URL to that region's domain"),
        ({"fault": 60020}, "the package has expired or is unpaid"),
        ({"robots": {}}, "there is no robot yet"),
        ({"skew": 3600}, "this server's clock is"),
        ({"ROBOTS": "/nowhere.toml"}, "/nowhere.toml, which is not there"),
    ],
    ids=str,
)
def test_the_doctor_names_the_fault(sim, flask, settings, says):
    settings = dict(settings)
    if code := settings.pop("fault", None):
        sim.fault = lambda command, body: code
    sim.robots = settings.pop("robots", sim.robots)
    sim.skew = settings.pop("skew", 0)
    done = flask("doctor", **settings)
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
