"""Text from outside is one line, short, and without our secrets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imbot.outside import LONGEST, Secrets, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("你好，“世界” 🌏 a\\b", "你好，“世界” 🌏 a\\b"),
        ("a\r\n2026 INFO b", "a\\r\\n2026 INFO b"),
        ("\x1b[2J\x07\0", "\\x1b[2J\\x07\\x00"),
        ("a\u2028b\x85c\u202ed", "a\\u2028b\\x85c\\u202ed"),
        ("\ud800", "\\ud800"),
        (["a\n"], "['a\\n']"),
        (None, "None"),
    ],
)
def test_what_could_forge_a_line_is_escaped(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=[]), max_size=3 * LONGEST))
def test_any_text_becomes_one_short_line(text):
    shown = printable(text)
    assert shown.isprintable() and len(shown) <= LONGEST
    assert shown == text or len(text) > LONGEST or not text.isprintable()


def test_a_long_text_is_cut_visibly():
    assert printable("x" * 10**6) == "x" * (LONGEST - 1) + "…"


KEY = 'sk-"se/cret"-é'


@pytest.mark.parametrize(
    "form",
    [
        KEY,
        KEY.upper(),
        json.dumps({"key": KEY}),
        json.dumps({"key": KEY}, ensure_ascii=False),
        json.dumps(KEY).replace("/", "\\/"),
        repr(KEY.encode()),
        repr({"key": KEY + "'"}),
    ],
)
def test_a_secret_is_hidden_in_whatever_form_it_comes_back(form):
    shown = Secrets(["other-key", KEY]).hide(f"refused: {form}.")
    assert "***" in shown and "cret" not in shown.lower()


def test_a_secret_too_short_to_be_one_hides_no_words():
    assert Secrets(["ok", ""]).hide("it is ok") == "it is ok"
