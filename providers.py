"""The AI services: a chat goes in, the answer comes out as chunks of text.

To add a service that speaks OpenAI's format, add a line to PROVIDERS. For one that does
not, write a generator like `openai_stream` and name it in that line. Every provider keeps
the same promises: an end within the deadline, no thinking in the answer, three tries where
trying again may help, and a ProviderError for whatever goes wrong.
"""

from __future__ import annotations

import json
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from itertools import chain
from typing import Any
from urllib.parse import urlencode

import jwt
import requests
from requests import exceptions
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

CONNECT_TIMEOUT = 5  # seconds
TRIES = {"busy": 3, "once": 2}  # by ProviderError.kind; any other kind has one try
LONGEST_WAIT = 60  # seconds of Retry-After that are honoured
LONGEST_LINE = 1 << 20  # bytes of one event
LONGEST_ANSWER = 4 << 20  # bytes on the wire
MAX_TOKENS = 8192  # of one answer, unless AI_EXTRA_BODY says otherwise

Json = dict[str, Any]


class ProviderError(Exception):
    """The service gave no answer; the text is for the operator, `kind` for the user:

    busy, once  it may do better later      slow    no whole answer within the deadline
    quota       balance or allowance spent  filter  stopped by a content filter
    long        the chat is too long        empty   an answer without text
    setup       key, address, model or parameters are wrong
    stopped     ended by Call.stop
    """

    def __init__(self, kind: str, details: str, wait: float | None = None) -> None:
        super().__init__(details)
        self.kind = kind
        self.wait = wait  # seconds, from Retry-After

    @property
    def retry(self) -> bool:
        """Whether asking again may help."""
        return self.kind in TRIES


class Replace(str):
    """A chunk that takes the place of all text before it."""


class Call:
    """One question: its deadline, and the means to end it from another thread.

    A timeout of `requests` bounds the wait for the next byte, not the whole, and not the
    headers. So a watch shuts the socket of every call whose time is over.
    """

    _open: set[Call] = set()
    _guard = threading.Lock()  # of _open and of every _socket
    _watch: threading.Thread | None = None
    _here = threading.local()  # .call is the call of this thread

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.stopped = threading.Event()
        self._socket: socket.socket | None = None

    def left(self) -> float:
        """Return the seconds until the deadline, never below 0."""
        return max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Raise ProviderError if the call was stopped or its time is over."""
        if self.stopped.is_set():
            raise ProviderError("stopped", "stopped")
        if not self.left():
            raise ProviderError("slow", "no whole answer within AI_TIMEOUT")

    def stop(self) -> None:
        """End the call: its reader gets a ProviderError at once."""
        self.stopped.set()
        with self._guard:
            self._shut()

    def _shut(self) -> None:
        try:
            if self._socket:
                self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already

    def __enter__(self) -> Call:
        with self._guard:
            self._open.add(self)
            if not Call._watch:
                Call._watch = threading.Thread(target=self._watch_all, daemon=True)
                Call._watch.start()
        self._here.call = self
        return self

    def __exit__(self, *_: object) -> None:
        self._here.call = None
        with self._guard:
            self._open.discard(self)
            self._socket = None

    @classmethod
    def _watch_all(cls) -> None:
        while True:
            time.sleep(0.25)
            with cls._guard:
                for call in cls._open:
                    if not call.left():
                        call._shut()

    @classmethod
    def waits_on(cls, connection: socket.socket) -> None:
        """Note the socket on which the call of this thread is about to wait."""
        if call := getattr(cls._here, "call", None):
            with cls._guard:
                call._socket = connection
            if call.stopped.is_set():
                call.stop()


class _Adapter(HTTPAdapter):
    """Tells the Call its socket when the request is out and no header has come yet."""

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if not issubclass(pool.ConnectionCls, _Watched):
            pool.ConnectionCls = type("_", (_Watched, pool.ConnectionCls), {})
        return pool


class _Watched:
    def getresponse(self) -> Any:
        Call.waits_on(self.sock)  # type: ignore[attr-defined]
        return super().getresponse()  # type: ignore[misc]


class _Key(requests.auth.AuthBase):
    """Sets the key as an auth object: else an entry in ~/.netrc would replace it."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


def open_session(threads: int) -> requests.Session:
    """Return a session that `threads` threads may share.

    Nothing in it changes afterwards but the connection pool, which urllib3 locks.
    """
    session = requests.Session()
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(pool_maxsize=threads))
    return session


