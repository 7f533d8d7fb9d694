"""HTTP to the AI services: slow servers, proxies, TLS and calls that are ended."""

from __future__ import annotations

import gzip
import logging
import socket
import ssl
import subprocess
import threading
import time
import traceback
import zlib
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection

import pytest
import requests
from conftest import (
    AI_KEY,
    ANSWER,
    FAST,
    QUESTION,
    RECORDED,
    delta,
    dribble,
    in_threads,
    sse,
)

from imbot.ai.errors import ProviderError
from imbot.ai.provider import Provider
from imbot.http import (
    CallEnded,
    CancelScope,
    Session,
    TooLarge,
    read_all,
    read_arrived,
)
from imbot.tencent.rest import Client
from imbot.timing import NORMAL
from providers import PROVIDERS

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def ai_chunked(body):
    return b"%x\r\n%b\r\n" % (len(body), body)


def silent(head):
    """Return a script that sends `head` and then nothing for long."""

    def script(connection):
        connection.sendall(head)
        connection.recv(1)

    return script


def ask_socket(url, seconds=20.0, name="openai", key=AI_KEY, interval=0.2, **fields):
    """Return every text so far."""
    fields = {"timing": FAST, **fields}
    provider = Provider(PROVIDERS[name], key, url, **fields)
    return list(provider.chat(QUESTION, CancelScope(seconds), interval))


def service(url, **fields):
    """Return the provider of a server."""
    return Provider(PROVIDERS["openai"], AI_KEY, url, timing=FAST, **fields)


def answer_of(provider, scope):
    return [*provider.chat(QUESTION, scope, 0.2)][-1]


DRIBBLES = {
    "slow headers": dribble(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
    "a slow status line": dribble(b"HTTP/1.1 200 ", b"O"),
    "many slow headers": dribble(b"HTTP/1.1 200 OK\r\n", b"X-Slow: x\r\n"),
    "no headers": silent(b""),
    "no body": silent(OK + b"\r\n"),
    "keep-alives": dribble(OK + b"\r\n", b": keep-alive\n\n"),
    "chunked keep-alives": dribble(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", ai_chunked(b": keep-alive\n\n")
    ),
    "a chunk size without end": dribble(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"
    ),
    "a slow body": dribble(OK + b"Content-Length: 9999\r\n\r\ndata: ", b"x"),
    "blank lines": dribble(OK + b"Content-Length: 9999\r\n\r\n", b"\n"),
    "a line without end": dribble(OK + b"\r\ndata: ", b"x" * 100),
    "a slow error": dribble(b"HTTP/1.1 500 Oops\r\n\r\n", b"x"),
    "a slow answer": dribble(OK + b"\r\n", sse(delta("字"), end="")),
}


@pytest.mark.parametrize("script", DRIBBLES.values(), ids=DRIBBLES)
def test_a_server_that_dribbles_cannot_hold_a_call(ai_socket, script):
    began = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        ask_socket(ai_socket(script).url, 0.3)
    assert caught.value.kind == "slow"
    assert 0.2 < time.monotonic() - began < 1.5


def test_an_address_nobody_answers_at_cannot_hold_a_call():
    with closing(socket.create_server(("127.0.0.1", 0), backlog=0)) as full:
        address = full.getsockname()
        with closing(socket.create_connection(address)):
            began = time.monotonic()
            with pytest.raises(ProviderError) as caught:
                ask_socket(f"http://127.0.0.1:{address[1]}", 0.6)
    assert caught.value.kind in ("slow", "busy")
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "cut",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nConte",
        OK + b"\r\n" + sse(delta("一"), end=""),
        OK + b"Content-Length: 999\r\n\r\n" + sse(delta("一"), end=""),
        OK
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + ai_chunked(sse(delta("一"), end="")),
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"not HTTP at all\r\n\r\n",
    ],
)
def test_a_cut_connection_is_an_error_and_tried_again(ai_socket, no_pause, cut):
    server = ai_socket(cut, cut, OK + b"\r\n" + RECORDED["openai"])
    assert ask_socket(server.url, interval=0) == [ANSWER]
    assert len(server.heads) == 3


