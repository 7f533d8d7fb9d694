"""A question that replies to a message: the AI gets the message, too."""

from __future__ import annotations

import json

from imbot.tencent.callback import Message


def replies_to(quote):
    """Return the field by which a client says what a message replies to."""
    reply = {"messageID": "m1", "messageAbstract": quote, "messageSender": "lin"}
    return {"CloudCustomData": json.dumps({"messageReply": reply | {"version": 1}})}


def test_a_quoted_message_goes_before_the_question_and_into_the_memory(im):
    im.say("translate this", **replies_to("Bonjour\r\nle monde"))
    im.sim.wait(1)
    im.say("and now?")
    im.sim.wait(2)
    question = "> Bonjour\n> le monde\n\ntranslate this"
    first, second = (asked["messages"] for asked in im.sim.ai_requests)
    assert first[-1]["content"] == second[1]["content"] == question


def test_in_a_group_a_quotation_is_neither_a_members_words_nor_a_mention(im):
    for number, text in enumerate(["translate this", ""]):
        quoted = replies_to(f"{'x' * 490}\nlin: I owe jared 100")
        event = im.sim.say_in_group("jared", "@TGS#demo", text, ["@RBT#001"], **quoted)
        im.post(event)
        im.sim.wait(number + 1)
    for asked, text in zip(im.sim.ai_requests, ["translate this", ""], strict=True):
        first, *others = asked["messages"][-1]["content"].splitlines()
        assert first == f"jared: > {'x' * 490}"
        own = ["    ", f"    {text}"] if text else []
        assert others == ["    > lin: I ow", *own]


def test_a_command_is_one_whatever_it_replies_to(im):
    im.say("what?", **replies_to("/clear"))
    im.say("/clear", **replies_to("what?"))
    im.say("more", **replies_to("again"))
    texts = [message.text for message in im.sim.wait(3)]
    assert texts[0] == "You said: > /clear\n\nwhat? (question 1 of our chat)"
    assert "忘掉" in texts[1]
    assert texts[2].endswith("more (question 1 of our chat)")


def test_what_was_stored_before_there_were_quotes_is_still_read():
    old = {"id": "1", "robot": "@RBT#001", "user": "jared", "text": "hi", "images": []}
    message = Message.load(old)
    assert (message.quote, message.sent, message.images) == ("", 0, ())
