"""Messages whose callbacks failed are looked up and answered, and nothing else is."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest
from conftest import FAST, Caller, idle, newest_of, poll, said_to

from imbot.outages import server_name
from imbot.queue import StoreError, Workers
from imbot.settings import Persona
from imbot.tencent import IMError, callback, history
from imbot.tencent.rest import NETWORK
from imbot.texts import TEXTS
from simulator import text_body
from simulator.history import LOOKUPS

ROBOT, GROUP = "@RBT#001", "@TGS#demo"
LIST, ROAM, IN_GROUP = LOOKUPS
EN = TEXTS["en"]


class Bots:
    """A bot that is stopped and started again, as if it had been away for long."""

    def __init__(self, sim, make_app):
        self.sim, self.make_app = sim, make_app
        self.settings = {"bot_language": "en"}

    def launch(self, **settings):
        """Start it."""
        self.settings |= settings
        app = self.make_app(**self.settings)
        self.im, self.bot = Caller(self.sim, app.test_client()), app.extensions["bot"]
        self.store = self.bot.store
        return self

    def start(self, **settings):
        """Start it; return when its server is known to be well."""
        self.launch(**settings)
        poll(lambda: server_name() in self.servers().get("well", {}))
        return self

    def servers(self):
        return self.store.get("servers") or {}

    def stop(self, away=8.0):
        """Stop it; the next to start finds that a server went so many seconds ago."""
        self.bot.close(drain=5)
        well = {"a server": time.time() - away}
        self.store.put("servers", self.servers() | {"well": well})

    def is_calm(self):
        """Return whether nothing is left to answer or to look up."""
        return not self.servers().get("outages") and idle(self.im)

    def answered(self, chat="jared"):
        poll(self.is_calm)
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


@pytest.fixture
def unlisted(stopped):
    """Let no sweep begin until the event is set that is returned."""
    listed = threading.Event()
    hold_lists(stopped.sim, listed)
    yield listed
    listed.set()


def hold_lists(sim, listed):
    def wait(command, body):
        if command == LIST:
            assert listed.wait(9)

    sim.fault = wait


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
    poll(stopped.is_calm)
    assert len(sim.delivered) == 11 and sim.looked_up[ROBOT, "lin"] == 2


def test_a_conversation_is_looked_up_before_its_first_answer(stopped, unlisted):
    """By the thread that claimed it: the sweep has not begun."""
    sim = stopped.sim
    events = [sim.say("jared", ROBOT, f"during {n}") for n in range(3)]
    im = stopped.launch().im
    assert im.say("after").status_code == 200
    assert im.post(events[1]).status_code == 200
    sim.wait(5)
    unlisted.set()
    texts = ["before", "during 0", "during 1", "during 2", "after"]
    assert stopped.answered() == texts
    numbers = [message.number for message in sim.delivered]
    assert numbers == sorted(numbers)  # so clients show it, if one second brought it
    assert sim.looked_up[ROBOT, "jared"] == 1


def test_what_another_thread_found_during_a_look_up_comes_first_too(stopped, unlisted):
    """Its own look-up took so long that this one began."""
    sim, sent = stopped.sim, time.time()
    event = sim.say("jared", ROBOT, "during")

    def fault(command, body):
        if command == ROAM:
            [message] = callback.parse("Bot.OnC2CMessage", event)
            stopped.bot.accept(message, was_missed=True)
        elif command == LIST:
            assert unlisted.wait(9)

    sim.fault = fault
    stopped.launch().im.say("after", MsgTime=int(sent) + 1)
    sim.wait(3)
    unlisted.set()
    assert stopped.answered() == ["before", "during", "after"]


@pytest.mark.parametrize("first", ["the sweep", "a claim"])
def test_a_sweep_and_a_claim_do_not_look_a_conversation_up_twice(stopped, first):
    sim, asked, go_on = stopped.sim, threading.Event(), threading.Event()
    listed = threading.Event()

    def fault(command, body):
        if command == ROAM and not asked.is_set():
            asked.set()
            go_on.wait(9)
        if command == LIST:
            listed.wait(9)

    sim.fault = fault
    sim.say("jared", ROBOT, "during")
    if first == "the sweep":
        listed.set()
    stopped.start()
    if first == "the sweep":
        asked.wait(9)
    stopped.im.say("after")
    asked.wait(9)
    listed.set()
    time.sleep(0.3)  # time to look it up once more
    assert sim.lookups[ROAM] == 1 and len(sim.delivered) == 1
    go_on.set()
    assert stopped.answered() == ["before", "during", "after"]
    assert sim.looked_up[ROBOT, "jared"] == 1


def test_what_another_thread_marked_and_did_not_finish_is_looked_up(stopped):
    """A worker was killed in the middle of a look-up; the mark expires."""
    sim, chat = stopped.sim, callback.Message("", ROBOT, "jared", "").conversation()
    sim.say("jared", ROBOT, "during")
    stopped.store.put(f"looked up\t{chat}", {"until": time.time() + 0.4})
    stopped.start()
    assert stopped.answered() == ["before", "during"]
    # A mark of a clock that was set back does not hold anybody up.
    stopped.store.put(f"looked up\t{chat}", {"until": time.time() + 3600})
    stopped.stop()
    sim.say("jared", ROBOT, "later")
    stopped.start()
    assert stopped.answered()[2:] == ["later"]


def test_what_waits_for_anothers_look_up_is_claimed_now_and_then(stopped, monkeypatch):
    """Not as often as the CPU allows; also if Tencent did not say when it was sent."""
    sim, asked, go_on = stopped.sim, threading.Event(), threading.Event()

    def fault(command, body):
        if command == ROAM:
            asked.set()
            go_on.wait(9)

    def claim(*about):
        if found := real(*about):
            claims.append(found)
        return found

    sim.fault, claims = fault, []
    sim.say("jared", ROBOT, "during")
    event = sim.say("jared", ROBOT, "after")
    [message] = callback.parse("Bot.OnC2CMessage", event)
    stopped.launch(timing=replace(FAST, poll=0.4))
    assert asked.wait(9)
    real = stopped.store.claim
    monkeypatch.setattr(stopped.store, "claim", claim)
    message = replace(message, sent=0.0)
    about = message.id, message.conversation(), message.data()
    stopped.bot.workers.add(*about, sent=0.0)
    began = time.monotonic()
    poll(lambda: len(claims) > 3)
    assert time.monotonic() - began > 0.4
    go_on.set()
    assert sorted(stopped.answered()) == ["after", "before", "during"]


def test_after_two_outages_in_a_row_a_conversation_is_looked_up_once(stopped):
    """The first was not swept when the second began: a server died at once."""
    sim, now = stopped.sim, time.time()
    sim.say("jared", ROBOT, "long ago", MsgTime=int(now) - 40)
    outages = [[1, now - 50, now - 9, 0, 0]]
    stopped.store.put("servers", {"number": 1, "outages": outages})
    sim.say("jared", ROBOT, "second")
    stopped.stop(away=6.0)
    stopped.start()
    assert stopped.answered() == ["before", "long ago", "second"]
    assert sim.looked_up[ROBOT, "jared"] == 1
    assert sim.lookups[LIST] == 2  # once for each robot


def test_a_conversation_is_looked_up_from_where_it_was_looked_up_last(stopped):
    """Also if outages follow one another so soon that one look-up is for both."""
    sim, asked = stopped.sim, []
    sim.fault = lambda command, body: (
        asked.append(body["MinTime"]) if command == ROAM else None
    )
    sim.say("jared", ROBOT, "first")
    stopped.start()
    poll(stopped.is_calm)
    looked_up = time.time()
    stopped.stop(away=100)
    sim.say("jared", ROBOT, "second")
    stopped.start()
    assert stopped.answered() == ["before", "first", "second"]
    assert len(asked) == 2 and asked[1] >= looked_up - history.MARGIN - 5


def test_of_one_second_tencents_order_holds(stopped, unlisted):
    """Callbacks of this second came before what was missed, in between, and after."""
    sim, now = stopped.sim, int(time.time())
    events = [sim.say("jared", ROBOT, text, MsgTime=now) for text in "abcde"]
    for event in events[::2]:
        [message] = callback.parse("Bot.OnC2CMessage", event)
        stopped.bot.accept(message)
    stopped.launch()
    sim.wait(6)
    unlisted.set()
    assert stopped.answered() == ["before", *"abcde"]
    numbers = [message.number for message in sim.delivered]
    assert numbers == sorted(numbers)  # so clients show it, if one second brought it


def keep_as_answered(bots, event):
    [message] = callback.parse("Bot.OnC2CMessage", event)
    about = (message.id, message.conversation(), message.data())
    bots.store.add(*about, asker=message.user, sent=message.sent)
    claim = bots.store.claim()
    assert claim.id == message.id and bots.store.save_reply(claim, "yes", {})
    assert bots.store.finish(claim)


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
    sim.say("jared", ROBOT, "  ")
    sim.say("jared", ROBOT, "wanted")
    stopped.start()
    assert stopped.answered() == ["before", "wanted"]
    assert overtaken in sim.said


def test_what_was_overtaken_is_left_though_the_clock_was_set_back_since(
    stopped, tmp_path
):
    sim, now = stopped.sim, int(time.time())
    lost = sim.say("lin", ROBOT, "lost", MsgTime=now - 3)
    keep_as_answered(stopped, sim.say("lin", ROBOT, "later", MsgTime=now - 2))
    with closing(sqlite3.connect(tmp_path / "bot.db", timeout=10)) as file, file:
        file.execute("UPDATE message SET ended = ended + 9, accepted = accepted + 9")
    stopped.stop(away=2.0)
    sim.say("lin", ROBOT, "missed", MsgTime=now)
    stopped.start()
    assert stopped.answered("lin") == ["missed"] and lost in sim.said


@pytest.mark.parametrize("ahead", [0, 5, -5])
def test_what_the_network_lost_before_an_outage_does_not_come_after_later_answers(
    stopped, ahead
):
    """Also if Tencent's clock is ahead of ours, or behind it."""
    sim, now = stopped.sim, int(time.time()) + ahead
    lost = sim.say("lin", ROBOT, "lost", MsgTime=now - 3)
    keep_as_answered(stopped, sim.say("lin", ROBOT, "later", MsgTime=now - 2))
    stopped.stop(away=2.0)
    sim.say("lin", ROBOT, "missed", MsgTime=now)
    stopped.start()
    assert stopped.answered("lin") == ["missed"]
    assert lost in sim.said


