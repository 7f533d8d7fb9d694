"""The three starts in a folder of their own: .env, the reloader, another folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import requests
from conftest import HERE, poll

from simulator import Simulator, free_port, lifeline
from simulator.bot import bot_settings

pytestmark = pytest.mark.slow
BIN = os.path.dirname(sys.executable)
GUNICORN = [f"{BIN}/gunicorn", "botserver:create_app()"]
FLASK = [f"{BIN}/flask", "--app", "botserver"]


@pytest.fixture
def folder(tmp_path):
    """A copy of the program, with no .env yet."""
    copy = tmp_path / "copy"
    names = ["botserver.py", "providers.py", "usersig.py", "gunicorn.conf.py"]
    names += ["Procfile", "imbot", "simulator"]
    copy.mkdir()
    for name in names:
        if HERE.joinpath(name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(HERE / name, copy / name, ignore=ignore)
        else:
            shutil.copy(HERE / name, copy)
    return copy


@pytest.fixture
def run(tmp_path):
    """Return a function that starts a program with few variables; it returns a function
    that returns what the program has printed."""
    pipes, processes = [], []

    def start(command, folder, **environment):
        log = tmp_path / f"{len(processes)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={"PATH": f"{BIN}:{os.environ['PATH']}"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        processes.append(process)
        pipes.append(lifeline(process))
        start.process = process
        return log.read_text

    yield start
    for process, pipe in zip(processes, pipes, strict=True):
        process.terminate()
        try:
            process.wait(30)
        finally:
            pipe.close()


def write(folder, **settings):
    lines = [f"{name}={value}\n" for name, value in settings.items()]
    folder.joinpath(".env").write_text("".join(lines))


def serves(port):
    try:
        return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5).ok
    except requests.ConnectionError:
        return False


def test_gunicorn_reads_env_and_the_environment_wins(sim, folder, run):
    port = free_port()
    settings = bot_settings(sim) | {"AI_MODEL": "from-file", "REPLY_MODE": "modify"}
    write(folder, **settings, PORT=port, WEB_CONCURRENCY=2)
    log = run(GUNICORN, folder, REPLY_MODE="custom")
    poll(lambda: serves(port))
    poll(lambda: log().count("Booting worker") == 2)
    poll(lambda: log().count("store sqlite, AI service minimax, replies custom") == 2)
    assert folder.joinpath("botserver.db").exists()
    assert "was not read" not in log() and "gthread" in log()
    sim.bot_url = f"http://127.0.0.1:{port}"
    sim.say("jared", "@RBT#001", "hello")
    sim.wait(1, closed=True)
    assert sim.ai_requests[0]["model"] == "from-file"


def test_flask_reads_env_and_the_environment_wins(sim, folder, run):
    write(folder, **bot_settings(sim) | {"IM_SDKAPPID": "17"})
    for given, status in (({}, 1), ({"IM_SDKAPPID": str(sim.sdkappid)}, 0)):
        log = run([*FLASK, "create-robot", "@RBT#env"], folder, **given)
        assert run.process.wait(30) == status, log()
    assert "@RBT#env" in sim.robots


def test_the_demonstration_reads_env_and_its_bot_gets_that_alone(folder, run):
    write(folder, BOT_LANGUAGE="zh", REPLY_MODE="modify", IM_KEY="x", PORT=1)
    log = run([sys.executable, "-m", "simulator", "--say", "你好"], folder)
    assert run.process.wait(60) == 0
    assert "机器人（由 gunicorn 运行）" in log() and "REPLY_MODE=modify" in log()
    with Simulator() as sim:  # which printed this with --bot, and has ended since
        write(folder, **bot_settings(sim))
    log = run([sys.executable, "-m", "simulator", "--say", "hello"], folder)
    assert run.process.wait(60) == 0
    assert "You said: hello" in log()


def test_the_bots_of_tests_read_no_env(folder, run):
    write(folder, REPLY_MODE="modify")
    program = (
        "from simulator import running\n"
        "with running() as (sim, bot): print(bot.log.read_text())"
    )
    log = run([sys.executable, "-c", program], folder)
    assert run.process.wait(60) == 0
    assert "replies whole" in log()


def test_the_reloader_serves_with_one_bot_and_takes_changes(sim, folder, run):
    write(folder, **bot_settings(sim))
    port, code = free_port(), folder / "botserver.py"
    log = run([*FLASK, "run", "--debug", "--port", str(port)], folder)
    poll(lambda: serves(port), 40)
    assert log().count("store sqlite") == 1
    text = code.read_text().replace("The bot is running.", "Changed.")
    time.sleep(1.1)  # the reloader compares times of files
    code.write_text(text)

    url = f"http://127.0.0.1:{port}/"

    def is_changed():
        with suppress(requests.RequestException):  # it is being restarted
            return "Changed" in requests.get(url, timeout=5).text

    poll(is_changed, 40)
    poll(lambda: log().count("store sqlite") == 2)


def test_a_reloader_without_settings_says_so_once_and_ends(folder, run):
    log = run([*FLASK, "run", "--debug", "--port", str(free_port())], folder)
    assert run.process.wait(40) == 1
    assert log().count("Some settings are missing or wrong") == 1


@pytest.mark.parametrize("how", ["--chdir", "PYTHONPATH"])
def test_gunicorn_elsewhere_says_that_its_configuration_was_not_read(
    sim, folder, run, tmp_path, how
):
    port = free_port()
    given = bot_settings(sim) | {"PORT": str(port)}
    command = list(GUNICORN)
    if how == "--chdir":
        command[1:1] = ["--chdir", str(folder)]
    else:
        given["PYTHONPATH"] = str(folder)
    log = run(command, tmp_path, **given)
    poll(lambda: serves(port))
    [line] = re.findall(".*gunicorn.conf.py was not read.*", log())
    assert f"start gunicorn in {folder}, or add --config" in line
    hint = shlex.split(line.rpartition(", or add ")[2])
    run.process.terminate()
    run.process.wait(30)
    log = run([command[0], *hint, *command[1:]], tmp_path, **given)
    poll(lambda: serves(port))
    assert "was not read" not in log() and "gthread" in log()


def test_an_unknown_database_host_stops_gunicorn(sim, folder, run):
    url = "postgresql://bot:hunter2@no.such.host.invalid/bot"
    given = bot_settings(sim) | {"DATABASE_URL": url}
    log = run(GUNICORN, folder, **given, PORT=str(free_port()))
    assert run.process.wait(30) == 3
    assert "no.such.host.invalid" in log() and "DATABASE_WAIT=1" in log()
    assert "hunter2" not in log()
    port = free_port()
    run(GUNICORN, folder, **given, PORT=str(port), DATABASE_WAIT="1")
    health = f"http://127.0.0.1:{port}/healthz"

    def answers():
        try:
            return requests.get(health, timeout=5).status_code
        except requests.ConnectionError:
            return None

    assert poll(answers) == 503


@pytest.mark.parametrize("start", ["import botserver", "import simulator.__main__"])
def test_nothing_fails_on_an_older_python_before_the_sentence(start):
    older = (
        "import sys; sys.modules['tomllib'] = None\n"  # one of what is new in 3.11
        f"sys.version_info = (3, 10, 13, 'final', 0)\n{start}"
    )
    done = subprocess.run(
        [sys.executable, "-c", older], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch("The bot needs Python 3.11 or newer; .*\n", done.stderr)
