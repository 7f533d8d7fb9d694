"""The AI services: a chat goes in, the answer comes out as chunks of text.

To add a service that speaks OpenAI's format, add a line to PROVIDERS; for one that
does not, write a function like `minimax_completion` and name it there. All keep the
same promises: an end within the deadline, no thinking in the answer, three tries where
trying again may help, and a ProviderError for whatever goes wrong.
"""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import chain
from typing import Any

import jwt
import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from wire import Wire

CONNECT_TIMEOUT = 5  # seconds
TRIES = {"busy": 3, "once": 2}  # by ProviderError.kind; any other kind has one try
LONGEST_WAIT = 60  # seconds of Retry-After that are honoured
LONGEST_LINE = 1 << 20  # bytes of one event
LONGEST_ANSWER = 8 << 20  # bytes on the wire
MAX_TOKENS = 8192  # of one answer, unless AI_EXTRA_BODY says otherwise

Json = dict[str, Any]
Chunks = Iterator[str]
Content = tuple[str, bool]  # a text of the answer, and whether it is all of it so far


class ProviderError(Exception):
    """The service gave no answer; the text is for the operator, `kind` for the user.

    busy, once: it may do better later; quota: balance or allowance spent; filter: a
    content filter; long: the chat is too long; slow: no end within the deadline; empty:
    no text; setup: key, address, model or parameters are wrong; stopped: by Call.stop.
    """

    def __init__(self, kind: str, details: str, wait: float | None = None) -> None:
        super().__init__(details)
        self.kind, self.retry = kind, kind in TRIES
        self.wait = wait  # seconds, from Retry-After


class Replace(str):
    """A chunk that takes the place of all text before it."""


class Call:
    """One question: its deadline, and the means to end it from another thread.

    A timeout of `requests` bounds the wait for the next byte, not for all of them, and
    before the headers it has nothing to close. So a call knows the socket it waits on,
    and one thread watches over all calls.
    """

    here = threading.local()  # .call is what this thread is at
    open: set[Call] = set()
    watch: threading.Thread | None = None

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.stopped = threading.Event()
        self.socket: socket.socket | None = None

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
        self.shut()

    def shut(self) -> None:
        """Wake the reader, which then finds its connection cut."""
        if held := self.socket:
            with suppress(OSError, TypeError):  # closed, or TLS in a proxy's TLS
                socket.socket.shutdown(held, socket.SHUT_RDWR)

    def __enter__(self) -> Call:
        self.here.call = self
        self.open.add(self)
        if not Call.watch:
            Call.watch = threading.Thread(target=self._watch_all, daemon=True)
            Call.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open.discard(self)
        self.socket = None

    @classmethod
    def _watch_all(cls) -> None:
        while True:
            time.sleep(0.25)
            for call in cls.open.copy():
                if not call.left():
                    call.shut()


class _Watched:
    """A connection that tells the call of its thread which socket it uses."""

    sock: socket.socket | None

    def send(self, data: Any) -> None:
        if not self.sock:
            self.connect()  # type: ignore[attr-defined]
        Call.here.call.socket = self.sock
        Call.here.call.check()
        super().send(data)  # type: ignore[misc]


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if not issubclass(pool.ConnectionCls, _Watched):
            pool.ConnectionCls = type("_", (_Watched, pool.ConnectionCls), {})
        return pool


def open_wire(url: str, threads: int = 64) -> Wire:
    """Return connections to an AI service, for `threads` threads."""
    return Wire(url, threads, _Adapter)


def _kinds(**codes: str) -> dict[str, str]:
    return {code: kind for kind, listed in codes.items() for code in listed.split()}