@pytest.mark.parametrize("count", [3, 100])
def test_a_server_that_says_to_continue_says_so_a_few_times(ai_socket, no_pause, count):
    interim = b"HTTP/1.1 100 Continue\r\n\r\n" * count
    answer = OK + b"\r\n" + sse(delta(ANSWER, "stop"))
    server = ai_socket(lambda connection: connection.sendall(interim + answer))
    if count == 3:
        assert ask_socket(server.url)[-1] == ANSWER
    else:
        with pytest.raises(ProviderError, match="no connection, or cut"):
            ask_socket(server.url)


def test_nobody_listening_is_busy_and_tried_again(no_pause, monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ProviderError) as caught:
        ask_socket(f"http://127.0.0.1:{port}")
    assert caught.value.kind == "busy"


@pytest.mark.parametrize(
    "url", ["http://", "nonsense", "http://[::1", "ftp://a", "http://a b"]
)
def test_an_address_that_is_none_is_a_matter_of_the_setup(url):
    with pytest.raises(ProviderError) as caught:
        ask_socket(url, 5)
    assert caught.value.kind == "setup"


STOPPED = {
    "before the headers": silent(b""),
    "in the body": silent(OK + b"\r\n" + sse(delta("一"), end="")),
    "among keep-alives": dribble(OK + b"\r\n", b": keep-alive\n\n"),
    "in a chunked body": silent(OK + b"Transfer-Encoding: chunked\r\n\r\n"),
    "in the back-off": b"HTTP/1.1 503 Busy\r\nRetry-After: 20\r\n\r\n",
}


@pytest.mark.parametrize("script", STOPPED.values(), ids=STOPPED)
def test_a_call_is_ended_from_another_thread(ai_socket, script):
    server, call = ai_socket(script), CancelScope(30)
    provider = service(server.url)
    timer = threading.Timer(0.3, call.cancel)
    timer.start()
    began = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        list(provider.chat(QUESTION, call))
    timer.join()
    assert caught.value.kind == "stopped"
    assert 0.2 < time.monotonic() - began < 1


def test_a_stopped_call_asks_nobody(ai_socket):
    server, call = ai_socket(b""), CancelScope(30)
    call.cancel()
    with pytest.raises(ProviderError) as caught:
        list(service(server.url).chat(QUESTION, call))
    assert (caught.value.kind, server.heads) == ("stopped", [])


def test_leaving_the_loop_ends_the_call(ai_socket):
    gone = threading.Event()

    def script(connection):
        connection.sendall(OK + b"\r\n" + sse(delta("一"), end=""))
        if not connection.recv(1):
            gone.set()

    provider = Provider(PROVIDERS["openai"], AI_KEY, ai_socket(script).url)
    chunks = provider.chat(QUESTION, CancelScope(30), 0.2)
    assert next(chunks) == "一"
    chunks.close()
    assert gone.wait(5)


def keeping(body, framing=ai_chunked):
    def script(connection):
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(ai_chunked(body) + b"0\r\n\r\n")
        return True

    return script


@pytest.mark.parametrize("recorded", ["openai", "without a space", "plain JSON"])
def test_a_connection_serves_one_answer_after_another(ai_socket, recorded):
    server = ai_socket(keeping(RECORDED[recorded]))
    provider = service(server.url)
    for _ in range(3):
        call = CancelScope(20)
        assert answer_of(provider, call) == ANSWER
        call.cancel()  # it is over, so this must not cut what the next one uses
    assert len(server.heads) == 3
    assert len(server.peers) == 1


