"""The edge: paths, the log's lines, and what anybody can do to it."""

from __future__ import annotations

import logging
import threading

import pytest

from imbot.web import (
    LONGEST_LINE,
    InvalidRequests,
    LineFormatter,
    Throttle,
    log_crash,
    set_up_logging,
)


def formatted(text, *values, error=None):
    """Return what the log shows of an event."""
    info = (type(error), error, error.__traceback__) if error else None
    about = ("imbot.x", logging.INFO, __file__, 1, text, values, info)
    return LineFormatter(["the-secret-key"]).format(logging.LogRecord(*about))


def test_an_event_is_one_line_whatever_it_quotes():
    shown = formatted(
        "%s failed", "id\t\tof\n2026-11-30 INFO forged\x1b[2J the-secret-KEY"
    )
    assert shown.endswith("id of\\n2026-11-30 INFO forged\\x1b[2J *** failed")
    assert len(shown.splitlines()) == 1
    assert len(formatted("%s", "x" * 10**6)) == LONGEST_LINE


def test_a_traceback_is_indented_so_that_none_of_its_lines_looks_like_an_event():
    try:
        raise ValueError("the-secret-key\n2026-11-30 INFO forged\r\x1b[2J")
    except ValueError as error:
        first, *lines = formatted("it failed", error=error).split("\n")
    assert first.endswith("it failed") and "Traceback" in lines[0]
    assert lines[-1] == "  ValueError" and "raise ValueError" in lines[-2]
    assert all(line.startswith("  ") for line in lines)


def test_a_traceback_names_the_causes_and_shows_no_text_of_any():
    try:
        try:
            raise KeyError("what a user said")
        except KeyError as error:
            raise RuntimeError("what a user said") from error
    except RuntimeError as error:
        shown = formatted("it failed", error=error)
    assert shown.index("  KeyError") < shown.index("  RuntimeError")
    assert "what a user said" not in shown.replace('Error("what a user said")', "")


def test_a_thread_that_fails_is_logged_without_the_text_of_its_error(monkeypatch):
    shown, formatter = [], LineFormatter()
    monkeypatch.setattr(threading, "excepthook", log_crash)
    monkeypatch.setattr(
        "imbot.web.logger.handle", lambda record: shown.append(formatter.format(record))
    )
    thread = threading.Thread(target=int, args=["what a user said"])
    thread.start(), thread.join()
    assert "a thread failed" in shown[0] and "ValueError" in shown[0]
    assert "what a user said" not in shown[0]


def test_a_throttle_admits_one_event_of_a_kind_and_counts_the_others():
    throttle = Throttle(seconds=600)
    assert [throttle.admit(kind) for kind in "aaba"] == [0, None, 0, None]
    throttle = Throttle(seconds=0)
    assert [throttle.admit("a") for _ in range(2)] == [0, 0]


def test_a_throttle_says_how_many_it_held_back(monkeypatch):
    throttle, now = Throttle(seconds=60), 1000.0
    monkeypatch.setattr("imbot.web.time.monotonic", lambda: now)
    assert [throttle.admit("a") for _ in range(4)] == [0, None, None, None]
    now += 61
    assert [throttle.admit("a") for _ in range(2)] == [3, None]


def test_broken_http_fills_no_log(monkeypatch):
    gunicorn, shown, now = logging.getLogger("gunicorn.error"), [], 1000.0
    monkeypatch.setattr("imbot.web.time.monotonic", lambda: now)
    monkeypatch.setattr("imbot.web.INVALID_REQUESTS", InvalidRequests())
    monkeypatch.setattr(gunicorn, "filters", [])
    monkeypatch.setattr(
        gunicorn,
        "handle",
        lambda record: gunicorn.filter(record) and shown.append(record.getMessage()),
    )
    set_up_logging("INFO")
    for wait in (0, 0, 61):
        now += wait
        gunicorn.warning("Invalid request from ip=127.0.0.1: '%s'" % ("x%s\n" * 999))
        gunicorn.warning("Booting worker with pid: 7")
    assert [line[0] for line in shown] == ["I", "B", "B", "I", "B"]
    assert shown[3].endswith("(1 more of this kind since the last line)")
    assert all(len(line) < 300 and line.isprintable() for line in shown)


def test_not_even_at_debug_a_library_logs_the_address_of_a_call(monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **how: None)
    monkeypatch.setattr(logging.getLogger("gunicorn.error"), "filters", [])
    for name in ("urllib3", "werkzeug"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
        logging.getLogger(name).manager._clear_cache()
    set_up_logging("DEBUG")
    for name in ("urllib3.connectionpool", "werkzeug"):
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "imbot.web"]


def test_a_flood_of_refused_callbacks_makes_one_line_of_each_kind(im, caplog):
    event = im.sim.say("jared", "@RBT#001", "hi")
    for _ in range(20):
        assert im.post(event, Sign="0" * 64).status_code == 403
        assert im.post(event, body="[").status_code == 400
    assert len(lines(caplog)) == 2
    assert "refused with 403: Sign is wrong" in lines(caplog)[0]
    assert "refused with 400: the body is not JSON" in lines(caplog)[1]


@pytest.mark.parametrize("path", ["/im", "/im/"])
def test_the_path_of_callbacks_may_end_with_a_slash(im, path):
    event = im.sim.say("jared", "@RBT#001", "hi")
    answer = im.client.post(path, query_string=im.sim.signed(event), json=event)
    assert (answer.status_code, answer.get_json()["ActionStatus"]) == (200, "OK")
    assert len(im.sim.wait(1)) == 1
    answer = im.client.post(path, query_string=im.sim.signed(event) | {"Sign": "x"})
    assert answer.status_code == 403


@pytest.mark.parametrize("path", ["/", "/bot/im", "/a%0a2026%20b/im", "/healthz"])
def test_a_callback_to_another_path_is_told_once_where_it_should_go(im, caplog, path):
    event = im.sim.say("jared", "@RBT#001", "hi")
    for _ in range(3):
        answer = im.client.post(path, query_string=im.sim.signed(event), json=event)
        assert answer.status_code == 404
        assert answer.get_json()["ErrorInfo"] == "the path of callbacks is /im"
    [line] = lines(caplog)
    shown = path.replace("%0a", "\\n").replace("%20", " ")
    assert line.startswith(f"callback to {shown} refused with 404")
    assert "Webhook" in line and len(line.splitlines()) == 1


def test_visitors_of_other_paths_are_not_logged(im, caplog):
    for path in ("/wp-login.php", "/", "/im/x"):
        im.client.get(path)
        im.client.post(path, data="x")
    assert not lines(caplog)


def test_the_log_of_the_server_hides_every_secret(make_app, monkeypatch):
    setups = []
    monkeypatch.setattr(logging, "basicConfig", lambda **how: setups.append(how))
    keys = {"ai_secret_keys": {"AI_SECRET_KEY_DIFY": "another-key"}}
    app = make_app(im_callback_token=("first-token", "second-token"), **keys)
    settings = app.extensions["bot"].settings
    secrets = settings.secrets()
    assert {settings.im_key, settings.ai_secret_key} < {*secrets}
    assert {"first-token", "second-token", "another-key"} < {*secrets}
    [handler] = setups[0]["handlers"]
    record = logging.LogRecord("x", 20, "", 1, " ".join(secrets), (), None)
    assert not any(secret in handler.format(record) for secret in secrets)
