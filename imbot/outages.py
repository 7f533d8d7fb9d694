"""When callbacks may have failed: the value "servers" in the store.

    outage = [number, since, until, first, last]

`since` and `until` are Unix seconds, `first` and `last` the seqs of the newest message
when it began and when it was noted. Each process renews the value with its heartbeats.
Nothing here waits or uses the store.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tencent import Json
from .timing import Timing


@dataclass(frozen=True)
class Heartbeat:
    """What a process knows at one of its heartbeats."""

    process: str  # "<server> <process id>"
    now: float  # Unix seconds
    newest: int  # seq of the newest message
    before: tuple[float, int]  # `now` and `newest` at the heartbeat before
    refused: bool = False  # a callback since then
    busy: bool = False  # there is no time for what was refused
    draining: bool = False

    @property
    def server(self) -> str:
        return server_of(self.process)

    def renew(self, state: Json, timing: Timing, catch_up: float) -> Json:
        """Return the value of "servers" after this heartbeat.

        {"well": {server: Unix seconds}, "newest": {server: seq}, "began": {server: Unix
        seconds}: its last heartbeat, and when it started or woke up,
        "refused": {process: [since, seq, Unix seconds of its last heartbeat, 0 if it is
        stopping]}: what is no outage yet,
        "number": of the last outage, "outages": those not swept yet,
        "sweep": [process, until]}
        """
        refused = state.get("refused", {})
        if self.refused:
            at = 0.0 if self.draining else self.now  # it is for others, at once
            refused = refused | {self.process: [*self.before, at]}
        if self.draining:  # it is well no more, and what it refused is for others
            return state | {"refused": refused}
        well, began = state.get("well", {}), state.get("began", {})
        if self.now - well.get(self.server, 0.0) > timing.outage:
            began = began | {self.server: self.now}
        silent = self._silent(well, began.get(self.server, 0.0), timing)
        due = [p for p in refused if self._is_due(p, refused[p], silent, timing)]
        outages, oldest = state.get("outages", []), self.now - catch_up
        number = state.get("number", 0)
        if found := self._outage(state, silent, [refused[p] for p in due], timing):
            since, *rest = found
            number += 1
            outages = [*outages, [number, max(since, oldest), *rest]]
        well = {
            server: at
            for server, at in well.items()
            if server not in silent and self.now - at < timing.away
        } | {self.server: self.now}
        newest = state.get("newest", {}) | {self.server: self.newest}
        return {
            "well": well,
            "newest": {server: newest[server] for server in well if server in newest},
            "began": {server: began[server] for server in well if server in began},
            "refused": {p: about for p, about in refused.items() if p not in due},
            "number": number,
            "outages": [outage for outage in outages if outage[2] > oldest],
            "sweep": self._sweep(state, timing),
        }

    def _outage(
        self, state: Json, silent: list[str], refused: list[Any], timing: Timing
    ) -> list[Any] | None:
        """Return the outage to be noted, without its number, if there is one."""
        since = [state["well"][server] for server in silent]
        since += [at for at, *_ in refused]
        first, until = [self.newest, *(seq for _, seq, _ in refused)], self.now
        if silent != [*state.get("well", {})]:
            # Others were well: what they answered since then overtook nothing.
            seqs = state.get("newest", {})
            first += [seqs.get(server, self.newest) for server in silent]
        if self.server not in state.get("well", {}) and (
            self.now > self.before[0] + timing.outage
        ):  # another server noted our silence, and we were silent longer
            since.append(self.before[0])
            first.append(self.before[1])
        if self.now < self.before[0]:  # the clock was set back: older times say nothing
            since.append(self.now - timing.outage)
            until = self.before[0] + timing.heartbeat  # by the old clock
        return [min(since), until, min(first), self.newest] if since else None

    def _silent(
        self, well: dict[str, float], began: float, timing: Timing
    ) -> list[str]:
        """Return the servers whose outage we must catch up: our own, and those already
        gone when we started."""
        if self.now > began + timing.outage:
            return []
        gone = min(began, self.now - timing.others_outage)
        return [server for server, at in well.items() if at < gone]

    def _is_due(
        self, process: str, about: list[Any], silent: list[str], timing: Timing
    ) -> bool:
        """Return whether what a process refused is noted now: our own, and what one
        that is gone left."""
        if server_of(process) in silent:
            return True
        gone = process == self.process or about[2] < self.now - timing.outage
        return gone and not self.busy

    def _sweep(self, state: Json, timing: Timing) -> list[Any]:
        """Return the process that sweeps, and until when nobody else takes over."""
        process, until = state.get("sweep", ("", 0.0))
        if process == self.process or until < self.now:
            return [self.process, self.now + timing.lease]
        return [process, until]


def due_outages(outages: list[Any], mark: Json) -> list[Any]:
    """Return the outages that a conversation was not looked up for."""
    return [outage for outage in outages if outage[0] > mark.get("number", 0)]


def server_of(process: str) -> str:
    """Return the server that a process belongs to."""
    return process.rpartition(" ")[0]


def server_name() -> str:
    """Return an id shared by the workers of this gunicorn master, new after a restart.

    The same container may give a new master the same process id.
    """
    parent, since = os.getppid(), ""
    with suppress(OSError, IndexError):
        stat = Path(f"/proc/{parent}/stat").read_text()
        since = stat.rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {parent} {since}"
