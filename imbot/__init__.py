"""The parts of the bot that a fork seldom edits. botserver.py puts them together.

tencent/ reads callbacks and calls the REST API, queue/ keeps messages until they are
answered, ai/ asks the AI. prompt, delivery, replies and growing lie between them, in
the order of a message. Nothing here imports a file of the top folder.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"The bot needs Python 3.11 or newer; this is {sys.version.split()[0]}.")