def test_a_connection_whose_body_ends_after_the_answer_serves_the_next(ai_socket):
    def script(connection):
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(ai_chunked(sse(delta(ANSWER, "stop"), end="")))
        time.sleep(0.02)
        connection.sendall(ai_chunked(sse()) + b"0\r\n\r\n")
        return True

    server = ai_socket(script)
    provider = service(server.url)
    for _ in range(3):
        assert answer_of(provider, CancelScope(20)) == ANSWER
    assert (len(server.heads), len(server.peers)) == (3, 1)


def test_stopping_a_call_does_not_cut_the_one_that_has_its_connection_now(ai_socket):
    def late(connection):
        time.sleep(0.4)
        return keeping(RECORDED["openai"])(connection)

    server = ai_socket(keeping(RECORDED["plain JSON"]), late)
    provider = service(server.url)
    first = CancelScope(20)
    chunks = provider.chat(QUESTION, first, 0.2)
    assert next(chunks)  # it was read to its end, but its reader is not through
    timer = threading.Timer(0.2, first.cancel)
    timer.start()
    assert answer_of(provider, CancelScope(20)) == ANSWER
    timer.join()
    chunks.close()
    assert (len(server.heads), len(server.peers)) == (2, 1)


def test_an_answer_is_complete_though_the_connection_stays_open(ai_socket):
    server = ai_socket(silent(OK + b"\r\n" + sse(delta("一", "stop"), end="")))
    began = time.monotonic()
    quick = replace(FAST, grace=0.1)
    assert ask_socket(server.url, 10, interval=0, timing=quick) == ["一"]
    assert time.monotonic() - began < 2


@pytest.mark.slow
def test_threads_without_end_do_not_pile_up(ai_socket):
    server = ai_socket(keeping(RECORDED["openai"]))
    provider = service(server.url)
    before = threading.active_count()
    for _ in range(20):
        answer_of(provider, CancelScope(600))
    deadline = time.monotonic() + 5
    while threading.active_count() > before + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before + 2


@pytest.mark.parametrize("url", ["https://.de", "http://[::1", "https://a..b"])
def test_an_address_that_cannot_be_is_an_error_of_requests(url):
    with pytest.raises(requests.RequestException):
        Session(url).post(f"{url}/x", b"{}", {}, (1, 1))