@pytest.mark.parametrize("ahead", [history.MARGIN - 2, 2 - history.MARGIN])
def test_what_was_missed_is_found_by_any_clock_that_the_doctor_takes(stopped, ahead):
    """`ahead`: Tencent's clock."""
    now = int(time.time()) + ahead
    for seconds in (7, 1):  # the server went 8 s ago
        stopped.sim.say("lin", ROBOT, f"{seconds} s ago", MsgTime=now - seconds)
    stopped.start()
    assert stopped.answered("lin") == ["7 s ago", "1 s ago"]


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
def test_in_a_group_a_mention_in_the_text_is_looked_for(stopped, memory, unlisted):
    sim = stopped.sim

    def write(text, user="jared", **fields):
        body = text_body(text)
        sim.say_in_group(user, GROUP, "", [ROBOT], MsgBody=body, **fields)

    for text in ("@Ada one", "＠ada two", f"@{ROBOT} three", "@Adam four", "five Ada"):
        write(text)
    write("@Ada lin's", user="lin")
    write("@Ada in a topic", TopicId="a topic")
    sim.recall(sim.say_in_group("jared", GROUP, "recalled", [ROBOT]))
    sim.say_in_group("jared", GROUP, "the other's", ["@RBT#002"])
    robots = {ROBOT: Persona(nick="Ada")}
    stopped.launch(robots=robots, group_memory=memory, rate_limit=0)
    stopped.im.post(sim.say_in_group("jared", GROUP, "after", [ROBOT]))
    sim.wait(6)
    unlisted.set()
    assert len(stopped.answered(GROUP)) == 6
    asked = Counter(
        asked["messages"][-1]["content"].removeprefix("jared: ").removeprefix("lin: ")
        for asked in sim.ai_requests
    )
    texts = ["before", "one", "two", "three", "lin's", "the other's", "after"]
    assert asked == Counter(texts)
    # Once for each robot, however many members' memories it has.
    assert sim.looked_up[GROUP, ""] == 2


