"""The reply modes in which an answer grows: modify, custom and stream."""

from __future__ import annotations

import pytest

import tim
from conftest import APPID, Caller, idle, poll
from simulator import KEY


@pytest.mark.parametrize("mode", ["modify", "custom", "stream"])
def test_a_growing_mode_that_im_refuses_becomes_plain_text(sim, make_app, mode):
    im = Caller(sim, make_app(reply_mode=mode).test_client())
    refused = {"modify": "TIMTextElem", "custom": "TIMCustomElem"}.get(mode)

    def fault(command, body):
        kind = body["MsgBody"][0]["MsgType"]
        text = body["MsgBody"][0]["MsgContent"].get("Text")
        return (
            10004
            if kind == refused and text in (None, "…") or "Stream" in kind
            else None
        )

    sim.fault = fault
    im.say("hello")
    [answer] = sim.wait(1)
    assert answer.text == "You said: hello (question 1 of our chat)"
    assert answer.body["MsgBody"][0]["MsgType"] == "TIMTextElem"


def test_a_failure_in_custom_mode_is_shown_as_one(sim, make_app):
    im = Caller(sim, make_app(reply_mode="custom").test_client())
    sim.ai_fault = lambda asked: (401, {"error": {"message": "no (1004)"}})
    im.say("hello")
    poll(lambda: sim.delivered and idle(im))
    assert sim.delivered[0].failed and sim.delivered[0].closed


def test_a_stream_is_kept_alive_only_while_it_is_open(sim, monkeypatch):
    client = tim.Client(sim.url, APPID, KEY, "administrator")
    message = tim.Message("id", "@RBT#001", "jared", "hi")
    stream = tim.Streamed(client, message, 1, {}, lambda progress: None)
    stream.nudge()
    assert not sim.calls
    stream.open()
    stream.grow("half")
    stream.nudge()
    assert sim.delivered[0].index == 2
    monkeypatch.setattr(stream, "idle", 0.0)
    stream.nudge()
    assert (sim.delivered[0].index, sim.delivered[0].text) == (3, "half")
    stream.close("half and half")
    stream.nudge()
    assert (sim.delivered[0].index, sim.delivered[0].closed) == (4, True)
    assert [m.text for m in sim.delivered] == ["half and half"]


@pytest.mark.parametrize("died", ["as it kept the answer", "as it sent the answer"])
def test_a_stream_that_a_dead_process_began_does_not_swallow_the_answer(sim, died):
    client = tim.Client(sim.url, APPID, KEY, "administrator")
    message, saved = tim.Message("id", "@RBT#001", "jared", "hi"), {}
    tim.Streamed(client, message, 7, {}, saved.update).open()
    if died == "as it sent the answer":
        saved |= {"said": "", "index": 1}
        sim.delivered[0].time -= 20  # Tencent has closed it meanwhile
        faults = ["lost"]
        sim.fault = lambda command, body: faults and faults.pop()
    tim.Streamed(client, message, 7, dict(saved), saved.update).close("the answer")
    assert "the answer" in sim.delivered[-1].text
    assert all(message.closed for message in sim.delivered)


@pytest.mark.parametrize("mode", ["modify", "custom", "stream"])
def test_an_opening_that_im_took_but_did_not_confirm_is_not_left_open(
    sim, make_app, mode
):
    im = Caller(sim, make_app(reply_mode=mode).test_client())
    faults = [60007, 60007, "late"]
    sim.fault = lambda command, body: faults and faults.pop()
    im.say("hello")
    poll(lambda: not faults and idle(im))
    assert [message.closed for message in sim.delivered] == [True]
    assert sim.delivered[0].text.startswith("You said: hello")