STATUS = _kinds(busy="408 409 429", quota="402", filter="451", long="413")
NAMES = _kinds(  # what error.code, error.type or finish_reason may say
    quota="insufficient_quota exceeded_current_quota_error QuotaExceeded Arrearage "
    "SetLimitExceeded AccountOverdueError AccessDenied.Unpurchased "
    "Throttling.AllocationQuota",
    filter="content_filter DataInspectionFailed data_inspection_failed sensitive",
    long="context_length_exceeded model_context_window_exceeded",
    once="RequestTimeOut",
    busy="error network_error server_error overloaded_error ServerOverloaded",
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
TRACES = ("trace-id", "minimax-request-id", "x-mm-request-id", "x-request-id")


@dataclass(frozen=True)
class Service:
    """One line of PROVIDERS."""

    url: str
    model: str
    extra: Json = field(default_factory=dict)  # merged into every request
    codes: Mapping[str, str] = field(default_factory=dict)  # its own error codes
    token: Callable[[str], str] = str  # makes from the key what follows "Bearer"
    cap: str = "max_tokens"  # its name for the limit on an answer's tokens
    keyless: bool = False
    images: bool = False  # whether the model reads pictures
    ask: Callable[[Provider, list[Json], Call], Chunks] | None = None


@dataclass(frozen=True)
class Provider:
    """A service, with the key and the wishes of this server."""

    service: Service
    key: str = field(default="", repr=False)
    url: str = ""
    model: str = ""
    extra: Json = field(default_factory=dict)
    wire: Wire = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        key = self.key.strip().removeprefix("Bearer ").strip()
        url = (self.url or self.service.url).rstrip("/")
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "url", url)
        object.__setattr__(self, "wire", self.wire or open_wire(url))

    def chat(self, messages: list[Json], call: Call, whole: bool = False) -> Chunks:
        """Yield the answer as it comes, or in one piece if `whole`.

        `messages` are OpenAI's. It asks again where that may help, as long as nothing
        was yielded. Leaving the loop ends the call. Raises ProviderError.
        """
        said = False
        messages = [turn for turn in messages if str(turn["content"] or "").strip()]
        for tried in range(1, 4):
            try:
                for chunk in self._answer(messages, call, whole):
                    said = True
                    yield chunk
                return
            except ProviderError as error:
                delay = error.wait or 2 ** (tried - 2) * random.uniform(0.75, 1)
                too_late = delay > min(LONGEST_WAIT, call.left())
                if said or too_late or tried >= TRIES.get(error.kind, 1):
                    raise
                call.stopped.wait(delay)

    def _answer(self, messages: list[Json], call: Call, whole: bool) -> Chunks:
        if not messages:
            raise ProviderError("empty", "the question holds no text")
        chunks = (self.service.ask or openai_chat)(self, messages, call)
        empty = True
        for chunk in [joined(chunks)] if whole else chunks:
            empty = (empty or isinstance(chunk, Replace)) and not chunk.strip()
            if not empty or isinstance(chunk, Replace):
                yield chunk
        if empty:
            raise ProviderError("empty", "the answer holds no text")

    def body(self, **fields: Any) -> Json:
        """Return a request's body; a null in an extra takes a field out."""
        fields |= {"model": self.model or self.service.model}
        fields |= {self.service.cap: MAX_TOKENS, **self.service.extra, **self.extra}
        return {name: value for name, value in fields.items() if value is not None}

    def stream(self, path: str, body: Json, call: Call) -> Chunks:
        """Send a request and yield the text of the answer, without its thinking."""
        with self._post(path, body, call) as response:
            yield from visible(new_text(self._contents(response, call)))

    @contextmanager
    def _post(self, path: str, body: Json, call: Call) -> Iterator[requests.Response]:
        """Send a request, yield the response if it is a 200. Raises ProviderError."""
        call.check()
        try:
            with call, self._send(path, body, call) as response:
                if response.status_code != 200:
                    text = b"\n".join(lines(response, call))
                    raise self.error(_json(text), response)
                yield response
                _finish(response, call)
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            call.check()
            kind = "setup" if isinstance(error, ValueError) else "busy"
            name = type(error).__name__  # its text may hold the key
            raise ProviderError(kind, f"no connection, or cut: {name}") from None

    def _send(self, path: str, body: Json, call: Call) -> requests.Response:
        # The first is for each address of a host, and it may have several.
        timeout = (min(CONNECT_TIMEOUT, call.left() / 4 + 0.1), call.left() + 1)
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        return self.wire.post(self.url + path, data, self._headers(), timeout, True)

    def _headers(self) -> dict[str, str]:
        token = self.service.token(self.key)
        if not (token.isascii() and token.isprintable()):
            raise ProviderError("setup", "AI_SECRET_KEY has a character no key has")
        key = {"Authorization": f"Bearer {token}"} if token else {}
        return {"Accept-Encoding": "identity", **key}

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

    def _contents(self, response: requests.Response, call: Call) -> Iterator[Content]:
        """Yield what the events of an answer hold; raise unless an end is said."""
        for event in events(response, call):
            if event is None:
                return
            if find_error(event):
                raise self.error(event, response)
            choices = event.get("choices")
            choice = _dict(choices[0]) if isinstance(choices, list) and choices else {}
            message = choice.get("message")
            text = _dict(message or choice.get("delta")).get("content")
            text = text or event.get("reply")
            if text and isinstance(text, str):
                yield text, bool(message)
            finish = str(choice.get("finish_reason") or "")
            if finish in NAMES:
                raise ProviderError(NAMES[finish], f"the answer ended with {finish}")
            if finish:
                return
        raise ProviderError("busy", "the answer broke off")


