"""The benchmark: how fast the bot is, beside the naive bot and a bare view.

    python -m benchmark                      medians of three runs, 8 minutes
    python -m benchmark --store sqlite       one column, and those it is compared with
    python -m benchmark --runs 1             a quick look

It starts the Procfile's own command, with two processes, and stays on 127.0.0.1. It
prints a table in Markdown. The naive bot is naive.py: two calls in a thread, nothing
kept, nothing checked. The stand-in for Tencent and the AI runs beside the bot: a line
says what share of the machine it takes. The exit status is 0 if the bot refused, lost
and doubled no message, and answered in order. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from statistics import median

from simulator import interrupt_on_signals

from .databases import NotInstalled, find
from .figures import (
    BUSY,
    CALM,
    GROWING,
    LONG,
    NORMAL,
    TOO_MUCH,
    Figures,
    measure,
    measure_once,
)
from .stage import OTHER_APPS, STORES

HEADS = {
    "sqlite": "SQLite",
    "postgres": "PostgreSQL",
    "gevent": "gevent",
    "naive": "naive bot",
    "bare": "bare view",
}
CPU, ADDED = "CPU, ms an answer", "added p50 / p99, ms"
ACK = "ack p50 / p99, ms"
ACKS = "acknowledgements a second"
COMPARED = {  # figure -> which one it compares, with which column or figure
    f"{CALM}: CPU against the naive bot": (f"{CALM}: {CPU}", "naive"),
    f"{BUSY}: CPU against the naive bot": (f"{BUSY}: {CPU}", "naive"),
    f"{CALM}: added against the naive bot": (f"{CALM}: {ADDED}", "naive"),
    f"{ACKS} against the bare view": (ACKS, "bare"),
    **{
        f"{load}: CPU against a short answer": (f"{load}: {CPU}", f"{CALM}: {CPU}")
        for load in GROWING
    },
}
REACH = {  # figure -> what it should reach on two cores
    f"{LONG}: {ADDED}": "10 / 60",
    f"{NORMAL}: {ADDED}": "gevent: 15 / 60",
    f"{TOO_MUCH}: {ACK}": "p99 300",
    "refused / lost / twice / out of order": "0 / 0 / 0 / 0",
    "refused of 10,000 on kept connections": "0",
    f"{CALM}: CPU against the naive bot": "0.95",
    f"{BUSY}: CPU against the naive bot": "0.95",
    f"{CALM}: added against the naive bot": "p99 1.0",
    f"{ACKS} against the bare view": "at least 0.65",
    f"{GROWING[0]}: CPU against a short answer": "1.3",
    **{f"{load}: CPU against a short answer": "2.5" for load in GROWING[1:]},
}


def benchmark(columns: list[str], runs: int) -> dict[str, list[Figures]]:
    """Measure everything; return the figures of each column and run."""
    found: dict[str, list[Figures]] = defaultdict(list)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for run in range(runs):
            for column in columns:
                print(f"run {run + 1} of {runs}: {column}", file=sys.stderr)
                once = {} if run else measure_once(column, pool)
                found[column].append(measure(column, pool) | once)
            compare({column: figures[run] for column, figures in found.items()})
    return found


def compare(run: dict[str, Figures]) -> None:
    """Add to the figures of a run how they compare."""
    for column in run.keys() - {*OTHER_APPS}:
        for name, (figure, other) in COMPARED.items():
            ours = run[column].get(figure)
            theirs = run[other].get(figure) if other in run else run[column].get(other)
            if ours and theirs:
                pairs = zip(ours, theirs, strict=True)
                run[column][name] = tuple(mine / its for mine, its in pairs)


def print_table(found: dict[str, list[Figures]]) -> None:
    """Print the medians of the runs, a column a store."""
    cores, version, runs = os.cpu_count(), sys.version.split()[0], len(found["bare"])
    title = f"{cores} cores, Python {version}, medians of {runs}"
    print_row(title, "aim", *(HEADS[column] for column in found))
    print_row("---", *["---"] * (len(found) + 1))
    names = dict.fromkeys(n for runs in found.values() for run in runs for n in run)
    for name in names:
        every = [[run[name] for run in runs if name in run] for runs in found.values()]
        cells = [cell(runs, max if "refused" in name else median) for runs in every]
        print_row(name, REACH.get(name, ""), *cells)


def print_row(name: str, *cells: str) -> None:
    """Print a row of the table."""
    print(f"| {name:74} | " + " | ".join(f"{text:16}" for text in cells) + " |")


def cell(
    runs: list[tuple[float, ...]], choose: Callable[[Iterable[float]], float]
) -> str:
    """Return the figures of some runs as the table shows them."""
    return " / ".join(number(choose(column)) for column in zip(*runs, strict=True))


def number(value: float) -> str:
    """Return a figure with as many digits as it deserves."""
    digits = 0 if value >= 100 or not value % 1 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def columns(store: str | None) -> list[str]:
    """Return the columns that this machine can fill."""
    stores = [store] if store else STORES
    try:
        find("initdb")
    except NotInstalled as error:
        print(f"{error}: without PostgreSQL", file=sys.stderr)
        stores = [name for name in stores if name != "postgres"]
    if not find_spec("gevent"):
        print("gevent is not installed", file=sys.stderr)
        stores = [name for name in stores if name != "gevent"]
    return [*stores, *OTHER_APPS]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--store", choices=STORES)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    interrupt_on_signals()
    found = benchmark(columns(options.store), options.runs)
    print_table(found)
    ours = [runs for column, runs in found.items() if column not in OTHER_APPS]
    figures = [item for runs in ours for run in runs for item in run.items()]
    sys.exit(any(any(values) for name, values in figures if "refused" in name))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(1)
