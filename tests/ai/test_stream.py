"""Answers are read as the standard has server-sent events, and nothing is lost."""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace

import pytest
from conftest import ANSWER, ai_json, delta, sse
from hypothesis import given, settings
from hypothesis import strategies as st
from test_providers import FAST, ai_answer, ai_failure, ai_service, ai_texts

from imbot.ai import ProviderError
from imbot.ai.stream import DONE, EventReader, joined
from imbot.http import CancelScope


def standard(text):
    """Return the data of each event, read as the WHATWG's page has it, word by word."""
    text = text.removeprefix("\ufeff")
    found, data = [], []
    for line in re.split("\r\n|\n|\r", text)[:-1]:  # the last one has no end
        name, colon, value = line.partition(":")
        if not line:
            if data:
                found.append("\n".join(data))
            data = []
        elif name == "data":
            data.append(value.removeprefix(" "))
    return found


LINES = st.sampled_from(
    [
        ": a comment",
        "event: message",
        "id: 1",
        "retry: 10",
        "data",
        'data:{"a":"你好"}',
        'data: {"a":',
        "data: 1,",
        'data: "b":2}',
        "data: [DONE]",
        "",
        "",
        "",
    ]
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"])), max_size=20),
    st.lists(st.integers(0, 400), max_size=6),
    st.booleans(),
)
def test_events_are_those_of_the_standard_however_they_are_cut(lines, cuts, bom):
    text = ("\ufeff" if bom else "") + "".join(map("".join, lines)) + "\n\n"
    expected = []
    for data in standard(text):
        value = DONE if data == "[DONE]" else None
        try:
            value = value or json.loads(data)
        except ValueError:
            value = {"error": {}} if data.strip() else None
        expected += [value] if value else []
    reader, body, read = EventReader(), text.encode(), []
    ends = [*sorted({min(cut, len(body)) for cut in cuts}), len(body)]
    for start, end in zip([0, *ends], ends, strict=False):
        read += reader.feed(body[start:end])
    told = [{"error": {}} if "error" in event else event for event in read]
    broken = any("error" in event for event in [*told, *expected])
    assert told == expected or broken and seen(told) >= seen(expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=3), min_size=1),
        max_size=4,
    ),
    st.lists(st.integers(0, 400), max_size=6),
    st.randoms(use_true_random=False),
)
def test_an_event_of_several_lines_is_one_event(values, cuts, random):
    text = ""
    for value in values:
        for line in json.dumps(value, indent=1).split("\n"):
            text += f"data: {line}" + random.choice(["\n", "\r\n", "\r"])
        text += random.choice(["\n", "\r\n", ": comment\n\n"])
    body, reader, read = text.encode(), EventReader(), []
    ends = [*sorted({min(cut, len(body)) for cut in cuts}), len(body)]
    for start, end in zip([0, *ends], ends, strict=False):
        read += reader.feed(body[start:end])
    assert [*read, *reader.feed(b"\n\n")] == values


def seen(events):
    """Return what can be read of events some of which are broken."""
    return len([event for event in events if "error" not in event])


INDENTED = json.dumps(delta(ANSWER), indent=1).split("\n")


@pytest.mark.parametrize(
    "body",
    [
        sse(delta(ANSWER, "stop")).replace(b"\n", b"\r"),
        sse(delta(ANSWER)).replace(b"[DONE]", b"[done]"),
        sse(delta(ANSWER)).replace(b"data: {", b"data: data: {"),
        sse(delta(ANSWER), end="data: [DONE]"),
        sse(delta(ANSWER, "stop"), end="").replace(b"\n\n", b"\n"),
        sse(delta(ANSWER, "null"), delta("", "stop")),
        ("\ufeff" + ai_json(delta(ANSWER, "stop"))).encode(),
        sse(*(f"data: {line}\n" for line in INDENTED), "id: 1\n\n"),
        sse({**delta(ANSWER), "error": {}}),
        sse({**delta(ANSWER), "error": {"code": 0, "message": ""}}),
    ],
)
def test_what_services_make_of_the_standard_is_read(body):
    for interval in (0, 1e-9):
        assert ai_texts(body, interval=interval)[-1] == ANSWER


def test_text_after_a_finish_reason_belongs_to_the_answer():
    events = [delta(each, "stop") for each in ANSWER]
    assert ai_answer([sse(event, end="") for event in events]) == ANSWER


@pytest.mark.parametrize(
    ("finish", "kind"),
    [
        ("MAX_TOKENS", "length"),
        ("max_output_tokens", "length"),
        ("SAFETY", "filter"),
        ("PROHIBITED_CONTENT", "filter"),
        ("insufficient_system_resource", "busy"),
        ("abort", "busy"),
    ],
)
def test_a_finish_reason_means_what_it_says(finish, kind):
    error, _ = ai_failure(sse(delta(ANSWER, finish)))
    assert error.kind == kind
    assert kind == "length" or finish in str(error)


