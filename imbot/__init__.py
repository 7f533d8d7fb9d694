"""The parts of the bot that a fork seldom edits. botserver.py puts them together.

tencent/ reads callbacks and calls the REST API, queue/ keeps messages until they are
answered, ai/ asks the AI. prompt, delivery, replies and growing lie between them, in
the order of a message. Nothing here imports a file of the top folder.
"""
