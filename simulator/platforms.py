"""Agent platforms, which remember their conversations: Dify, and Tencent's ADP.

Both check every field, and whose a conversation is, and answer with what `ai_answer`
makes of the conversation. Delays, faults and breaks are those of ai.py.

https://docs.dify.ai/en/api-reference/chat-messages/send-chat-message
https://cloud.tencent.com/document/product/1759/105561
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .ai import AIService, sse
from .messages import Json

Answer = tuple[int, Json | Iterator[bytes]]  # an HTTP status; a body, or a stream
Service = Callable[[Any, Json], Answer]  # headers and body -> answer

# field -> its type; a field with "?" may be missing
DIFY_FIELDS = {
    "query": str,
    "inputs": dict,
    "user": str,
    "response_mode": str,
    "conversation_id?": str,
    "files?": list,
    "auto_generate_name?": bool,
}
PICTURE = {"type": "image", "transfer_method": "remote_url"}
ADP_FIELDS = {
    "session_id": str,
    "bot_app_key": str,
    "visitor_biz_id": str,
    "content": str,
    "request_id?": str,
    "incremental?": bool,
    "streaming_throttle?": int,
    "stream?": str,
    "system_role?": str,
    "model_name?": str,
    "custom_variables?": dict,
    "search_network?": str,
}


class Conversation:
    """What a platform remembers, and whose it is."""

    def __init__(self, user: str) -> None:
        self.id, self.user = str(uuid.uuid4()), user
        self.messages: list[Json] = []


class AgentPlatforms(AIService):
    """Dify and ADP. Delete one of `dify_conversations`, and Dify has forgotten it.

    `dify_app` is the kind of the app, which decides by which events it answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dify_key = self.adp_key = self.ai_key
        self.dify_app = "chatbot"  # or "agent", "new agent", "chatflow"
        self.dify_conversations: dict[str, Conversation] = {}
        self.dify_begun: list[str] = []  # ids of all conversations there ever were
        self.dify_completed: set[str] = set()  # ids of those that do not go on
        self.dify_stopped: set[str] = set()  # ids of tasks
        self.adp_sessions: dict[str, Conversation] = {}
        self.services: dict[str, Service] = {  # path -> who answers there
            "/v1/chat-messages": self._dify,
            "/v1/qbot/chat/sse": self._adp,
        }

    def _dify(self, headers: Any, asked: Json) -> Answer:
        known, name = self.dify_conversations, asked.get("conversation_id", "")
        if headers.get("Authorization") != f"Bearer {self.dify_key}":
            told = f"no such key: {headers.get('Authorization')}"
            return dify_error(401, "unauthorized", told)
        if wrong := mistyped(asked, DIFY_FIELDS) or misdescribed(asked):
            return dify_error(400, "invalid_param", wrong)
        conversation = known.get(name)  # it may be forgotten while the answer is made
        if name and (not conversation or conversation.user != asked["user"]):
            return dify_error(404, "not_found", "Conversation Not Exists.")
        if name in self.dify_completed:
            text = "The conversation has ended. Please start a new conversation."
            return dify_error(400, "conversation_completed", text)
        if broken := self._delayed(asked):
            return broken
        if not conversation:
            conversation = Conversation(asked["user"])
            name = conversation.id
            known[name] = conversation
            self.dify_begun.append(name)
        text = self._answer_in(conversation, asked["query"])
        task = str(uuid.uuid4())
        path = f"/v1/chat-messages/{task}/stop"
        self.services[path] = partial(self._stop_dify, task, asked["user"])
        return 200, self._dify_stream(name, task, text)

    def _stop_dify(self, task: str, user: str, headers: Any, asked: Json) -> Answer:
        if headers.get("Authorization") != f"Bearer {self.dify_key}":
            return dify_error(401, "unauthorized", "Access token is invalid")
        if asked != {"user": user}:
            return dify_error(400, "invalid_param", "user is not the task's")
        self.dify_stopped.add(task)
        return 200, {"result": "success"}

    def _delayed(self, asked: Json) -> Answer | None:
        self.ai_requests.append(asked)
        time.sleep(self.ai_delay)
        return self.ai_fault(asked)

    def _answer_in(self, conversation: Conversation, text: str) -> str:
        conversation.messages.append({"role": "user", "content": text})
        answer = self.reply_to(conversation.messages)
        conversation.messages.append({"role": "assistant", "content": answer})
        return answer

    def _dify_stream(self, name: str, task: str, text: str) -> Iterator[bytes]:
        def event(kind: str, **fields: Any) -> bytes:
            ids = {"conversation_id": name, "task_id": task, "message_id": name}
            return sse({"event": kind, **ids, "created_at": 1705407629, **fields})

        is_agent = self.dify_app in ("agent", "new agent")
        yield b"event: ping\n\n"
        if is_agent:
            yield event("agent_thought", position=1, thought="I repeat it.", tool="")
        if self.dify_app == "chatflow":
            yield event("workflow_started", workflow_run_id=task, data={"id": task})
            yield event("node_finished", data={"status": "succeeded", "error": None})
        for number, piece in enumerate(pieces(text)):
            if self.break_after and number >= self.break_after:
                return
            if task in self.dify_stopped:
                break
            yield event("agent_message" if is_agent else "message", answer=piece)
            time.sleep(self.ai_pace)
        else:
            if self.dify_app == "new agent":
                yield event("message", answer=text)
        yield event("message_end", metadata={"usage": {"total_tokens": 9}})
        if self.dify_app == "chatflow":
            yield event("workflow_finished", data={"status": "succeeded"})

    def _adp(self, headers: Any, asked: Json) -> Answer:
        session, visitor = asked.get("session_id", ""), asked.get("visitor_biz_id", "")
        if "Authorization" in headers or mistyped(asked, ADP_FIELDS):
            return adp_error(400, f"a wrong field: {mistyped(asked, ADP_FIELDS)}")
        if not re.fullmatch("[a-zA-Z0-9_-]{2,64}", session) or len(visitor) > 64:
            return adp_error(400, "session_id or visitor_biz_id is not as documented")
        if asked["bot_app_key"] != self.adp_key:
            return adp_error(4505004, f"no such key: {asked['bot_app_key']}")
        if broken := self._delayed(asked):
            return broken
        conversation = self.adp_sessions.setdefault(session, Conversation(visitor))
        if conversation.user != visitor:
            return adp_error(460010, "the session is another visitor's")
        text = self._answer_in(conversation, asked["content"])
        return 200, self._adp_stream(asked, text)

    def _adp_stream(self, asked: Json, text: str) -> Iterator[bytes]:
        step = asked.get("streaming_throttle") or 5
        ends = range(step, len(text), step) if asked.get("stream") != "disable" else ()
        yield adp_reply(asked["content"], is_from_self=True, is_final=True)
        yield adp_event("thought", {"procedures": [{"name": "thought"}]})
        for number, end in enumerate(ends):
            if self.break_after and number >= self.break_after:
                return
            yield adp_reply(text[:end])
            time.sleep(self.ai_pace)
        yield adp_event("token_stat", {"status_summary": "success", "token_count": 9})
        yield adp_reply(text, is_final=True)
        yield adp_event("reference", {"references": [{"id": "1", "type": 2}]})


