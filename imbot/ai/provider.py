"""Asking an AI service: one call with a deadline, retries and streaming.

    for text in provider.chat(messages, CancelScope(60), update_interval=0.5):
        print(text)            # the answer so far; the last one is the whole answer

Every service keeps the same promises: it ends within the deadline, no thinking appears
in the answer, up to three tries where that may help, and any failure is a
ProviderError.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests

from ..http import CancelScope, Session
from ..outside import SHORTEST_SECRET, printable
from ..redact import redact
from ..timing import NORMAL, Timing
from .errors import FAILURES, Json, ProviderError, error_of, failure_of
from .less import Attempts, Lessons, Question, alternating, words
from .stream import DONE, Answer, Reader, drain, events, openai_event, read_whole

CONNECT_TIMEOUT = 5  # seconds
TRIES = {"busy": 3, "once": 2}  # by ProviderError.kind; any other kind has one try
LONGEST_WAIT = 60  # seconds of Retry-After that are honoured
MAX_TOKENS = 8192  # of one answer, unless AI_EXTRA_BODY says otherwise
LONGEST_ERROR = 300  # characters
QUOTES = "\"'`“”‘’"  # that people leave around a key
UNHEARD = ("busy", "once", "slow")  # a part of the answer is better than none
ENDPOINT = re.compile(r"/(chat/completions|chat-messages|text/completion|qbot/.*)/*\Z")

Texts = Iterator[str]  # the answer so far, again and again
logger = logging.getLogger(__name__)


def openai_chat(provider: Provider, question: Question) -> Texts:
    """Ask a service that has OpenAI's format."""
    messages = alternating(question.messages)
    body = provider.body(messages=messages, stream=question.update_interval > 0)
    return provider.complete("/chat/completions", body, question)


