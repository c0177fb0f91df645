"""The judgement of a chaos run: what is wrong is found, whatever the client says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.chaos.ledger import Ledger
from tests.chaos.program import Report, Size, operations, prompt
from tests.chaos.run import judged, runs_left_over, wrong_results
from tests.chaos.schedules import schedule

SIZE = Size(steps=2, samples=2)


def executed() -> tuple[Report, Ledger]:
    """Return a program that went well, and what was executed for it."""
    report, ledger = Report(run_id="r"), Ledger()
    for step in range(SIZE.steps):
        for operation in operations(step):
            ledger.note_training(operation)
            report.results[f"{operation[0]} {step}"] = 1.0
    for number in range(SIZE.samples):
        ledger.note_sample(prompt(number))
        report.results[f"sample {number}"] = [1]
    return report, ledger


def test_a_program_that_went_well_has_no_findings() -> None:
    report, ledger = executed()
    assert list(judged(report, ledger, SIZE)) == []


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda _, ledger: ledger.training.remove(operations(1)[1]), "lost"),
        (lambda _, ledger: ledger.training.append(operations(0)[0]), "doubled"),
        (lambda _, ledger: ledger.training.reverse(), "wrong"),
        (lambda _, ledger: ledger.samples.pop(prompt(0)), "lost"),
        (lambda _, ledger: ledger.note_sample(prompt(1)), "paid twice"),
        (lambda report, _: report.lost.append("x"), "lost"),
        (lambda report, _: report.untyped.append("x"), "untyped"),
    ],
)
def test_what_is_wrong_is_found(spoil: Callable[[Report, Ledger], object], kind: str) -> None:
    report, ledger = executed()
    spoil(report, ledger)
    assert [finding.kind for finding in judged(report, ledger, SIZE)] == [kind]


def test_a_run_that_no_error_names_is_left_over() -> None:
    report = Report(run_id="mine", named=["the run abc may exist"])
    assert [finding.text for finding in runs_left_over(report, {"mine", "abc", "xyz"})] == [
        "run xyz is active, and no error names it"
    ]


def test_another_result_than_undisturbed_is_wrong() -> None:
    report, reference = executed()[0], executed()[0]
    report.results["optim_step 1"] = 2.0
    report.results["sample 0"] = [2]
    assert len(list(wrong_results(report, reference, compare_samples=True))) == 2
    assert len(list(wrong_results(report, reference, compare_samples=False))) == 1


def test_a_seed_gives_one_schedule_and_none_duplicates_what_no_service_recognizes() -> None:
    for queued in (False, True):
        assert schedule("1/x/7", queued=queued) == schedule("1/x/7", queued=queued)
        faults = [fault for seed in range(300) for fault in schedule(str(seed), queued=queued)]
        kinds = {(type(fault).__name__, fault.route) for fault in faults}
        assert {name for name, _ in kinds} >= {"Drop", "LoseAnswer", "Truncate", "Stall", "Delay", "Answer", "Refuse"}
        assert {route for name, route in kinds if name == "Duplicate"}.isdisjoint(
            {"POST */sync/sample", "POST /v1/loops/*", "*"}
        )