def test_netrc_does_not_replace_the_key(ai_socket, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server = ai_socket(OK + b"\r\n" + RECORDED["openai"])
    assert requests.utils.get_netrc_auth(server.url)  # so requests would have used it
    for name, key in (("openai", AI_KEY), ("ollama", "")):
        assert ask_socket(server.url, name=name, key=key)[-1] == ANSWER
    assert f"\nAuthorization: Bearer {AI_KEY}" in server.heads[0]
    assert "Authorization" not in server.heads[1]


def test_a_proxy_of_the_environment_is_used(ai_socket, monkeypatch):
    proxy = ai_socket(OK + b"\r\n" + RECORDED["openai"])
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    assert ask_socket("http://ai.example/v1")[-1] == ANSWER
    assert proxy.heads[0].startswith("POST http://ai.example/v1/chat/completions HTTP")
    assert f"\nAuthorization: Bearer {AI_KEY}" in proxy.heads[0]


def test_a_proxy_that_tunnels_is_used_and_cannot_hold_a_call(ai_socket, monkeypatch):
    proxy = ai_socket(dribble(b"", b"H"))
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    began = time.monotonic()
    with pytest.raises(ProviderError) as caught:
        ask_socket("https://ai.example/v1", 0.5)
    assert proxy.heads[0].startswith("CONNECT ai.example:443 HTTP/1.")
    assert AI_KEY not in proxy.heads[0]
    assert caught.value.kind == "slow"
    assert time.monotonic() - began < 1.5


def test_a_redirect_is_not_followed(ai_socket):
    other = ai_socket(OK + b"\r\n" + RECORDED["openai"])
    for status in (301, 302, 303, 307, 308):
        head = f"HTTP/1.1 {status} Moved\r\nLocation: {other.url}/x\r\n\r\n"
        server = ai_socket(head.encode())
        with pytest.raises(ProviderError) as caught:
            ask_socket(server.url)
        assert (caught.value.kind, len(server.heads)) == ("setup", 1)
    assert not other.heads


@pytest.mark.parametrize(
    "key", ["sk-se\ncret", "sk-se\r\n cret", "sk-secret密钥", "sk-\0secret"]
)
@pytest.mark.parametrize("name", ["openai", "minimax-completion"])
def test_a_key_that_no_header_can_hold_is_not_told(ai_socket, caplog, name, key):
    server = ai_socket(b"")
    with pytest.raises(ProviderError) as caught:
        ask_socket(server.url, key=key, name=name)
    try:
        raise RuntimeError("what follows") from caught.value
    except RuntimeError:
        logging.exception("it failed")
    told = caplog.text + "".join(traceback.format_exception(caught.value))
    told += repr(caught.value) + repr(Provider(PROVIDERS[name], key))
    assert caught.value.kind == "setup"
    assert "it failed" in caplog.text
    assert "cret" not in told.replace("secret(", "")
    assert not server.heads


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Return a folder with a key and a certificate of 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    made = subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
        "-keyout key -out cert -days 2 "
        "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1 "
        "-addext basicConstraints=critical,CA:TRUE "
        "-addext keyUsage=critical,keyCertSign,digitalSignature",
        shell=True,
        cwd=folder,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("openssl is not installed")
    return folder


@pytest.fixture
def tls(certificate, monkeypatch):
    """Return the context of a server whose certificate REQUESTS_CA_BUNDLE names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate / "cert"))
    return context


@pytest.mark.slow
def test_tls_is_read_and_stopped_and_ended_like_any_other(ai_socket, tls):
    server = ai_socket(
        keeping(RECORDED["openai"]),
        keeping(RECORDED["openai"]),
        dribble(OK + b"\r\n", b": x\n"),
        dribble(OK, b"X: x\r\n"),
        silent(b""),
        context=tls,
    )
    provider = service(server.url)
    for _ in range(2):
        assert answer_of(provider, CancelScope(20)) == ANSWER
    assert len(server.peers) == 1
    for seconds, stop, kind in (
        (0.3, 9, "slow"),
        (0.3, 9, "slow"),
        (9, 0.2, "stopped"),
    ):
        call, began = CancelScope(seconds), time.monotonic()
        timer = threading.Timer(stop, call.cancel)
        timer.start()
        with pytest.raises(ProviderError) as caught:
            list(provider.chat(QUESTION, call))
        timer.cancel()
        assert caught.value.kind == kind
        assert time.monotonic() - began < 1.5


FRAMINGS = {
    "chunked": (b"Transfer-Encoding: chunked\r\n\r\n", ai_chunked, b"0\r\n\r\n"),
    "a length": (b"Content-Length: %d\r\n\r\n", bytes, b""),
    "to the end": (b"Connection: close\r\n\r\n", bytes, b""),
}


def speaking(pieces, framing, seconds):
    """Return a script that sends the pieces of a body over some seconds."""

    def script(connection):
        head, wrap, end = FRAMINGS[framing]
        total = sum(map(len, pieces))
        connection.sendall(OK + (head % total if b"%" in head else head))
        for piece in pieces:
            connection.sendall(wrap(piece))
            time.sleep(seconds / len(pieces))
        connection.sendall(end)
        return framing != "to the end"

    return script


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("secure", [False, True])
def test_a_stream_is_read_at_the_pace_of_its_updates(
    ai_socket, request, monkeypatch, framing, secure
):
    context = request.getfixturevalue("tls") if secure else None
    words = [f"{number} 个字🌏 " * 40 for number in range(100)]
    body = sse(*map(delta, words), delta(finish="stop"))
    pieces = [body[start : start + 997] for start in range(0, len(body), 997)]
    server = ai_socket(speaking(pieces, framing, 0.6), context=context)
    reads = []
    monkeypatch.setattr(
        "imbot.ai.stream.read_arrived",
        lambda *given: reads.append(1) or read_arrived(*given),
    )
    texts = ask_socket(server.url, interval=0.25, timing=NORMAL)
    assert texts[-1] == "".join(words)
    assert all(texts[-1].startswith(text) for text in texts)
    assert 2 <= len(texts) <= 6
    assert len(pieces) > 60
    assert len(reads) <= 10


def test_the_end_of_an_answer_does_not_wait_for_the_next_update(ai_socket):
    pieces = [sse(delta(word), end="") for word in "abcdef"]
    server = ai_socket(speaking([*pieces, sse()], "chunked", 0.7))
    began = time.monotonic()
    assert ask_socket(server.url, interval=30.0) == ["a", "abcdef"]
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("secure", [False, True])
def test_what_has_come_does_not_wait_for_what_comes_next(ai_socket, request, secure):
    context = request.getfixturevalue("tls") if secure else None
    pieces = [sse(delta("a"), end=""), sse(delta("b"))]
    server = ai_socket(speaking(pieces, "chunked", 4.0), context=context)
    provider = service(server.url)
    began = time.monotonic()
    assert next(provider.chat(QUESTION, CancelScope(20), 0.2)) == "a"
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("place", ["read_arrived", "a rest"])
def test_a_stop_ends_a_stream_while_it_rests_too(ai_socket, place):
    timing = replace(FAST, read_every=30.0 if place == "a rest" else 0.0)
    script = silent(OK + b"\r\n" + sse(delta("a"), end=""))
    scope, texts = CancelScope(20), []
    timer = threading.Timer(0.3, scope.cancel)
    timer.start()
    began = time.monotonic()
    url = ai_socket(script).url
    provider = Provider(PROVIDERS["openai"], AI_KEY, url, timing=timing)
    with pytest.raises(ProviderError) as caught:
        texts.extend(provider.chat(QUESTION, scope, 0.1))
    timer.join()
    assert caught.value.kind == "stopped"
    assert 0.2 < time.monotonic() - began < 1.5


@pytest.mark.parametrize("interval", [0, 0.2])
@pytest.mark.parametrize("body", [RECORDED["openai"], RECORDED["plain JSON"]])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "gzip, deflate"])
def test_an_answer_is_read_though_it_was_compressed(
    ai_socket, encoding, body, interval
):
    for name in encoding.split(", "):
        body = gzip.compress(body) if name == "gzip" else zlib.compress(body)
    head = OK + f"Content-Encoding: {encoding}\r\n".encode()

    def script(connection):
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(body), 50):
            connection.sendall(ai_chunked(body[start : start + 50]))
        connection.sendall(b"0\r\n\r\n")
        return True

    server = ai_socket(script)
    provider = service(server.url)
    for _ in range(2):
        assert [*provider.chat(QUESTION, CancelScope(20), interval)][-1] == ANSWER
    assert (len(server.heads), len(server.peers)) == (2, 1)
    assert "accept-encoding: identity" in server.heads[0].lower()


def test_a_broken_compression_is_an_error_like_another(ai_socket, no_pause):
    server = ai_socket(OK + b"Content-Encoding: gzip\r\n\r\n" + b"no gzip at all")
    with pytest.raises(ProviderError) as caught:
        ask_socket(server.url)
    assert caught.value.kind == "busy"


@pytest.mark.parametrize("interval", [0, 0.2])
def test_many_answers_take_no_more_connections_than_threads(ai_socket, interval):
    server = ai_socket(keeping(RECORDED["openai"]))
    session = Session(server.url, 8)
    provider = Provider(PROVIDERS["openai"], AI_KEY, server.url, session=session)

    def work(_):
        for _ in range(10):
            answers.extend(provider.chat(QUESTION, CancelScope(60), interval))

    answers = []
    in_threads(8, work)
    assert answers.count(ANSWER) == 80
    assert len(server.peers) <= 8


def test_many_calls_of_im_take_no_more_connections_than_threads(ai_socket):
    ok = b'{"ActionStatus":"OK","ErrorCode":0,"ErrorInfo":""}'
    server = ai_socket(keeping(ok))
    client = Client(server.url, 1400000000, "administrator", lambda *_: "sig", 8)

    def work(_):
        for _ in range(20):
            answers.append(client.call("openim/sendmsg", {}))

    answers = []
    in_threads(8, work)
    assert len(answers) == 160
    assert len(server.peers) <= 8


def test_a_request_goes_out_as_one_packet(ai_socket, monkeypatch):
    packets, send = [], HTTPConnection.send

    def spy(connection, data):
        packets.append(data)
        send(connection, data)

    monkeypatch.setattr(HTTPConnection, "send", spy)
    server = ai_socket(keeping(b"{}"))
    session = Session(server.url)
    for _ in range(2):
        session.post(f"{server.url}/x", b'{"a": 1}', {}, (5, 5))
    assert len(packets) == 2
    assert all(p.startswith(b"POST /x") and p.endswith(b'{"a": 1}') for p in packets)


def test_calls_between_two_texts_are_not_under_the_scope_of_the_answer(ai_socket):
    pieces = [sse(delta(word), end="") for word in "ab"]
    ai = ai_socket(silent(OK + b"\r\n" + pieces[0]))
    im = ai_socket(dribble(b"", b"H"), keeping(b"{}"))
    provider, scope = Provider(PROVIDERS["openai"], AI_KEY, ai.url), CancelScope(20)
    for text in provider.chat(QUESTION, scope, 0.1):
        assert text == "a"
        held = scope.socket
        with pytest.raises(CallEnded), CancelScope(0.3):
            Session(im.url).post(im.url, b"{}", {}, (5, 5))
        assert Session(im.url).post(im.url, b"{}", {}, (5, 5)).json() == {}
        assert scope.socket is held
        break


def test_no_cookie_is_kept_and_no_password_of_an_address_is_sent(ai_socket):
    cookie = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\n{}"

    def answer(connection):
        connection.sendall(cookie)
        return True  # else the second call may meet the end of the first's connection

    server = ai_socket(answer)
    session, url = Session(server.url), server.url.replace("//", "//me:secret@")
    for _ in range(2):
        headers = {"Authorization": "Bearer k"}
        assert session.post(f"{url}/x", b"{}", headers, (5, 5)).json() == {}
    assert all("Authorization: Bearer k" in head for head in server.heads)
    assert not any("cookie" in head.lower() for head in server.heads)


def test_an_error_of_a_scope_that_goes_on_is_let_out_as_it_is(ai_socket):
    server, scope = ai_socket(b""), CancelScope(20)
    with pytest.raises(requests.ConnectionError), scope:
        Session(server.url).post(server.url, b"{}", {}, (5, 5))
    scope.cancel()
    with pytest.raises(CallEnded) as caught, scope:
        raise AssertionError("not to be reached")
    assert str(caught.value) == "stopped"


def test_a_whole_body_is_read_up_to_a_limit_and_its_connection_kept(ai_socket):
    server = ai_socket(keeping(b"x" * 70_000))
    session = Session(server.url)
    for _ in range(2):
        response = session.post(server.url, b"{}", {}, (5, 5))
        assert read_all(response, 70_000) == b"x" * 70_000
    assert len(server.peers) == 1
    with pytest.raises(TooLarge):
        read_all(session.post(server.url, b"{}", {}, (5, 5)), 69_999)
    assert read_all(session.post(server.url, b"{}", {}, (5, 5)), 70_000)
    assert len(server.peers) == 2  # the rest of the third was not waited for
