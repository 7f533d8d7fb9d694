"""Nothing that a bot prints or answers holds a key, a signature, or what was said.

Every secret and every text of a run over real HTTP holds the word of MARK, and so does
what an AI service and Tencent say back. Then that word is looked for in all that came
out: the log at DEBUG, answers to callbacks, /healthz, the commands, the process list.
"""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
import requests
from conftest import poll

from benchmark.stage import MODES, workers
from simulator import BotProcess, Simulator
from simulator.ai import DONE, sse
from simulator.bot import ROOT

pytestmark = pytest.mark.slow

MARK = "SENTINEL"
FORGED = "\n2026-11-30 00:00:00,000 ERROR forged \x1b[2J\u2028\x85\u202e"
TEXT = f"{MARK}, the text of a user"
SECRETS = {
    "IM_KEY": f'{MARK}-im-"key"/\\',
    "IM_CALLBACK_TOKEN": f"{MARK}-token,{MARK}-older-token",
    "AI_SECRET_KEY": f'{MARK}-ai-"key"/\\',
    "AI_SECRET_KEY_DIFY": f"{MARK}-another-ai-key",
}
AI_STATUSES = (400, 401, 402, 403, 404, 405, 408, 413, 429, 451, 500, 503, 529)
AI_PLACES = ("error", "base_resp", "detail", "choices")
IM_CODES = (80001, 20003, 10007, 90012, 60007, 90994, 70001, 1, 0)  # 0: no answer
LATER = 3  # of these: they may be taken later
BROKEN = ("accept", "compose", "stream", "thread")  # parts of the fork below
LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) [\w.]+ "
    r"|\[\d{4}-\d\d-\d\d [^]]+\] \[\d+\] \[[A-Z]+\] "
    r"|  \S?|$|}$|[a-z_]+: "  # a traceback; gunicorn's settings at its level debug
)
OTHERS = """
["@RBT#nowhere"]
base_url = "http://127.0.0.1:1"
["@RBT#wrong"]
secret_key_env = "AI_SECRET_KEY_DIFY"
"""
FORK = """
import threading
import botserver
from flask import request

class Bot(botserver.Bot):
    def accept(self, message, was_missed=False):
        if "break accept" in message.text:
            raise ValueError(message.text)
        if "break thread" in message.text:
            threading.Thread(target=self.fail, args=[message.text]).start()
        super().accept(message, was_missed)

    def fail(self, text):
        raise ValueError(f"{text} {self.settings.ai_secret_key}")

    def compose(self, chat):
        if "break compose" in chat.message.text:
            self.fail(chat.message.text)
        if "break stream" in chat.message.text:
            return self.stream(chat)
        return super().compose(chat)

    def stream(self, chat):
        yield "the beginning"
        self.fail(chat.message.text)

def create_app():
    botserver.Bot = Bot
    app = botserver.create_app()

    @app.post("/route")
    def route():
        raise ValueError(request.get_data(as_text=True))

    return app
"""


class Echo(Simulator):
    """A stand-in whose errors repeat all they were asked, and forge lines of a log."""

    def __init__(self):
        super().__init__(key=SECRETS["IM_KEY"])
        self.token = SECRETS["IM_CALLBACK_TOKEN"].split(",")[1]
        self.ai_key = self.secret = SECRETS["AI_SECRET_KEY"]
        robots = [*MODES, "@RBT#nowhere", "@RBT#wrong"]
        self.robots = dict.fromkeys(robots, f"{MARK}, the nick of a robot")
        self.ai_answer = lambda messages: f"{MARK} is what the AI says.\n" * 9
        self.ai_fault, self.sigs = self.fail, set()
        self.here = threading.local()

    def user(self, name):
        self.users.add(name)
        return name

    def fail(self, asked):
        """Break an answer as the last question says: "ai 400", "ai error"."""
        last = str(asked["messages"][-1]["content"])
        found = re.search(r"\[ai (\w+)\]", last)
        how = found[1] if found else ""
        said = json.dumps(asked["messages"], ensure_ascii=False)
        echo = f"no: {self.ai_key} {said}{FORGED} {last} {'long ' * 999}"
        self.here.event = None
        if how.isdigit():
            return int(how), {"error": {"message": echo, "code": FORGED, "type": "x"}}
        if how == "base_resp":
            self.here.event = {how: {"status_code": 1008, "status_msg": echo}}
        elif how:
            self.here.event = {how: {"message": echo, "code": "x"}, "message": echo}
        return None

    def stream(self, text):
        event = getattr(self.here, "event", None)
        return iter([sse(event), DONE]) if event else super().stream(text)

    def rest(self, command, query, body):
        """Refuse what is for a user or in a group with the name "im <code>"."""
        self.sigs.add(query["usersig"])
        found = re.search(rb"im (\d+)", body)
        if not found:
            return super().rest(command, query, body)
        info = f"{query['usersig']} {body.decode()} {json.loads(body)}{FORGED}"
        code = int(found[1])
        if not code:
            return None
        return {"ActionStatus": "FAIL", "ErrorCode": code, "ErrorInfo": info}