@dataclass(frozen=True)
class Service:
    """One line of PROVIDERS."""

    url: str  # "" if AI_BASE_URL has to name it
    model: str
    extra: Json = field(default_factory=dict)  # merged into every request
    codes: Mapping[str, str] = field(default_factory=dict)  # its own error codes
    token: Callable[[str], str] = str  # makes from the key what follows "Bearer"
    cap: str = "max_tokens"  # its name for the limit on an answer's tokens
    keyless: bool = False  # it may be asked without a key
    images: bool = False  # whether the model reads pictures
    remembers: bool = False  # its chats itself
    ask: Callable[[Provider, Question], Texts] = openai_chat  # makes the request


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
        timing: Timing = NORMAL,
    ) -> None:
        self.service, self.timing = service, timing
        self.key = clean_key(key)
        self.url = url or service.url
        self.model = model or service.model
        self.extra = extra or {}  # the operator's
        self.preset: Json = {service.cap: MAX_TOKENS} | service.extra
        self.session = session or Session(self.url)
        self.lessons = Lessons()

    def chat(
        self,
        messages: list[Json],
        scope: CancelScope,
        update_interval: float = 0.0,
        memory: Json | None = None,
    ) -> Texts:
        """Yield the answer so far, every `update_interval` seconds; if 0, once, whole.

        `messages` are OpenAI's. `scope.ended` is set before the final text, which the
        caller shows with close(). It asks again where that may help, with less if the
        service refuses what it is asked (`scope.left_out` then tells "pictures" or
        "history"), as long as nothing was yielded. Leaving the loop ends the call.
        Raises ProviderError.
        """
        scope.begin()  # a slow opening or look-up does not take the AI's time
        messages = [turn for turn in messages if str(turn["content"] or "").strip()]
        if not messages:
            raise ProviderError("empty", "the question holds no text")
        memory, text, tried = memory or new_memory("operator"), "", 0
        question = Question(messages, scope, update_interval, memory)
        preset = {n: v for n, v in self.preset.items() if n not in self.extra}
        attempts = Attempts(question, self.lessons, preset, self.service.remembers)
        while True:
            try:
                for text in filter(str.strip, self._ask(attempts)):
                    yield text
                failure = None if text else ProviderError("empty", "no text came")
            except (ProviderError, *FAILURES) as error:
                failure = self._quiet(failure_of(error), messages)
            if text and (lesson := attempts.answered()):
                logger.warning("%s %s", self.model or self.url, lesson)
            if not failure:
                return
            if text:
                raise failure
            if not attempts.shrink(failure):
                tried += 1
                if not self._waited(failure, tried, scope):
                    break
        if failure.partial.strip():
            yield failure.partial
        raise attempts.explained(failure)

    def _ask(self, attempts: Attempts) -> Texts:
        """Ask once, without what the attempts leave out."""
        asker, attempts.full.scope.ended = self, False
        if "options" in attempts.less:
            asker = copy.copy(self)
            asker.preset = dict.fromkeys(self.preset)
        return self.service.ask(asker, attempts.question())

    def _waited(self, failure: ProviderError, tried: int, scope: CancelScope) -> bool:
        """Wait before another try; return False if there shall be none."""
        backoff = self.timing.backoff * 2 ** (tried - 1) * random.uniform(0.75, 1)
        delay = failure.wait or backoff
        once = failure.partial and self.service.remembers  # its workflow has run
        too_late = delay > min(LONGEST_WAIT, scope.remaining())
        if once or too_late or tried >= TRIES.get(failure.kind, 1):
            return False
        scope.cancelled.wait(delay)
        return True

    def _quiet(self, error: ProviderError, messages: list[Json]) -> ProviderError:
        """Return an error without the key, and without what was said in the chat.

        Its traceback goes, too: in a cycle with the error it would keep megabytes of an
        answer until the garbage collection.
        """
        error.__traceback__ = error.__cause__ = error.__context__ = None
        said = [words(turn) for turn in messages if turn["role"] != "system"]
        said += [self.key] if len(self.key) >= SHORTEST_SECRET else []
        error.details = printable(redact(error.details, said), LONGEST_ERROR)
        error.hint = printable(redact(error.hint, said))
        return error

    def address(self, path: str) -> str:
        """Return where a path of the service is; AI_BASE_URL may have a query."""
        base, _, query = self.url.partition("?")
        path, _, more = path.partition("?")
        queries = "&".join(filter(None, (query, more)))
        base = ENDPOINT.sub("", base.rstrip("/")) + path
        return f"{base}?{queries}" if queries else base

    def body(self, **fields: Any) -> Json:
        """Return a request's body; a null in an extra takes a field out."""
        fields |= {"model": self.model or None} | self.preset | self.extra
        return {name: value for name, value in fields.items() if value is not None}

    def complete(
        self, path: str, body: Json, question: Question, read: Reader | None = None
    ) -> Texts:
        """Send a request and yield the answer so far, without its thinking.

        `read(event, parts)` appends to `parts`, or changes them. It returns "stop" at
        the end, "" before that, or the event itself if it is an error. The default
        reads OpenAI's format. Raises ProviderError, after the last text if
        the answer is not whole.
        """
        scope = question.scope
        try:
            with self.send(path, body, scope) as response:
                if response.status_code != 200:
                    raise self.error(read_whole(response, scope), response)
                yield from self._texts(response, question, read or openai_event)
                drain(response, scope, self.timing.drain)
        except (ProviderError, *FAILURES) as error:
            failure = failure_of(error)
            address = re.sub("//[^/]*@", "//", self.address(path).partition("?")[0])
            failure.asked = f"POST {address}"
            raise failure from None

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
            return self.session.post(self.address(path), data, headers, timeout)

    def error(self, body: Json, response: requests.Response) -> ProviderError:
        """Return the error that a body, its HTTP status and headers mean."""
        return error_of(body, response, self.service.codes)

    def _texts(
        self, response: requests.Response, question: Question, read: Reader
    ) -> Texts:
        """Yield the answer so far whenever an update is due, and at its end.

        An error that ends a growing answer comes after the text that came before it.
        """
        scope, every = question.scope, question.update_interval
        answer, shown, due = Answer(read), "", 0.0
        failure: ProviderError | None = None
        try:
            for event in events(response, scope, self.timing.read_every):
                if wrong := event and answer.add(event):
                    raise self.error(wrong, response)
                if event is DONE:
                    break
                if not event:  # after each read
                    answer.check_size()
                if answer.finish:
                    scope.wait_at_most(self.timing.grace)
                elif every and not event and time.monotonic() >= due:
                    so_far = answer.text(final=False)
                    if so_far != shown:
                        yield so_far
                        shown, due = so_far, time.monotonic() + every
        except (ProviderError, *FAILURES) as error:
            if isinstance(error, ProviderError) or not answer.finish:
                failure = failure_of(error)
        scope.ended, text = True, answer.text()
        failure = failure or answer.shortfall(text)
        if failure and failure.kind in UNHEARD:
            failure.partial = text
        whole = not failure or failure.kind == "length"
        if text != shown and (every or whole):
            yield text
        if failure:
            raise failure


def clean_key(key: str) -> str:
    """Return a key without what is often pasted with it."""
    key = key.strip().strip(QUOTES).strip()
    return key.removeprefix("Bearer ").strip()


def as_text(messages: list[Json]) -> str:
    """Return a chat as one text; of a single message only what it says."""
    if not messages[1:]:
        return words(messages[0])
    return "\n".join(f"{turn['role']}: {words(turn)}" for turn in messages)


def new_memory(user: str) -> Json:
    """Return the memory of a new chat, for a service that remembers."""
    return {"session": os.urandom(16).hex(), "user": user}
