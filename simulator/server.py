"""The simulator: Tencent's REST API, the AI services and the chat page on one port."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from . import page
from .ai import DONE, sse, whole
from .messages import Json
from .platforms import Service
from .relay import Relay, Unreachable, passed_on
from .standin import StandIn
from .tencent import KEY

CHUNKED = {"Transfer-Encoding": "chunked"}
LONGEST_TEXT = 5000  # characters


def decoded(body: bytes) -> Any:
    """Return the JSON of a body, or else its text, of which the page shows a part."""
    with suppress(ValueError, RecursionError):
        return json.loads(body)
    return body.decode(errors="replace")[:LONGEST_TEXT]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, simulator: StandIn, port: int) -> None:
        self.simulator = simulator
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a caller hung up
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def do_GET(self) -> None:
        if not self._is_ours():
            self._answer(403, {"error": "this page is for 127.0.0.1 only"})
        elif self.path == "/":
            self._send(200, "text/html; charset=utf-8", *page.read_page())
        elif self.path == "/page":
            self._start(200, "text/event-stream", None)
            with page.visit(self.server.simulator):
                self._tell(self.server.simulator)
        else:
            self._answer(404, {"error": "404 page not found"})

    def _tell(self, simulator: StandIn) -> None:
        """Tell the page what is new; if nothing is, see whether it is still there."""
        seen: dict[str, Json] = {}
        while not simulator.closing:
            items = page.news(simulator, seen)
            seen |= {item["id"]: item for item in items}
            self.wfile.write(sse(items))
            self.wfile.flush()
            time.sleep(0.05)

    def do_POST(self) -> None:
        simulator = self.server.simulator
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            return  # the caller died
        url = urlsplit(self.path)
        is_page = url.path == "/page"
        if not self._is_ours() if is_page else "Origin" in self.headers:
            self._answer(403, {"error": "another web page may not do this"})
        elif is_page:
            self._answer(200, page.act(simulator, json.loads(body)))
        elif url.path.startswith("/v1/") and simulator.relay:
            self._relay(simulator, simulator.relay, body)
        elif url.path == "/v1/chat/completions":
            self._ai(simulator, body)
        elif service := simulator.services.get(url.path):
            self._platform(simulator, service, body)
        elif url.path.startswith("/v4/"):
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            self._im(simulator, url.path.removeprefix("/v4/"), query, body)
        else:
            self._answer(404, {"error": "404 page not found"})

    def _is_ours(self) -> bool:
        """Return whether no other web page sends this: by its form, or by its DNS."""
        host = self.headers.get("Host", "")
        ours = host.split(":")[0] in ("127.0.0.1", "localhost")
        # A container that is worked in elsewhere; no web page can send this header.
        elsewhere = f"https://{self.headers.get('X-Forwarded-Host')}"
        pages = f"http://{host}", elsewhere
        return ours and self.headers.get("Origin", pages[0]) in pages

    def _im(
        self, simulator: StandIn, command: str, query: dict[str, str], body: bytes
    ) -> None:
        with simulator.on_wire("IM", self.path, decoded(body)) as call:
            answer = simulator.rest(command, query, body)
            call |= {"status": 200 if answer else 0, "answer": answer}
            time.sleep(simulator.im_delay)
            self._answer(200, answer)

    def _ai(self, simulator: StandIn, body: bytes) -> None:
        asked, trace = decoded(body), self.headers.get("X-Client-Request-Id", "")
        with simulator.on_wire("AI", self.path, asked, trace=trace) as call:
            status, answer = simulator.complete(self.headers, body)
            call |= {"status": status, "answer": answer}
            if status != 200:
                self._answer(status, answer)
            elif asked.get("stream"):
                self._stream(simulator, simulator.stream(answer["text"]))
            else:
                self._answer_whole(simulator, answer["text"])

    def _platform(self, simulator: StandIn, service: Service, body: bytes) -> None:
        asked, trace = json.loads(body), self.headers.get("X-Client-Request-Id", "")
        with simulator.on_wire("AI", self.path, asked, trace=trace) as call:
            status, answer = service(self.headers, asked)
            call["status"] = status
            if isinstance(answer, dict):
                call["answer"] = answer
                self._answer(status, answer)
            else:
                self._stream(simulator, answer)

    def _relay(self, simulator: StandIn, relay: Relay, body: bytes) -> None:
        path, asked = self.path.removeprefix("/v1"), decoded(body)
        url, trace = relay.url + path, self.headers.get("X-Client-Request-Id", "")
        with simulator.on_wire("AI", url, asked, trace=trace) as call:
            time.sleep(simulator.ai_delay)
            if broken := simulator.ai_fault(asked):
                call |= {"status": broken[0], "answer": broken[1]}
                return self._answer(*broken)
            try:
                self._pass_on(relay, path, body, call)
            except Unreachable as error:
                call["answer"], self.close_connection = str(error), True
                if not call["status"]:  # no part of an answer is passed on
                    self._answer(502, {"error": {"message": str(error)}})

    def _pass_on(self, relay: Relay, path: str, body: bytes, call: Json) -> None:
        """Make the bot's call of a real AI service, and send it what comes."""
        arrived = bytearray()
        try:
            with relay.post(path, dict(self.headers), body, self._is_left) as (
                answer,
                rest,
            ):
                call["status"], headers = answer.status_code, passed_on(answer.headers)
                kind = headers.pop("Content-Type", "application/json")
                self._start(answer.status_code, kind, headers | CHUNKED)
                for piece in rest:
                    arrived += piece
                    self._chunk(piece)
                    self.wfile.flush()
                self._chunk(b"")
        finally:
            call["answer"] = decoded(bytes(arrived))

    def _chunk(self, piece: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _stream(self, simulator: StandIn, pieces: Iterator[bytes]) -> None:
        self._start(200, "text/event-stream", CHUNKED)
        try:
            for piece in pieces:
                self._chunk(piece)
                if simulator.ai_pace:
                    self.wfile.flush()
            self._chunk(b"")
        finally:
            simulator.ai_ended += 1

    def _answer_whole(self, simulator: StandIn, text: str) -> None:
        data, complete = json.dumps(whole(text)).encode(), False
        try:
            for piece in simulator.stream(text):
                complete = piece == DONE
                if self._is_left():
                    break
            self.close_connection = not complete
            self._start(200, "application/json", {"Content-Length": str(len(data))})
            self.wfile.write(data if complete else data[: len(data) // 2])
        finally:
            simulator.ai_ended += 1

    def _is_left(self) -> bool:
        """Return whether the caller has hung up."""
        try:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            return not self.connection.recv(1, flags)
        except (BlockingIOError, ValueError):  # or TLS, which hides it
            return False
        except OSError:
            return True

    def _answer(self, status: int, answer: Json | None) -> None:
        if answer is None:
            self.close_connection = True
        else:
            self._send(status, "application/json", json.dumps(answer).encode(), {})

    def _send(
        self, status: int, kind: str, data: bytes, headers: dict[str, str]
    ) -> None:
        self._start(status, kind, headers | {"Content-Length": str(len(data))})
        self.wfile.write(data)

    def _start(self, status: int, kind: str, headers: dict[str, str] | None) -> None:
        """Begin an answer; without headers, one that ends with the connection."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (headers or {"Connection": "close"}).items():
            self.send_header(name, value)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() + self.server.simulator.skew)

    def log_message(self, *_: Any) -> None:
        pass


class Simulator(StandIn):
    """Tencent IM and AI services on a port of 127.0.0.1; a `with` serves them."""

    def __init__(
        self, sdkappid: int = 1400000000, key: str = KEY, port: int = 0
    ) -> None:
        super().__init__(sdkappid, key)
        self._server = Server(self, port)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Simulator:
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._http.close()
