"""The benchmark: how fast the bot is, on each store, next to a bare view.

    python -m benchmark                      medians of three runs, 6 minutes
    python -m benchmark --store sqlite       without PostgreSQL
    python -m benchmark --runs 1             a quick look

It starts the Procfile's own command and stays on 127.0.0.1. The exit status is 0 if no
message was refused, lost, answered twice or out of order. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

from simulator import interrupt_on_signals

from .databases import NotInstalled, find
from .figures import Figures, measure
from .stage import DATABASES


def benchmark(stores: list[str], runs: int) -> dict[str, list[Figures]]:
    """Measure everything; return the figures of each column and run."""
    found: dict[str, list[Figures]] = defaultdict(list)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for run in range(runs):
            for store in [*stores, "bare"]:
                print(f"run {run + 1} of {runs}: {store}", file=sys.stderr)
                found[store].append(measure(store, pool))
    return found


def print_table(found: dict[str, list[Figures]]) -> None:
    """Print the medians of the runs, a column a store."""
    cores, version, columns = os.cpu_count(), sys.version.split()[0], [*found.values()]
    title = f"{cores} cores, Python {version}, medians of {len(columns[0])}"
    print(f"{title:50}" + "".join(f"{store:>17}" for store in found))
    for name in columns[0][0]:
        every = [[run[name] for run in runs if name in run] for runs in columns]
        cells = [cell(runs, max if "refused" in name else median) for runs in every]
        print(f"{name:50}" + "".join(f"{text:>17}" for text in cells))


def cell(
    runs: list[tuple[float, ...]], choose: Callable[[Iterable[float]], float]
) -> str:
    """Return the figures of some runs as the table shows them."""
    values = [choose(column) for column in zip(*runs, strict=True)]
    digits = [0 if value >= 100 or not value % 1 else 1 for value in values]
    return " / ".join(f"{v:,.{d}f}" for v, d in zip(values, digits, strict=True))


def stores() -> list[str]:
    """Return the stores that this machine can run."""
    try:
        find("initdb")
    except NotInstalled as error:
        print(f"{error}: without PostgreSQL", file=sys.stderr)
        return ["sqlite"]
    return [*DATABASES]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--store", choices=[*DATABASES])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    interrupt_on_signals()
    found = benchmark([options.store] if options.store else stores(), options.runs)
    print_table(found)
    figures = [item for runs in found.values() for run in runs for item in run.items()]
    sys.exit(any(any(values) for name, values in figures if "refused" in name))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(1)
