"""What every store promises, on SQLite, PostgreSQL and PgBouncer."""

from __future__ import annotations

import json
import threading
import time
from contextlib import closing
from functools import partial

import pytest
from conftest import in_threads, newest_of, poll
from stores import (
    KNOWN,
    NEW,
    NO_TABLES,
    answer,
    cancelled,
    fail,
    failed,
    killed_adder,
    lost,
    put,
    query,
    start_script,
    texts,
    waiting,
)
from stores import opened as open_url

from imbot.queue import Added, StoreBusy, StoreError, open_store
from imbot.queue.sql import add_step
from imbot.queue.sqlite import SQLiteStore

COUNTS = """SELECT name, open,
    (SELECT count(*) FROM message WHERE conversation = name AND state = 'open')
    FROM conversation"""

SQLITE = pytest.param("sqlite")
POSTGRES = pytest.param("postgres", marks=pytest.mark.slow)
PGBOUNCER = pytest.param("pgbouncer", marks=pytest.mark.slow)
# Some tests also run through what platforms put before PostgreSQL.
and_pgbouncer = pytest.mark.parametrize(
    "url", [SQLITE, POSTGRES, PGBOUNCER], indirect=True
)


@pytest.fixture(params=[SQLITE, POSTGRES])
def url(request, tmp_path):
    """The address of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    server = request.getfixturevalue("shared_postgres")
    query(server.url, NO_TABLES)
    if request.param == "pgbouncer":
        return request.getfixturevalue("shared_bouncer").url
    return server.url


@pytest.fixture
def opened(url):
    """Return a function that opens the store again, as another process would."""
    stores, threads = [], threading.active_count()

    def again(**waits):
        stores.append(open_url(url, **waits))
        return stores[-1]

    yield again
    counts = query(url, COUNTS) if stores else []
    for each in stores:
        each.close()
    assert all(said == true > 0 for _, said, true in counts), counts
    poll(lambda: threading.active_count() <= threads)


@pytest.fixture
def store(opened):
    return opened()


@pytest.fixture
def hasty(store, opened):
    """The same store for another process, whose claims expire at once."""
    return opened(lease=0.0)


def test_an_id_is_accepted_once_waiting_claimed_answered_and_forgotten(store):
    put(store, "1")
    assert store.add("1", "jared", {}) == KNOWN
    claim = store.claim()
    assert store.add("1", "somebody else", {}) == KNOWN
    store.save_reply(claim, "yes", {})
    store.finish(claim)
    assert store.add("1", "jared", {}) == KNOWN
    store.forget("jared")
    assert store.add("1", "jared", {}) == KNOWN
    assert store.claim() is None


@and_pgbouncer
def test_of_one_id_delivered_at_once_one_is_accepted(store):
    added = in_threads(8, lambda n: store.add("1", f"chat {n % 2}", {}))
    assert sorted(added) == [KNOWN] * 7 + [NEW]
    assert waiting(store) == 1


def test_a_claim_has_all_that_was_given(store):
    before = time.time() - 1
    data = {"text": "你好 😀\0\ud800 \"'%s %(id)s :id \\", "list": [1, None]}
    store.add("a\t1", "群 {x}:1%s", data)
    claim = store.claim()
    assert (claim.id, claim.conversation, claim.data) == ("a\t1", "群 {x}:1%s", data)
    assert (claim.reply, claim.progress, claim.exhausted) == (None, {}, False)
    assert before < claim.accepted < time.time() + 1
    assert store.heartbeat([claim]) == ([], [])
    assert store.save_reply(claim, "好\ud800\0", {}) and store.finish(claim)
    assert store.history("群 {x}:1%s", 1) == [(data, "好\ud800\0")]


def test_a_lone_surrogate_and_a_nul_in_an_id_are_stored(store):
    names = ["\ud800", "b", "\udfff\0", "d"]
    assert in_threads(4, lambda n: store.add(names[n], names[n], {})) == [NEW] * 4
    assert store.add("\ud800", "\ud800", {}) == KNOWN
    assert store.add("more", "\ud800", {}, room=1) == Added.QUEUE_FULL
    assert store.cancel("\ud800") and store.history("\ud800", 1) == []
    assert store.known([*names, "?"]).keys() == {*names}
    store.put("\0", {"n": 1})
    store.update("\ud800", lambda old: {"n": 2})
    assert (store.get("\0"), store.get("\ud800")) == ({"n": 1}, {"n": 2})
    claims = [store.claim(kept=("{conversation}",)) for _ in names]
    assert {"n": 2} in [claim.kept.get(claim.conversation) for claim in claims]
    assert lost(store, *claims) == []
    for claim in claims:
        assert store.fail(claim, "\ud800\0")
    store.forget("\ud800")


def test_what_comes_with_a_reply_is_answered_and_not_remembered(store):
    assert store.add("1", "jared", {"text": "/help"}, reply="the help") == NEW
    claim = store.claim()
    assert (claim.reply, claim.data) == ("the help", {"text": "/help"})
    assert store.finish(claim)
    assert texts(store) == [] and store.add("1", "jared", {}) == KNOWN


@and_pgbouncer
def test_what_was_accepted_outlives_the_process(store, opened):
    put(store, "1", "2")
    answer(store)
    put(store, "3")
    store.close()
    later = opened()
    assert later.add("1", "jared", {}) == KNOWN
    assert [answer(later).id, answer(later).id] == ["2", "3"]
    assert [text for text, _ in texts(later)] == [f"text of {n}" for n in (1, 2, 3)]


def test_numbers_grow_also_after_everything_was_pruned(store):
    put(store, "1")
    first = answer(store)
    poll(lambda: store.prune(0))
    put(store, "2")
    assert store.claim().seq > first.seq


def test_a_conversation_is_worked_in_order_one_at_a_time(store):
    put(store, "1", "2", "3")
    for id in ("1", "2", "3"):
        claim = store.claim()
        assert claim.id == id
        assert store.claim() is None
        store.finish(claim)
    assert store.claim() is None


def test_messages_of_a_conversation_are_ordered_by_when_they_were_sent(store):
    for number, sent in (("3", 30.0), ("1", 10.0), ("4", 30.0), ("2", 20.0)):
        store.add(number, "jared", {"text": number}, sent=sent)
    assert [answer(store).id for _ in range(4)] == ["1", "2", "3", "4"]
    turns = store.history("jared", 3)
    assert [data["text"] for data, _ in turns] == ["2", "3", "4"]


def test_askers_who_share_a_conversation_take_turns(store):
    for number, asker in enumerate(["lin", "lin", "lin", "ada", "lin", "bo"]):
        store.add(f"{asker} {number}", "a group", {}, asker=asker, sent=float(number))
    order = [answer(store).id for _ in range(6)]
    assert order == ["lin 0", "ada 3", "bo 5", "lin 1", "lin 2", "lin 4"]


def test_one_askers_messages_keep_their_order_however_they_are_stored(store, url):
    """Also if PostgreSQL reads them in another order than their index has."""
    add = partial(store.add, conversation="a chat", data={}, asker="lin")
    add("0", sent=0.0)
    claim = store.claim()
    for number in range(9, 0, -1):  # found by a look-up
        add(str(number), sent=float(number))
    if url.startswith("postgres"):
        query(url, "VACUUM ANALYZE message")
    store.finish(claim)
    assert [answer(store).id for _ in range(9)] == [*"123456789"]


def test_what_a_robot_says_unasked_has_its_place_by_its_time(store):
    for number, asker in enumerate(["lin", "lin", "", "lin"]):
        store.add(str(number), "a chat", {}, asker=asker, sent=float(number))
    assert [answer(store).id for _ in range(4)] == ["0", "1", "2", "3"]


def test_what_a_robot_says_unasked_comes_though_askers_never_pause(store):
    for number, asker in enumerate(["lin", "ada", "", "lin", "ada"]):
        store.add(asker or "said", "a group", {}, asker=asker, sent=float(number))
        store.add(f"{asker} {number}", "a group", {}, asker=asker, sent=float(number))
    order = []
    for number in range(5, 15):
        order.append(answer(store).id)
        asker = order[-1].split()[0]
        store.add(f"{asker} {number}", "a group", {}, asker=asker, sent=float(number))
    assert "said" in order


def test_a_third_askers_first_message_goes_before_anothers_tenth(store):
    """Also if the third has just been answered in another chat."""
    for number in range(20):
        asker = ("lin", "bo")[number % 2]
        store.add(f"{asker} {number // 2}", "a group", {}, asker=asker, sent=number)
    store.add("ada", "a group", {}, asker="ada", sent=20.0)
    order = [answer(store).id for _ in range(4)]
    store.add("beside", "another chat", {}, asker="ada", sent=21.0)
    order += [answer(store).id for _ in range(4)]
    assert order.index("ada") < 4 and "beside" in order


def test_a_message_keeps_its_turn_and_its_attempts(store, hasty):
    """Also if another asker writes while it is tried again."""
    for number in range(3):
        store.add(f"lin {number}", "a group", {}, asker="lin", sent=float(number))
    answer(store)
    claim = store.claim()
    assert store.save_reply(claim, "begun", {"sent": 1})
    store.add("ada", "a group", {}, asker="ada", sent=9.0)
    for attempted in (False, True, True, True):
        store.release(claim, 0.0, attempted)
        claim = store.claim()
        assert claim.id == "lin 1"
    assert claim.exhausted and store.finish(claim)
    claim = store.claim()
    assert claim.id == "ada" and not claim.exhausted and store.finish(claim)
    assert answer(store).id == "lin 2"


def test_what_was_sent_earlier_and_comes_later_goes_first(store):
    """As what a look-up finds."""
    for number in (1, 2, 3):
        store.add(f"lin {number}", "a group", {}, asker="lin", sent=float(number))
    answer(store)
    store.add("found", "a group", {}, asker="lin", sent=1.5)
    assert [answer(store).id for _ in range(3)] == ["found", "lin 2", "lin 3"]


def test_who_asks_alone_is_answered_in_order(store):
    for number in (0, 1, 3, 2):
        store.add(str(number), "lin", {}, asker="lin", sent=float(number))
        if number == 1:
            assert answer(store).id == "0"
    assert [answer(store).id for _ in range(3)] == ["1", "2", "3"]


def test_what_was_released_into_a_lane_waits_while_that_is_full(store):
    put(store, "1", "2")
    put(store, "3", to="lin")
    store.release(store.claim(), 0.0, lane="slow")
    assert [c and c.id for c in (store.claim(full=["slow"]),)] == ["3"]
    assert store.claim(full=["slow", "other"]) is None
    assert store.load() == (2, 1, 1) and store.load(full=["slow"]) == (2, 1, 0)
    claim = store.claim(full=["other"])
    assert claim.id == "1" and not claim.exhausted and store.finish(claim)
    assert store.claim(full=["slow"]).id == "2", "the lane was that of the first"


def test_the_conversation_that_waits_longest_comes_first(store):
    for id in "abc":
        put(store, id, to=id)
    put(store, "a2", to="a")
    assert [store.claim().id for _ in range(3)] == ["a", "b", "c"]


@and_pgbouncer
def test_every_message_is_claimed_by_exactly_one_of_eight_threads(store):
    for number in range(80):
        put(store, str(number), to=str(number))

    def take(_):
        return [claim.id for claim in iter(store.claim, None)]

    taken = sum(in_threads(8, take), [])
    assert sorted(taken) == sorted(str(number) for number in range(80))


@and_pgbouncer
def test_threads_never_share_a_conversation(store):
    for number in range(60):
        put(store, str(number), to=str(number % 3))
    busy, order, lock = set(), {"0": [], "1": [], "2": []}, threading.Lock()

    def work(_):
        while store.stats()["oldest"]:
            if claim := store.claim():
                with lock:
                    assert claim.conversation not in busy
                    busy.add(claim.conversation)
                    order[claim.conversation].append(int(claim.id))
                time.sleep(0.001)
                with lock:
                    busy.remove(claim.conversation)
                assert store.finish(claim)

    in_threads(8, work)
    assert order == {str(n): list(range(n, 60, 3)) for n in range(3)}


def test_a_claim_that_expired_goes_to_another(store, hasty):
    put(store, "1", "2")
    first = hasty.claim()
    hasty.save_reply(first, "half", {"sent": 1})
    again = poll(store.claim)
    assert (again.id, again.reply, again.progress) == ("1", "half", {"sent": 1})
    assert lost(store, first, again) == [first]
    assert not store.save_reply(first, "other", {})
    assert not store.save_reply(first, None, {})
    assert not store.finish(first)
    store.release(first, 0)
    assert not store.fail(first, "no")
    assert store.stats()["failed"] == 0
    assert store.save_reply(again, "mine", {}) and store.finish(again)
    assert texts(store) == [("text of 1", "mine")]


def test_a_claim_with_a_heartbeat_stays(store, hasty):
    put(store, "1")
    claim = hasty.claim()
    assert lost(store, claim) == []
    assert store.claim() is None
    assert store.finish(claim)
    assert lost(store, claim) == [claim]


def test_a_claim_brings_the_kept_values_it_is_asked_for(store):
    put(store, "1", to="a{b}%s")
    put(store, "2", to="c")
    store.put("servers", {"well": 1})
    store.put("looked up\ta{b}%s", {"at": 2})
    store.put("other", {})
    names = ("servers", "looked up\t{conversation}", "none")
    servers = {"servers": {"well": 1}}
    assert store.claim(names).kept == servers | {"looked up\ta{b}%s": {"at": 2}}
    assert store.claim(names).kept == servers
    put(store, "3", to="d")
    assert store.claim().kept == {}


def test_a_message_whose_claims_expired_three_times_may_only_be_failed(store, hasty):
    put(store, "bad", "good")
    for _ in range(3):
        claim = poll(hasty.claim)
        assert (claim.id, claim.exhausted) == ("bad", False)
    claim = poll(store.claim)
    assert (claim.id, claim.exhausted) == ("bad", True)
    assert store.fail(claim, "cut short")
    claim = store.claim()
    assert (claim.id, claim.exhausted) == ("good", False)
    assert failed(store) == ["bad"]


def test_a_message_that_no_worker_could_fail_is_failed(store, hasty, caplog):
    put(store, "bad", "good")
    for _ in range(4):
        assert poll(hasty.claim).id == "bad"
    assert poll(store.claim).id == "good"
    assert failed(store) == ["bad"]
    assert "bad" in caplog.text and "text of" not in caplog.text


def test_a_release_counts_only_if_the_work_was_attempted(store):
    put(store, "1")
    for _ in range(10):
        store.release(store.claim(), 0)
    for _ in range(3):
        claim = store.claim()
        assert not claim.exhausted
        store.release(claim, 0, attempted=True)
    assert store.claim().exhausted


def test_attempts_of_one_message_are_not_those_of_the_next(store):
    put(store, "1", "2")
    for _ in range(3):
        store.release(store.claim(), 0, attempted=True)
    assert fail(store).exhausted
    assert not store.claim().exhausted


def test_a_released_message_waits_and_keeps_its_turn(store):
    put(store, "1", "2")
    put(store, "other", to="other")
    claim = store.claim()
    released = time.monotonic()
    store.release(claim, 0.3)
    assert store.claim().id == "other"
    put(store, "3")
    assert poll(store.claim).id == "1"
    assert time.monotonic() - released > 0.25
    assert store.load() == (2, 2, 0)


def test_progress_is_kept_without_and_beside_a_reply(store):
    put(store, "1")
    claim = store.claim()
    assert store.save_reply(claim, None, {"key": "k"})
    store.release(claim, 0)
    claim = store.claim()
    assert (claim.reply, claim.progress) == (None, {"key": "k"})
    assert store.save_reply(claim, "yes", {"key": "k"}, remember=False)
    assert store.save_reply(claim, None, {"sent": 2})
    store.release(claim, 0)
    claim = store.claim()
    assert (claim.reply, claim.progress) == ("yes", {"sent": 2})
    store.finish(claim)
    assert texts(store) == [], "progress must not make the store remember"


def test_a_turn_that_begins_with_its_reply_is_remembered_on_request(store):
    store.add("1", "jared", {"n": 1}, reply="unasked", remember=True)
    store.add("2", "jared", {"n": 2}, reply="a notice")
    store.add("3", "jared", {"n": 3})
    assert [store.state(id) for id in ("1", "0")] == ["open", None]
    for reply in (None, None, "three"):
        claim = store.claim()
        if reply:
            store.save_reply(claim, reply, {})
        store.finish(claim)
    assert store.history("jared", 9) == [({"n": 1}, "unasked"), ({"n": 3}, "three")]
    assert [store.state(id) for id in ("1", "2", "3")] == ["done", "gone", "done"]
    store.add("4", "jared", {}, reply="unsent", remember=True)
    store.fail(store.claim(), "why")
    assert store.state("4") == "failed" and len(store.history("jared", 9)) == 2


def test_known_ids_have_a_state_and_a_place(store):
    assert newest_of(store) == 0
    put(store, "1", "2", "3", "4")
    answer(store), answer(store, remember=False), fail(store)
    known = store.known(["0", "1", "2", "3", "4"])
    states = {id: state for id, (state, _) in known.items()}
    assert states == {"1": "done", "2": "gone", "3": "failed", "4": "open"}
    assert known["1"][1] < known["2"][1] < known["3"][1] < known["4"][1]
    assert newest_of(store) == known["4"][1] and store.known([]) == {}


def test_an_answer_that_is_kept_is_begun_until_it_ends(store):
    store.add("1", "jared", {}, reply="a sentence")
    claim = store.claim()
    assert store.state("1") == "open"  # nobody can have seen it
    store.save_reply(claim, "an answer", {})
    store.release(claim, 0.0)
    assert store.state("1") == "begun"
    store.finish(store.claim())
    assert store.state("1") == "gone"


def test_whether_a_conversation_is_claimed_its_members_included(store):
    put(store, "1", to="group")
    put(store, "2", to="group\tlin")
    assert not store.is_claimed("group")
    first, second = store.claim(), store.claim()
    assert store.is_claimed("group") and store.is_claimed("group\tlin")
    assert not store.is_claimed("gro") and not store.is_claimed("lin")
    store.finish(first)
    assert store.is_claimed("group")
    store.release(second, 9.0)
    assert not store.is_claimed("group")


def test_history_gives_the_last_turns_oldest_first(store):
    for number in range(8):
        put(store, str(number))
        answer(store, f"reply {number}")
    put(store, "open", to="jared")
    assert texts(store, limit=0) == []
    assert texts(store, limit=2) == [("text of 6", "reply 6"), ("text of 7", "reply 7")]
    assert len(texts(store, limit=9)) == 8
    assert store.add("0", "jared", {}) == KNOWN


def test_what_is_not_to_be_remembered_or_has_no_reply_is_not_in_the_history(store):
    put(store, "1", "2", "3", "4")
    answer(store, remember=False)
    store.finish(store.claim())
    answer(store, "third")
    answer(store, "")
    assert texts(store) == [("text of 3", "third")]


def test_nothing_is_left_of_a_text_that_is_not_to_be_remembered(store, url):
    put(store, "1", "2")
    answer(store, remember=False)
    store.finish(store.claim())
    left = query(url, "SELECT data, reply, progress FROM message")
    assert left == [(None, None, None)] * 2


def test_what_was_put_under_a_name_is_there_until_it_is_forgotten_or_old(store):
    assert store.get("jared") is None
    store.put("jared", {"id": 1})
    store.put("jared", {"id": "二"})
    store.put("lin", {})
    assert store.get("jared") == {"id": "二"}
    store.forget("jared")
    assert store.get("jared") is None and store.get("lin") == {}
    store.prune(60)
    assert store.get("lin") == {}
    poll(lambda: store.prune(0) or store.get("lin") is None)


@and_pgbouncer
def test_changes_of_a_kept_value_by_several_processes_are_all_kept(store, opened):
    stores = (store, opened())

    def count(number):
        for _ in range(10):
            seen = stores[number % 2].update(
                "count", lambda old: {"n": old.get("n", 0) + 1}
            )
        return seen["n"]

    assert max(in_threads(8, count)) == 80
    assert store.get("count") == {"n": 80}


def test_a_change_that_raises_changes_nothing(store):
    store.put("count", {"n": 1})
    with pytest.raises(KeyError):
        store.update("count", lambda old: {"n": old["m"]})
    with pytest.raises(TypeError):
        store.update("count", lambda old: {"n": object()})
    assert store.get("count") == {"n": 1}


def test_forget_deletes_answers_and_failures_of_one_conversation(store):
    put(store, "1", "2", "3")
    put(store, "4", "5", to="other")
    answer(store)
    for _ in range(3):
        claim = store.claim()
        if claim.id == "2":
            assert store.fail(claim, "no")
        elif claim.id == "4":
            store.save_reply(claim, "yes", {})
            store.finish(claim)
    store.forget("jared")
    assert texts(store) == [] and store.failed() == []
    assert texts(store, "other") == [("text of 4", "yes")]
    assert store.retry() == 0
    assert [store.add(id, "jared", {}) for id in "123"] == [KNOWN] * 3
    assert store.add("6", "jared", {}, room=2) == NEW


@pytest.mark.parametrize("answered", [3, 4])
def test_forget_goes_in_batches_until_nothing_is_left(store, answered):
    put(store, *map(str, range(answered)))
    for _ in range(answered):
        answer(store)
    store.batch = 2
    store.forget("jared")
    assert texts(store) == []


BIG_CHAT = """INSERT INTO message
    (id, conversation, state, data, reply, remember, sent, accepted, ended)
    SELECT 'id ' || n, 'jared', 'done', '{"text": "' || repeat('x', 200) || '"}',
        '"' || repeat('y', 400) || '"', 1, n, n, n FROM generate_series(1, 100000) n"""


@pytest.mark.slow
@pytest.mark.parametrize("url", [POSTGRES], indirect=True)
def test_a_chat_of_a_hundred_thousand_answers_is_forgotten(store, url):
    query(url, BIG_CHAT)
    store.forget("jared")
    assert query(url, "SELECT count(*) FROM message WHERE data IS NOT NULL") == [(0,)]


@pytest.mark.parametrize("pattern", ["2", "%2%"])
def test_what_was_recalled_is_forgotten_or_has_other_data(store, pattern):
    put(store, "1", "2")
    answer(store)
    store.recall(pattern, {"text": "recalled"})
    claim = store.claim()
    assert (claim.id, claim.data) == ("2", {"text": "recalled"})
    store.save_reply(claim, "yes", {})
    store.finish(claim)
    store.recall(pattern, {"text": "recalled"})
    assert texts(store) == [("text of 1", "yes")] and store.state("2") == "gone"


def test_what_ended_is_pruned_in_time_and_what_is_open_never(store):
    store.batch = 2
    put(store, *"12345")
    for _ in range(3):
        answer(store)
    fail(store)
    assert store.prune(60) == 0
    assert store.add("1", "jared", {}) == KNOWN
    assert poll(lambda: store.prune(0)) == 4
    assert store.prune(0) == 0
    assert texts(store) == [] and store.failed() == []
    assert store.claim().id == "5"
    put(store, "1")


def test_what_is_open_for_long_hides_nothing_from_prune(store):
    store.batch = 2
    put(store, *"abcde", to="long")
    put(store, *"12345")
    held = store.claim()
    while (claim := store.claim()) and store.finish(claim):
        pass
    assert poll(lambda: store.prune(0)) == 5
    assert held.id == "a" and store.load()[:2] == (4, 1)


def test_prune_looks_at_messages_not_at_all_numbers(store, url, monkeypatch):
    """Else an old open message costs a statement for each batch of numbers."""
    put(store, "old", "new")
    held = store.claim()
    query(url, "UPDATE message SET seq = 500000000 WHERE id = 'new'")
    select, few = store._select, iter(range(9))

    def counted(*about, **values):
        next(few)
        return select(*about, **values)

    monkeypatch.setattr(store, "_select", counted)
    assert store.prune(0) == 0 and held.id == "old"


def test_stats_say_how_much_waits_is_claimed_and_failed(store):
    zero = {"waiting": 0, "in_work": 0, "failed": 0, "oldest": 0.0}
    assert store.stats() == zero and store.load() == (0, 0, 0)
    put(store, "1", "2", "3")
    put(store, "4", to="other")
    fail(store)
    claim = store.claim()
    seen = store.stats()
    assert 0 < seen.pop("oldest") < 20
    assert seen == {"waiting": 2, "in_work": 1, "failed": 1}
    assert store.load() == (2, 1, 1)
    store.release(claim, 0)
    assert store.load() == (3, 0, 2)
    assert store.stats()["in_work"] == 0


def test_what_users_asked_is_counted_once(store):
    for id, asker in (("1", "jared"), ("1", "jared"), ("2", "jared"), ("3", "")):
        store.add(id, "chat", {}, asker)
    store.finish(store.claim())
    assert store.add("4", "chat", {}, "jared", rate=2) == Added.RATE_LIMITED
    assert store.add("4", "chat", {}, "jared", rate=3) == NEW
    assert store.add("5", "chat", {}, "lin", rate=1) == NEW
    assert store.add("6", "chat", {}, "", rate=1) == NEW
    assert store.add("1", "chat", {}, "jared", rate=1) == KNOWN, "rather than limited"


def test_a_rate_counts_what_was_sent_in_the_minute_before(store):
    for number in range(5):
        sent = 1000.0 + 61 * number
        assert store.add(f"{number}", "chat", {}, "jared", rate=1, sent=sent + 2) == NEW
        later = store.add(f"{number} b", "chat", {}, "jared", rate=1, sent=sent + 59)
        assert later == Added.RATE_LIMITED
    # A message that comes late counts against its own minute.
    assert store.add("late", "chat", {}, "jared", rate=1, sent=1125) == "rate_limited"
    assert store.add("older", "chat", {}, "jared", rate=1, sent=900) == NEW


def test_a_refused_message_leaves_no_trace(store, url):
    assert store.add("1", "jared", {}, room=0) == Added.QUEUE_FULL
    assert store.add("1", "jared", {}, "jared", rate=0) == Added.RATE_LIMITED
    assert query(url, "SELECT * FROM conversation") == []
    assert query(url, "SELECT * FROM message") == []
    put(store, "1", "2")
    assert store.add("3", "jared", {}, room=2) == Added.QUEUE_FULL
    store.finish(store.claim())
    assert store.add("3", "jared", {}, room=2) == NEW


@and_pgbouncer
def test_limits_hold_for_all_processes_at_once(store, opened):
    stores = (store, opened())

    def add(number):
        where, asker = ("chat", "jared") if number < 16 else ("full", "")
        limits = {"room": 3} if number >= 16 else {"rate": 5}
        return stores[number % 2].add(str(number), where, {}, asker, **limits)

    added = in_threads(32, add)
    assert sorted(added[:16]) == [NEW] * 5 + [Added.RATE_LIMITED] * 11
    assert sorted(added[16:]) == [NEW] * 3 + [Added.QUEUE_FULL] * 13


@and_pgbouncer
def test_a_cancel_reaches_the_oldest_message_only_and_every_process(store, opened):
    assert not store.cancel("jared")
    put(store, "1", "2")
    put(store, "3", to="other")
    claims = [store.claim(), store.claim()]
    assert opened().cancel("jared")
    assert store.heartbeat(claims) == ([], claims[:1])
    store.finish(claims[0])
    later = store.claim()
    assert later.id == "2" and cancelled(store, *claims, later) == []


@and_pgbouncer
def test_a_cancel_reaches_a_message_that_is_claimed_later(store):
    put(store, "1", "2")
    assert store.cancel("jared")
    claim = store.claim()
    assert cancelled(store, claim) == [claim]
    store.finish(claim)
    assert cancelled(store, store.claim()) == []


def test_a_cancel_outlives_the_process_that_was_to_stop(store, hasty):
    put(store, "1")
    first = hasty.claim()
    store.cancel("jared")
    again = poll(store.claim)
    assert store.heartbeat([first, again]) == ([first], [again])


def test_failed_messages_are_listed_and_come_back_in_their_turn(store):
    put(store, *"12345")
    first = fail(store, "first")
    claim = store.claim()
    store.save_reply(claim, "reply", {"sent": 1})
    store.fail(claim, "second")
    [one, two] = store.failed()
    assert one[:3] == (first.seq, "1", "first") and two[1:3] == ("2", "second")
    assert 0 <= two[3] <= one[3] < 20
    held = store.claim()
    assert store.retry([claim.seq, held.seq, 10**9]) == 1
    assert store.claim() is None, "one claim for a conversation"
    assert store.finish(held)
    assert store.retry() == 1
    assert store.failed() == [] and store.load() == (4, 0, 1)
    ids = [answer(store, "yes").id for _ in range(4)]
    assert ids == list("1245")


def test_a_retried_message_has_its_reply_and_all_its_attempts(store):
    put(store, "1")
    for _ in range(2):
        store.release(store.claim(), 0, attempted=True)
    claim = store.claim()
    store.save_reply(claim, "reply", {"sent": 1})
    store.cancel("jared")
    store.fail(claim, "no")
    store.retry()
    for _ in range(3):
        claim = store.claim()
        assert not claim.exhausted
        assert (claim.reply, claim.progress) == ("reply", {"sent": 1})
        assert cancelled(store, claim) == []
        store.release(claim, 0, attempted=True)
    assert store.claim().exhausted


@and_pgbouncer
def test_retries_and_ends_at_once_count_right(store, opened):
    """What is left of `open` is compared with the messages when the test ends."""
    stores = (store, opened())
    for number in range(60):
        put(store, str(number), to=str(number % 6))

    def work(number):
        mine = stores[number % 2]
        for turn in range(20):
            if claim := mine.claim():
                mine.heartbeat([claim])
                mine.fail(claim, "no") if turn % 2 else mine.finish(claim)
            if turn % 5 == number % 5:
                mine.retry()
            if turn % 7 == 0:
                mine.forget(str(number % 6))
            mine.add(f"more {number} {turn}", str(turn % 6), {}, room=8)

    in_threads(8, work)
    store.retry()
    while claim := store.claim():
        assert store.finish(claim)
    assert store.stats()["oldest"] == 0 == store.stats()["failed"]


def test_a_row_that_cannot_be_read_is_failed(store, url):
    put(store, "1", "2", "3")
    query(url, "UPDATE message SET data = 'not json', progress = '{' WHERE id = '1'")
    query(url, "UPDATE message SET reply = 'not json' WHERE id = '2'")
    assert (answer(store).id, failed(store)) == ("2", ["1"])
    query(url, "UPDATE message SET reply = 'not json' WHERE id = '2'")
    assert texts(store) == []


@pytest.mark.parametrize("url", [SQLITE], indirect=True)
def test_many_rows_that_cannot_be_read_are_failed_and_logged_once(store, url, caplog):
    ids = [str(number) for number in range(1100)]
    put(store, "broken")
    more = ", ".join(f"('{id}', 'jared', '?', 1, 0, 0)" for id in ids)
    columns = "id, conversation, data, remember, sent, accepted"
    query(url, f"INSERT INTO message ({columns}) VALUES {more}")
    query(url, "UPDATE message SET data = '?'")
    query(url, "UPDATE conversation SET open = 1101")
    put(store, "good", to="lin")
    claims = [store.claim(), store.claim()]
    assert [claim and claim.id for claim in claims] == ["good", None]
    assert store.stats()["failed"] == 1101 and len(caplog.messages) == 1


def test_rows_of_a_newer_version_are_left_to_it(store, opened, caplog):
    newer = opened()
    newer.row_version = store.row_version + 1
    put(newer, "1", "2")
    put(newer, "3", to="lin")
    newer.finish(newer.claim())  # "1"
    newer.add("remembered", "lin", {"n": 1}, reply="x", remember=True, sent=-1.0)
    newer.finish(newer.claim())
    put(store, "4")
    claims = [store.claim(), store.claim()]
    assert [claim and claim.id for claim in claims] == ["4", None], "the others go on"
    assert store.finish(claims[0]) and store.claim() is None
    assert store.history("lin", 9) == [] and len(newer.history("lin", 9)) == 1
    assert len(caplog.messages) == 1 and "newer version" in caplog.text
    assert store.failed() == [] and store.load() == (2, 0, 0)


def test_rows_of_a_newer_version_come_back_in_time(opened, url):
    newer, older = opened(lease=0.05), opened(lease=0.05)
    newer.row_version = older.row_version + 1
    put(newer, "1")
    for _ in range(5):
        assert older.claim() is None
        query(url, "UPDATE conversation SET due = 0")  # as if its lease had passed
    claim = poll(newer.claim)
    assert claim.id == "1" and not claim.exhausted


def test_after_the_clock_was_set_back_nothing_waits_for_it(store, url):
    put(store, "held", "behind it", to="jared")
    held = store.claim()
    put(store, "1", to="lin")
    query(url, "UPDATE conversation SET due = due + 3000")
    assert store.claim() is None
    store.heartbeat([])  # of another process
    assert answer(store).id == "1"
    assert store.claim() is None, "who holds a claim has the time to extend it"
    assert lost(store, held) == [] and store.finish(held)
    assert answer(store).id == "behind it"


def test_a_database_belongs_to_one_app(url):
    with closing(open_store(url, app=1400000001)) as first:
        put(first, "1")
    with pytest.raises(StoreError, match="1400000001, and this server's is 1400000002"):
        open_store(url, app=1400000002)
    with closing(open_store(url, app=1400000001)) as again:
        assert waiting(again) == 1
    with closing(open_store(url)) as anybodys:
        assert anybodys.owner() == 1400000001


def test_a_database_without_an_owner_belongs_to_the_next_app(url):
    with closing(open_store(url)) as nobodys:
        assert nobodys.owner() is None
    with closing(open_store(url, app=2)) as store:
        assert store.owner() == 2


OLDER = [
    "ALTER TABLE conversation DROP COLUMN next",
    "ALTER TABLE conversation DROP COLUMN lane",
    "ALTER TABLE message DROP COLUMN version",
    "DROP TABLE about",
]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_database_that_lacks_newer_columns_gets_them(store, url, opened, steps):
    put(store, "1", "2")
    store.close()
    for statement in OLDER[:steps]:
        query(url, statement)
    later = opened()
    assert [answer(later).id for _ in "12"] == ["1", "2"] and later.owner() is None


def test_a_check_writes_something_and_leaves_nothing(store, url):
    store.check()
    store.check()
    assert query(url, "SELECT * FROM kept") == []


def test_a_closed_store_says_so(store):
    store.close()
    began = time.monotonic()
    for verb in (store.claim, store.stats, lambda: store.add("1", "jared", {})):
        with pytest.raises(StoreError):
            verb()
    assert time.monotonic() - began < 1


def test_a_store_goes_on_after_a_step_that_failed(store, url):
    put(store, "1")
    answer(store)
    query(url, "ALTER TABLE kept RENAME TO away")
    with pytest.raises(StoreError):
        store.forget("jared")
    query(url, "ALTER TABLE away RENAME TO kept")
    store.forget("jared")
    put(store, "2")


def test_a_claim_that_failed_half_way_does_not_wait_for_its_lease(store, url):
    put(store, "1")
    query(url, "ALTER TABLE kept RENAME TO away")
    for _ in range(5):
        with pytest.raises(StoreError):
            store.claim()
    query(url, "ALTER TABLE away RENAME TO kept")
    claim = store.claim()
    assert claim.id == "1" and not claim.exhausted


class Watched(SQLiteStore):
    """A store whose writes a test may hold up or let fail."""

    watch = staticmethod(lambda step: None)

    def _write(self, step, values):
        self.watch(step)
        return super()._write(step, values)


@pytest.fixture
def watched(tmp_path):
    store = Watched(f"sqlite:///{tmp_path}/store.db")
    yield store
    store.close()


def test_workers_write_one_at_a_time_while_a_callback_is_at_the_store(watched):
    at_once, seen = [], []
    arrived, free = threading.Event(), threading.Event()

    def watch(step):
        if step is add_step:
            arrived.set()
            free.wait(20)
            return
        at_once.append(step)
        seen.append(len(at_once))
        time.sleep(0.02)
        at_once.pop()

    watched.watch = watch
    callback = threading.Thread(target=watched.add, args=("1", "jared", {}))
    callback.start()
    assert arrived.wait(20)
    in_threads(4, lambda _: watched.claim())
    assert max(seen) == 1
    free.set()
    callback.join()
    poll(lambda: in_threads(4, lambda _: watched.claim()) and max(seen) > 1)


def test_during_an_outage_one_callback_waits_and_the_others_are_refused(watched):
    """Else the callbacks fill the server's threads and Tencent waits for a 503."""
    trying, free = [], threading.Event()

    def watch(step):
        trying.append(step)
        free.wait(20)
        raise StoreError("away")

    def add(id):
        with pytest.raises(StoreError, match="away"):
            watched.add(id, "jared", {})

    watched.watch = watch
    free.set()
    add("1")
    free.clear()
    waits = threading.Thread(target=add, args=("2",))
    waits.start()
    poll(lambda: len(trying) == 2)
    began = time.monotonic()
    for id in "34567":
        add(id)
    assert time.monotonic() - began < 5 and len(trying) == 2
    free.set()
    waits.join()
    del watched.watch
    put(watched, "8")
    assert_callbacks_do_not_wait_for_one_another(watched)


