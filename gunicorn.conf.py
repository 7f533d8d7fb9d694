"""How gunicorn runs the bot. It reads this file by itself in the folder it starts in.

Its command line and GUNICORN_CMD_ARGS win over what is here; it reads PORT and
WEB_CONCURRENCY itself. What each means: https://gunicorn.org/reference/settings/
"""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

worker_class = "gthread"  # the bot is threads; of gunicorn's own kinds this one fits
threads = 8  # callbacks at once in a process; each takes milliseconds
timeout = 90  # seconds: with 30, a process that was paused is killed, not resumed
graceful_timeout = 25  # seconds after SIGTERM; answers in work have 20 of them
keepalive = 100  # seconds: the proxy closes first (nginx after 60, Heroku after 90)
control_socket_disable = True  # it would be made in a home, which a service has not

CHECK = "import botserver; botserver.make_bot().store.close()"
NO_PRELOAD = (
    "gunicorn's --preload (preload_app) cannot be used: threads and database "
    "connections do not survive a fork. Start without it."
)


def nworkers_changed(server: Any, new: int, old: int | None) -> None:
    """Check the settings, once: this hook comes first, before preload_app has effect.

    Another process does it: what this one imports would stay as it is at a reload.
    """
    if old is None:
        if server.cfg.preload_app:
            sys.exit(NO_PRELOAD)
        if failed := subprocess.run([sys.executable, "-c", CHECK]).returncode:
            sys.exit(failed)


def post_worker_init(worker: Any) -> None:
    """Claim no more messages at SIGTERM, not seconds later when the worker exits."""
    before: Any = signal.getsignal(signal.SIGTERM)
    bot: Any = getattr(worker.wsgi, "extensions", {}).get("bot")

    def leave(number: int, frame: Any) -> None:
        bot.workers.draining = True
        before(number, frame)

    if bot:  # else it is another app, or wrapped in one
        signal.signal(signal.SIGTERM, leave)