def _kinds(**codes: str) -> dict[str, str]:
    return {code: kind for kind, listed in codes.items() for code in listed.split()}


STATUS = _kinds(
    busy="408 409 429 500 502 503 504 529", quota="402", filter="451", long="413"
)
NAMES = _kinds(  # error.code or error.type where services follow OpenAI
    quota="insufficient_quota exceeded_current_quota_error QuotaExceeded Arrearage "
    "SetLimitExceeded AccountOverdueError AccessDenied.Unpurchased",
    filter="content_filter DataInspectionFailed data_inspection_failed sensitive",
    long="context_length_exceeded model_context_window_exceeded",
    once="RequestTimeOut Throttling.AllocationQuota",
    busy="network_error error",  # these and more of NAMES also end a stream
)
MINIMAX = _kinds(  # https://platform.minimax.io/docs/api-reference/errorcode
    busy="1000 1001 1002 1013 1024 1033 1041 2045",
    once="1039",
    filter="1026 1027",
    quota="1008 1028 1030 2054 2056 2061",
    setup="1004 1042 1043 1044 2013 2037 2038 2039 2042 2048 2049 20132",
)
ZHIPU = _kinds(  # https://docs.bigmodel.cn/cn/api/api-code
    busy="500 1120 1234 1302 1303 1305 1312",
    once="1003 1230",
    filter="1300 1301",
    quota="1113 1304 1308 1309 1310 1311 1313",
    long="1261",
    setup="1000 1001 1002 1004 1100 1110 1111 1112 1121 1200 1210 1211 1212 1213 1214 "
    "1215 1220 1221 1222 1231",
)
TRACES = ("Trace-Id", "minimax-request-id", "x-mm-request-id", "x-request-id")
_BAD_SETTING = (
    exceptions.InvalidHeader,
    exceptions.InvalidURL,
    exceptions.InvalidSchema,
    exceptions.MissingSchema,
)


@dataclass(frozen=True)
class Service:
    """One line of PROVIDERS."""

    url: str
    model: str
    extra: Json = field(default_factory=dict)  # merged into every request
    cap: str = "max_tokens"  # the service's name for the limit on an answer's tokens
    codes: Mapping[str, str] = field(default_factory=dict)  # its own error codes
    token: Callable[[str], str] = str  # makes from the key what follows "Bearer"
    keyless: bool = False
    images: bool = False  # whether the model reads pictures
    stream: Callable[[Provider, list[Json], Call], Iterator[str]] | None = None


