"""Asking an AI service: one call with a deadline, retries and streaming.

    for text in provider.chat(messages, CancelScope(60), update_interval=0.5):
        print(text)            # the answer so far; the last one is the whole answer

Every service keeps the same promises: it ends within the deadline, no thinking appears
in the answer, up to three tries where that may help, and any failure is a
ProviderError.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import requests
from urllib3.exceptions import HTTPError

from ..http import CallEnded, CancelScope, Session
from .errors import NAMES, STATUS, TRACES, Json, ProviderError, find_error, retry_after
from .stream import _finish, _json, events, openai_event, reads, without_thinking

CONNECT_TIMEOUT = 5  # seconds
TRIES = {"busy": 3, "once": 2}  # by ProviderError.kind; any other kind has one try
LONGEST_WAIT = 60  # seconds of Retry-After that are honoured
MAX_TOKENS = 8192  # of one answer, unless AI_EXTRA_BODY says otherwise

Texts = Iterator[str]  # the answer so far, again and again
Reader = Callable[[Json, list[str]], str | Json]  # see Provider.complete


@dataclass(frozen=True)
class Service:
    """One line of PROVIDERS."""

    ask: Callable[..., Texts]  # makes the request; see providers.py
    url: str  # "" if AI_BASE_URL has to name it
    model: str
    extra: Json = field(default_factory=dict)  # merged into every request
    codes: Mapping[str, str] = field(default_factory=dict)  # its own error codes
    token: Callable[[str], str] = str  # makes from the key what follows "Bearer"
    cap: str = "max_tokens"  # its name for the limit on an answer's tokens
    keyless: bool = False  # it may be asked without a key
    images: bool = False  # whether the model reads pictures
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
                answer = self.service.ask(self, question)
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