def _finish(response: requests.Response, call: Call) -> None:
    """Read what follows an answer, so that the connection can serve the next."""
    with suppress(HTTPError, OSError):
        if call.socket:
            call.socket.settimeout(0.05)
        for _ in range(3):
            if not response.raw.read1(65536):
                break


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds a service asks us to wait, None if it says nothing usable."""
    for name, unit in (("retry-after-ms", 1000), ("Retry-After", 1)):
        text, seconds = headers.get(name, ""), 0.0
        try:
            seconds = float(text) / unit
        except ValueError:
            with suppress(ValueError, OverflowError):
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
        if 0 < seconds < float("inf"):
            return seconds
    return None


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def find_error(body: Json) -> Json:
    """Return the part of a body that tells of an error, nothing if there is none."""
    error, base = body.get("error"), _dict(body.get("base_resp"))
    if error:
        return error if isinstance(error, dict) else {**body, "message": error}
    if str(base.get("status_code") or 0) != "0":
        return {"code": base["status_code"], "message": base.get("status_msg")}
    odd = "choices" not in body and ("message" in body or "code" in body)
    return body if odd else {}


def lines(response: requests.Response, call: Call) -> Iterator[bytes]:
    """Yield a body's lines as they arrive, as bytes: a piece may end in a character."""
    rest, size = bytearray(), 0
    while piece := response.raw.read1(65536, decode_content=True):
        call.check()
        size += len(piece)
        rest += piece
        if b"\n" in piece:
            *whole, last = bytes(rest).split(b"\n")
            rest = bytearray(last)
            yield from whole
        if len(rest) > LONGEST_LINE or size > LONGEST_ANSWER:
            raise ProviderError("setup", "the service sent more than an answer can be")
    call.check()
    call.socket = None  # from here on it may serve another call
    yield bytes(rest)


def events(response: requests.Response, call: Call) -> Iterator[Json | None]:
    """Yield the JSON of each event, None for the end if one is said.

    Some services answer with one plain JSON text although a stream was asked for.
    """
    plain = []
    for line in lines(response, call):
        name, _, data = line.strip().partition(b":")
        if name == b"data" and data.strip():
            yield None if data.strip() == b"[DONE]" else _json(data)
        elif name not in (b"", b"data", b"event", b"id", b"retry"):
            plain.append(line)
    if plain:
        yield _json(b"\n".join(plain))
        yield None


def _json(text: bytes) -> Json:
    """Return the object a text holds, or an error's if it holds none."""
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError):  # cut, or a page of HTML at a wrong address
        kind = "" if text.lstrip().startswith(b"<") else "server_error"
        told = "broken JSON" if b"{" in text else text.decode("utf-8", "replace")
        value = {"error": {"type": kind, "message": told}}
    return value if isinstance(value, dict) else {"error": str(value)}


def new_text(chunks: Iterable[Content]) -> Chunks:
    """Yield what is new in chunks that hold the next words, or again all words so far.

    MiniMax was seen doing either. Short chunks may look like both ("1", "10"): as long
    as each begins with the one before they count as all words so far.
    """
    said, joint, kind = "", "", ""  # the answer; all chunks in a row; what they hold
    for chunk, whole in chunks:
        longer = len(chunk) > len(said) and chunk.startswith(said)
        if longer and len(said) >= 8:
            kind = "snapshots"
        if chunk == said and len(said) >= 8:
            continue
        if kind == "deltas" and not whole:
            said += chunk
            yield chunk
            continue
        joint += chunk
        if not (whole or longer or kind):
            kind, chunk = "deltas", joint
        yield chunk[len(said) :] if chunk.startswith(said) else Replace(chunk)
        said = chunk


_TAG = re.compile(r"(</?(?:mm:)?think>\s{0,9})")
# An end of a text that may go on as a tag, as the space after one, or as an emoji.
_OPEN = re.compile(r"(?:<[/a-z:]{0,9}|</?(?:mm:)?think>\s{0,8}|[\ud800-\udbff])\Z")
_QUOTES = " \t`'\"“‘「『《（([*"


