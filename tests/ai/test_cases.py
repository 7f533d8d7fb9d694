"""What AI services were reported to answer, byte for byte (cases/), whole and growing.

A case that heals is refused as long as the request holds what the service does not
take; any other gets its answer every time.
"""

from __future__ import annotations

import json
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ai_json
from requests import adapters
from requests.exceptions import InvalidSchema

from botserver import PROVIDERS, REPLIES
from imbot.ai import ProviderError
from imbot.http import CancelScope
from imbot.settings import NO_PROMPT, Settings, SettingsError, misspelt
from imbot.timing import Timing

FAST = Timing(backoff=0.0, read_every=0.01, grace=0.2)
CASES = {
    file.stem: json.loads(file.read_text("utf-8"))
    for file in sorted((Path(__file__).parent / "cases").glob("*.json"))
}
HALF, TEXT = "你好，这是前半句，", "你好，这是前半句，这是后半句。"
HEALED = "Healed."
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.com/1.png"}}
SETUP, LONG, QUOTA, BUSY = "setup", "long", "quota", "busy"


@dataclass(frozen=True)
class Right:
    """What is right: the text, the kind of the error, words of the log."""

    text: str = ""
    kind: str = ""
    told: str = ""
    tries: int = 1
    takes: Any = None  # of a request: whether the service answers it


def lacks(*names):
    return lambda asked: not {*names} & {*asked}


def healed(told, takes):
    return Right(HEALED, told=told, tries=2, takes=takes)


