"""Write the tables of the guides of `docs/` that state facts of the code or measurements, from these.

Usage: python tools/guide_tables.py [--check]
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - found in ROOT
from loops_async import errors
from loops_async.errors import ApiError, LoopsError
from loops_async.protocol import LOSSES, SCORE_ALL, LossRule, Setting
from tools.tables_in_pages import replaced, table, write_or_check

DOCS: Final = ROOT / "docs"
RESULTS: Final = ROOT / "benchmarks" / "results"
BEGIN: Final = "<!-- {}, from the code: python tools/guide_tables.py -->\n"
END: Final = "<!-- end of {} -->\n"

Rows = Sequence[Sequence[str]]


def loss_inputs() -> Rows:
    """What each loss reads, and which positions count."""
    head = ["loss", "needs", "may have", "shape", "a position counts where"]
    return [head, *([f"`{name}`", *inputs_of(rule)] for name, rule in LOSSES.items())]


def inputs_of(rule: LossRule) -> list[str]:
    """Return what a loss reads."""
    shape = "(N,) or (N, K)" if rule.target_rank == 2 else "(N,)"
    shape += "; pairs of datums: chosen, rejected" if rule.group == 2 else ""
    return [codes(rule.required), codes(rule.optional), shape, f"`{rule.excluding}` is not 0"]


def loss_settings() -> Rows:
    """The settings of each loss."""
    rules = [*LOSSES.values()]
    of_all = [name for name in rules[0].settings if all(name in rule.settings for rule in rules)]
    rows = [
        [f"`{loss}`", f"`{name}`", *allowed(setting)]
        for loss, rule in LOSSES.items()
        for name, setting in rule.settings.items()
        if name not in of_all
    ]
    for name in of_all:
        whose = "every loss, embedded service alone" if name == SCORE_ALL else "every loss"
        rows.append([whose, f"`{name}`", *allowed(rules[0].settings[name])])
    return [["loss", "setting", "default", "allowed"], *rows]


def allowed(setting: Setting) -> list[str]:
    """Return the default of a setting, and what it may be."""
    if isinstance(setting.default, bool):
        return [str(setting.default), "True, False"]
    most = "" if setting.at_most == sys.float_info.max else f", at most {setting.at_most:g}"
    return [f"{setting.default:g}", f"at least {setting.at_least:g}{most}"]


def error_tree() -> Rows:
    """Every error, each below the one that it is a kind of."""
    return [["error", "also a", "HTTP status", "`retryable`", "meaning"], *_errors(LoopsError, 0)]


def _errors(kind: type[LoopsError], depth: int) -> Iterator[list[str]]:
    also = [base.__name__ for base in kind.__bases__ if not issubclass(base, LoopsError) and base is not Exception]
    statuses = ", ".join(map(str, kind.status_codes)) if issubclass(kind, ApiError) else ""
    retryable = "by its status" if issubclass(kind, ApiError) else "yes" if kind.retryable else "no"
    yield ["· " * depth + f"`{kind.__name__}`", codes(also), statuses, retryable, meaning(kind)]
    for name in errors.__all__:
        below = getattr(errors, name)
        if kind in below.__bases__:
            yield from _errors(below, depth + 1)


def meaning(kind: type[LoopsError]) -> str:
    """Return the first sentence of a docstring, without the statuses, which have a column."""
    paragraph = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r" \([\dx, ]+\)", "", re.split(r"(?<!e\.g)\. ", paragraph)[0]).removesuffix(".")


def results(name: str) -> Any:
    """Return what a benchmark has saved."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rates_of_batches() -> Rows:
    """What `python -m benchmarks.batch --on-ray --save` has measured."""
    found = results("batch")
    head = [f"{found['rows']:,} rows of {found['tokens']} tokens", "rows a second", "without its start", "CPU a row"]
    ratio = [f"{found[name]:.2f}" for name in ("ratio", "steady_ratio")]
    return [
        [*head, "memory after a fifth, and at most"],
        ["one process", *figures_of(found["one process"]), memory(found["one process"]["driver_mb"])],
        [
            f"on Ray, {found['workers']} workers",
            *figures_of(found["on Ray"]),
            f"driver {memory(found['on Ray']['driver_mb'])}; a worker {memory(found['on Ray']['largest_worker_mb'])}",
        ],
        ["Ray / one process", *ratio, "", ""],
    ]


