"""The AI services: a chat goes in, the text of the answer so far comes out.

To add a service that speaks OpenAI's format, add a line to PROVIDERS, at the end of
this file; for one that does not, write a function like `openai_chat` and name it there
as `ask`. All keep the same promises: an end within the deadline, no thinking in the
answer, three tries where that may help, a ProviderError for whatever goes wrong.

One that `remembers` its chats gets in a question's `messages` only what is new; its
`memory` is kept with the chat until the user clears it. It begins with a random
"session" and the "user", whom the service may be told; what the function changes in
it, such as the id of a conversation, it finds again.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

import jwt
import requests
from urllib3.exceptions import HTTPError

from session import CallEnded, CancelScope, Session, read_arrived

CONNECT_TIMEOUT = 5  # seconds
TRIES = {"busy": 3, "once": 2}  # by ProviderError.kind; any other kind has one try
LONGEST_WAIT = 60  # seconds of Retry-After that are honoured
LONGEST_ANSWER = 8 << 20  # bytes of one answer
MAX_TOKENS = 8192  # of one answer, unless AI_EXTRA_BODY says otherwise
READ_EVERY = 0.2  # seconds between two looks at an answer that streams in

Json = dict[str, Any]
Texts = Iterator[str]  # the answer so far, again and again
Reader = Callable[[Json, list[str]], str | Json]  # see Provider.complete


class ProviderError(Exception):
    """The service gave no whole answer; the text is for the operator, `kind` for users.

    busy, once: it may do better later; quota: balance or allowance spent; filter: a
    content filter; long: the chat is too long; length: the answer is too long and was
    cut; slow: no end within the deadline; empty: no text; setup: key, address, model or
    parameters are wrong; stopped: the scope was cancelled; forgotten: a service that
    remembers does not know the conversation.
    """

    def __init__(self, kind: str, details: str, wait: float | None = None) -> None:
        super().__init__(details)
        self.kind, self.wait = kind, wait  # seconds, from Retry-After


def kinds(**codes: str) -> dict[str, str]:
    """Return the kind of each code, from the codes of each kind."""
    return {code: kind for kind, listed in codes.items() for code in listed.split()}


STATUS = kinds(busy="408 409 429", quota="402", filter="451", long="413")
NAMES = kinds(  # what error.code, error.type or finish_reason may say
    quota="insufficient_quota exceeded_current_quota_error QuotaExceeded Arrearage "
    "SetLimitExceeded AccountOverdueError AccessDenied.Unpurchased "
    "Throttling.AllocationQuota",
    filter="content_filter DataInspectionFailed data_inspection_failed sensitive",
    long="context_length_exceeded model_context_window_exceeded",
    once="RequestTimeOut",
    busy="error network_error server_error overloaded_error ServerOverloaded",
)
MINIMAX = kinds(  # https://platform.minimax.io/docs/api-reference/errorcode
    busy="1000 1001 1002 1013 1024 1033 1041 2045",
    once="1039",
    filter="1026 1027",
    quota="1008 1028 1030 2054 2056 2061",
    setup="1004 1042 1043 1044 2013 2037 2038 2039 2042 2048 2049 20132",
)
ZHIPU = kinds(  # https://docs.bigmodel.cn/cn/api/api-code
    busy="500 1120 1234 1302 1303 1305 1312",
    once="1003 1230",
    filter="1300 1301",
    quota="1113 1304 1308 1309 1310 1311 1313",
    long="1261",
    setup="1000 1001 1002 1004 1100 1110 1111 1112 1121 1200 1210 1211 1212 1213 1214 "
    "1215 1220 1221 1222 1231",
)
TRACES = ("trace-id", "minimax-request-id", "x-mm-request-id", "x-request-id")


@dataclass(frozen=True)
class Service:
    """One line of PROVIDERS."""

    url: str  # to which "/chat/completions" is added
    model: str
    extra: Json = field(default_factory=dict)  # merged into every request
    codes: Mapping[str, str] = field(default_factory=dict)  # its own error codes
    token: Callable[[str], str] = str  # makes from the key what follows "Bearer"
    cap: str = "max_tokens"  # its name for the limit on an answer's tokens
    keyless: bool = False  # it may be asked without a key
    images: bool = False  # whether the model reads pictures
    ask: Callable[..., Texts] | None = None  # if it has a format of its own
    remembers: bool = False  # its chats itself


@dataclass(frozen=True)
class Question:
    """What a service is asked."""

    messages: list[Json]  # OpenAI's
    scope: CancelScope
    update_interval: float  # seconds between two texts; 0 for the whole one alone
    memory: Json


class Provider:
    """A service, with the key and the settings of this server."""

    def __init__(
        self,
        service: Service,
        key: str = "",
        url: str = "",
        model: str = "",
        extra: Json | None = None,
        session: Session | None = None,
    ) -> None:
        self.service = service
        self.key = key.strip().removeprefix("Bearer ").strip()
        self.url = (url or service.url).rstrip("/")
        self.model = model or service.model
        self.extra = {**service.extra, **(extra or {})}
        self.session = session or Session(self.url)

    def chat(
        self,
        messages: list[Json],
        scope: CancelScope,
        update_interval: float = 0.0,
        memory: Json | None = None,
    ) -> Texts:
        """Yield the answer so far, every `update_interval` seconds; if 0, once, whole.

        `messages` are OpenAI's. At the last text `scope.ended` may be set: then it need
        not be shown as growing. It asks again where that may help, as long as nothing
        was yielded. Leaving the loop ends the call. Raises ProviderError.
        """
        messages = [turn for turn in messages if str(turn["content"] or "").strip()]
        if not messages:
            raise ProviderError("empty", "the question holds no text")
        memory, text = memory or new_memory("operator"), ""
        question = Question(messages, scope, update_interval, memory)
        for tried in count(1):
            try:
                answer = (self.service.ask or openai_chat)(self, question)
                for text in filter(str.strip, answer):
                    yield text
                if text:
                    return
                failure = ProviderError("empty", "the answer holds no text")
            except ProviderError as error:
                failure = error
            except CallEnded as error:
                failure = ProviderError(str(error), "no whole answer in time")
            except (OSError, HTTPError, ValueError, RecursionError) as error:
                kind = "setup" if isinstance(error, ValueError) else "busy"
                name = type(error).__name__  # its text may hold the key
                failure = ProviderError(kind, f"no connection, or cut: {name}")
            delay = failure.wait or 2 ** (tried - 2) * random.uniform(0.75, 1)
            too_late = delay > min(LONGEST_WAIT, scope.remaining())
            if text or too_late or tried >= TRIES.get(failure.kind, 1):
                raise failure from None
            scope.cancelled.wait(delay)

    def body(self, **fields: Any) -> Json:
        """Return a request's body; a null in an extra takes a field out."""
        fields |= {"model": self.model or None, self.service.cap: MAX_TOKENS}
        fields |= self.extra
        return {name: value for name, value in fields.items() if value is not None}

    def complete(
        self, path: str, body: Json, question: Question, read: Reader | None = None
    ) -> Texts:
        """Send a request and yield the answer so far, without its thinking.

        `read` adds the text of an event to the parts of the answer, or changes them,
        and returns "stop" at the end, "" before, or the event if it tells of an error;
        without it the format is OpenAI's. Raises ProviderError, after the last text if
        the answer is not whole.
        """
        scope = question.scope
        with self.send(path, body, scope) as response:
            if response.status_code != 200:
                refusal = _json(b"".join(reads(response, scope)))
                raise self.error(refusal, response)
            yield from self._texts(response, question, read or openai_event)
            _finish(response, scope)

    def send(self, path: str, body: Json, scope: CancelScope) -> requests.Response:
        """Return the response to a request, its body not read yet."""
        token = self.service.token(self.key)
        if not (token.isascii() and token.isprintable()):
            raise ProviderError("setup", "AI_SECRET_KEY has a character no key has")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers |= {"X-Client-Request-Id": scope.trace} if scope.trace else {}
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        left = scope.remaining()  # a host may have several addresses to connect to
        timeout = (min(CONNECT_TIMEOUT, left / 4 + 0.1), left + 1)
        with scope:
            return self.session.post(self.url + path, data, headers, timeout)

    def error(self, body: Json, response: requests.Response) -> ProviderError:
        """Return the error that a body, its HTTP status and headers mean."""
        status, headers = response.status_code, response.headers
        source = find_error(body) or body
        text = str(source.get("message") or source.get("msg") or source)
        in_text = re.search(r"\((\d{3,5})\)\s*$", text)  # MiniMax: "invalid key (2049)"
        code = str(source.get("code") or (in_text[1] if in_text else ""))
        name = str(source.get("type") or "")
        traces = [*map(headers.get, TRACES), body.get("request_id"), body.get("id")]
        trace = next(filter(None, traces), "-")
        text = " ".join((text.replace(self.key, "***") if self.key else text).split())
        details = f"HTTP {status}, code {code or name or '-'}, trace {trace}: "
        kind = self._kind(code, name, str(status))
        return ProviderError(kind, details + text[:500], retry_after(headers))

    def _kind(self, code: str, name: str, status: str) -> str:
        codes = self.service.codes
        if code in codes or codes and re.fullmatch(r"\d{4,}", code):
            return codes.get(code) or ("busy" if status >= "500" else "setup")
        if status == "200" and re.fullmatch(r"[45]\d\d(\d{3})?", code):
            status = code[:3]  # OpenRouter and TokenHub repeat the HTTP status there
        if "SensitiveContent" in code:
            code = "sensitive"  # Ark has a code for each kind of it
        kind = NAMES.get(code) or NAMES.get(name)
        if not kind or kind == "busy" and status != "200":  # the status knows better
            kind = STATUS.get(status, "busy" if status >= "500" else "setup")
        return kind

    def _texts(
        self, response: requests.Response, question: Question, read: Reader
    ) -> Texts:
        """Yield the answer so far whenever an update is due, and at its end.

        An error that ends a growing answer comes after the text that came before it.
        """
        scope, update_interval = question.scope, question.update_interval
        parts: list[str] = []
        shown, finish, due, failure = "", "", 0.0, None
        try:
            for event in events(response, scope):
                if event:
                    told = event if event.get("error") else read(event, parts)
                    if isinstance(told, dict):
                        raise self.error(event, response)
                    if finish := told:
                        break
                elif update_interval and time.monotonic() >= due:
                    so_far = without_thinking("".join(parts), final=False)
                    if so_far != shown:
                        yield so_far
                        shown, due = so_far, time.monotonic() + update_interval
            if not finish or finish in NAMES:
                why = f"the answer ended with {finish or 'no finish_reason'}"
                raise ProviderError(NAMES.get(finish, "busy"), why)
        except Exception as error:
            failure = error
        scope.ended, answer = True, without_thinking("".join(parts))
        if answer != shown and (update_interval or not failure):
            yield answer
        if failure:
            raise failure
        if finish == "length" and answer.strip():
            raise ProviderError("length", "the answer reached its limit of tokens")


