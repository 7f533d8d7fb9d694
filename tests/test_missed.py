"""Messages whose callbacks failed are looked up and answered, and nothing else is."""

from __future__ import annotations

import signal
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress

import pytest
import requests
from conftest import Caller, idle, poll, said_to

import botserver
from imbot import missed
from imbot.queue.workers import Job
from imbot.tencent import callback, history, rest
from simulator import BotProcess, text_body
from simulator.history import LOOKUPS

ROBOT, GROUP = "@RBT#001", "@TGS#demo"
LIST, ROAM, IN_GROUP = LOOKUPS
USERS = [f"user{number}" for number in range(60)]
MESSAGES, A_SECOND = 600, 50


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let bots in this process make as many calls as they like."""
    monkeypatch.setattr(missed, "RATE", 500)


class Bots:
    """A bot that is stopped and started again, as if it had been away for long."""

    def __init__(self, sim, make_app):
        self.sim, self.make_app, self.settings = sim, make_app, {}

    def start(self, **settings):
        """Start it; return when it has looked what it missed."""
        self.settings |= settings
        app = self.make_app(**self.settings)
        self.im, self.bot = Caller(self.sim, app.test_client()), app.extensions["bot"]
        self.store = self.bot.store
        if self.bot.missed:
            name = missed.server_name()
            poll(lambda: name in (self.store.get("well") or {}))
        poll(lambda: idle(self.im))
        return self

    def stop(self, away=8.0):
        """Stop it; the next to start finds that a server went so many seconds ago."""
        self.bot.close(drain=5)
        self.store.put("well", {"a server": time.time() - away})

    def answered(self, chat="jared"):
        poll(lambda: idle(self.im))
        return said_to(self.sim, chat)


@pytest.fixture
def bots(sim, make_app):
    return Bots(sim, make_app)


@pytest.fixture
def stopped(bots):
    """A bot that has answered "before" and is stopped."""
    bots.start().im.say("before")
    bots.sim.wait(1)
    poll(lambda: idle(bots.im))
    bots.stop()
    return bots


def test_what_was_written_while_no_server_ran_is_answered_once_and_in_order(stopped):
    sim, texts = stopped.sim, [f"during {number}" for number in range(5)]
    for text in texts:
        sim.say("jared", ROBOT, text)
        sim.say("lin", ROBOT, text)
    stopped.start()
    assert stopped.answered("jared") == ["before", *texts]
    assert stopped.answered("lin") == texts
    assert set(sim.looked_up.values()) == {1}
    stopped.stop()
    stopped.start()
    assert len(sim.delivered) == 11 and sim.looked_up[ROBOT, "lin"] == 2


@pytest.fixture
def unlisted(monkeypatch):
    """Let the list of conversations wait for an event, which is returned."""
    listed, conversations = threading.Event(), history.History.conversations

    def wait(*about):
        assert listed.wait(10)
        yield from conversations(*about)

    monkeypatch.setattr(history.History, "conversations", wait)
    return listed


def test_a_callback_that_comes_before_the_look_up_waits_for_it(stopped, unlisted):
    sim = stopped.sim
    events = [sim.say("jared", ROBOT, f"during {n}") for n in range(3)]
    im = Caller(sim, stopped.make_app().test_client())
    assert im.say("after").status_code == 200
    assert im.post(events[1]).status_code == 200
    sim.wait(5)
    unlisted.set()
    poll(lambda: idle(im))
    texts = ["before", "during 0", "during 1", "during 2", "after"]
    assert said_to(sim, "jared") == texts
    numbers = [message.number for message in sim.delivered]
    assert numbers == sorted(numbers)  # so clients show it, if one second brought it
    assert sim.looked_up[ROBOT, "jared"] == 1


def test_after_two_outages_in_a_row_a_conversation_is_looked_up_once(stopped):
    sim, store, since = stopped.sim, stopped.store, int(time.time()) - 8
    sim.say("jared", ROBOT, "first")
    window = {"id": "missed\t1.0", "since": since, "at": time.time()}
    store.put("missed", window)  # an outage that was not caught up when the next began
    chat = callback.Message("", ROBOT, "jared", "").conversation()
    id = f"{window['id']}\t{chat}"
    task = callback.Message(id, ROBOT, "jared", "", kind="missed", sent=since)
    store.add(id, chat, task.data(), reply="")
    sim.say("jared", ROBOT, "second")
    stopped.stop(away=6.0)
    stopped.start()
    assert stopped.answered() == ["before", "first", "second"]
    assert sim.looked_up[ROBOT, "jared"] == 1


def test_a_conversation_is_looked_up_from_where_it_was_looked_up_last(stopped):
    """Also if outages follow one another so soon that their windows are one."""
    sim, asked = stopped.sim, []
    sim.fault = lambda command, body: (
        asked.append(body["MinTime"]) if command == ROAM else None
    )
    sim.say("jared", ROBOT, "first")
    stopped.start()
    stopped.stop()
    sim.say("jared", ROBOT, "second")
    stopped.start()
    assert stopped.answered() == ["before", "first", "second"]
    assert len(asked) == 2 and asked[1] >= asked[0] + 7


def test_of_one_second_tencents_order_holds(stopped, unlisted):
    """Callbacks of this second came before what was missed, in between, and after."""
    sim, now = stopped.sim, int(time.time())
    events = [sim.say("jared", ROBOT, text, MsgTime=now) for text in "abcde"]
    for event in events[::2]:
        [message] = callback.parse("Bot.OnC2CMessage", event)
        stopped.bot.accept(message)
    im = Caller(sim, stopped.make_app().test_client())
    sim.wait(6)
    unlisted.set()
    poll(lambda: idle(im))
    assert said_to(sim, "jared") == ["before", *"abcde"]
    numbers = [message.number for message in sim.delivered]
    assert numbers == sorted(numbers)  # so clients show it, if one second brought it


def test_what_needs_no_answer_is_left(stopped):
    """Recalled, /stop, the stop button, another robot's, and what a later message had
    overtaken before the outage."""
    sim, now = stopped.sim, int(time.time())
    overtaken = sim.say("jared", ROBOT, "overtaken", MsgTime=now - 10)
    keep_as_answered(stopped, sim.say("jared", ROBOT, "known", MsgTime=now - 9))
    sim.recall(sim.say("jared", ROBOT, "recalled"))
    sim.say("jared", ROBOT, "/stop")
    button = {"Data": '{"chatbotPlugin": 2, "src": 22, "msgKey": "1_2_3"}'}
    body = [{"MsgType": "TIMCustomElem", "MsgContent": button}]
    sim.say("jared", ROBOT, "", MsgBody=body)
    sim.say("jared", ROBOT, "online only", OnlineOnlyFlag=1)
    sim.say("jared", ROBOT, "wanted")
    stopped.start()
    assert stopped.answered() == ["before", "wanted"]
    assert overtaken in sim.said


def keep_as_answered(bots, event):
    [message] = callback.parse("Bot.OnC2CMessage", event)
    about = (message.id, message.conversation(), message.data())
    bots.store.add(*about, sent=message.sent)
    claim = bots.store.claim()
    assert claim.id == message.id and bots.store.save_reply(claim, "yes", {})
    assert bots.store.finish(claim)


def test_what_the_network_lost_between_two_outages_does_not_come_after_later_answers(
    stopped,
):
    """A window that is opened soon after another begins where that one did."""
    sim, now = stopped.sim, int(time.time())
    window = {"id": "missed\t1.0", "since": now - 60, "began": now - 60}
    stopped.store.put("missed", window | {"at": now - 30})
    lost = sim.say("jared", ROBOT, "lost", MsgTime=now - 20)
    keep_as_answered(stopped, sim.say("jared", ROBOT, "later", MsgTime=now - 15))
    sim.say("jared", ROBOT, "missed")
    stopped.start()
    assert stopped.answered() == ["before", "missed"]
    assert lost in sim.said


def test_long_lists_are_read_to_their_end(stopped):
    sim = stopped.sim
    users = [f"user{number}" for number in range(sim.conversations_page + 5)]
    sim.users |= {*users}
    for user in users:
        sim.say(user, ROBOT, "during")
    texts = [str(number) for number in range(2 * sim.messages_page + 5)]
    for text in texts:
        sim.say("jared", ROBOT, text)
    for number in range(70):
        robots = [ROBOT] if number % 30 == 0 else []
        sim.say_in_group("lin", GROUP, str(number), robots)
    stopped.start(max_waiting=100, rate_limit=0)
    assert stopped.answered() == ["before", *texts]
    assert all(stopped.answered(user) == ["during"] for user in users)
    answers = [text.split()[-1] for text in stopped.answered(GROUP)]
    assert answers == ["0", "30", "60"]
    assert sim.lookups[LIST] == 3  # 2 of one robot's, 1 of the other's
    assert sim.lookups[ROAM] == len(users) + 3


@pytest.mark.parametrize("memory", ["group", "member"])
def test_in_a_group_a_mention_in_the_text_is_looked_for(
    stopped, memory, tmp_path, monkeypatch
):
    sim = stopped.sim
    robots = {ROBOT: botserver.Persona(nick="Ada")}

    def write(text, user="jared", **fields):
        body = text_body(text)
        sim.say_in_group(user, GROUP, "", [ROBOT], MsgBody=body, **fields)

    for text in ("@Ada one", "＠ada two", f"@{ROBOT} three", "@Adam four", "five Ada"):
        write(text)
    write("@Ada lin's", user="lin")
    write("@Ada in a topic", TopicId="a topic")
    sim.recall(sim.say_in_group("jared", GROUP, "recalled", [ROBOT]))
    sim.say_in_group("jared", GROUP, "the other's", ["@RBT#002"])
    stopped.start(robots=robots, group_memory=memory, rate_limit=0)
    said = Counter(text.removeprefix("@") for text in stopped.answered(GROUP))
    asked = Counter(
        asked["messages"][-1]["content"].removeprefix("jared: ").removeprefix("lin: ")
        for asked in sim.ai_requests
    )
    assert asked == Counter(["before", "one", "two", "three", "lin's", "the other's"])
    assert sum(said.values()) == 5


def test_what_the_limits_refuse_is_refused_without_a_word(stopped):
    sim = stopped.sim
    for number in range(5):
        sim.say("jared", ROBOT, f"during {number}")
    sim.say("lin", ROBOT, "not allowed")
    stopped.start(rate_limit=3, allow_users=("jared",))
    assert stopped.answered() == ["before", "during 0", "during 1"]
    assert len(sim.delivered) == 3


def test_a_full_queue_refuses_without_a_word(stopped):
    sim = stopped.sim
    for number in range(9):
        sim.say("jared", ROBOT, f"during {number}")
    stopped.start(max_waiting=4, rate_limit=0)  # the look-up itself is one of them
    assert stopped.answered() == ["before", *(f"during {n}" for n in range(3))]


def test_a_fresh_store_catches_up_nothing(sim, bots):
    sim.say("jared", ROBOT, "to nobody")
    bots.start().im.say("hello")
    assert bots.answered() == ["hello"] and not sim.lookups


def test_nothing_is_looked_up_if_catch_up_is_0(stopped):
    sim = stopped.sim
    sim.say("jared", ROBOT, "during")
    stopped.start(catch_up=0).im.say("after")
    assert stopped.answered() == ["before", "after"] and not sim.lookups


def test_only_catch_up_seconds_are_looked_up(stopped):
    sim, now = stopped.sim, int(time.time())
    stopped.stop(away=3000)
    sim.say("jared", ROBOT, "too old", MsgTime=now - 60 - 2 * history.MARGIN)
    sim.say("jared", ROBOT, "new", MsgTime=now - 50)
    stopped.start(catch_up=60)
    assert stopped.answered() == ["before", "new"]


def test_after_a_short_restart_messages_wait_until_it_is_noticed(stopped):
    """It was away for less than two beats, as it seems to a server that starts."""
    sim, store = stopped.sim, stopped.store
    sim.say("jared", ROBOT, "during")
    store.put("well", {"a server": time.time() - 0.7})
    im = Caller(sim, stopped.make_app().test_client())
    assert im.say("after").status_code == 200
    sim.wait(3)
    assert said_to(sim, "jared") == ["before", "during", "after"]


def test_a_server_that_starts_beside_others_that_are_well_looks_nothing_up(stopped):
    sim, store, name = stopped.sim, stopped.store, missed.server_name()
    beats = threading.Event()

    def beat():
        while not beats.wait(0.2):
            well = store.get("well")
            store.put("well", well | {"a server": time.time()})

    store.put("well", {"a server": time.time()})
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        sim.say("jared", ROBOT, "to the other")
        stopped.start()
        began = store.get("well")[name]
        poll(lambda: store.get("well")[name] > began + 2 * missed.OTHERS_GAP)
    finally:
        beats.set()
        thread.join()
    assert stopped.answered() == ["before"] and not sim.lookups


def test_a_server_that_starts_takes_the_place_of_one_that_fell_silent(stopped):
    sim, now = stopped.sim, time.time()
    stopped.store.put("well", {"well": now, "silent": now - 8, "gone": now - 7000})
    sim.say("jared", ROBOT, "to the silent one")
    stopped.start()
    assert stopped.answered() == ["before", "to the silent one"]
    well = stopped.store.get("well")
    assert well.keys() >= {"well"} and not well.keys() & {"silent", "gone"}


def test_a_server_that_is_well_leaves_one_that_falls_silent_to_the_next(
    bots, monkeypatch
):
    """Also if it has just begun itself, as when they are restarted by turns."""
    name = missed.server_name()
    bots.start()
    well = bots.store.get("well")
    bots.store.put("well", well | {"silent": time.time()})
    end = time.time() + missed.OTHERS_GAP + 1
    poll(lambda: bots.store.get("well").get(name, 0) > end)
    assert bots.store.get("well").keys() == {name, "silent"}
    monkeypatch.setattr(missed, "AWAY", 1.0)
    poll(lambda: bots.store.get("well").keys() == {name})
    assert not bots.sim.lookups


@contextmanager
def locked(path):
    with closing(sqlite3.connect(path, timeout=10)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


def test_a_refused_callback_is_answered_before_the_next(sim, bots, tmp_path):
    bots.start(rate_limit=0)
    bots.im.say("before")
    with locked(tmp_path / "bot.db"):
        assert bots.im.say("refused").status_code == 503
    poll(lambda: bots.im.say("after").status_code == 200)
    poll(lambda: len(sim.delivered) == len(sim.said))
    texts = bots.answered()
    assert texts[:2] == ["before", "refused"] and {*texts[2:]} == {"after"}


def test_a_callback_that_is_refused_after_the_clock_was_set_back_is_answered(
    sim, bots, tmp_path
):
    bots.start(rate_limit=0)
    for text in ("refused", "refused later"):
        with locked(tmp_path / "bot.db"):
            assert bots.im.say(text).status_code == 503
        poll(lambda text=text: text in bots.answered())
        # What a clock that was an hour ahead leaves behind.
        bots.bot.missed._well_at += 3600
        window = bots.store.get("missed")
        bots.store.put("missed", window | {"at": window["at"] + 3600})


def test_a_callback_that_is_refused_while_a_window_is_open_is_not_overtaken(
    stopped, monkeypatch, tmp_path
):
    sim, listed = stopped.sim, threading.Event()
    conversations = history.History.conversations

    def wait(*about):
        assert listed.wait(10)
        yield from conversations(*about)

    monkeypatch.setattr(history.History, "conversations", wait)
    im = Caller(sim, stopped.make_app(rate_limit=0).test_client())
    assert im.say("looked up").status_code == 200
    sim.wait(2)
    with locked(tmp_path / "bot.db"):
        assert im.say("refused").status_code == 503
    poll(lambda: im.say("after").status_code == 200)
    sim.wait(4)
    listed.set()
    poll(lambda: idle(im))
    texts = said_to(sim, "jared")
    assert texts[:3] == ["before", "looked up", "refused"]
    assert {*texts[3:]} == {"after"}


@pytest.mark.slow
def test_what_was_shed_by_a_full_backlog_is_looked_up_when_it_is_calm(sim, bots):
    workers, seen = bots.start(max_backlog=8, rate_limit=0).bot.workers, []
    sim.fault = lambda called, _: (
        seen.append(workers.backlog) if called == LIST else None
    )
    sim.ai_delay = 0.6
    codes = [bots.im.say(str(number)).status_code for number in range(12)]
    assert codes[0] == 200 and codes[-1] == 503
    assert not sim.lookups
    sim.wait(12)
    assert bots.answered() == [str(number) for number in range(12)]
    assert seen[0] <= 6  # half of what may wait, and the look-up itself


def test_one_refusal_of_tencent_is_one_warning(stopped, caplog):
    sim = stopped.sim
    sim.refused = {*LOOKUPS}
    for user in ("jared", "lin"):
        sim.say(user, ROBOT, "lost")
    stopped.start()
    for number in range(3):
        stopped.im.say(f"after {number}")
    assert stopped.answered() == ["before", "after 0", "after 1", "after 2"]
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and "10004" in warnings[0]
    assert not stopped.store.failed()


def test_the_users_side_is_asked_first_and_then_the_robots(stopped):
    """Nobody knows whether a robot may ask for the history of its conversations."""
    sim, asked = stopped.sim, []

    def fault(command, body):
        if command == ROAM:
            asked.append(body["Operator_Account"])
            return 10004 if asked[-1] == "jared" else None

    sim.fault = fault
    sim.say("jared", ROBOT, "during")
    stopped.start()
    assert stopped.answered() == ["before", "during"]
    assert asked == ["jared", ROBOT]


@pytest.mark.parametrize("command", [LIST, ROAM])
@pytest.mark.parametrize("fault", ["lost", 60007])
def test_a_call_that_fails_is_made_again(stopped, command, fault):
    sim, faults = stopped.sim, [fault]
    sim.fault = lambda called, _: faults.pop() if called == command and faults else None
    sim.say("jared", ROBOT, "during")
    stopped.start()
    assert stopped.answered() == ["before", "during"] and not faults


def test_of_a_long_history_only_the_page_that_failed_is_asked_for_again(stopped):
    sim, asked = stopped.sim, []

    def fault(command, body):
        if command not in (ROAM, IN_GROUP):
            return None
        asked.append(str(body))
        return 60007 if asked.count(str(body)) == 1 else None

    for number in range(70):
        sim.say_in_group("lin", GROUP, str(number), [ROBOT] if number == 0 else [])
    sim.fault = fault
    stopped.start()
    assert [text.split()[-1] for text in stopped.answered(GROUP)] == ["0"]
    assert len(asked) == 2 * len(set(asked)) and len(set(asked)) >= 4


@pytest.mark.slow
def test_a_call_that_goes_on_failing_is_given_up(stopped, monkeypatch, caplog):
    monkeypatch.setattr(missed, "PATIENCE", 1.0)
    sim = stopped.sim
    sim.fault = lambda command, body: 60007 if command in LOOKUPS else None
    sim.say("jared", ROBOT, "during")
    stopped.start().im.say("after")
    assert stopped.answered() == ["before", "after"]
    assert "is given up" in caplog.text and not stopped.store.failed()


@pytest.mark.slow
def test_a_look_up_that_waited_long_for_its_turn_may_fail_once(stopped, monkeypatch):
    monkeypatch.setattr(missed, "PATIENCE", 1.0)
    delays, tries = [1.5], [60007] * 3  # one call, with its tries
    monkeypatch.setattr(
        history.History, "delay", lambda _: delays.pop() if delays else 0
    )
    stopped.sim.fault = lambda command, _: (
        tries.pop() if command == ROAM and tries else None
    )
    stopped.sim.say("jared", ROBOT, "during")
    stopped.start()
    assert stopped.answered() == ["before", "during"] and not tries


@pytest.mark.parametrize(
    "answer",
    [
        {"SessionItem": [{"MsgTime": "late"}], "CompleteFlag": 1},
        {"SessionItem": [7], "CompleteFlag": 1},
        {"SessionItem": {}},
        {"SessionItem": [{"To_Account": 5, "MsgTime": 2**40}], "CompleteFlag": 1},
        {"MsgList": [{"From_Account": "jared"}], "Complete": 1},
        {"MsgList": [None], "Complete": 1},
        {"MsgList": []},
        {
            "MsgList": [{"MsgTimeStamp": "x", "MsgSeq": 1, "MsgRandom": 2}],
            "Complete": 1,
        },
        {"MsgList": [], "Complete": 0, "LastMsgTime": 1, "LastMsgKey": "1_1_1"},
    ],
)
def test_an_answer_that_cannot_be_read_harms_nothing(
    stopped, answer, caplog, monkeypatch
):
    call, sim = rest.Client.call, stopped.sim
    monkeypatch.setattr(missed, "PAGES", 3)

    def bent(client, command, body, *waits, **more):
        of_list = command == LIST and "SessionItem" in answer
        of_roam = command == ROAM and "MsgList" in answer
        real = call(client, command, body, *waits, **more)
        return answer if of_list or of_roam else real

    monkeypatch.setattr(rest.Client, "call", bent)
    sim.say("jared", ROBOT, "during")
    stopped.start().im.say("after")
    assert stopped.answered()[-1] == "after"
    assert "Traceback" not in caplog.text and not stopped.store.failed()


def test_a_job_goes_on_in_the_next_process(stopped, monkeypatch):
    """The first is stopped in the middle of its list."""
    sim = stopped.sim
    sim.users |= {*USERS}
    for user in USERS:
        sim.say(user, ROBOT, "during")
    monkeypatch.setattr(missed, "RATE", 5)
    app = stopped.make_app()
    poll(lambda: sim.lookups[ROAM] > 3)
    began = time.monotonic()
    app.extensions["bot"].close(drain=10)
    assert time.monotonic() - began < 5 and len(sim.delivered) < 40
    monkeypatch.setattr(missed, "RATE", 500)
    stopped.start()
    assert len(sim.wait(61)) == 61
    assert max(sim.looked_up[ROBOT, user] for user in USERS) == 1


def test_a_later_window_has_all_of_one_that_is_not_closed(stopped):
    """A server died before it had looked up anything."""
    sim, now = stopped.sim, time.time()
    sim.say("jared", ROBOT, "long ago", MsgTime=int(now) - 40)
    job = callback.Message("missed\t1.0", "", "", "", kind="missed", sent=now - 50)
    stopped.store.put("missed", {"id": job.id, "since": int(now) - 50, "at": now - 9})
    stopped.store.add(job.id, "missed", job.data(), sent=now - 9)
    stopped.start()
    assert stopped.answered() == ["before", "long ago"]
    assert sim.lookups[LIST] == 2  # once for each robot


def test_two_processes_that_notice_the_same_open_one_window(stopped):
    sim, before = stopped.sim, stopped.store.get("well")
    sim.say("jared", ROBOT, "during")
    stopped.start()
    stopped.store.put("well", before)  # as a second process has read it
    stopped.bot.missed.beat()
    assert stopped.answered() == ["before", "during"]
    assert sim.lookups == {LIST: 2, ROAM: 1}  # a list for each robot


def test_work_that_is_left_is_ended_by_a_bot_without_the_option(stopped):
    job = callback.Message("missed\t1.0", "", "", "", kind="missed")
    task = callback.Message("missed\t1.0\tx", ROBOT, "jared", "", kind="missed")
    stopped.store.add(job.id, "missed", job.data(), reply="")
    stopped.store.add(task.id, task.conversation(), task.data(), reply="")
    stopped.start(catch_up=0).im.say("after")
    assert stopped.answered() == ["before", "after"] and not stopped.store.failed()


def test_the_store_is_asked_nothing_more_for_a_message_while_all_is_well(
    bots, monkeypatch
):
    bots.start()
    asked = []
    for verb in ("get", "put", "state"):
        act = getattr(bots.store, verb)
        monkeypatch.setattr(
            bots.store,
            verb,
            lambda *about, act=act: (
                asked.append(threading.current_thread()) or act(*about)
            ),
        )
    bots.im.say("hello")
    bots.sim.wait(1)
    poll(lambda: len({*asked}) == 1 and len(asked) > 2)  # the maintenance loop
    assert bots.answered() == ["hello"]


@pytest.fixture
def short_windows(monkeypatch):
    """Let the bot be sure for half a second only that Tencent knows a repetition."""
    monkeypatch.setattr(botserver, "KNOWN_C2C", 0.5)
    monkeypatch.setattr(botserver, "KNOWN_GROUP", 0.5)
    monkeypatch.setattr(rest.Client.call, "__defaults__", ((0.0, 0.0),))


def unsure(sim, how, part="bbb", tries=3):
    """Let the first tries to send a part be "lost", or come "late"."""
    failed = []

    def fault(command, body):
        if "send" in command and part in str(body) and len(failed) < tries:
            failed.append(body)
            return how
        return None

    sim.ai_answer = lambda messages: "a" * 8000 + "\n\n" + "b" * 8000
    sim.fault = fault


@pytest.mark.parametrize("place", ["one-to-one", "group"])
@pytest.mark.parametrize("mode", ["whole", "modify"])
@pytest.mark.parametrize("how", ["late", "lost"])
def test_the_history_says_whether_an_unsure_answer_arrived(
    sim, bots, short_windows, caplog, place, mode, how
):
    unsure(sim, how)
    bots.start(reply_mode=mode)
    if place == "group":
        bots.im.post(sim.say_in_group("jared", GROUP, "tell", [ROBOT]))
    else:
        bots.im.say("tell")
    said = {"late": "counts as sent", "lost": "did not arrive"}[how]
    poll(lambda: said in caplog.text)
    poll(lambda: idle(bots.im))
    assert ["bbb" in m.text for m in sim.delivered] == [False, True]
    assert not bots.store.failed()


def test_an_answer_that_is_unsure_again_is_asked_for_again(
    sim, bots, short_windows, caplog
):
    unsure(sim, "lost", tries=6)
    bots.start().im.say("tell")
    poll(lambda: caplog.text.count("did not arrive") == 2)
    poll(lambda: idle(bots.im))
    assert ["bbb" in m.text for m in sim.delivered] == [False, True]


@pytest.mark.parametrize("why", ["refused", "without history", "catch_up", "a topic"])
def test_an_unsure_answer_counts_as_sent_where_the_history_cannot_say(
    sim, bots, short_windows, caplog, why
):
    unsure(sim, "lost")
    bots.start(catch_up=0 if why == "catch_up" else 3600)
    sim.refused = {*LOOKUPS} if why == "refused" else set()
    sim.remembers = why != "without history"
    if why == "a topic":
        about = {"TopicId": "t"}
        bots.im.post(sim.say_in_group("jared", GROUP, "tell", [ROBOT], **about))
    else:
        bots.im.say("tell")
    poll(lambda: "counts as sent" in caplog.text)
    poll(lambda: idle(bots.im))
    assert len(sim.delivered) == 1 and not bots.store.failed()


@pytest.mark.slow
def test_while_tencent_is_away_an_unsure_answer_is_not_given_up(
    sim, bots, short_windows, caplog
):
    bots.start()
    away = time.monotonic() + 4
    sim.fault = lambda command, body: "lost" if time.monotonic() < away else None
    bots.im.say("tell")
    assert len(sim.wait(1)) == 1
    assert "did not arrive" in caplog.text and "counts as sent" not in caplog.text


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    if request.param == "postgres":
        return request.getfixturevalue("postgres_server").url
    return f"sqlite:///{tmp_path}/bot.db"


@pytest.fixture
def start_bots(sim, tmp_path, url):
    """Return a function that starts servers which share a store."""
    started = []
    sim.users |= {*USERS}
    sim.ai_delay = 0.05

    def start(count, **settings):
        settings = {"RATE_LIMIT": 0, "MAX_WAITING": MESSAGES} | settings
        for number in range(count):
            folder = tmp_path / str(number)
            folder.mkdir()
            bot = BotProcess(sim, str(folder), DATABASE_URL=url, **settings)
            started.append(bot.start())
        return started

    yield start
    for bot in started:
        if bot.alive():
            bot.stop(signal.SIGKILL)


def say_all(sim, bots, act):
    """Let users write, each to its server by turns, and after 3 s do something.

    Returns how many callbacks failed.
    """
    failed, began, sim.bot_url = [], time.monotonic(), ""

    def write(numbers):
        for number in numbers:
            time.sleep(max(0.0, began + number / A_SECOND - time.monotonic()))
            user = number % len(USERS)
            event = sim.say(USERS[user], ROBOT, str(number))
            about = {"params": sim.signed(event), "json": event, "timeout": 5}
            try:
                url = bots[user % len(bots)].url
                requests.post(f"{url}/im", **about).raise_for_status()
            except requests.RequestException:
                failed.append(number)

    shares = [range(first, MESSAGES, 20) for first in range(20)]
    threads = [threading.Thread(target=write, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    time.sleep(3)
    act()
    for thread in threads:
        thread.join()
    return len(failed)


def interrupt(bot, how, seconds=5.2):
    bot.stop(how)
    time.sleep(seconds)
    bot.start()
    bot.simulator.bot_url = ""


OUTAGES = {  # servers, processes of each, how one is stopped
    "stopped": (1, 1, signal.SIGTERM),
    "two processes killed": (1, 2, signal.SIGKILL),
    "one of two servers killed": (2, 1, signal.SIGKILL),
}


@pytest.mark.slow
@pytest.mark.parametrize("outage", OUTAGES)
def test_of_600_messages_none_is_missed_while_a_server_is_away(sim, start_bots, outage):
    servers, processes, how = OUTAGES[outage]
    bots, calls = start_bots(servers, WEB_CONCURRENCY=processes), []
    sim.fault = lambda command, _: calls.append((command, time.monotonic()))
    failed = say_all(sim, bots, lambda: interrupt(bots[0], how))
    assert failed > 100
    with suppress(TimeoutError):  # it would name all
        sim.wait(MESSAGES, timeout=20)
    poll(lambda: requests.get(f"{bots[0].url}/healthz").json()["waiting"] == 0)
    for number, user in enumerate(USERS):
        numbers = range(number, MESSAGES, len(USERS))
        assert said_to(sim, user) == [str(n) for n in numbers]
    assert len(sim.delivered) == MESSAGES
    assert how == signal.SIGKILL or len(sim.ai_requests) == MESSAGES
    assert set(sim.looked_up.values()) == {1} and sum(sim.lookups.values()) < 400
    looked = [at for command, at in calls if command in LOOKUPS]
    a_second = len(looked) / (max(looked) - min(looked))
    assert a_second <= 15 * servers * processes  # 10, and what a busy machine delays
    for bot in bots:
        log = bot.log.read_text()
        assert "Traceback" not in log and "WARNING" not in log


@pytest.mark.slow
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_if_tencent_refuses_the_rest_is_answered_all_the_same(sim, start_bots):
    bots = start_bots(1)
    sim.refused = {*LOOKUPS}
    failed = say_all(sim, bots, lambda: interrupt(bots[0], signal.SIGKILL))
    sim.wait(MESSAGES - failed)
    poll(lambda: requests.get(f"{bots[0].url}/healthz").json()["waiting"] == 0)
    assert len(sim.delivered) == MESSAGES - failed
    for user in USERS:
        numbers = [int(number) for number in said_to(sim, user)]
        assert numbers == sorted({*numbers})
    log = bots[0].log.read_text()
    assert log.count("WARNING") == 1 and "10004" in log
    assert requests.get(f"{bots[0].url}/healthz").json()["failed"] == 0


def test_a_message_waits_while_its_conversation_is_looked_up_by_another(stopped):
    """Whoever asked for that, and whenever: perhaps when the message was claimed."""
    bot, window = stopped.bot.missed, {"id": "missed\t1.0", "since": 1, "at": 2.0}
    message = callback.Message("id", ROBOT, "jared", "hi")
    chat = message.conversation()
    bot.window = window
    assert bot.guard(message, chat) and bot.guard(message, chat)
    stopped.store.finish(stopped.store.claim())
    assert not bot.guard(message, chat)


def test_a_message_comes_behind_the_look_up_whoever_claims_it(stopped):
    """Another server that shares the store may not know of the window yet."""
    stopped.bot.missed.window = {"id": "missed\t1.0", "since": 1, "at": 2.0}
    event = stopped.sim.say("jared", ROBOT, "hi")
    [message] = callback.parse("Bot.OnC2CMessage", event)
    stopped.bot.accept(message)
    for kind in ("missed", "question"):
        claim = stopped.store.claim()
        assert claim.data["kind"] == kind
        stopped.store.finish(claim)


def test_a_look_up_serves_the_windows_that_were_opened_while_it_waited(stopped):
    """Else it would lose its place, and under many outages never come."""
    catcher, store = stopped.bot.missed, stopped.store
    catcher.window = {"id": "missed\t1.0", "since": 5, "at": 2.0}
    event = stopped.sim.say("jared", ROBOT, "hi")
    [message] = callback.parse("Bot.OnC2CMessage", event)
    stopped.bot.accept(message)
    later = {"id": "missed\t2.0", "since": 3, "at": 3.0}
    store.put("missed", later)
    work = Job(store.claim())
    assert catcher.comes_first(work, botserver.read_message(work.claim.data))
    assert stopped.sim.looked_up[ROBOT, "jared"] == 1
    assert store.state(f"missed\t1.0\t{message.conversation()}") == "gone"
    catcher.window = later
    assert not catcher.guard(message, message.conversation())


def test_a_window_that_is_opened_during_a_look_up_is_looked_up_too(
    stopped, monkeypatch
):
    """By the same task: who claims what waits behind it may not know of the window."""
    catcher, store = stopped.bot.missed, stopped.store
    store.put("missed", {"id": "missed\t1.0", "since": 5, "at": 2.0})
    event = stopped.sim.say("jared", ROBOT, "hi")
    [message] = callback.parse("Bot.OnC2CMessage", event)
    catcher.window = store.get("missed")
    stopped.bot.accept(message)
    look_up = catcher.history.messages

    def meanwhile(*about):
        store.put("missed", {"id": "missed\t2.0", "since": 5, "at": 3.0})
        return look_up(*about)

    monkeypatch.setattr(catcher.history, "messages", meanwhile)
    for _ in range(2):
        work = Job(store.claim())
        assert work.claim.id.startswith("missed\t1.0\t")
        catcher.comes_first(work, botserver.read_message(work.claim.data))
    assert store.claim().id == message.id
