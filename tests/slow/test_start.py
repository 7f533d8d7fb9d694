"""How gunicorn starts the bot: settings, folders, proxies, read-only disks, workers."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import requests
from conftest import HERE, poll

from simulator import BotProcess, running

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "settings",
    [
        {"IM_KEY": "", "AI_TIMEOUT": "x"},
        {"DATABASE_URL": "sqlite:////"},
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_wrong_setting_stops_the_start_and_is_all_that_is_said(
    sim, tmp_path, settings, workers
):
    bot = BotProcess(sim, str(tmp_path), WEB_CONCURRENCY=workers, **settings).launch()
    assert bot.wait(20) == 3
    said = [line for line in bot.log.read_text().splitlines() if line]
    assert said[0].startswith(("Some settings are missing or wrong", "DATABASE_URL"))
    assert len(said) == (1 if "DATABASE_URL" in settings else len(settings) + 1)
    assert all(name in "".join(said) for name in settings)


def test_a_bot_started_in_another_folder_says_what_is_wrong_or_starts(sim, tmp_path):
    """gunicorn does not find gunicorn.conf.py there."""
    bot = BotProcess(sim, str(tmp_path))
    bot.command[-1:], bot.folder = ["--chdir", str(HERE), bot.command[-1]], tmp_path
    key, bot.env["IM_KEY"] = bot.env["IM_KEY"], ""
    assert bot.launch().wait(20) == 3
    assert "IM_KEY is missing." in bot.log.read_text()
    bot.env["IM_KEY"] = key
    bot.start().stop()


def test_the_commands_of_flask_run_beside_the_server():
    with running() as (sim, bot):
        for words, shows in ((["doctor"], "ok   store"), (["--help"], "befriend")):
            done = subprocess.run(
                [sys.executable, "-m", "flask", "--app", "botserver", *words],
                cwd=HERE,
                env=bot.env,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert shows in done.stdout and not done.stderr


def test_a_reload_takes_new_code(sim, tmp_path):
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    tmp_path.joinpath("imbot").symlink_to(HERE / "imbot")
    bot = BotProcess(sim, str(tmp_path), WEB_CONCURRENCY=2)
    bot.folder = tmp_path
    bot.start()
    try:
        code = tmp_path / "botserver.py"
        code.write_text(code.read_text().replace("The bot is running", "New code runs"))
        bot.process.send_signal(signal.SIGHUP)
        poll(lambda: "New code runs" in requests.get(bot.url, timeout=5).text)
    finally:
        bot.stop()


def test_a_proxy_may_say_https_in_whatever_headers_it_likes():
    with running() as (sim, bot):
        sim.bot_url = ""
        event = sim.say("jared", "@RBT#001", "hi")
        for headers in (
            {"X-Forwarded-Proto": "https", "X-Forwarded-Protocol": "https"},
            {"X-Forwarded-Proto": "https", "X-Forwarded-Ssl": "off"},
        ):
            signed = sim.signed(event)
            taken = requests.post(
                f"{bot.url}/im", params=signed, json=event, headers=headers, timeout=5
            )
            assert taken.status_code == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_are_replaced_go_on_taking_callbacks(monkeypatch, workers):
    """The AI takes 3 s, Tencent waits 2 s, a worker is replaced every 2 s or so.

    While a single worker's successor boots, which a busy machine makes slow, some wait.
    """
    monkeypatch.setenv("GUNICORN_CMD_ARGS", f"--max-requests {30 // workers}")
    with running(WEB_CONCURRENCY=workers, RATE_LIMIT=0) as (sim, bot):
        sim.users |= {f"user{number}" for number in range(150)}
        sim.bot_url, sim.ai_delay, taken = "", 3.0, []

        def ask(number):
            event = sim.say(f"user{number}", "@RBT#001", "hi")
            url, signed = f"{bot.url}/im", sim.signed(event)
            try:
                answer = requests.post(url, params=signed, json=event, timeout=2)
                taken.append(answer.status_code)
            except requests.RequestException as error:
                taken.append(type(error).__name__)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(150)]
        began = time.monotonic()
        for number, thread in enumerate(threads):
            time.sleep(max(0.0, began + number / 15 - time.monotonic()))
            thread.start()
        for thread in threads:
            thread.join()
        assert taken.count(200) > 135, Counter(taken)
        assert bot.log.read_text().count("Booting worker") > workers + 1
        sim.wait(taken.count(200), timeout=60)


READ_ONLY = """
for folder in / /tmp /var/tmp {}; do
    ! mountpoint -q $folder || mount -o remount,bind,ro $folder || exit 99
done
exec "$0" "$@"
"""


@pytest.fixture
def on_read_only_disk(sim, tmp_path):
    """Return a function that launches a bot that can write to /dev/shm only."""
    unshare = ["unshare", "--mount"]
    if subprocess.run([*unshare, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("unshare may not make a namespace of mounts here")
    if not Path("/dev/shm").is_mount():
        pytest.skip("/dev/shm is no file system of its own here")
    bots, memory = [], tempfile.mkdtemp(dir="/dev/shm")

    def launch(also=""):
        bot = BotProcess(sim, str(tmp_path), DATABASE_URL=f"sqlite:///{memory}/bot.db")
        bot.command = [*unshare, "sh", "-c", READ_ONLY.format(also), *bot.command]
        bots.append(bot)
        return bot

    yield launch
    for bot in bots:
        if bot.alive():
            bot.stop()
    shutil.rmtree(memory)


def test_a_read_only_container_needs_no_more_than_dev_shm(sim, on_read_only_disk):
    on_read_only_disk().start()
    sim.say("jared", "@RBT#001", "hello")
    assert sim.wait(1)[0].text.startswith("You said: hello")


def test_a_start_without_any_writable_folder_says_so(on_read_only_disk):
    bot = on_read_only_disk("/dev/shm").launch()
    assert bot.wait(20) not in (0, 99)
    said = [line for line in bot.log.read_text().splitlines() if line]
    assert said[-1].startswith("No writable temporary directory")
    assert "Traceback" not in bot.log.read_text()