def openai_event(event: Json, parts: list[str]) -> str | Json:
    """Add to `parts` the text of an event, and return its finish_reason."""
    if find_error(event):
        return event
    choices = event.get("choices")
    choice = choices[0] if choices and isinstance(choices, list) else {}
    if not isinstance(choice, dict):
        choice = {}
    if whole := _text(choice.get("message")) or _text(event.get("reply")):
        parts.clear()
    parts.append(whole or _text(choice.get("delta")))
    return str(choice.get("finish_reason") or "")


def _finish(response: requests.Response, scope: CancelScope) -> None:
    """Read what follows an answer, so that its connection can serve the next."""
    with suppress(HTTPError, OSError):
        if scope.socket:
            scope.socket.settimeout(0.05)
        for _ in range(9):
            if not response.raw.read1(65536, decode_content=True):
                break
    scope.socket = None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds a service asks us to wait, None if it says nothing usable."""
    for name, unit in (("retry-after-ms", 1000), ("Retry-After", 1)):
        text = headers.get(name, "")
        with suppress(ValueError, OverflowError):
            date = parsedate_to_datetime(text).timestamp() if "," in text else 0.0
            seconds = date - time.time() if date else float(text) / unit
            if 0 < seconds < float("inf"):
                return seconds
    return None


def find_error(body: Json) -> Json:
    """Return the part of a body that tells of an error, nothing if there is none."""
    error, base = body.get("error"), body.get("base_resp")
    if error:
        return error if isinstance(error, dict) else {**body, "message": error}
    if isinstance(base, dict) and str(base.get("status_code") or 0) != "0":
        return {"code": base["status_code"], "message": base.get("status_msg")}
    odd = "choices" not in body and ("message" in body or "code" in body)
    return body if odd else {}


def _text(said: Any) -> str:
    """Return the text of a message, a delta, or their content, perhaps in parts."""
    if isinstance(said, dict):
        texts = (_text(said.get(name)) for name in ("content", "refusal", "text"))
        return next(filter(None, texts), "")
    if isinstance(said, list):
        return "".join(map(_text, said))
    return said if isinstance(said, str) else ""


def reads(response: requests.Response, scope: CancelScope) -> Iterator[bytes]:
    """Yield a body read by read, and a last line feed.

    A stream is read every READ_EVERY seconds and not chunk by chunk, since every time
    a thread wakes up costs CPU.
    """
    kind, size = response.headers.get("Content-Type", ""), 0
    pause = READ_EVERY if kind.startswith("text/event-stream") else 0.0
    while piece := read_arrived(response, scope):
        read_at, size = time.monotonic(), size + len(piece)
        if size > LONGEST_ANSWER:
            raise ProviderError("setup", "the service sent more than an answer can be")
        yield piece
        scope.cancelled.wait(read_at + pause - time.monotonic())
    scope.check()  # a body that was cut may look like one that has ended
    yield b"\n"


DONE: Json = {"choices": [{"finish_reason": "stop"}]}


def events(response: requests.Response, scope: CancelScope) -> Iterator[Json]:
    """Yield the JSON of each event, and {} after those that came in one read.

    A service may answer with a stream or with one plain JSON, whatever was asked for.
    """
    rest, plain = b"", []
    for piece in reads(response, scope):
        *lines, rest = (rest + piece).split(b"\n")  # in bytes: a read may end anywhere
        for line in lines:
            name, _, data = line.strip().partition(b":")
            if name == b"data" and data.strip():
                yield DONE if data.strip() == b"[DONE]" else _json(data)
            elif name not in (b"", b"data", b"event", b"id", b"retry"):
                plain.append(line)
        yield {}
    if plain:
        yield _json(b"\n".join(plain))
        yield DONE


def _json(text: bytes) -> Json:
    """Return the object a text holds, or an error's if it holds none."""
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError):  # cut, or a page of HTML at a wrong address
        kind = "" if text.lstrip().startswith(b"<") else "server_error"
        told = "broken JSON" if b"{" in text else text.decode("utf-8", "replace")
        value = {"error": {"type": kind, "message": told}}
    return value if isinstance(value, dict) else {"error": str(value)}