def figures_of(run: dict[str, Any]) -> list[str]:
    """Return the rates of a run, and its CPU."""
    return [f"{run['rows_per_second']:,}", f"{run['steady_rows_per_second']:,}", f"{run['cpu_ms_per_row']:.2f} ms"]


def memory(megabytes: Sequence[int]) -> str:
    """Return memory after a fifth of the rows, and at most."""
    return f"{megabytes[0]} and {megabytes[1]} MB"


IN_SHORT: Final = {
    "CPU of a sample (512-token prompt, 4 x 256 tokens with logprobs), one at a time": "sample, 1 in flight",
    "the same, 64 in flight": "sample, 64 in flight",
    "the same, 512 in flight": "sample, 512 in flight",
    "1,024 samples at once, each answered after 1 s": "sample, 1,024 in flight, 1 s each",
    "10,000 samples at once, each answered after 1 s": "sample, 10,000 in flight, 1 s each",
    "CPU of a batch of 128 x 2,048 tokens (14 MB)": "batch of 14 MB (128 x 2,048 tokens)",
    "its memory": "peak memory of a batch of 14 MB",
    "256 runs provisioned at once, each ready after 3 s": "provision 256 runs of 3 s",
    "the checkpoints of 500 runs listed": "list the checkpoints of 500 runs",
}
"""What is said of some cases of `make bench`."""


def costs() -> Rows:
    """What `make bench` has measured, in short."""
    measured = {row["case"]: row for row in results("latest")["rows"]}
    rows = [
        [work, *(cost(measured[case], peer) for peer in ("ours", "limit", "published"))]
        for work, case in IN_SHORT.items()
    ]
    return [["work", "ours", "the limit", "published"], *rows]


def cost(row: dict[str, Any], peer: str) -> str:
    """Return what a case costs with a peer; nothing if that was not measured."""
    if peer not in row["numbers"]:
        return ""
    number = row["numbers"][peer][row["compared"]]
    match row["compared"]:
        case "cpu_us":
            return f"{number:,.0f} us" if number < 1000 else f"{number / 1000:,.1f} ms"
        case "memory_kb":
            return f"{number:,.0f} kB"
        case _:
            return f"{number:.2f} s"


def machine_of_costs() -> Rows:
    """Where and when `make bench` has measured them."""
    machine = results("latest")["machine"]
    versions = machine["versions"]
    return [
        ["date", "processor", "cores", "Python", "aiohttp", "msgspec", "published"],
        [
            machine["date"],
            machine["processor"],
            str(machine["cores"]),
            machine["python"],
            versions["aiohttp"],
            versions["msgspec"],
            machine["published"],
        ],
    ]


def codes(names: Sequence[str]) -> str:
    """Return names as they are in Markdown."""
    return ", ".join(f"`{name}`" for name in names) or "-"


PAGES: Final = {
    "losses": {"inputs of losses": loss_inputs, "settings of losses": loss_settings},
    "errors": {"tree of errors": error_tree},
    "scaling": {"rates of batches": rates_of_batches},
    "performance": {"costs": costs, "machine of the costs": machine_of_costs},
}


def path_of(name: str) -> Path:
    """Return the file of a page."""
    return DOCS / f"{name}.md"


def written(name: str, page: str) -> str:
    """Return the page of this name with its tables as they are now."""
    for title, rows in PAGES[name].items():
        page = replaced(page, BEGIN.format(title), END.format(title), table(rows()))
    return page


if __name__ == "__main__":
    sys.exit(max([write_or_check(path_of(name), partial(written, name)) for name in PAGES]))
