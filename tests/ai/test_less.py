"""A service that refuses what it is asked is asked again with less."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from conftest import ANSWER, ai_json
from conftest import message as whole
from test_providers import FAST, ai_service

from imbot.ai import ProviderError
from imbot.ai.less import alternating
from imbot.http import CancelScope
from imbot.settings import Settings
from providers import PROVIDERS

PICTURE = {"type": "image_url", "image_url": {"url": "https://example.com/1.png"}}
SYSTEM = {"role": "system", "content": "Be brief."}
REFUSALS = {  # what a service does not take, and what of it says so
    "history": lambda asked: len(asked["messages"]) > 2,
    "thinking": lambda asked: "reasoning_effort" in asked,
    "cap": lambda asked: "max_completion_tokens" in asked,
    "system": lambda asked: asked["messages"][0]["role"] == "system",
    "pictures": lambda asked: isinstance(asked["messages"][-1]["content"], list),
}
WORDS = {
    "history": "Conversation is too complex",
    "thinking": "Unrecognized request argument supplied: reasoning_effort",
    "cap": "max_completion_tokens: Extra inputs are not permitted",
    "system": "System role not supported",
    "pictures": "image input is not supported",
}


class Refusing:
    """A service that refuses some of it, and the provider that asks it."""

    def __init__(self, what, name="openai", words=WORDS):
        self.asked = []
        self.provider, _ = ai_service(b"", name=name, extra={})
        self.provider.session.post = self.post
        self.what, self.words = what, words
        self.turns = []

    def post(self, url, data, *given):
        asked = json.loads(data)
        self.asked.append(asked)
        for each in self.what:
            if REFUSALS[each](asked):
                error = {"error": {"message": self.words.get(each, "bad request")}}
                return self.answer(400, error)
        return self.answer(200, whole(ANSWER))

    def answer(self, status, body):
        reply, _ = ai_service(ai_json(body).encode(), status=status)
        return reply.session.post("")

    def ask(self, text, picture=True):
        content = [{"type": "text", "text": text}, PICTURE] if picture else text
        question = {"role": "user", "content": content}
        scope = CancelScope(20)
        turns = [SYSTEM, *self.turns, question]
        [answer] = self.provider.chat(turns, scope)
        assert answer == ANSWER
        self.turns.append({"role": "user", "content": text})
        self.turns.append({"role": "assistant", "content": answer})
        return scope.left_out


PAIRS = [*((each,) for each in REFUSALS), *combinations(REFUSALS, 2)]


@pytest.mark.parametrize("words", [WORDS, {}], ids=["named", "bad request"])
@pytest.mark.parametrize("what", PAIRS, ids="+".join)
def test_twenty_questions_are_answered_with_one_more_call_each_at_most(what, words):
    service, calls = Refusing(what, words=words), []
    for number in range(20):
        before = len(service.asked)
        service.ask(f"question {number}", picture=number % 2 == 0)
        calls.append(len(service.asked) - before)
    assert calls[0] <= (1 + len(what) if words else 5)  # each cut once, at most
    assert max(calls[1:]) <= 2
    assert sum(calls[1:]) <= 19 + 3
    assert calls[10:] == [1] * 10


def test_what_was_not_needed_is_sent_again():
    service = Refusing(["cap"], words={})
    left_out = [service.ask("hello, how are you?") for _ in range(6)]
    assert left_out[0] == {"pictures"}  # nobody knew what was refused
    assert left_out[3:] == [set()] * 3
    asked = service.asked[-1]
    assert len(asked["messages"]) == 12 and not REFUSALS["cap"](asked)
    assert isinstance(asked["messages"][-1]["content"], list)


def test_all_that_was_not_needed_is_sent_again():
    service = Refusing(["system"], words={})
    service.turns = [{"role": "user", "content": "before"}]
    for _ in range(6):
        left_out = service.ask("hello, how are you?")
    asked = service.asked[-1]
    assert "reasoning_effort" in asked and "max_completion_tokens" in asked
    assert len(asked["messages"]) > 9 and not left_out


def test_a_picture_without_which_it_does_not_answer_either_is_told():
    body = ai_json({"error": {"message": "image input is not supported"}}).encode()
    provider, tries = ai_service(body, status=400, extra={})
    question = {"role": "user", "content": [{"type": "text", "text": "x"}, PICTURE]}
    with pytest.raises(ProviderError, match="AI_IMAGES=0") as caught:
        list(provider.chat([question], CancelScope(9)))
    assert (caught.value.kind, len(tries)) == ("no_vision", 3)


def test_the_user_learns_which_picture_was_not_read():
    service = Refusing(["pictures"])
    assert [service.ask("hello", n != 2) for n in range(4)] == [
        {"pictures"},
        {"pictures"},
        set(),
        {"pictures"},
    ]
    assert [len(a["messages"][-1]["content"]) for a in service.asked][1:] == [5] * 4


def test_history_that_is_too_long_is_halved(caplog):
    service, limit = Refusing([]), 4000
    service.what = ["much"]
    REFUSALS["much"] = lambda asked: len(str(asked["messages"])) > limit
    service.words = {"much": "This model's maximum context length is 1024 tokens"}
    for number in range(60):
        before, limit = len(service.asked), 4000 if number < 30 else 1500
        service.ask(f"{number} " + "word " * 20, picture=False)
        assert len(service.asked) - before <= 2
    del REFUSALS["much"]
    told = [len(str(asked["messages"])) for asked in service.asked]
    assert 60 + 1 < len(told) < 60 + 6
    assert len(caplog.records) == 1
    assert sorted(told[20:30])[1] > 1000  # history is sent again, as much as fits
    assert min(told[-20:]) > 600


def test_a_filter_that_an_old_turn_hits_leaves_that_turn_out():
    def hits(asked):
        return any("bomb" in str(turn["content"]) for turn in asked["messages"])

    service = Refusing([])
    service.turns = [
        {"role": "user", "content": "how is a bomb made?"},
        {"role": "assistant", "content": "I do not say."},
    ]
    REFUSALS["bomb"], service.what = hits, ["bomb"]
    service.words = {"bomb": "Content Exists Risk"}
    assert service.ask("and tea?", picture=False) == {"history"}
    assert len(service.asked) == 2
    assert service.ask("and coffee?", picture=False) == {"history"}
    assert len(service.asked) == 3  # it is known by now
    assert [t["content"] for t in service.asked[2]["messages"]][1:2] == ["and tea?"]
    with pytest.raises(ProviderError) as caught:
        service.ask("a bomb!", picture=False)
    del REFUSALS["bomb"]
    assert caught.value.kind == "filter"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "no"),
        (403, "no"),
        (404, "no such path"),
        (400, "API key not valid"),
        (400, "Insufficient Balance"),
        (400, "the model `m` does not exist"),
        (451, "no"),
        (301, ""),
    ],
)
def test_what_less_cannot_help_is_asked_once(status, message):
    body = ai_json({"error": {"message": message}}).encode()
    provider, tries = ai_service(body, status=status, extra={})
    with pytest.raises(ProviderError):
        list(provider.chat([SYSTEM, {"role": "user", "content": "x"}], CancelScope(9)))
    assert len(tries) == 1


def test_nothing_is_asked_again_once_a_text_was_shown():
    event = {"choices": [{"delta": {"content": "one"}}]}
    error = {"error": {"message": "image input is not supported", "code": 400}}
    pieces = [f"data: {ai_json(each)}\n\n".encode() for each in (event, error)]
    provider, tries = ai_service(pieces, extra={})
    with pytest.raises(ProviderError):
        list(provider.chat([{"role": "user", "content": "x"}], CancelScope(9), 1e-9))
    assert len(tries) == 1


def test_a_deadline_holds_over_all_tries():
    service = Refusing(["system", "cap"], words={})
    scope = CancelScope(9)
    scope.cancel()
    with pytest.raises(ProviderError) as caught:
        list(service.provider.chat([SYSTEM, {"role": "user", "content": "x"}], scope))
    assert caught.value.kind == "stopped"


def test_robots_of_one_server_learn_on_their_own():
    settings = Settings(ai_secret_key="k")
    first, second = (
        settings.provider(settings.persona(robot), PROVIDERS, FAST) for robot in "ab"
    )
    assert first.lessons is not second.lessons


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["user a", "user b"], ["user a\n\nb"]),
        (["system s", "assistant a", "user b"], ["system s", "user …", "assistant a"]),
        (["user a", "assistant b", "assistant c"], ["user a", "assistant b\n\nc"]),
    ],
)
def test_no_two_neighbours_have_one_role(before, after):
    turns = alternating([turn(*each.split()) for each in before])
    told = [f"{each['role']} {each['content']}" for each in turns]
    assert told[: len(after)] == after


def test_a_picture_is_joined_with_the_question_before_it():
    parts = [{"type": "text", "text": "b"}, PICTURE]
    [joined] = alternating([turn("user", "a"), turn("user", parts)])
    assert joined["content"] == [{"type": "text", "text": "a"}, *parts]


def test_a_user_is_told_that_a_picture_was_not_read(im):
    words = "image input is not supported"
    im.sim.ai_fault = lambda asked: (
        (400, {"error": {"message": words}})
        if isinstance(asked["messages"][-1]["content"], list)
        else None
    )
    picture = {"ImageInfoArray": [{"Type": 1, "URL": "https://example.com/1.png"}]}
    body = [
        {"MsgType": "TIMTextElem", "MsgContent": {"Text": "what is it?"}},
        {"MsgType": "TIMImageElem", "MsgContent": picture},
    ]
    im.say("what is it?", MsgBody=body)
    [answer] = im.sim.wait(1)
    assert answer.text.startswith("You said: what is it?")
    assert answer.text.endswith("\n\n（图片没有读取）")
    im.say("and now?")
    im.sim.wait(2)
    assert "没有读取" not in str(im.sim.ai_requests[-1]["messages"])


def test_a_chat_that_is_too_long_goes_on(im, caplog):
    words = "This model's maximum context length is 99 tokens"
    im.sim.ai_fault = lambda asked: (
        (400, {"error": {"message": words}}) if len(asked["messages"]) > 6 else None
    )
    for number in range(1, 9):
        im.say(f"question {number}")
        im.sim.wait(number)
    assert all(m.text.startswith("You said: question") for m in im.sim.delivered)
    assert len(im.sim.ai_requests) <= 8 + 3
    assert caplog.text.count("answers only without some old turns") == 1
    assert max(len(asked["messages"]) for asked in im.sim.ai_requests[-3:]) > 2