class Run:
    """A bot of an Echo, and all that came out of it."""

    def __init__(self, sim, folder):
        self.sim, self.folder, self.out, self.met = sim, folder, [], set()
        robots = [
            f'["{name}"]\nreply_mode = "{mode}"\n' for name, mode in MODES.items()
        ]
        folder.joinpath("robots.toml").write_text("".join(robots))
        folder.joinpath("fork.py").write_text(FORK)
        more = {"LOG_LEVEL": "DEBUG", "AI_TIMEOUT": 4, "BOT_LANGUAGE": "en"}
        more |= {"PYTHONPATH": folder, "GROUP_CONTEXT": 5, "RATE_LIMIT": 0}
        more |= {"ROBOTS": folder / "robots.toml", "MAX_WAITING": 100}
        self.bot = BotProcess(sim, str(folder), **SECRETS | more)
        self.bot.command[-1] = "fork:create_app()"
        self.bot.env["GUNICORN_CMD_ARGS"] += " --log-level=debug"
        self.path = folder / "bot.db"

    def post(self, event, path="/im", data=None, **query):
        """Post a callback past the stand-in; return its status."""
        self.sim.sigs.add(signed := self.sim.signed(event)["Sign"])
        about = self.sim.signed(event) | {"Sign": signed} | query
        body = json.dumps(event).encode() if data is None else data
        url = self.bot.url + path
        answer = requests.post(url, params=about, data=body, timeout=20)
        self.keep(f"{answer.status_code} {answer.headers} {answer.text}")
        self.met.add(answer.status_code)
        return answer.status_code

    def write(self, user, text):
        """Return a callback that only Tencent's history has."""
        url, self.sim.bot_url = self.sim.bot_url, ""
        try:
            return self.sim.say(user, "@RBT#whole", text)
        finally:
            self.sim.bot_url = url

    def keep(self, text):
        self.out.append(text)

    def command(self, *words, **changes):
        """Run a command of `flask`; keep what it printed and return its status."""
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", "botserver", *words],
            cwd=ROOT,
            env=self.bot.env | changes,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.keep(done.stdout + done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    def healthz(self):
        answer = requests.get(f"{self.bot.url}/healthz", timeout=20)
        self.keep(answer.text)
        return answer.json()

    def log(self):
        return self.bot.log.read_text()


@pytest.fixture
def run(tmp_path):
    with Echo() as sim:
        run = Run(sim, tmp_path)
        try:
            yield run
        finally:
            if run.bot.process:
                run.bot.stop(signal.SIGKILL)


def test_no_secret_and_no_text_comes_out_of_a_bot_or_its_commands(run):
    run.bot.start()
    refuse_callbacks(run)
    break_the_store(run)
    break_the_fork(run)
    assert run.met == {200, 400, 403, 404, 413, 500, 503}
    break_answers(run)
    commands(run)
    processes(run)
    run.bot.stop()
    printed = run.log()
    start_wrongly(run)
    for text in (run.log(), *run.out):
        assert MARK.lower() not in text.lower(), excerpt(text)
        assert not any(sig in text for sig in run.sim.sigs)
    for line in printed.split("\n"):
        assert LINE.match(line) and len(line) <= 2000, line
        assert line.replace("\t", " ").isprintable(), line
    assert "ERROR forged" in printed and printed.count("***") > 50


def excerpt(text):
    at = text.lower().index(MARK.lower())
    return text[max(0, at - 1500) : at + 300]


def refuse_callbacks(run):
    """Post what is no callback of Tencent's."""
    event = run.sim.say("jared", "@RBT#whole", TEXT)
    run.sim.wait(1)
    assert run.post(event, path="/other") == 404
    for query in ({"Sign": MARK}, {"RequestTime": MARK}, {"SdkAppid": MARK}):
        assert run.post(event, **query) == 403
    broken = f'{{"From_Account": "{TEXT}'.encode()
    for data in (TEXT.encode(), broken, b"\xff" + TEXT.encode(), b""):
        assert run.post(event, data=data) == 400
    for name in ("From_Account", "MsgBody", "MsgTime", "MsgSeq", "To_Account"):
        assert run.post(event | {name: {"x": TEXT + FORGED}}) == 400
        run.post(event | {name: TEXT + FORGED})
    assert run.post(event, data=TEXT.encode() * 2**17) == 413


def break_the_store(run):
    """Lock the store while a callback comes."""
    event = run.write("jared", TEXT)
    with closing(sqlite3.connect(run.path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert run.post(event) == 503
        run.keep(requests.get(f"{run.bot.url}/healthz", timeout=20).text)


def break_the_fork(run):
    """Let the fork's own code fail: in a callback, a route, a thread, an answer."""
    for part in BROKEN:
        status = run.post(run.write("lin", f"break {part}: {TEXT}{FORGED}"))
        assert status == (500 if part == "accept" else 200)
    url, text = f"{run.bot.url}/route", f"{TEXT}{FORGED}"
    run.keep(requests.post(url, data=text.encode(), timeout=20).text)
    poll(lambda: "/route" in run.log())


def break_answers(run):
    """Let answers fail in every way, one-to-one and in a group, in all modes."""
    sim = run.sim
    for how in (*AI_STATUSES, *AI_PLACES):
        for robot in ("@RBT#whole", "@RBT#stream"):
            sim.say(sim.user(f"asks ai {how}"), robot, f"{TEXT} [ai {how}]{FORGED}")
    for robot in ("@RBT#nowhere", "@RBT#wrong"):
        sim.say(sim.user(f"asks {robot}"), robot, TEXT)
    for code in IM_CODES:
        for robot in MODES:
            sim.say(sim.user(f"is im {code}"), robot, f"{TEXT} {code}")
    sim.groups |= {"@TGS#im 10007": {"jared"}}
    for group in ("@TGS#demo", "@TGS#im 10007"):
        sim.say_in_group("lin", group, f"{TEXT}, before", [])
        for how in ("400", "error"):
            robots = [*MODES][:2]
            sim.say_in_group("jared", group, f"{TEXT} [ai {how}]", robots)
    final = len(MODES) * (len(IM_CODES) - LATER)
    poll(lambda: run.healthz()["failed"] >= final and settled(run), 60)
    told = {message.chat for message in sim.delivered}
    assert told >= {f"asks ai {how}" for how in (*AI_STATUSES, *AI_PLACES)}
    assert told >= {"asks @RBT#nowhere", "asks @RBT#wrong"}


def settled(run):
    """Return whether only what Tencent may take later is left."""
    later = len(MODES) * LATER
    state = run.healthz()
    return state["waiting"] + state["in_work"] <= later


def commands(run):
    """Run the commands, with what they need and without."""
    assert run.command("doctor") == 0
    assert run.command("failed") == 0
    assert run.command("create-robot", "@RBT#im 10008") == 1
    assert run.command("befriend", "@RBT#whole", "im 30010") == 1
    assert run.command("say", "@RBT#whole", "im 80001", "hello") == 1
    nowhere = "http://127.0.0.1:1"
    postgres = f"postgresql://bot:{MARK}-p%40ss@127.0.0.1:1/x"
    failing = (
        {"IM_KEY": f"{MARK}-a-wrong-key", "AI_SECRET_KEY": f"{MARK}-a-wrong-key"},
        {"IM_API_URL": nowhere, "AI_BASE_URL": nowhere},
        {"HTTP_PROXY": f"http://user:{MARK}@127.0.0.1:1"},
        {"AI_BASE_URL": f"http://user:{MARK}-password@127.0.0.1:1/v1?key={MARK}"},
        {"DATABASE_URL": postgres},
        {"DATABASE_URL": f"postgresql://127.0.0.1:1/x?user=bot&password={MARK}-pass"},
        {"AI_PROVIDER": "dify", "AI_SECRET_KEY": f"{MARK}-a-wrong-key"},
    )
    with ThreadPoolExecutor(3) as pool:
        doctor = partial(run.command, "doctor")
        assert {*pool.map(lambda changes: doctor(**changes), failing)} == {1}
    assert run.command("retry") == 0


def processes(run):
    """Keep what `ps` shows."""
    for pid in (run.bot.process.pid, *workers(run.bot)):
        line = Path(f"/proc/{pid}/cmdline").read_text()
        assert "gunicorn" in line
        run.keep(line)


def start_wrongly(run):
    """Start bots that cannot work: they end with a sentence, or wait for the store."""
    for changes in (
        {"DATABASE_URL": f"postgresql://bot:{MARK}-p%40ss@127.0.0.1:1/x"},
        {"DATABASE_URL": f"postgresql://bot:{MARK}/p@ss:w@127.0.0.1:1/x"},
        {"DATABASE_URL": f"mysql://bot:{MARK}-password@127.0.0.1:1/x"},
        {"AI_BASE_URL": f"http://user:{MARK}-password@127.0.0.1:1/v1"},
        {"IM_SDKAPPID": f"{MARK}-a-key-in-the-wrong-place"},
        {"IM_KEY": "", "IM_CALLBACK_TOKEN": f"{MARK}-token"},
        {"AI_EXTRA_BODY": f'{{"key": "{MARK}-key'},
    ):
        before, run.bot.env = run.bot.env, run.bot.env | changes
        run.bot.launch()
        poll(lambda: not run.bot.alive() or waits(run), 60)
        run.bot.stop(signal.SIGKILL)
        run.bot.env = before


def waits(run):
    """Return whether a bot serves, but has no store."""
    with suppress(requests.ConnectionError):
        run.keep(requests.get(f"{run.bot.url}/healthz", timeout=20).text)
        return True
    return False