def test_a_rate_counts_when_messages_were_written(stopped):
    """One a minute for 40 minutes, which a limit of two a minute allows."""
    sim, now = stopped.sim, int(time.time())
    for ago in range(40, 0, -1):
        sim.say("lin", ROBOT, f"{ago} minutes ago", MsgTime=now - ago * 60)
    stopped.stop(away=3000)
    stopped.start(rate_limit=2, max_waiting=50)
    texts = [f"{ago} minutes ago" for ago in range(40, 0, -1)]
    assert stopped.answered("lin") == texts


def test_what_the_limits_refuse_is_told_once(stopped):
    sim = stopped.sim
    for number in range(5):
        sim.say("jared", ROBOT, f"during {number}")
    sim.say("lin", ROBOT, "not allowed")
    stopped.start(rate_limit=3, allow_users=("jared",))
    said = Counter(stopped.answered())
    assert said == Counter(["before", "during 0", "during 1", EN["rate_limited"]])
    assert stopped.answered("lin") == [EN["not_allowed"]]


def test_a_full_queue_is_told_once(stopped):
    sim = stopped.sim
    for number in range(9):
        sim.say("jared", ROBOT, f"during {number}")
    stopped.start(max_waiting=4, rate_limit=0)
    said = [*filter(EN["queue_full"].__ne__, stopped.answered())]
    assert said == ["before", *(f"during {n}" for n in range(4))]
    assert len(sim.delivered) == 6


def test_a_fresh_store_catches_up_nothing(sim, bots):
    sim.say("jared", ROBOT, "to nobody")
    bots.start().im.say("hello")
    sim.wait(1)
    assert bots.answered() == ["hello"] and not sim.lookups


def test_nothing_is_looked_up_if_catch_up_is_0(stopped):
    sim = stopped.sim
    sim.say("jared", ROBOT, "during")
    stopped.launch(catch_up=0).im.say("after")
    sim.wait(2)
    assert said_to(sim, "jared") == ["before", "after"] and not sim.lookups


def test_only_catch_up_seconds_are_looked_up(stopped):
    sim, now = stopped.sim, int(time.time())
    stopped.stop(away=3000)
    sim.say("lin", ROBOT, "too old", MsgTime=now - 60 - 2 * history.MARGIN)
    sim.say("lin", ROBOT, "new", MsgTime=now - 50)
    stopped.start(catch_up=60)
    assert stopped.answered("lin") == ["new"]


def test_after_a_short_restart_messages_wait_until_it_is_noticed(stopped):
    """Its last heartbeat may be that of a server that is well."""
    sim, store = stopped.sim, stopped.store
    sim.say("jared", ROBOT, "during")
    store.put("servers", {"well": {"a server": time.time() - 0.1}})
    stopped.launch(timing=replace(FAST, others_outage=0.5))
    assert stopped.im.say("after").status_code == 200
    sim.wait(3)
    assert stopped.answered() == ["before", "during", "after"]