def test_a_store_that_is_busy_refuses_only_who_waited_for_it(watched):
    def watch(step):
        raise StoreBusy("slow")

    watched.watch = watch
    with pytest.raises(StoreBusy):
        watched.add("1", "jared", {})
    assert_callbacks_do_not_wait_for_one_another(watched)


def assert_callbacks_do_not_wait_for_one_another(watched):
    arrived, free = threading.Event(), threading.Event()

    def watch(step):
        del watched.watch
        arrived.set()
        free.wait(20)

    watched.watch = watch
    first = threading.Thread(target=watched.add, args=("first", "jared", {}))
    first.start()
    assert arrived.wait(20)
    put(watched, "second")
    free.set()
    first.join()
    assert watched.state("first") == "open"


# Eight threads, each of which adds 125 messages, delivers some twice, and works on what
# there is; of its claims it forgets some, and is too late with others.
WORKER = """
LEASE = 0.4
from imbot.queue import store as module
module.MAX_ATTEMPTS = 100
store, name = open_store(sys.argv[1], Timing(lease=LEASE)), sys.argv[2]
lock = threading.Lock()

def add(number, chance):
    for i in range(125):
        chat = str(chance.randrange(40))
        for _ in range(1 + (chance.random() < 0.1)):
            store.add(f"{name}-{number}-{i:03}", chat, {})
        if i % 5 == 0:
            yield

def work(number):
    chance = random.Random(f"{name}{number}")
    adding = add(number, chance)
    while True:
        more = next(adding, "all") is None
        began = time.monotonic()
        claim = store.claim()
        if claim is None:
            if not more and store.load()[:2] == (0, 0):
                return
            time.sleep(0.002)
            continue
        claimed, ended, finished = time.monotonic(), None, False
        fate = chance.random()
        if fate > 0.02:
            if fate < 0.03:
                time.sleep(LEASE * 1.2)
            store.save_reply(claim, "yes", {})
            ended = time.monotonic()
            finished = store.finish(claim)
        holds = min(ended or began + LEASE, began + LEASE)
        seen = [claim.conversation, claim.seq, claim.id, claimed, holds, ended]
        with lock:
            print(json.dumps([*seen, finished]))

threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
store.close()
"""


