"""The AI's side: an AI service in OpenAI's format that repeats what it is asked."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from .messages import Json

DONE = b"data: [DONE]\n\n"
MARKDOWN = """\
Here is **Markdown** as an AI writes it, with a [link](https://www.tencentcloud.com):

1. Tencent IM calls `POST /im`
2. the bot keeps the message, then asks the AI
3. the answer *grows* in the chat

| way | who sees it grow |
|---|---|
| `modify` | nearly every client |
| `custom` | TUIKit, with a stop button |

```python
print("<script>alert('only text')</script>")
```"""

MARKDOWN_ZH = """\
这是 AI 常写的 **Markdown**，带一个[链接](https://cloud.tencent.com)：

1. 腾讯云 IM 调用 `POST /im`
2. 机器人先保存消息，再去问 AI
3. 回答在聊天里*逐步*变长

| 方式 | 谁能看到它变长 |
|---|---|
| `modify` | 几乎所有客户端 |
| `custom` | TUIKit，带停止按钮 |

```python
print("<script>alert('只是文字')</script>")
```"""


class AIService:
    """An AI service, which answers with what `ai_answer` makes of the messages.

    Set `ai_fault` to a function (body) that returns an HTTP status and a body to break
    an answer, and `break_after` to cut it short. An answer in one piece takes as long
    as its stream would.
    """

    def __init__(self) -> None:
        self.ai_key = "stand-in-ai-key"
        self.ai_requests: list[Json] = []
        self.ai_ended = 0  # answers of which no more will be sent
        self.ai_delay = 0.0  # seconds before an answer
        self.ai_pace = 0.0  # seconds between two chunks of its stream
        self.break_after = 0  # chunks, after which an answer breaks off
        self.ai_answer: Callable[[list[Json]], str] = parrot
        self.ai_fault: Callable[[Json], tuple[int, Json] | None] = lambda body: None
        self._trailing: deque[str] = deque(maxlen=100)  # answers that end in "…"

    def reply_to(self, messages: list[Json]) -> str:
        """Return what the AI answers."""
        text = self.ai_answer(messages)
        if text.rstrip().endswith("…"):
            self._trailing.append(text.strip())
        return text

    def is_whole(self, text: str) -> bool:
        """Return whether a text that ends in "…" is an answer, not one that grows."""
        return any(map(text.endswith, self._trailing))

    def complete(self, headers: Any, body: bytes) -> tuple[int, Json]:
        """Return the status and either an error or {"text": the answer}."""
        if headers.get("Authorization") != f"Bearer {self.ai_key}":
            return 401, ai_error("authorized_error", "invalid api key (2049)")
        asked = json.loads(body)
        messages = asked.get("messages")
        if not messages or not all(message.get("content") for message in messages):
            return 400, ai_error("bad_request_error", "empty content (2013)")
        self.ai_requests.append(asked)
        time.sleep(self.ai_delay)
        if broken := self.ai_fault(asked):
            return broken
        text = self.reply_to(messages)
        if asked.get("thinking", {}).get("type") != "disabled":
            text = f"<think>\nI repeat it.\n</think>\n\n{text}"
        return 200, {"text": text}

    def stream(self, text: str) -> Iterator[bytes]:
        """Yield an answer as the AI service streams it."""
        step = max(4, len(text) // 300)
        for start in range(0, len(text), step):
            if self.break_after and start >= step * self.break_after:
                return
            choice = {"index": 0, "delta": {"content": text[start : start + step]}}
            yield sse({"object": "chat.completion.chunk", "choices": [choice]})
            time.sleep(self.ai_pace)
        yield sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield DONE


def whole(text: str) -> Json:
    """Return an answer as the AI service gives it in one piece."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    base = {"status_code": 0, "status_msg": ""}
    return {"choices": [choice], "base_resp": base}


def sse(data: Json | list[Json]) -> bytes:
    """Return an event of a stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def ai_error(kind: str, message: str) -> Json:
    """Return an error as MiniMax words it."""
    return {"type": "error", "error": {"type": kind, "message": message}}


def parrot(messages: list[Json], chinese: bool = False) -> str:
    """Return an answer by which a question can be known, and how much is remembered."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    last = asked[-1]
    if isinstance(last, list):  # with pictures
        pictures = [part["image_url"]["url"] for part in last[1:]]
        last = " ".join([last[0]["text"], *pictures])
    if chinese:
        return f"你说：{last}（这段对话的第 {len(asked)} 个问题）"
    return f"You said: {last} (question {len(asked)} of our chat)"


def actor(messages: list[Json]) -> str:
    """Return Markdown, or much of it, if the question says so; else be a parrot.

    The answer has the language of the question.
    """
    asked = str(messages[-1]["content"]).lower()
    chinese = re.search("[\u4e00-\u9fff]", asked) is not None
    text, part = (MARKDOWN_ZH, "第 {} 部分") if chinese else (MARKDOWN, "Part {}")
    if "long answer" in asked or "长" in asked:
        parts = (f"## {part.format(n)}\n\n{text}" for n in range(1, 25))
        return "\n\n".join(parts)
    return text if "markdown" in asked else parrot(messages, chinese)
