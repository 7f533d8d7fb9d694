"""What the bot says and does without the AI: chat commands, and its few sentences.

A command is a function and a line in COMMANDS:

    def roll(chat: Chat, argument: str) -> str:
        return f"🎲 {random.randint(1, int(argument or 6))}"

    "/roll": Command(roll, "掷", zh="掷骰子", en="throw a die", takes="[sides]"),

It returns the answer. It gets what the user wrote after the command's name, in groups
without the mention. A command that takes nothing is one only if it is the whole text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from store import Store, StoreError
from tim import Message
from workers import log_failure


@dataclass(frozen=True)
class Chat:
    """Where a command was given."""

    message: Message
    conversation: str  # its key in the store
    store: Store
    language: str  # of BOT_LANGUAGE
    shared: bool  # whether a whole group shares the memory


@dataclass(frozen=True)
class Command:
    """A command's function, its Chinese name, and what it does, for /help."""

    run: Callable[[Chat, str], str]
    name: str
    zh: str
    en: str
    takes: str = ""  # the argument's name, if it has one


def show_help(chat: Chat, argument: str) -> str:
    """Say which commands there are."""
    lines = [TEXTS[chat.language]["help"]]
    for name, command in COMMANDS.items():
        about = command.zh if chat.language == "zh" else command.en
        usage = f"{name} {command.takes}".strip()
        lines.append(f"{usage} ({command.name}): {about}")
    return "\n".join(lines)


def clear(chat: Chat, argument: str) -> str:
    """Forget the chat."""
    chat.store.forget(chat.conversation)
    return TEXTS[chat.language]["clear_group" if chat.shared else "clear"]


def stop(chat: Chat, argument: str) -> str:
    """Say that the answer is stopped. The bot stops it when the command arrives."""
    return TEXTS[chat.language]["stop"]


COMMANDS = {
    "/help": Command(show_help, "帮助", zh="列出指令", en="list the commands"),
    "/clear": Command(clear, "清空", zh="忘掉这段对话", en="forget this chat"),
    "/stop": Command(stop, "停止", zh="打断正在写的回答", en="stop the answer"),
}


def find(message: Message) -> tuple[Command, str] | None:
    """Return the command that a message is, and its argument."""
    if message.kind != "question":
        return None
    first, argument = [*message.text.split(maxsplit=1), "", ""][:2]
    for name, command in COMMANDS.items():
        if first.lower() in (name, command.name) and (command.takes or not argument):
            return command, argument
    return None


def answer(chat: Chat) -> str:
    """Return the answer to a command, "" if the message is none."""
    if not (found := find(chat.message)):
        return ""
    command, argument = found
    try:
        return command.run(chat, argument)
    except StoreError:
        raise
    except Exception as error:
        log_failure(f"{chat.message.id}: the command", error)
        return TEXTS[chat.language]["command_failed"]


def is_stop(message: Message) -> bool:
    """Return whether a message stops the answer: the command, or TUIKit's button."""
    found = find(message)
    return message.kind == "stop" or bool(found and found[0].run is stop)


# Everything else that the bot says itself. Errors of the AI have the kind of their
# ProviderError as key, refusals that of store.Added.
TEXTS = {
    "zh": {
        "help": "直接发消息给我就行。也可以发送这些指令：",
        "clear": "好的，这段对话我已经忘掉了。",
        "clear_group": "好的，我已经为群里所有人忘掉了这段对话。",
        "stop": "好的，我停下了。",
        "command_failed": "这条指令没能执行，用法请见 /help。",
        "stopped": "（已停止）",
        "unsupported": "这种消息我还看不懂，请发文字给我。",
        "no_vision": "图片我还看不懂，请发文字给我。",
        "not_allowed": "抱歉，我还不能为你服务，请联系管理员。",
        "queue_full": "消息太多了，请等我答完前面的再发。",
        "rate_limited": "你发得太快了，请过一分钟再试。",
        "cut": "（回答中断了：{}）",
        "replaced": "（回答中断了，下面重新回答。）",
        "length": "（回答太长，到这里截断了。发送“继续”，我接着说。）",
        "busy": "AI 服务正忙，请稍后再试。",
        "slow": "没能及时答完，请换个简单的问法再试。",
        "quota": "AI 服务的额度已用完，请联系管理员。",
        "filter": "这个问题我不能回答，请换个话题。",
        "long": "对话太长了，请发送 /clear 重新开始。",
        "empty": "这次我没有想出答案，请换个说法再试。",
        "setup": "AI 服务的设置有误，请联系管理员。",
        "undeliverable": "我的回答没能发出来，请换个说法再试。",
    },
    "en": {
        "help": "Write to me. Or send one of these commands:",
        "clear": "I have forgotten this chat.",
        "clear_group": "I have forgotten this chat, for everybody in this group.",
        "stop": "I have stopped.",
        "command_failed": "This command failed. See /help for how it is used.",
        "stopped": "(stopped)",
        "unsupported": "I cannot read this kind of message yet. Please write to me.",
        "no_vision": "I cannot see pictures yet. Please write to me.",
        "not_allowed": "Sorry, I may not serve you yet. Please ask the administrator.",
        "queue_full": "That is a lot. Please wait until I have answered the rest.",
        "rate_limited": "You are very fast. Please try again in a minute.",
        "cut": "(The answer was cut: {})",
        "replaced": "(The answer was cut. Here it is again.)",
        "length": "(The answer is too long and was cut. Say “go on” to hear the rest.)",
        "busy": "The AI service is busy. Please try again in a moment.",
        "slow": "I could not finish in time. Please ask something simpler.",
        "quota": "The AI service's quota is used up. Please tell the administrator.",
        "filter": "I cannot answer this. Please ask something else.",
        "long": "This chat has become too long. Please send /clear to start again.",
        "empty": "I found no answer this time. Please ask in other words.",
        "setup": "The AI service is not set up rightly. Please tell the administrator.",
        "undeliverable": "My answer could not be sent. Please ask in other words.",
    },
}
