"""The commands of `flask --app botserver`, run in this process."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
from click.testing import CliRunner
from conftest import APPID, FAST, Caller, newest_of, poll
from flask.cli import FlaskGroup

from botserver import create_app
from imbot.queue import open_store
from simulator import KEY, check_user_sig
from simulator.bot import bot_settings

QUICK = replace(FAST, watch=2.0, call_timeout=2.0)


@pytest.fixture
def flask(sim, tmp_path, monkeypatch):
    """Return a function that runs a command of `flask --app botserver`."""
    monkeypatch.setenv("FLASK_RUN_FROM_CLI", "")  # which FlaskGroup sets
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    env = bot_settings(sim) | {"DATABASE_URL": f"sqlite:///{tmp_path}/bot.db"}
    group = FlaskGroup(create_app=partial(create_app, timing=QUICK), load_dotenv=False)

    def run(*words, **settings):
        changed = {name: str(value) for name, value in settings.items()}
        done = CliRunner().invoke(group, words, env=env | changed)
        assert isinstance(done.exception, SystemExit | None), done.exception
        return done

    return run


@pytest.fixture
def bot(sim, make_app):
    """A bot that works on the database of the commands; its log is in caplog."""
    return Caller(sim, make_app(timing=QUICK, reply_mode="modify").test_client())


def test_robots_are_made_listed_and_deleted_by_command(sim, flask):
    done = flask("create-robot", "@RBT#cli", "--nick", "Clio")
    assert done.exit_code == 0 and sim.robots["@RBT#cli"] == "Clio", done.stderr
    listed = "IM_KEY is accepted; the robots are @RBT#001, @RBT#002, @RBT#cli\n"
    assert listed in flask("doctor").stdout
    assert flask("delete-robot", "@RBT#cli").exit_code == 0
    assert "@RBT#cli" not in sim.robots
    done = flask("create-robot", "robot")
    assert done.exit_code == 1
    assert "must start with @RBT#" in done.stderr
    done = flask("create-robot", "@RBT#x", IM_KEY="wrong")
    assert done.exit_code == 1 and "IM_KEY is not the key" in done.stderr


def test_a_robot_that_is_made_by_command_can_be_written_to(im, flask):
    assert flask("create-robot", "@RBT#new", "--nick", "Newcomer").exit_code == 0
    robots = dict(im.sim.robots)
    assert flask("create-robot", "@RBT#new", "--nick", "Newcomer").exit_code == 0
    assert im.sim.robots == robots
    im.say("welcome", robot="@RBT#new")
    assert im.sim.wait(1)[0].robot == "@RBT#new"


@pytest.mark.parametrize("name", ["dify", "adp"])
def test_a_platform_can_be_checked_by_command(sim, flask, name):
    done = flask("doctor", AI_PROVIDER=name, AI_SECRET_KEY="the-wrong-key")
    assert done.exit_code == 1 and "FAIL AI" in done.stdout
    assert re.search("code (unauthorized|4505004)", done.stdout)
    assert "the-wrong-key" not in done.stdout
    assert f"answers: {name} in " in flask("doctor", AI_PROVIDER=name).stdout


def test_a_usersig_is_made_by_command(flask):
    sig = flask("usersig", "jared", "--expire", "60").stdout.strip()
    assert check_user_sig(KEY, sig)["TLS.identifier"] == "jared"


@pytest.mark.parametrize(
    "words", ["frobnicate", "retry one", "usersig jared --expire 0", "say"]
)
def test_a_mistyped_command_is_told(flask, words):
    done = flask(*words.split())
    assert done.exit_code == 2
    assert "Error: " in done.stderr


def test_a_robot_becomes_a_friend_by_command(sim, flask):
    done = flask("befriend", "@RBT#001", "jared", "nobody", "lin")
    assert (sim.friends["jared"], sim.friends["lin"]) == ({"@RBT#001"}, {"@RBT#001"})
    assert done.exit_code == 1
    assert done.stderr.startswith("nobody: sns/friend_add failed with 30003")
    assert done.stdout.count("is a friend of") == 2
    done = flask("befriend", "@RBT#009", "jared")
    assert done.exit_code == 1 and "does not exist" in done.stderr
    assert flask("befriend", "@RBT#001", "jared").exit_code == 0
    assert flask("befriend", "@RBT#001").exit_code == 2


def test_what_failed_is_listed_and_put_back_by_command(sim, flask, bot, caplog):
    caplog.set_level("INFO")
    sim.fault = lambda command, body: 20003
    bot.say("hello")
    poll(lambda: bot.client.get("/healthz").get_json()["failed"] == 1)
    done = flask("failed")
    assert re.match(r"\d+  \d+ s ago: .*20003", done.stdout)
    assert re.search(r"@RBT#001\s+jared\s.* failed: .*20003", caplog.text)
    sim.fault = lambda command, body: None
    done, number = flask("retry", "99"), done.stdout.split()[0]
    assert done.exit_code == 1 and "no message with such a number" in done.stderr
    assert flask("retry", number).stdout == "1 put back.\n"
    assert sim.wait(1)[0].text == "You said: hello (question 1 of our chat)"
    assert flask("failed").stdout == "No message was given up.\n"
    assert flask("retry").stdout == "0 put back.\n"


def test_the_reasons_of_what_failed_are_a_line_each(sim, flask, bot, tmp_path):
    sim.fault = lambda command, body: 20003
    bot.say("hello")
    poll(lambda: bot.client.get("/healthz").get_json()["failed"] == 1)
    forged = "why\n7  3 s ago: forged\x1b[2J" + "x" * 9000
    with closing(sqlite3.connect(tmp_path / "bot.db")) as other, other:
        other.execute("UPDATE message SET reason = ? WHERE reason <> ''", [forged])
    [line] = flask("failed").stdout.splitlines()
    assert "why\\n7  3 s ago: forged\\x1b[2J" in line and len(line) < 1100


def test_a_robot_writes_first_and_the_ai_knows_of_it(sim, flask, bot):
    flask = partial(flask, REPLY_MODE="modify")
    text = "Your order is on its way. " * 700
    done = flask("say", "@RBT#001", "jared", text)
    assert (done.exit_code, done.stdout) == (0, "Sent.\n")
    parts = [message.text for message in sim.wait(3)]
    assert "".join(parts).split() == text.split() and len(parts) == 3
    assert flask("say", "@RBT#001", "@TGS#demo", "Good morning").exit_code == 0
    sim.groups["own-id"] = {"jared"}
    assert flask("say", "@RBT#001", "own-id", "Hi", "--group").exit_code == 0
    told = [(message.chat, message.text) for message in sim.delivered[3:]]
    assert told == [("@TGS#demo", "Good morning"), ("own-id", "Hi")]
    assert all(message.closed for message in sim.delivered)
    assert not sim.ai_requests
    bot.say("when?")
    bot.post(sim.say_in_group("lin", "@TGS#demo", "hello", ["@RBT#001"]))
    sim.wait(7, closed=True)
    asked = [request["messages"][-2:] for request in sim.ai_requests]
    assert [turn["role"] for turn in sum(asked, [])] == ["assistant", "user"] * 2
    assert {turns[0]["content"] for turns in asked} == {text, "Good morning"}


def test_what_a_robot_cannot_write_is_told_to_the_operator_alone(
    sim, flask, bot, caplog
):
    caplog.set_level("DEBUG")
    for robot, to, says in [
        ("robot", "jared", "ROBOT must start with @RBT#"),
        ("@RBT#001", "nobody", "90012"),
        ("@RBT#009", "jared", "the robot does not exist"),
        ("@RBT#001", "@TGS#none", "the group does not exist"),
    ]:
        done = flask("say", robot, to, "the-text")
        assert done.exit_code == 1 and says in done.stderr
    sim.fault = lambda command, body: 80001 if "the-text" in str(body) else None
    done = flask("say", "@RBT#001", "jared", "the-text")
    assert done.exit_code == 1 and "sensitive-word filter" in done.stderr
    assert not sim.delivered
    assert flask("failed").stdout.count("\n") == 4
    assert "the-text" not in caplog.text


def test_what_failed_is_named_by_numbers_that_can_be_pasted(flask, tmp_path):
    url, app = f"sqlite:///{tmp_path}/bot.db", APPID
    with closing(open_store(url, app=app)) as store:
        for number in range(103):
            user = f"x'$(touch {number})" if number else "o'neil"
            store.add(f"@RBT#001\t{user}", f"c2c\t{user}", {})
            store.fail(store.claim(), "no")
    told = flask("failed").stdout.splitlines()
    assert len(told) == 101 and told[-1] == "and 3 more"
    assert all(re.fullmatch(r"\d+  \d+ s ago: no", line) for line in told[:-1])
    assert flask("retry", told[0].split()[0]).stdout == "1 put back.\n"
    with closing(open_store(url, app=app)) as store:
        assert store.claim().id == "@RBT#001\to'neil"


@pytest.mark.parametrize(
    "words", [["failed"], ["retry"], ["say", "@RBT#001", "jared", "hello"]]
)
def test_another_apps_database_is_left_alone(flask, tmp_path, words):
    with closing(open_store(f"sqlite:///{tmp_path}/bot.db", app=1)) as store:
        done = flask(*words)
        assert done.exit_code == 1 and newest_of(store) == 0
    assert f"IM_SDKAPPID 1, and this server's is {APPID}" in done.stderr


def test_what_a_robot_writes_while_no_server_runs_waits(sim, flask, make_app):
    done = flask("say", "@RBT#001", "jared", "later")
    assert (done.exit_code, done.stdout[:13]) == (0, "It is queued:")
    make_app()
    assert sim.wait(1)[0].text == "later"


def test_the_doctor_finds_nothing_wrong_with_a_good_set_up(flask):
    done = flask("doctor")
    assert done.exit_code == 0, done.stdout
    assert done.stdout.count("ok  ") == 6 and "FAIL" not in done.stdout
    assert done.stdout.count("\nnote ") == 1, "the app may use TUIKit"
    assert "accepted if signed with the token IM_CALLBACK_TOKEN" in done.stdout
    assert "https://<this server>/im" in done.stdout
    done = flask("doctor", IM_CALLBACK_TOKEN="old-token,new-token")
    assert "one of the 2 tokens of IM_CALLBACK_TOKEN" in done.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"IM_SDKAPPID": ""}, "IM_SDKAPPID is missing"),
        ({"IM_CALLBACK_TOKEN": ""}, "IM_CALLBACK_TOKEN is missing"),
        ({"IM_CALLBACK_TOKEN": "", "ALLOW_UNSIGNED": 1}, "set IM_CALLBACK_TOKEN"),
        ({"IM_KEY": "wrong"}, "70009: "),
        ({"IM_KEY": "wrong"}, "IM_KEY is not the key of this app"),
        ({"IM_SDKAPPID": 1400000009}, "IM_SDKAPPID is not a valid app"),
        ({"IM_ADMIN": "jared"}, "IM_ADMIN is not an admin of this app"),
        (
            {"IM_API_URL": "http://127.0.0.1:1"},
            "nobody listens there): check IM_API_URL, HTTPS_PROXY",
        ),
        ({"IM_API_URL": "http://127.0.0.1:1"}, "note clock     not checked: "),
        ({"IM_API_URL": "http://127.0.0.1:1"}, "note history   not checked: "),
        ({"fault": 70003}, "check IM_SDKAPPID, IM_KEY, IM_ADMIN, IM_API_URL"),
        ({"AI_SECRET_KEY": "wrong"}, "2049"),
        ({"AI_BASE_URL": "http://127.0.0.1:1"}, "check AI_BASE_URL"),
        ({"AI_PROVIDER": "nobody"}, "AI_PROVIDER must be one of"),
        (
            {"DATABASE_URL": "sqlite:////nowhere/bot.db"},
            "cannot be made: No such file or directory. DATABASE_URL must name",
        ),
        ({"fault": 60026}, "set IM_API_URL to that region's domain"),
        ({"fault": 60020}, "the package has expired or is unpaid"),
        ({"robots": {}}, "the app has no robot yet: create-robot @RBT#001"),
        ({"skew": 13}, "this server's clock is -1"),
        ({"ROBOTS": "/nowhere.toml"}, "/nowhere.toml, which does not exist"),
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
    assert done.exit_code != 0
    assert says in done.stdout + done.stderr


def test_the_doctor_names_the_robot_that_must_be_created(flask, tmp_path):
    file = tmp_path / "personas.toml"
    file.write_text('["@RBT#009"]\nnick = "Nine"\n')
    done = flask("doctor", ROBOTS=file)
    assert done.exit_code == 1
    assert "@RBT#009 of ROBOTS does not exist: create-robot @RBT#009" in done.stdout


@pytest.mark.parametrize(
    ("modes", "says"),
    [
        ({}, "shown by whole: if your app uses TUIKit, set REPLY_MODE_MOBILE=card"),
        ({"REPLY_MODE": "stream"}, "shown by stream: if your app uses TUIKit"),
        ({"REPLY_MODE_MOBILE": "custom"}, "phones unlocks its input"),
        ({"REPLY_MODE": "card"}, "phones unlocks its input"),
        ({"REPLY_MODE": "card", "REPLY_MODE_MOBILE": "modify"}, "shown by modify"),
    ],
)
def test_the_doctor_says_whether_phones_can_go_on(flask, modes, says):
    [line] = [x for x in flask("doctor", **modes).stdout.splitlines() if "clients" in x]
    kind = "ok  " if "unlocks" in says else "note"
    assert line.startswith(f"{kind} clients") and says in line


def test_the_doctor_says_what_is_switched_off(flask):
    assert "stays unanswered (CATCH_UP=0)" in flask("doctor", CATCH_UP=0).stdout


def test_the_doctor_says_how_to_do_without_a_history_that_is_refused(sim, flask):
    sim.fault = lambda command, body: 10004 if "recentcontact" in command else None
    [line] = [x for x in flask("doctor").stdout.splitlines() if "FAIL" in x]
    assert line.startswith("FAIL history") and "failed with 10004" in line
    assert line.endswith(": CATCH_UP=0 switches this off")
    sim.fault = lambda command, body: 60020
    assert "CATCH_UP" not in flask("doctor").stdout


def test_the_doctor_names_the_setting_that_was_meant(flask):
    done = flask("doctor", AI_MODLE="x")
    assert "AI_MODLE is not a setting: do you mean AI_MODEL?" in done.stdout