_TAG = re.compile(r"<(/?)(?:mm:)?think>\s{0,9}")
_THOUGHTS = re.compile(
    r"\s*(?:(?:<(?:mm:)?think>.*?(?:</(?:mm:)?think>|\Z)|</(?:mm:)?think>)\s*)*",
    re.DOTALL,
)
# An end of a text that may go on as a tag, as the space after one, or as an emoji.
_OPEN = re.compile(r"(?:<[/a-z:]{0,9}|</?(?:mm:)?think>\s{0,8}|[\ud800-\udbff])\Z")
_QUOTES = " \t`'\"“‘「『《（([*"  # before a tag that is quoted


def without_thinking(text: str, final: bool = True) -> str:
    """Return an answer without its thinking; if it goes on, without half a tag either.

    Thinking comes first, in <think>…</think>, of which the opening may be missing. Tags
    quoted later, in the middle of a line, belong to the answer.
    """
    text = text if final else _OPEN.sub("", text)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    start = end = _THOUGHTS.match(text).end()  # type: ignore[union-attr]
    while (tag := _TAG.search(text, end)) and tag[1]:
        end = tag.end()
        if text[tag.start() - 1] not in _QUOTES or "\n" in tag[0]:
            start = end = _THOUGHTS.match(text, end).end()  # type: ignore[union-attr]
    return text[start:]