def visible(chunks: Iterable[str]) -> Chunks:
    """Yield an answer without its thinking.

    Thinking comes first, in <think>…</think>, of which the opening may be missing. Tags
    quoted later, in the middle of a line, belong to the answer.
    """
    place, kind, before = "start", str, "\n"
    for text in _tags_apart(chunks):
        opens = text.startswith(("<think>", "<mm:think>"))
        closes = text.startswith(("</think>", "</mm:think>"))
        if isinstance(text, Replace):
            place, kind = "start", Replace
        elif place == "thinking":
            place = "start" if closes else place
        elif place == "start" and (opens or closes or text.isspace()):
            place = "thinking" if opens else place
        elif place == "answer" and closes and (before not in _QUOTES or "\n" in text):
            place, kind = "start", Replace
        else:
            text = text.lstrip() if place == "start" else text
            place = "quoting" if opens or place == "quoting" else "answer"
            yield kind(text)
            kind, before = str, text[-1]
    if kind is Replace:
        yield Replace("")


def _tags_apart(chunks: Iterable[str]) -> Chunks:
    """Yield the same text cut anew: each tag alone, with the white space after it."""
    rest = ""
    for chunk in chain(chunks, [None]):
        if isinstance(chunk, Replace):
            rest = ""
            yield Replace("")
        rest += chunk or ""
        half = _OPEN.search(rest) if chunk is not None else None
        end = half.start() if half else len(rest)
        sure = rest[:end].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield from filter(None, _TAG.split(sure))
        rest = rest[end:]


def joined(chunks: Iterable[str]) -> str:
    """Return the whole text of a stream of chunks."""
    parts: list[str] = []
    for chunk in chunks:
        if isinstance(chunk, Replace):
            parts.clear()
        parts.append(chunk)
    return "".join(parts)


def openai_chat(provider: Provider, messages: list[Json], call: Call) -> Chunks:
    """Ask a service that has OpenAI's format."""
    body = provider.body(messages=messages, stream=True)
    return provider.stream("/chat/completions", body, call)


def minimax_completion(provider: Provider, messages: list[Json], call: Call) -> Chunks:
    """Ask as Tencent's tutorial does: MiniMax's old endpoint, a prompt in, a reply out.

    https://www.tencentcloud.com/document/product/1047/54925
    """
    try:  # an old key is a JWT that names its group; reading it decides nothing
        claims = jwt.decode(provider.key, options={"verify_signature": False})
    except jwt.PyJWTError:
        claims = {}
    group = claims.get("GroupID") or claims.get("group_id")
    path = f"/text/completion?GroupId={group}" if group else "/text/completion"
    talk = [f"{turn['role']}: {words(turn)}" for turn in messages] + ["assistant:"]
    prompt = "\n".join(talk) if messages[1:] else words(messages[0])
    return provider.stream(path, provider.body(prompt=prompt), call)


def echo(provider: Provider, messages: list[Json], call: Call) -> Chunks:
    """Say what the user said: for a machine without a key."""
    yield words(messages[-1])


def words(turn: Json) -> str:
    """Return the text of a message, of which pictures may be a part."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


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


OFF: Json = {"thinking": {"type": "disabled"}}
NO_EFFORT: Json = {"reasoning_effort": "none"}
NOT_ENABLED: Json = {"enable_thinking": False}
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
        "https://dashscope.aliyuncs.com/compatible-mode/v1",
        "qwen3.8-flash",
        NOT_ENABLED,
    ),
    "tokenhub": Service("https://tokenhub.tencentmaas.com/v1", "hy3", OFF),
    "moonshot": Service("https://api.moonshot.cn/v1", "kimi-k2.6", OFF),
    "ark": Service(
        "https://ark.cn-beijing.volces.com/api/v3", "doubao-seed-2-1-lite-260915", OFF
    ),
    "siliconflow": Service(
        "https://api.siliconflow.cn/v1", "deepseek-ai/DeepSeek-V4-Flash", NOT_ENABLED
    ),
    "openai": Service(
        "https://api.openai.com/v1", "gpt-6-luna", NO_EFFORT, cap=CAP, images=True
    ),
    "openrouter": Service(
        "https://openrouter.ai/api/v1",
        "minimax/minimax-m3",
        {"reasoning": {"enabled": False}},
    ),
    "ollama": Service("http://localhost:11434/v1", "qwen3", NO_EFFORT, keyless=True),
    "echo": Service("", "", keyless=True, ask=echo),
}
