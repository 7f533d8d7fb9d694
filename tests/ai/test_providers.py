"""AI services: what they are asked, and how their answers and errors are read."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from email.utils import formatdate
from types import SimpleNamespace

import jwt
import pytest
import responses
from conftest import (
    AI_KEY,
    ANSWER,
    BASE,
    QUESTION,
    RECORDED,
    A,
    B,
    ai_json,
    delta,
    json_values,
    message,
    sse,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from requests.structures import CaseInsensitiveDict

import providers
from imbot.ai import errors, thinking
from imbot.ai.errors import ProviderError
from imbot.ai.provider import Provider
from imbot.http import CancelScope
from imbot.timing import Timing
from providers import PROVIDERS

OFTEN = 1e-9  # seconds between two updates: an update for each piece that comes


FAST = Timing(backoff=0.0)


def ai_service(
    *bodies, name="openai", status=200, key=AI_KEY, headers=None, timing=FAST, **fields
):
    """Return a Provider whose service answers the tries with `bodies`, and the tries.

    A body is bytes, or a list of the pieces in which they arrive. All fields of a
    request are the operator's, so none is left out after a refusal.
    """
    tries, service = [], PROVIDERS[name]
    fields.setdefault("extra", {service.cap: 8192} | service.extra)

    def post(url, *given):
        body = bodies[min(len(tries), len(bodies) - 1)]
        tries.append(given)
        pieces = iter([body] if isinstance(body, bytes) else body)
        raw = SimpleNamespace(read1=lambda *_, **__: next(pieces, b""), closed=False)
        head = CaseInsensitiveDict(headers or {})
        return nullcontext(SimpleNamespace(status_code=status, headers=head, raw=raw))

    session = SimpleNamespace(post=post)
    return Provider(service, key, session=session, timing=timing, **fields), tries


def ai_texts(*bodies, seconds=20.0, interval=OFTEN, **options):
    """Return every text so far that a chat yields."""
    provider, _ = ai_service(*bodies, **options)
    return list(provider.chat(QUESTION, CancelScope(seconds), interval))


def ai_answer(*bodies, **options):
    return ai_texts(*bodies, **options)[-1]


def ai_failure(*bodies, seconds=20.0, interval=OFTEN, **options):
    """Return the error of a chat and how often the service was asked."""
    provider, tries = ai_service(*bodies, **options)
    with pytest.raises(ProviderError) as caught:
        list(provider.chat(QUESTION, CancelScope(seconds), interval))
    return caught.value, len(tries)


def answer_of(provider, turns=QUESTION):
    """Return the whole answer, asked for in one piece."""
    [text] = provider.chat(turns, CancelScope(20))
    return text


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_a_recorded_answer_is_read_wherever_its_bytes_are_split(recorded):
    for place in range(len(recorded) + 1):
        pieces = [part for part in (recorded[:place], recorded[place:]) if part]
        assert ai_answer(pieces) == ANSWER, place
        assert ai_texts(pieces, interval=0) == [ANSWER], place
    assert ai_answer([recorded[i : i + 1] for i in range(len(recorded))]) == ANSWER


OFF = {"thinking": {"type": "disabled"}}
ASKED = {
    "minimax": ("https://api.minimaxi.com/v1", "MiniMax-M3", OFF),
    "zhipu": ("https://open.bigmodel.cn/api/paas/v4", "glm-4.7-flash", OFF),
    "deepseek": ("https://api.deepseek.com", "deepseek-flash", OFF),
    "qwen": (
        "https://dashscope.aliyuncs.com/compatible-mode/v1",
        "qwen3.8-flash",
        {"enable_thinking": False},
    ),
    "tokenhub": ("https://tokenhub.tencentmaas.com/v1", "hy3", OFF),
    "moonshot": ("https://api.moonshot.cn/v1", "kimi-k2.6", OFF),
    "ark": (
        "https://ark.cn-beijing.volces.com/api/v3",
        "doubao-seed-2-1-lite-260915",
        OFF,
    ),
    "siliconflow": (
        "https://api.siliconflow.cn/v1",
        "deepseek-ai/DeepSeek-V4-Flash",
        {"enable_thinking": False},
    ),
    "openai": ("https://api.openai.com/v1", "gpt-6-luna", {"reasoning_effort": "none"}),
    "openrouter": (
        "https://openrouter.ai/api/v1",
        "minimax/minimax-m3",
        {"reasoning": {"enabled": False}},
    ),
    "ollama": ("http://localhost:11434/v1", "qwen3", {"reasoning_effort": "none"}),
}


@responses.activate
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_each_service_gets_the_request_it_expects(name, stream):
    url, model, extra = ASKED[name]
    cap = "max_completion_tokens" if name in ("minimax", "openai") else "max_tokens"
    mock = responses.post(f"{url}/chat/completions", body=RECORDED["openai"])
    key = "" if name == "ollama" else AI_KEY
    turns = [{"role": "system", "content": "Be brief."}, *QUESTION]
    provider = Provider(PROVIDERS[name], key)
    texts = list(provider.chat(turns, CancelScope(20), 1.0 if stream else 0.0))
    assert texts[-1] == ANSWER
    request = mock.calls[0].request
    assert json.loads(request.body) == {
        "model": model,
        "messages": turns,
        "stream": stream,
        cap: 8192,
        **extra,
    }
    assert "你好".encode() in request.body
    assert request.headers.get("Authorization") == (f"Bearer {key}" if key else None)
    assert request.headers["Content-Type"] == "application/json"


def test_the_registry_names_every_service():
    ours = {*ASKED, "minimax-completion", "openai-compatible", "echo"}
    assert ours <= set(PROVIDERS)  # and those that a fork adds
    keyless = {name for name in ours if PROVIDERS[name].keyless}
    assert keyless == {"ollama", "openai-compatible", "echo"}


@responses.activate
def test_address_model_and_extras_of_the_operator_come_last():
    mock = responses.post("http://here/api/chat/completions", body=RECORDED["openai"])
    extra = {"temperature": 0.5, "thinking": None, "max_completion_tokens": 10}
    provider = Provider(PROVIDERS["minimax"], AI_KEY, "http://here/api/", "M9", extra)
    assert answer_of(provider, QUESTION) == ANSWER
    assert json.loads(mock.calls[0].request.body) == {
        "model": "M9",
        "messages": QUESTION,
        "stream": False,
        "max_completion_tokens": 10,
        "temperature": 0.5,
    }


@responses.activate
def test_the_neutral_preset_sends_no_field_of_any_vendor():
    mock = responses.post("http://here/v1/chat/completions", body=RECORDED["openai"])
    for model in ("", "m"):
        provider = Provider(PROVIDERS["openai-compatible"], "", "http://here/v1", model)
        assert answer_of(provider) == ANSWER
        asked = {"messages": QUESTION, "stream": False, "max_tokens": 8192}
        asked |= {"model": model} if model else {}
        assert json.loads(mock.calls[-1].request.body) == asked


@pytest.mark.parametrize("pasted", ["Bearer sk-1", " sk-1\n", "Bearer  sk-1 "])
@responses.activate
def test_a_key_is_sent_as_one_bearer_however_it_was_pasted(pasted):
    mock = responses.post("http://here/chat/completions", body=RECORDED["openai"])
    answer_of(Provider(PROVIDERS["openai"], pasted, "http://here"), QUESTION)
    assert mock.calls[0].request.headers["Authorization"] == "Bearer sk-1"


@responses.activate
def test_empty_turns_are_not_sent_and_lone_surrogates_are_cleaned():
    mock = responses.post("http://here/chat/completions", body=RECORDED["openai"])
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a\ud83db"},
        {"role": "assistant", "content": " \n"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": picture},
    ]
    provider = Provider(PROVIDERS["openai"], AI_KEY, "http://here")
    answer_of(provider, turns)
    said = {"type": "text", "text": "a?b"}
    assert json.loads(mock.calls[0].request.body)["messages"] == [
        {"role": "user", "content": [said, *picture]},
    ]


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_question_without_any_text_is_not_sent(name):
    provider, tries = ai_service(b"", name=name)
    with pytest.raises(ProviderError) as caught:
        list(provider.chat([{"role": "user", "content": " "}], CancelScope(20)))
    assert (caught.value.kind, tries) == ("empty", [])


def old_key(**claims):
    """Return a key as MiniMax once gave out: a JWT; nothing in it is secret."""
    parts = [{"alg": "RS256", "typ": "JWT"}, claims]
    encoded = [base64.urlsafe_b64encode(ai_json(part).encode()) for part in parts]
    return b".".join([*encoded, b"AAAA"]).decode().replace("=", "")


@pytest.mark.parametrize(
    ("key", "query"),
    [
        (
            old_key(GroupID="1780000000000000001", iss="minimax"),
            "?GroupId=1780000000000000001",
        ),
        (old_key(group_id=178), "?GroupId=178"),
        (old_key(iss="minimax"), ""),
        ("sk-api-new", ""),
        ("a.b.c", ""),
    ],
)
@responses.activate
def test_the_tutorials_endpoint_gets_a_prompt_and_the_group_of_the_key(key, query):
    url = "https://api.minimax.chat/v1/text/completion"
    body = ai_json({"reply": "你好！", **BASE})
    mock = responses.post(url, body=body, content_type="application/json")
    provider = Provider(PROVIDERS["minimax-completion"], key)
    assert list(provider.chat(QUESTION, CancelScope(20))) == ["你好！"]
    request = mock.calls[0].request
    assert request.url == url + query
    assert request.headers["Authorization"] == f"Bearer {key}"
    assert json.loads(request.body) == {
        "model": "abab5-completion",
        "prompt": "你好",
        "tokens_to_generate": 8192,
    }


PICTURE = {"type": "image_url", "image_url": {"url": "https://a/b.png"}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is this?"}, PICTURE]},
]


@responses.activate
def test_the_tutorials_endpoint_gets_a_whole_talk_as_one_prompt():
    url = "https://api.minimax.chat/v1/text/completion"
    mock = responses.post(url, json={"reply": "A tree."})
    provider = Provider(PROVIDERS["minimax-completion"], "sk-api-new")
    assert answer_of(provider, TALK) == "A tree."
    prompt = json.loads(mock.calls[0].request.body)["prompt"]
    assert prompt == "system: Be brief.\nuser: What is this?\nassistant:"


def test_echo_says_the_users_words_as_they_are():
    provider, tries = ai_service(b"", name="echo", key="")
    assert list(provider.chat(TALK, CancelScope(20))) == ["What is this?"]
    said = "<think>a</think>\nb</think>c"
    turns = [{"role": "user", "content": said}]
    assert answer_of(provider, turns) == said
    assert not tries


@responses.activate
def test_zhipu_gets_a_fresh_token_in_milliseconds_for_every_try():
    error = {"error": {"code": "1003", "message": "expired"}}
    url = "https://open.bigmodel.cn/api/paas/v4/chat/completions"
    first = responses.post(url, status=401, json=error)
    second = responses.post(url, body=RECORDED["zhipu"])
    minted = []

    def mint(key):
        minted.append(providers.zhipu_token(key))
        return minted[-1]

    service = replace(PROVIDERS["zhipu"], token=mint)
    provider = Provider(service, "an-id.a-short-secret")
    assert answer_of(provider, QUESTION) == ANSWER
    tokens = [
        mock.calls[0].request.headers["Authorization"].removeprefix("Bearer ")
        for mock in (first, second)
    ]
    assert tokens == minted
    assert PROVIDERS["zhipu"].token is providers.zhipu_token
    header = json.loads(base64.urlsafe_b64decode(tokens[1].split(".")[0] + "=="))
    assert header == {"alg": "HS256", "sign_type": "SIGN", "typ": "JWT"}
    # The millisecond `exp` is no time PyJWT could check.
    secret = b"a-short-secret".ljust(32, b"\0")
    unchecked = {"verify_exp": False}
    claims = jwt.decode(tokens[1], secret, ["HS256"], options=unchecked)
    assert claims.keys() == {"api_key", "exp", "timestamp"}
    assert claims["api_key"] == "an-id"
    assert claims["exp"] - claims["timestamp"] == 300_000
    assert abs(claims["timestamp"] - time.time() * 1000) < 60_000


def test_a_zhipu_token_is_what_hmac_makes_of_the_short_secret():
    signed, _, signature = providers.zhipu_token("id.secret").rpartition(".")
    mac = hmac.new(b"secret", signed.encode(), hashlib.sha256).digest()
    assert base64.urlsafe_b64decode(signature + "=") == mac
    assert providers.zhipu_token("sk-without-a-dot") == "sk-without-a-dot"


RETRIES = {"busy": 3, "once": 2}  # tries in all; any other kind is asked once


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (1002, "busy"),
        (1033, "busy"),
        (1039, "once"),
        (1027, "filter"),
        (1008, "quota"),
        (2056, "quota"),
        (1004, "setup"),
        (2013, "setup"),
        (9999, "setup"),
    ],
)
@pytest.mark.parametrize("name", ["minimax", "minimax-completion"])
def test_a_code_of_minimax_decides_about_another_try(name, code, kind):
    base = {"base_resp": {"status_code": code, "status_msg": "something"}}
    body = ai_json({"choices": None, **base}).encode()
    error, tries = ai_failure(body, name=name)
    assert (error.kind, tries) == (kind, RETRIES.get(kind, 1))
    streamed, _ = ai_failure(sse(delta("hm"), {"choices": None, **base}), name=name)
    assert streamed.kind == kind
    text = f"something ({code})"
    inner = {"type": "error", "error": {"type": "api_error", "message": text}}
    refused, tries = ai_failure(ai_json(inner).encode(), name=name, status=429)
    kind = "busy" if code == 9999 else kind  # nobody knows it: the status decides
    assert (refused.kind, tries) == (kind, RETRIES.get(kind, 1))


@pytest.mark.parametrize(
    ("status", "name", "code", "kind"),
    [
        (400, "bad_request_error", 2013, "setup"),
        (401, "authorized_error", 1004, "setup"),
        (401, "authorized_error", 2049, "setup"),
        (402, "insufficient_balance_error", 1008, "quota"),
        (422, "unprocessable_entity_error", 1026, "filter"),
        (429, "rate_limit_error", 1002, "busy"),
        (429, "rate_limit_error", 2045, "busy"),
        (429, "rate_limit_error", 2056, "quota"),
        (500, "api_error", 1000, "busy"),
        (500, "api_error", 1013, "busy"),
        (500, "api_error", 1033, "busy"),
        (500, "api_error", 1026, "filter"),
        (529, "overloaded_error", None, "busy"),
    ],
)
def test_an_http_error_of_minimax_is_read(status, name, code, kind):
    text = f"no luck ({code})" if code else "no luck"
    inner = {"type": name, "message": text, "http_code": str(status)}
    body = {"type": "error", "error": inner, "request_id": "r1"}
    data = ai_json(body).encode()
    error, tries = ai_failure(data, name="minimax", status=status)
    assert (error.kind, tries) == (kind, RETRIES.get(kind, 1))
    assert error.details.startswith(f"HTTP {status}, code {code or name}, trace ")
    assert "r1" in str(error)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (200, 1302, "busy"),
        (429, 1305, "busy"),
        (500, 1234, "busy"),
        (500, 500, "busy"),
        (401, 1003, "once"),
        (500, 1230, "once"),
        (400, 1301, "filter"),
        (429, 1113, "quota"),
        (429, 1304, "quota"),
        (500, 1261, "long"),
        (429, 1211, "setup"),
        (500, 1214, "setup"),
    ],
)
def test_a_code_of_zhipu_decides_whatever_the_status(status, code, kind):
    body = ai_json({"error": {"code": str(code), "message": "错误"}}).encode()
    error, tries = ai_failure(body, name="zhipu", status=status, key="id.secret")
    assert (error.kind, tries) == (kind, RETRIES.get(kind, 1))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, "busy") for status in (408, 409, 429, 500, 503, 529)),
        *((status, "setup") for status in (204, 400, 401, 403, 404, 422)),
        *((status, "setup") for status in (301, 307)),
        (402, "quota"),
        (413, "long"),
        (451, "filter"),
    ],
)
def test_an_http_status_decides_where_nothing_else_is_told(status, kind):
    for body in (b"", b"no luck", b"<html>", b'{"error": "no"}', b'"no"', b"["):
        error, tries = ai_failure(body, name="minimax", status=status)
        assert (error.kind, tries) == (kind, RETRIES.get(kind, 1)), body
        assert error.details.startswith(f"HTTP {status}, ")


@pytest.mark.parametrize(
    ("name", "status", "body", "kind"),
    [
        ("openai", 429, {"error": {"code": "insufficient_quota"}}, "quota"),
        ("openai", 429, {"error": {"code": "rate_limit_exceeded"}}, "busy"),
        (
            "openai",
            400,
            {"error": {"code": "context_length_exceeded", "message": "over (8192)"}},
            "long",
        ),
        ("openai", 200, {"error": {"type": "server_error", "code": None}}, "busy"),
        ("moonshot", 429, {"error": {"type": "engine_overloaded_error"}}, "busy"),
        ("moonshot", 429, {"error": {"type": "rate_limit_reached_error"}}, "busy"),
        ("moonshot", 429, {"error": {"type": "exceeded_current_quota_error"}}, "quota"),
        ("moonshot", 400, {"error": {"type": "content_filter"}}, "filter"),
        ("moonshot", 401, {"error": {"type": "invalid_authentication_error"}}, "setup"),
        ("qwen", 400, {"error": {"code": "Arrearage"}}, "quota"),
        ("qwen", 401, {"error": {"code": "InvalidApiKey"}}, "setup"),
        ("qwen", 403, {"error": {"code": "AccessDenied.Unpurchased"}}, "quota"),
        ("qwen", 408, {"error": {"code": "RequestTimeOut"}}, "once"),
        ("qwen", 429, {"error": {"code": "Throttling.RateQuota"}}, "busy"),
        ("qwen", 429, {"error": {"code": "Throttling.AllocationQuota"}}, "quota"),
        ("qwen", 400, {"code": "DataInspectionFailed", "message": "no"}, "filter"),
        ("siliconflow", 400, {"code": 20012, "message": "no", "data": None}, "setup"),
        ("siliconflow", 200, {"code": 20012, "message": "no", "data": None}, "setup"),
        ("siliconflow", 403, "no balance", "quota"),
        ("siliconflow", 503, "busy", "busy"),
        ("ark", 403, {"error": {"code": "AccountOverdueError"}}, "quota"),
        ("ark", 404, {"error": {"code": "ModelNotOpen"}}, "setup"),
        (
            "ark",
            400,
            {"error": {"code": "InputTextSensitiveContentDetected"}},
            "filter",
        ),
        ("ark", 429, {"error": {"code": "RateLimitExceeded.EndpointRPM"}}, "busy"),
        ("ark", 429, {"error": {"code": "ServerOverloaded"}}, "busy"),
        ("ark", 429, {"error": {"code": "QuotaExceeded"}}, "quota"),
        ("ark", 429, {"error": {"code": "SetLimitExceeded"}}, "quota"),
        ("openrouter", 402, {"error": {"code": 402, "message": "credits"}}, "quota"),
        ("openrouter", 200, {"error": {"code": 502, "message": "no"}}, "busy"),
        ("openrouter", 200, {"error": {"code": 403, "message": "no"}}, "setup"),
        ("tokenhub", 200, {"error": {"code": 429001, "message": "no"}}, "busy"),
        ("tokenhub", 200, {"error": {"code": 401002, "message": "no"}}, "setup"),
        ("tokenhub", 451, {"error": {"code": 451001, "message": "no"}}, "filter"),
        ("tokenhub", 502, {"error": {"code": 502001, "message": "no"}}, "busy"),
        ("ollama", 404, {"error": "model not found"}, "setup"),
        ("ollama", 200, {"error": "this is a string"}, "setup"),
        ("openai", 200, "<html>not an API</html>", "setup"),
    ],
)
def test_the_errors_of_other_services_are_read(name, status, body, kind):
    data = (body if isinstance(body, str) else ai_json(body)).encode()
    error, tries = ai_failure(data, name=name, status=status)
    assert (error.kind, tries) == (kind, RETRIES.get(kind, 1))


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"error": {"code": 502}, "choices": [{"finish_reason": "error"}]}, "busy"),
        ({"error": {"message": "down", "type": "server_error"}}, "busy"),
        ({"error": "a string"}, "setup"),
        ({"choices": None, "base_resp": {"status_code": 1027}}, "filter"),
        ({"code": "DataInspectionFailed", "message": "no"}, "filter"),
        (delta(finish="sensitive"), "filter"),
        (delta("", "content_filter"), "filter"),
        (delta(finish="network_error"), "busy"),
        (delta(finish="error"), "busy"),
        (delta(finish="model_context_window_exceeded"), "long"),
        ("data: {half\n\n", "busy"),
        ('data: "text"\n\n', "setup"),
        ("", "busy"),
    ],
)
def test_an_error_in_mid_stream_is_raised_after_the_text_before_it(event, kind):
    provider, tries = ai_service(sse(delta("一二三"), event, end=""), name="minimax")
    texts = []
    with pytest.raises(ProviderError) as caught:
        for text in provider.chat(QUESTION, CancelScope(20), 99.0):
            texts.append(text)
    assert (texts, caught.value.kind, len(tries)) == (["一二三"], kind, 1)


def test_a_cut_answer_is_asked_for_again_unless_some_of_it_was_shown():
    cut, good = sse(delta("一"), end=""), RECORDED["openai"]
    assert ai_answer(cut, cut, good, interval=0) == ANSWER
    error, tries = ai_failure(cut, interval=0)
    assert (error.kind, tries) == ("busy", 3)
    error, tries = ai_failure(cut, good)
    assert (error.kind, tries) == ("busy", 1)
    plain = RECORDED["plain JSON"]
    assert ai_answer(plain[:-9], plain) == ANSWER


def test_every_recorded_answer_is_an_error_when_cut_before_its_end():
    recorded = RECORDED["openai"]
    end = recorded.index(b'"finish_reason": "stop"') + len(
        b'"finish_reason": "stop"}]}'
    )
    for place in range(end):
        error, _ = ai_failure(recorded[:place], interval=0)
        assert error.kind == "busy", place
    assert ai_answer(recorded[:end]) == ANSWER


@pytest.mark.parametrize(
    "body",
    [
        sse(),
        sse(delta("", "stop")),
        sse(delta("<think>only this", "length")),
        sse(delta("only this\n</think>\n"), delta(None, "stop")),
        sse(delta(tool_calls=[]), delta(None, "tool_calls")),
        ai_json(message(None)).encode(),
        ai_json(message("  ")).encode(),
        ai_json({"choices": [], "base_resp": {"status_code": "0"}}).encode(),
        ai_json({"choices": None}).encode(),
        ai_json({"reply": "", **BASE}).encode(),
    ],
)
def test_an_answer_without_text_is_an_error_that_is_not_tried_again(body):
    for interval in (0, OFTEN):
        error, tries = ai_failure(body, interval=interval)
        assert (error.kind, tries) == ("empty", 1)


@settings(deadline=None, max_examples=150)
@given(
    json_values(
        "choices delta message content finish_reason error code type base_resp "
        "status_code reply"
    ),
    st.sampled_from([200, 400, 429]),
)
def test_nothing_a_service_sends_raises_anything_but_a_provider_error(value, status):
    provider, _ = ai_service(ai_json(value).encode(), status=status, name="minimax")
    with suppress(ProviderError):
        for _ in provider.chat(QUESTION, CancelScope(0.1)):
            pass


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "7"}, 7),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after-ms": "1500", "Retry-After": "9"}, 1.5),
        ({"retry-after-ms": "soon", "Retry-After": "9"}, 9),
        ({"Retry-After": "Wed, 21 Oct 99999 07:28:00 GMT"}, None),
        *(
            ({"Retry-After": text}, None)
            for text in ("0", "-3", "nan", "inf", "-inf", "later", "", "1e999", "一")
        ),
        ({}, None),
    ],
)
def test_retry_after_is_understood_in_every_spelling(headers, wait):
    read = errors.retry_after(CaseInsensitiveDict(headers))
    assert read == (wait if wait is None else pytest.approx(wait, abs=0.001))


@pytest.mark.parametrize(("seconds", "wait"), [(3600, 3600), (-3600, None)])
def test_retry_after_may_be_a_date(seconds, wait):
    date = formatdate(time.time() + seconds, usegmt=True)
    read = errors.retry_after(CaseInsensitiveDict({"Retry-After": date}))
    assert read == (wait and pytest.approx(wait, abs=60))


@pytest.mark.parametrize(
    ("wait", "seconds", "tries"), [("0.02", 20, 3), ("61", 90, 1), ("5", 3, 1)]
)
def test_a_wait_that_is_too_long_is_not_begun(wait, seconds, tries):
    began = time.monotonic()
    error, asked = ai_failure(
        b"", status=429, headers={"Retry-After": wait}, seconds=seconds
    )
    assert (error.kind, asked, error.wait) == ("busy", tries, float(wait))
    assert time.monotonic() - began < 1


def test_the_pauses_between_tries_grow_and_vary():
    began = time.monotonic()
    ai_failure(b"", status=503, timing=Timing(backoff=0.1))
    assert (0.1 + 0.2) * 0.75 <= time.monotonic() - began < 2


THINKING = {
    "<think>a</think>b": "b",
    "<think>\n想\n</think>\n\n答": "答",
    "\n <mm:think>a\nb</mm:think> \n答": "答",
    "<think></think>答": "答",
    "<think>a</think><think>b</think>\n答": "答",
    "<think>a <think> b</think>答": "答",
    "</think>\n\n答": "答",
    "想一想\n</think>\n\n答": "答",
    "想一想。</think>答": "答",
    "let me see</think>hello": "hello",
    "想 </think>\n答": "答",
    "a\n</think>\nb </mm:think>\nc": "c",
    "用 `</think>` 想\n</think>\n答": "答",
    "The <think> tag.": "The <think> tag.",
    "用 `<think>` 和 `</think>`": "用 `<think>` 和 `</think>`",
    "the tag </think> closes it": "the tag </think> closes it",
    "Like this:\n<think>\na\n</think>\nb": "Like this:\n<think>\na\n</think>\nb",
    "“</think>”是结束": "“</think>”是结束",
    "a < b <thi <thinking> </thin": "a < b <thi <thinking> </thin",
    "<thinking> is no tag": "<thinking> is no tag",
    "<thinking>a</thinking>\nb": "b",
    "<thought>\n想\n</thought>\n\n答": "答",
    "想\n</thinking>\n答": "答",
    "[THINK]想[/THINK]答": "答",
    "想[/THINK]答": "答",
    "The `[THINK]` tag and `[/THINK]`": "The `[THINK]` tag and `[/THINK]`",
    "<|channel|>analysis<|message|>想<|end|><|channel|>final<|message|>答": "答",
    "想<|end|><|start|>assistant<|channel|>final<|message|>答<|return|>": "答",
    "<details><summary>Thinking...</summary>想</details>\n答": "答",
    "<details><summary>More</summary>a": "<details><summary>More</summary>a",
    "<th": "<th",
    "a<": "a<",
}


@pytest.mark.parametrize(("text", "answer"), THINKING.items())
def test_thinking_is_taken_out_wherever_the_text_is_split(text, answer):
    assert thinking.visible(text) == answer
    for place in range(len(text)):
        for parts in ((text[:place], text[place:]), (text[:place], *text[place:])):
            pieces = [sse(delta(part), end="") for part in parts if part]
            assert ai_answer([*pieces, sse()]) == answer, parts
    for interval in (0, OFTEN):
        whole = ai_json(message(text)).encode()
        assert ai_texts(whole, interval=interval) == [answer]


@pytest.mark.parametrize(
    "text",
    [
        "<think>想",
        "<thinking>\n想",
        "[THINK]想",
        "<|channel|>analysis<|message|>想",
        "<details><summary>Thinking...</summary>想",
    ],
)
def test_thinking_that_was_cut_is_no_answer(text):
    assert thinking.visible(text) == thinking.visible(text, final=False) == ""
    error, _ = ai_failure(sse(delta(text, "length")))
    assert error.kind == "empty" and "all of it is thinking" in str(error)


@pytest.mark.parametrize("text", [*THINKING, *THINKING.values(), "a😀b"])
def test_a_text_so_far_shows_no_half_of_a_tag_or_an_emoji(text):
    halves = [half for c in text for half in c.encode("utf-16-be", "surrogatepass")]
    units = bytes(halves).decode("utf-16-be", "surrogatepass")
    assert units == text
    for place in range(len(text) + 1):
        shown = thinking.visible(text[:place], final=False)
        assert not shown or shown[-1] not in "<\ufffd"
        assert not re.search(r"<(/?(mm:)?(t|th|thi|thin|think)?)?\Z", shown)


def test_thinking_without_an_opening_is_replaced_in_a_stream_and_absent_in_a_whole():
    events = [delta("I think"), delta(" so.\n</think>\n"), delta("\n答")]
    pieces = [sse(event, end="") for event in [*events, delta("案", "stop")]]
    assert ai_texts(pieces) == ["I think", "I think so.\n", "答", "答案"]
    assert ai_texts(pieces, interval=0) == ["答案"]


@pytest.mark.parametrize(
    "contents",
    [
        ["你", "好", "吗"],
        ["哈"] * 2400,
        ["哈", "哈哈", "！"],
        ["1", "10", "0"],
        ["--------", "----------------", "\nTitle\n", "important body", " end."],
        ["12345678", "12345678", "9"],
    ],
)
@pytest.mark.parametrize("name", ["minimax", "openai-compatible"])
def test_pieces_are_never_taken_for_repetitions(name, contents):
    body = sse(*map(delta, contents), delta(finish="stop"))
    assert ai_texts(body, name=name, interval=0) == ["".join(contents)]
    events = [sse(delta(content), end="") for content in contents]
    so_far = ["".join(contents[:end]) for end in range(1, len(contents) + 1)]
    assert ai_texts([*events, sse()], name=name) == so_far


def test_a_last_event_with_the_full_text_takes_the_place_of_what_came():
    full = {**message(ANSWER, None), "object": "chat.completion"}
    for pieces in ([A, B], [A, "x"], []):
        events = [*map(delta, pieces), full]
        assert ai_answer(sse(*events)) == ANSWER
    assert ai_answer(sse(delta(A), delta(B), message("", "stop"))) == ANSWER


@pytest.mark.parametrize("field", ["message", "delta"])
@pytest.mark.parametrize(
    "said",
    [
        {"content": [{"type": "text", "text": A}, {"type": "text", "text": B}]},
        {"content": [{"type": "thinking", "thinking": [{"text": "hm"}]}, A, B]},
        {"content": None, "refusal": ANSWER},
        {"content": "", "refusal": ANSWER, "tool_calls": []},
    ],
)
def test_a_list_of_parts_is_joined_and_a_refusal_is_the_answer(field, said):
    choice = {field: {"role": "assistant", **said}, "finish_reason": "stop"}
    for body in (ai_json({"choices": [choice]}).encode(), sse({"choices": [choice]})):
        for interval in (0, OFTEN):
            assert ai_texts(body, interval=interval) == [ANSWER]


@pytest.mark.parametrize("body", [sse(delta(A), delta(B, "length")), None])
@pytest.mark.parametrize("interval", [0, OFTEN])
def test_an_answer_that_was_cut_by_its_limit_says_so_after_its_text(body, interval):
    body = body or ai_json(message(ANSWER, "length")).encode()
    provider, tries = ai_service(body)
    texts = provider.chat(QUESTION, CancelScope(20), interval)
    assert next(texts) == ANSWER
    with pytest.raises(ProviderError) as caught:
        next(texts)
    assert (caught.value.kind, len(tries)) == ("length", 1)


def test_an_answer_grows_though_its_first_try_broke_off():
    broken, scope = sse({"error": {"code": 502, "message": "no"}}), CancelScope(9)
    pieces = [sse(delta("a"), end=""), sse(delta("b"))]
    provider, _ = ai_service(broken, pieces)
    texts = provider.chat(QUESTION, scope, OFTEN)
    told = [(text, scope.ended) for text in texts]
    assert told == [("a", False), ("ab", True)]


def test_one_read_makes_one_text_and_a_text_is_not_repeated():
    pieces = [
        sse(*map(delta, "abc"), end=""),
        b": keep-alive\n\n",
        sse(*map(delta, "def"), end=""),
        sse(delta(finish="stop")),
    ]
    assert ai_texts(pieces) == ["abc", "abcdef"]
    assert ai_texts(pieces, interval=99) == ["abc", "abcdef"]
    assert ai_texts([*pieces[:3], sse(delta("g"))], interval=99) == ["abc", "abcdefg"]


def test_halves_of_an_emoji_come_together_and_a_lone_one_is_replaced():
    read = thinking.visible
    assert read("a\ud83d\ude00b") == "a😀b"
    assert read("a\ud83db\ude00") == "a\ufffdb\ufffd"
    assert read("a\ud83d") == "a\ufffd"
    assert read("a\ud83d", final=False) == "a"


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    ["abcd", "我们的", "<b>x", "</p>", "a <", "</thi\n", "`</think>", "</think>"],
)
def test_a_long_answer_costs_little(part):
    body = sse(*[delta(part)] * 50_000, delta("end", finish="stop"))
    pieces = [body[i : i + 65536] for i in range(0, len(body), 65536)]
    provider, _ = ai_service(pieces)
    began = time.process_time()
    texts = list(provider.chat(QUESTION, CancelScope(60), 0.1))
    assert time.process_time() - began < 2
    said = part * 50_000 + "end"
    assert texts[-1] == ("end" if part == "</think>" else said)


def test_too_much_is_refused():
    endless = (b"data: " + b"x" * 60_000 for _ in range(10**6))
    assert ai_failure(endless)[0].kind == "setup"
    lines = (sse(delta("x" * 60_000), end="") for _ in range(10**6))
    assert ai_failure(lines, interval=0)[0].kind == "setup"


@pytest.mark.parametrize("interval", [0, OFTEN])
def test_a_text_is_not_read_beyond_two_megabytes(interval):
    read = []

    def endless():
        for _ in range(1000):
            read.append(1)
            yield sse(delta("x" * 60_000), end="")

    assert ai_failure(endless(), interval=interval)[0].kind == "setup"
    assert len(read) < 120, "what is on its way included"


@pytest.mark.parametrize("interval", [0, OFTEN])
def test_one_json_is_not_read_beyond_two_megabytes(interval):
    read = []

    def large():
        yield b'{"choices": [{"message": {"content": "'
        for _ in range(100):
            read.append(1)
            yield b"x" * 100_000
        yield b'"}, "finish_reason": "stop"}]}'

    error, tries = ai_failure(large(), interval=interval)
    assert (error.kind, tries) == ("setup", 1) and "more than" in error.details
    assert len(read) < 60, "of 100"


def test_no_part_of_an_error_repeats_what_was_said():
    said = "my card is 4929-1111"
    question = [{"role": "user", "content": said}]
    inner = {"code": said, "type": said.upper(), "message": said}
    body = {"error": inner, "id": said, "request_id": ai_json(said)}
    for place in ("Location", "x-request-id", "Trace-Id"):
        for status in (400, 302, 500):
            provider, _ = ai_service(
                ai_json(body).encode(), status=status, headers={place: said}
            )
            with pytest.raises(ProviderError) as caught:
                list(provider.chat(question, CancelScope(9)))
            assert "4929" not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize("name", ["code", "type", "id", "request_id"])
def test_a_long_name_of_an_error_leaves_room_for_its_sentence(name):
    error = {"code": "c", "type": "t", "message": "the model is away"}
    body = {"error": error | {name: "x" * 10**6}}
    body |= {name: "x" * 10**6} if name.endswith("id") else {}
    if name == "type":
        del body["error"]["code"]  # which would be told in its place
    failure, _ = ai_failure(ai_json(body).encode(), status=400)
    assert "the model is away" in str(failure) and len(str(failure)) < 400


def test_an_error_names_the_address_without_query_and_password():
    url = "http://me:secret@127.0.0.1:1/v1/chat/completions?key=secret"
    provider, _ = ai_service(b"no", status=400, url=url)
    with pytest.raises(ProviderError, match="POST http://127.0.0.1:1/v1/chat/c") as no:
        list(provider.chat(QUESTION, CancelScope(9)))
    assert "secret" not in str(no.value)


def test_an_error_is_told_in_short_and_without_the_key():
    text = f"bad key {AI_KEY}\n" + "x" * 10_000
    body = ai_json({"error": {"message": text}}).encode()
    error, _ = ai_failure(body, status=401, headers={"Trace-Id": "t-1"})
    assert AI_KEY not in str(error)
    assert "\n" not in str(error)
    assert "t-1" in str(error)
    assert 200 < len(str(error)) < 600