@pytest.mark.parametrize("finish", [None, "null", ""])
def test_an_answer_without_any_finish_reason_is_cut(finish):
    error, tries = ai_failure(sse(delta(ANSWER, finish), end=""), interval=0)
    assert (error.kind, tries) == ("busy", 3)


@pytest.mark.parametrize("finish", ["stop", "eos", "end_turn", "COMPLETE"])
def test_any_other_finish_reason_is_a_stop(finish):
    assert ai_answer(sse(delta(ANSWER, finish), end="")) == ANSWER


def test_a_part_of_the_answer_is_shown_when_no_try_brings_more():
    cut = sse(delta("half of"), end="")
    provider, tries = ai_service(cut)
    texts = provider.chat([{"role": "user", "content": "x"}], CancelScope(9))
    assert next(texts) == "half of"
    assert len(tries) == 3
    with pytest.raises(Exception, match="without a finish_reason"):
        next(texts)


@pytest.mark.parametrize(
    "body", [b"You said: my pin is 4711", b"", b"Bad gateway, try again"]
)
def test_a_plain_text_is_no_answer_and_is_asked_for_once(body):
    provider, tries = ai_service(body, headers={"Content-Type": "text/plain"})
    question = [{"role": "user", "content": "My PIN is 4711"}]
    with pytest.raises(Exception) as caught:
        list(provider.chat(question, CancelScope(9)))
    assert "4711" not in str(caught.value)
    if body:
        assert len(tries) == 1
        assert "not JSON (Content-Type text/plain)" in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["| a |", "| a | b |", "| a | b | c |"], "| a | b | c |"),
        (["ha", "haha", "hahaha"], "hahahahahaha"),
        (["| a |", "| a | b |"], "| a || a | b |"),
        (["12345678", "12345678", "1234567812345678"], "12345678" * 4),
    ],
)
def test_pieces_that_each_repeat_all_before_them_replace_it(parts, text):
    assert joined(parts) == text


ERRORS = {
    '{"success": false, "data": {"code": "RateLimited", "msg": "no"}}': "busy",
    '{"error": "{\\"error\\": {\\"message\\": \\"Insufficient Balance\\"}}"}': "quota",
    '{"error": {"message": "no", "metadata": {"raw": "context length"}}}': "long",
    '{"choices": [{"error": {"code": 502, "message": "no"}}]}': "busy",
    '{"detail": [{"loc": ["body"], "msg": "field required"}]}': "setup",
    '{"detail": "余额不足"}': "quota",
    '{"errors": [{"message": "请求频率过高"}]}': "busy",
    '{"error": {"innererror": 1, "message": "内容包含敏感信息"}}': "filter",
    '{"code": 500, "msg": "no"}': "busy",
    '{"message": "no", "code": "429"}': "busy",
    '{"error": {"message": "Your API key is invalid"}}': "setup",
    '{"error": {"message": "this is a case-sensitive name"}}': "setup",
    '{"base_resp": {"status_code": 1008, "status_msg": "余额不足"}}': "quota",
}


@pytest.mark.parametrize(("body", "kind"), ERRORS.items())
def test_an_error_is_found_wherever_it_stands(body, kind):
    error, _ = ai_failure(body.encode(), timing=FAST)
    assert error.kind == kind


def test_bytes_that_arrived_are_read_before_the_failure_of_a_later_read():
    def read1(*_, **__):
        if body:
            return body.pop()
        raise OSError("reset")

    body = [sse(delta(ANSWER, "stop"), end="")]
    provider, tries = ai_service(b"")
    post = provider.session.post

    def broken(*given):
        response = post(*given)
        response.enter_result.raw = SimpleNamespace(read1=read1, closed=False)
        return response

    provider.session.post = broken
    texts = [*provider.chat([{"role": "user", "content": "x"}], CancelScope(9))]
    assert (texts, len(tries)) == ([ANSWER], 1)


HOSTILE = {
    "lines of an event without end": b"data: }\n" * 100_000,
    "data: data:": b"data:" * 200_000 + b"\n\n",
    "brackets": ai_json(delta("[" * 10**5 + "](data:image/", "stop")).encode(),
    "angles": ai_json({"error": "<html>" + "<" * 10**5}).encode(),
    "many messages": ai_json({"error": [{"message": "x" * 10, "detail": "y"}] * 9})
    .replace("y", "z" * 10**6)
    .encode(),
    "nested": b'{"error":' * 10_000,
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_service_takes_no_cpu(body):
    provider, _ = ai_service(body)
    began = time.process_time()
    try:
        list(provider.chat([{"role": "user", "content": "x" * 9999}], CancelScope(9)))
    except ProviderError as error:
        assert len(str(error)) < 600
    assert time.process_time() - began < 1.5
