"""What the bot is compared with: a view that does nothing, and the naive way.

The naive way answers, too: the view hands the message to a thread, which makes the two
calls. It keeps nothing, checks nothing, remembers nothing and tries nothing again.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from flask import Flask, request

from usersig import gen_user_sig

OK = {"ActionStatus": "OK", "ErrorInfo": "", "ErrorCode": 0}


def bare() -> Flask:
    """Return an app that acknowledges."""
    app = Flask(__name__)

    @app.post("/im")
    @app.get("/healthz")
    def view() -> dict[str, Any]:
        return OK

    return app


def naive() -> Flask:
    """Return an app that answers the naive way."""
    app, env = bare(), os.environ
    pool, http = ThreadPoolExecutor(512), requests.Session()
    admin = "administrator"
    sig = gen_user_sig(int(env["IM_SDKAPPID"]), env["IM_KEY"], admin, 86400)

    def answer(event: Any) -> None:
        question = event["MsgBody"][0]["MsgContent"]["Text"]
        asked = http.post(
            f"{env['AI_BASE_URL']}/chat/completions",
            json={
                "model": "MiniMax-M3",
                "thinking": {"type": "disabled"},
                "messages": [{"role": "user", "content": question}],
            },
            headers={"Authorization": f"Bearer {env['AI_SECRET_KEY']}"},
            timeout=60,
        )
        text = asked.json()["choices"][0]["message"]["content"]
        element = {"MsgType": "TIMTextElem", "MsgContent": {"Text": text}}
        http.post(
            f"{env['IM_API_URL']}/v4/openim/sendmsg",
            params={
                "sdkappid": env["IM_SDKAPPID"],
                "identifier": admin,
                "usersig": sig,
                "random": str(random.getrandbits(32)),
                "contenttype": "json",
            },
            json={
                "SyncOtherMachine": 2,
                "From_Account": event["To_Account"],
                "To_Account": event["From_Account"],
                "MsgRandom": random.getrandbits(32),
                "MsgBody": [element],
            },
            timeout=10,
        )

    @app.before_request
    def take() -> None:
        if request.path == "/im":
            pool.submit(answer, request.get_json())

    return app