def openai_chat(provider: Provider, question: Question) -> Texts:
    """Ask a service that has OpenAI's format."""
    stream = question.update_interval > 0
    body = provider.body(messages=question.messages, stream=stream)
    return provider.complete("/chat/completions", body, question)


def minimax_completion(provider: Provider, question: Question) -> Texts:
    """Ask as Tencent's tutorial does: MiniMax's old endpoint, a prompt in, a reply out.

    https://www.tencentcloud.com/document/product/1047/54925
    """
    try:  # an old key is a JWT that names its group; reading it decides nothing
        claims = jwt.decode(provider.key, options={"verify_signature": False})
    except jwt.PyJWTError:
        claims = {}
    group = claims.get("GroupID") or claims.get("group_id")
    path = f"/text/completion?GroupId={group}" if group else "/text/completion"
    end = "\nassistant:" if question.messages[1:] else ""
    body = provider.body(prompt=as_text(question.messages) + end)
    return provider.complete(path, body, question)


def echo(provider: Provider, question: Question) -> Texts:
    """Say what the user said: for a machine without a key."""
    yield words(question.messages[-1])


def words(turn: Json) -> str:
    """Return the text of a message, of which pictures may be a part."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def as_text(messages: list[Json]) -> str:
    """Return a chat as one text; of a single message only what it says."""
    if not messages[1:]:
        return words(messages[0])
    return "\n".join(f"{turn['role']}: {words(turn)}" for turn in messages)


def new_memory(user: str) -> Json:
    """Return the memory of a new chat, for a service that remembers."""
    return {"session": os.urandom(16).hex(), "user": user}


def zhipu_token(key: str) -> str:
    """Return a fresh token made from Zhipu's id.secret key, or another key as it is.

    Both times are in milliseconds, unlike a usual JWT's.
    https://docs.bigmodel.cn/cn/guide/develop/http/introduction
    """
    name, dot, secret = key.partition(".")
    if not dot or "." in secret:
        return key
    now = time.time_ns() // 10**6
    return jwt.encode(
        {"api_key": name, "exp": now + 300_000, "timestamp": now},
        secret.encode().ljust(32, b"\0"),  # the same to HMAC, and long enough for PyJWT
        headers={"sign_type": "SIGN"},
    )


# How a service is told not to think before it answers.
OFF: Json = {"thinking": {"type": "disabled"}}
QWEN_OFF: Json = {"enable_thinking": False}
OPENAI_OFF: Json = {"reasoning_effort": "none"}
CAP = "max_completion_tokens"

# Addresses and models change: AI_BASE_URL and AI_MODEL take the place of these.
PROVIDERS = {
    "minimax": Service(
        "https://api.minimaxi.com/v1", "MiniMax-M3", OFF, MINIMAX, cap=CAP, images=True
    ),
    "minimax-completion": Service(
        "https://api.minimax.chat/v1",
        "abab5-completion",
        codes=MINIMAX,
        cap="tokens_to_generate",
        ask=minimax_completion,
    ),
    "zhipu": Service(
        "https://open.bigmodel.cn/api/paas/v4", "glm-4.7-flash", OFF, ZHIPU, zhipu_token
    ),
    "deepseek": Service("https://api.deepseek.com", "deepseek-flash", OFF),
    "qwen": Service(
        "https://dashscope.aliyuncs.com/compatible-mode/v1", "qwen3.8-flash", QWEN_OFF
    ),
    "tokenhub": Service("https://tokenhub.tencentmaas.com/v1", "hy3", OFF),
    "moonshot": Service("https://api.moonshot.cn/v1", "kimi-k2.6", OFF),
    "ark": Service(
        "https://ark.cn-beijing.volces.com/api/v3", "doubao-seed-2-1-lite-260915", OFF
    ),
    "siliconflow": Service(
        "https://api.siliconflow.cn/v1", "deepseek-ai/DeepSeek-V4-Flash", QWEN_OFF
    ),
    "openai": Service(
        "https://api.openai.com/v1", "gpt-6-luna", OPENAI_OFF, cap=CAP, images=True
    ),
    "openrouter": Service(
        "https://openrouter.ai/api/v1",
        "minimax/minimax-m3",
        {"reasoning": {"enabled": False}},
    ),
    "openai-compatible": Service("", "", keyless=True),
    "ollama": Service("http://localhost:11434/v1", "qwen3", OPENAI_OFF, keyless=True),
    "echo": Service("", "", keyless=True, ask=echo),
}
