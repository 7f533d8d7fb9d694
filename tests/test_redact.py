"""Errors do not repeat what was said in a chat, in whatever form they have it."""

from __future__ import annotations

import json
import time

import pytest

from imbot.redact import redact

SAID = [
    "你好，我的密码是 4711-8899",
    'My card is 4929 1111 2222\nand "this" is secret.',
]
FORMS = {
    "plain": str,
    "in JSON": json.dumps,
    "in JSON in JSON": lambda text: json.dumps(json.dumps(text)),
    "as bytes": lambda text: repr(text.encode()),
    "as repr": repr,
    "in capitals": str.upper,
    "in JSON, in capitals": lambda text: json.dumps(text).upper(),
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_was_said_is_hidden_in_every_form(form, said):
    for quoted in (said, said[:26], said[3:]):
        told = redact(f"HTTP 400, code {form(quoted)}, bad", SAID)
        assert "4711" not in told and "4929" not in told and "this" not in told
        assert told.startswith("HTTP 400, code") and told.endswith(", bad")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("However, you requested 17001 tokens", "However, you should ask a doctor."),
        ("对于模型 gpt-9 无可用渠道", "对于模型的选择，看情况。"),
        ("the tokens are spent", "token"),
        ("hi is no word of this", "hi"),
    ],
)
def test_words_in_common_are_no_repetition(text, said):
    assert redact(text, [said]) == text


def test_only_the_repetition_is_hidden():
    said = "what is the airspeed of a swallow?"
    text = f"Input '{said}' is not allowed here"
    assert redact(text, [said]) == "Input '***' is not allowed here"


@pytest.mark.slow
def test_a_long_chat_costs_little():
    began = time.process_time()
    redact("no " * 2000, ["word " * 50_000, *["other"] * 100])
    assert time.process_time() - began < 2