def alternates(asked):
    roles = [turn["role"] for turn in asked["messages"]]
    return roles == ["system", *["user", "assistant"] * (len(roles) // 2 - 1), "user"]


def without_system(asked):
    return asked["messages"][0]["role"] == "user"


def without_picture(asked):
    return isinstance(asked["messages"][-1]["content"], str)


def without_files(asked):
    return not asked["files"]


RIGHT = {
    "200-success-false": Right("", QUOTA, "You have reached the daily usage limit."),
    "alternating-roles-after-say": Right(HEALED, takes=alternates),
    "answer-only-in-reasoning": Right("", "empty", "only reasoning_content held text"),
    "ark-context": Right("", LONG, "exceed max message tokens", 2),
    "ark-thinking-disabled": healed(
        'AI_EXTRA_BODY={"thinking": null}', lacks("thinking")
    ),
    "azure-query": Right(
        "", SETUP, "/openai/deployments/gpt/chat/completions: HTTP 404"
    ),
    "base64-picture": Right("[picture]"),
    "bom-sse": Right(TEXT),
    "brotli-unasked": Right("", SETUP, "Content-Encoding br"),
    "choices-empty": Right("", "empty", "`choices` is empty"),
    "cumulative-deltas": Right("| 语法 | 意思 | 例子 |"),
    "dify-file-validation": Right(HEALED, "", "AI_IMAGES=0", 2, without_files),
    "dify-finished-no-message_end": Right(TEXT),
    "dify-no-message_end": Right(TEXT, BUSY, "without a finish_reason"),
    "dify-output-moderation": Right("抱歉，这个话题我不能谈。"),
    "dify-workflow-failed": Right("", QUOTA, "429 You exceeded your current quota"),
    "finish-MAX_TOKENS": Right(TEXT, "length"),
    "finish-MAX_TOKENS-empty": Right("", "empty", "MAX_TOKENS"),
    "finish-stop-each-chunk": Right(TEXT + "完。"),
    "key-with-quotes": Right("", SETUP, "Incorrect API key provided"),
    "litellm-real-context": Right("", LONG, "ContextWindowExceededError", 2),
    "litellm-real-filter": Right("", "filter", "content management policy"),
    "litellm-real-quota": Right("", QUOTA, "check your plan and billing details"),
    "litellm-real-wrong-path": Right("", SETUP, "/v1/chat/completions: HTTP 404"),
    "llamacpp-context": Right("", LONG, "exceeds the available context size", 2),
    "llamacpp-context-in-200": Right("", LONG, "context size", 2),
    "llamacpp-error-line": Right("", LONG, "context size", 2),
    "llamacpp-real-picture": healed("AI_IMAGES=0", without_picture),
    "llamacpp-real-too-long": Right("", LONG, "3237 tokens", 2),
    "llamacpp-real-wrong-path": Right("", SETUP, "/v1/chat/completions: HTTP 404"),
    "log-key-masked": Right(
        "", SETUP, "max_tokens 8192 exceeds the context length 4096", 2
    ),
    "new-api-no-channel": Right("", SETUP, "无可用渠道"),
    "no-end-chunk": Right(TEXT),
    "no-system-role": healed("the prompt is part of the question", without_system),
    "openai-reasoning_effort": healed(
        'AI_EXTRA_BODY={"reasoning_effort": null}', lacks("reasoning_effort")
    ),
    "openrouter-choice-error": Right("", BUSY, "Upstream provider timed out", 3),
    "openrouter-raw": Right("", SETUP, "supports at most 1 image per prompt", 3),
    "picture-not-downloaded": healed("AI_IMAGES=0", without_picture),
    "raw-tab-in-json": Right("a\tb"),
    "redirect-301": Right("", SETUP, "https://api.example.com/v1/chat/completions"),
    "redirect-307": Right("", SETUP, "https://api.example.com/v1/chat/completions"),
    "siliconflow-context": Right("", LONG, "less than max_seq_len", 2),
    "siliconflow-enable_thinking": healed(
        'AI_EXTRA_BODY={"enable_thinking": null}', lacks("enable_thinking")
    ),
    "spa-without-v1": Right("", SETUP, "a web page came from this address"),
    "stream-rate-limit-code": Right("", BUSY, "rate limited", 3),
    "think-details-dify": Right("你好！"),
    "think-harmony": Right("你好！"),
    "think-thought": Right("你好！"),
    "thinking-spent-all-tokens": Right("", "empty", "finish_reason length, only"),
    "utf8-split-over-events": Right("你\ufffd\ufffd吗"),
    "vllm-context": Right("", LONG, "maximum context length is 16384 tokens", 2),
    "vllm-small-context": Right("", SETUP, 'AI_EXTRA_BODY={"max_tokens": 2048}', 2),
}
RIGHT_IN = {  # where the two ways to show an answer differ
    "finish-SAFETY": {
        "whole": Right("", "filter", "SAFETY"),
        "modify": Right(HALF, "filter", "SAFETY"),
    },
    "ollama-runner-died": {
        "whole": Right("", BUSY, "unexpected EOF", 3),
        "modify": Right(HALF, BUSY, "unexpected EOF"),
    },
    "stream-request-timeout": {
        "whole": Right(HALF, BUSY, "disconnected", 3),
        "modify": Right(HALF, BUSY, "disconnected"),
    },
    "openai-verify-to-stream": {
        "whole": Right(TEXT),
        "modify": Right("", SETUP, 'AI_EXTRA_BODY={"stream": false}', 3),
    },
    "qwq-stream-only": {
        "whole": Right("", SETUP, 'AI_EXTRA_BODY={"stream": true}', 3),
        "modify": Right(TEXT),
    },
}
ALONE = {  # tested below
    "doctor-several-services",
    "litellm-real-presets",
    "log-redacted",
    "net-comment-in-address",
    "net-refused",
    "net-self-signed",
    "net-socks-proxy",
    "persona-extra-body",
}


def test_every_case_is_tested():
    assert {*RIGHT, *RIGHT_IN} | ALONE == {*CASES}


def wire(pieces):
    return [
        bytes.fromhex(piece["hex"]) if "hex" in piece else piece["utf8"].encode()
        for piece in pieces
    ]


def plain(body, status="200 OK"):
    """Return a response with a JSON in it."""
    data = ai_json(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
    return [f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data]


def answer(text, asked):
    """Return a response that answers a request, in its format."""
    if "query" not in asked:
        said = {"role": "assistant", "content": text}
        return plain({"choices": [{"message": said, "finish_reason": "stop"}]})
    events = [{"event": "message", "answer": text}, {"event": "message_end"}]
    lines = "".join(f"data: {ai_json(event)}\n\n" for event in events)
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    return [(head + lines).encode()]


def response(case, asked):
    """Return the bytes with which a case answers a request."""
    if case["id"] == "base64-picture":
        picture = "iVBORw0KGgo" * 120_000
        return answer(f"![image](data:image/png;base64,{picture})", asked)
    form = "response to a stream" if asked.get("stream") else "response to stream=false"
    return wire(case.get("response") or case[form])


@pytest.fixture
def service(ai_socket):
    """Return a function that starts a service; it answers with `reply(asked)`."""

    def start(reply, **options):
        def script(connection):
            for piece in reply(json.loads(server.bodies[-1])):
                connection.sendall(piece)

        server = ai_socket(script, **options)
        return server

    return start


def set_up(server, given, tmp_path, robots=""):
    """Return the settings of a case that are read as the bot reads them."""
    given = {name: value for name, value in given.items() if name.startswith("AI_")}
    env = {"AI_PROVIDER": "openai-compatible", "AI_BASE_URL": "http://127.0.0.1:<port>"}
    env |= {"AI_SECRET_KEY": "sk-local-key", "IM_SDKAPPID": "1400000000"}
    env |= {"IM_KEY": "key", "IM_CALLBACK_TOKEN": "token", "AI_MODEL": "m"}
    env |= given | {"AI_EXTRA_BODY": json.dumps(given.get("AI_EXTRA_BODY", {}))}
    env["AI_BASE_URL"] = env["AI_BASE_URL"].replace("<port>", str(server.port))
    (tmp_path / "robots.toml").write_text(robots)
    env["ROBOTS"] = str(tmp_path / "robots.toml")
    return Settings.from_env(PROVIDERS, REPLIES, env)


def talk(case, provider):
    """Return the question of a case."""
    images = case.get("settings", {}).get("picture")
    if case["id"] == "llamacpp-real-picture":
        images = ["https://example.com/1.png"]
    said = case.get("settings", {}).get("said first (flask say)")
    old = [{"role": "assistant", "content": said}] if said else []
    content = "你好"
    if images and provider.service.images:
        content = [{"type": "text", "text": "你好"}, PICTURE]
    system = {"role": "system", "content": "Be brief."}
    return [system, *old, {"role": "user", "content": content}]


def ask(provider, turns, mode):
    """Return the last text of an answer, and the error after it."""
    texts, interval = [""], 0.0 if mode == "whole" else 1e-9
    try:
        texts.extend(provider.chat(turns, CancelScope(20), interval))
    except ProviderError as error:
        return texts[-1], error
    return texts[-1], None


@pytest.mark.parametrize("mode", ["whole", "modify"])
@pytest.mark.parametrize("name", [*RIGHT, *RIGHT_IN])
def test_a_case_has_its_right_value(service, tmp_path, caplog, name, mode):
    case, right = CASES[name], RIGHT.get(name) or RIGHT_IN[name][mode]

    def reply(asked):
        takes = right.takes and right.takes(asked)
        return answer(HEALED, asked) if takes else response(case, asked)

    server = service(reply)
    settings = set_up(server, case["settings"], tmp_path)
    persona = settings.persona("@RBT#001")
    provider = settings.provider(persona, PROVIDERS, FAST)
    text, failure = ask(provider, talk(case, provider), mode)
    assert (text, failure.kind if failure else "") == (right.text, right.kind)
    assert len(server.heads) == right.tries
    assert right.told in f"{failure or ''}{caplog.text}"
    assert "sk-local-key" not in str(failure)


def test_the_query_of_an_address_stays_at_its_end(service, tmp_path):
    server = service(lambda asked: answer(HEALED, asked))
    settings = set_up(server, CASES["azure-query"]["settings"], tmp_path)
    provider = settings.provider(settings.persona(""), PROVIDERS, FAST)
    assert ask(provider, talk(CASES["azure-query"], provider), "whole")[0] == HEALED
    path = "/openai/deployments/gpt/chat/completions?api-version=2024-10-21"
    assert server.heads[0].startswith(f"POST {path} HTTP/1.1")


@pytest.mark.parametrize("key", ['"sk-local-key"', "'sk-local-key' ", "“sk-local-key”"])
def test_quotes_around_a_key_are_not_sent_and_are_told(service, tmp_path, key):
    server = service(lambda asked: answer(HEALED, asked))
    settings = set_up(server, {"AI_SECRET_KEY": key}, tmp_path)
    provider = settings.provider(settings.persona(""), PROVIDERS, FAST)
    assert ask(provider, [{"role": "user", "content": "hi"}], "whole")[0] == HEALED
    assert "\nAuthorization: Bearer sk-local-key\n" in f"{server.heads[0]}\n"
    [told] = misspelt({"AI_SECRET_KEY": key})
    assert told == "AI_SECRET_KEY has quotes or blanks around it, which are left out."
    assert not misspelt({"AI_SECRET_KEY": "Bearer sk-local-key"})


@pytest.mark.parametrize(
    ("name", "field"), [("openai", "reasoning_effort"), ("moonshot", "thinking")]
)
def test_a_gateway_that_takes_no_field_of_a_preset(
    service, tmp_path, caplog, name, field
):
    words = f"litellm.UnsupportedParamsError: m does not support parameters: {field}"
    error = {"error": {"message": words, "type": "None", "param": "", "code": "400"}}

    def reply(asked):
        refused = plain(error, "400 Bad Request")
        return refused if field in asked else answer(HEALED, asked)

    server = service(reply)
    settings = set_up(server, {"AI_PROVIDER": name}, tmp_path)
    provider = settings.provider(settings.persona(""), PROVIDERS, FAST)
    for tries in (2, 3, 4):  # one more than needed, and only once
        assert ask(provider, [{"role": "user", "content": "hi"}], "whole")[0] == HEALED
        assert len(server.heads) == tries
    assert f'AI_EXTRA_BODY={{"{field}": null}}' in caplog.text
    assert len(caplog.records) == 1


def test_a_sentence_of_the_service_is_told_though_the_chat_has_words_of_it(
    service, tmp_path
):
    sentence = (
        "This model's maximum context length is 16384 tokens. However, you requested "
        "17001 tokens (16000 in the messages). 对于模型 gpt-9 无"
    )
    server = service(lambda _: plain({"message": sentence}, "400 Bad Request"))
    settings = set_up(server, {}, tmp_path)
    provider = settings.provider(settings.persona(""), PROVIDERS, FAST)
    chat = CASES["log-redacted"]["input"]["chat"]
    turns = [{"role": t.split(": ")[0], "content": t.split(": ")[1]} for t in chat]
    turns.insert(1, {"role": "assistant", "content": "对于模型的选择，看情况。"})
    assert sentence in str(ask(provider, turns, "whole")[1])


def test_an_address_with_a_comment_is_refused_at_the_start(service, tmp_path):
    given = CASES["net-comment-in-address"]["settings"]
    with pytest.raises(SettingsError, match="AI_BASE_URL must be an address"):
        set_up(service(lambda _: []), given, tmp_path)


def test_nobody_listening_is_told_with_host_and_reason(service, tmp_path):
    server = service(lambda _: [])
    base = {"AI_BASE_URL": "http://127.0.0.1:9/v1"}
    settings = set_up(server, base, tmp_path)
    provider = settings.provider(settings.persona(""), PROVIDERS, FAST)
    _, failure = ask(provider, [{"role": "user", "content": "hi"}], "whole")
    assert failure.kind == BUSY
    assert "POST http://127.0.0.1:9/v1/chat/completions: connection refused" in str(
        failure
    )


@pytest.fixture
def gateway(service, tmp_path):
    """A service whose certificate nobody signed."""
    made = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2"
    command = f"{made} -subj /CN=gateway.internal".split()
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    return service(lambda _: [], context=context)


def test_a_certificate_that_nobody_signed_is_a_matter_of_the_setup(gateway, tmp_path):
    base = {"AI_BASE_URL": f"https://127.0.0.1:{gateway.port}/v1"}
    settings = set_up(gateway, base, tmp_path)
    provider = settings.provider(settings.persona(""), PROVIDERS, FAST)
    _, failure = ask(provider, [{"role": "user", "content": "hi"}], "whole")
    assert failure.kind == SETUP
    assert "self-signed certificate" in str(failure)
    assert "REQUESTS_CA_BUNDLE" in str(failure)
    assert len(gateway.peers) == 1


def test_a_socks_proxy_without_its_package_is_named(service, tmp_path, monkeypatch):
    def missing(*_, **__):  # as requests does without it
        raise InvalidSchema("Missing dependencies for SOCKS support.")

    monkeypatch.setattr(adapters, "SOCKSProxyManager", missing)
    server = service(lambda _: [])
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:7890")
    base = {"AI_BASE_URL": "https://api.example.com/v1"}
    settings = set_up(server, base, tmp_path)
    provider = settings.provider(settings.persona(""), PROVIDERS, FAST)
    _, failure = ask(provider, [{"role": "user", "content": "hi"}], "whole")
    assert failure.kind == SETUP
    assert "Missing dependencies for SOCKS support" in str(failure)
    assert "AI_BASE_URL" not in str(failure)


ROBOTS = """
["@RBT#001"]
provider = "siliconflow"
base_url = "http://127.0.0.1:<port>"
secret_key_env = "AI_SECRET_KEY"
images = true
extra_body = '{"enable_thinking": null, "top_k": 1}'
system_prompt = ""

["@RBT#002"]
extra_body = {top_k = 2}
images = false
"""


def test_a_robot_has_its_own_extra_body_prompt_and_word_on_pictures(service, tmp_path):
    server = service(lambda asked: answer(HEALED, asked))
    given = {"AI_EXTRA_BODY": {"top_p": 1}, "AI_IMAGES": "1"}
    robots = ROBOTS.replace("<port>", str(server.port))
    settings = set_up(server, given, tmp_path, robots)
    bodies = []
    for robot in ("@RBT#001", "@RBT#002", "@RBT#003"):
        persona = settings.persona(robot)
        provider = settings.provider(persona, PROVIDERS, FAST)
        turns = [{"role": "system", "content": persona.system_prompt}]
        turns.append({"role": "user", "content": "hi"})
        assert ask(provider, turns, "whole")[0] == HEALED
        asked = json.loads(server.bodies[-1])
        bodies.append({k: asked.get(k) for k in ("enable_thinking", "top_k", "top_p")})
        assert [turn["role"] for turn in asked["messages"]] == ["user"]
        assert provider.service.images == (robot != "@RBT#002")
    assert settings.persona("@RBT#001").system_prompt == NO_PROMPT
    assert [[*body.values()] for body in bodies] == [
        [None, 1, None],
        [None, 2, 1],
        [None, None, 1],
    ]


def test_what_a_robot_may_not_set_is_named(service, tmp_path):
    robots = '["@RBT#001"]\nextra_body = "no"\nimages = "maybe"\nnick = true\n'
    with pytest.raises(SettingsError) as caught:
        set_up(service(lambda _: []), {}, tmp_path, robots)
    for told in (
        "extra_body must be a JSON object",
        "images must be 0 or 1",
        "nick must be a text in quotes",
    ):
        assert told in str(caught.value)


def test_the_doctor_names_the_service_that_fails(service, tmp_path):
    from botserver import Bot
    from imbot import cli

    error = {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}}

    def reply(asked):
        wrong = asked["model"] == "qwen3.8-flash"
        refused = plain(error, "401 Unauthorized")
        return refused if wrong else answer(HEALED, asked)

    server = service(reply)
    about = f'base_url = "http://127.0.0.1:{server.port}"\n'
    about += 'secret_key_env = "AI_SECRET_KEY"\n'
    robots = f'["@RBT#001"]\nprovider = "deepseek"\nreply_mode = "modify"\n{about}'
    robots += f'["@RBT#002"]\nprovider = "qwen"\n{about}'
    settings = set_up(server, {}, tmp_path, robots)
    cli.add_to(None, Bot, FAST)
    with pytest.raises(ValueError, match=r"^qwen qwen3.8-flash \(for @RBT#002\): POST"):
        cli.check_ai(settings)
    streams = [json.loads(body)["stream"] for body in server.bodies]
    assert streams == [False, True, False]  # as each robot's reply mode does


def test_the_doctor_tells_what_helped(service, tmp_path):
    from botserver import Bot
    from imbot import cli

    case = CASES["ark-thinking-disabled"]
    takes = lacks("thinking")
    server = service(
        lambda asked: answer(HEALED, asked) if takes(asked) else response(case, asked)
    )
    cli.add_to(None, Bot, FAST)
    told = cli.check_ai(set_up(server, case["settings"], tmp_path))
    assert told.startswith("answers: ark kimi-k2.7-code in 0.")
    assert 'AI_EXTRA_BODY={"thinking": null}' in told
    assert "does not support disabling thinking" in told