def test_an_outage_is_noted_before_the_first_callback(stopped, monkeypatch):
    """Another server, which is well, may claim the message that it brings."""
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    stopped.launch()
    servers = stopped.servers()
    assert server_name() in servers["well"] and servers["outages"]


@pytest.mark.slow
def test_a_server_that_starts_beside_others_that_are_well_looks_nothing_up(stopped):
    sim, store = stopped.sim, stopped.store
    ended, timing = threading.Event(), replace(FAST, others_outage=0.5)

    def well(servers):
        alive = servers.get("well", {}) | {"a server": time.time()}
        return servers | {"well": alive}

    def beat():
        while not ended.wait(0.05):
            store.update("servers", well)

    store.put("servers", {"well": {"a server": time.time()}})
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        sim.say("jared", ROBOT, "to the other")
        stopped.start(timing=timing)
        now = time.time()
        poll(lambda: stopped.servers()["well"][server_name()] > now + 1)
    finally:
        ended.set()
        thread.join()
    assert said_to(sim, "jared") == ["before"] and not sim.lookups


def test_a_server_that_starts_takes_the_place_of_one_that_fell_silent(stopped):
    sim, now = stopped.sim, time.time()
    well = {"well": now, "silent": now - 8, "gone": now - 7000}
    stopped.store.put("servers", {"well": well})
    sim.say("jared", ROBOT, "to the silent one")
    stopped.start()
    sim.wait(2)
    assert stopped.answered() == ["before", "to the silent one"]
    well = stopped.servers()["well"]
    assert well.keys() >= {"well"} and not well.keys() & {"silent", "gone"}


@pytest.mark.slow
def test_a_server_that_is_well_leaves_one_that_falls_silent_to_the_next(bots):
    """Also if it has just begun itself, as when they are restarted by turns."""
    timing = replace(FAST, outage=1.5, others_outage=0.7, away=2.0)
    bots.start(timing=timing)
    silent = {"silent": time.time()}
    bots.store.update("servers", lambda old: old | {"well": old["well"] | silent})
    poll(lambda: bots.servers()["well"].keys() == {server_name()})
    assert time.time() - silent["silent"] > 1 and not bots.sim.lookups


def test_two_processes_of_a_server_look_up_once(stopped):
    sim = stopped.sim
    sim.say("jared", ROBOT, "during")
    stopped.make_app(**stopped.settings)
    stopped.launch()
    sim.wait(2)
    assert stopped.answered() == ["before", "during"]
    assert sim.looked_up[ROBOT, "jared"] == 1


class Away:
    """Lets a store refuse what callbacks bring."""

    def __init__(self, store):
        self.store, self.add = store, store.add

    def __enter__(self):
        self.store.add = self.refuse

    def refuse(self, *about, **more):
        raise StoreError("away")

    def __exit__(self, *_):
        self.store.add = self.add


def test_a_refused_callback_is_answered_before_the_next(sim, bots):
    bots.start(rate_limit=0).im.say("before")
    sim.wait(1)
    with Away(bots.store):
        assert bots.im.say("refused").status_code == 503
    assert bots.im.say("after").status_code == 200
    sim.wait(3)
    assert bots.answered() == ["before", "refused", "after"]


def test_what_came_after_a_refusal_did_not_overtake_it(bots, monkeypatch):
    """Another process may have answered it before this one could note the outage."""
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    bots.launch()
    keep_as_answered(bots, bots.sim.say("jared", ROBOT, "before"))
    bots.bot.missed.beat()
    bots.bot.missed.note_refusal()
    keep_as_answered(bots, bots.sim.say("jared", ROBOT, "after"))
    newest = newest_of(bots.store)
    bots.bot.missed.beat()
    [[*_, before, after]] = bots.servers()["outages"]
    assert (before, after) == (newest - 1, newest)


@pytest.mark.parametrize(("ago", "is_answered"), [(6, False), (1, True)])
def test_what_was_lost_just_before_a_refusal_is_not_answered_late(
    bots, monkeypatch, ago, is_answered
):
    """A callback that had ended at the last heartbeat was not refused after it."""
    start = Workers.start
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    bots.launch()
    sim, missed, now = bots.sim, bots.bot.missed, int(time.time())
    keep_as_answered(bots, sim.say("lin", ROBOT, "newest", MsgTime=now))
    missed.beat()
    sim.say("jared", ROBOT, "lost", MsgTime=now - ago)
    keep_as_answered(bots, sim.say("jared", ROBOT, "later", MsgTime=now))
    missed.note_refusal()
    missed.beat()
    bots.bot.workers.beat = None
    start(bots.bot.workers)
    bots.im.say("last", MsgTime=now + 1)
    poll(lambda: "last" in said_to(sim, "jared"))
    assert ("lost" in said_to(sim, "jared")) == is_answered


def begin(bots, event):
    """Add and claim a message, as a process does that then dies or takes long."""
    [message] = callback.parse("Bot.OnC2CMessage", event)
    about = (message.id, message.conversation(), message.data())
    bots.store.add(*about, asker=message.user, sent=message.sent)
    return bots.store.claim()


