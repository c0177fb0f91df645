"""The error tree: as documented, picklable, and honest about retrying."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator

import pytest

import loops_async
from loops_async import errors
from loops_async.errors import LoopsError

IDS = {"operation_id": "op", "operation": "optim_step", "run_id": "run"}
ANSWER = {
    "status": 503,
    "code": "BUSY",
    "reason": "WHY",
    "request_id": "req",
    "retry_after": 2.5,
    "body": {"detail": 1},
}

EXAMPLES: list[LoopsError] = [
    LoopsError("m"),
    errors.ConfigError("m"),
    errors.InputError("data[0]", "is wrong"),
    errors.BudgetExceededError("m", limit="samples", most=2, used=2, would_be=3),
    errors.UnsupportedError("m"),
    errors.ClosedError("m"),
    errors.NotReadyError("m"),
    errors.CallTimeoutError("m", timeout=1.5),
    errors.NotRecordedError("m"),
    errors.ProvisioningError("m", deployment_id="d", status="FAILED"),
    errors.SamplerTerminatedError("m", deployment_id="d", status="FAILED"),
    errors.TransportError("m"),
    errors.ConnectError("m", was_sent=False),
    errors.RequestTimeoutError("m", timeout=1.5),
    errors.SampleTimeoutError("m", timeout=1.5),
    errors.LostAnswerError("m", candidates=("run",)),
    errors.ProtocolError("m"),
    *(
        kind("m", **{**ANSWER, "status": (*kind.status_codes, 503)[0]})
        for kind in (
            errors.ApiError,
            errors.BadRequestError,
            errors.AuthenticationError,
            errors.PermissionDeniedError,
            errors.NotFoundError,
            errors.ConflictError,
            errors.RateLimitError,
            errors.ServerError,
            errors.ServerShutdownError,
        )
    ),
    errors.JournalError("m"),
    errors.JournalMismatchError("m", field="data[3]", recorded="r", given="g"),
    errors.RolloutError("m", failures={"OSError": 2}),
    errors.WorkerError("m", error_type="KeyError", traceback="t", worker="w"),
    errors.WorkerTimeoutError("m", timeout=1.5, worker="w"),
    errors.WorkerDiedError("m", worker="w"),
    errors.OperationError("m", **IDS),
    errors.RemoteOpError("m", error_class="ValueError", **IDS),
    errors.UnknownRequestError("m", **IDS),
    errors.OperationTimeoutError("m", **IDS),
]


def every_error(kind: type[LoopsError] = LoopsError) -> Iterator[type[LoopsError]]:
    """Yield every error of the library; tests and the service derive their own."""
    if kind.__module__ != errors.__name__:
        return
    yield kind
    for child in kind.__subclasses__():
        yield from every_error(child)


def documented_tree() -> dict[str, tuple[str, list[str]]]:
    """Return each name of the docstring's tree with its parent and the builtins that it says it also is."""
    assert errors.__doc__ is not None
    path: list[str] = []
    tree: dict[str, tuple[str, list[str]]] = {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"    (?P<bars>(?:[├└│]── |│   |    )*)(?P<name>[A-Z]\w+Error)\b(?P<text>.*)", line)
        if match is None:
            continue
        depth = len(match["bars"]) // 4
        del path[depth:]
        also = re.search(r"also ([^:]*)", match["text"])
        tree[match["name"]] = (path[-1] if path else "Exception", re.findall(r"\w+Error", also[1]) if also else [])
        path.append(match["name"])
    return tree


def test_the_documented_tree_is_the_real_one() -> None:
    real = {
        kind.__name__: (kind.__bases__[0].__name__, [base.__name__ for base in kind.__bases__[1:]])
        for kind in every_error()
    }
    assert documented_tree() == real


def test_every_error_is_exported() -> None:
    names = {kind.__name__ for kind in every_error()}
    assert names | {"UnfinishedSubmission"} == set(errors.__all__)
    assert names <= set(loops_async.__all__)


def test_every_error_has_an_example_here() -> None:
    assert {type(error) for error in EXAMPLES} == set(every_error())


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_pickles_with_its_fields(error: LoopsError) -> None:
    error.add_note("a note")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert vars(twin) == vars(error)
        assert twin.retryable == error.retryable


def test_a_users_subclass_pickles_too() -> None:
    error = pickle.loads(pickle.dumps(OurError("x", extra=[1])))
    assert error.extra == [1]


class OurError(LoopsError):
    def __init__(self, message: str, *, extra: list[int]) -> None:
        super().__init__(message)
        self.extra = extra


def test_what_may_be_tried_again() -> None:
    retryable = {type(error).__name__ for error in EXAMPLES if error.retryable}
    assert retryable == {
        "NotReadyError",
        "CallTimeoutError",
        "TransportError",
        "ConnectError",
        "RequestTimeoutError",
        "OperationTimeoutError",
        "WorkerDiedError",
        "RateLimitError",  # 429
        "ApiError",  # 503, as are the next two
        "ServerError",
        "ServerShutdownError",
    }


@pytest.mark.parametrize(
    ("status", "retryable"),
    [(s, False) for s in (400, 401, 403, 404, 409, 410, 413, 422, 500, 501)]
    + [(s, True) for s in (408, 429, 502, 503, 504)],
)
def test_a_status_says_whether_to_try_again(status: int, retryable: bool) -> None:
    assert errors.ApiError("m", status=status).retryable is retryable


def test_an_operations_ids_are_in_its_message() -> None:
    assert str(errors.RemoteOpError("no such file", error_class="OSError", **IDS)) == (
        "OSError: no such file (run_id=run, operation=optim_step, operation_id=op)"
    )