@dataclass(frozen=True)
class Provider:
    """A service, with the key and the wishes of this server."""

    service: Service
    key: str = field(default="", repr=False)
    url: str = ""
    model: str = ""
    extra: Json = field(default_factory=dict)
    http: requests.Session = field(default_factory=lambda: open_session(64), repr=False)

    def chat(
        self, messages: list[Json], call: Call, whole: bool = False
    ) -> Iterator[str]:
        """Yield the answer as it comes, or in one piece if `whole`.

        `messages` are OpenAI's. It asks again where that may help, as long as nothing
        was yielded. Leaving the loop ends the call. Raises ProviderError.
        """
        messages = [message for message in messages if message["content"]]
        tried = 0
        while True:
            said = False
            tried += 1
            try:
                with call:
                    for chunk in self._answer(messages, call, whole):
                        said = True
                        yield chunk
                return
            except ProviderError as error:
                if said or tried >= TRIES.get(error.kind, 1):
                    raise
                _pause(error, tried, call)

    def _answer(self, messages: list[Json], call: Call, whole: bool) -> Iterator[str]:
        stream = self.service.stream or openai_stream
        chunks = visible(stream(self, messages, call))
        empty = True
        for chunk in [joined(chunks)] if whole else chunks:
            empty = empty and not chunk.strip()
            yield from [chunk] if chunk else []
        if empty:
            raise ProviderError("empty", "the answer holds no text")

    def body(self, messages: list[Json]) -> Json:
        """Return a request in OpenAI's format; null in an extra takes a field out."""
        fields = {
            "model": self.model or self.service.model,
            "messages": messages,
            "stream": True,
            self.service.cap: MAX_TOKENS,
            **self.service.extra,
            **self.extra,
        }
        return {name: value for name, value in fields.items() if value is not None}

    @contextmanager
    def post(self, path: str, body: Json, call: Call) -> Iterator[requests.Response]:
        """Send a request, yield the response if it is a 200. Raises ProviderError."""
        call.check()
        try:
            with self.http.post(
                (self.url or self.service.url).rstrip("/") + path,
                data=json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"),
                headers={
                    "Content-Type": "application/json",
                    "Accept-Encoding": "identity",
                },
                auth=_Key(self.service.token(self.key)),
                timeout=(CONNECT_TIMEOUT, max(0.1, call.left())),
                stream=True,
                allow_redirects=False,
            ) as response:
                if response.status_code != 200:
                    raise self._refusal(response, call)
                yield response
        except (requests.RequestException, HTTPError, OSError) as error:
            call.check()
            kind = "setup" if isinstance(error, _BAD_SETTING) else "busy"
            name = type(error).__name__  # its text may hold the key
            raise ProviderError(kind, f"no connection, or cut: {name}") from None

    def _refusal(self, response: requests.Response, call: Call) -> ProviderError:
        status = response.status_code
        if 300 <= status < 400:
            return ProviderError("setup", f"HTTP {status}: AI_BASE_URL is redirected")
        text = b"".join(pieces(response, call)).decode("utf-8", "replace")
        try:
            return self.error(json.loads(text), status, response.headers)
        except (ValueError, RecursionError):
            return self.error(text, status, response.headers)

    def error(
        self, body: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> ProviderError:
        """Return the error that a response's body, HTTP status and headers mean."""
        code, name, text = read_error(body)
        headers = headers or {}
        kind = (
            self.service.codes.get(code)
            or NAMES.get(code)
            or NAMES.get(name)
            or ("filter" if "SensitiveContent" in code else None)
            or STATUS.get(code[:3] if status == 200 else str(status))
            or ("busy" if status > 500 else "setup")
        )
        trace = next((headers[name] for name in TRACES if name in headers), "-")
        details = f"HTTP {status}, code {code or name or '-'}, trace {trace}: {text}"
        if self.key:
            details = details.replace(self.key, "***")
        return ProviderError(kind, details[:600], retry_after(headers))


def _pause(error: ProviderError, tried: int, call: Call) -> None:
    """Wait before the next try; raise the error if there is no time for one."""
    delay = 0.5 * 2 ** (tried - 1) * random.uniform(0.75, 1)
    delay = delay if error.wait is None else error.wait
    if delay > LONGEST_WAIT or delay >= call.left():
        raise error
    if call.stopped.wait(delay):
        call.check()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds a service asks us to wait, None if it says nothing usable."""
    wait, scale = headers.get("retry-after-ms"), 1000
    if wait is None:
        wait, scale = headers.get("Retry-After", ""), 1
    try:
        seconds = float(wait) / scale
    except ValueError:
        try:
            seconds = parsedate_to_datetime(wait).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def read_error(body: Any) -> tuple[str, str, str]:
    """Return (code, type, message) from whatever shape a service gives its errors."""
    if not isinstance(body, dict):
        return "", "", str(body)
    error, base = body.get("error"), body.get("base_resp")
    if isinstance(error, dict):
        source = error
    elif isinstance(base, dict) and base.get("status_code"):
        source = {"code": base["status_code"], "message": base.get("status_msg")}
    else:
        source = body | ({"message": error} if error else {})
    text = str(source.get("message") or source.get("msg") or source)
    in_text = re.search(r"\((\d{3,5})\)\s*$", text)  # MiniMax: "invalid api key (2049)"
    code = in_text[1] if in_text else str(source.get("code") or "")
    return code, str(source.get("type") or ""), text


def pieces(response: requests.Response, call: Call) -> Iterator[bytes]:
    """Yield a body as it arrives, until the deadline and up to LONGEST_ANSWER."""
    size = 0
    while piece := response.raw.read1(65536, decode_content=True):
        call.check()
        size += len(piece)
        if size > LONGEST_ANSWER:
            raise ProviderError("setup", f"the answer has over {LONGEST_ANSWER} bytes")
        yield piece
    call.check()


def lines(response: requests.Response, call: Call) -> Iterator[bytes]:
    """Yield a body's lines, as bytes: half a line may end within a character."""
    rest = bytearray()
    for piece in pieces(response, call):
        rest += piece
        if b"\n" in piece:
            *whole, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            yield from whole
        if len(rest) > LONGEST_LINE:
            raise ProviderError("setup", f"a line has over {LONGEST_LINE} bytes")
    yield bytes(rest)


def events(response: requests.Response, call: Call) -> Iterator[Json | None]:
    """Yield the JSON of each event, None for [DONE].

    Some services answer with one plain JSON text although a stream was asked for.
    """
    plain = []
    for line in lines(response, call):
        name, _, data = line.strip().partition(b":")
        if name == b"data" and data.strip().startswith(b"[DONE]"):
            yield None
        elif name == b"data" and data.strip():
            yield _json(data)
        elif name not in (b"", b"data", b"event", b"id", b"retry"):
            plain.append(line)
    if plain:
        yield _json(b"\n".join(plain))


def _json(text: bytes) -> Json:
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise ProviderError("busy", "the service sent what is not JSON") from None
    return value if isinstance(value, dict) else {"error": str(value)}


def openai_stream(
    provider: Provider, messages: list[Json], call: Call
) -> Iterator[str]:
    """Ask a service that has OpenAI's format and yield the text of its answer."""
    with provider.post("/chat/completions", provider.body(messages), call) as response:
        yield from new_text(_contents(provider, events(response, call)))


def _contents(
    provider: Provider, stream: Iterator[Json | None]
) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether it is the whole answer); raise unless an end was said."""
    ended = False
    for event in stream:
        if event is None:
            return
        base, choices = event.get("base_resp"), event.get("choices")
        failed = isinstance(base, dict) and base.get("status_code")
        odd = "choices" not in event and ("message" in event or "code" in event)
        if failed or odd or event.get("error"):
            raise provider.error(event)
        choice = choices[0] if isinstance(choices, list) and choices else {}
        whole = "message" in choice
        said = choice.get("message" if whole else "delta")
        if isinstance(said, dict) and isinstance(said.get("content"), str):
            yield said["content"], whole
        finish = str(choice.get("finish_reason") or "")
        if finish in NAMES:
            raise ProviderError(NAMES[finish], f"the answer ended with {finish}")
        ended = ended or bool(finish)
    if not ended:
        raise ProviderError("busy", "the answer broke off")


def new_text(chunks: Iterable[tuple[str, bool]]) -> Iterator[str]:
    """Yield what is new in chunks that hold the next words, or again all words so far.

    MiniMax was seen doing either. While every chunk begins with the one before, both
    are possible, and only the first chunk is certain: the others wait for a decision.
    """
    said = words = last = ""
    repeats, count = None, 0
    for chunk, whole in chunks:
        if repeats is None and last and chunk:
            if not chunk.startswith(last):
                repeats = False
            elif len(last) >= 8:
                repeats = True
        if repeats is not False or whole:
            words, last, count = words + chunk, chunk or last, count + bool(chunk)
        if whole or repeats:
            yield _change(said, chunk or said)
            said = chunk or said
        elif repeats is None and count == 1 and not said:
            yield chunk
            said = chunk
        elif repeats is False:
            yield words[len(said) :] + chunk
            said = words = words + chunk
    if repeats is None and count > 1:
        yield _change(said, last if count > 2 or len(said) > 1 else words)


def _change(before: str, now: str) -> str:
    return now[len(before) :] if now.startswith(before) else Replace(now)


_THOUGHT = re.compile(r"\s*(<(?:mm:)?think>.*?)?</(?:mm:)?think>\s*", re.DOTALL)
_OPEN = ("<think>", "<mm:think>", "</think>", "</mm:think>")
_LONE_CLOSE = re.compile(r"\n\s*</(?:mm:)?think>\s*|</(?:mm:)?think>[ \t]*\n\s*")
_UNSURE = re.compile(r"\s*(?:</?[a-z:]{0,8}|</(?:mm:)?think>[ \t]*)?$")


def visible(chunks: Iterable[str]) -> Iterator[str]:
    """Yield an answer without its thinking.

    Thinking comes first, in <think>…</think>, of which the opening may be missing. A tag
    quoted later, in the middle of a line, belongs to the answer.
    """
    text, started = "", False  # what was not yet yielded; whether anything was
    for chunk in chain(chunks, [None]):
        if isinstance(chunk, Replace):
            yield Replace("")
            text, started = "", False
        text += chunk or ""
        while not started and (thought := _THOUGHT.match(text)):
            text = text[thought.end() :]
        start = text.lstrip()
        if not started and start.startswith(_OPEN):
            continue
        if not started and chunk and any(tag.startswith(start) for tag in _OPEN):
            continue
        if lone := _LONE_CLOSE.search(text):
            yield Replace("")
            text, started = text[lone.end() :], False
        sure = len(text)
        if chunk is not None and (tail := _UNSURE.search(text[-64:])):
            sure -= len(tail[0])
        if text[:sure]:
            started = True
            yield text[:sure]
        text = text[sure:]


def joined(chunks: Iterable[str]) -> str:
    """Return the whole text of a stream of chunks."""
    text = ""
    for chunk in chunks:
        text = chunk if isinstance(chunk, Replace) else text + chunk
    return text


def zhipu_token(key: str) -> str:
    """Return a fresh token made from Zhipu's id.secret key; other keys serve as they are.

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