def test_an_answer_that_was_perhaps_shown_overtook_what_the_network_lost(
    bots, monkeypatch
):
    """Its process died before it could note that Tencent had taken it."""
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    bots.launch()
    bots.sim.say("jared", ROBOT, "lost")
    claim = begin(bots, bots.sim.say("jared", ROBOT, "later"))
    assert bots.store.save_reply(claim, "an answer", {})
    bots.store.release(claim, 1.0)  # it is sent again after the look-up
    bots.stop()
    monkeypatch.undo()
    bots.start()
    bots.sim.wait(1)
    assert bots.answered() == ["an answer"] and bots.sim.looked_up[ROBOT, "jared"]


def test_an_answer_in_work_overtakes_what_the_network_had_lost(bots, monkeypatch):
    """The sweep of an outage that was noted meanwhile waits for its end."""
    sim, start = bots.sim, Workers.start
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    bots.launch(timing=replace(FAST, lease=9.0))
    sim.say("jared", ROBOT, "lost")
    claim = begin(bots, sim.say("jared", ROBOT, "later"))
    bots.bot.missed.beat()
    sim.say("lin", ROBOT, "missed")
    bots.bot.missed.note_refusal()
    start(bots.bot.workers)
    poll(lambda: said_to(sim, "lin") == ["missed"])
    assert not sim.looked_up[ROBOT, "jared"] and bots.servers()["outages"]
    assert bots.store.finish(claim)
    poll(bots.is_calm)
    assert not said_to(sim, "jared") and sim.looked_up[ROBOT, "jared"] == 1


def test_an_answer_in_work_does_not_hold_up_the_look_ups_of_others(bots, monkeypatch):
    """Not those of other robots, nor those for an outage that comes meanwhile."""
    sim, start = bots.sim, Workers.start
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    bots.launch(timing=replace(FAST, lease=9.0))
    sim.users.add("ada")
    claim = begin(bots, sim.say("jared", ROBOT, "in work"))
    sim.say("lin", "@RBT#002", "another robot's")
    bots.bot.missed.note_refusal()
    start(bots.bot.workers)
    poll(lambda: said_to(sim, "lin"))
    sim.say("ada", ROBOT, "in another outage")
    bots.bot.missed.note_refusal()
    poll(lambda: said_to(sim, "ada"))
    assert bots.servers()["outages"] and bots.store.finish(claim)
    poll(bots.is_calm)


def test_a_server_that_knows_the_others_does_not_wait_again(stopped, monkeypatch):
    """The outage that it noted is closed within a second, by another sweeper."""
    held = []
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    monkeypatch.setattr(Workers, "hold", lambda workers, seconds: held.append(seconds))
    well = {"dead": time.time() - 60, "another": time.time() + 60}
    stopped.store.put("servers", {"well": well})
    missed = stopped.launch().bot.missed
    assert stopped.servers()["outages"] and not held
    stopped.store.update("servers", lambda old: old | {"outages": []})
    missed.beat()
    assert not held


def test_each_worker_of_a_new_server_waits_until_the_others_are_known(stopped):
    """Not only the first of them: the outage may be noted a second later."""
    sim, store, now = stopped.sim, stopped.store, time.time()
    sim.say("jared", ROBOT, "during")
    well = {"a server": now - 0.3, server_name(): now}
    store.put("servers", {"well": well, "began": {server_name(): now}})
    stopped.launch()
    assert stopped.im.say("after").status_code == 200
    sim.wait(3)
    assert stopped.answered() == ["before", "during", "after"]


def test_what_was_shed_is_looked_up_from_its_first_refusal_on(bots, monkeypatch):
    """However long there was no time for it."""
    real, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    bots.launch(max_backlog=2)
    missed, workers = bots.bot.missed, bots.bot.workers
    keep_as_answered(bots, bots.sim.say("jared", ROBOT, "before"))
    missed.beat()
    newest, workers.backlog = newest_of(bots.store), 2
    missed.note_refusal()
    keep_as_answered(bots, bots.sim.say("jared", ROBOT, "after"))
    for _ in range(60):
        ahead[0] += 1.0
        missed.beat()
    workers.backlog = 0
    missed.beat()
    [[_, since, _, first, last]] = bots.servers()["outages"]
    assert since <= real() and (first, last) == (newest, newest + 1)


def test_what_was_shed_by_a_server_that_died_is_looked_up(bots, monkeypatch):
    real, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    bots.launch(max_backlog=2)
    bots.bot.missed.beat()
    bots.bot.workers.backlog = 2
    bots.bot.missed.note_refusal()
    keep_as_answered(bots, bots.sim.say("jared", ROBOT, "after"))
    for _ in range(60):
        ahead[0] += 1.0
        bots.bot.missed.beat()
    monkeypatch.setattr("imbot.missed.server_name", lambda: "the next server")
    ahead[0] += 9.0
    bots.launch()
    [[_, since, _, first, last]] = bots.servers()["outages"]
    assert since <= real() and (first, last) == (0, 1)


def test_what_a_server_refuses_while_it_stops_is_in_the_store(bots, monkeypatch):
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    missed = bots.launch().bot.missed
    missed.beat()
    before = bots.servers()
    bots.bot.workers.draining = True
    missed.beat()
    assert bots.servers() == before
    missed.note_refusal()
    missed.beat()
    assert bots.servers()["well"] == before["well"]
    [[since, *_]] = bots.servers()["refused"].values()
    assert since == pytest.approx(before["well"][server_name()], abs=0.5)