def pieces(text: str) -> list[str]:
    """Return a text in the pieces in which it is streamed."""
    step = max(4, len(text) // 300)
    return [text[start : start + step] for start in range(0, len(text), step)]


def mistyped(asked: Json, fields: dict[str, type]) -> str:
    """Return which field is missing, unknown or of a wrong type; "" if none is."""
    wrong = asked.keys() - {name.rstrip("?") for name in fields}
    for name, kind in fields.items():
        value = asked.get(name.rstrip("?"), None if name[-1] != "?" else kind())
        if type(value) is not kind or name[-1] != "?" and value == "":
            wrong.add(name)
    return ", ".join(sorted(wrong))


def misdescribed(asked: Json) -> str:
    """Return what else Dify does not take; an Agent app streams only."""
    for file in asked.get("files", []):
        if not file.get("url") or {**file, "url": ""} != PICTURE | {"url": ""}:
            return "files"
    return "" if asked["response_mode"] == "streaming" else "response_mode"


def dify_error(status: int, code: str, message: str) -> tuple[int, Json]:
    """Return an error as Dify words it."""
    return status, {"code": code, "message": message, "status": status}


def adp_event(kind: str, payload: Json) -> bytes:
    """Return an event of ADP's stream."""
    data = {"type": kind, "payload": payload, "message_id": "1"}
    return f"event:{kind}\ndata:{json.dumps(data, ensure_ascii=False)}\n\n".encode()


def adp_reply(text: str, **fields: bool) -> bytes:
    """Return an event that holds all text so far, or repeats the question."""
    payload: Json = {"content": text, "record_id": "1", "is_llm_generated": True}
    flags = {"is_from_self": False, "is_final": False, "is_evil": False}
    return adp_event("reply", payload | flags | fields)


def adp_error(code: int, message: str) -> Answer:
    """Return an error as ADP words it, as an event of an answer."""
    data = {"type": "error", "error": {"code": code, "message": message}}
    return 200, iter([f"event:error\ndata:{json.dumps(data)}\n\n".encode()])
