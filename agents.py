"""AI services that remember their chats: Dify, and Tencent's ADP (智能体开发平台).

An option: without it, delete this file and its lines in SERVICES. What a service that
remembers gets and may change is told at the top of providers.py.
"""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from urllib.parse import quote

from providers import (
    Json,
    Provider,
    ProviderError,
    Question,
    Service,
    Texts,
    as_text,
    kinds,
)
from session import CallEnded, CancelScope

STOP_TIMEOUT = 5  # seconds for the call that stops Dify
LONGEST_VISITOR = 64  # bytes of a user's name for ADP
REMOTE_IMAGE: Json = {"type": "image", "transfer_method": "remote_url"}
REPEATED = 20  # characters; a piece that begins with so many is all that came before


def dify(provider: Provider, question: Question) -> Texts:
    """Ask a Dify app; begin anew if it does not know the conversation any more.

    https://docs.dify.ai/en/api-reference/chat-messages/send-chat-message
    """
    memory, task, agent = question.memory, "", False
    known = memory.get("conversation_id", "")

    def read(event: Json, parts: list[str]) -> str | Json:
        nonlocal task, agent
        task = str(event.get("task_id") or task)
        memory["conversation_id"] = str(event.get("conversation_id") or known)
        agent = agent or event.get("event") == "agent_message"
        return read_dify(event, parts, agent)

    body = provider.body(
        query=news(question),
        inputs={},
        user=memory["user"],
        conversation_id=known,
        response_mode="streaming",  # an Agent app knows no other
        files=[REMOTE_IMAGE | {"url": url} for url in pictures(question)],
    )
    path = "/chat-messages"
    try:
        yield from provider.complete(path, body, question, read)
    except CallEnded:
        path, trace = f"{path}/{quote(task, '')}/stop", question.scope.trace
        stop = (provider, path, memory["user"], trace)
        if task:
            threading.Thread(target=stop_dify, args=stop, daemon=True).start()
        raise
    except ProviderError as error:
        if error.kind != "forgotten":
            raise
        if not known:
            raise ProviderError("setup", str(error)) from None
        memory["conversation_id"] = ""
        yield from dify(provider, question)


def read_dify(event: Json, parts: list[str], agent: bool) -> str | Json:
    """Read an event of Dify's; `agent` says whether an agent_message has come.

    https://docs.dify.ai/en/api-reference/guides/streaming
    """
    match event:
        case {"event": "message_end"}:
            return "stop"
        case {"event": "error"}:
            return event
        case {"event": "message_replace", "answer": str(text)}:
            parts[:] = [text]
        case {"event": "agent_message", "answer": str(text)}:
            parts.append(text)
        case {"event": "message", "answer": str(text)}:
            # The last one of an agent is the whole answer.
            so_far = "".join(parts) if len(text) > REPEATED else ""
            if agent or len(so_far) > REPEATED and text.startswith(so_far):
                parts.clear()
            parts.append(text)
        case {"event": "workflow_finished", "data": {"status": "failed" | "stopped"}}:
            raise ProviderError("setup", "the workflow failed, or was stopped")
        case {"event": "human_input_required"}:
            raise ProviderError("setup", "the workflow waits for a human")
    return ""


def stop_dify(provider: Provider, path: str, user: str, trace: str) -> None:
    """Let Dify stop an answer that nobody waits for; if it cannot be told, it ends."""
    with suppress(Exception):
        scope = CancelScope(STOP_TIMEOUT, trace)
        with provider.send(path, {"user": user}, scope) as response:
            response.raw.read1(65536)


def adp(provider: Provider, question: Question) -> Texts:
    """Ask an app of ADP, which remembers by the session that we name.

    https://cloud.tencent.com/document/product/1759/105561
    """
    user = question.memory["user"].encode()
    digest = hashlib.sha256(user).hexdigest()
    images = [f"\n![]({url})" for url in pictures(question)]
    system = [turn["content"] for turn in question.messages if turn["role"] == "system"]
    body = provider.body(
        request_id=os.urandom(16).hex(),
        bot_app_key=provider.key,
        session_id=question.memory["session"],
        visitor_biz_id=user.decode() if len(user) <= LONGEST_VISITOR else digest,
        content=news(question) + "".join(images),
        system_role=system[0] if system else None,
        model_name=provider.model or None,
        stream="enable" if question.update_interval else "disable",
        streaming_throttle=100,  # characters, since each event repeats all before it
    )
    return provider.complete("/qbot/chat/sse", body, question, read_adp)


def read_adp(event: Json, parts: list[str]) -> str:
    """Read an event of ADP's: of those that matter each holds the text so far."""
    match event:
        case {"type": "reply", "payload": {"is_evil": True}}:
            raise ProviderError("filter", "ADP found sensitive content")
        case {"type": "reply", "payload": {"is_from_self": True}}:
            return ""  # it is our own question
        case {"type": "reply", "payload": {"content": str(text)} as reply}:
            parts[:] = [text]
            return "stop" if reply.get("is_final") else ""
    return ""


def news(question: Question) -> str:
    """Return what is new in the chat, as one text."""
    return as_text([turn for turn in question.messages if turn["role"] != "system"])


def pictures(question: Question) -> list[str]:
    """Return the URLs of the pictures in a question."""
    parts = question.messages[-1]["content"]
    if isinstance(parts, str):
        return []
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


# What is not sent to these services: they name it otherwise, or not at all.
NOT_SENT: Json = {"model": None, "max_tokens": None}
DIFY = Service(
    "https://api.dify.ai/v1",
    "",
    NOT_SENT,
    # https://docs.dify.ai/en/api-reference/guides/errors; the others by their status
    kinds(
        busy="too_many_requests internal_server_error",
        quota="rate_limit_error provider_quota_exceeded",
        forgotten="not_found conversation_completed",
    ),
    images=True,
    ask=dify,
    remembers=True,
)
ADP = Service(
    "https://wss.lke.cloud.tencent.com/v1",
    "",
    NOT_SENT,
    # Listed at the end of the page above, and of 1759/129202; all others are "setup".
    kinds(
        busy="460007 460011 460022 460031 460301 460701 460711 460712 460721 460722 "
        "460917",
        once="460020 460401",
        quota="460026 460032 460037 460702 460713 460723",
        filter="460501 460502",
        long="460034 460035",
        empty="460025",
    ),
    token=lambda key: "",  # the key is in the body
    images=True,
    ask=adp,
    remembers=True,
)
