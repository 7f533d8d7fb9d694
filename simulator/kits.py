"""The rules of Tencent's chat kits (TUIKit) in a one-to-one chat with a robot.

The phones' kits lock the input from a user's message until a finished chatbot element
comes; a plain text does not unlock it. The older Vue kits only append to a chatbot
element that grows. They hold the input, too, but any message frees it that is not an
unfinished element: who can write on a phone can write there, so here they never lock.
The newer kits, for React and Vue 3, draw no chatbot element, and lock nothing.
In groups none of this happens.

Read in chat-uikit-android 8.9, Chat_UIKit (Swift) 9.0 and its Objective-C kit 8.6; the
Vue kits 2.5.6 and 3.0.2 run in tests/slow/test_kits_in_npm.py.
"""

from __future__ import annotations

from typing import Any

from .messages import Json, chatbot_data, chatbot_text, is_finished

KITS = {"phone": "iOS", "vue": "Web", "react": "Web"}  # and their OptPlatform


class KitChat:
    """A user's chat with a robot in a client that is made with a kit.

    `why` says why the input is locked: "waiting" (nothing came yet), "plain" (what came
    is no chatbot element), "growing" (it is not finished); "" if it is not locked.
    `shown` has the text of each of the robot's messages by its key.
    """

    def __init__(self, kit: str) -> None:
        self.kit, self.why = kit, ""
        self.shown: dict[Any, str] = {}
        self._said: dict[Any, str] = {}  # what each message says now

    @property
    def locked(self) -> bool:
        """Whether the user cannot send another message."""
        return bool(self.why)

    def send(self, elements: list[Json]) -> None:
        """Take what the user sends; a press of the stop button asks for no answer."""
        if self.kit == "phone" and not any(map(chatbot_data, elements)):
            self.why = "waiting"

    def show(self, key: Any, elements: list[Json]) -> None:
        """Show a message of the robot's, or what it was edited to."""
        cards = [chatbot_data(element) for element in elements]
        text, before = "".join(map(self._drawn, elements)), self._said.get(key, "")
        if self.kit == "vue" and any(cards):
            self.shown[key] = self.shown.get(key, "") + beyond(before, text)
        else:
            self.shown[key] = text
        self._said[key] = text
        if self.kit == "phone" and any(cards):
            finished = all(is_finished(card) for card in cards if card)
            self.why = "" if finished else "growing"
        elif self.why == "waiting":
            self.why = "plain"

    def _drawn(self, element: Json) -> str:
        """Return an element as the kit draws it; a phone shows Markdown's stars."""
        if self.kit != "react" and (card := chatbot_data(element)):
            return chatbot_text(card)
        if element["MsgType"] == "TIMTextElem":
            return str(element["MsgContent"]["Text"])
        if element["MsgType"] == "TIMImageElem":
            return ""
        return "[unsupported message]" if self.kit == "phone" else "[custom message]"


def beyond(before: str, text: str) -> str:
    """Return text.slice(before.length), as JavaScript counts: in UTF-16."""
    shown = len(before.encode("utf-16-le", "surrogatepass"))
    rest = text.encode("utf-16-le", "surrogatepass")[shown:]
    return rest.decode("utf-16-le", "replace")
