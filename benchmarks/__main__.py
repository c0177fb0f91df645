"""Run the peers in turn, print medians and ratios, and save them with a chart.

``python -m benchmarks`` runs everything (about 25 minutes), ``--quick`` a small part of it once. Every
measurement is a fresh process on one core, against a server on another; the peers take turns within each round, so
that other load on the machine affects all of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from rich.console import Console

from . import footprint, report
from .cases import CASES, Case
from .harness import MeasurementError, Numbers, run_peer, serving
from .report import Row

TIMEOUT_SECONDS = 180.0


def main() -> None:
    """Run the cases and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases, one round, nothing saved")
    parser.add_argument("--only", default="", help="cases whose names contain this; nothing saved")
    parser.add_argument("--update", action="store_true", help="replace the saved results of the cases of --only")
    given = parser.parse_args()
    console = Console()
    chosen = [case for case in CASES if given.only in case.name and (case.is_quick or not given.quick)]
    rows = []
    for case in chosen:
        with console.status(case.name):
            rows.append(measure(case, rounds=1 if given.quick else case.rounds))
    promises = footprint.promises()
    report.show(console, rows, promises)
    if given.update or len(chosen) == len(CASES):
        measured = {row.case.name: row for row in (*report.saved(), *rows)}
        report.save([measured[case.name] for case in CASES if case.name in measured], promises)


def measure(case: Case, rounds: int) -> Row:
    """Run a case in turn with every peer, and take the medians."""
    runs: dict[str, list[Numbers]] = {}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for peer in [peer for peer in case.peers if peer not in failures]:
            try:
                with serving(case.server, pin=case.pin) as url:
                    numbers = run_peer(
                        peer, [*case.arguments(peer), "--url", url], timeout=TIMEOUT_SECONDS, pin=case.pin
                    )
            except MeasurementError as reason:
                failures[peer] = str(reason)
            else:
                runs.setdefault(peer, []).append(numbers)
    return Row(case, {peer: _medians(many) for peer, many in runs.items() if peer not in failures}, failures)


def _medians(many: Sequence[Numbers]) -> Numbers:
    return {name: statistics.median(run[name] for run in many) for name in many[0]}


if __name__ == "__main__":
    main()
