"""A stand-in for Tencent IM and for an AI service, on this machine, with no account.

    python -m simulator     a bot, a conversation with it, and a chat page

The tests and the benchmark use the same stand-in: real HTTP on loopback, signed
callbacks, REST calls that are checked as strictly as Tencent documents them, its error
codes and its de-duplication. Nothing deployed imports this package.

Imports run one way, and so may you read: messages, kits, history, tencent, wire; ai,
platforms; standin, which puts them together and has what users do; page, server (the
Simulator), bot.
"""

from .ai import actor, ai_error
from .bot import BotProcess, free_port, interrupt_on_signals, lifeline, running
from .kits import KitChat
from .messages import Delivered, Json, c2c_event, group_event, text_body
from .page import PACE
from .server import Simulator
from .signature import Refused, check_user_sig
from .tencent import KEY

__all__ = [
    "KEY",
    "PACE",
    "BotProcess",
    "Delivered",
    "Json",
    "KitChat",
    "Refused",
    "Simulator",
    "actor",
    "ai_error",
    "c2c_event",
    "check_user_sig",
    "free_port",
    "group_event",
    "interrupt_on_signals",
    "lifeline",
    "running",
    "text_body",
]
