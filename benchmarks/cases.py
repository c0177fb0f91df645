"""The cases: one for each workload and size, with the budgets of the design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .harness import Numbers

SAMPLERS = ("limit", "ours", "published")
WITHOUT_PUBLISHED = ("limit", "ours")
COLOURS = ("ours", "ours_sync")


@dataclass(frozen=True)
class Budget:
    """A limit for a number of `peer`, which may be divided by one of another peer or reduced by it: at most `most`.

    `least`, instead of `most`, is a lower limit, e.g. for a ratio of improvement.
    """

    text: str
    peer: str
    measure: str
    most: float | None = None
    least: float | None = None
    over: tuple[str, str] | None = None
    """Peer and measure to divide by."""
    minus: tuple[str, str] | None = None
    """Peer and measure to subtract."""

    def value(self, numbers: dict[str, Numbers]) -> float | None:
        """Return the number that the budget limits; None when a peer was not measured."""
        if any(peer not in numbers for peer, _ in filter(None, ((self.peer, ""), self.over, self.minus))):
            return None
        value = numbers[self.peer][self.measure]
        if self.over:
            value /= numbers[self.over[0]][self.over[1]]
        if self.minus:
            value -= numbers[self.minus[0]][self.minus[1]]
        return value

    def is_kept_by(self, value: float) -> bool:
        """Whether `value` is within the budget."""
        return value <= self.most if self.most is not None else value >= (self.least or 0)


@dataclass(frozen=True)
class Case:
    """A workload, its size, and the number that is compared."""

    name: str
    workload: str
    count: int
    measure: str
    peers: Sequence[str] = SAMPLERS
    in_flight: int = 1
    server: Sequence[str] = ()
    extra: Sequence[str] = ()
    rounds: int = 3
    pin: bool = True
    is_quick: bool = False
    budgets: Sequence[Budget] = ()

    def arguments(self, peer: str) -> list[str]:
        """Return the command line of a peer, without the server's URL."""
        count = self.count
        if peer == "published" and self.workload == "sample":
            count = max(self.in_flight, count // 16)  # it is slow, and fewer samples are as precise
        return [self.workload, "--count", str(count), "--in-flight", str(self.in_flight), *self.extra]


def _near_limit(measure: str, most: float) -> Budget:
    return Budget(f"at most {most} x the limit", "ours", measure, most=most, over=("limit", measure))


def _ahead_of_published(measure: str) -> Budget:
    return Budget(
        "at least 10 x less than the published client", "published", measure, least=10, over=("ours", measure)
    )


NAMES = ("--token-names",)
SLOW = ("--sample-seconds", "1")
SAMPLING = [
    Case("sample, 1 in flight", "sample", 2000, "cpu_us", rounds=9, budgets=[_near_limit("cpu_us", 1.25)]),
    *(
        Case(
            f"sample, {in_flight:,} in flight",
            "sample",
            count,
            "cpu_us",
            peers,
            in_flight,
            rounds=rounds,
            is_quick=in_flight == 64,
            budgets=[_near_limit("cpu_us", 1.25), _ahead_of_published("cpu_us")],
        )
        for in_flight, count, rounds, peers in (
            (64, 3_200, 9, SAMPLERS),
            (512, 8_192, 1, SAMPLERS),  # the published client needs two minutes for it
            (1_024, 8_192, 5, WITHOUT_PUBLISHED),
            (4_096, 8_192, 5, WITHOUT_PUBLISHED),
            (10_000, 10_000, 5, WITHOUT_PUBLISHED),
        )
    ),
    Case(
        "sample, 64 in flight, by a script for tinker",
        "sample",
        3_200,
        "cpu_us",
        ("ours", "ours_tinker"),
        64,
        rounds=5,
        budgets=[Budget("at most 1.5 x our own", "ours_tinker", "cpu_us", most=1.5, over=("ours", "cpu_us"))],
    ),
    *(
        Case(
            f"sample, {in_flight:,} in flight, names of tokens",
            "sample",
            count,
            "cpu_us",
            WITHOUT_PUBLISHED,
            in_flight,
            NAMES,
            NAMES,
            rounds=9,
            budgets=[_near_limit("cpu_us", 1.25)],
        )
        for in_flight, count in ((1, 2_000), (64, 3_200), (512, 8_192))
    ),
    *(
        Case(
            f"sample, {in_flight:,} in flight, 1 s each",
            "sample",
            in_flight,
            "wall_s",
            peers,
            in_flight,
            SLOW,
            rounds=1 if in_flight >= 512 else 3,
            budgets=[_near_limit("wall_s", 1.25)] if in_flight == 1_024 else [],
        )
        for in_flight, peers in (
            (1, SAMPLERS),
            (64, SAMPLERS),
            (512, SAMPLERS),
            (1_024, SAMPLERS),
            (4_096, WITHOUT_PUBLISHED),
            (10_000, WITHOUT_PUBLISHED),
        )
    ),
    Case(
        "memory of each of 10,000 in flight",
        "sample",
        10_000,
        "memory_kb",
        WITHOUT_PUBLISHED,
        10_000,
        SLOW,
        ("--cold",),
        rounds=1,
        budgets=[Budget("at most 60 kB", "ours", "memory_kb", most=60)],
    ),
]

BATCH_PEERS = ("limit", "encode", "ours", "published")
BATCHES = [
    Case("batch of 0.1 MB (2,048 tokens)", "train", 1, "cpu_us", BATCH_PEERS),
    Case("batch of 1 MB", "train", 9, "cpu_us", BATCH_PEERS),
    Case(
        "batch of 14 MB (128 x 2,048 tokens)",
        "train",
        128,
        "cpu_us",
        BATCH_PEERS,
        rounds=5,
        is_quick=True,
        budgets=[
            Budget("CPU at most 1.3 x one encode", "ours", "cpu_us", most=1.3, over=("encode", "cpu_us")),
            _ahead_of_published("cpu_us"),
            Budget("the loop held for at most 10 ms", "ours", "held_ms", most=10),
        ],
    ),
    Case("batch of 64 MB", "train", 600, "cpu_us", BATCH_PEERS, rounds=1),
    Case(
        "peak memory of a batch of 14 MB",
        "train",
        128,
        "memory_kb",
        BATCH_PEERS,
        rounds=1,
        extra=("--cold",),
        budgets=[Budget("at most 1.5 x the body", "ours", "memory_kb", most=1.5, over=("encode", "body_kb"))],
    ),
    *(
        Case(
            f"batch of {megabytes} MB, made from {kind}",
            "train",
            rows,
            "cpu_us",
            SAMPLERS if rows == 128 else WITHOUT_PUBLISHED,
            extra=("--make", kind),
            rounds=3 if rows < 600 else 1,
        )
        for megabytes, rows in ((0.1, 1), (1, 9), (14, 128), (64, 600))
        for kind in ("lists", "numpy")
    ),
]

CONTROL = [
    *(
        Case(
            f"provision {count:,} run{'s' * (count > 1)} of 3 s",
            "provision",
            count,
            "wall_s",
            SAMPLERS if count <= 32 else WITHOUT_PUBLISHED,
            rounds=1,
            budgets=[
                Budget("at most 4.5 s", "ours", "wall_s", most=4.5),
                Budget("one thread", "ours", "threads", most=1),
            ]
            if count == 256
            else [],
        )
        for count in (1, 32, 256, 1_000)
    ),
    Case("list the checkpoints of 500 runs", "list", 500, "wall_s"),
]

FACADE = [
    Case(
        f"blocking sample, {threads} thread{'s' * (threads > 1)}",
        "sample",
        max(1_600, 50 * threads),
        "wall_us",
        COLOURS,
        threads,
        rounds=9,
        budgets=[
            Budget(
                "at most 100 us more than the coroutine", "ours_sync", "wall_us", most=100, minus=("ours", "wall_us")
            )
        ],
    )
    for threads in (1, 8, 64)
]

SCALING = [
    Case(
        f"sample_many of 16,000, {processes or 1} process{'es' * bool(processes)}",
        "sample_many",
        16_000,
        "wall_s",
        ("ours",),
        256,
        extra=("--processes", str(processes)) if processes else (),
        rounds=1,
        pin=False,
    )
    for processes in (None, 2)
]

ONE_SAMPLE = ("--samples", "1")
ROLLOUTS = [
    *(
        Case(
            f"episode, {in_flight:,} in flight, above its sample",
            "episodes",
            4_096,
            "above_us",
            ("ours",),
            in_flight,
            ONE_SAMPLE,
            rounds=5,
            budgets=[Budget("at most 300 us", "ours", "above_us", most=300)],
        )
        for in_flight in (64, 1_024)
    ),
    Case(
        "memory of each of 10,000 episodes",
        "episodes",
        10_000,
        "memory_kb",
        ("ours",),
        10_000,
        (*ONE_SAMPLE, "--sample-seconds", "5"),
        ("--cold",),
        rounds=1,
        budgets=[Budget("at most 60 kB", "ours", "memory_kb", most=60)],
    ),
]

UVLOOP = [
    Case("sample, 64 in flight, uvloop", "sample", 3_200, "cpu_us", WITHOUT_PUBLISHED, 64, extra=("--uvloop",)),
    Case("batch of 14 MB, uvloop", "train", 128, "cpu_us", WITHOUT_PUBLISHED, extra=("--uvloop",)),
]

CASES = [*SAMPLING, *BATCHES, *CONTROL, *FACADE, *SCALING, *ROLLOUTS, *UVLOOP]