@pytest.mark.slow
@and_pgbouncer
def test_two_processes_of_eight_threads_lose_repeat_and_mix_up_nothing(store, url):
    """2,000 messages of 40 conversations; claims are forgotten, leases expire."""
    processes = [start_script(WORKER, url, name) for name in ("a", "b")]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [error for _, error in outputs] == ["", ""]
    claims = [json.loads(line) for out, _ in outputs for line in out.splitlines()]
    ended = sorted(claim for claim in claims if claim[-1])
    ids = [f"{p}-{t}-{i:03}" for p in "ab" for t in range(8) for i in range(125)]
    assert sorted(claim[2] for claim in ended) == ids, "each ended once"
    assert len(claims) > 2010, "some were claimed again"
    for name in {claim[0] for claim in claims}:
        held = sorted(claim[3:5] for claim in claims if claim[0] == name)
        for before, after in zip(held, held[1:], strict=False):
            assert before[1] < after[0], "two held one conversation"
        mine = [claim for claim in ended if claim[0] == name]  # by seq
        for before, after in zip(mine, mine[1:], strict=False):
            assert before[5] < after[3], "ended in another order than accepted"
    for adder in (f"{p}-{t}-" for p in "ab" for t in range(8)):
        mine = [claim for claim in ended if claim[2].startswith(adder)]
        for before, after in zip(mine, mine[1:], strict=False):
            assert before[0] < after[0] or before[2] < after[2], "numbered in order"
    assert store.load() == (0, 0, 0)


MAKER = """
print("ready", flush=True)
input()
store = open_store(sys.argv[1], app=1)
store.add(sys.argv[2], "", {})
store.close()
"""


@pytest.mark.slow
def test_eight_processes_create_the_tables_at_once(url):
    processes = [start_script(MAKER, url, str(number)) for number in range(8)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 8
    assert query(url, "SELECT open FROM conversation") == [(8,)]


@pytest.mark.slow
@and_pgbouncer
def test_what_was_acknowledged_outlives_a_kill(url, opened):
    ids = killed_adder(url)
    store = opened()
    assert waiting(store) >= len(ids)
    assert {store.add(id, "jared", {}) for id in ids} == {KNOWN}
