"""The bot as the Procfile starts it, in a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import requests

from .server import Simulator
from .standin import StandIn

ROOT = Path(__file__).parent.parent  # where the Procfile is


def bot_settings(simulator: StandIn) -> dict[str, str]:
    """Return the environment that makes a bot of this simulator's app."""
    return {
        "IM_SDKAPPID": str(simulator.sdkappid),
        "IM_KEY": simulator.key,
        "IM_CALLBACK_TOKEN": simulator.token,
        "IM_API_URL": simulator.url,
        "AI_PROVIDER": "minimax",
        "AI_SECRET_KEY": simulator.ai_key,
        "AI_BASE_URL": f"{simulator.url}/v1",
    }


class BotProcess:
    """The bot as the Procfile starts it, talking to a simulator.

    Of the environment it gets all that is given, else only what programs need.
    """

    def __init__(
        self,
        simulator: StandIn,
        folder: str,
        environment: Mapping[str, str] | None = None,
        /,
        **settings: Any,
    ) -> None:
        self.simulator, self.port = simulator, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(folder, "bot.log")
        names = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")
        needed = {name: os.environ[name] for name in names if name in os.environ}
        self.env = dict(needed if environment is None else environment)
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env.get('PATH', '')}"
        self.env |= bot_settings(simulator)
        self.env["PYTHON_DOTENV_DISABLED"] = "1"  # a developer's .env is not meant
        self.env["DATABASE_URL"] = f"sqlite:///{folder}/bot.db"
        more = os.environ.get("GUNICORN_CMD_ARGS", "")  # as another class of workers
        self.env["GUNICORN_CMD_ARGS"] = f"--bind 127.0.0.1:{self.port} {more}"
        self.env |= {name: str(value) for name, value in settings.items()}
        line = ROOT.joinpath("Procfile").read_text().split("web:")[1].splitlines()[0]
        self.command, self.folder = shlex.split(line), ROOT
        self.process: subprocess.Popen[bytes] | None = None
        self._lifeline: IO[bytes] | None = None
        self.seconds_to_start = 0.0  # until it served

    def launch(self) -> BotProcess:
        """Start the process and return at once."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._lifeline = lifeline(self.process)
        return self

    def start(self, timeout: float = 20) -> BotProcess:
        """Start the process and return when it serves."""
        began = time.monotonic()
        self.launch()
        while time.monotonic() < began + timeout and self.alive():
            with suppress(requests.RequestException):
                if requests.get(f"{self.url}/healthz", timeout=2).ok:
                    self.seconds_to_start = time.monotonic() - began
                    self.simulator.bot_url = self.url
                    return self
            time.sleep(0.02)
        self.stop(signal.SIGKILL)
        raise RuntimeError(f"the bot did not start:\n{self.log.read_text()}")

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout: float = 40) -> int:
        """End the process, its workers too if killed, and return its exit status."""
        assert self.process
        if self.alive() and how == signal.SIGKILL:
            os.killpg(self.process.pid, how)
        elif self.alive():
            self.process.send_signal(how)
        return self.wait(timeout)

    def wait(self, timeout: float = 40) -> int:
        """Return the exit status of the process when it has ended."""
        assert self.process and self._lifeline
        status = self.process.wait(timeout)
        self._lifeline.close()
        return status


def lifeline(process: subprocess.Popen[Any]) -> IO[bytes]:
    """Return a pipe: when it closes, as at the latest when this program is gone, the
    process and all others of its session are killed."""
    watch = f"exec 3<&0; (read line <&3; kill -9 -{process.pid}) 2>/dev/null &"
    watcher = subprocess.Popen(
        ["sh", "-c", watch], stdin=subprocess.PIPE, start_new_session=True
    )
    watcher.wait()
    assert watcher.stdin
    return watcher.stdin


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this program as Ctrl-C does, and so its bot."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def free_port() -> int:
    """Return a port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    port: int = 0, environment: Mapping[str, str] | None = None, /, **settings: Any
) -> Iterator[tuple[Simulator, BotProcess]]:
    """Run a simulator and a bot that belong together."""
    with Simulator(port=port) as simulator, tempfile.TemporaryDirectory() as folder:
        simulator.bot = bot = BotProcess(simulator, folder, environment, **settings)
        try:
            yield simulator, bot.start()
        finally:
            if bot.alive():
                bot.stop()