def test_what_was_claimed_as_an_outage_was_noted_overtook_what_came_before(
    bots, monkeypatch
):
    """It was claimed without a look-up, since its thread knew of no outage yet."""
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    missed, update = bots.launch().bot.missed, bots.store.update_at

    def late(*about):
        keep_as_answered(bots, bots.sim.say("jared", ROBOT, "later"))
        return update(*about)

    monkeypatch.setattr(bots.store, "update_at", late)
    monkeypatch.setattr(time, "time", lambda real=time.time: real() - 60)
    missed.beat()
    [[*_, first, last]] = bots.servers()["outages"]
    assert first == last == 1


def test_what_is_refused_while_a_heartbeat_is_made_is_noted(bots, monkeypatch):
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    missed, times = bots.launch().bot.missed, iter(range(1))

    def backlog(workers):
        for _ in times:
            missed.note_refusal()
        return 0

    monkeypatch.setattr(Workers, "backlog", property(backlog), raising=False)
    missed.beat()
    missed.beat()
    assert len(bots.servers()["outages"]) == 1


def test_what_another_process_put_off_is_put_off_as_long_as_many_wait(
    bots, monkeypatch
):
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    missed = bots.launch(max_backlog=2).bot.missed
    refused = {"another 1": [time.time() - 70, 0, time.time() - 60]}
    bots.store.put("servers", bots.servers() | {"refused": refused})
    for backlog, outages in ((2, 0), (0, 1)):
        bots.bot.workers.backlog = backlog
        missed.beat()
        assert len(bots.servers()["outages"]) == outages


def test_what_is_refused_at_the_very_end_is_in_the_store(bots, monkeypatch):
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    bots.launch().bot.missed.note_refusal()
    bots.bot.close(drain=0)
    assert len(bots.servers()["refused"]) == 1


