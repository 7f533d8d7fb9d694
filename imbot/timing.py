"""How long the bot waits: pauses, leases and deadlines, in seconds.

Tests pass a faster Timing; a fork that wants other waits passes its own to create_app.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds, each with the reason for its length."""

    # The queue.
    lease: float = 12.0  # a claim lasts; Tencent closes a silent stream after 15
    longest_delay: float = 120.0  # a later due time was written by a clock set wrong
    poll: float = 0.5  # between two rounds of the maintenance loop
    heartbeat: float = 1.0  # between two renewals of the claims
    # After a pause or an outage of the store: other processes renew their claims, and
    # note which callbacks they refused.
    regain: float = 2.0
    again: float = 1.0  # before a message whose handler failed is claimed again
    minute: float = 60.0  # over which RATE_LIMIT counts
    prune_every: float = 3600.0  # between two deletions of what is old
    prune_pause: float = 0.02  # between their batches, so that others get their turn

    # The store. Tencent waits 2 s for the answer to a callback.
    locked: float = 1.5  # for a SQLite file that another process has locked
    look: float = 0.0005  # between two attempts to get it
    connection: float = 0.6  # for a free connection to PostgreSQL
    step: float = 1.0  # for a whole transaction there
    reconnect: float = 0.3  # during which a step is tried on another connection
    recheck: float = 0.05  # callbacks wait for the one that tries the store again
    turn: float = 5.0  # workers wait for callbacks and for each other

    # Calls of Tencent's REST API.
    call_timeout: float = 10.0  # one try of a call, from its start to its last byte
    pauses: tuple[float, ...] = (0.3, 1.5)  # before the second and the third try
    aside: float = 2.0  # a call an answer can do without: a nick, the group's talk
    nick_life: float = 3600.0  # a robot's nick is not asked for again
    nick_retry: float = 60.0  # the same, if Tencent did not tell it

    # Calls of the AI service; AI_TIMEOUT limits an answer as a whole.
    backoff: float = 0.5  # before the second try, twice as long before the third
    read_every: float = 0.2  # between two reads of an answer that streams in
    grace: float = 1.0  # after a finish_reason, in which more text may still come
    drain: float = 0.05  # for what follows an answer on its connection

    # An answer that Tencent does not take.
    patience: float = 86400.0  # during which it is sent again
    patience_with_message: float = 120.0  # the same, if Tencent rejects this message
    first_delay: float = 1.0  # before it is sent again; grows up to longest_retry
    longest_retry: float = 30.0
    save_patience: float = 10.0  # to keep an answer while the store is down
    notice_every: float = 600.0  # between two sentences why messages are refused
    log_every: float = 60.0  # between two log lines of a kind that anybody can cause
    watch: float = 5.0  # for `flask say` to see whether its text was sent

    # Tencent drops a duplicate for 120 s (one-to-one) or 300 s (groups). We stop
    # relying on it earlier, by twice the longest time that one try takes.
    duplicate_window: float = 100.0
    duplicate_window_group: float = 280.0

    # Messages whose callbacks failed.
    outage: float = 5.0  # without a heartbeat of its own, after which a server was down
    others_outage: float = 1.5  # the same for another server, which ours may replace
    away: float = 600.0  # after which a silent server is not expected back
    look_up: float = 10.0  # for one call; then the conversation is answered without
    look_up_every: float = 0.05  # between two calls; Tencent allows an app 200 a second
    rest: float = 30.0  # without look-ups after several failures in a row

    @property
    def pause(self) -> float:
        """Seconds without a heartbeat after which this process claims nothing."""
        return self.lease / 3


NORMAL = Timing()
