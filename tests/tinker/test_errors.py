"""Errors of Loops are raised as those that scripts catch."""

from __future__ import annotations

import pickle

import pytest

import loops_async as loops
import loops_tinker as tinker
from loops_tinker.errors import translated


def api(status: int) -> loops.ApiError:
    return loops.ApiError("text", status=status, request_id="q", retry_after=2.0)


def remote(error_class: str | None) -> loops.RemoteOpError:
    return loops.RemoteOpError("text", operation_id="o", operation="optim_step", run_id="r", error_class=error_class)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (api(400), tinker.BadRequestError),
        (api(401), tinker.AuthenticationError),
        (api(402), tinker.BillingError),
        (api(403), tinker.PermissionDeniedError),
        (api(404), tinker.NotFoundError),
        (api(410), tinker.NotFoundError),
        (api(409), tinker.ConflictError),
        (api(422), tinker.UnprocessableEntityError),
        (api(429), tinker.RateLimitError),
        (api(413), tinker.BadRequestError),
        (api(503), tinker.InternalServerError),
        (remote("ValueError"), tinker.RequestFailedError),
        (loops.ConnectError("text"), tinker.APIConnectionError),
        (loops.SampleTimeoutError("text"), tinker.APITimeoutError),
        (loops.NotReadyError("text"), tinker.APITimeoutError),
        (loops.ProtocolError("text"), tinker.APIResponseValidationError),
        (loops.UnsupportedError("text"), tinker.UnsupportedError),
        (loops.ProvisioningError("text", status="FAILED"), tinker.APIError),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'status', '')}",
)
def test_each_error_has_its_counterpart(error: loops.LoopsError, kind: type[tinker.TinkerError]) -> None:
    found = translated(error)
    assert type(found) is kind
    assert "text" in str(found)
    assert found.__cause__ is error
    twin = pickle.loads(pickle.dumps(found))
    assert (type(twin), str(twin), vars(twin)) == (kind, str(found), vars(found))


def test_a_status_error_says_what_came() -> None:
    found = translated(api(429))
    assert isinstance(found, tinker.APIStatusError)
    assert (found.status_code, found.request_id, found.response.status_code) == (429, "q", 429)
    assert found.response.headers == {"retry-after": "2"}
    assert found.message == str(found)


@pytest.mark.parametrize(
    ("error_class", "category"), [("ValueError", "user"), ("Dispatch", "server"), (None, "unknown")]
)
def test_a_failed_operation_says_whose_fault_it_was(error_class: str | None, category: str) -> None:
    found = translated(remote(error_class))
    assert isinstance(found, tinker.RequestFailedError)
    assert (found.category, found.request_id) == (category, "o")


def test_local_mistakes_stay_what_they_are() -> None:
    for error in (loops.InputError("x", "y"), loops.ConfigError("x"), KeyError("x")):
        assert translated(error) is error


def test_scripts_may_make_them() -> None:
    assert tinker.APITimeoutError(request=None).message == "Request timed out."
    error = tinker.BadRequestError("too long", response=None, body={"detail": "x"})
    assert error.body == {"detail": "x"}


def test_the_service_refuses(trainer: tinker.TrainingClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tinker.RequestFailedError):
        trainer.load_state("tinker://nothing/weights/x").result()
    with pytest.raises(tinker.NotFoundError, match="nothing") as caught:
        tinker.RestClient().get_training_run("nothing").result()
    assert "nothing" in str(caught.value.body)
    assert caught.value.response.json() == caught.value.body
    monkeypatch.setenv("BASETEN_API_KEY", "wrong")
    with pytest.raises(tinker.AuthenticationError):
        tinker.ServiceClient().create_lora_training_client("echo").result()