def minimax_completion(
    provider: Provider, messages: list[Json], call: Call
) -> Iterator[str]:
    """Ask as Tencent's tutorial does: MiniMax's old endpoint, a prompt in, a reply out.

    https://www.tencentcloud.com/document/product/1047/54925
    """
    try:  # an old key is a JWT that names its group; reading it decides nothing
        claims = jwt.decode(provider.key, options={"verify_signature": False})
        group = claims.get("GroupID") or claims.get("group_id")
    except jwt.PyJWTError:
        group = None
    talk = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    body = provider.body([]) | {
        "prompt": talk if messages[1:] else messages[0]["content"]
    }
    del body["messages"], body["stream"]
    path = "/text/completion" + (f"?{urlencode({'GroupId': group})}" if group else "")
    with provider.post(path, body, call) as response:
        for event in events(response, call):
            if not event or not event.get("reply"):
                raise provider.error(event)
            yield str(event["reply"])


def echo(provider: Provider, messages: list[Json], call: Call) -> Iterator[str]:
    """Say what the user said: for a machine without a key."""
    yield str(messages[-1]["content"])


_THINK_OFF: Json = {"thinking": {"type": "disabled"}}
_NO_EFFORT: Json = {"reasoning_effort": "none"}

# Addresses and models change: AI_BASE_URL and AI_MODEL take the place of these.
PROVIDERS = {
    "minimax": Service(
        "https://api.minimaxi.com/v1",
        "MiniMax-M3",
        _THINK_OFF,
        cap="max_completion_tokens",
        codes=MINIMAX,
        images=True,
    ),
    "minimax-completion": Service(
        "https://api.minimax.chat/v1",
        "abab5-completion",
        cap="tokens_to_generate",
        codes=MINIMAX,
        stream=minimax_completion,
    ),
    "zhipu": Service(
        "https://open.bigmodel.cn/api/paas/v4",
        "glm-4.7-flash",
        _THINK_OFF,
        codes=ZHIPU,
        token=zhipu_token,
    ),
    "deepseek": Service("https://api.deepseek.com", "deepseek-flash", _THINK_OFF),
    "qwen": Service(
        "https://dashscope.aliyuncs.com/compatible-mode/v1",
        "qwen3.8-flash",
        {"enable_thinking": False},
    ),
    "tokenhub": Service("https://tokenhub.tencentmaas.com/v1", "hy3", _THINK_OFF),
    "moonshot": Service("https://api.moonshot.cn/v1", "kimi-k2.6", _THINK_OFF),
    "ark": Service(
        "https://ark.cn-beijing.volces.com/api/v3",
        "doubao-seed-2-1-lite-260915",
        _THINK_OFF,
    ),
    "siliconflow": Service(
        "https://api.siliconflow.cn/v1",
        "deepseek-ai/DeepSeek-V4-Flash",
        {"enable_thinking": False},
    ),
    "openai": Service(
        "https://api.openai.com/v1",
        "gpt-6-luna",
        _NO_EFFORT,
        cap="max_completion_tokens",
        images=True,
    ),
    "openrouter": Service(
        "https://openrouter.ai/api/v1",
        "minimax/minimax-m3",
        {"reasoning": {"enabled": False}},
    ),
    "ollama": Service("http://localhost:11434/v1", "qwen3", _NO_EFFORT, keyless=True),
    "echo": Service("", "", keyless=True, stream=echo),
}