def test_an_overload_while_the_clock_is_set_back_is_one_outage(bots, monkeypatch):
    real, ahead = time.time, [300.0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    missed = bots.launch(max_backlog=2).bot.missed
    missed.beat()
    bots.bot.workers.backlog = 2
    missed.note_refusal()
    ahead[0] = 0.0
    for _ in range(9):
        ahead[0] += 1.0
        missed.beat()
    assert len(bots.servers()["outages"]) == 1


@pytest.mark.parametrize("others", [{}, {"another server": 0.3}])
def test_what_another_server_answered_meanwhile_overtook_nothing(
    bots, monkeypatch, others
):
    monkeypatch.setattr(Workers, "start", lambda workers: None)
    monkeypatch.setattr(Workers, "hold", lambda workers, seconds: None)
    bots.launch()
    for text in ("before", "meanwhile"):
        keep_as_answered(bots, bots.sim.say("jared", ROBOT, text))
    newest, ago = newest_of(bots.store), {"dead": 30.0} | others
    well = {server: time.time() - seconds for server, seconds in ago.items()}
    seqs = {"dead": newest - 1, "another server": newest}
    newest_then = {server: seqs[server] for server in well}
    bots.store.put("servers", {"well": well, "newest": newest_then})
    bots.bot.missed.beat()
    [[*_, first, last]] = bots.servers()["outages"]
    assert (first, last) == (newest - 1 if others else newest, newest)


def test_a_refused_callback_is_answered_though_the_clock_was_set_back(
    sim, bots, monkeypatch
):
    real, ahead = time.time, [3600]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    bots.start(rate_limit=0).im.say("before", MsgTime=int(real()))
    sim.wait(1)
    poll(lambda: idle(bots.im))
    ahead[0] = 0
    for number, text in enumerate(("refused", "refused later")):
        with Away(bots.store):
            assert bots.im.say(text).status_code == 503
        sim.wait(number + 2)
        poll(lambda: idle(bots.im))
    assert said_to(sim, "jared") == ["before", "refused", "refused later"]


def test_what_the_network_lost_before_the_clock_was_set_back_stays_unanswered(
    sim, bots, monkeypatch
):
    """Its answer would come after that to a later question."""
    real, ahead = time.time, [0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    bots.start(rate_limit=0)
    sim.say("jared", ROBOT, "lost")
    bots.im.say("later")
    sim.wait(1)
    poll(lambda: idle(bots.im))
    ahead[0] = -9
    poll(lambda: bots.servers().get("number"))
    poll(bots.is_calm)
    bots.im.say("last")
    sim.wait(2)
    assert bots.answered() == ["later", "last"]


def test_a_callback_that_is_refused_during_an_outage_is_not_overtaken(
    stopped, unlisted
):
    """The conversation was looked up for the outage, which is not swept yet."""
    sim = stopped.sim
    stopped.launch(rate_limit=0)
    assert stopped.im.say("looked up").status_code == 200
    sim.wait(2)
    with Away(stopped.store):
        assert stopped.im.say("refused").status_code == 503
    assert stopped.im.say("after").status_code == 200
    sim.wait(4)
    unlisted.set()
    assert stopped.answered() == ["before", "looked up", "refused", "after"]


def test_what_was_lost_after_an_outage_is_not_looked_up_for_it(stopped, unlisted):
    """Tencent's history failed, so two questions were answered without a look-up; what
    the network lost between them would come too late, what was missed does not."""
    sim, fails = stopped.sim, [91000]
    sim.say("jared", ROBOT, "missed")
    wait = sim.fault
    sim.fault = lambda c, body: fails[0] if c == ROAM else wait(c, body)
    stopped.launch(timing=replace(FAST, look_up=0.3, rest=0.5)).im.say("after")
    sim.wait(2)
    sim.say("jared", ROBOT, "lost")
    stopped.im.say("later")
    sim.wait(3)
    fails[0] = None
    unlisted.set()
    assert stopped.answered() == ["before", "after", "later", "missed"]


@pytest.mark.slow
def test_what_was_shed_by_a_full_backlog_is_looked_up_when_it_is_calm(sim, bots):
    workers, seen = bots.start(max_backlog=8, rate_limit=0).bot.workers, []
    sim.fault = lambda called, _: (
        seen.append(workers.backlog) if called in LOOKUPS else None
    )
    sim.ai_delay = 0.15
    codes = [bots.im.say(str(number)).status_code for number in range(12)]
    assert codes[0] == 200 and codes[-1] == 503
    assert not sim.lookups
    sim.wait(12)
    assert bots.answered() == [str(number) for number in range(12)]
    assert seen[0] <= 4  # half of what may wait


def warnings(caplog):
    return [r.message for r in caplog.records if r.levelname == "WARNING"]


def test_one_refusal_of_tencent_is_one_warning(stopped, caplog):
    sim = stopped.sim
    sim.refused = {*LOOKUPS}
    for user in ("jared", "lin"):
        sim.say(user, ROBOT, "lost")
    stopped.start()
    for number in range(3):
        stopped.im.say(f"after {number}")
    sim.wait(4)
    poll(lambda: idle(stopped.im))
    assert said_to(sim, "jared") == ["before", "after 0", "after 1", "after 2"]
    [warning] = warnings(caplog)
    assert "10004" in warning and not stopped.store.failed()
    assert sim.looked_up[ROBOT, "jared"] <= 2  # of each side once


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


@pytest.mark.parametrize("fault", ["hang", 60007])
def test_a_look_up_without_an_answer_is_given_up_and_made_by_a_later_sweep(
    stopped, fault, caplog
):
    sim = stopped.sim
    sim.history_fault = fault
    sim.say("jared", ROBOT, "during")
    began = time.monotonic()
    stopped.launch(timing=replace(FAST, look_up=0.3, rest=0.5)).im.say("after")
    sim.wait(2)
    assert said_to(sim, "jared") == ["before", "after"]
    assert time.monotonic() - began < 5
    sim.history_fault = ""
    sim.wait(3)
    assert stopped.answered() == ["before", "after", "during"]
    assert len([w for w in warnings(caplog) if "cannot be looked up" in w]) == 1


def test_a_machine_that_stood_still_is_no_failure_of_tencents_history(monkeypatch):
    """In the middle of many look-ups: nobody is answered without one for it."""
    real, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    class Still:
        timing, calls = FAST, 0

        def call(self, command, *about):
            self.calls += 1
            if self.calls % 2 == 0:
                return {"Complete": 1}
            ahead[0] += 15.0
            raise IMError(command, NETWORK, "no answer")

    chat = callback.Message("", ROBOT, "jared", "")
    looked_up = history.History(Still())
    for _ in range(history.FAILURES + 1):
        assert looked_up.messages(chat, 0) == []


def test_connections_that_break_are_no_failure_of_tencents_history():
    """As those do that were open while this machine stood still."""

    class Broken:
        timing, calls = replace(FAST, look_up=9.0, backoff=0.01), 0

        def call(self, command, *about):
            self.calls += 1
            if self.calls <= history.FAILURES + 1:
                raise IMError(command, NETWORK, "no answer (ConnectionError)")
            return {"Complete": 1}

    chat = callback.Message("", ROBOT, "jared", "")
    assert history.History(Broken()).messages(chat, 0) == []


def test_a_history_that_nobody_reaches_is_left_alone_after_some_look_ups():
    """Though each call fails at once: else every chat would wait `look_up` seconds."""

    class Unreachable:
        timing, calls = replace(FAST, look_up=0.1, backoff=0.02), 0

        def call(self, command, *about):
            self.calls += 1
            raise IMError(command, NETWORK, "no answer (ConnectionError)")

    chat, im = callback.Message("", ROBOT, "jared", ""), Unreachable()
    looked_up = history.History(im)
    for _ in range(history.FAILURES):
        with pytest.raises(IMError, match="ConnectionError"):
            looked_up.messages(chat, 0)
    calls = im.calls
    with pytest.raises(IMError, match="not asked after failures in a row"):
        looked_up.messages(chat, 0)
    assert im.calls == calls > history.FAILURES


@pytest.mark.slow
def test_a_look_up_that_hangs_does_not_cost_the_ais_time(stopped):
    sim = stopped.sim
    sim.history_fault = "hang"
    timing = replace(FAST, look_up=1.2, rest=0.5)
    stopped.launch(timing=timing, ai_timeout=1.0).im.say("after")
    sim.wait(2)
    assert said_to(sim, "jared") == ["before", "after"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", 91000])
def test_nobody_waits_long_for_a_history_that_fails(stopped, fault, caplog):
    """After five failures in a row it is left alone for a while."""
    sim, users = stopped.sim, [f"user{number}" for number in range(60)]
    sim.users |= {*users}
    sim.history_fault = fault
    stopped.launch(timing=replace(FAST, look_up=1.0), worker_threads=8)
    for user in users:
        stopped.im.say("after", user=user)
    began = time.monotonic()
    sim.wait(61)
    assert time.monotonic() - began < 8  # one after the other it would be more
    assert any("5 times in a row" in warning for warning in warnings(caplog))
    sim.history_fault = ""
    assert sim.lookups[ROAM] < 60


@pytest.mark.slow
def test_the_history_is_asked_again_after_its_rest(stopped):
    sim = stopped.sim
    sim.history_fault = 91000
    sim.say("jared", ROBOT, "during")
    timing = replace(FAST, look_up=0.2, rest=1.0)
    stopped.launch(timing=timing).im.say("hello", user="lin")
    sim.wait(2)
    sim.history_fault = ""
    sim.wait(3)
    assert stopped.answered() == ["before", "during"]


def test_a_look_up_that_waited_long_for_its_turn_may_fail_once(stopped):
    faults = [60007]
    stopped.sim.fault = lambda command, _: (
        faults.pop() if command == ROAM and faults else None
    )
    stopped.sim.say("jared", ROBOT, "during")
    stopped.start(timing=replace(FAST, look_up=0.3, look_up_every=0.4))
    assert stopped.answered() == ["before", "during"] and not faults


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
def test_an_answer_that_cannot_be_read_harms_nothing(stopped, answer, caplog):
    sim, look_up = stopped.sim, stopped.sim.look_up

    def bent(command, body):
        of_list = command == LIST and "SessionItem" in answer
        of_roam = command == ROAM and "MsgList" in answer
        return answer if of_list or of_roam else look_up(command, body)

    sim.look_up = bent
    sim.say("jared", ROBOT, "during")
    stopped.start().im.say("after")
    poll(lambda: "after" in said_to(sim, "jared"))
    poll(lambda: idle(stopped.im))
    assert said_to(sim, "jared")[-1] == "after"
    assert "Traceback" not in caplog.text and not stopped.store.failed()


def test_a_sweep_goes_on_in_the_next_process(stopped):
    """The first is stopped in the middle of its list."""
    sim, users = stopped.sim, [f"user{number}" for number in range(30)]
    sim.users |= {*users}
    for user in users:
        sim.say(user, ROBOT, "during")
    stopped.launch(timing=replace(FAST, look_up_every=0.1))
    poll(lambda: sim.lookups[ROAM] > 3)
    began = time.monotonic()
    stopped.bot.close(drain=10)
    assert time.monotonic() - began < 5 and len(sim.delivered) < 20
    stopped.start(timing=FAST)
    assert len(sim.wait(31)) == 31
    poll(stopped.is_calm)
    assert max(sim.looked_up[ROBOT, user] for user in users) == 1


def test_the_store_is_asked_nothing_more_for_a_message_while_all_is_well(bots):
    bots.start()
    asked = []

    def note(verb):
        def act(*about):
            asked.append(threading.current_thread())
            return verb(*about)

        return act

    for verb in ("get", "put", "state", "known", "is_claimed", "update_at"):
        setattr(bots.store, verb, note(getattr(bots.store, verb)))
    bots.im.say("hello")
    bots.sim.wait(1)
    poll(lambda: len({*asked}) == 1 and len(asked) > 2)  # the maintenance loop
    assert said_to(bots.sim, "jared") == ["hello"] and len({*asked}) == 1


@pytest.mark.parametrize("gone", [2, 3])
def test_accounts_that_are_gone_do_not_end_the_look_ups_of_others(stopped, gone):
    sim, dead = stopped.sim, {f"gone{number}" for number in range(gone)}
    alive = {f"user{number}" for number in range(6)}
    sim.users |= dead | alive
    for name in sorted(dead) + sorted(alive):
        sim.say(name, ROBOT, "missed")

    def refuse(command, body):
        sides = {body.get("Operator_Account"), body.get("Peer_Account")}
        return 70107 if command == ROAM and sides & dead else None

    sim.fault = refuse
    stopped.start()
    poll(stopped.is_calm)
    assert {message.chat for message in sim.delivered} - {"jared"} == alive


def test_a_recall_in_a_group_leaves_the_nicks_alone(bots):
    sim, im = bots.sim, bots.start().im
    sim.ai_delay = 0.3
    im.post(sim.say_in_group("jared", GROUP, "busy", [ROBOT]))
    event = sim.say_in_group("jared", GROUP, "waits", [ROBOT])
    im.post(event)
    im.post(
        {
            "CallbackCommand": "Group.CallbackAfterRecallMsg",
            "GroupId": GROUP,
            "MsgSeqList": [{"MsgSeq": event["MsgSeq"]}],
        }
    )
    sim.wait(1)
    poll(lambda: idle(im))
    assert "" not in dict(bots.bot.nicks)
